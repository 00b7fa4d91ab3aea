"""The commands as a user gives them, none told a device: killed and resumed, under torchrun, and each task once."""
import os, signal, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from c2l_nb.tasks import detect
from c2l_nb.tasks import classify as finetune
from c2l_nb.tasks import embed as gallery
from c2l_nb.training.run_folder import checkpoints, load_checkpoint
from gpu_learner import phantoms

pytestmark = [pytest.mark.cuda, pytest.mark.filterwarnings('ignore')]
HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FULL_RUN = '--arch resnet18 --size 64 --epochs 4 --batch 32 --phantoms 256 --minutes 0.0001'.split()   # 16 steps, a checkpoint after each
TOY_RUN = '--arch tiny --size 32 --epochs 3 --batch 4 --phantoms 24 --set queue_size=48'.split()   # 9 steps, a checkpoint an epoch
SECONDS = dict(cuda=100, cpu=300)                                                           # that a process may take


class Runs:
    "Processes that go on while other tests run"
    def __init__(self, folder, toy):
        self.folder, self.toy, self.live = folder, toy, {}
        self.arguments = TOY_RUN if toy else FULL_RUN
        self.seconds = SECONDS['cpu' if toy else 'cuda']
        self.early = 3 if toy else 5                         # steps after which a run is killed

    def start(self, name, *command):
        paths = [str(ROOT), os.environ.get('PYTHONPATH', '')]
        env = dict(os.environ, MPLBACKEND='agg', PYTHONPATH=os.pathsep.join(p for p in paths if p), PYTHONWARNINGS='ignore')
        out = open(self.folder/f'{name}.log', 'a')
        command = [sys.executable, *map(str, command)]
        self.live[name] = subprocess.Popen(command, env=env, stdout=out, stderr=out, start_new_session=True)

    def pretrain(self, name, *options):
        self.start(name, HERE/'command.py', 'pretrain', '--out', self.folder/name, *self.arguments, *options)

    def log(self, name):
        return (self.folder/f'{name}.log').read_text()[-3000:]

    def wait(self, name, there):
        "Until `there()`, or the end of the process; AssertionError with its output if that failed"
        end = time.monotonic() + self.seconds
        while not there():
            code = self.live[name].poll()
            assert code in (None, 0) and time.monotonic() < end, self.log(name)
            if code == 0:
                return
            time.sleep(.05)

    def kill(self, name):
        "SIGKILL to the process and those it started"
        try:
            os.killpg(self.live[name].pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        self.live[name].wait()

    def killed_and_resumed(self, name, *options):
        "In the middle; the run then goes on to its end"
        self.pretrain(name, *options)
        self.wait(name, lambda: self.steps(name) >= self.early)
        assert self.live[name].poll() is None and not self.trained(name), 'ended before it could be killed'
        self.kill(name)
        self.pretrain(name, '--resume', *options)

    def steps(self, name):
        return max([int(path.name.split('-')[1]) for path in checkpoints(self.folder/name)], default=0)

    def trained(self, name):
        "The backbone is written when training is over, before probe, map and report"
        return (self.folder/name/'backbone.safetensors').is_file()


@pytest.fixture(scope='module')
def runs(device, tmp_path_factory):
    "Three runs of c2l_pretrain, of which one is left alone, and a process under torchrun, all at the same time"
    runs = Runs(tmp_path_factory.mktemp('runs'), device.type == 'cpu')
    with ThreadPoolExecutor() as threads:
        runs.pretrain('whole', '--deterministic')
        runs.cut = threads.submit(runs.killed_and_resumed, 'cut', '--deterministic')
        if not runs.toy:
            runs.loose = threads.submit(runs.killed_and_resumed, 'loose')
            torchrun(runs)
        yield runs
        for name in list(runs.live):
            runs.kill(name)
    for name in runs.live:
        runs.kill(name)


def torchrun(runs):
    runs.start('torchrun', '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '1', HERE/'nccl_worker.py')


@pytest.fixture
def on_device(device):
    "What the test did took memory of the GPU"
    if device.type != 'cuda':
        yield
        return
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    yield
    assert torch.cuda.max_memory_allocated() - before > 2**20, 'nothing ran on the GPU'


def test_finetune(runs, tmp_path, on_device):
    finetune.main(out=str(tmp_path/'out'), init='untrained', size=48, epochs=1, batch=16, phantoms=240, resamples=20)
    assert (tmp_path/'out/report.html').is_file()


def test_detect(runs, tmp_path, on_device):
    detect.main(out=str(tmp_path/'out'), size=64, epochs=1, batch=4, width=32, phantoms=60)
    assert (tmp_path/'out/report.html').is_file()


def test_killed_and_resumed_is_equal_to_the_bit(runs):
    "`--deterministic`: every tensor of the last checkpoint and every number of log.csv but the time"
    runs.cut.result()
    for name in ('whole', 'cut'):
        runs.wait(name, lambda: runs.trained(name))
    runs.kill('cut')
    if runs.toy:
        runs.kill('whole')                                   # UMAP is the CPU's anyway, and slow to begin
    (a, _), (b, _) = (load_checkpoint(runs.folder/name) for name in ('whole', 'cut'))
    assert a.keys() == b.keys() and [name for name in a if not torch.equal(a[name], b[name])] == []
    logs = [pd.read_csv(runs.folder/name/'log.csv').drop(columns='time') for name in ('whole', 'cut')]
    pd.testing.assert_frame_equal(*logs, check_exact=True)


def test_without_deterministic_the_resumed_run_is_near(runs):
    if runs.toy:
        pytest.skip('a CPU repeats itself without being told')
    runs.loose.result()
    runs.wait('loose', lambda: runs.trained('loose'))
    runs.kill('loose')
    a, b = (pd.read_csv(runs.folder/name/'log.csv') for name in ('whole', 'loose'))
    np.testing.assert_allclose(a.train_loss, b.train_loss, rtol=.05)


def test_one_process_under_torchrun(runs):
    if runs.toy:
        torchrun(runs)
    runs.wait('torchrun', lambda: False)
    assert 'equal' in runs.log('torchrun')


def test_embed(runs, tmp_path, on_device):
    "With the backbone that was just pretrained"
    (tmp_path/'images').mkdir()
    for i, image in enumerate(phantoms(12, 48)):
        Image.fromarray(image).save(tmp_path/f'images/{i}.png')
    file = runs.folder/'cut/backbone.safetensors'
    gallery.main(str(file), str(tmp_path/'images'), out=str(tmp_path/'out'), k=2, most=0, workers=0)
    assert len(pd.read_csv(tmp_path/'out/neighbours.csv')) == 24


def test_where_it_ran_is_recorded(runs, device):
    _, meta = load_checkpoint(runs.folder/'whole')
    assert meta['made_with']['device'] == device.type and meta['made_with']['deterministic']


def test_the_run_that_was_left_alone_ends_well(runs):
    "Probe, map and report"
    if runs.toy:
        pytest.skip('it was ended when its training was over')
    runs.wait('whole', lambda: False)
    names = {path.name for path in (runs.folder/'whole').iterdir()}
    assert {'backbone.safetensors', 'config.json', 'embedding.png', 'log.csv', 'report.html'} <= names
