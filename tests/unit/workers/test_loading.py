"""Checkpoints: what is read is exact, and what cannot be served is refused with its name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from pawl_workers.errors import CheckpointError, OutOfMemoryError, WorkerError
from pawl_workers.kernels.onednn import OneDnnKernels, OneDnnLinear
from pawl_workers.kernels.reference import ReferenceKernels
from pawl_workers.model.checkpoint_config import read_config
from pawl_workers.model.loading import load_weights
from pawl_workers.model.source import checkpoint_revision, weight_files
from pawl_workers.model.weights import MlpWeights, Weights
from tests.fakes.checkpoints import load_reference, make_gpt2, make_llama
from tests.fakes.logit_runner import LogitRunner

CPU = torch.device("cpu")


def load(folder: Path, *, available: int = 1 << 40, dtype: torch.dtype = torch.float32) -> Weights:
    return load_weights(read_config(folder), OneDnnKernels(), CPU, dtype, available)


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def change_tensors(folder: Path, change: Callable[[dict[str, Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def mlp_of(weights: Weights, layer: int) -> MlpWeights:
    found = weights.layers[layer].mlp
    assert isinstance(found, MlpWeights)
    return found


@pytest.mark.parametrize("shape", [(96, 48), (1, 3), (257, 48), (1536, 576)])
def test_packed_linears_unpack_exactly(shape: tuple[int, int]) -> None:
    """The packed form gives the weight back bit for bit, odd values included."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    weight.view(-1)[:3] = torch.tensor([-0.0, 1e-42, 3.4e38])
    packed = OneDnnLinear(weight.clone(), None)
    assert torch.equal(packed.unpack().view(torch.int32), weight.view(torch.int32))
    assert (packed.out_features, packed.in_features) == shape


def test_merged_weights_are_the_checkpoint_s(tmp_path: Path) -> None:
    """Query, key and value lie in one matrix, gate above up in another; the head is apart or the embedding."""
    tensors = load_file(make_llama(tmp_path / "llama") / "model.safetensors")
    weights = load(tmp_path / "llama")
    layer, name = weights.layers[1], "model.layers.1."
    merged = torch.cat([tensors[f"{name}self_attn.{part}_proj.weight"] for part in "qkv"])
    assert torch.equal(layer.attention.qkv.unpack(), merged)
    merged = torch.cat([tensors[f"{name}mlp.{part}_proj.weight"] for part in ("gate", "up")])
    assert torch.equal(mlp_of(weights, 1).up.unpack(), merged)
    assert torch.equal(weights.head.linear.unpack(), tensors["lm_head.weight"])
    assert weights.num_parameters == sum(tensor.numel() for tensor in tensors.values())
    tensors = load_file(make_gpt2(tmp_path / "gpt2") / "model.safetensors")
    weights = load(tmp_path / "gpt2")
    fc = tensors["transformer.h.0.mlp.c_fc.weight"]
    assert torch.equal(mlp_of(weights, 0).up.unpack(), fc.t())
    assert torch.equal(weights.head.linear.unpack(), weights.embedding.tokens)


def test_shards_types_and_old_names_give_the_same_weights(tmp_path: Path) -> None:
    """Sharded equals whole; bf16 is widened exactly; GPT-2 names without their prefix are found."""
    whole = load(make_llama(tmp_path / "whole", dtype=torch.bfloat16))
    folder = make_llama(tmp_path / "sharded", dtype=torch.bfloat16, max_shard_size="30KB")
    assert len(weight_files(folder)) > 3
    sharded = load(folder)
    assert torch.equal(mlp_of(whole, 1).up.unpack(), mlp_of(sharded, 1).up.unpack())
    stored = load_file(tmp_path / "whole" / "model.safetensors")["model.layers.0.mlp.down_proj.weight"]
    assert torch.equal(mlp_of(whole, 0).down.unpack(), stored.float())
    assert whole.embedding.tokens.dtype is torch.bfloat16  # widened row by row, when it is looked up
    assert whole.embedding.dtype is torch.float32
    old = make_gpt2(tmp_path / "old")
    change_tensors(old, lambda tensors: _rename(tensors, "transformer.", ""))
    change_tensors(old, lambda tensors: tensors.update({"h.0.attn.bias": torch.ones(1, 1, 4, 4)}))
    assert torch.equal(load(old).embedding.tokens, load(make_gpt2(tmp_path / "new")).embedding.tokens)


def _rename(tensors: dict[str, Tensor], old: str, new: str) -> None:
    for name in list(tensors):
        tensors[name.replace(old, new, 1)] = tensors.pop(name)


def test_progress_counts_bytes(tmp_path: Path) -> None:
    """It rises to the whole."""
    seen: list[tuple[int, int]] = []
    config = read_config(make_llama(tmp_path))
    load_weights(
        config, ReferenceKernels(CPU), CPU, torch.float32, 1 << 40, lambda done, total: seen.append((done, total))
    )
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1][0] == seen[-1][1] == sum(t.nbytes for t in load_file(tmp_path / "model.safetensors").values())


def test_missing_left_over_and_misshapen_tensors_are_refused(tmp_path: Path) -> None:
    """Each with the tensor's name."""
    folder = make_llama(tmp_path)
    change_tensors(folder, lambda tensors: tensors.update({"model.extra": torch.ones(2)}))
    with pytest.raises(CheckpointError, match=r"1 tensors are not known: model\.extra"):
        load(folder)
    change_tensors(folder, lambda tensors: [tensors.pop(name) for name in ("model.extra", "model.norm.weight")])  # type: ignore[arg-type]
    with pytest.raises(CheckpointError, match=r"1 tensors are missing: model\.norm\.weight"):
        load(folder)
    change_tensors(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(47)}))
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has shape \(47,\), config\.json wants \(48,\)"):
        load(folder)
    change_tensors(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(48).to(torch.int8)}))
    with pytest.raises(CheckpointError, match="stored as I8"):
        load(folder)


@pytest.mark.parametrize("kernels", ["reference", "onednn", "cpu"])
def test_a_head_that_is_stored_though_tied_is_what_transformers_takes(tmp_path: Path, kernels: str) -> None:
    """The same as the embedding it is superfluous; another, as fine-tuning may leave it, is the head."""
    folder = make_llama(tmp_path, tie_word_embeddings=True)
    token_ids = [3, 1, 4, 1, 5]
    tied = LogitRunner(folder, kernels, max_running=1).alone(token_ids)
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    change_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": embedding.clone()}))
    assert torch.equal(LogitRunner(folder, kernels, max_running=1).alone(token_ids), tied)
    change_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": embedding.flip(0)}))
    with torch.no_grad():
        wanted = load_reference(folder)(torch.tensor([token_ids])).logits[0]
    found = LogitRunner(folder, kernels, max_running=1).alone(token_ids)
    assert (found - wanted).abs().max() < 1e-4
    assert (found - tied).abs().max() > 0.1


def test_a_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    """And so is an index that is none, or that leaves out what is needed."""
    folder = make_llama(tmp_path, max_shard_size="30KB")
    index, last = folder / "model.safetensors.index.json", weight_files(folder)[-1]
    content, moved = index.read_text(), last.rename(folder / "elsewhere")
    with pytest.raises(CheckpointError, match=rf"the index names {last.name}, which is not there; fetch the missing"):
        load(folder)
    shards = {name: file for name, file in json.loads(content)["weight_map"].items() if file != last.name}
    index.write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(CheckpointError, match=r"tensors are missing: "):
        load(folder)
    for broken in ("{", "[]", "{}", '{"weight_map": 3}', "[" * 100_000):
        index.write_text(broken)
        with pytest.raises(CheckpointError, match=r"index\.json: not an index of safetensors files"):
            load(folder)
    index.write_text(content)
    moved.rename(last)
    assert load(folder).num_parameters > 0


def test_special_tokens_are_found_beside_the_text_part_and_in_it(tmp_path: Path) -> None:
    """`generation_config.json` counts most, then the whole model's configuration, then its text part's."""
    folder = make_llama(tmp_path)
    (folder / "generation_config.json").unlink(missing_ok=True)
    change_config(folder, eos_token_id=None, text_config={"eos_token_id": [5, 6], "bos_token_id": 4})
    config = read_config(folder)
    assert (config.eos_token_ids, config.bos_token_id) == ((5, 6), 4)
    change_config(folder, eos_token_id=7)
    assert read_config(folder).eos_token_ids == (7,)
    (folder / "generation_config.json").write_text('{"eos_token_id": 8}')
    assert read_config(folder).eos_token_ids == (8,)


def test_memory_is_checked_before_reading(tmp_path: Path) -> None:
    """The message has both numbers."""
    with pytest.raises(OutOfMemoryError, match=r"need 0\.00 GB as torch\.float32, 0\.00 GB is available"):
        load(make_llama(tmp_path), available=1000)


def test_pickles_and_broken_files_are_refused(tmp_path: Path) -> None:
    """A `.bin` checkpoint, no weights at all, an index that points away, and a file that is none."""
    folder = make_llama(tmp_path)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match=r"not a safetensors file|incomplete|InvalidHeader|MetadataIncomplete"):
        load(folder)
    weights.write_bytes(b"\x00" * 3)
    with pytest.raises(CheckpointError, match="not a safetensors file"):
        load(folder)
    weights.rename(folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="only pickled weights"):
        load(folder)
    (folder / "pytorch_model.bin").unlink()
    with pytest.raises(CheckpointError, match=r"no model\.safetensors"):
        load(folder)
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../other.safetensors"}}')
    with pytest.raises(CheckpointError, match=r"the index names \.\./other"):
        load(folder)


def _header(**changes: object) -> str:
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | changes
    return json.dumps({"lm_head.weight": entry})


@pytest.mark.parametrize(
    ("header", "named"),
    [
        (_header(data_offsets=[]), "not a safetensors file"),
        (_header(data_offsets=["0", 4]), "not a safetensors file"),
        (_header(dtype=["F32"]), r"lm_head\.weight is stored as \['F32'\], known"),
        (_header(dtype="F8_E4M3"), r"lm_head\.weight is stored as F8_E4M3, known: F32"),
        (_header(shape=None), "not a safetensors file"),
        (_header(shape=[[1]]), r"lm_head\.weight has shape \(\[1\],\), config\.json wants"),
        ('{"lm_head.weight": null}', "not a safetensors file"),
        ("[" * 100_000, "not a safetensors file .*recursion"),
        ('{"\\ud800": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}', r"missing|not known: \\ud800"),
    ],
)
def test_headers_that_are_none_are_refused(tmp_path: Path, header: str, named: str) -> None:
    """Whatever a file says of itself; the message can be written to any pipe."""
    folder, data = make_llama(tmp_path), header.encode()
    (folder / "model.safetensors").write_bytes(len(data).to_bytes(8, "little") + data + bytes(4))
    with pytest.raises(CheckpointError, match=named) as refused:
        load(folder)
    assert str(refused.value).encode()


@pytest.mark.parametrize("name", ["../other", "/etc/passwd", "a\0b", "x" * 5000, ".", "..", "", "\ud800"])
def test_an_index_reaches_nothing_but_files_of_its_folder(tmp_path: Path, name: str) -> None:
    folder = make_llama(tmp_path)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": name}}))
    for ask in (load, checkpoint_revision):
        with pytest.raises(CheckpointError, match=r"the index names .*, which is not there") as refused:
            ask(folder)
        assert len(str(refused.value).encode()) < 600


def test_configurations_that_cannot_be_served_are_refused(tmp_path: Path) -> None:
    """By the name of what is not supported."""
    folder = make_llama(tmp_path / "a")
    for changes, message in (
        ({"architectures": ["MambaForCausalLM"]}, "MambaForCausalLM.*known: LlamaForCausalLM, .*GPT2LMHeadModel"),
        ({"rope_parameters": {"rope_type": "spiral", "factor": 4.0}}, "rope_parameters.rope_type 'spiral'"),
        ({"hidden_act": "xielu"}, "hidden_act 'xielu'"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers must be a positive integer"),
        ({"num_key_value_heads": 3}, "4 attention heads are no multiple of 3"),
    ):
        before = (folder / "config.json").read_text()
        change_config(folder, **changes)
        with pytest.raises(CheckpointError, match=message):
            read_config(folder)
        (folder / "config.json").write_text(before)
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="not JSON"):
        read_config(folder)
    (folder / "config.json").unlink()
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        read_config(folder)


def test_old_and_new_spellings_of_rope_agree(tmp_path: Path) -> None:
    """`rope_theta` and `rope_scaling` of transformers 4 mean what `rope_parameters` of 5 mean."""
    folder = make_llama(tmp_path, rope_parameters={"rope_type": "linear", "rope_theta": 5e5, "factor": 2.0})
    new = read_config(folder).spec
    change_config(folder, rope_parameters=None, rope_theta=500000.0, rope_scaling={"type": "linear", "factor": 2})
    assert read_config(folder).spec == new


def test_errors_have_one_root() -> None:
    """Callers catch `WorkerError`."""
    assert issubclass(CheckpointError, WorkerError)
    assert issubclass(OutOfMemoryError, WorkerError)
