"Scripts under nbs/results answer --help, and the commands that made what is stored there still parse."
import inspect, json, runpy, shlex, sys
from pathlib import Path
import pytest
from fastcore.script import anno_parser
from c2l_nb.tasks.pretrain import main

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted((ROOT/'nbs'/'results').glob('*/*.py'))

@pytest.mark.parametrize('path', SCRIPTS, ids=lambda p: f'{p.parent.name}/{p.name}')
def test_script_explains_itself(path, monkeypatch, capsys):
    monkeypatch.setattr(sys, 'argv', [str(path), '--help'])
    monkeypatch.syspath_prepend(path.parent)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(path), run_name='__main__')
    assert not end.value.code and 'usage' in capsys.readouterr().out

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

STORED = sorted({c for path in (ROOT/'nbs'/'results').rglob('*.json') for c in commands(json.loads(path.read_text(encoding='utf-8')))})

def test_stored_commands_name_scripts_that_are_there():
    named = [word for command in STORED for word in shlex.split(command) if word.endswith('.py') and '/' in word]
    assert named and not [word for word in named if not (ROOT/word).is_file()]

@pytest.mark.parametrize('command', [c for c in STORED if c.startswith('c2l_pretrain')])
def test_stored_commands_parse(command):
    anno_parser(inspect.unwrap(main)).parse_args(shlex.split(command)[1:])
