"""bilevel/evaluate/questions.py: MT-Bench's questions, answered turn by turn into the form that its judge reads."""

import json
from pathlib import Path

import pytest
import torch
from run_helpers import TINY, dump, train
from tokenizer_kinds import tokenizer_of
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from bilevel.data.tokenise import Tokeniser
from bilevel.errors import UserError
from bilevel.evaluate import command, questions
from bilevel.evaluate.asking import Asking
from bilevel.evaluate.generation import Generated
from bilevel.evaluate.questions import answer_questions, read_questions
from bilevel.model.torch_copy import TorchCopy

QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Write a line.", "Now end it with a full stop."]},
    {"question_id": 111, "category": "math", "turns": ["Add 2 and 2.", "And double that?"], "reference": ["4", "8"]},
    {"question_id": "own", "category": "songs", "turns": ["Name a song."]},
]


def lines(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def chat_model(kind: str) -> tuple[TorchCopy, Tokeniser]:
    """A model with large weights, so that what it writes goes on changing, and its tokeniser."""
    tokenizer = tokenizer_of(kind)
    torch.manual_seed(1)
    shape = {"vocab_size": len(tokenizer), "n_positions": 1024, "n_embd": 32, "n_layer": 2, "n_head": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", initializer_range=0.5, **shape)).eval()
    model.generation_config = GenerationConfig(eos_token_id=tokenizer.eos_token_id, pad_token_id=0)
    return TorchCopy(model), Tokeniser(tokenizer, 1024, "response")


@pytest.mark.parametrize("kind", ["chatml", "llama3"])
def test_later_turns_see_the_earlier_answers_as_transformers_renders_them(kind: str):
    copy, tokeniser = chat_model(kind)
    found = answer_questions(copy, tokeniser, QUESTIONS, Asking(max_new_tokens=8, batch_size=2))
    assert [[len(turns) for turns in samples] for samples in found] == [[2], [2], [1]]
    tokenizer, messages = tokeniser.tokenizer, []
    for question, (answers,) in zip(QUESTIONS, found, strict=True):
        messages = []
        for turn, answer in zip(question["turns"], answers, strict=True):
            messages.append({"role": "user", "content": turn})
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
            seen = torch.ones_like(ids)
            new = copy.model.generate(ids, attention_mask=seen, max_new_tokens=8, do_sample=False)[0, ids.shape[1] :]
            assert answer == tokenizer.decode(new, skip_special_tokens=True).strip()
            messages.append({"role": "assistant", "content": answer})
    assert len({answer for (answers,) in found for answer in answers}) == 5


def test_categories_have_the_temperatures_of_mt_bench_unless_one_is_given(monkeypatch: pytest.MonkeyPatch, capsys):
    copy, tokeniser = chat_model("chatml")
    told = []

    def generate(model, prompts, most, batch_size, done, temperature, seeds):
        told.append((temperature, len(prompts), len(set(seeds))))
        return [Generated(list(prompt.ids[:1]), ended=place > 0) for place, prompt in enumerate(prompts)]

    monkeypatch.setattr("bilevel.evaluate.generation.generate", generate)
    found = answer_questions(copy, tokeniser, QUESTIONS, Asking(samples=3), by_category=True)
    assert [[len(turns) for turns in samples] for samples in found] == [[2] * 3, [2] * 3, [1] * 3]
    assert told == [(0.7, 6, 6), (0.0, 3, 3), (0.7, 3, 3), (0.0, 3, 3)]  # first turns, then second ones
    said = capsys.readouterr().err
    assert "warning: 4 of 15 answers were cut off" in said
    assert "categories that MT-Bench does not have are answered at temperature 0.7: songs;" in said
    told.clear()
    answer_questions(copy, tokeniser, QUESTIONS, Asking(temperature=0.5))
    assert told == [(0.5, 3, 3), (0.5, 2, 2)]


@pytest.mark.usefixtures("no_old_log")
def test_the_command_writes_what_the_judge_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data = dump(tmp_path / "data.json", [{"instruction": "Say yes.", "input": "", "output": "yes"}])
    changes = {"train_data": [str(data)], "val_data": [], "test_data": [], "method": "fixed", "max_steps": 1}
    changes |= {"global_batch_size": 1, "save_every": 0, "max_length": 60}
    train(tmp_path, tmp_path / "run", **changes, model_config=TINY | {"n_positions": 256})
    asked, out = lines(tmp_path / "question.jsonl", QUESTIONS), tmp_path / "model_answer" / "mine.jsonl"
    words = [str(tmp_path / "run"), "--questions", str(asked), "--max_new_tokens", "4"]
    assert command.main([*words, "--answers_out", str(out)]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["question_id"] for row in rows] == [81, 111, "own"] and {row["model_id"] for row in rows} == {"mine"}
    assert len({row["answer_id"] for row in rows}) == 3 and all(row["tstamp"] > 1.7e9 for row in rows)
    for row, question in zip(rows, QUESTIONS, strict=True):
        ((choice),) = row["choices"]
        assert choice["index"] == 0 and len(choice["turns"]) == len(question["turns"])
    capsys.readouterr()
    for arguments, message in (
        ([*words, "--answers_out", str(out)], "the file exists and is not overwritten"),
        (words, "give --answers_out FILE, and no --data, --answer or --out"),
        ([*words, "--answers_out", "a", "--data", str(data)], "no --data, --answer or --out"),
        ([*words, "--answers_out", "a", "--samples", "2", "--temperature", "0"], "at temperature 0 all answers"),
    ):
        assert command.main(arguments) == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "it holds no question"),
        ("{}\n", "line 1: expected an object with question_id"),
        ('{"question_id": 1, "turns": ["a"]}\n\nno\n', "line 3: not JSON"),
        ('{"question_id": 1, "turns": "a"}\n', "line 1: turns must be a list of the user's texts, got 'a'"),
        ('{"question_id": 1, "turns": ["a", " "]}\n', "turns must be a list"),
        ('{"question_id": 1, "turns": ["a"]}\n' * 2, "question_id 1 stands there twice"),
        ('{"question_id": 1, "turns": ["a"], "category": ["b"]}\n', "line 1: category must be a text, got ['b']"),
        ("[" * 100_000, "line 1: not JSON"),
    ],
)
def test_a_file_that_is_none_is_refused_with_its_line(tmp_path: Path, content: str, message: str):
    (tmp_path / "q.jsonl").write_text(content)
    with pytest.raises(UserError) as error:
        read_questions(tmp_path / "q.jsonl")
    assert message in str(error.value) and "q.jsonl" in str(error.value)


def test_a_text_may_hold_separators_of_lines(tmp_path: Path):
    question = {"question_id": 1, "turns": ["a\u2028b\x0bc\x85d"]}
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(question, ensure_ascii=False) + "\r\n", encoding="utf-8", newline="")
    assert read_questions(path) == [question]


def test_a_file_that_is_not_there_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="--questions .*No such file"):
        read_questions(tmp_path / "no.jsonl")
    assert set(questions.TEMPERATURES.values()) == {0.0, 0.1, 0.7}
