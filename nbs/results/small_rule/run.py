"""How `C2LConfig.small` should choose for short runs: python nbs/results/small_rule/run.py --arch tiny

From the rule as it stands one thing at a time is changed (momentum, crop, head, learning rate, queue, holes, flip), at
several lengths. Each run is scored on the valid split of its data (retrieval where patients have several images,
neighbours, linear probe) before and after. One line of runs.csv per run and task; what is there already is not run
again. `--data radiographs` needs C2L_RADIOGRAPHS.
"""

import argparse
import importlib.util
import warnings
from pathlib import Path
import pandas as pd
import torch
from fastai.basics import Learner, set_seed
from c2l_nb.data.cache import pretrain_dls
from c2l_nb.evaluation.features import L2S
from c2l_nb.method.encoder import create_encoder
from c2l_nb.training.callback import C2LCallback, C2LConfig, CosineDecay, c2l_opt
from c2l_nb.training.monitoring import HealthCallback

here = Path(__file__).parent
spec = importlib.util.spec_from_file_location('batchnorm_run', here.parent / 'batchnorm' / 'run.py')
batchnorm = importlib.util.module_from_spec(spec)
spec.loader.exec_module(batchnorm)

VARIANTS = {
    'rule': {},
    'momentum .99': dict(momentum=0.99),
    'momentum .9': dict(momentum=0.9),
    'momentum .999': dict(momentum=0.999),
    'crop .2': dict(crop=(0.2, 1.0)),
    'crop .6': dict(crop=(0.6, 1.0)),
    'linear head': dict(head='linear'),
    'lr .005': dict(lr=0.005),
    'lr .05': dict(lr=0.05),
    'queue 256': dict(queue_size=256),
    'queue 1024': dict(queue_size=1024),
    'queue 8192': dict(queue_size=8192),
    'one small hole': dict(cutout=(1, 16)),
    'no hole': dict(cutout=(0, 16)),
    'no flip': dict(flip=0.0),
    'jitter .2': dict(jitter=0.2),
    'no rotation': dict(rotation=0.0),
    'loss A alone': dict(loss_weights=(1.0, 0.0, 0.0), enqueue=('A',)),
    'phantom recipe': dict(
        queue_size=1024,
        momentum=0.99,
        crop=(0.6, 1.0),
        flip=0.0,
        cutout=(1, 16),
        jitter=0.2,
        head='linear',
        lr=0.005,
        warmup=0.05,
    ),
}


UNTRAINED = {}  # scores before training, by data, network and seed


def scores(model, squares, rows, tasks):
    "Of each task; strengths of the probe below .01 take longest and were not chosen"
    return {name: batchnorm.score(model, squares, rows, name, mask, L2S[:4]) for name, mask in tasks.items()}


def run(data, arch, variant, changes, seed, steps, loaded):
    "One pretraining of about `steps` steps; a row per task"
    images, squares, rows, tasks = loaded
    train = (rows.split == 'train').values
    batches = int(train.sum()) // batchnorm.BATCH
    epochs = max(1, round(steps / batches))
    config = C2LConfig.small(int(train.sum()), epochs * batches, batch_size=batchnorm.BATCH).replace(
        seed=seed, epochs=epochs, **changes
    )
    set_seed(seed)
    body = create_encoder(arch, channels=1)
    learn = Learner(
        pretrain_dls(images, batchnorm.BATCH, seed, rows=train),
        body,
        opt_func=c2l_opt,
        wd=config.wd,
        cbs=[C2LCallback(config), HealthCallback(), CosineDecay(warmup=config.warmup)],
    )
    if (data, arch, seed) not in UNTRAINED:
        UNTRAINED[data, arch, seed] = scores(learn.model, squares, rows, tasks)
    before = UNTRAINED[data, arch, seed]
    with learn.no_bar(), learn.no_logging():
        learn.fit(epochs, lr=config.lr)
    after = scores(learn.model, squares, rows, tasks)
    log = learn.health.log.iloc[-1]
    return [
        dict(
            data=data,
            task=name,
            arch=arch,
            variant=variant,
            seed=seed,
            steps=learn.train_iter,
            wanted=steps,
            epochs=epochs,
            **after[name],
            **{f'untrained_{k}': before[name][k] for k in ('knn', 'probe', 'retrieval')},
            top1=log.top1,
            rank=log['rank'],
        )
        for name in tasks
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--arch', default='tiny', help='network')
    parser.add_argument('--data', nargs='+', default=['radiographs', 'phantoms'], choices=['phantoms', 'radiographs'])
    parser.add_argument('--seeds', nargs='+', type=int, default=[0, 1])
    parser.add_argument(
        '--steps', nargs='+', type=int, default=[300, 1200], help='lengths of the runs, in steps of 64 images'
    )
    parser.add_argument('--variants', nargs='+', default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument('--cache', default='runs/batchnorm-cache', help='folder for the squares of the radiographs')
    args = parser.parse_args()
    warnings.filterwarnings('ignore')
    torch.set_num_threads(1)
    kept = here / 'runs.csv'
    for data in args.data:
        loaded = batchnorm.load(data, args.cache)
        for steps in args.steps:
            for seed in args.seeds:
                for variant in args.variants:
                    key = dict(data=data, arch=args.arch, variant=variant, seed=seed, wanted=steps)
                    done = pd.read_csv(kept) if kept.exists() else pd.DataFrame(columns=list(key))
                    if (done[list(key)] == pd.Series(key)).all(axis=1).any():
                        continue
                    rows = run(data, args.arch, variant, VARIANTS[variant], seed, steps, loaded)
                    pd.DataFrame(rows).to_csv(
                        kept, mode='a', header=not kept.exists(), index=False, float_format='%.4f'
                    )
                    print(
                        *[
                            f"{r['task']} {steps} {variant} probe {r['untrained_probe']:.3f} > {r['probe']:.3f}, "
                            f"top1 {r['top1']:.2f}"
                            for r in rows
                        ],
                        sep='\n',
                        flush=True,
                    )


if __name__ == '__main__':
    main()
