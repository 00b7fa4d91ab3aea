"Scripts under nbs/results answer --help, and the commands that made what is stored there still parse."

import inspect, json, shlex, subprocess, sys
from pathlib import Path
import pytest
from fastcore.script import anno_parser
from c2l_nb.tasks.pretrain import main

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT / 'nbs' / 'results').glob('*/*.py'))

HELP = """import contextlib, io, json, runpy, sys
from pathlib import Path
said = {}
for path in sys.argv[1:]:
    sys.argv, out = [path, '--help'], io.StringIO()
    sys.path.insert(0, str(Path(path).parent))
    with contextlib.redirect_stdout(out):
        try:
            runpy.run_path(path, run_name='__main__')
        except SystemExit as end:
            said[path] = out.getvalue() if not end.code else str(end.code)
    sys.path.pop(0)
print(json.dumps(said))"""


def test_scripts_explain_themselves():
    "In a process of their own: what they import and set does not reach other tests"
    paths = [str(p) for p in SCRIPTS]
    done = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', HELP, *paths], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    said = json.loads(done.stdout.splitlines()[-1])
    assert paths and not [path for path in paths if 'usage' not in said.get(path, '')]


def commands(tree):
    "What stands under `command`, anywhere in a JSON file; a newer form under `command_today` takes its place"
    if isinstance(tree, list):
        for item in tree:
            yield from commands(item)
    if isinstance(tree, dict):
        if isinstance(tree.get('command'), str):
            yield tree.get('command_today', tree['command'])
        for value in tree.values():
            yield from commands(value)


STORED = sorted(
    {
        c
        for path in (ROOT / 'nbs' / 'results').rglob('*.json')
        for c in commands(json.loads(path.read_text(encoding='utf-8')))
    }
)


def test_stored_commands_name_scripts_that_are_there():
    named = [word for command in STORED for word in shlex.split(command) if word.endswith('.py') and '/' in word]
    assert named and not [word for word in named if not (ROOT / word).is_file()]


@pytest.mark.parametrize('command', [c for c in STORED if c.startswith('c2l_pretrain')])
def test_stored_commands_parse(command):
    anno_parser(inspect.unwrap(main)).parse_args(shlex.split(command)[1:])
