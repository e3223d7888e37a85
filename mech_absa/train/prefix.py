"""The part of the model below an edit, run once.

Nothing below the first edited layer changes while an edit is trained, so the residual stream that
enters that layer is computed once for every prompt and kept. A `PrefixCache` belongs to a model,
not to an edit: all edits and seeds of a study of layer ranges can share one, and a stream that
enters a higher layer is made from the highest one that is there already.

Streams are kept unpadded, in the model's dtype, up to a byte budget; what does not fit is computed
anew whenever it is needed. They are filled in an order of their own (by length), so that what is
trained does not depend on which batch asked first.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..axes import Resid
from ..edits.edit import Edit
from ..model import Model
from ..model.forward import advance, last
from ..prompts import Tokens
from ..scoring import Stream

TOKENS_A_PASS = 1024
"""Tokens in one forward pass while filling."""


class PrefixCache:
    """Residual streams that enter a layer, by layer and token ids.

    Args:
        model: unedited.
        budget: bytes that may be kept.
        device: where they are kept; the model's own where None.

    Attributes:
        used: bytes kept.
        computed: tokens run through a block so far, over all blocks: what a test or a benchmark
            counts.
    """

    def __init__(
        self, model: Model, budget: int = 1 << 30, device: torch.device | str | None = None
    ):
        self.model, self.budget = model, budget
        self.device = torch.device(device) if device is not None else model.device
        self.used = 0
        self.computed = 0
        self._kept: dict[int, dict[bytes, Tensor]] = {}

    def fill(self, layer: int, prompts: Sequence[Tokens]) -> None:
        """Keep the streams of `prompts` (batches of one) at `layer`, as many as the budget allows."""
        if layer == 0:
            return
        kept = self._kept.setdefault(layer, {})
        each = self.model.d_model * torch.finfo(self.model.dtype).bits // 8
        missing: dict[bytes, Tokens] = {}
        room = self.budget - self.used
        for tokens in prompts:
            if (key := _key(tokens.ids[0, : tokens.lengths[0]])) in kept or key in missing:
                continue
            if (size := tokens.lengths[0] * each) > room:
                break
            room -= size
            missing[key] = tokens
        todo = sorted(missing.items(), key=lambda item: (item[1].lengths[0], item[0]))
        while todo:
            rows = max(
                1, TOKENS_A_PASS // todo[-1][1].lengths[0]
            )  # the longest first, so that a pass that is too big is seen at once
            batch, todo = todo[-rows:], todo[:-rows]
            streams = self._run(layer, Tokens.stack([tokens for _, tokens in batch]))
            for (key, tokens), stream in zip(batch, streams, strict=True):
                kept[key] = stream[: tokens.lengths[0]].to(self.device, copy=True)
                self.used += kept[key].nbytes

    def get(self, layer: int, tokens: Tokens) -> Resid:
        """Return the residual stream of a batch as it enters `layer`, 0 at the padding."""
        if layer == 0:
            with torch.no_grad():
                return self.model.embed(tokens.ids)
        kept = self._look(layer, tokens)
        return self._run(layer, tokens) if kept is None else kept

    def _look(self, layer: int, tokens: Tokens) -> Resid | None:
        kept = self._kept.get(layer, {})
        ids = tokens.ids.cpu()
        rows = [kept.get(_key(ids[i, :n])) for i, n in enumerate(tokens.lengths)]
        if not kept or any(r is None for r in rows):
            return None
        stacked = torch.nn.utils.rnn.pad_sequence(
            [r for r in rows if r is not None], batch_first=True
        )
        return torch.nn.functional.pad(
            stacked, (0, 0, 0, tokens.ids.shape[1] - stacked.shape[1])
        ).to(self.model.device)

    @torch.no_grad()
    def _run(self, layer: int, tokens: Tokens) -> Resid:
        """Run from the highest kept layer below, or from the embeddings."""
        start, x = 0, None
        for lower in sorted((k for k in self._kept if k < layer), reverse=True):
            if (x := self._look(lower, tokens)) is not None:
                start = lower
                break
        if x is None:
            x = self.model.embed(tokens.ids)
        self.computed += (layer - start) * sum(tokens.lengths)
        return advance(self.model, x, start, layer)


class CachedStream(Stream):
    """The residual stream after the last block, from the kept stream below the edit on."""

    edit: Edit | None

    def __init__(self, cache: PrefixCache, edit: Edit | None = None):
        super().__init__(cache.model, edit)
        self.cache = cache

    def last(
        self, tokens: Tokens, reads: Int[Tensor, "batch read"]
    ) -> Float[Tensor, "batch read d_model"]:
        """Return the stream at the positions `reads` of each row."""
        start = self.edit.layers[0] if self.edit is not None else 0
        points = self.edit.points(self.model, tokens) if self.edit is not None else ()
        return last(self.model, self.cache.get(start, tokens), reads, start, points)


def _key(ids: Tensor) -> bytes:
    return ids.cpu().numpy().tobytes()
