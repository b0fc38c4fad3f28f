"The command line: everything it says, draws and refuses, in this process and as a program under all conditions."

import io
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

import hessian_overlap.cli as cli
import hessian_overlap.experiment as ex
from hessian_overlap.cli import main, numbers, optimizer_of
from hessian_overlap.record import compare, load_record, table_text

SMALL = ['--k', '12', '--samples', '100', '--device', 'cpu', '--num-random', '2']
QUIET = {**os.environ, 'OMP_NUM_THREADS': '1', 'MPLBACKEND': 'agg', 'CUDA_VISIBLE_DEVICES': ''}
OWN = Path(__file__).with_name('own.py')
FAST = ['run', str(OWN), '--k', '6', '--samples', '30', '--num-random', '2', '--steps', '10', '--snapshots', '0,10']


def call(*argv):
    "main in this process: its code, its output, and what it says on stderr"
    out, err = io.StringIO(), io.StringIO()
    was = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = out, err
    try:
        code = main([str(a) for a in argv])
    finally:
        sys.stdout, sys.stderr = was
    return code, out.getvalue(), err.getvalue()


def program(*argv, **kw):
    return subprocess.run(
        [sys.executable, '-m', 'hessian_overlap', *map(str, argv)],
        capture_output=True,
        text=True,
        **{'env': QUIET, **kw},
    )


@pytest.fixture(scope='module')
def done(tmp_path_factory):
    d = tmp_path_factory.mktemp('runs') / 'done'
    code, out, err = call(*FAST, '--out', d)
    assert code == 0 and err == '', err
    return d, out


def test_a_run_prints_its_table_and_says_where_the_figures_are(done):
    d, out = done
    for line in table_text(load_record(d)).splitlines():
        assert line in out  # the rows printed as it went are those of the record
    figures = sorted((d / 'figures').iterdir())
    assert [f.name for f in figures] == ['overlap_curve.png', 'overlap_over_training.png', 'spectrum.png']
    assert all(str(f) in out and f.read_bytes()[:4] == b'\x89PNG' for f in figures)
    assert re.search(r'finished in \d+ s, \d+ matvecs', out) and str(d) in out


def test_show_draws_again_without_computing(done, monkeypatch):
    d, _ = done
    before = {f: f.read_bytes() for f in d.rglob('*') if f.is_file()}
    (d / 'figures' / 'spectrum.png').unlink()
    for name in ('run_overlap', 'run_checkpoints', 'problem_maker'):
        monkeypatch.setattr(cli, name, None)
    code, out, err = call('show', d)
    assert code == 0 and not err and table_text(load_record(d)) in out and 'overlap_curve.png' in out
    assert before == {f: f.read_bytes() for f in d.rglob('*') if f.is_file()}


def test_a_finished_run_is_taken_up_with_nothing_to_do(done, monkeypatch):
    "Killed after its record was written, it draws its figures; a damaged record is made again"
    d, _ = done
    record = load_record(d)
    (d / 'figures' / 'spectrum.png').unlink()
    monkeypatch.setattr('hessian_overlap.runs.measure_task', None)
    monkeypatch.setattr(ex, 'train', None)
    code, out, err = call(*FAST, '--out', d)
    assert code == 0 and '4 of 4 parts are there' in out and (d / 'figures' / 'spectrum.png').exists()
    (d / 'record.zarr.zip').write_bytes(b'')
    assert call('show', d)[0] == 0 and load_record(d).equals(record)


def test_other_settings_and_overwrite(tmp_path):
    d = tmp_path / 'run'
    assert call(*FAST, '--out', d)[0] == 0
    before = {f: f.stat().st_mtime_ns for f in d.rglob('*') if f.is_file()}
    code, out, err = call(*FAST, '--out', d, '--k', '5')
    assert code == 2 and 'was begun with other settings' in err and '--overwrite' in err
    assert before == {f: f.stat().st_mtime_ns for f in d.rglob('*') if f.is_file()}
    (d / 'notes.txt').write_text('mine')
    assert call(*FAST, '--out', d, '--k', '5', '--overwrite')[0] == 0
    assert load_record(d).k.size == 5 and (d / 'notes.txt').exists()


def test_seeds_snapshots_optimizer_order(tmp_path):
    np.save(tmp_path / 'up.npy', np.arange(32))
    torch.save(torch.arange(32).flip(0), tmp_path / 'down.pt')
    code, out, err = call(
        *FAST, '--seeds', '0,4', '--optimizer', 'adamw:lr=0.01,amsgrad=true', '--order',
        f'{tmp_path}/up.npy,{tmp_path}/down.pt', '--out', tmp_path / 'run',
    )  # fmt: skip
    ds = load_record(tmp_path / 'run')
    assert code == 0 and ds.seed.values.tolist() == [0, 4] and ds.step.values.tolist() == [0, 10]
    assert {'up', 'down'} < set(ds.order.values) and 'mean over 2 seeds' in out and table_text(ds) in out
    assert 'AdamW' in ds.settings and 'lr: 0.01' in ds.settings and 'amsgrad: True' in ds.settings


def test_checkpoints_from_the_command_line(tmp_path):
    from own import make_problem

    p = make_problem()
    for step in (5, 100):
        torch.save(p.model.state_dict(), tmp_path / f'ckpt-{step}.pt')
    code, out, err = call(*FAST[:8], '--checkpoints', tmp_path / '*.pt', '--out', tmp_path / 'run', '--seeds', '3')
    ds = load_record(tmp_path / 'run')
    assert code == 0 and ds.step.values.tolist() == [5, 100] and ds.seed.values.tolist() == [3]
    assert ds.split.values.tolist() == ['train', 'test'] and (ds.accuracy > 0).all()


def test_problems_compare_export(done, tmp_path):
    d, _ = done
    assert call(*FAST, '--out', tmp_path / 'b', '--seeds', '1')[0] == 0
    code, out, err = call('problems')
    assert code == 0 and 'mnist_mini' in out and '7030' in out
    code, out, err = call('compare', d, tmp_path / 'b', '--out', tmp_path / 'c.png')
    assert code == 0 and (tmp_path / 'c.png').read_bytes()[:4] == b'\x89PNG'
    assert (
        f'{d} and {tmp_path}/b:' in out and re.search(r'overlap: by .* at most', out) and 'seed: ([0], [1])' not in out
    )
    code, out, err = call('export', d, '--csv', tmp_path / 'a.csv', '--netcdf', tmp_path / 'a.nc')
    ds, rows = load_record(d), (tmp_path / 'a.csv').read_text().splitlines()
    assert (
        code == 0
        and len(rows) == 1 + ds.overlap.size
        and rows[0].startswith('seed,step,split,order,k,overlap,low,high')
    )
    with xr.open_dataset(tmp_path / 'a.nc') as back:
        assert np.array_equal(back.overlap, ds.overlap) and back.attrs['problem'] == 'mine'
    assert call('export', d)[0] == 2


def argv(*more):
    return ['run', 'mnist_mini', *SMALL, '--steps', '0', *more]


BAD = {
    'no command': ([], 'COMMAND'),
    'unknown command': (['walk'], "invalid choice: 'walk'"),
    'no problem': (['run'], 'problem'),
    'unknown problem': (['run', 'imagenet'], "unknown problem 'imagenet'; known: mnist_mini"),
    'no such file': (['run', 'nowhere.py'], 'nowhere.py: No such file'),
    'no such function': (['run', f'{OWN}:nothing'], 'own.py has no function nothing'),
    'k above n': (argv('--k', '7031'), 'k = 7031 is more than the n = 7030'),
    'k zero': (argv('--k', '0'), 'k must be .*, got 0'),
    'k no number': (argv('--k', 'ten'), "argument --k: invalid int value: 'ten'"),
    'steps': (argv('--steps=-1'), 'steps must be'),
    'snapshots': (argv('--snapshots', '0,x'), "--snapshots: invalid numbers value: '0,x'"),
    'snapshots beyond': (argv('--snapshots', '0,5'), 'a snapshot must be an integer from 0 to 0, got 5'),
    'samples not divisible': (argv('--samples', '105'), 'samples=105'),
    'samples too many': (argv('--samples', '5000'), 'samples=5000'),
    'method': (argv('--method', 'power'), "unknown method 'power'; choose eigsh, seigh, slq"),
    'dtype': (argv('--dtype', 'float16'), "unknown dtype 'float16'"),
    'device': (argv('--device', 'tpu9'), "device 'tpu9' cannot be used"),
    'no such gpu': (argv('--device', 'cuda:99'), "device 'cuda:99' cannot be used"),
    'seed': (argv('--seeds=-1'), 'seed'),
    'seeds': (argv('--seeds', '0,0.5'), "--seeds: invalid numbers value: '0,0.5'"),
    'inner below outer': (
        argv('--method', 'seigh', '--num-outer', '30', '--num-inner', '20'),
        'num_inner = 20 is less',
    ),
    'outer for eigsh': (argv('--num-outer', '30'), 'num_outer is not a setting of eigsh'),
    'tol for slq': (argv('--method', 'slq', '--tol', '1e-3'), 'tol is not a setting of slq'),
    'slq at n': (argv('--method', 'slq', '--k', '7030'), 'slq goes up to k = 7029'),
    'tol zero': (argv('--tol', '0'), 'tol must be'),
    'threads zero': (argv('--threads', '0'), 'threads must be'),
    'workers zero': (argv('--workers=-1'), 'workers must be'),
    'optimizer': (argv('--optimizer', 'warp'), "torch.optim has no 'warp'; it has .*adamw"),
    'optimizer setting': (
        argv('--optimizer', 'adamw:lr=fast'),
        "--optimizer: invalid optimizer_of value: 'adamw:lr=fast'",
    ),
    'order': (argv('--order', 'nowhere.npy'), 'nowhere.npy: No such file'),
    'no checkpoints': (['run', str(OWN), '--checkpoints', 'no/*.pt'], 'there are no checkpoints'),
    'root': (argv('--root', '/nonexistent'), 'sha256.*/nonexistent'),
    'unknown option': (argv('--kk', '3'), 'unrecognized arguments: --kk'),
    'unwritable': (argv('--out', '/proc/runs/x'), '/proc/runs'),
    'show nothing': (['show'], 'run'),
    'show missing': (['show', 'nowhere'], 'no record in nowhere'),
    'explore missing': (['explore', 'nowhere'], 'no record in nowhere'),
    'compare nothing': (['compare'], 'runs'),
    'compare missing': (['compare', 'a', 'b'], 'no record in a'),
    'export nothing': (['export', 'nowhere'], 'nothing to write: give --csv'),
}


@pytest.mark.parametrize('case', BAD)
def test_bad_input_gives_one_sentence(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ex, 'train', None)  # none of these gets as far as training
    args, says = BAD[case]
    code, out, err = call(*args)
    assert code == 2 and re.search(says, err) and err.startswith('hessian-overlap: ') and err.count('\n') == 1, err
    assert [o for o in tmp_path.rglob('*') if o.is_file() and o.name != 'settings.json'] == []


def test_help_lists_every_option_with_dashes():
    code, out, err = call('run', '--help')
    assert (
        code == 0 and '--num-random' in out and '_' not in re.sub(r'OPTIMIZER_OF|OMP_NUM_THREADS|mnist_mini', '', out)
    )
    code, out, err = call('--help')
    assert code == 0 and all(f.__name__ in out and f.__doc__.split()[0] in out for f in cli.COMMANDS)
    assert call('--version')[1].startswith('hessian-overlap ')


def test_arguments():
    assert numbers('0,100') == (0, 100) and numbers('3') == (3,)
    want = dict(name='SGD', momentum=0.9, nesterov=True, lr=0.01, foreach=None)
    assert optimizer_of('SGD:momentum=0.9,nesterov=True,lr=1e-2,foreach=none') == want


def test_threads_are_given_back(monkeypatch):
    was, seen = torch.get_num_threads(), []

    def run_overlap(*args, **kw):
        seen.append(torch.get_num_threads())
        raise ValueError('enough')

    monkeypatch.setattr(cli, 'run_overlap', run_overlap)
    assert call(*argv('--threads', '2'))[0] == 2 and seen == [2] and torch.get_num_threads() == was
    monkeypatch.setenv('OMP_NUM_THREADS', '2,1')
    assert call(*argv())[0] == 2 and seen == [2, 2] and torch.get_num_threads() == was


def test_a_full_disk_names_the_path_and_the_run_can_go_on(tmp_path, monkeypatch):
    real, full = os.fsync, [False]

    def fsync(fd):
        if full[0]:
            raise OSError(28, 'No space left on device')
        full[0] = 'snapshots' in os.readlink(f'/proc/self/fd/{fd}')
        return real(fd)

    monkeypatch.setattr(os, 'fsync', fsync)
    code, out, err = call(*FAST, '--out', tmp_path)
    assert code == 2 and re.search(rf'{tmp_path}/.*zip: No space left on device', err), err
    monkeypatch.undo()
    assert call(*FAST, '--out', tmp_path)[0] == 0


def test_out_of_memory_is_a_sentence_and_a_bug_is_not(monkeypatch):
    for error, said in [
        (torch.OutOfMemoryError('CUDA out of memory'), 'CUDA out of memory'),
        (MemoryError(), 'out of memory'),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), 'allocate memory'),
        (FloatingPointError('the loss is nan'), 'the loss is nan'),
        (PermissionError(13, 'Permission denied', '/x'), '/x: Permission denied'),
    ]:
        monkeypatch.setattr(cli, 'record_of', lambda run, error=error: (_ for _ in ()).throw(error))
        code, out, err = call('show', 'x')
        assert code == 2 and said in err
    monkeypatch.setattr(cli, 'record_of', lambda run: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        call('show', 'x')


# ------------------------------------------------------------------------------------------------ as a program


def wait_for(p, d, parts):
    deadline = time.time() + 120
    while len(list(d.glob('parts/*.zip'))) < parts and p.poll() is None and time.time() < deadline:
        time.sleep(0.01)
    assert p.poll() is None, p.communicate()


def interruptible():
    "A program that runs in the background of a shell ignores Ctrl-C, and so would its children"
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@pytest.mark.parametrize('sign, code, says', [(signal.SIGINT, 130, 'interrupted'), (signal.SIGTERM, 143, 'terminated')])
def test_ctrl_c_and_sigterm_say_what_to_do(sign, code, says, tmp_path):
    d = tmp_path / 'run'
    more = ['run', 'mnist_mini', '--k', '80', '--steps', '50', '--out', str(d), '--overwrite']
    full = program(*more[:-2], str(tmp_path / 'full'))
    assert full.returncode == 0, full.stderr
    p = subprocess.Popen(
        [sys.executable, '-m', 'hessian_overlap', *more],
        env=QUIET,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=interruptible,
    )
    wait_for(p, d, 1)
    p.send_signal(sign)
    out, err = p.communicate()
    assert p.returncode == code and 'Traceback' not in err
    assert err == f'hessian-overlap: {says}; the same command takes the run up again where it was\n'
    unfinished = program('show', d)
    assert unfinished.returncode == 2 and re.search('not finished .[1-3] of 4 parts', unfinished.stderr)
    last = program(*more)
    assert last.returncode == 0 and re.search('resuming .*: [1-3] of 4 parts are there', last.stdout), last.stderr
    assert compare(load_record(d), load_record(tmp_path / 'full')) == {}
    assert [f for f in d.rglob('*') if f.name.startswith('.')] == []


def test_a_terminal_of_another_encoding(done):
    "cp1252 has no λ: it is replaced, and nothing stops"
    for encoding in ('cp1252', 'ascii'):
        r = subprocess.run(
            [sys.executable, '-m', 'hessian_overlap', 'show', str(done[0])],
            env={**QUIET, 'PYTHONIOENCODING': encoding},
            capture_output=True,
        )
        assert r.returncode == 0 and b'?1' in r.stdout and r.stderr == b'', r.stderr
    r = program(*FAST, '--out', done[0], env={**QUIET, 'PYTHONIOENCODING': 'cp1252'}, encoding='cp1252')
    assert r.returncode == 0 and r.stderr == '', r.stderr


def test_no_bars_where_stderr_is_no_terminal(tmp_path):
    r = program(*FAST, '--out', tmp_path)
    assert r.returncode == 0 and r.stderr == '', r.stderr


def test_workers(done, tmp_path):
    r = program(*FAST, '--out', tmp_path / 'run', '--workers', '2')
    assert r.returncode == 0, r.stderr
    assert compare(load_record(tmp_path / 'run'), load_record(done[0])) == {}


def test_the_program_itself(done):
    "Help works, a pipe that closes is no traceback"
    r = program('show', done[0])
    assert r.returncode == 0 and r.stdout == call('show', done[0])[1] and r.stderr == ''
    shell = f'"{sys.executable}" -m hessian_overlap show "{done[0]}" | head -1'
    r = subprocess.run(shell, shell=True, env=QUIET, capture_output=True, text=True)
    assert r.stdout.startswith('mine: n=32') and 'Traceback' not in r.stderr
