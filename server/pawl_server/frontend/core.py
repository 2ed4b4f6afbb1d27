"""What the services of one front end share: settings, model, replicas, admission, metrics.

Owns the answers to "which model", "by which rules" and "is this server ready"; handles no call itself.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from pawl.errors import InvalidRequest, NotFound, Unavailable
from pawl_server.config import Config
from pawl_server.frontend.admission import Admission
from pawl_server.frontend.auth import Principal
from pawl_server.frontend.model import ServedModel, load_model
from pawl_server.frontend.replicas import Key, Replica, Replicas
from pawl_server.frontend.requests import ConversationInput, PromptInput
from pawl_server.frontend.router import Router
from pawl_server.frontend.validate import Rules
from pawl_server.internal.v1 import engine_pb2, fleet_pb2
from pawl_server.metrics import FrontendMetrics

__all__ = ["Core"]

T = TypeVar("T")

_INLINE_CHARACTERS = 2048  # texts up to this are tokenized on the event loop: a thread costs more
_NOT_READY_RETRY_S = 1.0
_REJECTIONS = ("queue_full", "request_rate", "token_rate", "concurrency", "draining")


class Core:
    """The state of one front end.

    Args:
        config: all settings.
        token: shared token of the internal listeners.
        on_change: told when readiness may have changed.

    Attributes:
        instance_id: drawn at start.
        start_unix_ns: when it started.
        model: None until the fleet has said which one it serves and its files are read.
    """

    def __init__(self, config: Config, token: str, on_change: Callable[[], None] = lambda: None) -> None:
        self.config = config
        self.limits = config.limits
        self.token = token
        self.instance_id = "frontend-" + secrets.token_hex(8)
        self.start_unix_ns = time.time_ns()
        self.model: ServedModel | None = None
        self.model_error: InvalidRequest | None = None
        self.metrics = FrontendMetrics(config.model.served_name or config.model.model.rstrip("/").rpartition("/")[2])
        self.admission = Admission(config.frontend.max_queued_requests, on_change=self._gauges)
        self.router: Router[Key] = Router(config.frontend.prefix_affinity)
        self.replicas = Replicas(
            token, self.instance_id, config.frontend.heartbeat_timeout_s, self.changed, self._on_cache
        )
        self._on_change = on_change
        # Of their own, so that long prompts cannot take every thread of the process.
        self._encoders = ThreadPoolExecutor(2, "pawl-encode")
        self._renderers = ThreadPoolExecutor(2, "pawl-render")

    @property
    def serving(self) -> bool:
        """Whether new requests can be served."""
        return self.model is not None and not self.admission.draining and self.replicas.serving()

    @property
    def max_context(self) -> int:
        """Most tokens of prompt and output, by the engines; before any was seen, by the checkpoint."""
        if self.replicas.facts is not None:
            return self.replicas.facts.max_context_tokens
        return self.config.model.max_context or (self.model.max_context_tokens if self.model else 0)

    @property
    def vocab_size(self) -> int:
        """Number of token ids, by the engines; before any was seen, by the tokenizer."""
        if self.replicas.facts is not None:
            return self.replicas.facts.vocab_size
        return self.model.tokenizer.vocab_size if self.model else 0

    async def on_fleet(self, view: fleet_pb2.WatchReplicasResponse) -> None:
        """Take over the fleet's list; reads the model's files when the model is new."""
        if self.model is None or (self.model.id, self.model.source) != (view.model_id, view.model_source):
            limit, revision = self.limits.max_prompt_bytes, self.config.model.revision
            try:
                model = await asyncio.to_thread(load_model, view.model_id, view.model_source, revision, limit)
            except InvalidRequest as error:
                self.model_error = error
                self._on_change()
                return
            if self.metrics.model != view.model_id:
                self.metrics = FrontendMetrics(view.model_id)
            self.model = model
        self.replicas.update(view.replicas)

    def served(self, name: str) -> ServedModel:
        """The model of a request; an empty name means the only one.

        Raises:
            Unavailable: the model is not known yet.
            NotFound: another name.
        """
        if self.model is None:
            raise self.not_ready("the server does not know its model yet")
        if name.removeprefix("models/") not in ("", self.model.id):
            text = f"no model {name[:128]!r} is served here, only {self.model.id!r}"
            raise NotFound(text, metadata={"model": name[:128], "available": self.model.id})
        return self.model

    def rules(self, name: str, principal: Principal) -> Rules:
        """What a request for a model is checked against.

        Raises:
            Unavailable: the model is not known yet.
            NotFound: no such model.
        """
        model = self.served(name)
        interval = self.config.frontend.stream_interval
        return Rules(self.limits, self.vocab_size, model.defaults, principal.max_priority, interval)

    def pick(self, prompt_ids: list[int], cache_key: bytes) -> Replica:
        """The replica for a prompt.

        Raises:
            Unavailable: none is ready.
        """
        ready = {replica.key: replica for replica in self.replicas.ready()}
        if not ready:
            raise self.not_ready("no replica is ready")
        candidates = [replica.candidate() for replica in ready.values()]
        return ready[self.router.pick(candidates, prompt_ids, cache_key).key]

    def not_ready(self, what: str) -> Unavailable:
        """The error of a server that cannot serve now."""
        return Unavailable(f"{what}: try again", reason="NOT_READY", retry_after=_NOT_READY_RETRY_S)

    async def encode(self, prompt: PromptInput) -> list[int]:
        """Token ids of a prompt; long texts on a thread."""
        if prompt.text is None:
            return list(prompt.token_ids or ())
        return await self.encode_text(prompt.text, add_special_tokens=prompt.add_special_tokens)

    async def encode_text(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Token ids of a text; long ones on a thread.

        Raises:
            Unavailable: the model is not known yet.
        """
        tokenizer = self.served("").tokenizer
        if len(text) <= _INLINE_CHARACTERS:
            return tokenizer.encode(text, add_special_tokens=add_special_tokens)
        return await self.on_thread(lambda: tokenizer.encode(text, add_special_tokens=add_special_tokens))

    async def render(self, conversation: ConversationInput, field: str) -> str:
        """The prompt of a conversation, as text. `field` is named when the template refuses it.

        Raises:
            InvalidRequest: the model has no template, or it refuses the conversation.
        """
        template = self.served("").template
        if template is None:
            raise InvalidRequest("the model has no chat template: use Generate", reason="NO_CHAT_TEMPLATE")
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._renderers, template.render, conversation, field)

    async def on_thread(self, work: Callable[[], T]) -> T:
        """Run work of the tokenizer off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._encoders, work)

    async def close(self) -> None:
        """Close the links and the threads."""
        await self.replicas.close()
        self._encoders.shutdown(wait=False, cancel_futures=True)
        self._renderers.shutdown(wait=False, cancel_futures=True)

    def rejected(self, reason: str) -> None:
        """Count a refusal at admission, if it is one."""
        if reason.lower() in _REJECTIONS:
            self.metrics.request_rejected(reason.lower())

    def changed(self) -> None:
        """The list, a link or the drain changed."""
        self.router.keep([replica.key for replica in self.replicas.all()])
        self._on_change()

    def _on_cache(self, key: Key, events: engine_pb2.CacheEvents) -> None:
        if events.reset:
            self.router.forget(key)
        for event in events.events:
            self.router.learn(key, event.name, present=event.num_tokens > 0)

    def _gauges(self, num_queued: int, num_live: int) -> None:
        self.metrics.requests_queued.set(num_queued)
        self.metrics.streams_open.set(num_live)
