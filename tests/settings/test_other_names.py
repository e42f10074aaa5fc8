"""bilevel/settings/other_names.py: names of other trainers and mistyped names lead to the right setting, or to none."""

import os
import subprocess
import sys

import pytest
from run_helpers import ROOT

from bilevel.settings.fields import FIELDS
from bilevel.settings.other_names import NAMES, SAID, THEIRS, hint, meant_as_settings, unknown_setting

# What people type who come from TRL, transformers, LLaMA-Factory or axolotl, and the words that must come back.
TYPED = {
    "--learning_rate": "here it is --lr_y: peak learning rate of both model copies",
    "--learning-rate": "here it is --lr_y",
    "--per_device_train_batch_size": "global_batch_size is the number of samples per step",
    "--batch_size": "global_batch_size is the number of samples per step",
    "--gradient_accumulation_steps": "micro_batch_tokens bounds a pass's memory",
    "--micro_batch_size": "micro_batch_tokens bounds a pass's memory",
    "--per_device_eval_batch_size": "evaluation uses micro_batch_tokens",
    "--num_train_epochs": "here it is --epochs",
    "--num_epochs": "here it is --epochs",
    "--dataset": "here it is --train_data",
    "--dataset_name": "here it is --train_data",
    "--train_file": "here it is --train_data",
    "--eval_dataset": "here it is --test_data: test_data is for evaluation only; the data that you trust",
    "--validation_file": "here it is --val_data",
    "--val_set_size": "nothing is split off: give val_data",
    "--output": "here it is --output_dir",
    "--model": "here it is --model_name_or_path",
    "--base_model": "here it is --model_name_or_path",
    "--cutoff_len": "here it is --max_length",
    "--sequence_len": "here it is --max_length",
    "--max_seq_length": "here it is --max_length",
    "--max_grad_norm": "here it is --clip_grad_norm",
    "--warmup_steps": "here it is --warmup_ratio: it is the fraction of the steps",
    "--lr_scheduler_type": "lr_y always follows a cosine",
    "--logging_steps": "here it is --log_every",
    "--eval_strategy": "here it is --eval_every",
    "--save_steps": "here it is --save_every",
    "--save_total_limit": "here it is --keep_checkpoints",
    "--resume_from_checkpoint": "here it is --resume",
    "--report_to": "here it is --tracker: it is wandb or none",
    "--bf16": "here it is --dtype: it is bf16 or fp32",
    "--lora_r": "here it is --lora_rank",
    "--finetuning_type": "here it is --lora_rank",
    "--train_on_inputs": "here it is --loss_on",
    "--sample_packing": "here it is --packing: it is null, true or false",
    "--group_by_length": "not needed: micro_batch_tokens fills a pass",
    "--template": "the chat template is the model's own",
    "--optim": "the model trains with AdamW",
    "--overwrite_output_dir": "a finished run is never overwritten",
}
SLIPS = {
    "--alpa": "did you mean --alpha?",
    "--lr-y": "write --lr_y",
    "--Alpha": "write --alpha",
    "--lisa_layer": "did you mean --lisa_layers?",
    "--max_stesp": "did you mean --max_steps?",
    "--learning_rat": "here it is --lr_y",
    "--checkpointing": "did you mean --gradient_checkpointing?",
}
NONSENSE = ("--rounding", "--x", "--zzz", "--foo_bar", "--hub_token", "--remove_unused_columns", "--ddp_timeout")


@pytest.mark.parametrize("typed", TYPED | SLIPS)
def test_what_people_type(typed: str):
    assert (TYPED | SLIPS)[typed] in unknown_setting(typed, "--")


@pytest.mark.parametrize("typed", NONSENSE[1:])
def test_no_hint_is_better_than_a_wrong_one(typed: str):
    assert unknown_setting(typed, "--") == f"{typed}: no such setting"


def test_the_tables_are_of_settings_and_hide_none():
    assert NAMES.keys() <= FIELDS.keys()
    assert not (THEIRS.keys() | SAID.keys()) & FIELDS.keys() and not THEIRS.keys() & SAID.keys()
    assert len(THEIRS) == sum(len(names.split()) for names in NAMES.values()), "a name stands twice"
    assert "--" not in hint("learning_rate"), "in a run file a setting has no dashes"


@pytest.mark.parametrize(
    ("variable", "words"),
    [
        ("lrx", "lrx=3: no such setting; did you mean lr_x?"),
        ("maxsteps", "did you mean max_steps?"),
        ("Alpha", "did you mean alpha?"),
        ("x_optimiser", "did you mean x_optimizer?"),
        ("learning_rate", "here it is lr_y"),
        ("per_device_train_batch_size", "global_batch_size is the number"),
    ],
)
def test_an_environment_variable_that_is_nearly_a_setting(variable: str, words: str):
    (problem,) = meant_as_settings({variable: "3"})
    assert words in problem


def test_the_environment_of_a_machine_holds_no_settings():
    usual = "http_proxy https_proxy no_proxy FORMAT SEED ALPHA METHOD _ __vte ps1 debian_chroot model data name steps"
    assert meant_as_settings(dict.fromkeys((*usual.split(), *FIELDS), "x")) == []
    assert meant_as_settings(dict(os.environ)) == []


@pytest.mark.slow
def test_the_launcher_refuses_it():
    environment = os.environ | {"lrx": "3", "PATH": f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "run_F2SA.sh"], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "  - lrx=3: no such setting; did you mean lr_x?" in done.stderr
