"""Execute notebooks in place and keep what a reader should see: outputs, figures, widget state.

    python tools/exec_nbs.py [--flags "cuda slow"] [--jobs N] [notebook or folder ...]    (default: every page of nbs/)

Like `nbdev_test`, and unlike `jupyter nbconvert --execute`, it honours nbdev's directives: a cell marked `#| eval:
false`, or with one of the `tst_flags` of settings.ini that is not in --flags, is not run and keeps the outputs that it
has. Every notebook runs in a fresh process of its own, in its own folder, as a reader's fresh kernel would.

A notebook is written only after all of its cells have run, in one atomic step and already cleaned (as `nbdev_clean`
would). What is written depends on the content alone: widget ids are made from the id of the cell that created the
widget, progress bars and execution counts are dropped, seeds of hashing and SVG ids are fixed. Running it again gives
no diff. Figures are kept with 256 colours of their own, a third of the bytes, where no eye would see it.
"""

import argparse
import base64
import hashlib
import io
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

STATE, VIEW = 'application/vnd.jupyter.widget-state+json', 'application/vnd.jupyter.widget-view+json'
FIXED_ENV = dict(
    PYTHONHASHSEED='0',
    SOURCE_DATE_EPOCH='0',
    MPLBACKEND='agg',
    IN_TEST='1',
    PYTHONDONTWRITEBYTECODE='1',
    TQDM_MININTERVAL='3600',
)
PROGRESS = re.compile(r'\d+%\|.*\||\d+(it|matvec|step)s? \[\d\d:\d\d')  # a tqdm bar, with or without a total


class NotebookError(Exception):
    "A cell failed; the message is ready to be printed"


# ------------------------------------------------------------------------------------- one notebook


def without_progress(text):
    "What a terminal would still show of `text` once the progress bars have gone"
    lines = [line.rstrip('\r').rpartition('\r')[2] if '\r' in line else line for line in text.split('\n')]
    return '\n'.join(l for l in lines if not PROGRESS.search(l))


def lighter(png):
    "A figure with a palette of 256 colours, if that is hardly different and smaller; else as it is"
    import numpy as np
    from PIL import Image

    full = Image.open(io.BytesIO(png))
    if full.mode == 'RGBA' and full.getextrema()[3][0] < 255 or full.mode not in ('RGB', 'RGBA'):
        return png  # seen through, or few colours already
    full = full.convert('RGB')
    few = full.quantize(256, method=Image.Quantize.MEDIANCUT, kmeans=1, dither=Image.Dither.NONE)
    off = np.abs(np.asarray(few.convert('RGB')).astype(int) - np.asarray(full)).max(-1)
    buf = io.BytesIO()
    few.save(buf, format='png', optimize=True)
    return buf.getvalue() if np.percentile(off, 99.9) <= 24 and len(buf.getvalue()) < len(png) else png


def tidy(outputs):
    "The outputs of one cell without progress bars, its figures lighter"
    kept = []
    for o in outputs:
        if o['output_type'] == 'stream':
            text = without_progress(''.join(o['text']))
            if not text.strip():
                continue
            o = {**o, 'text': text.splitlines(keepends=True)}
        if png := o.get('data', {}).get('image/png'):
            o['data']['image/png'] = base64.b64encode(lighter(base64.b64decode(''.join(png)))).decode()
        kept.append(o)
    return kept


def is_skipped(cell, flags):
    "Does `nbdev_test` with these flags leave the cell out?"
    from nbdev.process import extract_directives

    directives = extract_directives(cell, remove=False)
    return directives.get('eval:', [''])[0].lower() == 'false' or bool(flags & directives.keys())


def views(cell):
    return [o['data'][VIEW]['model_id'] for o in cell.get('outputs', []) if VIEW in o.get('data', {})]


def reachable(models, roots):
    "The widget models that the models in `roots` need, in the order of `models`"
    todo, seen = list(roots), set()
    while todo:
        m = todo.pop()
        if m in seen or m not in models:
            continue
        seen.add(m)
        todo += re.findall(r'IPY_MODEL_(\w+)', json.dumps(models[m]))
    return {m: models[m] for m in models if m in seen}


def widget_state(nb, created, old):
    "The widgets in the outputs of `nb` under stable ids: `created` (live id -> stable id), `old` for skipped cells"
    live = {}
    if created:
        from ipywidgets import Widget

        live = Widget.get_manager_state(drop_defaults=True)['state']
    roots = [m for c in nb.cells for m in views(c)]
    models = {**reachable(old, roots), **reachable(live, roots)}
    if not models:
        return None
    text = json.dumps(models)
    for was, now in created.items():
        text = text.replace(was, now)
    for cell in nb.cells:
        for o in cell.get('outputs', []):
            v = o.get('data', {}).get(VIEW)
            if v and v['model_id'] in created:
                v['model_id'] = created[v['model_id']]
            plain = ''.join(o['data'].get('text/plain', '')) if v else ''
            if '(children=' in plain or '(value=b' in plain:
                o['data']['text/plain'] = [plain.partition('(')[0]]  # a widget's own repr: pages of bytes
    return dict(state=json.loads(text), version_major=2, version_minor=0)


def run_cell(shell, cell, name):
    "Run one cell and keep its outputs; NotebookError if it fails"
    from execnb.shell import format_exc

    cell.outputs = []  # the shell leaves old outputs where a cell gives none
    if 'nbdev_export(' in cell.source:
        return
    shell.cell(cell)
    if shell.exc:
        raise NotebookError(
            f'{name}: cell {cell.idx_ + 1} (id {cell.get("id")}) failed; the notebook is left as it was\n'
            f'{"-" * 100}\n{cell.source}\n{"-" * 100}\n{"".join(format_exc(shell.exc))}'
        )
    cell.outputs = tidy(cell.outputs)


def noteworthy(cell, root):
    "What the outputs of a cell should not hold"
    if any(o.get('name') == 'stderr' for o in cell.outputs):
        yield f'cell {cell.idx_ + 1} writes to stderr'
    if str(root) in json.dumps(cell.outputs):
        yield f"cell {cell.idx_ + 1} shows this machine's paths"


def name_widgets(cell, created):
    "Add the widgets that the cell has made to `created` (live id -> stable id)"
    if 'ipywidgets' not in sys.modules:
        return
    fresh = [m for m in sys.modules['ipywidgets'].Widget.get_manager_state()['state'] if m not in created]
    for i, m in enumerate(fresh):
        created[m] = hashlib.md5(f'{cell.id}:{i}'.encode()).hexdigest()


def write_clean(nb, path, cfg):
    "Write the notebook as `nbdev_clean` would, in one step, if it differs from what is there"
    from execnb.nbio import nb2str
    from nbdev.clean import clean_nb

    nb = json.loads(nb2str(nb))
    clean_nb(
        nb,
        allowed_metadata_keys=cfg.allowed_metadata_keys.split(),
        allowed_cell_metadata_keys=cfg.allowed_cell_metadata_keys.split(),
        clean_ids=cfg.clean_ids,
    )
    text = json.dumps(nb, sort_keys=True, indent=1, ensure_ascii=False) + '\n'
    if text != path.read_text(encoding='utf-8'):
        part = path.with_name(f'.{path.name}.part')
        part.write_text(text, encoding='utf-8')
        os.replace(part, path)


def execute(path, flags=''):
    "Run the notebook at `path` and write it back -> notes; NotebookError if a cell fails"
    from execnb.nbio import read_nb
    from execnb.shell import CaptureShell
    from nbdev.config import get_config
    from nbdev.frontmatter import FrontmatterProc
    from nbdev.process import NBProcessor

    cfg, path = get_config(), Path(path).resolve()
    front = getattr(NBProcessor(path, procs=FrontmatterProc, process=True).nb, 'frontmatter_', {})
    if str(front.get('skip_exec', '')).lower() == 'true':
        return []
    skip = set(cfg.tst_flags.split()) - set(flags.split())
    nb, created, notes = read_nb(path), {}, []
    old = nb.metadata.pop('widgets', {}).get(STATE, {}).get('state', {})
    old = json.loads(json.dumps(old))
    sys.path.insert(0, str(cfg.config_path))
    os.chdir(path.parent)
    shell = CaptureShell(path.name)
    import matplotlib

    matplotlib.rcParams['svg.hashsalt'] = path.name
    for cell in nb.cells:
        if cell.cell_type != 'code' or is_skipped(cell, skip):
            continue
        run_cell(shell, cell, path.name)
        notes += noteworthy(cell, cfg.config_path)
        name_widgets(cell, created)
    state = widget_state(nb, created, old)
    if state:
        nb.metadata['widgets'] = {STATE: state}
    write_clean(nb, path, cfg)
    return notes


# ------------------------------------------------------------------------------------ all notebooks


def pages(args):
    "The notebooks that `args` (files or folders; none means nbs/) name, in order"
    from nbdev.config import get_config

    found = []
    for p in [Path(a) for a in args] or [Path(get_config().nbs_path)]:
        if not p.exists():
            sys.exit(f'exec_nbs: no such notebook or folder: {p}')
        if p.is_file():
            found.append(p)
            continue
        for q in sorted(p.rglob('*.ipynb')):
            if not any(s.startswith(('_', '.')) for s in q.relative_to(p).parts):
                found.append(q)
    return found


def run_one(path, flags):
    "Execute `path` in a process of its own -> (ok, what to say)"
    env = {'OMP_NUM_THREADS': '1', **os.environ, **FIXED_ENV}
    r = subprocess.run(
        [sys.executable, __file__, '--flags', flags, '--one', str(path)], env=env, capture_output=True, text=True
    )
    return r.returncode == 0, (r.stdout + r.stderr).strip()


def main():
    ap = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    ap.add_argument('nbs', nargs='*', help='notebooks or folders (default: all of nbs/)')
    ap.add_argument('--flags', default='', help='test flags whose cells run too, e.g. "cuda slow"')
    ap.add_argument('--jobs', type=int, default=2, help='notebooks at a time')
    ap.add_argument('--one', help=argparse.SUPPRESS)
    a = ap.parse_args()
    if a.one:
        try:
            notes = execute(a.one, a.flags)
        except NotebookError as e:
            sys.exit(str(e))
        return print('; '.join(notes))
    files, failed = pages(a.nbs), 0
    with ThreadPoolExecutor(max(1, a.jobs)) as pool:
        for f, (ok, said) in zip(files, pool.map(lambda f: run_one(f, a.flags), files)):
            failed += not ok
            note = f' ({said})' if said else ''
            print(f'executed {f}{note}' if ok else said, flush=True)
    if failed:
        sys.exit(f'exec_nbs: {failed} of {len(files)} notebooks failed')


if __name__ == '__main__':
    main()
