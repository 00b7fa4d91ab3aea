"""Probe and fine-tune the encoders of nbs/results/encoders on real radiographs: the files that notebook 72 computes from.

    export C2L_RADIOGRAPHS=/path/to/radiographs
    python nbs/results/finetuning/run.py --work RUNS            # everything, some two hours of one core; goes on where it was stopped
    python nbs/results/finetuning/run.py --work RUNS --part probe   # or lr, full, keep

Each run is a folder of `c2l_finetune` in RUNS. `lr` tries learning rates on a tenth of the labels, seed 0, and the one with the best AUROC on valid is
taken for that task and initialisation. Written beside this file, for each task and mode: scores of the test images (hashed ids), what is true of them,
the curves on valid, and run.json with commands, seeds, versions and processor time.
"""
import argparse, hashlib, json, os, time
from pathlib import Path
import pandas as pd, torch
from c2l_nb.evaluation.comparison import cell_name, read_run
from c2l_nb.tasks.classify import finetune

here = Path(__file__).parent
INITS = dict(untrained='untrained', MoCo=here.parent/'encoders'/'moco.safetensors', C2L=here.parent/'encoders'/'c2l.safetensors')
FINDINGS = ['Pneumonia', 'Infiltration', 'Atelectasis', 'Edema', 'Effusion']      # the only ones with some 70 images
KERMANY = {'NORMAL': 'normal', 'PNEUMONIA|bacteria': 'bacteria', 'PNEUMONIA|virus': 'virus'}
LRS = 1e-4, 3e-4, 1e-3
EPOCHS = {.1: 20, 1.: 8}
PROBES = dict(kermany=(.01, .1, 1.), nih=(.2, 1.), knee=(.05, .1, 1.))            # smaller shares leave a class without a case in one of the draws
short = lambda text: hashlib.sha256(str(text).encode()).hexdigest()[:10]

def table(task, work):
    "An index of one task, its labels as class names"
    if 'C2L_RADIOGRAPHS' not in os.environ: raise SystemExit("set C2L_RADIOGRAPHS to the folder with index.csv")
    root, path = Path(os.environ['C2L_RADIOGRAPHS']), work/f'{task}.csv'
    rows = pd.read_csv(root/'index.csv', dtype=str)
    rows = rows[rows.file.str.startswith(f'{task}/')]
    rows = rows.assign(path=[str(root/f) for f in rows.file], labels=rows.labels.replace(KERMANY))
    rows.drop(columns='file').to_csv(path, index=False)
    return path, rows

def one(task, work, name, inits, spent, **how):
    "One run of `finetune`, resumed if it is there; its folder"
    data, _ = table(task, work)
    out, start = work/f'{task}-{name}', time.process_time()
    own = dict(labels=FINDINGS) if task == 'nih' else dict(task='multiclass')
    finetune(data, out, [f'{k}={INITS[k]}' if k != 'untrained' else k for k in inits], size=48, resume=(out/'config.json').is_file(),
             cache=work/f'cache-{task}', n_boot=20, **own, **how)
    spent[out.name] = spent.get(out.name, 0) + round(time.process_time() - start)
    (work/'seconds.json').write_text(json.dumps(spent, indent=1))
    return out

def run_name(init, fraction, lr): return f'full-{init}-{100*fraction:g}-{lr:g}'

def full(task, work, init, fraction, lr, spent, seeds):
    return one(task, work, run_name(init, fraction, lr), [init], spent, fractions=[fraction], epochs=EPOCHS[fraction], lr=lr, seeds=seeds, precision='bf16')

def chosen(task, work):
    "The learning rate of each initialisation: best on valid, with a tenth of the labels"
    best = lambda run: read_run(run)[3].query('seed == 0').auroc.max()
    tried = {i: {lr: best(work/f'{task}-{run_name(i, .1, lr)}') for lr in LRS} for i in INITS}
    return {i: max(v, key=v.get) for i, v in tried.items()}, tried

def keep(task, mode, runs):
    "Scores of the test images, truth and curves, as CSV beside this file"
    scores, curves, truth = {}, [], None
    for out in runs:
        y, cells, patient, curve = read_run(out)
        same = truth is None or truth.drop(columns='patient').equals(y)
        assert same, f"{out}: other images than in the runs before"
        truth = y.assign(patient=[short(p) for p in patient])
        for key, p in cells.items():
            if mode == 'probe' and key[0] != 'untrained' and key[3] > 0: continue          # a given body has no seed
            scores |= {f'{cell_name(*key)}:{c}': (10_000*v).round().astype(int) for c, v in zip(y.columns, p.T)}     # in 1/10,000
        curves.append(curve)
    pd.DataFrame(scores).to_csv(here/f'{task}-{mode}-scores.csv', index=False)
    pd.concat(curves).round(5).to_csv(here/f'{task}-{mode}-curves.csv', index=False)
    truth.to_csv(here/f'{task}-truth.csv', index=False)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--work', default='finetuning_runs', help='folder of the run folders (large: not beside this file)')
    p.add_argument('--part', default='all', choices=['all', 'probe', 'lr', 'full', 'keep'])
    p.add_argument('--tasks', nargs='+', default=['kermany', 'knee', 'nih'])
    args = p.parse_args()
    work = Path(args.work).absolute()
    work.mkdir(parents=True, exist_ok=True)
    spent = json.loads((work/'seconds.json').read_text()) if (work/'seconds.json').is_file() else {}
    tuned = [t for t in args.tasks if t != 'nih']
    if args.part in ('all', 'lr'): [full(t, work, i, .1, lr, spent, 1) for t in tuned for i in INITS for lr in LRS]
    if args.part in ('all', 'full'):
        for seeds in (1, 3):                                       # every initialisation has its first seed before any has its second
            [full(t, work, i, f, lr, spent, seeds) for t in tuned for f in EPOCHS for i, lr in chosen(t, work)[0].items()]
    if args.part in ('all', 'probe'): [one(t, work, 'probe', INITS, spent, fractions=PROBES[t], draws=5, seeds=5, mode='probe') for t in args.tasks]
    if args.part in ('all', 'keep'): write(args.tasks, tuned, work, spent)

def write(tasks, tuned, work, spent):
    rates = {}
    for t in tasks: keep(t, 'probe', [work/f'{t}-probe'])
    for t in tuned:
        lrs, tried = chosen(t, work)
        rates[t] = dict(chosen=lrs, valid_auroc=tried)
        keep(t, 'full', [work/f'{t}-{run_name(i, f, lr)}' for i, lr in lrs.items() for f in EPOCHS])
    views = table('nih', work)[1]
    views = views[views.split.isin(['train', 'test'])]
    ids = dict(image=views.path.map(lambda f: short(Path(f).name)), patient=views.patient.map(short))
    pd.DataFrame(ids | dict(split=views.split, view=views['view']) | {f: views.labels.str.split('|').map(lambda l: int(f in l)) for f in FINDINGS}
                 ).to_csv(here/'nih-views.csv', index=False)
    config = json.loads((work/f'{tasks[0]}-probe'/'config.json').read_text())
    about = dict(commands=['python nbs/results/finetuning/run.py'], inits=config['inits'], versions=config['versions'], threads=torch.get_num_threads(),
                 rates=rates, epochs={f'{f:g}': e for f, e in EPOCHS.items()}, size=48, precision='bf16 (full), fp32 (probe)', seconds=spent,
                 data={t: json.loads((work/f'{t}-probe'/'config.json').read_text())['data'] for t in tasks})
    (here/'run.json').write_text(json.dumps(about, indent=1))

if __name__ == '__main__': main()
