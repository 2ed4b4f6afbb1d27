"""What drawn configurations share: sizes of a decoder, kinds of rotary embeddings, and values to choose from."""

from __future__ import annotations

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn

__all__ = [
    "EPSILONS",
    "FUSED",
    "INNER",
    "LEAST_WIDTH",
    "MAX_POSITIONS",
    "NORMED_INNER",
    "THETAS",
    "WINDOWS",
    "Values",
    "common",
    "partly_turned",
    "rotary",
]

MAX_POSITIONS = 192
_MOST_WIDE_HEADS = 4
LEAST_WIDTH = 16  # of the stream: a norm over fewer values magnifies rounding beyond what is measured here
FUSED = st.sampled_from([16, 32, 48, 64])  # widths of an MLP whose gates the cpu kernels fuse
INNER = st.integers(5, 70) | FUSED
# Where a norm follows the MLP: what few values give may be small all over, and the norm magnifies its rounding.
# With 5 of them transformers lies up to 1.2e-4 from what it computes in float64, and with 16 up to 2e-5.
NORMED_INNER = st.integers(16, 70) | FUSED
Values = dict[str, object]


def _even(draw: DrawFn, low: int, high: int) -> int:
    return 2 * draw(st.integers(-(-low // 2), high // 2))


@st.composite
def common(draw: DrawFn, *, free_head_dim: bool | None = True, grouped: bool = True) -> Values:
    """What all decoders share. Head dimensions are even, since all of it turns.

    `free_head_dim`: the configuration names it, and it need not fit the hidden size; None = it may or may not.
    """
    num_kv_heads = draw(st.integers(1, 3)) if grouped else 1
    num_heads = num_kv_heads * draw(st.integers(1, 4) | st.just(8))
    free_head_dim = draw(st.booleans()) if free_head_dim is None else free_head_dim
    head_dim = _even(draw, -(-LEAST_WIDTH // num_heads) if not free_head_dim else 4, 26)
    if num_heads <= _MOST_WIDE_HEADS and draw(st.booleans()):
        head_dim = draw(st.sampled_from([32, 40, 64, 80, 128] if free_head_dim else [32, 40]))
    values: Values = {
        "vocab_size": draw(st.integers(60, 300)),
        "num_attention_heads": num_heads,
        "num_key_value_heads": num_kv_heads if grouped else num_heads,
        "intermediate_size": draw(INNER),
        "num_hidden_layers": draw(st.integers(1, 3)),
        "max_position_embeddings": MAX_POSITIONS,
        "tie_word_embeddings": draw(st.booleans()),
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    if free_head_dim:
        least = -(-LEAST_WIDTH // num_heads)
        values |= {"hidden_size": num_heads * draw(st.integers(least, least + 10)), "head_dim": head_dim}
    else:
        values |= {"hidden_size": num_heads * head_dim}
    return values


WINDOWS = st.sampled_from([1, 2, 7, 16, 31, 33, 64])
EPSILONS = st.sampled_from([1e-6, 1e-5, 1e-3])
THETAS = st.sampled_from([100.0, 10000.0, 500000.0])


@st.composite
def rotary(draw: DrawFn, kinds: tuple[str, ...], *, of_one_kind_of_layer: bool = False) -> Values:
    """`of_one_kind_of_layer`: a section of its own; transformers 5.23 looks for `truncate` beside the sections."""
    kind = draw(st.sampled_from(kinds))
    rope: Values = {"rope_type": kind, "rope_theta": draw(THETAS)}
    match kind:
        case "linear" | "dynamic":
            rope["factor"] = draw(st.sampled_from([2.0, 4.0]))
        case "llama3":
            rope |= {
                "factor": draw(st.sampled_from([2.0, 8.0, 32.0])),
                "low_freq_factor": 1.0,
                "high_freq_factor": draw(st.sampled_from([2.0, 4.0])),
                "original_max_position_embeddings": draw(st.sampled_from([24, 64])),
            }
        case "yarn":
            rope |= {"factor": 4.0, "original_max_position_embeddings": MAX_POSITIONS // 4}
            for key, found in (
                ("beta_fast", st.sampled_from([4.0, 32.0])),
                ("beta_slow", st.sampled_from([0.5, 1.0])),
                ("attention_factor", st.sampled_from([0.7, 1.2])),
                ("truncate", st.booleans()),
            ):
                if draw(st.booleans()) and not (of_one_kind_of_layer and key == "truncate"):
                    rope[key] = draw(found)
            if draw(st.booleans()):
                rope |= {"mscale": 0.8, "mscale_all_dim": 1.3}
        case _:
            pass
    return rope


@st.composite
def partly_turned(draw: DrawFn, *, free_head_dim: bool = False) -> Values:
    """Heads of which a share turns."""
    values = draw(common(free_head_dim=free_head_dim))
    heads = values["num_attention_heads"]
    assert isinstance(heads, int)
    head_dim, share = draw(st.sampled_from([(16, 0.25), (16, 0.5), (20, 0.4), (20, 0.5), (24, 0.75), (18, 1.0)]))
    width = heads * draw(st.integers(16, 24)) if free_head_dim else heads * head_dim
    rope: Values = {"rope_type": "default", "rope_theta": draw(THETAS), "partial_rotary_factor": share}
    values |= {"hidden_size": width, "rope_parameters": rope}
    return values | {"head_dim": head_dim} if free_head_dim else values
