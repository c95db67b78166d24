"""What the pages start from: small models and data under the names that they use.

A scenario fills the working directory of a page, and gives names for its Python, replacements in its text, and commands
that stand for those with a placeholder. Everything else is run as it is written.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from tests import detectors, zoo
from tests.docs.pages import ROOT

# Few candidates, no training: that all goes together, not how well.
CHEAP = {
    "preset": "quick",
    "search": zoo.FAST | {"bits": [2, 8]},
    "rounding": {"method": "nearest"},
    "engine": {"devices": "cpu", "threads": 1},
}
SHORT = {"speed.json": "speed.json --turns 1 --seconds 0.1 --batch 1"}  # of `mlorq benchmark`
TABLE = {"source": "table", "path": "pairs.csv", "text": ["first", "second"], "batch_size": 4}
ENCODER = {
    "model": {"family": "transformers", "name": "encoder/", "task": "sentence-similarity"},
    "data": {"calibration": TABLE | {"samples": 6}, "evaluation": TABLE | {"label": "score"}},
    "budget": "6bit",
    "search": zoo.QUICK,
    "preset": "quick",
    "rounding": {"method": "nearest"},
    "engine": {"devices": "cpu", "threads": 1},
}


@dataclass
class Scenario:
    """What a page needs to run.

    Attributes:
        names: names of its Python.
        replace: texts of its blocks, and what stands there in the test.
        added: settings that its configurations get.
    """

    names: dict[str, Any] = field(default_factory=dict)
    replace: dict[str, str] = field(default_factory=dict)
    added: dict[str, Any] = field(default_factory=dict)


def encoder(folder: Path, name: str = "encoder") -> None:
    """A sentence encoder, a table of pairs, and ``run.yaml`` for them."""
    zoo.save_text_model(folder / name, "bert")
    pairs = zip(zoo.SENTENCES[::2], zoo.SENTENCES[1::2], strict=True)
    rows = "\n".join(f"{first},{second},{index}" for index, (first, second) in enumerate(pairs))
    (folder / "pairs.csv").write_text(f"first,second,score\n{rows}\n")
    (folder / "run.yaml").write_text(yaml.safe_dump(ENCODER))


def checkpoint(folder: Path, name: str = "out", **values: Any) -> dict[str, Any]:
    """The checkpoint of the encoder; gives the run's result."""
    result = zoo.run(folder, ENCODER | values)
    shutil.copytree(result["checkpoint"].removeprefix("file://"), folder / name)
    return result


def images(folder: Path) -> None:
    """A copy of ImageNet with a few images in folders of classes."""
    for split in ("train", "val"):
        for index in range(8):
            zoo.save_image(folder / "IMAGENET" / split / f"n{index % 4:08}" / f"{index}.png", index, size=64)


def vit(folder: Path) -> Scenario:
    """ViT-Tiny of full size with random weights, which the hub would give, and a few images."""
    from safetensors.torch import save_file

    module = zoo.timm_model(zoo.VIT, {})
    save_file({name: value.contiguous() for name, value in module.state_dict().items()}, folder / "weights.safetensors")
    images(folder)
    shutil.copytree(ROOT / "examples" / "service", folder / "examples" / "service")
    here = {"pretrained: true": "checkpoint: weights.safetensors", "samples: 256": "samples: 4"}
    return Scenario(replace=here | SHORT, added=CHEAP)


def readme(folder: Path) -> Scenario:
    """As ``vit``, with a table of the images; the block of Python is a program of its own."""
    found = vit(folder)
    files = sorted((folder / "IMAGENET").rglob("*.png"))
    (folder / "images").mkdir()
    rows = ["file\tlabel\tsplit"]
    for index, file in enumerate(files):
        shutil.copy(file, folder / "images" / f"{index}.png")
        rows.append(f"{index}.png\t{index % 4}\t{'calibration' if index % 2 else 'evaluation'}")
    (folder / "labels.tsv").write_text("\n".join(rows) + "\n")
    found.replace["model: {family: timm"] = "# run.yaml\nmodel: {family: timm"
    return found


def detector(folder: Path) -> Scenario:
    """A tiny DETR in place of RT-DETR, and a copy of COCO with a few images."""
    detectors.save_transformers_detector(folder / "detector", "object-detection")
    detectors.write_coco(folder / "source")
    (folder / "COCO" / "annotations").mkdir(parents=True)
    for split in ("train2017", "val2017"):
        shutil.copytree(folder / "source" / "images", folder / "COCO" / split)
        shutil.copy(folder / "source" / "instances.json", folder / "COCO" / "annotations" / f"instances_{split}.json")
    shutil.copy(folder / "COCO" / "val2017" / "0.png", folder / "COCO" / "val2017" / "000000000139.jpg")
    here = {"PekingU/rtdetr_r18vd": "detector/", "samples: 64": "samples: 4", "threshold=0.5": "threshold=0.0"}
    return Scenario(replace=here, added=CHEAP | {"budget": "8bit"})  # layers of 16 columns


def demo(folder: Path) -> Scenario:
    """The examples, with less data and a cheaper search in their configurations."""
    shutil.copytree(ROOT / "examples", folder / "examples", ignore=shutil.ignore_patterns("*.mlorq"))
    for name in ("demo.yaml", "minilm.yaml"):
        values = yaml.safe_load((folder / "examples" / name).read_text())
        values["data"]["calibration"]["samples"] = 8
        (folder / "examples" / name).write_text(yaml.safe_dump(values | CHEAP))
    pairs = folder / "examples" / "data" / "stsb" / "stsb-en-test.csv"
    pairs.write_text("".join(pairs.read_text().splitlines(keepends=True)[:20]))
    return Scenario()


def command_line(folder: Path) -> Scenario:
    """The encoder with its run; RUN is the one that `mlorq init` does not overwrite."""
    encoder(folder)
    (folder / "run.yaml").write_text(yaml.safe_dump(ENCODER | CHEAP))
    run = str(checkpoint(folder, "already", **CHEAP)["run"])
    here = {"mlorq init run.yaml": "mlorq init new.yaml", " RUN": f" {run}", "--budget 10%": "--budget 20%"}
    here["--budget 2.5bit"] = "--budget 3.5bit"  # rows of 32 weights have 2.7 bits per weight at least
    return Scenario(replace=here | SHORT)


def stores(folder: Path) -> Scenario:
    encoder(folder)
    return Scenario(replace={"RUN": str(checkpoint(folder)["run"])})


def python_page(folder: Path) -> Scenario:
    """A classifier in memory, and another instance of its class."""
    model, instance = zoo.text_model("bert-classifier"), zoo.text_model("bert-classifier", 1)
    tokenizer = zoo.tokenizer()
    batches = [dict(tokenizer([text, text], return_tensors="pt")) for text in zoo.SENTENCES]
    cheap = 'budget="3bit", preset="quick", rounding="nearest", search={"points": 2, "hessian_probes": 4}'
    return Scenario({"model": model, "instance": instance, "batches": batches}, {'budget="3bit"': cheap})


def graphs(folder: Path) -> Scenario:
    """A checkpoint, a batch, and the modules that the snippets are parts of."""
    import json

    import mlorq

    encoder(folder)
    checkpoint(folder)
    batch = dict(zoo.tokenizer()(["a dog runs", "a cat sleeps"], padding=True, return_tensors="pt"))
    return Scenario({"mlorq": mlorq, "json": json, "batch": batch})


def onnx_page(folder: Path) -> Scenario:
    import onnxruntime

    found = graphs(folder)
    found.names["onnxruntime"] = onnxruntime
    # The second snippet begins where a session has told its metadata.
    found.replace["options = onnxruntime.SessionOptions()"] = (
        'metadata = onnxruntime.InferenceSession("model.onnx").get_modelmeta().custom_metadata_map\n'
        "options = onnxruntime.SessionOptions()"
    )
    return found


def openvino_page(folder: Path) -> Scenario:
    import openvino

    found = graphs(folder)
    found.names["core"] = openvino.Core()
    found.replace["about = json.loads"] = 'model = core.read_model("model.xml")\nabout = json.loads'
    return found


def transformers_page(folder: Path) -> Scenario:
    """``out/`` has codes of one width, which compressed-tensors takes as well."""
    encoder(folder)
    checkpoint(folder, search=zoo.QUICK | {"forms": ["Q"], "bits": [4]})
    return Scenario()


SCENARIOS: dict[str, Callable[[Path], Scenario]] = {
    "README.md": readme,
    "docs/COMMAND_LINE.md": command_line,
    "docs/ONNX.md": onnx_page,
    "docs/OPENVINO.md": openvino_page,
    "docs/PYTHON.md": python_page,
    "docs/START.md": demo,
    "docs/STORES.md": stores,
    "docs/TRANSFORMERS.md": transformers_page,
    "docs/tutorials/DETECTOR.md": detector,
    "docs/tutorials/ENCODER.md": demo,
    "docs/tutorials/VIT.md": vit,
}
