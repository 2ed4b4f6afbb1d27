"""The model families: each file holds flags and a name map. Adding one is a file and a line here."""

from __future__ import annotations

from collections.abc import Mapping

from pawl_workers.errors import CheckpointError
from pawl_workers.model.families import (
    cohere,
    gemma,
    glm,
    gpt2,
    gpt_neox,
    granite,
    llama,
    mistral,
    olmo,
    phi,
    phi3,
    qwen,
    smollm3,
    stablelm,
    starcoder2,
)
from pawl_workers.model.families.decoder import Family

__all__ = ["FAMILIES", "Family", "find_family"]

_MODULES = (
    *(llama, mistral, qwen, gemma, phi, phi3, gpt2, gpt_neox),
    *(olmo, granite, smollm3, starcoder2, stablelm, cohere, glm),
)

FAMILIES: Mapping[str, Family] = {name: family for module in _MODULES for name, family in module.FAMILIES.items()}


def find_family(architectures: object) -> tuple[str, Family]:
    """Find the family for the `architectures` of a configuration.

    Raises:
        CheckpointError: none of them is known; the message lists those that are.
    """
    if not isinstance(architectures, list) or not all(isinstance(name, str) for name in architectures):
        problem = f"must be a list of names, not {architectures!r}"
    elif not architectures:
        problem = "names none"
    else:
        for name in architectures:
            if name in FAMILIES:
                return name, FAMILIES[name]
        problem = f"{', '.join(architectures)}: not supported"
    raise CheckpointError(f"config.json: architectures {problem}; known: {', '.join(FAMILIES)}")
