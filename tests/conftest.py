"""What every test stands on: no hub, no tokenizer threads, two torch threads, and the models and folders they share."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("MPLBACKEND", "Agg")

from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from support import ARCHITECTURES, fast

# No test depends on wall time: a neighbour may hold the processor for seconds.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")


def pytest_configure(config: pytest.Config) -> None:
    """Set up torch and transformers where tests run, which is not where they are only handed out."""
    hands_out = getattr(config.option, "dist", "no") != "no" and not hasattr(config, "workerinput")
    if hands_out:
        return
    import torch
    import transformers

    torch.set_num_threads(min(2, torch.get_num_threads()))
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real data, tokenizers and checkpoints beside the project; tests of them are skipped where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent: real data and checkpoints are not part of the project")
    return folder


@pytest.fixture(scope="session", params=fast(ARCHITECTURES, ["gpt2", "llama", "gemma2", "bloom"]))
def tiny(request) -> Path:
    """The folder of a tiny random Hugging Face model, one architecture after the other."""
    from support.tiny_models import tiny_folder

    return tiny_folder(request.param)
