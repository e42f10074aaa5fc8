"""Tasks on English grammar and wording. Answers come from the hand-checked tables below."""

import random

from wording import WEEKDAYS, Record, ask, capital, person

ACTORS = [
    "the cook", "the gardener", "my uncle", "the nurse", "our neighbour", "the artist", "the student",
    "her aunt", "the mechanic", "the old man", "the clerk", "the girl",
]  # fmt: skip
# base form, third person, past, past participle, object, whether the object is plural
ACTIONS = [
    ("wash", "washes", "washed", "washed", "the dishes", True),
    ("write", "writes", "wrote", "written", "a long letter", False),
    ("paint", "paints", "painted", "painted", "the front door", False),
    ("carry", "carries", "carried", "carried", "the heavy boxes", True),
    ("open", "opens", "opened", "opened", "the upper window", False),
    ("choose", "chooses", "chose", "chosen", "the music", False),
    ("repair", "repairs", "repaired", "repaired", "the broken chair", False),
    ("bring", "brings", "brought", "brought", "the fresh bread", False),
    ("sell", "sells", "sold", "sold", "the old car", False),
    ("take", "takes", "took", "taken", "the photographs", True),
    ("draw", "draws", "drew", "drawn", "a small map", False),
    ("buy", "buys", "bought", "bought", "the tickets", True),
    ("clean", "cleans", "cleaned", "cleaned", "the kitchen floor", False),
    ("find", "finds", "found", "found", "the lost keys", True),
    ("bake", "bakes", "baked", "baked", "an apple cake", False),
    ("sing", "sings", "sang", "sung", "an old song", False),
    ("keep", "keeps", "kept", "kept", "the spare key", False),
    ("build", "builds", "built", "built", "a wooden shed", False),
    ("study", "studies", "studied", "studied", "the timetable", False),
    ("throw", "throws", "threw", "thrown", "the ball", False),
    ("teach", "teaches", "taught", "taught", "the beginners", True),
    ("feed", "feeds", "fed", "fed", "the chickens", True),
    ("drive", "drives", "drove", "driven", "the school bus", False),
    ("lock", "locks", "locked", "locked", "the back gate", False),
    ("hide", "hides", "hid", "hidden", "the presents", True),
    ("mend", "mends", "mended", "mended", "the torn curtains", True),
]
PLURALS = {
    "cat": "cats", "box": "boxes", "city": "cities", "leaf": "leaves", "child": "children",
    "mouse": "mice", "tooth": "teeth", "foot": "feet", "knife": "knives", "baby": "babies",
    "church": "churches", "toy": "toys", "man": "men", "woman": "women", "goose": "geese",
    "glass": "glasses", "story": "stories", "wolf": "wolves", "potato": "potatoes", "tomato": "tomatoes",
    "brush": "brushes", "key": "keys", "sheep": "sheep", "wife": "wives", "lady": "ladies",
    "piano": "pianos", "watch": "watches", "half": "halves", "ox": "oxen", "country": "countries",
}  # fmt: skip
ARTICLES = {
    "apple": "an", "hour": "an", "university": "a", "umbrella": "an", "uniform": "a", "honest answer": "an",
    "old house": "an", "yellow bus": "a", "egg": "an", "European city": "a", "island": "an",
    "one-way street": "a",
    "orange": "an", "useful tool": "a", "ice cube": "an", "horse": "a", "elephant": "an", "unit": "a",
    "unusual hat": "an", "wooden spoon": "a", "eagle": "an", "year": "a", "easy question": "an", "hotel": "a",
    "artist": "an", "window": "a", "open door": "an", "ukulele": "a", "idea": "an", "heir": "an",
}  # fmt: skip
ADJECTIVES = {
    "tall": ("taller", "tallest"), "big": ("bigger", "biggest"), "happy": ("happier", "happiest"),
    "good": ("better", "best"), "bad": ("worse", "worst"), "fast": ("faster", "fastest"),
    "hot": ("hotter", "hottest"), "easy": ("easier", "easiest"), "old": ("older", "oldest"),
    "thin": ("thinner", "thinnest"), "nice": ("nicer", "nicest"),
    "beautiful": ("more beautiful", "most beautiful"),
    "busy": ("busier", "busiest"), "long": ("longer", "longest"), "careful": ("more careful", "most careful"),
    "wide": ("wider", "widest"), "heavy": ("heavier", "heaviest"),
    "expensive": ("more expensive", "most expensive"),
    "sad": ("sadder", "saddest"), "cheap": ("cheaper", "cheapest"), "famous": ("more famous", "most famous"),
    "dark": ("darker", "darkest"), "early": ("earlier", "earliest"), "wet": ("wetter", "wettest"),
}  # fmt: skip
OPPOSITES = [
    ("hot", "cold"), ("early", "late"), ("full", "empty"), ("heavy", "light"), ("strong", "weak"),
    ("rich", "poor"), ("fast", "slow"), ("wide", "narrow"), ("happy", "sad"), ("open", "closed"),
    ("wet", "dry"), ("young", "old"), ("loud", "quiet"), ("deep", "shallow"), ("clean", "dirty"),
    ("safe", "dangerous"), ("inside", "outside"), ("always", "never"), ("above", "below"), ("win", "lose"),
    ("arrive", "leave"), ("push", "pull"), ("increase", "decrease"), ("remember", "forget"),
    ("cheap", "expensive"), ("before", "after"), ("true", "false"), ("thick", "thin"),
]  # fmt: skip
RHYMES = [
    ["cat", "hat", "mat"], ["light", "night", "kite"], ["house", "mouse", "grouse"], ["tree", "sea", "key"],
    ["rain", "train", "plane"], ["ball", "wall", "hall"], ["moon", "spoon", "June"], ["bed", "head", "bread"],
    ["boat", "goat", "coat"], ["ring", "king", "wing"], ["nose", "rose", "toes"], ["sand", "hand", "band"],
]  # fmt: skip


def action(rng: random.Random) -> tuple[str, tuple[str, str, str, str, str, bool]]:
    """Who acts, and a row of ACTIONS."""
    return rng.choice([person(rng), rng.choice(ACTORS)]), rng.choice(ACTIONS)


def plural(rng: random.Random) -> Record:
    word, answer = rng.choice(list(PLURALS.items()))
    templates = [
        'What is the plural of "{text}"?',
        "Give the plural of this noun.",
        'Write the plural form of the word "{text}".',
        'How do you say "{text}" when there are several?',
        "Put the noun into the plural.",
    ]
    return *ask(rng, templates, word), f'The plural of "{word}" is "{answer}".'


def article(rng: random.Random) -> Record:
    noun, choice = rng.choice(list(ARTICLES.items()))
    frame = rng.choice(["She was looking for ___ {}.", "This is ___ {}.", "They talked about ___ {}."])
    text = frame.format(noun)
    templates = [
        'Fill the gap with "a" or "an".',
        'Complete the sentence with "a" or "an": {text}',
        "Put the right indefinite article into the gap: {text}",
        'Choose between "a" and "an" and write the whole sentence.',
        "Which indefinite article is missing? Write the full sentence.",
    ]
    return *ask(rng, templates, text), text.replace("___", choice)


def past_tense(rng: random.Random) -> Record:
    who, (_, third, past, _, thing, _) = action(rng)
    templates = [
        "Rewrite the sentence in the past tense.",
        "Put this into the simple past: {text}",
        "Change the verb to the past tense.",
        'Say "{text}" as something that is over.',
        "Write the following sentence in the simple past.",
    ]
    return *ask(rng, templates, capital(f"{who} {third} {thing}.")), capital(f"{who} {past} {thing}.")


def passive_voice(rng: random.Random) -> Record:
    who, (_, third, past, participle, thing, many) = action(rng)
    verb, be = rng.choice([(third, "are" if many else "is"), (past, "were" if many else "was")])
    templates = [
        "Rewrite the sentence in the passive voice.",
        "Change this from active to passive: {text}",
        "Turn the active sentence into a passive one.",
        "Put the sentence into the passive, and name who does it.",
        'Say "{text}" in the passive voice.',
    ]
    return *ask(rng, templates, capital(f"{who} {verb} {thing}.")), capital(f"{thing} {be} {participle} by {who}.")


def make_question(rng: random.Random) -> Record:
    who, (base, third, _, _, thing, _) = action(rng)
    templates = [
        "Turn the statement into a yes-or-no question.",
        "Make a question from this sentence: {text}",
        "Rewrite the sentence as a question that starts with Does.",
        'How would you ask whether this is true? "{text}"',
        "Change the sentence into a question.",
    ]
    return *ask(rng, templates, capital(f"{who} {third} {thing}.")), f"Does {who} {base} {thing}?"


def negation(rng: random.Random) -> Record:
    who, (base, third, _, _, thing, _) = action(rng)
    templates = [
        'Make the sentence negative, with "does not".',
        'Negate this sentence with "does not": {text}',
        'Say the contrary of "{text}", using "does not".',
        'Rewrite the statement in the negative ("does not").',
        'Put "does not" into the sentence and change the verb as needed.',
    ]
    return *ask(rng, templates, capital(f"{who} {third} {thing}.")), capital(f"{who} does not {base} {thing}.")


def polite_request(rng: random.Random) -> Record:
    base, _, _, _, thing, _ = rng.choice(ACTIONS)
    when = rng.choice(["before lunch", "today", "on Sunday", "this evening", "right away", "next week"])
    templates = [
        "Rewrite the order as a polite question.",
        "Make this sound polite: {text}",
        "Say the same politely, beginning with Could you please.",
        'How do you ask politely? "{text}"',
        "Turn the command into a friendly request.",
    ]
    text = capital(f"{base} {thing} {when}.")
    return *ask(rng, templates, text), f"Could you please {base} {thing} {when}?"


def third_person(rng: random.Random) -> Record:
    base, third, _, _, thing, _ = rng.choice(ACTIONS)
    day, helper = rng.choice(WEEKDAYS), rng.choice(["sister", "father", "cousin", "neighbour"])
    subject, own, whom = rng.choice([("she", "her", "her"), ("he", "his", "him")])
    templates = [
        'Rewrite the sentence in the third person, with "{subject}".',
        'Change "I" to "{subject}" and adapt everything else: {text}',
        'Tell this about someone else, using "{subject}".',
        'Put the sentence into the third person singular ("{subject}").',
        'Say "{text}" with "{subject}" as the subject.',
    ]
    text = f"On {day} I {base} {thing}, and my {helper} helps me."
    answer = f"On {day} {subject} {third} {thing}, and {own} {helper} helps {whom}."
    return *ask(rng, templates, text, subject=subject), answer


def comparison_forms(rng: random.Random) -> Record:
    word, (more, most) = rng.choice(list(ADJECTIVES.items()))
    templates = [
        'Give the comparative and the superlative of "{text}".',
        "Write the comparative and superlative forms of the adjective.",
        'What are the comparative and superlative of "{text}"?',
        "Compare the adjective: comparative, then superlative.",
        'Which forms does "{text}" have for comparing two and for comparing many?',
    ]
    return *ask(rng, templates, word), f"Comparative: {more}\nSuperlative: {most}"


def opposites(rng: random.Random) -> Record:
    word, other = rng.choice(OPPOSITES)
    if rng.random() < 0.5:
        word, other = other, word
    templates = [
        'What is the opposite of "{text}"?',
        "Give the opposite of this word.",
        'Name a word that means the contrary of "{text}".',
        "Find an antonym for the word.",
        'Tell me the antonym of "{text}".',
    ]
    return *ask(rng, templates, word), other


def rhyme(rng: random.Random) -> Record:
    own, *others = rng.sample(RHYMES, 4)
    word, answer = rng.sample(own, 2)
    choices = [answer] + [rng.choice(group) for group in others]
    rng.shuffle(choices)
    templates = [
        'Which of these words rhymes with "{word}"?',
        'Find the rhyme for "{word}" among {text}.',
        'Choose the word that rhymes with "{word}": {text}',
        'Only one of the words sounds like "{word}" at its end. Which one?',
        'I need a rhyme for "{word}". Which word of the list fits?',
    ]
    return *ask(rng, templates, ", ".join(choices), word=word), f'"{answer}" rhymes with "{word}".'


TASKS = [
    plural, article, past_tense, passive_voice, make_question, negation, polite_request, third_person,
    comparison_forms, opposites, rhyme,
]  # fmt: skip
