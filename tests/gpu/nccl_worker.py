"""One process under torchrun: collectives work, and a step of the distributed model is the step of the plain one. Prints `equal` at the end."""
import copy, os
import torch
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from c2l_nb.training.distributed import DistributedC2L, gather
from c2l_nb.method.model import C2L, C2LConfig
from gpu_learner import tiny

GPU = torch.cuda.is_available()


def step(model, call):
    "Loss, gradients and queue of one step"
    x = torch.randint(256, (8, 1, 73, 73), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).to(device)
    five = call(*model.views(x, model.augmentation(64)))
    loss = model.loss(*five)
    loss.backward()
    model.queue.enqueue(*model.keys(*five))
    return [loss.detach(), *(p.grad for p in model.student.parameters()), model.queue.feats]


def near(a, b):
    return (a - b).norm() <= 1e-3*b.norm() + 1e-6


device = torch.device('cuda', int(os.environ['LOCAL_RANK'])) if GPU else torch.device('cpu')
if GPU:
    torch.cuda.set_device(device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
dist.init_process_group('nccl' if GPU else 'gloo')
told = ['a word']
dist.broadcast_object_list(told)
one = torch.arange(3., device=device)
parts = [torch.empty_like(one)]
dist.all_gather(parts, one)
dist.barrier()
assert told == ['a word'] and torch.equal(parts[0], one) and torch.equal(gather(one), one)

plain = C2L(tiny(), C2LConfig(queue_size=64, dim=16, temperature=.07)).to(device).train()
shared = copy.deepcopy(plain)
shared.__class__ = DistributedC2L
wrapped = DistributedDataParallel(shared, find_unused_parameters=True)
for a, b in zip(step(shared, wrapped), step(plain, plain)):
    assert near(a, b), (a - b).norm()/b.norm()
dist.destroy_process_group()
print('equal')
