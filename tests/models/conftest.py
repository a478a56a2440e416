"""What the tests of models share."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _no_accelerator_left() -> Iterator[None]:
    """accelerate keeps the first accelerator's settings for the process, and refuses others."""
    yield
    if accelerate := sys.modules.get("accelerate"):
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
