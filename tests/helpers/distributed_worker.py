"""What tests/training/test_distributed.py runs in several processes.

`python distributed_worker.py checks FOLDER` imports once, forks 2 and then 4 processes that talk by gloo, runs every check in
each, and prints what they found as JSON: {world: {check: {name: value}}}, equal in all processes or an error.
`torchrun … distributed_worker.py train FOLDER [--resume]` is a small real run.
"""
import argparse, copy, hashlib, json, math, multiprocessing, os, socket, sys, time, traceback, warnings
from datetime import timedelta
from pathlib import Path
import numpy as np, torch
from torch import distributed as dist, nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel
from fastai.basics import Callback, Learner
from fastai.callback.all import GradientAccumulation, GradientClip, MixedPrecision
import fastai.distributed                                  # once, before forking
from c2l_nb.method import augment
from c2l_nb.training import checkpoint
from c2l_nb.data.cache import pretrain_dls
from c2l_nb.training.callback import C2LCallback, StepDecay, c2l_opt
from c2l_nb.training.checkpoint import C2LCheckpoint, resume, settle
from c2l_nb.core import device_generator, gather, rank0, ranks
from c2l_nb.training.distributed import DistributedC2L, distributed, mine, run_mark, setup, share_batches
from c2l_nb.training.monitoring import CollapseGuard, HealthCallback
from c2l_nb.method.model import C2L, C2LConfig
from c2l_nb.data.phantom import phantom_batch, seeded

SIZE, Z = 16, 8                                            # of the views; images in a batch of all processes
SMALL = dict(queue_size=50, dim=8, momentum=.9)            # 50 is not divisible by 3·8
PLAIN = dict(jitter=0., corners='true')


def body(norm=False):
    torch.manual_seed(0)
    bn = lambda n: [nn.BatchNorm2d(n)] if norm else []
    return nn.Sequential(nn.Conv2d(1, 4, 3, 2, bias=False), *bn(4), nn.ReLU(), nn.Conv2d(4, 8, 3, 2, bias=False), *bn(8), nn.ReLU())

def parts(model): return dict(student=model.student, teacher=model.teacher, queue=model.queue)

def digest(tensors):
    "A short name of these tensors' bits"
    h = hashlib.sha256()
    for t in tensors: h.update(t.detach().contiguous().numpy().tobytes())
    return h.hexdigest()[:12]

def equal_everywhere(model):
    "Do all processes hold the same parameters of student and teacher, the same queue and pointer, to the bit?"
    here = [digest(model.student.parameters()), digest(model.teacher.parameters()), digest([model.queue.feats, model.queue.ptr]), model.seen]
    found = [None]*ranks()[1]
    dist.all_gather_object(found, here)
    return all(f == found[0] for f in found)

def relative(a, b): return ((a - b).abs().max()/b.abs().max().clamp_min(1e-9)).item()


# ---- Mathematics: plain DDP against one process -------------------------------------------------------------------------

class Halves(nn.Module):
    "A network that takes a batch in `n` parts: what BatchNorm does on n devices"
    def __init__(self, net, n): super().__init__(); self.net, self.n = net, n
    def forward(self, x): return torch.cat([self.net(part) for part in x.chunk(self.n)])

class Alone(C2L):
    "One process that stands for `n`: mixes within n blocks, has BatchNorm see n parts, shuffles before the teacher"
    n = 1
    def mix(self, n, g):
        lam, perm = super().mix(n, g)
        return lam, torch.cat([p.argsort().argsort() + i*n//self.n for i, p in enumerate(perm.chunk(self.n))])

    def key(self, x):
        teacher = Halves(self.teacher, self.n)
        if self.config.bn != 'shuffle': return teacher(self.prepare(x))
        ids = torch.randperm(len(x), generator=seeded(self.config.seed, 3, self.seen))
        return teacher(self.prepare(x)[ids])[ids.argsort()]

    def forward(self, *args):
        whole, self.student = self.student, Halves(self.student, self.n)
        try: return super().forward(*args)
        finally: self.student = whole

def steps(model, batches):
    "Algorithm 1, in plain PyTorch; after each step what it left behind"
    several = isinstance(model, DistributedC2L)
    net = DistributedDataParallel(model) if several else model
    opt = torch.optim.SGD(model.student.parameters(), lr=.1, momentum=.9, weight_decay=1e-4)
    for x in batches:
        views = model.views(x, model.augmentation(SIZE))
        five = net(*views)
        loss = model.loss(*five)
        loss.backward()
        grads = [p.grad.clone() for p in model.student.parameters()]
        opt.step(); opt.zero_grad()
        model.teacher.update(model.student)
        keys = model.keys(*five)
        model.queue.enqueue(*keys)
        model.seen += 1
        if several: loss = gather(loss.detach()[None]).mean(); views = [gather(views[0]), gather(views[1])]
        yield dict(loss=loss.detach(), view1=views[0], view2=views[1], keys=torch.cat(keys), queue=model.queue.feats.clone(), ptr=model.queue.ptr.double(),
                   **{f'grad {i}': g for i, g in enumerate(grads)}, **{f'teacher {i}': p.clone() for i, p in enumerate(model.teacher.parameters())},
                   **{f'student {i}': p.detach().clone() for i, p in enumerate(model.student.parameters())})

def same_as_one(config, norm=False):
    "Largest relative difference over three steps, and whether the processes agreed after each"
    images = torch.rand(3, Z, 1, 20, 20, generator=seeded(1)).double()
    model = DistributedC2L(body(norm), config).double().train()
    alone = Alone(body(norm), config).double().train()
    alone.n = ranks()[1]
    agreed, worst = [], 0.
    for ours, want in zip(steps(model, map(mine, images)), steps(alone, images)):
        agreed.append(equal_everywhere(model))
        assert ours.keys() == want.keys()
        worst = max(worst, *(relative(ours[k], want[k]) for k in ours))
    moved = relative(want['student 0'], C2L(body(norm), config).double().student.backbone[0].weight.detach())
    return dict(worst=gather(torch.tensor([worst])).max().item(), agreed=all(agreed), steps=len(agreed), moved=moved)

def check_paper(folder): return same_as_one(C2LConfig.paper(**SMALL))
def check_official(folder): return same_as_one(C2LConfig.official(**SMALL))
def check_moco(folder): return same_as_one(C2LConfig.moco(**SMALL))
def check_other(folder): return same_as_one(C2LConfig.paper(**SMALL, share_mix=False, lam_per='sample', feat_mix='unit', head='mlp'))
def check_batchnorm_shuffle(folder): return same_as_one(C2LConfig.paper(**SMALL, bn='shuffle'), norm=True)
def check_batchnorm_local(folder): return same_as_one(C2LConfig.paper(**SMALL, bn='local'), norm=True)

def check_mask_of_a_device(folder):
    "Input dropout's mask made by the device's own generator (the CPU plays the device): each process has its own part of it"
    own = augment.C2LAugment._drop
    def there(self, bs, generator, device): return own(self, bs, device_generator(generator, torch.device('cpu')), device)
    augment.C2LAugment._drop = there
    try: return same_as_one(C2LConfig.paper(**SMALL, dropout=.3))
    finally: augment.C2LAugment._drop = own

def check_sequential(folder): return same_as_one(C2LConfig.official(**SMALL, enqueue=('A', 'mix')))

def check_shuffle_matters(folder):
    "Keys with and without shuffling"
    x = mine(torch.rand(Z, 1, SIZE, SIZE, generator=seeded(2)))
    keys = [DistributedC2L(body(norm), C2LConfig(**SMALL, bn=bn)).train().key(x) for norm in (False, True) for bn in ('shuffle', 'local')]
    return dict(without_bn=gather((keys[0] - keys[1]).abs().max()[None]).max().item(), with_bn=gather((keys[2] - keys[3]).abs().max()[None]).max().item())

def check_draws(folder):
    "lam is one number; partners are of the same process; views of different processes differ; an own augmentation too"
    model = DistributedC2L(body(), C2LConfig(**SMALL))
    n, noise = Z//ranks()[1], lambda x, g: x + torch.rand(x.shape, generator=g)
    x1, x2, lam, perm = model.views(torch.full((n, 1, 20, 20), .5), noise)
    lams, first, second = gather(lam[None]), gather(x1), gather(x2)
    return dict(one_lam=bool((lams == lams[0]).all()), perm=sorted(perm.tolist()) == list(range(n)),
                views_differ=len({digest([v]) for v in [*first, *second]}) == 2*Z)


# ---- Within Learner -----------------------------------------------------------------------------------------------------

POOL = phantom_batch(32, size=20)[0][:, 0].numpy()

class CPUMixed(MixedPrecision):
    "fastai's, made to work on a CPU"
    def __init__(self, dtype): super().__init__(); self.dtype = dtype
    def before_fit(self):
        self.autocast, self.scales = torch.autocast('cpu', self.dtype), []
        self.learn.scaler = GradScaler('cpu', enabled=self.dtype == torch.float16, init_scale=1024.)

class Watch(Callback):
    "Are the processes equal after every batch?"
    order, run_valid = 60, False
    def __init__(self): self.agreed, self.ptrs = [], []
    def after_batch(self): model = self.learn.loss_func.model; self.agreed.append(equal_everywhere(model)); self.ptrs.append(int(model.queue.ptr))

def learner(config=C2LConfig.paper, *cbs, norm=False, pool=POOL, bs=Z, **kw):
    learn = Learner(pretrain_dls(pool, bs, device='cpu'), body(norm), opt_func=c2l_opt, cbs=[C2LCallback(config(**{**SMALL, 'size': SIZE, **kw})), StepDecay(), *cbs])
    learn.logger = lambda *a: None
    return learn

def fit(learn, n=2, **kw):
    with distributed(learn), learn.no_bar(): learn.fit(n, .03, **kw)
    return learn

def state(learn): return {k: v.double() for k, v in learn.model.state_dict().items()}

def check_learner_is_one_process(folder):
    "Loader, augmentation, steps and schedule: MoCo without BatchNorm against a Learner that knows of no other process"
    ours, watch = learner(C2LConfig.moco), Watch()
    ours.add_cb(watch)
    fit(ours)
    world = {k: os.environ.pop(k) for k in ('WORLD_SIZE', 'RANK')}
    alone = learner(C2LConfig.moco)
    with alone.no_bar(): alone.fit(2, .03)
    os.environ.update(world)
    a, b = state(ours), state(alone)
    return dict(worst=max(relative(a[k], b[k]) for k in a), agreed=all(watch.agreed), steps=len(watch.agreed), ptr=int(a['queue.ptr']),
                lrs=ours.recorder.lrs == alone.recorder.lrs, loss=relative(*(torch.tensor(l.recorder.values[-1][0]) for l in (ours, alone))),
                undone=type(ours.model) is C2L and 'sample' not in vars(ours.dls.train) and ours.dls.train.bs == Z)

def agreement(*cbs, **kw):
    learn = learner(C2LConfig.paper, *cbs, watch := Watch(), **kw)
    before = state(learn)
    after = state(fit(learn))
    moved = {k.split('.')[0] for k in before if (before[k] != after[k]).any()} - {'_extra_state'}
    return dict(agreed=all(watch.agreed), steps=len(watch.agreed), moved=sorted(moved), finite=all(bool(v.isfinite().all()) for v in after.values()))

def check_learner_batchnorm(folder): return agreement(norm=True)
def check_learner_bf16(folder): return agreement(CPUMixed(torch.bfloat16), norm=True)
def check_learner_fp16(folder): return agreement(CPUMixed(torch.float16), norm=True)
def check_learner_accumulation(folder): return agreement(GradientAccumulation(8), GradientClip(1.), norm=True)

def poisoned(where, dtype=torch.float16):
    "An infinity in the last process alone, in the second batch: does any process move?"
    class Poison(Callback):
        order, run_valid = 55, False
        def bad(self): return self.iter == 1 and ranks()[0] == ranks()[1] - 1
        def after_loss(self):
            if where == 'gradient' and self.bad(): self.learn.loss_grad = self.loss_grad*math.inf
        def after_pred(self):
            if where == 'key' and self.bad(): self.learn.c2l.five[2] = torch.full_like(self.learn.c2l.five[2], math.inf)
    class Note(Callback):
        order, run_valid = 70, False
        def after_batch(self): states.append({k: v.clone() for k, v in self.learn.loss_func.model.state_dict().items()})
    states, watch = [], Watch()
    fit(learner(C2LConfig.paper, CPUMixed(dtype), Poison(), watch, Note()), 1)
    changed = [sorted({k.split('.')[0] for k in a if not torch.equal(a[k], b[k])} - {'_extra_state'}) for a, b in zip(states, states[1:])]
    return dict(agreed=all(watch.agreed), changed=changed[:2], finite=all(bool(v.isfinite().all()) for v in states[-1].values()))

def check_overflow_in_one_process(folder): return poisoned('gradient')
def check_infinite_key_in_one_process(folder): return poisoned('key', torch.bfloat16)

class Bad(Callback):
    "In the last process alone: a loss that is no number in the second batch, or no spread at the end of each epoch"
    order, run_valid = 15, False
    def __init__(self, what): self.what = what
    def after_loss(self):
        if self.what == 'loss' and self.iter == 1 and ranks()[0] == ranks()[1] - 1: self.learn.loss = self.loss*math.nan
    def after_train(self):
        if self.what == 'spread' and ranks()[0] == ranks()[1] - 1: self.learn.health.now = self.learn.health.now | dict(std=.001)

def guarded(what):
    "Where and why each process stopped; equal everywhere, or `checks` says so"
    watch = Watch()
    learn = fit(learner(C2LConfig.paper, HealthCallback(), CollapseGuard(), watch, Bad(what)), 3)
    return dict(reason=learn.collapse_guard.reason, seen=learn.model.seen, agreed=all(watch.agreed) and equal_everywhere(learn.model))

def check_guard_loss(folder): return guarded('loss')
def check_guard_spread(folder): return guarded('spread')
def check_guard_nothing(folder): return guarded('nothing')

def check_sync_bn(folder):
    "Conversion reaches student and teacher, which stay in training mode; DDP refuses it on a CPU, before a step"
    learn = learner(C2LConfig.paper, norm=True, bn='sync')
    error = refused(lambda: fit(learn))
    model = learn.model.train()
    layers = [[m.training for m in part.modules() if isinstance(m, nn.SyncBatchNorm)] for part in (model.student, model.teacher)]
    return dict(layers=layers, error=error, left=sum(type(m) is nn.BatchNorm2d for m in model.modules()))

def refused(make, kinds=(ValueError, RuntimeError)):
    "The error of `make()`, the same kind in all processes"
    try: make(); return 'nothing'
    except kinds as e: return f'{type(e).__name__}: {e}'

def check_refusals(folder):
    rank, world = ranks()
    outside = learner()
    def plain():
        with outside.no_bar(): outside.fit(1)
    def short():
        learn = learner(pool=POOL[:30])
        learn.dls.train.drop_last = False
        fit(learn)
    def raises(): raise ValueError('of process 0')
    return dict(share=refused(lambda: fit(learner(bs=world + 1))), bs=refused(lambda: fit(learner(bs=Z if rank else 2*Z))),
                images=refused(lambda: fit(learner(pool=POOL[:16] if rank else POOL))), seed=refused(lambda: fit(learner(seed=rank))),
                short=refused(short), outside=refused(plain), rank0=refused(lambda: rank0(raises)),
                after=[equal_everywhere(fit(learner(), 1).model)])               # and the processes can still talk

def check_rank0_takes_its_time(folder):
    "Longer than the others would wait in a broadcast of their default group, as with a cache that takes hours to build"
    def build(): time.sleep(2); return 'built'
    rank0(int)
    wait = dist.distributed_c10d._set_pg_timeout
    wait(timedelta(seconds=1), dist.group.WORLD)
    try: return rank0(build)
    finally: wait(timedelta(minutes=30), dist.group.WORLD)


# ---- Checkpoints ---------------------------------------------------------------------------------------------------------

def only_rank0_writes():
    if ranks()[0]: checkpoint.save_checkpoint = lambda *a, **k: None; C2LCheckpoint._write_log = lambda self: None

class StopAfter(Callback):
    "Ctrl-C in the second batch of an epoch, in all processes"
    order, run_valid = 95, False
    def __init__(self, epoch): self.stop = epoch
    def after_batch(self):
        if self.epoch == self.stop and self.iter == 1: raise KeyboardInterrupt

def run(folder, config, *cbs, norm, again=False, n=3):
    learn = learner(config, *cbs, norm=norm)
    mark = run_mark('pool', learn)
    learn.add_cb(C2LCheckpoint(folder, fingerprint=mark, steps=1))
    settle(); dist.barrier()                               # process 0 may still write
    start = resume(learn, folder) if again else 0
    dist.barrier()                                         # all have read before anybody writes
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return state(fit(learn, n, start_epoch=start))

def check_resume(folder):
    "Cut off in epoch 1 and resumed, against uninterrupted; bits of all parameters, buffers of process 0"
    only_rank0_writes()
    world = ranks()[1]
    whole = run(folder/f'whole{world}', C2LConfig.paper, norm=True)
    try: run(folder/f'cut{world}', C2LConfig.paper, StopAfter(1), norm=True)
    except KeyboardInterrupt: pass
    again = run(folder/f'cut{world}', C2LConfig.paper, norm=True, again=True)
    logs = rank0(lambda: [[line.rpartition(',')[0] for line in (folder/f'{name}{world}'/'log.csv').read_text().splitlines()] for name in ('whole', 'cut')])
    return dict(differ=rank0(lambda: [k for k in whole if not torch.equal(whole[k], again[k])]), logs=logs[0] == logs[1], rows=len(logs[0]))

def check_resume_elsewhere(folder):
    "Two processes stop; four go on where that is exact, else they are refused"
    only_rank0_writes()
    jobs = dict(moco=(C2LConfig.moco, False), mixed=(C2LConfig.paper, False), normed=(C2LConfig.moco, True))
    if ranks()[1] == 2:
        for name, (config, norm) in jobs.items():
            try: run(folder/f'{name}-moves', config, StopAfter(1), norm=norm)
            except KeyboardInterrupt: pass
        return {}
    whole, again = run(folder/'moco-whole', C2LConfig.moco, norm=False), run(folder/'moco-moves', C2LConfig.moco, norm=False, again=True)
    no = {name: refused(lambda: run(folder/f'{name}-moves', jobs[name][0], norm=jobs[name][1], again=True)) for name in ('mixed', 'normed')}
    return dict(worst=max(relative(again[k], whole[k]) for k in whole), **no)


# ---- Launching -----------------------------------------------------------------------------------------------------------

def child(rank, world, port, folder, answers):
    torch.set_num_threads(1)
    warnings.simplefilter('ignore')
    os.environ.update(MASTER_ADDR='localhost', MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank),
                      LOCAL_WORLD_SIZE=str(world), OMP_NUM_THREADS='1')
    found = {}
    try:
        setup()
        for name, check in list(globals().items()):
            if name.startswith('check_'): found[name[6:]] = check(folder)
        answers.put((rank, found))
    except BaseException: answers.put((rank, {'error': f'process {rank} of {world}: ' + traceback.format_exc()}))

def checks(folder):
    result = {}
    for world in (2, 4):
        with socket.socket() as s: s.bind(('localhost', 0)); port = s.getsockname()[1]
        context = multiprocessing.get_context('fork')      # torch was imported once, and no backward has run here
        answers = context.Queue()
        processes = [context.Process(target=child, args=(r, world, port, folder, answers)) for r in range(world)]
        for p in processes: p.start()
        found = {}
        while len(found) < world and not any('error' in f for f in found.values()):
            rank, f = answers.get(timeout=900)
            found[rank] = f
        for p in processes:
            p.join(None if len(found) == world else 0)
            if p.is_alive(): p.kill()
        bad = [f['error'] for f in found.values() if 'error' in f]
        if bad: raise SystemExit(bad[0])
        assert all(str(f) == str(found[0]) for f in found.values()), f'processes disagree: {found}'
        result[world] = found[0]
    print(json.dumps(result))

def train(folder, again, epochs):
    "A real run under torchrun; each finished epoch leaves a file with the process ids"
    rank, world = setup()
    only_rank0_writes()
    torch.set_num_threads(1)
    class Tell(Callback):
        order = 99
        def after_epoch(self):
            pids = [None]*world
            dist.all_gather_object(pids, os.getpid())
            if rank == 0: (folder/f'epoch{self.epoch}.json').write_text(json.dumps(pids))
    end = run(folder/'run', C2LConfig.paper, Tell(), norm=True, again=again, n=epochs)
    if rank == 0: (folder/f'end{"-again" if again else ""}.txt').write_text(digest(end[k] for k in sorted(end)))
    dist.destroy_process_group()

if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('what', choices=['checks', 'train'])
    parser.add_argument('folder', type=Path)
    parser.add_argument('--resume', action='store_true')
    parser.add_argument('--epochs', type=int, default=3)
    args = parser.parse_args()
    checks(args.folder) if args.what == 'checks' else train(args.folder, args.resume, args.epochs)
