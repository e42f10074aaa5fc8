"""Rows -> token ids and labels, for any tokenizer: chat template, BOS, EOS, truncation and label mask.

A sample is a list of pieces, tokenised one by one so that a prompt's tokens are exactly those it has at
generation time and a response's tokens decode to exactly the response. Text of a record never becomes a
special token; only the chat template's own text may.
"""

import dataclasses
import hashlib
from typing import Any

from transformers import PreTrainedTokenizerBase

from bilevel.errors import DataError, short

IGNORE = -100
OPEN, CLOSE = "\ue0b1\ue0b2", "\ue0b2\ue0b1"  # private-use marks that stand for contents in a chat template


@dataclasses.dataclass
class Piece:
    """A stretch of text; markup is the template's own text, in which special tokens are special."""

    text: str
    supervised: bool
    markup: bool = False
    ids: list[int] = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Prompt:
    """What stands before a record's last response, as the tokens that training has; what ends it; the response."""

    ids: list[int]
    stop: int
    response: str


class Tokeniser:
    """Batched function for `datasets.map`: rows of bilevel.data.records -> index, is_noisy, input_ids, labels.

    labels equal input_ids where a loss is taken and IGNORE elsewhere. A record with no supervised token within
    max_length is left out. Text is cut into chunks of max_length; all else is cut on the right, and then has no EOS.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, loss_on: str):
        self.tokenizer, self.max_length, self.loss_on = tokenizer, max_length, loss_on
        if tokenizer.eos_token_id is None:
            raise DataError("the tokenizer has no EOS token, so a response could never end; add one to its folder")
        self.eos = tokenizer.eos_token_id
        # BOS where the tokenizer itself puts one (Llama), none where it does not (GPT-2).
        bare = tokenizer("", add_special_tokens=True)["input_ids"]
        self.bos = [tokenizer.bos_token_id] if tokenizer.bos_token_id in bare[:1] else []
        # Tokenizers of the SentencePiece kind put a space before what they take for a text's beginning. What continues
        # a sample is therefore tokenised behind a mark, which no token joins to its neighbours, and the mark cut off.
        first = tokenizer.convert_ids_to_tokens(self._encode(["a"], markup=False)[0])[0]
        self.anchor = OPEN[0] if first.startswith(("▁", "Ġ")) else ""
        self.special = set(tokenizer.all_special_ids) | {
            i for i, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        self._rendered: dict[tuple[str, ...], str] = {}

    @property
    def fingerprint(self) -> str:
        """Changes with anything that changes the tokens; part of the cache's key."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        state = backend.to_str() if backend else repr(sorted(self.tokenizer.get_vocab().items()))
        named = sorted(self.tokenizer.special_tokens_map.items())  # a chat template may write any of them
        parts = (state, self.tokenizer.chat_template, named, self.bos, self.eos, self.max_length, self.loss_on)
        return hashlib.sha256(repr(parts).encode()).hexdigest()

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        samples = self._encoded(rows)
        out: dict[str, list[Any]] = {"index": [], "is_noisy": [], "input_ids": [], "labels": []}
        for roles, pieces, index, is_noisy in zip(rows["roles"], samples, rows["index"], rows["is_noisy"], strict=True):
            ids, labels = self._join(pieces)
            # Text goes on in the next chunk, everything else ends at max_length.
            end = len(ids) if roles[0] == "text" else 1
            for start in range(0, end, self.max_length):
                chunk = slice(start, start + self.max_length)
                if all(label == IGNORE for label in labels[chunk][1:]):
                    continue
                out["index"].append(index)
                out["is_noisy"].append(is_noisy)
                out["input_ids"].append(ids[chunk])
                out["labels"].append(labels[chunk])
        return out

    def prompts(self, rows: dict[str, list[Any]]) -> list[Prompt]:
        """The prompts of rows that are no text, nothing cut away."""
        found = []
        for pieces in self._encoded(rows):
            last = max(number for number, piece in enumerate(pieces) if piece.supervised)
            ids = [] if pieces[0].markup else list(self.bos)
            for piece in pieces[:last]:
                ids += piece.ids
            behind = next((piece.ids for piece in pieces[last + 1 :] if piece.markup), [])
            stop = next((token for token in behind if token in self.special), self.eos)
            found.append(Prompt(ids, stop, pieces[last].text))
        return found

    def _encoded(self, rows: dict[str, list[Any]]) -> list[list[Piece]]:
        """The pieces of all rows, with their ids."""
        samples = [self._pieces(*row) for row in zip(rows["roles"], rows["contents"], rows["index"], strict=True)]
        try:
            self._encode_pieces(samples)
        except BaseException as error:  # a panic of the tokenizers library is no Exception
            if type(error).__name__ != "PanicException":
                raise
            places = f"records {rows['index'][0]} to {rows['index'][-1]}"
            raise DataError(f"{places}: the tokenizer cannot take the text of one: {short(str(error), 200)}") from None
        return samples

    def _pieces(self, roles: list[str], contents: list[str], index: int) -> list[Piece]:
        if roles[0] == "text":
            return [Piece(contents[0], True)]
        if roles[0] == "prompt":
            return [Piece(contents[0], False), Piece(contents[1], True)]
        if self.tokenizer.chat_template is None:
            return _plain_chat(roles, contents, self.tokenizer.eos_token)
        return self._templated_chat(roles, contents, index)

    def _templated_chat(self, roles: list[str], contents: list[str], index: int) -> list[Piece]:
        """The template's text around the messages, with each message's content as a piece of its own."""
        try:
            text = self._render(tuple(roles))
        except Exception as error:  # a template raises what it likes
            raise DataError(f"record {index}: the tokenizer's chat template refuses it: {error}") from None
        pieces = []
        while OPEN in text:
            markup, _, text = text.partition(OPEN)
            place, _, text = text.partition(CLOSE)
            # A space before a message belongs to its first token, as it does when the model generates.
            bare = markup.rstrip(" ")
            content = markup[len(bare) :] + contents[int(place)]
            pieces += [Piece(bare, False, markup=True), Piece(content, roles[int(place)] == "assistant")]
        return [*pieces, Piece(text, False, markup=True)]

    def _render(self, roles: tuple[str, ...]) -> str:
        """The template's text, with marks for contents: one for each sequence of roles."""
        if roles not in self._rendered:
            places = [{"role": role, "content": f"{OPEN}{i}{CLOSE}"} for i, role in enumerate(roles)]
            self._rendered[roles] = self.tokenizer.apply_chat_template(places, tokenize=False)
        return self._rendered[roles]

    def _encode_pieces(self, samples: list[list[Piece]]) -> None:
        """Fill in the ids of all pieces, in one batch of each kind."""
        groups: dict[tuple[str, bool], list[Piece]] = {}
        for pieces in samples:
            begun = False
            for piece in pieces:
                groups.setdefault((self.anchor if begun else "", piece.markup), []).append(piece)
                begun = begun or piece.text != ""
        for (anchor, markup), pieces in groups.items():
            skip = len(self._encode([anchor], markup)[0]) if anchor else 0
            texts = list(dict.fromkeys(piece.text for piece in pieces))  # a template's markup repeats
            encoded = self._encode([anchor + text for text in texts], markup)
            ids_of = {text: ids[skip:] for text, ids in zip(texts, encoded, strict=True)}
            for piece in pieces:
                piece.ids = ids_of[piece.text]

    def _encode(self, texts: list[str], markup: bool) -> list[list[int]]:
        return self.tokenizer(
            texts,
            add_special_tokens=False,
            split_special_tokens=not markup,
            return_attention_mask=False,
            verbose=False,
        )["input_ids"]

    def _join(self, pieces: list[Piece]) -> tuple[list[int], list[int]]:
        """input_ids and labels of a whole sample, before truncation."""
        ids = [] if pieces[0].markup else list(self.bos)
        wanted = [False] * len(ids)
        response_open = False
        for piece in pieces:
            mask = [piece.supervised] * len(piece.ids)
            if piece.supervised:
                response_open = True
            elif response_open and piece.markup:
                # The markup after a response ends it with its first special token: learn that, not what follows.
                end = next((i + 1 for i, token in enumerate(piece.ids) if token in self.special), 0)
                mask[:end] = [True] * end
                response_open = end == 0
            ids += piece.ids
            wanted += mask
        if response_open:
            ids.append(self.eos)
            wanted.append(True)
        if self.loss_on == "all":
            wanted = [True] * len(ids)
        return ids, [token if want else IGNORE for token, want in zip(ids, wanted, strict=True)]


def _plain_chat(roles: list[str], contents: list[str], eos: str) -> list[Piece]:
    """Chat without a template: a `### Role:` heading per message, EOS after each response."""
    pieces, prompt = [], ""
    for number, (role, content) in enumerate(zip(roles, contents, strict=True)):
        prompt += ("\n\n" if number else "") + f"### {role.capitalize()}:\n"
        if role == "assistant":
            pieces += [Piece(prompt, False), Piece(content, True), Piece(eos, False, markup=True)]
            prompt = ""
        else:
            prompt += content
    return [*pieces, Piece(prompt, False)]
