"""What the benchmarks share: pairs run by turns, one line a figure, and a file of results with the facts of the machine.

A speed is the ratio of two things timed in one run on one machine, the median of seven pairs. A line reads
`name | ratio | goal | ok, short or void`; void: others kept the machine busy before the figure began.
"""
import argparse, datetime, json, os, platform, statistics, tempfile, time
from pathlib import Path
import torch

def busy(seconds=1.):
    "Share of the processors that others used during `seconds` of our sleep"
    def ticks(): return [int(v) for v in open('/proc/stat').readline().split()[1:9]]
    try: a = ticks(); time.sleep(seconds); b = ticks()
    except OSError: return 0.
    d = [y-x for x,y in zip(a,b)]
    return 1 - (d[3]+d[4])/max(1,sum(d))

def timed(f, clock):
    "Seconds of one call"
    start = clock(); f(); return clock()-start

def peak_memory(f):
    "The most bytes that torch held during `f()` beyond what it held before, counted by its allocator"
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as prof: f()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)/'trace.json'
        prof.export_chrome_trace(str(path))
        events = [e for e in json.loads(path.read_text())['traceEvents'] if e.get('name')=='[memory]']
    held,peak = 0,0
    for e in sorted(events, key=lambda e: e['ts']):
        held += e['args']['Bytes']; peak = max(peak,held)
    return peak

def machine():
    "What a ratio may depend on; no host, user or path"
    try: cpu = next(l.split(':')[1].strip() for l in open('/proc/cpuinfo') if l.startswith('model name'))
    except (OSError, StopIteration): cpu = platform.processor() or platform.machine()
    return dict(cpu=cpu, cores=os.cpu_count(), system=platform.system(), python=platform.python_version(),
                torch=torch.__version__, date=datetime.date.today().isoformat())

class Bench:
    "Figures of one run: measured, printed, kept"
    def __init__(self, pairs=7, threads=2, cpu=False):
        self.pairs,self.threads,self.cpu,self.figures = pairs,threads,cpu,[]

    def ratio(self, name, a, b, goal, threads=None, cpu=None, images=None):
        "Seconds of `a()` ÷ seconds of `b()`, after one call of each; `images` a call adds a line of images/s; the ratio"
        cpu,threads = self.cpu if cpu is None else cpu, threads or self.threads
        void = busy()>.1
        torch.set_num_threads(threads)
        clock = time.process_time if cpu else time.perf_counter
        a(); b()
        pairs = [(timed(a,clock), timed(b,clock)) for _ in range(self.pairs)]
        return self.add(name, statistics.median(x/y for x,y in pairs), goal, void, images=images, threads=threads,
                        clock='processor' if cpu else 'wall', pairs=[[round(t,5) for t in p] for p in pairs])

    def add(self, name, ratio, goal, void=False, unit='s', pairs=(), images=None, **more):
        "Print a figure and keep it; `goal` is '<= 1.05' or '>= 2'"
        sign,bound = goal.split()
        met = ratio<=float(bound) if sign=='<=' else ratio>=float(bound)
        verdict = 'void' if void else 'ok' if met else 'short'
        print(f'{name} | {ratio:.3g} | {goal} | {verdict}', flush=True)
        a,b = (statistics.median(c) for c in zip(*pairs)) if pairs else (0,0)
        if pairs: print(f'# {a:.4g} against {b:.4g} {unit}' + (f', {images/a:.3g} against {images/b:.3g} images/s' if images else ''), flush=True)
        self.figures.append(dict(name=name, ratio=ratio, goal=goal, verdict=verdict, unit=unit, pairs=pairs, images=images, **more))
        return ratio

    def save(self, path, command):
        "Figures and machine as JSON, for nbs/8_lab/83_speed"
        path = Path(path); path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dict(command=command, machine=machine(), figures=self.figures), indent=1)+'\n')

def arguments(doc):
    "The command line that all benchmarks have"
    p = argparse.ArgumentParser(description=doc.split('\n')[0])
    p.add_argument('--pairs', type=int, default=7, help='alternated pairs a figure (default 7)')
    p.add_argument('--threads', type=int, default=2, help='of torch (default 2)')
    p.add_argument('--cpu', action='store_true', help="this process's processor time, not the clock's: for a busy machine, best with --threads 1")
    p.add_argument('--save', help='JSON file for the figures')
    return p
