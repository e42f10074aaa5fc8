"""Time of report.html: to make it with all records, and to load, sort and search it in Chromium.

    python -m tests.benchmarks.report [--records 10000] [--rounds 5] [--characters 1000]

Responses have `characters` on average, exponentially distributed (an Alpaca record has 360 in all). Each time in the
browser ends when the records have been painted; medians and the range of the rounds.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

import browser_helpers  # noqa: E402
import run_helpers  # noqa: E402

from bilevel.report import command as report  # noqa: E402

PAINTED = "requestAnimationFrame(() => setTimeout(() => done(performance.now() - start)))"
ACTIONS = {  # what the reader does -> the script that does it
    "load": "const start = 0; (function wait() { $('loading') ? setTimeout(wait, 2) : " + PAINTED + "; })()",
    "sort by weight": "sort('-weight')",
    "sort by length": "sort('response')",
    "search, few hits": "search('word17 word3')",
    "search, many hits": "search('word1')",
}
PREPARE = f"""
const done = arguments[arguments.length - 1];
async function sort(order) {{ const start = performance.now(); $("sort").value = order; await find(); {PAINTED}; }}
async function search(words) {{ const start = performance.now(); $("search").value = words; await find(); {PAINTED}; }}
"""


def make_run(folder: Path, records: int, characters: int) -> Path:
    """A finished per-sample run of this many records of words."""
    rng = np.random.default_rng(0)
    words = np.array([f"word{i}" for i in range(2000)])
    made = [
        {"instruction": " ".join(rng.choice(words, 12)), "output": " ".join(rng.choice(words, 1 + int(n)))}
        for n in rng.exponential(characters / 8, records)
    ]
    file = run_helpers.dump(folder / "train.json", made)
    table = pd.DataFrame({"file": file.name, "index": range(records), "weight": rng.gamma(1, 1, records)})
    return run_helpers.finished_run(
        folder / "run", [file], table.assign(weight=table["weight"] / table["weight"].mean())
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--characters", type=int, default=1000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = make_run(Path(folder), given.records, given.characters)
        start = time.perf_counter()
        page = report.write_report(run, records=given.records)
        seconds, size = time.perf_counter() - start, page.stat().st_size / 1e6
        print(f"{given.records:,} records: made in {seconds:.2f} s, {size:.1f} MB")
        if not browser_helpers.installed():
            print("no Chromium here: apt-get install chromium chromium-driver")
            return
        times: dict[str, list[float]] = {action: [] for action in ACTIONS}
        with browser_helpers.chromium() as browser:
            for _ in range(given.rounds):
                browser.get(page.as_uri())
                for action, script in ACTIONS.items():
                    times[action].append(browser.execute_async_script(PREPARE + script) / 1000)
                assert json.loads(browser.execute_script("return JSON.stringify(found.length)")) > 0
        print(
            "load of the machine (1, 5 and 15 minutes), cores:", *map("{:.1f}".format, os.getloadavg()), os.cpu_count()
        )
        for action, seconds in times.items():
            print(f"{action:18} {statistics.median(seconds):.3f} s ({min(seconds):.3f} to {max(seconds):.3f})")


if __name__ == "__main__":
    main()
