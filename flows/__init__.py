"""Prefect flows and the command line: order, fan-out, caching and progress of a run; no numerics."""

from mlorq.artifacts.locations import BLOCK, LOOKUPS


def _url_of_block(name: str) -> str:
    from flows.blocks import url_of_block

    return url_of_block(name)


LOOKUPS[BLOCK] = _url_of_block
