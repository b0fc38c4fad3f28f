"""Memory of a Gauss-Newton product of a language model: this package and curvlinops, each in a process of its own.

A causal transformer with a vocabulary of 50,000, in float32, on random tokens. The peak is the process's own (its
resident set's high-water mark, which Linux lets a process reset), of construction and of the product apart; both hold
the model, what an operator keeps and the vectors too. `imported_gb` is what torch alone takes. The ways that end in
_single get one batch for each sequence, the others one batch of all. A process may allocate --limit_gb; one that needs
more is reported as out of memory. Products are compared between the ways by ten thousand entries.

    python benchmarks/ggn_memory.py [--problems toy toy_long toy_many] [--ways ours curvlinops] [--limit_gb 10]
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
    toy_many=dict(width=64, layers=2, sequences=32, length=128, columns=1),
)
WAYS = ['ours', 'ours_single', 'curvlinops', 'curvlinops_single']
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


def operator(way, model, loss, x, y):
    "The operator, by one of the ways; neither checks its data"
    # as one batch, or one batch for each sequence
    data = list(zip(x.split(1), y.split(x.shape[1]))) if way.endswith('single') else [(x, y)]
    if way.startswith('ours'):
        from hessian_overlap import GGNLinearOperator

        return GGNLinearOperator(model, loss, None, data, memory=2**28, strategy='single', check_deterministic=False)
    from curvlinops import GGNLinearOperator

    params = list(model.parameters())
    # the number of samples is that of targets, as for its mean
    return GGNLinearOperator(model, loss, params, data, check_deterministic=False, batch_size_fn=lambda x: x.numel())


def resident(field='VmRSS'):
    "What the process holds, or has held at most (VmHWM), in GB"
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024 / 1e9


def peak():
    return resident('VmHWM')


def child(name, way, threads, out):
    import torch

    torch.set_num_threads(threads)
    imported = peak()
    model, loss, x, y, V = build(**PROBLEMS[name])
    built = peak()
    start = time.perf_counter()
    G = operator(way, model, loss, x, y)
    constructed, made = peak(), time.perf_counter() - start
    Path('/proc/self/clear_refs').write_text('5')  # what follows has a peak of its own
    held = resident()
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        W = G @ V
    seconds = time.perf_counter() - start - made
    pieces = G.info['pieces'] if way.startswith('ours') else None
    few = torch.linspace(0, W.numel() - 1, 10_000, dtype=torch.float64).long()
    result = dict(
        imported_gb=imported,
        built_gb=built,
        construction_peak_gb=constructed,
        held_gb=held,
        product_peak_gb=peak(),
        construction_seconds=made,
        product_seconds=seconds,
        n=len(V),
        pieces=pieces,
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
