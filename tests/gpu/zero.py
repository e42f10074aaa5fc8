"""DeepSpeed's ZeRO 0 to 3 in one process: LISA over three draws, residual bits on both places, a signal and resume."""

import tempfile
from pathlib import Path

import pandas as pd
from gpu.rows import Rows
from gpu.runs import resumed, run

STAGES = {"cuda": (0, 1, 2, 3), "cpu": (3,)}  # CI's tests of several processes have the others


def check(device: str, rows: Rows) -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        plain = losses(device, root / "plain")
        lisa = {"lisa_layers": 1, "lisa_interval": 4}
        for stage in STAGES[device]:
            changes = {"backend": "deepspeed", "zero_stage": stage, "dtype": "fp32"}
            found = losses(device, root / f"zero{stage}", **changes)
            error = float(((found - plain).abs() / plain).max())
            rows.at_most(f"ZeRO {stage}: losses against plain torch, relative, fp32", error, 1e-4)
            found = losses(device, root / f"zero{stage}_lisa", **changes, **lisa)
            rows.holds(f"ZeRO {stage}: LISA over three draws ends", len(found) == len(plain))
        if device != "cpu":
            for place in ("device", "host"):
                changes = {"backend": "deepspeed", "zero_stage": 3, "dtype": "bf16", "lisa_residual": place}
                rows.holds(
                    f"ZeRO 3, bf16, residual bits on the {place}, stopped and resumed",
                    resumed(device, root / f"bits_{place}", **changes, **lisa),
                )


def losses(device: str, out: Path, **changes: object) -> pd.Series:
    """loss_w by step; empty if the run fails."""
    changes = {"dtype": "fp32"} | changes
    if run(device, out, **changes).wait():
        return pd.Series(dtype=float)
    return pd.read_csv(out / "metrics.csv")["loss_w"].dropna()
