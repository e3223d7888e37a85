"""Reports of made-up runs, each written once."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.made_runs import (
    NASTY,
    evaluate_folder,
    made_effects,
    matrix_folder,
    trace_folder,
    train_folder,
)

from mech_absa.report import write_report


@pytest.fixture(scope="session")
def runs(tmp_path_factory) -> dict[str, Path]:
    """Kind of run -> its folder, with a nasty review in each."""
    root = tmp_path_factory.mktemp("runs")
    return {
        "trace": trace_folder(
            root / "trace",
            made_effects(6, 6, ("resid_post", "mlp_out", "head"), heads=2, text=NASTY),
        ),
        "train": train_folder(root / "train"),
        "evaluate": evaluate_folder(root / "evaluate", NASTY),
        "matrix": matrix_folder(root / "matrix"),
        "trace2": trace_folder(
            root / "trace2", made_effects(6, 6, ("resid_post",), seed=3, by="role")
        ),
        "train2": train_folder(root / "train2", 1),
    }


@pytest.fixture(scope="session")
def pages(runs, tmp_path_factory) -> dict[str, Path]:
    """Kind of report -> the file."""
    root = tmp_path_factory.mktemp("pages")
    made = {
        kind: write_report(runs[kind], root / f"{kind}.html")
        for kind in ("trace", "train", "evaluate", "matrix")
    }
    return made | {"comparison": write_report(list(runs.values()), root / "comparison.html")}
