"""What runs in a scorer's process (`scorer.py`): libraries that judge a model's text.

Nothing of the repository is there: this needs the standard library, and for each verifier the
package that it names.
"""

import contextlib
import json
import re
import sys
from unittest.mock import MagicMock


def score_math(completion: str, answer: str) -> float:
    """1 if math-verify finds the completion's last result equal to `answer`, 0 otherwise.

    An answer without `$` or `\\boxed{}` is put between `$`, so that its LaTeX is read as such; that
    of an amount, `\\$72`, does not count. The library's timeouts are off: they need SIGALRM, and
    the caller's holds for everything.
    """
    from math_verify import parse, verify

    is_marked = "$" in answer.replace("\\$", "") or "\\boxed" in answer
    gold = answer if is_marked else f"${answer}$"
    gold, said = (parse(text, parsing_timeout=None) for text in (gold, completion))
    return float(verify(gold, said, timeout_seconds=None))


def score_regex(completion: str, answer: str) -> float:
    """1 if the whole completion, white space around it aside, matches the pattern `answer`."""
    return float(re.fullmatch(answer, completion.strip()) is not None)


def score_reasoning_gym(completion: str, answer: str) -> float:
    """The task's own score, from 0 to 1; `answer` is the task's entry as JSON.

    What stands in the last `<answer>` tags is judged, or the whole completion if there are none.
    Two tasks, arc_agi and rearc, compare tuples, which JSON has not: their answers score 0.05.
    """
    import reasoning_gym

    entry = json.loads(answer)
    tagged = re.findall(r"<answer>(.*?)</answer>", completion, re.DOTALL)
    scorer = reasoning_gym.get_score_answer_fn(entry["metadata"]["source_dataset"])
    return float(scorer((tagged[-1] if tagged else completion).strip(), entry))


SCORERS = {"math": score_math, "regex": score_regex, "reasoning_gym": score_reasoning_gym}
PACKAGES = {"math": "math_verify", "reasoning_gym": "reasoning_gym"}

# reasoning-gym imports plotting code, which wants threads and a place to write; no scorer draws.
PLOTS = (
    "matplotlib",
    "matplotlib.animation",
    "matplotlib.collections",
    "matplotlib.pyplot",
    "mpl_toolkits",
    "mpl_toolkits.mplot3d",
)


def serve() -> None:
    """Read a line [paths, verifier]; answer with null, or why it cannot be served. Then read lines
    [completion, answer]; answer each with a score.

    What a library raises on a text counts as 0. What it prints goes to stderr.
    """
    answers, sys.stdout = sys.stdout, sys.stderr
    paths, name = json.loads(sys.stdin.readline())
    sys.path += paths
    sys.modules.update({plots: MagicMock() for plots in PLOTS})
    problem = None
    try:
        __import__(PACKAGES.get(name, "re"))
    except Exception as error:
        problem = repr(error)
    print(json.dumps(problem), file=answers, flush=True)
    for line in sys.stdin:
        score = 0.0
        with contextlib.suppress(Exception):
            score = SCORERS[name](*json.loads(line))
        print(json.dumps(score), file=answers, flush=True)


if __name__ == "__main__":
    serve()
