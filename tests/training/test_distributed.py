"""Several processes that talk by gloo, on this CPU: tests/helpers/distributed_worker.py runs the checks in 2 and in 4 of them, once, and prints
what it found. NCCL and GPUs were not at hand: their part (`setup`'s choice of device, SyncBatchNorm's arithmetic) is not run here.
"""
import json, os, signal, subprocess, sys, time
from pathlib import Path
import pytest, torch
from fastai.basics import Learner
from c2l_nb.training import distributed as module
from c2l_nb.data.cache import pretrain_dls
from c2l_nb.training.callback import C2LCallback
from c2l_nb.core import rank0, ranks
from c2l_nb.training.distributed import DistributedC2L, distributed, mine, run_mark, setup, share_batches
from c2l_nb.method.encoder import create_encoder
from c2l_nb.method.model import C2L, C2LConfig
from c2l_nb.data.phantom import phantom_batch

pytest.importorskip('accelerate', reason="needs accelerate: pip install 'c2l_nb[dist]'")
pytestmark = pytest.mark.filterwarnings('ignore:the queue of')
linux = pytest.mark.skipif(sys.platform != 'linux', reason='forks processes')
WORKER, ROOT = Path(__file__).parents[1]/'helpers'/'distributed_worker.py', Path(__file__).resolve().parents[2]
PATHS = [str(ROOT), *os.environ.get('PYTHONPATH', '').split(os.pathsep)]
ENV = {k: v for k, v in os.environ.items() if k not in ('RANK', 'WORLD_SIZE', 'LOCAL_RANK')}
ENV |= dict(OMP_NUM_THREADS='1', PYTHONPATH=os.pathsep.join(p for p in PATHS if p))

@pytest.fixture(scope='module')
def found(tmp_path_factory):
    command = [sys.executable, WORKER, 'checks', tmp_path_factory.mktemp('runs')]
    done = subprocess.run(command, env=ENV, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])

@pytest.fixture(params=['2', '4'], ids=['2 processes', '4 processes'])
def f(found, request): return found[request.param]

# ---- The same step ------------------------------------------------------------------------------------------------------

@linux
@pytest.mark.parametrize('config', ['paper', 'official', 'sequential', 'moco', 'other', 'mask_of_a_device', 'batchnorm_shuffle', 'batchnorm_local'])
def test_processes_do_what_one_would(f, config):
    """Three steps in float64 against one process on the concatenated batch with the same blocks as `perm`: views, loss, keys, every gradient, student, teacher,
    queue and pointer to relative 1e-10. With BatchNorm the one process normalises part by part, and shuffles before the teacher."""
    got = f[config]
    assert got['worst'] < 1e-10 and got['agreed'] and got['steps'] == 3 and got['moved'] > 1e-3

@linux
def test_shuffling_matters_only_with_batchnorm(f):
    assert f['shuffle_matters']['without_bn'] < 1e-6 and f['shuffle_matters']['with_bn'] > 1e-2

@linux
def test_draws(f):
    "One lam; partners of the own process; no two images of the whole batch are turned alike, by an augmentation of the user's neither"
    assert f['draws'] == dict(one_lam=True, perm=True, views_differ=True)

# ---- Within Learner -----------------------------------------------------------------------------------------------------

@linux
def test_learner_of_several_is_learner_of_one(f):
    "MoCo without BatchNorm: two epochs end where those of one process end, with its schedule and loss; afterwards nothing is left of it"
    got = f['learner_is_one_process']
    assert got['worst'] < 1e-5 and got['loss'] < 1e-5 and got['agreed'] and got['steps'] == 8 and got['ptr'] == 8*8 % 50 and got['lrs'] and got['undone']

@linux
@pytest.mark.parametrize('how', ['batchnorm', 'bf16', 'fp16', 'accumulation'])
def test_queues_and_teachers_agree_after_every_step(f, how):
    "Student, teacher, queue and pointer to the bit, also in half precision and with accumulation and clipping"
    assert f[f'learner_{how}'] == dict(agreed=True, steps=8, moved=['queue', 'student', 'teacher'], finite=True)

@linux
def test_overflow_in_one_process_skips_the_step_in_all(f):
    "Nothing moves in that batch, all moves in the next"
    assert f['overflow_in_one_process'] == dict(agreed=True, changed=[[], ['queue', 'student', 'teacher']], finite=True)

@linux
def test_infinite_key_in_one_process_enters_no_queue(f):
    assert f['infinite_key_in_one_process'] == dict(agreed=True, changed=[['student', 'teacher'], ['queue', 'student', 'teacher']], finite=True)

@linux
def test_guard_stops_all_processes_or_none(f):
    "A loss that is no number, or collapse, in one process ends the run in all, in the same batch (else the others would wait for ever)"
    assert f['guard_loss']['reason'].startswith('the loss is nan') and f['guard_loss']['seen'] == 1 and f['guard_loss']['agreed']
    assert f['guard_spread']['reason'].startswith('collapse') and 'spread 0.0010' in f['guard_spread']['reason'] and f['guard_spread']['seen'] == 8
    assert f['guard_nothing'] == dict(reason='', seen=12, agreed=True)

@linux
def test_processes_wait_for_the_first(f):
    "`rank0` outlasts the time that the default group gives a broadcast (30 minutes with gloo, ten with NCCL; here 1 s)"
    assert f['rank0_takes_its_time'] == 'built'

@linux
def test_sync_batchnorm_reaches_student_and_teacher(f):
    "Two layers each, in training mode, none left; DDP refuses them on a CPU, so their arithmetic is not run here"
    got = f['sync_bn']
    assert got['layers'] == [[True]*2]*2 and got['left'] == 0 and 'SyncBatchNorm' in got['error']

@linux
def test_what_cannot_be_shared_is_refused_before_the_first_step(f):
    "In all processes alike (else they would wait for each other), and they can go on"
    no = f['refusals']
    assert 'cannot be shared equally' in no['share'] and 'differ in bs' in no['bs'] and 'differ in images' in no['images']
    assert 'differ in seed' in no['seed'] and 'drop_last=True' in no['short'] and 'distributed(learn)' in no['outside']
    assert no['rank0'] == 'ValueError: of process 0' and no['after'] == [True]

# ---- Checkpoints ---------------------------------------------------------------------------------------------------------

@linux
def test_resume_is_exact(f):
    "Cut off within epoch 1 and resumed by as many processes: every tensor to the bit, and log.csv but for the time"
    assert f['resume'] == dict(differ=[], logs=True, rows=4)

@linux
def test_resume_on_another_number_of_processes(found):
    "Two stopped, four go on: exact (to float32 rounding) where no step depends on the cut, refused where mixing or BatchNorm does"
    got = found['4']['resume_elsewhere']
    assert got['worst'] < 1e-5
    assert all('pool, 2 processes' in got[name] and got[name].startswith('CheckpointError') for name in ('mixed', 'normed'))

# ---- One process ---------------------------------------------------------------------------------------------------------

def test_one_process_needs_nothing():
    "`setup` and `distributed` leave everything alone"
    learn = Learner(pretrain_dls(phantom_batch(8, size=16)[0][:, 0].numpy(), 4), create_encoder('resnet18', 1), cbs=C2LCallback(queue_size=8))
    with distributed(learn) as same: assert same is learn and type(learn.model) is C2L
    assert setup() == ranks() == (0, 1) and rank0(lambda x: x + 1, 1) == 2 and run_mark('m', learn) == 'm'
    assert torch.equal(mine(torch.arange(3)), torch.arange(3))

def test_share_batches(monkeypatch):
    "Each image once, the same number everywhere, workers or not, own methods put back"
    dl = pretrain_dls(torch.arange(22).byte().view(22, 1, 1).numpy(), 8).train
    whole = [ids.tolist() for _, ids in dl]
    for workers in (0, 2):
        parts = []
        for rank in range(4):
            monkeypatch.setattr(module, 'ranks', lambda: (rank, 4))
            monkeypatch.setattr(module, 'rank0', lambda f: f())
            dl.fake_l.num_workers = workers
            with share_batches(dl): parts.append([ids.tolist() for _, ids in dl]); assert len(dl) == 2
        assert [sum(batch, []) for batch in zip(*parts)] == whole and {len(b) for p in parts for b in p} == {2}
    dl.fake_l.num_workers = 0
    assert [ids.tolist() for _, ids in dl] == whole and not {'sample', 'get_idxs', 'chunkify'} & set(vars(dl))

def test_ddp_leaves_the_queue_alone():
    "The names that DDP is told to ignore are those of the queue's buffers, all of them"
    model = DistributedC2L(create_encoder('resnet18', 1), C2LConfig(queue_size=8, false_negatives='image'))    # with ids, the most there can be
    assert set(model._ddp_params_and_buffers_to_ignore) == {n for n, _ in model.named_buffers() if n.startswith('queue')}
    assert C2L(create_encoder('resnet18', 1), C2LConfig(queue_size=8)).distributed is False and model.distributed

# ---- A killed process ----------------------------------------------------------------------------------------------------

def torchrun(folder, *args):
    return subprocess.Popen([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', WORKER, 'train', folder, *args],
                            env=ENV, stderr=subprocess.PIPE, text=True)

@linux
@pytest.mark.slow
def test_killed_process_ends_all_and_the_run_resumes(tmp_path):
    "SIGKILL of rank 1 after epoch 0: torchrun says so and fails within a minute, nobody is left; resumed, the run ends with the bits of an uninterrupted one"
    for name in ('whole', 'cut'): (tmp_path/name).mkdir()
    whole = torchrun(tmp_path/'whole', '--epochs', '30')
    assert whole.wait(300) == 0, whole.stderr.read()[-3000:]
    run, mark = torchrun(tmp_path/'cut', '--epochs', '30'), tmp_path/'cut'/'epoch0.json'
    while not (mark.exists() and mark.read_text().endswith(']')):
        assert run.poll() is None, run.stderr.read()[-3000:]
        time.sleep(.02)
    pids, start = json.loads(mark.read_text()), time.monotonic()
    os.kill(pids[1], signal.SIGKILL)
    said = run.communicate(timeout=900)[1]
    print(f'ended after {time.monotonic() - start:.1f} s')
    assert run.returncode != 0 and f'pid: {pids[1]}' in said and ('SIGKILL' in said or 'Signal 9' in said), said[-3000:]
    for pid in pids:
        with pytest.raises(ProcessLookupError): os.kill(pid, 0)
    assert not (tmp_path/'cut'/'end.txt').exists()
    again = torchrun(tmp_path/'cut', '--epochs', '30', '--resume')
    assert again.wait(300) == 0, again.stderr.read()[-3000:]
    assert (tmp_path/'cut'/'end-again.txt').read_text() == (tmp_path/'whole'/'end.txt').read_text()
