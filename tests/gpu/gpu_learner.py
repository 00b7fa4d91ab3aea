"""The `Learner` that the tests of this folder train: a ResNet-18 on phantoms. No device is named: the library chooses."""
import functools
import torch
from torch import nn
from fastai.basics import Callback, Learner
from fastcore.basics import noop
from c2l_nb.data.cache import pretrain_dls
from c2l_nb.training.callback import C2LCallback, c2l_opt
from c2l_nb.method.encoder import create_encoder
from c2l_nb.method.model import C2LConfig
from c2l_nb.data.phantom import phantom_batch

TEMPERATURE = .07


@functools.cache
def phantoms(n, side):
    "N×side×side uint8"
    return phantom_batch(n, size=side)[0][:, 0].numpy()


def noise(n, side):
    "N×side×side uint8 without a meaning, where only time or memory counts"
    return torch.randint(256, (n, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy()


def tiny():
    "A body of two convolutions, for what a CPU does slowly"
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3, 2, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 16, 3, 2))


def make_learner(images, bs, *cbs, body=None, arch='resnet18', device=None, **config):
    "A quiet `Learner`; `config` holds fields of `C2LConfig`"
    torch.manual_seed(0)
    body = body or create_encoder(arch, channels=1)
    dls = pretrain_dls(images, bs, device=device)
    learn = Learner(dls, body, opt_func=c2l_opt, cbs=[C2LCallback(C2LConfig(temperature=TEMPERATURE, **config)), *cbs])
    learn.remove_cbs([cb for cb in learn.cbs if cb.name == 'progress'])
    learn.logger = noop
    return learn


class Record(Callback):
    "What each batch used and what it left behind, as tests/helpers/reference.py names it, on the CPU"
    order, run_valid = 95, False

    def __init__(self):
        self.steps, self.devices = [], set()

    def after_pred(self):
        self.devices |= {t.device.type for t in (*self.xb[:2], *self.pred)}
        names = ('x1', 'x2', 'lam', 'perm')
        self.now = {name: on_cpu(value) for name, value in zip(names, self.xb)}

    def after_backward(self):
        self.now['grads'] = {name: on_cpu(p.grad) for name, p in self.model.student.named_parameters()}

    def after_batch(self):
        queue = self.model.queue
        self.steps.append(dict(self.now, loss=on_cpu(self.loss), queue=on_cpu(queue.feats), ptr=queue.ptr.item(),
                               student=state_of(self.model.student), teacher=state_of(self.model.teacher.module)))


def on_cpu(t):
    "A copy as a plain tensor"
    return t.detach().to('cpu', copy=True).as_subclass(torch.Tensor)


def state_of(net):
    return {name: on_cpu(t) for name, t in net.state_dict().items()}
