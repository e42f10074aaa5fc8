"""`python -m bilevel.evaluate`: prompts are training's, generation is greedy whatever the batch, scores are right."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from run_helpers import ROOT, TINY, dump, train
from tokenizer_kinds import CHATML, gpt2_tokenizer, tokenizer_of
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from bilevel.data.tokenise import IGNORE, Prompt, Tokeniser
from bilevel.evaluate import command as evaluate
from bilevel.evaluate.answers import correct, marked
from bilevel.evaluate.asking import Asking, majority
from bilevel.evaluate.generation import generate

pytestmark = pytest.mark.usefixtures("no_old_log")

TALK = [
    {"role": "user", "content": "Hello there!\nHow are you?"},
    {"role": "assistant", "content": "Fine."},
    {"role": "user", "content": "Add 12 and 30."},
    {"role": "assistant", "content": "Forty two."},
]
ROWS = {
    "roles": [["prompt", "response"], [message["role"] for message in TALK]],
    "contents": [["### Instruction:\nName it.\n\n### Response:\n", "Paris."], [m["content"] for m in TALK]],
    "index": [0, 1],
    "is_noisy": [None, None],
}


# ----------------------------------------------------------------------------------------------------------------------
# prompts


@pytest.mark.parametrize("kind", ["gpt2", "chatml", "llama", "llama2", "llama3"])
def test_a_prompt_is_what_training_has_before_the_last_response(kind: str):
    tokeniser = Tokeniser(tokenizer_of(kind), 10_000, "response")
    trained = tokeniser(ROWS)
    for prompt, ids, labels in zip(tokeniser.prompts(ROWS), trained["input_ids"], trained["labels"], strict=True):
        unseen = max(
            place for place, label in enumerate(labels[:-1]) if label == IGNORE and labels[place + 1] != IGNORE
        )
        assert prompt.ids == ids[: unseen + 1]
        last = next((n for n, label in enumerate(labels[unseen + 1 :], unseen + 1) if label == IGNORE), len(ids))
        assert ids[last - 1] == prompt.stop and prompt.stop not in ids[unseen + 1 : last - 1]
        assert tokeniser.tokenizer.decode(ids[unseen + 1 : last - 1]).strip() == prompt.response.strip()


def test_a_chats_answer_ends_where_its_template_ends_it():
    tokenizer = gpt2_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    alpaca, chat = Tokeniser(tokenizer, 10_000, "response").prompts(ROWS)
    assert alpaca.stop == tokenizer.eos_token_id and chat.stop == tokenizer.convert_tokens_to_ids("<|im_end|>")


@pytest.mark.parametrize("kind", ["chatml", "llama3"])
def test_a_chats_prompt_is_that_of_its_template(kind: str):
    tokenizer = tokenizer_of(kind)
    native = tokenizer.apply_chat_template(TALK[:-1], add_generation_prompt=True)["input_ids"]
    assert Tokeniser(tokenizer, 10_000, "response").prompts(ROWS)[1].ids == native


# ----------------------------------------------------------------------------------------------------------------------
# generation

LLAMA = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPES = {
    "gpt2": {"n_positions": 24, "n_embd": 32, "n_layer": 2, "n_head": 2},
    "llama": LLAMA | {"max_position_embeddings": 24, "num_key_value_heads": 2},
}


def make_model(family: str) -> torch.nn.Module:
    """With large weights, so that what it generates goes on changing."""
    torch.manual_seed(3)
    config = AutoConfig.for_model(family, vocab_size=60, initializer_range=0.5, use_cache=False, **SHAPES[family])
    return AutoModelForCausalLM.from_config(config)


def one_by_one(model: torch.nn.Module, ids: list[int], stops: list[int], most: int) -> list[int]:
    """Greedy generation without padding, cache or library."""
    new: list[int] = []
    while len(new) < most and len(ids) + len(new) < 24:
        token = int(model.eval()(torch.tensor([ids + new])).logits[0, -1].argmax())
        if token in stops:
            break
        new.append(token)
    return new


@pytest.mark.parametrize("family", SHAPES)
@pytest.mark.parametrize("batch_size", [1, 3, 32])
def test_batched_generation_is_that_of_one_prompt_after_the_other(family: str, batch_size: int):
    model, generator = make_model(family), torch.Generator().manual_seed(0)
    lengths = [1, 2, 3, 5, 8, 13, 20, 22, 23, 24, 30]
    texts = [torch.randint(60, (length,), generator=generator).tolist() for length in lengths]
    free = [one_by_one(model, ids, [], 6) for ids in texts]
    assert len({token for new in free for token in new}) > 5, "the test would see nothing"
    stops = [free[1][2], free[5][2]]
    model.generation_config = GenerationConfig(eos_token_id=stops, do_sample=True, max_length=2, num_beams=3)
    prompts, told = [Prompt(ids, 0, "") for ids in texts], []
    found = generate(model, prompts, 6, batch_size, told.append)
    assert [one.ids for one in found] == [one_by_one(model, ids, stops, 6) for ids in texts]
    assert any(0 < len(one.ids) < 6 for one in found) and found[-1].ids == [] and sum(told) == sum(map(bool, free))
    assert [one.ended for one in found] == [bool(new) and one.ids != new for one, new in zip(found, free, strict=True)]


def test_drawn_answers_depend_on_their_seeds_alone():
    """And have the probabilities of a softmax: the first token of 600 draws, at two temperatures."""
    model, prompts = make_model("gpt2"), [Prompt([1, 2, 3], 0, ""), Prompt([5] * 9, 0, "")]
    model.generation_config = GenerationConfig(eos_token_id=[59])
    state = torch.get_rng_state()
    first = generate(model, prompts * 8, 6, 16, temperature=1.0, seeds=list(range(16)))
    again = generate(model, prompts * 8, 6, 3, temperature=1.0, seeds=list(range(16)))
    assert first == again and len({tuple(one.ids) for one in first}) > 8
    assert torch.equal(torch.get_rng_state(), state)
    for temperature in (1.0, 3.0):
        drawn = generate(model, prompts[:1] * 600, 1, 600, temperature=temperature, seeds=list(range(600)))
        counts = torch.bincount(torch.tensor([(one.ids or [59])[0] for one in drawn]), minlength=60)
        with torch.no_grad():
            p = (model(torch.tensor([prompts[0].ids])).logits[0, -1] / temperature).softmax(0)
        assert ((counts - 600 * p).abs() < 4.5 * (600 * p * (1 - p)).sqrt() + 2).all()


# ----------------------------------------------------------------------------------------------------------------------
# the command

FACTS = [
    ("Name a colour.", "", "red"),
    ("Add.", "2 and 2", "So:\n#### 4"),
    ("Say yes.", "", "yes"),
    ("Spell no.", "", "n o"),
]
RECORDS = [
    {"instruction": question, "input": more, "output": answer, "task": "sum" if more else "word"}
    for question, more, answer in FACTS
]


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learned four records by heart."""
    folder = tmp_path_factory.mktemp("learned")
    data, same = dump(folder / "facts.json", RECORDS), dump(folder / "again" / "facts.json", RECORDS)
    given = {"train_data": [str(data)], "val_data": [], "test_data": [str(same)], "method": "fixed", "lr_y": 1e-2}
    given |= {"max_length": 60, "global_batch_size": 4, "max_steps": 60, "eval_every": 60, "save_every": 0}
    train(folder, folder / "run", **given, model_config=TINY | {"n_positions": 64})
    return folder


def run(*arguments: str | Path) -> int:
    return evaluate.main([str(argument) for argument in arguments])


def reference_loss(folder: Path, record: dict) -> tuple[float, int]:
    """Sum of losses and number of supervised tokens, by transformers alone."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    more = f"### Input:\n{record['input']}\n\n" if record["input"] else ""
    prompt = tokenizer(f"### Instruction:\n{record['instruction']}\n\n{more}### Response:\n")["input_ids"]
    response = tokenizer(record["output"])["input_ids"] + [tokenizer.eos_token_id]
    logits = model(torch.tensor([prompt + response])).logits[0, len(prompt) - 1 : -1].detach()
    return float(functional.cross_entropy(logits, torch.tensor(response), reduction="sum")), len(response)


def test_scores_of_a_run(learned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    wrong = [RECORDS[0] | {"output": "blue"}, RECORDS[1] | {"output": "It is\n#### 4.0"}, RECORDS[2], RECORDS[3]]
    known, other = dump(tmp_path / "known.json", RECORDS), dump(tmp_path / "other.json", wrong)
    assert run(learned / "run", "--data", known, other, "--max_new_tokens", 12, "--out", tmp_path / "o" / "r.json") == 0
    result = json.loads((tmp_path / "o" / "r.json").read_text())
    said = capsys.readouterr().out
    assert json.loads(said[: said.rindex("}") + 1]) == result and "exact_match" in said[said.rindex("}") :]
    by_file = {name: scores["exact_match"] for name, scores in result["by_file"].items()}
    assert by_file == {"known.json": 1, "other.json": 0.75}
    assert result["overall"]["exact_match"] == 7 / 8 and result["overall"]["records"] == 8
    assert result["by_task"]["sum"]["exact_match"] == 1 and result["by_task"]["word"]["exact_match"] == 5 / 6
    pairs = [reference_loss(learned / "run" / "model", record) for record in RECORDS + wrong]
    total, tokens = map(sum, zip(*pairs, strict=True))
    assert result["overall"]["tokens"] == tokens
    assert result["overall"]["loss"] == pytest.approx(total / tokens, rel=1e-5)
    assert result["overall"]["perplexity"] == pytest.approx(math.exp(total / tokens), rel=1e-5)
    total, tokens = map(sum, zip(pairs[1], pairs[5], strict=True))
    assert result["by_task"]["sum"]["loss"] == pytest.approx(total / tokens, rel=1e-5)


def test_a_runs_own_test_data_and_a_models_folder_say_the_same(learned: Path, capsys: pytest.CaptureFixture[str]):
    scores = []
    for arguments in (
        ["run", "--answer", "exact"],
        ["run/model", "--data", learned / "facts.json", "--answer", "exact", "--batch_size", "1"],
    ):
        assert run(learned / arguments[0], *arguments[1:]) == 0
        said = capsys.readouterr().out
        scores.append(json.loads(said[: said.rindex("}") + 1]))
    assert scores[0]["overall"] == pytest.approx(scores[1]["overall"], rel=1e-5)  # other micro-batches
    assert scores[0]["overall"]["exact_match"] == 1


def test_text_has_a_loss_and_no_answers(learned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    text = dump(tmp_path / "text.json", [{"text": "Name a colour. red"}])
    assert run(learned / "run", "--data", text) == 0
    assert '"loss"' in (said := capsys.readouterr().out) and "exact_match" not in said


def test_answers_are_written_beside_what_was_expected(
    learned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    out = tmp_path / "new" / "answers.jsonl"
    assert run(learned / "run", "--max_new_tokens", 12, "--answers_out", out) == 0
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["expected"] for line in lines] == [answer for *_, answer in FACTS]
    assert all(line["answer"] == line["expected"] and line["right"] and not line["cut_off"] for line in lines)
    assert lines[1] | {"prompt": None} == {
        "file": "facts.json", "index": 1, "task": "sum", "sample": 0, "prompt": None, "expected": "So:\n#### 4",
        "answer": "So:\n#### 4", "right": True, "cut_off": False,
    }  # fmt: skip
    assert "2 and 2" in lines[1]["prompt"] and "cut off" not in capsys.readouterr().err


def test_answers_that_are_cut_off_are_told_with_a_remedy(learned: Path, capsys: pytest.CaptureFixture[str]):
    assert run(learned / "run", "--max_new_tokens", 2) == 0
    said = capsys.readouterr()
    share = json.loads(said.out[: said.out.rindex("}") + 1])["overall"]["cut_off"]
    assert 0 < share < 1 and f"{round(4 * share)} of 4 answers ({share:.0%}) were cut off after 2 tokens" in said.err
    more = int(said.err.split("give --max_new_tokens ")[1].split()[0])
    assert run(learned / "run", "--max_new_tokens", more) == 0
    assert "cut off" not in capsys.readouterr().err


def test_several_answers_and_their_majority(learned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out, arguments = tmp_path / "a.jsonl", ["--samples", 3, "--temperature", 1.5, "--max_new_tokens", 12]
    assert run(learned / "run", *arguments, "--answers_out", out) == 0
    said = capsys.readouterr().out
    scores = json.loads(said[: said.rindex("}") + 1])["overall"]
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(line["index"], line["sample"]) for line in lines] == [(i, k) for i in range(4) for k in range(3)]
    right = [[line["right"] for line in lines[3 * i : 3 * i + 3]] for i in range(4)]
    assert scores["records"] == 4 and scores["exact_match"] == pytest.approx(sum(map(sum, right)) / 12)
    assert scores["any_right"] == sum(map(any, right)) / 4 and 0 <= scores["majority"] <= scores["any_right"]
    assert run(learned / "run", *arguments, "--batch_size", 1, "--answers_out", tmp_path / "b.jsonl") == 0
    assert (tmp_path / "b.jsonl").read_text() == out.read_text()


def test_the_majority_is_that_of_final_answers():
    """The ways differ; two of three end in 4. Of two answers given as often, the first counts."""
    answers = ["2 + 2 is 5", "so #### 4", "it is 4.0", "7", "8", "9"]
    right = [False, True, True, False, True, False]
    table = pd.DataFrame({"answer": answers, "expected": ["#### 4"] * 3 + ["#### 8"] * 3, "right": right})
    assert majority(table, Asking(samples=3)) == [True] * 3 + [False] * 3


def test_gsm8k_and_math_are_read_as_they_are(learned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    """GSM8K's lines, MATH's folders of a file for each problem, and the lines of MATH-500."""
    asked = {"question": "How many?", "answer": "He has <<2*3=6>>6 and 1,194 more.\n#### 1,200"}
    (tmp_path / "gsm8k.jsonl").write_text(json.dumps(asked) + "\n")
    problem = {
        "problem": "Find it.",
        "level": "Level 3",
        "type": "Algebra",
        "solution": r"It is $\boxed{\frac{3}{4}}$.",
    }
    for number in (1, 2):
        file = tmp_path / "MATH" / "algebra" / f"{number}.json"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(problem))
    line = problem | {"answer": r"\frac{3}{4}", "subject": "Algebra", "level": 3, "unique_id": "test/1.json"}
    (tmp_path / "math500.jsonl").write_text(json.dumps(line | {"type": None}) + "\n")
    data = [tmp_path / "gsm8k.jsonl", tmp_path / "MATH" / "algebra", tmp_path / "math500.jsonl"]
    out = tmp_path / "answers.jsonl"
    assert run(learned / "run", "--data", *data, "--max_new_tokens", 1, "--answers_out", out) == 0
    said = capsys.readouterr().out
    result = json.loads(said[: said.rindex("}") + 1])
    assert {name: scores["records"] for name, scores in result["by_file"].items()} == {
        "algebra": 2, "gsm8k.jsonl": 1, "math500.jsonl": 1}  # fmt: skip
    assert result["by_task"]["Algebra"]["records"] == 3
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    expected = [line["expected"] for line in lines]
    assert marked(expected[2]) == "1,200" and marked(expected[0]) == r"\frac{3}{4}"
    assert correct([r"\boxed{\frac{3}{4}}", "0 so 1200"], [expected[0], expected[2]], "auto") == [True, True]


def test_mistakes(learned: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "empty").mkdir()
    (tmp_path / "unfinished").mkdir()
    (tmp_path / "unfinished" / "config.yaml").write_text("train_data: [a]\n")
    there = dump(tmp_path / "there.json", RECORDS)
    for arguments, message in (
        ([tmp_path / "unfinished", "--data", there], "the run has not finished"),
        ([tmp_path / "empty", "--data", there], "neither a run folder nor a model"),
        ([learned / "run" / "model"], "no data to evaluate on"),
        ([learned / "run", "--data", tmp_path / "no.json"], "no file matches"),
        ([learned / "run", "--data", there, "--out", there], "the file exists and is not overwritten"),
        ([learned / "run", "--data", there, "--max_length", "100"], "the model has only 64 positions"),
        ([tmp_path / "nowhere", "--data", there], "nowhere"),
        ([learned / "run", "--answers_out", there], "the file exists and is not overwritten"),
        ([learned / "run", "--answers_out", tmp_path / "a", "--answer", "none"], "no answers are generated"),
        ([learned / "run", "--answers_out", tmp_path / "a", "--out", tmp_path / "a"], "name the same file"),
        ([learned / "run", "--samples", "3"], "add --temperature 0.7"),
    ):
        assert run(*arguments) == 2
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_help_is_there_before_torch():
    code = "import sys; from bilevel.evaluate import command; command._parser(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
