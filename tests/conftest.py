"""Shared by all tests: a cache of their own, small tokenizers of the common kinds, chat templates."""

import os
import tempfile

_HOME = tempfile.TemporaryDirectory(prefix="bilevel-tests-")
os.environ["HF_DATASETS_CACHE"] = _HOME.name  # read when datasets is imported: the user's cache stays as it is
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import json  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import datasets  # noqa: E402
import pytest  # noqa: E402
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers  # noqa: E402
from transformers import GPT2Tokenizer, LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast  # noqa: E402

SENTENCES = [
    "### Instruction:\nName the capital of France.\n\n### Response:\nThe capital of France is Paris.",
    "### System:\nYou are a helpful assistant.\n\n### User:\nHello there!\n\n### Assistant:\nHello, how are you?",
    "### Input:\nAdd 12 and 30, then say the answer in words.\n\n### Response:\nForty two.",
    "user system assistant The quick brown fox jumps over the lazy dog; it's a dog's life, isn't it?",
    "    def add(a, b):\n        return a + b\n\n\nprint(add(1, 2))",
]
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message.role }}<|end_header_id|>\n\n"
    "{{ message.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
# No system role; BOS before every user message; spaces around both contents.
LLAMA2 = (
    "{% for message in messages %}"
    "{% if message.role == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% elif message.role == 'user' %}{{ bos_token }}{{ '[INST] ' + message.content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + message.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)


@pytest.fixture(scope="session", autouse=True)
def own_cache() -> Iterator[None]:
    assert str(datasets.config.HF_DATASETS_CACHE) == _HOME.name
    datasets.disable_progress_bars()
    yield
    _HOME.cleanup()


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    """write(name, records): a JSON file of the records; text is written as it is."""

    def write_file(name: str, content: Any) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        data = content if isinstance(content, (str, bytes)) else json.dumps(content, ensure_ascii=False)
        path.write_bytes(data if isinstance(data, bytes) else data.encode())
        return path

    return write_file


def byte_bpe(special_tokens: list[str], size: int = 450, **pre_tokenizer: Any) -> Tokenizer:
    """A byte-level BPE as GPT-2 and Llama-3 have it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(**{"add_prefix_space": False} | pre_tokenizer)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(SENTENCES, trainer)
    return tokenizer


def model_part(tokenizer: Tokenizer) -> dict[str, Any]:
    """vocab and merges, as the tokenizer classes of transformers take them."""
    model = json.loads(tokenizer.to_str())["model"]
    return {"vocab": model["vocab"], "merges": [tuple(merge) for merge in model["merges"]]}


def gpt2_tokenizer() -> PreTrainedTokenizerBase:
    """Byte-level BPE; bos = eos; adds neither."""
    return GPT2Tokenizer(**model_part(byte_bpe(["<|endoftext|>"])))


def chatml_tokenizer() -> PreTrainedTokenizerBase:
    """The GPT-2 kind with ChatML's special tokens and template, as Qwen has it; eos is <|im_end|>."""
    tokenizer = gpt2_tokenizer()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "eos_token": "<|im_end|>"}
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def llama_tokenizer() -> PreTrainedTokenizerBase:
    """BPE over ▁-words with byte fallback; a space before the text; BOS <s> added, EOS </s> not."""
    bpe = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    bpe.normalizer = normalizers.Replace("\n", " ")  # SentencePiece has no newline in its pieces
    bpe.pre_tokenizer = pre_tokenizers.Metaspace()
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=560, special_tokens=special, show_progress=False)
    bpe.train_from_iterator(SENTENCES, trainer)
    return LlamaTokenizer(**model_part(bpe), add_bos_token=True)


def llama2_chat_tokenizer() -> PreTrainedTokenizerBase:
    tokenizer = llama_tokenizer()
    tokenizer.chat_template = LLAMA2
    return tokenizer


def llama3_tokenizer(chat_template: str | None = LLAMA3) -> PreTrainedTokenizerBase:
    """Byte-level BPE whose post-processor puts a BOS; eos is <|eot_id|>, as in the instruct models."""
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    bpe = byte_bpe(special)
    bpe.post_processor = processors.TemplateProcessing(
        single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", bpe.token_to_id("<|begin_of_text|>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        additional_special_tokens=special[1:4],
        chat_template=chat_template,
    )


KINDS: dict[str, Callable[[], PreTrainedTokenizerBase]] = {
    "gpt2": gpt2_tokenizer,
    "chatml": chatml_tokenizer,
    "llama": llama_tokenizer,
    "llama2": llama2_chat_tokenizer,
    "llama3": llama3_tokenizer,
}


@pytest.fixture(scope="session")
def tokenizers_by_kind() -> dict[str, PreTrainedTokenizerBase]:
    return {kind: make() for kind, make in KINDS.items()}
