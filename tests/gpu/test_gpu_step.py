"""A training step on the GPU: equal to the paper's, to the CPU's, and right in half precision."""
import copy
import pytest
import torch
from torch import nn
from fastai.basics import Callback
from fastai.callback.channelslast import ChannelsLast
from c2l_nb.method.augment import C2LAugment
from c2l_nb.data.phantom import seeded
from c2l_nb.tasks.pretrain import Precision
from gpu_learner import TEMPERATURE, Record, make_learner, on_cpu, phantoms, state_of, tiny
from reference import algorithm1_step, compare

pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings('ignore:the queue of', 'ignore:Your generator is empty')]
HYPER = dict(temperature=TEMPERATURE, momentum=.999, lr=.03, weight_decay=1e-4, sgd_momentum=.9)
BATCH, SIDE, QUEUE, WIDTH = 8, 64, 61, 32                     # 61 rows: the 24 keys of a step go over its end
# float32 against float64: of the first step the worst tensor, of the second, where ReLUs near 0 have opened or closed, all together
FIRST = dict(loss=1e-5, queue=1e-4, student=1e-3, teacher=1e-4, grads=2e-2)
SECOND = dict(loss=1e-3, queue=1e-3, student=2e-3, teacher=1e-3, grads=.1)


class Plain(nn.Module):
    "Pixels in [0,1] to vectors, in own code; its layers have the names of the package's"
    def __init__(self, encoder):
        super().__init__()
        self.backbone = copy.deepcopy(encoder.backbone)
        self.head = nn.ModuleDict(dict(layers=copy.deepcopy(encoder.head.layers)))

    def forward(self, x):
        mean, std = (.485 + .456 + .406)/3, (.229 + .224 + .225)/3
        return self.head['layers'](self.backbone((x - mean)/std).flatten(1))


def two_steps(*cbs, n_steps=2, **how):
    "Networks and queue before, and the records of the steps"
    record = Record()
    learn = make_learner(phantoms(BATCH*n_steps, SIDE), BATCH, record, *cbs, queue_size=QUEUE, dim=WIDTH, **how)
    model = learn.model
    model.queue.ptr.fill_(50)
    student, teacher = (Plain(net).cpu().requires_grad_() for net in (model.student, model.teacher.module))
    start = student, teacher, on_cpu(model.queue.feats), 50
    learn.fit(1, .03)
    assert len(record.steps) == n_steps
    return start, record.steps, learn


def worst(want, got):
    "The largest relative difference of each part: of all student tensors, all gradients …"
    found = {}
    for name, value in compare(want, got).items():
        part = name.split('.')[0]
        found[part] = max(found.get(part, 0.), value)
    return found


def together(want, got):
    "The relative difference of each part, all its tensors in one: Euclidean"
    found = {}
    for part in SECOND:
        pairs = [(want[part], got[part])]
        if isinstance(got[part], dict):
            others = want[part] if isinstance(want[part], dict) else want[part].state_dict()
            pairs = [(others[name], t) for name, t in got[part].items()]
        apart = sum((a.double() - b.double()).square().sum() for a, b in pairs)
        found[part] = (apart/sum(a.double().square().sum() for a, _ in pairs)).sqrt().item()
    return found


def check(measure, bound, want, got, record_property=None):
    found = measure(want, got)
    if record_property:
        record_property(measure.__name__, str(found))
    assert want['ptr'] == got['ptr']
    assert {part: value for part, value in found.items() if value > bound.get(part, 0.)} == {}, found


@pytest.fixture(scope='module')
def run(device):
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False    # before the fixture of each test
    return two_steps()


def test_everything_is_on_the_device(run, device):
    "Model, queue, optimiser and batches are where the library was to put them, though no device was named"
    _, _, learn = run
    held = [*learn.model.parameters(), *learn.model.buffers()]
    held += [v for s in learn.opt.opt.state.values() for v in s.values() if isinstance(v, torch.Tensor) and v.ndim]
    assert {t.device.type for t in held} | learn.record.devices == {device.type}


def test_two_steps_are_algorithm_1(run, record_property):
    "Loss, gradients, student, teacher and queue of a step and the next against float64 by the reference"
    (student, teacher, queue, ptr), records, _ = run
    velocity = None
    for measure, bound, got in zip((worst, together), (FIRST, SECOND), records):
        views = got['x1'], got['x2'], got['lam'], got['perm']
        want = algorithm1_step(student, teacher, queue, ptr, *views, velocity=velocity, **HYPER)
        check(measure, bound, want, got, record_property)
        student, teacher, queue, ptr, velocity = (want[k] for k in ('student', 'teacher', 'queue', 'ptr', 'velocity'))


def test_two_steps_are_the_cpu_s(run, record_property):
    "The same seed on a CPU: the same draws, views to interpolation's rounding, and then the same step"
    _, records, _ = run
    _, wanted, _ = two_steps(device=torch.device('cpu'))
    for measure, bound, want, got in zip((worst, together), (FIRST, SECOND), wanted, records):
        assert want['lam'] == got['lam'] and torch.equal(want['perm'], got['perm'])
        assert (want['x1'] - got['x1']).abs().max() < 1e-3 and (want['x2'] - got['x2']).abs().max() < 1e-3
        check(measure, {part: 5*value for part, value in bound.items()}, want, got, record_property)


def test_channels_last_changes_nothing_but_the_layout(run):
    _, records, _ = run
    _, others, learn = two_steps(ChannelsLast())
    weights = [p for p in learn.model.parameters() if p.ndim == 4 and p.shape[1] > 1]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)
    check(worst, FIRST, records[0], others[0])


@pytest.mark.parametrize('recipe', [dict(), dict(jitter=.4, corners='black', jigsaw=4)], ids=['paper', 'official, jigsaw'])
def test_warp_is_the_cpu_s(device, size, recipe):
    "The same draw gives the same views"
    augment = C2LAugment(size.side, **recipe)
    x = torch.from_numpy(phantoms(8, size.side*8//7))[:, None]
    for images in (x, x/255):
        want = augment(images, seeded(0))
        got = augment(images.to(device), seeded(0)).cpu()
        difference = (want - got).abs()
        assert difference.mean() < 1e-5 and difference.max() < 2e-3


def test_bf16_is_near_float32(run):
    "Features of half precision, a loss of float32"
    _, records, _ = run
    _, others, learn = two_steps(Precision('bf16'))
    assert others[0]['loss'].dtype == torch.float32
    assert abs(others[0]['loss'] - records[0]['loss']) < .05*records[0]['loss']
    assert torch.equal(others[0]['x1'], records[0]['x1'])          # the augmentation knows nothing of it
    assert all(t.isfinite().all() for t in others[1]['student'].values())
    changed = others[0]['student']['backbone.conv1.weight'] != others[1]['student']['backbone.conv1.weight']
    assert changed.float().mean() > .5                             # weights of the first step are not kept for ever


class Overflow(Callback):
    "The gradient of batch 1 is infinite; the others fit the scale"
    order, run_valid = 11, False                                   # after `Precision`

    def before_fit(self):
        device = next(self.model.parameters()).device.type
        self.learn.scaler = torch.amp.GradScaler(device, init_scale=1024.)

    def after_loss(self):
        if self.iter == 1:
            self.learn.loss_grad = self.loss_grad*torch.inf


def test_fp16_overflow_moves_nothing():
    "The step that the scaler skips moves neither student nor teacher and fills no queue; those before and after do"
    _, records, learn = two_steps(Precision('fp16'), Overflow(), n_steps=3, body=tiny())
    def moved(a, b):
        weights = [part for part in ('student', 'teacher') if not torch.equal(*(s[part]['head.layers.weight'] for s in (a, b)))]
        return weights + ['queue']*(a['ptr'] != b['ptr'] or not torch.equal(a['queue'], b['queue']))
    assert moved(records[0], records[1]) == []
    assert moved(records[1], records[2]) == ['student', 'teacher', 'queue']
    assert records[0]['ptr'] == (50 + 24) % QUEUE
    assert all(t.isfinite().all() for t in state_of(learn.model).values())


class Stop(Callback):
    "An error in the middle of a batch"
    order = 90

    def after_loss(self):
        raise MemoryError('planted')


def test_an_error_leaves_no_autocast_behind(device):
    "After an error under bf16 the next fit sees the present weights"
    with pytest.raises(MemoryError):
        two_steps(Precision('bf16'), Stop())
    assert not torch.is_autocast_enabled(device.type)
    body = nn.Linear(4, 4, device=device)
    assert body(torch.rand(2, 4, device=device)).dtype == torch.float32
