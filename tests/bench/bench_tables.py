"""A pool of 700,000 index rows: read from CSV, merged, split by patient, labelled; and the search for its files.

Seconds and gigabytes are of this process (its imports included in the gigabytes), not ratios: the goals are absolute. The last
figure is a ratio: one question to the disk for each file ÷ one listing of each folder, 20,000 files in 20 folders.
"""
import os, resource, sys, tempfile, time
from pathlib import Path
import numpy as np, pandas as pd
from benchmarks import Bench, arguments, busy
from c2l_nb.data.phantom import phantom_batch
from c2l_nb.data.table import index_csv, label_matrix, missing_files, shared_patients, split_patients, unlabelled

N = 700_000

def write_index(path, source, n):
    "An index CSV like those of the published collections: five images a patient, 14 label strings, a view"
    i = np.arange(n)
    pd.DataFrame(dict(file=[f'files/p{k//1000:03}/p{k//5:08}/s{k//2:08}/{k:08x}-view.jpg' for k in i], patient=i//5, split='train',
                      labels=np.array(['Effusion|Mass', 'No Finding', 'Edema', ''])[i%4], source=source,
                      view=np.array(['AP', 'PA'])[i%2])).to_csv(path, index=False)

def pool(folder):
    "Read, merge, split, label"
    frames = [index_csv(Path(folder)/s/'index.csv', check=False) for s in 'ab']
    df = split_patients(unlabelled(*frames))
    y  = np.concatenate([label_matrix(f, ['Effusion', 'Mass', 'Edema']) for f in frames])
    assert len(df)==len(y)==N and not shared_patients(df)

def run(bench):
    "The figures of the tables"
    with tempfile.TemporaryDirectory() as tmp:
        for s in 'ab': os.mkdir(f'{tmp}/{s}'); write_index(f'{tmp}/{s}/index.csv', s, N//2)
        void, start = busy()>.1, time.process_time()
        pool(tmp)
        took = time.process_time()-start
        bench.add('pool of 700,000 rows, read, merged, split, labelled: processor seconds', took, '<= 20', void)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss*(1 if sys.platform=='darwin' else 1024)/2**30
        bench.add('the same: most memory of the process, GB', peak, '<= 2')
        phantom_batch(2, 0, 128)
        start = time.process_time()
        phantom_batch(60, 1, 128)
        bench.add('2,000 phantoms of 128 px, from 60 of them: processor seconds', (time.process_time()-start)*2000/60, '<= 40', void)
        paths = [f'{tmp}/{d}/{i}.png' for d in range(20) for i in range(1000)]
        for d in range(20): os.mkdir(f'{tmp}/{d}')
        for p in paths: open(p, 'w').close()
        df = pd.DataFrame(dict(path=paths))
        bench.ratio('looking for 20,000 files, one by one ÷ by folder', lambda: [os.path.isfile(p) for p in paths],
                    lambda: missing_files(df), '>= 1', threads=1, cpu=True)

if __name__=='__main__':
    args = arguments(__doc__).parse_args()
    bench = Bench(args.pairs)
    run(bench)
    if args.save: bench.save(args.save, 'python tests/bench/bench_tables.py')
