"Files written before modules and notebooks had rooms (tests/fixtures/before_rooms): a run goes on, a cache and a card open."
import shutil
from pathlib import Path
import numpy as np
import torch
from c2l_nb.data.cache import RadiographCache
from c2l_nb.tasks.pretrain import pretrain
from c2l_nb.training.run_folder import load_checkpoint
from c2l_nb.training.weights import load_backbone, read_card

OLD = Path(__file__).parents[1]/'fixtures'/'before_rooms'

def test_run_goes_on(tmp_path, capsys):
    "Killed in its third epoch after two; the rows of its log stay as they were"
    run = tmp_path/'run'
    shutil.copytree(OLD/'run', run)
    before = (run/'log.csv').read_text().splitlines()[:3]
    pretrain(out=str(run), resume=True)
    log = (run/'log.csv').read_text().splitlines()
    assert len(log) == 41 and log[:3] == before
    assert (run/'backbone.safetensors').is_file() and (run/'report.html').is_file()

def test_checkpoint_opens():
    tensors, meta = load_checkpoint(OLD/'run')
    assert meta['step'] == 6 and all(t.isfinite().all() for t in tensors.values() if t.is_floating_point())

def test_cache_opens():
    cache = RadiographCache(OLD/'cache')
    assert cache.images.shape == (8, 16, 16) and cache.rows.patient.nunique() == 4
    assert 20 < np.asarray(cache.images).mean() < 235

def test_backbone_opens():
    body = load_backbone(OLD/'backbone.safetensors')
    assert read_card(OLD/'backbone.safetensors')['arch'] == 'tiny'
    assert body.eval()(torch.rand(2, 1, 24, 24)).shape == (2, 576)
