"""Wrong arguments, made from one table: each is refused by a sentence of our own, before any work is done.

A sentence is our own if the exception was raised by a line of this package, and not by torch, NumPy or SciPy below it.
"""

import math
import os
import random
import traceback
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from torch import nn

import hessian_overlap as ho
from hessian_overlap.curvature import HessianLinearOperator
from hessian_overlap.noise import column_noise

HERE = Path(ho.__file__).parent
f64 = torch.float64
n, k = 24, 4


def matrix(size=n, symmetric=True):
    A = column_noise(size, range(size), seed=0)
    return (A + A.T) / 2 if symmetric else A


def basis(rows=n, columns=k):
    return torch.linalg.qr(column_noise(rows, range(columns), seed=1))[0]


def order():
    return torch.arange(n).flip(0)


def spoiled(t, value):
    t = t.clone()
    t[0, 0] = value
    return t


def net(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 3)).to(dtype)  # 24 parameters


def data(dtype=torch.float32):
    return [(column_noise(6, range(3), seed=2).to(dtype), torch.arange(6) % 3)]


def hessian():
    return HessianLinearOperator(net(), nn.CrossEntropyLoss(), None, data())


def gauss_newton():
    return ho.GGNLinearOperator(net(), nn.CrossEntropyLoss(), None, data())


def mask(**kw):
    return ho.Mask(order(), n=n, k=k, **kw)


def parts():
    return ho.Partition(['a', 'b'], torch.arange(n) // 12)


def state():
    return ho.eigsh(matrix(), k, seed=0, keep_state=True)


BAD = {  # kind of argument -> values that no function can take
    'seed': [1.5, 2**64, -1, '0', None, True, float('nan'), [1], torch.ones(2)],
    'whole': [0, -1, 2.5, '3', True, float('nan'), [3], None],
    'natural': [-1, 2.5, '3', True, float('nan')],  # may be zero
    'size': [0, -1, 2.5, '3', True, n + 1, float('nan')],  # of a part of n
    'ks': [
        torch.tensor([], dtype=torch.int64),
        [],
        torch.tensor([1.5, 2.0]),
        [0, 2],
        [3, 2],
        [2, 2],
        [-1],
        [n + 1],
        'all',
        3.5,
        torch.tensor([[1, 2]]),
    ],
    'order': [
        torch.zeros(n, dtype=torch.int64),
        torch.arange(n - 1),
        torch.arange(n).to(f64),
        torch.arange(n)[None],
        torch.arange(n) + 1,
        list(range(n)),
        np.arange(n),
        'magnitude',
        3,
    ],
    'basis': [
        torch.ones(n, k, dtype=f64),
        torch.zeros(n, k, dtype=f64),
        basis().to(torch.complex128),
        (10 * basis()).to(torch.int64),
        torch.eye(n, k).long(),
        spoiled(basis(), math.nan),
        spoiled(basis(), math.inf),
        basis()[:, :0],
        basis()[:, 0],
        basis().numpy(),
        basis().to('meta'),
        basis()[:, :1].expand(n, k),
        'U',
        None,
    ],
    'operator': [
        torch.ones(n, n + 1, dtype=f64),
        torch.ones(n, dtype=f64),
        torch.ones(n, n, dtype=torch.int64),
        torch.eye(n, dtype=torch.complex128),
        spoiled(torch.eye(n, dtype=f64), math.nan),
        spoiled(torch.eye(n, dtype=f64), math.inf),
        torch.eye(n, dtype=f64).to('meta'),
        [[1.0, 2.0], [2.0, 1.0]],
        'A',
        None,
        3,
    ],
    'symmetric': [matrix(symmetric=False), torch.triu(torch.ones(n, n, dtype=f64))],
    'tolerance': [0, -1, 1.5, float('nan'), '1e-3', True],
    'choice': ['none such', 7, True, ''],
    'curvature': [torch.eye(n), None, 'H', 3],
    'mask': [order(), None, 'mask', torch.zeros(n, dtype=torch.bool)],
    'parts': [[1, 2], 'layer', ho.Partition(['a'], torch.zeros(n - 1, dtype=torch.int64)), 3],
    'dtype': [torch.int64, torch.complex64, 'single', 32, torch.bool],
    'device': ['meta', 'gpu', 17, 'cuda:93'],
    'chunk': [0, -1, 2.5, '3', True],
    'memory': [-1, 0.0, '1GB', float('nan')],
    'strategy': ['fast', 3, True],
    'reduction': ['none', 'average', 3],
    'model': [None, 3, 'mlp', torch.ones(3), nn.Linear(3, 3).to('meta'), lambda x: x],
    'params': [[], {}, [torch.ones(3)], 'head', 3, [1, 2], lambda name, p: False],
    'batches': [
        [],
        torch.ones(3, 3),
        [torch.ones(3, 3)],
        [(torch.ones(6, 3, dtype=f64), torch.arange(6) % 3)],
        [(torch.full((6, 3), math.nan), torch.arange(6) % 3)],
        [(torch.ones(6, 7), torch.arange(6) % 3)],
        [(torch.ones(6, 3), torch.arange(5) % 3)],
        [(torch.ones(6, 3), torch.arange(6))],
        None,
        3,
        [None],
        [(torch.ones(6, 3).to('meta'), torch.arange(6) % 3)],
    ],
    'loss': [None, 3, 'mse', nn.CrossEntropyLoss(reduction='none'), lambda out, y: 3.0, lambda out: out.sum()],
    'angles': [torch.tensor([1, 2]), torch.tensor([-0.1]), torch.tensor([7.0]), torch.tensor([math.nan]), 7, 'x', None],
    'eigvals': [
        torch.ones(3, 3),
        torch.ones(3, dtype=torch.int64),
        torch.tensor([1.0, math.nan]),
        [1.0],
        torch.ones(0),
    ],
    'steps': [[], [1.7], [-1], [2, 5], 'all', 3.5],
}

CASES = {  # function, arguments that are right (each made anew), and the kinds of those that are spoiled
    'eigsh': (ho.eigsh, dict(A=matrix, k=k, seed=0), dict(A='operator', k='size', seed='seed', tol='tolerance')),
    'eigsh, more': (
        ho.eigsh,
        dict(A=matrix, k=k, seed=0),
        dict(
            A='symmetric',
            which='choice',
            block_size='size',
            max_matvecs='whole',
            max_basis='whole',
            basis_dtype='dtype',
        ),
    ),
    'eigsh, mask': (ho.eigsh, dict(A=matrix, k=k, seed=0, mask=mask, tol_overlap=1e-3), dict(tol_overlap='tolerance')),
    'seigh': (ho.seigh, dict(A=matrix, k=k, seed=0), dict(A='operator', k='size', seed='seed', num_outer='size')),
    'seigh, more': (
        ho.seigh,
        dict(A=matrix, k=k, seed=0),
        dict(A='symmetric', num_inner='size', test_matrix='choice', recovery='choice', num_power='natural'),
    ),
    'ssvd': (ho.ssvd, dict(A=matrix, k=k, seed=0), dict(k='size', seed='seed', num_outer='size', num_inner='size')),
    'BlockLanczos': (
        ho.BlockLanczos,
        dict(A=matrix, block_size=2, seed=0),
        dict(A='operator', block_size='size', seed='seed', basis_dtype='dtype'),
    ),
    'Sketch': (
        ho.Sketch,
        dict(n=n, num_outer=6, num_inner=12, seed=0),
        dict(
            n='whole',
            num_outer='size',
            num_inner='size',
            seed='seed',
            test_matrix='choice',
            dtype='dtype',
            device='device',
        ),
    ),
    'TestMatrix': (
        ho.TestMatrix,
        dict(n=n, m=k, seed=0),
        dict(n='whole', m='size', kind='choice', seed='seed', dtype='dtype', device='device'),
    ),
    'overlap_slq': (
        ho.overlap_slq,
        dict(A=matrix, order=order, ks=lambda: torch.tensor([2, 5]), num_probes=2, num_steps=4, seed=0),
        dict(A='operator', order='order', ks='ks', num_probes='whole', num_steps='whole', seed='seed', tol='tolerance'),
    ),
    'overlap_slq_masked': (
        ho.overlap_slq_masked,
        dict(A=matrix, order=order, ks=lambda: torch.tensor([2, 5]), num_probes=2, num_steps=4, seed=0),
        dict(A='operator', order='order', ks='ks', num_probes='whole', num_steps='whole', seed='seed'),
    ),
    'spectral_density': (
        ho.spectral_density,
        dict(A=matrix, num_probes=2, num_steps=4, seed=0),
        dict(A='operator', num_probes='whole', num_steps='whole', seed='seed'),
    ),
    'apost_error': (
        ho.apost_error,
        dict(A=matrix, result=state, seed=0),
        dict(A='operator', num_meas='whole', confidence='tolerance', seed='seed', result='curvature'),
    ),
    'overlap_error': (
        ho.overlap_error,
        dict(result=state, order=order),
        dict(order='order', ks='ks', result='curvature'),
    ),
    'residual_norms': (ho.residual_norms, dict(A=matrix, result=state), dict(A='operator', result='curvature')),
    'apost_bounds': (ho.apost_bounds, dict(num_meas=30), dict(num_meas='whole', confidence='tolerance')),
    'principal_angles': (ho.principal_angles, dict(U=basis, V=basis), dict(U='basis', V='basis')),
    'overlap': (ho.overlap, dict(U=basis, V=basis), dict(U='basis', V='basis')),
    'grassmann_distance': (ho.grassmann_distance, dict(U=basis, V=basis), dict(U='basis', metric='choice')),
    'metric_from_angles': (
        ho.metric_from_angles,
        dict(theta=lambda: torch.rand(3)),
        dict(theta='angles', metric='choice'),
    ),
    'distance_matrix': (ho.distance_matrix, dict(spaces=lambda: [basis(), basis()]), dict(metric='choice')),
    'chance_overlap': (ho.chance_overlap, dict(n=n, k=k), dict(n='whole', k='size')),
    'random_angles': (
        ho.random_angles,
        dict(n=n, k=k, samples=3, seed=0),
        dict(k='size', samples='whole', seed='seed'),
    ),
    'chance_distance': (
        ho.chance_distance,
        dict(n=n, k=k, samples=3, seed=0),
        dict(n='whole', k='size', metric='choice', samples='whole', seed='seed'),
    ),
    'Mask': (ho.Mask, dict(chosen=order, n=n, k=k), dict(chosen='order', k='size')),
    'random_order': (ho.random_order, dict(n=n, seed=0), dict(n='whole', seed='seed')),
    'magnitude_order': (ho.magnitude_order, dict(params=net), dict(scope='choice')),
    'leverage': (ho.leverage, dict(U=basis), dict(U='basis')),
    'best_order': (ho.best_order, dict(U=basis), dict(U='basis')),
    'order_within': (ho.order_within, dict(order=order, group=lambda: torch.arange(n) < 5), dict(order='order')),
    'mask_overlap': (ho.mask_overlap, dict(mask=mask, U=basis), dict(mask='mask', U='basis')),
    'overlap_curve': (ho.overlap_curve, dict(order=order, U=basis), dict(order='order', U='basis', ks='ks')),
    'overlap_table': (ho.overlap_table, dict(order=order, U=basis), dict(order='order', U='basis', sizes='ks')),
    'best_overlap_curve': (ho.best_overlap_curve, dict(U=basis), dict(U='basis', ks='ks')),
    'overlap_split': (
        ho.overlap_split,
        dict(mask=mask, U=basis, parts=parts),
        dict(mask='mask', U='basis', parts='parts'),
    ),
    'overlap_significance': (
        ho.overlap_significance,
        dict(mask=mask, U=basis, samples=99, seed=0),
        dict(mask='mask', U='basis', parts='parts', samples='whole', alternative='choice', seed='seed'),
    ),
    'chance_mask_overlap': (
        ho.chance_mask_overlap,
        dict(mask=mask, U=basis),
        dict(mask='mask', U='basis', parts='parts'),
    ),
    'chance_curve': (ho.chance_curve, dict(U=basis), dict(U='basis', ks='ks')),
    'random_mask': (ho.random_mask, dict(mask=mask, seed=0), dict(mask='mask', parts='parts', seed='seed')),
    'random_mask_distances': (
        ho.random_mask_distances,
        dict(mask=mask, U=basis, samples=3, seed=0),
        dict(mask='mask', U='basis', metric='choice', parts='parts', samples='whole', seed='seed'),
    ),
    'gradient_proxy': (ho.gradient_proxy, dict(H=hessian), dict(H='curvature')),
    'sam_proxy': (ho.sam_proxy, dict(H=hessian), dict(H='curvature', part='choice')),
    'ggn_proxy': (ho.ggn_proxy, dict(G=gauss_newton), dict(G='curvature')),
    'ggn_proxy, probes': (ho.ggn_proxy, dict(G=gauss_newton, probes=3, seed=0), dict(probes='natural', seed='seed')),
    'h2_proxy': (ho.h2_proxy, dict(A=matrix, probes=3, seed=0), dict(A='operator', probes='whole', seed='seed')),
    'SynthOperator': (
        ho.SynthOperator,
        dict(eigvals=lambda: torch.ones(5, dtype=f64), seed=0),
        dict(eigvals='eigvals', seed='seed', dtype='dtype', device='device'),
    ),
    'synth_eigvals': (ho.synth_eigvals, dict(n=n), dict(n='whole', kind='choice')),
    'aslinearoperator': (
        ho.aslinearoperator,
        dict(A=matrix),
        dict(A=['A', None, 3, [[1.0]], torch.ones(3, dtype=f64)]),
    ),
    'HessianLinearOperator': (
        ho.HessianLinearOperator,
        dict(model=net, loss_func=nn.CrossEntropyLoss(), params=None, data=data),
        dict(
            model='model',
            loss_func='loss',
            params='params',
            data='batches',
            chunk_size='chunk',
            memory='memory',
            strategy='strategy',
            reduction='reduction',
        ),
    ),
    'GGNLinearOperator': (
        ho.GGNLinearOperator,
        dict(model=net, loss_func=nn.CrossEntropyLoss(), params=None, data=data),
        dict(model='model', loss_func='loss', params='params', data='batches'),
    ),
    'EFLinearOperator': (
        ho.EFLinearOperator,
        dict(model=net, loss_func=nn.CrossEntropyLoss(), params=None, data=data),
        dict(model='model', loss_func='loss', params='params', data='batches'),
    ),
    'make_problem': (
        ho.make_problem,
        dict(name='mnist_mini', seed=0),
        dict(name='choice', seed='seed', dtype='dtype', device='device'),
    ),
    'train': (
        ho.train,
        dict(problem=lambda: ho.make_problem('mnist_mini', seed=0), steps=3, snapshots=[0]),
        dict(steps='natural', snapshots='steps', problem='curvature'),
    ),
    'load_params': (
        ho.load_params,
        dict(model=net, theta=lambda: torch.ones(n)),
        dict(theta=[torch.ones(3), torch.ones(n, dtype=f64), None, 'x', torch.ones(n, 1), [1.0] * n]),
    ),
}

RIGHT = {  # a right result is given instead; and why
    ('eigsh', 'tol', 0): 'to the rounding of a product',
    ('eigsh, more', 'max_matvecs', 7): 'None is the default',
    ('eigsh, more', 'max_basis', 7): 'None is the default',
    ('Mask', 'chosen', 1): 'any distinct indices are a mask, and there are k among them',
    ('Mask', 'chosen', 5): 'a list of indices',
    ('Mask', 'chosen', 6): 'an array of indices',
}


def spoilt():
    for name, (f, right, kinds) in CASES.items():
        for arg, kind in kinds.items():
            for i, value in enumerate(BAD[kind] if isinstance(kind, str) else kind):
                if (name, arg, i) not in RIGHT:
                    yield pytest.param(f, right, arg, value, id=f'{name}-{arg}-{i}')


def made(value):
    is_maker = callable(value) and not isinstance(value, nn.Module)
    return value() if is_maker else value


@pytest.mark.parametrize(('f', 'right', 'arg', 'value'), spoilt())
def test_wrong_arguments_are_refused_by_a_sentence_of_our_own(f, right, arg, value):
    given = {name: made(v) for name, v in right.items()} | {arg: value}
    with pytest.raises(Exception) as caught:
        f(**given)
    where = traceback.extract_tb(caught.value.__traceback__)[-1].filename
    said = str(caught.value)
    assert isinstance(caught.value, (ValueError, TypeError, FloatingPointError, NotImplementedError)), repr(
        caught.value
    )
    assert Path(where).parent == HERE, f'{Path(where).name} raised {caught.value!r}'
    assert len(said) > 15 and '\n' not in said, said


@pytest.mark.parametrize('name', CASES)
def test_right_arguments_are_taken(name):
    f, right, _ = CASES[name]
    f(**{arg: made(v) for arg, v in right.items()})


def state_of_the_process():
    "All that a function could change for the rest of the program"
    figures = tuple(plt.get_fignums())
    return dict(
        torch_generator=tuple(torch.get_rng_state().tolist()),
        numpy_generator=str(np.random.get_state()),
        python_generator=random.getstate(),
        environment=dict(os.environ),
        modes=(
            torch.get_num_threads(),
            torch.get_default_dtype(),
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
        ),
        deterministic=(torch.are_deterministic_algorithms_enabled(), torch.get_float32_matmul_precision()),
        filters=tuple(warnings.filters),
        figures=figures,
        call=nn.Module.__call__,
        folder=os.getcwd(),
    )


@pytest.mark.parametrize('name', CASES)
def test_nothing_global_changes(name):
    f, right, _ = CASES[name]
    given = {arg: made(v) for arg, v in right.items()}
    before = state_of_the_process()
    f(**given)
    after = state_of_the_process()
    assert not [what for what in before if before[what] != after[what]]


def test_there_are_many():
    assert sum(1 for _ in spoilt()) >= 600
