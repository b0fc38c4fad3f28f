"""What do subspaces cost at scale? Memory and time of the metrics and of the overlap table.

Bases whose columns are cosines, √(2/n) cos(π (i + ½) j/n), are orthonormal for any n, and two of them have whatever
principal angles one wants, so that the result is checked as well. Each case runs in a process of its own; peak memory
is the high-water mark of its resident set during the call, less that of the process just before it, in units of the
bases.

The table has three times k ranks: 1500 × 1500.

    python benchmarks/subspaces.py [--n 1000000] [--k 500] [--dtype both] [--out benchmarks/results/subspaces.json]
"""

import argparse
import json
import math
import os
import platform
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import torch


def cosines(n, js, dtype, tilt=None):
    "(n, len(js)) orthonormal columns; with tilt, column j leaves for frequency j + k by that angle"
    js, U = torch.tensor(list(js), dtype=torch.float64), torch.empty(n, len(js), dtype=dtype)
    for a in range(0, n, 10_000):
        x = (torch.arange(a, min(a + 10_000, n), dtype=torch.float64)[:, None] + 0.5) * math.pi / n
        B = (x * js).cos_()
        if tilt is not None:
            B = B.mul_(tilt.cos()) + (x * (js + len(js))).cos_().mul_(tilt.sin())
        U[a : a + len(B)] = B.mul_(math.sqrt(2 / n))
    return U


def status(name):
    return next(int(l.split()[1]) * 1024 for l in open('/proc/self/status') if l.startswith(name))


def peak(f):
    "What f returns, its seconds, and the bytes it needed beyond what was there"
    Path('/proc/self/clear_refs').write_text('5')
    before, start = status('VmRSS'), time.perf_counter()
    out = f()
    return out, time.perf_counter() - start, status('VmHWM') - before


def angles(n, k, dtype, tilts):
    "All angles of two bases that are tilted by known ones, and three metrics"
    from hessian_overlap import grassmann_distance, principal_angles

    t = torch.logspace(math.log10(tilts[0]), math.log10(tilts[1]), k, dtype=torch.float64)
    U, V = cosines(n, range(1, k + 1), dtype), cosines(n, range(1, k + 1), dtype, t)
    bases = 2 * n * k * dtype.itemsize
    a, seconds, extra = peak(lambda: principal_angles(U, V))
    d, more, _ = peak(lambda: grassmann_distance(U, V, 'overlap').item())
    small = t < 1e-6
    return dict(
        case='principal_angles',
        seconds=round(seconds, 1),
        overlap_seconds=round(more, 1),
        bases_bytes=bases,
        extra_bytes=extra,
        extra_over_bases=round(extra / bases, 4),
        worst_absolute_error=(a.double() - t).abs().max().item(),
        worst_relative_error_below_1e_6=((a.double() / t - 1).abs()[small].max().item() if small.any() else None),
        overlap_error=abs(d - t.cos().square().mean().item()),
    )


def mask_angles(n, k, dtype, tilts):
    "A mask of k coordinates with a basis"
    from hessian_overlap import Mask, principal_angles, random_order

    U, mask = cosines(n, range(1, k + 1), dtype), Mask(random_order(n, seed=0), n=n, k=k)
    bases = n * k * dtype.itemsize
    a, seconds, extra = peak(lambda: principal_angles(mask, U))
    return dict(
        case='principal_angles of a mask',
        seconds=round(seconds, 1),
        bases_bytes=bases,
        extra_bytes=extra,
        extra_over_bases=round(extra / bases, 4),
    )


def table(n, k, dtype, tilts):
    "The overlaps for k mask sizes and k ranks; in rows as (n, k) tensors are, and in columns as eigsh returns them"
    from hessian_overlap import overlap_table, random_order

    order, out = random_order(n, seed=0), dict(case='overlap_table', bases_bytes=n * k * dtype.itemsize)
    for layout in ('rows', 'columns'):
        U = torch.empty(n, k, dtype=dtype) if layout == 'rows' else torch.empty(k, n, dtype=dtype).T
        for a in range(0, n, 100_000):
            U[a : a + 100_000].fill_(n**-0.5)
        T, seconds, extra = peak(partial(overlap_table, order, U))
        want = torch.arange(1, k + 1, dtype=torch.float64)
        assert torch.allclose(T, torch.maximum(want[:, None], want) / n, rtol=1e-3)  # every entry of U is 1/√n
        out[layout] = dict(
            seconds=round(seconds, 2), extra_bytes=extra, extra_over_basis=round(extra / (n * k * dtype.itemsize), 4)
        )
        del U
    return out


def run(case, n, k, dtype, tilts):
    torch.set_num_threads(1)
    return dict(n=n, k=k, dtype=dtype, **case(n, k, getattr(torch, dtype), tilts))


CASES = [angles, mask_angles, table]


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--n', type=int, default=1_000_000)
    ap.add_argument('--k', type=int, default=500)
    ap.add_argument('--dtype', default='both', choices=('both', 'float32', 'float64'))
    ap.add_argument('--out', default='benchmarks/results/subspaces.json')
    ap.add_argument('--cases', nargs='+', default=[c.__name__ for c in CASES])
    a, results = ap.parse_args(), []
    for case in CASES:
        if case.__name__ not in a.cases:
            continue
        k = 3 * a.k if case is table else a.k
        dtypes = [a.dtype]
        if a.dtype == 'both':
            dtypes = ['float32', 'float64'] if case is angles else ['float32']
        for dtype in dtypes:
            with ProcessPoolExecutor(1, mp_context=get_context('spawn')) as pool:
                results.append(
                    pool.submit(run, case, a.n, k, dtype, (1e-8 if dtype == 'float64' else 1e-4, 1.5)).result()
                )
            print(results[-1], flush=True)
    env = dict(
        machine=platform.machine(),
        system=platform.system(),
        cores=os.cpu_count(),
        threads=1,
        load=os.getloadavg()[0],
        python=platform.python_version(),
        torch=torch.__version__,
        numpy=np.__version__,
    )
    Path(a.out).write_text(
        json.dumps(dict(script='benchmarks/subspaces.py', environment=env, results=results), indent=1) + '\n'
    )
    print('written to', a.out)


if __name__ == '__main__':
    main()
