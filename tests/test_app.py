"`hessian-overlap explore RUN`: one sentence for what is wrong, and in a browser the explorer without code."

import importlib.util
from contextlib import contextmanager

import pytest
import torch
from conftest import missing
from made import made_up

from hessian_overlap import app
from hessian_overlap.cli import main
from hessian_overlap.crystal import MAPS, crystallisation, save_maps
from hessian_overlap.record import save_record


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    return save_record(made_up(k=40), tmp_path_factory.mktemp('app') / 'my run').parent


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
    'args, says', [(['nowhere'], 'record.zarr.zip is not there'), ([], 'the following arguments are required: run')]
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
    folder = save_record(made_up(k=4), tmp_path / 'run').parent
    (folder / MAPS).write_text('{}')
    assert main(['explore', str(folder)]) == 2
    assert 'damaged' in capfd.readouterr().err


def test_the_name_of_the_folder_is_no_html_and_no_formula(tmp_path):
    nb = app.app_notebook(save_record(made_up(k=4), tmp_path / '<b>`a`$x$').parent)
    assert nb['cells'][0]['source'] == "# `<b>'a'$x$`"


# ------------------------------------------------------------------------------- in a browser


@pytest.fixture
def open_app(need_browser, artefacts):
    "open_app(nb, name) -> the page; no traceback in the log afterwards, and nothing from the network"
    if importlib.util.find_spec('voila') is None:
        missing('Voila is not installed')
    from lab_driver import open_app as opened

    @contextmanager
    def go(nb, name):
        with opened(lambda log: app.running(nb, log=log), name, artefacts) as page:
            yield page
            assert not page.outside and not page.wrong and not page.errors(), (page.outside, page.wrong, page.errors())
        log = (artefacts / f'{name}.log').read_text()
        assert 'Traceback' not in log, log

    return go


def test_both_explorers_in_the_browser(tmp_path, open_app):
    "A run folder with maps in it shows both explorers without their code, and each follows its own controls"
    folder = save_record(made_up(k=40), tmp_path / '<b>with $maps$').parent
    g = torch.Generator().manual_seed(0)
    U = [torch.linalg.qr(torch.randn(30, 6, generator=g, dtype=torch.float64)).Q for _ in range(4)]
    maps = crystallisation(
        torch.randn(4, 30, generator=g), dict(train=U, test=U[::-1]), [0, 1, 2, 5], [3, 6], 'made up'
    )
    save_maps(maps, folder / MAPS)
    with open_app(app.app_notebook(folder), 'voila') as e:
        e.page.wait_for_function("document.querySelectorAll('.jupyter-widgets img').length == 2")
        assert e.page.locator('h1').first.inner_text().strip('¶ ') == '<b>with $maps$'
        assert not e.page.locator('text=explore_overlap(').count(), 'the code shows'
        assert 'top 40 of 1000' in e.settle()['text']
        e.slide('mask size k', 'ArrowLeft')
        first = e.settle()
        assert 'top 39 of 1000' in first['text']
        e.number = 1
        stages = [e.settle()]
        assert 'steps 0 and 5' in stages[0]['text']
        for label, key in (('size k', 'ArrowLeft'), ('first step', 'ArrowRight'), ('second step', 'ArrowLeft')):
            e.slide(label, key)
            stages.append(e.settle())
        e.choose('Hessian of', 'train')
        stages.append(e.settle())
        assert len({s['figure'] for s in stages}) == len({s['text'] for s in stages}) == 5
        assert 'steps 1 and 2, k = 3' in stages[-1]['text'] and '(train Hessian)' in stages[-1]['text']
        e.press('PDF')
        name, data = e.download()
        assert name == 'crystallisation_made-up_k3_step1_step2_train.pdf' and data.startswith(b'%PDF')
        e.fill('open a file', 'nowhere.zip')
        e.said('alert', 'nowhere.zip is not there')
        e.number = 0
        assert e.settle() == first
