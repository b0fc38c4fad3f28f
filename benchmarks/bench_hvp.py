"""Hessian-vector products side by side: this package, curvlinops, PyHessian, hessian-eigenthings and plain torch.

Four problems: the 7030-parameter MLP (500 digits, 64 vectors), 3c3d (100 images, 16 vectors), a 4-layer transformer and
ResNet-18 on 32 x 32 images. For each way: seconds and peak memory a vector over one gradient, of a block of vectors and
of a single one. Every way runs in a process of its own, so that its peak memory is its own and one that crashes is
reported as such. The gradient, by plain torch, is timed in the same process between the products. The products are
compared with a double backward in float64, which is itself compared with finite differences of the gradient. A package
that is not installed is listed as absent. Also for this package: several batches against one of the same total, and
peak memory at 1000 columns against 16.

    python benchmarks/bench_hvp.py [--problems mlp 3c3d] [--methods ours curvlinops] [--device cuda] [--threads 2]
        [--peers DIR]

benchmarks/README.md says how to install the peers beside torch without touching it.
"""

# The parent process imports neither torch nor NumPy: on Linux a child's ru_maxrss starts at its parent's size.
import argparse
import gc
import importlib.metadata
import json
import os
import platform
import re
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from functools import partial
from pathlib import Path

# module: distribution
PEERS = dict(curvlinops='curvlinops-for-pytorch', pyhessian='PyHessian', hessian_eigenthings='hessian-eigenthings')
CHECKED = 2  # columns compared in float64

# --- problems: (model, mean loss, x, y) -----------------------------------------------------------


def mlp(device, dtype, samples):
    "The paper's 7030-parameter network on class-balanced test digits"
    from hessian_overlap import make_problem

    p = make_problem('mnist_mini', seed=0, device=device, dtype=dtype)
    return p.model, p.loss_func, *p.hessian_data('test', samples)[0]


def images(model, device, dtype, samples):
    "A network for 32 x 32 images on Gaussian noise with random labels of 10 classes"
    import torch

    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(samples, 3, 32, 32, generator=g), torch.randint(10, (samples,), generator=g)
    return model(seed=0, device=device, dtype=dtype), torch.nn.CrossEntropyLoss(), x.to(device, dtype), y.to(device)


def tiny(device, dtype, samples):
    import torch

    return (
        torch.nn.Linear(3, 2).to(device, dtype),
        torch.nn.CrossEntropyLoss(),
        torch.ones(4, 3, device=device, dtype=dtype),
        torch.tensor([0, 1, 0, 1], device=device),
    )


def c3d3(device, dtype, samples):
    from hessian_overlap.models import cifar10_3c3d

    return images(cifar10_3c3d, device, dtype, samples)


def resnet(device, dtype, samples):
    from hessian_overlap.models import resnet18

    return images(lambda **kw: resnet18(10, small_input=True, **kw), device, dtype, samples)


def transformer(device, dtype, samples, d=128, heads=4, layers=4, length=64, vocab=256):
    "A causal language model on random bytes: (samples, 64) tokens -> logits of every position"
    import torch
    from torch import nn
    from torch.nn import functional as F

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.ln1, self.qkv, self.out = nn.LayerNorm(d), nn.Linear(d, 3 * d), nn.Linear(d, d)
            self.ln2, self.up, self.down = nn.LayerNorm(d), nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

        def forward(self, x):
            q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in self.qkv(self.ln1(x)).chunk(3, -1))
            x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
            return x + self.down(F.gelu(self.up(self.ln2(x))))

    class LanguageModel(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.positions = nn.Embedding(vocab, d), nn.Embedding(length, d)
            self.blocks, self.ln, self.head = (
                nn.Sequential(*[Block() for _ in range(layers)]),
                nn.LayerNorm(d),
                nn.Linear(d, vocab),
            )

        def forward(self, x):
            h = self.tokens(x) + self.positions.weight[: x.shape[1]]
            return self.head(self.ln(self.blocks(h))).transpose(
                1, 2
            )  # (samples, vocab, length), as CrossEntropyLoss wants them

    g = torch.Generator().manual_seed(0)
    x, y = (torch.randint(vocab, (samples, length), generator=g).to(device) for _ in range(2))
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(0)
        model = LanguageModel()
    return model.to(device=device, dtype=dtype).eval(), nn.CrossEntropyLoss(), x, y


# name: (make, samples and vectors on the CPU, on CUDA, batches that the samples are split into,
#        whether 1000 columns are tried on the CPU)
PROBLEMS = {
    'mlp': (mlp, (500, 64), (500, 64), 5, True),
    '3c3d': (c3d3, (100, 16), (100, 16), 4, True),
    'transformer': (transformer, (8, 16), (64, 16), 4, False),
    'resnet18': (resnet, (8, 4), (128, 4), 4, False),
}

# --- ways to multiply: (model, loss_func, x, y) -> function of V (n, m) ---------------------------


def flat(tensors):
    import torch

    return torch.cat([t.reshape(-1) for t in tensors])


def split(v, like):
    return [c.reshape(p.shape) for c, p in zip(v.split([p.numel() for p in like]), like)]


def by_columns(product):
    "A function of blocks from one of vectors"
    import torch

    return lambda V: torch.stack([product(v) for v in V.unbind(1)], 1)


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def ours(model, loss_func, x, y):
    from hessian_overlap import HessianLinearOperator

    H = HessianLinearOperator(model, loss_func, None, [(x, y)])
    apply = lambda V: H @ V
    apply.operator = H
    return apply


def curvlinops_block(model, loss_func, x, y):
    from curvlinops import HessianLinearOperator

    H = HessianLinearOperator(model, loss_func, trainable(model), [(x, y)])
    return lambda V: H @ V


def curvlinops_columns(model, loss_func, x, y):
    from curvlinops import HessianLinearOperator

    H = HessianLinearOperator(model, loss_func, trainable(model), [(x, y)])
    return by_columns(lambda v: H @ v)


def pyhessian(model, loss_func, x, y):
    from pyhessian import hessian
    from pyhessian.utils import hessian_vector_product

    h = hessian(model, loss_func, data=(x, y), cuda=x.is_cuda)
    return by_columns(lambda v: flat(hessian_vector_product(h.gradsH, h.params, split(v, h.params))))


def eigenthings(model, loss_func, x, y):
    from hessian_eigenthings.loss_fns import supervised_loss
    from hessian_eigenthings.operators import HessianOperator

    H = HessianOperator(model, [(x, y)], supervised_loss(loss_func))
    return by_columns(lambda v: H.matvec(v.contiguous()))


def torch_double_backward(model, loss_func, x, y):
    from torch.autograd import grad

    ps = trainable(model)

    def product(v):
        g = grad(loss_func(model(x), y), ps, create_graph=True)
        return flat(grad(g, ps, split(v, ps), materialize_grads=True))

    return by_columns(product)


def kept(model, loss_func, x, y):
    from torch.autograd import grad

    ps = trainable(model)
    return ps, grad(loss_func(model(x), y), ps, create_graph=True)


def torch_kept_graph(model, loss_func, x, y):
    from torch.autograd import grad

    ps, g = kept(model, loss_func, x, y)
    return by_columns(lambda v: flat(grad(g, ps, split(v, ps), retain_graph=True, materialize_grads=True)))


def torch_kept_graph_batched(model, loss_func, x, y):
    import torch

    ps, g = kept(model, loss_func, x, y)
    sizes = [p.numel() for p in ps]

    def apply(V):
        vs = [c.reshape(-1, *p.shape) for c, p in zip(V.T.contiguous().split(sizes, 1), ps)]
        return torch.cat(
            [
                h.flatten(1)
                for h in torch.autograd.grad(
                    g, ps, vs, retain_graph=True, is_grads_batched=True, materialize_grads=True
                )
            ],
            1,
        ).T

    return apply


def gradient_function(model, loss_func, x, y):
    "θ as a tuple of tensors and the gradient as a pure function of it"
    from torch.func import functional_call, grad

    names, theta = zip(*[(k, p.detach()) for k, p in model.named_parameters() if p.requires_grad])
    return theta, grad(lambda theta: loss_func(functional_call(model, dict(zip(names, theta)), (x,)), y))


def torch_vmap_jvp(model, loss_func, x, y):
    import torch

    theta, g = gradient_function(model, loss_func, x, y)
    product = torch.vmap(
        lambda v: flat(torch.func.jvp(g, (theta,), (tuple(split(v, theta)),))[1]), in_dims=1, out_dims=1
    )
    return product


def torch_linearize(model, loss_func, x, y):
    import torch

    theta, g = gradient_function(model, loss_func, x, y)
    _, tangent = torch.func.linearize(g, theta)
    return by_columns(lambda v: flat(tangent(tuple(split(v, theta)))))


def torch_linearize_vmap(model, loss_func, x, y):
    import torch

    theta, g = gradient_function(model, loss_func, x, y)
    _, tangent = torch.func.linearize(g, theta)
    return torch.vmap(lambda v: flat(tangent(tuple(split(v, theta)))), in_dims=1, out_dims=1)


# name: (function, the module it needs, what the table calls it)
METHODS = dict(
    ours=(ours, 'hessian_overlap', 'hessian_overlap'),
    curvlinops=(curvlinops_block, 'curvlinops', 'curvlinops, A @ V'),
    curvlinops_columns=(curvlinops_columns, 'curvlinops', 'curvlinops, one by one'),
    pyhessian=(pyhessian, 'pyhessian', 'PyHessian'),
    eigenthings=(eigenthings, 'hessian_eigenthings', 'hessian-eigenthings'),
    double_backward=(torch_double_backward, 'torch', 'torch: double backward'),
    kept_graph=(torch_kept_graph, 'torch', 'torch: kept graph'),
    kept_graph_batched=(torch_kept_graph_batched, 'torch', 'torch: kept graph, batched'),
    vmap_jvp=(torch_vmap_jvp, 'torch', 'torch: vmap of jvp of grad'),
    linearize=(torch_linearize, 'torch', 'torch: linearize, one by one'),
    linearize_vmap=(torch_linearize_vmap, 'torch', 'torch: linearize, vmapped'),
)

# --- the worker: one measurement in a process of its own ------------------------------------------


class Bench:
    "A problem on its device with a clock, a gradient and a memory meter"

    def __init__(self, a, dtype=None, make=None):
        import torch

        torch.set_num_threads(a.threads)
        self.a, self.device, self.dtype = a, torch.device(a.device), dtype or torch.float32
        self.problem = (make or PROBLEMS[a.problem][0])(self.device, self.dtype, a.samples)
        self.clock = time.process_time if self.device.type == 'cpu' and a.threads == 1 else time.perf_counter
        self.params = trainable(self.problem[0])
        self.n = sum(p.numel() for p in self.params)

    def vectors(self, m):
        "Columns that depend on their numbers alone, drawn in float32 on the CPU: the same in every dtype and place"
        import torch

        V = torch.empty(self.n, m, device=self.device, dtype=self.dtype)
        for j in range(m):
            V[:, j] = torch.randn(self.n, generator=torch.Generator().manual_seed(j))
        return V

    def gradient(self):
        import torch

        model, loss_func, x, y = self.problem
        return torch.autograd.grad(loss_func(model(x), y), self.params)

    def seconds(self, f):
        "Of the processor for one thread, which others do not disturb; of the wall for more, which may wait"
        import torch

        sync = torch.cuda.synchronize if self.device.type == 'cuda' else lambda: None
        sync()
        start = self.clock()
        f()
        sync()
        return self.clock() - start

    def burst(self, f):
        "The fastest and the median of several in a row where one is short, a twentieth of a second of them at most"
        first = self.seconds(f)
        times = [first] + [self.seconds(f) for _ in range(min(20, int(0.05 / first)))]
        return min(times), statistics.median(times)

    def peak(self):
        "Bytes: the most that the process held (CPU) or that torch allocated (CUDA) since `baseline` began"
        import torch

        if self.device.type == 'cuda':
            return torch.cuda.max_memory_allocated(self.device)
        try:
            return 1024 * int(re.search(r'VmHWM:\s*(\d+)', Path('/proc/self/status').read_text())[1])
        except (OSError, TypeError):
            return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)

    def baseline(self):
        "The peak of one gradient; what was there before and is gone (the data in their first form) would hide others"
        import torch

        gc.collect()
        if self.device.type == 'cuda':
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            try:
                Path('/proc/self/clear_refs').write_text('5')  # Linux: the peak starts again from what is held now
            except OSError:
                pass
        self.gradient()
        return self.peak()

    def way(self, name):
        "A way to multiply; the others get the attention without fused kernels, which lack a second derivative"
        import contextlib

        from torch.nn.attention import SDPBackend, sdpa_kernel

        inside = contextlib.nullcontext if name == 'ours' else lambda: sdpa_kernel(SDPBackend.MATH)
        with inside():
            apply = METHODS[name][0](*self.problem)

        def run(V):
            with inside():
                return apply(V).detach()

        run.operator = getattr(apply, 'operator', None)
        return run

    def over_gradient(self, f, m, repeats):
        """f multiplies m vectors: its seconds a vector, and that over a gradient, in turns

        Short ones run several times in each turn, as a Krylov method or training would, and for half a second in all.
        The fastest of each is what the machine can do; medians say what it did.
        """
        rows, before, end = [], self.burst(self.gradient), time.perf_counter() + 0.5
        while len(rows) < repeats or time.perf_counter() < end and len(rows) < 100:
            s, after = self.burst(f), self.burst(self.gradient)
            rows.append((s[0] / m, s[1] / m, min(before[0], after[0]), (before[1] + after[1]) / 2))
            before = after
        fastest, gradient = min(r[0] for r in rows), min(r[2] for r in rows)
        return dict(
            gradients=fastest / gradient,
            seconds=fastest,
            gradient_seconds=gradient,
            repeats=len(rows),
            median_gradients=statistics.median(s / g for _, s, _, g in rows),
            median_seconds=statistics.median(r[1] for r in rows),
            median_gradient_seconds=statistics.median(r[3] for r in rows),
        )


def difference(a, b):
    return ((a.double().cpu() - b.double()).norm() / b.double().norm()).item()


def load(folder):
    import torch

    return torch.load(Path(folder) / 'reference.pt')


def run_reference(a):
    "Double backward in float64, its own error by finite differences, and the operations of a gradient and of a product"
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    b = Bench(a, torch.float64)
    V = b.vectors(CHECKED)
    H = b.way('double_backward')(V).cpu()

    def gradient_at(step, v):
        with torch.no_grad():
            for p, d in zip(b.params, split(v, b.params)):
                p.add_(d, alpha=step)
            try:
                with torch.enable_grad():
                    return flat(b.gradient())
            finally:
                for p, d in zip(b.params, split(v, b.params)):
                    p.sub_(d, alpha=step)

    size = flat(b.params).norm().item() / V[:, 0].norm().item()
    errors = [
        difference((gradient_at(h, V[:, 0]) - gradient_at(-h, V[:, 0])) / (2 * h), H[:, 0])
        for h in (size * 10.0**-k for k in range(3, 11))
    ]  # a kink needs small steps
    torch.save(H, Path(a.folder) / 'reference.pt')
    b = Bench(a)

    def flops(f):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as c:
            f()
        return c.get_total_flops()

    grad_flops = flops(b.gradient)
    with sdpa_kernel(SDPBackend.MATH):
        product, v = torch_kept_graph(*b.problem), b.vectors(1)
    A = torch.randn(2048, 2048, device=b.device)
    rate = 2 * 2048**3 / min(b.seconds(lambda: A @ A) for _ in range(5))
    return dict(
        n=b.n,
        tensors=len(b.params),
        finite_difference_error=min(errors),
        gradient_flops=grad_flops,
        hvp_flops=flops(lambda: product(v)),
        flops_per_second=rate,
    )


def measure_way(a):
    "Time, memory and error of one way in float32; what it held is gone when this returns"
    b = Bench(a)
    V = b.vectors(a.vectors)
    v = V[:, :1].contiguous()
    base = b.baseline()
    start = time.perf_counter()
    apply = b.way(a.method)
    setup = time.perf_counter() - start
    out = dict(setup_seconds=setup, memory_setup=b.peak() - base)
    out['first_single_seconds'] = b.seconds(lambda: apply(v))  # a memory peak of its own, below that of the block
    out['memory_single'] = b.peak() - base
    start = time.perf_counter()
    W = apply(V)
    b.seconds(lambda: None)
    out['first_seconds'] = time.perf_counter() - start
    ref = load(a.folder)
    out['error_float32'] = difference(W[:, :CHECKED], ref)
    out['error_single'] = difference(apply(v), ref[:, :1])
    del W
    out['block'] = b.over_gradient(lambda: apply(V), V.shape[1], a.repeats)
    out['memory'] = b.peak() - base
    out['single'] = b.over_gradient(lambda: apply(v), 1, max(5, a.repeats))
    if apply.operator is not None:
        out['operator'] = repr(apply.operator)
    return out


def run_method(a):
    "One way, warmed up: measured in float32, and its error in float64"
    import torch

    warm = Bench(a, make=tiny)  # what a way imports at its first use is neither its time nor its memory
    warm.gradient()
    warm.way(a.method)(warm.vectors(16))
    del warm
    gc.collect()
    out = measure_way(a)
    gc.collect()
    b = Bench(a, torch.float64)
    out['error_float64'] = difference(b.way(a.method)(b.vectors(CHECKED)), load(a.folder))
    return out


def run_batches(a):
    "This package: several batches against one of the same total, at a block of vectors and at one"
    from hessian_overlap import HessianLinearOperator

    b = Bench(a)
    model, loss_func, x, y = b.problem
    k = PROBLEMS[a.problem][3]
    H1, Hk = (
        HessianLinearOperator(model, loss_func, None, data) for data in ([(x, y)], list(zip(x.chunk(k), y.chunk(k))))
    )
    V, out = b.vectors(a.vectors), dict(batches=k)
    for name, W in dict(block=V, single=V[:, :1].contiguous()).items():
        one, several = partial(H1.__matmul__, W), partial(Hk.__matmul__, W)
        first = b.seconds(one) + b.seconds(several)
        rows = [(b.seconds(one), b.seconds(several)) for _ in range(max(3, a.repeats, min(60, int(1 / first))))]
        s, t = min(s for s, _ in rows), min(t for _, t in rows)
        out[name] = dict(one=s, several=t, ratio=t / s, median_ratio=statistics.median(t / s for s, t in rows))
    out['difference'] = difference(Hk @ V, (H1 @ V).cpu())
    return out


def run_columns(a):
    "This package: peak memory of a product with many columns, less the columns of its result"
    import torch

    warm = Bench(a, make=tiny)
    warm.way('ours')(warm.vectors(16))
    b = Bench(a)
    V = torch.ones(b.n, a.vectors, device=b.device)  # touched, so that it is in memory before the baseline
    V.normal_(generator=torch.Generator(b.device).manual_seed(1))
    base = b.baseline()
    apply = b.way('ours')
    s = b.seconds(lambda: apply(V))
    return dict(columns=a.vectors, first_seconds=s, memory=b.peak() - base, result=V.numel() * V.element_size())


def run_environment(a):
    import torch

    def version(dist):
        try:
            return importlib.metadata.version(dist)
        except importlib.metadata.PackageNotFoundError:
            return None

    def cpu():
        try:
            return next(l.split(':')[1].strip() for l in open('/proc/cpuinfo') if l.startswith('model name'))
        except (OSError, StopIteration):
            return platform.processor()

    return dict(
        device=torch.cuda.get_device_name() if a.device.startswith('cuda') else 'cpu',
        cpu=cpu(),
        cores=os.cpu_count(),
        threads=a.threads,
        machine=platform.machine(),
        system=platform.system(),
        python=platform.python_version(),
        torch=torch.__version__,
        cuda=torch.version.cuda,
        versions={m: version(d) for m, d in (dict(hessian_overlap='hessian_overlap') | PEERS).items()},
    )


def worker(a):
    warnings.simplefilter('ignore')
    sys.path += a.peers
    if a.worker == 'run_method':
        needed = METHODS[a.method][1]
        try:
            __import__(needed)
        except ModuleNotFoundError as e:
            return dict(status='absent', why=f'{e.name} is not installed')
    try:
        return dict(status='ok') | globals()[a.worker](a)
    except Exception as e:
        return dict(
            status='failed', why=f'{type(e).__name__}: {str(e).strip().splitlines()[0] if str(e).strip() else ""}'[:300]
        )


# --- the parent: start the workers, print, write --------------------------------------------------


def call(a, what, **kw):
    "One worker's answer; a crash or a time-out is an answer too"
    arguments = dict(device=a.device, threads=a.threads, repeats=a.repeats) | kw
    cmd = (
        [sys.executable, os.path.abspath(__file__), '--worker', what]
        + [s for k, v in arguments.items() for s in (f'--{k}', str(v))]
        + [s for p in a.peers for s in ('--peers', p)]
    )
    env = os.environ | dict(OMP_NUM_THREADS=str(a.threads), MKL_NUM_THREADS=str(a.threads), TF_CPP_MIN_LOG_LEVEL='3')
    load, start = os.getloadavg()[0], time.perf_counter()
    with tempfile.TemporaryDirectory() as d:
        answer = Path(d) / 'answer.json'
        try:
            r = subprocess.run(
                cmd + ['--answer', str(answer)], env=env, capture_output=True, text=True, timeout=a.timeout
            )
        except subprocess.TimeoutExpired:
            return dict(status='timed out', why=f'after {a.timeout} s', load=load)
        if answer.exists() and r.returncode == 0:
            out = json.loads(answer.read_text())
        elif r.returncode < 0:
            out = dict(status='crashed', why=signal.Signals(-r.returncode).name)
        else:
            out = dict(status='failed', why=(r.stderr.strip().splitlines() or ['no message'])[-1][:300])
    return out | dict(load=load, wall_seconds=round(time.perf_counter() - start, 2))


def mib(b):
    return f'{b / 2**20:.0f}'


def trusted(row):
    return (
        row['status'] == 'ok' and max(row['error_float32'], row['error_single']) < 1e-3 and row['error_float64'] < 1e-8
    )


def print_problem(name, p):
    ref = p['reference']
    print(
        f'\n{name}: {ref.get("n", 0):,} parameters, {p["samples"]} samples, {p["vectors"]} vectors; '
        f'gradient {1e3 * p["gradient_seconds"]:.4g} ms; '
        f'a product has {ref["hvp_flops"] / ref["gradient_flops"]:.2f} times the operations of a gradient; '
        f'finite differences agree to {ref["finite_difference_error"]:.0e}'
    )
    print(
        f'  {"":<29} {"gradients":>9} {"ms":>8} {"single":>7} {"ms":>8} {"setup s":>7} '
        f'{"MiB":>6} {"a vector":>8} {"float32":>8} {"float64":>8}'
    )
    for m, r in p['methods'].items():
        if r['status'] != 'ok':
            print(f'  {METHODS[m][2]:<29} {r["status"]}: {r["why"][:110]}')
            continue
        block, single = r['block'], r['single']
        print(
            f'  {METHODS[m][2]:<29} {block["gradients"]:>9.2f} {1e3 * block["seconds"]:>8.2f} '
            f'{single["gradients"]:>7.2f} {1e3 * single["seconds"]:>8.2f} {r["setup_seconds"]:>7.2f} '
            f'{mib(r["memory"]):>6} {mib(r["memory"] / p["vectors"]):>8} '
            f'{r["error_float32"]:>8.0e} {r["error_float64"]:>8.0e}{"" if trusted(r) else "  WRONG"}'
        )
    for m, s in p.get('ours_against', {}).items():
        print(
            f'  hessian_overlap is {s["block"]:.2f} times as fast as {METHODS[m][2]} in blocks, '
            f'{s["single"]:.2f} times one by one'
        )
    if b := p.get('batches'):
        if b['status'] == 'ok':
            print(
                f'  {b["batches"]} batches cost {b["block"]["ratio"]:.2f} times one batch in blocks, '
                f'{b["single"]["ratio"]:.2f} times a single vector; the products differ by {b["difference"]:.0e}'
            )
        else:
            print(f'  several batches: {b["status"]}: {b["why"]}')
    for c in p.get('columns', []):
        if c['status'] == 'ok':
            print(
                f'  {c["columns"]} columns: {mib(c["memory"])} MiB over a gradient, '
                f'{mib(c["memory"] - c["result"])} without the columns of the result'
            )
        else:
            print(f'  columns: {c["status"]}: {c["why"]}')
    if o := p['methods'].get('ours', {}).get('operator'):
        print('  ' + o.replace('\n', '\n  '))
    sys.stdout.flush()


def measure(a, name, folder):
    _, cpu, cuda, _, many = PROBLEMS[name]
    samples, vectors = cuda if a.device.startswith('cuda') else cpu
    samples, vectors = a.samples or samples, a.vectors or vectors
    kw = dict(problem=name, samples=samples, vectors=vectors, folder=folder)
    ref = call(a, 'run_reference', **kw)
    if ref['status'] != 'ok':
        sys.exit(f'{name}: the reference {ref["status"]}: {ref["why"]}')
    p = dict(samples=samples, vectors=vectors, reference=ref, methods={})
    for m in a.methods:
        p['methods'][m] = call(a, 'run_method', method=m, **kw)
        r = p['methods'][m]
        if r['status'] == 'ok':
            said = f'{r["block"]["gradients"]:.2f} gradients a vector'
        else:
            said = f'{r["status"]} ({r["why"]})'
        print(f'  {name} {m}: {said}', file=sys.stderr, flush=True)
    done = {m: r for m, r in p['methods'].items() if r['status'] == 'ok'}
    if not done:
        sys.exit(f'{name}: no way worked')
    p['gradient_seconds'] = statistics.median(r['block']['gradient_seconds'] for r in done.values())
    if 'ours' in done:  # in gradients, which cancels the machine's mood
        p['ours_against'] = {
            m: {k: r[k]['gradients'] / done['ours'][k]['gradients'] for k in ('block', 'single')}
            for m, r in done.items()
            if m != 'ours' and trusted(r)
        }
        if not a.no_extras:
            p['batches'] = call(a, 'run_batches', **kw)
            if many or a.device.startswith('cuda'):
                p['columns'] = [call(a, 'run_columns', **(kw | dict(vectors=c))) for c in (16, a.columns)]
    return p


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--problems', nargs='+', choices=PROBLEMS, default=list(PROBLEMS))
    ap.add_argument('--methods', nargs='+', choices=METHODS, default=list(METHODS))
    ap.add_argument('--device', default='cpu')
    ap.add_argument('--threads', type=int, default=os.cpu_count())
    ap.add_argument('--repeats', type=int, default=5, help='products timed for each way, at least')
    ap.add_argument('--samples', type=int, help='instead of those of each problem')
    ap.add_argument('--vectors', type=int, help='likewise')
    ap.add_argument('--columns', type=int, default=1000, help='columns of the large product')
    ap.add_argument('--no_extras', action='store_true', help='neither several batches nor many columns')
    ap.add_argument('--peers', action='append', default=[], help='a folder with the peers, put last on the path')
    ap.add_argument('--timeout', type=float, default=900, help='seconds for one way')
    ap.add_argument('--out', help='JSON; default benchmarks/results/bench_hvp.json, with _cuda on CUDA')
    for hidden in ('worker', 'problem', 'method', 'folder', 'answer'):
        ap.add_argument(f'--{hidden}', help=argparse.SUPPRESS)
    a = ap.parse_args()
    if a.worker:
        return Path(a.answer).write_text(json.dumps(worker(a)))
    out = Path(a.out or f'benchmarks/results/bench_hvp{"_cuda" if a.device.startswith("cuda") else ""}.json')
    out.parent.mkdir(parents=True, exist_ok=True)
    if os.getloadavg()[0] > 0.5:
        print(
            f'this machine is busy (load {os.getloadavg()[0]:.1f}): '
            'times will be off, badly so with more threads than free cores',
            file=sys.stderr,
        )
    result = dict(environment=call(a, 'run_environment'), repeats=a.repeats, problems={})
    if result['environment']['status'] != 'ok':
        sys.exit(result['environment']['why'])
    with tempfile.TemporaryDirectory() as folder:
        for name in a.problems:
            result['problems'][name] = measure(a, name, folder)
            print_problem(name, result['problems'][name])
            out.write_text(json.dumps(result, indent=1) + '\n')
    print(f'\nwritten to {out}')


if __name__ == '__main__':
    main()
