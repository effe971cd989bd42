"""Rewards of sampled completions: by rule while others are still being sampled, then by a model.

What is quick (a comparison of numbers) is judged at once; what waits for another process (a
sandbox, a symbolic library) is judged in threads, so that it takes no time from the sampling.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor

from data.prompts import Prompt
from data.tokenizer import Tokenizer
from train.reward_model import ScoreFn
from train.rewards import RewardConfig, combine, verifier

QUICK = ("gsm8k", "number", "exact_match")


class Judge:
    """Scores one batch of completions at a time: `begin` for each, then `finish`.

    Args:
        verifiers: the names that will be needed; those that cannot run are refused now.
        score: a model's standardised scores, or None.

    Raises:
        ConfigError: a verifier is unknown or cannot run here.
    """

    def __init__(
        self,
        config: RewardConfig,
        tokenizer: Tokenizer,
        verifiers: Collection[str],
        score: ScoreFn | None = None,
    ) -> None:
        self.config, self.tokenizer, self.score = config, tokenizer, score
        self.verifiers = {name: verifier(name) for name in verifiers}
        self._pool = ThreadPoolExecutor(max_workers=os.cpu_count())
        self._begun: dict[int, tuple[Prompt, str, float | Future]] = {}

    def begin(self, index: int, prompt: Prompt, answer: list[int]) -> None:
        """Start to judge completion number `index`."""
        text = self.tokenizer.decode(answer)
        judged = self.verifiers[prompt.verifier]
        if prompt.verifier in QUICK:
            rule = judged(text, prompt.answer)
        else:
            rule = self._pool.submit(judged, text, prompt.answer)
        self._begun[index] = (prompt, text, rule)

    def finish(self) -> tuple[list[float], list[float]]:
        """The rules' verdicts and the rewards of all that were begun, by their numbers."""
        begun = [self._begun[index] for index in sorted(self._begun)]
        self._begun = {}
        rules = [r.result() if isinstance(r, Future) else r for _, _, r in begun]
        scores: list[float | None] = [None] * len(begun)
        if self.score is not None and begun and self.config.model_weight:
            scores = self._scores([(prompt, text) for prompt, text, _ in begun])
        pairs = zip(rules, scores, strict=True)
        return rules, [combine(rule, score, self.config) for rule, score in pairs]

    def _scores(self, answered: list[tuple[Prompt, str]]) -> list[float]:
        """The model's; equal answers once, since their place in a batch would tell them apart."""
        distinct = {(id(prompt), text): (prompt, text) for prompt, text in answered}
        conversations = [
            [*prompt.messages, {"role": "assistant", "content": text}]
            for prompt, text in distinct.values()
        ]
        scores = dict(zip(distinct, self.score(conversations), strict=True))
        return [scores[id(prompt), text] for prompt, text in answered]
