"""Compare logits with Hugging Face's own forward pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError


@torch.inference_mode()
def logit_difference(
    forward: Callable[[Tensor], Tensor],
    tokenizer: Any,
    bos: bool,
    hf_model: Any,
    texts: Sequence[str],
) -> float:
    """Return the largest |logit difference| over `texts`.

    Args:
        forward: token ids `[1 pos]` -> logits `[1 pos d_vocab]`.
        tokenizer: of both.
        bos: whether texts begin with the BOS token.
        hf_model: Hugging Face's model.
        texts: what to compare on.

    Raises:
        ModelError: logits of either side are not numbers, so that nothing can be compared.
    """
    worst = 0.0
    for text in texts:
        ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
        if bos:
            ids = torch.cat([torch.tensor([[tokenizer.bos_token_id]]), ids], dim=1)
        theirs = hf_model(ids.to(hf_model.device)).logits.double()
        ours = forward(ids).to(theirs)
        difference = float((ours - theirs).abs().max())
        if not difference < float("inf"):
            whose = "Hugging Face's" if not bool(theirs.isfinite().all()) else "our"
            raise ModelError(
                f"{whose} logits of {text[:40]!r} are not finite numbers; the weights hold some "
                "that are not, or the dtype overflows"
            )
        worst = max(worst, difference)
    return worst
