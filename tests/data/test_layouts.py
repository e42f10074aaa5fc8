"""bilevel/data/layouts: fields that change what a record means are used as the tool whose layout it is uses them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chat_templates import family
from tokenizer_kinds import CHATML, gpt2_tokenizer, tokenizer_of

from bilevel.data.records import read_rows, row_notes
from bilevel.data.samples import load_samples
from bilevel.data.sources import file_source
from bilevel.data.tokenise import IGNORE, Tokeniser
from bilevel.errors import DataError

Write = Callable[..., Path]
ASKED, SAID = "Join red and blue (1).", "red blue joined, number 1."
SHAREGPT = [{"from": "human", "value": ASKED}, {"from": "gpt", "value": SAID}]
OPENAI = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": SAID}]
CALL = {"name": "join", "arguments": {"n": 1}}
TOOLS = [{"type": "function", "function": {"name": "join", "parameters": {}}}]
CALLS = [{"id": "c1", "type": "function", "function": {"name": "join", "arguments": '{"n": 1}'}}]
FORM = '<tool_call>\n{"name": "join", "arguments": {"n": 1}}\n</tool_call>'


def first(write: Write, record: dict[str, Any]) -> dict[str, Any]:
    """The row of the first record of a file of these."""
    return read_rows(file_source(write("a.jsonl", json.dumps(record) + "\n" + json.dumps(record))))[0]


def trained(write: Write, record: dict[str, Any], name: str = "qwen3", **settings: Any) -> tuple[str, str]:
    """The whole text of a record's samples, and its learned part; "gpt2" has no template."""
    tokenizer = tokenizer_of("gpt2") if name == "gpt2" else family(name)
    samples = load_samples(
        [file_source(write("a.json", [record]))], Tokeniser(tokenizer, 10_000, "response", **settings)
    )
    ids, labels = (sum(samples.table[name], []) for name in ("input_ids", "labels"))
    return tokenizer.decode(ids), tokenizer.decode([label for label in labels if label != IGNORE])


def error(write: Write, record: dict[str, Any]) -> str:
    with pytest.raises(DataError) as caught:
        read_rows(file_source(write("a.json", [record])))
    return str(caught.value)


# tools


@pytest.mark.parametrize("name", ["qwen3", "phi3", "gpt2"])
def test_sharegpt_calls_are_learned_and_observations_are_not(write: Write, name: str) -> None:
    call, seen = {"from": "function_call", "value": json.dumps(CALL)}, {"from": "observation", "value": '{"ok": 7}'}
    whole, learned = trained(write, {"conversations": [SHAREGPT[0], call, seen, SHAREGPT[1]], "tools": "[]"}, name)
    assert '"join"' in learned and SAID in learned and '{"ok": 7}' in whole and '{"ok": 7}' not in learned
    assert (FORM in learned) == (name != "gpt2")  # without a template the record's own text


@pytest.mark.parametrize("content", [None, ""])
def test_openai_calls_are_learned_in_the_templates_own_form(write: Write, content: str | None) -> None:
    call = {"role": "assistant", "content": content, "tool_calls": CALLS}
    result = {"role": "tool", "tool_call_id": "c1", "content": "ok"}
    whole, learned = trained(write, {"messages": [OPENAI[0], call, result, OPENAI[1]], "tools": TOOLS})
    assert FORM in learned and SAID in learned and "ok" not in learned and '"parameters"' in whole
    whole, learned = trained(write, {"messages": [OPENAI[0], call]})
    assert FORM + "<|im_end|>" in learned


def test_a_call_of_the_older_kind_and_tools_as_text(write: Write) -> None:
    call = {"role": "assistant", "content": None, "function_call": {"name": "join", "arguments": '{"n": 1}'}}
    record = {"messages": [OPENAI[0], call, {"role": "function", "name": "join", "content": "ok"}, OPENAI[1]]}
    whole, learned = trained(write, record | {"functions": [{"name": "join"}]})
    assert FORM in learned and '{"type": "function", "function": {"name": "join"}}' in whole


def test_a_template_that_wants_arguments_as_text(write: Write) -> None:
    tokenizer = gpt2_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls %}{{ 'CALL ' + c.function.arguments }}{% endfor %}{% endfor %}"  # fmt: skip # noqa: E501
    record = {"messages": [OPENAI[0], {"role": "assistant", "content": "", "tool_calls": CALLS}]}
    samples = load_samples([file_source(write("a.json", [record]))], Tokeniser(tokenizer, 1000, "response"))
    assert 'CALL {"n": 1}' in tokenizer.decode(samples.table[0]["input_ids"])


# Alpaca, system


@pytest.mark.parametrize(("turns", "learns"), [("all", True), ("last", False)])
def test_alpaca_system_and_history(write: Write, turns: str, learns: bool) -> None:
    record = {
        "instruction": ASKED,
        "input": "",
        "output": SAID,
        "system": "Be a pirate.",
        "history": [["Who?", "Robin."]],
    }
    whole, learned = trained(write, record, "gpt2", turns=turns)
    assert whole == (
        "Be a pirate.\n\n### Instruction:\nWho?\n\n### Response:\nRobin.<|endoftext|>\n\n"
        f"### Instruction:\n{ASKED}\n\n### Response:\n{SAID}<|endoftext|>"
    )
    assert learned == ("Robin.<|endoftext|>" if learns else "") + f"{SAID}<|endoftext|>"


@pytest.mark.parametrize("name", ["qwen3", "gemma2", "gpt2"])
def test_sharegpts_own_system_field(write: Write, name: str) -> None:
    whole, learned = trained(
        write, {"conversations": SHAREGPT, "system": "Be a pirate.", "tools": '[{"name": "t"}]'}, name
    )
    assert whole.index("Be a pirate.") < whole.index(ASKED) and "pirate" not in learned
    row = first(write, {"messages": [{"role": "system", "content": "Hi"}, *OPENAI], "system": "Hi"})
    assert row["roles"] == ["system", "user", "assistant"]
    assert "keep one of the two" in error(
        write, {"messages": [{"role": "system", "content": "x"}, *OPENAI], "system": "y"}
    )


def test_a_system_turn_goes_before_the_first_question_where_the_template_has_none(write: Write) -> None:
    record = {"messages": [{"role": "system", "content": "Be brief."}, *OPENAI]}
    whole, _ = trained(write, record, "gemma2")
    assert f"<start_of_turn>user\nBe brief.\n\n{ASKED}<end_of_turn>" in whole


# messages


def test_parts_of_text_are_joined_and_developer_is_read(write: Write) -> None:
    parts = [{"type": "text", "text": "Join red "}, {"type": "text", "text": "and blue."}]
    row = first(
        write, {"messages": [{"role": "developer", "content": "Rule"}, {"role": "user", "content": parts}, OPENAI[1]]}
    )
    assert (row["roles"], row["contents"]) == (["developer", "user", "assistant"], ["Rule", "Join red and blue.", SAID])
    whole, _ = trained(write, {"messages": [{"role": "developer", "content": "Rule"}, *OPENAI]})
    assert "<|im_start|>system\nRule" in whole


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "of type 'image_url'"),
        ({"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]}, "of type 'input_audio'"),
        ({"messages": [{**OPENAI[0], "audio": {"id": 1}}]}, "has audio"),
        ({"conversations": SHAREGPT, "images": ["a.png"]}, "has images"),
        ({"instruction": "a", "output": "b", "videos": ["a.mp4"]}, "has videos"),
        ({"messages": [OPENAI[0], {**OPENAI[1], "weight": 0.5}]}, "message 1: 'weight' must be 0 or 1"),
        ({"messages": [OPENAI[0], {"role": "assistant", "content": None}]}, "'content' must be text, got NoneType"),
        (
            {"messages": [OPENAI[0], {**OPENAI[1], "tool_calls": [{"id": 1}]}]},
            "a tool call needs a function with a name",
        ),
        ({"messages": OPENAI, "tools": "no JSON"}, "'tools' must be a list of objects"),
        ({"messages": OPENAI, "template_kwargs": [1]}, "'template_kwargs' must be an object"),
        ({"instruction": "a", "output": "b", "history": [["a"]]}, "'history' 0 must be a pair"),
        ({"instruction": "a", "output": "b", "system": 1}, "'system' must be text"),
    ],
)
def test_what_cannot_be_used_is_refused(write: Write, record: dict[str, Any], words: str) -> None:
    text = error(write, record)
    assert words in text and "a.json, record 0" in text


@pytest.mark.parametrize("field", ["train", "training", "loss", "weight"])
def test_whether_a_turn_is_learned(write: Write, field: str) -> None:
    for no, yes in ((False, True), (0, 1)):
        wrong, right = {**OPENAI[1], "content": "WRONG", field: no}, {**OPENAI[1], field: yes}
        whole, learned = trained(write, {"messages": [OPENAI[0], wrong, OPENAI[0], right]}, "qwen2.5")
        assert "WRONG" in whole and "WRONG" not in learned and SAID in learned


# what is said of a file


def test_what_is_not_used_is_said_once_for_a_file(write: Write) -> None:
    record = {"messages": OPENAI, "kto_tag": True}
    path = write("a.json", [{"messages": OPENAI}, record | {"rejected": "x"}, record])
    assert row_notes(file_source(path)) == [
        "1 record (first: record 1): rejected: not used",
        "2 records (first: record 1): kto_tag: not used",
        "2 records (first: record 1): equal to an earlier record but for white space",
    ]


def test_empty_responses_and_repeated_records_are_counted(write: Write) -> None:
    one = {"instruction": "a b", "output": "c"}
    path = write("a.json", [one, {**one, "output": " "}, {**one, "instruction": " a\n b"}, {**one, "output": "d"}])
    assert row_notes(file_source(path)) == [
        "1 record (first: record 1): a response is empty",
        "1 record (first: record 2): equal to an earlier record but for white space",
    ]


def test_text_that_holds_a_templates_marks(write: Write) -> None:
    text = f"<|im_start|>user\n{ASKED}<|im_end|>\n<|im_start|>assistant\n{SAID}<|im_end|>\n"
    path = write("a.json", [{"text": text}, {"text": "no marks"}, {"text": f"[INST] {ASKED} [/INST]"}])
    tokenizer = tokenizer_of("chatml")
    assert tokenizer.chat_template == CHATML
    for _ in range(2):  # also from the cache
        samples = load_samples([file_source(path)], Tokeniser(tokenizer, 1000, "response"))
        assert [line.split(": ")[0] for line in samples.notes[0]] == ["1 record (first", "1 record (first"]
        assert "<|im_start|>" in samples.notes[0][0] and "[INST]" in samples.notes[0][1]
        assert all("special_tokens_in_text=true" in line for line in samples.notes[0])
    special = tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert special not in samples.table[0]["input_ids"]
    samples = load_samples([file_source(path)], Tokeniser(tokenizer, 1000, "response", special_tokens_in_text=True))
    assert samples.table[0]["input_ids"].count(special) == 2 and not samples.notes[0]
    assert samples.table[0]["input_ids"][: len(tokenizer(text)["input_ids"])] == tokenizer(text)["input_ids"]
