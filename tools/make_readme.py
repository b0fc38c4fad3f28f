"""README.md from nbs/index.ipynb, without Quarto.   python tools/make_readme.py [--check]

The same text as the site's first page, for GitHub and PyPI: links to pages become addresses on the site, pictures
addresses in the repository, options and hidden cells go, outputs stay. --check exits 1 when README.md is out of date.
"""

import json
import re
import sys
from pathlib import Path


def web_name(path):
    "21_krylov.ipynb -> krylov.html, as nbdev names pages"
    folder, _, name = path.rpartition('/')
    return (folder + '/' if folder else '') + re.sub(r'^\d+[a-zA-Z0-9]*_', '', name.lower()).replace('.ipynb', '.html')


def outputs(cell):
    "What the outputs of a code cell look like in Markdown"
    for o in cell.get('outputs', []):
        data = o.get('data', {})
        if 'text/markdown' in data:
            yield ''.join(data['text/markdown']).strip()
        elif o['output_type'] == 'stream' and o['name'] == 'stdout':
            yield '```\n' + ''.join(o['text']).rstrip() + '\n```'
        elif 'text/plain' in data and not any(k.startswith(('image/', 'application/')) for k in data):
            yield '```\n' + ''.join(data['text/plain']).rstrip() + '\n```'


def readme(cfg):
    site, blob = cfg.doc_host + cfg.doc_baseurl, f'{cfg.git_url}/raw/{cfg.branch}/nbs'
    nb, parts = json.loads((Path(cfg.nbs_path) / cfg.readme_nb).read_text(encoding='utf-8')), []
    for cell in nb['cells']:
        s = ''.join(cell['source']).strip()
        if re.search(r'^#\|\s*hide\s*$', s, re.M):
            continue
        if cell['cell_type'] == 'markdown' and not re.fullmatch(r'<!--.*?-->', s, re.S):
            parts.append(s)
        elif cell['cell_type'] == 'code':
            options, code = (
                dict(re.findall(r'^#\|\s*([\w-]+):\s*(.*)$', s, re.M)),
                re.sub(r'^#\|.*\n?', '', s, flags=re.M).strip(),
            )
            if code and options.get('echo') != 'false':
                parts.append(f'```python\n{code}\n```')
            parts += outputs(cell)
    text = '\n\n'.join(parts) + '\n'
    text = re.sub(
        r'\]\(((?:[\w-]+/)*[\w-]+\.ipynb)(#[\w-]+)?\)', lambda m: f']({site}/{web_name(m[1])}{m[2] or ""})', text
    )
    return re.sub(r'(!\[[^\]]*\]\()(?!https?:)([^)\s]+)', lambda m: f'{m[1]}{blob}/{m[2]}', text)


def main():
    from nbdev.config import get_config

    cfg = get_config()
    path, text = cfg.config_path / 'README.md', readme(cfg)
    if '--check' in sys.argv:
        sys.exit(
            0
            if path.exists() and path.read_text(encoding='utf-8') == text
            else 'README.md is not what nbs/index.ipynb says: run make export'
        )
    path.write_text(text, encoding='utf-8')


if __name__ == '__main__':
    main()
