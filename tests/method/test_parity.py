"""Whole training steps through `Learner.fit` equal an independent reference, and no planted fault does.

The reference (tests/helpers/reference.py) takes the views, lam and perm as the callback used them and shares nothing with the
package: its network below normalises the pixels, pools and projects by itself.
"""
import copy
import pytest, torch
from torch import nn
from fastai.basics import Callback, DataLoader, DataLoaders, Learner, TrainEvalCallback
from c2l_nb.training.callback import C2LCallback, C2LLoss, c2l_opt
from c2l_nb.method.model import C2LConfig
from c2l_nb.data.phantom import phantom_batch
from reference import algorithm1_step, official_step, planted_faults, compare, mixup, normalise, batch_mean, insert

Z, N, D, SIZE = 5, 37, 16, 24                                               # 37 is not divisible by 3*5
HYPER = dict(temperature=.07, momentum=.999, lr=.03, weight_decay=1e-4, sgd_momentum=.9)
TOLERANCE, FAULT = 1e-10, 1e-6
pytestmark = pytest.mark.filterwarnings('ignore:the queue of')


class Reference(nn.Module):
    "Pixels in [0,1] to vectors, in own code; the layers are named as in the package, so that states can be compared"
    def __init__(self, body, linear):
        super().__init__()
        self.backbone, self.head = copy.deepcopy(body), nn.ModuleDict(dict(layers=copy.deepcopy(linear)))

    def forward(self, x):
        mean, std = (.485 + .456 + .406)/3, (.229 + .224 + .225)/3          # ImageNet's, averaged for one channel
        f = self.backbone((x - mean)/std)
        return self.head['layers'](f.sum((2, 3))/(f.shape[2]*f.shape[3]))


class Record(Callback):
    "What each batch used and what it left behind"
    order, run_valid = 50, False
    def __init__(self): self.steps = []
    def after_pred(self): self.now = dict(zip(('x1', 'x2', 'lam', 'perm', 'lam2', 'perm2'), copy.deepcopy(self.xb)))
    def after_backward(self):
        self.now['grads'] = {n: p.grad.clone() for n, p in self.model.student.named_parameters()}
    def after_batch(self):
        model, sgd = self.model, self.opt.opt
        state = lambda net: copy.deepcopy(net.state_dict())
        velocity = {n: sgd.state[p]['momentum_buffer'].clone() for n, p in model.student.named_parameters()}
        self.steps.append(dict(self.now, loss=self.loss.detach().clone(), student=state(model.student), velocity=velocity,
                               teacher=state(model.teacher.module), queue=model.queue.feats.clone(), ptr=model.queue.ptr.item()))


def body():
    return nn.Sequential(nn.Conv2d(1, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU(),
                         nn.Conv2d(4, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU())


def train(config=C2LConfig.paper, n_steps=3, **changes):
    "Networks and queue before, and the records of `n_steps` steps through `Learner.fit`"
    torch.manual_seed(0)
    images = phantom_batch(Z*n_steps, size=SIZE)[0].double()/255
    dl = lambda: DataLoader([(x,) for x in images], bs=Z)
    record, config = Record(), config(queue_size=N, dim=D, **changes)
    learn = Learner(DataLoaders(dl(), dl()), body(), loss_func=C2LLoss(), opt_func=c2l_opt, default_cbs=False,
                    cbs=[TrainEvalCallback(), C2LCallback(config), record])  # fastai's Recorder cannot take a float64 loss
    model = learn.model.double()
    model.queue.ptr.fill_(30)                                               # wraps in the first step
    nets = model.student, model.teacher.module
    student, teacher = (Reference(net.backbone, net.head.layers).requires_grad_() for net in nets)
    start = student, teacher, model.queue.feats.clone(), 30
    learn.fit(1, lr=.03)
    assert len(record.steps) == n_steps and record.steps[0]['x1'].dtype == torch.float64
    return start, record.steps


def follow(step, start, records):
    "The same steps by the reference `step`"
    (student, teacher, queue, ptr), velocity, results = start, None, []
    for r in records:
        out = step(student, teacher, queue, ptr, r['x1'], r['x2'], r['lam'], r['perm'], velocity=velocity, **HYPER)
        student, teacher, queue, ptr, velocity = (out[key] for key in ('student', 'teacher', 'queue', 'ptr', 'velocity'))
        results.append(out)
    return results


def differences(step, start, records):
    "The largest relative difference of each step"
    return [max(compare(want, got).values()) for want, got in zip(follow(step, start, records), records)]


@pytest.fixture(scope='module')
def paper(): return train(n_steps=2)

@pytest.fixture(scope='module')
def official(): return train(C2LConfig.official, jitter=0., corners='true')


def test_one_step_and_the_next_are_algorithm_1(paper):
    "Loss, every gradient, student, its velocity, teacher, queue and pointer to relative 1e-10"
    start, records = paper
    names = set(compare(follow(algorithm1_step, start, records)[0], records[0]))
    want = {f'{part}.{n}' for part in ('student', 'teacher') for n in start[0].state_dict()}
    want |= {f'{part}.{n}' for part in ('grads', 'velocity') for n, _ in start[0].named_parameters()}
    assert names == want | {'loss', 'queue', 'ptr'}
    assert max(differences(algorithm1_step, start, records)) < TOLERANCE
    assert [r['ptr'] for r in records] == [(30 + 15) % N, (30 + 30) % N]


def test_the_steps_are_worth_comparing(paper):
    "Views differ from each other and from step to step, lam is inside (0,1), perm moves images, the teacher moved"
    (student, teacher, queue, _), (a, b) = paper
    assert not torch.equal(a['x1'], a['x2']) and a['lam'] != b['lam'] and not torch.equal(a['perm'], b['perm'])
    for r in (a, b): assert .01 < r['lam'] < .99 and not torch.equal(r['perm'], torch.arange(Z))
    assert max(compare(dict(a, student=student), a).values()) > 1e-3
    assert not torch.equal(teacher.state_dict()['backbone.0.weight'], a['teacher']['backbone.0.weight'])
    assert (queue != a['queue']).any(1).sum() == 15


@pytest.mark.parametrize('name, faulty', planted_faults, ids=[name for name, _ in planted_faults])
def test_planted_fault_makes_it_fail(paper, name, faulty):
    assert max(differences(faulty, *paper)) > FAULT


def test_official_is_the_released_step(official):
    "Queue growing between the three losses, the larger half of lam, the mean of three"
    start, records = official
    assert max(differences(official_step, start, records)) < TOLERANCE
    assert all(r['lam'] >= .5 for r in records)
    assert max(differences(algorithm1_step, start, records)) > FAULT        # and it is not the paper's


def test_released_augmentation_has_parity_too():
    assert max(differences(official_step, *train(C2LConfig.official, n_steps=1))) < TOLERANCE


def variant(lam2=None, perm2=None, unit=False, weights=(1, 1, 1), rows=('k', 'k_mix', 'k_feat')):
    "Loss and queue of one first step, as `algorithm1_step` but for the choice that is named"
    def step(student, teacher, queue, ptr, r):
        student, teacher = copy.deepcopy(student).train(), copy.deepcopy(teacher).train()
        lam, perm = r['lam'].double(), r['perm']
        lam_2, perm_2 = (r['lam2'].double(), r['perm2']) if lam2 else (lam, perm)
        images, feats = (lambda l: l.view(-1, 1, 1, 1)), (lambda l: l.view(-1, 1))
        with torch.no_grad():
            q, q_mix = student(r['x1']), student(mixup(r['x1'], images(lam), perm))
            k, k_mix = teacher(r['x2']), teacher(mixup(r['x2'], images(lam_2), perm_2))
        k_feat = mixup(normalise(k) if unit else k, feats(lam_2), perm_2)
        out = {n: normalise(v) for n, v in dict(k=k, k_mix=k_mix, k_feat=k_feat).items()}
        q, q_mix = normalise(q), normalise(q_mix)
        terms = [batch_mean(a, out[b], queue, .07) for a, b in ((q, 'k'), (q_mix, 'k_mix'), (q_mix, 'k_feat'))]
        new, place = insert(queue, ptr, torch.cat([out[n] for n in rows]))
        return dict(loss=sum(w*t for w, t in zip(weights, terms)), grads={}, student={}, teacher={}, queue=new, ptr=place)
    return step


@pytest.mark.parametrize('changes, step', [
    (dict(lam_per='sample'), variant()),
    (dict(share_mix=False), variant(lam2=True, perm2=True)),
    (dict(feat_mix='unit'), variant(unit=True)),
    (dict(loss_weights=(1, .5, 0)), variant(weights=(1, .5, 0))),
    (dict(enqueue=('M', 'A')), variant(rows=('k_mix', 'k')))], ids=lambda o: next(iter(o)) if isinstance(o, dict) else '')
def test_each_choice(changes, step):
    "Loss, queue and pointer of a first step under the other choices of the config; none equals the default's"
    start, records = train(n_steps=1, **changes)
    got = dict(records[0], grads={}, student={}, teacher={})
    got.pop('velocity')
    assert max(compare(step(*start, records[0]), got).values()) < TOLERANCE
    assert max(compare(variant()(*start, records[0]), got).values()) > FAULT or 'lam_per' in changes
    assert 'lam_per' not in changes or records[0]['lam'].shape == (Z,)


def test_moco_is_the_first_term():
    start, records = train(C2LConfig.moco, n_steps=1)
    queries, keys = (normalise(net.train()(records[0][x])) for net, x in zip(start[:2], ('x1', 'x2')))
    loss = batch_mean(queries, keys.detach(), start[2], .07)
    loss.backward()
    grads = {n: p.grad for n, p in start[0].named_parameters()}
    got = {key: records[0][key] for key in ('loss', 'grads', 'queue', 'ptr')}
    queue, ptr = insert(start[2], 30, keys)
    none = dict(student={}, teacher={})
    assert max(compare(dict(none, loss=loss, grads=grads, queue=queue, ptr=ptr), dict(none, **got)).values()) < TOLERANCE
