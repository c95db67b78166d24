"""Images in Parquet shards as the hub has them, explicit lists of samples, and decoding ahead."""

from __future__ import annotations

import threading
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml

from mlorq.config.run import RunConfig
from mlorq.config.sections import model_section, source_section
from mlorq.data import Dataset, load_dataset
from mlorq.data.images import ImageBatches
from mlorq.errors import ConfigError, DataError
from tests import zoo
from tests.nets import TokenNet, float_model

ModelConfig = model_section()

ANY_MODEL = float_model(TokenNet())
VIT_CONFIG = ModelConfig(family="timm", name=zoo.VIT, arguments=zoo.VIT_ARGUMENTS, checkpoint="unused")
SPLITS = {"train": (6, 5), "validation": (4,), "test": (2,)}  # rows of each shard


def load(place: Path | str, role: str = "calibration", seed: int = 0, **values) -> Dataset:
    source = source_section()(**{"source": "image_parquet", "path": "hub", **values})
    return load_dataset(source, role, ANY_MODEL, VIT_CONFIG, str(place), seed)


def refusal(*arguments, **values) -> str:
    with pytest.raises(DataError) as caught:
        load(*arguments, **values)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def image_table(files: list[Path], labels: list[int | None], **columns) -> pa.Table:
    rows = [{"bytes": file.read_bytes(), "path": file.name} for file in files]
    return pa.table({"image": rows, "label": pa.array(labels, pa.int64()), **columns})


@pytest.fixture
def place(tmp_path) -> Path:
    """A data set in the hub's layout, and the same images in folders with a table of labels."""
    table = ["file\tlabel\tsplit"]
    number = 0
    (tmp_path / "hub" / "data").mkdir(parents=True)
    for split, shards in SPLITS.items():
        for shard, rows in enumerate(shards):
            files = [tmp_path / "images" / f"{number + row:02d}.png" for row in range(rows)]
            labels = [-1 if split == "test" else (number + row) % 7 for row in range(rows)]
            for row, file in enumerate(files):
                zoo.save_image(file, number + row, size=40)
                table.append(f"{file.name}\t{labels[row]}\t{split}")
            name = f"{split}-{shard:05d}-of-{len(shards):05d}.parquet"
            extra = {"caption": ["a text"] * rows}
            pq.write_table(image_table(files, labels, **extra), tmp_path / "hub" / "data" / name, row_group_size=2)
            number += rows
    (tmp_path / "labels.tsv").write_text("\n".join(table) + "\n")
    return tmp_path


def folder_of_the_same(place: Path, **values) -> Dataset:
    return load(place, source="image_folder", path=None, root="images", labels="labels.tsv", **values)


def test_shards_give_what_a_folder_of_the_images_gives(place):
    shards = load(place, split="train", batch_size=4)
    images = folder_of_the_same(place, split="train", batch_size=4)
    assert shards.samples == 11
    assert [len(batch) for batch in shards.batches] == [4, 4, 3]
    assert all(torch.equal(a, b) for a, b in zip(shards.batches, images.batches, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(shards.labels, images.labels, strict=True))
    found = load(place, "evaluation", split="validation")
    outputs = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
    assert found.metric(outputs) == folder_of_the_same(place, role="evaluation", split="validation").metric(outputs)
    assert found.metric_name == "accuracy"
    assert set(found.metric(outputs)) == {"accuracy", "top5"}


def test_a_file_a_folder_a_glob_and_a_url_are_the_same(place):
    key = load(place, split="validation").key
    assert load(place, path="hub/data/validation-00000-of-00001.parquet").key == key
    assert load(place, path="hub/data/valid*.parquet").key == key
    assert load(place, path="hub/data", split="validation").key == key
    train = load(place, split="train")
    assert load(place, path="hub/*/train-*.parquet").key == train.key
    memory = fsspec.filesystem("memory")
    for file in (place / "hub" / "data").iterdir():
        memory.pipe_file(f"/zoo-shards/{file.name}", file.read_bytes())
    assert load(place, path="memory://zoo-shards", split="train").key == train.key
    assert load(place, path="memory://zoo-shards/train-*", split="train").key == train.key
    (place / "by_folder" / "validation").mkdir(parents=True)
    source = place / "hub" / "data" / "validation-00000-of-00001.parquet"
    (place / "by_folder" / "validation" / "part-0.parquet").write_bytes(source.read_bytes())
    assert load(place, path="by_folder", split="validation").key == key


def test_only_row_groups_of_chosen_rows_are_read(place, monkeypatch):
    read: list[tuple[int, tuple[str, ...]]] = []
    real = pq.ParquetFile.read_row_group

    def watched(self, group, columns=None, **values):
        read.append((group, tuple(columns)))
        return real(self, group, columns=columns, **values)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", watched)
    (place / "list.txt").write_text("11\n2\n")  # the last group of the second shard, the first one of the first
    data = load(place, split="train", list="list.txt")
    assert sorted(read) == [(0, ("image.bytes", "label")), (2, ("image.bytes", "label"))]
    everything = load(place, split="train", batch_size=11).batches[0]
    assert torch.equal(data.batches[0], everything[[10, 1]]), "in the list's order"


def test_samples_are_a_seeded_choice_of_rows(place):
    def chosen(seed: int) -> torch.Tensor:
        data = load(place, split="train", samples=5, seed=seed)
        assert data.samples == 5
        return data.batches[0]

    assert torch.equal(chosen(1), chosen(1))
    assert len({load(place, split="train", samples=5, seed=seed).key for seed in range(6)}) > 3
    everything = load(place, split="train", batch_size=11).batches[0]
    rows = [next(i for i, image in enumerate(everything) if torch.equal(image, one)) for one in chosen(3)]
    assert rows == sorted(set(rows))
    assert "there are only 11" in refusal(place, split="train", samples=12)


def test_keys_follow_content(place):
    first = load(place, split="train")
    assert load(place, split="train", batch_size=3).key != first.key
    file = place / "hub" / "data" / "train-00001-of-00002.parquet"
    table = pq.read_table(file)
    pq.write_table(table, file, row_group_size=5, compression="zstd")
    assert load(place, split="train").key == first.key, "how it is stored is no content"
    labels = table["label"].to_pylist()
    labels[0] = (labels[0] + 1) % 7
    pq.write_table(table.set_column(1, "label", pa.array(labels)), file)
    assert load(place, split="train").key != first.key


def test_columns_of_other_names_kinds_and_no_labels(place):
    table = pq.read_table(place / "hub" / "data" / "validation-00000-of-00001.parquet")
    encoded = [row["bytes"] for row in table["image"].to_pylist()]
    other = pa.table({"jpg": pa.array(encoded, pa.binary()), "class": table["label"].cast(pa.int16())})
    pq.write_table(other, place / "other.parquet")
    wanted = load(place, split="validation")
    assert load(place, path="other.parquet", image="jpg", label="class").key == wanted.key
    bare = load(place, "evaluation", path="other.parquet", image="jpg")
    assert bare.metric is None
    assert torch.equal(bare.batches[0], wanted.batches[0])
    hidden = load(place, split="test")
    assert hidden.labels is None, "-1 stands for a label that is kept secret"
    message = refusal(place, "evaluation", split="test")
    assert "test-00000-of-00001.parquet, row 1" in message
    assert "-1" in message


@pytest.mark.parametrize(
    ("change", "values", "named"),
    [
        ({}, {"image": "img"}, ["'img'", "image, label"]),
        ({}, {"label": "class"}, ["'class'", "image, label"]),
        ({"label": ["a", "b"]}, {}, ["'label'", "string", "instead of class numbers"]),
        ({"label": [1, None]}, {}, ["row 2", "label is missing"]),
        ({"image": ["a.png", "b.png"]}, {}, ["'image'", "string"]),
        ({"image": [{"path": "a.png"}] * 2}, {}, ["'image'", "'bytes'"]),
        ({"image": [{"bytes": b"", "path": "a"}, {"bytes": None, "path": "b.png"}]}, {}, ["row 2", "no bytes"]),
    ],
)
def test_shards_at_fault_are_named(place, change, values, named):
    table = pq.read_table(place / "hub" / "data" / "test-00000-of-00001.parquet", columns=["image", "label"])
    for name, column in change.items():
        table = table.set_column(table.column_names.index(name), name, pa.array(column))
    pq.write_table(table, place / "bad.parquet")
    message = refusal(place, path="bad.parquet", **values)
    assert all(part in message for part in ["bad.parquet", *named]), message


def test_places_at_fault_are_named(place):
    assert "gone does not exist" in refusal(place, path="gone")
    (place / "empty").mkdir()
    assert "empty has no Parquet files" in refusal(place, path="empty")
    assert "no Parquet files" in refusal(place, path="hub/data/x*.parquet")
    message = refusal(place, split="dev")
    assert "'dev'" in message
    assert "test, train, validation" in message
    (place / "noise.parquet").write_bytes(b"PAR1 no")
    assert "noise.parquet is not a Parquet file" in refusal(place, path="noise.parquet")
    broken = pa.table({"image": [{"bytes": b"no picture", "path": None}] * 2, "label": [0, 1]})
    pq.write_table(broken, place / "broken.parquet")
    data = load(place, path="broken.parquet")
    with pytest.raises(DataError, match=r"broken\.parquet, row 1 cannot be decoded"):
        data.batches[0]
    assert "accuracy" in refusal(place, "evaluation", split="validation", metric="f1")


# -- lists --------------------------------------------------------------------------------------------------


def test_lists_name_the_samples_of_folders_and_shards(place):
    (place / "names.txt").write_text("\n07.png\n  00.png \n03.png\n")
    (place / "rows.txt").write_text("8\r\n1\r\n4\r\n")
    (place / "csv.txt").write_text("\ufeff07.png\n00.png\n03.png")
    images = folder_of_the_same(place, split="train", list="names.txt")
    everything = load(place, split="train", batch_size=11)
    assert images.samples == 3
    assert torch.equal(images.batches[0], everything.batches[0][[7, 0, 3]])
    assert torch.equal(images.labels[0], everything.labels[0][[7, 0, 3]])
    assert folder_of_the_same(place, list="names.txt").key == images.key
    assert folder_of_the_same(place, list="csv.txt").key == images.key
    by_name, by_row = (load(place, split="train", list=name) for name in ("names.txt", "rows.txt"))
    assert by_name.key == by_row.key
    assert torch.equal(by_name.batches[0], images.batches[0])
    found = load(place, "evaluation", split="train", list="rows.txt")
    assert found.metric(torch.eye(7)[[0, 0, 3]])["accuracy"] == 1.0
    assert folder_of_the_same(place, list="names.txt", seed=1).key == images.key


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ("00.png\n12.png\n99.png\n", ["'12.png'", "train"]),  # of another split
        ("", ["empty"]),
        ("00.png\n01.png\n00.png\n", ["'00.png' twice"]),
        ("0\n1\n", ["'0'"]),
        ("11\n12\n", ["'12'"]),
        (b"\xff\xfe\x00", ["cannot be read"]),
        (None, ["does not exist"]),
    ],
)
def test_lists_at_fault_are_named(place, content, named):
    if content is not None:
        (place / "list.txt").write_bytes(content if isinstance(content, bytes) else content.encode())
    message = refusal(place, split="train", list="list.txt")
    assert all(part in message for part in ["list.txt", *named]), message
    if content is None or "png" in str(content):
        with pytest.raises(DataError) as caught:
            folder_of_the_same(place, split="train", list="list.txt")
        assert all(part in str(caught.value) for part in ["list.txt", *named])


def test_names_that_several_rows_have_are_refused(place):
    files = [place / "images" / "00.png"] * 2
    pq.write_table(image_table(files, [0, 1]), place / "same.parquet")
    (place / "list.txt").write_text("00.png\n")
    assert "row numbers" in refusal(place, path="same.parquet", list="list.txt")


def test_lists_in_configurations():
    values = {
        "model": {"family": "timm", "name": zoo.VIT, "checkpoint": "w.safetensors"},
        "data": {
            "calibration": {"source": "image_parquet", "path": "data", "list": "rows.txt"},
            "evaluation": {"source": "image_folder", "root": "images"},
        },
    }
    config = RunConfig.from_mapping(values)
    assert config.data.calibration.list == "rows.txt"
    assert RunConfig.from_mapping(yaml.safe_load(config.to_yaml())) == config

    def refused(**source) -> str:
        with pytest.raises(ConfigError) as caught:
            RunConfig.from_mapping({**values, "data": {**values["data"], "evaluation": source}})
        return str(caught.value)

    assert "samples and list" in refused(source="image_folder", root="images", list="a.txt", samples=3)
    readers = "image_folder, image_parquet, captions, table, audio, glue"
    for values_of in ({"source": "custom", "factory": "a:b"}, {"source": "coco", "root": "a", "annotations": "b"}):
        wanted = f"list is for source {readers}, not for source {values_of['source']}"
        assert wanted in refused(**values_of, list="a.txt")
    assert "image_parquet needs path" in refused(source="image_parquet")
    assert "label 1 is a number: give the name" in refused(source="image_parquet", path="data", label=1)
    assert "glue needs task" in refused(source="glue")
    assert "'sst3'" in refused(source="glue", task="sst3")


# -- decoding -----------------------------------------------------------------------------------------------


def test_pixels_are_kept_as_bytes_and_decoded_once(place, monkeypatch):
    import mlorq.data.images as module

    decoded: list[str] = []
    real = module.decode

    def counted(image, *rest):
        decoded.append(image.name)
        return real(image, *rest)

    monkeypatch.setattr(module, "decode", counted)
    data = load(place, split="train", batch_size=4)
    assert decoded == [], "a run that reuses everything decodes nothing"
    first = [batch.clone() for batch in data.batches]
    again = list(data.batches)
    assert sorted(decoded) == sorted(set(decoded))
    assert len(decoded) == 11
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert isinstance(data.batches, ImageBatches)
    assert {kept.dtype for kept in data.batches._kept.values()} == {torch.uint8}
    assert torch.equal(data.batches[-1], first[2])
    assert [len(batch) for batch in data.batches[1:]] == [4, 3]
    with pytest.raises(IndexError):
        data.batches[3]


def test_the_next_batch_is_decoded_ahead(place, monkeypatch):
    import mlorq.data.images as module

    done = threading.Condition()
    names: list[str] = []
    real = module.decode

    def watched(image, *rest):
        result = real(image, *rest)
        with done:
            names.append(image.name)
            done.notify_all()
        return result

    monkeypatch.setattr(module, "decode", watched)
    data = load(place, split="train", batch_size=3)
    data.batches[0]
    with done:
        assert done.wait_for(lambda: len(names) == 6, 20), "batch 1 is decoded though nobody has asked for it"
        assert not done.wait_for(lambda: len(names) > 6, 0.2)
    threads = [threading.Thread(target=lambda: list(data.batches)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(names) == sorted(set(names))


def test_normalisation_is_timms_bit_for_bit(place):
    import timm.data
    from PIL import Image

    from mlorq.models.timm import preprocessing

    for arguments in (zoo.VIT_ARGUMENTS, {**zoo.VIT_ARGUMENTS, "in_chans": 1}, {**zoo.VIT_ARGUMENTS, "img_size": 24}):
        config = VIT_CONFIG.model_copy(update={"name": zoo.SWIN if "in_chans" in arguments else zoo.VIT})
        config = config.model_copy(update={"arguments": arguments})
        described = preprocessing(config)
        names = ("input_size", "interpolation", "mean", "std", "crop_pct")
        transform = timm.data.create_transform(**{name: described[name] for name in names}, is_training=False)
        source = source_section()(source="image_folder", root="images")
        data = load_dataset(source, "calibration", ANY_MODEL, config, str(place), 0)
        mode = "L" if described["input_size"][0] == 1 else "RGB"
        wanted = [transform(Image.open(file).convert(mode)) for file in sorted((place / "images").iterdir())]
        assert torch.equal(torch.cat(list(data.batches)), torch.stack(wanted))
