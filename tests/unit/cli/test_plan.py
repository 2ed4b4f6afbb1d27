"""`pawl plan`: numbers of a model without its weights, from a folder, the packaged model and a hub."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest
import torch

from pawl_server.cli import main
from pawl_server.cli.plan import plan_model
from pawl_server.config import Config
from pawl_server.engine.load import load_torch_worker, share_device
from pawl_server.fleet.specs import engine_specs, memory_share, replicas_per_gpu, replicas_per_machine
from pawl_workers.errors import OutOfMemoryError
from pawl_workers.worker import Worker, WorkerOptions
from tests.fakes.checkpoints import make_llama
from tests.fakes.hub import local_hub
from tests.fakes.servers import environment

SETTINGS = ["--device=cpu", "--max-running=4", "--max-context=128", "--kv-max-bytes=262144"]


def planned(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> dict[str, object]:
    assert main(["plan", "--json", *SETTINGS, *words]) == code
    shown: dict[str, object] = json.loads(capsys.readouterr().out)
    return shown


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_plan_of_a_folder_is_what_its_worker_becomes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], dtype: torch.dtype
) -> None:
    plan = planned(capsys, str(make_llama(tmp_path / "model", dtype=dtype)))
    options = WorkerOptions(str(tmp_path / "model"), max_running=4, max_context=128, most_kv_bytes=262144)
    facts = Worker.load(options).facts
    for name in ("num_parameters", "activation_bytes", "kv_bytes", "num_blocks", "block_size"):
        assert plan[name] == getattr(facts, name), name
    weight_bytes = cast("int", plan["weight_bytes"])
    if dtype is torch.float16:
        assert weight_bytes == facts.weight_bytes
    else:  # of which some kernels keep 12 of 16 bits
        assert 0.7 * weight_bytes < facts.weight_bytes <= weight_bytes
    assert (plan["cache_tokens"], plan["requests"]) == (facts.num_blocks * facts.block_size, 3)
    assert plan["stored_dtypes"] == [str(dtype).removeprefix("torch.")]
    assert plan["kv_bytes_per_token"] == 2 * 2 * 2 * 16 * 4  # keys and values, layers, heads, head dimension, fp32
    assert plan["refused"] == ""


def test_weights_are_not_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The data may be missing behind the header."""
    file = make_llama(tmp_path) / "model.safetensors"
    whole = file.read_bytes()
    before = planned(capsys, str(tmp_path))
    file.write_bytes(whole[: 8 + int.from_bytes(whole[:8], "little")])
    after = planned(capsys, str(tmp_path))
    assert {**before, "available_bytes": 0, "reserve_bytes": 0, "alternatives": 0} == {
        **after, "available_bytes": 0, "reserve_bytes": 0, "alternatives": 0,
    }  # fmt: skip


def test_what_does_not_fit_is_told_with_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pawl_workers.start_plan.available_bytes", lambda device: 1000)
    plan = planned(capsys, str(make_llama(tmp_path)), code=1)
    assert "do not fit into 0.00 MB of memory" in str(plan["refused"])
    assert (plan["num_blocks"], plan["cache_tokens"], plan["requests"]) == (0, 0, 0)
    assert main(["plan", *SETTINGS, str(tmp_path)]) == 1
    assert "DOES NOT FIT" in capsys.readouterr().out


def test_the_packaged_model_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "demo", "--device=cpu", "--kernels=onednn"]) == 0
    shown = capsys.readouterr().out
    assert "onednn: asked for (kernels = onednn)" in shown
    assert "requests" in shown
    assert "reference bfloat16" in shown


def test_alternatives_differ_as_their_types_do(tmp_path: Path) -> None:
    plan = plan_model(Config().replace(model=str(make_llama(tmp_path)), device="cpu"))
    wide, narrow = plan.alternatives[-2:]
    assert (wide.kernels, wide.dtype, narrow.dtype) == ("reference", "float32", "bfloat16")
    assert wide.kv_bytes_per_token == 2 * narrow.kv_bytes_per_token
    assert wide.weight_bytes == 2 * narrow.weight_bytes


def test_every_type_of_weights_is_among_the_alternatives(tmp_path: Path) -> None:
    """The smaller the groups that share a scale, the more scales there are; each takes what its worker would hold."""
    model = str(make_llama(tmp_path, hidden_size=128, intermediate_size=256))
    plan = plan_model(Config().replace(model=model, device="cpu", max_context=128, max_running=4))
    found = {a.weight_dtype: a for a in plan.alternatives if (a.kernels, a.kv_dtype) == ("cpu", "auto")}
    assert set(found) == {"auto", "int8", "int8_g32", "int8_g64", "int8_g128"}
    sizes = [found[dtype].weight_bytes for dtype in ("int8", "int8_g128", "int8_g64", "int8_g32", "auto")]
    assert sizes == sorted(set(sizes))
    options = WorkerOptions(model, max_running=4, max_context=128, most_kv_bytes=262144, weight_dtype="int8_g32")
    assert Worker.load(options).facts.weight_bytes == found["int8_g32"].weight_bytes


def test_where_the_model_does_not_fit_the_smaller_types_that_do_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The limit lies between what exact weights take and what bytes take."""
    model = str(make_llama(tmp_path, hidden_size=256, intermediate_size=1024, vocab_size=2048))
    whole = plan_model(Config().replace(model=model, device="cpu", max_context=128, max_running=4))
    byte = next(a for a in whole.alternatives if (a.kv_dtype, a.weight_dtype) == ("int8", "int8"))
    assert byte.weight_bytes < whole.weight_bytes / 2
    assert byte.kv_bytes_per_token < whole.kv_bytes_per_token / 2
    available = (whole.weight_bytes + byte.weight_bytes) // 2 + whole.activation_bytes
    monkeypatch.setattr("pawl_workers.start_plan.available_bytes", lambda device: available)
    plan = planned(capsys, model, code=1)
    alternatives = plan["alternatives"]
    assert isinstance(alternatives, list)
    fitting = {(a["kv_dtype"], a["weight_dtype"]) for a in alternatives if a["kernels"] == "cpu" and not a["refused"]}
    assert ("int8", "int8") in fitting
    assert ("auto", "auto") not in fitting
    assert main(["plan", *SETTINGS, model]) == 1
    shown = capsys.readouterr().out
    line = next(line for line in shown.splitlines() if "--kv-dtype=int8 --weight-dtype=int8" in line)
    assert line.startswith("  would fit    --kernels=cpu --dtype=float32 ")
    tokens = next(a["cache_tokens"] for a in alternatives if a["kv_dtype"] == a["weight_dtype"] == "int8")
    assert f" {tokens} tokens, {tokens // 128} request(s) of 128" in line
    # What is promised holds: a worker started with these flags fits.
    options = WorkerOptions(
        model, max_running=4, max_context=128, most_kv_bytes=262144, kv_dtype="int8", weight_dtype="int8"
    )
    facts = Worker.load(options).facts
    assert facts.num_blocks * facts.block_size == tokens


def test_where_nothing_fits_that_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pawl_workers.start_plan.available_bytes", lambda device: 1000)
    assert main(["plan", *SETTINGS, str(make_llama(tmp_path))]) == 1
    shown = capsys.readouterr().out
    assert "nothing below fits either" in shown
    assert "would fit" not in shown


@pytest.mark.parametrize("fleet", [[], ["--fleet=local"], ["--ray-address=auto"]])
def test_replicas_of_one_machine_share_its_memory(
    fleet: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each plans with its part, and takes no more when it is started. In a cluster each may have its own machine."""
    model, together = str(make_llama(tmp_path)), "--ray-address=auto" not in fleet
    settings = ["--replicas=3", "--kv-memory-fraction=0.9", *fleet]
    one = plan_model(Config().replace(model=model, device="cpu", max_context=128, max_running=4))
    each = one.weight_bytes + one.activation_bytes + 150_000
    monkeypatch.setattr("pawl_workers.start_plan.available_bytes", lambda device: 3 * each)
    plan = planned(capsys, model, *settings)
    assert (plan["refused"], plan["replicas_sharing"], plan["available_bytes"]) == ("", 3 if together else 1, 3 * each)
    assert 75_000 <= cast("int", plan["kv_bytes"]) <= (135_000 if together else 262_144)
    monkeypatch.setattr("pawl_server.fleet.specs.host_memory_left", lambda: 3 * each)
    config = Config().replace(model=model, device="cpu", max_context=128, max_running=4, replicas=3)
    config = config.replace(kv_memory_fraction=0.9, kv_max_bytes=262144, **dict(_flags(fleet)))
    first, *_, last = engine_specs(config, "token", 1, memory_bytes=memory_share(config))
    assert first.memory_bytes == last.memory_bytes == (each if together else 0)
    facts = load_torch_worker(last, lambda *_: None).facts
    assert (facts.kv_bytes, facts.num_blocks) == (plan["kv_bytes"], plan["num_blocks"])


def _flags(words: list[str]) -> Iterator[tuple[str, str]]:
    for word in words:
        name, _, value = word.removeprefix("--").partition("=")
        yield name.replace("-", "_"), value


def test_what_fits_alone_but_not_beside_the_others_is_refused_with_the_share(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = str(make_llama(tmp_path))
    one = plan_model(Config().replace(model=model, device="cpu", max_context=128, max_running=4))
    available = 2 * (one.weight_bytes + one.activation_bytes)
    monkeypatch.setattr("pawl_workers.start_plan.available_bytes", lambda device: available)
    assert planned(capsys, model)["refused"] == ""
    refused = str(planned(capsys, model, "--replicas=2", code=1)["refused"])
    assert f"on cpu beside the other replicas, of which each may take {available / 2e6:.2f} MB: weights" in refused
    assert refused.endswith("or lower replicas")
    spec, _ = engine_specs(Config().replace(model=model, device="cpu", replicas=2), "", 1, memory_bytes=available // 2)
    with pytest.raises(OutOfMemoryError, match="beside the other replicas"):
        load_torch_worker(spec, lambda *_: None)


@pytest.mark.parametrize(
    ("settings", "num_gpus", "machine", "gpu"),
    [
        ({"replicas": 3}, 0, 3, 1),
        ({"replicas": 3, "fleet": "local"}, 0, 3, 3),
        ({"replicas": 5, "fleet": "local"}, 2, 5, 3),
        ({"replicas": 4, "gpus_per_replica": 0.5}, 0, 4, 2),
        ({"replicas": 4, "gpus_per_replica": 0.5, "ray_address": "auto"}, 0, 1, 2),
        ({"replicas": 1, "gpus_per_replica": 0.25}, 0, 1, 1),
    ],
)
def test_who_shares_a_device(settings: dict[str, str | float], num_gpus: int, machine: int, gpu: int) -> None:
    config = Config().replace(**settings)
    assert (replicas_per_machine(config), replicas_per_gpu(config, num_gpus)) == (machine, gpu)
    assert {spec.replicas_per_gpu for spec in engine_specs(config, "", 1, num_gpus=num_gpus)} == {gpu}
    assert bool(memory_share(config)) is (machine > 1)


def test_replicas_of_one_gpu_have_their_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (1 << 30, 3 << 30))
    options = WorkerOptions("model", device="cuda")
    assert share_device(options, 5, 3).memory_bytes == 1 << 30
    assert share_device(options, 5, 1) == options


def test_that_no_request_of_the_whole_context_fits_is_said_with_what_does(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A request has one token more than the cache: the KV of the last one is never needed."""
    model = str(make_llama(tmp_path, dtype=torch.bfloat16))
    few = ["--num-blocks=3", "--max-context=100"]
    plan = planned(capsys, model, *few)
    assert (plan["cache_tokens"], plan["longest_request"], plan["requests"]) == (96, 97, 0)
    assert main(["plan", *SETTINGS, model, *few]) == 0
    shown = capsys.readouterr().out
    assert "NO REQUEST OF 100 TOKENS: the longest that is served has 97," in shown
    assert "--max-context=97" in shown
    assert "\n  fits\n" not in shown
    for enough in (["--num-blocks=4", "--max-context=100"], ["--num-blocks=3", "--max-context=97"]):
        assert main(["plan", *SETTINGS, model, *enough]) == 0
        assert "\n  fits\n" in capsys.readouterr().out
    sized = planned(capsys, model, "--max-context=100", f"--kv-max-bytes={plan['full_context_kv_bytes']}")
    assert sized["longest_request"] == 100
    short = planned(capsys, model, "--max-context=100", f"--kv-max-bytes={int(str(plan['full_context_kv_bytes'])) - 1}")
    assert short["longest_request"] == 97


def test_what_libraries_print_is_no_part_of_the_plan(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def available(device: torch.device) -> int:
        print("Error importing a_module")
        return 1 << 30

    monkeypatch.setattr("pawl_workers.start_plan.available_bytes", available)
    assert main(["plan", "--json", *SETTINGS, str(make_llama(tmp_path))]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out)["available_bytes"] == 1 << 30
    assert "Error importing a_module" in shown.err


def test_an_unknown_model_is_one_message(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "./nowhere"]) == 1
    assert "there is no folder ./nowhere" in capsys.readouterr().err


@pytest.mark.parametrize("shard_size", ["5GB", "1MB"])
def test_a_model_on_the_hub_is_planned_by_its_headers_alone(shard_size: str, tmp_path: Path) -> None:
    """The client's real requests; of the weights no more than the first 100 kB of each file are fetched."""
    folder = make_llama(
        tmp_path / "model",
        dtype=torch.bfloat16,
        max_shard_size=shard_size,
        hidden_size=256,
        intermediate_size=512,
        vocab_size=2048,
    )
    with local_hub(folder, "owner/name") as hub:
        variables = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1"}
        ran = subprocess.run(
            [sys.executable, "-m", "pawl_server.cli", "plan", "owner/name", "--json", *SETTINGS],
            env=environment({**os.environ, **variables}), capture_output=True, text=True, check=False, timeout=120,
        )  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    plan = json.loads(ran.stdout)
    local = plan_model(Config().replace(model=str(folder), device="cpu", max_context=128, max_running=4))
    assert plan["weight_bytes"] == local.weight_bytes
    assert plan["num_parameters"] == local.num_parameters
    files = [name for name in hub.sent if name.endswith(".safetensors")]
    assert len(files) == len(list(folder.glob("*.safetensors")))
    assert all(hub.sent[name] > 0 for name in files)
    assert sum(hub.sent[name] for name in files) <= len(files) * 100_001
