"""The model families: each is a file with a name map and flags. Adding one is a file and a line here."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pawl_workers.errors import CheckpointError
from pawl_workers.model.families import gpt2, llama
from pawl_workers.model.spec import ConfigReader, ModelSpec, TensorTarget

__all__ = ["FAMILIES", "Family", "find_family"]


@dataclass(frozen=True, slots=True)
class Family:
    """How the checkpoints of one architecture are read.

    `names` maps every tensor that must be there to its target; `ignored` are name endings that may be there
    and carry no weights; `prefix` is put before names that lack it.
    """

    spec: Callable[[ConfigReader], ModelSpec]
    names: Callable[[ModelSpec], Mapping[str, TensorTarget]]
    prefix: str
    ignored: tuple[str, ...]


FAMILIES: Mapping[str, Family] = {
    llama.ARCHITECTURE: Family(llama.spec, llama.names, llama.PREFIX, llama.IGNORED),
    gpt2.ARCHITECTURE: Family(gpt2.spec, gpt2.names, gpt2.PREFIX, gpt2.IGNORED),
}


def find_family(architectures: object) -> tuple[str, Family]:
    """Find the family for the `architectures` of a configuration.

    Raises:
        CheckpointError: none of them is known; the message lists those that are.
    """
    if isinstance(architectures, list):
        for name in architectures:
            if isinstance(name, str) and name in FAMILIES:
                return name, FAMILIES[name]
    raise CheckpointError(f"architecture {architectures!r} is not supported; known: {', '.join(FAMILIES)}")
