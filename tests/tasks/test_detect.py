"Detection: one normalisation, augmentation that moves boxes, any backbone, the run folder, resume to the bit, bad input."
import json
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from safetensors.torch import load_file
from torchvision.models.detection import RetinaNet
import c2l_nb.tasks.detect as module
from c2l_nb.evaluation.detection_metrics import map_table, read_predictions
from c2l_nb.tasks.detect import BoxDL, BoxPool, Detector, box_augment, detect, load_init, phantom_boxes, predict, xywh
from c2l_nb.method.encoder import Prepare, create_encoder
from c2l_nb.data.phantom import phantom, write_phantoms
from c2l_nb.training.weights import export_backbone
from stand_in import devices_in_fit, other_default

pytestmark = pytest.mark.filterwarnings('ignore:.*jit.*', 'ignore:lr_scheduler', 'ignore:Mean of empty')
TINY = dict(size=64, width=32, epochs=2, batch=8, n_phantoms=24)

@pytest.fixture(scope='module')
def net():
    torch.manual_seed(0)
    return Detector(create_encoder('resnet18', 1), 64, width=32)

@pytest.fixture(scope='module')
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp('runs')/'whole'
    return out, detect(out=out, **TINY)

# The model

def test_pixels_are_normalised_once(net):
    "Losses equal those of torchvision's RetinaNet around the same parts, which normalises by itself, on floats"
    prepare = net.transform.prepare
    ref = RetinaNet(net.backbone, 1, anchor_generator=net.anchor_generator, head=net.head, min_size=64, max_size=64, image_mean=prepare.mean,
                    image_std=prepare.std, nms_thresh=net.nms_thresh, detections_per_img=20)
    x = torch.randint(256, (2, 1, 64, 64), dtype=torch.uint8)
    targets = [dict(boxes=torch.tensor([[5., 10, 30, 40]]), labels=torch.zeros(1, dtype=torch.long)),
               dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))]
    net.train(); ref.train()
    ours, theirs = net(x, targets), ref([im/255 for im in x], targets)
    for k in theirs: assert ours[k].item() == pytest.approx(theirs[k].item(), rel=1e-5)

def test_images_without_boxes_train_the_classifier_alone(net):
    none = dict(boxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long))
    net.train().zero_grad()
    sum(net(torch.randint(256, (2, 1, 64, 64), dtype=torch.uint8), [none, none]).values()).backward()
    size = lambda m: sum(p.grad.abs().sum().item() for p in m.parameters() if p.grad is not None)
    assert size(net.head.classification_head) > 0 and size(net.head.regression_head) == 0 and size(net.backbone.body) > 0

@pytest.mark.parametrize('size, first, levels', [(128, 'layer1', 5), (256, 'layer2', 4), (512, 'layer3', 3)])
def test_first_map_is_a_32nd_of_the_side(size, first, levels):
    d = Detector(create_encoder('resnet18', 1), size, width=32).eval()
    assert list(d.backbone.body.return_layers)[0] == first and len(d.anchor_generator.sizes) == levels
    maps = d.backbone(torch.zeros(1, 1, size, size))
    assert len(maps) == levels and list(maps.values())[0].shape[-1] == 32

def test_anchor_sides_and_shapes():
    w, h = (lambda a: (a[:, 2] - a[:, 0], a[:, 3] - a[:, 1]))(module.anchors(256, 2).cell_anchors[0])
    assert sorted((w*h).sqrt().tolist()) == pytest.approx([32]*3 + [40.3]*3 + [50.8]*3, abs=1.1)
    assert sorted((h/w).tolist()) == pytest.approx([.7]*3 + [1.4]*3 + [2.4]*3, abs=.11)

# Augmentation

def test_boxes_stay_on_the_lesion_of_a_phantom():
    "The lesion is what a phantom with the finding has and one without has not; its outline moves as its box does"
    for seed in range(4):
        (a, box), b = [(p.image, p.boxes) for p in [phantom(seed, ('Consolidation',), 128)]][0], phantom(seed, (), 128).image
        lesion = np.uint8(255)*(a.astype(int) - b > 6)
        ys, xs = np.nonzero(lesion)
        tight = [(xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1)]
        assert np.abs(np.subtract(tight[0], box[0][1:])).max() < 40
        pool = BoxPool(np.stack([lesion]*40), [tight]*40, tfms=box_augment())
        for im, target in (pool[i] for i in range(40)):
            ys, xs = np.nonzero(im[0].numpy() > 127)
            x0, y0, x1, y1 = target['boxes'][0].tolist()
            assert abs(x0 - xs.min()) < 2 and abs(y0 - ys.min()) < 2 and abs(x1 - xs.max() - 1) < 2 and abs(y1 - ys.max() - 1) < 2

def test_boxes_at_the_edge_are_cut_and_lost_ones_dropped_with_their_label():
    torch.manual_seed(0)
    pool = BoxPool(np.zeros((300, 64, 64), np.uint8), [[(0, 0, 3, 3), (30, 30, 20, 20)]]*300, tfms=box_augment())
    counts = set()
    for i in range(300):
        im, t = pool[i]
        assert len(t['boxes']) == len(t['labels']) and (t['boxes'] >= 0).all() and (t['boxes'] <= 64).all()
        assert (t['boxes'][:, 2:] > t['boxes'][:, :2]).all() and im.dtype == torch.uint8 and type(im) is torch.Tensor
        counts.add(len(t['boxes']))
    assert counts == {1, 2}

def test_augmentation_repeats_with_the_seed():
    pool = BoxPool(np.random.default_rng(0).integers(0, 256, (4, 64, 64), np.uint8), [[(20, 20, 20, 20)]]*4, tfms=box_augment())
    def draw(): torch.manual_seed(3); return [pool[i] for i in range(4)]
    for (a, s), (b, t) in zip(draw(), draw()): assert torch.equal(a, b) and torch.equal(s['boxes'], t['boxes'])

# Loader and data

def test_order_is_of_seed_and_epoch():
    def order(seed, epoch):
        dl = BoxDL(BoxPool(np.zeros((40, 32, 32), np.uint8), [[]]*40), bs=8, shuffle=True, indexed=True)
        dl.seed, dl.epoch = seed, epoch
        return torch.cat([b[2] for b in dl]).tolist()
    assert order(0, 0) == order(0, 0) and order(0, 0) != order(0, 1) and order(0, 0) != order(1, 0) and sorted(order(2, 2)) == list(range(40))

def test_phantom_boxes_are_opacities_in_front_of_other_findings():
    images, rows = phantom_boxes(60, 48)
    with_box = rows.boxes.str.len() > 0
    assert with_box.equals(rows.labels.str.contains('Consolidation|Infiltration|Pneumonia')) and .3 < with_box.mean() < .7
    assert (rows.labels[~with_box] != '').any() and not set(rows.patient[rows.split == 'train']) & set(rows.patient[rows.split == 'valid'])

# Any backbone

@pytest.mark.parametrize('channels', [1, 3])
def test_init_from_a_backbone_file(channels, tmp_path):
    "Weights are the file's, pixels are prepared as its card says"
    body = create_encoder('resnet18', channels)
    export_backbone(body, tmp_path/'b.safetensors', dict(mean=[.5]*channels, std=[.1]*channels))
    got, prepare = load_init(str(tmp_path/'b.safetensors'))
    d = Detector(got, 64, prepare, width=32)
    assert torch.equal(d.backbone.body.layer3[0].conv1.weight, body.layer3[0].conv1.weight)
    assert prepare.mean == (.5,)*channels and prepare.channels == channels
    assert len(predict(d, np.zeros((3, 64, 64), np.uint8))) == 3

def test_init_from_a_file_without_a_card(tmp_path):
    body = create_encoder('resnet18', 1)
    torch.save(body.state_dict(), tmp_path/'theirs.pth')
    got, prepare = load_init(str(tmp_path/'theirs.pth'))
    assert torch.equal(got.layer1[0].conv1.weight, body.layer1[0].conv1.weight) and prepare.mean == Prepare().mean
    x = torch.rand(2, 1, 32, 32)
    assert torch.allclose(got.eval()(x.expand(-1, 3, -1, -1)), body.eval()(x), atol=1e-5)          # spread over three channels

# A run

def test_run_folder(run):
    out, score = run
    assert {p.name for p in out.iterdir()} == {'checkpoint', 'config.json', 'detector.safetensors', 'log.csv', 'map.csv', 'predictions.csv', 'report.html'}
    about, log = json.loads((out/'config.json').read_text()), pd.read_csv(out/'log.csv')
    assert about['init'] == 'untrained' and about['images'] == 19 and log.epoch.tolist() == [0, 1] and {'train_loss', 'best_map'} <= set(log)
    assert str(out.parent) not in (out/'report.html').read_text() + (out/'config.json').read_text()
    _, rows = phantom_boxes(24, 64)
    valid = rows[rows.split == 'valid']
    ids, preds = read_predictions(out/'predictions.csv')
    assert ids == valid.patientId.tolist()
    again = map_table(valid.boxes.tolist(), preds, ids)
    pd.testing.assert_frame_equal(again, pd.read_csv(out/'map.csv'), atol=.02)
    pd.testing.assert_frame_equal(score, pd.read_csv(out/'map.csv'), check_exact=False)

def test_resume_equals_the_uninterrupted_run(run, tmp_path, monkeypatch):
    "Stopped in epoch 1, resumed: the weights are the same to the bit"
    plain = module.Epoch.before_train
    def stop(self):
        plain(self)
        if self.epoch == 1: raise KeyboardInterrupt
    monkeypatch.setattr(module.Epoch, 'before_train', stop)
    with pytest.raises(KeyboardInterrupt): detect(out=tmp_path/'cut', **TINY)
    monkeypatch.setattr(module.Epoch, 'before_train', plain)
    detect(out=tmp_path/'cut', resume=True, **TINY)
    a, b = load_file(run[0]/'detector.safetensors'), load_file(tmp_path/'cut'/'detector.safetensors')
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert (run[0]/'predictions.csv').read_text() == (tmp_path/'cut'/'predictions.csv').read_text()

def test_resume_with_another_setting_is_refused(run):
    with pytest.raises(ValueError, match='lr'): detect(out=run[0], resume=True, lr=1e-4, **TINY)

def write_files(tmp_path, n=20):
    "Phantom files, and their opacities in the competition's columns, in the pixels of an original of twice the size"
    index = write_phantoms(tmp_path/'x', n, size=64, findings=('Pneumonia',), poses_per_patient=1, progress=False)
    b = pd.read_csv(index.parent/'boxes.csv')
    b[['x', 'y', 'width', 'height']] *= 2
    b.assign(patientId=[f'id{i}' for i in range(n)], Target=1).to_csv(tmp_path/'boxes.csv', index=False)
    return index, tmp_path/'boxes.csv'

def test_index_and_boxes_of_a_larger_original(tmp_path):
    "The index's own split is used; predictions are in the files' pixels, under the ids of the boxes"
    index, boxes = write_files(tmp_path)
    images, rows, _ = module.load_detection(str(index), 32, str(boxes), side=128, progress=False)
    assert images.shape == (20, 32, 32) and set(rows.split) == {'train', 'valid', 'test'}
    np.testing.assert_allclose(np.array(rows.square.tolist())*2, np.array(rows.boxes.tolist()))
    kept, again, _ = module.load_detection(str(index), 32, str(boxes), side=128, cache=str(tmp_path/'cache'), progress=False)
    assert np.array_equal(kept[:], images) and again.square.tolist() == rows.square.tolist()
    score = detect(str(index), tmp_path/'out', str(boxes), 128, score_on='test', cache=str(tmp_path/'squares'), **{**TINY, 'epochs': 1})
    assert read_predictions(tmp_path/'out'/'predictions.csv')[0] == rows.patientId[rows.split == 'test'].tolist() and len(score) == 7

# The device

def test_trains_on_the_default_device(other_default):
    images, rows = phantom_boxes(8, 64)
    every = np.ones(8, bool)
    model = Detector(create_encoder('resnet18', 1), 64, width=32)
    assert devices_in_fit(module.detection_learner(images, rows.boxes, every, every, model, batch=4)) == {'meta'}

def test_the_device_that_was_asked_for_is_taken(run, other_default, tmp_path):
    "No part of a run asks for fastai's default again, which cannot compute here"
    found = detect(out=tmp_path/'out', device='cpu', **TINY)
    pd.testing.assert_frame_equal(found, run[1])

def test_wrong_device_and_several_processes_are_refused(tmp_path, monkeypatch):
    out = str(tmp_path/'new')
    with pytest.raises(SystemExit, match="c2l_detect: device 'gpu' cannot be used here"):
        module.main(out=out, device='gpu')
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(SystemExit, match='c2l_detect: detection runs in one process, and 2 were started'):
        module.main(out=out)
    assert not list(tmp_path.iterdir())

# Bad input: a clear error, no training, no run folder

@pytest.mark.parametrize('bad, words', [
    (dict(data='nowhere'), 'neither a folder nor an index CSV'), (dict(init='resnet'), 'no file'), (dict(size=100), 'size must be a multiple of 32'),
    (dict(precision='int8'), 'precision'), (dict(resume=True), 'no run to resume'), (dict(epochs=0), 'epochs must be at least 1'),
    (dict(batch=64), 'smaller'), (dict(score_on='train'), 'score_on'), (dict(score_on='test'), 'no images to score')])
def test_bad_arguments(bad, words, tmp_path):
    with pytest.raises(ValueError, match=words): detect(**{**TINY, 'out': tmp_path/'new', **bad})
    assert not (tmp_path/'new').exists()

@pytest.mark.parametrize('spoil, words', [
    (lambda i, b: (i, b.assign(x=500)), r'\.png: the box .* leaves the image of 64×64'), (lambda i, b: (i, b.assign(width=0)), 'no area'),
    (lambda i, b: (i, b.assign(height=np.nan)), 'not finite'),
    (lambda i, b: (i, pd.concat([b, b[:1].assign(Target=0, x=np.nan, y=np.nan, width=np.nan, height=np.nan)])), 'both with and without'),
    (lambda i, b: (i.assign(patient='P1'), b), '1 patients are in more than one split'),
    (lambda i, b: (i.drop(index=0), b), 'not in the index'), (lambda i, b: (i, b.drop(columns='Target')), 'needs a column `Target`')])
def test_bad_tables_before_any_training(spoil, words, tmp_path, monkeypatch):
    index, boxes = write_files(tmp_path, 10)
    i, b = spoil(pd.read_csv(index), pd.read_csv(boxes))
    i.to_csv(index, index=False); b.to_csv(boxes, index=False)
    monkeypatch.setattr(module, 'detection_learner', lambda *a, **k: pytest.fail('it trained'))
    with pytest.raises(ValueError, match=words): detect(str(index), tmp_path/'out', str(boxes), 128, **TINY)
    assert not (tmp_path/'out').exists()

def test_missing_image_file(tmp_path):
    index, boxes = write_files(tmp_path, 10)
    lost = next((Path(index).parent/'images').iterdir()); lost.unlink()
    with pytest.warns(UserWarning, match='missing'), pytest.raises(ValueError, match=lost.name):
        detect(str(index), tmp_path/'out', str(boxes), 128, **TINY)

def test_command_names_the_fault(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit, match='c2l_detect: nowhere: is neither'): module.main('nowhere', out=str(tmp_path/'o'))
    seen = {}
    monkeypatch.setattr(module, 'detect', lambda *a, **k: seen.update(k) or pd.DataFrame())
    module.main(out=str(tmp_path/'o')); assert (seen['size'], seen['epochs'], seen['width']) == (128, 6, 64)
    module.main('x.csv', out=str(tmp_path/'o')); assert (seen['size'], seen['epochs'], seen['width']) == (512, 12, 256)
    assert 'predictions.csv' in capsys.readouterr().out
