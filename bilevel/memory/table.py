"""The memory plan as a table."""

from bilevel.memory.plan import GB, Plan


def render(plan: Plan) -> str:
    """The plan as a table; GB = 1e9 bytes."""
    place = f"{plan.processes} {'CPU process' if plan.cpu else 'GPU'}"
    place += ("es" if plan.cpu else "s") * (plan.processes > 1)
    lines = [f"memory plan (GB = 1e9 bytes) for {place}: {plan.title}", ""]
    lines.append("per process" if plan.cpu else "per GPU")
    lines += [_row(line, size) for line, size in plan.gpu.items()]
    largest = max(plan.or_else, key=plan.or_else.get)
    for line, size in plan.or_else.items():
        lines.append(_row(line, size, "" if line == largest else "not counted: never together with the larger one"))
    if plan.residual_place != "none":
        place = {"device": "", "host": "not counted: on the host", "off": "not counted: off"}[plan.residual_place]
        lines.append(_row("residual bits", plan.residual, place))
    lines.append(_row("sum", plan.total, verdict(plan)))
    if plan.residual_place != "none":
        lines.append(_row("without residual bits", plan.without_residual))
        lines.append(_row("with residual bits on the GPU", plan.with_residual))
    tables = {"per host, training": plan.host, "per host, loading": plan.at_load, "on disk": plan.disk}
    for title, table in tables.items():
        lines += ["", title, *(_row(line, size) for line, size in table.items()), _row("sum", sum(table.values()))]
    if plan.remedies:
        lines += ["", "each of these changes alone would help:", *(f"  {remedy}" for remedy in plan.remedies)]
    return "\n".join(lines)


def verdict(plan: Plan) -> str:
    if plan.limit is None:
        return "give gpu_memory_gib to compare with the memory of a GPU"
    fits = "fits" if plan.fits else "does not fit"
    if plan.cpu:
        return f"{fits} the {plan.limit / GB:.1f} GB per process that are free here"
    return f"{fits} {plan.limit / 2**30:g} GiB = {plan.limit / GB:.1f} GB"


def _row(line: str, size: float, note: str = "") -> str:
    return f"  {line:<36}{size / GB:9.2f}" + (f"  {note}" if note else "")
