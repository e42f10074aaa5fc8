"""Tasks that ask for a short text from notes. The text follows the notes word for word."""

import random

from wording import CITIES, JOBS, PEOPLE, WEEKDAYS, Record, a_or_an, ask, capital, clock, person

EVENTS = ["birthday party", "garden party", "concert", "book reading", "chess evening", "school play"]
ROOMS = ["in the town hall", "in our garden", "at the library", "in the school gym", "at the harbour cafe"]
GOODS = ["toaster", "raincoat", "desk lamp", "suitcase", "radio", "kettle", "wall clock", "hair dryer"]
FAULTS = ["it does not work", "it is scratched", "it has the wrong colour", "a part is missing"]
WISHES = ["send me a new one", "give me my money back", "have it repaired", "tell me how to return it"]
PRESENTS = ["book", "scarf", "teapot", "puzzle", "plant", "calendar", "photo album", "wooden bowl"]
USES = [
    "use it every day",
    "have shown it to all my friends",
    "have wanted one for years",
    "like its colours",
]
# sky: lowest and highest chance of rain, in percent
SKIES = {"sunny": (10, 20), "clear": (1, 9), "cloudy": (30, 60), "foggy": (20, 40), "rainy": (70, 95)}
HOBBIES = ["playing chess", "singing in a choir", "growing roses", "repairing old radios", "long walks"]


def notes(**fields: object) -> str:
    """One `Name: value` line per field."""
    return "\n".join(f"{capital(name)}: {value}" for name, value in fields.items())


def invitation(rng: random.Random) -> Record:
    guest, host = rng.sample(list(PEOPLE), 2)
    event, place, day = rng.choice(EVENTS), rng.choice(ROOMS), rng.choice(WEEKDAYS)
    time = clock(rng.randrange(14 * 60, 21 * 60, 30))
    text = notes(guest=guest, host=host, event=event, day=day, time=time, place=place)
    templates = [
        "Write a short invitation with these details.",
        "Use the notes to write a friendly invitation.",
        "Turn the notes into an invitation letter of a few lines.",
        "Write an invitation from the host to the guest.",
        "Please make an invitation out of this:\n{text}",
    ]
    answer = (
        f"Dear {guest},\n\nI would like to invite you to {a_or_an(event)} {place} on {day} at {time}. "
        f"I hope you can come.\n\nBest wishes,\n{host}"
    )
    return *ask(rng, templates, text), answer


def complaint(rng: random.Random) -> Record:
    name, article, day = person(rng), rng.choice(GOODS), rng.choice(WEEKDAYS)
    order, fault, wish = rng.randint(1000, 9999), rng.choice(FAULTS), rng.choice(WISHES)
    text = notes(customer=name, article=article, order=order, arrived=day, problem=fault, wish=wish)
    templates = [
        "Write a polite letter of complaint from these notes.",
        "Complain to the shop in a few polite lines.",
        "Turn the notes into a letter to the shop.",
        "Help the customer to write a complaint.",
        "Draft a complaint with the following details.\n{text}",
    ]
    answer = (
        f"Dear Sir or Madam,\n\nOn {day} I received the {article} of my order {order}. "
        f"Unfortunately, {fault}. Please {wish}.\n\nYours faithfully,\n{name}"
    )
    return *ask(rng, templates, text), answer


def thank_you_note(rng: random.Random) -> Record:
    sender, giver = rng.sample(list(PEOPLE), 2)
    present, use = rng.choice(PRESENTS), rng.choice(USES)
    text = notes(sender=sender, giver=giver, present=present, reason=f"I {use}")
    templates = [
        "Write a thank-you note from the sender to the giver.",
        "Thank the giver for the present in a short letter.",
        "Use these notes for a short letter of thanks.",
        "Write a few lines of thanks for the present.",
        "Make a thank-you letter from this:\n{text}",
    ]
    answer = f"Dear {giver},\n\nThank you very much for the {present}. I {use}.\n\nWith love,\n{sender}"
    return *ask(rng, templates, text), answer


def weather_report(rng: random.Random) -> Record:
    city, day, sky = rng.choice(CITIES), rng.choice(WEEKDAYS), rng.choice(list(SKIES))
    low, rise, rain = rng.randint(2, 15), rng.randint(4, 12), rng.randint(*SKIES[sky])
    text = notes(city=city, day=day, sky=sky, low=low, high=low + rise, rain=f"{rain}%")
    templates = [
        "Write the weather report in two sentences.",
        "Turn these figures into a short weather report.",
        "Read out the forecast as full sentences.",
        "Put the forecast into words.",
        "Write a weather forecast for the radio from this:\n{text}",
    ]
    answer = (
        f"On {day} the weather in {city} will be {sky}, with temperatures between "
        f"{low} and {low + rise} degrees. The chance of rain is {rain} percent."
    )
    return *ask(rng, templates, text), answer


def introduction(rng: random.Random) -> Record:
    name, city, job = person(rng), rng.choice(CITIES), rng.choice(JOBS)
    years, hobby = rng.randint(2, 30), rng.choice(HOBBIES)
    text = notes(name=name, city=city, job=job, years=years, hobby=hobby)
    templates = [
        "Write a self-introduction of the person, in the first person.",
        "Introduce yourself as this person would.",
        "Write what this person says when meeting a new group.",
        "Turn the notes into a short self-introduction.",
        "Speak as the person in these notes and introduce yourself.\n{text}",
    ]
    answer = (
        f"Hello, my name is {name}. I live in {city} and have worked as {a_or_an(job)} for {years} years. "
        f"In my free time I enjoy {hobby}. I am glad to meet you all."
    )
    return *ask(rng, templates, text), answer


TASKS = [invitation, complaint, thank_you_note, weather_report, introduction]
