"A record with made-up but well-shaped numbers, for tests of what only reads records."

import numpy as np

from hessian_overlap.record import OverlapRecord


def made_up(
    seed=0, steps=(0, 50, 100), n=1000, k=60, R=4, splits=('train', 'test'), method='eigsh', tables=False, ks=None, **kw
):
    "With ks, mask sizes ascending to k, as quadrature gives it: intervals, not all of them trusted, and no best masks"
    rng = np.random.default_rng(seed)
    S, P, j = len(steps), len(splits), np.arange(1, k + 1) if ks is None else np.array(ks)
    if ks is not None:
        k, method = int(j[-1]), 'slq'
    K = len(j)

    def noise(*s):
        return 1 + 0.1 * rng.random(s)

    lam = 30 * np.exp(-j / 8) * rng.choice([1, -1], (S, P, K), p=[0.7, 0.3])
    magnitude = np.minimum(1, (0.1 + 0.2 * np.exp(-j / 9) + j / n) * noise(S, P, 1))
    if tables:
        kw = tables_of(np.random.default_rng(seed + 1), S, P, n, k, R, ks=ks) | kw
    if ks is not None:
        known = np.concatenate([magnitude[:, :, None], *([kw['extra']] if tables else [])], 2)
        kw = (
            dict(
                ks=ks,
                best=np.full((S, P, K), np.nan),
                low=0.95 * known,
                high=1.05 * known,
                trusted=np.broadcast_to(np.arange(K) < max(1, K - 2), known.shape),
            )
            | kw
        )
    return OverlapRecord(
        **dict(
            problem='made_up',
            n=n,
            k=k,
            method=method,
            seed=seed,
            samples=500,
            splits=splits,
            steps=steps,
            train_loss=2.3 / noise(S),
            train_acc=0.1 * noise(S),
            test_loss=2.3 / noise(S),
            test_acc=0.1 * noise(S),
            eigvals=lam,
            residuals=1e-6 * noise(S, P, k) if method == 'eigsh' else np.full((S, P, K), np.nan),
            magnitude=magnitude,
            random=np.minimum(1, j / n * noise(S, P, R, K)),
            best=np.minimum(1, magnitude * 1.5),
            matvecs=np.full((S, P), 2 * k),
            seconds=noise(S, P),
            converged=np.full((S, P), method == 'eigsh'),
            settings=dict(tol=1e-5),
        )
        | kw
    )


def tables_of(rng, S, P, n, k, R, L=3, ks=None):
    "Tables of the right shapes, of numbers that are not from any eigenspace"
    from hessian_overlap.tables import grid

    sizes, ranks = grid(n, k, ks=ks)
    orders = ('magnitude', *('random',) * (R > 0), 'layerwise', *('best',) * (ks is None))
    K = k if ks is None else len(ks)
    shape = (S, P, len(orders), len(sizes), len(ranks))
    layers = rng.random((*shape, L)).astype(np.float32) / L
    return dict(
        orders=orders,
        layer_names=('a.weight', 'a.bias', 'b.weight'),
        sizes=sizes,
        ranks=ranks,
        layers=layers,
        overlaps=layers.sum(-1, dtype=np.float64),
        layer_sizes=[n // 2, n // 4, n - n // 2 - n // 4],
        available=rng.random((S, P, len(ranks), L)) / L,
        variance=1e-4 * rng.random((S, P, K)) if ks is None else np.full((S, P, K), np.nan),
        **(dict(half=np.full(shape, 0.05)) if ks is not None else {}),
        extra=rng.random((S, P, 1, K)),
    )
