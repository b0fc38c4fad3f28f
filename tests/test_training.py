"Training: reproducible, resumable, refused with a sentence; the file of a run: whole or not at all"

import copy
import itertools
import json
import os
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.utils import parameters_to_vector
from torch.utils.data import DataLoader, TensorDataset

from hessian_overlap.models import seeded
from hessian_overlap.problems import Problem, make_problem, mnist_mlp
from hessian_overlap.training import CURVES, TrainingRun, evaluate, identity, load_params, same_identity, train

DEVICES = ['cpu'] + ['cuda'] * torch.cuda.is_available()
DTYPES = [torch.float32, torch.float64]
FULL = os.environ.get('HESSIAN_OVERLAP_MNIST')


def small(seed=0, dtype=torch.float32, device='cpu', n=64, **kw):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 3, generator=g)
    y = (x.sum(1) > 0).long() + (x[:, 0] > 0.8).long()
    x, y = x.to(device, dtype), y.to(device)
    args = dict(
        name='small',
        model=mnist_mlp(seed=seed, device=device, dtype=dtype, widths=(3, 8, 3)),
        loss_func=nn.CrossEntropyLoss(),
        train_x=x,
        train_y=y,
        test_x=x[:20],
        test_y=y[:20],
        batch_size=10,
        lr=0.2,
        num_classes=3,
        seed=seed,
    )
    return Problem(**(args | kw))


def same(a, b):
    assert a.steps == b.steps and torch.equal(a.thetas, b.thetas) and repr(a) == repr(b)
    for f in CURVES:
        assert np.array_equal(getattr(a, f), getattr(b, f)), f
    assert a.optimizer == b.optimizer and sorted(a.buffers) == sorted(b.buffers)
    assert all(torch.equal(v, b.buffers[name]) for name, v in a.buffers.items())


# --- the iteration --------------------------------------------------------------------------------


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('seed', [0, 5])
def test_against_torch_sgd(seed, dtype, device):
    p = small(seed, dtype, device)
    run = train(p, 30, [0, 7, 30])
    model = mnist_mlp(seed=seed, device=device, dtype=dtype, widths=(3, 8, 3))
    opt = torch.optim.SGD(model.parameters(), lr=p.lr)
    for t in range(30):
        x, y = p.batches(t)
        opt.zero_grad()
        p.loss_func(model(x), y).backward()
        opt.step()
    want = parameters_to_vector(model.parameters()).detach().cpu()
    assert run.thetas.dtype == dtype and run.thetas.device.type == 'cpu'
    assert torch.allclose(run.theta(30), want, rtol=0, atol=1e-5 if dtype == torch.float32 else 1e-13)
    assert torch.equal(run.theta(0), p.theta0.cpu())
    assert run.train_loss.dtype == np.float64 and (np.diff(run.train_loss) < 0).all()
    with torch.no_grad():
        assert abs(p.loss_func(model(p.test_x), p.test_y).item() - run.test_loss[-1]) < 1e-5


def test_reproducible_and_without_side_effects():
    p = small()
    rng = torch.get_rng_state()
    before = parameters_to_vector(p.model.parameters()).detach().clone()
    a, b, c = train(p, 25, [0, 25]), train(p, 25, [0, 25]), train(small(), 25, [0, 25])
    same(a, b)
    same(a, c)
    assert torch.equal(torch.get_rng_state(), rng)
    assert torch.equal(parameters_to_vector(p.model.parameters()).detach(), before) and all(
        q.grad is None for q in p.model.parameters()
    )
    load_params(p.model, torch.zeros(p.n_params))
    same(train(p, 25, [0, 25]), a)  # from the initial parameters, wherever the model is now


def test_seeds_differ():
    assert (train(small(0), 9, [9]).thetas - train(small(1), 9, [9]).thetas).abs().max() > 0.1


def test_snapshots_do_not_alias():
    p = small()
    run = train(p, 3, [0, 1, 2, 3])
    for a, b in itertools.combinations(run.thetas, 2):
        assert not torch.equal(a, b)
    load_params(p.model, run.theta(2))
    kept = run.theta(2).clone()
    with torch.no_grad():
        p.params[0].zero_()
    assert torch.equal(run.theta(2), kept)


@pytest.mark.parametrize(
    'snaps', [[10, 0, 5, 5], (0, 5, 10), range(0, 11, 5), np.array([0, 5, 10]), torch.tensor([0, 5, 10])], ids=str
)
def test_snapshots_in_any_form(snaps):
    same(train(small(), 10, snaps), train(small(), 10, [0, 5, 10]))


def test_recording_more_changes_nothing():
    few, many = train(small(), 20, [20]), train(small(), 20, range(21))
    assert torch.equal(few.thetas[-1], many.thetas[-1])


def test_progress(capsys):
    train(small(), 5, [0, 5], progress=True)
    err = capsys.readouterr().err
    assert 'training small' in err and '5/5' in err and 'loss=' in err
    train(small(), 5, [0, 5])
    assert capsys.readouterr().err == ''


def test_frozen_parameters_stay():
    model = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 3)).eval()
    model[0].requires_grad_(False)
    p = small(model=model)
    run = train(p, 5, [0, 5])
    assert run.thetas.shape == (2, 15) and not torch.equal(*run.thetas)


def test_dropout_and_batchnorm_in_eval_mode():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3)).eval()
    p = small(model=model)
    same(train(p, 5, [0, 5]), train(p, 5, [0, 5]))
    p.model.train()
    with pytest.raises(ValueError, match='is in training mode, where the loss is no function'):
        train(p, 5, [0, 5])


# --- other optimizers -----------------------------------------------------------------------------

SETTINGS = {
    'adamw': dict(weight_decay=0.1),
    'SGD': dict(momentum=0.9, nesterov=True),
    'adam': dict(lr=0.01, amsgrad=True),
    'rmsprop': {},
    'adagrad': {},
    'NAdam': {},
    'lbfgs': dict(max_iter=3),
}


@pytest.mark.parametrize('name', SETTINGS)
def test_any_optimizer_against_its_own_loop(name):
    kw, p = SETTINGS[name], small(dtype=torch.float64)
    run = train(p, 20, [0, 7, 20], optimizer=dict(name=name) | kw)
    kind = {k.lower(): v for k, v in vars(torch.optim).items()}[name.lower()]
    model = small(dtype=torch.float64).model
    opt = kind(model.parameters(), **(dict(lr=0.2) | kw))
    for t in range(20):
        x, y = p.batches(t)

        def closure(x=x, y=y):
            opt.zero_grad()
            loss = p.loss_func(model(x), y)
            loss.backward()
            return loss

        opt.step(closure)
    want = parameters_to_vector(model.parameters()).detach()
    assert torch.allclose(run.theta(20), want, rtol=0, atol=1e-12) and kind.__name__ in repr(run)
    made = train(p, 20, [0, 7, 20], optimizer=lambda params: kind(params, **(dict(lr=0.2) | kw)))
    same(run, made)
    same(
        train(
            p, 20, [0, 7, 20], optimizer=dict(name=name) | kw, start=train(p, 7, [7], optimizer=dict(name=name) | kw)
        ),
        run,
    )
    assert torch.equal(parameters_to_vector(p.params).detach(), p.theta0) and all(q.grad is None for q in p.params)


def test_plain_descent_is_bit_for_bit_what_it_was():
    p = small()
    model = small().model
    params = [*model.parameters()]
    for t in range(25):
        x, y = p.batches(t)
        grads = torch.autograd.grad(p.loss_func(model(x), y), params)
        with torch.no_grad():
            torch._foreach_add_(params, grads, alpha=-p.lr)
    assert torch.equal(train(p, 25, [25]).thetas[0], parameters_to_vector(params).detach())


@pytest.mark.parametrize(
    'optimizer, error, says',
    [
        ('adamm', ValueError, "optimizer must be one of .*'adamw'.* got 'adamm'"),
        (3, ValueError, 'optimizer must be one of'),
        (dict(lr=0.1), ValueError, 'optimizer must be one of .* got None'),
        (dict(name='adam', momentum=1), TypeError, "optimizer 'adam' with .'momentum': 1. cannot be made"),
        (dict(name='adam', lr=-1.0), ValueError, "optimizer 'adam' with .* cannot be made"),
        (lambda params: 3, TypeError, 'must give a torch.optim.Optimizer, got int'),
    ],
)
def test_optimizers_that_are_none(optimizer, error, says):
    with pytest.raises(error, match=says):
        train(small(), 3, [3], optimizer=optimizer)


def test_divergence_with_an_optimizer_is_named():
    with pytest.raises(FloatingPointError, match='the training loss is (nan|inf) at step'):
        train(small(), 50, [50], optimizer=dict(name='sgd', lr=1e38))


# --- buffers --------------------------------------------------------------------------------------


def normed(dropout=0.0, **kw):
    def make():
        return nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3))

    return small(model=seeded(make, seed=0, device='cpu', dtype=torch.float64), dtype=torch.float64, **kw)


def test_statistics_of_training_mode_are_in_the_snapshots(tmp_path):
    p = normed()
    run = train(p, 30, [0, 7, 30], train_mode=True)
    model = normed().model
    opt = torch.optim.SGD(model.parameters(), lr=p.lr)
    for t in range(30):
        x, y = p.batches(t)
        opt.zero_grad()
        p.loss_func(model.train()(x), y).backward()
        opt.step()
    state = model.eval().state_dict()
    with torch.no_grad():
        want = p.loss_func(model(p.test_x), p.test_y).item()
    assert run.test_loss[-1] == pytest.approx(want, rel=1e-12)
    for back in run, TrainingRun.load(run.save(tmp_path / 'r.npz')):
        same(back, run)
        net = back.restore(normed().model, 30)
        for name, t in net.state_dict().items():
            assert torch.allclose(t, state[name], rtol=1e-12, atol=1e-12), name
        back.restore(net, 0)
        assert all(torch.equal(t, p.model.state_dict()[name]) for name, t in net.state_dict().items())
    assert sorted(run.buffers) == ['1.num_batches_tracked', '1.running_mean', '1.running_var']
    same(train(normed(), 30, [0, 7, 30], train_mode=True, start=train(normed(), 7, [0, 7], train_mode=True)), run)
    assert p.model[1].running_mean.abs().max() == 0  # the problem's own model is left as it was
    with pytest.raises(ValueError, match='start is a training of small'):
        train(p, 30, [30], start=run)


def test_the_wrong_statistics_are_warned_of():
    p = normed()
    run = train(p, 30, [30], train_mode=True)
    with pytest.warns(UserWarning, match=r'training changes 2 of this model, such as 1\.running_mean'):
        load_params(p.model, run.theta(30))
    wrong = evaluate(p.model, p.loss_func, p.test_x, p.test_y)[0]
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        run.restore(p.model, 30)
        right = evaluate(p.model, p.loss_func, p.test_x, p.test_y)[0]
        load_params(small().model, small().theta0)  # nothing to warn of
    assert right == run.test_loss[0] and abs(wrong - right) > 0.01


def test_buffers_that_do_not_fit_change_nothing():
    p = normed()
    before = copy.deepcopy(p.model.state_dict())
    for bad, says in (
        ({'1.running_mean': torch.ones(8), '1.mean': torch.ones(8)}, 'no buffer 1.mean'),
        (
            {'1.running_mean': torch.ones(8), '1.running_var': torch.ones(1)},
            'buffer 1.running_var is',
        ),
    ):
        with pytest.raises(ValueError, match=says):
            load_params(p.model, p.theta0 + 1, bad)
        assert all(torch.equal(t, before[name]) for name, t in p.model.state_dict().items())


def test_dropout_is_a_function_of_seed_and_step():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    a, b = (train(normed(0.5), 20, [0, 9, 20], train_mode=True) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    same(a, b)
    same(train(normed(0.5), 20, [0, 9, 20], train_mode=True, start=train(normed(0.5), 9, [9], train_mode=True)), a)
    assert not torch.equal(a.thetas[2], train(normed(0.0), 20, [20], train_mode=True).thetas[0])


def test_evaluate_refuses_training_mode():
    p = normed()
    with pytest.raises(ValueError, match='BatchNorm1d.* is in training mode'):
        evaluate(p.model.train(), p.loss_func, p.test_x, p.test_y)
    assert p.model[1].num_batches_tracked == 0


# --- other losses and data ------------------------------------------------------------------------


def test_a_regression_has_no_accuracy():
    x = torch.linspace(-1, 1, 64)[:, None]
    args = dict(train_x=x, train_y=x**2, test_x=x, test_y=x**2, num_classes=None, loss_func=nn.MSELoss())
    run = train(small(model=mnist_mlp(seed=0, device='cpu', widths=(1, 8, 1)), **args), 50, [0, 50])
    assert np.isnan(run.train_acc).all() and np.isnan(run.test_acc).all() and run.test_loss[1] < run.test_loss[0]


def test_a_dataset_trains_as_tensors_do():
    p = small()
    stored = [DataLoader(TensorDataset(x, y), batch_size=9) for x, y in map(p.split, ('train', 'test'))]
    q = small(train_x=stored[0], train_y=None, test_x=stored[1], test_y=None)
    a, b = train(p, 20, [0, 20]), train(q, 20, [0, 20])
    assert torch.equal(a.thetas, b.thetas)
    assert np.allclose(a.test_loss, b.test_loss, rtol=1e-6) and np.array_equal(a.test_acc, b.test_acc)


def test_a_mean_over_tokens_is_the_mean_over_all():
    mask = torch.arange(5)[None] < torch.tensor([1, 5, 2, 4, 3, 5, 1, 2])[:, None]
    batch = dict(x=torch.rand(8, 5, 1, generator=torch.Generator().manual_seed(0)), mask=mask)

    def loss(model, b):
        return (model(b['x'])[..., 0].square() * b['mask']).sum() / b['mask'].sum()

    args = dict(train_x=batch, train_y=None, test_x=batch, test_y=None, num_classes=None, loss_func=loss)
    net = mnist_mlp(seed=0, device='cpu', widths=(1, 3, 1))
    p = small(model=net, batch_size=4, batch_size_fn=lambda b: b['mask'].sum(), **args)
    whole = loss(net, batch).item()
    for chunk in (1, 3, 8):
        assert evaluate(net, loss, batch, chunk=chunk, weight=p.weight)[0] == pytest.approx(whole, rel=1e-6)
    assert train(p, 0, [0]).train_loss[0] == pytest.approx(whole, rel=1e-6)


# --- what a problem computes ----------------------------------------------------------------------


def relu():
    net = mnist_mlp(seed=0, device='cpu', widths=(3, 8, 3))
    net[1] = nn.ReLU()
    return net.eval()


@pytest.mark.parametrize(
    'kw',
    [
        dict(model=relu()),
        dict(loss_func=nn.CrossEntropyLoss(label_smoothing=0.01)),
        dict(loss_func=lambda out, y: nn.functional.cross_entropy(out, y) * 1.001),
    ],
    ids=['relu', 'smoothing', 'scale'],
)
def test_another_problem_of_the_same_name_is_no_start(kw):
    with pytest.raises(ValueError, match='it computes another (loss|gradient|outputs)'):
        train(small(**kw), 9, [9], start=train(small(), 5, [0, 5]))


def test_rounding_is_no_other_problem():
    single, double = (identity(small(dtype=dtype)) for dtype in DTYPES)
    assert single != double and not same_identity(single, double) and not same_identity(double, single)
    theta = train(small(), 9, [9]).theta(9)
    assert same_identity(identity(small()), identity(small(), theta)) == ['loss', 'gradient', 'outputs']
    assert json.loads(json.dumps(single)) == single


# --- stop and go on -------------------------------------------------------------------------------


@pytest.mark.parametrize('dtype', DTYPES)
@pytest.mark.parametrize('cut', [0, 1, 6, 7, 13, 20])  # epochs have 6 steps
def test_continuing_gives_the_same_numbers(cut, dtype):
    whole = train(small(dtype=dtype), 20, [0, cut, 20])
    same(train(small(dtype=dtype), 20, [0, cut, 20], start=train(small(dtype=dtype), cut, [0, cut])), whole)


@pytest.mark.parametrize('have', [[5], [0, 12], [3, 4, 20], [20], [1, 2, 3, 4, 5]], ids=str)
def test_any_earlier_run_is_a_start(have):
    want = [0, 3, 11, 20]
    same(train(small(), 20, want, start=train(small(), 20, have)), train(small(), 20, want))


def test_what_is_there_is_not_computed_again():
    p, run = small(), train(small(), 20, [0, 10, 20])

    def boom(*a):
        raise AssertionError('computed')

    object.__setattr__(p, 'batches', boom)
    same(train(p, 20, [0, 10, 20], start=run), run)


def test_continuing_after_a_file(tmp_path):
    whole = train(small(), 20, [0, 10, 20])
    train(small(), 10, [0, 10]).save(tmp_path / 'r.npz')
    same(train(small(), 20, [0, 10, 20], start=TrainingRun.load(tmp_path / 'r.npz')), whole)


@pytest.mark.parametrize(
    'kw',
    [
        dict(seed=1),
        dict(lr=0.1),
        dict(batch_size=8),
        dict(name='other'),
        dict(source='other data'),
        dict(dtype=torch.float64),
        dict(model=mnist_mlp(seed=0, device='cpu', widths=(3, 9, 3))),
    ],
    ids=str,
)
def test_another_run_is_no_start(kw):
    with pytest.raises(ValueError, match='start is a training of small.*not of'):
        train(small(**kw), 9, [9], start=train(small(), 5, [0, 5]))


def test_other_initial_parameters_are_no_start():
    p = small(model=mnist_mlp(seed=9, device='cpu', widths=(3, 8, 3)))
    with pytest.raises(ValueError, match='other initial parameters'):
        train(p, 9, [9], start=train(small(), 5, [0, 5]))


# --- refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    'steps, snaps, says',
    [
        (5, [], 'snapshots is empty'),
        (5, [6], 'a snapshot must be an integer from 0 to 5, got 6'),
        (5, [1.7], 'a snapshot must be an integer from 0 to 5, got 1.7'),
        (5, [True], 'got True'),
        (5, 3, 'snapshots must be a list of steps, got 3'),
        (5.0, [1], 'steps must be an integer at least 0, got 5.0'),
        (5, [-1, 3], 'got -1'),
        (-1, [0], 'steps must be an integer at least 0, got -1'),
    ],
)
def test_bad_snapshots(steps, snaps, says):
    with pytest.raises((TypeError, ValueError), match=says):
        train(small(), steps, snaps)


def test_a_run_whose_parts_do_not_fit():
    run = train(small(), 2, [2])
    parts = {f: getattr(run, f) for f in TrainingRun.__dataclass_fields__}
    for change in (
        dict(thetas=run.thetas[0]),
        dict(thetas=run.thetas[0, :1]),
        dict(steps=[1, 2]),
        dict(test_acc=np.zeros(2)),
        dict(buffers=dict(mean=torch.zeros(2, 3))),
        dict(steps=[], thetas=run.thetas[:0], **{f: np.zeros(0) for f in CURVES}),
    ):
        with pytest.raises(ValueError, match='do not belong together'):
            TrainingRun(**(parts | change))


def test_divergence_is_named():
    big = lambda scale, **kw: small(loss_func=lambda o, y: scale * (o**4).mean(), model=nn.Linear(3, 3).eval(), **kw)
    with pytest.raises(
        FloatingPointError,
        match=r'small: the training loss is (nan|inf) at step \d+ with lr=1000000\.0; train with a smaller lr',
    ):
        train(big(1e3, lr=1e6), 50, [50])


@pytest.mark.parametrize('where', ['train', 'test'])
def test_nan_in_the_data_is_named(where):
    p = small()
    getattr(p, f'{where}_x')[3] = float('nan')
    p.test_x = p.test_x.clone()  # test_x was a view of train_x
    with pytest.raises(FloatingPointError, match='at step 0 with lr'):
        train(p, 5, [0, 5])


def test_divergence_at_the_last_step_is_not_recorded():
    "The loss of the last batch was finite, the parameters after it are not"
    p = small(lr=3e38)
    with pytest.raises(FloatingPointError, match='at step 1 with lr=3e'):
        train(p, 1, [1])


@pytest.mark.parametrize(
    'bad, error',
    [
        (torch.zeros(58), ValueError),
        (torch.zeros(60), ValueError),
        (torch.zeros(59, 1), ValueError),
        (torch.zeros(59).double(), TypeError),
    ],
)
def test_load_params_refuses_and_changes_nothing(bad, error):
    model = mnist_mlp(seed=0, device='cpu', widths=(3, 8, 3))
    before = parameters_to_vector(model.parameters()).detach().clone()
    with pytest.raises(error):
        load_params(model, bad)
    assert torch.equal(parameters_to_vector(model.parameters()).detach(), before)


@pytest.mark.parametrize('device', DEVICES)
@pytest.mark.parametrize('dtype', DTYPES)
def test_load_params_inverts_parameters_to_vector(dtype, device):
    model = mnist_mlp(seed=0, device=device, dtype=dtype)
    theta = torch.randn(7030, dtype=dtype, generator=torch.Generator().manual_seed(0))
    assert load_params(model, theta) is model
    assert torch.equal(parameters_to_vector(model.parameters()).detach().cpu(), theta)
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())


@pytest.mark.parametrize('chunk', [1, 7, 64, 1000])
def test_evaluate_does_not_depend_on_the_chunk(chunk):
    p = small(dtype=torch.float64)
    loss, acc = evaluate(p.model, p.loss_func, p.train_x, p.train_y, chunk=chunk)
    with torch.no_grad():
        out = p.model(p.train_x)
    assert (
        abs(loss - p.loss_func(out, p.train_y).item()) < 1e-14
        and acc == (out.argmax(1) == p.train_y).double().mean().item()
    )


# --- the file -------------------------------------------------------------------------------------


@pytest.mark.parametrize('dtype', DTYPES)
def test_save_and_load(tmp_path, dtype):
    run = train(small(dtype=dtype), 9, [0, 4, 9])
    for name in 'run.npz', 'run':  # the name is taken as it is
        assert run.save(tmp_path / name) == tmp_path / name
        back = TrainingRun.load(str(tmp_path / name))
        same(run, back)
        assert back.thetas.dtype == dtype and back.steps == [0, 4, 9] and type(back.seed) is int
    assert sorted(os.listdir(tmp_path)) == ['run', 'run.npz']


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    run = train(small(), 9, [0, 9])
    path = run.save(tmp_path / 'run.npz')
    old = path.read_bytes()

    def half(f, *args, **kw):
        f.write(b'PK')
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(np.lib.format, 'write_array', half)
    with pytest.raises(OSError, match='No space left'):
        train(small(), 3, [3]).save(path)
    assert path.read_bytes() == old and os.listdir(tmp_path) == ['run.npz']


def test_folder_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError):
        train(small(), 1, [1]).save(tmp_path / 'no' / 'run.npz')
    with pytest.raises(FileNotFoundError):
        TrainingRun.load(tmp_path / 'run.npz')


@pytest.mark.parametrize(
    'damage', ['empty', 'text', 'head', 'tail', 'npy', 'pickle', 'field', 'shape', 'order', 'other']
)
def test_damaged_file(tmp_path, damage):
    run = train(small(), 9, [0, 4, 9])
    path = run.save(tmp_path / 'run.npz')
    b = path.read_bytes()
    with np.load(path) as z:
        d = dict(z)
    if damage in ('empty', 'text', 'head', 'tail'):
        path.write_bytes({'empty': b'', 'text': b'hello world', 'head': b[100:], 'tail': b[:-60]}[damage])
    elif damage == 'npy':
        np.save(open(path, 'wb'), np.arange(5))
    else:
        change = {
            'pickle': {'steps': np.array([{}], object)},
            'field': {},
            'shape': {'thetas': d['thetas'][:2]},
            'order': {'steps': d['steps'][::-1]},
            'other': {'new': np.zeros(1)},
        }
        if damage == 'field':
            del d['test_acc']
        np.savez(open(path, 'wb'), **(d | change[damage]))
    with pytest.raises(ValueError, match=r'run\.npz is not a training run or is damaged') as e:
        TrainingRun.load(path)
    assert '\n' not in str(e.value)


def test_any_flipped_byte_is_noticed(tmp_path):
    run = train(small(), 4, [0, 4])
    path = run.save(tmp_path / 'run.npz')
    b = path.read_bytes()
    noticed = 0
    for i in range(0, len(b), 7):
        bad = bytearray(b)
        bad[i] ^= 0x55
        path.write_bytes(bad)
        try:
            TrainingRun.load(path)
        except ValueError as e:
            noticed += 1
            assert 'is not a training run or is damaged' in str(e)
    assert noticed == len(range(0, len(b), 7))


# --- the paper's network --------------------------------------------------------------------------


def test_embedded_digits_are_learnt():
    run = train(make_problem('mnist_mini', seed=0, device='cpu'), 1000, [0, 1000])
    assert abs(run.test_loss[0] - np.log(10)) < 0.03 and run.test_acc[1] > 0.86 and run.train_acc[1] > 0.92


@pytest.mark.skipif(not FULL, reason='set HESSIAN_OVERLAP_MNIST to a folder with the full MNIST')
def test_full_mnist_follows_the_papers_log():
    "Mean over three seeds beside the published log of one: step, train loss, test accuracy"
    runs = [
        train(make_problem('mnist_mini', root=FULL, seed=s, device='cpu'), 1000, [0, 100, 200, 300, 500, 1000])
        for s in range(3)
    ]
    loss, acc = (np.mean([getattr(r, f) for r in runs], 0) for f in ('train_loss', 'test_acc'))
    paper = np.array([
        (2.3187, 0.0958),
        (1.5683, 0.4839),
        (0.8124, 0.7384),
        (0.5963, 0.836),
        (0.3684, 0.9035),
        (0.2193, 0.9338),
    ])
    assert (abs(loss - paper[:, 0]) < [0.02, 0.25, 0.25, 0.15, 0.08, 0.04]).all(), loss
    assert (abs(acc - paper[:, 1]) < [0.02, 0.12, 0.1, 0.06, 0.03, 0.015]).all(), acc
    assert all(r.test_acc[-1] > 0.92 for r in runs)
