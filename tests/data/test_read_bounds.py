"What a file may claim is bounded before it is inflated, and the error says so; peak memory is measured, time is not"

import io
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.filewriter import dcmwrite
from pydicom.uid import DeflatedExplicitVRLittleEndian, ExplicitVRLittleEndian, JPEG2000Lossless, JPEGBaseline8Bit
from c2l_nb.data.collections import medmnist
from c2l_nb.data.read import MAX_BYTES, RadiographError, check_archive, read_radiograph, upright_size
from c2l_nb.data.table import DataError

GREY = np.arange(40 * 60).reshape(40, 60).astype(np.uint8)


def fails(path, *words):
    with pytest.raises(RadiographError) as e:
        read_radiograph(path)
    assert str(e.value).startswith(f'{path}: ') and all(word in str(e.value) for word in words), e.value


def dicom(path, pixels=GREY, syntax=ExplicitVRLittleEndian, code=None, **tags):
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    ds.SOPClassUID, ds.SOPInstanceUID = '1.2.840.10008.5.1.4.1.1.7', '1.2.3'
    ds.Rows, ds.Columns = pixels.shape
    ds.SamplesPerPixel, ds.PhotometricInterpretation, ds.PixelRepresentation = 1, 'MONOCHROME2', 0
    ds.BitsAllocated, ds.BitsStored, ds.HighBit = 8, 8, 7
    ds.PixelData = encapsulate([code]) if code else pixels.tobytes()
    ds['PixelData'].VR = 'OB'
    for name, value in tags.items():
        setattr(ds, name, value)
    dcmwrite(path, ds, enforce_file_format=True)
    return path


def deflated(path, after, size):
    "A deflated DICOM file whose data set is followed by `size` bytes of zeros, written without holding them"
    whole = dicom(path, after, DeflatedExplicitVRLittleEndian).read_bytes()
    length = 144 + int.from_bytes(whole[140:144], 'little')
    body = zlib.decompress(whole[length:], -zlib.MAX_WBITS)
    z = zlib.compressobj(9, zlib.DEFLATED, -zlib.MAX_WBITS)
    head = z.compress(body) + z.flush(zlib.Z_FULL_FLUSH)
    zeros = z.compress(bytes(2**20)) + z.flush(zlib.Z_FULL_FLUSH)  # may be repeated
    path.write_bytes(whole[:length] + head + zeros * (size >> 20) + z.flush())
    return path


def test_deflated_dicom(tmp_path):
    "Half a megabyte that inflates to 512 MB; and a sound one, of a large image"
    bomb = deflated(tmp_path / 'bomb', GREY, 2**29)
    assert bomb.stat().st_size < 600_000 and MAX_BYTES < 2**28
    fails(bomb, 'inflates to more than', 'leave it out')
    with pytest.raises(RadiographError, match='inflates to more than'):
        upright_size(bomb)
    assert (read_radiograph(dicom(tmp_path / 'sound', GREY, DeflatedExplicitVRLittleEndian)) == GREY).all()
    fails(dicom(tmp_path / 'cut', GREY, DeflatedExplicitVRLittleEndian, Rows=400), 'damaged')


def test_deflated_without_an_end(tmp_path):
    path = dicom(tmp_path / 'a', GREY, DeflatedExplicitVRLittleEndian)
    path.write_bytes(path.read_bytes()[:-200])
    fails(path)


def code(side, fmt):
    b = io.BytesIO()
    Image.new('L', (side, side), 7).save(b, fmt)
    return b.getvalue()


@pytest.mark.parametrize('syntax, fmt', [(JPEG2000Lossless, 'JPEG2000'), (JPEGBaseline8Bit, 'JPEG')])
def test_compressed_pixels_of_another_size(tmp_path, syntax, fmt):
    "The header says 60×40, the compressed pixels say 4000×4000"
    fails(dicom(tmp_path / 'a', GREY, syntax, code(4000, fmt)), '60×40', '4000×4000')


def test_header_of_a_huge_dicom(tmp_path):
    for tags in (dict(Rows=60_000, Columns=60_000), dict(Rows=0), dict(Columns=0)):
        fails(dicom(tmp_path / 'a', GREY, **tags), 'claims')
        with pytest.raises(RadiographError, match='claims'):
            upright_size(tmp_path / 'a')


def tiff(path, data, **tags):
    "A little-endian TIFF of one strip or tile of deflated 8-bit grey, from tags by number"
    entries = {256: 64, 257: 64, 258: 8, 259: 8, 262: 1, 277: 1} | {int(k[1:]): v for k, v in tags.items()}
    at = 8 + len(data) + len(data) % 2
    table = b''.join(struct.pack('<HHII', tag, 4, 1, entries[tag]) for tag in sorted(entries))
    directory = struct.pack('<H', len(entries)) + table + bytes(4)
    path.write_bytes(b'II*\0' + struct.pack('<I', at) + data.ljust(at - 8, b'\0') + directory)
    return path


def test_tiles_of_a_tiff(tmp_path):
    "An image of 64×64 whose tile claims 20000×20000; and a sound tile, larger than the image"
    data = zlib.compress(bytes(10**6))
    fails(tiff(tmp_path / 'a.tif', data, _322=20_000, _323=20_000, _324=8, _325=len(data)), 'claims 20000×20000')
    data = zlib.compress(np.tile(np.arange(256, dtype=np.uint8), 256).tobytes())
    y = read_radiograph(tiff(tmp_path / 'b.tif', data, _322=256, _323=256, _324=8, _325=len(data)))
    assert (y == np.arange(64)).all() and upright_size(tmp_path / 'b.tif') == (64, 64)


def chunk(kind, data):
    return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))


@pytest.mark.parametrize('bits, colour, side', [(8, 0, 9000), (16, 0, 9000), (16, 6, 5000), (16, 2, 5000)])
def test_png(tmp_path, bits, colour, side):
    "16 bits a colour take much more memory while they are read: a quarter of the pixels is allowed"
    head = chunk(b'IHDR', struct.pack('>IIBBBBB', side, side, bits, colour, 0, 0, 0))
    rest = chunk(b'IDAT', zlib.compress(b'')) + chunk(b'IEND', b'')
    (tmp_path / 'a.png').write_bytes(b'\x89PNG\r\n\x1a\n' + head + rest)
    fails(tmp_path / 'a.png', f'claims {side}×{side}')


def archive(path, **arrays):
    np.savez_compressed(path, **arrays)
    return path


def medmnist_arrays(n=4, side=28):
    images = np.random.default_rng(0).integers(0, 255, (n, side, side), np.uint8)
    both = dict(images=images, labels=np.zeros((n, 1), np.uint8))
    return {f'{part}_{k}': v for part in ('train', 'val', 'test') for k, v in both.items()}


def test_npz(tmp_path):
    "100 kB that claim 128 MB of images; and a sound archive"
    sound = archive(tmp_path / 'pneumoniamnist.npz', **medmnist_arrays())
    check_archive(sound)
    assert len(medmnist(sound)) == 12
    arrays = medmnist_arrays() | dict(train_images=np.zeros((2**17, 32, 32), np.uint8))
    bomb = archive(tmp_path / 'pneumoniamnist_32.npz', **arrays)
    with pytest.raises(RadiographError, match='claims 128 MB unpacked'):
        check_archive(bomb)
    with pytest.raises(DataError, match='claims 128 MB unpacked'):
        medmnist(bomb)
    assert not (tmp_path / 'pneumoniamnist_32').exists()
    (tmp_path / 'chestmnist.npz').write_bytes(b'no zip')
    with pytest.raises(DataError, match='damaged or no MedMNIST'):
        medmnist(tmp_path / 'chestmnist.npz')


def test_zip_with_a_large_header(tmp_path):
    "The claim counts, whatever the names inside"
    with zipfile.ZipFile(tmp_path / 'a.zip', 'w', zipfile.ZIP_DEFLATED) as z:
        z.writestr('x', bytes(2**27))
    with pytest.raises(RadiographError, match='128 MB'):
        check_archive(tmp_path / 'a.zip')


@pytest.mark.skipif(sys.platform != 'linux', reason='reads the peak memory of a process as Linux counts it')
def test_peak_memory(tmp_path):
    "A file that would inflate to 512 MB (and take twice that) takes less than 400 MB, in a process of its own"
    program = (
        'import re, sys\n'
        'from c2l_nb.data.read import RadiographError, read_radiograph\n'
        'try: read_radiograph(sys.argv[1])\n'
        'except RadiographError: print(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1])'
    )
    command = [sys.executable, '-c', program, str(deflated(tmp_path / 'a', GREY, 2**29))]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    assert int(done.stdout) / 1024 < 400
