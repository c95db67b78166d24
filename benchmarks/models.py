"""Every kind of model that is supported, at full size, as a whole: what is compressed, is it equal, does its graph run?

    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/models.py                            # sizes tiny and small
    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/models.py --size base --size large   # hours, tens of GB
    OMP_NUM_THREADS=1 .venv/bin/python benchmarks/models.py --only resnet18 --only bert_mini --preset fast

No hub and no downloads: the libraries' real classes with random weights, random inputs of the right sizes. So the rows
say nothing of accuracy. They say that a model of this structure and size goes all the way (layers, capture, search,
integer program, rounding, checkpoint), in what time and memory; that the checkpoint, loaded from its folder, computes
what the compressed model in memory does, bit for bit; and by how much its ONNX graph in onnxruntime differs from it.

Each model is run in a process of its own, for the sake of its peak memory. ``--preset cheap``: affine codes chosen by
local costs, and nearest rounding, which show the same of a structure as others in a tenth of the time.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mlorq
from benchmarks.architectures import CHEAPEST, shares
from mlorq.errors import MlorqError, one_line
from mlorq.export_targets.base import TARGETS
from mlorq.models import FAMILIES, from_module
from mlorq.models.batches import Batch, take_samples
from mlorq.models.copying import copy_module
from mlorq.models.sentence import SentenceEmbedding
from mlorq.models.tasks import PAIRS, TASKS

SIZES = ("tiny", "small", "base", "large")
CHEAP = "cheap"
COLUMNS = (
    "model",
    "parameters",
    "layers",
    "compressed",
    "left float",
    "file, B",
    "float file, B",
    "output NMSE",
    "CPU s",
    "peak, GB",
    "equal",
    "ONNX",
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
        samples: number of inputs that calibrate; as many others are evaluated.
        side: of the images, if it is not that of the configuration.
    """

    size: str
    family: str
    name: str
    arguments: dict[str, Any] = field(default_factory=dict)
    task: str | None = None
    samples: int = 2
    side: int | None = None


def _timm(size: str, name: str, **arguments: Any) -> Recipe:
    return Recipe(size, "timm", name, arguments)


def _hub(size: str, name: str, task: str, samples: int = 2, **arguments: Any) -> Recipe:
    return Recipe(size, "transformers", name, arguments, task, samples)


def _bert(size: str, width: int, layers: int, name: str = "BertForSequenceClassification", **more: Any) -> Recipe:
    heads, inner = max(1, width // 64), 4 * width
    arguments = dict(hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=inner)
    task = "sentence-similarity" if name == "BertModel" else "text-classification"
    return _hub(size, name, task, 8, **arguments | more)


_ROBERTA = {"vocab_size": 50265, "max_position_embeddings": 514}
_DISTILBERT = {"dim": 768, "n_layers": 6, "n_heads": 12, "hidden_dim": 3072}
_THINGS = {"id2label": {index: f"thing{index}" for index in range(80)}}
_SWIN_TINY = {"model_type": "swin", "out_features": ["stage1", "stage2", "stage3", "stage4"]}
_RT_DETR_R18: dict[str, Any] = {
    "backbone_config": {
        "model_type": "rt_detr_resnet",
        "depths": [2, 2, 2, 2],
        "hidden_sizes": [64, 128, 256, 512],
        "layer_type": "basic",
        "out_features": ["stage2", "stage3", "stage4"],
    },
    "encoder_in_channels": [128, 256, 512],
    "hidden_expansion": 0.5,
    "decoder_layers": 3,
}
_D_FINE_NANO: dict[str, Any] = {
    "backbone_config": {
        "model_type": "hgnet_v2",
        "stem_channels": [3, 16, 16],
        "hidden_sizes": [64, 256, 512, 1024],
        "stage_in_channels": [16, 64, 256, 512],
        "stage_mid_channels": [16, 32, 64, 128],
        "stage_out_channels": [64, 256, 512, 1024],
        "stage_num_blocks": [1, 1, 2, 1],
        "stage_numb_of_layers": [3, 3, 3, 3],
        "use_learnable_affine_block": True,
        "out_features": ["stage3", "stage4"],
    },
    "encoder_in_channels": [512, 1024],
    "encoder_hidden_dim": 128,
    "encoder_ffn_dim": 512,
    "encode_proj_layers": [1],
    "feat_strides": [16, 32],
    "num_feature_levels": 2,
    "hidden_expansion": 0.34,
    "depth_mult": 0.5,
    "d_model": 128,
    "decoder_in_channels": [128, 128],
    "decoder_ffn_dim": 512,
    "decoder_layers": 3,
    "decoder_n_points": [6, 6],
}
_QWEN3 = {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 151936,
    "tie_word_embeddings": True,
}
_SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "tie_word_embeddings": True,
}
# Half of the published side, 1024: a quarter of the time, and nearly all of the parameters.
_SAM = {
    "vision_config": {"image_size": 512},
    "prompt_encoder_config": {"image_size": 512, "image_embedding_size": 32},
}
_TWO_TOWERS, _BOXES = "zero-shot-image-classification", "object-detection"

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
    "swinv2_tiny_window8_256": _timm("small", "swinv2_tiny_window8_256"),
    "beit_base_patch16_224": _timm("base", "beit_base_patch16_224"),
    "eva02_tiny_patch14_224": _timm("tiny", "eva02_tiny_patch14_224"),
    "hiera_tiny_224": _timm("small", "hiera_tiny_224"),
    "dinov2_small": _timm("small", "vit_small_patch14_dinov2", img_size=224, num_classes=0),
    "dinov3_small": _timm("small", "vit_small_patch16_dinov3", num_classes=0),
    "resnet18": _timm("tiny", "resnet18"),
    "convnext_atto": _timm("tiny", "convnext_atto"),
    "convnext_tiny": _timm("small", "convnext_tiny"),
    "mixer_s32_224": _timm("small", "mixer_s32_224"),
    "bert_mini": _bert("tiny", 256, 4),
    "minilm": _bert("small", 384, 6, "BertModel"),
    "bge_small": _bert("small", 384, 12, "BertModel"),  # e5-small has the same shapes
    "bert_base": _bert("base", 768, 12),
    "bert_large": _bert("large", 1024, 24),
    "distilbert": _hub("small", "DistilBertForSequenceClassification", "text-classification", **_DISTILBERT),
    "roberta_small": _bert("small", 384, 6, "RobertaForSequenceClassification", **_ROBERTA),
    "roberta_base": _bert("base", 768, 12, "RobertaForSequenceClassification", **_ROBERTA),
    "modernbert_base": _hub("base", "ModernBertForMaskedLM", "fill-mask"),
    "t5_small": _hub("small", "T5ForConditionalGeneration", "text2text-generation"),
    "whisper_tiny": _hub("small", "WhisperForConditionalGeneration", "automatic-speech-recognition"),
    "wav2vec2_base": _hub("base", "Wav2Vec2ForCTC", "automatic-speech-recognition"),
    "smollm2_135m": _hub("base", "LlamaForCausalLM", "text-generation", **_SMOLLM2),
    "qwen3_0.6b": _hub("large", "Qwen3ForCausalLM", "text-generation", **_QWEN3),
    "clip_vit_base_patch32": _hub("base", "CLIPModel", _TWO_TOWERS),
    "siglip_base_patch16_224": _hub("base", "SiglipModel", _TWO_TOWERS),
    "siglip2_base_patch16_naflex": _hub("base", "Siglip2Model", _TWO_TOWERS),
    "segformer_b0": _hub("tiny", "SegformerForSemanticSegmentation", "semantic-segmentation", num_labels=150),
    "sam_vit_base": _hub("base", "SamModel", "mask-generation", **_SAM),
    "rt_detr_r18": Recipe("base", "transformers", "RTDetrForObjectDetection", _RT_DETR_R18 | _THINGS, _BOXES, side=640),
    "d_fine_nano": Recipe("small", "transformers", "DFineForObjectDetection", _D_FINE_NANO | _THINGS, _BOXES, side=640),
    "detr_resnet50": _hub("base", "DetrForObjectDetection", _BOXES, **_THINGS),
    "mask2former_swin_tiny": _hub(
        "base",
        "Mask2FormerForUniversalSegmentation",
        "instance-segmentation",
        **{"backbone_config": _SWIN_TINY, **_THINGS},
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
        from mlorq.models import rebuild

        module = rebuild({"family": recipe.family, "name": recipe.name, "arguments": recipe.arguments})
    else:
        import transformers

        kind = getattr(transformers, recipe.name)
        module = kind(kind.config_class(**recipe.arguments))
    for value in module.parameters():
        if value.dim() == 1 or not value.any():
            value.data += 0.1 * torch.randn_like(value)
    return module.eval()


def inputs(recipe: Recipe, module: nn.Module) -> tuple[Batch, Batch]:
    """Random inputs: for calibration, and others for evaluation."""
    family = FAMILIES[recipe.family]
    architecture: dict[str, Any] = {"name": recipe.name, "arguments": recipe.arguments}
    if recipe.family == "transformers":
        architecture = dict(family.describe(module) or {}) | {"task": recipe.task}
        architecture |= {"input_size": [recipe.side, recipe.side]} if recipe.side else {}
    batch = family.example_input(architecture, samples=2 * recipe.samples)
    assert batch is not None
    return take_samples(batch, slice(0, recipe.samples)), take_samples(batch, slice(recipe.samples, None))


def forward_of(recipe: Recipe) -> Callable[[nn.Module, Any], Tensor] | None:
    """f(x) of the model's task; None: the module's output."""
    if recipe.family == "detection":
        from mlorq.models.mask_rcnn import label_free_outputs

        return label_free_outputs
    if recipe.task is None:
        return None
    return SentenceEmbedding() if recipe.task == PAIRS else TASKS[recipe.task].forward()


def measure(
    recipe: Recipe,
    folder: Path,
    *,
    preset: str = CHEAP,
    device: str = "cpu",
    onnx: bool = True,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Build, compress, save, load, export and compare one model.

    Args:
        recipe: of the model.
        folder: for its checkpoint and graph.
        preset: ``cheap``, or a preset of a configuration with few samples.
        device: to compute on.
        onnx: whether its graph is made and run.
        progress: called with (step, steps done, steps).
    """
    module = build(recipe)
    calibration, evaluation = inputs(recipe, module)
    forward = forward_of(recipe)
    few = {"samples": recipe.samples, "hessian_samples": recipe.samples}
    settings: dict[str, Any] = {"preset": preset, "search": few}
    if preset == CHEAP:
        settings = CHEAPEST | {"search": CHEAPEST["search"] | few | {"sensitivity": "local"}}
    clock = time.process_time if device == "cpu" else time.perf_counter
    started = clock()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = mlorq.compress(
            module,
            [calibration],
            validation=[evaluation],
            forward=forward,
            progress=progress or False,
            **settings | {"budget": "4bit", "device": device},
        )
    seconds = clock() - started
    peak = _peak(device) / 1e9  # of the compression alone
    model = from_module(copy_module(module), forward)
    found = shares(
        model.module,
        result.allocation["layer"].to_pylist(),
        [(one.name, one.reason) for one in result.left_float],
    )
    result.save(str(folder / "out"))
    loaded = mlorq.load(str(folder / "out"), model=_float_instance(folder / "out", module)).to(device)
    with torch.no_grad():
        ours, theirs = model.outputs(result.model, evaluation), model.outputs(loaded, evaluation)
    return {
        "parameters": sum(value.numel() for value in module.parameters()),
        "layers": found["layers"],
        "share": found["share"],
        "left": found["left"],
        "bytes": result.metrics["bytes"],
        "budget_bytes": result.metrics["budget_bytes"],
        "file_bytes": sum(path.stat().st_size for path in (folder / "out").iterdir()),
        "float_bytes": sum({value.data_ptr(): value.nbytes for value in module.state_dict().values()}.values()),
        "nmse": result.metrics["nmse"],
        "seconds": seconds,
        "peak": peak,
        "equal": bool(torch.equal(ours, theirs)),
        "onnx": _graph(folder, module, calibration) if onnx else "not tried",
    }


def _float_instance(checkpoint: Path, module: nn.Module) -> nn.Module | None:
    """A float model for ``mlorq.load`` if the checkpoint does not describe its architecture."""
    family = json.loads((checkpoint / "mlorq.json").read_text())["architecture"]["family"]
    return copy_module(module) if family == "custom" else None


def _graph(folder: Path, module: nn.Module, batch: Batch) -> str:
    """The largest difference of the graph's outputs from the model's, relative to their norm; or why there is none."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            instance = _float_instance(folder / "out", module)
            given: dict[str, Any] = {"example": batch} | ({} if instance is None else {"model": instance})
            if hasattr(module, "roi_heads"):  # as FAMILIES["detection"] does: proposals differ in number
                given |= {"part": "backbone", "example": batch["pixel_values"]}
            files = mlorq.export(str(folder / "out"), str(folder / "model.onnx"), **given)
    except MlorqError as error:
        return one_line(error)[:160]
    return f"{TARGETS['onnx'].summary(files)['difference']:.1e}"


def _peak(device: str) -> int:
    """Bytes of this process's memory, of a GPU's where one computed."""
    if device == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return torch.cuda.max_memory_allocated(device)


def line(name: str, found: dict[str, Any]) -> str:
    """A row of the table, as Markdown."""
    left = "; ".join(f"{reason}: {size:,}" for reason, size in sorted(found["left"].items(), key=lambda one: -one[1]))
    return (
        f"| {name} | {found['parameters']:,} | {found['layers']} | {found['share']:.1%} | {left or 'none'} "
        f"| {found['file_bytes']:,} | {found['float_bytes']:,} | {found['nmse']:.2g} | {found['seconds']:.0f} "
        f"| {found['peak']:.1f} | {'yes' if found['equal'] else 'NO'} | {found['onnx']} |"
    )


def _run_here(name: str, preset: str, device: str, onnx: bool) -> dict[str, Any]:
    def progress(label: str, done: int, total: int) -> None:
        print(f"  {name}: {label} {done}/{total}", file=sys.stderr)

    with tempfile.TemporaryDirectory(prefix="mlorq-models-") as folder:
        return measure(MODELS[name], Path(folder), preset=preset, device=device, onnx=onnx, progress=progress)


def main() -> int:
    """Print a row a model, as Markdown; status 1 where one fails or computes other outputs."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", action="append", choices=sorted(MODELS), default=[], help="these models")
    parser.add_argument("--size", action="append", choices=SIZES, default=[], help="all of a size")
    parser.add_argument("--preset", default=CHEAP, help="cheap, or a preset of a configuration")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--no-onnx", action="store_true", help="leave graphs out")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        print(json.dumps(_run_here(arguments.row, arguments.preset, arguments.device, not arguments.no_onnx)))
        return 0
    sizes = arguments.size or ([] if arguments.only else ["tiny", "small"])
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}", flush=True)
    bad = 0
    for name in [name for name, recipe in MODELS.items() if name in arguments.only or recipe.size in sizes]:
        command = [sys.executable, __file__, "--row", name, "--preset", arguments.preset, "--device", arguments.device]
        command += ["--no-onnx"] if arguments.no_onnx else []
        environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
        found = json.loads(done.stdout.splitlines()[-1]) if done.returncode == 0 else None
        print(line(name, found) if found else f"| {name} | failed |{' |' * (len(COLUMNS) - 2)}", flush=True)
        bad += found is None or not found["equal"]
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
