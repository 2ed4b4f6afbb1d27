"""A real front end and a real engine in this process, over sockets; only the worker is fake, and may be stepped."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

from pawl import AsyncAdminClient, AsyncClient, Completion, RequestState, Stop
from pawl_server.config import EngineSettings, Value
from pawl_server.frontend.main import FrontendAddresses, run_frontend
from tests.fakes.engine_harness import RunningEngine, running_engine
from tests.fakes.engine_worker import FakeFacts, fake_spec
from tests.fakes.fake_engine import TOKEN
from tests.fakes.fake_fleet import FakeFleet
from tests.fakes.front_end import settings_for
from tests.fakes.tokenizer import CONTEXT, EOS_ID, VOCAB_SIZE, write_checkpoint

__all__ = ["StepGate", "WholeServer", "whole_server"]

_DEADLINE_S = 20.0


class StepGate(threading.Event):
    """Lets one step of the worker pass for each permit, or all of them once it is set."""

    def __init__(self) -> None:
        super().__init__()
        self._permits = threading.Semaphore(0)

    def permit(self, count: int = 1) -> None:
        """Let so many steps pass."""
        self._permits.release(count)

    def wait(self, timeout: float | None = None) -> bool:
        """Take a permit."""
        return self.is_set() or self._permits.acquire(timeout=timeout)

    def set(self) -> None:
        """Let everything pass."""
        super().set()
        self._permits.release()


@dataclass(slots=True)
class WholeServer:
    """A server whose worker computes a step when it is told to."""

    addresses: FrontendAddresses
    running: RunningEngine
    gate: StepGate
    ended: list[str] = field(default_factory=list)  # request ids, in the order of their ends
    tasks: dict[str, asyncio.Task[Completion]] = field(default_factory=dict)

    def client(self, api_key: str | None = None) -> AsyncClient:
        """Of the SDK."""
        return AsyncClient(self.addresses.grpc, api_key=api_key, retries=0)

    def generate(self, client: AsyncClient, name: str, prompt: list[int], num_output: int, priority: int = 0) -> None:
        """Begin a request of just so many tokens."""
        stop = Stop(min_tokens=num_output)

        async def run() -> Completion:
            completion = await client.generate(
                prompt, max_tokens=num_output, stop=stop, seed=1, token_ids=True, priority=priority, request_id=name
            )
            self.ended.append(name)
            return completion

        self.tasks[name] = asyncio.create_task(run(), name=name)

    async def requests(self) -> dict[str, RequestState]:
        """The live requests, by id, as an operator is told of them."""
        async with AsyncAdminClient(self.addresses.admin) as admin:
            return {state.request_id: state for state in await admin.requests()}

    async def step(self) -> None:
        """Let one step pass and wait until it is settled."""
        before = self.running.engine.loop.num_steps
        self.gate.permit()
        await self.until(lambda: self.running.engine.loop.num_steps > before)

    async def step_until(self, condition: Callable[[], bool]) -> None:
        """Let steps pass until a condition holds."""
        async with asyncio.timeout(_DEADLINE_S):
            while not condition():
                await self.step()

    async def arrived(self, *names: str) -> None:
        """Let steps pass until these requests are known to the scheduler."""
        state = self.running.engine.loop.state
        await self.step_until(lambda: {*names} <= {sequence.request.request_id for sequence in state.live.values()})

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until a condition holds."""
        async with asyncio.timeout(_DEADLINE_S):
            while not condition():
                await asyncio.sleep(0.002)

    async def finish(self) -> dict[str, Completion]:
        """Let everything end; the answers by request id."""
        self.gate.set()
        async with asyncio.timeout(_DEADLINE_S):
            return dict(zip(self.tasks, await asyncio.gather(*self.tasks.values()), strict=True))


@contextlib.asynccontextmanager
async def whole_server(
    folder: Path, engine: EngineSettings, num_blocks: int = 64, **settings: Value
) -> AsyncIterator[WholeServer]:
    """Start engine, fleet and front end; `settings` are the front end's."""
    checkpoint = write_checkpoint(folder / "toy")
    facts = FakeFacts(vocab_size=VOCAB_SIZE, max_context=CONTEXT, eos_token_ids=(EOS_ID,), num_blocks=num_blocks)
    spec = fake_spec(model=str(checkpoint), engine=engine, internal_token=TOKEN)
    async with running_engine(spec, facts) as running, contextlib.AsyncExitStack() as stack:
        gate = running.worker.gate = StepGate()
        stack.callback(gate.set)
        fleet = await FakeFleet(str(checkpoint)).start()
        stack.push_async_callback(fleet.stop)
        fleet.show_address(running.address)
        stop, ready = asyncio.Event(), asyncio.get_running_loop().create_future()
        task = asyncio.create_task(run_frontend(settings_for(**settings), fleet.address, TOKEN, ready.set_result, stop))
        try:
            await asyncio.wait({task, ready}, timeout=_DEADLINE_S, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                task.result()
            yield WholeServer(ready.result(), running, gate)
        finally:
            gate.set()
            stop.set()
            async with asyncio.timeout(_DEADLINE_S):
                await task
