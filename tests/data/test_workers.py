"""bilevel/data/workers.py: whatever the number of processes, the cache and the messages are the same."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from run_helpers import ROOT
from tokenizer_kinds import chatml_tokenizer, tokenizer_of

from bilevel.data import rows, samples, workers
from bilevel.data.bad_records import BadRecords
from bilevel.data.records import parts
from bilevel.data.samples import load_samples
from bilevel.data.sources import Reading, file_source
from bilevel.data.tokenise import Tokeniser
from bilevel.errors import DataError, UserError

COUNTS = (1, 2, 5)
ALPACA = [{"instruction": f"Question {i}?", "output": f"Answer {i}. </s>"} for i in range(300)]
CHATS = [
    {"messages": [{"role": "user", "content": f"q {i}"}, {"role": "assistant", "content": f"a {i}"}]}
    for i in range(300)
]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (rows, samples):
        monkeypatch.setattr(module, "ROWS", 20)


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    return lambda count: monkeypatch.setattr(workers, "processes", lambda: count)


def outcome(path: Path, tokeniser: Tokeniser, folder: Path, skip: int = 0) -> object:
    """The names of the files in a fresh cache, which are the hashes of their bytes, and the notes; or the message."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_DATASETS_CACHE", str(folder))
        try:
            found = load_samples([file_source(path, Reading(skip_bad_records=skip))], tokeniser)
        except DataError as error:
            return str(error), sorted(path.name for path in folder.rglob("*.new"))
    return found.notes, found.read_as, sorted(path.name for path in folder.rglob("*.arrow"))


def write_lines(path: Path, records: list[dict], bad: dict[int, str]) -> Path:
    lines = [json.dumps(record) for record in records]
    path.write_text("".join(bad.get(i, line) + "\n" for i, line in enumerate(lines)))
    return path


BAD = {3: '{"instruction": 1}', 150: "{", 151: '"text"', 290: '{"other": 1}'}
CASES = {
    "alpaca": (ALPACA, "gpt2", {}, 0),
    "chat": (CHATS, "chatml", {}, 0),
    "bad from the beginning": (ALPACA, "gpt2", dict.fromkeys(range(120), "{"), 120),
    "bad, left out": (ALPACA, "gpt2", BAD, 4),
    "bad, refused": (ALPACA, "gpt2", BAD, 3),
}


@pytest.mark.parametrize(
    "case", ["bad, left out", *(pytest.param(c, marks=pytest.mark.slow) for c in CASES if c != "bad, left out")]
)
def test_cache_and_messages_are_the_same(tmp_path: Path, processes: Callable[[int], None], case: str) -> None:
    records, kind, bad, skip = CASES[case]
    path = write_lines(tmp_path / "a.jsonl", records, bad)
    tokeniser = Tokeniser(chatml_tokenizer() if kind == "chatml" else tokenizer_of(kind), 64, "response")
    found = []
    for count in COUNTS:
        processes(count)
        found.append(outcome(path, tokeniser, tmp_path / f"cache{count}", skip))
    assert found[0] == found[1] == found[2]
    if case == "bad, refused":
        said = found[0][0].splitlines()
        assert [line.partition(":")[0] for line in said] == [f"{path}, record {i}" for i in BAD] and not found[0][1]


@pytest.mark.slow
@pytest.mark.parametrize("ending", [".json", ".csv", ".parquet"])
def test_records_of_other_containers_are_shared_out(
    tmp_path: Path, processes: Callable[[int], None], ending: str
) -> None:
    import pandas as pd

    path = tmp_path / f"a{ending}"
    frame = pd.DataFrame(ALPACA)
    if ending == ".json":
        path.write_text(json.dumps(ALPACA))
    else:
        getattr(frame, f"to_{ending[1:]}")(path, index=False)
    tokeniser, found = Tokeniser(tokenizer_of("gpt2"), 64, "response"), []
    for count in COUNTS:
        processes(count)
        found.append(outcome(path, tokeniser, tmp_path / f"cache{count}"))
    assert found[0] == found[1] == found[2] and len(found[0][2]) == 2


@pytest.mark.slow
def test_a_template_that_refuses_records(tmp_path: Path, processes: Callable[[int], None]) -> None:
    """All are named, in order, and left out if skip_bad_records allows it; the cache keeps what was said."""
    path = write_lines(tmp_path / "a.jsonl", CHATS, {7: "{"})
    tokenizer = chatml_tokenizer()
    refuses = "{% if messages[0].content in ['q 5', 'q 250'] %}{{ raise_exception('not five') }}{% endif %}"
    tokenizer.chat_template = refuses + tokenizer.chat_template
    tokeniser, allowed, refused = Tokeniser(tokenizer, 64, "response"), [], []
    for count in COUNTS:
        processes(count)
        refused.append(outcome(path, tokeniser, tmp_path / f"refused{count}", 2)[0])
        allowed.append(outcome(path, tokeniser, tmp_path / f"allowed{count}", 3))
        assert outcome(path, tokeniser, tmp_path / f"allowed{count}", 3) == allowed[-1]
    assert refused[0] == refused[1] == refused[2] and allowed[0] == allowed[1] == allowed[2]
    said = [line.partition(":")[0] for line in refused[0].splitlines()]
    assert said == [f"{path}, record 7", f"{path}, records 5 and 250"]
    assert "not five" in refused[0] and allowed[0][0][0][0].startswith("3 left out (skip_bad_records): ")


def test_left_out_samples_are_those_of_the_other_records(tmp_path: Path) -> None:
    tokenizer = chatml_tokenizer()
    refuses = "{% if messages[0].content in ['q 5', 'q 250'] %}{{ raise_exception('not five') }}{% endif %}"
    whole = load_samples([file_source(write_lines(tmp_path / "a.jsonl", CHATS, {}))], Tokeniser(tokenizer, 64, "all"))
    tokenizer.chat_template = refuses + tokenizer.chat_template
    source = file_source(tmp_path / "a.jsonl", Reading(skip_bad_records=2))
    found = load_samples([source], Tokeniser(tokenizer, 64, "all"))
    kept = [i for i in range(300) if i not in (5, 250)]
    assert found.records(slice(None)).tolist() == kept and found.unread == [2] and found.dropped == [0]
    assert [row["input_ids"] for row in found.tokens] == [whole.tokens[i]["input_ids"] for i in kept]


def test_a_small_input_starts_no_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_lines(tmp_path / "a.jsonl", ALPACA[: 20 * workers.ALONE], {})
    monkeypatch.setattr(workers, "processes", lambda: 4)
    monkeypatch.setattr(workers, "ProcessPoolExecutor", lambda *_: pytest.fail("a process was started"))
    assert len(load_samples([file_source(path)], Tokeniser(tokenizer_of("gpt2"), 64, "response"))) == 80


def test_a_renderer_at_work_is_not_shared(tmp_path: Path, processes: Callable[[int], None]) -> None:
    """The first source is rendered here, the second by forks, the third here again by the process of the first."""
    processes(3)
    few, many = CHATS[:10], [{"messages": [{**m, "content": m["content"] + "!"} for m in c["messages"]]} for c in CHATS]
    sources = [write_lines(tmp_path / f"{name}.jsonl", records, {}) for name, records in
               {"a": few, "b": many, "c": [*few[:-1], few[0]]}.items()]  # fmt: skip
    tokeniser = Tokeniser(chatml_tokenizer(), 64, "response")
    found = load_samples(list(map(file_source, sources)), tokeniser)
    assert tokeniser._renderer._process.poll() is None
    texts = [tokeniser.tokenizer.decode(row["input_ids"]) for row in found.tokens]
    assert all(f"q {i}!" in text and f"a {i}!" in text for i, text in enumerate(texts[10:310])) and len(texts) == 320


def killed(chunk: int) -> int:
    if chunk == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    return chunk


def test_a_killed_process_ends_all_with_a_message(processes: Callable[[int], None]) -> None:
    before = children(os.getpid())  # other tests' in the same process
    processes(2)
    with pytest.raises(UserError, match="was killed, perhaps because memory was short"):
        list(workers.in_order(killed, range(30)))
    assert set(children(os.getpid())) <= set(before)


def children(parent: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{parent}/task/{parent}/children").read_text().split()]


def test_an_error_of_the_function_is_raised_in_its_place(processes: Callable[[int], None]) -> None:
    def refuse(chunk: int) -> int:
        if chunk in (8, 9):
            raise BadRecords([f"record {chunk}: bad"], 1)
        return chunk

    processes(4)
    results = workers.in_order(refuse, range(30))
    assert [next(results) for _ in range(8)] == list(range(8))
    with pytest.raises(BadRecords, match="^record 8: bad") as caught:
        next(results)
    assert caught.value.lines == ["record 8: bad"] and caught.value.count == 1


def test_chunks_are_made_as_they_are_needed(processes: Callable[[int], None]) -> None:
    processes(2)
    made = []

    def chunks() -> Iterator[int]:
        for number in range(1000):
            made.append(number)
            yield number

    results = workers.in_order(abs, chunks())
    assert [next(results) for _ in range(20)] == list(range(20)) and len(made) < 40
    results.close()


PROGRAM = """
import os, sys, time
from bilevel.data import workers
from bilevel.run.interrupt import Interrupt
workers.processes = lambda: 2
def slow(chunk):
    time.sleep(0.05)
    return chunk
Interrupt().begin()
for chunk in workers.in_order(slow, range(10**6)):
    print(chunk, flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_signal_leaves_no_process(number: int) -> None:
    """Ctrl-C is sent to all of them, as a terminal does; SIGTERM and SIGKILL to the first alone."""
    program = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    while int(program.stdout.readline()) < 10:
        pass
    others = children(program.pid)
    assert len(others) == 2
    (os.killpg if number == signal.SIGINT else os.kill)(program.pid, number)
    said = program.stderr.read().decode()  # to the end: until the last of them has closed it
    assert program.wait(10) == (-number if number == signal.SIGKILL else 128 + number)
    assert (
        number == signal.SIGKILL
        or said == f"signal {number}: ended before the first step; the same command starts again\n"
    )
    deadline = time.monotonic() + 10
    while any(map(alive, others)):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    program.stdout.close()
    program.stderr.close()


def alive(process: int) -> bool:
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_parts_read_by_processes_hold_the_rows_in_order(tmp_path: Path, processes: Callable[[int], None]) -> None:
    processes(3)
    [part] = parts(file_source(write_lines(tmp_path / "a.jsonl", ALPACA, {})))
    assert part.table["index"].to_pylist() == list(range(300))
