"The explorer says what the record holds, changes its figure with every control, and is quick."

import base64
import csv
import gc
import io
import json
import re
import threading
import weakref

import matplotlib
import matplotlib.colors

matplotlib.use('agg')
import ipywidgets as W
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from made import KS, made_up
from PIL import Image

from hessian_overlap import LinearOperator, SynthOperator, explore, make_problem, synth_eigvals
from hessian_overlap.crystal import MAPS, crystallisation, save_maps
from hessian_overlap.experiment import run_overlap
from hessian_overlap.explore import OverlapExplorer, explore_overlap
from hessian_overlap.explore_crystal import explore_crystallisation
from hessian_overlap.explore_sketches import SHADES, explore_sketch
from hessian_overlap.methods import SLQ, Eigsh
from hessian_overlap.plots import look, place
from hessian_overlap.record import RecordError, chance_std, pick, save_record


@pytest.fixture(scope='module')
def r():
    return made_up(k=350, n=7030, R=10, steps=(0, 50, 100, 1000))


@pytest.fixture
def run(r, tmp_path):
    return save_record(r, tmp_path / 'run').parent


def pixels(e):
    return np.asarray(Image.open(io.BytesIO(e.image.value)).convert('RGB'))


def rows(e):
    return {(o['panel'], o['series'], o['x']): float(o['y']) for o in csv.DictReader(io.StringIO(e.csv()))}


def test_label_follows_every_control(r):
    e = explore_overlap(r)
    for order in ('magnitude', 'best', 'random'):
        for step in (0, 100):
            for split in ('train', 'test'):
                for k in (1, 50, 350):
                    e.order.value, e.step.value, e.split.value, e.k.value = order, step, split, k
                    v, c = pick(r, step=step, split=split, order=order, k=k).overlap.item(), k / r.n
                    for s in (f'overlap {v:.4f}', f'chance level {c:.4f}', f'ratio {v / c:.2f}', split, f'step {step}'):
                        assert s in e.label.value
                    assert f'top {k} of {r.n}' in e.label.value


def test_each_control_changes_the_figure(r):
    e = explore_overlap(r)
    for name, value in [('k', 20), ('step', 50), ('split', 'train'), ('order', 'best')]:
        before = e.image.value
        getattr(e, name).value = value
        assert e.image.value != before and e.image.value[:4] == b'\x89PNG', name


def test_the_figure_depends_on_the_controls_alone(r):
    a, b = explore_overlap(r), explore_overlap(r)
    for order, k, step in [('best', 3, 0), ('random', 200, 50), ('magnitude', 350, 1000)]:
        a.order.value, a.k.value, a.step.value = order, k, step
    assert (pixels(a) == pixels(b)).all()


def test_one_figure_and_no_pyplot(r):
    before = plt.get_fignums()
    e = explore_overlap(r)
    artists = lambda: [id(o) for ax in e.fig.axes for o in ax.get_children()]
    fig, was = e.fig, artists()
    e.k.value = 9
    e.order.value = 'random'
    assert plt.get_fignums() == before and e.fig is fig and artists() == was


def test_shows_itself(r):
    e = explore_overlap(r)
    data = e._repr_mimebundle_()
    assert data['application/vnd.jupyter.widget-view+json']['model_id'] == e.box.model_id
    assert 'OverlapExplorer(made_up, k=350' in data['text/plain']
    state = json.dumps(W.Widget.get_manager_state(drop_defaults=True)['state'][e.label.model_id])
    assert 'chance level' in state  # what a static page will show


def test_controls_are_described(r):
    e = explore_overlap(r)
    for c in (e.k, e.step, e.split, e.order, e.seed, e.run, e.other):
        assert c.description and len(c.tooltip) > 20
    assert 'role="status"' in e.label.value and list(e.k.options) == list(range(1, 351))
    # with a tooltip JupyterLab cannot make the view: ipywidgets 8.1 asks an Image for its description
    assert e.image.tooltip is None
    assert list(e.step.options) == r.step.values.tolist() and list(e.split.options) == ['train', 'test']


def test_white_whatever_the_style(r):
    want = pixels(explore_overlap(r))
    with plt.style.context('dark_background'):
        e = explore_overlap(r)
        e.k.value = 5
        e.k.value = 350
    assert (pixels(e) == want).all() and (want[0, 0] == 255).all()


@pytest.mark.parametrize(
    'kw',
    [
        dict(),
        dict(k=1),
        dict(steps=(0,)),
        dict(R=0),
        dict(splits=('test',)),
        dict(method='seigh'),
        dict(ks=KS),
        dict(ks=[7], R=0),
        dict(ks=[3, 10], R=0, splits=('test',), steps=(4,)),
        dict(seeds=(0, 1)),
        dict(seeds=(0, 1), ks=KS, steps=(4,)),
    ],
    ids=str,
)
def test_any_record(kw, recwarn):
    r = made_up(**kw)
    e = explore_overlap(r)
    e.tied.value = False
    e.tied.value = True
    assert not e.message.value and ('random' in e.order.options) == (kw.get('R') != 0)
    assert ('best' in e.order.options) == ('ks' not in kw)
    assert ('not trusted' in e.label.value) == (not place(r, order='magnitude').trusted[..., -1].all())
    assert not [w for w in recwarn if 'hessian_overlap' in str(w.filename)], [str(w.message) for w in recwarn]


def test_a_single_step_shows_multiples_of_chance():
    r = made_up(steps=(0,), k=40)
    e = explore_overlap(r)
    e.k.value = 10
    for o, curve in e.right.curves.items():
        assert np.allclose(curve.get_ydata(), pick(r, order=o).overlap / r.chance)
    at = lambda: (e.right.dot.get_xdata()[0], e.right.dot.get_ydata()[0])
    ratio = (pick(r, k=10).overlap / (10 / r.n)).values
    low, high = e.right.ax.get_ylim()
    assert at() == (10, ratio[0]) and low < ratio.min() and ratio.max() < high
    assert 'ratio to chance,best mask,10,' in e.csv() and 'over training' not in e.csv()
    e.tied.value = False
    e.size.value, e.rank.value = 8, 40
    want = pick(r, order='magnitude').table.sel(size=8, rank=40).item() * r.n / 40
    assert np.isclose(at()[1], want) and e.right.ax.get_xscale() == 'log'
    assert e.step.layout.display == 'none' and e.split.layout.display is None
    e.show(made_up(steps=(0, 1)))
    assert e.right.ax.get_xlabel() == 'training step' and e.step.layout.display is None


def test_the_palette_is_near_the_figure(r):
    "256 colours on the page, all those of the figure: hardly a pixel is far off, and what is one colour stays one"
    e = explore_overlap(r)
    full = np.asarray(e.fig.canvas.buffer_rgba())[..., :3].astype(int)
    off = np.abs(full - pixels(e)).max(-1)
    assert Image.open(io.BytesIO(e.image.value)).mode == 'P'
    assert (off > 24).mean() < 0.01 and off[(full == 255).all(-1)].max() == 0
    for o in r.order.values:
        c = (255 * np.array(matplotlib.colors.to_rgb(look(o)['color']))).round()
        hit = np.abs(full - c).max(-1) <= 1
        assert not hit.any() or off[hit].max() <= 4, o


def test_folders(run, tmp_path):
    assert isinstance(explore_overlap(run), OverlapExplorer) and isinstance(explore_overlap(str(run)), OverlapExplorer)
    (tmp_path / 'empty').mkdir()
    with pytest.raises(RecordError, match='no record in'):
        explore_overlap(tmp_path / 'empty')
    for file in run.iterdir():
        file.write_bytes(b'')
    with pytest.raises(RecordError, match='damaged'):
        explore_overlap(run)
    with pytest.raises(TypeError, match='got dict'):
        explore_overlap({})


# ------------------------------------------------------------------------------- closing


def test_close_frees_widgets_and_figure(r):
    gc.collect()
    there = len(W.Widget.get_manager_state()['state'])
    e = explore_overlap(r)
    fig = weakref.ref(e.fig)
    e.close()
    e.close()  # twice is once
    gc.collect()
    assert (
        fig() is None and len(W.Widget.get_manager_state()['state']) == there and repr(e) == 'OverlapExplorer(closed)'
    )


def test_a_cell_that_runs_again_frees_the_explorers_of_its_last_run(r, monkeypatch):
    class Shell:
        def get_parent(self):
            return dict(metadata=dict(cellId=self.cell), header=dict(msg_id=self.run))

    shell = Shell()
    monkeypatch.setattr(explore, 'get_ipython', lambda: shell)
    monkeypatch.setattr(explore, 'LAST', {})

    def cell(name, run, many=1):
        shell.cell, shell.run = name, run
        return [explore_overlap(r) for _ in range(many)]

    first, other = cell('a', 1, 2), cell('b', 2)
    closed = lambda *es: ['closed' in repr(e) for e in es]
    assert closed(*first, *other) == [False] * 3
    again = cell('a', 3)
    assert closed(*first, *other, *again) == [True, True, False, False]
    shell.cell = None  # not of a cell: nothing is known, nothing is closed
    explore_overlap(r)
    assert closed(*other, *again) == [False, False]


# ------------------------------------------------------------------------------- size and rank apart, exports, errors


def test_size_and_rank_apart(r):
    e = explore_overlap(r)
    e.tied.value = False
    assert e.k.layout.display == 'none' and e.size.layout.display is None
    for order in e.order.options:
        for m, q in ((35, 350), (7030, 35), (350, 350)):
            e.order.value, e.size.value, e.rank.value = order, m, q
            v, c = pick(r, order=order).table.sel(size=m, rank=q).item(), max(m, q) / r.n
            z = abs(v - c) / chance_std(r, m, q) if m < r.n else None
            for s in (f'overlap {v:.4f}', f'chance level {c:.4f}', f'top {q} directions', f'mask of {m} of {r.n}'):
                assert s in e.label.value, (s, e.label.value)
            assert z is None or f'{z:.1f} deviations' in e.label.value
    e.tied.value = True
    assert e.size.layout.display == 'none' and 'top 350 of 7030' in e.label.value and not e.message.value


def test_untied_controls_change_the_figure(r):
    e = explore_overlap(r)
    moves = [('tied', False), ('size', 70), ('rank', 35), ('order', 'layerwise'), ('step', 0), ('split', 'train')]
    seen = {e.image.value}
    for name, value in [*moves, ('tied', True)]:
        getattr(e, name).value = value
        assert e.image.value not in seen, name
        seen.add(e.image.value)


def test_exports(r, run, tmp_path):
    e = explore_overlap(run)
    e.k.value = 20
    heads = dict(png=b'\x89PNG', pdf=b'%PDF', csv=b'panel,series,x,y')
    for kind, head in heads.items():
        e.buttons[kind].click()
        m = re.search(r'download="([^"]+)" href="data:[^;]+;base64,([^"]+)"', e.out.value)
        assert m[1] == f'overlap_made_up_k20_step1000_test_magnitude.{kind}'
        assert base64.b64decode(m[2]).startswith(head)
        assert e.save(tmp_path / f'x.{kind}').read_bytes().startswith(head)
    got = rows(e)
    assert got['overlap over mask size', 'magnitude mask', '20'] == pick(r, order='magnitude', k=20).overlap
    assert {'spectrum', 'layers', 'overlap over training', 'overlap over mask size and rank'} <= {o[0] for o in got}
    with pytest.raises(ValueError, match='should end in'):
        e.save(tmp_path / 'x.doc')


@pytest.mark.parametrize('tied', [True, False])
@pytest.mark.parametrize('against', [True, False])
def test_the_code_draws_what_is_shown(run, tied, against):
    e = explore_overlap(run, against=run if against else None)
    e.tied.value = tied
    e.step.value = 50
    e.buttons['code'].click()
    assert '<pre>from hessian_overlap import' in e.out.value and len(e.code().splitlines()) == 3
    *first, last = e.code().splitlines()
    space = {}
    exec('\n'.join(first), space)
    ax = eval(last, space)
    assert 'other' in last if against and tied else 'step 50' in ax.get_title()


def test_what_fails_is_said_in_the_widget(r, run, tmp_path, capfd):
    e = explore_overlap(run)
    before = e.image.value
    e.run.value = str(tmp_path / '<b>nowhere')
    assert 'is not there' in e.message.value and 'role="alert"' in e.message.value
    assert '<b>nowhere' not in e.message.value and e.image.value == before
    save_record(made_up(k=9), tmp_path / 'ok')
    e.run.value = str(tmp_path / 'ok')
    assert not e.message.value and list(e.k.options) == list(range(1, 10)) and 'top 9 of' in e.label.value
    e.numbers = lambda: 1 / 0
    e.buttons['csv'].click()
    assert 'ZeroDivisionError' in e.message.value
    assert capfd.readouterr() == ('', '')


def test_names_are_no_html_and_no_formulas(tmp_path):
    evil = '<img src=x onerror=alert(1)>'
    r = made_up(problem=f'{evil} $x$ 5$', splits=('$a$', evil))
    r = r.assign_coords(order=['magnitude', f'{evil}$o$', 'random', 'best'], layer=['$w$', evil, '_y'])
    folder = save_record(r, tmp_path / '<i>$run$').parent
    e = explore_overlap(folder, against=folder)
    for order in e.order.options:
        for split in e.split.options:
            e.order.value, e.split.value = order, split
            for kind in ('csv', 'code', 'png'):
                e.buttons[kind].click()
                html = e.label.value + e.out.value + e.message.value
                assert not e.message.value and '<img' not in html and '<i>$' not in html
    assert 'dollar' not in e.name() and re.fullmatch(r'[\w.-]+', e.name())


def net(width=4, inputs=3, samples=40):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(samples, inputs, generator=g)
    y = (x[:, 0] > 0).long()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = torch.nn.Linear(inputs, width), torch.nn.Tanh(), torch.nn.Linear(width, 2)
    return torch.nn.Sequential(*layers).eval(), torch.nn.CrossEntropyLoss(), [(x, y)]


def test_a_live_model_in_one_call():
    model, loss, data = net()
    e = explore_overlap(model, loss, data, Eigsh(k=5), seed=0, orders=dict(mine=torch.arange(26)))
    e.order.value = 'mine'
    assert 'mine mask' in e.label.value and 'overlap_record(model, loss_func, data, Eigsh(k=5' in e.code()
    two = explore_overlap(model, loss, dict(train=data, test=data), Eigsh(k=5), seed=0)
    assert two.split.options == ('train', 'test')
    for f, exc, says in [
        (lambda: explore_overlap(model), TypeError, 'give model, loss_func and data'),
        (lambda: explore_overlap(model, loss, data, Eigsh(k=27), seed=0), ValueError, '27'),
        (lambda: explore_overlap(model, loss, {}, Eigsh(k=2), seed=0), ValueError, 'no split'),
    ]:
        with pytest.raises(exc, match=says):
            f()


# ------------------------------------------------------------------------------- intervals, seeds, two runs


def test_intervals_and_what_is_not_trusted():
    r = made_up(ks=KS)
    e = explore_overlap(r)
    seen = set()
    assert list(e.k.options) == KS and 'best' not in e.order.options and 'k=600' in repr(e)
    for order in ('magnitude', 'layerwise'):
        for step, split in ((0, 'train'), (100, 'test')):
            e.order.value, e.step.value, e.split.value = order, step, split
            d = pick(r, step=step, split=split, order=order)
            for k in KS:
                e.k.value, one = k, d.sel(k=k)
                within = f'overlap {one.overlap:.4f}</b> ({one.low:.4f} to {one.high:.4f})'
                assert within in e.label.value and 'deviations' not in e.label.value
                assert ('not trusted' in e.label.value) == (not one.trusted) and e.image.value not in seen
                seen.add(e.image.value)
            assert e.left.hollow.get_xdata().tolist() == KS[3:]
            assert e.left.band.get_paths()[0].vertices[:, 1].max() == d.high.max()
            assert e.right.band.get_paths()[0].vertices[:, 0].max() == 100
    got, at = rows(e), 'overlap over mask size'
    assert got[at, 'layerwise mask, low', '40'] == d.low[2] and got[at, 'layerwise mask, high', '600'] == d.high[4]
    assert got[at, 'layerwise mask, trusted', '600'] == 0
    over = pick(r, step=0, order='layerwise', k=600).high
    assert got['overlap over training', 'layerwise mask, high', '0'] == over
    e.order.value = 'random'
    assert ' to ' not in e.label.value and 'mask, low' not in e.csv().replace('layerwise', '')
    assert not len(e.left.band.get_paths()[0].vertices)


def test_intervals_of_the_table():
    r = made_up(ks=KS)
    e = explore_overlap(r)
    e.tied.value = False
    e.size.value, e.rank.value = 600, 40
    v = pick(r, order='magnitude').table.sel(size=600, rank=40).item()
    want = f'overlap {v:.4f}</b> ({max(0, v - 0.05):.4f} to {min(1, v + 0.05):.4f})'
    assert want in e.label.value and not e.message.value and 'not trusted' not in e.label.value
    e.rank.value = 600
    assert 'not trusted' in e.label.value and (e.left.hollow.get_xdata() == r['size']).all()  # as the cut at 600 is not


def test_from_one_kind_of_record_to_another_and_back(tmp_path):
    save_record(made_up(), tmp_path / 'pairs')
    save_record(made_up(ks=KS), tmp_path / 'estimates')
    e = explore_overlap(tmp_path / 'estimates')
    e.run.value = str(tmp_path / 'pairs')
    assert 'deviations' in e.label.value and 'best' in e.order.options and not e.message.value
    e.k.value = 9
    assert 'top 9 of' in e.label.value
    e.run.value = str(tmp_path / 'estimates')
    e.k.value = 10
    alone = explore_overlap(tmp_path / 'estimates')
    alone.k.value = 10
    assert ' to ' in e.label.value and not e.message.value and (pixels(alone) == pixels(e)).all()


def test_estimates_of_a_live_model():
    model, loss, data = net(width=20, inputs=8, samples=60)
    method = SLQ(ks=(2, 10, 60), num_probes=4, num_steps=12)
    e = explore_overlap(model, loss, data, method, seed=0, orders=dict(mine=torch.arange(222)))
    e.order.value, e.k.value = 'mine', 10
    assert ' to ' in e.label.value and 'mine mask' in e.label.value and 'SLQ(ks=(2, 10, 60)' in e.code()


def test_several_seeds():
    r = made_up(seeds=(3, 1))
    e = explore_overlap(r)
    both = r.overlap.sel(step=100, split='test', order='magnitude', k=60)
    assert f'overlap {both.mean():.4f}' in e.label.value and f'({both.min():.4f} to {both.max():.4f})' in e.label.value
    before = e.image.value
    for seed in (3, 1):
        e.seed.value = seed
        assert f'overlap {both.sel(seed=seed):.4f}' in e.label.value and e.image.value != before
    assert 'seed=1' in e.code() and explore_overlap(made_up()).seed.layout.display == 'none'


def test_two_runs_against_each_other(tmp_path):
    a, b = made_up(), made_up(1, ks=KS, steps=(0, 100, 300))
    save_record(b, tmp_path / 'b')
    e = explore_overlap(a)
    before = e.image.value
    e.other.value = str(tmp_path / 'b')
    e.k.value = 40
    want = pick(b, step=100, order='magnitude')
    assert f'<b>{want.sel(k=40).overlap:.4f}</b> in the run compared with' in e.label.value
    got = e.left.other.get_data()
    assert got[0].tolist() == KS and (got[1] == want.overlap).all()
    over = b.overlap.sel(seed=0, split='test', order='magnitude', k=40)
    assert e.right.other.get_xdata().tolist() == [0, 100, 300] and (e.right.other.get_ydata() == over).all()
    assert rows(e)['overlap over mask size', 'magnitude mask, compared', '600'] == want.overlap[-1]
    e.k.value = 41  # of which the other knows nothing
    assert 'compared with' not in e.label.value
    e.order.value, e.step.value = 'best', 50
    assert not np.isfinite(e.left.other.get_ydata()).any() and not e.message.value
    e.tied.value = False
    e.tied.value = True
    e.order.value, e.step.value, e.k.value, e.other.value = 'magnitude', 100, 60, ''
    assert e.image.value == before
    alone = explore_overlap(a.isel(step=[-1]), against=b)
    alone.k.value = 40
    x, y = alone.right.other.get_data()
    assert np.allclose(y, want.overlap / (np.array(KS) / b.n)) and not alone.message.value
    with pytest.raises(TypeError, match='got int'):
        explore_overlap(a, against=3)


# ------------------------------------------------------------------------------- crystallisation


@pytest.fixture(scope='module')
def maps():
    g = torch.Generator().manual_seed(0)
    U = [torch.linalg.qr(torch.randn(30, 6, generator=g, dtype=torch.float64)).Q for _ in range(4)]
    return crystallisation(
        torch.randn(4, 30, generator=g), dict(train=U, test=U[::-1]), [0, 1, 2, 5], [3, 6], 'made up'
    )


def test_crystallisation(maps, tmp_path):
    e = explore_crystallisation(save_maps(maps, tmp_path / 'c.zip'))
    seen = {e.image.value}
    for name, value in [('size', 3), ('a', 2), ('b', 1), ('split', 'train')]:
        getattr(e, name).value = value
        assert e.image.value not in seen, name
        seen.add(e.image.value)
    pair = maps.sel(split='train', k=3, step=2, other=1)
    assert f'overlap {pair.spaces:.4f}' in e.label.value and f'masks {pair.masks:.3f}' in e.label.value
    for kind in ('png', 'pdf', 'csv'):
        e.buttons[kind].click()
        assert f'.{kind}' in e.out.value and not e.message.value
    exec(e.code(), {})
    e.file.value = 'nowhere.zip'
    assert 'nowhere.zip is not there' in e.message.value


def test_maps_in_a_run_folder_damaged_and_less(maps, tmp_path):
    save_maps(maps, tmp_path / MAPS)
    assert explore_crystallisation(tmp_path).maps.identical(maps)
    for less in (maps[['spaces']], maps.drop_vars('angles')):
        e = explore_crystallisation(less)
        e.size.value = 3
        assert ('masks' in e.label.value) == ('masks' in less) and 'angles' not in e.label.value and not e.message.value
        assert 'nan' not in e.label.value + e.csv()
    raw = bytearray((tmp_path / MAPS).read_bytes())
    raw[100] ^= 1
    (tmp_path / MAPS).write_bytes(raw)
    with pytest.raises(RecordError, match='damaged'):
        explore_crystallisation(tmp_path)
    (tmp_path / 'text').write_text('{}')
    with pytest.raises(RecordError):
        explore_crystallisation(tmp_path / 'text')


def test_names_in_maps_are_no_html_and_no_formulas(maps):
    evil = '<img src=x>$a$'
    e = explore_crystallisation(maps.assign_coords(split=['train', evil]).assign_attrs(problem=evil))
    e.buttons['png'].click()
    assert '<img' not in e.label.value + e.out.value and not e.message.value


def test_crystallisation_from_a_run_folder(tmp_path):
    p = make_problem('mnist_mini', seed=0, device='cpu')
    small = dict(samples=100, num_random=0, seeds=[0], progress=False)
    run_overlap(p, Eigsh(k=4), steps=4, snapshots=[0, 4], out=tmp_path / 'run', **small)
    e = explore_crystallisation(tmp_path / 'run', [2, 4], samples=100, seed=0)
    assert e.maps.step.values.tolist() == [0, 4] and 0 <= e.state()[1].spaces <= 1
    with pytest.raises(RecordError, match='is not a run folder'):
        explore_crystallisation(tmp_path, [2], seed=0)


# ------------------------------------------------------------------------------- sketches


def test_sketches_run_and_are_compared():
    e = explore_sketch(k=6)
    for i, method in enumerate(SHADES):
        before = e.image.value
        e.method.value = method
        e.run(wait=True)
        assert not e.message.value and len(e.runs) == i + 1 and e.image.value != before
        assert e.runs[-1]['matvecs'] == e.watched.done and method in e.label.value and not e.start.disabled
    assert e.runs[-1]['lost'][-1] < 1e-4
    for kind in ('png', 'pdf', 'csv'):
        e.buttons[kind].click()
        assert f'.{kind}' in e.out.value
    space = {}
    exec(e.code(), space)
    assert np.allclose(space['result'].eigvals.numpy(), e.runs[-1]['eigvals'])
    e.clear.click()
    assert not e.runs and 'No run yet' in e.label.value


def test_cancel_stops_between_blocks_of_products():
    S = SynthOperator(synth_eigvals(400, rank=1, seed=1), seed=0)
    going, go_on = threading.Event(), threading.Event()

    class Held(LinearOperator):
        def _matmat(self, V):
            going.set()
            assert go_on.wait(20)
            return S @ V

    e = explore_sketch(Held(S.shape, S.dtype, S.device, symmetric=True), k=10, exact=(S.eigvals[:10], S.eigvecs(10)))
    e.start.click()
    assert going.wait(20) and e.start.disabled and not e.cancel.disabled
    e.start.click()
    assert 'cancel it first' in e.message.value  # a second press while it runs
    e.cancel.click()
    go_on.set()
    e.thread.join(20)
    assert (
        not e.runs and 'cancelled after 16 products' in e.message.value and not e.start.disabled and e.cancel.disabled
    )
    e.run(wait=True)
    assert len(e.runs) == 1 and not e.message.value


def test_closing_cancels_a_sketch():
    S = SynthOperator(synth_eigvals(400, rank=1, seed=1), seed=0)
    going, go_on = threading.Event(), threading.Event()

    class Held(LinearOperator):
        def _matmat(self, V):
            going.set()
            assert go_on.wait(20)
            return S @ V

    e = explore_sketch(Held(S.shape, S.dtype, S.device, symmetric=True), k=10, exact=(S.eigvals[:10], S.eigvecs(10)))
    e.start.click()
    assert going.wait(20)
    thread = e.thread
    threading.Timer(0.2, go_on.set).start()
    e.close()
    assert not thread.is_alive() and repr(e) == 'SketchExplorer(closed)'


def test_a_sketch_of_a_model():
    e = explore_sketch(*net(), k=3)
    e.run(wait=True)
    assert len(e.runs) == 1 and 'HessianLinearOperator(model' in e.code()
    with pytest.raises(TypeError, match='give model, loss_func and data'):
        explore_sketch(net()[0])
    with pytest.raises(ValueError, match='between 1 and n/4'):
        explore_sketch(*net(), k=20)
