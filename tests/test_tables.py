"Tables: against the definitions, for every dtype, mask size and rank."
import numpy as np, pytest, torch
from hessian_overlap import Mask, Partition, best_order, mask_overlap, overlap_record, random_order
from hessian_overlap.tables import best_table, chance_std, eigenspace_tables, grid, layer_table, leverage_var


def space(n, k, dtype=torch.float64): return torch.linalg.qr(torch.randn(n, k, dtype=dtype, generator=torch.Generator().manual_seed(n + k))).Q


@pytest.mark.parametrize("n, k", [(1, 1), (5, 1), (5, 5), (100, 7), (7030, 350), (11_700_000, 500)])
def test_grid(n, k):
    sizes, ranks = grid(n, k)
    assert (np.diff(sizes) > 0).all() and (np.diff(ranks) > 0).all() and sizes[-1] == n and ranks[-1] == k and set(ranks) <= set(sizes) and ranks[0] >= 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("n, k", [(12, 12), (40, 5), (40, 1)])
def test_against_single_masks(n, k, dtype):
    U, parts, order = space(n, k, dtype), Partition(["a", "b", "c"], torch.arange(n) % 3), random_order(n, seed=1); sizes, ranks = grid(n, k)
    t = eigenspace_tables(U, dict(order=order), parts, sizes, ranks)
    for i, m in enumerate(sizes.tolist()):
        for j, r in enumerate(ranks.tolist()):
            assert t["table"][0, i, j] == pytest.approx(mask_overlap(Mask(order, n=n, k=m), U[:, :r]).item(), abs=1e-6)
            assert t["table"][1, i, j] == pytest.approx(mask_overlap(Mask(best_order(U[:, :r]), n=n, k=m), U[:, :r]).item(), abs=1e-6)
    np.testing.assert_allclose(t["layers"].sum(-1), t["table"]); np.testing.assert_allclose(t["available"].sum(-1), 1, atol=1e-5)


def test_chance_is_what_random_masks_do():
    n, k, m = 60, 6, 9; U = space(n, k); v = leverage_var(U).numpy()
    draws = np.array([mask_overlap(Mask(random_order(n, seed=s), n=n, k=m), U).item() for s in range(3000)])
    assert draws.mean() == pytest.approx(m/n, abs=4*draws.std()/3000**.5) and draws.std() == pytest.approx(chance_std(n, m, k, v[-1]), rel=.06)
    assert chance_std(n, n, k, v[-1]) == 0


def test_refuses():
    U, parts = space(10, 2), Partition(["a"], torch.zeros(10, dtype=torch.int64))
    for bad, says in [(lambda: grid(3, 4), "k = 4, n = 3"), (lambda: layer_table(torch.arange(9), U, parts, [1], [1]), "10 parameter indices"),
                      (lambda: layer_table(torch.arange(10), U, Partition(["a"], torch.zeros(4, dtype=torch.int64)), [1], [1]), "partition is of 4")]:
        with pytest.raises(ValueError, match=says): bad()
