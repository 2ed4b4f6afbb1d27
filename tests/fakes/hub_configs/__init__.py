"""The keys of well-known models' `config.json` on the Hugging Face hub that say what a forward pass is.

A file for each module of `pawl_workers.model.families`, with configurations by the names of their models. Written down
by hand, each in the spelling of the transformers version of its time; left out are keys of training, of token ids and
of dtypes. Of Phi's long-rope factors, 48 numbers each, only the lengths are theirs.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

__all__ = ["HUB_CONFIGS"]

Values = Mapping[str, object]

HUB_CONFIGS: Mapping[str, Values] = {
    hub_id: values
    for path in sorted(Path(__file__).parent.glob("*.json"))
    for hub_id, values in json.loads(path.read_text()).items()
}
