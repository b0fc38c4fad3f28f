"Plots show the numbers of the record, compute nothing, and can be read in grey, in the dark and without colour vision."

import io
from pathlib import Path

import matplotlib

matplotlib.use('agg')
import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from execnb.shell import CaptureShell
from made import KS, made_up
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

from hessian_overlap import SynthOperator, eigsh, overlap_error, overlap_slq, random_order, spectral_density
from hessian_overlap import synth_eigvals as eigvals
from hessian_overlap.plots import (
    LOOKS,
    STYLES,
    layer_chance,
    luminance,
    over_seeds,
    place,
    plain,
    plot_crystallisation,
    plot_density,
    plot_interval,
    plot_layers,
    plot_metrics,
    plot_overlap_curve,
    plot_overlap_over_training,
    plot_overlap_table,
    plot_runs,
    plot_spectrum,
    scale,
)
from hessian_overlap.record import pick

PLOTS = [plot_overlap_over_training, plot_overlap_curve, plot_spectrum, plot_overlap_table, plot_layers]
RECORDS = [
    dict(),
    dict(k=1),
    dict(k=60, n=60),
    dict(steps=(0,)),
    dict(R=0),
    dict(method='seigh'),
    dict(ks=KS),
    dict(ks=[7]),
    dict(ks=KS, R=0, steps=(0,)),
    dict(seeds=(3, 1, 2)),
    dict(seeds=(0, 1), ks=KS),
]


def lines(ax):
    return {l.get_label(): l for l in ax.lines}


def legend(ax):
    return [t.get_text() for t in ax.get_legend().get_texts()]


@pytest.mark.parametrize('plot', PLOTS)
@pytest.mark.parametrize('kw', RECORDS, ids=str)
def test_draws_labelled_axes_of_any_record(plot, kw):
    ax = plot(made_up(**kw))
    assert ax.get_xlabel() and ax.get_title()
    ax.figure.savefig(io.BytesIO(), dpi=30)
    assert not plt.get_fignums()
    own = Figure().subplots()
    assert plot(made_up(**kw), ax=own) is own


def test_a_figure_of_its_own_shows_itself_and_stays_nowhere():
    png, size = plot_overlap_curve(made_up())._repr_png_()
    assert png[:4] == b'\x89PNG' and size['width'] > 300 and not plt.get_fignums()


def test_a_cell_shows_the_figure_that_is_its_value(tmp_path):
    shell = CaptureShell(tmp_path)
    out = shell.run(f'import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n{CELL}')
    assert [sorted(o['data']) for o in out] == [['image/png', 'text/plain']], out
    assert not shell.run('a = plot_spectrum(made_up())')  # and none where it is not


CELL = """from made import made_up
from hessian_overlap.plots import plot_spectrum
plot_spectrum(made_up())"""


def test_over_training_shows_the_numbers_of_the_record():
    r = made_up()
    ax = plot_overlap_over_training(r, k=7)
    for split in ('train', 'test'):
        want = r.overlap.sel(seed=0, order='magnitude', split=split, k=7)
        assert (lines(ax)[f'{split} Hessian'].get_ydata() == want).all()
    assert 'interval' not in legend(ax)  # too thin to be seen
    assert len(plot_overlap_over_training(r, split='train').lines) == 2


def test_curves_show_the_numbers_of_the_record():
    r = made_up()
    ax = plot_overlap_curve(r, step=50, split='train')
    d = pick(r, step=50, split='train')
    for name, order in [('magnitude mask', 'magnitude'), ('best mask', 'best'), ('random masks (mean)', 'random')]:
        assert (lines(ax)[name].get_ydata() == d.overlap.sel(order=order)).all()
    assert (lines(ax)['chance k/n'].get_ydata() == d.chance).all()
    band = ax.collections[-1].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (d.random.min(), d.random.max())
    assert legend(plot_overlap_curve(r, orders=['layerwise'])) == ['layerwise mask', 'chance k/n']


def test_the_spectrum_shows_the_numbers_of_the_record():
    r = made_up()
    ax = plot_spectrum(r, 9, step=50, split='train')
    lam = pick(r, step=50, split='train').eigvals.values
    every, pos, neg, cut, at = ax.lines
    assert (every.get_ydata() == abs(lam)).all() and at.get_xdata()[0] == 9
    assert (pos.get_ydata() == lam[lam > 0]).all() and (neg.get_ydata() == -lam[lam < 0]).all()
    assert cut.get_ydata()[0] == abs(lam[8]) and ax.get_yscale() == 'log'
    assert pos.get_label() == f'positive: {(lam[:9] > 0).sum()} of 9 up to the cut'
    assert pos.get_marker() != neg.get_marker() and pos.get_fillstyle() != neg.get_fillstyle()


@pytest.mark.parametrize(
    'bad, says',
    [
        (lambda r: plot_overlap_over_training(r, k=61), '61 is not in the record; it has 1 to 60'),
        (lambda r: plot_overlap_over_training(r, k=0), 'k 0'),
        (lambda r: plot_overlap_over_training(r, split='x'), "split 'x'"),
        (lambda r: plot_overlap_over_training(r, order='x'), "order 'x'"),
        (lambda r: plot_overlap_curve(r, step=3), 'step 3'),
        (lambda r: plot_overlap_curve(r, orders=['x']), "order 'x'"),
        (lambda r: plot_overlap_curve(r, seed=7), 'seed 7'),
        (lambda r: plot_spectrum(r, split='x'), "split 'x'"),
        (lambda r: plot_spectrum(r, k=99), '99'),
        (lambda r: plot_overlap_table(r, 'x'), "order 'x'"),
        (lambda r: plot_overlap_table(r, point=(7, 60)), 'size 7 is not in the tables'),
        (lambda r: plot_layers(r, rank=7), 'rank 7 is not in the tables'),
        (lambda r: plot_runs({'a': r}, over='split'), "over must be 'k' or 'step'"),
    ],
)
def test_refuses_what_is_not_there(bad, says):
    with pytest.raises(ValueError, match=says):
        bad(made_up())


def test_a_spectrum_of_zeros():
    r = made_up()
    ax = plot_spectrum(r.assign(eigvals=0 * r.eigvals))
    ax.figure.savefig(io.BytesIO())
    assert 'positive: 0 of' in legend(ax)[0]


def grey(c):
    return float(np.dot(to_rgba(c)[:3], (0.299, 0.587, 0.114)))


def test_curves_of_one_plot_differ_without_colour():
    for names in (('magnitude', 'best', 'random'), ('train', 'test'), ('positive', 'negative')):
        shapes = [(LOOKS[o].get('ls'), LOOKS[o].get('marker'), LOOKS[o].get('fillstyle')) for o in names]
        assert len(set(shapes)) == len(names)
    assert len({round(grey(LOOKS[o]['color']), 1) for o in ('magnitude', 'random', 'best')}) >= 2
    assert len({(ls, m) for _, ls, m in STYLES}) == len(STYLES)


@pytest.mark.parametrize('plot', PLOTS[:3])
@pytest.mark.parametrize('style', ['default', 'dark_background', 'ggplot'])
def test_solid_background_and_readable_text(plot, style):
    with plt.style.context(style), plt.rc_context({'figure.facecolor': 'none', 'axes.facecolor': 'none'}):
        ax = plot(made_up())
        back = ax.figure.get_facecolor()
        assert back[3] == 1 and to_rgba(ax.get_facecolor())[3] == 1
        for text in (ax.xaxis.label, ax.title, ax.get_legend().get_texts()[0]):
            assert abs(grey(text.get_color()) - grey(back[:3])) > 0.4
    assert plot(made_up()).figure.get_facecolor() == (1, 1, 1, 1)


def test_rcparams_are_respected_and_left_alone():
    before = dict(matplotlib.rcParams)
    with plt.rc_context({'figure.figsize': (3, 2), 'axes.labelsize': 5}):
        ax = plot_overlap_curve(made_up())
        assert tuple(ax.figure.get_size_inches()) == (3, 2) and ax.xaxis.label.get_size() == 5
    assert dict(matplotlib.rcParams) == before


def test_names_are_drawn_as_they_are():
    r = made_up(problem='cost $x$ of_5$', splits=('$a$', '_b'))
    r = r.assign_coords(layer=['$w$', '_x', 'y'], order=['magnitude', '$o$', 'random', 'best'])
    drawn = [plot(r) for plot in PLOTS[:3]]
    drawn += [plot_overlap_table(r, '$o$'), plot_layers(r, '$o$'), plot_runs({'_run': r, '$r$': r}, order='$o$')]
    for ax in drawn:
        ax.figure.savefig(io.BytesIO())
        texts = [ax.title, *ax.get_yticklabels(), *(ax.get_legend().get_texts() if ax.get_legend() else [])]
        for t in texts:
            if t.get_text().count('$') > t.get_text().count(r'\$'):
                assert 'λ' in t.get_text() or 'mathdefault' in t.get_text(), t.get_text()  # our own formulas
    assert legend(drawn[-1])[0] == ' _run' and legend(drawn[0])[1] == ' _b Hessian'
    assert plain(3) == '3'


# ---------------------------------------------------------------------------------- tables, layers, maps, estimates


def test_table_shows_the_numbers():
    r = made_up()
    m, q = int(r['size'][3]), int(r['rank'][4])
    d = pick(r, order='layerwise', step=50, split='train')
    ax = plot_overlap_table(r, 'layerwise', step=50, split='train', point=(m, q))
    assert (ax.images[0].get_array() == d.table.values.T).all() and len(ax.texts) == d.table.size
    (frame,) = ax.patches
    assert frame.get_xy() == (2.5, 3.5)
    ax, d = plot_overlap_table(r, ratio=True), pick(r, order='magnitude')
    want = d.table * r.n / np.maximum(r['size'], r['rank'])
    np.testing.assert_allclose(ax.images[0].get_array(), want.values.T)


def test_layers_show_the_numbers():
    r = made_up()
    m, q = int(r['size'][3]), int(r['rank'][4])
    d = pick(r, order='magnitude', step=50, split='train').sel(size=m, rank=q)
    ax = plot_layers(r, 'magnitude', m, q, step=50, split='train')
    assert [b.get_width() for b in ax.patches] == pytest.approx(d.layers.values.tolist())
    np.testing.assert_allclose(ax.lines[0].get_xdata(), d.available * q / min(m, q) * m / r.n)
    assert (layer_chance(d) == ax.lines[0].get_xdata()).all()


def test_numbers_in_cells_can_be_read():
    "Light on dark cells and dark on light ones"
    ax = plot_crystallisation(np.linspace(0, 1, 36).reshape(6, 6), range(6))
    im = ax.images[0]
    for t in ax.texts:
        x, y = (int(v) for v in t.get_position())
        back, fore = luminance(im.cmap(im.norm(im.get_array()[y, x]))), luminance(t.get_color())
        assert (max(back, fore) + 0.05) / (min(back, fore) + 0.05) > 4.5


def test_cells_that_are_about_so():
    r = made_up(ks=KS)
    half = r.half.copy()
    half[..., 0, 0, 1] = 0.2 * r.table[..., 0, 0, 1] + 1e-9
    half[..., 0, 0, 0] = 0
    said = {t.get_position(): t.get_text() for t in plot_overlap_table(r.assign(half=half)).texts}
    value = pick(r, order='magnitude').table[0, 1].item()
    assert said[0, 1] == '~' + f'{value:.2f}'.removeprefix('0') and '~' not in said[0, 0]
    assert not any('~' in t.get_text() for t in plot_overlap_table(made_up()).texts)
    assert not plot_overlap_table(r, 'best').texts  # NaN says nothing


def test_crystallisation_and_metrics():
    ax = plot_crystallisation(np.eye(3), [0, 50, 100], 'IoU', chance=0.1, point=(0, 100))
    assert 'chance 0.1' in ax.get_title() and ax.patches[0].get_xy() == (-0.5, 1.5)
    for bad, says in [
        (lambda: plot_crystallisation(np.eye(3), [0, 1]), 'there are 2 steps'),
        (lambda: plot_crystallisation(np.eye(2), [0, 1], point=(0, 5)), 'step 5 is not among'),
        (lambda: plot_metrics([0], dict(a=[1]), dict(c=1)), "chance has 'c'"),
    ]:
        with pytest.raises(ValueError, match=says):
            bad()
    ax = plot_metrics([0, 1], dict(a=[1, 2], b=[3, 4]), dict(a=0.5))
    assert len(ax.lines) == 3 and ax.lines[1].get_linestyle() == ':'


def test_intervals_and_density():
    A = SynthOperator(eigvals(80, rank=1, seed=0), seed=0)
    order = random_order(80, seed=0)
    est = overlap_slq(A, order, torch.tensor([2, 5]), num_probes=4, num_steps=10, seed=0)
    drawn = lines(plot_interval(est, exact=[0.1, 0.2]))
    assert (drawn['estimate'].get_ydata() == est.overlap.numpy()).all() and 'exact' in drawn
    assert (drawn['chance k/n'].get_ydata() == np.array([2, 5]) / 80).all()
    ax = plot_interval(overlap_error(eigsh(A, 5, seed=0), order))
    assert len(ax.lines) == 1  # it does not know n
    ax = plot_density(spectral_density(A, num_probes=4, num_steps=8, seed=0))
    assert ax.get_yscale() == 'log' and len(ax.lines) == 2
    ax.figure.savefig(io.BytesIO())


def test_axes_follow_the_mask_sizes():
    assert [scale(ks) for ks in (range(1, 61), [5, 10, 15], KS, [7])] == ['linear', 'linear', 'log', 'linear']
    r = made_up(ks=KS)
    assert plot_overlap_curve(r).get_xscale() == plot_spectrum(r).get_xscale() == 'log'
    pos, neg = plot_spectrum(r, step=50, split='train', k=40).lines[1:3]
    lam = pick(r, step=50, split='train').eigvals.values
    assert pos.get_xdata().tolist() == r.k.values[lam > 0].tolist()
    assert neg.get_xdata().tolist() == r.k.values[lam < 0].tolist()


def test_bands_and_hollow_markers():
    r = made_up(ks=KS)
    ax, d = plot_overlap_curve(r, step=50, split='train'), pick(r, step=50, split='train', order='magnitude')
    drawn = lines(ax)
    assert (drawn['magnitude mask'].get_ydata() == d.overlap).all() and 'best mask' not in drawn
    (band,) = [c for c in ax.collections if c.get_label() == 'interval']
    corners = {tuple(v) for v in band.get_paths()[0].vertices.tolist()}
    assert corners >= {*zip(KS, d.low.values.tolist()), *zip(KS, d.high.values.tolist())}
    assert ax.get_ylim()[1] >= d.high.max()
    hollow = drawn['not trusted']
    assert hollow.get_xdata().tolist() == KS[3:] and (hollow.get_ydata() == d.overlap[3:]).all()
    assert to_rgba(hollow.get_markerfacecolor()) == to_rgba(ax.get_facecolor())
    ax = plot_overlap_over_training(r, k=40)  # trusted there
    assert len(ax.lines) == 3 and legend(ax).count('interval') == 1 and 'not trusted' not in legend(ax)
    assert legend(plot_overlap_over_training(r)).count('not trusted') == 1  # once for two curves
    sketch = lines(plot_overlap_curve(made_up(method='seigh')))['not trusted']
    assert len(sketch.get_xdata()) <= 30  # of 60: hollow, and still a curve


def test_several_seeds_are_a_mean_and_a_range():
    r = made_up(seeds=(3, 1, 2))
    ax, d = plot_overlap_curve(r), place(r, order='magnitude')
    assert (lines(ax)['magnitude mask'].get_ydata() == d.overlap.mean('seed')).all() and 'range over seeds' in legend(
        ax
    )
    both = over_seeds(d)
    assert (both.low == d.overlap.min('seed')).all() and (both.high == d.overlap.max('seed')).all()
    one = plot_overlap_curve(r, seed=1)
    want = pick(r, seed=1, order='magnitude').overlap
    assert (lines(one)['magnitude mask'].get_ydata() == want).all() and 'range over seeds' not in legend(one)
    ax = plot_overlap_table(r)
    np.testing.assert_allclose(ax.images[0].get_array(), place(r, order='magnitude').table.mean('seed').values.T)
    assert any(t.get_text().startswith('~') for t in ax.texts)  # seeds differ there
    assert 'range over seeds' in legend(plot_layers(r)) and 'range over seeds' not in legend(plot_layers(r, seed=2))
    unsure = r.assign(trusted=r.trusted & (r.seed != 1))
    assert 'not trusted' in legend(plot_overlap_curve(unsure))  # one seed is enough


def test_runs_side_by_side():
    a, b = made_up(), made_up(1, ks=KS)
    ax = plot_runs({'pairs': a, 'quadrature': b}, step=50)
    drawn = lines(ax)
    assert (drawn['pairs'].get_ydata() == pick(a, step=50, order='magnitude').overlap).all()
    assert (drawn['quadrature'].get_xdata() == KS).all() and ax.get_xscale() == 'log'
    ax = plot_runs({'pairs': a, 'quadrature': b}, 'step', k=40, split='train')
    want = b.overlap.sel(seed=0, order='magnitude', split='train', k=40)
    assert (lines(ax)['quadrature'].get_ydata() == want).all()
    ax = plot_runs({'small': a, 'large': made_up(n=2000), 'seeds': made_up(seeds=range(5))})
    assert 'k/n' in ax.get_xlabel() and lines(ax)['large'].get_xdata().max() == 60 / 2000
    assert 'range over seeds' in legend(ax)
