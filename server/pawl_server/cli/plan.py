"""`pawl plan MODEL`: what a server of these settings would take of this machine, without loading a weight.

Works out the same plan by which a worker starts (`pawl_workers.start_plan`), from the configuration and the headers
of the weights; of a model on the hub it fetches no more than these. Imports torch, for the kernels, and no Ray.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from pawl_server.config import Config
from pawl_server.engine.load import worker_options
from pawl_server.fleet.specs import num_cores, served_name
from pawl_workers.errors import OutOfMemoryError, WorkerError
from pawl_workers.start_plan import StartPlan, explain_kernels, plan_checkpoint, plan_start

__all__ = ["Alternative", "ModelPlan", "plan_model"]

_Choice = tuple[str, str, str, str]  # kernels, dtype, kv_dtype, weight_dtype
_ALTERNATIVES: dict[str, tuple[_Choice, ...]] = {
    "cpu": (
        ("cpu", "float32", "auto", "auto"),
        ("cpu", "float32", "float16", "auto"),
        ("cpu", "float32", "int8", "auto"),
        ("cpu", "float32", "auto", "int8"),
        ("cpu", "float32", "auto", "int8_g128"),
        ("cpu", "float32", "auto", "int8_g64"),
        ("cpu", "float32", "auto", "int8_g32"),
        ("cpu", "float32", "float16", "int8"),
        ("cpu", "float32", "int8", "int8"),
        ("onednn", "float32", "auto", "auto"),
        ("reference", "float32", "auto", "auto"),
        ("reference", "bfloat16", "auto", "auto"),
    ),
    "cuda": (
        ("triton", "bfloat16", "auto", "auto"),
        ("triton", "float16", "auto", "auto"),
        ("triton", "float32", "auto", "auto"),
        ("reference", "bfloat16", "auto", "auto"),
    ),
}


_NAME_WIDTH = 40


@dataclass(frozen=True, slots=True)
class Alternative:
    """What other kernels or other types would take; `refused` says why they cannot serve or do not fit.

    `kv_dtype` and `weight_dtype` are as in the settings: "auto" is what the kernels compute in, and exact weights.
    """

    kernels: str
    dtype: str
    kv_dtype: str = "auto"
    weight_dtype: str = "auto"
    weight_bytes: int = 0
    kv_bytes_per_token: int = 0
    cache_tokens: int = 0
    requests: int = 0
    refused: str = ""

    @property
    def name(self) -> str:
        """For people."""
        types = [("KV", self.kv_dtype), ("weights", self.weight_dtype)]
        return ", ".join(
            [f"{self.kernels} {self.dtype}", *(f"{what} {kind}" for what, kind in types if kind != "auto")]
        )

    @property
    def flags(self) -> str:
        """The flags of `pawl serve` that choose it."""
        chosen = {"kernels": self.kernels, "dtype": self.dtype}
        chosen |= {"kv-dtype": self.kv_dtype, "weight-dtype": self.weight_dtype}
        return " ".join(f"--{flag}={value}" for flag, value in chosen.items() if value != "auto")


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """A plan in numbers, for `--json`; sizes in bytes, of one replica.

    Attributes:
        weight_bytes: in memory; exact where weights are stored in 16 bits, else the most.
        stored_bytes: in the files.
        cache_tokens: tokens whose keys and values fit at once.
        requests: sequences of `max_context` tokens that fit at once.
        refused: why it does not fit; empty if it does. Then blocks, tokens and requests are 0.
    """

    model: str
    architecture: str
    num_parameters: int
    num_layers: int
    vocab_size: int
    max_context: int
    replicas: int
    num_threads: int
    device: str
    dtype: str
    stored_dtypes: tuple[str, ...]
    kernels: str
    kernels_reason: str
    available_bytes: int
    stored_bytes: int
    weight_bytes: int
    activation_bytes: int
    kv_bytes: int
    reserve_bytes: int
    block_size: int
    num_blocks: int
    kv_bytes_per_token: int
    cache_tokens: int
    requests: int
    refused: str
    alternatives: tuple[Alternative, ...]

    def lines(self) -> list[str]:
        """For people."""
        each = " each" if self.replicas > 1 else ""
        rows = [
            ("device", f"{self.device}, {self.dtype}, {self.num_threads} thread(s)"),
            ("kernels", f"{self.kernels}: {self.kernels_reason}"),
            ("available", f"{_size(self.available_bytes)} to {self.replicas} replica(s)"),
            (
                "weights",
                f"{_size(self.weight_bytes)}{each}, stored as {' and '.join(self.stored_dtypes)}"
                f" in {_size(self.stored_bytes)}",
            ),
            ("activations", f"{_size(self.activation_bytes)}{each}, at most"),
            ("KV", f"{_size(self.kv_bytes)}{each}, {_size(self.kv_bytes_per_token)} per token"),
        ]
        if not self.refused:
            rows += [
                (
                    "KV cache",
                    f"{self.num_blocks} blocks x {self.block_size} = {self.cache_tokens} tokens:"
                    f" {self.requests} request(s) of {self.max_context} at once",
                ),
                ("left", _size(self.reserve_bytes)),
            ]
        head = (
            f"{self.model}  {self.architecture}, {self.num_parameters / 1e6:.1f} M parameters, {self.num_layers} layers"
        )
        return [
            head,
            *(f"  {name:<12} {text}" for name, text in rows),
            *([f"  DOES NOT FIT {self.refused}", *self._what_would_fit()] if self.refused else ["  fits"]),
            "",
            f"  {'with':<{_NAME_WIDTH}}{'weights':>12}{'KV/token':>12}{'tokens':>12}{'requests':>10}",
            *(_row(alternative) for alternative in self.alternatives),
        ]

    def _what_would_fit(self) -> list[str]:
        fitting = [alternative for alternative in self.alternatives if not alternative.refused]
        if not fitting:
            return ["  nothing below fits either"]
        return [
            f"  would fit    {a.flags}: weights {_size(a.weight_bytes)}, {a.cache_tokens} tokens,"
            f" {a.requests} request(s) of {self.max_context}"
            for a in fitting
        ]


def _row(a: Alternative) -> str:
    name = f"  {a.name:<{_NAME_WIDTH}}"
    if a.refused and not a.weight_bytes:
        return f"{name}{a.refused}"
    fits = "does not fit" if a.refused else f"{a.cache_tokens:>12}{a.requests:>10}"
    return f"{name}{_size(a.weight_bytes):>12}{_size(a.kv_bytes_per_token):>12}{fits:>22}"


def plan_model(config: Config) -> ModelPlan:
    """Plan the model of the settings.

    Raises:
        WorkerError: the checkpoint cannot be found, read or understood, or what was asked for cannot serve it.
    """
    replicas = config.fleet.replicas
    num_threads = config.engine.num_threads or max(1, num_cores() // replicas)
    options = worker_options(config.model, config.engine, num_threads)
    plan = plan_start(options, fetch=False)
    spec, main = plan.config.spec, _numbers(plan)
    try:
        memory = plan.divide_memory()
        kv_bytes, reserve_bytes, num_blocks = memory.kv_bytes, memory.reserve_bytes, memory.num_blocks
    except OutOfMemoryError:
        kv_bytes = reserve_bytes = num_blocks = 0
    return ModelPlan(
        model=served_name(config),
        architecture=spec.architecture,
        num_parameters=plan.reading.num_parameters,
        num_layers=spec.num_layers,
        vocab_size=spec.vocab_size,
        max_context=plan.max_context,
        replicas=replicas,
        num_threads=num_threads,
        device=str(plan.device),
        dtype=main.dtype,
        stored_dtypes=plan.reading.stored_dtypes,
        kernels=main.kernels,
        kernels_reason=explain_kernels(plan),
        available_bytes=plan.available_bytes,
        stored_bytes=plan.reading.stored_bytes,
        weight_bytes=main.weight_bytes,
        activation_bytes=plan.activation_bytes,
        kv_bytes=kv_bytes,
        reserve_bytes=reserve_bytes,
        block_size=plan.kernels.block_size,
        num_blocks=num_blocks,
        kv_bytes_per_token=main.kv_bytes_per_token,
        cache_tokens=main.cache_tokens,
        requests=main.requests,
        refused=main.refused,
        alternatives=tuple(_alternative(plan, *choice) for choice in _ALTERNATIVES[options.device]),
    )


def _alternative(plan: StartPlan, kernels: str, dtype: str, kv_dtype: str, weight_dtype: str) -> Alternative:
    options = dataclasses.replace(
        plan.options, kernels=kernels, dtype=dtype, kv_dtype=kv_dtype, weight_dtype=weight_dtype
    )
    try:
        return _numbers(plan_checkpoint(options, plan.config, plan.reading))
    except WorkerError as error:
        return Alternative(kernels, dtype, kv_dtype, weight_dtype, refused=str(error))


def _numbers(plan: StartPlan) -> Alternative:
    options, block_size = plan.options, plan.kernels.block_size
    found = Alternative(
        kernels=plan.kernels.name,
        dtype=str(plan.dtype).removeprefix("torch."),
        kv_dtype=options.kv_dtype,
        weight_dtype=options.weight_dtype,
        weight_bytes=plan.weight_bytes,
        kv_bytes_per_token=plan.block_bytes // block_size,
    )
    try:
        tokens = plan.divide_memory().num_blocks * block_size
    except OutOfMemoryError as error:
        return dataclasses.replace(found, refused=str(error))
    return dataclasses.replace(found, cache_tokens=tokens, requests=tokens // plan.max_context)


def _size(num_bytes: int) -> str:
    size, unit = float(num_bytes), "B"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if size < 1024:
            break
        size, unit = size / 1024, larger
    return f"{size:.1f} {unit}" if unit != "B" else f"{num_bytes} B"
