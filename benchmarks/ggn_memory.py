"""Memory of a Gauss-Newton product of a language model: this package and curvlinops, each in a process of its own.

A causal transformer with a vocabulary of 50,000, tied to nothing, in float32, on random tokens. The peak is the
process's own (ru_maxrss), construction included, so it holds the model, the operator's copy of it and the vectors too;
`imported_gb` is what torch alone takes. A process may have --limit_gb of address space; one that needs more is reported
as out of memory. Products are compared between the ways by ten thousand entries.

    python benchmarks/ggn_memory.py [--problems toy large] [--ways ours curvlinops] [--limit_gb 10]
"""

# The parent process imports neither torch nor NumPy: on Linux a child's ru_maxrss starts at its parent's size.
import argparse
import importlib.metadata
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# width, layers, sequences, length of each, columns
PROBLEMS = dict(
    toy=dict(width=64, layers=2, sequences=16, length=128, columns=2),
    toy_long=dict(width=64, layers=2, sequences=1, length=2048, columns=1),
    large=dict(width=768, layers=12, sequences=8, length=128, columns=1),
)
WAYS = ['ours', 'ours_quarter', 'curvlinops', 'curvlinops_single']
VOCABULARY = 50_000
HERE = Path(__file__).resolve().parent


def build(width, layers, sequences, length, columns):
    "Model, loss, batch and vectors, seeded"
    import torch
    from torch import nn

    class Language(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed, self.place = nn.Embedding(VOCABULARY, width), nn.Parameter(torch.randn(length, width) / 10)
            layer = lambda: nn.TransformerEncoderLayer(width, width // 64 or 1, 4 * width, 0.0, batch_first=True)
            self.layers = nn.ModuleList([layer() for _ in range(layers)])
            self.head = nn.Linear(width, VOCABULARY, bias=False)
            self.register_buffer('mask', nn.Transformer.generate_square_subsequent_mask(length))

        def forward(self, x):
            x = self.embed(x) + self.place
            for layer in self.layers:
                x = layer(x, src_mask=self.mask)
            return self.head(x).flatten(0, 1)

    torch.manual_seed(0)
    model = Language().eval()
    x = torch.randint(VOCABULARY, (sequences, length))
    y = x.roll(-1, 1).flatten()
    V = torch.randn(sum(p.numel() for p in model.parameters()), columns)
    return model, nn.CrossEntropyLoss(), x, y, V


def multiply(way, model, loss, x, y, V):
    "The product, by one of the ways, and what the operator says of itself"
    import torch

    if way.startswith('ours'):
        from hessian_overlap import GGNLinearOperator

        memory = dict(ours=2**30, ours_quarter=2**28)[way]
        G = GGNLinearOperator(model, loss, None, [(x, y)], memory=memory, strategy='single')
        return G @ V, dict(memory=memory, pieces=G.info['pieces'])
    from curvlinops import GGNLinearOperator

    params = list(model.parameters())
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        data = [(x, y)]
        if way == 'curvlinops_single':  # what its user can do: batches of one sequence
            data = list(zip(x.split(1), y.split(x.shape[1])))
        # the number of samples is that of targets, as for its mean
        G = GGNLinearOperator(model, loss, params, data, check_deterministic=False, batch_size_fn=lambda x: x.numel())
        return G @ V, {}


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def child(name, way, threads, out):
    import torch

    torch.set_num_threads(threads)
    imported = peak()
    model, loss, x, y, V = build(**PROBLEMS[name])
    built = peak()
    start = time.perf_counter()
    W, said = multiply(way, model, loss, x, y, V)
    seconds = time.perf_counter() - start
    few = torch.linspace(0, W.numel() - 1, 10_000, dtype=torch.float64).long()
    result = dict(
        peak_gb=peak(),
        imported_gb=imported,
        built_gb=built,
        seconds=seconds,
        n=len(V),
        **said,
        logits_gb=y.numel() * VOCABULARY * 4 / 1e9,
        entries=W.T.reshape(-1)[few].tolist(),
    )
    Path(out).write_text(json.dumps(result))


def measure(name, way, args):
    "Runs one way in a process of its own"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / 'result.json'
        command = [sys.executable, __file__, '--child', name, way, str(out), '--threads', str(args.threads)]
        limit = int(args.limit_gb * 1e9)
        limited = lambda: resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        run = subprocess.run(command, capture_output=True, text=True, preexec_fn=limited)
        if out.exists():
            return json.loads(out.read_text())
    last = (run.stderr.strip().splitlines() or [f'killed, {run.returncode}'])[-1]
    lacks = "can't allocate memory" in run.stderr or 'MemoryError' in run.stderr or 'bad_alloc' in run.stderr
    return dict(failed='out of memory' if lacks else last[:300])


def compare(ways):
    "Relative difference of the products from the first one, in place of their entries"
    kept = {way: found.pop('entries') for way, found in ways.items() if 'entries' in found}
    first = next(iter(kept.values()), [])
    norm = sum(a * a for a in first) ** 0.5
    for way, entries in kept.items():
        ways[way]['difference'] = sum((a - b) ** 2 for a, b in zip(entries, first)) ** 0.5 / norm


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument('--problems', nargs='*', default=list(PROBLEMS))
    parser.add_argument('--ways', nargs='*', default=WAYS)
    parser.add_argument('--limit_gb', type=float, default=10)
    parser.add_argument('--threads', type=int, default=1)
    parser.add_argument('--out', default=HERE / 'results' / 'ggn_memory.json')
    parser.add_argument('--child', nargs=3, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return child(*args.child[:2], args.threads, args.child[2])
    versions = {name: importlib.metadata.version(name) for name in ('torch', 'curvlinops-for-pytorch')}
    result = dict(
        versions=versions,
        python=platform.python_version(),
        cpu_count=os.cpu_count(),
        threads=args.threads,
        limit_gb=args.limit_gb,
        vocabulary=VOCABULARY,
        problems={},
    )
    for name in args.problems:
        ways = {}
        for way in args.ways:
            ways[way] = measure(name, way, args)
            print(name, way, {k: v for k, v in ways[way].items() if k != 'entries'}, flush=True)
        compare(ways)
        result['problems'][name] = dict(PROBLEMS[name], ways=ways)
        Path(args.out).write_text(json.dumps(result, indent=1) + '\n')


if __name__ == '__main__':
    main()
