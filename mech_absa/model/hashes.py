"""The hash of weights: which model an edit, a pair or a run belongs to."""

from __future__ import annotations

import hashlib

import torch


@torch.inference_mode()
def weights_hash(module: torch.nn.Module) -> str:
    """sha256 over names, shapes and bytes of all parameters, in the order of their names."""
    h = hashlib.sha256()
    for name, p in sorted(module.named_parameters()):
        h.update(f"{name} {tuple(p.shape)} {p.dtype}".encode())
        h.update(p.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return h.hexdigest()
