"""Each room imports only from rooms above it, and inside a room only from lower numbers.

Read from the source: imports at the head of a module and inside functions, on one line and on several, relative and absolute.
"""
import ast, re
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ['core', 'data', 'method', 'evaluation', 'training', 'tasks', 'paper', 'all']

def module_name(path, package):
    "'data.cache' of c2l_nb/data/cache.py"
    return '.'.join(path.relative_to(package).with_suffix('').parts)

def imported(source, name):
    "Modules of c2l_nb that the module `name` imports, as 'data.cache'; of `from .. import core`, 'core'"
    here = ['c2l_nb', *name.split('.')]
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            places = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            start = here[:len(here) - node.level] if node.level else []
            base = '.'.join([*start, *(node.module or '').split('.')]).strip('.')
            places = [base, *(f'{base}.{alias.name}' for alias in node.names)]
        else:
            continue
        yield from (place.removeprefix('c2l_nb.') for place in places if place.startswith('c2l_nb.'))

def numbers():
    "Module -> number of its notebook"
    found = {}
    for path in (ROOT/'nbs').rglob('*.ipynb'):
        told = re.search(r'#\| ?default_exp ([\w.]+)', path.read_text(encoding='utf-8'))
        number = re.match(r'\d+', path.name)
        if told and number:
            found[told.group(1)] = int(number.group(0))
    return found

def wrong(name, target, number):
    "Why `name` may not import `target`; '' if it may"
    room, other = name.split('.')[0], target.split('.')[0]
    if ROOMS.index(other) > ROOMS.index(room):
        return f'{name} imports {target}, of a later room'
    if room == other and number.get(target, 0) > number.get(name, 0):
        return f'{name} ({number[name]}) imports {target} ({number[target]}), a higher number of its room'
    return ''

MODULES = {module_name(p, ROOT/'c2l_nb'): p for p in sorted((ROOT/'c2l_nb').rglob('*.py')) if not p.name.startswith('_')}

@pytest.mark.parametrize('name', MODULES)
def test_imports_point_one_way(name):
    targets = {t for t in imported(MODULES[name].read_text(encoding='utf-8'), name) if t in MODULES and t != name}
    assert not [w for t in sorted(targets) if (w := wrong(name, t, numbers()))]

def test_every_module_has_a_room_and_a_number():
    assert {name.split('.')[0] for name in MODULES} <= set(ROOMS)
    assert not [name for name in MODULES if name != 'all' and name not in numbers()]

SPELLINGS = ['import c2l_nb.tasks.pretrain', 'import c2l_nb.tasks.pretrain as p', 'from c2l_nb.tasks.pretrain import main', 'from c2l_nb.tasks import pretrain',
             'from ..tasks.pretrain import main', 'from ..tasks.pretrain import (\n    main,\n    pretrain)', 'from ..tasks import (\n    pretrain\n)',
             'def f():\n    from ..tasks.pretrain import main', 'def f():\n    import os, c2l_nb.tasks.pretrain', 'if True:\n    from .. import tasks\n    from ..tasks import pretrain']

@pytest.mark.parametrize('source', SPELLINGS)
def test_every_spelling_is_seen(source):
    "A method module that imports a task, in ten ways"
    assert 'tasks.pretrain' in set(imported(source, 'method.loss'))
    assert wrong('method.loss', 'tasks.pretrain', {})

def test_numbers_count_inside_a_room():
    assert wrong('data.read', 'data.cache', {'data.read': 12, 'data.cache': 16})
    assert not wrong('data.cache', 'data.read', {'data.read': 12, 'data.cache': 16})
