"""Drive a notebook in a real JupyterLab with headless Chromium, as a reader's hand would.

    python tools/lab_driver.py [nbs/51_explore.ipynb]        drives the explorer and prints how fast it answers

JupyterLab runs on a copy of the project, on the loopback interface, so that nothing in the tree changes. Cells that
`nbdev_test` skips (`#| eval: false`, and the flags of settings.ini) are left out of the run.
"""

import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LEAVE = (
    '.git',
    '.venv',
    '_proc',
    '_docs',
    '_site_src',
    '_vendor',
    'runs',
    'artefacts',
    'build',
    'dist',
    '*.egg-info',
    '__pycache__',
    '.pytest_cache',
)
SETTINGS = {
    'notebook-extension/tracker': {'windowingMode': 'none'},  # else cells out of view are not in the page
    'apputils-extension/notification': {'fetchNews': 'false', 'checkForUpdates': False},
}
IDLE = '.jp-Notebook-ExecutionIndicator[data-status=idle]'


def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]


def without_skipped(nb):
    "In the notebook file `nb`, turn the cells that nbdev skips into raw cells"
    from exec_nbs import is_skipped
    from execnb.nbio import read_nb
    from nbdev.config import get_config

    flags = set(get_config().tst_flags.split())
    skipped = [c.cell_type == 'code' and is_skipped(c, flags) for c in read_nb(nb).cells]
    d = json.loads(nb.read_text(encoding='utf-8'))
    for c, skip in zip(d['cells'], skipped):
        if skip:
            c['cell_type'] = 'raw'
            c.pop('outputs', None)
            c.pop('execution_count', None)
        elif c['cell_type'] == 'code':
            c['outputs'] = []  # what the page shows comes from this run
    d['metadata'].pop('widgets', None)
    nb.write_text(json.dumps(d), encoding='utf-8')


@contextmanager
def running_lab(nb, log, root=ROOT):
    "JupyterLab on a copy of the project -> the address of the notebook `nb` (relative to the root) in it"
    with tempfile.TemporaryDirectory() as tmp:
        work, conf = Path(tmp) / 'p', Path(tmp) / 'conf'
        shutil.copytree(root, work, symlinks=True, ignore=shutil.ignore_patterns(*LEAVE))
        without_skipped(work / nb)
        for name, value in SETTINGS.items():
            f = conf / '@jupyterlab' / f'{name}.jupyterlab-settings'
            f.parent.mkdir(parents=True, exist_ok=True)
            f.write_text(json.dumps(value))
        env = {k: v for k, v in os.environ.items() if k != 'MPLBACKEND'}
        env |= dict(
            OMP_NUM_THREADS='1',
            JUPYTER_CONFIG_DIR=str(conf),
            JUPYTERLAB_SETTINGS_DIR=str(conf),
            JUPYTERLAB_WORKSPACES_DIR=str(conf),
        )
        port, token = free_port(), secrets.token_hex(8)
        lab = subprocess.Popen(
            [
                sys.executable,
                '-m',
                'jupyterlab',
                '--no-browser',
                '--allow-root',
                '--ip=127.0.0.1',
                f'--port={port}',
                '--ServerApp.port_retries=0',
                f'--IdentityProvider.token={token}',
                f'--ServerApp.root_dir={work}',
                '--LabApp.news_url=',
                '--LabApp.check_for_updates_class=jupyterlab.NeverCheckForUpdate',
            ],
            cwd=work,
            stdout=log,
            stderr=log,
            env=env,
        )
        try:
            for _ in range(240):
                if lab.poll() is not None:
                    raise RuntimeError(f'JupyterLab ended at once; see {log.name}')
                try:
                    urllib.request.urlopen(f'http://127.0.0.1:{port}/api?token={token}', timeout=2)
                    break
                except OSError:
                    time.sleep(0.5)
            else:
                raise RuntimeError(f'JupyterLab did not start in 2 minutes; see {log.name}')
            yield f'http://127.0.0.1:{port}/lab/tree/{nb}?token={token}&reset'
        finally:
            lab.terminate()
            try:
                lab.wait(20)
            except subprocess.TimeoutExpired:
                lab.kill()
                lab.wait()


class LabPage:
    "A notebook open in JupyterLab: run it, move its controls by their labels, see what its widgets show"

    number = 0  # which explorer of the page

    def __init__(self, page, url):
        self.page = page
        page.set_default_timeout(60_000)
        page.goto(url, wait_until='domcontentloaded')
        page.wait_for_selector('.jp-Notebook .jp-Cell', timeout=120_000)
        page.wait_for_selector(IDLE, timeout=120_000)

    def run_all(self, timeout=180):
        for attempt in range(3):  # a click that comes before the kernel is ready is lost
            self.page.locator('.jp-Notebook .jp-Cell').first.click()
            self.page.keyboard.press('Escape')
            self.page.get_by_role('menuitem', name='Run', exact=True).click()
            self.page.locator('.lm-Menu-item[data-command="runmenu:run-all"]').click()
            try:
                self.page.wait_for_function(
                    "[...document.querySelectorAll('.jp-InputPrompt')].some(e => /\\[[*\\d]+\\]/.test(e.innerText))",
                    timeout=20_000,
                )
                break
            except Exception:
                if attempt == 2:
                    raise
        self.page.wait_for_function(
            "![...document.querySelectorAll('.jp-InputPrompt')].some(e => e.innerText.includes('[*]'))",
            timeout=timeout * 1000,
        )
        self.page.wait_for_selector(IDLE, timeout=timeout * 1000)

    def errors(self):
        "Whatever the cells wrote to stderr, errors, and widgets that the browser could not draw"
        kinds = (
            '[data-mime-type="application/vnd.jupyter.stderr"]',
            '[data-mime-type="application/vnd.jupyter.error"]',
            '.jupyter-widgets-error-widget',
        )
        for e in self.page.locator('.jupyter-widgets-error-widget', has_text='Click to show').all():
            e.click()
        said = self.page.locator(', '.join(kinds)).evaluate_all('all => all.map(e => e.textContent.trim())')
        return [s for s in said if s]

    @property
    def box(self):
        return self.page.locator('.jp-OutputArea-output:has(.jupyter-widgets img)').nth(self.number)

    def shown(self):
        "What the explorer shows: its figure and its words"
        return self.page.evaluate(
            """n => {
            const outputs = [...document.querySelectorAll('.jp-OutputArea-output')];
            const box = outputs.filter(e => e.querySelector('.jupyter-widgets img'))[n];
            if (!box) return {figure: null, text: ''};
            const words = [...box.querySelectorAll('.widget-html-content, .jupyter-widget-html-content')];
            const text = words.map(e => e.innerText).join(' ');
            return {figure: box.querySelector('.jupyter-widgets img').src, text} }""",
            self.number,
        )

    def settle(self, seconds=1.0):
        "Wait until what is shown has stayed the same for a while"
        last, since = self.shown(), time.time()
        while time.time() - since < seconds:
            self.page.wait_for_timeout(50)
            if (now := self.shown()) != last:
                last, since = now, time.time()
        return last

    def act(self, move, timeout=30):
        "Do `move` and wait until figure and words have both changed -> seconds"
        was, start = self.settle(0.3), time.time()
        move()
        while time.time() - start < timeout:
            now = self.shown()
            if now['figure'] and now['figure'] != was['figure'] and now['text'] != was['text']:
                return time.time() - start
            self.page.wait_for_timeout(10)
        raise AssertionError(f'figure or words did not follow within {timeout} s: {now["text"]!r}')

    def control(self, label, inside):
        return self.box.locator(f'.widget-inline-hbox:has(> .widget-label:text-is("{label}")) {inside}').first

    def slide(self, label, key, times=1):
        "Press a key on the slider with this label -> seconds of each step"
        handle = self.control(label, '.noUi-handle')
        handle.scroll_into_view_if_needed()
        handle.focus()
        return [self.act(lambda: self.page.keyboard.press(key)) for _ in range(times)]

    def fill(self, label, text):
        "Type into the field with this label and press Enter"
        box = self.control(label, 'input')
        box.fill(text)
        box.press('Enter')

    def press(self, name):
        "Click the button of this name"
        self.box.get_by_role('button', name=name, exact=True).and_(self.page.locator('.jupyter-button')).first.click()

    def download(self):
        "Click the link to a file that an explorer offers -> (its name, its bytes)"
        with self.page.expect_download() as got:
            self.box.locator('a[download]').first.click()
        return got.value.suggested_filename, Path(got.value.path()).read_bytes()

    def choose(self, label, value):
        "Choose an entry of the dropdown with this label -> seconds"
        return self.act(lambda: self.control(label, 'select').select_option(label=value))

    def said(self, role, text):
        "Wait until the explorer says this, as an alert or a status"
        self.box.get_by_role(role).filter(has_text=text).first.wait_for()


class AppPage(LabPage):
    "The same of a page that Voila serves; `.outside` are the addresses beyond this machine that it asked for"

    def __init__(self, page, url):
        self.page, self.outside, self.wrong = page, [], []
        page.set_default_timeout(60_000)
        page.on(
            'request',
            lambda r: (
                self.outside.append(r.url)
                if not r.url.startswith((url, url.replace('http', 'ws', 1), 'data:', 'blob:'))
                else None
            ),
        )
        page.on('requestfailed', lambda r: self.wrong.append(f'no answer for {r.url}'))
        page.on('pageerror', lambda e: self.wrong.append(str(e)))
        page.on('response', lambda r: self.wrong.append(f'{r.status} for {r.url}') if r.status >= 400 else None)
        page.goto(url, wait_until='domcontentloaded')
        page.wait_for_function("document.querySelector('.jupyter-widgets img')?.src", timeout=120_000)


@contextmanager
def open_notebook(nb, artefacts, root=ROOT):
    "The notebook `nb` in a running JupyterLab; a screenshot stays in the folder `artefacts` if something fails"
    from browser import open_browser

    artefacts.mkdir(exist_ok=True)
    with open(artefacts / 'lab.log', 'w') as log, running_lab(nb, log, root) as url, open_browser() as browser:
        page = browser.new_page(viewport=dict(width=1400, height=1000))
        try:
            yield LabPage(page, url)
        except Exception:
            page.screenshot(path=artefacts / 'lab-failed.png')
            raise


@contextmanager
def open_app(serving, name, artefacts):
    "The page of an app: `serving(log)` gives a context of (address, process); its log and picture stay in `artefacts`"
    from browser import open_browser

    with open(artefacts / f'{name}.log', 'w') as log, serving(log) as (url, process), open_browser() as browser:
        for _ in range(240):
            if process.poll() is not None:
                raise RuntimeError(f'the app ended at once; see {log.name}')
            try:
                urllib.request.urlopen(url.rstrip('/') + '/voila/static/none', timeout=2)
                break
            except urllib.error.HTTPError:
                break
            except OSError:
                time.sleep(0.25)
        page = browser.new_page(viewport=dict(width=1400, height=1100), accept_downloads=True)
        try:
            yield AppPage(page, url)
        finally:
            page.screenshot(path=artefacts / f'{name}.png', full_page=True)


def main():
    nb, artefacts = (sys.argv + ['nbs/51_explore.ipynb'])[1], ROOT / 'artefacts'
    with open_notebook(nb, artefacts) as lab:
        lab.run_all()
        if lab.errors():
            raise RuntimeError('\n'.join(lab.errors()))
        print(lab.settle()['text'])
        ms = [round(1000 * s) for s in lab.slide('mask size k', 'ArrowLeft', 8)]
        print(lab.settle()['text'])
        print('ms a step:', ms)
        print('errors:', lab.errors() or 'none')
        lab.page.screenshot(path=artefacts / 'lab.png')


if __name__ == '__main__':
    main()
