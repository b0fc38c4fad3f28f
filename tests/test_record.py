"Records: bit-equal through a file, refused when anything is wrong, compared variable by variable, joined by xarray."

import json
import re
import threading

import numpy as np
import pytest
import xarray as xr
from made import made_up, part

from hessian_overlap.record import (
    ATTRS,
    LABELS,
    VARIABLES,
    RecordError,
    chance_std,
    check_record,
    compare,
    load_record,
    make_record,
    pick,
    save_record,
    summary,
    table_ks,
    table_text,
)

KS = [3, 10, 40, 150, 600]
MANY = [
    dict(),
    dict(k=1),
    dict(k=60, n=60),
    dict(R=0),
    dict(steps=(7,)),
    dict(splits=('test',)),
    dict(splits=('a b', 'validation <i>', 'ünder/score')),
    dict(method='seigh'),
    dict(k=350, n=7030, steps=(0,)),
    dict(ks=KS),
    dict(ks=[1000], n=2000),
    dict(ks=range(1, 9)),
    dict(seeds=(0, 3, 1)),
]


def bits(ds):
    return {name: (v.dims, v.dtype, v.values.tobytes()) for name, v in ds.variables.items()}


@pytest.mark.parametrize('kw', MANY, ids=str)
def test_loads_back_bit_equal(kw, tmp_path):
    ds = made_up(**kw)
    file = save_record(ds, tmp_path / 'a')
    back = load_record(tmp_path / 'a')
    assert bits(back) == bits(ds) and back.attrs == ds.attrs and compare(ds, back, ignore=()) == {}
    assert load_record(file).identical(back)
    assert save_record(back, tmp_path / 'b').read_bytes() == file.read_bytes()
    assert [o.name for o in (tmp_path / 'a').iterdir()] == ['record.zarr.zip']


def test_strange_floats_survive(tmp_path):
    ds = made_up(k=4, n=9)
    ds.residuals[:] = np.array([np.nan, np.inf, 0.0, 5e-324])
    ds.low[:] = -0.0
    save_record(ds, tmp_path)
    assert bits(load_record(tmp_path)) == bits(ds)


def test_any_zarr_reads_it(tmp_path):
    "Without this package, and without its checksum"
    from zarr.storage import ZipStore

    ds = made_up()
    store = ZipStore(save_record(ds, tmp_path), mode='r')
    assert xr.open_zarr(store, consolidated=False, chunks=None).load().identical(ds)
    store.close()


def test_the_schema_holds_whatever_the_method():
    for kw in MANY:
        ds = made_up(**kw)
        assert {name: ' '.join(v.dims) for name, v in ds.data_vars.items()} == {
            name: v.dims for name, v in VARIABLES.items()
        }
        assert set(ds.attrs) == set(ATTRS) and set(ds.coords) == {*LABELS, 'chance'}
        assert all(v.attrs['long_name'] and v.attrs['units'] for v in ds.data_vars.values())
        assert np.array_equal(ds.chance, ds.k / ds.n)


def test_splits_keep_their_order_and_steps_ascend():
    ds = made_up(steps=(100, 0, 50), splits=('train', 'test', 'dev'), seeds=(5, 2))
    assert ds.split.values.tolist() == ['train', 'test', 'dev'] and ds.seed.values.tolist() == [5, 2]
    assert ds.step.values.tolist() == [0, 50, 100]


def spoilt(name, value=np.nan, **at):
    ds = made_up()
    ds[name].loc[at] = value
    return ds


@pytest.mark.parametrize(
    'make, says',
    [
        (lambda: spoilt('overlap', 3.0), 'overlap is between 3 and 3; expected 0 to 1'),
        (lambda: spoilt('overlap', -0.1), 'overlap is between -0.1'),
        (lambda: spoilt('overlap', order='magnitude', k=3), 'overlap must be finite'),
        (lambda: spoilt('random', draw=1), 'random must be finite'),
        (lambda: spoilt('eigvals', k=3), 'eigvals must be finite'),
        (lambda: spoilt('loss', np.inf), 'loss must be finite'),
        (lambda: spoilt('accuracy', 1.5), 'accuracy is between 1.5'),
        (lambda: spoilt('matvecs', -1), 'matvecs is between -1'),
        (lambda: spoilt('layers', order='layerwise'), 'layers must be finite'),
        (lambda: made_up().drop_vars('trusted'), 'lacks the variable trusted'),
        (lambda: made_up().assign(more=1), 'more is not a variable of a record'),
        (lambda: made_up().isel(seed=0), 'lacks labels of a dimension seed'),
        (
            lambda: made_up().transpose('step', ...),
            r'dimensions \(step, seed, split, order, k\); expected \(seed, step',
        ),
        (lambda: made_up().assign(loss=lambda d: d.loss.astype('f4')), 'loss is float32; expected float64'),
        (lambda: made_up().isel(step=[1, 0]), r'step must ascend, got \[50, 0\]'),
        (lambda: made_up().isel(split=[0, 0]), 'labels of split must differ'),
        (lambda: made_up().isel(step=[]), 'step has no labels'),
        (lambda: made_up().assign_coords(split=[0, 1]), 'labels of split are int64'),
        (lambda: made_up().assign_attrs(n=59), '1 to 60; expected 1 to n = 59'),
        (lambda: made_up().assign_attrs(n=2000), 'chance is not k/n'),
        (lambda: made_up().assign_attrs(settings={}), 'attribute settings of a record must be str'),
        (lambda: made_up().isel(k=slice(0, 50)), 'rank 54 is not one of k'),
    ],
    ids=range(22),
)
def test_what_cannot_be_is_no_record(make, says, tmp_path):
    with pytest.raises(RecordError, match=says) as e:
        save_record(make(), tmp_path)
    assert '\n' not in str(e.value) and not list(tmp_path.iterdir())


def test_what_may_be_unknown():
    for name in ('low', 'high', 'residuals', 'variance', 'accuracy'):
        check_record(spoilt(name))
    for name in ('overlap', 'table', 'layers', 'half'):
        check_record(spoilt(name, order='best'))
    rounded = made_up()
    rounded['overlap'] = rounded.overlap * 0 + 1 + 1e-6
    check_record(rounded)


def test_parts_that_do_not_fit():
    rng = np.random.default_rng(0)
    parts = [part(rng, 0, step, split, 1000, np.arange(1, 61), 4, 'eigsh') for step in (0, 1) for split in 'ab']
    with pytest.raises(RecordError, match='there is none for seed 0, step 1, b'):
        make_record(parts[:3], problem='')
    with pytest.raises(RecordError, match='at least one part'):
        make_record([], problem='')
    other = part(rng, 0, 1, 'b', 1000, np.arange(1, 61), 5, 'eigsh')
    with pytest.raises(RecordError, match='not of one run: their draw differ'):
        make_record([*parts[:3], other], problem='')
    with pytest.raises(RecordError, match='plain JSON'):
        make_record(parts, problem='', settings=dict(a=object()))
    with pytest.raises(RecordError, match='plain JSON'):
        make_record(parts, problem='', settings=dict(tol=np.nan))
    assert make_record(reversed(parts), problem='').sel(split=['a', 'b']).equals(make_record(parts, problem=''))


def test_many_saves_at_once(tmp_path):
    "A reader finds one of the records, never damage"
    made, stop = [made_up(seed=i, k=5, n=20) for i in range(2)], threading.Event()
    save_record(made[0], tmp_path)

    def save(ds):
        while not stop.is_set():
            save_record(ds, tmp_path)

    writers = [threading.Thread(target=save, args=(ds,)) for ds in made]
    for w in writers:
        w.start()
    try:
        for _ in range(40):
            back = load_record(tmp_path)
            assert any(back.equals(ds) for ds in made)
    finally:
        stop.set()
        for w in writers:
            w.join()


def test_any_flipped_byte_is_found(tmp_path):
    ds = made_up(k=5, n=20)
    file = save_record(ds, tmp_path)
    good = file.read_bytes()
    for i in range(0, len(good), 97):
        file.write_bytes(good[:i] + bytes([good[i] ^ 1]) + good[i + 1 :])
        with pytest.raises(RecordError, match='damaged') as e:
            load_record(tmp_path)
        assert '\n' not in str(e.value)


def test_missing_newer_and_unreadable(tmp_path):
    with pytest.raises(RecordError, match='no record in .*: record.zarr.zip is not there'):
        load_record(tmp_path)
    (tmp_path / 'f').write_text('x')
    with pytest.raises(RecordError, match='damaged'):
        load_record(tmp_path / 'f')
    with pytest.raises(RecordError, match='not there'):
        load_record(tmp_path / 'f' / 'g')
    ds = made_up(k=5, n=20).assign_attrs(schema=9)
    save_record(ds, tmp_path)
    with pytest.raises(RecordError, match='has schema 9, hessian_overlap .* reads 3'):
        load_record(tmp_path)
    (tmp_path / 'd' / 'record.zarr.zip').mkdir(parents=True)
    with pytest.raises(RecordError, match='cannot be read'):
        load_record(tmp_path / 'd')


def test_compare_says_what_differs():
    a = made_up()
    assert compare(a, a.assign(seconds=a.seconds * 2)) == {}
    assert list(compare(a, a.assign(seconds=a.seconds * 2), ignore=())) == ['seconds']
    b = a.copy(deep=True)
    b.overlap[0, 1, 1, 0, 3] += 1e-3
    assert compare(a, b) == dict(overlap=pytest.approx(1e-3))
    b.overlap[0, 1, 1, 0, 3] = np.nan
    assert list(compare(a, b)) == ['overlap'] and np.isnan(compare(a, b)['overlap'])
    assert list(compare(b, a)) == ['overlap'] and compare(b, b) == {}
    assert compare(a, a.assign(residuals=a.residuals * np.nan)).keys() == {'residuals'}
    assert compare(a, a.isel(k=slice(0, 54)))['k'] == ((60,), (54,))
    assert compare(a, a.assign_coords(split=['a', 'b']))['split'] == (['train', 'test'], ['a', 'b'])
    assert compare(a, a.assign_attrs(problem='x')) == dict(problem=('made_up', 'x'))
    settings = json.dumps(json.loads(a.settings) | dict(samples=3))
    assert compare(a, a.assign_attrs(settings=settings)) == {'settings.samples': (500, 3)}
    assert compare(a, a.drop_vars('best', errors='ignore').drop_vars('variance')).keys() == {'variance'}
    assert compare(a, a.assign(converged=~a.converged))['converged'] == 1


@pytest.mark.parametrize('k, ks', [(1, [1]), (50, [50]), (60, [50, 60]), (100, [50, 100]), (350, [50, 100, 350])])
def test_table_sizes(k, ks):
    assert table_ks(range(1, k + 1)) == ks


def test_table_sizes_where_some_are_left_out():
    assert table_ks(KS) == [10, 40, 600] and table_ks([1000]) == [1000] and table_ks([2, 9]) == [2, 9]


@pytest.mark.parametrize('kw', MANY, ids=str)
def test_the_table_lines_up_and_says_the_numbers(kw):
    ds = made_up(**kw)
    head, rule, *rows = table_text(ds).splitlines()
    rows = [r for r in rows if re.match(r' *\d', r)]
    assert len(rows) == ds.step.size * ds.split.size and {len(r.removesuffix(' *')) for r in rows} == {len(head)}
    columns = re.split(r'\s{2,}|(?<=\d) (?=k=)', head.strip())
    one, last = pick(ds, order='magnitude'), rows[-1].removesuffix(' *').split()[-len(columns) + 2 :]
    if ds.seed.size == 1:
        for o, want in [
            (f'λ{ds.k.values[0]}', f'{one.eigvals[0].item():#.4g}'),
            (f'k={ds.k.values[-1]}', f'{one.overlap[-1].item():.4f}'),
            ('chance', f'{one.chance[-1].item():.4f}'),
            ('ratio', f'{(one.overlap / one.chance)[-1].item():.2f}'),
            ('loss', f'{one.loss.item():.4f}'),
            ('accuracy', f'{one.accuracy.item():.2%}'),
            ('matvecs', str(one.matvecs.item())),
        ]:
            assert last[columns.index(o) - 2] == want, o
    assert rows[-1].endswith(' *') == (not ds.converged[:, -1, -1].all())


def test_seeds_are_shown_as_mean_and_spread():
    ds = made_up(seeds=(0, 1, 2), steps=(0,), splits=('train',))
    row = table_text(ds).splitlines()[2].split()
    last = ds.overlap.sel(order='magnitude').isel(k=-1)
    assert f'{last.mean().item():.4f}' in row and f'{last.std().item():.1e}' in row
    assert f'{abs(ds.eigvals[..., -1]).mean().item():.3e}' in row
    assert 'mean over 3 seeds' in table_text(ds).splitlines()[-1] and '3 seeds' in summary(ds)


def test_what_is_not_known_is_a_dash():
    ds = made_up(method='seigh')
    ds['accuracy'] = ds.accuracy * np.nan
    assert table_text(ds).splitlines()[2].split()[3] == '-' and 'nan' not in table_text(ds) and 'nan' not in summary(ds)


def test_what_did_not_converge_is_marked():
    ds = made_up()
    ds.converged[0, 1, 0] = False
    lines = table_text(ds).splitlines()
    assert [l.endswith(' *') for l in lines] == [False] * 4 + [True] + [False] * 4 and 'not converged' in lines[-1]
    assert 'a sketch' in table_text(made_up(method='seigh')).splitlines()[-1]
    assert 'num_steps' in table_text(made_up(ks=KS)).splitlines()[-1]


def test_pick():
    ds = made_up(seeds=(4, 2))
    one = pick(ds)
    assert (one.seed.item(), one.step.item(), one.split.item()) == (4, 100, 'test')
    assert one.overlap.dims == ('order', 'k') and one.layer_size.dims == ('layer',)
    assert pick(ds, seed=2, step=50, split='train', order='best', k=7).overlap.item() == ds.overlap.sel(
        seed=2, step=50, split='train', order='best', k=7
    )
    assert pick(ds, order=['best', 'random'], k=[3, 5]).overlap.shape == (2, 2)
    assert pick(one).identical(one) and pick(one, step=100).identical(one)
    for kw, says in [
        (dict(step=7), 'step 7 is not in the record; it has 0, 50, 100'),
        (dict(split='dev'), "split 'dev' is not in the record; it has train, test"),
        (dict(k=61), 'k 61 is not in the record; it has 1 to 60'),
        (dict(k=[3, 99]), 'k 99 is not'),
        (dict(order='flat'), "order 'flat' is not in the record; it has magnitude, layerwise, random, best"),
        (dict(seed=0), 'seed 0 is not in the record; it has 4, 2'),
    ]:
        with pytest.raises(ValueError, match=re.escape(says)):
            pick(ds, **kw)
    with pytest.raises(ValueError, match='step 50 is not in the record; it has 100'):
        pick(one, step=50)


def test_chance_std_is_that_of_random_masks():
    "By 4000 random masks of a space of which the leverages are known"
    rng = np.random.default_rng(0)
    U = np.linalg.qr(rng.standard_normal((30, 4)) * np.linspace(0, 3, 30)[:, None])[0]
    ds = made_up(n=30, k=4, steps=(0,), splits=('train',))
    ds['variance'] = ds.variance * 0 + (U**2).cumsum(1).var(0)
    for m, r in [(1, 1), (4, 4), (10, 3)]:
        got = [(U[rng.permutation(30)[:m], :r] ** 2).sum() / min(m, r) for _ in range(4000)]
        assert chance_std(ds, m, r) == pytest.approx(np.std(got), rel=0.06)
    assert np.isnan(chance_std(made_up(ks=KS), 3)) and chance_std(ds, [1, 4]).shape == (2,)


def test_xarray_joins_and_exports():
    a, b = made_up(seed=0), made_up(seed=1, seeds=(1,))
    both = check_record(xr.concat([a, b], 'seed', data_vars='minimal').assign_attrs(a.attrs))
    assert both.seed.values.tolist() == [0, 1] and both.sel(seed=[1]).overlap.equals(b.overlap)
    frame = a[['overlap', 'loss']].to_dataframe()
    assert {'overlap', 'loss', 'chance'} <= set(frame.columns)
    back = xr.open_dataset(bytes(a.to_netcdf(engine='scipy')), engine='scipy')
    assert np.array_equal(back.overlap, a.overlap)
    assert 'made_up' in a._repr_html_()


def test_the_committed_records(root):
    for name, method in [('mnist_mini', 'eigsh'), ('mnist_mini_slq', 'slq')]:
        ds = load_record(root / 'nbs/records' / name)
        assert (ds.problem, ds.method, ds.n) == ('mnist_mini', method, 7030)
        assert summary(ds) and table_text(ds)
