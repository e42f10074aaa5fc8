"""Tasks that edit or search text. Each function draws one question and computes its answer."""

import random

from wording import CITIES, Record, ask, capital, join_and, person

WORDS = [
    "river", "candle", "forest", "button", "planet", "garden", "silver", "window", "rabbit", "mirror",
    "blanket", "harbour", "lantern", "meadow", "pepper", "orange", "thunder", "velvet", "wagon", "yellow",
    "anchor", "basket", "copper", "dragon", "engine", "falcon", "ginger", "hammer", "island", "jacket",
    "kettle", "ladder", "magnet", "needle", "oyster", "pillow", "quartz", "ribbon", "saddle", "ticket",
]  # fmt: skip
SUBJECTS = [
    "the old clock", "a grey cat", "my neighbour", "the little boat", "our teacher", "the tall tree",
    "a young fox", "the night train", "her brother", "the red kite",
]  # fmt: skip
DEEDS = [
    "stands near",
    "waits behind",
    "looks toward",
    "rests beside",
    "comes back from",
    "moves slowly past",
]
PLACES = [
    "the stone bridge", "the empty station", "the kitchen door", "a quiet lake", "the market square",
    "the garden wall", "an open field", "the school gate",
]  # fmt: skip
TASK_LINES = [
    "buy bread", "call the bank", "water the plants", "repair the bicycle", "write to Grandma",
    "book the tickets", "clean the oven", "return the library books", "feed the cat", "pay the rent",
    "wash the car", "order new glasses", "pack the suitcase", "charge the camera",
]  # fmt: skip
MISSPELLED = [
    ("recieve", "receive", "We will {} the letter tomorrow."),
    ("beleive", "believe", "I can hardly {} what she told me."),
    ("freind", "friend", "My best {} lives in the next street."),
    ("seperate", "separate", "Please keep the two piles {}."),
    ("definately", "definitely", "This is {} the better road."),
    ("tommorow", "tomorrow", "The painters are coming {}."),
    ("adress", "address", "Write your {} on the back of the card."),
    ("calender", "calendar", "Mark the day on the kitchen {}."),
    ("begining", "beginning", "The {} of the book is the best part."),
    ("goverment", "government", "The {} has lowered the tax on books."),
    ("neccessary", "necessary", "It is not {} to wait for me."),
    ("ocurred", "occurred", "The mistake {} on the second page."),
    ("wich", "which", "I do not know {} of the two is older."),
    ("becuase", "because", "We stayed inside {} it was raining."),
    ("libary", "library", "The {} closes at six in the evening."),
    ("suprise", "surprise", "The visit was a pleasant {}."),
    ("untill", "until", "The shop is open {} noon."),
    ("writting", "writing", "He is {} a song for the school choir."),
    ("realy", "really", "The soup was {} hot."),
    ("restarant", "restaurant", "There is a new {} at the harbour."),
    ("knowlege", "knowledge", "Her {} of birds is remarkable."),
    ("hieght", "height", "They measured the {} of the tower."),
    ("wierd", "weird", "A {} noise came from the cellar."),
    ("thier", "their", "The neighbours painted {} fence green."),
    ("febuary", "February", "The lake was still frozen in {}."),
    ("wendesday", "Wednesday", "Choir practice is on {}."),
    ("enviroment", "environment", "Bees are good for the {}."),
    ("arguement", "argument", "Their {} lasted all afternoon."),
    ("foriegn", "foreign", "She collects {} coins."),
    ("grammer", "grammar", "The teacher explained the {} again."),
    ("independant", "independent", "The two teams are {} of each other."),
    ("medecine", "medicine", "Take the {} after every meal."),
    ("succesful", "successful", "The trial run was {}."),
    ("accomodation", "accommodation", "We found {} close to the station."),
    ("buisness", "business", "His {} sells garden tools."),
    ("temprature", "temperature", "The {} fell below zero at night."),
]


def sentence(rng: random.Random) -> str:
    return capital(f"{rng.choice(SUBJECTS)} {rng.choice(DEEDS)} {rng.choice(PLACES)}.")


def reverse_text(rng: random.Random) -> Record:
    text = " ".join(rng.sample(WORDS, rng.randint(1, 3)))
    templates = [
        'Write "{text}" backwards, letter by letter.',
        "Reverse the letters of the text.",
        'Spell "{text}" from the last letter to the first.',
        "Turn this text around so that its last letter comes first.",
        'What do you get when you reverse "{text}"?',
    ]
    return *ask(rng, templates, text), text[::-1]


def letter_case(rng: random.Random) -> Record:
    text = sentence(rng)
    style, answer = rng.choice(
        [("upper-case", text.upper()), ("lower-case", text.lower()), ("title-case", text.title())]
    )
    templates = [
        "Rewrite the sentence in {style} letters.",
        "Change this to {style}: {text}",
        'Give me "{text}" in {style}.',
        "Convert the following text to {style}.",
        "Please write the sentence in {style}.",
    ]
    return *ask(rng, templates, text, style=style), answer


def remove_vowels(rng: random.Random) -> Record:
    text = "a"
    while "a" in text.lower().split():  # nothing would be left of this word
        text = rng.choice([sentence(rng), " ".join(rng.sample(WORDS, 3))])
    templates = [
        "Delete every vowel (a, e, i, o, u) from the text.",
        "Remove all vowels from this: {text}",
        "Write the text again without the letters a, e, i, o and u.",
        'What is left of "{text}" without its vowels?',
        "Strip the vowels and keep everything else.",
    ]
    return *ask(rng, templates, text), "".join(c for c in text if c.lower() not in "aeiou")


def count_letters(rng: random.Random) -> Record:
    text = rng.choice([sentence(rng), rng.choice(WORDS)])
    letter = rng.choice(sorted(set(text.lower()) - set(" .")))
    n = text.lower().count(letter)
    templates = [
        'How many times does the letter "{letter}" occur in "{text}"?',
        'Count how often "{letter}" appears in the text, in either case.',
        'How often do you find the letter "{letter}" here?',
        'Count the letter "{letter}" in: {text}',
        'Tell me the number of times "{letter}" is used.',
    ]
    answer = f'The letter "{letter}" occurs {n} time{"" if n == 1 else "s"}.'
    return *ask(rng, templates, text, letter=letter), answer


def sort_words(rng: random.Random) -> Record:
    words = rng.sample(WORDS, rng.randint(4, 7))
    backwards = rng.random() < 0.3
    order = "in reverse alphabetical order" if backwards else "in alphabetical order"
    templates = [
        "Put these words {order}: {text}",
        "Arrange the words {order}.",
        "List the following words {order}.",
        "Please sort {text} {order}.",
        "Write the words again, {order}.",
    ]
    return *ask(rng, templates, ", ".join(words), order=order), ", ".join(sorted(words, reverse=backwards))


def word_counts(rng: random.Random) -> Record:
    text = sentence(rng)
    words = text.rstrip(".").split()
    templates = [
        "Count the words and the letters of the sentence.",
        "How many words and how many letters does this have? {text}",
        "Give the number of words and of letters (no spaces, no full stop).",
        'Count words and letters in "{text}"',
        "State how many words and letters the sentence contains.",
    ]
    return *ask(rng, templates, text), f"Words: {len(words)}\nLetters: {sum(map(len, words))}"


def replace_word(rng: random.Random) -> Record:
    subject, other_subject = rng.sample(SUBJECTS, 2)
    place, other_place = rng.sample(PLACES, 2)
    old, new = rng.choice([(subject, other_subject), (place, other_place)])
    text = f"We met where {subject} {rng.choice(DEEDS)} {place}."
    templates = [
        'Replace "{old}" with "{new}" in the sentence.',
        'Rewrite the sentence, using "{new}" in place of "{old}".',
        'Change "{old}" to "{new}": {text}',
        'Put "{new}" where the sentence says "{old}".',
        'Swap "{old}" for "{new}" in this: {text}',
    ]
    return *ask(rng, templates, text, old=old, new=new), text.replace(old, new)


def numbered_list(rng: random.Random) -> Record:
    things = rng.sample(TASK_LINES, rng.randint(3, 5))
    answer = "\n".join(f"{i}. {capital(thing)}" for i, thing in enumerate(things, 1))
    text = f"I have to {join_and(things)}."
    templates = [
        "Turn the text into a numbered list of things to do.",
        "Make a numbered to-do list from this: {text}",
        "Write the duties as a numbered list, in the order given.",
        "{text} Please write that as a numbered list.",
        "List everything I have to do, one numbered line each.",
    ]
    return *ask(rng, templates, text), answer


def remove_duplicates(rng: random.Random) -> Record:
    words = rng.sample(WORDS, rng.randint(3, 5))
    repeated = words + [rng.choice(words) for _ in range(rng.randint(2, 4))]
    rng.shuffle(repeated)
    templates = [
        "Remove the repeated words and keep the first of each: {text}",
        "Delete all duplicates from the list. Keep the order.",
        "List each word once, in the order of its first appearance.",
        "Some words stand here more than once. Write every word a single time, in the same order.",
        "Take out the duplicates in {text} without changing the order.",
    ]
    return *ask(rng, templates, ", ".join(repeated)), ", ".join(dict.fromkeys(repeated))


def spelling(rng: random.Random) -> Record:
    wrong, right, frame = rng.choice(MISSPELLED)
    text = frame.format(wrong)
    templates = [
        "Correct the spelling mistake in the sentence.",
        "One word is misspelled. Write the sentence correctly: {text}",
        "Fix the spelling: {text}",
        "Proofread this sentence and write it without the mistake.",
        "Find the misspelled word and write the corrected sentence.",
        'Write "{text}" with the right spelling.',
    ]
    return *ask(rng, templates, text), frame.format(right)


def extraction(rng: random.Random) -> Record:
    name, city = person(rng), rng.choice(CITIES)
    mail = f"{name.lower()}.{rng.choice(WORDS)}@{rng.choice(WORDS)}.example"
    phone = f"555-{rng.randint(1000, 9999)}"
    text = rng.choice(
        [
            f"{name} has moved to {city}; write to {mail} or ring {phone} in the evening.",
            f"For rooms in {city} please ask {name}, telephone {phone}, e-mail {mail}.",
            f"You can reach {name} in {city} under {mail}, and in a hurry under {phone}.",
        ]
    )
    kind, answer = rng.choice(
        [("e-mail address", mail), ("telephone number", phone), ("name of the person", name), ("city", city)]
    )
    templates = [
        "Find the {kind} in the text.",
        "Extract the {kind} from this message: {text}",
        "Which {kind} is mentioned here?",
        "Read the message and copy out the {kind}.",
        "What is the {kind} given in the following note? {text}",
    ]
    return *ask(rng, templates, text, kind=kind), answer


TASKS = [
    reverse_text, letter_case, remove_vowels, count_letters, sort_words, word_counts, replace_word,
    numbered_list, remove_duplicates, spelling, extraction,
]  # fmt: skip
