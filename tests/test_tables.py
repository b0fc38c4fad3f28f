"Tables: against the definitions, for every dtype, mask size and rank."

import warnings

import numpy as np
import pytest
import torch

from hessian_overlap import Mask, Partition, best_order, mask_overlap, random_order
from hessian_overlap.quadrature import cut_nodes
from hessian_overlap.tables import (
    best_table,
    chance_std,
    eigenspace_tables,
    grid,
    layer_table,
    leverage_var,
    quadrature_tables,
)


def space(n, k, dtype=torch.float64):
    return torch.linalg.qr(torch.randn(n, k, dtype=dtype, generator=torch.Generator().manual_seed(n + k))).Q


@pytest.mark.parametrize('n, k', [(1, 1), (5, 1), (5, 5), (100, 7), (7030, 350), (11_700_000, 500)])
def test_grid(n, k):
    sizes, ranks = grid(n, k)
    assert (
        (np.diff(sizes) > 0).all()
        and (np.diff(ranks) > 0).all()
        and sizes[-1] == n
        and ranks[-1] == k
        and set(ranks) <= set(sizes)
        and ranks[0] >= 1
    )


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('n, k', [(12, 12), (40, 5), (40, 1)])
def test_against_single_masks(n, k, dtype):
    U, parts, order = space(n, k, dtype), Partition(['a', 'b', 'c'], torch.arange(n) % 3), random_order(n, seed=1)
    sizes, ranks = grid(n, k)
    t = eigenspace_tables(U, dict(order=order), parts, sizes, ranks)
    for i, m in enumerate(sizes.tolist()):
        for j, r in enumerate(ranks.tolist()):
            assert t['table'][0, i, j] == pytest.approx(mask_overlap(Mask(order, n=n, k=m), U[:, :r]).item(), abs=1e-6)
            assert t['table'][1, i, j] == pytest.approx(
                mask_overlap(Mask(best_order(U[:, :r]), n=n, k=m), U[:, :r]).item(), abs=1e-6
            )
    np.testing.assert_allclose(t['layers'].sum(-1), t['table'])
    np.testing.assert_allclose(t['available'].sum(-1), 1, atol=1e-5)


def test_chance_is_what_random_masks_do():
    n, k, m = 60, 6, 9
    U = space(n, k)
    v = leverage_var(U).numpy()
    draws = np.array([mask_overlap(Mask(random_order(n, seed=s), n=n, k=m), U).item() for s in range(3000)])
    assert draws.mean() == pytest.approx(m / n, abs=4 * draws.std() / 3000**0.5) and draws.std() == pytest.approx(
        chance_std(n, m, k, v[-1]), rel=0.06
    )
    assert chance_std(n, n, k, v[-1]) == 0


def test_refuses():
    U, parts = space(10, 2), Partition(['a'], torch.zeros(10, dtype=torch.int64))
    for bad, says in [
        (lambda: grid(3, 4), 'k must be an integer from 1 to 3, got 4'),
        (lambda: layer_table(torch.arange(9), U, parts, [1], [1]), '10 parameter indices'),
        (lambda: layer_table(torch.arange(10), U, parts, [], [1]), 'sizes must ascend'),
        (lambda: layer_table(torch.arange(10), U, parts, [1], [3]), 'ranks must ascend'),
        (lambda: best_table(2 * U, parts, [1], [1]), 'norm 1'),
        (lambda: leverage_var(U[:, :1].expand(10, 2)), 'not orthogonal'),
        (
            lambda: layer_table(torch.arange(10), U, Partition(['a'], torch.zeros(4, dtype=torch.int64)), [1], [1]),
            'partition is of 4',
        ),
    ]:
        with pytest.raises(ValueError, match=says):
            bad()


@pytest.mark.parametrize(
    'n, ks', [(100, [50]), (100, [1, 99]), (7030, sorted({round(v) for v in np.geomspace(7, 3515, 20)}))]
)
def test_grid_of_some_ranks(n, ks):
    sizes, ranks = grid(n, ks[-1], ks=ks)
    assert (
        set(ranks) <= set(ks)
        and set(ranks) <= set(sizes)
        and len(ranks) == min(10, len(ks))
        and (ranks[0], ranks[-1], sizes[-1]) == (ks[0], ks[-1], n)
        and (np.diff(sizes) > 0).all()
    )


@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
@pytest.mark.parametrize('basis', [None, torch.bfloat16])
def test_without_eigenvectors(dtype, basis):
    "Every mask size, rank and layer, against the eigenvectors; on the diagonal, against the curve"
    from hessian_overlap import SynthOperator, overlap_slq, synth_eigvals

    n = 1200
    lam = synth_eigvals(n, 'poly', rank=1, decay=0.7, seed=1) * torch.linspace(1.1, 1, n, dtype=torch.float64)
    A = SynthOperator(lam, seed=7, dtype=dtype)
    U = SynthOperator(lam, seed=7).eigvecs(600)
    orders = dict(
        a=(U[:, :200].square().sum(1) * torch.from_numpy(np.random.default_rng(0).random(n))).argsort(descending=True),
        b=random_order(n, seed=1),
    )
    parts = Partition(['x', 'y', 'z'], torch.arange(n) % 3)
    ks = torch.tensor([5, 60, 300, 600])
    sizes, ranks = grid(n, 600, ks=ks)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', RuntimeWarning)
        est = overlap_slq(A, orders, ks, num_probes=10, num_steps=40, basis_dtype=basis, seed=0)
    state = est['a'].info['state']
    t = quadrature_tables(state, orders, parts, sizes, ranks)
    want = eigenspace_tables(U, orders, parts, sizes, ranks)
    tol = 1e-9 if basis is None and dtype == torch.float64 else 1e-2
    for j, name in enumerate(orders):
        np.testing.assert_allclose(
            [t['table'][j, sizes.tolist().index(k), i] for i, k in enumerate(ranks.tolist())],
            est[name].overlap,
            rtol=1e-9,
        )
        inside = abs(t['table'][j] - want['table'][j]) <= t['half'][j] + 1e-4
        assert inside.mean() >= 0.9 and (t['half'][j] <= 0.5).all()
        clear = t['half'][j] < 0.02
        assert clear.mean() > 0.6
        np.testing.assert_allclose(t['layers'][j][clear], want['layers'][j][clear], atol=0.03)
        half = [t['half'][j, sizes.tolist().index(k), i] for i, k in enumerate(ranks.tolist())]
        free = (est[name].low > 0) & (est[name].high < 1)
        np.testing.assert_allclose(
            np.array(half)[free],
            torch.maximum(est[name].high - est[name].overlap, est[name].overlap - est[name].low)[free],
            rtol=1e-6,
            atol=1e-12,
        )
    np.testing.assert_allclose(t['table'][:, -1], 1, atol=tol)
    np.testing.assert_allclose(t['available'], want['available'], atol=0.02)
    np.testing.assert_allclose(t['layers'].sum(-1), t['table'])
    np.testing.assert_allclose(
        quadrature_tables(state, orders, parts, sizes[:3], ranks)['available'], t['available']
    )  # whatever sizes are asked for
    cuts = cut_nodes(state, ks).numpy()
    np.testing.assert_allclose(abs(cuts), lam.abs().sort(descending=True).values[ks - 1].numpy(), rtol=0.05)
    assert (np.diff(abs(cuts)) <= 0).all() and np.sign(cuts[0]) == np.sign(
        lam[lam.abs().argsort(descending=True)[4]].item()
    )
