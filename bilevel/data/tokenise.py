"""Rows -> token ids and labels, for any tokenizer: chat template, BOS, EOS, truncation and label mask.

The tokens to the left of a learned token are those of generation: the prompt, tokenised as a whole, and the response so
far. Text of a record never becomes a special token; only the chat template's own text may. Chat templates are rendered
by bilevel.data.renderer (in bilevel.data.template).
"""

import dataclasses
import functools
import hashlib
import json
import re
from typing import Any

from transformers import PreTrainedTokenizerBase

from bilevel.data.bad_records import BadRecords
from bilevel.data.notes import packed
from bilevel.data.renderer import Renderer
from bilevel.data.sequence import Sequence, Turn, plain, whole_text
from bilevel.data.special import Guard, Segments
from bilevel.errors import DataError, short
from bilevel.settings.fields import Settings

IGNORE = -100


@dataclasses.dataclass
class Prompt:
    """The tokens before a record's last response, as in training; the token that ends the response; the response."""

    ids: list[int]
    stop: int
    response: str


def make_tokeniser(tokenizer: PreTrainedTokenizerBase, settings: Settings) -> "Tokeniser":
    """The tokeniser that the settings ask for. Raises DataError."""
    names = ("turns", "template_kwargs", "special_tokens_in_text")
    given = {name: getattr(settings, name) for name in names}
    return Tokeniser(tokenizer, settings.max_length, settings.loss_on, **given)


class Tokeniser:
    """Function from rows of bilevel.data.records to columns: index, is_noisy, input_ids, labels, notes, problem.

    labels equal input_ids where a loss is taken and IGNORE elsewhere. A record with no learned token within max_length
    is left out; one whose turns need contexts of their own becomes several samples. Text is cut into chunks of
    max_length; everything else is cut on the right, and then has no EOS. notes: messages for the user about a record,
    on its first sample (bilevel.data.notes). A record that the chat template refuses is one row with a problem.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        max_length: int,
        loss_on: str,
        turns: str = "all",
        template_kwargs: dict[str, Any] | None = None,
        special_tokens_in_text: bool = False,
    ):
        self.tokenizer, self.max_length, self.loss_on, self.turns = tokenizer, max_length, loss_on, turns
        self.template_kwargs, self.special_tokens_in_text = template_kwargs or {}, special_tokens_in_text
        if tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no EOS token, so a response could never end; add one to its folder")
        self.eos = tokenizer.eos_token_id
        # Add BOS if the tokenizer itself does so (Llama), not otherwise (GPT-2).
        bare = tokenizer("", add_special_tokens=True)["input_ids"]
        self.bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id in bare[:1] else []
        self.guard = Guard(tokenizer)
        self._templated = tokenizer.chat_template is not None

    @property
    def fingerprint(self) -> str:
        """Changes with anything that changes the tokens; part of the cache's key."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        state = backend.to_str() if backend else repr(sorted(self.tokenizer.get_vocab().items()))
        named = sorted(self.tokenizer.special_tokens_map.items())  # a chat template may write any of them
        ours = (self.max_length, self.loss_on, self.turns, sorted(self.template_kwargs.items()))
        parts = (state, self.tokenizer.chat_template, named, self.bos, self.eos, *ours, self.special_tokens_in_text)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        out: dict[str, list[Any]] = {"index": [], "is_noisy": [], "input_ids": [], "labels": [], "notes": []}
        out["problem"] = []

        def add(*row: Any) -> None:
            for column, value in zip(out.values(), row, strict=True):
                column.append(value)

        records = self._records(rows)
        turns = self.turns if self.loss_on == "response" else None
        for record, samples, is_noisy in zip(records, self._samples(records, turns), rows["is_noisy"], strict=True):
            if "refused" in record:
                add(record["index"], is_noisy, [], [], None, record["refused"])
                continue
            if len(samples) > 1:
                record["notes"].append(
                    "turns=all: turns whose context the chat template or the tokenizer changes later are samples of "
                    "their own"
                )
            notes = packed(record["notes"])
            for ids, labels in samples:
                # Text goes on in the next chunk, everything else ends at max_length.
                end = len(ids) if record["roles"][0] == "text" else 1
                for start in range(0, end, self.max_length):
                    chunk = slice(start, start + self.max_length)
                    part = labels[chunk]
                    predicted = part[1:]
                    if predicted.count(IGNORE) == len(predicted):
                        continue
                    add(record["index"], is_noisy, ids[chunk], part, notes, None)
                    notes = None
        return out

    def prompts(self, rows: dict[str, list[Any]]) -> list[Prompt]:
        """The prompts of rows (not of the text format), without truncation. Raises BadRecords."""
        records = self._records(rows)
        for record in records:
            record["more"].pop("context", None)  # the last turn is judged, learned or not
        found = self._sequences(records, "last")
        if refused := [record["refused"] for record in records if "refused" in record]:
            raise BadRecords(refused, len(refused))
        last = [sequences[-1] for sequences in found]
        segments = self._encoded([[sequence] for sequence in last], records)
        prompts = []
        for record, sequence in zip(records, last, strict=True):
            turn = sequence.turns[-1]
            bos = [] if self._by_template(record) else self.bos
            stop = self.eos if (own := _stop(segments, sequence, turn)) is None else own
            response = sequence.text[turn.prompt : turn.answer].replace(sequence.mark or "\0\0", "")
            prompts.append(Prompt(bos + segments.ids(sequence, 0, turn.prompt), stop, response))
        return prompts

    def ends(self, rows: dict[str, list[Any]]) -> list[int]:
        """The tokens that end the learned turns of rows, each once; records that the template refuses have none."""
        records = self._records(rows)
        sequences = self._sequences(records, self.turns if self.loss_on == "response" else None)
        segments = self._encoded(sequences, records)
        found: dict[int | None, None] = {}
        for sequence in (sequence for each in sequences for sequence in each):
            ends = [_stop(segments, sequence, turn) for turn in sequence.turns]
            ends[-1] = self.eos if ends[-1] is None else ends[-1]
            found |= dict.fromkeys(ends)
        return [token for token in found if token is not None]

    def _records(self, rows: dict[str, list[Any]]) -> list[dict[str, Any]]:
        """The rows one by one, with `more` as an object."""
        more = rows["more"] if "more" in rows else [None] * len(rows["index"])
        return [
            {
                "index": index,
                "roles": roles,
                "contents": contents,
                "more": json.loads(text) if text else {},
                "notes": [],
                "size": sum(map(len, contents)) + len(text or ""),
            }
            for index, roles, contents, text in zip(rows["index"], rows["roles"], rows["contents"], more, strict=True)
        ]

    @functools.cached_property
    def _renderer(self) -> Renderer:
        return _renderer(self.tokenizer, self.template_kwargs)

    def _by_template(self, record: dict[str, Any]) -> bool:
        return self._templated and record["roles"][0] not in ("text", "prompt")

    def _sequences(self, records: list[dict[str, Any]], turns: str | None) -> list[list[Sequence]]:
        """The sequences of every record; one that the chat template refuses has none, and gets the field `refused`.

        turns: Settings.turns, or None for the whole record as one.
        """
        found: list[list[Sequence]] = [[] for _ in records]
        asked, places = [], []
        for place, record in enumerate(records):
            if record["roles"][0] == "text":
                found[place] = [self._text(record)]
                continue
            marked, mark = self.guard({"contents": record["contents"], "more": record["more"]})
            if self._by_template(record):
                asked.append(record | marked | {"turns": turns})
                places.append((place, mark))
            else:
                found[place] = self._plain(record, marked["contents"], mark, turns)
        if asked:
            for (place, mark), answer in zip(places, self._renderer(asked), strict=True):
                if isinstance(answer, str):
                    records[place]["refused"] = answer
                    continue
                found[place] = [dataclasses.replace(sequence, mark=mark) for sequence in answer[0]]
                records[place]["notes"] += answer[1]
        return found

    def _text(self, record: dict[str, Any]) -> Sequence:
        [text] = record["contents"]
        if self.special_tokens_in_text:
            return whole_text(text)
        if found := self.guard.marks(text):
            record["notes"].append(
                f"the text holds marks of a chat template or special tokens ({found}), which are read as letters; "
                "special_tokens_in_text=true reads those that the tokenizer has as special tokens"
            )
        marked, mark = self.guard(text)
        return dataclasses.replace(whole_text(marked), mark=mark)

    def _plain(self, record: dict[str, Any], contents: list[str], mark: str, turns: str | None) -> list[Sequence]:
        """A record without a chat template: Alpaca's prompts, or a heading for each turn."""
        for name in ("tools", "template_kwargs"):
            if record["more"].get(name):
                record["notes"].append(f"{name}: not used, as the tokenizer has no chat template")
        sequence = plain(record["roles"], contents, self.tokenizer.eos_token, record["more"].get("context", []))
        if turns == "last":
            sequence.turns = sequence.turns[-1:]
        return [dataclasses.replace(sequence, mark=mark)] if sequence.turns else []

    def _encoded(self, sequences: list[list[Sequence]], records: list[dict[str, Any]]) -> Segments:
        try:
            return Segments(self.guard, [sequence for each in sequences for sequence in each])
        except BaseException as error:  # a panic of the tokenizers library is not an Exception
            if type(error).__name__ != "PanicException":
                raise
            places = f"records {records[0]['index']} to {records[-1]['index']}"
            raise DataError(f"{places}: the tokenizer cannot take the text of one: {short(str(error), 200)}") from None

    def _samples(self, records: list[dict[str, Any]], turns: str | None) -> list[list[tuple[list[int], list[int]]]]:
        """(input_ids, labels) of the samples of every record, before truncation."""
        sequences = self._sequences(records, turns)
        segments = self._encoded(sequences, records)
        found = []
        for record, each in zip(records, sequences, strict=True):
            bos = [] if self._by_template(record) else self.bos
            samples = [sample for sequence in each for sample in self._join(sequence, segments, bos, record["notes"])]
            found.append(samples)
        return found

    def _join(
        self, sequence: Sequence, segments: Segments, bos: list[int], notes: list[str]
    ) -> list[tuple[list[int], list[int]]]:
        """The samples of a sequence: one, and one for each turn whose tokens in it differ from those at generation."""
        last = sequence.turns[-1]
        prompt, apart = segments.ids(sequence, 0, last.prompt), []
        labels = [IGNORE] * len(prompt)
        for turn in sequence.turns[:-1]:
            before = segments.ids(sequence, 0, turn.prompt)
            response, learned = _response(segments, sequence, turn)
            end = len(before) + len(response)
            if prompt[:end] == before + response:
                labels[len(before) : end] = learned
            elif self.turns == "shared":
                notes.append("turns=shared: turns whose tokens differ within a longer text are context only")
            else:
                apart.append(self._ended(bos, before + response, [IGNORE] * len(before) + learned, turn))
        response, learned = _response(segments, sequence, last)
        behind = segments.ids(sequence, last.end, len(sequence.text))
        return [
            *apart,
            self._ended(bos, prompt + response + behind, labels + learned + [IGNORE] * len(behind), last),
        ]

    def _ended(self, bos: list[int], ids: list[int], labels: list[int], turn: Turn) -> tuple[list[int], list[int]]:
        """The sample with BOS, and with EOS if its last turn has no end token of its own."""
        if bos and ids[:1] != bos:
            ids, labels = bos + ids, [IGNORE] * len(bos) + labels
        if turn.end == turn.answer and turn.learned and ids[-1:] != [self.eos]:
            ids, labels = [*ids, self.eos], [*labels, self.eos]
        return ids, list(ids) if self.loss_on == "all" else labels


def _stop(segments: Segments, sequence: Sequence, turn: Turn) -> int | None:
    """The token that ends a turn, if the turn has one of its own."""
    return segments.ids(sequence, turn.answer, turn.end)[-1] if turn.end > turn.answer else None


def _response(segments: Segments, sequence: Sequence, turn: Turn) -> tuple[list[int], list[int]]:
    """The tokens and the labels of a turn's response."""
    ids: list[int] = []
    labels: list[int] = []
    for start, end, learned in turn.stretches():
        part = segments.ids(sequence, start, end)
        ids += part
        labels += part if learned else [IGNORE] * len(part)
    return ids, labels


def _renderer(tokenizer: PreTrainedTokenizerBase, template_kwargs: dict[str, Any]) -> Renderer:
    """The renderer of the tokenizer's chat templates; records with tools may have a template of their own."""
    templates = {"chat": tokenizer.get_chat_template(None, None), "tools": tokenizer.get_chat_template(None, [{}])}
    added = {token.content for token in tokenizer.added_tokens_decoder.values()} | set(tokenizer.all_special_tokens)
    control = "|".join(re.escape(token) for token in sorted(added, key=len, reverse=True) if not token.isspace())
    variables = {**tokenizer.special_tokens_map, **template_kwargs}
    return Renderer(templates, variables, re.compile(control or "(?!)"), tokenizer.name_or_path or "the tokenizer")
