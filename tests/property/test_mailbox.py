"""The mailbox between an engine and a reader: whatever their pace, nothing is lost, doubled or out of order."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pawl_server.frontend.mailbox import EVERYTHING, Delta, Mailbox
from pawl_server.internal.v1 import engine_pb2

END = "end"


@dataclass(frozen=True)
class Put:
    """What the engine's side does: tokens, whether they come with text, then how long it pauses."""

    num_tokens: int
    with_text: bool
    pauses: int


puts = st.lists(st.builds(Put, st.integers(0, 5), st.booleans(), st.integers(0, 3)), max_size=20)


def _entries(first: int, number: int) -> list[engine_pb2.PositionLogprobs]:
    return [engine_pb2.PositionLogprobs(token_id=first + n) for n in range(number)]


async def _write(mailbox: Mailbox[str], script: list[Put]) -> str:
    text, number = "", 0
    for put in script:
        piece = f"<{number}>" if put.with_text else ""
        mailbox.put(range(number, number + put.num_tokens), _entries(number, put.num_tokens), piece)
        text, number = text + piece, number + put.num_tokens
        for _ in range(put.pauses):
            await asyncio.sleep(0)
    assert mailbox.finish(END)
    assert not mailbox.finish("another end")
    return text


async def _read(mailbox: Mailbox[str], pauses: list[int]) -> list[Delta]:
    deltas: list[Delta] = []
    while isinstance(taken := await mailbox.take(), Delta):
        deltas.append(taken)
        for _ in range(pauses[len(deltas) % len(pauses)] if pauses else 0):
            await asyncio.sleep(0)
    assert taken == END
    return deltas


@given(puts, st.lists(st.integers(0, 4), max_size=4), st.sampled_from([1, 2, 7, EVERYTHING]), st.sampled_from([0, 1]))
def test_order_and_counts_survive_the_joining(script: list[Put], pauses: list[int], least: int, first: int) -> None:
    total = sum(put.num_tokens for put in script)

    async def run() -> tuple[str, list[Delta]]:
        mailbox: Mailbox[str] = Mailbox(total, least, first_tokens=first)
        async with asyncio.timeout(10):
            text, deltas = await asyncio.gather(_write(mailbox, script), _read(mailbox, pauses))
        assert mailbox.num_tokens == total
        return text, deltas

    text, deltas = asyncio.run(run())
    assert [token_id for delta in deltas for token_id in delta.token_ids] == list(range(total))
    assert "".join(delta.text for delta in deltas) == text
    expected = 0
    for delta in deltas:
        assert delta.offset == expected
        assert [entry.token_id for entry in delta.logprobs] == delta.token_ids
        assert delta.token_ids or delta.text
        expected += len(delta.token_ids)
    assert all(len(delta.token_ids) >= least for delta in deltas[first:-1])
    assert all(delta.token_ids for delta in deltas[:-1])
    if least == EVERYTHING:
        assert len(deltas) <= 1 + first


@given(st.integers(0, 20), st.lists(st.integers(0, 6), max_size=12))
def test_it_never_holds_more_than_one_output(most: int, sizes: list[int]) -> None:
    mailbox: Mailbox[str] = Mailbox(most)
    held = 0
    for size in sizes:
        if held + size > most:
            with pytest.raises(ValueError, match=f"more than {most} tokens"):
                mailbox.put([1] * size, (), "x")
        else:
            mailbox.put([1] * size, (), "")
            held += size
        assert mailbox.num_tokens == len(mailbox._waiting.token_ids) == held
    mailbox.finish(END)
    with pytest.raises(ValueError, match="after the end"):
        mailbox.put((), (), "more")


async def test_the_first_token_does_not_wait_for_more() -> None:
    mailbox: Mailbox[str] = Mailbox(10, 3, first_tokens=1)
    sent = []
    for token_id in range(6):
        mailbox.put([token_id], (), "abcdef"[token_id])
        waiting = asyncio.create_task(mailbox.take())
        await asyncio.sleep(0)
        if waiting.done():
            sent.append(waiting.result())
        else:
            waiting.cancel()
    assert sent == [Delta(0, [0], [], "a"), Delta(1, [1, 2, 3], [], "bcd")]
    mailbox.finish(END)
    assert await mailbox.take() == Delta(4, [4, 5], [], "ef")
    assert await mailbox.take() == END


class _Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


async def test_deltas_keep_their_distance_and_the_end_does_not_wait() -> None:
    clock = _Clock()
    mailbox: Mailbox[str] = Mailbox(10, 1, min_interval_s=1000.0, clock=clock)
    mailbox.put([1], (), "a")
    assert (await mailbox.take()) == Delta(0, [1], [], "a")
    mailbox.put([2], (), "b")
    waiting = asyncio.create_task(mailbox.take())
    for _ in range(5):
        await asyncio.sleep(0)
    assert not waiting.done()
    mailbox.put([3], (), "c")
    mailbox.finish(END)
    async with asyncio.timeout(10):
        assert (await waiting) == Delta(1, [2, 3], [], "bc")
        assert (await mailbox.take()) == END
    clock.now = 2000.0
