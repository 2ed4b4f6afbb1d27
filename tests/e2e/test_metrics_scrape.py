"""What Prometheus would scrape from a real server: every metric that rules and panels name, and sums that add up."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from pawl import Client, Completion, Overloaded, Stop
from pawl_server.frontend.auth import hash_key, new_key
from pawl_server.metrics import PHASES, WAIT_REASONS
from tests.fakes.servers import RunningServer, pawl_serve
from tests.fakes.waiting import wait_until
from tests.unit.deploy.promql import expressions, metric_names_in, selectors_in

NUM_STREAMED, NUM_UNARY, NUM_REFUSED = 3, 2, 2
MAX_TOKENS = 12
STREAMED = Stop(max_tokens=300, ignore_eos=True)  # long enough not to be joined into one delta on a busy machine
# Made by Prometheus itself, or by a recording rule (these have a colon).
NOT_OURS = {"up"}

Series = dict[str, list[tuple[dict[str, str], float]]]


@dataclass(frozen=True, slots=True)
class Scrape:
    """A scrape after some requests, and what the clients saw of them."""

    series: Series
    completions: list[Completion]

    def total(self, name: str, **labels: str) -> float:
        """Sum of a series over what its labels leave open."""
        assert name in self.series, name
        return sum(value for found, value in self.series[name] if labels.items() <= found.items())


def _series(server: RunningServer) -> Series:
    found: Series = {}
    for family in text_string_to_metric_families(server.scrape()):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def _lose_an_engine(server: RunningServer) -> None:
    """Kill the engine and wait for its successor: restarts are on the dashboard, too."""
    (engine,) = server.engines()
    engine.kill()

    def is_back() -> bool:
        series = _series(server)
        restarts = sum(value for _, value in series.get("pawl_worker_restarts_total", []))
        return restarts == 1 and sum(value for _, value in series["pawl_worker_up"]) == 1

    wait_until(is_back, 60.0)


def _make_requests(server: RunningServer, key: str, limited_key: str) -> list[Completion]:
    completions = []
    with Client(server.target, api_key=key) as client:
        for number in range(NUM_STREAMED):
            with client.stream(f"The pawl number {number} lets", stop=STREAMED, seed=number) as stream:
                completions.append(stream.final())
        completions += [client.generate("Once upon a time", max_tokens=MAX_TOKENS) for _ in range(NUM_UNARY)]
    with Client(server.target, api_key=limited_key, retries=0) as client:
        completions.append(client.generate("A wheel", max_tokens=MAX_TOKENS))
        for _ in range(NUM_REFUSED):
            with pytest.raises(Overloaded):
                client.generate("A wheel", max_tokens=MAX_TOKENS)
    return completions


@pytest.fixture(scope="module")
def scrape(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Scrape]:
    key, limited_key = new_key(), new_key()
    keys = Path(tmp_path_factory.mktemp("keys")) / "keys.toml"
    keys.write_text(
        f'[[keys]]\nhash = "{hash_key(key)}"\ntenant = "free"\n'
        f'[[keys]]\nhash = "{hash_key(limited_key)}"\ntenant = "limited"\nrequests_per_minute = 1\n'
    )
    with pawl_serve(f"--api-key-file={keys}") as server:
        _lose_an_engine(server)
        completions = _make_requests(server, key, limited_key)
        yield Scrape(_series(server), completions)
        assert server.stop() == 0


def test_every_metric_of_rules_and_dashboard_is_scraped(scrape: Scrape) -> None:
    named = {name for expression in expressions() for name in metric_names_in(expression.text)}
    ours = {name for name in named if ":" not in name} - NOT_OURS
    assert len(ours) > 25
    assert not sorted(ours - set(scrape.series))


def test_every_bucket_that_a_rule_names_is_scraped(scrape: Scrape) -> None:
    wanted = {
        (name, matchers["le"][1])
        for expression in expressions()
        for name, matchers in selectors_in(expression.text)
        if "le" in matchers
    }
    assert wanted
    for name, bound in wanted:
        assert bound in {labels["le"] for labels, _ in scrape.series[name]}, (name, bound)


def test_requests_end_in_one_outcome_each(scrape: Scrape) -> None:
    total = scrape.total("pawl_requests_total")
    assert total == len(scrape.completions) + NUM_REFUSED
    assert scrape.total("pawl_requests_total", outcome="rejected") == NUM_REFUSED
    assert scrape.total("pawl_scheduler_queue_rejections_total") == NUM_REFUSED
    assert scrape.total("grpc_server_handled_total", grpc_code="RESOURCE_EXHAUSTED") == NUM_REFUSED


def test_phases_of_requests_sum_to_their_total(scrape: Scrape) -> None:
    sums = {phase: scrape.total("pawl_request_duration_seconds_sum", phase=phase) for phase in PHASES}
    assert sums["total"] > 0
    assert sum(sums.values()) - sums["total"] == pytest.approx(sums["total"], rel=1e-6)
    for phase in PHASES:
        assert scrape.total("pawl_request_duration_seconds_count", phase=phase) == len(scrape.completions)


def test_tokens_are_those_that_clients_were_told(scrape: Scrape) -> None:
    output = sum(completion.usage.output_tokens for completion in scrape.completions)
    prompt = sum(completion.usage.prompt_tokens for completion in scrape.completions)
    assert output > 0
    assert scrape.total("pawl_output_tokens_total") == output
    assert scrape.total("pawl_request_output_tokens_sum") == output
    assert scrape.total("pawl_request_prompt_tokens_sum") == prompt
    first_time = [scrape.total("pawl_prompt_tokens_total", source=source) for source in ("computed", "cached")]
    assert sum(first_time) == prompt


def test_kv_blocks_sum_to_the_capacity(scrape: Scrape) -> None:
    capacity = scrape.total("pawl_kv_block_capacity")
    assert capacity > 0
    assert scrape.total("pawl_kv_blocks") == capacity
    # All requests have ended: nothing is in use, and prefixes are kept.
    assert scrape.total("pawl_kv_blocks", state="used") == 0
    assert scrape.total("pawl_kv_cache_usage_ratio") == 0


def test_waiting_is_labelled_with_every_reason(scrape: Scrape) -> None:
    assert {labels["reason"] for labels, _ in scrape.series["pawl_requests_waiting"]} == set(WAIT_REASONS)
    assert scrape.total("pawl_requests_waiting") == 0


def test_latencies_are_counted_once_per_request_or_gap(scrape: Scrape) -> None:
    assert scrape.total("pawl_time_to_first_token_seconds_count") == len(scrape.completions)
    assert scrape.total("pawl_time_per_output_token_seconds_count") == sum(
        completion.usage.output_tokens > 1 for completion in scrape.completions
    )
    assert 0 < scrape.total("pawl_output_gap_seconds_count") <= scrape.total("pawl_output_tokens_total")
