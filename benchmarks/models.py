"""Every kind of model that is supported, built by its library and compressed as a whole: does it work, and what is it?

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/models.py                            # sizes tiny and small
    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/models.py --size base --size large   # hours, tens of GB
    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/models.py --only resnet18 --only bert_mini

No hub and no downloads: weights are random, images are made and read back through the real image folder, texts are of a
small vocabulary and pass a tokenizer. So the rows say nothing of accuracy. They say that a model of this structure and
size goes all the way (layers, capture, search, integer program, rounding, checkpoint), in what time and memory, and
that the checkpoint, loaded from its folder alone, computes what the compressed model in memory does, bit for bit.

Each model is run in a process of its own, for the sake of its peak memory. 3 bits, preset ``best`` with closed forms
throughout and few samples.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from PIL import Image
from torch import nn

import mlorq
from flows.pool import Pool
from mlorq.artifacts.store import ArtifactRef, Store
from mlorq.checkpoint.io import save
from mlorq.checkpoint.places import FILES
from mlorq.config.run import RunConfig
from mlorq.evaluation.outputs import model_outputs
from mlorq.forms.modules import replace_layers
from mlorq.models import rebuild
from mlorq.models.norms import set_parameters
from steps.baseline import nmse_data
from steps.pipeline import result_json, run_pipeline
from steps.session import Session

SIZES = ("tiny", "small", "base", "large")
WORDS = [f"word{index}" for index in range(200)]
COLUMNS = (
    "model",
    "parameters",
    "layers",
    "blocks",
    "compressible, B",
    "file, B",
    "float file, B",
    "output NMSE",
    "s",
    "peak, GB",
    "equal outputs",
)


@dataclass(frozen=True)
class Recipe:
    """A model with random weights.

    Attributes:
        size: one of ``SIZES``: what it costs to run, about.
        family: ``timm``, ``transformers`` or ``detection``.
        name: timm's name, the class in transformers, or the detector's name.
        arguments: of timm's constructor, or of the class's configuration.
        task: of the configuration's ``model`` section.
    """

    size: str
    family: str
    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    task: str | None = None


def _timm(size: str, name: str) -> Recipe:
    return Recipe(size, "timm", name)


def _bert(size: str, width: int, layers: int, name: str = "BertForSequenceClassification", **more: Any) -> Recipe:
    heads, inner = max(1, width // 64), 4 * width
    arguments = dict(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=inner)
    task = "sentence-similarity" if name == "BertModel" else "text-classification"
    return Recipe(size, "transformers", name, arguments | more, task)


# The tokenizer below pads with 0 and has two token types, unlike RoBERTa's own.
_ROBERTA = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3, "type_vocab_size": 2, "vocab_size": 50265}
_DISTILBERT = {"dim": 768, "n_layers": 6, "n_heads": 12, "hidden_dim": 3072}
THINGS = [f"thing{index}" for index in range(80)]
_LABELS = {"id2label": dict(enumerate(THINGS)), "label2id": {name: index for index, name in enumerate(THINGS)}}
_SWIN_TINY = {"model_type": "swin", "out_features": ["stage1", "stage2", "stage3", "stage4"]}
# Of transformers' detectors, by task. Smaller images than they were made for: what they cost is not the point.
PROCESSORS = {"object-detection": "DetrImageProcessor", "instance-segmentation": "Mask2FormerImageProcessor"}
IMAGE = {"shortest_edge": 256, "longest_edge": 352}

MODELS: dict[str, Recipe] = {
    "vit_tiny_patch16_224": _timm("tiny", "vit_tiny_patch16_224"),
    "vit_small_patch16_224": _timm("small", "vit_small_patch16_224"),
    "vit_base_patch16_224": _timm("base", "vit_base_patch16_224"),
    "vit_large_patch16_224": _timm("large", "vit_large_patch16_224"),
    "deit_tiny_patch16_224": _timm("tiny", "deit_tiny_patch16_224"),
    "deit_small_patch16_224": _timm("small", "deit_small_patch16_224"),
    "deit_base_patch16_224": _timm("base", "deit_base_patch16_224"),
    "swin_tiny_patch4_window7_224": _timm("small", "swin_tiny_patch4_window7_224"),
    "swin_small_patch4_window7_224": _timm("base", "swin_small_patch4_window7_224"),
    "swin_base_patch4_window7_224": _timm("base", "swin_base_patch4_window7_224"),
    "resnet18": _timm("tiny", "resnet18"),
    "convnext_atto": _timm("tiny", "convnext_atto"),
    "convnext_tiny": _timm("small", "convnext_tiny"),
    "mixer_s32_224": _timm("small", "mixer_s32_224"),
    "bert_mini": _bert("tiny", 256, 4),
    "minilm": _bert("small", 384, 6, "BertModel"),
    "bert_base": _bert("base", 768, 12),
    "distilbert": Recipe(
        "small", "transformers", "DistilBertForSequenceClassification", _DISTILBERT, "text-classification"
    ),
    "roberta_small": _bert("small", 384, 6, "RobertaForSequenceClassification", **_ROBERTA),
    "roberta_base": _bert("base", 768, 12, "RobertaForSequenceClassification", **_ROBERTA),
    "bert_large": _bert("large", 1024, 24),
    "detr_resnet50": Recipe("base", "transformers", "DetrForObjectDetection", _LABELS, "object-detection"),
    "mask2former_swin_tiny": Recipe(
        "base",
        "transformers",
        "Mask2FormerForUniversalSegmentation",
        {"backbone_config": _SWIN_TINY, **_LABELS},
        "instance-segmentation",
    ),
    "mask_rcnn_swin_tiny": Recipe("large", "detection", "mask_rcnn_swin_tiny"),
    "mask_rcnn_swin_small": Recipe("large", "detection", "mask_rcnn_swin_small"),
}


def build(recipe: Recipe) -> nn.Module:
    """The module, with parameters that would start as zeros or ones moved away from there: nothing hides behind one."""
    torch.manual_seed(0)
    if recipe.family == "timm":
        import timm

        module = timm.create_model(recipe.name, **recipe.arguments)
    elif recipe.family == "detection":
        module = rebuild({"family": recipe.family, "name": recipe.name, "arguments": recipe.arguments})
    else:
        import transformers

        kind = getattr(transformers, recipe.name)
        module = kind(kind.config_class(**recipe.arguments))
    for value in module.parameters():
        if value.dim() == 1 or not value.any():
            value.data += 0.1 * torch.randn_like(value)
    return module.eval()


def write_model(recipe: Recipe, module: nn.Module, folder: Path) -> dict[str, Any]:
    """Weights (and a tokenizer) on disk; gives the configuration's ``model`` section."""
    if recipe.family != "transformers":
        safetensors.torch.save_file(module.state_dict(), folder / "weights.safetensors")
        named = {"family": recipe.family, "name": recipe.name, "arguments": recipe.arguments}
        return named | {"checkpoint": "weights.safetensors"}
    import transformers

    module.save_pretrained(folder / "model")
    if recipe.task in PROCESSORS:
        getattr(transformers, PROCESSORS[recipe.task])(size=IMAGE).save_pretrained(folder / "model")
    else:
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
        tokenizer = transformers.BertTokenizerFast(vocab={word: index for index, word in enumerate(words)})
        tokenizer.save_pretrained(folder / "model")
    return {"family": "transformers", "name": "model", "task": recipe.task}


def write_data(recipe: Recipe, folder: Path, samples: int, classes: int) -> dict[str, Any]:
    """Images in a folder, of COCO, or texts in a table; gives the configuration's ``data`` section."""
    rng = np.random.default_rng(0)
    if recipe.family == "detection" or recipe.task in PROCESSORS:
        return _write_coco(folder, samples, rng)
    if recipe.family == "timm":
        (folder / "images").mkdir()
        lines = ["file\tlabel\tsplit"]
        for index in range(2 * samples):
            colours = rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)
            picture = Image.fromarray(colours).resize((256, 256), Image.Resampling.BICUBIC)
            picture.save(folder / "images" / f"{index}.png")
            lines.append(f"{index}.png\t{rng.integers(classes)}\t{'evaluation' if index % 2 else 'calibration'}")
        (folder / "labels.tsv").write_text("\n".join(lines) + "\n")
        source = {"source": "image_folder", "root": "images", "labels": "labels.tsv", "batch_size": 8}
        return {split: source | {"split": split} for split in ("calibration", "evaluation")}
    sources = {}
    for split in ("calibration", "evaluation"):
        rows = [" ".join(rng.choice(WORDS, rng.integers(4, 40))) for _ in range(samples)]
        pairs = [f"{a},{b},{index % 2}\n" for index, (a, b) in enumerate(zip(rows, reversed(rows), strict=True))]
        (folder / f"{split}.csv").write_text("".join(pairs))
        columns = {"text": [0, 1] if recipe.task == "sentence-similarity" else [0], "label": 2}
        sources[split] = {"source": "table", "path": f"{split}.csv", "batch_size": 8, **columns}
    return sources


def _write_coco(folder: Path, samples: int, rng: np.random.Generator) -> dict[str, Any]:
    """Images of COCO's usual size with a box each, which calibrate and are evaluated."""
    (folder / "images").mkdir()
    box, categories = [80, 60, 200, 160], [{"id": index + 1, "name": name} for index, name in enumerate(THINGS)]
    rows: dict[str, list[dict[str, Any]]] = {"images": [], "annotations": [], "categories": categories}
    for index in range(samples):
        colours = rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        Image.fromarray(colours).resize((640, 480), Image.Resampling.BICUBIC).save(folder / "images" / f"{index}.png")
        rows["images"].append({"id": index, "file_name": f"{index}.png", "height": 480, "width": 640})
        label = {"id": index + 1, "image_id": index, "category_id": int(rng.integers(1, 81)), "iscrowd": 0}
        corners = [80, 60, 280, 60, 280, 220, 80, 220]
        rows["annotations"].append(label | {"bbox": box, "area": 200 * 160, "segmentation": [corners]})
    (folder / "instances.json").write_text(json.dumps(rows))
    source = {"source": "coco", "root": "images", "annotations": "instances.json", "batch_size": 1}
    return {"calibration": source, "evaluation": source}


def measure(
    recipe: Recipe,
    folder: Path,
    *,
    samples: int = 16,
    device: str = "cpu",
    workers: int = 1,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Build, compress, save, load and compare one model.

    Args:
        recipe: of the model.
        folder: for its weights, data, store and checkpoint.
        samples: calibration samples; as many others are evaluated.
        device: to compute on.
        workers: processes that share the layers of a step.
        progress: called with (step, steps done, steps).
    """
    module = build(recipe)
    parameters = sum(value.numel() for value in module.parameters())
    float_bytes = sum(value.nbytes for value in module.state_dict().values())
    classes = getattr(module, "num_classes", 2)
    values = {
        "model": write_model(recipe, module, folder),
        "data": write_data(recipe, folder, samples, classes),
        "budget": "3bit",
        "preset": "best",
        "search": {"sensitivity": "closed_form", "samples": 8, "hessian_samples": 8},
        "rounding": {"method": "closed_form"},
        "engine": {"devices": device},
    }
    del module
    config = RunConfig.from_mapping(values, str(folder))
    started = time.perf_counter()
    session = Session(config, Store(config.resolve(config.store)), device)
    with Pool(session, workers, progress) as executor:
        (compressed,) = run_pipeline(session, executor, config.budgets)
    result = result_json(session, compressed)
    seconds = time.perf_counter() - started
    artifacts = {role: ArtifactRef.from_json(value) for role, value in result["artifacts"].items()}
    listed = session.artifacts.layers(artifacts["layers"])
    checkpoint = folder / "out"
    save({name: session.store.read_bytes(artifacts["checkpoint"], name) for name in FILES}, checkpoint)
    return {
        "parameters": parameters,
        "layers": len(listed.layers),
        "blocks": len(listed.blocks),
        "bytes": result["bytes"],
        "budget_bytes": result["budget_bytes"],
        "file_bytes": sum(path.stat().st_size for path in checkpoint.iterdir()),
        "float_bytes": float_bytes,
        "nmse": result["nmse"],
        "seconds": seconds,
        "peak": _peak(device) / 1e9,
        "equal": _equal_outputs(session, artifacts, checkpoint),
    }


def _peak(device: str) -> int:
    """Bytes of this process's memory, of a GPU's where one computed."""
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return torch.cuda.max_memory_allocated(device)


def _equal_outputs(session: Session, artifacts: dict[str, ArtifactRef], checkpoint: Path) -> bool:
    """Whether the saved checkpoint computes what the float model with its rounded layers replaced in memory does."""
    listed = session.artifacts.layers(artifacts["layers"])
    in_memory = deepcopy(session.model.module)
    rounded = session.artifacts.all_rounded(artifacts[f"round/{listed.layers[-1].name}"])
    set_parameters(in_memory, rounded.rest)
    replace_layers(in_memory, rounded.layers, {layer.name: list(layer.aliases) for layer in listed.layers})
    batches = nmse_data(session).batches
    loaded = mlorq.load(checkpoint).to(session.device)
    in_memory.to(session.device)
    found, wanted = (model_outputs(session.model, one, batches, device=session.device) for one in (loaded, in_memory))
    return bool(torch.equal(found, wanted))


def line(name: str, found: dict[str, Any]) -> str:
    """A row of the table, as Markdown."""
    return (
        f"| {name} | {found['parameters']:,} | {found['layers']} | {found['blocks']} | {found['bytes']:,} "
        f"| {found['file_bytes']:,} | {found['float_bytes']:,} | {found['nmse']:.3g} | {found['seconds']:.0f} "
        f"| {found['peak']:.1f} | {'yes' if found['equal'] else 'NO'} |"
    )


def _run_here(name: str, samples: int, device: str, workers: int) -> dict[str, Any]:
    def progress(label: str, done: int, total: int) -> None:
        print(f"  {name}: {label} {done}/{total}", file=sys.stderr)

    with tempfile.TemporaryDirectory(prefix="mlorq-models-") as folder:
        return measure(MODELS[name], Path(folder), samples=samples, device=device, workers=workers, progress=progress)


def main() -> int:
    """Print a row a model, as Markdown; status 1 where one fails or computes other outputs."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", action="append", choices=sorted(MODELS), default=[], help="these models")
    parser.add_argument("--size", action="append", choices=SIZES, default=[], help="all of a size")
    parser.add_argument("--samples", type=int, default=16, help="calibration samples")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--workers", type=int, default=1, help="processes that share the layers of a step")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        print(json.dumps(_run_here(arguments.row, arguments.samples, arguments.device, arguments.workers)))
        return 0
    sizes = arguments.size or ([] if arguments.only else ["tiny", "small"])
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    bad = 0
    for name in [name for name, recipe in MODELS.items() if name in arguments.only or recipe.size in sizes]:
        command = [sys.executable, __file__, "--row", name, "--samples", str(arguments.samples)]
        command += ["--device", arguments.device, "--workers", str(arguments.workers)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
        found = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None
        print(line(name, found) if found else f"| {name} | failed |{' |' * (len(COLUMNS) - 2)}", flush=True)
        bad += found is None or not found["equal"]
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
