"Tables of radiographs: folders, index CSVs, published releases, splits by patient; what is wrong is said with names and counts"
import gzip, hashlib, json, os, warnings
from pathlib import Path

import numpy as np, pandas as pd, pytest, torch
from PIL import Image
from c2l_nb.data import collections as datasets
from c2l_nb.data import table as labels
from c2l_nb.data.collections import (CHESTXRAY14, CHEXPERT14, CHEXPERT5, PUBLISHED, DataError, RadiographBlock, ablation_split, checksum,
    chestxray14, chestxray14_boxes, chexpert, chexpert_labels, fingerprint, folder, index_csv, label_matrix, medmnist, mimic_cxr,
    missing_files, mura, paper_pool, rsna_pneumonia, shared_patients, split_patients, unlabelled)
from c2l_nb.data.phantom import phantom
from c2l_nb.data.read import RadiographError, read_radiograph

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
    p.write_text('photo;patient\nimages/0.png;1\n'); fails('`file` or `path`', 'photo, patient')
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
    "Merged, split and labelled; tests/bench/bench_tables.py measures how fast"
    n = 700_000
    df = pd.DataFrame(dict(path=[f'/pool/{i//1000}/{i}.png' for i in range(n)], source='pool', labels='Effusion|Mass'))
    df['patient'] = (df.index//5).astype(str)
    s = split_patients(unlabelled(df[:n//2+1000], df[n//2:]))
    y = label_matrix(df, ['Effusion','Mass'])
    assert len(s)==n and y.sum()==2*n and shared_patients(s)==[]

def test_index_csv_of_many_rows(tmp_path):
    "20,000 rows, every file looked for"
    files = [f'{i}.png' for i in range(20_000)]
    for f in files[:12_000]: open(tmp_path/f, 'w').close()
    write_csv(tmp_path/'i.csv', file=files, patient=files)
    with pytest.warns(UserWarning, match='8,000 of 20,000'): df = index_csv(tmp_path/'i.csv')
    fingerprint(df)
    assert len(df)==12_000

def test_real_index():
    "The folder of real radiographs: all rows found, patients in one split each"
    root = os.environ.get('C2L_RADIOGRAPHS')
    if not root: pytest.skip('set C2L_RADIOGRAPHS to the folder of real radiographs')
    df = index_csv(Path(root)/'index.csv')
    assert len(df)>8000 and df.patient.notna().all() and shared_patients(df)==[] and set(df.split)=={'train','valid','test'}
    assert label_matrix(df, ['PNEUMONIA','Pneumonia','KL3']).sum(0).min()>100
    assert shared_patients(split_patients(unlabelled(df)))==[] and len(fingerprint(df))==64

# Tables: what came with the published collections

def test_datasets_exports_the_tables():
    "One import serves notebooks 13 and 14"
    for n in 'DataError fingerprint folder index_csv label_matrix shared_patients split_patients unlabelled'.split():
        assert getattr(datasets, n) is getattr(labels, n) and n in datasets.__all__

def test_missing_files(tmp_path):
    "Whether a folder is listed or asked file by file, the answer is that of isfile; links are followed, folders are no files"
    for i in range(6): put(tmp_path/f'many/{i}.png')
    put(tmp_path/'few/a.png'); (tmp_path/'many/link.png').symlink_to(tmp_path/'few/a.png'); (tmp_path/'many/dangling.png').symlink_to('nowhere')
    (tmp_path/'many/folder.png').mkdir(); (tmp_path/'linked').symlink_to(tmp_path/'many')
    paths = [str(tmp_path/p) for p in [*(f'many/{i}.png' for i in range(8)), 'many/link.png', 'many/dangling.png', 'many/folder.png',
             'few/a.png', 'few/b.png', *(f'linked/{i}.png' for i in range(8)), 'none/1.png', *(f'none2/{i}.png' for i in range(5))]]
    assert missing_files(pd.DataFrame(dict(path=paths)))==[p for p in paths if not os.path.isfile(p)]
    assert missing_files(pd.DataFrame(dict(path=[]))) == []

def test_index_csv_unchecked(tmp_path):
    write_csv(tmp_path/'i.csv', file=['a.png','b.png'])
    assert len(index_csv(tmp_path/'i.csv', check=False))==2
    with pytest.raises(DataError, match='2 of 2'): index_csv(tmp_path/'i.csv')

def test_checksum():
    a = pd.DataFrame(dict(source='a', name=['2','1'], path='x'))
    assert checksum(a)==hashlib.sha256(b'a/1\na/2\n').hexdigest()==checksum(a[::-1].assign(path='y'))
    assert len({checksum(a), checksum(a[:1]), checksum(a.assign(source='b'))})==3
    with pytest.raises(DataError, match='fingerprint'): checksum(a[['path']])
    assert unlabelled(a.assign(patient='1', path=['p','q'])).columns.tolist()==['path','patient','source','name']

# The published releases, synthesised: text is a file's content, None is an image's place

def lay(root, files):
    for name,text in files.items(): put(root/name).write_text('x' if text is None else text)
    return root

def nih_release(root, patients=10, per=3, at=lambda i: 'images', entry='Data_Entry_2017_v2020.csv'):
    names = [f'{p+1:08}_{k:03}.png' for p in range(patients) for k in range(per)]
    lines = [f'{n},{"|".join(CHESTXRAY14[i%14:i%14+2]) if i%3 else "No Finding"},{n[-7:-4]},{int(n[:8])},57,M,{"AP" if i%2 else "PA"},2682,2749,.1,.1,' for i,n in enumerate(names)]
    head = 'Image Index,Finding Labels,Follow-up #,Patient ID,Patient Age,Patient Gender,View Position,OriginalImage[Width,Height],OriginalImagePixelSpacing[x,y],'
    cut = 2*per
    return lay(root, {entry: '\n'.join([head,*lines]), 'train_val_list.txt': '\n'.join(names[cut:])+'\n', 'test_list.txt': '\n'.join(names[:cut]),
                      'BBox_List_2017.csv': f'Image Index,Finding Label,Bbox [x,y,w,h],,,\n{names[0]},Infiltrate,1.5,2,3,4,,,\n{names[0]},Mass,5,6,7,8,,,\n',
                      **{f'{at(i)}/{n}': None for i,n in enumerate(names)}})

def chexpert_release(root, release='CheXpert-v1.0-small', n=8):
    head = 'Path,Sex,Age,Frontal/Lateral,AP/PA,'+','.join(CHEXPERT14)
    def row(part, i):
        view = 'lateral' if i%4==3 else 'frontal'
        values = [['1.0','0.0','-1.0',''][(i+j)%4] for j in range(14)]
        return f'{part}/patient{i:05}/study1/view1_{view}.jpg', f'Female,68,{view.title()},{"AP" if view=="frontal" else ""},{",".join(values)}'
    rows = {p: [row(p, i) for i in r] for p,r in (('train',range(1,n+1)), ('valid',range(n+1,n+3)))}
    return lay(root, {**{f'{p}.csv': '\n'.join([head,*(f'{release}/{f},{v}' for f,v in r)]) for p,r in rows.items()}, **{f: None for r in rows.values() for f,_ in r}})

def mimic_release(root, gz=False, n=8):
    films = [(f'd{i}', f'1000003{i//2}', f'5041426{i//2}', ['PA','LATERAL','AP',''][i%4]) for i in range(n)]
    csvs = {'metadata': ['dicom_id,subject_id,study_id,ViewPosition,Rows', *(','.join(f)+',2500' for f in films)],
            'split': ['dicom_id,study_id,subject_id,split', *(f'{d},{s},{p},{"train" if i<n-4 else "validate" if i<n-2 else "test"}' for i,(d,p,s,_) in enumerate(films))],
            'chexpert': ['subject_id,study_id,'+','.join(CHEXPERT14), *(f'{films[2*i][1]},{films[2*i][2]},1.0,,-1.0,0.0'+',1.0'*10 for i in range(n//2-1))]}
    lay(root, {f'files/p{p[:2]}/p{p}/s{s}/{d}.jpg': None for d,p,s,_ in films})
    for k,lines in csvs.items():
        f = root/f'mimic-cxr-2.0.0-{k}.csv{".gz" if gz else ""}'
        f.write_bytes(gzip.compress('\n'.join(lines).encode()) if gz else '\n'.join(lines).encode())
    return root

def mura_release(root):
    files = [f'{s}/XR_{b}/patient{p:05}/study{k}_{y}/image{i}.png' for s,b,p,k,y in (('train','WRIST',1,1,'positive'), ('train','HAND',1,2,'negative'),
             ('train','ELBOW',2,1,'negative'), ('valid','SHOULDER',3,1,'positive')) for i in (1,2)]
    return lay(root, {**{f'{s}_image_paths.csv': ''.join(f'MURA-v1.1/{f}\n' for f in files if f.startswith(s)) for s in ('train','valid')}, **{f: None for f in files}})

def rsna_release(root, n=10, mapped=True):
    ids = [f'{i:04}-aa' for i in range(n)]
    boxes = [f'{ids[0]},264.0,152.0,213.0,379.0,1', f'{ids[0]},562.0,152.0,256.0,453.0,1', f'{ids[3]},1.0,2.0,3.0,4.0,1']
    kinds = {ids[0]: 'Lung Opacity', ids[3]: 'Lung Opacity', ids[1]: 'No Lung Opacity / Not Normal'}
    files = {'stage_2_train_labels.csv': '\n'.join(['patientId,x,y,width,height,Target', *boxes, *(f'{i},,,,,0' for i in ids if kinds.get(i)!='Lung Opacity')]),
             'stage_2_detailed_class_info.csv': '\n'.join(['patientId,class', f'{ids[0]},Lung Opacity', *(f'{i},{kinds.get(i,"Normal")}' for i in ids)]),
             **{f'stage_2_train_images/{i}.dcm': None for i in ids}}
    if mapped: files[datasets.RSNA_MAP] = json.dumps([dict(subset_img_id=d, img_id=f'{i//2+1:08}_{i%2:03}.png') for i,d in enumerate(ids)])
    return lay(root, files)

BASIC = ['path','patient','split','labels','source','name']
RELEASES = {chestxray14: (nih_release, 'Data_Entry_2017_v2020.csv', 'Patient ID'), chexpert: (chexpert_release, 'train.csv', 'Edema'),
            mimic_cxr: (mimic_release, 'mimic-cxr-2.0.0-metadata.csv', 'ViewPosition'), mura: (mura_release, 'train_image_paths.csv', None),
            rsna_pneumonia: (rsna_release, 'stage_2_train_labels.csv', 'Target')}
ALL = [pytest.param(r, *v, id=r.__name__) for r,v in RELEASES.items()]

@pytest.mark.parametrize('read,release,csv,column', ALL)
def test_reader_basics(tmp_path, monkeypatch, read, release, csv, column):
    "The same first columns, absolute paths of files, one patient in one split, the same through a link and a relative path"
    df = read(release(tmp_path/'data/release'))
    assert list(df.columns[:6])==BASIC and set(df.source)=={read.__name__} and df.index.tolist()==list(range(len(df)))
    assert missing_files(df)==[] and all(map(os.path.isabs, df.path)) and all(p.endswith('/'+n) for p,n in zip(df.path, df['name']))
    assert df.patient.notna().all() and shared_patients(df)==[] and set(df.split)<={'train','valid','test'} and df.labels.map(type).eq(str).all()
    assert len(df)==sum(p.suffix in ('.png','.jpg','.dcm') for p in tmp_path.rglob('*'))
    (tmp_path/'link').symlink_to(tmp_path/'data/release'); monkeypatch.chdir(tmp_path)
    linked = read('link')
    assert linked.drop(columns='path').equals(df.drop(columns='path')) and linked.path[0].startswith(str(tmp_path/'link'))
    assert checksum(linked)==checksum(df) and len(unlabelled(df, linked))==2*len(df)

@pytest.mark.parametrize('read,release,csv,column', ALL)
def test_reader_bad_input(tmp_path, read, release, csv, column):
    "Missing root, file, column and images, a name twice, an outside path: each message names the file, and what to do"
    def fails(*words, error=DataError):
        with pytest.raises(error) as e: read(root)
        for w in words: assert w in str(e.value), e.value
    root = tmp_path/'nowhere'; fails(str(root), 'is no folder', 'check the path')
    root = tmp_path; fails(f'holds no {csv}' if read is not chestxray14 else 'holds no Data_Entry', 'give the folder')
    root = release(tmp_path/'release'); text = (root/csv).read_text()
    if column:
        (root/csv).write_text(text.replace(column, column.lower()+'_', 1)); fails(csv, f'has no column {column}', 'Fetch it again')
    (root/csv).write_text(''); fails(csv, 'cannot be read as CSV' if column else 'has no rows')
    (root/csv).write_bytes(b'\xff\xfe'+text.encode()); fails(csv)
    lines = text.splitlines()
    if read is not rsna_pneumonia: (root/csv).write_text('\n'.join([*lines, lines[-1]])); fails(csv, 'once more')
    (root/csv).write_text(text)
    images = sorted(p for p in root.rglob('*') if p.suffix in ('.png','.jpg','.dcm'))
    images[0].unlink()
    with pytest.warns(UserWarning, match=f'1 of {len(images)} files are missing.*{images[0].name}.*dropped'): df = read(root)
    assert len(df)==len(images)-1 and len(read(root, check=False))==len(images) and missing_files(read(root, check=False))==[str(images[0])]
    for p in images[1:]: p.unlink()
    fails(str(root), f'{len(images)} of {len(images)} files are missing', f'Unpack all images of the release into {root}')

@pytest.mark.parametrize('bad', ['../../{}', '/etc/{}', 'a/../../{}', 'C:/{}', '..\\{}'])
def test_published_names_stay_inside(tmp_path, bad):
    "A published CSV that points out of its folder is refused, whether the file exists or not; one's own index may"
    root, name = nih_release(tmp_path/'nih'), '00000003_000.png'
    put(tmp_path/name)
    for f in ('Data_Entry_2017_v2020.csv', 'train_val_list.txt'): (root/f).write_text((root/f).read_text().replace(name, bad.format(name)))
    with pytest.raises(DataError, match='1 names lie outside'): chestxray14(root)
    root = rsna_release(tmp_path/'rsna', mapped=False)
    for f in root.glob('*.csv'): f.write_text(f.read_text().replace('0000-aa', bad.format('x')))
    with pytest.warns(UserWarning), pytest.raises(DataError, match='1 names lie outside'): rsna_pneumonia(root)

def test_chestxray14(tmp_path):
    "Official test list, a patient-wise valid part that does not depend on what was lost, labels, views, every layout of images"
    a = nih_release(tmp_path/'a'); df = chestxray14(a, valid=.25)
    assert df.split.value_counts().to_dict()==dict(train=18, valid=6, test=6) and set(df[df.split=='test'].patient)=={'1','2'}
    assert list(df.columns[6:])==['view'] and df.view.tolist()[:2]==['PA','AP'] and df.labels[0]=='No Finding'
    y = label_matrix(df, CHESTXRAY14); assert y[0].sum()==0 and y[1,[1,2]].tolist()==[1,1] and y.sum(1).max()==2
    b = nih_release(tmp_path/'b', at=lambda i: f'images_{i%12+1:03}/images', entry='Data_Entry_2017.csv')
    other = chestxray14(b, valid=.25)
    assert other.drop(columns='path').equals(df.drop(columns='path')) and '/images_002/images/' in other.path[1] and missing_files(other)==[]
    assert set(chestxray14(a, valid=0).split)=={'train','test'}
    os.remove(df.path[10])
    with pytest.warns(UserWarning): assert chestxray14(a, valid=.25).split.tolist()==df.split.drop(10).tolist()
    boxes = chestxray14_boxes(a)
    assert boxes.values.tolist()==[['00000001_000.png','Infiltration',1.5,2,3,4], ['00000001_000.png','Mass',5,6,7,8]]
    with pytest.raises(DataError, match='too few'): chestxray14(a, valid=.01)

def test_chestxray14_lists_of_another_release(tmp_path):
    root = nih_release(tmp_path/'nih'); text = (root/'test_list.txt').read_text()
    def fails(new, *words):
        (root/'test_list.txt').write_text(new)
        with pytest.raises(DataError) as e: chestxray14(root)
        for w in words: assert w in str(e.value), e.value
    fails(text+'\n00099999_000.png', 'test_list.txt: 1 of its images are not in Data_Entry_2017_v2020.csv', '00099999_000.png', 'fetch both')
    fails('\n'.join(f'images_001/{n} 0 1' for n in text.split()), 'test_list.txt: 8 of its images', 'images_001/')
    fails('\n'.join(text.split()[1:]), 'Data_Entry_2017_v2020.csv: 1 of its images are not in train_val_list.txt + test_list.txt', '00000001_000')
    fails(text+'\n00000009_000.png', 'test_list.txt: has images of the training list too')
    (root/'test_list.txt').unlink()
    with pytest.raises(DataError, match='holds no test_list.txt'): chestxray14(root)

def test_chexpert(tmp_path):
    "What the release says is kept; small and full have the same names; the folder may be renamed, the CSV not exchanged"
    small, full = chexpert_release(tmp_path/'CheXpert-v1.0-small'), chexpert_release(tmp_path/'CheXpert-v1.0', 'CheXpert-v1.0')
    df = chexpert(small)
    assert df.split.tolist()==['train']*8+['valid']*2 and list(df.columns[6:])==['frontal','view',*CHEXPERT14]
    assert df.frontal.tolist()==[i%4!=3 for i in range(1,11)] and set(df.view)=={'AP','lateral'} and df.patient[0]=='patient00001'
    assert df.iloc[0][CHEXPERT14[:4]].tolist()[:2]==[0,-1] and np.isnan(df.iloc[0][CHEXPERT14[2]]) and df.iloc[0][CHEXPERT14[3]]==1
    assert df.labels[0]=='|'.join(CHEXPERT14[3::4]) and (label_matrix(df, CHEXPERT14)==(df[CHEXPERT14]==1)).all().all()
    assert chexpert(full).drop(columns='path').equals(df.drop(columns='path')) and checksum(chexpert(full))==checksum(df)
    aside = chexpert(small, valid=.25)
    assert aside.split.value_counts().to_dict()==dict(train=6, valid=2, test=2) and aside.split.tolist()[-2:]==['test','test']
    renamed = small.rename(tmp_path/'chexpert'); assert chexpert(renamed).name.tolist()==df.name.tolist()
    (full/'train.csv').write_text((renamed/'train.csv').read_text())
    with pytest.raises(DataError, match='train.csv: is of CheXpert-v1.0-small, this folder of CheXpert-v1.0; fetch the CSV'): chexpert(full)
    (renamed/'valid.csv').write_text((full/'valid.csv').read_text())
    with pytest.raises(DataError, match='train.csv is of CheXpert-v1.0-small and valid.csv of CheXpert-v1.0;'): chexpert(renamed)
    (full/'train.csv').write_text((full/'valid.csv').read_text())
    with pytest.raises(DataError, match='is it the other CSV'): chexpert(full)
    (full/'train.csv').write_text((full/'valid.csv').read_text().replace('valid','train').replace('-1.0,','7.0,'))
    with pytest.raises(DataError, match='are not 1, 0, -1 or blank: 7.0'): chexpert(full)

def test_chexpert_labels():
    "The four policies, by hand: 1, 0, unsure, blank"
    df = pd.DataFrame({c: [1,0,-1,np.nan] for c in CHEXPERT14})
    row = lambda p,**k: chexpert_labels(df, p, ['Edema'], **k)[:,0].tolist()
    assert row('zeros')==row('U-Zeros')==[1,0,0,0] and row('ones')==row('U-Ones')==[1,0,1,0] and row('U-MultiClass')==[1,0,2,0]
    assert np.isnan(row('U-Ignore')).tolist()==[0,0,1,0] and np.isnan(row('ones', blank=np.nan)).tolist()==[0,0,0,1]
    y = chexpert_labels(df)
    assert y.shape==(4,5) and y.dtype==np.float32 and dict(zip(CHEXPERT5, y[2]))=={'Atelectasis':1,'Cardiomegaly':0,'Consolidation':0,'Edema':1,'Pleural Effusion':0}
    mixed = chexpert_labels(df, {'Edema':'U-MultiClass','Fracture':'ignore'}, ['Fracture','Edema'])
    assert mixed[2,1]==2 and np.isnan(mixed[2,0]) and (df.Edema[2]==-1)
    for policy,classes,word in (('maybe',CHEXPERT5,'unknown policy maybe'), ({'Edema':'ones'},CHEXPERT5,'Atelectasis'), ('ones',['Oedema'],'Oedema')):
        with pytest.raises(DataError, match=word): chexpert_labels(df, policy, classes)

def test_mimic_cxr(tmp_path):
    "Packed or not; labels of a study go to all its films, of a study without labels there are none; CSV files must fit"
    df = mimic_cxr(mimic_release(tmp_path/'a')); packed = mimic_cxr(mimic_release(tmp_path/'b', gz=True))
    assert packed.drop(columns='path').equals(df.drop(columns='path')) and df.name[0]=='p10/p10000030/s50414260/d0.jpg' and df.patient[0]=='10000030'
    assert df.split.tolist()==['train']*4+['valid']*2+['test']*2 and df.frontal.tolist()==[True,False]*4 and df.view.isna().sum()==2 and df.study[2]=='50414261'
    assert df.labels[0]==df.labels[1]=='|'.join(['No Finding',*CHEXPERT14[4:]]) and df.labels.tolist()[6:]==['','']
    assert df.Cardiomegaly.tolist()[:6]==[-1]*6 and df.Cardiomegaly.isna().sum()==2 and chexpert_labels(df,'multiclass')[:,1].tolist()==[2]*6+[0]*2
    f = tmp_path/'a/mimic-cxr-2.0.0-split.csv'; f.write_text('\n'.join(f.read_text().splitlines()[:-1]))
    with pytest.raises(DataError, match='metadata.csv: 1 of its images are not in mimic-cxr-2.0.0-split.csv: d7'): mimic_cxr(tmp_path/'a')
    z = tmp_path/'b/mimic-cxr-2.0.0-metadata.csv.gz'; z.write_bytes(z.read_bytes()[:-20])
    with pytest.raises(DataError, match='metadata.csv.gz: cannot be'): mimic_cxr(tmp_path/'b')

def test_mura(tmp_path):
    root = mura_release(tmp_path/'MURA-v1.1'); df = mura(root)
    assert df.labels.tolist()==['positive']*2+['negative']*4+['positive']*2 and df.split.tolist()==['train']*6+['valid']*2
    assert df.body_part.tolist()[::2]==['wrist','hand','elbow','shoulder'] and df.patient.nunique()==3
    for old,new in (('MURA-v1.1','MURA-v1.0'), ('XR_WRIST','wrist'), ('train/','valid/')):
        f = root/'train_image_paths.csv'; text = f.read_text(); f.write_text(text.replace(old,new))
        with pytest.raises(DataError, match='train_image_paths.csv: [26] paths are not MURA-v1.1/train.*fetch release 1.1'): mura(root)
        f.write_text(text)

def test_rsna_pneumonia(tmp_path):
    "One row an image, its boxes together; patients are ChestX-ray14's where RSNA's mapping is there"
    df = rsna_pneumonia(rsna_release(tmp_path/'a'))
    assert len(df)==10 and df.name[0]=='0000-aa.dcm' and df.boxes[0]==[(264,152,213,379),(562,152,256,453)]
    by = df.set_index('name'); assert by.boxes['0003-aa.dcm']==[(1,2,3,4)] and by.boxes['0001-aa.dcm']==[] and df.target.sum()==2
    assert set(df.labels)=={'Lung Opacity','Normal','No Lung Opacity / Not Normal'} and (df.labels.eq('Lung Opacity')==df.target.eq(1)).all()
    assert by.patient['0002-aa.dcm']==by.patient['0003-aa.dcm']=='2' and by.nih['0003-aa.dcm']=='00000002_001.png'
    assert df.groupby('split').patient.nunique().to_dict()==dict(train=4, valid=1)
    with pytest.warns(UserWarning, match='a patientId is one image'): alone = rsna_pneumonia(rsna_release(tmp_path/'b', mapped=False))
    assert alone.patient.tolist()==[n[:-4] for n in alone.name] and 'nih' not in alone
    f = tmp_path/'a'/datasets.RSNA_MAP; f.write_text(json.dumps(json.loads(f.read_text())[1:]))
    with pytest.raises(DataError, match='1 of its images are not in pneumonia-challenge'): rsna_pneumonia(tmp_path/'a')
    f.write_text('{"a": 1}')
    with pytest.raises(DataError, match='mappings_2018.json: is no list'): rsna_pneumonia(tmp_path/'a')
    c = tmp_path/'b/stage_2_detailed_class_info.csv'; c.write_text('\n'.join(c.read_text().splitlines()[:-1]))
    with pytest.raises(DataError, match='1 of its images are not in stage_2_detailed'): rsna_pneumonia(tmp_path/'b')
    (tmp_path/'b/stage_2_train_labels.csv').rename(tmp_path/'b/stage_1_train_labels.csv')
    with pytest.raises(DataError, match='holds no stage_2_train_labels.csv .*stage_1_train_labels.csv'): rsna_pneumonia(tmp_path/'b')

def save_npz(path, y, side=28, dtype=np.uint8, **more):
    g = np.random.default_rng(0)
    np.savez(path, **{f'{p}_{k}': v for i,p in enumerate(('train','val','test')) for k,v in
             (('images', g.integers(0, 255, (2,side,side)).astype(dtype)), ('labels', np.asarray(y)[2*i:2*i+2]))}|more)
    return path

@pytest.mark.parametrize('side', [28, 64])
def test_medmnist(tmp_path, side):
    "Pixels survive bit for bit; a second call reads the index alone; an interrupted one is done again"
    npz = save_npz(tmp_path/f'pneumoniamnist_{side}.npz', [[0],[1],[1],[1],[0],[0]], side)
    df = medmnist(npz, tmp_path/'out')
    assert df.split.tolist()==['train']*2+['valid']*2+['test']*2 and df.labels.tolist()==['normal']+['pneumonia']*3+['normal']*2 and df.patient.isna().all()
    with np.load(npz) as z: assert (read_radiograph(df.path[3])==z['val_images'][1]).all()
    os.remove(npz); assert medmnist(npz, tmp_path/'out').equals(df)
    with pytest.raises(DataError, match='holds pneumoniamnist'): medmnist(save_npz(tmp_path/'chestmnist.npz', np.eye(6,14,dtype=int)), tmp_path/'out')
    (tmp_path/'out/index.csv').unlink()
    with pytest.raises(DataError, match='cannot be unpacked'): medmnist(npz, tmp_path/'out')
    save_npz(npz, [[0],[1],[1],[1],[0],[0]], side); assert medmnist(npz, tmp_path/'out').equals(df)

def test_medmnist_chest_and_bad(tmp_path):
    y = np.zeros((6,14), int); y[0,[0,13]] = 1; y[2,6] = 1
    df = medmnist(save_npz(tmp_path/'chestmnist.npz', y))
    assert df.labels.tolist()==['Atelectasis|Hernia','No Finding','Pneumonia']+['No Finding']*3 and (label_matrix(df, ['Hernia','Pneumonia'])==y[:,[13,6]]).all()
    assert Path(df.path[0]).is_relative_to(tmp_path/'chestmnist')
    with pytest.raises(DataError, match='none of pneumoniamnist, chestmnist'): medmnist(tmp_path/'breastmnist.npz')
    for name,y,more in (('a',[[0]]*6,dict(dtype=np.float32)), ('b',[[0]]*6,dict(val_images=np.array([{}],object))), ('c',[[0]]*6,dict(test_images=np.zeros((2,8,8,3),np.uint8)))):
        with pytest.raises(DataError, match='is damaged or no MedMNIST'): medmnist(save_npz(tmp_path/f'pneumoniamnist_{name}.npz', y, **more))
    (tmp_path/'pneumoniamnist.npz').write_bytes(b'<html>')
    with pytest.raises(DataError, match='is damaged or no MedMNIST'): medmnist(tmp_path/'pneumoniamnist.npz')

def stand_in(source, n, per, prefix='', **more):
    "A table of the published size"
    df = pd.DataFrame(dict(name=[f'{prefix}{i}.jpg' for i in range(n)], split='train', labels='', source=source, **more))
    return df.assign(path='/'+source+'/'+df['name'], patient=(df.index//per).astype(str))

def test_paper_pool(monkeypatch):
    "The published counts give silence; one less is said, or is an error; test images, laterals and valid.csv stay out"
    assert sum(PUBLISHED.values())==727_053
    few = {k: n//100 for k,n in PUBLISHED.items()}; monkeypatch.setattr(datasets, 'PUBLISHED', few)
    nih = pd.concat([stand_in('chestxray14', 865, 3), stand_in('chestxray14', 10, 3, 't').assign(split='test', patient='t')])
    cx = pd.concat([stand_in('chexpert', 2234, 3, 'train/', frontal=True), stand_in('chexpert', 9, 3, 'valid/', frontal=True)])
    mimic, bone = stand_in('mimic_cxr', 3771, 5), stand_in('mura', 400, 3)
    cx.iloc[:324, cx.columns.get_loc('frontal')] = False; mimic['frontal'] = mimic.index%2==0
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        pool = paper_pool(nih, cx, mimic, bone, strict=True); front = paper_pool(nih, cx, mimic, bone, frontal=True)
    assert pool.source.value_counts().to_dict()==few and list(pool.columns)==['path','patient','source','name']
    assert not pool.patient.eq('chestxray14/t').any() and not pool.name.str.startswith('valid/').any()
    assert front.source.value_counts().to_dict()==few|dict(chexpert=1910, mimic_cxr=1886)
    with pytest.warns(UserWarning, match=r'mimic_cxr has 3,770 images, published are 3,771 \(-1\)$'): paper_pool(nih, cx, mimic[1:], bone)
    with pytest.raises(DataError, match=r'^paper_pool: chestxray14 has 864.*; mura has 399'): paper_pool(nih[1:], cx, mimic, bone[1:], strict=True)

def test_ablation_split():
    "70,000 within one patient, of whatever sizes; nobody on both sides; the same whatever the order of the rows"
    sizes = np.random.default_rng(0).geometric(.32, 28_008)
    nih = pd.DataFrame(dict(patient=np.repeat(np.arange(28_008), sizes).astype(str), split='train'))
    nih.loc[::7, 'split'] = 'valid'
    nih = pd.concat([nih, pd.DataFrame(dict(patient=['x']*9, split='test'))], ignore_index=True)
    parts = ablation_split(nih)
    assert len(parts)==len(nih)-9 and abs((parts.part=='pretrain').sum()-70_000) <= sizes.max() and set(parts.part)=={'pretrain','finetune'}
    assert parts.groupby('patient').part.nunique().max()==1 and 'x' not in set(parts.patient)
    again = ablation_split(nih.sample(frac=1, random_state=0)).drop_duplicates('patient').set_index('patient').part
    assert again.loc[parts.patient].tolist()==parts.part.tolist() and (ablation_split(nih, seed=1).part!=parts.part).any()
    with pytest.raises(DataError, match='leave no rest'): ablation_split(nih[:70_000])

def test_radiograph_block(tmp_path):
    "In a DataBlock, 16-bit files and all: uint8 of one channel as an item, float in [0,1] as a batch; a bad file is named"
    from fastai.data.block import DataBlock, MultiCategoryBlock
    from fastai.data.transforms import ColReader, ColSplitter
    from fastai.vision.augment import Resize
    for i in range(6): Image.fromarray(getattr(phantom(i, size=40+8*i), 'image16' if i%2 else 'image')).save(tmp_path/f'{i}.png')
    df = pd.DataFrame(dict(path=[str(tmp_path/f'{i}.png') for i in range(6)], labels=['a|b','b','','a','a|b',''], split=['train']*4+['valid']*2))
    block = DataBlock(blocks=(RadiographBlock, MultiCategoryBlock), get_x=ColReader('path'), get_y=ColReader('labels', label_delim='|'),
                      splitter=ColSplitter('split', on='valid'), item_tfms=Resize(32))
    dls = block.dataloaders(df, bs=2, num_workers=0, device='cpu')
    im,y = dls.train_ds[1]
    assert im.mode=='L' and (np.asarray(im)==read_radiograph(df.path[1])).all() and y.tolist()==[0,1]
    item = dls.train.after_item(dls.train_ds[1])[0]; assert item.dtype==torch.uint8 and item.shape==(1,32,32)
    x,y = dls.one_batch()
    assert x.shape==(2,1,32,32) and x.dtype==torch.float32 and 0<=x.min() and .3<x.max()<=1 and y.shape==(2,2)
    (tmp_path/'0.png').write_bytes(b'nothing')
    with pytest.raises(RadiographError, match='0.png'): dls.train_ds[0]
