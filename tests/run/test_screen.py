"""What a run says of dropout, under which results do not stay the same to rounding."""

from pathlib import Path

import pytest
import transformers
from run_helpers import TINY, train

from bilevel.model.loading import drops
from bilevel.run.messages import MASKS

pytestmark = pytest.mark.usefixtures("no_old_log")

SHORT = {"max_steps": 1, "global_batch_size": 4, "val_batch_size": 4, "test_data": [], "save_model": "none"}
WITHOUT = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), 0.0)


@pytest.mark.parametrize(
    ("changes", "times"),
    [
        ({"dropout": 0.1}, 1),
        ({"dropout": 0.0}, 0),
        ({"dropout": None}, 1),  # GPT-2 has its own
        ({"dropout": None, "model_config": TINY | WITHOUT}, 0),
        ({"dropout": 0.1, "method": "loss", "global_batch_size": 96}, 1),
        ({"dropout": 0.1, "method": "uniform"}, 0),  # trains no model
    ],
)
def test_a_run_says_where_results_are_equal_in_distribution_only(
    changes: dict, times: int, data: Path, tmp_path: Path
) -> None:
    train(data, tmp_path / "run", **SHORT | changes)
    assert (tmp_path / "run" / "run.log").read_text().count(MASKS) == times


def test_dropout_of_heads_that_a_language_model_has_not_is_none() -> None:
    assert transformers.AutoConfig.for_model("gpt_neox").classifier_dropout > 0
    assert not drops(transformers.AutoConfig.for_model("gpt_neox"))
    assert drops(transformers.AutoConfig.for_model("gpt_neox", hidden_dropout=0.1))
