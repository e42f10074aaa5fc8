"""Compare mathematical expressions with math-verify, in a process with limits of time and memory.

A model may write an expression that nobody can evaluate, such as 9^{9^{9^9}}. The process then ends, the answer counts
as wrong, and a new process goes on with the next one. math-verify's own time limit is off: it works in a program's main
thread only, and does not stop a calculation outside Python code.
"""

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

from bilevel.errors import UserError

SECONDS = 5.0  # of processor time, for one pair
MEMORY = 2 << 30  # bytes of address space that comparisons may add
LONGEST = 2000  # characters of an expression
_BOX = r"\boxed{"
_SERVE = "import sys; sys.path.insert(0, {root!r}); import bilevel.evaluate.mathematics as m; m.serve()"
_THOUSANDS = re.compile(r"(?<=\d)(?:\\[,;:! ]|\{,\}|[ ~\u00a0\u2009\u202f])(?=\d{3}(?!\d))")  # spaces within a number
_TEXT = re.compile(r"\\(?:text|textbf|mathrm|mbox)\s*\{([^{}]*)\}")
_WORDS = re.compile(r"[^\W\d_]{3,}(?:[ -][^\W\d_]+)*")


def equal(pairs: list[tuple[str, str]]) -> list[bool]:
    """Whether the expressions of each pair, an answer and its reference, are the same.

    The reference is an expression; the answer is one in \\boxed{}, or a text whose last expression counts. Words are
    compared as text, because math-verify reads them as products of letters. Expressions that are longer than LONGEST
    characters, or that cannot be compared within the limits, are not equal. Raises UserError.
    """
    cleaned = [(_cleaned(answer), _cleaned(reference)) for answer, reference in pairs]
    found = [_by_text(*pair) for pair in cleaned]
    asked = [place for place, known in enumerate(found) if known is None]
    while asked:
        answers = _compared([cleaned[place] for place in asked])
        for place, answer in zip(asked, [*answers, False], strict=False):  # the process ended at the pair after these
            found[place] = answer
        asked = asked[len(answers) + 1 :]
    return [answer is True for answer in found]


def _cleaned(text: str) -> str:
    return _THOUSANDS.sub("", " ".join(text.split()))


def _by_text(answer: str, reference: str) -> bool | None:
    """Whether the two are equal, if their texts show it; None if math-verify is needed."""
    own = answer[len(_BOX) : -1] if answer.startswith(_BOX) else answer
    if own == reference:
        return True
    first, second = (_TEXT.sub(r"\1", text).strip(" .$").casefold() for text in (own, reference))
    if _WORDS.fullmatch(second):
        return first == second
    return False if not own or max(len(answer), len(reference)) > LONGEST else None


def _compared(pairs: list[tuple[str, str]]) -> list[bool]:
    """Whether the pairs are equal, up to the first one at which the process went beyond its limits."""
    command = [sys.executable, "-c", _SERVE.format(root=str(Path(__file__).parents[2]))]
    done = subprocess.run(command, input=json.dumps(pairs).encode(), capture_output=True)
    ready, *lines = done.stdout.splitlines() or [b""]
    if ready != b"ready":
        why = (done.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise UserError(
            f"answers in \\boxed{{}} cannot be compared, because math-verify does not start: {why}; install the "
            "packages of requirements.txt, or give --answer exact"
        )
    return [line == b"True" for line in lines]


def same(answer: str, reference: str) -> bool:
    """Whether math-verify finds the expressions equal. It has no limit of time here."""
    from math_verify import parse, verify

    own, known = (parse(text, parsing_timeout=None) for text in (answer, f"{_BOX}{reference}}}"))
    return verify(known, own, timeout_seconds=None)


def serve() -> None:
    """Run in the process: read the pairs as JSON, and write a line for each, True or False."""
    import logging
    import resource

    import math_verify  # noqa: F401  (before the limits, and before it says that it is ready)

    logging.disable(logging.CRITICAL)  # it warns at each call that its time limit is off
    if sys.platform == "linux":
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))
    print("ready", flush=True)
    for answer, reference in json.load(sys.stdin.buffer):
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # the signal ends the process even outside Python code
        print(same(answer, reference), flush=True)
