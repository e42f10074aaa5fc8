"""Arbitrary settings, files and folders: each is refused with one message, or read right, soon, without side effects.

    python -m tests.benchmarks.fuzz [--share 1.0] [--only ENTRY ...] [--seed 0]

Each entry makes inputs that are right, changes them at random (values, keys, bytes, kinds of file), and gives them to
the code that reads them, in this process. The table has for each entry the number of cases, how many were refused (exit
code 2), how many were right, how many ended in another exception or broke a rule, and the slowest case in seconds of
processor time. A case that takes 10 s of it, or 60 s of wall time, is ended. Rules: a message has at most 4,000
characters and is UTF-8; no file outside the temporary folder is opened for writing. Each kind of failure is printed
once, with its number and an example. The exit code is 1 if there is any.
"""

import argparse
import contextlib
import copy
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
HOME = tempfile.mkdtemp(prefix="bilevel-fuzz-")
os.environ["HF_DATASETS_CACHE"] = f"{HOME}/cache"

import yaml  # noqa: E402
from run_helpers import ROOT, make_data, settings, train, train_until  # noqa: E402

import train_bilevel  # noqa: E402
from bilevel.data.rows import read_place  # noqa: E402
from bilevel.data.sources import Reading  # noqa: E402
from bilevel.data.tokenise import make_tokeniser  # noqa: E402
from bilevel.errors import UserError  # noqa: E402
from bilevel.export import command as export  # noqa: E402
from bilevel.files import content_hash  # noqa: E402
from bilevel.model.loading import load_model, load_tokenizer, model_shape  # noqa: E402
from bilevel.report import command as report  # noqa: E402
from bilevel.run import checkpoint, checkpoint_file  # noqa: E402
from bilevel.run.start import start  # noqa: E402
from bilevel.settings.command_line import _yaml, load_settings  # noqa: E402
from bilevel.settings.fields import FIELDS, Settings  # noqa: E402
from bilevel.settings.rules import validate  # noqa: E402
from bilevel.settings.written import dump  # noqa: E402

TINY = {"model_type": "gpt2", "vocab_size": 300, "n_positions": 64, "n_embd": 8, "n_layer": 2, "n_head": 2}
RUN = {"model_config": TINY, "max_steps": 4, "save_every": 2, "max_length": 64, "global_batch_size": 4,
       "val_batch_size": 4}  # fmt: skip
NASTY: list[Any] = [
    *(None, True, False, 0, 1, -1, 2, 7, 1e308, -1e-308, 10**30, float("nan"), float("inf"), 0.5, 1e-5),
    *("", "a", "é\u2028", "null", "true", "1", "-1", "1e400", "010", "12:30", "0x1F", "\ud800", "a\0b", "a" * 5000),
    *("../../x", "/dev/zero", "/proc/self/mem", "~", "*", "[", "{", "{a: 1}", "[a, b]", "<|endoftext|>", "auto"),
    *([], {}, [[]], ["a"], {"a": None}, [None], {"model_type": "gpt2"}, {"model_type": "llama", "hidden_size": -1}),
]  # fmt: skip
DEFAULTS = {name: ["a"] if field.is_required() else field.default for name, field in FIELDS.items()}
WORDS = [
    "null",
    "&a ",
    "*a",
    "<<: ",
    "!!int ",
    "!!python/object/apply:os.system ",
    "? ",
    "- ",
    ": ",
    "\n",
    "2001-99-99",
]
WORDS += ["0x" + "f" * 3000, "1:" * 300 + "1", "[" * 300, "{a: " * 300, "{", "]", "'", "|\n", "%YAML 9.9\n---\n", "\t"]
BYTES = [b"[" * 2000, b'"', b"}", b"\0", b"\xff", b"\xef\xbb\xbf", b"\r\n", b"1e999", b",", b"\x00" * 200, b"NaN"]


class Slow(BaseException):
    """A case has taken too long."""


class Broken(Exception):
    """A rule is broken."""


# ----------------------------------------------------------------------------------------------------------------------
# changes


def change_bytes(content: bytes, draw: random.Random) -> bytes:
    for _ in range(draw.choice([1, 1, 2, 4])):
        at, size = draw.randint(0, len(content)), draw.choice([0, 1, 3, 50, len(content)])
        new = draw.choice([b"", bytes([draw.randrange(256)]), draw.choice(BYTES), content[at : at + size] * 2])
        content = content[:at] + new + content[at + size :]
    return content


def change_value(value: Any, draw: random.Random) -> Any:
    """Change, add or remove something somewhere in JSON values."""
    value = copy.deepcopy(value)
    places, inner = [], [value]
    while inner:
        here = inner.pop()
        keys = here.keys() if isinstance(here, dict) else range(len(here)) if isinstance(here, list) else ()
        places += [(here, key) for key in keys]
        inner += [here[key] for key in keys]
    if not places or draw.random() < 0.03:
        return draw.choice(NASTY)
    here, key = draw.choice(places)
    if draw.random() < 0.2:
        del here[key]
    elif draw.random() < 0.2 and isinstance(here, dict):
        here[draw.choice(["a", "", "\ud800", "is_noisy", "text"])] = draw.choice(NASTY)
    else:
        here[key] = copy.deepcopy(draw.choice(NASTY))
    return value


def change_file(path: Path, draw: random.Random) -> None:
    """Change what a file holds, or put something else in its place."""
    content, kind = path.read_bytes(), draw.random()
    path.unlink()
    if kind < 0.02:
        path.mkdir()
    elif kind < 0.04:
        os.mkfifo(path)
    elif kind < 0.08:
        path.symlink_to(draw.choice(["/dev/zero", "nowhere", "/proc/self/mem", path.name]))
    elif kind < 0.11:
        pass
    elif kind < 0.6 and path.suffix in (".json", ".yaml"):
        read, write = (json.loads, json.dumps) if path.suffix == ".json" else (yaml.safe_load, yaml.safe_dump)
        with contextlib.suppress(yaml.YAMLError):
            content = write(change_value(read(content), draw)).encode("utf-8", "surrogatepass")
        path.write_bytes(content)
    else:
        path.write_bytes(change_bytes(content, draw))


def mapping(draw: random.Random) -> dict[str, Any]:
    """Settings, most of them with a value that some setting could have."""
    names = draw.sample([*FIELDS], draw.choice([0, 1, 2, 3, 6]))
    values = {name: copy.deepcopy(draw.choice([*NASTY, DEFAULTS[name]])) for name in names}
    if draw.random() < 0.1:
        values[draw.choice(["lr", "", "\ud800", "train-data"])] = draw.choice(NASTY)
    return values


# ----------------------------------------------------------------------------------------------------------------------
# entries: each takes a folder and a generator, raises UserError or returns


def check_settings(found: Settings) -> None:
    again, problems = validate(_yaml(dump(found)))
    if problems or again != found:
        raise Broken("dump is read as other settings")


def main_of(call: Callable[[list[str]], Any], argv: list[str]) -> None:
    """A command that answers with an exit code; UserError for 2."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            code = call(argv)
    except SystemExit as stop:
        code = stop.code
    if code == 2:
        raise UserError(said.getvalue() or "no message")
    if code not in (0, None) and not isinstance(code, tuple):
        raise Broken(f"exit code {code}: {said.getvalue()[-300:]}")


class World:
    """What is right, made once: data, a finished run, an unfinished one with checkpoints, and a model folder."""

    def __init__(self, home: Path):
        self.data, self.home = make_data(home / "data", size=24), home
        with contextlib.redirect_stdout(io.StringIO()):
            train(self.data, home / "finished", **RUN, weights="sample",
                  train_data=[str(self.data / "mixed" / "train_mixed.json")])  # fmt: skip
            self.line = settings(self.data, home / "unfinished", **RUN)
            train_until(3, self.line)
            found = start(self.line)
            self.run, self.checkpoints = train_bilevel.setup(*found)
        self.config = yaml.safe_load(Path(self.line[1]).read_text())
        self.model = home / "finished" / "model"

    def settings(self, place: Path, draw: random.Random) -> None:
        found, problems = validate(self.config | mapping(draw))
        if problems:
            raise UserError("\n".join(problems))
        check_settings(found)

    def yaml_files(self, place: Path, draw: random.Random) -> None:
        file = place / "any.yaml"
        keys = {draw.choice([3, None, 1.5]): 1} if draw.random() < 0.1 else {}
        text = yaml.safe_dump({**self.config, **mapping(draw), **keys}, sort_keys=False)
        content = text.encode("utf-8", "surrogatepass")
        if draw.random() < 0.3:
            content = "".join(draw.choices([*WORDS, *FIELDS], k=draw.randint(0, 14))).encode("utf-8", "surrogatepass")
        elif draw.random() < 0.7:
            at = draw.randint(0, len(content))
            content = content[:at] + draw.choice([*map(str.encode, WORDS), *BYTES]) + content[at:]
        file.write_bytes(content)
        check_settings(load_settings(["--config", str(file)])[0])

    def environments(self, place: Path, draw: random.Random) -> None:
        """Each variable is a flag --name=value of the launcher."""
        values = [draw.choice([str(v) for v in NASTY] + WORDS) for _ in range(draw.choice([1, 1, 2, 4]))]
        flags = [f"--{name}={value}" for name, value in zip(draw.choices([*FIELDS], k=4), values, strict=False)]
        check_settings(load_settings([*self.line, *flags])[0])

    def run_folders(self, place: Path, draw: random.Random) -> None:
        folder = place / "r"
        shutil.copytree(self.home / "finished", folder, ignore=shutil.ignore_patterns("model", "checkpoints"))
        if draw.random() < 0.3:
            (folder / "lock").write_bytes(b"bilevel: process 1 on node\n")
        files = sorted(path for path in folder.iterdir() if path.is_file())
        for path in draw.sample(files, draw.choice([1, 1, 2])):
            change_file(path, draw)
        calls = [
            (report.main, [str(folder), "--out", str(place / "page.html")]),
            (export.main, [str(folder), "--all", "--out", str(place / "all.jsonl")]),
            (start, [*self.line, "--dry_run", "--output_dir", str(folder)]),
            (start, [*self.line, "--dry_run", "--x_init", str(folder), "--output_dir", str(place / "new")]),
        ]
        refused = []
        for number, (call, argv) in enumerate(calls):
            try:
                main_of(call, argv)
            except UserError as error:
                check_message(error)
                refused += [error] if number < 2 else []  # a new start over a finished run is refused anyway
        if refused:
            raise refused[0]

    def hostfiles(self, place: Path, draw: random.Random) -> None:
        """The launcher's own awk program, against the same rule in Python."""
        program = re.search(r"slots=\$\(awk '\n(.*?)\n  ' <", (ROOT / "run_F2SA.sh").read_text(), re.DOTALL)[1]
        pieces = [
            "a slots=2",
            "b slots=16",
            "# c",
            "",
            " ",
            "slots=3",
            "a=b",
            "c slots=",
            "d slots=x",
            "e slots=0",
            "\t",
        ]
        pieces += [
            "f  slots=4 # g",
            "h slots=1 1",
            "\0",
            "é slots=1",
            "i slots=1e3",
            "j slots=-1",
            "k slots=010",
            "-l slots=1",
        ]
        text = draw.choice(["\n", "\n", "\r\n"]).join(draw.choices(pieces, [9, 9, *[1] * 17], k=draw.randint(0, 5)))
        (place / "hosts").write_bytes(text.encode())
        done = subprocess.run(["awk", program], input=text.encode(), capture_output=True)
        lines = [line.split("#")[0].split() for line in text.replace("\r", " \r").replace("\r", "\x01").split("\n")]
        lines = [words for words in lines if words]
        slots = [re.fullmatch(r"slots=([1-9][0-9]*)", words[1]) if len(words) == 2 else None for words in lines]
        if not slots or None in slots:
            if done.returncode != 1:
                raise Broken(f"accepted: {text!r}")
            raise UserError(done.stdout.decode())
        numbers = [int(found[1]) for found in slots]
        if done.returncode or done.stdout.split() != [str(n).encode() for n in (sum(numbers), max(numbers))]:
            raise Broken(f"{text!r} gave {done.stdout!r}")

    def data_headers(self, place: Path, draw: random.Random) -> None:
        records = json.loads((self.data / "train_clean.json").read_text())[:3]
        file = place / f"train_{draw.choice(['a', 'a', 'é', '=b', 'a b'])}.json"
        lines = "\n".join(json.dumps(record) for record in records)
        file.write_text(draw.choice([json.dumps(records), json.dumps(records, indent=1), lines]))
        if draw.random() < 0.5:
            file.write_text(json.dumps(change_value(records, draw)))
        else:
            content = file.read_bytes()
            file.write_bytes(change_bytes(content[:200], draw) + content[200:])
        flags = ["--train_data", str(file), str(self.data / "train_noisy.json")]
        main_of(start, [*self.line, "--dry_run", *flags, "--output_dir", str(place / "new")])
        for _ in read_place(str(file), Reading(), content_hash(file)):
            pass

    def model_folders(self, place: Path, draw: random.Random) -> None:
        folder = place / "model"
        shutil.copytree(self.model, folder)
        for path in draw.sample(sorted(folder.iterdir()), draw.choice([1, 1, 2])):
            change_file(path, draw)
        found, problems = validate(self.config | {"model_config": None, "model_name_or_path": str(folder)})
        if problems:
            raise UserError("\n".join(problems))
        shape = model_shape(found)
        tokenizer = load_tokenizer(found, [])
        make_tokeniser(tokenizer, found)
        load_model(found, shape, tokenizer)

    def checkpoint_folders(self, place: Path, draw: random.Random) -> None:
        name = self.checkpoints.all()[-1].name
        folder = place / name
        shutil.copytree(self.checkpoints.folder / name, folder)
        change_file(draw.choice(sorted(folder.iterdir())), draw)
        if draw.random() < 0.7 and all(path.is_file() for path in folder.iterdir()):  # sealed again
            with contextlib.suppress(Exception):
                facts = json.loads((folder / "manifest.json").read_text())
                del facts["sha256"]
                facts["files"] = {file: checkpoint_file.fingerprint(folder / file) for file in facts["files"]}
                facts["sha256"] = checkpoint_file._digest(facts)
                (folder / "manifest.json").write_text(json.dumps(facts))
        state = self.checkpoints.read(str(folder))
        checkpoint.restore(self.run, state, self.checkpoints)

    def subprocesses(self, place: Path, draw: random.Random) -> None:
        file = place / "any.yaml"
        file.write_text(Path(self.line[1]).read_text())
        change_file(file, draw)
        environment = {
            name: draw.choice([str(v) for v in NASTY]) for name in draw.sample([*FIELDS, "NPROC", "NGPU"], 2)
        }
        environment = {name: value for name, value in environment.items() if value.isprintable()} | {"DRY_RUN": "1"}
        train_line = [sys.executable, str(ROOT / "train_bilevel.py"), "--config", str(file), "--dry_run"]
        command = draw.choice([train_line, ["bash", str(ROOT / "run_F2SA.sh"), "--output_dir", str(place / "new")]])
        environment = os.environ | environment | {"CONFIG": str(file), "PYTHON": sys.executable}
        done = subprocess.run(command, cwd=place, env=environment, capture_output=True, stdin=subprocess.DEVNULL)
        said = done.stderr.decode()
        if done.returncode not in (0, 2) or "Traceback" in said:
            raise Broken(f"exit code {done.returncode}: {said[-400:]} {environment['CONFIG']}")
        if done.returncode == 2:
            raise UserError(said)


ENTRIES = {"settings": 90_000, "yaml_files": 30_000, "environments": 30_000, "run_folders": 2000, "hostfiles": 2000,
           "data_headers": 2000, "model_folders": 2000, "checkpoint_folders": 2000, "subprocesses": 200}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# the table


def check_message(error: UserError) -> None:
    text = str(error)
    if not text.strip() or len(text) > 4000 or "Traceback" in text or not text.encode():
        raise Broken(f"a message of {len(text)} characters: {text[:100]}")


class Outside:
    """Files outside a folder that have been opened for writing."""

    def __init__(self, home: str):
        self.home, self.seen = home, []
        sys.addaudithook(self.hear)

    def hear(self, event: str, arguments: tuple) -> None:
        if event == "open" and isinstance(arguments[0], str) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            path = os.path.abspath(arguments[0])
            if not path.startswith((self.home, "/dev/null")):
                self.seen.append(path)


@contextlib.contextmanager
def limited(processor: float, wall: float) -> Iterator[None]:
    """Raise Slow in the block after so many seconds."""

    def stop(*_: Any) -> None:
        raise Slow

    for number, timer, seconds in (
        (signal.SIGPROF, signal.ITIMER_PROF, processor),
        (signal.SIGALRM, signal.ITIMER_REAL, wall),
    ):
        signal.signal(number, stop)
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for timer in (signal.ITIMER_PROF, signal.ITIMER_REAL):
            signal.setitimer(timer, 0)


def where(error: BaseException) -> str:
    """What a failure is called: its type and the last place in this project."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if "/bilevel/" in frame.filename]
    place = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "here"
    return f"{type(error).__name__} at {place}"


def attempt(call: Callable, place: Path, draw: random.Random, outside: Outside) -> tuple[str, str]:
    """The kind of the outcome, and of a failure also an example."""
    outside.seen.clear()
    try:
        with limited(10, 60):
            call(place, draw)
        kind, example = "right", ""
    except UserError as error:
        kind, example = "refused", ""
        try:
            check_message(error)
        except Exception as broken:
            kind, example = f"{where(error)}: Broken", str(broken)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        kind, example = where(error), str(error)[:600]
    if outside.seen:
        kind, example = "a write outside", str(outside.seen[:3])
    return kind, example


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=1.0, help="of the number of cases of each entry (default: 1)")
    parser.add_argument("--only", nargs="+", choices=ENTRIES, default=[*ENTRIES])
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    resource.setrlimit(resource.RLIMIT_AS, (40 << 30, 40 << 30))
    home = Path(HOME)
    world, outside, bad = World(home), Outside(HOME), 0
    print(f"{'entry':20}{'cases':>8}{'exit 2':>8}{'right':>8}{'failed':>8}{'slowest s':>11}", flush=True)
    for entry in options.only:
        counts, examples, slowest = Counter(), {}, (0.0, 0)
        cases = max(1, round(ENTRIES[entry] * options.share))
        for number in range(cases):
            draw = random.Random(f"{entry} {options.seed} {number}")
            place = home / "case"
            place.mkdir()
            begun = sum(os.times()[:4])
            kind, example = attempt(getattr(world, entry), place, draw, outside)
            slowest = max(slowest, (sum(os.times()[:4]) - begun, number))
            counts[kind] += 1
            examples.setdefault(kind, f"case {number}: {example}")
            shutil.rmtree(place)
        failed = cases - counts["refused"] - counts["right"]
        print(f"{entry:20}{cases:8}{counts['refused']:8}{counts['right']:8}{failed:8}", end="")
        print(f"{slowest[0]:11.2f} (case {slowest[1]})", flush=True)
        for kind, count in counts.most_common():
            if kind not in ("refused", "right"):
                print(f"    {count} x {kind}; {examples[kind]}", flush=True)
        bad += failed
    shutil.rmtree(home)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
