"""To the left of a learned token stands the prompt of generation and the response so far, for many chat templates.

Trusted reference: the tokenizer's own apply_chat_template.
"""

import copy
import functools
import json
from typing import Any

import pytest
from chat_templates import FAMILIES, family
from tokenizer_kinds import gpt2_tokenizer

from bilevel.data.layouts.conversation import conversation
from bilevel.data.tokenise import IGNORE, Tokeniser
from bilevel.errors import DataError

SYSTEM = {"role": "system", "content": "You are a helpful assistant."}
Q1, Q2 = {"role": "user", "content": "Name the capital."}, {"role": "user", "content": "\n How many? 12 </s>\n\n"}
A1, A2 = {"role": "assistant", "content": "The capital is Paris."}, {"role": "assistant", "content": " Forty two\n"}
T1 = {"role": "assistant", "content": "<think>\nFrance, so Paris.\n</think>\n\nThe capital is Paris."}
T2 = {"role": "assistant", "reasoning_content": "12 and 30.", "content": "Forty two."}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"a": 12}}}],
}
RESULT = {"role": "tool", "content": "42"}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
TALKS = {
    "one": [Q1, A1],
    "system": [SYSTEM, Q1, A1],
    "turns": [SYSTEM, Q1, A1, Q2, A2, Q1, A1],
    "white space": [Q2, A2],
    "thinking": [Q1, T1],
    "thinking in a field": [Q1, T2],
    "thinking in turns": [SYSTEM, Q1, T1, Q2, T2, Q1, A1],
    "tools": [Q1, CALL, RESULT, A1, Q2, A2],
    "a call at the end": [Q1, CALL],
}
WITH_TOOLS = ("qwen2.5", "qwen3", "llama3.1", "mistral")
NO_THINKING = {"enable_thinking": False}


def rows_of(record: dict[str, Any]) -> dict[str, list[Any]]:
    row = conversation(record, "here")
    roles, contents = zip(*row.turns, strict=True)
    more = json.dumps(row.more) if row.more else None
    return {"index": [4], "is_noisy": [None], "roles": [list(roles)], "contents": [list(contents)], "more": [more]}


@functools.cache
def tokeniser_of(name: str, settings: str) -> Tokeniser:
    return Tokeniser(family(name), 10_000, "response", **json.loads(settings))


def samples_of(name: str, record: dict[str, Any], **settings: Any) -> list[tuple[list[int], list[int]]]:
    """(input_ids, labels) of the samples of a record, whose places in the batch are all 4."""
    out = tokeniser_of(name, json.dumps(settings))(rows_of(record))
    assert set(out["index"]) <= {4}
    return list(zip(out["input_ids"], out["labels"], strict=True))


def starts(labels: list[int]) -> list[int]:
    """Where learned stretches begin."""
    return [i for i, label in enumerate(labels) if label != IGNORE and (i == 0 or labels[i - 1] == IGNORE)]


def end_of(labels: list[int], start: int) -> int:
    return next((i for i in range(start, len(labels)) if labels[i] == IGNORE), len(labels))


def prompts_of(name: str, messages: list[dict[str, Any]], tools: list | None, kwargs: dict) -> list[list[int]]:
    """What generation gives the model for each of the assistant's turns."""
    tokenizer = family(name)
    if name == "gemma2" and messages[0]["role"] == "system":
        first = {**messages[1], "content": f"{messages[0]['content']}\n\n{messages[1]['content']}"}
        messages = [first, *messages[2:]]
    return [
        tokenizer.apply_chat_template(
            copy.deepcopy(messages[:i]),
            tools=tools,
            add_generation_prompt=True,
            sanitize_control_tokens="</s>" in tokenizer.all_special_tokens,
            **kwargs,
        )["input_ids"]
        for i, message in enumerate(messages)
        if message["role"] == "assistant"
    ]


CASES = [
    (name, talk, kwargs)
    for name in FAMILIES
    if name != "masked"
    for talk, messages in TALKS.items()
    if CALL not in messages or name in WITH_TOOLS
    for kwargs in ({}, NO_THINKING)
    if not kwargs or name == "qwen3"
]


@pytest.mark.parametrize(("name", "talk", "kwargs"), CASES)
def test_to_the_left_of_a_learned_token_stands_what_generation_has(name: str, talk: str, kwargs: dict) -> None:
    messages = TALKS[talk]
    tools = TOOLS if CALL in messages else None
    samples = samples_of(name, {"messages": messages, "tools": tools}, template_kwargs=kwargs)
    left = prompts_of(name, messages, tools, kwargs)
    found = []
    for ids, labels in samples:
        for start in starts(labels):
            assert ids[:start] in left, family(name).decode(ids[:start])
            found.append(left.index(ids[:start]))
    assert sorted(found) == [*range(len(left))]  # every turn is learned, once


@pytest.mark.parametrize(("name", "talk"), [(name, talk) for name, talk, kwargs in CASES if not kwargs])
def test_a_learned_turn_is_the_response_and_its_end(name: str, talk: str) -> None:
    tokenizer, messages = family(name), TALKS[talk]
    samples = samples_of(name, {"messages": messages, "tools": TOOLS if CALL in messages else None})
    texts = [
        tokenizer.decode(labels[start : end_of(labels, start)]) for _, labels in samples for start in starts(labels)
    ]
    assert len(texts) == sum(message["role"] == "assistant" for message in messages)
    joined = "\0".join(texts)
    for message in messages:
        if message["role"] == "assistant":
            said = message["content"].split("</think>")[-1].strip() if "tool_calls" not in message else '"add"'
            assert said in joined
            if thought := message.get("reasoning_content") or "France, so Paris." * ("<think>" in message["content"]):
                assert joined.count(thought) == 1
    special = [any(token in tokenizer.all_special_ids for token in tokenizer(text)["input_ids"][-1:]) for text in texts]
    assert all(special), texts
    assert not any("user" in text or "im_start" in text for text in texts if name != "glm4")


def test_one_thinking_block_wherever_the_record_has_it() -> None:
    words = "<think>\n12 and 30.\n</think>\n\nForty two."
    in_content = {"messages": [Q1, {"role": "assistant", "content": words}]}
    in_field = {"messages": [Q1, T2]}
    one, two = samples_of("qwen3", in_content), samples_of("qwen3", in_field)
    assert one == two and len(one) == 1
    [(ids, labels)] = one
    [start] = starts(labels)
    assert family("qwen3").decode(labels[start : end_of(labels, start)]) == words + "<|im_end|>"


@pytest.mark.parametrize(("turns", "learned"), [("all", [0, 1, 2]), ("shared", [2]), ("last", [2])])
def test_turns_that_the_template_rewrites(turns: str, learned: list[int]) -> None:
    messages = [Q1, T1, Q1, T1, Q1, T1]
    left = prompts_of("qwen3", messages, None, {})
    samples = samples_of("qwen3", {"messages": messages}, turns=turns)
    assert [left.index(ids[:start]) for ids, labels in samples for start in starts(labels)] == learned


def test_turns_that_share_one_text_are_one_sample_unless_only_the_last_is_wanted() -> None:
    messages = [Q1, A1, Q1, A1]
    for turns, count in (("all", 2), ("shared", 2), ("last", 1)):
        [(_, labels)] = samples_of("qwen2.5", {"messages": messages}, turns=turns)
        assert len(starts(labels)) == count


def test_template_kwargs_of_a_record_go_before_those_of_the_settings() -> None:
    kwargs = {"enable_thinking": True}
    record = {"messages": [Q1, A1], "template_kwargs": NO_THINKING}
    [(ids, labels)] = samples_of("qwen3", record, template_kwargs=kwargs)
    assert ids[: starts(labels)[0]] == prompts_of("qwen3", [Q1, A1], None, NO_THINKING)[0]


def test_assistant_masks_are_used_with_the_token_that_ends_the_turn() -> None:
    tokenizer, messages = family("masked"), [Q1, A1, Q1, A1]
    native = tokenizer.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    [(ids, labels)] = samples_of("masked", {"messages": messages})
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    mask = native["assistant_masks"]
    wanted = [on or (token == end and mask[i - 1]) for i, (token, on) in enumerate(zip(ids, mask, strict=True))]
    assert ids == native["input_ids"] and [label != IGNORE for label in labels] == [bool(on) for on in wanted]


def test_an_end_that_is_added_but_not_special_is_learned() -> None:
    tokenizer = gpt2_tokenizer()
    tokenizer.add_tokens(["<|stop|>"])
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content + '<|stop|>\n' }}{% endfor %}"
    out = Tokeniser(tokenizer, 100, "response")(rows_of({"messages": [Q1, A1]}))
    [labels] = out["labels"]
    assert tokenizer.decode([label for label in labels if label != IGNORE]) == " The capital is Paris.<|stop|>"


@pytest.mark.parametrize("kind", ["chat", "plain"])
def test_a_turn_of_weight_0_is_context_only(kind: str) -> None:
    tokenizer = family("qwen2.5") if kind == "chat" else gpt2_tokenizer()
    wrong = {**A1, "content": "WRONG", "weight": 0}
    out = Tokeniser(tokenizer, 1000, "response")(rows_of({"messages": [Q1, wrong, Q1, {**A1, "weight": 1}]}))
    [labels], [ids] = out["labels"], out["input_ids"]
    learned = tokenizer.decode([label for label in labels if label != IGNORE])
    assert "Paris" in learned and "WRONG" not in learned and "WRONG" in tokenizer.decode(ids)


def test_what_a_template_has_no_form_for_is_said_and_stays_text() -> None:
    tokeniser = Tokeniser(family("phi3"), 1000, "response")
    out = tokeniser(rows_of({"messages": [Q1, {**CALL, **T2, "content": ""}], "tools": TOOLS}))
    text = family("phi3").decode(out["input_ids"][0])
    assert '<tool_call>\n{"name": "add", "arguments": {"a": 12}}\n</tool_call>' in text and "12 and 30." in text
    assert all(word in out["notes"][0] for word in ("tool_calls: ", "reasoning_content: ", "tools: "))


# limits

ENDLESS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}" * 9,
    "multiplies": "{{ 'x' * 99999999999 }}",
    "doubles": "{% set n = namespace(t='x') %}{% for i in range(99) %}{% set n.t = n.t ~ n.t %}{% endfor %}{{ n.t }}",
    "is too long": "{{ 'x' * 9999999 }}",
    "computes": "{{ 9 ** (9 ** 9) }}",
}


@pytest.mark.parametrize("source", ENDLESS.values(), ids=ENDLESS)
def test_a_template_without_end_is_told_with_its_folder(source: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import bilevel.data.renderer as renderer

    monkeypatch.setattr(
        renderer, "_SERVE", renderer._SERVE.replace("; renderer.serve", "; renderer.SECONDS = 1; renderer.serve")
    )
    tokenizer = gpt2_tokenizer()
    tokenizer.chat_template, tokenizer.name_or_path = source, "models/endless"
    with pytest.raises(DataError, match="record 4: the chat template of models/endless goes beyond the limits"):
        Tokeniser(tokenizer, 100, "response")(rows_of({"messages": [Q1, A1]}))
