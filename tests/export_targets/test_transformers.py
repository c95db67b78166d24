"""Target ``transformers``: loaded models equal ``mlorq.load`` bit for bit, and are saved with the same bytes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import safetensors.torch
import torch
import transformers
from huggingface_hub import CommitOperationAdd, HfApi, ModelCard
from transformers import AutoModel, AutoModelForSequenceClassification

import mlorq
from mlorq.checkpoint.entry import LayerEntry
from mlorq.checkpoint.format import checkpoint_files
from mlorq.checkpoint.io import save
from mlorq.config.sections import model_section
from mlorq.errors import CheckpointError, ConfigError, ModelError
from mlorq.forms.base import Candidate
from mlorq.forms.compressed_module import CompressedModule
from mlorq.forms.modules import CompressedEmbedding, CompressedLinear, replace_layers
from mlorq.huggingface.quantizer import MlorqConfig
from mlorq.models import load_model
from tests import detectors, zoo
from tests.checkpoint.test_checkpoint import ALLOCATION, DESCRIPTION, Everything, compress, random_compressed
from tests.export_targets.models import CASES, arguments_of, outputs
from tests.long import few

FILES = ("config.json", "model.safetensors")
DEFAULT = (
    "bert",
    "timm vit",
    "tied language model",
    "quantized activations, repq",
    "quantized activations, rectified, timm",
)


@pytest.fixture(scope="module", params=few(sorted(CASES), *DEFAULT))
def exported(request, tmp_path_factory):
    """A case with the folders of its checkpoint and of its export."""
    folder = tmp_path_factory.mktemp("exported")
    case = CASES[request.param]
    checkpoint = case.compressed(folder / "checkpoint")
    mlorq.export(checkpoint, folder / "export", to="transformers")
    return case, checkpoint, folder / "export"


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("bert")
    checkpoint = CASES["bert"].compressed(folder / "checkpoint")
    mlorq.export(checkpoint, folder / "export", to="transformers")
    return checkpoint, folder / "export"


def loaded(folder: Path):
    """The model that the class in ``config.json`` loads, which must find every tensor and no other."""
    name = json.loads((folder / "config.json").read_text())["architectures"][0]
    model, report = getattr(transformers, name).from_pretrained(folder, output_loading_info=True)
    assert not any(report.values()), report
    return model


def bytes_of(folder: Path) -> list[bytes]:
    return [(folder / name).read_bytes() for name in FILES]


# -- loading and saving ------------------------------------------------------------------------------------------------


def test_loaded_models_equal_the_checkpoint_bit_for_bit_and_are_saved_as_they_were(exported, tmp_path):
    case, checkpoint, folder = exported
    model, reference, batch = loaded(folder), mlorq.load(checkpoint), case.batch()
    found, wanted = outputs(model, arguments_of(batch)), outputs(reference, batch)
    assert wanted
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name
    layers = [module for module in model.modules() if isinstance(module, CompressedModule)]
    assert {type(layer) for layer in layers} >= {CompressedLinear}
    model.save_pretrained(tmp_path)
    assert bytes_of(tmp_path) == bytes_of(folder)


def test_pushed_models_are_saved_models(exported, tmp_path, monkeypatch):
    """``push_to_hub`` of a loaded model uploads what ``save_pretrained`` writes, and that loads again."""
    case, checkpoint, folder = exported
    pushed: dict[str, bytes] = {}

    def create_commit(hub: HfApi, repo_id: str, operations: list[CommitOperationAdd], **_: Any) -> str:
        assert repo_id == "me/model"
        pushed.update({one.path_in_repo: Path(one.path_or_fileobj).read_bytes() for one in operations})
        return "https://hub/me/model"

    monkeypatch.setattr(HfApi, "create_repo", lambda hub, name, **_: SimpleNamespace(repo_id=name))
    monkeypatch.setattr(HfApi, "create_commit", create_commit)
    card = ModelCard((folder / "README.md").read_text())  # that of the repository, which stays
    monkeypatch.setattr(ModelCard, "load", lambda *_, **__: card)
    model = loaded(folder)
    model.push_to_hub("me/model")
    assert pushed.pop("README.md").decode() == str(card)
    model.save_pretrained(tmp_path / "saved")
    assert pushed == {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()}
    assert [pushed[name] for name in FILES] == bytes_of(folder)
    (tmp_path / "again").mkdir()
    for name, data in pushed.items():
        (tmp_path / "again" / name).write_bytes(data)
    wanted, found = outputs(mlorq.load(checkpoint), case.batch()), loaded(tmp_path / "again")
    again = outputs(found, arguments_of(case.batch()))
    assert all(torch.equal(again[name], value) for name, value in wanted.items())


def test_a_fresh_process_loads_the_same_outputs(bert, tmp_path):
    checkpoint, folder = bert
    batch = CASES["bert"].batch()
    safetensors.torch.save_file(batch, tmp_path / "batch.safetensors")
    code = f"""
import mlorq
from safetensors.torch import load_file, save_file
from transformers import AutoModel
batch = load_file({str(tmp_path / "batch.safetensors")!r})
found = AutoModel.from_pretrained({str(folder)!r})(**batch)
save_file({{name: value.detach() for name, value in found.items()}}, {str(tmp_path / "out.safetensors")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    found, wanted = safetensors.torch.load_file(tmp_path / "out.safetensors"), outputs(mlorq.load(checkpoint), batch)
    assert set(found) == set(wanted) == {"last_hidden_state", "pooler_output"}
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


def test_the_file_of_weights_is_as_large_as_the_checkpoint_s_except_for_its_header(bert):
    sizes = [(where / "model.safetensors").stat().st_size for where in bert]
    headers = [int.from_bytes((where / "model.safetensors").read_bytes()[:8], "little") for where in bert]
    assert sizes[0] - headers[0] == sizes[1] - headers[1]


def test_quantized_tables_are_compressed_modules(tmp_path):
    checkpoint = CASES["bert with quantized embeddings"].compressed(tmp_path / "checkpoint")
    mlorq.export(checkpoint, tmp_path / "export", to="transformers")
    assert isinstance(loaded(tmp_path / "export").embeddings.word_embeddings, CompressedEmbedding)


def test_layers_with_one_weight_share_their_codes_again(tmp_path):
    checkpoint = CASES["bert with shared weights"].compressed(tmp_path / "checkpoint")
    mlorq.export(checkpoint, tmp_path / "export", to="transformers")
    first, second = (layer.attention.self.query for layer in loaded(tmp_path / "export").encoder.layer)
    assert first.weight_codes.data_ptr() == second.weight_codes.data_ptr()
    assert not torch.equal(first.bias, second.bias)


def test_the_encoder_of_a_classifier_is_loaded_and_saved_by_itself(tmp_path):
    checkpoint = CASES["quantized activations, repq"].compressed(tmp_path / "checkpoint")
    mlorq.export(checkpoint, tmp_path / "export", to="transformers")
    batch = CASES["quantized activations, repq"].batch()
    encoder = AutoModel.from_pretrained(tmp_path / "export")
    wanted = outputs(mlorq.load(checkpoint).bert, batch)
    assert torch.equal(outputs(encoder, batch)["last_hidden_state"], wanted["last_hidden_state"])
    encoder.save_pretrained(tmp_path / "encoder")
    again = loaded(tmp_path / "encoder")
    assert torch.equal(outputs(again, batch)["last_hidden_state"], wanted["last_hidden_state"])


def test_a_new_head_on_a_compressed_encoder_is_float(bert):
    model = AutoModelForSequenceClassification.from_pretrained(bert[1])
    assert isinstance(model.bert.encoder.layer[0].output.dense, CompressedLinear)
    assert isinstance(model.classifier, torch.nn.Linear)


def test_another_dtype_changes_the_computation_but_no_stored_tensor(bert):
    checkpoint, folder = bert
    batch = CASES["bert"].batch()
    model, reference = AutoModel.from_pretrained(folder, dtype=torch.bfloat16), mlorq.load(checkpoint).bfloat16()
    assert model.encoder.layer[0].output.dense.compute_dtype == torch.bfloat16
    stored = model.encoder.layer[0].output.dense.stored_tensors()
    assert {tensor.dtype for tensor in stored.values()} <= {torch.uint8, torch.float16}
    wanted = outputs(reference, batch)["last_hidden_state"]
    assert torch.equal(outputs(model, batch)["last_hidden_state"], wanted)


def test_layers_that_stay_in_float32_keep_the_dtypes_of_their_scales(tmp_path):
    checkpoint = CASES["t5 encoder"].compressed(tmp_path / "checkpoint")
    mlorq.export(checkpoint, tmp_path / "export", to="transformers")
    model = transformers.T5EncoderModel.from_pretrained(tmp_path / "export", dtype=torch.float16)
    assert "wo" in model._keep_in_fp32_modules
    layer = model.encoder.block[0].layer[1].DenseReluDense.wo
    scales = [tensor for name, tensor in layer.stored_tensors().items() if name.endswith("scale")]
    assert scales
    assert {tensor.dtype for tensor in scales} == {torch.float16}


def test_the_user_s_choice_of_attention_wins_over_the_stored_one(bert):
    stored = json.loads((bert[1] / "config.json").read_text())["quantization_config"]["attention"]
    assert AutoModel.from_pretrained(bert[1]).config._attn_implementation == stored == "sdpa"
    model = AutoModel.from_pretrained(bert[1], attn_implementation="eager")
    assert model.config._attn_implementation == "eager"


def test_timm_models_bring_their_preprocessing(tmp_path):
    checkpoint = CASES["timm vit"].compressed(tmp_path / "checkpoint")
    mlorq.export(checkpoint, tmp_path / "export", to="transformers")
    processor = transformers.AutoImageProcessor.from_pretrained(tmp_path / "export")
    assert processor.data_config["input_size"] == (3, 32, 32)


@pytest.mark.parametrize("task", ["object-detection", "instance-segmentation"])
def test_detectors_keep_their_backbone_and_image_processor(task, tmp_path):
    detectors.save_transformers_detector(tmp_path / "model", task)
    model = load_model(model_section()(family="transformers", name=str(tmp_path / "model"), task=task))
    names = [name for name, module in model.module.named_modules() if type(module) is torch.nn.Linear]
    layers = {
        name: random_compressed(name, model.module.get_submodule(name), Candidate("Q", bits=4), seed)
        for seed, name in enumerate(names)
    }
    replace_layers(model.module, layers)
    save(checkpoint_files(model.module, {"architecture": model.architecture}), tmp_path / "checkpoint")
    mlorq.export(tmp_path / "checkpoint", tmp_path / "out", to="transformers", source=str(tmp_path / "model"))
    found, batch = loaded(tmp_path / "out"), {"pixel_values": zoo.pixels(2, 1, 64)}
    wanted = outputs(mlorq.load(tmp_path / "checkpoint"), batch)
    assert all(torch.equal(outputs(found, batch)[name], value) for name, value in wanted.items())
    found.save_pretrained(tmp_path / "again")
    assert bytes_of(tmp_path / "again") == bytes_of(tmp_path / "out")
    assert transformers.AutoImageProcessor.from_pretrained(tmp_path / "out").to_dict() == (
        transformers.AutoImageProcessor.from_pretrained(tmp_path / "model").to_dict()
    )


# -- errors ------------------------------------------------------------------------------------------------------------


def test_configurations_of_later_versions_and_malformed_ones_are_refused():
    with pytest.raises(ValueError, match="format version 2; this version of mlorq reads 1"):
        MlorqConfig(format_version=2)
    with pytest.raises(ValueError, match="a layer is malformed"):
        MlorqConfig(layers=[{"layer": "a"}]).entries()


def test_layers_in_blocks_have_a_version_of_their_own():
    def row(columns: int) -> dict[str, Any]:
        return LayerEntry(
            "a", "linear", (16, columns), Candidate("TCQ", bits=4), "codes", "float32", 1, ()
        ).to_json() | {"shape": [16, columns]}

    assert [MlorqConfig(layers=[row(columns)]).format_version for columns in (8192, 12544)] == [1, 2]
    assert MlorqConfig(layers=[row(12544)], format_version=2).entries()[0].in_blocks
    with pytest.raises(ValueError, match="format version 2"):
        MlorqConfig(layers=[row(8192)], format_version=2)


def test_relu_in_the_place_of_gelu_has_a_version_of_its_own():
    assert MlorqConfig(activations={"sites": [], "mlps": [{}]}).format_version == 2
    assert MlorqConfig(activations={"sites": []}).format_version == 1


def test_a_model_without_any_of_the_layers_is_refused(bert, tmp_path):
    other = json.loads((bert[1] / "config.json").read_text())
    for layer in other["quantization_config"]["layers"]:
        layer["layer"] = "other." + layer["layer"]
    (tmp_path / "config.json").write_text(json.dumps(other))
    (tmp_path / "model.safetensors").write_bytes((bert[1] / "model.safetensors").read_bytes())
    with pytest.raises(ValueError, match="BertModel has none of the compressed layers"):
        AutoModel.from_pretrained(tmp_path)


def test_a_model_of_another_family_is_refused(tmp_path):
    save(checkpoint_files(compress(Everything(), ALLOCATION), DESCRIPTION), tmp_path)
    with pytest.raises(CheckpointError, match="cannot be rebuilt"):
        mlorq.export(tmp_path, tmp_path / "out", to="transformers")
    assert not (tmp_path / "out").exists()


def test_a_timm_model_without_a_classifier_is_refused(tmp_path):
    case = CASES["timm vit"]
    features = type(case)(lambda: zoo.timm_model(zoo.VIT, zoo.VIT_ARGUMENTS | {"num_classes": 0}), case.batch)
    checkpoint = features.compressed(tmp_path / "checkpoint")
    with pytest.raises(CheckpointError, match="has no classifier"):
        mlorq.export(checkpoint, tmp_path / "out", to="transformers")


def test_files_of_others_are_kept_and_an_earlier_export_is_replaced(bert, tmp_path):
    checkpoint, _ = bert
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="give a new or empty folder"):
        mlorq.export(checkpoint, tmp_path, to="transformers")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    with pytest.raises(CheckpointError, match="is a file"):
        mlorq.export(checkpoint, tmp_path / "notes.txt", to="transformers")
    mlorq.export(checkpoint, tmp_path / "out", to="transformers")
    before = bytes_of(tmp_path / "out")
    (tmp_path / "out" / "notes.txt").write_text("mine")
    (tmp_path / "out" / "model.safetensors").write_bytes(b"damaged")
    mlorq.export(checkpoint, tmp_path / "out", to="transformers")
    assert bytes_of(tmp_path / "out") == before
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"


def test_a_source_without_a_tokenizer_and_a_missing_one_are_refused(bert, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigError, match="has no file of a tokenizer or image processor"):
        mlorq.export(bert[0], tmp_path / "out", to="transformers", source=str(tmp_path / "empty"))
    with pytest.raises(ModelError, match="does not exist"):
        mlorq.export(bert[0], tmp_path / "out", to="transformers", source=str(tmp_path / "none"))


def test_a_remote_folder_is_written(bert):
    written = mlorq.export(bert[0], "memory://hub/bert", to="transformers")
    import fsspec

    fs = fsspec.filesystem("memory")
    assert fs.cat_file("/hub/bert/model.safetensors") == (bert[1] / "model.safetensors").read_bytes()
    assert "memory://hub/bert/config.json" in written
