"""GetModel and ListModels: what is served, by the engines' own account."""

# ruff: noqa: N802 - gRPC names the methods
from __future__ import annotations

from pawl.v1 import model_pb2, model_pb2_grpc, types_pb2
from pawl_server.frontend import validate_other
from pawl_server.frontend.calls import Context
from pawl_server.frontend.core import Core
from pawl_server.frontend.model import ServedModel

__all__ = ["ModelService"]

_PAGE = 50


class ModelService(model_pb2_grpc.ModelServiceServicer):
    """Facts about the served models; there is one."""

    def __init__(self, core: Core) -> None:
        self._core = core

    async def GetModel(self, request: model_pb2.GetModelRequest, context: Context) -> model_pb2.GetModelResponse:
        """See the proto."""
        name = validate_other.model_name(request)
        return model_pb2.GetModelResponse(model=self._describe(self._core.served(name)))

    async def ListModels(self, request: model_pb2.ListModelsRequest, context: Context) -> model_pb2.ListModelsResponse:
        """See the proto."""
        size, offset = validate_other.page(request, _PAGE)
        models = [self._describe(self._core.served(""))][offset : offset + size]
        return model_pb2.ListModelsResponse(models=models)

    def _describe(self, model: ServedModel) -> model_pb2.Model:
        facts, defaults = self._core.replicas.facts, model.defaults
        sampling = types_pb2.SamplingParams(
            temperature=defaults.temperature,
            top_p=defaults.top_p,
            min_p=defaults.min_p,
            repetition_penalty=defaults.repetition_penalty,
            presence_penalty=0.0,
            frequency_penalty=0.0,
        )
        if defaults.top_k:
            sampling.top_k = defaults.top_k
        return model_pb2.Model(
            name=f"models/{model.id}",
            display_name=model.id,
            architectures=facts.architectures if facts else (),
            max_context_tokens=self._core.max_context,
            vocab_size=self._core.vocab_size,
            data_type=facts.data_type if facts else "",
            eos_token_ids=facts.eos_token_ids if facts else (),
            default_sampling=sampling,
            has_chat_template=model.template is not None,
            revision=facts.revision if facts else "",
        )
