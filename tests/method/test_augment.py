"The augmentation against PIL and torchvision, and what its user may rely on"
import math, subprocess, sys
from pathlib import Path
import pytest, torch, torch.nn.functional as F
import torchvision.transforms as T, torchvision.transforms.functional as TF
from PIL import Image
from c2l_nb.method import augment as A
from c2l_nb.core import device_generator
from c2l_nb.method.augment import C2LAugment, Draw
from c2l_nb.data.phantom import phantom, seeded

def rng(seed=0): return torch.Generator().manual_seed(seed)
def films(n, size=256): return torch.stack([torch.as_tensor(phantom(i, size=size).image)[None] for i in range(n)])
def pil(x): return TF.to_pil_image(x)

@pytest.fixture(scope='module')
def x(): return films(6)

def plain(x, box, angle=0., flip=0., size=224, **kw):
    "`x` with one known box, angle and flip, and nothing else"
    b = len(x)
    d = Draw(torch.tensor([box]*b).float(), torch.full((b,), angle), torch.full((b,), flip), torch.ones(b,2),
             torch.zeros(b,0,2), torch.zeros(b,0), torch.zeros(b,0,0))
    return C2LAugment(size, **kw).apply(x, d)

def off(a, b): return (a-b).abs().mean().item()*255

@pytest.mark.parametrize('box', [(0,0,256,256), (10,20,240,230), (0,100,200,156), (30,60,120,150), (50,50,115,115)])
def test_crop_and_resize_equal_pil(x, box):
    "Mean difference to PIL's crop and antialiased bilinear resize: at most 2 of 255"
    top,left,h,w = box
    ours = plain(x, box)
    for o,im in zip(ours, x):
        assert off(o, TF.to_tensor(pil(im).resize((224,224), Image.BILINEAR, box=(left,top,left+w,top+h)))) <= 2

@pytest.mark.parametrize('size', [64,96,128,160])
def test_strong_reduction_is_near_pil_and_nearer_than_four_pixels(size):
    "512 px down: averaged first, closer to PIL's antialiased result than plain bilinear"
    for im in films(2, 512):
        ref = TF.to_tensor(pil(im).resize((size,size), Image.BILINEAR))
        ours = off(plain(im[None], (0,0,512,512), size=size)[0], ref)
        naive = off(F.interpolate(im[None]/255, size=size, mode='bilinear')[0], ref)
        assert ours <= 4 and ours < naive, (ours, naive)

@pytest.mark.parametrize('hw', [(511,513),(300,450)])
def test_reduction_of_odd_sizes_stays_in_place(hw):
    "A ramp keeps its values: no shift by the reduction"
    ramp = torch.linspace(.1,.9,hw[1]).expand(1,1,*hw)
    want = F.interpolate(ramp, size=(64,64), mode='bilinear', antialias=True)
    assert (plain(ramp, (0,0,*hw), size=64)-want)[...,2:-2].abs().max() < 2e-3

@pytest.mark.parametrize('angle', [-10.,-3.5,7.,10.])
def test_rotation_equals_pil(x, angle):
    "Rotation as PIL's bilinear one, in sense and size, inside the disc that both fill"
    at = torch.linspace(-1,1,256)
    disc = (at**2+at[:,None]**2) < .9
    ours = plain(x, (0,0,256,256), angle, size=256)
    for o,im in zip(ours, x):
        ref = TF.to_tensor(pil(im).rotate(angle, Image.BILINEAR))
        assert off(o[:,disc], ref[:,disc]) <= .6        # of this .5 is PIL's: it cuts decimals off
        assert off(o[:,disc], TF.to_tensor(pil(im).rotate(-angle, Image.BILINEAR))[:,disc]) > 2

def test_crop_rotate_flip_in_the_released_order(x):
    "One warp is what crop, resize, rotate, flip do one after the other"
    top,left,h,w = 40,30,150,180
    ours = plain(x, (top,left,h,w), 10., 1., corners='black')
    for o,im in zip(ours, x):
        ref = pil(im).resize((224,224), Image.BILINEAR, box=(left,top,left+w,top+h)).rotate(10, Image.BILINEAR)
        assert off(o, TF.to_tensor(TF.hflip(ref))) <= 2

def test_corners(x):
    "'true' shows the film outside the crop, 'black' nothing; outside the film lies `fill`"
    box = (60,60,120,120)
    true,black = plain(x, box, 10.), plain(x, box, 10., corners='black')
    assert (black[...,0,0]==0).all() and (true[...,0,0]>0).all()
    assert torch.equal(true[...,100:120,100:120], black[...,100:120,100:120])
    outside = plain(x, (0,0,256,256), 10., fill=.25)
    assert torch.allclose(outside[...,0,0], torch.tensor(.25), atol=1e-6)

@pytest.mark.parametrize('angle', [-45.,-10.,0.,10.,30.])
def test_black_corners_are_those_of_a_rotated_white_square(angle):
    "Against the two conditions place by place, but for the pixels that an edge runs through"
    n,a = 64,math.radians(angle)
    got = A.black_corners_(torch.ones(1,1,n,n), torch.tensor([angle]))[0,0]
    for i in range(0,n,3):
        for j in range(0,n,3):
            v,u = (i+.5)*2/n-1, (j+.5)*2/n-1
            far = max(abs(u*math.cos(a)-v*math.sin(a)), abs(u*math.sin(a)+v*math.cos(a)))
            if abs(far-1)>1.5/n: assert got[i,j]==(far<1)
            assert 0<=got[i,j]<=1

def test_film_edge_does_not_fade():
    "An enlarged crop at the film's edge keeps the edge pixel's value up to the rim"
    assert torch.allclose(plain(torch.ones(1,1,64,64), (0,0,32,32)), torch.tensor(1.))

def test_boxes_follow_torchvisions_law():
    "Means and spreads of 10,000 boxes, square and oblong images"
    for hw in ((256,256),(200,320),(150,320)):
        torch.manual_seed(0); im = torch.zeros(1,*hw)
        theirs = torch.tensor([T.RandomResizedCrop.get_params(im, (.2,1.), (3/4,4/3)) for _ in range(10000)]).float()
        ours = A.random_box(10000, hw, generator=rng())
        assert ((ours.mean(0)-theirs.mean(0)).abs() < .04*theirs.std(0)+.5).all()
        assert ((ours.std(0)/theirs.std(0).clamp(min=1e-9)-1).abs()[theirs.std(0)>1] < .03).all()
        assert (ours[:,:2]>=0).all() and (ours[:,:2]+ours[:,2:]<=torch.tensor(hw)).all()

def test_jitter_equals_torchvision(x):
    "Brightness and contrast on given factors, tensors and PIL"
    xb = x/255; b,c = torch.linspace(.6,1.4,6), torch.linspace(1.4,.6,6)
    for i,o in enumerate(A.jitter_(xb.clone(), b, c)):
        assert torch.allclose(o, TF.adjust_contrast(TF.adjust_brightness(xb[i], b[i].item()), c[i].item()), atol=1e-6)
        ref = TF.to_tensor(TF.adjust_contrast(TF.adjust_brightness(pil(x[i]), b[i].item()), c[i].item()))
        assert off(o, ref) <= 1.5        # PIL cuts decimals off after each of the two
    factors = C2LAugment(jitter=.4).draw(5000, (9,9), rng()).light
    assert factors.min()>=.6 and factors.max()<=1.4 and (factors.mean(0)-1).abs().max()<.02

def test_grayscale_saturation_hue_are_identities(x):
    "On a grey film copied to RGB, tensor or PIL, nothing changes; so `grayscale` changes nothing here"
    for im in x:
        rgb = pil(im).convert('RGB')
        for f in (T.RandomGrayscale(1.), lambda i: TF.adjust_saturation(i,.6), lambda i: TF.adjust_hue(i,.4)):
            assert (TF.pil_to_tensor(f(rgb))==TF.pil_to_tensor(rgb)).all()
    assert torch.equal(C2LAugment(grayscale=0.)(x, rng()), C2LAugment(grayscale=1.)(x, rng()))

@pytest.mark.parametrize('size', [64,100,224])
def test_cutout_equals_the_released_loop(size):
    "Holes scale with the size; at the border they are cut off as by the clipped slices of the released class"
    aug = C2LAugment(size); side = round(32*size/224)
    d = aug.draw(50, (size,size), rng())
    got = A.cutout_(torch.ones(50,2,size,size), d.holes, side, 0.)
    for im,holes in zip(got, d.holes.int().tolist()):
        want = torch.ones(2,size,size)
        for r,c in holes: want[:, max(0,r-side//2):r-side//2+side, max(0,c-side//2):c-side//2+side] = 0
        assert torch.equal(im, want)
    assert d.holes.min()>=0 and d.holes.max()<=size-1

def test_jigsaw_only_moves_tiles(x):
    "The same pixels, other places; each tile in one piece"
    out = A.jigsaw(x[:,:,:224,:224], torch.rand(6,16,generator=rng()).argsort(1))
    assert torch.equal(out.flatten(1).sort()[0], x[:,:,:224,:224].flatten(1).sort()[0])
    perm = torch.tensor([[2,0,3,1]])
    out,h = A.jigsaw(x[:1,:,:224,:224], perm), 112
    cells = [x[0,0,:112,:112], x[0,0,:112,112:224], x[0,0,112:224,:112], x[0,0,112:224,112:224]]
    for place,tile in enumerate(perm[0]):
        r,c = divmod(place,2)
        assert torch.equal(out[0,0,r*h:r*h+h,c*h:c*h+h], cells[tile])

def test_dropout_rate(x):
    "A share `dropout` of the pixels becomes `fill`"
    out = C2LAugment(dropout=.3, cutout=(0,32), fill=0.)(torch.ones_like(x)*255, rng())
    assert abs((out==0).float().mean()-.3) < .05

ALL = [dict(), dict(jitter=.4, corners='black'), dict(size=96, jigsaw=4, dropout=.1, jitter=.4)]

@pytest.mark.parametrize('kw', ALL)
def test_repeats_to_the_bit_and_leaves_the_input(x, kw):
    "One seed, one result; another seed, another; the input and torch's global generator stay as they were"
    aug,before,state = C2LAugment(**kw), x.clone(), torch.get_rng_state()
    one = aug(x, rng(1))
    assert torch.equal(one, aug(x, rng(1))) and not torch.equal(one, aug(x, rng(2)))
    assert torch.equal(x, before) and torch.equal(torch.get_rng_state(), state)
    f,fb = x/255, x/255
    aug(f, rng(1)); assert torch.equal(f, fb)
    assert one.min()>=0 and one.max()<=1 and one.dtype==torch.float32

@pytest.mark.parametrize('kw', ALL)
def test_each_image_has_its_own_draw_and_ignores_its_neighbours(x, kw):
    "Equal images, different views; a row of a batch equals that row alone"
    aug = C2LAugment(**kw)
    same = aug(x[:1].repeat(6,1,1,1), rng())
    assert all((same[i]-same[j]).abs().mean()>.01 for i in range(6) for j in range(i))
    d = aug.draw(6, (256,256), rng()); whole = aug.apply(x, d)
    for i in range(6):
        assert torch.allclose(aug.apply(x[i:i+1], Draw(*(t[i:i+1] for t in d))), whole[i:i+1], atol=1e-6)

@pytest.mark.parametrize('kw', ALL)
def test_types_agree(x, kw):
    "uint8, half, float32 and float64 give the same view; float64 stays float64; channels share the draw"
    aug = C2LAugment(**kw); want = aug(x, rng())
    assert torch.allclose(aug(x/255, rng()), want, atol=1e-6)
    double = aug(x.double()/255, rng())
    far = (double-want).abs()
    assert double.dtype==torch.float64 and far.mean()<1e-5 and far.max()<2e-2       # most at the rim of a black corner
    assert aug((x/255).half(), rng()).dtype==torch.float32
    three = aug(x.expand(-1,3,-1,-1), rng())
    assert torch.allclose(three, want.expand(-1,3,-1,-1), atol=1e-6)

@pytest.mark.parametrize('few', [1,2,4,99])
def test_sampling_in_groups_changes_nothing(monkeypatch, few):
    "A GPU samples a batch in one call for each reduction; here the same grouping on the CPU, reductions mixed"
    x,aug = films(8, 400), C2LAugment(size=128)
    d = aug.draw(8, (400,400), rng(3))
    assert len(set(A.reduction(d.box, 128))) > 1
    want,groups = aug.apply(x, d), A._groups
    monkeypatch.setattr(A, '_groups', lambda ks,n: groups(ks, few))
    assert torch.allclose(aug.apply(x, d), want, atol=1e-6)

def test_reduction_brings_the_step_to_the_limit():
    "After averaging no output pixel steps over more than 1.5 pixels, and none is averaged without need"
    box = torch.tensor([[0,0,s,s//2+1] for s in range(1,1200,7)])
    for b,k in zip(box, A.reduction(box, 224)):
        step = max(b[2:]).item()/224
        assert step/k <= 1.5 and (k==1 or step/(k-1) > 1.5)

def test_fastai_tensors(x):
    "fastai's image tensors go through"
    from fastai.torch_core import TensorImage
    aug = C2LAugment()
    for kw in (dict(), dict(jitter=.4, corners='black', jigsaw=2, dropout=.1)):
        aug = C2LAugment(**kw)
        assert torch.allclose(aug(TensorImage(x), rng()).as_subclass(torch.Tensor), aug(x, rng()), atol=1e-6)

def test_bad_input_says_what_to_do(x):
    "Each error names the argument"
    with pytest.raises(ValueError, match='jigsaw=3 does not divide'): C2LAugment(jigsaw=3)
    with pytest.raises(ValueError, match="'true' or 'black'"): C2LAugment(corners='grey')
    with pytest.raises(ValueError, match='x\\[None\\]'): C2LAugment()(x[0])
    with pytest.raises(ValueError, match='0..1'): C2LAugment()(x.float())
    with pytest.raises(ValueError, match='0..1'): C2LAugment()(x/255*float('nan'))

# ---- Draws: what they are on a CPU, where the large one is made on a GPU ---------------------------------------------------

def test_draws_on_a_cpu_are_what_they_always_were():
    "To the bit: runs that were begun with older versions go on"
    g, aug = seeded(7), C2LAugment(size=16, jitter=.4, jigsaw=2, dropout=.1)
    d = aug.draw(3, (20,24), g)
    assert d.box.sum() == 114 and d.box.flatten()[:3].tolist() == [2,3,16] and d.holes.sum() == 147 and d.flip.tolist() == [0,1,0]
    assert d.angle.tolist() == [0.8050274848937988, -7.969458103179932, -2.2436130046844482]
    assert d.light.flatten()[:3].tolist() == [1.2418031692504883, 1.190144419670105, 1.1155401468276978]
    assert d.tiles.flatten()[:3].tolist() == [3,2,1] and d.drop.sum() == 68
    assert d.drop.flatten().nonzero().flatten().tolist()[:12] == [0,34,35,50,53,75,79,84,87,97,99,101]
    assert torch.rand(1, generator=g).item() == 0.9853225946426392

def test_mask_of_another_device(monkeypatch):
    "Drawn there (meta stands for a GPU) from one number of the CPU's stream; all else as on a CPU"
    aug, used = C2LAugment(size=16, dropout=.1), []
    def seed(g, device):
        if device.type == 'cpu':
            return g
        used.append(int(torch.randint(2**62, (), generator=g)))      # a generator of meta there is not
    monkeypatch.setattr(A, 'large_generator', seed)
    here, there = seeded(7), seeded(7)
    a, b = aug.draw(3, (20,24), here), aug.draw(3, (20,24), there, 'meta')
    assert b.drop.device.type == 'meta' and b.drop.shape == a.drop.shape
    assert all(torch.equal(v, w) for v, w in zip(a[:-1], b[:-1]))
    same = seeded(7)
    C2LAugment(size=16).draw(3, (20,24), same)
    assert used == [int(torch.randint(2**62, (), generator=same))] and torch.equal(torch.rand(1, generator=same), torch.rand(1, generator=there))

def test_generator_of_a_device():
    "The same seed, the same mask; the next, another; the share is right"
    def mask(g): return torch.rand(8, 64, 64, generator=device_generator(g, torch.device('cpu'))) < .1
    g = seeded(1)
    first, second = mask(g), mask(g)
    assert torch.equal(first, mask(seeded(1))) and not torch.equal(first, second) and abs(first.float().mean() - .1) < .01

def test_range_is_looked_at_once_on_a_gpu(monkeypatch):
    "Every batch on a CPU; on a GPU, where the host must wait for it, the first"
    class There:                                             # a batch as a GPU would hold it
        device = torch.device('cuda')
        def __init__(self, x): self.x, self.looks = x, 0
        def is_floating_point(self): return True
        def aminmax(self): self.looks += 1; return self.x.aminmax()
    aug, good, bad = C2LAugment(16), torch.rand(2,1,20,20), torch.full((2,1,20,20), 7.)
    for x in (good, bad):
        held = There(x)
        aug._check_range(held)
        assert held.looks == (x is good)
    with pytest.raises(ValueError, match='7 to 7'): aug._check_range(bad)
    with pytest.raises(ValueError, match='7 to 7'): C2LAugment(16)._check_range(There(bad))
    with pytest.raises(ValueError, match='nan'): C2LAugment(16)(good*float('nan'))

STRICT = """import torch
from c2l_nb.method import augment as A
aug = A.C2LAugment(32, jitter=.4, jigsaw=2, dropout=.2, corners='black')
x = torch.randint(256, (4,1,256,256), dtype=torch.uint8)
d = aug.draw(4, (256,256), torch.Generator().manual_seed(0))
ks = A.reduction(d.box, 32)
groups, index = A._groups, torch.Tensor.__getitem__
assert len(set(ks)) > 1 and any(isinstance(r, list) for r,_ in groups(ks, 4))
def strict(t, i):
    assert not isinstance(i, list), 'a list as an index'
    return index(t, i)
def read(*a): raise AssertionError('a number was read')
torch.Tensor.__getitem__ = strict
A.reduction = lambda box, size: ks                       # its numbers are the CPU's own
A._groups = lambda ks, n: groups(ks, 4)
for name in ('item', 'tolist', '__bool__', '__float__', '__int__'):
    setattr(torch.Tensor, name, read)
aug.apply(x, d)"""

def test_nothing_waits_for_a_gpu():
    """No list as an index and no number is read from a tensor of the images' device while a draw is carried out; in a process of its own,
    since a method of `Tensor` that was replaced once leaves a trace for good"""
    done = subprocess.run([sys.executable, '-W', 'ignore', '-c', STRICT], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
