"""Which text outputs of notebooks differ from those of an earlier revision: python tests/helpers/compare_outputs.py REV

A notebook that was moved is found under its old path by git. Cells are compared in order; one line per difference, nothing where
nothing differs; the exit status is the number of notebooks with differences.
"""
import argparse, difflib, json, re, subprocess, sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

def git(*args):
    return subprocess.run(['git', *args], cwd=ROOT, capture_output=True, text=True, check=True).stdout

def old_paths(rev):
    "New path -> path in `rev`"
    paths = {p: p for p in git('ls-tree', '-r', '--name-only', rev, 'nbs').splitlines() if p.endswith('.ipynb')}
    for line in git('diff', '--name-status', '-M30%', rev, '--', 'nbs').splitlines():
        status, *names = line.split('\t')
        if status.startswith('R') and names[0].endswith('.ipynb'):
            paths[names[1]] = names[0]
    return paths

def texts(cell):
    "What a cell printed, without pictures"
    said = []
    for output in cell.get('outputs', []):
        text = output.get('text') or output.get('data', {}).get('text/plain', '')
        said.append(''.join(text))
    return re.sub(r'0x[0-9a-f]+', '0x', '\n'.join(said))

def codes(notebook):
    return [cell for cell in notebook['cells'] if cell['cell_type'] == 'code']

def differences(new, old):
    "(cell, removed and added lines) of two notebooks"
    a, b = [texts(c) for c in codes(old)], [texts(c) for c in codes(new)]
    if len(a) != len(b):
        yield None, [f'{len(a)} code cells became {len(b)}']
    for i, (x, y) in enumerate(zip(a, b)):
        if x != y:
            yield i, [l for l in difflib.ndiff(x.splitlines(), y.splitlines()) if l[0] in '+-']

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
        old = json.loads(git('show', f'{rev}:{before[name]}'))
        found = list(differences(json.loads(path.read_text(encoding='utf-8')), old))
        changed += bool(found)
        for cell, lines in found:
            print(f'{name} cell {cell}:', *lines, sep='\n    ')
    sys.exit(min(changed, 100))

if __name__ == '__main__':
    main()
