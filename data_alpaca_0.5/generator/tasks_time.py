"""Tasks on dates and times. Each function draws one question and computes its answer."""

import random
from datetime import date, timedelta

from wording import MONTHS, WEEKDAYS, Record, ask, clock

ACTIVITIES = [
    "breakfast", "homework", "a walk", "piano practice", "lunch", "a film", "shopping", "gymnastics",
    "reading", "gardening", "a phone call", "cleaning", "a nap", "cooking", "a board game",
]  # fmt: skip


def long_date(day: date) -> str:
    return f"{day.day} {MONTHS[day.month - 1]} {day.year}"


def draw_date(rng: random.Random) -> date:
    return date(1990, 1, 1) + timedelta(days=rng.randrange(365 * 45))


def weekday_of_date(rng: random.Random) -> Record:
    day = draw_date(rng)
    templates = [
        "On which day of the week does {text} fall?",
        "Name the weekday of {text}.",
        "Find the day of the week for this date.",
        "Which weekday belongs to the date {text}?",
        "Give the weekday of the date below.",
    ]
    return *ask(rng, templates, long_date(day)), WEEKDAYS[day.weekday()]


def date_arithmetic(rng: random.Random) -> Record:
    day, n = draw_date(rng), rng.randint(2, 40)
    after = rng.random() < 0.6
    result = day + timedelta(days=n if after else -n)
    templates = [
        "What date is {n} days {side} {text}?",
        "Give the date {n} days {side} {text}.",
        "Start from the date below and find the date {n} days {side} it.",
        "Work out which date lies {n} days {side} {text}.",
        "Which date comes {n} days {side} this one?",
    ]
    return *ask(rng, templates, long_date(day), n=n, side="after" if after else "before"), long_date(result)


def date_format(rng: random.Random) -> Record:
    day = draw_date(rng)
    iso, text = day.isoformat(), long_date(day)
    if rng.random() < 0.5:
        templates = [
            "Write the date {text} as YYYY-MM-DD.",
            "Convert this date to the format YYYY-MM-DD.",
            "How is {text} written in the form year-month-day, with digits only?",
        ]
        return *ask(rng, templates, text), iso
    templates = [
        "Write {text} with the name of the month, as in 5 May 2001.",
        "Rewrite the date with day, month name and year.",
        "Spell out the month in {text}, as in 5 May 2001.",
    ]
    return *ask(rng, templates, iso), text


def weekday_shift(rng: random.Random) -> Record:
    start, n = rng.randrange(7), rng.randint(2, 30)
    templates = [
        "If today is {day}, what day of the week is it in {n} days?",
        "Today is {day}. Which weekday comes {n} days later?",
        "A parcel sent on {day} needs {n} days. On which day of the week does it arrive?",
        "Starting on {day}, count {n} days forward and name the weekday.",
        "My holiday starts {n} days after {day}. Which weekday is that?",
    ]
    answer = f"{n} days after {WEEKDAYS[start]} is {a_day((start + n) % 7)}."
    return *ask(rng, templates, day=WEEKDAYS[start], n=n), answer


def a_day(index: int) -> str:
    return f"a {WEEKDAYS[index]}"


def arrival_time(rng: random.Random) -> Record:
    start, length = rng.randrange(0, 24 * 60, 5), rng.randrange(70, 400, 5)
    vehicle = rng.choice(["train", "bus", "ferry", "plane", "coach"])
    templates = [
        "A {vehicle} leaves at {start} and travels for {h} h {m} min. When does it arrive?",
        "When does a {vehicle} arrive that leaves at {start} and takes {h} h {m} min?",
        "The {vehicle} departs at {start}. The trip lasts {h} h {m} min. Give the time of arrival.",
        "Find the arrival time of the {vehicle}: departure {start}, duration {h} h {m} min.",
        "My {vehicle} starts at {start} and is under way for {h} h {m} min. At what time am I there?",
    ]
    fields = {"vehicle": vehicle, "start": clock(start), "h": length // 60, "m": length % 60}
    return *ask(rng, templates, **fields), f"The {vehicle} arrives at {clock(start + length)}."


def duration(rng: random.Random) -> Record:
    start = rng.randrange(6 * 60, 16 * 60)
    length = rng.randrange(61, 7 * 60)
    templates = [
        "How long is it from {a} to {b} on the same day?",
        "A meeting runs from {a} to {b}. How long does it last?",
        "Work out the time between {a} and {b}.",
        "How many hours and minutes pass from {a} until {b}?",
        "The shop opens at {a} and closes at {b}. For how long is it open?",
    ]
    hours, minutes = divmod(length, 60)
    answer = f"From {clock(start)} to {clock(start + length)} it is {hours} h {minutes} min."
    return *ask(rng, templates, a=clock(start), b=clock(start + length)), answer


def timetable(rng: random.Random) -> Record:
    start = rng.randrange(7 * 60, 15 * 60, 15)
    plan = [(name, rng.randrange(15, 100, 5)) for name in rng.sample(ACTIVITIES, rng.randint(3, 5))]
    text = ", ".join(f"{name} ({minutes} min)" for name, minutes in plan)
    lines, now = [], start
    for name, minutes in plan:
        lines.append(f"{clock(now)} - {clock(now + minutes)} {name}")
        now += minutes
    templates = [
        "I start at {start} and do these things one after another: {text}. Write the timetable.",
        "Make a timetable that starts at {start}, without breaks.",
        "Plan the day from {start} on, in the order given, one line per activity.",
        "Write down from when to when each activity lasts. The first begins at {start}.",
        "Begin at {start} and turn this into a timetable: {text}",
    ]
    return *ask(rng, templates, text, start=clock(start)), "\n".join(lines)


TASKS = [
    weekday_of_date, date_arithmetic, date_format, weekday_shift, arrival_time, duration, timetable,
]  # fmt: skip
