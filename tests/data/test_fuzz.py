"""Damaged and hostile data files: finite data, or one line of ``DataError`` that names the file, when it is loaded.

Images are decoded with the batch that needs them (the first step of a run needs all of the evaluation data); everything
else is read, and refused, by ``load_dataset``.
"""

from __future__ import annotations

import copy
import csv
import io
import json
import shutil
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from PIL import Image

from mlorq.config.sections import model_section, source_section
from mlorq.data import Dataset, load_dataset
from mlorq.data.average_precision import average_precisions
from mlorq.data.columns import read_columns
from mlorq.data.depth_maps import DepthMaps
from mlorq.data.label_maps import LabelMaps
from mlorq.data.recordings import decoded_recording
from mlorq.data.text_file import _texts
from mlorq.errors import DataError
from tests import detectors, zoo
from tests.data.test_recordings import tone, wav
from tests.fuzzing import HOSTILE, changed, counts, damage, fuzz, one_line
from tests.models.test_detection import config as detector_config
from tests.nets import TokenNet, float_model

ANY_MODEL = float_model(TokenNet())
VIT = model_section()(family="timm", name=zoo.VIT, arguments=zoo.VIT_ARGUMENTS, checkpoint="unused")
CLASSES = 7
TEXTS = ["the dog runs", "a cat sleeps, on the mat", 'the "bird"\tsings', "dogs", "a slow cat", "the red bird"]
FORMATS = {"png": "PNG", "jpg": "JPEG", "gif": "GIF", "bmp": "BMP", "tif": "TIFF", "webp": "WEBP", "ppm": "PPM"}


@dataclass
class Case:
    """Files that a source reads.

    Attributes:
        files: those that are damaged.
        load: loads and reads everything.
        named: what errors have besides the names of the damaged files: those of files that these name.
    """

    files: list[Path]
    load: Callable[[], Any]
    named: tuple[str, ...] = ()
    values: Any = field(default=None)


def whole(data: Dataset, classes: int = CLASSES) -> list[Any]:
    """All values of a data set, which must be finite and as many as it says."""
    batches = list(data.batches)
    values = [value for batch in batches for value in ([batch] if isinstance(batch, torch.Tensor) else batch.values())]
    assert all(torch.isfinite(value.float()).all() for value in values if isinstance(value, torch.Tensor))
    figures = {}
    if data.label_check is not None:
        data.label_check.check(classes)
    if data.metric is not None:
        figures = data.metric(torch.zeros(data.samples, classes))
        assert all(np.isfinite(value) for value in figures.values())
    return [data.samples, data.key, *values, *figures.values()]


def source(folder: Path, model: Any, role: str = "evaluation", **values: Any) -> Dataset:
    return load_dataset(source_section()(**values), role, ANY_MODEL, model, str(folder), 0)  # type: ignore[arg-type]


def pictures(folder: Path) -> list[Path]:
    files = []
    (folder / "images").mkdir()
    for index, (suffix, kind) in enumerate(FORMATS.items()):
        zoo.save_image(folder / f"{index}.png", index, size=24)
        files.append(folder / "images" / f"{index}.{suffix}")
        Image.open(folder / f"{index}.png").save(files[-1], format=kind)
    return files


def image_folder(folder: Path) -> Case:
    files = pictures(folder)
    lines = ["file\tlabel", *(f"{file.name}\t{index % CLASSES}" for index, file in enumerate(files))]
    (folder / "labels.tsv").write_text("\n".join(lines))
    (folder / "list.txt").write_text("\n".join(file.name for file in files[::2]))

    def load() -> Any:
        every = source(folder, VIT, source="image_folder", root="images", labels="labels.tsv", batch_size=2)
        some = source(folder, VIT, source="image_folder", root="images", labels="labels.tsv", list="list.txt")
        return whole(every) + whole(some)

    return Case([*files, folder / "labels.tsv", folder / "list.txt"], load, named=("list.txt", "/images/"))


def image_parquet(folder: Path) -> Case:
    contents = [{"bytes": file.read_bytes(), "path": file.name} for file in pictures(folder)]
    (folder / "hub").mkdir()
    for shard, rows in enumerate((contents[:3], contents[3:])):
        table = pa.table({"image": rows, "label": list(range(len(rows))), "note": ["text"] * len(rows)})
        pq.write_table(table, folder / "hub" / f"test-{shard}.parquet", row_group_size=2, compression="zstd")
    (folder / "list.txt").write_text("2\n0.png\n7\n")

    def load() -> Any:
        every = source(folder, VIT, source="image_parquet", path="hub/*.parquet", batch_size=3)
        return whole(every) + whole(source(folder, VIT, source="image_parquet", path="hub", list="list.txt"))

    return Case([*sorted((folder / "hub").iterdir()), folder / "list.txt"], load, named=("test-", "list.txt", "hub"))


def tables(folder: Path) -> Case:
    zoo.save_text_model(folder / "model", "bert-classifier", seed=2)
    model = model_section()(family="transformers", name=str(folder / "model"), task="text-classification")
    rows = {"text": TEXTS, "label": [0, 1, 1, 0, 1, 0]}
    for suffix, kind in (("csv", "excel"), ("tsv", "excel-tab")):
        with (folder / f"t.{suffix}").open("w", newline="") as file:
            quoting = csv.QUOTE_MINIMAL if suffix == "csv" else csv.QUOTE_NONE
            writer = csv.writer(file, kind, quoting=quoting, quotechar=None if suffix == "tsv" else '"')
            texts = [text.replace("\t", " ") if suffix == "tsv" else text for text in TEXTS]
            writer.writerows([list(rows), *zip(texts, rows["label"], strict=True)])
    lines = [json.dumps({"text": text, "label": label}) for text, label in zip(*rows.values(), strict=True)]
    (folder / "t.jsonl").write_text("\n".join(lines))
    pq.write_table(pa.table(rows), folder / "t.parquet")
    files = [folder / f"t.{suffix}" for suffix in ("csv", "tsv", "jsonl", "parquet")]

    def load() -> Any:
        found = []
        for file in files:
            data = source(folder, model, source="table", path=file.name, text=["text"], label="label", batch_size=4)
            found += whole(data, 2)
            columns, numbers = read_columns(str(file), ["label"])
            assert len(columns["label"]) == len(numbers)
        return found

    return Case(files, load)


def coco(folder: Path) -> Case:
    safetensors.torch.save_file(detectors.mask_rcnn(3).state_dict(), folder / "weights.safetensors")
    rows = detectors.write_coco(folder)
    crowd = copy.deepcopy(rows["annotations"][0])
    size = [rows["images"][0]["height"], rows["images"][0]["width"]]
    crowd |= {"id": 99, "iscrowd": 1, "segmentation": {"size": size, "counts": [100, 50, size[0] * size[1] - 150]}}
    rows["annotations"].append(crowd)
    (folder / "instances.json").write_text(json.dumps(rows))

    def load() -> Any:
        data = source(
            folder, detector_config(), source="coco", root="images", annotations="instances.json", batch_size=2
        )
        # Whatever the metric would say after the search, it says at once.
        truth = data.evaluate.truth  # type: ignore[union-attr]
        box = {"category_id": truth["categories"][0]["id"], "score": 0.5, "bbox": [1.0, 1.0, 5.0, 5.0]}
        images = [row["id"] for row in truth["images"]]
        mask = {"segmentation": {"size": size, "counts": "0d1"}}
        found = [{**box, "image_id": image} for image in images]
        figures = average_precisions(truth, found, images, masks=False)
        with_masks = average_precisions(truth, [{**found[0], **mask}], images, masks=True)
        assert all(0 <= value <= 1 for value in (figures | with_masks).values())
        return whole(data)

    return Case(
        [folder / "instances.json", *sorted((folder / "images").iterdir())[:2]], load, ("/images/", ".png is"), rows
    )


def recordings(folder: Path) -> Case:
    contents = {
        "a.wav": wav(tone(0.05, 8000), 8000),
        "b.wav": wav(tone(0.05, 16000), 16000, 3),
        "c.wav": wav(np.stack([tone(0.02, 16000)] * 2, axis=1), 16000, 4),
    }
    soundfile = pytest.importorskip("soundfile")
    for name in ("d.flac", "e.ogg"):
        soundfile.write(folder / name, tone(0.05, 16000), 16000)
        contents[name] = (folder / name).read_bytes()
    for name, data in contents.items():
        (folder / name).write_bytes(data)

    def load() -> Any:
        found = [decoded_recording((folder / name).read_bytes(), name, 16000) for name in contents]
        assert all(values.dtype == np.float32 and np.isfinite(values).all() for values in found)
        return found

    return Case([folder / name for name in contents], load)


def maps(folder: Path) -> Case:
    values = np.arange(24, dtype=np.uint8).reshape(4, 6) + 1
    Image.fromarray(values).save(folder / "grey.png")
    Image.fromarray(values % 5).convert("P").save(folder / "palette.png")
    Image.fromarray(values.astype(np.uint16) * 300).save(folder / "deep.png")
    np.save(folder / "depth.npy", values.astype(np.float32) / 3)
    (folder / "text.txt").write_text("running text\n" * 20 + "é\n", encoding="utf-8")
    files = [folder / name for name in ("grey.png", "palette.png", "deep.png", "depth.npy", "text.txt")]

    def load() -> Any:
        data = [file.read_bytes() for file in files]
        names = [file.name for file in files]
        found: list[Any] = [LabelMaps(names[:2], data[:2], 255, True).classes(index) for index in range(2)]
        found += [DepthMaps(names[2:4], data[2:4], 10.0).depths(index) for index in range(2)]
        assert all(np.isfinite(each).all() and each.ndim == 2 for each in found)
        return [*found, *_texts(str(folder / "text.txt"))]

    return Case(files, load)


CASES = {one.__name__: one for one in (image_folder, image_parquet, tables, coco, recordings, maps)}


def equal(left: Any, right: Any) -> bool:
    if isinstance(left, list):
        return len(left) == len(right) and all(map(equal, left, right))
    if isinstance(left, torch.Tensor):
        return torch.equal(left, right)
    return bool(np.array_equal(left, right)) if isinstance(left, np.ndarray) else bool(left == right)


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    torch.set_num_threads(1)
    return CASES[request.param](tmp_path_factory.mktemp(request.param))


def told(error: DataError, names: tuple[str, ...]) -> None:
    """Check that an error is one line with one of the names of files."""
    one_line(error)
    assert any(name in str(error) for name in names), error


def outcome(case: Case, touched: list[Path], found: Counter[str]) -> None:
    """Check what becomes of damaged files."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            first = case.load()
            again = case.load()
        assert equal(first, again)
        found["read"] += 1
    except DataError as error:
        told(error, (*case.named, *(path.name for path in touched)))
        found["refused"] += 1


@counts(12, 600)
def test_damaged_files(case: Case, count: int) -> None:
    contents = {path: path.read_bytes() for path in case.files}
    wanted = case.load()
    found: Counter[str] = Counter()

    @fuzz(count)
    @given(st.data())
    def check(data: st.DataObject) -> None:
        path = data.draw(st.sampled_from(case.files))
        kind = data.draw(st.sampled_from(["damage"] * 6 + ["other", "remove", "folder"]))
        if kind == "damage":
            new = data.draw(damage(contents[path]))
            assume(new != contents[path])
            path.write_bytes(new)
        elif kind == "other":
            path.write_bytes(contents[data.draw(st.sampled_from(case.files))])
        else:
            path.unlink()
            if kind == "folder":
                path.mkdir()
        try:
            if path.is_file() or case.files[0].suffix not in (".wav", ".png") or path.suffix == ".json":
                outcome(case, [path], found)
        finally:
            if path.is_dir():
                shutil.rmtree(path)
            path.write_bytes(contents[path])

    try:
        check()
    finally:
        for path, content in contents.items():
            path.write_bytes(content)
    print(dict(found))
    assert found["refused"] > count // 5
    assert equal(case.load(), wanted)


# -- hostile values ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def annotations(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return coco(tmp_path_factory.mktemp("annotations"))


@counts(20, 1000)
def test_changed_annotations(annotations: Case, count: int) -> None:
    path, found = annotations.files[0], Counter[str]()
    content = path.read_bytes()

    @fuzz(count)
    @given(changed(annotations.values, 3))
    def check(values: Any) -> None:
        try:
            path.write_text(json.dumps(values))
        except ValueError:  # a number of more digits than Python writes
            return
        outcome(annotations, [path], found)

    try:
        check()
    finally:
        path.write_bytes(content)
    print(dict(found))
    assert found["refused"] > count // 3


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return tables(tmp_path_factory.mktemp("texts"))


@counts(15, 1000)
def test_hostile_cells_of_tables(texts: Case, count: int) -> None:
    """Cells of every type, in JSON lines and in columns of Parquet."""
    lines, parquet = texts.files[2], texts.files[3]
    contents, found = {path: path.read_bytes() for path in (lines, parquet)}, Counter[str]()
    cells = st.sampled_from(HOSTILE)

    @fuzz(count)
    @given(st.lists(st.tuples(cells, cells), min_size=1, max_size=3), st.booleans())
    def check(rows: list[tuple[Any, Any]], columns: bool) -> None:
        path = parquet if columns else lines
        try:
            if columns:
                names = ("text", "label")
                pq.write_table(pa.table({name: [row[at] for row in rows] for at, name in enumerate(names)}), parquet)
            else:
                lines.write_text("\n".join(json.dumps({"text": text, "label": label}) for text, label in rows))
        except (ValueError, TypeError, OverflowError, NotImplementedError):  # a mixture that the format does not hold
            path.write_bytes(contents[path])
            return
        outcome(texts, [path], found)
        path.write_bytes(contents[path])

    check()
    print(dict(found))
    assert found["refused"] > count // 5


def png(width: int, height: int) -> bytes:
    """A black image, whose data is a thousandth of its pixels."""
    buffer = io.BytesIO()
    Image.new("1", (width, height)).save(buffer, format="PNG", optimize=True)
    return buffer.getvalue()


@pytest.mark.parametrize(("width", "height"), [(20_000, 20_000), (1, 60_000), (60_000, 1)])
def test_images_that_would_take_all_memory(tmp_path: Path, width: int, height: int) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "bomb.png").write_bytes(png(width, height))
    data = source(tmp_path, VIT, source="image_folder", root="images")
    with pytest.raises(DataError, match=r"image .*bomb\.png") as caught:
        list(data.batches)
    one_line(caught.value)


@pytest.mark.parametrize("rate", [0, 1, 999, 2**31 - 1, 2**32 - 1])
def test_sampling_rates_that_would_take_all_memory(rate: int) -> None:
    data = bytearray(wav(tone(0.01, 8000), 8000, 1))
    at = data.index(b"fmt ") + 12
    data[at : at + 8] = rate.to_bytes(4, "little") * 2  # the second one is the number of bytes per second
    with pytest.raises(DataError, match=r"recording x\.wav cannot be read: its sampling rate") as caught:
        decoded_recording(bytes(data), "x.wav", 16000)
    one_line(caught.value)
