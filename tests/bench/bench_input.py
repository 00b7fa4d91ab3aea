"""The input path: views from the cache against the released path from the files; batches against the disk; building; the parent's memory.

`views` counts processor time on one core, from file to two 224 px views of each radiograph. The released path opens the original, converts it to
RGB and transforms it twice (tests/bench/bench_augment.py has its transforms); ours gathers the squares of 256 px from the cache and warps them as a batch.
`disk` compares an epoch of batches of 256 with one sequential read of the same file. Before each of the two the file is dropped from the
system's memory by posix_fadvise; what a host may keep below a virtual disk stays, for both. `workers` and part of
`disk` pretend an accelerator: a pause of 20 ms a batch, in which the processors are free. `build` and `memory` run `build_cache`. The files lie in the folder that TMPDIR names.
"""
import gc, itertools, json, os, statistics, subprocess, sys, tempfile, time
from pathlib import Path
import numpy as np, pandas as pd, torch
from PIL import Image
from bench_augment import released
from benchmarks import Bench, arguments, busy
from c2l_nb.method.augment import C2LAugment
from c2l_nb.data.cache import Squares, build_cache, pretrain_dls
from c2l_nb.data.phantom import write_phantoms
from c2l_nb.data.table import index_csv

SIZE,BS = 256,32

def views(bench, folder):
    "Two views a radiograph, from real files and from large phantoms"
    sets,root = {}, os.environ.get('C2L_RADIOGRAPHS')
    if root:
        table = index_csv(Path(root)/'index.csv')
        sets['512 px JPEG radiographs',5] = table[table.path.str.contains('nih')].iloc[::8][:3*BS]
    else: print('# skipped: set C2L_RADIOGRAPHS to the folder of real radiographs for the figure on JPEG files')
    sets['1024 px PNG phantoms',8] = phantoms(folder)
    for k,((name,goal),items) in enumerate(sets.items()):
        items = items.reset_index(drop=True)
        cache,paths = build_cache(items, folder/f'views{k}', SIZE, progress=False), items.path[:BS]
        g,at = torch.Generator().manual_seed(0), np.arange(len(paths))
        def theirs():
            for p in paths: im = Image.open(p).convert('RGB'); released(im), released(im)
        for what,augment in (('',C2LAugment(224)), (', with brightness, contrast and black corners',C2LAugment(224, jitter=.4, corners='black'))):
            def ours(): x = torch.from_numpy(cache[at])[:,None]; augment(x,g), augment(x,g)
            bench.ratio(f'two views from the cache over the released path, {name}{what}', theirs, ours, f'>= {goal}', threads=1, cpu=True, images=BS)

def phantoms(folder, n=32):
    "Table of phantoms of 1024 px, drawn once"
    index = folder/'phantoms/index.csv'
    if not index.exists(): write_phantoms(folder/'phantoms', n, size=1024, progress=False)
    return index_csv(index)

def squares(folder, n):
    "Path of n random squares on the disk, written through"
    path,rng = folder/f'squares{n}.npy', np.random.default_rng(0)
    if not path.exists():
        a = np.lib.format.open_memmap(path, 'w+', np.uint8, (n,SIZE,SIZE))
        for part in a.reshape(-1,64,SIZE,SIZE): part[:] = rng.integers(0, 256, part.shape, dtype=np.uint8)
        a.flush(); del a, part
        with open(path, 'rb+') as f: os.fsync(f.fileno())
    return path

def drop(path):
    "Take a file out of the system's memory; no process may have it mapped"
    gc.collect()
    with open(path, 'rb') as f: os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

def read_through(path, buffer=bytearray(2**22)):
    with open(path, 'rb', buffering=0) as f:
        while f.readinto(buffer): pass

def epoch(path, workers, pause=0):
    "Seconds of an epoch, the first batch and the birth of the workers aside"
    batches = iter(pretrain_dls(Squares(path), 256, device='cpu', workers=workers).train); next(batches)
    start = time.perf_counter()
    for _ in batches: time.sleep(pause)
    return time.perf_counter()-start

def whole(f, *args): start = time.perf_counter(); f(*args); return time.perf_counter()-start

def by_turns(bench, name, a, b, goal, **more):
    "As `Bench.ratio`, of functions that take their own time"
    void,pairs = busy()>.1, [(round(a(), 4), round(b(), 4)) for _ in range(bench.pairs)]
    bench.add(name, statistics.median(x/y for x,y in pairs), goal, void, pairs=pairs, **more)

def disk(bench, folder, n=8192):
    "An epoch of random batches against a sequential read, both cold"
    if not hasattr(os, 'posix_fadvise'): print('# skipped: this system cannot drop a file from its memory'); return
    path = squares(folder, n)
    def cold(f, *args): drop(path); return f(*args)
    by_turns(bench, 'batches from a cold cache over a sequential read of the file', lambda: cold(whole, read_through, path),
             lambda: cold(whole, epoch, path, 0), '>= 0.5', images=n)
    by_turns(bench, 'a cold cache beside a pretended accelerator, 20 ms a batch: no workers over two', lambda: cold(epoch, path, 2, .02),
             lambda: cold(epoch, path, 0, .02), '>= 1', images=n)

def workers(bench, folder, n=8192):
    "Who should gather the batches, of a file in memory"
    path = squares(folder, n); read_through(path)
    for name,pause in (('batches alone',0),('batches beside a pretended accelerator, 20 ms a batch',.02)):
        by_turns(bench, f'{name}: no workers over two', lambda: epoch(path, 2, pause), lambda: epoch(path, 0, pause), '>= 1', images=n)

def build(bench, folder, copies=8):
    "One process against two"
    table,numbers = phantoms(folder), itertools.count()
    items = pd.concat([table]*copies, ignore_index=True)
    run = lambda w: build_cache(items, folder/f'built{next(numbers)}', SIZE, workers=w, progress=False)
    bench.ratio('building the cache: two processes over one', lambda: run(1), lambda: run(2), '>= 1.8', images=len(items))

def high_water():
    "The most memory this process ever held, MB"
    return next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmHWM'))/1024

def child(folder, n):
    "Builds a cache of n small files in a process of its own; prints what it held before, and at most"
    films = [f'{folder}/film{i}.png' for i in range(100)]
    rng = np.random.default_rng(0)
    for f in films: Image.fromarray(rng.integers(0, 256, (24,24), dtype=np.uint8)).save(f)
    paths = [f'{folder}/{i:06}.png' for i in range(n)]
    for i,p in enumerate(paths): os.link(films[i%100], p)                    # small files, each with a name of its own
    items = pd.DataFrame(dict(path=paths, patient=[f'{i:06}' for i in range(n)]))
    before = high_water()
    build_cache(items, f'{folder}/cache', 16, workers=2, progress=False)
    print(json.dumps([round(before, 1), round(high_water(), 1)]))

def memory(bench, folder):
    "Peak of the parent at ten times as many images"
    if not Path('/proc/self/status').exists(): print('# skipped: this system does not tell the peak of a process'); return
    found = {}
    for n in (10_000,100_000):
        with tempfile.TemporaryDirectory(dir=folder) as inner:
            done = subprocess.run([sys.executable, '-W', 'ignore', __file__, '--child', inner, str(n)], capture_output=True, text=True, check=True)
        found[n] = json.loads(done.stdout.splitlines()[-1])
        print(f'# {n:,} images: {found[n][0]:.0f} MB with the table alone, {found[n][1]:.0f} MB at most')
    small,large = (found[n][1] for n in found)
    bench.add("the parent's memory while building: 100,000 files over 10,000", large/small, '<= 1.1', unit='MB', pairs=[[large,small]])

parts = dict(views=views, disk=disk, workers=workers, build=build, memory=memory)

if __name__=='__main__':
    if sys.argv[1:2]==['--child']: child(sys.argv[2], int(sys.argv[3])); sys.exit()
    p = arguments(__doc__)
    p.add_argument('--only', nargs='+', choices=parts, default=list(parts), help='figures to measure (default: all)')
    args = p.parse_args()
    bench = Bench(args.pairs, args.threads, args.cpu)
    with tempfile.TemporaryDirectory() as folder:
        for name in args.only: parts[name](bench, Path(folder))
    if args.save: bench.save(args.save, 'python tests/bench/bench_input.py')
