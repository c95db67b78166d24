"""The folder of the export target ``transformers``: weights, configuration, preparation of inputs, model card."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Callable
from typing import Any

from fsspec import AbstractFileSystem
from fsspec.core import url_to_fs
from torch import Tensor

from mlorq.artifacts.transfer import os_errors, put_file
from mlorq.checkpoint.description import COMPUTED
from mlorq.checkpoint.preparation import read_preparation
from mlorq.errors import CheckpointError, ConfigError, one_line
from mlorq.export_targets.model_card import CardFacts, model_card
from mlorq.export_targets.run_result import find_result, read_result
from mlorq.export_targets.source_files import CARD, card_facts, front_matter, hub_name, prepared_files, sentence_modules
from mlorq.export_targets.transformers import TransformersSettings
from mlorq.export_targets.transformers_model import pretrained_model
from mlorq.huggingface.quantizer import METHOD
from mlorq.models.family import short_name
from mlorq.models.transformers import quiet
from mlorq.scratch import scratch_folder

CONFIG, TENSORS = "config.json", "model.safetensors"
ONE_FILE = "1000TB"  # larger than any model: no shards
AUTO_CLASSES = (
    "AutoModelForSequenceClassification",
    "AutoModelForImageClassification",
    "AutoModelForObjectDetection",
    "AutoModelForUniversalSegmentation",
    "AutoModelForSemanticSegmentation",
    "AutoModelForTokenClassification",
    "AutoModelForQuestionAnswering",
    "AutoModelForMaskedLM",
    "AutoModelForCausalLM",
    "AutoModelForSeq2SeqLM",
    "AutoModelForSpeechSeq2Seq",
    "AutoModelForCTC",
    "AutoModel",
)


Convert = Callable[[Any, str], dict[str, Tensor]]


def write_folder(
    checkpoint: str, output: str, settings: TransformersSettings, convert: Convert | None = None
) -> list[str]:
    """Write the folder, and upload it if a repository is named.

    Files of an earlier export are replaced; other files are never deleted.

    Args:
        checkpoint: folder or fsspec URL of a compressed model.
        output: folder or fsspec URL to write.
        settings: options of the target.
        convert: ``convert(model, checkpoint)`` gives the model the configuration of another format, and returns its
            state dict; None: the format of ``mlorq``.

    Returns:
        Locations of the written files, and the URL of the repository.

    Raises:
        CheckpointError: the checkpoint cannot be read or exported, or the folder holds something else or cannot be
            written.
        ConfigError: the source, the result or the repository is wrong.
    """
    fs, root = _open(output)
    files = folder_files(checkpoint, settings, convert)
    try:
        with os_errors():
            for name in sorted(files, key=lambda name: name == CONFIG):
                path = posixpath.join(root, name)
                fs.makedirs(posixpath.dirname(path), exist_ok=True)
                put_file(fs, path, files[name])
    except OSError as error:
        raise CheckpointError(f"{output} cannot be written: {one_line(error)}") from error
    written = [posixpath.join(output.rstrip("/"), name) for name in sorted(files)]
    repository = settings.push_to_hub
    return written if repository is None else [*written, upload(files, repository, settings.private)]


def folder_files(checkpoint: str, settings: TransformersSettings, convert: Convert | None = None) -> dict[str, bytes]:
    """The contents of the folder's files, by name. Arguments and errors as in ``write_folder``."""
    module, info = pretrained_model(checkpoint)
    computed = (info.get("extra") or {}).get(COMPUTED)
    if computed:
        raise CheckpointError(
            f"layer {computed[0]!r} computes its weight from its parameters (weight standardisation), and the "
            "checkpoint has the value: the original class cannot hold it; load the checkpoint with mlorq.load"
        )
    architecture = info["architecture"]
    state = None if convert is None else convert(module, checkpoint)
    files = _saved(module, state, checkpoint) | sentence_modules(architecture)
    source = settings.source
    files |= read_preparation(checkpoint, info) if source is None else prepared_files(source, architecture)
    if settings.result is not None:
        result = read_result(settings.result, info["layers"])
    else:
        result = find_result(checkpoint, (info.get("budget") or {}).get("asked"))
    card = CardFacts(
        title=result.get("model") or (short_name(source) if source else type(module).__name__),
        info=info,
        auto_class=_auto_class(module),
        files=sorted(files),
        file_bytes=len(files[CONFIG]) + len(files[TENSORS]),
        result=result,
        base_model=hub_name(source) if source else None,
        source_facts=card_facts(source) if source else {},
        data=settings.data,
        package=METHOD if convert is None else module.config.quantization_config["quant_method"],
    )
    return files | {CARD: model_card(card).encode()}


def upload(files: dict[str, bytes], repository: str, private: bool) -> str:
    """Upload files to a repository of the hub, in one commit, and return its URL.

    Raises:
        ConfigError: the hub cannot be reached, or refuses.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    hub: Any = HfApi()
    try:
        url = hub.create_repo(repository, exist_ok=True, private=private)
        added = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=data) for name, data in sorted(files.items())]
        hub.create_commit(repository, added, commit_message="Compressed model")
    except Exception as error:  # the clients of the hub and of HTTP have many classes of errors
        raise ConfigError(f"push_to_hub {repository}: {one_line(error)}") from error
    return str(url)


def _saved(module: Any, state: dict[str, Tensor] | None, checkpoint: str) -> dict[str, bytes]:
    """The files that ``save_pretrained`` writes, by name; ``state`` replaces the model's state dict.

    In the format of ``mlorq`` they are written by a model that was loaded from them: transformers completes
    configurations when it loads a model, and loading the written files and saving them again must change nothing.
    """
    with scratch_folder() as folder, quiet():
        first, second = os.path.join(folder, "first"), os.path.join(folder, "second")
        try:
            module.save_pretrained(first, state_dict=state, max_shard_size=ONE_FILE)
            if state is not None:
                return _files(first)
            loaded, report = type(module).from_pretrained(first, dtype="auto", output_loading_info=True)
            loaded.save_pretrained(second, max_shard_size=ONE_FILE)
        except (OSError, RuntimeError, ValueError) as error:
            problem = one_line(error)
            raise CheckpointError(f"checkpoint {checkpoint} cannot be saved by transformers: {problem}") from error
        for problem, names in report.items():
            if names:
                name = min(map(str, names))
                raise CheckpointError(f"checkpoint {checkpoint}: transformers would load it with {problem}: {name}")
        return _files(second)


def _files(folder: str) -> dict[str, bytes]:
    """The contents of a folder's files, by name."""
    found = {}
    for name in os.listdir(folder):
        with open(os.path.join(folder, name), "rb") as file:
            found[name] = file.read()
    return found


def _auto_class(module: Any) -> str:
    """The Auto class of transformers that builds the model's class; that class itself if there is none."""
    import transformers

    for name in AUTO_CLASSES:
        found = getattr(transformers, name)._model_mapping.get(type(module.config), ())
        if type(module) in (found if isinstance(found, (tuple, list)) else (found,)):
            return name
    return type(module).__name__


def _open(output: str) -> tuple[AbstractFileSystem, str]:
    """The file system and path of a folder that is new, empty or an earlier export.

    Raises:
        CheckpointError: it holds something else.
    """
    try:
        with os_errors():
            fs, root = url_to_fs(output)
            there = fs.ls(root, detail=False) if fs.isdir(root) else []
            if fs.isfile(root):
                raise CheckpointError(f"{output} is a file: give a folder")
            if there and not _is_export(fs, root):
                raise CheckpointError(f"{output} has other files than an earlier export's: give a new or empty folder")
        return fs, str(root)
    except (OSError, ImportError) as error:
        raise CheckpointError(f"{output} cannot be written: {one_line(error)}") from error


def _is_export(fs: AbstractFileSystem, root: str) -> bool:
    """Whether a folder has a model card of an earlier export."""
    try:
        return METHOD in (front_matter(fs.cat_file(posixpath.join(root, CARD))).get("tags") or ())
    except OSError:
        return False
