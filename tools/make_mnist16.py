#!/usr/bin/env python
"""Make hessian_overlap/data/mnist16.npz, byte for byte, from the raw IDX files of MNIST.

    python tools/make_mnist16.py ROOT            # write the file and print its checksum
    python tools/make_mnist16.py ROOT --check    # make it in memory and compare it with the one in the package

ROOT is a folder with the four IDX files (plain or .gz) or torchvision's root. The result holds `images` (10000, 16, 16)
uint8 and `labels` (10000,) uint8: the first 800 of each class of the training set, then the first 200 of each class of
the test set, both in file order, resized by `resize_images`. The zip entries carry a fixed date. The pixels depend on
nothing but the data; the compressed bytes also on zlib, so a build with another deflate (zlib-ng) is told apart from
wrong pixels by the checksum of the content.
"""

import argparse
import hashlib
import io
import os
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from hessian_overlap import problems

OUT = Path(problems.__file__).parent / 'data' / 'mnist16.npz'


def npz_bytes(**arrays):
    "A deflated npz with fixed dates and attributes"
    buf = io.BytesIO()
    with zipfile.ZipFile(buf, 'w') as z:
        for name, a in arrays.items():
            raw = io.BytesIO()
            np.lib.format.write_array(raw, np.ascontiguousarray(a), version=(1, 0), allow_pickle=False)
            info = zipfile.ZipInfo(f'{name}.npy', date_time=(1980, 1, 1, 0, 0, 0))
            info.compress_type, info.create_system, info.external_attr = zipfile.ZIP_DEFLATED, 3, 0o644 << 16
            z.writestr(info, raw.getvalue(), compresslevel=9)
    return buf.getvalue()


def digits(root, train=8000, test=2000):
    "(images, labels) of the embedded data"
    tx, ty, vx, vy = problems.load_mnist(root)

    def first(x, y, m):
        i = problems.balanced_indices(torch.from_numpy(y.astype(np.int64)), m, 10).numpy()
        return problems.resize_images(x[i]), y[i]

    (a, b), (c, d) = first(tx, ty, train), first(vx, vy, test)
    return np.concatenate([a, c]), np.concatenate([b, d])


def content_sha256(images, labels):
    "Checksum of the pixels and labels, whatever compressed them"
    return hashlib.sha256(images.tobytes() + labels.tobytes()).hexdigest()


def main():
    ap = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    ap.add_argument('root')
    ap.add_argument('--out', type=Path, default=OUT)
    ap.add_argument('--check', action='store_true')
    a = ap.parse_args()
    try:
        images, labels = digits(a.root)
    except (OSError, ValueError) as e:
        print(f'make_mnist16: {e}', file=sys.stderr)
        return 2
    raw = npz_bytes(images=images, labels=labels)
    print(
        f'{len(raw)} bytes, sha256 {hashlib.sha256(raw).hexdigest()}\ncontent sha256 {content_sha256(images, labels)}'
    )
    if not a.check:
        tmp = a.out.with_suffix('.tmp')
        tmp.write_bytes(raw)
        os.replace(tmp, a.out)
        print('wrote', a.out)
        return 0
    there = a.out.read_bytes()
    if there == raw:
        print('identical to', a.out)
        return 0
    with np.load(io.BytesIO(there)) as z:
        same = content_sha256(z['images'], z['labels']) == content_sha256(images, labels)
    print(
        'same pixels and labels, other compression' if same else 'DIFFERENT pixels or labels',
        f'(zlib {zlib.ZLIB_RUNTIME_VERSION})',
    )
    return 0 if same else 1


if __name__ == '__main__':
    sys.exit(main())
