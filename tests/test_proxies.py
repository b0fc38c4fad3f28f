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
@pytest.mark.parametrize('seed', [0, 1, 2])
@pytest.mark.parametrize('dtype', [torch.float32, f64])
def test_estimates_within_five_standard_errors(name, seed, dtype):
    G, N = GGNLinearOperator(*case(name, dtype)), 150
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
    torch.testing.assert_close(sketch_diagonal(A @ Om), A.diagonal().square())
    torch.testing.assert_close(h2_proxy(A, probes=4, seed=0).scores, A.diagonal().square())
    torch.testing.assert_close(sketch_diagonal(torch.ones(3, 2)), torch.ones(3))


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
        (lambda: ggn_diagonal(G, probes=0, seed=0), ValueError, 'at least one probe'),
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
