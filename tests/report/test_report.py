"""bilevel/report/command.py: the page of a finished run, used in a browser as its reader uses it."""

import base64
import dataclasses
import gzip
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import run_helpers
import torch
from browser_helpers import chromium, console, installed, requests
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select

from bilevel.data.overlap import Overlap, write_overlaps
from bilevel.data.records import read_rows
from bilevel.data.sources import file_source
from bilevel.export.selection import read_marks
from bilevel.report import command as report
from bilevel.report import contents as report_data
from bilevel.report import records as report_records
from bilevel.report.about import suggested_export
from bilevel.run.finished import read_finished
from bilevel.run.machine import write_machine

needs_browser = pytest.mark.skipif(
    not installed(), reason="no Chromium here: apt-get install chromium chromium-driver (CI has them)"
)


def browsing(test: Callable[..., None]) -> Callable[..., None]:
    """Mark a test that starts a browser."""
    return pytest.mark.slow(needs_browser(test))


N = 10_000
A, B = "a.json", "b <i> &amp;.json"
HOSTILE = {  # by place: (instruction, output) of records that try to be more than text
    10: ("<script>owned = 1</script>", '</script><script>owned = 2</script><img src="x" onerror="owned = 3">'),
    11: ("<!-- <script> \\u003c {{script}} {{data}} &lt; &amp;", "\" ' ` $& $1 \\ \\n ]]> \u2028 \u2029 \ufeff end"),
    12: ("\u202e right to left, שלום עולם", "\x00 NUL \x1b[31m \x7f end"),
    13: ("a megabyte", "long words " * 95_000 + "needle"),
    14: ("white space", " \n\t "),
    15: ("pairs of surrogates, at odd places", "x" + "\N{GRINNING FACE}" * 6000),
}  # fmt: skip


def test_ci_has_the_browser():
    assert installed() or os.environ.get("CI") != "true"


# ----------------------------------------------------------------------------------------------------------------------
# What the page holds


def make_run(folder: Path, sizes: dict[str, int], weights: np.ndarray | None = None, noisy: bool = True) -> Path:
    """A finished run of files of these sizes, per sample where weights are given, with a metrics.csv of 2,000 steps."""
    files, rows = [], []
    for name, size in sizes.items():
        texts = [(f"question {i} of {name}", f"word{i % 7} " * (i % 40 + 1)) for i in range(size)]
        if len(files) == 0:
            texts = [HOSTILE.get(i, text) for i, text in enumerate(texts)]
        records = [{"instruction": a, "input": "", "output": b} for a, b in texts]
        if noisy:
            records = [record | {"is_noisy": i % 3 == 0} for i, record in enumerate(records)]
        files.append(run_helpers.dump(folder / "data" / name, records))
        rows += [(name, i) for i in range(size)]
    if weights is None:
        p = np.arange(1, len(sizes) + 1) / sum(range(len(sizes) + 1))
        table = pd.DataFrame({"source": [file.stem for file in files], "weight": p, "samples": list(sizes.values())})
    else:
        table = pd.DataFrame(rows, columns=["file", "index"]).assign(weight=weights)
    run = run_helpers.finished_run(folder / "a run", files, table)
    step = np.arange(2001)
    evaluated = {"test_loss_w": 4 - step / 1000, "test_loss_u": 4 - step / 2000, "roc_auc": 0.5 + step / 5000}
    evaluated |= {f"weight_q/{q}": 1 + (q - 0.5) * step / 1000 for q in (0.05, 0.25, 0.5, 0.75, 0.95)}
    evaluated |= {"threshold": 0.8 + 0 * step, "precision": 0.9 + 0 * step, "recall": 0.7 + 0 * step}
    metrics = {name: np.where(step % 200, np.nan, values) for name, values in evaluated.items()}
    metrics |= {f"weight/{file.stem}": 0.4 + step / 20_000 for file in files}
    pd.DataFrame({"step": step} | metrics).to_csv(run / "metrics.csv", index=False)
    return run


def test_the_lowest_and_the_highest_weights_are_chosen(tmp_path: Path):
    weights = np.random.default_rng(0).permutation(300) / 149.5
    run = read_finished(make_run(tmp_path, {"b.json": 100, "a.json": 200}, weights))
    chosen, words = report_records.choose(run, 40)
    found = np.concatenate([c[places] for c, places in zip(run.weights, chosen, strict=True)])
    assert sorted(found) == sorted(weights)[:20] + sorted(weights)[-20:]
    assert all((np.diff(places) > 0).all() for places in chosen)
    assert words == "The 20 records with the lowest and the 20 with the highest weights, out of 300."
    run.weights[0][:] = np.nan  # dropped: they have no weight
    assert [len(places) for places in report_records.choose(run, 300)[0]] == [0, 200]
    assert [len(places) for places in report_records.choose(run, 100)[0]] == [0, 100]


def test_a_run_per_source_shows_records_of_each(tmp_path: Path):
    run = read_finished(make_run(tmp_path, {"a.json": 30, "b.json": 300, "c.json": 3}))
    chosen, _ = report_records.choose(run, 60)
    assert [len(places) for places in chosen] == [20, 20, 3]
    data = report_data.page_data(run, 60)
    assert data["histogram"] is None and [chart["title"] for chart in data["charts"]][0] == "Shares of the sources"
    shares = {row["name"]: (row["before"], row["share"], row["weight"]) for row in data["sources"]}
    assert shares["b"] == pytest.approx((300 / 333, 2 / 6, 333 * (2 / 6) / 300))
    assert data["records"]["weight"][:20] == [pytest.approx(333 / 6 / 30)] * 20


def test_the_page_begins_with_a_verdict_and_the_command_that_exports(tmp_path: Path):
    data = report_data.page_data(read_finished(judged_run(tmp_path)), 100)
    assert data["verdict"] == "a is worse, b is better; for 1 more, no difference is shown"
    words, command = data["export"]
    assert words == "write the data without what is shown to be worse"
    assert command == f"python -m bilevel.export '{tmp_path / 'a run'}'"
    about = dict(data["about"])
    assert about["model"] == "new gpt2 from model_config" and about["records"] == "training 90 (a, b, c)"
    assert about["finished"].startswith("20") and about["settings"] == "the defaults"
    assert about["the same again"].endswith(f"/a run/config.yaml' --output_dir '{tmp_path / 'a run_again'}'")
    (tmp_path / "a run" / "timing.csv").write_text("step,seconds,memory_mib\n0,1,9\n8,125.5,1000\n")
    assert "machine" not in about and "version" not in about  # of a run that did not write them down
    write_machine(tmp_path / "a run", 2)
    again = dict(report_data.page_data(read_finished(tmp_path / "a run"), 100)["about"])
    assert again["machine"].endswith(", 2 processes") and f"torch {torch.__version__}, " in again["version"]
    assert again["finished"].endswith(", after 2 min, 1.0 GB of memory")
    plain = report_data.page_data(read_finished(make_run(tmp_path / "plain", {"a.json": 3, "b.json": 3})), 100)
    assert plain["verdict"] == "the weights were given, not learned" and plain["export"][1].endswith("a run' --all")


def test_every_id_of_the_page_is_one_elements():
    ids = re.findall(r'id="([^"]+)"', Path(report.__file__).with_name("page.html").read_text(encoding="utf-8"))
    assert len(ids) == len(set(ids)) > 20


def test_records_without_a_weight_are_told_by_their_cause(tmp_path: Path):
    """Those that the run did not read are not said to be too long."""
    run = read_finished(make_run(tmp_path, {A: 10}, np.ones(10)))
    run.weights[0][:3] = np.nan
    for unread, said in ((0, "3 more were dropped as too long"), (3, "3 more were not read"),
                         (1, "1 more were not read; 2 more were dropped as too long")):  # fmt: skip
        run.train[0] = dataclasses.replace(run.train[0], unread=unread)
        assert report_data.facts(run, pd.DataFrame())[0] == ("records", "7", said)


def test_records_of_equal_weight_are_all_exported(tmp_path: Path):
    """bilevel.export refuses to choose among them."""
    run = dataclasses.replace(read_finished(judged_run(tmp_path)), per_sample=True)
    assert suggested_export(run)[1] == f"python -m bilevel.export '{tmp_path / 'a run'}'"
    equal = dataclasses.replace(run, weights=[np.ones(30) for _ in run.weights])
    assert suggested_export(equal)[1].endswith(" --all")
    none = {"harmful_share": [np.zeros(30) for _ in run.weights]}
    chance = [np.random.default_rng(number).normal(1, 0.1, 30) for number in range(3)]
    for weights in (equal.weights, chance):
        words, command = suggested_export(dataclasses.replace(run, weights=weights, **none))
        assert words.startswith("nothing is shown to be worse;") and command.endswith(" --all")
    groups = [np.r_[np.full(10, 0.1), np.full(20, 1.45)] + each / 100 for each in chance]
    assert suggested_export(dataclasses.replace(run, weights=groups, **none))[1].endswith("a run'")


def test_the_threshold_is_shown_with_the_records_on_both_sides(tmp_path: Path):
    """It is that of metrics.csv, or of the weights themselves where nobody knows which records are noisy."""
    weights = np.where(np.arange(100) < 30, 0.1, 1.38) + np.linspace(0, 0.02, 100)
    run = read_finished(make_run(tmp_path, {"a.json": 100}, weights))
    data = report_data.page_data(run, 100)
    assert data["histogram"]["threshold"] == 0.8 and data["histogram"]["sides"] == [30, 70]
    assert data["verdict"].startswith("the weights form two groups")
    pd.read_csv(run.folder / "metrics.csv").drop(columns=list(report_data.NOISE)).to_csv(
        run.folder / "metrics.csv", index=False
    )
    histogram = report_data.page_data(run, 100)["histogram"]
    assert histogram["sides"] == [30, 70] and histogram["threshold"] == pytest.approx(0.75, abs=0.02)


def test_no_chart_holds_a_flat_line(tmp_path: Path):
    run = read_finished(make_run(tmp_path, {"a.json": 30, "b.json": 30}))
    metrics = pd.read_csv(run.folder / "metrics.csv").assign(**{"weight/a": 0.5, "weight/b": 0.5})
    metrics.to_csv(run.folder / "metrics.csv", index=False)
    assert "Shares of the sources" not in [chart["title"] for chart in report_data.page_data(run, 60)["charts"]]


def judged_run(folder: Path) -> Path:
    """Three sources: worse, better, and one without a verdict or evidence."""
    run = make_run(folder, {"a.json": 30, "b.json": 30, "c.json": 30})
    table = pd.read_csv(run / "weights.csv").assign(weight=[0.02, 0.8, 0.18], p_worse=0.5, evidence=40.0)
    table = table.assign(difference=[1.2, -0.9, None], low=[0.7, -1.6, None], high=[1.7, -0.2, None])
    verdicts = {"verdict": ["worse", "better", "no difference shown"], "called_at": ["8", "40", ""]}
    table.assign(**verdicts).to_csv(run / "weights.csv", index=False)
    return run


def test_sources_carry_their_evidence(tmp_path: Path):
    data = report_data.page_data(read_finished(judged_run(tmp_path)), 100)
    names = ("difference", "low", "high", "verdict", "called_at")
    assert [[source[name] for name in names] for source in data["sources"]] == [
        [1.2, 0.7, 1.7, "worse", 8],
        [-0.9, -1.6, -0.2, "better", 40],
        [None, None, None, "no difference shown", None],
    ]
    assert data["charts"][0]["called"] == {"a": 8, "b": 40}
    plain = report_data.page_data(read_finished(make_run(tmp_path / "plain", {"a.json": 3, "b.json": 3})), 100)
    assert all("verdict" not in source for source in plain["sources"])


def test_a_curve_keeps_its_ends_and_what_an_evaluation_found(tmp_path: Path):
    run = read_finished(make_run(tmp_path, {"a.json": 20, "b.json": 20}, np.ones(40)))
    charts = {chart["title"]: chart for chart in report_data.page_data(run, 40)["charts"]}
    share, loss = charts["Shares of the sources"], charts["Test loss"]
    assert len(share["x"]) == report_data.POINTS and (share["x"][0], share["x"][-1]) == (0, 2000)
    assert loss["x"] == list(range(0, 2001, 200)) and loss["series"][0]["y"][-1] == 2.0
    assert [one["name"] for one in charts["Weights of the records"]["series"]][2] == "median"
    metrics = pd.read_csv(run.folder / "metrics.csv").assign(roc_auc=np.nan, threshold=np.nan)  # all are noisy
    metrics.to_csv(run.folder / "metrics.csv", index=False)
    data = report_data.page_data(run, 40)
    assert "ROC area" not in [chart["title"] for chart in data["charts"]] + [fact[0] for fact in data["facts"]]
    assert data["histogram"] is None  # of equal weights
    (run.folder / "metrics.csv").unlink()
    assert report_data.page_data(run, 40)["charts"] == []


@pytest.mark.parametrize(
    ("lengths", "most", "cut"),
    [([5, 5], 10, 10), ([90, 5], 10, 5), ([90, 2, 50], 10, 4), ([9], 4, 4), ([3, 3, 3], 8, 2)],
)
def test_long_texts_are_cut_to_one_length(lengths: list[int], most: int, cut: int):
    assert report_records.cut_length(np.array(lengths), most) == cut
    assert sum(min(length, cut) for length in lengths) <= most


def test_a_chat_is_shown_turn_by_turn_and_an_alpaca_prompt_without_its_outer_headings(write: Callable[..., Path]):
    chat = [
        {"role": "system", "content": "s" * 9},
        {"role": "user", "content": "u"},
        {"role": "assistant", "content": "a"},
    ]
    files = [
        write("a.json", [{"instruction": "Add.", "input": "1 2", "output": "3"}]),
        write("b.jsonl", json.dumps({"messages": chat})),
    ]
    rows, chosen = [read_rows(file_source(file)) for file in files], [np.array([0])] * 2
    assert report_records.turns_of(rows, chosen) == [
        [("prompt", "Add.\n\n### Input:\n1 2", 20), ("response", "3", 1)],
        [("system", "s" * 9, 9), ("user", "u", 1), ("assistant", "a", 1)],
    ]


OVERLAP = Overlap("train", "test", 1200, 4000, [("test <b>.json", 3, "a.json", 5), ("test <b>.json", 9, B, 0)])


def test_records_in_common_are_told(tmp_path: Path):
    run = read_finished(make_run(tmp_path, {"a.json": 16}, np.ones(16)))
    assert report_data.page_data(run, 16)["overlaps"] == []
    write_overlaps(run.folder, [OVERLAP])
    assert report_data.page_data(run, 16)["overlaps"] == [
        [
            "1,200 of 4,000 test records stand in train too",
            "test <b>.json record 3 is a.json record 5",
            f"test <b>.json record 9 is {B} record 0",
        ]
    ]


def with_validation(run: Path) -> Path:
    """Add validation data to a run: its records 3 and 20 differ from those in training by white space only."""
    data = json.loads((run / "data.json").read_text())
    records = json.loads(Path(data["train"][0]["path"]).read_text(encoding="utf-8"))
    shared = [record | {"output": f" {record['output']}\n"} for record in (records[3], records[20])]
    val = run_helpers.dump(run.parent / "val.json", [*shared, {"instruction": "other", "input": "", "output": "one"}])
    sha256 = hashlib.sha256(val.read_bytes()).hexdigest()
    data["val"] = [{"file": val.name, "path": str(val), "sha256": sha256, "records": 3, "samples": 3}]
    (run / "data.json").write_text(json.dumps(data))
    write_overlaps(run, [Overlap("train", "val", 2, 3, [("val.json", 0, "a.json", 3)])])
    return val


def test_training_records_that_are_validation_records_too_are_marked(tmp_path: Path):
    run = read_finished(make_run(tmp_path, {"a.json": 30, "b.json": 10}, np.ones(40)))
    assert report_data.page_data(run, 40)["records"]["shared"] is None
    val = with_validation(run.folder)
    shared = report_data.page_data(run, 40)["records"]["shared"]
    assert np.flatnonzero(shared).tolist() == [3, 20] and len(shared) == 40
    val.write_text("[]")  # not what was compared
    assert report_data.page_data(run, 40)["records"]["shared"] is None
    val.unlink()
    assert report_data.page_data(run, 40)["records"]["shared"] is None


def test_no_text_ends_the_data(tmp_path: Path):
    run = read_finished(make_run(tmp_path, {"a.json": 16}, np.arange(16) / 7.5))
    page = report.as_html(report_data.page_data(run, 16)).decode()
    before, _, after = page.partition('<script type="application/json" id="data">')
    text, end, rest = after.partition("</script>")
    assert not set("<>&\u2028\u2029") & set(text) and rest.count("<script>") == 1 and "{{" not in before + rest
    packs = re.search(r'<script type="text/plain" id="packs">([^<]*)</script>', rest)[1].split("\n")
    turns = json.loads(gzip.decompress(base64.b64decode(packs[0])))
    assert [tuple(text for _, text, _ in turns[i]) for i in (10, 11, 12)] == [HOSTILE[i] for i in (10, 11, 12)]


def test_mistakes_are_told_and_nothing_is_written(tmp_path: Path, capsys: pytest.CaptureFixture):
    run = make_run(tmp_path, {"a.json": 16}, np.ones(16))
    other = tmp_path / "other.html"
    other.write_text("mine")
    for arguments, message in [
        ([str(run), "--out", str(other)], "is not overwritten"),
        ([str(run), "--out", str(tmp_path / "none" / "page.html")], "does not exist"),
        ([str(run), "--records", "1"], "give 2 or more"),
        ([str(tmp_path / "none")], "no config.yaml"),
    ]:
        assert report.main(arguments) == 2
        assert message in capsys.readouterr().err
    assert other.read_text() == "mine" and not (run / "report.html").exists()
    for _ in range(2):  # its own page is made anew
        assert report.main([str(run)]) == 0
    assert capsys.readouterr().out == f"{run / 'report.html'}\n" * 2
    assert not list(run.glob("*.new"))


def test_a_run_is_well_without_its_report(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    """tests/test_train.py has a run that ends with one."""

    def fails(_):
        raise ValueError("no such thing")

    monkeypatch.setattr(report, "write_report", fails)
    report.report_on(tmp_path)
    assert f"not written: no such thing. Try again with `python -m bilevel.report {tmp_path}`" in caplog.text


# ----------------------------------------------------------------------------------------------------------------------
# The page in a browser


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """10,000 records of two sources; the first hostile ones have the lowest weights."""
    weights = np.random.default_rng(1).permutation(N) + 100.0
    weights[list(HOSTILE)] = range(len(HOSTILE))
    folder = make_run(tmp_path_factory.mktemp("report"), {A: 6000, B: 4000}, weights / weights.mean())
    write_overlaps(folder, [OVERLAP])
    assert report.main([str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def downloads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def started(downloads: Path) -> Iterator[webdriver.Chrome]:
    with chromium(downloads) as browser:
        yield browser


@pytest.fixture
def page(started: webdriver.Chrome, run: Path) -> webdriver.Chrome:
    """The report, as it opens for the first time; it has said nothing on the console and asked for nothing else."""
    address = (run / "report.html").as_uri()
    console(started), requests(started)
    started.get(address)
    if started.execute_script("localStorage.clear(); return marks.size"):
        started.refresh()
    assert console(shown(started)) == []
    assert set(requests(started)) <= {address, "data:,"}
    return started


def places(page: webdriver.Chrome) -> list[str]:
    return page.execute_script(
        "return [...document.querySelectorAll('.record')].map(r => r.getAttribute('aria-label'))"
    )


SHOWN = "(function wait() { $('loading') || $('records').ariaBusy ? setTimeout(wait, 5) : done() })()"


def shown(page: webdriver.Chrome) -> webdriver.Chrome:
    """The page, once it shows the records that were asked for."""
    page.execute_async_script("const done = arguments[0]; " + SHOWN)
    return page


def settle(page: webdriver.Chrome) -> None:
    """The page waits for 120 ms of silence before it looks for records."""
    page.execute_async_script("setTimeout(arguments[0], 130)")
    shown(page)


def choose(page: webdriver.Chrome, field: str, value: str) -> None:
    Select(page.find_element(By.ID, field)).select_by_value(value)
    settle(page)


def search(page: webdriver.Chrome, words: str) -> str:
    """Type into the search field; what is said of the number of records then."""
    field = page.find_element(By.ID, "search")
    field.clear()
    field.send_keys(words)
    return count_after(page)


def count_after(page: webdriver.Chrome) -> str:
    settle(page)
    return page.find_element(By.ID, "count").text


def downloaded(folder: Path) -> dict:
    deadline = time.monotonic() + 10
    while not (found := list(folder.glob("*.json"))):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    content = json.loads(found[0].read_text(encoding="utf-8"))
    found[0].unlink()
    return content


@browsing
def test_it_loads_and_every_control_has_a_name(page: webdriver.Chrome, run: Path):
    assert page.title == "a run – learned weights" and page.find_element(By.ID, "count").text == "10,000 records"
    assert places(page)[: len(HOSTILE)] == [f"a.json #{i}" for i in HOSTILE] and len(places(page)) == 50
    facts = page.find_element(By.ID, "facts").text
    assert "10,000" in facts and "2.000" in facts and "0.900" in facts
    controls = page.find_elements(By.CSS_SELECTOR, "button, input:not([hidden]), select, svg[tabindex]")
    seen = [control for control in controls[:60] if control.is_displayed()]
    assert len(seen) > 50 and all(control.accessible_name for control in seen)
    heads = [cell.text for cell in page.find_elements(By.CSS_SELECTOR, "#sources tr:nth-child(1) td:first-child")]
    assert heads == ["a"]


def open_judged(started: webdriver.Chrome, tmp_path: Path) -> None:
    """Show the report of judged_run."""
    run = judged_run(tmp_path)
    assert report.main([str(run)]) == 0
    console(started)
    started.get((run / "report.html").as_uri())
    shown(started)


@browsing
def test_verdicts_are_drawn_on_one_scale(started: webdriver.Chrome, tmp_path: Path):
    """Worse is right of the line that all rows share, better left of it; without evidence there is no drawing."""
    open_judged(started, tmp_path)
    rows = {row.find_element(By.TAG_NAME, "td").text: row for row in started.find_elements(By.CSS_SELECTOR, "tbody tr")}
    assert "worse, step 8" in rows["a"].text and "1.2 (0.7 to 1.7)" in rows["a"].text
    assert "better, step 40" in rows["b"].text and "no difference shown" in rows["c"].text

    def x(name: str, css: str, attribute: str) -> float:
        return float(rows[name].find_element(By.CSS_SELECTOR, f".forest {css}").get_attribute(attribute))

    zero = x("a", ".grid", "x1")
    assert zero == x("b", ".grid", "x1") and x("b", "circle", "cx") < zero < x("a", "circle", "cx")
    assert x("a", ".reach", "x1") > zero > x("b", ".reach", "x2")
    assert not rows["c"].find_elements(By.CSS_SELECTOR, ".forest") and "–" in rows["c"].text
    assert len(started.find_elements(By.CSS_SELECTOR, "#charts .called")) == 2
    assert started.find_element(By.ID, "judged").is_displayed() and console(started) == []


@browsing
def test_it_shows_the_records_in_common(page: webdriver.Chrome, tmp_path: Path):
    items = [item.text for item in page.find_elements(By.CSS_SELECTOR, "#overlaps li li")]
    assert items == ["test <b>.json record 3 is a.json record 5", f"test <b>.json record 9 is {B} record 0"]
    assert "1,200 of 4,000 test records stand in train too" in page.find_element(By.ID, "overlaps").text
    other = make_run(tmp_path, {"a.json": 16}, np.ones(16))
    assert report.main([str(other)]) == 0
    page.get((other / "report.html").as_uri())
    shown(page)
    assert not page.find_element(By.ID, "overlaps-section").is_displayed()


@browsing
def test_it_filters_by_records_in_validation(page: webdriver.Chrome, tmp_path: Path):
    assert not page.find_element(By.ID, "shared").is_displayed()
    run = make_run(tmp_path, {"a.json": 30}, np.ones(30))
    with_validation(run)
    assert report.main([str(run)]) == 0
    page.get((run / "report.html").as_uri())
    shown(page)
    choose(page, "shared", "1")
    assert places(page) == ["a.json #3", "a.json #20"]
    assert "validation record, too" in page.find_element(By.CSS_SELECTOR, ".meta").text
    choose(page, "shared", "0")
    assert count_after(page) == "28 of 30 records"


@browsing
def test_text_stays_text(page: webdriver.Chrome):
    rows = page.find_elements(By.CSS_SELECTOR, ".turns")[: len(HOSTILE)]
    read = "return [...arguments[0].querySelectorAll('.text')].map(text => text.textContent)"
    texts = [page.execute_script(read, row) for row in rows]
    assert [tuple(texts[k]) for k in range(3)] == [HOSTILE[i] for i in (10, 11, 12)]
    assert page.execute_script("return typeof owned") == "undefined"
    assert texts[4][1] == "only white space, 4 characters"
    assert search(page, '<img src="x"') == "1 of 10,000 records"
    assert page.find_element(By.CSS_SELECTOR, "mark").text == '<img src="x"'
    assert page.find_elements(By.CSS_SELECTOR, "#page img, #page i:not(.track i), #records script") == []
    assert search(page, "NEEDLE") == "1 of 10,000 records"
    text = page.find_element(By.CSS_SELECTOR, ".response")
    assert len(text.text) < 1200 and text.text.endswith("needle")
    page.find_element(By.CSS_SELECTOR, ".turns button").click()
    assert text.get_property("textContent") == HOSTILE[13][1] and 100 < text.size["height"] < 1000
    assert search(page, "surrogates") == "1 of 10,000 records"
    page.find_element(By.CSS_SELECTOR, ".turns button").click()
    parts = page.execute_script("return [...document.querySelectorAll('.response div')].map(part => part.textContent)")
    assert len(parts) > 1 and "".join(parts) == HOSTILE[15][1]  # half a pair would have become U+FFFD on its way here
    page.execute_script("document.body.append(Object.assign(document.createElement('script'), {text: 'owned = 4'}))")
    assert page.execute_script("return typeof owned") == "undefined"
    assert "Content Security Policy" in " ".join(console(page))


@browsing
def test_it_sorts(page: webdriver.Chrome, run: Path):
    weights, texts = pd.read_csv(run / "weights.csv"), []
    for file in (A, B):
        records = json.loads((run.parent / "data" / file).read_text(encoding="utf-8"))
        texts += [(len(record["instruction"]), len(record["output"])) for record in records]
    table = weights.assign(place=range(N), response=[b for _, b in texts], length=[a + b for a, b in texts])
    page.execute_script("arguments[0].scrollIntoView()", page.find_element(By.ID, "sort"))
    for order in ("-weight", "source", "place", "response", "-response", "length", "-length", "weight"):
        key = ["file", "weight"] if order == "source" else order.strip("-")
        expected = table.sort_values(key, ascending=not order.startswith("-"), kind="stable")[:50]
        choose(page, "sort", order)
        assert places(page) == [
            f"{file} #{index}" for file, index in zip(expected["file"], expected["index"], strict=True)
        ]


@browsing
def test_it_searches_and_filters(page: webdriver.Chrome):
    assert search(page, "QUESTION 77 of b") == "1 of 10,000 records" and places(page) == [f"{B} #77"]
    assert page.find_element(By.CSS_SELECTOR, "mark").text == "question 77 of b"
    assert search(page, f"{B} #77") == "11 of 10,000 records"  # 77 and 770 to 779
    assert search(page, "no such (words") == "0 of 10,000 records"
    assert page.find_element(By.ID, "records").text == "No record is like that."
    page.find_element(By.CSS_SELECTOR, "[type=reset]").click()
    assert count_after(page) == "10,000 records"
    choose(page, "source", "1")
    choose(page, "noisy", "1")
    assert count_after(page) == "1,334 of 10,000 records"
    for bound, value in (("least", "0.5"), ("most", "1.5")):
        page.find_element(By.ID, bound).send_keys(value)
    weights = page.execute_script(
        "return WEIGHT.filter((w, k) => FILE[k] === 1 && NOISY[k] === 1 && w >= 0.5 && w <= 1.5)"
    )
    assert 100 < len(weights) < 1334 and count_after(page) == f"{len(weights)} of 10,000 records"


@browsing
def test_it_turns_pages(page: webdriver.Chrome):
    first = places(page)
    page.find_element(By.ID, "next").click()
    shown(page)
    second = places(page)
    assert not set(first) & set(second)
    number = page.find_element(By.ID, "number")
    for typed, page_number in (("100", "100"), ("999", "200")):
        number.send_keys(Keys.CONTROL, "a")
        number.send_keys(typed, Keys.ENTER)
        assert shown(page) and number.get_property("value") == page_number
    assert len(places(page)) == 50 and not page.find_element(By.ID, "next").is_enabled()
    page.find_element(By.ID, "previous-below").click()
    assert number.get_property("value") == "199"


@browsing
def test_marks_are_made_kept_and_saved(page: webdriver.Chrome, run: Path, downloads: Path, tmp_path: Path):
    assert not page.find_element(By.ID, "save").is_enabled()
    keep, drop = page.find_elements(By.CSS_SELECTOR, ".record:first-child .choice button")
    keep.click()
    drop.click()
    assert (keep.get_attribute("aria-pressed"), drop.get_attribute("aria-pressed")) == ("false", "true")
    drop.send_keys("j")
    for key in ("y", "j", "y", "y", "k"):  # the second record is kept, the third is not any more
        page.switch_to.active_element.send_keys(key)
    assert page.switch_to.active_element.get_attribute("aria-label") == "a.json #11"
    search(page, "question 5 of b")
    page.find_element(By.CSS_SELECTOR, ".choice [value=keep]").click()
    marks = [(A, 10, "drop"), (A, 11, "keep"), (B, 5, "keep")]
    expected = {"run": "a run", "marks": [{"file": f, "index": i, "mark": m} for f, i, m in marks]}
    page.find_element(By.ID, "save").click()
    assert downloaded(downloads) == expected

    page.refresh()  # the next visit
    shown(page)
    assert page.find_element(By.ID, "tally").text == "2 keep, 1 drop"
    choose(page, "marked", "keep")
    assert places(page) == ["a.json #11", f"{B} #5"]
    page.execute_script("localStorage.clear()")
    page.refresh()
    shown(page)
    assert page.find_element(By.ID, "tally").text == "0 keep, 0 drop"
    (tmp_path / "marks.json").write_text(json.dumps(expected))
    assert read_marks(str(tmp_path / "marks.json"), read_finished(run)).nonzero()[0].tolist() == [10, 11, 6005]
    page.find_element(By.ID, "file").send_keys(str(tmp_path / "marks.json"))
    assert (
        page.execute_script("return new Promise(r => setTimeout(() => r(marksAsJson()), 300))")
        == json.dumps(expected, indent=1) + "\n"
    )
    (tmp_path / "marks.json").write_text(json.dumps({"marks": [{"file": "c.json", "index": 0, "mark": "keep"}]}))
    page.find_element(By.ID, "file").send_keys(str(tmp_path / "marks.json"))
    time.sleep(0.3)
    assert "holds no marks of this run" in page.find_element(By.ID, "tally").text


@browsing
def test_it_works_where_nothing_is_stored(page: webdriver.Chrome):
    refuse = "Object.defineProperty(window, 'localStorage', {get() { throw new DOMException('no', 'SecurityError') }})"
    script = page.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": refuse})
    try:
        page.refresh()
        shown(page).find_element(By.CSS_SELECTOR, ".choice [value=keep]").click()
        assert page.find_element(By.ID, "tally").text == "1 keep, 0 drop"
        assert "save them before you leave" in page.find_element(By.ID, "storage").text
        assert console(page) == []
    finally:
        page.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", script)


@browsing
def test_curves_tell_their_values_and_a_bar_its_records(page: webdriver.Chrome):
    shares, quantiles, weights, loss, area = page.find_elements(By.CSS_SELECTOR, "figure")
    legend = loss.find_element(By.CSS_SELECTOR, ".legend")
    assert legend.text.split() == ["step", "2,000", "w", "2", "u", "3"]
    svg = loss.find_element(By.CSS_SELECTOR, "svg")
    page.execute_script("arguments[0].focus()", svg)
    page.switch_to.active_element.send_keys(Keys.HOME, Keys.ARROW_RIGHT)
    assert legend.text.split() == ["step", "200", "w", "3.8", "u", "3.9"]
    page.execute_script("document.activeElement.blur()")
    webdriver.ActionChains(page).move_to_element(svg).perform()  # its middle
    assert legend.text.split()[:2] == ["step", "1,000"]
    bar = weights.find_element(By.CSS_SELECTOR, "svg")
    page.execute_script("arguments[0].focus()", bar)
    page.switch_to.active_element.send_keys(Keys.HOME)
    told = weights.find_element(By.CSS_SELECTOR, ".legend").text.split()
    page.switch_to.active_element.send_keys(Keys.ENTER)
    clean, noisy = int(told[told.index("clean") + 1]), int(told[told.index("noisy") + 1])
    assert count_after(page) == f"{clean + noisy} of 10,000 records" and clean + noisy > 50


@browsing
def test_a_share_that_is_not_0_or_1_does_not_read_so(started: webdriver.Chrome, tmp_path: Path):
    run = make_run(tmp_path, {"a.json": 3, "b.json": 3})
    metrics = pd.read_csv(run / "metrics.csv").assign(**{"weight/a": 0.9951, "weight/b": 0.0049})
    metrics.loc[0, ["weight/a", "weight/b"]] = [1, 0]
    metrics.to_csv(run / "metrics.csv", index=False)
    assert report.main([str(run)]) == 0
    started.get((run / "report.html").as_uri())
    shown(started)
    figure = started.find_element(By.CSS_SELECTOR, "figure")
    assert figure.find_element(By.CSS_SELECTOR, ".legend").text.split() == ["step", "2,000", "a", "0.995", "b", "0.005"]
    started.execute_script("arguments[0].focus()", figure.find_element(By.CSS_SELECTOR, "svg"))
    started.switch_to.active_element.send_keys(Keys.HOME)
    assert figure.find_element(By.CSS_SELECTOR, ".legend").text.split() == ["step", "0", "a", "1", "b", "0"]


@browsing
def test_it_fits_a_phone_and_keeps_still(page: webdriver.Chrome):
    watch = (
        "new PerformanceObserver(l => { for (const e of l.getEntries()) window.moved = (window.moved ?? 0) + e.value })"
    )
    watch += ".observe({type: 'layout-shift', buffered: true})"
    script = page.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": watch})
    try:
        for width in (320, 390, 1280):
            size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 500}
            page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            page.refresh()
            time.sleep(0.3)
            wide, shift = page.execute_script("return [document.documentElement.scrollWidth, window.moved ?? 0]")
            assert wide <= width and shift < 0.001, (width, wide, shift)
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        page.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", script)


@browsing
def test_it_fits_on_paper(page: webdriver.Chrome):
    """Charts are drawn for the screen and printed at another width; nothing that is pressed is printed."""
    page.execute_script("dispatchEvent(new Event('beforeprint'))")
    assert page.execute_script("return document.getElementById('about').open")
    drawn = page.execute_script(
        "return [...document.querySelectorAll('figure svg')].map(s => [s.getAttribute('viewBox'), s.clientWidth])"
    )
    assert drawn and all(box == f"0 0 {width} 230" for box, width in drawn)
    page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        for name in ("filters", "bar"):
            assert not page.find_element(By.ID, name).is_displayed()
        widths = "return ['figure', 'table', '.record'].flatMap(n => [...document.querySelectorAll(n)])"
        assert page.execute_script(f"{widths}.every(e => e.getBoundingClientRect().right <= innerWidth)")
    finally:
        page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


@browsing
def test_the_axis_of_steps_has_whole_ones(started: webdriver.Chrome, tmp_path: Path):
    run = make_run(tmp_path, {A: 10, B: 10})
    metrics = pd.read_csv(run / "metrics.csv").iloc[[0, 1, 2]]
    metrics["step"] = range(3)
    metrics.to_csv(run / "metrics.csv", index=False)
    started.get(report.write_report(run).as_uri())
    shown(started)
    marks = "return [...document.querySelectorAll('figure svg text[text-anchor=middle]')].map(t => t.textContent)"
    found = started.execute_script(marks)
    assert found and set(found) == {"0", "1", "2"}


@browsing
def test_a_run_per_source_shows_examples_of_each_and_names_no_record_lowest(started: webdriver.Chrome, tmp_path: Path):
    open_judged(started, tmp_path)
    assert places(started)[:4] == ["a.json #0", "b.json #0", "c.json #0", "a.json #1"]
    orders = [option.get_attribute("value") for option in Select(started.find_element(By.ID, "sort")).options]
    assert "weight" not in orders and orders[0] == "mixed"
    started.find_element(By.CSS_SELECTOR, "#filters button[type=reset]").click()
    time.sleep(0.3)
    assert started.find_element(By.ID, "sort").get_attribute("value") == "mixed"
    assert started.find_element(By.ID, "verdict").text.lower().startswith("a is worse") and console(started) == []


def equal_run(folder: Path) -> Path:
    """Weights are all equal; the records have mean gaps, but the first ten of each file."""
    run = make_run(folder, {A: 60, B: 60}, np.ones(120), noisy=False)
    gaps = np.random.default_rng(2).normal(0, 1, 120).round(3)
    gaps[[*range(10), *range(60, 70)]] = np.nan
    table = pd.read_csv(run / "weights.csv").assign(mean_gap=gaps, harmful_share=np.where(np.isnan(gaps), np.nan, 0.0))
    table.to_csv(run / "weights.csv", index=False)
    return run


def test_records_of_equal_weight_are_told_apart_by_their_mean_gaps(tmp_path: Path):
    run = read_finished(equal_run(tmp_path))
    data, table = report_data.page_data(run, 40), pd.read_csv(tmp_path / "a run" / "weights.csv")
    assert data["histogram"] is None and data["per_sample"] and data["verdict"].startswith("none of 100 records")
    by_gap = table.dropna().sort_values("mean_gap")
    ends = {*by_gap.index[-20:], *by_gap.index[:20]}  # and none of those without a gap
    found = {60 * file + index for file, index in zip(data["records"]["file"], data["records"]["index"], strict=True)}
    assert found == ends and data["selection"].startswith(
        "The 20 records with the largest and the 20 with the smallest"
    )
    assert "likeliest to harm; 20 have none: not read, or only while u and w" in data["selection"]
    gaps = [data["records"]["gap"][k] for k in data["order"]]
    assert gaps == [*by_gap["mean_gap"][::-1][:20], *by_gap["mean_gap"][19::-1]]
    moved = dataclasses.replace(run, weights=[np.linspace(0.5, 1.5, 60)] * 2)
    data = report_data.page_data(moved, 40)
    assert data["histogram"] and data["selection"].startswith("The 20 records with the lowest")


@browsing
def test_a_page_of_equal_weights_begins_with_the_largest_mean_gap(started: webdriver.Chrome, tmp_path: Path):
    run = equal_run(tmp_path)
    started.get(report.write_report(run).as_uri())
    shown(started)
    table = pd.read_csv(run / "weights.csv")
    for order, rising in (("", False), ("gap", True)):
        if order:
            choose(started, "sort", order)
        first = table.sort_values("mean_gap", ascending=rising).iloc[0]
        assert places(started)[0] == f"{first['file']} #{first['index']}"
        meta = started.find_element(By.CSS_SELECTOR, ".record .meta").text
        assert f"mean gap {first['mean_gap']:.3g}".replace("-", "\u2212") in meta.replace("-", "\u2212"), meta
    orders = [option.get_attribute("value") for option in Select(started.find_element(By.ID, "sort")).options]
    assert orders[:2] == ["-gap", "gap"] and not {"weight", "-weight", "mixed"} & set(orders)
    assert not started.find_element(By.CSS_SELECTOR, "#filters fieldset").is_displayed() and console(started) == []


@browsing
def test_weights_that_hardly_differ_are_told_apart(started: webdriver.Chrome, tmp_path: Path):
    weights = 1 + np.linspace(-1e-4, 1e-4, 100)
    run = make_run(tmp_path, {"a.json": 100}, weights, noisy=False)
    assert report.main([str(run)]) == 0
    started.get((run / "report.html").as_uri())
    shown(started)
    ends = re.findall(r"weight ([\d.]+) to ([\d.]+)", started.find_element(By.ID, "charts").text)
    assert ends and all(float(low) < float(high) for low, high in ends)
    told = [node.text.split()[0] for node in started.find_elements(By.CSS_SELECTOR, ".meta strong")]
    assert len(set(told)) > 40
