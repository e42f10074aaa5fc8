"""Helpers of the tasks_*.py files: phrasing of questions, word lists, number formats."""

import random

Record = tuple[str, str, str]  # instruction, input, output

PEOPLE = {
    "Anna": "she", "Ben": "he", "Clara": "she", "David": "he", "Elena": "she", "Felix": "he",
    "Grace": "she", "Hugo": "he", "Irene": "she", "Jonas": "he", "Katya": "she", "Leo": "he",
    "Maria": "she", "Nadim": "he", "Olga": "she", "Pablo": "he", "Rosa": "she", "Samuel": "he",
    "Tara": "she", "Victor": "he", "Wendy": "she", "Yusuf": "he",
}  # fmt: skip
CITIES = ["Lisbon", "Oslo", "Prague", "Dublin", "Vienna", "Madrid", "Athens", "Geneva", "Krakow", "Turin"]
JOBS = ["nurse", "teacher", "baker", "pilot", "gardener", "lawyer", "plumber", "painter", "chemist", "farmer"]
WEEKDAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = [
    "January", "February", "March", "April", "May", "June",
    "July", "August", "September", "October", "November", "December",
]  # fmt: skip


def ask(rng: random.Random, templates: list[str], text: str = "", **fields: object) -> tuple[str, str]:
    """Pick a phrasing. `text` replaces {text} in it; without {text}, it becomes the record's input."""
    template = rng.choice(templates)
    if "{text}" in template:
        return template.format(text=text, **fields), ""
    return template.format(**fields), text


def person(rng: random.Random) -> str:
    """A first name."""
    return rng.choice(list(PEOPLE))


def a_or_an(word: str) -> str:
    """The word with its article, chosen by spelling; correct for the words in our lists."""
    return f"{'an' if word[0] in 'aeiou' else 'a'} {word}"


def join_and(items: list[str]) -> str:
    """Two or more items joined as in `a, b and c`."""
    return f"{', '.join(items[:-1])} and {items[-1]}"


def capital(text: str) -> str:
    """The text with its first letter in upper case."""
    return text[0].upper() + text[1:]


def clock(minutes: int) -> str:
    """Minutes after midnight as HH:MM; 24:00 becomes 00:00."""
    return f"{minutes // 60 % 24:02d}:{minutes % 60:02d}"
