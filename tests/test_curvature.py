"Laws of the curvature operators: one table of models, losses and data, every law over all of them"

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.utils.data import DataLoader, Dataset, TensorDataset

from hessian_overlap.curvature import HessianLinearOperator
from hessian_overlap.ggn import EFLinearOperator, GGNLinearOperator
from hessian_overlap.noise import column_noise
from hessian_overlap.problems import mnist_mlp

DEVICES = ['cpu'] + (['cuda'] if torch.cuda.is_available() else [])
f64 = torch.float64


class Tied(nn.Module):
    "The same weight used twice"

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(4, 4, bias=False)
        self.b = nn.Linear(4, 4, bias=False)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


class Recurrent(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn = nn.LSTM(2, 3, batch_first=True)
        self.head = nn.Linear(3, 3)

    def forward(self, x):
        return self.head(self.rnn(x)[0][:, -1])


class Square(torch.autograd.Function):
    "A user's own differentiable function, without a vmap rule"

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        return 2 * ctx.saved_tensors[0] * g


class Custom(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 3)

    def forward(self, x):
        return Square.apply(self.a(x))


class Attention(nn.Module):
    "Two layers of self-attention by F.scaled_dot_product_attention, whose fused CPU kernel has no second derivative"

    def __init__(self, d=4, heads=2):
        super().__init__()
        self.heads, self.qkv = heads, nn.ModuleList([nn.Linear(d, 3 * d) for _ in range(2)])
        self.norm, self.ff, self.head = nn.LayerNorm(d), nn.Linear(d, d), nn.Linear(d, 3)

    def forward(self, x):
        for qkv in self.qkv:
            q, k, v = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in qkv(self.norm(x)).chunk(3, -1))
            x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
            x = x + self.ff(F.gelu(x))
        return self.head(x.mean(1))


class Inplace(nn.Module):
    "Branches, operations in place and a residual, as in a ResNet"

    def __init__(self):
        super().__init__()
        self.a, self.b, self.n = nn.Conv2d(2, 2, 3, padding=1), nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.n(self.relu(self.a(x)))
        y += self.b(x)
        return F.adaptive_avg_pool2d(self.relu(y), 1).flatten(1)


mlp = lambda *sizes, act=nn.Tanh: nn.Sequential(
    *[m for a, b in zip(sizes, sizes[1:]) for m in (nn.Linear(a, b), act())][:-1]
)
classes = lambda N, C: lambda g: torch.randint(0, C, (N,), generator=g)
values = lambda *s: lambda g: torch.randn(*s, generator=g, dtype=f64)

CASES = {  # name: (model, loss, x shape, y)
    'mlp, cross-entropy': (lambda: mlp(6, 5, 3), nn.CrossEntropyLoss(), (11, 6), classes(11, 3)),
    'mlp, cross-entropy, sum': (lambda: mlp(6, 5, 3), nn.CrossEntropyLoss(reduction='sum'), (11, 6), classes(11, 3)),
    'mlp, class weights': (
        lambda: mlp(6, 5, 3),
        nn.CrossEntropyLoss(weight=torch.tensor([1.0, 5.0, 0.2], dtype=f64)),
        (11, 6),
        classes(11, 3),
    ),
    'mlp, ignore_index': (lambda: mlp(6, 5, 3), nn.CrossEntropyLoss(ignore_index=1), (11, 6), classes(11, 3)),
    'mlp, label smoothing': (lambda: mlp(6, 5, 3), nn.CrossEntropyLoss(label_smoothing=0.1), (11, 6), classes(11, 3)),
    'relu, mse': (lambda: mlp(6, 5, 2, act=nn.ReLU), nn.MSELoss(), (11, 6), values(11, 2)),
    'gelu, huber': (lambda: mlp(6, 5, 2, act=nn.GELU), nn.HuberLoss(), (11, 6), values(11, 2)),
    'mlp, bce': (
        lambda: mlp(6, 5, 1),
        nn.BCEWithLogitsLoss(),
        (11, 6),
        lambda g: torch.randint(0, 2, (11, 1), generator=g).to(f64),
    ),
    'own loss function': (lambda: mlp(6, 5, 1), lambda out, y: (out - y).abs().pow(3).mean(), (11, 6), values(11, 1)),
    'own autograd.Function': (Custom, nn.MSELoss(), (11, 6), values(11, 3)),
    'linear, mse': (lambda: nn.Linear(6, 2), nn.MSELoss(), (11, 6), values(11, 2)),
    'conv, pool': (
        lambda: nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(12, 3)),
        nn.CrossEntropyLoss(),
        (11, 1, 6, 6),
        classes(11, 3),
    ),
    'batch norm in eval mode': (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 3)).eval(),
        nn.CrossEntropyLoss(),
        (11, 6),
        classes(11, 3),
    ),
    'layer norm, dropout in eval mode': (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Dropout(0.5), nn.Tanh(), nn.Linear(5, 3)).eval(),
        nn.CrossEntropyLoss(),
        (11, 6),
        classes(11, 3),
    ),
    'tied weights': (Tied, nn.MSELoss(), (11, 4), values(11, 4)),
    'partial, sum': (
        lambda: mlp(6, 5, 3),
        functools.partial(F.cross_entropy, reduction='sum'),
        (11, 6),
        classes(11, 3),
    ),
    'function, mean': (lambda: mlp(6, 5, 2), F.mse_loss, (11, 6), values(11, 2)),
    'attention': (Attention, nn.CrossEntropyLoss(), (11, 3, 4), classes(11, 3)),
    'transformer layer': (
        lambda: nn.Sequential(
            nn.TransformerEncoderLayer(4, 2, 6, dropout=0.0, batch_first=True), nn.Flatten(), nn.Linear(12, 3)
        ).eval(),
        nn.CrossEntropyLoss(),
        (11, 3, 4),
        classes(11, 3),
    ),
    'in place, residual': (lambda: Inplace().eval(), nn.CrossEntropyLoss(), (11, 2, 4, 4), classes(11, 2)),
    'lstm': (Recurrent, nn.CrossEntropyLoss(), (11, 4, 2), classes(11, 3)),
}


@pytest.fixture(params=CASES)
def name(request):
    return request.param


@pytest.fixture(params=DEVICES)
def device(request):
    return request.param


def make(name, device='cpu', dtype=f64):
    build, loss, shape, target = CASES[name]
    model, g = build(), torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=g, dtype=f64).mul_(0.7).to(dtype)
    for b in model.buffers():
        b.data = b.data.to(dtype) if b.is_floating_point() else b.data
    x, y = torch.randn(shape, generator=g, dtype=f64).to(dtype), target(g)
    y = y.to(dtype) if y.is_floating_point() else y
    loss = copy.deepcopy(loss)
    if isinstance(loss, nn.Module):
        loss = loss.to(dtype)
    to = lambda o: o.to(device) if hasattr(o, 'to') else o
    return to(model), to(loss), to(x), to(y)


MATHS = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)  # the oracles need a second derivative too


@MATHS
def dense(model, loss, x, y):
    "The Hessian by torch.func, independent of the operator"
    named = dict(model.named_parameters())
    flat = torch.cat([p.detach().reshape(-1) for p in named.values()])

    def f(t):
        parts = {
            k: c.reshape(p.shape) for (k, p), c in zip(named.items(), t.split([p.numel() for p in named.values()]))
        }
        return loss(functional_call(model, parts, (x,)), y)

    rows = []
    t = flat.clone().requires_grad_()
    g = torch.autograd.grad(f(t), t, create_graph=True)[0]
    for gi in g:
        rows.append(torch.autograd.grad(gi, t, retain_graph=True, materialize_grads=True, allow_unused=True)[0])
    return torch.stack(rows).detach(), g.detach()


def eye(H):
    return torch.eye(H.shape[0], dtype=H.dtype, device=H.device)


OPERATORS = {'hessian': HessianLinearOperator, 'ggn': GGNLinearOperator, 'ef': EFLinearOperator}


@pytest.fixture(params=OPERATORS)
def kind(request):
    return request.param


def divisor(loss, y):
    "The number of samples that the table's losses are means over, from their definitions; 1 for a sum"
    if getattr(loss, 'reduction', '') == 'sum' or getattr(loss, 'keywords', {}).get('reduction') == 'sum':
        return 1.0
    if isinstance(loss, nn.CrossEntropyLoss) and loss.weight is not None:
        return loss.weight[y].sum().item()
    if isinstance(loss, nn.CrossEntropyLoss):
        return (y != loss.ignore_index).sum().item()
    return len(y)


@MATHS
def dense_factored(kind, model, loss, x, y):
    "The Gauss-Newton matrix or the empirical Fisher from the dense Jacobian, row by row"
    out, params = model(x), list(model.parameters())
    J = torch.stack([
        torch.cat([
            g.reshape(-1)
            for g in torch.autograd.grad(o, params, retain_graph=True, materialize_grads=True, allow_unused=True)
        ])
        for o in out.reshape(-1)
    ])
    flat = lambda o: loss(o.view_as(out), y)
    o = out.detach().reshape(-1)
    if kind == 'ggn':
        return J.T @ torch.autograd.functional.hessian(flat, o) @ J
    r = torch.autograd.functional.jacobian(flat, o)
    grads = (r[:, None] * J).view(len(out), -1, J.shape[1]).sum(1)
    return divisor(loss, y) * grads.T @ grads


def test_equals_the_dense_matrix(name, kind, device):
    model, loss, x, y = make(name, device)
    H = OPERATORS[kind](model, loss, list(model.parameters()), [(x, y)])
    D, g = dense(model, loss, x, y)
    torch.testing.assert_close(H.gradient, g, rtol=1e-10, atol=1e-12)
    if kind != 'hessian':
        D = dense_factored(kind, model, loss, x, y)
    scale = D.abs().max()
    torch.testing.assert_close((H @ eye(H)) / scale, D / scale, rtol=0, atol=1e-10)
    assert H.T is H and abs(H.loss - loss(model(x), y).item()) < 1e-12 * max(1, abs(H.loss))


@pytest.mark.parametrize('split', [[4, 7]])
def test_every_strategy_is_the_same_operator(name, kind, split, device):
    model, loss, x, y = make(name, device)
    data = list(zip(x.split(split), y.split(split)))
    if isinstance(loss, nn.Module) and not all(torch.isfinite(loss(model(a), b)) for a, b in data):
        return
    ref = None
    for s in OPERATORS[kind].strategies:
        H = OPERATORS[kind](model, loss, None, data, strategy=s, check_deterministic=False)
        if name == 'own autograd.Function' and s.startswith('linear'):
            with pytest.raises(RuntimeError, match='setup_context'):
                H @ eye(H)
            continue
        W = H @ eye(H)
        ref = W if ref is None else ref
        torch.testing.assert_close(W, ref, rtol=1e-9, atol=1e-11 * ref.abs().max().clamp_min(1).item())
        torch.testing.assert_close(
            H @ eye(H)[:, 1], ref[:, 1], rtol=1e-9, atol=1e-11 * ref.abs().max().clamp_min(1).item()
        )
        assert H.info['groups_kept'] == H.info['groups'] and H.info['strategy'] == s


def test_positive_semi_definite(name):
    model, loss, x, y = make(name)
    for Op in (GGNLinearOperator, EFLinearOperator):
        A = Op(model, loss, None, [(x[:4], y[:4]), (x[4:], y[4:])], check_deterministic=False)
        lam = torch.linalg.eigvalsh(A @ eye(A))
        assert lam[0] >= -1e-12 * lam[-1].clamp_min(1e-3)


def test_ggn_of_a_linear_model_is_the_hessian():
    for loss, y in (
        (nn.MSELoss(), values(11, 2)),
        (nn.CrossEntropyLoss(), classes(11, 2)),
        (nn.MSELoss(reduction='sum'), values(11, 2)),
    ):
        g = torch.Generator().manual_seed(1)
        model, x, y = nn.Linear(6, 2).double(), torch.randn(11, 6, generator=g, dtype=f64), y(g)
        H, G = (Op(model, loss, None, [(x, y)]) for Op in (HessianLinearOperator, GGNLinearOperator))
        torch.testing.assert_close(G @ eye(G), H @ eye(H), rtol=1e-12, atol=1e-13)


def test_equals_finite_differences(name):
    "An oracle that differentiates once only: central differences of the gradient, error O(ε²)"
    model, loss, x, y = make(name)
    H = HessianLinearOperator(model, loss, None, [(x, y)])
    v = column_noise(H.shape[0], [0], seed=3)[:, 0]

    def g(t):
        return HessianLinearOperator(
            nn.utils.vector_to_parameters(t, list(model.parameters())) or model,
            loss,
            None,
            [(x, y)],
            check_deterministic=False,
        ).gradient

    theta = H.theta.clone()
    fd = (g(theta + 1e-5 * v) - g(theta - 1e-5 * v)) / 2e-5
    assert (H @ v - fd).norm() <= 2e-6 * fd.norm() + 1e-8


def test_symmetric_and_linear(name, kind, device):
    model, loss, x, y = make(name, device)
    H = OPERATORS[kind](model, loss, None, [(x, y)])
    V = column_noise(H.shape[0], range(4), seed=0, kind='gauss', device=device)
    HV = H @ V
    scale = HV.norm(dim=0).max() * V.norm(dim=0).max()
    torch.testing.assert_close((V.T @ HV) / scale, (HV.T @ V) / scale, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        H @ (V[:, 0] - 3 * V[:, 1]), HV[:, 0] - 3 * HV[:, 1], rtol=1e-9, atol=1e-11 * scale.item()
    )


@pytest.mark.parametrize(('chunk', 'split'), [(1, [4, 7]), (64, [11]), (3, [10, 1]), (None, [1, 3, 7])])
def test_same_for_any_chunk_and_split(name, kind, device, chunk, split):
    model, loss, x, y = make(name, device)
    whole = OPERATORS[kind](model, loss, None, [(x, y)])
    data = list(zip(x.split(split), y.split(split)))
    if not isinstance(loss, nn.Module) or all(
        torch.isfinite(loss(model(a), b)) for a, b in data
    ):  # a batch with nothing but ignored targets has no mean
        V = column_noise(whole.shape[0], range(7), seed=1, device=device)
        ref = whole @ V
        for d in (data, data[::-1]):
            H = OPERATORS[kind](model, loss, None, d, chunk_size=chunk, check_deterministic=False)
            torch.testing.assert_close(H @ V, ref, rtol=1e-9, atol=1e-10 * ref.abs().max().item())
            assert abs(H.loss - whole.loss) < 1e-10 * max(1, abs(whole.loss))
            torch.testing.assert_close(
                torch.stack([H @ v for v in V.T], 1), ref, rtol=1e-9, atol=1e-10 * ref.abs().max().item()
            )


def test_float32(name, kind, device):
    V = column_noise(HessianLinearOperator(*make(name)[:2], None, [make(name)[2:]]).shape[0], range(3), seed=1)
    out = []
    for dtype in (torch.float64, torch.float32):
        model, loss, x, y = make(name, device, dtype)
        out.append((OPERATORS[kind](model, loss, None, [(x, y)]) @ V.to(device, dtype)).double())
    assert (out[0] - out[1]).norm() <= 1e-5 * out[0].norm()


def test_subset_is_a_block(name):
    model, loss, x, y = make(name)
    D, _ = dense(model, loss, x, y)
    named = list(model.named_parameters())
    start = sum(p.numel() for _, p in named[:-1])
    for params in ([named[-1][1]], {named[-1][0]: named[-1][1]}):
        H = HessianLinearOperator(model, loss, params, [(x, y)])
        torch.testing.assert_close(H @ eye(H), D[start:, start:], rtol=1e-9, atol=1e-10 * D.abs().max().item())
    for _, p in named[:-1]:
        p.requires_grad_(False)
    H = HessianLinearOperator(model, loss, None, [(x, y)])
    torch.testing.assert_close(H @ eye(H), D[start:, start:], rtol=1e-9, atol=1e-10 * D.abs().max().item())


def test_blocks_by_name_and_differences():
    model, loss, x, y = make('mlp, cross-entropy')
    H, G = (Op(model, loss, None, [(x, y)]) for Op in (HessianLinearOperator, GGNLinearOperator))
    only = HessianLinearOperator(model, loss, {'2.bias': model[2].bias, '0.weight': model[0].weight}, [(x, y)])
    B = H.restrict(['2.bias', '0.weight'])
    torch.testing.assert_close(B @ eye(B), only @ eye(only), rtol=1e-10, atol=1e-13)
    torch.testing.assert_close((H - G) @ eye(H), H @ eye(H) - G @ eye(H))
    with pytest.raises(ValueError, match="called '1.weight'; there are 0.weight"):
        H.restrict('1.weight')


def test_order_of_params_is_the_order_of_rows():
    model, loss, x, y = make('mlp, cross-entropy')
    ps = list(model.parameters())
    perm = torch.cat([
        torch.arange(sum(p.numel() for p in ps[:i]), sum(p.numel() for p in ps[: i + 1])) for i in (2, 0, 3, 1)
    ])
    A, B = (
        HessianLinearOperator(model, loss, ps, [(x, y)]),
        HessianLinearOperator(model, loss, [ps[i] for i in (2, 0, 3, 1)], [(x, y)]),
    )
    torch.testing.assert_close(B @ eye(B), (A @ eye(A))[perm][:, perm])
    assert torch.equal(A.theta, nn.utils.parameters_to_vector(ps))


def test_keeps_its_parameters_and_leaves_the_model_alone():
    model, loss, x, y = make('batch norm in eval mode')
    state, rng = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    H = HessianLinearOperator(model, loss, None, [(x, y)])
    V = eye(H)
    before = H @ V
    assert all(torch.equal(a, b) for a, b in zip(state.values(), model.state_dict().values())) and all(
        p.grad is None for p in model.parameters()
    )
    assert torch.equal(rng, torch.get_rng_state())
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
    torch.testing.assert_close(H @ V, before)
    for data in ([(x, y)], [(x[:5], y[:5]), (x[5:], y[5:])]):
        again = HessianLinearOperator(*make('batch norm in eval mode')[:2], None, data)
        torch.testing.assert_close(again @ V, before)
    with torch.no_grad():
        torch.testing.assert_close(H @ V, before)


TAKEN = nn.CrossEntropyLoss, nn.MSELoss, nn.BCEWithLogitsLoss  # by curvlinops 3.0.1
NOT_TAKEN = {  # by curvlinops: class weights, tied weights, and what it cannot differentiate
    'own autograd.Function',
    'lstm',
    'transformer layer',
    'tied weights',
    'mlp, class weights',
    'mlp, ignore_index',
    'mlp, label smoothing',
}
WRONG = {  # in curvlinops 3.0.1, by finite differences of the gradient, on layer norm; ours are not
    ('layer norm, dropout in eval mode', 'hessian'),
    ('attention', 'hessian'),
}
COMPARED = [
    (name, kind)
    for name, (_, loss, *_) in CASES.items()
    for kind in OPERATORS
    if isinstance(loss, TAKEN) and name not in NOT_TAKEN and (name, kind) not in WRONG
]


@pytest.mark.parametrize('name, kind', COMPARED)
def test_agrees_with_curvlinops(name, kind):
    import curvlinops

    model, loss, x, y = make(name)
    data = [(x[:4], y[:4]), (x[4:], y[4:])]
    Op = OPERATORS[kind]
    H = Op(model, loss, None, data)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        C = getattr(curvlinops, Op.__name__)(model, loss, list(model.parameters()), data)
        V = column_noise(H.shape[0], range(5), seed=3)
        entries = y.numel() / len(y) if kind == 'ef' else 1  # of which curvlinops takes each for a sample
        torch.testing.assert_close(entries * (H @ V), C @ V, rtol=1e-9, atol=1e-11 * (H @ V).abs().max().item())


# --------------------------------------------------------------------------------- forms of batches


class Words(nn.Module):
    "Two inputs by name, and the loss inside if there are labels, as in Hugging Face models"

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 3)

    def forward(self, ids, mask, labels=None):
        out = self.head((torch.tanh(self.embed(ids)) * mask[..., None]).sum(1))
        return out if labels is None else {'loss': F.cross_entropy(out, labels, ignore_index=-100), 'logits': out}


def words(N=9):
    g = torch.Generator().manual_seed(0)
    model = Words().double()
    for p in model.parameters():
        p.data = torch.randn(p.shape, generator=g, dtype=f64)
    return (
        model,
        torch.randint(0, 7, (N, 5), generator=g),
        (torch.rand(N, 5, generator=g) > 0.3).to(f64),
        torch.randint(0, 3, (N,), generator=g),
    )


FORMS = {  # of the same data
    'dict of arguments, y': (lambda i, m, y: (dict(ids=i, mask=m), y), nn.CrossEntropyLoss()),
    'tuple of arguments, y': (lambda i, m, y: ((i, m), y), nn.CrossEntropyLoss()),
    'dict': (lambda i, m, y: dict(ids=i, mask=m, labels=y), lambda model, batch: model(**batch)['loss']),
    'triple': (lambda i, m, y: (i, m, y), lambda model, batch: F.cross_entropy(model(*batch[:2]), batch[2])),
}


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('split', [[9], [2, 7]])
def test_forms_of_batches(form, split, device):
    model, *data = words()
    model = model.to(device)
    data = [t.to(device) for t in data]
    pack, loss = FORMS[form]
    H = HessianLinearOperator(model, loss, None, [pack(*parts) for parts in zip(*(t.split(split) for t in data))])
    named = dict(model.named_parameters())
    f = lambda *ps: F.cross_entropy(functional_call(model, dict(zip(named, ps)), (data[0], data[1])), data[2])
    blocks = torch.autograd.functional.hessian(f, tuple(p.detach() for p in named.values()))
    D = torch.cat([torch.cat([b.reshape(p.numel(), -1) for b in row], 1) for row, p in zip(blocks, named.values())])
    torch.testing.assert_close(H @ eye(H), D, rtol=1e-10, atol=1e-12)
    if 'y' in form.split():  # a pair has outputs
        G = GGNLinearOperator(model, loss, None, [pack(*parts) for parts in zip(*(t.split(split) for t in data))])
        assert torch.linalg.eigvalsh(G @ eye(G))[0] > -1e-12


def test_a_model_that_takes_the_dict_itself():
    class Takes(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 3)

        def forward(self, batch):
            return self.a(batch['x'])

    model, loss, x, y = make('mlp, cross-entropy')
    takes = Takes().double()
    A, B = (
        HessianLinearOperator(takes, loss, None, [(dict(x=x), y)]),
        HessianLinearOperator(takes.a, loss, None, [(x, y)]),
    )
    torch.testing.assert_close(A @ eye(A), B @ eye(B))


def test_batch_size_fn_weighs_batches_that_only_their_loss_understands():
    model, i, m, y = words()
    y[[1, 4, 5]] = -100
    loss, count = FORMS['dict'][1], lambda b: (b['labels'] != -100).sum().item()
    split = [dict(ids=i[s], mask=m[s], labels=y[s]) for s in (slice(0, 6), slice(6, 9))]
    whole = HessianLinearOperator(model, loss, None, [dict(ids=i, mask=m, labels=y)])
    H = HessianLinearOperator(model, loss, None, split, batch_size_fn=count)
    torch.testing.assert_close(H @ eye(H), whole @ eye(H), rtol=1e-10, atol=1e-12)
    with pytest.raises(ValueError, match='neither the mean .* nor their sum.*batch_size_fn'):
        HessianLinearOperator(model, loss, None, split)
    pairs = HessianLinearOperator(
        model, nn.CrossEntropyLoss(), None, [(dict(ids=b['ids'], mask=b['mask']), b['labels']) for b in split]
    )
    torch.testing.assert_close(pairs @ eye(H), whole @ eye(H), rtol=1e-10, atol=1e-12)


def test_hugging_face_bert_from_its_config():
    import transformers

    config = transformers.BertConfig(
        vocab_size=30,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=12,
        num_labels=3,
    )
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config).double().eval()
    g = torch.Generator().manual_seed(0)
    ids, labels = torch.randint(1, 30, (6, 7), generator=g), torch.randint(0, 3, (6,), generator=g)
    batch = lambda s: transformers.BatchEncoding(
        dict(input_ids=ids[s], attention_mask=torch.ones_like(ids[s]), labels=labels[s])
    )
    loss = lambda model, batch: model(**batch).loss
    H = HessianLinearOperator(model, loss, None, [batch(slice(0, 6))])
    two = HessianLinearOperator(model, loss, None, [batch(slice(0, 2)), batch(slice(2, 6))])
    v = column_noise(H.shape[0], range(3), seed=0)
    torch.testing.assert_close(two @ v, H @ v, rtol=1e-8, atol=1e-12)
    ps = list(model.parameters())

    def grad(t):
        nn.utils.vector_to_parameters(t, ps)
        return torch.cat([p.reshape(-1) for p in torch.autograd.grad(model(**batch(slice(0, 6))).loss, ps)])

    fd = (grad(H.theta + 1e-5 * v[:, 0]) - grad(H.theta - 1e-5 * v[:, 0])) / 2e-5
    assert (H @ v[:, 0] - fd).norm() < 1e-6 * fd.norm()


def test_the_paper_network_has_7030_parameters():
    x, y = torch.rand(30, 256, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 10
    H = HessianLinearOperator(mnist_mlp(seed=0), nn.CrossEntropyLoss(), None, [(x, y)])
    assert H.shape == (7030, 7030)


class Augmented(Dataset):
    "A loader that never gives the same thing twice"

    def __init__(self):
        self.calls = 0

    def __len__(self):
        return 8

    def __getitem__(self, i):
        self.calls += 1
        return torch.full((6,), self.calls / 10.0, dtype=f64), 0


class Noisy(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 3)

    def forward(self, x):
        return self.a(x) + torch.rand(3)


def _faults():
    model, loss, x, y = make('mlp, cross-entropy')
    op = lambda model=model, loss=loss, params=None, data=[(x, y)], **kw: HessianLinearOperator(
        model, loss, params, data, **kw
    )
    shuffle = DataLoader(TensorDataset(x, y), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(0))
    frozen = copy.deepcopy(model).requires_grad_(False)
    drop = nn.Sequential(nn.Linear(6, 5), nn.Dropout(0.1), nn.Linear(5, 3)).double()
    bn = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)).double()
    lstm = Recurrent()
    lstm.rnn = nn.LSTM(2, 3, num_layers=2, dropout=0.2, batch_first=True)
    return {
        'shuffling loader': (lambda: op(data=shuffle), ValueError, 'shuffles'),
        'augmenting loader': (
            lambda: op(data=DataLoader(Augmented(), batch_size=4)),
            ValueError,
            'shuffles or augments',
        ),
        'random model': (lambda: op(model=Noisy().double()), ValueError, 'draws random numbers'),
        'dropout': (lambda: op(model=drop.train()), ValueError, 'Dropout.*training mode'),
        'batch norm': (lambda: op(model=bn.train()), ValueError, 'BatchNorm1d.*training mode'),
        'lstm dropout': (lambda: op(model=lstm.train()), ValueError, 'LSTM.*training mode'),
        'empty': (lambda: op(data=[]), ValueError, 'empty'),
        'used-up generator': (lambda: op(data=(b for b in [(x, y)])), ValueError, '1 batches, then 0|empty'),
        'ggn of a loss inside the model': (
            lambda: GGNLinearOperator(model, lambda m, b: loss(m(b['x']), b['y']), None, [dict(x=x, y=y)]),
            TypeError,
            'where the model ends',
        ),
        'ggn of a dict output': (
            lambda: GGNLinearOperator(
                Words().double(),
                lambda out, y: out['loss'],
                None,
                [
                    (
                        dict(
                            ids=torch.zeros(2, 3, dtype=torch.long),
                            mask=torch.ones(2, 3, dtype=f64),
                            labels=torch.zeros(2, dtype=torch.long),
                        ),
                        y,
                    )
                ],
            ),
            TypeError,
            'wrap the model',
        ),
        'loss is a number': (lambda: op(loss=lambda out, y: 3.0), TypeError, 'scalar tensor'),
        'not pairs': (lambda: op(data=[x]), TypeError, r'batches \(x, y\)'),
        'nan data': (lambda: op(data=[(x, y), (x * float('nan'), y)]), FloatingPointError, 'batch 1'),
        'wrong dtype': (lambda: op(data=[(x.float(), y)]), TypeError, 'cast'),
        'no reduction': (lambda: op(loss=nn.CrossEntropyLoss(reduction='none')), ValueError, 'scalar'),
        'frozen': (lambda: op(model=frozen), ValueError, 'frozen'),
        'no params': (lambda: op(params=[]), ValueError, 'empty'),
        'foreign params': (lambda: op(params=[torch.ones(3)]), ValueError, 'no parameter'),
        'twice': (lambda: op(params=[model[0].weight] * 2), ValueError, 'twice'),
        'chunk': (lambda: op(chunk_size=0), ValueError, 'at least 1'),
        'no module': (lambda: op(model=lambda x: x), TypeError, 'a plain function'),
        'neither': (lambda: op(model=3), TypeError, 'Module'),
        'detaching': (lambda: op(model=Detaching().double()), NotImplementedError, "detaches.*|'a.weight'"),
    }


@pytest.mark.parametrize('fault', _faults())
def test_refuses_by_name(fault):
    call, error, says = _faults()[fault]
    with pytest.raises(error, match=says):
        call()


def test_fixed_order_loader_is_accepted():
    model, loss, x, y = make('mlp, cross-entropy')
    A = HessianLinearOperator(model, loss, None, DataLoader(TensorDataset(x, y), batch_size=4))
    B = HessianLinearOperator(model, loss, None, [(x, y)])
    torch.testing.assert_close(A @ eye(A), B @ eye(B), rtol=1e-10, atol=1e-12)


# ---------------------------------------------------------------------------- memory and strategies


def wide(n_in=500, N=40):
    "More than 65,536 parameters, so that strategies are measured"
    g = torch.Generator().manual_seed(0)
    net = mlp(n_in, 150, 4).double()
    for p in net.parameters():
        p.data = torch.randn(p.shape, generator=g, dtype=f64) / 20
    return (
        net,
        nn.CrossEntropyLoss(),
        torch.randn(N, n_in, generator=g, dtype=f64),
        torch.randint(0, 4, (N,), generator=g),
    )


def test_the_strategy_is_measured_once_and_said(kind, device):
    model, loss, x, y = (o.to(device) for o in wide())
    H, fixed = (OPERATORS[kind](model, loss, None, [(x, y)], strategy=s) for s in (None, 'single'))
    V = column_noise(H.shape[0], range(6), seed=0, device=device)
    assert H.info['strategy'] is None and 'not measured' in repr(H)
    H @ V[:, 0]
    assert H.info['strategy'] is None  # one vector does not pay for a measurement
    W = H @ V
    info = H.info
    assert (
        info['strategy'] in H.strategies
        and all(isinstance(t, float) and t > 0 for t in info['seconds_per_vector'].values())
        and len(info['seconds_per_vector']) == 4
    )
    assert (
        info['strategy'] in repr(H)
        and 'gradients a vector' in repr(H)
        and info['groups_kept'] == 1
        and info['bytes_kept'] > 0
    )
    torch.testing.assert_close(W, fixed @ V, rtol=1e-9, atol=1e-12)
    before = dict(info['seconds_per_vector'])
    H @ V
    assert H.info['seconds_per_vector'] == before


def test_small_models_always_use_the_same_strategy():
    "Numbers of a resumed run are those of one that was not interrupted"
    model, loss, x, y = make('mlp, cross-entropy')
    H, fixed = (HessianLinearOperator(model, loss, None, [(x, y)], strategy=s) for s in (None, 'linear-batched'))
    few = H @ eye(H)[:, :15]  # do not pay for a recording
    assert H.info['strategy'] == 'batched'
    W = H @ eye(H)
    assert (
        H.info['strategy'] == 'linear-batched'
        and H.info['seconds_per_vector'] == {}
        and torch.equal(W, fixed @ eye(H))
        and torch.equal(W, H @ eye(H))
    )
    torch.testing.assert_close(few, W[:, :15], rtol=1e-10, atol=1e-14)
    with pytest.raises(ValueError, match='one of batched, single, linear'):
        HessianLinearOperator(model, loss, None, [(x, y)], strategy='fast')


def test_small_convolutions_go_one_by_one_on_a_cpu():
    model, loss, x, y = make('conv, pool')
    H, ref = (HessianLinearOperator(model, loss, None, [(x, y)], strategy=s) for s in (None, 'batched'))
    assert H.info['strategy'] == 'single'
    torch.testing.assert_close(H @ eye(H), ref @ eye(H), rtol=1e-9, atol=1e-12)
    assert H.info['strategy'] == 'linear'


def test_small_models_that_cannot_be_recorded_use_double_backward():
    model, loss, x, y = make('own autograd.Function')
    data = [(x[:5], y[:5]), (x[5:], y[5:])]
    H, ref = (HessianLinearOperator(model, loss, None, data, strategy=s) for s in (None, 'single'))
    torch.testing.assert_close(H @ eye(H), ref @ eye(H))
    assert H.info['strategy'] == 'batched' and 'batched' in repr(H)
    assert 'not possible' in H.info['seconds_per_vector']['linear-batched']


def test_a_batch_that_fails_after_the_measurement_falls_back(monkeypatch):
    "Only the first batch is measured"
    model, loss, x, y = wide()
    data = [(x[:30], y[:30]), (x[30:], y[30:])]
    ref = HessianLinearOperator(model, loss, None, data, strategy='single')
    monkeypatch.setattr(HessianLinearOperator, '_measure', lambda self, V: 'linear')
    monkeypatch.setattr(HessianLinearOperator, '_cut', lambda self, seen: None)  # small memory would cut the batches
    H = HessianLinearOperator(model, loss, None, data, memory=2**19)
    assert H.info['groups'] == 2
    real = HessianLinearOperator._linearised

    def fails(self, what, f, batch, *args):
        if len(batch[1]) == 10:
            raise RuntimeError('another branch')
        return real(self, what, f, batch, *args)

    monkeypatch.setattr(HessianLinearOperator, '_linearised', fails)
    monkeypatch.setattr('hessian_overlap.curvature._UNKEPT', {})
    V = column_noise(H.shape[0], range(5), seed=0)
    torch.testing.assert_close(H @ V, ref @ V)
    assert H.info['strategy'] == 'single' and 'another branch' in H.info['seconds_per_vector']['linear']


# ------------------------------------------------------------------ recordings of earlier operators


class Scaled(nn.Module):
    "A number and a buffer that the name of the model does not tell"

    def __init__(self, scale=1.0):
        super().__init__()
        self.a = nn.Linear(6, 3)
        self.scale = scale
        self.register_buffer('shift', torch.zeros(3, dtype=f64))

    def forward(self, x):
        return torch.tanh(self.a(x)) * self.scale + self.shift


def test_recordings_are_used_again_where_they_fit(kind, monkeypatch):
    import hessian_overlap.curvature as c

    monkeypatch.setattr(c, '_RECORDED', {})
    made, real = [], c.record
    monkeypatch.setattr(c, 'record', lambda *a: made.append(1) or real(*a))
    _, loss, x, y = make('mlp, cross-entropy')
    model = Scaled().double()

    def check(expected):
        H, ref = (OPERATORS[kind](model, loss, None, [(x, y)], strategy=s) for s in ('linear-batched', 'single'))
        torch.testing.assert_close(H @ eye(H), ref @ eye(H), rtol=1e-10, atol=1e-13)
        assert len(made) == expected

    check(1)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.5)
        model.shift.add_(torch.tensor([1.0, 2.0, 3.0], dtype=f64))
    check(1)  # parameters and buffers are inputs of the recording
    model.scale = 3.0
    check(2)  # a number is not: the old recording has another gradient
    model.a.bias.requires_grad_(False)
    check(3)
    check(3)
    loss.weight = torch.tensor([1.0, 5.0, 0.2], dtype=f64)
    check(4 if kind == 'hessian' else 3)  # the others record the model alone
    for i in range(12):
        HessianLinearOperator(model, loss, None, [(x[: i + 2], y[: i + 2])], strategy='linear') @ eye(
            HessianLinearOperator(model, loss, None, [(x, y)])
        )
    assert len(c._RECORDED) == 8


@pytest.mark.parametrize('strategy', HessianLinearOperator.strategies)
def test_an_operator_leaves_nothing_behind(kind, strategy):
    "Tensors and graphs go with the operator, without a run of the garbage collector"
    import gc

    model, loss, x, y = make('mlp, cross-entropy')

    def use():
        H = OPERATORS[kind](model, loss, None, [(x, y)], strategy=strategy)
        H @ eye(H)

    count = lambda: sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
    use()
    gc.collect()
    gc.disable()
    try:
        before = count()
        for _ in range(3):
            use()
        assert count() <= before
    finally:
        gc.enable()


def test_columns_do_not_take_memory():
    "Besides themselves: the columns that are multiplied at once do not grow with their number"
    model, loss, x, y = wide(60, 20)
    H = HessianLinearOperator(model, loss, None, [(x, y)], strategy='linear-batched')
    seen, real = [], H._product

    def watched(*args):
        f, nbytes = real(*args)
        return (lambda R: seen.append(len(R)) or f(R)), nbytes

    H._product = watched
    for m in (16, 100):
        H @ column_noise(H.shape[0], range(m), seed=0)
    assert max(seen) <= 16 and H.chunk_size <= 16
    assert HessianLinearOperator(model, loss, None, [(x, y)]).memory in [2.0**k for k in range(33)]


def test_a_candidate_that_is_wrong_or_fails_is_not_chosen(monkeypatch):
    model, loss, x, y = wide()
    real = HessianLinearOperator._product

    def broken(self, batch, norm, strategy):
        if strategy == 'batched':
            raise RuntimeError('no such kernel')
        f, b = real(self, batch, norm, strategy)
        return ((lambda V: 0.44 * f(V)[:, :]) if strategy.startswith('linear') else f), b

    ref = HessianLinearOperator(model, loss, None, [(x, y)], strategy='single')
    monkeypatch.setattr(HessianLinearOperator, '_product', broken)
    H = HessianLinearOperator(model, loss, None, [(x, y)])
    V = column_noise(H.shape[0], range(5), seed=0)
    torch.testing.assert_close(H @ V, ref @ V)
    rates = H.info['seconds_per_vector']
    assert (
        H.info['strategy'] == 'single'
        and rates['linear'] == rates['linear-batched'] == 'wrong'
        and 'no such kernel' in rates['batched']
    )


@pytest.mark.parametrize('strategy', ['single', 'linear', 'batched'])
def test_memory_bounds_what_is_kept(kind, strategy):
    model, loss, x, y = wide()
    data = list(zip(x.split(10), y.split(10)))
    V = column_noise(HessianLinearOperator(model, loss, None, data).shape[0], range(9), seed=0)
    all_kept = OPERATORS[kind](model, loss, None, data, strategy=strategy)
    ref = all_kept @ V
    assert (all_kept.info['batches'], all_kept.info['groups_kept']) == (4, 1)
    one = OPERATORS[kind](model, loss, None, data[:1], strategy=strategy)
    one @ V
    one = one.info['bytes_kept']
    some = OPERATORS[kind](model, loss, None, data, strategy=strategy, memory=5 * one)
    for _ in range(2):
        torch.testing.assert_close(some @ V, ref, rtol=1e-9, atol=1e-12)
    assert (
        some.info['groups_kept'] == 2
        and some.info['bytes_kept'] <= some.memory / 2
        and some.chunk_size < all_kept.chunk_size
    )
    assert OPERATORS[kind](model, loss, None, data, memory=1).chunk_size == 1


def test_kept_batches_are_not_read_again():
    model, loss, x, y = make('mlp, cross-entropy')

    class Counted(list):
        reads = 0

        def __iter__(self):
            Counted.reads += 1
            return super().__iter__()

    H = HessianLinearOperator(model, loss, None, Counted(zip(x.split(4), y.split(4))))
    first = H @ eye(H)
    reads = Counted.reads
    assert torch.equal(H @ eye(H), first) and Counted.reads == reads


def test_a_second_operator_and_a_model_with_grad():
    model, loss, x, y = make('mlp, cross-entropy')
    A = HessianLinearOperator(model, loss, None, [(x, y)])
    ref = A @ eye(A)
    loss(model(x), y).backward()
    grads = [p.grad.clone() for p in model.parameters()]
    B = HessianLinearOperator(model, loss, None, [(x, y)])
    assert torch.equal(B @ eye(B), ref) and torch.equal(A @ eye(A), ref)
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads))


def test_a_padding_row_counts_as_constant():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(7, 3, padding_idx=0), nn.Flatten(), nn.Linear(12, 3)).double()
    x, y = torch.randint(0, 7, (9, 4)), torch.randint(0, 3, (9,))
    H = [
        HessianLinearOperator(model, nn.CrossEntropyLoss(), None, [(x, y)], strategy=s)
        for s in HessianLinearOperator.strategies
    ]
    W = [A @ eye(A) for A in H]
    for w in W:
        torch.testing.assert_close(w, W[0], rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(w, w.T)
    assert (W[0][:3] == 0).all()


def test_a_model_that_branches_on_its_data():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 3)

        def forward(self, x):
            return torch.tanh(self.a(x)) if x.sum() > 0 else self.a(x) ** 2

    _, loss, x, y = make('mlp, cross-entropy')
    model = Branch().double()
    data = [(x.abs()[:5], y[:5]), (-x.abs()[5:10], y[5:10])]  # the same shape, different branches
    a, b = (HessianLinearOperator(model, loss, None, [d]) for d in data)
    H = HessianLinearOperator(model, loss, None, data)
    assert H.info['groups'] == 2  # the joint loss would be another one
    torch.testing.assert_close(H @ eye(H), ((a + b) * 0.5) @ eye(H))
    for s in ('linear', 'linear-batched'):  # a recording would follow one branch only
        with pytest.raises(NotImplementedError, match='data-dependent'):
            HessianLinearOperator(model, loss, None, data, strategy=s) @ eye(H)


def test_a_loss_that_couples_samples_is_not_joined():
    model, _, x, y = make('relu, mse')
    loss = lambda out, y: (out - out.mean(0)).pow(2).mean()
    data = [(x[:5], y[:5]), (x[5:], y[5:])]
    a, b = (HessianLinearOperator(model, loss, None, [d]) for d in data)
    with pytest.raises(ValueError, match='neither the mean .* nor their sum'):
        HessianLinearOperator(model, loss, None, data)
    for says in (dict(reduction='mean'), dict(batch_size_fn=len)):
        H = HessianLinearOperator(model, loss, None, data, **says)
        torch.testing.assert_close(H @ eye(H), (a * (5 / 11) + b * (6 / 11)) @ eye(H))


class Detaching(nn.Module):
    "Its gradient is recorded right, its second derivative is not: only a comparison of products can tell"

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(6, 3)

    def forward(self, x):
        o = self.a(x)
        return o * torch.tanh(o.detach())


@pytest.mark.parametrize('Op', [HessianLinearOperator, GGNLinearOperator])
def test_a_linear_strategy_that_is_wrong_is_refused(Op):
    _, loss, x, y = make('mlp, cross-entropy')
    model, V = Detaching().double(), torch.eye(21, dtype=f64)
    ref = Op(model, loss, None, [(x, y)], strategy='single', check_deterministic=False) @ V
    torch.testing.assert_close(Op(model, loss, None, [(x, y)], strategy='batched', check_deterministic=False) @ V, ref)
    for strategy in ('linear', 'linear-batched'):
        for data in ([(x, y)], [(x[:5], y[:5]), (x[5:], y[5:])]):
            with pytest.raises(NotImplementedError, match='detaches'):
                Op(model, loss, None, data, strategy=strategy, check_deterministic=False) @ V


def test_more_parameters_than_float32_can_count():
    net = nn.Linear(4096, 4097, bias=False)
    x = torch.zeros(2, 4096)
    x[0, 5] = x[1, -1] = 1
    H = HessianLinearOperator(net, nn.MSELoss(reduction='sum'), None, [(x, torch.zeros(2, 4097))], strategy='single')
    v = torch.zeros(H.shape[0])
    v[5] = v[-1] = 1  # the last index is one that float32 rounds up
    w = H @ v
    assert H.shape[0] - 1 > 2**24 and w[5] == 2 and w[-1] == 2 and w.abs().sum() == 4
