"Boxes: the competition's metric against a second one written with plain loops, the way to a square and back."
import math, random
import numpy as np, pytest
from c2l_nb.evaluation.detection_metrics import (SCORES, coco_ap, image_score, map_difference, map_table, read_predictions,
                          score_images, square_boxes, unsquare, write_predictions)
from c2l_nb.data.cache import to_square
from c2l_nb.data.table import DataError

# The competition's rules once more: no array, exact integers where the boxes are integers

def overlap(a, b):
    "IoU as a pair of areas (shared, covered)"
    (ax, ay, aw, ah), (bx, by, bw, bh) = a, b
    shared = max(0, min(ax+aw, bx+bw) - max(ax, bx)) * max(0, min(ay+ah, by+bh) - max(ay, by))
    return shared, aw*ah + bw*bh - shared

def loop_score(truth, pred, cut):
    "One image at one score threshold; None if it is left out"
    kept = [p for p in pred if p[0] > cut]
    kept = [p for _, p in sorted(enumerate(kept), key=lambda ip: (-ip[1][0], ip[0]))]
    if not kept and not truth: return None
    scores = []
    for twentieths in range(8, 16):
        used, tp, fp = set(), 0, 0
        for _, *box in kept:
            best, at = 0, None
            for j, t in enumerate(truth):
                shared, covered = overlap(box, t)
                if j not in used and 20*shared > twentieths*covered and shared/covered > best: best, at = shared/covered, j
            if at is None: fp += 1
            else: used.add(at); tp += 1
        scores.append(tp/(tp + fp + len(truth) - len(used)))
    return sum(scores)/8

def loop_map(truths, preds, cut):
    known = [s for s in (loop_score(t, p, cut) for t, p in zip(truths, preds)) if s is not None]
    return sum(known)/len(known) if known else math.nan

def random_images(n, seed):
    "Truths on a coarse grid of integers, so that equal IoUs and IoUs on a threshold happen; predictions near them, anywhere, or none; scores on a grid too"
    r = random.Random(seed)
    box = lambda: (r.randrange(0, 20), r.randrange(0, 20), r.randrange(4, 16), r.randrange(4, 16))
    near = lambda b: tuple(v + r.choice((-2, -1, 0, 0, 0, 1, 2)) for v in b)
    truths = [[box() for _ in range(r.choice((0, 0, 1, 1, 2, 4)))] for _ in range(n)]
    preds = [[(r.randrange(0, 11)/10, *(near(r.choice(t)) if t and r.random() < .7 else box())) for _ in range(r.choice((0, 1, 2, 5, 9)))] for t in truths]
    return truths, preds

@pytest.mark.parametrize('seed', range(4))
def test_equals_the_metric_written_with_loops(seed):
    "Every image, every score threshold; boxes crowd each other, so order and choice of the truth matter"
    truths, preds = random_images(250, seed)
    ours = score_images(truths, preds)
    for t, p, row in zip(truths, preds, ours):
        for cut, got in zip(SCORES, row):
            want = loop_score(t, p, cut)
            assert (want is None and np.isnan(got)) or got == pytest.approx(want, abs=1e-12)
    table = map_table(truths, preds, n_boot=20)
    assert table['map'].tolist() == pytest.approx([loop_map(truths, preds, c) for c in SCORES], abs=1e-12)

def test_the_random_images_reach_every_rule():
    "Images left out, 0 for a false alarm, an IoU exactly on a threshold, equal scores, a truth box wanted by two"
    truths, preds = random_images(1000, 0)
    assert any(not t and not p for t, p in zip(truths, preds)) and any(not t and p for t, p in zip(truths, preds))
    pairs = [overlap(p[1:], b) for t, ps in zip(truths, preds) for p in ps for b in t]
    assert any(20*s == k*c for s, c in pairs for k in range(8, 16))
    assert any(len({p[0] for p in ps}) < len(ps) for ps in preds)
    greedy = [image_score(t, p, [0.], [.4]) for t, p in zip(truths, preds)]
    turned = [image_score(t, [(1-s, *b) for s, *b in p], [-1.], [.4]) for t, p in zip(truths, preds)]
    assert any(a != b for a, b in zip(greedy, turned) if not np.isnan(a))

def test_order_of_rows_does_not_matter_but_confidence_does():
    truths, preds = random_images(100, 5)
    preds = [[(s + i*1e-6, *b) for i, (s, *b) in enumerate(p)] for p in preds]                # no ties
    np.testing.assert_array_equal(score_images(truths, preds), score_images(truths, [p[::-1] for p in preds]))

def test_intervals_resample_patients():
    "Ten images of one patient are one observation: the interval is that of one, wide; a copy of each image changes nothing else"
    truths, preds = random_images(60, 1)
    single = map_table(truths, preds, n_boot=200)
    tenfold = map_table(truths*10, preds*10, groups=list(range(60))*10, n_boot=200)
    alone = map_table(truths*10, preds*10, n_boot=200)
    np.testing.assert_allclose(single[['map', 'low', 'high']], tenfold[['map', 'low', 'high']], rtol=1e-12)
    assert ((alone.high - alone.low) < .5*(tenfold.high - tenfold.low)).all()
    assert ((single.low <= single['map']) & (single['map'] <= single.high)).all()

def test_difference_is_paired():
    "The same predictions differ by 0 in every resample; worse ones by less than 0"
    truths, preds = random_images(80, 2)
    same = map_difference(truths, preds, preds, n_boot=50)
    assert (same[['difference', 'low', 'high']] == 0).to_numpy().all()
    worse = map_difference(truths, [[] for _ in preds], [[(.9, *b) for b in t] for t in truths], n_boot=50)
    assert (worse.difference == -1).all() and (worse.high == -1).all()

def test_lengths_must_agree():
    with pytest.raises(ValueError, match='truths holds 2'): score_images([[], []], [[]])

def test_coco_ap_by_hand():
    "Two opacities, one found: precision 1 up to recall .5, which 51 of 101 recall points reach"
    pytest.importorskip('pycocotools')
    a, b = (0, 0, 10, 10), (50, 50, 10, 10)
    ap, curve = coco_ap([[a, b]], [[(.9, *a)]])
    assert ap['AP'] == ap['AP50'] == pytest.approx(51/101) and curve.loc[.5, .5] == pytest.approx(1) and curve.loc[.51, .5] == 0
    assert coco_ap([[a]], [[(.9, 0, 0, 10, 6)]])[0] == dict(AP50=pytest.approx(1), AP75=0., AP=pytest.approx(.3))       # IoU .6: .5, .55, .6 (COCO: at least)
    assert np.isnan(coco_ap([[]], [[(.9, *a)]])[0]['AP'])

def test_kaggle_format_there_and_back(tmp_path):
    path = write_predictions(tmp_path/'p.csv', ['00a', '00b'], [[(.12345, 1, 2, 3.25, 4), (.9, 5, 6, 7, 8)], []])
    ids, preds = read_predictions(path)
    assert ids == ['00a', '00b'] and preds[0].tolist() == [[.1235, 1, 2, 3.2, 4], [.9, 5, 6, 7, 8]] and len(preds[1]) == 0
    path.write_text('patientId,PredictionString\nx,0.5 1 2 3\n')
    with pytest.raises(DataError, match='prediction of x'): read_predictions(path)

@pytest.mark.parametrize('w, h', [(512, 512), (800, 400), (300, 701), (97, 41)])
def test_square_and_back(w, h):
    "A white box painted into a file is, in the letterboxed square, where the moved box says; and comes back"
    box = (w//4, h//3, w//2, h//2)
    image = np.zeros((h, w), np.uint8); image[box[1]:box[1]+box[3], box[0]:box[0]+box[2]] = 255
    (x, y, bw, bh), = square_boxes([box], w, h, 128)
    ys, xs = np.nonzero(to_square(image, 128, 'letterbox') > 127)
    np.testing.assert_allclose([x, y, x+bw, y+bh], [xs.min(), ys.min(), xs.max()+1, ys.max()+1], atol=.6)
    np.testing.assert_allclose(unsquare([(.5, x, y, bw, bh)], w, h, 128), [(.5, *box)])
    assert square_boxes([], w, h, 128) == [] and unsquare([], w, h, 128).shape == (0, 5)
