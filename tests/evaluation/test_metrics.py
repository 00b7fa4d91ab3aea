"""AUROC and average precision, weights, intervals and power, against scikit-learn, brute force and hand-made cases."""

import math, warnings
import numpy as np, pandas as pd, pytest, torch
from sklearn.metrics import average_precision_score, roc_auc_score
from c2l_nb.evaluation.metrics import (
    FEW,
    auroc,
    auroc_table,
    average_precision,
    bootstrap,
    hanley_mcneil_se,
    one_vs_rest,
    paired_difference,
    patient_counts,
    power_note,
    score_table,
)


def toy(n=300, c=3, seed=0, ties=True):
    g = torch.Generator().manual_seed(seed)
    y = (torch.rand(n, c, generator=g) < torch.tensor([0.5, 0.2, 0.05])[:c]).double()
    p = torch.rand(n, c, generator=g).double() + 0.3 * y
    return y, (p * 20).round() / 20 if ties else p


def loops(y, p, w=None):
    w = [1] * len(y) if w is None else w
    num = den = 0.0
    for a, i, u in zip(p, y, w):
        for b, j, v in zip(p, y, w):
            if i == 1 and j == 0:
                num, den = num + u * v * ((a > b) + 0.5 * (a == b)), den + u * v
    return num / den if den else math.nan


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
    assert auroc(y[:, 0], p[:, 0]) == auroc(y[:, 0], p[:, 0].exp() * 7 - 3)
    assert auroc(y[:, 0], p[:, 0]) == pytest.approx(1 - auroc(y[:, 0], -p[:, 0]), abs=1e-12)


@pytest.mark.parametrize(
    'y,p,want',
    [
        ([0, 1], [0.1, 0.2], 1.0),
        ([0, 1], [0.2, 0.1], 0.0),
        ([0, 1, 1], [0.5] * 3, 0.5),
        ([1, 1], [0.1, 0.2], math.nan),
        ([0, np.nan, 1, 0], [0.1, np.nan, 0.3, 0.4], 0.5),
    ],
)
def test_cases_by_hand(y, p, want):
    assert auroc(y, p) == pytest.approx(want, nan_ok=True)


@pytest.mark.parametrize(
    'y,p,w,word',
    [
        ([0, 1], [0.1, math.nan], None, '^p '),
        ([0, 2], [0.1, 0.2], None, '^y '),
        ([0, 1], [0.1], None, '^p '),
        ([[0, 1]], [0.1, 0.2], None, '^y '),
        ([0, 1], [0.1, 0.2], [1], '^weight '),
    ],
)
def test_bad_input_names_the_argument(y, p, w, word):
    with pytest.raises(ValueError, match=word):
        auroc(y, p, w)


def test_inputs_of_any_kind_give_the_same():
    y, p = toy(100, 1)
    want = auroc(y[:, 0], p[:, 0])
    for a, b in [
        (y[:, 0].bool(), p[:, 0]),
        (y[:, 0].numpy().astype(int), p[:, 0].numpy()),
        (pd.Series(y[:, 0]), pd.Series(p[:, 0])),
        (y[:, 0].tolist(), p[:, 0].tolist()),
    ]:
        assert auroc(a, b) == want


def test_one_image_a_patient_equals_the_image_bootstrap():
    y, p = toy()
    ids = [f'patient {i}' for i in torch.randperm(300, generator=torch.Generator().manual_seed(3))]
    a, b = auroc_table(y, p, n_boot=100), auroc_table(y, p, ids, n_boot=100)
    pd.testing.assert_frame_equal(a, b)


def test_a_replicate_is_the_same_as_repeating_the_images():
    y, p = toy(40, 2)
    who = torch.arange(40) // 4
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
    with pytest.warns(UserWarning, match='of b: undefined') as said:
        t = auroc_table(y, p, torch.arange(300) // 3, classes=list('abc'), n_boot=200, seed=7, level=0.9)
    assert (
        len(said) == 1
        and t.note[0] == ''
        and t.note[1].startswith('undefined: no positive')
        and t.note[3] == 'over 2 of 3 classes'
    )
    assert list(t.columns) == ['class', 'n', 'positives', 'auroc', 'low', 'high', 'note'] and t['class'].tolist() == [
        'a',
        'b',
        'c',
        'mean',
    ]
    assert t.n.tolist() == [300, 300, 240, 300] and t.positives[1] == 0 and t.positives[3] == t.positives[:3].sum()
    assert t.loc[1, ['auroc', 'low', 'high']].isna().all()
    assert t.auroc[3] == pytest.approx((t.auroc[0] + t.auroc[2]) / 2)
    counts, patient = patient_counts(torch.arange(300) // 3, 300, 200, seed=7)
    reps = bootstrap(y, p, counts, patient)
    assert t.low[0] == pytest.approx(np.nanquantile(reps[:, 0], 0.05)) and t.high[2] == pytest.approx(
        np.nanquantile(reps[:, 2], 0.95)
    )
    assert t.high[3] == pytest.approx(np.nanquantile(reps[:, [0, 2]].nanmean(1), 0.95))


def test_classes_come_from_a_frame_and_seed_repeats_to_the_bit():
    y, p = toy()
    frame = pd.DataFrame(y.numpy(), columns=['Mass', 'Nodule', 'Hernia'])
    a, b = auroc_table(frame, p, n_boot=50, seed=1), auroc_table(frame, p, n_boot=50, seed=1)
    pd.testing.assert_frame_equal(a, b, check_exact=True)
    assert a['class'].tolist() == ['Mass', 'Nodule', 'Hernia', 'mean']
    assert not a.low.equals(auroc_table(frame, p, n_boot=50, seed=2).low)


def test_paired_difference_with_itself_is_zero():
    y, p = toy()
    d = paired_difference(y, p, p, torch.arange(300) // 2, n_boot=100)
    assert (d[['difference', 'low', 'high']] == 0).all().all()


def test_paired_difference_uses_one_set_of_resamples():
    y, p = toy(ties=False)
    q = p + 0.3 * torch.randn(p.shape, generator=torch.Generator().manual_seed(1)).double()
    who = torch.arange(300) // 3
    d = paired_difference(y, p, q, who, n_boot=300)
    a, b = auroc_table(y, p, who, n_boot=300), auroc_table(y, q, who, n_boot=300)
    assert (
        np.allclose(d.difference, a.auroc - b.auroc)
        and np.allclose(d.auroc_a, a.auroc)
        and np.allclose(d.auroc_b, b.auroc)
    )
    wa, wb = a.high - a.low, b.high - b.low
    assert d.high.iloc[-1] - d.low.iloc[-1] < (wa**2 + wb**2).iloc[-1] ** 0.5  # narrower than two independent samples
    back = paired_difference(y, q, p, who, n_boot=300)
    assert np.allclose(back.low, -d.high) and np.allclose(back.high, -d.low)


def test_patients_widen_the_interval():
    g = torch.Generator().manual_seed(0)
    y = (torch.rand(80, 1, generator=g) < 0.5).double().expand(80, 5).flatten()
    p = (y.view(80, 5) + torch.randn(80, 1, generator=g) + 0.1 * torch.randn(80, 5, generator=g)).flatten()
    width = lambda t: (t.high - t.low)[0]
    assert width(auroc_table(y, p, torch.arange(80).repeat_interleave(5))) > 1.7 * width(auroc_table(y, p))


@pytest.mark.parametrize(
    'kw,word',
    [
        (dict(groups=[1, 2]), '^groups'),
        (dict(groups=[None] * 300), '^groups'),
        (dict(classes=['a']), '^classes'),
        (dict(level=95), '^level'),
        (dict(n_boot=0), 'n_boot'),
    ],
)
def test_bad_table_arguments(kw, word):
    with pytest.raises(ValueError, match=word):
        auroc_table(*toy(), **kw)


def test_class_numbers_are_refused_with_advice():
    with pytest.raises(ValueError, match='one_vs_rest'):
        auroc_table(torch.tensor([0, 1, 2]), torch.rand(3, 3))
    with pytest.raises(ValueError, match='one_vs_rest'):
        auroc_table(torch.tensor([0, 1, 2]), torch.rand(3))


def precision_loops(y, p, w=None):
    w = [1] * len(y) if w is None else w
    num = den = 0.0
    for a, i, u in zip(p, y, w):
        if i != 1:
            continue
        hits, seen = (sum(v for b, j, v in zip(p, y, w) if b >= a and j in only) for only in ((1,), (0, 1)))
        if u:
            num, den = num + u * hits / seen, den + u
    return num / den if den and any(v for j, v in zip(y, w) if j == 0) else math.nan


@pytest.mark.parametrize('ties', [True, False])
def test_weighted_average_precision_equals_scikit_learn(ties):
    y, p = toy(500, 3, ties=ties)
    w = torch.rand(4, 500, generator=torch.Generator().manual_seed(2)).double()
    w[3] = (w[3] * 4).floor()  # integer weights, a quarter of them 0
    for c in range(3):
        assert average_precision(y[:, c], p[:, c]) == pytest.approx(
            average_precision_score(y[:, c], p[:, c]), abs=1e-12
        )
        want = [average_precision_score(y[:, c], p[:, c], sample_weight=o) for o in w]
        assert average_precision(y[:, c], p[:, c], w).tolist() == pytest.approx(want, abs=1e-12)


@pytest.mark.parametrize(
    'y,p,want',
    [
        ([1, 0, 0], [0.9, 0.5, 0.1], 1.0),
        ([0, 0, 1], [0.9, 0.5, 0.1], 1 / 3),
        ([1, 0, 1, 0], [0.5] * 4, 0.5),
        ([1, 0, 1], [0.9, 0.5, 0.1], (1 + 2 / 3) / 2),
        ([0, 0], [0.1, 0.2], math.nan),
        ([1, 1], [0.1, 0.2], math.nan),
        ([np.nan, 1, 0], [np.nan, 0.2, 0.3], 0.5),
        ([1, 0], [math.inf, -math.inf], 1.0),
    ],
)
def test_average_precision_by_hand(y, p, want):
    assert average_precision(y, p) == pytest.approx(want, nan_ok=True)


@pytest.mark.parametrize('stat,slow', [(auroc, loops), (average_precision, precision_loops)])
def test_patient_weights_equal_image_weights_and_loops(stat, slow):
    y, p = toy(48, 1, seed=3)
    y[::7] = math.nan
    counts, patient = patient_counts(torch.arange(48) // 4, 48, 12, seed=5)
    y, p = y[:, 0], p[:, 0]
    got = stat(y, p, counts, patient)
    assert got.shape == (12,) and torch.equal(got, stat(y, p, counts[:, patient]))
    assert got.tolist() == pytest.approx(
        [slow(y.tolist(), p.tolist(), c[patient].tolist()) for c in counts], abs=1e-12, nan_ok=True
    )
    assert stat(y, p, counts[0], patient) == got[0] and isinstance(stat(y, p), float)


@pytest.mark.parametrize('stat', [auroc, average_precision])
def test_a_replicate_without_a_class_is_undefined(stat):
    w = torch.tensor([[1, 1, 1], [0, 1, 2], [2, 0, 0], [0, 0, 0]])  # all, no positive, no negative, nobody
    assert stat([1, 0, 0], [0.9, 0.5, 0.1], w).isnan().tolist() == [False, True, True, True]
    assert stat([0, 0, 0], [0.9, 0.5, 0.1], w).isnan().all()


def test_mean_of_replicates_does_not_jump_when_a_rare_class_is_lost():
    g = torch.Generator().manual_seed(0)
    y = torch.stack([(torch.arange(300) % 2).double(), (torch.arange(300) == 1).double()], 1)
    p = torch.stack(
        [torch.randn(300, generator=g), torch.randn(300, generator=g) + 5 * y[:, 1]], 1
    )  # AUROC about .5 and 1
    t = auroc_table(y, p, n_boot=300)
    assert t.low[2] > 0.7 and t.note[1].startswith('1 positive patients') and 'of 300 resamples' in t.note[1]
    counts, patient = patient_counts(None, 300, 300)
    lost = int(bootstrap(y, p, counts, patient)[:, 1].isnan().sum())
    assert f'undefined in {lost} of' in t.note[1] and lost == int((counts[:, 1] == 0).sum()) > 50


def test_score_table_of_average_precision():
    y, p = toy()
    t = score_table(y, p, torch.arange(300) // 3, n_boot=100, stat=average_precision)
    assert (
        t.columns[3] == 'average_precision' and ((t.low <= t.average_precision) & (t.average_precision <= t.high)).all()
    )
    want = [average_precision_score(y[:, c], p[:, c]) for c in range(3)]
    assert t.average_precision.tolist() == pytest.approx([*want, np.mean(want)], abs=1e-12)
    pd.testing.assert_frame_equal(score_table(y, p, n_boot=50), auroc_table(y, p, n_boot=50))


def test_a_table_with_nothing_to_say_has_no_note_and_no_warning():
    y, p = toy(c=2)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert (auroc_table(y, p, n_boot=20).note == '').all()


def test_one_vs_rest_is_scikit_learns_macro_average():
    g = torch.Generator().manual_seed(0)
    y, p = torch.randint(4, (400,), generator=g), torch.rand(400, 4, generator=g).double()
    p = p + torch.nn.functional.one_hot(y) * 0.2
    p = p / p.sum(1, keepdim=True)
    t = auroc_table(one_vs_rest(y, list('abcd')), p, n_boot=20)
    assert t['class'].tolist() == [*'abcd', 'mean']
    assert t.auroc[4] == pytest.approx(roc_auc_score(y, p, multi_class='ovr'), abs=1e-12)
    some = y.double()
    some[:50] = math.nan
    some[50:80] = -1
    assert auroc_table(one_vs_rest(some, 4), p, n_boot=20).auroc.tolist() == pytest.approx(
        auroc_table(one_vs_rest(y[80:], 4), p[80:], n_boot=20).auroc.tolist()
    )


@pytest.mark.parametrize('y,word', [([0, 4], r'4\.0'), ([0, 0.5], r'0\.5'), ([[0]], 'one-dimensional')])
def test_class_numbers_out_of_range(y, word):
    with pytest.raises(ValueError, match=word):
        one_vs_rest(y, 3)


@pytest.mark.parametrize('stat', [auroc, average_precision])
def test_p_value_and_interval_say_the_same(stat):
    y, p = toy(c=2, ties=False)
    q = p + 0.25 * torch.randn(p.shape, generator=torch.Generator().manual_seed(4)).double()
    for level in (0.5, 0.8, 0.9, 0.95, 0.99):
        d = paired_difference(y, p, q, torch.arange(300) // 3, n_boot=400, level=level, stat=stat)
        clear = (d.low > 0) | (d.high < 0)
        assert ((d.p_value < 1 - level - 0.01) <= clear).all() and (clear <= (d.p_value < 1 - level + 0.01)).all()
    assert f'{stat.__name__}_a' in d and paired_difference(y, p, p, n_boot=50, stat=stat).p_value.eq(1).all()
    assert d.p_value.min() >= 2 / 401


def test_paired_difference_of_an_undefined_class_is_undefined():
    y, p = toy(c=2)
    y[:, 1] = 0
    with pytest.warns(UserWarning, match='of 1: undefined'):
        d = paired_difference(y, p, p**2, n_boot=50)
    assert d.loc[1, ['difference', 'low', 'high', 'p_value']].isna().all() and d.difference[2] == d.difference[0]


def test_hanley_mcneil_by_hand_and_by_the_null_variance():
    a, q1, q2 = 0.75, 0.75 / 1.25, 2 * 0.75**2 / 1.75
    assert hanley_mcneil_se(a, 2, 3) == pytest.approx(((a * 0.25 + (q1 - a * a) + 2 * (q2 - a * a)) / 6) ** 0.5)
    for m, n in ((1, 1), (5, 7), (40, 400)):
        assert hanley_mcneil_se(0.5, m, n) ** 2 == pytest.approx((m + n + 1) / (12 * m * n))
    assert hanley_mcneil_se(0.8, 50, 50) == hanley_mcneil_se(0.8, np.array([50.0]), 50)[0]


def test_power_note_counts_patients_and_flags_the_few():
    y = pd.DataFrame(dict(often=[1, 1, 0, 0] * 40, rare=[1, 1] + [0] * 158, none=[0] * 160, unknown=[math.nan] * 160))
    t = power_note(y, np.arange(160) // 2).set_index('class')
    assert (
        t.patients_pos.tolist() == [40, 1, 0, 0]
        and t.patients_neg.tolist() == [40, 79, 80, 0]
        and t.positives.tolist() == [80, 2, 0, 0]
    )
    assert t.half_width['often'] == pytest.approx(1.96 * hanley_mcneil_se(0.8, 40, 40))
    assert (
        t.note['often'] == ''
        and f'under {FEW}' in t.note['rare']
        and (t.note[['none', 'unknown']] == 'undefined').all()
    )
    assert t.half_width[['none', 'unknown']].isna().all()
    close = power_note(y, np.arange(160) // 2, r=0.875).set_index('class')
    assert close.difference['often'] == pytest.approx(t.half_width['often'] / 2)  # sqrt(2(1-.875)) = 1/2


@pytest.mark.parametrize(
    'kw,word',
    [
        (dict(expected=1.0), '^expected'),
        (dict(r=1), 'r in'),
        (dict(groups=[1]), '^groups'),
        (dict(classes=['a']), '^classes'),
    ],
)
def test_bad_power_arguments(kw, word):
    with pytest.raises(ValueError, match=word):
        power_note(toy()[0], **kw)


def test_power_note_refuses_other_codes():
    with pytest.raises(ValueError, match='^y must be 0, 1 or NaN'):
        power_note([0, 1, -1])


@pytest.mark.parametrize('w,who', [([[1, 2]], [0, 1, 2]), ([1, 2, 3], [0, 1]), ([[[1, 2, 3]]], [0, 1, 2])])
def test_weights_that_do_not_fit_the_patients(w, who):
    with pytest.raises(ValueError, match='^weight'):
        auroc([0, 1, 1], [0.1, 0.2, 0.3], w, who)


def test_a_list_with_an_unknown_patient_is_refused():
    with pytest.raises(ValueError, match='no patient for 2 images'):
        patient_counts(['a', 'b', float('nan'), None], 4)
