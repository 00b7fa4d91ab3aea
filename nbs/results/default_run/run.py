"""The default run of c2l_pretrain with three seeds: python nbs/results/default_run/run.py [--work runs/default]

Keeps what each run says of itself: scores.csv (retrieval, kNN and probe on held-out patients, before and after, with intervals) and log.csv
(its epochs). A run takes some two minutes on two idle cores; a finished one is not made again.
"""
import argparse, json, os, platform
from pathlib import Path
import pandas as pd
import torch
from c2l_nb.tasks.pretrain import pretrain

here = Path(__file__).parent

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--work', type=Path, default=Path('runs/default'), help='folder for the runs')
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    args = parser.parse_args()
    scores, logs = [], []
    for seed in args.seeds:
        out = args.work/f'seed-{seed}'
        if not (out/'report.html').is_file():
            pretrain(out=str(out), seed=seed, resume=(out/'config.json').is_file())
        scores.append(pd.read_csv(out/'scores.csv').assign(seed=seed))
        logs.append(pd.read_csv(out/'log.csv').drop(columns='time').assign(seed=seed))
    pd.concat(scores).to_csv(here/'scores.csv', index=False, float_format='%.4f')
    pd.concat(logs).to_csv(here/'log.csv', index=False, float_format='%.4g')
    about = json.loads((args.work/f'seed-{args.seeds[0]}'/'config.json').read_text())
    facts = dict(command='python nbs/results/default_run/run.py', seeds=args.seeds, data=about['data'], config=about['config'], arch=about['arch'],
                 versions=about['versions'], cores=os.cpu_count(), threads=torch.get_num_threads(), machine=platform.machine())
    (here/'run.json').write_text(json.dumps(facts, indent=1) + '\n')

if __name__ == '__main__':
    main()
