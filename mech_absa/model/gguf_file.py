"""Load a GGUF file (llama.cpp's format) through transformers, dequantised.

transformers reads the architectures that it knows into its own classes; what comes out is a plain
model with full-precision weights, which saves, converts and compares like any other.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

from ..errors import ModelError

MAGIC = b"GGUF"
SUFFIX = ".gguf"


def is_gguf(source: str | Path) -> bool:
    """Return whether a model's name ends as GGUF files do."""
    return str(source).lower().endswith(SUFFIX)


def arguments(source: str) -> tuple[str, dict[str, str]]:
    """Return what `from_pretrained` takes: a folder or a hub name, and keywords that name a GGUF
    file.
    """
    if not is_gguf(source):
        return source, {}
    path = Path(source)
    return str(path.parent), {"gguf_file": path.name}


def check_gguf(path: Path) -> None:
    """Refuse a path that is no GGUF file, and an installation that cannot read one.

    Raises:
        ModelError: the file is missing or begins otherwise, or the package gguf is not installed.
    """
    if not path.is_file():
        raise ModelError(f"there is no file {path}; a GGUF file is needed")
    with path.open("rb") as file:
        if (start := file.read(len(MAGIC))) != MAGIC:
            raise ModelError(
                f"{path} begins with {start!r}; a GGUF file begins with {MAGIC!r}, so this one is "
                "damaged or of another format"
            )
    need_package()


def need_package() -> None:
    """Raise a ModelError where the package gguf is not installed."""
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(
            "GGUF files are read with the package gguf, which is not installed; "
            "pip install 'mech-absa[gguf]'"
        )


def forget_quantisation(model: Any) -> Any:
    """Return the dequantised model without the marks of its file, so that it saves as a plain one."""
    for owner, name in (
        (model.config, "quantization_config"),
        (model, "hf_quantizer"),
        (model, "quantization_method"),
    ):
        if name in vars(owner):
            delattr(owner, name)
    model.is_quantized = False
    model.config.architectures = [type(model).__name__]
    return model
