"Tables that come in: fifty nearly right ones, none of which puts a test image or a test patient into training; patients, labels, what is printed."

import gzip, unicodedata, warnings
from pathlib import Path
import numpy as np
import pandas as pd
import pytest
from c2l_nb.core import patient_count, patient_ids, patient_names
from c2l_nb.data.cache import read_items
from c2l_nb.data.leakage import audit_leaks, check_split
from c2l_nb.data.table import (
    DataError,
    clean_labels,
    fingerprint,
    index_csv,
    label_matrix,
    read_images,
    shared_patients,
    split_patients,
)
from c2l_nb.evaluation.metrics import patient_counts
from c2l_nb.tasks.pretrain import load_data, probe_labels
from c2l_nb.tasks.targets import make_targets

# Twelve images of six patients; the last two patients are the test

PATIENT = ['07', '08', '09', '10', '11', '12']
SPLIT = ['train', 'train', 'train', 'valid', 'test', 'test']
ROWS = [
    (f'{PATIENT[i // 2]}_{i % 2}.png', PATIENT[i // 2], SPLIT[i // 2], 'Mass|Edema' if i % 3 else 'No Finding')
    for i in range(12)
]
HEAD = 'file', 'patient', 'split', 'labels'


def text(rows=ROWS, head=HEAD, sep=',', end='\n'):
    return end.join(sep.join(line) for line in (head, *rows)) + end


def renamed(old, new):
    return text(head=tuple(new if h == old else h for h in HEAD))


def column(name, change):
    "The table with the cells of one column changed"
    at = HEAD.index(name)
    return text([(*r[:at], change(r[at]), *r[at + 1 :]) for r in ROWS])


def without(name):
    at = HEAD.index(name)
    return text([(*r[:at], *r[at + 1 :]) for r in ROWS], (*HEAD[:at], *HEAD[at + 1 :]))


def cell_of_test(change):
    "The table with the split of test images written otherwise"
    return column('split', lambda s: change if s == 'test' else s)


def same_patient(written):
    "Patient 12 of the test has an image in train, under another spelling of the name"
    return text([*ROWS, ('more.png', written, 'train', 'Mass')])


GOOD = text()
VARIANTS = {
    'as it should be': GOOD,
    'space after the comma': text(sep=', '),
    'spaces around': text(sep='  ,  '),
    'semicolons': text(sep=';'),
    'tabs': text(sep='\t'),
    'semicolon and space': text(sep='; '),
    'windows lines': text(end='\r\n'),
    'old mac lines': text(end='\r'),
    'blank lines first': '\n\n' + GOOD,
    'blank lines between': text(end='\n\n'),
    'no last newline': GOOD.rstrip('\n'),
    'quoted': text([tuple(f'"{c}"' for c in r) for r in ROWS]),
    'quoted head': text(head=tuple(f'"{h}"' for h in HEAD)),
    'capital head': GOOD.replace('patient,split', 'Patient,Split', 1),
    'upper head': text(head=('FILE', 'PATIENT', 'SPLIT', 'LABELS')),
    'utf-8 mark': GOOD.encode('utf-8-sig'),
    'utf-16': GOOD.encode('utf-16'),
    'utf-16 little, no mark': GOOD.encode('utf-16-le'),
    'utf-16 big, no mark': GOOD.encode('utf-16-be'),
    'utf-32': GOOD.encode('utf-32'),
    'latin-1': GOOD.replace('Mass', 'Maß').encode('latin-1'),
    'utf-16 tabs of Excel': text(sep='\t').encode('utf-16'),
    'non-breaking spaces': text(sep=',\xa0'),
    'zero width space': renamed('split', '\u200bsplit'),
    'path': renamed('file', 'path'),
    'image': renamed('file', 'image'),
    'Image Index': renamed('file', 'Image Index'),
    'filename': renamed('file', 'File Name'),
    'Patient ID': renamed('patient', 'Patient ID'),
    'subject': renamed('patient', 'subject_id'),
    'patientId': renamed('patient', 'patientId'),
    'fold': renamed('split', 'fold'),
    'Subset': renamed('split', 'Subset'),
    'splt': renamed('split', 'splt'),
    'splits': renamed('split', 'splits'),
    'spilt': renamed('split', 'spilt'),
    'my_split': renamed('split', 'my_split'),
    'phase': renamed('split', 'phase'),
    'is_test': renamed('split', 'is_test'),
    'part with val': renamed('split', 'part').replace('valid', 'val'),
    'patinet': renamed('patient', 'patinet'),
    'fiel': renamed('file', 'fiel'),
    'no head': text(head=ROWS[0]),
    'head twice': GOOD + GOOD,
    'empty split name': renamed('split', ''),
    'unnamed first column': text([('0', *r) for r in ROWS], ('', *HEAD)),
    'rows with an index': text([('0', *r) for r in ROWS]),
    'row too long': GOOD.replace('No Finding', 'No, Finding', 1),
    'last row too long': GOOD.rstrip('\n') + ',x\n',
    'row too short': GOOD.replace(',test,', ',', 1),
    'closing comma': text([(*r, '') for r in ROWS]),
    'closing commas': text([(*r, '') for r in ROWS], (*HEAD, '')),
    'split twice': text([(*r, 'train') for r in ROWS], (*HEAD, 'split')),
    'Split and split': text([(*r, 'train') for r in ROWS], (*HEAD, 'Split')),
    'split and fold': text([(*r, '0') for r in ROWS], (*HEAD, 'fold')),
    'subset and fold': text([(*r, '0') for r in ROWS], (*HEAD[:2], 'subset', 'labels', 'fold')),
    'patient and Patient': text([(*r, str(i)) for i, r in enumerate(ROWS)], (*HEAD, 'Patient')),
    'case and person': renamed('patient', 'person'),
    'Test': cell_of_test('Test'),
    'TEST ': cell_of_test('TEST '),
    'testing': cell_of_test('testing'),
    'tset': cell_of_test('tset'),
    'empty': cell_of_test(''),
    'spaces': cell_of_test('  '),
    'nan': cell_of_test('nan'),
    '2': cell_of_test('2'),
    'validation': cell_of_test('validation'),
    'quote not closed': GOOD.replace(',test,', ',"test,', 1),
    'zero byte': GOOD.replace('test', 'te\0st', 1),
    'no split': without('split'),
    'no patient': without('patient'),
    'only head': text([]),
    'nothing': '',
    'comment first': '# made by hand\n' + GOOD,
    'sep= of Excel': 'sep=,\n' + GOOD,
    'pipes': text(sep=' | '),
    'same file in train': text([*ROWS, (ROWS[10][0], '12', 'train', 'Mass')]),
    'same file by ./': text([*ROWS, ('./' + ROWS[10][0], '12', 'train', 'Mass')]),
    'row without file': text([*ROWS, ('', '12', 'train', 'Mass')]),
    '12 and space': same_patient('12 '),
    '12.0': same_patient('12.0'),
    '0012': same_patient('0012'),
    '12 no break': same_patient('12\xa0'),
    '12 zero width': same_patient('12\u200b'),
    '12 itself': same_patient('12'),
    '12 quoted': same_patient('"12"'),
    '12 and tab': same_patient('12\t'),
}


def test_there_are_fifty():
    assert (
        len(VARIANTS) >= 50
        and len({v if isinstance(v, bytes) else v.encode('utf-8', 'surrogatepass') for v in VARIANTS.values()}) >= 50
    )


@pytest.fixture(params=VARIANTS)
def variant(request, tmp_path):
    "A folder with the images and one of the tables as its index.csv"
    for name in [r[0] for r in ROWS] + ['more.png']:
        (tmp_path / name).write_bytes(b'image')
    table = VARIANTS[request.param]
    (tmp_path / 'index.csv').write_bytes(table if isinstance(table, bytes) else table.encode())
    return request.param, tmp_path


def trained_on(read):
    "File names and patients that are trained on as the commands do it; none where the table is refused"
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        try:
            rows, said = check_split(read(), table='index.csv')
        except DataError as e:
            return None, str(e)
    train = rows[rows.split == 'train']
    return [Path(p).name for p in train.path], list(train.patient)


def test_no_test_image_is_trained_on(variant):
    "By the file and by the folder; a table without a split is dealt out by patient, so it has no test of its own"
    name, folder = variant
    for read in (lambda: index_csv(folder / 'index.csv'), lambda: read_items(folder), lambda: read_images(folder)):
        files, patients = trained_on(read)
        if files is None:
            assert 'index.csv' in patients or 'split has only' in patients, patients  # the error names the table
        elif name == 'no split':
            assert len(files) < 12
        else:
            assert not {f[:2] for f in files} & {'11', '12'} and not set(patients) & {'11', '12'}, name
            assert len(files) == 6 or name == 'head twice', name


UNDERSTOOD = (
    'as it should be',
    'space after the comma',
    'spaces around',
    'semicolons',
    'tabs',
    'windows lines',
    'old mac lines',
    'capital head',
    'upper head',
    'utf-8 mark',
    'utf-16',
    'utf-16 little, no mark',
    'utf-16 big, no mark',
    'utf-32',
    'utf-16 tabs of Excel',
    'path',
    'image',
    'Image Index',
    'filename',
    'Patient ID',
    'subject',
    'patientId',
    'fold',
    'Subset',
    'Test',
    'TEST ',
    'zero width space',
    'non-breaking spaces',
    'closing commas',
    'unnamed first column',
    'quoted',
    'quoted head',
    'blank lines first',
    'split and fold',
)


@pytest.mark.parametrize('variant', UNDERSTOOD, indirect=True)
def test_what_is_clear_is_understood(variant):
    "Not everything is refused: these are the same table"
    df = index_csv(variant[1] / 'index.csv')
    assert (
        df.patient.tolist() == [r[1] for r in ROWS]
        and df.split.tolist() == [r[2] for r in ROWS]
        and df.labels.tolist() == [r[3] for r in ROWS]
    )


@pytest.mark.parametrize(
    'variant, words',
    [
        ('splt', "but 'splt': rename it to split"),
        ('patinet', "but 'patinet': rename it to patient"),
        ('fiel', 'needs a column `file` or `path`, has fiel, patient'),
        ('phase', 'looks like one'),
        ('validation', r'validation \(valid\?\)'),
        ('testing', r'testing \(test\?\)'),
        ('Split and split', 'all mean split'),
        ('subset and fold', 'all mean split'),
        ('latin-1', 'not UTF-8'),
        ('zero byte', 'zero bytes'),
        ('row too long', 'cannot be read as CSV'),
        ('rows with an index', 'cannot be read as CSV'),
        ('0012', 'differ only in case, leading zeros'),
        ('12.0', 'differ only'),
        ('empty', r'\(empty\)'),
        ('is_test', "'is_test', which looks like one"),
    ],
    indirect=['variant'],
)
def test_what_is_not_clear_is_refused_by_name(variant, words):
    with pytest.raises(DataError, match=words):
        index_csv(variant[1] / 'index.csv')


# Folders


@pytest.mark.parametrize('name', ['index.csv', 'Index.CSV', 'index.tsv', 'index.csv.gz'])
def test_an_index_is_never_passed_over(tmp_path, name):
    for r in ROWS:
        (tmp_path / r[0]).write_bytes(b'image')
    data = GOOD.encode()
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith('gz') else data)
    assert read_images(tmp_path).split.tolist() == [r[2] for r in ROWS]
    (tmp_path / name).write_bytes(gzip.compress(b'a,b\n1,2\n') if name.endswith('gz') else b'a,b\n1,2\n')
    with pytest.raises(DataError, match='needs a column `file` or `path`, has a, b'):
        read_images(tmp_path)


def test_folder_without_a_csv_index(tmp_path, capsys):
    "One in another format, or two of them, are refused; no index, and a CSV that is not read, are said"
    (tmp_path / 'a.png').write_bytes(b'image')
    (tmp_path / 'labels.csv').write_text(GOOD)
    assert read_images(tmp_path).split.tolist() == ['train']
    assert 'no index.csv: all are train, of unknown patients; not read: labels.csv' in capsys.readouterr().out
    (tmp_path / 'index.xlsx').write_bytes(b'PK')
    with pytest.raises(DataError, match='index.xlsx: is no CSV; save it as index.csv'):
        read_images(tmp_path)
    (tmp_path / 'index.csv').write_text('file\na.png\n')
    (tmp_path / 'index.tsv').write_text('file\na.png\n')
    with pytest.raises(DataError, match='holds index.csv, index.tsv; keep one'):
        read_images(tmp_path)
    with pytest.raises(DataError, match='neither a folder nor an index CSV'):
        read_images(tmp_path / 'a.png')


def test_what_was_understood_is_one_line(tmp_path, capsys):
    (tmp_path / 'a.png').write_bytes(b'image')
    (tmp_path / 'b.png').write_bytes(b'image')
    (tmp_path / 'i.csv').write_text('File Name;Patient ID;fold;view\na.png;7;train;PA\nb.png;;Test;AP\n')
    df = index_csv(tmp_path / 'i.csv')
    assert capsys.readouterr().out == (
        f"{tmp_path.name}/i.csv: 2 images; path from 'File Name'; patient from 'Patient ID' (1, 1 images without); "
        "split from 'fold' (1 train, 1 test); no labels; no source; also view\n"
    )
    assert df.columns.tolist() == ['path', 'patient', 'split', 'labels', 'source', 'view'] and df.view.tolist() == [
        'PA',
        'AP',
    ]


def test_identifiers_are_text_and_numbers_are_numbers(tmp_path):
    (tmp_path / 'i.csv').write_text('file,patient,study_id,view,width,kept\n1.png,00001,007,01,12,True\n')
    df = index_csv(tmp_path / 'i.csv', check=False)
    assert (
        df.loc[0, ['patient', 'study_id', 'view']].tolist() == ['00001', '007', '01']
        and df.width[0] + 1 == 13
        and bool(df.kept[0]) is True
    )


def test_reserved_names(tmp_path):
    (tmp_path / 'i.csv').write_text('file,boxes\n1.png,"[(1, 2, 3, 4)]"\n')
    with pytest.raises(DataError, match='name boxes is taken'):
        index_csv(tmp_path / 'i.csv', check=False)


@pytest.mark.parametrize('disk, table', [('NFC', 'NFD'), ('NFD', 'NFC')])
def test_an_accent_is_one_character_or_two(tmp_path, disk, table):
    "The file is found, its patient is one, and the same name in both forms is one file"
    (tmp_path / unicodedata.normalize(disk, 'Müller.png')).write_bytes(b'image')
    name = unicodedata.normalize(table, 'Müller')
    (tmp_path / 'i.csv').write_text(f'file,patient\n{name}.png,{name}\n', encoding='utf-8')
    df = index_csv(tmp_path / 'i.csv')
    assert Path(df.path[0]).is_file() and df.patient[0] == unicodedata.normalize('NFC', 'Müller')
    other = unicodedata.normalize(disk, 'Müller')
    (tmp_path / 'i.csv').write_text(f'file\n{name}.png\n{other}.png\n', encoding='utf-8')
    with pytest.raises(DataError, match='once more'):
        index_csv(tmp_path / 'i.csv')


def test_a_file_name_may_hold_spaces(tmp_path):
    (tmp_path / 'a  b.png').write_bytes(b'image')
    (tmp_path / 'i.csv').write_text('file, patient\n a  b.png , p\n')
    assert Path(index_csv(tmp_path / 'i.csv').path[0]).name == 'a  b.png'


# Patients

PEOPLE = pd.DataFrame(
    dict(
        path=[f'/x/{i}.png' for i in range(8)],
        patient=['p1', 'p1 ', '7', '7 ', '7', 'nan', ' ', None],
        source=['a', 'a', 'a', 'a ', 'b', 'a', 'a', 'a'],
        split=['train', 'test', 'train', 'train', 'test', 'train', 'test', 'test'],
    )
)
IDS = [0, 0, 1, 1, 2, 3, 4, 5]


def test_one_key_of_source_and_patient():
    "The same eight rows for the split, the audit, the intervals and the loaders"
    assert patient_ids(PEOPLE).tolist() == IDS and patient_count(PEOPLE) == 3
    assert shared_patients(PEOPLE) == ['p1']
    report = audit_leaks(PEOPLE, pixels=False)
    assert report.patients[['source', 'patient']].values.tolist() == [['a', 'p1']] and report.drop.path.tolist() == [
        '/x/0.png'
    ]
    counts, patient = patient_counts(patient_ids(PEOPLE), 8, 5)
    assert patient.tolist() == IDS and counts.shape == (5, 6)
    with pytest.raises(DataError, match='1 patients stand on both sides of the split: p1'):
        check_split(PEOPLE)


def test_a_split_keeps_spellings_together():
    many = pd.DataFrame(
        dict(path=[f'{i}.png' for i in range(60)], patient=[f'{i // 3}' + ' ' * (i % 3) for i in range(60)], source='a')
    )
    parts = split_patients(many).split
    assert (parts.groupby(np.arange(60) // 3).nunique() == 1).all()
    assert parts.tolist() == split_patients(many.assign(patient=many.patient.str.strip())).split.tolist()


def test_the_same_number_in_two_hospitals_is_two_patients():
    two = pd.DataFrame(dict(path=['a', 'b'], patient='13', source=['a', 'b'], split=['train', 'test']))
    assert shared_patients(two) == [] and len(audit_leaks(two, pixels=False).drop) == 0 and patient_count(two) == 2


def test_numbers_and_text_are_one_patient():
    assert patient_names([7, '7', 7.0, '7.5', np.int64(7)]).tolist() == ['7', '7', '7', '7.5', '7']
    assert patient_names(pd.Series([7, np.nan])).tolist() == ['7', None]


def test_groups_given_by_name_are_cleaned_too():
    assert patient_counts(['p1', 'p1 ', '7', 7], 4, 1)[1].tolist() == [0, 0, 1, 1]
    with pytest.raises(ValueError, match='groups has no patient for 1 images'):
        patient_counts(['a', 'nan'], 2, 1)


@pytest.mark.parametrize('kind', ['text', 'numbers', 'prefixed', 'unknown'])
def test_splits_are_those_of_before(kind):
    "The rule of 0.2, written out: the names sorted, dealt by one permutation"
    import torch

    patient = dict(
        text=[f'P{i // 3:03}' for i in range(90)],
        numbers=[i // 3 for i in range(90)],
        prefixed=[f'{"ab"[i % 2]}-x/{i // 3}' for i in range(90)],
        unknown=[None if i % 5 == 0 else f'P{i // 3}' for i in range(90)],
    )[kind]
    df = pd.DataFrame(
        dict(path=[f'/d/{i:02}.png' for i in range(90)], patient=patient, source=['a', 'b'][kind == 'prefixed'])
    )
    key = df.patient.astype(object).where(df.patient.notna(), '\0' + df.path)
    code, names = pd.factorize(key, sort=True)
    n, part = len(names), round(0.2 * len(names))
    parts = np.repeat(['test', 'valid', 'train'], [part, part, n - 2 * part])
    want = parts[torch.randperm(n, generator=torch.Generator().manual_seed(3)).numpy()][code]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert split_patients(df, seed=3).split.tolist() == want.tolist()


def test_pretraining_refuses_shared_patients_before_it_reads(tmp_path):
    for i in range(4):
        (tmp_path / f'{i}.png').write_bytes(b'no image')
    (tmp_path / 'index.csv').write_text(
        'file,patient,split\n0.png,a,train\n1.png,a ,valid\n2.png,b,train\n3.png,c,test\n'
    )
    with (
        pytest.warns(UserWarning, match='1 patients have images in more than one split: a'),
        pytest.raises(DataError, match='on both sides of the split: a'),
    ):
        load_data(str(tmp_path), 16, keep=tmp_path / 'cache')
    assert not (tmp_path / 'cache').exists()


# Labels


def test_labels_are_cleaned_at_the_door(tmp_path):
    labels = ['Mass | Effusion', 'NORMAL ', '   ', 'no finding', 'Mass||Mass', 'No_Finding', '', 'nan']
    (tmp_path / 'i.csv').write_text('file,labels\n' + ''.join(f'{i}.png,{label}\n' for i, label in enumerate(labels)))
    assert index_csv(tmp_path / 'i.csv', check=False).labels.tolist() == [
        'Mass|Effusion',
        'NORMAL',
        '',
        'No Finding',
        'Mass',
        'No Finding',
        '',
        '',
    ]


def test_labels_with_spaces_are_probed_and_learned():
    rows = pd.DataFrame(
        dict(
            labels=['Mass | Effusion', 'No finding '] * 12 + ['  '] * 2,
            split=['train'] * 12 + ['valid'] * 12 + ['train'] * 2,
        )
    )
    assert probe_labels(rows) == ['Effusion', 'Mass'] and label_matrix(rows, ['Mass']).sum() == 12
    t = make_targets(rows, None)
    assert t.classes == ['Effusion', 'Mass'] and t.known.sum() == 24
    assert make_targets(rows.assign(labels=['A', 'A '] * 13), None, task='multiclass').classes == ['A']
    assert clean_labels(pd.Series(['KL0', np.nan])).tolist() == ['KL0', '']


# Identity


def test_fingerprint_counts_rows_without_a_source(tmp_path):
    for n in 'ab':
        (tmp_path / n).write_bytes(b'image')
    df = pd.DataFrame(dict(path=[str(tmp_path / 'a'), str(tmp_path / 'b')], source=['x', None]))
    assert len({fingerprint(df), fingerprint(df[:1]), fingerprint(df[1:])}) == 3
    assert fingerprint(df.assign(source='x')) == fingerprint(df[['path']])
