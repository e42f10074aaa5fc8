"""bilevel/weights/csv_file.py: weights.csv of many records, written and read a chunk at a time, and what is refused.

Both readers are checked, x_init's (bilevel/weights/start.py) and that of finished runs (bilevel/run/finished.py).
"""

import io
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from run_helpers import finished_run
from samples_helpers import NAMES, SIZES, make_samples, make_weights

from bilevel.errors import UserError
from bilevel.run.finished import read_finished
from bilevel.weights import chunks
from bilevel.weights.csv_file import write_weights
from bilevel.weights.fixed import FixedSourceWeights
from bilevel.weights.start import read_start


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "CHUNK", 64)


@pytest.mark.parametrize("noisy", [True, False])
def test_weights_csv_is_what_pandas_writes_at_once(tmp_path: Path, noisy: bool):
    samples, weights = make_samples(noisy=noisy), make_weights()
    write_weights(tmp_path / "weights.csv", weights, samples)
    table = {"file": np.repeat(NAMES, SIZES), "index": np.concatenate([np.arange(0, 2 * n, 2) for n in SIZES])}
    table["weight"] = weights.coefficients(torch.arange(200)).numpy()
    if noisy:
        table["is_noisy"] = np.concatenate([np.arange(n) % 3 == 0 for n in SIZES])
    every = slice(0, 200)
    table["mean_gap"] = weights.records.means(every)
    table["harmful_share"] = weights.records.harmful_share(weights.records.harm(), every)
    assert (tmp_path / "weights.csv").read_text() == pd.DataFrame(table).to_csv(index=False)
    assert [path.name for path in tmp_path.iterdir()] == ["weights.csv"]
    start = read_start(str(tmp_path / "weights.csv"), True, samples)
    torch.testing.assert_close(start, torch.tensor(table["weight"]), rtol=1e-12, atol=0)


def test_scores_of_a_baseline_are_written_beside_the_weights(tmp_path: Path):
    samples, scores, path = make_samples(), torch.arange(200.0, dtype=torch.float64), tmp_path / "weights.csv"
    write_weights(path, make_weights(), samples, scores)
    assert pd.read_csv(path)["score"].tolist() == scores.tolist()
    weights = FixedSourceWeights(samples.source_ids, torch.tensor([0.5, 0.5, 0.0]))
    write_weights(path, weights, samples, scores)
    table = pd.read_csv(path)
    assert table["score"].tolist() == pytest.approx([part.mean() for part in np.split(np.arange(200), [100, 130])])
    assert list(table) == ["source", "weight", "samples", "score"] and table["samples"].tolist() == SIZES


def test_weights_of_other_files_are_refused(tmp_path: Path):
    path = tmp_path / "weights.csv"
    write_weights(path, make_weights(), make_samples())
    others = {
        "expected record 0 of f.json": make_samples([*NAMES[:2], "f.json"]),
        "it has 200 rows, expected 201": make_samples(sizes=[100, 30, 71]),
        "line 132 is about record 0 of e.json, expected record 60 of": make_samples(sizes=[100, 31, 69]),
        "more than 130 rows": make_samples(NAMES[:2], SIZES[:2]),
        "line 101 is about record 198 of a, b.json, expected record 0 of": make_samples(sizes=[99, 30, 70]),
    }
    for message, other in others.items():
        with pytest.raises(UserError, match=f"x_init .* was made from other training files: .*{message}"):
            read_start(str(path), True, other)
    with pytest.raises(UserError, match="expected columns source, weight, found file, index, weight, is_noisy"):
        read_start(str(path), False, make_samples())


# A fault in weights.csv, and what every reader says about it. Rows are a.json 0, 1, 2 and b.json 0, 1.
SAMPLE_ROWS = "file,index,weight\na.json,0,0.5\na.json,1,1.5\na.json,2,1.0\nb.json,0,2.0\nb.json,1,0.0\n"
SOURCE_ROWS = "source,weight,samples\na,0.25,3\nb,0.75,2\n"
FAULTS = {
    "empty": ("", "cannot be read"),
    "header only": (SAMPLE_ROWS.splitlines()[0] + "\n", "it has 0 rows, expected 5"),
    "no weight": (SAMPLE_ROWS.replace("weight", "w"), "expected columns file, index, weight, found file, index, w"),
    "other kind": (SOURCE_ROWS, "this file is of a run with weights=source"),
    "no number": (SAMPLE_ROWS.replace("1.5", "many"), "line 3: weight 'many'; weights must be numbers"),
    "true": (SAMPLE_ROWS.replace("1.5", "True"), "line 3: weight 'True'; weights must be numbers"),
    "nothing": (SAMPLE_ROWS.replace("1.5", ""), "line 3: weight ''; weights must be numbers"),
    "nan": (SAMPLE_ROWS.replace("1.5", "nan"), "line 3: weight .*nan.*; weights must be numbers"),
    "infinite": (SAMPLE_ROWS.replace("1.5", "inf"), "line 3: weight .*inf.*; weights must be numbers"),
    "negative": (SAMPLE_ROWS.replace("1.5", "-1.5"), "line 3: weight .*-1.5.*; weights must be numbers, none negative"),
    "all zero": (re.sub(r"\d\.\d", "0", SAMPLE_ROWS), "every weight is 0"),
    "other file": (SAMPLE_ROWS.replace("b.json", "c.json"), "line 5 is about record 0 of c.json, expected"),
    "row missing": (SAMPLE_ROWS.replace("a.json,1,1.5\n", ""), "line . is about record . of .*, expected"),
    "last row missing": (SAMPLE_ROWS.replace("b.json,1,0.0\n", ""), "it has 4 rows, expected 5"),
    "row too many": (SAMPLE_ROWS + "b.json,1,0.0\n", "it has more than 5 rows"),
    "index past the end": (SAMPLE_ROWS.replace("a.json,2", "a.json,3"), "line 4 is about record 3 of a.json, expected"),
    "index below 0": (SAMPLE_ROWS.replace("a.json,1", "a.json,-1"), "line 3 is about record -1 of a.json, expected"),
    "index no number": (SAMPLE_ROWS.replace("a.json,1", "a.json,x"), "index must be a whole number"),
}
SOURCE_FAULTS = {
    "no weight": (SOURCE_ROWS.replace("weight", "w"), "expected columns source, weight, found source, w, samples"),
    "other kind": (SAMPLE_ROWS, "this file is of a run with weights=sample"),
    "other source": (SOURCE_ROWS.replace("a,", "z,"), "its sources are z, b, expected a, b"),
    "other order": ("source,weight,samples\nb,0.75,2\na,0.25,3\n", "its sources are b, a, expected a, b"),
    "source missing": (SOURCE_ROWS.replace("b,0.75,2\n", ""), "it has 1 rows, expected 2"),
    "source too many": (SOURCE_ROWS + "c,0.0,1\n", "it has more than 2 rows"),
    "negative": (SOURCE_ROWS.replace("0.25", "-0.25"), "line 2: weight .*-0.25.*; weights must be numbers"),
    "all zero": (re.sub(r"\d\.\d+", "0", SOURCE_ROWS), "every weight is 0"),
}


@pytest.mark.parametrize("chunk", [1 << 20, 2])
@pytest.mark.parametrize(
    ("rows", "message", "per_sample"),
    [(*fault, True) for fault in FAULTS.values()] + [(*fault, False) for fault in SOURCE_FAULTS.values()],
    ids=[*(f"sample {name}" for name in FAULTS), *(f"source {name}" for name in SOURCE_FAULTS)],
)
def test_both_readers_refuse_the_same_faults(
    write: Callable[..., Path], tmp_path: Path, monkeypatch, rows: str, message: str, per_sample: bool, chunk: int
):
    monkeypatch.setattr(chunks, "CHUNK", chunk)
    files = [write(f"{name}.json", [{"text": str(i)} for i in range(n)]) for name, n in (("a", 3), ("b", 2))]
    good = SAMPLE_ROWS if per_sample else SOURCE_ROWS
    path = finished_run(tmp_path / "run", files, pd.read_csv(io.StringIO(good))) / "weights.csv"
    samples = make_samples(["a.json", "b.json"], [3, 2], step=1)
    read_start(path, per_sample, samples), read_finished(path.parent)
    path.write_text(rows)
    with pytest.raises(UserError, match=f"^x_init {re.escape(str(path))}.*{message}"):
        read_start(path, per_sample, samples)
    with pytest.raises(UserError, match=f"^{re.escape(str(path))}.*{message}"):
        read_finished(path.parent)


def test_a_start_per_source_may_come_from_other_numbers_of_samples(write: Callable[..., Path], tmp_path: Path):
    """Another tokenizer cuts other pieces; a finished run has the numbers of its own weights.csv."""
    samples = make_samples(["a.json", "b.json"], [3, 2])
    path = write("weights.csv", SOURCE_ROWS.replace("0.25,3", "0.25,7"))
    assert read_start(path, False, samples).tolist() == [0.25, 0.75]
    assert read_start(write("own.csv", "source,weight\na,1\nb,3\n"), False, samples).tolist() == [0.25, 0.75]
