"""Shared fixtures: the bundled model, loaded once, and small stand-ins that need no model."""

import pytest
import torch

from engine import Engine
from engine.models.loader import LoadedModel, open_model


@pytest.fixture(scope="session")
def bundled() -> LoadedModel:
    return open_model("bundled")


@pytest.fixture(scope="session")
def engine() -> Engine:
    return Engine.load("bundled", device="cpu")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
