#!/usr/bin/env python
"""Turn run folders into the CSV that wandb's web page would export, for plot_demo.py without a wandb account.

    python example/runs_to_csv.py outputs/run_a outputs/run_b --out F2SA.csv

Columns: `Step`, then for every run `RUN - weight/SOURCE` with its `__MIN` and `__MAX` (here the same values);
RUN is the folder's name. One row per step that any run logged; a cell is empty where its run logged nothing.
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
        raise ValueError(f"run {curve.run}: step {step:g} stands twice in metrics.csv")
    name = f"{curve.run} - weight/{curve.source}"
    return {name + end: curve.points for end in ("", "__MIN", "__MAX")}


def export(folders: list[Path], source: str | None, every_source: bool) -> pd.DataFrame:
    """The weights of all runs, joined on the step: index Step, columns as in a wandb export."""
    names = [folder.resolve().name for folder in folders]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two run folders are named {name}, and a run is named by its folder: rename one")
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
    """Read the folders, write one CSV; what the user got wrong is one line and exit code 2."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folders", nargs="+", type=Path, metavar="RUN_FOLDER", help="a folder with a metrics.csv in it")
    parser.add_argument("--out", type=Path, required=True, help="the CSV to write")
    parser.add_argument("--force", action="store_true", help="replace --out if it is there")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--source", help='the source to write [every source with "noisy" in its name]')
    which.add_argument("--all", action="store_true", help="write every source")
    args = parser.parse_args()
    try:
        if args.out.exists() and not args.force:
            raise ValueError(f"{args.out} is there already: choose another --out, or replace it with --force")
        export(args.folders, args.source, args.all).to_csv(args.out, quoting=csv.QUOTE_ALL)
    except (OSError, ValueError) as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        sys.exit(2)
    print(args.out)


if __name__ == "__main__":
    main()
