"""AUROC, its weights and its intervals, against scikit-learn, brute force and hand-made cases."""
import math
import numpy as np, pandas as pd, pytest, torch
from sklearn.metrics import roc_auc_score
from c2l_nb.metrics import auroc, auroc_table, bootstrap, paired_difference, patient_counts


def toy(n=300, c=3, seed=0, ties=True):
    g = torch.Generator().manual_seed(seed)
    y = (torch.rand(n, c, generator=g) < torch.tensor([.5, .2, .05])[:c]).double()
    p = torch.rand(n, c, generator=g).double() + .3*y
    return y, (p*20).round()/20 if ties else p


def loops(y, p, w=None):
    w = [1]*len(y) if w is None else w
    num = den = 0.
    for a, i, u in zip(p, y, w):
        for b, j, v in zip(p, y, w):
            if i == 1 and j == 0: num, den = num+u*v*((a > b)+.5*(a == b)), den+u*v
    return num/den if den else math.nan


def test_auroc_equals_the_double_loop_with_ties_and_weights():
    y, p = toy(60, 1)
    w = torch.rand(60, generator=torch.Generator().manual_seed(1)).double()
    y, p = y[:, 0], p[:, 0]
    assert auroc(y, p) == pytest.approx(loops(y.tolist(), p.tolist()), abs=1e-12)
    assert auroc(y, p, w) == pytest.approx(loops(y.tolist(), p.tolist(), w.tolist()), abs=1e-12)


@pytest.mark.parametrize('ties', [True, False])
def test_weighted_auroc_equals_scikit_learn(ties):
    y, p = toy(500, 3, ties=ties)
    w = torch.rand(4, 500, generator=torch.Generator().manual_seed(2)).double()
    for c in range(3):
        assert auroc(y[:, c], p[:, c]) == pytest.approx(roc_auc_score(y[:, c], p[:, c]), abs=1e-12)
        want = [roc_auc_score(y[:, c], p[:, c], sample_weight=o) for o in w]
        assert auroc(y[:, c], p[:, c], w).tolist() == pytest.approx(want, abs=1e-12)


def test_only_the_order_of_scores_counts():
    y, p = toy(200, 1)
    assert auroc(y[:, 0], p[:, 0]) == auroc(y[:, 0], p[:, 0].exp()*7-3)
    assert auroc(y[:, 0], p[:, 0]) == pytest.approx(1-auroc(y[:, 0], -p[:, 0]), abs=1e-12)


@pytest.mark.parametrize('y,p,want', [([0, 1], [.1, .2], 1.), ([0, 1], [.2, .1], 0.), ([0, 1, 1], [.5]*3, .5),
                                      ([1, 1], [.1, .2], math.nan), ([0, np.nan, 1, 0], [.1, np.nan, .3, .4], .5)])
def test_cases_by_hand(y, p, want): assert auroc(y, p) == pytest.approx(want, nan_ok=True)


@pytest.mark.parametrize('y,p,w,word', [([0, 1], [.1, math.nan], None, '^p '), ([0, 2], [.1, .2], None, '^y '),
                                        ([0, 1], [.1], None, '^p '), ([[0, 1]], [.1, .2], None, '^y '), ([0, 1], [.1, .2], [1], '^weight ')])
def test_bad_input_names_the_argument(y, p, w, word):
    with pytest.raises(ValueError, match=word): auroc(y, p, w)


def test_inputs_of_any_kind_give_the_same():
    y, p = toy(100, 1)
    want = auroc(y[:, 0], p[:, 0])
    for a, b in [(y[:, 0].bool(), p[:, 0]), (y[:, 0].numpy().astype(int), p[:, 0].numpy()), (pd.Series(y[:, 0]), pd.Series(p[:, 0])),
                 (y[:, 0].tolist(), p[:, 0].tolist())]: assert auroc(a, b) == want


def test_one_image_a_patient_equals_the_image_bootstrap():
    y, p = toy()
    ids = [f'patient {i}' for i in torch.randperm(300, generator=torch.Generator().manual_seed(3))]
    a, b = auroc_table(y, p, n_boot=100), auroc_table(y, p, ids, n_boot=100)
    pd.testing.assert_frame_equal(a, b)


def test_a_replicate_is_the_same_as_repeating_the_images():
    y, p = toy(40, 2)
    who = torch.arange(40)//4
    counts, patient = patient_counts(who, 40, 20, seed=5)
    got = bootstrap(y, p, counts, patient)
    assert (counts.sum(1) == 10).all()
    for r, c in enumerate(counts):
        idx = torch.repeat_interleave(torch.arange(40), c[patient].long())
        want = [loops(y[idx, k].tolist(), p[idx, k].tolist()) for k in range(2)]
        assert got[r].tolist() == pytest.approx(want, abs=1e-12, nan_ok=True)


def test_interval_does_not_depend_on_how_replicates_are_chunked():
    y, p = toy(50, 2)
    counts, patient = patient_counts(None, 50, 30)
    parts = torch.cat([bootstrap(y, p, c, patient) for c in counts.split(7)])
    assert torch.equal(parts.nan_to_num(-1), bootstrap(y, p, counts, patient).nan_to_num(-1))


def test_table_quantiles_mean_and_undefined_class():
    y, p = toy()
    y[:, 1] = 0
    y[::5, 2] = math.nan
    t = auroc_table(y, p, torch.arange(300)//3, classes=list('abc'), n_boot=200, seed=7, level=.9)
    assert list(t.columns) == ['class', 'n', 'positives', 'auroc', 'low', 'high'] and t['class'].tolist() == ['a', 'b', 'c', 'mean']
    assert t.n.tolist() == [300, 300, 240, 300] and t.positives[1] == 0 and t.positives[3] == t.positives[:3].sum()
    assert t.iloc[1, 3:].isna().all()
    assert t.auroc[3] == pytest.approx((t.auroc[0]+t.auroc[2])/2)
    counts, patient = patient_counts(torch.arange(300)//3, 300, 200, seed=7)
    reps = bootstrap(y, p, counts, patient)
    assert t.low[0] == pytest.approx(np.nanquantile(reps[:, 0], .05)) and t.high[2] == pytest.approx(np.nanquantile(reps[:, 2], .95))
    assert t.high[3] == pytest.approx(np.nanquantile(reps[:, [0, 2]].nanmean(1), .95))


def test_classes_come_from_a_frame_and_seed_repeats_to_the_bit():
    y, p = toy()
    frame = pd.DataFrame(y.numpy(), columns=['Mass', 'Nodule', 'Hernia'])
    a, b = auroc_table(frame, p, n_boot=50, seed=1), auroc_table(frame, p, n_boot=50, seed=1)
    pd.testing.assert_frame_equal(a, b, check_exact=True)
    assert a['class'].tolist() == ['Mass', 'Nodule', 'Hernia', 'mean']
    assert not a.low.equals(auroc_table(frame, p, n_boot=50, seed=2).low)


def test_paired_difference_with_itself_is_zero():
    y, p = toy()
    d = paired_difference(y, p, p, torch.arange(300)//2, n_boot=100)
    assert (d[['difference', 'low', 'high']] == 0).all().all()


def test_paired_difference_uses_one_set_of_resamples():
    y, p = toy(ties=False)
    q = p + .3*torch.randn(p.shape, generator=torch.Generator().manual_seed(1)).double()
    who = torch.arange(300)//3
    d = paired_difference(y, p, q, who, n_boot=300)
    a, b = auroc_table(y, p, who, n_boot=300), auroc_table(y, q, who, n_boot=300)
    assert np.allclose(d.difference, a.auroc-b.auroc) and np.allclose(d.auroc_a, a.auroc) and np.allclose(d.auroc_b, b.auroc)
    wa, wb = a.high-a.low, b.high-b.low
    assert d.high.iloc[-1]-d.low.iloc[-1] < (wa**2+wb**2).iloc[-1]**.5     # narrower than two independent samples
    back = paired_difference(y, q, p, who, n_boot=300)
    assert np.allclose(back.low, -d.high) and np.allclose(back.high, -d.low)


def test_patients_widen_the_interval():
    g = torch.Generator().manual_seed(0)
    y = (torch.rand(80, 1, generator=g) < .5).double().expand(80, 5).flatten()
    p = (y.view(80, 5)+torch.randn(80, 1, generator=g)+.1*torch.randn(80, 5, generator=g)).flatten()
    width = lambda t: (t.high-t.low)[0]
    assert width(auroc_table(y, p, torch.arange(80).repeat_interleave(5))) > 1.7*width(auroc_table(y, p))


@pytest.mark.parametrize('kw,word', [(dict(groups=[1, 2]), '^groups'), (dict(groups=[None]*300), '^groups'), (dict(classes=['a']), '^classes'),
                                     (dict(level=95), '^level'), (dict(n_boot=0), 'n_boot')])
def test_bad_table_arguments(kw, word):
    with pytest.raises(ValueError, match=word): auroc_table(*toy(), **kw)


def test_class_numbers_are_refused_with_advice():
    with pytest.raises(ValueError, match='one-hot'): auroc_table(torch.tensor([0, 1, 2]), torch.rand(3, 3))
    with pytest.raises(ValueError, match='one-hot'): auroc_table(torch.tensor([0, 1, 2]), torch.rand(3))
