"""Tasks on numbers. Each function draws one question and computes its answer."""

import math
import random

from wording import PEOPLE, Record, ask, join_and, person

ONES = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]  # fmt: skip
TENS = ["zero", "ten", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
ROMAN = [
    (1000, "M"), (900, "CM"), (500, "D"), (400, "CD"), (100, "C"), (90, "XC"), (50, "L"),
    (40, "XL"), (10, "X"), (9, "IX"), (5, "V"), (4, "IV"), (1, "I"),
]  # fmt: skip
UNITS = [
    ("kilometres", "metres", 1000), ("metres", "centimetres", 100), ("centimetres", "millimetres", 10),
    ("kilograms", "grams", 1000), ("litres", "millilitres", 1000), ("hours", "minutes", 60),
    ("minutes", "seconds", 60), ("days", "hours", 24), ("weeks", "days", 7), ("tonnes", "kilograms", 1000),
    ("feet", "inches", 12), ("yards", "feet", 3), ("years", "months", 12),
]  # fmt: skip
THINGS = ["apples", "marbles", "stamps", "pencils", "shells", "postcards", "buttons", "walnuts", "stickers"]
GOODS = ["notebooks", "pens", "lamps", "mugs", "towels", "baskets", "candles", "plates", "brushes", "scarves"]


def arithmetic(rng: random.Random) -> Record:
    sign = rng.choice("+-*/")
    a, b = rng.randint(10, 400), rng.randint(10, 400)
    if sign == "-":
        a, b = max(a, b), min(a, b)
    if sign in "*/":
        a, b = rng.randint(3, 60), rng.randint(2, 12)
    if sign == "/":
        a = a * b
    value = {"+": a + b, "-": a - b, "*": a * b, "/": a // b}[sign]
    templates = [
        "What is {text}?",
        "Calculate {text}.",
        "How much is {text}?",
        "Work out the value of the expression.",
        "Evaluate this calculation and reply with the number only.",
        "I need the result of {text}, please.",
    ]
    return *ask(rng, templates, f"{a} {sign} {b}"), str(value)


def word_problem(rng: random.Random) -> Record:
    name, things = person(rng), rng.choice(THINGS)
    a, b, c = rng.randint(12, 60), rng.randint(3, 12), rng.randint(2, 10)
    stories = [
        (
            f"{name} has {a} {things}. Then {PEOPLE[name]} buys {b} more and gives {c} to a friend. "
            f"How many {things} does {name} have now?",
            f"{a} + {b} = {a + b} and {a + b} - {c} = {a + b - c}. {name} has {a + b - c} {things} now.",
        ),
        (
            f"One box holds {a} {things}. How many {things} are there in {b} full boxes?",
            f"{b} * {a} = {a * b}. There are {a * b} {things} in {b} full boxes.",
        ),
        (
            f"{name} shares {a * b} {things} equally among {b} children. How many does each child get?",
            f"{a * b} / {b} = {a}. Each child gets {a} {things}.",
        ),
        (
            f"A lorry drives at {a} kilometres per hour for {c} hours. How far does it go?",
            f"{a} * {c} = {a * c}. The lorry goes {a * c} kilometres.",
        ),
        (
            f"{name} saves {b} euros every week. After how many weeks is that {a * b} euros?",
            f"{a * b} / {b} = {a}. {name} has {a * b} euros after {a} weeks.",
        ),
    ]
    text, answer = rng.choice(stories)
    templates = [
        "{text}",
        "Solve this word problem and show the calculation.",
        "Read the story and answer the question at its end.",
        "Help me with my homework: {text}",
        "Give the calculation and then the answer in a sentence.",
        "Here is a small problem. {text} Show your working.",
    ]
    return *ask(rng, templates, text), answer


def simplify_fraction(rng: random.Random) -> Record:
    p, q, k = rng.randint(1, 12), rng.randint(2, 15), rng.randint(2, 9)
    g = math.gcd(p, q)
    p, q = p // g, q // g
    answer = f"{p}/{q}" if q > 1 else str(p)
    templates = [
        "Simplify the fraction {text}.",
        "Write {text} in lowest terms.",
        "Reduce this fraction as far as possible.",
        "What is {text} in its simplest form?",
        "Cancel the common factors of the fraction.",
    ]
    return *ask(rng, templates, f"{p * k}/{q * k}"), answer


def percent(rng: random.Random) -> Record:
    rate, base = rng.choice([5, 10, 15, 20, 25, 30, 40, 50, 60, 75, 80, 90]), 20 * rng.randint(2, 60)
    templates = [
        "What is {rate}% of {base}?",
        "Calculate {rate} percent of {base}.",
        "A shop has {base} articles and {rate}% of them are on sale. How many is that?",
        "Of {base} people asked, {rate}% said yes. How many people said yes?",
        "How much is {rate} per cent of {base}?",
    ]
    value = rate * base // 100
    return *ask(rng, templates, rate=rate, base=base), f"{rate}% of {base} is {value}."


def prime_or_not(rng: random.Random) -> Record:
    n = rng.randint(2, 200)
    factor = next((d for d in range(2, n) if n % d == 0), None)
    templates = [
        "Is {text} a prime number?",
        "Tell me whether {text} is prime.",
        "Decide whether the number is prime, and give a factor if it is not.",
        "Check this number: is it prime?",
        "Does {text} have divisors other than 1 and itself?",
    ]
    answer = f"{n} is not prime: {n} = {factor} * {n // factor}." if factor else f"{n} is prime."
    return *ask(rng, templates, str(n)), answer


def even_or_odd(rng: random.Random) -> Record:
    numbers = rng.sample(range(1, 100), rng.randint(5, 8))
    wanted = rng.choice(["even", "odd"])
    found = [str(n) for n in numbers if n % 2 == (wanted == "odd")]
    templates = [
        "Which of these numbers are {kind}: {text}?",
        "List the {kind} numbers in the order given.",
        "Pick out all {kind} numbers from {text}.",
        "Keep only the {kind} numbers.",
        "From the list {text}, give me those that are {kind}.",
    ]
    text = ", ".join(map(str, numbers))
    return *ask(rng, templates, text, kind=wanted), ", ".join(found) or "none"


def in_words(n: int) -> str:
    """A number from 0 to 9999 in British English words."""
    if n < 20:
        return ONES[n]
    if n < 100:
        return TENS[n // 10] + (f"-{ONES[n % 10]}" if n % 10 else "")
    if n < 1000:
        return f"{ONES[n // 100]} hundred" + (f" and {in_words(n % 100)}" if n % 100 else "")
    rest = n % 1000
    joint = " and " if 0 < rest < 100 else " "
    return f"{ONES[n // 1000]} thousand" + (joint + in_words(rest) if rest else "")


def number_words(rng: random.Random) -> Record:
    n = rng.randint(13, 9999)
    templates = [
        "Write {text} in words.",
        "Spell out the number {text}.",
        "How do you write {text} with letters?",
        "Turn the digits into words.",
        "Write this number the way you would say it.",
    ]
    return *ask(rng, templates, str(n)), in_words(n)


def roman_numerals(rng: random.Random) -> Record:
    n = rest = rng.randint(4, 2100)
    roman = ""
    for value, letters in ROMAN:
        roman += letters * (rest // value)
        rest %= value
    if rng.random() < 0.5:
        templates = [
            "Write {text} as a Roman numeral.",
            "Convert the number to Roman numerals.",
            "How did the Romans write {text}?",
        ]
        return *ask(rng, templates, str(n)), roman
    templates = [
        "Which number is the Roman numeral {text}?",
        "Convert the Roman numeral to an ordinary number.",
        "What does {text} stand for in Roman numerals?",
    ]
    return *ask(rng, templates, roman), str(n)


def sequence(rng: random.Random) -> Record:
    start, step = rng.randint(1, 40), rng.randint(2, 12)
    kind = rng.choice(["up", "down", "times", "squares"])
    if kind == "up":
        terms = [start + i * step for i in range(7)]
    elif kind == "down":
        terms = [start + (7 - i) * step for i in range(7)]
    elif kind == "times":
        ratio = rng.choice([2, 3])
        terms = [start * ratio**i for i in range(7)]
    else:
        terms = [(start + i) ** 2 for i in range(7)]
    templates = [
        "Continue the sequence with three more terms: {text}",
        "Which three numbers come next? {text}",
        "Give the next three terms of the sequence.",
        "The numbers follow a rule. Write the three that come next.",
        "Find the rule behind {text} and give the next three numbers.",
    ]
    text = ", ".join(map(str, terms[:4]))
    return *ask(rng, templates, text), ", ".join(map(str, terms[4:]))


def sort_numbers(rng: random.Random) -> Record:
    numbers = rng.sample(range(-30, 200), rng.randint(5, 9))
    down = rng.random() < 0.5
    order = "from largest to smallest" if down else "from smallest to largest"
    templates = [
        "Sort these numbers {order}: {text}",
        "Arrange the numbers {order}.",
        "Put {text} in order {order}.",
        "List the following numbers {order}.",
        "Please order {text} {order}.",
    ]
    text = ", ".join(map(str, numbers))
    return *ask(rng, templates, text, order=order), ", ".join(map(str, sorted(numbers, reverse=down)))


def compare_numbers(rng: random.Random) -> Record:
    a, b = rng.sample(range(101, 1200), 2)
    x, y = rng.choice([(str(a), str(b)), (f"{a / 100:g}", f"{b / 100:g}")])
    templates = [
        "Which is larger, {x} or {y}?",
        "Compare {x} and {y}.",
        "Which of the two numbers is the bigger one: {x} or {y}?",
        "Is {x} more or less than {y}?",
        "Tell me which number is greater: {x} or {y}.",
    ]
    big, small = (x, y) if a > b else (y, x)
    return *ask(rng, templates, x=x, y=y), f"{big} is larger than {small}."


def unit_conversion(rng: random.Random) -> Record:
    large, small, factor = rng.choice(UNITS)
    n = rng.randint(2, 40)
    question = (n, large, n * factor, small)
    if rng.random() < 0.4:
        question = (n * factor, small, n, large)
    given, unit, value, target = question
    templates = [
        "Convert {given} {unit} to {target}.",
        "How many {target} are {given} {unit}?",
        "Express {given} {unit} in {target}.",
        "{given} {unit} equal how many {target}?",
        "I have {given} {unit}. What is that in {target}?",
    ]
    answer = f"{given} {unit} are {value} {target}."
    return *ask(rng, templates, given=given, unit=unit, target=target), answer


def statistics(rng: random.Random) -> Record:
    numbers = [rng.randint(1, 60) for _ in range(rng.choice([4, 5, 6]))]
    numbers[-1] += -sum(numbers) % len(numbers)  # makes the mean a whole number
    templates = [
        "Give the minimum, maximum, sum and mean of {text}.",
        "Describe the numbers by minimum, maximum, sum and mean, one per line.",
        "Find the smallest value, the largest value, the sum and the mean.",
        "Summarise the list {text} with its minimum, maximum, sum and mean.",
        "What are the minimum, maximum, sum and mean of these numbers?",
    ]
    answer = f"Minimum: {min(numbers)}\nMaximum: {max(numbers)}\nSum: {sum(numbers)}"
    answer += f"\nMean: {sum(numbers) // len(numbers)}"
    return *ask(rng, templates, ", ".join(map(str, numbers))), answer


def shopping_bill(rng: random.Random) -> Record:
    items = [(rng.randint(2, 9), name, rng.randint(2, 15)) for name in rng.sample(GOODS, rng.randint(2, 3))]
    text = join_and([f"{n} {name} at {price} euros each" for n, name, price in items])
    lines = [f"{name}: {n} * {price} = {n * price} euros" for n, name, price in items]
    lines.append(f"Total: {sum(n * price for n, _, price in items)} euros")
    templates = [
        "Write the bill for {text}.",
        "A customer buys {text}. Make out the bill line by line.",
        "Add up this purchase, one line per article and the total last.",
        "Work out the cost of each article and the total.",
        "What does it cost to buy {text}? Show every line.",
    ]
    return *ask(rng, templates, text), "\n".join(lines)


TASKS = [
    arithmetic, word_problem, simplify_fraction, percent, prime_or_not, even_or_odd, number_words,
    roman_numerals, sequence, sort_numbers, compare_numbers, unit_conversion, statistics, shopping_bill,
]  # fmt: skip
