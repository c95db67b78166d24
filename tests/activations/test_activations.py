"""Quantized activations: quantizers against their definitions, folding, products, and whole runs with a checkpoint."""

from __future__ import annotations

import json
import math
from copy import deepcopy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mlorq
from mlorq.activations.calibrate import calibrate
from mlorq.activations.folding import find_folds, fold_norm
from mlorq.activations.method import ACTIVATION_METHODS
from mlorq.activations.plan import ActivationPlan, Fold, quantizers_of
from mlorq.activations.products import ProductMode, ProductQuantizers, attach_products
from mlorq.activations.quantizers import (
    LogQuantizer,
    UniformQuantizer,
    build,
    fit_channels,
    fit_log,
    fit_uniform,
)
from mlorq.activations.repq import LOG_SQRT2
from mlorq.activations.settings import ActivationSettings
from mlorq.activations.survey import survey
from mlorq.checkpoint.io import inspect
from mlorq.errors import CheckpointError, ModelError
from mlorq.models import from_module
from mlorq.models.base import FloatModel, attention_mask
from mlorq.models.layers import find_layers
from mlorq.models.sentence import SentenceEmbedding
from tests import zoo
from tests.long import few

PERCENTILES = (0.99, 0.999, 1.0)


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def found_in(
    module: nn.Module, batches: list, forward=None, method="repq", **settings
) -> tuple[FloatModel, list, ActivationPlan]:
    model = from_module(module, forward)
    layers = find_layers(model, batches[0]).layers
    chosen = ACTIVATION_METHODS[method].settings(method=method, **settings)
    return model, layers, calibrate(model, layers, batches, chosen)


# -- quantizers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_log_sqrt2_is_its_definition_over_all_codes(bits):
    scale = 0.8
    quantizer = LogQuantizer(bits, torch.tensor(scale), torch.tensor(0.5), torch.tensor(0.0))
    for code in range(2**bits - 1):
        # RepQ-ViT's two-part form: a power of two, and √2 for odd codes.
        level = scale * 2.0 ** -math.ceil(code / 2) * (1 + (code % 2) * (math.sqrt(2) - 1))
        assert quantizer(torch.tensor([level])).item() == pytest.approx(level, rel=1e-5)
        assert quantizer(torch.tensor([level * 1.05])).item() == pytest.approx(level, rel=1e-5)
    below = scale * 2.0 ** (-(2**bits - 1) / 2)
    assert quantizer(torch.tensor([below, below / 3, 0.0])).tolist() == [0, 0, 0], "the last code stands for zero"
    assert quantizer(torch.tensor([5.0])).item() == pytest.approx(scale)


def test_uniform_codes_are_the_nearest_levels(seed):
    x = drawn(200, 6, seed=seed) * torch.tensor([1.0, 0.1, 3.0, 1.0, 0.5, 10.0]) + 0.3
    for quantizer in (fit_uniform(x, 3, PERCENTILES), fit_channels(x, 3, PERCENTILES)):
        codes = torch.arange(8.0).view(-1, 1)
        levels = ((codes - quantizer.zero) * quantizer.scale).expand(8, 6)
        nearest = (x.unsqueeze(0) - levels.unsqueeze(1)).abs().amin(0)
        torch.testing.assert_close((quantizer(x) - x).abs(), nearest, atol=1e-5, rtol=1e-4)
    one, own = ((q(x) - x).square().mean(0) for q in (fit_uniform(x, 3, PERCENTILES), fit_channels(x, 3, PERCENTILES)))
    assert own.sum() < one.sum()
    assert (own[1] / one[1]) < 0.1, "the small channel is where one range for all is useless"


def test_ranges_have_the_least_error_of_those_tried(seed):
    x = drawn(5000, seed=seed)
    x[0] = 50.0
    fitted = fit_uniform(x, 4, (0.9, 0.99, 1.0))

    def error(share: float) -> float:
        low, high = torch.quantile(x, 1 - share), torch.quantile(x, share)
        scale = ((high - low) / 15).half().float()
        naive = UniformQuantizer(4, scale, (-low / scale).round().clamp(0, 15))
        return float((naive(x) - x).square().sum())

    assert float((fitted(x) - x).square().sum()) == pytest.approx(min(map(error, (0.9, 0.99, 1.0))), rel=1e-4)


def test_a_searched_logarithm_is_never_worse_than_log_sqrt2(seed):
    p = (3 * drawn(40, 50, seed=seed)).softmax(-1)
    errors = [float((fit_log(p, 4, steps)(p) - p).square().sum()) for steps in (LOG_SQRT2, (0.25, 0.5, 1.0))]
    assert errors[1] <= errors[0]
    assert errors[0] < float((fit_uniform(p, 4, (0.999, 1.0))(p) - p).square().sum()) * 2


@pytest.mark.parametrize(
    "quantizer",
    [
        UniformQuantizer(4, torch.tensor(0.1), torch.tensor(7.3)),
        UniformQuantizer(2, torch.rand(5) + 0.1, torch.arange(5.0)),
        LogQuantizer(3, torch.tensor(0.9), torch.tensor(0.375), torch.tensor(0.17)),
    ],
)
def test_descriptions_rebuild_quantizers(quantizer):
    again = build(json.loads(json.dumps(quantizer.describe())))
    again.load_state_dict(quantizer.state_dict())
    x = drawn(30, 5, seed=1)
    assert torch.equal(again(x), quantizer(x))
    with pytest.raises(ValueError, match="'cubic'"):
        build({"kind": "cubic", "bits": 4})


def test_gradients_pass_in_range_and_dropping_keeps_a_share():
    quantizer = UniformQuantizer(4, torch.tensor(0.2), torch.tensor(8.0))
    x = torch.tensor([0.13, -0.5, 100.0, -100.0], requires_grad=True)
    quantizer(x).sum().backward()
    assert x.grad.tolist() == pytest.approx([1, 1, 0, 0])
    values = drawn(10_000, seed=0)
    quantizer.drop, quantizer.generator = 0.5, torch.Generator().manual_seed(3)
    kept = (quantizer(values) == values).float().mean()
    assert 0.45 < kept < 0.55


# -- products ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["plain", "causal", "bool mask", "float mask", "grouped"])
def test_attention_taken_apart_is_attention(case, seed):
    q, k, v = (drawn(2, 4, 5, 8, seed=seed + index) for index in range(3))
    options: dict = {}
    if case == "causal":
        options["is_causal"] = True
    if case == "bool mask":
        options["attn_mask"] = torch.rand(2, 1, 5, 5) > 0.3
        options["attn_mask"][..., 0] = True
    if case == "float mask":
        options |= {"attn_mask": drawn(5, 5, seed=seed), "scale": 0.3}
    if case == "grouped":
        k, v, options = k[:, :2], v[:, :2], {"enable_gqa": True}
    seen = []
    with ProductMode(lambda left, right, _: (seen.append((left, right)), (left, right))[1]):
        found = F.scaled_dot_product_attention(q, k, v, **options)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v, **options), atol=1e-5, rtol=1e-4)
    assert len(seen) == 2
    assert torch.allclose(seen[1][0].sum(-1), torch.ones(()))


class Attention(nn.Module):
    """One head, written out: what quantized products have to come to."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(6, 18)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return torch.softmax(torch.matmul(q, k.transpose(-2, -1)), -1) @ v


def test_operands_are_quantized_while_their_module_runs_and_in_copies(seed):
    torch.manual_seed(seed)
    module, x = Attention(), drawn(3, 7, 6, seed=seed)
    left, right = (UniformQuantizer(3, torch.tensor(0.3), torch.tensor(4.0)) for _ in range(2))
    log = LogQuantizer(3, torch.tensor(1.0), torch.tensor(0.5), torch.tensor(0.0))
    with torch.no_grad():
        q, k, v = module.qkv(x).chunk(3, -1)
        expected = log((left(q) @ right(k.transpose(-2, -1))).softmax(-1)) @ v
        attach_products(module, ProductQuantizers({"0_left": left, "0_right": right, "1_left": log}))
        torch.testing.assert_close(module(x), expected)
        copy = deepcopy(module)
        left.scale.fill_(5.0)
        torch.testing.assert_close(copy(x), expected)
        assert not torch.allclose(module(x), expected)
        # A module that raised has let go of its products.
        with pytest.raises(RuntimeError):
            copy(drawn(3, 7, 5, seed=seed))
        torch.testing.assert_close(q @ k.transpose(-2, -1), torch.matmul(q, k.transpose(-2, -1)))
        torch.testing.assert_close(copy(x), expected)


# -- folding ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "arguments", "folds"), [(zoo.VIT, zoo.VIT_ARGUMENTS, 4), (zoo.SWIN, zoo.SWIN_ARGUMENTS, 9)]
)
def test_folding_leaves_the_float_function_and_quantizes_like_a_range_a_channel(name, arguments, folds, seed):
    module = zoo.timm_model(name, arguments, seed)
    batches = [zoo.pixels(4, seed + index) for index in range(2)]
    model, layers, plan = found_in(module, batches, bits=6, method="repq", products=False)
    assert len(plan.folds) == folds
    folded = deepcopy(module)
    plan.fold(folded)
    with torch.no_grad():
        expected, found = module(batches[0]), folded(batches[0])
    assert (found - expected).norm() <= 1e-5 * expected.norm()
    for fold in plan.folds:
        assert not torch.equal(folded.get_submodule(fold.norm).weight, module.get_submodule(fold.norm).weight)
    # One range for all after the fold is the range a channel before it.
    fold = plan.folds[0]
    tokens = next(one for one in survey(model, layers, batches) if one.name == fold.layers[0]).values
    own = fit_channels(tokens, 6, ActivationSettings().percentiles)
    r, b = (plan.tensors[f"fold.{fold.norm}.{part}"] for part in ("scale", "shift"))
    site = f"site.{fold.layers[0]}."
    one = UniformQuantizer(6, plan.tensors[f"{site}scale"], plan.tensors[f"{site}zero"])
    again = (one(tokens / r - b) + b) * r
    assert (again - own(tokens)).abs().gt(1e-3 * own.scale).float().mean() < 0.01, "but for ties"


def test_norms_that_a_residual_reads_are_not_folded(seed):
    class PostNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.norm = nn.Linear(6, 6), nn.LayerNorm(6)
            self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 6)

        def forward(self, x: Tensor) -> Tensor:
            x = self.norm(self.stem(x))
            return x + self.down(self.up(x).relu())

    torch.manual_seed(seed)
    module, x = zoo.randomised(PostNorm(), seed), drawn(5, 4, 6, seed=seed)
    model = from_module(module)
    layers = find_layers(model, x).layers
    assert find_folds(model, layers, [x]) == []
    # The same fold, forced, changes what the model computes: that is what it was refused for.
    broken = deepcopy(module)
    fold_norm(broken, Fold("norm", ("up",)), torch.full((6,), 2.0), torch.zeros(6))
    with torch.no_grad():
        assert not torch.allclose(broken(x), module(x), rtol=1e-2)


def test_what_is_padded_for_one_shape_alone_is_not_folded(seed):
    class Windows(nn.Module):
        """A mean over pairs of tokens, of which an odd one has zeros beside it."""

        def __init__(self) -> None:
            super().__init__()
            self.norm, self.mix, self.head = nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 3)

        def forward(self, x: Tensor) -> Tensor:
            x = F.pad(self.norm(x), (0, 0, 0, x.shape[1] % 2))
            return self.head(self.mix(x).unflatten(1, (-1, 2)).mean(2)).mean(1)

    model = from_module(zoo.randomised(Windows(), seed))
    even, odd = drawn(4, 6, 6, seed=seed), drawn(4, 7, 6, seed=seed)
    layers = find_layers(model, even).layers
    assert [fold.norm for fold in find_folds(model, layers, [even])] == ["norm"]
    assert find_folds(model, layers, [even, odd]) == []


def test_post_norm_bert_keeps_ranges_a_channel_shared_by_query_key_and_value(seed):
    module = zoo.text_model("bert", seed)
    for name, value in module.named_parameters():
        if "LayerNorm.weight" in name:
            value.data[3] = 30.0  # an outlier channel, as trained encoders have them
    batch = {"input_ids": torch.randint(5, 20, (6, 9)), "attention_mask": torch.ones(6, 9, dtype=torch.long)}
    _, _, plan = found_in(module, [batch], SentenceEmbedding(), bits=4, method="repq")
    assert not plan.folds
    query = next(site for site in plan.sites if site.name.endswith("layer.0.attention.self.query"))
    assert len(query.layers) == 3
    assert query.quantizer == {"kind": "uniform", "bits": 4, "channels": 32}
    kinds = {site.name.rpartition("#")[2]: site.quantizer["kind"] for site in plan.sites if "#" in site.name}
    assert kinds == {"0_left": "uniform", "0_right": "uniform", "1_left": "log", "1_right": "uniform"}


# -- what is looked at ------------------------------------------------------------------------------------------------


def test_padding_is_not_looked_at(seed):
    module = zoo.text_model("bert", seed)
    ids = torch.randint(5, 20, (4, 6), generator=torch.Generator().manual_seed(seed))
    short = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    padded = {
        "input_ids": F.pad(ids, (0, 5), value=0),
        "attention_mask": F.pad(torch.ones_like(ids), (0, 5)),
    }
    model = from_module(module, SentenceEmbedding())
    assert model.token_mask is attention_mask
    layers = find_layers(model, short).layers
    spans = [
        {one.name: (one.low, one.high) for one in survey(model, layers, [batch]) if not one.sums_to_one}
        for batch in (short, padded)
    ]
    for name, span in spans[0].items():
        if "pooler" not in name:
            assert spans[1][name] == pytest.approx(span, abs=1e-4), name


class FirstTokenAlone(nn.Module):
    """Reads nothing but the first of many tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(4, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x)[:, 0]


def first_token_is_large(seed: int) -> Tensor:
    x = drawn(16, 200, 4, seed=seed)
    x[:, 0] *= 5
    return x


def test_tokens_are_drawn_by_their_importance(seed):
    model = from_module(FirstTokenAlone())
    batches = [first_token_is_large(seed + index) for index in range(2)]
    for batch in batches:
        batch[:, 0, 3] = 50.0  # to know them again
    layers = find_layers(model, batches[0]).layers
    importance = [{"head": torch.cat([torch.full((16, 1), 100.0), torch.ones(16, 199)], 1)} for _ in batches]
    (alike,), (weighed,) = (survey(model, layers, batches, importance=one) for one in (None, importance))
    assert weighed.values.shape == alike.values.shape == (2 * 16 * 200, 4)
    shares = [float((one.values[:, 3] == 50).double().mean()) for one in (alike, weighed)]
    assert shares == pytest.approx([1 / 200, 100 / 299], abs=0.03)


def test_calls_after_the_first_are_looked_at_too(seed):
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.shared(self.shared(x)[:, :3]).flatten(1)

    model = from_module(Twice())
    batches = [drawn(5, 7, 4, seed=seed)]
    layers = find_layers(model, batches[0]).layers
    (found,) = survey(model, layers, batches, importance=[{"shared": torch.rand(5, 7) + 0.1}])
    assert [len(part) for part in found.parts] == [5 * 7, 5 * 3]


def test_padding_is_never_drawn(seed):
    x = drawn(4, 10, 6, seed=seed)
    mask = torch.arange(10) < torch.tensor([[3], [10], [5], [1]])
    x[~mask] = 1e6
    batches = [{"x": x, "attention_mask": mask.long()}]
    net = nn.Sequential(nn.Linear(6, 5))
    model = FloatModel(net, "custom", {}, lambda module, batch: module(batch["x"]), token_mask=attention_mask)
    layers = find_layers(model, batches[0]).layers
    (found,) = survey(model, layers, batches, importance=[{"0": torch.ones(4, 10)}])
    assert float(found.values.abs().max()) < 100
    assert found.values.shape == (19, 6)


def test_ranges_suit_the_tokens_that_the_output_hangs_on(seed):
    torch.manual_seed(seed)
    module, batches = FirstTokenAlone(), [first_token_is_large(seed), first_token_is_large(seed + 1)]
    others = first_token_is_large(seed + 2)
    errors = {}
    for method in ("repq", "adalog"):
        _, _, plan = found_in(module, batches, bits=4, method=method, percentiles=(0.9, 0.99, 1.0))
        quantized = deepcopy(module)
        plan.install(quantized)
        errors[method] = float((quantized(others) - module(others)).square().mean())
    assert errors["adalog"] < 0.2 * errors["repq"]


def test_smaller_tensors_get_more_bits_and_pixels_theirs(seed):
    module = zoo.timm_model(zoo.VIT, zoo.VIT_ARGUMENTS, seed)
    _, _, plan = found_in(module, [zoo.pixels(4, seed)], bits=3, mixed=True)
    largest = max(site.size for site in plan.sites)
    for site in plan.sites:
        bits = site.quantizer["bits"]
        if site.name == "patch_embed.proj":
            assert bits == 8
        else:
            assert site.size * bits <= largest * 3 or bits == 3
            assert site.size * (bits + 1) > largest * 3 or bits == 8


def test_activations_that_are_not_finite_are_named():
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    module[0].bias.data[0] = float("inf")
    with pytest.raises(ModelError, match="'2' are not finite"):
        found_in(module, [drawn(3, 4, seed=0)])


def test_plans_are_json_and_tensors(seed):
    module = zoo.timm_model(zoo.VIT, zoo.VIT_ARGUMENTS, seed)
    _, _, plan = found_in(module, [zoo.pixels(4, seed)], method="adalog")
    again = ActivationPlan.from_json(json.loads(json.dumps(plan.to_json())), plan.tensors)
    assert again == plan
    for one in (plan, again):
        copy = deepcopy(module)
        one.fold(copy)
        one.install(copy)
        assert len(quantizers_of(copy)) == len(plan.sites)
    with pytest.raises(ModelError, match="plan does not fit"):
        plan.install(nn.Linear(3, 3))


# -- whole runs -------------------------------------------------------------------------------------------------------

TINY = {
    "samples": 8,
    "points": 2,
    "hessian_samples": 4,
    "hessian_probes": 4,
    "hessian_min_probes": 2,
    "factor_bits": [4],
    "sum_ranks": [4],
}


@pytest.mark.parametrize("name", few([zoo.VIT, zoo.SWIN], zoo.VIT))
@pytest.mark.parametrize("rounding", few(["nearest", "block"], "block"))
def test_the_checkpoint_carries_the_quantizers(name, rounding, tmp_path, seed):
    module = zoo.timm_model(name, zoo.VIT_ARGUMENTS if name == zoo.VIT else zoo.SWIN_ARGUMENTS, seed)
    batches = [zoo.pixels(6, seed + index) for index in range(2)]
    results = [
        mlorq.compress(
            module,
            batches,
            budget="6bit",
            preset="quick",
            rounding=rounding,
            rounding_iterations=4,
            activations=activations,
            search=TINY,
            device="cpu",
        )
        for activations in (None, {"bits": 4})
    ]
    assert results[1].metrics["nmse"] > results[0].metrics["nmse"]
    assert results[1].metrics["rest_bytes"] > results[0].metrics["rest_bytes"]
    results[1].save(str(tmp_path / "out"))
    assert results[1].metrics["file_bytes"] == sum(path.stat().st_size for path in (tmp_path / "out").iterdir())
    again = mlorq.load(tmp_path / "out")
    with torch.no_grad():
        outputs = again(batches[0])
        assert torch.equal(outputs, results[1].model(batches[0]))
        reference = [module(batch) for batch in batches]
        error = sum(float((again(batch) - own).square().sum()) for batch, own in zip(batches, reference, strict=True))
    assert error / sum(float(own.square().sum()) for own in reference) == pytest.approx(
        results[1].metrics["nmse"], rel=1e-3
    )
    config = json.loads((tmp_path / "out" / "mlorq.json").read_text())
    assert config["activations"]["folds"] == []
    config["activations"]["sites"][0]["quantizer"]["kind"] = "cubic"
    (tmp_path / "out" / "mlorq.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="cubic"):
        mlorq.load(tmp_path / "out")


def test_error_feedback_sees_quantized_inputs(seed):
    """What is fitted to quantized inputs is better with them than what is fitted to float ones."""
    module = zoo.timm_model(zoo.VIT, zoo.VIT_ARGUMENTS, seed)
    batches = [zoo.pixels(16, seed + index) for index in range(3)]
    options = {"budget": "8.9bit", "search": {**TINY, "bits": [8], "forms": ["Q"]}, "device": "cpu"}
    errors = [
        mlorq.compress(module, batches, rounding=rounding, activations={"bits": 3}, **options).metrics["nmse"]
        for rounding in ("nearest", "closed_form")
    ]
    assert errors[1] < errors[0]


# -- widths chosen with the layers' candidates ------------------------------------------------------------------------


def test_widths_are_chosen_with_the_weights_under_a_compute_budget(tmp_path, seed):
    module = zoo.timm_model(zoo.VIT, zoo.VIT_ARGUMENTS, seed)
    batches = [zoo.pixels(6, seed + index) for index in range(2)]
    found = {}
    for compute in ("4x4", "4x8"):
        found[compute] = mlorq.compress(
            module,
            batches,
            budget="5bit",
            rounding="closed_form",
            activations={"bits": 6, "choices": [4, 6, 8], "compute": compute},
            search=TINY,
            device="cpu",
            store=f"file://{tmp_path}/store",
        )
    assert found["4x8"].metrics["nmse"] < found["4x4"].metrics["nmse"]
    for compute, result in found.items():
        assert result.metrics["solver"]["seconds"] > 0
        (summary,) = [
            json.loads(path.read_text())
            for path in (tmp_path / "store").glob("joint/*/allocation.json")
            if json.loads(path.read_text())["compute"] == pytest.approx(_operations(module, compute))
        ]
        assert summary["bit_operations"] <= summary["compute"]
        widths = summary["activation_bits"]
        assert set(widths.values()) <= {4, 6, 8}
        assert widths["patch_embed.proj"] == 8
        result.save(str(tmp_path / compute))
        # What the program counted, counted once more from the checkpoint alone.
        totals = inspect(tmp_path / compute)["totals"]
        assert totals["bit_operations"] == pytest.approx(summary["bit_operations"], abs=len(widths))
        assert totals["float_bit_operations"] == _operations(module, "32x32")
        again = mlorq.load(tmp_path / compute)
        with torch.no_grad():
            assert torch.equal(again(batches[0]), result.model(batches[0]))
        assert again.blocks[0].attn.qkv.input_quantizer.bits == widths["blocks.0.attn.qkv"]
        products = again.blocks[0].attn.product_quantizers.operands
        assert {products[name].bits for name in ("0_left", "0_right")} == {widths["blocks.0.attn#0"]}


@pytest.mark.parametrize("ranges", few(["static", "token"], "token"))
def test_widths_are_chosen_with_every_form(ranges, tmp_path, seed):
    """With trellis codes, factors and both matrices: bit operations are those of the checkpoint, within the budget."""
    module = zoo.timm_model(zoo.VIT, zoo.VIT_ARGUMENTS, seed)
    with torch.no_grad():  # factors pay where a weight has low rank
        for block in module.blocks:
            block.mlp.fc1.weight.copy_(block.mlp.fc1.weight[:, :4] @ block.mlp.fc1.weight[:4])
    batches = [zoo.pixels(16, seed + index) for index in range(2)]
    forms, found = set(), {}
    for compute in ("3x3", "3x6"):
        result = mlorq.compress(
            module,
            batches,
            budget="3.2bit",
            preset="fast",
            activations={"bits": 4, "choices": [3, 4, 6, 8], "compute": compute, "ranges": ranges},
            search={"samples": 8, "hessian_samples": 16, "forms": ["Q", "LR", "QLR", "TCQ"], "factor_bits": [4]},
            device="cpu",
            store=f"file://{tmp_path}/store",
        )
        found[compute] = result.metrics["nmse"]
        result.save(str(tmp_path / compute))
        about = inspect(tmp_path / compute)
        forms |= {layer["form"] for layer in about["layers"]}
        totals = about["totals"]
        assert totals["bit_operations"] <= _operations(module, compute)
        (summary,) = [
            json.loads(path.read_text())
            for path in (tmp_path / "store").glob("joint/*/allocation.json")
            if json.loads(path.read_text())["compute"] == pytest.approx(_operations(module, compute))
        ]
        widths = summary["activation_bits"]
        assert totals["bit_operations"] == pytest.approx(summary["bit_operations"], abs=len(widths))
        assert len(set(widths.values())) > 1
        again = mlorq.load(tmp_path / compute)
        with torch.no_grad():
            assert torch.equal(again(batches[0]), result.model(batches[0]))
    assert found["3x6"] < found["3x3"]
    assert {"LR", "TCQ"} <= forms


def _operations(module: nn.Module, compute: str) -> float:
    """Bit operations of one width everywhere, counted by hand for a ViT of 17 tokens."""
    weights, inputs = map(int, compute.split("x"))
    width, tokens = 32, 17
    layers = 16 * 3 * 64 * width + 2 * tokens * (4 + 8) * width * width + 7 * width
    products = 2 * 2 * tokens * tokens * width
    return weights * inputs * layers + inputs**2 * products
