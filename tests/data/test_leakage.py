"Leaks that are planted are found, none is invented; the search for near hashes is exact; what is wrong with a table is said"

import json, os
from pathlib import Path

import numpy as np, pandas as pd, pytest
from PIL import Image
from c2l_nb.data.leakage import (
    MANY,
    alike_pairs,
    audit_leaks,
    connected,
    differences,
    hash_bits,
    near_pairs,
    small_square,
)
from c2l_nb.data.phantom import phantom_batch
from c2l_nb.data.table import DataError, index_csv


@pytest.fixture(scope='module')
def films():
    return phantom_batch(300, size=96)[0][:, 0].numpy()  # of 300 patients


@pytest.fixture(scope='module')
def squares(films):
    return np.stack([small_square(f) for f in films])


@pytest.fixture
def five(tmp_path, films):
    "Five films of five patients: two train, one valid, two test"
    for i in range(5):
        Image.fromarray(films[i]).save(tmp_path / f'{i}.png')
    return pd.DataFrame(
        dict(
            path=[str(tmp_path / f'{i}.png') for i in range(5)],
            patient=list('abcde'),
            split=['train', 'train', 'valid', 'test', 'test'],
            source='here',
        )
    )


def audit(df, **kw):
    return audit_leaks(df, progress=False, workers=2, **kw)


def with_copy(df, name, save, patient='new', split='train', of=4):
    "`df` with one more row: the film in row `of`, saved anew"
    new = Path(df.path[of]).parent / name
    save(Image.open(df.path[of]), new)
    return pd.concat(
        [df, pd.DataFrame([dict(path=str(new), patient=patient, split=split, source='here')])], ignore_index=True
    )


COPIES = dict(
    bytes=('same bytes', 'c.png', lambda im, p: p.write_bytes(Path(im.filename).read_bytes())),
    png=('same pixels', 'c.png', lambda im, p: im.save(p, compress_level=1)),
    tiff=('same pixels', 'c.tif', lambda im, p: im.save(p)),
    jpeg=('near', 'c.jpg', lambda im, p: im.save(p, quality=60)),
    smaller=('near', 'c.png', lambda im, p: im.resize((64, 64), 1).save(p)),
    larger=('near', 'c.png', lambda im, p: im.resize((133, 133), 3).save(p)),
    pale=('near', 'c.png', lambda im, p: Image.fromarray((np.asarray(im) * 0.5 + 60).astype(np.uint8)).save(p)),
)


@pytest.mark.parametrize('way', COPIES)
def test_planted_copy_is_found_by_its_kind(five, way):
    "And it alone; the row of train is to be left out, so that test stays"
    kind, name, save = COPIES[way]
    r = audit(with_copy(five, name, save))
    assert list(zip(r.pairs.kind, r.pairs.a, r.pairs.b, r.pairs.across)) == [(kind, 4, 5, True)]
    assert (r.pairs.patient_a[0], r.pairs.patient_b[0]) == ('e', 'new') and (r.pairs.distance[0] == 0) == (
        kind != 'near'
    )
    assert r.drop.index.tolist() == [5] and 'test' in r.drop.reason[5] and len(r.patients) == 0 and len(r.bad) == 0
    assert (
        f'1 pairs, {kind}: 1 across splits' in str(r)
        and 'Leave out 1 train' in str(r)
        and 'Leave out' in r._repr_html_()
    )


def test_nothing_is_found_where_nothing_is(five):
    r = audit(five)
    assert (
        not len(r.pairs)
        and not len(r.patients)
        and not len(r.drop)
        and not r.overlap.images.any()
        and 'Leave out nothing' in str(r)
    )


def test_none_invented_among_300_patients(squares):
    "By comparing all, and by the hash"
    for few in (2000, 0):
        assert len(alike_pairs(squares, few=few)[0]) == 0


def test_copies_among_300_patients(films, squares):
    "Each film reduced by a third: all are found both ways, with likeness, and nothing else"
    copies = np.stack([small_square(np.asarray(Image.fromarray(f).resize((64, 64), Image.BILINEAR))) for f in films])
    want = np.stack([np.arange(300), np.arange(300, 600)], 1)
    for few in (2000, 0):
        pairs, like = alike_pairs(np.concatenate([squares, copies]), few=few)
        assert (
            {*map(tuple, pairs)} <= {*map(tuple, want)} and len(pairs) >= (300 if few else 297) and (like > 0.965).all()
        )


@pytest.mark.parametrize('distance', [0, 1, 3, 8, 20])
@pytest.mark.parametrize('n', [0, 1, 2, 500])
def test_near_pairs_is_brute_force(n, distance):
    "Random hashes, and such that differ from another in a few bits or none"
    rng = np.random.default_rng(n + distance)
    h = rng.integers(0, 2**63, n, dtype=np.uint64) * np.uint64(2) + rng.integers(0, 2, n).astype(np.uint64)
    for i in range(n // 2, n):
        h[i] = h[i - n // 2] ^ np.uint64(sum({1 << int(b) for b in rng.integers(0, 64, rng.integers(0, 24))}))
    assert (
        near_pairs(h, distance).tolist()
        == np.argwhere(np.triu(np.bitwise_count(h[:, None] ^ h) <= distance, 1)).tolist()
    )


def test_hash_is_even_and_repeats(squares):
    bits = np.unpackbits(hash_bits(squares).view(np.uint8).reshape(300, 8), axis=1)
    assert (abs(bits.mean(0) - 0.5) < 0.25).mean() > 0.9 and (hash_bits(squares) == hash_bits(squares)).all()
    assert len(set(hash_bits(np.zeros((3, 24, 24))))) == 1  # flat images ask nothing


def test_flat_images_are_never_alike():
    "One level of noise aside, and in a collection of nothing else"
    flat = np.stack([small_square(np.full((40, 40), v, np.uint8)) for v in (0, 7, 255)])
    assert np.isfinite(flat).all() and len(alike_pairs(flat)[0]) == 0
    noise = np.random.default_rng(0).integers(100, 102, (6, 96, 96)).astype(np.uint8)
    assert len(alike_pairs(np.stack([small_square(x) for x in noise]))[0]) == 0


def noisy(film, n, spread):
    "So many copies of a film, each with other noise"
    rng = np.random.default_rng(0)
    return np.stack(
        [small_square((film + rng.normal(0, spread, film.shape)).clip(0, 255).astype(np.uint8)) for _ in range(n)]
    )


@pytest.mark.parametrize('spread', [0, 3])
@pytest.mark.parametrize('n', [1500, 2500])
def test_many_copies_of_one_image(films, squares, n, spread):
    "Equal or nearly so, compared in all pairs or by the hash: one group, connected by as few pairs as can be; the others stay alone"
    small = np.concatenate([noisy(films[0].astype(float), n, spread), squares[1:100]])
    pairs, like = alike_pairs(small)
    group = connected(len(small), pairs)
    assert len(pairs) == n - 1 and (group[:n] == group[0]).all() and len(set(group)) == 100 and (like >= 0.965).all()
    assert pairs.tolist() == sorted(pairs.tolist()) and (pairs[:, 0] < pairs[:, 1]).all()


@pytest.mark.parametrize('few', [2000, 0])
def test_all_pairs_of_a_small_group_are_listed(films, squares, few):
    small = np.concatenate([noisy(films[0].astype(float), MANY, 0), squares[1:]])
    assert alike_pairs(small, few=few)[0].tolist() == np.argwhere(np.triu(np.ones((MANY, MANY)), 1)).tolist()


def test_groups_by_the_hash_are_those_of_all_near_pairs(films, squares):
    "Two films with many copies each, and others"
    small = np.concatenate([noisy(films[0].astype(float), 120, 1), noisy(films[1].astype(float), 70, 1), squares[2:]])
    near = near_pairs(hash_bits(small))
    like = (differences(small[near[:, 0]]) * differences(small[near[:, 1]])).sum(1)
    want = connected(len(small), near[like >= 0.965])
    assert (connected(len(small), alike_pairs(small, few=0)[0]) == want).all() and len(set(want)) < 330


def test_flat_images_are_not_compared():
    assert len(alike_pairs(np.zeros((2500, 24, 24), np.float16))[0]) == 0


def test_audit_of_many_near_copies(tmp_path, films):
    "60 files of one film, one of them in test: all others leave"
    rng = np.random.default_rng(0)
    for i in range(60):
        Image.fromarray((films[0] + rng.integers(0, 2, films[0].shape)).clip(0, 255).astype(np.uint8)).save(
            tmp_path / f'{i}.png'
        )
    df = pd.DataFrame(
        dict(
            path=[str(tmp_path / f'{i}.png') for i in range(60)],
            patient=[str(i) for i in range(60)],
            split=['test'] + ['train'] * 59,
        )
    )
    r = audit(df)
    assert len(r.pairs) == 59 and r.rows.image.nunique() == 1 and r.drop.index.tolist() == list(range(1, 60))


def test_patient_on_both_sides(five):
    "Of each collection alone: patient 1 of here is not patient 1 of there; unknown patients are nobody"
    df = five.assign(patient=['1', '2', '1', '2', '3'], source=['here', 'here', 'here', 'there', 'there'])
    r = audit(df, pixels=False)
    assert r.patients[['source', 'patient', 'train', 'valid']].values.tolist() == [
        ['here', '1', 1, 1]
    ] and r.drop.index.tolist() == [0]
    assert len(audit(five.assign(patient=None), pixels=False).patients) == 0
    assert audit(
        five.assign(patient=['1', None, '1', None, None]).drop(columns='source'), pixels=False
    ).patients.patient.tolist() == ['1']


def test_another_split_column(five):
    df = five.assign(official=['a', 'b', 'a', 'b', None], patient=['p', 'p', 'q', 'r', 'p'])
    r = audit(df, split='official', order=('a', 'b'), pixels=False)
    assert r.patients.patient.tolist() == ['p'] and r.drop.index.tolist() == [0] and r.rows.split.isna().sum() == 1


def test_patient_behind_a_copy(five):
    "A film of train is a copy of one of valid, whose patient is also in test: both give way"
    df = with_copy(five, 'c.png', COPIES['bytes'][2], of=2).assign(patient=list('abcdc') + ['new'])
    assert audit(df).drop.index.tolist() == [2, 5] and audit(df.drop(index=[2, 5])).drop.empty


def test_validation_list_is_the_test_list(five):
    "Without opening a file where the names are the same; by pixels where they are not"
    both = pd.concat([five[five.split != 'valid'], five[five.split == 'test'].assign(split='valid')], ignore_index=True)
    r = audit(both, pixels=False)
    o = r.overlap.set_index(['a', 'b']).loc[('valid', 'test')]
    assert (
        (o.images, o.share_a, o.share_b, o.people) == (2, 1, 1, 2)
        and 'same list?' in str(r)
        and set(r.drop.split) == {'valid'}
    )
    copy = with_copy(five.drop(index=[2, 3]).reset_index(drop=True), 'c.tif', COPIES['tiff'][2], split='valid', of=2)
    assert 'same list?' in str(audit(copy)) and 'same list?' not in str(audit(copy, pixels=False))


def test_rsna_is_chestxray14(five, tmp_path):
    "By the mapping without opening a file; by pixels without it. The films of the patient leave train"
    df = with_copy(five, 'uuid.jpg', COPIES['jpeg'][2], patient='uuid', split='test', of=1)
    df['source'] = ['nih'] * 5 + ['rsna']
    (tmp_path / 'map.json').write_text(
        json.dumps([dict(img_id='1.png', subset_img_id='uuid'), dict(img_id='x.png', subset_img_id='absent')])
    )
    for r, kind in ((audit(df, rsna=tmp_path / 'map.json', pixels=False), 'RSNA mapping'), (audit(df), 'near')):
        assert list(zip(r.pairs.kind, r.pairs.a, r.pairs.b)) == [(kind, 1, 5)] and r.drop.index.tolist() == [1]
        assert '1 images are in both nih' in str(r)
    for bad in ('[1]', 'no json', '[{"img_id": "a"}]'):
        (tmp_path / 'bad.json').write_text(bad)
        with pytest.raises(DataError, match='bad.json: is no list'):
            audit(df, rsna=tmp_path / 'bad.json', pixels=False)
    with pytest.raises(DataError, match='absent.json'):
        audit(df, rsna=tmp_path / 'absent.json', pixels=False)


def test_bad_files_are_listed(five):
    "Damaged, missing and flat ones; the rest is compared all the same"
    df = with_copy(five, 'c.png', COPIES['bytes'][2])
    Path(df.path[0]).write_bytes(b'no image')
    Path(df.path[1]).unlink()
    Image.new('L', (9, 9), 5).save(df.path[2])
    r = audit(df)
    assert r.bad.path.tolist() == df.path[:3].tolist() and all(r.bad.reason.str.len() > 10)
    assert r.pairs.kind.tolist() == ['same bytes'] and '3 images cannot be read' in str(r)
    for p in df.path:
        Path(p).write_bytes(b'')
    assert len(audit(df).bad) == 6


def test_tables_that_cannot_be_audited(five):
    for lost in ('path', 'patient', 'split'):
        with pytest.raises(DataError, match=f'no column {lost}'):
            audit(five.drop(columns=lost))
    with pytest.raises(DataError, match='split='):
        audit(five, split='official')
    with pytest.raises(DataError, match='no rows'):
        audit(five[:0])
    with pytest.raises(DataError, match='reset_index'):
        audit(pd.concat([five, five]))
    with pytest.raises(DataError, match='holdout.*order='):
        audit(five.assign(split='holdout'))


def test_report_keeps_the_index(five):
    df = with_copy(five, 'c.png', COPIES['bytes'][2]).set_index(pd.Index(list('uvwxyz')))
    r = audit(df)
    assert (
        r.drop.index.tolist() == ['z']
        and r.pairs[['a', 'b']].values.tolist() == [[4, 5]]
        and len(df.drop(r.drop.index)) == 5
    )


def test_many_rows_without_pixels():
    "100,000 rows, one patient in 1,000 on both sides"
    n = 100_000
    df = pd.DataFrame(dict(path=np.arange(n).astype(str), patient=(np.arange(n) // 2).astype(str), split='train'))
    df.loc[1::2000, 'split'] = 'test'
    r = audit(df, pixels=False)
    assert len(r.patients) == len(r.drop) == 50 and len(r.pairs) == 0


@pytest.mark.data
def test_kermany_recurring_numbers():
    "Every person number that recurs across the published split, none missed, none invented"
    root = os.environ.get('C2L_RADIOGRAPHS')
    if not root:
        pytest.skip('set C2L_RADIOGRAPHS to the folder of real radiographs')
    df = index_csv(Path(root) / 'index.csv')
    df = df[[Path(p).parts[-3] == 'kermany' for p in df.path]]
    order = ('official-train', 'official-val', 'official-test')
    r = audit_leaks(df, 'official_split', order, progress=False)
    parts = [set(df.patient[df.official_split == s]) for s in order]
    want = {p for p in set(df.patient) if sum(p in s for s in parts) > 1}
    assert set(r.patients.patient) == want and len(r.patients) == len(want) == 132
    assert not set(df.drop(r.drop.index).query('official_split == "official-train"').patient) & (parts[1] | parts[2])
    assert len(r.bad) == 0 and len(audit_leaks(df, pixels=False).patients) == 0
