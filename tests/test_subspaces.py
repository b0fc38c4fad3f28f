"Laws of subspaces, masks and overlaps"

import math
import sys

import numpy as np
import pytest
import torch

from hessian_overlap.grassmann import (
    METRICS,
    chance_distance,
    chance_overlap,
    distance_matrix,
    grassmann_distance,
    mask_iou,
    metric_from_angles,
    overlap,
    principal_angles,
    random_angles,
)
from hessian_overlap.masks import (
    Mask,
    Partition,
    best_order,
    leverage,
    magnitude_order,
    mask_from_prune,
    order_from_prune,
    order_within,
    partition,
    random_order,
    score_order,
)
from hessian_overlap.noise import column_noise
from hessian_overlap.overlaps import best_overlap_curve, mask_overlap, overlap_curve, overlap_split, overlap_table

DEVICES = ['cpu'] + (['cuda'] if torch.cuda.is_available() else [])
f64 = torch.float64


def basis(n, k, seed, dtype=f64, device='cpu'):
    return torch.linalg.qr(column_noise(n, range(k), seed=seed, kind='gauss')).Q.to(device, dtype)


@pytest.mark.parametrize('n, k, l', [(1, 1, 1), (5, 1, 3), (30, 7, 7), (30, 12, 4), (60, 60, 60), (40, 25, 30)])
@pytest.mark.parametrize('dtype', [torch.float32, f64])
@pytest.mark.parametrize('device', DEVICES)
def test_overlap_laws(n, k, l, dtype, device):
    tol = dict(rtol=0, atol=3e-6 if dtype == torch.float32 else 1e-13)
    U, V, R, G = (
        basis(n, k, 1, dtype, device),
        basis(n, l, 2, dtype, device),
        basis(k, k, 3, dtype, device),
        basis(n, n, 4, dtype, device),
    )
    o = overlap(U, V)
    assert 0 <= o <= 1 + 1e-5 and o.dtype == dtype and o.device == U.device
    for other in (
        overlap(V, U),
        overlap(U @ R, V),
        overlap(G @ U, G @ V),
        principal_angles(U, V).cos().square().mean(),
    ):
        torch.testing.assert_close(other, o, **tol)
    a = principal_angles(U, V)
    assert len(a) == min(k, l) and (a.diff() >= -1e-6).all() and (a >= 0).all() and (a <= math.pi / 2 + 1e-6).all()
    torch.testing.assert_close(principal_angles(V, U), a, rtol=0, atol=1e-3 if dtype == torch.float32 else 1e-7)
    if k + l > n:
        assert a[0] < (2e-3 if dtype == torch.float32 else 1e-7)  # subspaces must meet


def mask_of(n, k, seed, device='cpu'):
    return Mask(random_order(n, seed=seed).to(device), n=n, k=k)


def columns(S):
    return torch.eye(S.n, dtype=f64, device=S.indices.device)[:, S.indices] if isinstance(S, Mask) else S.to(f64)


PAIRS = [
    (n, k, l, kinds)
    for n, k, l in [
        (1, 1, 1),
        (6, 6, 6),
        (20, 5, 5),
        (20, 5, 3),
        (30, 18, 18),
        (30, 25, 20),
        (64, 2, 40),
        (300, 40, 40),
    ]
    for kinds in ('bb', 'mb', 'bm', 'mm')
]  # a basis or a mask with a basis or a mask


def pair(n, k, l, kinds, dtype=f64, device='cpu'):
    return [
        mask_of(n, d, 10 + i, device) if c == 'm' else basis(n, d, 10 + i, dtype, device)
        for i, (c, d) in enumerate(zip(kinds, (k, l)))
    ]


@pytest.mark.parametrize('n, k, l, kinds', PAIRS)
@pytest.mark.parametrize('dtype', [torch.float32, f64])
@pytest.mark.parametrize('device', DEVICES)
def test_every_pair_obeys_every_law(n, k, l, kinds, dtype, device):
    U, V = pair(n, k, l, kinds, dtype, device)
    tol, m = 3e-6 if dtype == torch.float32 else 2e-13, min(k, l)
    P, Q = (columns(S) @ columns(S).T for S in (U, V))
    a, S = principal_angles(U, V), torch.linalg.svdvals(columns(U).T @ columns(V)).clamp(max=1)
    assert a.shape == (m,) and (a.diff() >= -1e-3).all() and a.dtype == (f64 if kinds == 'mm' else dtype)
    torch.testing.assert_close(a.cos().double(), S, rtol=0, atol=tol)
    torch.testing.assert_close(overlap(U, V).double(), (P * Q).sum() / m, rtol=0, atol=tol)
    gap, norm2 = (P - Q).norm() ** 2, torch.linalg.matrix_norm(P - Q, 2)
    d = {name: grassmann_distance(U, V, name).double() for name in METRICS}
    torch.testing.assert_close(d['projection_f'] ** 2, (gap - abs(k - l)) / 2, rtol=0, atol=20 * m * tol)
    torch.testing.assert_close(d['overlap'], 1 - d['projection_f'] ** 2 / m, rtol=0, atol=10 * tol)
    if k == l:
        torch.testing.assert_close(d['projection_2'], norm2, rtol=0, atol=1e-3 if dtype == torch.float32 else 1e-7)
    torch.testing.assert_close(d['fubini_study'].cos(), S.prod(), rtol=0, atol=20 * m * tol)
    torch.testing.assert_close(d['chordal_f'] ** 2, 2 * (1 - S).sum(), rtol=0, atol=20 * m * tol)
    for name in METRICS:
        torch.testing.assert_close(
            grassmann_distance(V, U, name).double(), d[name], rtol=0, atol=3e-3 if dtype == torch.float32 else 2e-7
        )
        assert -1e-6 <= grassmann_distance(U, V, name, normalize=True) <= 1 + 1e-6
    if kinds == 'mm':
        both = len(set(U.indices.tolist()) & set(V.indices.tolist()))
        assert mask_iou(U, V) == both / (k + l - both) == grassmann_distance(U, V, 'iou')
        if k == l:
            torch.testing.assert_close(mask_iou(U, V), d['overlap'] / (2 - d['overlap']))


@pytest.mark.parametrize('metric', METRICS)
@pytest.mark.parametrize('n, k', [(8, 2), (30, 10), (60, 40)])
def test_metrics_do_not_see_bases_and_prefer_no_detour(metric, n, k):
    G, R = basis(n, n, 4), basis(k, k, 3)
    for seed in range(5):
        A, B, C = (basis(n, k, 20 + 3 * seed + i) for i in range(3))
        d = grassmann_distance(A, B, metric)
        for other in (grassmann_distance(A @ R, B, metric), grassmann_distance(G @ A, G @ B, metric)):
            torch.testing.assert_close(other, d, rtol=0, atol=1e-7)
        if metric != 'overlap':
            assert grassmann_distance(A, C, metric) <= d + grassmann_distance(B, C, metric) + 1e-9
            assert grassmann_distance(A, A @ R, metric) < 1e-7


@pytest.mark.parametrize('kinds', ['bb', 'mb', 'bm'])
@pytest.mark.parametrize('l', [3, 5, 9])
@pytest.mark.parametrize('t', [1e-8, 1e-10, 1e-6])
def test_tiny_angles_to_three_digits(kinds, l, t):
    "A subspace of 5 tilted by t against one that holds it, is it or lies in it"
    n, k, I = 700, 5, torch.eye(700, dtype=f64)
    tilted = torch.linalg.qr(I[:, :k] + math.tan(t) * I[:, 20 : 20 + k]).Q
    other = torch.arange(n) < l if 'm' in kinds else I[:, :l] @ basis(l, l, 0)
    args = (other, tilted) if kinds == 'mb' else (tilted, other)
    torch.testing.assert_close(principal_angles(*args), torch.full((min(k, l),), t, dtype=f64), rtol=1e-3, atol=0)
    for name, factor in dict(
        geodesic=min(k, l) ** 0.5,
        chordal_2=1,
        chordal_f=min(k, l) ** 0.5,
        projection_2=1,
        projection_f=min(k, l) ** 0.5,
        fubini_study=min(k, l) ** 0.5,
    ).items():
        assert abs(grassmann_distance(*args, name).item() / (factor * t) - 1) < 1e-3, name


def test_angles_of_many_blocks(monkeypatch):
    "Blocks of rows much smaller than the matrix change nothing"
    import hessian_overlap.grassmann as g

    U, V, mask = basis(500, 30, 1), basis(500, 20, 2), mask_of(500, 100, 3)
    near = torch.linalg.qr(U[:, :20] + 1e-7 * V).Q
    whole = [principal_angles(*p) for p in ((U, V), (U, near), (mask, U), (mask_of(500, 10, 3), U))] + [
        overlap(mask, U)
    ]
    monkeypatch.setattr(g, 'row_blocks', lambda n, w: (slice(i, min(i + 7, n)) for i in range(0, n, 7)))
    blocks = [principal_angles(*p) for p in ((U, V), (U, near), (mask, U), (mask_of(500, 10, 3), U))] + [
        overlap(mask, U)
    ]
    for a, b in zip(whole, blocks):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-14)


@pytest.mark.parametrize('n, k, l', [(12, 3, 3), (40, 8, 5), (40, 30, 25), (90, 18, 18)])
@pytest.mark.parametrize('seed', [0, 1, 2])
@pytest.mark.parametrize('dtype', [torch.float32, f64])
def test_chance_levels_within_five_standard_errors(n, k, l, seed, dtype):
    pairs, fixed, mask = 120, basis(n, k, 7, dtype), mask_of(n, k, 7)
    drawn = [basis(n, l, 1000 * (seed + 1) + j, dtype) for j in range(pairs)]
    against_basis, against_mask = (torch.stack([principal_angles(S, V) for V in drawn]).double() for S in (fixed, mask))
    common = [overlap(mask, mask_of(n, l, 1000 * (seed + 1) + j)).item() for j in range(pairs)]
    for m in METRICS:
        c = chance_distance(n, k, l, metric=m, samples=pairs, seed=seed)
        for real in (against_basis, against_mask):
            d = metric_from_angles(real, m)
            assert abs(d.mean() - c.mean) <= 5 * math.hypot(d.std() / pairs**0.5, c.error) + 1e-6, m
            if m in ('geodesic', 'chordal_f', 'projection_f', 'overlap') and d.std() > 1e-4:
                assert 0.6 < d.std() / c.std < 1.6, m
        t = torch.stack([math.pi / 2 * (torch.arange(min(k, l)) >= round(o * min(k, l))).double() for o in common])
        d, c = metric_from_angles(t, m), chance_distance(n, k, l, metric=m, masks=True)
        assert abs(d.mean() - c.mean) <= 5 * c.std / pairs**0.5 + 1e-6, m
    assert chance_distance(n, k, l, metric='overlap').mean == chance_overlap(n, k, l)


@pytest.mark.parametrize('n, k', [(3, 1), (7, 3), (7, 5)])
def test_chance_of_masks_by_counting_all(n, k):
    from itertools import combinations

    all_masks = [torch.tensor([i in c for i in range(n)]) for c in combinations(range(n), k)]
    for m in (*METRICS, 'iou'):
        d = np.array([grassmann_distance(all_masks[0], b, m).item() for b in all_masks])
        c = chance_distance(n, k, metric=m, masks=True)
        np.testing.assert_allclose([c.mean, c.std, c.error], [d.mean(), d.std(), 0], atol=1e-12)


def test_chance_at_the_edges():
    for m in METRICS:
        c = chance_distance(5, 5, metric=m, samples=3, seed=0)
        assert abs(c.mean - (1 if m == 'overlap' else 0)) < 1e-6 and c.std < 1e-6
    assert torch.equal(random_angles(50, 4, samples=3, seed=1)[:2], random_angles(50, 4, samples=2, seed=1))
    assert random_angles(10**7, 3, 40, samples=2, seed=0).shape == (2, 3)


def test_distance_matrix_is_all_pairs():
    spaces = [basis(20, 4, 0), mask_of(20, 4, 1), basis(20, 6, 2), mask_of(20, 3, 3).to_bool()]
    for m in METRICS:
        D = distance_matrix(spaces, m)
        for i, A in enumerate(spaces):
            for j, B in enumerate(spaces):
                assert abs(D[i, j] - grassmann_distance(A, B, m)) < 1e-7
        assert torch.equal(D, D.T)
    assert distance_matrix(spaces[1::2], 'iou')[0, 0] == 1


def test_angles_against_scipy():
    from scipy.linalg import subspace_angles

    for n, k, l in ((20, 5, 5), (20, 3, 8)):
        U, V = basis(n, k, 1), basis(n, l, 2)
        np.testing.assert_allclose(
            principal_angles(U, V).numpy(), np.sort(subspace_angles(U.numpy(), V.numpy())), atol=1e-12
        )


@pytest.mark.parametrize('t', [0.0, 1e-15, 1e-10, 1e-5, 0.3, math.pi / 4, 1.2, math.pi / 2 - 1e-9, math.pi / 2])
def test_prescribed_angle(t):
    Q = basis(40, 6, 0)
    t3 = torch.full((3,), t, dtype=f64)
    a = principal_angles(Q[:, :3], Q[:, :3] * t3.cos() + Q[:, 3:] * t3.sin())
    torch.testing.assert_close(a, t3, rtol=1e-9, atol=1e-15)


U, V = basis(12, 3, 0), basis(12, 3, 1)


@pytest.mark.parametrize(
    'call, error, says',
    [
        (lambda: overlap(2 * U, V), ValueError, 'not orthonormal'),
        (lambda: overlap(U, V.float()), TypeError, 'cast or move'),
        (lambda: overlap(U[:, 0], V), ValueError, r'\(n, k\)'),
        (lambda: overlap(U, basis(11, 3, 1)), ValueError, '12 and 11'),
        (lambda: overlap(U.numpy(), V), ValueError, 'ndarray'),
        (lambda: principal_angles(U * float('nan'), V), ValueError, 'nan'),
        (lambda: overlap(U.T, V), ValueError, 'columns in 3'),
        (lambda: chance_overlap(5, 6), ValueError, 'k'),
        (lambda: chance_overlap(5, 0), ValueError, 'k'),
        (lambda: grassmann_distance(U, V, 'cos'), ValueError, 'metric must be one of'),
        (lambda: grassmann_distance(U, V, 'iou'), ValueError, 'two masks'),
        (lambda: mask_iou(U, V), ValueError, 'two masks'),
        (lambda: metric_from_angles(torch.ones(3), 'iou'), ValueError, 'metric must be'),
        (lambda: overlap(U, torch.zeros(12, dtype=torch.bool)), ValueError, 'V is a mask that selects nothing'),
        (lambda: overlap(U, torch.ones(11, dtype=torch.bool)), ValueError, '12 and 11'),
        (lambda: overlap(U, torch.ones(12, dtype=torch.int64)), ValueError, 'boolean'),
        (lambda: distance_matrix([U, 2 * V]), ValueError, 'columns of space 1'),
        (lambda: distance_matrix([U], 'x'), ValueError, 'metric must be'),
        (lambda: chance_distance(9, 2), ValueError, 'give a seed'),
        (lambda: chance_distance(9, 2, samples=1, seed=0), ValueError, 'at least 2'),
        (lambda: chance_distance(9, 10, seed=0), ValueError, '1 ≤ k'),
        (lambda: chance_distance(9, 2, metric='x', seed=0), ValueError, 'metric must be'),
        (lambda: chance_distance(9, 2, metric='x', masks=True), ValueError, 'metric must be'),
        (lambda: mask_overlap(Mask(torch.arange(3), n=13), U), ValueError, '12 rows, there are 13'),
        (lambda: mask_overlap(Mask(torch.arange(3), n=12), U * float('nan')), ValueError, 'norm 1'),
        (lambda: mask_overlap(torch.arange(3), U), TypeError, 'must be a Mask'),
        (lambda: overlap_curve(torch.arange(11), U), ValueError, 'each of the 12'),
        (lambda: overlap_curve(torch.zeros(12, dtype=torch.int64), U), ValueError, 'each of the 12'),
        (lambda: overlap_curve(torch.arange(12.0), U), TypeError, 'int64'),
        (lambda: overlap_curve(torch.arange(12), U, [4]), ValueError, 'at most k = 3'),
        (lambda: overlap_table(torch.arange(12), U, [2, 1]), ValueError, 'ascend'),
        (lambda: overlap_table(torch.arange(12), U, [0]), ValueError, 'ascend'),
        (lambda: overlap_table(torch.arange(12), U, [13]), ValueError, 'ascend'),
        (lambda: best_overlap_curve(U, [0]), ValueError, 'ascend'),
        (lambda: magnitude_order([]), ValueError, 'empty'),
        (lambda: magnitude_order(torch.tensor([1.0, math.nan])), ValueError, 'NaN'),
        (lambda: magnitude_order(torch.ones(3), 'layer'), ValueError, 'list of parameter tensors'),
        (lambda: random_order(0, seed=1), ValueError, 'at least 1'),
        (lambda: best_order(U[:, 0]), ValueError, 'must be'),
        (lambda: score_order(torch.ones(3), [torch.ones(4)]), ValueError, r'shape \(3,\), there are 4'),
        (lambda: score_order([torch.ones(3)], [torch.ones(4)]), ValueError, r'scores of 0 has shape \(3,\)'),
        (lambda: score_order([torch.ones(3)] * 2, [torch.ones(3)]), ValueError, '2 tensors, there are 1'),
        (
            lambda: score_order({'a': torch.ones(3)}, {'b': torch.ones(3)}),
            ValueError,
            "lacks \\['b'\\] and has \\['a'\\]",
        ),
        (lambda: score_order({'a': torch.tensor([1.0, math.nan])}), ValueError, 'of a are NaN'),
        (
            lambda: score_order([torch.ones(2), torch.full((3,), math.nan)], scope='layer'),
            ValueError,
            '3 of 3 scores of 1 are NaN',
        ),
        (lambda: score_order(torch.ones(3), scope='x'), ValueError, 'scope must be'),
        (lambda: magnitude_order(torch.ones(3), 'normalized'), ValueError, 'list of parameter tensors'),
        (lambda: partition([torch.ones(3)], 'kind'), TypeError, 'needs the model'),
        (lambda: partition([torch.ones(3)], 'x'), ValueError, 'by must be'),
        (lambda: partition([]), ValueError, 'empty'),
        (lambda: Partition(['a'], torch.tensor([0, 1])), ValueError, 'between 0 and 0'),
        (lambda: Partition(['a', 'b'], torch.tensor([0, -1])), ValueError, 'between 0 and 1'),
        (lambda: Partition(['a'], torch.ones(2)), TypeError, 'int64'),
        (lambda: partition([torch.ones(3)]).group('x'), ValueError, 'no group'),
        (
            lambda: Mask(torch.arange(2), n=4, parts=partition([torch.ones(3)])),
            ValueError,
            'of 4 parameters, the partition of 3',
        ),
        (lambda: Mask(torch.arange(2), n=4).split(), ValueError, 'no partition'),
        (lambda: order_within(torch.arange(3), torch.ones(3)), ValueError, 'boolean'),
        (lambda: order_within(torch.arange(3), torch.ones(4).bool()), ValueError, 'boolean'),
        (lambda: Mask([torch.ones(2).bool()], params=[torch.ones(3)]), ValueError, r'the mask of 0 has shape \(2,\)'),
        (
            lambda: Mask({'a': torch.ones(2).bool()}, params={'a': torch.ones(2), 'b': torch.ones(1)}),
            ValueError,
            'lacks',
        ),
        (lambda: order_from_prune(torch.nn.Linear(2, 2)), ValueError, 'no tensor pruned'),
        (lambda: overlap_split(Mask(torch.arange(3), n=12), U), ValueError, 'no partition'),
        (
            lambda: overlap_split(Mask(torch.arange(3), n=12), U, partition([torch.ones(5)])),
            ValueError,
            'partition of 5',
        ),
        (lambda: leverage(U[:, 0]), ValueError, 'must be'),
        (lambda: Mask(torch.tensor([0, 0]), n=4), ValueError, 'distinct'),
        (lambda: Mask(torch.tensor([4]), n=4), ValueError, 'between 0 and'),
        (lambda: Mask(torch.tensor([-1]), n=4), ValueError, 'between 0'),
        (lambda: Mask(torch.tensor([1])), ValueError, 'need n'),
        (lambda: Mask(torch.zeros(4, dtype=torch.bool)), ValueError, 'empty'),
        (lambda: Mask(torch.ones(4, dtype=torch.bool), k=3), ValueError, 'expected k = 3'),
        (lambda: Mask(torch.ones(4, dtype=torch.bool), n=5), ValueError, 'expected n = 5'),
        (lambda: Mask(torch.ones(4)), TypeError, 'booleans or int64'),
    ],
)
def test_refused(call, error, says):
    with pytest.raises(error, match=says):
        call()


@pytest.mark.parametrize('n, k', [(1, 1), (20, 5), (50, 50), (200, 30)])
@pytest.mark.parametrize('dtype', [torch.float32, f64])
@pytest.mark.parametrize('device', DEVICES)
def test_curves_and_tables_are_sums_of_squares(n, k, dtype, device):
    U, order = basis(n, k, 5, dtype, device), random_order(n, seed=3).to(device)
    S = U.double().square()
    sizes = sorted({1, 2, k, n} & set(range(1, n + 1)))
    table = overlap_table(order, U, sizes)
    for i, m in enumerate(sizes):
        for r in sorted({1, k // 2 or 1, k}):
            torch.testing.assert_close(table[i, r - 1], S[order[:m], :r].sum() / min(m, r), rtol=1e-12, atol=1e-14)
    curve, best = overlap_curve(order, U), best_overlap_curve(U)
    assert curve.dtype == f64 and len(curve) == k == len(best) and (curve <= best + 1e-12).all()
    for m in sorted({1, k // 2 or 1, k}):
        mask = Mask(order, n=n, k=m)
        torch.testing.assert_close(curve[m - 1], mask_overlap(mask, U[:, :m]), rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(
            best[m - 1], overlap_curve(best_order(U[:, :m]), U[:, :m])[-1], rtol=1e-10, atol=1e-12
        )
        torch.testing.assert_close(
            curve[m - 1].to(dtype),
            overlap(torch.eye(n, dtype=dtype, device=device)[:, mask.indices], U[:, :m]),
            rtol=1e-4,
            atol=1e-5,
        )
    torch.testing.assert_close(
        overlap_table(order, U, [n])[0], torch.ones(k, dtype=f64, device=device), rtol=0, atol=1e-5
    )
    ks = sorted({1, k // 2 or 1, k})
    torch.testing.assert_close(overlap_curve(order, U, ks), curve[torch.tensor(ks) - 1])
    torch.testing.assert_close(best_overlap_curve(U, ks), best[torch.tensor(ks) - 1])


def test_best_is_best_by_brute_force():
    from itertools import combinations

    U = basis(9, 3, 2)
    for k in (1, 2, 3):
        brute = max(mask_overlap(Mask(torch.tensor(c), n=9), U[:, :k]).item() for c in combinations(range(9), k))
        assert abs(brute - best_overlap_curve(U)[k - 1].item()) < 1e-14


@pytest.mark.parametrize('n, k, m', [(30, 4, 4), (60, 10, 25), (60, 20, 5)])
@pytest.mark.parametrize('dtype', [torch.float32, f64])
@pytest.mark.parametrize('device', DEVICES)
def test_a_split_adds_up_and_blames_rightly(n, k, m, dtype, device):
    U, a = basis(n, k, 1, dtype, device), leverage(basis(n, k, 1, dtype, device))
    torch.testing.assert_close(a, U.double().square().sum(1))
    assert abs(a.sum().item() - k) < 1e-4
    parts = partition([torch.ones(n // 3), torch.ones(n - n // 3)])
    mask = Mask(random_order(n, seed=2).to(device), n=n, k=m)
    s = overlap_split(mask, U, parts)
    assert (
        abs(s.total - mask_overlap(mask, U).item()) < 1e-12
        and s.counts.tolist() == mask.counts(parts).tolist()
        and s.sizes.tolist() == parts.sizes.tolist()
    )
    assert abs(s.chance - chance_overlap(n, m, k)) < 1e-5 and abs(s.chance + s.between + s.within - s.total) < 1e-12
    for i, name in enumerate(parts.names):
        assert (
            abs(
                s.overlap[i].item()
                - sum(a[j].item() for j in mask.indices.tolist() if parts.group(name)[j]) / min(k, m)
            )
            < 1e-12
        )
    whole = overlap_split(Mask(parts.group(parts.names[0]).to(device)), U, parts)
    assert abs(whole.within) < 1e-12 and 'by group' in repr(
        whole
    )  # a mask that is a group leaves nothing to choose within
    one = overlap_split(mask, U, partition([torch.ones(n)]))
    assert abs(one.between) < 1e-12


def test_table_of_large_gaps_in_blocks(monkeypatch):
    U, order = basis(400, 10, 1), random_order(400, seed=3)
    S = U.square()[order].cumsum(0).cumsum(1)
    for m in ('masks', 'overlaps'):
        monkeypatch.setattr(
            sys.modules[f'hessian_overlap.{m}'],
            'row_blocks',
            lambda n, w: (slice(i, min(i + 7, n)) for i in range(0, n, 7)),
        )
    torch.testing.assert_close(leverage(U), U.square().sum(1))
    for sizes in ([400], [3, 250, 399]):
        torch.testing.assert_close(
            overlap_table(order, U, sizes),
            S[torch.tensor(sizes) - 1] / torch.minimum(torch.tensor(sizes)[:, None], torch.arange(1, 11)),
        )


def test_mean_over_all_masks_is_chance():
    from itertools import combinations

    U = basis(8, 3, 2)
    for k in (1, 3, 5):
        assert (
            abs(
                np.mean([mask_overlap(Mask(torch.tensor(c), n=8), U).item() for c in combinations(range(8), k)])
                - chance_overlap(8, k, 3)
            )
            < 1e-14
        )


def test_orders_are_permutations_and_masks_nest():
    params = [torch.randn(4, 5, generator=torch.Generator().manual_seed(0)), torch.zeros(6), torch.ones(1, 3)]
    n = 29
    for order in (
        magnitude_order(params),
        magnitude_order(params, 'layer'),
        random_order(n, seed=0),
        best_order(basis(n, 3, 0)),
    ):
        assert torch.equal(order.sort().values, torch.arange(n)) and order.dtype == torch.int64
        for k in range(1, n):
            assert Mask(order, n=n, k=k + 1).to_bool()[Mask(order, n=n, k=k).indices].all()
    assert torch.equal(magnitude_order(params), magnitude_order(torch.nn.utils.parameters_to_vector(params)))
    assert magnitude_order(torch.zeros(6)).tolist() == list(range(6)), 'ties go to the lower index'
    assert magnitude_order(iter(params)).tolist() == magnitude_order(params).tolist()


def small_net():  # weights, biases and norms; its parameters are drawn from a seed, none of them equal
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 4, 3),
        torch.nn.BatchNorm2d(4),
        torch.nn.Flatten(),
        torch.nn.Linear(16, 5),
        torch.nn.LayerNorm(5),
        torch.nn.Linear(5, 3, bias=False),
    )
    gen = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=gen))
    return net


@pytest.mark.parametrize('scope', ['global', 'layer', 'normalized'])
def test_scores_in_any_form_give_one_order(scope):
    net = small_net()
    named = dict(net.named_parameters())
    flat = torch.nn.utils.parameters_to_vector(net.parameters()).detach().abs()
    mags = {k: p.detach().abs() for k, p in named.items()}
    want = magnitude_order(net, scope)
    for same in (
        magnitude_order(net.parameters(), scope),
        magnitude_order(named, scope),
        score_order(mags, scope=scope),
        score_order(dict(reversed(mags.items())), net, scope),
        score_order(list(mags.values()), net, scope),
        score_order(flat, net, scope),
        score_order({k: v.double() for k, v in mags.items()}, net, scope),
    ):
        assert torch.equal(same, want)
    assert torch.equal(want.sort().values, torch.arange(len(flat)))
    scaled = [p * 10**i for i, p in enumerate(net.parameters())]
    assert torch.equal(magnitude_order(scaled, scope), want) == (scope != 'global'), (
        'layer and normalized do not see the scale of a layer'
    )


@pytest.mark.parametrize('scope', ['global', 'layer', 'normalized'])
def test_ties_go_to_the_lower_index(scope):
    for scores in (
        [torch.zeros(3), torch.zeros(2, 2)],
        [torch.ones(4), -torch.ones(4)],
        [torch.tensor([True, False, True]), torch.tensor([False])],
        [torch.tensor([2, 1, 2])],
    ):
        order = score_order(scores, scope=scope)
        flat = torch.cat([s.reshape(-1) for s in scores])
        if scope == 'global':
            assert all(a < b for a, b in zip(order.tolist(), order.tolist()[1:]) if flat[a] == flat[b])
    assert score_order([torch.zeros(3), torch.zeros(2, 2)], scope=scope).tolist() == list(range(7)) or scope == 'layer'


def test_partitions_cover_everything_once():
    net = small_net()
    n = sum(p.numel() for p in net.parameters())
    flat = torch.nn.utils.parameters_to_vector(net.parameters())
    for by in ('layer', 'kind', 'sign'):
        parts = partition(net, by)
        assert (
            parts.n == n == parts.sizes.sum()
            and sum(parts.group(k).long() for k in parts.names).eq(1).all()
            and (parts.sizes > 0).all()
        )
        values = torch.rand(n, generator=torch.Generator().manual_seed(0))
        torch.testing.assert_close(
            parts.sums(values), torch.stack([values[parts.group(k)].double().sum() for k in parts.names])
        )
    assert dict(zip(partition(net, 'kind').names, partition(net, 'kind').sizes.tolist())) == dict(
        weights=36 + 80 + 15, biases=4 + 5, norms=8 + 10
    )
    assert partition(net).names == [k for k, _ in net.named_parameters()]
    assert partition(net, 'sign').group('negative').equal(flat < 0) and 'zero' not in partition(net, 'sign').names
    net[0].weight.requires_grad_(False)
    assert partition(net).n == n - 36 and magnitude_order(net).numel() == n - 36, 'frozen parameters are no coordinates'


def test_split_and_order_within():
    net = small_net()
    parts = partition(net, 'kind')
    order = magnitude_order(net)
    n = len(order)
    mask = Mask(order, n=n, k=50, parts=parts)
    pieces = mask.split()
    assert (
        torch.cat([m.indices for m in pieces.values()]).sort().values.equal(mask.indices)
        and [pieces[k].k for k in parts.names] == mask.counts().tolist()
    )
    assert 'weights' in repr(mask) and '50 of' in repr(mask)
    inside = order_within(order, parts.group('biases'))
    assert parts.group('biases')[inside[:9]].all() and inside[9:].equal(order[~parts.group('biases')[order]])
    assert Mask({k: p > 0 for k, p in reversed(list(net.named_parameters()))}, params=net).indices.equal(
        Mask(partition(net, 'sign').group('positive')).indices
    )


@pytest.mark.parametrize('how', ['global', 'one tensor', 'structured'])
def test_pruned_models(how):
    import copy

    import torch.nn.utils.prune as prune

    net = small_net()
    names = [k for k, _ in net.named_parameters()]
    pruned = copy.deepcopy(net)
    if how == 'global':
        prune.global_unstructured([(pruned[0], 'weight'), (pruned[3], 'weight')], prune.L1Unstructured, amount=50)
    elif how == 'one tensor':
        prune.l1_unstructured(pruned[3], 'bias', amount=2)
    else:
        prune.ln_structured(pruned[0], 'weight', amount=2, n=2, dim=0)
    buffers = dict(pruned.named_buffers())
    want = torch.cat([
        buffers[k + '_mask'].bool().reshape(-1) if k + '_mask' in buffers else torch.ones(p.numel(), dtype=torch.bool)
        for k, p in net.named_parameters()
    ])
    mask, order = mask_from_prune(pruned, names), order_from_prune(pruned, names)
    assert mask.to_bool().equal(want) and Mask(order, n=mask.n, k=mask.k).indices.equal(mask.indices)
    assert order.equal(order_within(magnitude_order(net), want))
    now = torch.nn.utils.parameters_to_vector(p.requires_grad_() for p in pruned.parameters()).abs()
    assert mask_from_prune(pruned).k == mask.k and (now[order_from_prune(pruned)[: mask.k]].diff() <= 0).all()


def test_layer_scope_keeps_shares():
    params = [10.0**i * torch.rand(s, generator=torch.Generator().manual_seed(i)) for i, s in enumerate((100, 30, 10))]
    for k in (14, 70, 126):
        parts = Mask(magnitude_order(params, 'layer'), n=140, k=k).to_bool().split([100, 30, 10])
        assert all(abs(p.sum().item() - k / 140 * len(p)) <= 1 for p in parts)


def test_mask_round_trip():
    order = random_order(20, seed=1)
    m = Mask(order, n=20, k=7)
    for same in (Mask(m.to_bool()), Mask(m.indices, n=20), Mask([m.to_bool()[:5].reshape(5, 1), m.to_bool()[5:]])):
        assert torch.equal(same.indices, m.indices) and (same.k, same.n) == (7, 20)
    assert torch.equal(random_order(100, seed=1), random_order(100, seed=1)) and not torch.equal(
        random_order(100, seed=1), random_order(100, seed=2)
    )
