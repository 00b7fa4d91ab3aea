"What surrounds the tests of tests/gpu: files cut and joined, the packed pool, the encoders put aside and back; slow: the whole command at toy size."
import importlib.util, os, re, subprocess, sys
from pathlib import Path
import numpy as np
import pandas as pd
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]


def load(name):
    "A script beside the results, as a module"
    spec = importlib.util.spec_from_file_location(f'gpu_{name}', ROOT/f'nbs/results/gpu/{name}.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize('size', [1, 10, 25, 120])
def test_a_file_is_cut_and_joined(tmp_path, size):
    "Parts of at most 10 bytes, whose numbers go beyond one digit; the file is the same again"
    run, path, data = load('run'), tmp_path/'net.safetensors', os.urandom(size)
    path.write_bytes(data)
    parts = run.split(path, most=10)
    assert not path.exists() and len(parts) == -(-size//10) and max(p.stat().st_size for p in parts) <= 10
    assert run.join(path).read_bytes() == data
    with pytest.raises(FileNotFoundError, match='other.0 is not there'):
        run.join(tmp_path/'other')


def test_packed_pool_is_read_as_it_was_written(tmp_path):
    "Squares, labels and splits in order; images and patients named by hashes; nothing of the names is left"
    pack, run = load('pack'), load('run')
    (tmp_path/'kermany').mkdir()
    rows = pd.DataFrame(dict(file=[f'kermany/person{i}.png' for i in range(12)], patient=['Ann', 'Bob', ''] * 4,
                             labels=['A', 'B', 'A|B'] * 4, split=['train', 'valid', 'test'] * 4))
    for i, name in enumerate(rows.file):
        Image.fromarray(np.full((40, 60), 20*i, np.uint8)).save(tmp_path/name)
    rows.to_csv(tmp_path/'index.csv', index=False)
    quality, count = pack.pack(tmp_path/'index.csv', tmp_path/'pool', side=32, most=12*700)
    images, table = run.packed(tmp_path/'pool')
    assert count == 12 and quality in pack.QUALITIES and (tmp_path/'pool/pool.bin').stat().st_size < 12*700
    assert images.shape == (12, 32, 32) and np.abs(images.mean((1, 2)) - 20*np.arange(12)).max() < 2
    assert table.labels.tolist() == rows.labels.tolist() and table.split.tolist() == rows.split.tolist()
    assert table.patient.nunique() == 2 and table.patient.isna().tolist() == [False, False, True]*4
    text = (tmp_path/'pool/pool.csv').read_text()
    assert not any(word in text for word in ('person', 'Ann', 'Bob'))
    with pytest.raises(ValueError, match='do not fit'):
        pack.pack(tmp_path/'index.csv', tmp_path/'pool', side=32, most=100)


@pytest.mark.parametrize('command, code', [('true', 0), ('false', 1), ('kill -TERM $PPID; sleep 1', 130)])
def test_encoders_are_put_aside_and_back(tmp_path, command, code):
    "In a checkout of its own: out of the tree while the command runs, back whatever becomes of it, and nothing has changed for git"
    def git(*words):
        return subprocess.run(['git', '-C', tmp_path, *words], check=True, capture_output=True, text=True).stdout

    for name in ('tests/gpu', 'nbs/results/encoders'):
        (tmp_path/name).mkdir(parents=True)
    script = tmp_path/'tests/gpu/aside.sh'
    script.write_text((ROOT/'tests/gpu/aside.sh').read_text())
    (tmp_path/'nbs/results/encoders/net.safetensors').write_text('weights')
    git('init', '-q')
    git('add', '-A')
    git('-c', 'user.name=n', '-c', 'user.email=e', 'commit', '-qm', 'all')
    there = 'ls nbs/results/encoders | wc -l > seen'
    done = subprocess.run(['bash', script, 'bash', '-c', f'{there}; {command}'], cwd=tmp_path)
    assert done.returncode == code and (tmp_path/'seen').read_text().strip() == '0'
    (tmp_path/'seen').unlink()
    assert git('status', '--porcelain') == '' and not (tmp_path/'.git/c2l-encoders').exists()


@pytest.mark.slow
def test_the_whole_command_at_toy_size(tmp_path):
    "From the present environment, on the CPU and on phantoms: all three parts leave their files, few and small"
    command = ['bash', ROOT/'tests/gpu/run.sh', '--limit', '900', '--out', tmp_path/'out', '--device', 'cpu', '--bundle', tmp_path/'none']
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ['PATH']])
    done = subprocess.run(command, env=dict(os.environ, PATH=path), capture_output=True, text=True)
    log = (tmp_path/'out/log.txt').read_text()
    told = log[-5000:] + done.stderr[-2000:]
    assert done.returncode == 0 and not re.search(r'[0-9] (failed|error)|Traceback', log), told
    assert 'failed: []; skipped: []' in log and re.search(r'[0-9] passed', log), told
    files = list((tmp_path/'out').iterdir())
    assert len(files) <= 8 and max(f.stat().st_size for f in files) < 16_000_000
    assert {'log.txt', 'tests.xml', 'bench.json', 'run.json', 'scores.npz', 'c2l.safetensors.0'} <= {f.name for f in files}
