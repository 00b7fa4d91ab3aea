"The front door: what `from c2l_nb.all import *` brings, and what importing the package alone does not load."
import json, subprocess, sys
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parents[2]

def run(code):
    "The last line that a fresh process prints, from JSON"
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])

@pytest.fixture(scope='module')
def names():
    "Names of fastai, names of ours, names that both have with another meaning"
    return run("import json\n"
               "theirs, ours = {}, {}\n"
               "exec('from fastai.vision.all import *', theirs)\n"
               "exec('from c2l_nb.all import *', ours)\n"
               "ours.pop('__builtins__')\n"
               "learner = theirs['Learner']\n"
               "print(json.dumps([sorted(ours), [n for n in ours if n in theirs and theirs[n] is not ours[n]],\n"
               "                  [hasattr(learner, n) for n in ('show_pairs', 'plot_health', 'export_backbone')]]))")

def test_no_name_of_fastai_is_shadowed(names):
    assert names[1] == []

def test_the_names_that_readme_uses_are_there(names):
    assert {'C2LCallback', 'C2LConfig', 'C2LLoss', 'RadiographBlock', 'c2l_opt', 'create_encoder', 'load_backbone', 'read_card', 'folder'} <= set(names[0])
    assert 35 <= len(names[0]) <= 60

def test_no_module_comes_along(names):
    "`data` or `training` in a reader's notebook would be a surprise"
    assert not {'data', 'method', 'evaluation', 'training', 'tasks', 'paper', 'core', 'torch', 'np'} & set(names[0])

def test_learner_has_the_methods(names):
    assert names[2] == [True, True, True]

def test_importing_the_package_loads_nothing_heavy():
    heavy = {'torch', 'torchvision', 'fastai', 'numpy', 'pandas', 'matplotlib', 'scipy', 'umap'}
    loaded = run("import sys, json, c2l_nb\nprint(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))")
    assert not heavy & set(loaded)

def test_plotting_a_map_alone_imports_umap():
    "It takes seconds, so it is imported inside the function that needs it"
    assert 'umap' not in run("import sys, json, c2l_nb.all\nprint(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))")
