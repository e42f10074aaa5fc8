"""A setting that is given and that the run does not use is told, and no other."""

from pathlib import Path

import pytest
import yaml
from run_helpers import ROOT, TINY

from bilevel.settings.command_line import load_settings
from bilevel.settings.fields import Settings
from bilevel.settings.rules import validate
from bilevel.settings.written import dump

LORA = str(ROOT / "configs" / "lora-135m-cpu.yaml")
GIVEN = {"train_data": ["a"], "val_data": ["b"], "model_config": TINY}


def told(*words: str, config: str = LORA) -> list[str]:
    found = []
    load_settings(["--config", config, *words], found.append)
    return found


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("--lr_x 3", "lr_x is not used by x_optimizer=auto;"),
        ("--lr_x 3 --weights sample", "lr_x is not used by x_optimizer=auto;"),
        ("--lr_x 0.1 --x_lr_schedule constant", "lr_x and x_lr_schedule are not used by x_optimizer=auto;"),
        ("--upper_every 2", "upper_every is not used by x_optimizer=auto, which moves x at every step"),
        ("--upper_every 1", None),
        ("--lr_x 3 --x_optimizer sgd", None),
        ("--epochs 3", "epochs is not used beside max_steps=40; for whole passes give max_steps=null"),
        ("--epochs 3 --max_steps null", None),
        ("--alpha 1", None),
        ("--order 2 --method align --backend torch --lora_rank null", "order is not used by method=align"),
        ("--order 2", None),
        ("--alpha 1 --method fixed", "alpha is not used by method=fixed, which learns no weights"),
        ("--lr_x 3 --alpha 1 --method fixed", "alpha and lr_x are not used by method=fixed"),
        ("--method fixed", None),
        ("--method loss --max_steps 5", "max_steps is not used by method=loss"),
        ("--method loss --keep 0.3 --score_epochs 2", None),
        ("--method oracle --keep 0.3", "keep is not used by method=oracle"),
        ("--keep 0.3", "keep is not used by method=f2sa"),
        ("--x_map softmax", "x_map is not used with weights=source"),
        ("--x_map softmax --weights sample", None),
        ("--sigmoid_start 0.9 --x_map softmax --weights sample", "sigmoid_start is not used with x_map=softmax"),
        ("--sampling_floor 0.2", "sampling_floor is not used with sampling=uniform"),
        ("--lisa_interval 5", "lisa_interval is not used without lisa_layers"),
        ("--lora_rank 4 --lora_alpha 3", None),
    ],
)
def test_what_a_command_line_gives_in_vain_is_told(words: str, expected: str | None):
    found = told(*words.split())
    assert len(found) == (expected is not None), found
    assert expected is None or found[0].startswith(expected)


def test_a_run_file_is_told_of_unless_the_command_line_decides_otherwise(tmp_path: Path):
    mine = tmp_path / "mine.yaml"
    same = {"x_lr_schedule": "cosine", "sampling_floor": "1e-1"}  # as by default
    same |= {"score_epochs": 2, "keep": 0.3}  # of other methods, which bilevel.compare reads from the same file
    mine.write_text(yaml.safe_dump(GIVEN | same | {"lr_x": 3, "epochs": 3.0, "max_steps": 9, "alpha": 1.0}))
    lr_x, epochs = told(config=str(mine))
    assert lr_x.startswith("lr_x is not used by x_optimizer=auto") and epochs.startswith("epochs is not used")
    assert told("--method", "fixed", "--max_steps", "5", config=str(mine)) == [], "retraining with the same file"


def test_the_settings_that_a_run_writes_down_are_no_reason_for_words(tmp_path: Path):
    written = tmp_path / "config.yaml"
    settings, _ = validate(GIVEN | {"max_steps": 9})
    assert isinstance(settings, Settings)
    written.write_text(dump(settings))
    assert told(config=str(written)) == told("--method", "fixed", config=str(written)) == []
