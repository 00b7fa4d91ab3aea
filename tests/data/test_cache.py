"The cache: what is read is kept, once, whole; what is wrong is said; batches are the same whoever gathers them"
import errno, json, multiprocessing, os, pickle, signal, time, tracemalloc, warnings
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from fastai.basics import Learner
from filelock import FileLock
from PIL import Image
from torch import nn
from c2l_nb.data import cache
from c2l_nb.data import cache as squares
from c2l_nb.data.cache import GOOD, PoolDL, RadiographCache, Squares, build_cache, labelled_dls, main, pretrain_dls
from c2l_nb.training.callback import C2LCallback, c2l_opt
from c2l_nb.data.cache import load_squares, read_items, read_squares, to_square
from c2l_nb.data.table import DataError
from stand_in import devices_in_fit, other_default

fork = pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
N,S = 40,16

def put(path, seed, hw=(40,30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, hw, dtype=np.uint8)).save(path)
    return str(path)

@pytest.fixture
def items(tmp_path):
    "Forty images, with columns of all kinds"
    paths = [put(tmp_path/f'images/{i:02}.png', i) for i in range(N)]
    return pd.DataFrame(dict(path=paths, patient=[f'{i//2:05}' for i in range(N)], split='train', labels=['', 'Mass|Nodule']*(N//2),
                             age=np.arange(N)/3, views=range(N), frontal=[True, False]*(N//2), note=[None, 'a, "b"']*(N//2)))

@pytest.fixture
def out(tmp_path): return tmp_path/'cache'

@pytest.fixture
def reads(tmp_path, monkeypatch):
    "Names of the files read, in whatever process, each with its process; `reads.wait` seconds before each"
    log, real = tmp_path/'reads.txt', squares.read_radiograph
    def read(path):
        time.sleep(reads.wait)
        with open(log, 'a') as f: f.write(f'{os.getpid()} {Path(path).stem}\n')
        return real(path)
    monkeypatch.setattr(squares, 'read_radiograph', read)
    def reads():
        found = [l.split() for l in log.read_text().splitlines()] if log.exists() else []
        log.unlink(missing_ok=True); reads.pids = {int(p) for p,_ in found}
        return sorted(n for _,n in found)
    reads.wait = 0
    return reads

def build(items, out, size=S, workers=0, **kw): return build_cache(items, out, size, workers=workers, progress=False, **kw)
def flags(out): return np.load(out/'log.npy')['flag']
def names(rows): return [f'{i:02}' for i in rows]
def content(out): return {f: (out/f).read_bytes() for f in ('images.npy', 'log.npy', 'bad.csv', 'rows.csv', 'cache.json')}

# ---- what is built

def test_is_what_was_read(items, out):
    c = build(items, out, workers=2)
    assert len(c)==N and c.images.shape==(N,S,S) and not len(c.bad) and 'images of 16 px' in repr(c)
    for i in (0,7,N-1):
        assert np.array_equal(c[i], to_square(squares.read_radiograph(items.path[i]), S))
    images,rows,_ = load_squares(items, S, workers=0, progress=False)
    assert np.array_equal(np.asarray(c.images), images) and np.array_equal(np.load(out/'images.npy'), images)

def test_table_comes_back_as_it_was(items, out):
    "Strings stay strings, empty stays empty, missing stays missing, numbers to the last bit"
    build(items, out)
    rows = RadiographCache(out).rows
    assert rows.patient[1]=='00000' and rows.labels[0]=='' and pd.isna(rows.note[0]) and rows.note[1]=='a, "b"'
    assert list(rows.columns)==list(items.columns)
    for c in ('age','views','frontal'): assert rows[c].dtype==items[c].dtype and (rows[c]==items[c]).all()
    assert rows.path.tolist()==items.path.tolist() and rows.labels.tolist()==items.labels.tolist()

def test_letterbox_keeps_all(tmp_path):
    white = np.full((40,20), 255, np.uint8)
    assert to_square(white, 16, 'letterbox').sum()==255*16*8 and to_square(white, 16).min()==255
    assert to_square(np.tile(white, (1,10)), 16, 'letterbox').shape==(16,16)
    assert to_square(np.ones((3,9000), np.uint8), 16).shape==(16,16)      # a strip does not become a poster

def test_processes_and_none_agree(items, out, tmp_path):
    build(items, out, workers=0); build(items, tmp_path/'two', workers=2)
    assert content(out)==content(tmp_path/'two')

def test_few_tasks_under_way(items):
    taken = []
    found = squares._in_processes((taken.append(i) or [(i,p)] for i,p in enumerate(items.path)), S, 'crop', 2)
    for n,_ in enumerate(found, 1): assert len(taken)<=n+4*2
    assert n==N

def test_killed_reader_is_reported(items, out, monkeypatch):
    "As by the kernel when memory ends: a clear error, and what was done is kept"
    real = squares.read_radiograph
    def read(path): return os._exit(9) if path.endswith('30.png') else real(path)
    monkeypatch.setattr(squares, 'read_radiograph', read)
    with pytest.raises(RuntimeError, match='fewer workers'): build(items, out, workers=1)
    monkeypatch.setattr(squares, 'read_radiograph', real)
    assert (flags(out)==GOOD).sum()>=8 and len(build(items, out))==N

# ---- bad images

def spoil(items):
    "Truncated, missing, empty, no image"
    p = [Path(items.path[i]) for i in (3,5,8,13)]
    p[0].write_bytes(p[0].read_bytes()[:300]); p[1].unlink(); p[2].write_bytes(b''); p[3].write_bytes(b'no image')
    return [3,5,8,13]

def test_bad_images_are_listed_and_skipped(items, out):
    where = spoil(items)
    with pytest.warns(UserWarning, match='4 of 40 images cannot be read'): c = build(items, out, workers=2)
    assert len(c)==N-4 and c.bad.index.tolist()==where and c.bad.path.tolist()==items.path[where].tolist()
    assert [w in r for w,r in zip(('cut off','cannot be opened','empty','no PNG'), c.bad.reason)]==[True]*4
    listed = pd.read_csv(out/'bad.csv')
    assert listed.row.tolist()==where and list(listed.columns)==['row','path','reason'] and listed.path.tolist()==items.path[where].tolist()
    for i in (2,4,30): assert np.array_equal(c[i], to_square(squares.read_radiograph(c.rows.path[i]), S))     # images and rows agree

@pytest.mark.filterwarnings('ignore:left out')
def test_bad_images_are_tried_again(items, out, reads):
    where = spoil(items); build(items, out); reads()
    for i in where[:2]: put(Path(items.path[i]), i)
    c = build(items, out)
    assert reads()==names(where) and c.bad.index.tolist()==where[2:] and len(c)==N-2

def test_most_bad_is_an_error_and_nothing_is_lost(items, out, reads):
    good = [Path(p).read_bytes() for p in items.path]
    for p in items.path[:25]: Path(p).write_bytes(b'x')
    with pytest.raises(DataError, match='25 of 40 images cannot be read'): build(items, out)
    assert len(RadiographCache(out))==15 and len(pd.read_csv(out/'bad.csv'))==25
    for p,b in zip(items.path, good): Path(p).write_bytes(b)
    reads(); os.utime(items.path[0])
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        assert len(build(items, out))==N
    assert set(names(range(25)))<=set(reads())

# ---- full disk

def assert_no_room(items, out, **kw):
    with pytest.raises(OSError) as e: build(items, out, **kw)
    assert 'GB of disk' in str(e.value) and 'GB are free' in str(e.value) and not (out/'images.npy').exists()
    return e.value

def test_no_room(items, out, monkeypatch):
    "Too little by the disk's own account, or when the space is taken; said before any image is read; then another size may be tried"
    real = cache.shutil.disk_usage
    monkeypatch.setattr(cache.shutil, 'disk_usage', lambda p: real(p)._replace(free=5000))
    assert assert_no_room(items, out).errno==errno.ENOSPC
    monkeypatch.setattr(cache.shutil, 'disk_usage', real)
    def full(*_): raise OSError(errno.ENOSPC, 'No space left on device')
    monkeypatch.setattr(os, 'posix_fallocate', full, raising=False)
    monkeypatch.setattr(squares, 'read_radiograph', None)
    assert assert_no_room(items, out).errno==errno.ENOSPC
    monkeypatch.undo()
    assert build(items, out, size=8).size==8

def test_no_room_for_such_a_file(items, out):
    "A real limit of the system"
    resource = pytest.importorskip('resource')
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, old[1]))
        assert_no_room(items, out, size=32)
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, old)
    assert len(build(items, out, size=32))==N

def test_space_is_taken_before(items, out, monkeypatch):
    "All blocks are there although nothing was read"
    def stop(path): raise KeyboardInterrupt
    monkeypatch.setattr(squares, 'read_radiograph', stop)
    with pytest.raises(KeyboardInterrupt): build(items, out, size=256)
    assert (out/'images.npy').stat().st_blocks*512>=N*256*256

# ---- killed

def child(f, *args, **kw):
    p = multiprocessing.get_context('fork').Process(target=f, args=args, kwargs=kw); p.start(); return p

def until(true, seconds=20):
    end = time.time()+seconds
    while not true(): assert time.time()<end; time.sleep(.002)

def alive(pid):
    try: return Path(f'/proc/{pid}/stat').read_text().split()[2]!='Z'
    except OSError: return False

@fork
@pytest.mark.parametrize('workers', [0,2])
def test_kill_and_go_on(items, out, tmp_path, reads, workers):
    "SIGKILL twice; nothing that was done is read again; the result is that of an undisturbed run, to the byte; no process is left behind"
    build(items, tmp_path/'whole'); reads()
    reads.wait,done,all_reads = .004,0,0
    for more in (6,8):
        p = child(build, items, out, workers=workers)
        until(lambda: (out/'log.npy').exists() and (flags(out)==GOOD).sum()>=done+more)
        os.kill(p.pid, signal.SIGKILL); p.join()
        reads_now = reads(); all_reads += len(reads_now)
        if Path('/proc').exists(): until(lambda: not any(map(alive, reads.pids-{os.getpid()})))
        reads()
        done = int((flags(out)==GOOD).sum())
        with pytest.raises(DataError, match='unfinished.*give the same command again'): RadiographCache(out)
    assert 14<=done<N
    missing = names(np.flatnonzero(flags(out)!=GOOD))
    build(items, out, workers=workers)
    assert reads()==missing
    assert content(out)==content(tmp_path/'whole')

def test_pixels_without_flag_do_not_count(items, out, tmp_path, reads):
    "What SIGKILL between pixels and flag leaves: half a square, no flag"
    build(items, tmp_path/'whole'); build(items, out); reads()
    log,images = (np.load(out/f'{n}.npy', mmap_mode='r+') for n in ('log','images'))
    log['flag'][[4,9]] = 0; images[[4,9],:5] = 77; log.flush(); images.flush()
    with pytest.raises(DataError, match='2 of 40'): RadiographCache(out)
    build(items, out)
    assert reads()==names([4,9]) and content(out)==content(tmp_path/'whole')

def test_killed_before_the_first_image(items, out, tmp_path):
    "Any file but the last may be there, finished or not"
    build(items, tmp_path/'whole')
    for have in (['lock','rows.csv','cache.json.new'], ['lock','rows.csv','cache.json','images.npy.new'], ['rows.csv','cache.json','images.npy','log.npy.new']):
        folder = tmp_path/str(len(have))/have[-1]; folder.mkdir(parents=True)
        for f in have: (folder/f).write_bytes((tmp_path/'whole'/f).read_bytes() if f in content(tmp_path/'whole') else b'half')
        with pytest.raises(DataError): RadiographCache(folder)
        assert len(build(items, folder))==N and content(folder)==content(tmp_path/'whole')

def test_interrupt(items, out, monkeypatch):
    real, n = squares.read_radiograph, []
    def read(path):
        n.append(path)
        if len(n)==20: raise KeyboardInterrupt
        return real(path)
    monkeypatch.setattr(squares, 'read_radiograph', read)
    with pytest.raises(KeyboardInterrupt): build(items, out)
    assert len(build(items, out))==N and N<=len(n)<=N+8

@fork
def test_two_builders(items, out, tmp_path, reads):
    "The second is told; the first is not disturbed"
    build(items, tmp_path/'whole')
    reads.wait = .1
    p = child(build, items, out, workers=2)
    until(lambda: (out/'log.npy').exists())
    with pytest.raises(DataError, match='another process is building this cache'):
        with pytest.MonkeyPatch.context() as mp:
            mp.setattr(cache, 'FileLock', lambda path, timeout: FileLock(path, timeout=.2))
            build(items, out)
    p.join()
    assert p.exitcode==0 and content(out)==content(tmp_path/'whole')

# ---- what does not fit

def test_changed_source_is_read_again_alone(items, out, reads):
    build(items, out); reads(); old = np.asarray(RadiographCache(out).images).copy()
    put(Path(items.path[7]), 99); os.utime(items.path[9], (1,1)); os.unlink(items.path[11])
    with pytest.warns(UserWarning, match='read again: 2 files changed'): c = build(items, out)
    assert reads()==names([7,9])
    now = np.asarray(c.images)
    assert len(c)==N and (now[7]!=old[7]).any() and np.array_equal(np.delete(now, 7, 0), np.delete(old, 7, 0))     # the gone one is kept
    build(items, out); assert reads()==[]

def test_other_settings_are_refused(items, out):
    build(items, out); before = content(out)
    def refused(what, *a, **kw):
        with pytest.raises(DataError, match=what): build(*a, **kw)
    refused('size 16 there and 8 here', items, out, size=8)
    refused('fit crop there and letterbox here', items, out, fit='letterbox')
    refused('images 40 there and 39 here', items[:39], out)
    refused('images 40 there and 41 here', pd.concat([items, items[:1]]), out)
    refused('other images, or another order', items[::-1], out)
    refused('fit of', items, out, fit='squash'); refused('size above 0', items, out, size=0); refused('got 0 images', items[:0], out)
    assert content(out)==before

def test_labels_may_change(items, out, reads):
    "The table belongs to the user, the pixels to the files"
    build(items, out); reads()
    c = build(items.assign(labels='Effusion', fold=3).drop(columns='age'), out)
    assert reads()==[] and set(c.rows.labels)=={'Effusion'} and c.rows.fold.dtype==np.int64 and 'age' not in c.rows

def test_foreign_folders(items, out, tmp_path):
    with pytest.raises(DataError, match='no cache.json'): RadiographCache(out)
    with pytest.raises(DataError, match='no cache.json'): RadiographCache(tmp_path)
    with pytest.raises(DataError, match='is no cache, but holds images'): build(items, tmp_path)
    with pytest.raises(DataError, match='is a file'): build(items, Path(items.path[0]))

@pytest.mark.parametrize('spoil', ['cut','edited','list'])
def test_damaged_meta(items, out, spoil):
    build(items, out); meta = out/'cache.json'; text = meta.read_text()
    meta.write_text(dict(cut=text[:40], edited=text.replace('"size": 16','"size": 17'), list='[]')[spoil])
    for f in (lambda: RadiographCache(out), lambda: build(items, out)):
        with pytest.raises(DataError, match='cache.json: is damaged; delete'): f()

def test_damaged_files(items, out):
    build(items, out); whole = content(out)
    def damaged(name, data, match):
        (out/name).write_bytes(data)
        with pytest.raises(DataError, match=match): RadiographCache(out)
        (out/name).write_bytes(whole[name])
    damaged('images.npy', whole['images.npy'][:5000], 'damaged')
    damaged('images.npy', whole['log.npy'], 'damaged')
    damaged('log.npy', b'', 'damaged')
    damaged('rows.csv', b'a\n1\n', 'damaged'); damaged('bad.csv', b'', 'damaged')
    (out/'bad.csv').unlink()
    with pytest.raises(DataError, match='build it again, images are kept'): RadiographCache(out)
    build(items, out); (out/'log.npy').unlink()
    with pytest.raises(DataError, match='unfinished'): RadiographCache(out)

# ---- the view

def test_squares_index_as_arrays_do(items, out):
    Path(items.path[3]).unlink()
    with warnings.catch_warnings(): warnings.simplefilter('ignore'); c = build(items, out)
    a,im = np.asarray(c.images), c.images
    mask = np.arange(N-1)%3==0
    for i in (0, -1, np.int64(5), slice(None), slice(30,2,-7), [5,5,0], mask, np.array([], int), torch.tensor([4,2]).numpy()):
        assert np.array_equal(im[i], a[i]) and im[i].dtype==np.uint8
    assert len(list(im))==N-1 and np.array_equal(im.view(mask)[[2,1]], a[mask][[2,1]]) and im.view(mask).shape==(13,S,S)
    with pytest.raises(IndexError): im[N-1]
    with pytest.raises(ValueError): im.map[0] = 0
    im[0][:] = 0; assert np.array_equal(im[0], a[0])                        # a copy

def test_pickle_carries_no_pixels(items, out):
    c = build(items, out, size=64)
    dls = pretrain_dls(c, bs=8, device='cpu', workers=2)
    assert len(pickle.dumps(c.images))<N*8+1000 and len(pickle.dumps(dls.train))<N*64*64//10
    again = pickle.loads(pickle.dumps(dls.train))
    for (x,i),(y,j) in zip(dls.train, again): assert torch.equal(x,y) and torch.equal(i,j)

# ---- batches

def batches(dl, epoch=0): dl.epoch = epoch; return [(x.clone(),i.clone()) for x,i in dl]

def same(a, b): return len(a)==len(b) and all(torch.equal(x,u) and torch.equal(i,v) for (x,i),(u,v) in zip(a,b))

def test_workers_change_nothing(items, out):
    c = build(items, out)
    none,two,memory = (pretrain_dls(im, bs=8, seed=3, device='cpu', workers=w).train for im,w in ((c,0),(c,2),(np.asarray(c.images),0)))
    for e in (0,1):
        a = batches(none, e)
        assert same(a, batches(two, e)) and same(a, batches(memory, e)) and len(a)==5
        for x,i in a: assert x.dtype==torch.uint8 and x.shape==(8,1,S,S) and np.array_equal(x[:,0].numpy(), c[i.numpy()])
    assert not same(batches(none, 0), batches(none, 1))

@pytest.mark.parametrize('workers', [0,2])
def test_start_within_an_epoch(items, out, workers):
    dl = pretrain_dls(build(items, out), bs=8, device='cpu', workers=workers).train
    whole = batches(dl, 4)
    for start in (0,2,5):
        dl.start = start
        assert same(batches(dl, 4), whole[start:]) and dl.start==0 and len(dl)==5
        assert same(batches(dl, 4), whole)

def test_next_batch_is_announced(items, out, monkeypatch):
    "Before a batch is handed out, the disk was asked for the one after it; the last one announces none"
    asked, real = [], Squares.announce
    dl = pretrain_dls(build(items, out), bs=16, device='cpu').train
    monkeypatch.setattr(Squares, 'announce', lambda self, i: (asked.append(np.sort(i).tolist()), real(self, i)))
    order = [np.sort(i.numpy()).tolist() for _,i in dl]
    assert asked==[order[1],order[0],order[1]] and len(order)==2

def test_part_of_a_cache(items, out):
    "ids are positions in the rows of the cache, whichever part is taken"
    c = build(items, out)
    mask = np.arange(N)%3==1
    for images in (c, c.images, np.asarray(c.images)):
        seen = batches(pretrain_dls(images, bs=4, device='cpu', rows=mask).train)
        assert {int(j) for _,i in seen for j in i}<=set(np.flatnonzero(mask)) and len(seen)==13//4
        for x,i in seen: assert np.array_equal(x[:,0].numpy(), c[i.numpy()])
    with pytest.raises(ValueError, match='smaller bs'): pretrain_dls(c, bs=16, rows=mask)

@pytest.mark.filterwarnings('ignore:the queue of', 'ignore:Your generator is empty')
@pytest.mark.parametrize('workers', [0,2])
def test_learner_trains_from_a_cache(items, out, workers):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(1,4,3,2), nn.BatchNorm2d(4), nn.ReLU())
    learn = Learner(pretrain_dls(build(items, out), bs=8, device='cpu', workers=workers), body, opt_func=c2l_opt,
                    cbs=C2LCallback(size=12, queue_size=24, dim=8))
    with learn.no_bar(), learn.no_logging(): learn.fit(2, .01)
    assert learn.model.seen==10
    total = sum(p.double().sum() for p in learn.model.student.parameters()).item()
    found = test_learner_trains_from_a_cache.__dict__.setdefault('found', total)
    assert found==total                                                      # the same to the bit with 0 and 2

# ---- the device

def test_loaders_and_model_are_on_the_default_device(other_default):
    images = np.zeros((16, 8, 8), np.uint8)
    body = nn.Sequential(nn.Conv2d(1, 4, 3, 2), nn.BatchNorm2d(4), nn.ReLU())
    learn = Learner(pretrain_dls(images, bs=8), body, cbs=C2LCallback(size=12, queue_size=24, dim=8))
    assert devices_in_fit(learn) == {'meta'}
    labelled = labelled_dls(images, np.zeros((16, 2)), images, np.zeros((16, 2)), bs=8)
    assert {t.device.type for dl in labelled for batch in dl for t in batch} == {'meta'}

def test_the_device_that_was_asked_for_is_taken(other_default):
    images = np.zeros((16, 8, 8), np.uint8)
    labelled = labelled_dls(images, np.zeros(16), images, np.zeros(16), device='cpu')
    for dls in (pretrain_dls(images, bs=8, device='cpu'), labelled):
        assert dls.device.type == 'cpu' and {t.device.type for batch in dls.train for t in batch} == {'cpu'}
    with pytest.raises(ValueError, match="device 'gpu' cannot be used here"):
        pretrain_dls(images, bs=8, device='gpu')

@pytest.mark.parametrize('device, pinned', [('meta', False), ('cuda', True)])
def test_memory_is_pinned_for_cuda_alone(device, pinned, monkeypatch):
    monkeypatch.setattr('c2l_nb.data.cache.choose_device', torch.device)
    dls = pretrain_dls(np.zeros((16, 8, 8), np.uint8), bs=8, device=device)
    assert dls.train.pin_memory == pinned and dls.device.type == device

def test_labels_are_of_a_type_that_every_gpu_has():
    "A Mac's GPU has no float64"
    images, y = np.zeros((4, 8, 8), np.uint8), np.array([0., 1., np.nan, 1.])
    (_, found), = labelled_dls(images, y[:, None], images, y[:, None], device='cpu').train
    assert found.dtype == torch.float32 and np.array_equal(found[:, 0].numpy(), y, equal_nan=True)

def test_pixels_are_copied_once(tmp_path):
    np.save(tmp_path/'images.npy', np.ones((64, 128, 128), np.uint8))
    squares = Squares(tmp_path/'images.npy')
    tracemalloc.start()
    try:
        batch = squares[np.arange(0, 64, 2)]
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert batch.nbytes < peak < 1.5*batch.nbytes and type(batch) is np.ndarray and batch.flags.writeable

# ---- the command

def test_command(items, out, tmp_path, capsys):
    items.assign(file=[Path(p).name for p in items.path], body_part=['chest','knee']*(N//2)).drop(columns='path').to_csv(tmp_path/'images/index.csv', index=False)
    main(str(tmp_path/'images/index.csv'), str(out), size=S, where='body_part=chest', workers=1)
    assert f'Wrote {out}: 20 images of 16 px' in capsys.readouterr().out
    c = RadiographCache(out)
    assert c.rows.patient.tolist()==items.patient[::2].tolist() and set(c.rows.body_part)=={'chest'}
    def fails(match, *a, **kw):
        with pytest.raises(SystemExit, match=match): main(*a, **dict(out=str(out), size=S, workers=0) | kw)
    fails('c2l_cache: .*other settings', str(tmp_path/'images'))
    fails('neither a folder nor an index CSV', str(tmp_path/'nothing'), out=str(tmp_path/'x'))
    fails('no row has body_part=hand', str(tmp_path/'images/index.csv'), where='body_part=hand')
    fails('--data FOLDER'); fails('fit of', str(tmp_path/'images'), out=str(tmp_path/'y'), fit='squash')

def test_progress_bar(items, out, capsys):
    from fastprogress.fastprogress import force_console_behavior
    bar = force_console_behavior()[1]
    with pytest.MonkeyPatch.context() as mp:
        mp.setattr(squares, 'progress_bar', bar)
        build_cache(items, out, S, workers=0)
    assert '40/40' in capsys.readouterr().out

def test_a_table_of_another_length_is_damage(items, out):
    "rows.csv with fewer rows than the cache has squares"
    build_cache(items, out, 16, workers=0, progress=False)
    lines = (out/'rows.csv').read_text(encoding='utf-8').splitlines(True)
    (out/'rows.csv').write_text(''.join(lines[:-1]), encoding='utf-8')
    with pytest.raises(DataError, match='rows.csv has'): RadiographCache(out)
