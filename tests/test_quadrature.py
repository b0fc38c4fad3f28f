"Laws of spectral densities and of overlaps without eigenvectors"

import warnings

import numpy as np
import pytest
import torch

from hessian_overlap.krylov import BlockLanczos
from hessian_overlap.linop import FunctionLinearOperator
from hessian_overlap.quadrature import (
    cut_nodes,
    overlap_slq,
    resolved,
    ritz_quadrature,
    sampling_error,
    spectral_density,
)
from hessian_overlap.synthmat import SynthOperator, synth_eigvals

f64 = torch.float64
DEVICES = ['cpu'] + (['cuda'] if torch.cuda.is_available() else [])
N = 1200
SPECTRA = {
    'slow tail, both signs': dict(kind='poly', rank=1, decay=0.7, seed=1),
    'slow tail, positive': dict(kind='poly', rank=1, decay=0.7),
    'fast tail': dict(kind='exp', rank=5, decay=0.005, seed=2),
    'plateau and noise': dict(kind='lowrank', rank=60, noise=0.2, seed=3),
}


@pytest.fixture(params=SPECTRA)
def lam(request):
    return synth_eigvals(N, **SPECTRA[request.param]) * torch.linspace(1.1, 1, N, dtype=f64)


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


def quiet(f, *a, **kw):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', RuntimeWarning)
        return f(*a, **kw)


@pytest.mark.parametrize('dtype', [torch.float32, f64])
def test_counts_and_moments(lam, dtype, device):
    A = SynthOperator(lam, seed=7, dtype=dtype, device=device)
    d = spectral_density(A, num_probes=10, num_steps=20, seed=0)
    for truth, per_probe in (
        (N, d.counts.sum(0)),
        (lam.sum(), (d.nodes[:, None] * d.counts).sum(0)),
        (lam.square().sum(), (d.nodes.square()[:, None] * d.counts).sum(0)),
    ):
        assert abs(per_probe.mean() - truth) < 5 * per_probe.std() / 10**0.5 + 5e-3 * lam.abs().sum()
    for k in (5, 100, 600):
        tau, low, high = d.threshold(k)
        assert low >= tau >= high or high >= tau >= low
        n, e = d.count(tau)
        assert abs(n - k) <= d.counts.mean(1).max() + 1e-6
    x = torch.linspace(-1.5, 1.5, 4001, dtype=f64)
    assert abs(torch.trapezoid(d.density(x), x) - 1) < 1e-2


def case(lam, seed, k_max=600, **kw):
    A = SynthOperator(lam, seed=7, **kw)
    U = A.eigvecs(k_max).double().cpu()
    order = (U[:, :200].square().sum(1) * torch.from_numpy(np.random.default_rng(seed).random(N))).argsort(
        descending=True
    )
    ks = torch.tensor([5, 12, 60, 120, 300, 600])
    return A, order, ks, torch.stack([U[order[:k]][:, :k].square().sum() / k for k in ks.tolist()])


@pytest.mark.parametrize('probes, steps', [(8, 25), (8, 8), (3, 50), (1, 120)])
def test_the_interval_covers(lam, probes, steps):
    "Resolved or not, beyond what is resolved with what is possible"
    hits = trials = 0
    for seed in range(8):
        A, order, ks, truth = case(lam, seed)
        e = quiet(overlap_slq, A, order, ks, num_probes=probes, num_steps=steps, seed=seed)
        ok = (e.low <= truth + 1e-9) & (truth <= e.high + 1e-9)
        assert (ok | (e.high - e.low < 0.5)).all()
        hits, trials = hits + int(ok.sum()), trials + len(ks)
        assert (
            (e.low <= e.overlap + 1e-12).all()
            and (e.overlap <= e.high + 1e-12).all()
            and ((ks <= e.info['resolved']) | ~e.info['trusted']).all()
        )
    assert hits >= 0.9 * trials


def diagonal(lam, dtype=torch.float32, device='cpu'):
    d = lam.to(device, dtype)[:, None]
    return FunctionLinearOperator(
        lambda V: d * V, (len(d), len(d)), rmatmat=lambda V: d * V, dtype=dtype, device=device
    )


@pytest.mark.parametrize('probes', [1, 2, 8])
@pytest.mark.parametrize('kind', ['even', 'semicircle', 'noise beside outliers', 'three values'])
def test_mixtures_are_not_taken_for_eigenvectors(kind, probes):
    "All nodes stand for all eigenvalues, though residuals are small against values in a dense spectrum"
    n, g = 20_000, np.random.default_rng(0)
    lam = {
        'even': np.linspace(-1, 1, n),
        'semicircle': 2 * g.beta(1.5, 1.5, n) - 1,
        'noise beside outliers': np.r_[g.uniform(0.5, 1, n // 10), g.uniform(-0.05, 0.05, n - n // 10)],
        'three values': np.repeat([2.0, -1.0, 0.5], [5000, 5000, 10_000]),
    }[kind]
    s = BlockLanczos(diagonal(torch.from_numpy(lam)), probes, seed=1)
    for _ in range(160 // probes):
        s.step()
    theta, F, W, E = ritz_quadrature(s)
    total = torch.where(E, 1.0, W.square().mean(1)).sum()
    assert abs(total / n - 1) < 0.015


@pytest.mark.parametrize('probes, steps', [(1, 60), (4, 15)])
def test_more_steps_resolve_more(lam, probes, steps):
    A, order, ks, truth = case(lam, 0)
    a, b = (quiet(overlap_slq, A, order, ks, num_probes=probes, num_steps=m, seed=0) for m in (steps, 2 * steps))
    assert 0 <= a.info['resolved'] <= b.info['resolved'] <= N * 1.3 and resolved(b.info['state']) == b.info['resolved']
    nodes = cut_nodes(b.info['state'], ks).abs()
    assert (nodes.diff() <= 0).all() and torch.equal(nodes, b.info['threshold'])


def test_other_ks_do_not_matter():
    A, order, ks, _ = case(synth_eigvals(N, **SPECTRA['slow tail, both signs']), 0)
    a = quiet(overlap_slq, A, order, ks, num_probes=4, num_steps=30, seed=0)
    for i, k in enumerate(ks):
        b = quiet(overlap_slq, A, order, k[None], num_probes=4, num_steps=30, seed=0)
        for x, y in ((a.overlap, b.overlap), (a.low, b.low), (a.high, b.high), (a.stderr, b.stderr)):
            torch.testing.assert_close(x[i : i + 1], y, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize('probes', [1, 2, 4])
def test_standard_errors_are_the_spread(probes):
    "Over many signs on a known projector: the variance as estimated from all products, and the bound, are large enough"
    g = np.random.default_rng(0)
    n, k = 400, 60
    P = np.linalg.qr(g.normal(size=(n, k)) * (1 + 3 * (np.arange(n) < 60))[:, None])[0]
    M = np.arange(n) < 60
    c = (P[M] ** 2).sum() / k
    parts, means = [], []
    for _ in range(2000):
        y = P @ (P.T @ g.choice([-1.0, 1.0], (n, probes)))
        S, C = torch.from_numpy(y[M].T @ y[M]), torch.from_numpy(y.T @ y)
        parts.append((S, C))
        means.append(float((S - c * C).trace() / probes))
    se, half = (torch.stack(v) for v in zip(*(sampling_error([part]) for part in parts)))
    spread = np.std(means)
    assert 1 <= se.square().mean() ** 0.5 / spread <= (4 if probes == 1 else 1.25)
    assert np.mean(np.abs(means) <= half.numpy()) >= 0.93


def test_exact_where_the_space_is_spanned():
    A, order, ks, truth = case(synth_eigvals(N, **SPECTRA['fast tail']), 0)
    e = overlap_slq(A, order, ks[:2], num_probes=10, num_steps=60, seed=0)
    torch.testing.assert_close(e.overlap, truth[:2], rtol=1e-6, atol=0)
    assert (e.stderr < 1e-9).all()


@pytest.mark.parametrize(
    'kw', [dict(basis_dtype=torch.bfloat16), dict(basis_dtype=torch.float16), dict(basis_place='files')], ids=str
)
def test_any_basis(kw, tmp_path):
    if 'basis_place' in kw:
        kw = dict(basis_place=tmp_path)
    A, order, ks, _ = case(synth_eigvals(N, **SPECTRA['slow tail, both signs']), 0)
    a, b = (quiet(overlap_slq, A, order, ks, num_probes=8, num_steps=30, seed=0, **k) for k in ({}, kw))
    torch.testing.assert_close(a.overlap, b.overlap, rtol=0 if 'basis_place' in kw else 2e-2, atol=0)


def test_parts_add_up_and_orderings_do_not_matter_to_each_other():
    A, order, ks, _ = case(synth_eigvals(N, **SPECTRA['slow tail, both signs']), 0)
    other = torch.arange(N)
    groups = torch.from_numpy(np.random.default_rng(0).integers(0, 4, N))
    both = quiet(overlap_slq, A, dict(a=order, b=other), ks, groups=groups, num_steps=20, seed=0)
    alone = quiet(overlap_slq, A, other, ks, num_steps=20, seed=0)
    torch.testing.assert_close(both['b'].overlap, alone.overlap, rtol=1e-12, atol=0)
    torch.testing.assert_close(both['a'].info['groups'].sum(1), both['a'].overlap, rtol=1e-12, atol=0)
    assert both['a'].info['groups'].shape == (len(ks), 4) and both['a'].info['matvecs'] == 160


def test_all_parameters_share_everything():
    "Summed over disjoint masks that cover all parameters, the traces are k"
    A = SynthOperator(synth_eigvals(N, **SPECTRA['slow tail, both signs']), seed=7)
    e = quiet(overlap_slq, A, torch.arange(N), torch.tensor([N - 1]), num_steps=30, seed=0)
    assert abs(e.overlap[0] - 1) < 0.01


def test_interrupted_and_continued(tmp_path):
    A, order, ks, _ = case(synth_eigvals(N, **SPECTRA['slow tail, both signs']), 0)
    s = BlockLanczos(A, 6, seed=4)
    for _ in range(9):
        s.step()
    s.save(tmp_path / 's.pt')
    a = quiet(
        overlap_slq, A, order, ks, num_probes=6, num_steps=24, start=BlockLanczos.load(tmp_path / 's.pt', A), seed=4
    )
    b = quiet(overlap_slq, A, order, ks, num_probes=6, num_steps=24, seed=4)
    assert (
        torch.equal(a.overlap, b.overlap)
        and torch.equal(a.low, b.low)
        and a.info['matvecs'] == b.info['matvecs'] == 144
    )


def test_tol_is_met_or_said():
    A, order, ks, truth = case(synth_eigvals(N, **SPECTRA['slow tail, both signs']), 0)
    e = quiet(overlap_slq, A, order, ks[2:], num_probes=6, num_steps=16, tol=0.05, max_matvecs=4000, seed=0)
    assert ((e.high - e.low) / 2 <= 0.05 * e.overlap * (1 + 1e-9)).all() and e.info['matvecs'] > 96
    with pytest.warns(RuntimeWarning, match='raise max_matvecs'):
        overlap_slq(A, order, ks[2:], num_probes=6, num_steps=16, tol=0.001, max_matvecs=200, seed=0)


@pytest.mark.parametrize(
    'call, says',
    [
        (lambda A, o: overlap_slq(A, o[:-1], seed=0), 'each of the'),
        (lambda A, o: overlap_slq(A, o, torch.tensor([0]), seed=0), 'ks must ascend between 1 and n - 1'),
        (lambda A, o: overlap_slq(A, o, torch.tensor([N]), seed=0), 'ks must ascend between 1 and n - 1'),
        (lambda A, o: overlap_slq(A, o, torch.tensor([1.5]), seed=0), 'ks must ascend between 1 and n - 1'),
        (lambda A, o: overlap_slq(A, o, num_probes=0, seed=0), 'num_probes'),
        (lambda A, o: spectral_density(A, num_probes=1, seed=0), 'num_probes'),
        (lambda A, o: overlap_slq(A, o, num_steps=3, seed=0), 'num_steps'),
        (lambda A, o: overlap_slq(A, dict(x=o.clone().fill_(1)), seed=0), "the ordering 'x' must hold each"),
        (lambda A, o: overlap_slq(A, o, groups=torch.ones(3), seed=0), 'groups must be'),
        (lambda A, o: spectral_density(A, num_steps=5, seed=0).threshold(N), 'between 0 and n'),
        (lambda A, o: overlap_slq(A, o, start=BlockLanczos(A, 4, seed=0, start=A.eigvecs(3)), seed=0), 'random signs'),
        (lambda A, o: overlap_slq(A, o, start=A.eigvecs(3), seed=0), 'start must be a BlockLanczos'),
    ],
)
def test_faults(call, says):
    A = SynthOperator(synth_eigvals(N, **SPECTRA['fast tail']), seed=7)
    with pytest.raises((ValueError, TypeError), match=says):
        call(A, torch.arange(N))
