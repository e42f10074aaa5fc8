"""bilevel/data/samples.py: samples of several sources, the cache, the stream of batches, micro-batches."""

import itertools
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizer_kinds import gpt2_tokenizer, tokenizer_of

from bilevel.data.batches import cuts
from bilevel.data.samples import Samples, load_samples
from bilevel.data.sources import Reading, file_source
from bilevel.data.stream import BatchStream, TrustedStream
from bilevel.data.tokenise import IGNORE, Tokeniser
from bilevel.errors import DataError
from bilevel.settings.run_length import steps_per_run

Write = Callable[..., Path]
EOS = "<|endoftext|>"
ALL = slice(None)


def record(response: str, **more: object) -> dict:
    return {"instruction": "Say it", "output": response, **more}


def load(*files: Path, max_length: int = 200, kind: str = "gpt2", format: str = "auto") -> Samples:
    return load_samples(
        [file_source(file, Reading(format)) for file in files], Tokeniser(tokenizer_of(kind), max_length, "response")
    )


def answers(samples: Samples) -> list[str]:
    tokenizer = tokenizer_of("gpt2")
    return [tokenizer.decode([i for i in labels if i != IGNORE]) for labels in samples.table["labels"]]


@pytest.fixture
def many(write: Write) -> Samples:
    """60 samples of two sources, responses of 0 to 58 words."""
    records = [record(" ".join(["the quick dog"] * (17 * i % 20))) for i in range(60)]
    return load(write("a.json", records[:25]), write("b.json", records[25:]))


# samples and the cache


def test_samples_know_source_and_record(write: Write) -> None:
    one = write("a.json", [record("one"), record("two", is_noisy=True)])
    two = write("b.json", [{"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "three"}]}])
    samples = load(one, two)
    assert (samples.sources, samples.files, len(samples)) == (["a", "b"], [file_source(one), file_source(two)], 3)
    assert samples.source_ids.tolist() == [0, 0, 1]
    assert samples.records(ALL).tolist() == [0, 1, 0]
    assert samples.is_noisy.tolist() == [False, True, False]
    assert answers(samples) == ["one" + EOS, "two" + EOS, "three" + EOS]
    assert load(two).is_noisy is None


@pytest.mark.parametrize(("n", "batch", "steps"), [(100, 8, 20), (100, 8, 3), (30, 8, 50), (700, 32, 40), (64, 64, 5)])
def test_samples_that_are_kept_back_come_once_each_in_the_first_pass(n: int, batch: int, steps: int) -> None:
    """Half of all, at most 256 and as many as the batches can take; then the order is plain."""
    stream, seen, fresh = TrustedStream(n, batch, 3, steps, keeps=True), set(), []
    for _ in range(steps + 1):
        drawn = next(stream).tolist()
        if stream.reserve:
            assert not set(stream.fresh.tolist()) & seen and set(stream.fresh.tolist()) <= set(drawn)
            fresh.append(len(stream.fresh))
        assert len(drawn) == batch
        seen |= set(drawn)
    expected = min(256, n - max(batch, -(-n // 2)), steps * batch)
    assert sum(fresh) == expected and (not expected or fresh[0] == 0)  # at the first step u and w are the same
    assert not fresh or max(fresh[1:]) - min(fresh[1:]) <= 1
    plain = BatchStream(n, batch, 3)
    if not expected:
        assert stream.fresh is None and next(stream).tolist() == [next(plain) for _ in range(steps + 2)][-1].tolist()
    else:
        assert [next(stream).tolist() for _ in range(3)] == [next(plain).tolist() for _ in range(3)]
        assert not len(stream.fresh)


def test_without_keeping_back_the_order_is_plain_and_its_first_pass_is_fresh() -> None:
    stream, plain, fresh = TrustedStream(50, 16, 3, 9, keeps=False), BatchStream(50, 16, 3), []
    for step in range(6):
        drawn = next(stream)
        assert torch.equal(drawn, next(plain))
        fresh += [] if stream.fresh is None else stream.fresh.tolist()
        assert (stream.fresh is None) == (step > 3)
    assert sorted(fresh) == list(range(50))
    large = TrustedStream(10_000, 50, 3, 9, keeps=False)
    found = [large.fresh for _ in range(200) if next(large) is not None]
    assert [len(fresh) for fresh in found[:128]] == [2] * 128 and set(found[128:]) == {None}  # 256 in all are enough


@pytest.mark.parametrize("keeps", [True, False])
def test_a_resumed_stream_of_trusted_samples_goes_on(keeps: bool) -> None:
    for done in (0, 4, 12, 15):
        whole, parts = (TrustedStream(60, 8, 1, 12, keeps) for _ in range(2))
        for _ in range(done):
            next(whole)
        parts.load_state_dict(whole.state_dict())
        for _ in range(12):
            assert torch.equal(next(whole), next(parts))
            assert (whole.fresh is None) == (parts.fresh is None)
            assert whole.fresh is None or torch.equal(whole.fresh, parts.fresh)


def test_text_gives_several_samples_of_one_record(write: Write) -> None:
    samples = load(
        write("t.json", [{"text": "the quick brown fox " * 9}, {"text": ""}, {"text": "dog"}]), max_length=16
    )
    assert len(samples) > 3 and max(map(len, samples.table["input_ids"])) <= 16
    assert set(samples.records(ALL).tolist()) == {0, 2} and samples.dropped == [1]
    assert samples.records(ALL).tolist() == sorted(samples.records(ALL))


def test_samples_that_are_cut_are_counted(write: Write) -> None:
    """Beside the lengths without a limit; pieces of a text are not cut, as they go on in the next piece."""
    file = write("a.json", [record(" ".join(["the quick dog"] * number)) for number in range(1, 21)])
    whole = [len(ids) for ids in load(file, max_length=10_000).table["input_ids"]]
    cut = sum(length >= 40 for length in whole)
    assert 0 < cut < 20 and whole.count(40) == 0
    note = f"{cut} of 20 samples fill max_length 40; what is beyond it is cut off"
    assert load(file, max_length=40).notes == [[note]]
    assert load(file, max_length=max(whole) + 1).notes == [[]]
    assert load(write("t.json", [{"text": "the quick brown fox " * 9}]), max_length=16).notes == [[]]


def test_record_without_response_within_max_length_is_dropped_and_counted(write: Write) -> None:
    prompt = len(tokenizer_of("gpt2")("### Instruction:\nSay it\n\n### Response:\n")["input_ids"])
    long = {**record("never seen"), "instruction": "Say it " * 99}
    one = write("one.json", [long, record("kept"), long])
    two = write("two.json", [record("kept"), record("also")])
    three = write("three.json", [long] * 1500 + [record("kept")])  # a whole batch of the tokenisation is dropped
    samples = load(one, three, two, max_length=prompt + 1)
    assert samples.dropped == [2, 1500, 0]
    assert samples.records(ALL).tolist() == [1, 1500, 0, 1]
    assert samples.source_ids.tolist() == [0, 1, 2, 2]
    assert all(len(ids) == prompt + 1 and ids[-1] != 0 for ids in samples.table["input_ids"])  # cut, so no EOS
    with pytest.raises(DataError, match=r"one\.json: no record has a supervised token within max_length") as caught:
        load(one, two, max_length=prompt)
    assert "raise max_length" in str(caught.value)


def test_record_that_the_template_refuses_is_named_with_its_file(write: Write) -> None:
    talk = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    system = [*talk, {"role": "system", "content": "z"}, talk[1]]  # only the first can go before a question
    path = write("chat.json", [{"messages": messages} for messages in (talk, talk, system, talk)])
    with pytest.raises(DataError) as caught:
        load(path, kind="llama2")
    assert str(caught.value).startswith(f"{path}, record 2: the tokenizer's chat template refuses it: ")


def test_all_records_that_a_template_refuses_are_named(write: Write) -> None:
    """Also those of later batches: every fiftieth conversation has a system message that the template cannot place."""
    talk = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]
    system = [*talk, {"role": "system", "content": "z"}, talk[1]]
    path = write("chat.json", [{"messages": system if i % 50 == 7 else talk} for i in range(1300)])
    with pytest.raises(DataError) as caught:
        load(path, kind="llama2")
    named = ", ".join(str(i) for i in range(7, 500, 50))
    assert str(caught.value).startswith(f"{path}, records {named} and 16 more: the tokenizer's chat template")
    assert "System role not supported" in str(caught.value) and "\n" not in str(caught.value)


def test_bad_record_is_named_with_its_file(write: Write) -> None:
    path = write("bad.json", [record("x"), record(None)])
    with pytest.raises(DataError, match=r"bad\.json, record 1: 'output' must be text"):
        load(write("good.json", [record("x")]), path)


@pytest.fixture
def tokenised(monkeypatch) -> list[int]:
    """The number of records of each batch that was tokenised."""
    sizes: list[int] = []
    original = Tokeniser.__call__
    monkeypatch.setattr(
        Tokeniser, "__call__", lambda self, rows: (sizes.append(len(rows["index"])), original(self, rows))[1]
    )
    return sizes


def test_second_load_comes_from_the_cache(write: Write, tokenised: list[int]) -> None:
    path = write("cached.json", [record("cached"), record("too")])
    tokeniser = Tokeniser(gpt2_tokenizer(), 150, "response")
    first = load_samples([file_source(path)], tokeniser)
    assert tokenised == [2]
    again = load_samples([file_source(path)], tokeniser)
    other = load_samples([file_source(path)], Tokeniser(gpt2_tokenizer(), 150, "response"))
    assert tokenised == [2]
    assert list(first.table) == list(again.table) == list(other.table)


def test_what_changes_tokens_tokenises_anew(write: Write, tokenised: list[int]) -> None:
    path = write("changing.json", [record("once")])
    assert answers(load(path, max_length=151)) == ["once" + EOS]
    assert len(load(path, max_length=15).table["input_ids"][0]) == 15
    assert load(path, max_length=151, kind="llama").table["input_ids"][0][0] == 1
    assert tokenised == [1, 1, 1]
    path = write("changing.json", [record("twice"), record("more")])
    assert answers(load(path, max_length=151)) == ["twice" + EOS, "more" + EOS]
    path = write("changing.json", [record("once")])
    assert answers(load(path, max_length=151)) == ["once" + EOS]
    assert tokenised == [1, 1, 1, 2]


# batches


def epochs(stream: BatchStream, n: int, count: int) -> list[list[int]]:
    """The first `count` epochs of a stream over n samples."""
    numbers = [i for _ in range(-(-n * count // stream.batch_size)) for i in next(stream).tolist()]
    return [numbers[i : i + n] for i in range(0, n * count, n)]


@pytest.mark.parametrize(("n", "batch_size"), [(10, 3), (10, 5), (7, 1), (4, 4), (3, 10), (1, 4), (5, 12)])
def test_stream_takes_each_sample_once_per_epoch(n: int, batch_size: int) -> None:
    orders = epochs(BatchStream(n, batch_size, seed=0), n, 5)
    assert [sorted(order) for order in orders] == [list(range(n))] * 5
    assert n < 5 or len({tuple(order) for order in orders}) == 5
    stream = BatchStream(n, batch_size, seed=0)
    assert all(next(stream).shape == (batch_size,) and next(stream).dtype == torch.int64 for _ in range(9))


def test_stream_is_a_function_of_the_seed() -> None:
    state = torch.get_rng_state()
    same = [epochs(BatchStream(100, 7, seed=3), 100, 2) for _ in range(2)]
    assert same[0] == same[1]
    assert same[0] != epochs(BatchStream(100, 7, seed=4), 100, 2)
    assert torch.equal(torch.get_rng_state(), state)
    # The order does not depend on how it is cut into batches.
    assert epochs(BatchStream(100, 64, seed=3), 100, 2) == same[0]


@pytest.mark.parametrize("before", range(9))
def test_stream_goes_on_from_its_state(before: int) -> None:
    stream = BatchStream(10, 4, seed=1)
    for _ in range(before):
        next(stream)
    state = stream.state_dict()
    other = BatchStream(10, 4, seed=1)
    next(other)
    other.load_state_dict(state)
    assert [next(other).tolist() for _ in range(9)] == [next(stream).tolist() for _ in range(9)]


def test_stream_over_huge_data_stores_no_order() -> None:
    n = 10**8
    tracemalloc.start()
    stream = BatchStream(n, 64, seed=0)
    drawn = [next(stream) for _ in range(20)]
    stream.load_state_dict({"epoch": 7, "position": n - 30})
    drawn.append(next(stream))
    assert tracemalloc.get_traced_memory()[1] < 100_000
    tracemalloc.stop()
    assert stream.state_dict() == {"epoch": 8, "position": 34}
    assert len(torch.cat(drawn[:20]).unique()) == 20 * 64 and torch.cat(drawn).max() > 0.9 * n


# micro-batches


@pytest.mark.parametrize("budget", [1, 30, 64, 200, 1000, 10**6])
def test_micro_batches(many: Samples, budget: int) -> None:
    rows = {i: (row["input_ids"], row["labels"]) for i, row in enumerate(many.table)}
    batch = next(BatchStream(len(many), 40, seed=0))
    micro = many.batch(batch, budget).micro_batches
    assert sorted(i for part in micro for i in part.sample_ids.tolist()) == sorted(batch.tolist())
    lengths = [len(rows[i][0]) for part in micro for i in part.sample_ids.tolist()]
    assert lengths == sorted(lengths, reverse=True)
    for part in micro:
        count, width = part.input_ids.shape
        assert part.targets.shape == (count, width) and part.sample_ids.shape == (count,) and count >= 1
        assert count * width <= budget or count == 1
        assert width == max(len(rows[i][0]) for i in part.sample_ids.tolist()) - 1
        for row, i in enumerate(part.sample_ids.tolist()):
            ids, labels = rows[i]
            # Position t reads token t and predicts token t + 1; what lies behind the sample is ignored.
            inputs, targets = [0] * width, [IGNORE] * width
            for t in range(len(ids) - 1):
                inputs[t], targets[t] = ids[t], labels[t + 1]
            assert part.input_ids[row].tolist() == inputs and part.targets[row].tolist() == targets


@pytest.mark.parametrize("budget", [1, 16, 40, 100, 1000])
def test_cuts_are_the_cheapest(budget: int) -> None:
    """Compared with all ways to cut."""
    random = np.random.default_rng(budget)
    for n in range(1, 9):
        lengths = np.sort(random.integers(1, 30, n))[::-1]

        def cost(marks: tuple[int, ...], lengths: np.ndarray = lengths) -> float:
            parts = list(itertools.pairwise((0, *marks, len(lengths))))
            sizes = [(end - start) * lengths[start] for start, end in parts]
            fits = all(size <= budget or end - start == 1 for size, (start, end) in zip(sizes, parts, strict=True))
            return sum(sizes) + len(parts) * budget / 32 if fits else np.inf

        every_way = (marks for count in range(n) for marks in itertools.combinations(range(1, n), count))
        found = cuts(lengths, budget)
        assert found[0][0] == 0 and found[-1][1] == n
        assert all(one[1] == two[0] for one, two in itertools.pairwise(found))
        assert cost(tuple(start for start, _ in found[1:])) == min(map(cost, every_way)) < np.inf


def test_micro_batches_of_a_sample_drawn_twice(many: Samples) -> None:
    [micro] = many.batch(torch.tensor([5, 5, 2]), 10**6).micro_batches
    assert sorted(micro.sample_ids.tolist()) == [2, 5, 5]


def test_in_order_takes_each_sample_once(many: Samples) -> None:
    parts = list(many.in_order(token_budget=300, chunk=16))
    numbers = [part.sample_ids.tolist() for part in parts]
    assert sorted(itertools.chain(*numbers)) == list(range(60))
    assert all(max(part) // 16 == min(part) // 16 for part in numbers)
    assert all(part.input_ids.numel() <= 300 or len(part.input_ids) == 1 for part in parts)


def test_samples_are_not_changed_by_use(many: Samples) -> None:
    before, known = list(many.table), np.array(many.records(ALL))
    list(many.in_order(100))
    assert list(many.table) == before and (many.records(ALL) == known).all()


@pytest.mark.parametrize(
    ("n", "batch_size", "passes", "max_steps", "steps"),
    [
        (100, 10, 1.0, None, 10),
        (101, 10, 1.0, None, 11),
        (100, 10, 0.01, None, 1),
        (100, 10, 2.5, None, 25),
        (9, 9, 9, 4, 4),
    ],
)
def test_steps_per_run(n: int, batch_size: int, passes: float, max_steps: int | None, steps: int) -> None:
    assert steps_per_run(n, batch_size, passes, max_steps) == steps
