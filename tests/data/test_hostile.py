"""Hostile and broken data, through find_sources, read_rows and load_samples: the texts that come out, or the error."""

import ast
import gzip
import io
import json
import os
import unicodedata
import zipfile
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pyarrow
import pyarrow.parquet
import pytest
import torch
from run_helpers import TINY
from tokenizer_kinds import tokenizer_of

from bilevel.data.containers import kinds, stream
from bilevel.data.records import read_rows
from bilevel.data.samples import load_samples
from bilevel.data.sources import file_source, find_sources
from bilevel.data.special import ANCHOR, Guard
from bilevel.data.tokenise import Tokeniser
from bilevel.errors import UserError, plain, short
from bilevel.model.loading import load_tokenizer, model_shape
from bilevel.run.picture import draw_weights
from bilevel.settings.fields import Settings
from bilevel.weights.csv_file import write_weights
from bilevel.weights.learned import SourceWeights
from bilevel.weights.start import read_start

Write = Callable[..., Path]
ROOT = Path(__file__).parents[2]
SURROGATE = "\\ud800"
DEEP = 90_000
TYPED = "<|endoftext|></s>"  # the tokenizer's special token, as a user types it
MB10 = 10_000_000


def line(value: str, key: str = "text") -> str:
    """A record whose value is written as it stands, JSON or not."""
    return f'{{"{key}": {value}}}'


def array(*records: str) -> str:
    return f"[{', '.join(records)}]"


def alpaca(instruction: str, output: str = "ok", **more: object) -> list[dict]:
    return [{"instruction": instruction, "output": output, **more}]


def asked(instruction: str, output: str = "ok") -> list[str]:
    return [f"### Instruction:\n{instruction}\n\n### Response:\n", output]


def chat(content: object, role: str = "user") -> list[dict]:
    return [{"messages": [{"role": role, "content": content}, {"role": "assistant", "content": "ok"}]}]


def nested(depth: int) -> str:
    return "[" * depth + "]" * depth


def zipped() -> bytes:
    with zipfile.ZipFile(content := io.BytesIO(), "w") as archive:
        archive.writestr("x.json", "[]")
    return content.getvalue()


def parquet() -> bytes:
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a"]}), content := io.BytesIO())
    return content.getvalue()


def arrow(writer: Callable = pyarrow.ipc.new_file) -> bytes:
    table, content = pyarrow.table({"text": ["a"]}), io.BytesIO()
    with writer(content, table.schema) as out:
        out.write_table(table)
    return content.getvalue()


GOOD = '{"text": "a"}'
A, B = ["a"], ["b"]
NFC, NFD = unicodedata.normalize("NFC", "é"), unicodedata.normalize("NFD", "é")
PATH = "../../etc/passwd"
IMAGE = [{"type": "image", "path": "/etc/passwd"}]
# content of the file -> the contents of its records, or words of the error
TABLE: dict[str, tuple[object, list[list[str]] | str]] = {
    # characters
    "control-raw": (array(GOOD, line('"a\x01b"')), "record 1: not JSON (Invalid control character"),
    "control-raw-lines": (GOOD + "\n" + line('"a\tb"'), "record 1: not JSON (Invalid control character"),
    "control-escaped": (line(r'"a\u0001\b\u007fb"'), [["a\x01\b\x7fb"]]),
    "nul-raw": (line('"a\0b"'), "record 0: not JSON"),
    "nul-escaped": (line(r'"a\u0000b"'), [["a\0b"]]),
    "only-nul": (b"\0" * 4096, "not UTF-8 text but utf-32"),
    "bom": ("\ufeff" + GOOD, [A]),
    "bom-twice": ("\ufeff\ufeff" + GOOD, "record 0: not JSON"),
    "utf-16": (array(GOOD).encode("utf-16"), "not UTF-8 text but utf-16, by its first bytes; save it as UTF-8"),
    "utf-16-le": (GOOD.encode("utf-16-le"), "not UTF-8 text but utf-16-le"),
    "utf-16-be": (GOOD.encode("utf-16-be"), "not UTF-8 text but utf-16-be"),
    "utf-32": (GOOD.encode("utf-32"), "not UTF-8 text but utf-32"),
    "latin-1": (GOOD.encode() + b"\n" + line('"\xe9"').encode("latin-1"), "record 1: not UTF-8 text"),
    "surrogate-value": (array(GOOD, line(f'"{SURROGATE}"')), "record 1: 'text' holds half of a surrogate pair"),
    "surrogate-key": (line("1", SURROGATE), r"record 0: format not recognised from its fields ['\ud800']"),
    "surrogate-key-later": (array(GOOD, line("1", SURROGATE)), r"no field 'text'; it has ['\ud800']"),
    "surrogate-unused": (array(f'{{"text": "a", "{SURROGATE}": "{SURROGATE}"}}'), [A]),
    "surrogate-role": (json.dumps(chat("a", "\ud800")), "message 0: 'role' holds half of a surrogate pair"),
    "surrogate-raw": (b'{"text": "\xed\xa0\x80"}', "record 0: not UTF-8 text"),
    "surrogate-pair": (line(r'"\ud83d\ude00"'), [["😀"]]),
    "normal-forms": ([{"text": NFC}, {"text": NFD}], [[NFC], [NFD]]),
    # size and depth
    "nested-field": (array(GOOD, line(nested(DEEP))), "record 1: cannot be read (maximum recursion depth"),
    "nested-lines": (GOOD + "\n" + line(nested(DEEP)), "record 1: cannot be read (maximum recursion depth"),
    "nested-array": (nested(DEEP), "record 0: cannot be read (maximum recursion depth"),
    "nested-unused": (array(f'{{"text": "a", "x": {nested(500)}}}'), [A]),
    "nested-value": (array(line(nested(500))), "record 0: 'text' must be text, got list [[[[...]]]]"),
    "nested-noise": (array(f'{{"text": "a", "is_noisy": {nested(500)}}}'), "is_noisy must be true or false, got [[["),
    "many-fields": ([{"text": "a"}, {f"k{i}": i for i in range(DEEP)}], "no field 'text'; it has ['k0', 'k1', 'k10'"),
    "many-fields-first": ([{f"k{i}": i for i in range(DEEP)}], "format not recognised from its fields ['k0'"),
    "many-values": (
        array(GOOD, f'{{"text": "a", "x": [{"0," * 10**5}0]}}'),
        "record 1: cannot be read (it holds more than",
    ),
    "many-values-lines": (GOOD + "\n" + line(f"[{'[],' * DEEP}0]"), "record 1: cannot be read (it holds more"),
    "many-commas": ([{"text": "a", "x": ",[{" * DEEP}, {"text": "a"}], [A, A]),
    "many-quotes": ([{"text": "a", "x": '",\\"' * DEEP}], [A]),
    "long-wrong-value": ([{"text": ["x" * MB10]}], "'text' must be text, got list ['xxxxxxxxxxxx"),
    "long-wrong-role": (chat("a", "x" * MB10), "message 0: unknown role 'xxxxxxxxxxxx"),
    "long-key": ([{"x" * MB10: "a"}], "format not recognised from its fields ['xxxxxx"),
    # values
    "nan": (array(GOOD, line("NaN")), "record 1: 'text' must be text, got float nan"),
    "infinity": (line("-Infinity"), "'text' must be text, got float -inf"),
    "numbers-unused": (f'{{"text": "a", "x": [NaN, 1e999, -Infinity, {"9" * 4000}]}}', [A]),
    "huge-integer": (line("9" * 5000), "record 0: cannot be read (Exceeds the limit (4300 digits)"),
    "integer": (line("9" * 4000), "'text' must be text, got int 9999"),
    "noise-number": ([{"text": "a", "is_noisy": 1}], "is_noisy must be true or false, got 1"),
    "noise-null": ([{"text": "a", "is_noisy": None}], [A]),
    "key-twice": ('{"text": "b", "text": "a"}', [A]),
    "path": (alpaca(PATH, PATH, file="/dev/zero"), [asked(PATH, PATH)]),
    "path-chat": (chat(PATH), [[PATH, "ok"]]),
    "image": (chat(IMAGE), "message 0: 'content' holds a part of type 'image'; only text"),
    # special tokens
    "special": (alpaca(TYPED, TYPED), [asked(TYPED, TYPED)]),
    "special-chat": (chat(TYPED), [[TYPED, "ok"]]),
    "special-text": ([{"text": TYPED}], [[TYPED]]),
    "marks": (chat(f"{ANCHOR}1\ue000{ANCHOR}"), [[f"{ANCHOR}1\ue000{ANCHOR}", "ok"]]),
    # line ends
    "ends-mixed": (f"{GOOD}\n{GOOD}\r\n\r\n \n{line(chr(34) + 'b' + chr(34))}\r{GOOD}", [A, A, B, A]),
    "ends-unicode": (line('"a\u2028\x85b"'), [["a\u2028\x85b"]]),
    "array-in-lines": (f"[{GOOD}]\n[{GOOD}]", "text after the array's end"),
    "array-open": (f"[{GOOD}", "record 1: not JSON (Expecting ',' or ']'"),
    # other formats
    "gzip-cut-short": (gzip.compress(GOOD.encode())[:-9], "the compressed file is damaged or cut short"),
    "zip": (zipped(), "this is a zip archive, not JSON text; unpack it first"),
    "parquet-cut-short": (parquet()[:-9], "the file is damaged or cut short, or is of another kind"),
    "arrow-cut-short": (arrow()[:-9], "the file is damaged or cut short, or is of another kind"),
    "arrow-stream-cut-short": (arrow(pyarrow.ipc.new_stream)[:-99], "the file is damaged or cut short"),
    "git-lfs": ("version https://git-lfs.github.com/spec/v1\n", "a Git LFS pointer, not JSON text; fetch the file"),
    "csv": ("text,is_noisy\na,0\n", "records 0 and 1: not JSON"),
    "empty": (b"", "holds no record"),
}


def error_of(call: Callable[[], object]) -> str:
    """The message of the documented error, which is short and can be printed."""
    with pytest.raises(UserError) as caught:
        call()
    text = str(caught.value)
    assert len(text) < 2000 and text.encode()
    return text


@pytest.mark.parametrize(("content", "outcome"), TABLE.values(), ids=TABLE)
def test_content(write: Write, tmp_path: Path, content: object, outcome: list[list[str]] | str) -> None:
    path = write("hostile.json", content)
    assert find_sources([f"{tmp_path}/*.json"]) == [file_source(path)]
    if isinstance(outcome, str):
        text = error_of(lambda: read_rows(file_source(path)))
        assert text.startswith(str(path)) and outcome in text, text
        return
    assert read_rows(file_source(path))["contents"][:] == outcome
    tokenizer = tokenizer_of("gpt2")
    samples = load_samples([file_source(path)], Tokeniser(tokenizer, 2000, "all"))
    for ids, texts in zip(samples.table["input_ids"], outcome, strict=True):
        text = tokenizer.decode(ids)
        assert all(part in text for part in texts)
        assert ids[-1] == tokenizer.eos_token_id and ids.count(ids[-1]) == 1  # where we end the sample, nowhere else


@pytest.mark.parametrize("depth", range(700, 1000, 12))
def test_nesting_near_what_the_parser_takes(write: Write, depth: int) -> None:
    """Where Python writes a value out it needs as much room as where it reads one."""
    text = error_of(lambda: read_rows(file_source(write("near.json", line(nested(depth))))))
    assert "'text' must be text, got list [[" in text or "cannot be read (maximum recursion" in text


def test_a_name_that_cannot_be_printed_is_escaped(tmp_path: Path) -> None:
    assert r"\udcff.json: No such file" in error_of(lambda: read_rows(file_source(tmp_path / "\udcff.json")))


@pytest.mark.parametrize("value", [["x" * 99] * 99, {"x" * 99: "x" * 99}, "x" * 999, b"x" * 999, 10**4000, [[[[[1]]]]]])
def test_a_value_in_a_message_is_short(value: object) -> None:
    assert len(short(value)) <= 60 and len(plain(str(value))) <= 60


@pytest.mark.parametrize("name", ["x.txt", "x", "x.jsonl", ".json", "a b, 'c' \"d\".json", "日本　$x$_{.json"])
@pytest.mark.parametrize("content", [GOOD, array(GOOD)])
def test_any_name_will_do(write: Write, name: str, content: str) -> None:
    [source] = find_sources([str(write(name, content))])
    assert read_rows(source)["contents"][:] == [A]


@pytest.mark.parametrize("name", [b"a\xffb.json", b"a\nb.json", b"a\rb.json", b"a\x1bb.json", b"\xff/a.json"])
def test_names_that_are_refused(write: Write, tmp_path: Path, name: bytes) -> None:
    write(os.fsdecode(name), GOOD)
    assert "a control character or bytes that are not UTF-8" in error_of(
        lambda: find_sources([f"{tmp_path}/**/*.json"])
    )


@pytest.mark.parametrize("kind", ["folder", "fifo", "dangling", "device", "long", "nul", "nul-folder", "surrogate"])
def test_what_is_no_file(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.json"
    {
        "folder": path.mkdir,
        "fifo": lambda: os.mkfifo(path),
        "dangling": lambda: path.symlink_to("gone"),
        "device": lambda: path.symlink_to("/dev/zero"),
    }.get(kind, lambda: None)()
    pattern = {"long": "x" * 9000, "nul": "x\0.json", "nul-folder": "\0/*", "surrogate": "\ud800/*"}.get(
        kind, str(tmp_path / "*.json")
    )
    assert "no file matches" in error_of(lambda: find_sources([pattern]))


def test_a_file_that_cannot_be_read(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "Is a directory" in error_of(lambda: read_rows(file_source(write("x/y.json", GOOD).parent)))
    monkeypatch.setattr(stream, "open_regular", lambda path: os.read(-1, 1))
    assert "unreadable.json: Bad file descriptor" in error_of(
        lambda: read_rows(file_source(write("unreadable.json", line('"x"'))))
    )


def test_links_in_circles_end(write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = [write("a.json", GOOD), write("sub/b.json", GOOD), write("sub/.hidden/c.json", GOOD)][:2]
    for place in ("one", "two", "sub/three"):  # glob.glob would take 3^40 paths
        (tmp_path / place).symlink_to(tmp_path)
    for pattern in (f"{tmp_path}/**/*.json", f"{tmp_path}/**/**/*.json", f"{tmp_path}/**"):
        assert find_sources([pattern]) == list(map(file_source, files))
    first = file_source(tmp_path / "one" / "a.json")
    assert find_sources([f"{tmp_path}/one/a.json", f"{tmp_path}/a.json"]) == [first]
    (tmp_path / "again.json").symlink_to(files[0])
    assert [file.stem for file in find_sources([f"{tmp_path}/**/*.json"])] == ["a", "again", "b"]
    monkeypatch.chdir(tmp_path)
    assert find_sources(["**/b.json"]) == [file_source("sub/b.json")]


def test_a_file_that_changes_while_it_is_read(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the digest and the parsing; the cache then holds nothing under the first digest."""
    path = write("growing.json", '{"text": "first"}\n')
    original = kinds.open_hashed

    def grow(*arguments: object) -> object:
        with path.open("a") as file:
            file.write(GOOD + "\n")
        return original(*arguments)

    monkeypatch.setattr(kinds, "open_hashed", grow)
    assert f"{path}: changed while it was read; start again" in error_of(lambda: read_rows(file_source(path)))
    monkeypatch.setattr(kinds, "open_hashed", original)
    assert read_rows(file_source(path))["contents"][:] == [["first"], ["a"]]
    assert read_rows(file_source(write("growing.json", '{"text": "first"}\n')))["contents"][:] == [["first"]]


@pytest.mark.parametrize("text", ["word " * 100_000, "x" * 500_000], ids=["words", "one-word"])
def test_a_large_record_is_truncated(write: Write, text: str) -> None:
    tokenizer = tokenizer_of("gpt2")
    samples = load_samples([file_source(write("large.json", alpaca("a", text)))], Tokeniser(tokenizer, 64, "response"))
    [ids] = samples.table["input_ids"][:]
    assert len(ids) == 64 and tokenizer.decode(ids).startswith(asked("a")[0] + text[:20])


def test_a_new_tokenizer_and_a_large_word(write: Write) -> None:
    settings = Settings(train_data=["a"], val_data=["b"], model_config=TINY)
    words = write("word.json", alpaca("a", "abcdefghij" * 50_000 + " " * 500_000))
    tokenizer = load_tokenizer(settings, [file_source(words)])
    assert tokenizer.decode(tokenizer("abcabc d")["input_ids"]) == "abcabc d"


def test_results_of_sources_with_any_name(write: Write, tmp_path: Path) -> None:
    names = ["001", "NA", "a, 'b' \"c\"", "cost $5_$ {"]
    sources = find_sources([str(write(f"in/{name}.json", alpaca(name))) for name in names])
    samples = load_samples(sources, Tokeniser(tokenizer_of("gpt2"), 64, "response"))
    x = SourceWeights(samples.source_ids, torch.tensor([0.1, 0.2, 0.3, 0.4]), 1.0, "adam")
    write_weights(tmp_path / "weights.csv", x, samples)
    assert torch.allclose(read_start(str(tmp_path / "weights.csv"), False, samples), x.p)
    columns = [f"{kind}/{name}" for kind in ("weight", "difference", "interval") for name in names]
    pd.DataFrame({"step": [0, 1]} | {name: [0.1, 0.2] for name in columns}).to_csv(tmp_path / "metrics.csv")
    draw_weights(tmp_path, x, samples)
    assert (tmp_path / "weights.png").stat().st_size > 0


def test_a_panic_of_the_tokenizer_names_the_file(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        """As pyo3 has it: no Exception."""

    def panic(self: Guard, texts: list[str]) -> list[list[int]]:
        raise PanicException("retry-limit-in-match over " + "x" * 1000)

    path = write("panic.json", [{"text": "a"}, {"text": "b"}])
    tokeniser = Tokeniser(tokenizer_of("gpt2"), 64, "all")
    monkeypatch.setattr(Guard, "encode", panic)
    text = error_of(lambda: load_samples([file_source(path)], tokeniser))
    assert text.startswith(f"{path}, records 0 to 1: the tokenizer cannot take the text") and "retry-limit" in text


# code beside a model


@pytest.mark.parametrize("model_type", ["gpt2", "unknown"])
def test_code_beside_a_model_never_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model_type: str) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked whether to run code"))
    (tmp_path / "code.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass C: pass\n")
    names = {"AutoConfig": "code.C", "AutoTokenizer": ["code.C", "code.C"], "AutoModelForCausalLM": "code.C"}
    tokenizer_of("gpt2").save_pretrained(tmp_path)
    shape = TINY | {"vocab_size": 1000}
    content = {"tokenizer_config.json": {"tokenizer_class": "GPT2Tokenizer"}, "config.json": shape}
    for name, values in content.items():
        file = tmp_path / name
        before = json.loads(file.read_text()) if file.exists() else {}
        file.write_text(json.dumps(before | values | {"model_type": model_type, "auto_map": names}))
    settings = Settings(train_data=["a"], val_data=["b"], model_name_or_path=str(tmp_path), max_length=8)
    if model_type == "unknown":
        assert "contains custom code" in error_of(lambda: model_shape(settings))
        assert "contains custom code" in error_of(lambda: load_tokenizer(settings, []))
    else:
        assert model_shape(settings).model_type == "gpt2"
        assert load_tokenizer(settings, [])("a")["input_ids"]
    assert not (tmp_path / "ran").exists()


def test_remote_code_is_off_everywhere() -> None:
    files = [path for path in ROOT.rglob("*.py") if not {".venv", "outputs"} & set(path.parts)]
    texts = {path: path.read_text(encoding="utf-8") for path in files}
    trees = {path: ast.parse(text) for path, text in texts.items() if "trust_remote_code" in text}
    given = {
        (path.name, ast.unparse(node.value))
        for path, tree in trees.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code"
    }
    assert given == {("pretrained.py", "False")}
