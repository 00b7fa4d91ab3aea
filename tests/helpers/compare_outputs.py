"""Which text outputs of notebooks differ from those of an earlier revision: python tests/helpers/compare_outputs.py REV

A notebook that was moved is found under its old path by git, or by the table of CHANGELOG.md. Cells are compared that have the same id; the lines
that differ are printed, nothing where nothing differs; the exit status is the number of notebooks with differences.
"""
import argparse, difflib, json, re, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

def git(*args):
    return subprocess.run(['git', *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout

def old_paths(rev):
    "New path -> path in `rev`"
    there = git('ls-tree', '-r', '--name-only', rev, 'nbs').splitlines()
    paths = {p: p for p in there if p.endswith('.ipynb')}
    told = re.findall(r'^\| (\w+) \| (\w+/\w+) \|', (ROOT/'CHANGELOG.md').read_text(encoding='utf-8'), re.M)
    for old, new in told:
        if f'nbs/{old}.ipynb' in there:
            paths.setdefault(f'nbs/{new}.ipynb', []).append(f'nbs/{old}.ipynb')
    for line in git('diff', '--name-status', '-M30%', rev, '--', 'nbs').splitlines():
        status, *names = line.split('\t')
        if status.startswith('R') and names[0].endswith('.ipynb'):
            paths.setdefault(names[1], [names[0]])
    return {new: [old] if isinstance(old, str) else old for new, old in paths.items()}

def texts(cell):
    "What a cell printed, without pictures"
    said = []
    for output in cell.get('outputs', []):
        text = output.get('text') or output.get('data', {}).get('text/plain', '')
        said.append(''.join(text))
    return re.sub(r'0x[0-9a-f]+', '0x', '\n'.join(said))

def codes(notebook):
    "Id -> code cell"
    return {cell['id']: cell for cell in notebook['cells'] if cell['cell_type'] == 'code' and 'id' in cell}

def differences(new, olds):
    "(place of the cell, removed and added lines); a notebook may have been made of several"
    before = {key: cell for old in olds for key, cell in codes(old).items()}
    for i, cell in enumerate(new['cells']):
        old = before.get(cell.get('id'))
        if cell['cell_type'] == 'code' and old and texts(cell) != texts(old):
            lines = difflib.ndiff(texts(old).splitlines(), texts(cell).splitlines())
            yield i, [line for line in lines if line[0] in '+-']

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('rev', help='revision to compare with')
    rev = parser.parse_args().rev
    before, changed = old_paths(rev), 0
    for path in sorted((ROOT/'nbs').rglob('*.ipynb')):
        name = path.relative_to(ROOT).as_posix()
        if name not in before:
            print(f'{name}: is new')
            continue
        olds = [json.loads(git('show', f'{rev}:{old}')) for old in before[name]]
        found = list(differences(json.loads(path.read_text(encoding='utf-8')), olds))
        changed += bool(found)
        for cell, lines in found:
            print(f'{name} cell {cell}:', *lines, sep='\n    ')
    sys.exit(min(changed, 100))

if __name__ == '__main__':
    main()
