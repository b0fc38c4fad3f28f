"What stands below all pages: arguments that are refused once, noise that is a function of (seed, column), whole files"

import os
import signal
import subprocess
import sys
import time
import zipfile
from functools import partial

import numpy as np
import pytest
import torch

from hessian_overlap import files
from hessian_overlap.checks import (
    check_basis,
    check_choice,
    check_finite,
    check_ks,
    check_order,
    check_seed,
    check_whole,
    row_blocks,
)
from hessian_overlap.files import DamagedError, open_sealed, read_sealed, sweep, write_atomic, write_sealed
from hessian_overlap.noise import STREAM, column_noise, stream_seed

nan, inf = float('nan'), float('inf')


def basis(n=200, k=7, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, k, dtype=dtype, generator=g)).Q


# --- checks ---------------------------------------------------------------------------------------

NO_INTEGERS = [1.5, 1.0, '1', None, True, np.bool_(True), torch.tensor(True), torch.ones(2, dtype=int), [1], nan, 1j]


@pytest.mark.parametrize('bad', NO_INTEGERS, ids=repr)
def test_what_is_no_whole_number(bad):
    for check in check_seed, partial(check_whole, 'k', low=0), lambda v: check_ks([v], 5):
        with pytest.raises(TypeError) as e:
            check(bad)
        assert '\n' not in str(e.value) and len(str(e.value)) > 20


@pytest.mark.parametrize('good', [3, np.int64(3), np.uint8(3), torch.tensor(3), np.array(3)], ids=repr)
def test_whole_numbers_of_every_kind(good):
    for found in check_seed(good), check_whole('k', good, 3, 3), check_ks([good], 3)[0].item():
        assert found == 3 and type(found) is int


def test_ranges_include_their_ends():
    assert check_seed(0) == 0 and check_seed(2**32 - 1) == 2**32 - 1
    for bad in -1, 2**32, 2**64, -(2**70):
        with pytest.raises(ValueError, match='a seed is an integer from 0'):
            check_seed(bad)
    assert check_whole('k', 10**30, 1) == 10**30
    for bad in 0, 6:
        with pytest.raises(ValueError, match=f'k must be an integer from 1 to 5, got {bad}'):
            check_whole('k', bad, 1, 5)


@pytest.mark.parametrize(
    'ks',
    [[1, 3, 5], (1, 3, 5), range(1, 6, 2), np.array([1, 3, 5], np.int32), torch.tensor([1, 3, 5]).short()],
    ids=str,
)
def test_ks_in_any_form(ks):
    found = check_ks(ks, 5)
    assert found.tolist() == [1, 3, 5] and found.dtype == torch.int64


@pytest.mark.parametrize(
    'ks, error',
    [
        ([], ValueError),
        (torch.tensor([]), ValueError),
        ([0, 1], ValueError),
        ([1, 6], ValueError),
        ([1, 1], ValueError),
        ([2, 1], ValueError),
        (list(range(5, 0, -1)) * 9, ValueError),
        (torch.tensor([1.0, 2.0]), TypeError),
        (np.array([1.0, 2.0]), TypeError),
        (torch.tensor([[1, 2]]), TypeError),
        (torch.tensor(3), TypeError),
        (torch.tensor([True]), TypeError),
        (torch.tensor([1, 2], device='meta'), TypeError),
        ('12', TypeError),
        (3, TypeError),
        (None, TypeError),
        ([[1], [2]], TypeError),
    ],
    ids=str,
)
def test_ks_that_are_none(ks, error):
    with pytest.raises(error, match='ks must ascend between 1 and k = 5, as whole numbers, got') as e:
        check_ks(ks, 5, limit='k')
    assert len(str(e.value)) < 200


@pytest.mark.parametrize(
    'order, error',
    [
        (torch.zeros(5, dtype=torch.int64), ValueError),
        (torch.arange(4), ValueError),
        (torch.arange(5) + 1, ValueError),
        (torch.arange(5) - 1, ValueError),
        (torch.tensor([0, 1, 2, 3, 2**62]), ValueError),
        (torch.arange(5, device='meta'), ValueError),
        (torch.arange(5.0), TypeError),
        (torch.arange(5).int(), TypeError),
        (torch.arange(5)[None], TypeError),
        ([0, 1, 2, 3, 4], TypeError),
        (np.arange(5), TypeError),
    ],
    ids=str,
)
def test_orderings_that_are_none(order, error):
    for name, says in (None, 'an ordering'), ('mine', "the ordering 'mine'"):
        with pytest.raises(error, match=f'{says} (must|is)'):
            check_order(order, 5, name)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize('n, k', [(1, 1), (5, 5), (300, 1), (3000, 40)])
def test_bases_are_taken(n, k, dtype):
    for seed in range(3):
        U = basis(n, k, seed=seed).to(dtype)
        assert check_basis(U, n) is U


def test_a_basis_in_blocks_is_one(monkeypatch):
    U, seven = basis(), lambda n, w: (slice(i, min(i + 7, n)) for i in range(0, n, 7))
    monkeypatch.setattr('hessian_overlap.checks.row_blocks', seven)
    check_basis(U)
    with pytest.raises(ValueError, match='not orthogonal'):
        check_basis(U[:, [0, 1, 1]])


def skewed(U, eps):
    "A column tilted towards another, of norm 1"
    V = U.clone()
    V[:, 0] = (U[:, 0] + eps * U[:, 1]) / (1 + eps**2) ** 0.5
    return V


@pytest.mark.parametrize(
    'bad, error, says',
    [
        (lambda U: U[:, [0, 0, 0, 0]], ValueError, 'are not orthogonal: take torch.linalg.qr'),
        (lambda U: skewed(U, 1e-3), ValueError, 'are not orthogonal'),
        (lambda U: skewed(U, 0.2).float(), ValueError, 'are not orthogonal'),
        (lambda U: 2 * U, ValueError, 'norm 1, got 2 to 2'),
        (lambda U: U * nan, ValueError, 'norm 1, got nan'),
        (lambda U: torch.full_like(U, inf), ValueError, 'norm 1, got inf'),
        (lambda U: U * torch.tensor([1, 1, 1, 1, 1, 1, nan]), ValueError, 'norm 1, got nan'),
        (lambda U: U[:, :0], ValueError, 'has 0 columns'),
        (lambda U: torch.cat([U] * 30, 1), ValueError, 'has 210 columns of length 200'),
        (lambda U: U[:-1], ValueError, 'has 199 rows, there are 200 parameters'),
        (lambda U: U.to('meta'), ValueError, 'meta device'),
        (lambda U: U[:, 0], TypeError, r'got \(200,\) float64'),
        (lambda U: U + 0j, TypeError, r'got \(200, 7\) complex128'),
        (lambda U: torch.eye(200, 7).long(), TypeError, 'int64'),
        (lambda U: U.numpy(), TypeError, 'ndarray'),
        (lambda U: None, TypeError, 'NoneType'),
    ],
)
def test_bases_that_are_none(bad, error, says):
    before = torch.get_rng_state()
    with pytest.raises(error, match=says):
        check_basis(bad(basis()), 200)
    assert torch.equal(torch.get_rng_state(), before)


def test_choices_and_finite_numbers():
    assert check_choice('which', None, ['LM', None]) is None
    for bad in 'lm', 1, ['LM'], torch.ones(2), True:
        with pytest.raises(ValueError, match=r"which must be one of \['LM', 1.5\], got"):
            check_choice('which', bad, ('LM', 1.5))
    for good in 0.1, np.arange(3), torch.ones(2, 2), 3:
        assert check_finite('x', good) is good
    for bad in nan, inf, np.array([1, -inf]), torch.tensor([[1, nan]]):
        with pytest.raises(ValueError, match='x must be finite, got (nan|-?inf)'):
            check_finite('x', bad)


@pytest.mark.parametrize('n, width', [(1, 1), (10**7, 3), (5000, 4000), (2**21, 1), (0, 5)])
def test_row_blocks_cut_all_rows_once(n, width):
    blocks = [(s.start, s.stop) for s in row_blocks(n, width)]
    assert [a for a, _ in blocks] == [0, *(b for _, b in blocks[:-1])][: len(blocks)]
    assert sum(b - a for a, b in blocks) == n and all((b - a) * width <= max(2**21, width**2) for a, b in blocks)


# --- noise ----------------------------------------------------------------------------------------


def test_noise_is_philox_of_seed_and_column():
    for seed, c in (0, 0), (3, 7), (2**32 - 1, 2**63), (stream_seed(5, 3), 1):
        rng = np.random.Generator(np.random.Philox(key=[seed, c]))
        want = rng.standard_normal(11)
        assert np.array_equal(column_noise(11, [c], seed=seed, kind='gauss')[:, 0].numpy(), want)
    assert stream_seed(5, 3) == 5 + 3 * STREAM and stream_seed(5, 0) == 5


@pytest.mark.parametrize(
    'kw',
    [
        dict(seed=1.5),
        dict(seed=2**64),
        dict(seed=-1),
        dict(n=2.5),
        dict(columns=[-1]),
        dict(columns=[0.0]),
        dict(kind=3),
    ],
)
def test_noise_refuses(kw):
    with pytest.raises((TypeError, ValueError), match='must be|a seed is'):
        column_noise(**(dict(n=3, columns=[0], seed=0) | kw))


# --- files ----------------------------------------------------------------------------------------

WRITER = """
import runpy, sys
write_sealed = runpy.run_path(sys.argv[3])['write_sealed']  # without importing torch
path, word = sys.argv[1], sys.argv[2].encode()
print('go', flush=True)
i = 0
while True:
    write_sealed(path, dict(a=word*20_000, b=b'%d' % i))
    i += 1
"""


def writer(path, word):
    args = [sys.executable, '-c', WRITER, str(path), word, files.__file__]
    p = subprocess.Popen(args, stdout=subprocess.PIPE, text=True)
    assert p.stdout.readline() == 'go\n'
    return p


def stop(*processes):
    for p in processes:
        p.send_signal(signal.SIGKILL)
        p.wait()
        p.stdout.close()


@pytest.mark.skipif(os.name != 'posix', reason='kills processes')
def test_killed_at_any_moment_by_two_writers_at_once(tmp_path):
    path = tmp_path / 'x.zip'
    left = 0
    for i in range(6):
        pair = writer(path, 'one'), writer(path, 'two')
        end = time.monotonic() + 0.3 + 0.013 * i
        while time.monotonic() < end:
            if path.exists():
                assert read_sealed(path)[0]['a'][:3] in (b'one', b'two')
        stop(*pair)
        left += len([*tmp_path.glob('.*.tmp')])
        sweep(tmp_path)
        assert [o.name for o in tmp_path.iterdir()] == ['x.zip']
    assert set(read_sealed(path)[0]) == {'a', 'b'}


def test_sealed_bytes_do_not_depend_on_order_or_time(tmp_path):
    one, two = dict(b=b'2', a=lambda f: f.write(b'1')), dict(a=b'1', b=b'2')
    a, b = (write_sealed(tmp_path / name, f) for name, f in (('a', one), ('b', two)))
    assert a.read_bytes() == b.read_bytes() and read_sealed(a)[1] == read_sealed(b)[1]
    with zipfile.ZipFile(a) as z:
        assert z.testzip() is None and z.namelist() == ['a', 'b']


def test_every_flipped_bit_is_found(tmp_path):
    path = write_sealed(tmp_path / 'x', dict(a=b'some', b=b'thing'))
    whole = path.read_bytes()
    for i in range(0, 8 * len(whole), 3):
        bad = bytearray(whole)
        bad[i // 8] ^= 1 << i % 8
        path.write_bytes(bad)
        with pytest.raises(DamagedError, match='x is damaged: it does not have the sha256 that it ends with'):
            read_sealed(path)


def test_tensors_of_torch_go_in_and_out(tmp_path):
    state = dict(a=torch.rand(1000, 3), b=torch.arange(3))
    path = write_sealed(tmp_path / 's', {'state.pt': partial(torch.save, state)})
    with open_sealed(path) as (z, _), z.open('state.pt') as f:
        back = torch.load(f, weights_only=True)
    plain = write_atomic(tmp_path / 'plain', partial(torch.save, state))
    mapped = torch.load(plain, weights_only=True, mmap=True)
    for name, t in state.items():
        assert torch.equal(back[name], t) and torch.equal(mapped[name], t)


def test_errors_name_the_file_and_leave_nothing(tmp_path):
    (tmp_path / 'file').write_bytes(b'')
    for path, error in (
        (tmp_path / 'no' / 'x', FileNotFoundError),
        (tmp_path / 'file' / 'x', NotADirectoryError),
        (tmp_path, IsADirectoryError),
    ):
        with pytest.raises(error) as e:
            write_atomic(path, b'1')
        assert e.value.filename == str(path)
    assert [o.name for o in tmp_path.iterdir()] == ['file']
    with pytest.raises(ZeroDivisionError):
        write_sealed(tmp_path / 'x', dict(a=lambda f: 1 / 0))
    assert [o.name for o in tmp_path.iterdir()] == ['file']
    for path in (tmp_path / 'none', tmp_path):
        with pytest.raises(OSError) as e:
            read_sealed(path)
        assert e.value.filename == str(path)


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='no /dev/full')
def test_a_full_disk_is_named(tmp_path):
    def full(f):
        with open('/dev/full', 'wb', buffering=0) as out:
            out.write(b'1')

    with pytest.raises(OSError, match='No space left on device') as e:
        write_atomic(tmp_path / 'x', full)
    assert e.value.filename == str(tmp_path / 'x') and not [*tmp_path.iterdir()]


def test_new_leaves_alone_what_is_there(tmp_path, monkeypatch):
    for without_links in (False, True):
        if without_links:
            monkeypatch.setattr(os, 'link', lambda *a: (_ for _ in ()).throw(OSError(1, 'Operation not permitted')))
        path = tmp_path / f'{without_links}'
        for word in b'first', b'second':
            write_atomic(path, word, new=True)
        assert path.read_bytes() == b'first'
    assert sorted(o.name for o in tmp_path.iterdir()) == ['False', 'True']
