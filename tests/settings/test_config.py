"""Settings: precedence, and every problem in one error."""

import dataclasses
import re
from pathlib import Path

import pytest
import yaml

from bilevel.errors import ConfigError
from bilevel.settings.command_line import load_settings
from bilevel.settings.fields import FIELDS, Settings
from bilevel.settings.rules import validate
from bilevel.settings.written import dump, dump_changed

ROOT = Path(__file__).parents[2]
GIVEN = {"train_data": ["a"], "val_data": ["b"], "model_name_or_path": "gpt2"}


def write(path: Path, **values) -> str:
    path.write_text(yaml.safe_dump(GIVEN | values))
    return str(path)


def problems(argv: list[str]) -> list[str]:
    with pytest.raises(ConfigError) as error:
        load_settings(argv)
    return error.value.problems


def test_defaults_then_yaml_then_command_line(tmp_path: Path):
    config = write(tmp_path / "c.yaml", lr_y=2e-5, alpha=3)
    settings, dry_run = load_settings(["--config", config, "--alpha", "50"])
    assert (settings.lr_x, settings.lr_y, settings.alpha, dry_run) == (0.1, 2e-5, 50.0, "")


def test_values_typed_by_hand(tmp_path: Path):
    config = write(tmp_path / "c.yaml")
    words = [
        "--lr_y",
        "1e-6",
        "--dropout",
        "null",
        "--train_data",
        "x",
        "y",
        "--max_steps",
        "7",
        "--tracker",
        "none",
        "--dry_run",
    ]
    model = ["--model_name_or_path", "null", "--model_config", "{model_type: gpt2, vocab_size: 300}"]
    settings, dry_run = load_settings(["--config", config, *words, *model])
    assert settings.lr_y == 1e-6 and settings.dropout is None and settings.train_data == ["x", "y"]
    assert settings.max_steps == 7 and settings.tracker == "none" and dry_run
    assert settings.model_config == {"model_type": "gpt2", "vocab_size": 300}


def test_a_list_may_be_one_word_or_several():
    given = [
        "--train_data",
        "a",
        "b",
        "--val_data",
        "c",
        "--model_config",
        "{model_type: gpt2, vocab_size: 512}",
        "--lora_rank",
        "2",
    ]
    lists = ["--filters", "no_empty_turns", "--lora_targets", "q_proj"]
    settings, _ = load_settings([*given, *lists, "v_proj"])
    assert settings.filters == ["no_empty_turns"] and settings.lora_targets == ["q_proj", "v_proj"]
    assert settings.train_data == ["a", "b"] and settings.val_data == ["c"]


def test_scientific_notation_in_yaml_is_a_number(tmp_path: Path):
    (tmp_path / "c.yaml").write_text("train_data: a\nval_data: [b]\nmodel_name_or_path: m\nlr_y: 1e-5\n")
    settings, _ = load_settings(["--config", str(tmp_path / "c.yaml")])
    assert settings.lr_y == 1e-5 and settings.train_data == ["a"]


def test_all_problems_in_one_error(tmp_path: Path):
    config = write(tmp_path / "c.yaml", lr_y=-1, epoch=3, weights="both")
    found = problems(["--config", config, "--alpa", "3", "--max_steps", "1.5", "--model_config", "{n_layer: 2}"])
    text = "\n".join(found)
    assert len(found) == 7, text
    for part in (
        "--alpa: no such setting; did you mean --alpha?",
        "epoch: no such setting; did you mean epochs?",
        "lr_y: input should be greater than or equal to 0, got -1",
        "weights: input should be 'source' or 'sample', got 'both'",
        "max_steps: input should be a valid integer",
        "exactly one of model_name_or_path",
        "model_config needs at least model_type",
    ):
        assert part in text, text


def test_missing_settings_are_named_with_what_they_are():
    text = "\n".join(problems([]))
    assert "train_data: missing (training files" in text and "val_data: missing" in text
    assert "exactly one of model_name_or_path" in text


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf"])
def test_numbers_are_finite(tmp_path: Path, value: str):
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(GIVEN) + f"lr_x: {value}\n")
    assert "lr_x" in problems(["--config", str(tmp_path / "c.yaml")])[0]


@pytest.mark.parametrize("text", ["- a\n- b\n", "a: [", "\x00", "lr_y"])
def test_a_config_that_is_no_mapping(tmp_path: Path, text: str):
    (tmp_path / "c.yaml").write_text(text)
    assert any("c.yaml" in problem for problem in problems(["--config", str(tmp_path / "c.yaml")]))


def test_a_word_without_a_setting(tmp_path: Path):
    assert any("lr_y=3" in problem for problem in problems(["--config", write(tmp_path / "c.yaml"), "lr_y=3"]))


def test_run_name_says_what_the_command_line_changed(tmp_path: Path):
    config = write(tmp_path / "tiny.yaml")
    names = [
        load_settings(["--config", config, *words.split()])[0].run_name
        for words in (
            "",
            "--lr_y 1e-6",
            "--train_data d/half/train_*.json",
            "--run_name mine --lr_y 3",
            "--tracker none",
        )
    ]
    assert names == ["tiny", "tiny-lr_y=1e-6", "tiny-data=half", "mine", "tiny"]


def test_plain_torch_refuses_several_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    [problem] = problems(["--config", write(tmp_path / "c.yaml"), "--backend", "torch"])
    assert "several processes were launched; training in several processes needs backend=deepspeed" in problem


def test_the_resolved_configuration_runs_again():
    settings, found = validate(GIVEN | {"lr_x": 0.3, "run_name": "r"})
    assert not found
    again, found = validate(yaml.safe_load(dump(settings)))
    assert not found and dataclasses.asdict(again) == dataclasses.asdict(settings)


def test_every_setting_explains_itself(capsys: pytest.CaptureFixture[str]):
    names = [field.name for field in dataclasses.fields(Settings)]
    assert names == list(FIELDS)
    assert all(FIELDS[name].description and FIELDS[name].json_schema_extra["group"] for name in names)
    with pytest.raises(SystemExit) as stop:
        load_settings(["--help"])
    help_text = capsys.readouterr().out
    assert not stop.value.code
    assert all(f"--{name} " in help_text for name in names)


@pytest.mark.parametrize(
    "config",
    sorted([*(ROOT / "configs").glob("*.yaml"), *(ROOT / "configs" / "papers").glob("*.yaml")]),
    ids=lambda path: path.name,
)
def test_shipped_configs_are_right(config: Path):
    settings, dry_run = load_settings(["--config", str(config)])
    assert settings.run_name == config.stem and not dry_run


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"zero_stage": 2}, "zero_stage and deepspeed need backend=deepspeed"),
        ({"backend": "deepspeed", "zero_stage": 2, "deepspeed": "f.json"}, "not both"),
        ({"lisa_train_embeddings": False}, "lisa_train_embeddings=false needs lisa_layers"),
        ({"x_warmup_steps": 9, "max_steps": 9}, "x_warmup_steps 9: x never moves in max_steps 9"),
    ],
)
def test_settings_that_contradict_each_other(changes: dict, message: str):
    _, found = validate(GIVEN | changes)
    assert len(found) == 1 and message in found[0]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--dry_run"], "short"),
        (["--dry_run", "true"], "short"),
        (["--dry_run=false"], ""),
        (["--dry_run", "-v"], "full"),
        (["--verbose", "--dry_run"], "full"),
        (["-v"], ""),
    ],
)
def test_a_dry_run_may_be_spelt_out(tmp_path: Path, words: list[str], expected: str):
    config = ["--config", write(tmp_path / "c.yaml")]
    assert load_settings([*config, *words])[1] == expected
    assert problems([*config, "--dry_run", "maybe"]) == ["--dry_run maybe: expected true or false"]


def test_a_model_given_beside_a_run_file_replaces_its_new_model():
    config, notes = ["--config", str(ROOT / "configs" / "tiny.yaml")], []
    settings, _ = load_settings([*config, "--model_name_or_path", "m"], notes.append)
    assert settings.model_name_or_path == "m" and settings.model_config is None
    assert notes == [f"model_name_or_path=m replaces the model_config of {config[1]}"]
    assert "exactly one of" in problems([*config, "--model_name_or_path", "m", "--model_config", "{a: 1}"])[0]


def test_trusted_records_of_the_run_file_beside_own_training_records_are_told(tmp_path: Path):
    """Who gives training files forgets easily that the run file has its own for the other parts."""
    config, notes = ["--config", write(tmp_path / "c.yaml", val_data=["v.json"], test_data=["t.json"])], []
    load_settings(config, notes.append)
    own = [*config, "--train_data", "mine.json"]
    load_settings([*own, "--val_data", "x.json", "--test_data", "[]"], notes.append)
    assert notes == []
    load_settings([*own, "--val_data", "x.json"], notes.append)
    load_settings(own, notes.append)
    told = f"not given beside train_data, so taken from {config[1]}: "
    assert notes == [f"{told}test_data ['t.json']", f"{told}val_data ['v.json']; test_data ['t.json']"]


def test_a_misspelt_run_file_is_told_alone(tmp_path: Path):
    write(tmp_path / "tiny.yaml")
    (problem,) = problems(["--config", str(tmp_path / "tinny.yaml")])
    assert problem.endswith(f"No such file or directory. Did you mean {tmp_path / 'tiny.yaml'}?")
    (problem,) = problems(["--config", str(tmp_path / "none" / "other.yaml")])
    assert problem.endswith("The folder configs/ has examples")


def test_help_shows_choices_units_and_examples(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit):
        load_settings(["--help"])
    said = capsys.readouterr().out
    shown = ["x_optimizer {auto,adam,sgd,mirror}", "train_data FILE [FILE ...]", "lr_y NUMBER", "max_steps N"]
    shown += ["gradient_checkpointing {true,false}", "model_config '{NAME: VALUE, ...}'", "dtype {fp32,bf16}"]
    assert [words for words in shown if not re.search(f"  --{re.escape(words)}\\s", said)] == []
    assert "examples:\n  python train_bilevel.py" in said


def test_a_dry_run_begins_with_what_differs_from_the_defaults():
    settings, _ = validate(GIVEN | {"lr_x": 0.3, "seed": 0})
    text = dump_changed(settings, others=True)
    changed, same = text.split("\n# as by default\n")
    assert dump_changed(settings, others=False) == changed
    assert set(yaml.safe_load(changed)) == {*GIVEN, "lr_x"} and "seed: 0" in same
    again, _ = validate(yaml.safe_load(text))
    assert dataclasses.asdict(again) == dataclasses.asdict(settings)


@pytest.mark.parametrize("name", ["records.jsonl", "web.csv", "all.json.gz"])
def test_records_in_the_place_of_a_run_file_are_told(tmp_path: Path, name: str):
    (tmp_path / name).write_text('{"text": "hi"}\n{"text": "ho"}\n')
    (problem,) = problems(["--config", str(tmp_path / name)])
    assert "is that of records, not of a run file; give records with --train_data" in problem
