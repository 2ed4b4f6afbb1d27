"""Random small traces for a simulated replica of a few rows and blocks, full of everything that can happen."""

from __future__ import annotations

import random
from dataclasses import replace

from pawl_server.scheduler.admission import SchedulerLimits
from pawl_server.sim.cost import CostModel
from pawl_server.sim.streams import Segment, output_stream
from pawl_server.sim.trace import Fault, SimulatedRequest, Trace

__all__ = ["random_cost", "random_limits", "random_trace"]


def random_limits(draw: random.Random) -> SchedulerLimits:
    """A replica that is short of something."""
    max_running = draw.randint(1, 6)
    return SchedulerLimits(
        num_blocks=draw.randint(6, 60),
        block_size=draw.choice([2, 4, 16]),
        max_running=max_running,
        max_batch_tokens=max_running + draw.randint(0, 60),
        max_context=draw.choice([96, 400]),
        max_partial_prefills=draw.randint(1, 3),
        max_prefill_chunk=draw.randint(1, 40),
        prefix_cache=draw.random() < 0.7,
        watermark=draw.choice([0.0, 0.1]),
        max_bypass=draw.randint(0, 3),
        ageing_s=draw.choice([0.0, 0.0, 0.05]),
    )


def random_cost(draw: random.Random) -> CostModel:
    """Steps of about a hundredth of a second."""
    return CostModel(
        step_s=draw.uniform(1e-3, 1e-2),
        token_s=draw.uniform(0, 1e-4),
        attention_pair_s=draw.uniform(0, 1e-6),
        context_token_s=draw.uniform(0, 1e-6),
        sequence_s=draw.uniform(0, 1e-4),
    )


def random_trace(draw: random.Random, count: int) -> Trace:
    """Requests with shared beginnings, turns, further samples, cancellations, tenants and classes; the worker dies."""
    requests: list[SimulatedRequest] = []
    arrival_s = 0.0
    for index in range(count):
        arrival_s += draw.expovariate(draw.choice([2.0, 20.0, 200.0]))
        prompt: tuple[Segment, ...] = (
            Segment(draw.choice([900, 901]), draw.randint(1, 40)),
            Segment(1000 + index, draw.randint(1, 30)),
        )
        follows, due_s = -1, arrival_s
        if index and draw.random() < 0.2:
            follows = draw.randrange(index)
            due_s = draw.uniform(0.0, 0.5)
            before = requests[follows]
            prompt = (*before.prompt, Segment(output_stream(follows), before.output_tokens), *prompt[1:])
        output = draw.randint(1, 60)
        requests.append(
            SimulatedRequest(
                arrival_s=due_s,
                prompt=prompt,
                output_tokens=output,
                max_output_tokens=draw.choice([output, output + 5, 1 + output // 2, -1]),
                tenant=draw.choice(["", "a", "b"]),
                priority=draw.choice([0, 0, 1]),
                abort_after_s=draw.choice([None, None, None, draw.uniform(0.0, 1.0)]),
                follows=follows,
            )
        )
    for _ in range(draw.choice([0, 0, 1, 3])):
        first = draw.randrange(count)
        if all(request.sample_of != first for request in requests):
            requests += [
                replace(requests[first], output_tokens=draw.randint(1, 60), sample_of=first, follows=-1)
                for _ in range(draw.randint(1, 4))
            ]
    faults = [Fault(draw.uniform(0.0, arrival_s + 0.5), draw.choice([0.0, 0.3])) for _ in range(draw.choice([0, 0, 2]))]
    return Trace("random", requests, faults)
