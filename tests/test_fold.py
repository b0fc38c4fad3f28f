"Folded programs: for any number of rows what the program for one vector gives, operation by operation"

import pytest
import torch
import torch.nn.functional as F
from torch.func import vmap

from hessian_overlap.fold import fold
from hessian_overlap.linearise import linearise

f64 = torch.float64
g = torch.Generator().manual_seed(0)
CONSTANTS = [torch.randn(*s, generator=g, dtype=f64) for s in ((3, 4), (5, 3), (2, 4, 3))]

FUNCTIONS = {  # of a vector of 12
    'product from the right': lambda t, A, B, C: t.view(4, 3) @ A,
    'product from the left': lambda t, A, B, C: A @ t.view(4, 3),
    'transposed, from the left': lambda t, A, B, C: A @ t.view(3, 4).t(),
    'transposed, from the right': lambda t, A, B, C: t.view(3, 4).t() @ A,
    'both factors': lambda t, A, B, C: t.view(3, 4) @ t.view(4, 3),
    'chain': lambda t, A, B, C: torch.tanh(B @ torch.tanh(t.view(4, 3) @ A).view(4, 4)[:3]),
    'bias': lambda t, A, B, C: torch.addmm(t[:3], A.t(), t.view(3, 4).t()[:3, :3]),
    'bias, scaled': lambda t, A, B, C: torch.addmm(t[:3], t.view(4, 3), A[:, :3], beta=0.5, alpha=2.0),
    'bias alone': lambda t, A, B, C: torch.addmm(t[:3], A.t(), A[:, :3]),
    'used twice': lambda t, A, B, C: (lambda h: h * h + h.t() - 2 * h)(t[:9].view(3, 3) @ A[:, :3]),
    'overwritten by none': lambda t, A, B, C: (lambda h: torch.cat([h + 1, (h * h).sin(), h]))(t.view(4, 3) @ A),
    'broadcast': lambda t, A, B, C: t.view(4, 3) * t[:3] + t[:4, None] * A.t(),
    'number': lambda t, A, B, C: t * t[0] - t.sum() * t,
    'sums': lambda t, A, B, C: torch.cat([
        t.view(2, 2, 3).transpose(0, 2).sum((0, 2)),
        t.view(4, 3).t().sum(1, keepdim=True).view(-1),
        t.sum()[None],
        t.pow(2).mean()[None],
    ]),
    'views': lambda t, A, B, C: (
        t.view(2, 2, 3).permute(2, 0, 1).reshape(3, 4)[1:, ::2].unsqueeze(-1).expand(2, 2, 3).select(0, 1).squeeze()
    ),
    'parts': lambda t, A, B, C: torch.cat([*t.chunk(4)[::2], t.split([5, 7])[1] * t[0], torch.ones(2).to(t)]),
    'stack': lambda t, A, B, C: torch.stack([t.sin(), torch.ones(12).to(t), t], 1),
    'batched product': lambda t, A, B, C: C @ t.view(2, 3, 2).tanh(),
    'softmax': lambda t, A, B, C: t.view(4, 3).t().softmax(0) + t.view(4, 3).t().log_softmax(1),
    'norm': lambda t, A, B, C: F.layer_norm(t.view(3, 4), (4,)) + F.gelu(t.view(4, 3).t()),
    'convolution': lambda t, A, B, C: F.conv2d(t.view(1, 1, 3, 4), t[:4].view(1, 1, 2, 2), padding=1),
    'relu, pool': lambda t, A, B, C: F.max_pool1d(F.relu(t.view(1, 3, 4)), 2),
    'index': lambda t, A, B, C: t[torch.tensor([3, 3, 0])] * t.flip(0)[:3],
    'embedding': lambda t, A, B, C: F.embedding(torch.tensor([[1, 0], [3, 3]]), t.view(4, 3)),
}


@pytest.mark.parametrize('dtype', [torch.float32, f64])
@pytest.mark.parametrize('name', FUNCTIONS)
def test_equals_one_by_one(name, dtype):
    t, V, *constants = (
        c.to(dtype)
        for c in (
            torch.randn(12, generator=torch.Generator().manual_seed(1)),
            torch.randn(5, 12, generator=torch.Generator().manual_seed(2)),
            *CONSTANTS,
        )
    )
    f = lambda t: FUNCTIONS[name](t, *constants)
    y, jv, _ = linearise(f, t)
    rows, nbytes = fold(jv, t)
    kept = V.clone()
    for m in (1, 2, 5):
        W = rows(V[:m])
        assert W.shape == (m, *y.shape) and W.dtype == t.dtype and nbytes >= 0
        torch.testing.assert_close(
            W,
            torch.stack([jv(v) for v in V[:m]]),
            rtol=1e-5 if dtype != f64 else 1e-12,
            atol=1e-6 if dtype != f64 else 1e-13,
        )
    torch.testing.assert_close(rows(V), rows(V), rtol=0, atol=0)
    assert torch.equal(V, kept)  # nothing that came in is overwritten
    J = torch.func.jacrev(f)(t)
    torch.testing.assert_close(
        rows(V),
        vmap(lambda v: (J * v).sum(-1))(V),
        rtol=1e-4 if dtype != f64 else 1e-11,
        atol=1e-5 if dtype != f64 else 1e-12,
    )


def test_small_products_become_large_ones():
    "The derivative of a layer has one product of matrices for all vectors, and no call of vmap"
    x = torch.randn(50, 6, generator=g, dtype=f64)

    def loss(t):
        w, b, u = t.split([24, 4, 12])
        return F.cross_entropy(torch.tanh(F.linear(x, w.view(4, 6), b)) @ u.view(4, 3), torch.arange(50) % 3)

    t = torch.randn(40, generator=g, dtype=f64)
    _, jv, _ = linearise(torch.func.grad(loss), t)
    rows, _ = fold(jv, t)
    names = [str(n.target) for n in rows.graph.nodes]
    assert not any(n.op == 'call_module' for n in rows.graph.nodes)
    assert names.count('aten.mm.default') + names.count('aten.addmm_.default') >= 4
    H = torch.func.hessian(loss)(t)
    torch.testing.assert_close(rows(torch.eye(40, dtype=f64)), H, rtol=1e-10, atol=1e-13)
