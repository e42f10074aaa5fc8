"""Settings that are given although the run does not use them: no mistake, but a person should know."""

from collections.abc import Container, Iterable, Mapping
from typing import Any

from bilevel.settings.fields import FIELDS, Settings
from bilevel.settings.methods import METHODS

WEIGHTS = ("x_optimizer", "alpha", "alpha_start", "order", "x_warmup_steps", "sampling", "sampling_floor")
RATE = ("lr_x", "x_lr_schedule")
LISA = ("lisa_interval", "lisa_shared_draw", "lisa_residual")

# Settings, whether they are unused, the setting that decides (None: a run file's values are not told), and how.
Reason = tuple[Iterable[str], bool, str | None, str]


def unused(settings: Settings, given: Container[str], in_file: Mapping[str, Any]) -> list[str]:
    """A line for each reason for which settings are not used; the settings of one line belong together.

    given: names on the command line. in_file: values of a run file. A value there is told only if it is not the
    default, and if the command line leaves the setting that decides: it may use the file for another purpose.
    """
    lines, told = [], set()
    for names, applies, decides, how in _reasons(settings):
        if not applies:
            continue
        left = set() if decides in {*given, None} else {name for name in names if _is_own(settings, name, in_file)}
        found = [name for name in names if name not in told and (name in given or name in left)]
        told |= set(names)
        if found:
            lines.append(f"{' and '.join(found)} {'is' if len(found) == 1 else 'are'} not used {how}")
    return lines


def _is_own(settings: Settings, name: str, in_file: Mapping[str, Any]) -> bool:
    """Whether the run file gives the setting a value of its own."""
    return name in in_file and getattr(settings, name) != FIELDS[name].default


def _reasons(s: Settings) -> list[Reason]:
    method = METHODS[s.method]
    scores = not method.trains
    return [
        ((*WEIGHTS, *RATE, "upper_every"), not s.learned, "method", f"by method={s.method}, which learns no weights "
         "while it trains"),
        (("order",), s.learned and "u" not in s.copies, "method", f"by method={s.method}, which has no copy u"),
        (RATE, not s.x_has_rate, "x_optimizer", f"by x_optimizer={s.x_optimizer}; adam, sgd and mirror have a rate"),
        (("upper_every",), s.upper_every != s.x_every, "x_optimizer", f"by x_optimizer={s.x_optimizer}, which moves x "
         "at every step"),
        (("epochs", "max_steps"), scores, "method", f"by method={s.method}, which scores records and trains no run"),
        (("epochs",), s.max_steps is not None, "max_steps", f"beside max_steps={s.max_steps}; for whole passes give "
         "max_steps=null"),
        (("score_epochs",), not scores, None, f"by method={s.method}, which computes no scores"),
        (("keep",), not scores or method.weighs or s.method in ("uniform", "oracle"), None,
         f"by method={s.method}, which keeps no share of the samples"),
        (("x_map", "sigmoid_start"), s.weights == "source", "weights", "with weights=source, which are a softmax of x"),
        (("sigmoid_start",), s.x_map == "softmax", "x_map", "with x_map=softmax"),
        (("sampling_floor",), s.sampling == "uniform", "sampling", "with sampling=uniform"),
        (LISA, s.lisa_layers is None, "lisa_layers", "without lisa_layers"),
        (("lora_alpha",), s.lora_rank is None, "lora_rank", "without lora_rank"),
    ]  # fmt: skip
