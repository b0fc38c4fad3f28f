"The explorer says what the record holds, changes its figure with every control, and is quick."
import io, json
import matplotlib; matplotlib.use("agg")
import ipywidgets as W, matplotlib.pyplot as plt, numpy as np, pytest
from PIL import Image
from hessian_overlap.explore import OverlapExplorer, explore_overlap
from hessian_overlap.record import OverlapRecord, RecordError
from made import made_up


@pytest.fixture(scope="module")
def r(): return made_up(k=350, n=7030, R=10, steps=(0, 50, 100, 1000))


def pixels(e): return np.asarray(Image.open(io.BytesIO(e.image.value)).convert("RGB"))


def test_label_follows_every_control(r):
    e = explore_overlap(r)
    for mask in ("magnitude", "best", "random"):
        for step in (0, 100):
            for split in r.splits:
                for k in (1, 50, 350):
                    e.mask.value, e.step.value, e.split.value, e.k.value = mask, step, split, k
                    v, c = r.curve(mask, step, split)[k - 1], k/r.n
                    for s in (f"overlap {v:.4f}", f"chance level {c:.4f}", f"ratio {v/c:.2f}", split, f"step {step}", f"top {k} of {r.n}"): assert s in e.label.value


def test_each_control_changes_the_figure(r):
    e = explore_overlap(r)
    for name, value in [("k", 20), ("step", 50), ("split", "train"), ("mask", "best")]:
        before = e.image.value; getattr(e, name).value = value
        assert e.image.value != before and e.image.value[:4] == b"\x89PNG", name


def test_the_figure_depends_on_the_controls_alone(r):
    a, b = explore_overlap(r), explore_overlap(r)
    for mask, k, step in [("best", 3, 0), ("random", 200, 50), ("magnitude", 350, 1000)]: a.mask.value, a.k.value, a.step.value = mask, k, step
    assert (pixels(a) == pixels(b)).all()


def test_one_figure_and_no_pyplot(r):
    before = plt.get_fignums(); e = explore_overlap(r); fig, artists = e.fig, [id(o) for ax in e.fig.axes for o in ax.get_children()]
    e.k.value = 9; e.mask.value = "random"
    assert plt.get_fignums() == before and e.fig is fig and artists == [id(o) for ax in e.fig.axes for o in ax.get_children()]


def test_shows_itself(r):
    e = explore_overlap(r); b = e._repr_mimebundle_()
    data = b[0] if isinstance(b, tuple) else b
    assert data["application/vnd.jupyter.widget-view+json"]["model_id"] == e.box.model_id and "OverlapExplorer(made_up, k=350" in data["text/plain"]
    state = json.dumps(W.Widget.get_manager_state(drop_defaults=True)["state"][e.label.model_id])
    assert "chance level" in state   # what a static page will show


def test_controls_are_described(r):
    e = explore_overlap(r)
    for c in (e.k, e.step, e.split, e.mask): assert c.description and len(c.tooltip) > 20
    assert "role=\"status\"" in e.label.value and (e.k.min, e.k.max) == (1, r.k)
    assert e.image.tooltip is None   # with one, JupyterLab cannot make the view: ipywidgets 8.1 asks an Image for its description
    assert list(e.step.options) == r.steps.tolist() and list(e.split.options) == list(r.splits)


def test_white_whatever_the_style(r):
    want = pixels(explore_overlap(r))
    with plt.style.context("dark_background"): e = explore_overlap(r); e.k.value = 5; e.k.value = r.k
    assert (pixels(e) == want).all() and (want[0, 0] == 255).all()


def test_small_and_odd_records():
    for kw in (dict(k=1), dict(steps=(0,)), dict(R=0), dict(splits=("test",)), dict(method="seigh")):
        e = explore_overlap(made_up(**kw)); assert ("random" in e.mask.options) == (kw.get("R") != 0)
        assert ("approximate" in e.label.value) == (kw.get("method") == "seigh")


def test_folders(r, tmp_path):
    assert isinstance(explore_overlap(r.save(tmp_path/"run")), OverlapExplorer) and isinstance(explore_overlap(str(tmp_path/"run")), OverlapExplorer)
    with pytest.raises(RecordError, match="no record in"): explore_overlap(tmp_path)
    (tmp_path/"run"/"record.npz").write_bytes(b"")
    with pytest.raises(RecordError, match="damaged"): explore_overlap(tmp_path/"run")
    with pytest.raises(TypeError, match="got dict"): explore_overlap({})
