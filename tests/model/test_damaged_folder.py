"""A model folder with damaged files is the user's mistake, whatever exception the library that reads it raises."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from run_helpers import TINY, settings
from tokenizer_kinds import tokenizer_of
from transformers import AutoConfig, AutoModelForCausalLM

import train_bilevel
from bilevel.errors import UserError
from bilevel.model.pretrained import read_pretrained

pytestmark = pytest.mark.usefixtures("no_old_log")


def changed(name: str, key: str, value: object) -> Callable[[Path], None]:
    """Sets a key of a JSON file."""

    def change(folder: Path) -> None:
        facts = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(facts | {key: value}))

    return change


def overwritten(name: str, at: int, new: bytes) -> Callable[[Path], None]:
    def overwrite(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[:at] + new + content[at + len(new) :])

    return overwrite


def without_a(folder: Path) -> None:
    """A tokenizer that knows neither the letter a nor what stands for unknown text."""
    facts = json.loads((folder / "tokenizer.json").read_text())
    del facts["model"]["vocab"]["a"]
    facts["model"]["merges"] = []
    (folder / "tokenizer.json").write_text(json.dumps(facts))


DAMAGES = {
    "a tokenizer without the letter a": without_a,
    "weights whose header is not text": overwritten("model.safetensors", 9, b"\xff"),
    "a tokenizer that is no JSON": overwritten("tokenizer.json", 40, b"}"),
    "a field of another type": changed("config.json", "pad_token_id", "0x1F"),
    "a length that is a text": changed("tokenizer_config.json", "model_max_length", "a"),
    "a special token that is a list": changed("tokenizer_config.json", "bos_token", ["a"]),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_model_folder_is_refused(damage: str, data: Path, tmp_path: Path, capsys) -> None:
    tokenizer, folder = tokenizer_of("gpt2"), tmp_path / "model"
    for part in (AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY, eos_token_id=0)), tokenizer):
        part.save_pretrained(folder)
    DAMAGES[damage](folder)
    line = settings(data, tmp_path / "run", model_config=None, model_name_or_path=str(folder), max_length=64)
    assert train_bilevel.main(line) == 2
    said = capsys.readouterr().err
    assert f"error: model_name_or_path {str(folder)!r}: " in said and said.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("2 GiB")])
def test_a_lack_of_memory_is_no_damage(error: Exception) -> None:
    class Kind:
        @staticmethod
        def from_pretrained(name: str, **arguments: object) -> None:
            raise error

    with pytest.raises(type(error)):
        read_pretrained(Kind, "folder")


def test_the_kind_of_an_error_that_says_little_is_named() -> None:
    class Kind:
        @staticmethod
        def from_pretrained(name: str, **arguments: object) -> None:
            raise KeyError("model_type")

    with pytest.raises(UserError, match=r"model_name_or_path 'folder': KeyError: 'model_type' \(a folder must"):
        read_pretrained(Kind, "folder")
