"The explorers in a real JupyterLab: keys and choices change the figure and the number, fast enough to follow."

import json
import re
import statistics

NB = 'nbs/51_explore.ipynb'


def number(text):
    "The overlap that the explorer states"
    return float(re.search(r'overlap\s+([0-9.]+)', text)[1])


def test_explorer_follows_the_reader(need_browser, artefacts, capsys):
    from lab_driver import open_notebook

    with open_notebook(NB, artefacts) as lab:
        lab.run_all()
        assert not lab.errors(), lab.errors()
        start = lab.settle()
        assert start['figure'] and number(start['text']) > 0, start['text']
        lab.page.screenshot(path=artefacts / 'explorer-before.png')
        times = dict(k=lab.slide('mask size k', 'ArrowLeft', 8))
        after_k = lab.settle()
        times['step'] = lab.slide('training step', 'ArrowLeft', 3)
        after_step = lab.settle()
        times['mask'] = [lab.choose('mask', 'best')]
        after_mask = lab.settle()
        times['split'] = [lab.choose('Hessian of', 'train')]
        after_split = lab.settle()
        stages = [start, after_k, after_step, after_mask, after_split]
        assert len({s['figure'] for s in stages}) == len({s['text'] for s in stages}) == 5
        assert number(after_mask['text']) > number(after_step['text'])  # the best mask beats the magnitude mask
        lab.page.get_by_label('size = rank').first.uncheck()
        lab.page.wait_for_function(
            "document.querySelector('.jp-OutputArea-output [role=status]').innerText.includes('mask of 350 of 7030')"
        )
        times['rank'] = lab.slide('rank r', 'ArrowLeft', 3)
        lab.press('CSV')
        name, data = lab.download()
        assert name.endswith('_train_best.csv') and data.startswith(b'panel,series,x,y')
        lab.press('Code')
        lab.page.locator('pre:has-text("plot_overlap_table(r, \'best\'")').first.wait_for()
        before = lab.settle()
        lab.fill('open a run', 'runs/nowhere')
        lab.page.get_by_role('alert').filter(has_text='record.zarr.zip is not there').first.wait_for()
        assert lab.settle()['figure'] == before['figure']
        assert not lab.errors(), lab.errors()
        lab.page.screenshot(path=artefacts / 'explorer-after.png')
    assert 'Traceback' not in (artefacts / 'lab.log').read_text()
    with capsys.disabled():
        print(
            '\nexplorer in JupyterLab, ms from key to figure: '
            + '; '.join(f'{k} {[round(1000 * s) for s in v]}' for k, v in times.items())
        )
    assert statistics.median(times['k']) < 2, times


SLOW = """import time
from hessian_overlap import LinearOperator, SynthOperator, explore_sketch, synth_eigvals
S = SynthOperator(synth_eigvals(400, rank=1, seed=1), seed=0)
class Slow(LinearOperator):
    def _matmat(self, V):
        if V.shape[1] == 13: raise FloatingPointError("thirteen columns are too many")
        time.sleep(2 if V.shape[1] == 16 else .01); return S @ V
slow = Slow(S.shape, S.dtype, S.device, symmetric=True)
explore_sketch(slow, k=10, exact=(S.eigvals[:10], S.eigvecs(10)))"""
LAST = """from hessian_overlap.explore import LAST
print('explorers open:', [len(made) for _, made in LAST.values()])"""


def test_a_sketch_runs_is_cancelled_and_fails(need_browser, artefacts, tmp_path):
    "Run draws into the figure, Cancel ends a run of minutes, and an operator that fails says so in the widget"
    from lab_driver import open_notebook

    code = lambda i, s: dict(cell_type='code', id=f'c{i}', metadata={}, source=s, outputs=[], execution_count=None)
    kernel = dict(kernelspec=dict(name='python3', display_name='python3', language='python'))
    (tmp_path / 'slow.ipynb').write_text(
        json.dumps(dict(cells=[code(0, SLOW), code(1, LAST)], metadata=kernel, nbformat=4, nbformat_minor=5))
    )
    with open_notebook('slow.ipynb', artefacts, root=tmp_path) as lab:
        lab.run_all()
        assert not lab.errors(), lab.errors()
        method = lab.control('recovery', 'select')
        size = lab.control('sketch size', '.noUi-handle')
        method.select_option(label='eigsh')
        lab.act(lambda: lab.press('Run'))
        before = lab.settle()
        assert 'eigsh' in before['text']  # blocks of ten columns
        method.select_option(label='core')
        lab.press('Run')  # blocks of sixteen, two seconds each
        lab.page.locator('.jupyter-button:not([disabled])', has_text='Cancel').first.wait_for()
        lab.press('Cancel')
        lab.page.get_by_text(
            re.compile('cancelled after [0-9]+ products; nothing of this run is kept')
        ).first.wait_for()
        assert lab.settle()['figure'] == before['figure']
        method.select_option(label='hmt')
        size.focus()
        for _ in range(7):
            lab.page.keyboard.press('ArrowLeft')  # from 20 to 13 columns
        lab.page.wait_for_timeout(500)
        lab.press('Run')
        lab.page.get_by_role('alert').filter(has_text='thirteen columns are too many').first.wait_for()
        lab.press('CSV')
        name, data = lab.download()
        assert name == 'sketches_n400_k10.csv' and b'eigsh' in data
        assert not lab.errors(), lab.errors()
        lab.page.screenshot(path=artefacts / 'sketch.png')
        lab.run_all()  # a cell that runs again frees the explorer that it made before
        lab.page.get_by_text('explorers open: [1]').first.wait_for()
        assert 'No run yet' in lab.settle()['text'] and not lab.errors(), lab.errors()
    assert 'Traceback' not in (artefacts / 'lab.log').read_text()
