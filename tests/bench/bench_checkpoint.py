"""What checkpoints cost a run: ResNet-18, queue of 32,768 keys, one checkpoint every ten minutes.

A run of `STEPS` batches that saves once is timed against one that never does; their difference, a checkpoint's seconds, is set against the ten
minutes that lie between two. It holds the copy on the training thread and what the writing thread takes from the others.
"""
import os, statistics, tempfile
from pathlib import Path
import numpy as np
from benchmarks import Bench, arguments, busy, timed
from fastai.basics import Callback, Learner
from c2l_nb.data.cache import pretrain_dls
from c2l_nb.training.callback import C2LCallback, c2l_opt
from c2l_nb.training.checkpoint import C2LCheckpoint
from c2l_nb.method.encoder import create_encoder
from c2l_nb.training.run_folder import checkpoints

STEPS, BS, SIZE = 12, 8, 32
IMAGES = np.random.default_rng(0).integers(0, 256, (STEPS*BS, SIZE, SIZE), dtype=np.uint8)

class Once(Callback):
    "Save after the second batch, as a checkpoint that is due would be"
    order = 89
    def before_fit(self): self.learn.checkpoint.minutes = 1e9
    def after_batch(self):
        if self.iter == 1: self.learn.checkpoint.late = True

def run(folder, *cbs):
    "An epoch, its own checkpoint at the end aside"
    learn = Learner(pretrain_dls(IMAGES, BS, device='cpu'), create_encoder('resnet18', 1), opt_func=c2l_opt,
                    cbs=[C2LCallback(queue_size=32768), C2LCheckpoint(folder), *cbs])
    save = learn.checkpoint._save
    learn.checkpoint._save = lambda epoch, done: save(epoch, done) if done else None
    def fit():
        learn.checkpoint.next, learn.checkpoint.rows, learn.checkpoint.late = 0, [], False
        for path in checkpoints(folder): os.rename(path, path.with_name('.tmp-old'))        # the next save sweeps it up
        with learn.no_bar(), learn.no_logging(): learn.fit(1)
    return fit

def main(args):
    bench = Bench(args.pairs, args.threads, args.cpu)
    void = busy() > .1
    import time, torch
    torch.set_num_threads(bench.threads)
    clock = time.process_time if args.cpu else time.perf_counter
    with tempfile.TemporaryDirectory() as folder:
        saves, plain = run(Path(folder, 'a'), Once()), run(Path(folder, 'b'))
        saves(), plain()
        pairs = [(timed(saves, clock), timed(plain, clock)) for _ in range(bench.pairs)]
        size = sum(f.stat().st_size for f in checkpoints(Path(folder, 'a'))[-1].iterdir())
    cost = statistics.median(a - b for a, b in pairs)
    print(f'# a checkpoint of {size/1e6:.0f} MB costs {cost:.2f} s')
    bench.add('a run with a checkpoint every ten minutes over one without', 1 + cost/600, '<= 1.02', void, pairs=pairs, threads=bench.threads,
              clock='processor' if args.cpu else 'wall', checkpoint=dict(bytes=size, seconds=cost))
    if args.save: bench.save(args.save, 'python tests/bench/bench_checkpoint.py')

if __name__ == '__main__': main(arguments(__doc__).parse_args())
