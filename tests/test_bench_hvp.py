"The benchmark of Hessian-vector products runs, checks its numbers, and says what is missing."

import json
import subprocess
import sys


def bench(root, out, *args):
    r = subprocess.run(
        [
            sys.executable,
            str(root / 'benchmarks/bench_hvp.py'),
            '--problems',
            'mlp',
            '--samples',
            '20',
            '--vectors',
            '3',
            '--repeats',
            '1',
            '--threads',
            '1',
            '--out',
            str(out),
            *args,
        ],
        cwd=root,
        capture_output=True,
        text=True,
    )
    return r, json.loads(out.read_text()) if out.exists() else None


def test_side_by_side(root, tmp_path):
    r, got = bench(root, tmp_path / 'b.json', '--columns', '20', '--methods', 'ours', 'kept_graph')
    assert r.returncode == 0, r.stderr
    p = got['problems']['mlp']
    assert p['reference']['finite_difference_error'] < 1e-6 and p['reference']['n'] == 7030
    for name, m in p['methods'].items():
        assert m['status'] == 'ok', (name, m)
        assert m['error_float32'] < 1e-5 and m['error_single'] < 1e-5 and m['error_float64'] < 1e-10, name
        assert m['block']['gradients'] > 0 and m['single']['seconds'] > 0 and m['memory'] >= m['memory_single'] >= 0
    assert set(p['ours_against']) == {'kept_graph'}
    assert p['batches']['status'] == 'ok' and p['batches']['difference'] < 1e-5
    assert [c['columns'] for c in p['columns']] == [16, 20] and all(c['status'] == 'ok' for c in p['columns'])
    assert got['environment']['torch'] and 'hessian_overlap' in r.stdout


def test_a_missing_package_is_listed(root, monkeypatch):
    monkeypatch.syspath_prepend(str(root / 'benchmarks'))
    import argparse

    import bench_hvp

    monkeypatch.setitem(bench_hvp.METHODS, 'other', (None, 'no_such_package', 'other'))
    assert bench_hvp.worker(argparse.Namespace(worker='run_method', method='other', peers=[])) == dict(
        status='absent', why='no_such_package is not installed'
    )


def test_a_crash_is_an_answer(root, monkeypatch):
    monkeypatch.syspath_prepend(str(root / 'benchmarks'))
    import argparse

    import bench_hvp

    a = argparse.Namespace(device='cpu', threads=1, repeats=1, peers=[], timeout=60)
    monkeypatch.setattr(bench_hvp.subprocess, 'run', lambda *_, **kw: subprocess.CompletedProcess([], -11, '', ''))
    got = bench_hvp.call(a, 'run_method', problem='mlp', method='linearize')
    assert (got['status'], got['why']) == ('crashed', 'SIGSEGV')
