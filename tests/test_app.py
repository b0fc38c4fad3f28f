"`hessian-overlap explore RUN`: one sentence for what is wrong, and in a browser the explorer without code."

import importlib.util
import re

import pytest
from conftest import missing
from made import made_up

from hessian_overlap import app
from hessian_overlap.experiment import main


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    return made_up(k=40, steps=(0, 50, 100, 200), tables=True).save(tmp_path_factory.mktemp('app') / 'my run')


@pytest.mark.parametrize('gone', ['voila', 'ipykernel'])
def test_voila_is_not_there(run, monkeypatch, capfd, gone):
    "Voila alone does not bring a kernel"
    monkeypatch.setattr(app, 'find_spec', lambda name: name != gone)
    assert main(['explore', str(run)]) == 2
    err = capfd.readouterr().err
    assert (
        'the app needs Voila and a kernel for it, which are not installed: `pip install voila ipykernel`' in err
        and err.count('\n') == 1
    )


@pytest.mark.parametrize(
    'args, says', [(['nowhere'], 'record.json is not there'), ([], 'the following arguments are required: run')]
)
def test_asked_for_wrongly(args, says, capfd):
    assert main(['explore', *args]) == 2
    err = capfd.readouterr().err
    assert says in err and err.count('\n') == 1


def test_a_port_that_is_taken(run, monkeypatch, capfd):
    import socket

    monkeypatch.setattr(app, 'find_spec', lambda name: True)
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        s.listen()
        port = s.getsockname()[1]
        assert main(['explore', str(run), '--port', str(port)]) == 2
    assert f'port {port} cannot be used' in capfd.readouterr().err


def test_the_notebook_is_a_notebook(run, tmp_path):
    nbformat = pytest.importorskip('nbformat')
    nb = app.app_notebook(run)
    nbformat.validate(nbformat.from_dict(nb))
    assert len(nb['cells']) == 2
    space = {}
    exec(nb['cells'][1]['source'], space)


def test_maps_that_are_damaged(tmp_path, capfd):
    folder = made_up(k=4, tables=True).save(tmp_path / 'run')
    (folder / 'crystallization.json').write_text('{}')
    assert main(['explore', str(folder)]) == 2
    assert 'is not a file of crystallisation maps' in capfd.readouterr().err


# ------------------------------------------------------------------------------------- in a browser


@pytest.fixture
def open_app(need_browser, artefacts):
    "open_app(serving, name) -> the page; when it is left, the log has no traceback and nothing came from the network"
    if importlib.util.find_spec('voila') is None:
        missing('Voila is not installed')
    from contextlib import contextmanager

    from lab_driver import open_app as opened

    @contextmanager
    def go(serving, name):
        with opened(serving, name, artefacts) as page:
            yield page
            assert not page.outside and not page.wrong and not page.errors(), (page.outside, page.wrong, page.errors())
        log = (artefacts / f'{name}.log').read_text()
        assert 'Traceback' not in log, log

    return go


def test_overlaps_in_the_browser(run, open_app, capsys):
    "Slider, dropdown, tick, export, and an input that fails"
    with open_app(lambda log: app.serving(run, log=log), 'voila') as e:
        times = e.slide('mask size k', 'ArrowLeft', 5)
        assert 'top 35 of 1000' in e.shown()['text']
        e.choose('mask', 'layerwise')
        assert 'layerwise mask' in e.shown()['text']
        e.act(lambda: e.page.get_by_label('size = rank').uncheck())
        e.slide('rank r', 'ArrowLeft')
        assert 'top 36 directions' in e.shown()['text']
        e.press('CSV')
        name, data = e.download()
        assert name.endswith('_layerwise.csv') and data.startswith(b'panel,series,x,y\n')
        e.press('Code')
        e.page.get_by_text("plot_overlap_table(r, 'layerwise'").wait_for()
        before = e.settle()['figure']
        e.fill('open a run', '/nowhere/at/all')
        e.said('alert', 'record.json is not there')
        assert e.settle()['figure'] == before
        assert not e.page.locator('text=explore_overlap(').count(), 'the code shows'
    with capsys.disabled():
        print(f'\nexplorer as an app, ms from key to figure: {[round(1000 * t) for t in times]}')


def test_crystallisation_in_the_browser(tmp_path, open_app):
    "A run folder with maps in it shows both explorers, and each follows its own controls"
    import torch

    from hessian_overlap import crystallisation

    folder = made_up(k=40, tables=True).save(tmp_path / 'with maps')
    g = torch.Generator().manual_seed(0)
    U = [torch.linalg.qr(torch.randn(30, 6, generator=g, dtype=torch.float64)).Q for _ in range(4)]
    crystallisation(torch.randn(4, 30, generator=g), dict(train=U, test=U[::-1]), [0, 1, 2, 5], [3, 6], 'made up').save(
        folder / 'crystallization.json'
    )
    with open_app(lambda log: app.serving(folder, log=log), 'voila-crystal') as e:
        e.page.wait_for_function("document.querySelectorAll('.jupyter-widgets img').length == 2")
        first = e.settle()
        e.number = 1
        stages = [e.settle()]
        assert 'steps 0 and 5' in stages[0]['text']
        for label, key in (('size k', 'ArrowLeft'), ('first step', 'ArrowRight'), ('second step', 'ArrowLeft')):
            e.slide(label, key)
            stages.append(e.settle())
        e.choose('Hessian of', 'train')
        stages.append(e.settle())
        assert (
            len({s['figure'] for s in stages}) == len({s['text'] for s in stages}) == 5
            and 'steps 1 and 2, k = 3' in stages[-1]['text']
            and '(train Hessian)' in stages[-1]['text']
        )
        e.press('PDF')
        name, data = e.download()
        assert name == 'crystallisation_made-up_k3_step1_step2_train.pdf' and data.startswith(b'%PDF')
        e.fill('open a file', 'nowhere.json')
        e.said('alert', 'nowhere.json is not there')
        e.number = 0
        assert e.settle() == first


SKETCH = """import time
from hessian_overlap import LinearOperator, SynthOperator, explore_sketch, synth_eigvals
S = SynthOperator(synth_eigvals(400, rank=1, seed=1), seed=0)
class Slow(LinearOperator):
    def _matmat(self, V):
        if V.shape[1] == 13: raise FloatingPointError("thirteen columns are too many")
        time.sleep(2 if V.shape[1] == 16 else .01); return S @ V
explore_sketch(Slow(S.shape, S.dtype, S.device, symmetric=True), k=10, exact=(S.eigvals[:10], S.eigvecs(10)))"""


def test_sketches_in_the_browser(open_app):
    "Work in a thread: Run, the bar, Cancel, export, and an operator that fails"
    nb = app._notebook('sketches', SKETCH.splitlines())
    with open_app(lambda log: app._voila(nb, 'sketches', log=log), 'voila-sketch') as e:
        filled = "parseFloat(document.querySelector('.progress-bar').style.width)"
        e.control('recovery', 'select').select_option(label='eigsh')
        e.act(lambda: e.press('Run'))
        before = e.settle()
        assert 'eigsh' in before['text'] and e.page.evaluate(filled) == 100
        e.control('recovery', 'select').select_option(label='core')
        e.press('Run')  # blocks of sixteen columns, two seconds each
        e.page.wait_for_function(f'{filled} > 30 && {filled} < 100')
        e.press('Cancel')
        e.said('status', re.compile('cancelled after [0-9]+ products; nothing of this run is kept'))
        assert e.settle()['figure'] == before['figure']
        e.control('recovery', 'select').select_option(label='hmt')
        e.control('sketch size', '.noUi-handle').focus()
        for _ in range(7):
            e.page.keyboard.press('ArrowLeft')  # from 20 to 13 columns
        e.page.wait_for_timeout(500)
        e.press('Run')
        e.said('alert', 'thirteen columns are too many')
        e.press('PNG')
        name, data = e.download()
        assert name == 'sketches_n400_k10.png' and data.startswith(b'\x89PNG')
        e.press('CSV')
        e.page.locator('a[download$=csv]').wait_for()
        name, data = e.download()
        assert name == 'sketches_n400_k10.csv' and b'eigsh' in data and b'core' not in data
