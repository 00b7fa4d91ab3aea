"""What the tests of several notebooks share.

Above all a device that is not the CPU, for machines without a GPU: `meta`, whose tensors have a device and a shape, and no data.
"""
from itertools import chain
import pytest, torch
from fastai.basics import Callback, CancelFitException

@pytest.fixture
def other_default(monkeypatch):
    "fastai's default device is `meta`"
    monkeypatch.setattr('fastai.torch_core.default_device', lambda *_: torch.device('meta'))

@pytest.fixture(params=[False, True], ids=['', 'deterministic'])
def operations(request):
    "With whatever operations torch takes, and with deterministic ones alone"
    torch.use_deterministic_algorithms(request.param)
    yield request.param
    torch.use_deterministic_algorithms(False)

def devices_of(module):
    "Devices of its parameters and buffers"
    return {t.device.type for t in chain(module.parameters(), module.buffers())}

def tensors_in(tree):
    "All tensors of a batch, which may hold lists and dicts"
    if isinstance(tree, torch.Tensor):
        return [tree]
    parts = tree.values() if isinstance(tree, dict) else tree
    return [t for part in parts for t in tensors_in(part)]

class Seen(Callback):
    "Notes where the first batch and the model are; there is no second one"
    order = -50
    def before_batch(self):
        self.devices = devices_of(self.model) | {t.device.type for t in tensors_in([*self.xb, *self.yb])}
        raise CancelFitException

def devices_in_fit(learn):
    "Where `learn.fit` has loaders, model and batches"
    seen = Seen()
    with learn.no_bar(), learn.no_logging():
        learn.fit(1, .01, cbs=seen)
    return seen.devices | {torch.device(dl.device).type for dl in learn.dls}
