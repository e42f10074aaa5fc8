"""run_F2SA.sh: environment, flags, data folders, and the choice of a configuration."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from run_helpers import ROOT, make_data

ENVIRONMENT = {name: os.environ[name] for name in ("PATH", "HOME", "HF_DATASETS_CACHE")}


def launch(*flags: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", str(ROOT / "run_F2SA.sh") if cwd != ROOT else "run_F2SA.sh", *flags],
        cwd=cwd,
        env=ENVIRONMENT | environment,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )


def dry_run(*flags: str, cwd: Path = ROOT, **environment: str) -> dict:
    """The settings that the launcher would run with, in a folder that does not exist yet."""
    done = launch(*flags, "-v", cwd=cwd, DRY_RUN="1", output_dir="nowhere", **environment)
    assert done.returncode == 0, done.stderr
    return yaml.safe_load(done.stdout[done.stdout.index("train_data:") :])


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("my data"))


@pytest.mark.slow
def test_without_a_gpu_it_takes_tiny_and_says_so():
    done = launch(DRY_RUN="1", output_dir="nowhere")
    assert "run_F2SA.sh: ./configs/tiny.yaml (no GPU was found); CONFIG=FILE chooses another" in done.stdout
    assert "run_name: tiny\n" in done.stdout


@pytest.mark.slow
def test_with_a_gpu_it_takes_gpt2(tmp_path: Path):
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: some'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    settings = dry_run(PATH=f"{tmp_path}:{ENVIRONMENT['PATH']}")
    assert settings["run_name"] == "gpt2" and settings["model_name_or_path"] == "openai-community/gpt2"


@pytest.mark.slow
def test_settings_from_the_environment_and_flags_that_win():
    settings = dry_run("--alpha", "7", lr_y="2e-5", lr_x="0.3", alpha="100", upper_every="4", tracker="none")
    assert (settings["lr_y"], settings["lr_x"], settings["alpha"], settings["upper_every"]) == (2e-5, 0.3, 7.0, 4)
    assert settings["run_name"] == "tiny-lr_x=0.3-alpha=7-lr_y=2e-5-upper_every=4"


@pytest.mark.slow
def test_config_from_the_environment():
    assert dry_run(CONFIG="configs/gpt2.yaml")["run_name"] == "gpt2"


@pytest.mark.slow
def test_data_dir_from_another_working_directory(data: Path, tmp_path: Path):
    settings = dry_run(cwd=tmp_path, data_dir=str(data))
    assert settings["train_data"] == [f"{data}/train_*.json"]
    assert settings["val_data"] == [f"{data}/val.json"] and settings["test_data"] == [f"{data}/test.json"]


@pytest.mark.slow
def test_without_test_records_in_the_data_folder_nothing_is_tested(tmp_path: Path):
    """And not the records that the run file names, which are others."""
    folder = make_data(tmp_path / "mine")
    (folder / "test.json").unlink()
    assert dry_run(data_dir=str(folder))["test_data"] == []
    mixed = str(folder / "mixed" / "train_mixed.json")
    assert dry_run(data_dir=str(folder), test_data=mixed)["test_data"] == [mixed]
    assert dry_run(data_dir="data_alpaca_0.5")["test_data"] == ["data_alpaca_0.5/test.json"]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["environment", "flag", "flag="])
def test_per_sample_runs_read_the_mixed_file(data: Path, how: str):
    flags = {"environment": [], "flag": ["--weights", "sample"], "flag=": ["--weights=sample"]}[how]
    environment = {"weights": "sample"} if how == "environment" else {}
    settings = dry_run(*flags, data_dir=str(data), **environment)
    assert settings["train_data"] == [f"{data}/mixed/train_mixed.json"] and settings["weights"] == "sample"
    shipped = dry_run(*flags, **environment)
    assert shipped["train_data"] == ["./data_alpaca_0.5/mixed/train_mixed.json"]


@pytest.mark.slow
def test_mistakes_end_with_exit_code_2_and_no_traceback():
    done = launch("--lr_z", "3", DRY_RUN="1", alpha="-1")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "--lr_z: no such setting; did you mean --lr_x?" in done.stderr or "--lr_y?" in done.stderr
    assert "alpha: input should be greater than 0" in done.stderr


@pytest.fixture
def told(tmp_path: Path) -> Callable[..., tuple[int, list[str], str]]:
    """told(flags, name=value): the exit code, the commands that the launcher starts in a folder, and its errors.

    Nothing is started: `python` says what it was given.
    """
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\n"
        'case "$2 $3" in "bilevel.settings ") echo lr_y; echo run_name; echo weights;;\n'
        f'bilevel.settings*) exec "{sys.executable}" "$@";; *) echo "started: $*";; esac\n'
    )
    python.chmod(0o755)

    def launched(*flags: str, **environment: str) -> tuple[int, list[str], str]:
        done = launch(*flags, cwd=tmp_path, PYTHON=str(python), **environment)
        started = [line.removeprefix("started: ") for line in done.stdout.splitlines() if line.startswith("started: ")]
        return done.returncode, started, done.stderr

    return launched


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrong",
    [
        "NPROC=two",
        "NPROC=-1",
        "NPROC=2x",
        "NGPU=1.5",
        "NODE_RANK=a[0]",
        "DRY_RUN=perhaps",
        "DRY_RUN=2",
        "prepare=later",
    ],
)
def test_a_wrong_word_starts_nothing(told: Callable, wrong: str):
    name, value = wrong.split("=", 1)
    code, started, said = told(**{name: value})
    assert (code, started) == (2, []) and said.startswith(f"error: {wrong}: expected ") and said.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("word", ["1", "true", "True", "yes", "on"])
def test_a_dry_run_by_any_word(told: Callable, word: str):
    code, started, _ = told(DRY_RUN=word)
    assert code == 0 and started[-1].endswith("--dry_run")


@pytest.mark.slow
@pytest.mark.parametrize("word", ["", "0", "false", "no"])
def test_no_dry_run_by_any_word(told: Callable, word: str):
    code, started, _ = told(DRY_RUN=word)
    assert code == 0 and "--dry_run" not in started[-1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("one\n", "line 1"),
        ("one slots=2\n\ntwo slots=two\n", "line 3"),
        ("one slots=0\n", "line 1"),
        ("one slots=2 port=3\n", "line 1"),
        ("# one slots=2\n", "no machine"),
        ("", "no machine"),
        (None, "there is no such file"),
    ],
)
def test_a_hostfile_that_is_none(told: Callable, tmp_path: Path, content: str | None, problem: str):
    if content is not None:
        (tmp_path / "hosts").write_text(content)
    code, _, said = told(HOSTFILE="hosts")
    assert code == 2 and said.startswith("error: HOSTFILE=hosts") and problem in said and said.count("\n") == 1


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a=b", "-hosts", "h 1"])
def test_a_hostfile_of_any_name(told: Callable, tmp_path: Path, name: str):
    """awk takes a=b for an assignment, and deepspeed -hosts for a flag."""
    (tmp_path / name).write_text("one slots=2 # and\n\ntwo slots=3\n")
    (tmp_path / "deepspeed").write_text('#!/bin/sh\necho "started: $*"\n')
    (tmp_path / "deepspeed").chmod(0o755)
    code, started, said = told(HOSTFILE=name, DEEPSPEED="./deepspeed")
    given = f"./{name}" if name.startswith("-") else name
    assert code == 0 and f"--hostfile {given} " in started[-1], said


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a [1] b", "-x", "--alpha", "*?", "[a]", "{a}", "my=data"])
def test_a_data_folder_of_any_name(told: Callable, tmp_path: Path, name: str):
    """What means something in a pattern, to argparse or in YAML is a part of the name; the settings are really read."""
    folder = make_data(tmp_path / name, size=8)
    code, started, _ = told(data_dir=name, lr_y="1e-4", run_name="-x")
    assert code == 0 and "--run_name=-x" in started[-1]
    environment = {
        "data_dir": name,
        "weights": "source",
        "run_name": "-x",
        "global_batch_size": "8",
        "val_batch_size": "8",
    }
    done = launch(cwd=tmp_path, DRY_RUN="1", output_dir="nowhere", **environment)
    assert done.returncode == 0, done.stderr
    found = yaml.safe_load(done.stdout[done.stdout.index("train_data:") :])
    assert [path.samefile(folder / "val.json") for path in map(tmp_path.joinpath, found["val_data"])] == [True]


@pytest.mark.slow
def test_another_folders_program_runs_only_if_asked(told: Callable, tmp_path: Path):
    (tmp_path / "theirs").mkdir()
    program = tmp_path / "theirs" / "process.py"
    program.write_text("")
    for environment in ({}, {"DRY_RUN": "1"}, {"prepare": "0"}):
        _, started, _ = told(data_dir="theirs", **environment)
        assert not any("process.py" in command for command in started)
    _, started, _ = told(data_dir="theirs", prepare="1")
    assert started[0] == "theirs/process.py --if-needed"
    program.unlink()
    code, started, said = told(data_dir="theirs", prepare="1")
    assert (code, started) == (2, []) and "prepare=1: there is no theirs/process.py" in said


@pytest.mark.slow
def test_the_shipped_data_are_made_where_they_are_used(told: Callable, data: Path, tmp_path: Path):
    """Under any name of their folder, and if only the test data of the run file are left; not for one's own data."""
    (tmp_path / "link").symlink_to(ROOT / "data_alpaca_0.5")
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (tmp_path / "data_alpaca_0.5").symlink_to(ROOT / "data_alpaca_0.5")  # where the run file has them
    program = f"{ROOT}/data_alpaca_0.5/process.py --if-needed"
    own = ["--train_data", "a.json", "b.json", "--val_data", "{mine: [v.json]}"]
    for flags, environment in (([], {}), ([], {"data_dir": "link"}), (own, {})):
        _, started, _ = told(*flags, **environment)
        assert started[0] == program
    for flags, environment in (([*own, "--test_data", "[]"], {}), ([], {"data_dir": str(data)})):
        _, started, _ = told(*flags, **environment)
        assert not any("process.py" in command for command in started)


@pytest.mark.slow
def test_a_run_by_the_launcher(data: Path, tmp_path: Path):
    model = "{model_type: gpt2, vocab_size: 400, n_positions: 256, n_embd: 32, n_layer: 2, n_head: 2}"
    done = launch(
        "--model_config", model, cwd=tmp_path, data_dir=str(data), max_steps="2", tracker="none", run_name="mine"
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "outputs" / "mine" / "weights.csv").is_file() and "w_noisy: 0." in done.stdout


SMALL = "{model_type: gpt2, vocab_size: 400, n_positions: 256, n_embd: 32, n_layer: 3, n_head: 2}"


def short_run(data: Path, name: str) -> tuple[list[str], dict[str, str]]:
    """Flags and environment of eight steps with LISA, without dropout."""
    environment = {"max_steps": "8", "lr_x": "0.1", "tracker": "none", "lisa_layers": "1", "lisa_interval": "3"}
    return ["--model_config", SMALL], environment | {"run_name": name, "data_dir": str(data), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def one_process(data: Path, tmp_path_factory: pytest.TempPathFactory) -> pd.DataFrame:
    """metrics.csv of the short run in one process of plain torch."""
    folder = tmp_path_factory.mktemp("one")
    flags, environment = short_run(data, "one")
    done = launch(*flags, cwd=folder, **environment)
    assert done.returncode == 0, done.stderr
    return pd.read_csv(folder / "outputs" / "one" / "metrics.csv")


def check_same(one: pd.DataFrame, two: pd.DataFrame) -> None:
    assert one["weight/train_noisy"].iloc[-1] < 0.45
    np.testing.assert_allclose(one["weight/train_noisy"], two["weight/train_noisy"], rtol=1e-4)
    np.testing.assert_allclose(one["test_loss_w"].dropna(), two["test_loss_w"].dropna(), rtol=1e-5)


@pytest.mark.slow
def test_bf16_without_zero_is_plain_torchs(data: Path, tmp_path: Path):
    """At stage 0 the weights stay fp32 and are cast in each pass, as under plain torch."""
    metrics = {}
    for backend in ("torch", "deepspeed"):
        flags, environment = short_run(data, backend)
        stage = {"zero_stage": "0"} if backend == "deepspeed" else {}
        done = launch(*flags, cwd=tmp_path, backend=backend, dtype="bf16", **stage, **environment)
        assert done.returncode == 0, done.stderr
        metrics[backend] = pd.read_csv(tmp_path / "outputs" / backend / "metrics.csv")
    pd.testing.assert_frame_equal(metrics["torch"], metrics["deepspeed"], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.processes
def test_two_processes_learn_what_one_learns(data: Path, tmp_path: Path, one_process: pd.DataFrame):
    """NPROC=2 starts two gloo processes under DeepSpeed."""
    flags, environment = short_run(data, "two")
    done = launch(*flags, cwd=tmp_path, NPROC="2", **environment)
    assert done.returncode == 0, done.stderr
    assert "in 2 processes" in done.stdout and "w_noisy: 0." in done.stdout
    check_same(one_process, pd.read_csv(tmp_path / "outputs" / "two" / "metrics.csv"))


@pytest.fixture
def two_machines() -> Iterator[list[str]]:
    """Names of two network namespaces joined by a cable, at 10.77.0.1 and 10.77.0.2 on their interface `cable`."""
    if os.geteuid() != 0 or not shutil.which("ip"):
        pytest.skip("network namespaces need root and the ip command")
    names = [f"machine{number}-{os.getpid()}" for number in (1, 2)]

    def ip(words: str) -> subprocess.CompletedProcess:
        return subprocess.run(["ip", *words.split()], capture_output=True, text=True)

    try:
        for name in names:
            if ip(f"netns add {name}").returncode:
                pytest.skip("this machine lets nobody make network namespaces")
        assert not ip(f"link add cable netns {names[0]} type veth peer name cable netns {names[1]}").returncode
        for number, name in enumerate(names, 1):
            for words in (f"addr add 10.77.0.{number}/24 dev cable", "link set cable up", "link set lo up"):
                assert not ip(f"-n {name} {words}").returncode
        yield names
    finally:
        for name in names:
            ip(f"netns del {name}")


@pytest.mark.slow
@pytest.mark.processes
def test_two_machines_learn_what_one_process_learns(
    data: Path, tmp_path: Path, one_process: pd.DataFrame, two_machines: list[str]
):
    """HOSTFILE, started on each machine without ssh: the processes share nothing but files and a cable."""
    (tmp_path / "hosts").write_text("10.77.0.1 slots=1\n10.77.0.2 slots=1\n")
    flags, environment = short_run(data, "two")
    environment |= {"HOSTFILE": "hosts", "MASTER_ADDR": "10.77.0.1", "GLOO_SOCKET_IFNAME": "cable"}
    environment |= {"DS_ACCELERATOR": "cpu"}
    running = []
    for number, machine in enumerate(two_machines):
        running.append(
            subprocess.Popen(
                ["ip", "netns", "exec", machine, "bash", ROOT / "run_F2SA.sh", *flags],
                cwd=tmp_path,
                env=ENVIRONMENT | environment | {"NODE_RANK": str(number)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    ended = [process.communicate() for process in running]
    assert [process.returncode for process in running] == [0, 0], ended
    assert "in 2 processes" in ended[0][0] and "in 2 processes" not in ended[1][0]
    check_same(one_process, pd.read_csv(tmp_path / "outputs" / "two" / "metrics.csv"))


@pytest.mark.slow
def test_a_machine_without_ssh_needs_an_address(tmp_path: Path):
    (tmp_path / "hosts").write_text("one slots=1\ntwo slots=1\n")
    done = launch(HOSTFILE=str(tmp_path / "hosts"), NODE_RANK="1", DRY_RUN="1")
    assert done.returncode != 0 and "MASTER_ADDR: must be given together with NODE_RANK" in done.stderr


@pytest.mark.slow
def test_the_memory_plan_knows_the_machines_of_a_hostfile(tmp_path: Path):
    (tmp_path / "hosts").write_text("one slots=8\n# three slots=4\ntwo slots=8\n")
    done = launch(HOSTFILE=str(tmp_path / "hosts"), DRY_RUN="1", output_dir="nowhere")
    assert done.returncode == 0 and "16 GPUs" in done.stdout, done.stderr


@pytest.mark.slow
@pytest.mark.processes
def test_a_rank_that_dies_ends_the_others(data: Path, tmp_path: Path):
    """One of two ranks raises; the launcher returns soon after, non-zero, and its last words are that rank's."""
    died = tmp_path / "died"
    (tmp_path / "sitecustomize.py").write_text(
        "import os\n"
        "if os.environ.get('RANK') == '1':\n"
        "    from bilevel.step import f2sa\n"
        "    def step(*args, **kwargs):\n"
        f"        open({str(died)!r}, 'w').close()\n"
        "        raise RuntimeError('rank 1 is gone')\n"
        "    f2sa.penalty_step = step\n"
    )
    flags, environment = short_run(data, "dies")
    done = launch(*flags, cwd=tmp_path, NPROC="2", PYTHONPATH=str(tmp_path), **environment)
    assert done.returncode != 0 and time.time() - died.stat().st_mtime < 60
    *_, last, end = (line.strip() for line in done.stderr.splitlines() if line.strip())
    assert last == "RuntimeError: rank 1 is gone" and set(end) == {"="}, done.stderr[-3000:]
