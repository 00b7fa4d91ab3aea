"""Make the bundle that tests/gpu/run.sh takes to a machine with PyTorch, but without the other packages and without a network.

    python tests/gpu/bundle.py                            # .bundle/wheels; with C2L_RADIOGRAPHS set, .bundle/pool too (pack.py)

The wheels are those of the versions installed here, for --python and Linux on x86-64. What such a machine has is not taken along:
PyTorch, torchvision, numpy, pandas, scipy, scikit-learn, matplotlib, safetensors, timm, numba, filelock, pytest, requests, pyyaml,
and what these need. The folder is ignored by git; it holds at most 45 MB.
"""
import argparse, os, shutil, subprocess, sys
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
NAMES = ('fastai fastcore fasttransform fastprogress fastdownload plum-dispatch beartype rich markdown-it-py mdurl pygments cloudpickle '
         'umap-learn pynndescent pydicom').split()
PLATFORMS = 'manylinux2014_x86_64', 'manylinux_2_17_x86_64', 'manylinux_2_28_x86_64'
MOST = 45_000_000             # bytes of the bundle


def wheels(folder, python):
    "Download them"
    pins = [f'{name}=={version(name)}' for name in NAMES]
    platforms = [word for name in PLATFORMS for word in ('--platform', name)]
    subprocess.run([sys.executable, '-m', 'pip', 'download', '-q', '--no-deps', '--only-binary=:all:', '--implementation', 'cp',
                    '--python-version', python, *platforms, '-d', str(folder), *pins], check=True)


def pool(folder):
    "Pack the radiographs, unless that was done"
    if (folder/'pool.csv').is_file():
        return
    subprocess.run([sys.executable, str(ROOT/'nbs/results/gpu/pack.py'), str(folder)], check=True, env=dict(os.environ, PYTHONPATH=str(ROOT)))


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--out', type=Path, default=ROOT/'.bundle', help='folder (default .bundle)')
    p.add_argument('--python', default='3.12', help='version of Python on that machine (default 3.12)')
    args = p.parse_args()
    shutil.rmtree(args.out/'wheels', ignore_errors=True)
    wheels(args.out/'wheels', args.python)
    if os.environ.get('C2L_RADIOGRAPHS'):
        pool(args.out/'pool')
    else:
        print('C2L_RADIOGRAPHS is not set: no pool, run.py will train on phantoms')
    size = sum(f.stat().st_size for f in args.out.rglob('*') if f.is_file())
    print(f'{args.out.name}: {size/1e6:.1f} MB')
    sys.exit(f'more than {MOST/1e6:.0f} MB' if size > MOST else 0)
