"""Commands on the bundled model open no socket, and its adapter works in bfloat16."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from mech_absa.__main__ import main

REVIEWS = "builtin:restaurant/test"
TRACE = ["--limit", "1", "--by", "role", "--noise-draws", "2", "--no-figures", "--quiet"]


@pytest.fixture
def no_network(monkeypatch):
    """Forbid what opens a connection or asks for an address."""

    def refuse(*args, **kwargs):
        raise AssertionError("a socket was opened")

    for owner, name in (
        (socket.socket, "connect"), (socket.socket, "connect_ex"), (socket, "getaddrinfo"), (socket, "create_connection"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, refuse)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)


@pytest.mark.slow
def test_the_bundled_model_is_traced_trained_and_evaluated_without_a_network(no_network, tmp_path):
    with pytest.raises(AssertionError, match="a socket was opened"):
        socket.create_connection(("127.0.0.1", 9))
    assert main(["patch", "--data", REVIEWS, *TRACE, "--sites", "mlp_out", "--out", str(tmp_path / "a")]) == 0  # fmt: skip
    edit = ["--limit", "8", "--layers", "6", "--epochs", "1", "--quiet"]
    assert main(["train", "--data", REVIEWS, *edit, "--out", str(tmp_path / "b")]) == 0
    scored = ["--limit", "8", "--draws", "20", "--edit", str(tmp_path / "b"), "--quiet"]
    assert main(["evaluate", "--data", REVIEWS, *scored, "--out", str(tmp_path / "c")]) == 0


@pytest.mark.slow
def test_smollm2_from_the_cache_needs_no_network(no_network, tmp_path):
    home = Path(os.environ.get("MECH_ABSA_HOME", "/nowhere"))
    if not (home / "models" / "smollm2" / "config.json").exists():
        pytest.skip("MECH_ABSA_HOME holds no smollm2")
    words = ["--model", "smollm2", "--memory", "1", "--sites", "mlp_out", "--layers", "3"]
    assert main(["patch", "--data", REVIEWS, *TRACE, *words, "--keep", "all", "--limit", "2", "--out", str(tmp_path / "a")]) == 0  # fmt: skip


@pytest.mark.slow
def test_the_bundled_adapter_in_bfloat16(no_network, tmp_path):
    """The adapter was made in float32; the same weights in another dtype are known."""
    out = tmp_path / "a"
    words = ["--dtype", "bfloat16", "--sites", "mlp_out", "--layers", "3", "--control", "5"]
    assert main(["patch", "--data", REVIEWS, *TRACE, *words, "--out", str(out)]) == 0
    record = json.loads((out / "run.json").read_text())
    control = record["half_precision_control"]
    assert record["model"]["adapter"] == "bundled" and record["config"]["dtype"] == "bfloat16"
    assert control["cells"] == 5 and 0 < control["largest_difference"] < 0.1
