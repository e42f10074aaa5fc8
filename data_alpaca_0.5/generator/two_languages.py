"""Simple questions in English and German, for the experiment in which validation has one of the two languages.

pairs(n, seed) draws n questions and returns each in both languages. The "task" of a record is its language.
"""

import random

ONES = {
    "english": ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"],
    "german": ["null", "eins", "zwei", "drei", "vier", "fünf", "sechs", "sieben", "acht", "neun", "zehn"],
}
DAYS = {
    "english": ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"],
    "german": ["Montag", "Dienstag", "Mittwoch", "Donnerstag", "Freitag", "Samstag", "Sonntag"],
}
THINGS = {
    "english": ["apples", "books", "chairs", "cups", "letters", "keys", "tickets", "boxes", "bottles", "stones"],
    "german": ["Äpfel", "Bücher", "Stühle", "Tassen", "Briefe", "Schlüssel", "Karten", "Kisten", "Flaschen", "Steine"],
}
NAMES = ["Anna", "Ben", "Clara", "David", "Elena", "Felix", "Jonas", "Maria", "Leo", "Rosa"]

Question = tuple[str, str]  # instruction, output


def day_after(rng: random.Random) -> dict[str, Question]:
    start, days = rng.randrange(7), rng.randrange(2, 60)
    now, then = ({k: DAYS[k][i % 7] for k in DAYS} for i in (start, start + days))
    return {
        "english": (f"Today is {now['english']}. Which day is it in {days} days?", f"It is {then['english']} then."),
        "german": (f"Heute ist {now['german']}. Welcher Tag ist in {days} Tagen?", f"Dann ist {then['german']}."),
    }


def how_many(rng: random.Random) -> dict[str, Question]:
    name, thing, has, more = rng.choice(NAMES), rng.randrange(len(THINGS["english"])), *rng.choices(range(2, 60), k=2)
    en, de = THINGS["english"][thing], THINGS["german"][thing]
    return {
        "english": (
            f"{name} has {has} {en} and gets {more} more. How many are there now?",
            f"{name} now has {has + more} {en}.",
        ),
        "german": (
            f"{name} hat {has} {de} und bekommt {more} dazu. Wie viele sind es nun?",
            f"{name} hat nun {has + more} {de}.",
        ),
    }


def in_words(rng: random.Random) -> dict[str, Question]:
    numbers = [rng.randrange(11) for _ in range(4)]
    digits = ", ".join(map(str, numbers))
    en, de = (", ".join(ONES[language][n] for n in numbers) for language in ONES)
    return {
        "english": (f"Write these numbers in words: {digits}", f"In words these are {en}."),
        "german": (f"Schreibe diese Zahlen in Worten: {digits}", f"In Worten sind das {de}."),
    }


def larger(rng: random.Random) -> dict[str, Question]:
    low, high = sorted(rng.sample(range(1000), 2))
    first, second = rng.sample((low, high), 2)
    return {
        "english": (f"Which is larger, {first} or {second}?", f"{high} is larger than {low}."),
        "german": (f"Was ist größer, {first} oder {second}?", f"{high} ist größer als {low}."),
    }


TASKS = [day_after, how_many, in_words, larger]


def pairs(n: int, seed: int) -> list[dict[str, str]]:
    """2 n Alpaca records: n different questions, of all kinds in turn, each in both languages."""
    rng, found = random.Random(f"{seed} two languages"), {}
    while len(found) < n:
        question = TASKS[len(found) % len(TASKS)](rng)
        found[question["english"][0]] = question
    return [
        {"instruction": instruction, "input": "", "output": output, "task": language}
        for question in found.values()
        for language, (instruction, output) in question.items()
    ]
