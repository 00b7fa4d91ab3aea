"C2LCallback beside everything that fastai's training loop offers."
import copy, csv, math, pickle, warnings
import numpy as np, pytest, torch
from functools import partial
from torch import nn
from torch.amp import GradScaler
from fastai.basics import (Callback, CrossEntropyLossFlat, DataLoader, DataLoaders, Datasets, L,
                           Learner, ValueMetric, params, trainable_params)
from fastai.callback.all import (ChannelsLast, CSVLogger, CutMix, EarlyStoppingCallback, GradientAccumulation, GradientClip,
                                 MixedPrecision, MixUp, ReduceLROnPlateau, SaveModelCallback, TerminateOnNaNCallback)
from fastai.data.transforms import IntToFloatTensor, Normalize
from fastai.vision.core import TensorImage
from c2l_nb.training.callback import C2LCallback, C2LLoss, StepDecay, c2l_opt, show_pairs
from c2l_nb.method.encoder import pool
from c2l_nb.method.model import C2L, C2LConfig
from c2l_nb.data.phantom import phantom_batch
from c2l_nb.method.teacher import EMATeacher

pytestmark = [pytest.mark.filterwarnings('ignore:the queue of'), pytest.mark.filterwarnings('ignore::FutureWarning')]
IMAGES = phantom_batch(24, size=24)[0]                                      # uint8, 24×1×24×24
SMALL = dict(queue_size=20, dim=16, momentum=.9)


def body(channels=1, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(channels, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
                         nn.Conv2d(4, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())

def data(images=IMAGES, labels=False, bs=8, n=24, **kw):
    "Unshuffled, so that runs can be compared; `labels` adds the image's number"
    items = [(x, i) if labels else (x,) for i, x in enumerate(images[:n])]
    return DataLoaders(DataLoader(items, bs=bs, **kw), DataLoader(items, bs=bs))

def learner(*cbs, dls=None, model=None, config=C2LConfig(), loss_func=None, opt_func=c2l_opt, own=None, **kw):
    "A tiny Learner that prints nothing; `own` are further fields of the config"
    c2l = C2LCallback(config, **{**SMALL, **(own or {})})
    learn = Learner(dls or data(), model or body(), loss_func=loss_func or C2LLoss(), opt_func=opt_func, cbs=[c2l, *cbs], **kw)
    learn.logger = lambda *args: None
    return learn

def fit(learn, n=1, lr=.03, method='fit', **kw):
    with learn.no_bar(): getattr(learn, method)(n, lr, **kw)
    return learn

def state(learn): return copy.deepcopy(learn.model.state_dict())
def same(a, b): return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
def differ(a, b): return {k for k in a if not torch.equal(a[k], b[k])}

def moved(before, learn):
    "Which of student, teacher and queue are not what they were"
    return {k.split('.')[0] for k in differ(before, learn.model.state_dict())} & {'student', 'teacher', 'queue'}

EVERYTHING = {'student', 'teacher', 'queue'}

class At(Callback):
    "Run a function at one event: At(after_step=f), f gets the learner"
    def __init__(self, order=50, run_valid=True, **events):
        self.order, self.run_valid = order, run_valid
        for event, f in events.items(): setattr(self, event, partial(self._run, f))
    def _run(self, f): f(self.learn)

def count(event, to, f=lambda learn: learn.iter, **kw):
    "Note `f(learn)` at each `event` in the list `to`"
    return At(**{event: lambda learn: to.append(f(learn))}, **kw)

def raises(kind, match):
    "fastai wraps errors of callbacks: the kind may be a parent, the words are ours"
    return pytest.raises(kind, match=match)


# ---- Data -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('labels', [False, True], ids=['unlabelled', 'labelled'])
def test_trains_with_and_without_labels(labels):
    "Every weight of student and teacher, queue and pointer move; 3 batches × 3 × 8 keys"
    learn = learner(dls=data(labels=labels))
    before = state(learn)
    fit(learn)
    weights = {n for n, _ in learn.model.named_parameters()}
    assert weights <= differ(before, learn.model.state_dict())
    assert learn.model.queue.ptr == 72 % 20 and learn.model.seen == 3

def test_labels_change_nothing():
    "The same run to the bit: the labels are not looked at"
    assert same(*(state(fit(learner(dls=data(labels=labels)), 2)) for labels in (False, True)))

@pytest.mark.parametrize('bs, n', [(2, 6), (3, 8), (5, 7), (24, 24)])
def test_any_batch_size_down_to_two(bs, n):
    "The last batch may be smaller, a batch's keys may be more than the queue holds (72 in 20)"
    learn = fit(learner(dls=data(bs=bs, n=n)))
    assert learn.model.queue.ptr == 3*n % 20 and learn.model.queue.feats.isfinite().all()
    assert torch.allclose(learn.model.queue.feats.norm(dim=1), torch.ones(20))

def grey(i): return TensorImage(IMAGES[i])
def rgb(i): return TensorImage(IMAGES[i].expand(3, -1, -1))
def sex(i): return i % 2

def normalised_data(stats, *tfms):
    "fastai's own pipeline as behind `ImageBlock`: TensorImage, IntToFloatTensor and Normalize on the batch"
    batch = [IntToFloatTensor(), Normalize.from_stats(*stats, cuda=False)]
    sets = Datasets(range(24), [[t] for t in tfms], splits=[list(range(24))]*2)
    return sets.dataloaders(bs=8, shuffle=False, after_batch=batch, num_workers=0, device='cpu')

@pytest.mark.parametrize('labels', [False, True], ids=['unlabelled', 'labelled'])
def test_fastai_images_with_normalize(labels):
    "The same features as from uint8 before training, and after three steps nearly so: augmentation sees the same pixels"
    c = C2LConfig()
    ours = learner(dls=data(IMAGES.expand(-1, 3, -1, -1)), model=body(3))
    theirs = learner(dls=normalised_data((c.mean, c.std), rgb, *[sex]*labels), model=body(3))
    assert theirs.model.prepare.normalised and not ours.model.prepare.normalised
    seen = []
    look = lambda learn: [v.clone() for v in (*learn.xb[:2], *learn.pred)]
    for learn in (ours, theirs): learn.add_cb(count('after_pred', seen, look, run_valid=False))
    for learn in (ours, theirs):
        with learn.no_bar(): learn.first = learn.get_preds()[0]
        fit(learn)
        with learn.no_bar(): learn.last = learn.get_preds()[0]
    assert torch.allclose(ours.first, theirs.first, atol=1e-5)
    assert torch.allclose(ours.last, theirs.last, atol=1e-4)
    mean, std = (torch.tensor(v)[None, :, None, None] for v in (c.mean, c.std))
    for a, b in zip(seen[0][:2], seen[3][:2]): assert torch.allclose((a - mean)/std, b, atol=1e-5)
    for a, b in zip(seen[0][2:], seen[3][2:]): assert torch.allclose(a, b, atol=1e-5)
    assert type(seen[3][0]) is torch.Tensor

def test_bare_tensors_are_refused():
    "fastai would cut such a batch to B-1 images and one target"
    bare = DataLoaders(DataLoader(IMAGES, bs=8), DataLoader(IMAGES, bs=8))
    with raises(TypeError, r'must return \(image,\) or \(image, label\)'): fit(learner(dls=bare))

@pytest.mark.parametrize('other', [IMAGES, IMAGES.float()], ids=['uint8', 'float'])
@pytest.mark.parametrize('label', [False, True], ids=['as target', 'before a label'])
def test_a_second_view_is_refused(other, label):
    "fastai would take the second view of (view, view) as target; of (view, view, label) it would be passed over"
    items = [(x, y, 0) if label else (x, y) for x, y in zip(IMAGES, other)]
    learn = learner(dls=DataLoaders(DataLoader(items, bs=8), DataLoader(items, bs=8)))
    before = state(learn)
    with raises(TypeError, r'must return \(image,\) or \(image, label\)'): fit(learn)
    assert same(before, state(learn))

def test_validation_neither_augments_nor_enqueues():
    "get_preds gives the backbone's features of the raw images, with whatever callbacks; nothing of the state moves"
    learn = fit(learner(TerminateOnNaNCallback(), dls=data(labels=True)))
    before = state(learn)
    with learn.no_bar():
        feats, labels = learn.get_preds()
        learn.validate()
    assert same(before, state(learn))
    with torch.no_grad(): want = pool(learn.model.student.backbone.eval()(learn.model.prepare(IMAGES)))
    assert feats.shape == (24, 8) and torch.allclose(feats, want, atol=1e-6)
    assert labels.tolist() == list(range(24))

@pytest.mark.parametrize('labels', [False, True], ids=['unlabelled', 'labelled'])
def test_validation_within_fit_leaves_the_state_alone(labels):
    "And there is no validation loss: None in the table, not a flattering 0"
    states = []
    learn = learner(count('before_validate', states, state), count('after_validate', states, state), dls=data(labels=labels))
    fit(learn, 2)
    assert [v[1] for v in learn.recorder.values] == [None, None] and all(v[0] > 0 for v in learn.recorder.values)
    assert len(states) == 4 and same(states[0], states[1]) and same(states[2], states[3])


# ---- The state ------------------------------------------------------------------------------------------------------

def test_optimiser_has_the_student_and_no_gradient_reaches_the_rest():
    grads = []
    look = lambda learn: {n for n, p in learn.model.named_parameters() if p.grad is not None}
    learn = fit(learner(count('after_backward', grads, look, run_valid=False)))
    ids = lambda ps: sorted(map(id, ps))
    assert ids(p for group in learn.opt.param_lists for p in group) == ids(learn.model.student.parameters())
    assert all(g == {f'student.{n}' for n, _ in learn.model.student.named_parameters()} for g in grads) and len(grads) == 3
    assert not any(t.requires_grad for t in (*learn.model.teacher.parameters(), *learn.model.buffers()))

def test_same_seed_twice_is_the_same_run():
    "To the bit; another seed is another run, and torch's global generator has no say in views and mixing"
    def run(seed, noise=0):
        learn = learner(own=dict(seed=seed))
        torch.manual_seed(noise)
        return state(fit(learn, 2))
    assert same(run(0), run(0)) and same(run(0), run(0, noise=7))
    a, b = run(0), run(1)
    assert not torch.equal(a['student.backbone.0.weight'], b['student.backbone.0.weight'])

def test_a_second_fit_continues():
    "Two fits of one epoch are one of two, where nothing is scheduled"
    twice, once = fit(fit(learner())), fit(learner(), 2)
    assert same(state(twice), state(once)) and twice.model.seen == 6

def test_lr_find_leaves_no_trace(tmp_path):
    "Student, teacher, queue, pointer and the draws to come are as before to the bit; fitted before or not"
    for epochs in (0, 1):
        learn = learner(StepDecay(), path=tmp_path)
        if epochs: fit(learn)
        before, draws = state(learn), learn.model.views(IMAGES, learn.model.augmentation(24))
        tried = []
        with learn.added_cbs(count('after_batch', tried, lambda learn: learn.opt.hypers[-1]['lr'])), learn.no_bar():
            learn.lr_find(num_it=7, stop_div=False, show_plot=False)
        assert len(tried) == 7 and tried[0] == pytest.approx(1e-7) and tried[-1] > 1e-7
        assert same(before, state(learn)) and learn.model.seen == 3*epochs
        assert all(torch.equal(a, b) for a, b in zip(draws, learn.model.views(IMAGES, learn.model.augmentation(24))))
        after = state(fit(learn))
    straight = learner(StepDecay())
    assert same(after, state(fit(fit(straight))))

def test_save_and_load_restore_all(tmp_path):
    "A learner that was never trained, of another seed, goes on from the file as the first one does"
    first = fit(learner(path=tmp_path), 2)
    first.save('half')
    saved = state(first)
    fit(first)
    other = learner(path=tmp_path, own=dict(seed=5), model=body(seed=3))
    other.load('half')
    assert same(saved, state(other)) and other.model.seen == 6
    assert same(state(first), state(fit(other)))
    first.load('half')
    assert same(saved, state(first))

def test_copies_of_model_and_learner():
    "deepcopy and pickle, of the model and of the learner after a fit, train on alike"
    learn = fit(learner())
    learn.loss_grad = None                                                  # fastai's own obstacle to a deepcopy
    twins = copy.deepcopy(learn), pickle.loads(pickle.dumps(learn.model))
    assert same(state(learn), twins[1].state_dict()) and twins[1].seen == 3
    assert twins[0].loss_func.model is twins[0].model is not learn.model
    assert same(state(fit(learn, reset_opt=True)), state(fit(twins[0], reset_opt=True)))
    assert pickle.loads(pickle.dumps(learn.model.state_dict())).keys() == learn.model.state_dict().keys()

def test_export(tmp_path):
    from fastai.learner import load_learner
    learn = fit(learner(path=tmp_path, dls=normalised_data(([.449], [.226]), grey, sex)))
    with learn.no_bar(): want = learn.get_preds(dl=learn.dls.valid)[0]
    valid = learn.dls.valid
    learn.export('c2l.pkl')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        loaded = load_learner(tmp_path/'c2l.pkl')
    with loaded.no_bar(): assert torch.equal(want, loaded.get_preds(dl=valid)[0])

def test_interrupted_run_can_be_run_again():
    "Ctrl-C inside a batch fires no further event; the same cell run again trains"
    for event in ('before_batch', 'after_pred', 'after_backward', 'after_step'):
        armed = [True]
        def stop(learn):
            if armed and learn.iter == 1: armed.pop(); raise KeyboardInterrupt
        learn = learner(At(run_valid=False, **{event: stop}))
        with pytest.raises(KeyboardInterrupt): fit(learn)
        seen, before = learn.model.seen, state(learn)
        assert seen == 1
        fit(learn)
        assert learn.model.seen == 4 and moved(before, learn) == EVERYTHING and learn.model.queue.feats.isfinite().all()

def test_remove_cb_gives_everything_back():
    "The trained body, loss and splitter as they were given, ready to train for something else"
    given, loss = body(), CrossEntropyLossFlat()
    items = [(x.float()/255, i % 2) for i, x in enumerate(IMAGES)]
    splitter = lambda m: L(params(m[:3]), params(m[3:]))
    learn = Learner(DataLoaders(*[DataLoader(items, bs=8) for _ in range(2)]), given, loss_func=loss, splitter=splitter,
                    cbs=C2LCallback(**SMALL))
    learn.logger = lambda *args: None
    assert isinstance(learn.model, C2L) and learn.model.student.backbone is given and learn.loss_func is not loss
    fit(learn)
    pretrained = copy.deepcopy(given.state_dict())
    learn.remove_cb(C2LCallback)
    assert learn.model is given and learn.loss_func is loss and learn.splitter is splitter
    assert learn.opt is None and not hasattr(learn, 'c2l') and not [cb for cb in learn.cbs if isinstance(cb, C2LCallback)]
    assert same(pretrained, given.state_dict())
    learn.model = nn.Sequential(*given, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    fit(learn)
    assert len(learn.opt.param_lists) == 2 and not same(pretrained, given.state_dict())


# ---- Refusals and warnings ------------------------------------------------------------------------------------------

@pytest.mark.parametrize('mix', [MixUp, CutMix])
def test_fastais_own_mixing_is_refused(mix):
    with raises(ValueError, 'C2L has its own mixup'): fit(learner(mix()))

@pytest.mark.parametrize('tracker', [SaveModelCallback, EarlyStoppingCallback, ReduceLROnPlateau])
def test_valid_loss_is_refused(tracker):
    with raises(ValueError, "valid_loss.*monitor='knn'"): fit(learner(tracker()))

def test_late_callback_is_refused():
    "With add_cb or fit(cbs=) the optimiser would miss the head"
    for late in (lambda learn: learn.add_cb(C2LCallback(**SMALL)).fit(1), lambda learn: learn.fit(1, cbs=C2LCallback(**SMALL))):
        learn = Learner(data(), body(), loss_func=C2LLoss())
        with learn.no_bar(), raises(RuntimeError, 'from the start'): late(learn)
    learn = Learner(data(IMAGES.float(), labels=True), body(), loss_func=C2LLoss())
    with learn.no_bar(), raises(RuntimeError, 'C2LCallback'): learn.fit(1)

def test_classifier_is_refused():
    classifier = nn.Sequential(body(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 2))
    with raises(ValueError, 'pass a body'): learner(model=classifier)

def test_unknown_choice_is_refused():
    with raises(ValueError, 'no field'): C2LCallback(queue_length=3)

def test_large_queue_warns_once():
    "24 images make 72 keys an epoch, 30 % are 21.6"
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter('always')
        fit(learner(own=dict(queue_size=21)), 2)
        assert not [w for w in seen if 'the queue of' in str(w.message)]
        fit(learner(own=dict(queue_size=22)), 2)
    assert len([w for w in seen if 'the queue of 22 keys' in str(w.message)]) == 1


# ---- Schedules and optimiser ----------------------------------------------------------------------------------------

def test_fit_one_cycle():
    learn = learner()
    before = state(learn)
    fit(learn, 2, method='fit_one_cycle')
    assert moved(before, learn) == EVERYTHING and max(learn.recorder.lrs) == pytest.approx(.03, rel=.1)

def test_step_decay_over_240_epochs():
    "÷10 at epochs 120, 160 and 200, at the first batch of each; a second fit starts from the top"
    items = [(torch.ones(1), torch.ones(1))]*3
    learn = Learner(DataLoaders(DataLoader(items, bs=1), DataLoader(items[:1], bs=1)), nn.Linear(1, 1), loss_func=nn.MSELoss(),
                    opt_func=c2l_opt, cbs=StepDecay())
    learn.logger, rates = (lambda *args: None), []
    learn.add_cb(count('before_step', rates, lambda learn: learn.opt.hypers[-1]['lr'], order=70))
    fit(learn, 240)
    want = [.03*.1**sum(e >= m for m in (120, 160, 200)) for e in range(240) for _ in range(3)]
    assert rates == pytest.approx(want, rel=1e-9)
    fit(learn, 1)
    assert rates[720:] == pytest.approx([.03, .03, .0003], rel=1e-9)        # at 0, 1/3 and 2/3 of the run

def test_step_decay_of_groups_and_warmup():
    "Each group keeps its own rate; the warm-up rises from 0"
    rates = []
    learn = learner(StepDecay(milestones=(.5,), warmup=.25), dls=data(bs=6), splitter=lambda m: L(params(m[:3]), params(m[3:])))
    learn.add_cb(count('before_step', rates, lambda learn: [h['lr'] for h in learn.opt.hypers], order=70))
    fit(learn, 2, slice(.01, .1))
    for group, lr in zip(zip(*rates), (.01, .1)):
        assert group == pytest.approx([0, lr/2, lr, lr, lr/10, lr/10, lr/10, lr/10], rel=1e-6)

def test_c2l_opt_is_torchs_sgd(tmp_path):
    "20 steps, state saved and loaded into a new optimiser at 10, two groups with rates of their own: difference 0"
    nets = [body(), body()]
    groups = lambda net: L(params(net[:3]), params(net[3:]))
    torchs = torch.optim.SGD([dict(params=params(nets[0][:3]), lr=.01), dict(params=params(nets[0][3:]), lr=.03)],
                             momentum=.9, weight_decay=1e-4)
    ours = c2l_opt(groups(nets[1]), lr=.03)
    ours.set_hypers(lr=[.01, .03])
    for step in range(20):
        if step == 10:
            torch.save(ours.state_dict(), tmp_path/'opt.pth')
            ours = c2l_opt(groups(nets[1]))
            ours.load_state_dict(torch.load(tmp_path/'opt.pth'))
        for net, opt in zip(nets, (torchs, ours)):
            loss = net(IMAGES[step:step + 4].float()/255).square().mean() + sum(p.sum() for p in net.parameters())
            opt.zero_grad(); loss.backward(); opt.step()
    assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters()))

def test_c2l_opt_inside_learner_saved_at_half(tmp_path):
    "The same through Learner: 20 steps straight, and 10 + save + load into a new Learner + 10, are one to the bit"
    dls = lambda: data(bs=4, n=20)
    straight = fit(learner(dls=dls()), 4)
    fit(learner(dls=dls(), path=tmp_path), 2).save('half')
    later = learner(dls=dls(), path=tmp_path, model=body(seed=9))
    with warnings.catch_warnings():
        warnings.filterwarnings('error', message='.*optimizer state')
        later.load('half')
    assert same(state(straight), state(fit(later, 2)))
    velocity = [[s['momentum_buffer'] for s in learn.opt.state_dict()['state'].values()] for learn in (straight, later)]
    assert len(velocity[0]) == 8 and all(torch.equal(a, b) for a, b in zip(*velocity))

def test_user_splitter_freeze_and_discriminative_rates():
    "The splitter sees the given body, the head joins the last group; what is frozen stays"
    seen, given = [], body()
    def splitter(m): seen.append(m); return L(params(m[0]), params(m[1:3]), params(m[3:]))
    learn = learner(model=given, splitter=splitter)
    fit(learn, lr=slice(1e-4, 1e-2))
    assert all(m is given for m in seen)
    groups, head = learn.opt.param_lists, list(learn.model.student.head.parameters())
    assert [len(g) for g in groups] == [1, 2, 3 + len(head)] and all(a is b for a, b in zip(groups[-1][-2:], head))
    assert [h['lr'] for h in learn.opt.hypers] == pytest.approx([1e-4, 1e-3, 1e-2])
    learn.freeze()
    before = state(learn)
    fit(learn)
    changed = differ(before, learn.model.state_dict())
    assert 'student.backbone.0.weight' not in changed                       # BatchNorm goes on, as fastai's train_bn says
    assert {'student.backbone.3.weight', 'student.head.layers.weight', 'student.backbone.1.weight'} <= changed
    learn.unfreeze()
    assert not any(p.requires_grad for p in learn.model.teacher.parameters())
    before = state(learn)
    fit(learn, lr=slice(1e-3))
    assert 'student.backbone.0.weight' in differ(before, learn.model.state_dict()) and moved(before, learn) == EVERYTHING

def test_frozen_body_trains_the_head_alone():
    given = body().requires_grad_(False)
    learn = learner(model=given, splitter=trainable_params)
    before = state(learn)
    fit(learn)
    assert {n for n in differ(before, learn.model.state_dict()) if n.startswith('student') and n.endswith(('weight', 'bias'))} == \
           {'student.head.layers.weight', 'student.head.layers.bias'}


# ---- fastai's other callbacks ---------------------------------------------------------------------------------------

def test_save_and_stop_on_a_metric(tmp_path):
    "A metric that is best in epoch 1: EarlyStopping ends after epoch 3, SaveModel brings back all of epoch 1"
    values, ends = iter([.5, .9, .1, .1, .1]), []
    learn = learner(SaveModelCallback(monitor='knn'), EarlyStoppingCallback(monitor='knn', patience=2), CSVLogger(),
                    count('after_epoch', ends, state, order=1), path=tmp_path,
                    metrics=ValueMetric(lambda: next(values), 'knn'))
    fit(learn, 5)
    assert len(ends) == 4 and same(ends[1], state(learn)) and not same(ends[3], state(learn)) and learn.model.seen == 6
    rows = list(csv.DictReader(open(tmp_path/'history.csv')))
    assert [r['epoch'] for r in rows] == ['0', '1', '2', '3'] and [float(r['knn']) for r in rows] == [.5, .9, .1, .1]
    assert all(float(r['train_loss']) > 0 for r in rows)

def test_save_every_epoch_needs_no_metric(tmp_path):
    fit(learner(SaveModelCallback(every_epoch=True), path=tmp_path), 2)
    assert {f.name for f in (tmp_path/'models').glob('*.pth')} == {'model_0.pth', 'model_1.pth'}

def test_gradient_accumulation():
    "24 images, 4 a batch, a step every 8: the teacher moves with the 3 steps, the keys of all 6 batches enter"
    teacher, queue, steps = [], [], []
    learn = learner(GradientAccumulation(8), dls=data(bs=4), own=dict(queue_size=100))
    head = lambda learn: copy.deepcopy(learn.model.teacher.module.head.state_dict())
    learn.add_cbs([count('after_batch', teacher, head, run_valid=False),
                   count('after_batch', queue, lambda learn: learn.model.queue.ptr.item(), run_valid=False),
                   count('after_step', steps, run_valid=False)])
    start = head(learn)
    fit(learn)
    changed = [not same(a, b) for a, b in zip([start] + teacher, teacher)]
    assert changed == [False, True]*3 and steps == [1, 3, 5]
    assert queue == [12, 24, 36, 48, 60, 72] and learn.model.seen == 6

def test_gradient_clip():
    norms = []
    norm = lambda learn: math.sqrt(sum(p.grad.square().sum().item() for p in learn.model.student.parameters()))
    learn = learner(GradientClip(.01), count('before_step', norms, norm, order=20))
    before = state(learn)
    fit(learn)
    assert norms == pytest.approx([.01]*3, rel=1e-3) and moved(before, learn) == EVERYTHING

def test_channels_last():
    formats = []
    shape = lambda learn: [m.weight.is_contiguous(memory_format=torch.channels_last) for net in (learn.model.student, learn.model.teacher)
                           for m in net.modules() if isinstance(m, nn.Conv2d)]
    learn, plain = learner(ChannelsLast(), count('after_pred', formats, shape)), learner()
    fit(learn), fit(plain)
    assert all(map(all, formats)) and len(formats[0]) == 4
    for k, v in plain.model.state_dict().items(): assert torch.allclose(v.float(), learn.model.state_dict()[k].float(), atol=1e-3), k

def test_terminate_on_nan():
    "A NaN loss ends the run and nothing of it enters the queue; without NaN it is silent, in get_preds and validate too"
    learn = learner(TerminateOnNaNCallback())
    fit(learn)
    with learn.no_bar():
        assert learn.get_preds()[0].shape == (24, 8)
        learn.validate()
    assert learn.model.seen == 3
    poison = lambda learn: learn.iter == 1 and learn.model.student.head.layers.weight.data.fill_(math.nan)
    learn.add_cb(At(before_batch=poison, run_valid=False))
    fit(learn, 3)
    assert learn.model.seen <= 5 and learn.model.queue.feats.isfinite().all()

def test_keys_that_are_not_finite_stay_out():
    learn = learner()
    learn.model.teacher.module.head.layers.weight.data.fill_(math.inf)
    queue = learn.model.queue.feats.clone()
    fit(learn)
    assert torch.equal(queue, learn.model.queue.feats) and learn.model.queue.ptr == 0 and learn.model.seen == 3

def test_summary(capsys):
    "The student's backbone in a table; state and random draws as before"
    learn = fit(learner())
    before = state(learn)
    with learn.no_bar(): text = str(learn.summary())
    assert 'Conv2d' in text and 'BatchNorm2d' in text and same(before, state(learn))

def test_show_pairs():
    "A picture; looking changes nothing, BatchNorm's statistics included"
    import matplotlib
    matplotlib.use('Agg')
    from matplotlib import pyplot as plt
    for own in ({}, dict(share_mix=False, lam_per='sample'), dict(loss_weights=(1, 0, 0), enqueue=('A',))):
        learn = learner(own=own)
        before = state(learn)
        show_pairs(learn, n=3)
        rows = 2 if own.get('enqueue') else 4
        assert len(plt.gcf().axes) == rows*4 and same(before, state(learn)) and learn.model.training
        plt.close('all')
    c = C2LConfig()
    learn = learner(dls=normalised_data((c.mean, c.std), rgb), model=body(3))
    plain = learner(dls=data(IMAGES.expand(-1, 3, -1, -1)), model=body(3))
    cosines = []
    for l in (learn, plain):
        show_pairs(l)
        cosines.append(np.asarray(plt.gcf().axes[4].images[0].get_array()))
        plt.close('all')
    assert np.allclose(*cosines, atol=1e-4)


# ---- Half precision -------------------------------------------------------------------------------------------------

class CPUMixed(MixedPrecision):
    "fastai's, whose autocast and scaler are made for CUDA and do nothing on a CPU, made to work there"
    def __init__(self, dtype): super().__init__(); self.dtype = dtype
    def before_fit(self):
        scaler = GradScaler('cpu', enabled=self.dtype == torch.float16, init_scale=1024.)
        self.autocast, self.learn.scaler, self.scales = torch.autocast('cpu', self.dtype), scaler, L()

HALF = pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16], ids=['bf16', 'fp16'])

def half(dtype, *cbs, **kw):
    "A learner in half precision, and the types that the first convolutions of student and teacher put out"
    learn, types = learner(CPUMixed(dtype), *cbs, **kw), []
    for net in (learn.model.student, learn.model.teacher.module):
        net.backbone[0].register_forward_hook(lambda m, i, o: types.append(o.dtype) if learn.training else None)
    return learn, types

@HALF
@pytest.mark.parametrize('config', [C2LConfig(), C2LConfig.moco(), C2LConfig.official()], ids=['paper', 'moco', 'official'])
def test_half_precision(dtype, config):
    "Convolutions in half precision, for the teacher too; features, loss, queue and weights in float32; all moves"
    seen = []
    def look(learn):
        assert not any(t.requires_grad for t in learn.c2l.five)
        return [t.dtype for t in (*learn.pred, *learn.c2l.five, learn.loss)]
    learn, types = half(dtype, count('after_backward', seen, look, run_valid=False), config=config)
    before = state(learn)
    fit(learn, 2)
    assert set(types) == {dtype} and len(types) == 6*(4 if config.mixes else 2)
    assert len(seen) == 6 and {t for step in seen for t in step} == {torch.float32}
    assert moved(before, learn) == EVERYTHING
    assert all(v.dtype == before[k].dtype and v.float().isfinite().all() for k, v in learn.model.state_dict().items())

@HALF
def test_logits_are_float32(dtype):
    "Inside autocast the loss is what it is outside on the same features; a bfloat16 product would be off by a percent"
    losses = []
    def again(learn):
        five = [t.detach() for t in learn.pred]
        assert torch.is_autocast_enabled('cpu')
        inside = learn.model.loss(*five).item()
        with torch.autocast('cpu', enabled=False): losses.append((inside, learn.model.loss(*five).item()))
    learn, _ = half(dtype, At(after_pred=again, run_valid=False))
    fit(learn)
    assert len(losses) == 3 and all(a == b for a, b in losses)
    assert learn.recorder.losses[0].item() == pytest.approx(losses[0][0], rel=1e-5)     # and it is what was trained on

@pytest.mark.parametrize('accumulate', [False, True])
def test_skipped_step_moves_nothing(accumulate):
    "Infinite gradients in batch 1: the scaler skips the step, and teacher and queue stay; batch 2 goes on"
    states = []
    def poison(learn):
        if learn.iter == 1: learn.model.student.head.layers.weight.grad.fill_(math.inf)
    learn, types = half(torch.float16, At(after_backward=poison, run_valid=False), count('after_batch', states, state, run_valid=False),
                        *([GradientAccumulation(8)] if accumulate else []))
    fit(learn)
    changed = [{k.split('.')[0] for k in differ(a, b) if 'running' not in k and 'tracked' not in k} - {'_extra_state'}
               for a, b in zip(states, states[1:])]
    assert changed == [set(), EVERYTHING] and set(types) == {torch.float16}
    assert len(learn.recorder.losses) == 3 and learn.model.seen == 3

def test_half_precision_with_the_rest():
    "bf16, channels last, accumulation and clipping at once"
    learn, types = half(torch.bfloat16, ChannelsLast(), GradientAccumulation(8), GradientClip(1.), dls=data(bs=4))
    before = state(learn)
    fit(learn)
    assert set(types) == {torch.bfloat16} and moved(before, learn) == EVERYTHING and learn.model.queue.ptr == 72 % 20


# ---- Configs and shuffled BatchNorm ---------------------------------------------------------------------------------

@pytest.mark.parametrize('config, keys', [
    (C2LConfig.paper(share_mix=False), 3), (C2LConfig.paper(lam_per='sample', feat_mix='unit', head='mlp'), 3),
    (C2LConfig.moco(), 1), (C2LConfig.official(), 3), (C2LConfig.small(24, 100), 3),
    (C2LConfig.paper(teacher_bn='eval', ema_buffers=True, size=16, jigsaw=2, dropout=.1), 3)],
    ids=['mixup not shared', 'sample', 'moco', 'official', 'small', 'other'])
def test_every_config_trains(config, keys):
    learn = learner(config=config)
    before = state(learn)
    fit(learn)
    assert moved(before, learn) == EVERYTHING and learn.model.queue.ptr == keys*24 % 20
    names = {n for n, _ in learn.model.student.named_parameters()}
    assert {f'student.{n}' for n in names} <= differ(before, learn.model.state_dict())

def test_moco_makes_two_passes():
    calls = []
    learn = learner(config=C2LConfig.moco())
    for net in (learn.model.student, learn.model.teacher): net.register_forward_hook(lambda *a: calls.append(1))
    fit(learn)
    assert len(calls) == 6

def test_shuffling_before_batchnorm_is_an_identity():
    "On one device the batch's statistics do not depend on the order: released code, shuffle and back"
    teacher = EMATeacher(C2L(body(), C2LConfig(**SMALL)).double().student)
    x, p = IMAGES.double()/255, torch.randperm(24, generator=torch.Generator().manual_seed(0))
    assert teacher.module.backbone[1].training
    plain, shuffled = teacher(x), teacher(x[p])[p.argsort()]
    assert (plain - shuffled).abs().max() <= 1e-12*plain.abs().max()


# ---- Devices, compilers and sizes -----------------------------------------------------------------------------------------

@pytest.mark.parametrize('own', [{}, dict(false_negatives='image', head='mlp'), dict(queue_update='sequential', queue_init='uniform')])
def test_everything_lives_where_the_body_lives(own):
    "Also what the model makes: a body that was moved before it was given (meta stands for a GPU)"
    model = C2L(body().to('meta'), C2LConfig(**SMALL, **own))
    there = {n: v.device.type for n, v in [*model.named_parameters(), *model.named_buffers()]}
    assert set(there.values()) == {'meta'} and 'queue.feats' in there and 'queue.ptr' in there
    double = C2L(body().double(), C2LConfig(**SMALL, **own))
    assert double.student.head(torch.zeros(1, 8).double()).dtype == torch.float64 and double.queue.feats.dtype == torch.float32

@pytest.mark.parametrize('own', [{}, dict(share_mix=False, lam_per='sample'), dict(loss_weights=(1, 0, 0), mix_views=True)])
def test_mixing_numbers_are_where_the_images_are(own):
    model = C2L(body(), C2LConfig(**SMALL, **own))
    views = model.views(IMAGES.to('meta'), lambda x, g: x.float())
    assert {v.device.type for v in views} == {'meta'} and len(views) == (6 if own.get('share_mix') is False else 4)

def test_compiled_body_trains():
    "As the plain one does, and its weights are saved by plain names"
    learns = [fit(learner(model=make(body())), 2) for make in (nn.Sequential.train, partial(torch.compile, backend='eager'))]
    a, b = ({k.replace('_orig_mod.', ''): v.float() for k, v in state(learn).items()} for learn in learns)
    assert a.keys() == b.keys() and all(torch.allclose(a[k], b[k], atol=1e-5) for k in a)

def test_compiled_model():
    "Wrapped by torch.compile it is refused with the reason, when the learner is made and when it is fitted; compiled in place it trains"
    whole, plain = learner(), learner()
    whole.model = torch.compile(whole.model, backend='eager')
    with raises(ValueError, 'hides student, teacher and queue.*learn.model.compile'): fit(whole)
    with raises(ValueError, 'hides student'):
        Learner(data(), torch.compile(C2L(body(), C2LConfig(**SMALL)), backend='eager'), loss_func=C2LLoss(), cbs=C2LCallback(**SMALL))
    inside = learner()
    inside.model.compile(backend='eager')
    for learn in (inside, plain): fit(learn, 2)
    assert all(torch.allclose(v.float(), state(plain)[k].float(), atol=1e-5) for k, v in state(inside).items())
    with inside.no_bar(): assert inside.get_preds(ds_idx=1)[0].shape == (24, 8)

@pytest.mark.parametrize('normalised', [False, True])
def test_augmentation_runs_outside_autocast(normalised):
    "fastai's MixedPrecision enters autocast before the batch; an augmentation would be warped in half precision"
    seen = []
    def augment(x, g):
        grid = x.float().flatten(1)
        seen.append((torch.is_autocast_enabled('cpu'), (grid@grid.T).dtype))
        return x.float()
    c2l = C2LCallback(C2LConfig(**SMALL), augment)
    dls = normalised_data(([.5], [.2]), grey) if normalised else data()
    learn = Learner(dls, body(), loss_func=C2LLoss(), opt_func=c2l_opt, cbs=[c2l, CPUMixed(torch.bfloat16)])
    learn.logger = lambda *a: None
    fit(learn)
    assert len(seen) == 6 and set(seen) == {(False, torch.float32)}

def test_views_follow_the_size_of_the_data():
    "Progressive resizing: other images from one fit to the next; a size of the config's stays"
    for own, want in (({}, {24, 16, 20}), (dict(size=12), {12})):
        learn, sides = learner(own=own), []
        learn.add_cb(At(before_batch=lambda learn: sides.append(learn.xb[0].shape[-1]) if learn.training else None))
        for side in (24, 16, 20):
            learn.dls = data(IMAGES[..., :side, :side])
            fit(learn)
        assert set(sides) == want and len(sides) == 9

def test_refused_keys_are_counted_and_said():
    "Per epoch, and in the model for the whole run; no entry in the state"
    learn = learner(At(after_pred=poison_keys, run_valid=False))
    with pytest.warns(UserWarning, match='keys of 1 of 3 batches were not finite'): fit(learn, 2)
    assert int(learn.model.refused) == 2 and learn.model.queue.ptr == 4*24 % 20 and not any('refused' in k for k in state(learn))
    with warnings.catch_warnings():
        warnings.filterwarnings('error', 'keys of')
        fit(learner())

def poison_keys(learn):
    if learn.iter == 1: learn.c2l.five[3] = learn.c2l.five[3]*math.nan
