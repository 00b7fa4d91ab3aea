"""BatchNorm in groups with shuffled keys, as on several GPUs, against BatchNorm of the whole batch: python nbs/results/batchnorm/run.py

For each data set, method and seed two small networks are pretrained that differ in nothing else. Scored on the valid split: neighbours (kNN),
linear probe, and, where patients have several images, retrieval of the same patient. One line of runs.csv per run, data set and task; what is
there already is not run again. `--data radiographs` needs C2L_RADIOGRAPHS. A run takes some three minutes on one core.
"""
import argparse, os, warnings
from pathlib import Path
import numpy as np, pandas as pd, torch
from torch import nn
from fastai.basics import Learner, set_seed
from c2l_nb.data.cache import pretrain_dls, to_square
from c2l_nb.training.callback import C2LCallback, C2LConfig, CosineDecay, c2l_opt
from c2l_nb.data.collections import label_matrix
from c2l_nb.evaluation.features import L2S, extract_features, knn_predict, linear_probe, retrieval_at_1
from c2l_nb.method.encoder import create_encoder
from c2l_nb.training.monitoring import HealthCallback
from c2l_nb.evaluation.metrics import auroc
from c2l_nb.method.model import C2L
from c2l_nb.data.phantom import seeded
from c2l_nb.tasks.pretrain import PHANTOM_RECIPE, load_data, probe_labels, probe_rows

here = Path(__file__).parent
SIZE, BATCH = 48, 64
FINDINGS = 'Pneumonia', 'Infiltration', 'Atelectasis', 'Edema', 'Effusion'      # of nih; the others are too rare there

class Grouped(nn.BatchNorm2d):
    "BatchNorm that normalises `groups` parts of a training batch one by one"
    groups = 8
    def forward(self, x):
        if not self.training:
            return super().forward(x)
        n, (b, c, h, w) = self.groups, x.shape
        y = x.view(n, b//n, c, h, w).transpose(0, 1).reshape(b//n, n*c, h, w)                  # parts become channels
        mean, var = self.running_mean.repeat(n), self.running_var.repeat(n)
        y = nn.functional.batch_norm(y, mean, var, self.weight.repeat(n), self.bias.repeat(n), True, self.momentum, self.eps)
        self.running_mean.copy_(mean.view(n, c).mean(0))
        self.running_var.copy_(var.view(n, c).mean(0))
        return y.view(b//n, n, c, h, w).transpose(0, 1).reshape(b, c, h, w)

class ShuffledC2L(C2L):
    "`C2L` that deals the images anew to the groups while keys are made"
    def key(self, x):
        order = torch.randperm(len(x), generator=seeded(self.config.seed, 3, self.seen))
        return super().key(x[order])[order.argsort()]

def in_groups(module):
    "Every BatchNorm of `module` becomes `Grouped`, with the same numbers"
    for name, child in module.named_children():
        if type(child) is nn.BatchNorm2d:
            grouped = Grouped(child.num_features)
            grouped.load_state_dict(child.state_dict())
            setattr(module, name, grouped)
        else:
            in_groups(child)
    return module

def load(data, cache):
    "Squares to train on, squares of the views' size, rows, positions of each task's images"
    if data == 'phantoms':
        images, rows, _ = load_data('phantoms', round(1.25*SIZE), 4096, progress=False)
        tasks = {'phantoms': np.ones(len(rows), bool)}
    else:
        index = Path(os.environ['C2L_RADIOGRAPHS'])/'index.csv'
        images, rows, _ = load_data(str(index), round(1.25*SIZE), where='body_part=chest', keep=cache)
        tasks = {name: rows.path.str.contains(f'/{name}/').values for name in ('kermany', 'nih')}
    return images, np.stack([to_square(image, SIZE) for image in images]), rows, tasks

def score(model, squares, rows, name, mask, l2s=L2S):
    "kNN, probe and retrieval of one task"
    part = rows[mask].reset_index(drop=True)
    labels = [l for l in probe_labels(part) if name != 'nih' or l in FINDINGS]
    at = np.flatnonzero(mask)
    votes, asked = (at[probe_rows(part, split)] for split in ('train', 'valid'))
    y, truth = (label_matrix(rows.iloc[i], labels) for i in (votes, asked))
    train, valid = (extract_features(model, torch.from_numpy(squares[i])[:, None]) for i in (votes, asked))
    patients = rows.patient.astype(str).values
    probed, _ = linear_probe(train, y, valid, groups=patients[votes], l2s=l2s)
    mean = lambda p: float(np.nanmean([auroc(a, b) for a, b in zip(truth.T, np.asarray(p).T)]))
    several = pd.Series(patients[asked]).duplicated().any()
    found = retrieval_at_1(valid, patients[asked]) if several else np.nan
    return dict(images=len(asked), patients=len(set(patients[asked])), knn=mean(knn_predict(train, y, valid)), probe=mean(probed), retrieval=found)

def config_of(data, method, seed, images, epochs):
    "The phantoms' recipe, or the rule for small pools"
    if data == 'phantoms':
        config = C2LConfig(**PHANTOM_RECIPE)
    else:
        config = C2LConfig.small(images, epochs*(images//BATCH), batch_size=BATCH)
    loss_a = dict(loss_weights=(1., 0., 0.), enqueue=('A',)) if method == 'moco' else {}
    return config.replace(seed=seed, batch_size=BATCH, epochs=epochs, **loss_a)

def run(data, method, seed, grouped, epochs, loaded):
    "One pretraining; a row per task, before and after"
    images, squares, rows, tasks = loaded
    train = (rows.split == 'train').values
    config = config_of(data, method, seed, int(train.sum()), epochs)
    set_seed(seed)
    body = create_encoder('tiny', channels=1)
    learn = Learner(pretrain_dls(images, BATCH, seed, rows=train), in_groups(body) if grouped else body, opt_func=c2l_opt, wd=config.wd,
                    cbs=[C2LCallback(config), HealthCallback(), CosineDecay(warmup=config.warmup)])
    before = {name: score(learn.model, squares, rows, name, mask) for name, mask in tasks.items()}
    if grouped:
        learn.model.__class__ = ShuffledC2L
    with learn.no_bar(), learn.no_logging():
        learn.fit(epochs, lr=config.lr)
    after = {name: score(learn.model, squares, rows, name, mask) for name, mask in tasks.items()}
    log = learn.health.log.iloc[-1]
    return [dict(data=data, task=name, method=method, seed=seed, groups=Grouped.groups if grouped else 1, epochs=epochs, steps=learn.train_iter,
                 **after[name], **{f'untrained_{k}': before[name][k] for k in ('knn', 'probe', 'retrieval')}, top1=log.top1, rank=log['rank']) for name in tasks]

def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--data', nargs='+', default=['phantoms', 'radiographs'], choices=['phantoms', 'radiographs'])
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1, 2])
    parser.add_argument('--epochs', type=int, default=30, help='of each run')
    parser.add_argument('--cache', default='runs/batchnorm-cache', help='folder for the squares of the radiographs')
    args = parser.parse_args()
    warnings.filterwarnings('ignore')
    torch.set_num_threads(1)
    kept = here/'runs.csv'
    for data in args.data:
        loaded = load(data, args.cache)
        for seed in args.seeds:
            for method in ('c2l', 'moco'):
                for grouped in (False, True):
                    done = pd.read_csv(kept) if kept.exists() else pd.DataFrame(columns=['data', 'method', 'seed', 'groups'])
                    if len(done[(done.data == data) & (done.method == method) & (done.seed == seed) & (done.groups.ne(1) == grouped)]):
                        continue
                    rows = run(data, method, seed, grouped, args.epochs, loaded)
                    pd.DataFrame(rows).to_csv(kept, mode='a', header=not kept.exists(), index=False, float_format='%.4f')
                    print(rows, flush=True)

if __name__ == '__main__':
    main()
