"""What an engine works out from its settings and from what its worker found: limits, steps in flight, its welcome."""

from __future__ import annotations

import logging
import secrets
from pathlib import Path

from pawl.errors import InvalidRequest
from pawl_server.engine.engine_worker import WorkerFacts
from pawl_server.engine.link.protocol import MAX_CACHE_EVENTS, PROTOCOL_VERSION
from pawl_server.engine.spec import EngineSpec
from pawl_server.internal.v1 import engine_pb2
from pawl_server.scheduler.admission import SchedulerLimits

__all__ = ["limits_of", "served_name", "steps_in_flight", "welcome_of"]

log = logging.getLogger(__name__)


def steps_in_flight(spec: EngineSpec, facts: WorkerFacts, limits: SchedulerLimits) -> int:
    """Steps in flight at once. Drafts go on from the last token, so that with them there is never more than one."""
    if not limits.max_drafts:
        return spec.engine.pipeline_depth or facts.max_in_flight
    if facts.max_in_flight > 1:
        log.warning(
            "speculation = %s: steps do not overlap, though %s could have %d in flight; drafts must make up for that",
            spec.engine.speculation,
            facts.device,
            facts.max_in_flight,
        )
    return 1


def served_name(spec: EngineSpec) -> str:
    """The name under which clients know the model."""
    return spec.served_name or spec.model.served_name or Path(spec.model.model).name


def limits_of(spec: EngineSpec, facts: WorkerFacts) -> SchedulerLimits:
    """Settings and what the worker found, as the scheduler's limits.

    Raises:
        InvalidRequest: the settings contradict each other.
    """
    engine = spec.engine
    try:
        return SchedulerLimits(
            num_blocks=facts.num_blocks,
            block_size=facts.block_size,
            max_running=engine.max_running,
            max_batch_tokens=engine.max_batch_tokens,
            max_context=facts.max_context,
            max_partial_prefills=engine.max_partial_prefills,
            max_prefill_chunk=engine.max_prefill_chunk,
            max_waiting=engine.max_waiting,
            prefix_cache=engine.prefix_cache,
            retained_share=engine.retained_share,
            max_cache_events=MAX_CACHE_EVENTS,
            watermark=engine.watermark,
            max_bypass=engine.max_bypass,
            max_preemptions=engine.max_preemptions,
            preempt_below=engine.preempt_below,
            output_quantile=engine.output_quantile,
            max_drafts=engine.speculation_tokens if engine.speculation == "ngram" else 0,
            ageing_s=engine.ageing_s,
        )
    except ValueError as error:
        raise InvalidRequest(str(error), reason="BAD_SETTING") from error


def welcome_of(spec: EngineSpec, facts: WorkerFacts, limits: SchedulerLimits) -> engine_pb2.Welcome:
    """What a front end is told when it connects."""
    return engine_pb2.Welcome(
        protocol_version=PROTOCOL_VERSION,
        engine_id=secrets.token_hex(8),
        replica=spec.replica,
        model=engine_pb2.ModelFacts(
            id=served_name(spec),
            source=spec.model.model,
            architectures=facts.architectures,
            max_context_tokens=limits.max_context,
            vocab_size=facts.vocab_size,
            data_type=facts.data_type,
            eos_token_ids=facts.eos_token_ids,
            revision=facts.revision,
        ),
        block_size=limits.block_size,
        num_blocks=limits.num_blocks,
        max_running=limits.max_running,
        max_batch_tokens=limits.max_batch_tokens,
    )
