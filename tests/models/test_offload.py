"""Weights in a file: the same numbers, in less memory."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from mlorq.artifacts.store import ArtifactRef
from mlorq.config.run import RunConfig
from mlorq.data import from_batches
from mlorq.data.custom import IN_MEMORY
from mlorq.errors import ConfigError, ModelError
from mlorq.forms.compressed_module import CompressedModule
from mlorq.models import load_model
from mlorq.models import offload as module_of_offload
from mlorq.models.copying import copy_module
from mlorq.models.custom import IN_MEMORY as IN_MEMORY_MODEL
from mlorq.models.offload import SMALLEST, is_offloaded, offload, offloading
from steps.inprocess import InProcess
from steps.pipeline import result_json, run_pipeline
from steps.session import Session, open_store

SIDE = 192  # of a square matrix that is large enough for a file


def net() -> nn.Sequential:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(SIDE, SIDE), nn.GELU(), nn.Linear(SIDE, SIDE), nn.Linear(SIDE, 3))
    module.register_buffer("table", torch.randn(SIDE, SIDE))
    return module


def offloaded(module: nn.Module, limit: int = 10**6) -> nn.Module:
    with offloading(limit):
        offload(module)
    return module


def test_large_tensors_are_in_a_file_and_have_their_values() -> None:
    module, before = offloaded(net()), net().state_dict()
    assert {name for name, value in module.state_dict().items() if is_offloaded(value)} == {
        "0.weight",
        "2.weight",
        "table",
    }
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert before["3.weight"].nbytes < SMALLEST <= before["0.weight"].nbytes


def test_without_a_limit_nothing_moves() -> None:
    module = net()
    offload(module)
    with offloading(None):
        offload(module)
    assert not any(map(is_offloaded, module.parameters()))


def test_what_is_written_stays_when_the_memory_is_given_back() -> None:
    module = offloaded(net(), limit=1)  # all is given back, at every look
    with torch.no_grad():
        module[0].weight.fill_(3.0)
        module[2].weight.copy_(torch.arange(SIDE * SIDE).view(SIDE, SIDE))
    time.sleep(10 * module_of_offload.INTERVAL)
    assert bool((module[0].weight == 3).all())
    assert torch.equal(module[2].weight.flatten(), torch.arange(SIDE * SIDE).float())


def test_shared_parameters_stay_shared_and_views_stay_in_memory() -> None:
    module = net()
    module[2].weight = module[0].weight
    twin = nn.Linear(SIDE, SIDE)
    twin.weight.data = module[0].weight.data  # another parameter of the same storage
    half = nn.Linear(SIDE, SIDE // 2)
    half.weight.data = torch.randn(SIDE, SIDE)[: SIDE // 2]
    offloaded(nn.ModuleList([module, twin, half]))
    assert module[2].weight is module[0].weight
    assert twin.weight.data_ptr() == module[0].weight.data_ptr()
    assert not is_offloaded(half.weight)


def test_copies_are_in_files_of_their_own() -> None:
    module = offloaded(net())
    module[2].weight = module[0].weight
    module[0].weight.own = "kept"
    twin = copy_module(module)
    assert is_offloaded(twin[0].weight)
    assert is_offloaded(twin.table)
    assert twin[2].weight is twin[0].weight
    assert twin[0].weight.own == "kept"
    assert isinstance(twin[0].weight, nn.Parameter)
    assert not isinstance(twin.table, nn.Parameter)
    with torch.no_grad():
        twin[0].weight.zero_()
    assert bool(module[0].weight.any())


def test_gradients_are_those_of_weights_in_memory() -> None:
    x = torch.randn(5, SIDE, generator=torch.Generator().manual_seed(1))
    found = []
    for module in (net(), offloaded(net(), limit=1)):
        module(x).square().sum().backward()
        found.append([value.grad for value in module.parameters()])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


def test_the_file_is_gone_with_the_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    module = offloaded(net())
    assert not list(tmp_path.iterdir()), "it has no name from the start"
    assert str(tmp_path) in Path("/proc/self/maps").read_text()
    del module
    gc.collect()
    deadline = time.monotonic() + 10
    while str(tmp_path) in Path("/proc/self/maps").read_text():  # the watch may hold it while it looks
        assert time.monotonic() < deadline
        time.sleep(module_of_offload.INTERVAL)


def test_a_full_disk_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(descriptor: int, start: int, size: int) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ModelError, match=r"engine\.weights: [\d,]+ B.* of weights have no room in .*TMPDIR"):
        offloaded(net())


MEASURE = """
import json, sys, torch
from torch import nn
from mlorq.models.offload import offload, offloading

def field(name):
    return 1024 * int(open("/proc/self/status").read().split(name + ":")[1].split()[0])

torch.set_num_threads(1)
torch.manual_seed(0)
side, layers = 1024, 40  # 168 MB
with torch.no_grad(), offloading(int(sys.argv[1])) if sys.argv[1] != "none" else torch.no_grad():
    parts = []
    for _ in range(layers):
        parts.append(nn.Linear(side, side, bias=False))
        parts[-1].weight *= 2
        offload(parts[-1])
    module = nn.Sequential(*parts)
    x = torch.randn(128, side)  # a pass that takes longer than the watch sleeps
    module(x)
    open("/proc/self/clear_refs", "w").write("5")
    before = field("VmRSS")
    print(json.dumps([field("RssAnon"), (module(x), field("VmHWM"))[1], module(x).sum().item()]))
"""


def test_less_memory_than_weights() -> None:
    """A process of its own: 168 MB of weights, of which 20 MB may be in memory."""
    found = []
    for limit in ("none", "20000000"):
        done = subprocess.run([sys.executable, "-c", MEASURE, limit], capture_output=True, text=True, check=True)
        found.append(json.loads(done.stdout))
    (_, whole, wanted), (_, bounded, output) = found
    assert output == wanted
    assert whole - bounded > 80e6, "at least half of the weights are not in memory"


# -- loading and runs ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def folder(request: Any, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A language model whose files have weights of a dtype."""
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=300,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        tie_word_embeddings=True,
    )
    place = tmp_path_factory.mktemp(request.param) / "model"
    transformers.LlamaForCausalLM(config).to(getattr(torch, request.param)).save_pretrained(place)
    return str(place)


def run(folder: str, store: Path, **engine: Any) -> tuple[dict[str, Any], Session]:
    tokens = torch.randint(300, (8, 12), generator=torch.Generator().manual_seed(1))
    batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in tokens.split(4)]
    config = RunConfig.from_mapping(
        {
            "model": {"family": "transformers", "name": folder, "task": "text-generation"},
            "data": {"calibration": IN_MEMORY, "evaluation": IN_MEMORY},
            "budget": "4bit",
            "preset": "fast",
            "search": {"forms": ["Q"], "bits": [3, 6]},
            "rounding": {"method": "block", "iterations": 3, "tuning": 2},
            "engine": {"devices": "cpu", "threads": 1, **engine},
            "store": f"file://{store}",
        }
    )
    session = Session(
        config, open_store(config), calibration=from_batches(batches), evaluation=from_batches(batches, "evaluation")
    )
    (result,) = run_pipeline(session, InProcess(session), config.budgets)
    return result_json(session, result), session


@pytest.mark.parametrize("folder", ["bfloat16"], indirect=True)
def test_a_run_gives_the_same(folder: str, tmp_path: Path) -> None:
    """All steps, training included: the same keys and bytes."""
    plain, held = run(folder, tmp_path / "plain")
    file, bounded = run(folder, tmp_path / "file", weights="100kB")
    assert not any(map(is_offloaded, held.model.module.parameters()))
    assert is_offloaded(bounded.model.module.model.layers[1].mlp.up_proj.weight)
    assert plain["allocation"] == file["allocation"]
    assert plain["nmse"] == file["nmse"]
    for session, keeps in ((held, True), (bounded, False)):
        module = session.worker.context.compressed(
            ArtifactRef("compressed", file["checkpoint"].rsplit("/")[-1]), session.model
        )
        assert {part.cache for part in module.modules() if isinstance(part, CompressedModule)} == {keeps}
    names = [
        sorted(str(path.relative_to(root)) for path in root.rglob("*.safetensors"))
        for root in (tmp_path / "plain", tmp_path / "file")
    ]
    assert names[0] == names[1]
    assert all((tmp_path / "plain" / name).read_bytes() == (tmp_path / "file" / name).read_bytes() for name in names[0])


def test_the_same_model_is_loaded(folder: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    section = RunConfig.from_mapping(
        {
            "model": {"family": "transformers", "name": folder, "task": "text-generation"},
            "data": {"calibration": IN_MEMORY, "evaluation": IN_MEMORY},
            "budget": "4bit",
        }
    ).model
    plain = load_model(section)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with offloading(10**6):
        file = load_model(section)
    assert plain.key == file.key
    assert plain.architecture == file.architecture
    assert file.module.lm_head.weight is file.module.model.embed_tokens.weight
    assert not list(tmp_path.iterdir()), "files with converted weights are gone"


@pytest.mark.parametrize("value", ["0", "much", "-1GB"])
def test_sizes_are_checked(value: str) -> None:
    with pytest.raises(ConfigError, match=r"engine\.weights"):
        RunConfig.from_mapping(
            {
                "model": IN_MEMORY_MODEL,
                "data": {"calibration": IN_MEMORY, "evaluation": IN_MEMORY},
                "engine": {"weights": value},
            }
        )
