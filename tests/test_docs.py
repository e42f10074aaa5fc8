"""README.md, docs/ and example/comparison/README.md are true: tables are those of code and results, links and paths
lead somewhere, and commands name what is there. That they run is tested in test_commands.py."""

import importlib.util
import re
import shlex
from pathlib import Path

import pandas as pd
import pytest
from benchmarks import hyper_cleaning, start, state, step
from pages import COMPARISON_PAGE, FOUND, LISTED, LONG, PAGES, README, SHORT, commands
from run_helpers import ROOT
from test_layout import FLOORS

import bilevel

COMPARISON = ROOT / "example" / "comparison"
RESULTS = ROOT / "tests" / "benchmarks" / "results"
COSTS, BASELINES = PAGES["docs/costs.md"], PAGES["docs/baselines-and-comparison.md"]


def top_folders() -> set[str]:
    """Folders at the top that a clone has, and that are not hidden."""
    ignored = (ROOT / ".gitignore").read_text(encoding="utf-8").split()
    folders = {path.name for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")}
    return folders - {name.rstrip("/") for name in ignored}


def test_every_long_command_has_a_short_form() -> None:
    """So that a page with a new benchmark fails here, in the default suite, and not when all commands are run."""
    named = {found[1] or found[2] for command in commands() if (found := LONG.search(command))}
    assert named == SHORT.keys()


def test_readme_lists_every_page_of_docs() -> None:
    assert sorted(LISTED) == FOUND


def test_pages_are_of_a_size_that_is_read() -> None:
    assert len(README.encode()) <= 16_000
    assert {name: page.count("\n") for name, page in PAGES.items() if page.count("\n") > 250} == {}


def test_nothing_is_left_to_fill_in() -> None:
    assert [name for name, page in PAGES.items() if "TO BE FILLED" in page] == []


def test_commands_name_no_placeholder() -> None:
    """A command is typed as it stands: no word in capitals takes the place of a file or a folder."""
    assert len(commands()) >= 40
    assert [c for c in commands() if re.search(r" [A-Z]{3,}(?= |$)", c)] == []


def test_settings_and_metrics_are_those_of_the_code() -> None:
    spec = importlib.util.spec_from_file_location("docs_generate", ROOT / "docs" / "generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    stale = [page for page, text in generate.PAGES.items() if PAGES[f"docs/{page}"] != text()]
    assert not stale, "run `python docs/generate.py`"


# ----------------------------------------------------------------------------------------------------------------------
# figures


def test_the_benchmarks_figures_are_those_of_the_newest_run() -> None:
    table = pd.read_csv(RESULTS / "state.csv")
    assert state.markdown(table) in COSTS and table["machine"][0] in " ".join(COSTS.split())
    assert start.markdown(pd.read_csv(RESULTS / "start.csv")) in COSTS
    for file in RESULTS.glob("step_*.csv"):
        assert step.markdown(pd.read_csv(file)) in COSTS, file
    assert hyper_cleaning.markdown(pd.read_csv(RESULTS / "hyper_cleaning.csv")) in PAGES["docs/experiments.md"]


COMPARISONS = [  # tables of example/comparison and what they are called there
    {"words": "words", "empty": "empty"},
    {"empty80": "empty, 80 %"},
    {"small": "words, 96 trusted", "small_few": "words, 24 trusted", "small_empty": "empty, 96 trusted"},
]


def comparison_table(titles: dict[str, str], results: tuple[str, ...], gflop: bool = True) -> str:
    """Methods by their results in each comparison, mean ± standard error, and what scoring took in the first."""
    tables = [pd.read_csv(COMPARISON / f"{name}.csv", index_col="method") for name in titles]
    columns = [(table, name) for table in tables for name in results]
    names = " | ".join(name.replace("_", " ") for name in results)
    heads = [f"{title}: {names}" for title in titles.values()] + ["GFLOP"] * gflop
    lines = [f"| method | {' | '.join(heads)} |", "|---" * (len(columns) + 1 + gflop) + "|"]
    for method in tables[0].index:
        cells = [f"{table[name][method]:.2f} ± {table[f'{name}_se'][method]:.2f}" for table, name in columns]
        cells += [f"{tables[0]['scoring_gflop'][method]:,.0f}"] * gflop
        lines.append(f"| `{method}` | {' | '.join(cells)} |")
    return "\n".join(lines)


@pytest.mark.parametrize("titles", COMPARISONS)
def test_the_comparisons_are_those_of_their_tables(titles: dict[str, str]) -> None:
    table = comparison_table(titles, ("test_loss", "exact_match", "clean_share"))
    assert table in PAGES[COMPARISON_PAGE], table


def test_the_comparison_in_short_is_that_of_its_tables() -> None:
    table = comparison_table(COMPARISONS[0], ("test_loss", "exact_match"), gflop=False)
    assert table in BASELINES, table


def test_readmes_words_on_the_comparison_are_those_of_its_tables() -> None:
    tables = [pd.read_csv(COMPARISON / f"{name}.csv", index_col="method")["exact_match"] for name in ("words", "empty")]
    share = {method: [f"{100 * table[method]:.0f} %" for table in tables] for method in tables[0].index}
    words, empty = share["f2sa"]
    assert words == empty and f"answers {words} of the test questions for either fault" in " ".join(README.split())
    filters = f"{' and '.join(share['loss'])}, and {' and '.join(share['rho'])}"
    for said in (f"records alone {' and '.join(share['oracle'])}", f"Two common filters answer {filters}"):
        assert said in " ".join(README.split()), said


# ----------------------------------------------------------------------------------------------------------------------
# the map, links and paths


def test_the_map_is_that_of_the_package() -> None:
    lines = [line for line in bilevel.__doc__.splitlines() if line.startswith("    ")]
    assert "\n".join(lines) in README
    mapped = [line.split()[0].removesuffix("/").removesuffix(".py") for line in lines]
    assert sorted(mapped) == sorted(set().union(*FLOORS))


def test_the_floors_are_those_that_the_layout_keeps() -> None:
    floors = [f"{number:>2}  {', '.join(sorted(names))}" for number, names in enumerate(FLOORS, start=1)]
    assert "\n".join(f"    {floor}" for floor in reversed(floors)) in PAGES["docs/contributing.md"]


def test_the_tree_names_what_is_there() -> None:
    tree = README.split("## The map")[1].split("\n## ")[0]
    for path in ("run_F2SA.sh", "train_bilevel.py", *top_folders()):
        assert (ROOT / path).exists() and path in tree, path


def anchors(page: str) -> set[str]:
    """The names that GitHub gives to a page's headings."""
    heads = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", page, flags=re.S), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name: str) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", PAGES[name]):
        if target.startswith("https://"):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file.read_text(encoding="utf-8")), target


@pytest.mark.parametrize("name", PAGES)
def test_paths_and_modules_that_are_named_are_there(name: str) -> None:
    """Paths below a folder of the repository, and dotted names of the package with what is in them."""
    page, tops = PAGES[name], "|".join(map(re.escape, top_folders()))
    for path in re.findall(rf"(?<![\w/.-])((?:{tops})/[\w./-]*+(?![*<]))", page):
        assert (ROOT / path.rstrip(".")).exists(), path
    for dotted in re.findall(r"(?<![\w/.-])((?:bilevel|tests)(?:\.\w+)+)", page):
        parts = dotted.split(".")
        place, module = ROOT.joinpath(*parts), ROOT.joinpath(*parts[:-1]).with_suffix(".py")
        there = place.is_dir() or place.with_suffix(".py").exists()
        assert there or (module.exists() and re.search(rf"\b{parts[-1]}\b", module.read_text())), dotted


def test_names_that_contributing_sends_to_are_there() -> None:
    """`name` in `file.py`: the file has the name."""
    page = PAGES["docs/contributing.md"]
    found = re.findall(r"`([\w.]+)`(?: and `([\w.]+)`)? (?:in|of) `([\w/]+\.py)`", page)
    assert len(found) >= 8
    for first, second, file in found:
        text = (ROOT / file).read_text(encoding="utf-8")
        for name in filter(None, f"{first}.{second}".split(".")):
            assert re.search(rf"\b{name}\b", text), (name, file)


# ----------------------------------------------------------------------------------------------------------------------
# commands


def test_the_quick_start_and_the_tests_are_the_two_commands() -> None:
    for command in ("bash run_F2SA.sh", "python -m pytest"):
        assert f"```bash\npip install -r requirements.txt && {command}\n```" in README


def test_flags_that_are_named_are_settings_or_options() -> None:
    """Each `NAME=value bash run_F2SA.sh` names settings or the launcher's own words."""
    from bilevel.settings.fields import FIELDS

    own = set(re.findall(r"\b[A-Z][A-Z_]+\b", (ROOT / "run_F2SA.sh").read_text(encoding="utf-8"))) | {"data_dir"}
    for command in commands():
        for name in re.findall(r"(\w+)=\S+(?= .*run_F2SA\.sh)", command):
            assert name in FIELDS or name in own, (name, command)


def papers_commands() -> list[list[str]]:
    """The commands of docs/papers.md that need the hub or many GPUs, in words."""
    blocks = re.findall(r"```text\n(.*?)```", PAGES["docs/papers.md"], flags=re.S)
    return [shlex.split(line) for line in "\n".join(blocks).splitlines() if line]


@pytest.mark.parametrize("words", papers_commands(), ids=lambda words: " ".join(words)[:90])
def test_the_papers_commands_are_understood(words: list[str], tmp_path: Path) -> None:
    """Those that cannot be run here: their run files and flags are right, and each run folder has been made before."""
    from bilevel.compare import command as compare
    from bilevel.evaluate import command as evaluate
    from bilevel.export import options as export
    from bilevel.settings.command_line import load_settings

    made = [f"outputs/{line[line.index('--run_name') + 1]}" for line in papers_commands() if "--run_name" in line]
    if words[1:3] == ["bash", "run_F2SA.sh"]:
        config = words[0].removeprefix("CONFIG=")
        load_settings(["--config", str(ROOT / config), *words[3:]])
    elif words[1:3] == ["-m", "bilevel.prepare"]:
        load_settings(["--config", str(ROOT / words[3])])
    elif words[1:3] == ["-m", "bilevel.export"]:
        given = export.parse(words[3:], "")
        assert given.run in made and given.out.startswith("data/")
    elif words[1:3] == ["-m", "bilevel.evaluate"]:
        given = evaluate._parser().parse_args(words[3:])
        assert given.model in made and given.answers_out
    elif words[1:3] == ["-m", "bilevel.compare"]:
        given, shared = compare.parse([str(ROOT / words[3]), *words[4:]])
        compare.common_settings(shared)
    else:
        assert (ROOT / words[1]).is_file()


def test_every_run_file_of_the_papers_has_its_commands() -> None:
    files = {path.name for path in (ROOT / "configs" / "papers").glob("*.yaml")}
    table = PAGES["docs/papers.md"].split("\n\n")[3]
    assert files and all(name in table and f"configs/papers/{name}" in PAGES["docs/papers.md"] for name in files)
