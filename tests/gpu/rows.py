"""What a part of the check has found: a row per figure, written at once, so that a crash loses none."""

from collections.abc import Callable
from typing import Any


class Rows:
    """Rows of what, found, wanted and ok (None: a figure without a limit)."""

    def __init__(self, write: Callable[[list[dict[str, Any]]], object]):
        self.rows, self.write = [], write

    def add(self, what: str, found: object, wanted: str = "", ok: bool | None = None) -> None:
        shown = f"{found:.4g}" if isinstance(found, float) else str(found)
        self.rows.append({"what": what, "found": shown, "wanted": wanted, "ok": ok})
        self.write(self.rows)

    def at_most(self, what: str, found: float, limit: float) -> None:
        self.add(what, float(found), f"at most {limit:g}", bool(found <= limit))

    def holds(self, what: str, found: bool) -> None:
        self.add(what, "yes" if found else "no", "yes", found)
