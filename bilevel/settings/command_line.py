"""Settings from the command line: first `--config FILE`, then every `--setting value`, which wins over the file.

Why not a library: jsonargparse, tyro and pydantic-settings report one mistake at a time, and none of them accepted the
pydantic dataclass of bilevel.settings.fields as it is. This module reports all mistakes at once, and importing it and
parsing takes 0.05 s.
"""

import argparse
import difflib
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import yaml

from bilevel.errors import ConfigError, UserError, first, plain, short
from bilevel.files import open_regular
from bilevel.settings.fields import DATA, FIELDS, LISTS, Settings, choices
from bilevel.settings.other_names import unknown_setting
from bilevel.settings.rules import validate
from bilevel.settings.unused import unused
from bilevel.settings.written import FREE

SWITCH = dict.fromkeys(("true", "1", "yes", "on"), True) | dict.fromkeys(("false", "0", "no", "off"), False)
EXAMPLES = """examples:
  python train_bilevel.py --config configs/tiny.yaml --dry_run
      check settings and data files, and print what the run will take; -v prints all settings and the memory plan
  python train_bilevel.py --config configs/tiny.yaml --run_name first
      a small model on the shipped data, on a CPU
  python train_bilevel.py --config configs/gpt2.yaml --train_data web.jsonl forum.jsonl --val_data trusted.jsonl
                          --test_data heldout.jsonl --x_optimizer auto --run_name mine
      a weight for each of your files
  python train_bilevel.py --config outputs/mine/config.yaml --method fixed --x_init outputs/mine --run_name mine_again
      train a model on the weights of a finished run"""
DryRun: TypeAlias = Literal["", "short", "full"]  # none; what a person needs; with all settings and the memory plan
RECORDS = (".jsonl", ".ndjson", ".csv", ".tsv", ".parquet", ".arrow", ".gz", ".zst", ".bz2", ".xz")  # ends of names
LONGEST = 200_000  # characters in a settings file; YAML parses slowly, and a data file passed by mistake is larger


def load_settings(argv: list[str], note: Callable[[str], None] = lambda words: None) -> tuple[Settings, DryRun]:
    """The settings in a command line, and which dry run it asks for. Raises ConfigError with all problems.

    note: called with what a person should know about how the settings were read.
    """
    options, unknown = _parser().parse_known_args(argv)
    flags = [word.split("=")[0] for word in unknown if word.startswith("--")]
    problems = first(flags, 10, lambda flag: unknown_setting(flag, "--"))
    if unknown and not problems:
        problems = first(unknown, 10, lambda word: f"{plain(word)}: not a setting; write settings as --name value")
    given = {key: _from_text(value) for key, value in vars(options).items() if key in FIELDS and value is not None}

    dry_run: DryRun = ("full" if options.verbose else "short") if _is_on(options.dry_run, problems) else ""
    in_file: dict[str, Any] = {}
    if options.config:
        try:
            in_file = read_yaml(options.config)
        except UserError as error:  # what else is missing stands in that file
            raise ConfigError([*problems, str(error)]) from None
    if given.get("model_name_or_path") and "model_config" not in given and in_file.get("model_config"):
        note(f"model_name_or_path={given['model_name_or_path']} replaces the model_config of {options.config}")
        del in_file["model_config"]
    left = [name for name in ("val_data", "test_data") if name not in given and in_file.get(name)]
    if left and "train_data" in given:
        files = "; ".join(f"{name} {_to_text(in_file[name])}" for name in left)
        note(f"not given beside train_data, so taken from {options.config}: {files}")
    values = _listed({**in_file, **given})
    values.setdefault("run_name", _default_run_name(options.config, given))
    settings, more = validate(values)
    if problems or more:
        raise ConfigError(problems + more)
    for words in unused(settings, given, in_file):
        note(words)
    return settings, dry_run


def _is_on(word: str, problems: list[str]) -> bool:
    """Whether --dry_run was given, with or without a word; another word becomes a problem."""
    if word.lower() not in SWITCH:
        problems.append(f"--dry_run {plain(word)}: expected true or false")
    return SWITCH.get(word.lower(), True)


def read_yaml(path: str) -> dict[str, Any]:
    """Read a YAML file that holds a mapping. Raises UserError."""
    name = f"--config {plain(path, 300)}"
    if path.endswith(RECORDS):
        raise UserError(
            f"{name}: its name is that of records, not of a run file; give records with --train_data, --val_data and "
            "--test_data, beside a run file"
        )
    try:
        with io.TextIOWrapper(open_regular(Path(path)), encoding="utf-8") as file:
            text = file.read(LONGEST + 1)
        if len(text) > LONGEST:
            raise UserError(f"{name}: it has more than {LONGEST} characters, so it is not a settings file")
        content = _yaml(text)
    except OSError as error:
        raise UserError(f"{name}: {error.strerror or error}. {_run_files(path)}") from None
    except ValueError as error:
        raise UserError(f"{name} is not YAML: {plain(' '.join(str(error).split()), 300)}") from None
    if not isinstance(content, dict):
        raise UserError(f"{name}: the file must contain lines of the form `setting: value`")
    return {key if isinstance(key, str) else short(key): value for key, value in content.items()}


def _run_files(path: str) -> str:
    """The run file beside this path that has nearly its name, or where examples are."""
    try:
        there = [file.name for file in Path(path).parent.glob("*.y*ml")]
    except (OSError, ValueError):
        there = []
    near = difflib.get_close_matches(Path(path).name, there, n=1, cutoff=0.6)
    return f"Did you mean {Path(path).with_name(near[0])}?" if near else "The folder configs/ has examples"


class _Loader(yaml.SafeLoader):
    """YAML loader that refuses content that is in a settings file only by mistake.

    It refuses aliases (a few lines could expand to more than fits in memory), endless numbers, keys given twice, and
    010 and 12:30, which YAML 1.1 reads as 8 and 750.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        if self.check_event(yaml.AliasEvent):
            problem = "a word that begins with * is a YAML alias, which is not supported; quote it or write it out"
            raise yaml.composer.ComposerError(None, None, problem, self.peek_event().start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode):
                if (key.tag, key.value) in seen:
                    problem = f"{plain(key.value)} is given twice; remove one"
                    raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
                seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.Node) -> int:
        value = super().construct_yaml_int(node)
        str(value)  # raises ValueError if it has too many decimal digits, possible for hexadecimal input
        self._check_notation(node, value)
        return value

    def construct_yaml_float(self, node: yaml.Node) -> float:
        value = super().construct_yaml_float(node)
        self._check_notation(node, value)
        return value

    def _check_notation(self, node: yaml.Node, value: float) -> None:
        if ":" in node.value or re.match(r"[-+]?0[0-9_]+$", node.value):
            problem = f"{plain(node.value)} is the number {short(value)} in YAML; write that, or quote it"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)


def _yaml(text: str) -> Any:
    """Parse YAML text. Raises ValueError."""
    try:
        return yaml.load(text, Loader=_Loader)
    except Exception as error:  # PyYAML leaks many error types: month 13, a tag without a value, deep nesting
        raise ValueError(f"{type(error).__name__}: {error}") from None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train_bilevel.py",
        description="Fine-tune a causal language model and learn data weights in the same run.",
        usage="train_bilevel.py --config FILE [--SETTING VALUE ...] [--dry_run [-v]]",
        epilog=EXAMPLES,
        allow_abbrev=False,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument(
        "--config", metavar="FILE", help="YAML file with settings; values on the command line override it"
    )
    parser.add_argument(
        "--dry_run",
        nargs="?",
        const="true",
        default="false",
        metavar="{true,false}",
        help="check the settings and data files, print what the run will take, and stop",
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="in a dry run: all settings and the memory plan")
    groups: dict[str, Any] = {}
    for name, field in FIELDS.items():
        title = field.json_schema_extra["group"]
        group = groups.setdefault(title, parser.add_argument_group(title))
        default = "required" if field.is_required() else f"default: {_to_text(field.default)}"
        group.add_argument(
            f"--{name}",
            nargs="+" if name in LISTS else None,
            metavar=_metavar(name),
            help=f"{field.description} [{default}]".replace("%", "%%"),
        )
    return parser


def _metavar(name: str) -> str:
    """What a value looks like: the choices, or FILE, N, NUMBER, {...} or TEXT; null is not named."""
    words, kinds = choices(name), FIELDS[name].annotation
    members = {kinds, *get_args(kinds)}
    if words:
        return "{" + ",".join(words) + "}"
    if name in LISTS:
        return "FILE" if name in DATA else "NAME"
    if bool in members:
        return "{true,false}"
    if members & {int, float}:
        return "N" if int in members else "NUMBER"
    return "TEXT" if str in members else "'{NAME: VALUE, ...}'"


def _from_text(value: Any) -> Any:
    """Value of a command-line word: null, a YAML {mapping} or [list], or else the word itself."""
    if isinstance(value, list):
        value = [_from_text(word) for word in value]
        return value[0] if len(value) == 1 else value
    if value == "null":
        return None
    if value.startswith(("{", "[")):
        try:
            return _yaml(value)
        except ValueError:
            return value
    return value


def _to_text(value: Any) -> str:
    return "null" if value is None else value if isinstance(value, str) else short(value, 1000)


def _words(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _listed(values: dict[str, Any]) -> dict[str, Any]:
    """The values, with a single word turned into a list of one where the setting is a list."""
    return {k: _entries(v) if k in LISTS and v is not None else v for k, v in values.items()}


def _entries(value: Any) -> Any:
    """A data setting with lists throughout: of a list, or of a mapping from names to lists."""
    return {name: _words(each) for name, each in value.items()} if isinstance(value, dict) else _words(value)


def _default_run_name(config: str | None, given: dict[str, Any]) -> str:
    """Run name from the config's stem and the settings changed on the command line, such as tiny-lr_y=1e-5."""
    parts = [Path(config).stem if config else "run"]
    for key, value in given.items():
        if key == "train_data":
            words = list(value) if isinstance(value, dict) else [Path(_to_text(w)).parent.name for w in _words(value)]
            parts.append("data=" + "+".join(dict.fromkeys(map(_to_text, words))))
        elif key not in FREE | {"val_data", "test_data"}:
            parts.append(f"{key}=" + "+".join(Path(_to_text(word)).name for word in _words(value)))
    name = re.sub(r"[^\w.=+-]+", "_", "-".join(parts))
    return name.encode()[:120].decode(errors="ignore")  # file systems limit the bytes of a name
