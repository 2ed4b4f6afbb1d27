"""The keys of well-known models' `config.json` on the Hugging Face hub that say what a forward pass is.

A file for each module of `pawl_workers.model.families`, with configurations by the names of their models. Written down
by hand, each in the spelling of the transformers version of its time; left out are keys of training, of token ids and
of dtypes. Of Phi's long-rope factors, 48 numbers each, only the lengths are theirs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from pawl_workers.model.config_reader import ConfigReader
from pawl_workers.model.families import find_family
from pawl_workers.model.spec import ModelSpec

__all__ = ["HUB_CONFIGS", "read_hub_config"]

Values = Mapping[str, object]

HUB_CONFIGS: Mapping[str, Values] = {
    hub_id: values
    for path in sorted(Path(__file__).parent.glob("*.json"))
    for hub_id, values in json.loads(path.read_text()).items()
}


def read_hub_config(hub_id: str, **changes: object) -> ModelSpec:
    """Read the configuration of a model, with other values for some of its keys."""
    values = {**HUB_CONFIGS[hub_id], **changes}
    return find_family(values["architectures"])[1].spec(ConfigReader(values))
