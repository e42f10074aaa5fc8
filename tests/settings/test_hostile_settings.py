"""Hostile and broken settings, from files and command lines: words of the error, which is short and comes soon."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from bilevel.errors import ConfigError, UserError
from bilevel.model.loading import model_shape
from bilevel.run.preflight import check_files
from bilevel.settings.command_line import _yaml, load_settings
from bilevel.settings.fields import Settings
from bilevel.settings.rules import validate
from bilevel.settings.written import dump

GIVEN = ["--train_data", "a", "--val_data", "b", "--model_name_or_path", "m"]


def layers(line: str, count: int = 30) -> str:
    """Names n0, n1, ..., of which each stands for ten of the one before."""
    return "n0: &n0 {a: b}\n" + "".join(
        f"n{i}: &n{i} " + line.format(", ".join([f"*n{i - 1}"] * 10)) + "\n" for i in range(1, count)
    )


# content of the file -> words of the error
FILES: dict[str, tuple[str | bytes, str]] = {
    "laughs": (layers("[{}]"), "a word that begins with * is a YAML alias"),
    "merges": (layers("{{<<: [{}]}}"), "a word that begins with * is a YAML alias"),
    "circle": ("model_config: &a {model_type: *a}", "a word that begins with * is a YAML alias"),
    "pattern": ("train_data: *.json", "is not YAML"),
    "month-13": ("lr_x: 2001-13-41", "is not YAML: ValueError: month must be in 1..12"),
    "tags": ("lr_x: !!int ''", "is not YAML: IndexError"),
    "tag-bool": ("lr_x: !!bool maybe", "is not YAML: KeyError"),
    "code": ("lr_x: !!python/object/apply:os.system [ls]", "could not determine a constructor for the tag"),
    "nested": ("lr_x: " + "[" * 5000, "is not YAML: RecursionError"),
    "long-integer": ("seed: 0x" + "f" * 5000, "is not YAML: ValueError: Exceeds the limit (4300 digits)"),
    "long-integer-key": ("? 0x" + "f" * 5000 + "\n: 1", "is not YAML: ValueError: Exceeds the limit (4300 digits)"),
    "surrogate-key": ('"\\ud800": 1', r"'\ud800': no such setting"),
    "surrogate-value": ('format: "\\ud800"', "format: input should be"),
    "surrogate-text": ('run_name: "\\ud800"', "run_name: input should be a valid string"),
    "long-key": ("x" * 1000 + ": 1", "no such setting"),
    "many-keys": ("".join(f"key{i}: 1\n" for i in range(1000)), "and 990 more"),
    "many-values": ("train_data: [" + "1.5, [], " * 2000 + "]", "and 1990 more"),
    "seed": ("seed: 0x" + "f" * 500, "seed: input should be less than 9223372036854775808, got 1"),
    "long-value": ("alpha: " + "x" * 100_000, "alpha: input should be a valid number"),
    "other-file": ('{"text": "a"}\n' * 100_000, "it has more than 200000 characters, so it is not a settings file"),
    "utf-16": ("lr_x: 1".encode("utf-16"), "is not YAML"),
    "nul": (b"lr_x: \0", "is not YAML"),
    "scalar": ("1", "the file must contain lines of the form `setting: value`"),
}
LINES: dict[str, tuple[list[str], str]] = {
    "mapping-for-a-list": ([*GIVEN, "--train_data", "{a: 1}", "x"], "train_data.0: input should be a valid string"),
    "long-flag": ([*GIVEN, "--" + "x" * 100_000], "no such setting"),
    "surrogate-flag": ([*GIVEN, "--\udcff"], r"'--\udcff': no such setting"),
    "surrogate-value": ([*GIVEN, "--output_dir", "\udcff"], "output_dir: input should be a valid string"),
    "many-words": (["x"] * 5000, "and 4990 more"),
    "config-nul": (["--config", "a\0b"], r"--config 'a\x00b' is not YAML: embedded null"),
    "config-long": (["--config", "x" * 9000], "File name too long"),
    "config-surrogate": (["--config", "\udcff"], r"--config '\udcff': No such file"),
    "config-folder": (["--config", "/"], "--config /: Is a directory"),
}


def error_of(call: Callable[..., object], *arguments: object) -> str:
    with pytest.raises(ConfigError) as caught:
        call(*arguments)
    text = str(caught.value)
    assert len(text) < 4000 and text.encode()
    return text


@pytest.mark.parametrize(("content", "words"), FILES.values(), ids=FILES)
def test_file(tmp_path: Path, content: str | bytes, words: str) -> None:
    path = tmp_path / "c.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert words in error_of(load_settings, ["--config", str(path), *GIVEN[4:]])


@pytest.mark.parametrize(("line", "words"), LINES.values(), ids=LINES)
def test_command_line(line: list[str], words: str) -> None:
    assert words in error_of(load_settings, line)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "a-file"])
def test_names_of_what_a_run_reads_and_writes(tmp_path: Path, name: str) -> None:
    (tmp_path / "a-file").touch()
    settings, _ = load_settings([*GIVEN, "--x_init", "x" * 4000, "--output_dir", str(tmp_path / name)])
    text = error_of(check_files, settings)
    assert "x_init: 'xxx" in text and "output_dir" in text and "no file matches 'a'" in text


def test_a_run_name_fits_its_folder() -> None:
    settings, _ = load_settings([*GIVEN[:4], "--model_name_or_path", "模" * 200])
    assert len(settings.run_name.encode()) <= 120 and settings.run_name.startswith("run-data=-model_name_or_path=模")


def test_one_value_in_two_settings_is_written_twice() -> None:
    same = ["a"]
    settings = Settings(
        train_data=same,
        val_data=same,
        test_data=same,
        model_config={"model_type": "gpt2", "vocab_size": same, "b": same},
    )
    assert validate(_yaml(dump(settings))) == (settings, [])


@pytest.mark.parametrize(("kind", "words"), [("gpt-2", "did you mean gpt2"), ("x" * 300, "gpt2 and llama"), ([], "[]")])
def test_a_model_type_that_there_is_not(kind: object, words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)) as caught:
        model_shape(Settings(train_data=["a"], val_data=["a"], model_config={"model_type": kind, "vocab_size": 9}))
    assert len(str(caught.value)) < 300
