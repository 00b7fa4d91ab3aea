"""Frozen features, neighbours, retrieval and the linear probe, against brute force and scikit-learn."""

import ast, json, math, random, re
import numpy as np, pandas as pd, pytest, torch
import torch.nn.functional as F
from fastcore.script import anno_parser
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import r2_score
from torch import nn
from c2l_nb.evaluation import features as embed
from c2l_nb.evaluation import attribution as explain
from c2l_nb.tasks import embed as gallery
from c2l_nb.data.cache import DataError
from sklearn.neighbors import NearestNeighbors
from c2l_nb.evaluation.features import (
    _folds,
    _nearest,
    eval_mode,
    extract_features,
    knn_predict,
    linear_probe,
    plot_embedding,
    retrieval_at_1,
    umap_coords,
)
from c2l_nb.method.encoder import Prepare, create_encoder
from c2l_nb.evaluation.metrics import auroc, patient_counts
from c2l_nb.data.phantom import write_phantoms
from c2l_nb.training.weights import WeightsError, export_backbone, load_backbone
from stand_in import devices_of, other_default


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(),
        nn.Sequential(nn.Conv2d(8, 6, 3), nn.BatchNorm2d(6)),
    )


@pytest.fixture
def x():
    return torch.rand(30, 1, 12, 12, generator=gen())


def blobs(n=120, classes=3, f=8, gap=3.0, seed=0):
    y = torch.arange(n) % classes
    return torch.randn(n, f, generator=gen(seed)) + gap * torch.eye(classes, f)[y], y


def test_features_do_not_depend_on_the_batch(net, x):
    net.train()
    want = extract_features(net, x)
    assert want.shape == (30, 6) and want.dtype == torch.float32 and not want.requires_grad
    for bs in (1, 7, 30):
        assert torch.allclose(extract_features(net, x, bs=bs), want, atol=1e-5)
    assert torch.allclose(extract_features(net, x.flip(0)).flip(0), want, atol=1e-5)
    assert torch.allclose(want, net.eval()(x).mean((2, 3)), atol=1e-5)


def test_modes_buffers_and_random_state_are_as_before(net, x):
    net.train()
    net[1].eval()
    modes, state = [m.training for m in net.modules()], {k: v.clone() for k, v in net.state_dict().items()}
    rng = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    extract_features(net, torch.utils.data.DataLoader(x, batch_size=4))
    assert [m.training for m in net.modules()] == modes
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert (
        torch.equal(rng[0], torch.get_rng_state())
        and rng[1] == random.getstate()
        and (rng[2] == np.random.get_state()[1]).all()
    )


def test_modes_come_back_after_an_error(net):
    net.train()
    net[4].eval()
    modes = [m.training for m in net.modules()]
    with pytest.raises(KeyError), eval_mode(net):
        raise KeyError
    with pytest.raises(RuntimeError):
        extract_features(net, torch.zeros(2, 3, 12, 12))
    assert [m.training for m in net.modules()] == modes


def test_prepare_uint8_and_double(net, x):
    byte = (x * 255).byte()
    want = extract_features(net, byte.float() / 255)
    assert torch.equal(extract_features(net, byte, prepare=lambda b: b.float() / 255), want)
    assert extract_features(net.double(), x.double()).dtype == torch.float32


def test_fastai_loader_is_read_in_order_whole_and_without_augmentation(net, x):
    from fastai.data.all import DataLoaders, Datasets, DisplayedTransform, TfmdDL, ToTensor
    from fastai.vision.core import TensorImage

    class Noise(DisplayedTransform):
        split_idx = 0

        def encodes(self, b: TensorImage):
            return b + torch.rand_like(b)

    ds = Datasets(range(30), [[lambda i: TensorImage(x[i])], [lambda i: i]], splits=[range(30), range(30)])
    dls = ds.dataloaders(bs=8, shuffle=True, drop_last=True, after_batch=[Noise()], num_workers=0, device='cpu')
    it = iter(dls.train)
    next(it)
    assert torch.allclose(extract_features(net, dls.train), extract_features(net, x), atol=1e-5)
    assert ds.train.split_idx == 0 and dls.train.after_batch.split_idx == 0  # training goes on augmented
    bare = TfmdDL([TensorImage(i) for i in x], bs=8, shuffle=True)
    assert torch.allclose(extract_features(net, bare), extract_features(net, x), atol=1e-5)


@pytest.mark.parametrize(
    'data', [torch.zeros(3, 12, 12), [torch.zeros(3, 2)], [{'x': 1}], [], torch.zeros(0, 1, 12, 12)]
)
def test_what_holds_no_images_is_refused(net, data):
    with pytest.raises(ValueError, match='dl_or_tensor'):
        extract_features(net, data)


@pytest.mark.parametrize('k,t', [(1, 0.07), (5, 0.07), (20, 0.5), (500, 0.1)])
def test_knn_equals_a_loop(k, t):
    f, y = blobs()
    q = torch.randn(17, 8, generator=gen(1))
    want = torch.zeros(17, 3).double()
    for i, a in enumerate(q.double()):
        cos = [(float(a @ b / a.norm() / b.norm()), int(c)) for b, c in zip(f.double(), y)]
        best = sorted(cos, reverse=True)[:k]
        for s, c in best:
            want[i, c] += math.exp(s / t) / sum(math.exp(s / t) for s, _ in best)
    assert torch.allclose(knn_predict(f, y, q, k=k, temperature=t).double(), want, atol=1e-4)
    assert torch.allclose(
        knn_predict(f, y, q, k=k, temperature=t, bs=3), knn_predict(f, y, q, k=k, temperature=t), atol=1e-5
    )
    assert torch.allclose(
        knn_predict(f, F.one_hot(y, 3), q, k=k, temperature=t), knn_predict(f, y, q, k=k, temperature=t)
    )


def test_knn_scale_unknown_labels_and_small_temperature():
    f, y = blobs()
    assert torch.allclose(knn_predict(f * 7, y, f * 0.1), knn_predict(f, y, f), atol=1e-4)
    assert torch.equal(knn_predict(f, y, f, temperature=1e-4).argmax(1), y)  # only itself counts, nothing overflows
    multi = F.one_hot(y, 3).double()
    multi[:60, 1] = math.nan
    got, some = knn_predict(f, multi, f[:5]), knn_predict(f[60:], multi[60:], f[:5], k=60)
    assert got.isfinite().all() and ((got >= 0) & (got <= 1)).all()
    assert torch.allclose(knn_predict(f, multi, f[:5], k=120)[:, 1], some[:, 1], atol=1e-5)


def test_retrieval_equals_a_loop():
    f, who = torch.randn(40, 5, generator=gen()), torch.randint(8, (40,), generator=gen(1)).tolist()
    barred = torch.randint(5, (40,), generator=gen(2)).tolist()
    for ex in (None, barred):
        hits = []
        for i in range(40):
            cand = [j for j in range(40) if j != i and (ex is None or ex[j] != ex[i])]
            if not any(who[j] == who[i] for j in cand):
                continue
            hits.append(who[max(cand, key=lambda j: F.cosine_similarity(f[i], f[j], dim=0))] == who[i])
        assert retrieval_at_1(f, who, ex) == pytest.approx(sum(hits) / len(hits))
        assert retrieval_at_1(f, who, ex, bs=7) == retrieval_at_1(f, [f'P{w}' for w in who], ex)
    with pytest.raises(ValueError, match='groups'):
        retrieval_at_1(f, range(40))
    with pytest.raises(ValueError, match='groups'):
        retrieval_at_1(f, who[:5])


def test_probe_separates_what_is_separable():
    f, y = blobs(gap=8.0)
    g, z = blobs(60, gap=8.0, seed=1)
    p, l2 = linear_probe(f, y, g, groups=torch.arange(120) // 2)
    assert (p.argmax(1) == z).all() and torch.allclose(p.sum(1), torch.ones(60).double()) and p.dtype == torch.float64
    m, _ = linear_probe(f, F.one_hot(y), g, F.one_hot(z))
    assert all(auroc(z == c, m[:, c]) == 1 for c in range(3))


def test_probe_equals_scikit_learn():
    f, y = blobs(gap=1.0)
    z = ((f - f.mean(0)) / f.std(0, correction=0)).double()
    multi = torch.stack([y == 0, y == 1, torch.rand(120, generator=gen()) < 0.4], 1).double()
    got = linear_probe(f, multi, f, l2s=[0.05])[0]
    for c in range(3):
        ref = LogisticRegression(C=1 / (120 * 0.05), tol=1e-10, max_iter=1000).fit(z, multi[:, c])
        assert np.allclose(got[:, c], ref.predict_proba(z)[:, 1], atol=1e-5)
    ref = LogisticRegression(C=1 / (120 * 0.05), tol=1e-10, max_iter=1000).fit(z, y)
    assert np.allclose(linear_probe(f, y, f, l2s=[0.05])[0], ref.predict_proba(z), atol=1e-5)


def test_unknown_labels_have_no_part_in_the_fit():
    f, y = blobs(gap=1.0)
    multi = torch.stack([y == 0, y == 1], 1).double()
    multi[50:, 0] = math.nan
    multi[:30, 1] = math.nan
    got = linear_probe(f, multi, f, l2s=[0.1])[0]
    z = ((f - f.mean(0)) / f.std(0, correction=0)).double()
    for c, known in enumerate([slice(0, 50), slice(30, 120)]):
        n = len(range(120)[known])
        ref = LogisticRegression(C=1 / (n * 0.1), tol=1e-10, max_iter=1000).fit(z[known], multi[known, c])
        assert np.allclose(got[:, c], ref.predict_proba(z)[:, 1], atol=1e-5)


def test_strength_is_chosen_on_valid_and_test_is_only_scored():
    f, y = blobs(90, 2, 60, gap=0.8)
    v, vy = blobs(200, 2, 60, gap=0.8, seed=1)
    t, ty = blobs(50, 2, 60, gap=0.8, seed=2)
    p, l2 = linear_probe(f, y, v, vy, t)
    each = {s: linear_probe(f, y, v, vy, l2s=[s])[0] for s in (10.0, 1.0, 0.1, 0.01, 0.001, 0.0001)}
    score = {s: (auroc(vy == 0, q[:, 0]) + auroc(vy == 1, q[:, 1])) / 2 for s, q in each.items()}
    assert score[l2] == pytest.approx(max(score.values()), abs=1e-4)
    assert p.shape == (50, 2) and torch.allclose(p, linear_probe(f, y, t, l2s=[l2])[0], atol=1e-4)
    assert torch.equal(linear_probe(f, y, v, vy, t)[0], p)  # to the bit
    assert torch.equal(linear_probe(f, y, v, vy, t.flip(0))[0].flip(0), p) and linear_probe(f, y, v, vy, t * 9)[1] == l2


def test_folds_keep_patients_whole():
    who = torch.randint(40, (200,), generator=gen(1))
    fold = _folds([f'P{w}' for w in who], 200, 3, seed=0)
    assert set(fold.tolist()) == {0, 1, 2} and all(len(fold[who == w].unique()) == 1 for w in who.unique())
    assert torch.equal(fold, _folds(who, 200, 3, seed=0)) and not torch.equal(fold, _folds(who, 200, 3, seed=1))


def test_a_coin_a_patient_is_found_by_a_split_of_images_only():
    who = torch.arange(40).repeat_interleave(5)  # fewer patients than features: a line can tell each from the others
    coin = torch.randint(2, (40,), generator=gen(1))[who]
    f = torch.randn(40, 64, generator=gen(2))[who] + 0.1 * torch.randn(200, 64, generator=gen(3))

    def score(groups):
        out = _folds(groups, 200, 3, seed=0) == 0
        return auroc(coin[out], linear_probe(f[~out], coin[~out], f[out], l2s=[0.1])[0][:, 1])

    assert score(None) > 0.95 and score(who) < 0.8


def test_constant_feature_is_harmless():
    f, y = blobs()
    f = torch.cat([f, torch.full((120, 1), 3.0)], 1)
    a, b = linear_probe(f, y, f, l2s=[1.0])[0], linear_probe(f[:, :-1], y, f[:, :-1], l2s=[1.0])[0]
    assert torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize(
    'change,word',
    [
        (dict(train_feats=torch.full((120, 8), math.nan)), '^train_feats'),
        (dict(train_y=[0] * 5), '^train_y'),
        (dict(train_y=[0] * 120), 'no class has both'),
        (dict(valid_feats=torch.zeros(4, 3)), '^valid_feats'),
        (dict(test_feats=torch.zeros(4, 3)), '^test_feats'),
        (dict(valid_y=[7] * 10), '^valid_y'),
        (dict(groups=[1] * 120), '^groups'),
        (dict(groups=[1] * 3), '^groups'),
        (dict(train_y=[0.5] * 120), '^train_y'),
    ],
)
def test_bad_input_names_the_argument(change, word):
    f, y = blobs()
    with pytest.raises(ValueError, match=word):
        linear_probe(**{**dict(train_feats=f, train_y=y, valid_feats=f[:10]), **change})


def test_plot_embedding_draws_labels_and_numbers():
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    c = torch.randn(20, 2, generator=gen()).numpy()
    ax = plot_embedding(c, ['a', 'b'] * 10, title='t')
    assert (
        len(ax.collections) == 2
        and [t.get_text() for t in ax.get_legend().get_texts()] == ['a', 'b']
        and ax.get_title() == 't'
    )
    fig, ax = plt.subplots()
    assert plot_embedding(c, np.linspace(0, 1, 20), ax) is ax and len(fig.axes) == 2  # with a colour bar
    assert len(plot_embedding(c).collections) == 1
    with pytest.raises(ValueError, match='labels'):
        plot_embedding(c, [1])
    with pytest.raises(ValueError, match='feats'):
        umap_coords(torch.full((9, 2), math.nan))
    plt.close('all')


def test_umap_is_not_imported_with_the_module():
    tops = [
        n
        for n in ast.parse(open(embed.__file__, encoding='utf8').read()).body
        if isinstance(n, (ast.Import, ast.ImportFrom))
    ]
    names = [getattr(n, 'module', None) or n.names[0].name for n in tops]
    assert 'torch' in ' '.join(names) and not any(n.startswith('umap') for n in names)


# ---- the command, neighbours and the interactive map (gallery); ridge and Grad-CAM (explain)


@pytest.fixture(scope='module')
def films(tmp_path_factory):
    "40 phantoms, two broken files among them, and two backbones"
    root = tmp_path_factory.mktemp('films')
    write_phantoms(root / 'x', 40, size=32, progress=False)
    names = sorted((root / 'x' / 'images').iterdir())
    names[3].write_bytes(b'no image')
    names[7].write_bytes(b'')
    for seed in (0, 1):
        torch.manual_seed(seed)
        export_backbone(create_encoder('resnet18', channels=1), root / f'body{seed}.safetensors', dict(size=32))
    return root


@pytest.fixture(scope='module')
def done(films):
    with pytest.warns(UserWarning, match='2 of 40 images cannot be read'):
        return gallery.embed_images(
            films / 'body0.safetensors', films / 'x', films / 'out', chunk=10, workers=0, progress=False
        )


def again(films, body='body0', out='out', **kw):
    return gallery.embed_images(
        films / f'{body}.safetensors', films / 'out-cache', films / out, **{'chunk': 10, 'progress': False, **kw}
    )


def test_features_of_a_folder_skip_and_list_bad_files(films, done):
    feats, cache, new = done
    assert feats.shape == (38, 512) and new == 4
    (bad, rows), held = (
        (pd.read_csv(films / 'out' / f'{n}.csv') for n in ('bad', 'rows')),
        np.load(films / 'out/features.npz'),
    )
    assert len(bad) == 2 and bad.reason.notna().all() and len(rows) == 38 and not set(bad.path) & set(rows.path)
    assert np.array_equal(held['feats'], feats.numpy())
    body = load_backbone(films / 'body0.safetensors')
    want = extract_features(body, torch.from_numpy(cache.images[:])[:, None], prepare=Prepare(channels=1))
    assert torch.allclose(feats, want, atol=1e-4)


def test_finished_chunks_are_not_computed_again(films, done, monkeypatch):
    calls = []
    compute = gallery.extract_features
    monkeypatch.setattr(gallery, 'extract_features', lambda *a, **k: calls.append(len(a[1])) or compute(*a, **k))
    assert torch.equal(again(films)[0], done[0]) and not calls


def test_stopped_damaged_and_stale_chunks(films, done, monkeypatch):
    "A run stopped in its third chunk goes on there; a truncated file is computed again; other weights compute all, other pixels only theirs"
    compute, n = gallery.extract_features, []

    def stop(*a, **k):
        if len(n) == 2:
            raise KeyboardInterrupt
        n.append(1)
        return compute(*a, **k)

    monkeypatch.setattr(gallery, 'extract_features', stop)
    with pytest.raises(KeyboardInterrupt):
        again(films, out='cut')
    monkeypatch.setattr(gallery, 'extract_features', compute)
    assert not (films / 'cut/features.npz').exists()
    feats, _, new = again(films, out='cut')
    assert new == 2 and torch.equal(feats, done[0])
    hurt = sorted((films / 'cut/chunks').iterdir())[0]
    hurt.write_bytes(hurt.read_bytes()[:-9])
    assert again(films, out='cut')[2] == 1
    assert again(films, 'body1', 'cut')[2] == 4 and len(list((films / 'cut/chunks').iterdir())) == 4


def test_embed_refuses_what_it_cannot_use(films, done, tmp_path):
    with pytest.raises(DataError, match='neither a folder nor'):
        gallery.embed_images(films / 'body0.safetensors', films / 'none', tmp_path / 'o')
    with pytest.raises(DataError, match='build it with --size 64'):
        again(films, size=64)
    used = f"^{films / 'out'}: was begun with .*size 32 there and 24 here.*; choose another --out, or delete"
    with pytest.raises(DataError, match=used):
        gallery.embed_images(films / 'body0.safetensors', films / 'x', films / 'out', size=24)
    with pytest.raises(DataError, match='size and chunk'):
        again(films, chunk=0)
    with pytest.raises(DataError, match='is a cache'):
        again(films, where='view=PA')
    with pytest.raises(WeightsError, match='architecture'):
        again(films, out='o', arch='resnet34')
    with pytest.raises(SystemExit, match='^c2l_embed: .*none.safetensors'):
        gallery.main(str(films / 'none.safetensors'), str(films / 'x'), out=str(tmp_path / 'o'))
    torch.save(dict(a=nn.Linear(2, 2)), tmp_path / 'pickle.pt')
    with pytest.raises(SystemExit, match='pickle'):
        gallery.main(str(tmp_path / 'pickle.pt'), str(films / 'out-cache'), out=str(tmp_path / 'o'))
    with pytest.raises(SystemExit, match='k must be'):
        gallery.main(str(films / 'body0.safetensors'), str(films / 'out-cache'), out=str(tmp_path / 'o'), k=0)


def test_command_writes_neighbours_and_a_report(films, done, monkeypatch, capsys):
    monkeypatch.setattr(gallery, 'umap_coords', lambda f, **k: f[:, :2].numpy())
    gallery.main(
        str(films / 'body0.safetensors'), str(films / 'out-cache'), out=str(films / 'out'), k=2, chunk=10, others=False
    )
    assert '512 features of 38 images, 0 chunks computed now; 2 files could not be read' in capsys.readouterr().out
    table = pd.read_csv(films / 'out/neighbours.csv')
    assert (
        len(table) == 76
        and (table.path != table.neighbour_path).all()
        and table.groupby('image')['rank'].apply(list).map(lambda r: r == [1, 2]).all()
    )
    html = (films / 'out/report.html').read_text()
    assert str(films) not in html and html.count('<circle') == 38 and not re.search(r'src="http|href=|//[a-z]+\.', html)
    gallery.main(str(films / 'body0.safetensors'), str(films / 'out-cache'), out=str(films / 'out'), chunk=10, most=0)
    assert '<circle' not in (films / 'out/report.html').read_text()
    args = vars(anno_parser(gallery.main, 'c2l_embed').parse_args(['B.safetensors', 'films', '--others', '--k', '3']))
    assert (args['backbone'], args['images'], args['others'], args['k'], args['out']) == (
        'B.safetensors',
        'films',
        True,
        3,
        'c2l_features',
    )


def test_features_of_a_folder_are_computed_on_the_default_device(films, done, monkeypatch, other_default):
    used = []

    def extract(encoder, x, device, **_):
        used.append(torch.device(device).type)
        return torch.rand(len(x), 4)

    monkeypatch.setattr(gallery, 'extract_features', extract)
    again(films, 'body1', 'other')
    again(films, 'body1', 'another', device='cpu')
    assert set(used[:4]) == {'meta'} and set(used[4:]) == {'cpu'}


def test_embed_refuses_wrong_device_and_several_processes(films, done, tmp_path, monkeypatch):
    command = [str(films / 'body0.safetensors'), str(films / 'out-cache'), str(tmp_path / 'o')]
    with pytest.raises(SystemExit, match="c2l_embed: device 'gpu' cannot be used here"):
        gallery.main(*command, device='gpu')
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(SystemExit, match='c2l_embed: .* runs in one process, and 2 were started'):
        gallery.main(*command)
    assert not list(tmp_path.iterdir())


def test_features_are_computed_where_the_encoder_is_unless_a_device_is_named(net, x, other_default):
    assert extract_features(net, x).device.type == 'cpu' and devices_of(net) == {'cpu'}
    with pytest.raises(ValueError, match="device 'gpu' cannot be used here"):
        extract_features(net, x, 'gpu')


class OfAMac(torch.Tensor):
    "A tensor on a GPU without float64, for those who read it; NumPy cannot"

    def cpu(self):
        return self.as_subclass(torch.Tensor)

    def double(self):
        raise TypeError("Cannot convert a MPS Tensor to float64")

    def __array__(self, *_):
        raise TypeError("can't convert a GPU's tensor to numpy")


def test_features_labels_and_patients_may_be_on_a_gpu():
    f, y = blobs()
    groups = torch.arange(len(f)) // 2
    there = [t.as_subclass(OfAMac) for t in (f, y, groups)]
    assert torch.equal(knn_predict(there[0].cpu(), there[1], f), knn_predict(f, y, f))
    probe = linear_probe(f, y, f, y, l2s=[0.1])[0]
    assert torch.equal(linear_probe(there[0], there[1], there[0], there[1], l2s=[0.1])[0], probe)
    assert retrieval_at_1(f, there[2]) == retrieval_at_1(f, groups)


def test_nearest_equals_a_loop():
    f = torch.randn(40, 6, generator=gen())
    who = [f'p{i // 4}' for i in range(40)]
    at, cos = gallery.nearest(f, 5, groups=who, bs=7)
    u = F.normalize(f)
    for i in range(40):
        s = [(-(u[i] @ u[j]).item(), j) for j in range(40) if who[i] != who[j]]
        assert at[i].tolist() == [j for _, j in sorted(s)[:5]] and cos[i, 0] == pytest.approx(-min(s)[0], abs=1e-6)
    assert (gallery.nearest(f[:4], 9, groups=['a'] * 4)[0] == -1).all() and gallery.nearest(f[:3], 9)[0].shape == (3, 3)


def test_scatter_is_one_safe_piece():
    images = (torch.rand(7, 20, 20, generator=gen()) * 255).byte().numpy()
    html = gallery.scatter_html(
        np.random.default_rng(0).random((7, 2)),
        images,
        {'a"<b': ['</script>'] * 7, 'n': np.array([1.0, np.nan, 3, 4, 5, 6, 7])},
        side=8,
    )
    data = json.loads(re.search(r'const d = (\{.*\}), box', html)[1])
    assert (
        html.count('</script>') == 1
        and data['text'][1].startswith('a"<b: </script>')
        and len(data['colours']['n'][0]) == 7
    )
    assert data['colours']['n'][0][1] == '#bbb' and len(html) < 20_000
    with pytest.raises(ValueError, match='^n does not have 7'):
        gallery.scatter_html(np.zeros((7, 2)), images, {'n': [1]})


def test_twelve_labels_look_different():
    ax = plot_embedding(np.random.default_rng(0).random((24, 2)), [f'l{i % 12}' for i in range(24)])
    looks = {(tuple(c.get_facecolor()[0][:3]), c.get_paths()[0].vertices.tobytes()) for c in ax.collections}
    assert len(looks) == 12 == len(ax.get_legend().get_texts())


def test_decode_holds_patients_apart_and_r2_is_scikit_learns():
    who = torch.arange(60).repeat_interleave(3)
    secret = torch.randn(60, generator=gen())[who]
    identity = torch.randn(60, 30, generator=gen(1))[who] + 0.1 * torch.randn(180, 30, generator=gen(2))
    y = torch.stack([secret, identity[:, 0] + 0.1 * torch.randn(180, generator=gen(3))], 1)
    p = explain.decode(identity, y, who)
    assert (
        explain.r2(y[:, 0], p[:, 0]) < 0.05 and explain.r2(y[:, 1], p[:, 1]) > 0.9
    )  # a number of a patient cannot be read from who they are
    assert explain.r2(y[:, 1], p[:, 1]).item() == pytest.approx(r2_score(y[:, 1], p[:, 1]), abs=1e-6)
    counts, patient = patient_counts(who.numpy(), 180, 20)
    twice = explain.r2(y[:, 1], p[:, 1], counts, patient)
    at = torch.repeat_interleave(torch.arange(180), counts[3].long()[patient])
    assert twice.shape == (20,) and twice[3].item() == pytest.approx(r2_score(y[at, 1], p[at, 1]), abs=1e-6)
    with pytest.raises(ValueError, match='^feats'):
        explain.decode(identity * math.nan, y)


def test_grad_cam_is_the_class_activation_map_and_leaves_no_trace(x):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    ).train()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    with torch.no_grad():
        cam = explain.grad_cam(net, x, 2, net[2])
    assert not x.requires_grad
    assert (
        net.training
        and all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
        and all(p.grad is None for p in net.parameters())
    )
    net.eval()
    with torch.no_grad():
        want = (net[5].weight[2][:, None, None] * net[:3](x)).sum(1).relu() / 144
    assert torch.allclose(cam, want, atol=1e-6)
    hit = explain.box_scores(torch.ones(1, 8, 8), [(0, 0, 4, 4)])[0].tolist()
    assert hit == [0.25, 0.25, 0.25]


def test_map_gets_the_exact_neighbours():
    "Each row's nearest under cosine distance, itself first, against scikit-learn; in parts as at once"
    f = torch.randn(60, 5, generator=torch.Generator().manual_seed(0))
    positions, distances = _nearest(f, 7, batch=16)
    finder = NearestNeighbors(n_neighbors=7, metric='cosine', algorithm='brute').fit(f.double().numpy())
    expected, order = finder.kneighbors(f.double().numpy())
    assert np.array_equal(positions, order) and np.allclose(distances, expected, atol=1e-6)
    assert np.array_equal(positions[:, 0], np.arange(60))
