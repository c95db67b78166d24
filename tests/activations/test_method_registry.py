"""Methods of quantizing activations and kinds of quantizers: what is built in, and what is added from outside."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from copy import deepcopy
from typing import Any

import pytest
import torch
from pydantic import Field
from torch import Tensor

import mlorq
from mlorq.activations.calibrate import calibrate
from mlorq.activations.method import ACTIVATION_METHODS, ActivationMethod
from mlorq.activations.plan import ActivationPlan, quantizers_of
from mlorq.activations.quantizers import QUANTIZER_KINDS, ActivationQuantizer, build, fit_uniform
from mlorq.activations.settings import ActivationSettings
from mlorq.activations.survey import Observed
from mlorq.config.run import RunConfig
from mlorq.errors import ConfigError
from mlorq.models import from_module
from mlorq.models.layers import find_layers
from tests import zoo


class RootQuantizer(ActivationQuantizer):
    """Levels evenly spaced in ``√|x|``: ``|x̄| = s r²`` with ``r = round(c √(|x| / s)) / c``, ``c = 2^(b-1) - 1``."""

    name = "root"
    scale: Tensor

    def __init__(self, bits: int, scale: Tensor) -> None:
        super().__init__(bits)
        self.register_buffer("scale", scale)

    def rounded(self, x: Tensor) -> tuple[Tensor, Tensor]:
        codes, inside = 2 ** (self.bits - 1) - 1, torch.minimum(torch.maximum(x, -self.scale), self.scale)
        root = ((inside.abs() / self.scale).sqrt() * codes).round() / codes
        return inside, self.scale * root.square() * inside.sign()

    @classmethod
    def built(cls, description: Mapping[str, Any], tensors: Mapping[str, Tensor] | None) -> RootQuantizer:
        return cls(int(description["bits"]), (tensors or {"scale": torch.ones(())})["scale"])


class RootSettings(ActivationSettings):
    """Keys of the method below."""

    spread: float = Field(4.0, gt=0, description="largest level, in root mean squares")

    def check(self) -> None:
        super().check()
        if self.spread > 8 and self.bits < 4:
            raise ValueError("spread above 8 needs bits of 4 and more")


class Root(ActivationMethod[RootSettings]):
    """Root levels for layers' inputs, one range for operands of products; notes what it is asked."""

    name = "root"
    about = "levels of square roots"
    settings = RootSettings

    def __init__(self, **flags: bool) -> None:
        self.asked: list[tuple[str, bool]] = []
        for flag, value in flags.items():
            setattr(self, flag, value)

    def quantizer_for(
        self, observed: Observed, bits: int, settings: RootSettings, *, by_channel: bool
    ) -> ActivationQuantizer:
        self.asked.append((observed.name, by_channel))
        if not observed.layers:
            return fit_uniform(observed.values, bits, settings.percentiles)
        return RootQuantizer(bits, settings.spread * observed.values.square().mean().sqrt())


@pytest.fixture
def root() -> Iterator[Root]:
    with ACTIVATION_METHODS.added(Root()) as method, QUANTIZER_KINDS.added(RootQuantizer):
        yield method


def configuration(**activations: Any) -> RunConfig:
    source = {"source": "image_folder", "root": "images"}
    return RunConfig.from_mapping(
        {
            "model": {"family": "timm", "name": "vit_tiny_patch16_224", "checkpoint": "w.safetensors"},
            "data": {"calibration": source, "evaluation": source},
            "activations": activations,
        }
    )


def vit(seed: int):
    module, batches = zoo.timm_model(zoo.VIT, zoo.VIT_ARGUMENTS, seed), [zoo.pixels(4, seed + at) for at in range(2)]
    model = from_module(module)
    return module, batches, model, find_layers(model, batches[0]).layers


def test_a_method_from_outside_is_configured_as_the_built_in_ones_are(root: Root) -> None:
    found = configuration(method="root", spread=2, bits=5)
    assert found.activations is not None
    assert found.activations.own == RootSettings(method="root", spread=2, bits=5)
    assert RunConfig.from_mapping(json.loads(json.dumps(found.model_dump(mode="json", exclude={"folder"})))) == found
    described = type(found.activations).model_fields
    assert described["spread"].description == "root: largest level, in root mean squares"
    assert "root: levels of square roots" in str(described["method"].description)
    with pytest.raises(ConfigError, match=r"activations\.spread"):
        configuration(method="root", spread=0)
    with pytest.raises(ConfigError, match="activations: spread above 8 needs"):
        configuration(method="root", spread=9, bits=3)
    with pytest.raises(ConfigError, match="activations: choices and compute belong together"):
        configuration(method="root", choices=[4, 8])
    # What a method does not read is not among its settings, and so not in the key of its step.
    other = configuration(method="repq", spread=9, bits=3).activations
    assert other is not None
    assert "spread" not in other.own.model_dump()


def test_a_method_that_is_gone_is_unknown() -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'activations\.spread'"):
        configuration(spread=2)
    with pytest.raises(ConfigError, match=r"activations\.method.*'adalog'.*'root'"):
        configuration(method="root")
    with pytest.raises(ConfigError, match="unknown activation quantization method 'rep'; did you mean 'repq'"):
        ACTIVATION_METHODS["rep"]
    with pytest.raises(ValueError, match="unknown activation quantizer 'unifrm'; did you mean 'uniform'"):
        build({"kind": "unifrm", "bits": 4})


def test_a_plan_with_a_kind_from_outside_is_json_and_tensors(root: Root, seed: int) -> None:
    module, batches, model, layers = vit(seed)
    settings = RootSettings(method="root", spread=3, bits=6, choices=[4, 6], compute="4x6")
    plan = calibrate(model, layers, batches, settings)
    assert not plan.folds
    kinds = {site.quantizer["kind"] for site in plan.sites if site.layers}
    assert kinds == {"root"}
    assert {tuple(site.variants) for site in plan.sites} == {("4",), ()}, "pixels have no choice"
    again = ActivationPlan.from_json(json.loads(json.dumps(plan.to_json())), plan.tensors)
    assert again == plan
    again.check()
    group = next(site.group for site in plan.sites if site.layers and site.variants)
    outputs = []
    for one in (plan, again, again.at({group: 4})):
        copy = deepcopy(module)
        one.install(copy)
        assert len(quantizers_of(copy)) == len(plan.sites)
        with torch.no_grad():
            outputs.append(copy(batches[0]))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])
    with torch.no_grad():
        assert not torch.equal(outputs[0], module(batches[0]))
    # A checkpoint's modules have blank quantizers, which its tensors fill.
    blank = deepcopy(module)
    ActivationPlan.from_json(plan.to_json()).install(blank)
    filled = deepcopy(module)
    plan.install(filled)
    blank.load_state_dict(filled.state_dict())
    with torch.no_grad():
        assert torch.equal(blank(batches[0]), outputs[0])


def test_a_plan_whose_kind_is_gone_names_it() -> None:
    plan = ActivationPlan.from_json(
        {
            "sites": [{"name": "head", "layers": ["head"], "size": 4, "quantizer": {"kind": "root", "bits": 4}}],
            "folds": [],
        }
    )
    with pytest.raises(ValueError, match="unknown activation quantizer 'root'"):
        plan.check()


@pytest.mark.parametrize("folds", [False, True])
@pytest.mark.parametrize("per_channel", [False, True])
def test_what_a_method_says_of_itself_is_done(folds: bool, per_channel: bool, seed: int) -> None:
    module, batches, _, _ = vit(seed)
    # What the second block's output projection reads differs by channel.
    module.blocks[1].attn.qkv.weight.data[2 * 32 + 3] *= 100
    model = from_module(module)
    layers = find_layers(model, batches[0]).layers
    method = Root(folds_norms=folds, per_channel=per_channel)
    seen: list[tuple[int, int]] = []
    with ACTIVATION_METHODS.added(method), QUANTIZER_KINDS.added(RootQuantizer):
        settings = RootSettings(method="root")
        plan = calibrate(model, layers, batches, settings, progress=lambda *at: seen.append(at))
    assert len(plan.folds) == (4 if folds else 0)
    asked = dict(method.asked)
    assert asked["blocks.1.attn.proj"] is per_channel
    assert not any(asked.values()) or per_channel
    folded = {fold.layers[0] for fold in plan.folds}
    assert folded.isdisjoint(asked)
    assert {site.name for site in plan.sites} == folded | set(asked)
    assert seen == [(1, 2), (2, 2)]


def test_tokens_are_weighed_where_a_method_asks_for_it(seed: int) -> None:
    _, batches, model, layers = vit(seed)

    def found(weighs: bool) -> tuple[ActivationPlan, list[tuple[int, int]]]:
        seen: list[tuple[int, int]] = []
        with ACTIVATION_METHODS.added(Root(weighs_tokens=weighs)), QUANTIZER_KINDS.added(RootQuantizer):
            settings = RootSettings(method="root")
            return calibrate(model, layers, batches, settings, progress=lambda *at: seen.append(at)), seen

    (alike, quick), (weighed, slow) = found(False), found(True)
    assert quick == [(1, 2), (2, 2)]
    assert slow == [(3, 8), (6, 8), (7, 8), (8, 8)], "a forward and two backward passes weigh the tokens of a batch"
    inputs = [f"site.{site.name}.scale" for site in alike.sites if "blocks" in site.name and site.layers]
    assert any(not torch.equal(alike.tensors[key], weighed.tensors[key]) for key in inputs)


def test_a_run_with_a_method_from_outside(root: Root, tmp_path, seed: int) -> None:
    module, batches, _, _ = vit(seed)
    search = {"bits": [8], "forms": ["Q"], "samples": 8, "hessian_samples": 4, "hessian_probes": 2}
    search |= {"hessian_min_probes": 2}
    results = {
        spread: mlorq.compress(
            module,
            batches,
            budget="8.9bit",
            preset="quick",
            rounding="nearest",
            activations={"bits": 4, "method": "root", "spread": spread},
            search=search,
            device="cpu",
            store=f"file://{tmp_path}/store",
        )
        for spread in (4.0, 0.01)
    }
    # Each has an artifact of its own: the key of the step follows from the method's own settings too.
    assert len(list((tmp_path / "store" / "activations").iterdir())) == 2
    assert results[4.0].metrics["nmse"] < results[0.01].metrics["nmse"]
    results[4.0].save(str(tmp_path / "out"))
    again = mlorq.load(tmp_path / "out")
    assert any(isinstance(one, RootQuantizer) for one in quantizers_of(again))
    with torch.no_grad():
        assert torch.equal(again(batches[0]), results[4.0].model(batches[0]))


def test_methods_are_described_without_torch() -> None:
    code = "import sys, mlorq.config.run, mlorq.activations.method; print('torch' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"
