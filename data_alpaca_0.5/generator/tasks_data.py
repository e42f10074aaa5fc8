"""Tasks on structured data and on Python code. Each function computes or tabulates its answer."""

import json
import random

from wording import CITIES, JOBS, Record, a_or_an, ask, person

GOODS = ["rice", "tea", "honey", "flour", "salt", "cheese", "butter", "pasta", "coffee", "sugar"]
FUNCTIONS = [
    ("add_{n}", "x", "adds {n} to its argument", "return x + {n}"),
    ("times_{n}", "x", "multiplies its argument by {n}", "return x * {n}"),
    ("minus_{n}", "x", "subtracts {n} from its argument", "return x - {n}"),
    ("divisible_by_{n}", "x", "tells whether an integer is divisible by {n}", "return x % {n} == 0"),
    ("larger_than_{n}", "x", "tells whether its argument is larger than {n}", "return x > {n}"),
    ("first_{n}", "items", "returns the first {n} elements of a list", "return items[:{n}]"),
    ("last_{n}", "items", "returns the last {n} elements of a list", "return items[-{n}:]"),
    ("repeat_{n}", "text", "repeats a string {n} times", "return text * {n}"),
    ("power_{n}", "x", "raises its argument to the power {n}", "return x ** {n}"),
    ("multiples_of_{n}", "count", "lists the first count multiples of {n}, starting with {n} itself",
     "return [{n} * i for i in range(1, count + 1)]"),
    ("count_above_{n}", "items", "counts the elements of a list that are larger than {n}",
     "return sum(1 for item in items if item > {n})"),
    ("at_most_{n}", "x", "returns its argument, but never more than {n}", "return min(x, {n})"),
]  # fmt: skip


def facts_of_person(rng: random.Random) -> tuple[str, int, str, str]:
    return person(rng), rng.randint(19, 70), rng.choice(CITIES), rng.choice(JOBS)


def to_json(rng: random.Random) -> Record:
    name, age, city, job = facts_of_person(rng)
    text = f"{name} is {age} years old, lives in {city} and works as {a_or_an(job)}."
    templates = [
        "Write the data as a JSON object with the keys name, age, city and job.",
        "Turn this into JSON with the keys name, age, city and job: {text}",
        "Extract name, age, city and job from the sentence as one JSON object.",
        "Give me a JSON object (name, age, city, job) for this person.",
        "{text} Write that as JSON with the keys name, age, city and job.",
    ]
    answer = json.dumps({"name": name, "age": age, "city": city, "job": job})
    return *ask(rng, templates, text), answer


def from_json(rng: random.Random) -> Record:
    name, age, city, job = facts_of_person(rng)
    text = json.dumps({"name": name, "age": age, "city": city, "job": job})
    templates = [
        "Describe the person in this record in one sentence.",
        "Write a sentence with everything the JSON object says.",
        "Put this record into words: {text}",
        "Turn the data into an English sentence.",
        "Introduce the person described by {text}",
    ]
    return *ask(rng, templates, text), f"{name} is {age} years old, lives in {city} and works as {a_or_an(job)}."


def to_csv(rng: random.Random) -> Record:
    rows = [(good, rng.randint(2, 90), rng.randint(2, 20)) for good in rng.sample(GOODS, rng.randint(2, 4))]
    text = " ".join(f"There are {n} packets of {good} at {price} euros." for good, n, price in rows)
    answer = "product,packets,price\n" + "\n".join(f"{good},{n},{price}" for good, n, price in rows)
    templates = [
        "Write the stock as CSV with the columns product, packets and price.",
        "Make a CSV table (product, packets, price) from this text: {text}",
        "Convert the description to CSV with the header product,packets,price.",
        "Put the data into comma-separated lines under the header product,packets,price.",
        "{text} Give that as CSV with the columns product, packets, price.",
    ]
    return *ask(rng, templates, text), answer


def table_lookup(rng: random.Random) -> Record:
    rows = [(good, rng.randint(2, 90), rng.randint(2, 20)) for good in rng.sample(GOODS, 4)]
    text = "product,packets,price\n" + "\n".join(f"{good},{n},{price}" for good, n, price in rows)
    good, n, price = rng.choice(rows)
    templates = [
        "What does one packet of {good} cost, and how many packets are there?",
        "Look up {good} in the table and give its price and number of packets.",
        "Read the price and the number of packets of {good} from the table.",
        "Find {good} in this table. What is its price, and how many packets are left?",
        "Tell me price and stock of {good}.",
    ]
    return *ask(rng, templates, text, good=good), f"One packet of {good} costs {price} euros; there are {n} packets."


def set_operations(rng: random.Random) -> Record:
    shared = rng.sample(range(1, 40), 6)
    a, b = set(shared[:4]), set(shared[2:])
    operation, result = rng.choice([("union", a | b), ("intersection", a & b), ("difference", a - b)])
    templates = [
        "Give the {operation} of the sets A = {a} and B = {b}.",
        "A = {a}, B = {b}. What is the {operation} of A and B?",
        "Let A be {a} and B be {b}. Write down the {operation} of A and B.",
        "Find the {operation} of {a} and {b}.",
        "Compute the {operation} of the first set, {a}, and the second set, {b}.",
    ]
    return *ask(rng, templates, operation=operation, a=braces(a), b=braces(b)), braces(result)


def braces(numbers: set[int]) -> str:
    return "{" + ", ".join(map(str, sorted(numbers))) + "}"


def code_output(rng: random.Random) -> Record:
    n, k, word = rng.randint(3, 9), rng.randint(2, 9), rng.choice(GOODS)
    numbers = [rng.randint(1, 30) for _ in range(rng.randint(3, 5))]
    snippets = [
        (f"x = {n}\ny = x * {k}\nprint(y - 1)", str(n * k - 1)),
        (f"total = 0\nfor i in range({n}):\n    total += {k}\nprint(total)", str(n * k)),
        (f'word = "{word}"\nprint(word.upper(), len(word) + {k})', f"{word.upper()} {len(word) + k}"),
        (f"items = {numbers}\nprint(max(items) - min(items))", str(max(numbers) - min(numbers))),
        (f"items = {numbers}\nprint(sorted(items))", str(sorted(numbers))),
        (f"items = {numbers}\nfor item in items:\n    print(item + {k})",
         "\n".join(str(number + k) for number in numbers)),
        (f"print([i * {k} for i in range({n})])", str(list(range(0, n * k, k)))),
        (f"a, b = {n}, {k}\na, b = b, a\nprint(a, b)", f"{k} {n}"),
        (f"x = {n * 7}\nif x > {k * 7}:\n    print('large')\nelse:\n    print('small')",
         "large" if n > k else "small"),
        (f'print("{word}"[::-1] * {k % 3 + 1})', word[::-1] * (k % 3 + 1)),
    ]  # fmt: skip
    code, answer = rng.choice(snippets)
    templates = [
        "What does this Python program print?",
        "Give the output of the following Python code.",
        "Read the Python code and write exactly what it prints.",
        "Run this program in your head. What is its output?",
        "What is printed by this code?\n{text}",
    ]
    return *ask(rng, templates, code), answer


def code_writing(rng: random.Random) -> Record:
    name, argument, purpose, body = rng.choice(FUNCTIONS)
    n = rng.randint(2, 25)
    name, purpose = name.format(n=n), purpose.format(n=n)
    templates = [
        "Write a Python function {name}({argument}) that {purpose}.",
        "In Python, define {name}({argument}), a function that {purpose}.",
        "I need a Python function called {name}, with the argument {argument}, that {purpose}.",
        "Program a function {name}({argument}) in Python. It {purpose}.",
        "Show the Python code of a function {name}({argument}) that {purpose}.",
    ]
    answer = f"def {name}({argument}):\n    {body.format(n=n)}"
    return *ask(rng, templates, name=name, argument=argument, purpose=purpose), answer


TASKS = [
    to_json, from_json, to_csv, table_lookup, set_operations, code_output, code_writing,
]  # fmt: skip
