"""Settings as text: as YAML, and what differs between those of two runs."""

import dataclasses
from typing import Any

import yaml

from bilevel.errors import first, plain, short
from bilevel.settings.fields import FIELDS, Settings

# Settings that a resumed run may change, because they do not affect its results.
FREE = {"resume", "save_every", "keep_checkpoints", "skip_nonfinite", "rounding_guard", "output_dir", "run_name"}
FREE |= {"tracker", "track_report", "gpu_memory_gib"}


def differing(then: dict[str, Any], now: dict[str, Any]) -> str:
    """Settings that differ and that a resumed run may not change, with both values; empty if there are none.

    `then` is read from a file, so its names and values can have any length.
    """
    names = [name for name in sorted(then.keys() | now.keys()) if name not in FREE and then.get(name) != now.get(name)]
    lines = [f"{plain(name)} was {_cut(then.get(name))} and is {_cut(now.get(name))}" for name in names]
    return ", ".join(first(lines, 6))


def _cut(value: Any) -> str:
    return repr(value) if len(repr(value)) <= 250 else short(value, 250)


class _Dumper(yaml.SafeDumper):
    """Writes repeated values in full, without YAML aliases, because read_yaml refuses them."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def dump(settings: Settings) -> str:
    """The resolved settings as YAML, complete enough to repeat the run."""
    return _yaml(dataclasses.asdict(settings))


def dump_changed(settings: Settings, others: bool) -> str:
    """For a person: what differs from the defaults; others: then all other settings, too."""
    different = changed(settings)
    lines = f"# differs from the defaults\n{_yaml(different)}"
    same = {name: value for name, value in dataclasses.asdict(settings).items() if name not in different}
    return f"{lines}\n# as by default\n{_yaml(same)}" if others else lines


def changed(settings: Settings) -> dict[str, Any]:
    """The settings that differ from the defaults."""
    which = {name: getattr(settings, name) for name in ("weights", "method", "lora_rank")}
    plain = Settings(train_data=["?"], **which)
    usual = {name: field.default for name, field in FIELDS.items()}
    usual |= {name: getattr(plain, name) for name in ("x_optimizer", "backend")}  # what null stands for
    return {name: value for name, value in dataclasses.asdict(settings).items() if value != usual[name]}


def _yaml(values: dict[str, Any]) -> str:
    return yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
