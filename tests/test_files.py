"Files: whole or not at all, sealed, and nothing left behind."

import os
import threading

import pytest

from hessian_overlap.files import DamagedError, read_sealed, sweep, write_atomic, write_sealed


def test_the_old_file_stays_when_writing_fails(tmp_path, monkeypatch):
    write_atomic(tmp_path / 'f', b'old')

    def full(fd):
        raise OSError(28, 'No space left on device')

    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError) as e:
        write_atomic(tmp_path / 'f', b'new')
    assert e.value.filename == str(tmp_path / 'f') and e.value.strerror == 'No space left on device'
    assert (tmp_path / 'f').read_bytes() == b'old' and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize('links', [True, False])
def test_only_a_new_file(links, tmp_path, monkeypatch):
    if not links:  # some file systems have none
        monkeypatch.setattr(os, 'link', lambda a, b: (_ for _ in ()).throw(PermissionError(1, 'not permitted')))
    for data in (b'first', b'second'):
        write_atomic(tmp_path / 'f', data, new=True)
    assert (tmp_path / 'f').read_bytes() == b'first' and len(list(tmp_path.iterdir())) == 1


def test_many_writers_at_once(tmp_path):
    "Whoever reads, reads one of the files that were written, whole"
    stop, seen = threading.Event(), set()

    def write(i):
        while not stop.is_set():
            write_sealed(tmp_path / 'f', dict(a=bytes([i]) * 5000))

    writers = [threading.Thread(target=write, args=(i,)) for i in range(4)]
    for w in writers:
        w.start()
    while not (tmp_path / 'f').exists():
        pass
    for _ in range(100):
        files, _ = read_sealed(tmp_path / 'f')
        assert len(files['a']) == 5000 and len({*files['a']}) == 1
        seen.add(files['a'][0])
    stop.set()
    for w in writers:
        w.join()
    assert seen and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize('files', [{}, dict(a=b''), {'x/y.json': b'{}', 'ü': bytes(range(256)) * 99}])
def test_the_same_files_give_the_same_bytes(files, tmp_path):
    for name in 'ab':
        write_sealed(tmp_path / name, files)
    assert (tmp_path / 'a').read_bytes() == (tmp_path / 'b').read_bytes() and read_sealed(tmp_path / 'a')[0] == files


def test_every_flipped_bit_is_found(tmp_path):
    write_sealed(tmp_path / 'f', dict(a=b'one', b=b'two'))
    good = (tmp_path / 'f').read_bytes()
    for i in range(0, 8 * len(good), 3):
        (tmp_path / 'f').write_bytes(good[: i // 8] + bytes([good[i // 8] ^ 1 << i % 8]) + good[i // 8 + 1 :])
        with pytest.raises(DamagedError):
            read_sealed(tmp_path / 'f')
    for n in (0, 10, 64, len(good) - 1):
        (tmp_path / 'f').write_bytes(good[:n])
        with pytest.raises(DamagedError):
            read_sealed(tmp_path / 'f')
    (tmp_path / 'f').write_bytes(good + b'x')
    with pytest.raises(DamagedError):
        read_sealed(tmp_path / 'f')


def test_sweeping_takes_only_what_is_ours_and_dead(tmp_path, monkeypatch):
    names = ['.hidden', 'a.tmp', '.a.other-machine.4194400.1.tmp', '.tmp', '.a.b.tmp', 'x/.keep.tmp']
    (tmp_path / 'x').mkdir()
    for name in names:
        (tmp_path / name).touch()
    monkeypatch.setattr(os, 'replace', lambda a, b: (_ for _ in ()).throw(KeyboardInterrupt))
    monkeypatch.setattr('pathlib.Path.unlink', lambda *a, **k: None)
    monkeypatch.setattr(os, 'getpid', lambda: 2**22 + 5)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / 'x' / 'f', b'')
    monkeypatch.undo()
    assert len(list(tmp_path.rglob('*'))) == len(names) + 2
    sweep(tmp_path)
    assert sorted(o.relative_to(tmp_path).as_posix() for o in tmp_path.rglob('*')) == sorted([*names, 'x'])
