"""DeepSpeed's configuration for a run: read from a file (or chosen by zero_stage), completed from the settings."""

import json
from pathlib import Path
from typing import Any

from bilevel.errors import UserError, short
from bilevel.files import open_regular
from bilevel.settings.fields import Settings

CONFIGS = Path(__file__).parents[2] / "configs"
DECIDED = {"optimizer", "scheduler", "train_batch_size", "gradient_clipping", "bf16", "fp16", "torch_autocast"}


def zero_config(settings: Settings, dtype: str) -> dict[str, Any]:
    """The config argument of deepspeed.initialize; dtype is fp32 or bf16. Raises UserError."""
    default = 2 if settings.zero_stage is None else settings.zero_stage
    config = read_config(Path(settings.deepspeed or CONFIGS / f"zero{default}.json"))
    stage = config["zero_optimization"]["stage"]
    if stage == 0 and dtype == "bf16":  # stage 0 keeps no fp32 masters: weights stay fp32, each pass casts them
        config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16", "lower_precision_safe_modules": []}
    return config | {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": settings.clip_grad_norm
        or 0.0,  # 0 turns clipping off; if it is missing, DeepSpeed uses 1.0
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,  # torch's fused AdamW can step offloaded partitions, too
        "steps_per_print": None,
        "bf16": {"enabled": dtype == "bf16" and stage > 0},
    }


def read_config(path: Path) -> dict[str, Any]:
    """Read a DeepSpeed file and check its zero_optimization section; `stage` is filled in. Raises UserError."""
    try:
        with open_regular(path) as file:
            config = json.loads(file.read())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"deepspeed {path}: {error}") from None
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    if not isinstance(zero, dict):
        raise UserError(
            f"deepspeed {path}: the zero_optimization section is missing; configs/zero2.json has an example"
        )
    if decided := sorted(DECIDED.intersection(config)):
        raise UserError(f"deepspeed {path}: remove {', '.join(decided)}; the settings of the run decide this")
    stage = zero.setdefault("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise UserError(f"deepspeed {path}: stage must be 0, 1, 2 or 3, got {short(stage)}")
    for part, least in (("offload_optimizer", 2), ("offload_param", 3)):
        offload = zero.get(part) or {}
        if not isinstance(offload, dict):
            raise UserError(f"deepspeed {path}: {part} must be a section, got {short(offload)}")
        if offload.get("device", "none") != "none" and stage < least:
            raise UserError(
                f"deepspeed {path}: {part} needs zero_optimization.stage {least} or higher, but it is {stage}"
            )
    return config
