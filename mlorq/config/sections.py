"""The sections of a configuration: what each key means, its default, and what it may be (``mlorq.config.run``)."""

from __future__ import annotations

import re
from functools import cache
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from mlorq.config.compose import Choice, choices, composed
from mlorq.config.presets import PERCENTILES
from mlorq.models.family import FAMILIES
from mlorq.registry import Registry, Settings

Sensitivity = Literal["measured", "auto", "closed_form", "local"]
RoundingMethod = Literal["nearest", "gptq", "closed_form", "block", "lra", "erq", "brecq", "qdrop"]
Accounting = Literal["exact", "paper"]
Cost = Literal["nmse", "kl", "task"]


def _bit_widths(value: list[int]) -> list[int]:
    if any(not 2 <= bits <= 8 for bits in value):
        raise ValueError("bit-widths are whole numbers from 2 to 8")
    if len(set(value)) != len(value):
        raise ValueError("bit-widths must differ")
    return sorted(value)


class ModelConfig(Choice):
    """The float model: its family, its name there, and where its weights come from."""

    chooser: ClassVar[str] = "family"
    registry: ClassVar[Registry[Any]] = FAMILIES

    family: str = Field(description="which library builds the model")
    dtype: Literal["float32", "float16", "bfloat16"] = Field("float32", description="dtype the model runs in")
    rotation: int | None = Field(
        None,
        ge=0,
        description="seed of a random rotation of the residual stream, folded into the weights (pre-norm ViT, DeiT)",
    )

    @property
    def display_name(self) -> str:
        """A short name of the model for people and file names."""
        return FAMILIES[self.family].display_name(self.own)

    def check(self) -> None:
        """Raise ValueError where a rotation is asked for that the family does not allow."""
        if self.rotation is not None and not FAMILIES[self.family].rotates:
            allowed = ", ".join(family.name for family in FAMILIES if family.rotates)
            raise ValueError(
                f"rotation is for pre-norm vision transformers (families {allowed}); family {self.family} has none: "
                "leave rotation out"
            )


Columns = list[int | str]  # named here: in the class below, ``list`` is one of its keys
GlueTask = Literal["sst2", "mrpc", "cola", "stsb", "qqp", "mnli", "qnli", "rte", "wnli"]


class SourceConfig(Settings):
    """One data source: images in a folder, in Parquet or of COCO, a table of texts, a GLUE task, or user code."""

    source: Literal["image_folder", "image_parquet", "coco", "table", "glue", "custom"] = Field(
        description="kind of source"
    )
    root: str | None = Field(None, description="image_folder, coco: folder of images, local path or fsspec URL")
    annotations: str | None = Field(None, description="coco: instances JSON, local path or fsspec URL")
    labels: str | None = Field(None, description="image_folder: TSV or CSV with file, label[, split]")
    split: str | None = Field(
        None,
        description="image_folder: value of the split column to use; image_parquet: shards of that name; glue: the "
        "split, by default train for calibration and validation for evaluation",
    )
    path: str | None = Field(
        None,
        description="table: CSV, TSV or Parquet file; image_parquet: file, folder of shards or glob; glue: local copy "
        "(file, or folder as on the hub), by default the hub's",
    )
    text: Columns | None = Field(None, description="table: text columns, by name (header) or number (none)")
    image: str = Field("image", description="image_parquet: column of encoded images")
    label: int | str | None = Field(
        None, description="table: label column; needed for a metric. image_parquet: 'label' where there is one"
    )
    task: GlueTask | None = Field(None, description="glue: the task; decides on text columns and metrics")
    factory: str | None = Field(
        None,
        description="custom: package:function; calibration returns batches, "
        "evaluation is called with the model and returns a dict of metrics",
    )
    batches: str | None = Field(
        None,
        description="custom, evaluation: package:function that returns held-out batches, on which the output NMSE is "
        "measured; without, it is on the calibration data",
    )
    metric: Literal["accuracy", "f1", "matthews", "pearson", "spearman", "box_ap", "mask_ap"] | None = Field(
        None, description="evaluation metric; the task's usual one by default"
    )
    samples: int | None = Field(None, ge=1, description="use a seeded random choice of this many samples")
    list: str | None = Field(
        None, description="text file that names the samples to use, one a line: a file's name, or a row number from 1"
    )
    batch_size: int = Field(32, ge=1, description="samples a forward pass")
    max_length: int = Field(128, ge=8, description="texts: longest token sequence, longer ones are cut")

    @model_validator(mode="after")
    def _check(self) -> SourceConfig:
        needed = {
            "image_folder": ("root",),
            "image_parquet": ("path",),
            "coco": ("root", "annotations"),
            "table": ("path", "text"),
            "glue": ("task",),
            "custom": ("factory",),
        }[self.source]
        for name in needed:
            if getattr(self, name) is None:
                raise ValueError(f"source {self.source} needs {name}")
        if self.list is not None and self.samples is not None:
            raise ValueError("samples and list both choose samples: give one of them")
        if self.list is not None and self.source == "custom":
            raise ValueError("list is not available for source custom")
        if self.batches is not None and self.source != "custom":
            raise ValueError("batches is for source custom: other sources have batches of their own")
        return self


class DataConfig(Settings):
    """Calibration data (what the search sees) and evaluation data (what the metric is measured on)."""

    calibration: SourceConfig
    evaluation: SourceConfig

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        if self.calibration.batches is not None:
            raise ValueError("calibration.batches: the batches of calibration are what its factory returns")
        return self


def _checked_percentiles(value: list[float]) -> list[float]:
    if not value or any(not 0.5 < p <= 1 for p in value):
        raise ValueError("percentiles lie in (0.5, 1]")
    return sorted(set(value))


class LayerConfig(Settings):
    """Candidates of single layers (a value of ``search.layers``); what is null is as in ``search``."""

    bits: list[int] | None = Field(None, description="bit-widths of quantize-only candidates")
    factor_bits: list[int] | None = Field(None, description="bit-widths of low-rank factors; [] for none")
    forms: list[Literal["Q", "LR", "QLR"]] | None = Field(
        None, description="what the layer may become; [Q]: codes alone"
    )
    sum_bits: list[int] | None = Field(None, description="QLR: bit-widths of the codes")
    sum_factor_bits: list[int] | None = Field(None, description="QLR: bit-widths of the factors")
    sum_ranks: list[int] | None = Field(None, description="QLR: ranks")
    rank_multiple: int | None = Field(None, ge=1, description="ranks are multiples of this")

    @field_validator("bits", "factor_bits", "sum_bits", "sum_factor_bits")
    @classmethod
    def _check_bits(cls, value: list[int] | None) -> list[int] | None:
        return None if value is None else _bit_widths(value)

    @model_validator(mode="after")
    def _check(self) -> LayerConfig:
        if self.bits == [] or (self.forms is not None and "Q" not in self.forms):
            raise ValueError("bits must name at least one bit-width, and forms must have Q")
        return self


class SearchConfig(Settings):
    """Candidates, their costs, and the integer program (docs/METHOD.md, 1-5)."""

    bits: list[int] = Field([2, 3, 4, 6, 8], description="bit-widths of quantize-only candidates")
    factor_bits: list[int] = Field([4, 6, 8], description="bit-widths of low-rank factors; [] for none")
    forms: list[Literal["Q", "LR", "QLR"]] = Field(
        ["Q", "LR"], description="what a layer may become: codes, low-rank factors, or codes plus factors"
    )
    metric: Literal["hessian", "moments"] = Field(
        "hessian",
        description="of local costs and fits: hessian, the paper's; moments, input and output-gradient covariance",
    )
    token_weights: bool | Annotated[float, Field(ge=0, le=1)] = Field(
        False,
        description="with moments: tokens weighed by how much the output hangs on them; a number: their weights' power",
    )
    sum_bits: list[int] = Field([2, 3, 4], description="QLR: bit-widths of the codes")
    sum_factor_bits: list[int] = Field([4], description="QLR: bit-widths of the factors")
    sum_ranks: list[int] = Field([4, 8, 16, 32], description="QLR: ranks")
    rank_multiple: int = Field(1, ge=1, description="ranks are multiples of this (1: the paper; 8 or 16: hardware)")
    factor_split: Literal["U_SV", "US_V"] = Field("U_SV", description="which factor carries the singular values")
    zero_point: Literal["codes", "int16"] = Field(
        "codes", description="codes: ranges contain 0 and zero-points fit the codes; int16: the paper's"
    )
    percentiles: list[float] = Field(
        PERCENTILES,
        description="upper percentiles p of the ranges (1-p, p) tried",
    )
    hessian_samples: int = Field(32, ge=1, description="calibration samples for the label-free Hessian")
    hessian_probes: int = Field(32, ge=1, description="most Gaussian probes a batch")
    hessian_min_probes: int = Field(10, ge=1, description="probes before convergence is looked at")
    hessian_tolerance: float = Field(1e-4, ge=0, description="stop at this relative change of the estimate")
    hessian_mode: Literal["auto", "probes", "exact"] = Field(
        "auto", description="exact: one backward pass an output; auto: exact where that needs fewer passes"
    )
    sensitivity: Sensitivity = Field(
        "measured",
        description="how local costs become global ones: measured (the paper's), auto (closed forms, scaled by "
        "measurements where the allocation is decided), closed_form (scaled by one measurement a form), local (they do "
        "not, as where every layer has one candidate)",
    )
    samples: int = Field(64, ge=1, description="calibration samples for measured costs")
    points: int = Field(5, ge=2, description="low-rank candidates measured a layer and bit pair; auto: most a form")
    tolerance: float = Field(
        0.2, ge=0, description="auto: no further measurements where costs were predicted this well (as a logarithm)"
    )
    cost: Cost = Field(
        "nmse",
        description="global cost: nmse of the output; kl of the predictions; task, the rise of the task's loss, "
        "which needs labels of the calibration data",
    )
    rounds: int = Field(
        0, ge=0, description="times that the chosen allocation is measured and the program solved again around it"
    )
    accounting: Accounting = Field("exact", description="exact: bytes on disk; paper: weight bits alone")
    objective: Literal["nsr", "sqnr"] = Field("nsr", description="minimise summed NMSE, or maximise summed 1/NMSE")
    solver: Literal["highs", "cbc"] = Field("highs", description="integer programming solver")
    time_limit: float = Field(120.0, gt=0, description="seconds the solver may take")
    gap: float = Field(1e-4, ge=0, description="relative optimality gap at which the solver may stop")
    include: list[str] = Field(["*"], description="layer name patterns to compress")
    exclude: list[str] = Field([], description="layer name patterns to leave alone")
    layers: dict[str, LayerConfig] = Field(
        {},
        description="other candidates for layers by name pattern, as in {head: {bits: [8], forms: [Q]}}; of several "
        "patterns, the one with more letters that are no wildcard decides, key by key",
    )

    @field_validator("bits", "factor_bits", "sum_bits", "sum_factor_bits")
    @classmethod
    def _check_bits(cls, value: list[int]) -> list[int]:
        return _bit_widths(value)

    _check_percentiles = field_validator("percentiles")(_checked_percentiles)

    @model_validator(mode="after")
    def _check(self) -> SearchConfig:
        if not self.bits or "Q" not in self.forms:
            raise ValueError("bits must name at least one bit-width, and forms must have Q")
        return self


class RoundingConfig(Settings):
    """How the chosen candidates' codes are found (docs/METHOD.md, 6)."""

    method: RoundingMethod = Field(
        "lra",
        description="nearest; gptq; closed_form (GPTQ with error feedback); block (closed form, then block "
        "reconstruction); lra (low-rank-aware adaptive rounding); erq, brecq, qdrop: those of their papers",
    )
    start: Literal["nearest", "closed_form", "erq"] = Field(
        "nearest", description="lra: rounding to start from; erq: nearest, of weights moved by ERQ's first regression"
    )
    drop: float = Field(
        0.0, ge=0, lt=1, description="block: share of activations that stay float in each step (qdrop: 0.5)"
    )
    soft_rate: float = Field(0.02, gt=0, description="brecq, qdrop: step size of adaptive rounding")
    soft_weight: float = Field(0.01, ge=0, description="brecq, qdrop: weight of the rounding regulariser")
    feedback: bool = Field(
        True, description="closed_form, block: move weights and biases to make up for what layers before have changed"
    )
    iterations: int = Field(500, ge=1, description="lra: iterations a layer (paper: 20000); block: steps a block")
    learning_rate: float = Field(0.3, gt=0, description="lra: RAdam step size")
    regularisation: float = Field(0.3, ge=0, description="lra: weight of the rounding regulariser")
    beta_start: float = Field(20.0, gt=0, description="lra: regulariser exponent during the first warm_up")
    beta_end: float = Field(2.0, gt=0, description="lra: regulariser exponent at the end")
    warm_up: float = Field(0.2, ge=0, le=1, description="lra: share of iterations before the exponent falls")
    stop_loss: float = Field(1e-8, ge=0, description="lra: stop a layer below this loss")
    samples: int = Field(1024, ge=1, description="most calibration samples used")
    batch_size: int = Field(8, ge=1, description="block: samples a step")
    code_rate: float = Field(0.01, gt=0, description="block: step size of the codes, in codes")
    scale_rate: float = Field(1e-3, ge=0, description="block: step size of scales, relative to them")
    bias_rate: float = Field(1e-4, ge=0, description="block: step size of biases")
    tuning: int = Field(0, ge=0, description="block: steps that train all layers together at the end; 0: none")
    tuning_rate: float = Field(0.005, gt=0, description="block: step size of the codes there, in codes")
    loss: Literal["block", "output"] = Field(
        "block", description="block: error of the block's output, or of the model's through its float rest"
    )


# Bit operations a sample: those of one width of weights and one of activations everywhere, or a number of them.
_NUMBER = r"0*[1-9]\d*(?:\.\d+)?|0*\.\d*[1-9]\d*"
COMPUTE = re.compile(
    rf"(?P<weights>{_NUMBER})\s*x\s*(?P<inputs>{_NUMBER})|(?P<number>{_NUMBER})\s*(?P<unit>[kmgt]?)(?:bops?)?"
)
NO_COMPUTE = 'is neither like "4x4" nor a number of bit operations ("20G")'


class ActivationsConfig(Settings):
    """Quantized activations (docs/METHOD.md, 8)."""

    bits: int = Field(4, ge=2, le=8, description="code width of layers' inputs and of the operands of products")
    method: Literal["uniform", "repq", "adalog"] = Field(
        "adalog",
        description="uniform: one range a tensor; repq: ranges a channel folded into LayerNorms, log-sqrt2 after "
        "softmax; adalog: as repq, with searched logarithms after softmax and GELU",
    )
    products: bool = Field(True, description="quantize the operands of attention's two matrix products too")
    first_bits: int = Field(8, ge=2, le=8, description="code width of pixels, where a convolution comes first")
    mixed: bool = Field(
        False, description="give smaller tensors more bits: the most with size x bits within that of the largest"
    )
    choices: list[int] = Field(
        [], description="code widths to choose each tensor's from, together with the layers' candidates; needs compute"
    )
    compute: str | None = Field(
        None,
        description='with choices: most bit operations a sample, as in "4x4" (those of 4-bit weights and activations) '
        'or "20G"',
    )
    percentiles: list[float] = Field(
        [0.999, 0.9999, 0.99999, 1.0], description="upper percentiles p of the ranges (1-p, p) tried"
    )
    samples: int = Field(32, ge=1, description="calibration samples that ranges are found on")

    _check_percentiles = field_validator("percentiles")(_checked_percentiles)

    @field_validator("choices")
    @classmethod
    def _check_choices(cls, value: list[int]) -> list[int]:
        return _bit_widths(value)

    @model_validator(mode="after")
    def _check(self) -> ActivationsConfig:
        if bool(self.choices) != (self.compute is not None):
            raise ValueError("choices and compute belong together")
        if self.compute is not None and not COMPUTE.fullmatch(self.compute.strip().lower()):
            raise ValueError(f"compute: {self.compute!r} {NO_COMPUTE}")
        if self.choices and self.bits not in self.choices:
            raise ValueError(f"bits, at which LayerNorms are folded, must be one of choices {self.choices}")
        if self.choices and self.mixed:
            raise ValueError("mixed gives widths by a rule, choices by measured costs: set one of them")
        return self


class EmbeddingsConfig(Settings):
    """Embedding tables as codes; they count in sizes of whole checkpoints, and in no budget of bits or per cent."""

    bits: Literal[4, 8] = Field(8, description="code width of every table that is quantized")
    smallest: int = Field(16384, ge=1, description="tables of fewer entries stay float")


class DaskConfig(Settings):
    """The cluster of runner dask: one that is started for the run, or one that runs already."""

    address: str | None = Field(None, description="scheduler of a running cluster, as in tcp://host:8786")
    cluster: str = Field(
        "distributed.LocalCluster", description="class of the cluster to start, such as dask_cuda.LocalCUDACluster"
    )
    arguments: dict[str, Any] = Field({}, description="its arguments, such as n_workers: 4")


class DockerConfig(Settings):
    """The containers of steps: docker. The folders and the store that a configuration names are mounted."""

    image: str = Field("mlorq:latest", description="image to run, as docker/Dockerfile builds it")
    memory: str | None = Field(None, description="most memory of a container, as in 8g")
    network: str | None = Field(None, description="network of the containers, as in host; default: Docker's own")
    volumes: list[str] = Field([], description="further mounts, HOST:CONTAINER or HOST:CONTAINER:ro")
    environment: list[str] = Field(
        [], description="further variables of this process to hand on, by name; those of object stores are"
    )
    user: str | None = Field(None, description="user the steps run as, uid[:gid]; default: the caller")

    @field_validator("memory")
    @classmethod
    def _check_memory(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[1-9]\d*[bkmgBKMG]?", value):
            raise ValueError("memory is a number of bytes, or one with a unit: 512m, 8g")
        return value

    @field_validator("volumes")
    @classmethod
    def _check_volumes(cls, value: list[str]) -> list[str]:
        for volume in value:
            host, _, rest = volume.partition(":")
            inside, _, mode = rest.partition(":")
            if not host.startswith("/") or not inside.startswith("/") or mode not in ("", "ro", "rw"):
                raise ValueError(f"{volume!r} is not of the form /HOST:/CONTAINER or /HOST:/CONTAINER:ro")
        return value


class EngineConfig(Settings):
    """Where steps run. Nothing here is part of any key."""

    runner: Literal["threads", "dask"] = Field(
        "threads", description="how fan-outs are spread: threads over this machine's devices, or a dask cluster"
    )
    devices: str | list[str] = Field("auto", description="auto, cpu, cuda, cuda:0, or a list of them")
    steps: Literal["inprocess", "subprocess", "docker"] = Field(
        "inprocess",
        description="where a step's work runs: in the flow's process, a child process a device, a container",
    )
    threads: int | None = Field(None, ge=1, description="CPU threads a step; default: as torch decides")
    cache: str | None = Field(
        "auto", description="folder that keeps what was read from a remote store; auto: the user's cache; null: none"
    )
    dask: DaskConfig = Field(DaskConfig(), description="the cluster of runner dask")
    docker: DockerConfig = Field(DockerConfig(), description="the containers of steps docker")


# -- sections with the choices and keys of what is registered -----------------------------------------------------


def registries_version() -> int:
    """A number that rises whenever something is registered that sections are made from."""
    return FAMILIES.version


def model_section() -> type[ModelConfig]:
    """``model``."""
    return _model_section(FAMILIES.version)


@cache
def _model_section(_: int) -> type[ModelConfig]:
    return composed(ModelConfig, FAMILIES, {"family": choices(FAMILIES)})


def source_section() -> type[SourceConfig]:
    """``data.calibration`` and ``data.evaluation``."""
    return SourceConfig


def rounding_section() -> type[RoundingConfig]:
    """``rounding``."""
    return RoundingConfig


def activations_section() -> type[ActivationsConfig]:
    """``activations``."""
    return ActivationsConfig


def search_section() -> type[SearchConfig]:
    """``search``."""
    return SearchConfig
