"Does C2L learn? 256 phantom patients, four radiographs each: pretraining must make the images of a patient neighbours, also of patients that it never saw."
import numpy as np, pytest, torch
from fastai.basics import Learner
from c2l_nb.data.cache import pretrain_dls
from c2l_nb.training.callback import C2LCallback, CosineDecay, c2l_opt
from c2l_nb.data.collections import label_matrix
from c2l_nb.evaluation.features import extract_features, linear_probe, retrieval_at_1
from c2l_nb.method.encoder import create_encoder
from c2l_nb.training.monitoring import HealthCallback
from c2l_nb.evaluation.metrics import auroc
from c2l_nb.data.phantom import phantom_batch

FINDINGS = ['Atelectasis', 'Cardiomegaly', 'Effusion', 'Infiltration', 'Mass', 'Nodule']

@pytest.fixture(scope='module')
def phantoms():
    "Images and their table: 256 patients to train on, 300 others"
    return phantom_batch([s for s in range(256) for _ in range(4)], [0, 1, 2, 3]*256, size=48), \
           phantom_batch([s for s in range(1000, 1300) for _ in range(2)], [0, 1]*300, size=48)

def scores(model, phantoms):
    "Retrieval among the images trained on and among the others; mean AUROC of a linear probe on the others"
    (images, meta), (others, their) = phantoms
    feats, theirs = extract_features(model, images), extract_features(model, others)
    p, _ = linear_probe(feats, label_matrix(meta, FINDINGS), theirs, groups=meta.patient.values)
    y = torch.as_tensor(label_matrix(their, FINDINGS))
    probe = np.mean([auroc(a, b) for a, b in zip(y.T, p.T)])
    return retrieval_at_1(feats, meta.patient.values), retrieval_at_1(theirs, their.patient.values), probe

@pytest.mark.filterwarnings("ignore:the queue of")
@pytest.mark.parametrize('seed', [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_same_patient_is_found_again(phantoms, seed):
    "retrieval@1 rises by 10 points, of patients never seen by half; the probe gains on the untrained network; top-1 is 20 times chance"
    torch.manual_seed(seed)
    body = create_encoder('tiny', channels=1)
    c2l = C2LCallback(queue_size=1024, momentum=.99, crop=(.6, 1.), flip=0., jitter=.2, cutout=(1, 16), seed=seed)
    dls = pretrain_dls(phantoms[0][0][:, 0].numpy(), bs=64, seed=seed, device='cpu')
    learn = Learner(dls, body, opt_func=c2l_opt, cbs=[HealthCallback(), CosineDecay(warmup=.05), c2l])
    before = scores(learn.model, phantoms)
    with learn.no_bar(), learn.no_logging():
        learn.fit(28, lr=.005)
    after, top1 = scores(learn.model, phantoms), learn.health.log.top1.iloc[-1]
    print(f'seed {seed}: retrieval@1 {before[0]:.3f} -> {after[0]:.3f}, of others {before[1]:.3f} -> {after[1]:.3f}, probe {before[2]:.3f} -> {after[2]:.3f}, top-1 {top1:.3f}')
    assert after[0] - before[0] >= .10
    assert after[1] >= 1.5*before[1]
    assert after[2] > before[2]
    assert top1 >= 20/1025
