"""Embedding tables as codes: which, how they are stored and counted, that they load, and that nothing else changes."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import mlorq
from mlorq.artifacts.store import Store
from mlorq.checkpoint.format import checkpoint_files
from mlorq.checkpoint.io import inspect, load, save
from mlorq.checkpoint.size_bound import rest_upper_bound
from mlorq.config.budget import parse_budget
from mlorq.config.run import RunConfig
from mlorq.errors import BudgetError, ConfigError
from mlorq.forms.base import uniform_candidate
from mlorq.forms.embedding_tables import find_tables, quantize_table, replace_tables, set_tables
from mlorq.forms.modules import CompressedEmbedding, replace_layers
from steps.inprocess import InProcess
from steps.pipeline import result_json, run_pipeline
from steps.session import Session
from tests import zoo
from tests.layers import size_of

PERCENTILES = [0.97, 0.99, 0.9995, 1.0]
TABLES = ["embeddings.word_embeddings", "embeddings.position_embeddings"]  # of the tiny BERT: 24 x 32 and 40 x 32


class Tied(nn.Module):
    """A masked-LM head whose weight is the embedding's; a position table; one too small, and one that renormalises."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words = nn.Embedding(40, 16)
        self.positions = nn.Embedding(8, 16)
        self.kinds = nn.Embedding(2, 16)
        self.renormed = nn.Embedding(8, 16, max_norm=1.0)
        self.mix = nn.Linear(16, 16)
        self.decoder = nn.Linear(16, 40)
        self.decoder.weight = self.words.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        places = torch.arange(ids.shape[1])
        x = self.words(ids) + self.positions(places) + self.kinds(torch.zeros_like(ids)) + self.renormed(places)
        return self.decoder(torch.tanh(self.mix(x))).mean(1)


# -- tables ---------------------------------------------------------------------------------------------------


def test_tied_small_and_renormalising_tables_stay_float_with_a_reason():
    found = find_tables(Tied(), 64)
    assert found.tables == ["positions"]
    reasons = dict(found.skipped)
    assert "decoder.weight" in reasons["words"]
    assert "smallest" in reasons["kinds"]
    assert "max_norm" in reasons["renormed"]
    assert find_tables(nn.Embedding(100, 100), 1).tables == []  # has no name to be replaced under


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_lookup_gives_the_rows_of_the_table_and_padding_stays_zero(bits, dtype, seed):
    torch.manual_seed(seed)
    table = nn.Embedding(30, 13, padding_idx=3).to(dtype)
    compressed = CompressedEmbedding.from_layer(table, quantize_table("table", table, bits, PERCENTILES))
    ids = torch.randint(0, 30, (4, 5))
    found = compressed(ids)
    assert found.dtype == dtype
    assert torch.equal(found, compressed.weight[ids])
    assert compressed.padding_idx == 3
    assert not compressed(torch.tensor(3)).any()
    assert compressed(torch.tensor(3)).shape == (13,)
    step = (table.weight.amax(1) - table.weight.amin(1)) / (2**bits - 1)
    assert ((compressed.weight - table.weight).abs() <= 0.6 * step.unsqueeze(1) + 0.02).float().mean() > 0.9
    assert compressed.stored_bytes == size_of(uniform_candidate(bits), 30, 13)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_model_with_compressed_tables_is_saved_counted_and_loaded(bits, tmp_path):
    module = zoo.text_model("bert", 1)
    found = find_tables(module, 700)
    assert found.tables == TABLES
    tables = {name: quantize_table(name, module.get_submodule(name), bits, PERCENTILES) for name in found.tables}
    compressed = deepcopy(module)
    replace_tables(compressed, tables)
    description = {"architecture": {"family": "custom"}}
    files = checkpoint_files(compressed, description)
    save(files, tmp_path)
    info = inspect(tmp_path)
    expected = sum(size_of(uniform_candidate(bits), rows, 32) for rows in (24, 40))
    assert info["sizes"]["embedding_bytes"] == expected
    assert (info["sizes"]["bytes"], info["sizes"]["float_bytes"]) == (0, 0)
    assert sum(info["files"].values()) == expected + info["sizes"]["rest_bytes"] + info["sizes"]["overhead_bytes"]
    assert sum(info["files"].values()) <= rest_upper_bound(
        module, {}, description, tables=dict.fromkeys(TABLES, bits), extra_bytes=0
    )
    assert info["file_bytes"] == sum(path.stat().st_size for path in tmp_path.iterdir())
    batch = dict(zoo.tokenizer()(zoo.SENTENCES, padding=True, return_tensors="pt"))
    again = load(tmp_path, model=zoo.text_model("bert", 2))
    as_float = deepcopy(module)
    set_tables(as_float, tables)
    with torch.no_grad():
        wanted = compressed(**batch).last_hidden_state
        assert torch.equal(again(**batch).last_hidden_state, wanted)
        assert torch.equal(as_float(**batch).last_hidden_state, wanted)
        assert not torch.equal(module(**batch).last_hidden_state, wanted)
    assert again.embeddings.word_embeddings.padding_idx == module.embeddings.word_embeddings.padding_idx == 0


# -- runs -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny BERT classifier and texts for it."""
    folder = tmp_path_factory.mktemp("bert")
    zoo.save_text_model(folder / "model", "bert-classifier", seed=6)
    (folder / "texts.csv").write_text("".join(f"{text},{i % 2}\n" for i, text in enumerate(zoo.SENTENCES)))
    return folder


def values(**changes: Any) -> dict[str, Any]:
    source = {"source": "table", "path": "texts.csv", "batch_size": 4, "text": [0], "label": 1}
    return {
        "model": {"family": "transformers", "name": "model", "task": "text-classification"},
        "data": {"calibration": source, "evaluation": source},
        "preset": "quick",
        "search": zoo.QUICK,
        "rounding": {"method": "closed_form"},
        "budget": "5bit",
        "engine": {"devices": "cpu", "threads": 1},
        **changes,
    }


def run(folder: Path, budget: str = "5bit", **changes: Any) -> tuple[dict[str, Any], list[tuple[str, bool]], Session]:
    config = RunConfig.from_mapping(values(**changes), str(folder))
    session = Session(config, Store(config.resolve(config.store)))
    done: list[tuple[str, bool]] = []
    executor = InProcess(session, record=lambda outcome: done.append((outcome.ref.step, outcome.reused)))
    (result,) = run_pipeline(session, executor, [parse_budget(budget)])
    return result_json(session, result), done, session


def test_a_run_with_quantized_embeddings(folder):
    plain, done, _ = run(folder)
    assert (plain["embedding_bytes"], plain["embeddings"]) == (0, None)
    assert not any(step == "embeddings" for step, _ in done)
    sizes = {}
    for bits in (8, 4):
        result, done, session = run(folder, embeddings={"bits": bits, "smallest": 700})
        computed = {step for step, reused in done if not reused}
        # The search is that of the float model: nothing of it is computed anew.
        assert computed == {"embeddings", "round", "compressed", "evaluate", "calibration", "summary"}
        assert [row["table"] for row in result["embeddings"]["tables"]] == [f"bert.{name}" for name in TABLES]
        assert [row["table"] for row in result["embeddings"]["skipped"]] == ["bert.embeddings.token_type_embeddings"]
        assert result["embedding_bytes"] == sum(row["bytes"] for row in result["embeddings"]["tables"])
        assert result["embedding_bytes"] == sum(size_of(uniform_candidate(bits), rows, 32) for rows in (24, 40))
        assert result["bytes"] <= result["budget_bytes"] == plain["budget_bytes"]
        assert result["rest_bytes"] + (24 + 40) * 32 * 4 == plain["rest_bytes"]
        location = result["checkpoint"].removeprefix("file://")
        assert result["file_bytes"] == sum(
            (Path(location) / name).stat().st_size for name in inspect(location)["files"]
        )
        sizes[bits] = result["file_bytes"]
        # Loaded from the folder alone: the outputs of the float model with rounded layers and tables in memory.
        refs = result["artifacts"]
        last = max(
            (role for role in refs if role.startswith("round/")),
            key=lambda role: session.artifacts.layers(_ref(refs["layers"]))[role.removeprefix("round/")].order,
        )
        in_memory = deepcopy(session.model.module)
        replace_layers(in_memory, session.artifacts.all_rounded(_ref(refs[last])).layers)
        set_tables(in_memory, session.artifacts.tables(_ref(refs["embeddings"])))
        batch = session.evaluation.batches[0]
        loaded = mlorq.load(result["checkpoint"])
        assert torch.equal(session.model.outputs(loaded, batch), session.model.outputs(in_memory, batch))
    assert sizes[4] < sizes[8] < plain["file_bytes"]
    again, done, _ = run(folder)
    assert all(reused for _, reused in done)
    assert again == plain


def _ref(value: dict[str, str]) -> Any:
    from mlorq.artifacts.store import ArtifactRef

    return ArtifactRef.from_json(value)


def test_rounding_makes_up_for_quantized_tables(folder):
    """4-bit tables: rounding that sees them loses less than the same codes put beside them afterwards."""
    plain, _, session = run(folder, budget="8bit")
    seen, _, _ = run(folder, budget="8bit", embeddings={"bits": 4, "smallest": 700})
    module = deepcopy(session.model.module)
    tables = {name: quantize_table(name, module.get_submodule(name), 4, PERCENTILES) for name in
              (f"bert.{name}" for name in TABLES)}  # fmt: skip
    afterwards = mlorq.load(plain["checkpoint"])
    set_tables(afterwards, tables)
    data = session.evaluation.batches
    wanted, without = (
        torch.cat([session.model.outputs(one, batch) for batch in data]) for one in (session.model.module, afterwards)
    )
    lost = float((without - wanted).detach().square().sum() / wanted.detach().square().sum())
    assert seen["nmse"] < lost


@pytest.mark.parametrize("text", ["43kB", "45kB"])
def test_budgets_of_whole_checkpoints_hold_with_the_tables_inside(folder, text):
    count = int(text.removesuffix("kB")) * 1000
    result, _, _ = run(folder, budget=text, embeddings={"bits": 4, "smallest": 700})
    assert result["file_bytes"] <= count
    with pytest.raises(BudgetError):
        run(folder, budget="10kB", embeddings={"bits": 4, "smallest": 700})


def test_in_python_with_a_tied_head():
    module = Tied()
    batches = [torch.randint(0, 40, (4, 8), generator=torch.Generator().manual_seed(index)) for index in range(3)]
    options = {"search": {"samples": 4, "points": 2, "hessian_samples": 4}, "preset": "quick", "device": "cpu"}
    result = mlorq.compress(
        module, batches, budget="6bit", rounding="nearest", embeddings={"bits": 8, "smallest": 64}, **options
    )
    assert result.metrics["embedding_bytes"] == size_of(uniform_candidate(8), 8, 16)
    kinds = {name: type(child).__name__ for name, child in result.model.named_modules()}
    assert (kinds["positions"], kinds["words"], kinds["renormed"]) == ("CompressedEmbedding", "Embedding", "Embedding")
    assert kinds["decoder"] == "CompressedLinear"
    assert torch.equal(result.model.words.weight, module.words.weight)


def test_the_section_is_checked_and_changes_no_key_when_it_is_null(tmp_path):
    for section, words in (
        ({"bits": 5}, ["embeddings.bits"]),
        ({"bit": 8}, ["'embeddings.bit'", "'bits'"]),
        ({"smallest": 0}, ["embeddings.smallest"]),
    ):
        with pytest.raises(ConfigError) as caught:
            RunConfig.from_mapping(values(embeddings=section))
        assert all(word in str(caught.value) for word in words)
    config = RunConfig.from_mapping(values(embeddings={"bits": 4}))
    (tmp_path / "c.yaml").write_text(config.to_yaml())
    assert RunConfig.from_yaml(tmp_path / "c.yaml").embeddings == config.embeddings
    assert json.loads(json.dumps(RunConfig.from_mapping(values()).model_dump(mode="json")))["embeddings"] is None
