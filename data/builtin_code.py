"""Templates of the built-in "code" pages: small Python, and some SQL, shell and configuration.

What the marks mean is in `builtin_words.py`. Every page in `PYTHON` compiles whatever is drawn.
"""

HEADER = (
    "[#|# <module>.py:] [the <item2_s>|helpers|tools] of the <town> <module>"
    "[, by <name>|, <recent>]\n\n"
)

PYTHON = (
    '''def count_<item_s>(<item_s>, <field>):
    """Return how many <item_s> have the given <field>."""
    found = 0
    for <item> in <item_s>:
        if <item>.<field> == <field>:
            found += 1
    return found


def test_count_<item_s>():
    assert count_<item_s>([], "<colour>") == 0
    assert count_<item_s>([], <n>) == 0
''',
    '''def find_<quality>_<item>(<item_s>, limit=<hundred>):
    """Return the first <item> whose <amount> is [above|at least] the limit, or None."""
    for <item> in <item_s>:
        if <item>["<amount>"] [>|>=] limit:
            return <item>
    return None


<item_s> = [
    {"<amount>": <grams>, "<field>": "<thing>"},
    {"<amount>": <hundred2>, "<field>": "<thing2>"},
]
print(find_<quality>_<item>(<item_s>))
''',
    '''class <Item>:
    """[A|One] <item> of the <module>, with <a_field> and <a_amount>."""

    def __init__(self, <field>, <amount>=<n>):
        self.<field> = <field>
        self.<amount> = <amount>

    def is_<quality>(self):
        """Tell whether the <amount> is larger than <price>."""
        return self.<amount> > <price>

    def __repr__(self):
        return f"<Item>({self.<field>}, {self.<amount>})"


<item> = <Item>("<thing>")
print(<item>.is_<quality>())
''',
    '''import json


def load_<item_s>(path):
    """Read the <item_s> of the <module> from a JSON file."""
    with open(path) as file:
        <item_s> = json.load(file)
    return [<item> for <item> in <item_s> if <item>["<field>"] != "<colour>"]


def save_<item_s>(path, <item_s>):
    """Write the <item_s> to a JSON file, sorted by <field>."""
    <item_s> = sorted(<item_s>, key=lambda <item>: <item>["<field>"])
    with open(path, "w") as file:
        json.dump(<item_s>, file, indent=<n>)
''',
    '''def <amount>_of_<item>(<item>):
    """Return the <field> of <a_item>[, or <n> if it has none|; never negative]."""
    <field> = <item>.get("<field>", <n>)
    if <field> < 0:
        return 0
    return <field>


def total_<field>(<item_s>):
    """Add up the <field> of all <item_s>."""
    return sum(<field>_of_<item>(<item>) for <item> in <item_s>)


assert total_<field>([]) == 0
assert total_<field>([{"<field>": <n2>}, {"<field>": <n3>}]) == <n2+n3>
''',
    '''<item_s> = {
    "<thing>": <price>,
    "<thing2>": <price2>,
    "<thing3>": <price3>,
}


def <amount>_of(name):
    """Look up the <field> of a thing in the <module>."""
    if name not in <item_s>:
        raise KeyError(f"no such <item>: {name}")
    return <item_s>[name]


print(<field>_of("<thing2>"))  # prints <price2>
''',
    """from <module> import <Item>, make_<item>


def test_<item>_has_<field>():
    <item> = make_<item>(<field>="<colour>")
    assert <item>.<field> == "<colour>"


def test_<quality>_<item>():
    <item> = <Item>("<name>", <n>)
    <item>.<amount> = <price>
    assert <item>.<amount> == <price>
    assert not <item>.is_<quality>()


def test_<item>_is_not_<quality2>():
    assert not make_<item>().is_<quality2>()
""",
    '''def group_by_<field>(<item_s>):
    """Put the <item_s> into lists, one for each <field>."""
    groups = {}
    for <item> in <item_s>:
        groups.setdefault(<item>.<field>, []).append(<item>)
    return groups


def largest_group(<item_s>):
    """Return the <field> that most <item_s> have."""
    groups = group_by_<field>(<item_s>)
    return max(groups, key=lambda <field>: len(groups[<field>]))
''',
    '''def <quality>_<item_s>(n):
    """[Yield|Give] the first n <item_s>, one [at a time|after the other]."""
    <item> = <n>
    for i in range(n):
        yield <item>
        <item> = <item> * <n2> + i


for <item> in <quality>_<item_s>(<price>):
    if <item> % <n3> == 0:
        print("<field>", <item>)
''',
    """import argparse


def main():
    parser = argparse.ArgumentParser(description="Print the <item_s> of the <module>")
    parser.add_argument("--<field>", default="<colour>")
    parser.add_argument("--<amount>", type=int, default=<price>)
    arguments = parser.parse_args()
    for i in range(arguments.<amount>):
        print(i, arguments.<field>)


if __name__ == "__main__":
    main()
""",
    '''from dataclasses import dataclass


@dataclass
class <Item>:
    """[A|Each] <item> in the <module>."""

    <field>: str
    <amount>: int = <price>
    <quality>: bool = [True|False]

    def with_<amount>(self, <amount>):
        """Return the same <item> with another <amount>."""
        return <Item>(self.<field>, <amount>, self.<quality>)


first = <Item>("<name>").with_<amount>(<hundred>)
''',
    '''def is_<quality>(<item>):
    """Check the <field> of <a_item>."""
    if not <item>:
        return False
    if len(<item>) > <n>:
        return <item>[0] == "<colour>"
    return "<thing>" in <item>


<item_s> = ["<colour>", "<thing>", "<fruit>", "<animal>"]
print([<item> for <item> in <item_s> if is_<quality>(<item>)])
''',
    '''class <Module>Error(Exception):
    """Something went wrong in the <module>."""


def check_<amount>(<amount>):
    """Refuse <a_amount> that is not between <n> and <hundred>."""
    if <amount> < <n>:
        raise <Module>Error("<amount> is too small")
    if <amount> > <hundred>:
        raise <Module>Error("<amount> is too large")
    return <amount>


try:
    check_<amount>(<grams>)
except <Module>Error as error:
    print(error)
''',
)

OTHER = (
    """-- the <module> database
CREATE TABLE <item_s> (
    id INTEGER PRIMARY KEY,
    <field> TEXT NOT NULL,
    <amount> INTEGER DEFAULT <n>
);

INSERT INTO <item_s> (<field>, <amount>) VALUES ('<thing>', <price>);
INSERT INTO <item_s> (<field>, <amount>) VALUES ('<animal>', <price2>);

SELECT <field>, <amount> FROM <item_s> WHERE <amount> > <n2> ORDER BY <field>;
""",
    """SELECT <item2_s>.<field>, COUNT(*) AS <amount>
FROM <item_s>
JOIN <item2_s> ON <item2_s>.id = <item_s>.<item2>_id
WHERE <item_s>.<field2> = '<colour>' AND <item_s>.year > <recent>
GROUP BY <item2_s>.<field>
HAVING COUNT(*) > <n>
LIMIT <price>;
""",
    """#!/bin/sh
# [Copy|Save|Move] the <item_s> of the <module> every <day>
set -e
SOURCE=/home/<module>/<item_s>
TARGET=/backup/<colour>

mkdir -p $TARGET
for file in $SOURCE/*.txt; do
    echo "saving $file"
    cp "$file" $TARGET/
done
ls $TARGET | wc -l
tail -n <price> /var/log/<module>.log | grep <field>
""",
    """# settings of the <module>
name: <thing>
version: <n>.<n2>.<n3>
<item_s>:
  - <field>: <colour>
    <amount>: <price>
  - <field>: <colour2>
    <amount>: <price2>
limits:
  <amount>: <hundred>
  <item_s>: <grams>
debug: [true|false]
""",
    """{
  "<module>": {
    "<field>": "<town>",
    "<amount>": <hundred>,
    "<item_s>": ["<thing>", "<thing2>", "<thing3>"],
    "<quality>": [true|false]
  },
  "owner": {"name": "<name> <surname>", "age": <oldage>}
}
""",
    """[[server|client]]
host = <module>.<town>.org
port = <hundred>
<field> = <colour>

# <item_s>
max_<item_s> = <grams>
<amount> = <price>
<quality> = [yes|no]
log = /var/log/<item_s>.log
""",
    """# <Module>

A small tool that shows the <item_s> of the <module>, by <name> <surname>.

## Use

    python <module>.py --<field> <colour> --<amount> <price>

It prints one line for each <quality> <item>. [Tests are in tests/.|See also <module2>.py.]

## Changes

- <n>.<n2>: <item_s> have <a_field> now
- <n>.0: first version, <date> <month> <recent>
""",
)

TEMPLATES = (*[HEADER + page for page in PYTHON], *OTHER)
