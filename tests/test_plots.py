"Plots show the numbers of the record, compute nothing, and can be read in grey, in the dark and without colour vision."

import io
from dataclasses import replace

import matplotlib

matplotlib.use('agg')
import matplotlib.pyplot as plt
import numpy as np
import pytest
from made import made_up
from matplotlib.colors import to_rgb, to_rgba
from matplotlib.figure import Figure

from hessian_overlap.plots import (
    LOOKS,
    STYLES,
    plot_crystallisation,
    plot_density,
    plot_interval,
    plot_layers,
    plot_metrics,
    plot_overlap_curve,
    plot_overlap_over_training,
    plot_overlap_table,
    plot_spectrum,
)

KS = [3, 10, 40, 150, 600]
PLOTS = [plot_overlap_over_training, plot_overlap_curve, plot_spectrum]


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close('all')


@pytest.mark.parametrize('plot', PLOTS)
@pytest.mark.parametrize(
    'kw',
    [
        dict(),
        dict(k=1),
        dict(steps=(0,)),
        dict(R=0),
        dict(method='seigh'),
        dict(ks=KS),
        dict(ks=[7]),
        dict(ks=KS, R=0, steps=(0,)),
    ],
    ids=str,
)
def test_draws_labelled_axes(plot, kw):
    ax = plot(made_up(**kw))
    assert ax.get_xlabel() and ax.get_ylabel() and ax.get_title() and ax.get_legend()
    ax.figure.savefig(io.BytesIO(), format='png')
    ax.figure.savefig(io.BytesIO(), format='pdf')


@pytest.mark.parametrize('plot', PLOTS)
def test_draws_into_given_axes(plot):
    ax = Figure().subplots()
    before = plt.get_fignums()
    assert plot(made_up(), ax=ax) is ax and plt.get_fignums() == before and len(ax.lines)


def test_shows_the_numbers_of_the_record():
    r = made_up()
    lines = {l.get_label(): l.get_ydata() for l in plot_overlap_over_training(r, k=7).lines}
    assert (lines['train Hessian'] == r.magnitude[:, 0, 6]).all() and (
        lines['test Hessian'] == r.magnitude[:, 1, 6]
    ).all()
    assert len(plot_overlap_over_training(r, split='train').lines) == 2
    lines = {l.get_label(): l.get_ydata() for l in plot_overlap_curve(r, 50, 'train').lines}
    assert (
        (lines['magnitude mask'] == r.magnitude[1, 0]).all()
        and (lines['best mask'] == r.best[1, 0]).all()
        and (lines['chance k/n'] == r.chance).all()
    )
    assert (lines['4 random masks'] == r.random[1, 0].mean(0)).all()
    ax = plot_spectrum(r, 50, 'train', k=9)
    lam = r.eigvals[1, 0]
    pos, neg, cut = ax.lines
    assert (
        (pos.get_ydata() == lam[lam > 0]).all()
        and (neg.get_ydata() == -lam[lam < 0]).all()
        and cut.get_ydata()[0] == abs(lam[8])
        and ax.get_yscale() == 'log'
    )
    assert pos.get_label() == f'positive: {(lam[:9] > 0).sum()} of the top 9'
    assert pos.get_marker() != neg.get_marker() and pos.get_fillstyle() != neg.get_fillstyle()


@pytest.mark.parametrize(
    'bad, says',
    [
        (lambda r: plot_overlap_over_training(r, k=61), 'mask sizes 1 to 60'),
        (lambda r: plot_overlap_over_training(r, k=0), 'k = 0'),
        (lambda r: plot_overlap_over_training(r, split='x'), "split 'x'"),
        (lambda r: plot_overlap_curve(r, step=3), 'step 3'),
        (lambda r: plot_spectrum(r, split='x'), "split 'x'"),
        (lambda r: plot_spectrum(r, k=99), 'k = 99'),
    ],
)
def test_refuses_what_is_not_there(bad, says):
    with pytest.raises(ValueError, match=says):
        bad(made_up())
    assert not plt.get_fignums()  # and leaves no empty figure behind


def test_a_spectrum_of_zeros():
    r = made_up()
    ax = plot_spectrum(replace(r, eigvals=0 * r.eigvals))
    ax.figure.savefig(io.BytesIO())
    assert 'positive: 0 of' in ax.get_legend().get_texts()[0].get_text()


def grey(c):
    return float(np.dot(to_rgb(c), (0.299, 0.587, 0.114)))


def test_curves_of_one_plot_differ_without_colour():
    for names in (('magnitude', 'best', 'random'), ('train', 'test'), ('positive', 'negative')):
        shapes = [(LOOKS[o].get('ls'), LOOKS[o].get('marker'), LOOKS[o].get('fillstyle')) for o in names]
        assert len(set(shapes)) == len(names)
    assert len({round(grey(LOOKS[o]['color']), 1) for o in ('magnitude', 'random', 'best')}) >= 2


@pytest.mark.parametrize('plot', PLOTS)
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


# ------------------------------------------------------------------ tables, layers, maps, estimates

TABLED = [plot_overlap_table, plot_layers]


@pytest.mark.parametrize('plot', TABLED)
@pytest.mark.parametrize('kw', [dict(), dict(k=1), dict(steps=(0,)), dict(R=0), dict(k=60, n=60), dict(ks=KS)], ids=str)
def test_tables_and_layers(plot, kw):
    r = made_up(tables=True, **kw)
    ax = plot(r, r.orders[-1])
    assert ax.get_xlabel() and ax.get_title()
    ax.figure.savefig(io.BytesIO(), format='png')
    own = Figure().subplots()
    assert plot(r, ax=own) is own
    with pytest.raises(ValueError, match='no tables over mask size and rank'):
        plot(made_up(**kw))
    with pytest.raises(ValueError, match="mask 'x'"):
        plot(r, 'x')


def test_table_shows_the_numbers():
    r = made_up(tables=True)
    m, q = int(r.sizes[3]), int(r.ranks[4])
    ax = plot_overlap_table(r, 'layerwise', 50, 'train', point=(m, q))
    assert (ax.images[0].get_array() == r.overlaps[1, 0, 2].T).all() and len(ax.texts) == r.overlaps[1, 0, 2].size
    (frame,) = ax.patches
    assert frame.get_xy() == (2.5, 3.5)
    ax = plot_overlap_table(r, ratio=True)
    np.testing.assert_allclose(
        ax.images[0].get_array(), (r.overlaps[2, 1, 0] * r.n / np.maximum.outer(r.sizes, r.ranks)).T
    )
    ax = plot_layers(r, 'magnitude', m, q, 50, 'train')
    assert [b.get_width() for b in ax.patches] == pytest.approx(r.layers[1, 0, 0, 3, 4].tolist())
    np.testing.assert_allclose(ax.lines[0].get_xdata(), r.available[1, 0, 4] * q / min(m, q) * m / r.n)


def test_numbers_in_cells_can_be_read():
    "Light on dark cells and dark on light ones"
    from hessian_overlap.plots import _luminance

    ax = plot_crystallisation(np.linspace(0, 1, 36).reshape(6, 6), range(6))
    im = ax.images[0]
    for t in ax.texts:
        x, y = (int(v) for v in t.get_position())
        back, fore = _luminance(im.cmap(im.norm(im.get_array()[y, x]))), _luminance(t.get_color())
        assert (max(back, fore) + 0.05) / (min(back, fore) + 0.05) > 4.5


def test_crystallisation_metrics():
    ax = plot_crystallisation(np.eye(3), [0, 50, 100], 'IoU', chance=0.1, point=(0, 100))
    assert 'chance 0.1' in ax.get_title() and ax.patches[0].get_xy() == (-0.5, 1.5)
    for bad, says in [
        (lambda: plot_crystallisation(np.eye(3), [0, 1]), 'there are 2 steps'),
        (lambda: plot_crystallisation(np.eye(2), [0, 1], point=(0, 5)), 'step 5 is not among'),
    ]:
        with pytest.raises(ValueError, match=says):
            bad()
    ax = plot_metrics([0, 1], dict(a=[1, 2], b=[3, 4]), dict(a=0.5))
    assert len(ax.lines) == 3 and ax.lines[1].get_linestyle() == ':'
    assert len({(ls, m) for _, ls, m in STYLES}) == len(STYLES)
    with pytest.raises(ValueError, match="chance has 'c'"):
        plot_metrics([0], dict(a=[1]), dict(c=1))


def test_intervals_and_density():
    import torch

    from hessian_overlap import (
        SynthOperator,
        eigsh,
        overlap_error,
        overlap_slq,
        random_order,
        spectral_density,
        synth_eigvals,
    )

    A = SynthOperator(synth_eigvals(80, rank=1, seed=0), seed=0)
    order = random_order(80, seed=0)
    est = overlap_slq(A, order, torch.tensor([2, 5]), num_probes=4, num_steps=10, seed=0)
    ax = plot_interval(est, exact=[0.1, 0.2])
    lines = {l.get_label(): l for l in ax.lines}
    assert (
        (lines['estimate'].get_ydata() == est.overlap.numpy()).all()
        and (lines['chance k/n'].get_ydata() == np.array([2, 5]) / 80).all()
        and 'exact' in lines
    )
    ax = plot_interval(overlap_error(eigsh(A, 5, seed=0), order))
    assert len(ax.lines) == 1  # it does not know n
    ax = plot_density(spectral_density(A, num_probes=4, num_steps=8, seed=0))
    assert ax.get_yscale() == 'log' and len(ax.lines) == 2
    ax.figure.savefig(io.BytesIO())


def test_estimates_have_a_band_and_hollow_markers_where_they_are_not_resolved():
    r = made_up(ks=KS, tables=True)
    ax = plot_overlap_curve(r, 50, 'train')
    lines = {l.get_label(): l for l in ax.lines}
    low, high, trusted = r.interval('magnitude', 50, 'train')
    assert (
        ax.get_xscale() == 'log'
        and (lines['magnitude mask'].get_xdata() == KS).all()
        and (lines['magnitude mask'].get_ydata() == r.magnitude[1, 0]).all()
        and 'best mask' not in lines
    )
    (band,) = [c for c in ax.collections if c.get_label() == '95% interval']
    v = band.get_paths()[0].vertices
    assert {(a, b) for a, b in v.tolist()} >= {*zip(KS, low.tolist()), *zip(KS, high.tolist())} and ax.get_ylim()[
        1
    ] >= high.max()
    hollow = lines['not resolved']
    assert (
        hollow.get_xdata().tolist() == KS[3:]
        and (hollow.get_ydata() == r.magnitude[1, 0, 3:]).all()
        and to_rgba(hollow.get_markerfacecolor()) == to_rgba(ax.get_facecolor())
    )
    ax = plot_overlap_over_training(r, k=40)
    assert (
        len(ax.collections) == 2
        and len(ax.lines) == 3
        and f'{40 / 1000:.3g}' in ax.get_legend().get_texts()[-1].get_text()
    )  # trusted: no hollow ones
    assert (ax.lines[0].get_ydata() == r.magnitude[:, 0, 2]).all() and {
        tuple(o) for o in ax.collections[1].get_paths()[0].vertices.tolist()
    } >= {*zip([0.0, 50.0, 100.0], r.low[:, 1, 0, 2].tolist())}
    ax = plot_overlap_over_training(r)
    assert len(ax.lines) == 5 and [len(l.get_xdata()) for l in ax.lines] == [3, 3, 3, 3, 2]
    assert (
        not plot_overlap_curve(made_up(ks=KS, trusted=np.ones((3, 2, 1, 5))))
        .collections[0]
        .get_label()
        .startswith('not')
        and ax.get_title()
    )


def test_thresholds_of_some_mask_sizes():
    r = made_up(ks=KS)
    ax = plot_spectrum(r, 50, 'train', k=40)
    lam = r.eigvals[1, 0]
    line, pos, neg, cut = ax.lines
    assert (
        ax.get_xscale() == ax.get_yscale() == 'log'
        and (line.get_xdata() == KS).all()
        and (line.get_ydata() == abs(lam)).all()
        and cut.get_ydata()[0] == abs(lam[2])
    )
    assert (
        pos.get_xdata().tolist() == np.array(KS)[lam > 0].tolist()
        and neg.get_xdata().tolist() == np.array(KS)[lam < 0].tolist()
    )
    for f in (plot_spectrum, plot_overlap_over_training):
        with pytest.raises(ValueError, match='k = 41 is not in the record; it has mask sizes 3, 10, 40, 150, 600'):
            f(r, k=41)


def test_cells_that_are_about_so():
    r = made_up(ks=KS, tables=True)
    h = r.half.copy()
    h[:, :, 0, 0, 1] = 0.2 * r.overlaps[:, :, 0, 0, 1] + 1e-9
    h[:, :, 0, 0, 0] = 0
    ax = plot_overlap_table(replace(r, half=h))
    said = {tuple(int(v) for v in t.get_position()): t.get_text() for t in ax.texts}
    assert (
        said[0, 1].startswith('~')
        and said[0, 1][1:] == f'{r.overlaps[2, 1, 0, 0, 1]:.2f}'.removeprefix('0')
        and '~' not in said[0, 0]
    )
    assert not any('~' in t.get_text() for t in plot_overlap_table(made_up(tables=True)).texts)
