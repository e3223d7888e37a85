"""Hashes of weights: which model an edit, a pair or a run belongs to."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


@torch.inference_mode()
def weights_hash(module: torch.nn.Module) -> str:
    """sha256 over names, shapes and bytes of all parameters, in the order of their names."""
    h = hashlib.sha256()
    for name, p in sorted(module.named_parameters()):
        h.update(f"{name} {tuple(p.shape)} {p.dtype}".encode())
        h.update(p.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return h.hexdigest()


@torch.inference_mode()
def base_hash(weights: Iterable[tuple[str, Tensor]]) -> str:
    """Return sha256 over names, shapes and float32 values of what Hugging Face holds.

    It does not depend on the backend. It does not depend on the dtype either, as long as that holds
    the stored values exactly.

    Args:
        weights: (name, tensor), in the order of the names, tied ones once.
    """
    h = hashlib.sha256()
    for name, p in weights:
        h.update(f"{name} {tuple(p.shape)}".encode())
        h.update(p.detach().cpu().float().contiguous().view(torch.uint8).numpy().data)
    return h.hexdigest()
