"""Groups: several completions of one prompt, sampled and scored; for rollouts and evaluations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from data.prompts import Prompt
from models.generate import Completion, Engine, Request
from train.judge import Judge
from utils.distributed import Distributed
from utils.seed import derive


@dataclass
class Group:
    """The completions of one prompt.

    Attributes:
        rule: 0 to 1 for each, by the prompt's verifier.
        reward: what is trained on.
    """

    prompt: int
    completions: list[Completion]
    rule: list[float]
    reward: list[float]


def sample_groups(
    engine: Engine,
    prompts: Sequence[Prompt],
    numbers: Sequence[int],
    size: int,
    max_new_tokens: int,
    key: tuple[int | str, ...],
    judge: Judge,
    dist: Distributed,
) -> list[Group]:
    """Samples and scores `size` completions of each prompt named in `numbers`.

    The ranks share the work, and all get all groups. A completion's seed is derived from `key`, the
    place of its prompt in `numbers` (one may stand there twice), the prompt's number and its own.
    """
    places = range(len(numbers))[dist.rank :: dist.world_size]
    mine = [numbers[place] for place in places]
    requests = (
        Request(prompts[n].tokens, max_new_tokens, derive(*key, place, n, sample))
        for place, n in zip(places, mine, strict=True)
        for sample in range(size)
    )
    found: list[Completion | None] = [None] * (len(mine) * size)
    for completion in engine.run(requests):
        found[completion.index] = completion
        judge.begin(completion.index, prompts[mine[completion.index // size]], completion.answer)
    rules, rewards = judge.finish()
    groups = [
        Group(n, *(part[i * size : (i + 1) * size] for part in (found, rules, rewards)))
        for i, n in enumerate(mine)
    ]
    shares = dist.all_gather(groups)
    return [shares[i % dist.world_size][i // dist.world_size] for i in range(len(numbers))]
