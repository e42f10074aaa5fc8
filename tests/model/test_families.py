"""Any causal language model trains, whether or not its operations can be counted."""

from pathlib import Path

import pandas as pd
import pytest
from families import FAMILIES, WIDTH
from run_helpers import settings, train, train_until

pytestmark = pytest.mark.usefixtures("no_old_log")

QUICK = {"max_length": 32, "loss_on": "all", "global_batch_size": 4, "val_batch_size": 4, "test_data": []}
QUICK |= {"max_steps": 2, "save_model": "none", "save_every": 1}
# Its chunks make steps of the operations.
MAMBA2 = {"model_type": "mamba2", "state_size": 4, "num_heads": 4, "head_dim": 16, "n_groups": 1, "chunk_size": 8}
MAMBA2 |= WIDTH


ALWAYS = ("opt", "mixtral")  # a dense model, and one of experts; the others are slow


@pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[] if name in ALWAYS else pytest.mark.slow) for name in FAMILIES]
)
def test_a_run_of_the_family(family: str, data: Path, tmp_path: Path) -> None:
    metrics = train(data, tmp_path / "run", model_config={"model_type": family} | FAMILIES[family], **QUICK)
    assert metrics["step"].tolist() == [0, 1, 2] and metrics["gap"].iloc[-1] != 0
    gflop = pd.read_csv(tmp_path / "run" / "timing.csv")["gflop"]
    assert gflop[0] == 0 and gflop[2] > gflop[1] > 0


def test_operations_that_cannot_be_counted_stay_empty(data: Path, tmp_path: Path) -> None:
    """Also after a resume."""
    out = tmp_path / "run"
    chosen = QUICK | {"model_config": MAMBA2}
    assert train_until(1, settings(data, out, **chosen)) == 143
    assert train(data, out, **chosen)["step"].tolist() == [0, 1, 2]
    timing = pd.read_csv(out / "timing.csv")
    assert timing["gflop"].isna().all() and timing["seconds"].notna().all()
