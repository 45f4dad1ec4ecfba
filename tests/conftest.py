"""What holds for all tests."""

import signal

import pytest


def pytest_configure() -> None:
    """Lets programs under test be interrupted: a shell starts its background jobs with SIGINT ignored."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Makes what is nightly, or needs a GPU, slow too: ``-m "not slow"`` leaves it out."""
    for item in items:
        if item.get_closest_marker("nightly") or item.get_closest_marker("gpu"):
            item.add_marker("slow")
