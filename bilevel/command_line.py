"""Settings from a command line: `--config FILE` first, then `--setting value`."""

import argparse
import re
from pathlib import Path
from typing import Any

import yaml

from bilevel.config import FIELDS, FREE, LISTS, ConfigError, Settings, UserError, unknown_setting, validate


def load_settings(argv: list[str]) -> tuple[Settings, bool]:
    """Settings from a command line, and whether --dry_run was given. Raises ConfigError with every problem found."""
    options, unknown = _parser().parse_known_args(argv)
    problems = [unknown_setting(word.split("=")[0], "--") for word in unknown if word.startswith("--")]
    if unknown and not problems:
        problems = [f"{word}: not a setting; settings are typed as --name value" for word in unknown]
    given = {key: _from_text(value) for key, value in vars(options).items() if key in FIELDS and value is not None}

    in_file: dict[str, Any] = {}
    if options.config:
        try:
            in_file = read_yaml(options.config)
        except UserError as error:
            problems.append(str(error))
    values = _listed({**in_file, **given})
    values.setdefault("run_name", _default_run_name(options.config, given))
    settings, more = validate(values)
    if problems or more:
        raise ConfigError(problems + more)
    return settings, options.dry_run


def read_yaml(path: str) -> dict[str, Any]:
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror or error}. configs/ holds examples") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from None
    if not isinstance(content, dict):
        raise UserError(f"--config {path}: expected lines of `setting: value`")
    return {str(key): value for key, value in content.items()}


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="train_bilevel.py",
        description="Fine-tune a causal language model and learn, in the same run, how much its data should count.",
        allow_abbrev=False,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file of settings; the command line wins over it")
    parser.add_argument("--dry_run", action="store_true", help="check the configuration, print it and stop")
    groups: dict[str, Any] = {}
    for name, field in FIELDS.items():
        title = field.json_schema_extra["group"]
        group = groups.setdefault(title, parser.add_argument_group(title))
        default = "required" if field.is_required() else f"default: {_to_text(field.default)}"
        group.add_argument(
            f"--{name}",
            nargs="+" if name in LISTS else None,
            metavar="VALUE",
            help=f"{field.description} [{default}]".replace("%", "%%"),
        )
    return parser


def _from_text(value: Any) -> Any:
    """A command-line word: null, a {mapping} or a [list] in YAML, anything else as typed."""
    if isinstance(value, list):
        value = [_from_text(word) for word in value]
        return value[0] if len(value) == 1 else value
    if value == "null":
        return None
    if value.startswith(("{", "[")):
        try:
            return yaml.safe_load(value)
        except yaml.YAMLError:
            return value
    return value


def _to_text(value: Any) -> str:
    return "null" if value is None else str(value)


def _words(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _listed(values: dict[str, Any]) -> dict[str, Any]:
    """A single word stands for a list of one."""
    return {key: _words(value) if key in LISTS else value for key, value in values.items()}


def _default_run_name(config: str | None, given: dict[str, Any]) -> str:
    """The config's stem and what the command line changed, such as tiny-lr_y=1e-5: other settings, another folder."""
    parts = [Path(config).stem if config else "run"]
    for key, value in given.items():
        if key == "train_data":
            parts.append("data=" + "+".join(dict.fromkeys(Path(word).parent.name for word in _words(value))))
        elif key not in FREE | {"tracker", "val_data", "test_data"}:
            parts.append(f"{key}=" + "+".join(Path(_to_text(word)).name for word in _words(value)))
    return re.sub(r"[^\w.=+-]+", "_", "-".join(parts))[:120]
