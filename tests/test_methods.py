"Methods: they find what a dense decomposition finds, intervals hold the truth, settings are refused by name."

import dataclasses
import warnings

import numpy as np
import pytest
import torch

import hessian_overlap.methods as methods
from hessian_overlap.krylov import eigsh
from hessian_overlap.masks import Partition
from hessian_overlap.methods import METHODS, SLQ, Eigsh, Seigh, as_settings, default_ks, draws, from_settings, orderings
from hessian_overlap.overlaps import overlap_curve

N = 200
PARTS = Partition(['a', 'b', 'c'], torch.arange(N) % 3)
ALL = [Eigsh(k=12), Seigh(k=12), SLQ(ks=(2, 5, 20, 60), num_probes=4, num_steps=20)]


def matrix(seed=0, decay=0.85):
    "Symmetric, of decaying spectrum and both signs, with eigenvectors that prefer the first parameters"
    g = torch.Generator().manual_seed(seed)
    weight = torch.linspace(3, 0.3, N, dtype=torch.float64)[:, None]
    Q = torch.linalg.qr(torch.randn(N, N, generator=g, dtype=torch.float64) * weight)[0]
    lam = decay ** torch.arange(N).double() * torch.where(torch.arange(N) % 3 == 1, -1, 1)
    return Q * lam @ Q.T, lam, Q


ORDERS = dict(magnitude=torch.arange(N), layerwise=torch.arange(N).flip(0), mine=torch.arange(N).roll(7))


def quiet(m, A=None, orders=ORDERS, num_random=3, seed=0):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', RuntimeWarning)
        return m.measure(matrix()[0] if A is None else A, orders, PARTS, num_random=num_random, seed=seed)


def exact(name, k, seed=0, num_random=3):
    "The curve of an ordering by the true eigenvectors"
    U = matrix()[2]
    if isinstance(name, int):
        order = draws(N, num_random, seed)[name]
    else:
        order = ORDERS[name]
    return (U[order[:k], :k] ** 2).sum().item() / k


@pytest.mark.parametrize('m', ALL, ids=lambda m: m.name)
def test_all_have_the_same_variables(m):
    ds = quiet(m)
    dims = {name: v.dims for name, v in ds.data_vars.items()}
    assert dims == {name: v.dims for name, v in quiet(ALL[0]).data_vars.items()}
    assert ds.order.values.tolist() == ['magnitude', 'random', 'layerwise', 'mine', 'best']
    assert ds.attrs == dict(n=N, method=m.name) and ds.layer.values.tolist() == ['a', 'b', 'c']
    assert (ds.layer_size.values == PARTS.sizes.numpy()).all() and ds.seconds > 0
    known = ds.sel(order=[o for o in ds.order.values if o != 'best'])
    assert np.isfinite(known.overlap).all() and np.isfinite(known.table).all()
    assert np.isnan(ds.sel(order=['random', 'best'])[['low', 'high']].to_array()).all()
    np.testing.assert_allclose(ds.overlap.sel(order='random'), ds.random.mean('draw'))
    np.testing.assert_allclose(known.layers.sum('layer'), known.table, atol=1e-4)
    assert (known.low <= known.overlap).where(np.isfinite(known.low), True).all()
    assert (known.high >= known.overlap).where(np.isfinite(known.high), True).all()


def test_eigenpairs_against_a_dense_decomposition():
    ds, (_, lam, U) = quiet(ALL[0]), matrix()
    np.testing.assert_allclose(ds.eigvals, lam[:12], rtol=1e-8)
    for name in ('magnitude', 'layerwise', 'mine'):
        one = ds.sel(order=name)
        want = np.array([exact(name, k) for k in range(1, 13)])
        np.testing.assert_allclose(one.overlap, want, atol=1e-6)
        assert ((one.low - 1e-12 <= want) & (want <= one.high + 1e-12)).all() and (one.high - one.low < 1e-3).all()
    for i in range(3):
        np.testing.assert_allclose(ds.random[i], [exact(i, k) for k in range(1, 13)], atol=1e-6)
    best = [(U[:, :k] ** 2).sum(1).sort(descending=True).values[:k].sum() / k for k in range(1, 13)]
    np.testing.assert_allclose(ds.overlap.sel(order='best'), best, atol=1e-6)
    np.testing.assert_allclose(ds.variance, (U[:, :12] ** 2).cumsum(1).var(0, correction=0), rtol=1e-4)
    cell = ds.table.sel(order='mine', size=12, rank=12)
    np.testing.assert_allclose(cell, exact('mine', 12), atol=1e-6)
    assert ds.converged and ds.trusted.all() and (ds.residuals <= 1e-5 * abs(ds.eigvals) + 1e-12).all()


def test_what_has_not_converged_is_not_trusted(monkeypatch):
    def early(A, k, **kw):
        return eigsh(A, k, **kw, max_matvecs=40)

    monkeypatch.setattr(methods, 'eigsh', early)
    ds = quiet(Eigsh(k=12, block_size=4), A=matrix(decay=0.97)[0])
    assert not ds.converged and not ds.trusted.all()
    first = ds.trusted.sel(order='magnitude').values.argmin()
    assert not ds.trusted[:, first:].any()
    U = matrix(decay=0.97)[2]
    one = ds.sel(order='magnitude')
    want = np.array([(U[:k, :k] ** 2).sum() / k for k in range(1, 13)])
    assert ((one.low <= want) & (want <= one.high)).all()


def test_the_numerical_rank_ends_what_is_trusted(monkeypatch):
    def ranked(A, k, **kw):
        res = eigsh(A, k, **kw)
        return res._replace(info=res.info | dict(rank=7))

    monkeypatch.setattr(methods, 'eigsh', ranked)
    assert quiet(ALL[0]).trusted.sel(order='magnitude').values.tolist() == [True] * 7 + [False] * 5


def test_a_sketch_does_not_pass_for_exact():
    ds = quiet(Seigh(k=12))
    assert not ds.converged and not ds.trusted.any() and np.isnan(ds[['low', 'high', 'residuals']].to_array()).all()
    assert ds.matvecs == 34
    for recovery in ('singlepass', 'nystrom', 'hmt'):
        assert quiet(Seigh(k=12, recovery=recovery)).overlap.sel(order='magnitude', k=12) == pytest.approx(
            exact('magnitude', 12), abs=0.1
        )


def test_quadrature_holds_the_truth_in_its_intervals():
    hits = trials = 0
    for seed in range(4):
        ds = quiet(ALL[2], seed=seed)
        for name in ('magnitude', 'layerwise', 'mine'):
            one = ds.sel(order=name)
            want = np.array([exact(name, k) for k in ds.k.values])
            hits += (((one.low <= want + 1e-9) & (want - 1e-9 <= one.high)) | ~one.trusted).sum().item()
            trials += len(want)
    assert hits >= 0.9 * trials
    assert np.isnan(ds.overlap.sel(order='best')).all() and np.isnan(ds.table.sel(order='best')).all()
    assert ds.matvecs == 80 and (ds.half.sel(order='mine') > 0).any()
    assert ds.converged == ds.trusted.sel(order='magnitude').all()


def test_one_warning_says_what_is_not_resolved():
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter('always')
        SLQ(ks=(2, 150), num_probes=4, num_steps=20).measure(matrix()[0], ORDERS, PARTS, num_random=2, seed=0)
    said = [str(w.message) for w in said if w.category is RuntimeWarning]
    assert len(said) == 1 and 'not resolved at 1 of 2 mask sizes, first at k = 150; raise num_steps' in said[0]


@pytest.mark.parametrize('m', ALL, ids=lambda m: m.name)
def test_the_same_seed_gives_the_same_numbers(m):
    a, b, c = (quiet(m, seed=s).drop_vars('seconds') for s in (0, 0, 1))
    assert a.identical(b) and not a.random.equals(c.random)


@pytest.mark.parametrize('m', ALL, ids=lambda m: m.name)
def test_no_random_masks(m):
    ds = quiet(m, num_random=0)
    assert ds.draw.size == 0 and 'random' not in ds.order.values and ds.random.shape == (0, ds.k.size)


def test_neighbouring_runs_share_no_mask():
    seen = {tuple(o.tolist()) for seed in range(5) for o in draws(40, 5, seed)}
    assert len(seen) == 25


def test_eigenpairs_that_are_not_finite(monkeypatch):
    res = eigsh(matrix()[0], 3, seed=0)
    monkeypatch.setattr(methods, 'eigsh', lambda *a, **k: res._replace(eigvals=res.eigvals * float('nan')))
    with pytest.raises(FloatingPointError, match='eigsh gave eigenpairs that are not finite'):
        quiet(Eigsh(k=3))


def test_orderings():
    m = torch.nn.Linear(4, 3)
    named = orderings(m, dict(mine=torch.arange(15)))
    assert list(named) == ['magnitude', 'layerwise', 'mine']
    flat = torch.cat([p.detach().reshape(-1) for p in m.parameters()]).abs()
    assert (flat[named['magnitude']].diff() <= 0).all()
    for name in ('magnitude', 'layerwise', 'random', 'best'):
        with pytest.raises(ValueError, match=f"cannot be named '{name}'"):
            orderings(m, {name: torch.arange(15)})
    with pytest.raises(ValueError, match='must hold each of the 200'):
        quiet(Eigsh(k=3), orders=ORDERS | dict(bad=torch.zeros(N, dtype=torch.int64)))


@pytest.mark.parametrize('m', [Eigsh(), Seigh(), SLQ(), *ALL, Seigh(recovery='hmt')], ids=str)
@pytest.mark.parametrize('n', [N, 7030])
def test_settings_there_and_back(m, n):
    sized = m.sized(n)
    assert sized.sized(n) == sized and from_settings(as_settings(sized)) == sized and type(sized) is type(m)
    assert sized.mask_sizes[-1] <= n and hash(m) is not None
    with pytest.raises(dataclasses.FrozenInstanceError):
        m.name = 'other'


def test_defaults():
    assert Eigsh().sized(7030).k == 350 and Eigsh().sized(100).k == 100
    assert Seigh(k=10).sized(7030) == Seigh(k=10, num_outer=15, num_inner=30)
    assert Seigh(k=10).sized(12) == Seigh(k=10, num_outer=12, num_inner=12)
    s = SLQ().sized(7030)
    assert (s.ks[0], s.ks[-1], len(s.ks), s.num_steps) == (7, 1406, 20, 80)
    assert SLQ(ks=50).sized(7030).ks[-1] == 50 and SLQ().sized(100).num_steps == 10
    assert SLQ(ks=[3, 9]).sized(100).ks == (3, 9)
    assert default_ks(10**6, 10**5)[0] == 1000 and default_ks(20, 3) == [1, 2, 3]
    assert list(METHODS) == ['eigsh', 'seigh', 'slq']


@pytest.mark.parametrize(
    'm, says',
    [
        (Eigsh(k=201), 'k = 201 is more than the n = 200'),
        (Eigsh(k=0), 'k must be an integer at least 1, got 0'),
        (Eigsh(k=2.5), 'got 2.5'),
        (Eigsh(k=True), 'got True'),
        (Eigsh(tol=0), 'tol must be'),
        (Eigsh(tol=float('nan')), 'tol must be'),
        (Eigsh(tol=1.0), 'tol must be'),
        (Eigsh(block_size=0), 'block_size must be an integer from 1 to 200, got 0'),
        (Seigh(k=10, num_outer=9), 'num_outer must be an integer from 10 to 200'),
        (Seigh(k=10, num_outer=30, num_inner=20), 'num_inner = 20 is less than num_outer = 30'),
        (Seigh(num_inner=201), 'num_inner must be .*200'),
        (SLQ(num_probes=0), 'num_probes must be an integer from 1 to 200, got 0'),
        (SLQ(num_probes=40), 'slq with 40 probes needs at least 240'),
        (SLQ(num_steps=3), 'num_steps must be an integer at least 4, got 3'),
        (SLQ(num_steps=30), '30 blocks of 8 probes do not fit into 200 parameters, 23 do'),
        (SLQ(ks=200), 'slq goes up to k = 199'),
        (SLQ(ks=(5, 5)), r'ks must ascend and not be empty, got \[5, 5\]'),
        (SLQ(ks=()), 'ks must ascend and not be empty'),
        (SLQ(ks=(1, 2.5)), 'one of ks must be'),
    ],
    ids=str,
)
def test_wrong_settings_are_refused_by_name(m, says):
    with pytest.raises((ValueError, TypeError), match=says) as e:
        m.sized(N)
    assert '\n' not in str(e.value)
    with pytest.raises((ValueError, TypeError), match=says):
        quiet(m)


@pytest.mark.parametrize(
    's, says',
    [
        (dict(name='power'), "unknown method 'power'; choose eigsh, seigh, slq"),
        (dict(name='slq', tol=1e-3), 'tol is not a setting of slq, which has ks, num_probes, num_steps'),
        (dict(name='eigsh', num_outer=3), 'num_outer is not a setting of eigsh'),
    ],
)
def test_unknown_settings(s, says):
    with pytest.raises(ValueError, match=says):
        from_settings(s)


def test_curves_are_those_of_the_overlap_functions():
    res = eigsh(matrix()[0], 12, seed=0)
    ds = quiet(ALL[0])
    assert (ds.overlap.sel(order='magnitude').values == overlap_curve(ORDERS['magnitude'], res.eigvecs).numpy()).all()
