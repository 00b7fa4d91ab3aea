"""Measure the features of a pretraining as it goes on: the files that notebook 71 computes from.

    c2l_pretrain --data phantoms --arch resnet18 --config small --phantoms 2000 --size 48 --epochs 30 --snapshots 3 --precision bf16 --seed 0 --out RUN
    python nbs/results/embeddings/run.py RUN
    export C2L_RADIOGRAPHS=/path/to/radiographs
    python nbs/results/embeddings/run.py --encoder FILE

With RUN: phantoms of patients that the run never saw, drawn again by the notebook from their seeds. Written beside this file: map.npz (coordinates by three ways of sharing
axes, neighbours), decode.npz (factors and their cross-validated predictions), gradcam.csv (scores of each box), run.json. With `--encoder`: radiographs-NAME.csv, coordinates of
real radiographs under a hashed id, with data set and view; never an image. Everything is read by one process and one thread.
"""
import argparse, hashlib, json, os, sys, time, warnings
from pathlib import Path
import numpy as np, pandas as pd, torch, torchvision
import torch.nn.functional as F
from torch import nn
from c2l_nb import __version__
from c2l_nb.data.cache import load_squares, read_items, to_square
from c2l_nb.evaluation.features import extract_features, retrieval_at_1
from c2l_nb.method.encoder import Prepare, create_encoder
from c2l_nb.evaluation.attribution import box_scores, decode, grad_cam
from c2l_nb.tasks.embed import nearest
from c2l_nb.data.phantom import phantom, seeded
from c2l_nb.training.weights import load_backbone, read_card

here = Path(__file__).parent
PATIENTS, MAPPED, FIRST = 400, 200, 100_000             # patients scored, and on the map, two images each; the first seed: far from any of a pool
FACTORS = 'heart', 'effusion', 'rotation', 'shift_x', 'scale', 'brightness'
CAM = dict(findings=('Effusion', 'Mass', 'Pneumonia'), size=64, train=400, test=200, epochs=5, batch=32, lr=3e-4, first=200_000)

def shown(patient):
    "Findings of a scored patient: an effusion in half of them, a large heart in a quarter, a mass in a fifth"
    return [k for k, on in (('Effusion', patient%2), ('Cardiomegaly', patient%4 in (1, 2)), ('Mass', patient%5 == 0)) if on]

def factors(p):
    "Size of the heart, level of the fluid (NaN without), and the pose, from what was drawn"
    f = p.factors
    heart = f['heart']*(1.27+.15*f['Cardiomegaly_severity'] if 'Cardiomegaly' in p.findings else 1)
    return heart, f.get('Effusion_severity', np.nan), f['rotation'], f['shift_x'], f['scale'], f['brightness']

def other_scanner(image):
    "The second data set: the same chest through another display curve"
    return (255*(image/255.)**1.7).round().astype(np.uint8)

def pool(patients, size):
    "Two images of each patient at the run's size, a table, and the factors"
    ps = [phantom(FIRST+i, shown(i), round(1.25*size), pose) for i in range(patients) for pose in (0, 1)]
    images = np.stack([to_square(p.image, size) for p in ps])
    rows = pd.DataFrame(dict(patient=[p.patient for p in ps], view=[p.view for p in ps], finding=['|'.join(p.findings) or 'No Finding' for p in ps]))
    return images, rows, np.array([factors(p) for p in ps])

def features(body, prepare, images): return extract_features(body, torch.from_numpy(images)[:, None], prepare=prepare)

def bodies(run):
    "name, body and preparation: snapshots, then two more untrained networks"
    for path in sorted((run/'snapshots').glob('epoch-*.safetensors')):
        card = read_card(path)
        yield f"epoch {card['epoch']}", load_backbone(path), Prepare(card['mean'], card['std'], card['channels'])
    for seed in (101, 102):
        torch.manual_seed(seed)
        yield f'untrained {seed}', create_encoder(card['arch'], channels=1), Prepare(channels=1)

# ---- maps

def kept(high, low, k=15):
    "Share of the k nearest images in the features that are among the k nearest on the map"
    near = [nearest(f, k)[0] if cosine else torch.cdist(f, f).fill_diagonal_(torch.inf).topk(k, largest=False)[1] for f, cosine in ((high, True), (torch.as_tensor(low).float(), False))]
    return np.mean([len(set(a.tolist()) & set(b.tolist()))/k for a, b in zip(*near)])

def maps(stages):
    "Coordinates of each stage by three ways of sharing axes, and how many neighbours each keeps"
    from umap import AlignedUMAP, UMAP                  # slow to import
    how, names = dict(n_neighbors=15, min_dist=.1, metric='cosine', random_state=42), list(stages)
    f = {k: F.normalize(v-v.mean(0)).numpy() for k, v in stages.items()}
    n, out = len(f[names[0]]), {}
    out['together'] = np.split(UMAP(n_jobs=1, **how).fit_transform(np.concatenate(list(f.values()))), len(f))
    last = UMAP(n_jobs=1, **how).fit(f[names[-1]])
    out['on the last'] = [last.embedding_ if k == names[-1] else last.transform(f[k]) for k in names]
    same = [{i: i for i in range(n)}]*(len(f)-1)
    out['aligned'] = AlignedUMAP(alignment_regularisation=.01, **how).fit([f[k] for k in names], relations=same).embeddings_
    return {way: np.stack(coords).astype(np.float16) for way, coords in out.items()}

def quality(stages, coords):
    "Neighbours kept by each way and stage"
    centred = {k: F.normalize(v-v.mean(0)) for k, v in stages.items()}
    return {way: {k: round(float(kept(centred[k], c)), 4) for k, c in zip(stages, maps)} for way, maps in coords.items()}

# ---- Grad-CAM

def cam_pool(n, first):
    "Phantoms with each finding in a third of the patients, one image each"
    found = [[k for k, u in zip(CAM['findings'], torch.rand(3, generator=seeded(first+i, 7, 0)).tolist()) if u < 1/3] for i in range(n)]
    ps = [phantom(first+i, k, CAM['size']) for i, k in enumerate(found)]
    y = torch.tensor([[k in p.findings for k in CAM['findings']] for p in ps]).float()
    return torch.from_numpy(np.stack([p.image for p in ps]))[:, None], y, [{b[0]: b[1:] for b in p.boxes} for p in ps]

def classifier(body, prepare):
    body.fc = nn.Linear(512, len(CAM['findings']))      # torchvision's ResNet has its place for it
    return nn.Sequential(prepare, body.to(memory_format=torch.channels_last))

def train(model, x, y):
    "A plain loop: AdamW, no augmentation but the mirror"
    opt, g = torch.optim.AdamW(model.parameters(), CAM['lr'], weight_decay=.01), seeded(0, 8, 0)
    model.train()
    for epoch in range(CAM['epochs']):
        for i in torch.randperm(len(x), generator=g).split(CAM['batch'])[:len(x)//CAM['batch']]:
            flip = torch.rand(len(i), 1, 1, 1, generator=g) < .5
            with torch.autocast('cpu', torch.bfloat16): z = model(torch.where(flip, x[i].flip(-1), x[i]))
            loss = F.binary_cross_entropy_with_logits(z.float(), y[i])
            opt.zero_grad(); loss.backward(); opt.step()
        print(f'  epoch {epoch}, loss {loss:.3f}', flush=True)
    return model

def cams(run):
    "Scores of each box of the test phantoms by each classifier and layer, and the classifier's own"
    x, y, _ = cam_pool(CAM['train'], CAM['first']); xt, yt, boxes = cam_pool(CAM['test'], CAM['first']+50_000)
    last, rows, own = sorted((run/'snapshots').glob('epoch-*.safetensors'))[-1], [], []
    def fresh():
        torch.manual_seed(0)
        return create_encoder('resnet18', channels=1)
    start = dict(C2L=lambda: load_backbone(last), untrained=fresh, never=fresh)
    for name, make in start.items():
        torch.manual_seed(1)                            # of the new layer
        model = classifier(make(), Prepare(channels=1))
        if name != 'never': print(name); train(model, x, y)
        model.eval()
        with torch.no_grad(): p = model(xt)
        own += [(name, k, i, int(yt[i, c]), round(p[i, c].item(), 4)) for c, k in enumerate(CAM['findings']) for i in range(len(xt))]
        for layer in ('layer2', 'layer3', 'layer4'):
            for c, k in enumerate(CAM['findings']):
                at = [i for i in range(len(xt)) if k in boxes[i]]
                s = box_scores(grad_cam(model, xt[at], c, getattr(model[1], layer)), [boxes[i][k] for i in at])
                rows += [(name, layer, k, i, *v) for i, v in zip(at, s.numpy().round(4).tolist())]
    return (pd.DataFrame(rows, columns='init layer finding image pointing inside area'.split()),
            pd.DataFrame(own, columns='init finding image y score'.split()))

def gradcam(run, out):
    start = time.process_time()
    table, own = cams(run)
    table.to_csv(out/'gradcam.csv', index=False); own.to_csv(out/'classifier.csv', index=False)
    note(out, dict(cam=CAM | dict(seconds=round(time.process_time()-start))))

def note(out, known):
    "Add to run.json"
    path = out/'run.json'
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | known, indent=1))

# ---- the two kinds of run

def phantoms(run, out):
    about, start = json.loads((run/'config.json').read_text()), time.process_time()
    images, rows, y = pool(PATIENTS, about['config']['size'])
    stages, preds, at_1 = {}, {}, {}
    with_fluid = ~np.isnan(y[:, 1])
    mapped = np.arange(2*MAPPED)
    second = np.array([i//2%8 >= 4 for i in mapped])    # half of the patients on the map, with findings as in the other half
    two = images[mapped].copy(); two[second] = other_scanner(two[second])
    def read(feats):
        p = np.full(y.shape, np.nan)
        p[:, [0, 2, 3, 4, 5]] = decode(feats, y[:, [0, 2, 3, 4, 5]], rows.patient.values)
        p[with_fluid, 1] = decode(feats[with_fluid], y[with_fluid][:, [1]], rows.patient.values[with_fluid])[:, 0]
        return ((p-np.nanmean(y, 0))/np.nanstd(y, 0)).astype(np.float16)
    for name, body, prepare in bodies(run):
        feats = features(body, prepare, images)
        preds[name], at_1[name] = read(feats), round(retrieval_at_1(feats, rows.patient.values), 4)
        if name.startswith('epoch'): stages[name] = features(body, prepare, two)
        print(name, f'{time.process_time()-start:.0f} s', flush=True)
    small = F.interpolate(torch.from_numpy(images)[:, None].float(), (8, 8), mode='area').flatten(1)
    preds['64 pixels'], at_1['64 pixels'] = read(small), round(retrieval_at_1(small-small.mean(0), rows.patient.values), 4)
    np.savez_compressed(out/'decode.npz', names=np.array(list(preds)), factors=np.array(FACTORS), pred=np.stack(list(preds.values())),
                        y=((y-np.nanmean(y, 0))/np.nanstd(y, 0)).astype(np.float32))
    names = list(stages); chosen = [names[0], names[len(names)//2], names[-1]]
    chosen_stages = {k: stages[k] for k in chosen}
    coords = maps(chosen_stages)
    near = {f'near {k}': nearest(stages[k], 6, groups=rows.patient.values[mapped])[0].numpy().astype(np.int16) for k in chosen}
    np.savez_compressed(out/'map.npz', names=np.array(chosen), second=second, **coords, **near)
    print('maps', f'{time.process_time()-start:.0f} s', flush=True)
    log = pd.read_csv(run/'log.csv').drop(columns='time')
    note(out, dict(
        command=about['command'] or 'see the head of run.py', config=about['config'], pool=about['data'], versions=about['versions'], epochs_done=len(log),
        phantoms=dict(first_seed=FIRST, patients=PATIENTS, mapped=MAPPED), kept=quality(chosen_stages, coords), retrieval=at_1,
        log=log[['epoch', 'train_loss', 'top1', 'std', 'rank', 'knn']].round(4).to_dict('list'), seconds=round(time.process_time()-start)))

def radiographs(path, out, size, most):
    "Coordinates of real radiographs, split valid, `most` of each data set and view"
    if 'C2L_RADIOGRAPHS' not in os.environ: sys.exit('set C2L_RADIOGRAPHS to the folder of the radiographs')
    from c2l_nb.evaluation.features import umap_coords
    root = Path(os.environ['C2L_RADIOGRAPHS'])
    table = read_items(root/'index.csv')
    table['set'] = [Path(p).relative_to(root.resolve()).parts[0] for p in table.path]
    table = table[(table.split == 'valid') & (table.set != 'originals')]
    table = table.groupby('set', group_keys=False)[table.columns.tolist()].apply(lambda g: g.sample(min(most, len(g)), random_state=0)).reset_index(drop=True)
    card = read_card(path); size = size or card['size']
    images, rows, _ = load_squares(table, size, workers=0)
    torch.manual_seed(0)
    nets = {'untrained': create_encoder(card['arch'], card['channels']), 'pretrained': load_backbone(path)}
    short = lambda t: hashlib.sha256(str(t).encode()).hexdigest()[:10]
    frame = pd.DataFrame(dict(image=rows.path.map(lambda p: short(Path(p).name)), patient=(rows.set+rows.patient.astype(str)).map(short), set=rows.set,
                              view=rows['view'].fillna('') if 'view' in rows else '', label=rows.labels.str.split('|').str[0], brightness=images.mean((1, 2)).round(1)))
    for name, body in nets.items():
        c = umap_coords(features(body, Prepare(card['mean'], card['std'], card['channels']), images))
        frame[f'{name}_x'], frame[f'{name}_y'] = c.round(3).T
    frame.to_csv(out/f'radiographs-{Path(path).stem}.csv', index=False)

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('run', nargs='?', help='run folder of c2l_pretrain --snapshots N')
    parser.add_argument('--encoder', help='backbone file, for a map of real radiographs')
    parser.add_argument('--size', type=int, help="px, with --encoder; default: the model card's")
    parser.add_argument('--most', type=int, default=250, help='radiographs of each data set')
    parser.add_argument('--part', default='all', choices=['all', 'features', 'gradcam'], help='of what is done with RUN')
    parser.add_argument('--out', default=str(here), help='where the results go')
    args = parser.parse_args()
    if not (args.run or args.encoder): parser.error('give RUN, --encoder FILE, or both')
    warnings.filterwarnings('ignore', message='.*(n_jobs|random_state|numba|TBB).*')
    torch.set_num_threads(1)
    if args.encoder: radiographs(args.encoder, Path(args.out), args.size, args.most)
    if args.run and args.part != 'gradcam': phantoms(Path(args.run), Path(args.out))
    if args.run and args.part != 'features': gradcam(Path(args.run), Path(args.out))

if __name__ == '__main__': main()
