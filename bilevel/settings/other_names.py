"""Names that other trainers have for a setting, and what a mistyped name most probably means.

The names are those of transformers' TrainingArguments, TRL, LLaMA-Factory, axolotl and common scripts, by our setting.
"""

import difflib

from bilevel.errors import plain
from bilevel.settings.fields import FIELDS

CLOSE, TYPED = 0.75, 0.85  # similarity of names that are suggested; of an environment variable that was meant as one

NAMES = {
    "train_data": "dataset datasets dataset_name dataset_dir dataset_path data data_path data_files train_file "
    "train_files train_dataset training_data training_files train train_path",
    "val_data": "validation_file validation_files validation_data validation_dataset valid_data dev_data val",
    "test_data": "test_file test_files test_dataset test_datasets eval_dataset eval_data eval_file test",
    "model_name_or_path": "model model_name model_id model_path base_model pretrained_model_name_or_path",
    "max_length": "max_seq_length max_seq_len sequence_len seq_len seq_length cutoff_len max_len block_size "
    "model_max_length",
    "lr_y": "learning_rate lr peak_lr inner_lr",
    "lr_x": "outer_lr meta_lr upper_lr weight_lr",
    "epochs": "num_train_epochs num_epochs n_epochs max_epochs train_epochs",
    "max_steps": "num_steps n_steps total_steps max_train_steps train_steps num_training_steps iterations steps",
    "warmup_ratio": "warmup_steps num_warmup_steps lr_warmup_steps warmup",
    "clip_grad_norm": "max_grad_norm gradient_clipping clip_grad grad_clip gradient_clip_val",
    "log_every": "logging_steps log_steps log_interval logging_strategy",
    "eval_every": "eval_steps eval_strategy evaluation_strategy evals_per_epoch eval_interval",
    "save_every": "save_steps save_strategy saves_per_epoch checkpointing_steps save_interval",
    "keep_checkpoints": "save_total_limit",
    "resume": "resume_from_checkpoint auto_resume_from_checkpoints",
    "tracker": "report_to use_wandb wandb wandb_mode with_tracking",
    "output_dir": "output out out_dir save_dir save_path logging_dir",
    "run_name": "name exp_name experiment_name wandb_run_name wandb_name",
    "dtype": "bf16 fp16 pure_bf16 mixed_precision torch_dtype precision compute_type",
    "attn_implementation": "flash_attn flash_attention use_flash_attention_2 sdpa_attention",
    "packing": "sample_packing padding_free neat_packing eval_packing",
    "lora_rank": "lora_r peft use_peft use_lora adapter finetuning_type",
    "loss_on": "train_on_inputs completion_only_loss assistant_only_loss train_on_prompt train_on_responses_only",
    "turns": "mask_history roles_to_train train_on_eos",
    "format": "dataset_type data_format formatting",
    "fields": "dataset_text_field text_column prompt_column response_column columns column_mapping",
    "template_kwargs": "chat_template_kwargs enable_thinking",
    "seed": "data_seed random_seed random_state",
    "deepspeed": "deepspeed_config ds_config",
    "zero_stage": "zero",
    "gradient_checkpointing": "activation_checkpointing use_gradient_checkpointing",
    "alpha": "penalty lambda lam penalty_alpha",
    "dropout": "hidden_dropout attention_dropout resid_pdrop",
    "upper_every": "outer_steps inner_steps unroll_steps",
    "weights": "weight_per reweighting",
    "lisa_layers": "lisa lisa_activated_layers lisa_n_layers",
    "lisa_interval": "lisa_interval_steps lisa_step_interval",
}
# Words for names that are not simply another name: what the setting counts, or why there is none.
WORDS = {
    "packing": "it is null, true or false; records are never cut or joined, and results are those of padded rows",
    "warmup_ratio": "it is the fraction of the steps in which both learning rates rise; x_warmup_steps holds x still",
    "test_data": "test_data is for evaluation only; the data that you trust, which decide on the weights, are val_data",
    "lora_rank": "it is the rank of the adapters; null trains the whole model",
    "log_every": "it counts model steps",
    "eval_every": "it counts model steps",
    "save_every": "it counts model steps",
    "dtype": "it is bf16 or fp32; fp16 is not supported",
    "tracker": "it is wandb or none; the environment variable WANDB_PROJECT names the project",
    "loss_on": "it is response or all",
}
BATCH = "global_batch_size is the number of samples per step, over all GPUs; micro_batch_tokens bounds a pass's memory"
UNNEEDED = {
    "per_device_train_batch_size train_batch_size batch_size micro_batch_size gradient_accumulation_steps "
    "mini_batch_size train_micro_batch_size_per_gpu": BATCH,
    "per_device_eval_batch_size eval_batch_size": "evaluation uses micro_batch_tokens, as training does",
    "lr_scheduler_type lr_scheduler scheduler lr_schedule": "lr_y always follows a cosine after warmup_ratio; "
    "x_lr_schedule is the schedule of lr_x",
    "optim optimizer adam_beta1 adam_beta2 adam_epsilon": "the model trains with AdamW (weight_decay); x_optimizer "
    "moves the weights of the data",
    "group_by_length length_column_name": "not needed: micro_batch_tokens fills a pass with "
    "records of about equal length",
    "template chat_template": "the chat template is the model's own; template_kwargs has its variables",
    "val_size val_set_size validation_split eval_split_size": "nothing is split off: give val_data, a file of records "
    "that you trust",
    "max_samples max_train_samples": "write #N after a file's name in train_data for N of its records",
    "do_train do_eval stage train_on_split": "not needed: a run trains, and it evaluates if there is test_data",
    "overwrite_output_dir": "a finished run is never overwritten: give another run_name",
    "wandb_project project": "the environment variable WANDB_PROJECT names wandb's project",
    "fsdp": "several GPUs train with DeepSpeed: backend and zero_stage",
    "nu": "nu is 1 / alpha: give alpha",
}
THEIRS = {name: ours for ours, names in NAMES.items() for name in names.split()}
SAID = {name: words for names, words in UNNEEDED.items() for name in names.split()}


def hint(name: str, dashes: str = "") -> str:
    """What to write instead of a name that is no setting; empty if nothing is like it.

    dashes: what stands before a setting where this one was typed.
    """
    typed = name.lstrip("-")[:60].replace("-", "_").lower()
    if typed in FIELDS:
        return f"write {dashes}{typed}"
    if typed in SAID:
        return SAID[typed]
    if typed in THEIRS:
        ours = THEIRS[typed]
        return f"here it is {dashes}{ours}: {WORDS.get(ours) or FIELDS[ours].description}"
    near = difflib.get_close_matches(typed, FIELDS, n=1, cutoff=CLOSE)
    near = near or [ours for ours in FIELDS if len(typed) > 3 and f"_{typed}_" in f"_{ours}_"][:4]
    if near:
        return "did you mean " + " or ".join(dashes + ours for ours in near) + "?"
    theirs = difflib.get_close_matches(typed, THEIRS.keys() | SAID.keys(), n=1, cutoff=TYPED)
    return hint(theirs[0], dashes) if theirs else ""


def unknown_setting(key: str, dashes: str = "") -> str:
    """Message for a name that is no setting."""
    words = hint(key, dashes)
    return f"{plain(key)}: no such setting" + (f"; {words}" if words else "")


def meant_as_settings(variables: dict[str, str]) -> list[str]:
    """Messages for environment variables that look like mistyped settings of the launcher.

    Only names with a small letter are looked at: others belong to the system. A name of another trainer counts if it
    has an underscore, so that no common word is taken for one.
    """
    bare = {ours.replace("_", ""): ours for ours in FIELDS}
    found = []
    for name, value in variables.items():
        if name in FIELDS or name == name.upper():
            continue
        near = [bare[key]] if (key := name.lower().replace("_", "")) in bare else []
        near = near or difflib.get_close_matches(name, FIELDS, n=1, cutoff=TYPED)
        if near or ("_" in name and (name in THEIRS or name in SAID)):
            words = f"did you mean {near[0]}?" if near else hint(name)
            found.append(f"{name}={plain(value)}: no such setting; {words}")
    return found
