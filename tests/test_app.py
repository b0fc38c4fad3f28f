"`hessian-overlap explore RUN`: one sentence for what is wrong, and in a browser the explorer without code."
import importlib.util, re, time, urllib.request
import pytest
from conftest import missing
from hessian_overlap import app
from hessian_overlap.experiment import main
from made import made_up


@pytest.fixture(scope="module")
def run(tmp_path_factory): return made_up(k=40, steps=(0, 50, 100, 200), tables=True).save(tmp_path_factory.mktemp("app")/"my run")


def test_voila_is_not_there(run, monkeypatch, capfd):
    monkeypatch.setattr(app, "find_spec", lambda name: None); assert main(["explore", str(run)]) == 2
    err = capfd.readouterr().err; assert "the app needs Voila, which is not installed: `pip install voila`" in err and err.count("\n") == 1


@pytest.mark.parametrize("args, says", [(["nowhere"], "record.json is not there"), ([], "the following arguments are required: run")])
def test_asked_for_wrongly(args, says, capfd):
    assert main(["explore", *args]) == 2; err = capfd.readouterr().err; assert says in err and err.count("\n") == 1


def test_a_port_that_is_taken(run, monkeypatch, capfd):
    import socket
    monkeypatch.setattr(app, "find_spec", lambda name: True)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0)); s.listen(); port = s.getsockname()[1]; assert main(["explore", str(run), "--port", str(port)]) == 2
    assert f"port {port} cannot be used" in capfd.readouterr().err


def test_the_notebook_is_a_notebook(run, tmp_path):
    nbformat = pytest.importorskip("nbformat"); nb = app.app_notebook(run); nbformat.validate(nbformat.from_dict(nb)); assert len(nb["cells"]) == 2
    space = {}; exec(nb["cells"][1]["source"], space)


def test_in_the_browser(run, need_browser, artefacts, capsys):
    "Slider, dropdown, tick, export, and an input that fails: its message is in the page and no traceback in the log"
    if importlib.util.find_spec("voila") is None: missing("Voila is not installed")
    from browser import open_browser
    log = artefacts/"voila.log"
    with open(log, "w") as f, app.serving(run, log=f) as (url, voila), open_browser() as browser:
        for _ in range(240):
            try: urllib.request.urlopen(url.rstrip("/") + "/voila/static/none", timeout=2); break
            except urllib.error.HTTPError: break
            except OSError: time.sleep(.25)
        assert voila.poll() is None, log.read_text()
        page = browser.new_page(viewport=dict(width=1400, height=1100), accept_downloads=True); page.set_default_timeout(60_000)
        console, outside = [], []
        page.on("console", lambda m: console.append(m.text) if m.type == "error" else None)
        page.on("request", lambda r: outside.append(r.url) if "127.0.0.1" not in r.url and not r.url.startswith(("data:", "blob:")) and "fontawesome" not in r.url else None)   # the icons of Voila's own page
        page.goto(url, wait_until="domcontentloaded"); page.wait_for_function("document.querySelector('.jupyter-widgets img')?.src", timeout=120_000)
        control = lambda label, inside: page.locator(f'.widget-inline-hbox:has(> .widget-label:text-is("{label}")) {inside}').first
        shown = lambda: page.evaluate("[document.querySelector('.jupyter-widgets img').src, [...document.querySelectorAll('[role=status]')].map(e => e.innerText).join(' ')]")
        def act(move):
            was, t = shown(), time.time(); move()
            page.wait_for_function("([src, text]) => { const i = document.querySelector('.jupyter-widgets img'); const s = [...document.querySelectorAll('[role=status]')]"
                                   ".map(e => e.innerText).join(' '); return i.src != src && s != text }", arg=was)
            return time.time() - t
        handle = control("mask size k", ".noUi-handle"); handle.focus(); times = [act(lambda: page.keyboard.press("ArrowLeft")) for _ in range(5)]
        assert "top 35 of 1000" in shown()[1]
        act(lambda: control("mask", "select").select_option(label="layerwise")); assert "layerwise mask" in shown()[1]
        act(lambda: page.get_by_label("size = rank").uncheck()); control("rank r", ".noUi-handle").focus(); act(lambda: page.keyboard.press("ArrowLeft")); assert "top 36 directions" in shown()[1]
        with page.expect_download() as got: page.get_by_role("button", name="CSV").click(); page.locator("a[download]").click()
        assert got.value.suggested_filename.endswith("_layerwise.csv") and open(got.value.path()).readline() == "panel,series,x,y\n"
        page.get_by_role("button", name="Code").click(); page.get_by_text("plot_overlap_table(r, 'layerwise'").wait_for()
        before = shown(); box = control("open a run", "input"); box.fill("/nowhere/at/all"); box.press("Enter"); page.get_by_role("alert").filter(has_text="record.json is not there").wait_for(); assert shown() == before
        page.screenshot(path=artefacts/"voila.png", full_page=True); assert not page.locator("text=explore_overlap(").count(), "the code shows"
    with capsys.disabled(): print(f"\nexplorer as an app, ms from key to figure: {[round(1000*t) for t in times]}")
    assert "Traceback" not in log.read_text() and not outside, (outside, console)
