"""The JSON schema of configurations (draft 2020-12), for editors: keys, meanings, choices, defaults.

It describes what the loader accepts, short forms included. Editors complain about text in place of a number, which the
loader converts; constraints across keys are left to the loader.
"""

from __future__ import annotations

from typing import Any

from pydantic.json_schema import GenerateJsonSchema

from mlorq.config.budget import PARTS
from mlorq.config.presets import DEFAULT_PRESET, PRESETS
from mlorq.config.run import run_config

DIALECT = "https://json-schema.org/draft/2020-12/schema"


class _Untitled(GenerateJsonSchema):
    """Without titles, which would repeat the keys."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def json_schema() -> dict[str, Any]:
    """The schema, with the choices and keys of all registered implementations.

    The defaults of ``search`` and ``rounding`` are those of the default preset.
    """
    schema: dict[str, Any] = run_config().model_json_schema(schema_generator=_Untitled)
    sections, keys = schema["$defs"], schema["properties"]
    del keys["folder"]  # given by the file's location
    for name, defaults in PRESETS[DEFAULT_PRESET].items():
        definition = sections[keys[name]["$ref"].rpartition("/")[2]]
        for key, value in defaults.items():
            definition["properties"][key]["default"] = value
        # A section whose keys are all commented out is null in YAML.
        keys[name] = {"anyOf": [keys[name], {"type": "null"}]}
    _allow_short_forms(schema)
    return {"$schema": DIALECT, **schema, "title": "Configuration of mlorq", "description": "mlorq compress FILE"}


def _allow_short_forms(schema: dict[str, Any]) -> None:
    """Budgets of disk and memory as mappings; a target as the name of its runtime."""
    keys = schema["properties"]
    both = {
        "type": "object",
        "properties": {part: {"type": "string", "description": "a size, such as 25MB"} for part in PARTS},
        "additionalProperties": False,
        "minProperties": 1,
    }
    one = {"anyOf": [{"type": "string"}, both]}
    keys["budget"]["anyOf"] = [*one["anyOf"], {"type": "array", "items": one}]
    runtime = schema["$defs"]["TargetConfig"]["properties"]["runtime"]
    keys["target"]["anyOf"].append({"enum": runtime["enum"]})
