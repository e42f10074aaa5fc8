"""The layout of docs/contributing.md: wings import downwards only, no circles, functions that fit on a screen."""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from run_helpers import ROOT

PACKAGE = ROOT / "bilevel"
# Floors from the ground up. A wing imports only from floors below its own, and from itself.
FLOORS = [
    {"errors", "files", "processes", "seeding", "shell"},
    {"settings"},
    {"data"},
    {"model", "weights"},
    {"step", "memory"},
    {"monitor"},
    {"run"},
    {"baselines"},
    {"evaluate", "export", "prepare", "report"},
    {"compare"},
]
GROUND = FLOORS[0]
# Modules of the ground floor that may import each other, in this order.
GROUND_ORDER = ["errors", "files", "processes", "seeding", "shell"]


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(file: Path) -> Iterator[str]:
    """Every module of the package that the file imports, wherever in the file, also for type checking alone."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "bilevel")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            if node.module.split(".")[0] == "bilevel":
                for alias in node.names:
                    name = f"{node.module}.{alias.name}"
                    place = ROOT / name.replace(".", "/")
                    yield name if place.with_suffix(".py").exists() or place.is_dir() else node.module


GRAPH = {module_name(file): set(imported(file)) for file in sorted(PACKAGE.rglob("*.py"))}


def wing(module: str) -> str:
    return module.split(".")[1]


def upward(graph: dict[str, set[str]]) -> list[str]:
    """The imports that do not lead downwards."""
    floor = {name: number for number, names in enumerate(FLOORS) for name in names}
    found = []
    for module, others in graph.items():
        for other in others if module != "bilevel" else ():
            here, there = wing(module), wing(other)
            down = floor[there] < floor[here] or here == there
            if here in GROUND and there in GROUND:
                down = GROUND_ORDER.index(there) <= GROUND_ORDER.index(here)
            if not down:
                found.append(f"{module} imports {other}")
    return found


def test_every_module_has_a_floor() -> None:
    assert {wing(module) for module in GRAPH if module != "bilevel"} == set().union(*FLOORS)


def test_wings_import_downwards_only() -> None:
    assert not upward(GRAPH)


def test_no_module_imports_itself_by_way_of_others() -> None:
    graphlib.TopologicalSorter(GRAPH).prepare()


def test_one_upward_import_is_found() -> None:
    changed = GRAPH | {"bilevel.data.samples": GRAPH["bilevel.data.samples"] | {"bilevel.run.state"}}
    assert upward(changed) == ["bilevel.data.samples imports bilevel.run.state"]
    with pytest.raises(graphlib.CycleError):
        graphlib.TopologicalSorter(changed).prepare()


def test_no_function_has_more_than_60_lines() -> None:
    functions = [
        (node.end_lineno - node.lineno + 1, file.name, node.name)
        for file in (ROOT / "train_bilevel.py", *PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef)
    ]
    assert len(functions) > 100 and max(functions)[0] <= 60, max(functions)


def test_files_of_tests_have_names_of_their_own():
    """pytest imports them by their names alone: of two with one name, one is not collected."""
    names = [file.name for file in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names)), sorted(name for name in names if names.count(name) > 1)
