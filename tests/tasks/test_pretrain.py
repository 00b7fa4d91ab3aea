"`pretrain` and its command: the run folder, its verdict, resume, longer runs, plans, other inputs, bad input."
import io, json, os, signal, subprocess, sys, time, warnings
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from fastcore.script import anno_parser
from safetensors.torch import load_file
import c2l_nb.tasks.pretrain as module
from c2l_nb.training.monitoring import HealthCallback, OnlineProbe
from c2l_nb.method.model import C2LConfig
from c2l_nb.data.phantom import write_phantoms
from c2l_nb.tasks.pretrain import choose_config, pretrain
from c2l_nb.training.weights import load_backbone, read_card

pytestmark = pytest.mark.filterwarnings('ignore:the queue of', 'ignore:.*cannot be read', 'ignore:no image is labelled')
TINY = dict(size=16, epochs=3, batch=32, n_phantoms=300, queue_size=96)

def cheaper(mp, labels=module.probe_labels):
    "No UMAP, whose import takes 20 s, and probes of one finding"
    mp.setattr(module, 'umap_coords', lambda feats, **kw: feats[:, :2].numpy())
    mp.setattr(module, 'probe_labels', lambda rows: labels(rows)[:1])

@pytest.fixture(autouse=True)
def cheap(monkeypatch, tmp_path):
    "Nothing depends on what a run has left in the working directory"
    cheaper(monkeypatch)
    monkeypatch.chdir(tmp_path)

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
    assert {'config.json', 'log.csv', 'checkpoint', 'backbone.safetensors', 'embedding.png', 'report.html', 'probe.csv', 'scores.csv'} <= names
    about, log, card = json.loads((run/'config.json').read_text()), pd.read_csv(run/'log.csv'), read_card(run/'backbone.safetensors')
    assert log.epoch.tolist() == [0, 1, 2] and {'train_loss', 'top1', 'std', 'knn', 'retrieval'} <= set(log)
    assert about['config']['queue_size'] == 96 and about['data']['images'] == 180 and about['versions']['torch'] == torch.__version__
    assert card['arch'] == 'tiny' and card['channels'] == 1 and card['config'] == about['config']
    assert load_backbone(run/'backbone.safetensors')(torch.zeros(2, 1, 16, 16)).shape == (2, 576)
    assert about['run'] == dict(precision='fp32', keep='last', accumulate=1, deterministic=False, device='cpu')

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
    (dict(epochs=0), 'epochs must be at least 1'), (dict(accumulate=0), 'accumulate must be'), (dict(keep='first'), 'best or last'),
    (dict(device='cuda:99'), 'cannot be used here')])
def test_bad_arguments_cost_nothing(bad, words, tmp_path):
    "A clear error, and no run folder is left"
    with pytest.raises(ValueError, match=words): pretrain(**{**TINY, 'out': tmp_path/'new', **bad})
    assert not (tmp_path/'new').exists()

@pytest.mark.filterwarnings('ignore:bf16 takes')
def test_bf16_on_a_cpu_is_half_precision_inside(tmp_path, monkeypatch):
    "The convolutions run in bfloat16, the loss in float32"
    seen = []
    from c2l_nb.method.model import C2L
    whole = C2L.loss
    monkeypatch.setattr(C2L, 'loss', lambda self, *five: seen.append(whole(self, *five)) or seen[-1])
    make = module.create_encoder
    def spy(*args, **kw):
        body = make(*args, **kw)
        body[0].register_forward_hook(lambda m, i, o: seen.append(o.dtype) if m.training else None)
        return body
    monkeypatch.setattr(module, 'create_encoder', spy)
    pretrain(out=tmp_path/'out', precision='bf16', **{**TINY, 'epochs': 1})
    assert torch.bfloat16 in seen and all(o.dtype == torch.float32 for o in seen if isinstance(o, torch.Tensor))

def test_command_explains_itself_and_its_errors(tmp_path):
    (tmp_path/'c2l_run').mkdir()
    (tmp_path/'c2l_run'/'report.html').write_text('of another run')
    help_text = anno_parser(module.main).format_help()
    assert all(f'--{name}' in help_text for name in 'data out arch size epochs batch lr config seed precision resume set phantoms minutes keep accumulate device workers deterministic plan'.split())
    assert 'paper' in help_text and 'released code' in help_text
    with pytest.raises(SystemExit, match='c2l_pretrain: c2l_run is not empty'): module.main(data='nowhere')
    with pytest.raises(SystemExit, match='c2l_pretrain: nowhere: is neither'): module.main(data='nowhere', out='new')
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

# What a run says of itself

def test_default_run_is_the_recipe_of_phantoms(monkeypatch):
    "Without options: phantoms, the small encoder, and the recipe, at the size and number that it was found for; another arch leaves it"
    from types import SimpleNamespace
    class Stop(Exception): pass
    seen = []
    def look(asked, first):
        seen.append((asked.arch, asked.size, asked.n_phantoms, module._config(asked, 2458), asked.precision))
        raise Stop
    monkeypatch.setattr(module, '_pretrain', look)
    for options in (dict(), dict(arch='resnet18'), dict(seed=3, lr=.1, queue_size=512)):
        with pytest.raises(Stop): pretrain(device='cpu', **options)
    recipe = C2LConfig(**module.PHANTOM_RECIPE, size=48)
    assert seen[0] == ('tiny', 48, 4096, recipe, 'fp32')
    assert seen[1][0] == 'resnet18' and seen[1][3].head == 'mlp' and seen[1][3].epochs == 16
    assert seen[2][3] == recipe.replace(seed=3, lr=.1, queue_size=512)

def test_scores_equal_what_the_run_saw(run):
    "scores.csv: the last epoch's kNN and retrieval, and those of the untrained network; a difference lies within its interval"
    scores, log = pd.read_csv(run/'scores.csv', index_col='measure'), pd.read_csv(run/'log.csv')
    assert list(scores.index) == ['retrieval', 'knn', 'probe']
    for name in ('retrieval', 'knn'): assert abs(scores.C2L[name] - log[name].iloc[-1]) < 1e-5
    assert ((scores.low <= scores.difference) & (scores.difference <= scores.high)).all()
    assert ((scores.C2L - scores.untrained - scores.difference).abs() < 1e-9).all()

def test_untrained_values_come_before_the_first_batch(tmp_path):
    learn = pretrain(out=tmp_path/'out', **{**TINY, 'epochs': 1})
    scores = pd.read_csv(tmp_path/'out'/'scores.csv', index_col='measure')
    for name, value in learn.online_probe.untrained.items(): assert abs(scores.untrained[name] - value) < 1e-5

def test_report_opens_with_the_verdict(run):
    "Two sentences, before any picture; pictures with captions; numbers folded; the remark on few patients once"
    html = (run/'report.html').read_text()
    assert html.index('without their labels') < html.index('<img') and html.index('class="verdict"') < html.index('without their labels')
    assert html.count('<figcaption>') >= 4 and html.count('Healthy: ') == 4 and '<details>' in html and html.count('too narrow') <= 1

def test_report_escapes_what_others_wrote(tmp_path):
    "A finding's name may hold markup, or what matplotlib takes for a formula"
    name = 'a<b>&$x_'
    differences = pd.DataFrame({'class': [name, 'mean'], 'difference': [.1, .1], 'low': [0., 0.], 'high': [.2, .2], 'note': ['3 positive patients: interval too narrow', '']})
    probe = differences.assign(features='C2L', n=10, positives=3, auroc=.7)
    html = module._findings(probe, differences)
    assert '<b>' not in html and 'a&lt;b&gt;' in html

def test_verdict_by_retrieval_alone(tmp_path):
    "No label, but patients with several images: retrieval judges, and appears in the log"
    index = write_phantoms(tmp_path/'x', 60, size=32, progress=False)
    pd.read_csv(index).drop(columns='labels').to_csv(index, index=False)
    learn = pretrain(str(index), tmp_path/'out', keep='best', **{**TINY, 'epochs': 2})
    scores = pd.read_csv(tmp_path/'out'/'scores.csv', index_col='measure')
    log = pd.read_csv(tmp_path/'out'/'log.csv')
    assert list(scores.index) == ['retrieval'] and 'knn' not in log and not (tmp_path/'out'/'probe.csv').exists()
    kept = read_card(tmp_path/'out'/'backbone.safetensors')['kept']
    assert kept['by'] == 'retrieval' and kept['value'] == pytest.approx(log.retrieval.max()) and kept['epoch'] == log.retrieval.idxmax() + 1
    assert scores.C2L['retrieval'] == pytest.approx(kept['value'])

def test_retrieval_interval_resamples_patients():
    "Twice each patient's images, the same interval: images of one patient are no independent evidence"
    torch.manual_seed(0)
    patients, base = np.repeat(np.arange(60), 2), torch.randn(60, 8).repeat_interleave(2, 0)
    a, b = base + .5*torch.randn(120, 8), base + torch.randn(120, 8)
    once = module.compare_retrieval(a, b, patients)
    width = once['high'] - once['low']
    assert once['low'] < once['difference'] < once['high'] and .1 < width < .5
    hits = [module.retrieval_hits(f, patients).numpy().reshape(60, 2).mean(1) for f in (a, b)]
    each = hits[0] - hits[1]
    assert abs(width - 2*1.96*each.std()/60**.5) < .25*width

# What long runs need

def test_lengthened_run_equals_its_second_half(run, tmp_path, capsys):
    "A finished run gets more epochs: the learning rate goes on at the new schedule's value, and the log has all epochs"
    import shutil
    shutil.copytree(run, tmp_path/'long')
    learn = pretrain(out=tmp_path/'long', resume=True, epochs=5)
    said, log = capsys.readouterr().out, pd.read_csv(tmp_path/'long'/'log.csv')
    assert 'the schedule spans all 5' in said and log.epoch.tolist() == [0, 1, 2, 3, 4]
    per, lrs = 5, learn.recorder.lrs
    assert len(lrs) == 5*per and lrs[3*per - 1] < lrs[3*per] and lrs[3*per] == pytest.approx(learn.cosine_decay.rate(3/5)[0], rel=1e-3)
    assert json.loads((tmp_path/'long'/'config.json').read_text())['config']['epochs'] == 5
    with pytest.raises(ValueError, match='done already'): pretrain(out=tmp_path/'long', resume=True, epochs=2)

def test_resume_takes_what_is_not_given(run, tmp_path):
    "`c2l_pretrain --resume` alone goes on with all settings of the run"
    import shutil
    shutil.copytree(run, tmp_path/'c2l_run')
    before = json.loads((run/'config.json').read_text())
    module.main(out='c2l_run', resume=True)
    after = json.loads((tmp_path/'c2l_run'/'config.json').read_text())
    assert all(after[k] == before[k] for k in ('arch', 'config', 'data', 'run'))

def test_older_run_resumes(run, tmp_path):
    "A config.json and a checkpoint from before options and columns were added: fp32, and an empty column"
    import shutil
    from c2l_nb.training.run_folder import load_checkpoint, save_checkpoint
    shutil.copytree(run, tmp_path/'old')
    about = json.loads((run/'config.json').read_text())
    (tmp_path/'old'/'config.json').write_text(json.dumps({k: v for k, v in about.items() if k != 'run'}))
    tensors, meta = load_checkpoint(run)
    at = meta['columns'].index('retrieval')
    meta['columns'].pop(at)
    meta['rows'] = [row[:at] + row[at + 1:] for row in meta['rows']]
    for path in (tmp_path/'old'/'checkpoint').iterdir(): shutil.rmtree(path)
    save_checkpoint(tmp_path/'old', tensors, meta)
    pretrain(out=tmp_path/'old', resume=True, epochs=4)
    log = pd.read_csv(tmp_path/'old'/'log.csv')
    assert log.retrieval.isna().tolist() == [True, True, True, False] and log.knn.notna().all() and log.time.notna().all()

def test_best_epoch_is_kept(tmp_path):
    "The backbone is that of the epoch with the best kNN, its card says so, and the scores are its"
    from c2l_nb.training.monitoring import OnlineProbe
    learn = pretrain(out=tmp_path/'out', keep='best', **TINY)
    kept, log = read_card(tmp_path/'out'/'backbone.safetensors')['kept'], pd.read_csv(tmp_path/'out'/'log.csv')
    assert (kept['epoch'], kept['by']) == (log.knn.idxmax() + 1, 'knn') and kept['value'] == pytest.approx(log.knn.max())
    a, b = (load_file(tmp_path/'out'/f'{name}.safetensors') for name in ('backbone', 'best'))
    assert all(torch.equal(a[k], b[k]) for k in a) and all(torch.equal(v, a[k]) for k, v in learn.model.student.backbone.state_dict().items())
    assert 'chosen by the patients' in (tmp_path/'out'/'report.html').read_text()

def test_accumulated_steps(tmp_path):
    "Two batches a step: half as many steps of the optimiser; a run without it is not resumed with it"
    learn = pretrain(out=tmp_path/'out', accumulate=2, **{**TINY, 'epochs': 2})
    steps = {int(s['step']) for s in learn.opt.opt.state.values() if 'step' in s}
    assert learn.gradient_accumulation.n_acc == 64 and not steps and learn.model.seen == 10
    with pytest.raises(ValueError, match='accumulate'): pretrain(out=tmp_path/'out', resume=True, accumulate=4)

def test_plan_leaves_nothing(tmp_path, capsys):
    "Figures of a phantom run and of a folder; no file is written"
    index = write_phantoms(tmp_path/'x', 60, size=32, progress=False)
    before = sorted(tmp_path.rglob('*'))
    for data in ('phantoms', str(index)):
        found = pretrain(data, tmp_path/'out', plan=True, **{**TINY, 'n_phantoms': 60, 'batch': 16})
        assert found['images'] == 36 and found['patients'] == 18 and found['batches'] == 3*2 and 0 < found['hours'] < 1 and found['disk_gb'] > 0
    assert sorted(tmp_path.rglob('*')) == before and '36 images of 18 patients' in capsys.readouterr().out

def test_short_runs_are_warned_of(run, tmp_path, capsys):
    pretrain(out=tmp_path/'out', **{**TINY, 'epochs': 1})
    assert '60 epochs or more' in capsys.readouterr().out            # 300 steps of 5 an epoch

def test_precision_is_resolved_once(run, monkeypatch):
    "auto: bf16 where there are instructions for it, and always fp32 for phantoms on a CPU; what is slower warns; a resumed run keeps its own"
    from types import SimpleNamespace
    cpu = torch.device('cpu')
    def chosen(precision, data='pool'): return module._precision(SimpleNamespace(precision=precision, data=data), cpu)
    for has, name in ((True, 'bf16'), (False, 'fp32')):
        monkeypatch.setattr('c2l_nb.core.has_bf16', lambda device, has=has: has)
        assert chosen('auto') == name and chosen('auto', 'phantoms') == 'fp32'
    monkeypatch.setattr(module, 'precision_speed', lambda precision, device: .25)
    with pytest.warns(UserWarning, match='bf16 takes 4.0 times as long'): assert chosen('bf16') == 'bf16'
    monkeypatch.setattr(module, 'precision_speed', lambda precision, device: 1.5)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        assert chosen('bf16') == 'bf16'
    about = json.loads((run/'config.json').read_text())
    asked = SimpleNamespace(**{**dict.fromkeys('arch size seed keep accumulate n_phantoms device'.split()), **dict(
        precision='auto', data='pool', config='auto', epochs=None, deterministic=False, out=run, resume=True)})
    module._fill(asked, about | dict(run=about['run'] | dict(precision='bf16', accumulate=3)))
    assert (asked.precision, asked.accumulate, asked.arch, asked.size) == ('bf16', 3, 'tiny', 16)

@pytest.mark.skipif(os.name != 'posix', reason='needs SIGINT')
def test_a_pipe_gets_a_line_an_epoch_and_ctrl_c_leaves_a_backbone(tmp_path):
    "The command itself: no bar, `epoch 1/2 …`; SIGINT in a long run: exit 130, a backbone that loads, and --resume knows the run"
    env = dict(os.environ, OMP_NUM_THREADS='1', MPLBACKEND='agg', PYTHONUNBUFFERED='1',
               PYTHONPATH=os.pathsep.join([str(Path(module.__file__).parents[1]), *filter(None, sys.path)]))
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); import c2l_nb.tasks.pretrain as m; m.main(out='run', phantoms=200, size=16, epochs=5000, batch=32, set='queue_size=96', device='cpu')"
    run = subprocess.Popen([sys.executable, '-W', 'ignore', '-c', code], cwd=tmp_path, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = []
    for line in run.stdout:
        lines.append(line)
        if line.startswith('epoch 3/'): break
    run.send_signal(signal.SIGINT)
    rest = run.stdout.read()
    assert run.wait() == 130 and 'holds the network as it is now' in rest, rest[-2000:]
    epochs = [line for line in lines if line.startswith('epoch')]
    assert len(epochs) == 3 and all('train_loss' in line and 'retrieval' in line for line in epochs) and not any('\r' in line or '█' in line for line in lines)
    card = read_card(tmp_path/'run'/'backbone.safetensors')
    assert 'of 5000 epochs' in card['unfinished'] and load_backbone(tmp_path/'run'/'backbone.safetensors').arch == 'tiny'
    assert (tmp_path/'run'/'checkpoint').is_dir()
