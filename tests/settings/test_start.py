"""What a start imports, reads, hashes, trains and tokenises: counted, as the clock is the benchmark's."""

import collections
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import datasets
import pytest
import tokenizers
from run_helpers import ROOT, TINY, make_data, settings

from bilevel import files
from bilevel.data.containers import kinds
from bilevel.data.sources import file_source
from bilevel.data.tokenise import Tokeniser
from bilevel.files import cache_folder, content_hash
from bilevel.model.loading import load_tokenizer
from bilevel.run.preflight import check_files
from bilevel.settings.command_line import load_settings
from bilevel.settings.fields import Settings
from train_bilevel import setup

HEAVY = {"numpy", "pandas", "pyarrow", "datasets", "tokenizers", "torch", "transformers", "accelerate", "deepspeed"}
HEAVY |= {"sklearn", "scipy", "matplotlib", "wandb", "transformers.core_model_loading"}


# what is imported


def heavy_imports(command: list[str], code: int, **environment: str) -> set[str]:
    """What is HEAVY of all that the Python processes of a command import; it must end with this exit code."""
    environment |= {name: os.environ[name] for name in ("HOME", "HF_DATASETS_CACHE")}
    environment |= {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "PYTHONPROFILEIMPORTTIME": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    imported = set(re.findall(r"^import time:.*\| +([\w.]+)$", done.stderr, flags=re.M))
    assert "bilevel" in imported
    return imported & HEAVY


SCRIPT = ["python", "train_bilevel.py", "--config", "configs/tiny.yaml"]
GONE = ["--train_data", "gone.json", "--val_data", "gone/*.json", "--test_data", "gone.jsonl"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["python", "train_bilevel.py", "--help"], 0),
        ([*SCRIPT, "--lr_z", "1"], 2),
        ([*SCRIPT, "--lr_y", "-1", "--zero_stage", "2"], 2),
        (["python", "train_bilevel.py", "--config", "gone.yaml"], 2),
        ([*SCRIPT, *GONE], 2),
    ],
    ids=["help", "name", "values", "config", "files"],
)
def test_help_and_mistakes_need_no_heavy_import(command: list[str], code: int) -> None:
    assert heavy_imports(command, code) == set()


@pytest.mark.slow
def test_mistakes_in_the_launcher_need_no_heavy_import(tmp_path: Path) -> None:
    gone = {"data_dir": str(tmp_path)}
    assert heavy_imports(["bash", "run_F2SA.sh", "--lr_z", "1"], 2, **gone) == set()
    assert heavy_imports(["bash", "run_F2SA.sh", "--test_data", "gone.json"], 2, **gone) == set()
    assert heavy_imports(["bash", "run_F2SA.sh", "--lr_z", "1"], 2, NPROC="2", **gone) == set()


@pytest.mark.slow
def test_a_broken_record_is_told_without_datasets_and_torch(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", size=16)
    (tmp_path / "data" / "val.json").write_text(json.dumps([{"instruction": "a"}]))
    assert heavy_imports(["python", "train_bilevel.py", *settings(data, tmp_path / "r")], 2) - {"pandas"} == {
        "numpy",
        "pyarrow",
    }


@pytest.mark.slow
def test_a_model_that_cannot_be_is_told_without_datasets(tmp_path: Path) -> None:
    data = make_data(tmp_path / "data", size=16)
    imported = heavy_imports(["python", "train_bilevel.py", *settings(data, tmp_path / "r", max_length=1000)], 2)
    assert imported >= {"torch", "transformers"}
    assert not imported & {"datasets", "deepspeed", "sklearn", "wandb", "transformers.core_model_loading"}


@pytest.mark.slow
def test_the_cache_is_where_datasets_has_it(tmp_path: Path) -> None:
    """Compared with its own answer, in another process each."""
    places = [{}, {"XDG_CACHE_HOME": "x"}, {"HF_HOME": "~/y", "XDG_CACHE_HOME": "x"}, {"HF_DATASETS_CACHE": "~/z"}]
    ask = "import datasets; from bilevel.files import cache_folder as c; print(datasets.config.HF_DATASETS_CACHE, c())"
    for place in places:
        environment = {"HOME": str(tmp_path), "PYTHONPATH": str(ROOT)} | place
        said = subprocess.run(
            [sys.executable, "-c", ask], env=environment, cwd=tmp_path, capture_output=True, text=True
        )
        theirs, ours = said.stdout.split()
        assert ours == theirs


# what is read


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> collections.Counter:
    """How often what takes time was called; files count as settled at once."""
    counts: collections.Counter = collections.Counter()

    def count(owner: object, name: str) -> None:
        original = getattr(owner, name)

        def call(*arguments: object, **more: object) -> object:
            counts[name] += 1
            return original(*arguments, **more)

        monkeypatch.setattr(owner, name, call)

    count(hashlib, "file_digest")
    count(kinds, "unparsed")
    count(tokenizers.ByteLevelBPETokenizer, "train_from_iterator")
    count(Tokeniser, "__call__")
    count(datasets.arrow_dataset, "query_table")
    monkeypatch.setattr(files, "SETTLED", 0)
    monkeypatch.setattr(files, "_hashes", {})
    return counts


def start(data: Path, out: Path) -> None:
    chosen, _ = load_settings(settings(data, out))
    setup(chosen, check_files(chosen))


def test_a_second_start_finds_all_its_work_done(
    tmp_path: Path, counted: collections.Counter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four files: two of training, validation, test. None is read by row: the reads do not grow with the records."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))  # other tests may have read the same records
    reads = []
    for size in (24, 72):
        data = make_data(tmp_path / str(size), size)
        files._hashes.clear()
        counted.clear()
        start(data, tmp_path / "run")
        del counted["query_table"]  # by batches of a thousand
        # The files; their rows when they are written and when they are read, by another name; their tokens.
        assert counted == {"file_digest": 16, "unparsed": 4, "train_from_iterator": 1, "__call__": 4}
        files._hashes.clear()
        counted.clear()
        start(data, tmp_path / "run")
        reads.append(counted.pop("query_table", 0))
        assert counted == {"file_digest": 12}
    assert reads[0] == reads[1]


def test_a_file_is_hashed_again_when_it_may_have_changed(
    write: Callable[..., Path], counted: collections.Counter, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write("a.json", "first")
    assert [content_hash(path) for _ in range(3)] == [hashlib.sha256(b"first").hexdigest()] * 3
    assert counted["file_digest"] == 1
    before = path.stat()
    path.write_bytes(b"other")  # of the same length, and made to look as old
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert content_hash(path) == hashlib.sha256(b"other").hexdigest()
    monkeypatch.setattr(files, "SETTLED", 10**12)
    path = write("b.json", "fresh")  # another change within the clock's tick would not show
    assert content_hash(path) == content_hash(path)
    assert counted["file_digest"] == 4


# the tokenizer of a new model


def test_a_cached_tokenizer_is_the_one_that_was_trained(tmp_path: Path, counted: collections.Counter) -> None:
    data = make_data(tmp_path / "data", size=40)
    files = sorted(data.glob("train_*.json"))

    def load(vocab_size: int, files: list[Path] = files) -> str:
        numbers = TINY | {"vocab_size": vocab_size}
        asked = Settings(train_data=["a"], val_data=["b"], model_config=numbers)
        tokenizer = load_tokenizer(asked, list(map(file_source, files)))
        assert len(tokenizer) <= vocab_size and tokenizer.eos_token == "<|endoftext|>"
        return tokenizer.backend_tokenizer.to_str()

    trained = load(301)
    assert counted["train_from_iterator"] == 1 and load(301) == trained
    assert counted["train_from_iterator"] == 1
    assert len({trained, load(302), load(301, files[:1])}) == 3
    assert counted["train_from_iterator"] == 3
    cached = list((cache_folder() / "tokenizers").iterdir())
    assert all(file.suffix == ".json" for file in cached)
    for file in cached:
        file.write_text(file.read_text()[:-9])
    assert load(301) == trained and counted["train_from_iterator"] == 4
