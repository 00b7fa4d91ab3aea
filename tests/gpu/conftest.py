"""One place decides where the tests of this folder run and how large they are.

They run on the GPU, and are skipped where there is none. `C2L_TEST_DEVICE=cpu` rehearses them on a CPU at toy size.
"""
import os
import signal
from typing import NamedTuple
import pytest
import torch

NAME = os.environ.get('C2L_TEST_DEVICE', 'cuda')
if 'C2L_TEST_DEVICE' in os.environ:
    signal.signal(signal.SIGTERM, signal.default_int_handler)   # who ends this run early still gets pytest's report
if NAME == 'cpu':
    os.environ['CUDA_VISIBLE_DEVICES'] = ''                  # no test names a device: the library shall find none but the CPU


class Size(NamedTuple):
    "How large a test is"
    batch: int       # images
    side: int        # of the views, px
    queue: int       # keys
    archs: tuple     # networks


FULL = Size(batch=256, side=224, queue=32768, archs=('resnet18', 'densenet121'))
TOY = Size(batch=4, side=32, queue=64, archs=('resnet18',))


@pytest.fixture(scope='session', autouse=True)
def device():
    "Where everything runs"
    if NAME == 'cuda' and not torch.cuda.is_available():
        pytest.skip('needs a GPU; C2L_TEST_DEVICE=cpu runs the same tests on the CPU at toy size')
    return torch.device('cuda', 0) if NAME == 'cuda' else torch.device(NAME)


@pytest.fixture(scope='session')
def size(device):
    return FULL if device.type == 'cuda' else TOY


@pytest.fixture(autouse=True)
def plain_float32(device):
    "float32 means float32: no TF32; and what a test changed is put back"
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32, torch.are_deterministic_algorithms_enabled(), cudnn.deterministic
    matmul.allow_tf32 = cudnn.allow_tf32 = False
    yield
    matmul.allow_tf32, cudnn.allow_tf32 = before[:2]
    torch.use_deterministic_algorithms(before[2])
    cudnn.deterministic = before[3]
    if device.type == 'cuda':
        torch.cuda.empty_cache()
