"""Tasks on common knowledge and meaning. Answers come from the hand-checked tables below."""

import random

from wording import Record, a_or_an, ask

CAPITALS = {
    "France": "Paris", "Spain": "Madrid", "Italy": "Rome", "Norway": "Oslo", "Japan": "Tokyo",
    "Egypt": "Cairo", "Kenya": "Nairobi", "Peru": "Lima", "Cuba": "Havana", "Greece": "Athens",
    "Poland": "Warsaw", "Austria": "Vienna", "Hungary": "Budapest", "Portugal": "Lisbon",
    "Ireland": "Dublin", "Finland": "Helsinki", "Denmark": "Copenhagen", "Sweden": "Stockholm",
    "Canada": "Ottawa", "Australia": "Canberra", "Chile": "Santiago", "Thailand": "Bangkok",
    "Germany": "Berlin", "Belgium": "Brussels", "Iceland": "Reykjavik", "Romania": "Bucharest",
    "Bulgaria": "Sofia", "Croatia": "Zagreb", "Mongolia": "Ulaanbaatar", "Ethiopia": "Addis Ababa",
    "Ghana": "Accra", "Uruguay": "Montevideo", "Nepal": "Kathmandu", "Jordan": "Amman",
}  # fmt: skip
ELEMENTS = {
    "hydrogen": ("H", 1), "helium": ("He", 2), "lithium": ("Li", 3), "carbon": ("C", 6),
    "nitrogen": ("N", 7), "oxygen": ("O", 8), "fluorine": ("F", 9), "neon": ("Ne", 10),
    "sodium": ("Na", 11), "magnesium": ("Mg", 12), "aluminium": ("Al", 13), "silicon": ("Si", 14),
    "phosphorus": ("P", 15), "sulphur": ("S", 16), "chlorine": ("Cl", 17), "argon": ("Ar", 18),
    "potassium": ("K", 19), "calcium": ("Ca", 20), "iron": ("Fe", 26), "nickel": ("Ni", 28),
    "copper": ("Cu", 29), "zinc": ("Zn", 30), "silver": ("Ag", 47), "tin": ("Sn", 50),
    "iodine": ("I", 53), "gold": ("Au", 79), "mercury": ("Hg", 80), "lead": ("Pb", 82),
}  # fmt: skip
DEFINITIONS = {
    "thermometer": "an instrument that measures temperature", "bakery": "a shop where bread is made and sold",
    "compass": "an instrument that shows which way is north", "orchard": "a piece of land with fruit trees",
    "island": "a piece of land with water all around it", "triangle": "a figure with three sides",
    "library": "a place where people borrow books", "anchor": "a weight that holds a ship in place",
    "telescope": "an instrument for looking at things far away", "widow": "a woman whose husband has died",
    "ladder": "a frame with steps for climbing up and down", "scale": "a device for weighing things",
    "dictionary": "a book that explains the meaning of words", "surgeon": "a doctor who performs operations",
    "tunnel": "a passage under the ground or through a hill", "century": "a period of one hundred years",
    "desert": "a dry region where little grows", "harbour": "a sheltered place where ships can stay",
    "veterinarian": "a doctor who treats animals", "kennel": "a small house for a dog",
    "decade": "a period of ten years", "plumber": "a person who repairs water pipes",
    "volcano": "a mountain that throws out hot rock", "umbrella": "a folding cover that keeps off the rain",
}  # fmt: skip
# animal: (young, class, legs)
ANIMALS = {
    "dog": ("puppy", "mammal", 4), "cat": ("kitten", "mammal", 4), "cow": ("calf", "mammal", 4),
    "horse": ("foal", "mammal", 4), "sheep": ("lamb", "mammal", 4), "goat": ("kid", "mammal", 4),
    "pig": ("piglet", "mammal", 4), "bear": ("cub", "mammal", 4), "duck": ("duckling", "bird", 2),
    "goose": ("gosling", "bird", 2), "swan": ("cygnet", "bird", 2), "owl": ("owlet", "bird", 2),
    "eagle": ("eaglet", "bird", 2), "frog": ("tadpole", "amphibian", 4), 
    "butterfly": ("caterpillar", "insect", 6),
    "kangaroo": ("joey", "mammal", 4), "deer": ("fawn", "mammal", 4), "lion": ("cub", "mammal", 4),
    "hare": ("leveret", "mammal", 4), "chicken": ("chick", "bird", 2),
}  # fmt: skip
CATEGORIES = {
    "animal": ["tiger", "horse", "donkey", "rabbit", "camel", "otter", "badger", "squirrel"],
    "plant": ["oak", "daisy", "fern", "pine", "clover", "willow", "moss", "ivy"],
    "vehicle": ["bus", "tram", "lorry", "bicycle", "ferry", "helicopter", "tractor", "van"],
    "tool": ["hammer", "saw", "screwdriver", "pliers", "chisel", "wrench", "spade", "rake"],
    "musical instrument": ["violin", "flute", "trumpet", "guitar", "cello", "oboe", "harp", "clarinet"],
    "garment": ["shirt", "coat", "scarf", "trousers", "glove", "skirt", "jacket", "sock"],
    "profession": ["baker", "nurse", "lawyer", "pilot", "teacher", "dentist", "carpenter", "farmer"],
    "colour": ["red", "blue", "green", "purple", "yellow", "brown", "grey", "pink"],
}
GOOD = ["friendly", "delicious", "wonderful", "perfect", "charming", "excellent", "delightful"]
BAD = ["rude", "terrible", "disappointing", "awful", "dirty", "boring", "useless"]
PRAISE = ["I will gladly come again", "I recommend it to everyone", "we enjoyed every minute"]
BLAME = ["I want my money back", "I shall never return", "we regretted every minute"]
REVIEWED = ["hotel", "film", "meal", "concert", "guided tour", "restaurant", "book fair", "ferry trip"]
LANGUAGES = ["Spanish", "French", "German"]
TRANSLATIONS = {
    "good morning": ("buenos días", "bonjour", "guten Morgen"), "thank you": ("gracias", "merci", "danke"),
    "please": ("por favor", "s'il vous plaît", "bitte"), "yes": ("sí", "oui", "ja"),
    "no": ("no", "non", "nein"),
    "water": ("agua", "eau", "Wasser"), "bread": ("pan", "pain", "Brot"), "house": ("casa", "maison", "Haus"),
    "dog": ("perro", "chien", "Hund"), "cat": ("gato", "chat", "Katze"), "red": ("rojo", "rouge", "rot"),
    "book": ("libro", "livre", "Buch"), "sun": ("sol", "soleil", "Sonne"), "moon": ("luna", "lune", "Mond"),
    "milk": ("leche", "lait", "Milch"), "tree": ("árbol", "arbre", "Baum"),
    "Monday": ("lunes", "lundi", "Montag"),
    "one": ("uno", "un", "eins"), "two": ("dos", "deux", "zwei"), "ten": ("diez", "dix", "zehn"),
    "night": ("noche", "nuit", "Nacht"), "friend": ("amigo", "ami", "Freund"),
    "fish": ("pez", "poisson", "Fisch"),
    "door": ("puerta", "porte", "Tür"), "cheese": ("queso", "fromage", "Käse"),
    "hand": ("mano", "main", "Hand"),
}  # fmt: skip
PROCESSES = {
    "making tea": [
        "Boil the water.",
        "Pour it over the tea leaves.",
        "Wait three minutes.",
        "Drink the tea.",
    ],
    "posting a letter": ["Write the letter.", "Put it into an envelope.", "Close the envelope.", "Post it."],
    "planting a tree": [
        "Dig a hole.",
        "Set the tree into it.",
        "Fill the hole with earth.",
        "Water the tree.",
    ],
    "washing clothes": [
        "Sort the clothes.",
        "Fill the machine.",
        "Run the machine.",
        "Hang the clothes up to dry.",
    ],
    "painting a wall": [
        "Clean the wall.",
        "Put on the first coat.",
        "Let it dry.",
        "Put on the second coat.",
    ],
    "baking a cake": [
        "Mix the dough.",
        "Fill it into the tin.",
        "Bake it for an hour.",
        "Let the cake cool.",
    ],
    "borrowing a book": ["Choose the book.", "Take it to the desk.", "Read it at home.", "Bring it back."],
    "changing a bulb": [
        "Switch off the light.",
        "Take out the old bulb.",
        "Put in the new bulb.",
        "Test the light.",
    ],
    "taking a train": [
        "Buy a ticket.",
        "Wait on the platform.",
        "Board the train.",
        "Get off at your station.",
    ],
    "frying an egg": [
        "Heat the pan.",
        "Crack the egg into it.",
        "Fry it for two minutes.",
        "Put it on a plate.",
    ],
    "washing up": ["Fill the sink.", "Wash the plates.", "Dry the plates.", "Put them into the cupboard."],
    "mending a tyre": ["Take off the wheel.", "Find the hole.", "Stick a patch on it.", "Pump up the tyre."],
    "seeing a doctor": ["Call the surgery.", "Agree on a time.", "Go there.", "Describe what hurts."],
    "hanging a picture": [
        "Choose the place.",
        "Mark it with a pencil.",
        "Drive in a nail.",
        "Hang up the picture.",
    ],
    "making a salad": ["Wash the lettuce.", "Cut it up.", "Stir in the dressing.", "Serve the salad."],
    "growing beans": ["Dig over the bed.", "Sow the beans.", "Water them for weeks.", "Pick the beans."],
}


def capitals(rng: random.Random) -> Record:
    country, city = rng.choice(list(CAPITALS.items()))
    templates = [
        "What is the capital of {country}?",
        "Name the capital of {country}.",
        "{city} is the capital of which country?",
        "Which city is the capital of {country}?",
        "Of which country is {city} the capital?",
    ]
    return *ask(rng, templates, country=country, city=city), f"{city} is the capital of {country}."


def chemical_symbols(rng: random.Random) -> Record:
    name, (symbol, number) = rng.choice(list(ELEMENTS.items()))
    templates = [
        "What is the chemical symbol of {name}, and what is its atomic number?",
        "Which element has the symbol {symbol}? Give its atomic number too.",
        "Give symbol and atomic number of {name}.",
        "Name the element with the atomic number {number} and its symbol.",
        "Which element is number {number} in the periodic table, and how is it abbreviated?",
    ]
    answer = f"The element {name} has the symbol {symbol} and the atomic number {number}."
    return *ask(rng, templates, name=name, symbol=symbol, number=number), answer


def definitions(rng: random.Random) -> Record:
    word, meaning = rng.choice(list(DEFINITIONS.items()))
    templates = [
        "What is {text}?",
        "Explain in one sentence what {text} is.",
        "Define {text}.",
        "Tell a child what {text} is.",
        "Give a short explanation of this word.",
    ]
    noun = a_or_an(word)
    return *ask(rng, templates, noun), f"{noun.capitalize()} is {meaning}."


def animal_facts(rng: random.Random) -> Record:
    animal, (young, kind, legs) = rng.choice(list(ANIMALS.items()))
    noun = a_or_an(animal)
    asked, answer = rng.choice(
        [
            ("what its young is called", f"The young of {noun} is called {a_or_an(young)}."),
            ("which class of animals it belongs to", f"{noun.capitalize()} is {a_or_an(kind)}."),
            ("how many legs it has", f"{noun.capitalize()} has {legs} legs."),
        ]
    )
    templates = [
        "Think of {noun}. Tell me {asked}.",
        "Say of {noun} {asked}.",
        "A pupil asks about {noun} and wants to know {asked}. Answer in a sentence.",
        "Do you know {noun}? Please tell me {asked}.",
        "About {noun}: say {asked}.",
    ]
    return *ask(rng, templates, noun=noun, asked=asked), answer


def categories(rng: random.Random) -> Record:
    kind = rng.choice(list(CATEGORIES))
    options = ", ".join(CATEGORIES)
    templates = [
        'To which group does "{word}" belong: {options}?',
        'Classify the word "{word}" as one of: {options}.',
        'Choose the right label for "{word}" from this list: {options}.',
        'Is "{word}" one of these? Name the fitting one: {options}.',
        'Sort "{word}" into one of the groups {options}.',
    ]
    return *ask(rng, templates, word=rng.choice(CATEGORIES[kind]), options=options), kind


def odd_one_out(rng: random.Random) -> Record:
    many, single = rng.sample(list(CATEGORIES), 2)
    odd = rng.choice(CATEGORIES[single])
    words = rng.sample(CATEGORIES[many], 3) + [odd]
    rng.shuffle(words)
    templates = [
        "Which word does not belong with the others: {text}?",
        "Find the odd one out and say why.",
        "One of these words does not fit. Which one, and why?",
        "Pick the word that is out of place in {text}, with the reason.",
        "Three words belong together. Name the fourth and give the reason.",
    ]
    answer = f'"{odd}" does not fit: it is {a_or_an(single)}, the others belong to the group "{many}".'
    return *ask(rng, templates, ", ".join(words)), answer


def sentiment(rng: random.Random) -> Record:
    good = rng.random() < 0.5
    first, second = rng.sample(GOOD if good else BAD, 2)
    closing = rng.choice(PRAISE if good else BLAME)
    text = f"The {rng.choice(REVIEWED)} was {first}, even {second}, and {closing}."
    templates = [
        "Is this review positive or negative?",
        "Decide whether the opinion is positive or negative: {text}",
        "Classify the sentiment as positive or negative.",
        'Does "{text}" express a positive or a negative opinion?',
        "Label this comment as positive or negative.",
    ]
    return *ask(rng, templates, text), "positive" if good else "negative"


def translation(rng: random.Random) -> Record:
    english, foreign = rng.choice(list(TRANSLATIONS.items()))
    index = rng.randrange(3)
    templates = [
        'Translate "{text}" into {language}.',
        'What is "{text}" in {language}?',
        "Give the {language} for this word or phrase.",
        'How do you say "{text}" in {language}?',
        "Put this into {language}.",
    ]
    return *ask(rng, templates, english, language=LANGUAGES[index]), foreign[index]


def order_steps(rng: random.Random) -> Record:
    name, steps = rng.choice(list(PROCESSES.items()))
    mixed = steps
    while mixed == steps:
        mixed = rng.sample(steps, len(steps))
    templates = [
        "Put the steps of {name} into the right order and number them.",
        "These steps of {name} are mixed up. Write them as a numbered list in the right order.",
        "In which order are these steps done when {name}? Number them.",
        "Sort the steps of {name}: {text}",
        "Bring order into these instructions for {name}, one numbered line per step.",
    ]
    answer = "\n".join(f"{i}. {step}" for i, step in enumerate(steps, 1))
    return *ask(rng, templates, " ".join(mixed), name=name), answer


TASKS = [
    capitals, chemical_symbols, definitions, animal_facts, categories, odd_one_out, sentiment, translation,
    order_steps,
]  # fmt: skip
