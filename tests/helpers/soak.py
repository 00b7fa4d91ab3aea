"""A long pretraining on phantoms that is killed again and again: do memory or open files grow?

`python tests/helpers/soak.py --hours 2` starts `pretrain`, kills it by SIGKILL every `--every` seconds and resumes it. Each process notes its resident memory and
its open files every five steps. Within a process, the slope over steps is fitted without the first quarter; over processes, its mean
with a 95 % t-interval is printed, and `--save` keeps it as JSON.
"""
import argparse, csv, json, math, os, random, signal, subprocess, sys, tempfile, time
from pathlib import Path
import numpy as np

def sample(pid='self'):
    "MB of resident memory, open files"
    pages = int(Path(f'/proc/{pid}/statm').read_text().split()[1])
    return pages*os.sysconf('SC_PAGE_SIZE')/1e6, len(os.listdir(f'/proc/{pid}/fd'))

def child(folder):
    "One process of the run: `pretrain` with a callback that notes"
    from fastai.basics import Callback, defaults
    from c2l_nb.tasks.pretrain import pretrain
    class Note(Callback):
        order, run_valid = 99, False
        def before_fit(self): self.file = open(folder/'samples.csv', 'a', buffering=1)
        def after_batch(self):
            if self.train_iter % 5 == 0: self.file.write(f'{os.getpid()},{self.train_iter},%.3f,%d\n' % sample())
        def after_fit(self): self.file.close()
    defaults.callbacks.append(Note)
    pretrain(out=folder/'run', resume=(folder/'run'/'config.json').exists(), size=32, epochs=10**5, batch=32, n_phantoms=500, queue_size=256, save_every=.1)

def slopes(rows, least=8):
    "MB and open files per 1000 steps, a row a process; the steps that each covered"
    found = []
    for pid in dict.fromkeys(r[0] for r in rows):
        part = np.array([[float(v) for v in r[1:]] for r in rows if r[0] == pid])
        part = part[len(part)//4:]
        if len(part) >= least: found.append([*(1000*np.polyfit(part[:, 0], part[:, k], 1)[0] for k in (1, 2)), np.ptp(part[:, 0])])
    return np.array(found).reshape(-1, 3)

def interval(values):
    "Mean and 95 % t-interval"
    from scipy.stats import t
    n = len(values)
    half = t.ppf(.975, n - 1)*values.std(ddof=1)/math.sqrt(n) if n > 1 else math.nan
    return dict(mean=float(values.mean()), low=float(values.mean() - half), high=float(values.mean() + half))

def soak(folder, hours, every):
    "Kills, steps done at the end, slopes"
    end, kills, env = time.monotonic() + 3600*hours, 0, dict(os.environ, PYTHONPATH=os.pathsep.join([str(Path(__file__).parents[2]), *filter(None, sys.path)]))
    while time.monotonic() < end:
        before = len(read(folder))
        with open(folder/'output.txt', 'a') as out:
            run = subprocess.Popen([sys.executable, '-W', 'ignore', __file__, '--child', folder], env=env, stdout=out, stderr=out, start_new_session=True)
        while run.poll() is None and len(read(folder)) == before: time.sleep(.2)          # imports are no part of the soak
        due = time.monotonic() + every*random.uniform(.9, 1.1)
        while run.poll() is None and time.monotonic() < due: time.sleep(.2)
        if run.poll() is not None: raise SystemExit(f"the run ended by itself:\n{(folder/'output.txt').read_text()[-2000:]}")
        os.killpg(run.pid, signal.SIGKILL); run.wait(); kills += 1
        print(f"kill {kills} at step {read(folder)[-1][1]}, {read(folder)[-1][2]} MB, {read(folder)[-1][3]} open files", flush=True)
    s = slopes(read(folder))
    if not len(s): raise SystemExit("no process lived long enough for a slope: raise --every")
    return dict(kills=kills, processes=len(s), steps=int(read(folder)[-1][1]), hours=hours, every=every, median_steps=float(np.median(s[:, 2])),
                memory_mb_per_1000_steps=interval(s[:, 0]), open_files_per_1000_steps=interval(s[:, 1]))

def read(folder):
    path = folder/'samples.csv'
    return [r for r in csv.reader(open(path)) if len(r) == 4] if path.exists() else []

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--hours', type=float, default=.5)
    parser.add_argument('--every', type=float, default=120., help='seconds between kills')
    parser.add_argument('--save', type=Path, help='JSON file for the figures')
    parser.add_argument('--child', type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child: child(args.child); sys.exit()
    with tempfile.TemporaryDirectory() as tmp: result = soak(Path(tmp), args.hours, args.every)
    print(json.dumps(result, indent=1))
    if args.save: args.save.parent.mkdir(parents=True, exist_ok=True); args.save.write_text(json.dumps(result, indent=1) + '\n')
