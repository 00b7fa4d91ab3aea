"""Counts of what ruff and basedpyright find, which may only fall: python tests/helpers/ratchet.py [--write]

The counts allowed stand in tests/helpers/ratchet.json. With --write they are lowered to what is found; a count that rose is never written.
"""
import argparse, json, subprocess, sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KEPT = Path(__file__).with_suffix('.json')

def ruff():
    "Rule -> count"
    done = subprocess.run([sys.executable, '-m', 'ruff', 'check', '--output-format', 'json', '.'], cwd=ROOT, capture_output=True, text=True)
    if not done.stdout:
        raise SystemExit(f'ruff did not run: {done.stderr}')
    return Counter(found['code'] or 'syntax' for found in json.loads(done.stdout))

def basedpyright():
    "Rule -> count"
    done = subprocess.run([sys.executable, '-m', 'basedpyright', '--outputjson'], cwd=ROOT, capture_output=True, text=True)
    if not done.stdout:
        raise SystemExit(f'basedpyright did not run: {done.stderr}')
    found = json.loads(done.stdout)['generalDiagnostics']
    return Counter(f['rule'] for f in found if f['severity'] == 'error')

TOOLS = dict(ruff=ruff, basedpyright=basedpyright)

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--write', action='store_true', help='lower the counts to what is found')
    parser.add_argument('--only', choices=TOOLS, help='one of the two')
    args = parser.parse_args()
    allowed = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    found = {name: dict(sorted(tool().items())) for name, tool in TOOLS.items() if args.only in (None, name)}
    rose = [f'{tool} {rule}: {n}, allowed {allowed[tool].get(rule, 0)}' for tool in found for rule, n in found[tool].items()
            if allowed and n > allowed[tool].get(rule, 0)]
    print(*(f'{tool}: {sum(counts.values())} found, {sum(allowed.get(tool, counts).values())} allowed' for tool, counts in found.items()), *rose, sep='\n')
    if rose:
        sys.exit(1)
    if args.write or not allowed:
        KEPT.write_text(json.dumps(allowed | found, indent=1) + '\n')

if __name__ == '__main__':
    main()
