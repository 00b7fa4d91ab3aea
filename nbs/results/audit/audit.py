"""Audit the real radiographs: the files that notebook 15 computes from.

    export C2L_RADIOGRAPHS=/path/to/radiographs
    python nbs/results/audit/audit.py

Writes beside this file run.json (summaries, command, versions), edits.csv (likeness and hash bits of edited copies against their
originals), nearest.csv (the films most alike that are no copies), kermany_patients.csv (the published split of each film's patient),
kermany_reported.csv (those that the audit reports). Patients and films are hashed; no path is written.
"""
import argparse, hashlib, io, json, os, platform, sys
from pathlib import Path
import numpy as np, pandas as pd
from PIL import Image
from fastprogress.fastprogress import progress_bar
from c2l_nb import __version__
from c2l_nb.data.leakage import audit_leaks, differences, hash_bits, small_square
from c2l_nb.data.read import read_radiograph
from c2l_nb.data.table import fingerprint, index_csv

here = Path(__file__).parent
short = lambda text: hashlib.sha256(text.encode()).hexdigest()[:10]
OFFICIAL = 'official-train', 'official-val', 'official-test'

def jpeg(y, quality):
    data = io.BytesIO(); Image.fromarray(y).save(data, 'JPEG', quality=quality)
    return np.asarray(Image.open(data))
def resized(y, by, how): return np.asarray(Image.fromarray(y).resize((round(y.shape[1]*by), round(y.shape[0]*by)), how))
EDITS = {'jpeg 50': lambda y: jpeg(y, 50), 'jpeg 20': lambda y: jpeg(y, 20), 'half': lambda y: resized(y, .5, Image.BILINEAR),
         'third, jpeg 75': lambda y: jpeg(resized(y, .37, Image.LANCZOS), 75), '1.4 times': lambda y: resized(y, 1.43, Image.BICUBIC),
         'brighter': lambda y: np.clip(y*1.1+5, 0, 255).astype(np.uint8), 'gamma 0.8': lambda y: np.rint(255*(y/255)**.8).astype(np.uint8),
         'cropped': lambda y: y[3:-3, 3:-3]}

def edited(df, small, n=150):
    "Likeness and bits that differ, of edited copies of `n` films a source"
    out = []
    for source,part in df.groupby('source'):
        part = part.sample(n, random_state=0)
        films = progress_bar(list(part.itertuples()), leave=False)
        rows = [(r.file, e, small_square(f(read_radiograph(r.path)))) for r in films for e,f in EDITS.items()]
        copies,first = np.stack([r[2] for r in rows]), np.repeat(part.index, len(EDITS))
        codes = hash_bits(np.concatenate([small, copies]), chunk=30_000)            # axes of the collection and its copies
        like  = (differences(copies)*differences(small[first])).sum(1)
        bits  = np.bitwise_count(codes[first] ^ codes[len(small):])
        out  += [dict(source=source, film=short(f), edit=e, likeness=round(float(l), 4), bits=int(b))
                 for (f,e,_),l,b in zip(rows, like, bits)]
    return pd.DataFrame(out)

def nearest(df, small, n=30):
    "The films of a source that are most alike, of the same patient and of others; and how alike people are"
    out,same_number = [], {}
    for source,part in df.groupby('source'):
        v,who = differences(small[part.index]), pd.factorize(part.patient)[0]
        i,j   = np.triu_indices(len(part), 1)
        c,same = (v@v.T)[i,j], who[i] == who[j]
        for s in (False, True):
            out += [dict(source=source, same_patient=s, likeness=round(float(x), 4)) for x in np.sort(c[same == s])[-n:]]
        if source != 'kermany': continue
        side,child = pd.factorize(part.official_split)[0], part.file.str.contains('person').to_numpy(bool)
        ok = child[i] & child[j]
        for name,m in {'same number': same, 'another number': ~same}.items():
            for where,d in {'within a split': side[i] == side[j], 'across splits': side[i] != side[j]}.items():
                x = c[m & d & ok]
                same_number[f'{name}, {where}'] = dict(pairs=len(x), mean=float(x.mean()), p95=float(np.percentile(x, 95)))
    return pd.DataFrame(out), same_number

def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if 'C2L_RADIOGRAPHS' not in os.environ: sys.exit('set C2L_RADIOGRAPHS to the folder of the radiographs')
    root = Path(os.environ['C2L_RADIOGRAPHS']).resolve()
    df = index_csv(root/'index.csv')
    df['file'] = [Path(p).resolve().relative_to(root).as_posix() for p in df.path]
    df['source'] = df.file.str.split('/').str[0]
    kermany = df[df.source == 'kermany']
    reports = {'all, split by patient': audit_leaks(df),
               'kermany, published split': audit_leaks(kermany, 'official_split', OFFICIAL)}
    small = np.stack([small_square(read_radiograph(p)) for p in progress_bar(df.path, leave=False)])
    near,same_number = nearest(df, small)
    edited(df, small).to_csv(here/'edits.csv', index=False); near.to_csv(here/'nearest.csv', index=False)
    sides = kermany[['patient', 'official_split']].assign(patient=kermany.patient.map(short)).drop_duplicates()
    sides.to_csv(here/'kermany_patients.csv', index=False)
    reports['kermany, published split'].patients[['patient']].map(short).to_csv(here/'kermany_reported.csv', index=False)
    about = dict(command='python nbs/results/audit/audit.py',
                 audits={k: dict(summary=str(r), pairs=r.pairs.kind.value_counts().to_dict()) for k,r in reports.items()},
                 same_number=same_number, images=df.source.value_counts().to_dict(), fingerprint=fingerprint(df),
                 sources=dict(kermany='Kermany et al. 2018, CC BY 4.0', nih='ChestX-ray14, Wang et al. 2017',
                              knee='Osteoarthritis Initiative, CC BY 4.0'),
                 versions=dict(c2l_nb=__version__, python=platform.python_version(), numpy=np.__version__, pandas=pd.__version__))
    (here/'run.json').write_text(json.dumps(about, indent=1, ensure_ascii=False))
    for k,r in reports.items(): print(f'--- {k}\n{r}')

if __name__ == '__main__': main()
