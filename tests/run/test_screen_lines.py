"""What a run says from its start to its end: stages, lines without a terminal, and the commands that come next."""

import contextlib
import re
import shlex
import types
from pathlib import Path

import pytest
from run_helpers import settings, train

import train_bilevel
from bilevel.evaluate.command import main as evaluate
from bilevel.export.command import main as export
from bilevel.monitor.words import duration
from bilevel.run import progress, stages, summary

pytestmark = pytest.mark.usefixtures("no_old_log")

SHORT = {"max_steps": 4, "eval_every": 4, "global_batch_size": 8, "val_batch_size": 8, "save_every": 2}
STAGES = ["checking the data files", "checking the model", "reading and tokenising the data (4 sources)"]


@pytest.fixture(scope="module")
def said(data: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    """run.log of a run whose checkpoints go when it has finished."""
    out = tmp_path_factory.mktemp("runs") / "my run"
    with contextlib.chdir(out.parent):
        train(data, out, **SHORT, keep_checkpoints=None)
    return (out / "run.log").read_text()


def test_what_comes_before_the_first_step_is_told_with_its_time(said: str):
    lines = said.splitlines()
    expected = [*STAGES, "loading the model twice, as w and u"]
    assert [re.fullmatch(r" *[\d.]+ m?s  (.*)", line)[1] for line in lines[:4]] == expected
    assert lines[4].endswith("4 steps of 8 training and 8 validation samples")


def test_stages_count_from_the_start_of_a_run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    clock = iter([0.0, 50.0, 51.5, 110.0])
    monkeypatch.setattr(stages.time, "perf_counter", lambda: next(clock))
    stage = stages.Stages()
    stage.begin()
    stage("one")
    monkeypatch.setenv("RANK", "1")
    stage("of another process")
    monkeypatch.setenv("RANK", "0")
    stage("two")
    assert capsys.readouterr().out.splitlines() == [" 1.5 s  one", "  60 s  two"] == stage.lines


def test_a_log_has_a_line_after_the_first_step(said: str):
    steps = [int(step) for step in re.findall(r"^step (\d)/4: batch loss .*\n  .* per step", said, flags=re.M)]
    assert steps == [1, 4] and "about" in said
    assert re.search(r"^step 1/4: .*\n  .*\n  train_clean: no difference shown", said, flags=re.M)


def test_a_log_has_a_line_a_minute(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(progress.Progress, "EVERY", 0.0)
    mixed = {"train_data": [str(data / "mixed" / "train_mixed.json")], "weights": "sample", "x_optimizer": "adam"}
    train(data, tmp_path / "r", **SHORT, **mixed, log_every=100)
    said = (tmp_path / "r" / "run.log").read_text()
    assert set(re.findall(r"^step (\d)/4: batch loss", said, flags=re.M)) == {"1", "2", "3", "4"}
    assert said.count("\n  weights of the records (mean 1): 5 % are below ") >= 2
    assert "no record is shown to be harmful (" in said and " compared with " in said


def test_times_leave_evaluations_out_and_count_those_to_come(monkeypatch: pytest.MonkeyPatch, caplog):
    """Evaluations of 95 s before step 1 and after each second step of 10 s, the first of which takes 30 s."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(progress.Progress, "EVERY", 0.0)
    run = types.SimpleNamespace(steps=6, step=0, eval_every=2, copies={"w": None}, row={}, per_sample=False)
    run.world, run.settings = types.SimpleNamespace(main=True), types.SimpleNamespace(learned=False)
    said = []
    with caplog.at_level("INFO", "bilevel"), progress.Progress(run) as shown:
        for seconds in (None, 30, 10, 10, 10, 10, 10):
            if seconds:
                now[0], run.step = now[0] + seconds, run.step + 1
                run.evaluates = run.step % 2 == 0
                shown.advance()
            if run.step % 2 == 0:
                now[0] += 95
                shown.evaluated({})
        said = [
            re.findall(r"step (\d)/6: .*(?:\n  (.*), memory .*)?", record.getMessage())[0] for record in caplog.records
        ]
    assert [step for step, _ in said] == ["0", "1", "2", "3", "4", "5", "6"]  # each has one line
    assert [words for _, words in said] == [
        "",
        f"30 s per step, about {duration(5 * 30 + 3 * 95)} left",
        f"10 s per step, about {duration(4 * 10 + 2 * 95)} left",
        f"10 s per step, about {duration(3 * 10 + 2 * 95)} left",
        f"10 s per step, about {duration(2 * 10 + 95)} left",
        f"10 s per step, about {duration(10 + 95)} left",
        "10 s per step",
    ]


def test_a_long_evaluation_says_that_it_is_one(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(progress.Progress, "LONG", -1.0)
    train(data, tmp_path / "r", **SHORT, save_model="none")
    assert "step 4: evaluating on 16 test records ..." in (tmp_path / "r" / "run.log").read_text()


def test_the_commands_at_the_end_run_as_they_stand(said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """In a fresh shell: they begin with a change of folder, because this run was not started in the repository's.

    Where nothing is shown of the sources, a longer run is proposed, and nothing to write or to train on. That run leads
    on to the cleaned data.
    """
    monkeypatch.chdir(tmp_path)
    folder, page, *others = commands(said)
    assert folder == ["cd", str(progress.__file__).split("/bilevel/")[0]]
    assert page[:3] == ["python", "-m", "webbrowser"] and page[3].endswith("/my%20run/report.html")
    assert "nothing is shown yet: a longer run tells whether the sources differ" in said
    assert follow(others) == ["--config", "bilevel.evaluate"]
    longer = (Path(others[0][others[0].index("--output_dir") + 1]) / "run.log").read_text()
    assert "train_noisy: worse (called at step" in longer
    (told,) = re.findall(r"^  the export leaves out train_noisy; `(.*)` ends the run now, with results$", longer, re.M)
    word, file = shlex.split(told)
    assert word == "touch" and file.endswith("/my run_longer/finish")
    assert follow(commands(longer)[2:]) == ["bilevel.export", "--config", "bilevel.evaluate"]


def commands(said: str) -> list[list[str]]:
    return [shlex.split(line) for line in said.splitlines() if re.match("(cd|python|CONFIG=.*) ", line)]


def follow(typed: list[list[str]]) -> list[str]:
    """Run the commands, none of which may fail; the kind of each."""
    mains = {"bilevel.export": export, "--config": train_bilevel.main, "bilevel.evaluate": evaluate}
    for command in typed:
        words = command[3:] if command[1] == "-m" else command[2:]
        assert mains[command[2]](words) == 0, command
    return [command[2] for command in typed]


def test_the_checkpoints_of_a_finished_run_are_removed(said: str):
    folder = Path(re.search(r"^in (.*): metrics.csv", said, flags=re.M)[1])
    assert re.search(r"^checkpoints removed, [1-9]\d* (k|M|G)B; with keep_checkpoints=2", said, flags=re.M)
    assert (folder / "weights.csv").exists() and not (folder / "checkpoints").exists()


def test_checkpoints_stay_if_that_is_wanted(data: Path, tmp_path: Path):
    train(data, tmp_path / "r", **SHORT, save_model="none", keep_checkpoints=1)
    assert [path.name for path in (tmp_path / "r" / "checkpoints").iterdir()] == ["step_000004"]
    assert "removed" not in (tmp_path / "r" / "run.log").read_text()


def test_the_checkpoints_of_a_run_that_was_killed_at_its_end_are_removed(data: Path, tmp_path: Path, monkeypatch):
    class Gone(BaseException):
        pass

    def gone(*_):
        raise Gone

    arguments = settings(data, tmp_path / "r", **SHORT, save_model="none", keep_checkpoints=None)
    with monkeypatch.context() as patch, pytest.raises(Gone):
        patch.setattr("bilevel.run.checkpoint.Checkpoints.clear", gone)
        train_bilevel.main(arguments)
    foreign = tmp_path / "r" / "checkpoints" / "notes.txt"
    foreign.write_text("mine")
    assert len(list(foreign.parent.iterdir())) == 3
    assert train_bilevel.main(arguments) == 0
    assert list(foreign.parent.iterdir()) == [foreign] and (tmp_path / "r" / "report.html").exists()


@pytest.mark.parametrize(
    ("losses", "saved", "words"),
    [
        ((2.0, 1.9), "w", " (w, the saved one, is worse: it may have learned the validation records by heart"),
        ((2.0, 1.9), "u", " (w is worse: "),
        ((2.0, 1.995), "w", ""),
        ((1.9, 2.0), "w", ""),
        ((2.0, None), "w", ""),
    ],
)
def test_a_copy_that_validation_has_made_worse_is_told(losses: tuple, saved: str, words: str):
    row = {f"test_loss_{name}": loss for name, loss in zip("wu", losses, strict=True) if loss is not None}
    said = summary._worse(row, saved)
    assert said.startswith(words) and bool(said) == bool(words)


def test_steps_of_twenty_seconds_have_a_line_a_minute(monkeypatch: pytest.MonkeyPatch, caplog):
    """The line comes before the minute is over, not after the step in which it ends."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    run = types.SimpleNamespace(steps=30, step=0, copies={"w": None}, row={}, per_sample=False, evaluates=False)
    run.world, run.settings = types.SimpleNamespace(main=True), types.SimpleNamespace(learned=False)
    run.eval_every, said = 30, []
    with caplog.at_level("INFO", "bilevel"), progress.Progress(run) as shown:
        for run.step in range(1, 21):
            now[0] += 21
            before = len(caplog.records)
            shown.advance()
            said += [run.step] * (len(caplog.records) > before)
    assert said == [1, *range(3, 21, 2)]
