"False negatives that are masked by ids, and the decoupled loss: against loops, to the bit where nothing is asked for."
import copy, random
import numpy as np, pytest, torch
import torch.nn.functional as F
from torch import nn
from fastai.basics import Categorize, DataLoader, DataLoaders, Datasets, Learner
from c2l_nb.core import patient_ids
from c2l_nb.data.cache import pretrain_dls
from c2l_nb.training.callback import C2LCallback, C2LLoss, CountFalseNegatives, c2l_opt
from c2l_nb.training.checkpoint import C2LCheckpoint, resume
from c2l_nb.method.feature_queue import FeatureQueue, share_id
from c2l_nb.method.loss import c2l_loss, info_nce
from c2l_nb.method.model import C2L, C2LConfig
from c2l_nb.data.phantom import phantom_batch
from c2l_nb.training.run_folder import load_checkpoint
from reference import batch_mean, cross_entropy, normalise

pytestmark = [pytest.mark.filterwarnings('ignore:the queue of', 'ignore::FutureWarning', 'ignore:Your generator is empty')]
IMAGES, ROWS = phantom_batch([i//2 for i in range(24)], [i % 2 for i in range(24)], size=16)
POOL, WHO = IMAGES[:, 0].numpy(), patient_ids(ROWS)
SMALL = dict(queue_size=40, dim=8, momentum=.9)

def body(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 8, 3, 2, 1), nn.ReLU())

def learner(*cbs, dls=None, ids=None, config=C2LConfig(), **own):
    random.seed(0); np.random.seed(0)                      # of fastai's loaders; a checkpoint has their state
    dls = dls or pretrain_dls(POOL, 6, device='cpu', ids=ids)
    learn = Learner(dls, body(), loss_func=C2LLoss(), opt_func=c2l_opt, cbs=[C2LCallback(config, **{**SMALL, **own}), *cbs])
    learn.logger = lambda *args: None
    return learn

def fit(learn, n=2, **kw):
    with learn.no_bar(): learn.fit(n, .03, **kw)
    return learn

def five(B=7, D=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(B, D, generator=g, dtype=torch.float64).requires_grad_(i < 2) for i in range(5)]

def by_loop(q, k, feats, T, ids, queue_ids, decoupled=False):
    "One query and one row at a time: reference.py's cross entropy over the rows that remain"
    terms = []
    for i, (a, b) in enumerate(zip(normalise(q), normalise(k))):
        keep = [row for row, other in zip(feats, queue_ids) if not {int(j) for j in other if j >= 0} & {int(j) for j in ids[i] if j >= 0}]
        terms.append(cross_entropy(a, b, torch.stack(keep), T, denominator_has_positive=not decoupled) if keep else a.sum()*0)
    return sum(terms)/len(terms)


# ---- Queue ----------------------------------------------------------------------------------------------------------

def test_ids_turn_with_the_rows():
    "A row and its ids are written together whatever the lengths: here the key says which ids it must have"
    g, q = torch.Generator().manual_seed(0), FeatureQueue(11, 2, ids=True)
    key = lambda ids: torch.stack([ids[:, 0] + 1., ids[:, 1] + 1.], 1)
    for n in (3, 4, 11, 1, 26, 5):
        ids = torch.randint(50, (n, 2), generator=g)
        ahead = q.peek_ids(ids[:1], ids[1:])
        q.enqueue(key(ids)[:1], key(ids)[1:], ids=[ids[:1], ids[1:]])
        assert torch.equal(ahead, q.ids)
        known = q.ids[:, 0] >= 0
        assert torch.allclose(q.feats[known], F.normalize(key(q.ids[known])), atol=1e-6)
    assert known.all()
    q.enqueue(torch.ones(2, 2))
    assert (q.ids == -1).all(1).sum() == 2
    with pytest.raises(ValueError, match='2×2'): q.enqueue(torch.ones(2, 2), ids=[torch.ones(3, 2)])

def test_a_plain_queue_is_what_it_was():
    "No buffer, no key in the state; what an older version saved loads"
    plain = FeatureQueue(5, 2)
    assert plain.ids is None and set(plain.state_dict()) == {'feats', 'ptr'}
    FeatureQueue(5, 2).load_state_dict(dict(feats=torch.ones(5, 2), ptr=torch.tensor(3)))

def test_share_id_is_what_sets_say():
    g = torch.Generator().manual_seed(1)
    a, b = torch.randint(-2, 6, (20, 2), generator=g), torch.randint(-2, 6, (30, 2), generator=g)
    want = [[bool({x for x in i if x >= 0} & {x for x in j if x >= 0}) for j in b.tolist()] for i in a.tolist()]
    assert share_id(a, b).tolist() == want and any(map(any, want)) and not all(map(all, want))

def test_unknown_patients_are_their_own():
    import pandas as pd
    ids = patient_ids(pd.DataFrame(dict(patient=['1', None, '1', float('nan'), '2'], source=list('aaaab')), index=[9, 8, 7, 6, 5]))
    assert ids[0] == ids[2] and len(set(ids.tolist())) == 4
    assert patient_ids(pd.DataFrame(dict(patient=['1', '1'], source=['a', 'b']))).tolist() == [0, 1]


# ---- Loss -----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('decoupled', [False, True])
@pytest.mark.parametrize('few', [2, 5, 40])
def test_masked_loss_is_the_loop(few, decoupled):
    "Ids of `few` images, unknown ones among them: loss and gradient of all three terms to 1e-10; with 2 ids whole queries lose all rows"
    g = torch.Generator().manual_seed(few)
    t, feats = five(), normalise(torch.randn(23, 8, generator=g, dtype=torch.float64))
    draw = lambda n: torch.randint(-1, few, (n, 2), generator=g)
    own, theirs = (draw(7), draw(7)), draw(23)
    if few == 2: own[0][0], own[1][0], theirs = torch.tensor([0, 1]), torch.tensor([0, 1]), theirs.clamp(min=0)
    loss = c2l_loss(*t, feats, .07, decoupled=decoupled, ids=own, queue_ids=theirs)
    want = sum(by_loop(t[a], t[b], feats, .07, own[a], theirs, decoupled) for a, b in ((0, 2), (1, 3), (1, 4)))
    assert (loss - want).abs() < 1e-10*want.abs()
    for got, right in zip(torch.autograd.grad(loss, t[:2]), torch.autograd.grad(want, t[:2])):
        assert got.isfinite().all() and (got - right).abs().max() < 1e-10*right.abs().max()

def test_three_queues_have_ids_of_their_own():
    g = torch.Generator().manual_seed(0)
    t = five()
    queues = [normalise(torch.randn(9, 8, generator=g, dtype=torch.float64)) for _ in range(3)]
    theirs, own = [torch.randint(4, (9, 2), generator=g) for _ in range(3)], [torch.randint(6, (7, 2), generator=g) for _ in range(2)]
    want = sum(by_loop(t[a], t[b], queues[i], .07, own[a], theirs[i]) for i, (a, b) in enumerate(((0, 2), (1, 3), (1, 4))))
    assert (c2l_loss(*t, tuple(queues), ids=tuple(own), queue_ids=tuple(theirs)) - want).abs() < 1e-10*want.abs()

def test_decoupled_is_the_reference_without_the_positive():
    "And the queue's log-sum-exp alone: below zero where the partner is nearer than the crowd"
    t, feats = five(), normalise(torch.randn(23, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3)))
    unit = [normalise(v) for v in t]
    want = sum(batch_mean(unit[a], unit[b], feats, .07, denominator_has_positive=False) for a, b in ((0, 2), (1, 3), (1, 4)))
    assert (c2l_loss(*t, feats, decoupled=True) - want).abs() < 1e-10
    assert info_nce(t[0], t[0], feats, decoupled=True) < 0 < info_nce(t[0], t[0], feats)

@pytest.mark.parametrize('decoupled', [False, True])
def test_all_rows_masked_is_finite(decoupled):
    "More rows than a piece of the product, in float32: no loss, no gradient; and one row that is left is enough"
    t = [v.detach().float().requires_grad_(i < 2) for i, v in enumerate(five())]
    feats, ids = F.normalize(torch.randn(5000, 8)), torch.zeros(7, 2, dtype=torch.long)
    theirs = torch.zeros(5000, 2, dtype=torch.long)
    loss = c2l_loss(*t, feats, decoupled=decoupled, ids=(ids, ids), queue_ids=theirs)
    assert loss == 0 and all((g == 0).all() for g in torch.autograd.grad(loss, t[:2]))
    theirs[4999] = 1
    loss = info_nce(t[0], t[2], feats, decoupled=decoupled, ids=ids, queue_ids=theirs)
    assert torch.allclose(loss, info_nce(t[0], t[2], feats[4999:], decoupled=decoupled), atol=1e-6)

def test_ids_that_match_nothing_change_nothing():
    "To the bit"
    t, feats = five(), F.normalize(torch.randn(3000, 8, dtype=torch.float64))
    own, theirs = torch.zeros(7, 2, dtype=torch.long), torch.ones(3000, 2, dtype=torch.long)
    assert torch.equal(c2l_loss(*t, feats), c2l_loss(*t, feats, ids=(own, own), queue_ids=theirs))


# ---- Model ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('config', [C2LConfig(), C2LConfig(share_mix=False), C2LConfig.official(), C2LConfig.moco(),
                                    C2LConfig.moco(mix_views=True, share_mix=False)], ids=['paper', 'own mix', 'official', 'moco', 'mixed views'])
def test_model_masks_who_is_in_a_feature(config):
    "The model's loss is the loop's, with ids worked out here from perm; the positive of a query is never masked, though it shares its id"
    model = C2L(body(), config.replace(**SMALL, false_negatives='image')).double().train()
    c, ids, seen = model.config, torch.arange(6), []
    for step in range(3):
        x1, x2, lam, perm, *rest = model.views(IMAGES[6*(step % 2):][:6].double()/255, model.augmentation(16))
        out, now = model(x1, x2, lam, perm, *rest), ids + 6*(step % 2)
        perm2 = rest[1] if rest else perm
        alone, mix, mix2 = (torch.stack([now, p], 1) for p in (now, now[perm], now[perm2]))
        own = (mix, mix, mix2, mix2, mix2) if c.mix_views else (alone, mix, alone, mix2, mix2)
        given = model.partners(now, lam, perm, *rest)
        assert torch.equal(given, torch.stack(own, 1))
        keys = dict(A=(out[2], own[2]), M=(out[3], own[3]), mix=(out[4], own[4]))
        queues = [copy.deepcopy(model.queue) for _ in range(3)]
        if c.queue_update == 'sequential':
            for i, q in enumerate(queues):
                for name in ('A', 'M')[:i]: q.enqueue(keys[name][0].detach(), ids=[keys[name][1]])
        terms = ((0, 2), (1, 3), (1, 4)) if c.mixes else ((0, 2),)
        want = sum(by_loop(out[a], out[b], queues[i].feats, c.temperature, own[a], queues[i].ids) for i, (a, b) in enumerate(terms))
        loss = model.loss(*out, given)
        assert (loss*(3 if c.loss_reduction == 'mean' else 1) - want).abs() < 1e-9*want.abs() and want > 0
        seen.append(model.false_negatives(given).sum().item())
        model.queue.enqueue(*model.keys(*out), ids=model.key_ids(given)); model.seen += 1
        assert torch.equal(model.queue.ids[model.queue.rows(0).new_tensor([(model.queue.ptr - 1) % 40])][0], model.key_ids(given)[-1][-1])
    assert seen[0] == 0 and seen[2] > 0
    with pytest.raises(ValueError, match='partners'): model.loss(*out)

def test_defaults_are_bit_for_bit_those_before():
    """Three epochs of four configs by `Learner`, with fields and callback as they are, against what the loss and the queue of the version
    before these fields give, written out here"""
    def before(q, q_mix, k, k_mix, k_feat, feats, T):
        unit = lambda v: F.normalize(v.float(), dim=1)
        class Old(torch.autograd.Function):
            @staticmethod
            def forward(ctx, q, feats, temperature, chunk=2048):
                top, total, mean = q.new_full((len(q), 1), -torch.inf), q.new_zeros(len(q), 1), torch.zeros_like(q)
                for part in feats.split(chunk):
                    logits = (q @ part.T).div_(temperature)
                    new_top = torch.maximum(top, logits.amax(1, keepdim=True))
                    weights, rescale = logits.sub_(new_top).exp_(), (top - new_top).exp()
                    total, top = total*rescale + weights.sum(1, keepdim=True), new_top
                    mean.mul_(rescale).addmm_(weights, part)
                ctx.save_for_backward(mean/(total*temperature))
                return (top + total.log()).squeeze(1)
            @staticmethod
            def backward(ctx, grad): return grad[:, None]*ctx.saved_tensors[0], None, None, None
        q, q_mix, k, k_mix, k_feat = map(unit, (q, q_mix, k, k_mix, k_feat))
        neg, neg_mix = Old.apply(torch.cat([q, q_mix]), feats, T).chunk(2)
        def ce(a, b, n): pos = (a*b).sum(1)/T; return (torch.logaddexp(pos, n) - pos).mean()
        return sum(1.*t for t in (ce(q, k, neg), ce(q_mix, k_mix, neg_mix), ce(q_mix, k_feat, neg_mix)))
    g = torch.Generator().manual_seed(0)
    for n in (37, 5000):
        t = [torch.randn(6, 8, generator=g).requires_grad_(i < 2) for i in range(5)]
        feats = F.normalize(torch.randn(n, 8, generator=g))
        new, old = c2l_loss(*t, feats), before(*t, feats, .07)
        assert torch.equal(new, old) and all(torch.equal(a, b) for a, b in zip(*(torch.autograd.grad(l, t[:2]) for l in (new, old))))
    learn = fit(learner(queue_size=3000))
    assert set(learn.model.queue.state_dict()) == {'feats', 'ptr'} and learn.c2l.ids is None
    assert learn.c2l.config.shared().keys() == {k for k in vars(C2LConfig()) if k not in ('false_negatives', 'decoupled')}
    views = [fit(learner(dls=dls)).model.state_dict() for dls in (None, pretrain_dls(POOL, 6, device='cpu', ids=WHO))]
    assert all(torch.equal(views[0][k], views[1][k]) for k in views[0])                     # ids are not looked at


# ---- Learner --------------------------------------------------------------------------------------------------------

def test_patients_reach_the_queue():
    learn = fit(learner(CountFalseNegatives(), ids=WHO, false_negatives='patient', queue_size=54), 3)
    assert set(learn.model.queue.ids.unique().tolist()) <= set(WHO.tolist()) and learn.model.queue.ids.min() >= 0
    now = learn.count_false_negatives.now
    assert 0 < now['false_any'] <= 1 and now['false_each'] >= now['false_any']
    assert learn.recorder.metric_names[-3:-1] == ['false_any', 'false_each'] and not learn.metrics
    assert learn.recorder.values[-1][-1] == pytest.approx(now['false_each'])

def test_targets_that_are_no_ids_are_refused():
    "None, floats, several numbers, and fastai's classes; with integers it trains, negative ones are unknown"
    def of(target, **own):
        items = [(x, target(i)) if target else (x,) for i, x in enumerate(IMAGES)]
        return fit(learner(dls=DataLoaders(DataLoader(items, bs=6), DataLoader(items, bs=6)), false_negatives='image', **own), 1)
    for target in (None, float, lambda i: torch.zeros(3), lambda i: i % 2 == 0):
        with pytest.raises(ValueError, match=r"false_negatives='image'.*\(image, id\).*pretrain_dls"): of(target)
    classes = Datasets(range(24), [[lambda i: IMAGES[i]], [lambda i: 'ab'[i % 2], Categorize()]], splits=[list(range(24))]*2).dataloaders(bs=6, device='cpu')
    with pytest.raises(ValueError, match='no class'): fit(learner(dls=classes, false_negatives='image'), 1)
    assert of(lambda i: i).model.queue.ids.min() >= 0
    unknown = of(lambda i: -1)
    plain = fit(learner(dls=unknown.dls), 1)
    assert all(torch.equal(v, unknown.model.state_dict()[k]) for k, v in plain.model.state_dict().items())

def test_positions_are_no_patients():
    with pytest.warns(UserWarning, match='patient_ids'): learner(false_negatives='patient')

@pytest.mark.parametrize('config', [dict(false_negatives='image'), dict(false_negatives='image', queue_update='sequential')], ids=['after', 'sequential'])
def test_resume_is_exact(tmp_path, config):
    "Stopped within epoch 1 and resumed: every tensor of the checkpoint, ids and counts among them, and the rows of the table"
    def run(name, stop=None):
        cb = C2LCheckpoint(tmp_path/name, fingerprint='pool', steps=1)
        learn = learner(CountFalseNegatives(), cb, **config)
        if stop:
            after = learn.c2l.after_pred
            def after_pred():
                if (learn.epoch, learn.iter) == stop: cb._wait(); raise KeyboardInterrupt
                after()
            learn.c2l.after_pred = after_pred
        return learn
    whole = fit(run('whole'), 3)
    with pytest.raises(KeyboardInterrupt): fit(run('cut', stop=(1, 2)), 3)
    again = run('cut')
    again.model.queue.ids.fill_(-1)
    fit(again, 3, start_epoch=resume(again, tmp_path/'cut'))
    (a, ma), (b, mb) = (load_checkpoint(tmp_path/name) for name in ('whole', 'cut'))
    assert any(k.endswith('queue.ids') for k in a) and a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert [r[:-1] for r in ma['rows']] == [r[:-1] for r in mb['rows']] and whole.count_false_negatives.now == again.count_false_negatives.now


# ---- c2l_pretrain ---------------------------------------------------------------------------------------------------

def test_command(tmp_path, monkeypatch):
    "`c2l_pretrain --set false_negatives=patient decoupled=true` on phantoms: trains, masks patients of the train split, says so in its log"
    import pandas as pd
    import c2l_nb.tasks.pretrain as module
    monkeypatch.setattr(module, 'create_encoder', lambda arch, channels=1: body())
    done = {}
    monkeypatch.setattr(module, 'finish', lambda learn, out, about, images, rows, labels: done.update(learn=learn, rows=rows, about=about))
    module.main(out=str(tmp_path/'run'), size=16, epochs=2, batch=16, phantoms=100, set='queue_size=48 false_negatives=patient decoupled=true')
    learn, rows = done['learn'], done['rows']
    assert (learn.model.config.false_negatives, learn.model.config.decoupled) == ('patient', True) and done['about']['config']['decoupled']
    assert set(learn.model.queue.ids.unique().tolist()) <= set(patient_ids(rows)[(rows.split == 'train').values].tolist())
    assert len(set(patient_ids(rows))) == 50
    log = pd.read_csv(tmp_path/'run'/'log.csv')
    assert len(log) == 2 and log.false_each.iloc[-1] > 0 and log.train_loss.notna().all()
    with pytest.raises(SystemExit, match='decoupled must be one of'): module.main(out=str(tmp_path/'no'), set='decoupled=perhaps')

def test_the_table():
    from c2l_nb.paper.experiments import ABLATIONS, PAPER, ablation
    assert list(ABLATIONS['beyond']) == ['C2L', 'False negatives masked (image)', 'False negatives masked (patient)', 'Decoupled'] and 'beyond' not in PAPER
    assert ablation('beyond', 'C2L') == C2LConfig() and ablation('beyond', 'Decoupled') == C2LConfig(decoupled=True)
    assert ablation('beyond', 'False negatives masked (patient)').false_negatives == 'patient'

@pytest.mark.parametrize('mix_views', [False, True])
def test_masks_without_mixed_keys(mix_views):
    "Only keys that are there enter the queue, and so do only their ids"
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(1, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = C2L(body, C2LConfig(queue_size=16, dim=4, loss_weights=(1., 0., 0.), mix_views=mix_views, false_negatives='image'))
    x, ids = torch.rand(4, 1, 16, 16), torch.arange(4)
    views = model.views(x, model.augmentation(16))
    out, of = model(*views), model.partners(ids, *views[2:])
    keys, theirs = model.keys(*out), model.key_ids(of)
    model.queue.enqueue(*keys, ids=theirs)
    assert len(keys) == len(theirs) == 1 and int(model.queue.ptr) == 4 and torch.isfinite(model.loss(*out, of))

@pytest.mark.parametrize('bad,said', [(dict(enqueue=('M', 'mix'), loss_weights=(1., 0., 0.)), 'nothing would enter'), (dict(enqueue=()), 'nothing would enter'),
                                      (dict(loss_weights=(1., 1.)), 'three numbers'), (dict(alpha=0.), 'alpha'), (dict(share_mix='off'), 'share_mix'), (dict(corners='blak'), 'corners')])
def test_senseless_configs_are_refused(bad, said):
    with pytest.raises(ValueError, match=said): C2LConfig(**bad)

@pytest.mark.parametrize('masks', ['keep', 'image'])
@pytest.mark.parametrize('enqueue, seen', [(('A', 'M', 'mix'), ('', 'A', 'AM')), (('A', 'mix'), ('', 'A', 'A')), (('M',), ('', '', 'M')), (('mix',), ('', '', '')), (('M', 'A'), ('', 'A', 'AM'))])
def test_sequential_terms_see_what_is_stored(enqueue, seen, masks):
    "Between the terms enters what `enqueue` names, nothing else; composed here from three losses"
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(1, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = C2L(body, C2LConfig(queue_size=16, dim=4, queue_update='sequential', enqueue=enqueue, false_negatives=masks))
    views = model.views(torch.rand(4, 1, 16, 16), model.augmentation(16))
    out, ids = model(*views), model.partners(torch.arange(4), *views[2:])
    before = copy.deepcopy(model.queue.state_dict())
    keys, marks = dict(A=out[2], M=out[3]), dict(A=ids[:, 2], M=ids[:, 3])
    want = 0.
    for names, q, k, own in zip(seen, (out[0], out[1], out[1]), out[2:], (ids[:, 0], ids[:, 1], ids[:, 1])):
        queue = FeatureQueue(16, 4, ids=masks != 'keep')
        queue.load_state_dict(before)
        for n in names: queue.enqueue(keys[n], ids=[marks[n]] if queue.ids is not None else None)
        given = {} if queue.ids is None else dict(ids=own, queue_ids=queue.ids)
        want = want + info_nce(q, k, queue.feats, .07, **given)
    assert torch.allclose(model.loss(*out, ids), want, rtol=1e-6)
    assert all(torch.equal(v, before[n]) for n, v in model.queue.state_dict().items())
