"Laws of operators: one table of operators, every law over all of them"

import importlib.util
import pickle
import sys
import types
import warnings

import numpy as np
import pytest
import scipy.sparse
import scipy.sparse.linalg
import torch

from hessian_overlap.linop import FunctionLinearOperator, LinearOperator, aslinearoperator, power_of_two
from hessian_overlap.noise import column_noise
from hessian_overlap.sketch import TestMatrix
from hessian_overlap.synthmat import SynthOperator, dct, idct, synth_eigvals

DEVICES = ['cpu'] + (['cuda'] if torch.cuda.is_available() else [])
M = np.random.default_rng(0).standard_normal((7, 4))


def _function(dtype, device):
    t = torch.as_tensor(M, dtype=dtype, device=device)
    return FunctionLinearOperator(lambda V: t @ V, t.shape, rmatmat=lambda U: t.T @ U, dtype=dtype, device=device)


def _quiet_csr(t):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', UserWarning)  # torch calls it a beta
        return t.to_sparse_csr()


CASES = {
    'tensor': lambda dt, dev: aslinearoperator(torch.as_tensor(M, dtype=dt, device=dev)),
    'symmetric tensor': lambda dt, dev: aslinearoperator(torch.as_tensor(M.T @ M, dtype=dt, device=dev)),
    'function': _function,
    'sparse tensor': lambda dt, dev: aslinearoperator(torch.as_tensor(M, dtype=dt, device=dev).to_sparse()),
    'sparse rows': lambda dt, dev: aslinearoperator(_quiet_csr(torch.as_tensor(M, dtype=dt, device=dev))),
    'symmetric sparse tensor': lambda dt, dev: aslinearoperator(
        torch.as_tensor(M.T @ M, dtype=dt, device=dev).to_sparse()
    ),
    'numpy': lambda dt, dev: aslinearoperator(M.astype(torch.empty(0, dtype=dt).numpy().dtype)),
    'sparse': lambda dt, dev: aslinearoperator(
        scipy.sparse.csr_array(M.astype(torch.empty(0, dtype=dt).numpy().dtype))
    ),
    'via SciPy': lambda dt, dev: aslinearoperator(_function(dt, dev).to_scipy()),
    'transposed': lambda dt, dev: _function(dt, dev).T,
    'sum': lambda dt, dev: 2 * _function(dt, dev) - torch.as_tensor(M[::-1].copy(), dtype=dt, device=dev),
    'symmetric sum': lambda dt, dev: (
        -aslinearoperator(torch.as_tensor(M.T @ M, dtype=dt, device=dev))
        + 3.0 * aslinearoperator(torch.eye(4, dtype=dt, device=dev))
    ),
    'block': lambda dt, dev: _function(dt, dev).restrict([6, 0, 3], [True, False, True, True]),
    'principal block': lambda dt, dev: aslinearoperator(torch.as_tensor(M.T @ M, dtype=dt, device=dev)).restrict(
        slice(1, None)
    ),
    'synthetic': lambda dt, dev: SynthOperator(synth_eigvals(31, 'poly', seed=1), seed=2, dtype=dt, device=dev),
    'ssrft': lambda dt, dev: TestMatrix(31, 12, 'ssrft', seed=0, dtype=dt, device=dev),
    'gauss': lambda dt, dev: TestMatrix(31, 70, 'gauss', seed=0, dtype=dt, device=dev),
}


@pytest.fixture(params=CASES)
def name(request):
    return request.param


@pytest.fixture(params=[torch.float32, torch.float64], ids=['float32', 'float64'])
def dtype(request):
    return request.param


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture
def A(name, dtype, device):
    return CASES[name](dtype, device)


def noise(n, m, A, seed=7):
    return column_noise(n, range(m), seed=seed, kind='gauss', dtype=A.dtype, device=A.device)


def close(a, b, A):
    torch.testing.assert_close(
        a, b, rtol=2e-5 if A.dtype == torch.float32 else 1e-12, atol=2e-4 if A.dtype == torch.float32 else 1e-12
    )


def test_adjoint(A):
    U, V = noise(A.shape[0], 3, A), noise(A.shape[1], 3, A, 8)
    close((U * (A @ V)).sum(0), ((A.T @ U) * V).sum(0), A)
    assert A.T.T.shape == A.shape and (A.T is A) == A.symmetric


def test_linear_and_columnwise(A):
    V = noise(A.shape[1], 5, A)
    W = A @ V
    close(A @ (2 * V[:, :1] - V[:, 1:2]), 2 * W[:, :1] - W[:, 1:2], A)
    close(torch.stack([A @ v for v in V.T], 1), W, A)
    assert W.dtype == A.dtype and W.device == A.device and (A @ V[:, :0]).shape == (A.shape[0], 0)


def test_from_the_left(A):
    "A tensor may stand on either side, and the transpose has the names that tensors have"
    U = noise(A.shape[0], 3, A)
    W = A.T @ U
    close(U.T @ A, W.T, A)
    close(U[:, 0] @ A, W[:, 0], A)
    close(A.mT @ U, W, A)
    close(A.adjoint() @ U, W, A)
    with pytest.raises(ValueError, match='V must be'):
        U @ A.T if A.shape[0] != A.shape[1] else U[:2].T @ A
    with pytest.raises(TypeError, match='to_scipy'):
        np.ones(A.shape[0]) @ A


def test_pickled(name, A):
    if name in ('function', 'transposed', 'sum', 'block', 'via SciPy'):
        pytest.skip('made of functions of this file that have no name')
    V = noise(A.shape[1], 2, A)
    B = pickle.loads(pickle.dumps(A))
    assert torch.equal(B @ V, A @ V) and B.symmetric == A.symmetric
    close(B.T @ (A @ V), A.T @ (A @ V), A)


def test_input_not_changed(A):
    V = noise(A.shape[1], 2, A)
    V0 = V.clone()
    A @ V
    assert torch.equal(V, V0)


def test_scipy_round_trip(A):
    S, V = A.to_scipy(), noise(A.shape[1], 3, A).cpu().numpy()
    close(torch.from_numpy(S @ V), (A @ torch.as_tensor(V, device=A.device)).cpu(), A)
    close(torch.from_numpy(S.matvec(V[:, 0])), (A @ torch.as_tensor(V[:, 0], device=A.device)).cpu(), A)
    U = noise(A.shape[0], 1, A).cpu().numpy()
    close(torch.from_numpy(S.rmatvec(U[:, 0])), (A.T @ torch.as_tensor(U[:, 0], device=A.device)).cpu(), A)
    assert S.shape == A.shape and S.dtype == V.dtype


@pytest.mark.parametrize(
    'V, error, says',
    [
        (torch.ones(5), ValueError, 'V must be'),
        (torch.ones(4, 1, 1), ValueError, 'V must be'),
        (torch.ones(4).double(), TypeError, 'cast'),
        (np.ones(4), TypeError, 'to_scipy'),
        ([1.0, 1, 1, 1], TypeError, 'torch.Tensor'),
        (torch.ones(4, dtype=torch.int64), TypeError, 'cast'),
    ],
)
def test_refused(V, error, says):
    with pytest.raises(error, match=says):
        aslinearoperator(torch.as_tensor(M, dtype=torch.float32)) @ V


@pytest.mark.parametrize(
    'make, error',
    [
        (lambda: LinearOperator((3,), torch.float32, 'cpu'), ValueError),
        (lambda: LinearOperator((0, 3), torch.float32, 'cpu'), ValueError),
        (lambda: LinearOperator((2, 3), torch.float32, 'cpu', symmetric=True), ValueError),
        (lambda: LinearOperator((2, 2), torch.int64, 'cpu'), TypeError),
        (lambda: aslinearoperator(torch.ones(3)), ValueError),
        (lambda: aslinearoperator(np.eye(2, dtype=complex)), TypeError),
        (lambda: aslinearoperator(None), TypeError),
        (lambda: LinearOperator((2.5, 2), torch.float32, 'cpu'), ValueError),
        (lambda: LinearOperator((2, 2), 'float32', 'cpu'), TypeError),
        (lambda: LinearOperator((2, 2), torch.float32, 'gpu'), ValueError),
        (lambda: aslinearoperator(torch.eye(3, device='meta')), ValueError),
        (lambda: aslinearoperator(torch.eye(3) * float('nan')), ValueError),
        (lambda: aslinearoperator(torch.eye(3, dtype=torch.complex64)), TypeError),
        (lambda: aslinearoperator(torch.eye(3) > 0), TypeError),
        (lambda: aslinearoperator(torch.eye(3).to_sparse() * float('inf')), ValueError),
        (lambda: aslinearoperator(np.eye(2, dtype=np.float16)), TypeError),
        (lambda: aslinearoperator(np.eye(2, dtype=np.longdouble)), TypeError),
    ],
)
def test_bad_operators(make, error):
    with pytest.raises(error, match='.{15}') as caught:
        make()
    assert caught.traceback[-1].path.name == 'linop.py'


def test_scipy_is_told_what_to_take():
    "Its eigsh reads the dtype before anything else: when this fails, the sentence in the page can go"
    A = aslinearoperator(torch.eye(4))
    for call in (scipy.sparse.linalg.aslinearoperator, lambda A: scipy.sparse.linalg.svds(A, 1)):
        with pytest.raises(TypeError, match='to_scipy'):
            call(A)
    with pytest.raises(TypeError, match='Cannot interpret'):
        scipy.sparse.linalg.eigsh(A, 1)


def test_skerch_takes_an_operator(monkeypatch):
    pytest.importorskip('skerch')
    if importlib.util.find_spec('torch_dct') is None:  # it is for another kind of noise
        monkeypatch.setitem(sys.modules, 'torch_dct', types.ModuleType('torch_dct'))
        sys.modules['torch_dct'].dct = sys.modules['torch_dct'].idct = None
    skerch = importlib.import_module('skerch.algorithms')
    L = column_noise(30, range(4), seed=0, kind='gauss')
    D = (L @ L.T).float()
    kw = dict(seed=3, noise_type='gaussian', recovery_type='singlepass')
    U, S, Vh = skerch.ssvd(aslinearoperator(D), 'cpu', torch.float32, 10, **kw)
    torch.testing.assert_close((U * S) @ Vh, D, rtol=1e-3, atol=1e-3 * D.abs().max().item())
    for left in (False, True):
        norms = skerch.snorm(aslinearoperator(D), 'cpu', torch.float32, 10, seed=3, adj_meas=left)[0]
        torch.testing.assert_close(norms['fro'], D.norm(), rtol=1e-3, atol=0)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_power_of_two(dtype):
    most = 126 if dtype == torch.float32 else 1022
    for e in (-most, -30, 0, 5, most - 1):
        t = torch.tensor([0.3, -1.7]).to(dtype) * 2.0**e
        assert power_of_two(t) == 2.0**e and torch.equal(t / power_of_two(t) * power_of_two(t), t)
    assert power_of_two(torch.zeros(3)) == power_of_two(torch.tensor([float('nan')])) == power_of_two(t[:0]) == 1


def eye(A):
    return torch.eye(A.shape[1], dtype=A.dtype, device=A.device)


def test_sums_and_multiples_are_those_of_matrices(A):
    D = A @ eye(A)
    close((2 * A) @ eye(A), 2 * D, A)
    close((A * 0.5 - A) @ eye(A), -0.5 * D, A)
    close((-A) @ eye(A), -D, A)
    close((A + D) @ eye(A), 2 * D, A)
    close((D.new_tensor(3.0) * A).T @ D, 3 * D.T @ D, A) if A.dtype == torch.float64 else None
    close(sum([A, A, A]) @ eye(A), 3 * D, A)
    assert (A + 2 * A).symmetric == A.symmetric and (A - A).shape == A.shape


def test_blocks_are_those_of_matrices(A):
    D, (r, c) = A @ eye(A), A.shape
    rows, cols = torch.arange(r - 1, -1, -2), torch.arange(0, c, 3)
    B = A.restrict(rows, cols)
    close(B @ eye(B), D[rows][:, cols], A)
    close(B.T @ eye(B.T), D[rows][:, cols].T, A)
    close((A + A).restrict(rows, cols).restrict([0]) @ D.new_ones(1), 2 * D[rows[0], cols[:1]], A)
    assert not B.symmetric
    if A.symmetric:
        assert A.restrict(cols).symmetric and A.restrict(cols).T.shape == (len(cols), len(cols))


@pytest.mark.parametrize(
    'call, error, says',
    [
        (lambda A: A.restrict([0, 7]), ValueError, '0 to 6'),
        (lambda A: A.restrict([0, 0]), ValueError, 'distinct'),
        (lambda A: A.restrict([]), ValueError, 'distinct'),
        (lambda A: A.restrict([True] * 6), ValueError, 'mask of length 7'),
        (lambda A: A.restrict('a.weight'), TypeError, 'no names'),
        (lambda A: A.restrict([0.5]), ValueError, 'distinct'),
        (lambda A: A + torch.ones(2, 2), ValueError, 'share shape'),
        (lambda A: A + 1, TypeError, "unsupported operand type.* 'FunctionLinearOperator' and 'int'"),
        (lambda A: A * '2', TypeError, "can't multiply sequence by non-int|unsupported operand"),
        (lambda A: A * True, TypeError, "unsupported operand type.* 'FunctionLinearOperator' and 'bool'"),
        (lambda A: A - A.T, ValueError, 'share shape'),
    ],
)
def test_refused_sums_and_blocks(call, error, says):
    with pytest.raises(error, match=says):
        call(aslinearoperator(torch.as_tensor(M, dtype=torch.float32)))


def test_curvlinops_operator_is_accepted():
    import curvlinops

    net = torch.nn.Linear(3, 2).double()
    data = [(torch.randn(8, 3, dtype=torch.float64), torch.randn(8, 2, dtype=torch.float64))]
    C = curvlinops.HessianLinearOperator(net, torch.nn.MSELoss(), list(net.parameters()), data)
    A = aslinearoperator(C)
    V = noise(8, 3, A)
    close(A @ V, C @ V, A)
    close(A.T @ V, A @ V, A)
    assert A.symmetric


@pytest.mark.parametrize('n', [1, 2, 3, 8, 31, 64, 97, 360])
def test_dct_is_orthogonal(n, dtype, device):
    x = column_noise(n, range(4), seed=0, kind='gauss', dtype=dtype, device=device)
    tol = dict(rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-13)
    torch.testing.assert_close(idct(dct(x)), x, **tol)
    torch.testing.assert_close(dct(x).T @ dct(x), x.T @ x, rtol=1e-5, atol=1e-4 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize('kind', ['sign', 'gauss'])
def test_noise_depends_on_seed_and_column_alone(kind):
    a = column_noise(40, range(9), seed=5, kind=kind)
    assert torch.equal(column_noise(40, [8, 2, 2], seed=5, kind=kind), a[:, [8, 2, 2]])
    assert not torch.equal(column_noise(40, range(9), seed=6, kind=kind), a)
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    column_noise(40, range(9), seed=5, kind=kind)
    assert torch.equal(torch.get_rng_state(), state[0]) and (np.random.get_state()[1] == state[1]).all()


@pytest.mark.parametrize('kind', ['poly', 'exp', 'lowrank'])
@pytest.mark.parametrize('seed', [None, 3])
def test_spectrum_is_the_one_asked_for(kind, seed):
    lam = synth_eigvals(60, kind, rank=5, decay=0.3, seed=seed)
    A = SynthOperator(lam, seed=1)
    assert (lam.abs().diff() <= 0).all() and lam.abs().max() == 1 and (seed is None) == bool((lam >= 0).all())
    torch.testing.assert_close(torch.linalg.eigvalsh(A.dense()), lam.sort().values, rtol=0, atol=1e-13)
