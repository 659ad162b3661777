"""Timing several ways of doing the same work in one run."""

import time
from collections.abc import Callable
from statistics import median

import torch


def alternate(ways: dict[str, Callable], *, runs: int, warm_up: int = 1) -> dict[str, dict]:
    """Time each way `runs` times, in turn, so that whatever else the machine does meets all of them.

    Returns:
        per way `seconds` (median), `all_seconds`, and `result` of its last call.
    """
    for _ in range(warm_up):
        for way in ways.values():
            way()
    found = {name: {"all_seconds": []} for name in ways}
    for _ in range(runs):
        for name, way in ways.items():
            wait_for_device()
            started = time.perf_counter()
            found[name]["result"] = way()
            wait_for_device()
            found[name]["all_seconds"].append(time.perf_counter() - started)
    for record in found.values():
        record["seconds"] = median(record["all_seconds"])
    return found


def wait_for_device() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
