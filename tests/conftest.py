"""Shared by all tests: their environment and home folder, limits of their cost, data files, GPUs."""

import tempfile
from pathlib import Path

import own_environment

_HOME = tempfile.TemporaryDirectory(prefix="bilevel-tests-", ignore_cleanup_errors=True)
_GPU_VARIABLES = own_environment.take(Path(_HOME.name))  # before the libraries below are imported

import json  # noqa: E402
import logging  # noqa: E402
import os  # noqa: E402
import sys  # noqa: E402
from collections.abc import Callable, Iterator  # noqa: E402
from typing import Any  # noqa: E402

import pytest  # noqa: E402

pytest_plugins = ["limits"]


def pytest_configure(config: pytest.Config) -> None:
    """Tests see GPUs only where they are asked for: results on a CPU are those that the tests know."""
    asked = "gpu" in config.option.markexpr.replace("not gpu", "")
    os.environ.update(_GPU_VARIABLES if asked else {"CUDA_VISIBLE_DEVICES": ""})


def pytest_make_parametrize_id(val: object, argname: str) -> str | None:
    """Contents of files have no place in a test's name: what gzip writes holds the time, and workers must agree."""
    return argname if isinstance(val, bytes) else None


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a GPU; on a machine that has one: python -m pytest -m gpu")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that start several processes come first: they take longest, and the last one would be waited for."""
    first = {item.path for item in items if item.get_closest_marker("processes")}
    items.sort(key=lambda item: item.path not in first)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Processes that share the default suite; 0 for chosen tests and for slow ones, which start their own."""
    whole = config.args_source is pytest.Config.ArgsSource.TESTPATHS and config.option.markexpr == "not slow"
    return min(4, os.cpu_count() or 1) if whole else 0


@pytest.fixture(scope="session", autouse=True)
def own_cache() -> Iterator[None]:
    import datasets  # here, because the process that only starts the workers needs none of it

    assert Path(datasets.config.HF_DATASETS_CACHE) == Path(_HOME.name) / "datasets"
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


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a clone of the working tree holds after the quick start, and the files of README's user."""
    from pages import make_copy

    folder = tmp_path_factory.mktemp("clone")
    make_copy(folder)
    return folder


@pytest.fixture(autouse=True)
def no_picture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs that a test makes leave an empty weights.png: drawing takes as long as three steps of a small model.

    Fixtures of a module, such as test_train.py's finished run, draw theirs; so do the tests of draw_weights.
    """
    if "train_bilevel" in sys.modules:
        monkeypatch.setattr("bilevel.run.picture.draw_weights", lambda folder, *_: (folder / "weights.png").touch())


@pytest.fixture
def no_old_log(monkeypatch: pytest.MonkeyPatch) -> None:
    """The screen and file that an earlier run spoke to are gone."""
    monkeypatch.setattr(logging.getLogger("bilevel"), "handlers", [])
