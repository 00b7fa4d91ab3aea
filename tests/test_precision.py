"""Half precision, beside tests/test_callback.py: what a real overflow does, and c2l_pretrain's own `Precision`. On a CPU, whose autocast and
scaler stand for a GPU's; nothing of it was run on a GPU.
"""
import copy, math
import pytest, torch
from torch import nn
from fastai.basics import Callback, Learner
from c2l_nb.cache import pretrain_dls
from c2l_nb.callback import C2LCallback, c2l_opt
from c2l_nb.loss import c2l_loss
from c2l_nb.model import C2L, C2LConfig
from c2l_nb.phantom import phantom_batch, seeded
from c2l_nb.pretrain import Precision

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

def fit(*cbs, **own):
    c2l = C2LCallback(C2LConfig(**{**dict(queue_size=20, dim=16, momentum=.9), **own}))
    learn = Learner(pretrain_dls(POOL, 8, device='cpu'), body(), opt_func=c2l_opt, cbs=[c2l, *cbs])
    learn.logger = lambda *a: None
    with learn.no_bar(): learn.fit(1, .03)
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
        assert torch.is_autocast_enabled('cpu') and {t.dtype for t in five} == {torch.float32}
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
