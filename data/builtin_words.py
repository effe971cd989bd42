"""Seeded draws, word lists and templates that remember: what every built-in text is made of.

A template is plain text with two marks. `[one|two|three]` picks one of its alternatives; `<thing>`
draws a word of that category and remembers it, so that `<thing>` further down is the same thing and
`<thing2>` is another one. `<a_thing>` adds the article, `<thing_s>` is the plural, `<Thing>` is
capitalised, `<he>`, `<him>` and `<his>` follow `<name>`, and `<n+n2>` is a sum. Phrases may hold
marks themselves, so the lists are a context-free grammar with a memory.

Only `random.Random(str)` and its `random()` are used: of Python's generator those two are promised
to stay the same for ever, while `choice`, `shuffle` and `randrange` may change between versions.
"""

import random
import re
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

_WORDS = {
    "girl": "Ada Anna Bea Clara Dora Ella Emma Eva Fay Greta Hanna Ida Iris Julia Kate Lena Lily "
    "Maya Mia Nina Nora Olga Rosa Ruth Sara Sofia Tess Vera Wanda Zoe",
    "boy": "Adam Alan Ben Carl David Emil Erik Felix Finn George Hugo Ivan Jack Jonas Karl Leo "
    "Luca Mark Max Noah Omar Oscar Paul Peter Ravi Sam Tom Victor Will Yusuf",
    "surname": "Baker Brook Carter Dale Fisher Field Gray Hill Hunter Lake Mason Miller Moor North "
    "Park Potter Reed Rivers Shaw Stone Taylor Turner Vale Ward West Winter Wood Young",
    "townstart": "Ash Birch Black Clear Cold Deep East Elm Fair Fox Green Grey High Long Maple "
    "Mill New North Oak Old Red Rose Salt Sand Silver South Stone Summer Swan West White Winter",
    "townend": "bridge brook bury dale field ford gate ham haven hill mouth port ton well wood",
    "colour": "red blue green yellow white black brown grey orange purple pink golden",
    "size": "small large tiny huge little big heavy",
    "look": "old new bright plain round broken shiny dusty wooden painted simple strange pretty "
    "clean empty elegant ugly",
    "kind": "kind clever shy brave friendly patient cheerful quiet careful funny gentle proud",
    "mood": "happy sad tired proud hungry angry nervous calm curious lonely excited glad",
    "gloom": "sad lonely unhappy gloomy worried bitter",
    "thing": "lamp clock kettle basket umbrella key ring book map mirror drum flute kite bell "
    "candle blanket bottle box brush bucket button camera chair coin comb cup doll envelope hammer "
    "hat helmet jar knife ladder letter mug needle oar pan pencil pillow plate pot radio rope "
    "ruler scarf shell shovel spoon stamp telescope ticket torch vase violin wallet watch whistle "
    "apron axe",
    "animal": "cat dog horse cow goat hen duck goose rabbit mouse owl fox wolf bear otter badger "
    "hedgehog squirrel frog crow eagle swan donkey pig turtle snake lizard beaver seal ant",
    "pet": "cat dog rabbit parrot hamster pony turtle goldfinch kitten puppy owl donkey",
    "fruit": "apple pear plum cherry peach lemon orange banana melon fig grape apricot strawberry "
    "mango",
    "vegetable": "carrot onion potato leek turnip tomato cabbage pepper bean beetroot pea",
    "herb": "parsley mint thyme basil sage dill rosemary",
    "food": "bread cheese toast rice honey butter porridge salad fish cake pie pasta yoghurt jam",
    "drink": "tea coffee milk water juice cocoa lemonade cider",
    "tree": "oak elm ash birch pine willow maple beech alder apple",
    "flower": "rose tulip lily daisy iris poppy violet aster orchid sunflower",
    "place": "market school library station bridge harbour park mill church museum bakery garden "
    "square inn farm hospital bank theatre workshop castle",
    "room": "kitchen attic cellar hall bedroom study bathroom garage office",
    "land": "river lake forest hill valley island desert beach mountain meadow marsh cliff",
    "job": "baker teacher doctor nurse farmer painter tailor driver singer writer sailor carpenter "
    "gardener engineer miller cook actor clerk judge potter artist",
    "relation": "sister brother mother father aunt uncle cousin grandmother grandfather",
    "subject": "history music maths science art geography reading sport chemistry",
    "game": "chess football tennis cards hockey darts golf marbles",
    "season": "spring summer autumn winter",
    "month": "January February March April May June July August September October November "
    "December",
    "day": "Monday Tuesday Wednesday Thursday Friday Saturday Sunday",
    "daytime": "morning afternoon evening",
    "weather": "sunny cloudy windy rainy foggy snowy stormy warm cold frosty",
    "material": "wood glass iron paper stone wool cotton silver clay leather",
    "vehicle": "train bus boat bicycle car cart lorry tram ferry taxi",
    "manner": "slowly quickly quietly carefully gently calmly patiently",
    "direction": "north south east west",
    "number": "two three four five six seven eight nine ten twelve",
    "ordinal": "first second third fourth fifth sixth",
    "item": "item order user file word line record price score point message task event page "
    "player student city sensor row token",
    "field": "name colour owner status title label grade country language",
    "amount": "size count weight length height level rank speed depth width",
    "module": "shop garden library school station kitchen museum bakery harbour bank zoo theatre",
    "quality": "long short new valid heavy cheap empty public active ready",
}
_PHRASES = {
    "spot": """
        under the bed
        behind the door
        on the table
        in the drawer
        by the window
        near the stove
        on the top shelf
        inside the old box
        at the bottom of the bag
        next to the sink""",
    "lost": """
        <he> had left it in the <room>
        the wind had carried it away
        <a_animal> had taken it
        it had fallen behind the <look2> <thing3>
        <name2> had borrowed it
        it was still at the <place2>
        <his> <relation2> had sold it to <a_job>
        it was in <his> own pocket""",
    "opening": """
        <Name> was <a_kind> child of <age> who lived in <town>.
        In <town>, not far from the <land>, there lived <a_job> called <name>.
        This is the story of <name>, who was always <mood>.
        One <weather> <daytime> in <month>, <name> left the house early.
        <Name> and <name2> had been friends since the <ordinal> class.
        When <name> was <age>, <his> family moved to <town>.
        Nobody in <town> knew where <name> came from.
        Have I told you about <name> and the <animal>?""",
    "wish": """
        <He> wanted nothing more than <a_look> <thing>.
        All <he> wished for was to see the <land2>.
        <His> <relation> had asked <him> to <chore>.
        <He> had promised to bring <a_thing> to <name2>.
        <He> was looking for <his> <pet>, which had run away.
        <He> dreamed of becoming <a_job2>.
        Every <day> <he> had to <chore>, and <he> was tired of it.
        There was one thing <he> could not do: <chore>.""",
    "meeting": """
        Then <he> met <a_animal6>. "Where are you going?" it asked. "To the <place6>," said <name>.
        At the <place6> <name2> was waiting. "You are late," <he2> said.
        <A_kind5> old man opened the door. "Come in," he said, "there is <food5> on the table."
        <Name3> came along. "Do you need help?" <he3> asked.
        "Stop!" cried a voice. It was <name2>, who had followed <him>.
        By the <land3> sat <a_job6>. "I have lost my <thing6>," said the <job6>.
        On the <ordinal2> day <he> stood before <a_look4> house of <material6>.""",
    "outcome": """
        In the end <he> got what <he> wanted, and it cost only <price6> coins.
        It took <number6> days, but it was worth it.
        Nothing came of it, but <he> was not <gloom6>.
        Together they found a way, as friends do.
        "I should have asked earlier," said <name>.
        <Name2> gave <him> <a_colour7> <thing7>, and that was even better.
        So <he> learned to be <kind6>.
        And because <he> was <kind6>, everything ended well.""",
    "event": """
        <He> met <a_job5> who was carrying <a_colour3> <thing4>.
        It began to rain, so <he> waited in the <place3>.
        A <size3> dog barked at <him>, but <he> was not afraid.
        <He> stopped to eat <a_fruit> and drink some <drink>.
        On the way <he> counted <number3> <animal3_s> in a field.
        The bell of the church rang <number4> times.
        <He> saw <a_animal2> sleeping under <a_tree2> tree.
        The road was long, and <his> feet were soon tired.
        <A_kind3> woman asked <him> the way to the <place4>.
        <He> sang a song about the <land3>.
        A <vehicle3> went by with a loud noise.
        <He> found a coin and put it into <his> pocket.
        There was a smell of <food3> in the air.
        Somebody had painted the old bridge <colour4>.
        <He> thought of <his> <relation2>, who was <mood3>.
        <A_kind4> <job3> gave <him> some <fruit4_s>.
        The sun went down behind the <tree3> trees.
        <He> lost <his> hat and had to walk back.
        Two children were playing <game2> in the street.
        <He> read a sign that said: "No <animal4_s>!"
        It was <month2>, and the <flower2_s> were <colour5>.
        A letter from <town3> was waiting for <him>.
        <He> sat down on <a_look3> chair and closed <his> eyes.
        A boy wanted to sell <him> <a_thing5> for <price3> coins.""",
    "ending": """
        That night <name> slept well.
        <Name> never forgot that day.
        From then on they were friends.
        And <he> told the story for many years.
        When <he> came home, the <food> was still warm.
        After that, <he> was always careful.
        Everyone in <town> heard about it.
        <His> <relation> laughed and gave <him> a hug.
        It was the best day of the <season>.
        Nobody in <town> ever believed it.
        Then it was time to go to bed.
        And what became of the <animal5>? Nobody knows.
        On <day3> <he> told <his> teacher everything.
        The moon was <colour6> that night.
        <He> wrote it all down in <a_size2> book.""",
    "remark": """
        The people there are <kind4>.
        In <season4> it is often <weather4>.
        Every <day4> there is a concert near the <place4>.
        Many visitors come by <vehicle4>.
        The oldest <tree4> tree is <hundred4> years old.
        Its <food4> is known in the whole country.
        Children like to play by the <land4>.
        On the main street <a_job4> sells <colour4> <thing4_s>.
        There are <n4> bridges and <n5> mills.
        A statue of <a_job5> stands on the square.
        Its <fruit4_s> are the best in the <direction4>.
        In <year4> a fire destroyed the <place5>.
        <Animal4_s> live in the old <tree5> trees.
        The houses are built of <material4>.""",
    "opinion": """
        It was worth every penny.
        I would not buy it again.
        My <relation4> liked it even more than I did.
        I can recommend it to everyone.
        It was good, but a little too expensive.
        We will come back next <season4>.
        I expected more.
        <Name4> says that in <town4> it is cheaper.
        The <colour4> one is even better.
        Ask for <name4>, who is very <kind4>.
        It made my <day4>.""",
    "chore": """
        wash the dishes
        feed the <pet>
        water the <flower_s>
        sweep the <room>
        buy some <food4>
        repair the <thing4>
        write to <name4>
        paint the <room4>
        bring back the <thing5>
        clean the windows
        bake some bread
        call the <job4>
        look for the <pet2>
        cut the <tree4> tree
        learn <subject4>
        pay the <job5>""",
}
_NUMBERS = {
    "n": range(2, 10),
    "age": range(6, 15),
    "oldage": range(31, 90),
    "hour": range(1, 12),
    "minute": range(10, 60, 5),
    "price": range(2, 60),
    "grams": range(50, 650, 50),
    "hundred": range(110, 990, 10),
    "date": range(1, 29),
    "year": range(1820, 2000),
    "recent": range(2001, 2027),
}
WORDS: dict[str, Sequence[str]] = {
    **{category: words.split() for category, words in _WORDS.items()},
    **{
        category: [line.strip() for line in lines.split("\n")[1:]]
        for category, lines in _PHRASES.items()
    },
    **{category: [str(number) for number in numbers] for category, numbers in _NUMBERS.items()},
}
WORDS["name"] = [*WORDS["girl"], *WORDS["boy"]]
WORDS["town"] = [start + end for start in WORDS["townstart"] for end in WORDS["townend"]]
PRONOUNS = {"he": ("she", "he"), "him": ("her", "him"), "his": ("her", "his")}

_IRREGULAR = {
    "mouse": "mice", "goose": "geese", "knife": "knives", "wolf": "wolves", "scarf": "scarves",
}  # fmt: skip
_CHOICE = re.compile(r"\[([^\[\]]*\|[^\[\]]*)\]")
_MARK = re.compile(r"<(?:(n\d?)\+(n\d?)|([aA]_)?([A-Za-z][a-z]*)(\d?)(_s)?)>")


class Draw:
    """A stream of random choices that depends on its key alone, on every machine."""

    def __init__(self, key: str) -> None:
        self.random = random.Random(key).random

    def between(self, low: int, high: int) -> int:
        """A whole number from low to high, both included."""
        return low + int(self.random() * (high - low + 1))

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self.random() < probability

    def pick(self, items: Sequence[T]) -> T:
        """One of the items."""
        return items[int(self.random() * len(items))]

    def sample(self, items: Sequence[T], count: int) -> list[T]:
        """`count` different items, in random order."""
        rest = list(items)
        return [rest.pop(int(self.random() * len(rest))) for _ in range(count)]

    def fill(self, template: str, **facts: object) -> str:
        """The template with its marks replaced; `facts` are words that are already settled."""
        return _Page(self, {key: str(value) for key, value in facts.items()}).fill(template)


class _Page:
    """The memory of one document: which word stands for which mark."""

    def __init__(self, draw: Draw, words: dict[str, str]) -> None:
        self.draw = draw
        self.words = words
        self.drawn: dict[str, str] = {}  # as in the word lists, marks not yet replaced

    def fill(self, template: str) -> str:
        if "[" in template:
            template = _CHOICE.sub(self._choose, template)
        return _MARK.sub(self._replace, template)

    def _choose(self, match: re.Match[str]) -> str:
        return self.draw.pick(match[1].split("|"))

    def _replace(self, match: re.Match[str]) -> str:
        left, right, article, category, slot, plural_mark = match.groups()
        if left:
            return str(int(self.word("n", left[1:])) + int(self.word("n", right[1:])))
        text = self.word(category.lower(), slot)
        if plural_mark:
            text = plural(text)
        if article:
            text = with_article(text)
        if category[0].isupper() or article == "A_":
            text = text[0].upper() + text[1:]
        return text

    def word(self, category: str, slot: str) -> str:
        """The remembered word, or a new one that no other slot of its category has."""
        key = category + slot
        if key not in self.words:
            if category in PRONOUNS:
                self.words[key] = PRONOUNS[category][self.word("name", slot) in WORDS["boy"]]
            else:
                self.drawn[key] = word = self._new_word(category)
                self.words[key] = self.fill(word) if "<" in word else word
        return self.words[key]

    def _new_word(self, category: str) -> str:
        taken = {word for key, word in self.drawn.items() if key.startswith(category)}
        while (word := self.draw.pick(WORDS[category])) in taken:
            pass
        return word


def with_article(noun: str) -> str:
    """The noun with `a` or `an`, by its first letter (the word lists have no exceptions)."""
    return ("an " if noun[0].lower() in "aeiou" else "a ") + noun


def plural(noun: str) -> str:
    """The plural of a noun of the word lists."""
    if noun in _IRREGULAR:
        return _IRREGULAR[noun]
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    return noun + ("es" if noun in ("potato", "tomato", "mango") else "s")
