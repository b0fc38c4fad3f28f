"The site builds without a fault; a real browser shows every page in light and in dark, and nothing from the network."

import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from shutil import which

import pytest
from conftest import missing


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope='module')
def site(root, once):
    "The site, built and checked as `make docs` does -> (its folder, exit code, what was said)"
    if not which('npm') and not (root / '_vendor/katex').exists():
        missing('npm is not installed, which fetches the scripts of the site')
    if sys.version_info < (3, 11) and not which('quarto'):
        missing('neither Quarto nor Python 3.11, which smalldocs needs')

    def make(folder):
        r = subprocess.run(
            [sys.executable, root / 'tools/build_docs.py', '--check', '--out', folder / 'docs'],
            cwd=root,
            capture_output=True,
            text=True,
        )
        return r.returncode, r.stdout + r.stderr

    folder, (code, said) = once('site', make)
    return folder / 'docs', code, said


def test_site_has_no_fault(site):
    _, code, said = site
    assert code == 0, said


def test_printed_sentences_wrap_and_tables_do_not(tmp_path):
    from build_docs import wrap_sentences

    sentence, row, lone = (
        'a sentence that is printed, longer than forty characters',
        'step   50   train   0.1234   and so on, as long as that',
        'array [0.1   0.2   0.3   0.4   0.5   0.6   0.7   0.8   0.9]',
    )
    rule, wide = '-' * 60, 'one name   300 matvecs, and so on, as long as a sentence'
    text = '\n'.join(['short', sentence, row, rule, row, sentence, lone, 'x &lt; y', wide, wide])
    page = f'<p>{sentence}</p><div class="cell-output cell-output-stdout">\n<pre><code>{text}</code></pre>\n</div>'
    (tmp_path / 'a.html').write_text(page)
    wrap_sentences(tmp_path)
    long = lambda s: f'<span class="long">{s}</span>'
    assert (tmp_path / 'a.html').read_text() == page.replace(
        text, '\n'.join(['short', long(sentence), row, rule, row, long(sentence), long(lone), 'x &lt; y', wide, wide])
    )


def test_figures_are_lighter_only_where_no_eye_sees_it():
    import io

    import numpy as np
    from exec_nbs import lighter
    from PIL import Image

    def png(a):
        buf = io.BytesIO()
        Image.fromarray(a).save(buf, format='png')
        return buf.getvalue()

    rng = np.random.default_rng(0)
    flat = np.full((200, 300, 3), 255, np.uint8)
    flat[50:60] = 40, 80, 160
    flat[:, 100:140] = rng.integers(100, 160, (1, 40, 1))
    few = lighter(png(flat))
    assert len(few) < len(png(flat)) and (np.asarray(Image.open(io.BytesIO(few)).convert('RGB')) == flat).all()
    noise = png(rng.integers(0, 256, (200, 300, 3), dtype=np.uint8))
    assert lighter(noise) == noise  # far from 256 colours
    clear = png(np.dstack([flat, np.full(flat.shape[:2], 120, np.uint8)]))
    assert lighter(clear) == clear  # seen through


SEEN = """() => ({
    raw: [...document.querySelectorAll('span.math')].length, broken: document.querySelectorAll('.katex-error').length,
    widgets: [...document.querySelectorAll('.jupyter-widgets-error-widget')].map(e => e.textContent.trim()),
    blind: [...document.images].filter(i => i.complete && !i.naturalWidth).length,
    wide: document.documentElement.scrollWidth - innerWidth })"""
COLOURS = """() => [document.body, document.querySelector('main') || document.body].map((e, i) => {
    const rgb = getComputedStyle(e)[i ? 'color' : 'backgroundColor'].match(/[0-9.]+/g).slice(0, 3);
    return rgb.reduce((a, c) => a + Number(c)/3, 0) })"""
READABLE = f'light => {{ const [back, ink] = ({COLOURS})(); return light ? back - ink > 100 : ink - back > 100 }}'


def faults_of(page):
    "What a reader would see as broken"
    seen = page.evaluate(SEEN)
    if seen['raw'] or seen['broken']:
        yield f'{seen["raw"] + seen["broken"]} formulas are not rendered'
    for said in seen['widgets']:
        yield f'a widget cannot be drawn: {said}'
    if seen['blind']:
        yield f'{seen["blind"]} images do not show'
    if seen['wide'] > 0:
        yield f'{seen["wide"]} px wider than the window'
    page.set_viewport_size(dict(width=390, height=800))
    wide = page.evaluate('document.documentElement.scrollWidth - innerWidth')
    if wide > 0:
        yield f'{wide} px wider than a telephone'
    page.set_viewport_size(dict(width=1280, height=900))


def test_pages_in_a_browser(site, need_browser, artefacts):
    "Each page is loaded once, and looked at in light and in dark"
    from browser import open_browser
    from playwright.sync_api import TimeoutError

    out, _, said = site
    assert (out / 'index.html').exists(), said
    server = ThreadingHTTPServer(('127.0.0.1', 0), partial(Quiet, directory=str(out)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    home = f'http://127.0.0.1:{server.server_address[1]}/'
    shots = artefacts / 'site'
    shots.mkdir(parents=True, exist_ok=True)
    faults = []
    with open_browser() as browser:
        page = browser.new_page(viewport=dict(width=1280, height=900))
        page.on(
            'request',
            lambda q: q.url.startswith((home, 'data:', 'blob:')) or faults.append(f'{page.url}: asks for {q.url}'),
        )
        page.on('requestfailed', lambda q: faults.append(f'{page.url}: no answer for {q.url}'))
        page.on('response', lambda a: a.status >= 400 and faults.append(f'{page.url}: {a.status} for {a.url}'))
        page.on('pageerror', lambda e: faults.append(f'{page.url}: {e}'))
        for f in sorted(out.rglob('*.html')):
            name = f.relative_to(out).as_posix()
            page.emulate_media(color_scheme='light')
            page.goto(home + name, wait_until='load')
            if page.locator('.ipywidget').count():
                page.wait_for_selector('.ipywidget .jupyter-widgets', timeout=20_000)
            faults += [f'{name}: {fault}' for fault in faults_of(page)]
            for scheme in ('light', 'dark'):
                page.emulate_media(color_scheme=scheme)
                try:
                    page.wait_for_function(
                        READABLE, arg=scheme == 'light', timeout=5000
                    )  # a script of the page follows
                except TimeoutError:
                    faults.append(f'{name}: brightness of page and ink {page.evaluate(COLOURS)} in the {scheme} scheme')
                stem = name.replace('/', '-').removesuffix('.html')
                page.screenshot(path=shots / f'{stem}-{scheme}.png', full_page=True)
    server.shutdown()
    assert not faults, '\n'.join(faults)
