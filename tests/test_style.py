"The house style: what `ruff check` and `ruff format` say of the sources, and no module takes another's private names."

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PLAIN = ('tests', 'tools', 'benchmarks')  # notebooks are checked, not formatted: ruff.toml says why
NOTEBOOKS = [p for p in (ROOT / 'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts]
SOURCES = sorted(NOTEBOOKS) + sorted(p for folder in PLAIN for p in (ROOT / folder).rglob('*.py'))


def ruff(*args):
    r = subprocess.run([sys.executable, '-m', 'ruff', *args], cwd=ROOT, capture_output=True, text=True)
    if r.returncode:
        pytest.fail(f'ruff {" ".join(args)}\n{r.stdout}{r.stderr}', pytrace=False)


def test_ruff_check():
    "Notebooks, tests, tools and benchmarks keep the rules of ruff.toml"
    ruff('check', '--no-cache', '--output-format', 'concise', 'nbs', 'hessian_overlap', *PLAIN)


def test_ruff_format():
    "Tests, tools and benchmarks are laid out as `ruff format` does it"
    ruff('format', '--no-cache', '--check', '--diff', *PLAIN)


def code(path):
    "The Python of a file or of the cells of a notebook, each by itself"
    text = path.read_text(encoding='utf-8')
    if path.suffix == '.py':
        return [text]
    return [''.join(c['source']) for c in json.loads(text)['cells'] if c['cell_type'] == 'code']


def private_imports(source):
    "(module, name) of every name with a leading underscore that is imported from this package"
    try:
        tree = ast.parse(source)
    except SyntaxError:  # a cell with magics
        return
    for node in ast.walk(tree):
        if not isinstance(node, ast.ImportFrom) or (node.module or '').split('.')[0] != 'hessian_overlap':
            continue
        for a in node.names:
            if a.name.startswith('_') and not a.name.endswith('__'):
                yield node.module, a.name


@pytest.mark.parametrize('path', SOURCES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_helpers_of_others_are_public(path):
    "A helper that another module imports is public"
    found = [f'{module}.{name}' for source in code(path) for module, name in private_imports(source)]
    assert not found, f'imports {", ".join(found)}: a name that others use has no leading underscore'
