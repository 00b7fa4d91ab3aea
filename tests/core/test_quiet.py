"What a command prints at its start: a warning of torch about fastai's import is left out, and nothing else."
import subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parents[2]
CODE = """import sys, warnings
sys.argv = sys.argv[1:]
import c2l_nb
warnings.warn('`torch.jit.script` is deprecated. Please switch to `torch.compile` or `torch.export`.', FutureWarning)
warnings.warn('another', FutureWarning)
print(__import__('json').dumps([m for m in sys.modules if m.split('.')[0] in ('torch', 'fastai')]))"""

@pytest.mark.parametrize('name, quiet', [('bin/c2l_finetune', True), ('-m', True), ('c2l_embed.exe', True), ('train.py', False), ('', False)])
def test_commands_alone_are_quiet(name, quiet):
    "A program that imports the package keeps its warnings; the package itself imports nothing heavy"
    done = subprocess.run([sys.executable, '-c', CODE, name], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0 and done.stdout.strip() == '[]' and 'FutureWarning: another' in done.stderr
    assert ('jit.script' in done.stderr) is not quiet
