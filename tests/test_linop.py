"Laws of operators: one table of operators, every law over all of them"

import numpy as np
import pytest
import scipy.sparse
import torch

from hessian_overlap.linop import FunctionLinearOperator, LinearOperator, aslinearoperator
from hessian_overlap.noise import column_noise
from hessian_overlap.sketch import TestMatrix
from hessian_overlap.synthmat import SynthOperator, dct, idct, synth_eigvals

DEVICES = ['cpu'] + (['cuda'] if torch.cuda.is_available() else [])
M = np.random.default_rng(0).standard_normal((7, 4))


def _function(dtype, device):
    t = torch.as_tensor(M, dtype=dtype, device=device)
    return FunctionLinearOperator(lambda V: t @ V, t.shape, rmatmat=lambda U: t.T @ U, dtype=dtype, device=device)


CASES = {
    'tensor': lambda dt, dev: aslinearoperator(torch.as_tensor(M, dtype=dt, device=dev)),
    'symmetric tensor': lambda dt, dev: aslinearoperator(torch.as_tensor(M.T @ M, dtype=dt, device=dev)),
    'function': _function,
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
    ],
)
def test_bad_operators(make, error):
    with pytest.raises(error):
        make()


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
        (lambda A: A + 1, TypeError, ''),
        (lambda A: A * '2', TypeError, ''),
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
