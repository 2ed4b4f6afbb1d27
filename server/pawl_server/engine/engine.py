"""One engine, assembled: worker, scheduler, step loop, link, metrics, watchdog.

Owns the order of start and stop. Imports no torch by itself, and knows neither Ray nor who started it.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
from collections.abc import Callable
from pathlib import Path

from llguidance import LLTokenizer

from pawl.errors import InvalidRequest, Unavailable
from pawl_server.addresses import host_port
from pawl_server.engine.books import Books
from pawl_server.engine.engine_worker import EngineWorker, WorkerFacts
from pawl_server.engine.executor import InProcessExecutor
from pawl_server.engine.grammar.compiler import checkpoint_tokenizer
from pawl_server.engine.grammar.grammars import Grammars
from pawl_server.engine.journal_file import JournalFile
from pawl_server.engine.link.server import EngineService, LinkServer
from pawl_server.engine.load import LoadWorker, load_torch_worker
from pawl_server.engine.loop import EngineLoop
from pawl_server.engine.meter import Meter
from pawl_server.engine.spec import EngineAddresses, EngineSpec, check_engine, parse_ports
from pawl_server.engine.start_report import LoadReport, Progress, Stage, WarmUpReport, report_memory, report_self_test
from pawl_server.engine.warm_up import measure_prefill, warm_up
from pawl_server.engine.watchdog import Watchdog
from pawl_server.engine.worked_out import limits_of, served_name, steps_in_flight, welcome_of
from pawl_server.exposition import MetricsServer, serve_metrics
from pawl_server.kv.block_hash import CacheRoot
from pawl_server.kv.host_tier import RestoreCost
from pawl_server.metrics import EngineMetrics
from pawl_server.scheduler.admission import SchedulerLimits
from pawl_server.scheduler.budget import StepBudget
from pawl_server.scheduler.journal import Journal
from pawl_server.scheduler.speculation import Speculation
from pawl_server.scheduler.state import SchedulerState

__all__ = ["Engine"]

log = logging.getLogger(__name__)

OpenTokenizer = Callable[[EngineSpec, WorkerFacts], LLTokenizer]


def open_tokenizer(spec: EngineSpec, facts: WorkerFacts) -> LLTokenizer:
    """The vocabulary of the checkpoint.

    Raises:
        InvalidRequest: it has none that constraints can be kept with.
    """
    return checkpoint_tokenizer(spec.model.model, spec.model.revision, facts.vocab_size, facts.eos_token_ids)


class Engine:
    """One replica. `start`, then `run` until `stop`; used once.

    Args:
        spec: what to serve and where.
        progress: told of each part of the start, also from the worker's thread.
        load_worker: loads the worker, called on the worker's thread.
        open_tokenizer: reads the vocabulary for constraints, called on a thread when the first one comes.
    """

    def __init__(
        self,
        spec: EngineSpec,
        progress: Progress,
        load_worker: LoadWorker = load_torch_worker,
        open_tokenizer: OpenTokenizer = open_tokenizer,
    ) -> None:
        self.spec = spec
        self._progress = progress
        self._load_worker = load_worker
        self._open_tokenizer = open_tokenizer
        self._executor = InProcessExecutor()
        self._loop: EngineLoop | None = None
        self._link: LinkServer | None = None
        self._metrics_server: MetricsServer | None = None
        self._watchdog: Watchdog | None = None
        self._grammars: Grammars | None = None

    @property
    def loop(self) -> EngineLoop:
        """The step loop of a started engine."""
        if self._loop is None:
            raise RuntimeError("the engine is not started")
        return self._loop

    async def start(self) -> EngineAddresses:
        """Load, warm up, test, listen. On an error everything is stopped again.

        Raises:
            PawlError: a setting is wrong, or no port is free.
            WorkerError: the model cannot be loaded or fails its self-test.
        """
        try:
            return await self._start()
        except BaseException:
            await self.stop()
            raise

    async def run(self) -> None:
        """Serve until `stop`.

        Raises:
            ServerError: the worker is beyond repair; the process should end with an error.
        """
        await self.loop.run()

    async def stop(self, grace_s: float = 5.0) -> None:
        """Stop after the running step, but at most `grace_s` later; front ends see their streams break."""
        if self._loop is not None:
            self._loop.stop()
            try:
                async with asyncio.timeout(grace_s):
                    await self._loop.stopped.wait()
            except TimeoutError:
                log.warning("the running step did not end in %.1f s", grace_s)
        if self._link is not None:
            await self._link.stop()
        if self._metrics_server is not None:
            await asyncio.to_thread(self._metrics_server.stop)
        if self._watchdog is not None:
            self._watchdog.close()
        if self._grammars is not None:
            await self._grammars.close()
        await self._executor.close()
        self._link = self._metrics_server = self._watchdog = self._grammars = None

    async def _start(self) -> EngineAddresses:
        spec = self.spec
        check_engine(spec.engine)
        ports = parse_ports(spec.ports, "engine_ports")
        metrics_ports = parse_ports(spec.metrics_ports, "engine_metrics_ports")
        worker = await self._load()
        facts = worker.facts
        limits = limits_of(spec, facts)
        report_memory(self._progress, facts, limits)
        await self._warm_up(limits)
        limits = await self._use_host_blocks(facts, limits)
        await self._self_test(worker)
        root = CacheRoot(facts.revision or spec.model.model, facts.kv_type, facts.block_size)
        metrics = EngineMetrics(served_name(spec), spec.replica)
        metrics.config(
            dtype=facts.data_type,
            kernels=facts.kernels,
            block_size=facts.block_size,
            num_blocks=facts.num_blocks,
        )
        self._watchdog = Watchdog(spec.engine.step_timeout_s)
        meter = Meter(metrics)
        self._grammars = Grammars.open(spec.engine, facts, lambda: self._open_tokenizer(spec, facts))
        state = SchedulerState(limits, root)
        if limits.max_drafts:
            state.speculation = Speculation(limits.max_drafts, self._grammars.make_proposer)
        books = Books(
            state,
            meter,
            budget=StepBudget(spec.engine.target_gap_s) if spec.engine.target_gap_s > 0 else None,
            journal=_open_journal(spec, state),
            check_every=spec.engine.check_every,
        )
        depth = steps_in_flight(spec, facts, limits)
        self._loop = EngineLoop(state, self._executor, self._watchdog, books, grammars=self._grammars, depth=depth)
        service = EngineService(self._loop, welcome_of(spec, facts, limits), spec.heartbeat_timeout_s)
        self._link = LinkServer(service, spec.internal_token)
        port = await self._link.start(spec.host, ports)
        self._metrics_server = _serve_metrics(spec.metrics_host or spec.host, metrics_ports, meter)
        host = spec.advertise_host or spec.host
        return EngineAddresses(
            address=host_port(host, port),
            metrics_address=host_port(spec.advertise_host or spec.metrics_host or spec.host, self._metrics_server.port),
            process_id=os.getpid(),
        )

    async def _load(self) -> EngineWorker:
        report = LoadReport(self._progress)
        worker = await self._executor.load(lambda: self._load_worker(self.spec, report.on_progress))
        report.loaded(worker.facts, dummy_weights=self.spec.model.dummy_weights)
        return worker

    async def _warm_up(self, limits: SchedulerLimits) -> None:
        report = WarmUpReport(self._progress)
        report.done(*await warm_up(self._executor, limits, report.on_step))

    async def _use_host_blocks(self, facts: WorkerFacts, limits: SchedulerLimits) -> SchedulerLimits:
        """Limits with the second tier of the cache, if the worker has one, and what restoring takes there."""
        if not facts.num_host_blocks:
            return limits
        token_s = await measure_prefill(self._executor, limits)
        cost = RestoreCost(facts.restore_fixed_s, facts.restore_block_s, token_s, limits.block_size)
        log.info(
            "%d host blocks: bringing one back takes %.0f us, and %.0f us a transfer; computing its tokens %.0f us",
            facts.num_host_blocks,
            cost.block_s * 1e6,
            cost.fixed_s * 1e6,
            cost.token_s * cost.block_size * 1e6,
        )
        return dataclasses.replace(limits, num_host_blocks=facts.num_host_blocks, restore_cost=cost)

    async def _self_test(self, worker: EngineWorker) -> None:
        stage = Stage(self._progress, "self-test")
        report = await self._executor.call(worker.self_test)
        await self._executor.reset(1)
        report_self_test(stage, report)


def _open_journal(spec: EngineSpec, state: SchedulerState) -> JournalFile | None:
    """The file that the scheduler's decisions are recorded in, `PATH.REPLICA`, or none.

    Raises:
        InvalidRequest: it cannot be made.
    """
    if not spec.engine.journal:
        return None
    state.journal = Journal(state.limits, spec.engine.target_gap_s, epoch=state.epoch)
    path = Path(f"{spec.engine.journal}.{spec.replica}")
    try:
        return JournalFile(path, state.journal)
    except OSError as error:
        text = f"journal = {spec.engine.journal!r}: cannot write {path}: {error.strerror}"
        raise InvalidRequest(text, reason="BAD_SETTING") from error


def _serve_metrics(host: str, ports: range, meter: Meter) -> MetricsServer:
    for port in ports:
        try:
            return serve_metrics(host, port, meter.exposition)
        except OSError:
            continue
    raise Unavailable(
        f"no free port for the engine's metrics on {host} in {ports.start}-{ports.stop - 1}: set engine_metrics_ports",
        reason="PORT_IN_USE",
    )
