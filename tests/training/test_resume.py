"Runs killed by SIGKILL at any moment and resumed end with the very bits of a run that was left alone; resume_worker.py runs them."
import json, os, subprocess, sys
from pathlib import Path
import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
WORKER = Path(__file__).parents[1]/'helpers'/'resume_worker.py'
RECORD = Path(__file__).parents[2]/'nbs/results/resume/kills.json'

def killed(folder, mode, kills):
    "What the worker found; one thread, since networks of this size gain nothing from two"
    env = dict(os.environ, OMP_NUM_THREADS='1', PYTHONPATH=os.pathsep.join([str(WORKER.parents[2]), *filter(None, sys.path)]))
    done = subprocess.run([sys.executable, '-W', 'ignore', WORKER, folder, mode, str(kills)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])

def test_killed_in_a_batch_in_a_write_and_between_epochs(tmp_path):
    "Three kills of one run: every tensor of the state, every number of its JSON and log.csv but for the time are bit-identical"
    found = killed(tmp_path, 'fp32', 'batch:0:3,write:2:1,between:4:0')
    assert found['differ'] == [] and (found['kills'], found['runs'], found['batches']) == (3, 1, 60)

@pytest.mark.slow
@pytest.mark.parametrize('mode, kills', [('fp32', 50), ('bf16', 10), ('accumulation', 10), ('workers', 10)])
def test_killed_at_random_moments(tmp_path, mode, kills):
    "C2L_RECORD=1 keeps the figures for notebook 45"
    found = killed(tmp_path, mode, kills)
    if os.environ.get('C2L_RECORD'):
        RECORD.parent.mkdir(parents=True, exist_ok=True)
        known = json.loads(RECORD.read_text()) if RECORD.exists() else {}
        RECORD.write_text(json.dumps(known | {mode: found}, indent=1) + '\n')
    assert found['differ'] == [] and found['kills'] == kills

def test_pretrain_goes_on_at_the_very_next_batch(tmp_path, monkeypatch):
    "Stopped in batch 2 of epoch 1: `pretrain(resume=True)` begins there, and the checkpoint at the end and log.csv are the same"
    import pandas as pd, torch
    from torch import nn
    import c2l_nb.tasks.pretrain as module
    from c2l_nb.training.monitoring import HealthCallback
    from c2l_nb.training.run_folder import load_checkpoint
    def tiny(arch, channels=1): return nn.Sequential(nn.Conv2d(channels, 4, 3, 2, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(.1))
    monkeypatch.setattr(module, 'create_encoder', tiny)
    monkeypatch.setattr(module, 'finish', lambda *args: None)
    look, seen = HealthCallback.after_loss, []
    def run(name, stop=None, **kw):
        def after_loss(self):
            if self.training:
                seen.append((self.epoch, self.iter))
                self.learn.checkpoint.late = seen[-1] == (1, 1)
                if seen[-1] == stop: self.learn.checkpoint._wait(); raise KeyboardInterrupt
            look(self)
        monkeypatch.setattr(HealthCallback, 'after_loss', after_loss)
        module.pretrain(out=tmp_path/name, size=16, epochs=3, batch=16, n_phantoms=120, queue_size=48, **kw)
    run('whole')
    whole = seen[:]
    with pytest.raises(KeyboardInterrupt): run('cut', stop=(1, 2))
    seen.clear()
    run('cut', resume=True, save_every=3.)
    assert seen == [at for at in whole if at >= (1, 2)]
    (a, _), (b, _) = (load_checkpoint(tmp_path/name) for name in ('whole', 'cut'))
    assert a.keys() == b.keys() and [k for k in a if not torch.equal(a[k], b[k])] == []
    logs = [pd.read_csv(tmp_path/name/'log.csv').drop(columns='time') for name in ('whole', 'cut')]
    pd.testing.assert_frame_equal(*logs, check_exact=True)
    with pytest.raises(ValueError, match="config.precision: 'fp32' in the checkpoint, 'bf16' here"): run('cut', resume=True, precision='bf16')
    for path in (tmp_path/'cut'/'checkpoint').iterdir(): path.rename(path.with_name('.tmp-' + path.name))
    seen.clear()
    run('cut', resume=True)                            # ended before its first checkpoint
    assert seen == whole
