"""example/: the curves plot_demo.py reads from every kind of CSV, and runs_to_csv.py's way to them."""

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import matplotlib.image
import pytest

EXAMPLE = Path(__file__).resolve().parents[2] / "example"
REFERENCE = "samp prob./data - v2/noisy/"  # a folder with the trap in its name, and with a run's separator


@pytest.fixture(scope="module")
def scripts():
    """The two scripts as modules; example/ is a folder and no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLE)
        import plot_demo
        import runs_to_csv

        yield plot_demo, runs_to_csv


@pytest.fixture(scope="module")
def plot_demo(scripts):
    return scripts[0]


def write(path: Path, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def wandb_csv(path: Path, step: str, columns: dict[str, list[str]], steps: list[int]) -> Path:
    """A CSV as wandb's page writes it: every cell quoted, every column followed by its two bounds."""
    header = [step] + [key + end for key in columns for end in ("", "__MIN", "__MAX")]
    rows = [[str(s)] + [column[i] for column in columns.values() for _ in range(3)] for i, s in enumerate(steps)]
    return write(path, *(",".join(f'"{cell}"' for cell in row) for row in [header, *rows]))


def run_script(script: str | Path, *args: str | Path, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "error::UserWarning", EXAMPLE / script, *args]
    environment = {k: v for k, v in os.environ.items() if k != "DISPLAY"}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=120)


def fails(main: Callable[[], None], argv: list[str], monkeypatch, capsys, *words: str) -> None:
    """Exit code 2, nothing on stdout, one line on stderr that holds every word."""
    monkeypatch.setattr(sys, "argv", argv)
    with pytest.raises(SystemExit) as stop:
        main()
    out, err = capsys.readouterr()
    assert (stop.value.code, out, err.count("\n")) == (2, "", 1), err
    for word in words:
        assert word in err


def is_drawn(path: Path) -> bool:
    """A picture of some size, on which something else than white stands."""
    pixels = matplotlib.image.imread(path)
    return pixels.shape[1] > 1000 and pixels.min() < 0.5


def load(plot_demo, *paths: Path, source: str | None = None) -> tuple[str, dict[str, dict]]:
    """plot_demo.load with every curve as {step: weight}."""
    axis, curves = plot_demo.load(list(paths), source)
    return axis, {label: points.to_dict() for label, points in curves.items()}


@pytest.mark.parametrize("step", ["Step", "trainer/global_step"])
@pytest.mark.parametrize("prefix,end", [("weight/", ""), (REFERENCE, ".json"), ("samp prob.", ".jsonl")])
def test_wandb_export(plot_demo, tmp_path, step, prefix, end):
    """Both keys, run names of any shape; neither bounds nor a clean source in a folder called noisy."""
    columns = {
        f"GPT2 - weight/lr 1e-5/v1.0 - {prefix}train_noisy{end}": ["0.5", "", "0.125", "NaN"],
        f"plain - {prefix}train_noisy{end}": ["", "0.75", "", "0.25"],
        f"plain - {prefix}train_clean{end}": ["0.9", "0.9", "0.9", "0.9"],
        f"noisy_run - {prefix}train_clean{end}": ["0.8", "0.8", "0.8", ""],
        f"unfinished - {prefix}train_noisy{end}": ["", "", "", ""],
    }
    path = wandb_csv(tmp_path / "export.csv", step, columns, [1, 5, 10, 15])
    axis, curves = load(plot_demo, path)
    assert axis == "Iterations"
    assert curves == {"GPT2 - weight/lr 1e-5/v1.0": {1: 0.5, 10: 0.125}, "plain": {5: 0.75, 15: 0.25}}
    _, clean = load(plot_demo, path, source="train_clean")
    assert list(clean) == ["plain", "noisy_run"] and clean["noisy_run"] == {1: 0.8, 5: 0.8, 10: 0.8}
    assert load(plot_demo, path, source="train_clean.json")[1] == clean


def test_bounds_alone_are_no_curves(plot_demo, tmp_path):
    path = write(tmp_path / "a.csv", "Step,r - weight/train_noisy__MIN,r - weight/train_noisy__MAX", "1,0.1,0.2")
    with pytest.raises(ValueError, match="no curve"):
        plot_demo.load([path], None)


def test_metrics_csv(plot_demo, tmp_path):
    """The run is its folder, a step without a weight is no point, text and other keys are left alone."""
    rows = (
        "step,loss/train_noisy,note,weight/train_clean,weight/x - noisy",
        "1,3,a,0.5,0.5",
        "2,2,b,,",
        "3,1,,1,0",
    )
    path = write(tmp_path / "lr_x - 0.1" / "metrics.csv", *rows)
    assert load(plot_demo, path) == ("Iterations", {"lr_x - 0.1": {1: 0.5, 3: 0.0}})


def test_several_sources_and_several_files(plot_demo, tmp_path):
    """run: source where a run has several; namesakes are kept apart, in one CSV and between two."""
    first = write(tmp_path / "two" / "metrics.csv", "step,weight/noisy_a,weight/noisy_b", "1,0.1,0.2")
    twice = write(tmp_path / "e.csv", "Step,r - weight/train_noisy,r - weight/train_noisy", "1,0.3,0.4")
    third = write(tmp_path / "r" / "metrics.csv", "step,weight/train_noisy", "1,0.5")
    _, curves = load(plot_demo, first, twice, third)
    assert curves == {
        "two: noisy_a": {1: 0.1},
        "two: noisy_b": {1: 0.2},
        "r": {1: 0.3},
        "r (2)": {1: 0.4},
        "r (3)": {1: 0.5},
    }


def test_figure_shows_every_point(plot_demo, tmp_path):
    """Lines hold the data unthinned, y starts at 0, one row is visible, labels stand as they are written."""
    steps = list(range(3000))
    weights = [repr(math.exp(-s / 300)) for s in steps]
    one = ["0.25"] + [""] * 2999
    columns = {"_long $x$ and $y - weight/train_noisy": weights, "one - weight/train_noisy": one}
    x_label, curves = plot_demo.load([wandb_csv(tmp_path / "a.csv", "Step", columns, steps)], None)
    figure = plot_demo.draw(curves, x_label, None)
    figure.draw_without_rendering()
    axes = figure.axes[0]
    long, single = axes.lines
    assert list(long.get_xdata()) == steps and list(long.get_ydata()) == [float(w) for w in weights]
    assert list(single.get_ydata()) == [0.25] and single.get_marker() != "None" and single.get_markevery()[0] == 0
    assert axes.get_ylim()[0] == 0 and axes.get_xlabel() == "Iterations" and "noisy" in axes.get_title()
    assert "noisy" in axes.get_ylabel() and axes.xaxis.get_gridlines()[0].get_visible()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["_long $x$ and $y", "one"]


def test_lines_differ_without_colour(plot_demo):
    pairs = {(plot_demo.DASHES[i % 5], plot_demo.MARKERS[i % 7]) for i in range(35)}
    colours = {(plot_demo.DASHES[i % 5], plot_demo.COLOURS[i % 7]) for i in range(35)}
    assert len(pairs) == len(colours) == 35


@pytest.mark.slow
def test_default_names_from_another_folder(tmp_path):
    """No argument: F2SA.csv and GPT2_demo.png beside the script; one CSV: the picture beside it."""
    home, elsewhere = tmp_path / "home", tmp_path / "elsewhere"
    elsewhere.mkdir()
    export = write(home / "F2SA.csv", "Step,a - weight/train_noisy,b - weight/train_noisy", "1,.5,.5", "2,.4,0")
    script = shutil.copy(EXAMPLE / "plot_demo.py", home)
    for _ in range(2):  # its own picture is replaced
        result = run_script(script, cwd=elsewhere)
        assert (result.returncode, result.stdout, result.stderr) == (0, f"{home / 'GPT2_demo.png'}\n", "")
    assert is_drawn(home / "GPT2_demo.png")
    result = run_script(script, export, cwd=elsewhere)
    assert (result.returncode, result.stdout) == (0, f"{home / 'F2SA.png'}\n")
    assert run_script(script, export, "--out", "b.png", cwd=elsewhere).stdout == "b.png\n"
    assert is_drawn(home / "F2SA.png") and is_drawn(elsewhere / "b.png")
    assert list(elsewhere.iterdir()) == [elsewhere / "b.png"]


@pytest.mark.parametrize(
    "content,args,words",
    [
        (None, [], ["a.csv", "No such file"]),
        (b"\x89PNG\r\n\x1a\n\xff\xfe", [], ["a.csv", "not a CSV"]),
        (b"", [], ["a.csv", "not a CSV"]),
        (b"just a line of text\n", [], ["a.csv", "not a CSV"]),
        (b"Step,r - weight/train_noisy\n1,2\n1,2,3\n", [], ["a.csv", "not a CSV", "line 3"]),
        (b"r - weight/train_noisy,Step\n0.5,1\n", [], ["no step column"]),
        (b"weight/train_noisy,weight/train_clean\n0.5,0.5\n", [], ["no step column"]),
        (b"name,weight/train_noisy\nabc,0.5\n", [], ["no step column", "abc"]),
        (b"Step,r - loss/w,r - rate\n1,2,3\n", [], ["no curve", "loss/w, rate", "--source"]),
        (b"Step,r - weight/train_noisy\n1,\n", [], ["no curve", "weight/train_noisy"]),
        (b"Step,r - weight/a,q - weight/b\n1,2,3\n", [], ["no curve", "found: a, b", "--source"]),
        (b"Step,r - weight/a\n1,2\n", ["--source", "c"], ["no source c", "found: a"]),
        (b"Step,r - weight/train_noisy\n1,high\n", [], ["r - weight/train_noisy", "high"]),
        (b"Step,r - weight/train_noisy\n1,Infinity\n", [], ["infinite"]),
        (b"Step,r - weight/train_noisy\n1,2\n", ["--out", "a.csv"], ["a.csv", ".png"]),
        (b"Step,r - weight/train_noisy\n1,2\n", ["--out", "no/a.png"], ["no/a.png"]),
    ],
)
def test_plot_errors(plot_demo, tmp_path, monkeypatch, capsys, content, args, words):
    """One line, exit code 2, no picture, the input left as it was."""
    monkeypatch.chdir(tmp_path)
    if content is not None:
        Path("a.csv").write_bytes(content)
    fails(plot_demo.main, ["plot_demo.py", "a.csv", *args], monkeypatch, capsys, *words)
    assert [p.read_bytes() for p in tmp_path.iterdir()] == ([] if content is None else [content])


def test_units_are_not_mixed(plot_demo, tmp_path):
    steps = write(tmp_path / "a.csv", "Step,r - weight/train_noisy", "1,0.5")
    seconds = write(tmp_path / "b.csv", "Relative Time (Wall),q - weight/train_noisy", "1.5,0.5")
    assert load(plot_demo, seconds) == ("Relative Time (Wall)", {"q": {1.5: 0.5}})
    with pytest.raises(ValueError, match="different units"):
        plot_demo.load([steps, seconds], None)


def metrics(folder: Path, steps: range, rate: float) -> dict[int, float]:
    """A metrics.csv with weights of many digits; the noisy ones by step."""
    noisy = {step: 0.5 * math.exp(-rate * step) for step in steps}
    rows = [f"{step},{1 / 3!r},{1 - weight!r},{weight!r}" for step, weight in noisy.items()]
    write(folder / "metrics.csv", "step,loss/w,weight/train_clean,weight/train_noisy", *rows)
    return noisy


@pytest.mark.slow
def test_round_trip(scripts, tmp_path):
    """Run folders -> CSV -> curves: the very numbers of metrics.csv, at each run's own steps."""
    plot_demo, runs_to_csv = scripts
    slow = metrics(tmp_path / "F2SA - lr_x=1e-5", range(1, 40, 2), 1e-3)
    fast = metrics(tmp_path / "F2SA - lr_x=1e-1", range(2, 60, 3), 0.3)
    out = tmp_path / "F2SA.csv"
    result = run_script("runs_to_csv.py", *sorted(tmp_path.glob("F2SA - *")), "--out", out, cwd=tmp_path)
    assert (result.returncode, result.stdout, result.stderr) == (0, f"{out}\n", "")
    header = out.read_text().splitlines()[0]
    keys = [f"F2SA - lr_x={rate} - weight/train_noisy" for rate in ("1e-1", "1e-5")]
    assert header == ",".join(f'"{k}"' for k in ["Step"] + [k + e for k in keys for e in ("", "__MIN", "__MAX")])
    assert load(plot_demo, out) == ("Iterations", {"F2SA - lr_x=1e-1": fast, "F2SA - lr_x=1e-5": slow})
    steps = [line.split(",")[0].strip('"') for line in out.read_text().splitlines()[1:]]
    assert steps == [str(step) for step in sorted(slow | fast)]


def test_choice_of_sources(scripts, tmp_path):
    plot_demo, runs_to_csv = scripts
    metrics(tmp_path / "r", range(3), 0.1)
    clean = runs_to_csv.export([tmp_path / "r"], "train_clean", False)
    assert list(clean) == [f"r - weight/train_clean{end}" for end in ("", "__MIN", "__MAX")]
    every = runs_to_csv.export([tmp_path / "r"], None, True)
    assert len(every.columns) == 6 and every.index.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    "args,words",
    [
        (["a/r", "b/r"], ["the name r"]),
        (["a/r", "missing"], ["missing/metrics.csv", "No such file"]),
        (["a/r", "--source", "other"], ["no source other", "train_clean, train_noisy"]),
        (["twice"], ["run twice", "step 7"]),
    ],
)
def test_export_errors(scripts, tmp_path, monkeypatch, capsys, args, words):
    monkeypatch.chdir(tmp_path)
    metrics(Path("a/r"), range(3), 0.1)
    metrics(Path("b/r"), range(3), 0.1)
    write(Path("twice/metrics.csv"), "step,weight/train_noisy", "7,0.5", "7,0.4")
    fails(scripts[1].main, ["runs_to_csv.py", *args, "--out", "out.csv"], monkeypatch, capsys, *words)
    assert not Path("out.csv").exists()


def test_export_replaces_only_by_force(scripts, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    metrics(Path("r"), range(3), 0.1)
    out = write(Path("out.csv"), "mine")
    argv = ["runs_to_csv.py", "r", "--out", "out.csv"]
    fails(scripts[1].main, argv, monkeypatch, capsys, "out.csv", "--force")
    assert out.read_text() == "mine\n"
    monkeypatch.setattr(sys, "argv", [*argv, "--force"])
    scripts[1].main()
    assert out.read_text().startswith('"Step","r - weight/train_noisy"')
