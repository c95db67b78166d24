"""Models with an encoder and a decoder (T5, BART, Marian): batches, f(x), padding of either text, metric, exports."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

import mlorq
from mlorq.calibration.collect import capture
from mlorq.calibration.label_free_hessian import label_free_hessian
from mlorq.calibration.token_importance import token_importance
from mlorq.config.run import RunConfig
from mlorq.data import load_dataset
from mlorq.errors import DataError, ModelError
from mlorq.models import FAMILIES, FloatModel, load_model
from mlorq.models.encoder_decoder import IGNORED, decoder_batch, shifter, spread, target_logits, without_values
from mlorq.models.layers import find_layers
from mlorq.models.task_outputs import POSITIONS
from tests import zoo
from tests.compressed import compressed, folder_of
from tests.long import few

TASK = "text2text-generation"
TOKENS = {"vocab_size": 24, "pad_token_id": 0, "eos_token_id": 3}
WIDTHS = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
BART = {
    **TOKENS,
    **WIDTHS,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "max_position_embeddings": 40,
    "decoder_start_token_id": 2,
    "bos_token_id": 2,
    "forced_eos_token_id": 3,
}
T5 = {**TOKENS, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "t5": ("T5Config", "T5ForConditionalGeneration", T5),
    "gated-t5": ("T5Config", "T5ForConditionalGeneration", {**T5, "feed_forward_proj": "gated-gelu"}),
    "bart": ("BartConfig", "BartForConditionalGeneration", BART),
    "mbart": ("MBartConfig", "MBartForConditionalGeneration", BART),
    "marian": ("MarianConfig", "MarianMTModel", {**BART, "decoder_vocab_size": 24}),
}
ROWS = list(zip(zoo.SENTENCES, [*zoo.SENTENCES[3:], *zoo.SENTENCES[:3]], strict=True))


def made(kind: str) -> nn.Module:
    """A model with random weights."""
    config, name, settings = MODELS[kind]
    module = zoo.randomised(getattr(transformers, name)(getattr(transformers, config)(**settings)), 0)
    module.tie_weights()
    return module


def save(folder: Path, kind: str) -> nn.Module:
    """A model with its tokenizer in a folder, and a table of pairs of texts beside it."""
    module = made(kind)
    module.save_pretrained(folder / "model")
    zoo.tokenizer().save_pretrained(folder / "model")
    lines = ["source\ttarget\tgrade", *(f"{source}\t{target}\t1" for source, target in ROWS)]
    (folder / "pairs.tsv").write_text("\n".join(lines))
    return module


def run_of(**settings: Any) -> dict[str, Any]:
    """A configuration; ``settings`` of its evaluation data."""
    table = {"source": "table", "path": "pairs.tsv", "text": ["source", "target"], "batch_size": 3}
    return {
        "model": {"family": "transformers", "name": "./model", "task": TASK},
        "data": {"calibration": table | {"samples": 6}, "evaluation": table | settings},
    }


def loaded(folder: Path, role: str = "evaluation", **settings: Any) -> tuple[FloatModel, Any]:
    config = RunConfig.from_mapping({"budget": "4bit", **run_of(**settings)}, str(folder))
    model = load_model(config.model, str(folder))
    return model, load_dataset(getattr(config.data, role), role, model, config.model, str(folder), 0)


# -- whole runs --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", few(["gated-t5", "marian"], "marian"))
def test_models_are_compressed_and_load_alone(kind: str, tmp_path: Path) -> None:
    save(tmp_path, kind)
    model, data = loaded(tmp_path)
    module = model.module  # Marian's positions are made when it is loaded
    result = zoo.run(tmp_path, {**run_of(), "budget": "6bit"})
    assert result["metric"]["name"] == "perplexity"
    assert result["metric"]["float"] == pytest.approx(_perplexity(module))
    assert result["metric"]["compressed"] == pytest.approx(result["metric"]["float"], rel=0.2)
    checkpoint = result["checkpoint"].removeprefix("file://")
    found = mlorq.load(checkpoint)
    assert type(found) is type(module)
    dense = tmp_path / "dense.safetensors"
    mlorq.export(checkpoint, dense, to="dense")
    twin = with_weights(type(module).from_pretrained(tmp_path / "model"), dense)
    for batch in data.batches:
        with torch.no_grad():
            assert torch.equal(target_logits(found, batch), target_logits(twin, batch))
    kept = {path.name for path in (Path(checkpoint) / "preparation").iterdir()}
    assert {"generation_config.json", "tokenizer.json"} <= kept


def with_weights(module: Any, file: Path) -> nn.Module:
    """A float model with the weights of a state dict, in which the two ends of a model are not tied."""
    head = module.get_output_embeddings()
    if head is not None:
        head.weight = nn.Parameter(head.weight.detach().clone())
    assert not module.load_state_dict(load_file(file), strict=False).unexpected_keys
    return module.eval()


def _perplexity(module: nn.Module) -> float:
    """From the probabilities of one pair after the other, shifted by the model itself."""
    tokens = zoo.tokenizer()
    logs = []
    for source, target in ROWS:
        ids = tokens(source, return_tensors="pt")["input_ids"]
        labels = tokens(target, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            chances = module(input_ids=ids, labels=labels).logits[0].double().softmax(-1)
        logs += [math.log(chances[place, label]) for place, label in enumerate(labels[0])]
    return math.exp(-np.mean(logs))


@pytest.mark.parametrize("kind", few(["t5", "bart"], "bart"))
def test_graphs_of_encoder_and_decoder(kind: str, tmp_path: Path) -> None:
    """At other numbers of samples and tokens than the example's, with padding in both texts."""
    pytest.importorskip("onnx", reason="needs the extra onnx")
    pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    pytest.importorskip("onnxscript", reason="needs the extra onnx")
    save(tmp_path, kind)
    model, data = loaded(tmp_path)
    module = compressed(model.module)
    (file,) = mlorq.export(folder_of(tmp_path / "out", module, model.architecture), tmp_path / "model.onnx")
    graph = mlorq.load(file, runtime="onnxruntime")
    names = [one.name for one in graph.session.get_inputs()]
    assert names == ["input_ids", "attention_mask", "decoder_input_ids", "decoder_attention_mask"]
    for batch in data.batches:
        with torch.no_grad():
            wanted = module(**batch).logits
        assert float((graph(**batch).logits - wanted).abs().max() / wanted.abs().max()) < 1e-5


# -- the decoder's inputs ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", MODELS)
def test_the_decoder_reads_what_the_model_makes_of_labels(kind: str) -> None:
    """Also if a text is padded: the logits of its tokens are those of the model with labels."""
    module = made(kind)
    config, name, settings = MODELS[kind]
    rows = [[2, 7, 8, 3], [2, 9, 3]]
    shift = shifter(without_values(getattr(transformers, name), getattr(transformers, config)(**settings)))
    batch = decoder_batch(rows, shift)
    labels = batch.pop("labels")
    assert labels.tolist() == [rows[0], [*rows[1], IGNORED]]
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    with torch.no_grad():
        found = module(input_ids=ids, **batch).logits
        for row, own in enumerate(rows):
            alone = module(input_ids=ids[row : row + 1], labels=torch.tensor([own])).logits[0]
            assert torch.allclose(found[row, : len(own)], alone, atol=1e-5)


def test_models_without_a_method_of_their_own_start_with_their_token() -> None:
    settings = {**WIDTHS, **TOKENS, "decoder_start_token_id": 2, "encoder_attention_heads": 2}
    config = transformers.M2M100Config(**settings, decoder_attention_heads=2)
    empty = without_values(transformers.M2M100ForConditionalGeneration, config)
    assert not hasattr(empty, "prepare_decoder_input_ids_from_labels")
    assert shifter(empty)(torch.tensor([[7, 8, 3, IGNORED]])).tolist() == [[2, 7, 8, 3]]
    config.decoder_start_token_id = None
    with pytest.raises(ModelError, match="lacks decoder_start_token_id"):
        shifter(without_values(transformers.M2M100ForConditionalGeneration, config))


# -- f(x) and padding --------------------------------------------------------------------------------------------------


def test_places_are_evenly_spaced_in_the_part_that_counts(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for places in (1, 2, POSITIONS, 57):
        lengths = torch.randint(1, places + 1, (5,), generator=generator)
        values = torch.arange(places).expand(5, -1)[:, :, None].float()
        found = spread(values, torch.arange(places) < lengths[:, None])[:, :, 0]
        for row, length in zip(found, lengths.tolist(), strict=True):
            exact = np.linspace(0, length - 1, POSITIONS)
            assert np.abs(row.numpy() - exact).max() <= 0.5 + 1e-9
            assert row[0] == 0
            assert row[-1] == length - 1


def padded(batch: dict[str, Tensor], extra: int, more: int) -> dict[str, Tensor]:
    """The same texts with further padding, in which other tokens stand."""
    found = {}
    for name, value in batch.items():
        count = more if name.startswith("decoder_") else extra
        filled = value.new_full((len(value), count), 0 if name.endswith("mask") else 9)
        found[name] = torch.cat([value, filled], dim=1)
    return found


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_padding_of_either_text_is_no_data(kind: str, tmp_path: Path) -> None:
    save(tmp_path, kind)
    model, data = loaded(tmp_path)
    layers = find_layers(model, data.batches[0]).layers
    wanted = capture(model, layers, data.batches, moments=True)
    hessian = label_free_hessian(model, layers, data.batches, probes=4, seed=1)
    weights = token_importance(model, layers, [], data.batches, seed=1)
    masks = [(batch["attention_mask"] == 1, batch["decoder_attention_mask"] == 1) for batch in data.batches]
    for extra, more in ((1, 15), (16, 0)):
        longer = [padded(batch, extra, more) for batch in data.batches]
        assert all(batch["input_ids"].shape != batch["decoder_input_ids"].shape for batch in longer)
        found = capture(model, layers, longer, moments=True)
        torch.testing.assert_close(found.reference, wanted.reference, atol=1e-5, rtol=1e-4)
        for name, products in found.inputs.items():
            assert products.counts == wanted.inputs[name].counts, name
            torch.testing.assert_close(products.means(), wanted.inputs[name].means(), rtol=1e-4, atol=1e-5)
        for name, value in label_free_hessian(model, layers, longer, probes=4, seed=1).items():
            assert (value - hessian[name]).abs().max() <= 1e-3 * float(hessian[name].max()), name
        for before, after, own, batch in zip(
            weights, token_importance(model, layers, [], longer, seed=1), masks, longer, strict=True
        ):
            others = (batch["attention_mask"] == 1, batch["decoder_attention_mask"] == 1)
            for name, value in before.items():
                (side,) = [place for place in (0, 1) if own[place].shape == value.shape]
                torch.testing.assert_close(after[name][others[side]], value[own[side]], rtol=2e-3, atol=1e-4)


# -- data --------------------------------------------------------------------------------------------------------------


def test_batches_hold_every_row_and_tell_the_two_texts_apart(tmp_path: Path) -> None:
    save(tmp_path, "bart")
    _, data = loaded(tmp_path)
    tokens = zoo.tokenizer()
    rows = []
    for batch, labels in zip(data.batches, data.evaluate.labels, strict=True):
        assert batch["input_ids"].shape[1] != batch["decoder_input_ids"].shape[1]
        for place in range(len(labels)):
            source = batch["input_ids"][place][batch["attention_mask"][place] == 1]
            target = labels[place][labels[place] != IGNORED]
            assert int(batch["decoder_attention_mask"][place].sum()) == len(target)
            rows.append((tuple(source.tolist()), tuple(target.tolist())))
    wanted = [tuple(tuple(tokens(text)["input_ids"]) for text in row) for row in ROWS]
    assert sorted(rows) == sorted(wanted)
    assert data.samples == len(ROWS)


def test_a_list_chooses_rows(tmp_path: Path) -> None:
    save(tmp_path, "t5")
    (tmp_path / "rows.txt").write_text("3\n5\n")
    _, data = loaded(tmp_path, list="rows.txt")
    assert data.samples == 2
    (labels,) = data.evaluate.labels
    kept = {tuple(row[row != IGNORED].tolist()) for row in labels}
    assert kept == {tuple(zoo.tokenizer()(ROWS[place][1])["input_ids"]) for place in (1, 3)}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"text": ["source"]}, "takes two text columns, source and target, and no label"),
        ({"label": "grade"}, "takes two text columns, source and target, and no label"),
        ({"metric": "accuracy"}, "metric 'accuracy' does not fit generated texts; choose perplexity"),
        (
            {"source": "text_file", "text": None},
            "source text_file is for models with task text-generation or fill-mask",
        ),
    ],
)
def test_data_at_fault_is_named(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    save(tmp_path, "t5")
    with pytest.raises(DataError, match=message) as caught:
        loaded(tmp_path, **settings)
    assert "\n" not in str(caught.value)


def test_example_inputs_have_both_texts(tmp_path: Path) -> None:
    save(tmp_path, "bart")
    model, data = loaded(tmp_path)
    family = FAMILIES[model.family]
    batch = family.example_input(model.architecture, samples=3)
    described = family.preprocess(model.architecture)
    assert list(batch) == described["inputs"] == list(data.batches[0])
    assert batch["input_ids"].shape[1] != batch["decoder_input_ids"].shape[1]
    assert model.outputs(model.module, batch).shape == (3, POSITIONS * 24)
    # An instance of the class says as much as the task does; a classifier of the same kind reads one text.
    whole = FAMILIES[model.family].describe(model.module)
    assert family.preprocess(whole)["inputs"] == described["inputs"]
    classifier = {**model.architecture, "task": "text-classification"}
    assert family.preprocess(classifier)["inputs"] == ["input_ids", "attention_mask"]
