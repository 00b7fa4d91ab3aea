"""What columns alone say about labels: planted shortcuts are found, nothing is found where nothing is, bad input is named."""
import numpy as np, pandas as pd, pytest, torch
from c2l_nb.evaluation.metrics import auroc, auroc_table
from c2l_nb.evaluation.confounders import shortcut_auroc, shortcut_scores


def plant(seed=0, patients=300, images=2, ill=.8, well=.3):
    rng = np.random.default_rng(seed)
    y = (rng.random(patients) < .4).repeat(images).astype(float)
    view = np.where(rng.random(len(y)) < np.where(y == 1, ill, well), 'AP', 'PA')
    who = np.arange(patients).repeat(images)
    return pd.DataFrame(dict(patient=who, view=view, width=rng.integers(500, 3000, patients).repeat(images), source='one')), y


def test_planted_view_is_found_and_equals_the_table_of_counts():
    rows, y = plant()
    share = [(rows['view'][y == v] == 'AP').mean() for v in (1, 0)]
    t = shortcut_auroc(rows, y, ['view'], n_boot=100)
    assert t.auroc[0] == pytest.approx(.5+(share[0]-share[1])/2, abs=.01) and t.low[0] > .6


def test_direction_and_spelling_do_not_matter():
    rows, y = plant()
    a = shortcut_scores(rows, y, ['view'])
    b = shortcut_scores(rows.assign(view=rows['view'].map(dict(AP=2, PA=1))), y, ['view'])
    assert torch.equal(a, b) and auroc(1-y, shortcut_scores(rows, 1-y, ['view'])[:, 0]) == pytest.approx(auroc(y, a[:, 0]), abs=1e-9)


def test_missing_entries_are_a_shortcut_too():
    rows, y = plant(ill=.5, well=.5)
    rows['view'] = rows['view'].where(y == 0)
    assert auroc(y, shortcut_scores(rows, y, ['view'])[:, 0]) > .99


def test_a_number_that_tells_in_both_tails_is_found():
    rows, y = plant(ill=.5, well=.5)
    rng = np.random.default_rng(1)
    rows['width'] = np.where(y == 1, rng.choice([-1, 1], len(y))*rng.uniform(2, 3, len(y)), rng.uniform(-1, 1, len(y)))
    assert auroc(y, shortcut_scores(rows, y, ['width'])[:, 0]) > .9


def test_patients_are_no_shortcut_to_themselves():
    rows, y = plant(ill=.5, well=.5)
    assert auroc(y, shortcut_scores(rows.assign(name=rows.patient.astype(str)), y, ['name'])[:, 0]) == .5
    assert shortcut_auroc(rows, y, ['source'], n_boot=20).loc[0, ['auroc', 'low', 'high']].tolist() == [.5]*3


def test_interval_holds_a_half_where_nothing_is_planted():
    held = []
    for seed in range(20):
        rows, y = plant(seed, 120, ill=.5, well=.5)
        t = shortcut_auroc(rows, y, ['view', 'width'], n_boot=60)
        held += ((t.low <= .5) & (.5 <= t.high))[t['class'] != 'mean'].tolist()
    assert np.mean(held) > .9


def test_interval_is_that_of_the_scores_made_wider():
    rows, y = plant()
    for folds in (2, 5):
        t = shortcut_auroc(rows, y, ['view'], folds=folds, n_boot=100, seed=3, level=.9)
        plain = auroc_table(y, shortcut_scores(rows, y, ['view'], folds=folds), rows.patient, n_boot=100, seed=3, level=.9)
        assert np.allclose(t.high-t.auroc, (plain.high-plain.auroc)*(1+folds/(folds-1))**.5)


def test_rows_of_the_table_and_unknown_labels():
    rows, y = plant()
    Y = pd.DataFrame(dict(a=y, b=1-y))
    Y.loc[:99, 'b'] = np.nan
    t = shortcut_auroc(rows, Y, ['view', 'width', 'source'], n_boot=20)
    assert t.column.drop_duplicates().tolist() == ['view', 'width', 'source', 'view + width + source']
    assert t['class'].tolist() == ['a', 'b', 'mean']*4 and t.n[:2].tolist() == [600, 500]
    s = shortcut_scores(rows, Y, ['view'])
    assert s[:100, 1].isnan().all() and not s[100:].isnan().any() and not s[:, 0].isnan().any()
    pd.testing.assert_frame_equal(t, shortcut_auroc(rows, Y, ['view', 'width', 'source'], n_boot=20), check_exact=True)


@pytest.mark.parametrize('change,word', [(dict(columns=['scanner']), 'scanner'), (dict(columns=[]), 'column'),
                                         (dict(groups='person'), 'person')])
def test_absent_columns_are_named(change, word):
    rows, y = plant()
    with pytest.raises(ValueError, match=f'^columns.*{word}'): shortcut_scores(rows, y, **dict(columns=['view'])|change)


def test_fewer_positive_patients_than_folds_and_missing_patients():
    rows, y = plant()
    one = pd.DataFrame(dict(common=y, hernia=(np.arange(len(y)) < 2).astype(float)))
    with pytest.raises(ValueError, match='hernia has 1 patients'): shortcut_scores(rows, one, ['view'])
    with pytest.raises(ValueError, match='0 has 0 patients'): shortcut_scores(rows, 0*y, ['view'])
    with pytest.raises(ValueError, match='^groups'): shortcut_scores(rows.assign(patient=None), y, ['view'])
    with pytest.raises(ValueError, match='^groups'): shortcut_scores(rows[:-1], y, ['view'])
