"Errors after the fact: every bound against problems whose truth is known"

import warnings

import numpy as np
import pytest
import torch

from hessian_overlap import (
    BlockLanczos,
    EighResult,
    Mask,
    SynthOperator,
    apost_bounds,
    apost_error,
    aslinearoperator,
    best_order,
    eigsh,
    magnitude_order,
    mask_overlap,
    overlap_curve,
    overlap_error,
    random_order,
    residual_norms,
    scree_bounds,
    seigh,
    ssvd,
    synth_eigvals,
)
from hessian_overlap.noise import column_noise

f32, f64 = torch.float32, torch.float64
N, K = 300, 24
FAMILIES = dict(
    slow=dict(kind='poly', rank=1, decay=1.0),
    slower=dict(kind='poly', rank=5, decay=0.5),
    fast=dict(kind='poly', rank=1, decay=2.0),
    exponential=dict(kind='exp', rank=1, decay=0.03),
)
SKETCHES = ['core', 'singlepass', 'nystrom', 'hmt']


def localised(family, seed):
    "A dense matrix with eigenvectors that sit on few coordinates: operator, true leading eigenvectors, three orderings"
    lam = synth_eigvals(N, seed=seed, **FAMILIES[family]) * torch.linspace(1.2, 1, N, dtype=f64)
    lam = lam[lam.abs().argsort(descending=True)]  # no ties
    g = torch.Generator().manual_seed(seed)
    scale = torch.randn(N, generator=g, dtype=f64).exp()
    G = torch.randn(N, N, generator=g, dtype=f64)
    G[:, : N // 4] *= scale[:, None]
    Q = torch.linalg.qr(G).Q
    A = (Q * lam) @ Q.T
    U = Q[:, :K]
    return (
        aslinearoperator((A + A.T) / 2),
        U,
        [magnitude_order(scale), random_order(N, seed=seed), best_order(U[:, : K // 2])],
    )


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def coverage(family, make, seeds=range(5), ks=(3, 6, 12, 18, 24)):
    "Share of trials whose interval holds the truth, and mean width"
    hits, widths, ks = [], [], torch.tensor(ks)
    for s in seeds:
        A, U, orders = localised(family, s)
        result, probe = make(A, s)
        for order in orders:
            r, truth = overlap_error(result, order, ks, A=probe), overlap_curve(order, U, ks)
            assert (
                (0 <= r.low).all()
                and (r.low <= r.estimate).all()
                and (r.estimate <= r.high).all()
                and (r.high <= 1).all()
            )
            hits.append(((r.low <= truth) & (truth <= r.high)).double().mean().item())
            widths.append((r.high - r.low).mean().item())
    return np.mean(hits), np.mean(widths)


@pytest.mark.parametrize('recovery', SKETCHES)
def test_probe_covers(family, recovery):
    hit, width = coverage(
        family, lambda A, s: (seigh(A, K, num_outer=K + 5 if s % 2 else 2 * K, recovery=recovery, seed=s + 50), A)
    )
    assert hit >= 0.95 and width < 0.5


@pytest.mark.parametrize('tol, limit', [(1e-6, 0.02), (1e-2, 0.3)])
def test_residuals_always_cover(family, tol, limit):
    hit, width = coverage(family, lambda A, s: (eigsh(A, K + 1, tol=tol, seed=s + 50), None))
    assert hit == 1 and width < limit


def test_residuals_cover_when_stopped_early(family):
    def make(A, s):
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', RuntimeWarning)
            return eigsh(A, K + 1, block_size=5, max_matvecs=int(1.3 * K), seed=s + 50), None

    assert coverage(family, make)[0] == 1


@pytest.mark.parametrize('share', [1.6, 2.5])
def test_checkpoints_cover(family, share):
    def make(A, s):
        state = BlockLanczos(A, 5, seed=s + 50)
        while state.matvecs < share * K:
            state.step()
        return state, None

    assert coverage(family, make)[0] >= 0.95


@pytest.mark.parametrize('dtype', [f32, f64])
def test_interval_of_converged_pairs_is_tight(dtype):
    A, U, orders = localised('exponential', 0)
    B = aslinearoperator((A @ torch.eye(N, dtype=f64)).to(dtype))
    tight = 1e-2 if dtype == f32 else 1e-5
    for order in orders:
        r = overlap_error(eigsh(B, K + 1, tol=1e-6 if dtype == f32 else 1e-9, seed=0), order, torch.arange(1, K + 1))
        truth = overlap_curve(order, U)
        assert ((r.low <= truth) & (truth <= r.high)).all() and (r.high - r.low).max() < tight


def test_the_cut_below_the_last_pair_is_known():
    "From the next pair and its residual; where these are not known the interval is 1/k wide"
    A, U, (order, *_) = localised('exponential', 1)
    width = lambda r: (r.high - r.low)[-1].item()
    r = eigsh(A, K, tol=1e-9, seed=0)
    assert (
        width(overlap_error(r, order)) < 1e-5
        and 0.9 / K < width(overlap_error(r._replace(info=r.info | dict(next_residual=None)), order)) < 1.1 / K
    )
    assert width(overlap_error(eigsh(A, K + 1, tol=1e-9, seed=0), order, [K])) < 1e-5
    assert width(overlap_error(eigsh(torch.diag(torch.arange(1.0, 7, dtype=f64)), 6, seed=0), torch.arange(6))) < 1e-8


def test_pairs_across_a_small_gap_hang_together():
    "Two eigenvectors of nearly one eigenvalue may be mixed at will: only the interval at the cut between them says so"
    lam = torch.tensor([8.0, 6.0, 4.0, 4.0 - 1e-9, 2.0, 1.0] + [0.0] * 14, dtype=f64)
    r = eigsh(torch.diag(lam), 6, tol=1e-6, seed=0)
    o = overlap_error(r, torch.arange(20), torch.arange(1, 6))
    width = (o.high - o.low).tolist()
    mixed = EighResult(r.eigvals, r.eigvecs.clone(), r.info | dict(residual_norms=r.info['residual_norms'] + 1e-8))
    c, s = np.cos(0.7), np.sin(0.7)
    mixed.eigvecs[:, 2:4] = r.eigvecs[:, 2:4] @ torch.tensor([[c, -s], [s, c]], dtype=f64)
    o = overlap_error(mixed, torch.arange(20), torch.arange(1, 6))
    width = (o.high - o.low).tolist()
    assert max(width[i] for i in (0, 1, 3, 4)) < 1e-6 and 0.3 < width[2] < 0.34 and o.low[2] <= 1 <= o.high[2] + 1e-9


@pytest.mark.parametrize('which', ['LA', 'SA'])
def test_other_ends(which):
    A, U, (order, *_) = localised('slow', 2)
    dense = A @ torch.eye(N, dtype=f64)
    lam, V = torch.linalg.eigh(dense)
    V = V.flip(1) if which == 'LA' else V
    r = overlap_error(eigsh(A, 13, which=which, tol=1e-8, seed=0), order, torch.arange(1, 13))
    truth = overlap_curve(order, V[:, :12])
    assert ((r.low <= truth) & (truth <= r.high)).all() and (r.high - r.low).max() < 1e-2


def test_a_mask_is_the_ordering_at_its_k():
    A, U, (order, *_) = localised('slow', 3)
    mask, exact = Mask(order, n=N, k=12), eigsh(A, K, tol=1e-8, seed=0)
    a, b = overlap_error(exact, mask), overlap_error(exact, order, [12])
    for x, y in zip(a[:4], b[:4]):
        torch.testing.assert_close(x, y)
    s = seigh(A, K, recovery='singlepass', seed=0)
    r = overlap_error(s, mask, A=A)
    assert r.ks.tolist() == [12] and r.low <= mask_overlap(mask, U[:, :12]) <= r.high and r.info['matvecs'] == K
    state = BlockLanczos(A, 6, seed=0)
    for _ in range(10):
        state.step()
    r = overlap_error(state, mask)
    assert r.low <= mask_overlap(mask, U[:, :12]) <= r.high and r.info['matvecs'] == 0


def test_state_that_spans_everything():
    A, order = torch.diag(torch.arange(1.0, 13, dtype=f64)), torch.arange(12)
    state = BlockLanczos(A, 4, seed=0).step().step().step()
    r = overlap_error(state, order, torch.arange(1, 13))
    truth = overlap_curve(order, torch.eye(12, dtype=f64).flip(1))
    assert ((r.high - r.low) < 1e-6).all() and (r.low <= truth).all() and (truth <= r.high).all()


def test_restarted_state_is_refused():
    state = BlockLanczos(torch.diag(torch.arange(1.0, 41, dtype=f64)), 4, seed=0)
    for _ in range(6):
        state.step()
    overlap_error(state, torch.arange(40), [5])
    state.restart(16)
    with pytest.raises(ValueError, match='a restarted state has forgotten'):
        overlap_error(state, torch.arange(40), [5])


def test_zero_operator():
    Z = torch.zeros(30, 30, dtype=f64)
    r = overlap_error(seigh(Z, 3, seed=0), torch.arange(30), A=Z)
    assert torch.isfinite(r.estimate).all() and (r.high <= 1).all()
    r = overlap_error(eigsh(Z, 3, seed=0), torch.arange(30))
    assert (r.low == 0).all() and r.high[-1] == 1  # every subspace is an eigenspace
    e = apost_error(Z, seigh(Z, 3, seed=0), seed=0)
    assert e.error == e.norm == 0 and (scree_bounds(seigh(Z, 3, seed=0), e).high == 0).all()


@pytest.mark.parametrize('family_', FAMILIES)
@pytest.mark.parametrize('dtype', [f32, f64])
def test_every_residual_interval_holds_an_eigenvalue(family_, dtype):
    A = SynthOperator(synth_eigvals(N, seed=1, **FAMILIES[family_]), seed=2, dtype=dtype)
    lam = A.eigvals.double()[:, None]
    eps = 20 * torch.finfo(dtype).eps
    for r in [eigsh(A, 10, seed=0)] + [seigh(A, 10, recovery=v, seed=0) for v in SKETCHES]:
        res = residual_norms(A, r)
        assert (
            ((lam >= res.low - eps) & (lam <= res.high + eps)).any(0).all()
            and res.orthogonality < 200 * torch.finfo(dtype).eps
            and res.matvecs == 10
        )
        if r.info['residual_norms'] is not None:
            torch.testing.assert_close(res.norms, r.info['residual_norms'], rtol=1e-2, atol=20 * eps)


def test_residuals_of_singular_triplets():
    "Each is off a singular value by at most its norm"
    M = column_noise(50, range(30), seed=0, kind='gauss')
    sigma = torch.linalg.svdvals(M)[:, None]
    for recovery in ('core', 'singlepass', 'hmt'):
        res = residual_norms(M, ssvd(M, 8, recovery=recovery, seed=0))
        assert ((sigma >= res.low) & (sigma <= res.high)).any(0).all() and res.matvecs == 16
    exact = ssvd(M, 8, num_outer=30, recovery='hmt', seed=0)
    assert residual_norms(M, exact).norms.max() < 1e-10
    v = exact.U.clone()
    v[:, 1] = v[:, 0]
    assert residual_norms(M, exact._replace(U=v)).orthogonality > 0.99  # a copy is not a second pair


@pytest.mark.parametrize('q', [1, 5, 30])
@pytest.mark.parametrize('confidence', [0.8, 0.95])
def test_frobenius_interval(q, confidence):
    A = SynthOperator(synth_eigvals(60, 'poly', rank=1, decay=0.7, seed=1), seed=2)
    r = seigh(A, 5, seed=0)
    truth = (A.dense() - r.eigvecs * r.eigvals @ r.eigvecs.T).norm().item()
    low, high = apost_bounds(q, confidence)
    es = [apost_error(A, r, num_meas=q, confidence=confidence, seed=s) for s in range(100)]
    assert np.mean([e.low <= truth <= e.high for e in es]) >= confidence and low < 1 < high
    assert abs(np.mean([e.error**2 for e in es]) / truth**2 - 1) < 0.5 / q**0.5 and es[0].info['matvecs'] == q
    assert abs(np.mean([e.norm**2 for e in es]) / A.eigvals.square().sum().item() - 1) < 0.2


def test_frobenius_error_of_a_rectangle():
    M = column_noise(50, range(30), seed=0, kind='gauss')
    r = ssvd(M, 8, num_outer=30, recovery='hmt', seed=0)
    e = apost_error(M, r, num_meas=400, seed=0)
    truth = torch.linalg.svdvals(M)[8:].norm().item()
    assert e.low < truth < e.high and abs(e.norm - M.norm().item()) < 0.05 * e.norm
    b = scree_bounds(r, e)
    tail = torch.linalg.svdvals(M).square().flip(0).cumsum(0).flip(0) / M.square().sum()
    assert (b.high[:8] >= 0.999 * tail[:8]).all() and b.high[8] >= 0.9 * tail[
        8
    ]  # what is left after all terms is the estimated error itself
    assert (b.low[:9] <= 1.05 * tail[:9]).all() and len(b.low) == 9


def test_frobenius_measurements_are_new():
    "With the same seed and Gaussian test matrices the solver's own columns would be fitted too well"
    A = SynthOperator(synth_eigvals(200, 'poly', rank=1, decay=0.5, seed=1), seed=2)
    r = seigh(A, 60, num_outer=60, num_inner=60, test_matrix='gauss', recovery='singlepass', seed=0)
    truth = (A.dense() - r.eigvecs * r.eigvals @ r.eigvecs.T).norm().item()
    e = apost_error(A, r, seed=0)
    assert e.low <= truth <= e.high


A0 = torch.diag(torch.arange(1.0, 41, dtype=f64))
O0 = torch.arange(40)
R0, S0 = eigsh(A0, 5, seed=0), seigh(A0, 5, seed=0)


@pytest.mark.parametrize(
    'call, error, says',
    [
        (lambda: overlap_error(S0, O0), ValueError, 'give A, for an interval'),
        (lambda: overlap_error(R0, O0, A=A0), ValueError, 'leave A away'),
        (lambda: overlap_error(S0, O0, A=A0[:30, :30]), ValueError, 'the result is of a 40 x 40'),
        (lambda: overlap_error(S0, O0, A=A0.float()), TypeError, 'A is torch.float32'),
        (lambda: overlap_error(R0, O0.float()), TypeError, 'int64'),
        (lambda: overlap_error(R0, O0[:9]), ValueError, 'each of the 40'),
        (lambda: overlap_error(R0, O0 * 0), ValueError, 'each of the 40'),
        (lambda: overlap_error(R0, O0, [6]), ValueError, 'between 1 and k = 5'),
        (lambda: overlap_error(R0, O0, [0]), ValueError, 'between 1'),
        (lambda: overlap_error(R0, O0, [3, 2]), ValueError, 'ascend'),
        (lambda: overlap_error(R0, O0, []), ValueError, 'ascend'),
        (lambda: overlap_error(R0, Mask(O0, n=40, k=6)), ValueError, 'the mask is 6 of 40'),
        (lambda: overlap_error(R0, Mask(O0[:3], n=41)), ValueError, 'the mask is 3 of 41'),
        (lambda: overlap_error(R0, Mask(O0, n=40, k=3), [4]), ValueError, 'has the dimension k = 3'),
        (lambda: overlap_error(R0.eigvecs, O0), TypeError, 'got Tensor'),
        (lambda: overlap_error(BlockLanczos(A0, 4, seed=0).step(), O0), ValueError, 'a state has no k'),
        (lambda: overlap_error(BlockLanczos(A0, 4, seed=0).step(), O0, [5]), ValueError, '4 Ritz pairs are too few'),
        (lambda: overlap_error(eigsh(A0, 4, which='BE', seed=0), O0), ValueError, 'does not order'),
        (lambda: residual_norms(A0 * float('nan'), R0), FloatingPointError, 'not finite in column 0'),
        (lambda: apost_error(A0 * float('nan'), R0, seed=0), FloatingPointError, 'not finite in column 0'),
        (lambda: apost_error(A0, R0), TypeError, 'seed'),
        (lambda: apost_bounds(0), ValueError, 'num_meas'),
        (lambda: apost_bounds(5, 1.0), ValueError, 'confidence'),
        (lambda: scree_bounds(R0, 0.5), TypeError, 'what apost_error returned'),
        (lambda: overlap_error(ssvd(A0, 3, seed=0), O0), TypeError, 'got SVDResult'),
    ],
)
def test_faults(call, error, says):
    with pytest.raises(error, match=says):
        call()


def test_reprs():
    assert (
        'residuals' in repr(overlap_error(R0, O0))
        and 'probe' in repr(overlap_error(S0, O0, A=A0))
        and '5 matvecs' in repr(overlap_error(S0, O0, A=A0))
    )
    assert '95%' in repr(apost_error(A0, R0, seed=0)) and 'orthonormal to' in repr(residual_norms(A0, R0))
