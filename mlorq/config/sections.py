"""The sections of a configuration: meaning, default and valid values of each key (``mlorq.config.run``)."""

from __future__ import annotations

import re
from functools import cache
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from pydantic import Field, create_model, field_validator, model_validator

from mlorq.activations.method import ACTIVATION_METHODS
from mlorq.activations.settings import ActivationSettings
from mlorq.codecs.base import Accounting, Storage
from mlorq.config.budget import size_bytes
from mlorq.config.compose import Choice, choices, composed, keys_of, limited, part, require_known
from mlorq.data.source import SOURCES, Role
from mlorq.export_targets import TARGETS
from mlorq.fitting.settings import FitSettings
from mlorq.forms import FORMS
from mlorq.models.family import FAMILIES
from mlorq.registry import Registry, Settings
from mlorq.rounding import METHODS
from mlorq.runtimes import RUNTIMES

Sensitivity = Literal["measured", "first_order", "closed_form", "local"]
Cost = Literal["nmse", "kl", "task"]
TableBits = Literal[2, 4, 8]


class ModelConfig(Choice):
    """The float model: its family, its name in that family, and the source of its weights."""

    chooser: ClassVar[str] = "family"
    registry: ClassVar[Registry[Any]] = FAMILIES

    family: str = Field(description="model family: the library that builds the model")
    dtype: Literal["float32", "float16", "bfloat16"] = Field("float32", description="dtype the model runs in")
    rotation: int | None = Field(
        None,
        ge=0,
        description="seed of a random rotation of the residual stream, folded into the weights (pre-norm ViT, DeiT); "
        "null: no rotation",
    )

    @property
    def display_name(self) -> str:
        """A short name of the model, for display and file names."""
        return FAMILIES[self.family].display_name(self.own)

    def check(self) -> None:
        """Check that the family supports the rotation.

        Raises:
            ValueError: ``rotation`` is set and the family does not support it.
        """
        if self.rotation is not None and not FAMILIES[self.family].rotates:
            allowed = ", ".join(family.name for family in FAMILIES if family.rotates)
            raise ValueError(
                f"family {self.family} does not support rotation: leave rotation out, or use a pre-norm vision "
                f"transformer (families {allowed})"
            )


class SourceConfig(Choice):
    """The choice of a data source and its settings."""

    chooser = "source"
    registry = SOURCES

    source: str = Field(description="kind of source")

    def check(self) -> None:
        """Check the keys of the section against the source.

        Raises:
            ValueError: a key that the source needs is missing, or a key is set that it does not read.
        """
        SOURCES[self.source].check(self)


class DataConfig(Settings):
    """Calibration data (read by the search) and evaluation data (for the metric)."""

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
    """Candidates of single layers (a value of ``search.layers``); a null key takes its value from ``search``."""

    forms: list[str] | None = Field(None, description="forms that the layer may take")

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
    """Candidates, their costs, and the ILP (docs/METHOD.md, 1, 3-5 and 7)."""

    forms: list[str] = Field(
        default_factory=lambda: [form.name for form in FORMS if form.by_default],
        description="forms that a layer may take",
    )
    token_weights: bool | Annotated[float, Field(ge=0, le=1)] = Field(
        False,
        description="with metric moments: weight tokens by their effect on the output; a number: exponent of the "
        "weights",
    )
    hessian_samples: int = Field(32, ge=1, description="calibration samples for the label-free Hessian")
    hessian_probes: int = Field(32, ge=1, description="maximum number of Gaussian probes per batch")
    hessian_min_probes: int = Field(10, ge=1, description="probes per batch before convergence is checked")
    hessian_tolerance: float = Field(
        1e-4, ge=0, description="relative change of the estimate below which no more probes are drawn"
    )
    hessian_mode: Literal["auto", "probes", "exact"] = Field(
        "auto",
        description="probes: one backward pass per probe; exact: one backward pass per output; auto: the one with "
        "fewer passes",
    )
    sensitivity: Sensitivity = Field(
        "measured",
        description="global costs of candidates: measured (as in the paper); first_order (to first order in the "
        "change of the weight, corrected by a few measurements); closed_form (local costs times one measured factor "
        "per layer); local (local costs as they are)",
    )
    samples: int = Field(64, ge=1, description="calibration samples for measured costs")
    points: int = Field(
        5,
        ge=2,
        description="candidates measured per layer: with sensitivity measured, per pair of factor bit-widths; with "
        "first_order, at most, per form",
    )
    cost: Cost = Field(
        "nmse",
        description="global cost: nmse: NMSE of the output; kl: KL divergence of the predictions; task: increase of "
        "the task loss (needs labelled calibration data)",
    )
    accounting: Accounting = Field(
        "exact", description="memory of a candidate: exact: bytes on disk; paper: bits of the weights alone"
    )
    objective: Literal["nsr", "sqnr"] = Field(
        "nsr", description="nsr: minimise the sum of NMSE; sqnr: maximise the sum of 1/NMSE"
    )
    solver: Literal["exact", "highs", "cbc"] = Field(
        "exact",
        description="ILP solver: exact: dynamic programming with Lagrangian bounds, or highs for programs that choose "
        "bit-widths of activations; highs, cbc: branch and bound",
    )
    time_limit: float = Field(120.0, gt=0, description="time limit of the solver in seconds")
    gap: float = Field(1e-4, ge=0, description="relative optimality gap at which the solver may stop")
    include: list[str] = Field(["*"], description="name patterns of the layers to compress")
    exclude: list[str] = Field([], description="name patterns of layers not to compress; wins over include")
    layers: dict[str, LayerConfig] = Field(
        {},
        description="candidates of single layers by name pattern, for example {head: {bits: [8], forms: [Q]}}; for "
        "each key the matching pattern with the most characters outside wildcards wins",
    )

    @property
    def storage(self) -> Storage:
        """How matrices are stored and their bytes counted."""
        return Storage(self.accounting, self.zero_point)

    @property
    def fit(self) -> FitSettings:
        """The keys that determine the matrices of a given candidate."""
        return part(self, FitSettings)

    @property
    def form_settings(self) -> dict[str, Settings]:
        """Settings of every form in ``forms``, by name, in the order of the registry."""
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
        raise ValueError(f"forms must include {' or '.join(uniform)}, which every layer can take")


class RoundingConfig(Choice):
    """Rounding of the chosen candidates (docs/METHOD.md, 6, 7 and 9)."""

    chooser = "method"
    registry = METHODS

    method: str = Field("lra", description="rounding method")


class ActivationsConfig(ActivationSettings, Choice):
    """Quantized activations (docs/METHOD.md, 8)."""

    chooser = "method"
    registry = ACTIVATION_METHODS


class EmbeddingsConfig(Settings):
    """Quantized embedding tables (docs/METHOD.md, 2).

    They count towards budgets in bytes of the whole checkpoint, not towards budgets in bits or per cent.
    """

    bits: TableBits | Literal["auto"] = Field(
        8,
        description="bit-width of the quantized tables; auto: of each table, chosen together with the layers' "
        "candidates for budgets in bytes (8 for others)",
    )
    smallest: int = Field(16384, ge=1, description="tables with fewer entries stay float")


class ExportConfig(Choice):
    """Files that a run writes from its checkpoint, and the options of their target."""

    chooser = "to"
    registry = TARGETS

    to: str = Field(description="export target")

    @property
    def own(self) -> Settings:
        """The options of the target."""
        target = TARGETS[self.to]
        return part(self, target.configured or target.settings)

    def check(self) -> None:
        """Check that the target has the options that are set.

        Raises:
            ValueError: it does not have one.
        """
        require_known(self, type(self.own), f"target {self.to}")


class DaskConfig(Settings):
    """The cluster of runner dask: started for the run, or already running."""

    address: str | None = Field(None, description="scheduler of a running cluster, for example tcp://host:8786")
    cluster: str = Field(
        "distributed.LocalCluster", description="class of the cluster to start, such as dask_cuda.LocalCUDACluster"
    )
    arguments: dict[str, Any] = Field({}, description="arguments of that class, for example n_workers: 4")


class RayConfig(Settings):
    """The cluster of runner ray: started for the run on this machine, or already running."""

    address: str | None = Field(None, description="a running cluster, for example ray://host:10001, or auto")
    cpus: float = Field(1.0, gt=0, description="CPUs that a step takes")
    arguments: dict[str, Any] = Field({}, description="arguments of ray.init, for example num_cpus: 4")


class DockerConfig(Settings):
    """The containers of ``steps: docker``. The folders and the store of the configuration are mounted."""

    image: str = Field("mlorq:latest", description="image to run; docker/Dockerfile builds it")
    memory: str | None = Field(None, description="memory limit per container, for example 8g")
    network: str | None = Field(
        None, description="network of the containers, for example host; default: Docker's default network"
    )
    volumes: list[str] = Field([], description="additional mounts, HOST:CONTAINER or HOST:CONTAINER:ro")
    environment: list[str] = Field(
        [],
        description="names of additional environment variables to pass on; those of object stores are always passed",
    )
    user: str | None = Field(None, description="user that the steps run as, uid[:gid]; default: the caller")

    @field_validator("memory")
    @classmethod
    def _check_memory(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"[1-9]\d*[bkmgBKMG]?", value):
            raise ValueError("memory must be a number of bytes, or a number with a unit: 512m, 8g")
        return value

    @field_validator("volumes")
    @classmethod
    def _check_volumes(cls, value: list[str]) -> list[str]:
        for volume in value:
            host, _, rest = volume.partition(":")
            inside, _, mode = rest.partition(":")
            if not host.startswith("/") or not inside.startswith("/") or mode not in ("", "ro", "rw"):
                raise ValueError(f"volume {volume!r} must have the form /HOST:/CONTAINER or /HOST:/CONTAINER:ro")
        return value


class EngineConfig(Settings):
    """Where steps run. No key of an artifact depends on this section."""

    runner: Literal["threads", "dask", "ray"] = Field(
        "threads",
        description="parallel tasks run in: threads over this machine's devices; dask, ray: a cluster of that kind",
    )
    devices: str | list[str] = Field("auto", description="auto, cpu, cuda, cuda:0, or a list of them")
    steps: Literal["inprocess", "subprocess", "docker"] = Field(
        "inprocess",
        description="where a step runs: inprocess: in the flow's process; subprocess: one child process per device; "
        "docker: in a container",
    )
    device_slots: int | None = Field(
        None,
        ge=1,
        description="steps that run at once on a device of a machine, of all runs on a Prefect server; null: any",
    )
    threads: int | None = Field(None, ge=1, description="CPU threads per step; default: torch's choice")
    memory: str | None = Field(
        None,
        description="memory for the sums of step capture, for example 8GB, which takes as many passes over the "
        "calibration data as they need; default: half of the free memory",
    )
    weights: str | None = Field(
        None,
        description="memory for the weights of the float model, for example 1GB, on the device cpu; the others wait in "
        "a temporary file (folder TMPDIR); default: all weights are in memory",
    )
    cache: str | None = Field(
        "auto", description="local cache folder for a remote store; auto: in the user's cache; null: no cache"
    )
    dask: DaskConfig = Field(DaskConfig(), description="the cluster of runner dask")
    ray: RayConfig = Field(RayConfig(), description="the cluster of runner ray")
    docker: DockerConfig = Field(DockerConfig(), description="the containers of steps docker")

    @field_validator("memory", "weights")
    @classmethod
    def _check_memory(cls, value: str | None) -> str | None:
        if value is not None and size_bytes(value) < 1:
            raise ValueError("expected at least one byte")
        return value

    @property
    def memory_bytes(self) -> int | None:
        """``memory`` in bytes; None: as much as is free."""
        return None if self.memory is None else size_bytes(self.memory)

    @property
    def weights_bytes(self) -> int | None:
        """``weights`` in bytes; None: all weights are in memory."""
        return None if self.weights is None else size_bytes(self.weights)


# -- sections with the choices and keys of all registered implementations -----------------------------------------


def registries_version() -> int:
    """A number that increases at every change of a registry that sections are composed from."""
    registries = (FAMILIES, SOURCES, FORMS, METHODS, ACTIVATION_METHODS, TARGETS, RUNTIMES)
    return sum(registry.version for registry in registries)


def model_section() -> type[ModelConfig]:
    """The class of ``model``, with the keys of all families."""
    return _model_section(FAMILIES.version)


@cache
def _model_section(_: int) -> type[ModelConfig]:
    return composed(ModelConfig, FAMILIES, {"family": choices(FAMILIES)})


def source_section() -> type[SourceConfig]:
    """The class of ``data.calibration`` and ``data.evaluation``, with the keys of all sources."""
    return composed(SourceConfig, SOURCES, {"source": choices(SOURCES)})


def rounding_section() -> type[RoundingConfig]:
    """The class of ``rounding``, with the keys of all methods."""
    about = "; ".join(f"{method.name}: {method.title}" for method in METHODS)
    return composed(RoundingConfig, METHODS, {"method": choices(METHODS)}, {"method": about})


def activations_section() -> type[ActivationsConfig]:
    """The class of ``activations``, with the keys of all methods."""
    about = "; ".join(f"{method.name}: {method.about}" for method in ACTIVATION_METHODS)
    named: Any = Annotated[choices(ACTIVATION_METHODS), Field(description=about)]
    return composed(ActivationsConfig, ACTIVATION_METHODS, {"method": named})


class _Options(NamedTuple):
    name: str
    settings: type[Settings]


def export_section() -> type[ExportConfig]:
    """The class of the entries of ``export``, with the options of all targets."""
    options = [_Options(target.name, target.configured or target.settings) for target in TARGETS]
    about = "; ".join(f"{target.name}: {target.title}" for target in TARGETS)
    return composed(ExportConfig, options, {"to": choices(TARGETS)}, {"to": about})


def search_section() -> type[SearchConfig]:
    """The class of ``search``, with the keys of all forms; in ``search.layers`` they can be null."""
    names: Any = list[Literal[tuple(FORMS.names())]]  # type: ignore[misc]
    keys = {
        key: (limited(info) | None, Field(None, description=about)) for key, (info, about) in keys_of(FORMS).items()
    }
    fields: Any = {"forms": (names | None, LayerConfig.model_fields["forms"]), **keys}
    layer = create_model("LayerConfig", __base__=LayerConfig, __doc__=LayerConfig.__doc__, **fields)
    return composed(SearchConfig, FORMS, {"forms": names, "layers": dict[str, layer]})
