"""Speed of a C2L step: against its four bare network passes, and against the released step; of the loss; of the augmentation.

ResNet-18, a queue of 32768 keys, 32 images of 224 px unless a line says otherwise, SGD, two threads; tests/bench/benchmarks.py says how it is
measured. Our step is counted from the uint8 batch of 256 px radiographs to the filled queue, augmentation included (notebook 28,
`algorithm_1`), on a channels-last network of one input channel, as `c2l_pretrain` trains it. The four bare passes are those of
the same networks on ready input. The released step is given its views ready, normalised and of three channels: its augmentation, which ran in
the loader's processes, is not counted, so the ratio is to our disadvantage. Its queue is as long as ours.
"""
import copy, functools
import torch, torchvision
import torch.nn.functional as F
import bench_augment
from benchmarks import Bench, arguments, peak_memory
from c2l_nb.method.encoder import create_encoder
from c2l_nb.method.feature_queue import FeatureQueue
from c2l_nb.method.loss import c2l_loss
from c2l_nb.method.model import C2L, C2LConfig

N,D,T,BS = 32768,128,.07,32
sgd = functools.partial(torch.optim.SGD, lr=.03, momentum=.9, weight_decay=1e-4)

class Ours:
    "Algorithm 1 by the library's parts, on one batch of uint8 radiographs"
    def __init__(self, size, bs=BS):
        torch.manual_seed(0)
        net = create_encoder('resnet18', channels=1)
        self.model = C2L(net, C2LConfig.paper(size=size, queue_size=N)).to(memory_format=torch.channels_last).train()
        self.opt,self.augment = sgd(self.model.student.parameters()), self.model.augmentation(size)
        self.x = torch.randint(256, (bs,1,size*8//7,size*8//7), dtype=torch.uint8)         # 256 px for views of 224
        self.ready = torch.randn(bs,1,size,size).contiguous(memory_format=torch.channels_last)
        self.grad = torch.randn(bs,D)

    def step(self):
        m = self.model
        five = m(*m.views(self.x, self.augment))
        m.loss(*five).backward()
        self.opt.step(); self.opt.zero_grad()
        m.teacher.update(m.student)
        m.queue.enqueue(*m.keys(*five))
        m.seen += 1

    def bare(self):
        "Two forwards and backwards of the student, two forwards of the teacher"
        for _ in range(2): self.model.student(self.ready).backward(self.grad)
        for _ in range(2): self.model.teacher(self.ready)
        self.opt.zero_grad()

class ReleasedQueue:
    "The released memory (class MemoryC2L of NCE/NCEAverage.py): cloned, multiplied, concatenated and written to in every call"
    def __init__(self): self.feats,self.at = F.normalize(torch.randn(N,D), dim=1), 0

    def logits(self, q, k):
        k = k.detach()
        pos = torch.bmm(q[:,None], k[:,:,None]).flatten(1)                 # B×1
        neg = torch.mm(self.feats.clone().detach(), q.T).T                 # B×N
        out = torch.cat([pos,neg], 1).div(T).contiguous()                  # B×(1+N)
        self.feats.index_copy_(0, (torch.arange(len(k))+self.at) % N, k)
        self.at = (self.at+len(k)) % N
        return out

    def loss(self, q, q_mix, k, k_mix, k_feat):
        "Three calls, three cross entropies, their mean (train_C2L_res18.py:478-501)"
        unit = lambda v: v/v.norm(dim=1, keepdim=True)
        q,q_mix,k,k_mix,k_feat = map(unit, (q,q_mix,k,k_mix,k_feat))
        label = torch.zeros(len(q), dtype=torch.long)
        return sum(F.cross_entropy(self.logits(a,b), label) for a,b in ((q,k),(q_mix,k_mix),(q_mix,k_feat)))/3

class Released:
    "The released step re-created in plain PyTorch on one device: NCHW, keys shuffled and put back, teacher updated one tensor at a time"
    def __init__(self, size, bs=BS):
        torch.manual_seed(0)
        self.student = torchvision.models.resnet18(num_classes=D).train()
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)          # BatchNorm in training mode, no dropout in it
        self.opt,self.queue = sgd(self.student.parameters()), ReleasedQueue()
        self.x1,self.x2 = torch.randn(bs,3,size,size), torch.randn(bs,3,size,size)

    def keys(self, x):
        ids = torch.randperm(len(x))
        return self.teacher(x[ids])[ids.argsort()]

    def step(self):
        lam,ids = torch.rand(()).item(), torch.randperm(len(self.x1))
        lam = max(lam, 1-lam)
        mix = lambda x: lam*x + (1-lam)*x[ids]
        q,q_mix = self.student(self.x1), self.student(mix(self.x1))
        with torch.no_grad(): k,k_mix = self.keys(self.x2), self.keys(mix(self.x2)); k_feat = mix(k)
        loss = self.queue.loss(q,q_mix,k,k_mix,k_feat)
        self.opt.zero_grad(); loss.backward(); self.opt.step()
        with torch.no_grad():
            for t,s in zip(self.teacher.parameters(), self.student.parameters()): t.mul_(.999).add_(s, alpha=.001)

def passes(bench):
    "The step ÷ what it cannot do without"
    ours = Ours(224)
    bench.ratio('C2L step ÷ its four bare network passes', ours.step, ours.bare, '<= 1.05', images=BS)

def released(bench):
    "The released step ÷ ours, so images/s the other way round"
    for size in (128,224):
        bench.ratio(f'images/s of the step ÷ those of the released step, {size} px', Released(size).step, Ours(size).step, '>= 1.3', images=BS)

def loss(bench, bs=256):
    "Loss, gradient and queue of one batch: time and memory"
    torch.manual_seed(0)
    five = [torch.randn(bs,D, requires_grad=i<2) for i in range(5)]
    theirs,queue = ReleasedQueue(), FeatureQueue(N,D)
    def three_calls(): torch.autograd.grad(theirs.loss(*five), five[:2])
    def fused():
        torch.autograd.grad(c2l_loss(*five, queue.feats, T, reduction='mean'), five[:2])
        queue.enqueue(*five[2:])
    bench.ratio('loss and gradient over the queue, B=256: three calls ÷ fused', three_calls, fused, '>= 2')
    a,b = (round(peak_memory(f)/2**20, 1) for f in (fused,three_calls))
    bench.add('the same, extra memory: fused ÷ three calls', a/b, '<= 0.5', unit='MB', pairs=[[a,b]])

parts = dict(passes=passes, released=released, loss=loss, augment=bench_augment.run)

if __name__=='__main__':
    p = arguments(__doc__)
    p.add_argument('--only', nargs='+', choices=parts, default=list(parts), help='figures to measure (default: all)')
    args = p.parse_args()
    bench = Bench(args.pairs, args.threads, args.cpu)
    for name in args.only: parts[name](bench)
    if args.save: bench.save(args.save, 'python tests/bench/bench_step.py')
