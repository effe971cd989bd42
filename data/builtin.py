"""The built-in corpus: three domains of generated text, so that everything runs without a network.

`document` is a pure function of domain, index and seed; it gives the same text on every machine and
under every Python version, so the corpus needs no files, no download and no checksum. It is a
language and not a list (people, places and things that stay themselves throughout a page; code that
compiles; sums that are true), yet far more regular than real text: a model of a million parameters
learns it in minutes. What such a model knows afterwards is this little world and nothing else.
"""

from data import builtin_code, builtin_math, builtin_web
from data.builtin_words import Draw

VERSION = 1  # to be raised whenever any document changes: shards made from it are stale then
DOMAINS = ("web", "code", "math")
N_DOCUMENTS = {"web": 20_000, "code": 3_000, "math": 2_000}
QUIZ_SHARE = 0.12  # of the web pages: school pages in the form of the tasks of the later stages


def document(domain: str, index: int, seed: int = 0) -> str:
    """Document number `index` of a domain; any index >= 0 exists, N_DOCUMENTS make an epoch."""
    if domain not in DOMAINS:
        raise ValueError(f"domain is {domain!r}, and the built-in corpus has {', '.join(DOMAINS)}")
    draw = Draw(f"{seed}/{domain}/{index}")
    if domain == "math":
        return draw.pick(builtin_math.PAGES)(draw)
    if domain == "web" and draw.chance(QUIZ_SHARE):
        return builtin_math.quiz(draw)
    templates = builtin_code.TEMPLATES if domain == "code" else builtin_web.TEMPLATES
    return draw.fill(draw.pick(templates))
