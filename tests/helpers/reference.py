"""One training step of Comparing to Learn, written from the paper alone, to test the package against.

Nothing here imports the package. The step follows Algorithm 1 line by line, one image and one queue row at a time, in
float64; what the paper leaves open (temperature, SGD momentum, BatchNorm modes) follows the released code and says so.
Nothing that is passed in is modified: networks, queue and velocity come back as copies.
"""
import copy, math
import torch
from torch.nn.modules.batchnorm import _BatchNorm


# ---- The parts of the step ------------------------------------------------------------------------------------------

def mixup(x, lam, perm):
    "Equation 1: `lam*x + (1-lam)*shuffle(x)`, one factor for the batch; serves images and features alike."
    return lam*x + (1-lam)*x[perm]


def normalise(v):
    "Section 4: L2 normalisation of each feature vector (row)."
    return v / v.norm(dim=1, keepdim=True)


def cross_entropy(query, positive, queue, temperature, denominator_has_positive=True):
    "Lines 12-13 for one image: cross entropy of the N+1 inner products of equation 3 or 4, the right answer is item 0."
    logits = torch.stack([query @ positive] + [query @ row for row in queue]) / temperature
    return logits[0 if denominator_has_positive else 1:].logsumexp(0) - logits[0]


def batch_mean(queries, positives, queue, temperature, **kwargs):
    "Lines 10-14 for one of the three terms: the sum over the images j, divided by their number Z."
    terms = [cross_entropy(queries[j], positives[j], queue, temperature, **kwargs) for j in range(len(queries))]
    return sum(terms) / len(terms)


def insert(queue, ptr, rows, wrap=True):
    "Line 18: write `rows` from place `ptr` on, one after another, round the ring; returns the new queue and place."
    queue, n = queue.clone(), len(queue)
    for i, row in enumerate(rows.detach()):
        if wrap or ptr + i < n: queue[(ptr + i) % n] = row
    return queue, (ptr + len(rows)) % n


def momentum_update(teacher, student, momentum):
    "Line 17, equation 2, in place: parameters only, BatchNorm's running statistics stay the teacher's own."
    with torch.no_grad():
        for t, s in zip(teacher.parameters(), student.parameters()): t.copy_(momentum*t + (1-momentum)*s)


def average_buffers(teacher, student, momentum):
    "A fault: equation 2 applied to the running statistics too."
    for t, s in zip(teacher.buffers(), student.buffers()):
        if t.is_floating_point(): t.copy_(momentum*t + (1-momentum)*s)


def sgd(net, grads, velocity, lr, weight_decay, sgd_momentum, decay_vectors=True):
    "Line 16, in place, as torch's SGD: `g = grad + wd*p; v = mu*v + g` (first step `v = g`); `p -= lr*v`."
    new_velocity = {}
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name not in grads: continue
            g = grads[name] + (weight_decay*p if decay_vectors or p.dim() > 1 else 0)
            new_velocity[name] = sgd_momentum*velocity[name].double() + g if name in velocity else g.clone()
            p -= lr*new_velocity[name]
    return new_velocity


def student_copy(student):
    "A float64 copy in training mode, without gradients."
    student = copy.deepcopy(student).double().train()
    student.zero_grad(set_to_none=True)
    return student


def teacher_copy(teacher, bn_train=True):
    "A float64 copy in evaluation mode, but its BatchNorm uses (and records) the batch's statistics."
    teacher = copy.deepcopy(teacher).double().eval()
    teacher.zero_grad(set_to_none=True)
    for m in teacher.modules():
        if isinstance(m, _BatchNorm): m.train(bn_train)
    return teacher


def gradients(net):
    "The gradients by parameter name, taken off the network."
    grads = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad(set_to_none=True)
    return grads


# ---- Algorithm 1 ----------------------------------------------------------------------------------------------------

def algorithm1_step(student, teacher, queue, ptr, x1, x2, lam, perm, *, temperature, momentum, lr,
                    weight_decay=1e-4, sgd_momentum=0.9, velocity=None):
    "One iteration of Algorithm 1 (lines 2 and 7-18) on two augmented batches of Z images, with a queue of N rows."
    return _step(student, teacher, queue, ptr, x1, x2, lam, perm, temperature=temperature, momentum=momentum, lr=lr,
                 weight_decay=weight_decay, sgd_momentum=sgd_momentum, velocity=velocity)


def _step(student, teacher, queue, ptr, x1, x2, lam, perm, *, temperature, momentum, lr,
          weight_decay=1e-4, sgd_momentum=0.9, velocity=None, fault=None):
    "Algorithm 1. Without a `fault` no branch below is taken: read past every line that begins with `if wrong`."
    def wrong(name): return fault == name

    student, teacher = student_copy(student), teacher_copy(teacher, bn_train=not wrong('teacher BatchNorm in eval'))
    queue, ptr, x1, x2 = queue.detach().double(), int(ptr), x1.double(), x2.double()
    lam, T = torch.as_tensor(lam).double(), temperature
    if wrong('momentum the wrong way round'): momentum = 1-momentum
    if wrong('lam is max(lam, 1-lam)'): lam = torch.maximum(lam, 1-lam)

    # Line 2, equation 1: the same factor and the same shuffle for both batches
    lam2, perm2 = lam, perm
    if wrong('lam not shared by the views'): lam2 = lam/2
    if wrong('perm not shared by the views'): perm2 = perm.roll(1)
    x1_mix, x2_mix = mixup(x1, lam, perm), mixup(x2, lam2, perm2)
    if wrong('second batch not mixed'): x2_mix = x2

    # Line 7: two forwards, so that each batch has its own BatchNorm statistics
    if wrong('one concatenated student forward'): v1, v1_mix = student(torch.cat([x1, x1_mix])).chunk(2)
    else: v1, v1_mix = student(x1), student(x1_mix)

    # Line 8: the teacher's features, without gradient; v_m mixes its raw outputs
    if wrong('EMA before the forward'): momentum_update(teacher, student, momentum)
    learns = wrong('optimiser trains the teacher too') or wrong('student serves as teacher, with gradient')
    key_net = student if wrong('student serves as teacher, with gradient') else teacher
    with torch.set_grad_enabled(learns): v2, v2_mix = key_net(x2), key_net(x2_mix)
    v_m = mixup(v2, lam2, perm2)
    if wrong('v_m from the student'): v_m = mixup(v1, lam, perm).detach()
    if wrong('v_m mixed after normalising'): v_m = mixup(normalise(v2), lam, perm)
    if wrong('v_m with lam and 1-lam swapped'): v_m = mixup(v2, 1-lam, perm)
    if wrong('v_m with the inverse shuffle'): v_m = mixup(v2, lam, perm.argsort())

    # Section 4: L2 normalisation
    q, q_mix = normalise(v1), normalise(v1_mix)
    k, k_mix, k_feat = normalise(v2), normalise(v2_mix), normalise(v_m)
    rows = torch.cat([k, k_mix, k_feat])
    if wrong('v_m inserted before v2_mix'): rows = torch.cat([k, k_feat, k_mix])
    if wrong('rows by image, not by kind'): rows = torch.stack([k, k_mix, k_feat], dim=1).flatten(0, 1)
    if wrong('queue rows not normalised'): rows = torch.cat([v2, v2_mix, v_m])

    # Lines 9-15: three terms, all against the same queue, summed
    if wrong('queue filled before the loss'): queue, ptr = insert(queue, ptr, rows)
    has_pos = not wrong('positive missing from the denominator')
    loss_a = batch_mean(q, k, queue, T, denominator_has_positive=has_pos)
    loss_m = batch_mean(q_mix, k_mix, queue, T, denominator_has_positive=has_pos)
    feat_query = q if wrong('third term with the unmixed query') else q_mix
    feat_T = 1. if wrong('temperature missing in the third term') else T
    loss_m = loss_m + batch_mean(feat_query, k_feat, queue, feat_T, denominator_has_positive=has_pos)
    loss = loss_a + loss_m
    if wrong('mean of the three terms'): loss = loss/3
    if wrong('sum over the images'): loss = loss*len(x1)

    # Line 16
    loss.backward()
    grads = gradients(student)
    if wrong('EMA before the optimiser'): momentum_update(teacher, student, momentum)
    if wrong('velocity forgotten'): velocity = None
    decay_vectors = not wrong('no weight decay on vectors')
    velocity = sgd(student, grads, velocity or {}, lr, weight_decay, sgd_momentum, decay_vectors)
    if wrong('optimiser trains the teacher too'): sgd(teacher, gradients(teacher), {}, lr, weight_decay, sgd_momentum)

    # Line 17, equation 2
    if wrong('EMA before the forward') or wrong('EMA before the optimiser'): pass
    else: momentum_update(teacher, student, momentum)
    if wrong('EMA of the buffers too'): average_buffers(teacher, student, momentum)

    # Line 18
    if wrong('queue filled by the updated teacher'):
        with torch.no_grad(): v2, v2_mix = teacher(x2), teacher(x2_mix)
        rows = torch.cat([normalise(v2), normalise(v2_mix), normalise(mixup(v2, lam, perm))])
    if wrong('queue filled before the loss'): pass
    else: queue, ptr = insert(queue, ptr, rows, wrap=not wrong('wrap-around lost'))

    return dict(loss=loss.detach(), grads=grads, student=student, teacher=teacher, queue=queue, ptr=ptr,
                velocity=velocity, q=q.detach(), q_mix=q_mix.detach(), k=k.detach(), k_mix=k_mix.detach(),
                k_feat=k_feat.detach())


# ---- The released code's step ---------------------------------------------------------------------------------------

def official_step(student, teacher, queue, ptr, x1, x2, lam, perm, *, temperature, momentum, lr,
                  weight_decay=1e-4, sgd_momentum=0.9, velocity=None):
    "The released code's step with `--softmax`: the larger half of lam, a queue that grows between losses, their mean."
    student, teacher = student_copy(student), teacher_copy(teacher)
    queue, ptr, x1, x2 = queue.detach().double(), int(ptr), x1.double(), x2.double()
    lam = torch.as_tensor(lam).double()
    lam = torch.maximum(lam, 1-lam)                                         # train_C2L_res18.py:166

    v1, v1_mix = student(x1), student(mixup(x1, lam, perm))
    with torch.no_grad(): v2, v2_mix = teacher(x2), teacher(mixup(x2, lam, perm))
    q, q_mix = normalise(v1), normalise(v1_mix)
    k, k_mix, k_feat = normalise(v2), normalise(v2_mix), normalise(mixup(v2, lam, perm))

    loss_1 = batch_mean(q, k, queue, temperature)                           # the old queue
    queue, ptr = insert(queue, ptr, k)                                      # NCEAverage.py:196-202
    loss_2 = batch_mean(q_mix, k_mix, queue, temperature)                   # ... and k of this very batch
    queue, ptr = insert(queue, ptr, k_mix)
    loss_3 = batch_mean(q_mix, k_feat, queue, temperature)                  # ... and k_mix, loss 2's positives
    queue, ptr = insert(queue, ptr, k_feat)
    loss = (loss_1 + loss_2 + loss_3)/3                                     # train_C2L_res18.py:501

    loss.backward()
    grads = gradients(student)
    velocity = sgd(student, grads, velocity or {}, lr, weight_decay, sgd_momentum)
    momentum_update(teacher, student, momentum)                             # train_C2L_res18.py:518
    return dict(loss=loss.detach(), grads=grads, student=student, teacher=teacher, queue=queue, ptr=ptr,
                velocity=velocity, q=q.detach(), q_mix=q_mix.detach(), k=k.detach(), k_mix=k_mix.detach(),
                k_feat=k_feat.detach())


# ---- Planted faults -------------------------------------------------------------------------------------------------

def _faulty(fault):
    def step(*args, **kwargs): return _step(*args, fault=fault, **kwargs)
    return step


planted_faults = [(name, _faulty(name)) for name in (
    'lam not shared by the views', 'perm not shared by the views', 'lam is max(lam, 1-lam)', 'second batch not mixed',
    'v_m from the student', 'v_m mixed after normalising', 'v_m with lam and 1-lam swapped',
    'v_m with the inverse shuffle', 'third term with the unmixed query', 'temperature missing in the third term',
    'positive missing from the denominator', 'mean of the three terms', 'sum over the images',
    'queue filled before the loss', 'queue filled by the updated teacher', 'queue rows not normalised',
    'v_m inserted before v2_mix', 'rows by image, not by kind', 'wrap-around lost',
    'optimiser trains the teacher too', 'student serves as teacher, with gradient', 'teacher BatchNorm in eval',
    'one concatenated student forward', 'EMA before the forward', 'EMA before the optimiser',
    'EMA of the buffers too', 'momentum the wrong way round', 'no weight decay on vectors', 'velocity forgotten')]


# ---- Comparison -----------------------------------------------------------------------------------------------------

def compare(reference, other):
    """Relative differences by name: 'loss', 'grads.NAME', 'student.NAME', 'teacher.NAME', 'queue', 'ptr'.

    Both are dicts as `algorithm1_step` returns them; networks may be given as modules or as state dicts, and
    'velocity', 'q', 'q_mix', 'k', 'k_mix', 'k_feat' are compared where both have them. Each number is the largest
    absolute difference over the largest absolute value of the reference tensor, which counts as a thousandth of its
    group's largest (say of all gradients) if it is below: the gradient of a bias before BatchNorm is only rounding.
    What is missing on one side, of another shape, or not finite counts as infinitely different.
    """
    result = {}
    optional = [key for key in ('velocity', 'q', 'q_mix', 'k', 'k_mix', 'k_feat') if key in reference and key in other]
    for key in ['loss', 'grads', 'student', 'teacher', 'queue', 'ptr'] + optional:
        ref, got = _tensors(key, reference[key]), _tensors(key, other[key])
        floor = max([_largest(t) for t in ref.values()], default=0.)/1000
        for name in sorted(ref.keys() | got.keys()):
            result[name] = _relative(ref.get(name), got.get(name), floor)
    return result


def _tensors(key, value):
    if isinstance(value, torch.nn.Module): value = value.state_dict()
    if not isinstance(value, dict): return {key: torch.as_tensor(value).detach().double().cpu()}
    return {f'{key}.{name}': torch.as_tensor(t).detach().double().cpu() for name, t in value.items()}


def _largest(t): return t.abs().max().item() if t.numel() else 0.


def _relative(ref, got, floor):
    if ref is None or got is None or ref.shape != got.shape: return math.inf
    difference = _largest(ref-got)
    if difference == 0: return 0.
    scale = max(_largest(ref), floor)
    return difference/scale if math.isfinite(difference) and scale > 0 else math.inf
