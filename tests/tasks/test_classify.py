"Fine-tuning: masks and policies, what stays frozen, the choice of the epoch, resume and repetition to the bit, bad input."
import pickle, warnings
import numpy as np, pandas as pd, pytest, torch
from fastcore.script import anno_parser
from safetensors.torch import save_file
from torch import nn
import c2l_nb.tasks.classify as module
from c2l_nb.tasks.classify import Classifier, KeepBest, features_of, finetune_learner, load_body, splitter
from c2l_nb.evaluation.comparison import compare, read_run, roc_points
from c2l_nb.data.collections import CHEXPERT5, CHEXPERT14, DataError
from c2l_nb.method.encoder import Prepare, create_encoder
from c2l_nb.tasks.classify import card_arch, card_size, finetune, plan
from c2l_nb.evaluation.metrics import auroc
from c2l_nb.data.leakage import check_split
from c2l_nb.tasks.targets import LabelLoss, Targets, check_fraction, check_targets, draw_fraction, make_targets
from c2l_nb.training.weights import WeightsError, export_backbone
from stand_in import devices_in_fit, devices_of, other_default

pytestmark = pytest.mark.filterwarnings('ignore:.*jit.*', 'ignore:no positive', 'ignore:no image is labelled', 'ignore:Mean of empty')
TINY = dict(size=16, epochs=2, batch=32, lr=1e-3, n_boot=20, labels=['Top', 'Left'])

def squares(n=80, size=20, seed=0):
    "Noise, brighter at the top or on the left where the label says so; two images a patient"
    g = torch.Generator().manual_seed(seed)
    y = (torch.rand(n//2, 2, generator=g) < .5).repeat_interleave(2, 0).numpy()
    x = torch.randint(60, 120, (n, size, size), generator=g, dtype=torch.uint8).numpy()
    x[y[:, 0], :size//2] += 60; x[y[:, 1], :, :size//2] += 60
    rows = pd.DataFrame(dict(patient=[f'SECRET{i//2}' for i in range(n)], labels=['|'.join(np.array(['Top', 'Left'])[v]) or 'No Finding' for v in y]))
    part = np.arange(n)//2 % 5
    return x, rows.assign(path=[f'/secret/{i}.png' for i in range(n)], split=np.where(part < 3, 'train', np.where(part < 4, 'valid', 'test')))

@pytest.fixture(autouse=True)
def data(monkeypatch):
    "Small squares in place of phantoms"
    held = list(squares())
    monkeypatch.setattr(module, 'load_data', lambda data, size, *args: (*held, 'mark'))
    return held

@pytest.fixture(autouse=True)
def no_pictures(monkeypatch): monkeypatch.setattr('c2l_nb.evaluation.comparison._sections', lambda *args: {})      # `run` alone draws its report

@pytest.fixture(scope='module')
def backbone(tmp_path_factory):
    path = tmp_path_factory.mktemp('weights')/'backbone.safetensors'
    return export_backbone(load_body('untrained', seed=5)[0], path, dict(mean=[.4], std=[.2]))

@pytest.fixture(scope='module')
def run(tmp_path_factory, backbone):
    with pytest.MonkeyPatch.context() as mp:
        mp.setattr(module, 'load_data', lambda data, size, *args: (*squares(), 'mark'))
        out = tmp_path_factory.mktemp('runs')/'whole'
        return out, finetune(out=out, init=['untrained', f'C2L={backbone}'], fractions=[.5, 1.], draws=2, **{**TINY, 'epochs': 1})

# The run folder

def test_run_folder(run):
    "Everything is there; the table follows from the stored scores"
    out, (scores, differences) = run
    names = {p.name for p in out.iterdir()}
    assert names == {'config.json', 'labels.csv', 'predictions', 'curves', 'scores.csv', 'differences.csv', 'curves.csv', 'table.csv', 'report.html'}
    truth, cells, patient, curves = read_run(out)
    assert list(cells) == [(i, f, d, 0) for i in ('untrained', 'C2L') for f, d in ((.5, 0), (.5, 1), (1., 0))] and len(truth) == 16
    by_hand = np.mean([[auroc(truth[c], cells['C2L', .5, d, 0][:, i]) for i, c in enumerate(truth)] for d in (0, 1)], 0)
    got = scores[(scores.init == 'C2L') & (scores.fraction == .5)].auroc.values
    assert got[:2] == pytest.approx(by_hand) and got[2] == pytest.approx(by_hand.mean())
    assert {'init', 'fraction', 'draw', 'seed', 'epoch', 'valid_loss', 'auroc', 'chosen'} <= set(curves) and (curves.groupby(['init', 'fraction', 'draw']).chosen.sum() == 1).all()
    assert (differences.init == 'C2L').all() and (differences.minus == 'untrained').all()
    assert (out/'report.html').read_text(encoding='utf-8').count('data:image/png') >= 4

def test_no_patient_and_no_path_is_written(run, backbone):
    for p in run[0].rglob('*'):
        if p.is_file(): assert not any(w in p.read_text(encoding='utf-8') for w in ('SECRET', '/secret', str(backbone.parent))), p.name

def test_table_has_a_column_an_init(run):
    t = pd.read_csv(run[0]/'table.csv')
    assert list(t.columns) == ['class', 'untrained', 'C2L', 'fraction'] and t['class'].tolist() == ['Top', 'Left', 'mean']*2

# Resume and repetition

def test_resume_trains_what_is_missing_to_the_same_bits(run, backbone, monkeypatch):
    "One cell is lost: it alone is trained again, and its file is the same"
    out, args = run[0], dict(init=['untrained', f'C2L={backbone}'], fractions=[.5, 1.], draws=2, **{**TINY, 'epochs': 1})
    lost = out/'predictions'/'C2L_0.5_1_0.csv'
    before, done, whole = lost.read_bytes(), [], module.run_cell
    lost.unlink(); torch.rand(3); np.random.rand(3)
    monkeypatch.setattr(module, 'run_cell', lambda *a, **kw: done.append(a[5:7]) or whole(*a, **kw))
    finetune(out=out, resume=True, **args)
    assert lost.read_bytes() == before and len(done) == 1
    with pytest.raises(ValueError, match='settings.lr: 0.001 there, 0.5 here'): finetune(out=out, resume=True, **{**args, 'lr': .5})
    with pytest.raises(ValueError, match='is not empty'): finetune(out=out, **args)

def test_resume_refuses_another_file_of_the_same_name(run, tmp_path):
    other = export_backbone(load_body('untrained', seed=6)[0], tmp_path/'x.safetensors')
    with pytest.raises(ValueError, match='inits.C2L'):
        finetune(out=run[0], resume=True, init=['untrained', f'C2L={other}'], fractions=[.5, 1.], draws=2, **{**TINY, 'epochs': 1})

def test_probe_of_a_file_is_computed_once_for_all_seeds(backbone, tmp_path, monkeypatch):
    "Each seed has its scores, the same to the bit; an untrained body has a probe a seed"
    done, whole = [], module.run_cell
    monkeypatch.setattr(module, 'run_cell', lambda *a, **kw: done.append(a[5:7]) or whole(*a, **kw))
    finetune(out=tmp_path/'out', init=[f'C2L={backbone}', 'untrained'], mode='probe', seeds=2, **TINY)
    assert done == [(str(backbone), 0), ('untrained', 0), ('untrained', 1)]
    p = {k: (tmp_path/'out'/'predictions'/f'{k}.csv').read_bytes() for k in ('C2L_1_0_0', 'C2L_1_0_1', 'untrained_1_0_0', 'untrained_1_0_1')}
    assert p['C2L_1_0_0'] == p['C2L_1_0_1'] and p['untrained_1_0_0'] != p['untrained_1_0_1']

# The size of the views

@pytest.fixture(scope='module')
def cards(tmp_path_factory):
    "Files of a small network whose cards name 48, 48, 64 px and no size, and one without a card"
    root, net = tmp_path_factory.mktemp('cards'), nn.Conv2d(1, 2, 3)
    files = [str(export_backbone(net, root/f'{i}.safetensors', dict(size=s))) for i, s in enumerate((48, 48, 64, None))]
    save_file(net.state_dict(), root/'none.safetensors')
    return [*files, str(root/'none.safetensors')]

@pytest.mark.parametrize('at, size', [((), 224), ((0,), 48), ((0, 1), 48), ((0, 2), 224), ((0, 3), 224), ((0, 4), 224), ((4,), 224)])
def test_size_is_the_cards_if_they_agree(cards, at, size, capsys):
    assert card_size({'u': 'untrained', **{str(i): cards[i] for i in at}}) == size
    said = capsys.readouterr().out
    assert (f'views of {size} px' in said) == bool(at) and ('no common size' in said) == (bool(at) and size == 224)

@pytest.mark.parametrize('how, size', [(dict(init='{}'), 48), (dict(init='{}', size=32), 32), (dict(init='untrained'), 48), (dict(data='x.csv'), 224),
                                       (dict(data='x.csv', init='untrained {}'), 48)])
def test_command_takes_the_cards_size(cards, how, size, monkeypatch):
    "Given or not; phantoms and tables have their own default"
    def stop(*args, size, **kwargs): raise ValueError(f'size {size}')
    monkeypatch.setattr(module, 'finetune', stop)
    with pytest.raises(SystemExit, match=f'size {size}$'): module.main(**{k: v.format(cards[0]) if k == 'init' else v for k, v in how.items()})

def test_function_takes_the_cards_size(cards, monkeypatch):
    monkeypatch.setattr(module, '_finetune', lambda data, out, inits, s, *args: s['size'])
    assert finetune(init=[cards[0]]) == 48 and finetune(init=[cards[0]], size=32) == 32 and finetune() == 224

def test_arch_is_the_cards_if_they_agree(tmp_path, monkeypatch):
    "After the first command of README, c2l_finetune without options takes its small network"
    tiny, large = (export_backbone(create_encoder(arch, channels=1), tmp_path/f'{arch}.safetensors') for arch in ('tiny', 'resnet18'))
    assert card_arch({'untrained': 'untrained'}) == 'resnet18' == card_arch({'C2L': str(tiny), 'other': str(large)})
    assert card_arch({'untrained': 'untrained', 'C2L': str(tiny)}) == 'tiny'
    monkeypatch.setattr(module, '_finetune', lambda data, out, inits, s, *args: s['arch'])
    assert finetune(init=[str(tiny)]) == 'tiny' and finetune(init=[str(tiny)], arch='resnet18') == 'resnet18'

# Choices

def test_test_labels_have_no_part_in_any_choice(data, tmp_path, monkeypatch):
    "Other labels of test: the same scores to the bit"
    monkeypatch.setattr(module, 'report_run', lambda *a: None)
    kept = []
    for k in range(2):
        finetune(out=tmp_path/str(k), **TINY)
        kept.append((tmp_path/str(k)/'predictions'/'untrained_1_0_0.csv').read_bytes())
        rows = data[1]; test = rows.split == 'test'
        data[1] = rows.assign(labels=rows.labels.where(~test, rows.labels.shift(7)))
    assert kept[0] == kept[1]

def test_best_epoch_of_valid_is_what_is_left():
    x, rows = squares()
    t, train, valid = make_targets(rows, ['Top', 'Left']), *[np.flatnonzero(rows.split == s) for s in ('train', 'valid')]
    body = nn.Sequential(nn.Conv2d(1, 8, 3, 2), nn.BatchNorm2d(8), nn.ReLU())
    learn = finetune_learner(x, t, train, valid, body, size=16, lr=.05)
    with learn.no_bar(), learn.no_logging(): learn.fit(5)
    aurocs = [r['auroc'] for r in learn.keep_best.curve]
    p = learn.loss_func.activation(features_of(learn.model, x, valid, 16))
    assert np.mean([auroc(t.truth[valid, i], p[:, i]) for i in (0, 1)]) == pytest.approx(max(aurocs)) and learn.keep_best.at == int(np.argmax(aurocs))

# The network

@pytest.mark.parametrize('arch, first', [('resnet18', 'layer3.0.conv1.weight'), ('densenet121', 'features.transition2.norm.weight')])
def test_splitter_cuts_where_fastai_does(arch, first):
    model = Classifier(create_encoder(arch, 1), 3)
    early, late, head = splitter(model)
    assert late[0] is dict(model.body.named_parameters())[first] and head[0] is model.head.weight
    assert len(early) + len(late) + len(head) == len(list(model.parameters()))

def test_frozen_body_does_not_move():
    "Not a weight, not a statistic of BatchNorm; unfrozen, the early layers move less than the late ones"
    x, rows = squares()
    t, train, valid = make_targets(rows, ['Top', 'Left']), *[np.flatnonzero(rows.split == s) for s in ('train', 'valid')]
    learn = finetune_learner(x, t, train, valid, load_body('untrained')[0], size=16)
    learn.remove_cb(KeepBest)                                                          # it may put the frozen epoch back
    before = {k: v.clone() for k, v in learn.model.state_dict().items()}
    moved = lambda name: (learn.model.state_dict()[name] - before[name]).abs().max().item()
    learn.freeze()
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, 1e-2)
        assert all(moved(k) == 0 for k in before if k.startswith('body')) and moved('head.weight') > 0
        learn.unfreeze(); learn.fit(1, slice(1e-6, 1e-2))
    assert 0 < moved('body.conv1.weight') < 1e-4 < moved('body.layer4.1.conv2.weight')

def test_pixels_are_prepared_as_the_card_says(backbone):
    assert load_body(str(backbone))[1].mean == (.4,) and load_body('untrained')[1].mean == Prepare(channels=1).mean

# Labels

def test_ignored_labels_have_no_gradient():
    loss, z = LabelLoss(2, unsure=[1]), torch.randn(3, 4, requires_grad=True)
    loss(z, torch.tensor([[1., torch.nan], [torch.nan, 2.], [0., torch.nan]])).backward()
    assert z.grad[1, 0] == 0 and (z.grad[[0, 2]][:, 1:] == 0).all() and (z.grad[1, 1:] != 0).all()

def chexpert_rows(rows):
    "Findings in columns: Edema is Top, and is unsure here and there; Cardiomegaly is Left; blanks are no"
    y = {c: np.zeros(len(rows), np.float32) for c in CHEXPERT14}
    for c, l in (('Edema', 'Top'), ('Cardiomegaly', 'Left')): y[c] = rows.labels.str.contains(l).to_numpy(np.float32)
    y['Edema'][::9] = -1; y['Cardiomegaly'][y['Cardiomegaly'] == 0] = np.nan
    return rows.drop(columns='labels').assign(labels='', **y)

def test_four_policies():
    rows = chexpert_rows(squares()[1])
    t = {p: make_targets(rows, ['Edema', 'Cardiomegaly'], policy=p) for p in ('zeros', 'ones', 'ignore', 'U-MultiClass', None)}
    assert [np.unique(t[p].y[::9, 0]).tolist()[0] for p in ('zeros', 'ones', 'U-MultiClass', None)] == [0, 1, 2, 1] and np.isnan(t['ignore'].y[::9, 0]).all()
    for v in t.values(): assert np.isnan(v.truth[::9, 0]).all() and not np.isnan(v.truth[:, 1]).any()        # certain labels alone are scored
    assert t['U-MultiClass'].loss().n_out == 6 and t['zeros'].loss().n_out == 2
    assert make_targets(rows).classes == CHEXPERT5

@pytest.mark.parametrize('mode', ['full', 'probe'])
def test_multiclass_policy_end_to_end(mode, data, tmp_path):
    data[1] = chexpert_rows(data[1])
    scores, _ = finetune(out=tmp_path/'out', policy='multiclass', mode=mode, **{**TINY, 'labels': ['Edema', 'Cardiomegaly'], 'epochs': 1})
    n = scores.set_index('class').n
    assert n['Edema'] < n['Cardiomegaly'] == 16 and scores.auroc.notna().all()

def test_multiclass_score_is_yes_against_no():
    z = torch.tensor([[1., .5, 2.]]); no, yes = .5, 1.                                  # yes first, then no and unsure
    p = LabelLoss(1, unsure=[0]).activation(z)
    assert p.item() == pytest.approx(np.exp(yes)/(np.exp(yes)+np.exp(no)))

def test_exclusive_classes(data, tmp_path):
    "Grades: softmax, one-against-rest AUROC, unlabelled rows left out"
    data[1] = data[1].assign(labels=data[1].labels.map({'No Finding': 'KL0', 'Top': 'KL1', 'Left': 'KL2', 'Top|Left': ''}))
    scores, _ = finetune(out=tmp_path/'out', mode='probe', **{**TINY, 'labels': None})
    assert scores['class'].tolist() == ['KL0', 'KL1', 'KL2', 'mean'] and scores.auroc.iloc[-1] > .8
    p = pd.read_csv(tmp_path/'out'/'predictions'/'untrained_1_0_0.csv')
    assert p[['KL0', 'KL1', 'KL2']].sum(axis=1).values == pytest.approx(1, abs=1e-6)

def test_fractions_are_nested_patients():
    patient = np.arange(200)//4
    some = [draw_fraction(patient, f, 3) for f in (.1, .5, 1.)]
    assert (some[0] <= some[1]).all() and some[2].all() and [len(np.unique(patient[m])) for m in some] == [5, 25, 50]
    assert all(len(np.unique(m[patient == k])) == 1 for m in some for k in range(50))

def test_roc_area_is_the_auroc():
    g = np.random.default_rng(0); y, p = g.integers(0, 2, 50).astype(float), g.integers(0, 9, 50)/9.
    y[3] = np.nan; fpr, tpr = roc_points(y, p)
    assert np.trapezoid(tpr, fpr) == pytest.approx(auroc(y, p))

# Bad input

def bad_files(tmp_path):
    torch.manual_seed(0)
    two = create_encoder('resnet18', 1); two.conv1 = nn.Conv2d(2, 64, 7, 2, 3, bias=False)
    export_backbone(create_encoder('resnet34', 1), tmp_path/'arch.safetensors')
    export_backbone(two, tmp_path/'channels.safetensors')
    (tmp_path/'pickle.pth').write_bytes(pickle.dumps(print))
    return dict(arch='another architecture .it fits resnet34', channels='channels', pickle='pickle')

def test_bad_backbones_are_refused_before_anything_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(module, 'load_data', lambda *a: pytest.fail('images were read'))
    for name, words in bad_files(tmp_path).items():
        path = next(tmp_path.glob(f'{name}.*'))
        with pytest.raises(WeightsError, match=words) as e: finetune(out=tmp_path/'out', init=['untrained', str(path)], arch='resnet18', **TINY)
        assert str(path) in str(e.value) and not (tmp_path/'out').exists()

def test_head_of_another_width_is_left_out_and_said(tmp_path, capsys):
    body = create_encoder('resnet18', 1)
    save_file(body.state_dict() | {'fc.weight': torch.zeros(7, 512), 'fc.bias': torch.zeros(7)}, tmp_path/'head.safetensors')
    finetune(out=tmp_path/'out', init=[str(tmp_path/'head.safetensors')], mode='probe', **TINY)
    assert 'left out 2 (fc.bias, fc.weight)' in capsys.readouterr().out

@pytest.mark.parametrize('bad, words', [
    (dict(init=['nowhere.pth']), 'is no file'), (dict(init=['a=untrained', 'a=imagenet']), 'named twice'), (dict(mode='half'), 'full or probe'),
    (dict(epochs=0), 'epochs must be at least 1'), (dict(precision='int8'), 'precision'), (dict(resume=True), 'no run to resume'), (dict(task='both'), 'task must be'),
    (dict(fractions=[2.]), 'above 0 and at most 1'), (dict(fractions=[.01]), 'leaves Left, Top without a positive or a negative: take'),
    (dict(policy='zeros'), 'columns of findings'), (dict(labels=['Top', 'Hernia']), 'occur nowhere in the table: Hernia; there are Left, No Finding, Top'),
    (dict(labels=['Topp', 'Left']), 'nowhere in the table: Topp; did you mean Top'), (dict(labels=['top'], task='multiclass'), 'nowhere.*: top; did you mean Top')])
def test_bad_arguments_leave_no_folder(bad, words, tmp_path):
    with pytest.raises((ValueError, OSError), match=words): finetune(**{**TINY, 'out': tmp_path/'new', **bad})
    assert not (tmp_path/'new').exists()

# The device

def test_trains_on_the_default_device(other_default):
    x, rows = squares()
    targets, split = make_targets(rows, ['Top', 'Left'], 'multilabel'), rows.split.values
    train, valid = (np.flatnonzero(split == part) for part in ('train', 'valid'))
    learn = finetune_learner(x, targets, train, valid, load_body('untrained')[0], size=16)
    assert devices_in_fit(learn) == {'meta'}

@pytest.mark.parametrize('mode', ['full', 'probe'])
def test_the_device_that_was_asked_for_is_taken(mode, other_default, tmp_path):
    "No part of a run asks for fastai's default again, which cannot compute here"
    scores, _ = finetune(out=tmp_path/'out', mode=mode, device='cpu', **TINY)
    assert scores.auroc.notna().all()

def test_a_probe_is_computed_on_the_default_device(other_default, tmp_path, monkeypatch):
    used = []
    def features_of(model, images, *_):
        used.append(devices_of(model))
        return torch.rand(len(images), 4)
    monkeypatch.setattr(module, 'features_of', features_of)
    finetune(out=tmp_path/'out', mode='probe', **TINY)
    assert used == [{'meta'}]

def test_wrong_device_and_several_processes_are_refused(tmp_path, monkeypatch):
    out = str(tmp_path/'new')
    with pytest.raises(SystemExit, match="c2l_finetune: device 'gpu' cannot be used here"):
        module.main(out=out, device='gpu')
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(SystemExit, match='c2l_finetune: fine-tuning runs in one process, and 2 were started'):
        module.main(out=out)
    assert not list(tmp_path.iterdir())

def test_patients_on_both_sides_are_listed():
    rows = squares()[1]
    rows.loc[[0, 2], 'split'] = 'test'
    with pytest.raises(DataError, match='2 patients stand on both sides of the split: SECRET0, SECRET1'): check_split(rows)

def test_a_table_is_judged_before_its_images_are_read(tmp_path, monkeypatch):
    monkeypatch.setattr(module, 'load_data', lambda *a: pytest.fail('images were read'))
    for i in range(20): (tmp_path/f'{i}.png').write_bytes(b'')
    rows = pd.DataFrame(dict(file=[f'{i}.png' for i in range(20)], patient=[f'P{i//2}' for i in range(20)], split=['train', 'test']*10, labels='Top'))
    rows.to_csv(tmp_path/'index.csv', index=False)
    with pytest.raises(DataError, match='10 patients stand on both sides'): finetune(str(tmp_path/'index.csv'), tmp_path/'out', **TINY)

@pytest.mark.parametrize('split', [('train',), ('train', 'test')])
def test_unknown_patients_are_warned_of_once_by_the_table(split, data, monkeypatch):
    data[1] = data[1].assign(patient=None, split=np.resize(split, 80))
    monkeypatch.setattr(module, 'read_items', lambda data, where: data_rows)
    data_rows = data[1]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        rows = module._read('films/index.csv', (TINY['labels'], 'auto', None, [1.], 1), 16, 0, '', 'keep')[2]
    assert [str(w.message) for w in said if 'patient' in str(w.message)] == [
        'films/index.csv: 80 of 80 images have no patient, each counts as one of its own: may leak']
    assert set(rows.split) == {'train', 'valid', 'test'} and rows.patient.isna().all()

def test_a_given_split_needs_no_paths():
    rows = squares()[1].drop(columns='path')                                            # as phantoms come
    assert check_split(rows)[0].equals(rows)

def test_a_missing_valid_is_taken_from_train_and_a_missing_test_is_refused():
    rows = squares()[1]
    two, said = check_split(rows[rows.split != 'valid'])
    assert set(two.split) == {'train', 'valid', 'test'} and (two[two.split == 'test'].patient.isin(rows[rows.split == 'test'].patient)).all() and 'no valid' in said
    with pytest.raises(DataError, match='must be named test'): check_split(rows[rows.split != 'test'])

@pytest.mark.parametrize('change, words', [
    (lambda t: Targets(t.classes, np.ones_like(t.y), np.ones_like(t.y)), 'train has no negative of Top, Left'),
    (lambda t: Targets(t.classes, t.y*[1, 0], t.truth*[1, 0]), 'train has no positive of Left: leave them out'),
    (lambda t: Targets(['KL0'], np.zeros(len(t.y)), np.ones((len(t.y), 1))), 'one class only'),
    (lambda t: Targets(['a', 'b'], np.where(np.arange(len(t.y)) == 3, np.nan, t.y[:, 0]), t.y), '1 class numbers are NaN')])
def test_labels_that_teach_nothing(change, words):
    rows = squares()[1]
    with pytest.raises(DataError, match=words): check_targets(change(make_targets(rows, ['Top', 'Left'])), rows.split.values)

def test_labels_that_are_no_labels():
    rows = squares()[1].assign(Cyst=.5)
    with pytest.raises(DataError, match='column Cyst: labels must be 1, 0, -1'): make_targets(rows, ['Cyst'])
    with pytest.raises(DataError, match='choose a policy'): make_targets(rows.assign(Cyst=-1), ['Cyst'])
    with pytest.raises(DataError, match='no image has a label'): make_targets(rows.assign(labels=''))

def test_misspelt_columns_are_named():
    rows = chexpert_rows(squares()[1])
    with pytest.raises(DataError, match='nowhere in the table: Edma; did you mean Edema'): make_targets(rows, ['Edma', 'Cardiomegaly'])
    with pytest.raises(DataError, match='nowhere in the table: Edma; did you mean Edema'): make_targets(rows, ['Edma'])

def test_nan_in_columns_of_findings_is_masked():
    rows = squares()[1].assign(Cyst=[1., 0., np.nan, 1.]*20)
    t = make_targets(rows, ['Cyst'])
    assert np.isnan(t.y[2::4]).all() and t.known.sum() == 60 and len(plan(rows, ['Cyst'], 'auto', None, [1.], 1)[2]) == 60

def test_smallest_fraction_that_works_is_named():
    patient = np.arange(100); y = (patient[:, None] == 42).astype(np.float32)
    with pytest.raises(DataError) as e: check_fraction(Targets(['Rare'], y, y), patient, .01)
    least = float(str(e.value).split('take ')[1].split(' or more')[0])
    check_fraction(Targets(['Rare'], y, y), patient, least)
    with pytest.raises(DataError): check_fraction(Targets(['Rare'], y, y), patient, least - .011)

def test_unequal_runs_are_not_compared():
    y, p = np.eye(2).repeat(3, 0), np.random.rand(6, 2)
    with pytest.raises(ValueError, match='no mates'): compare(y, {('a', 1., 0, 0): p, ('b', 1., 0, 1): p}, n_boot=5)

def test_command_explains_itself_and_its_errors():
    text = anno_parser(module.main).format_help()
    assert all(f'--{name}' in text for name in 'data out init arch size epochs batch lr mode labels policy fractions draws seeds resume'.split()) and 'paper' in text
    with pytest.raises(SystemExit, match='c2l_finetune: init must be untrained'): module.main(init='nowhere.pth')
