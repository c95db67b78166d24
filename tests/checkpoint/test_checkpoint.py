"""Checkpoints: what is read back computes the same bits, sizes are those of the files, every damage is named."""

from __future__ import annotations

import json
import random
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import fsspec
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from mlorq.checkpoint import io as checkpoint
from mlorq.checkpoint.format import checkpoint_files
from mlorq.checkpoint.io import inspect, load, save
from mlorq.checkpoint.places import DESCRIPTION as CONFIG
from mlorq.checkpoint.places import TENSORS
from mlorq.checkpoint.size_bound import rest_upper_bound
from mlorq.codecs.affine import QuantizedMatrix, ZeroPoint
from mlorq.config.budget import parse_budget
from mlorq.errors import CheckpointError, ModelError
from mlorq.forms.base import Candidate
from mlorq.forms.compressed_module import CompressedModule
from mlorq.forms.modules import CompressedLinear, replace_layers
from mlorq.forms.stored_layer import CompressedLayer
from mlorq.numbers import byte_count
from tests.checkpoint.signing import edit, edit_tensors, sign
from tests.layers import matrices_of, size_of

torch.set_num_threads(1)

DESCRIPTION = {
    "architecture": {"family": "custom", "class": "Everything"},
    "budget": {"asked": "3bit", "budget_bytes": 1234, "accounting": "exact"},
    "hashes": {"model": "0" * 32, "calibration": "1" * 32, "configuration": "2" * 32},
    "extra": {"note": "größer", "seed": 0},
}


class Everything(nn.Module):
    """Convolutions, linear layers, every kind of sharing, every kind of buffer."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.patch = nn.Conv2d(3, 16, 4, stride=4)
        self.depthwise = nn.Conv2d(16, 16, 3, padding=1, groups=16, padding_mode="circular", bias=False)
        self.batch_norm = nn.BatchNorm2d(16)
        self.blocks = nn.ModuleList([nn.Linear(16, 16) for _ in range(3)])
        self.blocks.append(self.blocks[0])  # the same module again
        self.twin = nn.Linear(16, 16)
        self.twin.weight = self.blocks[1].weight  # the same weight in another module
        self.norm = nn.LayerNorm(16)
        self.norm.bias = self.blocks[2].bias  # the same bias in another module
        self.head = nn.Linear(16, 7, bias=False)
        self.embedding = nn.Embedding(7, 16)
        self.unembedding = nn.Linear(16, 7)
        self.unembedding.weight = self.embedding.weight  # tied, and left float
        self.add_module("größe", nn.Linear(7, 5))
        self.register_buffer("steps", torch.tensor(3))
        self.register_buffer("mask", torch.rand(16), persistent=False)
        memory = torch.arange(10.0)
        self.register_buffer("slice", memory[2:5])  # views of a larger memory, which overlap
        self.register_buffer("overlap", memory[4:8])
        table = torch.rand(40, 50)
        self.register_buffer("table", table)  # one buffer in two modules, and its transpose
        self.norm.register_buffer("table", table)
        self.norm.register_buffer("turned", table.T)
        self.register_buffer("empty", torch.empty(0))
        with torch.no_grad():
            self.batch_norm.running_mean.uniform_(-1, 1)
            self.batch_norm.running_var.uniform_(1, 2)
            self.norm.weight.uniform_(1, 2)

    def forward(self, images: Tensor) -> Tensor:
        features = self.batch_norm(self.depthwise(self.patch(images))).flatten(2).transpose(1, 2)
        for block in self.blocks:
            features = features + torch.tanh(block(features)) * self.mask
        features = self.norm(self.twin(features)) * self.slice.sum()
        logits = self.head(features) + self.unembedding(features + self.embedding(self.steps))
        return self.get_submodule("größe")(logits)


LAYERS: dict[str, list[str]] = {
    "patch": [],
    "depthwise": [],
    "blocks.0": ["blocks.3"],
    "blocks.1": ["twin"],
    "blocks.2": [],
    "head": [],
    "größe": [],
}
ALLOCATION = {
    "patch": Candidate("LR", bits_a=4, bits_b=8, rank=3),
    "depthwise": Candidate("Q", bits=6),
    "blocks.0": Candidate("Q", bits=3),
    "blocks.1": Candidate("LR", bits_a=8, bits_b=6, rank=5),
    "blocks.2": Candidate("Q", bits=2),
    "head": Candidate("LR", bits_a=6, bits_b=4, rank=2),
    "größe": Candidate("Q", bits=8),
}


def random_compressed(
    name: str, layer: nn.Module, candidate: Candidate, seed: int, zero_point: ZeroPoint = "codes"
) -> CompressedLayer:
    weight, rng = layer.weight, torch.Generator().manual_seed(seed)
    assert isinstance(weight, Tensor)
    matrices = {}
    for part, (rows, columns, bits) in matrices_of(candidate, weight.shape[0], weight[0].numel()).items():
        codes = torch.randint(0, 2**bits, (rows, columns), generator=rng, dtype=torch.uint8)
        scale = (torch.rand(rows, generator=rng) * 0.01 + 0.001).to(torch.float16)
        if zero_point == "codes":
            zero = torch.randint(0, 2**bits, (rows,), generator=rng, dtype=torch.uint8)
        else:
            zero = torch.randint(-40, 40, (rows,), generator=rng, dtype=torch.int16)
        matrices[part] = QuantizedMatrix(codes, scale, zero, bits)
    return CompressedLayer(name, candidate, matrices)


def compress(
    model: nn.Module,
    allocation: dict[str, Candidate],
    seed: int = 1,
    zero_point: ZeroPoint = "codes",
) -> nn.Module:
    copy = deepcopy(model)
    layers = {
        name: random_compressed(name, model.get_submodule(name), candidate, seed + index, zero_point)
        for index, (name, candidate) in enumerate(allocation.items())
    }
    replace_layers(copy, layers, {name: LAYERS.get(name, []) for name in layers})
    return copy.eval()


def images(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed)).to(dtype)


def outputs(model: nn.Module, inputs: Tensor) -> Tensor:
    with torch.no_grad():
        return model(inputs)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save(checkpoint_files(compress(Everything(), ALLOCATION), DESCRIPTION), tmp_path / "out")
    return tmp_path / "out"


# -- round trip ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero_point", ["codes", "int16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loaded_model_computes_the_same_bits(tmp_path: Path, dtype: torch.dtype, zero_point: ZeroPoint) -> None:
    model = compress(Everything(seed=2).to(dtype), ALLOCATION, 3, zero_point)
    save(checkpoint_files(model, DESCRIPTION), tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [CONFIG, TENSORS]
    # Other weights, and always float32; only the buffer that is not stored has to be the same.
    instance = Everything(seed=4).train()
    instance.mask.copy_(Everything(seed=2).mask)
    before = {name: tensor.clone() for name, tensor in instance.state_dict().items()}
    loaded = load(tmp_path / "out", model=instance)
    assert not loaded.training
    inputs = images(5, dtype)
    assert outputs(model, inputs).isfinite().all()
    assert torch.equal(outputs(loaded, inputs), outputs(model, inputs))
    assert outputs(loaded, inputs).dtype == dtype
    for name, tensor in model.state_dict().items():
        assert loaded.state_dict()[name].dtype == tensor.dtype
        assert torch.equal(loaded.state_dict()[name], tensor)
    # The instance is as it was, and serves again.
    assert instance.training
    assert instance.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in instance.state_dict().items())
    assert torch.equal(outputs(load(tmp_path / "out", model=instance), inputs), outputs(model, inputs))


def test_loaded_model_keeps_what_was_shared(saved: Path) -> None:
    loaded = load(saved, model=Everything())
    assert loaded.blocks[3] is loaded.blocks[0]
    assert loaded.twin.layer_name == "blocks.1"
    assert loaded.twin.a_codes is loaded.blocks[1].a_codes
    assert not torch.equal(loaded.twin.bias, loaded.blocks[1].bias)
    assert loaded.norm.bias is loaded.blocks[2].bias
    assert loaded.unembedding.weight is loaded.embedding.weight


def test_saved_again_it_is_the_same_file(saved: Path) -> None:
    again = checkpoint_files(load(saved, model=Everything()), DESCRIPTION)
    assert {name: (saved / name).read_bytes() for name in again} == again


def test_shared_tensors_are_stored_once(saved: Path) -> None:
    config = json.loads((saved / CONFIG).read_text())
    tensors = safetensors.torch.load_file(saved / TENSORS)
    assert config["aliases"] == {
        "blocks.3.bias": "blocks.0.bias",
        "norm.bias": "blocks.2.bias",
        "norm.table": "table",
        "unembedding.weight": "embedding.weight",
    }
    aliases = {entry["layer"]: entry["aliases"] for entry in config["layers"]}
    assert aliases == LAYERS
    assert not any(name.startswith(("blocks.3.", "twin.a", "twin.b_")) for name in tensors)
    assert tensors["slice"].tolist() == [2.0, 3.0, 4.0]
    assert tensors["overlap"].tolist() == [4.0, 5.0, 6.0, 7.0]
    assert torch.equal(tensors["norm.turned"], tensors["table"].T)
    assert "mask" not in tensors


def test_sharing_survives_a_move(tmp_path: Path) -> None:
    """Parameters that were one stay one when a compressed model is cast, so that it does not grow on disk."""
    model = compress(Everything(), ALLOCATION).double().float()
    model.norm.table = model.table  # buffers do come apart
    sizes = json.loads(checkpoint_files(model, DESCRIPTION)[CONFIG])["sizes"]
    assert sizes == json.loads(checkpoint_files(compress(Everything(), ALLOCATION), DESCRIPTION)[CONFIG])["sizes"]


def test_rebuilds_the_architecture_itself(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    mask = Everything().mask  # not stored, and random

    def rebuild(architecture: dict[str, Any]) -> nn.Module:
        seen.append(architecture)
        module = Everything()
        module.mask = module.mask if module.mask.is_meta else mask.clone()
        return module

    monkeypatch.setattr("mlorq.models.rebuild", rebuild, raising=False)
    edit(saved, lambda config: config["architecture"].update(family="timm", name="vit"))
    loaded = load(str(saved))
    # Once to compare sizes with the file, once to be filled.
    assert seen == [{"family": "timm", "name": "vit", "class": "Everything"}] * 2
    assert torch.equal(outputs(loaded, images(6)), outputs(compress(Everything(), ALLOCATION), images(6)))
    load(saved, model=Everything())
    assert len(seen) == 2


def test_config_describes_every_layer(saved: Path) -> None:
    config = json.loads((saved / CONFIG).read_text())
    assert config["format_version"] == 2
    for key in ("architecture", "budget", "hashes", "extra"):
        assert config[key] == DESCRIPTION[key]
    assert config["dtype"] == "float32"
    assert config["buffers"] == {"mask": "float32"}
    rows = {row["layer"]: row for row in config["layers"]}
    assert list(rows) == list(LAYERS)
    assert rows["patch"] == {
        "layer": "patch", "kind": "conv2d", "shape": [16, 3, 4, 4], "form": "LR", "bits": None, "bits_a": 4,
        "bits_b": 8, "rank": 3, "zero_point": "codes", "dtype": "float32",
        "bytes": size_of(ALLOCATION["patch"], 16, 48), "aliases": [],
    }  # fmt: skip
    assert (rows["blocks.2"]["kind"], rows["blocks.2"]["form"], rows["blocks.2"]["bits"]) == ("linear", "Q", 2)


def test_bytes_depend_on_nothing_but_the_model() -> None:
    model = compress(Everything(), ALLOCATION)
    files = checkpoint_files(model, DESCRIPTION)
    outputs(model, images(7))  # filled caches
    turned = {key: DESCRIPTION[key] for key in reversed(DESCRIPTION)}
    turned |= {key: dict(reversed(list(DESCRIPTION[key].items()))) for key in DESCRIPTION}
    assert checkpoint_files(deepcopy(model), turned) == files
    other = checkpoint_files(compress(Everything(), ALLOCATION, seed=99), DESCRIPTION)
    assert other[TENSORS] != files[TENSORS]


def test_any_fsspec_url() -> None:
    files = checkpoint_files(compress(Everything(), ALLOCATION), DESCRIPTION)
    url = "memory://mlorq-test-checkpoint/a/b"
    save(files, url)
    assert torch.equal(
        outputs(load(url, model=Everything()), images(8)),
        outputs(compress(Everything(), ALLOCATION), images(8)),
    )
    assert inspect(url)["file_bytes"] == sum(map(len, files.values()))
    fsspec.filesystem("memory").rm("/mlorq-test-checkpoint", recursive=True)


def test_overwriting_leaves_no_mixture_and_no_litter(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (saved / "notes.txt").write_text("mine")
    files = checkpoint_files(compress(Everything(seed=9), ALLOCATION, seed=10), DESCRIPTION)
    save(files, saved)
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == {**files, "notes.txt": b"mine"}

    put = checkpoint.put_file

    for last in (TENSORS, CONFIG):

        def full_disk(fs: Any, path: str, data: bytes, last: str = last) -> None:
            if path.endswith(last):
                raise OSError("no space left on device")
            put(fs, path, data)

        monkeypatch.setattr(checkpoint, "put_file", full_disk)
        with pytest.raises(CheckpointError, match="no space left"):
            save(files, saved)
        with pytest.raises(CheckpointError, match=f"has no {re.escape(CONFIG)}"):
            load(saved, model=Everything())


def test_a_part_of_a_compressed_model_can_be_saved(tmp_path: Path) -> None:
    model = compress(Everything(), {name: ALLOCATION[name] for name in ("blocks.0", "blocks.1", "blocks.2")})
    save(checkpoint_files(model.blocks, DESCRIPTION), tmp_path)
    loaded = load(tmp_path, model=Everything(seed=11).blocks)
    inputs = torch.randn(3, 16, generator=torch.Generator().manual_seed(12))
    for index in range(4):
        assert torch.equal(loaded[index](inputs), model.blocks[index](inputs))


# -- sizes --------------------------------------------------------------------------------------------------


def test_sizes_are_those_of_the_files(saved: Path) -> None:
    report = inspect(saved)
    on_disk = {name: (saved / name).stat().st_size for name in (TENSORS, CONFIG)}
    sizes = report["sizes"]
    assert report["files"] == on_disk
    assert report["file_bytes"] == sum(on_disk.values())
    assert sizes["bytes"] + sizes["rest_bytes"] + sizes["overhead_bytes"] == sum(on_disk.values())
    model = Everything()
    expected, params = 0, 0
    for name, candidate in ALLOCATION.items():
        weight = model.get_submodule(name).weight
        expected += size_of(candidate, weight.shape[0], weight[0].numel())
        params += weight.numel()
    assert sizes["bytes"] == expected
    assert sizes["float_bytes"] == 4 * params
    tensors = safetensors.torch.load_file(saved / TENSORS)
    assert sum(tensor.nbytes for tensor in tensors.values()) == expected + sizes["rest_bytes"]
    kept = {name: tensor for name, tensor in model.state_dict().items() if name in tensors}
    assert sizes["rest_bytes"] == sum(tensor.nbytes for tensor in kept.values())


def test_inspect_finds_sizes_that_are_not_true(saved: Path) -> None:
    edit(saved, lambda config: config["layers"][2].update(bytes=1))
    with pytest.raises(CheckpointError, match=r"layer 'blocks\.0' has"):
        inspect(saved)


@pytest.mark.parametrize("key", ["bytes", "rest_bytes", "overhead_bytes", "float_bytes"])
def test_inspect_finds_totals_that_are_not_true(saved: Path, key: str) -> None:
    said = json.loads((saved / CONFIG).read_text())["sizes"][key] + 1  # of as many digits
    edit(saved, lambda config: config["sizes"].update({key: said}))
    with pytest.raises(
        CheckpointError, match=re.escape(f"sizes.{key} is {byte_count(said - 1)} instead of {byte_count(said)}")
    ):
        inspect(saved)


@pytest.mark.parametrize("keep", [3, 40, -1])
def test_inspect_finds_a_truncated_file(saved: Path, keep: int) -> None:
    data = (saved / TENSORS).read_bytes()
    (saved / TENSORS).write_bytes(data[:keep])
    with pytest.raises(CheckpointError, match=re.escape(TENSORS)):
        inspect(saved)


def random_candidate(rng: random.Random, rows: int, columns: int, groups: int) -> Candidate:
    if groups > 1 or rng.random() < 0.4:
        return Candidate("Q", bits=rng.randint(1, 8))
    rank = rng.randint(2, min(rows, columns))
    bits = rng.choice([None, rng.randint(1, 8)])
    form = "LR" if bits is None else "QLR"
    return Candidate(form, bits=bits, bits_a=rng.randint(1, 8), bits_b=rng.randint(1, 8), rank=rank)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("accounting", ["exact", "paper"])
def test_the_folder_never_exceeds_the_bound(tmp_path: Path, accounting: Any, seed: int) -> None:
    rng = random.Random(seed)
    zero_point: ZeroPoint = rng.choice(["codes", "int16"])
    model = Everything(seed).to(rng.choice([torch.float32, torch.bfloat16]))
    known = {"architecture": DESCRIPTION["architecture"]}
    bound = rest_upper_bound(model, LAYERS, known, accounting=accounting, extra_bytes=100)
    allocation, counted = {}, 0
    for name in LAYERS:
        layer = model.get_submodule(name)
        rows, columns = layer.weight.shape[0], layer.weight[0].numel()
        allocation[name] = random_candidate(rng, rows, columns, getattr(layer, "groups", 1))
        counted += size_of(allocation[name], rows, columns, accounting, zero_point)
    compressed = compress(model, allocation, seed, zero_point)
    if rng.random() < 0.5:
        compressed.double().to(next(model.parameters()).dtype)  # shared buffers come apart
    save(checkpoint_files(compressed, DESCRIPTION), tmp_path)
    total = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert total <= bound + counted
    apart = model.table.nbytes + (5 * 2 * 16 * len(LAYERS) if accounting == "paper" else 0)
    assert bound + counted - total <= 700 * len(LAYERS) + 60 * len(model.state_dict()) + 1000 + apart


def test_bound_of_a_bert_is_tight(tmp_path: Path) -> None:
    """all-MiniLM-L6 in size: the slack is far below one percent of the checkpoint."""
    transformers = pytest.importorskip("transformers")
    config = transformers.BertConfig(hidden_size=384, num_hidden_layers=6, num_attention_heads=12,
                                     intermediate_size=1536)  # fmt: skip
    torch.manual_seed(13)
    model = transformers.BertModel(config).eval()
    names = [name for name, child in model.named_modules() if isinstance(child, nn.Linear)]
    description = {"architecture": {"family": "transformers", "config": config.to_dict()}}
    bound = rest_upper_bound(model, {name: [] for name in names}, description)
    budget = parse_budget("60MB").compressible_bytes(10**7, bound)
    rng = random.Random(14)
    allocation: dict[str, Candidate] = {}
    counted = 0
    for name in names:
        rows, columns = model.get_submodule(name).weight.shape
        allocation[name] = random_candidate(rng, rows, columns, 1)
        counted += size_of(allocation[name], rows, columns)
    assert counted <= budget
    save(checkpoint_files(compress(model, allocation), {**description, **{"extra": {"seed": 0}}}), tmp_path)
    total = inspect(tmp_path)["file_bytes"]
    assert total <= counted + bound
    assert counted + bound - total < min(0.01 * total, 4096 + 1200 * len(names))
    assert total <= 60_000_000


@pytest.mark.parametrize("bits", [3, 5])
def test_the_bound_pays_for_what_the_paper_leaves_out(bits: int) -> None:
    """The largest rank, int16 zero-points, rows that end within a byte: 5 bytes a row of A and B uncounted."""
    model = nn.Sequential(nn.Linear(403, 401))
    candidate = Candidate("LR", bits_a=bits, bits_b=bits, rank=401)
    bound = rest_upper_bound(model, {"0": []}, DESCRIPTION, accounting="paper", extra_bytes=0)
    files = checkpoint_files(compress(model, {"0": candidate}, zero_point="int16"), DESCRIPTION)
    slack = bound + size_of(candidate, 401, 403, "paper", "int16") - sum(map(len, files.values()))
    assert 0 <= slack <= 2100 + 5 * 401  # W's rows, which this layer has not
    exact = rest_upper_bound(model, {"0": []}, DESCRIPTION, extra_bytes=0)
    assert bound == exact + 5 * (2 * 401 + 401)


def test_bound_names_a_layer_that_is_not_there() -> None:
    with pytest.raises(ModelError, match="no layer 'nowhere'"):
        rest_upper_bound(Everything(), {"nowhere": []}, DESCRIPTION)


# -- errors -------------------------------------------------------------------------------------------------


def refuses(folder: Path | str, match: str, model: nn.Module | None = None) -> None:
    with pytest.raises(CheckpointError, match=match) as error:
        load(folder, model=model or Everything())
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


def test_missing_folder_and_files(saved: Path, tmp_path: Path) -> None:
    refuses(tmp_path / "nowhere", "the folder does not exist")
    (saved / TENSORS).unlink()
    refuses(saved, f"has no {re.escape(TENSORS)}")
    with pytest.raises(CheckpointError, match=f"has no {re.escape(TENSORS)}"):
        inspect(saved)
    (saved / CONFIG).unlink()
    refuses(saved, f"has no {re.escape(CONFIG)}")
    refuses("nonsense://x", "nonsense")
    (tmp_path / "file").write_text("")
    refuses(tmp_path / "file", "the folder does not exist")
    with pytest.raises(CheckpointError, match="cannot be written"):
        save({CONFIG: b""}, tmp_path / "file")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", "null", '{"format_version": 2}', "[" * 100_000])
def test_config_that_is_none(saved: Path, text: str) -> None:
    (saved / CONFIG).write_text(text)
    refuses(saved, "mlorq.json is damaged")


def test_unknown_format_version(saved: Path) -> None:
    edit(saved, lambda config: config.update(format_version=3))
    refuses(saved, "mlorq.json has format version 3")


@pytest.mark.parametrize(
    "change",
    [
        {"form": "X"}, {"bits": None}, {"bits": 9}, {"bits": "3"}, {"shape": []}, {"shape": 7}, {"shape": [16, 0]},
        {"zero_point": "float"}, {"dtype": "nothing"}, {"dtype": "int8"}, {"aliases": None},
    ],
    ids=str,
)  # fmt: skip
def test_layer_entry_that_means_nothing(saved: Path, change: dict[str, Any]) -> None:
    edit(saved, lambda config: config["layers"][2].update(change))
    refuses(saved, "mlorq.json is damaged")


@pytest.mark.parametrize("key", ["layer", "shape", "form", "rank", "aliases", "bytes"])
def test_layer_entry_without_a_key(saved: Path, key: str) -> None:
    edit(saved, lambda config: config["layers"][0].pop(key))
    refuses(saved, f"mlorq.json is damaged: it lacks '{key}'")


def test_custom_model_needs_an_instance(saved: Path) -> None:
    with pytest.raises(CheckpointError, match="pass model=instance"):
        load(saved)


def test_instance_that_does_not_fit(saved: Path) -> None:
    class Short(Everything):
        def __init__(self) -> None:
            super().__init__()
            del self.blocks[2]

    refuses(saved, "no layer 'blocks.3'", Short())
    wide = Everything()
    wide.head = nn.Linear(16, 8, bias=False)
    refuses(saved, r"layer 'head' is linear \(8, 16\) in the model, but linear \(7, 16\) in the checkpoint", wide)
    other = Everything()
    other.head = nn.Conv2d(16, 7, 1)
    refuses(saved, "layer 'head' is conv2d", other)
    other.head = nn.LayerNorm(16)
    refuses(saved, "layer 'head' is a LayerNorm", other)
    refuses(saved, "layer 'patch' is a CompressedConv2d", compress(Everything(), ALLOCATION))
    norm = Everything()
    norm.batch_norm = nn.BatchNorm2d(17)
    refuses(saved, r"'batch_norm.weight' has shape \(16,\); the model needs \(17,\)", norm)
    untied = Everything()
    untied.extra = nn.Linear(2, 2)
    refuses(saved, "lacks tensors that the model has: 'extra.bias', 'extra.weight'", untied)
    fewer = Everything()
    del fewer.batch_norm
    refuses(saved, "has tensors that the model lacks: 'batch_norm.bias'", fewer)


def test_layer_of_another_kind(saved: Path) -> None:
    edit(saved, lambda config: config["layers"][0].update(kind="linear"))
    refuses(saved, "layer 'patch' is conv2d")


def test_instance_that_shares_what_the_checkpoint_does_not(saved: Path) -> None:
    tied = Everything()
    tied.batch_norm.weight = tied.norm.weight
    refuses(saved, "shared in the model but not in the checkpoint", tied)


def test_missing_and_unexpected_tensors(saved: Path) -> None:
    edit_tensors(saved, lambda tensors: tensors.pop("blocks.0.weight_scale"))
    refuses(saved, "lacks tensor 'blocks.0.weight_scale'")
    with pytest.raises(CheckpointError):
        inspect(saved)
    edit_tensors(saved, lambda tensors: tensors.update({"stray": torch.zeros(2)}))
    edit_tensors(saved, lambda tensors: tensors.update({"blocks.0.weight_scale": torch.ones(16).half()}))
    refuses(saved, "has tensors that the model lacks: 'stray'")


def test_mis_shaped_and_mis_typed_tensors(saved: Path) -> None:
    original = (saved / TENSORS).read_bytes()
    for name, tensor, match in (
        ("blocks.0.weight_codes", torch.zeros(16, 7, dtype=torch.uint8), r"has shape \(16, 7\)"),
        ("blocks.0.weight_zero_point", torch.zeros(16, dtype=torch.int16), r"is torch\.int16"),
        ("blocks.0.weight_scale", torch.ones(16), r"is torch\.float32"),
        ("steps", torch.tensor(3.0), r"is torch\.float32; the model needs torch\.int64"),
    ):
        (saved / TENSORS).write_bytes(original)
        sign(saved)
        edit_tensors(saved, lambda tensors, name=name, tensor=tensor: tensors.update({name: tensor}))
        refuses(saved, f"'{name}' {match}")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 0.0, -1.0])
def test_scales_that_are_none(saved: Path, value: float) -> None:
    edit_tensors(saved, lambda tensors: tensors["patch.b_scale"].__setitem__(1, value))
    refuses(saved, "'patch.b_scale' has scales that are not positive and finite")


@pytest.mark.parametrize("keep", [0, 5, 40, -1])
def test_truncated_tensors(saved: Path, keep: int) -> None:
    data = (saved / TENSORS).read_bytes()
    (saved / TENSORS).write_bytes(data[:keep])
    refuses(saved, f"{re.escape(TENSORS)} is damaged")


def test_nan_in_what_stays_float_is_kept(tmp_path: Path) -> None:
    """Not for a checkpoint to judge; shared and not equal to itself, it must still load."""
    model = compress(Everything(), ALLOCATION)
    with torch.no_grad():
        model.embedding.weight[0, 0] = float("nan")
    save(checkpoint_files(model, DESCRIPTION), tmp_path)
    assert load(tmp_path, model=Everything()).embedding.weight[0, 0].isnan()


@pytest.mark.parametrize(
    "description",
    [
        {},
        {"architecture": "timm"},
        {**DESCRIPTION, "other": 1},
        {**DESCRIPTION, "extra": {"path": Path()}},
        {**DESCRIPTION, "extra": {"metric": float("nan")}},
    ],
    ids=["empty", "text", "unknown", "object", "nan"],
)
def test_descriptions_that_are_none(description: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="description"):
        checkpoint_files(compress(Everything(), ALLOCATION), description)


def test_state_that_is_no_tensor_is_named() -> None:
    class Stateful(nn.Linear):
        def get_extra_state(self) -> Any:
            return {"step": 1}

    with pytest.raises(CheckpointError, match=r"'0\._extra_state' is a dict"):
        checkpoint_files(nn.Sequential(Stateful(2, 2)), DESCRIPTION)


def test_two_layers_of_one_name_are_an_error() -> None:
    layers = [nn.Linear(4, 4) for _ in range(2)]
    candidate = Candidate("Q", bits=4)
    model = nn.Sequential(
        *(CompressedLinear.from_layer(x, random_compressed("x", x, candidate, i)) for i, x in enumerate(layers))
    )
    with pytest.raises(CheckpointError, match="'0' and '1' both say they are 'x'"):
        checkpoint_files(model, DESCRIPTION)
    assert all(isinstance(layer, CompressedModule) for layer in model)
