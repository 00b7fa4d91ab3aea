"""Runs that are killed and resumed, for test_resume.py: `python resume_worker.py FOLDER MODE KILLS`, one JSON line as answer.

This process imports torch and then only forks: each run is a child, which dies by SIGKILL. KILLS is a number, of kills at random moments,
or a list of `where:epoch:batch`: `batch` dies in the backward pass, `write` while the checkpoint after that batch is written,
`between` when the epoch is over. What is killed is resumed; a run that ends is compared with one that was not killed.
"""
import json, os, random, shutil, signal, sys, time, warnings
from pathlib import Path
import numpy as np, pandas as pd, torch
from fastai.basics import Callback, Learner
from fastai.callback.training import GradientAccumulation
from torch import nn
from c2l_nb.training import run_folder as store
from c2l_nb.data.cache import pretrain_dls
from c2l_nb.training.callback import C2LCallback, StepDecay, c2l_opt
from c2l_nb.training.checkpoint import C2LCheckpoint, resume
from c2l_nb.training.monitoring import HealthCallback
from c2l_nb.training.run_folder import checkpoints, load_checkpoint

IMAGES = np.random.default_rng(0).integers(0, 256, (45, 16, 16), dtype=np.uint8)      # 5 batches of 8 and a rest
EPOCHS = dict(fp32=12)                                                                 # else 6

def body():
    return nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(.2), nn.Conv2d(4, 8, 3, 2, 1), nn.ReLU())

class Die(Callback):
    "SIGKILL at a place; tells the parent when training begins"
    order = 95
    def __init__(self, place, ready): self.place, self.ready = place, ready
    def before_train(self):
        if self.ready: os.write(self.ready, b'!'); self.ready = None
    def at(self, where):
        return self.place and self.place[:2] == (where, self.epoch) and (where == 'between' or self.iter == self.place[2])
    def die(self): os.kill(os.getpid(), signal.SIGKILL)
    def after_backward(self):
        if self.at('batch'): self.die()
    def before_batch(self):
        if self.training and self.at('write'): store.write_synced = self.half
    def half(self, path, data):
        Path(path).write_bytes(data[:len(data)//2])
        self.die()
    def after_epoch(self):
        if self.at('between') and self.learn.checkpoint.next == self.epoch + 1: self.die()

def train(folder, mode, place=None, ready=None):
    "What a new process does: go on if there is something to go on with"
    torch.manual_seed(0); random.seed(0); np.random.seed(0)
    cbs = [C2LCallback(queue_size=40, dim=8, momentum=.9), HealthCallback(samples=3), StepDecay(), C2LCheckpoint(folder, steps=1), Die(place, ready)]
    if mode == 'accumulation': cbs.append(GradientAccumulation(24))                    # 3 batches; an epoch has 5
    if mode == 'bf16':
        from c2l_nb.training.callback import Precision
        cbs.append(Precision('bf16'))
    dls = pretrain_dls(IMAGES, bs=8, device='cpu', workers=2 if mode == 'workers' else 0)
    learn = Learner(dls, body(), opt_func=c2l_opt, cbs=cbs)
    start = resume(learn, folder) if checkpoints(folder) else 0
    with learn.no_bar(), learn.no_logging(): learn.fit(EPOCHS.get(mode, 6), .02, start_epoch=start)

def child(f, *args):
    "Pid of a process that runs `f`, in a session of its own, so that its loaders' workers die with it"
    pid = os.fork()
    if pid: return pid
    try: os.setsid(); f(*args); os._exit(0)
    except BaseException as e: print(repr(e), file=sys.stderr, flush=True)
    finally: os._exit(1)

def waited(pid):
    status = os.waitpid(pid, 0)[1]
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL: return 'killed'
    assert os.WIFEXITED(status) and os.WEXITSTATUS(status) == 0, f'a run failed: {status}'
    return 'ended'

def killed_at(folder, mode, place): return waited(child(train, folder, mode, place))

def killed_after(folder, mode, seconds):
    "Killed so many seconds after its training began"
    hear, ready = os.pipe()
    pid = child(train, folder, mode, None, ready)
    os.close(ready)
    os.read(hear, 1); os.close(hear)
    time.sleep(seconds)
    try: os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError: pass                         # it has ended
    return waited(pid)

def state(folder):
    "All that is in the newest checkpoint, and log.csv, times aside"
    tensors, meta = load_checkpoint(folder)
    log = pd.read_csv(folder/'log.csv', dtype=str).drop(columns='time')
    return tensors, json.dumps(meta | dict(rows=[r[:-1] for r in meta['rows']])), log

def differences(a, b):
    (ta, ma, la), (tb, mb, lb) = state(a), state(b)
    same = lambda x, y: x.dtype == y.dtype and x.shape == y.shape and x.contiguous().view(-1).view(torch.uint8).equal(y.contiguous().view(-1).view(torch.uint8))
    return [k for k in {**ta, **tb} if k not in ta or k not in tb or not same(ta[k], tb[k])] + ['meta']*(ma != mb) + ['log']*(not la.equals(lb))

def main(folder, mode, kills):
    folder, start = Path(folder), time.monotonic()
    warnings.simplefilter('ignore')
    assert killed_at(folder/'whole', mode, None) == 'ended'
    length = time.monotonic() - start
    counts, refused, runs, off = dict(killed=0, ended=0), 0, 0, []
    g, places = random.Random(0), [tuple(int(v) if v.isdigit() else v for v in k.split(':')) for k in kills.split(',')] if ':' in kills else None
    while counts['killed'] < (len(places) if places else int(kills)) or counts['ended'] == 0 or (folder/'run').exists():
        if places is None and counts['killed'] < int(kills): how = killed_after(folder/'run', mode, g.random()*length*.4)
        else: how = killed_at(folder/'run', mode, places[counts['killed']] if places and counts['killed'] < len(places) else None)
        counts[how] += 1
        if how == 'ended':
            off += differences(folder/'whole', folder/'run')
            shutil.rmtree(folder/'run'); runs += 1
    print(json.dumps(dict(mode=mode, kills=counts['killed'], runs=runs, batches=len(state(folder/'whole')[0]['loop.recorder.losses']),
                          tensors=len(state(folder/'whole')[0]), differ=off)))

if __name__ == '__main__': main(*sys.argv[1:])
