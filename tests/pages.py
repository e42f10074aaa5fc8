"""The pages of the project, the commands on them, and a clone in which those are run."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from image_problem import write_blobs
from run_helpers import ROOT, SHIPPED, TINY, emptied

SHORT = {  # flags with which a benchmark, or a comparison, takes seconds
    "checkpoint": "--millions 1 --repeats 1",
    "compare": "--methods uniform,oracle --seeds 1 --max_steps 2 --max_new_tokens 2",
    "fuzz": "--share 0.0005",
    "hyper_cleaning": "--data blobs --train 100 --seeds 1 --steps 4 --out outputs",
    "kills": "--kills 1",
    "large": "--records 6000 --rounds 1 --gigabytes 0.03",
    "memory_over_steps": "--steps 250 --only adapters --out outputs",
    "oracle": "--seeds 1 --passes 24",
    "padding": "",
    "report": "--records 200 --rounds 1",
    "sampling": "--seeds 1 --max_steps 4",
    "start": "--records 500 --rounds 1",
    "state": "--sizes 1e4 1e6 --steps 5",
    "step": "--models gpt2 --peers Trainer --rounds 2 --batch 4",
    "tracker": "--pairs 1 --steps 4",
    "waiting_threads": "--rounds 2",
}
LONG = re.compile(r"tests\.benchmarks\.(\w+)|bilevel\.(compare)")
README = (ROOT / "README.md").read_text(encoding="utf-8")
# The pages in the order in which README lists them: a command can use what the pages before it have made.
LISTED = re.findall(r"\((docs/[\w-]+\.md)\)", README.split("## Documentation")[1].split("\n## ")[0])
FOUND = sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))
PAGES = {name: (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", *LISTED, *FOUND)}
COMPARISON_PAGE = "example/comparison/README.md"
PAGES[COMPARISON_PAGE] = (ROOT / COMPARISON_PAGE).read_text(encoding="utf-8")
PRETRAINED = "pretrained_gpt2"
FROM_THE_HUB = re.compile(r"gpt2\.yaml|lora-135m-cpu\.yaml")  # run files of pretrained models
ALONE = re.compile(r"tests\.benchmarks\.|example/experiments/|tests/gpu/check\.py")


def commands() -> list[str]:
    """Every command of bash blocks and of inline code, page by page, except set-ups and test runs, which CI runs."""
    found = []
    for name, page in PAGES.items():
        found += "\n".join(re.findall(r"```bash\n(.*?)```", page, flags=re.S)).splitlines()
        if name != COMPARISON_PAGE:
            found += [" ".join(c.split()) for c in re.findall(r"`(python [^`]+)`", page)]
    return [c for c in dict.fromkeys(found) if c and "pip install" not in c and "pytest" not in c]


def alone() -> list[str]:
    """The commands that run by themselves: benchmarks, experiments, the check on a GPU, the page of the comparison."""
    page = PAGES[COMPARISON_PAGE]
    return [command for command in commands() if ALONE.search(command) or command in page]


def named(command: str) -> str:
    """The start of a command, as the name of its test."""
    return re.sub(r"[^\w./=-]+", " ", command)[:70].strip()


def tracked() -> list[str]:
    """What a clone of the working tree would hold."""
    command = ["git", "ls-files", "-co", "--exclude-standard"]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [file for file in out.split("\n") if file and (ROOT / file).exists()]


def make_copy(folder: Path) -> None:
    """What a clone holds after the quick start, the files of README's user, and a model in place of the hub's."""
    for file in tracked():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / file, folder / file)
    subprocess.run([sys.executable, folder / "data_alpaca_0.5" / "process.py"], check=True, capture_output=True)
    test = folder / "data_alpaca_0.5" / "test.json"  # fewer records, as each run evaluates on all of them
    test.write_text(json.dumps(json.loads(test.read_text(encoding="utf-8"))[:64]), encoding="utf-8")
    noisy = emptied(SHIPPED[128:256])
    mine = {"web": SHIPPED[:128], "forum": noisy, "mix": SHIPPED[:64] + noisy[:64], "trusted": SHIPPED[256:336]}
    for name, records in (mine | {"heldout": SHIPPED[336:352]}).items():
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    write_blobs(folder / "blobs")  # in place of Fashion-MNIST, for hyper_cleaning
    make_pretrained(folder / PRETRAINED)


def make_pretrained(folder: Path) -> None:
    """A very small GPT-2 and its tokenizer."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(["some words"], vocab_size=300, special_tokens=["<|endoftext|>"], show_progress=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<|endoftext|>")
    tokenizer.save_pretrained(folder)
    shape = {key: value for key, value in TINY.items() if key != "model_type"} | {"n_positions": 512}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **shape)).save_pretrained(folder)


def run(command: str, folder: Path) -> None:
    """Run a command as it stands; the environment makes launched runs short and keeps them off the network."""
    python = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    short = {"PATH": python, "max_steps": "2", "x_warmup_steps": "0", "eval_every": "100", "tracker": "none"}
    if benchmark := LONG.search(command):
        command += f" {SHORT[benchmark[1] or benchmark[2]]}"
    if "train_bilevel.py --config" in command:  # reads no settings from the environment
        command += " --max_steps 2 --eval_every 100"
    if "--score_epochs" in command:
        command += " --score_epochs 0.1"
    if "tests/gpu/check.py" in command:
        command += " --parts exactness"
    if "configs/experiments/" in command:
        command += " --seeds 1 --max_steps 2 --out outputs/short --results outputs/short"
    model = {"model_name_or_path": str(folder / PRETRAINED)} if FROM_THE_HUB.search(command) else {}
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=os.environ | short | model, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
