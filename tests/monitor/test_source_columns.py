"""bilevel/monitor/source_columns.py: loss, gap and tokens of each source in a step's batch."""

import pytest
import torch
from samples_helpers import make_samples

from bilevel.monitor.source_columns import source_row, tokens_of
from bilevel.step.result import StepResult

IDS = torch.tensor([0, 2, 5, 3])  # two samples of a, two of b, none of c
NAMES = ["a", "b", "c"]


def test_means_are_over_the_samples_of_a_source_as_often_as_they_count():
    pool = make_samples(["a.json", "b.json", "c.json"], [3, 3, 2])
    batch = pool.batch(IDS, 1000, counts=torch.tensor([1.0, 3.0, 1.0, 1.0], dtype=torch.float64), drawn=6)
    losses, gaps = torch.tensor([1.0, 2.0, 3.0, 5.0]), torch.tensor([0.1, 0.2, -0.1, -0.3])
    row = source_row(pool, NAMES, batch, StepResult(2.0, 1.0, 9, losses=losses, gaps=gaps))
    lengths = [len(pool.tokens[i]["input_ids"]) for i in IDS.tolist()]
    assert row == pytest.approx(
        {"tokens/a": lengths[0] + lengths[1], "tokens/b": lengths[2] + lengths[3], "tokens/c": 0}
        | {"loss/a": 7 / 4, "loss/b": 4.0, "gap/a": 0.7 / 4, "gap/b": -0.2}
    )
    assert isinstance(row["tokens/a"], int)


def test_validation_records_in_the_pool_have_no_column():
    pool = make_samples(["a.json", "b.json", "c.json"], [3, 3, 2])
    row = source_row(pool, ["a"], pool.batch(IDS, 1000), StepResult(2.0, 1.0, 9, losses=torch.ones(4)))
    assert set(row) == {"tokens/a", "loss/a"}


def test_the_tokens_of_each_source():
    pool = make_samples(["a.json", "b.json", "c.json"], [3, 30, 2])
    lengths = torch.tensor([len(row) for row in pool.tokens["input_ids"]])
    assert tokens_of(pool) == [int(part.sum()) for part in lengths.split([3, 30, 2])]
