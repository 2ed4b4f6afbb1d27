"""Rules of a stream that no server of ours breaks: gaps and repeats."""

from __future__ import annotations

import pytest

from pawl import StreamBroken, _core
from pawl._assembly import Assembly
from pawl._options import Settings
from pawl.testing import ManualClock
from pawl.v1 import inference_pb2


@pytest.mark.parametrize("offset", [0, 3])
def test_gap_or_repeat_breaks_the_stream(offset: int) -> None:
    """Two tokens came; the next delta must start at 2."""
    call = _core.stream_generate(Settings(target="t"), "x", {})
    assembly = Assembly(call, target="t", clock=ManualClock().clock)
    first = inference_pb2.StreamDelta(text="ab", token_offset=0, token_count=2)
    assembly.accept(inference_pb2.StreamGenerateResponse(delta=first))
    second = inference_pb2.StreamDelta(text="c", token_offset=offset, token_count=1)
    with pytest.raises(StreamBroken, match=f"at token {offset}, expected 2") as caught:
        assembly.accept(inference_pb2.StreamGenerateResponse(delta=second))
    assert assembly.done
    assert caught.value.partial is not None
    assert caught.value.partial.text == "ab"


def test_unknown_event_is_passed_over() -> None:
    """A newer server may say more."""
    call = _core.stream_generate(Settings(target="t"), "x", {})
    assembly = Assembly(call, target="t", clock=ManualClock().clock)
    assert assembly.accept(inference_pb2.StreamGenerateResponse()) is None
