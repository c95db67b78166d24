"""A house in which a new form is one file: one addition of each kind, from outside the packages, through the pipeline.

docs/ARCHITECTURE.md sends readers here. Every addition is one class and one registration, in less than 60 lines.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import subprocess
import sys
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from pydantic import Field
from torch import nn

import mlorq
from flows.cli import main
from mlorq.activations.method import ACTIVATION_METHODS, ActivationMethod
from mlorq.activations.quantizers.base import QUANTIZER_KINDS, ActivationQuantizer
from mlorq.activations.settings import ActivationSettings
from mlorq.codecs.affine import AffineCodec
from mlorq.codecs.base import Codec, ZeroPoint
from mlorq.config.run import RunConfig, run_config
from mlorq.data.memory import from_batches
from mlorq.data.source import SOURCES, BatchSettings, DataSource
from mlorq.export_targets import TARGETS, ExportTarget
from mlorq.field_types import BitWidths
from mlorq.fitting.base import LayerFit
from mlorq.forms.base import FORMS, Candidate, Form, Shape
from mlorq.models.family import FAMILIES, Example, ModelFamily
from mlorq.registry import Registry, Settings
from mlorq.rounding.base import METHODS, InputSettings, Progress, RoundingMethod, RoundingResult, RoundingTask
from tests.nets import TokenNet, float_model, images

# -- a form: codes of W, and codes of what they leave ---------------------------------------------------------------


class ResidualSettings(Settings):
    """Candidates of form RQ."""

    residual_bits: BitWidths = Field([2, 3], description="bit-widths of both matrices")


class Residual(Form[ResidualSettings]):
    """``W ≈ Q_b + Q_c``: two matrices of codes."""

    name = "RQ"
    label = "two layers of codes"
    colour = "#7a3f9d"
    settings = ResidualSettings
    terms = (("coarse",), ("fine",))

    def enumerate(self, shape: Shape, settings: ResidualSettings) -> list[Candidate]:
        return [Candidate(self.name, bits=b, bits_a=c) for b in settings.residual_bits for c in settings.residual_bits]

    def candidate_id(self, candidate: Candidate) -> str:
        return f"RQ{candidate.bits}-{candidate.bits_a}"

    def codecs(self, candidate: Candidate, zero_point: ZeroPoint) -> dict[str, Codec]:
        if candidate.bits is None or candidate.bits_a is None:
            raise ValueError(f"incomplete candidate {candidate}")
        return {"coarse": AffineCodec(candidate.bits, zero_point), "fine": AffineCodec(candidate.bits_a, zero_point)}

    def sizes(self, candidate: Candidate, shape: Shape) -> dict[str, tuple[int, int]]:
        return dict.fromkeys(("coarse", "fine"), (shape.out_features, shape.in_features))

    def largest(self, shape: Shape) -> Candidate:
        return Candidate(self.name, bits=8, bits_a=8)

    def fit(self, fit: LayerFit, candidate: Candidate) -> dict[str, Any]:
        assert candidate.bits
        assert candidate.bits_a
        coarse = fit.codes(candidate.bits)
        rest = fit.of(fit.weight.float() - coarse.dequantize())
        return {"coarse": coarse, "fine": rest.codes(candidate.bits_a)}

    def local_costs(self, fit: LayerFit, candidates: Sequence[Candidate]) -> list[float]:
        return [fit.cost(self.dense(fit, candidate)) for candidate in candidates]

    def curve(self, candidate: Candidate) -> Hashable:
        return candidate.bits, candidate.bits_a


# -- a rounding method: nearest rounding of a slightly smaller weight --------------------------------------------------


class ShrunkSettings(InputSettings):
    """Keys of the method."""

    shrinkage: float = Field(0.01, ge=0, lt=1, description="share of the weight that is taken away")


class Shrunk(RoundingMethod[ShrunkSettings]):
    """Nearest rounding of ``(1 - shrinkage) W``."""

    name = "shrunk"
    title = "nearest rounding of a smaller weight"
    settings = layer_settings = ShrunkSettings

    def round(self, task: RoundingTask, settings: ShrunkSettings, progress: Progress | None = None) -> RoundingResult:
        from mlorq.forms.stored_layer import CompressedLayer

        parts = task.rounded(task.fit.of((1 - settings.shrinkage) * task.fit.weight))
        return RoundingResult(CompressedLayer.of_rounded(task.layer, task.candidate, parts))


# -- a model family --------------------------------------------------------------------------------------------------


class TinySettings(Settings):
    """Keys of the family."""

    width: int = Field(16, ge=1, description="channels of the network")


class Tiny(ModelFamily[TinySettings]):
    """Small networks of a fixed architecture."""

    name = "tiny"
    settings = TinySettings
    rebuilds = True

    def load(self, settings: TinySettings, *, dtype: str = "float32", folder: str = "") -> Any:
        torch.manual_seed(0)
        architecture = {"family": self.name, "width": settings.width}
        model = float_model(self.rebuild(architecture), ("blocks.0", "blocks.1"))
        model.family, model.architecture = self.name, architecture
        return model

    def rebuild(self, architecture: Mapping[str, Any]) -> nn.Module:
        return TokenNet(width=int(architecture["width"]), blocks=2)

    def example(self) -> Example:
        return Example({"width": 16}, {"calibration": {"source": "noise"}, "evaluation": {"source": "noise"}})


# -- a data source ---------------------------------------------------------------------------------------------------


class NoiseSettings(BatchSettings):
    """Keys of the source."""

    amount: int = Field(24, ge=1, description="samples that are drawn")


class Noise(DataSource[NoiseSettings]):
    """Random images."""

    name = "noise"
    settings = NoiseSettings

    def load(self, settings: NoiseSettings, role: Any, model: Any, folder: str, seed: int) -> Any:
        drawn = images(settings.amount, seed + (role == "evaluation"))
        return from_batches(list(drawn.split(settings.batch_size)), role)


# -- a method of quantizing activations, with a kind of quantizer of its own ---------------------------------------


class Sign(ActivationQuantizer):
    """Levels that are powers of two of the largest value, with a sign."""

    name = "sign"
    largest: torch.Tensor

    def __init__(self, bits: int, largest: torch.Tensor) -> None:
        super().__init__(bits)
        self.register_buffer("largest", largest.float())

    def rounded(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        inside = x.clamp(-self.largest, self.largest)
        code = (self.largest / inside.abs().clamp(min=1e-30)).log2().round().clamp(0, 2 ** (self.bits - 1) - 1)
        return inside, inside.sign() * self.largest * torch.exp2(-code)

    def describe(self) -> dict[str, Any]:
        return {"kind": self.name, "bits": self.bits}

    @classmethod
    def built(cls, description: Mapping[str, Any], tensors: Mapping[str, torch.Tensor] | None = None) -> Sign:
        return cls(int(description["bits"]), torch.ones(()) if tensors is None else tensors["largest"])


class PowersOfTwo(ActivationMethod[ActivationSettings]):
    """The quantizer above for every tensor."""

    name = "powers"
    about = "signed powers of two"
    settings = ActivationSettings

    def quantizer_for(self, observed: Any, bits: int, settings: ActivationSettings, *, by_channel: bool) -> Sign:
        return Sign(bits, observed.values.abs().max())


# -- an export target ------------------------------------------------------------------------------------------------


class ListingSettings(Settings):
    """Options of the target."""

    separator: str = Field("\t", description="between the columns")


class Listing(ExportTarget[ListingSettings]):
    """A text file with a line per layer."""

    name = "listing"
    title = "names and forms of the layers"
    settings = ListingSettings
    suffixes = (".txt",)

    def write(self, checkpoint: str, output: str, settings: ListingSettings) -> list[str]:
        from mlorq.checkpoint.io import inspect

        rows = [settings.separator.join((row["layer"], row["form"])) for row in inspect(checkpoint)["layers"]]
        Path(output).write_text("\n".join(rows))
        return [output]


# -- through the pipeline ----------------------------------------------------------------------------------------------

ADDITIONS: list[tuple[Registry[Any], Any]] = [
    (FORMS, Residual()),
    (METHODS, Shrunk()),
    (FAMILIES, Tiny()),
    (SOURCES, Noise()),
    (QUANTIZER_KINDS, Sign),
    (ACTIVATION_METHODS, PowersOfTwo()),
    (TARGETS, Listing()),
]
VALUES: dict[str, Any] = {
    "model": {"family": "tiny", "width": 16},
    "data": {"calibration": {"source": "noise", "batch_size": 8}, "evaluation": {"source": "noise", "amount": 16}},
    "budget": "7bit",
    "preset": "quick",
    "search": {
        "forms": ["Q", "RQ"],
        "bits": [8],
        "residual_bits": [2, 3],
        "sensitivity": "measured",
        "samples": 8,
        "hessian_mode": "exact",
    },
    "rounding": {"method": "shrunk", "shrinkage": 0.001},
    "activations": {"bits": 8, "method": "powers", "samples": 8},
    "export": [{"to": "listing", "separator": ": "}],
    "store": "file://./store",
    "engine": {"devices": "cpu", "threads": 1},
}


@pytest.fixture
def additions() -> Iterator[None]:
    with ExitStack() as stack:
        for registry, item in ADDITIONS:
            stack.enter_context(registry.added(item))
        yield


@pytest.fixture
def project(tmp_path: Path, additions: None) -> Path:
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(VALUES))
    return path


def printed(capsys: pytest.CaptureFixture[str], *argv: object) -> dict[str, Any]:
    capsys.readouterr()
    assert main([*map(str, argv), "--json"]) == 0, capsys.readouterr().err
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


@pytest.mark.parametrize("item", [item for _, item in ADDITIONS], ids=lambda item: item.name)
def test_an_addition_is_short(item: Any) -> None:
    kind = item if isinstance(item, type) else type(item)
    lines = len(inspect.getsource(kind).splitlines())
    if kind is not Sign:
        lines += len(inspect.getsource(kind.settings or item.settings).splitlines())
    assert lines < 60


def test_all_of_them_through_the_command_line(
    project: Path, capsys: pytest.CaptureFixture[str], prefect_server: str
) -> None:
    folder = project.parent
    plan = printed(capsys, "compress", project, "--dry-run")
    assert plan["budgets"][0]["feasible"]
    assert plan["model"] == "model"
    smallest = {row["layer"]: row["smallest_bytes"] for row in plan["layers"]}
    result = printed(capsys, "compress", project, "--output", folder / "out")
    chosen = {row["layer"]: row for row in result["allocation"]}
    residual = [row for row in chosen.values() if row["form"] == "RQ"]
    assert residual, "the form is chosen where 8 bits do not fit"
    assert all(row["candidate_id"].startswith("RQ") for row in residual)
    assert all(row["bytes"] >= smallest[name] for name, row in chosen.items())
    assert result["activations"] == {"bits": 8, "method": "powers"}
    assert 0 < result["nmse"] < 0.5

    module = mlorq.load(folder / "out")
    x = images(4, 5)
    assert torch.isfinite(module(x)).all()
    forms = {row["layer"]: row["form"] for row in printed(capsys, "inspect", folder / "out")["layers"]}
    assert forms == {name: row["form"] for name, row in chosen.items()}
    measured = printed(capsys, "evaluate", folder / "out", project)
    assert measured["nmse"] == pytest.approx(result["nmse"], rel=1e-6)

    (exported,) = result["exports"]
    assert plan["steps"]["export"]["compute"] == 1
    assert [file["name"] for file in exported["files"]] == ["model.txt"]
    written = Path(exported["files"][0]["uri"].removeprefix("file://")).read_text()
    assert written.splitlines() == [f"{name}: {form}" for name, form in forms.items()]
    (file,) = mlorq.export(folder / "out", folder / "layers.txt", separator=" ")
    assert Path(file).read_text().splitlines() == [f"{name} {form}" for name, form in forms.items()]
    assert main(["report", result["run"], str(project), "--output", str(folder / "page.html")]) == 0
    assert "RQ" in (folder / "page.html").read_text()

    methods = "shrunk,mlorq"
    rows = printed(capsys, "compare", project, "--methods", methods, "--budget", "8bit")["rows"]
    assert [row["method"] for row in rows] == methods.split(",")
    assert all("RQ" in next(key for key in row if " / " in key) for row in rows)
    assert rows[0]["title"] == Shrunk.title
    # The rerun of the same command computes nothing.
    assert printed(capsys, "compress", project)["steps"]["computed"] == 0


@pytest.mark.parametrize(
    ("left_out", "changes"),
    [
        ("RQ", {"search": {"forms": ["Q", "LR"]}}),
        ("shrunk", {"rounding": {"method": "block", "iterations": 4, "tuning": 2}}),
        ("powers", {"activations": None}),
        ("tiny", {"activations": None, "rounding": {"method": "lra", "iterations": 4}}),
    ],
)
def test_each_works_with_what_is_there(left_out: str, changes: dict[str, Any], additions: None) -> None:
    """Every addition but one, beside the software's own forms and methods, from Python."""
    torch.manual_seed(0)
    module, batches = TokenNet(width=16, blocks=2), list(images(24, 1).split(8))
    activations = changes.get("activations", VALUES["activations"])
    rounding = changes.get("rounding", VALUES["rounding"])
    result = mlorq.compress(
        module,
        batches,
        budget="7bit",
        preset="quick",
        rounding=rounding["method"],
        activations=activations,
        search={key: value for key, value in VALUES["search"].items()} | changes.get("search", {}),
        device="cpu",
    )
    assert 0 < result.metrics["nmse"] < 1
    assert left_out == "RQ" or "RQ" in result.allocation["form"].to_pylist()


def test_the_configuration_offers_them(additions: None, capsys: pytest.CaptureFixture[str]) -> None:
    schema = json.dumps(run_config().model_json_schema())
    for _, item in ADDITIONS:
        if item not in (Sign,) and not isinstance(item, ExportTarget):
            assert f'"{item.name}"' in schema
    assert "residual_bits" in schema
    assert main(["init", "--model", "tiny"]) == 0
    shown = capsys.readouterr().out
    assert "family: tiny" in shown
    assert "residual_bits" in shown
    assert RunConfig.from_mapping(VALUES).rounding.own == ShrunkSettings(shrinkage=0.001)


PLUGIN = """
from mlorq.export_targets import TARGETS, ExportTarget
from mlorq.registry import Settings

class Plugged(ExportTarget):
    name, title, settings = "plugged", "from another package", Settings

    def write(self, checkpoint, output, settings):
        return []

TARGETS.register(Plugged())
"""
ENTRY_POINT = "[mlorq.plugins]\nmine = my_targets\n"


def test_an_installed_package_adds_to_the_registries(tmp_path: Path) -> None:
    """In a process of its own, as a child process or a container that runs steps does it."""
    installed = tmp_path / "my_targets-1.0.dist-info"
    installed.mkdir()
    (installed / "METADATA").write_text("Metadata-Version: 2.1\nName: my-targets\nVersion: 1.0\n")
    (installed / "entry_points.txt").write_text(ENTRY_POINT)
    module = tmp_path / "my_targets.py"
    module.write_text(PLUGIN)
    paths = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[1])])

    def run(code: str) -> str:
        environment = {**os.environ, "PYTHONPATH": paths}
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        return done.stdout.strip()

    assert run("from mlorq.export_targets import TARGETS; print(TARGETS['plugged'].title)") == "from another package"
    module.write_text("import a_module_that_is_missing")
    failing = """
from mlorq.errors import ConfigError
from mlorq.export_targets import TARGETS
try:
    TARGETS.names()
except ConfigError as error:
    print(error)
"""
    message = run(failing)
    assert message.startswith("plugin mine (my_targets) cannot be imported")
    assert "a_module_that_is_missing" in message


def test_the_map_names_what_is_there() -> None:
    """Files and registries that docs/ARCHITECTURE.md sends people to exist, and every folder is on the map."""
    root = Path(__file__).parents[1]
    text = (root / "docs" / "ARCHITECTURE.md").read_text()
    for path in re.findall(r"`((?:mlorq|steps|flows|tests|scripts)/[\w/]+\.py)`", text):
        assert (root / path).is_file(), path
    registered = set(re.findall(r"`([A-Z_]+)\.register\(", text))
    registries = {"FORMS", "METHODS", "FAMILIES", "SOURCES", "ACTIVATION_METHODS", "TARGETS", "RUNTIMES"}
    assert registered == registries
    folders = {folder.name for folder in (root / "mlorq").iterdir() if (folder / "__init__.py").exists()}
    assert folders <= set(re.findall(r"^  (\w+)/", text, re.MULTILINE))


def test_afterwards_they_are_gone() -> None:
    for registry, item in ADDITIONS:
        assert item.name not in registry
    with pytest.raises(mlorq.errors.ConfigError, match="Input should be"):
        RunConfig.from_mapping(VALUES)
