"""bilevel/data/cache.py: whatever has become of the cache, the rows and tokens are those of the files."""

import contextlib
import errno
import fcntl
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from run_helpers import ROOT
from tokenizer_kinds import tokenizer_of

from bilevel.data import cache, workers
from bilevel.data.records import most_samples, read_rows
from bilevel.data.samples import load_samples
from bilevel.data.sources import file_source
from bilevel.data.tokenise import Tokeniser
from bilevel.errors import DataError

Write = Callable[..., Path]
RECORDS = [{"instruction": f"Question {i}?", "output": f"Answer {i}."} for i in range(40)]


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def load(file: Path) -> tuple[list, list]:
    """The rows of a file and its tokens."""
    assert most_samples(file_source(file)) == len(RECORDS)
    samples = load_samples([file_source(file)], Tokeniser(tokenizer_of("gpt2"), 64, "response"))
    return list(read_rows(file_source(file))), list(samples.tokens)


def arrows(cache: Path) -> list[Path]:
    return sorted(cache.rglob("*.arrow"))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
    "without its end": lambda path: os.truncate(path, path.stat().st_size - 1),
    "zeroed": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "200 bytes zeroed": lambda path: path.write_bytes(
        path.read_bytes()[: (at := path.stat().st_size // 2)] + bytes(200) + path.read_bytes()[at + 200 :]
    ),
    "a bit turned": lambda path: path.write_bytes(path.read_bytes()[:-9] + b"\x7f" + path.read_bytes()[-8:]),
    "a FIFO": lambda path: (path.unlink(), os.mkfifo(path)),
}


@pytest.mark.parametrize("kind", ["rows", "tokens"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_file_is_made_anew_with_a_line(write: Write, own: Path, caplog, damage: str, kind: str):
    file = write("a.json", RECORDS)
    whole = load(file)
    before = {path: path.read_bytes() for path in arrows(own)}
    assert len(before) == 2 and not caplog.text
    (damaged,) = [path for path in before if path.parts[-3] == kind]
    DAMAGES[damage](damaged)
    assert load(file) == whole and f"{damaged} in the cache" in caplog.text and "made anew" in caplog.text
    assert {path: path.read_bytes() for path in arrows(own)} == before
    caplog.clear()
    assert load(file) == whole and not caplog.text


def test_a_folder_in_the_place_of_a_file_is_done_without(write: Write, own: Path, caplog):
    file = write("a.json", RECORDS)
    whole = load(file)
    for path in arrows(own):
        path.unlink()
        path.mkdir()
    assert load(file) == whole and "going on without it, in memory" in caplog.text


def test_what_others_have_put_into_the_cache_is_not_read_or_removed(write: Write, own: Path, caplog):
    file = write("a.json", RECORDS)
    whole = load(file)
    others = [path.with_name(name) for path in arrows(own) for name in ("rows.arrow", "cache-1.arrow", "notes.txt")]
    for path in others:
        path.write_text("mine")
    assert load(file) == whole and not caplog.text and all(path.read_text() == "mine" for path in others)


@pytest.mark.parametrize("where", ["mkdir", "open", "write", "fsync", "rename"])
def test_without_room_or_permission_the_run_goes_on(write: Write, own: Path, monkeypatch, caplog, where: str):
    """Nothing half is left in the cache, and the next start with room writes it."""
    file = write("a.json", RECORDS)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        if where == "write":
            import datasets
            import pyarrow

            patch.setattr(pyarrow, "OSFile", full)
            patch.setattr(datasets.arrow_dataset.shutil, "move", lambda new, to: full(os.unlink(new)))
        elif where == "open":
            patch.setattr(cache, "fresh_file", full)
        else:
            owner = {"mkdir": Path, "fsync": os, "rename": Path}[where]
            patch.setattr(owner, where, full)
        found = load(file)
    assert "cannot be used" in caplog.text and "No space left on device" in caplog.text
    assert not [path for path in own.rglob("*") if path.is_file()]
    assert load(file) == found and len(arrows(own)) == 2


def test_a_file_in_the_place_of_the_cache(write: Write, own: Path, caplog):
    own.write_text("mine")
    load(write("a.json", RECORDS))
    assert own.read_text() == "mine" and f"the cache {own} cannot be used" in caplog.text


def test_a_mistake_in_the_data_is_still_a_mistake(write: Write, own: Path):
    with pytest.raises(DataError, match="record 1"):
        read_rows(file_source(write("a.json", [RECORDS[0], {"output": 1}])))
    assert not [path for path in own.rglob("*") if path.is_file()]


@pytest.mark.slow
def test_of_several_processes_one_makes_a_file(own: Path):
    """As the processes of torchrun do, which all read their files before they know of each other."""
    code = f"""
import os, time
from bilevel.data.cache import cached_file
def write(new):
    with open({str(own)!r} + ".log", "a") as log:
        log.write("made\\n")
    time.sleep(0.3)
    new.write_bytes(b"rows")
print(cached_file("rows", "key", write))
"""
    programs = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE) for _ in range(4)]
    said = {program.communicate(timeout=60)[0] for program in programs}
    assert len(said) == 1 and Path(f"{own}.log").read_text() == "made\n"


def test_who_waits_for_another_process_says_so(own: Path, monkeypatch, caplog):
    monkeypatch.setattr(cache, "PATIENCE", 0.2)
    (own / "rows" / "key").mkdir(parents=True)
    with open_folder(own / "rows" / "key") as descriptor:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        thread = threading.Timer(0.6, lambda: fcntl.flock(descriptor, fcntl.LOCK_UN))
        thread.start()
        assert cache.cached_file("rows", "key", lambda new: new.write_bytes(b"rows")).read_bytes() == b"rows"
        thread.join()
    assert caplog.text.count("waiting for another process on this machine") == 1


@contextlib.contextmanager
def open_folder(folder: Path) -> Iterator[int]:
    descriptor = os.open(folder, os.O_RDONLY)
    yield descriptor
    os.close(descriptor)


@pytest.mark.parametrize("error", [errno.ENOLCK, errno.EBADF])
def test_a_file_system_without_locks(own: Path, monkeypatch, caplog, error: int):
    def refuse(*_: object) -> None:
        raise OSError(error, "no locks")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert cache.cached_file("rows", "key", lambda new: new.write_bytes(b"rows")).read_bytes() == b"rows"
    assert not caplog.text


RANKS = {  # RANK, LOCAL_RANK of a process -> whether it is told that its host does not share the main process's cache
    "alone": (None, None, False),
    "main": ("0", "0", False),
    "beside the main process": ("1", "1", False),
    "first of another host": ("8", "0", True),
    "second of another host": ("9", "1", False),
}


@pytest.mark.parametrize("who", RANKS)
def test_a_host_without_the_shared_cache_is_told_once(write: Write, own: Path, monkeypatch, caplog, who: str):
    cache._say_apart.cache_clear()
    rank, local, told = RANKS[who]
    for name, value in {"RANK": rank, "LOCAL_RANK": local}.items():
        monkeypatch.setenv(name, value) if value else monkeypatch.delenv(name, raising=False)
    files = [write("a.json", RECORDS), write("b.json", RECORDS[1:])]
    load_samples(list(map(file_source, files)), Tokeniser(tokenizer_of("gpt2"), 64, "response"))
    assert caplog.text.count("does not share the cache") == told
    cache._say_apart.cache_clear()
    load_samples(list(map(file_source, files)), Tokeniser(tokenizer_of("gpt2"), 64, "response"))
    assert caplog.text.count("does not share the cache") == told  # all is in the cache now


def test_without_a_cache_the_processes_of_a_machine_share_its_processors(write: Write, own: Path, monkeypatch):
    own.write_text("mine")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    monkeypatch.setattr(workers.os, "sched_getaffinity", lambda _: range(12))
    seen, call = [], Tokeniser.__call__
    monkeypatch.setattr(Tokeniser, "__call__", lambda *rows: seen.append(workers.processes()) or call(*rows))
    load(write("a.json", RECORDS))
    assert seen == [3] and workers.processes() == 12


# ----------------------------------------------------------------------------------------------------------------------
# chosen rows of a large table


def batches(number: int, rows: int, length: int) -> pyarrow.Table:
    """A table of so many batches, with texts of so many bytes, one list of texts in each row."""
    texts = [[chr(97 + (start + row) % 26) * length] for start in range(number) for row in range(rows)]
    schema = pyarrow.schema({"contents": pyarrow.list_(pyarrow.large_string()), "index": pyarrow.int64()})
    parts = [texts[start * rows : (start + 1) * rows] for start in range(number)]
    index = range(number * rows)
    numbers = [index[start * rows : (start + 1) * rows] for start in range(number)]
    made = [
        pyarrow.record_batch([pyarrow.array(p, schema.field(0).type), pyarrow.array(n, pyarrow.int64())], schema=schema)
        for p, n in zip(parts, numbers, strict=True)
    ]
    return pyarrow.Table.from_batches([*made, made[0].slice(0, 0)], schema)


def selected(table: pyarrow.Table, places: list[int]) -> tuple[pyarrow.Table, int]:
    """What is written of the table, and the most bytes that were allocated in addition; places as arrow gives them."""
    before, pool = pyarrow.default_memory_pool(), pyarrow.proxy_memory_pool(pyarrow.default_memory_pool())
    sink = pyarrow.BufferOutputStream()
    pyarrow.set_memory_pool(pool)
    try:
        cache.write_selected(table, np.array(places, dtype=np.uint64), sink)
        return pyarrow.ipc.open_stream(sink.getvalue()).read_all(), pool.max_memory()
    finally:
        pyarrow.set_memory_pool(before)


@pytest.mark.parametrize("places", [[], [0], [6], [0, 1, 2, 3, 5, 13], list(range(14))], ids=str)
def test_chosen_rows_are_those_of_the_table(places: list[int]) -> None:
    table = batches(7, 2, 3)
    assert selected(table, places)[0].to_pylist() == [table.to_pylist()[place] for place in places]


def test_chosen_rows_of_a_large_table_take_the_memory_of_one_batch() -> None:
    """Table.take would put all batches together, once for each call."""
    table = batches(100, 10, 10_000)  # 10 MB
    found, peak = selected(table, list(range(3, 1000, 100)))
    assert found.num_rows == 10 and peak < 1_000_000
    assert len(found.to_batches()) == 1  # or each would be read and tokenised by itself
