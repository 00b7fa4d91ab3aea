"""Train the detectors that notebook 73 computes from: untrained and pretrained bodies, phantoms and real radiographs.

    python nbs/results/detection/run.py --data phantoms --work RUNS
    export C2L_RADIOGRAPHS=/path/to/radiographs
    python nbs/results/detection/run.py --data rsna --work RUNS --score valid

Bodies: untrained, and every file in nbs/results/encoders (its name is the column's). For each body and seed one run of `detect` in RUNS, resumed if it was
stopped, left alone if it is finished. Written beside this file, for each `--data`: predictions (hashed ids, scores above 0.05), scores of each image at the seven
thresholds of Table 5, precision at each recall (COCO), and a JSON of command, versions, seeds and processor time. The truth is stored for phantoms alone; of real
radiographs nothing is stored that came with them. `--score test` once, when every choice is made.
"""
import argparse, hashlib, json, os, platform, sys, time
from pathlib import Path
import numpy as np, pandas as pd, torch, torchvision
from c2l_nb import __version__
from c2l_nb.evaluation.detection_metrics import SCORES, coco_ap, map_table, read_predictions, score_images
from c2l_nb.tasks.detect import detect, load_detection

here = Path(__file__).parent
short = lambda text: hashlib.sha256(str(text).encode()).hexdigest()[:10]
SETTINGS = dict(phantoms=dict(size=256, width=128, epochs=6, n_phantoms=1000), rsna=dict(size=256, width=128, epochs=20))

def source(args):
    "Arguments of `detect` that say where images and boxes are"
    if args.data == 'phantoms': return dict(data='phantoms')
    if 'C2L_RADIOGRAPHS' not in os.environ: raise SystemExit("set C2L_RADIOGRAPHS to the folder with index.csv and rsna_boxes.csv")
    root = Path(os.environ['C2L_RADIOGRAPHS'])
    return dict(data=str(root/'index.csv'), boxes=str(root/'rsna_boxes.csv'), side=1024)

def run(out, init, seed, args, own):
    "One run, resumed or skipped; its processor time in seconds"
    spent = out/'seconds.json'
    if (out/'map.csv').exists(): return json.loads(spent.read_text())
    start, resume = time.process_time(), (out/'checkpoint').is_dir() and any((out/'checkpoint').glob('step-*'))
    if out.exists() and not resume:
        for f in out.glob('*.json'): f.unlink()                # stopped in its first epoch: begin again
    detect(out=out, init=init, seed=seed, score_on=args.score, precision=args.precision, resume=resume, **own)
    spent.write_text(json.dumps(None if resume else round(time.process_time() - start)))
    return json.loads(spent.read_text())

def text(rows, places): return ' '.join(f'{v:.3f}' if places == 5 and i%5 == 0 else f'{v:.1f}' for i, v in enumerate(np.ravel(rows)))

def results(runs, rows):
    "Predictions, scores of each image, precision at each recall; and a line a run for the terminal"
    truth, preds, scores, curves = rows.boxes.tolist(), [], [], []
    names = dict(image=rows.patientId.map(short), patient=rows.patient.map(short))
    for (init, seed), out in runs.items():
        ids, boxes = read_predictions(out/'predictions.csv')
        assert ids == rows.patientId.tolist()
        run, order = dict(init=init, seed=seed), dict(zip(SCORES.round(1).astype(str), score_images(truth, boxes).T.round(5)))
        preds.append(pd.DataFrame(run | dict(image=names['image'], prediction=[text(p[:8], 5) for p in boxes])))
        scores.append(pd.DataFrame(run | names | order))
        ap, curve = coco_ap(truth, boxes)
        curves.append(curve.round(4).reset_index(names='recall').assign(**run, **{k: round(v, 5) for k, v in ap.items()}))
        best = map_table(truth, boxes, rows.patient).set_index('score')['map']
        print(f'{init:>12} seed {seed}: best mAP {best.max():.3f} at {best.idxmax():.1f}; AP50 {ap["AP50"]:.3f}', flush=True)
    return dict(predictions=preds, images=scores, curves=curves)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--data', default='phantoms', choices=list(SETTINGS))
    p.add_argument('--work', default='detection_runs', help='folder of the run folders (large: not beside this file)')
    p.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    p.add_argument('--score', default='valid', choices=['valid', 'test'])
    p.add_argument('--precision', default='bf16', choices=['fp32', 'bf16'])
    for name in ('size', 'width', 'epochs', 'n_phantoms'): p.add_argument(f'--{name}', type=int)
    p.add_argument('--lr', type=float)
    args = p.parse_args()
    encoders = {f.stem: str(f) for f in sorted((here.parent/'encoders').glob('*.safetensors'))}
    changed = {k: v for k, v in vars(args).items() if k in ('size', 'width', 'epochs', 'n_phantoms', 'lr') and v is not None}
    own = SETTINGS[args.data] | changed | source(args)
    runs, seconds = {}, {}
    for seed in args.seeds:                                     # seed by seed: every body has its first before any has its second
        for init, file in (dict(untrained='untrained') | encoders).items():
            runs[init, seed] = Path(args.work)/f'{args.data}-{args.score}-{init}-{seed}'
            seconds[f'{init} {seed}'] = run(runs[init, seed], file, seed, args, own)
    _, rows, mark = load_detection(own['data'], own['size'], own.get('boxes'), own.get('side'), own.get('n_phantoms', 0), progress=False)
    trained, rows = int((rows.split == 'train').sum()), rows[rows.split == args.score].reset_index(drop=True)
    for name, parts in results(runs, rows).items(): pd.concat(parts).to_csv(here/f'{args.data}-{args.score}-{name}.csv', index=False)
    if args.data == 'phantoms':
        rows.assign(image=rows.patientId.map(short), number=rows.path.str.split('/').str[-1], truth=[text(b, 4) for b in rows.boxes])[
            ['image', 'number', 'truth']].to_csv(here/f'phantoms-{args.score}-truth.csv', index=False)
    about = dict(command='run.py ' + ' '.join(a for a in sys.argv[1:] if a not in ('--work', args.work)), settings=SETTINGS[args.data] | changed,
                 precision=args.precision, seeds=args.seeds, inits=['untrained', *encoders], trained_on=trained, images=len(rows), with_boxes=int((rows.boxes.str.len() > 0).sum()),
                 fingerprint=mark, seconds=seconds, versions=dict(c2l_nb=__version__, torch=torch.__version__, torchvision=torchvision.__version__,
                                                                 python=platform.python_version()))
    (here/f'{args.data}-{args.score}.json').write_text(json.dumps(about, indent=1))

if __name__ == '__main__': main()
