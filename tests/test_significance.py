"Chance levels of masks are exact, and p-values are uniform under both nulls"

import math
from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.stats import kstest

from hessian_overlap.masks import Mask, leverage, partition, random_order
from hessian_overlap.noise import column_noise
from hessian_overlap.overlaps import best_overlap_curve, mask_overlap, overlap_curve, overlap_split
from hessian_overlap.significance import (
    chance_curve,
    chance_mask_overlap,
    overlap_significance,
    random_mask,
    random_mask_distances,
)

DEVICES = ['cpu'] + (['cuda'] if torch.cuda.is_available() else [])
f64 = torch.float64


def uneven(n, k, seed, dtype=f64, device='cpu'):
    "A basis with most of its leverage in the first quarter"
    scale = torch.where(torch.arange(n) < n // 4, 3.0, 1.0).double()[:, None]
    return torch.linalg.qr(scale * column_noise(n, range(k), seed=seed, kind='gauss')).Q.to(device, dtype)


def layers(n):
    return partition([torch.ones(n // 4), torch.ones(n // 2), torch.ones(n - n // 4 - n // 2)])


@pytest.mark.parametrize('n, k, m', [(20, 4, 4), (60, 10, 25), (300, 20, 7)])
@pytest.mark.parametrize('seed', [0, 1, 2])
@pytest.mark.parametrize('dtype', [torch.float32, f64])
@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('within', [False, True])
def test_moments_within_five_standard_errors(n, k, m, seed, dtype, device, within):
    U, mask, N = uneven(n, k, seed, dtype, device), Mask(random_order(n, seed=seed).to(device), n=n, k=m), 2000
    parts = layers(n) if within else None
    s = overlap_significance(mask, U, parts, samples=N, seed=seed)
    mean, std = chance_mask_overlap(mask, U, parts)
    assert abs(s.chance - mean) < 1e-12 and abs(s.std - std) < 1e-12
    if not within:
        assert abs(mean - max(k, m) / n) < 1e-6
    else:
        assert abs(mean - overlap_split(mask, U, parts).expected.sum().item()) < 1e-12
    d = s.draws
    c = d - d.mean()
    assert abs(d.mean() - mean) < 5 * std / N**0.5
    assert abs((c**2).mean() - std**2) < 5 * ((c**2).std() / N**0.5)
    assert abs((c**3).mean() - s.skewness * std**3) < 5 * ((c**3).std() / N**0.5)
    again = overlap_significance(mask, U, parts, samples=50, seed=seed)
    np.testing.assert_array_equal(again.draws, d[:50])  # a draw does not depend on how many there are


@pytest.mark.parametrize('within', [False, True])
@pytest.mark.parametrize('n, m', [(8, 2), (9, 4), (8, 7)])
def test_against_all_masks(n, m, within):
    U, mask = uneven(n, 3, 1), Mask(random_order(n, seed=5), n=n, k=m)
    parts = partition([torch.ones(3), torch.ones(n - 3)]) if within else None
    every = [Mask(torch.tensor(c), n=n) for c in combinations(range(n), m)]
    if within:
        every = [e for e in every if e.counts(parts).tolist() == mask.counts(parts).tolist()]
    o = np.array([mask_overlap(e, U).item() for e in every])
    s = overlap_significance(mask, U, parts, samples=4000, seed=0)
    np.testing.assert_allclose([s.chance, s.std], [o.mean(), o.std()], atol=1e-12)
    np.testing.assert_allclose(s.skewness * s.std**3, ((o - o.mean()) ** 3).mean(), atol=1e-12)
    exact = (o >= s.overlap - 1e-12).mean()
    assert abs(s.p - exact) <= 5 * max(s.p_error, (exact * (1 - exact) / 4000) ** 0.5) + 1 / 4001
    assert s.p_bound >= exact - 1e-12
    less = overlap_significance(mask, U, parts, samples=4000, alternative='less', seed=0)
    assert less.p_bound >= (o <= s.overlap + 1e-12).mean() - 1e-12
    assert abs(less.p - (o <= s.overlap + 1e-12).mean()) <= 5 * max(less.p_error, 1e-3)


@pytest.mark.parametrize('within, alternative', [(False, 'greater'), (True, 'greater'), (False, 'less')])
def test_p_values_are_uniform_under_the_null(within, alternative):
    "Kolmogorov-Smirnov over 500 random masks, each with its own 199 draws"
    n = 160
    U, parts = uneven(n, 12, 0), layers(n) if within else None
    start = Mask(torch.arange(0, n, 5), n=n)
    p = [
        overlap_significance(
            random_mask(start, parts, seed=5000 + j), U, parts, samples=199, alternative=alternative, seed=j
        ).p
        for j in range(500)
    ]
    assert kstest(p, 'uniform').pvalue > 1e-3
    assert (np.array(p) <= 0.05).mean() < 0.05 + 5 * (0.05 * 0.95 / 500) ** 0.5


def test_the_wrong_null_is_not_uniform():
    "A mask that prefers a layer is surprising anywhere and not within layers: the two nulls are told apart"
    n = 160
    U, parts = uneven(n, 12, 0), layers(n)
    start = Mask(torch.cat([torch.arange(30), torch.arange(120, 124)]), n=n)
    masks = [random_mask(start, parts, seed=j) for j in range(40)]
    assert max(overlap_significance(m, U, samples=199, seed=j).p for j, m in enumerate(masks)) < 0.05
    assert (
        kstest(
            [overlap_significance(m, U, parts, samples=199, seed=j).p for j, m in enumerate(masks)], 'uniform'
        ).pvalue
        > 1e-3
    )


def test_normal_approximation_holds_where_it_is_given():
    n = 3000
    U = torch.linalg.qr(column_noise(n, range(40), seed=0, kind='gauss')).Q
    given = 0
    for j in range(6):
        s = overlap_significance(Mask(random_order(n, seed=j), n=n, k=400), U, samples=3000, seed=j)
        if s.p_normal is not None:
            given += 1
            assert abs(s.p - s.p_normal) < 5 * s.p_error + 0.1 * s.p_normal + 1 / 3000
    assert given >= 4
    far = overlap_significance(Mask(leverage(U).argsort(descending=True), n=n, k=400), U, samples=100, seed=0)
    assert far.p_normal is None and far.z > 8 and far.p == 1 / 101 and far.ratio > 1


@pytest.mark.parametrize('n, k', [(5, 1), (40, 6), (200, 30)])
@pytest.mark.parametrize('dtype', [torch.float32, f64])
def test_chance_curve(n, k, dtype):
    U = uneven(n, k, 2, dtype)
    mean, std = chance_curve(U)
    for m in {1, k // 2 or 1, k}:
        np.testing.assert_allclose(
            [mean[m - 1].item(), std[m - 1].item()],
            chance_mask_overlap(Mask(torch.arange(m), n=n), U[:, :m]),
            atol=1e-6,
        )
    ks = sorted({1, k})
    assert torch.allclose(chance_curve(U, ks)[1], std[torch.tensor(ks) - 1])
    draws = torch.stack([overlap_curve(random_order(n, seed=s), U) for s in range(300)])
    assert ((draws.mean(0) - mean).abs() < 5 * std / 300**0.5 + 1e-6).all()


@pytest.mark.parametrize('within', [False, True])
def test_the_bound_holds_and_reaches_far(within):
    n = 2000
    U = torch.linalg.qr(column_noise(n, range(20), seed=0, kind='gauss')).Q
    a = leverage(U)
    parts = layers(n) if within else None
    bounds = []
    for skip in (0, 100, 400, 600, 850):
        s = overlap_significance(
            Mask(a.argsort(descending=True)[skip : skip + 200], n=n), U, parts, samples=300, seed=0
        )
        assert s.p_bound >= s.p - 5 * s.p_error - 1 / 301
        bounds.append(math.log(max(s.p_bound, 1e-300)))
        if 3 < s.z < 6:
            assert s.p_bound > math.erfc(s.z / 2**0.5) / 4 and s.p_bound < 40 * math.erfc(
                s.z / 2**0.5
            )  # a near normal sum: of the right order
    assert bounds[0] < -100 and all(x <= y + 1e-9 for x, y in zip(bounds, bounds[1:])), 'less and less surprising'
    assert overlap_significance(Mask(a.argsort()[:200], n=n), U, samples=10, seed=0).p_bound > 0.99
    assert overlap_significance(Mask(a.argsort()[:200], n=n), U, samples=10, alternative='less', seed=0).p_bound < 1e-10


def test_random_masks():
    n, parts = 40, layers(40)
    mask = Mask(random_order(n, seed=0), n=n, k=17, parts=parts)
    for seed in range(20):
        a, b = random_mask(mask, seed=seed), random_mask(mask, parts, seed=seed)
        assert (
            a.k == b.k == 17
            and b.counts(parts).equal(mask.counts())
            and torch.equal(random_mask(mask, parts, seed=seed).indices, b.indices)
        )
    often = sum(random_mask(mask, parts, seed=s).to_bool().double() for s in range(2000)) / 2000
    want = (mask.counts() / parts.sizes)[parts.labels].double()
    assert ((often - want).abs() <= 5 * (want * (1 - want) / 2000).sqrt() + 1e-12).all(), (
        'every parameter is as likely as any other of its group'
    )
    assert random_mask(Mask(torch.arange(n), n=n), seed=0).k == n


@pytest.mark.parametrize('metric', ['geodesic', 'projection_2', 'fubini_study', 'overlap'])
def test_sampled_chance_of_other_metrics(metric):
    U, mask = uneven(60, 5, 0), Mask(torch.arange(5), n=60)
    d = random_mask_distances(mask, U, metric, samples=300, seed=0)
    assert d.shape == (300,) and d.dtype == f64 and d.std() > 0
    if metric == 'overlap':
        mean, std = chance_mask_overlap(mask, U)
        assert abs(d.mean() - mean) < 5 * std / 300**0.5


def test_nothing_to_draw():
    U = uneven(10, 3, 0)
    every = Mask(torch.arange(10), n=10)
    s = overlap_significance(every, U, samples=20, seed=0)
    assert s.p == 1 and s.z == 0 and abs(s.ratio - 1) < 1e-12
    s = overlap_significance(Mask(torch.arange(3), n=10), U, partition([torch.ones(1)] * 10), samples=20, seed=0)
    assert s.p == 1 and s.z == 0 and 'within groups' in repr(s)


U, mask = uneven(12, 3, 0), Mask(torch.arange(4), n=12)


@pytest.mark.parametrize(
    'call, says',
    [
        (lambda: overlap_significance(mask, U, samples=0, seed=0), 'at least 1'),
        (lambda: overlap_significance(mask, U, alternative='x', seed=0), 'alternative'),
        (lambda: overlap_significance(Mask(torch.arange(4), n=13), U, seed=0), '12 rows, there are 13'),
        (lambda: overlap_significance(mask, 2 * U, seed=0), 'norm 1'),
        (lambda: overlap_significance(mask, U, partition([torch.ones(5)]), seed=0), 'partition of 5'),
        (lambda: chance_mask_overlap(mask, U * math.nan), 'norm 1'),
        (lambda: chance_curve(U, [0]), 'ascend'),
        (lambda: chance_curve(U, [4]), 'ascend'),
        (lambda: random_mask_distances(mask, U, samples=0, seed=0), 'at least 1'),
        (lambda: random_mask_distances(mask, U, 'x', samples=1, seed=0), 'metric must be'),
    ],
)
def test_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_best_is_far_from_chance():
    U = uneven(100, 10, 1)
    mean, std = chance_curve(U)
    assert (best_overlap_curve(U) > mean).all()
