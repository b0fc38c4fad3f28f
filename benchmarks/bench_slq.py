"""Overlaps without eigenvectors against the truth: bias, rms, coverage of the intervals, time and memory.

Two kinds of problems. The paper's 7030-parameter network at training steps 0, 100 and 5000 (embedded digits, test
Hessian on 500 samples), against its dense decomposition by LAPACK. And matrices of 10⁴, 10⁵ and 10⁶ parameters whose
eigenvectors are known and local (cosines on blocks of 20 parameters; eigenvalues j^-0.8 with random signs, which prefer
leading blocks), with an ordering that knows the blocks roughly. Everything is measured over several seeds of the
probes. Both ways: with a stored basis, and started from masked random signs in three blocks of memory.

    python benchmarks/bench_slq.py [--problems mlp_0 local_10000] [--device cuda] [--threads 2] [--seeds 20]
        [--cache DIR]

`--cache` keeps the dense decompositions (two minutes and 1.6 GB of memory each).
"""

import argparse
import json
import os
import platform
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from bench_eigsh import peak, restart_peak

from hessian_overlap import (
    FunctionLinearOperator,
    HessianLinearOperator,
    load_params,
    magnitude_order,
    make_problem,
    overlap_slq,
    synth_eigvals,
    train,
)
from hessian_overlap.masked_start import overlap_slq_masked

KS = {7030: [35, 100, 350, 700, 1400, 2800]}
SHARES = (0.001, 0.01, 0.05, 0.2)
MLP, LOCAL = {f'mlp_{s}': s for s in (0, 100, 5000)}, {f'local_{n}': n for n in (10_000, 100_000, 1_000_000)}
RUNS = {
    **{name: [(16, 20), (8, 40), (16, 40), (8, 80), (4, 160)] for name in MLP},
    'local_10000': [(16, 40), (8, 80)],
    'local_100000': [(8, 80), (4, 160), (1, 640)],
    'local_1000000': [(8, 80), (4, 160), (1, 640)],
}
MASKED = {
    'mlp': ((2, 4), [(4, 40), (4, 20)]),
    'local': ((1, 4), [(4, 40), (1, 160)]),
}  # which ks (from, to), and probes x steps, started from masked signs
FEWER = {'local_100000': 5, 'local_1000000': 2}  # seeds, at most


def network(step, cache):
    "Operator, ordering, ks and the true overlaps of the paper's network"
    problem = make_problem('mnist_mini', seed=0, dtype=torch.float64)
    file = cache and cache / f'slq_mlp_{step}.pt'
    if file and file.exists():
        theta, U = torch.load(file)
    else:
        theta = train(problem, step, [step]).theta(step)
        H = HessianLinearOperator(
            load_params(problem.model, theta), problem.loss_func, None, problem.hessian_data('test', 500)
        )
        n = H.shape[0]
        D = torch.cat([H @ torch.eye(n, dtype=H.dtype)[:, j : j + 370] for j in range(0, n, 370)], 1)
        lam, U = torch.linalg.eigh((D + D.T) / 2)
        U = U[:, lam.abs().argsort(descending=True)[: KS[n][-1]]].clone()
        if file:
            torch.save((theta, U), file)
    single = make_problem('mnist_mini', seed=0)
    H = HessianLinearOperator(
        load_params(single.model, theta.float()), single.loss_func, None, single.hessian_data('test', 500)
    )
    order, ks = magnitude_order(theta), torch.tensor(KS[H.shape[0]])
    squares, rank = U.square(), torch.empty(len(order), dtype=torch.int64)
    rank[order] = torch.arange(len(order))
    return H, order, ks, torch.stack([squares[rank < k, :k].sum() / k for k in ks.tolist()])


def local(n, device):
    "A matrix with known local eigenvectors: operator, ordering, ks, true overlaps"
    g, b, f64 = np.random.default_rng(0), 20, torch.float64
    i = torch.arange(b, dtype=f64)
    C = torch.cos(torch.pi * (i[:, None] + 0.5) * i / b) * (2 / b) ** 0.5
    C[:, 0] /= 2**0.5
    lam, at = (
        synth_eigvals(n, 'poly', rank=1, decay=0.8, seed=1),
        torch.from_numpy((np.arange(n) + 0.3 * n * g.random(n)).argsort()),
    )
    where = torch.empty(n, dtype=f64)
    where[at] = lam  # eigenvalue j sits in block at[j]//b with frequency at[j] % b
    c, w = C.to(device, torch.float32), where.to(device, torch.float32).view(-1, b, 1)
    mm = lambda V: torch.einsum(
        'if,bfm->bim', c, w * torch.einsum('jf,bjm->bfm', c, V.reshape(-1, b, V.shape[1]))
    ).reshape(n, -1)
    order = torch.from_numpy((np.arange(n) + 0.45 * n * g.random(n)).argsort())
    rank = torch.empty(n, dtype=torch.int64)
    rank[order] = torch.arange(n)
    ks = torch.tensor([round(s * n) for s in SHARES])

    def overlap(k):
        rows = at[:k, None] // b * b + torch.arange(b)
        return (C.square().T[at[:k] % b] * (rank[rows] < k)).sum() / k

    return (
        FunctionLinearOperator(mm, (n, n), rmatmat=mm, dtype=torch.float32, device=device),
        order,
        ks,
        torch.stack([overlap(k) for k in ks.tolist()]),
    )


def timed(A, clock):
    "The operator, and a list that collects the seconds of its products"
    spent = []

    def mm(V):
        start = clock()
        W = A @ V
        if A.device.type == 'cuda':
            torch.cuda.synchronize()
        spent.append(clock() - start)
        return W

    return FunctionLinearOperator(mm, A.shape, rmatmat=mm, dtype=A.dtype, device=A.device), spent


def measure(A, order, ks, truth, p, m, seeds, device, masked=False):
    "Bias, rms, coverage of one choice of probes and steps"
    estimate = overlap_slq_masked if masked else overlap_slq
    clock = (
        time.process_time if device == 'cpu' and torch.get_num_threads() == 1 else time.perf_counter
    )  # seconds of the processor are not disturbed by other work
    off, covered, trusted, half, seconds, share = [], [], [], [], [], []
    for seed in range(seeds):
        B, spent = timed(A, clock)
        base, start = restart_peak(device), clock()
        e = estimate(B, order, ks, num_probes=p, num_steps=m, seed=seed)
        seconds.append(clock() - start)
        share.append(1 - sum(spent) / seconds[-1])
        if seed == 0:
            memory = peak(device) - base
        off.append(e.overlap / truth - 1)
        half.append((e.high - e.low) / 2 / truth)
        slack = (
            1e-4 * truth
        )  # products in float32 have eigenvectors of their own, as far from the true ones as their rounding over a gap
        covered.append((e.low <= truth + slack) & (truth <= e.high + slack))
        trusted.append(e.info['trusted'])
        exact, basis, matvecs = e.info['exact'], e.info.get('basis_bytes'), e.info['matvecs']
        block, spent = e.info.get('block_bytes'), None
        del e, B
    off, half = torch.stack(off), torch.stack(half)
    own = (
        dict(method='masked', ks=ks.tolist(), truth=truth.tolist(), block_bytes=block)
        if masked
        else dict(method='basis', basis_bytes=basis)
    )
    return own | dict(
        probes=p,
        steps=m,
        matvecs=matvecs,
        seeds=seeds,
        bias=off.mean(0).tolist(),
        rms=off.square().mean(0).sqrt().tolist(),
        half_width=half.mean(0).tolist(),
        covered=torch.stack(covered).double().mean(0).tolist(),
        trusted=torch.stack(trusted).double().mean(0).tolist(),
        exact=exact,
        seconds=float(np.median(seconds)),
        beyond_products=float(np.median(share)),
        memory=memory,
    )


def show(r):
    "One row, printed"
    if r['method'] == 'masked':
        memory = f'{r["memory"] / r["block_bytes"]:.2f} blocks'
    else:
        memory = f'{r["memory"] / r["basis_bytes"]:.2f} bases'
    rms = ' '.join(f'{v:.2%}' for v in r['rms'])
    covered, trusted = (' '.join(f'{v:.2f}' for v in r[k]) for k in ('covered', 'trusted'))
    print(
        f'  {r["method"]} {r["probes"]:>2} x {r["steps"]:<3} {r["seconds"]:>6.1f} s, '
        f'{r["beyond_products"]:.0%} beyond the products, memory {memory}; '
        f'rms {rms}; covered {covered}; trusted {trusted}',
        flush=True,
    )


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--problems', nargs='+', default=[*MLP, *LOCAL])
    ap.add_argument('--device', default='cpu')
    ap.add_argument('--threads', type=int, default=os.cpu_count())
    ap.add_argument('--seeds', type=int, default=20)
    ap.add_argument('--cache', type=Path)
    ap.add_argument('--out', type=Path, default=Path(__file__).parent / 'results/bench_slq.json')
    a = ap.parse_args()
    torch.set_num_threads(a.threads)
    warnings.simplefilter('ignore', RuntimeWarning)  # what is not resolved is counted
    if a.cache:
        a.cache.mkdir(exist_ok=True, parents=True)
    out = dict(
        script='benchmarks/bench_slq.py',
        environment=dict(
            device=torch.cuda.get_device_name() if a.device != 'cpu' else 'cpu',
            machine=platform.machine(),
            system=platform.system(),
            cores=os.cpu_count(),
            threads=a.threads,
            python=platform.python_version(),
            torch=torch.__version__,
        ),
        problems={},
    )
    for name in a.problems:
        A, order, ks, truth = network(MLP[name], a.cache) if name in MLP else local(LOCAL[name], a.device)
        A @ torch.ones(A.shape[0], 16, dtype=A.dtype, device=A.device)
        print(f'{name}: k = {ks.tolist()}, true overlaps {", ".join(f"{t:.4f}" for t in truth)}', flush=True)
        seeds = min(a.seeds, FEWER.get(name, a.seeds))
        (lo, hi), masked = MASKED[name.partition('_')[0]]
        rows = [measure(A, order, ks, truth, p, m, seeds, a.device) for p, m in RUNS[name]]
        rows += [
            measure(A, order, ks[lo : hi + 1], truth[lo : hi + 1], p, m, seeds, a.device, masked=True)
            for p, m in masked
        ]
        for r in rows:
            show(r)
        out['problems'][name] = dict(n=A.shape[0], ks=ks.tolist(), truth=truth.tolist(), rows=rows)
        a.out.parent.mkdir(parents=True, exist_ok=True)
        a.out.write_text(json.dumps(out, indent=1) + '\n')  # what is measured is not lost
    print('written to', a.out)


if __name__ == '__main__':
    main()
