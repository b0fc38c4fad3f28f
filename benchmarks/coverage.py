"""Do the intervals of `overlap_error` cover the truth, and how wide are they?

Matrices of known eigenvectors (n = 400, k = 30, five spectra, eigenvectors that sit on few coordinates, as those of
networks do) and Hessians of the paper's 7030-parameter network (k = 100, reference: `eigsh` at tol=1e-9), each with
three orderings: by magnitude (a noisy guess of where the eigenvectors sit; the parameters' magnitudes), random, and by
the leverage of the true eigenvectors. A trial is one problem, ordering, solver and seed at one of five k; it counts as
covered if the true overlap lies in the interval. The factors and windows of the intervals were chosen on other seeds
than these. Reported per kind: trials, covered share, the smallest share among the six families of problems, mean and
95% width of the interval, share and mean width per family, mean error of the estimate and of the overlap that the
result itself would have given.

    python benchmarks/coverage.py [--seeds 5] [--networks 2] [--out benchmarks/results/coverage.json]
"""

import argparse
import json
import os
import platform
import time
import warnings
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch

from hessian_overlap import (
    BlockLanczos,
    HessianLinearOperator,
    aslinearoperator,
    best_order,
    eigsh,
    load_params,
    magnitude_order,
    make_problem,
    overlap_curve,
    overlap_error,
    random_order,
    seigh,
    synth_eigvals,
    train,
)

f64 = torch.float64
FAMILIES = dict(
    slow=dict(kind='poly', rank=1, decay=1.0),
    slower=dict(kind='poly', rank=5, decay=0.5),
    fast=dict(kind='poly', rank=1, decay=2.0),
    exponential=dict(kind='exp', rank=1, decay=0.03),
    noise=dict(kind='lowrank', rank=15, noise=0.3),
)


def known(family, seed, n=400, k=30):
    "A dense matrix with localised eigenvectors: operator, true leading eigenvectors, orderings"
    lam = synth_eigvals(n, seed=seed, **FAMILIES[family]) * torch.linspace(1.2, 1, n, dtype=f64)
    g = torch.Generator().manual_seed(seed)
    scale = torch.randn(n, generator=g, dtype=f64).exp()
    G = torch.randn(n, n, generator=g, dtype=f64)
    G[:, : n // 4] *= scale[:, None]
    Q = torch.linalg.qr(G).Q
    lam = lam[lam.abs().argsort(descending=True, stable=True)]
    A = (Q * lam) @ Q.T
    guess = magnitude_order(scale * (0.3 * torch.randn(n, generator=g, dtype=f64)).exp())
    U = Q[:, :k]
    return (
        aslinearoperator((A + A.T) / 2),
        U,
        dict(magnitude=guess, random=random_order(n, seed=seed), leverage=best_order(U[:, : k // 2])),
        k,
    )


def network(seed, step, run, problem, k=100):
    theta = run.theta(step)
    H = HessianLinearOperator(
        load_params(problem.model, theta), problem.loss_func, None, problem.hessian_data('test', 500)
    )
    U = eigsh(H, k + 5, tol=1e-9, seed=seed).eigvecs[:, :k]
    return (
        H,
        U,
        dict(
            magnitude=magnitude_order(theta),
            random=random_order(len(theta), seed=seed),
            leverage=best_order(U[:, : k // 2]),
        ),
        k,
    )


def problems(seeds, networks):
    for family in FAMILIES:
        for s in range(seeds):
            yield family, 300 + s, *known(family, 300 + s)
    for s in range(networks):
        problem = make_problem('mnist_mini', seed=300 + s, dtype=f64)
        run = train(problem, 300, [0, 100, 300])
        for step in (0, 100, 300):
            yield 'network', 300 + s, *network(300 + s, step, run, problem)


def kinds(A, k, seed):
    "name -> (result or state, operator for a probe or None, overlap that the result gives by itself)"
    for tol in (1e-5, 1e-2):
        yield f'eigsh, tol={tol:g}', eigsh(A, k + 1, tol=tol, seed=seed), None
    for share in (1.2, 1.5):  # with one pair more than k, so that the cut below the k-th is known
        yield (
            f'eigsh stopped at {share:g} k',
            eigsh(A, k + 1, max_matvecs=int(share * k), seed=seed, block_size=5),
            None,
        )
    state = BlockLanczos(A, 5, seed=seed)
    for share in (1.6, 2.0, 2.5):
        while state.matvecs < share * k:
            state.step()  # 5 columns each
        yield f'state at {share:g} k', state, None
    for recovery in ('core', 'singlepass', 'nystrom', 'hmt'):
        for outer in (k + 5, 2 * k):
            yield (
                f'{recovery}, {"k + 5" if outer == k + 5 else "2 k"} outer',
                seigh(A, k, num_outer=outer, recovery=recovery, seed=seed),
                A,
            )


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--seeds', type=int, default=5)
    ap.add_argument('--networks', type=int, default=2)
    ap.add_argument('--out', default='benchmarks/results/coverage.json')
    a, start, trials = ap.parse_args(), time.perf_counter(), defaultdict(list)
    warnings.simplefilter('ignore', RuntimeWarning)
    for family, seed, A, U, orders, k in problems(a.seeds, a.networks):
        ks = torch.tensor([max(1, k // 10), k // 4, k // 2, 3 * k // 4, k])
        truth = {o: overlap_curve(order, U, ks) for o, order in orders.items()}
        for kind, result, probe in kinds(A, k, seed + 1000):
            for o, order in orders.items():
                r = overlap_error(result, order, ks, A=probe)
                own = (
                    (overlap_curve(order, result.eigvecs, ks) - truth[o]).abs()
                    if probe is not None
                    else (r.estimate - truth[o]).abs()
                )
                for t, e, l, h, w in zip(
                    truth[o].tolist(), r.estimate.tolist(), r.low.tolist(), r.high.tolist(), own.tolist()
                ):
                    trials[kind].append((family, o, l <= t <= h, h - l, abs(e - t), w))
        print(f'{family} {seed}: {time.perf_counter() - start:.0f} s', flush=True)
    results = []
    for kind, ts in trials.items():
        groups = defaultdict(list)
        for t in ts:
            groups[t[0]].append((t[2], t[3]))
        widths = np.array([t[3] for t in ts])
        families = {g: [float(v) for v in np.mean(ts, 0)] for g, ts in groups.items()}
        worst = min(families, key=lambda g: families[g][0])
        results.append(
            dict(
                kind=kind,
                trials=len(ts),
                covered=float(np.mean([t[2] for t in ts])),
                worst_family=worst,
                worst_covered=families[worst][0],
                families=families,
                width=float(widths.mean()),
                width_95=float(np.quantile(widths, 0.95)),
                error=float(np.mean([t[4] for t in ts])),
                own_error=float(np.mean([t[5] for t in ts])),
            )
        )
        print(
            '{kind:>30}: {covered:.3f} of {trials}, worst {worst_covered:.2f} ({worst_family}), '
            'width {width:.1e} (95%: {width_95:.1e}), error {error:.1e}, own {own_error:.1e}'.format(**results[-1])
        )
    env = dict(
        machine=platform.machine(),
        system=platform.system(),
        cores=os.cpu_count(),
        threads=torch.get_num_threads(),
        python=platform.python_version(),
        torch=torch.__version__,
        numpy=np.__version__,
    )
    Path(a.out).parent.mkdir(parents=True, exist_ok=True)
    Path(a.out).write_text(
        json.dumps(
            dict(
                script='benchmarks/coverage.py',
                seeds=a.seeds,
                networks=a.networks,
                seconds=round(time.perf_counter() - start),
                environment=env,
                results=results,
            ),
            indent=1,
        )
        + '\n'
    )
    print('written to', a.out)


if __name__ == '__main__':
    main()
