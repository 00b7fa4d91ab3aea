"Weights files: round trips to the bit, other libraries' layouts, and refusals that name the file, the reason and the way out"
import json, os, pickle, pytest, re, timm, torch, torchvision
from argparse import Namespace
from collections import OrderedDict
from copy import deepcopy
from torch import nn
from safetensors.torch import load_file, save_file
from c2l_nb.method.encoder import Encoder, Prepare, ProjectionHead, create_encoder
from c2l_nb.training.weights import LAYOUTS, WeightsError, card_markdown, export_backbone, load_backbone, read_card
from c2l_nb.core import write_atomically

def seen(arch, **kw):
    "A body whose BatchNorm statistics have moved"
    torch.manual_seed(0)
    m = create_encoder(arch, **kw)
    with torch.no_grad(): m(torch.rand(4, 3, 64, 64))
    return m.eval()

@pytest.fixture(scope='module')
def body(): return seen('resnet18')

@pytest.fixture(scope='module')
def bodies(body): return dict(resnet18=body, densenet121=seen('densenet121'))

@pytest.fixture(scope='module')
def saved(body, tmp_path_factory):
    return export_backbone(body, tmp_path_factory.mktemp('w')/'sub'/'body.safetensors', dict(mean=(.5,), std=(.2,), size=64))

def blank(m):
    "`m` with other weights"
    m = deepcopy(m)
    with torch.no_grad(): [p.zero_() for p in m.state_dict().values()]
    return m

def features(m, channels=3):
    "Of two fixed images; equal channels"
    x = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(1)).expand(-1, channels, -1, -1)
    with torch.no_grad(): return m.eval()(x)

def refused(path, match, *args, **kw):
    with pytest.raises(WeightsError, match=match) as e: load_backbone(path, *args, **kw)
    assert str(path) in str(e.value)

# --- our own files ---

def test_round_trip_to_the_bit(body, saved, capsys):
    "By the card, by name and into a module: the same features, the global generator unmoved, the module itself filled"
    mine = create_encoder()
    rng = torch.get_rng_state()
    for m in load_backbone(saved), load_backbone(saved, 'resnet18'), load_backbone(str(saved), mine):
        assert torch.equal(features(m), features(body))
    assert m is mine and torch.equal(rng, torch.get_rng_state()) and capsys.readouterr().out == ''

def test_names_and_card(body, saved):
    "torchvision's names without fc, float32; the card holds what was given and what was found"
    tensors, whole = load_file(saved), torchvision.models.resnet18().state_dict()
    assert set(tensors) == set(whole) - {'fc.weight', 'fc.bias'}
    assert {str(t.dtype) for t in tensors.values()} == {'torch.float32', 'torch.int64'}
    card = read_card(saved)
    assert (card['arch'], card['channels'], card['mean'], card['size']) == ('resnet18', 3, [.5], 64)
    assert Prepare(card['mean'], card['std'], card['channels']).mean == (.5,)*3
    assert os.listdir(saved.parent) == [saved.name]

@pytest.mark.parametrize('arch', ['resnet18', 'densenet121'])
def test_torchvision_and_timm_take_our_file(bodies, arch, tmp_path):
    "Strictly and without this library; the same features"
    path, right = export_backbone(bodies[arch], tmp_path/'b.safetensors'), features(bodies[arch])
    plain = torchvision.models.get_model(arch)
    setattr(plain, 'fc' if arch == 'resnet18' else 'classifier', nn.Identity())
    plain.load_state_dict(load_file(path))
    assert torch.equal(features(plain), right)
    plain = timm.create_model(arch, num_classes=0)
    plain.load_state_dict(load_file(path))
    torch.testing.assert_close(features(plain), right, rtol=0, atol=1e-6)
    torch.testing.assert_close(features(timm.create_model(arch, num_classes=0, checkpoint_path=str(path))), right, rtol=0, atol=1e-6)

def test_float16(body, tmp_path):
    "Half the bytes; the loaded body is float32 and off by the rounding alone"
    path = export_backbone(body, tmp_path/'h.safetensors', dtype=torch.float16)
    assert 22e6 < path.stat().st_size < 23e6
    m = load_backbone(path)
    assert m.conv1.weight.dtype == torch.float32
    torch.testing.assert_close(m.conv1.weight, body.conv1.weight.half().float(), rtol=0, atol=0)
    torch.testing.assert_close(features(m), features(body), rtol=1e-2, atol=1e-2)

class Trained(nn.Module):
    "What the callback leaves: a student inside"
    def __init__(self, student):
        super().__init__()
        self.student = student

def test_only_the_body_is_written(body, tmp_path):
    "An encoder and a trained model give their backbone, without head or prefix; channels-last makes no difference"
    enc = Encoder(body, ProjectionHead(512))
    for i, m in enumerate((enc, Trained(enc))):
        assert torch.equal(features(load_backbone(export_backbone(m, tmp_path/f'{i}.safetensors'))), features(body))
    last = load_backbone(tmp_path/'0.safetensors').to(memory_format=torch.channels_last)
    a, b = load_file(export_backbone(last, tmp_path/'l.safetensors')), load_file(tmp_path/'0.safetensors')
    assert all(torch.equal(a[k], b[k]) and a[k].is_contiguous() for k in b)

def test_card_of_a_trained_model(body, tmp_path):
    "A model that prepares its pixels itself writes how into the card; what is given overrules it"
    m = Trained(Encoder(body, ProjectionHead(512)))
    m.prepare = Prepare((.5,), (.25,))
    assert read_card(export_backbone(m, tmp_path/'a'))['std'] == [.25]*3
    assert read_card(export_backbone(m, tmp_path/'a', dict(std=[.1])))['std'] == [.1]
    m.prepare = Prepare(normalised=True)
    assert 'std' not in read_card(export_backbone(m, tmp_path/'a'))

def test_card_of_c2l(tmp_path):
    "The model of the callback gives its config, image size and pixel statistics too"
    from c2l_nb.method.model import C2L, C2LConfig
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    card = read_card(export_backbone(C2L(net, C2LConfig(queue_size=8, size=32)), tmp_path/'c'))
    assert card['config']['queue_size'] == 8 and card['size'] == 32 and len(card['mean']) == card['channels'] == 1

def test_card_as_markdown(body, tmp_path):
    "Every field a reader needs has a row; what is missing is said; a stranger's text stays text"
    path = export_backbone(body, tmp_path/'b.safetensors', dict(config=dict(epochs=3, lr=.03), health=dict(rank=12.34567), use='a|b\n<img>'))
    text = card_markdown(path)
    for row in ('arch | resnet18', 'channels | 3', 'mean | not stated', 'config | epochs 3, lr 0.03', 'health | rank 12.35',
                'data | not stated', 'limits | not stated', 'use | a\\|b &lt;img&gt;'): assert f'| {row} |' in text
    assert len({line.replace('\\|', '').count('|') for line in text.splitlines()[2:]}) == 1

def test_classifier_is_not_exported(tmp_path):
    "A model that ends in a classifier is no body"
    with pytest.raises(WeightsError, match='classifier'): export_backbone(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), tmp_path/'x')
    assert os.listdir(tmp_path) == []

def test_own_module_and_loose_names(tmp_path):
    "A body that has no arch, then a file with fewer and other names; what strict=False filled is said"
    net, said = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)), []
    path = export_backbone(net, tmp_path/'n.safetensors')
    assert read_card(path)['arch'] is None and read_card(path)['channels'] == 1
    refused(path, 'names no arch')
    more = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    refused(path, 'missing', more)
    assert torch.equal(load_backbone(path, more, strict=False, say=said.append)[0].weight, net[0].weight)
    assert said == [f'{path}: 7 of your 9 tensors filled']

# --- other libraries' layouts, as their training code writes them ---

def head(arch, *widths):
    "A head as these libraries put it on: nn.Linear, or layers 0 and 2 of an MLP"
    f = dict(resnet18=512, densenet121=1024)[arch]
    if len(widths) == 1: return nn.Linear(f, widths[0])
    return nn.Sequential(nn.Linear(f, widths[0]), nn.ReLU(), nn.Linear(*widths))

def with_head(body, arch, h):
    "The state of the whole network: body and, under torchvision's name, its head"
    name = 'fc' if arch == 'resnet18' else 'classifier'
    return body.state_dict() | {f'{name}.{k}': v for k, v in h.state_dict().items()}

def thin(state): return {k: torch.zeros(()).expand(v.shape) for k, v in state.items()}  # shapes alone: a few bytes on disk
def at(prefix, state): return OrderedDict((prefix + k, v) for k, v in state.items())
def other(state): return {k: torch.zeros_like(v) for k, v in state.items()}  # a teacher's: never to be taken

def c2l(body, arch):
    "train_C2L_res18.py: 'opt' is a Namespace; InsResNet18 holds DataParallel as `encoder`, DenseNet121 as `densenet121`"
    prefix = dict(resnet18='encoder.module.', densenet121='densenet121.module.')[arch]
    state = at(prefix, with_head(body, arch, head(arch, 128)))
    return dict(opt=Namespace(model=arch, lr_decay_epochs=[120, 160]), model=state, contrast=OrderedDict(memory=torch.zeros(8, 128)),
                optimizer=dict(state={}, param_groups=[dict(lr=.03)]), epoch=240, model_ema=other(state))

def moco(body, arch, widths=(128,)):
    state = with_head(body, arch, head(arch, *widths))
    return dict(epoch=200, arch=arch, optimizer=dict(state={}), state_dict=at('module.encoder_q.', state)
                | at('module.encoder_k.', other(state)) | {'module.queue': torch.zeros(128, 8), 'module.queue_ptr': torch.zeros(1).long()})

def moco2(body, arch): return moco(body, arch, (64, 128))

def lightly(body, arch, backbone=None):
    "nn.Sequential(*list(net.children())[:-1]), whose names are numbers"
    state = (backbone or nn.Sequential(*list(body.children())[:-1])).state_dict()
    return {'epoch': 1, 'pytorch-lightning_version': '2.1', 'hyper_parameters': {'lr': .06}, 'state_dict': at('backbone.', state) |
            at('projection_head.layers.', head(arch, 64, 128).state_dict()) | at('backbone_momentum.', other(state))}

def lightly_timm(body, arch): return lightly(body, arch, body)
def lightly_features(body, arch): return lightly(body, arch, body.features)

def solo(body, arch):
    s = body.state_dict()
    return dict(epoch=400, state_dict=at('backbone.', s) | at('classifier.', head(arch, 100).state_dict()) | at('momentum_backbone.', other(s))
                | at('projector.', head(arch, 64, 128).state_dict()) | {'queue': torch.zeros(2, 8, 128)})

def torchvision_(body, arch): return OrderedDict(with_head(body, arch, head(arch, 1000)))
def parallel(body, arch): return dict(state_dict=at('module.', torchvision_(body, arch)), best_acc1=torch.tensor(76.))
def callback(body, arch): return dict(model=Trained(Encoder(body, head(arch, 128))).state_dict(), opt={})  # fastai's Learner.save

def old_densenet(body, arch):
    "torchvision's files of 2017: norm.1.weight for norm1.weight, and no count of batches"
    s = {re.sub(r'(denselayer\d+\.(?:norm|conv))(\d)', r'\1.\2', k): v for k, v in torchvision_(body, arch).items()}
    assert 'features.denseblock1.denselayer1.norm.1.weight' in s
    return {k: v for k, v in s.items() if 'num_batches' not in k}

def timm_(body, arch):
    m = timm.create_model(arch, num_classes=14)
    m.load_state_dict(body.state_dict(), strict=False)
    return m.state_dict()

CASES = ([(make, arch) for make in (c2l, moco, lightly, solo, torchvision_, timm_) for arch in ('resnet18', 'densenet121')] +
         [(make, 'resnet18') for make in (moco2, lightly_timm, parallel, callback)] +
         [(make, 'densenet121') for make in (lightly_features, old_densenet)])
SOURCE = {c2l: 'the released C2L code', moco: 'MoCo', moco2: 'MoCo', lightly: 'lightly', lightly_timm: 'lightly', lightly_features: 'lightly',
          solo: 'solo-learn', torchvision_: 'torchvision', old_densenet: 'torchvision', timm_: 'timm', parallel: 'DataParallel',
          callback: 'C2LCallback'}

@pytest.mark.parametrize('make,arch', CASES, ids=lambda v: getattr(v, '__name__', v))
def test_layouts(make, arch, bodies, tmp_path):
    "Every tensor and the features to the bit; the source and what was left out are said; by names alone where no arch is given"
    held, said = make(bodies[arch], arch), []
    torch.save(held, tmp_path/'their.pth')
    m = load_backbone(tmp_path/'their.pth', arch if make is solo else None if make is c2l else blank(bodies[arch]), say=said.append)
    assert m.arch == arch and SOURCE[make] in said[0] and 'left out' in said[0] and 'mean and std are unknown' in said[0]
    own = bodies[arch].state_dict()
    assert all(torch.equal(v, own[k]) for k, v in m.state_dict().items() if make is not old_densenet or 'num_batches' not in k)
    assert torch.equal(features(m), features(bodies[arch]))

def test_layouts_are_all_tested(): assert len(LAYOUTS) == len({SOURCE[m] for m, _ in CASES} - {'timm', 'lightly'}) + 1  # C2L has two

def test_the_same_in_safetensors_and_in_old_pickles(body, tmp_path):
    "MoCo's names in the other two containers"
    held, right = moco(body, 'resnet18'), features(body)
    save_file({k: v.clone() for k, v in held['state_dict'].items()}, tmp_path/'m.safetensors')
    torch.save(held, tmp_path/'old.pth', _use_new_zipfile_serialization=False)
    for name in 'm.safetensors', 'old.pth': assert torch.equal(features(load_backbone(tmp_path/name, say=None)), right)

def test_into_a_module_of_those_very_names(body, tmp_path):
    "lightly's own nn.Sequential takes lightly's names, unchanged; a head of the same width is filled"
    torch.save(lightly(body, 'resnet18'), tmp_path/'l.pth')
    net = nn.Sequential(*list(create_encoder().children())[:-1])
    assert torch.equal(features(load_backbone(tmp_path/'l.pth', net, say=None)).flatten(1), features(body))
    held = torchvision_(body, 'resnet18')
    torch.save(held, tmp_path/'t.pth')
    assert torch.equal(load_backbone(tmp_path/'t.pth', torchvision.models.resnet18(), say=None).fc.weight, held['fc.weight'])

@pytest.mark.parametrize('arch', ['resnet18', 'densenet121'])
def test_three_channels_to_one_and_back(bodies, arch, tmp_path):
    "Each step gives the same features for a grey image, to 1e-5, and is said"
    path, said = export_backbone(bodies[arch], tmp_path/'rgb'), []
    grey = load_backbone(path, create_encoder(arch, channels=1), say=said.append)
    torch.testing.assert_close(features(grey, 1), features(bodies[arch]), rtol=0, atol=1e-5)
    back = load_backbone(export_backbone(grey, tmp_path/'grey'), create_encoder(arch), say=said.append)
    torch.testing.assert_close(features(back), features(bodies[arch]), rtol=0, atol=1e-5)
    assert 'folded into 1' in said[0] and 'spread over 3' in said[1]

# --- what does not fit ---

def test_wrong_network_is_refused_untouched(saved, tmp_path):
    "Another architecture or other channels: each said, with what would fit, and no parameter moved"
    refused(saved, r'another architecture \(it fits resnet18\): no name in common', 'densenet121')
    m = create_encoder('resnet34')
    before = m.layer1[0].conv1.weight.clone()
    refused(saved, r'another architecture \(it fits resnet18\): 80 .* missing, none unknown', m)
    refused(saved, 'another architecture .*: layer1.0.conv1.weight is', create_encoder('resnet50'))
    assert torch.equal(before, m.layer1[0].conv1.weight)
    four = torchvision.models.resnet18()
    four.conv1, four.fc = nn.Conv2d(4, 64, 7, 2, 3, bias=False), nn.Identity()
    refused(saved, 'takes images of 3 channels, your network of 4: conv1.weight', four)
    refused(saved, 'takes images of 3 channels, your network of 4', four, strict=False)

@pytest.mark.parametrize('arch', ['resnet18', 'resnet34', 'resnet50', 'densenet121'])
def test_refusal_says_what_would_fit(arch, tmp_path):
    "The network is told by names and widths, whatever layout they come in"
    with torch.device('meta'): state = create_encoder(arch).state_dict()
    torch.save(dict(model=at('encoder.module.', thin(state))), tmp_path/'x.pth')
    refused(tmp_path/'x.pth', f'it fits {arch}', 'resnet101')

def test_names_and_shapes_that_do_not_fit(body, tmp_path):
    "A tensor too few, one too many, one of another shape, and names of nobody"
    def put(state, **more):
        torch.save(dict(state_dict=state | more), tmp_path/'x.pth')
        return tmp_path/'x.pth'
    s = thin(body.state_dict())
    refused(put({k: v for k, v in s.items() if k != 'bn1.bias'}), r'none of resnet18.*1 \(bn1.bias\) missing, none unknown', 'resnet18')
    refused(put(s, extra=torch.zeros(1)), r'none missing, 1 \(extra\) unknown', create_encoder())
    refused(put(s | {'bn1.bias': torch.zeros(63)}), r'bn1.bias is \(63,\) in it, \(64,\) in your network', 'resnet18')
    refused(put({'a': torch.zeros(1)}), 'names no arch')
    for empty in ({}, [1], dict(state_dict={}), dict(model=3), torch.zeros(3)):
        torch.save(empty, tmp_path/'x.pth')
        refused(tmp_path/'x.pth', 'pickle without tensors by name')

def test_head_of_another_width(body, saved, tmp_path):
    "A head that is not in the file or has another width is refused, or left alone when asked so"
    torch.save(torchvision_(body, 'resnet18'), tmp_path/'t.pth')
    for path in saved, tmp_path/'t.pth':
        net, said = torchvision.models.resnet18(num_classes=14), []
        before = net.fc.weight.clone()
        refused(path, r"no head like your network's, 2 \(fc.weight, fc.bias\)", net)
        load_backbone(path, net, strict=False, say=said.append)
        assert torch.equal(net.fc.weight, before) and torch.equal(net.conv1.weight, body.conv1.weight)
        assert '120 of your 122 tensors filled' in said[0]

# --- files that lie, and files that broke ---

class Payload:
    "Runs code when it is unpickled"
    def __init__(self, flag, call=open): self.flag, self.call = str(flag), call
    def __reduce__(self): return (exec, (f'open({self.flag!r}, "w")',)) if self.call is exec else (self.call, (self.flag, 'w'))

def test_pickles_never_run(body, tmp_path):
    "Code in any place of a pickle, in every container: refused by name and by what it calls for, and not run"
    ran = tmp_path/'ran'
    torch.save(Payload(ran), tmp_path/'zip.safetensors')
    torch.save(Payload(ran, exec), tmp_path/'exec.pth')
    torch.save(Payload(ran), tmp_path/'old.safetensors', _use_new_zipfile_serialization=False)
    torch.save(dict(epoch=240, opt=Payload(ran), model=thin(body.state_dict())), tmp_path/'beside.pth')
    torch.save(dict(opt=Namespace(inside=Payload(ran)), model=thin(body.state_dict())), tmp_path/'namespace.pth')
    for protocol in 2, 4, 5: (tmp_path/f'{protocol}.safetensors').write_bytes(pickle.dumps(Payload(ran), protocol))
    for path in sorted(tmp_path.iterdir()):
        refused(path, 'is a pickle that (calls for .*nothing was run|is damaged)')
        with pytest.raises(WeightsError, match='is a pickle'): read_card(path)
    refused(tmp_path/'exec.pth', 'calls for (builtins.)?exec and could run code')
    assert not ran.exists()
    torch.load(tmp_path/'beside.pth', weights_only=False)  # the payload is real
    assert ran.exists()

def test_a_card_cannot_run(tmp_path):
    "A card is JSON: what is none, or no object, is refused, and an arch that names a web address is no network"
    bad = tmp_path/'bad.safetensors'
    for card in '__import__("os")', '[1, 2]', '['*100_000, 'null':
        save_file({'a': torch.zeros(1)}, bad, dict(card=card))
        refused(bad, 'no readable model card')
    with pytest.raises(ValueError, match='unknown arch'): load_backbone(export_backbone(create_encoder(), bad, dict(arch='hf-hub:x/y')))

def test_broken_files(saved, tmp_path):
    "Truncated, empty and foreign files are named; a missing one is a FileNotFoundError"
    data, bad = saved.read_bytes(), tmp_path/'bad.safetensors'
    for part in data[:1000], data[:-1], b'', b'name,label\n':
        bad.write_bytes(part)
        refused(bad, 'no whole safetensors file')
    with pytest.raises(FileNotFoundError, match='nowhere'): load_backbone(tmp_path/'nowhere.safetensors')
    save_file({'a': torch.zeros(1)}, bad)
    with pytest.raises(WeightsError, match='no readable model card'): read_card(bad)

def flips(path, load, bits):
    "Flip one bit at a time: every load fails by WeightsError, or gives the tensors of before; returns how many failed"
    data, right, failed = path.read_bytes(), load(), 0
    for i in bits:
        path.write_bytes(data[:i//8] + bytes([data[i//8] ^ 1 << i%8]) + data[i//8+1:])
        try: got = load()
        except WeightsError as e: failed += str(path) in str(e)
        else: assert all(torch.equal(got[k], v) for k, v in right.items()), f'bit {i} went unseen'
    path.write_bytes(data)
    return failed

def some_bits(path, n): return torch.randperm(8*path.stat().st_size, generator=torch.Generator().manual_seed(0))[:n].tolist()

def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))

def test_flipped_bits(tmp_path):
    "In our files and in torch's zip files no changed tensor goes unseen"
    net = small()
    def load(): return {k: v.clone() for k, v in load_backbone(path, net, say=None).state_dict().items()}
    path = export_backbone(small(), tmp_path/'b.safetensors', dict(mean=(.5,), std=(.2,)))
    card = read_card(path)
    assert flips(path, load, some_bits(path, 500)) > 490  # the rest: padding, and keys that only other libraries read
    for i in range(50):  # the card too: a mean that is off makes features of something else
        data = path.read_bytes()
        k = data.index(b'mean') + i
        (tmp_path/'c.safetensors').write_bytes(data[:k] + bytes([data[k] ^ 1]) + data[k+1:])
        try: assert read_card(tmp_path/'c.safetensors') == card
        except WeightsError: pass
    path = tmp_path/'b.pth'
    torch.save(small().state_dict(), path)
    assert flips(path, load, some_bits(path, 300)) > 50
    entries = [m.start() for m in re.finditer(b'PK\x01\x02', path.read_bytes())]
    assert flips(path, load, [8*(k+38) + 4 for k in entries]) > 6  # "a folder": torch would read nothing and say nothing

def test_truncated_pickles(body, tmp_path):
    "At any length, in both of torch's containers"
    path = tmp_path/'b.pth'
    for new in True, False:
        torch.save(small().state_dict(), path, _use_new_zipfile_serialization=new)
        data = path.read_bytes()
        for n in range(2, len(data)-1, 97):
            path.write_bytes(data[:n])
            refused(path, 'is a pickle that (is damaged|calls for torch)', small())  # a name cut short is an unknown one

def test_files_of_the_first_format(body, tmp_path):
    "Format 1 had no sum and still loads; format 2 without its sum does not"
    state, path = body.state_dict(), tmp_path/'f.safetensors'
    save_file(state, path, dict(card=json.dumps(dict(format='c2l_nb 1', arch='resnet18', channels=3))))
    assert torch.equal(features(load_backbone(path)), features(body))
    save_file(state, path, dict(card=json.dumps(dict(format='c2l_nb 2', arch='resnet18', channels=3))))
    refused(path, 'damaged, its SHA-256')

def test_write_is_all_or_nothing(body, tmp_path, monkeypatch):
    "A write that fails leaves the file of before and no rest; one that succeeds has the folder on the disk as well"
    path, synced, fsync = tmp_path/'b.safetensors', [], os.fsync
    monkeypatch.setattr(os, 'fsync', lambda fd: synced.append(os.path.basename(os.readlink(f'/proc/self/fd/{fd}')) if os.path.exists('/proc/self/fd') else fd) or fsync(fd))
    write_atomically(path, b'before')
    assert len(synced) == 2
    def fail(*args): raise OSError('disk full')
    monkeypatch.setattr(os, 'fsync', fail)
    with pytest.raises(OSError, match='disk full'): export_backbone(body, path)
    assert path.read_bytes() == b'before' and os.listdir(tmp_path) == ['b.safetensors']

# ---- torch.compile --------------------------------------------------------------------------------------------------------

def test_compiled_bodies_are_written_and_read_by_plain_names(body, saved, tmp_path):
    "Compiled whole, in a part, or inside an encoder; files that carry the compiler's names are read; a compiled network is filled"
    whole, part = torch.compile(deepcopy(body), backend='eager'), deepcopy(body)
    part.layer1 = torch.compile(part.layer1, backend='eager')
    encoder = torch.compile(Encoder(deepcopy(body), ProjectionHead(512)), backend='eager')
    for name, m in dict(whole=whole, part=part, encoder=encoder).items():
        path = export_backbone(m, tmp_path/f'{name}.safetensors')
        assert set(load_file(path)) == set(body.state_dict()) and read_card(path)['arch'] == 'resnet18'
        assert torch.equal(features(load_backbone(path)), features(body))
    old = dict(card=json.dumps(dict(format='c2l_nb 1', arch='resnet18', channels=3)), format='pt')
    save_file({k: v.clone() for k, v in whole.state_dict().items()}, tmp_path/'old.safetensors', old)
    torch.save({f'module.{k}': v for k, v in whole.state_dict().items()}, tmp_path/'stranger.pth')
    for name in ('old.safetensors', 'stranger.pth'): assert torch.equal(features(load_backbone(tmp_path/name, say=None)), features(body))
    for m in (whole, part):
        for p in m.state_dict().values(): p.zero_()
        for path in (saved, tmp_path/'stranger.pth'): assert load_backbone(path, m, say=None) is m and torch.equal(features(m), features(body))
