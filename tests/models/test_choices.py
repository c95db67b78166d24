"""Language models that choose among texts, and task ``multiple-choice``: rows, tokens, metrics, masks, whole runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from torch.nn import functional as F

import mlorq
from mlorq.calibration.collect import capture
from mlorq.config.run import RunConfig
from mlorq.data import choice_scores, load_dataset
from mlorq.errors import ConfigError, DataError
from mlorq.models import load_model
from mlorq.models.layers import find_layers
from mlorq.models.loading import from_module
from mlorq.models.task_outputs import sketched_logits
from tests import zoo
from tests.long import few

SIZES = {
    "vocab_size": 24,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
}
MARKS = {"bos_token_id": 2, "eos_token_id": 3}
DECODERS = {
    "qwen3": (transformers.Qwen3Config, {**SIZES, **MARKS, "head_dim": 8, "num_key_value_heads": 1}),
    "llama": (transformers.LlamaConfig, {**SIZES, **MARKS}),
    "gpt2": (
        transformers.GPT2Config,
        {"vocab_size": 24, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 40, "pad_token_id": 0, **MARKS},
    ),
}
READERS = {
    "Bert": (transformers.BertConfig, SIZES),
    "Roberta": (transformers.RobertaConfig, {**SIZES, **MARKS, "type_vocab_size": 2}),
    "ModernBert": (transformers.ModernBertConfig, {**SIZES, **MARKS, "cls_token_id": 2, "sep_token_id": 3}),
}


def save_decoder(folder: Path, kind: str = "llama") -> Any:
    made, settings = DECODERS[kind]
    module = zoo.randomised(transformers.AutoModelForCausalLM.from_config(made(**settings)), 0)
    module.save_pretrained(folder)
    zoo.tokenizer().save_pretrained(folder)
    return module


def save_reader(folder: Path, kind: str = "Bert") -> Any:
    made, settings = READERS[kind]
    module = zoo.randomised(getattr(transformers, f"{kind}ForMultipleChoice")(made(**settings)), 0)
    module.save_pretrained(folder)
    zoo.tokenizer().save_pretrained(folder)
    return module


def save_table(folder: Path) -> list[dict[str, Any]]:
    """Rows with two to four choices, of one token and of several."""
    rows = []
    for index, text in enumerate(zoo.SENTENCES * 2):
        count = 2 + index % 3
        others = zoo.WORDS if index % 2 else zoo.SENTENCES
        rows.append({"text": text, "options": [others[(index + k) % 8] for k in range(count)], "answer": index % count})
    pq.write_table(pa.Table.from_pylist(rows), folder / "c.parquet")
    (folder / "t.txt").write_text("\n".join(zoo.SENTENCES * 9))
    return rows


def section(task: str, **settings: Any) -> dict[str, Any]:
    table: dict[str, Any] = {"source": "table", "path": "c.parquet", "text": ["text"], "choices": ["options"]}
    table |= {"label": "answer", "batch_size": 3} | settings
    text = {"source": "text_file", "path": "t.txt", "samples": 8, "max_length": 12, "batch_size": 4}
    return {
        "budget": "6bit",
        "search": zoo.FAST,
        "model": {"family": "transformers", "name": "./model", "task": task},
        "data": {"calibration": text if task == "text-generation" else table | {"samples": 8}, "evaluation": table},
    }


def dataset(folder: Path, task: str, role: str = "evaluation", **settings: Any) -> Any:
    config = RunConfig.from_mapping(section(task, **settings), str(folder))
    model = load_model(config.model, str(folder))
    return load_dataset(getattr(config.data, role), role, model, config.model, str(folder), 0)


def one_by_one(module: Any, tokenizer: Any, context: str, choice: str, most: int = 1000) -> float:
    """The definition: the log-probabilities of a choice's tokens in the joined text, which is read alone."""
    own = len(tokenizer(context, add_special_tokens=False)["input_ids"])
    ids = tokenizer(f"{context} {choice}", add_special_tokens=False)["input_ids"]
    count = len(ids) - own
    ids = ids[-(most + 1) :]
    with torch.no_grad():
        logits = module(input_ids=torch.tensor([ids[:-1]])).logits[0].double()
    return -float(F.cross_entropy(logits[-count:], torch.tensor(ids[-count:]), reduction="sum"))


@pytest.mark.parametrize("kind", DECODERS)
@pytest.mark.parametrize("most", [128, 8])
def test_likelihoods_are_those_of_one_choice_at_a_time(
    kind: str, most: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, rows = save_decoder(tmp_path / "model", kind), save_table(tmp_path)
    data = dataset(tmp_path, "text-generation", max_length=most)
    wanted = [
        np.array([one_by_one(module, zoo.tokenizer(), row["text"], choice, most) for choice in row["options"]])
        for row in rows
    ]
    for numbers in (2**26, 24):  # all sequences of a batch at once, and one at a time
        monkeypatch.setattr(choice_scores, "LOGITS", numbers)
        found = data.evaluate.log_likelihoods(module)
        for ours, theirs in zip(found, wanted, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    lengths = [[len(choice) for choice in row["options"]] for row in rows]
    right = [row["answer"] for row in rows]
    accuracy = np.mean([scores.argmax() == own for scores, own in zip(wanted, right, strict=True)])
    normed = [(scores / size).argmax() for scores, size in zip(wanted, lengths, strict=True)]
    assert data.evaluate(module) == {
        "choice_accuracy": pytest.approx(accuracy),
        "choice_accuracy_norm": pytest.approx(np.mean(np.array(normed) == right)),
    }
    assert not np.array_equal(normed, [scores.argmax() for scores in wanted]), "the length matters in these rows"


def test_sequences_that_differ_in_the_last_token_are_read_once(tmp_path: Path) -> None:
    save_decoder(tmp_path / "model")
    rows = save_table(tmp_path)
    lines = [json.dumps({"text": "the dog", "options": ["runs", "sings"], "answer": n % 2}) for n in range(4)]
    (tmp_path / "c.jsonl").write_text("\n\n".join(lines))
    data = dataset(tmp_path, "text-generation", path="c.jsonl")
    assert data.samples == 1
    assert data.batches[0]["input_ids"].shape == (1, 2)
    assert dataset(tmp_path, "text-generation").samples > len(rows)


def byte_tokenizer(folder: Path) -> Any:
    """A tokenizer whose tokens begin with the space before a word."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    texts = [sentence * 2 for sentence in zoo.SENTENCES]
    marks = ["<pad>", "<end>"]
    made.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=80, special_tokens=marks, initial_alphabet=list("ab"))
    )
    found = transformers.PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<end>")
    found.save_pretrained(folder)
    return found


def test_a_space_belongs_to_the_choice(tmp_path: Path) -> None:
    made, settings = DECODERS["llama"]
    module = zoo.randomised(transformers.LlamaForCausalLM(made(**settings | {"vocab_size": 90})), 0)
    module.save_pretrained(tmp_path / "model")
    tokenizer = byte_tokenizer(tmp_path / "model")

    def likelihoods(context: str, **settings: Any) -> np.ndarray:
        row = {"text": context, "a": "dog", "b": " cat runs", "answer": "0"}
        (tmp_path / "c.jsonl").write_text(json.dumps(row) + "\n")
        data = dataset(tmp_path, "text-generation", path="c.jsonl", choices=["a", "b"], **settings)
        return data.evaluate.log_likelihoods(module)[0]

    wanted = [one_by_one(module, tokenizer, "a big", choice) for choice in ("dog", "cat runs")]
    np.testing.assert_allclose(likelihoods("a big"), wanted, rtol=1e-5)
    np.testing.assert_allclose(likelihoods("a big ")[0], wanted[0], rtol=1e-5)
    # Without a context, the end token is in its place.
    ids = [tokenizer.eos_token_id, *tokenizer("dog")["input_ids"]]
    with torch.no_grad():
        logits = module(input_ids=torch.tensor([ids])).logits[0].double()
    alone = -float(F.cross_entropy(logits[:-1], torch.tensor(ids[1:]), reduction="sum"))
    np.testing.assert_allclose(likelihoods("")[0], alone, rtol=1e-5)
    # A blank: the text behind it is judged, whatever fills it.
    filled = likelihoods("the _ runs fast", blank="_", prompt="so {}")
    np.testing.assert_allclose(filled[0], one_by_one(module, tokenizer, "so the dog", "runs fast"), rtol=1e-5)
    np.testing.assert_allclose(filled[1], one_by_one(module, tokenizer, "so the  cat runs", "runs fast"), rtol=1e-5)


@pytest.mark.parametrize(
    ("row", "settings"),
    [
        ({"c": ["dog", "cat"], "y": 1}, {}),
        ({"c": ["dog", "cat", None], "y": "cat"}, {}),
        ({"c": '["dog", "cat"]', "y": "2"}, {"first_choice": 1}),
        ({"c": {"text": ["dog", "cat"], "label": ["1", "2"]}, "y": "2"}, {}),
        ({"c": {"text": ["dog", "cat"], "label": ["A", "B"]}, "y": "B"}, {}),
        ({"d": "dog", "c": "cat", "y": 1}, {"choices": ["d", "c"]}),
    ],
)
def test_the_forms_of_choices_and_labels(row: dict[str, Any], settings: dict[str, Any], tmp_path: Path) -> None:
    save_reader(tmp_path / "model")
    (tmp_path / "c.jsonl").write_text(json.dumps({"q": "the dog"} | row))
    (tmp_path / "plain.jsonl").write_text(json.dumps({"q": "the dog", "c": ["dog", "cat"], "y": 1}))
    columns = {"text": ["q"], "choices": ["c"], "label": "y"}
    found = dataset(tmp_path, "multiple-choice", path="c.jsonl", **columns | settings)
    assert found.key == dataset(tmp_path, "multiple-choice", path="plain.jsonl", **columns).key
    assert found.metric(torch.tensor([[0.0, 1.0]])) == {"accuracy": 1.0}


@pytest.mark.parametrize(
    ("row", "settings", "message"),
    [
        ({"options": ["dog"]}, {}, r"row 1, column 'options': the row has 1 choices; give at least 2"),
        ({"options": ["dog", "", "cat"]}, {}, r"row 1, column 'options': choice 2 of 3 is empty"),
        ({"options": 7}, {}, r"the choices are neither a list nor a mapping with the entry 'text'"),
        ({"answer": 2}, {}, r"row 1, column 'answer': label 2 is out of range: the 2 choices count from 0"),
        ({"answer": "0"}, {"first_choice": 1}, r"label 0 is out of range: the 2 choices count from 1"),
        ({"answer": "bird"}, {}, r"label 'bird' is neither the number, nor the name, nor the text of a choice"),
        ({"text": None}, {}, r"row 1, column 'text': the text is missing"),
        ({}, {"blank": "_"}, r"the context has no blank '_' with text behind it"),
        ({}, {"metric": "perplexity"}, r"'perplexity' does not fit .*; choose "),
        ({}, {"choices": None}, r"needs choices|takes one text column"),
        ({}, {"choices": ["none"]}, r"row 1 has no entry 'none'; it has text, options, answer"),
    ],
)
@pytest.mark.parametrize("task", ["text-generation", "multiple-choice"])
def test_mistakes_are_named(
    row: dict[str, Any], settings: dict[str, Any], message: str, task: str, tmp_path: Path
) -> None:
    save_decoder(tmp_path / "model") if task == "text-generation" else save_reader(tmp_path / "model")
    whole = {"text": "the dog", "options": ["runs", "sings"], "answer": 0} | row
    (tmp_path / "c.jsonl").write_text(json.dumps(whole))
    with pytest.raises(DataError, match=message):
        dataset(tmp_path, task, path="c.jsonl", **settings)


def test_settings_that_do_not_belong_together(tmp_path: Path) -> None:
    save_decoder(tmp_path / "model")
    save_table(tmp_path)
    with pytest.raises(ConfigError, match="blank needs choices"):
        RunConfig.from_mapping(section("text-generation", choices=None, blank="_"), str(tmp_path))
    with pytest.raises(ConfigError, match=r"prompt has 2 places \{\} for 1 text columns"):
        RunConfig.from_mapping(section("text-generation", prompt="{}{}"), str(tmp_path))
    values = section("text-generation")
    values["data"]["calibration"]["choices"] = ["options"]
    with pytest.raises(ConfigError, match="choices is for source table, not for source text_file"):
        RunConfig.from_mapping(values, str(tmp_path))
    values["data"]["calibration"] = values["data"]["evaluation"]
    config = RunConfig.from_mapping(values, str(tmp_path))
    model = load_model(config.model, str(tmp_path))
    with pytest.raises(DataError, match="a language model is calibrated on running text"):
        load_dataset(config.data.calibration, "calibration", model, config.model, str(tmp_path), 0)
    long = {"text": "the", "options": ["dog " * 9, "cat"], "answer": 0}
    (tmp_path / "c.jsonl").write_text(json.dumps(long))
    with pytest.raises(DataError, match="row 1, column 'answer': choice 1 has 9 tokens: set max_length higher"):
        dataset(tmp_path, "text-generation", path="c.jsonl", max_length=8)


def test_padding_changes_no_output_of_a_language_model(tmp_path: Path) -> None:
    module = save_decoder(tmp_path / "model")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 20, (2, 20), generator=generator)
    ids[1, 17:] = 0
    mask = (ids > 0).long()
    with torch.no_grad():
        found = sketched_logits(module, {"input_ids": ids, "attention_mask": mask})
        for row, length in enumerate((20, 17)):
            alone = {"input_ids": ids[row : row + 1, :length], "attention_mask": mask[row : row + 1, :length]}
            torch.testing.assert_close(found[row : row + 1], sketched_logits(module, alone), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", READERS)
def test_the_accuracy_is_that_of_one_row_at_a_time(kind: str, tmp_path: Path) -> None:
    module, rows = save_reader(tmp_path / "model", kind), save_table(tmp_path)
    data = dataset(tmp_path, "multiple-choice")
    tokenizer, hits = zoo.tokenizer(), []
    for row in rows:
        pair = tokenizer([row["text"]] * len(row["options"]), row["options"], padding=True, return_tensors="pt")
        taken = {name: value[None] for name, value in pair.items() if name != "token_type_ids" or kind != "ModernBert"}
        with torch.no_grad():
            hits.append(int(module(**taken).logits[0].argmax()) == row["answer"])
    config = RunConfig.from_mapping(section("multiple-choice"), str(tmp_path))
    model = load_model(config.model, str(tmp_path))
    with torch.no_grad():
        outputs = mlorq.models.base.join_outputs([model.outputs(model.module, batch) for batch in data.batches])
    assert outputs.shape == (len(rows), 4), "rows with fewer choices end in zeros"
    assert data.metric(outputs) == {"accuracy": pytest.approx(np.mean(hits))}
    if kind == "Bert":
        pytest.importorskip("torchmetrics", reason="needs the extra metrics")
        named = {"metric": "torchmetrics:Accuracy", "metric_arguments": {"task": "multiclass", "num_classes": 4}}
        other = dataset(tmp_path, "multiple-choice", **named)
        assert other.metric(outputs) == {"Accuracy": pytest.approx(np.mean(hits))}
    lower = outputs - 1e3, outputs.where(outputs != 0, 1e3)
    assert data.metric(lower[0]) == data.metric(lower[1]), "outputs behind the choices do not count"


@pytest.mark.parametrize("kind", READERS)
def test_padding_of_choices_is_no_data(kind: str, tmp_path: Path) -> None:
    save_reader(tmp_path / "model", kind)
    save_table(tmp_path)
    data = dataset(tmp_path, "multiple-choice", "calibration")
    assert [len(part) for part in data.labels] == [len(batch["input_ids"]) for batch in data.batches]
    config = RunConfig.from_mapping(section("multiple-choice"), str(tmp_path))
    model = load_model(config.model, str(tmp_path))
    layers = find_layers(model, data.batches[0]).layers
    linear = [name for name, child in model.module.named_modules() if isinstance(child, torch.nn.Linear)]
    assert {layer.name for layer in layers} == set(linear), "all layers are compressed"
    padded = [{name: F.pad(value, (0, 5)) for name, value in batch.items()} for batch in data.batches]
    given = from_module(model.module)
    found = [capture(one, layers, batches, moments=True) for one, batches in ((model, data.batches), (model, padded))]
    found.append(capture(given, layers, padded, moments=True))
    for one in found[1:]:
        torch.testing.assert_close(one.reference, found[0].reference, rtol=1e-4, atol=1e-5)
        for name, products in one.inputs.items():
            assert products.counts == found[0].inputs[name].counts, name
            torch.testing.assert_close(products.means(), found[0].inputs[name].means(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("task", few(["text-generation", "multiple-choice"], "multiple-choice"))
def test_a_model_is_compressed_measured_and_loaded_alone(task: str, tmp_path: Path) -> None:
    module = save_decoder(tmp_path / "model") if task == "text-generation" else save_reader(tmp_path / "model")
    save_table(tmp_path)
    result = zoo.run(tmp_path, section(task))
    loaded = mlorq.load(result["checkpoint"].removeprefix("file://"))
    assert type(loaded) is type(module)
    data = dataset(tmp_path, task)
    name = "choice_accuracy" if task == "text-generation" else "accuracy"
    assert result["metric"]["name"] == name
    if task == "text-generation":
        assert data.evaluate(loaded)[name] == result["metric"]["compressed"]
    with torch.no_grad():
        wanted, found = (one(**data.batches[0]).logits for one in (module, loaded))
    assert 0 < float((found - wanted).square().sum() / wanted.square().sum()) < 0.1


@pytest.mark.long
def test_graphs_of_multiple_choice(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime", reason="needs the extra onnx")
    module = save_reader(tmp_path / "model")
    save_table(tmp_path)
    result = zoo.run(tmp_path, section("multiple-choice", batch_size=4))
    checkpoint = result["checkpoint"].removeprefix("file://")
    file, *_ = mlorq.export(checkpoint, tmp_path / "model.onnx")
    graph, loaded = mlorq.load(file, runtime="onnxruntime"), mlorq.load(checkpoint)
    assert type(loaded) is type(module)
    for batch in dataset(tmp_path, "multiple-choice").batches[:4]:  # other numbers of choices than the example's
        with torch.no_grad():
            torch.testing.assert_close(graph(**batch).logits, loaded(**batch).logits, rtol=1e-4, atol=1e-4)
