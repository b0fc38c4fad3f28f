"Laws of the sketches: one table of recoveries, test matrices, precisions and spectra, every law over all of them"

import numpy as np
import pytest
import torch

from hessian_overlap.linop import FunctionLinearOperator, aslinearoperator
from hessian_overlap.noise import column_noise
from hessian_overlap.sketch import EighResult, Sketch, SVDResult, TestMatrix, seigh, ssvd
from hessian_overlap.synthmat import SynthOperator, synth_eigvals

DEVICES = ['cpu'] + (['cuda'] if torch.cuda.is_available() else [])
f32, f64 = torch.float32, torch.float64
KINDS = ['ssrft', 'gauss', 'sign']
ONE_PASS = ['core', 'singlepass', 'nystrom']
EIGH = dict(core={}, singlepass={}, nystrom={}, hmt={}, hmt2=dict(recovery='hmt', num_power=2))
SVD = dict(core={}, singlepass={}, hmt={}, hmt1=dict(recovery='hmt', num_power=1))
N, RANK = 300, 12
signs = torch.tensor([1.0, -1.0, 1.0], dtype=f64).repeat(N // 3)
SPECTRA = {  # name: eigenvalues of which at most RANK are not zero
    'both signs': torch.cat([torch.linspace(3, 1, RANK, dtype=f64), torch.zeros(N - RANK, dtype=f64)]) * signs,
    'positive': torch.cat([torch.linspace(3, 1, RANK, dtype=f64), torch.zeros(N - RANK, dtype=f64)]),
    'pairs of equal magnitude': torch.cat([
        torch.tensor([4.0, -4.0, 4.0, -4.0, 2.0, 2.0, 2.0, -2.0, -2.0, 1.0, 1.0, 1.0], dtype=f64),
        torch.zeros(N - RANK, dtype=f64),
    ]),
    'rank one': torch.cat([torch.tensor([-2.0], dtype=f64), torch.zeros(N - 1, dtype=f64)]),
    'huge': 1e10 * torch.cat([torch.linspace(3, 1, RANK, dtype=f64), torch.zeros(N - RANK, dtype=f64)]) * signs,
    'tiny': 1e-10 * torch.cat([torch.linspace(3, 1, RANK, dtype=f64), torch.zeros(N - RANK, dtype=f64)]) * signs,
}


def call(solve, A, k, name, table, **kw):
    return solve(A, k, **(dict(recovery=name) | table[name] | kw))


def lost(U, V):
    return 1 - (U.T.double() @ V.double()).square().sum().item() / U.shape[1]


def orthonormal(U):
    return (U.T.double() @ U.double() - torch.eye(U.shape[1], dtype=f64, device=U.device)).abs().max().item()


@pytest.fixture(params=SPECTRA)
def lam(request):
    return SPECTRA[request.param]


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


@pytest.fixture(params=[f32, f64], ids=['float32', 'float64'])
def dtype(request):
    return request.param


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('name', EIGH)
def test_low_rank_is_exact(lam, name, kind, dtype, device):
    A = SynthOperator(lam, seed=1, dtype=dtype, device=device)
    k = int((lam != 0).sum())
    scale = lam.abs().max().item()
    tol = 5e-3 if dtype == f32 else 1e-9
    for outer in (RANK, 25):
        r = call(seigh, A, k, name, EIGH, num_outer=outer, test_matrix=kind, seed=3)
        assert (
            isinstance(r, EighResult)
            and r.eigvals.dtype == r.eigvecs.dtype == dtype
            and r.eigvecs.device == A.device
            and r.info['converged'] is None
        )
        torch.testing.assert_close(r.eigvals.abs(), A.eigvals[:k].abs(), rtol=tol, atol=tol * scale)
        assert abs(lost(A.eigvecs(k), r.eigvecs)) < tol and orthonormal(r.eigvecs) < (1e-5 if dtype == f32 else 1e-12)
        assert (r.eigvals.abs().diff() <= 0).all()


@pytest.mark.parametrize('name', EIGH)
def test_matvecs_are_counted(name):
    count = [0]
    S = SynthOperator(SPECTRA['both signs'], seed=1)

    def mm(V):
        count[0] += V.shape[1]
        return S @ V

    A = FunctionLinearOperator(mm, S.shape, rmatmat=mm, dtype=f64, device='cpu')
    r = call(seigh, A, 5, name, EIGH, num_outer=20, seed=0)
    assert r.info['matvecs'] == count[0] == dict(core=40, singlepass=40, nystrom=40, hmt=40, hmt2=80)[name]
    assert r.info['passes'] == dict(hmt=2, hmt2=4).get(name, 1)


@pytest.mark.parametrize('name', SVD)
def test_matvecs_of_ssvd_are_counted(name):
    count = [0]
    M = column_noise(60, range(40), seed=0, kind='gauss')

    def f(M):
        def mm(V):
            count[0] += V.shape[1]
            return M @ V

        return mm

    A = FunctionLinearOperator(f(M), (60, 40), rmatmat=f(M.T), dtype=f64, device='cpu')
    r = call(ssvd, A, 5, name, SVD, num_outer=9, seed=0)
    assert r.info['matvecs'] == count[0] == dict(core=27, singlepass=27, hmt=18, hmt1=36)[name]


@pytest.mark.parametrize('name', EIGH)
@pytest.mark.parametrize('n', [1, 2, 5, 9])
def test_full_size_is_exact(name, n):
    "As many measurements as dimensions leave nothing to be fitted"
    g = torch.Generator().manual_seed(n)
    M = torch.randn(n, n, generator=g, dtype=f64)
    M = M + M.T
    ref = torch.linalg.eigvalsh(M)
    ref = ref[ref.abs().argsort(descending=True)]
    for k in range(1, n + 1):
        r = call(seigh, M, k, name, EIGH, num_outer=n, test_matrix='gauss', seed=0)
        torch.testing.assert_close(r.eigvals.abs(), ref[:k].abs(), rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('name', EIGH)
def test_zero_operator(name, kind, dtype, device):
    r = call(seigh, torch.zeros(40, 40, dtype=dtype, device=device), 3, name, EIGH, test_matrix=kind, seed=0)
    assert (r.eigvals == 0).all() and orthonormal(r.eigvecs) < 1e-5


def test_core_is_the_symmetric_part_of_the_fit():
    "Against the formula with dense pseudo-inverses; and nearer to the truth than the triangle that eigh would read"
    A = SynthOperator(synth_eigvals(N, 'poly', rank=1, decay=0.7, seed=1), seed=2)
    gain = []
    for seed in range(5):
        Omega, Psi = (TestMatrix(N, 60, seed=s).columns(range(60)) for s in (seed, seed + 2**32))
        Y = A @ Omega
        Q = torch.linalg.qr(Y[:, :30]).Q
        M = torch.linalg.pinv(Psi.T @ Q) @ (Psi.T @ Y) @ torch.linalg.pinv(Q.T @ Omega)
        theta, F = torch.linalg.eigh((M + M.T) / 2)
        top = theta.abs().argsort(descending=True)[:20]
        r = seigh(A, 20, num_outer=30, seed=seed)
        torch.testing.assert_close(r.eigvals, theta[top], rtol=1e-9, atol=1e-12)
        theta, G = torch.linalg.eigh(M)
        half = theta.abs().argsort(descending=True)[:20]
        gain.append(lost(A.eigvecs(20), Q @ G[:, half]) - lost(A.eigvecs(20), r.eigvecs))
    assert np.mean(gain) > 0


@pytest.mark.parametrize('q', [0, 1, 3])
def test_hmt_knows_its_residuals(q, dtype):
    A = SynthOperator(synth_eigvals(N, 'poly', rank=1, decay=0.7, seed=1), seed=2, dtype=dtype)
    r = seigh(A, 20, recovery='hmt', num_power=q, seed=0)
    torch.testing.assert_close(
        (A @ r.eigvecs - r.eigvecs * r.eigvals).norm(dim=0).double(),
        r.info['residual_norms'],
        rtol=1e-2 if dtype == f32 else 1e-8,
        atol=1e-5 if dtype == f32 else 1e-12,
    )
    assert r.info['residual_norms'].dtype == f64 and lost(A.eigvecs(20), r.eigvecs) < [0.7, 0.4, 0.2, 0.2][q]


@pytest.mark.parametrize('recovery', ONE_PASS)
@pytest.mark.parametrize('kind', KINDS)
def test_split_does_not_matter(recovery, kind, dtype, tmp_path):
    A = SynthOperator(SPECTRA['both signs'], seed=1, dtype=dtype)
    make = lambda: Sketch(N, num_outer=20, num_inner=70, recovery=recovery, test_matrix=kind, seed=4, dtype=dtype)
    once = make().measure(A).recover(RANK)
    parts = [make().measure(A, c) for c in (range(64, 70), [3, 1, 2], range(4, 64), [0])]
    parts[2].save(tmp_path / 'part.pt')
    parts[2] = Sketch.load(tmp_path / 'part.pt')
    merged = parts[0].merge(*parts[1:])
    assert merged.missing == [] and '70 of 70' in repr(merged)
    tol = 1e-3 if dtype == f32 else 1e-10
    r = merged.recover(RANK)
    torch.testing.assert_close(r.eigvals, once.eigvals, rtol=tol, atol=tol)
    assert abs(lost(once.eigvecs, r.eigvecs)) < tol and r.info['matvecs'] == 70
    assert torch.equal(
        seigh(A, RANK, num_outer=20, num_inner=70, recovery=recovery, test_matrix=kind, seed=4).eigvecs, once.eigvecs
    )


@pytest.mark.parametrize('name', EIGH)
def test_seed_is_the_only_randomness(name):
    A = SynthOperator(synth_eigvals(N, 'poly', rank=1, decay=0.7, seed=1), seed=7)
    state = torch.get_rng_state()
    a = call(seigh, A, 12, name, EIGH, seed=3)
    torch.rand(5)
    np.random.rand(3)
    b = call(seigh, A, 12, name, EIGH, seed=3)
    torch.set_rng_state(state)
    assert torch.equal(a.eigvecs, b.eigvecs) and torch.equal(a.eigvals, b.eigvals)
    assert not torch.equal(call(seigh, A, 12, name, EIGH, seed=4).eigvecs, a.eigvecs)


def test_power_iterations_help():
    A = SynthOperator(synth_eigvals(N, 'poly', rank=1, decay=0.7, seed=1), seed=7)
    errs = [
        lost(A.eigvecs(20), seigh(A, 20, num_outer=40, recovery='hmt', num_power=q, seed=0).eigvecs) for q in range(4)
    ]
    assert errs == sorted(errs, reverse=True) and errs[-1] < 0.02 < errs[0]


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('name', SVD)
@pytest.mark.parametrize('shape', [(50, 50), (90, 40), (40, 90), (1, 7), (7, 1)], ids=str)
def test_ssvd_of_low_rank_is_exact(name, kind, shape, dtype, device):
    rank = min(6, *shape)
    L, R = (torch.linalg.qr(column_noise(s, range(rank), seed=j, kind='gauss')).Q for j, s in enumerate(shape))
    S = torch.linspace(3, 1, rank, dtype=f64)
    A = (L * S @ R.T).to(dtype=dtype, device=device)
    tol = 2e-3 if dtype == f32 else 1e-9
    r = call(ssvd, A, rank, name, SVD, num_outer=min(10, *shape), test_matrix=kind, seed=5)
    assert isinstance(r, SVDResult) and r.U.dtype == r.S.dtype == r.Vh.dtype == dtype
    assert (r.U.shape, r.S.shape, r.Vh.shape) == ((shape[0], rank), (rank,), (rank, shape[1]))
    torch.testing.assert_close(r.S.double().cpu(), S, rtol=tol, atol=tol)
    torch.testing.assert_close(r.U * r.S @ r.Vh, A, rtol=0, atol=tol)
    assert orthonormal(r.U) < 1e-5 and orthonormal(r.Vh.T) < 1e-5


@pytest.mark.parametrize('name', SVD)
def test_ssvd_of_zero(name):
    r = call(ssvd, torch.zeros(30, 20), 3, name, SVD, seed=0)
    assert (r.S == 0).all() and orthonormal(r.U) < 1e-5 and orthonormal(r.Vh.T) < 1e-5


def test_ssvd_of_a_symmetric_matrix_is_seigh():
    A = SynthOperator(SPECTRA['both signs'], seed=1)
    for name in SVD:
        torch.testing.assert_close(
            call(ssvd, A, RANK, name, SVD, seed=0).S, A.eigvals[:RANK].abs(), rtol=1e-9, atol=1e-9
        )


@pytest.mark.parametrize('trust, says', [(None, 'error not measured'), (False, 'NOT CONVERGED'), (True, 'converged')])
def test_repr_says_how_far_to_trust(trust, says):
    s, e = ssvd(torch.eye(5), 2, seed=0), seigh(torch.eye(5), 2, seed=0)
    for r in (s, e):
        r.info['converged'] = trust
        assert says in repr(r)
        r.info['residual_norms'] = torch.tensor([1e-3, 0.5])
        assert 'residuals up to 5.0e-01' in repr(r)
        assert trust is None or says in repr(r)


def nan_in(column, n=300, k=90):
    "A diagonal operator that gives NaN for a given column of whatever it multiplies"
    D, seen = torch.linspace(1, 2, n, dtype=f64)[:, None], [0]

    def mm(V):
        W = D * V
        if seen[0] <= column < seen[0] + V.shape[1]:
            W[0, column - seen[0]] = float('nan')
        seen[0] += V.shape[1]
        return W

    return FunctionLinearOperator(mm, (n, n), rmatmat=mm, dtype=f64, device='cpu')


@pytest.mark.parametrize('column', [0, 63, 64, 99])
@pytest.mark.parametrize('solve, table', [(seigh, EIGH), (ssvd, SVD)], ids=['seigh', 'ssvd'])
def test_nan_is_named_by_column(solve, table, column):
    for name in table:
        with pytest.raises(FloatingPointError, match=f'not finite in column {column}'):
            call(solve, nan_in(column), 90, name, table, num_outer=100, seed=0)


def test_nan_in_a_later_pass_is_named():
    with pytest.raises(FloatingPointError, match='column 5 of pass 2'):
        seigh(nan_in(15), 5, num_outer=10, recovery='hmt', seed=0)
    with pytest.raises(FloatingPointError, match='column 7'):
        Sketch(300, num_outer=10, num_inner=20, seed=0).measure(nan_in(2), [3, 11, 7])


A0, M0 = torch.diag(torch.arange(1.0, 41, dtype=f64)), column_noise(40, range(40), seed=0, kind='gauss')
FAULTS = [
    (dict(k=0), 'between 1 and n = 40, got 0'),
    (dict(k=41), 'between 1 and n = 40, got 41'),
    (dict(k=2.5), 'k must be an integer'),
    (dict(k=True), 'k must be an integer'),
    (dict(num_outer=4), 'must hold, got 5, 4'),
    (dict(num_outer=41), 'must hold'),
    (dict(num_outer=10, num_inner=9), 'must hold'),
    (dict(num_inner=41), 'must hold'),
    (dict(test_matrix='fft'), 'test_matrix must be'),
    (dict(recovery='lanczos'), "recovery must be 'core'"),
    (dict(num_power=1), "for recovery='hmt'"),
    (dict(recovery='hmt', num_power=-1), 'at least 0, got -1'),
    (dict(recovery='hmt', num_power=1.5), 'num_power must be an integer'),
    (dict(recovery='hmt', num_inner=20), 'num_inner is for'),
]


@pytest.mark.parametrize('solve', [seigh, ssvd])
@pytest.mark.parametrize('kw, says', FAULTS, ids=lambda p: str(p))
def test_arguments(solve, kw, says):
    with pytest.raises(ValueError, match=says):
        solve(aslinearoperator(A0), **(dict(k=5, seed=0) | kw))


@pytest.mark.parametrize('seed, error', [(None, (TypeError, ValueError)), (-1, ValueError)])
def test_seed_must_be_given(seed, error):
    for f in (seigh, ssvd):
        with pytest.raises(error):
            f(A0, 3, test_matrix='gauss', seed=seed)
        with pytest.raises(TypeError, match='seed'):
            f(A0, 3)


def test_sketch_faults():
    make = lambda **kw: Sketch(40, **(dict(num_outer=5, num_inner=10, seed=0) | kw))
    s = make().measure(A0, range(6))
    for call, says in (
        (lambda: s.measure(A0, [5]), 'column 5 would be measured twice'),
        (lambda: s.measure(A0, [7, 7]), 'column 7 would'),
        (lambda: s.measure(A0, [-1]), '0 to 9, got -1'),
        (lambda: s.recover(3), '4 of 10 columns have not been measured, the first is 6'),
        (lambda: s.merge(make().measure(A0, [2])), 'column 2 would'),
        (lambda: s.merge(make(num_outer=6)), 'differ in num_outer: 5 and 6'),
        (lambda: s.merge(make(dtype=f32)), 'differ in dtype'),
        (lambda: s.measure(A0.float()), 'torch.float64'),
        (lambda: make(num_outer=11), 'must hold'),
        (lambda: make(recovery='hmt'), "got 'hmt'"),
        (lambda: s.measure(M0[:, :3]), 'square'),
    ):
        with pytest.raises(ValueError, match=says):
            call()
    assert s.columns == list(range(6))  # nothing was changed by the refusals


def test_no_transpose_is_named():
    A = FunctionLinearOperator(lambda V: M0 @ V, (40, 40), dtype=f64, device='cpu')
    for name in SVD:
        with pytest.raises(NotImplementedError, match='no product with its transpose'):
            call(ssvd, A, 3, name, SVD, seed=0)
