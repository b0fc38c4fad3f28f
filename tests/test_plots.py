"Plots show the numbers of the record, compute nothing, and can be read in grey, in the dark and without colour vision."
import io
from dataclasses import replace
import matplotlib; matplotlib.use("agg")
import matplotlib.pyplot as plt, numpy as np, pytest
from matplotlib.colors import to_rgb, to_rgba
from matplotlib.figure import Figure
from hessian_overlap.plots import LOOKS, plot_overlap_curve, plot_overlap_over_training, plot_spectrum
from made import made_up

PLOTS = [plot_overlap_over_training, plot_overlap_curve, plot_spectrum]


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


@pytest.mark.parametrize("plot", PLOTS)
@pytest.mark.parametrize("kw", [dict(), dict(k=1), dict(steps=(0,)), dict(R=0), dict(method="seigh")], ids=str)
def test_draws_labelled_axes(plot, kw):
    ax = plot(made_up(**kw))
    assert ax.get_xlabel() and ax.get_ylabel() and ax.get_title() and ax.get_legend()
    ax.figure.savefig(io.BytesIO(), format="png"); ax.figure.savefig(io.BytesIO(), format="pdf")


@pytest.mark.parametrize("plot", PLOTS)
def test_draws_into_given_axes(plot):
    ax = Figure().subplots(); before = plt.get_fignums()
    assert plot(made_up(), ax=ax) is ax and plt.get_fignums() == before and len(ax.lines)


def test_shows_the_numbers_of_the_record():
    r = made_up(); lines = {l.get_label(): l.get_ydata() for l in plot_overlap_over_training(r, k=7).lines}
    assert (lines["train Hessian"] == r.magnitude[:, 0, 6]).all() and (lines["test Hessian"] == r.magnitude[:, 1, 6]).all()
    assert len(plot_overlap_over_training(r, split="train").lines) == 2
    lines = {l.get_label(): l.get_ydata() for l in plot_overlap_curve(r, 50, "train").lines}
    assert (lines["magnitude mask"] == r.magnitude[1, 0]).all() and (lines["best mask"] == r.best[1, 0]).all() and (lines["chance k/n"] == r.chance).all()
    assert (lines["4 random masks"] == r.random[1, 0].mean(0)).all()
    ax = plot_spectrum(r, 50, "train", k=9); lam = r.eigvals[1, 0]; pos, neg, cut = ax.lines
    assert (pos.get_ydata() == lam[lam > 0]).all() and (neg.get_ydata() == -lam[lam < 0]).all() and cut.get_ydata()[0] == abs(lam[8]) and ax.get_yscale() == "log"
    assert pos.get_label() == f"positive: {(lam[:9] > 0).sum()} of the top 9"
    assert pos.get_marker() != neg.get_marker() and pos.get_fillstyle() != neg.get_fillstyle()


@pytest.mark.parametrize("bad, says", [(lambda r: plot_overlap_over_training(r, k=61), "mask sizes 1 to 60"), (lambda r: plot_overlap_over_training(r, k=0), "k = 0"),
    (lambda r: plot_overlap_over_training(r, split="x"), "split 'x'"), (lambda r: plot_overlap_curve(r, step=3), "step 3"), (lambda r: plot_spectrum(r, split="x"), "split 'x'"),
    (lambda r: plot_spectrum(r, k=99), "k = 99")])
def test_refuses_what_is_not_there(bad, says):
    with pytest.raises(ValueError, match=says): bad(made_up())
    assert not plt.get_fignums()   # and leaves no empty figure behind


def test_a_spectrum_of_zeros():
    r = made_up(); ax = plot_spectrum(replace(r, eigvals=0*r.eigvals)); ax.figure.savefig(io.BytesIO()); assert "positive: 0 of" in ax.get_legend().get_texts()[0].get_text()


def grey(c): return float(np.dot(to_rgb(c), (.299, .587, .114)))


def test_curves_of_one_plot_differ_without_colour():
    for names in (("magnitude", "best", "random"), ("train", "test"), ("positive", "negative")):
        shapes = [(LOOKS[o].get("ls"), LOOKS[o].get("marker"), LOOKS[o].get("fillstyle")) for o in names]
        assert len(set(shapes)) == len(names)
    assert len({round(grey(LOOKS[o]["color"]), 1) for o in ("magnitude", "random", "best")}) >= 2


@pytest.mark.parametrize("plot", PLOTS)
@pytest.mark.parametrize("style", ["default", "dark_background", "ggplot"])
def test_solid_background_and_readable_text(plot, style):
    with plt.style.context(style), plt.rc_context({"figure.facecolor": "none", "axes.facecolor": "none"}):
        ax = plot(made_up()); back = ax.figure.get_facecolor()
        assert back[3] == 1 and to_rgba(ax.get_facecolor())[3] == 1
        for text in (ax.xaxis.label, ax.title, ax.get_legend().get_texts()[0]): assert abs(grey(text.get_color()) - grey(back[:3])) > .4
    assert plot(made_up()).figure.get_facecolor() == (1, 1, 1, 1)


def test_rcparams_are_respected_and_left_alone():
    before = dict(matplotlib.rcParams)
    with plt.rc_context({"figure.figsize": (3, 2), "axes.labelsize": 5}):
        ax = plot_overlap_curve(made_up()); assert tuple(ax.figure.get_size_inches()) == (3, 2) and ax.xaxis.label.get_size() == 5
    assert dict(matplotlib.rcParams) == before
