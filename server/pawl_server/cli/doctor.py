"""`pawl doctor`: would a server start here, with these settings and this model?

Each check gives one finding with its numbers and, when it fails, the remedy. Starts nothing and loads no weights.
"""

from __future__ import annotations

import importlib
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import psutil

from pawl.errors import PawlError
from pawl_server.config import Config
from pawl_server.fleet.specs import num_cores, served_name
from pawl_server.serve.checks import check_port, exposure_warning
from pawl_workers.errors import WorkerError
from pawl_workers.model.source import resolve_checkpoint, weight_files

__all__ = ["Finding", "examine"]

_GIB = 1 << 30
_SHARED_MEMORY_BYTES = 128 << 20  # Ray's object store, with room
_FAST_KERNELS = {"cpu", "triton"}
_REMEDY = "pip install 'pawl-serve[all]'"


@dataclass(frozen=True, slots=True)
class Finding:
    """Result of one check: `level` is ok, WARN or FAIL."""

    level: str
    name: str
    text: str

    @property
    def line(self) -> str:
        """For people."""
        return f"{self.level:<5} {self.name:<14} {self.text}"


def examine(config: Config) -> Iterator[Finding]:
    """Every check, in order. A check that fails does not stop those after it."""
    checks: list[tuple[str, Callable[[Config], Iterator[Finding]]]] = [
        ("python", _python),
        ("packages", _packages),
        ("device", _device),
        ("memory", _memory),
        ("ports", _ports),
        ("model", _model),
        ("kernels", _kernels),
        ("tokenizer", _tokenizer),
    ]
    for name, check in checks:
        try:
            yield from check(config)
        except (PawlError, WorkerError) as error:
            yield Finding("FAIL", name, str(error))
        except ModuleNotFoundError as error:
            yield Finding("FAIL", name, f"the package {error.name} is not installed: {_REMEDY}")
        except Exception as error:  # a check must not hide the next ones
            yield Finding("FAIL", name, f"{type(error).__name__}: {error}")


def _python(_config: Config) -> Iterator[Finding]:
    version = platform.python_version()
    level = "ok" if sys.version_info >= (3, 11) else "FAIL"
    yield Finding(level, "python", f"{version} at {sys.executable} (3.11 or newer is needed)")


def _packages(config: Config) -> Iterator[Finding]:
    yield Finding("ok", "pawl", _version("pawl-serve") or "run from source")
    needed = ["torch", "grpcio", "protobuf", "tokenizers"]
    if config.fleet.fleet == "ray":
        needed.insert(1, "ray")
    for name in needed:
        version = _version(name)
        if version:
            yield Finding("ok", name, version)
        else:
            hint = "; or use --fleet local" if name == "ray" else ""
            yield Finding("FAIL", name, f"not installed: {_REMEDY}{hint}")


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _device(config: Config) -> Iterator[Finding]:
    torch = importlib.import_module("torch")
    device = config.model.device
    if device in ("auto", "cuda") and torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            free, total = torch.cuda.mem_get_info(index)
            name = torch.cuda.get_device_name(index)
            yield Finding("ok", "device", f"cuda:{index} {name}, {free / _GIB:.1f} of {total / _GIB:.1f} GiB free")
        short = config.fleet.replicas - torch.cuda.device_count()
        if short > 0:
            yield Finding(
                "WARN", "device", f"{config.fleet.replicas} replicas share {torch.cuda.device_count()} GPU(s)"
            )
    elif device == "cuda":
        yield Finding("FAIL", "device", f"no CUDA device is visible to torch {torch.__version__}: use --device cpu")
    else:
        features = torch.backends.cpu.get_cpu_capability()
        threads = config.engine.num_threads or max(1, num_cores() // config.fleet.replicas)
        yield Finding("ok", "device", f"cpu ({features}), {num_cores()} cores, {threads} thread(s) per replica")
        if threads * config.fleet.replicas > num_cores():
            yield Finding("WARN", "device", f"{config.fleet.replicas} x {threads} threads on {num_cores()} cores")


def _memory(config: Config) -> Iterator[Finding]:
    memory = psutil.virtual_memory()
    yield Finding("ok", "memory", f"{memory.available / _GIB:.1f} of {memory.total / _GIB:.1f} GiB available")
    if config.fleet.fleet != "ray" or not Path("/dev/shm").is_dir():  # noqa: S108 (the system's folder, only measured)
        return
    free = shutil.disk_usage("/dev/shm").free  # noqa: S108 (as above)
    text = f"{free / _GIB:.2f} GiB free in the shared-memory file system"
    if free < _SHARED_MEMORY_BYTES:
        yield Finding("FAIL", "shared memory", f"{text}; Ray needs {_SHARED_MEMORY_BYTES / _GIB:.2f} (--shm-size)")
    else:
        yield Finding("ok", "shared memory", text)


def _ports(config: Config) -> Iterator[Finding]:
    frontend = config.frontend
    for name, host, port in (
        ("port", frontend.host, frontend.port),
        ("admin-port", frontend.admin_host, frontend.admin_port),
        ("metrics-port", frontend.metrics_host, frontend.metrics_port),
    ):
        try:
            check_port(host, port, f"--{name}")
        except PawlError as error:
            yield Finding("FAIL", name, error.message)
        else:
            yield Finding("ok", name, f"{host}:{port} is free" if port else "any free one")
    if warning := exposure_warning(config):
        yield Finding("WARN", "port", warning)


def _model(config: Config) -> Iterator[Finding]:
    model = config.model
    folder = resolve_checkpoint(model.model, model.revision or None)
    checkpoint = importlib.import_module("pawl_workers.model.checkpoint_config")
    spec = checkpoint.read_config(folder).spec
    files = weight_files(folder)
    num_bytes = sum(path.stat().st_size for path in files)
    yield Finding(
        "ok",
        "model",
        f"{served_name(config)}: {spec.architecture}, {spec.num_layers} layers, width {spec.hidden_size},"
        f" vocabulary {spec.vocab_size}, {num_bytes / _GIB:.2f} GiB in {len(files)} file(s)",
    )
    # K and V; 4 bytes per value is the most that a cache uses.
    token_bytes = 2 * spec.num_layers * spec.num_kv_heads * spec.head_dim * 4
    yield Finding("ok", "kv cache", f"{token_bytes / 1024:.1f} KiB per token in float32, half that in 16 bits")


def _kernels(config: Config) -> Iterator[Finding]:
    from pawl_server.cli.plan import plan_model  # noqa: PLC0415 (torch)

    plan = plan_model(config)
    is_slow = config.model.kernels == "auto" and plan.kernels not in _FAST_KERNELS
    yield Finding("WARN" if is_slow else "ok", "kernels", f"{plan.kernels}: {plan.kernels_reason}")
    if plan.refused:
        yield Finding("FAIL", "memory", plan.refused)
    elif plan.longest_request < plan.max_context:
        text = f"no request of {plan.max_context} tokens fits, {plan.longest_request} do: `pawl plan` says what helps"
        yield Finding("WARN", "memory", text)


def _tokenizer(config: Config) -> Iterator[Finding]:
    from pawl_server.frontend.model import load_model  # noqa: PLC0415 (optional packages)
    from pawl_server.frontend.requests import ChatMessage, ConversationInput  # noqa: PLC0415 (as above)

    model = config.model
    served = load_model(served_name(config), model.model, model.revision, config.limits.max_prompt_bytes)
    text = "Round trip: äöü 你好."
    token_ids = served.tokenizer.encode(text, add_special_tokens=False)
    back = served.tokenizer.decode(token_ids, skip_special_tokens=True)
    same = "comes back unchanged" if back.strip() == text else "does not come back unchanged"
    yield Finding("ok", "tokenizer", f"{len(token_ids)} tokens for {len(text)} characters; the text {same}")
    if served.template is None:
        yield Finding("WARN", "chat template", "the checkpoint has none: Chat is refused, Generate works")
        return
    turn = ChatMessage(role="user", content="Hi", name="")
    conversation = ConversationInput(
        messages=(turn,), add_generation_prompt=True, continue_final_message=False, template_kwargs={}
    )
    prompt = served.template.render(conversation)
    yield Finding("ok", "chat template", f"renders a turn to {len(prompt)} characters")
