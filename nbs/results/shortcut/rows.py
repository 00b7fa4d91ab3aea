"""What a table of radiographs says without a pixel, for notebook 34: hashed ids, view, size, data set, label.

    export C2L_RADIOGRAPHS=/path/to/radiographs
    python nbs/results/shortcut/rows.py

Writes rows.csv beside this file: the chest radiographs of the splits train and valid (test is left alone). The hashes are those of
nbs/results/first_run, so that scores of models can be joined.
"""
import argparse, hashlib, os, sys
from pathlib import Path
from c2l_nb.data.collections import index_csv

short = lambda text: hashlib.sha256(text.encode()).hexdigest()[:10]

def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if 'C2L_RADIOGRAPHS' not in os.environ: sys.exit('set C2L_RADIOGRAPHS to the folder of the radiographs')
    root = Path(os.environ['C2L_RADIOGRAPHS'])
    table = index_csv(root/'index.csv')
    file = table.path.map(lambda p: Path(p).relative_to(root.resolve()).as_posix())
    table = table.assign(image=file.map(short), source=file.str.split('/').str[0])
    table = table[table.source.isin(['kermany', 'nih']) & table.split.isin(['train', 'valid'])]
    table['patient'] = (table.source + table.patient).map(short)
    table['pneumonia'] = table.labels.str.contains('pneumonia', case=False).astype(int)
    keep = ['source', 'split', 'image', 'patient', 'view', 'width', 'height', 'pneumonia']
    table[keep].to_csv(Path(__file__).with_name('rows.csv'), index=False)

if __name__ == '__main__': main()
