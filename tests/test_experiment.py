"A whole run: numbers against a dense Hessian, batches of any form, and checkpoints however they were saved."

import copy
import json
import subprocess
import sys
from collections import namedtuple
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from own import make_problem
from torch import nn
from torch.func import functional_call, hessian

import hessian_overlap.experiment as ex
from hessian_overlap.checkpoints import load_checkpoint, read_checkpoint
from hessian_overlap.experiment import (
    Given,
    default_snapshots,
    overlap_record,
    problem_maker,
    run_checkpoints,
    run_overlap,
)
from hessian_overlap.masks import magnitude_order
from hessian_overlap.methods import SLQ, Eigsh, Seigh, draws
from hessian_overlap.problems import Problem
from hessian_overlap.record import compare, load_record
from hessian_overlap.runs import Run
from hessian_overlap.training import train

ASK = dict(steps=10, snapshots=[0, 5, 10], samples=30, num_random=3, progress=False)
NUMBERS = ('settings', 'seconds', 'versions', 'problem')


def go(problem=make_problem, method=None, **kw):
    return run_overlap(problem, method or Eigsh(k=6), **(ASK | kw))


def same_numbers(a, b, more=()):
    return {k: v for k, v in compare(a, b, (*NUMBERS, *more)).items() if not k.startswith('settings')} == {}


@pytest.mark.parametrize(
    'steps, want',
    [(0, [0]), (1, [0, 1]), (50, [0, 50]), (99, [0, 50, 99]), (100, [0, 50, 100]), (250, [0, 50, 100, 200, 250])],
)
def test_default_snapshots(steps, want):
    assert default_snapshots(steps) == want


def dense(p, theta, split, samples):
    "The Hessian by torch.func, as an oracle"
    names, sizes, shapes = zip(*((k, v.numel(), v.shape) for k, v in p.model.named_parameters()))
    ((x, y),) = p.hessian_data(split, samples)

    def f(t):
        params = {k: v.view(s) for k, v, s in zip(names, t.split(sizes), shapes)}
        return p.loss_func(functional_call(p.model, params, (x,)), y)

    return hessian(f)(theta)


def test_against_the_dense_hessian():
    ds, p = go(seeds=(3,)), make_problem(3)
    run = train(p, 10, [0, 5, 10])
    assert ds.step.values.tolist() == [0, 5, 10] and ds.split.values.tolist() == ['train', 'test']
    for i, theta in enumerate(run.thetas):
        for s, split in enumerate(('train', 'test')):
            one = ds.isel(seed=0, step=i, split=s)
            lam, V = torch.linalg.eigh(dense(p, theta, split, 30))
            top = lam.abs().argsort(descending=True)[:6]
            U = V[:, top]
            np.testing.assert_allclose(one.eigvals, lam[top], rtol=1e-6)
            masks = dict(magnitude=magnitude_order(theta)) | dict(enumerate(draws(p.n_params, 3, 3)))
            for name, order in masks.items():
                want = [(U[order[:j], :j] ** 2).sum() / j for j in range(1, 7)]
                got = one.random[name] if isinstance(name, int) else one.overlap.sel(order=name)
                np.testing.assert_allclose(got, want, atol=1e-5)
    assert ds.converged.all()
    for split, loss, acc in (('train', run.train_loss, run.train_acc), ('test', run.test_loss, run.test_acc)):
        assert (ds.loss.sel(split=split).values == loss).all() and (ds.accuracy.sel(split=split).values == acc).all()


def test_the_problem_and_the_global_generators_are_left_as_they_are():
    p = make_problem()
    before = copy.deepcopy(p.model.state_dict())
    state = torch.get_rng_state(), np.random.get_state()[1].copy()
    go(p)
    assert all(torch.equal(v, before[k]) for k, v in p.model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state[0]) and (np.random.get_state()[1] == state[1]).all()


def test_seeds():
    both, a, b = go(seeds=(0, 5)), go(), go(seeds=(5,))
    assert same_numbers(both.sel(seed=[0]), a) and same_numbers(both.sel(seed=[5]), b)
    assert not a.loss.equals(b.loss)
    p = make_problem()
    one = go(p, seeds=(0, 5))  # one training, two draws of masks
    assert same_numbers(one.sel(seed=[0]), a) and (one.loss.sel(seed=5) == one.loss.sel(seed=0)).all()
    assert not (one.random.sel(seed=5) == one.random.sel(seed=0)).all()


def test_nothing_stays_without_out(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('TMPDIR', str(tmp_path))
    monkeypatch.setattr('tempfile.tempdir', None)
    go()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('method', [Seigh(k=6), SLQ(ks=[2, 6], num_probes=2, num_steps=8)])
def test_other_methods_are_resumed_with_the_same_numbers(method, tmp_path):
    full = go(method=method, out=tmp_path)
    for f in ('parts/seed0_step000005_test', 'parts/seed0_step000010_train', 'record.zarr'):
        (tmp_path / f'{f}.zip').unlink()
    assert compare(go(method=method, out=tmp_path), full) == {}
    assert json.loads(full.settings)['method']['name'] == method.name == full.method


def test_orderings_of_ones_own(tmp_path):
    mine = dict(up=torch.arange(32), down=torch.arange(32).flip(0))
    ds = go(orders=mine, out=tmp_path)
    assert ds.order.values.tolist() == ['magnitude', 'random', 'layerwise', 'up', 'down', 'best']
    (tmp_path / 'record.zarr.zip').unlink()
    Run(tmp_path).file('parts', 0, 5, 'test').unlink()
    assert compare(go(orders=mine, out=tmp_path), ds) == {}
    with pytest.raises(ValueError, match='orders = .* there'):
        go(orders=mine | dict(up=torch.arange(32).roll(1)), out=tmp_path)
    with pytest.raises(ValueError, match="cannot be named 'best'"):
        go(orders=dict(best=torch.arange(32)))


def test_what_is_echoed(tmp_path):
    lines = []
    ds = go(out=tmp_path, echo=lines.append)
    assert lines[0].startswith('Problem(mine: n=32') and 'drawn here' in lines[0] and 'step' in lines[1]
    assert len(lines) == 2 + 6 and lines[2].split()[:2] == ['0', 'train'] and lines[7].split()[:2] == ['10', 'test']
    Run(tmp_path).file('parts', 0, 5, 'train').unlink()
    lines.clear()
    assert compare(go(out=tmp_path, echo=lines.append), ds) == {}
    assert lines[1] == f'resuming {tmp_path}: 5 of 6 parts are there' and len(lines) == 9


@pytest.mark.parametrize(
    'kw, says',
    [
        (dict(steps=-1), 'steps must be'),
        (dict(snapshots=[5, 0]), 'snapshots must increase'),
        (dict(snapshots=[]), 'snapshots must increase'),
        (dict(snapshots=[11]), 'a snapshot must be an integer from 0 to 10, got 11'),
        (dict(samples=31), 'samples=31'),
        (dict(samples=0), 'samples'),
        (dict(num_random=-1), 'num_random must be'),
        (dict(seeds=()), 'seeds is empty'),
        (dict(seeds=(-1,), problem=make_problem()), 'seed=-1: a seed is'),
        (dict(method=Eigsh(k=33)), 'k = 33 is more than the n = 32'),
        (dict(problem=Given(nn.Linear(2, 1), nn.MSELoss(), [1])), 'cannot be trained here: give checkpoints'),
    ],
    ids=range(11),
)
def test_wrong_arguments(kw, says, tmp_path, monkeypatch):
    monkeypatch.setattr(ex, 'train', None)
    with pytest.raises(ValueError, match=says) as e:
        go(out=tmp_path / 'run', **kw)
    assert '\n' not in str(e.value) and not (tmp_path / 'run').exists()


def test_a_resumed_run_multiplies_as_it_began(tmp_path, monkeypatch):
    "Above 65,536 parameters the fastest way is measured, once for all parts and for those of a later process"
    wide, seen = partial(make_problem, hidden=11000), []
    real = ex.HessianLinearOperator
    few = dict(snapshots=[0, 1], steps=1, num_random=1, method=Eigsh(k=2, tol=1e-2), out=tmp_path)
    import hessian_overlap.runs as runs

    class Watched(real):
        def __init__(self, *args, **kw):
            super().__init__(*args, **kw)
            seen.append(kw.get('strategy'))

    monkeypatch.setattr(runs, 'HessianLinearOperator', Watched)
    go(wide, **few)
    chosen = json.loads((tmp_path / 'strategy.json').read_text())
    assert chosen in real.strategies and seen.count(chosen) == 4
    (tmp_path / 'strategy.json').write_text(json.dumps('linearise' if chosen != 'linearise' else 'loop'))
    other = json.loads((tmp_path / 'strategy.json').read_text())
    if other in real.strategies:
        Run(tmp_path).file('parts', 0, 1, 'test').unlink()
        seen.clear()
        go(wide, **few)
        assert seen.count(other) == 1


# ------------------------------------------------------------------------------------------------ one model, any batch


def regression():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 1))
    x = torch.randn(40, 6)
    return model, x, x[:, :1].sin()


def by_dict(model, batch):
    return (model(batch['x']) - batch['y']).square().mean()


Triple = namedtuple('Triple', 'x y w')


def by_triple(model, batch):
    x, y, w = batch
    return (w * (model(x) - y).square()).mean()


class TwoInputs(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x, scale):
        return self.net(x) * scale


@pytest.mark.parametrize('kind', ['pair', 'loader', 'dict', 'triple', 'nested', 'kwargs'])
def test_any_form_of_batch(kind, tmp_path):
    model, x, y = regression()
    loss, data = nn.MSELoss(), [(x, y)]
    want = overlap_record(model, loss, data, Eigsh(k=5), num_random=2, seed=0)
    if kind == 'loader':
        data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, y), batch_size=40)
    elif kind == 'dict':
        loss, data = by_dict, [dict(x=x, y=y)]
    elif kind == 'triple':
        loss, data = by_triple, [Triple(x, y, torch.ones(40, 1))]
    elif kind == 'nested':
        model, data = TwoInputs(model), [((x, torch.ones(40, 1)), y)]
    elif kind == 'kwargs':
        model, data = TwoInputs(model), [(dict(x=x, scale=torch.ones(40, 1)), y)]
    got = overlap_record(model, loss, data, Eigsh(k=5), num_random=2, seed=0)
    np.testing.assert_allclose(got.overlap, want.overlap, atol=1e-4)
    np.testing.assert_allclose(got.loss, want.loss, rtol=1e-6)
    assert got.loss.item() == pytest.approx(nn.functional.mse_loss(regression()[0](x), y).item())
    state = {0: model.state_dict()}
    again = run_checkpoints(model, loss, data, state, Eigsh(k=5), num_random=2, seed=0, out=tmp_path, progress=False)
    assert same_numbers(again, got)


def test_splits_of_one_model():
    model, x, y = regression()
    halves = dict(first=[(x[:20], y[:20])], second=[(x[20:], y[20:])])
    ds = overlap_record(model, nn.MSELoss(), halves, SLQ(ks=[2, 5], num_probes=2, num_steps=6), num_random=0, seed=4)
    assert ds.split.values.tolist() == ['first', 'second'] and ds.problem == 'Sequential' and ds.method == 'slq'
    assert ds.seed.values.tolist() == [4] and ds.step.values.tolist() == [0] and ds.draw.size == 0
    assert np.isnan(ds.accuracy).all() and ds.loss[0, 0, 0] != ds.loss[0, 0, 1]
    with pytest.raises(ValueError, match='data has no split'):
        overlap_record(model, nn.MSELoss(), {}, seed=0)


# ------------------------------------------------------------------------------------------------ problems in files


FILE = """
import torch, beside
from own import make_problem as of_tests

def make_problem(seed=0, dtype=None):
    return of_tests(seed)

def fixed(): return of_tests(7)

def given():
    x = torch.ones(8, 3).double()
    return of_tests(0).model, torch.nn.CrossEntropyLoss(), {'all <b>': [(x, torch.zeros(8).long())]}
"""


def test_problems_by_name_and_by_file(tmp_path):
    (tmp_path / 'mine.py').write_text(FILE)
    (tmp_path / 'beside.py').write_text('')
    file, path = str(tmp_path / 'mine.py'), list(sys.path)
    assert problem_maker('mnist_mini')(3).seed == 3
    assert problem_maker(file)(2).seed == 2 and problem_maker(f'{file}:make_problem', dtype=torch.float64)(4).seed == 4
    assert problem_maker(f'{file}:fixed')(0).seed == 7
    given = problem_maker(f'{file}:given')(0)
    assert given.splits == ['all <b>'] and sys.path == path
    with pytest.raises(ValueError, match='mine.py has no function nothing'):
        problem_maker(f'{file}:nothing')(0)
    with pytest.raises(FileNotFoundError):
        problem_maker('nowhere.py')
    with pytest.raises(ValueError, match='unknown problem'):
        problem_maker('nowhere')(0)
    state = {1: given.model.state_dict()}
    ds = run_checkpoints(
        given, checkpoints=state, method=Eigsh(k=3), num_random=1, seed=0, out=tmp_path / 'run', progress=False
    )
    assert ds.split.values.tolist() == ['all <b>'] and same_numbers(load_record(tmp_path / 'run'), ds)


# ------------------------------------------------------------------------------------------------ checkpoints


def saved(d, kind, model, step):
    "A checkpoint of some kind, and where it is"
    state = model.state_dict()
    if kind == 'state_dict':
        torch.save(state, f'{d}/model_{step}.pt')
        return f'{d}/model_{step}.pt'
    if kind == 'lightning':
        inside = dict(state_dict={f'model.{k}': v for k, v in state.items()}, global_step=step, epoch=1, callbacks={})
        torch.save(inside, f'{d}/epoch=77.ckpt')
        return f'{d}/epoch=77.ckpt'
    if kind == 'compiled':
        torch.save(dict(model={f'module._orig_mod.{k}': v for k, v in state.items()}, step=step), f'{d}/last.pt')
        return f'{d}/last.pt'
    folder = Path(d) / f'checkpoint-{step}'
    folder.mkdir()
    from safetensors.torch import save_file

    if kind == 'safetensors':
        save_file(state, folder.with_suffix('.safetensors'))
        return folder.with_suffix('.safetensors')
    if kind == 'pretrained':
        save_file(state, folder / 'model.safetensors')
        (folder / 'trainer_state.json').write_text(json.dumps(dict(global_step=step)))
        folder.rename(folder.with_name('final'))
        return folder.with_name('final')
    names = list(state)
    for i in range(2):
        torch.save({k: state[k] for k in names[i::2]}, folder / f'part{i}.bin')
    index = dict(weight_map={k: f'part{i % 2}.bin' for i, k in enumerate(names)})
    (folder / 'pytorch_model.bin.index.json').write_text(json.dumps(index))
    return folder


def with_buffers(seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2))
    model(torch.randn(30, 4))
    return model.eval()


KINDS = ['state_dict', 'lightning', 'compiled', 'safetensors', 'pretrained', 'shards']


@pytest.mark.parametrize('kind', KINDS)
def test_checkpoints_of_every_kind(kind, tmp_path):
    model = with_buffers()
    state, step = read_checkpoint(saved(tmp_path, kind, model, 1200))
    assert step == 1200
    other = load_checkpoint(with_buffers(1), state)
    for name, t in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], t), name


def test_checkpoints_of_a_run(tmp_path):
    "In any order of names, buffers among them; resumed; a file that changed is another run"
    model, x = with_buffers(), torch.randn(40, 4)
    data, states = [(x, (x[:, 0] > 0).long())], {step: with_buffers(step) for step in (900, 50, 1000)}
    (tmp_path / 'ck').mkdir()
    for step, m in states.items():
        saved(tmp_path / 'ck', 'state_dict', m, step)
    kw = dict(method=Eigsh(k=4), num_random=1, seed=0, progress=False)
    go = partial(run_checkpoints, model, nn.CrossEntropyLoss(), data, f'{tmp_path}/ck/*.pt', out=tmp_path / 'run', **kw)
    ds = go()
    assert ds.step.values.tolist() == [50, 900, 1000] and ds.split.values.tolist() == ['data']
    for step, m in states.items():
        one = overlap_record(m, nn.CrossEntropyLoss(), data, Eigsh(k=4), num_random=1, seed=0)
        assert same_numbers(one, ds.sel(step=[step]), ('step',))
    (tmp_path / 'run/record.zarr.zip').unlink()
    Run(tmp_path / 'run').file('parts', 0, 900, 'data').unlink()
    assert compare(go(), ds) == {}
    saved(tmp_path / 'ck', 'state_dict', with_buffers(3), 900)
    with pytest.raises(ValueError, match='training = '):
        go()


@pytest.mark.parametrize(
    'make, says',
    [
        (lambda s: {k: v for k, v in s.items() if k != '1.running_mean'}, r'lacks 1 of 9, first 1.running_mean'),
        (lambda s: s | {'4.weight': torch.ones(1)}, 'model, which has no 4.weight'),
        (lambda s: s | {'0.bias': torch.ones(7)}, r'0.bias is \(7,\), in the model \(5,\)'),
        (lambda s: {}, 'lacks 9 of 9'),
    ],
    ids=range(4),
)
def test_checkpoints_that_do_not_fit(make, says):
    model = with_buffers()
    with pytest.raises(ValueError, match=says) as e:
        load_checkpoint(model, make(model.state_dict()))
    assert '\n' not in str(e.value)


def test_a_tied_parameter_may_be_missing():
    class Tied(nn.Module):
        def __init__(self, seed):
            super().__init__()
            torch.manual_seed(seed)
            self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
            self.head.weight = self.embed.weight

    a, b = Tied(0), Tied(1)
    state = {'embed.weight': a.embed.weight.detach()}
    assert torch.equal(load_checkpoint(b, state).head.weight, a.embed.weight)


class Anything:
    "What a checkpoint of somebody else may hold"


def test_checkpoints_that_cannot_be_read(tmp_path):
    torch.save(dict(model=Anything()), tmp_path / 'a_1.pt')
    torch.save(dict(w=torch.ones(1)), tmp_path / 'final.pt')
    (tmp_path / 'b_2.pt').write_bytes(b'not a file of torch')
    (tmp_path / 'c_3').mkdir()
    for name, says in [
        ('a_1.pt', 'holds more than tensors and numbers'),
        ('b_2.pt', 'damaged or holds more'),
        ('final.pt', 'says no step, neither inside nor in its name: give {step: path}'),
    ]:
        with pytest.raises(ValueError, match=says) as e:
            read_checkpoint(tmp_path / name)
        assert '\n' not in str(e.value)
    with pytest.raises(FileNotFoundError, match='has no weights: expected model.safetensors or pytorch_model.bin'):
        read_checkpoint(tmp_path / 'c_3')
    with pytest.raises(ValueError, match='there are no checkpoints'):
        run_checkpoints(with_buffers(), nn.MSELoss(), [0], f'{tmp_path}/*.nothing', seed=0)
    torch.save({}, tmp_path / 'd_1.pt')
    torch.save({}, tmp_path / 'e_1.pt')
    with pytest.raises(ValueError, match='two checkpoints are of one step'):
        run_checkpoints(with_buffers(), nn.MSELoss(), [0], [tmp_path / 'd_1.pt', tmp_path / 'e_1.pt'], seed=0)


def test_a_problem_that_cannot_be_pickled(tmp_path, monkeypatch):
    "Runs in this process all the same; with an executor it is said before anything is submitted"
    monkeypatch.setitem(sys.modules, 'cloudpickle', None)

    def local(seed):  # which pickle refuses
        return make_problem(seed)

    go(local, out=tmp_path / 'a')
    assert not (tmp_path / 'a' / 'problem.pickle').exists()
    with pytest.raises(
        TypeError, match='cannot be sent to other processes .*: define it in a file, or install cloudpickle'
    ):
        go(local, out=tmp_path / 'b', executor=object())


def test_importing_the_package_is_light():
    "Neither xarray nor zarr nor matplotlib nor pandas before they are asked for"
    heavy = 'xarray', 'zarr', 'matplotlib', 'pandas'
    code = f'import sys, hessian_overlap; print([m for m in {heavy} if m in sys.modules])'
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert out.stdout.strip() == '[]', out.stderr


def test_other_losses_optimizers_and_buffers():
    "What is no classification, trained by Adam with batch statistics: buffers are those of each step"
    model, x, y = regression()
    net = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 1)).eval()
    p = Problem('line', net, nn.MSELoss(), x, y, x[:20], y[:20], batch_size=10, lr=0.01, num_classes=None, seed=0)
    kw = dict(steps=8, snapshots=[0, 8], samples=20, num_random=1, progress=False)
    ds = run_overlap(p, Eigsh(k=4), **kw, optimizer='adam', train_mode=True)
    run = train(p, 8, [0, 8], optimizer='adam', train_mode=True)
    at_8 = run.restore(copy.deepcopy(net), 8)
    assert not torch.equal(at_8[1].running_mean, net[1].running_mean)
    want = overlap_record(at_8, p.loss_func, p.hessian_data('train', 20), Eigsh(k=4), num_random=1, seed=0)
    got = ds.sel(step=[8], split=['train'])
    assert np.array_equal(got.overlap, want.overlap) and np.isnan(ds.accuracy).all()
    assert ds.loss.sel(step=8, split='train').item() == pytest.approx(run.train_loss[1])
    assert 'Adam' in ds.settings and '"train_mode": true' in ds.settings
