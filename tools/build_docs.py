"""Build the documentation site from the notebooks, and check it.

    python tools/build_docs.py [--check] [--out _docs] [--engine quarto|smalldocs]

One configuration (_quarto.yml, nbs/sidebar.yml, nbs/styles.css) serves two engines: Quarto through `nbdev_docs` where
it is installed, smalldocs (pure Python) elsewhere. smalldocs renders what nbdev would hand to Quarto, with its known
gaps mended: pages named as nbdev's links expect, links relative, widgets shown, nothing fetched from the network. Maths
is rendered at build time by KaTeX, so that a formula that KaTeX cannot read stops the build. KaTeX and the widget
manager come through `npm pack`.

--check fails on: broken links and anchors, anything loaded from the network, maths left as TeX, a page that the
navigation lacks, a public name that no page links, a page above 2 MB, an image without alternative text.
"""

import argparse
import base64
import hashlib
import html
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

VIEW, STATE = 'application/vnd.jupyter.widget-view+json', 'application/vnd.jupyter.widget-state+json'
VENDOR = {  # npm package -> (folder on the site, what to take, sha512 of the tarball)
    'katex@0.16.11': (
        'katex',
        'package/dist',
        'RQrI8rlHY92OLf3rho/Ts8i/XvjgguEjOkO1BEXcU3N8BqPpSzBNwV/G0Ukr+P/l3ivvJUE/Fa/CwbS6HesGNQ==',
    ),
    '@jupyter-widgets/html-manager@1.0.15': (
        'html-manager',
        'package/dist/embed.js',
        '5thBIV6ymNgmPVOHvzx+gGy8ZSKmSazhtGw4/c4xJDVzRhG9PTeQsRjF3FUTopvFi//SABeNz1yp47bCrJ3CQA==',
    ),
}
KATEX_CDN = re.compile(r'https://[^\s"\'<>]+/katex@[\d.]+/dist')
MAX_PAGE = 2_000_000


class DocsError(Exception):
    "The site cannot be built; the message says why"


# --------------------------------------------------------------------------------- vendored scripts


def fetch_vendor(folder):
    "KaTeX and the widget manager in `folder`, checksums verified; fetched once"
    for package, (name, what, sha512) in VENDOR.items():
        if (folder / name).exists():
            continue
        if not shutil.which('npm'):
            raise DocsError(f'npm is not installed: it is needed once, to fetch {package} for the site')
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as tmp:
            r = subprocess.run(['npm', 'pack', '--silent', package], cwd=tmp, capture_output=True, text=True)
            if r.returncode:
                raise DocsError(f'npm pack {package} failed:\n{r.stderr}')
            tgz = next(Path(tmp).glob('*.tgz'))
            got = base64.b64encode(hashlib.sha512(tgz.read_bytes()).digest()).decode()
            if got != sha512:
                raise DocsError(f'{package}: the tarball has sha512 {got}, expected {sha512}')
            shutil.unpack_archive(tgz, tmp, filter='data') if sys.version_info >= (3, 12) else shutil.unpack_archive(
                tgz, tmp
            )
            part = Path(tmp) / 'part'
            part.mkdir()
            src = Path(tmp) / what
            shutil.copytree(
                src, part, dirs_exist_ok=True, ignore=shutil.ignore_patterns('*.ttf', '*.woff', '*.md')
            ) if src.is_dir() else shutil.copy(src, part)
            part.rename(folder / name)


RENDER_JS = """
const katex = require(process.argv[1]), out = [];
for (const [tex, display] of JSON.parse(require('fs').readFileSync(0, 'utf8'))) {
  try { out.push([true, katex.renderToString(tex, {displayMode: display, throwOnError: true, strict: 'ignore'})]) }
  catch (e) { out.push([false, String(e.message)]) }
}
process.stdout.write(JSON.stringify(out));
"""
MATH = re.compile(r'<span class="math (inline|display)">(.*?)</span>', re.S)
KATEX_SCRIPT = re.compile(
    r'<script[^>]*katex@[^>]*>\s*</script>|<script>(?:(?!</script>).)*katex\.render(?:(?!</script>).)*</script>', re.S
)


def render_maths(site, vendor):
    "Replace the TeX on every page by what KaTeX makes of it; DocsError names the formulas that it cannot read"
    pages = {p: p.read_text(encoding='utf-8') for p in site.rglob('*.html')}
    found = [(p, m) for p, text in pages.items() for m in MATH.finditer(text)]
    tex = []
    for _, m in found:
        t = html.unescape(m[2]).strip()
        if t[:2] in (r'\(', r'\['):
            t = t[2:-2]
        tex.append((t, m[1] == 'display'))
    if tex:
        r = subprocess.run(
            ['node', '-e', RENDER_JS, str(vendor / 'katex' / 'katex.min.js')],
            input=json.dumps(tex),
            capture_output=True,
            text=True,
        )
        if r.returncode:
            raise DocsError('node could not run KaTeX:\n' + r.stderr)
        done = json.loads(r.stdout)
        bad = [f'{p.name}: {said}\n    {t}' for (p, _), (t, _), (ok, said) in zip(found, tex, done) if not ok]
        if bad:
            raise DocsError('KaTeX cannot read:\n' + '\n'.join(bad))
        rendered = iter(done)
        for p in pages:
            pages[p] = MATH.sub(lambda m: f'<span class="tex {m[1]}">{next(rendered)[1]}</span>', pages[p])
    for p, text in pages.items():
        p.write_text(KATEX_SCRIPT.sub('', text), encoding='utf-8')


# ----------------------------------------------------------------------------------------- building


def process():
    "The notebooks as nbdev prepares them for Quarto, in _proc/ (show_doc run, links resolved, hidden cells gone)"
    os.environ.update(MPLBACKEND='agg', PYTHONWARNINGS='ignore', OMP_NUM_THREADS='1')
    from nbdev.config import get_config
    from nbdev.quarto import refresh_quarto_yml
    from nbdev.serve import proc_nbs

    refresh_quarto_yml()
    try:
        proc_nbs(force=True, n_workers=2)
    except Exception as e:
        cause = re.search(
            r'^(\w+(?:Error|Exception|Interrupt)?: .*)\n\n?The above exception', str(e.__cause__ or ''), re.M
        )
        raise DocsError(
            f'nbdev cannot prepare a page: {e}\n{cause[1] if cause else ""}\n'
            '(Of a page it runs exported cells, show_doc and every cell that imports, and no other: '
            'imports belong in cells of their own.)'
        ) from None
    return get_config().config_path / '_proc'


def web_name(name):
    "01_linop.ipynb -> linop.ipynb, the name that nbdev's links use"
    return re.sub(r'^\d+[a-zA-Z0-9]*_', '', name.lower())


def caption_as_alt(cell):
    "A figure with a caption but no alternative text gets the caption as such"
    s = ''.join(cell['source'])
    cap = re.search(r'^#\|\s*fig-cap:(.*)$', s, re.M)
    if cap and not re.search(r'^#\|\s*fig-alt:', s, re.M):
        cell['source'] = f'#| fig-alt:{cap[1]}\n' + s


def embed_widgets(nb, up):
    "Show the saved widgets of `nb` through the widget manager that the site ships"
    state = nb['metadata'].get('widgets', {}).get(STATE)
    shown = False
    for cell in nb['cells']:
        for o in cell.get('outputs', []):
            view = o.get('data', {}).get(VIEW)
            if view and state and view['model_id'] in state['state']:
                o['data']['text/html'] = (
                    f'<div class="ipywidget"><script type="{VIEW}">{json.dumps(view)}</script></div>'
                )
                shown = True
    if not shown:
        return
    js = json.dumps(state).replace('</', '<\\/')
    scripts = f'<script type="{STATE}">{js}</script><script src="{up}site_libs/html-manager/embed.js"></script>'
    nb['cells'].append(
        dict(
            cell_type='code',
            id='widgets',
            metadata={},
            execution_count=None,
            source='#| echo: false\n0',
            outputs=[dict(output_type='display_data', metadata={}, data={'text/html': scripts})],
        )
    )


def map_text(nb, change):
    "Put every Markdown cell, and every output that is Markdown or HTML, through `change`"
    for cell in nb['cells']:
        if cell['cell_type'] != 'code':
            cell['source'] = change(''.join(cell['source']))
        for o in cell.get('outputs', []):
            data = o.get('data', {})
            for kind in ('text/markdown', 'text/html'):
                if kind in data:
                    data[kind] = change(''.join(data[kind]))


def to_smalldocs(proc, src, site_url):
    "Copy `proc` to `src` as a smalldocs project"
    shutil.rmtree(src, ignore_errors=True)
    shutil.copytree(proc, src, ignore=shutil.ignore_patterns('_docs'))
    notebooks = sorted(src.rglob('*.ipynb'))
    names = {p.name: web_name(p.name) for p in notebooks}
    by_length = sorted(names.items(), key=lambda o: -len(o[0]))

    def rename(text, before=''):
        for old, new in by_length:
            text = re.sub(rf'{before}(?<![\w.-]){re.escape(old)}', new, text)
        return text

    for p in notebooks:
        up = '../' * (len(p.relative_to(src).parts) - 1)
        nb = json.loads(p.read_text(encoding='utf-8'))

        def local(text, up=up):
            text = re.sub(re.escape(site_url) + r'/(?=[\w./-]*\.html)', up, text)  # page links; links to sources stay
            return re.sub(r'\]\(((?:[\w.-]+/)*[\w.-]+\.ipynb)', lambda m: '](' + rename(m[1]), text)

        for cell in nb['cells']:
            if cell['cell_type'] == 'code':
                caption_as_alt(cell)
        map_text(nb, local)
        embed_widgets(nb, up)
        p.unlink()
        p.with_name(names[p.name]).write_text(json.dumps(nb), encoding='utf-8')
    for yml in src.glob('*.yml'):
        yml.write_text(rename(yml.read_text(encoding='utf-8')), encoding='utf-8')


def build_smalldocs(root, cfg):
    "Render with smalldocs -> (folder of the site, warnings)"
    if not shutil.which('smalldocs', path=str(Path(sys.executable).parent)):
        raise DocsError('neither Quarto nor smalldocs is installed (smalldocs needs Python 3.11 or newer)')
    src = root / '_site_src'
    to_smalldocs(process(), src, cfg.doc_host + cfg.doc_baseurl)
    r = subprocess.run([Path(sys.executable).with_name('smalldocs'), 'render', src], capture_output=True, text=True)
    said = (r.stdout + r.stderr).splitlines()
    if r.returncode:
        raise DocsError('smalldocs failed:\n' + '\n'.join(said))
    # --check finds broken links itself
    known = ('output-file is not read', 'html-math-method', 'format.html.grid', 'broken link')
    warnings = [l for l in said if l.startswith('warning') and not any(k in l for k in known)]
    return src / cfg.doc_path.name, warnings


def build_quarto(root, cfg):
    "Render with `nbdev_docs` -> (folder of the site, warnings)"
    r = subprocess.run([Path(sys.executable).with_name('nbdev_docs')], cwd=root, capture_output=True, text=True)
    if r.returncode:
        raise DocsError('nbdev_docs failed:\n' + r.stdout + r.stderr)
    return cfg.doc_path, []


PRINTED = re.compile(r'(<div class="cell-output cell-output-stdout">\s*<pre><code>)(.*?)(</code></pre>)', re.S)
COLUMNS = re.compile(r'\S {2,}\S|^ *[-=─]{9,}$')  # a gap in the line, or the rule below a head


def wrap_sentences(site):
    "Mark the long printed lines that may be wrapped: not those of a table, neighbours with columns spaces apart"

    def mark(m):
        lines = m[2].split('\n')
        rows = [False, *(bool(COLUMNS.search(line)) for line in lines), False]
        table = [rows[i] and (rows[i - 1] or rows[i + 1]) for i in range(1, len(rows) - 1)]
        long = lambda line, row: len(html.unescape(line)) > 40 and not row
        return (
            m[1]
            + '\n'.join(
                f'<span class="long">{line}</span>' if long(line, row) else line for line, row in zip(lines, table)
            )
            + m[3]
        )

    for p in site.rglob('*.html'):
        text = p.read_text(encoding='utf-8')
        p.write_text(PRINTED.sub(mark, text), encoding='utf-8')


def localise(site, vendor):
    "Nothing from the network: KaTeX and the widget manager from the site itself, no web fonts"
    libs = site / 'site_libs'
    libs.mkdir(exist_ok=True)
    for name, *_ in VENDOR.values():
        shutil.copytree(vendor / name, libs / name, dirs_exist_ok=True)
    for p in site.rglob('*.html'):
        up = '../' * (len(p.relative_to(site).parts) - 1)
        p.write_text(KATEX_CDN.sub(f'{up}site_libs/katex', p.read_text(encoding='utf-8')), encoding='utf-8')
    for p in libs.rglob('*.css'):  # the themes import web fonts; their fallback fonts do
        t = p.read_text(encoding='utf-8')
        p.write_text(re.sub(r'@import\s*(?:url\(\s*)?(["\']?)https?://[^"\')]*\1\s*\)?[^;]*;', '', t), encoding='utf-8')


def build(out, engine=None):
    "Build the site into the folder `out` -> warnings of the engine"
    from nbdev.config import get_config

    cfg = get_config()
    root = cfg.config_path
    engine = engine or ('quarto' if shutil.which('quarto') else 'smalldocs')
    vendor = root / '_vendor'
    fetch_vendor(vendor)
    site, warnings = (build_quarto if engine == 'quarto' else build_smalldocs)(root, cfg)
    render_maths(site, vendor)
    wrap_sentences(site)
    localise(site, vendor)
    if site.resolve() != out.resolve():
        shutil.rmtree(out, ignore_errors=True)
        shutil.move(site, out)
    shutil.rmtree(root / '_site_src', ignore_errors=True)
    print(f'{len(list(out.rglob("*.html")))} pages built by {engine} in {out}')
    return warnings


# ----------------------------------------------------------------------------------------- checking


class Page(HTMLParser):
    "What a page links, loads, names and says"

    def __init__(self, text):
        super().__init__()
        self.ids, self.links, self.loads, self.images, self.words, self.all_words, self.quiet = (
            set(),
            [],
            [],
            [],
            [],
            [],
            [],
        )
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        if a.get('id'):
            self.ids.add(a['id'])
        if tag == 'a' and a.get('href'):
            self.links.append(a['href'])
        if tag in ('script', 'img', 'iframe', 'source', 'video') and a.get('src'):
            self.loads.append(a['src'])
        if tag == 'link' and a.get('href') and a.get('rel') in ('stylesheet', 'icon', 'preload'):
            self.loads.append(a['href'])
        if tag == 'img':
            self.images.append((a.get('alt'), (a.get('src') or '')[:60]))
        if tag in ('script', 'style', 'code', 'pre', 'annotation', 'title'):
            self.quiet.append(tag)

    def handle_endtag(self, tag):
        if tag in self.quiet:
            del self.quiet[len(self.quiet) - 1 - self.quiet[::-1].index(tag) :]

    def handle_data(self, data):
        self.all_words.append(data)
        if not self.quiet:
            self.words.append(data)


RAW_TEX = re.compile(
    r'\$\$|\\[(\[]|\\(?:frac|sum|lVert|lambda|theta|mathrm|mathbb|top|in|le|ge|cdot|Lambda|Omega)\b|\$[^$\s][^$\n]{0,80}[\\^_][^$\n]{0,80}\$'
)


def is_elsewhere(url):
    return re.match(r'(https?:|mailto:|javascript:|//)', url) is not None


def faults_of_loads(p, page):
    "What the page at `p` loads from the network, or lacks"
    for u in page.loads:
        if re.match(r'(https?:)?//', u):
            yield f'loads {u} from the network'
        elif not u.startswith('data:') and not (p.parent / unquote(u.split('?')[0])).exists():
            yield f'missing {u}'


def faults_of_text(page):
    "Images that say nothing, links left as Markdown, formulas left as TeX"
    for alt, src in page.images:
        if not (alt or '').strip():
            yield f'an image without alternative text ({src}...): give its cell a `#| fig-alt:`'
    for raw in re.findall(r'\[`?[\w. ]+`?\]\([\w./-]+\.(?:ipynb|html)[^)]*\)', ''.join(page.all_words)):
        yield (
            f'an unrendered link {raw}: a public name in backticks links itself, '
            'and needs none in a comment on an argument'
        )
    text = ''.join(page.words)
    for m in RAW_TEX.finditer(text):
        yield f'maths left as TeX: ...{text[max(0, m.start() - 30) : m.end() + 30]!r}'


def target(site, p, path):
    "The file that a link on the page at `p` leads to"
    if not path:
        return p
    q = site / path.lstrip('/') if path.startswith('/') else (p.parent / path).resolve()
    return q / 'index.html' if q.is_dir() else q


def faults_of_links(site, p, pages):
    "Links of the page at `p` to no page, or to no place on it"
    for u in pages[p].links:
        if is_elsewhere(u):
            continue
        path, _, anchor = unquote(u).partition('#')
        q = target(site, p, path)
        if not q.exists():
            yield f'broken link {u}'
        elif anchor and q in pages and anchor not in pages[q].ids:
            yield f'no anchor {u}'


def check_pages(site):
    "Faults of the pages by themselves and of the links between them"
    pages = {p: Page(p.read_text(encoding='utf-8')) for p in site.rglob('*.html')}
    bad = []
    for p, page in pages.items():
        name, size = p.relative_to(site), p.stat().st_size
        if size > MAX_PAGE:
            bad.append(f'{name}: {size / 1e6:.1f} MB, above {MAX_PAGE / 1e6:.0f} MB')
        faults = [*faults_of_loads(p, page), *faults_of_text(page), *faults_of_links(site, p, pages)]
        bad += [f'{name}: {what}' for what in faults]
    for p in site.rglob('*.css'):
        for u in re.findall(r'url\(\s*["\']?((?:https?:)?//[^"\')]+)', p.read_text(encoding='utf-8')):
            bad.append(f'{p.relative_to(site)}: loads {u} from the network')
    return bad, pages


def check_navigation(cfg):
    "Notebooks that the sidebar lacks, and entries of the sidebar that no notebook answers"
    import yaml

    nbs = Path(cfg.nbs_path)

    def hrefs(o):
        if isinstance(o, str):
            yield o
        elif isinstance(o, list):
            for i in o:
                yield from hrefs(i)
        elif isinstance(o, dict):
            for k in ('href', 'contents'):
                yield from hrefs(o.get(k, []))

    listed = set(hrefs(yaml.safe_load((nbs / 'sidebar.yml').read_text(encoding='utf-8'))['website']['sidebar']))
    present = {
        p.relative_to(nbs).as_posix()
        for p in nbs.rglob('*.ipynb')
        if not any(s.startswith(('_', '.')) for s in p.relative_to(nbs).parts)
    }
    return [f'nbs/sidebar.yml: {o} is not in the navigation' for o in sorted(present - listed)] + [
        f'nbs/sidebar.yml: {o} does not exist' for o in sorted(listed - present)
    ]


def check_names(cfg, pages):
    "Public names of the package that no page links"
    import importlib

    sys.path.insert(0, str(cfg.config_path))
    package = importlib.import_module(cfg.lib_name)
    names = [n for n in getattr(package, '__all__', []) if not n.startswith('_')]
    linked = {u.partition('#')[2].lower() for page in pages.values() for u in page.links}  # anchors are lower case
    bad = [f'no page links the public name {n}' for n in names if n.lower() not in linked]
    return bad if names else [f'{cfg.lib_name} has no __all__: which names are public?']


def check(site):
    "Every fault of the site in the folder `site`, one line each"
    from nbdev.config import get_config

    cfg = get_config()
    bad, pages = check_pages(site.resolve())
    where = {}  # the same fault on many pages is one line
    for fault in bad:
        page, _, what = fault.partition(': ')
        where.setdefault(what, []).append(page)
    lines = [
        f'{what}   [{", ".join(sorted(set(on))[:4])}{" and more" if len(set(on)) > 4 else ""}]'
        for what, on in where.items()
    ]
    return check_navigation(cfg) + check_names(cfg, pages) + lines


def main():
    ap = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    ap.add_argument('--check', action='store_true', help='check the site that was built; exit code 1 on any fault')
    ap.add_argument('--out', default='_docs')
    ap.add_argument('--engine', choices=('quarto', 'smalldocs'))
    a = ap.parse_args()
    out = Path(a.out).resolve()
    try:
        faults = build(out, a.engine)
    except DocsError as e:
        sys.exit(f'build_docs: {e}')
    if a.check:
        faults = faults + check(out)
    print('\n'.join(faults) or ('no faults' if a.check else 'built'))
    if a.check and faults:
        sys.exit(f'build_docs: {len(faults)} faults')


if __name__ == '__main__':
    main()
