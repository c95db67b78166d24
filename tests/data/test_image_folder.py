"""Classes of image folders and their tables of labels: torchvision's numbers, or one line; never other labels."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest
from PIL import Image

from mlorq.config.sections import model_section, source_section
from mlorq.data import load_dataset
from mlorq.errors import DataError
from tests import zoo
from tests.nets import TokenNet, float_model

VIT = model_section()(family="timm", name=zoo.VIT, arguments=zoo.VIT_ARGUMENTS, checkpoint="unused")


def labels(root: Path | str, **values) -> list[int] | None:
    """The labels of a folder's images as evaluation data; None without a metric."""
    source = source_section()(source="image_folder", root=str(root), **values)
    found = load_dataset(source, "evaluation", float_model(TokenNet()), VIT, "", 0)
    return None if found.label_check is None else found.label_check.values.tolist()


def refusal(root: Path, **values) -> str:
    with pytest.raises(DataError) as caught:
        labels(root, **values)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def save(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(root / name, format="PNG")
    return root


def test_classes_are_numbered_as_torchvision_does(tmp_path):
    datasets = pytest.importorskip("torchvision.datasets")
    save(tmp_path, "b/2.png", "b/deep/er/1.png", "a/x.JPG", "a/y.webp", "c/1.bmp", "C/1.png")
    assert labels(tmp_path) == [label for _, label in sorted(datasets.ImageFolder(tmp_path).samples)]


def test_hidden_files_and_folders_do_not_count(tmp_path):
    save(tmp_path, "cat/1.png", "dog/1.png", ".thumbs/1.png", "cat/.trash/9.png")
    for name in ("cat/._1.png", "dog/.DS_Store", "._dog"):
        (tmp_path / name).write_bytes(b"made by the system")
    assert labels(tmp_path) == [0, 1]


@pytest.mark.parametrize("content", [{}, {"notes.txt": "no image"}, {".gitkeep": ""}])
def test_a_class_without_images_keeps_its_number(tmp_path, content):
    save(tmp_path, "ant/1.png", "cow/1.png")
    (tmp_path / "bee").mkdir()
    for name, text in content.items():
        (tmp_path / "bee" / name).write_text(text)
    with pytest.warns(UserWarning, match="no images in 'bee'"):
        assert labels(tmp_path) == [0, 2]


@pytest.mark.parametrize("suffix", [".avif", ".jfif", ".jp2", ".pgm", ".TGA"])
def test_images_of_all_usual_kinds_are_found(tmp_path, suffix):
    save(tmp_path, "ant/1.png", f"bee/1{suffix}", "cow/1.png")
    assert labels(tmp_path) == [0, 1, 2]


def test_images_that_cannot_be_read_are_named(tmp_path):
    save(tmp_path, "ant/1.png", "bee/1.png", "bee/2.HEIC")
    assert "bee/2.HEIC" in refusal(tmp_path)


def test_images_beside_the_classes_are_left_out_with_a_warning(tmp_path):
    save(tmp_path, "cat/1.png", "dog/1.png", "overview.png")
    with pytest.warns(UserWarning, match=r"'overview\.png'"):
        assert labels(tmp_path) == [0, 1]
    save(tmp_path, "1.png", "2.png")
    assert "3 images beside 2 folders with 2" in refusal(tmp_path)


def test_folders_of_splits_and_folders_one_level_too_high_are_refused(tmp_path):
    save(tmp_path, "a/train/cat/1.png", "a/val/cat/1.png", "b/images/cat/1.png", "b/images/dog/1.png")
    assert "splits train, val" in refusal(tmp_path / "a")
    assert "'images'" in refusal(tmp_path / "b")
    assert labels(tmp_path / "b" / "images") == [0, 1]


def test_linked_folders_are_classes(tmp_path):
    save(tmp_path, "elsewhere/1.png", "images/dog/1.png")
    (tmp_path / "images" / "cat").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "images" / "dog" / "above").symlink_to(tmp_path / "images")
    assert labels(tmp_path / "images") == [0, 1]


def test_remote_folders_have_the_same_classes(tmp_path):
    save(tmp_path, "cat/1.png", "dog/1.png", "dog/sub/2.png", ".hidden/1.png")
    memory = fsspec.filesystem("memory")
    for file in tmp_path.rglob("*.png"):
        memory.pipe_file(f"/classes/{file.relative_to(tmp_path)}", file.read_bytes())
    assert labels("memory://classes") == labels(tmp_path) == [0, 1, 1]


@pytest.mark.parametrize(
    ("rows", "named"),
    [
        ("label\tfile\n1\n", ["row 2", "file"]),
        ("label\tfile\n1\t\n", ["row 2", "file"]),
        ("file\tlabel\n1.png\t\n", ["row 2", "label"]),
        ("file\tlabel\n\n1.png\n", ["row 3", "label"]),
        ('file\tlabel\n"1.png\t0\n1.png\t1\n', ["row 2", "quotation mark"]),
        ("file\tlabel\n1.png\t0\n1.png\t1\n", ["row 3", "'1.png'", "row 2"]),
    ],
)
def test_rows_at_fault_are_named(tmp_path, rows, named):
    save(tmp_path, "1.png")
    (tmp_path / "table.tsv").write_text(rows)
    message = refusal(tmp_path, labels=str(tmp_path / "table.tsv"))
    assert all(part in message for part in ["table.tsv", *named]), message


def test_a_row_without_its_split_is_named(tmp_path):
    save(tmp_path, "1.png", "2.png")
    (tmp_path / "table.tsv").write_text("file\tlabel\tsplit\n1.png\t0\ta\n2.png\t1\n")
    assert "row 3: the split is missing" in refusal(tmp_path, labels=str(tmp_path / "table.tsv"), split="a")
