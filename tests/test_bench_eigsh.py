"The benchmark of eigenpairs runs, and its numbers are what they should be."

import json
import subprocess
import sys


def test_side_by_side(root, tmp_path):
    out = tmp_path / 'b.json'
    r = subprocess.run(
        [
            sys.executable,
            str(root / 'benchmarks/bench_eigsh.py'),
            '--problems',
            'small',
            '--methods',
            'ours_25',
            'scipy_ours',
            'skerch_hmt',
            '--threads',
            '1',
            '--no-warm',
            '--out',
            str(out),
        ],
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert r.returncode == 0, r.stderr
    got = json.loads(out.read_text())
    p = got['problems']['small']
    assert p['n'] == 1500 and abs(p['lambda_1']) == 1
    runs = {m['method']: m for m in p['runs']}
    for name in ('ours_25', 'scipy_ours'):
        m = runs[name]
        assert m['status'] == 'ok', m
        assert (
            m['lost_subspace'] < 1e-9
            and m['eigval_error'] < 1e-6
            and m['overlap_error_350'] < 1e-9
            and 350 <= m['matvecs'] <= 1500
            and m['seconds'] > 0
        )
    assert runs['skerch_hmt']['status'] in ('absent', 'ok') and got['environment']['torch']
