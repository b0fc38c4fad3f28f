"Diagonals are those of the dense matrices, estimates are unbiased, and proxies know what they cost"

import math

import pytest
import torch
from torch import nn

from hessian_overlap.curvature import HessianLinearOperator
from hessian_overlap.ggn import GGNLinearOperator
from hessian_overlap.masks import Mask
from hessian_overlap.models import mnist_mlp
from hessian_overlap.noise import column_noise
from hessian_overlap.proxies import (
    Proxy,
    ggn_diagonal,
    ggn_proxy,
    gradient_proxy,
    h2_proxy,
    sam_proxy,
    sketch_diagonal,
)
from hessian_overlap.training import load_params

DEVICES = ['cpu'] + (['cuda'] if torch.cuda.is_available() else [])
f64 = torch.float64


def case(name, dtype=f64, device='cpu', batches=(5, 5)):
    gen = torch.Generator().manual_seed(0)
    rand = lambda *s: torch.randn(*s, generator=gen, dtype=f64).to(device, dtype)
    net, x, y, loss = dict(
        mlp=lambda: (
            mnist_mlp(seed=0, dtype=dtype, device=device, widths=(6, 5, 4)),
            rand(10, 6),
            torch.arange(10, device=device) % 4,
            nn.CrossEntropyLoss(),
        ),
        conv=lambda: (
            nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8, 3)),
            rand(10, 1, 4, 4),
            torch.arange(10, device=device) % 3,
            nn.CrossEntropyLoss(reduction='sum'),
        ),
        regression=lambda: (
            nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)),
            rand(10, 3),
            rand(10, 2),
            nn.MSELoss(),
        ),
        norm=lambda: (
            nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 1)),
            rand(10, 3),
            rand(10, 1),
            nn.SmoothL1Loss(),
        ),
    )[name]()
    net = net.to(device, dtype).eval()
    sizes = list(batches)
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(rand(*p.shape))
    return net, loss, None, list(zip(x.split(sizes), y.split(sizes)))


CASES = ['mlp', 'conv', 'regression', 'norm']


def dense(A):
    return A @ torch.eye(A.shape[0], dtype=A.dtype, device=A.device)


@pytest.mark.parametrize('name', CASES)
@pytest.mark.parametrize('dtype', [torch.float32, f64])
@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('batches', [(10,), (5, 5), (3, 7)])
def test_exact_diagonal(name, dtype, device, batches):
    G = GGNLinearOperator(*case(name, dtype, device, batches))
    D = dense(G).diagonal()
    d = ggn_diagonal(G)
    assert d.dtype == dtype and d.device == G.device and not d.requires_grad
    torch.testing.assert_close(
        d,
        D,
        rtol=1e-4 if dtype == torch.float32 else 1e-10,
        atol=1e-5 * D.max().item() if dtype == torch.float32 else 1e-12,
    )


@pytest.mark.parametrize('name', CASES)
@pytest.mark.parametrize('seed', [0])
@pytest.mark.parametrize('dtype', [torch.float32, f64])
def test_estimates_within_five_standard_errors(name, seed, dtype):
    G, N = GGNLinearOperator(*case(name, dtype)), 100
    H = HessianLinearOperator(*case(name, dtype))
    for draw, truth in (
        (lambda s: ggn_diagonal(G, probes=1, seed=s), dense(G).diagonal()),
        (lambda s: h2_proxy(H, probes=1, seed=s).scores, dense(H).square().sum(1)),
    ):
        d = torch.stack([draw(1000 * seed + s) for s in range(N)]).double()
        assert ((d.mean(0) - truth).abs() <= 5 * d.std(0) / N**0.5 + 1e-4 * truth.max()).all()
        assert (d >= 0).all()


def test_probes_average_and_are_seeded():
    G = GGNLinearOperator(*case('mlp'))
    assert torch.equal(ggn_diagonal(G, probes=2, seed=3), ggn_diagonal(G, probes=2, seed=3)) and not torch.equal(
        ggn_diagonal(G, probes=2, seed=3), ggn_diagonal(G, probes=2, seed=4)
    )
    err = [
        ((ggn_diagonal(G, probes=p, seed=0) - ggn_diagonal(G)) / ggn_diagonal(G)).square().mean().sqrt().item()
        for p in (2, 200)
    ]
    assert err[1] < err[0] / 4


@pytest.mark.parametrize('name', CASES)
def test_gradient_and_sam(name):
    model, loss_func, _, data = case(name)
    H = HessianLinearOperator(model, loss_func, None, data)
    g = H.gradient
    assert gradient_proxy(H).scores.equal(g.abs())
    rho = 1e-3
    eps = rho * g / g.norm()
    moved = HessianLinearOperator(load_params(model, H.theta + eps), loss_func, None, data)
    there, g2 = moved.loss, moved.gradient
    assert abs((there - H.loss) - (eps * (g + g2) / 2).sum()) < 1e-4 * abs(there - H.loss)
    torch.testing.assert_close(sam_proxy(H, rho).scores, (eps * (g + g2) / 2).abs())
    torch.testing.assert_close(
        sam_proxy(H, rho, part='curvature').scores,
        (eps * (H @ eps) / 2).abs(),
        rtol=0,
        atol=3e-2 * (eps * (H @ eps)).abs().max().item(),
    )


def test_prices_and_names():
    H, G = HessianLinearOperator(*case('mlp')), GGNLinearOperator(*case('mlp'))
    for proxy, price in (
        (gradient_proxy(H), 1),
        (sam_proxy(H), 2),
        (ggn_proxy(G), 4),
        (ggn_proxy(G, probes=3, seed=0), 3),
        (h2_proxy(H, probes=5, seed=0), 10),
    ):
        assert (
            proxy.gradients == price
            and proxy.name in repr(proxy)
            and (proxy.scores >= 0).all()
            and proxy.order.sort().values.equal(torch.arange(H.shape[0]))
        )
        every = sum(proxy.overlap(Mask(torch.tensor([i]), n=H.shape[0])).item() for i in range(H.shape[0]))
        assert abs(every - 1) < 1e-9
    assert not [p for p in H.model.parameters() if p.grad is not None], 'the model is left alone'


def test_sketch_diagonal_is_the_row_norms():
    A = torch.diag(torch.arange(1.0, 6, dtype=f64))
    Om = column_noise(5, range(4), seed=0)
    torch.testing.assert_close(sketch_diagonal(A @ Om).value, A.diagonal().square())
    torch.testing.assert_close(h2_proxy(A, probes=4, seed=0).scores, A.diagonal().square())
    torch.testing.assert_close(sketch_diagonal(torch.ones(3, 2)).value, torch.ones(3, dtype=f64))
    assert h2_proxy(A, probes=1, seed=0).std_error is None and h2_proxy(A, probes=4, seed=0).std_error.norm() < 1e-12


@pytest.mark.parametrize('probes', [2, 6, 11, 40])
def test_h2_knows_its_error(probes):
    "From six products on it is by leaving out; by fewer, a sketch"
    B = column_noise(60, range(60), seed=7, kind='gauss') * 0.8 ** torch.arange(60, dtype=f64)
    A = B + B.T
    truth = A.square().sum(1)
    runs = [h2_proxy(A, probes=probes, seed=s) for s in range(40)]
    error = torch.stack([p.scores - truth for p in runs]).square().mean().sqrt()
    said = torch.stack([p.std_error for p in runs]).square().mean().sqrt()
    assert 0.6 < error / said < 1.5
    assert {p.gradients for p in runs} == {2 * (probes if probes < 6 else probes // 2 * 2)}
    if probes > 20:
        plain = [sketch_diagonal(A @ column_noise(60, range(probes), seed=s)).value - truth for s in range(40)]
        assert error < torch.stack(plain).square().mean().sqrt() / 1.5


@pytest.mark.parametrize('name', CASES)
def test_ggn_probes_know_their_error(name):
    G = GGNLinearOperator(*case(name))
    truth = ggn_diagonal(G)
    runs = [ggn_proxy(G, probes=12, seed=s) for s in range(30)]
    error = torch.stack([p.scores - truth for p in runs]).square().mean().sqrt()
    said = torch.stack([p.std_error for p in runs]).square().mean().sqrt()
    assert 0.7 < error / said < 1.4
    assert ggn_proxy(G).std_error is None and ggn_proxy(G, probes=1, seed=0).std_error is None


# -------------------- any batch that an operator reads


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=f64)


class Two(nn.Module):
    "Two inputs by name or in order, or one of them in a dict"

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(2, 4)
        self.head = nn.Linear(4, 3)

    def forward(self, u, v=None):
        if isinstance(u, dict):
            u, v = u['u'], u['v']
        return self.head(torch.tanh(self.a(u) + self.b(v)))


class Recurrent(nn.Module):
    def __init__(self, kind, batch_first=True):
        super().__init__()
        self.cell = kind(3, 4, batch_first=batch_first)
        self.head, self.first = nn.Linear(4, 3), batch_first

    def forward(self, x):
        out = self.cell(x)[0]
        return self.head(out[:, -1] if self.first else out[-1])


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.body, self.head, self.reentrant = nn.Linear(3, 4), nn.Linear(4, 3), reentrant

    def forward(self, x):
        hidden = torch.utils.checkpoint.checkpoint(
            lambda x: torch.tanh(self.body(x)), x.requires_grad_(), use_reentrant=self.reentrant
        )
        return self.head(hidden)


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.table, self.head = nn.Embedding(9, 4), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.table(x).mean(1).tanh())


def made(model):
    model = model.double().eval()
    for i, p in enumerate(model.parameters()):
        p.data = 0.6 * normal(*p.shape, seed=i)
    return model


N, LABELS = 7, torch.arange(7) % 3
INPUTS = {
    'dict': (Two, lambda: dict(u=normal(N, 3), v=normal(N, 2, seed=1))),
    'tuple': (Two, lambda: (normal(N, 3), normal(N, 2, seed=1))),
    'list, as a DataLoader gives it': (Two, lambda: [normal(N, 3), normal(N, 2, seed=1)]),
    'lstm': (lambda: Recurrent(nn.LSTM), lambda: normal(N, 5, 3)),
    'gru, samples second': (lambda: Recurrent(nn.GRU, False), lambda: normal(5, N, 3)),
    'checkpointed': (lambda: Checkpointed(False), lambda: normal(N, 3)),
    'checkpointed, reentrant': (lambda: Checkpointed(True), lambda: normal(N, 3)),
    'words': (Words, lambda: torch.arange(N * 4).reshape(N, 4) % 9),
}
WEIGHTS = torch.tensor([1.0, 3.0, 0.5], dtype=f64)
LOSSES = dict(
    mean=nn.CrossEntropyLoss(),
    sum=nn.CrossEntropyLoss(reduction='sum'),
    weighted=nn.CrossEntropyLoss(weight=WEIGHTS),
)


@pytest.mark.parametrize(
    ('name', 'loss'), [*((name, 'mean') for name in INPUTS), ('dict', 'sum'), ('lstm', 'weighted'), ('words', 'sum')]
)
def test_proxies_of_any_batch(name, loss):
    "One batch, and the same samples in two uneven ones, against the matrices themselves"
    make, inputs = INPUTS[name]
    model, x, loss = made(make()), inputs(), LOSSES[loss]
    dim = 1 if 'second' in name else 0
    cut = lambda a, b: torch.utils._pytree.tree_map(lambda t: t.narrow(dim, a, b - a), x)
    one, two = [(x, LABELS)], [(cut(0, 2), LABELS[:2]), (cut(2, N), LABELS[2:])]
    G, H = GGNLinearOperator(model, loss, None, one), HessianLinearOperator(model, loss, None, one)
    truth = dense(G).diagonal()
    torch.testing.assert_close(ggn_diagonal(G), truth, rtol=1e-8, atol=1e-12)
    assert ggn_proxy(G).gradients == 3
    draws = torch.stack([ggn_diagonal(G, probes=1, seed=s) for s in range(30)])
    assert ((draws.mean(0) - truth).abs() <= 6 * draws.std(0) / 30**0.5 + 1e-9).all()
    split = GGNLinearOperator(model, loss, None, two), HessianLinearOperator(model, loss, None, two)
    torch.testing.assert_close(ggn_diagonal(split[0]), truth, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(gradient_proxy(split[1]).scores, gradient_proxy(H).scores)
    torch.testing.assert_close(sam_proxy(split[1]).scores, sam_proxy(H).scores)
    torch.testing.assert_close(h2_proxy(split[1], probes=4, seed=0).scores, h2_proxy(H, probes=4, seed=0).scores)


@pytest.mark.parametrize('form', ['dict target', 'model and batch', 'triple'])
def test_targets_and_losses_of_the_whole_batch(form):
    model, x = made(nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3))), normal(N, 3)
    plain = nn.CrossEntropyLoss()
    ref = HessianLinearOperator(model, plain, None, [(x, LABELS)])
    forms = {
        'dict target': (lambda out, y: plain(out, y['label']), (x, dict(label=LABELS, other=LABELS))),
        'model and batch': (lambda m, b: plain(m(b['x']), b['y']), dict(x=x, y=LABELS)),
        'triple': (lambda m, b: plain(m(b[0]), b[1]), (x, LABELS, torch.ones(N))),
    }
    loss, batch = forms[form]
    H = HessianLinearOperator(model, loss, None, [batch])
    for f in (gradient_proxy, sam_proxy, lambda H: h2_proxy(H, probes=4, seed=0)):
        torch.testing.assert_close(f(H).scores, f(ref).scores)
    if form == 'dict target':
        G = GGNLinearOperator(model, loss, None, [batch])
        torch.testing.assert_close(ggn_diagonal(G), dense(G).diagonal())
        assert ggn_proxy(G).gradients == 3


def coupled():
    "A loss that compares samples with each other"
    model = made(nn.Linear(3, 2))
    return GGNLinearOperator(
        model, lambda out, y: (out - out.mean(0)).square().sum(), None, [(normal(5, 3), LABELS[:5])]
    )


class Sharp(nn.Module):
    "A loss that is concave in the outputs"

    reduction = 'mean'

    def forward(self, out, y):
        return -(out - y).square().mean()


H, G = HessianLinearOperator(*case('mlp')), GGNLinearOperator(*case('mlp'))


@pytest.mark.parametrize(
    'call, error, says',
    [
        (lambda: ggn_diagonal(H), TypeError, 'must be a GGNLinearOperator'),
        (lambda: ggn_diagonal(G, probes=0, seed=0), ValueError, 'probes must be an integer at least 1'),
        (lambda: ggn_diagonal(G, probes=True, seed=0), TypeError, 'probes'),
        (lambda: gradient_proxy(torch.eye(3)), TypeError, 'must be a CurvatureOperator'),
        (lambda: h2_proxy(torch.ones(3, 4), seed=0), ValueError, 'square'),
        (lambda: h2_proxy(torch.eye(3), seed=1.5), TypeError, 'seed'),
        (lambda: sketch_diagonal(torch.ones(3, 0)), ValueError, 'Y must be'),
        (lambda: Proxy('x', [1.0], 1), TypeError, 'tensor'),
        (lambda: sam_proxy(H, '0.1'), ValueError, 'rho'),
        (lambda: ggn_diagonal(coupled()), ValueError, "other samples' outputs"),
        (lambda: ggn_diagonal(G, probes=2), ValueError, 'a seed'),
        (lambda: sam_proxy(H, 0), ValueError, 'rho'),
        (lambda: sam_proxy(H, math.nan), ValueError, 'rho'),
        (lambda: sam_proxy(H, part='x'), ValueError, 'part must be'),
        (lambda: h2_proxy(H, probes=0, seed=0), ValueError, 'probes'),
        (lambda: sketch_diagonal(torch.ones(3)), ValueError, r'\(n, p\)'),
        (lambda: Proxy('x', torch.tensor([1.0, math.nan]), 1), ValueError, 'finite'),
        (lambda: Proxy('x', torch.zeros(3), 1), ValueError, 'not all zero'),
        (
            lambda: Proxy('x', torch.ones(3), 1).overlap(Mask(torch.tensor([0]), n=4)),
            ValueError,
            'of 4 parameters, the scores of 3',
        ),
        (
            lambda: ggn_diagonal(GGNLinearOperator(case('regression')[0], Sharp(), *case('regression')[2:])),
            ValueError,
            'not convex',
        ),
    ],
)
def test_refused(call, error, says):
    with pytest.raises(error, match=says):
        call()
