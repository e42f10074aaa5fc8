"""Runs with adapters: in several processes, killed, on a model in 4 bit, and what they leave behind."""

import json
import os
import time
from pathlib import Path

import bitsandbytes
import numpy as np
import pandas as pd
import peft
import pytest
import torch
from launch_helpers import end, kill, start
from run_helpers import TINY, dump, settings, train
from safetensors.torch import load_file, save_file
from tokenizer_kinds import gpt2_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

import train_bilevel
from bilevel.evaluate import command as evaluate
from bilevel.memory.plan import plan
from bilevel.model.loading import load_model, model_shape
from bilevel.settings.command_line import load_settings

pytestmark = pytest.mark.usefixtures("no_old_log")

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
FOUR = {"quantization_config": BitsAndBytesConfig(**NF4, bnb_4bit_compute_dtype=torch.float32)}
FOUR |= {"dtype": torch.float32, "device_map": {"": "cpu"}}
LORA = {"lora_rank": 4, "lr_y": 1e-2, "max_steps": 4, "eval_every": 2}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama with its tokenizer; 4 bit packs 64 weights at a time."""
    folder, tokenizer = tmp_path_factory.mktemp("pretrained") / "model", gpt2_tokenizer()
    shape = {"vocab_size": len(tokenizer), "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **shape)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def on(pretrained: Path, **changes) -> dict:
    return LORA | {"model_config": None, "model_name_or_path": str(pretrained)} | changes


@pytest.mark.parametrize("weights", [pytest.param("source", marks=pytest.mark.slow), "sample"])
@pytest.mark.parametrize("base", [pytest.param("fp32", marks=pytest.mark.slow), "nf4"])
def test_the_adapter_folder_is_the_trained_model(
    base: str, weights: str, pretrained: Path, data: Path, tmp_path: Path
) -> None:
    """peft reads it; on the same base it has the loss that the run had measured, and so says bilevel.evaluate."""
    chosen = on(pretrained, base_dtype=base, lora_merge=None if base == "nf4" else False, weights=weights, dtype="fp32")
    if weights == "sample":
        chosen["train_data"] = [str(data / "mixed" / "train_mixed.json")]
    metrics, folder = train(data, tmp_path / "run", **chosen), tmp_path / "run" / "model"
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "generation_config.json"} <= {
        path.name for path in folder.iterdir()
    }
    assert not any(path.name.startswith("model") for path in folder.iterdir())
    model = peft.AutoPeftModelForCausalLM.from_pretrained(folder)
    assert json.loads((folder / "adapter_config.json").read_text())["base_model_name_or_path"] == str(pretrained)
    stored = load_file(folder / "adapter_model.safetensors")
    found = peft.get_peft_model_state_dict(model)
    assert found.keys() == stored.keys() and all(torch.equal(found[name], stored[name]) for name in stored)
    assert any(bool(p.any()) for name, p in stored.items() if "lora_B" in name)
    out = tmp_path / "scores.json"
    assert evaluate.main([str(tmp_path / "run"), "--answer", "none", "--out", str(out)]) == 0
    loss = json.loads(out.read_text())["overall"]["loss"]
    assert loss == pytest.approx(metrics["test_loss_w"].iloc[-1], rel=1e-5)


def test_four_bits_train(pretrained: Path, data: Path, tmp_path: Path) -> None:
    """The error of 4 bit is common to u and w, so the first gap is exactly 0."""
    runs = {base: train(data, tmp_path / base, **on(pretrained, base_dtype=base)) for base in ("fp32", "nf4")}
    assert all(run["gap"].iloc[1] == 0 for run in runs.values())  # while w = u
    fp32, nf4 = runs.values()
    assert fp32["loss_w"].iloc[1] != nf4["loss_w"].iloc[1] == pytest.approx(fp32["loss_w"].iloc[1], rel=0.02)
    assert (nf4["gap"].iloc[2:].abs() > 1e-5).all() and nf4["test_loss_w"].iloc[-1] < nf4["test_loss_w"].iloc[0] - 0.05


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_the_plan_knows_the_bytes_of_4_bit(
    kind: str, pretrained: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPT-2 has layers of a kind of its own (Conv1D), which are packed, too. The model of a real run is counted."""
    folder, held = pretrained, []
    if kind == "gpt2":
        folder, tokenizer = tmp_path / "gpt2", gpt2_tokenizer()
        shape = TINY | {"vocab_size": len(tokenizer), "n_embd": 64}
        AutoModelForCausalLM.from_config(AutoConfig.for_model(**shape)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    make = train_bilevel.make_copies

    def counted(*given):
        copies, lisa = make(*given)
        held.append(sum(map(stored_bytes, copies["w"].model.named_parameters())))
        return copies, lisa

    monkeypatch.setattr(train_bilevel, "make_copies", counted)
    changes = on(folder, base_dtype="nf4", dtype="fp32", max_steps=2)
    metrics = train(data, tmp_path / "run", **changes)
    run, _ = load_settings(settings(data, tmp_path / "plan", **changes))
    assert plan(run, model_shape(run), 1, "fp32").gpu["frozen model"] == pytest.approx(held[0], rel=1e-3)
    assert metrics["loss_w"].notna().iloc[1:].all()


def stored_bytes(named: tuple[str, torch.nn.Parameter]) -> int:
    """Bytes of a frozen parameter, with the scales and tables of a packed one."""
    name, p = named
    if ".lora_" in name:
        return 0
    state = getattr(p, "quant_state", None)
    tensors = [p]
    if state is not None:
        tensors += [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
    return sum(tensor.nbytes for tensor in tensors)


def test_gradients_pass_through_4_bit_as_through_its_numbers(pretrained: Path, data: Path, tmp_path: Path) -> None:
    """Of all adapters, beside the same model whose layers are dense with the unpacked weights; after an evaluation.

    An evaluation is a pass without gradients, after which bitsandbytes takes other ways on some processors.
    """
    run, _ = load_settings(settings(data, tmp_path / "r", **on(pretrained, base_dtype="nf4", dtype="fp32")))
    packed, dense = (load_model(run, model_shape(run), gpt2_tokenizer(), stored=FOUR) for _ in range(2))
    for name, layer in list(dense.named_modules()):
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
            plain = torch.nn.Linear(layer.in_features, layer.out_features, bias=False)
            plain.weight = torch.nn.Parameter(weight, requires_grad=False)
            dense.set_submodule(name, plain)
    ids, gradients, losses = torch.arange(24).view(2, 12), [], []
    for model in (packed, dense):
        with torch.no_grad():
            model.eval()(input_ids=ids)
        torch.manual_seed(0)
        for name, p in model.named_parameters():
            if "lora_B" in name:  # at 0, as they start, A has no gradient
                torch.nn.init.normal_(p, std=0.1)
        model.train()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        losses.append(loss.item())
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad and ".w." in name})
    assert losses[0] == pytest.approx(losses[1], rel=1e-6) and gradients[0].keys() == gradients[1].keys()
    for name, expected in gradients[1].items():
        assert expected.norm() > 0
        torch.testing.assert_close(gradients[0][name], expected, rtol=1e-4, atol=1e-6, msg=name)


def test_four_bits_without_the_library_are_told(
    pretrained: Path, data: Path, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.setattr("bilevel.model.frozen_base.importlib.util.find_spec", lambda _: None)
    line = settings(data, tmp_path / "run", **on(pretrained, base_dtype="nf4"))
    assert train_bilevel.main(line) == 2 and not (tmp_path / "run").exists()
    assert "pip install bitsandbytes" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("quantised", "said"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quantised (gptq)"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "quantised (8 bit of bitsandbytes)"),
    ],
)
def test_a_quantised_folder_that_cannot_be_trained(
    quantised: dict, said: str, pretrained: Path, data: Path, tmp_path: Path, capsys
) -> None:
    folder = tmp_path / "quantised"
    folder.mkdir()
    for path in pretrained.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    dump(folder / "config.json", config | {"quantization_config": quantised})
    assert train_bilevel.main(settings(data, tmp_path / "run", **on(folder))) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_model_that_comes_in_4_bit(pretrained: Path, data: Path, tmp_path: Path, capsys) -> None:
    """It trains as the model that is quantised while it is read does; a tensor left out is told with its name."""
    four = BitsAndBytesConfig(**NF4)
    folder = tmp_path / "four"
    AutoModelForCausalLM.from_pretrained(pretrained, quantization_config=four).save_pretrained(folder)
    gpt2_tokenizer().save_pretrained(folder)
    runs = [
        train(data, tmp_path / name, **on(model, dtype="fp32", **changes))
        for name, model, changes in (("comes", folder, {}), ("made", pretrained, {"base_dtype": "nf4"}))
    ]
    for column in ("loss_w", "loss_u", "val_loss_w"):
        np.testing.assert_allclose(runs[0][column], runs[1][column], rtol=1e-4)
    assert (tmp_path / "comes" / "model" / "adapter_config.json").is_file()

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.input_layernorm.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    capsys.readouterr()
    assert train_bilevel.main(settings(data, tmp_path / "short", **on(folder, dtype="fp32"))) == 2
    assert "1 tensor missing (model.layers.1.input_layernorm.weight)" in capsys.readouterr().err
    assert not (tmp_path / "short").exists()


def test_the_checkpoint_holds_adapters_alone(pretrained: Path, data: Path, tmp_path: Path) -> None:
    train(data, tmp_path / "run", **on(pretrained, save_every=2, lora_merge=False))
    (file,) = (tmp_path / "run" / "checkpoints" / "step_000004").glob("*.safetensors")
    names = [name for name in load_file(file) if "copies" in name]
    assert names and all(".lora_" in name for name in names)


# ----------------------------------------------------------------------------------------------------------------------
# several processes


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("weights", ["source", "sample"])
def test_processes_change_nothing(weights: str, data: Path, tmp_path: Path) -> None:
    """x by sgd, as Adam makes 1e-4 of x from the rounding of a gap near the mean."""
    adapters = {"lora_rank": "4", "lr_y": "1e-2", "max_steps": "8", "weights": weights}
    adapters |= {"x_optimizer": "sgd", "lr_x": "1" if weights == "source" else "100"}
    found = {}
    for processes in (1, 2, 4):
        code, said = end(start(tmp_path, data, f"p{processes}", None, NPROC=str(processes), **adapters))
        assert code == 0, said
        folder = tmp_path / "outputs" / f"p{processes}"
        found[processes] = pd.read_csv(folder / "metrics.csv"), pd.read_csv(folder / "weights.csv")["weight"]
    losses = ["loss_u", "loss_w", "val_loss_w", "test_loss_u", "test_loss_w"]
    for processes in (2, 4):
        (metrics, weights_), (metrics_of_one, weights_of_one) = found[processes], found[1]
        np.testing.assert_allclose(metrics[losses], metrics_of_one[losses], rtol=1e-5)
        np.testing.assert_allclose(weights_, weights_of_one, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.processes
def test_two_processes_killed_go_on_bit_for_bit(data: Path, tmp_path: Path) -> None:
    adapters = {"lora_rank": "4", "lr_y": "1e-2", "max_steps": "12", "NPROC": "2"}
    assert end(start(tmp_path, data, "whole", None, **adapters))[0] == 0
    running, folder = start(tmp_path, data, "killed", None, **adapters), tmp_path / "outputs" / "killed"
    while not (folder / "checkpoints" / "step_000006").is_dir():
        assert running.poll() is None
        time.sleep(0.05)
    kill(running)
    code, said = end(start(tmp_path, data, "killed", None, **adapters))
    assert code == 0 and "going on after step" in said, said
    for name in ("metrics.csv", "weights.csv", os.path.join("model", "model.safetensors")):
        whole, killed = ((tmp_path / "outputs" / run / name).read_bytes() for run in ("whole", "killed"))
        assert whole == killed, name
