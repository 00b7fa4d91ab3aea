"""Half precision, beside tests/training/test_callback.py: what a real overflow does, and our own `Precision`. On a CPU, whose autocast and
scaler stand for a GPU's; nothing of it was run on a GPU.
"""
import copy, math, pickle
import pytest, torch
from torch import nn
from fastai.basics import Callback, DataLoader, DataLoaders, L, Learner
from fastai.callback.fp16 import MixedPrecision
from c2l_nb.data.cache import pretrain_dls
from c2l_nb.training.callback import C2LCallback, Precision, c2l_opt
from c2l_nb.training.monitoring import CollapseGuard, HealthCallback
from c2l_nb.method.loss import c2l_loss
from c2l_nb.method.model import C2L, C2LConfig
from c2l_nb.data.phantom import phantom_batch, seeded

pytestmark = pytest.mark.filterwarnings('ignore:the queue of', 'ignore:Your generator is empty')
POOL = phantom_batch(24, size=24)[0][:, 0].numpy()

def body():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())

class Note(Callback):
    "The state after every batch, the scale, and what `at` says of the learner after the forward"
    order, run_valid = 60, False
    def __init__(self, at=None): self.at, self.states, self.scales, self.said = at, [], [], []
    def before_fit(self): self.after_batch()
    def after_pred(self):
        if self.at: self.said.append(self.at(self.learn))
    def after_batch(self):
        self.states.append(copy.deepcopy(self.model.state_dict()))
        self.scales.append(self.learn.scaler.get_scale())
    def changed(self):
        "After each batch: which of student's and teacher's parameters and queue are others than before it"
        weights = lambda a: {k: v for k, v in a.items() if k != '_extra_state' and not any(s in k for s in ('running', 'tracked'))}
        return [{k.split('.')[0] for k, v in weights(a).items() if not torch.equal(v, b[k])} for a, b in zip(self.states, self.states[1:])]

class Scaled(Precision):
    "`Precision` that begins with another loss scale"
    def __init__(self, mode, scale): super().__init__(mode); self.scale = scale
    def before_fit(self): super().before_fit(); self.learn.scaler = torch.amp.GradScaler('cpu', init_scale=self.scale, enabled=self.amp_mode.value == 'fp16')

def fit(*cbs, epochs=1, **own):
    c2l = C2LCallback(C2LConfig(**{**dict(queue_size=20, dim=16, momentum=.9), **own}))
    learn = Learner(pretrain_dls(POOL, 8, device='cpu'), body(), opt_func=c2l_opt, cbs=[c2l, *cbs])
    learn.logger = lambda *a: None
    with learn.no_bar(): learn.fit(epochs, .03)
    return learn

EVERYTHING = {'student', 'teacher', 'queue'}

def test_overflow_of_the_loss_scale():
    "A scale of 2^40 overflows float16 gradients by itself: the step is skipped, the scale halved; nothing moved, nothing non-finite entered"
    note = Note()
    fit(Scaled('fp16', 2.**40), note)
    assert note.changed() == [set()]*3 and note.scales == [2.**40, 2.**39, 2.**38, 2.**37]
    assert all(v.float().isfinite().all() for v in note.states[-1].values())

def test_scale_in_range_trains():
    note = Note()
    fit(Scaled('fp16', 1024.), note)
    assert note.changed() == [EVERYTHING]*3 and set(note.scales) == {1024.}

@pytest.mark.parametrize('mode', ['fp16', 'bf16'])
def test_infinite_keys_never_enter(mode):
    """The teacher's head overflows in batch 1. fp16: loss and gradients are not finite, the step is skipped and nothing moves. bf16 has no scaler: the infinity is put
    into the keys alone, the student trains on, and the queue still takes none."""
    class Blow(Callback):
        order, run_valid = 50, False
        def before_batch(self):
            if mode == 'fp16' and self.iter == 1: self.keep = self.model.teacher.module.head.layers.weight.clone(); self.model.teacher.module.head.layers.weight.data.mul_(1e6)
        def after_pred(self):
            if mode == 'fp16' and self.iter == 1: self.model.teacher.module.head.layers.weight.data.copy_(self.keep); self.infinite = not self.pred[2].isfinite().all()
            if mode == 'bf16' and self.iter == 1: self.learn.c2l.five[2] = torch.full_like(self.pred[2], math.inf); self.infinite = True
    note = Note()
    learn = fit(Scaled(mode, 1024.), blow := Blow(), note)
    assert blow.infinite
    assert note.changed() == [EVERYTHING, set() if mode == 'fp16' else EVERYTHING - {'queue'}, EVERYTHING]
    assert all(v.float().isfinite().all() for v in learn.model.state_dict().values()) and learn.model.seen == 3

@pytest.mark.parametrize('mode, dtype', [('bf16', torch.bfloat16), ('fp16', torch.float16)])
@pytest.mark.parametrize('config', [dict(), dict(queue_update='sequential', loss_reduction='mean')], ids=['paper', 'sequential'])
def test_teacher_inside_autocast_loss_outside(mode, dtype, config):
    """With `Precision`: convolutions of both networks put out half precision; features, queue and loss are float32, and the loss
    is that of float64 on the same features (a bfloat16 product would be off by a percent)"""
    def look(learn):
        five = [t.detach() for t in learn.pred]
        assert not torch.is_autocast_enabled('cpu') and {t.dtype for t in five} == {torch.float32}
        exact = learn.model.loss(*(t.double() for t in five))
        loss = learn.model.loss(*five)
        assert loss.dtype == torch.float32 and exact.dtype == torch.float64
        return abs(loss.item() - exact.item())/exact.item()
    types, note = [], Note(look)
    class Types(Callback):
        order = 1
        def before_fit(self):
            for net in (self.model.student, self.model.teacher.module): net.backbone[3].register_forward_hook(lambda m, i, o: types.append(o.dtype))
    fit(Precision(mode), Types(), note, **config)
    assert set(types) == {dtype} and len(types) == 3*4 and len(note.said) == 3 and max(note.said) < 1e-4

@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_features_in_half_precision_are_widened_before_the_product(dtype):
    "Even if a caller hands over halves within autocast: equal to float32 of the same numbers to rounding; a product of halves is off by a thousand times as much"
    g = seeded(0)
    five, feats = [torch.randn(8, 16, generator=g).to(dtype) for _ in range(5)], nn.functional.normalize(torch.randn(64, 16, generator=g))
    with torch.autocast('cpu', dtype): inside = c2l_loss(*five, feats)
    outside = c2l_loss(*(t.double() for t in five), feats.double())
    assert inside.dtype == torch.float32 and abs(inside.item() - outside.item()) < 1e-5*outside.item()
    q = nn.functional.normalize(five[0].float())
    with torch.autocast('cpu', dtype): naive = (q@feats.T/.07).float()
    assert (naive - q.double()@feats.double().T/.07).abs().max() > 1e-3

# ---- Interrupted fits ----------------------------------------------------------------------------------------------------

class CPUMixed(MixedPrecision):
    "fastai's, made to work on a CPU"
    def before_fit(self):
        self.autocast, self.scales = torch.autocast('cpu', torch.bfloat16), L()
        self.learn.scaler = torch.amp.GradScaler('cpu', enabled=False)

class Interrupt(Callback):
    "Ctrl-C in the second batch"
    order, run_valid = 60, False
    def __init__(self, event): setattr(self, event, self._now)
    def _now(self):
        if self.iter == 1: raise KeyboardInterrupt

class Recompute(Callback):
    "How far the queries of each step are from those that the present weights give"
    order, run_valid = 60, False
    def __init__(self): self.off = []
    def after_pred(self):
        model = self.model
        with torch.no_grad(), torch.autocast('cpu', torch.bfloat16, cache_enabled=False):
            q = model.student(model.prepare(self.xb[0]))
        self.off.append((q.float() - self.pred[0]).abs().max().item())

def quiet(learn):
    learn.logger = lambda *a: None
    return learn.no_bar()

def c2l_learner(*cbs):
    c2l = C2LCallback(queue_size=20, dim=16, momentum=.9)
    return Learner(pretrain_dls(POOL, 8, device='cpu'), body(), opt_func=c2l_opt, cbs=[c2l, *cbs])

def interrupted(learn, event):
    with quiet(learn), pytest.raises(KeyboardInterrupt): learn.fit(1, .5, cbs=Interrupt(event))
    learn.remove_cbs(learn._grab_cbs(Interrupt))             # fastai leaves it there

@pytest.mark.parametrize('event', ['after_pred', 'after_loss', 'before_batch'])
def test_interrupted_fit_leaves_no_autocast(event):
    "The next fit of this learner, of another one and one in float32 compute with the weights that the optimiser moves"
    learn = c2l_learner(Precision('bf16'))
    interrupted(learn, event)
    assert not torch.is_autocast_enabled('cpu')
    for again in (learn, c2l_learner(Precision('bf16'))):
        with quiet(again): again.fit(2, .5, cbs=(look := Recompute()))
        assert look.off == [0.]*6
    interrupted(learn, event)
    types = []
    learn.remove_cb(Precision)
    learn.model.student.backbone[0].register_forward_hook(lambda m, i, o: types.append(o.dtype))
    with quiet(learn): learn.fit(1, .5)
    assert set(types) == {torch.float32}

def test_c2l_beside_an_autocast_that_fastai_left_entered():
    "Interrupted under fastai's own: said in the next fit, whose steps still see the present weights; evaluation too"
    first = c2l_learner(mixed := CPUMixed())
    interrupted(first, 'after_pred')
    left = mixed.autocast
    try:
        assert torch.is_autocast_enabled('cpu')
        second = c2l_learner(CPUMixed())
        with quiet(second), pytest.warns(UserWarning, match='autocast is on'): second.fit(2, .5, cbs=(look := Recompute()))
        assert look.off == [0.]*6
        with torch.no_grad():
            got = second.model.eval()(torch.from_numpy(POOL)[:4, None])
            with torch.autocast('cpu', torch.bfloat16, cache_enabled=False): want = second.model.student.features(second.model.prepare(torch.from_numpy(POOL)[:4, None]))
        assert torch.equal(got, want)
    finally: left.__exit__(None, None, None)
    assert not torch.is_autocast_enabled('cpu')

class Odd(nn.Sequential):
    "An ordinary model, whose forward may be interrupted"
    stop = False
    def forward(self, x):
        if self.stop: raise KeyboardInterrupt
        return super().forward(x.float())

def ordinary(model=None):
    torch.manual_seed(0)
    data = [(torch.rand(6), torch.rand(2)) for _ in range(24)]
    dls = DataLoaders(DataLoader(data, bs=8), DataLoader(data, bs=8), device='cpu')
    return Learner(dls, model or Odd(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)), loss_func=nn.functional.mse_loss, opt_func=c2l_opt, cbs=Precision('bf16'))

@pytest.mark.parametrize('where', ['forward', 'after_pred', 'before_batch', 'after_loss'])
def test_ordinary_model_after_an_interrupted_fit(where):
    learn = ordinary()
    learn.model.stop = where == 'forward'
    if where == 'forward':
        with quiet(learn), pytest.raises(KeyboardInterrupt): learn.fit(1, .5)
    else: interrupted(learn, where)
    assert not torch.is_autocast_enabled('cpu')
    learn.model.stop = False
    class Same(Callback):
        order, off = 60, 0.
        def after_pred(self):
            with torch.autocast('cpu', torch.bfloat16, cache_enabled=False): again = type(self.model).forward(self.model, *self.xb)
            assert again.dtype == torch.bfloat16 and torch.equal(again.float(), self.pred)
            Same.off += 1
    for again in (learn, ordinary(learn.model)):
        with quiet(again): again.fit(2, .5, cbs=Same())
    assert Same.off == 2*2*6                                 # training and validation
    assert 'forward' not in vars(learn.model) and learn.model(torch.rand(1, 6)).dtype == torch.float32

def test_precision_of_an_ordinary_model():
    "Training, validation and predictions in bfloat16, whatever comes out in float32; between batches and afterwards the model is its own"
    learn, types, between = ordinary(), [], []
    learn.model[0].register_forward_hook(lambda m, i, o: types.append(o.dtype))
    class Between(Callback):
        def after_batch(self): between.append('forward' in vars(self.model)); copy.deepcopy(self.model); pickle.dumps(self.model.state_dict())
    with quiet(learn):
        learn.fit(1, .1, cbs=Between())
        learn.validate()
        preds = learn.get_preds()[0]
    assert set(types) == {torch.bfloat16} and len(types) == 12 and not any(between) and preds.dtype == torch.float32
    learn.model(torch.rand(1, 6))
    assert types[-1] == torch.float32 and learn.scaler is None

def test_precision_of_a_compiled_model():
    "Compiled as a whole or in place: half precision, and the compiled forward is put back"
    inside = Odd(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2))
    wrapped = torch.compile(inside, backend='eager')
    own = wrapped.forward
    for model in (wrapped, inside):
        if model is inside: model.compile(backend='eager')
        learn, seen = ordinary(model), []
        class See(Callback):
            order = 5                                        # before `Precision` widens
            def after_pred(self): seen.append(self.pred.dtype)
        with quiet(learn): learn.fit(1, .1, cbs=See())
        assert set(seen) == {torch.bfloat16} and len(seen) == 6
    assert wrapped.forward is own and 'forward' not in vars(inside)

# ---- The guard -----------------------------------------------------------------------------------------------------------

class Overflow(Callback):
    "A loss that is not finite, in the batches named"
    order, run_valid = 13, False
    def __init__(self, *batches): self.batches, self.met = batches, []
    def after_loss(self):
        if not self.batches or self.train_iter in self.batches:
            self.learn.loss_grad = self.loss_grad*math.inf
            self.learn.loss = self.loss_grad.detach().clone()
            self.met.append(self.train_iter)

def test_guard_leaves_an_overflow_to_the_scaler():
    "The step is skipped, the scale halved, and the run goes on"
    note = Note()
    learn = fit(Scaled('fp16', 1024.), HealthCallback(), CollapseGuard(), Overflow(1), note)
    assert learn.collapse_guard.reason == '' and note.changed() == [EVERYTHING, set(), EVERYTHING] and note.scales[-1] == 512.

def test_guard_ends_what_the_scaler_refuses_without_end():
    "24 in a row, as documented; 23, one good step and 23 more are no reason"
    learn = fit(Precision('fp16'), HealthCallback(), CollapseGuard(), bad := Overflow(), epochs=12)
    assert 'refused 24 steps' in learn.collapse_guard.reason and bad.met == list(range(24))
    learn = fit(Precision('fp16'), HealthCallback(), CollapseGuard(), Overflow(*range(23), *range(24, 47)), epochs=16)
    assert learn.collapse_guard.reason == ''

@pytest.mark.parametrize('cbs', [[], [Precision('bf16')]], ids=['fp32', 'bf16'])
def test_guard_without_a_scaler_stops_at_once(cbs):
    learn = fit(*cbs, HealthCallback(), CollapseGuard(), bad := Overflow(1))
    assert 'the loss is inf' in learn.collapse_guard.reason and bad.met == [1]
    assert all(p.isfinite().all() for p in learn.model.student.parameters())
