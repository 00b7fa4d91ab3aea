"""Draws a picture of README, default_run.svg, from nbs/results/default_run: python nbs/images/default_run.py"""
import argparse
from pathlib import Path

import matplotlib
import pandas as pd

matplotlib.use('agg')
from matplotlib import pyplot as plt  # noqa: E402

here = Path(__file__).parent
PANELS = {
    'retrieval': 'most similar image\nshows the same patient',
    'knn': 'neighbours vote on findings,\nmean AUROC',
    'top1': 'right key first\namong 1,024 negatives',
}


def draw(log, scores):
    "By epoch, a line per seed; dashed, the untrained network"
    plt.rcParams.update({'svg.hashsalt': 'c2l_nb', 'svg.fonttype': 'none', 'font.size': 9})
    figure, axes = plt.subplots(1, 3, figsize=(8.4, 2.5), layout='constrained')
    for axis, (column, title) in zip(axes, PANELS.items()):
        for seed, run in log.groupby('seed'):
            (line,) = axis.plot(run.epoch + 1, run[column], label=f'seed {seed}')
            for level in scores[(scores.seed == seed) & (scores.measure == column)].untrained:
                axis.axhline(level, color=line.get_color(), linestyle='--', linewidth=0.8)
        axis.set_title(title, fontsize=9)
        axis.set_xlabel('epochs')
    axes[0].legend(fontsize=8)
    axes[1].text(0.97, 0.05, 'dashed: untrained', transform=axes[1].transAxes, ha='right', fontsize=8)
    return figure


if __name__ == '__main__':
    argparse.ArgumentParser(description=__doc__).parse_args()
    stored = here.parent / 'results' / 'default_run'
    figure = draw(pd.read_csv(stored / 'log.csv'), pd.read_csv(stored / 'scores.csv'))
    figure.savefig(here / 'default_run.svg', metadata={'Date': None})
