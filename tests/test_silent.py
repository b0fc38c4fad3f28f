"Models, losses and data where a rule that is only usually true gave a wrong number: each is right now, or refused"

import pickle
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from hessian_overlap.curvature import HessianLinearOperator
from hessian_overlap.ggn import EFLinearOperator, GGNLinearOperator
from hessian_overlap.noise import column_noise

f64 = torch.float64
KINDS = [HessianLinearOperator, GGNLinearOperator]


def normal(*shape, seed=0, dtype=f64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=f64).to(dtype)


def network(*layers, dtype=f64, seed=3):
    net = nn.Sequential(*layers).to(dtype).eval()
    for i, p in enumerate(net.parameters()):
        p.data = 0.7 * normal(*p.shape, seed=seed + i, dtype=dtype)
    return net


def mlp(dtype=f64):
    return network(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3), dtype=dtype)


def batches(sizes=(3, 17), dtype=f64):
    x, y = normal(sum(sizes), 6, dtype=dtype), torch.arange(sum(sizes)) % 3
    return list(zip(x.split(list(sizes)), y.split(list(sizes))))


def by_differences(model, loss, V, step=1e-5):
    "Products with the Hessian of `loss()` by central differences of its gradient, in float64"
    params = [p for p in model.parameters() if p.requires_grad]
    start = torch.nn.utils.parameters_to_vector(params).detach().clone()

    def gradient(theta):
        torch.nn.utils.vector_to_parameters(theta, params)
        grads = torch.autograd.grad(loss(), params, materialize_grads=True, allow_unused=True)
        return torch.cat([(g.to_dense() if g.is_sparse else g).reshape(-1) for g in grads])

    columns = [(gradient(start + step * v) - gradient(start - step * v)) / (2 * step) for v in V.T]
    torch.nn.utils.vector_to_parameters(start, params)
    return torch.stack(columns, 1)


def agrees(H, model, loss, tol=1e-6):
    "Whether three products are those of finite differences"
    V = column_noise(H.shape[0], range(3), seed=0).to(f64)
    ref = by_differences(model, loss, V)
    error = (H @ V.to(H.dtype) - ref).norm() / ref.norm()
    assert error < tol, f'off by {error:.1%}'


def whole(data):
    xs, ys = zip(*data)
    return torch.cat(xs), torch.cat(ys)


# -------------------- 1, 2, 3: what of the loss is a batch's share

TARGETS = {
    'dict': (lambda y: dict(label=y, other=-y), lambda out, y: F.cross_entropy(out, y['label'])),
    'tuple': (lambda y: (y, -y, 2 * y), lambda out, y: F.cross_entropy(out, y[0])),
    'list': (lambda y: [y, y], lambda out, y: F.cross_entropy(out, y[1])),
}


@pytest.mark.parametrize('form', TARGETS)
def test_uneven_batches_with_nested_targets(form):
    "Row 1: the number of keys was taken for the number of samples"
    wrap, loss = TARGETS[form]
    model, data = mlp(), batches()
    x, y = whole(data)
    H = HessianLinearOperator(model, loss, None, [(x, wrap(y)) for x, y in data])
    agrees(H, model, lambda: F.cross_entropy(model(x), y))


class Focal(nn.Module):
    "Stores its reduction and never reads it again"

    def __init__(self):
        super().__init__()
        self.reduction = 'mean'

    def forward(self, out, y):
        logp = F.log_softmax(out, 1).gather(1, y[:, None])[:, 0]
        return -((1 - logp.exp()) ** 2 * logp).mean()


class FocalSum(Focal):
    def forward(self, out, y):
        return super().forward(out, y) * len(y)


LOSSES = {
    'focal, says mean': Focal(),
    'focal, says mean, is a sum': FocalSum(),
    'a sum that says nothing': lambda out, y: F.cross_entropy(out, y, reduction='sum'),
    'mean with a constant': lambda out, y: F.cross_entropy(out, y) + 3.0,
    'mean over entries': lambda out, y: F.mse_loss(out, F.one_hot(y, 3).to(out.dtype)),
    'half of a sum': lambda out, y: 0.5 * (out - y[:, None]).square().sum(),
}


@pytest.mark.parametrize('name', LOSSES)
@pytest.mark.parametrize('sizes', [(3, 17), (1, 1, 18), (1, 19)])
def test_weights_follow_from_the_loss_not_from_what_it_says(name, sizes):
    "Row 2"
    model, data, loss = mlp(), batches(sizes), LOSSES[name]
    x, y = whole(data)
    agrees(HessianLinearOperator(model, loss, None, data), model, lambda: loss(model(x), y))


@pytest.mark.parametrize('sizes', [(3, 17), (20,)])
def test_a_regulariser_within_the_loss(sizes):
    "Row 2: the parameters are those of the model, so it has a second derivative"
    model, data = mlp(), batches(sizes)
    penalty = lambda: 0.1 * sum(p.pow(4).sum() for p in model.parameters())
    x, y = whole(data)
    loss = lambda out, y: F.cross_entropy(out, y) + penalty()
    agrees(HessianLinearOperator(model, loss, None, data), model, lambda: loss(model(x), y))


def test_what_is_neither_a_mean_nor_a_sum_is_refused():
    model, data = mlp(), batches()
    weights = torch.tensor([1.0, 5.0, 0.2], dtype=f64)
    losses = [
        lambda out, y: F.cross_entropy(out, y, weight=weights),  # divides by weights, and does not say so
        lambda out, y: F.cross_entropy(out, y, reduction='sum') + sum(p.pow(2).sum() for p in model.parameters()),
        lambda out, y: (out - out.mean(0)).pow(2).mean(),
        lambda out, y: F.cross_entropy(out, y).sqrt(),
    ]
    for loss in losses:
        with pytest.raises(ValueError, match='neither the mean .* nor their sum.*reduction=.*batch_size_fn'):
            HessianLinearOperator(model, loss, None, data)
        HessianLinearOperator(model, loss, None, data[:1])  # nothing has to be known of one batch
    x, y = whole(data)
    weigh = nn.CrossEntropyLoss(weight=weights)
    agrees(HessianLinearOperator(model, weigh, None, data), model, lambda: weigh(model(x), y))


def test_sentences_of_different_lengths_are_asked_about():
    model = network(nn.Linear(6, 3))
    loss = lambda out, y: F.cross_entropy(out.flatten(0, 1), y.flatten())
    data = [(normal(4, t, 6), torch.arange(4 * t).reshape(4, t) % 3) for t in (5, 8)]
    with pytest.raises(ValueError, match='different lengths: give batch_size_fn'):
        HessianLinearOperator(model, loss, None, data)
    H = HessianLinearOperator(model, loss, None, data, batch_size_fn=lambda x: x.shape[0] * x.shape[1])
    x, y = (torch.cat([part.flatten(0, 1) for part in parts]) for parts in zip(*data))
    agrees(H, model, lambda: F.cross_entropy(model(x), y))


class GraphNet(nn.Module):
    "Two rounds of messages along edges, and a head that begins at zero"

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 2)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, nodes, edges):
        for layer in (self.a, self.b):
            h = layer(nodes)
            nodes = torch.tanh(h + h.new_zeros(h.shape).index_add(0, edges[1], h[edges[0]]))
        return self.head(nodes)


@pytest.mark.parametrize('edges', [6, 4])
def test_graphs_are_not_joined_along_their_edges(edges):
    "Row 3: with a head of zeros all losses are equal, whatever is joined"
    torch.manual_seed(0)
    model, data = GraphNet().double(), []
    for i in range(4):
        pairs = torch.randint(0, edges, (2, edges), generator=torch.Generator().manual_seed(i))
        data.append(((normal(edges, 4, seed=i), pairs), torch.arange(edges) % 2))
    H = HessianLinearOperator(model, nn.CrossEntropyLoss(), None, data)
    agrees(H, model, lambda: sum(F.cross_entropy(model(*x), y) for x, y in data) / 4)


# -------------------- 4, 5, 11: what autograd can be trusted with


def sdpa(x):
    return F.scaled_dot_product_attention(x, x, x)


class Lambda(nn.Module):
    def __init__(self, f):
        super().__init__()
        self.f = f

    def forward(self, x):
        return self.f(x)


class Checkpointed(nn.Module):
    def __init__(self, inner, reentrant=False):
        super().__init__()
        self.inner, self.reentrant = inner, reentrant

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.inner, x, use_reentrant=self.reentrant)


class BagModel(nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        self.bag, self.head = nn.EmbeddingBag(9, 4, **kwargs), nn.Linear(4, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.bag(x)))


def old_weight_norm(m):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return nn.utils.weight_norm(m)


new_weight_norm = nn.utils.parametrizations.weight_norm
tokens = lambda: torch.arange(48).reshape(12, 4) % 9
floats = lambda: normal(12, 6)
HARD = {  # model, input
    'weight_norm, parametrised': (
        lambda: network(new_weight_norm(nn.Linear(6, 5)), nn.Tanh(), nn.Linear(5, 3)),
        floats,
    ),
    'weight_norm, dim=1': (
        lambda: network(new_weight_norm(nn.Linear(6, 5), dim=1), nn.Tanh(), nn.Linear(5, 3)),
        floats,
    ),
    'weight_norm, all': (
        lambda: network(new_weight_norm(nn.Linear(6, 5), dim=None), nn.Tanh(), nn.Linear(5, 3)),
        floats,
    ),
    'weight_norm, by hooks': (lambda: network(old_weight_norm(nn.Linear(6, 5)), nn.Tanh(), nn.Linear(5, 3)), floats),
    'sparse embedding': (lambda: network(nn.Embedding(9, 3, sparse=True), nn.Flatten(), nn.Linear(12, 3)), tokens),
    'padded embedding': (lambda: network(nn.Embedding(9, 3, padding_idx=2), nn.Flatten(), nn.Linear(12, 3)), tokens),
    'embedding bag': (lambda: network(BagModel()), tokens),
    'embedding bag, sum': (lambda: network(BagModel(mode='sum', padding_idx=1)), tokens),
    'checkpointed': (lambda: network(Checkpointed(nn.Sequential(nn.Linear(6, 5), nn.Tanh())), nn.Linear(5, 3)), floats),
    'checkpointed, reentrant': (
        lambda: network(
            nn.Linear(6, 6), Checkpointed(nn.Sequential(nn.Linear(6, 5), nn.Tanh()), True), nn.Linear(5, 3)
        ),
        floats,
    ),
    'fused attention': (
        lambda: network(nn.Linear(6, 8), nn.Unflatten(1, (1, 2, 4)), Lambda(sdpa), nn.Flatten(), nn.Linear(8, 3)),
        floats,
    ),
    'compiled submodule': (
        lambda: network(torch.compile(nn.Linear(6, 5), backend='eager'), nn.Tanh(), nn.Linear(5, 3)),
        floats,
    ),
    'empty joined to': (
        lambda: network(
            nn.Linear(6, 5), Lambda(lambda x: torch.cat([x.new_zeros(0), x.flatten()]).view(x.shape)), nn.Linear(5, 3)
        ),
        floats,
    ),
}


@pytest.mark.parametrize('name', HARD)
def test_second_derivatives_that_torch_lacks_or_gets_wrong(name):
    "Rows 4, 5 and 11"
    build, data = HARD[name]
    model, x, y = build(), data(), torch.arange(12) % 3
    loss = nn.CrossEntropyLoss()
    for strategy in (None, *HessianLinearOperator.strategies):
        try:
            H = HessianLinearOperator(model, loss, None, [(x, y)], strategy=strategy)
            product = H @ torch.eye(H.shape[0], dtype=f64)
        except NotImplementedError as e:  # only what was asked for by name
            assert strategy is not None and "take 'single' or 'batched'" in str(e), name
            continue
        frozen = []
        for m in model:
            m.reentrant = False  # in which plain torch has no gradient by these parameters
        if name == 'padded embedding':  # its row has no gradient
            frozen = [slice(6, 9)]
        ref = by_differences(model, lambda: loss(model(x), y), torch.eye(H.shape[0], dtype=f64))
        for rows in frozen:
            ref[rows] = 0
            ref[:, rows] = 0
        torch.testing.assert_close(product, ref, rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(product, product.T, rtol=1e-9, atol=1e-11)


def test_a_wrong_second_derivative_is_refused_by_the_parameter(monkeypatch):
    "The check itself: with torch's own weight_norm, whose first derivative is right"
    from hessian_overlap import twice

    monkeypatch.setitem(twice._REPLACED, torch._weight_norm, torch._weight_norm)
    model = network(nn.Linear(6, 4), nn.Tanh(), new_weight_norm(nn.Linear(4, 5)), nn.Tanh(), nn.Linear(5, 3))
    data = [(floats(), torch.arange(12) % 3)]
    make = lambda **kw: HessianLinearOperator(model, nn.CrossEntropyLoss(), None, data, **kw)
    with pytest.raises(NotImplementedError, match='second derivative .* is wrong.*parametrizations'):
        make()
    make(check_deterministic=False)
    GGNLinearOperator(model, nn.CrossEntropyLoss(), None, data)


class Doubled(torch.autograd.Function):
    "x², with a backward pass that is twice too large"

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g):
        return 4 * ctx.saved_tensors[0] * g


def test_a_backward_pass_of_ones_own_that_is_wrong_is_refused():
    model = network(nn.Linear(6, 3), Lambda(Doubled.apply), nn.Linear(3, 3))
    for Op in KINDS:
        with pytest.raises(NotImplementedError, match='is wrong'):
            Op(model, nn.CrossEntropyLoss(), None, [(floats(), torch.arange(12) % 3)])


def test_networks_with_kinks_are_not_refused():
    "A finite difference across the kink of a ReLU says nothing"
    for seed in range(20):
        model = network(nn.Linear(6, 200), nn.ReLU(), nn.Linear(200, 200), nn.ReLU(), nn.Linear(200, 3), seed=10 * seed)
        for dtype in (f64, torch.float32):
            x = normal(12, 6, seed=seed, dtype=dtype)
            HessianLinearOperator(model.to(dtype), nn.CrossEntropyLoss(), None, [(x, torch.arange(12) % 3)])


def test_a_network_that_is_sure_of_its_samples_is_not_refused():
    "Its curvature is the rounding of a softmax"
    for size in (3.0, 10.0, 30.0, 100.0):
        for dtype in (f64, torch.float32):
            model = network(nn.Linear(6, 50), nn.Tanh(), nn.Linear(50, 3), dtype=dtype)
            for p in model.parameters():
                p.data *= size
            x = normal(12, 6, dtype=dtype)
            for Op in (*KINDS, EFLinearOperator):
                Op(model, nn.CrossEntropyLoss(), None, [(x, model(x).argmax(1))])


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
@pytest.mark.parametrize('Op', [*KINDS, EFLinearOperator])
def test_half_precision_is_multiplied_in_its_own_dtype(Op, dtype):
    "Row 11"
    model = network(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 3), dtype=dtype)
    x, y = normal(40, 6, dtype=dtype), torch.arange(40) % 3
    A = Op(model, nn.CrossEntropyLoss(), None, [(x[:13], y[:13]), (x[13:], y[13:])])
    assert A.dtype == torch.float32 and A.gradient.dtype == torch.float32
    model = model.double()
    ref = Op(model, nn.CrossEntropyLoss(), None, [(x.double(), y)])
    I = torch.eye(A.shape[0])
    assert (A @ I - ref @ I.double()).norm() < 0.1 * (ref @ I.double()).norm()


def test_autocast_and_inference_mode():
    "Row 11"

    class Cast(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp(torch.float32)

        def forward(self, x):
            with torch.autocast('cpu', torch.bfloat16):
                return self.net(x).float()

    model, (x, y) = Cast(), whole(batches(dtype=torch.float32))
    H = HessianLinearOperator(model, nn.CrossEntropyLoss(), None, [(x, y)])
    plain = HessianLinearOperator(model.net, nn.CrossEntropyLoss(), None, [(x, y)])
    V = column_noise(H.shape[0], range(3), seed=0).float()
    assert (H @ V - plain @ V).norm() < 0.05 * (plain @ V).norm()
    with torch.inference_mode():
        net = mlp(torch.float32)
        A = HessianLinearOperator(net, nn.CrossEntropyLoss(), None, [(x.clone(), y.clone())])
        W = A @ V.clone()
    torch.testing.assert_close(W.clone(), plain @ V, rtol=1e-4, atol=1e-6)


# -------------------- 6: one empirical Fisher


def test_the_empirical_fisher_does_not_depend_on_how_the_mean_is_written():
    "Row 6"
    model, (x, labels) = mlp(), whole(batches())
    y = F.one_hot(labels, 3).to(f64)
    ways = [
        dict(loss_func=nn.MSELoss()),
        dict(loss_func=nn.MSELoss(), batch_size_fn=len),
        dict(loss_func=F.mse_loss),
        dict(loss_func=lambda out, y: F.mse_loss(out, y)),
        dict(loss_func=lambda out, y: (out - y).square().mean(1).mean()),
    ]
    I = torch.eye(53, dtype=f64)
    made = [EFLinearOperator(model, params=None, data=[(x[:5], y[:5]), (x[5:], y[5:])], **way) @ I for way in ways]
    rows = []
    for i in range(len(x)):
        g = torch.autograd.grad(F.mse_loss(model(x[i : i + 1]), y[i : i + 1]), list(model.parameters()))
        rows.append(torch.cat([t.reshape(-1) for t in g]))
    G = torch.stack(rows)
    for product in made:
        torch.testing.assert_close(product, G.T @ G / len(x), rtol=1e-9, atol=1e-12)


# -------------------- 7: scale


@pytest.mark.parametrize('Op', KINDS)
@pytest.mark.parametrize(
    ('dtype', 'scale'),
    [(torch.float32, s) for s in (1e-30, 1e-22, 1e-10, 1e10, 1e20, 1e30)]
    + [(f64, s) for s in (1e-200, 1e-160, 1e160, 1e200)],
)
def test_scale_of_the_loss(Op, dtype, scale):
    "Row 7: the same operator times a number, or a sentence"
    model, data = mlp(dtype), batches((3, 8, 9), dtype)
    loss = nn.CrossEntropyLoss()
    V = column_noise(53, range(3), seed=0).to(dtype)
    ref = Op(model, loss, None, data) @ V
    try:
        A = Op(model, lambda out, y: scale * loss(out, y), None, data)
    except FloatingPointError as e:
        assert 'multiply the loss by a constant' in str(e) and scale in (1e-30, 1e30)
        return
    torch.testing.assert_close((A @ V) / scale, ref, rtol=1e-4, atol=1e-5 * ref.abs().max().item())


# -------------------- 9: one way of batches

TWO = lambda u, v: torch.cat([u, v], 1)


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, u, v):
        return self.net(torch.cat([u, v], 1))


def test_what_default_collate_makes_of_nested_pairs():
    "Row 9: [[u, v], y]"
    model, (x, y) = TwoInputs(), whole(batches())
    loader = DataLoader(list(zip(zip(x[:, :2], x[:, 2:]), y)), batch_size=7)
    assert isinstance(next(iter(loader))[0], list)
    H = HessianLinearOperator(model, nn.CrossEntropyLoss(), None, loader)
    agrees(H, model, lambda: F.cross_entropy(model(x[:, :2], x[:, 2:]), y))


def test_inputs_without_targets():
    "Row 11: (x, None)"
    model, data = mlp(), batches()
    x, _ = whole(data)
    loss = lambda out, y: out.square().mean()
    H = HessianLinearOperator(model, loss, None, [(x, None) for x, _ in data])
    agrees(H, model, lambda: loss(model(x), None))


# -------------------- 13, 14, 15, 17, 20: the rest


def test_no_file_stays_open():
    "Row 13"
    with warnings.catch_warnings():
        warnings.simplefilter('error', ResourceWarning)
        HessianLinearOperator(mlp(), nn.CrossEntropyLoss(), None, batches())
        import gc

        gc.collect()


class Scaled(nn.Module):
    "A loss with a parameter of its own"

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones((), dtype=f64))

    def forward(self, out, y):
        return self.scale * F.cross_entropy(out.detach(), y)


@pytest.mark.parametrize('loss', [Scaled(), lambda out, y: torch.ones((), dtype=f64, requires_grad=True)])
def test_a_loss_that_does_not_depend_on_the_parameters(loss):
    "Row 14: its products were memory that nobody had written"
    for Op in (*KINDS, EFLinearOperator):
        with pytest.raises(ValueError, match='the loss does not depend on the parameters'):
            Op(mlp(), loss, None, batches())


class Experts(nn.Module):
    "The sign of a sample chooses who answers"

    def __init__(self):
        super().__init__()
        self.a, self.b = mlp(), mlp()

    def forward(self, x):
        return self.a(x) if x.sum() > 0 else self.b(x)


@pytest.mark.parametrize('Op', [*KINDS, EFLinearOperator])
@pytest.mark.parametrize('strategy', [None, *HessianLinearOperator.strategies])
def test_batches_that_do_not_use_the_parameters(Op, strategy):
    "Row 14: the second expert sees no sample of the first batch"
    x, y = normal(8, 6).abs(), torch.arange(8) % 3
    model, loss = Experts(), nn.CrossEntropyLoss()
    data = [(x, y), (-x, y)]
    A = Op(model, loss, list(model.b.parameters()), data, strategy=strategy)
    B = Op(model.b, loss, None, [(-x, y)])
    I = torch.eye(A.shape[0], dtype=f64)
    try:
        W = A @ I
    except NotImplementedError:
        assert strategy and strategy.startswith('linear')
        return
    torch.testing.assert_close(W, 0.5 * (B @ I))


def test_threads():
    "Row 15: own and shared operators of one model, asked for their first product at once"
    model, data = mlp(), batches((5, 5, 10))
    make = lambda: HessianLinearOperator(model, nn.CrossEntropyLoss(), None, data, memory=2**13)
    V = column_noise(53, range(20), seed=0)
    ref, call = make() @ V, nn.Module.__call__
    for _ in range(8):
        shared, wrong = make(), []

        def work(shared=shared, wrong=wrong):
            try:
                for A in (shared, make()):
                    if not torch.allclose(A @ V, ref, rtol=1e-9, atol=1e-12):
                        wrong.append('another product')
            except Exception as e:
                wrong.append(repr(e))

        threads = [threading.Thread(target=work) for _ in range(3)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        assert not wrong
        torch.testing.assert_close(shared @ V, ref, rtol=1e-9, atol=1e-12)
    assert nn.Module.__call__ is call


@pytest.mark.parametrize('Op', [*KINDS, EFLinearOperator])
def test_an_operator_pickles_at_any_time(Op):
    "Row 15"
    A, V = Op(mlp(), nn.CrossEntropyLoss(), None, batches()), column_noise(53, range(20), seed=0)
    before = pickle.loads(pickle.dumps(A))
    W = A @ V
    after = pickle.loads(pickle.dumps(A))
    for B in (before, after):
        torch.testing.assert_close(B @ V, W, rtol=1e-9, atol=1e-12)
    assert len(pickle.dumps(A)) < 1.2 * len(pickle.dumps(before))


@pytest.mark.parametrize('strategy', [None, 'single', 'linear'])
def test_switched_to_training_after_construction(strategy):
    "Row 17"
    model = network(nn.Linear(6, 5), nn.Dropout(0.5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    H = HessianLinearOperator(model, nn.CrossEntropyLoss(), None, batches(), strategy=strategy)
    V = column_noise(H.shape[0], range(3), seed=0)
    W = H @ V
    model.train()
    with pytest.raises(ValueError, match='training mode'):
        H @ V
    model.eval()
    torch.testing.assert_close(H @ V, W, rtol=1e-9, atol=1e-12)


def test_nothing_global_changes():
    "Row 20"
    import os

    x, y = whole(batches())
    loader = DataLoader(TensorDataset(x, y), batch_size=6)
    model = mlp()
    torch.manual_seed(5)
    state, environment = torch.get_rng_state(), dict(os.environ)
    for strategy in (None, 'linear', 'linear-batched'):
        H = HessianLinearOperator(model, nn.CrossEntropyLoss(), None, loader, strategy=strategy)
        for _ in range(3):
            H @ column_noise(53, range(10), seed=0)
    assert torch.equal(torch.get_rng_state(), state)
    assert dict(os.environ) == environment
    assert torch.is_grad_enabled()


# -------------------- parameters, plain functions


def test_parameters_by_pattern_and_by_function():
    model, data = mlp(), batches()
    make = lambda params: HessianLinearOperator(model, nn.CrossEntropyLoss(), params, data)
    assert make('2.*').names == ['2.weight', '2.bias'] == make(['2.w*', '*.bias'][:1] + ['2.bias']).names
    assert make(lambda name, p: p.dim() == 1).names == ['0.bias', '2.bias']
    model[0].requires_grad_(False)
    assert make('*').names == ['2.weight', '2.bias']
    with pytest.raises(ValueError, match="no parameter is called 'head'"):
        make('head')


def test_a_model_that_is_a_function():
    net, (x, y) = mlp(), whole(batches())
    params = {name: p.detach() for name, p in net.named_parameters()}
    f = lambda p, x: torch.tanh(x @ p['0.weight'].T + p['0.bias']) @ p['2.weight'].T + p['2.bias']
    A = HessianLinearOperator(f, nn.CrossEntropyLoss(), params, [(x, y)])
    B = HessianLinearOperator(net, nn.CrossEntropyLoss(), None, [(x, y)])
    I = torch.eye(53, dtype=f64)
    torch.testing.assert_close(A @ I, B @ I)
