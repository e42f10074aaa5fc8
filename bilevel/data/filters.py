"""Which records that can be read are left out: by their turns and by their length in characters."""

from bilevel.settings.data_fields import FILTERS

SPEAKERS = (("user", "assistant"), ("prompt", "response"))


def left_out(turns: list[tuple[str, str]], filters: tuple[str, ...], max_characters: int | None) -> str | None:
    """Why a record with these (role, text) turns is left out; None if it is not."""
    roles = [role for role, _ in turns if role not in ("system", "developer")]
    if "alternating_turns" in filters and not _alternate(roles):
        return FILTERS["alternating_turns"]
    if "no_empty_turns" in filters and not all(text.strip() for _, text in turns):
        return FILTERS["no_empty_turns"]
    if max_characters is not None and sum(len(text) for _, text in turns) > max_characters:
        return f"longer than max_characters {max_characters:,}"
    return None


def _alternate(roles: list[str]) -> bool:
    """Whether question and answer alternate, from a question to an answer; text has no turns."""
    if roles == ["text"]:
        return True
    whole = len(roles) // 2
    return whole > 0 and any(roles == list(pair) * whole for pair in SPEAKERS)
