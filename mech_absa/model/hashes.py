"""Hash weights: which model an edit, a pair or a run belongs to.

A loaded model is known by what Hugging Face holds in its files, whichever TransformerLens runs it
and in whatever dtype: `base_hash`. A merged model, whose weights are in no file, is known by
`weights_hash` of the module that runs it. Edits of version 0.1.0 were, too.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch

from .gguf_file import is_gguf
from .huggingface import load_hf


@torch.inference_mode()
def weights_hash(module: torch.nn.Module, dtype: torch.dtype | None = None) -> str:
    """Return the sha256 over names, shapes and bytes of all parameters, in the order of their names.

    Args:
        module: whose parameters.
        dtype: what they are cast to before; their own where None.
    """
    h = hashlib.sha256()
    for name, p in sorted(module.named_parameters()):
        held = p.detach() if dtype is None else p.detach().to(dtype)
        h.update(f"{name} {tuple(held.shape)} {held.dtype}".encode())
        h.update(held.cpu().contiguous().view(torch.uint8).numpy().data)
    return h.hexdigest()


def base_hash(hf: Any, source: str | None) -> str:
    """Return the hash of a model as its files hold it.

    Args:
        hf: the loaded model, not yet in a bridge. Where its dtype is narrower than that of the
            files, they are read once more.
        source: where it was loaded from; None for a model from memory, whose own dtype counts.
    """
    stored = None if source is None else stored_dtype(source)
    if stored is None or stored == hf.dtype:
        return weights_hash(hf)
    if _holds(hf.dtype, stored):
        return weights_hash(hf, stored)
    return weights_hash(load_hf(str(source), stored))


def _holds(wide: torch.dtype, narrow: torch.dtype) -> bool:
    """Return whether every number of one dtype is one of another."""
    a, b = torch.finfo(wide), torch.finfo(narrow)
    return a.eps <= b.eps and a.max >= b.max


def stored_dtype(source: str) -> torch.dtype | None:
    """Return the dtype of the weights in a folder or a GGUF file; None where it cannot be told."""
    from safetensors import safe_open

    if is_gguf(Path(source)):
        return torch.float32
    for path in sorted(Path(source).glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - it is no mapping
                dtype = file.get_tensor(name).dtype
                if dtype.is_floating_point:
                    return dtype  # type: ignore[no-any-return]
    return None
