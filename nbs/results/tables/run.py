"""Tables 1 and 3 and what goes beyond, at small scale, on real radiographs: the files that notebook 74 computes from.

    export C2L_RADIOGRAPHS=/path/to/radiographs OMP_NUM_THREADS=1
    python nbs/results/tables/run.py --work RUNS --jobs 2           # everything, some eight hours of one core; goes on where it was stopped
    python nbs/results/tables/run.py --work RUNS --part keep        # only collect what is there
    python nbs/results/tables/run.py --work RUNS --part smoke       # DenseNet-121 beside ResNet-18, on phantoms

What is run is a list of `c2l_table` commands, COMMANDS below; RUNS is their --out. Pretraining sees train without labels, the curves along
a run are those of valid, the tables those of test. Written beside this file: scores of each test image, a file a task and a kind of score, with
hashed patients; what is true of the images; the curves; the losses; the table of phantoms; and run.json with commands, versions and settings.
"""
import argparse, hashlib, json, os, shlex, sys
from pathlib import Path
import numpy as np, pandas as pd, torch
from c2l_nb.core import patient_ids
from c2l_nb.data.collections import label_matrix
from c2l_nb.paper.scoring import _file, read_pool, score, tasks, tune
from c2l_nb.paper.tables import folder_of, plan, run_table, settings

here = Path(__file__).parent
RESNET = [f'ResNet-18 {m}' for m in ('MG', 'MoCo', 'C2L', 'untrained')]
LITE0 = [f'EfficientNet-Lite0 {m}' for m in ('ImageNet', 'C2L', 'untrained')]
COMMANDS = [                                # table, epochs, precision, untrained bodies, columns; Lite0's depthwise convolutions are quicker in fp32
    ('1', 25, 'bf16', 5, ['untrained', 'No mixup', 'Mix.', 'Bat. Mix.', 'Bat. Mix. + loss_M', 'Bat. + Feat. Mix. + loss_M']),
    ('3', 25, 'bf16', 5, RESNET),
    ('3', 25, 'fp32', 2, LITE0),
    ('3', 50, 'bf16', 5, ['ResNet-18 MoCo']),                               # as many passes as 25 epochs of C2L
    ('beyond', 25, 'bf16', 5, ['C2L', 'False negatives masked (patient)', 'Decoupled'])]
TRAILS = [('1', 25, 'bf16', 5, ['No mixup', 'Bat. + Feat. Mix. + loss_M']), ('3', 50, 'bf16', 5, ['ResNet-18 MoCo'])]
short = lambda text: hashlib.sha256(str(text).encode()).hexdigest()[:10]

def command(table, epochs, precision, untrained, take, *more):
    own = dict(epochs=epochs, precision=precision, untrained=untrained, take='|'.join(take))
    return shlex.join(['c2l_table', table, '--scale', 'small', *[x for k, v in own.items() for x in (f'--{k}', str(v))], *more])

def run(work, jobs):
    for table, epochs, precision, untrained, take in COMMANDS:
        run_table(table, 'small', work, 'test', take, jobs, epochs=epochs, precision=precision, untrained=untrained)
    for table, epochs, precision, _, take in TRAILS:
        run_table(table, 'small', work, 'valid', take, jobs, trail=True, epochs=epochs, precision=precision, tune=0)

def smoke(work):
    "ResNet-18 and DenseNet-121 on phantoms: that everything runs"
    archs = [f'{a} {m}' for a in ('ResNet-18', 'DenseNet-121') for m in ('MG', 'MoCo', 'C2L', 'untrained')]
    t, = run_table('3', 'smoke', work/'smoke', 'test', archs).values()
    t.to_csv(here/'smoke.csv', index=False)

def bodies(pool, s):
    "name -> Start, precision of its fine-tuning; table -> column -> names. A body that stands in several tables has one name"
    found, names, tables = {}, {}, {}
    for table, epochs, precision, untrained, take in COMMANDS:
        grid = plan(table, pool, epochs, s['batch'], s['seeds'], untrained, take, precision)
        for column, starts in grid.items():
            for st in starts:
                name = names.setdefault(st.key(pool.mark), f'{column}{"" if epochs == 25 else f", {epochs} epochs"}_{st.seed}')
                found[name] = st, precision
                tables.setdefault(table if epochs == 25 else f'{table}, {epochs} epochs', {}).setdefault(column, []).append(name)
    return found, tables

def keep(work):
    s = settings('1', 'small')
    pool = read_pool(s['data'], s['size'], cache=work/f"pool-{s['size']}")
    found, tables = bodies(pool, s)
    done = {n: v for n, v in found.items() if _file(v[0], work/'scores', pool, 'test').is_file()}
    print('not there yet:', sorted(set(found) - set(done)) or 'nothing')
    out, logs, about = {}, [], {}
    for name, (st, precision) in done.items():
        folder = folder_of(st, work/'pretrained', pool)
        held = score(st, folder, work/'scores', pool, 'test')
        for task, p in tune(st, folder, work/'scores', pool, s['tune'], 'test', precision).items(): held[task]['tuned'] = p
        for task, kinds in held.items():
            for kind, p in kinds.items(): out.setdefault((task, kind), {})[name] = p
        if st.trained:
            logs.append(pd.read_csv(folder/'log.csv').assign(body=name))
            about[name] = dict(precision=st.precision, key=st.key(pool.mark), method=st.method, arch=st.arch, seed=st.seed,
                               epochs=st.epochs or st.config.epochs)
    for (task, kind), cells in out.items():
        labels, _, at = tasks(pool.rows, 'test')[task]
        cols = {f'{n}:{l}': (10_000*p[:, i]).round().astype(int) for n, p in cells.items() for i, l in enumerate(labels)}
        pd.DataFrame(cols).to_csv(here/f'{task}-{kind}-scores.csv', index=False)
        rows = pool.rows.iloc[at]
        truth = pd.DataFrame(label_matrix(rows, labels), columns=labels).astype(int)
        truth.assign(patient=[short(str(p)) for p in patient_ids(rows)]).to_csv(here/f'{task}-truth.csv', index=False)
    pd.concat(logs).to_csv(here/'logs.csv', index=False)
    along(work, pool, found)
    write_about(work, pool, s, done, tables, about)

def along(work, pool, found):
    "Curves on valid"
    parts = []
    for name, (st, _) in found.items():
        f = work/f'along-{folder_of(st, "", pool).name}-valid.csv'
        if f.is_file(): parts.append(pd.read_csv(f).assign(body=name))
    if parts: pd.concat(parts).round(5).to_csv(here/'along.csv', index=False)

def write_about(work, pool, s, done, tables, about):
    data = {}
    for task, (labels, a, b) in tasks(pool.rows, 'test').items():
        v = tasks(pool.rows, 'valid')[task][2]
        n = {k: dict(images=len(i), patients=len(set(patient_ids(pool.rows.iloc[i])))) for k, i in dict(train=a, valid=v, test=b).items()}
        data[task] = dict(labels=labels) | n
    train = pool.rows[pool.rows.split == 'train']
    config = next(st.config for st, _ in done.values() if st.method == 'c2l')
    import fastai, torchvision
    from c2l_nb import __version__
    versions = dict(c2l_nb=__version__, python=sys.version.split()[0], torch=torch.__version__, torchvision=torchvision.__version__,
                    fastai=fastai.__version__, numpy=np.__version__, pandas=pd.__version__)
    lines = [command(*c, '--split', 'test') for c in COMMANDS] + [command(*c, '--split', 'valid', '--tune', '0', '--trail') for c in TRAILS]
    scored = {t: {c: [n for n in names if n in done] for c, names in cols.items()} for t, cols in tables.items()}
    scored = {t: {c: n for c, n in cols.items() if n} for t, cols in scored.items()}
    told = dict(commands=lines + ["c2l_table 3 --scale smoke --split test"], versions=versions, threads=1,
                settings={k: v for k, v in s.items() if k != 'detect'},
                pretraining=dict(images=len(train), patients=train.patient.nunique(), steps_an_epoch=len(train)//config.batch_size,
                                 **{k: getattr(config, k) for k in ('batch_size', 'queue_size', 'momentum', 'temperature', 'lr', 'head', 'crop')}),
                data=data, bodies=about, tables=scored)
    (here/'run.json').write_text(json.dumps(told, indent=1))

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--work', default='tables_runs', help='folder of all runs (large: not beside this file)')
    p.add_argument('--part', default='all', choices=['all', 'run', 'smoke', 'keep'])
    p.add_argument('--jobs', type=int, default=1, help='pretrainings side by side')
    args = p.parse_args()
    if 'C2L_RADIOGRAPHS' not in os.environ and args.part != 'smoke': raise SystemExit("set C2L_RADIOGRAPHS to the folder with index.csv")
    work = Path(args.work).absolute()
    if args.part in ('all', 'run'): run(work, args.jobs)
    if args.part in ('all', 'smoke'): smoke(work)
    if args.part in ('all', 'keep'): keep(work)

if __name__ == '__main__': main()
