"Exercises of the notebooks: each has a solution; slow: unsolved cells fail, solved ones pass."

import json
import re
from pathlib import Path
import matplotlib
import pytest
from fastcore.xtras import working_directory

ROOT = Path(__file__).resolve().parents[2]
SOLUTIONS = sorted((ROOT / 'nbs' / 'solutions').glob('*.py'))


def cells(path):
    "Sources of a notebook's code cells"
    found = json.loads(path.read_text(encoding='utf-8'))['cells']
    return [''.join(c['source']) for c in found if c['cell_type'] == 'code']


def is_exercise(source):
    return source.startswith('#| exercise')


def solutions(path):
    "Parts of a file of solutions, in order"
    return re.split(r'^# %% \d+\n', path.read_text(encoding='utf-8'), flags=re.M)[1:]


def solved(source, solution):
    "An exercise's cell with the line that holds `...` replaced"
    lines = source.splitlines()
    at = [i for i, line in enumerate(lines) if '...' in line and '=' in line]
    assert len(at) == 1, f"one line to be filled in, found {len(at)}: {source}"
    return '\n'.join([*lines[: at[0]], solution, *lines[at[0] + 1 :]])


def notebook_of(path):
    "The notebook that a file of solutions belongs to"
    return next((ROOT / 'nbs').glob(f'*/{path.stem}.ipynb'))


def test_every_exercise_has_a_solution():
    "As many parts as exercise cells, and no exercise without a file of solutions"
    with_exercises = {p.stem for p in (ROOT / 'nbs').glob('*/*.ipynb') if any(map(is_exercise, cells(p)))}
    assert with_exercises == {p.stem for p in SOLUTIONS}
    for path in SOLUTIONS:
        exercises = [s for s in cells(notebook_of(path)) if is_exercise(s)]
        assert len(exercises) == len(solutions(path)) >= 1, path.name
        for source, solution in zip(exercises, solutions(path)):
            assert 'assert ' in source and '...' not in solved(source, solution), path.name


@pytest.mark.slow
@pytest.mark.parametrize('path', SOLUTIONS, ids=lambda p: p.stem)
def test_exercises_fail_unsolved_and_pass_solved(path):
    "The notebook's cells one after the other; an exercise first as it stands, then with its solution"
    matplotlib.use('agg')
    found, names = iter(solutions(path)), {}
    notebook = notebook_of(path)
    with working_directory(notebook.parent):
        for source in cells(notebook):
            if re.match(r'#\| (slow|cuda|data)', source):
                continue
            if is_exercise(source):
                with pytest.raises(Exception):
                    exec(source, dict(names))
                source = solved(source, next(found))
            exec(compile(source, notebook.name, 'exec'), names)
