"""Compare methods over several seeds: compute weights, train on them, and evaluate the trained models.

    python -m bilevel.compare CONFIG --methods f2sa,uniform,loss,rho,influence,oracle --seeds 3 [--setting value ...]

For each seed and method, a first run finds the weights (scoring) and a second run with method=fixed trains on them
(training). Initial model, number of steps and validation data are the same for all methods. bilevel.evaluate then
evaluates the trained model on test_data. f2sa_kept takes the weights of the same seed's f2sa as scores and, like a
baseline, gives the best fraction `keep` of the records equal weights and the others 0. f2sa_w and f2sa_u are the copies
of one run of f2sa as they are, without a second run: w, which validation trains as well, and u.

Finished runs are not repeated: the same command continues an interrupted comparison and can add seeds or methods. The
output folder holds results.csv (a row per seed and method), compare.csv and compare.md (the means), and compare.png.
"""

import argparse
import contextlib
import dataclasses
import io
import json
import math
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from bilevel.compare.runs import COPIES, KEPT, Row, Runs, run_both, weights_table
from bilevel.compare.table import draw, for_screen, in_words, markdown, summed_up
from bilevel.errors import ConfigError, UserError
from bilevel.files import is_unfinished, whole_file
from bilevel.monitor.words import many
from bilevel.run.lock import hold
from bilevel.run.preflight import check_files
from bilevel.settings.command_line import load_settings, read_yaml
from bilevel.settings.fields import Settings
from bilevel.settings.methods import METHODS
from bilevel.settings.written import differing, dump

if TYPE_CHECKING:  # imported in the functions that use it, so that --help and mistakes are answered at once
    import pandas as pd

COMPARED = [*(name for name, method in METHODS.items() if not method.weights_stay), KEPT, *COPIES]
OURS = ("method", "x_init", "seed", "output_dir", "run_name", "save_model", "dry_run")


def main(argv: list[str]) -> int:
    """Run the command. Exit code: 0 done, 2 a mistake of the user, otherwise that of a run that was stopped."""
    try:
        options, shared = parse(argv)
        check(options, shared)
        return compare(options, shared)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The options, and the command line with the settings that all runs share. Raises UserError."""
    parser = argparse.ArgumentParser(
        prog="python -m bilevel.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("config", metavar="CONFIG", help="YAML file with settings; --setting VALUE overrides it")
    parser.add_argument(
        "--methods",
        default="f2sa,uniform,loss,rho,influence,oracle",
        help="comma-separated, from " + ",".join(COMPARED),
    )
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds: 0, 1, ... (default: 3)")
    parser.add_argument(
        "--max_new_tokens", type=int, default=64, help="maximum length of an answer, in tokens (default: 64)"
    )
    parser.add_argument(
        "--scoring_steps",
        type=int,
        help="steps of the scoring runs of f2sa and align (default: as many as in training); use fewer if such a long "
        "run would memorise the noise. The other methods use score_epochs",
    )
    parser.add_argument("--out", type=Path, help="folder for runs and results (default: outputs/compare-<config>)")
    options, rest = parser.parse_known_args(argv)
    options.methods = list(dict.fromkeys(options.methods.split(",")))
    options.out = options.out or Path("outputs") / f"compare-{Path(options.config).stem}"
    unknown = [name for name in options.methods if name not in COMPARED]
    problems = [f"--methods: unknown: {', '.join(unknown)}; known: {', '.join(COMPARED)}"] if unknown else []
    numbers = {name: getattr(options, name) for name in ("seeds", "max_new_tokens", "scoring_steps")}
    problems += [
        f"--{name} {number}: must be at least 1"
        for name, number in numbers.items()
        if number is not None and number < 1
    ]
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        problems.append("several processes were launched, but a comparison runs in one process")
    given = {word.split("=")[0].removeprefix("--") for word in rest if word.startswith("--")}
    problems += [f"--{name}: remove it; compare sets it for each run" for name in OURS if name in given]
    if problems:
        raise ConfigError(problems)
    return options, ["--config", options.config, "--tracker", "none", *rest]


def check(options: argparse.Namespace, shared: list[str]) -> None:
    """Raise UserError for anything that would stop a run later, or mix two comparisons in one folder."""
    settings = common_settings(shared)
    if not (settings.val_data and settings.test_data):
        raise UserError(
            "a comparison needs val_data (given to all methods) and test_data (to evaluate the trained models)"
        )
    for method in options.methods:
        scoring, _ = Row(options.out / "none", method, 0).command_lines(shared, options.scoring_steps)
        files = check_files(load_settings(scoring)[0])
    if KEPT in options.methods and settings.weights == "source":
        raise UserError(f"--methods {KEPT} selects single records, so it needs weights=sample")
    there = options.out / "compare.yaml"
    if there.exists():
        now = dataclasses.asdict(settings) | own_options(options)
        if found := differing(read_yaml(str(there)), now):
            raise UserError(f"{options.out} holds a comparison with other settings ({found}); give another --out")
    elif options.out.exists() and not all(name == "lock" or is_unfinished(name) for name in os.listdir(options.out)):
        raise UserError(f"{options.out} exists but holds no comparison; give another --out")
    if "oracle" in options.methods:
        from bilevel.data.noise import known_noise
        from bilevel.data.records import read_rows

        if not known_noise([read_rows(file).data.column("is_noisy") for file in files["train"]]):
            raise UserError("--methods oracle: no training record has is_noisy: true; remove oracle")


def common_settings(shared: list[str]) -> Settings:
    """The settings of all training runs, except those that compare sets itself."""
    return load_settings([*shared, "--method", "fixed", "--x_init", "size", "--save_model", "w", "--seed", "0"])[0]


def own_options(options: argparse.Namespace) -> dict[str, int | None]:
    """The options that determine the results in a folder."""
    return {"max_new_tokens": options.max_new_tokens, "scoring_steps": options.scoring_steps}


def compare(options: argparse.Namespace, shared: list[str]) -> int:
    """Make the missing runs, row by row, and write the summary. Returns the exit code."""
    import pandas as pd
    import yaml

    out = options.out
    out.mkdir(parents=True, exist_ok=True)
    lock = hold(out)
    if lock is None:
        raise UserError(f"another comparison is running in {out}; wait for it, or give another --out")
    with whole_file(out / "compare.yaml") as file:
        file.write_text(dump(common_settings(shared)) + yaml.safe_dump(own_options(options)), encoding="utf-8")
    path = out / "results.csv"
    rows = pd.read_csv(path).to_dict("records") if path.exists() else []
    done = {(row["method"], row["seed"]) for row in rows}
    wanted = [(method, seed) for seed in range(options.seeds) for method in options.methods]
    missing = [Row(out, *row) for row in wanted if row not in done]
    runs = Runs(missing)
    print(f"{many(len(runs.folders), 'run')} to come, for {len(missing)} of {len(wanted)} pairs of method and seed")
    for row in missing:
        if code := run_both(row, runs, *row.command_lines(shared, options.scoring_steps)):
            return code
        print(f"evaluating the model of {row.method}, seed {row.seed}", flush=True)
        rows.append({"method": row.method, "seed": row.seed} | measured(row, options.max_new_tokens))
        with whole_file(path) as file:
            pd.DataFrame(rows).to_csv(file, index=False)
        print(f"{row.method}, seed {row.seed}: {in_words(rows[-1])}", flush=True)
    table = summed_up(pd.DataFrame(rows).query("method in @options.methods and seed < @options.seeds"), options.methods)
    table.to_csv(out / "compare.csv")
    (out / "compare.md").write_text(markdown(table, options.seeds), encoding="utf-8")
    draw(pd.DataFrame(rows), table, out / "compare.png")
    lock.close()
    (out / "lock").unlink()
    print(f"\n{for_screen(table, options.seeds)}\n")
    print(f"all results, in {out}:\nresults.csv, compare.csv, compare.md, compare.png")
    return 0


def measured(row: Row, max_new_tokens: int) -> dict[str, float]:
    """Evaluate the trained model of the row and return all results (keys: RESULTS)."""
    import pandas as pd

    from bilevel.evaluate import command as evaluate

    file = row.folder / "evaluation.json"
    if not file.exists():
        with whole_file(file) as new, contextlib.redirect_stdout(io.StringIO()):
            new.unlink(missing_ok=True)  # left by a killed comparison; evaluate does not overwrite
            if evaluate.main([str(row.training), "--max_new_tokens", str(max_new_tokens), "--out", str(new)]):
                raise UserError(f"{row.folder}: evaluating its model failed")
    judged = json.loads(file.read_text(encoding="utf-8"))["overall"]
    result = {"test_loss": judged["loss"], "exact_match": judged.get("exact_match", math.nan)}
    result |= against_is_noisy(row)
    times = {name: pd.read_csv(getattr(row, name) / "timing.csv") for name in ("scoring", "training")}
    result |= {f"{name}_gflop": time["gflop"].iloc[-1] for name, time in times.items()}
    result |= {f"{name}_seconds": elapsed(time["seconds"]) for name, time in times.items()}
    return result | (dict.fromkeys(("training_gflop", "training_seconds"), 0.0) if row.one_run else {})


def against_is_noisy(row: Row) -> dict[str, float]:
    """roc_auc (how well clean records are ranked above noisy ones) and clean_share; NaN if noise is unknown.

    Records are ranked by the method's scores if it has any, because the weights of all kept records are equal, and else
    by their weights. With weights=source, roc_auc is that of the run's metrics.
    """
    import pandas as pd

    from bilevel.weights.statistics import roc_area

    last = pd.read_csv(row.scoring / "metrics.csv").iloc[-1]
    found = {"roc_auc": last.get("roc_auc", math.nan), "clean_share": math.nan}
    table = weights_table(row.scoring)
    if "is_noisy" not in table:
        return found
    noisy = table["is_noisy"].to_numpy(dtype=bool)
    weights = (weights_table(row.scoring, row.weights) if row.weights.is_file() else table)["weight"]
    if noisy.any() and not noisy.all():
        scores = table.get("score", table["weight"]).to_numpy()
        found["roc_auc"] = roc_area(scores.__getitem__, noisy)
    return found | {"clean_share": float(weights[~noisy].sum() / weights.sum())}


def elapsed(seconds: "pd.Series") -> float:
    """Total seconds of a run, whose clock restarts at 0 when it is resumed."""
    since = seconds.diff().fillna(seconds)
    return float(since.where(since >= 0, seconds).sum())
