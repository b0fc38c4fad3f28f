"""Is a compiled linear program worth its compilation?   python benchmarks/compiled.py [--out JSON]

For the 7030-parameter MLP (500 digits, 16 vectors at once) and 3c3d (100 images, one vector): the seconds torch.compile
takes for the linear program of a Hessian-vector product, the milliseconds a vector before and after, and after how many
vectors the first is paid back. Seconds are of the processor, children included, with one thread: other work on the
machine disturbs them hardly at all. The compiled product is compared with the program, and that with a double backward.
A compiler is needed; what cannot be compiled is reported as such.
"""

import argparse
import json
import os
import platform
import tempfile
import time
import warnings
from pathlib import Path

os.environ['TORCHINDUCTOR_CACHE_DIR'] = tempfile.mkdtemp()  # nothing compiled before
import torch
from bench_hvp import PROBLEMS
from torch import fx

from hessian_overlap import HessianLinearOperator
from hessian_overlap.fold import fold
from hessian_overlap.linearise import linearise


def busy(f):
    "Seconds of the processor, and the result"
    start = os.times()
    out = f()
    end = os.times()
    return sum(b - a for a, b in zip(start[:4], end[:4])), out


def fastest(f, repeats):
    return min(busy_one(f) for _ in range(repeats))


def busy_one(f):
    start = time.process_time()
    f()
    return time.process_time() - start


def difference(a, b):
    return ((a - b).norm() / b.norm()).item()


def measure(name, rows, repeats):
    make, (samples, _), *_ = PROBLEMS[name]
    model, loss, x, y = make(torch.device('cpu'), torch.float32, samples)
    H = HessianLinearOperator(model, loss, None, [(x, y)], strategy='single')
    V = torch.stack([torch.randn(H.shape[0], generator=torch.Generator().manual_seed(j)) for j in range(rows)])
    _, program, _ = linearise(torch.func.grad(lambda t: H._loss(t, (x, y))[0]), H.theta)
    v = V[0]
    if rows > 1:
        program, v = fold(program, H.theta)[0], V
    module = fx.GraphModule(
        {k: o for k, o in vars(program).items() if k not in ('graph', 'code', 'run')}, program.graph
    )
    out = dict(vectors=rows, error_program=difference(program(v).reshape(rows, -1), (H @ V.T).T))
    try:
        compiled = torch.compile(module, dynamic=False)
        out['compile_seconds'], W = busy(lambda: compiled(v))
    except Exception as e:
        return out | dict(status='failed', why=f'{type(e).__name__}: {str(e).splitlines()[0]}'[:300])
    before = fastest(lambda: program(v), repeats) / rows
    after = fastest(lambda: compiled(v), repeats) / rows
    return out | dict(
        status='ok',
        error_compiled=difference(W, program(v)),
        seconds=before,
        compiled_seconds=after,
        vectors_to_pay_back=out['compile_seconds'] / (before - after) if after < before else None,
    )


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--out', default='benchmarks/results/compiled.json')
    a = ap.parse_args()
    warnings.simplefilter('ignore')
    torch.set_num_threads(1)
    result = dict(
        environment=dict(
            torch=torch.__version__, python=platform.python_version(), machine=platform.machine(), threads=1
        ),
        problems={},
    )
    for name, rows, repeats in (('mlp', 16, 50), ('3c3d', 1, 10)):
        with torch.no_grad():
            result['problems'][name] = measure(name, rows, repeats)
        print(name, result['problems'][name], flush=True)
    Path(a.out).write_text(json.dumps(result, indent=1) + '\n')


if __name__ == '__main__':
    main()
