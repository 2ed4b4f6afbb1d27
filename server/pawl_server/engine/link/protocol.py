"""What both ends of the link must agree on: version, intervals and channel options. Knows no frame."""

from __future__ import annotations

__all__ = [
    "HEARTBEAT_PERIOD_S",
    "MAX_FRAME_BYTES",
    "MAX_FRAME_TOKENS",
    "PROTOCOL_VERSION",
    "channel_options",
    "server_options",
]

PROTOCOL_VERSION = 2
MAX_CACHE_EVENTS = 8192
"""Changes of the prefix cache between two reports that are told one by one; more make readers begin anew."""
HEARTBEAT_PERIOD_S = 1.0
MAX_FRAME_BYTES = 64 << 20
# Tokens of one frame, with log-probabilities; 20 alternatives are 250 bytes, so a frame stays below 16 MiB.
MAX_FRAME_TOKENS = 1 << 16

Options = list[tuple[str, int]]


def _common(keepalive_time_s: float, keepalive_timeout_s: float) -> Options:
    return [
        ("grpc.max_send_message_length", MAX_FRAME_BYTES),
        ("grpc.max_receive_message_length", MAX_FRAME_BYTES),
        ("grpc.keepalive_time_ms", round(keepalive_time_s * 1000)),
        ("grpc.keepalive_timeout_ms", round(keepalive_timeout_s * 1000)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
    ]


def channel_options(keepalive_time_s: float = 10.0, keepalive_timeout_s: float = 5.0) -> Options:
    """Options of a caller's channel. A channel of its own per link: a stale shared one would hide a loss."""
    return [
        *_common(keepalive_time_s, keepalive_timeout_s),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.enable_retries", 0),
        ("grpc.enable_http_proxy", 0),
    ]


def server_options(keepalive_time_s: float = 10.0, keepalive_timeout_s: float = 5.0) -> Options:
    """Options of an internal listener. Without SO_REUSEPORT a second server on the port fails loudly."""
    return [
        *_common(keepalive_time_s, keepalive_timeout_s),
        ("grpc.so_reuseport", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", 5000),
        ("grpc.max_metadata_size", 16 << 10),
    ]
