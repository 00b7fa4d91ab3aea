"Boxes: every rule of bad input, and the join of two tables by path."

import pandas as pd, pytest
from PIL import Image
from c2l_nb.data.collections import rsna_pneumonia
from c2l_nb.data.phantom import write_phantoms
from c2l_nb.data.table import DataError, check_boxes, image_size, index_csv, read_boxes

# Bad input


def write(tmp_path, rows, names=('a', 'b'), size=512, patients=('1', '2'), splits=('train', 'valid')):
    for n in names:
        Image.new('L', (size, size)).save(tmp_path / f'{n}.png')
    (tmp_path / 'boxes.csv').write_text('patientId,x,y,width,height,Target\n' + '\n'.join(rows) + '\n')
    return pd.DataFrame(dict(path=[str(tmp_path / f'{n}.png') for n in names], patient=patients, split=splits))


GOOD = ['a,10,20,100,200,1', 'b,,,,,0']


def test_good_boxes(tmp_path):
    df = read_boxes(tmp_path / 'boxes.csv', write(tmp_path, GOOD))
    assert (
        df.boxes.tolist() == [[(10.0, 20.0, 100.0, 200.0)], []]
        and df.patientId.tolist() == ['a', 'b']
        and df.width.tolist() == [512, 512]
    )


@pytest.mark.parametrize(
    'rows, words',
    [
        (['a,450,20,100,200,1', 'b,,,,,0'], r'a\.png.*leaves the image of 512×512.*side=1024'),
        (['a,-30,20,100,200,1', 'b,,,,,0'], 'leaves the image'),
        (['a,10,20,0,200,1', 'b,,,,,0'], r'a\.png.*no area'),
        (['a,10,20,100,-5,1', 'b,,,,,0'], 'no area'),
        (['a,10,,100,200,1', 'b,,,,,0'], r'a\.png.*not finite'),
        (['a,,,,,1', 'b,,,,,0'], 'not finite'),
        (['a,700,800,200,200,1', 'b,,,,,0'], 'side=1024'),  # another image's size
        (GOOD + ['a,,,,,0'], 'a is listed both with and without boxes'),
        (['a,10,20,100,200,0', 'b,,,,,0'], 'Target 0 and a box'),
        (GOOD + ['c,10,20,100,200,1'], '1 images of it are not in the index: c'),
    ],
)
def test_bad_boxes_name_the_file(rows, words, tmp_path):
    with pytest.raises(DataError, match=words):
        read_boxes(tmp_path / 'boxes.csv', write(tmp_path, rows))


def test_other_bad_input(tmp_path):
    index = write(tmp_path, GOOD, patients=('1', '1'))
    with pytest.raises(DataError, match='1 patients are in more than one split: 1'):
        read_boxes(tmp_path / 'boxes.csv', index)
    index = write(tmp_path, GOOD)
    (tmp_path / 'b.png').unlink()
    with pytest.raises(DataError, match=r'b\.png: image file is missing'):
        read_boxes(tmp_path / 'boxes.csv', index)
    with pytest.raises(DataError, match='listed twice'):
        check_boxes(pd.concat([index[:1]] * 2).assign(boxes=[[], []], width=512, height=512))
    (tmp_path / 'boxes.csv').write_text('patientId,x\na,1\n')
    with pytest.raises(DataError, match='needs a column `y`, has patientId, x'):
        read_boxes(tmp_path / 'boxes.csv', index)


def test_boxes_of_a_larger_original(tmp_path):
    df = read_boxes(tmp_path / 'boxes.csv', write(tmp_path, ['a,600,400,200,100,1', 'b,,,,,0']), side=1024)
    assert df.boxes[0] == [(300.0, 200.0, 100.0, 50.0)]


def test_dicom_header_and_phantoms(tmp_path):
    "Width and height of a DICOM are read; a phantom's own boxes pass"
    index = write_phantoms(tmp_path, 2, fmt='dcm', size=48, findings=('Mass',), progress=False)
    df = index_csv(index)
    assert image_size(df.path[0]) == (48, 48)
    b = pd.read_csv(tmp_path / 'boxes.csv')
    boxes = [
        [tuple(r) for r in b[b.file == f'images/{p.rsplit("/")[-1]}'][['x', 'y', 'width', 'height']].to_numpy()]
        for p in df.path
    ]
    assert all(boxes) and len(check_boxes(df.drop(columns=['width', 'height']).assign(boxes=boxes))) == 2


# The join

HEAD = 'patientId,x,y,width,height,Target'


def layout(tmp_path, names):
    "Images at these paths, of as many patients"
    for n in names:
        (tmp_path / n).parent.mkdir(parents=True, exist_ok=True)
        Image.new('L', (100, 100)).save(tmp_path / n)
    return pd.DataFrame(
        dict(path=[str(tmp_path / n) for n in names], patient=[str(i) for i in range(len(names))], split='train')
    )


VIEWS = [f'train/patient0000{p}/study1/view1_frontal.jpg' for p in (1, 2)]


def boxes(tmp_path, *rows, head=HEAD, sep=','):
    (tmp_path / 'boxes.csv').write_text('\n'.join([head, *rows]).replace(',', sep) + '\n')
    return tmp_path / 'boxes.csv'


def test_names_that_many_images_have(tmp_path):
    "CheXpert's layout: a base name is refused, enough of the path is taken, each image gets its own box"
    index = layout(tmp_path, VIEWS)
    with pytest.raises(DataError, match='view1_frontal may be .*patient00001.*write more of its path'):
        read_boxes(boxes(tmp_path, 'view1_frontal,1,1,9,9,1'), index)
    with pytest.raises(DataError, match='write more of its path'):
        read_boxes(boxes(tmp_path, 'a,1,1,9,9,1,study1/view1_frontal.jpg', head=HEAD + ',file'), index)
    rows = [f'a,1,1,9,9,1,{VIEWS[1]}', f'b,2,2,9,9,1,{VIEWS[0]}']
    for names in (
        rows,
        [r.replace('train/', '') for r in rows],
        [r.replace('train/', f'{tmp_path}/train/') for r in rows],
        [r.replace('/', chr(92)) for r in rows],
    ):
        df = read_boxes(boxes(tmp_path, *names, head=HEAD + ',file'), index)
        assert df.boxes.tolist() == [[(2, 2, 9, 9)], [(1, 1, 9, 9)]] and df.patientId.tolist() == ['b', 'a']


def test_a_path_relative_to_the_csv(tmp_path):
    "It means that file, even where other paths end alike"
    index = layout(tmp_path, ['a/1.png', 'b/a/1.png'])
    df = read_boxes(boxes(tmp_path, 'x,1,1,9,9,1,a/1.png', head=HEAD + ',file'), index)
    assert df.path.tolist() == [str(tmp_path / 'a/1.png')]


def test_ids_are_text(tmp_path):
    index = layout(tmp_path, ['00001.png', '00002.png'])
    assert read_boxes(boxes(tmp_path, '00001,1,1,9,9,1'), index).patientId.tolist() == ['00001']
    with pytest.raises(DataError, match='1 images of it are not in the index: 1;'):
        read_boxes(boxes(tmp_path, '1,1,1,9,9,1'), index)


def test_a_box_that_is_listed_twice_is_one(tmp_path):
    df = read_boxes(boxes(tmp_path, 'a,1,1,9,9,1', 'a,1,1,9,9,1', 'a,5,5,9,9,1'), layout(tmp_path, ['a.png']))
    assert df.boxes[0] == [(1, 1, 9, 9), (5, 5, 9, 9)]


def test_an_empty_target_is_no_box(tmp_path):
    "Nor is its image one without boxes: nothing is known of it"
    index = layout(tmp_path, ['a.png', 'b.png'])
    with pytest.warns(UserWarning, match='2 rows have no Target and are left out'):
        df = read_boxes(boxes(tmp_path, 'a,1,1,9,9,', 'a,5,5,9,9,1', 'b,,,,,'), index)
    assert df.patientId.tolist() == ['a'] and df.boxes[0] == [(5, 5, 9, 9)]


@pytest.mark.parametrize(
    'row, words',
    [
        ('a,1,1,9,9,2', 'Target must be 1'),
        ('a,1,1,9,x,1', 'cells of height are no numbers'),
        ('a,1,1,9,9,yes', 'cells of Target are no numbers'),
        (',1,1,9,9,1', '1 rows have no patientId'),
    ],
)
def test_other_cells_that_are_wrong(tmp_path, row, words):
    with pytest.raises(DataError, match=words):
        read_boxes(boxes(tmp_path, row), layout(tmp_path, ['a.png']))


@pytest.mark.parametrize(
    'head, sep',
    [(HEAD, ';'), (HEAD, ', '), ('PatientID,X,Y,Width,Height,target', ','), ('image_id,x,y,w,h,Target', ',')],
)
def test_columns_as_people_write_them(tmp_path, head, sep, capsys):
    df = read_boxes(boxes(tmp_path, 'a,1,1,9,9,1', 'b,,,,,0', head=head, sep=sep), layout(tmp_path, ['a.png', 'b.png']))
    assert df.boxes.tolist() == [[(1, 1, 9, 9)], []]
    assert 'boxes.csv: 1 boxes in 1 of 2 images' in capsys.readouterr().out


def test_columns_that_are_missing(tmp_path):
    with pytest.raises(DataError, match='needs a column `Target`.*is it Targt'):
        read_boxes(boxes(tmp_path, 'a,1,1,9,9,1', head='patientId,x,y,width,height,Targt'), layout(tmp_path, ['a.png']))


def test_rsna_by_the_same_rules(tmp_path):
    "A row that is there twice is one box, an empty Target none"
    (tmp_path / 'stage_2_train_labels.csv').write_text(
        f'{HEAD}\n0001,1,2,3,4,1\n0001,1,2,3,4,1\n0002,,,,,0\n' + ''.join(f'1{i:03},,,,,0\n' for i in range(8))
    )
    names = ['0001', '0002', *(f'1{i:03}' for i in range(8))]
    (tmp_path / 'stage_2_detailed_class_info.csv').write_text(
        'patientId,class\n' + ''.join(f'{n},Normal\n' for n in names)
    )
    with pytest.warns(UserWarning, match='a patientId is one image'):
        df = rsna_pneumonia(tmp_path, check=False)
    assert df.boxes.tolist()[:2] == [[(1, 2, 3, 4)], []] and df.target.tolist()[:2] == [1, 0]
