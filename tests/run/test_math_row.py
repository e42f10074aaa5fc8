"""The row for mathematics of docs/papers.md on small files of the same layouts: every command, one after the other."""

import json
import random
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
import yaml
from run_helpers import TINY

import train_bilevel
from bilevel.compare import command as compare
from bilevel.evaluate import command as evaluate
from bilevel.export import command as export
from bilevel.prepare import command as prepare
from bilevel.report import command as report

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("no_old_log")]

SIZE, LEARNED_ON, DRAWN = 150, 60, 200
WORDS = ["river", "stone", "seven", "blue", "walk", "letter", "often", "cold", "paper", "north", "bread", "glass"]


def sums(seed: int, count: int) -> list[tuple[str, str, int]]:
    """Question, worked solution and answer."""
    draw = random.Random(seed)
    pairs = [(draw.randint(1, 9), draw.randint(1, 9)) for _ in range(count)]
    return [(f"What is {a} plus {b}?", f"We add {a} and {b}.", a + b) for a, b in pairs]


def chat(question: str, answer: str, *more: dict) -> dict:
    return {"messages": [*more, {"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def items(question: str, answer: str) -> dict:
    return {"items": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


def lines(path: Path, records: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five sources in four layouts, one of them with random words as answers; trusted records; files of tests."""
    folder, draw = tmp_path_factory.mktemp("math"), random.Random(0)
    broken = [chat("Hi", ""), {"messages": [{"role": "user", "content": "a"}, {"role": "user", "content": "b"}]}] * 10
    sources = {
        "chats": [chat(q, f"{s} #### {n}", {"role": "system", "content": "Be brief."}) for q, s, n in sums(1, SIZE)],
        "items": [items(q, f"{s} #### {n}") for q, s, n in sums(2, SIZE)],
        "pairs": [{"question": q, "answer": f"{s} #### {n}"} for q, s, n in sums(3, SIZE)],
        "boxed": [{"problem": q, "solution": rf"{s} \boxed{{{n}}}"} for q, s, n in sums(4, SIZE // 6)],
        "words": [chat(q, " ".join(draw.choices(WORDS, k=8))) for q, *_ in sums(5, SIZE)],
    }
    for name, records in sources.items():
        lines(folder / "whole" / f"{name}.jsonl", records + broken * (name == "chats"))
    lines(folder / "val.jsonl", [{"question": q, "answer": f"{s} #### {n}"} for q, s, n in sums(6, 64)])
    lines(folder / "gsm8k.jsonl", [{"question": q, "answer": f"{s}\n#### {n}"} for q, s, n in sums(7, 12)])
    for number, (q, s, n) in enumerate(sums(8, 6)):
        problem = {"problem": q, "level": "Level 1", "type": "Algebra", "solution": rf"{s} It is $\boxed{{{n}}}$."}
        lines(folder / "MATH" / "algebra" / f"{number}.json", [problem])
    run = {
        "train_data": [str(folder / "whole" / f"{name}.jsonl") + (f"#{LEARNED_ON}" if name != "boxed" else "")
                       for name in sources],
        "val_data": [str(folder / "val.jsonl")], "test_data": [str(folder / "gsm8k.jsonl")],
        "filters": ["alternating_turns", "no_empty_turns"], "model_config": TINY | {"n_positions": 96},
        "max_length": 96, "global_batch_size": 32, "val_batch_size": 32, "micro_batch_tokens": 16384,
        "x_optimizer": "auto", "lr_y": 3e-3, "alpha": 10, "epochs": 4, "save_every": 0, "tracker": "none",
    }  # fmt: skip
    (folder / "math.yaml").write_text(yaml.safe_dump(run))
    return folder


def test_the_row_for_mathematics(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(folder)
    assert prepare.main(["math.yaml", "--show", "1"]) == 0
    said = capsys.readouterr().out
    assert "10 left out by filters: one of its turns is empty" in said and "[[" in said

    assert train_bilevel.main(["--config", "math.yaml", "--output_dir", "math"]) == 0
    weights = pd.read_csv("math/weights.csv").set_index("source")["weight"]
    assert weights.idxmin() == "words" and weights.sum() == pytest.approx(1)
    assert report.main(["math"]) == 0 and Path("math/report.html").stat().st_size > 1000
    capsys.readouterr()

    whole = ["--sample", str(DRAWN), "--from", "whole/*.jsonl", "--max_repeats", "4", "--floor", "0.01"]
    assert export.main(["math", *whole, "--append", "val.jsonl", "--out", "drawn/"]) == 0
    assert "of these, 64 are appended: val" in capsys.readouterr().out
    sizes = {file.stem: len(file.read_text().splitlines()) for file in Path("drawn").iterdir()}
    assert sizes.pop("val") == 64 and sum(sizes.values()) == DRAWN and "MATH" not in sizes
    lowest, share = max(0.01, weights["words"]), sizes.get("words", 0) / DRAWN
    assert abs(share - lowest) < 0.01 and sizes["boxed"] == pytest.approx(DRAWN * weights["boxed"], abs=6)
    times = Counter(Path("drawn/boxed.jsonl").read_text().splitlines())
    assert 1 < max(times.values()) <= 4 * 3  # the small source repeats; equal sums are equal lines

    again = ["--config", "math.yaml", "--method", "fixed", "--x_init", "size", "--train_data", "drawn/*.jsonl"]
    assert (
        train_bilevel.main([*again, "--val_data", "[]", "--lr_y", "1e-2", "--epochs", "6", "--output_dir", "sft"]) == 0
    )
    capsys.readouterr()
    tests = ["--data", "gsm8k.jsonl", "MATH/*", "--max_new_tokens", "30"]
    assert evaluate.main(["sft", *tests, "--out", "sft/test.json", "--answers_out", "sft/answers.jsonl"]) == 0
    found = json.loads(Path("sft/test.json").read_text())
    assert {name: scores["records"] for name, scores in found["by_file"].items()} == {"algebra": 6, "gsm8k.jsonl": 12}
    assert found["overall"]["loss"] < 5 and found["by_task"]["Algebra"]["records"] == 6
    answers = [json.loads(line) for line in Path("sft/answers.jsonl").read_text().splitlines()]
    assert len(answers) == 18 and all("We add" in answer["expected"] for answer in answers)
    assert sum("We add" in answer["answer"] for answer in answers) > 9

    methods = ["--methods", "f2sa,uniform,random", "--seeds", "1", "--max_new_tokens", "8", "--out", "compared"]
    assert compare.main(["math.yaml", *methods]) == 0
    table = pd.read_csv("compared/compare.csv").set_index("method")
    assert list(table.index) == ["f2sa", "uniform", "random"] and table["exact_match"].notna().all()
    assert table["test_loss"]["f2sa"] < table["test_loss"]["uniform"]
