"""The reference is itself right: tiny cases worked out by hand, torch's own functions, every planted fault seen."""
import copy, math
import pytest, torch
from torch import nn, tensor
import torch.nn.functional as F
from reference import algorithm1_step, official_step, planted_faults, compare, insert, momentum_update

HYPER = dict(temperature=0.07, momentum=0.999, lr=0.03)  # the paper's setting, the released temperature


def identity(scale=1.):
    "A network whose weight is a multiple of the identity: the 'images' are the features."
    net = nn.Linear(2, 2, bias=False).double()
    with torch.no_grad(): net.weight.copy_(scale*torch.eye(2))
    return net


def conv_net():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(),
                         nn.Conv2d(4, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 16)).double()


def setting(same_start=False, z=5, n=37, ptr=30):
    "Networks, queue and three pairs of batches; the queue wraps in the first step."
    with torch.random.fork_rng():
        torch.manual_seed(0)
        student = conv_net()
        teacher = copy.deepcopy(student) if same_start else conv_net()
        queue = F.normalize(torch.randn(n, 16, dtype=torch.float64))
        images = lambda: torch.randn(z, 1, 12, 12).double()
        batches = [(images(), images(), tensor(lam).double(), tensor(perm))
                   for lam, perm in [(.3, [1, 2, 4, 0, 3]), (.8, [3, 0, 1, 4, 2]), (.45, [2, 3, 1, 4, 0])]]
    return student, teacher, queue, ptr, batches


def run(step, student, teacher, queue, ptr, batches, steps, **hyper):
    "The results of `steps` steps in a row."
    velocity, results = None, []
    for x1, x2, lam, perm in batches[:steps]:
        out = step(student, teacher, queue, ptr, x1, x2, lam, perm, velocity=velocity, **{**HYPER, **hyper})
        student, teacher, queue, ptr = out['student'], out['teacher'], out['queue'], out['ptr']
        velocity = out['velocity']
        results.append(out)
    return results


# ---- By hand --------------------------------------------------------------------------------------------------------
# One image (Z=1, so mixup does nothing), D=2, N=3, T=1/2, student = identity:
#   x1 = (3,4) -> q = (.6,.8);  x2 = (0,5) -> k = k_mix = k_feat = (0,1);  queue rows (1,0), (0,-1), (-1,0)
#   logits = 2*(.8, .6, -.8, -.6) = 1.6, 1.2, -1.6, -1.2
#   exp    = 4.953032, 3.320117, 0.201897, 0.301194, sum 8.776240
#   one term = log(8.776240) - 1.6 = 2.172048 - 1.6 = 0.572048
QUEUE = tensor([[1., 0], [0, -1], [-1, 0]]).double()
ONE = dict(queue=QUEUE, ptr=1, x1=tensor([[3., 4]]).double(), x2=tensor([[0., 5]]).double(),
           lam=tensor(.25), perm=tensor([0]), temperature=.5, momentum=.75, lr=.1)


def test_loss_by_hand():
    out = algorithm1_step(identity(), identity(2.), **ONE)
    assert out['loss'].item() == pytest.approx(3*0.572048, abs=3e-6)       # the SUM of three equal terms
    assert torch.allclose(out['q'], tensor([[.6, .8]]).double()) and torch.equal(out['q'], out['q_mix'])
    for key in ('k', 'k_mix', 'k_feat'): assert torch.equal(out[key], tensor([[0., 1]]).double())


def test_gradient_and_sgd_by_hand():
    # p = exp/sum = 0.564368, 0.378307, 0.023005, 0.034319 (positive, rows)
    # d term/dq = (sum p*u - k)/T = 2*(0.378307-0.034319, 0.564368-0.023005-1) = (0.687976, -0.917274)
    # d term/dv = (g - q (q.g))/|v|, q.g = 0.412786-0.733819 = -0.321033
    #           = (0.880596, -0.660448)/5 = (0.176119, -0.132090)
    # d term/dW = dv outer x1 = ((0.528358, 0.704477), (-0.396269, -0.528358)), three terms
    grad = 3*tensor([[0.528358, 0.704477], [-0.396269, -0.528358]]).double()
    out = algorithm1_step(identity(), identity(2.), **ONE, weight_decay=.5)
    assert torch.allclose(out['grads']['weight'], grad, atol=1e-5)
    # first step: v = grad + .5*W, W <- W - .1*v
    v = grad + .5*torch.eye(2).double()
    assert torch.allclose(out['velocity']['weight'], v, atol=1e-5)
    assert torch.allclose(out['student'].weight, torch.eye(2).double() - .1*v, atol=1e-6)
    # a step with velocity u from before: v = .9*u + grad + .5*W
    u = tensor([[1., 2], [3, 4]]).double()
    out = algorithm1_step(identity(), identity(2.), **ONE, weight_decay=.5, velocity={'weight': u})
    assert torch.allclose(out['student'].weight, torch.eye(2).double() - .1*(.9*u + v), atol=1e-6)


def test_ema_by_hand():
    # teacher 2*I, momentum 3/4: teacher <- 1.5*I + student_after/4
    out = algorithm1_step(identity(), identity(2.), **ONE)
    assert torch.allclose(out['teacher'].weight, 1.5*torch.eye(2).double() + out['student'].weight/4)
    assert not torch.allclose(out['student'].weight, torch.eye(2).double())
    a, b = identity(2.), identity(6.)
    momentum_update(a, b, .75)                                              # .75*2 + .25*6 = 3
    assert torch.equal(a.weight, 3*torch.eye(2).double())


def test_official_by_hand():
    # ptr 1, the three keys replace rows 1, 2, 0 in turn. With E = e^1.6 = 4.953032 and the exps of above:
    # loss 1: 8.776240 (old queue)                         -> log - 1.6 = 0.572048
    # loss 2: E + 3.320117 + E + 0.301194 = 13.527375      -> 2.604715 - 1.6 = 1.004715   (row 1 is now k)
    # loss 3: E + 3.320117 + E + E        = 18.179213      -> 2.900279 - 1.6 = 1.300279   (rows 1, 2)
    out = official_step(identity(), identity(2.), **ONE)
    assert out['loss'].item() == pytest.approx((0.572048 + 1.004715 + 1.300279)/3, abs=3e-6)
    assert torch.equal(out['queue'], tensor([[0., 1]]*3).double()) and out['ptr'] == 1


def test_mixup_by_hand():
    # lam 1/4 and the two images swapped: x1 = (4,0),(0,4) -> (1,3),(3,1); x2 = (2,0),(0,1) -> (.5,.75),(1.5,.25)
    # the identity is linear, so k_feat = k_mix = (2,3)/sqrt(13), (6,1)/sqrt(37);
    # mixing unit vectors would give (1,3)/sqrt(10)
    # the released code takes lam = 3/4 instead: x2 mixed (1.5,.25),(.5,.75)
    args = dict(ONE, x1=tensor([[4., 0], [0, 4]]), x2=tensor([[2., 0], [0, 1]]), perm=tensor([1, 0]))
    out, official = (step(identity(), identity(), **args) for step in (algorithm1_step, official_step))
    rows = tensor([[2/math.sqrt(13), 3/math.sqrt(13)], [6/math.sqrt(37), 1/math.sqrt(37)]]).double()
    assert torch.allclose(out['q_mix'], tensor([[1., 3], [3, 1]]).double()/math.sqrt(10))
    assert torch.allclose(out['k_mix'], rows) and torch.allclose(out['k_feat'], rows)
    assert torch.allclose(official['k_mix'], rows.flip(0)) and torch.allclose(official['k_feat'], rows.flip(0))
    # squaring the features after the identity breaks linearity: raw k = (4,0),(0,1), so
    # k_feat ~ .25*(4,0)+.75*(0,1) = (1,.75) ~ (4,3)/5 but k_mix ~ (.25,.5625) ~ (4,9)/sqrt(97)
    class Square(nn.Module):
        def forward(self, x): return x**2
    net = lambda: nn.Sequential(identity(), Square())
    out = algorithm1_step(net(), net(), **args)
    assert torch.allclose(out['k_feat'][0], tensor([.8, .6]).double())
    assert torch.allclose(out['k_mix'][0], tensor([4., 9]).double()/math.sqrt(97))


def test_shuffle_by_hand():
    "Three images turned round: image 0 is mixed with image 1, 1 with 2, 2 with 0 (not the other way), everywhere."
    x1, x2, mixed = tensor([[1., 0], [0, 1], [0, -1]]), tensor([[1., 0], [0, 1], [-1, 0]]), [[1., 3], [-3, 1], [2, 0]]
    out = algorithm1_step(identity(), identity(), **dict(ONE, x1=x1, x2=x2, perm=tensor([1, 2, 0])))
    for key in ('k_mix', 'k_feat'): assert torch.allclose(out[key], F.normalize(tensor(mixed).double()))
    assert torch.allclose(out['q_mix'], F.normalize(tensor([[1., 3], [0, -2], [3, -1]]).double()))


def test_insert_by_hand():
    rows = lambda *values: tensor(values).double()[:, None]
    queue, ptr = insert(rows(0, 0, 0, 0), 3, rows(1, 2, 3))                 # places 3, 0, 1
    assert queue.flatten().tolist() == [2, 3, 0, 1] and ptr == 2
    queue, ptr = insert(rows(0, 0, 0, 0), 1, rows(1, 2, 3, 4, 5, 6))        # places 1, 2, 3, 0, then 1, 2 once more
    assert queue.flatten().tolist() == [4, 5, 6, 3] and ptr == 3


def check_queue(step):
    student, teacher, queue, ptr, batches = setting()
    a, b = run(step, student, teacher, queue, ptr, batches, 2)
    first, second = (torch.cat([o['k'], o['k_mix'], o['k_feat']]) for o in (a, b))
    assert torch.equal(a['queue'], torch.cat([first[7:], queue[8:30], first[:7]])) and a['ptr'] == 8
    assert torch.equal(b['queue'], torch.cat([first[7:], second, queue[23:30], first[:7]])) and b['ptr'] == 23


def test_queue_of_two_steps():
    "37 rows, 15 a step from place 30: seven at the end, eight at the start, then the next fifteen; in both steps."
    check_queue(algorithm1_step)
    check_queue(official_step)


def test_batchnorm_by_hand():
    # BatchNorm of one channel, momentum .1: running mean 0 -> .1*m1 -> .9*.1*m1 + .1*m2 (clean, then mixed batch)
    # x1 has mean 2, its mixture too: .09*2 + .1*2 = .38. x2 has mean 4: .76 in the teacher, whatever the student has
    net = lambda: nn.Sequential(nn.BatchNorm1d(1), nn.Linear(1, 2)).double()
    student = net()
    args = dict(ONE, x1=tensor([[1.], [3]]), x2=tensor([[2.], [6]]), perm=tensor([1, 0]))
    out = algorithm1_step(student, copy.deepcopy(student), **args)
    assert out['student'][0].running_mean.item() == pytest.approx(.38) and out['student'][0].num_batches_tracked == 2
    assert out['teacher'][0].running_mean.item() == pytest.approx(.76) and out['teacher'][0].num_batches_tracked == 2
    # unbiased variance of (1,3) is 2; mixed (2.5,1.5) has .5: 1 -> .9+.2 = 1.1 -> .99+.05 = 1.04
    assert out['student'][0].running_var.item() == pytest.approx(1.04)


# ---- Against torch's own functions ----------------------------------------------------------------------------------

def test_against_torch_loss_and_optimiser():
    "Two steps agree with `F.cross_entropy`, autograd and `torch.optim.SGD` to rounding."
    student, teacher, queue, ptr, batches = setting()
    net, opt_velocity = copy.deepcopy(student), None
    opt = torch.optim.SGD(net.parameters(), lr=.03, momentum=.9, weight_decay=1e-4)
    for (x1, _, lam, perm), out in zip(batches, run(algorithm1_step, student, teacher, queue, ptr, batches, 3)):
        q, q_mix = F.normalize(net(x1)), F.normalize(net(torch.lerp(x1[perm], x1, lam)))
        logits = lambda q, k: torch.cat([(q*k).sum(1, keepdim=True), q @ queue.T], 1)/.07
        loss = sum(F.cross_entropy(logits(*pair), torch.zeros(5, dtype=torch.long))
                   for pair in [(q, out['k']), (q_mix, out['k_mix']), (q_mix, out['k_feat'])])
        opt.zero_grad(); loss.backward(); opt.step()
        for name, p in net.named_parameters(): assert torch.allclose(p.grad, out['grads'][name], atol=1e-12)
        for a, b in zip(net.state_dict().values(), out['student'].state_dict().values()): assert torch.allclose(a, b)
        assert torch.allclose(loss, out['loss'])
        queue = out['queue']


def test_finite_difference():
    "Moving one weight by 1e-6 moves the loss as the gradient says, for both steps."
    for step in (algorithm1_step, official_step):
        student, teacher, queue, ptr, batches = setting()
        losses = []
        for eps in (1e-6, -1e-6):
            moved = copy.deepcopy(student)
            with torch.no_grad(): moved[3].weight[1, 2, 0, 1] += eps
            losses.append(run(step, moved, teacher, queue, ptr, batches, 1)[0]['loss'].item())
        grad = run(step, student, teacher, queue, ptr, batches, 1)[0]['grads']['3.weight'][1, 2, 0, 1].item()
        assert (losses[0]-losses[1])/2e-6 == pytest.approx(grad, rel=1e-5)


def test_inputs_untouched_and_repeatable():
    student, teacher, queue, ptr, batches = setting()
    before = copy.deepcopy((student.state_dict(), teacher.state_dict(), queue, batches))
    for step in (algorithm1_step, official_step):
        a, b = (run(step, student, teacher, queue, ptr, batches, 2)[-1] for _ in range(2))
        assert max(compare(a, b).values()) == 0
    after = (student.state_dict(), teacher.state_dict(), queue, batches)
    for x, y in zip(before[:2], after[:2]): assert all(torch.equal(x[name], y[name]) for name in x)
    assert torch.equal(before[2], after[2])
    for x, y in zip(before[3], after[3]): assert all(torch.equal(s, t) for s, t in zip(x, y))
    assert all(p.grad is None for net in (student, teacher) for p in net.parameters())


# ---- compare() and the planted faults -------------------------------------------------------------------------------

def test_compare_by_hand():
    a = dict(loss=2., grads={'w': tensor([4., 2])}, student=identity(), teacher=identity(2.), queue=QUEUE, ptr=4)
    b = dict(a, loss=2.5, grads={'w': tensor([4., 1])}, teacher=identity(3.), ptr=3)
    assert compare(a, b) == {'loss': .25, 'grads.w': .25, 'student.weight': 0., 'teacher.weight': .5,
                             'queue': 0., 'ptr': .25}
    assert compare(a, dict(a, student=identity().state_dict())) == dict.fromkeys(compare(a, b), 0.)
    assert compare(a, dict(a, loss=math.nan))['loss'] == math.inf
    assert compare(a, dict(a, queue=QUEUE[:2]))['queue'] == math.inf
    renamed = compare(a, dict(a, grads={'v': tensor([4., 2])}))
    assert renamed['grads.w'] == renamed['grads.v'] == math.inf
    # a gradient that is zero but for rounding is measured against a thousandth of the largest gradient, here 4/1000
    a, b = (dict(a, grads={'w': tensor([4.]), 'bias': tensor([tiny])}) for tiny in (1e-17, -1e-17))
    assert compare(a, b)['grads.bias'] == pytest.approx(2e-17/4e-3)


REQUIRED = ('loss', 'grads', 'student', 'teacher', 'queue', 'ptr')


@pytest.mark.parametrize('same_start', [False, True], ids=['two networks', 'teacher copied'])
@pytest.mark.parametrize('name, faulty', planted_faults, ids=[name for name, _ in planted_faults])
def test_planted_fault_is_seen(name, faulty, same_start):
    "At the paper's own setting each mistake shows within two steps, in what every implementation must return."
    start = setting(same_start=same_start)
    required = lambda step: [{key: out[key] for key in REQUIRED} for out in run(step, *start, 2)]
    assert max(max(compare(a, b).values()) for a, b in zip(required(algorithm1_step), required(faulty))) > 1e-6


def test_official_differs_from_algorithm1():
    start = setting()
    a, b = (run(step, *start, 1)[0] for step in (algorithm1_step, official_step))
    assert compare(a, b)['loss'] > 1e-3


def test_official_third_loss_cannot_reach_zero():
    "With perfect keys Algorithm 1's loss vanishes; the released code's own keys among its negatives keep it from that."
    far = dict(ONE, x2=tensor([[3., 4]]), temperature=.01)                  # perfect keys, all old rows far away
    assert algorithm1_step(identity(), identity(), **far)['loss'].item() < 1e-8
    # ptr 1: loss 1 = 0; loss 2 has one row equal to its positive: log 2; loss 3 two such rows: log 3
    assert official_step(identity(), identity(), **far)['loss'].item() == pytest.approx((math.log(2) + math.log(3))/3)
