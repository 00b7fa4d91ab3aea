"`c2l_table`: the paper's numbers, each column's config, sharing, skipping, resuming, rendering."
import os, shlex
import numpy as np, pandas as pd, pytest, torch
import c2l_nb.paper.genesis as baselines, c2l_nb.paper.scoring as scoring, c2l_nb.paper.tables as module
from fastai.basics import no_random
from c2l_nb.paper.experiments import ABLATIONS, PAPER, QUEUES, ablation, slips
from c2l_nb.evaluation.metrics import auroc_table, paired_difference
from c2l_nb.method.model import C2L, C2LConfig
from c2l_nb.tasks.classify import features_of, finetune_learner, load_body
from c2l_nb.method.encoder import create_encoder
from c2l_nb.data.phantom import phantom_batch
from c2l_nb.tasks.pretrain import _number, choose_config
from c2l_nb.paper.scoring import tasks
from c2l_nb.paper.tables import SCALES, TABLES, Start, columns, commands, gpu_hours, make, plan, read_pool, render, run_table, settings, text
from c2l_nb.training.weights import export_backbone
from stand_in import other_default

pytestmark = pytest.mark.filterwarnings('ignore:the queue of', 'ignore:Your generator is empty', 'ignore:.*jit.script', 'ignore:no positive or no negative', 'ignore:no image is labelled')
LOAD = scoring.load_data
TINY = dict(size=24, n_phantoms=80, epochs=1, batch=16, untrained=1, tune=0)

def few(data, size, *a, **k):
    "In place of phantoms, whose drawing takes longer than all else here: noise, brighter where `Mass` is"
    g, rows = torch.Generator().manual_seed(0), pd.DataFrame(dict(seed=range(80), patient=[f'p{i//2}' for i in range(80)]))
    rows = rows.assign(split=['train']*48 + ['valid']*32, labels=['Mass' if i//2 % 2 else 'No Finding' for i in range(80)])
    images = torch.randint(100, (80, size, size), generator=g) + 100*torch.tensor([i//2 % 2 for i in range(80)]).view(-1, 1, 1)
    return images.byte().numpy(), rows, f'noise {size}'

@pytest.fixture(scope='module', autouse=True)
def noise():
    with pytest.MonkeyPatch.context() as mp:
        mp.setattr(scoring, 'load_data', few); mp.setattr(baselines, 'load_data', few)
        yield

@pytest.fixture(scope='module')
def pool(noise): return read_pool('phantoms', TINY['size'])

def test_printed_numbers():
    assert {k: t.shape for k, t in PAPER.items()} == {'1': (15, 5), '2': (1, 9), '3': (15, 8), '4': (6, 8), '5': (7, 4)}
    assert PAPER['1'].loc['Nodule', 'ImageNet'] == 82.2 and PAPER['4'].loc['Edema', 'DenseNet-121 MoCo'] == 91.4
    assert PAPER['2'].T.Average.max() == PAPER['1'].loc['Average'].max() == 76.3

def test_slips_are_the_known_ones():
    s = slips().set_index(['table', 'column'])
    assert set(s.index) == {('1', 'ImageNet'), ('3', 'DenseNet-121 ImageNet'), ('4', 'DenseNet-121 MoCo')}
    assert s.loc[('1', 'ImageNet')].recomputed == pytest.approx(74.457, abs=1e-3) and s.loc[('4', 'DenseNet-121 MoCo')].recomputed == pytest.approx(87.54)

def test_every_row_of_the_ablations():
    paper = C2LConfig.paper()
    assert ablation('1', 'Bat. + Feat. Mix. + loss_M') == ablation('2', '+ cutout, mixup') == ablation('theta', 'θ 0.999') == paper
    assert ablation('1', 'No mixup') == ablation('2', '+ cutout') == C2LConfig.moco()
    assert ablation('1', 'Bat. Mix. + loss_M').loss_weights == (1., 1., 0.) and ablation('1', 'Bat. Mix. + loss_M').enqueue == ('A', 'M')
    assert [ablation('2', q).queue_size for q in QUEUES] == [2**11, 2**13, 2**17, 2**15]
    assert all(ablation('2', q).rotation == 0 and ablation('2', q).cutout[0] == 0 for q in QUEUES) and ablation('2', '+ jigsaw').jigsaw == 4
    assert 224 % ablation('2', '+ jigsaw').jigsaw == 0 and [ablation('theta', r).momentum for r in ABLATIONS['theta']] == [0, .9, .99, .999, .9999]
    with pytest.raises(ValueError, match='Bat. Mix.'): ablation('1', 'Nothing')

@pytest.mark.parametrize('row, shared', [('Mix.', False), ('Bat. Mix.', True)])
def test_mixed_views_take_the_place_of_plain_ones(row, shared):
    x, _ = phantom_batch(list(range(8)), [0]*8, size=24)
    body = lambda: torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3, 2), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())
    make_model = lambda c: C2L(body(), c.replace(queue_size=16, share_mix=c.share_mix))
    plain = make_model(C2LConfig.moco(share_mix=shared)); mixed = make_model(ablation('1', row))
    (a, b, *mix), (am, bm, *_) = (m.views(x, m.augmentation(24)) for m in (plain, mixed))
    lam, perm, lam2, perm2 = mix if not shared else mix*2
    assert torch.allclose(am, lam*a + (1 - lam)*a[perm], atol=1e-6) and torch.allclose(bm, lam2*b + (1 - lam2)*b[perm2], atol=1e-6)
    q, q_mix, k, k_mix, k_feat = mixed(am, bm, *mix)
    assert len(q) == len(k) == 8 and not len(q_mix) and not len(k_feat)           # one term, a MoCo step's cost
    with pytest.raises(ValueError, match='loss_A alone'): C2LConfig(mix_views=True)

def test_equal_pretrainings_have_one_name():
    key = lambda t, c, seed=0, mark='m': columns(t, seed=seed)[c].key(mark)
    assert key('1', 'Bat. + Feat. Mix. + loss_M') == key('2', '+ cutout, mixup') == key('3', 'ResNet-18 C2L') == key('5', 'ResNet-18 C2L') == key('theta', 'θ 0.999')
    assert len({key('3', 'ResNet-18 C2L'), key('3', 'DenseNet-121 C2L'), key('3', 'ResNet-18 C2L', 1), key('3', 'ResNet-18 C2L', 0, 'n'), key('3', 'ResNet-18 MG')}) == 5
    assert key('1', 'ImageNet', 0) == key('1', 'ImageNet', 1, 'n')
    half = columns('3', precision='bf16')
    assert half['ResNet-18 C2L'].key('m') != key('3', 'ResNet-18 C2L') and half['ResNet-18 MG'].key('m') != key('3', 'ResNet-18 MG')
    assert half['ResNet-18 untrained'].key('m') == key('3', 'ResNet-18 untrained')
    for t in PAPER: assert set(PAPER[t]) <= set(columns(t))
    sized = lambda size, c: columns('3', C2LConfig(size=size))[c].key('m')
    assert all(sized(48, f'ResNet-18 {c}') != sized(64, f'ResNet-18 {c}') for c in ('MG', 'C2L')) and sized(48, 'ResNet-18 untrained') == sized(64, 'ResNet-18 untrained')

@pytest.mark.parametrize('folder,said,found', [
    (lambda i: 'in', lambda i: i % 2, ['all']), (lambda i: f'in/part_{i % 3}', lambda i: i % 2, ['all']), (lambda i: f'in/{"ab"[i >= 40]}', lambda i: i % 2, ['all']),
    (lambda i: f'in/{"ab"[i >= 40]}', lambda i: 2*(i >= 40) + i % 2, ['a', 'b'])])
def test_folders_that_share_labels_are_one_task(folder, said, found):
    rows = pd.DataFrame(dict(path=[f'/x/{folder(i)}/{i}.png' for i in range(80)], labels=[f'label {said(i)}' for i in range(80)],
                             split=['train' if i % 40 < 20 else 'test' for i in range(80)]))
    asked = tasks(rows.assign(split=rows.split.replace('test', 'valid')), 'valid')
    assert list(asked) == found and sum(len(a) + len(b) for _, a, b in asked.values()) == 80
    assert all(not set(a) & set(b) for _, a, b in asked.values())

def test_rendered_numbers_are_those_of_the_metrics():
    g = np.random.default_rng(0)
    y = pd.DataFrame((g.random((150, 3)) < .4).astype(float), columns=list('abc')); groups = np.arange(150)//3
    a, b = (y.values + s*g.normal(size=(150, 3)) for s in (1., 2.))
    t = render('1', {'No mixup': [a], 'Mix.': [b]}, y, groups).set_index('column')
    one, gap = auroc_table(y, b, groups).iloc[-1], paired_difference(y, b, a, groups).iloc[-1]
    assert t.loc['Mix.', ['ours', 'low', 'high']].tolist() == [round(100*v, 1) for v in (one.auroc, one.low, one.high)]
    assert t.loc['Mix.', ['gap', 'gap_low', 'gap_high']].tolist() == [round(100*v, 1) for v in (gap.difference, gap.low, gap.high)]
    assert t.loc['Mix.', 'paper'] == 74.7 and pd.isna(t.loc['No mixup', 'paper']) and '74.7' in text(t.reset_index())

@pytest.fixture(scope='module')
def table(noise, tmp_path_factory):
    "Two columns, the second killed within its first epoch, and the table asked for again"
    out = tmp_path_factory.mktemp('grid')
    take = ['No mixup', 'Bat. Mix.']
    with pytest.MonkeyPatch.context() as mp:
        whole = C2L.views
        def failing(self, x, augment):
            if self.config.mix_views and self.seen == 2: raise KeyboardInterrupt
            return whole(self, x, augment)
        mp.setattr(C2L, 'views', failing)
        with pytest.raises(KeyboardInterrupt): run_table('1', out=out, take=take, **TINY)
    before = {p.parent.name: p.stat().st_mtime_ns for p in out.glob('pretrained/*/backbone.safetensors')}
    return out, before, run_table('1', out=out, take=take, **TINY)

def test_what_is_done_is_skipped_and_the_rest_made(table):
    out, before, done = table
    assert len(before) == 1 and all((out/'pretrained'/n/'backbone.safetensors').stat().st_mtime_ns == t for n, t in before.items())
    assert len(list(out.glob('pretrained/*/backbone.safetensors'))) == 2
    t, = done.values()
    assert t[t.score == 'probe'].column.tolist() == ['No mixup', 'Bat. Mix.'] and t.ours.between(0, 100).all() and (t.low <= t.ours).all()
    md = next(out.glob('table1-smoke-*.md')).read_text()
    assert '75.3' in md and str(out) not in md and 'P0000' not in md

def test_another_call_computes_nothing(table, monkeypatch, capsys):
    out, _, done = table
    for at, name in (module, '_train'), (module, 'pretrain_genesis'), (scoring, 'extract_features'):
        monkeypatch.setattr(at, name, lambda *a, **k: pytest.fail('computed again'))
    again = run_table('1', out=out, take=['No mixup', 'Bat. Mix.'], **TINY)
    assert all(again[k].equals(done[k]) for k in done) and '0 pretrainings to make' in capsys.readouterr().out

def test_fine_tuning_is_that_of_the_classifier_once(table, pool, monkeypatch):
    "A body's tuned scores are those of `finetune_learner` from its file; killed between two bodies, the first is kept"
    out, args = table[0], dict(take=['No mixup', 'Bat. Mix.']) | TINY | dict(tune=1)
    whole, calls = scoring.run_cell, []
    def failing(*a, **k):
        calls.append(a)
        if len(calls) == 2: raise KeyboardInterrupt
        return whole(*a, **k)
    monkeypatch.setattr(scoring, 'run_cell', failing)
    with pytest.raises(KeyboardInterrupt): run_table('1', out=out, **args)
    t, = run_table('1', out=out, **args).values()
    assert len(calls) == 3 and t[t.score == 'tuned'].column.tolist() == ['No mixup', 'Bat. Mix.'] and t[t.score == 'tuned'].gap.notna().sum() == 1
    assert 'Fine-tuned, 1 epoch:' in next(out.glob('table1-smoke-*.md')).read_text()
    start = plan('1', pool, 1, 16)['No mixup'][0]
    kept = scoring.tune(start, None, out/'scores', pool, 1)['all']
    images, targets, train, valid, at, _, seed, s = calls[0]
    body = load_body(str(module.folder_of(start, out/'pretrained', pool)/'backbone.safetensors'))
    with no_random(seed, reproducible=False):
        learn = finetune_learner(images, targets, train, valid, *body, s['size'], 64, 1e-3, seed=seed)
        with learn.no_bar(), learn.no_logging(): learn.fit(1, 1e-3)
    assert np.array_equal(kept, learn.loss_func.activation(features_of(learn.model, images, at, s['size'])).numpy())

def test_interrupted_equals_uninterrupted(table, pool, tmp_path):
    start = plan('1', pool, 1, 16, 1, 1, ['Bat. Mix.'])['Bat. Mix.'][0]
    run = make(start, tmp_path, pool)
    load = lambda p: module.load_backbone(p/'backbone.safetensors', say=None).state_dict()
    a, b = load(run), load(table[0]/'pretrained'/run.name)
    assert all(torch.equal(u, v) for u, v in zip(a.values(), b.values()))

def test_a_run_that_collapses_is_a_result(tmp_path, pool, monkeypatch):
    "Here in half precision, which reaches the learner"
    seen, whole = [], module._learner
    monkeypatch.setattr(module, '_learner', lambda **k: seen.append(k['precision']) or whole(**k))
    start = columns('theta', C2LConfig.small(48, 3, batch_size=16, epochs=1, size=24, lr=float('nan')), precision='bf16')['θ 0.0']
    run = make(start, tmp_path, pool)
    assert 'loss is nan' in (run/'collapse.txt').read_text() and seen == ['bf16']

def test_paper_commands_give_the_configs():
    "What the printed command says is, parsed, the column's config"
    for t in ('1', '2', '3', *(t for t in TABLES if t not in '12345')):
        starts = [s for s in columns(t).values() if s.method == 'c2l']
        lines = [l for l in commands(t) if l.startswith('c2l_pretrain')]
        assert len(starts) == len(lines)
        for s, line in zip(starts, lines):
            args = shlex.split(line, comments=True)
            pairs = (args[args.index('--set') + 1].split() if '--set' in args else [])
            config = choose_config('paper', 10**6, None, None, **{k: _number(v) for k, v in (p.split('=') for p in pairs)})
            assert config == s.config and args[args.index('--arch') + 1] == s.arch
    assert sum('c2l_detect' in l for l in commands('5')) == 5 and gpu_hours('resnet18', 10**6, 240) > gpu_hours('resnet18', 10**6, 240, 4)

@pytest.mark.parametrize('args, said', [(('6',), 'one of 1, 2'), (('1', 'small'), 'set C2L_RADIOGRAPHS'), (('5', 'small'), 'set C2L_RADIOGRAPHS')])
def test_mistakes_are_named(args, said, tmp_path, monkeypatch):
    monkeypatch.delenv('C2L_RADIOGRAPHS', raising=False)
    with pytest.raises(ValueError, match=said): run_table(*args, out=tmp_path, n_phantoms=60)

def test_unknown_columns_are_named(tmp_path):
    with pytest.raises(ValueError, match='No mixup'): run_table('1', out=tmp_path, take=['Mixup'], **TINY)

def test_precision_of_a_scale():
    assert settings('1')['precision'] == 'fp32' and settings('1', 'small')['precision'] == 'bf16' == SCALES['small']['precision']
    with pytest.raises(ValueError, match='precision must be'): settings('1', precision='int8')

@pytest.fixture(scope='module')
def bodies(tmp_path_factory):
    "In place of every pretraining: one untrained body an architecture"
    out = tmp_path_factory.mktemp('bodies')
    def quick(start, run, pool):
        file = out/f'{start.arch}.safetensors'
        if not file.exists(): export_backbone(C2L(create_encoder(start.arch, 1), start.config.replace(queue_size=16)), file)
        os.link(file, run/'backbone.safetensors')
    return quick

@pytest.mark.parametrize('name, take', [('2', ['Crop, Q 2^15', '+ cutout, mixup']), ('4', ['ResNet-18 MoCo', 'ResNet-18 untrained']),
                                        ('theta', ['θ 0.0', 'θ 0.999']), ('beyond', None)])
def test_every_table_is_rendered(name, take, bodies, tmp_path, monkeypatch):
    if name not in TABLES: pytest.skip('no such table yet')
    monkeypatch.setattr(module, '_train', bodies)
    monkeypatch.setattr(scoring, 'linear_probe', lambda f, y, g, groups: (scoring.knn_predict(f, y, g, k=40),))       # quicker
    take = take or ['C2L', list(ABLATIONS[name])[-1]]
    t, = run_table(name, out=tmp_path, take=take, **TINY).values()
    md = next(tmp_path.glob(f'table{name}-smoke-*.md')).read_text()
    assert t.column.tolist() == 2*take and t.ours.between(0, 100).all() and t.gap.notna().sum() == 2
    assert ('paper' in md) == (name in PAPER) and all(f'| {n} |' in md for n in take)

def test_table_5_is_trained_once_and_resumed(bodies, tmp_path, monkeypatch):
    "Killed between two detectors; the pretraining is that of Table 3"
    take, whole, calls = ['ResNet-18 MoCo', 'ResNet-18 untrained'], module.detect, []
    monkeypatch.setattr(module, '_train', bodies)
    def failing(out, init, **k):
        calls.append(init)
        if len(calls) == 2: raise KeyboardInterrupt
        return whole(out=out, init=init, **k)
    monkeypatch.setattr(module, 'detect', failing)
    args = dict(out=tmp_path, take=take, **TINY | dict(size=32), detect=dict(size=64, width=32, epochs=1, batch=8, n_phantoms=24))
    with pytest.raises(KeyboardInterrupt): run_table('5', **args)
    t = run_table('5', **args)['boxes']
    assert len(calls) == 3 and calls[0].endswith('backbone.safetensors') and calls[1:] == ['untrained']*2
    c2l = plan('3', read_pool('phantoms', 32), 1, 16)['ResNet-18 MoCo'][0]
    assert [p.parent.name for p in tmp_path.glob('pretrained/*/backbone.safetensors')] == [f'c2l-resnet18-{c2l.key("noise 40")}']
    assert t.column.tolist() == [take[0]]*7 + [take[1]]*7 and t.ours.between(0, 100).all() and (t.low <= t.high).all()
    assert t.paper[:7].tolist() == PAPER['5']['ResNet-18 MoCo'].tolist() and t.gap.notna().sum() == 7
    assert '| 0.2 |' in (tmp_path/'table5-smoke-boxes-valid.md').read_text()

@pytest.mark.slow
def test_side_by_side(tmp_path, monkeypatch):
    "Two processes make two pretrainings; the table is that of one process"
    for m in scoring, baselines: monkeypatch.setattr(m, 'load_data', LOAD)                    # what the processes read: phantoms
    args = dict(take=['No mixup', 'Bat. Mix.'], **TINY | dict(n_phantoms=320, batch=64))
    a, b = run_table('1', out=tmp_path/'one', **args), run_table('1', out=tmp_path/'two', jobs=2, **args)
    assert len(list(tmp_path.glob('two/pretrained/*/backbone.safetensors'))) == 2 and all(a[k].equals(b[k]) for k in a)

@pytest.mark.parametrize('visible, found', [(None, '0101'), ('2,3', '2323')])
def test_each_job_has_a_gpu_that_is_there(visible, found, monkeypatch):
    "More jobs than GPUs share them: a number that does not exist would send a job to the CPU"
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    if visible: monkeypatch.setenv('CUDA_VISIBLE_DEVICES', visible)
    else: monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    assert ''.join(module._own_gpu(slot)['CUDA_VISIBLE_DEVICES'] for slot in range(4)) == found
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 0)
    assert module._own_gpu(0) == {}

def test_several_processes_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(ValueError, match='a table runs in one process'): run_table('1', out=tmp_path/'out', **TINY)
    assert not list(tmp_path.iterdir())

def test_bodies_are_asked_on_the_default_device(pool, monkeypatch, other_default):
    used = []
    def extract(body, x, device, **_):
        used.append(torch.device(device).type)
        return torch.rand(len(x), 4)
    monkeypatch.setattr(scoring, 'extract_features', extract)
    scoring.ask(create_encoder('resnet18', 1), None, pool, tasks(pool.rows, 'valid'))
    assert used == ['meta']

@pytest.mark.slow
def test_scores_along_a_run(tmp_path, pool, monkeypatch):
    monkeypatch.setattr(scoring, 'linear_probe', lambda f, y, g, groups: (scoring.knn_predict(f, y, g, k=40),))       # quicker
    start = Start('c2l', 'resnet18', 0, C2LConfig.moco(queue_size=64, batch_size=48, epochs=10, size=24))
    t = module.along(make(start, tmp_path, pool), pool)
    assert t.epoch.tolist() == [0, 2, 4, 6, 8, 10] and t.probe.between(0, 1).all() and t.knn.between(0, 1).all()

@pytest.mark.parametrize('bad,said', [(dict(split='tset'), "no image is in it"), (dict(untrained=-1), 'untrained=-1'), (dict(seeds=0), 'seeds=0'), (dict(epochs=0), 'epochs=0')])
def test_what_cannot_work_is_said_before_anything_is_trained(bad, said, tmp_path, monkeypatch):
    monkeypatch.setattr(module, 'make', lambda *a: pytest.fail('something was trained'))
    with pytest.raises(ValueError, match=said): run_table('1', out=tmp_path, **TINY | bad)
