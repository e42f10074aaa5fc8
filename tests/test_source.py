"""The code's own measure: no function is longer than a screen."""

import ast

from run_helpers import ROOT


def test_no_function_has_more_than_60_lines() -> None:
    functions = [
        (node.end_lineno - node.lineno + 1, file.name, node.name)
        for file in (ROOT / "train_bilevel.py", *(ROOT / "bilevel").glob("*.py"))
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    ]
    assert len(functions) > 100 and max(functions)[0] <= 60, max(functions)
