"""A headless Chromium for the tests, and the flags that keep it from fetching anything by itself.

python tools/browser.py        prints the browser that the tests will use; exit code 1 if there is none
"""

import os
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path

NAMES = ('chromium', 'chromium-browser', 'google-chrome', 'google-chrome-stable')
FLAGS = [
    '--no-sandbox',
    '--disable-gpu',
    '--disable-quic',
    '--no-first-run',
    '--disable-background-networking',
    '--disable-component-update',
    '--disable-sync',
    '--hide-scrollbars',
]


def find_browser():
    "Path of a Chromium: $CHROMIUM, one on the PATH, or Playwright's own; None if there is none"
    for name in filter(None, (os.environ.get('CHROMIUM'), *NAMES)):
        if path := shutil.which(name):
            return path
    try:
        from playwright.sync_api import sync_playwright

        with sync_playwright() as pw:
            path = pw.chromium.executable_path
    except Exception:
        return None
    return path if Path(path).exists() else None


@contextmanager
def open_browser():
    "A running headless Chromium (Playwright's Browser object)"
    from playwright.sync_api import sync_playwright

    path = find_browser()
    if path is None:
        raise RuntimeError('no Chromium found: install chromium, or name one in the environment variable CHROMIUM')
    with sync_playwright() as pw:
        browser = pw.chromium.launch(executable_path=path, headless=True, args=FLAGS)
        try:
            yield browser
        finally:
            browser.close()


if __name__ == '__main__':
    found = find_browser()
    print(found or 'no Chromium found', file=sys.stdout if found else sys.stderr)
    sys.exit(found is None)
