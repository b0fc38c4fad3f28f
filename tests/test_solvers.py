"Laws of whatever takes an operator: of its scale, of its numerical rank, of symmetry, of pickles; one table of callers"

import pickle

import pytest
import torch
from torch import nn

from hessian_overlap.apost import apost_error, overlap_error, residual_norms, scree_bounds
from hessian_overlap.curvature import HessianLinearOperator
from hessian_overlap.krylov import BlockLanczos, eigsh
from hessian_overlap.linop import FunctionLinearOperator
from hessian_overlap.masked_start import ShortLanczos, overlap_slq_masked
from hessian_overlap.quadrature import overlap_slq, resolved, spectral_density
from hessian_overlap.sketch import EighResult, Sketch, numerical_rank, seigh, ssvd
from hessian_overlap.synthmat import SynthOperator, synth_eigvals

pytestmark = pytest.mark.filterwarnings('ignore::RuntimeWarning')
f32, f64 = torch.float32, torch.float64
N, K = 120, 10
ORDER = torch.randperm(N, generator=torch.Generator().manual_seed(0))
KS = torch.tensor([3, 10, 30])


def leading(r, c):
    "Eigenpairs, what is known of them, and the counts; whatever has the unit of A is divided by c"
    i = r.info
    scaled = [i['next_eigval'], *(i['residual_norms'] if i['residual_norms'] is not None else [])]
    counts = [i.get(n) for n in ('matvecs', 'rank', 'converged', 'restarts', 'passes', 'overlap', 'overlap_error')]
    return [r.eigvecs, r.eigvals.double() / c, torch.tensor(scaled, dtype=f64) / c, counts]


def singular(r, c):
    return [r.U, r.S.double() / c, r.Vh, r.info['matvecs'], r.info['rank']]


def estimate(e, c):
    i = e.info
    return [*e[:6], i['trusted'], i['threshold'] / c, i['resolved'], i['matvecs'], i['exact']]


def density(d, c):
    x = torch.linspace(-1, 1, 20, dtype=f64)
    tau = torch.tensor(d.threshold(10), dtype=f64) / c
    return [d.nodes / c, d.counts, d.exact, d.count(0.05 * c), tau, d.density(x * c) * c]


def errors(A, c):
    r = seigh(A, K, seed=0)
    e = apost_error(A, r, seed=1)
    frobenius = torch.tensor([e.error, e.low, e.high, e.norm], dtype=f64) / c
    return [frobenius, *scree_bounds(r, e), residual_norms(A, r).norms / c, *overlap_error(r, ORDER, A=A)[:4]]


def intervals(A, c):
    r = eigsh(A, K, tol=1e-2, keep_state=True, seed=0)
    return [*overlap_error(r, ORDER)[:4], *overlap_error(r.info['state'], ORDER, KS[:2])[:4]]


CALLS = {  # what takes an operator and its scale, and gives what must not depend on the scale
    'eigsh': lambda A, c: leading(eigsh(A, K, seed=0), c),
    'eigsh, one end': lambda A, c: leading(eigsh(A, K, which='LA', seed=0), c),
    'eigsh, restarts': lambda A, c: leading(eigsh(A, K, max_basis=40, seed=0), c),
    'eigsh, bfloat16': lambda A, c: leading(eigsh(A, K, basis_dtype=torch.bfloat16, max_basis=60, seed=0), c),
    'eigsh, overlap': lambda A, c: leading(eigsh(A, K, mask=ORDER[:K], tol_overlap=1e-2, seed=0), c),
    'eigsh, stopped': lambda A, c: leading(eigsh(A, K, max_matvecs=30, seed=0), c),
    **{
        f'seigh, {how}': lambda A, c, how=how: leading(seigh(A, K, recovery=how, seed=0), c)
        for how in ('core', 'singlepass', 'nystrom', 'hmt')
    },
    **{
        f'ssvd, {how}': lambda A, c, how=how: singular(ssvd(A, K, recovery=how, seed=0), c)
        for how in ('core', 'singlepass', 'hmt')
    },
    'overlap_slq': lambda A, c: estimate(overlap_slq(A, ORDER, KS, num_probes=3, num_steps=10, seed=0), c),
    'overlap_slq_masked': lambda A, c: estimate(overlap_slq_masked(A, ORDER, KS, num_probes=2, num_steps=8, seed=0), c),
    'spectral_density': lambda A, c: density(spectral_density(A, num_steps=8, seed=0), c),
    'apost': errors,
    'overlap_error': intervals,
}


def dense(dtype):
    A = SynthOperator(synth_eigvals(N, 'poly', rank=1, decay=0.7, seed=1), seed=7).dense()
    return ((A + A.T) / 2).to(dtype)


SCALES = [(f64, -664), (f64, 664), (f64, -40), (f32, -100), (f32, 100), (f32, 40)]  # 1e-200, 1e200, ..., 1e30


@pytest.mark.parametrize('name', CALLS)
@pytest.mark.parametrize('dtype, power', SCALES, ids=str)
def test_the_scale_of_the_operator_does_not_matter(name, dtype, power):
    A, c = dense(dtype), 2.0**power
    for got, want in zip(CALLS[name](A * c, c), CALLS[name](A, 1.0)):
        if isinstance(want, torch.Tensor):
            assert torch.isfinite(want).all() and torch.equal(got, want), (got - want).abs().max()
        else:
            assert got == want or list(got) == list(want)


def test_tiny_operators_are_solved_and_not_only_consistent():
    "The truth, not only the same as at another scale; this was an overlap of 0.04, marked as converged"
    for dtype, c, tol in ((f64, 1e-200, 1e-9), (f64, 1e200, 1e-9), (f32, 1e-30, 1e-5), (f32, 1e30, 1e-5)):
        A = SynthOperator(synth_eigvals(N, 'poly', rank=1, decay=0.7, seed=1), seed=7)
        r = eigsh((A.dense() * c).to(dtype), K, seed=0)
        assert r.info['converged']
        assert 1 - (A.eigvecs(K).T @ r.eigvecs.double()).square().sum() / K < tol
        torch.testing.assert_close(r.eigvals.double() / c, A.eigvals[:K], rtol=1e-5, atol=0)


RANKS = {  # name: (n, rank, smallest nonzero |λ| over the largest)
    'wide gap': (100, 12, 1e-1),
    'thousandth': (500, 12, 1e-3),
    'forty': (600, 40, 1e-2),
}


def of_rank(name, dtype):
    n, rank, least = RANKS[name]
    lam = torch.zeros(n, dtype=f64)
    lam[:rank] = torch.logspace(0, torch.log10(torch.tensor(least)).item(), rank, dtype=f64)
    lam[1:rank:2] *= -1
    return SynthOperator(lam, seed=7, dtype=dtype), rank


HOW = {
    'eigsh': lambda A, k, seed: eigsh(A, k, seed=seed),
    'eigsh, block of one': lambda A, k, seed: eigsh(A, k, block_size=1, seed=seed),
    'eigsh, restarts': lambda A, k, seed: eigsh(A, k, max_basis=k + 60, seed=seed),
    'eigsh, bfloat16': lambda A, k, seed: eigsh(A, k, basis_dtype=torch.bfloat16, seed=seed),
    'eigsh, float16': lambda A, k, seed: eigsh(A, k, basis_dtype=torch.float16, seed=seed),
    **{
        f'seigh, {how}': lambda A, k, seed, how=how: seigh(A, k, num_outer=k, recovery=how, seed=seed)
        for how in ('core', 'singlepass', 'hmt')
    },
    'ssvd': lambda A, k, seed: ssvd(A, k, num_outer=k, seed=seed),
}


@pytest.mark.parametrize('spectrum', RANKS)
@pytest.mark.parametrize('dtype', [f32, f64], ids=str)
@pytest.mark.parametrize('how', HOW)
def test_the_rank_is_that_of_the_spectrum(how, dtype, spectrum):
    A, rank = of_rank(spectrum, dtype)
    for seed in range(3):
        for k in (rank - 1, rank, rank + 1, rank + 18):
            r = HOW[how](A, k, seed)
            assert r.info['rank'] == min(k, rank)
            assert ('RANK' in repr(r)) == (k > rank)
            if how.startswith('eigsh'):
                assert r.info['converged'] == (k <= rank)


@pytest.mark.parametrize('dtype', [f32, f64], ids=str)
@pytest.mark.parametrize('wide', [False, True])
def test_the_rank_of_a_hessian_of_one_sample(dtype, wide):
    "The overlap within the rank is the same for every seed, and beyond it the result says that it is nothing"
    torch.manual_seed(0)
    d, h, o = (20, 30, 10) if wide else (5, 8, 3)
    net = nn.Sequential(nn.Linear(d, h), nn.Tanh(), nn.Linear(h, o)).to(dtype)
    H = HessianLinearOperator(net, nn.CrossEntropyLoss(), None, [(torch.randn(1, d, dtype=dtype), torch.tensor([1]))])
    n = H.shape[0]
    D = (H @ torch.eye(n, dtype=dtype)).double()
    size = torch.linalg.eigvalsh((D + D.T) / 2).abs().sort(descending=True).values
    rank = int((size > 1e-5 * size[0]).sum())
    assert size[rank] < 1e-6 * size[0]
    order, k = torch.arange(n), rank + 10
    results = []
    for seed in range(3):
        with pytest.warns(RuntimeWarning, match=f'A has {rank} leading eigenvalues above the rounding'):
            results.append(eigsh(H, k, seed=seed))
    for r in results:
        assert r.info['rank'] == rank and r.info['converged'] is False and 'state' not in r.info
        e = overlap_error(r, order)
        assert e.info['rank'] == rank and (e.high - e.low)[rank - 1] < 1e-2 and e.high[rank:].min() == 1
        assert (e.low[rank:] <= e.estimate[rank - 1] * rank / torch.arange(rank + 1, k + 1) + 1e-5).all()
    within = [(r.eigvecs[:rank, :rank] ** 2).sum().item() / rank for r in results]
    assert max(within) - min(within) < 1e-4


def test_nothing_is_known_of_the_zero_operator():
    Z = torch.zeros(N, N, dtype=f64)
    for r in (eigsh(Z, 5, seed=0), seigh(Z, 5, seed=0), seigh(Z, 5, recovery='hmt', seed=0), ssvd(Z, 5, seed=0)):
        assert r.info['rank'] == 0 and r.info['converged'] is not True and 'RANK 0' in repr(r)
    for e in (overlap_slq(Z, ORDER, KS, seed=0), overlap_slq_masked(Z, ORDER, KS, num_probes=2, seed=0)):
        assert e.info['resolved'] == 0 and not e.info['trusted'].any()
        assert (e.low <= KS / N).all() and (e.high >= 0.99).all()
    e = overlap_error(eigsh(Z, 5, seed=0), ORDER)
    assert (e.low == 0).all() and (e.high == 1).all()
    with pytest.raises(ValueError, match='width must be positive'):
        spectral_density(Z, seed=0).density(torch.zeros(1))


@pytest.mark.parametrize('dtype', [f32, f64], ids=str)
@pytest.mark.parametrize('probes, steps', [(2, 12), (8, 6)])
def test_quadrature_ends_at_the_rank(dtype, probes, steps):
    A, rank = of_rank('forty', dtype)
    n, ks = A.shape[0], torch.tensor([10, 30, 60, 200])
    order = torch.randperm(n, generator=torch.Generator().manual_seed(1))
    for e in (
        overlap_slq(A, order, ks, num_probes=probes, num_steps=steps, seed=0),
        overlap_slq_masked(A, order, ks, num_probes=2, num_steps=steps, seed=0),
    ):
        assert (
            e.info['resolved'] <= 1.3 * rank
            and not e.info['trusted'][2:].any()
            and (e.high >= (1 - e.info['resolved'] / ks) * 0.95).all()
        )
    state = BlockLanczos(A, 8, seed=0)
    for _ in range(10):
        state.step()
    assert resolved(state) == rank


def test_a_closed_space_is_no_asymmetry():
    "Short columns of a block carried the rounding of long ones; the operator was called not symmetric, at 1.5%"
    for seed in range(4):
        A, rank = of_rank('forty', f32)
        r = eigsh(A, 90, seed=seed)
        assert r.info['noise'] < 1e-5


def test_a_lone_zero_is_an_eigenvalue():
    lam = torch.cat([torch.linspace(0, 1, N - 1, dtype=f64), torch.tensor([-1.5], dtype=f64)])
    A = SynthOperator(lam, seed=3)
    r = eigsh(A, 3, which='SA', seed=0)
    assert r.info['rank'] == 3 and r.info['converged'] and abs(r.eigvals[1]) < 1e-12
    flat = SynthOperator(torch.cat([torch.zeros(60, dtype=f64), torch.linspace(1, 2, 60, dtype=f64)]), seed=3)
    r = eigsh(flat, 3, which='SA', seed=0)
    assert r.info['rank'] == 0 and r.info['converged'] is False
    assert numerical_rank(torch.tensor([3.0, -2.0, 1e-20]), torch.arange(3), 1e-10) == 2


NOT_SYMMETRIC = {
    'Gaussian': lambda n, g: torch.randn(n, n, generator=g, dtype=f64),
    'triangular': lambda n, g: torch.ones(n, n, dtype=f64).triu(),
    'skew': lambda n, g: torch.randn(n, n, generator=g, dtype=f64).triu(1) - torch.randn(n, n, generator=g).tril(-1),
    'rank one': lambda n, g: torch.outer(*torch.randn(2, n, generator=g, dtype=f64)),
    'one part in twenty': lambda n, g: torch.eye(n, dtype=f64) + 0.2 / n**0.5 * torch.randn(n, n, generator=g).triu(),
}
SYMMETRIC_ONLY = {
    'eigsh': lambda A: eigsh(A, 2, seed=0),
    'eigsh, block of one': lambda A: eigsh(A, 2, block_size=1, seed=0),
    'eigsh, all': lambda A: eigsh(A, A.shape[0], seed=0),
    'overlap_slq': lambda A: overlap_slq(A, torch.arange(len(A)), torch.tensor([1]), num_probes=2, num_steps=4, seed=0),
    'spectral_density': lambda A: spectral_density(A, num_probes=2, num_steps=4, seed=0),
    **{
        f'seigh, {how}': lambda A, how=how: seigh(A, 2, recovery=how, seed=0)
        for how in ('core', 'singlepass', 'nystrom', 'hmt')
    },
}


@pytest.mark.parametrize('n', [5, 40, 400])
@pytest.mark.parametrize('what', NOT_SYMMETRIC)
@pytest.mark.parametrize('how', SYMMETRIC_ONLY)
def test_what_is_not_symmetric_is_refused(how, what, n):
    for dtype in (f32, f64):
        A = NOT_SYMMETRIC[what](n, torch.Generator().manual_seed(n)).to(dtype)
        with pytest.raises(ValueError, match='the operator is not symmetric'):
            SYMMETRIC_ONLY[how](A)


def test_halves_of_a_sketch_of_what_is_not_symmetric():
    "Neither party has both of the two columns that are compared; who puts them together finds out"
    A = torch.ones(40, 40, dtype=f64).triu()
    a, b = (Sketch(40, num_outer=6, num_inner=12, seed=0).measure(A, range(i, 12, 2)) for i in (0, 1))
    with pytest.raises(ValueError, match='the operator is not symmetric'):
        a.merge(b).recover(3)


def test_rounding_is_not_asymmetry():
    "Symmetric to rounding, as products are; entries that differ by it are no reason to refuse"
    A = dense(f32)
    A[0, 1] *= 1 + 1e-6
    for how in SYMMETRIC_ONLY:
        SYMMETRIC_ONLY[how](A)


def pickled(x):
    return pickle.loads(pickle.dumps(x))


@pytest.mark.parametrize('place', [None, 'folder'])
@pytest.mark.parametrize('store', [None, torch.bfloat16])
def test_an_unconverged_result_is_pickled_and_gone_on_with(place, store, tmp_path):
    S = SynthOperator(synth_eigvals(N, 'poly', rank=1, decay=0.7, seed=1), seed=7)
    A = FunctionLinearOperator(lambda V: S @ V, S.shape, dtype=f64, device='cpu')  # which no pickle holds
    part = eigsh(A, K, max_matvecs=30, basis_dtype=store, basis_place=tmp_path if place else None, seed=0)
    there = pickled(part)
    assert torch.equal(there.eigvecs, part.eigvecs) and repr(there) == repr(part)
    state = there.info['state']
    assert repr(state) == repr(part.info['state'])
    assert overlap_error(state, ORDER, [3])[1].equal(overlap_error(part.info['state'], ORDER, [3])[1])
    with pytest.raises(ValueError, match='no operator: go on by giving it as start='):
        state.step()
    with pytest.raises(ValueError, match='of size 120, A is .* of size 5'):
        eigsh(torch.eye(5, dtype=f64), 2, start=state, seed=0)
    a, b = (eigsh(A, K, start=r, seed=0) for r in (there, part))
    assert a.info['converged'] and torch.equal(a.eigvecs, b.eigvecs) and a.info['matvecs'] == b.info['matvecs']


def test_pickles_hold_no_room_for_more():
    A = SynthOperator(synth_eigvals(2000, 'poly', rank=1, decay=0.7, seed=1), seed=7)
    state = BlockLanczos(A, 4, seed=0, first=400).step()
    assert state.basis.nbytes == 400 * 2000 * 8 and len(pickle.dumps(state)) < 1.2 * 8 * 2000 * 8
    again = pickled(state)
    assert again.basis.nbytes == state.basis.nbytes


def test_estimates_and_sketches_are_pickled_and_gone_on_with():
    S = SynthOperator(synth_eigvals(N, 'poly', rank=1, decay=0.7, seed=1), seed=7)
    A = FunctionLinearOperator(lambda V: S @ V, S.shape, dtype=f64, device='cpu')
    slq = lambda steps, **kw: overlap_slq(A, ORDER, KS, num_probes=2, num_steps=steps, seed=0, **kw)
    masked = lambda steps, **kw: overlap_slq_masked(A, ORDER, KS, num_probes=2, num_steps=steps, seed=0, **kw)
    for f in (slq, masked):
        there = pickled(f(6))
        assert repr(there) == repr(f(6))
        assert torch.equal(f(9, start=there).overlap, f(9).overlap)
    d = spectral_density(A, num_steps=6, seed=0)
    assert torch.equal(spectral_density(A, num_steps=9, start=pickled(d).info['state'], seed=0).nodes.cpu(),
                       spectral_density(A, num_steps=9, seed=0).nodes)  # fmt: skip
    sketch = Sketch(N, num_outer=12, num_inner=24, seed=0).measure(A, range(10))
    assert torch.equal(pickled(sketch).measure(A).recover(5).eigvecs, sketch.measure(A).recover(5).eigvecs)
    for r in (seigh(A, 5, seed=0), ssvd(S, 5, seed=0), apost_error(A, seigh(A, 5, seed=0), seed=0)):
        assert repr(pickled(r)) == repr(r)
    short = pickled(ShortLanczos(A, ORDER, KS, num_probes=2, seed=0).step())
    with pytest.raises(ValueError, match='no operator'):
        short.step()


@pytest.mark.parametrize('n', [2, 3, 10, 56, 57, 200, 400])
@pytest.mark.parametrize('limit', [None, 20])
def test_the_timed_block_fits_small_problems(n, limit):
    A = SynthOperator(synth_eigvals(n, 'poly', rank=1, decay=0.7, seed=1), seed=7)
    k = min(n, 3)
    r = eigsh(A, k, block_size='auto', max_matvecs=limit, seed=0)
    if limit is None:
        assert r.info['converged'] and r.info['matvecs'] <= n
        torch.testing.assert_close(r.eigvals, A.eigvals[:k], rtol=1e-9, atol=0)
    else:
        assert r.info['matvecs'] <= limit


def nan_from(column):
    def product(V):
        W = V.clone()
        W[0, column:] = float('nan')
        return W

    return FunctionLinearOperator(product, (N, N), rmatmat=product, dtype=f64, device='cpu')


HALF = FunctionLinearOperator(lambda V: V, (N, N), dtype=torch.bfloat16, device='cpu')
R = eigsh(dense(f64), K, keep_state=True, seed=0)
EMPTY = EighResult(R.eigvals[:0], R.eigvecs[:, :0], R.info)


@pytest.mark.parametrize(
    'call, says',
    [
        (lambda: eigsh(nan_from(2), 3, seed=0), 'not finite in column 2 of block 1'),
        (lambda: seigh(nan_from(2), 3, seed=0), 'not finite in column 2'),
        (lambda: ssvd(nan_from(2), 3, seed=0), 'not finite in column 2'),
        (lambda: overlap_slq(nan_from(2), ORDER, KS, seed=0), 'not finite in column 2'),
        (lambda: overlap_slq_masked(nan_from(2), ORDER, KS, seed=0), 'not finite in block 1, column 2'),
        (lambda: eigsh(HALF, 3, seed=0), 'A is torch.bfloat16'),
        (lambda: ssvd(HALF, 3, seed=0), 'A is torch.bfloat16'),
        (lambda: residual_norms(dense(f64), EMPTY), 'the result has no columns'),
        (lambda: apost_error(dense(f64), EMPTY, seed=0), 'the result has no columns'),
        (lambda: overlap_error(EMPTY, ORDER), 'the result has no columns'),
        (lambda: eigsh(dense(f64), K, start=R.eigvecs[:, :0], seed=0), 'j at least 1'),
        (lambda: eigsh(dense(f64), K, start=R.eigvecs.long(), seed=0), 'real floating point'),
        (lambda: eigsh(dense(f64), K, start=R.eigvecs.tolist(), seed=0), 'real floating point'),
        (lambda: overlap_error(R, ORDER, [1.5, 2.0]), 'as whole numbers'),
        (lambda: overlap_error(R, ORDER, []), 'got none'),
        (lambda: overlap_slq(dense(f64), ORDER, [], seed=0), 'got none'),
        (lambda: overlap_slq(dense(f64), ORDER, KS, max_matvecs=2.5, seed=0), 'max_matvecs must be an integer'),
        (lambda: overlap_slq(dense(f64), ORDER, KS, groups=[0] * N, seed=0), 'groups must be int64 labels'),
        (lambda: overlap_slq_masked(dense(f64), ORDER, KS, num_steps=4.5, seed=0), 'num_steps must be an integer'),
        (lambda: eigsh(dense(f64), K, seed=2**32), 'a seed is an integer'),
        (lambda: eigsh(dense(f64), K, start=R, seed='0'), 'a seed is an integer'),
        (lambda: overlap_slq(dense(f64), ORDER, KS, seed=1.5), 'a seed is an integer'),
    ],
)
def test_one_sentence(call, says):
    with pytest.raises((ValueError, TypeError, FloatingPointError), match=says):
        call()
