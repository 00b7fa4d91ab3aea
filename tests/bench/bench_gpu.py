"""Speed of C2L on a GPU: of a step, against its bare passes and the released step; of its parts, of the loader, of the whole command.

Batches of 256 images of 224 px, a queue of 32768 keys, SGD, channels-last, torch's default settings. A ratio is the median of seven
alternated pairs, of three where one takes more than 0.3 s. Every figure is written to --save as soon as it is known; a part that fails
is recorded and the next goes on; parts that --seconds leave no time for are named. tests/bench/bench_step.py says how the released step is imitated.
"""
import time
BEGAN = time.monotonic()                                   # importing takes a while, and counts
import argparse, functools, json, statistics, tempfile, traceback
from pathlib import Path
from typing import NamedTuple
import numpy as np
import torch
import torch.nn.functional as F
from fastai.basics import Callback, Learner
from fastai.callback.channelslast import ChannelsLast
from fastcore.basics import noop
from torch.utils.flop_counter import FlopCounterMode
import bench_step
from benchmarks import Bench, machine
from c2l_nb.data.cache import Squares, pretrain_dls
from c2l_nb.training.callback import C2LCallback, StepDecay, c2l_opt
from c2l_nb.core import choose_device
from c2l_nb.method.encoder import create_encoder
from c2l_nb.training.monitoring import CollapseGuard, HealthCallback
from c2l_nb.method.loss import c2l_loss
from c2l_nb.method.model import C2L, C2LConfig
from c2l_nb.tasks.pretrain import Precision

T, WIDTH = .07, 128
POOL, EPOCHS, DAY = 727_053, 240, 24                       # images and epochs of the paper; hours
DTYPES = dict(fp32=None, bf16=torch.bfloat16)


class Setting(NamedTuple):
    "How large everything is"
    device: torch.device
    batch: int = 256
    side: int = 224
    queue: int = 32768
    kept: int = 4096            # images in the cache on disk
    matrix: int = 8192          # side of the matrices that show the device's peak
    archs: tuple = ('resnet18', 'densenet121')


class GpuBench(Bench):
    "Figures that are written at once, of calls that are waited for"
    def __init__(self, s, path, seconds, pairs):
        super().__init__(pairs, torch.get_num_threads())
        self.s, self.path, self.end = s, path, BEGAN + seconds
        self.facts, self.failed, self.skipped, self.running = {}, {}, [], None

    def wait(self):
        if self.s.device.type == 'cuda':
            torch.cuda.synchronize()

    def seconds(self, f):
        "Of one call"
        self.wait()
        start = time.perf_counter()
        f()
        self.wait()
        return time.perf_counter() - start

    def ratio(self, name, a, b, goal, images=None):
        "Seconds of `a()` ÷ seconds of `b()`, after one call of each"
        a()
        slow = max(self.seconds(a), self.seconds(b)) > .3
        pairs = [[round(self.seconds(f), 6) for f in (a, b)] for _ in range(min(3, self.pairs) if slow else self.pairs)]
        self.add(name, statistics.median(x/y for x, y in pairs), goal, pairs=pairs, images=images)
        self.write()
        return statistics.median(x for x, _ in pairs)

    def fact(self, name, value, unit=''):
        "A figure without a goal"
        self.facts[name] = dict(value=value, unit=unit)
        print(f'{name} | {value:.4g} {unit}', flush=True)
        self.write()

    def write(self):
        about = machine()
        if self.s.device.type == 'cuda':
            p = torch.cuda.get_device_properties(self.s.device)
            about |= dict(gpu=p.name, memory_gib=round(p.total_memory/2**30, 1), cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version())
        done = dict(command='python tests/bench/bench_gpu.py', machine=about, setting=self.s._asdict() | dict(device=self.s.device.type),
                    facts=self.facts, figures=self.figures, failed=self.failed, skipped=self.skipped, running=self.running)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(done, indent=1) + '\n')

    def run(self, parts):
        for name, (part, least) in parts.items():
            self.running = name
            if self.end - time.monotonic() < least:
                self.skipped.append(name)
                self.write()
                continue
            try:
                part(self)
            except Exception as e:
                self.failed[name] = f'{type(e).__name__}: {e}'[:500]
                traceback.print_exc(limit=-3)
                self.write()
            if self.s.device.type == 'cuda':
                torch.cuda.empty_cache()
        self.running = None                                # a file that names a part was left in the middle of it
        self.write()


class Step:
    "Algorithm 1 by the library's parts, on a batch of uint8 radiographs that lies on the device"
    def __init__(self, s, arch, precision):
        torch.manual_seed(0)
        model = C2L(create_encoder(arch, channels=1), C2LConfig.paper(size=s.side, queue_size=s.queue))
        self.model = model.to(s.device, memory_format=torch.channels_last).train()
        self.model.amp_dtype = DTYPES[precision]
        self.opt, self.augment = bench_step.sgd(self.model.student.parameters()), self.model.augmentation(s.side)
        self.x = torch.randint(256, (s.batch, 1, s.side*8//7, s.side*8//7), dtype=torch.uint8, device=s.device)
        self.ready = torch.randn(s.batch, 1, s.side, s.side, device=s.device)
        self.grad = torch.randn(s.batch, WIDTH, device=s.device)
        self.autocast = functools.partial(torch.autocast, s.device.type, dtype=DTYPES[precision], enabled=precision != 'fp32')

    def views(self):
        return self.model.views(self.x, self.augment)

    def step(self, x=None):
        m = self.model
        five = m(*m.views(self.x if x is None else x, self.augment))
        m.loss(*five).backward()
        self.opt.step()
        self.opt.zero_grad()
        m.teacher.update(m.student)
        m.queue.enqueue(*m.keys(*five))
        m.seen += 1

    def bare(self):
        "Two forwards and backwards of the student, two forwards of the teacher"
        for _ in range(2):
            with self.autocast():
                out = self.model.student(self.ready)
            out.float().backward(self.grad)
        with self.autocast():
            for _ in range(2):
                self.model.teacher(self.ready)
        self.opt.zero_grad()

    def stages(self):
        "Name -> function, which together are a step, in order"
        m, held = self.model, {}
        def augment(): held['views'] = self.views()
        def forward(): held['five'] = m(*held['views'])
        def loss(): held['loss'] = m.loss(*held['five'])
        def backward(): held['loss'].backward()
        def optimiser():
            self.opt.step()
            self.opt.zero_grad()
        def teacher(): m.teacher.update(m.student)
        def queue():
            m.queue.enqueue(*m.keys(*held['five']))
            m.seen += 1
        return dict(augment=augment, forward=forward, loss=loss, backward=backward, optimiser=optimiser, teacher=teacher, queue=queue)


class ReleasedQueue(bench_step.ReleasedQueue):
    "Its loss is computed in float32, as ours is"
    def loss(self, *five):
        with torch.autocast(five[0].device.type, enabled=False):
            return super().loss(*(v.float() for v in five))


class Released(bench_step.Released):
    "The released step with everything on the device"
    def __init__(self, s, precision):
        bench_step.N = s.queue
        self.device = s.device
        self.autocast = functools.partial(torch.autocast, s.device.type, dtype=DTYPES[precision], enabled=precision != 'fp32')
        with torch.device(s.device):
            super().__init__(s.side, s.batch)
            self.queue = ReleasedQueue()

    def step(self):
        with torch.device(self.device), self.autocast():
            super().step()


def peak(b):
    "What the device can do: matrix products, and copying"
    n, s = b.s.matrix, b.s
    for name, dtype in (('bf16', torch.bfloat16), ('fp32', torch.float32)):
        a = torch.randn(n, n, device=s.device, dtype=dtype)
        def products():
            for _ in range(5):
                a @ a
        products()
        b.fact(f'matrix product, {name}', 5*2*n**3/b.seconds(products)/1e12, 'TFLOP/s')
    big = torch.empty(n*n*8, dtype=torch.uint8, device=s.device)
    big.clone()
    b.fact('copy on the device', 2*big.numel()/b.seconds(big.clone)/1e9, 'GB/s')


def flops(arch, side):
    "Of one forward of one image"
    net = create_encoder(arch, channels=1).to('meta').eval()
    with FlopCounterMode(display=False) as counter:
        net(torch.empty(1, 1, side, side, device='meta'))
    return counter.get_total_flops()


def passes(b, arch, precision):
    "The step ÷ what it cannot do without; its memory, and the share of the device's peak"
    step, name = Step(b.s, arch, precision), f'{arch}, {precision}'
    if b.s.device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        step.step()
        b.fact(f'peak memory of a step: {name}', torch.cuda.max_memory_allocated()/2**30, 'GiB')
    took = b.ratio(f'C2L step ÷ its four bare network passes: {name}', step.step, step.bare, '<= 1.05', images=b.s.batch)
    b.fact(f'images/s of a step: {name}', b.s.batch/took, 'images/s')
    speed = 8*flops(arch, b.s.side)*b.s.batch/took/1e12               # a backward pass counts as two forward passes
    b.fact(f'arithmetic of a step: {name}', speed, 'TFLOP/s')
    best = b.facts.get('matrix product, bf16')
    if best and precision == 'bf16':
        b.fact(f'share of the peak of matrix products: {name}', speed/best['value'])


def released(b, precision):
    ours, theirs = Step(b.s, b.s.archs[0], precision), Released(b.s, precision)
    name = f'images/s of the step ÷ those of the released step: {b.s.archs[0]}, {precision}'
    b.ratio(name, theirs.step, ours.step, '>= 1.5', images=b.s.batch)


def shares(b, precision='bf16'):
    "Share of time by part, each waited for"
    arch = b.s.archs[0]
    stages = Step(b.s, arch, precision).stages()
    times = {name: [] for name in stages}
    for _ in range(b.pairs + 1):
        for name, f in stages.items():
            times[name].append(b.seconds(f))
    middle = {name: statistics.median(t[1:]) for name, t in times.items()}
    for name, t in middle.items():
        b.fact(f'share of a step: {name}, {arch}, {precision}', t/sum(middle.values()))


def augmentation(b):
    step = Step(b.s, b.s.archs[0], 'bf16')
    b.ratio(f'two views of a batch ÷ a step: {b.s.archs[0]}, bf16', step.views, step.step, '<= 0.1', images=b.s.batch)


def queue_loss(b):
    "Loss and gradient over the queue: the streaming pass against the plain product"
    torch.manual_seed(0)
    five = [torch.randn(b.s.batch, WIDTH, device=b.s.device, requires_grad=i < 2) for i in range(5)]
    feats = F.normalize(torch.randn(b.s.queue, WIDTH, device=b.s.device), dim=1)

    def plain():
        q, q_mix, k, k_mix, k_feat = (F.normalize(v, dim=1) for v in five)
        neg, neg_mix = (torch.cat([q, q_mix]) @ feats.T/T).logsumexp(1).chunk(2)
        terms = []
        for a, key, others in ((q, k, neg), (q_mix, k_mix, neg_mix), (q_mix, k_feat, neg_mix)):
            pos = (a*key).sum(1)/T
            terms.append((torch.logaddexp(pos, others) - pos).mean())
        return torch.autograd.grad(sum(terms), five[:2])

    def streaming():
        return torch.autograd.grad(c2l_loss(*five, feats, T), five[:2])

    torch.testing.assert_close(plain(), streaming(), rtol=1e-2, atol=1e-5)
    b.ratio('loss and gradient over the queue: plain product ÷ the package', plain, streaming, '>= 1')
    for name, f in dict(plain=plain, package=streaming).items():
        if b.s.device.type == 'cuda':
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            f()
            b.fact(f'memory of loss and gradient: {name}', (torch.cuda.max_memory_allocated() - before)/2**20, 'MiB')


def on_disk(s, folder, times=1):
    "A cache's pixels, each image so many times"
    side, path = s.side*8//7, Path(folder)/'images.npy'
    images = np.lib.format.open_memmap(path, 'w+', np.uint8, (s.kept, side, side))
    images[:] = np.random.default_rng(0).integers(0, 256, images.shape, dtype=np.uint8)
    images.flush()
    return Squares(path, np.tile(np.arange(s.kept), times))


def workers_of(s):
    return 4 if s.device.type == 'cuda' else 0


def loader(b):
    "Steps that are fed from a cache on disk ÷ steps on a batch that lies on the device; the first quarter is not counted"
    step = Step(b.s, b.s.archs[0], 'bf16')
    with tempfile.TemporaryDirectory() as folder:
        images = on_disk(b.s, folder)
        for workers in sorted({0, workers_of(b.s)}):
            train = pretrain_dls(images, b.s.batch, workers=workers).train
            first = len(train)//4

            def clocked(batches):
                for i, x in enumerate(batches):
                    step.step(x)
                    if i + 1 == first:
                        b.wait()
                        start = time.perf_counter()
                b.wait()
                return time.perf_counter() - start

            def fed(): return clocked(x for x, _ in train)
            def resident(): return clocked(step.x for _ in range(len(train)))

            fed()
            pairs = [[round(f(), 6) for f in (fed, resident)] for _ in range(min(3, b.pairs))]
            ratio = statistics.median(x/y for x, y in pairs)
            count = (len(train) - first)*b.s.batch
            b.add(f'steps fed from a cache ÷ on a resident batch: {workers} workers', ratio, '<= 1.02', pairs=pairs, images=count)
            b.write()


class Clock(Callback):
    "Seconds of an epoch's batches but for the first quarter"
    order, run_valid = 99, False

    def __init__(self, wait):
        self.wait = wait

    def before_batch(self):
        if self.training and self.iter == self.n_iter//4:
            self.wait()
            self.start = time.perf_counter()

    def after_train(self):
        self.wait()
        self.seconds = time.perf_counter() - self.start
        self.batches = self.n_iter - self.n_iter//4


def command(b, arch, precision='bf16'):
    "What `c2l_pretrain` does, data from a cache on disk"
    with tempfile.TemporaryDirectory() as folder:
        images = on_disk(b.s, folder, times=3)
        dls = pretrain_dls(images, b.s.batch, workers=workers_of(b.s))
        clock, config = Clock(b.wait), C2LConfig.paper(size=b.s.side, queue_size=b.s.queue)
        cbs = [C2LCallback(config), HealthCallback(samples=1), CollapseGuard(), ChannelsLast(), StepDecay(), Precision(precision), clock]
        learn = Learner(dls, create_encoder(arch, channels=1), opt_func=c2l_opt, cbs=cbs, path=folder)
        learn.logger = noop
        with learn.no_bar():
            learn.fit(1, .03)
        rate = clock.batches*b.s.batch/clock.seconds
    name = f'{arch}, {precision}'
    b.add(f'images/s of the command ÷ 2050: {name}', rate/2050, '>= 1')
    b.add(f"hours of the paper's whole run, from it: {name}", POOL*EPOCHS/rate/3600, f'<= {DAY}')
    b.fact(f'images/s of the command: {name}', rate, 'images/s')


def settings(b):
    "What torch's switches give"
    for precision, module, switch in (('bf16', torch.backends.cudnn, 'benchmark'), ('fp32', torch.backends.cudnn, 'allow_tf32')):
        step, before = Step(b.s, b.s.archs[0], precision), getattr(module, switch)
        times = {}
        for value in (False, True):
            setattr(module, switch, value)
            step.step()
            times[value] = statistics.median(b.seconds(step.step) for _ in range(b.pairs))
        setattr(module, switch, before)
        b.fact(f'step without cudnn.{switch} ÷ with it: {b.s.archs[0]}, {precision}', times[False]/times[True])


def compiled(b):
    "torch.compile of both networks"
    plain, fast = Step(b.s, b.s.archs[0], 'bf16'), Step(b.s, b.s.archs[0], 'bf16')
    fast.model.student.backbone.compile()
    fast.model.teacher.module.backbone.compile()
    b.fact('first compiled step', b.seconds(fast.step), 's')
    b.ratio(f'step ÷ the same under torch.compile: {b.s.archs[0]}, bf16', plain.step, fast.step, '>= 1', images=b.s.batch)


def parts(archs):
    "Name -> part and the seconds that it may need, the most valuable first"
    call = functools.partial
    first, *others = archs
    found = {'peak': (peak, 3), f'passes {first} bf16': (call(passes, arch=first, precision='bf16'), 5), 'command': (call(command, arch=first), 8),
             'released bf16': (call(released, precision='bf16'), 5), 'shares': (shares, 3), 'loader': (loader, 8),
             'queue_loss': (queue_loss, 3), 'augmentation': (augmentation, 3)}
    for arch in others:
        found[f'passes {arch} bf16'] = call(passes, arch=arch, precision='bf16'), 8
    for arch in archs:
        found[f'passes {arch} fp32'] = call(passes, arch=arch, precision='fp32'), 8
    found |= {'released fp32': (call(released, precision='fp32'), 5), 'settings': (settings, 5)}
    for arch in others:
        found[f'command {arch}'] = call(command, arch=arch), 10
    return found | {'compiled': (compiled, 20)}


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('--device', help='cpu: everything at toy size; default: the GPU where there is one')
    p.add_argument('--seconds', type=float, default=120, help='no part is begun that would end later (default 120)')
    p.add_argument('--pairs', type=int, help='alternated pairs a figure (default 7; 1 on a CPU)')
    p.add_argument('--only', nargs='+', help='parts to measure (default: all)')
    p.add_argument('--save', type=Path, default=Path('bench_gpu.json'), help='JSON file for the figures (default bench_gpu.json)')
    args = p.parse_args()
    device = choose_device(args.device)
    toy = device.type == 'cpu'
    s = Setting(device, 4, 32, 64, 16, 128, ('tiny',)) if toy else Setting(device)
    known = parts(s.archs)
    if toy:
        del known['compiled']                              # takes a CPU half a minute and says nothing
    bench = GpuBench(s, args.save, args.seconds, args.pairs or (1 if toy else 7))
    bench.run({name: part for name, part in known.items() if name in (args.only or known)})
    print(f'{len(bench.figures)} figures, {len(bench.facts)} facts; failed: {sorted(bench.failed)}; skipped: {bench.skipped}')
