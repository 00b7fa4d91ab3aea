"Does C2L learn? 256 phantom patients, four radiographs each: pretraining must make a patient's images neighbours."
from time import perf_counter
import pytest, torch
from torch import nn
from fastai.basics import Learner
from c2l_nb.cache import pretrain_dls
from c2l_nb.callback import C2LCallback, CosineDecay, c2l_opt
from c2l_nb.embed import extract_features, retrieval_at_1
from c2l_nb.health import HealthCallback
from c2l_nb.phantom import phantom_batch

@pytest.fixture(scope='module')
def phantoms(): return phantom_batch([s for s in range(256) for _ in range(4)], [0, 1, 2, 3]*256, size=48)

def conv_body(width=16):
    layers = []
    for i, o in ((1, width), (width, 2*width), (2*width, 4*width)):
        layers += [nn.Conv2d(i, o, 3, 2, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(3), nn.Flatten())

@pytest.mark.filterwarnings("ignore:the queue of")
@pytest.mark.parametrize('seed', [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_same_patient_is_found_again(phantoms, seed):
    "retrieval@1 of the same patient among all others rises by 10 points; top-1 against the queue is 20 times chance; all in a minute"
    images, meta = phantoms
    start = perf_counter()
    torch.manual_seed(seed)
    found = lambda: retrieval_at_1(extract_features(learn.model, images), meta.patient.values)
    learn = Learner(pretrain_dls(images[:, 0].numpy(), bs=64, seed=seed), conv_body(), opt_func=c2l_opt, cbs=[HealthCallback(), CosineDecay(warmup=.05), C2LCallback(
        queue_size=1024, momentum=.99, crop=(.6, 1.), flip=0., jitter=.2, cutout=(1, 16), seed=seed)])
    before = found()
    with learn.no_bar(), learn.no_logging(): learn.fit(28, lr=.005)
    after, top1, seconds = found(), learn.health.log.top1.iloc[-1], perf_counter() - start
    print(f'seed {seed}: retrieval@1 {before:.3f} -> {after:.3f}, top-1 {top1:.3f} of chance {1/1025:.5f}, {seconds:.0f} s')
    assert after - before >= .10
    assert top1 >= 20/1025
    assert seconds < 60
