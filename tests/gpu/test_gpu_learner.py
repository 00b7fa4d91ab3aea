"""What fastai brings along, monitoring, memory and waiting for the GPU."""
import warnings
from pathlib import Path
import numpy as np
import pytest
import torch
from fastai.basics import Callback
from fastai.callback.channelslast import ChannelsLast
import c2l_nb
from c2l_nb.data.cache import labelled_dls
from c2l_nb.evaluation.features import extract_features
from c2l_nb.training.monitoring import CollapseGuard, HealthCallback, OnlineProbe
from c2l_nb.tasks.pretrain import Precision
from gpu_learner import make_learner, noise, phantoms, state_of, tiny

pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings('ignore:the queue of', 'ignore:Your generator is empty')]
GIB = 2**30
MOST = dict(resnet18=40*GIB, densenet121=110*GIB)         # memory of a step in bf16: batch 256, 224 px, 32768 keys
NAMED = 1                                                 # c2l_nb waits for the GPU once a batch: CollapseGuard looks at the loss


def small(*cbs, n=16, bs=4, **config):
    return make_learner(phantoms(n, 48), bs, *cbs, body=tiny(), queue_size=32, dim=16, **config)


def labelled(n=16):
    "Images and a class, in order"
    images = phantoms(n, 48)
    y = np.arange(n) % 2
    return labelled_dls(images, y, images, y, bs=8)


def test_lr_find_leaves_the_model_as_it_was():
    learn = small()
    before = state_of(learn.model.student)
    with learn.no_bar():
        learn.lr_find(num_it=8, show_plot=False)
    assert len(learn.recorder.losses) >= 4
    after = state_of(learn.model.student)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_save_and_load(tmp_path, device):
    learn = small()
    learn.path = tmp_path
    learn.fit(1, .01)
    learn.save('kept')
    want = state_of(learn.model)
    learn.fit(1, .01)
    learn.load('kept')
    got = state_of(learn.model)
    assert want.keys() == got.keys() and all(torch.equal(want[name], got[name]) for name in want)
    assert {p.device.type for p in learn.model.parameters()} == {device.type}
    learn.fit(1, .01)
    assert learn.model.queue.ptr.item() == (want['queue.ptr'].item() + 48) % 32


def test_validate_and_get_preds():
    "Features of the backbone, the same as `extract_features` gives"
    learn, dl = small(), labelled().valid
    learn.fit(1, .01)
    assert len(learn.validate(dl=dl)) >= 1
    feats, y = learn.get_preds(dl=dl)
    assert feats.shape == (16, 16) and y.tolist() == [0, 1]*8
    images = torch.from_numpy(phantoms(16, 48))[:, None]
    torch.testing.assert_close(feats, extract_features(learn.model, images), rtol=1e-3, atol=1e-4)


def test_health_and_probe():
    learn = small(HealthCallback(), OnlineProbe(labelled()), CollapseGuard())
    learn.fit(2, .01)
    log = learn.health.log
    assert len(log) == 2 and np.isfinite(log[HealthCallback.columns].astype(float).values).all()
    assert 0 <= learn.online_probe.knn <= 1 and not learn.collapse_guard.reason


def test_guard_stops_a_collapsed_run(capsys):
    "A spread that it holds for collapse"
    learn = small(HealthCallback(), CollapseGuard(min_std=2.))
    learn.fit(4, .01)
    assert 'collapse' in learn.collapse_guard.reason and learn.epoch == 1


def test_guard_stops_at_a_loss_that_is_no_number(capsys):
    class Spoil(Callback):
        order, run_valid = 13, False

        def after_loss(self):
            self.learn.loss = self.loss*torch.nan

    learn = small(HealthCallback(), CollapseGuard(), Spoil())
    learn.fit(2, .01)
    assert 'nan' in learn.collapse_guard.reason and learn.epoch == 0


@pytest.mark.parametrize('arch', ['resnet18', 'densenet121'])
def test_memory_of_a_step(arch, device, size, record_property):
    "Two steps of the paper's size fit with room to spare"
    if arch not in size.archs:
        pytest.skip('at full size only')
    images = noise(2*size.batch, size.side*8//7)
    learn = make_learner(images, size.batch, Precision('bf16'), ChannelsLast(), arch=arch, queue_size=size.queue, size=size.side)
    if device.type == 'cuda':
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    learn.fit(1, .03)
    assert torch.stack(list(learn.recorder.losses)).isfinite().all()
    if device.type == 'cuda':
        peak = torch.cuda.max_memory_allocated()
        record_property('peak GiB', round(peak/GIB, 2))
        assert peak < MOST[arch]


class Waits(Callback):
    "Where the host waited for the GPU, batch by batch; the first batches of an epoch prepare things and do not count"
    order, run_valid = 98, False

    def __init__(self, first):
        self.first, self.places = first, []

    def before_batch(self):
        if self.training and self.iter == self.first:
            torch.cuda.set_sync_debug_mode('warn')

    def after_train(self):
        torch.cuda.set_sync_debug_mode('default')


def test_waits_of_a_step(device, record_property):
    "The package makes the host wait for the GPU only where it says so; what fastai's recorder and loader do is recorded"
    if device.type != 'cuda':
        pytest.skip('a CPU does not wait for itself')
    n_steps, first = 10, 4
    cbs = Waits(first), Precision('bf16'), ChannelsLast(), HealthCallback(), CollapseGuard()
    learn = make_learner(noise(n_steps*32, 73), 32, *cbs, queue_size=1024, size=64)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        try:
            learn.fit(1, .03)
        finally:
            torch.cuda.set_sync_debug_mode('default')
    waits = [w for w in caught if 'synchroniz' in str(w.message)]
    places = [f'{Path(w.filename).parent.name}/{Path(w.filename).name}:{w.lineno}' for w in waits]
    record_property('waits', str({place: places.count(place) for place in sorted(set(places))}))
    assert waits, 'the debug mode saw nothing, not even the recorder'
    package = Path(c2l_nb.__file__).parent
    ours = [place for place, w in zip(places, waits) if Path(w.filename).parent == package]
    assert len(ours) <= NAMED*(n_steps - first), ours
