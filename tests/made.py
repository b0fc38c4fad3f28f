"A record with made-up but well-shaped numbers, for tests of what only reads records."

import numpy as np
import xarray as xr

from hessian_overlap.record import make_record
from hessian_overlap.tables import grid

KS = [3, 10, 40, 150, 600]  # mask sizes of an estimate


def made_up(
    seed=0, steps=(0, 50, 100), n=1000, k=60, R=4, splits=('train', 'test'), method='eigsh', ks=None, seeds=(0,), **kw
):
    "With ks, mask sizes ascending to k, as quadrature gives it: intervals, not all of them trusted, and no best masks"
    rng = np.random.default_rng(seed)
    method = method if ks is None else 'slq'
    ks = np.arange(1, k + 1) if ks is None else np.array(ks)
    parts = [part(rng, a, b, c, n, ks, R, method) for a in seeds for b in steps for c in splits]
    return make_record(parts, **dict(problem='made_up', settings=dict(tol=1e-5, samples=500)) | kw)


def part(rng, seed, step, split, n, ks, R, method):
    "One seed, step and split"
    K, exact = len(ks), method != 'slq'
    names = np.array(['magnitude', 'layerwise', *['random'] * (R > 0), 'best'])
    magnitude = np.minimum(1, (0.1 + 0.2 * np.exp(-ks / 9) + ks / n) * (1 + 0.1 * rng.random()))
    random = np.minimum(1, ks / n * (1 + 0.1 * rng.random((R, K))))
    curves = dict(magnitude=magnitude, layerwise=rng.random(K), best=np.minimum(1, 1.5 * magnitude))
    if R:
        curves['random'] = random.mean(0)
    if not exact:
        curves['best'] = np.full(K, np.nan)
    overlap = np.stack([curves[o] for o in names])
    known = np.isin(names, ['magnitude', 'layerwise'])[:, None] & (method != 'seigh')
    width = 0.05 if method == 'slq' else 1e-9
    trusted = np.broadcast_to((np.arange(K) < max(1, K - 2)) | exact, overlap.shape) & (method != 'seigh')
    kok = ('order', 'k')
    made = xr.Dataset(
        dict(
            overlap=(kok, overlap),
            low=(kok, np.where(known, (1 - width) * overlap, np.nan)),
            high=(kok, np.where(known, np.minimum(1, (1 + width) * overlap), np.nan)),
            trusted=(kok, trusted & np.isfinite(overlap)),
            random=(('draw', 'k'), random),
            eigvals=('k', 30 * np.exp(-ks / 8) * rng.choice([1, -1], K, p=[0.7, 0.3])),
            residuals=('k', 1e-6 * rng.random(K) if method == 'eigsh' else np.full(K, np.nan)),
            variance=('k', 1e-4 * rng.random(K) if exact else np.full(K, np.nan)),
            **tables_of(rng, n, ks, names, exact),
            loss=((), 2.3 * rng.random()),
            accuracy=((), 0.1 * rng.random()),
            matvecs=((), 2 * int(ks[-1])),
            seconds=((), rng.random()),
            converged=((), bool(trusted.all())),
        ),
        coords=dict(order=names, k=ks, draw=np.arange(R)),
        attrs=dict(n=n, method=method),
    ).expand_dims(seed=[seed], step=[step], split=np.array([split]))
    return made.assign(layer_size=('layer', [n // 2, n // 4, n - n // 2 - n // 4]))


def tables_of(rng, n, ks, names, exact, L=3):
    "Tables of the right shapes, of numbers that are not from any eigenspace"
    sizes, ranks = grid(n, int(ks[-1]), ks=None if len(ks) == ks[-1] else ks)
    known = np.where((names == 'best') & (not exact), np.nan, 1)[:, None, None]
    layers = (rng.random((len(names), len(sizes), len(ranks), L)) / L * known[..., None]).astype('f4')
    table = layers.sum(-1, dtype='f8')
    at = ('order', 'size', 'rank')
    return dict(
        size=sizes,
        rank=ranks,
        layer=np.array(['a.weight', 'a.bias', 'b.weight']),
        table=(at, table),
        half=(at, (0 if exact else 0.05) + 0 * table),
        layers=((*at, 'layer'), layers),
        available=(('rank', 'layer'), rng.random((len(ranks), L)) / L),
    )
