"""bilevel/run/next_commands.py: where nothing is shown, a run that may show something, or a word that none will."""

import math
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from bilevel.run import next_commands
from bilevel.weights.record_evidence import Harm


def run(per_sample: bool, **more) -> SimpleNamespace:
    settings = SimpleNamespace(
        x_optimizer="mirror",
        x_warmup_steps=4,
        max_steps=None,
        method="f2sa",
        global_batch_size=8,
        backend="torch",
        output_dir=None,
    )
    return SimpleNamespace(
        settings=settings, copies={"u": None, "w": None}, per_sample=per_sample, step=40, train=range(300), **more
    )


def of_sources(*most: float) -> SimpleNamespace:
    found = [SimpleNamespace(steps_most=number) for number in most]
    evidence = SimpleNamespace(findings=lambda x: found)
    return run(False, weights=SimpleNamespace(evidence=evidence, x=None))


def of_records(seen: int, sets_all: bool = True, trusted: int = 60) -> SimpleNamespace:
    harm = Harm(seen, trusted, 1.0, np.zeros(1), False)
    records, optimizer = SimpleNamespace(harm=lambda: harm), SimpleNamespace(sets_all=sets_all)
    return run(True, weights=SimpleNamespace(records=records, optimizer=optimizer))


@pytest.mark.parametrize(("most", "steps"), [([81, 200], 130), ([3, math.inf], 43), ([360], 400)])
def test_sources_are_told_apart_by_a_longer_run(most: list[float], steps: int):
    words, command = next_commands._longer(of_sources(*most), Path("outputs/mine"))
    assert command == (
        f"python train_bilevel.py --config outputs/mine/config.yaml --run_name mine_longer --max_steps {steps}"
    )
    assert words.startswith("nothing is shown yet: ")


@pytest.mark.parametrize("most", [[361], [math.inf, math.inf]])
def test_no_longer_run_is_proposed_that_is_ten_times_as_long(most: list[float]):
    words, command = next_commands._longer(of_sources(*most), Path("outputs/mine"))
    assert not command and "about equally good, or it takes over 10 times" in words


def test_records_that_were_not_compared_are_read_by_a_longer_run():
    """120 of 300 in 40 steps of 8, of which 25 compared none: 42 more read the 300, a tenth to spare."""
    words, command = next_commands._longer(of_records(120), Path("outputs/mine"))
    assert "only 120 of 300 records were compared" in words and command.endswith(" --max_steps 67")


def test_more_trusted_records_are_asked_for_where_all_were_compared():
    words, command = next_commands._longer(of_records(292), Path("outputs/mine"))
    assert not command and "with more than 60 trusted ones to compare with, smaller differences would show" in words


def test_another_rule_leads_to_the_one_that_compares_all_records():
    words, command = next_commands._longer(of_records(60, sets_all=False), Path("outputs/mine"))
    assert command.endswith("--run_name mine_longer --x_optimizer auto")
    assert "mirror compares records of the first steps only, and auto compares all" in words


def test_no_longer_run_is_proposed_where_nothing_can_be_compared():
    """As many trusted records as a batch has are all read at the first step; and align has no u."""
    words, command = next_commands._longer(of_records(0, trusted=0), Path("outputs/mine"))
    assert not command and "give more than val_batch_size, or make that smaller" in words
    align = of_records(0)
    align.copies, align.settings.method = {"w": None}, "align"
    words, command = next_commands._longer(align, Path("outputs/mine"))
    assert not command and "method=align compares no record with trusted ones" in words


@pytest.mark.parametrize("run", [of_sources(5), of_records(120)], ids=["sources", "records"])
def test_a_longer_run_is_no_shorter_than_what_was_planned_and_ends_after_the_warm_up(run: SimpleNamespace):
    """The run was ended early, by the file finish."""
    run.settings.max_steps = 100
    assert next_commands._longer(run, Path("outputs/mine"))[1].endswith(" --max_steps 100")
    run.settings.max_steps, run.settings.x_warmup_steps = None, 149
    assert next_commands._longer(run, Path("outputs/mine"))[1].endswith(" --max_steps 150")
