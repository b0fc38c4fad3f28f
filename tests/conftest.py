"Shared by all tests: one thread a process (two on two busy cores are ten times slower), no display, tools/ importable."

import os
import sys
from pathlib import Path

for name, value in dict(OMP_NUM_THREADS='1', MKL_NUM_THREADS='1', MPLBACKEND='agg').items():
    os.environ.setdefault(name, value)

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / 'tools'))


def missing(what):
    "Skip because `what` is not on this machine; under CI that is a failure, so that a green run has tested everything"
    if os.environ.get('CI', '').lower() in ('', '0', 'false'):
        pytest.skip(what)
    pytest.fail(f'{what}: under CI this counts as a failure')


@pytest.fixture(scope='session')
def root():
    return ROOT


@pytest.fixture(scope='session')
def artefacts():
    "Where browser tests leave their screenshots"
    folder = ROOT / 'artefacts'
    folder.mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope='session')
def once(tmp_path_factory):
    "once(name, make): the first of all processes to ask calls `make(folder)` -> (folder, what it returned)"
    import json

    from filelock import FileLock  # torch brings it

    base = tmp_path_factory.getbasetemp()
    if 'PYTEST_XDIST_WORKER' in os.environ:
        base = base.parent

    def get(name, make):
        folder, done = base / name, base / f'{name}.json'
        with FileLock(base / f'{name}.lock'):
            if not done.exists():
                folder.mkdir()
                done.write_text(json.dumps(make(folder)))
        return folder, json.loads(done.read_text())

    return get


@pytest.fixture(scope='session')
def need_browser():
    "Skip (under CI: fail) where there is no Chromium"
    from browser import find_browser

    if find_browser() is None:
        missing('no Chromium on this machine')


@pytest.fixture(scope='session')
def scratch(tmp_path_factory):
    "A copy of the project's sources, to run tools that write"
    import shutil

    leave = shutil.ignore_patterns(
        '.git',
        '.venv',
        '_proc',
        '_docs',
        '_site_src',
        '_vendor',
        'runs',
        'artefacts',
        'build',
        'dist',
        '*.egg-info',
        '__pycache__',
        '.pytest_cache',
    )
    copy = tmp_path_factory.mktemp('scratch') / 'p'
    shutil.copytree(ROOT, copy, symlinks=True, ignore=leave)
    return copy
