"The script for large networks, on a tiny one: trained, interrupted, taken up again, both methods"

import json
import sys
import zipfile
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / 'benchmarks'))
import scale


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setitem(
        scale.NETWORKS,
        'transformer_10m',
        dict(
            width=16,
            layers=1,
            heads=2,
            train_steps=4,
            batch=2,
            lr=1e-3,
            samples=3,
            probes=3,
            steps=20,
            basis='bfloat16',
        ),
    )
    monkeypatch.setattr(scale, 'LENGTH', 16)


@pytest.mark.filterwarnings('ignore::RuntimeWarning')
def test_trains_measures_and_goes_on(tiny, tmp_path, monkeypatch, capsys):
    def run(out, *more):
        monkeypatch.setattr(
            sys,
            'argv',
            [
                'scale.py',
                'transformer_10m',
                '--both',
                '--masked-steps',
                '12',
                '--threads',
                '1',
                '--out',
                str(tmp_path / out),
                *more,
            ],
        )
        scale.main()
        return json.loads((tmp_path / out).read_text())

    a = run('a.json', '--work', str(tmp_path / 'work'))
    products = capsys.readouterr().out.count('products,')
    b = run('b.json', '--work', str(tmp_path / 'work'))
    assert capsys.readouterr().out.count('products,') < products  # taken up where it was
    c = run('c.json')
    for r, s, t in zip(a['runs'], b['runs'], c['runs']):
        assert r['orders'] == s['orders'] == t['orders'] and r['ks'] == t['ks']
    assert [r['method'] for r in a['runs']] == ['slq', 'slq_masked'] and a['runs'][0]['matvecs'] == 60
    for r in a['runs']:
        o = r['orders']['magnitude']
        assert all(l <= v <= h for l, v, h in zip(o['low'], o['overlap'], o['high']))
    layers = np.array(a['runs'][0]['orders']['magnitude']['layers'])
    np.testing.assert_allclose(layers.sum(1), a['runs'][0]['orders']['magnitude']['overlap'], rtol=1e-6)
    assert sum(a['runs'][0]['layer_sizes']) == a['n']


def test_bigram_of_a_known_source():
    rng = np.random.default_rng(0)
    P = np.array([[0.9, 0.1], [0.3, 0.7]])
    x = [0]
    for u in rng.random(40000):
        x.append(int(u >= P[x[-1], 0]))
    x = torch.tensor(x)
    entropy = -(np.array([0.75, 0.25])[:, None] * P * np.log(P)).sum()
    assert abs(scale.bigram_loss(x[:30000], x[30000:], 2) - entropy) < 0.02


@pytest.mark.parametrize('suffix, lossy', [('png', False), ('jpg', True)])
def test_images_from_a_zip(suffix, lossy, tmp_path):
    rng = np.random.default_rng(0)
    pixels = {}
    with zipfile.ZipFile(tmp_path / 'c.zip', 'w') as z:
        for split in ('train', 'test'):
            for c in ('cat', 'dog'):
                for i in range(3):
                    pixels[split, c, i] = a = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                    buf = BytesIO()
                    Image.fromarray(a).save(buf, 'PNG' if suffix == 'png' else 'JPEG')
                    z.writestr(f'{split}/{c}/{i:04}.{suffix}', buf.getvalue())
    data, said = scale.read_cifar(tmp_path / 'c.zip')
    x, y = data['train']
    assert (
        said == lossy
        and x.shape == (6, 3, 32, 32)
        and y.tolist() == [0, 0, 0, 1, 1, 1]
        and abs(x.mean()) < 1e-5
        and abs(x.std(correction=0) - 1) < 1e-3
    )
    if not lossy:
        assert np.corrcoef(x[4].permute(1, 2, 0).ravel(), pixels['train', 'dog', 1].ravel())[0, 1] > 0.99
