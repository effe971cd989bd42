"""The built-in corpus: three domains of generated text, so that everything runs without a network.

`document` is a pure function of domain, index and seed; it gives the same text on every machine and
under every Python version, so the corpus needs no files, no download and no checksum. It is a
language and not a list (people, places and things that stay themselves throughout a page; code that
compiles; sums that are true), yet far more regular than real text: a model of a million parameters
learns it in minutes. What such a model knows afterwards is this little world and nothing else.
"""

from data import builtin_code, builtin_math, builtin_web
from data.builtin_words import WORDS, Draw

VERSION = 1  # to be raised whenever any document changes: shards made from it are stale then
DOMAINS = ("web", "code", "math")
N_DOCUMENTS = {"web": 20_000, "code": 3_000, "math": 2_000}
SCHOOL_SHARE = 0.18  # of the web pages: what the tasks of the later stages are about


def document(domain: str, index: int, seed: int = 0) -> str:
    """Document number `index` of a domain; any index >= 0 exists, N_DOCUMENTS make an epoch."""
    if domain not in DOMAINS:
        raise ValueError(f"domain is {domain!r}, and the built-in corpus has {', '.join(DOMAINS)}")
    draw = Draw(f"{seed}/{domain}/{index}")
    if domain == "math":
        return draw.pick(builtin_math.PAGES)(draw)
    if domain == "web" and draw.chance(SCHOOL_SHARE):
        return draw.pick((builtin_math.quiz, builtin_math.quiz, spelling))(draw)
    templates = builtin_code.TEMPLATES if domain == "code" else builtin_web.TEMPLATES
    return draw.fill(draw.pick(templates))


def spelling(draw: Draw) -> str:
    """A page that spells words forwards and backwards; none is an operand of a held-out task."""
    lines = [draw.fill("[Spelling with <name>|The words of <day>|Letters, for class <n>]\n")]
    for word in draw.sample(WORDS["thing"] + WORDS["animal"] + WORDS["fruit"], 4):
        if builtin_math.split_of("letters", *word) == "train":
            lines.append(
                f"The word {word} has {len(word)} letters: {' '.join(word)}. The first letter is "
                f"{word[0]}, the last letter is {word[-1]}. Backwards it is {' '.join(word[::-1])}."
            )
    return "\n".join(lines)
