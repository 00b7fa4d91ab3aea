"""Code planted in each kind of file that the library reads does not run.

Checkpoints: `test_checkpoint.py::test_damaged_is_refused` (pickle, zip). Backbones of every layout: `test_weights.py::test_pickles_never_run`.
Here are the others: configs, tables, radiographs, MedMNIST archives and caches.
"""
import json, pickle, warnings
import numpy as np, pandas as pd, pydicom, pytest
from payload import Payload
from c2l_nb.data.cache import RadiographCache, build_cache
from c2l_nb.data.collections import medmnist
from c2l_nb.data.table import DataError, index_csv
from c2l_nb.data.phantom import write_phantoms
from c2l_nb.data.read import read_radiograph

@pytest.fixture
def ran(tmp_path):
    "The file that a payload makes; it must not be there in the end, and the payload must work"
    flag = tmp_path/'ran'
    pickle.loads(pickle.dumps(Payload(flag)))
    assert flag.exists(), 'the payload itself is broken'
    flag.unlink()
    yield flag
    assert not flag.exists(), 'code in a file was run'

def words(flag): return [f"__import__('os').system('touch {flag}')", f"!!python/object/apply:os.system ['touch {flag}']", f"=cmd|'touch {flag}'!A1", f"@open({str(flag)!r}, 'w')"]

def objects(path, flag, **more):
    "An array of objects, which NumPy keeps as a pickle"
    np.save(path, np.array([Payload(flag)], dtype=object), allow_pickle=True, **more)

def test_config(tmp_path, ran):
    "A config.json that is a pickle, or whose values are code"
    from c2l_nb.tasks.pretrain import choose_config
    path = tmp_path/'config.json'
    path.write_bytes(pickle.dumps(Payload(ran)))
    with pytest.raises(ValueError): choose_config(str(path), 100, 8, 1)
    for word in words(ran):
        path.write_text(json.dumps(dict(config={'head': word})))
        with pytest.raises(ValueError, match='head must be one of'): choose_config(str(path), 100, 8, 1)
        path.write_text(json.dumps(dict(config={word: 1})))
        with pytest.raises(ValueError, match='no field'): choose_config(str(path), 100, 8, 1)

def test_csv(tmp_path, ran):
    "An index that is a pickle, or whose cells are code: cells stay text"
    (tmp_path/'p.csv').write_bytes(pickle.dumps(Payload(ran)))
    with pytest.raises(DataError): index_csv(tmp_path/'p.csv')
    pd.to_pickle(Payload(ran), tmp_path/'z.csv.gz')
    with pytest.raises((DataError, ValueError)): index_csv(tmp_path/'z.csv.gz')
    cells = words(ran)
    pd.DataFrame(dict(file=[f'{i}.png' for i in range(4)], patient=cells, split='train', labels=cells, boxes=cells)).to_csv(tmp_path/'c.csv', index=False)
    try: assert index_csv(tmp_path/'c.csv', check=False).patient.tolist() == cells
    except DataError: pass

def test_dicom(tmp_path, ran):
    "A pickle named .dcm; and a real DICOM file with one in its preamble, in a private element and behind the pixels"
    (tmp_path/'p.dcm').write_bytes(pickle.dumps(Payload(ran)))
    with pytest.raises(ValueError): read_radiograph(tmp_path/'p.dcm')
    path = next(write_phantoms(tmp_path/'x', 1, fmt='dcm', size=32, progress=False).parent.rglob('*.dcm'))
    image, ds, code = read_radiograph(path), pydicom.dcmread(path), pickle.dumps(Payload(ran))
    ds.preamble = code[:128].ljust(128, b'\0')
    ds.private_block(0x0011, 'payload', create=True).add_new(1, 'OB', code + b'\0'*(len(code) % 2))
    ds.PatientName = words(ran)[0]
    ds.save_as(path)
    assert np.array_equal(read_radiograph(path), image)

@pytest.mark.parametrize('name', ['p.png', 'p.jpg', 'p.npy'])
def test_pictures(tmp_path, ran, name):
    "A pickle with a picture's name, bare or as NumPy's object array"
    for write in (lambda: (tmp_path/name).write_bytes(pickle.dumps(Payload(ran))), lambda: objects(open(tmp_path/name, 'wb'), ran)):
        write()
        with pytest.raises(ValueError): read_radiograph(tmp_path/name)

def test_npz(tmp_path, ran):
    "A MedMNIST archive with an array of objects"
    path = tmp_path/'pneumoniamnist.npz'
    planted = np.array([Payload(ran)], dtype=object)
    np.savez(path, **{f'{part}_{what}': planted for part in ('train', 'val', 'test') for what in ('images', 'labels')})
    with pytest.raises(DataError, match='damaged or no MedMNIST'): medmnist(path)

@pytest.mark.parametrize('name', ['images.npy', 'log.npy', 'cache.json', 'rows.csv', 'bad.csv'])
def test_cache(tmp_path, ran, name):
    "Each file of a cache, as an object array or a pickle"
    index = write_phantoms(tmp_path/'x', 4, size=16, progress=False)
    build_cache(index_csv(index), tmp_path/'c', 16, workers=0, progress=False)
    for write in (lambda: objects(open(tmp_path/'c'/name, 'wb'), ran), lambda: (tmp_path/'c'/name).write_bytes(pickle.dumps(Payload(ran)))):
        write()
        with warnings.catch_warnings(), pytest.raises((DataError, ValueError)): warnings.simplefilter('ignore'); RadiographCache(tmp_path/'c')
