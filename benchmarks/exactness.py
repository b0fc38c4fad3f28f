"""How exact are the eigenpairs? Against the dense Hessian of the paper's 7030-parameter network, in float64.

For training steps 0, 100 and 1000 (embedded digits, seed 0, test Hessian on 500 samples) the whole Hessian is built and
decomposed by LAPACK; then `eigsh` (several block sizes, both precisions), the paper's `seigh` 355/710 and SciPy's
`eigsh` are run on the same operator. Reported: matvecs, seconds, worst relative error of the 350 eigenvalues, lost
share of the eigenspace 1 - ||U'V||²/350, and the error of the overlap with the magnitude mask at k = 100 and 350. One
dense decomposition takes about two minutes and 1.6 GB.

    python benchmarks/exactness.py [--steps 0 100 1000] [--out benchmarks/results/exactness.json] [--cache DIR]
"""

import argparse
import json
import os
import platform
import time
from pathlib import Path

import numpy as np
import torch

from hessian_overlap import (
    HessianLinearOperator,
    eigsh,
    load_params,
    magnitude_order,
    make_problem,
    overlap_curve,
    seigh,
    train,
)

K = 350


def reference(H, cache):
    "Eigenvalues by |λ| and the leading eigenvectors (a few more than K) of the dense Hessian"
    if cache and cache.exists():
        return torch.load(cache)
    n, start = H.shape[0], time.perf_counter()
    D = torch.cat([H @ torch.eye(n, dtype=H.dtype)[:, j : j + 370] for j in range(0, n, 370)], 1)
    asymmetry = (D - D.T).abs().max().item()
    lam, U = torch.linalg.eigh((D + D.T) / 2)
    order = lam.abs().argsort(descending=True)
    out = dict(
        lam=lam[order], U=U[:, order[: K + 50]].clone(), seconds=time.perf_counter() - start, asymmetry=asymmetry
    )
    if cache:
        torch.save(out, cache)
    return out


def scipy_eigsh(H, k, **kw):
    "SciPy's ARPACK on the same operator, counting products"
    from scipy.sparse.linalg import LinearOperator
    from scipy.sparse.linalg import eigsh as arpack

    S, count, start = H.to_scipy(), [0], time.perf_counter()

    def mv(v):
        count[0] += 1
        return S.matvec(v)

    lam, U = arpack(LinearOperator(H.shape, matvec=mv, dtype=S.dtype), k=k, which='LM', v0=np.ones(H.shape[0]), **kw)
    order = np.argsort(-np.abs(lam))
    return (
        torch.from_numpy(lam[order]),
        torch.from_numpy(U[:, order].copy()),
        dict(matvecs=count[0], seconds=time.perf_counter() - start, converged=True),
    )


def measure(problem, theta, split, ref, methods):
    out = []
    for name, dtype, call in methods:
        model = load_params(problem[dtype].model, theta.to(dtype))
        H = HessianLinearOperator(model, problem[dtype].loss_func, None, problem[dtype].hessian_data(split, 500))
        lam, U, info = call(H)
        order = magnitude_order(theta)
        true, found = overlap_curve(order, ref['U'][:, :K]), overlap_curve(order, U)
        lam, U = lam.double(), U.double()
        row = dict(
            method=name,
            dtype=str(dtype).split('.')[-1],
            matvecs=info['matvecs'],
            seconds=round(info['seconds'], 2),
            converged=info['converged'],
            eigval_error=((lam - ref['lam'][:K]) / ref['lam'][:K]).abs().max().item(),
            lost_subspace=1 - (ref['U'][:, :K].T @ U).square().sum().item() / K,
            overlap_error_100=abs(found[99] - true[99]).item(),
            overlap_error_350=abs(found[349] - true[349]).item(),
            overlap_350=true[349].item(),
        )
        out.append(row)
        print(
            '  {method:>22} {dtype:>8} {matvecs:>5} matvecs {seconds:>7} s  eigenvalues {eigval_error:.1e}  '
            'lost {lost_subspace:.1e}  overlap {overlap_error_350:.1e}'.format(**row),
            flush=True,
        )
    return out


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--steps', type=int, nargs='+', default=[0, 100, 1000])
    ap.add_argument('--out', default='benchmarks/results/exactness.json')
    ap.add_argument('--cache', type=Path)
    a = ap.parse_args()
    f32, f64 = torch.float32, torch.float64
    problem = {dt: make_problem('mnist_mini', seed=0, dtype=dt) for dt in (f32, f64)}
    run = train(problem[f64], max(a.steps), a.steps)
    methods = [(f'eigsh, block {b}', f64, lambda H, b=b: eigsh(H, K, block_size=b, seed=0)) for b in (5, 10, 25)]
    methods += [
        ('eigsh, block 10', f32, lambda H: eigsh(H, K, block_size=10, seed=0)),
        ('seigh 355/710', f64, lambda H: seigh(H, K, num_outer=355, num_inner=710, seed=0)),
        ('scipy eigsh, ncv 700', f64, lambda H: scipy_eigsh(H, K, tol=1e-5, ncv=2 * K)),
    ]
    results = []
    for step in a.steps:
        theta = run.theta(step)
        H = HessianLinearOperator(
            load_params(problem[f64].model, theta), problem[f64].loss_func, None, problem[f64].hessian_data('test', 500)
        )
        if a.cache:
            a.cache.mkdir(exist_ok=True)
        ref = reference(H, a.cache and a.cache / f'dense_{step}.pt')
        gap = ((ref['lam'][K - 1].abs() - ref['lam'][K].abs()) / ref['lam'][K - 1].abs()).item()
        print(
            f'step {step}: dense Hessian and eigh in {ref["seconds"]:.0f} s, '
            f'λ1 = {ref["lam"][0]:.4g}, λ{K} = {ref["lam"][K - 1]:.4g}, relative gap below it {gap:.1e}',
            flush=True,
        )
        results.append(
            dict(
                step=step,
                dense_seconds=round(ref['seconds'], 1),
                lambda_1=ref['lam'][0].item(),
                lambda_350=ref['lam'][K - 1].item(),
                gap=gap,
                asymmetry=ref['asymmetry'],
                methods=measure(problem, theta, 'test', ref, methods),
            )
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
            dict(script='benchmarks/exactness.py', k=K, n=7030, samples=500, environment=env, results=results), indent=1
        )
        + '\n'
    )
    print('written to', a.out)


if __name__ == '__main__':
    main()
