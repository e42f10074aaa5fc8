"""Shared by all tests: a cache of their own, one thread, a writer of data files."""

import os
import tempfile

_HOME = tempfile.TemporaryDirectory(prefix="bilevel-tests-")
os.environ["HF_DATASETS_CACHE"] = _HOME.name  # read when datasets is imported: the user's cache stays as it is
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Small models are slower on several threads, and six times slower when the machine has anything else to do.
os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported

import json  # noqa: E402
import logging  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from pathlib import Path  # noqa: E402
from typing import Any  # noqa: E402

import datasets  # noqa: E402
import pytest  # noqa: E402


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Processes that share the default suite; 0 for chosen tests and for slow ones, which start their own."""
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and config.option.markexpr == "not slow"
    return min(4, os.cpu_count() or 1) if whole else 0


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


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as process.py makes it, from a slice of the shipped records."""
    from run_helpers import make_data

    return make_data(tmp_path_factory.mktemp("data"))


@pytest.fixture
def no_old_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """The screen and file that an earlier run spoke to are gone."""
    monkeypatch.setattr(logging.getLogger("bilevel"), "handlers", [])
