"""Speed of detection: a training step through fastai against torchvision's reference loop, and the competition's metric on 5,000 images.

The step is `detect`'s own `Learner` (loader, augmentation of the boxes, callbacks, optimiser) on 256 px images in batches of 4. The reference is
the loop of torchvision's detection references (engine.py, `train_one_epoch`) around torchvision's RetinaNet with the same body, pyramid, heads and anchors, its own
transform and normalisation, the same augmentation, AdamW and gradient clipping; NCHW, as that script trains. Both run the same images, and train only: no validation, no progress bar.
"""
import time
import numpy as np, torch
from fastai.callback.progress import ProgressCallback
from torchvision.models.detection import RetinaNet
from benchmarks import Bench, arguments, busy, timed
from c2l_nb.evaluation.detection_metrics import map_table
from c2l_nb.tasks.detect import BoxPool, Detector, box_augment, detection_learner
from c2l_nb.method.encoder import create_encoder

SIZE,BS,STEPS,WIDTH = 256,4,2,128

def data(n=BS*STEPS):
    "Images of noise, one box on every second"
    r = np.random.default_rng(0)
    return r.integers(0, 256, (n,SIZE,SIZE), np.uint8), [[(60.,50.,70.,90.)] if i%2 else [] for i in range(n)]

def detector():
    torch.manual_seed(0)
    return Detector(create_encoder('resnet18', channels=1), SIZE, width=WIDTH)

def ours():
    "An epoch of `STEPS` batches by `learn.fit`, after one that warms up"
    images,boxes = data()
    all_,none = np.ones(len(images), bool), np.zeros(len(images), bool)
    none[0] = True
    learn = detection_learner(images, boxes, all_, none, detector(), BS)
    learn.remove_cbs([cb for cb in learn.cbs if isinstance(cb, ProgressCallback)])
    learn.remove_cbs([cb for cb in learn.cbs if cb.name == 'recorder'])
    learn.metrics = []
    learn._do_epoch_validate = lambda *a, **k: None
    return lambda: learn.fit(1, 5e-4)

def reference():
    "The same by torchvision's loop"
    net,(images,boxes) = detector(), data()
    prepare = net.transform.prepare
    model = RetinaNet(net.backbone, 1, anchor_generator=net.anchor_generator, head=net.head, min_size=SIZE, max_size=SIZE,
                      image_mean=prepare.mean, image_std=prepare.std).train()
    opt = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=.05)
    rate = torch.optim.lr_scheduler.LinearLR(opt, start_factor=.5, total_iters=1000)
    pool = BoxPool(images, boxes, tfms=box_augment())
    loader = torch.utils.data.DataLoader(pool, BS, shuffle=True, collate_fn=lambda batch: tuple(zip(*batch)))
    def epoch():
        model.train()
        for x,targets in loader:
            loss = sum(model([im/255 for im in x], list(targets)).values())
            if not np.isfinite(loss.item()): raise RuntimeError('loss is not finite')
            opt.zero_grad(); loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
            opt.step(); rate.step()
    return epoch

def step(bench): bench.ratio("detector's training step ÷ torchvision's reference loop, 256 px", ours(), reference(), '<= 1.1', images=BS*STEPS)

def metric(bench, n=5000):
    "All score thresholds and IoUs with intervals of 1,000 resamples; 20 predictions an image, most of them near or on a truth"
    void, r = busy()>.1, np.random.default_rng(0)
    truths = [[(*r.uniform(0,120,2), *r.uniform(40,100,2)) for _ in range(r.integers(0,4))] for _ in range(n)]
    near = lambda t: [(r.random(), *(np.array(b)+r.normal(0,6,4))) for b in t for _ in range(4)]
    preds = [(near(t) + [(r.random(), *r.uniform(0,120,2), 60, 60) for _ in range(20)])[:20] for t in truths]
    clock = time.process_time if bench.cpu else time.perf_counter
    bench.add('the metric on 5,000 images with intervals, s', timed(lambda: map_table(truths, preds), clock), '<= 10', void)

parts = dict(step=step, metric=metric)

if __name__=='__main__':
    p = arguments(__doc__)
    p.add_argument('--only', nargs='+', choices=parts, default=list(parts), help='figures to measure (default: all)')
    args = p.parse_args()
    bench = Bench(args.pairs, args.threads, args.cpu)
    for name in args.only: parts[name](bench)
    if args.save: bench.save(args.save, 'python tests/bench/bench_detect.py')
