"""The saved folder of a run stops where its training data end a response, by plain generate(); evaluation says so."""

import json
from pathlib import Path

import pytest
from run_helpers import TINY, dump, train
from tokenizer_kinds import CHATML, gpt2_tokenizer, tokenizer_of
from transformers import (
    AddedToken,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedTokenizerBase,
)

from bilevel.data.tokenise import Tokeniser
from bilevel.evaluate import command as evaluate
from bilevel.model.response_end import stop_tokens, with_end, with_ends

pytestmark = pytest.mark.usefixtures("no_old_log")

QUESTION, ANSWER = "Name the capital of France.", "The capital is Paris."
CHAT = {"messages": [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]}
MORE = {"messages": [*CHAT["messages"], {"role": "user", "content": "Add."}, {"role": "assistant", "content": "Two."}]}
SHORT = {"val_data": [], "test_data": [], "method": "fixed", "max_length": 64, "global_batch_size": 4, "lr_y": 1e-2}
SHORT |= {"max_steps": 60, "eval_every": 60, "save_every": 0, "model_config": None}


def chatml_base(folder: Path, special: bool = True) -> Path:
    """A base model whose EOS is <|endoftext|>, and whose tokenizer has a ChatML template; special: of its marks."""
    tokenizer = gpt2_tokenizer()
    marks = [AddedToken(mark, special=special) for mark in ("<|im_start|>", "<|im_end|>")]
    tokenizer.add_tokens(marks, special_tokens=special)
    tokenizer.chat_template = CHATML
    ends = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = AutoConfig.for_model(**TINY | {"vocab_size": len(tokenizer)} | ends)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def answered(folder: Path) -> str:
    """What transformers alone makes of the question, special tokens included."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    asked = tokenizer.apply_chat_template(CHAT["messages"][:1], add_generation_prompt=True, return_tensors="pt")
    new = model.generate(**asked, max_new_tokens=50)[0, asked["input_ids"].shape[1] :]
    return tokenizer.decode(new)


@pytest.mark.parametrize("special", [pytest.param(True, marks=pytest.mark.slow), False], ids=["special", "added"])
def test_an_overfitted_chatml_base_model_gives_its_answer_and_stops(
    special: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base, data = chatml_base(tmp_path / "base", special), dump(tmp_path / "data" / "chat.json", [CHAT] * 4)
    train(tmp_path, tmp_path / "run", **SHORT | {"train_data": [str(data)], "model_name_or_path": str(base)})
    saved = tmp_path / "run" / "model"
    assert answered(saved) == ANSWER + "<|im_end|>"
    tokenizer, own = AutoTokenizer.from_pretrained(saved), AutoTokenizer.from_pretrained(base)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert stop_tokens(GenerationConfig.from_pretrained(saved)) == [own.eos_token_id, end]
    assert tokenizer.eos_token == "<|im_end|>" and tokenizer.get_vocab() == own.get_vocab()
    assert tokenizer.apply_chat_template(CHAT["messages"]) == own.apply_chat_template(CHAT["messages"])
    capsys.readouterr()
    assert evaluate.main([str(saved), "--data", str(data)]) == 0
    said = capsys.readouterr()
    assert '"exact_match": 1.0' in said.out and said.err == ""


@pytest.mark.slow
def test_an_evaluation_measures_what_users_of_the_folder_see(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model has learned to go on with the user's next turn; whether that is seen is up to generation_config."""
    base, data = chatml_base(tmp_path / "base"), dump(tmp_path / "data" / "chat.json", [MORE] * 4)
    changes = {"train_data": [str(data)], "model_name_or_path": str(base), "loss_on": "all"}
    train(tmp_path, tmp_path / "run", **SHORT | changes)
    saved, asked = tmp_path / "run" / "model", dump(tmp_path / "asked.json", [CHAT])
    for ends, right in (({}, 1.0), ({"eos_token_id": AutoTokenizer.from_pretrained(base).eos_token_id}, 0.0)):
        if ends:
            (saved / "generation_config.json").write_text(json.dumps(ends))
        assert (answered(saved) == ANSWER + "<|im_end|>") is (right == 1.0)
        capsys.readouterr()
        assert evaluate.main([str(saved), "--data", str(asked)]) == 0
        said = capsys.readouterr()
        assert f'"exact_match": {right}' in said.out
        assert ("responses of this data end with <|im_end|>" in said.err) is (right == 0.0)


def rows(*turns: tuple[str, str]) -> dict[str, list]:
    roles, contents = zip(*turns, strict=True)
    return {"roles": [list(roles)], "contents": [list(contents)], "index": [0], "is_noisy": [None]}


TALK = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]


def ends(tokenizer: PreTrainedTokenizerBase, *turns: tuple[str, str], loss_on: str = "response") -> list[str]:
    return tokenizer.convert_ids_to_tokens(Tokeniser(tokenizer, 64, loss_on).ends(rows(*turns)))


@pytest.mark.parametrize(("kind", "end"), [("chatml", "<|im_end|>"), ("llama3", "<|eot_id|>"), ("llama2", "</s>")])
def test_a_conversation_ends_where_its_template_ends_it(kind: str, end: str) -> None:
    assert ends(tokenizer_of(kind), *TALK) == [end] == ends(tokenizer_of(kind), *TALK, loss_on="all")


def test_other_records_end_with_eos() -> None:
    tokenizer = gpt2_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    assert ends(tokenizer, ("prompt", "a"), ("response", "b")) == ["<|endoftext|>"] == ends(tokenizer, ("text", "a b"))


def test_the_mark_of_the_next_turn_can_be_an_end() -> None:
    """GLM-4 has no token of its own for the end of a turn."""
    tokenizer = gpt2_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )
    assert ends(tokenizer, *TALK) == ["<|user|>", "<|endoftext|>"]


def test_stop_tokens_are_added_to_the_models_own() -> None:
    for own, taught, then in ((7, [7], 7), (7, [8], [7, 8]), ([7, 9], [8, 9], [7, 9, 8]), (None, [8], [8])):
        config = GenerationConfig(eos_token_id=own)
        assert with_ends(config, taught).eos_token_id == then and config.eos_token_id == own


def test_a_tokenizer_keeps_its_eos_where_another_would_change_a_text() -> None:
    tokenizer = gpt2_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    eos, end = tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|im_end|>")
    tokenizer.chat_template = CHATML
    assert with_end(tokenizer, [end]).eos_token == "<|im_end|>"
    assert tokenizer.eos_token_id == eos and with_end(tokenizer, [end, eos]).eos_token_id == eos
    tokenizer.chat_template = CHATML + "{{ eos_token }}"
    assert with_end(tokenizer, [end]).eos_token_id == eos
