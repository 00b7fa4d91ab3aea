"One rule for EXIF orientation in JPEG, PNG and TIFF: the upright image, and its size; boxes are on it"

import struct
import zlib

import numpy as np
import pandas as pd
import pytest
from PIL import Image, ImageFile
from c2l_nb.data.read import RadiographError, read_radiograph, upright_size
from c2l_nb.data.table import DataError
from c2l_nb.data.table import check_boxes, image_size

yy, xx = np.mgrid[:40, :60]
GREY = (2 * yy + 3 * xx).astype(np.uint8)  # 60 wide, 40 high; no two of its eight turns are equal
RAW = (300 + 11 * (2 * yy + 3 * xx)).astype(np.uint16)
ORIENTATIONS = range(1, 9)


def lay(image, orientation):
    "The pixels as a camera stores them under this orientation: the inverse of turning them upright"
    turns = {
        1: image,
        2: image[:, ::-1],
        3: image[::-1, ::-1],
        4: image[::-1],
        5: image.swapaxes(0, 1),
        6: np.rot90(image),
        7: image[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(image, -1),
    }
    return turns[orientation]


def exif(orientation):
    e = Image.Exif()
    e[0x0112] = orientation
    return e


def save(path, image, orientation, fmt, **kw):
    tag = dict(tiffinfo={0x0112: orientation}) if fmt == 'TIFF' else dict(exif=exif(orientation))
    Image.fromarray(np.ascontiguousarray(lay(image, orientation))).save(path, fmt, **tag, **kw)
    return path


STRETCHED = np.rint((RAW - RAW.min()) * (255 / (int(RAW.max()) - int(RAW.min())))).astype(np.uint8)
KINDS = dict(
    png=('PNG', GREY, GREY, {}),
    png16=('PNG', RAW, STRETCHED, {}),
    png_rgb=('PNG', np.stack([GREY] * 3, -1), GREY, {}),
    png_alpha=('PNG', np.stack([GREY, np.full_like(GREY, 255)], -1), GREY, {}),
    tiff=('TIFF', GREY, GREY, {}),
    tiff16=('TIFF', RAW, STRETCHED, {}),
    tiff_rgb=('TIFF', np.stack([GREY] * 3, -1), GREY, {}),
    tiff_float=('TIFF', RAW.astype(np.float32), STRETCHED, {}),
    tiff_lzw=('TIFF', GREY, GREY, dict(compression='tiff_lzw')),
    tiff16_lzw=('TIFF', RAW, STRETCHED, dict(compression='tiff_lzw')),
    tiff16_deflate=('TIFF', RAW, STRETCHED, dict(compression='tiff_adobe_deflate')),
)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('orientation', ORIENTATIONS)
def test_upright(tmp_path, kind, orientation):
    fmt, image, want, kw = KINDS[kind]
    path = save(tmp_path / 'a', image, orientation, fmt, **kw)
    assert (read_radiograph(path) == want).all()
    assert upright_size(path) == image_size(path) == (60, 40)


@pytest.mark.parametrize('orientation', ORIENTATIONS)
def test_upright_jpeg(tmp_path, orientation):
    "As near as JPEG is"
    path = save(tmp_path / 'a', GREY, orientation, 'JPEG', quality=95)
    assert np.abs(read_radiograph(path).astype(int) - GREY).mean() < 1 and upright_size(path) == (60, 40)


def chunk(kind, data):
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))


def png(path, orientation, late, deep=False):
    "A PNG whose EXIF stands before or behind the pixels; `deep`: 16 bits a colour"
    pixels = lay(RAW if deep else GREY, orientation)
    h, w = pixels.shape
    rows = np.stack([pixels] * 3, -1).astype('>u2') if deep else pixels
    body = [chunk(b'IDAT', zlib.compress(b''.join(b'\0' + row.tobytes() for row in rows)))]
    body.insert(1 if late else 0, chunk(b'eXIf', exif(orientation).tobytes().removeprefix(b'Exif\0\0')))
    head = chunk(b'IHDR', struct.pack('>IIBBBBB', w, h, 16 if deep else 8, 2 if deep else 0, 0, 0, 0))
    path.write_bytes(b'\x89PNG\r\n\x1a\n' + head + b''.join(body) + chunk(b'IEND', b''))
    return path


@pytest.mark.parametrize('late', [False, True], ids=['before', 'behind'])
@pytest.mark.parametrize('deep', [False, True], ids=['grey', '16 bits a colour'])
@pytest.mark.parametrize('orientation', [3, 5, 6, 8])
def test_exif_before_or_behind_the_pixels(tmp_path, orientation, late, deep):
    path = png(tmp_path / 'a.png', orientation, late, deep)
    y = read_radiograph(path).astype(int)
    assert np.abs(y - (STRETCHED if deep else GREY)).max() <= (1 if deep else 0)
    assert upright_size(path) == (60, 40)


def test_size_without_pixels(tmp_path, monkeypatch):
    "No image is decoded for its size; and one that is cut off has one"
    path = tmp_path / 'a.png'
    Image.fromarray(GREY).save(path)
    save(tmp_path / 'b.jpg', GREY, 6, 'JPEG')
    monkeypatch.setattr(ImageFile.ImageFile, 'load', None)
    assert upright_size(path) == upright_size(tmp_path / 'b.jpg') == (60, 40)


@pytest.mark.parametrize('value', [0, 9, 77])
def test_impossible_orientation_is_none(tmp_path, value):
    path = tmp_path / 'a.png'
    Image.fromarray(GREY).save(path, exif=exif(value))
    assert (read_radiograph(path) == GREY).all() and upright_size(path) == (60, 40)


def test_boxes_are_on_the_upright_image(tmp_path):
    "A box that fits the upright image of 60×40 passes; one that fits the stored 40×60 does not"
    path = save(tmp_path / 'a.jpg', GREY, 6, 'JPEG')
    df = pd.DataFrame(dict(path=[str(path)], patient='a', split='train', boxes=[[(50.0, 30.0, 9.0, 9.0)]]))
    assert check_boxes(df)[['width', 'height']].values.tolist() == [[60, 40]]
    with pytest.raises(DataError, match='leaves the image of 60×40'):
        check_boxes(df.assign(boxes=[[(30.0, 50.0, 9.0, 9.0)]]))


def test_size_of_nothing(tmp_path):
    files = ('absent', None, 'No such file'), ('empty', b'', 'is empty'), ('page', b'<html>' * 99, 'no PNG')
    for name, content, said in files:
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(RadiographError, match=said):
            upright_size(tmp_path / name)
    with pytest.raises(DataError, match='is missing'):
        image_size(tmp_path / 'absent')
    with pytest.raises(DataError, match='no PNG'):
        image_size(tmp_path / 'page')


def test_inverse_tiff_is_upright_and_positive(tmp_path):
    "Polarity and orientation together"
    path = tmp_path / 'a.tif'
    Image.fromarray(np.ascontiguousarray(lay(RAW, 8))).save(path, 'TIFF', tiffinfo={262: 0, 0x0112: 8})
    assert (read_radiograph(path) == 255 - STRETCHED).all()
