"""bilevel/data/tokenise.py: what is supervised, BOS, EOS, truncation, chat templates, on all kinds of tokenizers.

Trusted references: the tokenizer itself, on the prompt alone or on the whole text, and its chat template.
"""

import itertools

import pytest
from tokenizer_kinds import KINDS, SENTENCES, gpt2_tokenizer, llama_tokenizer, tokenizer_of
from transformers import PreTrainedTokenizerBase

from bilevel.data.bad_records import BadRecords
from bilevel.data.special import ANCHOR
from bilevel.data.tokenise import IGNORE, Tokeniser
from bilevel.errors import DataError

PROMPT = "### Instruction:\nName it \N{GRINNING FACE}\n\n### Response:\n"
SPECIAL_TEXTS = [
    "</s>",
    "<|endoftext|> <|im_end|>",
    "a<|eot_id|><s>b<|im_start|>user",
    f"{ANCHOR}0\ue000",
    ANCHOR,
    "\ue000",
]
RESPONSES = [
    *("Paris.", "Hello there", "\nfoo", "\n\nThe capital", "\n\n\nprint(add(1, 2))", "\r\nx", "\ttab", "'s life", "12"),
    *(" foo", "  two", "foo ", "foo\n", " ", "\n", "", "é", "\N{GRINNING FACE} 日本", "🇫🇷👩‍👩‍👧", "\x00a", "½", "Ġ"),
    *SPECIAL_TEXTS,
]
FIRST_QUESTION, SECOND_QUESTION = "Hello there! It's\n\n  a dog's life?", "日本 </s> <|im_end|> [INST] {{ x }} 12"
FIRST_ANSWER, SECOND_ANSWER = "Hello, how are you?\n\nFine.", "'s 😀 <|endoftext|><s> forty  two"
TALK = [
    {"role": "user", "content": FIRST_QUESTION},
    {"role": "assistant", "content": FIRST_ANSWER},
    {"role": "user", "content": SECOND_QUESTION},
    {"role": "assistant", "content": SECOND_ANSWER},
]
SYSTEM = {"role": "system", "content": "You are a helpful assistant."}


def tokenise(
    tokenizer: PreTrainedTokenizerBase,
    roles: list[str],
    contents: list[str],
    max_length: int = 10_000,
    loss_on: str = "response",
) -> list[tuple[list[int], list[int]]]:
    """(input_ids, labels) of the samples that one record becomes; the same in a batch with other records."""
    other = ("text", ["text"], ["xyz"])
    batch = {
        "roles": [other[1], roles, other[1]],
        "contents": [other[2], contents, other[2]],
        "index": [3, 4, 5],
        "is_noisy": [None, True, False],
    }
    out = Tokeniser(tokenizer, max_length, loss_on)(batch)
    assert all(noisy == {3: None, 4: True, 5: False}[i] for i, noisy in zip(out["index"], out["is_noisy"], strict=True))
    pairs = zip(out["index"], out["input_ids"], out["labels"], strict=True)
    return [(ids, labels) for index, ids, labels in pairs if index == 4]


def talk(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], **settings) -> tuple[list[int], list[int]]:
    roles, contents = [m["role"] for m in messages], [m["content"] for m in messages]
    [sample] = tokenise(tokenizer, roles, contents, **settings)
    return sample


def runs(labels: list[int]) -> list[list[int]]:
    """The stretches of supervised tokens."""
    groups = itertools.groupby(labels, lambda label: label != IGNORE)
    return [list(group) for supervised, group in groups if supervised]


# prompt and response


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("response", RESPONSES, ids=repr)
def test_supervised_tokens_are_the_response_and_eos(kind: str, response: str) -> None:
    tokenizer = tokenizer_of(kind)
    native = tokenizer(PROMPT)["input_ids"]
    [(ids, labels)] = tokenise(tokenizer, ["prompt", "response"], [PROMPT, response])
    n = len(native)
    assert ids[:n] == native and labels[:n] == [IGNORE] * n
    assert labels[n:] == ids[n:] and ids[-1] == tokenizer.eos_token_id
    assert not set(ids[n:-1]) & set(tokenizer.all_special_ids)
    assert tokenizer.decode(ids[:-1]) == tokenizer.decode(native) + response


@pytest.mark.parametrize("kind", KINDS)
def test_bos_once_where_the_tokenizer_puts_one_and_eos_once(kind: str) -> None:
    tokenizer = tokenizer_of(kind)
    [(ids, _)] = tokenise(tokenizer, ["prompt", "response"], [PROMPT, "Paris."])
    bos = [tokenizer.bos_token_id] if kind.startswith("llama") else []
    special = [token for token in ids if token in tokenizer.all_special_ids]
    assert special == [*bos, tokenizer.eos_token_id] and ids[: len(bos)] == bos


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", SPECIAL_TEXTS, ids=repr)
def test_text_of_a_prompt_never_becomes_a_special_token(kind: str, text: str) -> None:
    tokenizer = tokenizer_of(kind)
    [(ids, _)] = tokenise(tokenizer, ["prompt", "response"], [text + PROMPT, ""])
    assert sum(token in tokenizer.all_special_ids for token in ids) == 1 + kind.startswith("llama")
    assert tokenizer.decode(ids).endswith(text + PROMPT + tokenizer.eos_token)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss_on", ["response", "all"])
def test_truncation(kind: str, loss_on: str) -> None:
    tokenizer = tokenizer_of(kind)
    record = (["prompt", "response"], [PROMPT, "The capital of France is Paris."])
    [(ids, labels)] = tokenise(tokenizer, *record, loss_on=loss_on)
    prompt = len(tokenizer(PROMPT)["input_ids"])
    for max_length in range(2, len(ids) + 2):
        samples = tokenise(tokenizer, *record, max_length=max_length, loss_on=loss_on)
        dropped = loss_on == "response" and max_length <= prompt
        assert samples == ([] if dropped else [(ids[:max_length], labels[:max_length])])


@pytest.mark.parametrize("kind", KINDS)
def test_loss_on_all(kind: str) -> None:
    for roles in (["prompt", "response"], ["user", "assistant"], ["text"]):
        [(ids, labels)] = tokenise(tokenizer_of(kind), roles, ["The quick", "brown fox"][: len(roles)], loss_on="all")
        assert labels == ids


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("max_length", [2, 3, 7, 64])
def test_text_is_chunked_without_loss(kind: str, max_length: int) -> None:
    tokenizer = tokenizer_of(kind)
    words = " ".join(SENTENCES).split(" ")
    for length in range(1, len(words), 7):  # many lengths, so that the last chunk takes every size
        text = " ".join(words[:length])
        whole = [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        chunks = [whole[i : i + max_length] for i in range(0, len(whole), max_length)]
        samples = tokenise(tokenizer, ["text"], [text], max_length=max_length)
        # A last chunk of a single token has nothing to predict.
        assert [ids for ids, _ in samples] == [chunk for chunk in chunks if len(chunk) > 1]
        assert all(labels[1:] == ids[1:] for ids, labels in samples)


# chat


@pytest.mark.parametrize("kind", ["chatml", "llama3", "llama2"])
@pytest.mark.parametrize("turns", [2, 4])
def test_chat_template_gives_the_native_tokens(kind: str, turns: int) -> None:
    """Contents do not begin or end with white space here: those that Llama-2's and -3's templates strip stay as given.

    sanitize_control_tokens: transformers' own way to keep a record's text from becoming a special token.
    """
    tokenizer = tokenizer_of(kind)
    messages = ([] if kind == "llama2" else [SYSTEM]) + TALK[:turns]
    ids, labels = talk(tokenizer, messages)
    assert ids == tokenizer.apply_chat_template(messages, sanitize_control_tokens=True)["input_ids"]
    plain = [{**m, "content": m["content"].translate(str.maketrans("<|>", "(/)"))} for m in messages]
    assert talk(tokenizer, plain)[0] == tokenizer.apply_chat_template(plain)["input_ids"]
    # The prompt is the one that the model is given to answer.
    asked = tokenizer.apply_chat_template(plain[:-1], add_generation_prompt=True)["input_ids"]
    ids, labels = talk(tokenizer, plain)
    assert ids[: len(asked)] == asked
    assert labels[len(asked) - 1] == IGNORE and labels[len(asked)] != IGNORE


@pytest.mark.parametrize(
    ("kind", "ends"),
    [
        ("chatml", "{}<|im_end|>"),
        ("llama3", "{}<|eot_id|>"),
        ("llama2", "{} </s>"),  # decoding strips the first of the template's spaces, the second is there
        ("gpt2", "{}<|endoftext|>"),
        ("llama", "{}</s>"),
    ],
)
def test_each_answer_and_its_end_are_supervised_and_nothing_else(kind: str, ends: str) -> None:
    tokenizer = tokenizer_of(kind)
    ids, labels = talk(tokenizer, TALK)
    assert [tokenizer.decode(run) for run in runs(labels)] == [ends.format(FIRST_ANSWER), ends.format(SECOND_ANSWER)]
    assert all(label in (IGNORE, token) for token, label in zip(ids, labels, strict=True))
    # A question after the last answer is not supervised; two answers in a row both are.
    if kind != "llama2":
        ids, labels = talk(tokenizer, [TALK[1], SYSTEM, TALK[1], TALK[3], TALK[2]])
        answers = [ends.format(text) for text in (FIRST_ANSWER, FIRST_ANSWER, SECOND_ANSWER)]
        assert [tokenizer.decode(run) for run in runs(labels)] == answers


@pytest.mark.parametrize("kind", ["gpt2", "llama", "llama3"])
def test_plain_chat(kind: str) -> None:
    tokenizer = KINDS[kind]()
    tokenizer.chat_template = None
    messages = [SYSTEM, {"role": "user", "content": "Hello.\n"}, TALK[1], TALK[0], {**TALK[1], "content": "Paris."}]
    ids, labels = talk(tokenizer, messages)
    eos = tokenizer.eos_token
    text = (
        "### System:\nYou are a helpful assistant.\n\n### User:\nHello.\n\n\n### Assistant:\n"
        f"{FIRST_ANSWER}{eos}\n\n### User:\n{FIRST_QUESTION}\n\n### Assistant:\nParis.{eos}"
    )
    assert ids == tokenizer(text)["input_ids"]
    assert [tokenizer.decode(run) for run in runs(labels)] == [FIRST_ANSWER + eos, "Paris." + eos]


@pytest.mark.parametrize("kind", ["gpt2", "chatml", "llama3", "llama"])
@pytest.mark.parametrize("text", RESPONSES, ids=repr)
def test_text_of_a_message_stays_text(kind: str, text: str) -> None:
    tokenizer = tokenizer_of(kind)
    messages = [{**message, "content": text} for message in (SYSTEM, *TALK)]
    harmless = [{**message, "content": "x"} for message in messages]
    # Where a message's white space joins a token of the prompt, its turn has a sample of its own.
    samples = tokenise(tokenizer, [m["role"] for m in messages], [m["content"] for m in messages])
    special = set(tokenizer.all_special_ids)
    assert [i for i in samples[-1][0] if i in special] == [i for i in talk(tokenizer, harmless)[0] if i in special]
    answers = [tokenizer.decode(run) for _, labels in samples for run in runs(labels)]
    # Decoding a run on its own strips a first space where the tokenizer puts one before every text; Llama-3's template
    # strips every text.
    bare = {"llama": text.removeprefix(" "), "llama3": text.strip()}.get(kind, text)
    assert answers == [bare + tokenizer.eos_token] * 2


@pytest.mark.slow
def test_chat_is_cut_at_max_length() -> None:
    tokenizer = tokenizer_of("chatml")
    ids, labels = talk(tokenizer, TALK)
    for max_length in range(2, len(ids)):
        samples = tokenise(tokenizer, [m["role"] for m in TALK], [m["content"] for m in TALK], max_length)
        kept = any(label != IGNORE for label in labels[:max_length])
        assert samples == ([(ids[:max_length], labels[:max_length])] if kept else [])


def test_template_that_begins_with_a_message() -> None:
    """Llama's space before the text is then the message's."""
    tokenizer = llama_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content + ('</s>' if m.role == 'assistant' else '\n') }}{% endfor %}"
    )
    ids, labels = talk(tokenizer, TALK[:2])
    assert ids == tokenizer.apply_chat_template(TALK[:2])["input_ids"]
    assert [tokenizer.decode(run) for run in runs(labels)] == [FIRST_ANSWER + "</s>"]


def test_template_without_an_end_token_gets_eos() -> None:
    tokenizer = gpt2_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    ids, labels = talk(tokenizer, TALK[:2])
    assert tokenizer.decode(ids) == f"user: {FIRST_QUESTION}\nassistant: {FIRST_ANSWER}\n<|endoftext|>"
    assert [tokenizer.decode(run) for run in runs(labels)] == [f" {FIRST_ANSWER}", "<|endoftext|>"]


def test_template_that_refuses_names_the_record() -> None:
    tokenizer = gpt2_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('turns have to alternate') }}"
    rows = {"roles": [["user", "assistant"]], "contents": [["a", "b"]], "index": [4], "is_noisy": [None]}
    refused = "record 4: the tokenizer's chat template refuses it: turns have to alternate"
    out = Tokeniser(tokenizer, 100, "response")(rows)
    assert out["index"] == [4] and out["problem"] == [refused] and out["input_ids"] == [[]]
    with pytest.raises(BadRecords, match=refused):
        Tokeniser(tokenizer, 100, "response").prompts(rows)
    assert Tokeniser(tokenizer, 100, "response").ends(rows) == []


# the tokeniser itself


def test_no_eos_token() -> None:
    tokenizer = gpt2_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(DataError, match="no EOS token"):
        Tokeniser(tokenizer, 512, "response")


@pytest.mark.parametrize("kind", KINDS)
def test_fingerprint_stays_with_use(kind: str) -> None:
    tokenizer = KINDS[kind]()
    tokeniser = Tokeniser(tokenizer, 512, "response")
    before = tokeniser.fingerprint
    assert Tokeniser(KINDS[kind](), 512, "response").fingerprint == before
    tokeniser({"roles": [["text"]], "contents": [["x </s>"]], "index": [0], "is_noisy": [None]})
    tokenise(tokenizer, ["user", "assistant"], ["a", "b"])
    tokenizer(["a", "b c"], add_special_tokens=True)
    assert tokeniser.fingerprint == Tokeniser(tokenizer, 512, "response").fingerprint == before


def test_fingerprint_changes_with_what_changes_tokens() -> None:
    tokenizer, other = KINDS["chatml"](), KINDS["chatml"]()
    prints = [
        Tokeniser(tokenizer, 512, "response").fingerprint,
        Tokeniser(tokenizer, 511, "response").fingerprint,
        Tokeniser(tokenizer, 512, "all").fingerprint,
    ]
    other.chat_template += " "
    prints.append(Tokeniser(other, 512, "response").fingerprint)
    other.bos_token = "<|im_start|>"  # a template may write it
    prints.append(Tokeniser(other, 512, "response").fingerprint)
    other.eos_token = "<|endoftext|>"
    prints.append(Tokeniser(other, 512, "response").fingerprint)
    other.add_tokens(["Paris"])
    prints.append(Tokeniser(other, 512, "response").fingerprint)
    assert len(set(prints)) == len(prints)
