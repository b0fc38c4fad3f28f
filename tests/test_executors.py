"Executors that users bring: Dask with a worker that is killed, submitit; each ends with the numbers of one process."

import os
import signal
import sys
import threading
import time

import pytest
import torch
from own import make_problem

from hessian_overlap.experiment import run_overlap
from hessian_overlap.methods import Eigsh
from hessian_overlap.record import compare, load_record

ASK = dict(steps=10, snapshots=[0, 5, 10], samples=30, num_random=3, seeds=(0, 1), progress=False)


@pytest.fixture(scope='module')
def full():
    torch.set_num_threads(1)
    return run_overlap(make_problem, Eigsh(k=6), **ASK)


def slow(seed):
    "The same problem, but a worker takes a while to make it, so that it can be killed at work"
    time.sleep(0.5)
    return make_problem(seed)


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    "own.py, for other processes"
    monkeypatch.setenv('PYTHONPATH', os.pathsep.join([os.path.dirname(__file__), *sys.path]))


def test_dask_with_a_worker_that_is_killed(full, tmp_path):
    distributed = pytest.importorskip('distributed')
    parts = tmp_path / 'run' / 'parts'
    cluster = distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None)
    with cluster, distributed.Client(cluster) as client:
        before = client.run(os.getpid)

        def kill():
            while not parts.exists() or not list(parts.glob('*.zip')):
                time.sleep(0.01)
            os.kill(next(iter(before.values())), signal.SIGKILL)

        killer = threading.Thread(target=kill)
        killer.start()
        got = run_overlap(slow, Eigsh(k=6), **ASK, out=tmp_path / 'run', executor=client.get_executor())
        killer.join()
        assert compare(got, full) == {} and compare(load_record(tmp_path / 'run'), full) == {}


def test_submitit(full, tmp_path):
    submitit = pytest.importorskip('submitit')
    executor = submitit.AutoExecutor(folder=tmp_path / 'logs', cluster='local')
    executor.update_parameters(timeout_min=5)
    few = ASK | dict(seeds=(0,), snapshots=[0, 5])
    got = run_overlap(make_problem, Eigsh(k=6), **few, out=tmp_path / 'run', executor=executor)
    assert len(list((tmp_path / 'logs').glob('*_result.pkl'))) == 4
    numbers = ('settings.seeds', 'settings.steps', 'settings.identity', 'seconds', 'versions')
    want = full.sel(seed=[0], step=[0, 5])
    assert [o for o in compare(got, want) if o not in numbers] == []
