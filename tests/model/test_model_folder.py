"""A model that cannot be built or read as it is said to be stops the run with one message, before anything is written.

The folders here are those that people have: weights of a wrapped model, an interrupted copy, a tokenizer left behind.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from families import FAMILIES, LLAMA
from run_helpers import TINY, settings
from safetensors.torch import load_file, save_file
from tokenizer_kinds import gpt2_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, GPT2Tokenizer

import train_bilevel
from bilevel.errors import UserError
from bilevel.evaluate import command as evaluate
from bilevel.model.build import new_shape
from bilevel.model.check import check_model
from bilevel.model.loading import load_model, load_tokenizer, model_shape
from bilevel.settings.fields import Settings

Tensors = dict[str, torch.Tensor]
WEIGHT = "transformer.h.1.mlp.c_fc.weight"


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a complete GPT-2 with its tokenizer."""
    folder = tmp_path_factory.mktemp("whole") / "model"
    tokenizer = gpt2_tokenizer()
    config = AutoConfig.for_model(**TINY | {"vocab_size": len(tokenizer)})
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def changed(whole: Path, tmp_path: Path) -> Callable[..., Path]:
    """changed(weights, **numbers): a copy whose weights were changed by a function, and its config.json by numbers."""

    def change(weights: Callable[[Tensors], Tensors] = lambda tensors: tensors, **numbers: object) -> Path:
        folder = tmp_path / "model"
        shutil.copytree(whole, folder)
        save_file(weights(load_file(whole / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
        config = json.loads((whole / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | numbers))
        return folder

    return change


def asked(folder: Path) -> Settings:
    return Settings(train_data=["-"], method="fixed", max_length=16, model_name_or_path=str(folder))


def check(folder: Path) -> None:
    """What a run does with a model folder before it reads data."""
    check_model(asked(folder), model_shape(asked(folder)))
    load_tokenizer(asked(folder), [])


# ----------------------------------------------------------------------------------------------------------------------
# Weights that do not fit


WRONG: dict[str, tuple[Callable[[Tensors], Tensors], list[str]]] = {
    "wrapped": (
        lambda tensors: {f"module.{name}": value for name, value in tensors.items()},
        ["tensors missing", "26 tensors not in the model (module.", "rename them without 'module'"],
    ),
    "renamed": (
        lambda tensors: {name.replace("h.1.mlp.c_fc.w", "h.1.mlp.fc.w"): value for name, value in tensors.items()},
        [f"1 tensor missing ({WEIGHT})", "1 tensor not in the model (transformer.h.1.mlp.fc.weight)"],
    ),
    "dropped": (
        lambda tensors: {name: value for name, value in tensors.items() if name != WEIGHT},
        [f"1 tensor missing ({WEIGHT})"],
    ),
    "shape": (
        lambda tensors: tensors | {WEIGHT: torch.zeros(32, 100)},
        [f"1 tensor of another shape ({WEIGHT} is 32x100 instead of 32x128)"],
    ),
    "extra": (
        lambda tensors: tensors | {"v_head.summary.weight": torch.zeros(1, 32)},
        ["1 tensor not in the model (v_head.summary.weight)"],
    ),
    "integers": (
        lambda tensors: tensors | {WEIGHT: torch.zeros(32, 128, dtype=torch.int8)},
        [f"1 tensor of integers (quantized?) ({WEIGHT} is int8)"],
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_weights_that_do_not_fit_are_told_by_name(changed: Callable[..., Path], kind: str) -> None:
    weights, said = WRONG[kind]
    folder = changed(weights)
    with pytest.raises(UserError) as error:
        check(folder)
    assert all(words in str(error.value) for words in [str(folder), *said]), str(error.value)


@pytest.mark.parametrize("kind", ["dropped", "shape"])
def test_a_run_and_an_evaluation_stop_with_exit_code_2(
    changed: Callable[..., Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    folder, out = str(changed(WRONG[kind][0])), tmp_path / "out"
    assert train_bilevel.main(settings(data, out, model_config=None, model_name_or_path=folder)) == 2
    assert WEIGHT in capsys.readouterr().err and not out.exists()
    assert evaluate.main([folder, "--data", str(data / "test.json")]) == 2
    assert WEIGHT in capsys.readouterr().err


def test_layers_that_the_weights_do_not_have(changed: Callable[..., Path]) -> None:
    with pytest.raises(UserError, match=r"12 tensors missing \(transformer.h.2.attn.c_attn.bias, .* and 9 more\)"):
        check(changed(n_layer=3))


# ----------------------------------------------------------------------------------------------------------------------
# Weights that fit


def hub_layout(tensors: Tensors) -> Tensors:
    """GPT-2's tensors as the hub has them: without the prefix, and with the masks that older versions saved."""
    masks = {f"h.{i}.attn.bias": torch.ones(1, 1, 128, 128).tril() for i in range(2)}
    masks |= {f"h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}
    return {name.removeprefix("transformer."): value for name, value in tensors.items()} | masks


@pytest.mark.parametrize(
    "weights",
    [
        hub_layout,
        lambda tensors: tensors | {"lm_head.weight": tensors["transformer.wte.weight"].clone()},
        lambda tensors: {name: value.bfloat16() for name, value in tensors.items()},
    ],
    ids=["hub layout", "tied head", "bf16"],
)
def test_a_complete_model_is_read_without_a_word(
    changed: Callable[..., Path], whole: Path, weights: Callable[[Tensors], Tensors], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = changed(weights)
    check(folder)
    tokenizer = load_tokenizer(asked(folder), [])
    model = load_model(asked(folder), model_shape(asked(folder)), tokenizer)
    original = load_file(whole / "model.safetensors")[WEIGHT]
    assert torch.allclose(model.get_parameter(WEIGHT), original, atol=1e-3)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_reads_what_it_saves(family: str, tmp_path: Path) -> None:
    """Also families that store the experts of a layer one by one."""
    AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family])).save_pretrained(tmp_path)
    check_model(asked(tmp_path), model_shape(asked(tmp_path)))


def test_weights_of_several_files_and_of_pickles(whole: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(whole)
    model.save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 1
    check_model(asked(tmp_path / "shards"), model_shape(asked(tmp_path / "shards")))
    next((tmp_path / "shards").glob("model-00002*")).unlink()
    with pytest.raises(UserError, match="model-00002"):
        check_model(asked(tmp_path / "shards"), model_shape(asked(tmp_path / "shards")))
    shutil.copytree(whole, tmp_path / "pickle")
    (tmp_path / "pickle" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pickle" / "pytorch_model.bin")
    check(tmp_path / "pickle")


# ----------------------------------------------------------------------------------------------------------------------
# Folders that cannot be read


def test_an_interrupted_copy(changed: Callable[..., Path]) -> None:
    file = changed() / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(UserError, match="incomplete metadata.*complete weights"):
        check(file.parent)


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        ({"activation_function": "gleu"}, "does not know the activation_function 'gleu'; did you mean gelu"),
        ({"model_type": "gpt22"}, "model type `gpt22`"),
        ({"vocab_size": "400"}, "Field 'vocab_size' expected int, got str"),
        ({"dtype": "float17"}, "float17"),
        ({"n_head": 3}, "divisible by num_heads"),
    ],
)
def test_a_config_that_no_model_has(changed: Callable[..., Path], numbers: dict, said: str) -> None:
    folder = changed(**numbers)
    with pytest.raises(UserError) as error:
        check(folder)
    assert said in str(error.value) and str(folder) in str(error.value) and "\n" not in str(error.value)


def test_a_folder_without_a_tokenizer(changed: Callable[..., Path]) -> None:
    folder = changed()
    for file in folder.glob("*token*"):
        file.unlink()
    with pytest.raises(UserError, match="there is no tokenizer.*tokenizer.json"):
        check(folder)


def test_the_tokenizer_of_another_model(changed: Callable[..., Path], whole: Path) -> None:
    tokenizer = GPT2Tokenizer.from_pretrained(whole)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>"]})
    folder = changed()
    tokenizer.save_pretrained(folder)
    check(folder)  # an added token gets a new embedding
    assert len(load_tokenizer(asked(folder), [])) == len(gpt2_tokenizer()) + 1
    model = load_model(asked(folder), model_shape(asked(folder)), load_tokenizer(asked(folder), []))
    assert model.get_input_embeddings().num_embeddings == len(tokenizer)
    small = changed_vocabulary(folder, 300)
    with pytest.raises(UserError, match="tokens up to number .*embeddings for only 300"):
        check(small)


def changed_vocabulary(folder: Path, size: int) -> Path:
    """The folder with a model of another vocabulary size beside its tokenizer."""
    AutoModelForCausalLM.from_config(AutoConfig.for_model(**TINY | {"vocab_size": size})).save_pretrained(folder)
    return folder


def test_an_adapter_is_no_model(changed: Callable[..., Path]) -> None:
    folder = changed()
    (folder / "adapter").mkdir()
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    check(folder)  # adapters beside a model are nothing to it
    (folder / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="merge_and_unload"):
        check(folder)


# ----------------------------------------------------------------------------------------------------------------------
# model_config


@pytest.mark.parametrize(
    ("numbers", "said"),
    [
        (TINY | {"n_lyaer": 3}, "model_type gpt2 has no 'n_lyaer'; did you mean n_layer?"),
        (TINY | {"temperature": 2.0}, "model_type gpt2 has no 'temperature'"),
        (TINY | {"n_layer": -2}, "n_layer -2 must be at least 1"),
        (TINY | {"n_embd": 0}, "n_embd 0 must be at least 1"),
        (TINY | {"n_head": 3}, "n_head 3 does not divide n_embd 32"),
        (TINY | {"vocab_size": "400"}, "Field 'vocab_size' expected int, got str (value: '400')"),
        (TINY | {"n_layer": 2.5}, "Field 'n_layer' expected int, got float"),
        (TINY | {"n_inner": -4}, "no model has these numbers"),
        (TINY | {"activation_function": "geluu"}, "activation_function 'geluu'; did you mean gelu"),
        (LLAMA | {"num_key_value_heads": 3}, "num_key_value_heads 3 does not divide num_attention_heads 2"),
        (LLAMA | {"sliding_window": 3}, "model_type llama has no 'sliding_window'"),
    ],
    ids=str,
)
def test_a_model_config_that_no_model_has(numbers: dict, said: str) -> None:
    given = Settings(train_data=["-"], method="fixed", max_length=16, model_config=numbers)
    with pytest.raises(UserError) as error:
        check_model(given, model_shape(given))
    assert said in str(error.value) and str(error.value).startswith("model_config: ")


@pytest.mark.parametrize(
    "numbers",
    [
        TINY,
        LLAMA | {"rope_theta": 5e5},  # the configuration converts it
        LLAMA | {"num_key_value_heads": 1},
        {"model_type": "qwen3_moe"} | FAMILIES["qwen3_moe"],  # head_dim is read by the model's code alone
    ],
    ids=str,
)
def test_a_model_config_that_a_model_has(numbers: dict) -> None:
    given = Settings(train_data=["-"], method="fixed", max_length=16, model_config=numbers)
    check_model(given, new_shape(numbers))


def test_an_impossible_model_config_is_told_before_data_are_read(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(train_bilevel, "load_samples", pytest.fail)
    assert train_bilevel.main(settings(data, tmp_path / "out", model_config=TINY | {"n_inner": -4})) == 2
    assert "model_config: no model has these numbers" in capsys.readouterr().err and not (tmp_path / "out").exists()
