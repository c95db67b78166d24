"""A checkpoint is data: damage is noticed, and nothing that it names is imported, unpickled, fetched or allocated."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from torch import nn

from mlorq.checkpoint.format import checkpoint_files
from mlorq.checkpoint.io import dense_state, inspect, load, save
from mlorq.checkpoint.places import DESCRIPTION, OLD_DESCRIPTION, TENSORS
from mlorq.errors import CheckpointError
from mlorq.forms.base import Candidate
from mlorq.forms.compressed_module import CompressedModule
from mlorq.forms.modules import replace_layers
from mlorq.models import from_module
from mlorq.models.blank import Limits, blank_copy, shapes_copy, shapes_only, without_values
from tests import zoo
from tests.checkpoint.signing import as_format_1, edit, edit_header, edit_tensors, own_metadata, unsigned
from tests.checkpoint.test_checkpoint import ALLOCATION, Everything, compress, images, outputs, random_compressed
from tests.checkpoint.test_checkpoint import DESCRIPTION as SAID

TIMM = {"vit": (zoo.VIT, zoo.VIT_ARGUMENTS), "swin": (zoo.SWIN, zoo.SWIN_ARGUMENTS)}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save(checkpoint_files(compress(Everything(), ALLOCATION), SAID), tmp_path / "out")
    return tmp_path / "out"


def library_model(kind: str) -> nn.Module:
    if kind in TIMM:
        return zoo.timm_model(*TIMM[kind])
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    torch.manual_seed(0)
    return transformers.BertModel(config).eval()


def library_inputs(kind: str) -> torch.Tensor:
    return torch.arange(12).reshape(2, 6) if kind == "bert" else zoo.pixels(2, 1)


def compressed_library_model(kind: str, folder: Path) -> nn.Module:
    """A model of a library with its linear layers as codes, saved to ``folder``."""
    module = library_model(kind)
    architecture = from_module(module).architecture
    names = [name for name, child in module.named_modules() if isinstance(child, nn.Linear)]
    layers = {
        name: random_compressed(name, module.get_submodule(name), Candidate("Q", bits=3), index)
        for index, name in enumerate(names)
    }
    replace_layers(module, layers)
    save(checkpoint_files(module, {"architecture": architecture}), folder)
    return module


@pytest.fixture
def nothing_is_reached(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What was fetched or unpickled; the test fails if anything was."""
    reached: list[str] = []

    def record(name: str) -> Any:
        def refuse(*given: Any, **_: Any) -> Any:
            reached.append(f"{name}{given[:2]}")
            raise OSError(f"{name} was reached")

        return refuse

    monkeypatch.setattr(socket, "getaddrinfo", record("getaddrinfo"))
    monkeypatch.setattr(socket.socket, "connect", record("connect"))
    monkeypatch.setattr(torch, "load", record("torch.load"))
    yield reached
    assert reached == []


def refuses(folder: Path, match: str, model: nn.Module | None = None) -> None:
    with pytest.raises(CheckpointError, match=match) as error:
        load(folder, model=model)
    assert "\n" not in str(error.value)


# -- damage -------------------------------------------------------------------------------------------------


def flipped(path: Path, at: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1 << bit
    path.write_bytes(data)


def test_a_flipped_bit_in_a_tensor_is_named(saved: Path) -> None:
    header = (saved / TENSORS).read_bytes()
    start = 8 + int.from_bytes(header[:8], "little")
    table = json.loads(header[8:start])
    checked = 0
    for name, value in table.items():
        if name == "__metadata__" or value["data_offsets"][0] == value["data_offsets"][1]:
            continue
        at = start + value["data_offsets"][1] - 1
        flipped(saved / TENSORS, at, checked % 8)
        refuses(saved, f"tensor '{name}' does not have its digest", Everything())
        flipped(saved / TENSORS, at, checked % 8)
        checked += 1
    assert checked > 30
    load(saved, model=Everything())


@pytest.mark.parametrize("file", [TENSORS, DESCRIPTION])
def test_a_flipped_bit_in_header_or_description_is_noticed(saved: Path, file: str) -> None:
    data = (saved / file).read_bytes()
    end = len(data) if file == DESCRIPTION else 8 + int.from_bytes(data[:8], "little")
    for at in range(0, end, 13):
        flipped(saved / file, at, at % 8)
        with pytest.raises(CheckpointError):
            inspect(saved)
        (saved / file).write_bytes(data)
    inspect(saved)


def test_files_of_two_checkpoints_do_not_mix(saved: Path, tmp_path: Path) -> None:
    description = {**SAID, "extra": {"note": "another"}}
    save(checkpoint_files(compress(Everything(), ALLOCATION), description), tmp_path / "other")
    (saved / DESCRIPTION).write_bytes((tmp_path / "other" / DESCRIPTION).read_bytes())
    refuses(saved, "mlorq.json does not have the digest in model.safetensors", Everything())


def test_tensors_that_other_software_wrote_have_no_digests(saved: Path) -> None:
    (saved / TENSORS).write_bytes(unsigned(saved))
    refuses(saved, "model.safetensors has no digests", Everything())


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda t: t["steps"].update(dtype="F13"), "unknown dtype"),
        (lambda t: t["steps"].update(shape=[2]), r"of shape \(2,\) has 8 B instead of 16 B"),
        (lambda t: t["steps"].update(shape=[2**62, 2**62]), "instead of"),
        (lambda t: t["steps"].update(shape=[1.0]), "malformed shape"),
        (lambda t: t["steps"].update(shape=[True]), "malformed shape"),
        (lambda t: t["steps"].update(data_offsets=[0]), "malformed shape or offset"),
        (lambda t: t["steps"].pop("shape"), "it lacks 'shape'"),
        (lambda t: t.update({"more": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]}}), "does not follow"),
        (lambda t: t.update({"more": {"dtype": "U8", "shape": [10**12], "data_offsets": [0, 10**12]}}), "damaged"),
        (lambda t: t.pop("steps"), "damaged"),
    ],
)
def test_headers_that_are_not_of_the_file(saved: Path, change: Any, match: str) -> None:
    edit_header(saved, change, signed=False)
    refuses(saved, f"model.safetensors is damaged: .*{match}|{match}", Everything())


def test_deep_json_is_one_line(saved: Path) -> None:
    deep = b"[" * 100_000
    (saved / TENSORS).write_bytes(len(deep).to_bytes(8, "little") + deep)
    refuses(saved, "model.safetensors is damaged", Everything())
    (saved / DESCRIPTION).write_bytes(deep)
    refuses(saved, "mlorq.json is damaged: it is nested too deeply", Everything())


def test_a_header_longer_than_the_file_is_not_read(saved: Path) -> None:
    (saved / TENSORS).write_bytes((2**63).to_bytes(8, "little") + b"{}")
    refuses(saved, "model.safetensors is damaged", Everything())


# -- what the files say -------------------------------------------------------------------------------------


def test_the_tensors_alone_say_what_they_are(saved: Path) -> None:
    own = own_metadata(saved)
    assert own["format_version"] == 2
    assert own["layers"]["patch"] == ["LR3-4-8", [16, 3, 4, 4]]
    assert list(own["layers"]) == list(ALLOCATION)
    with safetensors.safe_open(saved / TENSORS, "pt") as file:  # a safetensors file like any other
        assert len(own["digests"].split()) == len(file.keys())


def test_format_1_loads_as_before(saved: Path) -> None:
    wanted, described, dense = outputs(load(saved, model=Everything()), images(1)), inspect(saved), dense_state(saved)
    as_format_1(saved)
    assert sorted(path.name for path in saved.iterdir()) == [OLD_DESCRIPTION, TENSORS]
    assert torch.equal(outputs(load(saved, model=Everything()), images(1)), wanted)
    old = inspect(saved)
    assert old["format_version"] == 1
    assert {key: old[key] for key in ("layers", "architecture", "rest")} == {
        key: described[key] for key in ("layers", "architecture", "rest")
    }
    assert old["files"].keys() == {TENSORS, OLD_DESCRIPTION}
    state, _ = dense_state(saved)
    assert all(torch.equal(value, dense[0][name]) for name, value in state.items())
    edit_old = json.loads((saved / OLD_DESCRIPTION).read_text())
    edit_old["layers"][0]["rank"] = 10**9
    (saved / OLD_DESCRIPTION).write_text(json.dumps(edit_old))
    refuses(saved, r"tensor 'patch\.a_codes' has shape", Everything())


def test_saving_replaces_format_1_and_leaves_the_configuration_of_others(saved: Path) -> None:
    files = {name: (saved / name).read_bytes() for name in (TENSORS, DESCRIPTION)}
    as_format_1(saved)
    save(files, saved)
    assert sorted(path.name for path in saved.iterdir()) == [DESCRIPTION, TENSORS]
    (saved / OLD_DESCRIPTION).write_text('{"model_type": "bert"}')
    save(files, saved)
    assert (saved / OLD_DESCRIPTION).read_text() == '{"model_type": "bert"}'
    load(saved, model=Everything())
    (saved / DESCRIPTION).unlink()
    refuses(saved, "has no mlorq.json, and its config.json is of other software", Everything())


def test_the_newer_description_wins(saved: Path, tmp_path: Path) -> None:
    (saved / OLD_DESCRIPTION).write_text('{"format_version": 1}')
    load(saved, model=Everything())


# -- memory -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["vit", "swin", "bert"])
def test_a_rebuilt_model_computes_the_same_bits(tmp_path: Path, kind: str) -> None:
    """Also with buffers that no file holds: Swin's masks and indices, BERT's positions."""
    module = compressed_library_model(kind, tmp_path)
    loaded, inputs = load(tmp_path), library_inputs(kind)
    found, wanted = (model(inputs) for model in (loaded, module))
    assert torch.equal(*(x if isinstance(x, torch.Tensor) else x[0] for x in (found, wanted)))
    assert not any(value.is_meta for value in (*loaded.parameters(), *loaded.buffers()))
    assert {name for name, _ in loaded.named_buffers()} == {name for name, _ in module.named_buffers()}


def test_the_model_does_not_refer_to_the_file(saved: Path) -> None:
    loaded = load(saved, model=Everything())
    wanted = outputs(loaded, images(2))
    for child in loaded.modules():
        if isinstance(child, CompressedModule):
            child.drop_cache()
    size = (saved / TENSORS).stat().st_size
    with (saved / TENSORS).open("r+b") as file:  # in place: the same inode
        file.write(b"\0" * size)
    assert torch.equal(outputs(loaded, images(2)), wanted)
    for value in loaded.parameters():
        assert value.untyped_storage().nbytes() == value.nbytes


def test_modules_without_values() -> None:
    limits, wanted = Limits.of_file(100, 10**6), Everything()
    empty, blank = shapes_only(Everything, limits), without_values(Everything, limits)
    copies = shapes_copy(wanted), blank_copy(wanted, [*wanted.parameters()])
    for module in (empty, blank, *copies):
        assert module.unembedding.weight is module.embedding.weight
        assert module.norm.bias is module.blocks[2].bias
        shapes = {name: value.shape for name, value in module.state_dict().items()}
        assert shapes == {name: value.shape for name, value in wanted.state_dict().items()}
    assert all(value.is_meta for module in (empty, copies[0]) for value in (*module.parameters(), *module.buffers()))
    for module in (blank, copies[1]):
        assert torch.equal(module.slice, wanted.slice)
        assert not any(value.is_meta for value in (*module.parameters(), *module.buffers()))
    kept = blank_copy(wanted, [wanted.head.weight])
    assert torch.equal(kept.patch.weight, wanted.patch.weight)
    assert kept.patch.weight is not wanted.patch.weight


class Slow(nn.Module):
    """Of which another thread builds a layer meanwhile."""

    def __init__(self, found: list[nn.Module]) -> None:
        super().__init__()
        thread = threading.Thread(target=lambda: found.append(nn.LayerNorm(4)))
        thread.start()
        thread.join()
        self.layer = nn.LayerNorm(4)


def test_other_threads_build_as_always() -> None:
    found: list[nn.Module] = []
    assert shapes_only(lambda: Slow(found), Limits(2, 16)).layer.weight.is_meta
    without_values(lambda: Slow(found), Limits(2, 16))
    for layer in found:
        assert layer.weight.tolist() == [1.0] * 4


def test_initialisation_of_parameters_is_skipped() -> None:
    class Filled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.full((3,), 7.0))
            nn.init.normal_(self.weight)
            with torch.no_grad():
                self.weight.uniform_(0, 1).mul_(2)
            self.register_buffer("table", torch.zeros(3).fill_(2.0))

    module = without_values(Filled, Limits(1, 12))
    assert module.weight.tolist() == [7.0] * 3
    assert module.table.tolist() == [2.0] * 3
    assert Filled().weight.tolist() != [7.0] * 3


def test_a_parameter_outside_the_state_is_an_error_unless_an_instance_has_its_value(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Hiding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.scale = nn.Linear(3, 3), nn.Parameter(torch.full((1,), 5.0))
            self.register_load_state_dict_post_hook(lambda _, keys: keys.missing_keys.clear())

        def state_dict(self, *given: Any, **options: Any) -> dict[str, Any]:
            return {name: value for name, value in super().state_dict(*given, **options).items() if name != "scale"}

    save(checkpoint_files(Hiding(), {"architecture": {"family": "custom"}}), tmp_path)
    assert load(tmp_path, model=Hiding()).scale.tolist() == [5.0]
    monkeypatch.setattr("mlorq.models.rebuild", lambda _: Hiding(), raising=False)
    refuses(tmp_path, "parameter 'scale' is not part of its state")


def test_recurrent_layers_load(tmp_path: Path) -> None:
    """They keep weak references to their parameters."""
    module, x = nn.Sequential(nn.LSTM(3, 4, batch_first=True)), torch.randn(2, 5, 3)
    save(checkpoint_files(module, {"architecture": {"family": "custom"}}), tmp_path)
    assert torch.equal(load(tmp_path, model=nn.Sequential(nn.LSTM(3, 4, batch_first=True)))(x)[0], module(x)[0])


def test_what_a_file_cannot_hold_is_not_built() -> None:
    class Many(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(1, 1) for _ in range(10**12))

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = torch.arange(10**6)[:, None] - torch.arange(10**6)[None]

    class Empty(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(*(nn.Sequential(nn.Identity()) for _ in range(10**12)))

    limits = Limits.of_file(10, 1000)
    for kind, match in ((Many, "more parameters"), (Wide, "a tensor of 8,000,000,000,000 B"), (Empty, "more modules")):
        with pytest.raises(CheckpointError, match=match):
            shapes_only(kind, limits)


# -- architectures ------------------------------------------------------------------------------------------


def architecture_of(folder: Path, change: Any) -> None:
    edit(folder, lambda config: change(config["architecture"]))


def changes_arguments(**values: Any) -> Any:
    return lambda architecture: architecture.setdefault("arguments", {}).update(values)


def changes_config(**values: Any) -> Any:
    return lambda architecture: architecture["config"].update(values)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (changes_arguments(checkpoint_path="w.pth"), "'checkpoint_path'"),
        (changes_arguments(pretrained=True), "'pretrained'"),
        (changes_arguments(pretrained_cfg_overlay={"file": "w.pth"}), "'pretrained_cfg_overlay'"),
        (changes_arguments(cache_dir="/tmp"), "'cache_dir'"),
        (changes_arguments(anything=1), "'anything'"),
        (changes_arguments(device="cuda"), "'device'"),
        (changes_arguments(norm_layer="os/system"), "only plain names"),
        (changes_arguments(norm_layer="nothing"), "timm model .*'nothing'"),
        (changes_arguments(embed_dim=2**31), "tensor of .* B|cannot be rebuilt"),
        (changes_arguments(depth=10**9), "at most 10000"),
        (changes_arguments(depth=9000), "more parameters than the file"),
        (changes_arguments(img_size=10**7), "tensor of .* B"),
        (changes_arguments(depth=3), "lacks tensors that the model has"),
        (lambda a: a.update(name="hf-hub:someone/model"), "timm has no model"),
        (lambda a: a.update(name="vit_tiny_patch16_224.x:/y"), "timm has no model"),
        (lambda a: a.update(name="local-dir:/tmp"), "timm has no model"),
        (lambda a: a.update(name=3), "name must be a str"),
        (lambda a: a.pop("arguments"), "lacks 'arguments'"),
        (lambda a: a.update(more=1), "unknown key 'more'"),
        (lambda a: a.update(family="os"), "is not installed"),
    ],
)
def test_timm_architectures_that_say_more_than_an_architecture(
    tmp_path: Path, nothing_is_reached: list[str], change: Any, match: str
) -> None:
    compressed_library_model("vit", tmp_path)
    load(tmp_path)
    architecture_of(tmp_path, change)
    refuses(tmp_path, match)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (changes_arguments(trust_remote_code=True), "trust_remote_code"),
        (changes_arguments(config="x"), "config"),
        (changes_arguments(add_pooling_layer="x"), "add_pooling_layer"),
        (changes_config(auto_map={"AutoModel": "extra.Extra"}), "'auto_map'"),
        (changes_config(auto_map={"AutoModel": "someone/repo--extra.Extra"}), "'auto_map'"),
        (changes_config(trust_remote_code=True), "'trust_remote_code'"),
        (changes_config(attn_implementation="kernels-community/flash-attn"), "attn_implementation"),
        (changes_config(_attn_implementation="kernels-community/flash-attn"), "_attn_implementation"),
        (changes_config(backbone="resnet50"), "'backbone'"),
        (changes_config(hidden_act="someone--repo"), "only plain names"),
        (changes_config(inner={"model_args": {"checkpoint_path": "w.pth"}}), "'checkpoint_path'"),
        (changes_config(hidden_act="nothing"), "cannot be rebuilt"),
        (changes_config(model_type="nothing"), "cannot be rebuilt"),
        (changes_config(model_type=None), "lacks 'model_type'"),
        (changes_config(num_hidden_layers=10**9), "at most 10000"),
        (changes_config(num_labels=10**9), "at most 10000"),
        (changes_config(vocab_size=2**33), "tensor of .* B"),
        (changes_config(hidden_size=2**31, num_attention_heads=1), "tensor of .* B|cannot be rebuilt"),
        (lambda a: a.update(attention="kernels-community/flash-attn"), "architecture.attention"),
        (lambda a: a.update(attention="flash_attention_2"), "architecture.attention"),
        (lambda a: a.update({"class": "Trainer"}), "no model class 'Trainer'"),
        (lambda a: a.update({"class": "AutoModel"}), "not a model class"),
        (lambda a: a.update({"class": "pipeline"}), "no model class 'pipeline'"),
        (lambda a: a.update({"class": "os.system"}), "no model class"),
        (lambda a: a.update({"class": ["BertModel"]}), "no model class"),
        (lambda a: a.update({"class": "ViTModel"}), "cannot be rebuilt"),
        (lambda a: a.update(task="anything"), "architecture.task"),
        (lambda a: a.update(dense=[{"in_features": 2**40}]), "architecture.dense"),
        (lambda a: a.update(pooling=["os"]), "architecture.pooling"),
        (lambda a: a.update(config=[]), "config must be a dict"),
    ],
)
def test_transformers_architectures_that_say_more_than_an_architecture(
    tmp_path: Path, nothing_is_reached: list[str], change: Any, match: str
) -> None:
    compressed_library_model("bert", tmp_path)
    load(tmp_path)
    architecture_of(tmp_path, change)
    refuses(tmp_path, match)


@pytest.mark.parametrize("kind", ["timm_wrapper", "timm_backbone"])
def test_a_model_of_timm_inside_one_of_transformers_is_checked_as_well(
    tmp_path: Path, nothing_is_reached: list[str], kind: str
) -> None:
    compressed_library_model("bert", tmp_path)
    key = "architecture" if kind == "timm_wrapper" else "backbone"
    for values, match in (
        ({key: "resnet18", "model_args": {"checkpoint_path": "w.pth"}}, "'checkpoint_path'"),
        ({key: "local-dir:/tmp"}, "only plain names"),
        ({key: "nothing"}, "timm has no model"),
        ({}, "does not name its model"),
    ):
        architecture = {"family": "transformers", "task": None, "attention": None}
        architecture["config"] = {"model_type": kind, **values}
        edit(tmp_path, lambda config, new=architecture: config.update(architecture=new))
        refuses(tmp_path, match)


def test_the_origin_of_a_model_is_not_followed(tmp_path: Path, nothing_is_reached: list[str]) -> None:
    compressed_library_model("bert", tmp_path)
    architecture_of(tmp_path, changes_config(_name_or_path="someone/model", transformers_version="9"))
    assert load(tmp_path).config.name_or_path == ""


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"rank": 10**9}, "has shape"),
        ({"bits_a": 2.0}, "bits_a of layer 'patch' must be an integer"),
        ({"bits_a": True}, "bits_a of layer 'patch' must be an integer"),
        ({"shape": [2**40, 3, 4, 4]}, "has shape"),
        ({"shape": [16, 3, 4, 2**40]}, "has shape"),
        ({"shape": [16.0, 3, 4, 4]}, "shape of layer 'patch'"),
        ({"aliases": ["head"]}, "layer 'head' is there twice"),
        ({"aliases": [3]}, "aliases of layer 'patch'"),
        ({"layer": 3}, "layer of layer 3 must be a text"),
        ({"dtype": "load"}, "is not a dtype"),
    ],
    ids=str,
)
def test_layers_that_the_file_does_not_hold(saved: Path, change: dict[str, Any], match: str) -> None:
    edit(saved, lambda config: config["layers"][0].update(change))
    with pytest.raises(CheckpointError, match=f"{match}|different layers"):
        load(saved, model=Everything())
    as_format_1(saved)  # which has no summary in the header to compare with
    refuses(saved, match, Everything())


@pytest.mark.parametrize(
    "quantizer",
    [{"kind": "uniform", "bits": 4, "channels": 2**31}, {"kind": "uniform", "bits": 10**9, "channels": None}, {}],
    ids=str,
)
def test_quantizers_that_the_file_does_not_hold(saved: Path, quantizer: dict[str, Any]) -> None:
    site = {"name": "head", "layers": ["head"], "size": 16, "quantizer": quantizer}
    edit(saved, lambda config: config.update(activations={"sites": [site], "folds": []}))
    with pytest.raises(CheckpointError, match=r"damaged|lacks tensors that the model has"):
        load(saved, model=Everything())


def test_more_tensors_than_the_model_has(tmp_path: Path) -> None:
    compressed_library_model("vit", tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.update({"stray": torch.zeros(3)}))
    refuses(tmp_path, "has tensors that the model lacks: 'stray'")
