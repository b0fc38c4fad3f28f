"Laws of Gauss-Newton products at the size of language models: cut batches, softmax, sampled labels, bounded memory"

import functools
import pickle

import pytest
import torch
import torch.nn.functional as F
from test_curvature import CASES, OPERATORS, dense_factored, eye, make
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hessian_overlap.curvature import HessianLinearOperator
from hessian_overlap.ggn import GGNLinearOperator

f64 = torch.float64
STRATEGIES = GGNLinearOperator.strategies


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.fixture(params=CASES)
def name(request):
    return request.param


@pytest.mark.parametrize('kind', OPERATORS)
def test_cut_equals_uncut(name, kind):
    model, loss, x, y = make(name)
    A, B = (OPERATORS[kind](model, loss, None, [(x, y)], memory=memory) for memory in (2**32, 100))
    assert (A.info['pieces'], B.info['pieces']) == (1, 11) or name == 'mlp, ignore_index'
    want = A @ eye(A)
    assert relative(B @ eye(B), want) < 1e-13
    assert relative(B @ eye(B)[:, :3], want[:, :3]) < 1e-13


def test_ignored_samples_do_not_stop_a_cut():
    "Pieces of several samples, each with one that counts"
    model, loss, x, y = make('mlp, ignore_index')
    y[1::2], y[::2] = 1, 2
    A, B = (GGNLinearOperator(model, loss, None, [(x, y)], memory=memory) for memory in (2**32, 4000))
    assert 1 < B.info['pieces'] < 11 and B._rule == 'ratio'
    assert relative(B @ eye(B), A @ eye(A)) < 1e-13


@pytest.mark.parametrize('strategy', STRATEGIES)
@pytest.mark.parametrize('cuts', [(11,), (3, 8), (1, 10), (4, 4, 3)])
@pytest.mark.parametrize('case', ['mlp, cross-entropy', 'mlp, class weights', 'partial, sum', 'function, mean'])
def test_splits_and_strategies(case, cuts, strategy):
    model, loss, x, y = make(case)
    data = list(zip(x.split(cuts), y.split(cuts)))
    A = GGNLinearOperator(model, loss, None, data, memory=2000, strategy=strategy)
    assert A.info['pieces'] > A.info['groups']
    assert relative(A @ eye(A), dense_factored('ggn', model, loss, x, y)) < 1e-12


@pytest.mark.parametrize('dtype, tol', [(f64, 1e-13), (torch.float32, 2e-5), (torch.bfloat16, 0.1)])
def test_dtypes(dtype, tol):
    model, loss, x, y = make('mlp, cross-entropy', dtype=dtype)
    want = dense_factored('ggn', *make('mlp, cross-entropy'))
    A = GGNLinearOperator(model, loss, None, [(x, y)], memory=500)
    assert A.info['pieces'] > 1
    assert relative((A @ eye(A)).double(), want) < tol


class Language(nn.Module):
    "An embedding, a layer and logits, of a vocabulary that is large beside everything else"

    def __init__(self, vocabulary=40, width=6, flat=False):
        super().__init__()
        self.embed, self.layer = nn.Embedding(vocabulary, width), nn.Linear(width, width)
        self.head, self.flat = nn.Linear(width, vocabulary), flat

    def forward(self, x):
        out = self.head(torch.tanh(self.layer(self.embed(x)).cumsum(1)))
        return out.flatten(0, 1) if self.flat else out


def language(samples=8, length=5, vocabulary=40, dtype=f64, **more):
    torch.manual_seed(0)
    model = Language(vocabulary, **more).to(dtype)
    x = torch.randint(vocabulary, (samples, length))
    return model, x, x.roll(-1, 1)


LOSSES = {
    'flattened by the loss': (dict(), lambda out, y: F.cross_entropy(out.flatten(0, 1), y.flatten()), False),
    'classes in the middle': (dict(), lambda out, y: nn.CrossEntropyLoss()(out.mT, y), False),
    'flattened by the model': (dict(flat=True), nn.CrossEntropyLoss(), True),
    'smoothed': (dict(flat=True), nn.CrossEntropyLoss(label_smoothing=0.1), True),
    'weighted and smoothed': (
        dict(flat=True),
        nn.CrossEntropyLoss(torch.linspace(0.1, 2, 40, dtype=f64), label_smoothing=0.2),
        True,
    ),
    'summed': (dict(), lambda out, y: F.cross_entropy(out.flatten(0, 1), y.flatten(), reduction='sum'), False),
    'a scaled sum': (dict(flat=True), lambda out, y: 3e-5 * F.cross_entropy(out, y, reduction='sum'), True),
}


@pytest.mark.parametrize('memory', [2**32, 2**16])
@pytest.mark.parametrize('loss', LOSSES)
def test_softmax_equals_the_dense_matrix(loss, memory):
    more, loss_func, flat = LOSSES[loss]
    model, x, y = language(**more)
    y = y.flatten() if flat else y
    A = GGNLinearOperator(model, loss_func, None, [(x, y)], memory=memory)
    assert (A.info['pieces'] > 1) == (memory == 2**16)
    V = torch.randn(A.shape[0], 3, dtype=f64)
    got = A @ V
    assert A._is_softmax
    assert relative(got, dense_factored('ggn', model, loss_func, x, y) @ V) < 1e-12


def test_soft_targets_and_the_second_dimension():
    torch.manual_seed(0)
    model = nn.Conv1d(3, 4, 1).double()
    x, y = torch.randn(5, 3, 6, dtype=f64), torch.rand(5, 4, 6, dtype=f64)
    for target in (y, y.argmax(1)):
        A = GGNLinearOperator(model, nn.CrossEntropyLoss(), None, [(x, target)])
        got = A @ eye(A)
        assert A._is_softmax
        assert relative(got, dense_factored('ggn', model, nn.CrossEntropyLoss(), x, target)) < 1e-13


def focal(out, y):
    return F.cross_entropy(out, y, reduction='none').pow(2).mean()


NO_SOFTMAX = {
    'focal': focal,
    'penalised': lambda out, y: F.cross_entropy(out, y) + 1e-3 * out.square().mean(),
    'clipped': lambda out, y: F.cross_entropy(out.clamp(-0.5, 0.5), y),
    'scaled': lambda out, y: F.cross_entropy(2 * out, y),
    'coupled': lambda out, y: F.cross_entropy(out - out.mean(0), y),
    'entries': lambda out, y: F.softplus(-out).mean(),
}


@pytest.mark.parametrize('zero', [False, True])
@pytest.mark.parametrize('loss', NO_SOFTMAX)
def test_what_is_no_softmax_goes_by_a_second_backward_pass(loss, zero):
    "Also at outputs of zero, where a vacuous check would pass"
    model, _, x, y = make('mlp, cross-entropy')
    if zero:
        nn.init.zeros_(model[-1].weight)
        nn.init.zeros_(model[-1].bias)
    loss = NO_SOFTMAX[loss]
    A = GGNLinearOperator(model, loss, None, [(x, y)])
    want = dense_factored('ggn', model, loss, x, y)
    assert (A @ eye(A) - want).norm() <= 1e-12 * want.norm()


def test_a_loss_that_is_another_one_for_later_batches():
    "Softmax in the first piece says nothing about the others"
    model, _, x, y = make('mlp, cross-entropy')
    loss = lambda out, y: F.cross_entropy(out, y) if y[0] < 3 else F.mse_loss(out, F.one_hot(y - 3, 3).to(out))
    data = [(x[:6], y[:6]), (x[6:], y[6:] + 3)]
    A = GGNLinearOperator(model, loss, None, data, batch_size_fn=len, memory=10)
    want = sum(len(xb) / 11 * dense_factored('ggn', model, loss, xb, yb) for xb, yb in data)
    assert relative(A @ eye(A), want) < 1e-12


def test_models_that_mix_samples_are_not_cut():
    class Mixing(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(6, 3)

        def forward(self, x):
            out = self.a(x)
            return out - out.mean(0)

    torch.manual_seed(0)
    model, (_, _, x, y) = Mixing().double(), make('mlp, cross-entropy')
    for kind in ('hessian', 'ggn'):
        A, B = (
            OPERATORS[kind](model, nn.CrossEntropyLoss(), None, [(x, y)], memory=memory) for memory in (2**32, 1000)
        )
        assert B.info['pieces'] == 1
        assert relative(B @ eye(B), A @ eye(A)) < 1e-14


def test_a_loss_without_a_rule_is_not_cut():
    model, _, x, y = make('mlp, cross-entropy')
    loss = lambda out, y: F.cross_entropy(out, y).square()
    A, B = (HessianLinearOperator(model, loss, None, [(x, y)], memory=memory) for memory in (2**32, 1000))
    assert B.info['pieces'] == 1 and relative(B @ eye(B), A @ eye(A)) < 1e-14


def test_whole_dicts_are_cut():
    model, loss, x, y = make('mlp, cross-entropy')
    whole = lambda model, batch: loss(model(batch['x']), batch['y'])
    A, B = (HessianLinearOperator(model, whole, None, [dict(x=x, y=y)], memory=memory) for memory in (2**32, 4000))
    assert B.info['pieces'] > 1 and relative(B @ eye(B), A @ eye(A)) < 1e-13


class Largest(TorchDispatchMode):
    "The largest storage that is made, and the most that storages hold at a time, in bytes"

    def __init__(self):
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if isinstance(t, torch.Tensor):
                self.largest = max(self.largest, t.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize('strategy', ['single', 'batched'])
@pytest.mark.parametrize('kind', OPERATORS)
def test_memory_bounds_the_largest_tensor(kind, strategy):
    "The batch has logits of 1.3 MB; of a product no tensor is larger than memory allows"
    model, x, y = language(samples=64, length=8, vocabulary=320)
    loss = lambda out, y: F.cross_entropy(out.flatten(0, 1), y.flatten())
    logits, largest = 64 * 8 * 320 * 8, {}
    for memory in (2**32, 2**20):
        A = OPERATORS[kind](model, loss, None, [(x, y)], memory=memory, strategy=strategy)
        V = torch.randn(A.shape[0], 4, dtype=f64)
        with Largest() as seen:
            A @ V
        largest[memory] = seen.largest
    assert largest[2**32] >= logits
    assert largest[2**20] <= 2**20 // 4


def test_attention_is_cut_by_samples():
    "The maths backend holds weights quadratic in the length of a sequence"
    model, loss, _, y = make('attention')
    x = torch.randn(11, 64, 4, dtype=f64)
    A, B = (HessianLinearOperator(model, loss, None, [(x, y)], memory=memory) for memory in (2**32, 2**22))
    V, largest = torch.randn(A.shape[0], 2, dtype=f64), []
    for H in (A, B):
        with Largest() as seen:
            W = H @ V
        largest.append(seen.largest)
    assert largest[1] < largest[0] / 3
    assert relative(W, A @ V) < 1e-13


# --- sampled labels ---------------------------------------------------------------------------------------------------

SAMPLED = ['mlp, cross-entropy', 'mlp, class weights', 'mlp, ignore_index', 'mlp, bce', 'relu, mse', 'partial, sum']


@pytest.mark.parametrize('case', SAMPLED)
def test_sampled_labels_are_unbiased(case):
    "The error is that of a mean of independent matrices: about a standard error, and falling like 1/√M"
    model, loss, x, y = make(case)
    want = dense_factored('ggn', model, loss, x, y)
    ops = [GGNLinearOperator(model, loss, None, [(x, y)], mc_samples=40, seed=seed) for seed in range(50)]
    found = torch.stack([A @ eye(A) for A in ops])
    error = found.std(0) / len(ops) ** 0.5
    assert 0.4 < (found.mean(0) - want).norm() / error.norm() < 1.8  # entries are far from independent
    errors = [
        relative(GGNLinearOperator(model, loss, None, [(x, y)], mc_samples=M, seed=0) @ eye(ops[0]), want)
        for M in (10, 1000, 100_000)
    ]
    assert errors[0] > 4 * errors[1] > 16 * errors[2]


@pytest.mark.parametrize('case', SAMPLED)
def test_sampled_matrices_are_fixed_and_positive(case):
    model, loss, x, y = make(case)
    make_op = lambda data, **more: GGNLinearOperator(model, loss, None, data, mc_samples=2, seed=3, **more)
    A = make_op([(x, y)])
    want = A @ eye(A)
    assert relative(want, want.T) < 1e-13
    assert torch.linalg.eigvalsh(want).min() > -1e-13 * want.norm()
    assert torch.linalg.matrix_rank(want, hermitian=True, rtol=1e-10) <= 2 * len(x)
    for cuts in ((3, 8), (1, 4, 6)):
        data = list(zip(x.split(cuts), y.split(cuts)))
        if case == 'mlp, ignore_index' and any((yb == 1).all() for _, yb in data):
            continue
        assert relative(make_op(data) @ eye(A), want) < 1e-12
        assert relative(make_op(data, memory=3000, chunk_size=2) @ eye(A), want) < 1e-12
    for strategy in STRATEGIES:
        assert relative(make_op([(x, y)], strategy=strategy) @ eye(A), want) < 1e-12
    again = pickle.loads(pickle.dumps(A)) if case != 'mlp, bce' and 'mlp' not in case else A
    assert relative(again @ eye(A), want) < 1e-14
    other = GGNLinearOperator(model, loss, None, [(x, y)], mc_samples=2, seed=4)
    assert relative(other @ eye(A), want) > 0.01


@pytest.mark.parametrize('loss', LOSSES)
def test_sampled_labels_of_sequences(loss):
    more, loss_func, flat = LOSSES[loss]
    model, x, y = language(samples=6, length=3, **more)
    target = lambda y: y.flatten() if flat else y
    V = torch.randn(sum(p.numel() for p in model.parameters()), 2, dtype=f64)
    data = [(x, target(y))], [(x[:2], target(y[:2])), (x[2:], target(y[2:]))]
    want = GGNLinearOperator(model, loss_func, None, data[0]) @ V
    few, cut = (
        GGNLinearOperator(model, loss_func, None, d, mc_samples=3, seed=0) @ V
        for d in (data[0], data[0 if 'weighted' in loss else 1])
    )
    assert relative(cut, few) < 1e-12
    many = GGNLinearOperator(model, loss_func, None, data[0], mc_samples=3000, seed=0) @ V
    assert relative(many, want) < 0.15 < relative(few, want)


def test_drawn_classes_have_their_probabilities():
    from hessian_overlap.ggn import drawn_classes

    p = torch.tensor([0.5, 0.0, 0.3, 0.2], dtype=f64).expand(1, 1, 4)
    g = torch.Generator().manual_seed(0)
    drawn = drawn_classes(p, torch.randn(1, 1, 100_000, generator=g, dtype=f64))
    counts = drawn.flatten().bincount(minlength=4) / 1e5
    assert counts[1] == 0 and (counts - p[0, 0]).abs().max() < 0.006


@pytest.mark.parametrize('loss', [nn.L1Loss(), nn.HuberLoss(), lambda out, y: (out - y).pow(4).mean()])
def test_losses_without_labels_are_refused(loss):
    model, _, x, y = make('relu, mse')
    with pytest.raises(NotImplementedError, match='labels can be drawn'):
        GGNLinearOperator(model, loss, None, [(x, y)], mc_samples=1, seed=0)


@pytest.mark.parametrize(
    'wrong',
    [
        dict(mc_samples=-1),
        dict(mc_samples=1.5),
        dict(mc_samples=True),
        dict(mc_samples=1),
        dict(mc_samples=1, seed=-1),
        dict(mc_samples=1, seed=0.5),
    ],
)
def test_wrong_arguments(wrong):
    model, loss, x, y = make('relu, mse')
    with pytest.raises((ValueError, TypeError), match='mc_samples=|a seed is an integer|whole number|mc_samples'):
        GGNLinearOperator(model, loss, None, [(x, y)], **wrong)


def test_own_functions_are_recognised():
    model, loss, x, y = make('mlp, cross-entropy')
    ways = [
        loss,
        F.cross_entropy,
        functools.partial(F.cross_entropy, reduction='mean'),
        lambda out, y: -out.log_softmax(1).gather(1, y[:, None]).mean(),
    ]
    found = [
        GGNLinearOperator(model, way, None, [(x, y)], mc_samples=2, seed=1) @ torch.ones(53, dtype=f64) for way in ways
    ]
    assert all(relative(f, found[0]) < 1e-12 for f in found)
