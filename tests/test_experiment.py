"A whole run: the same numbers however often it is interrupted, nothing overwritten, a sentence for everything wrong."

import contextlib
import copy
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch

import hessian_overlap.experiment as ex
from hessian_overlap.experiment import default_snapshots, main, mask_seed, run_overlap
from hessian_overlap.masks import magnitude_order, random_order
from hessian_overlap.overlaps import overlap_curve
from hessian_overlap.problems import Problem, make_problem
from hessian_overlap.record import OverlapRecord, compare

SMALL = ['--k', '12', '--samples', '100', '--device', 'cpu', '--num-random', '2']
LONGER = ['--k', '80', '--samples', '500']  # so that there is something to interrupt
QUIET = {**os.environ, 'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'agg', 'CUDA_VISIBLE_DEVICES': ''}


def own(lr=0.5, seed=0, hidden=5):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(200, 3, generator=g, dtype=torch.float64)
    y = (x[:, 0] + x[:, 1] * x[:, 2] > 0).long()
    net = torch.nn.Sequential(torch.nn.Linear(3, hidden), torch.nn.Tanh(), torch.nn.Linear(hidden, 2)).double().eval()
    with torch.no_grad():
        for p in net.parameters():
            p.copy_(torch.randn(p.shape, generator=g, dtype=torch.float64) / 2)
    return Problem(
        'mine',
        net,
        torch.nn.CrossEntropyLoss(),
        x[:150],
        y[:150],
        x[150:],
        y[150:],
        batch_size=50,
        lr=lr,
        num_classes=2,
        seed=0,
        source='drawn here',
    )


ASK = dict(steps=10, snapshots=[0, 5, 10], k=6, samples=30, num_random=3, seed=0, progress=False)


# ------------------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize(
    'steps, want',
    [
        (0, [0]),
        (1, [0, 1]),
        (50, [0, 50]),
        (99, [0, 50, 99]),
        (100, [0, 50, 100]),
        (1000, [0, 50, *range(100, 1001, 100)]),
        (1050, [0, 50, *range(100, 1001, 100), 1050]),
    ],
)
def test_default_snapshots(steps, want):
    assert default_snapshots(steps) == want


def dense(p, theta, split, samples):
    "The Hessian by torch.func, as an oracle"
    from torch.func import functional_call, hessian

    names = [k for k, _ in p.model.named_parameters()]
    sizes = [v.numel() for v in p.params]
    shapes = [v.shape for v in p.params]
    ((x, y),) = p.hessian_data(split, samples)
    f = lambda t: p.loss_func(
        functional_call(p.model, {k: v.view(s) for k, v, s in zip(names, t.split(sizes), shapes)}, (x,)), y
    )
    return hessian(f)(theta)


def test_against_the_dense_hessian():
    p = own()
    r = run_overlap(p, **ASK)
    run = ex.train(p, 10, [0, 5, 10])
    for i, theta in enumerate(run.thetas):
        for s, split in enumerate(('train', 'test')):
            lam, V = torch.linalg.eigh(dense(p, theta, split, 30))
            top = lam.abs().argsort(descending=True)[:6]
            U = V[:, top]
            np.testing.assert_allclose(r.eigvals[i, s], lam[top], rtol=1e-6)
            order = theta.abs().argsort(descending=True)
            want = [(U[order[:j], :j] ** 2).sum() / j for j in range(1, 7)]
            np.testing.assert_allclose(r.magnitude[i, s], want, atol=1e-5)
            best = [(U[:, :j] ** 2).sum(1).sort(descending=True).values[:j].sum() / j for j in range(1, 7)]
            np.testing.assert_allclose(r.best[i, s], best, atol=1e-5)
            for q in range(3):
                order = random_order(p.n_params, seed=mask_seed(0, q))
                np.testing.assert_allclose(
                    r.random[i, s, q], [(U[order[:j], :j] ** 2).sum() / j for j in range(1, 7)], atol=1e-5
                )
    assert r.converged.all() and (r.residuals < 1e-4).all() and (np.diff(np.abs(r.eigvals)) <= 1e-12).all()
    assert (
        (r.best >= r.magnitude - 1e-12).all()
        and r.steps.tolist() == [0, 5, 10]
        and (r.train_loss == run.train_loss).all()
    )


def test_the_problem_is_left_as_it_is():
    p = own()
    before = copy.deepcopy(p.model.state_dict())
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    run_overlap(p, **ASK)
    assert all(torch.equal(v, before[k]) for k, v in p.model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state[0]) and (np.random.get_state()[1] == state[1]).all()


def test_seeds():
    a, b, c = (run_overlap(own(), **ASK | dict(seed=s)) for s in (0, 0, 1))
    assert compare(a, b) == {} and {'random', 'seed'} <= compare(a, c).keys()
    assert (
        compare(a, c)['eigvals'] < 1e-6 if 'eigvals' in compare(a, c) else True
    )  # another start, the same eigenvalues
    assert len({mask_seed(s, i) for s in range(20) for i in range(50)}) == 1000


def test_no_random_masks():
    assert run_overlap(own(), **ASK | dict(num_random=0)).random.shape == (3, 2, 0, 6)


def test_a_sketch_does_not_pass_for_converged():
    r = run_overlap(own(), **ASK | dict(method='seigh', num_outer=8, num_inner=16))
    assert (
        not r.converged.any()
        and np.isnan(r.residuals).all()
        and (r.matvecs == 16).all()
        and (r.settings['num_outer'], r.settings['tol']) == (8, None)
    )


def test_nothing_is_written_without_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_overlap(own(), **ASK)
    assert not list(tmp_path.iterdir())


# ----------------------------------------------------------------------------- without eigenvectors


class Kill(BaseException):
    pass


WIDE = dict(
    steps=5,
    snapshots=[0, 5],
    samples=30,
    num_random=3,
    seed=0,
    progress=False,
    method='slq',
    num_probes=4,
    num_steps=20,
)  # of own(hidden=60), 362 parameters


def wide():
    return own(hidden=60)


def quiet(f, *a, **kw):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore', RuntimeWarning)
        return f(*a, **kw)


def test_quadrature_agrees_with_the_dense_hessian():
    "Within the interval, for magnitude, layers and random masks; thresholds, tables and layers too"
    p = wide()
    n = p.n_params
    r = quiet(run_overlap, p, **WIDE, ks=[2, 5, 20, 60, 150])
    run = ex.train(p, 5, [0, 5])
    hits = trials = 0
    for i, theta in enumerate(run.thetas):
        for s, split in enumerate(('train', 'test')):
            lam, V = torch.linalg.eigh(dense(p, theta, split, 30))
            top = lam.abs().argsort(descending=True)
            lam, U = lam[top], V[:, top]
            order = theta.abs().argsort(descending=True)
            truth = np.array([(U[order[:k], :k] ** 2).sum() / k for k in r.ks.tolist()])
            low, high, trusted = r.interval('magnitude', int(r.steps[i]), split)
            hits, trials = hits + ((low - 1e-4 <= truth) & (truth <= high + 1e-4) | ~trusted).sum(), trials + 5
            np.testing.assert_allclose(r.eigvals[i, s, :2], lam[[1, 4]], rtol=2e-2)
            m, q = r.sizes.tolist().index(60), r.ranks.tolist().index(20)
            want = (U[order[:60], :20] ** 2).sum(1)  # per parameter
            assert abs(r.overlaps[i, s, 0, m, q] - want.sum() / 20) <= 2 * r.half[i, s, 0, m, q] + 1e-3
            np.testing.assert_allclose(r.layers[i, s, 0].sum(-1), r.overlaps[i, s, 0], atol=1e-3)
            for o in range(3):
                np.testing.assert_allclose(
                    r.random[i, s, o, :3],
                    [(U[random_order(n, seed=mask_seed(0, o))[:k], :k] ** 2).sum() / k for k in (2, 5, 20)],
                    atol=0.05,
                )
    assert (
        hits >= 0.9 * trials
        and r.masks == ('magnitude', 'random', 'layerwise')
        and (r.matvecs == 80).all()
        and np.isnan(r.residuals).all()
        and np.isnan(r.best).all()
    )
    assert (
        (r.low <= np.stack([r.magnitude, r.extra[:, :, 0]], 2))
        & (np.stack([r.magnitude, r.extra[:, :, 0]], 2) <= r.high)
    ).all() and (r.converged == r.trusted[:, :, 0].all(-1)).all()
    diagonal = [r.overlaps[:, :, 0, r.sizes.tolist().index(k), j] for j, k in enumerate(r.ranks.tolist())]
    np.testing.assert_allclose(np.moveaxis(diagonal, 0, -1), r.magnitude, atol=1e-9)
    np.testing.assert_allclose(r.overlaps[:, :, :, -1], 1, atol=1e-9)
    np.testing.assert_allclose(r.available.sum(-1), 1, atol=1e-9)


def test_quadrature_agrees_with_eigsh_where_both_know_k():
    a, b = (
        quiet(run_overlap, wide(), **WIDE),
        run_overlap(wide(), steps=5, snapshots=[0, 5], samples=30, num_random=3, seed=0, progress=False, k=30),
    )
    both = a.ks[a.ks <= 30]
    assert a.k == 72 and len(both) >= 5 and (a.train_loss == b.train_loss).all()
    J = len(both)
    for y, low, high, t in (
        (b.magnitude, a.low[:, :, 0], a.high[:, :, 0], a.trusted[:, :, 0]),
        (b.extra[:, :, 0], a.low[:, :, 1], a.high[:, :, 1], a.trusted[:, :, 1]),
    ):
        y = y[..., both - 1]
        assert ((low[..., :J] - 1e-3 <= y) & (y <= high[..., :J] + 1e-3) | ~t[..., :J]).mean() >= 0.95 and t[
            ..., :J
        ].mean() > 0.7
    np.testing.assert_allclose(a.random[..., :2], b.random[..., both[:2] - 1], atol=5e-3)  # the same random masks


def test_quadrature_is_resumed_with_the_same_numbers(tmp_path, monkeypatch):
    s = WIDE | dict(k=60)
    full = quiet(run_overlap, wide(), **s, out=tmp_path / 'full')
    d = tmp_path / 'cut'
    real, done = ex.measure, []

    def cut(*a, **k):
        if len(done) == 2:
            raise Kill
        done.append(a[2])
        return real(*a, **k)

    with monkeypatch.context() as m:
        m.setattr(ex, 'measure', cut)
        with pytest.raises(Kill):
            quiet(run_overlap, wide(), **s, out=d)
    part = d / 'parts' / 'step000000_test.npz'
    part.write_bytes(part.read_bytes()[:-20])
    said = []
    again = quiet(run_overlap, wide(), **s, out=d, echo=said.append)
    assert compare(full, again) == {} == compare(OverlapRecord.load(d), full) and any(
        'resuming' in o and '1 of 4 parts' in o for o in said
    )  # the damaged one is made again
    assert [o for o in again.table().splitlines()[:2]] == [l for o in said for l in o.splitlines() if 'k=' in o][
        :2
    ] and (again.seconds[0, 0] != full.seconds[0, 0])
    (d / 'record.json').unlink()
    for change, says in [
        (dict(num_steps=21), 'num_steps = 20 there and 21 here'),
        (dict(num_probes=5), 'num_probes = 4 there and 5'),
        (dict(ks=[2, 60]), r'ks = \[1, .* there and \[2, 60\] here'),
        (dict(method='eigsh', num_probes=None, num_steps=None), "method = 'slq' there and 'eigsh' here"),
    ]:
        with pytest.raises(ValueError, match=says) as e:
            run_overlap(wide(), **s | change, out=d)
        assert '\n' not in str(e.value)


def test_a_run_that_an_earlier_version_began_is_resumed(tmp_path):
    "Whose settings do not have the names of quadrature"
    full = run_overlap(own(), **ASK, out=tmp_path)
    (tmp_path / 'record.json').unlink()
    (tmp_path / 'parts' / 'step000005_test.npz').unlink()
    f = tmp_path / 'settings.json'
    was = json.loads(f.read_text())
    f.write_text(json.dumps({k: v for k, v in was.items() if k not in ('num_probes', 'num_steps', 'ks')}))
    assert len(was) > len(json.loads(f.read_text()))
    assert compare(run_overlap(own(), **ASK, out=tmp_path), full) == {}


def test_a_part_of_another_method_does_not_pass(tmp_path):
    s = WIDE | dict(k=60)
    full = quiet(run_overlap, wide(), **s, out=tmp_path / 'slq')
    run_overlap(
        wide(), **{k: v for k, v in s.items() if k not in ('method', 'num_probes', 'num_steps')}, out=tmp_path / 'eigsh'
    )
    (tmp_path / 'slq' / 'record.json').unlink()
    f = 'parts/step000005_test.npz'
    (tmp_path / 'slq' / f).write_bytes((tmp_path / 'eigsh' / f).read_bytes())
    assert compare(quiet(run_overlap, wide(), **s, out=tmp_path / 'slq'), full) == {}


@pytest.mark.parametrize(
    'kw, says',
    [
        (dict(ks=[]), 'ks must ascend and not be empty'),
        (dict(ks=[3, 3]), 'ks must ascend'),
        (dict(ks=[0, 3]), 'one of ks must be .*1 and at most 361, got 0'),
        (dict(ks=[3, 362]), 'one of ks|goes up to'),
        (dict(ks=[2.5]), '2.5'),
        (dict(ks=[3, 9], k=8), 'k = 8 is not the last of ks, 9'),
        (dict(num_steps=89), '89 blocks of 4 probes do not fit into 362 parameters, 88 do'),
        (dict(num_probes=0, num_steps=None), 'num_probes must be'),
        (dict(method='eigsh'), 'num_probes is a setting of slq; the method is eigsh'),
        (dict(method='seigh', num_probes=None, num_steps=None, ks=[3]), 'ks is a setting of slq; the method is seigh'),
        (dict(block_size=3), 'block_size is a setting of eigsh'),
    ],
    ids=str,
)
def test_wrong_settings_of_quadrature(kw, says, tmp_path):
    with pytest.raises(ValueError, match=says) as e:
        run_overlap(wide(), **WIDE | kw, out=tmp_path / 'r')
    assert '\n' not in str(e.value) and not (tmp_path / 'r').exists()


def test_defaults_of_quadrature():
    s = ex.run_settings(
        make_problem('mnist_mini', seed=0, device='cpu'),
        steps=0,
        snapshots=None,
        k=None,
        samples=500,
        method='slq',
        num_random=10,
        seed=0,
    )
    assert (s['k'], s['num_probes'], s['num_steps'], s['ks'][0], s['ks'][-1], len(s['ks'])) == (
        1406,
        8,
        80,
        7,
        1406,
        20,
    ) and s['tol'] is s['num_outer'] is None
    for n, k in ((10, 1), (100, 99), (7030, 350), (10**7, 350), (10**7, 5 * 10**6)):
        ks = ex.default_ks(n, k)
        assert ks == sorted(set(ks)) and ks[-1] == k and 1 <= ks[0] <= max(1, n / 1000) and len(ks) <= 20
    assert quiet(run_overlap, wide(), **WIDE | dict(ks=torch.tensor([2, 9]), snapshots=[0])).ks.tolist() == [2, 9]
    with pytest.raises(TypeError, match="'probes' is not a setting"):
        ex.solver_settings(100, 3, 'slq', probes=3)


def test_one_warning_a_part_says_what_is_not_resolved():
    with pytest.warns(RuntimeWarning, match='raise num_steps') as said:
        r = run_overlap(wide(), **WIDE | dict(num_steps=4, k=150, snapshots=[5]))
    said = [str(w.message) for w in said if w.category is RuntimeWarning]
    assert (
        1 <= len(said) <= 2
        and all('not resolved at' in o and 'raise num_steps' in o for o in said)
        and not r.converged.all()
        and r.table().splitlines()[-1].startswith('* not resolved')
    )


def test_quadrature_from_the_command_line(tmp_path):
    "In a process of its own, to the figures; and printed again"
    d = tmp_path / 'run'
    a = cli(
        'run',
        'mnist_mini',
        '--method',
        'slq',
        '--k',
        700,
        '--num-probes',
        4,
        '--num-steps',
        30,
        '--steps',
        20,
        '--samples',
        100,
        '--num-random',
        2,
        '--device',
        'cpu',
        '--out',
        d,
    )
    assert a.returncode == 0 and 'Traceback' not in a.stderr and 'Warning' not in a.stderr, a.stderr
    r = OverlapRecord.load(d)
    assert (
        (r.method, r.k, r.ks[-1], r.settings['num_probes'], r.settings['num_steps']) == ('slq', 700, 700, 4, 30)
        and (r.matvecs == 120).all()
        and r.steps.tolist() == [0, 20]
    )
    b = cli('show', d)
    assert (
        b.returncode == 0
        and not b.stderr
        and r.table() in b.stdout
        and all(l in a.stdout for l in r.table().splitlines())
        and '±' in b.stdout
        and f'in [{r.low[1, 1, 0, -1]:.4f}' in b.stdout
    )
    assert all(
        (d / 'figures' / f'{f}.png').read_bytes()[:4] == b'\x89PNG'
        for f in ('overlap_over_training', 'overlap_curve', 'spectrum')
    )


def test_any_method_for_a_model_as_it_is():
    p = wide()
    data = dict(train=p.hessian_data('train', 30), test=p.hessian_data('test', 30))
    get = lambda **kw: quiet(ex.overlap_record, p.model, p.loss_func, data, seed=0, num_random=2, **kw)
    a, b, c = (
        get(k=30),
        get(k=30, method='seigh'),
        get(k=60, method='slq', num_probes=4, ks=[5, 30, 60], orders=dict(mine=torch.arange(p.n_params))),
    )
    assert (
        a.converged.all()
        and not b.converged.any()
        and c.masks == ('magnitude', 'random', 'layerwise', 'mine')
        and c.low.shape == (1, 2, 3, 3)
        and c.settings['num_steps'] == 80
        and a.settings['tol'] == 1e-5
    )
    assert abs(c.magnitude[..., 0] - a.magnitude[..., 4]).max() < 5e-3 and (c.train_loss == a.train_loss).all()
    for kw, says in [
        (dict(k=3, method='slq', tol=1e-3), 'tol is a setting of eigsh'),
        (dict(k=3, num_steps=5), 'num_steps is a setting of slq'),
        (dict(k=400), 'k = 400 is more than the n = 362 parameters of Sequential'),
    ]:
        with pytest.raises(ValueError, match=says):
            get(**kw)


# ------------------------------------------------------------------------------------ interruptions


def writes_of_a_run(tmp_path, monkeypatch):
    seen, real = [], os.replace
    monkeypatch.setattr(os, 'replace', lambda a, b: (seen.append(Path(b).name), real(a, b))[1])
    r = run_overlap(own(), **ASK, out=tmp_path)
    monkeypatch.undo()
    return r, [s for s in seen if s]


def test_killed_before_and_after_every_write(tmp_path, monkeypatch):
    "Whichever write is the last that gets through, the next run finishes with the same numbers"
    full, writes = writes_of_a_run(tmp_path / 'full', monkeypatch)
    assert {'settings.json', 'snapshots.npz', 'record.npz', 'record.json'} < set(writes) and len(writes) >= 10
    for i in range(len(writes)):
        for after in (False, True):
            d, count, real = tmp_path / f'{i}{after}', [0], os.replace

            def replace(a, b, i=i, after=after, count=count, real=real):
                count[0] += 1
                if count[0] == i + 1:
                    if after:
                        real(a, b)
                    raise Kill
                return real(a, b)

            with monkeypatch.context() as m:
                m.setattr(os, 'replace', replace)
                m.setattr(Path, 'unlink', lambda *a, **k: None)  # a killed process tidies nothing up
                with pytest.raises(Kill):
                    run_overlap(own(), **ASK, out=d)
            if (d / 'record.json').exists():
                assert i == len(writes) - 1 and after
            else:
                assert compare(run_overlap(own(), **ASK, out=d), full) == {}, (i, after)
            assert compare(OverlapRecord.load(d), full) == {}


@pytest.mark.parametrize('file', ['snapshots.npz', 'parts/step000005_test.npz'])
@pytest.mark.parametrize(
    'damage',
    [
        lambda b: b'',
        lambda b: b[: len(b) // 2],
        lambda b: b[:90] + bytes([b[90] ^ 255]) + b[91:],
        lambda b: b'x' * len(b),
    ],
    ids=['empty', 'half', 'flip', 'junk'],
)
def test_damaged_parts_are_made_again(file, damage, tmp_path):
    full = run_overlap(own(), **ASK, out=tmp_path)
    (tmp_path / 'record.json').unlink()
    (tmp_path / file).write_bytes(damage((tmp_path / file).read_bytes()))
    assert compare(run_overlap(own(), **ASK, out=tmp_path), full) == {}


def test_a_finished_part_is_not_computed_again(tmp_path, monkeypatch):
    full = run_overlap(own(), **ASK, out=tmp_path)
    (tmp_path / 'record.json').unlink()
    (tmp_path / 'parts' / 'step000005_test.npz').unlink()
    done, real = [], ex.measure
    monkeypatch.setattr(ex, 'measure', lambda *a, **k: (done.append(a[2]), real(*a, **k))[1])
    monkeypatch.setattr(ex, 'train', None)
    again = run_overlap(own(), **ASK, out=tmp_path)
    assert done == ['test'] and compare(full, again) == {} and (again.seconds != full.seconds).sum() == 1


def test_a_resumed_run_multiplies_as_it_began(tmp_path, monkeypatch):
    "Above 65,536 parameters the fastest way is measured, once for all parts and for those of a later process"
    used, real, H = [], ex.measure, ex.HessianLinearOperator
    problem, ask = own(hidden=11000), ASK | dict(steps=5, snapshots=[0, 5], k=2)
    assert problem.n_params >= 2**16
    monkeypatch.setattr(ex, 'measure', lambda *a: (used.append(a[-1]), real(*a))[1])
    monkeypatch.setattr(H, '_measure', lambda self, V: 'batched')
    full = run_overlap(problem, **ask, out=tmp_path / 'full')
    assert json.loads((tmp_path / 'full' / 'strategy.json').read_text()) == 'batched' and used == ['batched'] * 4
    (tmp_path / 'full' / 'record.json').unlink()
    for o in ('000000_test', '000005_train'):
        (tmp_path / 'full' / 'parts' / f'step{o}.npz').unlink()
    monkeypatch.setattr(H, '_measure', lambda self, V: 'single')
    assert compare(run_overlap(problem, **ask, out=tmp_path / 'full'), full) == {} and used == ['batched'] * 6
    (tmp_path / 'full' / 'record.json').unlink()
    (tmp_path / 'full' / 'strategy.json').write_text('damaged')
    assert (
        compare(run_overlap(problem, **ask, out=tmp_path / 'full'), full) == {} and len(used) == 6
    )  # nothing is left to do
    run_overlap(problem, **ask, out=tmp_path / 'full', overwrite=True)
    assert json.loads((tmp_path / 'full' / 'strategy.json').read_text()) == 'single' and used[6:] == ['single'] * 4
    assert ex._strategy(own(), own().theta0, dict(n=27), None) is None


def cli(*argv, **kw):
    return subprocess.run(
        [sys.executable, '-m', 'hessian_overlap', *map(str, argv)], capture_output=True, text=True, env=QUIET, **kw
    )


def start(d, *more):
    return subprocess.Popen(
        [
            sys.executable,
            '-m',
            'hessian_overlap',
            'run',
            'mnist_mini',
            *SMALL,
            '--steps',
            '100',
            '--out',
            str(d),
            *more,
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=QUIET,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # a job in the background ignores it, and its children would


def wait_for(p, d, parts):
    "Until the run has settings and this many parts"
    end = time.time() + 120
    while (
        time.time() < end
        and p.poll() is None
        and not ((d / 'settings.json').exists() and len(list(d.glob('parts/*.npz'))) >= parts)
    ):
        time.sleep(0.005)
    assert p.poll() is None, p.communicate()


def test_kill_9_and_ctrl_c(tmp_path):
    "A process killed three times, once before its first part, then interrupted, ends with the record of one left alone"
    full = cli('run', 'mnist_mini', *SMALL, *LONGER, '--steps', 100, '--out', tmp_path / 'full')
    assert full.returncode == 0, full.stderr
    d = tmp_path / 'killed'
    for parts in (0, 1, 3):
        p = start(d, *LONGER)
        wait_for(p, d, parts)
        p.send_signal(signal.SIGKILL)
        p.communicate()
        assert not (d / 'record.json').exists()
    p = start(d, *LONGER)
    wait_for(p, d, 4)
    p.send_signal(signal.SIGINT)
    out, err = p.communicate()
    assert p.returncode == 130 and 'Traceback' not in err and 'takes the run up again' in err.splitlines()[-1]
    unfinished = cli('show', d)
    assert unfinished.returncode == 2 and re.search('not finished .[45] of 6 parts', unfinished.stderr)
    last = cli('run', 'mnist_mini', *SMALL, *LONGER, '--steps', 100, '--out', d)
    assert last.returncode == 0 and re.search('resuming .*: [45] of 6 parts are there', last.stdout), last.stderr
    assert compare(OverlapRecord.load(tmp_path / 'full'), OverlapRecord.load(d)) == {}
    assert sorted(
        o.relative_to(d).as_posix() for o in d.rglob('*') if o.is_file() and not o.name.startswith('.')
    ) == sorted(o.relative_to(tmp_path / 'full').as_posix() for o in (tmp_path / 'full').rglob('*') if o.is_file())
    for f in ('overlap_over_training', 'overlap_curve', 'spectrum'):
        png = (d / 'figures' / f'{f}.png').read_bytes()
        assert png[:4] == b'\x89PNG' and f'{f}.png' in last.stdout


# --------------------------------------------------------------------------------- the command line


def call(*argv):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main([str(o) for o in argv])
    return (
        code,
        out.getvalue(),
        ''.join(l for l in err.getvalue().splitlines(True) if l.startswith('hessian-overlap:')),
        err.getvalue(),
    )


@pytest.fixture(scope='module')
def done(tmp_path_factory):
    d = tmp_path_factory.mktemp('runs') / 'done'
    code, out, said, err = call('run', 'mnist_mini', *SMALL, '--steps', 0, '--out', d)
    assert code == 0, err
    return d, out


def test_a_run_prints_its_table_and_says_where_the_figures_are(done):
    d, out = done
    r = OverlapRecord.load(d)
    for line in r.table().splitlines()[:4]:
        assert line in out  # the rows printed as it went are those of the record
    for f in sorted((d / 'figures').iterdir()):
        assert str(f) in out
    assert len(list((d / 'figures').iterdir())) == 3 and 'matvecs' in out and str(d) in out


def test_show_draws_again_without_computing(done, monkeypatch):
    d, _ = done
    before = {f.name: f.read_bytes() for f in d.rglob('*') if f.is_file()}
    for f in (d / 'figures').iterdir():
        f.unlink()
    for name in ('train', 'eigsh', 'seigh', 'measure', 'make_problem'):
        monkeypatch.setattr(ex, name, None)
    code, out, said, err = call('show', d)
    assert code == 0 and not err and OverlapRecord.load(d).table() in out and 'overlap_curve.png' in out
    assert {f.name for f in d.rglob('*') if f.is_file()} == before.keys() and all(
        (d / n).read_bytes() == before[n] for n in ('record.json', 'record.npz', 'settings.json')
    )


def test_a_finished_run_is_not_overwritten_in_silence(done):
    d, _ = done
    before = {f: (f.read_bytes(), f.stat().st_mtime_ns) for f in d.rglob('*') if f.is_file()}
    for more in ([], ['--k', '13']):
        code, out, said, err = call('run', 'mnist_mini', *SMALL, '--steps', 0, '--out', d, *more)
        assert (
            code == 2
            and 'holds a finished run' in said
            and f'hessian-overlap show {d}' in said
            and '--overwrite' in said
        )
    assert before == {f: (f.read_bytes(), f.stat().st_mtime_ns) for f in d.rglob('*') if f.is_file()}


def test_overwrite_removes_only_a_run(tmp_path):
    d = tmp_path / 'run'
    assert call('run', 'mnist_mini', *SMALL, '--steps', 10, '--out', d)[0] == 0
    (d / 'notes.txt').write_text('mine')
    assert call('run', 'mnist_mini', *SMALL, '--steps', 0, '--out', d, '--overwrite', '--seed', 3)[0] == 0
    assert (
        OverlapRecord.load(d).seed == 3
        and len(list(d.glob('parts/*.npz'))) == 2
        and (d / 'notes.txt').read_text() == 'mine'
    )


def test_other_settings_are_refused_by_name(tmp_path):
    d = tmp_path / 'run'
    s = dict(ASK, out=d)
    run_overlap(own(), **s)
    (d / 'record.json').unlink()
    before = sorted(d.rglob('*'))
    for change, says in [
        (dict(k=7), 'k = 6 there and 7 here'),
        (dict(seed=1), 'seed = 0 there and 1 here'),
        (dict(tol=1e-3), 'tol = 1e-05 there and 0.001 here'),
        (dict(method='seigh'), "method = 'eigsh' there"),
        (dict(snapshots=[0, 10]), r'snapshots = \[0, 5, 10\] there'),
        (dict(num_random=4), 'num_random = 3'),
        (dict(samples=20), 'samples = 30 there'),
    ]:
        with pytest.raises(ValueError, match=says) as e:
            run_overlap(own(), **s | change)
        assert '\n' not in str(e.value) and 'begun with other settings' in str(e.value)
    for p, says in [
        (own(lr=0.1), 'lr = 0.5 there and 0.1'),
        (own(seed=1), 'parameters = .*data = '),
        (own(hidden=6), 'n = 32 there and 38'),
    ]:
        with pytest.raises(ValueError, match=says):
            run_overlap(p, **s)
    assert sorted(d.rglob('*')) == before


def test_threads_are_a_setting(tmp_path):
    "Another number of threads adds in another order, so a run is not mixed from two"
    was = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        run_overlap(own(), **ASK, out=tmp_path)
        (tmp_path / 'record.json').unlink()
        torch.set_num_threads(2)
        with pytest.raises(ValueError, match='threads = 1 there and 2 here'):
            run_overlap(own(), **ASK, out=tmp_path)
    finally:
        torch.set_num_threads(was)


def argv(*more):
    return ['run', 'mnist_mini', *SMALL, '--steps', '0', *more]


BAD = {
    'no command': ([], 'no command'),
    'unknown command': (['walk'], "unknown command 'walk'"),
    'no problem': (['run'], 'problem'),
    'unknown problem': (['run', 'imagenet'], "unknown problem 'imagenet'; known: mnist_mini"),
    'k above n': (argv('--k', '7031'), 'k = 7031 is more than the n = 7030'),
    'k zero': (argv('--k', '0'), 'k must be .*, got 0'),
    'k negative': (argv('--k=-3'), 'got -3'),
    'k no number': (argv('--k', 'ten'), 'ten'),
    'k a fraction': (argv('--k', '2.5'), '2.5'),
    'steps': (argv('--steps=-1'), 'steps must be'),
    'samples not divisible': (argv('--samples', '105'), 'samples=105'),
    'samples zero': (argv('--samples', '0'), 'samples'),
    'samples too many': (argv('--samples', '5000'), 'samples=5000'),
    'method': (argv('--method', 'power'), "unknown method 'power'; choose eigsh, seigh or slq"),
    'dtype': (argv('--dtype', 'float16'), "unknown dtype 'float16'"),
    'device': (argv('--device', 'tpu9'), "device 'tpu9' cannot be used"),
    'no such gpu': (argv('--device', 'cuda:99'), "device 'cuda:99' cannot be used"),
    'seed': (argv('--seed=-1'), 'seed'),
    'seed too large': (argv('--seed', str(2**40)), 'seed'),
    'inner below outer': (
        argv('--method', 'seigh', '--num-outer', '30', '--num-inner', '20'),
        'num_inner = 20 is less than num_outer = 30',
    ),
    'outer below k': (argv('--method', 'seigh', '--num-outer', '11'), 'num_outer must be .*12'),
    'inner above n': (argv('--method', 'seigh', '--num-inner', '8000'), 'num_inner must be .*7030'),
    'outer for eigsh': (argv('--num-outer', '30'), 'num_outer is a setting of seigh'),
    'steps for eigsh': (argv('--num-steps', '30'), 'num_steps is a setting of slq; the method is eigsh'),
    'probes for seigh': (
        argv('--method', 'seigh', '--num-probes', '4'),
        'num_probes is a setting of slq; the method is seigh',
    ),
    'tol for slq': (argv('--method', 'slq', '--tol', '1e-3'), 'tol is a setting of eigsh; the method is slq'),
    'outer for slq': (
        argv('--method', 'slq', '--num-outer', '30'),
        'num_outer is a setting of seigh; the method is slq',
    ),
    'no probe': (argv('--method', 'slq', '--num-probes', '0'), 'num_probes must be .*1 and at most 7030, got 0'),
    'three steps': (argv('--method', 'slq', '--num-steps', '3'), 'num_steps must be .*4, got 3'),
    'no room': (
        argv('--method', 'slq', '--num-steps', '900'),
        '900 blocks of 8 probes do not fit into 7030 parameters, 876 do',
    ),
    'probes without room': (
        argv('--method', 'slq', '--num-probes', '2000'),
        'slq with 2000 probes needs at least 12000',
    ),
    'slq at n': (argv('--method', 'slq', '--k', '7030'), 'slq goes up to k = 7029'),
    'slq above n': (argv('--method', 'slq', '--k', '7031'), 'k = 7031 is more than'),
    'steps a fraction': (argv('--method', 'slq', '--num-steps', '4.5'), '4.5'),
    'tol for seigh': (argv('--method', 'seigh', '--tol', '1e-3'), 'tol is a setting of eigsh'),
    'tol zero': (argv('--tol', '0'), 'tol must be'),
    'tol nan': (argv('--tol', 'nan'), 'tol must be'),
    'tol negative': (argv('--tol=-1e-3'), 'tol must be'),
    'threads zero': (argv('--threads', '0'), 'threads must be'),
    'block zero': (argv('--block-size', '0'), 'block_size must be'),
    'random masks': (argv('--num-random=-1'), 'num_random'),
    'root': (argv('--root', '/nonexistent'), 'sha256.*/nonexistent'),
    'unknown option': (argv('--kk', '3'), 'kk'),
    'unwritable': (argv('--out', '/proc/runs/x'), 'cannot write to /proc/runs/x'),
    'two problems': (['run', 'mnist_mini', 'other'], 'other'),
    'show nothing': (['show'], 'run'),
    'show missing': (['show', 'nowhere'], 'no record in nowhere'),
}


@pytest.mark.parametrize('case', BAD)
def test_bad_input_gives_one_sentence(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ex, 'train', None)  # none of these gets as far as training
    args, says = BAD[case]
    code, out, said, err = call(*args)
    assert code == 2 and err == said and said.count('\n') == 1 and re.search(says, said), err
    assert not list(tmp_path.iterdir())  # and none leaves anything behind


def damaged(d, file, f):
    (d / file).write_bytes(f((d / file).read_bytes()))
    return d


@pytest.mark.parametrize(
    'file, f, says',
    [
        ('record.npz', lambda b: b[:-9], 'record.npz is damaged'),
        ('record.json', lambda b: b[:-9], 'record.json is damaged'),
        ('record.json', lambda b: b.replace(b'"schema": 1', b'"schema": 7'), 'update the package'),
    ],
    ids=['npz', 'json', 'newer'],
)
def test_show_a_damaged_record(file, f, says, done, tmp_path):
    import shutil

    d = damaged(Path(shutil.copytree(done[0], tmp_path / 'd')), file, f)
    code, out, said, err = call('show', d)
    assert code == 2 and not out and err == said and said.count('\n') == 1 and says in said


def test_folders_that_are_not_for_us(tmp_path):
    (tmp_path / 'file').write_text('x')
    (tmp_path / 'photos').mkdir()
    (tmp_path / 'photos' / 'cat.png').write_text('x')
    for out, says in [
        ('file', 'cannot write to .*file'),
        ('file/below', 'cannot write to'),
        ('photos', 'not a run folder and is not empty .it has cat.png'),
    ]:
        for more in ([], ['--overwrite']):
            code, _, said, err = call(*argv('--out', tmp_path / out, *more))
            assert code == 2 and re.search(says, said) and err == said, err
    assert (tmp_path / 'photos' / 'cat.png').read_text() == 'x' and len(list(tmp_path.rglob('*'))) == 3


def test_damaged_settings(done, tmp_path):
    import shutil

    d = damaged(Path(shutil.copytree(done[0], tmp_path / 'd')), 'settings.json', lambda b: b[:9])
    (d / 'record.json').unlink()
    code, _, said, _ = call(*argv('--out', d))
    assert code == 2 and 'settings.json is damaged' in said
    assert (
        call(*argv('--out', d, '--overwrite'))[0] == 0
        and compare(OverlapRecord.load(d), OverlapRecord.load(done[0])) == {}
    )


def test_a_loss_that_is_not_finite(tmp_path, monkeypatch):
    "No record, a sentence that names step and learning rate, exit code 2"
    real = ex.make_problem

    def wild(*a, **k):
        p = real(*a, **k)
        p.lr = 3e38
        return p

    monkeypatch.setattr(ex, 'make_problem', wild)
    code, out, said, err = call('run', 'mnist_mini', *SMALL, '--steps', 50, '--out', tmp_path / 'r')
    assert (
        code == 2
        and said.count('\n') == 1
        and 'Traceback' not in err
        and re.search('lr=3e.38', said)
        and not (tmp_path / 'r' / 'record.json').exists()
    )


def test_a_full_disk_is_a_sentence_and_the_run_can_go_on(tmp_path, monkeypatch):
    real, count = ex.write_atomic, [0]

    def full(path, data):
        count[0] += Path(path).parent.name == 'parts'
        if count[0] == 2:
            raise OSError(28, 'No space left on device', str(path))
        return real(path, data)

    with monkeypatch.context() as m:
        m.setattr(ex, 'write_atomic', full)
        code, out, said, err = call(*argv('--out', tmp_path / 'r'))
        assert code == 2 and 'No space left on device' in said and said.count('\n') == 1
    assert call(*argv('--out', tmp_path / 'r'))[0] == 0


def test_out_of_memory_is_a_sentence_and_a_bug_is_not(monkeypatch):
    def no_room(*a, **k):
        raise RuntimeError(
            '[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: '
            "can't allocate memory: you tried to allocate 9e15 bytes."
        )

    monkeypatch.setattr(ex, 'make_problem', no_room)
    code, _, said, err = call(*argv())
    assert code == 2 and "can't allocate memory" in said and err == said

    def bug(*a, **k):
        raise RuntimeError('expected scalar type')

    monkeypatch.setattr(ex, 'make_problem', bug)
    with pytest.raises(RuntimeError, match='scalar type'):
        main(argv())


@pytest.mark.parametrize(
    'spoil, says',
    [
        (lambda p: p.model.append(torch.nn.Dropout()), 'training mode'),
        (lambda p: setattr(p, 'train_x', p.train_x[:0]) or setattr(p, 'train_y', p.train_y[:0]), 'samples|empty|0 of'),
        (lambda p: p.train_x.fill_(np.nan), 'nan'),
    ],
    ids=['dropout', 'empty', 'nan'],
)
def test_problems_that_went_bad_are_refused(spoil, says, tmp_path):
    p = own()
    spoil(p)
    if 'training' in says:
        p.model.train()
    with pytest.raises((ValueError, FloatingPointError), match=says):
        run_overlap(p, **ASK, out=tmp_path / 'r')
    assert not (tmp_path / 'r' / 'record.json').exists()


def test_the_program_itself(done, tmp_path):
    "The installed command and `python -m` are the same, help works, nothing ends in a traceback"
    prog = Path(sys.executable).with_name('hessian-overlap')
    run = lambda *a: subprocess.run([prog, *map(str, a)], capture_output=True, text=True, env=QUIET, cwd=tmp_path)
    h = run('run', '--help')
    assert h.returncode == 0, h.stderr
    options = (
        '--k --steps --samples --method --num-outer --num-inner --num-probes --num-steps --tol --block-size '
        '--device --dtype --threads --seed --root --out --overwrite'
    )
    for o in options.split():
        assert re.search(rf'{o}\b', h.stdout), o
    assert '--num_outer' not in h.stdout and '--pdb' not in h.stdout
    assert (
        call('--help')[0] == call('--version')[0] == call('show', '--help')[0] == 0
        and 'show RUN' in call('--help')[1]
        and call('--version')[1].startswith('hessian-overlap ')
    )
    bad = run('run', 'mnist_mini', '--k', 0)
    assert (
        bad.returncode == 2
        and bad.stderr.count('\n') == 1
        and bad.stderr.startswith('hessian-overlap: k must be')
        and not list(tmp_path.iterdir())
    )
    a, b = run('show', done[0]), cli('show', done[0])
    assert a.returncode == b.returncode == 0 and a.stdout == b.stdout and not a.stderr
    head = subprocess.run(f"'{prog}' show '{done[0]}' | head -1", shell=True, capture_output=True, text=True, env=QUIET)
    assert 'Traceback' not in head.stderr and 'OverlapRecord' in head.stdout


def test_dtype_seed_and_out_do_what_they_say(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a = argv('--dtype', 'float64', '--seed', '2', '--num_random', '1')
    assert call(*a)[0] == 0
    r = OverlapRecord.load('runs/mnist_mini')
    assert (r.settings['dtype'], r.seed, r.settings['problem_seed'], r.random.shape[2]) == ('float64', 2, 2, 1)
    p = make_problem('mnist_mini', seed=2, device='cpu', dtype=torch.float64)
    H = ex.HessianLinearOperator(p.model, p.loss_func, p.params, p.hessian_data('test', 100))
    res = ex.eigsh(H, 12, tol=1e-5, seed=2)
    assert (r.eigvals[0, 1] == res.eigvals.numpy()).all()  # the record can be made by hand, bit for bit
    assert (r.magnitude[0, 1] == overlap_curve(magnitude_order(p.params), res.eigvecs).numpy()).all()
