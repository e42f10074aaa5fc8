"""The text of an assistant turn if the template has no form of its own for thinking or tool calls."""

import json
from typing import Any


def spoken(content: str, reasoning: str | None, calls: list[dict[str, Any]] | None) -> str:
    """Reasoning, content and tool calls as one text: a <think> block, the content, <tool_call> blocks of JSON."""
    thought = f"<think>\n{reasoning.strip(chr(10))}\n</think>\n\n" if reasoning else ""
    blocks = [f"<tool_call>\n{json.dumps(call['function'], ensure_ascii=False)}\n</tool_call>" for call in calls or []]
    return thought + "\n".join(([content] if content or not blocks else []) + blocks)
