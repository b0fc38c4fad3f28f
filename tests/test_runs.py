"A run as a folder: the same numbers however it is interrupted, shared out or damaged, and never those of another run."

import copy
import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future, ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from own import make_problem

import hessian_overlap.files as files
from hessian_overlap.checkpoints import load_state, read_snapshot, write_snapshot
from hessian_overlap.experiment import run_overlap
from hessian_overlap.methods import Eigsh
from hessian_overlap.record import RecordError, compare, load_record, read_dataset, write_dataset
from hessian_overlap.runs import Run, fingerprint, measure_task
from hessian_overlap.training import same_identity

ASK = dict(steps=10, snapshots=[0, 5, 10], samples=30, num_random=3, seeds=(0, 1), progress=False)
QUIET = {**os.environ, 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}


def go(out, problem=make_problem, method=None, **kw):
    return run_overlap(problem, method or Eigsh(k=6), **(ASK | kw), out=out)


@pytest.fixture(scope='module')
def full(tmp_path_factory):
    "A run that nobody interrupted, and its folder"
    torch.set_num_threads(1)
    d = tmp_path_factory.mktemp('runs') / 'full'
    return go(d), d


@pytest.fixture
def copied(full, tmp_path):
    "A copy of its folder, without the record"
    import shutil

    shutil.copytree(full[1], tmp_path / 'run')
    (tmp_path / 'run' / 'record.zarr.zip').unlink()
    return tmp_path / 'run'


def relative(d):
    return sorted(o.relative_to(d).as_posix() for o in Path(d).rglob('*') if o.is_file())


# ------------------------------------------------------------------------------------------------ interrupted


class Kill(BaseException):
    "What a killed process does not live to see"


def test_killed_before_and_after_every_write(full, tmp_path, monkeypatch):
    "Whichever write is the last that gets through, the next run ends with the same numbers and no temporary file"
    real, count = files._place, [0]

    def counted(*args):
        count[0] += 1
        return real(*args)

    monkeypatch.setattr(files, '_place', counted)
    go(tmp_path / 'counted')
    writes = count[0]
    assert writes >= 20
    for i in {*range(1, 8), *range(8, writes, 5), writes - 1, writes}:
        for after in (False, True):
            d = tmp_path / f'{i}{after}'
            count[0] = 0

            def put(tmp, path, new, i=i, after=after):
                count[0] += 1
                if count[0] == i:
                    if after:
                        real(tmp, path, new)
                    raise Kill
                return real(tmp, path, new)

            with monkeypatch.context() as m:
                m.setattr(files, '_place', put)
                m.setattr(files.os, 'getpid', lambda: 2**22 + 7)  # nobody's
                m.setattr(Path, 'unlink', lambda *a, **k: None)  # a killed process tidies nothing up
                with pytest.raises(Kill):
                    go(d)
            assert compare(go(d), full[0]) == {}, (i, after)
            assert [o for o in relative(d) if 'tmp' in o] == [], (i, after)
            assert relative(d) == relative(full[1])


def start(d):
    return subprocess.Popen(
        [sys.executable, Path(__file__).with_name('own.py'), d], env=QUIET, stderr=subprocess.PIPE, text=True
    )


def test_killed_processes_and_two_at_once(full, tmp_path):
    "Two processes in one folder, one killed at some moment, and then a last one: the same numbers"
    d = tmp_path / 'run'
    for parts in (0, 1, 5):
        pair = [start(d), start(d)]
        deadline = time.time() + 60
        while len(list(d.glob('parts/*.zip'))) < parts and time.time() < deadline:
            time.sleep(0.005)
        for p in pair:
            p.send_signal(signal.SIGKILL)
            p.communicate()
    last = [start(d), start(d)]
    for p in last:
        assert p.communicate()[1] == '' and p.returncode == 0
    assert compare(load_record(d), full[0]) == {}
    assert relative(d) == relative(full[1])


def test_a_finished_run_has_nothing_to_do(full, monkeypatch):
    record, d = full
    before = {f: f.stat().st_mtime_ns for f in d.rglob('*.zip') if f.name != 'orders.zip'}
    monkeypatch.setattr('hessian_overlap.runs.measure_task', None)
    monkeypatch.setattr('hessian_overlap.experiment.train', None)
    assert go(d).equals(record)
    assert before == {f: f.stat().st_mtime_ns for f in d.rglob('*.zip') if f.name != 'orders.zip'}


# -------------------------------------------------------------------------------------------- damaged, or of another


@pytest.mark.parametrize('kind', ['parts/seed0_step000005_test', 'snapshots/seed1_step000010'])
@pytest.mark.parametrize('damage', [lambda b: b'', lambda b: b[: len(b) // 2], lambda b: b[:40] + b'!' + b[41:]])
def test_damaged_files_are_made_again(kind, damage, full, copied):
    file = copied / f'{kind}.zip'
    file.write_bytes(damage(file.read_bytes()))
    assert len(Run(copied).tasks()) == (1 if 'parts' in kind else 2)
    assert compare(go(copied), full[0]) == {}


def test_any_flipped_bit_of_a_part_is_found(full, copied):
    run = Run(copied)
    file = run.file('parts', 0, 0, 'train')
    good = file.read_bytes()
    for i in [*range(0, 200), *range(200, len(good), 211), *range(len(good) - 80, len(good))]:
        file.write_bytes(good[:i] + bytes([good[i] ^ 1 << i % 8]) + good[i + 1 :])
        assert run.part(0, 0, 'train') is None


def test_parts_that_belong_elsewhere_are_not_believed(full, copied, tmp_path):
    run, other = Run(copied), tmp_path / 'other'
    go(other, partial(make_problem, lr=0.4))
    here = run.file('parts', 0, 5, 'test')
    good = here.read_bytes()
    for there in (
        run.file('parts', 0, 5, 'train'),  # of the other split
        run.file('parts', 0, 10, 'test'),  # step
        run.file('parts', 1, 5, 'test'),  # seed
        Run(other).file('parts', 0, 5, 'test'),  # run
    ):
        here.write_bytes(there.read_bytes())
        assert run.tasks() == [(0, 5, 'test')]
    ds = read_dataset(full[1] / 'parts' / here.name)
    write_dataset(here, ds.assign_attrs(snapshot='0' * 64))  # measured from other parameters
    assert run.tasks() == [(0, 5, 'test')]
    here.write_bytes(good)
    snap = run.file('snapshots', 0, 5)
    snap.write_bytes(run.file('snapshots', 1, 5).read_bytes())
    assert len(Run(copied).tasks()) == 2
    assert compare(go(copied), full[0]) == {}


def test_a_damaged_record_is_made_from_its_parts(full, copied, monkeypatch):
    monkeypatch.setattr('hessian_overlap.runs.measure_task', None)
    (copied / 'record.zarr.zip').write_bytes(b'damaged')
    with pytest.raises(RecordError, match='damaged'):
        load_record(copied)
    assert compare(go(copied), full[0]) == {} and compare(load_record(copied), full[0]) == {}


def test_damaged_settings(full, copied):
    file = copied / 'settings.json'
    file.write_text(file.read_text().replace('"samples": 30', '"samples": 20'))
    with pytest.raises(RecordError, match='settings.json is damaged; choose another folder, or overwrite it'):
        go(copied)
    assert compare(go(copied, overwrite=True), full[0]) == {}


# ------------------------------------------------------------------------------------------------ another run


@pytest.mark.parametrize(
    'change, says',
    [
        (dict(method=Eigsh(k=7)), r"method = .*'k': 6.* there and .*'k': 7.* here"),
        (dict(method=Eigsh(k=6, tol=1e-3)), 'method = '),
        (dict(seeds=(0,)), r'seeds = \[0, 1\] there and \[0\] here'),
        (dict(snapshots=[0, 10]), r'steps = \[0, 5, 10\] there'),
        (dict(num_random=4), 'num_random = 3 there and 4'),
        (dict(samples=20), 'samples = 30 there and 20'),
        (dict(problem=partial(make_problem, lr=0.1)), "training = .*'lr': 0.5.* there"),
        (dict(problem=partial(make_problem, data=1)), 'data = '),
        (dict(problem=partial(make_problem, hidden=6)), 'n = 32 there and 38'),
        (dict(problem=partial(make_problem, activation=torch.nn.ReLU)), 'the problem of seed 0 computes another loss'),
        (dict(problem=partial(make_problem, activation=torch.nn.Softsign)), 'another loss'),
        (dict(problem=lambda seed: make_problem(seed + 2)), 'another loss'),
        (dict(problem=partial(make_problem, smoothing=0.01)), 'another loss|loss='),
        (dict(orders=dict(up=torch.arange(32))), 'orders = {} there'),
    ],
    ids=range(14),
)
def test_another_run_is_refused_by_name(change, says, full, copied):
    before = {f: f.read_bytes() for f in copied.rglob('*') if f.is_file()}
    with pytest.raises(ValueError, match=says) as e:
        go(copied, **change)
    assert '\n' not in str(e.value) and 'begun with other settings' in str(e.value)
    assert before == {f: f.read_bytes() for f in copied.rglob('*') if f.is_file()}


class Late(torch.nn.CrossEntropyLoss):
    "A loss that is another one only where the network has learned something"

    def forward(self, out, y):
        loss = super().forward(out, y)
        return loss if loss > 0.65 else loss * 1.01


def test_a_problem_that_differs_only_at_its_last_parameters(full, copied):
    def late(seed):
        p = make_problem(seed)
        p.loss_func = Late()
        return p

    if go(None, late).loss.min() < 0.65:
        settings = json.loads((copied / 'settings.json').read_text())
        was = settings['training']['loss']
        Late.__repr__ = lambda self: was
        with pytest.raises(ValueError, match='at its last parameters it has another'):
            go(copied, late)


def test_overwrite(full, copied, monkeypatch):
    "A finished run or one of other settings is removed, an unfinished one goes on; what is not ours stays"
    (copied / 'notes.txt').write_text('mine')
    Run(copied).file('parts', 1, 10, 'test').unlink()
    done = {f: f.stat().st_mtime_ns for f in copied.glob('parts/*.zip')}
    go(copied, overwrite=True)  # was begun, as if by an interrupted --overwrite
    assert done == {f: f.stat().st_mtime_ns for f in done}
    go(copied, overwrite=True)  # was finished
    assert all(f.stat().st_mtime_ns != was for f, was in done.items())
    r = go(copied, overwrite=True, seeds=(2,))
    assert r.seed.values.tolist() == [2] and len(list(copied.glob('parts/*'))) == 6
    assert (copied / 'notes.txt').read_text() == 'mine'


def test_a_folder_that_is_not_a_run(tmp_path):
    (tmp_path / 'thesis.tex').write_text('mine')
    for overwrite in (False, True):
        with pytest.raises(FileExistsError, match='is not a run folder and is not empty .it has thesis.tex'):
            go(tmp_path, overwrite=overwrite)
    assert relative(tmp_path) == ['thesis.tex']
    with pytest.raises(RecordError, match='settings.json is not there'):
        Run(tmp_path)


def test_threads_are_a_setting(copied):
    "Another number of threads adds in another order, so a run is not mixed from two"
    was = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with pytest.raises(ValueError, match='threads = 1 there and 2 here'):
            go(copied)
    finally:
        torch.set_num_threads(was)


# ------------------------------------------------------------------------------------------------ executors


def test_a_pool_of_processes(full, tmp_path):
    with ProcessPoolExecutor(2, mp_context=get_context('spawn')) as pool:
        assert compare(go(tmp_path / 'run', executor=pool), full[0]) == {}


class Flaky:
    "An executor in this process that loses every third task with its worker"

    def __init__(self, lose=3, always=False):
        self.lose, self.count, self.always = lose, 0, always

    def submit(self, f, *args):
        self.count += 1
        future = Future()
        if self.count % self.lose == 0 or self.always:
            future.set_exception(OSError('the worker is gone'))
        else:
            future.set_result(f(*args))
        return future


def test_a_lost_task_is_sent_again(full, tmp_path):
    flaky = Flaky()
    assert compare(go(tmp_path / 'a', executor=flaky), full[0]) == {} and flaky.count > 12
    with pytest.raises(OSError, match='the worker is gone'):
        go(tmp_path / 'b', executor=Flaky(always=True))
    assert compare(go(tmp_path / 'b'), full[0]) == {}


def test_parts_come_in_order(full, copied):
    "Whatever order an executor finishes in"
    for f in copied.glob('parts/*.zip'):
        f.unlink()
    run, seen = Run(copied), []

    class Backwards:
        "Does everything when the last task is submitted, the last one first"

        todo = []

        def submit(self, f, *args):
            self.todo.append((Future(), f, args))
            if len(self.todo) == 12:
                for future, f, args in reversed(self.todo):
                    future.set_result(f(*args))
            return self.todo[-1][0]

    problem = Run.problem
    run.measure(executor=Backwards(), ready=lambda p: seen.append((p.seed.item(), p.step.item(), p.split.item())))
    assert (
        seen == run.all_tasks() and problem and run.record().drop_vars('seconds').equals(full[0].drop_vars('seconds'))
    )


def test_a_task_reads_all_it_needs_from_the_folder(full, copied):
    run = Run(copied)
    run.file('parts', 1, 5, 'test').unlink()
    code = f'from hessian_overlap.runs import measure_task; measure_task({str(copied)!r}, 1, 5, "test")'
    tests = Path(__file__).parent
    r = subprocess.run(
        [sys.executable, '-c', code],
        env={**QUIET, 'PYTHONPATH': os.pathsep.join([str(tests), *sys.path])},
        capture_output=True,
        text=True,
    )
    assert r.returncode == 0, r.stderr
    assert not run.tasks() and run.record().drop_vars('seconds').equals(full[0].drop_vars('seconds'))


def test_a_task_refuses_another_problem(copied, monkeypatch):
    import pickle

    import hessian_overlap.runs as runs

    Run(copied).file('parts', 0, 5, 'test').unlink()
    monkeypatch.setattr(runs, '_PROBLEMS', {})
    (copied / 'problem.pickle').write_bytes(pickle.dumps(partial(make_problem, activation=torch.nn.ReLU)))
    with pytest.raises(ValueError, match='is another one here: its loss differs'):
        measure_task(copied, 0, 5, 'test')
    (copied / 'problem.pickle').unlink()
    with pytest.raises(RecordError, match='has no problem.pickle'):
        measure_task(copied, 0, 5, 'test')


# ------------------------------------------------------------------------------------------------ snapshots, identity


def test_snapshots_keep_every_kind_of_tensor(tmp_path):
    m = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1)).eval()
    m[2].bfloat16()
    m.register_buffer('odd', torch.tensor([float('nan'), -0.0, 5e-324], dtype=torch.float64))
    m.register_buffer('flags', torch.tensor([True, False]))
    m.register_buffer('none', torch.zeros(0, 3))
    write_snapshot(tmp_path / 'a', m, run='x', seed=0, step=1)
    state, words, seal = read_snapshot(tmp_path / 'a')
    assert words['run'] == 'x' and len(seal) == 64
    for name, t in m.state_dict().items():
        assert state[name].dtype == t.dtype and state[name].shape == t.shape, name
        assert state[name].contiguous().view(-1).view(torch.uint8).equal(t.contiguous().view(-1).view(torch.uint8)), (
            name
        )
    other = load_state(copy.deepcopy(m), state)
    assert other[1].num_batches_tracked == m[1].num_batches_tracked


def test_fingerprints_are_equal_up_to_rounding():
    p = make_problem()
    a = fingerprint(p, p.model, ['train', 'test'], 30)
    assert a == fingerprint(p, p.model, ['train', 'test'], 30)
    rounded = {k: np.array(v) * (1 + 1e-6) for k, v in a.items()}
    assert same_identity(a, rounded) == []
    assert same_identity(a, a | dict(outputs=[])) == ['outputs']
    assert same_identity(a, a | dict(loss=[v + 1e-3 for v in a['loss']])) == ['loss']
