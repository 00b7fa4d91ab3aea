"""Score the backbones of runs on the labelled radiographs: the files that notebook 70 computes from.

    export C2L_RADIOGRAPHS=/path/to/radiographs
    python nbs/results/first_run/score.py RUN [RUN ...] --split valid
    python nbs/results/first_run/score.py --untrained 5 --pixels 12 --split valid

RUN is a folder of `c2l_pretrain --snapshots N`. Writes one CSV a run beside this file: a row for each image and epoch with hashed ids, the label, and
the scores of kNN and of a linear probe, both fitted on the images of split train alone.
"""
import argparse, hashlib, json, os, sys
from pathlib import Path
import numpy as np, pandas as pd, torch
from torch import nn
from fastprogress.fastprogress import progress_bar
from c2l_nb import __version__
from c2l_nb.data.cache import load_squares
from c2l_nb.data.collections import index_csv
from c2l_nb.evaluation.features import extract_features, knn_predict, linear_probe
from c2l_nb.method.encoder import Prepare, create_encoder
from c2l_nb.training.weights import load_backbone, read_card

here = Path(__file__).parent
TASKS = dict(kermany=['NORMAL', 'bacteria', 'virus'], nih=['No Pneumonia', 'Pneumonia'])
short = lambda text: hashlib.sha256(text.encode()).hexdigest()[:10]

def target(task, labels):
    "Class number of each image"
    if task == 'nih': return labels.str.contains('Pneumonia').astype(int)
    return labels.map(lambda l: 0 if l == 'NORMAL' else 1 if 'bacteria' in l else 2)

def load(size, split):
    "Images and table of each task: the train split, and the one that is scored"
    root = Path(os.environ['C2L_RADIOGRAPHS'])
    table = index_csv(root/'index.csv')
    table['file'] = [Path(p).relative_to(root.resolve()).as_posix() for p in table.path]
    table['task'] = table.file.str.split('/').str[0]
    table = table[table.task.isin(TASKS) & table.split.isin(['train', split])].reset_index(drop=True)
    images, rows, bad = load_squares(table, size)
    assert not len(bad)
    return torch.from_numpy(images)[:, None], rows.assign(y=0)

def score(body, prepare, images, rows, split):
    "A row for each image of `split`"
    feats, out = extract_features(body, images, prepare=prepare), []
    for task in TASKS:
        train, asked = [np.flatnonzero((rows.task == task) & (rows.split == s)) for s in ('train', split)]
        y = torch.tensor(target(task, rows.labels[rows.task == task]).reindex(rows.index, fill_value=0).values)
        z = (feats - feats[train].mean(0))/feats[train].std(0).clamp_min(1e-6)
        knn = knn_predict(z[train], y[train], z[asked])
        probe, l2 = linear_probe(feats[train], y[train], feats[asked], groups=rows.patient.values[train])
        part = pd.DataFrame(dict(task=task, image=rows.file.iloc[asked].map(short), patient=(task + rows.patient.iloc[asked]).map(short), y=y[asked].numpy()))
        for name, s in dict(knn=knn, probe=probe).items():
            for c in range(s.shape[1]): part[f'{name}{c}'] = np.round(s[:, c].numpy(), 5)
        out.append(part.assign(l2=l2))
    return pd.concat(out)

def bodies(args):
    "name, epoch, body and its preparation"
    for seed in range(args.untrained):
        torch.manual_seed(seed)
        yield 'untrained', seed, create_encoder('resnet18', channels=1), Prepare(channels=1), args.size
    if args.pixels: yield 'pixels', 0, nn.Sequential(nn.AdaptiveAvgPool2d(args.pixels), nn.Flatten()), Prepare(channels=1), args.size
    for run in args.runs:
        for path in sorted(Path(run, 'snapshots').glob('epoch-*.safetensors'))[-1*args.last:]:
            card = read_card(path)
            yield Path(run).name, card['epoch'], load_backbone(path), Prepare(card['mean'], card['std'], card['channels']), card['size']

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('runs', nargs='*', help='run folders of c2l_pretrain --snapshots N')
    parser.add_argument('--untrained', type=int, default=0, help='so many fresh networks, seeds 0, 1, …, in place of epochs')
    parser.add_argument('--pixels', type=int, default=0, help='no network: the image, reduced to so many px a side, as its features')
    parser.add_argument('--split', default='valid', choices=['valid', 'test'])
    parser.add_argument('--last', action='store_true', help='the last snapshot of each run alone')
    parser.add_argument('--size', type=int, default=48, help='px, for untrained networks; runs have their own')
    args = parser.parse_args()
    if 'C2L_RADIOGRAPHS' not in os.environ: sys.exit('set C2L_RADIOGRAPHS to the folder of the radiographs')
    found, data = {}, {}
    for name, epoch, body, prepare, size in progress_bar(list(bodies(args))):
        if size not in data: data[size] = load(size, args.split)
        found.setdefault(name, []).append(score(body, prepare, *data[size], args.split).assign(epoch=epoch))
    for name, parts in found.items():
        pd.concat(parts).to_csv(here/f'{name}-{args.split}.csv', index=False)
        run = next((Path(r) for r in args.runs if Path(r).name == name), None)
        about = json.loads((run/'config.json').read_text()) if run else dict(seeds=args.untrained, pixels=args.pixels, size=args.size)
        if run: pd.read_csv(run/'log.csv').drop(columns='time').to_csv(here/f'{name}-log.csv', index=False)
        about |= dict(scored=dict(split=args.split, c2l_nb=__version__, torch=torch.__version__))
        (here/f'{name}-{args.split}.json').write_text(json.dumps(about, indent=1))

if __name__ == '__main__': main()
