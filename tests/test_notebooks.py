"Every notebook runs from top to bottom, as `nbdev_test` runs it; and keeps the few rules that the docs depend on."

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NBS = sorted(
    p for p in (ROOT / 'nbs').rglob('*.ipynb') if not any(s.startswith(('_', '.')) for s in p.relative_to(ROOT).parts)
)
FLAGS = os.environ.get('NBDEV_FLAGS', '')  # NBDEV_FLAGS=cuda runs the GPU cells too
each_notebook = pytest.mark.parametrize('nb', NBS, ids=lambda p: p.relative_to(ROOT / 'nbs').as_posix())
RUN = """
import sys
from pathlib import Path
from nbdev.config import get_config
from nbdev.test import test_nb
cfg = get_config()
skip, force = cfg.tst_flags.split(), sys.argv[2].split()
ok, seconds = test_nb(Path(sys.argv[1]), skip_flags=skip, force_flags=force, basepath=cfg.config_path)
sys.exit(not ok)
"""


def cells(nb):
    return [(c, ''.join(c['source'])) for c in json.loads(nb.read_text(encoding='utf-8'))['cells']]


@each_notebook
def test_notebook_runs(nb):
    r = subprocess.run(
        [sys.executable, '-W', 'ignore', '-c', RUN, str(nb), FLAGS], cwd=ROOT, capture_output=True, text=True
    )
    assert r.returncode == 0, f'{nb.name} failed\n{r.stderr}{r.stdout}'


@each_notebook
def test_imports_stand_alone(nb):
    "To build the docs of a module nbdev runs every cell that imports, and no other: such a cell must need nothing else"
    if not any(re.search(r'^#\|\s*default_exp', s, re.M) for _, s in cells(nb)):
        pytest.skip('exports nothing')
    for c, s in cells(nb):
        if c['cell_type'] != 'code' or re.search(r'^#\|\s*(export|hide|eval:\s*false)', s, re.M):
            continue
        try:
            tree = ast.parse(s)
        except SyntaxError:
            continue  # a cell with magics
        if not any(isinstance(o, (ast.Import, ast.ImportFrom)) for o in ast.walk(tree)):
            continue
        alone = all(isinstance(o, (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)) for o in tree.body)
        assert alone, f'{nb.name}: put the imports of this cell into a cell of their own\n{s}'


@each_notebook
def test_outputs_are_clean(nb):
    "No error, no warning and no path of the machine that ran it among the committed outputs"
    for c, s in cells(nb):
        for o in c.get('outputs', []):
            assert o['output_type'] != 'error', f'{nb.name}: a committed error under\n{s}'
            assert o.get('name') != 'stderr', f'{nb.name}: committed stderr under\n{s}\n{"".join(o["text"])}'
            text = ''.join(
                ''.join(v) if isinstance(v, (str, list)) else ''
                for k, v in o.get('data', {}).items()
                if k.startswith('text/')
            ) + ''.join(o.get('text', ''))
            path = re.search(r'(?:/home/|/root/|/Users/|/work/|/tmp/|site-packages)\S*', text)
            assert not path, f'{nb.name}: the path {path[0]} under\n{s}'


@each_notebook
def test_exported_cells_are_short(nb):
    for _, s in cells(nb):
        if re.search(r'^#\|\s*exports?\b', s, re.M) and (n := len(s.strip().splitlines())) > 41:
            pytest.fail(f'{nb.name}: an exported cell of {n - 1} lines, at most 40\n{s[:200]}')
