"""The ``tracking`` section: experiment trackers that runs are logged to (``flows.tracking``)."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from mlorq.registry import Settings

FOLDER = "mlruns"  # of MLflow, if neither the configuration nor the environment names a place
SCHEMES = ("http://", "https://", "sqlite:///")


class MlflowConfig(Settings):
    """Runs in MLflow."""

    uri: str | None = Field(
        None,
        description="a folder, or http(s)://… of a server, or sqlite:///FILE; null: MLFLOW_TRACKING_URI if it is set, "
        "else the folder mlruns",
    )
    experiment: str = Field("mlorq", min_length=1, description="name of the experiment; it is created if necessary")
    checkpoint: bool = Field(True, description="whether the checkpoint is logged as well")

    @field_validator("uri")
    @classmethod
    def _check_uri(cls, value: str | None) -> str | None:
        if value is not None and (not value or ("://" in value and not value.startswith(SCHEMES))):
            raise ValueError(f"expected a folder, or a URI that starts with {', '.join(SCHEMES)}")
        return value


class WandbConfig(Settings):
    """Runs in Weights & Biases."""

    project: str = Field("mlorq", min_length=1, description="name of the project")
    entity: str | None = Field(None, description="user or team; null: the default of the account")
    mode: Literal["online", "offline"] = Field(
        "online", description="offline: the run is written to the folder wandb, for wandb sync"
    )
    checkpoint: bool = Field(True, description="whether the checkpoint is logged as well")


class TrackingConfig(Settings):
    """Experiment trackers. No key of an artifact depends on this section."""

    mlflow: MlflowConfig | None = Field(None, description="MLflow, for example {experiment: vit}; extra mlorq[mlflow]")
    wandb: WandbConfig | None = Field(
        None, description="Weights & Biases, for example {project: vit, mode: offline}; needs the package wandb"
    )
