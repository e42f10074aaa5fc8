"""Questions of several turns, answered into the form that MT-Bench's judge reads.

MT-Bench is by Zheng et al., "Judging LLM-as-a-Judge with MT-Bench and Chatbot Arena" (2023). Its file question.jsonl
has a line {question_id, category, turns} for each question; its judge reads model_answer/NAME.jsonl with lines
{question_id, answer_id, model_id, choices: [{index, turns}], tstamp}. The later turns see the earlier answers.
"""

import hashlib
import json
import sys
import time
from pathlib import Path
from typing import Any

from bilevel.errors import UserError, first, short
from bilevel.evaluate.asking import Asking
from bilevel.files import whole_file

# The temperatures at which MT-Bench has its categories answered.
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
TEMPERATURES |= dict.fromkeys(("extraction", "math", "coding", "reasoning"), 0.0)
OTHERS = 0.7  # of categories that it does not know

Answers = list[list[list[str]]]  # by question, by sample: the answers of its turns


def read_questions(path: Path) -> list[dict[str, Any]]:
    """The questions of a file. Raises UserError with file, line and field."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # a text may hold other separators of lines
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--questions {path}: {error}") from None
    questions: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            questions.append(_question(line, f"{path}, line {number}"))
    if not questions:
        raise UserError(f"--questions {path}: it holds no question")
    ids = [question["question_id"] for question in questions]
    if twice := [each for each in ids if ids.count(each) > 1]:
        raise UserError(f"--questions {path}: question_id {short(twice[0])} stands there twice; the judge needs one")
    return questions


def _question(line: str, where: str) -> dict[str, Any]:
    try:
        question = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error}); each line is one question") from None
    if not isinstance(question, dict) or type(question.get("question_id")) not in (int, str):
        raise UserError(f"{where}: expected an object with question_id (a number or a text) and turns")
    turns = question.get("turns")
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, str) and turn.strip() for turn in turns):
        raise UserError(f"{where}: turns must be a list of the user's texts, got {short(turns)}")
    if not isinstance(question.get("category"), (str, type(None))):
        raise UserError(f"{where}: category must be a text, got {short(question['category'])}")
    return question


def answer_questions(
    copy: Any, tokeniser: Any, questions: list[dict[str, Any]], asking: Asking, by_category: bool = False
) -> Answers:
    """The model's answers to all turns of all questions, as often as asking says.

    by_category: at the temperatures of MT-Bench instead of asking.temperature. Raises BadRecords if the model's chat
    template refuses a question.
    """
    from tqdm import tqdm

    names = {str(question.get("category")) for question in questions}
    if by_category and (unknown := sorted(names - TEMPERATURES.keys())):
        print(
            f"categories that MT-Bench does not have are answered at temperature {OTHERS}: "
            f"{', '.join(first(unknown, 10))}; --temperature sets one for all",
            file=sys.stderr,
        )
    chats = [(question, sample, []) for question in questions for sample in range(asking.samples)]
    longest = max(len(question["turns"]) for question in questions)
    cut = total = 0
    with tqdm(desc="answers", total=asking.samples * sum(len(q["turns"]) for q in questions), unit="answer",
              disable=not sys.stderr.isatty()) as bar:  # fmt: skip
        for turn in range(longest):
            open_chats = [chat for chat in chats if turn < len(chat[0]["turns"])]
            groups: dict[float, list[Any]] = {}
            for chat in open_chats:
                heat = TEMPERATURES.get(chat[0].get("category"), OTHERS) if by_category else asking.temperature
                groups.setdefault(heat, []).append(chat)
            for heat, group in groups.items():
                cut += _answer_turn(copy, tokeniser, group, turn, heat, asking, bar.update)
            total += len(open_chats)
    if cut:
        print(
            f"warning: {cut:,} of {total:,} answers were cut off, after {asking.max_new_tokens} tokens or at the "
            "model's last position; the judge reads them as they stand",
            file=sys.stderr,
        )
    found = [said for _, _, said in chats]
    return [found[start : start + asking.samples] for start in range(0, len(found), asking.samples)]


def _answer_turn(copy: Any, tokeniser: Any, chats: list[Any], turn: int, heat: float, asking: Asking, done: Any) -> int:
    """Add the answer of this turn to each chat (question, sample, answers so far); returns how many were cut off."""
    from bilevel.evaluate.generation import generate
    from bilevel.seeding import key_number

    contents = [
        [text for pair in zip(question["turns"], [*said, ""], strict=False) for text in pair]
        for question, _, said in chats
    ]
    rows = {"roles": [["user", "assistant"] * (turn + 1)] * len(chats), "contents": contents}
    prompts = tokeniser.prompts(rows | {"index": [*range(len(chats))], "is_noisy": [None] * len(chats)})
    keys = [
        f"answer {sample} to turn {turn} of question {q['question_id']}, seed {asking.seed}" for q, sample, _ in chats
    ]
    with copy.computing():
        answers = generate(copy.model, prompts, asking.max_new_tokens, asking.batch_size, done, heat,
                           [key_number(key) >> 1 for key in keys])  # fmt: skip
    for (_, _, said), one in zip(chats, answers, strict=True):
        said.append(tokeniser.tokenizer.decode(one.ids, skip_special_tokens=True).strip())
    return sum(not one.ended for one in answers)


def write_for_judge(questions: list[dict[str, Any]], answers: Answers, out: Path) -> None:
    """Write a line for each question, under the name of the file as the model's name."""
    with whole_file(out, replace=False) as new, new.open("w", encoding="utf-8") as file:
        for question, samples in zip(questions, answers, strict=True):
            choices = [{"index": index, "turns": turns} for index, turns in enumerate(samples)]
            key = json.dumps([out.stem, question["question_id"], choices], ensure_ascii=False)
            row = {
                "question_id": question["question_id"],
                "answer_id": hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()[:22],
                "model_id": out.stem,
                "choices": choices,
                "tstamp": time.time(),
            }
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
