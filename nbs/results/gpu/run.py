"""C2L, loss_A alone (MoCo) and untrained networks at 112 px on one pool, as many seeds and epochs as a time limit allows.

    python nbs/results/gpu/run.py --pool FOLDER --out DIR --seconds 150           # FOLDER as pack.py made it; without it: phantoms

The number of epochs is chosen, from the measured speed, so that SEEDS seeds of both methods fit; further seeds follow while they fit.
Written whole after each network, so that a stop leaves what was done: DIR/run.json (settings, versions, logs, mean AUROCs, seconds)
and DIR/scores.npz (probe and kNN scores of each test image, with hashed ids). The encoder of the first C2L run is kept in float16,
in parts below 15 MB: c2l.safetensors.0, .1 …; `join` puts them together.
"""
import time
BEGAN = time.monotonic()                            # importing takes a while, and counts
import argparse, functools, hashlib, io, json, platform, threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
import numpy as np
import pandas as pd
import torch
from fastai.basics import Callback, Learner
from fastai.callback.channelslast import ChannelsLast
from fastcore.basics import noop
from PIL import Image
import c2l_nb
from c2l_nb.data.cache import pretrain_dls, to_square
from c2l_nb.training.callback import C2LCallback, CosineDecay, c2l_opt
from c2l_nb.core import choose_device, choose_precision, patient_ids
from c2l_nb.data.collections import label_matrix
from c2l_nb.evaluation.features import extract_features, knn_predict, linear_probe
from c2l_nb.method.encoder import Prepare, create_encoder
from c2l_nb.training.monitoring import CollapseGuard, HealthCallback
from c2l_nb.evaluation.metrics import auroc
from c2l_nb.tasks.pretrain import Precision, choose_config, load_data
from c2l_nb.paper.scoring import Pool, tasks
from c2l_nb.core import write_atomically
from c2l_nb.training.weights import export_backbone

METHODS = dict(C2L='small', MoCo='small_moco')      # names of `choose_config`
SEEDS = 3                                           # of both methods, that must fit into the time
MOST_EPOCHS = 300
PART = 15*2**20                                     # bytes of a part of a file
LAST = 25                                           # seconds left for the last probe


# ---- Files ----------------------------------------------------------------------------------------------------------

def split(
    path,             # of a file
    most=PART,        # bytes of a part
):                    # paths of the parts
    "Cut a file into PATH.0, PATH.1 …, and remove it"
    path, data = Path(path), Path(path).read_bytes()
    parts = []
    for number, start in enumerate(range(0, len(data), most)):
        parts.append(path.with_name(f'{path.name}.{number}'))
        write_atomically(parts[-1], data[start:start + most])
    path.unlink()
    return parts


def join(
    path,             # of the file that was cut: its parts are PATH.0, PATH.1 …
):                    # `path`, whole again
    "Put the parts of a file together; FileNotFoundError if there are none"
    path = Path(path)
    parts = sorted(path.parent.glob(f'{path.name}.*'), key=lambda part: int(part.suffix[1:]))
    if not parts:
        raise FileNotFoundError(f"{path}.0 is not there")
    return write_atomically(path, b''.join(part.read_bytes() for part in parts))


def packed(folder):
    "Images and table of a pool that pack.py made"
    rows = pd.read_csv(Path(folder)/'pool.csv', dtype=dict(patient=str, labels=str))
    data, ends = (Path(folder)/'pool.bin').read_bytes(), rows.bytes.cumsum()
    with ThreadPoolExecutor() as threads:
        pieces = [data[end - size:end] for end, size in zip(ends, rows.bytes)]
        images = np.stack(list(threads.map(lambda piece: np.asarray(Image.open(io.BytesIO(piece))), pieces)))
    return images, rows.assign(path=[f'/pool/{source}/{i}' for i, source in enumerate(rows.source)])


def read(folder, size, toy):
    "The pool of a folder, or phantoms"
    if folder:
        images, rows = packed(folder)
        if toy:
            keep = np.concatenate([np.flatnonzero(rows.split == s)[::15] for s in ('train', 'valid', 'test')])
            images, rows = images[keep], rows.iloc[keep].reset_index(drop=True)
    else:
        images, rows, _ = load_data('phantoms', round(1.25*size), 400 if toy else 4096, progress=False)
        rows['image'] = [hashlib.sha256(str(i).encode()).hexdigest()[:10] for i in range(len(rows))]
    return Pool(images, rows, 'pool', {}, size)


# ---- Networks -------------------------------------------------------------------------------------------------------

def untrained(seed, s):
    torch.manual_seed(seed)
    return create_encoder(s['arch'], channels=1)


def make_learner(pool, method, seed, epochs, s):
    "As `c2l_pretrain` trains"
    train = (pool.rows.split == 'train').values
    config = choose_config(METHODS[method], int(train.sum()), s['batch'], epochs, size=pool.size, seed=seed)
    cbs = [C2LCallback(config), HealthCallback(), CollapseGuard(), ChannelsLast(), CosineDecay(warmup=config.warmup)]
    if s['precision'] != 'fp32':
        cbs.append(Precision(s['precision']))
    dls = pretrain_dls(pool.images, config.batch_size, seed, device=s['device'], rows=train)
    learn = Learner(dls, untrained(seed, s), opt_func=c2l_opt, wd=config.wd, lr=config.lr, cbs=cbs)
    learn.logger = noop
    return learn, config


def train(pool, method, seed, epochs, s):
    "The learner, trained, and its log"
    learn, config = make_learner(pool, method, seed, epochs, s)
    with learn.no_bar():
        learn.fit(config.epochs, lr=config.lr)
    losses = [values[0] for values in learn.recorder.values]
    return learn, learn.health.log.assign(train_loss=losses[:len(learn.health.log)])


class Clock(Callback):
    "Seconds of each epoch's batches"
    order, run_valid = 99, False

    def __init__(self):
        self.seconds = []

    def before_train(self):
        self.start = time.monotonic()

    def after_train(self):
        if next(self.model.parameters()).is_cuda:
            torch.cuda.synchronize()
        self.seconds.append(time.monotonic() - self.start)


def speed(pool, method, s):
    "Seconds of an epoch: the second, because the first prepares things"
    learn, _ = make_learner(pool, method, 0, 2, s)
    learn.add_cb(Clock())
    with learn.no_bar():
        learn.fit(2, lr=1e-4)
    return learn.clock.seconds[1]


# ---- Scores ---------------------------------------------------------------------------------------------------------

class Tasks:
    "What the pool can be asked, and the images that this needs"
    def __init__(self, pool):
        self.asked, patient = tasks(pool.rows, 'test'), patient_ids(pool.rows).astype(str)
        at = np.unique(np.concatenate([np.r_[train, test] for _, train, test in self.asked.values()]))
        self.images = torch.from_numpy(np.stack([to_square(pool.images[i], pool.size) for i in at]))[:, None]
        self.arrays, self.data = {}, {}
        for task, (labels, train, test) in self.asked.items():
            y, truth = (label_matrix(pool.rows.iloc[part], labels) for part in (train, test))
            self.data[task] = np.searchsorted(at, train), np.searchsorted(at, test), y, truth, patient[train]
            hashed = [hashlib.sha256(p.encode()).hexdigest()[:10] for p in patient[test]]
            self.arrays |= {f'{task}/labels': np.array(labels), f'{task}/patient': np.array(hashed), f'{task}/truth': truth,
                            f'{task}/image': np.array(pool.rows.image.iloc[test], dtype=str)}


def judge(feats, data):
    "task/probe and task/knn -> scores of the test images; on the CPU, in a process of its own"
    held = {}
    for task, (train, test, y, _, patient) in data.items():
        held[f'{task}/knn'] = knn_predict(feats[train], y, feats[test]).numpy()
        held[f'{task}/probe'] = linear_probe(feats[train], y, feats[test], groups=patient)[0].numpy()
    return held


class Results:
    "run.json and scores.npz, written whole after each network"
    def __init__(self, out, data, about):
        self.out, self.data, self.about, self.arrays = Path(out), data, about | dict(networks=[]), dict(data.arrays)
        self.lock = threading.Lock()
        self.out.mkdir(parents=True, exist_ok=True)

    def add(self, name, seconds, log, done):
        "Scores of one network, once its probes are done"
        held = done.result()
        means = {key: np.nanmean([auroc(y, p) for y, p in zip(self.data.data[key.split('/')[0]][3].T, scores.T)])
                 for key, scores in held.items()}
        told = dict(name=name, seconds=round(seconds, 1), auroc={k: round(float(v), 4) for k, v in means.items()})
        with self.lock:
            self.arrays |= {f'{name}/{key}': scores.astype(np.float16) for key, scores in held.items()}
            self.about['networks'].append(told | dict(log=[] if log is None else log.round(5).to_dict('records')))
            np.savez_compressed(packed := io.BytesIO(), **self.arrays)
            write_atomically(self.out/'scores.npz', packed.getvalue())
        self.write()
        print(told, flush=True)

    def write(self, **more):
        with self.lock:
            self.about |= more
            write_atomically(self.out/'run.json', json.dumps(self.about, indent=1).encode())


def keep_encoder(learn, out, about):
    "In float16 and in parts"
    card = dict(size=about['size'], data='packed pool', use='features of radiographs, for research; not a medical device')
    split(export_backbone(learn.model, Path(out)/'c2l.safetensors', card, torch.float16))


def describe(pool, s):
    "What run.json says before the first network"
    versions = dict(c2l_nb=c2l_nb.__version__, torch=torch.__version__, python=platform.python_version())
    gpu = torch.cuda.get_device_name() if s['device'].type == 'cuda' else 'none'
    return dict(size=pool.size, images=len(pool.rows), train=int((pool.rows.split == 'train').sum()), gpu=gpu, versions=versions,
                **{k: str(v) for k, v in s.items()})


def run(pool, out, end, s):
    "Untrained, then the seeds of both methods, while they fit; probes are made beside, on the CPU"
    data, about = Tasks(pool), describe(pool, s)
    results = Results(out, data, about)
    with ProcessPoolExecutor(4, get_context('fork'), torch.set_num_threads, (1,)) as judges:

        def score(name, body, prepare, start, log=None):
            feats = extract_features(body, data.images, s['device'], prepare=prepare)
            done = judges.submit(judge, feats, data.data)
            done.add_done_callback(functools.partial(results.add, name, time.monotonic() - start, log))

        score('untrained_0', untrained(0, s), Prepare(channels=1), time.monotonic())
        epoch = {method: speed(pool, method, s) for method in METHODS}
        left = .92*(end - LAST - time.monotonic())
        epochs = int(min(s['epochs'] or MOST_EPOCHS, max(1, left/(SEEDS*sum(epoch.values())))))
        results.write(epochs=epochs, seconds_an_epoch=epoch)
        for seed in range(s['seeds']):
            for method in METHODS:
                start = time.monotonic()
                if (method, seed) != ('C2L', 0) and 1.05*epochs*epoch[method] + LAST > end - start:
                    return
                learn, log = train(pool, method, seed, epochs, s)
                if method == 'C2L' and seed == 0:
                    keep_encoder(learn, out, about)
                score(f'{method}_{seed}', learn.model.student.backbone, learn.model.prepare, start, log)
            if seed:
                score(f'untrained_{seed}', untrained(seed, s), Prepare(channels=1), time.monotonic())


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--pool', help='folder with pool.bin and pool.csv; default: phantoms')
    p.add_argument('--out', required=True, help='folder for the results')
    p.add_argument('--seconds', type=float, default=150, help='limit (default 150)')
    p.add_argument('--device', help='default: the GPU where there is one; cpu: at toy size')
    args = p.parse_args()
    device = choose_device(args.device)
    toy = device.type == 'cpu'
    s = dict(device=device, arch='tiny' if toy else 'resnet18', batch=16 if toy else 256, precision='fp32' if toy else choose_precision('auto', device),
             epochs=1 if toy else None, seeds=1 if toy else 20)
    run(read(args.pool, 32 if toy else 112, toy), args.out, BEGAN + args.seconds, s)
