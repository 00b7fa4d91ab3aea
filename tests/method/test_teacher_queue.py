"EMATeacher against a hand loop in float64, FeatureQueue against a one-row-at-a-time deque."
import pickle
from collections import deque
from copy import deepcopy
import pytest, torch
import torch.nn.functional as F
from torch import nn
from c2l_nb.method.teacher import EMATeacher
from c2l_nb.method.feature_queue import FeatureQueue

def gen(seed=0): return torch.Generator().manual_seed(seed)

def student(seed=0):
    torch.manual_seed(seed)
    conv = [nn.Conv2d(1,4,3), nn.BatchNorm2d(4), nn.ReLU()]
    return nn.Sequential(*conv, nn.Dropout(.5), nn.Flatten(), nn.Linear(4*36,8))

def move(module, g):
    "Another value for every parameter and floating-point buffer"
    with torch.no_grad():
        for t in [*module.parameters(), *module.buffers()]:
            if t.is_floating_point(): t.add_(torch.rand(t.shape, generator=g, dtype=t.dtype))

@pytest.mark.parametrize('momentum', [0., .5, .9, .999, 1.])
@pytest.mark.parametrize('buffers', [False, True])
def test_teacher_is_the_hand_loop(momentum, buffers):
    "50 updates equal theta*t + (1-theta)*s to 1e-15 (relative) in float64; buffers move only if asked"
    s,g = student().double(), gen()
    t = EMATeacher(s, momentum, buffers=buffers)
    start = {n: b.clone() for n,b in s.named_buffers()}
    hand = {n: p.detach().clone() for n,p in s.named_parameters()}
    if buffers: hand.update((n,b.clone()) for n,b in s.named_buffers() if b.is_floating_point())
    for _ in range(50):
        move(s, g)
        before = {n: v.clone() for n,v in t.module.state_dict().items()}
        t.update(s)
        now,src = t.module.state_dict(), s.state_dict()
        for n in hand:   # one update: rounding of one step only
            want = momentum*before[n] + (1-momentum)*src[n]
            assert ((now[n]-want).abs() <= 1e-15*want.abs().clamp(min=1)).all(), n
            hand[n] = momentum*hand[n] + (1-momentum)*src[n]
    for n,v in hand.items(): torch.testing.assert_close(now[n], v, rtol=1e-14, atol=1e-14)
    if not buffers:
        for n,b in start.items(): assert torch.equal(now[n], b)

def test_update_changes_only_the_teacher():
    "The student keeps its values, the weights stay the same tensors (in place), the teacher starts as a copy"
    s = student(); t = EMATeacher(s)
    for a,b in zip(s.state_dict().values(), t.module.state_dict().values()):
        assert torch.equal(a, b) and a.data_ptr()!=b.data_ptr()
    ptrs = [p.data_ptr() for p in t.parameters()]
    move(s, gen()); was = deepcopy(s.state_dict())
    t.update(s)
    assert all(torch.equal(was[n], v) for n,v in s.state_dict().items())
    assert ptrs==[p.data_ptr() for p in t.parameters()]

def test_no_gradients():
    "No weight requires grad, no output does, and a backward through the student leaves no .grad behind"
    s = student(); t = EMATeacher(s); x = torch.randn(4,1,8,8, generator=gen(), requires_grad=True)
    k = t(x)
    assert not k.requires_grad and not any(p.requires_grad for p in t.parameters())
    (s(x)*k).sum().backward()
    t.update(s)
    assert all(p.grad is None for p in t.parameters()) and all(p.grad is not None for p in s.parameters())
    assert all(p.requires_grad for p in s.parameters())

@pytest.mark.parametrize('bn', ['train', 'eval'])
def test_train_and_eval_flags(bn):
    "A parent's train() puts BatchNorm alone into training mode, and only with bn='train'; eval() nothing"
    s = student(); parent = nn.ModuleDict({'student': s, 'teacher': EMATeacher(s, bn=bn)})
    for mode in (True, False, True):
        assert parent.train(mode) is parent
        for m in parent['teacher'].modules():
            assert m.training == (mode and bn=='train' and isinstance(m, nn.BatchNorm2d))
        assert all(m.training==mode for m in s.modules())
    assert parent['teacher'].train() is parent['teacher']

def test_batch_statistics():
    "bn='train' at momentum 0 gives the student's features of the same batch; 'eval' those of running statistics"
    s = student(); s[3].p = 0.; x = 5+2*torch.randn(16,1,8,8, generator=gen())
    want = s.train()(x).detach()
    assert torch.equal(EMATeacher(s)(x), want)
    assert not torch.allclose(EMATeacher(s, bn='eval')(x), want, atol=1e-2)
    assert torch.equal(EMATeacher(s, bn='eval')(x), s.eval()(x).detach())

def test_teacher_errors():
    s = student()
    for m in (-.1, 1.1):
        with pytest.raises(ValueError, match='momentum'): EMATeacher(s, m)
    with pytest.raises(ValueError, match='bn must'): EMATeacher(s, bn='off')
    t = EMATeacher(s); was = deepcopy(t.state_dict())
    for other in (nn.Linear(2,2), nn.Sequential(*s, nn.Linear(8,8)), s[:5]):
        with pytest.raises(ValueError, match='student'): t.update(other)
    wide = student(); wide[5] = nn.Linear(4*36,9)
    with pytest.raises(ValueError, match='5.weight'): t.update(wide)
    assert all(torch.equal(was[n], v) for n,v in t.state_dict().items())

def test_teacher_copies_and_loads():
    "state_dict, deepcopy, pickle, dtype and channels-last work as of any module"
    s = student(); t = EMATeacher(s, .9); move(s, gen()); t.update(s)
    other = EMATeacher(student(1)); other.load_state_dict(t.state_dict())
    x = torch.randn(4,1,8,8, generator=gen())
    for c in (other, deepcopy(t), pickle.loads(pickle.dumps(t)), deepcopy(t).to(memory_format=torch.channels_last)):
        torch.testing.assert_close(c(x), t(x)); c.update(s)
    assert deepcopy(t).momentum==.9 and deepcopy(t).double()(x.double()).dtype==torch.float64

def by_hand(size, dim, rows, batches):
    "The last `size` of all rows, one at a time, and the ring they lie in"
    d,ring,i = deque(rows, maxlen=size), list(rows), 0
    for b in batches:
        for k in b: k = k/k.norm(); d.append(k); ring[i%size] = k; i += 1
    return torch.stack(list(d)), torch.stack(ring), i%size

@pytest.mark.parametrize('size,batches',
    [(8,[4,4,4]), (10,[7,5,3]), (7,[3]*9), (5,[12]), (5,[23,1,5]), (1,[1,3]), (6,[0,2]), (13,[13,26,1])])
@pytest.mark.parametrize('split', [1, 3])
def test_queue_is_a_deque(size, batches, split):
    "Any size and batch, wrap-around and overfull: rows, and their order read from ptr on, are those of a deque"
    g = gen(size); q = FeatureQueue(size, 4, generator=g).double()
    keys = [torch.randn(n, 4, generator=g, dtype=torch.float64) for n in batches]
    last,ring,ptr = by_hand(size, 4, list(q.feats.clone()), keys)
    for k in keys: q.enqueue(*k.tensor_split(split))
    torch.testing.assert_close(q.feats, ring, rtol=0, atol=1e-15)
    torch.testing.assert_close(q.feats[q.rows(size)], last, rtol=0, atol=1e-15)
    assert q.ptr.item()==ptr and q.ptr.dtype==torch.int64 and q.ptr.ndim==0 and q.feats.dtype==torch.float64

def test_peek():
    "peek is enqueue on a copy, and leaves self as it was"
    g = gen(); q = FeatureQueue(10, 4, generator=g); q.enqueue(torch.randn(7,4,generator=g))
    feats,ptr = q.feats.clone(), q.ptr.clone()
    for n in (2, 6, 10, 25):
        k = torch.randn(n, 4, generator=g); copy = deepcopy(q); copy.enqueue(k)
        ahead = q.peek(k[:1], k[1:])
        assert torch.equal(ahead, copy.feats) and ahead.data_ptr()!=q.feats.data_ptr()
        assert torch.equal(q.feats, feats) and torch.equal(q.ptr, ptr)

def test_resume():
    "A queue from a state_dict goes on where the saved one stood, to the bit"
    g = gen(); a,b = FeatureQueue(10, 4), FeatureQueue(10, 4)
    a.enqueue(torch.randn(7,4,generator=g))
    b.load_state_dict(a.state_dict()); assert set(a.state_dict())=={'feats','ptr'}
    k = torch.randn(6,4,generator=g); a.enqueue(k); b.enqueue(k)
    assert torch.equal(a.feats, b.feats) and torch.equal(a.ptr, b.ptr) and a.ptr.item()==3
    with pytest.raises(RuntimeError, match='feats'): FeatureQueue(11, 4).load_state_dict(a.state_dict())

def test_ids_beside_the_rows():
    "What is written at rows(n) before enqueue stays beside its key"
    g = gen(); q,ids = FeatureQueue(10, 4, generator=g), torch.full((10,), -1)
    keys = F.normalize(torch.randn(40,4,generator=g), dim=1)
    for i in torch.arange(40).split(7):
        ids[q.rows(len(i))] = i; q.enqueue(keys[i])
    torch.testing.assert_close(q.feats, keys[ids]); assert sorted(ids.tolist())==list(range(30,40))

@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_key_types(dtype):
    "Half keys are normalised in float32, graphs are cut, the queue keeps its dtype"
    k = (300*torch.randn(5,128,generator=gen())).to(dtype).requires_grad_()   # the sum of squares overflows float16
    q = FeatureQueue(8, 128); q.enqueue(k)
    assert q.feats.dtype==torch.float32 and not q.feats.requires_grad and not q.peek(k).requires_grad
    torch.testing.assert_close(q.feats[:5], F.normalize(k.detach().double(), dim=1).float(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(q.feats.norm(dim=1), torch.ones(8))

def test_first_rows():
    "'normal' is unit, 'uniform' is U(-a,a), both repeat from a generator; nothing else is known"
    n,u = (FeatureQueue(4096, 128, init, gen()).feats for init in ('normal','uniform'))
    a = (3/128)**.5
    torch.testing.assert_close(n.norm(dim=1), torch.ones(4096))
    assert -a<=u.min()<-.999*a and .999*a<u.max()<=a and abs(u.square().sum(1).mean()-1)<.01
    assert torch.equal(n, FeatureQueue(4096, 128, generator=gen()).feats)
    with pytest.raises(ValueError, match='init'): FeatureQueue(8, 2, 'zeros')
    with pytest.raises(ValueError, match='size'): FeatureQueue(0)
    assert FeatureQueue().feats.shape==(32768,128)

@pytest.mark.parametrize('bad', [torch.ones(3,5), torch.ones(4), torch.ones(3,4,1)])
def test_bad_keys(bad):
    "A key of another width is refused before anything is written"
    q = FeatureQueue(8, 4); was = q.feats.clone()
    for f in (q.enqueue, q.peek):
        with pytest.raises(ValueError, match='keys must be n×4'): f(torch.ones(2,4), bad)
    assert torch.equal(q.feats, was) and q.ptr.item()==0

@pytest.mark.parametrize('ids', [False, True])
def test_keys_are_stored_or_refused_as_a_tensor_says(ids):
    "`fine` False leaves rows, ids and pointer, True is the same as without, to the bit"
    g = gen()
    plain, told = (FeatureQueue(10, 4, generator=gen(), ids=ids) for _ in range(2))
    for n in (7, 6, 11):
        k, marks = torch.randn(n, 4, generator=g), [torch.randint(9, (n, 2), generator=g)] if ids else None
        before = deepcopy(told.state_dict())
        told.enqueue(k*float('nan'), ids=marks, fine=torch.tensor(False))
        assert all(torch.equal(v, before[name]) for name, v in told.state_dict().items())
        plain.enqueue(k, ids=marks)
        told.enqueue(k, ids=marks, fine=torch.tensor(True))
        assert all(torch.equal(v, plain.state_dict()[name]) for name, v in told.state_dict().items())
