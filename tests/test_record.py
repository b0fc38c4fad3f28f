"Records: bit-equal through a file, refused when anything is wrong, compared field by field."

import json
import os
import re
from dataclasses import FrozenInstanceError, fields, replace

import numpy as np
import pytest
from made import made_up

from hessian_overlap.record import (
    ALL,
    ARRAYS,
    OverlapRecord,
    RecordError,
    compare,
    table_header,
    table_ks,
    write_atomic,
)

KS = [3, 10, 40, 150, 600]


def bits(r):
    return {
        name: (getattr(r, name).tobytes(), getattr(r, name).dtype, getattr(r, name).shape)
        for name in ALL
        if getattr(r, name) is not None
    }


@pytest.mark.parametrize(
    'kw',
    [
        dict(),
        dict(k=1),
        dict(k=60, n=60),
        dict(R=0),
        dict(steps=(7,)),
        dict(splits=('test',)),
        dict(method='seigh'),
        dict(k=350, n=7030),
        dict(tables=True),
        dict(tables=True, R=0),
        dict(ks=KS),
        dict(ks=KS, tables=True),
        dict(ks=[1000], n=1000),
        dict(ks=range(1, 9)),
    ],
    ids=str,
)
def test_loads_back_bit_equal(kw, tmp_path):
    r = made_up(**kw)
    s = OverlapRecord.load(r.save(tmp_path / 'a'))
    assert bits(r) == bits(s) and compare(r, s) == {} and compare(r, s, ignore=()) == {}
    for f in fields(r):
        if f.name not in ALL:
            assert getattr(r, f.name) == getattr(s, f.name), f.name
    s.save(tmp_path / 'b')
    for f in ('record.json', 'record.npz'):
        assert (tmp_path / 'a' / f).read_bytes() == (tmp_path / 'b' / f).read_bytes()


def test_strange_floats_survive(tmp_path):
    odd = np.array([np.nan, np.inf, -0.0, 5e-324])
    r = made_up(k=4, n=9)
    r = replace(r, residuals=np.broadcast_to(odd, r.residuals.shape))
    assert bits(OverlapRecord.load(r.save(tmp_path))) == bits(r)


def test_nothing_is_pickled(tmp_path):
    made_up().save(tmp_path)
    with np.load(tmp_path / 'record.npz', allow_pickle=False) as z:
        assert sorted(z.files) == sorted(set(ARRAYS) - {'ks'}) and all(z[f].dtype != object for f in z.files)


def test_frozen():
    r = made_up()
    with pytest.raises(FrozenInstanceError):
        r.k = 3
    for name in ARRAYS:
        with pytest.raises(ValueError, match='read-only'):
            getattr(r, name)[...] = 0


def test_a_record_does_not_share_its_arrays():
    a = np.ones((3, 2, 60))
    r = made_up(best=a)
    a[:] = 0
    assert (r.best == 1).all()


@pytest.mark.parametrize(
    'change, says',
    [
        (dict(eigvals=np.zeros((3, 2, 59))), r'eigvals has shape \(3, 2, 59\); expected K = 60'),
        (dict(train_loss=np.zeros(4)), 'train_loss.*S = 3'),
        (dict(matvecs=np.zeros((3, 3))), 'P = 2'),
        (dict(steps=[0, 50, 50]), 'increase'),
        (dict(steps=[]), 'S = 0|increase'),
        (dict(k=61), 'k = 61'),
        (dict(n=59), '1 ≤ k ≤ n'),
        (dict(settings=dict(tol=np.nan)), 'plain JSON'),
        (dict(settings=dict(a=object())), 'plain JSON'),
        (dict(best=np.zeros(3)), 'shape'),
        (dict(splits=('train',)), 'P = 1'),
    ],
    ids=lambda o: '' if isinstance(o, str) else ','.join(o),
)
def test_arrays_that_do_not_fit(change, says):
    with pytest.raises(RecordError, match=says):
        replace(made_up(), **change)


def every_byte(data, step):
    return range(0, len(data), step)


def test_any_flipped_byte_is_found(tmp_path):
    r = made_up(k=5, n=20)
    r.save(tmp_path)
    for file in ('record.json', 'record.npz'):
        good = (tmp_path / file).read_bytes()
        for i in every_byte(good, 7):
            if good[i : i + 1] in b' \n':
                continue  # white space between the words of a JSON file carries nothing
            (tmp_path / file).write_bytes(good[:i] + bytes([good[i] ^ 1]) + good[i + 1 :])
            with pytest.raises(RecordError) as e:
                OverlapRecord.load(tmp_path)
            assert '\n' not in str(e.value)
        (tmp_path / file).write_bytes(good)
    assert compare(OverlapRecord.load(tmp_path), r) == {}


@pytest.mark.parametrize(
    'spoil, says',
    [
        (lambda d: (d / 'record.json').unlink(), 'no record in .*record.json is not there'),
        (lambda d: (d / 'record.npz').unlink(), 'record.npz is not there'),
        (lambda d: (d / 'record.npz').write_bytes(b''), 'record.npz is damaged'),
        (lambda d: (d / 'record.json').write_text(''), 'not the JSON'),
        (lambda d: (d / 'record.json').write_text('[1]'), 'not the JSON'),
        (lambda d: (d / 'record.json').write_text('{}'), 'not the JSON'),
        (lambda d: (d / 'record.json').write_bytes(b'\xff\xfe'), 'not the JSON'),
        (lambda d: (d / 'record.json').write_text('{"schema": "x"}'), 'schema'),
        (lambda d: (d / 'record.json').write_text('{"schema": 1}'), 'sha256'),
        (lambda d: (d / 'record.json').write_text('{"schema": 3, "new": 1}'), 'schema 3.*reads up to 2: update'),
        (lambda d: ((d / 'record.json').unlink(), (d / 'record.json').mkdir()), 'cannot be read'),
    ],
    ids=range(11),
)
def test_damaged_records_give_one_sentence(spoil, says, tmp_path):
    made_up().save(tmp_path)
    spoil(tmp_path)
    with pytest.raises(RecordError, match=says) as e:
        OverlapRecord.load(tmp_path)
    assert '\n' not in str(e.value)


def test_a_folder_that_is_a_file(tmp_path):
    (tmp_path / 'f').write_text('x')
    with pytest.raises(RecordError):
        OverlapRecord.load(tmp_path / 'f')


def test_two_saves_do_not_mix(tmp_path, monkeypatch):
    "A crash while the second record is written leaves no record, rather than one with the arrays of another"
    made_up(0).save(tmp_path)
    real = os.replace

    def crash(a, b):
        if str(b).endswith('record.json'):
            raise KeyboardInterrupt
        return real(a, b)

    monkeypatch.setattr(os, 'replace', crash)
    with pytest.raises(KeyboardInterrupt):
        made_up(1).save(tmp_path)
    with pytest.raises(RecordError, match='not there'):
        OverlapRecord.load(tmp_path)
    assert [o.name for o in tmp_path.iterdir()] == ['record.npz']  # and no temporary files


def test_write_atomic_leaves_the_old_file_when_it_fails(tmp_path, monkeypatch):
    write_atomic(tmp_path / 'f', b'old')

    def full(fd):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError):
        write_atomic(tmp_path / 'f', b'new')
    assert (tmp_path / 'f').read_bytes() == b'old' and len(list(tmp_path.iterdir())) == 1


def test_compare_says_what_differs():
    r = made_up()
    assert compare(r, replace(r, seconds=r.seconds * 2)) == {} and list(
        compare(r, replace(r, seconds=r.seconds * 2), ignore=())
    ) == ['seconds']
    assert compare(r, replace(r, seed=3)) == dict(seed=(0, 3))
    b = r.best.copy()
    b[1, 1, 3] += 1e-3
    assert compare(r, replace(r, best=b))['best'] == pytest.approx(1e-3)
    assert compare(r, replace(r, residuals=r.residuals * np.nan)).keys() == {'residuals'}
    assert compare(r, made_up(k=50)).keys() >= {'k', 'eigvals'} and compare(r, made_up(k=50))['eigvals'] == (
        (3, 2, 60),
        (3, 2, 50),
    )
    assert compare(r, replace(r, settings=dict(tol=1e-5, environment=dict(host=1)))) == {}
    assert compare(r, replace(r, settings={})) == {'settings[tol]': (1e-5, None)}


@pytest.mark.parametrize('k, ks', [(1, [1]), (50, [50]), (60, [50, 60]), (100, [50, 100]), (350, [50, 100, 350])])
def test_table_sizes(k, ks):
    assert table_ks(k) == ks


def test_table_lines_up_and_says_the_numbers():
    r = made_up(k=350, n=7030)
    lines = r.table().splitlines()
    assert len(lines) == 2 + 6 and len({len(l) for l in lines}) == 1
    head, last = re.split(r'\s{2,}|(?<=\d) (?=k=)', lines[0].strip()), lines[-1].split()
    for o, want in [
        ('λ1', f'{r.eigvals[2, 1, 0]:#.4g}'),
        ('k=100', f'{r.magnitude[2, 1, 99]:.4f}'),
        ('chance', '0.0498'),
        ('matvecs', '700'),
        ('ratio', f'{r.magnitude[2, 1, -1] / r.chance[-1]:.2f}'),
        ('loss', f'{r.test_loss[2]:.4f}'),
    ]:
        assert last[head.index(o)] == want, o


def test_what_did_not_converge_is_marked():
    r = made_up()
    c = r.converged.copy()
    c[1, 0] = False
    lines = replace(r, converged=c).table().splitlines()
    assert [l.endswith(' *') for l in lines] == [False] * 4 + [True] + [False] * 4 and 'not converged' in lines[-1]
    assert 'a sketch' in made_up(method='seigh').table().splitlines()[-1]


def test_lookups():
    r = made_up()
    assert (
        r.at() == (2, 1)
        and r.at(50, 'train') == (1, 0)
        and (r.curve('random', 0, 'train') == r.random[0, 0].mean(0)).all()
    )
    for f, says in [
        (lambda: r.at(51), 'step 51 is not in the record; it has 0, 50, 100'),
        (lambda: r.at(0, 'val'), 'it has train, test'),
        (lambda: r.curve('worst'), 'choose magnitude'),
        (lambda: made_up(R=0).curve('random'), 'no random masks'),
    ]:
        with pytest.raises(ValueError, match=says):
            f()
    assert '\n' not in repr(r) and r._repr_markdown_().count('\n') == 6


def test_a_record_from_before_there_were_tables(tmp_path):
    "Written without their names even, it loads and says what it lacks"
    r = made_up()
    r.save(tmp_path)
    head = json.loads((tmp_path / 'record.json').read_text())
    import hashlib

    from hessian_overlap.record import _canonical

    for name in ('orders', 'layer_names'):
        del head[name]
    head['sha256'] = hashlib.sha256(_canonical(head)).hexdigest()
    (tmp_path / 'record.json').write_text(json.dumps(head, indent=1, ensure_ascii=False) + '\n')
    s = OverlapRecord.load(tmp_path)
    assert (
        compare(r, s) == {}
        and not s.has_tables
        and s.chance_std(3, 3) is None
        and s.masks == ('magnitude', 'best', 'random')
    )
    with pytest.raises(ValueError, match='no tables over mask size and rank'):
        s.cell('magnitude', 6, 6)


@pytest.mark.parametrize(
    'change, says',
    [
        (dict(sizes=None), 'all of its tables or none; sizes is missing'),
        (dict(overlaps=np.zeros((3, 2, 4, 1, 1))), 'overlaps has shape'),
        (dict(layer_names=('a',)), 'L = 1'),
        (dict(orders=('magnitude',)), 'O = 1'),
        (dict(extra=np.zeros((3, 2, 0, 60))), 'X = 1'),
    ],
)
def test_tables_that_do_not_fit(change, says):
    with pytest.raises(RecordError, match=says):
        replace(made_up(tables=True), **change)


def test_looking_up_tables():
    r = made_up(tables=True)
    m, q = int(r.sizes[2]), int(r.ranks[1])
    assert (
        r.cell('layerwise', m, q) == (2, 2, 1)
        and r.cell('best') == (3, r.sizes.tolist().index(60), len(r.ranks) - 1)
        and r.masks[-1] == 'layerwise'
    )
    assert (r.curve('layerwise', 50, 'train') == r.extra[1, 0, 0]).all() and list(compare(r, made_up()))[0] == 'orders'
    for f, says in [
        (lambda: r.cell('mine'), "mask 'mine' is not in the tables; they have magnitude"),
        (lambda: r.cell('best', 61), 'mask size 61'),
        (lambda: r.cell('best', m, 5), 'rank 5'),
    ]:
        with pytest.raises(ValueError, match=says):
            f()


# ------------------------------------------------------- estimates: some mask sizes, with intervals


def test_some_mask_sizes():
    r = made_up(ks=KS, tables=True)
    i = r.at(50, 'train')
    assert (
        r.k == 600
        and not r.every_size
        and r.has_intervals
        and r.schema == 2
        and (r.chance == np.array(KS) / 1000).all()
        and [r.place(k) for k in (3, 40, None)] == [0, 2, 4]
    )
    assert (
        r.masks == ('magnitude', 'random', 'layerwise')
        and r.chance_std(40, 40) is None
        and r.cell('layerwise', 40, 150)[0] == 2
    )
    low, high, trusted = r.interval('layerwise', 50, 'train')
    assert (low == r.low[i][1]).all() and (high == r.high[i][1]).all() and trusted.tolist() == [True] * 3 + [False] * 2
    assert (
        r.interval('random') is r.interval('best') is None
        and made_up(tables=True).interval() is None
        and (made_up().place(7), made_up().schema) == (6, 1)
    )
    for f, says in [
        (lambda: r.place(4), 'k = 4 is not in the record; it has mask sizes 3, 10, 40, 150, 600'),
        (lambda: r.place(0), 'k = 0'),
        (lambda: r.curve('best'), 'no best masks: slq knows no eigenvectors'),
        (lambda: r.cell('best'), "mask 'best' is not in the tables"),
        (lambda: made_up().place(61), 'mask sizes 1 to 60'),
    ]:
        with pytest.raises(ValueError, match=says):
            f()


@pytest.mark.parametrize(
    'change, says',
    [
        (dict(ks=[3, 10, 40, 150, 601]), 'expected k = 600 at the end, got .40, 150, 601'),
        (dict(ks=[0, 10, 40, 150, 600]), 'ascend from 1'),
        (dict(ks=[3, 40, 10, 150, 600]), 'ascend'),
        (dict(ks=KS[1:]), 'expected K = 4'),
        (dict(ks=None), 'expected K = 600'),
        (dict(low=None), 'all of its intervals or none; low is missing'),
        (dict(high=np.zeros((3, 2, 1, 5))), 'J = 2'),
        (dict(k=150), 'expected k = 150'),
        (dict(half=np.zeros((3, 2, 3, 1, 1))), 'half has shape'),
        (dict(low=None, high=None, trusted=None), 'half is of the tables of an estimate'),
    ],
    ids=str,
)
def test_mask_sizes_that_do_not_fit(change, says):
    with pytest.raises(RecordError, match=says) as e:
        replace(made_up(ks=KS, tables=True), **change)
    assert '\n' not in str(e.value)


@pytest.mark.parametrize(
    'ks, shown',
    [
        (KS, [10, 40, 600]),
        ([5], [5]),
        ([2, 7], [2, 7]),
        (range(1, 101), [50, 100]),
        ([7, 10, 20, 50, 90, 200, 700], [20, 90, 700]),
    ],
    ids=str,
)
def test_mask_sizes_in_the_table(ks, shown):
    assert table_ks(list(ks)[-1], list(ks)) == shown and all(
        f'k={k}' in table_header(list(ks)[-1], list(ks)) for k in shown
    )


def test_a_table_of_estimates():
    r = made_up(ks=KS)
    lines = r.table().splitlines()
    head, last = re.split(r'\s{2,}|(?<=\d) (?=k=)', lines[0].strip()), lines[-1].split()
    assert len(lines) == 2 + 6 + 1 and 'not resolved' in lines[-1]
    last = lines[-2].split()
    assert last.pop() == '*'
    for o, want in [
        ('λ3', f'{r.eigvals[2, 1, 0]:#.4g}'),
        ('λ600', f'{r.eigvals[2, 1, -1]:.3e}'),
        ('k=40', f'{r.magnitude[2, 1, 2]:.4f}'),
        ('±', f'{(r.high - r.low)[2, 1, 0, -1] / 2:.4f}'),
        ('chance', '0.6000'),
        ('ratio', f'{r.magnitude[2, 1, -1] / 0.6:.2f}'),
    ]:
        assert last[head.index(o)] == want, o
    assert (
        f'in [{r.low[2, 1, 0, -1]:.4f}, {r.high[2, 1, 0, -1]:.4f}]' in repr(r)
        and 'λ at 3' in r._repr_markdown_()
        and '*' not in replace(r, converged=np.ones((3, 2))).table()
    )


def test_the_committed_record_is_read_and_written_as_it_was(root, tmp_path):
    "Version 1 of the files, from before there were mask sizes and intervals"
    at = root / 'nbs/records/mnist_mini'
    r = OverlapRecord.load(at)
    was = json.loads((at / 'record.json').read_text())
    r.save(tmp_path)
    now = json.loads((tmp_path / 'record.json').read_text())
    assert was['schema'] == 1 and r.every_size and (r.ks == np.arange(1, 351)).all() and not r.has_intervals
    assert {k: v for k, v in was.items() if 'sha256' not in k} == {k: v for k, v in now.items() if 'sha256' not in k}
    with np.load(at / 'record.npz') as a, np.load(tmp_path / 'record.npz') as b:
        assert a.files == b.files and all(
            a[f].tobytes() == b[f].tobytes() and a[f].dtype == b[f].dtype for f in a.files
        )


def test_records_of_two_methods_are_compared():
    a, b = made_up(k=600), made_up(ks=KS)
    d = compare(a, b)
    assert (
        d['ks'] == ((600,), (5,))
        and d['method'] == ('eigsh', 'slq')
        and d['magnitude'] == ((3, 2, 600), (3, 2, 5))
        and {'low', 'high', 'trusted', 'schema'} <= d.keys()
        and compare(b, made_up(ks=KS)) == {}
    )
    assert compare(b, replace(b, high=b.high + 0.5))['high'] == pytest.approx(0.5)
