"Tables of radiographs: folders, index CSVs, splits by patient, fingerprints; what is wrong is said with names and counts"
import os, time
from pathlib import Path

import numpy as np, pandas as pd, pytest
from PIL import Image
from c2l_nb.datasets import (DataError, fingerprint, folder, index_csv, label_matrix, shared_patients, split_patients, unlabelled)

def put(path, n=10):
    path.parent.mkdir(parents=True, exist_ok=True); path.write_bytes(b'x'*n); return path

def names(df, root): return [Path(p).relative_to(root).as_posix() for p in df.path]

def write_csv(path, **columns): pd.DataFrame(columns).to_csv(path, index=False); return path

@pytest.fixture
def five(tmp_path):
    "Five files and an index of them"
    files = [f'images/{i}.png' for i in range(5)]
    for i,f in enumerate(files): put(tmp_path/f, 10+i)
    write_csv(tmp_path/'index.csv', file=files, patient=['007','007','8','9',''], split=['train']*3+['valid','test'],
              labels=['Mass|Nodule','','Mass','No Finding','NA'], view=['AP','PA','','AP','PA'], width=range(5))
    return tmp_path

def test_folder_finds_images(tmp_path):
    "By suffix in any case; without a suffix, or with a number for one, if the content is DICOM's; no hidden file"
    dicom = bytes(128)+b'DICM'
    yes = 'b.png a.JPG c.jpeg d.tif e.dcm sub/deep/f.png p10/no_suffix p10/1.2.840.77'.split()
    for f in yes: put(tmp_path/f).write_bytes(dicom)
    for f in 'notes.txt index.csv ._b.png .git/x.png README 1.2.3'.split(): put(tmp_path/f)
    df = folder(tmp_path)
    assert names(df, tmp_path)==sorted(yes) and all(os.path.isabs(p) for p in df.path)
    assert list(df.columns)==['path','patient','split','labels','source'] and df.patient.isna().all()
    assert set(df.split)=={'train'} and set(df.labels)=={''} and set(df.source)=={tmp_path.name}

def test_folder_follows_links_once(tmp_path):
    put(tmp_path/'real/a.png'); put(tmp_path/'data/b.png')
    (tmp_path/'data/link').symlink_to(tmp_path/'real'); (tmp_path/'data/loop').symlink_to(tmp_path/'data')
    assert names(folder(tmp_path/'data'), tmp_path/'data')==['b.png','link/a.png']

def test_folder_relative_path(tmp_path, monkeypatch):
    put(tmp_path/'data/a.png'); monkeypatch.chdir(tmp_path)
    assert folder('data').path.tolist()==[str(tmp_path/'data/a.png')]

def test_folder_patient_re(tmp_path):
    for f in ('x/00013_001.png','x/00013_002.png','y/00014_001.png'): put(tmp_path/f)
    assert folder(tmp_path, r'(\d+)_\d+').patient.tolist()==['00013','00013','00014']
    assert folder(tmp_path, r'^(\w)/').patient.tolist()==['x','x','y']
    with pytest.raises(DataError, match='one group'): folder(tmp_path, r'\d+')
    with pytest.raises(DataError, match='1 names: y/00014_001.png'): folder(tmp_path, r'(13)_')

def test_folder_errors(tmp_path):
    with pytest.raises(DataError, match='no folder'): folder(tmp_path/'absent')
    with pytest.raises(DataError, match='no folder'): folder(put(tmp_path/'a.txt'))
    with pytest.raises(DataError, match='no image'): folder(tmp_path)

def test_index_csv(five):
    df = index_csv(five/'index.csv')
    assert list(df.columns)==['path','patient','split','labels','source','view','width']
    assert names(df, five)==[f'images/{i}.png' for i in range(5)]
    assert df.patient.tolist()[:4]==['007','007','8','9'] and df.patient.isna().tolist()==[False]*4+[True]
    assert df.labels.tolist()==['Mass|Nodule','','Mass','No Finding','NA'] and df.width.sum()==10
    assert set(df.source)=={five.name} and df.split.tolist()==['train']*3+['valid','test']

def test_index_csv_minimal_absolute_bom(five):
    "`path` does as well as `file`; absolute paths, a byte order mark, and names with `..` are fine in one's own CSV"
    (five/'sub').mkdir()
    (five/'sub/i.csv').write_text(f'path\n{five}/images/0.png\n../images/1.png\n', encoding='utf-8-sig')
    df = index_csv(str(five/'sub/i.csv'))
    assert names(df, five)==['images/0.png','images/1.png'] and set(df.split)=={'train'} and df.patient.isna().all()
    df.to_csv(five/'again.csv', index=False)
    assert index_csv(five/'again.csv').path.tolist()==df.path.tolist()

def test_index_csv_errors(five):
    p = five/'i.csv'
    def fails(*words):
        with pytest.raises(DataError) as e: index_csv(p)
        assert str(e.value).startswith(str(p)), e.value
        for w in words: assert w in str(e.value), e.value
    fails('No such file')
    p.write_text(''); fails('cannot be read')
    p.write_text('file,patient\n'); fails('no rows')
    p.write_text('file;patient\nimages/0.png;1\n'); fails('`file` or `path`', 'file;patient')
    p.write_bytes(b'file,patient\nimages/0.png,M\xfcller\n'); fails('cannot be read')
    p.write_text('file,patient\nimages/0.png,1\n,2\n'); fails('1 rows name no file: 2')
    write_csv(p, file=['images/0.png','./images/0.png','images/1.png','images/1.png','images/2.png']); fails('2 rows', 'images/0.png', 'images/1.png')
    write_csv(p, file=['images/0.png','images/1.png'], split=['training','']); fails('train, valid or test', 'training', '(empty)')
    write_csv(p, file=[f'elsewhere/{i}.png' for i in range(9)]); fails('9 of 9', 'elsewhere/0.png', 'elsewhere/2.png', '6 more')

def test_index_csv_some_missing(five):
    "A few missing files are dropped with a warning that counts and names them, half is still a few"
    (five/'images/3.png').unlink()
    with pytest.warns(UserWarning, match='1 of 5 files are missing.*3.png'): df = index_csv(five/'index.csv')
    assert len(df)==4 and df.index.tolist()==[0,1,2,3]
    for i in (0,1): (five/f'images/{i}.png').unlink()
    with pytest.raises(DataError, match='3 of 5'): index_csv(five/'index.csv')

def test_split_patients():
    df = pd.DataFrame(dict(path=[f'{i}.png' for i in range(1000)], patient=[f'p{i%150}' for i in range(1000)]))
    s = split_patients(df)
    assert shared_patients(s)==[] and s.groupby('split').patient.nunique().to_dict()==dict(train=90, valid=30, test=30)
    assert 'split' not in df and s.index.equals(df.index)
    assert split_patients(df[::-1]).split.sort_index().equals(s.split)
    assert (split_patients(df, seed=1).split!=s.split).any() and (split_patients(df).split==s.split).all()
    assert set(split_patients(df, valid=0, test=.5).split)=={'train','test'}
    assert shared_patients(s.assign(split=['train']*500+['test']*500))

def test_split_patients_unknown():
    "Without a patient an image is dealt out alone, and that is said; a patient may not be called like a file"
    df = pd.DataFrame(dict(path=['a','b','c','d','e','f'], patient=['a',None,None,'a',np.nan,'x']))
    with pytest.warns(UserWarning, match='3 of 6 images have no patient'): s = split_patients(df)
    assert shared_patients(s)==[] and s.patient.isna().sum()==3 and s.split.notna().all()
    assert set(s.split)=={'train','valid','test'}

def test_split_patients_too_few():
    df = pd.DataFrame(dict(path=list('abcdef'), patient=list('xxyyyy')))
    with pytest.raises(DataError, match='2 patients'): split_patients(df)
    with pytest.raises(DataError): split_patients(df.assign(patient=list('abcdef')), valid=.5, test=.5)

def test_unlabelled():
    a = pd.DataFrame(dict(path=['/a/1','/a/2'], patient=['13',None], split='train', labels='Mass', source='a'))
    b = pd.DataFrame(dict(path=['/b/1','/a/2'], patient=['13','7'], split='test', labels='', source='b'))
    u = unlabelled(a, b)
    assert list(u.columns)==['path','patient','source'] and u.path.tolist()==['/a/1','/a/2','/b/1']
    assert u.patient.tolist()==['a/13',None,'b/13'] and u.index.tolist()==[0,1,2]
    all_unknown = unlabelled(a.assign(patient=None), b)
    assert all_unknown.patient.isna().tolist()==[True,True,False]
    with pytest.raises(DataError): unlabelled()

def test_fingerprint(five):
    "Follows names and sizes, not order, place, row count of other columns or the folder's name; holds no path"
    df = index_csv(five/'index.csv')
    f = fingerprint(df)
    assert len(f)==64 and int(f,16)>=0
    assert fingerprint(df[::-1])==f==fingerprint(df[['path']])==fingerprint(folder(five)) and fingerprint(df[1:])!=f
    moved = five.with_name('another_name'); five.rename(moved)
    assert fingerprint(folder(moved))==f
    (moved/'images/0.png').write_bytes(b'longer than before'); assert fingerprint(folder(moved))!=f
    (moved/'images/0.png').write_bytes(b'x'*10); assert fingerprint(folder(moved))==f
    (moved/'images/0.png').rename(moved/'images/7.png'); assert fingerprint(folder(moved))!=f
    with pytest.raises(OSError, match='0.png'): fingerprint(df)

def test_fingerprint_of_several_sources(tmp_path):
    "Each source counts from its own folder, so sources may lie anywhere"
    def pool(x, y):
        for p in (x/'1.png', x/'2.png', y/'sub/3.png', y/'4.png'): put(tmp_path/p)
        return unlabelled(folder(tmp_path/x), folder(tmp_path/y))
    assert fingerprint(pool(Path('p/one'),Path('q/two')))==fingerprint(pool(Path('r/s/t/one'),Path('two')))

def test_label_matrix():
    df = pd.DataFrame(dict(labels=['Mass','No Finding','Effusion|Mass','',None,'Effusion | Nodule']))
    y = label_matrix(df, ['Effusion','Mass','Nodule'])
    assert y.dtype==np.float32 and y.tolist()==[[0,1,0],[0,0,0],[1,1,0],[0,0,0],[0,0,0],[1,0,1]]
    with pytest.warns(UserWarning, match='no image is labelled Nodul;.*Nodule'): assert label_matrix(df, ['Nodul']).sum()==0
    assert label_matrix(df[:0], []).shape==(0,0)

def test_700_000_rows():
    "Merged, split and labelled in seconds, with memory to spare"
    n = 700_000
    df = pd.DataFrame(dict(path=[f'/pool/{i//1000}/{i}.png' for i in range(n)], source='pool', labels='Effusion|Mass'))
    df['patient'] = (df.index//5).astype(str)
    start = time.process_time()
    s = split_patients(unlabelled(df[:n//2+1000], df[n//2:]))
    y = label_matrix(df, ['Effusion','Mass'])
    assert time.process_time()-start < 20 and len(s)==n and y.sum()==2*n and shared_patients(s)==[]

def test_index_csv_is_quick(tmp_path):
    "20,000 rows, every file looked for: 35 times this must stay under 20 s"
    files = [f'{i}.png' for i in range(20_000)]
    for f in files[:12_000]: open(tmp_path/f, 'w').close()
    write_csv(tmp_path/'i.csv', file=files, patient=files)
    start = time.process_time()
    with pytest.warns(UserWarning, match='8,000 of 20,000'): df = index_csv(tmp_path/'i.csv')
    fingerprint(df)
    assert time.process_time()-start < 20/35 and len(df)==12_000

def test_real_index():
    "The folder of real radiographs: all rows found, patients in one split each"
    root = os.environ.get('C2L_RADIOGRAPHS')
    if not root: pytest.skip('set C2L_RADIOGRAPHS to the folder of real radiographs')
    df = index_csv(Path(root)/'index.csv')
    assert len(df)>8000 and df.patient.notna().all() and shared_patients(df)==[] and set(df.split)=={'train','valid','test'}
    assert label_matrix(df, ['PNEUMONIA','Pneumonia','KL3']).sum(0).min()>100
    assert shared_patients(split_patients(unlabelled(df)))==[] and len(fingerprint(df))==64
