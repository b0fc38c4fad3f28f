"The explorer says what the record holds, changes its figure with every control, and is quick."

import io
import json

import matplotlib
import matplotlib.colors

matplotlib.use('agg')
import ipywidgets as W
import matplotlib.pyplot as plt
import numpy as np
import pytest
from made import made_up
from PIL import Image

from hessian_overlap.explore import OverlapExplorer, explore_overlap
from hessian_overlap.record import RecordError

KS = [3, 10, 40, 150, 600]


@pytest.fixture(scope='module')
def r():
    return made_up(k=350, n=7030, R=10, steps=(0, 50, 100, 1000), tables=True)


def pixels(e):
    return np.asarray(Image.open(io.BytesIO(e.image.value)).convert('RGB'))


def test_label_follows_every_control(r):
    e = explore_overlap(r)
    for mask in ('magnitude', 'best', 'random'):
        for step in (0, 100):
            for split in r.splits:
                for k in (1, 50, 350):
                    e.mask.value, e.step.value, e.split.value, e.k.value = mask, step, split, k
                    v, c = r.curve(mask, step, split)[k - 1], k / r.n
                    for s in (
                        f'overlap {v:.4f}',
                        f'chance level {c:.4f}',
                        f'ratio {v / c:.2f}',
                        split,
                        f'step {step}',
                        f'top {k} of {r.n}',
                    ):
                        assert s in e.label.value


def test_each_control_changes_the_figure(r):
    e = explore_overlap(r)
    for name, value in [('k', 20), ('step', 50), ('split', 'train'), ('mask', 'best')]:
        before = e.image.value
        getattr(e, name).value = value
        assert e.image.value != before and e.image.value[:4] == b'\x89PNG', name


def test_the_figure_depends_on_the_controls_alone(r):
    a, b = explore_overlap(r), explore_overlap(r)
    for mask, k, step in [('best', 3, 0), ('random', 200, 50), ('magnitude', 350, 1000)]:
        a.mask.value, a.k.value, a.step.value = mask, k, step
    assert (pixels(a) == pixels(b)).all()


def test_one_figure_and_no_pyplot(r):
    before = plt.get_fignums()
    e = explore_overlap(r)
    fig, artists = e.fig, [id(o) for ax in e.fig.axes for o in ax.get_children()]
    e.k.value = 9
    e.mask.value = 'random'
    assert (
        plt.get_fignums() == before
        and e.fig is fig
        and artists == [id(o) for ax in e.fig.axes for o in ax.get_children()]
    )


def test_shows_itself(r):
    e = explore_overlap(r)
    b = e._repr_mimebundle_()
    data = b[0] if isinstance(b, tuple) else b
    assert (
        data['application/vnd.jupyter.widget-view+json']['model_id'] == e.box.model_id
        and 'OverlapExplorer(made_up, k=350' in data['text/plain']
    )
    state = json.dumps(W.Widget.get_manager_state(drop_defaults=True)['state'][e.label.model_id])
    assert 'chance level' in state  # what a static page will show


def test_controls_are_described(r):
    e = explore_overlap(r)
    for c in (e.k, e.step, e.split, e.mask):
        assert c.description and len(c.tooltip) > 20
    assert 'role="status"' in e.label.value and (e.k.min, e.k.max) == (1, r.k)
    assert (
        e.image.tooltip is None
    )  # with one, JupyterLab cannot make the view: ipywidgets 8.1 asks an Image for its description
    assert list(e.step.options) == r.steps.tolist() and list(e.split.options) == list(r.splits)


def test_white_whatever_the_style(r):
    want = pixels(explore_overlap(r))
    with plt.style.context('dark_background'):
        e = explore_overlap(r)
        e.k.value = 5
        e.k.value = r.k
    assert (pixels(e) == want).all() and (want[0, 0] == 255).all()


def test_small_and_odd_records():
    for kw in (
        dict(k=1),
        dict(steps=(0,)),
        dict(R=0),
        dict(splits=('test',)),
        dict(method='seigh'),
        dict(tables=True),
        dict(tables=True, k=1),
        dict(tables=True, R=0),
        dict(ks=KS),
        dict(ks=KS, tables=True),
        dict(ks=[7], R=0),
        dict(ks=[3, 10], tables=True, R=0, splits=('test',), steps=(4,)),
    ):
        e = explore_overlap(made_up(**kw))
        assert not e.message.value
        assert ('random' in e.mask.options) == (kw.get('R') != 0)
        assert ('approximate' in e.label.value) == (kw.get('method') == 'seigh')


def test_a_single_step_shows_multiples_of_chance():
    r = made_up(steps=(0,), k=40, tables=True)
    e = explore_overlap(r)
    e.k.value = 10
    assert set(e._ratios) == set(r.masks) and not e.message.value
    for m, line in e._ratios.items():
        assert np.allclose(line.get_ydata(), r.curve(m) / r.chance)
    at = lambda: (e._over_dot.get_xdata()[0], e._over_dot.get_ydata()[0])
    low, high = e._right.get_ylim()
    assert (
        at() == (10, r.curve()[9] / r.chance[9])
        and low < min(r.curve(m)[9] for m in r.masks) / r.chance[9]
        and max(r.curve(m)[9] for m in r.masks) / r.chance[9] < high
    )
    assert 'ratio to chance,best mask,10,' in e.csv() and 'over training' not in e.csv()
    e.tied.value = False
    e.size.value, e.rank.value = 8, 40
    assert (
        np.isclose(at()[1], r.overlaps[r.at()][r.cell('magnitude', 8, 40)] * r.n / 40)
        and e._right.get_xscale() == 'log'
    )
    assert e.step.layout.display == 'none' and e.split.layout.display is None
    e.show(made_up(steps=(0, 1)))
    assert not e._ratios and e.step.layout.display is None


def test_the_palette_is_near_the_figure(r):
    "256 colours on the page, all those of the figure: hardly a pixel is far off, and what is one colour stays one"
    e = explore_overlap(r)
    full = np.asarray(e.fig.canvas.buffer_rgba())[..., :3].astype(int)
    off = np.abs(full - pixels(e)).max(-1)
    assert (
        Image.open(io.BytesIO(e.image.value)).mode == 'P'
        and (off > 24).mean() < 0.01
        and off[(full == 255).all(-1)].max() == 0
    )
    for look in e._looks.values():
        c = (255 * np.array(matplotlib.colors.to_rgb(look['color']))).round()
        hit = np.abs(full - c).max(-1) <= 1
        assert not hit.any() or off[hit].max() <= 4, look


def test_folders(r, tmp_path):
    assert isinstance(explore_overlap(r.save(tmp_path / 'run')), OverlapExplorer) and isinstance(
        explore_overlap(str(tmp_path / 'run')), OverlapExplorer
    )
    with pytest.raises(RecordError, match='no record in'):
        explore_overlap(tmp_path)
    (tmp_path / 'run' / 'record.npz').write_bytes(b'')
    with pytest.raises(RecordError, match='damaged'):
        explore_overlap(tmp_path / 'run')
    with pytest.raises(TypeError, match='got dict'):
        explore_overlap({})


# ------------------------------------------------------------- size and rank apart, exports, errors


def test_size_and_rank_apart(r):
    e = explore_overlap(r)
    e.tied.value = False
    assert e.k.layout.display == 'none' and e.size.layout.display is None
    for mask in r.masks:
        for m, q in ((35, 350), (7030, 35), (350, 350)):
            e.mask.value, e.size.value, e.rank.value = mask, m, q
            v = r.overlaps[r.at()][r.cell(mask, m, q)]
            c = max(m, q) / r.n
            z = (v - c) / r.chance_std(m, q) if m < r.n else None
            for s in (f'overlap {v:.4f}', f'chance level {c:.4f}', f'top {q} directions', f'mask of {m} of {r.n}'):
                assert s in e.label.value, (s, e.label.value)
            assert z is None or f'{abs(z):.1f} deviations' in e.label.value
    e.tied.value = True
    assert e.size.layout.display == 'none' and 'top 350 of 7030' in e.label.value and not e.message.value


def test_untied_controls_change_the_figure(r):
    e = explore_overlap(r)
    seen = {e.image.value}
    for name, value in [
        ('tied', False),
        ('size', 70),
        ('rank', 35),
        ('mask', 'layerwise'),
        ('step', 0),
        ('split', 'train'),
        ('tied', True),
    ]:
        getattr(e, name).value = value
        assert e.image.value not in seen, name
        seen.add(e.image.value)


def test_without_tables_it_says_so():
    e = explore_overlap(made_up())
    assert e.tied.disabled and not e.message.value and 'deviations' not in e.label.value
    assert any('holds no table' in t.get_text() for a in e.fig.axes for t in a.texts)


def test_exports(r, tmp_path):
    import base64
    import csv
    import re

    e = explore_overlap(r.save(tmp_path / 'run'))
    e.k.value = 20
    heads = dict(png=b'\x89PNG', pdf=b'%PDF', csv=b'panel,series,x,y')
    for kind, head in heads.items():
        e.buttons[kind].click()
        m = re.search(r'download="([^"]+)" href="data:[^;]+;base64,([^"]+)"', e.out.value)
        assert (
            m[1] == f'overlap_made_up_k20_step1000_test_magnitude.{kind}'
            and base64.b64decode(m[2]).startswith(head)
            and e.save(tmp_path / f'x.{kind}').read_bytes().startswith(head)
        )
    rows = list(csv.DictReader(io.StringIO(e.csv())))
    at = [
        o for o in rows if o['series'] == 'magnitude mask' and o['panel'] == 'overlap over mask size' and o['x'] == '20'
    ]
    assert float(at[0]['y']) == r.curve()[19] and {
        'spectrum',
        'layers',
        'overlap over training',
        'overlap over mask size and rank',
    } <= {o['panel'] for o in rows}
    with pytest.raises(ValueError, match='should end in'):
        e.save(tmp_path / 'x.doc')


@pytest.mark.parametrize('tied', [True, False])
def test_the_code_draws_what_is_shown(r, tmp_path, tied):
    e = explore_overlap(r.save(tmp_path / 'run'))
    e.tied.value = tied
    e.step.value = 50
    e.buttons['code'].click()
    assert '<pre>from hessian_overlap import' in e.out.value and len(e.code().splitlines()) == 3
    exec(e.code(), {})
    assert 'step 50' in plt.gca().get_title() or 'step 50' in plt.gcf().axes[0].get_title()
    plt.close('all')


def test_what_fails_is_said_in_the_widget(r, tmp_path, capfd):
    e = explore_overlap(r)
    before = e.image.value
    e.run.value = str(tmp_path / '<b>nowhere')
    assert (
        'record.json is not there' in e.message.value
        and 'role="alert"' in e.message.value
        and '<b>nowhere' not in e.message.value
        and e.image.value == before
    )
    made_up(k=9, tables=True).save(tmp_path / 'ok')
    e.run.value = str(tmp_path / 'ok')
    assert not e.message.value and e.record.k == 9 and e.k.max == 9 and 'top 9 of' in e.label.value
    e.numbers = lambda: 1 / 0
    e.buttons['csv'].click()
    assert 'ZeroDivisionError' in e.message.value
    assert capfd.readouterr() == ('', '')


def net():
    import torch

    g = torch.Generator().manual_seed(0)
    x = torch.randn(40, 3, generator=g)
    y = (x[:, 0] > 0).long()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return (
            torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Tanh(), torch.nn.Linear(4, 2)).eval(),
            torch.nn.CrossEntropyLoss(),
            [(x, y)],
        )


def test_a_live_model_in_one_call():
    import torch

    model, loss, data = net()
    own = torch.arange(26)
    e = explore_overlap(model, loss, data, k=5, seed=0, orders=dict(mine=own))
    e.mask.value = 'mine'
    assert 'mine mask' in e.label.value and 'overlap_record(model, loss_func, data, k=5, seed=0' in e.code()
    assert explore_overlap(model, loss, dict(train=data, test=data), k=5, seed=0).split.options == ('train', 'test')
    for f, exc, says in [
        (lambda: explore_overlap(model), TypeError, 'give model, loss_func and data'),
        (lambda: explore_overlap(model, loss, data, k=27, seed=0), ValueError, '27'),
        (lambda: explore_overlap(model, loss, {}, k=2, seed=0), ValueError, 'no split'),
    ]:
        with pytest.raises(exc, match=says):
            f()


# ---------------------------------------------------------------------------------------- estimates


def test_estimates_say_their_interval_and_where_they_have_none(tmp_path):
    import csv

    r = made_up(ks=KS, tables=True)
    e = explore_overlap(r.save(tmp_path / 'run'))
    seen = set()
    assert (
        e.k.layout.display == 'none'
        and e.known.layout.display is None
        and list(e.known.options) == KS
        and 'best' not in e.mask.options
        and 'k=600' in repr(e)
    )
    for mask in ('magnitude', 'layerwise'):
        for step, split in ((0, 'train'), (100, 'test')):
            low, high, trusted = r.interval(mask, step, split)
            for j, k in enumerate(KS):
                e.mask.value, e.step.value, e.split.value, e.known.value = mask, step, split, k
                for s in (
                    f'overlap {r.curve(mask, step, split)[j]:.4f}',
                    f'95% interval {low[j]:.4f} to {high[j]:.4f}',
                    f'chance level {k / 1000:.4f}',
                    f'top {k} of 1000',
                ):
                    assert s in e.label.value, (s, e.label.value)
                assert (
                    ('not resolved' in e.label.value) == (not trusted[j])
                    and e.image.value not in seen
                    and 'deviations' not in e.label.value
                )
                seen.add(e.image.value)
                assert e._unsure.get_xdata().tolist() == KS[3:] and (
                    e._within.get_paths()[0].vertices[:, 1].max(),
                    e._over_within.get_paths()[0].vertices[:, 0].max(),
                ) == (high.max(), 100)
    rows = {(o['panel'], o['series'], o['x']): float(o['y']) for o in csv.DictReader(io.StringIO(e.csv()))}
    at = 'overlap over mask size'
    assert (
        rows[at, 'layerwise mask, low', '40'] == low[2]
        and rows[at, 'layerwise mask, high', '600'] == high[4]
        and rows[at, 'layerwise mask, resolved', '600'] == 0
    )
    assert (
        rows['overlap over training', 'layerwise mask, high', '0'] == r.interval('layerwise', 0)[1][4]
        and rows['spectrum', 'eigenvalue at the cut', '40'] == r.eigvals[2, 1, 2]
    )
    e.mask.value = 'random'
    assert (
        'an estimate; intervals are known for single orderings, not for a mean' in e.label.value
        and 'resolved' not in e.csv()
        and not len(e._unsure.get_xdata())
    )
    e.tied.value, e.mask.value = False, 'magnitude'
    e.size.value, e.rank.value = 600, 40
    v = r.overlaps[r.at()][r.cell('magnitude', 600, 40)]
    assert (
        f'overlap {v:.4f}</b> (95% interval {max(0, v - 0.05):.4f} to {min(1, v + 0.05):.4f})' in e.label.value
        and e.known.layout.display == 'none'
        and not e.message.value
    )
    e.rank.value = 600
    assert 'not resolved' in e.label.value and (e._unsure.get_xdata() == r.sizes).all()  # as the cut at 600 is not
    e.tied.value = True
    assert e.known.layout.display is None and '95% interval' in e.label.value
    for kind in ('png', 'pdf', 'csv', 'code'):
        e.buttons[kind].click()
        assert not e.message.value
    exec(e.code(), {})
    plt.close('all')


def test_from_estimates_to_eigenpairs_and_back(tmp_path):
    made_up(tables=True).save(tmp_path / 'pairs')
    made_up(ks=KS, tables=True).save(tmp_path / 'estimates')
    e = explore_overlap(tmp_path / 'estimates')
    e.run.value = str(tmp_path / 'pairs')
    assert (
        e.k.layout.display is None
        and e.known.layout.display == 'none'
        and 'deviations' in e.label.value
        and 'best' in e.mask.options
        and not e.message.value
    )
    e.k.value = 9
    assert 'top 9 of' in e.label.value
    e.run.value = str(tmp_path / 'estimates')
    e.known.value = 10
    assert '95% interval' in e.label.value and not e.message.value
    alone = explore_overlap(tmp_path / 'estimates')
    alone.known.value = 10
    assert (pixels(alone) == pixels(e)).all()


def test_estimates_of_a_live_model():
    import torch

    g = torch.Generator().manual_seed(0)
    x = torch.randn(60, 8, generator=g)
    y = (x[:, 0] > 0).long()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(8, 20), torch.nn.Tanh(), torch.nn.Linear(20, 2)).eval()
    e = explore_overlap(
        model,
        torch.nn.CrossEntropyLoss(),
        [(x, y)],
        k=60,
        method='slq',
        num_probes=4,
        num_steps=12,
        ks=[2, 10, 60],
        seed=0,
        orders=dict(mine=torch.arange(222)),
    )
    e.mask.value, e.known.value = 'mine', 10
    assert (
        '95% interval' in e.label.value
        and 'mine mask' in e.label.value
        and "method='slq'" in e.code()
        and not e.message.value
    )


# ---------------------------------------------------------------------------------- crystallisation


@pytest.fixture(scope='module')
def maps():
    import torch

    from hessian_overlap import crystallisation

    g = torch.Generator().manual_seed(0)
    U = [torch.linalg.qr(torch.randn(30, 6, generator=g, dtype=torch.float64)).Q for _ in range(4)]
    return crystallisation(
        torch.randn(4, 30, generator=g), dict(train=U, test=U[::-1]), [0, 1, 2, 5], [3, 6], 'made up'
    )


def test_crystallisation(maps, tmp_path):
    from hessian_overlap import Crystallisation, explore_crystallisation

    e = explore_crystallisation(maps.save(tmp_path / 'c.json'))
    seen = {e.image.value}
    for name, value in [('size', 3), ('a', 2), ('b', 1), ('split', 'train')]:
        getattr(e, name).value = value
        assert e.image.value not in seen, name
        seen.add(e.image.value)
    v = maps.spaces['train'][0][2, 1]
    assert (
        f'overlap {v:.4f}' in e.label.value
        and f'masks {maps.masks[0][2, 1]:.3f}' in e.label.value
        and not e.message.value
    )
    for kind in ('png', 'pdf', 'csv'):
        e.buttons[kind].click()
        assert f'.{kind}' in e.out.value
    exec(e.code(), {})
    plt.close('all')
    e.file.value = 'nowhere.json'
    assert 'nowhere.json is not there' in e.message.value
    (tmp_path / 'run').mkdir()
    maps.save(tmp_path / 'run' / 'crystallization.json')
    assert explore_crystallisation(tmp_path / 'run').maps.sizes == maps.sizes
    less = Crystallisation(maps.problem, maps.n, maps.steps, maps.sizes, maps.spaces)
    e = explore_crystallisation(less)
    assert 'masks' not in e.label.value and not e.message.value
    for bad in ('{', '{}', '{"steps": 3}', '[]'):
        (tmp_path / 'bad.json').write_text(bad)
        with pytest.raises(RecordError, match='not a file of crystallisation maps'):
            explore_crystallisation(tmp_path / 'bad.json')


def test_crystallisation_from_a_run_folder(tmp_path):
    from hessian_overlap import explore_crystallisation, make_problem, run_overlap

    p = make_problem('mnist_mini', seed=0, device='cpu')
    run_overlap(
        p, steps=4, snapshots=[0, 4], k=4, samples=100, num_random=0, seed=0, out=tmp_path / 'run', progress=False
    )
    e = explore_crystallisation(tmp_path / 'run', [2, 4], samples=100, seed=0)
    assert e.maps.steps == [0, 4] and 0 <= e.state()['overlap'] <= 1
    with pytest.raises(RecordError, match='no run in'):
        explore_crystallisation(tmp_path, [2], seed=0)


# ----------------------------------------------------------------------------------------- sketches


def test_sketches_run_and_are_compared():
    from hessian_overlap import explore_sketch
    from hessian_overlap.explore_sketch import METHODS

    e = explore_sketch(k=6)
    for i, method in enumerate(METHODS):
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
    import threading

    from hessian_overlap import LinearOperator, SynthOperator, explore_sketch, synth_eigvals

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


def test_a_sketch_of_a_model():
    from hessian_overlap import explore_sketch

    e = explore_sketch(*net(), k=3)
    e.run(wait=True)
    assert len(e.runs) == 1 and 'HessianLinearOperator(model' in e.code()
    with pytest.raises(TypeError, match='give model, loss_func and data'):
        explore_sketch(net()[0])
    with pytest.raises(ValueError, match='between 1 and n/4'):
        explore_sketch(*net(), k=20)
