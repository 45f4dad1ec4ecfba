"""What is nightly, or needs a GPU, is slow too: ``-m "not slow"`` leaves it out."""

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("nightly") or item.get_closest_marker("gpu"):
            item.add_marker("slow")
