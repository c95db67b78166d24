"""The sections of a configuration: what each key means, its default, and what it may be (``mlorq.config.run``)."""

from __future__ import annotations

import re
from functools import cache
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, create_model, field_validator, model_validator

from mlorq.activations.method import ACTIVATION_METHODS
from mlorq.activations.settings import ActivationSettings
from mlorq.codecs.base import Accounting, Storage
from mlorq.config.compose import Choice, choices, composed, keys_of, limited, part
from mlorq.data.source import SOURCES, Role
from mlorq.fitting.settings import FitSettings
from mlorq.forms import FORMS
from mlorq.models.family import FAMILIES
from mlorq.registry import Registry, Settings
from mlorq.rounding import METHODS

Sensitivity = Literal["measured", "auto", "closed_form", "local"]
Cost = Literal["nmse", "kl", "task"]


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


class SourceConfig(Choice):
    """One data source."""

    chooser = "source"
    registry = SOURCES

    source: str = Field(description="kind of source")

    def check(self) -> None:
        """Refuse missing keys, and keys that the source must not ignore."""
        SOURCES[self.source].check(self)


class DataConfig(Settings):
    """Calibration data (what the search sees) and evaluation data (what the metric is measured on)."""

    calibration: SourceConfig
    evaluation: SourceConfig

    @model_validator(mode="after")
    def _check(self) -> DataConfig:
        parts: tuple[tuple[Role, SourceConfig], ...] = (
            ("calibration", self.calibration),
            ("evaluation", self.evaluation),
        )
        for role, section in parts:
            try:
                SOURCES[section.source].check_role(section.own, role)
            except ValueError as error:
                raise ValueError(f"{role}.{error}") from None
        return self


class LayerConfig(Settings):
    """Candidates of single layers (a value of ``search.layers``); keys that are null are as in ``search``."""

    forms: list[str] | None = Field(None, description="what the layer may become")

    @model_validator(mode="after")
    def _check(self) -> LayerConfig:
        if self.forms is not None:
            _require_uniform(self.forms)
        for form in FORMS:
            keys = form.settings.model_fields
            given = {key: value for key in keys if (value := getattr(self, key, None)) is not None}
            form.settings.model_validate(given).check()
        return self


class SearchConfig(FitSettings):
    """Candidates, their costs, and the integer program (docs/METHOD.md, 1-5)."""

    forms: list[str] = Field(
        default_factory=lambda: [form.name for form in FORMS if form.by_default], description="what a layer may become"
    )
    token_weights: bool | Annotated[float, Field(ge=0, le=1)] = Field(
        False,
        description="with moments: tokens weighted by their effect on the output; a number: the power of the weights",
    )
    hessian_samples: int = Field(32, ge=1, description="calibration samples for the label-free Hessian")
    hessian_probes: int = Field(32, ge=1, description="most Gaussian probes per batch")
    hessian_min_probes: int = Field(10, ge=1, description="probes before convergence is checked")
    hessian_tolerance: float = Field(1e-4, ge=0, description="stop at this relative change of the estimate")
    hessian_mode: Literal["auto", "probes", "exact"] = Field(
        "auto", description="exact: one backward pass per output; auto: exact where that needs fewer passes"
    )
    sensitivity: Sensitivity = Field(
        "measured",
        description="how local costs become global ones: measured (the paper's); auto (closed forms, scaled by "
        "measurements where the allocation is decided); closed_form (scaled by one measurement per form); local (local "
        "costs are used as they are, as where every layer has one candidate)",
    )
    samples: int = Field(64, ge=1, description="calibration samples for measured costs")
    points: int = Field(
        5, ge=2, description="candidates measured per layer and curve (pair of factor bit-widths); auto: most per form"
    )
    tolerance: float = Field(
        0.2, ge=0, description="auto: no further measurements where costs were predicted this well (as a logarithm)"
    )
    cost: Cost = Field(
        "nmse",
        description="global cost: nmse of the output; kl of the predictions; task, the rise of the task's loss, "
        "which needs labels of the calibration data",
    )
    rounds: int = Field(
        0, ge=0, description="how often the chosen allocation is measured and the program solved again around it"
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
        "patterns that match, the one with more letters outside wildcards decides, key by key",
    )

    @property
    def storage(self) -> Storage:
        """How matrices are stored and counted."""
        return Storage(self.accounting, self.zero_point)

    @property
    def fit(self) -> FitSettings:
        """The keys that decide the matrices of a given candidate."""
        return part(self, FitSettings)

    @property
    def form_settings(self) -> dict[str, Settings]:
        """The settings of every form that layers may take, by name, in the order of the registry."""
        return {form.name: part(self, form.settings) for form in FORMS if form.name in self.forms}

    @model_validator(mode="after")
    def _check(self) -> SearchConfig:
        _require_uniform(self.forms)
        for settings in self.form_settings.values():
            settings.check()
        return self


def _require_uniform(forms: list[str]) -> None:
    uniform = [form.name for form in FORMS if form.uniform]
    if not set(uniform) & set(forms):
        raise ValueError(f"forms must have {' or '.join(uniform)}, which serves every layer")


class RoundingConfig(Choice):
    """How the chosen candidates' codes are found (docs/METHOD.md, 6)."""

    chooser = "method"
    registry = METHODS

    method: str = Field("lra", description="how codes are found")


class ActivationsConfig(ActivationSettings, Choice):
    """Quantized activations (docs/METHOD.md, 8)."""

    chooser = "method"
    registry = ACTIVATION_METHODS


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
    return sum(registry.version for registry in (FAMILIES, SOURCES, FORMS, METHODS, ACTIVATION_METHODS))


def model_section() -> type[ModelConfig]:
    """``model``."""
    return _model_section(FAMILIES.version)


@cache
def _model_section(_: int) -> type[ModelConfig]:
    return composed(ModelConfig, FAMILIES, {"family": choices(FAMILIES)})


def source_section() -> type[SourceConfig]:
    """``data.calibration`` and ``data.evaluation``."""
    return composed(SourceConfig, SOURCES, {"source": choices(SOURCES)})


def rounding_section() -> type[RoundingConfig]:
    """``rounding``, with the keys of all methods."""
    about = "; ".join(f"{method.name}: {method.title}" for method in METHODS)
    return composed(RoundingConfig, METHODS, {"method": choices(METHODS)}, {"method": about})


def activations_section() -> type[ActivationsConfig]:
    """``activations``."""
    about = "; ".join(f"{method.name}: {method.about}" for method in ACTIVATION_METHODS)
    named: Any = Annotated[choices(ACTIVATION_METHODS), Field(description=about)]
    return composed(ActivationsConfig, ACTIVATION_METHODS, {"method": named})


def search_section() -> type[SearchConfig]:
    """``search``, with the keys of all forms; those of a layer can be null."""
    names: Any = list[Literal[tuple(FORMS.names())]]  # type: ignore[misc]
    keys = {
        key: (limited(info) | None, Field(None, description=about)) for key, (info, about) in keys_of(FORMS).items()
    }
    fields: Any = {"forms": (names | None, LayerConfig.model_fields["forms"]), **keys}
    layer = create_model("LayerConfig", __base__=LayerConfig, __doc__=LayerConfig.__doc__, **fields)
    return composed(SearchConfig, FORMS, {"forms": names, "layers": dict[str, layer]})
