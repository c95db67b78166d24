"""The fits of a model's layers, for benchmarks of what is computed layer by layer."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from mlorq.artifacts.store import Store
from mlorq.config.run import RunConfig
from mlorq.fitting.covariance_fit import CovarianceFit
from mlorq.models.layer_list import Layer
from steps import capture, layers
from steps.base import execute
from steps.candidates import fits_of
from steps.session import Session


def layer_fits(arguments: argparse.Namespace) -> Iterator[tuple[Layer, CovarianceFit]]:
    """Every n-th layer of a run with its fit; moments come from the store or are computed.

    Args:
        arguments: ``config``, ``set``, ``device`` (``table.arguments_of_a_run``), and ``every``.
    """
    overrides = {"preset": "fast"} | dict(item.split("=", 1) for item in arguments.set)
    config = RunConfig.from_yaml(arguments.config, overrides)
    session = Session(config, Store(config.resolve(config.store)), arguments.device)
    listed = execute(layers.spec(session), session.worker).ref
    found = session.artifacts.layers(listed).layers
    captured = execute(capture.spec(session, session.model_ref, listed, found), session.worker).ref
    for layer in found[1 :: arguments.every]:
        fit = fits_of(session.worker.context, session.model_ref, captured, layer, config.search.fit).search
        assert isinstance(fit, CovarianceFit)
        yield layer, fit
