"""The calls of the public contract: path, request and response of each, once.

Owns the table that both transports read; a test holds it against the proto descriptors. The generated stubs
are not used here because they are typed for sync channels alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Generic, TypeVar

from google.protobuf import message, wrappers_pb2

from pawl.v1 import admin_pb2, inference_pb2, model_pb2, tokenizer_pb2

__all__ = ["Method"]

ResponseT = TypeVar("ResponseT", bound=message.Message)


@dataclass(frozen=True, slots=True)
class Method(Generic[ResponseT]):
    """One call: its path, and the classes of its messages."""

    path: str
    request: type[message.Message]
    response: type[ResponseT]

    @property
    def name(self) -> str:
        """The last part of the path, as in the proto."""
        return self.path.rpartition("/")[2]


_INFERENCE: Final = "/pawl.v1.InferenceService/"
_TOKENIZER: Final = "/pawl.v1.TokenizerService/"
_MODEL: Final = "/pawl.v1.ModelService/"
_ADMIN: Final = "/pawl.v1.AdminService/"

GENERATE: Final = Method(_INFERENCE + "Generate", inference_pb2.GenerateRequest, inference_pb2.GenerateResponse)
STREAM_GENERATE: Final = Method(
    _INFERENCE + "StreamGenerate", inference_pb2.StreamGenerateRequest, inference_pb2.StreamGenerateResponse
)
CHAT: Final = Method(_INFERENCE + "Chat", inference_pb2.ChatRequest, inference_pb2.ChatResponse)
STREAM_CHAT: Final = Method(
    _INFERENCE + "StreamChat", inference_pb2.StreamChatRequest, inference_pb2.StreamChatResponse
)
SCORE: Final = Method(_INFERENCE + "Score", inference_pb2.ScoreRequest, inference_pb2.ScoreResponse)
CANCEL: Final = Method(_INFERENCE + "Cancel", inference_pb2.CancelRequest, inference_pb2.CancelResponse)
TOKENIZE: Final = Method(_TOKENIZER + "Tokenize", tokenizer_pb2.TokenizeRequest, tokenizer_pb2.TokenizeResponse)
DETOKENIZE: Final = Method(_TOKENIZER + "Detokenize", tokenizer_pb2.DetokenizeRequest, tokenizer_pb2.DetokenizeResponse)
RENDER_CHAT: Final = Method(
    _TOKENIZER + "RenderChat", tokenizer_pb2.RenderChatRequest, tokenizer_pb2.RenderChatResponse
)
GET_MODEL: Final = Method(_MODEL + "GetModel", model_pb2.GetModelRequest, model_pb2.GetModelResponse)
LIST_MODELS: Final = Method(_MODEL + "ListModels", model_pb2.ListModelsRequest, model_pb2.ListModelsResponse)
GET_SERVER_INFO: Final = Method(
    _ADMIN + "GetServerInfo", admin_pb2.GetServerInfoRequest, admin_pb2.GetServerInfoResponse
)
WATCH_LOAD: Final = Method(_ADMIN + "WatchLoad", admin_pb2.WatchLoadRequest, admin_pb2.WatchLoadResponse)
LIST_REQUESTS: Final = Method(_ADMIN + "ListRequests", admin_pb2.ListRequestsRequest, admin_pb2.ListRequestsResponse)
DRAIN: Final = Method(_ADMIN + "Drain", admin_pb2.DrainRequest, admin_pb2.DrainResponse)
FLUSH_PREFIX_CACHE: Final = Method(
    _ADMIN + "FlushPrefixCache", admin_pb2.FlushPrefixCacheRequest, admin_pb2.FlushPrefixCacheResponse
)
# grpc.health.v1 is not part of the base install. Its request is one string and its response one enum, both
# field 1, which is what these well-known types are on the wire.
HEALTH_CHECK: Final = Method("/grpc.health.v1.Health/Check", wrappers_pb2.StringValue, wrappers_pb2.Int32Value)
HEALTH_SERVING: Final = 1
