"""Leading eigenpairs side by side: this package, SciPy over curvlinops, hessian-eigenthings, skerch and torch.lobpcg.

The 350 eigenvalues of largest magnitude of the paper's 7030-parameter network (training steps 0, 100, 1000 and 5000;
embedded digits, test Hessian on 500 samples) and of matrices of prescribed spectrum. For every method and setting:
matvecs, seconds, peak memory beyond one product, worst relative error of |λ|, lost share of the eigenspace 1 -
||U'V||²/350, and the error of the overlap with the magnitude mask at k = 100 and 350. With one thread on a CPU the
seconds are of the processor, which other work on the machine hardly disturbs. The truth is the dense eigendecomposition
by LAPACK in float64, or known by construction. Every run has a process of its own. A package that is not installed is
listed as absent.

    python benchmarks/bench_eigsh.py [--problems mlp_0 poly] [--methods ours scipy] [--device cuda] [--threads 2]
        [--peers DIR] [--cache DIR]

`--cache` keeps the dense decompositions (two minutes and 1.6 GB of memory each). benchmarks/README.md says how to
install the peers.
"""

# The parent process imports neither torch nor NumPy: on Linux a child's ru_maxrss starts at its parent's size.
import argparse
import gc
import json
import os
import re
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

from bench_hvp import run_environment  # noqa: F401, `worker` calls it by its name

K = 350
PEERS = dict(curvlinops='curvlinops-for-pytorch', hessian_eigenthings='hessian-eigenthings', skerch='skerch')
MLP = {f'mlp_{s}': s for s in (0, 100, 1000, 5000)}  # the network after so many training steps
SPECTRA = dict(
    poly=(10_000, dict(kind='poly', rank=1, decay=1.0, seed=1)),
    exp=(10_000, dict(kind='exp', rank=10, decay=0.005, seed=1)),
    lowrank=(10_000, dict(kind='lowrank', rank=300, noise=0.05, seed=1)),
    large=(100_000, dict(kind='poly', rank=1, decay=1.0, seed=1)),
    small=(1500, dict(kind='exp', rank=10, decay=0.01, seed=1)),
)

# --- problems -------------------------------------------------------------------------------------


def mlp(step, folder, device, dtype):
    "Model, loss and data of the network at a step of its training"
    import torch

    from hessian_overlap import load_params, make_problem

    p = make_problem('mnist_mini', seed=0, device=device, dtype=dtype)
    model = load_params(p.model, torch.load(folder / f'theta_{step}.pt').to(device, dtype))
    return model, p.loss_func, p.hessian_data('test', 500)


def synthetic(name, device, dtype):
    from hessian_overlap import SynthOperator, synth_eigvals

    n, spectrum = SPECTRA[name]
    return SynthOperator(synth_eigvals(n, **spectrum), seed=2, device=device, dtype=dtype)


def operator(a, dtype):
    "This package's operator of a problem"
    from hessian_overlap import HessianLinearOperator

    if a.problem in SPECTRA:
        return synthetic(a.problem, a.device, dtype)
    model, loss_func, data = mlp(MLP[a.problem], a.folder, a.device, dtype)
    return HessianLinearOperator(model, loss_func, None, data)


def run_prepare(a):
    "Train, and write parameters, masks and the true eigenpairs"
    import torch

    from hessian_overlap import magnitude_order, make_problem, random_order, train

    step, f64 = MLP.get(a.problem), torch.float64
    file = a.folder / f'truth_{a.problem}.pt'
    if file.exists():
        return torch.load(file)['said']
    if step is not None:
        theta = train(make_problem('mnist_mini', seed=0, dtype=f64), step, [step]).theta(step)
        torch.save(theta, a.folder / f'theta_{step}.pt')
        a.device = 'cpu'
        H = operator(a, f64)
        n = H.shape[0]
        D = torch.cat([H @ torch.eye(n, dtype=f64)[:, j : j + 370] for j in range(0, n, 370)], 1)
        lam, U = torch.linalg.eigh((D + D.T) / 2)
        top = lam.abs().argsort(descending=True)[: K + 1]
        lam, U, order = lam[top], U[:, top[:K]].clone(), magnitude_order(theta)
    else:
        H = synthetic(a.problem, 'cpu', f64)
        n, lam, U, order = H.shape[0], H.eigvals[: K + 1], H.eigvecs(K), random_order(H.shape[0], seed=0)
    said = dict(
        n=n,
        lambda_1=lam[0].item(),
        lambda_k=lam[K - 1].item(),
        gap=((lam[K - 1].abs() - lam[K].abs()) / lam[K - 1].abs()).item(),
    )
    torch.save(dict(lam=lam[:K], U=U, order=order, said=said), file)
    return said


# --- methods: (a, settings) -> function that gives eigenvalues (k,), eigenvectors (n, k), info


def ours(a, dtype='float64', solver='eigsh', basis_dtype=None, **kw):
    import torch

    import hessian_overlap

    H = operator(a, getattr(torch, dtype))
    if basis_dtype:
        kw['basis_dtype'] = getattr(torch, basis_dtype)
    width = 64 if solver == 'seigh' or kw.get('block_size') == 'auto' else kw.get('block_size', 10)
    for _ in range(4):
        # what an operator records, imports and holds is not the solver's
        H @ torch.ones(H.shape[0], width, dtype=H.dtype, device=H.device)

    def solve():
        lam, U, info = getattr(hessian_overlap, solver)(H, K, seed=0, **kw)
        return (
            lam,
            U,
            {k: info[k] for k in ('matvecs', 'converged', 'basis_bytes', 'block_size', 'restarts') if k in info},
        )

    return solve


def counted(H):
    "A function of vectors that counts its calls"

    def mv(v):
        mv.calls += v.shape[1] if v.ndim == 2 else 1
        return H(v)

    mv.calls = 0
    return mv


def scipy_over(S, ncv, tol):
    import numpy as np
    import torch
    from scipy.sparse.linalg import LinearOperator, eigsh

    mv = counted(S.matvec)
    for _ in range(20):
        mv(np.ones(S.shape[0], dtype=S.dtype))
    mv.calls = 0

    def solve():
        lam, U = eigsh(
            LinearOperator(S.shape, matvec=mv, dtype=S.dtype),
            k=K,
            which='LM',
            ncv=ncv,
            tol=tol,
            v0=np.random.default_rng(0).standard_normal(S.shape[0]),
        )
        return (
            torch.from_numpy(lam),
            torch.from_numpy(U),
            dict(matvecs=mv.calls, converged=True, basis_bytes=S.shape[0] * (ncv or 2 * K + 1) * 8),
        )

    return solve


def scipy_curvlinops(a, ncv=None, tol=1e-5):
    "As a user of curvlinops has it; on the matrices of prescribed spectrum, over their own product"
    import torch

    if a.problem in SPECTRA:
        return scipy_over(operator(a, torch.float64).to_scipy(), ncv, tol)
    from curvlinops import HessianLinearOperator

    model, loss_func, data = mlp(MLP[a.problem], a.folder, a.device, torch.float64)
    return scipy_over(HessianLinearOperator(model, loss_func, list(model.parameters()), data).to_scipy(), ncv, tol)


def scipy_ours(a, ncv=None, tol=1e-5):
    import torch

    return scipy_over(operator(a, torch.float64).to_scipy(), ncv, tol)


def eigenthings(a, max_iter, reorthogonalize):
    import torch
    from hessian_eigenthings.algorithms.lanczos import lanczos
    from hessian_eigenthings.operators.base import LambdaOperator

    if a.problem in SPECTRA:
        S = operator(a, torch.float64)
        H = LambdaOperator(S.__matmul__, S.shape[0], device=a.device, dtype=torch.float64)
    else:
        from hessian_eigenthings.loss_fns import supervised_loss
        from hessian_eigenthings.operators import HessianOperator

        model, loss_func, data = mlp(MLP[a.problem], a.folder, a.device, torch.float64)
        H = HessianOperator(model, data, supervised_loss(loss_func))
    H.matvec(torch.ones(H.size, dtype=torch.float64, device=a.device))

    def solve():
        r = lanczos(H, k=K, max_iter=max_iter, reorthogonalize=reorthogonalize, seed=0)
        return r.eigenvalues, r.eigenvectors.T, dict(matvecs=r.iterations, converged=bool(r.converged.all()))

    return solve


def skerch(a, recovery, outer):
    import torch
    from skerch.algorithms import seigh

    H = operator(a, torch.float64)
    mv = counted(H.__matmul__)

    class Op:
        shape = H.shape
        __matmul__ = lambda self, V: mv(V)

    for _ in range(2):
        H @ torch.ones(H.shape[0], 64, dtype=H.dtype, device=H.device)

    def solve():
        lam, U = seigh(
            Op(),
            a.device,
            torch.float64,
            outer,
            seed=1,
            noise_type='gaussian',
            recovery_type=recovery,
            meas_blocksize=64,
        )
        top = lam.abs().argsort(descending=True)[:K]
        return lam[top], U[:, top], dict(matvecs=mv.calls, converged=None)

    return solve


def lobpcg(a, niter):
    "torch.lobpcg takes a tensor and one end of the spectrum: it is given the square, of the same eigenspace"
    import torch

    H = operator(a, torch.float64)
    n = H.shape[0]

    def solve():
        D = torch.cat([H @ torch.eye(n, dtype=H.dtype)[:, j : j + 370] for j in range(0, n, 370)], 1)
        g = torch.Generator().manual_seed(0)
        _, U = torch.lobpcg(
            D @ D, X=torch.randn(n, K, dtype=H.dtype, generator=g), largest=True, niter=niter, tol=1e-10
        )
        lam, F = torch.linalg.eigh(U.T @ (D @ U))
        top = lam.abs().argsort(descending=True)
        return lam[top], U @ F[:, top], dict(matvecs=n, converged=None)

    return solve


# name: (function, the module it needs, what the figure calls it, settings)
METHODS = dict(
    ours=(
        ours,
        'hessian_overlap',
        'eigsh, block 10',
        [dict(tol=0.1), dict(tol=0.01), dict(), dict(tol=0, max_matvecs=700), dict(tol=0, max_matvecs=800)],
    ),
    ours_25=(ours, 'hessian_overlap', 'eigsh, block 25', [dict(block_size=25)]),
    ours_50=(
        ours,
        'hessian_overlap',
        'eigsh, block 50',
        [dict(block_size=50, tol=0.1), dict(block_size=50), dict(block_size=50, tol=0, max_matvecs=1100)],
    ),
    ours_auto=(ours, 'hessian_overlap', "eigsh, block 'auto'", [dict(block_size='auto')]),
    ours_restart=(
        ours,
        'hessian_overlap',
        'eigsh, 525 columns',
        [dict(max_basis=525, tol=0.01), dict(max_basis=525), dict(max_basis=525, tol=0, max_matvecs=850)],
    ),
    ours_float32=(ours, 'hessian_overlap', 'eigsh, float32', [dict(dtype='float32')]),
    ours_float16=(ours, 'hessian_overlap', 'eigsh, float16 basis', [dict(dtype='float32', basis_dtype='float16')]),
    ours_bfloat16=(ours, 'hessian_overlap', 'eigsh, bfloat16 basis', [dict(dtype='float32', basis_dtype='bfloat16')]),
    seigh=(
        ours,
        'hessian_overlap',
        'seigh (the paper)',
        [dict(solver='seigh', num_outer=o, num_inner=2 * o) for o in (350, 355, 525)],
    ),
    scipy=(scipy_curvlinops, 'curvlinops', 'SciPy over curvlinops', [dict(ncv=c) for c in (400, 525, 701)]),
    scipy_ours=(scipy_ours, 'hessian_overlap', 'SciPy over our operator', [dict(ncv=525)]),
    eigenthings=(eigenthings, 'hessian_eigenthings', 'hessian-eigenthings', [dict(max_iter=700, reorthogonalize=None)]),
    eigenthings_full=(
        eigenthings,
        'hessian_eigenthings',
        'hessian-eigenthings, reorthogonalised',
        [dict(max_iter=m, reorthogonalize=True) for m in (500, 600, 700)],
    ),
    skerch_hmt=(skerch, 'skerch', 'skerch, hmt', [dict(recovery='hmt', outer=o) for o in (350, 525, 700)]),
    skerch_singlepass=(
        skerch,
        'skerch',
        'skerch, singlepass',
        [dict(recovery='singlepass', outer=o) for o in (350, 700)],
    ),
    skerch_nystrom=(skerch, 'skerch', 'skerch, nystrom', [dict(recovery='nystrom', outer=o) for o in (350, 700, 1050)]),
    skerch_oversampled=(skerch, 'skerch', 'skerch, oversampled', [dict(recovery='oversampled_700', outer=350)]),
    lobpcg=(lobpcg, 'torch', 'torch.lobpcg', [dict(niter=20)]),
)
SHORT = (
    'ours',
    'ours_50',
    'ours_restart',
    'ours_float32',
    'ours_float16',
    'ours_bfloat16',
    'seigh',
    'scipy',
    'eigenthings_full',
)
ONLY = dict(
    large=('ours', 'ours_restart', 'ours_float16', 'scipy'),
    mlp_0=SHORT,
    mlp_100=SHORT,
    mlp_5000=SHORT,
    exp=SHORT,
    lowrank=SHORT,
)  # which methods a problem is for; absent: all
LOBPCG = ('mlp_1000',)  # minutes and the whole matrix

# --- the worker -----------------------------------------------------------------------------------


def peak(device):
    import torch

    if device != 'cpu':
        return torch.cuda.max_memory_allocated()
    try:
        return 1024 * int(re.search(r'VmHWM:\s*(\d+)', Path('/proc/self/status').read_text())[1])
    except (OSError, TypeError):
        return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def restart_peak(device):
    import torch

    gc.collect()
    if device != 'cpu':
        torch.cuda.reset_peak_memory_stats()
    else:
        try:
            Path('/proc/self/clear_refs').write_text('5')  # Linux: the peak starts again from what is held now
        except OSError:
            pass
    return peak(device)


def run_method(a):
    "One method with one setting: what it cost and how wrong it is"
    import torch

    from hessian_overlap import overlap_curve

    torch.set_num_threads(a.threads)
    method, _, label, settings = METHODS[a.method]
    torch.linalg.eigh(torch.eye(64, dtype=torch.float64))  # LAPACK's own memory
    solve = method(a, **settings[a.setting])
    base = restart_peak(a.device)
    # seconds of the processor are not disturbed by other work
    clock = time.process_time if a.device == 'cpu' and a.threads == 1 else time.perf_counter
    start = clock()
    lam, U, info = solve()
    if a.device != 'cpu':
        torch.cuda.synchronize()
    seconds, memory = clock() - start, peak(a.device) - base
    truth = torch.load(a.folder / f'truth_{a.problem}.pt')
    top = lam.abs().argsort(descending=True)
    lam, U = lam[top].double().cpu(), torch.linalg.qr(U[:, top].double().cpu()).Q
    true, found = (overlap_curve(truth['order'], V, torch.tensor([100, K])) for V in (truth['U'], U))
    off = (found - true).abs().tolist()
    return (
        dict(
            label=label,
            settings=settings[a.setting],
            seconds=round(seconds, 3),
            memory=memory,
            eigval_error=((lam.abs() - truth['lam'].abs()) / truth['lam']).abs().max().item(),
            lost_subspace=1 - (truth['U'].T @ U).square().sum().item() / K,
            overlap_error_100=off[0],
            overlap_error_350=off[1],
        )
        | info
    )


def run_warm(a):
    "Matvecs from nothing and from the eigenspace of an earlier training step"
    import torch

    from hessian_overlap import HessianLinearOperator, eigsh, load_params, make_problem, train

    torch.set_num_threads(a.threads)
    pairs = [(0, 1), (0, 10), (100, 101), (100, 110), (1000, 1001), (1000, 1010)]
    p = make_problem('mnist_mini', seed=0, dtype=torch.float64)
    run, out = train(p, 1010, sorted({s for pair in pairs for s in pair})), []
    H = lambda s: HessianLinearOperator(
        load_params(p.model, run.theta(s)), p.loss_func, None, p.hessian_data('test', 500)
    )
    for s, t in pairs:
        before = eigsh(H(s), K, tol=1e-8, seed=0)
        A = H(t)
        cold, warm = eigsh(A, K, seed=0), eigsh(A, K, start=before, seed=0)
        out.append(
            dict(
                steps=[s, t],
                eigenspace_overlap=warm.info['start_overlap'],
                cold=cold.info['matvecs'],
                warm=warm.info['matvecs'],
            )
        )
    return dict(rows=out)


def worker(a):
    warnings.simplefilter('ignore')
    sys.path += a.peers
    if a.worker == 'run_method':
        try:
            __import__(METHODS[a.method][1])
        except ModuleNotFoundError as e:
            return dict(status='absent', why=f'{e.name} is not installed')
    try:
        return dict(status='ok') | globals()[a.worker](a)
    except Exception as e:
        return dict(
            status='failed', why=f'{type(e).__name__}: {str(e).strip().splitlines()[0] if str(e).strip() else ""}'[:300]
        )


# --- the parent -----------------------------------------------------------------------------------


def call(a, what, **kw):
    arguments = dict(device=a.device, threads=a.threads, folder=a.folder) | kw
    cmd = (
        [sys.executable, os.path.abspath(__file__), '--worker', what]
        + [s for k, v in arguments.items() for s in (f'--{k}', str(v))]
        + [s for p in a.peers for s in ('--peers', p)]
    )
    with tempfile.TemporaryDirectory() as d:
        answer = Path(d) / 'answer.json'
        env = os.environ | dict(OMP_NUM_THREADS=str(a.threads), MKL_NUM_THREADS=str(a.threads))
        try:
            r = subprocess.run(
                cmd + ['--answer', str(answer)], env=env, capture_output=True, text=True, timeout=a.timeout
            )
        except subprocess.TimeoutExpired:
            return dict(status='timed out', why=f'after {a.timeout} s')
        if answer.exists() and r.returncode == 0:
            return json.loads(answer.read_text())
        return dict(status='failed', why=(r.stderr.strip().splitlines() or ['no message'])[-1][:300])


def show(name, r):
    if r['status'] != 'ok':
        return f'  {name:<38} {r["status"]}: {r["why"]}'
    said = ', '.join(f'{k} {v}' for k, v in r['settings'].items())
    basis = f' ({r["memory"] / r["basis_bytes"]:.2f} bases)' if r.get('basis_bytes') else ''
    return (
        f'  {r["label"]:<38} {r["matvecs"]:>5} matvecs {r["seconds"]:>7.2f} s '
        f'{r["memory"] / 2**20:>5.0f} MiB{basis:<13} '
        f'λ {r["eigval_error"]:.0e}  lost {max(0, r["lost_subspace"]):.0e}  '
        f'overlap {r["overlap_error_100"]:.0e} {r["overlap_error_350"]:.0e}   {said}'
    )


def run_problem(a, problem):
    "Every method asked for, with each of its settings, on one problem -> what the result says of it"
    said = call(a, 'run_prepare', problem=problem)
    if said['status'] != 'ok':
        raise SystemExit(f'{problem}: {said["why"]}')
    print(
        f'{problem}: n = {said["n"]}, λ1 = {said["lambda_1"]:.4g}, λ{K} = {said["lambda_k"]:.4g}, '
        f'relative gap below it {said["gap"]:.1e}',
        flush=True,
    )
    runs = []
    for method in a.methods:
        if method not in (ONLY.get(problem) or METHODS) or method == 'lobpcg' and problem not in LOBPCG:
            continue
        for i in range(len(METHODS[method][3])):
            r = call(a, 'run_method', problem=problem, method=method, setting=i) | dict(method=method)
            runs.append(r)
            print(show(method, r), flush=True)
            if r['status'] == 'absent':
                break
    return said | dict(runs=runs)


def run_warm_starts(a):
    warm = call(a, 'run_warm')
    for r in warm.get('rows', []):
        s, t = r['steps']
        print(
            f'start at step {s} for step {t}: {r["warm"]} matvecs instead of {r["cold"]}; '
            f'eigenspaces overlap by {r["eigenspace_overlap"]:.2f}'
        )
    return warm


def parse_arguments():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument(
        '--problems', nargs='+', default=['mlp_1000', 'poly', 'mlp_0', 'mlp_100', 'mlp_5000', 'large', 'exp', 'lowrank']
    )
    ap.add_argument('--methods', nargs='+', default=[*METHODS])
    ap.add_argument('--device', default='cpu')
    ap.add_argument('--threads', type=int, default=1)
    ap.add_argument('--timeout', type=float, default=900)
    ap.add_argument('--peers', action='append', default=[])
    ap.add_argument('--cache')
    ap.add_argument('--no-warm', action='store_true')
    ap.add_argument('--add', action='store_true', help='keep the other problems of the result that is there')
    ap.add_argument('--out', type=Path, default=Path(__file__).parent / 'results/bench_eigsh.json')
    for name in ('worker', 'problem', 'method', 'answer'):
        ap.add_argument(f'--{name}', help=argparse.SUPPRESS)
    ap.add_argument('--setting', type=int, help=argparse.SUPPRESS)
    ap.add_argument('--folder', type=Path, help=argparse.SUPPRESS)
    return ap.parse_args()


def main():
    a = parse_arguments()
    if a.worker:
        return Path(a.answer).write_text(json.dumps(worker(a)))
    with tempfile.TemporaryDirectory() as d:
        a.folder = Path(a.cache or d)
        a.folder.mkdir(exist_ok=True, parents=True)
        env = call(a, 'run_environment')
        env.pop('status')
        out = json.loads(a.out.read_text()) if a.add and a.out.exists() else dict(problems={})
        out = dict(
            script='benchmarks/bench_eigsh.py',
            k=K,
            environment=env,
            problems=out['problems'],
            warm=out.get('warm', dict(rows=[])),
        )
        a.out.parent.mkdir(parents=True, exist_ok=True)
        for problem in a.problems:
            out['problems'][problem] = run_problem(a, problem)
            a.out.write_text(json.dumps(out, indent=1) + '\n')  # what is measured is not lost
        if not a.no_warm:
            out['warm'] = run_warm_starts(a)
        a.out.write_text(json.dumps(out, indent=1) + '\n')
    print('written to', a.out)


if __name__ == '__main__':
    main()
