"""A tiny model and a few examples."""

from __future__ import annotations

import pytest
from support.small_cases import NEG, NEU, POS, example
from support.tiny_models import tiny_folder

from mech_absa.examples import Examples
from mech_absa.model import load_model


@pytest.fixture(scope="session")
def examples() -> Examples:
    """Eight rows about five sentences; two sentences carry two polarities."""
    rows = [
        ("the food was great but the service was dreadful .", "food", POS),
        ("the food was great but the service was dreadful .", "service", NEG),
        ("great laptop , awful battery , and the screen is fine .", "laptop", POS),
        ("great laptop , awful battery , and the screen is fine .", "battery", NEG),
        ("great laptop , awful battery , and the screen is fine .", "screen", NEU),
        ("the staff were rude .", "staff", NEG),
        ("i ordered the wine list .", "wine list", NEU),
        ("excellent keyboard !", "keyboard", POS),
    ]
    return Examples(tuple(example(*row, id=f"x{i}") for i, row in enumerate(rows)), "eight")


@pytest.fixture(scope="session")
def model():
    return load_model(tiny_folder("gpt2"))
