"""Overlap curves of networks whose eigenspaces fit nowhere: 3c3d on CIFAR-10, transformers of 10 and 100 million.

Train the network, take the Hessian of its loss on some training samples, and estimate the overlap of the mask of
largest parameters with the leading eigenspace for k from a thousandth to a half of all n parameters (overlap_slq: every
k, several orderings and layers at once, with a basis in bfloat16 for the transformers). `--both` runs
overlap_slq_masked too, a few k in three blocks of memory, to compare them.

    python benchmarks/scale.py 3c3d --data cifar10-imagefolder.zip [--initial --steps 128] [--work DIR]
        [--train-steps 4000] [--samples 500]
    python benchmarks/scale.py transformer_10m  [--text FILE] [--work DIR]
    python benchmarks/scale.py transformer_100m [--text FILE] [--work DIR]

CIFAR-10 as a zip of class folders of images (train/airplane/0000.jpg ...); from JPEG files the result says that they
are lossy. The text is, if none is given, the language reference that every Python carries (pydoc_data.topics, 0.5 MB of
English and code); its checksum is in the result. The last tenth is held out; the baseline is a bigram model of the rest
(counts plus one tenth). `--work` keeps the trained parameters and the Lanczos state, so that an interrupted run goes on
where it was. `resolved` is the largest k at which the run resolves the cut, `resolved_after` that after fewer steps.
Results: benchmarks/results/scale_NETWORK.json.
"""

import argparse
import hashlib
import io
import json
import os
import platform
import resource
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from hessian_overlap import FunctionLinearOperator, HessianLinearOperator, magnitude_order, overlap_slq, random_order
from hessian_overlap.krylov import BlockLanczos
from hessian_overlap.masked_start import ShortLanczos, overlap_slq_masked
from hessian_overlap.masks import partition
from hessian_overlap.models import cifar10_3c3d
from hessian_overlap.quadrature import resolved_count, ritz_quadrature

SHARES = (0.001, 0.01, 0.05, 0.2)
NETWORKS = {
    '3c3d': dict(train_steps=4000, batch=128, lr=0.0226105, samples=500, probes=4, steps=512, basis='float32'),
    'transformer_10m': dict(
        width=384,
        layers=6,
        heads=6,
        train_steps=600,
        batch=16,
        lr=1e-3,
        samples=8,
        probes=3,
        steps=130,
        basis='bfloat16',
    ),
    'transformer_100m': dict(
        width=1024,
        layers=8,
        heads=16,
        train_steps=400,
        batch=8,
        lr=4e-4,
        samples=4,
        probes=1,
        steps=56,
        basis='bfloat16',
        orders=('magnitude',),
        low=(1e-5, 3e-5, 1e-4, 1.5e-4),
        masked=(1, 64),
    ),
}
LENGTH = 128  # characters of a sequence


class Block(nn.Module):
    "Attention and a perceptron, each after a layer norm (GPT-2)"

    def __init__(self, d, heads):
        super().__init__()
        self.heads, self.ln1, self.qkv, self.out = heads, nn.LayerNorm(d), nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.ln2, self.up, self.down = nn.LayerNorm(d), nn.Linear(d, 4 * d), nn.Linear(4 * d, d)

    def forward(self, x):
        q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(self.ln1(x)).chunk(3, -1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.ln2(x))))


class CharTransformer(nn.Module):
    "Logits of the next character: (N, T) -> (N, characters, T)"

    def __init__(self, characters, d, layers, heads):
        super().__init__()
        self.tokens, self.positions = nn.Embedding(characters, d), nn.Embedding(LENGTH, d)
        self.blocks, self.ln, self.head = (
            nn.Sequential(*[Block(d, heads) for _ in range(layers)]),
            nn.LayerNorm(d),
            nn.Linear(d, characters),
        )
        for e in (self.tokens, self.positions):
            nn.init.normal_(e.weight, std=0.02)

    def forward(self, x):
        return self.head(self.ln(self.blocks(self.tokens(x) + self.positions.weight[: x.shape[1]]))).transpose(1, 2)


def transformer(characters, d, layers, heads, seed=0):
    torch.manual_seed(seed)
    return CharTransformer(characters, d, layers, heads).eval()


def read_text(file):
    "Characters as numbers, their alphabet, and where they are from"
    if file:
        text, source = file.read_text(encoding='utf8', errors='replace'), file.name
    else:
        import pydoc_data.topics

        text, source = (
            '\n\n'.join(pydoc_data.topics.topics.values()),
            f'pydoc_data.topics of Python {platform.python_version()}',
        )
    alphabet = sorted(set(text))
    number = {c: i for i, c in enumerate(alphabet)}
    ids = torch.tensor([number[c] for c in text])
    return (
        ids,
        alphabet,
        dict(
            source=source,
            characters=len(text),
            alphabet=len(alphabet),
            sha256=hashlib.sha256(text.encode()).hexdigest(),
        ),
    )


def bigram_loss(train, test, size):
    "Cross-entropy of the test characters given the one before, nats"
    counts = torch.bincount(train[:-1] * size + train[1:], minlength=size**2).double().view(size, size) + 0.1
    return -(counts / counts.sum(1, keepdim=True)).log()[test[:-1], test[1:]].mean().item()


def sequences(ids, starts, length):
    return torch.stack([ids[s : s + length] for s in starts]), torch.stack([
        ids[s + 1 : s + length + 1] for s in starts
    ])


def train_transformer(a, cfg):
    "Model, Hessian data and what is to be said of the training"
    ids, alphabet, source = read_text(a.text)
    cut = len(ids) * 9 // 10
    train, test = ids[:cut], ids[cut:]
    model, began = (
        transformer(len(alphabet), cfg['width'], cfg['layers'], cfg['heads']).to(a.device),
        time.perf_counter(),
    )
    file = a.work and a.work / f'{a.network}_trained.pt'
    hx, hy = sequences(test, range(0, len(test) - LENGTH - 1, LENGTH), LENGTH)
    hx, hy = hx.to(a.device), hy.to(a.device)

    def held_out():
        with torch.no_grad(), torch.autocast(a.device, torch.bfloat16):
            return (
                torch
                .stack([F.cross_entropy(model(x).float(), y) for x, y in zip(hx[:128].split(16), hy[:128].split(16))])
                .mean()
                .item()
            )

    history, rng = [], np.random.default_rng(0)
    if file and file.exists():
        d = torch.load(file)
        model.load_state_dict(d['model'])
        history, seconds = d['history'], d['seconds']
    else:
        steps = a.train_steps or cfg['train_steps']
        opt = torch.optim.AdamW(model.parameters(), lr=cfg['lr'], betas=(0.9, 0.95), weight_decay=0.01, foreach=False)
        for t in range(steps):
            for g in opt.param_groups:
                g['lr'] = cfg['lr'] * min(1, (t + 1) / 50) * (0.1 + 0.9 * (1 - t / steps))
            x, y = sequences(train, rng.integers(0, len(train) - LENGTH - 1, cfg['batch']), LENGTH)
            with torch.autocast(a.device, torch.bfloat16):
                loss = F.cross_entropy(model(x.to(a.device)).float(), y.to(a.device))
            opt.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            if t % 50 == 49 or t == steps - 1:
                history.append((t + 1, loss.item(), held_out()))
                print(
                    f'step {t + 1}: loss {loss.item():.4f}, held out {history[-1][2]:.4f}, '
                    f'{time.perf_counter() - began:.0f} s',
                    flush=True,
                )
        seconds = time.perf_counter() - began
        del opt
        if file:
            torch.save(dict(model=model.state_dict(), history=history, seconds=seconds), file)
    for p in model.parameters():
        p.grad = None
    bigram = bigram_loss(train, test, len(alphabet))
    print(f'held-out loss {history[-1][2]:.4f}, bigram model {bigram:.4f} nats a character', flush=True)
    samples = a.samples or cfg['samples']
    x, y = sequences(train, range(0, len(train) - LENGTH - 1, (len(train) - LENGTH - 1) // samples), LENGTH)
    said = dict(
        text=source,
        optimiser=f'AdamW, {cfg["batch"]} x {LENGTH} characters, rate {cfg["lr"]}, bfloat16 autocast',
        train_steps=history[-1][0],
        seconds=seconds,
        history=history,
        test_loss=history[-1][2],
        bigram_loss=bigram,
    )
    return (
        model,
        [(x[:samples].to(a.device), y[:samples].to(a.device))],
        said,
        f'{samples} training sequences of {LENGTH} characters',
    )


def read_cifar(file):
    "Images (N, 3, 32, 32), mean 0 and variance 1 over the training set, and classes, of both splits"
    from PIL import Image

    out = {}
    with zipfile.ZipFile(file) as z:
        names = sorted(o for o in z.namelist() if not o.endswith('/'))
        classes = sorted({o.split('/')[-2] for o in names})
        for split in ('train', 'test'):
            own = [o for o in names if f'/{o}'.rsplit('/', 3)[1] == split]
            out[split] = (
                np.stack([np.asarray(Image.open(io.BytesIO(z.read(o))).convert('RGB')) for o in own]),
                torch.tensor([classes.index(o.split('/')[-2]) for o in own]),
            )
        lossy = any(o.lower().endswith(('.jpg', '.jpeg')) for o in names)
    mean, std = out['train'][0].mean((0, 1, 2)) / 255, out['train'][0].std((0, 1, 2)) / 255
    scale = lambda x: (
        torch.from_numpy(((x / np.float32(255) - mean) / std).astype(np.float32)).permute(0, 3, 1, 2).contiguous()
    )
    return {s: (scale(x), y) for s, (x, y) in out.items()}, lossy


def train_3c3d(a, cfg):
    if not a.data:
        raise SystemExit('3c3d needs --data: CIFAR-10 as a zip of class folders')
    model, began, history, file = (
        cifar10_3c3d(seed=0, device=a.device),
        time.perf_counter(),
        [],
        a.work and a.work / '3c3d_trained.pt',
    )
    data, lossy = read_cifar(a.data)
    (x, y), (tx, ty), rng = data['train'], data['test'], np.random.default_rng(0)

    def test():
        with torch.no_grad():
            out = torch.cat([model(b.to(a.device)) for b in tx.split(500)]).cpu()
        return F.cross_entropy(out, ty).item(), (out.argmax(1) == ty).double().mean().item()

    if file and file.exists() and not a.initial:
        d = torch.load(file)
        model.load_state_dict(d['model'])
        history, seconds = d['history'], d['seconds']
    else:
        steps = a.train_steps or cfg['train_steps']
        opt = torch.optim.SGD(model.parameters(), lr=cfg['lr'])  # batch and rate of Fernandez et al. (2025)
        history.append((0, None, *test()))
        for t in range(0 if a.initial else steps):
            i = torch.from_numpy(rng.integers(0, len(x), cfg['batch']))
            loss = F.cross_entropy(model(x[i].to(a.device)), y[i].to(a.device))
            opt.zero_grad()
            loss.backward()
            opt.step()
            if t % 500 == 499 or t == steps - 1:
                history.append((t + 1, loss.item(), *test()))
                print(
                    f'step {t + 1}: loss {loss.item():.4f}, test {history[-1][2]:.4f}, '
                    f'accuracy {history[-1][3]:.2%}, {time.perf_counter() - began:.0f} s',
                    flush=True,
                )
        seconds = time.perf_counter() - began
        if file and not a.initial:
            torch.save(dict(model=model.state_dict(), history=history, seconds=seconds), file)
    for p in model.parameters():
        p.grad = None
    samples = a.samples or cfg['samples']
    said = dict(
        images='CIFAR-10' + (' from JPEG files: lossy' if lossy else ''),
        optimiser=f'SGD, batch {cfg["batch"]}, rate {cfg["lr"]}',
        train_steps=history[-1][0],
        seconds=seconds,
        history=history,
        test_loss=history[-1][2],
        test_accuracy=history[-1][3],
    )
    i = torch.cat([(y == c).nonzero()[: samples // 10, 0] for c in range(10)])
    return model, [(x[i].to(a.device), y[i].to(a.device))], said, f'{samples} training images, as many of each class'


def timed(A, spent):
    "The operator, counting the seconds of its products"

    def mm(V):
        start = time.perf_counter()
        W = A @ V
        if A.device.type == 'cuda':
            torch.cuda.synchronize()
        spent.append(time.perf_counter() - start)
        return W

    return FunctionLinearOperator(mm, A.shape, rmatmat=mm, dtype=A.dtype, device=A.device)


def clock_before(file):
    "Seconds, and seconds in products, of the runs that a kept state is from"
    clock = file and file.with_suffix('.json')
    return json.loads(clock.read_text()) if clock and clock.exists() and file.exists() else (0.0, 0.0)


def keep(state, file, clock):
    "The state and the seconds it took"
    state.save(file)
    file.with_suffix('.json').write_text(json.dumps(clock))


def stored_basis(a, cfg, H, model, n):
    "Every k, several orderings and layers: overlap_slq"
    probes, steps, basis = a.probes or cfg['probes'], a.steps or cfg['steps'], a.basis or cfg['basis']
    make = dict(
        magnitude=lambda: magnitude_order(model),
        layerwise=lambda: magnitude_order(model, scope='layer'),
        random=lambda: random_order(n, seed=1),
    )
    ks = torch.tensor(sorted({round(s * n) for s in (*cfg.get('low', ()), *SHARES, *np.geomspace(1e-3, 0.5, 16))}))
    file, spent, began = a.work and a.work / f'{a.network}{"_initial" * a.initial}_basis.pt', [], time.perf_counter()
    B = timed(H, spent)
    state = (
        BlockLanczos.load(file, B)
        if file and file.exists()
        else BlockLanczos(B, probes, seed=0, basis_dtype=getattr(torch, basis), first=probes * (steps + 1))
    )
    before = clock_before(file)
    clock = lambda: (before[0] + time.perf_counter() - began, before[1] + sum(spent))
    while state.steps < steps:
        state.step()
        if state.steps % 10 == 0:
            print(
                '{} steps, {} products, {:.0f} s, {:.0f} s of them in products'.format(
                    state.steps, state.matvecs, *clock()
                ),
                flush=True,
            )
        if file and (state.steps % (40 if n < 10**8 else 14) == 0 or state.steps == steps):
            keep(state, file, clock())
    by, orders = partition(model), {name: make[name]() for name in cfg.get('orders', make)}
    found = overlap_slq(B, orders, ks, start=state, groups=by.labels.cpu(), num_probes=probes, num_steps=steps, seed=0)
    (seconds, products), one = clock(), found['magnitude'].info
    after = {}
    for m in sorted({max(1, steps * i // 8) for i in range(1, 9)}):
        theta, _, W, E = ritz_quadrature(state, m * probes)
        after[m] = resolved_count(theta, W, E, probes)
    return dict(
        method='slq',
        probes=probes,
        steps=steps,
        matvecs=state.matvecs,
        seconds=seconds,
        seconds_in_products=products,
        exact=one['exact'],
        basis=basis,
        basis_bytes=one['basis_bytes'],
        resolved=one['resolved'],
        resolved_after=after,
        ks=ks.tolist(),
        thresholds=one['threshold'].tolist(),
        layers=list(by.names),
        layer_sizes=by.sizes.tolist(),
        eigenvalues=state.ritz()[0][[0, -1]].tolist(),
        orders={name: said(e) | dict(layers=e.info['groups'].tolist()) for name, e in found.items()},
    )


def three_blocks(a, cfg, H, model, n):
    "A few k in the memory of three blocks"
    probes, steps = cfg.get('masked', (2, 32))
    steps = a.masked_steps or steps
    ks, order, spent, began = (
        torch.tensor([round(s * n) for s in SHARES]),
        magnitude_order(model),
        [],
        time.perf_counter(),
    )
    B, file = timed(H, spent), a.work and a.work / f'{a.network}{"_initial" * a.initial}_blocks.pt'
    state = (
        ShortLanczos.load(file, B) if file and file.exists() else ShortLanczos(B, order, ks, num_probes=probes, seed=0)
    )
    before, steps = clock_before(file), max(steps, state.steps)
    clock = lambda: (before[0] + time.perf_counter() - began, before[1] + sum(spent))
    while state.steps < steps:
        state.step()
        print(
            '{} steps, {} products, {:.0f} s, {:.0f} s of them in products'.format(
                state.steps, state.matvecs, *clock()
            ),
            flush=True,
        )
        if file and (state.steps % 8 == 0 or state.steps == steps):
            keep(state, file, clock())
    e = overlap_slq_masked(B, order, ks, start=state, num_probes=probes, num_steps=steps, seed=0)
    print(e, flush=True)
    return dict(
        method='slq_masked',
        probes=probes,
        steps=state.steps,
        matvecs=state.matvecs,
        **dict(zip(('seconds', 'seconds_in_products'), clock())),
        block_bytes=e.info['block_bytes'],
        resolved=e.info['resolved'],
        ks=ks.tolist(),
        thresholds=e.info['threshold'].tolist(),
        eigenvalues=state.nodes()[0][[0, -1]].tolist(),
        orders=dict(magnitude=said(e)),
    )


def said(e):
    return dict(
        overlap=e.overlap.tolist(),
        low=e.low.tolist(),
        high=e.high.tolist(),
        stderr=e.stderr.tolist(),
        resolution=e.resolution.tolist(),
        trusted=e.info['trusted'].tolist(),
    )


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('network', choices=NETWORKS)
    ap.add_argument('--data', type=Path)
    ap.add_argument('--text', type=Path)
    ap.add_argument('--work', type=Path)
    for name in ('train-steps', 'samples', 'probes', 'steps', 'masked-steps', 'threads'):
        ap.add_argument(f'--{name}', type=int)
    ap.add_argument('--basis', choices=('bfloat16', 'float16', 'float32'))
    ap.add_argument('--both', action='store_true')
    ap.add_argument('--initial', action='store_true', help='3c3d before training')
    ap.add_argument('--device', default='cpu')
    ap.add_argument('--train-only', action='store_true')
    ap.add_argument('--out', type=Path)
    a = ap.parse_args()
    cfg = NETWORKS[a.network]
    torch.set_num_threads(a.threads or os.cpu_count())
    if a.work:
        a.work.mkdir(parents=True, exist_ok=True)
    model, data, training, what = (train_3c3d if a.network == '3c3d' else train_transformer)(a, cfg)
    if a.train_only:
        return
    n = sum(p.numel() for p in model.parameters())
    strategy = 'linear' if a.network != '3c3d' else None
    H = HessianLinearOperator(model, nn.CrossEntropyLoss(), None, data, strategy=strategy, check_deterministic=False)
    print(f'{a.network}: {n} parameters, Hessian of {what}, loss {H.loss:.4f}', flush=True)
    runs = [stored_basis(a, cfg, H, model, n)]
    if a.both:
        runs.append(three_blocks(a, cfg, H, model, n))
    out = dict(
        script='benchmarks/scale.py',
        network=a.network,
        n=n,
        training=training,
        hessian=dict(samples=what, loss=H.loss),
        runs=runs,
        strategy=H.info['strategy'],
        peak_memory=torch.cuda.max_memory_allocated()
        if a.device != 'cpu'
        else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        environment=dict(
            device=torch.cuda.get_device_name() if a.device != 'cpu' else 'cpu',
            machine=platform.machine(),
            system=platform.system(),
            cores=os.cpu_count(),
            threads=torch.get_num_threads(),
            python=platform.python_version(),
            torch=torch.__version__,
        ),
    )
    file = a.out or Path(__file__).parent / f'results/scale_{a.network}{"_initial" * a.initial}.json'
    file.write_text(json.dumps(out) + '\n')
    for r in runs:
        for name, o in r['orders'].items():
            said = []
            for k, v, l, h, t in zip(r['ks'], o['overlap'], o['low'], o['high'], o['trusted']):
                note = '' if t else ' (not resolved)'
                said.append(f'{k / n:.2%}: {v:.4f} in [{l:.4f}, {h:.4f}] = {v * n / k:.2f} x chance{note}')
            print(f'{r["method"]}, {name}: ' + ', '.join(said))
    print('written to', file)


if __name__ == '__main__':
    main()
