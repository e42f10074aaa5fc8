#!/usr/bin/env python
"""Convert run folders to the CSV format of wandb's web page, to use plot_demo.py without a wandb account.

    python example/runs_to_csv.py outputs/run_a outputs/run_b --out F2SA.csv

Columns: `Step`, then for each run `RUN - weight/SOURCE` and the same with `__MIN` and `__MAX`, with equal values. RUN
is the name of the folder. There is a row for each step that any run logged; cells of steps that a run did not log are
empty.
"""

import argparse
import csv
import sys
from pathlib import Path

import pandas as pd
from plot_demo import Curve, choose, read_curves


def columns_of(curve: Curve) -> dict[str, pd.Series]:
    """The three columns of one curve in a wandb export."""
    if curve.points.index.has_duplicates:
        step = curve.points.index[curve.points.index.duplicated()][0]
        raise ValueError(f"run {curve.run}: step {step:g} appears twice in metrics.csv")
    name = f"{curve.run} - weight/{curve.source}"
    return {name + end: curve.points for end in ("", "__MIN", "__MAX")}


def export(folders: list[Path], source: str | None, every_source: bool) -> pd.DataFrame:
    """The weights of all runs, joined on the step. Index: Step; columns as in a wandb export. Raises ValueError."""
    names = [folder.resolve().name for folder in folders]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two run folders have the name {name}, which names the run: rename one of them")
    columns: dict[str, pd.Series] = {}
    for folder in folders:
        path = folder / "metrics.csv"
        _, curves = read_curves(path)
        for curve in curves if every_source else choose(path, curves, source):
            columns |= columns_of(curve)
    table = pd.concat(columns, axis=1, join="outer").sort_index()
    if (table.index == table.index.astype(int)).all():
        table.index = table.index.astype(int)
    return table.rename_axis("Step")


def main() -> None:
    """Read the folders and write one CSV file. Mistakes of the user give one line and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "folders", nargs="+", type=Path, metavar="RUN_FOLDER", help="folder that contains a metrics.csv"
    )
    parser.add_argument("--out", type=Path, required=True, help="CSV file to write")
    parser.add_argument("--force", action="store_true", help="overwrite --out if it exists")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--source", help='source to write [all sources with "noisy" in their names]')
    which.add_argument("--all", action="store_true", help="write all sources")
    args = parser.parse_args()
    try:
        if args.out.exists() and not args.force:
            raise ValueError(f"{args.out} exists: choose another --out, or overwrite it with --force")
        export(args.folders, args.source, args.all).to_csv(args.out, quoting=csv.QUOTE_ALL)
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        sys.exit(2)
    print(args.out)


if __name__ == "__main__":
    main()
