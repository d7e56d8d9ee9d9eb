"""Tests that need devices: those for which there are not enough here are left out, and counted as left."""

from __future__ import annotations

import pytest
import torch


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    there = torch.cuda.device_count()
    marks = {item: item.get_closest_marker("gpu") for item in items}
    left = [item for item, mark in marks.items() if mark is not None and mark.args[0] > there]
    if left:
        items[:] = [item for item in items if item not in left]
        config.hook.pytest_deselected(items=left)
