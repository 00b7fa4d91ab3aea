"A run that is killed and resumed equals the one that is not; a save is whole or absent; nothing that is read runs."
import errno, json, os, pickle, random, signal, threading, time, warnings
from functools import partial
from pathlib import Path
from types import SimpleNamespace
import numpy as np, pandas as pd, pytest, torch
from fastai.basics import Adam, Callback, DataLoader, DataLoaders, Learner
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.schedule import ParamScheduler, combined_cos
from fastai.callback.training import GradientAccumulation
from torch import nn
from c2l_nb.training import checkpoint
from c2l_nb.training import run_folder as store
from c2l_nb.data.cache import Squares, pretrain_dls
from c2l_nb.training.callback import C2LCallback, C2LLoss, StepDecay, c2l_opt
from c2l_nb.training.checkpoint import C2LCheckpoint, resume
from c2l_nb.training.monitoring import HealthCallback
from c2l_nb.training.run_folder import CheckpointError, load_checkpoint, save_checkpoint
from stand_in import devices_of, operations, other_default
from payload import Payload

EPOCHS = 4
IMAGES = np.random.default_rng(0).integers(0, 256, (32, 16, 16), dtype=np.uint8)
EVERYTHING = dict(jigsaw=2, dropout=.2, grayscale=.2)

@pytest.fixture(autouse=True)
def one_thread():
    "Two threads make networks of this size slower"
    n = torch.get_num_threads()
    torch.set_num_threads(1); yield; torch.set_num_threads(n)

def body(width=4):
    return nn.Sequential(nn.Conv2d(1, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU(), nn.Dropout(.2),
                         nn.Conv2d(width, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU())

class Noise(Callback):
    "Draws from every global generator, remembers something, and dies when told to"
    order, run_valid, checkpointed = 5, False, ('memory',)
    def __init__(self, die=None): self.die, self.memory, self.events = die, 0., []
    def before_epoch(self): self.events.append(('before', self.epoch))
    def after_epoch(self): self.events.append(('after', self.epoch))
    def after_backward(self):
        if self.die and (self.epoch, self.iter) == self.die[1:]:
            if self.die[0] == 'kill': os.kill(os.getpid(), signal.SIGKILL)
            raise InterruptedError('stop')
        self.memory += .001*np.random.randn() + .001*random.gauss(0, 1)
        for p in self.learn.model.student.parameters(): p.grad.add_(1e-3*torch.randn_like(p) + 1e-3*self.memory)

def scheds():
    return dict(lr=combined_cos(.25, .001, .02, 1e-5), mom=combined_cos(.25, .95, .85, .95))

def learner(kind, folder, die=None, seed=0, steps=None, cbs=(), **config):
    "'sgd': torch's, stepped, our loader; 'adam': fastai's, lr and momentum scheduled, a plain fastai loader with its own shuffling"
    torch.manual_seed(seed); random.seed(seed); np.random.seed(seed)
    cbs = [C2LCallback(**dict(queue_size=20, dim=8, momentum=.9) | config), Noise(die), C2LCheckpoint(folder, fingerprint='32 images', steps=steps), *cbs]
    if kind == 'sgd': return Learner(pretrain_dls(IMAGES, bs=8, device='cpu'), body(), opt_func=c2l_opt, cbs=[*cbs, StepDecay()])
    items = [(torch.from_numpy(x)[None],) for x in IMAGES]
    dls = DataLoaders(DataLoader(items, bs=8, shuffle=True), DataLoader(items[:0], bs=8), device='cpu')
    return Learner(dls, body(), loss_func=C2LLoss(), opt_func=Adam, cbs=[*cbs, ParamScheduler(scheds())])

def fit(learn, start=0, n=EPOCHS):
    try:
        with learn.no_bar(), learn.no_logging(): learn.fit(n, .02, start_epoch=start)
    finally: learn.checkpoint._wait()                # a process that dies by an exception finishes its write, too
    return learn

def go_on(kind, folder, **kw):
    learn = learner(kind, folder, seed=7, **kw)
    return fit(learn, resume(learn, folder))

def final(folder):
    "All of the newest checkpoint, the time column aside"
    tensors, meta = load_checkpoint(folder)
    return tensors, meta | dict(rows=[r[:-1] for r in meta['rows']])

def log(folder): return pd.read_csv(Path(folder)/'log.csv', dtype=str).drop(columns='time')

def assert_same_run(a, b):
    (ta, ma), (tb, mb) = final(a), final(b)
    assert ma == mb and ta.keys() == tb.keys()
    for k in ta: assert torch.equal(ta[k], tb[k]), k
    pd.testing.assert_frame_equal(log(a), log(b))
    assert log(a).epoch.tolist() == list(map(str, range(EPOCHS)))

# ---- the claim

def test_goes_on_with_deterministic_operations(tmp_path):
    "None of C2L's is refused, jigsaw and dropout among them"
    torch.use_deterministic_algorithms(True)
    try:
        dying = learner('sgd', tmp_path/'cut', die=('raise', 1, 2), steps=1, **EVERYTHING)
        with pytest.raises(InterruptedError): fit(dying)
        go_on('sgd', tmp_path/'cut', **EVERYTHING)
        fit(learner('sgd', tmp_path/'whole', **EVERYTHING))
    finally:
        torch.use_deterministic_algorithms(False)
    assert_same_run(tmp_path/'whole', tmp_path/'cut')

@pytest.mark.parametrize('kind', ['sgd', 'adam'])
@pytest.mark.parametrize('places', [[(0, 2)], [(2, 0), (2, 3)], [(1, 3), (3, 1)]], ids=str)
def test_goes_on_at_the_very_next_batch(tmp_path, kind, places):
    "Stopped in these (epoch, batch): resumed by new learners at that batch, every tensor, number and row is equal, with SGD and with Adam"
    fit(learner(kind, tmp_path/'whole'))
    with pytest.raises(InterruptedError): fit(learner(kind, tmp_path/'run', die=('raise', *places[0]), steps=1))
    for place in places[1:]:
        with pytest.raises(InterruptedError): go_on(kind, tmp_path/'run', die=('raise', *place), steps=1)
    learn, seen = learner(kind, tmp_path/'run', seed=7, steps=1), []
    learn.noise.after_batch = lambda: seen.append((learn.epoch, learn.iter))
    fit(learn, resume(learn, tmp_path/'run'))
    assert seen == [(e, i) for e in range(EPOCHS) for i in range(4) if (e, i) >= places[-1]]
    assert_same_run(tmp_path/'whole', tmp_path/'run')
    assert {k.split('.')[0] for k in final(tmp_path/'run')[0]} == {'model', 'opt', 'loop'}

def stopped_and_resumed(tmp_path, place, make):
    "`make(folder, die)`: a run left alone and one that is stopped at a place are the same"
    fit(make(tmp_path/'whole', None))
    with pytest.raises(InterruptedError): fit(make(tmp_path/'run', ('raise', *place)))
    met = load_checkpoint(tmp_path/'run')[1]
    learn = make(tmp_path/'run', None)
    fit(learn, resume(learn, tmp_path/'run'))
    assert_same_run(tmp_path/'whole', tmp_path/'run')
    return met

def test_running_sums_of_metrics(tmp_path):
    "The looks of HealthCallback and fastai's own training metrics go on, in the middle of an epoch"
    from fastai.metrics import AvgMetric
    def make(folder, die):
        learn = learner('sgd', folder, die, steps=1, cbs=[HealthCallback(samples=4)])
        learn.metrics, learn.recorder.train_metrics = [AvgMetric(lambda pred, y: pred[0].detach().mean())], True
        return learn
    stopped_and_resumed(tmp_path, (1, 2), make)
    assert {'top1', 'std'} <= set(c.removeprefix('train_') for c in log(tmp_path/'run'))

def test_only_applied_gradients_are_saved(tmp_path):
    "Three batches a step, four an epoch: nothing is saved but after a step, also across the end of an epoch"
    make = lambda folder, die: learner('sgd', folder, die, steps=1, cbs=[GradientAccumulation(24)])
    for place, step in (((2, 0), 6), ((2, 2), 9), ((3, 1), 12)):
        met = stopped_and_resumed(tmp_path/str(step), place, make)
        assert met['step'] == step and met['step'] % 3 == 0

class Half(MixedPrecision):
    "fastai's, in bfloat16 or with a scaler on a CPU, where its own does nothing; the scaler doubles after every third step"
    def before_fit(self):
        bf16 = self.amp_mode.value == 'bf16'
        self.autocast, self.scales = torch.autocast('cpu', torch.bfloat16), []
        self.learn.scaler = torch.amp.GradScaler('cpu', enabled=not bf16, growth_interval=3, init_scale=2.**20)

@pytest.mark.parametrize('mode', ['bf16', 'fp16'])
def test_mixed_precision(tmp_path, mode):
    "The gradient scaler's scale and count go on; 2**20 makes it skip steps at first"
    make = lambda folder, die: learner('sgd', folder, die, steps=1, cbs=[Half(mode)])
    met = stopped_and_resumed(tmp_path, (2, 2), make)
    assert met['state']['loop']['scaler'].get('scale') != 2.**20

def test_random_transforms_are_told(tmp_path):
    "A loader whose transforms draw at random: said so; here they draw from global generators, and even that is repeated"
    from fastai.data.core import TfmdDL
    from fastai.vision.augment import RandTransform
    class Shake(RandTransform):
        def encodes(self, x:torch.Tensor): return x + torch.randint(0, 9, (), dtype=torch.uint8)*random.randint(0, 3)
    items = [torch.from_numpy(x)[None] for x in IMAGES]
    def make(folder, die):
        learn = learner('adam', folder, die, steps=1)
        load = lambda part: TfmdDL(part, bs=8, shuffle=True, after_item=[Shake()], create_batch=lambda b: (torch.stack(list(b)),))
        learn.dls = DataLoaders(load(items), load(items[:0]), device='cpu')
        return learn
    with pytest.warns(UserWarning, match='not promised to be exact: Shake of the loader'): stopped_and_resumed(tmp_path, (1, 2), make)

def test_clock_and_steps(tmp_path):
    "By default nothing within short epochs; `steps` and `minutes` save within"
    def saves(**when):
        learn, seen = learner('sgd', tmp_path/str(when)), []
        learn.checkpoint.__dict__.update(when)
        save = learn.checkpoint._save
        learn.checkpoint._save = lambda *at: (seen.append(at), save(*at))
        fit(learn, n=2)
        return seen
    ends = [(1, 0), (2, 0)]
    assert saves() == ends and saves(steps=3) == [(0, 3), (1, 0), (1, 3), (2, 0)] and saves(steps=2) == [(0, 2), (1, 0), (1, 2), (2, 0)]
    assert saves(minutes=0.) == [(0, 1), (0, 2), (0, 3), (1, 0), (1, 1), (1, 2), (1, 3), (2, 0)]

def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    "The write happens in another thread, of a copy: later steps do not reach it"
    threads, hold, write = [], threading.Event(), store.write_synced
    def slow(path, data): threads.append(threading.current_thread()); hold.wait(20); write(path, data)
    learn = learner('sgd', tmp_path, die=('raise', 0, 3), steps=1)
    first = []
    def after_batch():
        first.append(learn.model.student.backbone[0].weight.detach().clone())
        if learn.iter == 1: hold.set()                  # the second batch was trained during the first write
    learn.noise.after_batch = after_batch
    monkeypatch.setattr(store, 'write_synced', slow)
    with pytest.raises(InterruptedError): fit(learn)
    assert threading.main_thread() not in threads and len(first) == 3
    for path, done in zip(store.checkpoints(tmp_path), (2, 3)):
        tensors, meta = store._read(path)
        assert meta['iter'] == done and torch.equal(tensors['model.student.backbone.0.weight'], first[done - 1])

def test_each_epoch_resumes(tmp_path):
    "Killed in epoch 1, again in 2, again in 3, on the same learner class: still the same run; others see nothing of skipped epochs"
    fit(learner('sgd', tmp_path/'whole'))
    with pytest.raises(InterruptedError): fit(learner('sgd', tmp_path/'run', die=('raise', 1, 0)))
    for epoch in (2, 3):
        with pytest.raises(InterruptedError): go_on('sgd', tmp_path/'run', die=('raise', epoch, 2))
    learn = go_on('sgd', tmp_path/'run')
    assert learn.noise.events == [('before', 3), ('after', 3)]
    assert len(learn.recorder.values) == EPOCHS and len(learn.recorder.losses) == learn.train_iter == 16
    assert learn.recorder.lrs == [.02]*8 + learn.recorder.lrs[8:]
    assert_same_run(tmp_path/'whole', tmp_path/'run')

@pytest.mark.parametrize('place', (1, 99))
def test_every_callback_hears_that_a_fit_begins(tmp_path, place):
    "On a resume too, wherever it stands in the order, and once"
    class Ear(Callback):
        order, heard = place, 0
        def before_fit(self): self.heard += 1
        def after_batch(self): assert self.heard == 1
    with pytest.raises(InterruptedError): fit(learner('sgd', tmp_path, die=('stop', 2, 1)))
    ear = Ear()
    go_on('sgd', tmp_path, cbs=[ear])
    assert ear.heard == 1

def test_same_learner_after_an_interruption(tmp_path):
    "A stopped Jupyter cell: resume on the very learner; without it, the fit is refused"
    fit(learner('sgd', tmp_path/'whole'))
    learn = learner('sgd', tmp_path/'run', die=('raise', 2, 1))
    with pytest.raises(InterruptedError): fit(learn)
    learn.noise.die = None
    with pytest.raises(CheckpointError, match='epoch 2 is due'): fit(learn)
    fit(learn, resume(learn, tmp_path/'run'))
    assert_same_run(tmp_path/'whole', tmp_path/'run')

def test_row_lost_between_checkpoint_and_log(tmp_path):
    "A kill after the checkpoint and before log.csv leaves no gap"
    fit(learner('sgd', tmp_path))
    (tmp_path/'log.csv').write_text('epoch,train_loss,valid_loss,time\n')
    go_on('sgd', tmp_path)
    assert len(log(tmp_path)) == EPOCHS

# ---- a save is whole or absent

def tensors_of(step):
    "By NumPy, since torch's threads do not survive a fork"
    return dict(a=torch.from_numpy(np.full(50_000, step, np.float32)), b=torch.from_numpy(np.arange(10)))

def forked(f):
    "Run `f` in a forked process; its wait status"
    pid = os.fork()
    if pid == 0:
        try: f()
        finally: os._exit(1)
    return os.waitpid(pid, 0)[1]

def die_at_call(k):
    "From now on the k-th call that touches the disk is the last; a write stops half way"
    count = 0
    def dying(f, *args, half=False, **kw):
        nonlocal count
        count += 1
        if count == k:
            if half: Path(args[0]).write_bytes(args[1][:len(args[1])//2])
            os.kill(os.getpid(), signal.SIGKILL)
        return f(*args, **kw)
    store.write_synced = partial(dying, store.write_synced, half=True)
    for module, names in ((os, ('fsync', 'rename', 'replace', 'mkdir')), (os, ('unlink', 'rmdir'))):
        for name in names: setattr(module, name, partial(dying, getattr(module, name)))

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_sigkill_at_every_point_of_a_save(tmp_path):
    "Wherever the kill falls, the newest checkpoint that loads is the old one or the new one, and the next save sweeps up"
    for step in (1, 2): save_checkpoint(tmp_path, tensors_of(step), dict(step=step))
    step, points = 2, 0
    for k in range(1, 100):
        def save(): die_at_call(k); save_checkpoint(tmp_path, tensors_of(step + 1), dict(step=step + 1)); os._exit(0)
        status = forked(save)
        tensors, meta = load_checkpoint(tmp_path)
        assert meta['step'] in (step, step + 1) and torch.equal(tensors['a'], tensors_of(meta['step'])['a'])
        step = meta['step']
        if os.WIFEXITED(status): break
        assert os.WTERMSIG(status) == signal.SIGKILL
        points += 1
    assert points > 10 and os.WEXITSTATUS(status) == 0
    assert [d.name for d in sorted((tmp_path/'checkpoint').iterdir())] == [f'step-{s:09}' for s in (step - 1, step)]

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_sigkill_at_random(tmp_path):
    "Ten writers that save without a pause, killed after random times"
    step = 0
    for i in range(10):
        def write():
            for s in range(step + 1, step + 10_000): save_checkpoint(tmp_path, tensors_of(s), dict(step=s))
        pid = os.fork()
        if pid == 0:
            try: write()
            finally: os._exit(1)
        time.sleep(.05 + .1*random.Random(i).random())
        os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)
        with warnings.catch_warnings():
            warnings.simplefilter('error'); tensors, meta = load_checkpoint(tmp_path)      # nothing even to be refused
        assert meta['step'] >= step and torch.equal(tensors['a'], tensors_of(meta['step'])['a'])
        step = meta['step']
    assert step > 3          # a busy machine saves little in so short a time

def test_disk_errors_are_raised(tmp_path, monkeypatch):
    "A full disk ends the fit with OSError, leaves no debris, and the checkpoint before is good"
    learn, fsync, calls = learner('sgd', tmp_path), os.fsync, []
    def full(fd):
        calls.append(fd)
        if len(calls) > 9: raise OSError(errno.ENOSPC, 'No space left on device')
        fsync(fd)
    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError): fit(learn)
    monkeypatch.undo()
    assert load_checkpoint(tmp_path)[1]['epoch'] == 1 and len(list((tmp_path/'checkpoint').iterdir())) == 1
    fit(learner('sgd', tmp_path/'whole'))
    go_on('sgd', tmp_path)
    assert_same_run(tmp_path, tmp_path/'whole')

# ---- damage

def resum(path):
    "Valid sums for whatever stands there"
    files = {n: (path/n).read_bytes() for n in ('tensors.safetensors', 'meta.json')}
    (path/'SHA256SUMS').write_text(store._sums(files))

def damage(path, kind):
    big, meta = path/'tensors.safetensors', path/'meta.json'
    if kind == 'truncated': big.write_bytes(big.read_bytes()[:-100])
    elif kind == 'empty': big.write_bytes(b'')
    elif kind == 'missing': meta.unlink()
    elif kind == 'file': [f.unlink() for f in path.iterdir()]; path.rmdir(); path.write_bytes(b'')
    elif kind == 'garbage': meta.write_text('{"step": '); resum(path)
    elif kind == 'latin': meta.write_bytes(b'{"step": "\xff"}'); resum(path)
    elif kind == 'deep': meta.write_text('['*100_000); resum(path)
    elif kind == 'list': meta.write_text('[]'); resum(path)
    elif kind == 'future': meta.write_text(json.dumps(json.loads(meta.read_text()) | dict(format=99))); resum(path)
    elif kind in ('pickle', 'zip'):
        if kind == 'pickle': big.write_bytes(pickle.dumps(Payload(path.parent/'ran')))
        else: torch.save(Payload(path.parent/'ran'), big)
        meta.write_bytes(big.read_bytes()) if kind == 'zip' else None
        resum(path)
    else: raise AssertionError(kind)

@pytest.mark.parametrize('kind', 'truncated empty missing file garbage latin deep list future pickle zip'.split())
def test_damaged_is_refused(tmp_path, kind):
    "The reason is given, the checkpoint before is used, a payload does not run; if both are damaged, an error says what to do"
    for step in (1, 2): save_checkpoint(tmp_path, tensors_of(step), dict(step=step))
    damage(tmp_path/'checkpoint/step-000000002', kind)
    with pytest.warns(UserWarning, match='step-000000002 is refused: .+'): tensors, meta = load_checkpoint(tmp_path)
    assert meta['step'] == 1 and torch.equal(tensors['a'], tensors_of(1)['a'])
    damage(tmp_path/'checkpoint/step-000000001', kind)
    with pytest.warns(UserWarning), pytest.raises(CheckpointError, match='only damaged ones.*start the run anew'): load_checkpoint(tmp_path)
    assert not (tmp_path/'checkpoint/ran').exists()
    save_checkpoint(tmp_path, tensors_of(2), dict(step=2)) if kind != 'file' else None       # writes over the damaged one
    if kind != 'file': assert load_checkpoint(tmp_path)[1]['step'] == 2

def test_any_flipped_bit(tmp_path):
    "60 single bits in each file"
    path = save_checkpoint(tmp_path, dict(a=torch.arange(300.)), dict(step=1, note='x'*50))
    g = np.random.default_rng(0)
    for file in sorted(path.iterdir()):
        whole = file.read_bytes()
        for i in g.integers(0, len(whole), 60):
            data = bytearray(whole); data[i] ^= 1 << int(g.integers(8)); file.write_bytes(data)
            with warnings.catch_warnings(), pytest.raises(CheckpointError):
                warnings.simplefilter('ignore'); load_checkpoint(tmp_path)
        file.write_bytes(whole)
    assert torch.equal(load_checkpoint(tmp_path)[0]['a'], torch.arange(300.))

def test_nothing_there(tmp_path):
    with pytest.raises(CheckpointError, match='none'): load_checkpoint(tmp_path)

def test_no_pickle():
    text = Path(checkpoint.__file__).read_text() + Path(store.__file__).read_text()
    assert not [w for w in ('pickle', 'torch.load', 'torch.save', 'allow_pickle', 'eval(', 'exec(') if w in text]

def test_resume_uses_the_checkpoint_before(tmp_path):
    "The newest is damaged: the run goes back an epoch and ends the same"
    fit(learner('sgd', tmp_path/'whole'))
    with pytest.raises(InterruptedError): fit(learner('sgd', tmp_path/'run', die=('raise', 3, 1)))
    damage(sorted((tmp_path/'run/checkpoint').iterdir())[-1], 'truncated')
    with pytest.warns(UserWarning, match='refused'): learn = go_on('sgd', tmp_path/'run')
    assert learn.noise.events[0] == ('before', 2)
    assert_same_run(tmp_path/'whole', tmp_path/'run')

# ---- another run's

def test_other_run_is_refused(tmp_path):
    "Config, fingerprint, arch, optimiser: named, and no weight touched"
    fit(learner('sgd', tmp_path))
    def refused(learn, match, **kw):
        before = {k: v.clone() for k, v in learn.model.state_dict().items()}
        with pytest.raises(CheckpointError, match=match): resume(learn, tmp_path, **kw)
        assert all(torch.equal(v, before[k]) for k, v in learn.model.state_dict().items())
    new = partial(learner, 'sgd', tmp_path/'other')
    refused(new(temperature=.2), 'config.temperature: 0.07 in the checkpoint, 0.2 here')
    refused(new(queue_size=24), 'config.queue_size: 20 .* 24')
    refused(new(), "fingerprint: '32 images' in the checkpoint, '33 images' here", fingerprint='33 images')
    refused(new(), 'config.lr: 0.03 .* 1.0', config=new().model.config.replace(lr=1.))
    wide = Learner(new().dls, body(6), opt_func=c2l_opt, cbs=list(new().cbs)[-4:])
    refused(wide, 'arch.student.backbone.0.weight')
    adam = learner('adam', tmp_path/'other')
    refused(adam, 'optimiser: .*SGD.*Optimizer')
    assert resume(new(), tmp_path) == EPOCHS

def test_folder_of_an_earlier_run_is_refused(tmp_path):
    fit(learner('sgd', tmp_path))
    with pytest.raises(CheckpointError, match='earlier run'): fit(learner('sgd', tmp_path))
    learn = learner('sgd', tmp_path)
    start = resume(learn, tmp_path)
    with pytest.raises(CheckpointError, match='start_epoch=4'): fit(learn, n=6)
    with pytest.raises(CheckpointError, match='less'): fit(learn, start, n=3)
    with pytest.warns(UserWarning, match='stretch'): fit(learn, start, n=5)
    assert len(log(tmp_path)) == 5

def on_the_default_device(folder, device=None):
    cbs = [C2LCallback(queue_size=20, dim=8), C2LCheckpoint(folder)]
    return Learner(pretrain_dls(IMAGES, bs=8, device=device), body(), opt_func=c2l_opt, cbs=cbs)

@pytest.mark.filterwarnings('ignore:.*copying from a non-meta')
def test_resume_on_another_device_is_told_in_one_line(tmp_path, other_default):
    fit(on_the_default_device(tmp_path, 'cpu'))
    learn = on_the_default_device(tmp_path)
    with pytest.warns(UserWarning, match="to the bit: made_with.device: 'cpu' in the checkpoint, 'meta' here") as told:
        resume(learn, tmp_path)
    assert devices_of(learn.model) == {'meta'} == {learn.dls.device.type}
    lines = [str(w.message) for w in told if 'made_with' in str(w.message)]
    assert len(lines) == 1 and '\n' not in lines[0]

def test_resume_moves_nothing_where_fastai_moves_nothing(tmp_path, monkeypatch, other_default):
    "Loaders without a device: fastai leaves model and batches on the CPU"
    monkeypatch.setattr(checkpoint, 'default_device', lambda: torch.device('meta'), raising=False)
    def make():
        learn = on_the_default_device(tmp_path, 'cpu')
        learn.dls = DataLoaders(*learn.dls.loaders, device=None)
        learn.dls._device = None
        return learn
    fit(make())
    learn = make()
    resume(learn, tmp_path)
    assert devices_of(learn.model) == {'cpu'}

def test_a_checkpoint_says_where_it_was_made(tmp_path, operations):
    fit(learner('sgd', tmp_path))
    made = final(tmp_path)[1]['made_with']
    assert (made['device'], made['deterministic']) == ('cpu', operations)
    assert made['device_name'] == torch.backends.cpu.get_cpu_capability()
    resume(learner('sgd', tmp_path), tmp_path)

@pytest.mark.filterwarnings('error:the run goes on')
def test_checkpoints_that_do_not_name_a_device_go_on(tmp_path, monkeypatch):
    "Written before the device was recorded: no difference is made up"
    now = checkpoint._made_with
    def before(model):
        return {k: v for k, v in now(model).items() if k not in ('device', 'device_name', 'deterministic')}
    monkeypatch.setattr(checkpoint, '_made_with', before)
    with pytest.raises(InterruptedError): fit(learner('sgd', tmp_path/'old', die=('raise', 2, 0)))
    monkeypatch.setattr(checkpoint, '_made_with', now)
    go_on('sgd', tmp_path/'old')
    fit(learner('sgd', tmp_path/'new'))
    assert_same_run(tmp_path/'old', tmp_path/'new')

@pytest.mark.parametrize('name', ['convolutions', 'products'])
def test_how_a_gpu_computes_is_read_by_old_and_new_torch(name, monkeypatch):
    "torch 2.9 has names of its own for TF32, and the older ones then raise"
    gpu = torch.device('cuda')
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'H200')
    assert checkpoint._where(gpu)[name] in ('none', 'ieee', 'tf32', True, False)
    assert checkpoint._float32(SimpleNamespace(allow_tf32=False)) is False

def test_goes_on_with_workers_and_squares_on_disk(tmp_path):
    np.save(tmp_path/'images.npy', IMAGES)
    def make(folder, **kw):
        learn = learner('sgd', folder, **kw)
        learn.dls = pretrain_dls(Squares(tmp_path/'images.npy'), bs=8, device='cpu', workers=2)
        return learn
    fit(make(tmp_path/'whole'))
    with pytest.raises(InterruptedError): fit(make(tmp_path/'cut', die=('raise', 1, 3), steps=1))
    learn = make(tmp_path/'cut', seed=7)
    fit(learn, resume(learn, tmp_path/'cut'))
    assert_same_run(tmp_path/'whole', tmp_path/'cut')

def test_other_versions_are_told(tmp_path, monkeypatch):
    fit(learner('sgd', tmp_path))
    monkeypatch.setattr(checkpoint, '__version__', '9.9')
    with pytest.warns(UserWarning, match='made_with.c2l_nb'): assert resume(learner('sgd', tmp_path), tmp_path) == EPOCHS

# ---- beside the run

def test_only_training_saves(tmp_path):
    "lr_find, validate, get_preds: no checkpoint, and between resume and fit they change nothing"
    learn = learner('sgd', tmp_path/'run')
    learn.path = tmp_path
    look = lambda: (learn.lr_find(num_it=20, stop_div=False, show_plot=False), learn.get_preds(ds_idx=0), learn.validate(ds_idx=0))
    with learn.no_bar(), learn.no_logging(): look()
    assert not (tmp_path/'run').exists()
    with pytest.raises(InterruptedError): fit(learner('sgd', tmp_path/'run', die=('raise', 2, 0)))
    before = final(tmp_path/'run')[1]
    learn = learner('sgd', tmp_path/'run', seed=3)
    learn.path = tmp_path
    start = resume(learn, tmp_path/'run')
    with learn.no_bar(), learn.no_logging(): look()
    assert final(tmp_path/'run')[1] == before
    fit(learn, start)
    fit(learner('sgd', tmp_path/'whole'))
    assert_same_run(tmp_path/'run', tmp_path/'whole')

def test_progress_table_is_printed_again(tmp_path):
    fit(learner('sgd', tmp_path))
    learn, printed = learner('sgd', tmp_path), []
    start = resume(learn, tmp_path)
    learn.logger = printed.append
    with learn.no_bar(): learn.fit(EPOCHS, .02, start_epoch=start)
    assert [list(r) for r in printed] == load_checkpoint(tmp_path)[1]['rows']

def test_plain_torch_loaders(tmp_path):
    "fastai takes torch's loaders as well; their order comes from torch's global generator"
    items = [(torch.from_numpy(x)[None],) for x in IMAGES]
    def make():
        learn = learner('sgd', tmp_path/'torch')
        T = torch.utils.data.DataLoader
        learn.dls = DataLoaders(T(items, 8, shuffle=True), T(items[:8], 8), device='cpu')
        return learn
    learn = make()
    with learn.no_bar(), learn.no_logging(): learn.fit(2, .02)
    assert resume(make(), tmp_path/'torch') == 2
