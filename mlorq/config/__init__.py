"""What a run is told: one YAML file, one frozen ``RunConfig``, its sections composed from the registries."""

from mlorq.config.budget import Budget, parse_budget
from mlorq.config.presets import DEFAULT_PRESET, PRESETS
from mlorq.config.run import RunConfig, run_config

__all__ = ["DEFAULT_PRESET", "PRESETS", "Budget", "RunConfig", "parse_budget", "run_config"]
