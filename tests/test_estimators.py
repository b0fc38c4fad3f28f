"Estimates from products: exact where they must be, unbiased elsewhere, standard errors as large as errors"

import math

import numpy as np
import pytest
import torch
from scipy.sparse.linalg import aslinearoperator as scipy_operator

from hessian_overlap.curvature import HessianLinearOperator
from hessian_overlap.estimators import (
    estimate_of_draws,
    frobenius_norm,
    spectral_norm,
    xdiag,
    xnystrace,
    xrownorms,
    xtrace,
)
from hessian_overlap.ggn import GGNLinearOperator
from hessian_overlap.linop import FunctionLinearOperator, aslinearoperator
from hessian_overlap.models import mnist_mlp
from hessian_overlap.noise import column_noise

DEVICES = ['cpu'] + (['cuda'] if torch.cuda.is_available() else [])
f64 = torch.float64
EVERY = dict(
    xtrace=(xtrace, lambda A: A.trace()),
    xnystrace=(xnystrace, lambda A: A.trace()),
    xdiag=(xdiag, lambda A: A.diagonal()),
    xrownorms=(xrownorms, lambda A: A.square().sum(1)),
    frobenius_norm=(frobenius_norm, lambda A: A.norm()),
    spectral_norm=(spectral_norm, lambda A: torch.linalg.matrix_norm(A, 2)),
)
UNBIASED = [name for name in EVERY if name != 'spectral_norm']
SPECTRA = dict(
    fast=lambda i: i**-2.0,
    slow=lambda i: 1 / i,
    exponential=lambda i: 0.9**i,
    flat=lambda i: 1 - i / 200,
)


def matrix(spectrum='slow', n=80, rank=None, positive=True, seed=10**6):
    "Symmetric, with localised eigenvectors, from a seed that no estimate here has: its columns are test vectors, too"
    lam = SPECTRA[spectrum](torch.arange(1, n + 1, dtype=f64))
    if rank is not None:
        lam[rank:] = 0
    if not positive:
        lam = lam * column_noise(n, [0], seed=seed)[:, 0]
    scale = column_noise(n, [1], seed=seed, kind='gauss').exp()
    Q = torch.linalg.qr(scale * column_noise(n, range(2, n + 2), seed=seed, kind='gauss')).Q
    A = (Q * lam) @ Q.T
    return (A + A.T) / 2


def gap(e, truth):
    return ((e.value - truth).norm() / truth.norm()).item()


@pytest.mark.parametrize('name', EVERY)
@pytest.mark.parametrize('device', DEVICES)
def test_nothing_is_left_of_a_low_rank_and_of_all_columns(name, device):
    f, truth = EVERY[name]
    for A, products in (
        (matrix(rank=3), 10),
        (matrix('flat', n=25), 25),
        (matrix('fast', n=25), 60),
        (matrix('exponential', n=5), 4 if name in ('xdiag', 'xrownorms') else 5),
        (torch.zeros(30, 30, dtype=f64), 6),
    ):
        e = f(A.to(device), products, seed=1)
        assert e.value.dtype == f64 and e.value.shape == truth(A).shape == e.std_error.shape
        assert (e.value.cpu() - truth(A)).norm() <= (1e-10 if name != 'xnystrace' else 1e-6) * max(1, truth(A).norm())
        if name != 'spectral_norm' or e.info['exact']:
            assert e.std_error.norm() <= 1e-7 * max(1e-3, truth(A).norm())


@pytest.mark.parametrize('name', UNBIASED)
@pytest.mark.parametrize('spectrum', SPECTRA)
@pytest.mark.parametrize('products', [8, 30])
def test_errors_are_as_large_as_they_say(name, spectrum, products):
    "Over seeds: no bias beyond five standard errors of the mean, and the errors' size is that of the standard errors"
    f, truth = EVERY[name]
    A, N = matrix(spectrum), 60
    truth = truth(A)
    runs = [f(A, products, seed=s) for s in range(N)]
    value, said = torch.stack([e.value for e in runs]), torch.stack([e.std_error for e in runs])
    if name != 'frobenius_norm':  # a square root is not without bias
        bias = (value.mean(0) - truth).abs()
        assert (bias <= 5.5 * value.std(0) / N**0.5 + 1e-12).all()
    error = (value - truth).square().mean().sqrt()
    ratio = (error / said.square().mean().sqrt()).item()
    assert ratio < 1.4, ratio
    assert (value - truth).abs().median() > 0.2 * said.median()  # whose mean square is a matter of a few seeds
    inside = torch.stack([(e.low <= truth) & (truth <= e.high) for e in runs]).double().mean()
    assert inside > 0.8, inside


def test_the_scatter_alone_says_too_little():
    "The covariance that leaving out a second vector shows is what was missing"
    A = matrix('exponential')
    errors, said, scatter = [], [], []
    for s in range(50):
        e = xnystrace(A, 20, seed=s)
        errors.append((e.value - A.trace()).item())
        said.append(e.std_error.item())
        scatter.append(leave_one_out_by_hand(A, 20, s)[1])
    rms = [np.sqrt(np.mean(np.square(v))) for v in (errors, said, scatter)]
    assert 0.75 < rms[0] / rms[1] < 1.3 and rms[0] / rms[2] > 1.2


def leave_one_out_by_hand(A, m, seed):
    "XNysTrace with m Nyström approximations of m - 1 vectors, one after another"
    n = len(A)
    Omega = column_noise(n, range(m), seed=seed, kind='gauss')
    draws = []
    for i in range(m):
        rest = torch.cat([Omega[:, :i], Omega[:, i + 1 :]], 1)
        Y = A @ rest
        low = Y @ torch.linalg.lstsq(rest.T @ Y, Y.T, driver='gelsd').solution
        w = Omega[:, i] - rest @ torch.linalg.lstsq(rest, Omega[:, i : i + 1]).solution[:, 0]
        draws.append((low.trace() + (n - m + 1) / w.square().sum() * (w @ (A - low) @ w)).item())
    return np.mean(draws), np.std(draws, ddof=1) / m**0.5


def by_hand(name, A, m, seed):
    "The mean of m estimates, each with a basis of its own"
    n = A.shape[1]
    Omega = column_noise(n, range(m), seed=seed, kind='sign' if name in ('xdiag', 'xrownorms') else 'gauss')
    if name == 'frobenius_norm':
        Omega = Omega * n**0.5 / Omega.norm(dim=0)
    draws = []
    for i in range(m):
        rest = torch.cat([Omega[:, :i], Omega[:, i + 1 :]], 1)
        Y = A @ rest
        if name == 'xrownorms' and len(A) != n:
            Y = A.T @ Y
        Q = torch.linalg.qr(Y).Q
        w = Omega[:, i]
        out = w - Q @ (Q.T @ w) if len(Q) == n else None
        if name == 'xtrace':
            draws.append((Q.T @ A @ Q).trace() + (n - m + 1) / out.square().sum() * (out @ A @ out))
        if name == 'xdiag':
            draws.append((Q @ Q.T @ A).diagonal() + w * (A @ w - Q @ (Q.T @ (A @ w))))
        if name == 'xrownorms':
            draws.append((A @ Q).square().sum(1) + (A @ out).square())
        if name == 'frobenius_norm':
            draws.append((Q.T @ A).square().sum() + (A @ w - Q @ (Q.T @ (A @ w))).square().sum())
    mean = torch.stack(draws).mean(0)
    return mean.sqrt() if name == 'frobenius_norm' else mean


@pytest.mark.parametrize('name', ['xtrace', 'xdiag', 'xrownorms', 'frobenius_norm'])
@pytest.mark.parametrize('kind', ['positive', 'both signs', 'not symmetric', 'wide'])
def test_the_same_as_with_a_basis_for_each(name, kind):
    A = matrix('slow', positive=kind == 'positive', n=60)
    if kind in ('not symmetric', 'wide'):
        A = A + 0.1 * column_noise(60, range(60), seed=9, kind='gauss')
    if kind == 'wide':
        if name in ('xtrace', 'xdiag'):
            pytest.skip('needs a square matrix')
        A = A[:25]
    each = 3 if name == 'xrownorms' and kind in ('not symmetric', 'wide') else 2
    if each == 3 and kind == 'not symmetric':
        ref = by_hand_squared(A, 7, 4)
    else:
        ref = by_hand(name, A, 7, 4)
    e = EVERY[name][0](A, 7 * each + each - 1, seed=4)
    assert e.info['matvecs'] == 7 * each and e.info['test_vectors'] == 7
    torch.testing.assert_close(e.value, ref, rtol=1e-9, atol=1e-11)


def by_hand_squared(A, m, seed):
    "Row norms with the span of AᵀAΩ"
    Omega, draws = column_noise(A.shape[1], range(m), seed=seed), []
    for i in range(m):
        Q = torch.linalg.qr(A.T @ (A @ torch.cat([Omega[:, :i], Omega[:, i + 1 :]], 1))).Q
        out = Omega[:, i] - Q @ (Q.T @ Omega[:, i])
        draws.append((A @ Q).square().sum(1) + (A @ out).square())
    return torch.stack(draws).mean(0)


def test_nystrom_by_hand():
    A = matrix('slow', n=60)
    e = xnystrace(A, 9, seed=2)
    mean, scatter = leave_one_out_by_hand(A, 9, 2)
    assert abs(e.value.item() - mean) < 1e-6 * mean and e.std_error.item() >= scatter * (1 - 1e-6)


@pytest.mark.parametrize('name', EVERY)
@pytest.mark.parametrize('scale', [1e-200, 1e-30, 1.0, 1e30, 1e140])
def test_scale_of_the_loss(name, scale):
    f = EVERY[name][0]
    A, square = matrix(), scale if name != 'xrownorms' else scale**2
    e, scaled = f(A, 12, seed=0), f(scale * A, 12, seed=0)
    if square == 0:
        return
    torch.testing.assert_close(scaled.value / square, e.value, rtol=1e-6, atol=0)
    torch.testing.assert_close(scaled.std_error / square, e.std_error, rtol=1e-4, atol=1e-12)


@pytest.mark.parametrize('name', EVERY)
@pytest.mark.parametrize('device', DEVICES)
def test_single_precision_and_other_operators(name, device):
    f, truth = EVERY[name]
    A = matrix()
    ref = f(A, 12, seed=0)
    single = f(A.float().to(device), 12, seed=0)
    assert single.value.dtype == f64 and gap(single, ref.value.to(device)) < 1e-4
    by_function = FunctionLinearOperator(lambda V: A @ V, A.shape, rmatmat=lambda V: A.T @ V, dtype=f64, device='cpu')
    if name != 'xrownorms':  # which takes a third product for what may not be symmetric
        assert gap(f(by_function, 12, seed=0), ref.value) < (1e-10 if name != 'spectral_norm' else 1e-2)
    assert gap(f(scipy_operator(A.numpy()), 40, seed=0), truth(A)) < 0.2


@pytest.mark.parametrize('name', EVERY)
def test_seeds_and_columns_of_noise(name):
    f = EVERY[name][0]
    A = matrix()
    a, b, other = (f(A, 12, seed=s) for s in (3, 3, 4))
    assert torch.equal(a.value, b.value) and torch.equal(a.std_error, b.std_error)
    assert name == 'spectral_norm' or not torch.equal(a.value, other.value)


def test_spectral_norm_is_a_lower_bound_and_its_upper_end_holds():
    A = matrix('flat', n=300) - torch.diag(torch.linspace(0, 0.5, 300, dtype=f64))
    norm = torch.linalg.matrix_norm(A, 2)
    for products in (2, 5, 12, 40):
        runs = [spectral_norm(A, products, seed=s) for s in range(30)]
        assert all(e.low == e.value <= norm * (1 + 1e-12) for e in runs)
        assert sum(bool(e.high >= norm) for e in runs) >= 28
    widths = [spectral_norm(A, p, seed=0).std_error.item() for p in (2, 5, 12, 40)]
    assert widths == sorted(widths, reverse=True)


def test_the_model_of_the_paper():
    "Hessian and Gauss-Newton matrix of a network, against their columns"
    x, y = column_noise(40, range(6), seed=0, kind='gauss'), torch.arange(40) % 4
    net = mnist_mlp(seed=0, dtype=f64, widths=(6, 8, 4))
    args = net, torch.nn.CrossEntropyLoss(), None, [(x, y)]
    H, G = HessianLinearOperator(*args), GGNLinearOperator(*args)
    for op, f in ((H, xtrace), (G, xnystrace), (G, xtrace)):
        dense = op @ torch.eye(op.shape[0], dtype=f64)
        e = f(op, 24, seed=0)
        assert abs(e.value - dense.trace()) < 5 * e.std_error + 1e-10
        rows = xrownorms(op, 24, seed=0)
        assert gap(rows, dense.square().sum(1)) < 5 * (rows.std_error.norm() / rows.value.norm())


def test_repr_and_infos():
    A = matrix()
    e, d = xtrace(A, 10, seed=0), xdiag(A, 10, seed=0)
    assert f'{e.value.item():.6g} ±' in repr(e) and '10 products' in repr(e) and float(e) == e.value.item()
    assert '80 numbers' in repr(d) and 'exact' in repr(xdiag(A, 80, seed=0))
    one = estimate_of_draws(torch.ones(3, 1, dtype=f64), positive=True)
    assert (one.std_error == math.inf).all() and (one.low == 0).all() and (one.high == math.inf).all()


def vanishing(A):
    "A, whose products are not finite"
    product = lambda V: (A @ V) * math.nan
    return FunctionLinearOperator(product, A.shape, rmatmat=product, dtype=A.dtype, device=A.device)


@pytest.mark.parametrize('name', EVERY)
def test_refused(name):
    f = EVERY[name][0]
    A = matrix('flat')
    for bad, error, says in [
        (lambda: f(A, 1, seed=0), ValueError, 'matvecs must be an integer at least'),
        (lambda: f(A, 9.5, seed=0), TypeError, 'matvecs must be an integer'),
        (lambda: f(A, True, seed=0), TypeError, 'matvecs'),
        (lambda: f(A, 9, seed=-1), ValueError, 'seed'),
        (lambda: f(A, 9, seed=1.5), TypeError, 'seed'),
        (lambda: f('A', 9, seed=0), TypeError, 'linear operator'),
        (lambda: f(A * math.nan, 9, seed=0), ValueError, 'NaN or infinite'),
        (lambda: f(vanishing(A), 9, seed=0), FloatingPointError, 'not finite'),
        (lambda: f(vanishing(A), 90, seed=0), FloatingPointError, 'not finite'),
    ]:
        with pytest.raises(error, match=says):
            bad()
    if name in ('xtrace', 'xnystrace', 'xdiag'):
        with pytest.raises(ValueError, match='square'):
            f(A[:30], 9, seed=0)
    if name == 'xnystrace':
        with pytest.raises(ValueError, match='negative curvature'):
            f(matrix(positive=False), 9, seed=0)
    if name in ('xdiag', 'frobenius_norm'):
        one_sided = FunctionLinearOperator(lambda V: A @ V, A.shape, dtype=f64, device='cpu')
        with pytest.raises(NotImplementedError, match='transpose'):
            f(one_sided, 9, seed=0)
    assert isinstance(aslinearoperator(A).shape, tuple)
