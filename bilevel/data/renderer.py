"""Render chat templates in a separate process, because a template comes with a model and may never end.

The process has a memory limit; each record has limits of time and length. Real templates stay far below these limits.
bilevel.data.chat runs in the process and bilevel.data.template renders there.
"""

import json
import os
import re
import select
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path
from typing import Any

from bilevel.data.sequence import Sequence, Turn
from bilevel.errors import DataError, plain

SECONDS = 10.0  # of processor time, for one record
PATIENCE = 120.0  # seconds without an answer, however busy the machine is
MEMORY = 1 << 30  # bytes of address space that rendering may add
LONGEST = 1_000_000  # characters of a record's sequences, beside LARGER times those of the record
LARGER = 50
_MANY = 100  # records sent at a time
_SERVE = "import sys; sys.path.insert(0, {root!r}); import bilevel.data.renderer as renderer; renderer.serve()"


class Renderer:
    """Makes the sequences of records with a chat template. Its process starts at the first call and ends with it."""

    def __init__(self, templates: dict[str, str], variables: dict[str, Any], control: re.Pattern[str], name: str):
        self.setup = {"templates": templates, "variables": variables, "control": control.pattern}
        self.name = name
        self._process: subprocess.Popen[bytes] | None = None

    def __call__(self, records: list[dict[str, Any]]) -> list[tuple[list[Sequence], list[str]] | str]:
        """What bilevel.data.chat.sequences makes of each record {index, roles, contents, more, turns, size}.

        It is a text for a record that the template refuses, which says why. turns: None for the whole conversation;
        size: characters of the record. Raises DataError.
        """
        found = []
        try:
            for start in range(0, len(records), _MANY):
                part = records[start : start + _MANY]
                self._send(part)
                ends = [str(record["index"]) for record in (part[0], part[-1])]
                among = f"records {' to '.join(ends)}" if len(part) > 1 else f"record {ends[0]}"
                found += [self._answer(f"record {record['index']}", among) for record in part]
        except BaseException:
            self._close()  # nobody reads its remaining answers
            raise
        return found

    def _answer(self, where: str, among: str) -> tuple[list[Sequence], list[str]] | str:
        """The answer for one record, or why the template refuses it.

        among: names the records sent together, for errors of the process itself.
        """
        answer = self._receive(among)
        if "refused" in answer:
            return f"{where}: the tokenizer's chat template refuses it: {answer['refused']}"
        if "limit" in answer:
            raise self._without_end(where, answer["limit"])
        return [_sequence(*each) for each in answer["sequences"]], answer["notes"]

    def _close(self) -> None:
        if self._process is not None:
            self._end()
            self._process = None

    def _send(self, value: Any) -> None:
        if self._process is not None and self._owner != os.getpid():  # this is a fork of the process that uses it
            self._end.detach()
            self._process = None
        if self._process is None:
            root = str(Path(__file__).parents[2])
            self._process = subprocess.Popen(
                [sys.executable, "-c", _SERVE.format(root=root)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
            self._left, self._owner = b"", os.getpid()
            self._end = weakref.finalize(self, _stop, self._process)
            self._send(self.setup)
        try:
            self._process.stdin.write(json.dumps(value).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # the process has ended; _receive reports it

    def _receive(self, where: str) -> dict[str, Any]:
        """The next line that the process writes. Raises DataError if it does not come in time."""
        deadline, pipe = time.monotonic() + PATIENCE, self._process.stdout
        poll = select.poll()
        poll.register(pipe, select.POLLIN)
        parts = [self._left]
        while b"\n" not in parts[-1]:
            ready = poll.poll(max(0, deadline - time.monotonic()) * 1000)
            new = pipe.read1(1 << 20) if ready else b""
            if not new:
                slow = not ready or self._process.wait() == -signal.SIGPROF
                raise self._without_end(where, f"no end after {SECONDS:g} s" if slow else "its process broke down")
            parts.append(new)
        line, _, self._left = b"".join(parts).partition(b"\n")
        return json.loads(line)

    def _without_end(self, where: str, what: str) -> DataError:
        return DataError(
            f"{where}: the chat template of {self.name} goes beyond the limits of a template ({what}); "
            "look for what it repeats without end, or take another chat_template"
        )


def _sequence(text: str, turns: list[list[Any]]) -> Sequence:
    return Sequence(
        text, [Turn(prompt, [tuple(one) for one in learned], answer, end) for prompt, learned, answer, end in turns]
    )


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    process.stdin.close()
    process.stdout.close()


def serve() -> None:
    """Run in the process: read a line with the templates, then lines of records; write one line for each record."""
    import resource

    from bilevel.data.chat import sequences
    from bilevel.data.template import Template

    setup, templates = json.loads(sys.stdin.buffer.readline()), {}
    if sys.platform == "linux":
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, resource.getrlimit(resource.RLIMIT_AS)[1]))

    def answer(record: dict[str, Any]) -> dict[str, Any]:
        kind = "tools" if record["more"].get("tools") else "chat"
        if kind not in templates:
            templates[kind] = Template(setup["templates"][kind], setup["variables"], re.compile(setup["control"]))
        found, notes = sequences(templates[kind], record)
        length = sum(len(sequence.text) for sequence in found)
        if length > LONGEST + LARGER * len(record["roles"]) * record["size"]:
            return {"limit": f"it makes {length:,} characters of a record of {record['size']:,}"}
        return {"sequences": [[s.text, [list(vars(turn).values()) for turn in s.turns]] for s in found], "notes": notes}

    for line in sys.stdin.buffer:
        for record in json.loads(line):
            signal.setitimer(signal.ITIMER_PROF, SECONDS)  # the signal ends the process even outside Python code
            try:
                text = json.dumps(answer(record))
            except MemoryError:
                text = json.dumps({"limit": f"it asks for more than {MEMORY >> 20:,} MiB of memory"})
            except Exception as error:  # a template raises what it likes
                text = json.dumps({"refused": plain(str(error) or type(error).__name__, 300)})
            sys.stdout.buffer.write(text.encode() + b"\n")
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.flush()
