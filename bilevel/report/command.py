"""Write report.html of a finished run: a self-contained page on which to inspect weights and records.

    python -m bilevel.report RUN [--out FILE] [--records 10000]

The page consists of page.html, page.css, charts.js, records.js, and the run's data as JSON, of which texts are
compressed. It loads nothing else.
"""

import argparse
import base64
import gzip
import hashlib
import json
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bilevel.errors import UserError
from bilevel.files import whole_file
from bilevel.report.contents import page_data
from bilevel.run.finished import read_finished

log = logging.getLogger("bilevel")

HERE = Path(__file__).parent
EXAMPLES = """examples:
  python -m bilevel.report outputs/mine                                      write outputs/mine/report.html again
  python -m bilevel.report outputs/mine --records 100000 --out all.html      with more records, into another file"""
RECORDS = 10_000  # number of records shown
PACK = 1000  # records
_ESCAPED = {ord(mark): f"\\u{ord(mark):04x}" for mark in "<>&\u2028\u2029"}


def main(argv: list[str]) -> int:
    """Run the command. Exit code: 0 done, 2 a mistake of the user."""
    parser = argparse.ArgumentParser(
        prog="python -m bilevel.report",
        description=__doc__.split("\n")[0],
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", help="folder of a finished run")
    parser.add_argument("--out", type=Path, metavar="FILE", help="file to write [RUN/report.html]")
    parser.add_argument(
        "--records", type=int, default=RECORDS, metavar="N",
        help="number of records to show, half with the lowest and half with the highest weights [%(default)s]",
    )  # fmt: skip
    given = parser.parse_args(argv)
    try:
        if given.records < 2:
            raise UserError(f"--records {given.records}: give 2 or more")
        if given.out and os.path.lexists(given.out):
            raise UserError(f"--out {given.out}: the file exists and is not overwritten; give another name")
        if given.out and not given.out.parent.is_dir():
            raise UserError(f"--out {given.out}: the folder {given.out.parent} does not exist")
        path = write_report(Path(given.run), given.out, given.records)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(path)
    return 0


def write_report(folder: Path, out: Path | None = None, records: int = RECORDS) -> Path:
    """Write the page of a finished run. The default, report.html in its folder, is overwritten. Raises UserError."""
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
    """Write the page of a run that has just finished. If this fails, only warn, because the run is complete."""
    try:
        write_report(folder)
    except Exception as error:
        log.warning(f"report.html was not written: {error}. Try again with `python -m bilevel.report {folder}`")


def as_html(data: dict[str, Any]) -> bytes:
    """The page as HTML. Its security policy allows only the script and style with these hashes, and no network."""
    style, charts, records = (
        (HERE / name).read_text(encoding="utf-8") for name in ("page.css", "charts.js", "records.js")
    )
    script = charts + records
    hashes = [base64.b64encode(hashlib.sha256(part.encode()).digest()).decode() for part in (script, style)]
    policy = "default-src 'none'; img-src data:; script-src 'sha256-{}'; style-src 'sha256-{}'".format(*hashes)
    page = (HERE / "page.html").read_text(encoding="utf-8")
    for name, part in {"policy": policy, "style": style, "script": script}.items():
        page = page.replace("{{" + name + "}}", part)
    shown = {name: value for name, value in data.items() if name != "turns"} | {"pack": PACK}
    parts = {"data": _json(shown).translate(_ESCAPED).encode("utf-8", "backslashreplace")}
    parts["packs"] = b"\n".join(packs(data.get("turns", [])))
    found = page.encode()
    for name, part in parts.items():
        before, after = found.split(b"{{" + name.encode() + b"}}")
        found = before + part + after
    return found


def packs(turns: list[list[tuple[str, str, int]]]) -> Iterator[bytes]:
    """The turns of each PACK records as JSON, gzip and base64, which a browser loads sooner than the text itself."""
    for start in range(0, len(turns), PACK):
        text = _json(turns[start : start + PACK]).encode("utf-8", "backslashreplace")
        yield base64.b64encode(gzip.compress(text, mtime=0))


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
