"""x_optimizer: its default depends on weights, config.yaml holds what it has become, and auto is a class of its own for
records."""

import pytest
import yaml
from run_helpers import ROOT, TINY

from bilevel.settings.command_line import read_yaml
from bilevel.settings.fields import Settings
from bilevel.settings.optimizers import OPTIMIZERS
from bilevel.settings.rules import validate
from bilevel.settings.written import changed, dump

GIVEN = {"train_data": ["a"], "val_data": ["b"], "model_config": TINY}
PUBLISHED = ["tiny", "small", "gpt2", "compare_small"]  # the papers' own experiments and ours, with Adam on x
RUN_FILES = sorted((ROOT / "configs").glob("*-[18]x*.yaml"))


@pytest.mark.parametrize(
    ("weights", "method", "default"),
    [("source", "f2sa", "auto"), ("sample", "f2sa", "auto"), ("source", "align", "auto"), ("sample", "align", "adam")],
)
def test_the_default_is_resolved(weights: str, method: str, default: str):
    """auto per record compares w with u, which align does not have."""
    settings, problems = validate(GIVEN | {"weights": weights, "method": method})
    assert settings.x_optimizer == default == yaml.safe_load(dump(settings))["x_optimizer"] and not problems
    assert "x_optimizer" not in changed(settings)
    assert Settings(**GIVEN, weights=weights, method=method, x_optimizer="sgd").x_optimizer == "sgd"


def test_auto_per_sample_has_a_class_of_its_own():
    assert validate(GIVEN | {"weights": "sample", "x_optimizer": "auto"})[1] == []
    kinds = [OPTIMIZERS["auto"].kind(per_sample) for per_sample in (False, True)]
    assert [kind.__name__ for kind in kinds] == ["Auto", "AutoRecords"]


def test_auto_has_no_rate_and_moves_at_every_step():
    auto, adam = (Settings(**GIVEN, x_optimizer=name, upper_every=5) for name in ("auto", "adam"))
    assert (auto.x_has_rate, auto.x_every) == (False, 1) and (adam.x_has_rate, adam.x_every) == (True, 5)


def test_published_experiments_say_adam_and_other_run_files_leave_the_choice():
    for name in PUBLISHED:
        assert read_yaml(str(ROOT / "configs" / f"{name}.yaml"))["x_optimizer"] == "adam", name
    assert len(RUN_FILES) > 5
    for file in RUN_FILES:
        assert not {"x_optimizer", "lr_x"} & read_yaml(str(file)).keys(), file
