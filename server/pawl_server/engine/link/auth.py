"""The shared token of the internal listeners: who may speak to an engine or to the fleet.

Owns the metadata key, the comparison and the interceptor; knows nothing of the services behind it. Loopback
gets no exception: any local user can connect to it.
"""

from __future__ import annotations

import hmac
import logging
import secrets
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

import grpc

from pawl.errors import InvalidRequest

if TYPE_CHECKING:
    # Generic for the type checker alone.
    Handler = grpc.RpcMethodHandler[Any, Any]
    Context = grpc.aio.ServicerContext[Any, Any]

__all__ = ["TOKEN_KEY", "TokenInterceptor", "new_token", "token_metadata"]

log = logging.getLogger(__name__)

TOKEN_KEY = "pawl-internal-token"  # noqa: S105 (name of the metadata key, not a secret)


def new_token() -> str:
    """Draw a token of 256 random bits."""
    return secrets.token_urlsafe(32)


def token_metadata(token: str) -> tuple[tuple[str, str], ...]:
    """Metadata that a caller sends with every call."""
    return ((TOKEN_KEY, token),)


class TokenInterceptor(grpc.aio.ServerInterceptor):
    """Refuses every call without the token with UNAUTHENTICATED, before its handler sees a byte.

    Raises:
        InvalidRequest: the token is empty.
    """

    def __init__(self, token: str) -> None:
        if not token:
            raise InvalidRequest(
                "internal_token is empty: an internal listener needs one (--internal-token-file)",
                reason="BAD_SETTING",
            )
        self._token = token.encode()

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """Hand the call on, or put a refusal of the same shape in its place."""
        handler = await continuation(handler_call_details)
        if handler is None or self._accepts(handler_call_details):
            return handler
        method = handler_call_details.method

        async def refuse(_request: object, context: Context) -> None:
            log.warning("refused %s from %s: no valid %s", method, context.peer(), TOKEN_KEY)
            await context.abort(
                grpc.StatusCode.UNAUTHENTICATED, f"{TOKEN_KEY} is missing or wrong: both ends need one token"
            )

        make = {
            (False, False): grpc.unary_unary_rpc_method_handler,
            (False, True): grpc.unary_stream_rpc_method_handler,
            (True, False): grpc.stream_unary_rpc_method_handler,
            (True, True): grpc.stream_stream_rpc_method_handler,
        }[bool(handler.request_streaming), bool(handler.response_streaming)]
        return make(refuse, handler.request_deserializer, handler.response_serializer)

    def _accepts(self, details: grpc.HandlerCallDetails) -> bool:
        given = [value for key, value in details.invocation_metadata if key == TOKEN_KEY]
        if len(given) != 1:
            return False
        value = given[0].encode() if isinstance(given[0], str) else given[0]
        return hmac.compare_digest(value, self._token)
