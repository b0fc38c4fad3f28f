"The explorer in a real JupyterLab: a reader's keys and choices change the figure and the number, fast enough to follow."
import re, statistics

NB = 'nbs/51_explore.ipynb'


def number(text):
    "The overlap that the explorer states"
    return float(re.search(r'overlap\s+([0-9.]+)', text)[1])


def test_explorer_follows_the_reader(need_browser, artefacts, capsys):
    from lab_driver import open_notebook
    with open_notebook(NB, artefacts) as lab:
        lab.run_all()
        assert not lab.errors(), lab.errors()
        start = lab.settle()
        assert start['figure'] and number(start['text']) > 0, start['text']
        lab.page.screenshot(path=artefacts/'explorer-before.png')
        times = dict(k=lab.slide('mask size k', 'ArrowLeft', 8))
        after_k = lab.settle()
        times['step'] = lab.slide('training step', 'ArrowLeft', 3)
        after_step = lab.settle()
        times['mask'] = [lab.choose('mask', 'best')]
        after_mask = lab.settle()
        times['split'] = [lab.choose('Hessian of', 'train')]
        after_split = lab.settle()
        stages = [start, after_k, after_step, after_mask, after_split]
        assert len({s['figure'] for s in stages}) == len({s['text'] for s in stages}) == 5
        assert number(after_mask['text']) > number(after_step['text'])       # the best mask beats the magnitude mask
        assert not lab.errors(), lab.errors()
        lab.page.screenshot(path=artefacts/'explorer-after.png')
    with capsys.disabled():
        print('\nexplorer in JupyterLab, ms from key to figure: ' + '; '.join(f'{k} {[round(1000*s) for s in v]}' for k, v in times.items()))
    assert statistics.median(times['k']) < 2, times
