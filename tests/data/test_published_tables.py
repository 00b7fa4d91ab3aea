"""The readers on the real label tables that torchxrayvision ships, against what its own classes make of them, row by row.

The lists of ChestX-ray14's official split and the tables of MIMIC-CXR and MURA are not in that package. A list of the same size is
dealt out by patient here; with the true ones in a folder that C2L_CHESTXRAY14 names, the last test reads those.
"""

import os, shutil, zipfile
from pathlib import Path
import numpy as np, pandas as pd, pytest
from c2l_nb.data.collections import (
    CHECKSUMS,
    CHESTXRAY14,
    CHEXPERT14,
    CHEXPERT5,
    CHEXPERT_POLICY,
    DataError,
    ablation_split,
    checksum,
    chestxray14,
    chestxray14_boxes,
    chexpert,
    chexpert_labels,
    label_matrix,
    paper_pool,
    rsna_pneumonia,
    shared_patients,
    split_patients,
)

xrv = pytest.importorskip('torchxrayvision', reason='ships the label tables: pip install torchxrayvision')
STAND_IN = (
    'f8775cd54e356ab79fe0b177199ff3c45aba617d59b1db8434be56b048d9e62c'  # of the ablation's 70,000 by the stand-in lists
)
DATA = Path(xrv.__file__).parent / 'data'


@pytest.fixture(scope='module')
def nih(tmp_path_factory):
    "(folder, table) of ChestX-ray14, with stand-in lists"
    root = tmp_path_factory.mktemp('nih')
    for f in ('Data_Entry_2017_v2020.csv.gz', 'BBox_List_2017.csv.gz'):
        shutil.copy(DATA / f, root / f)
    df = pd.read_csv(root / 'Data_Entry_2017_v2020.csv.gz')
    dealt = split_patients(
        pd.DataFrame(dict(path=df['Image Index'], patient=df['Patient ID'])), valid=0, test=2797 / 30805
    )
    for f, part in (('train_val_list.txt', 'train'), ('test_list.txt', 'test')):
        (root / f).write_text('\n'.join(dealt.path[dealt.split == part]))
    return root, chestxray14(root, check=False)


@pytest.fixture(scope='module')
def cx(tmp_path_factory):
    "The table of CheXpert's train.csv, with one stand-in row of valid.csv"
    root = tmp_path_factory.mktemp('CheXpert')
    shutil.copy(DATA / 'chexpert_train.csv.gz', root / 'train.csv.gz')
    rows = pd.read_csv(root / 'train.csv.gz', nrows=1, dtype=str)
    rows.assign(Path=rows.Path.str.replace('train/', 'valid/')).to_csv(root / 'valid.csv', index=False)
    return chexpert(root, check=False)


@pytest.fixture(scope='module')
def rsna(tmp_path_factory):
    "The table of RSNA's stage-2 labels; the class of an image is put together from its target"
    root = tmp_path_factory.mktemp('rsna')
    with zipfile.ZipFile(DATA / 'kaggle_stage_2_train_labels.csv.zip') as z:
        z.extract('stage_2_train_labels.csv', root)
    rows = pd.read_csv(root / 'stage_2_train_labels.csv')
    kind = rows.assign(**{'class': np.where(rows.Target == 1, 'Lung Opacity', 'Normal')})
    kind[['patientId', 'class']].to_csv(root / 'stage_2_detailed_class_info.csv', index=False)
    with pytest.warns(UserWarning, match='patientId is one image'):
        return rsna_pneumonia(root, check=False)


def test_chestxray14_labels(nih):
    "112,120 rows of 30,805 patients, every label, view and patient as in NIH_Dataset"
    df, own = nih[1], xrv.datasets.NIH_Dataset('.', views=['PA', 'AP'], unique_patients=False)
    assert (
        len(df) == 112_120 and df.patient.nunique() == 30_805 and own.csv['Image Index'].tolist() == df['name'].tolist()
    )
    assert (label_matrix(df, own.pathologies) == own.labels).all() and sorted(CHESTXRAY14) == own.pathologies
    assert df.view.tolist() == own.csv.view.tolist() and df.patient.tolist() == own.csv.patientid.tolist()
    assert (df.labels == 'No Finding').sum() == 60_361 == (own.labels.sum(1) == 0).sum()
    assert checksum(df) == CHECKSUMS['chestxray14']


def test_chestxray14_split(nih):
    df = nih[1]
    assert shared_patients(df) == [] and df.groupby('split').patient.nunique().to_dict() == dict(
        train=25_207, valid=2801, test=2797
    )
    with pytest.raises(DataError, match='112,120 of 112,120 files are missing'):
        chestxray14(nih[0])


def test_chestxray14_boxes(nih):
    "984 boxes of 880 images, as in NIH_Dataset"
    boxes, own = chestxray14_boxes(nih[0]), xrv.datasets.NIH_Dataset('.').pathology_maskscsv
    assert (
        len(boxes) == 984
        and boxes.name.nunique() == 880
        and boxes.name.isin(nih[1].name).all()
        and set(boxes.label) <= set(CHESTXRAY14)
    )
    assert boxes.name.tolist() == own['Image Index'].tolist() and boxes.label.tolist() == own['Finding Label'].tolist()
    assert (boxes[['x', 'y', 'w', 'h']].to_numpy() == own[['x', 'y', 'w', 'h']].to_numpy()).all()


def test_ablation_split(nih):
    "Within one patient of 70,000 on the real sizes; a change of the draw would show in the checksum (of the stand-in lists)"
    parts = ablation_split(nih[1])
    pre = parts[parts.part == 'pretrain']
    assert (
        abs(len(pre) - 70_000) <= nih[1].groupby('patient').size().max() / 2
        and shared_patients(parts.assign(split=parts.part)) == []
    )
    assert checksum(pre) == STAND_IN and checksum(ablation_split(nih[1][::-1]).query('part=="pretrain"')) == STAND_IN


def test_chexpert_labels_row_by_row(cx):
    "223,414 rows: 1, 0, unsure and blank as in CheX_Dataset, which writes NaN for unsure and 0 where No Finding is 1"
    df, own = (
        cx[cx.split == 'train'],
        xrv.datasets.CheX_Dataset('.', views=['AP', 'PA', 'L', 'LL', 'RL'], unique_patients=False),
    )
    assert len(df) == 223_414 and df.patient.nunique() == 64_540 and checksum(df) == CHECKSUMS['chexpert_train']
    assert ('CheXpert-v1.0-small/' + df['name']).tolist() == own.csv.Path.tolist()
    names = [n.replace('Effusion', 'Pleural Effusion') for n in own.pathologies]
    y = df[names].to_numpy(copy=True)
    healthy = (df['No Finding'] == 1).to_numpy()
    for i, n in enumerate(names):
        if n != 'Support Devices':
            y[healthy, i] = 0
    y[y == -1] = np.nan
    assert np.array_equal(y, own.labels, equal_nan=True)
    assert df.view.replace('lateral', 'L').tolist() == own.csv.view.tolist() and df.frontal.sum() == 191_027
    assert (label_matrix(df, CHEXPERT14) == (df[CHEXPERT14] == 1)).all().all()


def test_chexpert_policies(cx):
    "The counts of the release: Atelectasis 33,376 present and 33,739 unsure, Edema 52,246 and 12,984, …"
    df = cx[cx.split == 'train']
    sums = dict(
        zip(
            CHEXPERT5,
            np.array([[33_376, 33_739], [27_000, 8087], [14_783, 27_742], [52_246, 12_984], [86_187, 11_628]]),
        )
    )
    yes, unsure = np.array(list(sums.values())).T
    assert chexpert_labels(df, 'U-Zeros').sum(0, dtype=int).tolist() == yes.tolist()
    assert chexpert_labels(df, 'U-Ones').sum(0, dtype=int).tolist() == (yes + unsure).tolist()
    assert np.isnan(chexpert_labels(df, 'U-Ignore')).sum(0).tolist() == unsure.tolist()
    assert (chexpert_labels(df, 'U-MultiClass') == 2).sum(0).tolist() == unsure.tolist()
    ones = np.array([CHEXPERT_POLICY[c] == 'ones' for c in CHEXPERT5])
    assert (
        ones.tolist() == [True, False, False, True, False]
        and chexpert_labels(df).sum(0, dtype=int).tolist() == (yes + ones * unsure).tolist()
    )


def test_rsna_row_by_row(rsna):
    "26,684 images, targets and boxes as in RSNA_Pneumonia_Dataset"
    own = xrv.datasets.RSNA_Pneumonia_Dataset('.', views=['PA', 'AP'])
    by = rsna.set_index('patient').loc[own.csv.patientId]
    assert len(rsna) == 26_684 == len(own.csv) and checksum(rsna) == CHECKSUMS['rsna_pneumonia']
    assert (by.target.to_numpy() == own.labels[:, 0]).all() and by.target.sum() == 6012
    rows = own.raw_csv.dropna()
    ours = [(p, *b) for p, boxes in zip(rsna.patient, rsna.boxes) for b in boxes]
    assert len(ours) == 9555 and sorted(ours) == sorted(
        rows[['patientId', 'x', 'y', 'width', 'height']].itertuples(index=False, name=None)
    )
    assert abs((rsna.split == 'valid').sum() - 0.2 * 26_684) <= 1


def test_paper_pool(nih, cx):
    "The real CheXpert is not complained of; what is not there is"
    empty = nih[1][:0].assign(frontal=True)
    with pytest.warns(UserWarning) as w:
        pool = paper_pool(nih[1], cx, empty.assign(source='mimic_cxr'), empty.assign(source='mura'), frontal=True)
    said = str(w[0].message)
    assert 'mimic_cxr has 0 images, published are 377,110 (-377,110)' in said and 'chexpert' not in said
    assert pool.source.value_counts()['chexpert'] == 191_027 and not set(pool.name) & set(
        nih[1].name[nih[1].split == 'test']
    )


def test_official_lists():
    "86,524 and 25,596 images, 28,008 and 2,797 patients"
    root = os.environ.get('C2L_CHESTXRAY14')
    if not root:
        pytest.skip('set C2L_CHESTXRAY14 to a folder with Data_Entry_2017(_v2020).csv and both official lists')
    df = chestxray14(root, check=False, valid=0)
    assert (
        df.split.value_counts().to_dict() == dict(train=86_524, test=25_596)
        and checksum(df) == CHECKSUMS['chestxray14']
    )
    assert df.groupby('split').patient.nunique().to_dict() == dict(train=28_008, test=2797)
    assert abs((ablation_split(df).part == 'pretrain').sum() - 70_000) <= df.groupby('patient').size().max() / 2
