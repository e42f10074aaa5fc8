"""The main job and its controls on the shipped data, as a user runs them; minutes, so behind a marker."""

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from run_helpers import ROOT, SHIPPED, dump, emptied
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The files that process.py makes by default."""
    folder = tmp_path_factory.mktemp("shipped")
    subprocess.run([sys.executable, ROOT / "data_alpaca_0.5" / "process.py", "--out", folder], check=True)
    return folder


def launch(data: Path, out: Path, *flags: str, config: str = "tiny") -> pd.DataFrame:
    command = [sys.executable, ROOT / "train_bilevel.py", "--config", ROOT / "configs" / f"{config}.yaml"]
    files = {part: data / f"{part}.json" for part in ("val", "test")}
    command += ["--train_data", data / "train_*.json", "--val_data", files["val"], "--test_data", files["test"]]
    subprocess.run(
        [*map(str, command), "--output_dir", str(out), "--tracker", "none", "--eval_every", "1000", *flags],
        check=True,
        cwd=out.parent,
    )
    return pd.read_csv(out / "metrics.csv")


def test_emptied_responses_end_near_zero(shipped: Path, tmp_path: Path):
    assert launch(shipped, tmp_path / "r")["weight/train_noisy"].iloc[-1] <= 0.02
    folder = tmp_path / "r" / "model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prompt = tokenizer("### Instruction:\nName a colour.\n\n### Response:\n", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=5, pad_token_id=0).shape[1] > prompt["input_ids"].shape[1]


def test_per_sample_weights_find_the_emptied_records(shipped: Path, tmp_path: Path):
    mixed = str(shipped / "mixed" / "train_mixed.json")
    assert launch(shipped, tmp_path / "r", "--weights", "sample", "--train_data", mixed)["roc_auc"].iloc[-1] >= 0.97


def test_mirror_descent_takes_the_emptied_records_to_zero(shipped: Path, tmp_path: Path):
    mirror = ["--weights", "sample", "--x_optimizer", "mirror", "--sigmoid_start", "0.98", "--lr_x", "8"]
    metrics = launch(shipped, tmp_path / "r", *mirror, "--train_data", str(shipped / "mixed" / "train_mixed.json"))
    table = pd.read_csv(tmp_path / "r" / "weights.csv")
    assert metrics["roc_auc"].iloc[-1] >= 0.97
    assert table["weight"][table["is_noisy"].astype(bool)].mean() <= 0.02


def test_with_corrupted_validation_the_noisy_source_wins(shipped: Path, tmp_path: Path):
    val = json.loads((shipped / "val.json").read_text(encoding="utf-8"))
    wrong = str(dump(tmp_path / "wrong.json", emptied(val)))
    metrics = launch(shipped, tmp_path / "r", "--val_data", wrong)
    assert metrics["weight/train_noisy"].iloc[-1] >= 0.95


def test_two_clean_halves_stay_near_each_other(shipped: Path, tmp_path: Path):
    records = json.loads((shipped / "train_clean.json").read_text(encoding="utf-8"))
    halves = tmp_path / "halves"
    dump(halves / "train_a.json", records[::2])
    dump(halves / "train_b.json", records[1::2])
    for part in ("val", "test"):
        dump(halves / f"{part}.json", json.loads((shipped / f"{part}.json").read_text(encoding="utf-8")))
    finals = [
        launch(halves, tmp_path / f"seed{seed}", "--seed", str(seed))["weight/train_a"].iloc[-1] for seed in range(5)
    ]
    print("two clean halves, weight of the first over 5 seeds:", [round(float(p), 3) for p in finals])
    assert all(0.2 <= p <= 0.8 for p in finals), finals


def test_the_gpt2_configuration_on_a_folder_of_gpt2s_shape(tmp_path: Path):
    """configs/gpt2.yaml as it stands but for the folder, which has GPT-2's shape and a tokenizer of ours."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    texts = [record["instruction"] + record["output"] for record in SHIPPED]
    bpe.train_from_iterator(texts, vocab_size=4000, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    GPT2LMHeadModel(GPT2Config()).save_pretrained(tmp_path / "gpt2")
    for name, records in (("train_a", SHIPPED[:96]), ("train_b", emptied(SHIPPED[96:192]))):
        dump(tmp_path / "data" / f"{name}.json", records)
    dump(tmp_path / "data" / "val.json", SHIPPED[200:300])
    dump(tmp_path / "data" / "test.json", SHIPPED[300:332])
    flags = ["--model_name_or_path", str(tmp_path / "gpt2"), "--max_steps", "2", "--x_warmup_steps", "0"]
    metrics = launch(tmp_path / "data", tmp_path / "r", *flags, config="gpt2")
    assert len(metrics) == 3 and metrics["weight/train_b"].iloc[-1] < 0.5
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "r" / "model")
    assert sum(p.numel() for p in model.parameters()) == 124_439_808
