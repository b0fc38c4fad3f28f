"Laws of subspaces, masks and overlaps"
import math, numpy as np, pytest, torch
from hessian_overlap.grassmann import chance_overlap, overlap, principal_angles
from hessian_overlap.masks import Mask, best_order, magnitude_order, random_order
from hessian_overlap.overlap import best_overlap_curve, mask_overlap, overlap_curve, overlap_table
from hessian_overlap.synthmat import column_noise

DEVICES = ['cpu'] + (['cuda'] if torch.cuda.is_available() else [])
f64 = torch.float64
def basis(n, k, seed, dtype=f64, device='cpu'): return torch.linalg.qr(column_noise(n, range(k), seed=seed, kind='gauss')).Q.to(device, dtype)

@pytest.mark.parametrize('n, k, l', [(1, 1, 1), (5, 1, 3), (30, 7, 7), (30, 12, 4), (60, 60, 60), (40, 25, 30)])
@pytest.mark.parametrize('dtype', [torch.float32, f64])
@pytest.mark.parametrize('device', DEVICES)
def test_overlap_laws(n, k, l, dtype, device):
    tol = dict(rtol=0, atol=3e-6 if dtype == torch.float32 else 1e-13)
    U, V, R, G = basis(n, k, 1, dtype, device), basis(n, l, 2, dtype, device), basis(k, k, 3, dtype, device), basis(n, n, 4, dtype, device)
    o = overlap(U, V)
    assert 0 <= o <= 1 + 1e-5 and o.dtype == dtype and o.device == U.device
    for other in (overlap(V, U), overlap(U @ R, V), overlap(G @ U, G @ V), principal_angles(U, V).cos().square().mean()): torch.testing.assert_close(other, o, **tol)
    a = principal_angles(U, V)
    assert len(a) == min(k, l) and (a.diff() >= -1e-6).all() and (a >= 0).all() and (a <= math.pi/2 + 1e-6).all()
    torch.testing.assert_close(principal_angles(V, U), a, rtol=0, atol=1e-3 if dtype == torch.float32 else 1e-7)
    if k + l > n: assert a[0] < (2e-3 if dtype == torch.float32 else 1e-7) # subspaces must meet

def test_angles_against_scipy():
    from scipy.linalg import subspace_angles
    for n, k, l in ((20, 5, 5), (20, 3, 8)):
        U, V = basis(n, k, 1), basis(n, l, 2)
        np.testing.assert_allclose(principal_angles(U, V).numpy(), np.sort(subspace_angles(U.numpy(), V.numpy())), atol=1e-12)

@pytest.mark.parametrize('t', [0., 1e-15, 1e-10, 1e-5, .3, math.pi/4, 1.2, math.pi/2 - 1e-9, math.pi/2])
def test_prescribed_angle(t):
    Q = basis(40, 6, 0); t3 = torch.full((3,), t, dtype=f64)
    a = principal_angles(Q[:, :3], Q[:, :3]*t3.cos() + Q[:, 3:]*t3.sin())
    torch.testing.assert_close(a, t3, rtol=1e-9, atol=1e-15)

U, V = basis(12, 3, 0), basis(12, 3, 1)
@pytest.mark.parametrize('call, error, says', [
    (lambda: overlap(2*U, V), ValueError, 'not orthonormal'), (lambda: overlap(U, V.float()), TypeError, 'cast or move'), (lambda: overlap(U[:, 0], V), ValueError, r'\(n, k\)'),
    (lambda: overlap(U, basis(11, 3, 1)), ValueError, '12 and 11'), (lambda: overlap(U.numpy(), V), ValueError, 'ndarray'), (lambda: principal_angles(U*float('nan'), V), ValueError, 'nan'),
    (lambda: overlap(U.T, V), ValueError, 'columns in 3'), (lambda: chance_overlap(5, 6), ValueError, 'k'), (lambda: chance_overlap(5, 0), ValueError, 'k'),
    (lambda: mask_overlap(Mask(torch.arange(3), n=13), U), ValueError, '12 rows, there are 13'), (lambda: mask_overlap(Mask(torch.arange(3), n=12), U*float('nan')), ValueError, 'norm 1'),
    (lambda: mask_overlap(torch.arange(3), U), TypeError, 'must be a Mask'), (lambda: overlap_curve(torch.arange(11), U), ValueError, 'each of the 12'),
    (lambda: overlap_curve(torch.zeros(12, dtype=torch.int64), U), ValueError, 'each of the 12'), (lambda: overlap_curve(torch.arange(12.), U), TypeError, 'int64'),
    (lambda: overlap_curve(torch.arange(12), U, [4]), ValueError, 'at most k = 3'), (lambda: overlap_table(torch.arange(12), U, [2, 1]), ValueError, 'ascend'),
    (lambda: overlap_table(torch.arange(12), U, [0]), ValueError, 'ascend'), (lambda: overlap_table(torch.arange(12), U, [13]), ValueError, 'ascend'),
    (lambda: best_overlap_curve(U, [0]), ValueError, 'ascend'), (lambda: magnitude_order([]), ValueError, 'empty'), (lambda: magnitude_order(torch.tensor([1., math.nan])), ValueError, 'NaN'),
    (lambda: magnitude_order(torch.ones(3), 'layer'), ValueError, 'list of parameter tensors'), (lambda: random_order(0, seed=1), ValueError, 'at least 1'), (lambda: best_order(U[:, 0]), ValueError, 'must be'),
    (lambda: Mask(torch.tensor([0, 0]), n=4), ValueError, 'distinct'), (lambda: Mask(torch.tensor([4]), n=4), ValueError, 'between 0 and'), (lambda: Mask(torch.tensor([-1]), n=4), ValueError, 'between 0'),
    (lambda: Mask(torch.tensor([1])), ValueError, 'need n'), (lambda: Mask(torch.zeros(4, dtype=torch.bool)), ValueError, 'empty'), (lambda: Mask(torch.ones(4, dtype=torch.bool), k=3), ValueError, 'expected k = 3'),
    (lambda: Mask(torch.ones(4, dtype=torch.bool), n=5), ValueError, 'expected n = 5'), (lambda: Mask(torch.ones(4)), TypeError, 'booleans or int64')])
def test_refused(call, error, says):
    with pytest.raises(error, match=says): call()

@pytest.mark.parametrize('n, k', [(1, 1), (20, 5), (50, 50), (200, 30)])
@pytest.mark.parametrize('dtype', [torch.float32, f64])
@pytest.mark.parametrize('device', DEVICES)
def test_curves_and_tables_are_sums_of_squares(n, k, dtype, device):
    U, order = basis(n, k, 5, dtype, device), random_order(n, seed=3).to(device)
    S = U.double().square()
    sizes = sorted({1, 2, k, n} & set(range(1, n+1)))
    table = overlap_table(order, U, sizes)
    for i, m in enumerate(sizes):
        for r in sorted({1, k//2 or 1, k}): torch.testing.assert_close(table[i, r-1], S[order[:m], :r].sum()/min(m, r), rtol=1e-12, atol=1e-14)
    curve, best = overlap_curve(order, U), best_overlap_curve(U)
    assert curve.dtype == f64 and len(curve) == k == len(best) and (curve <= best + 1e-12).all()
    for m in sorted({1, k//2 or 1, k}):
        mask = Mask(order, n=n, k=m)
        torch.testing.assert_close(curve[m-1], mask_overlap(mask, U[:, :m]), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(best[m-1], overlap_curve(best_order(U[:, :m]), U[:, :m])[-1], rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(curve[m-1].to(dtype), overlap(torch.eye(n, dtype=dtype, device=device)[:, mask.indices], U[:, :m]), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(overlap_table(order, U, [n])[0], torch.ones(k, dtype=f64, device=device), rtol=0, atol=1e-5)
    ks = sorted({1, k//2 or 1, k})
    torch.testing.assert_close(overlap_curve(order, U, ks), curve[torch.tensor(ks)-1]); torch.testing.assert_close(best_overlap_curve(U, ks), best[torch.tensor(ks)-1])

def test_best_is_best_by_brute_force():
    from itertools import combinations
    U = basis(9, 3, 2)
    for k in (1, 2, 3):
        brute = max(mask_overlap(Mask(torch.tensor(c), n=9), U[:, :k]).item() for c in combinations(range(9), k))
        assert abs(brute - best_overlap_curve(U)[k-1].item()) < 1e-14

def test_mean_over_all_masks_is_chance():
    from itertools import combinations
    U = basis(8, 3, 2)
    for k in (1, 3, 5): assert abs(np.mean([mask_overlap(Mask(torch.tensor(c), n=8), U).item() for c in combinations(range(8), k)]) - chance_overlap(8, k, 3)) < 1e-14

def test_orders_are_permutations_and_masks_nest():
    params = [torch.randn(4, 5, generator=torch.Generator().manual_seed(0)), torch.zeros(6), torch.ones(1, 3)]
    n = 29
    for order in (magnitude_order(params), magnitude_order(params, 'layer'), random_order(n, seed=0), best_order(basis(n, 3, 0))):
        assert torch.equal(order.sort().values, torch.arange(n)) and order.dtype == torch.int64
        for k in range(1, n): assert Mask(order, n=n, k=k+1).to_bool()[Mask(order, n=n, k=k).indices].all()
    assert torch.equal(magnitude_order(params), magnitude_order(torch.nn.utils.parameters_to_vector(params)))
    assert magnitude_order(torch.zeros(6)).tolist() == list(range(6)), 'ties go to the lower index'
    assert magnitude_order(iter(params)).tolist() == magnitude_order(params).tolist()

def test_layer_scope_keeps_shares():
    params = [10.**i*torch.rand(s, generator=torch.Generator().manual_seed(i)) for i, s in enumerate((100, 30, 10))]
    for k in (14, 70, 126):
        parts = Mask(magnitude_order(params, 'layer'), n=140, k=k).to_bool().split([100, 30, 10])
        assert all(abs(p.sum().item() - k/140*len(p)) <= 1 for p in parts)

def test_mask_round_trip():
    order = random_order(20, seed=1); m = Mask(order, n=20, k=7)
    for same in (Mask(m.to_bool()), Mask(m.indices, n=20), Mask([m.to_bool()[:5].reshape(5, 1), m.to_bool()[5:]])): assert torch.equal(same.indices, m.indices) and (same.k, same.n) == (7, 20)
    assert torch.equal(random_order(100, seed=1), random_order(100, seed=1)) and not torch.equal(random_order(100, seed=1), random_order(100, seed=2))
