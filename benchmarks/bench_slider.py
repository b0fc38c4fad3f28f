"""How long is a step of a slider, and how long does an explorer take to open?

A record of the shape that a run of ResNet-18 would leave (11,689,512 parameters in 62 tensors, k = 500, 11 steps x 2
splits, 10 random masks, tables; the numbers are drawn, the shape and the file are those of a real one) is opened in
JupyterLab in a headless Chromium, and the slider of the mask size is moved by single key presses, each after the page
has come to rest. Everything is timed inside the page by its own clock, without polling: from the key press, by way of
what the page sends and receives, to the figure decoded, the words changed and the frame handed to the compositor. The
kernel keeps its own times: of the drawing, of the encoding, and of opening the folder. Chromium has no GPU here and
shares the cores with JupyterLab and the kernel; the load before is in the JSON.

    python benchmarks/bench_slider.py [--steps 20] [--out JSON]
"""

import argparse
import json
import os
import platform
import statistics
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / 'tools'))
os.environ['PYTHONPATH'] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get('PYTHONPATH'))))  # of the kernel
import xarray as xr

from hessian_overlap import partition
from hessian_overlap.experiment import default_snapshots
from hessian_overlap.models import resnet18
from hessian_overlap.record import make_record, save_record
from hessian_overlap.tables import grid


def record(steps=11, k=500, R=10, seed=0):
    "A record as a run of ResNet-18 would leave it; of an eigenspace it has the shape, not the numbers"
    net = partition(resnet18(1000, seed=0, device='cpu'))
    rng = np.random.default_rng(seed)
    at = [(step, split) for step in default_snapshots(100 * (steps - 2)) for split in ('train', 'test')]
    parts = [part(rng, net, k, R).assign_coords(seed=seed, step=step, split=split) for step, split in at]
    return make_record(parts, problem='resnet18', settings=dict(tol=1e-5))


def part(rng, net, k, R):
    "One step and split"
    n, L, j, orders = net.n, len(net), np.arange(1, k + 1), ['magnitude', 'random', 'layerwise', 'best']
    sizes, ranks = grid(n, k)
    share = net.sizes.numpy() / n
    noise = lambda *shape: 1 + 0.1 * rng.random(shape)
    short = lambda a, bits: np.round(a * 2**bits) / 2**bits  # as the run keeps them
    chance = np.maximum.outer(sizes, ranks) / n
    table = np.minimum(1, chance ** np.array([0.4, 1, 0.5, 0.25]).reshape(4, 1, 1) * noise(4, *chance.shape))
    layers = table[..., None] * rng.dirichlet(50 * share + 0.5, table.shape)
    magnitude = np.minimum(1, (0.02 + 0.05 * np.exp(-j / 90)) * noise(k))
    random = short(np.minimum(1, j / n * noise(R, k)), 24)
    overlap = np.stack([magnitude, random.mean(0), short(0.8 * magnitude, 24), np.minimum(1, 5 * magnitude)])
    curve, cell = ('order', 'k'), ('order', 'size', 'rank')
    return xr.Dataset(
        dict(
            overlap=(curve, overlap),
            low=(curve, np.nan * overlap),
            high=(curve, np.nan * overlap),
            trusted=(curve, overlap > 0),
            random=(('draw', 'k'), random),
            eigvals=('k', 50 * np.exp(-(j**0.5) / 3) * rng.choice([1, -1], k, p=[0.7, 0.3])),
            residuals=('k', 1e-5 * noise(k)),
            variance=('k', j / n**2 * noise(k)),
            table=(cell, table),
            half=(cell, 0 * table),
            layers=((*cell, 'layer'), short(layers, 16).astype('f4')),
            available=(('rank', 'layer'), short(np.broadcast_to(share, (len(ranks), L)) * noise(len(ranks), L), 24)),
            layer_size=('layer', net.sizes.numpy()),
            loss=7 / noise(),
            accuracy=noise() - 1,
            matvecs=2 * k,
            seconds=noise(),
            converged=True,
        ),
        coords=dict(order=orders, k=j, size=sizes, rank=ranks, layer=list(net.names), draw=np.arange(R)),
        attrs=dict(n=n, method='eigsh'),
    )


IMPORT = """import json, time
from hessian_overlap import explore_overlap
from hessian_overlap.explore import Explorer, OverlapExplorer"""
OPEN = """draws, cpus, renders = [], [], []
def timed(cls, name, spent, busy):
    f = getattr(cls, name)
    def g(self, *args, **kw):
        start, cpu = time.perf_counter(), time.thread_time()
        f(self, *args, **kw)
        spent.append(1000*(time.perf_counter() - start))
        busy.append(1000*(time.thread_time() - cpu))
    setattr(cls, name, g)
timed(Explorer, 'render', renders, [])
timed(OverlapExplorer, 'draw', draws, cpus)
start = time.perf_counter()
e = explore_overlap('run')
opened = time.perf_counter() - start
def keep(change):
    with open(OUT, 'w') as out:
        json.dump(dict(opened=opened, bytes=len(e.image.value), draw=draws, cpu=cpus, render=renders), out)
e.label.observe(keep, names='value')
e"""

# in the page: from the key that runs a cell to the first figure in its output
FIRST = """() => {
  window.opened = null; let start = null;
  document.addEventListener('keydown', e => { if (e.key === 'Enter') start = e.timeStamp; }, true);
  const look = () => {
    const i = document.querySelector('.jp-OutputArea-output .jupyter-widgets img');
    if (start !== null && i?.complete && i.naturalWidth) opened = performance.now() - start;
    else requestAnimationFrame(look);
  };
  look();
}"""
# the step that is going on, from the key to the frame
WATCH = """() => {
  const img = document.querySelector('.jp-OutputArea-output .jupyter-widgets img');
  const said = document.querySelector('.jp-OutputArea-output [role=status]');
  const host = said.closest('.widget-html-content, .jupyter-widget-html-content');
  const now = () => performance.now();
  const seen = new WeakSet();
  let step = null;
  window.steps = [];
  const done = async () => {
    if (!step || step.painting || !step.image || !step.words) return;
    const mine = step;
    mine.painting = true;
    await img.decode().catch(() => {});
    mine.decoded = now();
    const painted = () => {
      mine.painted = now();
      steps.push(mine);
      if (step === mine) step = null;
    };
    requestAnimationFrame(() => {
      const c = new MessageChannel();
      c.port1.onmessage = painted;
      c.port2.postMessage(0);
    });
  };
  document.addEventListener('keydown', e => { step = {key: e.timeStamp, messages: 0, bytes: 0}; }, true);
  img.addEventListener('load', () => { if (step) { step.image = now(); done(); } });
  const words = new MutationObserver(() => { if (step) { step.words = now(); done(); } });
  words.observe(host, {childList: true, subtree: true, characterData: true});
  const received = m => {
    if (!step) return;
    const t = now();
    step.first ??= t;
    if (!step.image) step.last = t;
    step.messages += 1;
    step.bytes += m.data.byteLength ?? m.data.size ?? m.data.length;
  };
  const send = WebSocket.prototype.send;
  WebSocket.prototype.send = function(data) {
    if (!seen.has(this)) {
      seen.add(this);
      this.addEventListener('message', received);
    }
    if (step) step.sent ??= now();
    return send.call(this, data);
  };
}"""


def notebook(cells):
    code = lambda i, s: dict(cell_type='code', id=f'c{i}', metadata={}, source=s, outputs=[], execution_count=None)
    return json.dumps(
        dict(
            cells=[code(i, s) for i, s in enumerate(cells)],
            metadata=dict(kernelspec=dict(name='python3', display_name='python3', language='python')),
            nbformat=4,
            nbformat_minor=5,
        )
    )


def run_cell(lab, number):
    "Select a cell and run it; a key that comes before the kernel is ready is lost"
    for attempt in range(5):
        lab.page.locator('.jp-Notebook .jp-Cell').nth(number).click()
        lab.page.keyboard.press('Escape')
        lab.page.keyboard.press('Control+Enter')
        try:
            lab.page.wait_for_function(
                "n => /\\[\\d+\\]/.test(document.querySelectorAll('.jp-InputPrompt')[n].innerText)",
                arg=number,
                timeout=20_000,
            )
            return
        except Exception:
            if attempt == 4:
                raise


def drive(folder, artefacts, steps):
    "Key presses in JupyterLab -> steps by the clock of the page, what the kernel says, ms to the explorer, bytes"
    from lab_driver import open_notebook

    own = folder / 'kernel.json'
    root = folder / 'lab'
    root.mkdir()
    save_record(record(), root / 'run')
    (root / 'slider.ipynb').write_text(notebook([IMPORT, OPEN.replace('OUT', repr(str(own)))]), encoding='utf-8')
    with open_notebook('slider.ipynb', artefacts, root=root) as lab:
        run_cell(lab, 0)
        lab.page.wait_for_timeout(2000)
        lab.page.evaluate(FIRST)
        run_cell(lab, 1)
        lab.page.wait_for_function('opened')
        opened = lab.page.evaluate('opened')
        lab.settle(2)
        assert not lab.errors(), lab.errors()
        lab.page.evaluate(WATCH)
        lab.control('mask size k', '.noUi-handle').focus()
        for i in range(-3, steps):  # three to warm up
            lab.page.keyboard.press('ArrowLeft')
            lab.page.wait_for_function('n => steps.length > n', arg=i + 3, timeout=20_000)
            lab.page.wait_for_timeout(300)
        kernel = json.loads(own.read_text())
        size = sum(f.stat().st_size for f in (root / 'run').iterdir())
        return (
            lab.page.evaluate('steps')[3:],
            {k: v[-steps:] if isinstance(v, list) else v for k, v in kernel.items()},
            opened,
            size,
        )


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument('--steps', type=int, default=20)
    ap.add_argument('--out', type=Path, default=Path(__file__).parent / 'results/bench_slider.json')
    a = ap.parse_args()
    load = os.getloadavg()
    with tempfile.TemporaryDirectory() as d:
        steps, kernel, opened, size = drive(Path(d), ROOT / 'artefacts', a.steps)
    median = lambda xs: round(statistics.median(xs), 1)
    legs = dict(
        page_sends=('key', 'sent'),
        first_answer=('sent', 'first'),
        figure_is_there=('first', 'image'),
        decoded=('image', 'decoded'),
        frame=('decoded', 'painted'),
    )
    ms = [s['painted'] - s['key'] for s in steps]
    out = dict(
        script='benchmarks/bench_slider.py',
        environment=dict(
            machine=platform.machine(),
            system=platform.system(),
            cores=os.cpu_count(),
            load=[round(v, 2) for v in load],
            python=platform.python_version(),
            **{p: version(p) for p in ('jupyterlab', 'ipywidgets', 'matplotlib', 'pillow', 'playwright')},
        ),
        record=dict(n=11_689_512, k=500, steps=11, splits=2, layers=62, file_bytes=size),
        slider=dict(
            steps=len(ms),
            ms=[round(v, 1) for v in ms],
            median_ms=median(ms),
            worst_ms=round(max(ms), 1),
            legs_ms={k: median(s[b] - s[a] for s in steps) for k, (a, b) in legs.items()},
            kernel_draw_ms=median(kernel['draw']),
            of_it_processor_ms=median(kernel['cpu']),
            of_it_render_ms=median(kernel['render']),
            png_bytes=kernel['bytes'],
            messages=median(s['messages'] for s in steps),
            message_bytes=median(s['bytes'] for s in steps),
        ),
        opening=dict(explore_overlap_s=round(kernel['opened'], 2), cell_to_explorer_s=round(opened / 1000, 2)),
    )
    s, o = out['slider'], out['opening']
    print(
        f'a step of the slider: median {s["median_ms"]} ms of {s["steps"]}, worst {s["worst_ms"]}; '
        f'{s["kernel_draw_ms"]} of it the kernel draws ({s["of_it_processor_ms"]} of the processor); load {load[0]:.1f}'
    )
    said = ', '.join(f'{k} {v}' for k, v in s['legs_ms'].items())
    print(
        f'  {said}; {s["messages"]:.0f} messages, {s["message_bytes"] / 1e3:.0f} kB, '
        f'the figure {s["png_bytes"] / 1e3:.0f} kB'
    )
    print(
        f'the record ({size / 1e6:.1f} MB) opens in {o["explore_overlap_s"]} s, '
        f'from running the cell to the explorer {o["cell_to_explorer_s"]} s'
    )
    a.out.parent.mkdir(parents=True, exist_ok=True)
    a.out.write_text(json.dumps(out, indent=1) + '\n')
    print('written to', a.out)


if __name__ == '__main__':
    main()
