"""bilevel/run/finished.py: data.json of real runs, and reading what they leave."""

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from run_helpers import finished_run, settings, train, train_until

import train_bilevel
from bilevel.errors import UserError
from bilevel.run.finished import read_data, read_finished
from bilevel.weights import chunks

Write = Callable[..., Path]


def text(n: int) -> list[dict]:
    return [{"text": f"record {i}"} for i in range(n)]


@pytest.fixture
def per_sample(write: Write, tmp_path: Path) -> Path:
    """Two files of three and two records; of the first, record 0 has two pieces and record 2 was dropped."""
    files = [write("data/a.json", text(3)), write("data/b, c.jsonl", '{"text": "x"}\n{"text": "y"}\n')]
    table = {"file": ["a.json"] * 3 + ["b, c.jsonl"] * 2, "index": [0, 0, 1, 0, 1], "weight": [0.1, 0.7, 1.2, 3.0, 0.0]}
    return finished_run(tmp_path / "run", files, pd.DataFrame(table), [3, 2])


@pytest.fixture
def per_source(write: Write, tmp_path: Path) -> Path:
    files = [write("data/a.json", text(6)), write("data/b.json", text(4))]
    table = {"source": ["a", "b"], "weight": [0.2, 0.8], "samples": [6, 4]}
    return finished_run(tmp_path / "run", files, pd.DataFrame(table))


def test_a_run_records_its_data_and_can_be_read_when_it_has_finished(data: Path, tmp_path: Path, no_old_log: None):
    """A run that is stopped and resumed, of sources of unequal size: c_i are those that its step uses."""
    noisy = json.loads((data / "train_noisy.json").read_text())[:48]
    (tmp_path / "train_noisy.json").write_text(json.dumps(noisy))
    files = [data / "train_clean.json", tmp_path / "train_noisy.json"]
    arguments = settings(data, tmp_path / "r", train_data=[str(file) for file in files], max_steps=3)
    train_until(1, arguments)
    with pytest.raises(UserError, match="is not finished"):
        read_finished(tmp_path / "r")
    first = (tmp_path / "r" / "data.json").read_bytes()
    assert train_bilevel.main(arguments) == 0 and (tmp_path / "r" / "data.json").read_bytes() == first
    for part, paths in {"train": files, "val": [data / "val.json"], "test": [data / "test.json"]}.items():
        for path, found in zip(paths, json.loads(first)[part], strict=True):
            n = len(json.loads(path.read_text()))
            sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
            assert found == {"file": path.name, "path": str(path), "sha256": sha256, "records": n, "samples": n}
    run = read_finished(str(tmp_path / "r"))
    p = pd.read_csv(tmp_path / "r" / "weights.csv")["weight"]
    assert run.name == "r" and not run.per_sample and run.settings.max_steps == 3
    np.testing.assert_allclose(run.weights[0], [144 * p[0] / 96] * 96, rtol=1e-12)
    np.testing.assert_allclose(run.weights[1], [144 * p[1] / 48] * 48, rtol=1e-12)
    assert np.concatenate(run.weights).mean() == pytest.approx(1)
    assert list(run.records(1)) == [(record, json.dumps(record)) for record in noisy]


def test_dropped_records_and_pieces_of_text_in_a_real_run(data: Path, tmp_path: Path, no_old_log: None):
    records = [{"text": "one two three. " * n} for n in (1, 40)] + [{"text": ""}] + text(40)
    (tmp_path / "text.json").write_text(json.dumps(records))
    out = tmp_path / "r"
    (tmp_path / "val.json").write_text(json.dumps(records))
    train(data, out, train_data=[str(tmp_path / "text.json")], val_data=[str(tmp_path / "val.json")], test_data=[],
          weights="sample", max_length=32, max_steps=3)  # fmt: skip
    (file,) = read_data(out).train
    rows = pd.read_csv(out / "weights.csv")
    assert (file.records, file.samples) == (43, len(rows)) and len(rows) > 43 and read_data(out).test == []
    (weights,) = read_finished(out).weights
    assert np.isnan(weights).nonzero()[0].tolist() == [2] and (out / "weights.png").exists()
    expected = rows.groupby("index")["weight"].mean()
    np.testing.assert_allclose(weights[expected.index], expected, rtol=1e-12)


@pytest.mark.parametrize("chunk", [1 << 20, 2])
def test_weights_of_records(per_sample: Path, monkeypatch: pytest.MonkeyPatch, chunk: int):
    monkeypatch.setattr(chunks, "CHUNK", chunk)
    run = read_finished(per_sample)
    np.testing.assert_array_equal(run.weights[0], [np.mean([0.1, 0.7]), 1.2, np.nan])
    np.testing.assert_array_equal(run.weights[1], [3.0, 0.0])
    assert run.per_sample and [*run.records(1)] == [({"text": t}, f'{{"text": "{t}"}}') for t in "xy"]


def test_weights_are_read_to_the_last_bit(write: Write, tmp_path: Path):
    weights = np.random.default_rng(0).random(500)
    table = pd.DataFrame({"file": "a.json", "index": range(500), "weight": weights})
    run = finished_run(tmp_path / "run", [write("a.json", text(500))], table)
    np.testing.assert_array_equal(read_finished(run).weights[0], weights)


def edit(name: str, old: str, new: str) -> Callable[[Path], None]:
    def change(run: Path) -> None:
        content = (run / name).read_text()
        assert old in content
        (run / name).write_text(content.replace(old, new))

    return change


UNREADABLE = {
    "no folder": (shutil.rmtree, "is no run's folder"),
    "no config": (lambda run: (run / "config.yaml").unlink(), "is no run's folder: it holds no config.yaml"),
    "not finished": (lambda run: (run / "weights.csv").unlink(), "is not finished"),
    "no data.json": (lambda run: (run / "data.json").unlink(), "run it again with --config"),
    "data.json of another shape": (lambda run: (run / "data.json").write_text("{}"), "is not what a run writes"),
    "data.json cut off": (lambda run: (run / "data.json").write_text('{"train": ['), "is not what a run writes"),
    "unknown setting": (edit("config.yaml", "alpha:", "beta:"), "of another version of this tool: beta: no such"),
    "data gone": (lambda run: (run.parent / "data" / "a.json").unlink(), r"a\.json: No such file.*put it back"),
    "data changed": (edit("../data/a.json", "record 1", "record 9"), r"a\.json is not the file that the run was made"),
    "weights.csv not text": (lambda run: (run / "weights.csv").write_bytes(b"\xff\xfe\x00"), "cannot be read"),
    "weights of another run": (edit("weights.csv", "a.json", "z.json"), "was made from other training files"),
}


@pytest.mark.parametrize("change, message", UNREADABLE.values(), ids=UNREADABLE)
def test_what_is_refused(per_sample: Path, change: Callable, message: str):
    """What is wrong within weights.csv is refused by its one reader (tests/weights/test_csv_file.py)."""
    change(per_sample)
    with pytest.raises(UserError, match=message):
        read_finished(per_sample)


def test_a_source_must_have_the_number_of_samples_that_it_had(per_source: Path):
    edit("weights.csv", "0.2,6", "0.2,7")(per_source)
    with pytest.raises(UserError, match="was made from other training files: its numbers of samples differ"):
        read_finished(per_source)
