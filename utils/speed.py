"""How fast text is written: tokens per second, and how long the first one takes.

The clock starts when the prompt is handed over, the model being loaded; on a GPU it includes what
is compiled or captured for the first tokens.
"""

from __future__ import annotations

import sys
import time


class Speed:
    """Counts the tokens of one answer, or of several that are written at once."""

    def __init__(self, prompt_tokens: int) -> None:
        self.prompt_tokens = prompt_tokens
        self.new_tokens = 0
        self.started = time.perf_counter()
        self.first_s: float | None = None  # until the first token, be it one that ends the answer

    def count(self, new_tokens: int) -> None:
        """A step has been taken and gave so many tokens."""
        if self.first_s is None:
            self.first_s = time.perf_counter() - self.started
        self.new_tokens += new_tokens

    def tell(self) -> None:
        """One line on stderr."""
        seconds = time.perf_counter() - self.started
        first = "-" if self.first_s is None else f"{self.first_s:.3f} s"
        print(
            f"stats: {self.new_tokens / seconds:,.1f} tokens/s, time to first token {first}, "
            f"{self.prompt_tokens:,} prompt tokens, {self.new_tokens:,} new tokens in "
            f"{seconds:.2f} s",
            file=sys.stderr,
        )
