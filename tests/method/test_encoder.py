"The encoder's parts against hand-checkable values and the libraries they wrap"
import builtins, pytest, torch
from torch import nn
from c2l_nb.method.encoder import (IMAGENET_MEAN, IMAGENET_STD, Encoder, Prepare, ProjectionHead, create_encoder,
                            ends_in_linear, feature_width, fold_rgb, in_channels, pool)

def image(*shape, seed=0): return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))
def seeded(*args, **kw):
    torch.manual_seed(0)
    return create_encoder(*args, **kw).eval()

@pytest.mark.parametrize('arch,width', [('resnet18', 512), ('densenet121', 1024)])
def test_torchvision_bodies(arch, width):
    "The paper's two networks: their width at two sizes, torchvision's key names without the classifier, no linear end"
    import torchvision
    m = create_encoder(arch)
    assert feature_width(m) == feature_width(m, size=96) == width and in_channels(m) == 3
    whole = set(torchvision.models.get_model(arch).state_dict())
    head = 'classifier' if arch.startswith('densenet') else 'fc'
    assert whole - set(m.state_dict()) == {f'{head}.weight', f'{head}.bias'} and set(m.state_dict()) < whole
    assert not ends_in_linear(m) and m.arch == arch

def test_tiny():
    "Three convolutions of stride 2, a map of 3×3: 576 features of one channel or three; its exported file loads by its card alone"
    from c2l_nb.training.weights import export_backbone, load_backbone
    for channels in (1, 3):
        m = create_encoder('tiny', channels=channels)
        assert feature_width(m) == 576 and in_channels(m) == channels and m.arch == 'tiny' and not ends_in_linear(m)
    m, x = seeded('tiny', channels=1), image(2, 1, 48, 48)
    assert m[:-2](x).shape == (2, 64, 6, 6)
    import tempfile
    with tempfile.TemporaryDirectory() as folder:
        path = export_backbone(m, f'{folder}/tiny.safetensors')
        assert torch.equal(load_backbone(path).eval()(x), m(x))
        wide = load_backbone(path, create_encoder('tiny', channels=3)).eval()
        torch.testing.assert_close(wide(x.expand(-1, 3, -1, -1)), m(x))
    with pytest.raises(ValueError, match='1 or 3'): create_encoder('tiny', channels=2)
    with pytest.raises(ValueError, match='no ImageNet weights'): create_encoder('tiny', weights='imagenet')

@pytest.mark.parametrize('arch', ['resnet18', 'densenet121'])
def test_one_channel_equals_three_copies(arch):
    "Folding: from the same seed, one channel and three equal ones give the same features (float64)"
    torch.set_default_dtype(torch.float64)
    try: m1, m3, x = seeded(arch, channels=1), seeded(arch), image(2, 1, 64, 64)
    finally: torch.set_default_dtype(torch.float32)
    with torch.no_grad(): a, b = m1(x), m3(x.expand(-1, 3, -1, -1))
    assert in_channels(m1) == 1
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)

def test_fold_rgb_by_hand():
    "Kernels 1, 2 and 4 fold to 7; the rest of the convolution stays; other convolutions are refused"
    conv = nn.Conv2d(3, 2, 1, stride=2)
    with torch.no_grad(): conv.weight.copy_(torch.tensor([1., 2., 4.])[None,:,None,None].expand(2, -1, -1, -1))
    one = fold_rgb(conv)
    assert one.weight.shape == (2, 1, 1, 1) and (one.weight == 7).all() and one.stride == (2, 2) and one.in_channels == 1
    assert torch.equal(one.bias, conv.bias) and conv.weight.shape[1] == 3
    assert one.weight.requires_grad and isinstance(one.weight, nn.Parameter)
    for bad in nn.Conv2d(1, 2, 1), nn.Conv2d(3, 3, 1, groups=3):
        with pytest.raises(ValueError, match='fold_rgb'): fold_rgb(bad)

def test_seed_repeats():
    "`torch.manual_seed` repeats the initial weights to the bit"
    for a, b in zip(seeded().parameters(), seeded().parameters()): assert torch.equal(a, b)

def test_timm_body():
    "Any timm name gives features, of one channel too"
    pytest.importorskip('timm')
    m = create_encoder('mobilenetv3_small_050', channels=1)
    assert in_channels(m) == 1 and feature_width(m) == 1024 and not ends_in_linear(m)

def test_wrong_arguments(monkeypatch):
    "Each error says what to do"
    with pytest.raises((ValueError, ImportError), match='resnet18'): create_encoder('resent18')
    with pytest.raises(ValueError, match='load_backbone'): create_encoder(weights='my.safetensors')
    with pytest.raises(ValueError, match='1 or 3'): create_encoder(channels=2)
    real = builtins.__import__
    def no_timm(name, *a, **k):
        if name == 'timm': raise ImportError(name)
        return real(name, *a, **k)
    monkeypatch.setattr(builtins, '__import__', no_timm)
    with pytest.raises(ImportError, match=r"pip install 'c2l_nb\[timm\]'"): create_encoder('efficientnet_b0')

def test_download_failure(monkeypatch):
    "Without a network the error names the arch and the way out"
    import torchvision
    def fail(*a, **k): raise OSError('no route')
    monkeypatch.setattr(torchvision.models, 'get_model', fail)
    with pytest.raises(OSError, match='ImageNet weights of resnet18.*weights=None'): create_encoder(weights='imagenet')

def test_pool():
    "The mean over positions; vectors pass"
    f = torch.arange(8.).reshape(1, 2, 2, 2)
    assert pool(f).tolist() == [[1.5, 5.5]] and pool(f[...,0,0]).tolist() == [[0., 4.]]

class Odd(nn.Module):
    "A body whose parts draw random numbers, hold mixed modes and answer with `out`"
    def __init__(self, out):
        super().__init__()
        self.bn, self.conv, self.out = nn.BatchNorm2d(1), nn.Conv2d(1, 4, 3), out
    def forward(self, x):
        torch.rand(3)
        assert not self.training and not torch.is_grad_enabled()
        return self.out(self.conv(self.bn(x)))

def test_feature_width_leaves_no_trace():
    "Modes, statistics and random state are as before; dtype and channels are the body's own"
    m = Odd(lambda f: f).double().train()
    m.bn.eval()
    state, rng = {k: v.clone() for k, v in m.state_dict().items()}, torch.get_rng_state()
    assert feature_width(m) == 4
    assert m.training and not m.bn.training and torch.equal(rng, torch.get_rng_state())
    assert all(torch.equal(v, state[k]) for k, v in m.state_dict().items())
    assert feature_width(nn.Flatten(), channels=2, size=4) == 32  # no parameter, no convolution

@pytest.mark.parametrize('out,what', [(lambda f: (f, f), 'tuple'), (lambda f: f.flatten(2), '3 dimensions'), (lambda f: {'x': f}, 'dict')])
def test_feature_width_refuses(out, what):
    "An output that is no feature tensor is named, and the mode restored"
    m = Odd(out).train()
    with pytest.raises(ValueError, match=what): feature_width(m)
    assert m.training

def test_ends_in_linear():
    "A final classifier is seen through Identity and Dropout; a linear layer inside is none"
    lin = nn.Linear(2, 2)
    assert ends_in_linear(lin) and ends_in_linear(nn.Sequential(nn.ReLU(), lin, nn.Dropout(), nn.Identity()))
    assert not ends_in_linear(nn.Sequential(lin, nn.ReLU())) and not ends_in_linear(nn.Identity())

def test_heads_and_encoder():
    "Shapes and layers of both heads; the encoder holds the user's module, and features feed the head"
    shapes = lambda *args: [tuple(p.shape) for p in ProjectionHead(*args).parameters() if p.ndim == 2]
    assert shapes(6) == [(128, 6)] and shapes(6, 3, 'mlp') == [(6, 6), (3, 6)] and shapes(6, 3, 'mlp', 9) == [(9, 6), (3, 9)]
    f = image(2, 6) - .5
    lin = nn.functional.linear
    head = ProjectionHead(6, 3, 'mlp')
    a, b = head.layers[0], head.layers[2]
    assert torch.equal(head(f), lin(lin(f, a.weight, a.bias).clamp(min=0), b.weight, b.bias))
    with pytest.raises(ValueError, match='kind'): ProjectionHead(6, kind='deep')
    body, x = nn.Conv2d(1, 6, 3), image(2, 1, 8, 8)
    enc = Encoder(body, ProjectionHead(6, 3))
    assert enc.backbone is body and enc.features(x).shape == (2, 6) and enc(x).shape == (2, 3)
    assert torch.equal(enc(x), enc.head(body(x).mean((2, 3))))

def test_prepare_equals_torchvision():
    "Bytes of one or three channels become what torchvision's ToTensor and Normalize make of them"
    from torchvision.transforms.functional import normalize
    u = (image(4, 3, 8, 8)*256).to(torch.uint8)
    for x in u, u[:,:1]:
        want = normalize((x.float()/255).expand(-1, 3, -1, -1), IMAGENET_MEAN, IMAGENET_STD)
        torch.testing.assert_close(Prepare()(x), want, rtol=1e-6, atol=1e-6)
    assert torch.equal(Prepare()(u), Prepare()(u.float()/255)) and Prepare()(u).dtype == torch.float32

def test_prepare_leaves_input_and_dtype():
    "The caller's batch is not written to; float64 stays and is exact, float16 becomes float32"
    x = image(2, 3, 4, 4).double()
    kept, got = x.clone(), Prepare()(x)
    assert torch.equal(x, kept) and got.dtype == torch.float64
    m, s = (torch.tensor(v, dtype=torch.float64)[:,None,None] for v in (IMAGENET_MEAN, IMAGENET_STD))
    torch.testing.assert_close(got, (x-m)/s, rtol=1e-12, atol=1e-12)
    assert Prepare()(x.half()).dtype == torch.float32

def test_prepare_channels():
    "One channel for a grey network (mean of the means), RGB averaged, other numbers refused"
    p = Prepare(channels=1)
    assert [round(v, 3) for v in p.mean+p.std] == [.449, .226]
    x = torch.tensor([.1, .2, .6]).reshape(1, 3, 1, 1)
    torch.testing.assert_close(p(x).item(), (.3-p.mean[0])/p.std[0], rtol=1e-5, atol=1e-5)
    assert Prepare((.5,), (.1,)).mean == (.5,)*3
    with pytest.raises(ValueError, match='2 channels'): Prepare()(image(1, 2, 4, 4))
    with pytest.raises(ValueError, match='numbers'): Prepare((.5, .5), (.1, .1))
    for bad in image(3, 4, 4), torch.zeros(1, 1, 4, 4, dtype=torch.int64):
        with pytest.raises(ValueError, match='B×C×H×W'): Prepare()(bad)

def test_prepare_normalised():
    "What a Normalize made passes to the bit, only channels are matched; bytes cannot come from there"
    x = image(2, 1, 4, 4)*9
    assert torch.equal(Prepare(normalised=True)(x), x.expand(-1, 3, -1, -1))
    with pytest.raises(ValueError, match='uint8'): Prepare(normalised=True)(x.to(torch.uint8))

def test_prepare_state_autocast_types():
    "No state of its own, float32 under autocast, plain tensors out of fastai's, the module's casts leave it exact"
    from fastai.vision.core import TensorImage
    x = (image(2, 3, 8, 8)*256).to(torch.uint8)
    want = Prepare()(x)
    assert Prepare().state_dict() == {} and torch.equal(Prepare().half()(x), want)
    with torch.autocast('cpu', torch.bfloat16): assert torch.equal(Prepare()(x), want)
    got = Prepare()(TensorImage(x))
    assert type(got) is torch.Tensor and torch.equal(got, want)

def test_prepare_keeps_channels_last():
    "The layout of the batch is kept"
    x = image(2, 3, 8, 8).to(memory_format=torch.channels_last)
    assert Prepare()(x).is_contiguous(memory_format=torch.channels_last) and Prepare()(image(2, 3, 8, 8)).is_contiguous()
