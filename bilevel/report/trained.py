"""The first records of each source as they were trained on, for the page: their text with what was learned marked."""

from typing import Any

from bilevel.data.records import rows_table
from bilevel.data.sources import Source
from bilevel.errors import UserError
from bilevel.run.finished import FinishedRun

RECORDS = 3  # of each source
LOOKED_AT = 20  # rows of each source, of which some may have nothing that is learned
SOURCES = 50  # that are shown
LONGEST = 4000  # characters of a record


def trained_on(run: FinishedRun) -> dict[str, Any]:
    """note: why nothing is shown, or None. sources: [name, [[head, [[text, learned], ...]], ...]] of each source."""
    if not (run.folder / "model" / "tokenizer_config.json").is_file():
        return {"note": f"Not shown: {run.folder / 'model'} holds no tokenizer.", "sources": []}
    from bilevel.data.tokenise import make_tokeniser  # imported here: it takes seconds
    from bilevel.model.pretrained import read_tokenizer

    try:
        tokeniser = make_tokeniser(read_tokenizer(str(run.folder / "model")), run.settings)
        found = [[source.stem, _records(source, tokeniser)] for source in run.sources[:SOURCES]]
    except UserError as error:
        return {"note": f"Not shown: {error}.", "sources": []}
    more = len(run.sources) - SOURCES
    return {"note": f"The first {SOURCES} sources; {more} more are not shown." if more > 0 else None, "sources": found}


def _records(source: Source, tokeniser: Any) -> list[list[Any]]:
    from bilevel.data.marked import stretches
    from bilevel.data.tokenise import IGNORE

    samples = tokeniser(rows_table(source).slice(0, LOOKED_AT).to_pydict())
    whole = [number for number, problem in enumerate(samples["problem"]) if problem is None][:RECORDS]
    found = []
    for number in whole:
        ids, labels = samples["input_ids"][number], samples["labels"][number]
        learned = sum(label != IGNORE for label in labels)
        head = f"record {samples['index'][number]}: {len(ids)} tokens, {learned} learned"
        found.append([head, _cut(stretches(tokeniser.tokenizer, ids, labels))])
    return found


def _cut(parts: list[tuple[str, bool]]) -> list[list[Any]]:
    """The parts of a text up to LONGEST characters, and how many more there are."""
    found, left = [], LONGEST
    for text, learned in parts:
        if left > 0:
            found.append([text[:left], learned])
        left -= len(text)
    return [*found, [f"\n({-left} more characters)", False]] if left < 0 else found
