"""How fast random batches come from a plain .npy memory map, from HDF5 and from Zarr: the figures behind notebook 16's choice of storage.

    pip install h5py zarr
    python nbs/results/cache/storage.py

Writes storage.json beside this file. The same 4,000 squares of 256 px lie in each storage, uncompressed, one chunk a square (HDF5 also
contiguous, Zarr also in shards of 250); a figure is the median time of batches of 256 random squares, read in sorted order from
files that the system already holds in memory, the three by turns. A storage's `times` is its median over that of the memory map.
"""
import argparse, json, statistics, tempfile
from pathlib import Path
from time import perf_counter, process_time
import numpy as np

N, SIZE, BATCH, ROUNDS = 4000, 256, 256, 15

def storages(folder, images):
    "name -> function from sorted positions to squares, each tried on the first batch"
    shape, one = images.shape, (1, SIZE, SIZE)
    np.save(folder/'images.npy', images)
    import h5py, zarr
    h5 = h5py.File(folder/'images.h5', 'w')
    h5.create_dataset('contiguous', data=images); h5.create_dataset('chunks', data=images, chunks=one)
    def z(name, **kw):
        a = zarr.create_array(folder/name, shape=shape, dtype='u1', chunks=one, compressors=None, **kw)
        a[:] = images
        return zarr.open_array(folder/name, mode='r')
    plain, shards = z('plain.zarr'), z('shards.zarr', shards=(250, SIZE, SIZE))
    mm = np.load(folder/'images.npy', mmap_mode='r')
    def one_by_one(ds):
        def read(at):
            out = np.empty((len(at), SIZE, SIZE), np.uint8)
            for k, i in enumerate(at): ds.read_direct(out, np.s_[i], np.s_[k])
            return out
        return read
    return {'npy memory map': lambda at: mm[at],
            'h5py contiguous, one call': lambda at: h5['contiguous'][at], 'h5py contiguous, square by square': one_by_one(h5['contiguous']),
            'h5py chunks, square by square': one_by_one(h5['chunks']),
            'zarr chunks': lambda at: plain.oindex[at], 'zarr shards': lambda at: shards.oindex[at]}

def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    import h5py, zarr
    rng, clock = np.random.default_rng(0), dict(wall=perf_counter, processor=process_time)
    images = rng.integers(0, 256, (N, SIZE, SIZE), dtype=np.uint8)
    spent = {}
    with tempfile.TemporaryDirectory() as folder:
        ways = storages(Path(folder), images)
        for r in range(-1, ROUNDS):
            at = np.sort(rng.permutation(N)[:BATCH])
            for name, read in ways.items():
                start = {c: f() for c, f in clock.items()}
                batch = read(at)
                took = {c: f() - start[c] for c, f in clock.items()}
                assert np.array_equal(batch, images[at]), name
                if r >= 0: spent.setdefault(name, []).append(took)
    median = {n: {c: statistics.median(t[c] for t in ts) for c in clock} for n, ts in spent.items()}
    base = median['npy memory map']
    about = dict(command='python nbs/results/cache/storage.py', images=N, size=SIZE, batch=BATCH, rounds=ROUNDS,
                 versions={m.__name__: m.__version__ for m in (np, h5py, zarr)})
    rows = {n: dict(ms=round(1000*m['wall'], 2), times={c: round(m[c]/base[c], 2) for c in clock}) for n, m in median.items()}
    Path(__file__).with_name('storage.json').write_text(json.dumps(about | dict(storages=rows), indent=1) + '\n')
    for n, r in rows.items(): print(n, r)

if __name__ == '__main__': main()
