"""What the engines are asked: so many requests at once, of so many prompt tokens, for so many output tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from pawl_loadtest.prompts import PromptSource

__all__ = ["NAMED", "Workload", "parse_workloads"]


@dataclass(frozen=True, slots=True)
class Workload:
    """Concurrent requests, tokens of each prompt, tokens to generate. One output token measures the prefill."""

    requests: int
    prompt_tokens: int
    output_tokens: int

    @property
    def name(self) -> str:
        """As it is written in tables, and read by `parse_workloads`."""
        if self.output_tokens == 1:
            return f"prefill {self.requests} x {self.prompt_tokens}"
        return f"{self.requests} x {self.prompt_tokens}/{self.output_tokens}"

    @property
    def unit(self) -> str:
        """What is counted per second."""
        return "prompt tokens/s" if self.output_tokens == 1 else "output tokens/s"

    @property
    def counted_tokens(self) -> int:
        """How many of them a run yields."""
        return self.requests * (self.prompt_tokens if self.output_tokens == 1 else self.output_tokens)

    def prompts(self, vocab_size: int, seed: int) -> list[list[int]]:
        """The prompts of a round; no two begin alike."""
        source = PromptSource(vocab_size, seed=seed)
        return [source.prompt(self.prompt_tokens) for _ in range(self.requests)]

    def smaller(self) -> Workload:
        """For a look whether everything runs: at most 4 requests and 8 output tokens."""
        return Workload(min(4, self.requests), self.prompt_tokens, min(8, self.output_tokens))


NAMED: Mapping[str, Workload] = {
    "single": Workload(1, 32, 128),
    "sixteen": Workload(16, 128, 128),
    "sixty-four": Workload(64, 128, 64),
    "prefill": Workload(8, 512, 1),
    "long": Workload(16, 512, 256),
}
"""Those of the standing comparison, by name."""


def parse_workloads(texts: list[str]) -> list[Workload]:
    """Workloads by name or as REQUESTSxPROMPT/OUTPUT, such as 16x128/128.

    Raises:
        ValueError: a text is neither.
    """
    made = []
    for text in texts:
        requests, _, lengths = text.partition("x")
        prompt, _, output = lengths.partition("/")
        if text in NAMED:
            made.append(NAMED[text])
        elif all(part.isdecimal() and int(part) > 0 for part in (requests, prompt, output)):
            made.append(Workload(int(requests), int(prompt), int(output)))
        else:
            raise ValueError(
                f"workload {text!r}: must be one of {', '.join(NAMED)}, or REQUESTSxPROMPT/OUTPUT such as 16x128/128"
            )
    return made
