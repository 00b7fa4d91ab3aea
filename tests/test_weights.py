"Weights files: round trips to the bit, and refusals that name the file, the reason and the way out"
import json, os, pickle, pytest, torch
from torch import nn
from safetensors.torch import load_file, save_file
from c2l_nb.encoder import Encoder, Prepare, ProjectionHead, create_encoder
from c2l_nb.weights import WeightsError, export_backbone, load_backbone, read_card

@pytest.fixture(scope='module')
def body():
    "A ResNet-18 whose BatchNorm statistics have moved"
    torch.manual_seed(0)
    m = create_encoder()
    m(torch.rand(4, 3, 64, 64))
    return m.eval()

@pytest.fixture(scope='module')
def saved(body, tmp_path_factory):
    return export_backbone(body, tmp_path_factory.mktemp('w')/'sub'/'body.safetensors', dict(mean=(.5,), std=(.2,), size=64))

def features(m, channels=3):
    "Of two fixed images; equal channels"
    x = torch.rand(2, 1, 64, 64, generator=torch.Generator().manual_seed(1)).expand(-1, channels, -1, -1)
    with torch.no_grad(): return m.eval()(x)

def test_round_trip_to_the_bit(body, saved):
    "By the card, by name and into a module: the same features, the global generator unmoved, the module itself filled"
    rng, mine = torch.get_rng_state(), create_encoder()
    rng = torch.get_rng_state()
    for m in load_backbone(saved), load_backbone(saved, 'resnet18'), load_backbone(str(saved), mine):
        assert torch.equal(features(m), features(body))
    assert m is mine and torch.equal(rng, torch.get_rng_state())

def test_names_and_card(body, saved):
    "torchvision's names without fc, float32; the card holds what was given and what was found"
    tensors, whole = load_file(saved), __import__('torchvision').models.resnet18().state_dict()
    assert set(tensors) == set(whole) - {'fc.weight', 'fc.bias'}
    assert {str(t.dtype) for t in tensors.values()} == {'torch.float32', 'torch.int64'}
    card = read_card(saved)
    assert (card['arch'], card['channels'], card['mean'], card['size']) == ('resnet18', 3, [.5], 64)
    assert Prepare(card['mean'], card['std'], card['channels']).mean == (.5,)*3
    assert os.listdir(saved.parent) == [saved.name]

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

def test_three_channels_fold_into_one(body, saved):
    "A grey network takes an RGB file: the same features for a grey image"
    m = load_backbone(saved, create_encoder(channels=1))
    torch.testing.assert_close(features(m, 1), features(body), rtol=1e-4, atol=1e-5)

def test_own_module_and_loose_names(tmp_path):
    "A body that has no arch, then a file with fewer and other names"
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
    path = export_backbone(net, tmp_path/'n.safetensors')
    assert read_card(path)['arch'] is None and read_card(path)['channels'] == 1
    with pytest.raises(WeightsError, match='names no arch'): load_backbone(path)
    more = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1))
    with pytest.raises(WeightsError, match='missing'): load_backbone(path, more)
    assert torch.equal(load_backbone(path, more, strict=False)[0].weight, net[0].weight)

def refused(path, match, *args, **kw):
    with pytest.raises(WeightsError, match=match) as e: load_backbone(path, *args, **kw)
    assert str(path) in str(e.value)

def test_wrong_network_is_refused_untouched(saved, tmp_path):
    "Another architecture, other channels, a head: each said, and no parameter moved"
    refused(saved, 'another architecture: no name in common', 'densenet121')
    m = create_encoder('resnet34')
    before = m.layer1[0].conv1.weight.clone()
    refused(saved, 'another architecture: 80 .* missing, none unknown', m)
    refused(saved, 'another architecture: layer1.0.conv1.weight is', create_encoder('resnet50'))
    assert torch.equal(before, m.layer1[0].conv1.weight)
    grey = export_backbone(create_encoder(channels=1), tmp_path/'g.safetensors')
    refused(grey, r'takes images of 1 channel\(s\), your network of 3: create_encoder\(…, channels=1\)', create_encoder())
    save_file(load_file(saved) | {'fc.weight': torch.zeros(2, 512)}, tmp_path/'head.safetensors')
    refused(tmp_path/'head.safetensors', 'holds a head', create_encoder())
    load_backbone(tmp_path/'head.safetensors', create_encoder(), strict=False)

def test_classifier_is_not_exported(tmp_path):
    "A model that ends in a classifier is no body"
    with pytest.raises(WeightsError, match='classifier'): export_backbone(nn.Sequential(nn.Flatten(), nn.Linear(4, 2)), tmp_path/'x')
    assert os.listdir(tmp_path) == []

class Payload:
    "Runs code when it is unpickled"
    def __init__(self, flag): self.flag = str(flag)
    def __reduce__(self): return open, (self.flag, 'w')

def test_pickles_never_run(body, tmp_path):
    "Pickled models, by torch and by pickle, are named as such and their code does not run"
    torch.save(Payload(tmp_path/'ran'), tmp_path/'zip.safetensors')
    torch.save(Payload(tmp_path/'ran'), tmp_path/'old.safetensors', _use_new_zipfile_serialization=False)
    for protocol in 2, 4, 5: (tmp_path/f'{protocol}.safetensors').write_bytes(pickle.dumps(Payload(tmp_path/'ran'), protocol))
    for path in sorted(tmp_path.iterdir()):
        refused(path, 'is a pickle', create_encoder())
        with pytest.raises(WeightsError, match='is a pickle'): read_card(path)
    assert not (tmp_path/'ran').exists()

def test_broken_files(saved, tmp_path):
    "Truncated, empty and foreign files are named; a missing one is a FileNotFoundError; no card is said"
    data, bad = saved.read_bytes(), tmp_path/'bad.safetensors'
    for part in data[:1000], data[:-1], b'', b'name,label\n':
        bad.write_bytes(part)
        refused(bad, 'no whole safetensors file')
    with pytest.raises(FileNotFoundError, match='nowhere'): load_backbone(tmp_path/'nowhere.safetensors')
    save_file({'a': torch.zeros(1)}, bad)
    refused(bad, 'no readable model card')

def test_write_is_all_or_nothing(body, saved, tmp_path, monkeypatch):
    "A write that fails leaves the file of before and no rest"
    path = tmp_path/'b.safetensors'
    path.write_bytes(b'before')
    def fail(*args): raise OSError('disk full')
    monkeypatch.setattr(os, 'fsync', fail)
    with pytest.raises(OSError, match='disk full'): export_backbone(body, path)
    assert path.read_bytes() == b'before' and os.listdir(tmp_path) == ['b.safetensors']
