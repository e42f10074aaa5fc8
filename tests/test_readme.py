"""README.md and example/comparison/README.md are true: tables are those of code and results, and commands run."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
from benchmarks import start, state, step
from run_helpers import ROOT, TINY

from bilevel.monitor.metrics import METRICS
from bilevel.settings.fields import FIELDS, meaning

SHORT = {  # flags with which a benchmark, or a comparison, takes seconds
    "checkpoint": "--millions 1 --repeats 1",
    "compare": "--methods uniform,oracle --seeds 1 --max_steps 2 --max_new_tokens 2",
    "oracle": "--seeds 1 --passes 24",
    "report": "--records 200 --rounds 1",
    "sampling": "--seeds 1 --max_steps 4",
    "start": "--records 500 --rounds 1",
    "state": "--sizes 1e4 1e6 --steps 5",
    "step": "--models gpt2 --peers Trainer --rounds 2",
    "tracker": "--pairs 1 --steps 4",
}
README = (ROOT / "README.md").read_text(encoding="utf-8")
COMPARISON = ROOT / "example" / "comparison"


def settings_table() -> str:
    lines = ["| setting | default | meaning |", "|---|---|---|"]
    for name, field in FIELDS.items():
        default = "required" if field.is_required() else "null" if field.default is None else str(field.default).lower()
        lines.append(f"| `{name}` | {default} | {meaning(name)} |")
    return "\n".join(lines)


def metrics_rows() -> str:
    return "\n".join(f"| `{name}` | {words} |" for name, words in METRICS.items())


def commands() -> list[str]:
    """Every command of bash blocks and of README's inline code, but for the two set-ups, which CI runs."""
    pages = README + (COMPARISON / "README.md").read_text(encoding="utf-8")
    blocks = "\n".join(re.findall(r"```bash\n(.*?)```", pages, flags=re.S)).splitlines()
    inline = [" ".join(c.split()) for c in re.findall(r"`(python [^`]+)`", README)]
    return [c for c in blocks + inline if "pip install" not in c and "pytest" not in c]


def test_the_tables_are_those_of_the_code():
    assert settings_table() in README, settings_table()
    assert metrics_rows() in README, metrics_rows()


def test_the_benchmarks_figures_are_those_of_the_newest_run():
    table = pd.read_csv(ROOT / "tests" / "benchmarks" / "results" / "state.csv")
    assert state.markdown(table) in README and table["machine"][0] in " ".join(README.split())
    assert start.markdown(pd.read_csv(ROOT / "tests" / "benchmarks" / "results" / "start.csv")) in README
    for file in (ROOT / "tests" / "benchmarks" / "results").glob("step_*.csv"):
        assert step.markdown(pd.read_csv(file)) in README, file


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
def test_the_comparisons_are_those_of_their_tables(titles: dict[str, str]):
    table = comparison_table(titles, ("test_loss", "exact_match", "clean_share"))
    assert table in (COMPARISON / "README.md").read_text(encoding="utf-8"), table


def test_the_comparison_in_short_is_that_of_its_tables():
    table = comparison_table(COMPARISONS[0], ("test_loss", "exact_match"), gflop=False)
    assert table in README, table


def test_the_folder_tree_names_what_is_there():
    tree = README.split("## The folder")[1]
    for path in ("run_F2SA.sh", "train_bilevel.py", "configs", "data_alpaca_0.5", "example", "bilevel", "tests"):
        assert (ROOT / path).exists() and path in tree
    for module in (ROOT / "bilevel").glob("[a-z]*.py"):
        assert module.stem in tree, module


def test_the_quick_start_and_the_tests_are_the_two_commands():
    for command in ("bash run_F2SA.sh", "python -m pytest"):
        assert f"```bash\npip install -r requirements.txt && {command}\n```" in README


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a clone holds, in a folder of its own."""
    folder = tmp_path_factory.mktemp("clone")
    files = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\n")
    for file in filter(None, files):
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, folder / file)
    return folder


@pytest.mark.slow
def test_every_command_runs(copy: Path, tmp_path: Path):
    """In order, in a clone, as they stand; the environment makes launched runs short and keeps them off the network."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(["some words"], vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    shape = {key: value for key, value in TINY.items() if key != "model_type"} | {"n_positions": 512}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **shape)).save_pretrained(tmp_path / "gpt2")

    python = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    short = {"PATH": python, "max_steps": "2", "x_warmup_steps": "0", "eval_every": "100", "tracker": "none"}
    assert len(commands()) >= 12
    for command in commands():
        if benchmark := re.search(r"tests\.benchmarks\.(\w+)|bilevel\.(compare)", command):
            command += f" {SHORT[benchmark[1] or benchmark[2]]}"
        if "example/experiment.py" in command:
            command += " --seeds 1 --max_steps 2 --out outputs/short --results outputs/short"
        model = {"model_name_or_path": str(tmp_path / "gpt2")} if "gpt2.yaml" in command else {}
        done = subprocess.run(
            ["bash", "-c", command],
            cwd=copy,
            env=os.environ | {"PATH": python} | short | model,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    assert (copy / "curves.png").exists() and (copy / "my_data" / "mixed" / "train_mixed.json").exists()
