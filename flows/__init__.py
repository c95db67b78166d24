"""Prefect flows and the command line: order, fan-out, caching and progress of a run; no numerics."""
