"""A pool of radiographs that is small enough to be carried to another machine: JPEG squares in one file, and a table without names.

    export C2L_RADIOGRAPHS=/path/to/radiographs
    python nbs/results/gpu/pack.py FOLDER                # writes FOLDER/pool.bin and FOLDER/pool.csv

Images and patients are named by hashes. The quality of the JPEGs is the best of a list that keeps the file below --most.
Neither file belongs into the repository.
"""
import argparse, hashlib, io, os
from pathlib import Path
import numpy as np
import pandas as pd
from PIL import Image
from c2l_nb.data.cache import to_square

QUALITIES = 90, 80, 70, 60, 50, 45, 40, 35, 30


def short(text):
    return hashlib.sha256(str(text).encode()).hexdigest()[:10]


def square(path, side):
    return Image.fromarray(to_square(np.asarray(Image.open(path).convert('L')), side))


def jpeg(image, quality):
    image.save(data := io.BytesIO(), 'JPEG', quality=quality, optimize=True)
    return data.getvalue()


def choose_quality(images, count, most):
    "The best quality that keeps `count` such images below `most` bytes, with 2 % to spare; ValueError if none does"
    for quality in QUALITIES:
        if np.mean([len(jpeg(im, quality)) for im in images])*count*1.02 < most:
            return quality
    raise ValueError(f"{count} images do not fit into {most/1e6:.0f} MB: take a smaller --side")


def pack(
    index,            # table with file, patient, labels, split; files are relative to its folder
    out,              # folder, made when missing
    side=128,         # of the squares, px
    most=30_000_000,  # bytes of all JPEGs
):                    # quality, number of images
    "Write pool.bin and pool.csv"
    index, out = Path(index), Path(out)
    rows = pd.read_csv(index, dtype=str, keep_default_na=False)
    sample = rows.file.sample(min(500, len(rows)), random_state=0)
    quality = choose_quality([square(index.parent/f, side) for f in sample], len(rows), most)
    out.mkdir(parents=True, exist_ok=True)
    sizes = []
    with open(out/'pool.bin', 'wb') as f:
        for name in rows.file:
            sizes.append(f.write(jpeg(square(index.parent/name, side), quality)))
    source = rows.file.str.split('/').str[0]
    patient = [short(f'{s}/{p}') if p else '' for s, p in zip(source, rows.patient)]
    table = pd.DataFrame(dict(image=rows.file.map(short), patient=patient, labels=rows.labels, split=rows.split, source=source, bytes=sizes))
    table.to_csv(out/'pool.csv', index=False)
    return quality, len(rows)


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    p.add_argument('out', help='folder for pool.bin and pool.csv')
    p.add_argument('--index', default=os.path.join(os.environ.get('C2L_RADIOGRAPHS', ''), 'index_large.csv'))
    p.add_argument('--side', type=int, default=128)
    p.add_argument('--most', type=int, default=30_000_000, help='bytes')
    args = p.parse_args()
    quality, count = pack(args.index, args.out, args.side, args.most)
    print(f"{count:,} squares of {args.side} px, JPEG quality {quality}, {(Path(args.out)/'pool.bin').stat().st_size/1e6:.1f} MB")
