"""The served model as a front end knows it: tokenizer, chat template, default sampling, sizes.

Owns reading those files of a checkpoint; loads no weights and imports no torch.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass
from pathlib import Path

from pawl.errors import InvalidRequest
from pawl_server.frontend.chat_template import ChatTemplate
from pawl_server.frontend.requests import SamplingDefaults
from pawl_server.frontend.tokens import TextTokenizer
from pawl_workers.errors import CheckpointError
from pawl_workers.model.source import resolve_checkpoint

__all__ = ["ServedModel", "load_model"]

log = logging.getLogger(__name__)

_MOST_CONTEXT = (1 << 31) - 1  # an int32 on the wire
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token")


@dataclass(frozen=True, slots=True)
class ServedModel:
    """What of a checkpoint the front end needs.

    Attributes:
        id: id under which it is served.
        source: folder or hub id it was read from.
        template: None when the checkpoint has no chat template.
        max_context_tokens: by `config.json`; 0 if it does not say. Engines may serve less.
    """

    id: str
    source: str
    tokenizer: TextTokenizer
    template: ChatTemplate | None
    defaults: SamplingDefaults
    max_context_tokens: int


def load_model(model_id: str, source: str, revision: str, max_prompt_bytes: int) -> ServedModel:
    """Read the files of a checkpoint. Blocking: call it on a thread.

    Raises:
        InvalidRequest: the checkpoint or its tokenizer cannot be read.
    """
    try:
        folder = resolve_checkpoint(source, revision or None, tokenizer_only=True)
    except CheckpointError as error:
        raise InvalidRequest(str(error), reason="BAD_CHECKPOINT") from error
    settings = _read_json(folder / "tokenizer_config.json")
    template = _template_source(folder, settings)
    specials = {name: text for name in _SPECIAL_TOKENS if (text := _token_text(settings.get(name))) is not None}
    return ServedModel(
        id=model_id,
        source=source,
        tokenizer=TextTokenizer.load(folder),
        template=None if template is None else ChatTemplate(template, specials, max_characters=4 * max_prompt_bytes),
        defaults=sampling_defaults(_read_json(folder / "generation_config.json")),
        max_context_tokens=_context(_read_json(folder / "config.json").get("max_position_embeddings")),
    )


def sampling_defaults(generation_config: dict[str, object]) -> SamplingDefaults:
    """What a `generation_config.json` makes of unset parameters; values out of range are ignored with a warning.

    `do_sample = false` means greedy, whatever else the file says; a `top_k` of 0 means no limit.
    """
    ranges = {
        "temperature": (0, 100),
        "top_p": (1e-9, 1),
        "top_k": (0, 1 << 30),
        "min_p": (0, 1),
        "repetition_penalty": (1e-9, 10),
    }
    values: dict[str, float] = {}
    for name, (low, high) in ranges.items():
        value = generation_config.get(name)
        if value is None:
            continue
        if not isinstance(value, int | float) or isinstance(value, bool) or not low <= value <= high:
            log.warning("generation_config.json: %s = %r is ignored", name, value)
            continue
        values[name] = value
    top_k = int(values.pop("top_k", 0))
    if generation_config.get("do_sample") is False:
        values["temperature"] = 0.0
    return SamplingDefaults(top_k=top_k, **values)


def _read_json(path: Path) -> dict[str, object]:
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"cannot read {path}: {error}", reason="BAD_CHECKPOINT") from error
    return content if isinstance(content, dict) else {}


def _context(value: object) -> int:
    """Tokens of the longest context; 0 where it is no number of them that the wire can tell."""
    return value if isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= _MOST_CONTEXT else 0


def _token_text(value: object) -> str | None:
    """Text of a special token, which is written as a string or as an object with `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _template_source(folder: Path, settings: dict[str, object]) -> str | None:
    """The default template: `chat_template.jinja`, else `chat_template` of tokenizer_config.json, one or named."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InvalidRequest(f"cannot read {path}: {error}", reason="BAD_CHECKPOINT") from error
    found = settings.get("chat_template")
    if isinstance(found, list):
        named = {item.get("name"): item.get("template") for item in found if isinstance(item, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None
