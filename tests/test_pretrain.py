"`pretrain` and its command: the run folder, resume, other inputs, bad input."
import json
import numpy as np, pandas as pd, pytest, torch
from fastcore.script import anno_parser
from safetensors.torch import load_file
import c2l_nb.pretrain as module
from c2l_nb.health import HealthCallback, OnlineProbe
from c2l_nb.model import C2LConfig
from c2l_nb.phantom import write_phantoms
from c2l_nb.pretrain import choose_config, pretrain
from c2l_nb.weights import load_backbone, read_card

pytestmark = pytest.mark.filterwarnings('ignore:the queue of', 'ignore:.*cannot be read', 'ignore:no image is labelled')
TINY = dict(size=16, epochs=3, batch=32, n_phantoms=300, queue_size=96)

def cheaper(mp, labels=module.probe_labels):
    "No UMAP, whose import takes 20 s, and probes of one finding"
    mp.setattr(module, 'umap_coords', lambda feats, **kw: feats[:, :2].numpy())
    mp.setattr(module, 'probe_labels', lambda rows: labels(rows)[:1])

@pytest.fixture(autouse=True)
def cheap(monkeypatch): cheaper(monkeypatch)

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    with pytest.MonkeyPatch.context() as mp:
        cheaper(mp)
        out = tmp_path_factory.mktemp('runs')/'whole'
        pretrain(out=out, **TINY)
    return out

def test_run_folder(run):
    "Everything is there, and says what was done"
    names = {p.name for p in run.iterdir()}
    assert {'config.json', 'log.csv', 'checkpoint', 'backbone.safetensors', 'embedding.png', 'report.html', 'probe.csv'} <= names
    about, log, card = json.loads((run/'config.json').read_text()), pd.read_csv(run/'log.csv'), read_card(run/'backbone.safetensors')
    assert log.epoch.tolist() == [0, 1, 2] and {'train_loss', 'top1', 'std', 'knn'} <= set(log)
    assert about['config']['queue_size'] == 96 and about['data']['images'] == 180 and about['versions']['torch'] == torch.__version__
    assert card['arch'] == 'resnet18' and card['channels'] == 1 and card['config'] == about['config']
    assert load_backbone(run/'backbone.safetensors')(torch.zeros(2, 1, 16, 16)).shape == (2, 512)

def test_report_is_one_file_without_patients_or_paths(run):
    html = (run/'report.html').read_text()
    assert 'data:image/png;base64' in html and str(run.parent) not in html and 'P00000' not in html and 'src="http' not in html

def test_resume_equals_the_uninterrupted_run(run, tmp_path, monkeypatch):
    "Stopped in epoch 1, resumed: the backbone is the same to the bit"
    ask = OnlineProbe.after_train
    def stop(self):
        if self.epoch == 1: raise KeyboardInterrupt
        ask(self)
    monkeypatch.setattr(OnlineProbe, 'after_train', stop)
    with pytest.raises(KeyboardInterrupt): pretrain(out=tmp_path/'cut', **TINY)
    monkeypatch.setattr(OnlineProbe, 'after_train', ask)
    pretrain(out=tmp_path/'cut', resume=True, **TINY)
    a, b = load_file(run/'backbone.safetensors'), load_file(tmp_path/'cut'/'backbone.safetensors')
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    left, right = (pd.read_csv(p/'log.csv').drop(columns='time') for p in (run, tmp_path/'cut'))
    pd.testing.assert_frame_equal(left, right, check_exact=True)

def test_resume_with_another_config_is_refused(run):
    with pytest.raises(ValueError, match='momentum'): pretrain(out=run, resume=True, **{**TINY, 'momentum': .5})

def test_folder_without_labels_and_with_a_broken_file(tmp_path):
    "No probe then, and one bad file is left out"
    write_phantoms(tmp_path/'x', 40, size=32, progress=False)
    (tmp_path/'x'/'images'/'broken.png').write_bytes(b'no image')
    learn = pretrain(str(tmp_path/'x'/'images'), tmp_path/'out', **{**TINY, 'epochs': 1})
    assert len(learn.dls.train_ds) == 40 and 'knn' not in pd.read_csv(tmp_path/'out'/'log.csv') and not (tmp_path/'out'/'probe.csv').exists()

def test_index_csv_trains_on_its_train_split(tmp_path):
    index = write_phantoms(tmp_path/'x', 60, fmt='dcm', size=32, progress=False)
    learn = pretrain(str(index), tmp_path/'out', config='small_moco', **{**TINY, 'epochs': 1})
    assert len(learn.dls.train_ds) == 36 and not learn.model.config.mixes

@pytest.mark.parametrize('bad, words', [
    (dict(data='nowhere'), 'neither a folder nor an index CSV'), (dict(arch='resnet81'), 'resnet'), (dict(precision='int8'), 'precision'),
    (dict(config='large'), 'config'), (dict(resume=True), 'no run to resume'), (dict(queue_length=3), 'no field'), (dict(batch=4096), 'batch'),
    (dict(epochs=0), 'epochs must be at least 1')])
def test_bad_arguments_cost_nothing(bad, words, tmp_path):
    "A clear error, and no run folder is left"
    with pytest.raises(ValueError, match=words): pretrain(**{**TINY, 'out': tmp_path/'new', **bad})
    assert not (tmp_path/'new').exists()

def test_bf16_on_a_cpu_is_half_precision_inside(tmp_path, monkeypatch):
    "The convolutions run in bfloat16, the loss in float32"
    seen = []
    from c2l_nb.model import C2L
    whole = C2L.loss
    monkeypatch.setattr(C2L, 'loss', lambda self, *five: seen.append(whole(self, *five)) or seen[-1])
    make = module.create_encoder
    def spy(*args, **kw):
        body = make(*args, **kw)
        body.conv1.register_forward_hook(lambda m, i, o: seen.append(o.dtype) if m.training else None)
        return body
    monkeypatch.setattr(module, 'create_encoder', spy)
    pretrain(out=tmp_path/'out', precision='bf16', **{**TINY, 'epochs': 1})
    assert torch.bfloat16 in seen and all(o.dtype == torch.float32 for o in seen if isinstance(o, torch.Tensor))

def test_command_explains_itself_and_its_errors():
    help_text = anno_parser(module.main).format_help()
    assert all(f'--{name}' in help_text for name in 'data out arch size epochs batch lr config seed precision resume set'.split())
    assert 'paper' in help_text and 'released code' in help_text
    with pytest.raises(SystemExit, match='c2l_pretrain: nowhere: is neither'): module.main(data='nowhere')
    with pytest.raises(SystemExit, match='option of its own'): module.main(set='size=64')
    with pytest.raises(SystemExit, match='field=value'): module.main(set='crop')

# What was found by reading

@pytest.mark.parametrize('n,batch', [(1024, 256), (5000, 16), (5000, None)])
def test_small_recipe_knows_the_batch(n, batch):
    got = choose_config('small', n, batch, 40)
    want = C2LConfig.small(n, 40*(n//got.batch_size), batch_size=got.batch_size, epochs=40)
    assert (got.lr, got.queue_size, got.momentum, got.warmup) == (want.lr, want.queue_size, want.momentum, want.warmup) and got.epochs == 40

def test_unlabelled_rows_are_no_negatives():
    rows = pd.DataFrame(dict(split=['train', 'valid']*12, labels=['Mass', 'Mass', '', '']*6))
    assert module.probe_labels(rows) == [] and module.probe_labels(rows.replace('', 'No Finding')) == ['Mass']

def test_rows_of_a_cache_cannot_be_chosen(tmp_path):
    write_phantoms(tmp_path/'films', 8, size=32)
    module.load_data(str(tmp_path/'films'), 32, keep=tmp_path/'cache', progress=False)
    for data in ('phantoms', str(tmp_path/'cache')):
        with pytest.raises(ValueError, match="where='a=b'"): module.load_data(data, 32, where='a=b')

def test_looks_may_lie_on_another_device(monkeypatch):
    "A tensor on a GPU refuses numpy, but becomes a float"
    class Far(torch.Tensor):
        def __array__(self, *a, **k): raise TypeError("can't convert cuda:0 device type tensor to numpy")
    health = HealthCallback()
    health.looks, health.queries, health.learn = [[torch.tensor(v).as_subclass(Far), .5, 0., v] for v in (0., 1.)], [torch.eye(4)], type('L', (), dict(epoch=0))()
    health.after_train()
    assert health.now['top1'] == .5 and health.now['chance'] == .5

def test_a_run_knows_its_splits():
    marks = {module.with_rows('files', s) for s in ([True, False], [False, True], np.array([True, False]))}
    assert len(marks) == 2 and all(m.startswith('files ') for m in marks)

def test_resume_refuses_other_splits(tmp_path):
    "Who was a test patient must not be trained on without a word"
    index = write_phantoms(tmp_path/'x', 60, size=32, progress=False)
    run = dict(data=str(index), out=tmp_path/'out', **{**TINY, 'epochs': 1})
    pretrain(**run)
    df = pd.read_csv(index, dtype=str)
    test = df.index[df.split == 'test']
    df.loc[df.index[df.split == 'train'][:len(test)], 'split'] = 'now test'                     # as many as before, but other ones
    df.loc[test, 'split'] = 'train'
    df.replace('now test', 'test').to_csv(index, index=False)
    with pytest.raises(ValueError, match='fingerprint'): pretrain(resume=True, **run)
