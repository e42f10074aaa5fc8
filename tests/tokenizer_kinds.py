"""Small tokenizers of the common kinds, trained on a few sentences, and chat templates of the common shapes."""

import functools
import json
from collections.abc import Callable
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import GPT2Tokenizer, LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

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


# How Llama-3 splits text into words.
LLAMA3_WORDS = Regex(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def byte_bpe(special_tokens: list[str], words: Regex | None = None) -> Tokenizer:
    """A byte-level BPE; words: how text is split, GPT-2's way when not given."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.decoder = decoders.ByteLevel()
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words is None)
    splits = [pre_tokenizers.Split(words, "isolated")] if words else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])
    trainer = trainers.BpeTrainer(
        vocab_size=450,
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


def gpt2_tokenizer(**arguments: Any) -> PreTrainedTokenizerBase:
    """Byte-level BPE; bos = eos; adds neither."""
    return GPT2Tokenizer(**model_part(byte_bpe(["<|endoftext|>"])), **arguments)


def chatml_tokenizer() -> PreTrainedTokenizerBase:
    """The GPT-2 kind with ChatML's special tokens and template, as Qwen has it; eos is <|im_end|>."""
    tokenizer = gpt2_tokenizer()
    tokenizer.add_special_tokens(
        {"additional_special_tokens": ["<|im_start|>", "<|im_end|>"], "eos_token": "<|im_end|>"}
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def llama_tokenizer(newlines: bool = False) -> PreTrainedTokenizerBase:
    """BPE over ▁-words with byte fallback; a space before the text; BOS <s> added, EOS </s> not.

    Llama's own pieces hold no newline (it becomes a byte); with `newlines` some do.
    """
    bpe = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    if not newlines:
        bpe.normalizer = normalizers.Replace("\n", " ")
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
    bpe = byte_bpe(special, LLAMA3_WORDS)
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
    "gpt2-space": lambda: gpt2_tokenizer(add_prefix_space=True),
    "llama": llama_tokenizer,
    "llama-newlines": lambda: llama_tokenizer(newlines=True),
    "llama2": llama2_chat_tokenizer,
    "llama3": llama3_tokenizer,
}


@functools.cache
def tokenizer_of(kind: str) -> PreTrainedTokenizerBase:
    """One tokenizer of the kind for all tests; none may change it."""
    return KINDS[kind]()
