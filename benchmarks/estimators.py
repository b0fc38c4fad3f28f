"""Are estimates from products as good as they say, and how much better than plain random probes?

Matrices of known spectrum with eigenvectors that sit on few coordinates, as those of networks do (n = 400, five
spectra, half of them with eigenvalues of both signs), and the test Hessian of the paper's 7030-parameter network after
100 steps. For each quantity and number of products, over seeds: the root mean square of the relative error (of a
vector: of its norm), the same of the standard error that the estimate gives, and the share of 95% intervals that hold
the truth (of a vector: among entries of at least a thousandth of the largest). `plain` is the mean over random signs
from as many products: Hutchinson's trace, the diagonal of Bekas, Kokiopoulou and Saad, the mean square of the rows.

    python benchmarks/estimators.py [--seeds 40] [--out benchmarks/results/estimators.json]
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path

import numpy as np
import torch

from hessian_overlap import HessianLinearOperator, aslinearoperator, load_params, make_problem, synth_eigvals, train
from hessian_overlap.estimators import (
    estimate_of_draws,
    frobenius_norm,
    spectral_norm,
    xdiag,
    xnystrace,
    xrownorms,
    xtrace,
)
from hessian_overlap.noise import column_noise

f64 = torch.float64
BUDGETS = (10, 20, 50, 100)
FAMILIES = dict(
    slow=dict(kind='poly', rank=1, decay=1.0),
    slower=dict(kind='poly', rank=5, decay=0.5),
    fast=dict(kind='poly', rank=1, decay=2.0),
    exponential=dict(kind='exp', rank=1, decay=0.03),
    noise=dict(kind='lowrank', rank=15, noise=0.3),
)


def known(family, signs, n=400):
    "A dense matrix with localised eigenvectors"
    lam = synth_eigvals(n, seed=1 if signs else None, **FAMILIES[family])
    g = torch.Generator().manual_seed(0)
    G = torch.randn(n, n, generator=g, dtype=f64)
    G[:, : n // 4] *= torch.randn(n, generator=g, dtype=f64).exp()[:, None]
    Q = torch.linalg.qr(G).Q
    A = (Q * lam) @ Q.T
    return (A + A.T) / 2


def network():
    "The test Hessian of the 7030-parameter network after 100 steps, written out"
    problem = make_problem('mnist_mini', seed=0, device='cpu')
    model = load_params(problem.model, train(problem, 100, [100]).theta(100))
    H = HessianLinearOperator(model, problem.loss_func, None, problem.hessian_data('test', 500))
    n = H.shape[0]
    columns = []
    for i in range(0, n, 512):
        E = torch.zeros(n, min(512, n - i))
        E[i : i + 512].fill_diagonal_(1)
        columns.append(H @ E)
    A = torch.cat(columns, 1).double()
    return (A + A.T) / 2


def plain(quantity):
    "The mean over random signs, from as many products"

    def estimate(A, matvecs, *, seed):
        Omega = column_noise(A.shape[1], range(matvecs), seed=seed)
        Y = A @ Omega
        draws = dict(
            trace=lambda: (Omega * Y).sum(0),
            diagonal=lambda: Omega * Y,
            row_norms=lambda: Y.square(),
            frobenius=lambda: Y.square().sum(0),
        )[quantity]()
        return estimate_of_draws(draws, quantity in ('row_norms', 'frobenius'), method='plain', matvecs=matvecs)

    return estimate


def squared_frobenius(A, matvecs, *, seed):
    "The plain estimate is of the square"
    e = frobenius_norm(A, matvecs, seed=seed)
    return type(e)(e.value**2, 2 * e.value * e.std_error, e.low**2, e.high**2, e.info)


WAYS = dict(
    trace=dict(plain=plain('trace'), xtrace=xtrace, xnystrace=xnystrace),
    diagonal=dict(plain=plain('diagonal'), xdiag=xdiag),
    row_norms=dict(plain=plain('row_norms'), xrownorms=xrownorms),
    frobenius=dict(plain=plain('frobenius'), frobenius_norm=squared_frobenius),
    spectral=dict(spectral_norm=spectral_norm),
)


def truths(A):
    return dict(
        trace=A.trace(),
        diagonal=A.diagonal(),
        row_norms=A.square().sum(1),
        frobenius=A.square().sum(),
        spectral=torch.linalg.eigvalsh(A).abs().max(),
    )


def trial(way, A, matvecs, seed, truth):
    "Squared relative error, squared relative standard error, share of intervals that hold the truth"
    e = way(A, matvecs, seed=seed)
    size = truth.norm()
    inside = ((e.low <= truth * (1 + 1e-12)) & (truth * (1 - 1e-12) <= e.high)).double()
    seen = truth.abs() >= 1e-3 * truth.abs().max()
    return [
        ((e.value - truth).norm() / size).square().item(),
        (e.std_error.norm() / size).square().item(),
        inside[seen].mean().item(),
    ]


def rows_of(name, A, seeds):
    op, truth = aslinearoperator(A), truths(A)
    psd = torch.linalg.eigvalsh(A)[0] >= 0
    for quantity, ways in WAYS.items():
        for way, f in ways.items():
            if way == 'xnystrace' and not psd:
                continue
            for matvecs in BUDGETS:
                runs = [trial(f, op, matvecs, 1000 + s, truth[quantity]) for s in range(seeds)]
                error, said, covered = np.array(runs).mean(0)
                yield dict(
                    matrix=name,
                    quantity=quantity,
                    way=way,
                    matvecs=matvecs,
                    error=error**0.5,
                    std_error=said**0.5,
                    covered=covered,
                )


def summary(rows):
    "Per quantity, way and budget: geometric mean over matrices of the gain over plain, mean and worst coverage"
    base = {(r['matrix'], r['quantity'], r['matvecs']): r['error'] for r in rows if r['way'] == 'plain'}
    out = []
    for quantity, ways in WAYS.items():
        for way in ways:
            for matvecs in BUDGETS:
                mine = [r for r in rows if (r['quantity'], r['way'], r['matvecs']) == (quantity, way, matvecs)]
                gains = [base[r['matrix'], quantity, matvecs] / r['error'] for r in mine if quantity != 'spectral']
                out.append(
                    dict(
                        quantity=quantity,
                        way=way,
                        matvecs=matvecs,
                        gain=float(np.exp(np.mean(np.log(gains)))) if gains else None,
                        gains=[min(gains), max(gains)] if gains else None,
                        covered=float(np.mean([r['covered'] for r in mine])),
                        worst_covered=min(r['covered'] for r in mine),
                    )
                )
    return out


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--seeds', type=int, default=40)
    p.add_argument('--out', type=Path, default=Path(__file__).parent / 'results' / 'estimators.json')
    args = p.parse_args()
    start, rows = time.time(), []
    for family in FAMILIES:
        for signs in (False, True):
            name = f'{family}, both signs' if signs else family
            rows += rows_of(name, known(family, signs), args.seeds)
    rows += rows_of('network', network(), max(2, args.seeds // 4))
    environment = dict(
        machine=platform.machine(), cores=os.cpu_count(), torch=torch.__version__, seconds=round(time.time() - start)
    )
    result = dict(environment=environment, seeds=args.seeds, summary=summary(rows), rows=rows)
    args.out.write_text(json.dumps(result, indent=1) + '\n')
    for s in result['summary']:
        gain = f'{s["gain"]:6.2f} times as exact as plain' if s['gain'] else ''
        print(
            f'{s["quantity"]:>10} {s["way"]:>15} {s["matvecs"]:>4} {gain:>32}, covered {s["covered"]:.3f}'
            f' (worst {s["worst_covered"]:.2f})'
        )


if __name__ == '__main__':
    main()
