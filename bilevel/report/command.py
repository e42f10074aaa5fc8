"""report.html of a finished run: one page, which loads nothing from anywhere, to judge the weights by eye.

    python -m bilevel.report RUN [--out FILE] [--records 10000]

The page is page.html, page.css and the two scripts, and the run as JSON in the middle of them.
"""

import argparse
import base64
import hashlib
import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

from bilevel.errors import UserError
from bilevel.files import whole_file
from bilevel.report.contents import page_data
from bilevel.run.finished import read_finished

log = logging.getLogger("bilevel")

HERE = Path(__file__).parent
RECORDS = 10_000  # shown in all
_ESCAPED = {ord(mark): f"\\u{ord(mark):04x}" for mark in "<>&\u2028\u2029"}


def main(argv: list[str]) -> int:
    """Exit code: 0 done, 2 the user's mistake."""
    parser = argparse.ArgumentParser(prog="python -m bilevel.report", description=__doc__.split("\n")[0])
    parser.add_argument("run", metavar="RUN", help="a finished run's folder")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page to write [RUN/report.html]")
    parser.add_argument(
        "--records", type=int, default=RECORDS, metavar="N",
        help="records to show: those of the lowest and of the highest weights, half of them each [%(default)s]",
    )  # fmt: skip
    given = parser.parse_args(argv)
    try:
        if given.records < 2:
            raise UserError(f"--records {given.records}: give 2 or more")
        if given.out and os.path.lexists(given.out):
            raise UserError(f"--out {given.out} is there already, and is not overwritten: give another name")
        if given.out and not given.out.parent.is_dir():
            raise UserError(f"--out {given.out}: there is no folder {given.out.parent}")
        path = write_report(Path(given.run), given.out, given.records)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(path)
    return 0


def write_report(folder: Path, out: Path | None = None, records: int = RECORDS) -> Path:
    """Write the page of a finished run, by default to report.html in its folder, anew each time. Raises UserError."""
    run = read_finished(folder)
    page = as_html(page_data(run, records))
    path = out or folder / "report.html"
    try:
        with whole_file(path, replace=out is None) as new:
            new.write_bytes(page)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from None
    return path


def report_on(folder: Path) -> None:
    """The page of a run that has just finished; whatever is wrong with it, the run is well."""
    try:
        write_report(folder)
    except Exception as error:
        log.warning(f"no report.html: {error}. `python -m bilevel.report {folder}` tries again")


def as_html(data: dict[str, Any]) -> bytes:
    """The page. The browser runs and applies only the parts that have the hashes named in it, and fetches nothing."""
    style, charts, records = (
        (HERE / name).read_text(encoding="utf-8") for name in ("page.css", "charts.js", "records.js")
    )
    script = charts + records
    hashes = [base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in (script, style)]
    policy = "default-src 'none'; img-src data:; script-src 'sha256-{}'; style-src 'sha256-{}'".format(*hashes)
    page = (HERE / "page.html").read_text(encoding="utf-8")
    for name, part in {"policy": policy, "style": style, "script": script}.items():
        page = page.replace("{{" + name + "}}", part)
    before, after = page.split("{{data}}")
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).translate(_ESCAPED)
    return "".join((before, text, after)).encode("utf-8", "backslashreplace")
