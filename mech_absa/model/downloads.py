"""Find the models that `python -m mech_absa.models get` has downloaded."""

from __future__ import annotations

import os
from pathlib import Path

from ..errors import ModelError

SMOLLM2 = "smollm2"


def home() -> Path:
    """Return the folder of downloaded models: MECH_ABSA_HOME, or the user's cache."""
    from platformdirs import user_cache_dir

    given = os.environ.get("MECH_ABSA_HOME")
    return Path(given).expanduser() if given else Path(user_cache_dir("mech_absa"))


def folder(name: str) -> Path:
    """Return where the converted model lies once it has been downloaded."""
    return home() / "models" / name


def here(name: str) -> Path:
    """Return the folder of the converted model.

    Raises:
        ModelError: it has not been downloaded.
    """
    if not (folder(name) / "config.json").exists():
        command = f"python -m mech_absa.models get {name}"
        raise ModelError(f"{name} is not in {home()}; download it (93 MB) with: {command}")
    return folder(name)
