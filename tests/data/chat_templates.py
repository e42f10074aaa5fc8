"""Chat templates with the structure of well-known families, written for these tests, and tokenizers for them."""

# ruff: noqa: E501 - a line of a template is one piece of what it writes

import functools

from tokenizer_kinds import LLAMA3_WORDS, byte_bpe
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

# A default system text, tools in the system turn, calls as blocks of JSON, results in the user's turns.
QWEN25 = """
{%- if messages[0].role == 'system' -%}{%- set rule = messages[0].content -%}
{%- else -%}{%- set rule = 'You are Qwen, made to help.' -%}{%- endif -%}
{{- '<|im_start|>system\n' + rule -}}
{%- if tools -%}{{- '\n\n# Tools\n' -}}{%- for tool in tools -%}{{- (tool | tojson) + '\n' -}}{%- endfor -%}{%- endif -%}
{{- '<|im_end|>\n' -}}
{%- for message in messages -%}
{%- if message.role == 'user' or message.role == 'system' and not loop.first
    or message.role == 'assistant' and not message.tool_calls -%}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' -}}
{%- elif message.role == 'assistant' -%}
{{- '<|im_start|>assistant' -}}{%- if message.content -%}{{- '\n' + message.content -}}{%- endif -%}
{%- for call in message.tool_calls -%}
{{- '\n<tool_call>\n' + ({'name': call.function.name, 'arguments': call.function.arguments} | tojson) + '\n</tool_call>' -}}
{%- endfor -%}{{- '<|im_end|>\n' -}}
{%- elif message.role == 'tool' -%}
{{- '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""
# Thinking from a field or out of the content; dropped before the last question, an empty block after it.
QWEN3 = """
{%- set seen = namespace(last=0) -%}
{%- for message in messages -%}{%- if message.role == 'user' -%}{%- set seen.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{%- if tools -%}{{- '<|im_start|>system\n# Tools\n' + (tools | tojson) + '<|im_end|>\n' -}}{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
{%- set said = message.content -%}{%- set thought = '' -%}
{%- if message.reasoning_content is string -%}{%- set thought = message.reasoning_content -%}
{%- elif '</think>' in said -%}
{%- set thought = said.split('</think>')[0].split('<think>')[-1] -%}{%- set said = said.split('</think>')[-1] -%}
{%- endif -%}
{{- '<|im_start|>assistant\n' -}}
{%- if loop.index0 > seen.last and (loop.last or thought) -%}
{{- '<think>\n' + thought.strip('\n') + '\n</think>\n\n' -}}
{%- endif -%}
{{- said.lstrip('\n') -}}
{%- for call in message.tool_calls -%}{{- '\n<tool_call>\n' + (call.function | tojson) + '\n</tool_call>' -}}{%- endfor -%}
{{- '<|im_end|>\n' -}}
{%- elif message.role == 'tool' -%}{{- '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' -}}
{%- else -%}{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\n' -}}{%- if enable_thinking is defined and not enable_thinking -%}{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}
{%- endif -%}
"""
# Every content trimmed, tools before the first question, a call as bare JSON, results as ipython.
LLAMA31 = """
{{- bos_token -}}
{%- for message in messages -%}
{%- if message.tool_calls -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' + (message.tool_calls[0].function | tojson) + '<|eot_id|>' -}}
{%- elif message.role in ['tool', 'ipython'] -%}
{{- '<|start_header_id|>ipython<|end_header_id|>\n\n' + (message.content | tojson) + '<|eot_id|>' -}}
{%- else -%}
{{- '<|start_header_id|>' + message.role + '<|end_header_id|>\n\n' -}}
{%- if tools and message.role == 'user' and loop.index0 < 2 -%}{{- 'Given:\n' + (tools | tojson) + '\n\n' -}}{%- endif -%}
{{- message.content | trim + '<|eot_id|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}{%- endif -%}
"""
GEMMA2 = """
{{- bos_token -}}
{%- if messages[0].role == 'system' -%}{{- raise_exception('no system turn') -}}{%- endif -%}
{%- for message in messages -%}
{%- if (message.role == 'user') != (loop.index0 % 2 == 0) -%}{{- raise_exception('turns have to alternate') -}}{%- endif -%}
{{- '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\n' + message.content | trim + '<end_of_turn>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\n' -}}{%- endif -%}
"""
# The system text before the first question.
GEMMA3 = """
{{- bos_token -}}
{%- set rule, rest = '', messages -%}
{%- if messages[0].role == 'system' -%}{%- set rule = messages[0].content + '\n\n' -%}{%- set rest = messages[1:] -%}{%- endif -%}
{%- for message in rest -%}
{{- '<start_of_turn>' + ('model' if message.role == 'assistant' else message.role) + '\n' + (rule if loop.first else '') + message.content | trim + '<end_of_turn>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\n' -}}{%- endif -%}
"""
# No generation prompt; the system text and the tools go to the last question, so that earlier turns are rewritten.
MISTRAL = """
{%- set rule = messages[0].content + '\n\n' if messages[0].role == 'system' else '' -%}
{%- set rest = messages[1:] if rule else messages -%}
{%- set seen = namespace(last=0) -%}
{%- for message in rest -%}{%- if message.role == 'user' -%}{%- set seen.last = loop.index0 -%}{%- endif -%}{%- endfor -%}
{{- bos_token -}}
{%- for message in rest -%}
{%- if message.role == 'user' -%}
{%- if loop.index0 == seen.last and tools -%}{{- '[AVAILABLE_TOOLS] ' + (tools | tojson) + '[/AVAILABLE_TOOLS]' -}}{%- endif -%}
{{- '[INST] ' + (rule if loop.index0 == seen.last else '') + message.content + '[/INST]' -}}
{%- elif message.tool_calls -%}{{- '[TOOL_CALLS] ' + (message.tool_calls[0].function | tojson) + eos_token -}}
{%- elif message.role == 'tool' -%}{{- '[TOOL_RESULTS] ' + message.content + '[/TOOL_RESULTS]' -}}
{%- else -%}{{- ' ' + message.content | trim + eos_token -}}{%- endif -%}
{%- endfor -%}
"""
# EOS behind the last turn where nothing is asked.
PHI3 = """
{%- for message in messages -%}{{- '<|' + message.role + '|>\n' + message.content + '<|end|>\n' -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\n' -}}{%- else -%}{{- eos_token -}}{%- endif -%}
"""
# Thinking dropped from every turn, and opened by the generation prompt.
DEEPSEEK_R1 = """
{{- bos_token -}}
{%- for message in messages -%}
{%- if message.role == 'system' -%}{{- message.content -}}
{%- elif message.role == 'user' -%}{{- '<｜User｜>' + message.content -}}
{%- elif message.role == 'assistant' -%}
{{- '<｜Assistant｜>' + message.content.split('</think>')[-1] + '<｜end▁of▁sentence｜>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<｜Assistant｜><think>\n' -}}{%- endif -%}
"""
# No token ends an answer: the next role does.
GLM4 = """
{{- '[gMASK]<sop>' -}}
{%- for message in messages -%}{{- '<|' + message.role + '|>\n' + message.content -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\n' -}}{%- endif -%}
"""
# Says itself what the assistant writes, without what ends it.
MASKED = """
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\n' -}}
{%- if message.role == 'assistant' -%}
{{- 'Answer: ' -}}{%- generation -%}{{- message.content -}}{%- endgeneration -%}
{%- else -%}{{- message.content -}}{%- endif -%}
{{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""

_CHATML = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_LLAMA = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
_GEMMA = ["<bos>", "<start_of_turn>", "<end_of_turn>", "<eos>"]
# template, special tokens, bos, eos
FAMILIES: dict[str, tuple[str, list[str], str | None, str]] = {
    "qwen2.5": (QWEN25, _CHATML, None, "<|im_end|>"),
    "qwen3": (QWEN3, _CHATML, None, "<|im_end|>"),
    "llama3.1": (LLAMA31, _LLAMA, "<|begin_of_text|>", "<|eot_id|>"),
    "gemma2": (GEMMA2, _GEMMA, "<bos>", "<eos>"),
    "gemma3": (GEMMA3, _GEMMA, "<bos>", "<eos>"),
    "mistral": (MISTRAL, ["<s>", "[INST]", "[/INST]", "[TOOL_CALLS]", "</s>"], "<s>", "</s>"),
    "phi3": (PHI3, ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>", "<|endoftext|>"], None, "<|endoftext|>"),
    "deepseek-r1": (
        DEEPSEEK_R1,
        ["<｜begin▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"],
        "<｜begin▁of▁sentence｜>",
        "<｜end▁of▁sentence｜>",
    ),
    "glm4": (
        GLM4,
        ["[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|endoftext|>"],
        None,
        "<|endoftext|>",
    ),
    "masked": (MASKED, _CHATML, None, "<|im_end|>"),
}


@functools.cache
def family(name: str) -> PreTrainedTokenizerBase:
    """A tokenizer with the family's template and special tokens; <think> and its like are added, but not special."""
    template, special, bos, eos = FAMILIES[name]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_bpe(special, LLAMA3_WORDS),
        bos_token=bos,
        eos_token=eos,
        additional_special_tokens=[token for token in special if token not in (bos, eos)],
        chat_template=template,
    )
    tokenizer.add_tokens(["<think>", "</think>", "<tool_call>", "</tool_call>"])
    return tokenizer
