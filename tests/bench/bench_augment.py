"""Two 224 px views a radiograph from decoded 256 px images, on one core: C2LAugment against the released code's PIL transforms.

A figure is the released pipeline's CPU time ÷ ours, as tests/bench/benchmarks.py measures and prints it. The released pipeline keeps its
order (train_C2L_res18.py:200-213) and ends in a list of normalised 3×224×224 tensors, not collated; ours ends in two batches of
1×224×224, as the step copies to three channels and normalises inside the model. One line counts that too.
"""
import numpy as np, torch
import torchvision.transforms as T
from PIL import Image
from benchmarks import Bench, arguments
from c2l_nb.method.augment import C2LAugment
from c2l_nb.data.phantom import phantom

MEAN,STD = [.485,.456,.406], [.229,.224,.225]

class Cutout:
    "Holes as the released class makes them: a numpy mask, multiplied after normalising"
    def __init__(self, n, length): self.n,self.length = n,length
    def __call__(self, x):
        h,w = x.shape[1:]; mask,half = np.ones((h,w), np.float32), self.length//2
        for _ in range(self.n):
            r,c = np.random.randint(h), np.random.randint(w)
            mask[max(0,r-half):min(h,r+half), max(0,c-half):min(w,c+half)] = 0
        return x*torch.from_numpy(mask).expand_as(x)

released = T.Compose([T.RandomResizedCrop(224, scale=(.2,1.)), T.RandomRotation(10), T.RandomGrayscale(.2), T.ColorJitter(.4,.4,.4,.4),
                      T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize(MEAN, STD), Cutout(3,32)])

def run(bench, bs=32):
    "The figures of the augmentation"
    torch.manual_seed(0); np.random.seed(0)
    films = [phantom(i, size=256).image for i in range(bs)]
    x,pils = torch.stack([torch.as_tensor(f)[None] for f in films]), [Image.fromarray(f).convert('RGB') for f in films]
    mean,std = (torch.tensor(v)[:,None,None] for v in (MEAN,STD))
    g = torch.Generator().manual_seed(0)
    paper,official = C2LAugment(224), C2LAugment(224, jitter=.4, corners='black')
    theirs = lambda: [(released(p),released(p)) for p in pils]
    figures = {'augmentation, two views, one core': lambda: (paper(x,g),paper(x,g)),
               'the same with brightness, contrast and black corners': lambda: (official(x,g),official(x,g)),
               'the same, copied to 3 channels and normalised': lambda: [v.sub(mean).div_(std) for v in (official(x,g),official(x,g))]}
    for name,ours in figures.items(): bench.ratio(name, theirs, ours, '>= 4', threads=1, cpu=True, images=bs)

if __name__=='__main__':
    args = arguments(__doc__).parse_args()
    bench = Bench(args.pairs)
    run(bench)
    if args.save: bench.save(args.save, 'python tests/bench/bench_augment.py')
