"`folder`: the content decides where the suffix does not, nothing else is opened, and what is left out is said"

import os
import warnings

import numpy as np
import pytest
from PIL import Image
from pydicom.uid import ExplicitVRLittleEndian
from c2l_nb.data import table
from c2l_nb.data.phantom import write_phantoms
from c2l_nb.data.table import DataError, folder

DICOM = bytes(128) + b'DICM'
BARE = b'\x08\x00\x16\x00UI\x1a\x00' + ExplicitVRLittleEndian.encode()
PNG = b'\x89PNG\r\n\x1a\n' + bytes(99)


def put(path, content=b'x' * 10):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def found(root):
    "Names, and the one warning or None"
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        names = [os.path.relpath(p, root).replace(os.sep, '/') for p in folder(root).path]
    assert len(said) <= 1
    return names, str(said[0].message) if said else None


def test_content_decides_where_the_suffix_does_not(tmp_path):
    "Siemens' .ima, .DIC, .v2, numbers, no suffix; DICOM with and without a preamble, PNG under another name"
    images = {
        'a.ima': DICOM,
        'b.IMA': BARE,
        'c.DIC': DICOM,
        'd.v2': BARE,
        'e': DICOM,
        'f': BARE,
        'g.1234': DICOM,
        'sub/1.2.840.10008': DICOM,
        'h.img': PNG,
        'i.jfif': b'\xff\xd8\xff\xe0' + bytes(99),
        'j.btf': b'II+\0' + bytes(99),
    }
    for name, content in images.items():
        put(tmp_path / name, content)
    names, said = found(tmp_path)
    assert names == sorted(images) and said is None


def test_what_is_left_out_is_counted(tmp_path):
    "One line, by kind, most first; BMP is not read here"
    Image.fromarray(np.eye(9, dtype=np.uint8)).save(put(tmp_path / 'x.bmp'), 'BMP')
    for name in 'y.bmp z.BMP README notes 7.8.9 w.webp index.csv'.split():
        put(tmp_path / name)
    put(tmp_path / 'DICOMDIR', DICOM)
    (tmp_path / 'gone').symlink_to(tmp_path / 'nowhere')
    put(tmp_path / 'a.png')
    names, said = found(tmp_path)
    assert names == ['a.png']
    assert said.startswith(f'{tmp_path}: 1 images; left out: ')
    counts = said.split('left out: ')[1].split(', ')
    assert counts == ['.bmp (3)', 'no suffix (3)', '.csv (1)', '.webp (1)', 'DICOMDIR (1)', 'broken link or device (1)']


def test_documents_alone_are_no_news(tmp_path):
    "An index beside the images is not worth a warning"
    for name in 'a.png index.csv notes.txt page.html .hidden ._a.png'.split():
        put(tmp_path / name)
    assert found(tmp_path) == (['a.png'], None)


def test_nothing_found_says_what_is_there(tmp_path):
    put(tmp_path / 'a.bmp')
    put(tmp_path / 'b.csv')
    with pytest.raises(DataError, match=r'holds no image .*there is: \.bmp \(1\), \.csv \(1\)'):
        folder(tmp_path)


@pytest.mark.parametrize('what', ['unreadable folder', 'unreadable file'])
def test_unreadable(tmp_path, monkeypatch, what):
    "Without permission; root may read all, so the refusal is played where permissions do not stop the user"
    put(tmp_path / 'a.png')
    put(tmp_path / 'locked/b.png')
    put(tmp_path / 'c.ima', DICOM)
    locked = tmp_path / ('locked' if what == 'unreadable folder' else 'c.ima')
    real_scan, real_kind = os.scandir, table.file_kind

    def scandir(path):
        if os.fspath(path) == str(locked):
            raise PermissionError(13, 'Permission denied', str(path))
        return real_scan(path)

    def file_kind(path):
        if str(path) == str(locked):
            raise PermissionError(13, 'Permission denied', str(path))
        return real_kind(path)

    monkeypatch.setattr(os, 'scandir', scandir)
    monkeypatch.setattr(table, 'file_kind', file_kind)
    names, said = found(tmp_path)
    assert said.endswith(f'left out: {what} (1)')
    assert names == (['a.png', 'c.ima'] if what == 'unreadable folder' else ['a.png', 'locked/b.png'])


def test_known_suffixes_are_not_opened(tmp_path, monkeypatch):
    "So 700,000 rows stay fast"
    for name in 'a.png b.JPG c.jpeg d.tif e.tiff f.dcm g.dicom h.csv i.txt'.split():
        put(tmp_path / name)

    def refuse(path):
        raise AssertionError(f'{path} was opened')

    monkeypatch.setattr(table, 'file_kind', refuse)
    assert len(found(tmp_path)[0]) == 7


def test_a_device_is_not_opened(tmp_path):
    "A pipe would wait for ever"
    put(tmp_path / 'a.png')
    os.mkfifo(tmp_path / 'pipe')
    assert found(tmp_path)[1].endswith('broken link or device (1)')


def test_phantoms_without_suffix(tmp_path):
    "Real DICOM files, renamed"
    write_phantoms(tmp_path, 3, fmt='dcm', size=32, progress=False)
    for i, p in enumerate(sorted(tmp_path.rglob('*.dcm'))):
        p.rename(p.with_name(f'{i}.ima' if i else 'IM0'))
    assert len(folder(tmp_path)) == 3
