"""The backend of `backend.py` among the others."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from hyperconv_ext import planner
from hyperconv_ext.backends import BACKENDS
from hyperconv_ext.ops import execution

from . import backend as joint


def forget() -> None:
    """What was planned with other backends or estimates."""
    joint.CALLS.clear()
    joint.MLPS.clear()
    for cached in (planner.plan, planner.joint, execution._plan, execution._joint_plan):
        cached.cache_clear()


@pytest.fixture(autouse=True)
def engine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(BACKENDS, joint.NAME, joint.ENGINE)
    monkeypatch.setattr(planner, "BACKEND_NAMES", (*planner.BACKEND_NAMES, joint.NAME))
    forget()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # many tiny convolutions
    yield
    torch.set_num_threads(threads)
    forget()


@pytest.fixture
def dear(monkeypatch: pytest.MonkeyPatch) -> None:
    """Together costs more than three of their own."""
    monkeypatch.setitem(joint.ESTIMATE, "together", 4.0)
