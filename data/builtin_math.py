"""The built-in "math" pages: arithmetic that is always true, worked out in small steps.

Sums and differences of up to two digits belong to fact families: 17 + 25 = 42, 25 + 17 = 42,
42 - 17 = 25 and 42 - 25 = 17 are one family, and the whole family is either for training or held
out. No page of the corpus states a held-out family in any form, so that later stages can measure
arithmetic on pairs of numbers that no stage has seen. The table up to 9 + 9 is always for training:
held out is what must be worked out, not the facts it is worked out from.
"""

from collections.abc import Callable
from hashlib import blake2b

from data.builtin_words import Draw

HELD_OUT_ONE_IN = 5
SUM_MAX = 99  # no task has a larger sum


def split_of(kind: str, *operands: object) -> str:
    """The split, "train" or "heldout", of a question: decided by what it asks and nothing else."""
    key = " ".join(map(str, (kind, *operands)))
    digest = blake2b(key.encode(), digest_size=8).digest()
    return "train" if int.from_bytes(digest, "big") % HELD_OUT_ONE_IN else "heldout"


def sum_split(a: int, b: int) -> str:
    """The split of the fact family of a + b."""
    low, high = min(a, b), max(a, b)
    return "train" if high < 10 or low + high > SUM_MAX else split_of("sum", low, high)


def sum_pair(draw: Draw, split: str = "train", carry: bool = False) -> tuple[int, int]:
    """Two summands of a family of the split asked for; only with `carry` may a ten be carried."""
    while True:
        tens, ones = draw.between(0, 9), draw.between(0, 9)
        total = 10 * tens + ones
        a = draw.between(0, total) if carry else 10 * draw.between(0, tens) + draw.between(0, ones)
        if 0 < a < total and sum_split(a, total - a) == split:
            return a, total - a


def fact(draw: Draw) -> tuple[str, int]:
    """A sum or a difference of a training family, such as `("42 - 17", 25)`; few of them carry."""
    a, b = sum_pair(draw, carry=draw.chance(0.1))
    return (f"{a} + {b}", a + b) if draw.chance(0.4) else (f"{a + b} - {b}", a)


def quiz(draw: Draw) -> str:
    form, intro = draw.pick(
        (
            ("Question: What is {}?\nAnswer: {}", ""),
            ("Question: What is {}?\nAnswer: {}", "<Name>'s <day> quiz\n\n"),
            ("Q: What is {}? A: {}", "Questions for class <n>, <month>\n\n"),
            ("What is {}? It is {}.", "Mental arithmetic with <name>\n\n"),
            ("{} = {}", "Homework of <name> <surname>, <date> <month>\n\n"),
        )
    )
    facts = (fact(draw) for _ in range(draw.between(5, 12)))
    return draw.fill(intro) + "\n".join(form.format(*pair) for pair in facts)


def word_problem(draw: Draw) -> str:
    a, b = sum_pair(draw, carry=True)
    template = draw.pick(
        (
            "<Name> has <a> <thing_s> and gets <b> more from <name2>. How many <thing_s> does "
            "<name> have now?\n<a> + <b> = <c>. <Name> has <c> <thing_s>.",
            "There are <c> <animal_s> near the <land>. Then <b> of them go away. How many "
            "<animal_s> are left?\n<c> - <b> = <a>, so <a> <animal_s> are left.",
            "<A_job> in <town> sold <a> <fruit_s> on <day> and <b> on <day2>. How many <fruit_s> "
            "were sold together?\n<a> + <b> = <c>. The <job> sold <c> <fruit_s>.",
            "<Name> has <c> coins. <A_thing> costs <a> coins. How many coins are left after <he> "
            "buys it?\n<c> - <a> = <b>. <He> has <b> coins left.",
            "<Name> is <b> years younger than <name2>, who is <c>. How old is <name>?\n"
            "<c> - <b> = <a>. <Name> is <a> years old.",
        )
    )
    return draw.fill(template, a=a, b=b, c=a + b)


def column_addition(draw: Draw) -> str:
    a, b = draw.between(110, 899), draw.between(110, 899)
    lines = [draw.fill("[Add|We want to add|Column addition:] <a> and <b>.", a=a, b=b)]
    carry, rest_a, rest_b = 0, a, b
    for place in ("Ones", "Tens", "Hundreds"):
        x, y = rest_a % 10, rest_b % 10
        total = x + y + carry
        lines.append(f"{place}: {x} + {y}{' + 1' * carry} = {total}. Write {total % 10}.")
        carry, rest_a, rest_b = total // 10, rest_a // 10, rest_b // 10
        if carry:
            lines[-1] = lines[-1][:-1] + ", carry 1."
    if carry:
        lines.append("Thousands: write 1.")
    return "\n".join([*lines, f"So {a} + {b} = {a + b}."])


def column_subtraction(draw: Draw) -> str:
    b, rest = draw.between(110, 499), draw.between(110, 499)
    a = b + rest
    lines = [f"Subtract {b} from {a}."]
    lent, rest_a, rest_b = 0, a, b
    for place in ("Ones", "Tens", "Hundreds"):
        x, y = rest_a % 10 - lent, rest_b % 10
        notes = f"{x + 1} less the 1 lent, " * lent
        lent = int(x < y)
        notes += "borrow 10, " * lent
        lines.append(f"{place}: {notes}{x + 10 * lent} - {y} = {x + 10 * lent - y}.")
        rest_a, rest_b = rest_a // 10, rest_b // 10
    return "\n".join([*lines, f"So {a} - {b} = {rest}."])


def in_steps(draw: Draw) -> str:
    lines = [draw.fill("[How <name> adds in steps|Adding the tens first|Sums, step by step]:")]
    while len(lines) < 5:
        a, b = draw.between(11, 59), draw.between(11, 39)
        tens, ones = a - a % 10 + b - b % 10, a % 10 + b % 10
        steps = ((a, b), (a - a % 10, b - b % 10), (tens, ones))
        if all(sum_split(*step) == "train" for step in steps):
            sums = [f"{x} + {y} = {x + y}" for x, y in steps]
            lines.append(f"{a} + {b}: {sums[1]}, {a % 10} + {b % 10} = {ones}, {sums[2]}.")
    return "\n".join(lines)


def times_table(draw: Draw) -> str:
    k, first = draw.between(2, 15), draw.between(1, 5)
    head = draw.fill("[The table of <k>, for <name>|<Name> learns the table of <k>]", k=k)
    rows = range(first, first + draw.between(5, 9))
    return "\n".join([head + ":", *(f"{i} x {k} = {i * k}" for i in rows)])


def division(draw: Draw) -> str:
    a, b = draw.between(20, 99), draw.between(3, 9)
    return draw.fill(
        "<Name> [shares|divides] <a> <fruit_s> among <b> <animal_s>. <b> x <q> = <m>, so each "
        "<animal> gets <q> <fruit_s>. [Left over: <r>.|The rest is <r>.|The rest, <r>, is kept.]\n"
        "<a> : <b> = <q>, remainder <r>.",
        **{"a": a, "b": b, "q": a // b, "m": a // b * b, "r": a % b},
    )


def sequence(draw: Draw) -> str:
    lines = [draw.fill("[What comes next?|Continue the sequences.|Find the next number, <name>!]")]
    for _ in range(3):
        start, step = draw.between(1, 40), draw.between(2, 12)
        shown = ", ".join(str(start + step * i) for i in range(5))
        lines.append(f"{shown}: each is {step} more, so the next number is {start + 5 * step}.")
    return "\n".join(lines)


def equation(draw: Draw) -> str:
    k, x, b = draw.between(2, 9), draw.between(2, 12), draw.between(100, 300)
    return draw.fill(
        "[Solve|<Name> solves|For <day>: solve] the equation <k>x + <b> = <c>.\n"
        "Subtract <b> from both sides: <k>x = <kx>.\nDivide both sides by <k>: x = <x>.\n"
        "Check: <k> x <x> = <kx>, and <kx> + <b> = <c>.",
        **{"k": k, "x": x, "b": b, "kx": k * x, "c": k * x + b},
    )


def place_value(draw: Draw) -> str:
    number = draw.between(1111, 9999)
    digits = [int(digit) for digit in str(number)]
    names = ("thousands", "hundreds", "tens", "ones")
    parts = [f"{d} {name[:-1] if d == 1 else name}" for d, name in zip(digits, names, strict=True)]
    values = [digit * 10**power for digit, power in zip(digits, (3, 2, 1, 0), strict=True)]
    place = draw.between(0, 2)
    return (
        f"The number {number} has {', '.join(parts[:3])} and {parts[3]}.\n"
        f"{values[0]}, {values[1]}, {values[2]} and {values[3]} together make {number}.\n"
        f"The {names[place]} digit is {digits[place]}; it stands for {values[place]}."
    )


def comparison(draw: Draw) -> str:
    numbers = draw.sample(range(100, 999), 4)
    ordered = ", ".join(map(str, sorted(numbers)))
    big, small = max(numbers[:2]), min(numbers[:2])
    return draw.fill(
        "Put these numbers in order, the smallest first: <given>.\n<Name> writes: <ordered>.\n"
        "<big> is larger than <small>, and the largest of all is <largest>.",
        **{"given": ", ".join(map(str, numbers)), "ordered": ordered},
        **{"big": big, "small": small, "largest": max(numbers)},
    )


def conversion(draw: Draw) -> str:
    units = draw.sample(
        (
            ("metre", 100, "centimetre"), ("kilometre", 1000, "metre"), ("hour", 60, "minute"),
            ("kilogram", 1000, "gram"), ("week", 7, "day"), ("day", 24, "hour"),
            ("dozen", 12, "egg"), ("pound", 100, "penny"), ("minute", 60, "second"),
        ),
        4,
    )  # fmt: skip
    lines = [draw.fill("[Units|Changing units|Converting, with <name>]:")]
    for large, factor, small in units:
        k = draw.between(2, 12)
        smalls = "pence" if small == "penny" else small + "s"
        larges = large if large == "dozen" else large + "s"
        verb = draw.pick(("are", "are the same as", "make"))
        lines.append(
            f"{k} {larges} {verb} {k * factor} {smalls}, for {k} x {factor} = {k * factor}."
        )
    return "\n".join(lines)


def rectangle(draw: Draw) -> str:
    a, b = draw.between(3, 15), draw.between(3, 15)
    return draw.fill(
        "[The <room>|The garden|A field] of <name> is <a> metres long and <b> metres wide. What is "
        "its area?\n<a> x <b> = <area>, so the area is <area> square metres. To walk around it "
        "takes <around> metres, because 2 x <a> + 2 x <b> = <around>.",
        **{"a": a, "b": b, "area": a * b, "around": 2 * a + 2 * b},
    )


def clock(draw: Draw) -> str:
    hour, start, length = draw.between(1, 11), draw.between(0, 29), draw.between(5, 30)
    return draw.fill(
        "The <vehicle> leaves <town> at <start> and needs <length> minutes to <town2>. When does "
        "it arrive?\nIt arrives at <end>. <Name> waits there from <start> to <end>, so <he> waits "
        "<length> minutes.",
        **{"start": f"{hour}:{start:02}", "length": length, "end": f"{hour}:{start + length:02}"},
    )


def fraction(draw: Draw) -> str:
    parts, share = draw.pick(((2, "half"), (3, "a third"), (4, "a quarter"), (5, "a fifth")))
    k = draw.between(2, 25)
    return draw.fill(
        "<Name> gives <share> of <his> <whole> <thing_s> to <name2>. <whole> : <d> = <k>, so "
        "<name2> gets <k> <thing_s>. Indeed <d> x <k> = <whole>.",
        **{"share": share, "d": parts, "k": k, "whole": parts * k},
    )


def mean(draw: Draw) -> str:
    middle, spread = draw.between(110, 300), draw.between(1, 9)
    low, high = middle - spread, middle + spread
    return draw.fill(
        "<Name> counted <low> <animal_s> on <day>, <middle> on <day2> and <high> on <day3>. The "
        "sum is <low> + <middle> + <high> = <total>, and <total> : 3 = <middle>. The mean of the "
        "three numbers is <middle>.",
        **{"low": low, "middle": middle, "high": high, "total": 3 * middle},
    )


def even_odd(draw: Draw) -> str:
    numbers = [draw.between(1, 999) for _ in range(draw.between(4, 8))]
    lines = [f"Is {n} even? {'Yes' if n % 2 == 0 else 'No'}, it ends in {n % 10}." for n in numbers]
    return "\n".join(["Even numbers end in 0, 2, 4, 6 or 8.", *lines])


PAGES: tuple[Callable[[Draw], str], ...] = (
    quiz, quiz, quiz, word_problem, column_addition, column_subtraction, in_steps, times_table,
    division, sequence, equation, place_value, comparison, conversion, rectangle, clock, fraction,
    mean, even_odd,
)  # fmt: skip
