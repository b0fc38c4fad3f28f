"The committed package, README and notebooks are what the tools make of the notebooks."

import ast
import configparser
import filecmp
import json
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

BIN = Path(sys.executable).parent


def run(*cmd, cwd):
    r = subprocess.run([str(c) for c in cmd], cwd=cwd, capture_output=True, text=True)
    assert r.returncode == 0, r.stdout + r.stderr
    return r.stdout


def files(folder):
    return sorted(p.relative_to(folder) for p in folder.rglob('*') if p.is_file() and '__pycache__' not in p.parts)


def test_export_is_current(root, scratch):
    "nbdev_clean and nbdev_export change nothing"
    run(BIN / 'nbdev_clean', cwd=scratch)
    run(BIN / 'nbdev_export', cwd=scratch)
    for f in files(scratch / 'nbs'):
        if f.suffix == '.ipynb':
            assert filecmp.cmp(scratch / 'nbs' / f, root / 'nbs' / f, shallow=False), f'nbs/{f}: run make export'
    ours, theirs = ({f for f in files(p / 'hessian_overlap') if f.suffix == '.py'} for p in (root, scratch))
    assert ours == theirs
    for f in ours:
        assert filecmp.cmp(root / 'hessian_overlap' / f, scratch / 'hessian_overlap' / f, shallow=False), (
            f'hessian_overlap/{f}: run make export'
        )


def test_readme_is_current(root):
    run(sys.executable, root / 'tools/make_readme.py', '--check', cwd=root)


def test_one_configuration(root):
    "nbs/_quarto.yml is a link to the one at the top; versions agree"
    link = root / 'nbs/_quarto.yml'
    assert link.is_symlink() and link.resolve() == root / '_quarto.yml'
    cfg = configparser.ConfigParser(delimiters=['='], interpolation=None)
    cfg.read(root / 'settings.ini')
    version = cfg['DEFAULT']['version']
    assert f'version: {version}\n' in (root / 'CITATION.cff').read_text()
    assert f'## {version}' in (root / 'CHANGELOG.md').read_text()
    import hessian_overlap

    assert hessian_overlap.__version__ == version


def imported(node):
    "The modules of this package that an import statement names, without the package"
    if isinstance(node, ast.ImportFrom):
        names = [f'hessian_overlap.{node.module}' if node.level else node.module]
    else:
        names = [a.name for a in node.names]
    own = [name.split('.')[1] for name in names if name.startswith('hessian_overlap.')]
    return [name for name in own if name != 'None']  # from . import __version__


def numbers(root):
    "Module -> the number of its notebook"
    number = {}
    for nb in (root / 'nbs').glob('[0-9]*.ipynb'):
        for c in json.loads(nb.read_text())['cells']:
            if m := re.search(r'^#\|\s*default_exp\s+(\w+)', ''.join(c['source']), re.M):
                number[m[1]] = int(nb.name[:2])
    return number


def test_every_module_imports_only_lower_ones(root):
    "The data flows one way, by plain imports at the top: of modules of lower-numbered notebooks"
    number = numbers(root)
    assert number
    for name, n in number.items():
        tree = ast.parse((root / 'hessian_overlap' / f'{name}.py').read_text())
        assert 'import_module' not in ast.unparse(tree), f'{name} imports by import_module'
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                for used in imported(node):
                    assert number[used] < n, f'{name} ({n}) imports {used} ({number[used]})'
                    assert node in tree.body, f'{name} imports {used} inside a function'


def test_wheel_from_sdist(scratch, tmp_path):
    "The source archive holds what the wheel needs, and the wheel holds the package, its data and the license"
    run(sys.executable, '-m', 'build', '--no-isolation', '--outdir', tmp_path, '.', cwd=scratch)
    sdist, wheel = next(tmp_path.glob('*.tar.gz')), next(tmp_path.glob('*.whl'))
    inside = {n.partition('/')[2] for n in tarfile.open(sdist).getnames()}
    assert {'settings.ini', 'README.md', 'LICENSE', 'setup.py'} <= inside
    names = set(zipfile.ZipFile(wheel).namelist())
    want = {f'hessian_overlap/{f.as_posix()}' for f in files(scratch / 'hessian_overlap')}
    assert want <= names, want - names
    assert any(n.endswith('LICENSE') for n in names)
    assert not any(n.startswith(('tests', 'nbs', 'tools')) for n in names)
    entry = next(zipfile.ZipFile(wheel).read(n).decode() for n in names if n.endswith('entry_points.txt'))
    assert 'hessian-overlap = hessian_overlap.cli:main' in entry and 'hessian_overlap._modidx:d' in entry
