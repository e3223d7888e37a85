"""The logit lens as a selector: how well the unembedding reads the answer off each layer."""

from __future__ import annotations

from typing import ClassVar

import numpy as np
import torch

from ..errors import ConfigError
from ..scoring import read_labels
from ..sites import Site
from .evidence import Evidence, Selector
from .ranking import layer_site


class LensAccuracy(Selector):
    """A_lin(l) = share of examples with argmax over labels of W_U norm(h_l) = the gold label.

    h_l is the output of layer l at the last token of the prompt, norm the final norm and W_U the
    unembedding. Source: Billa 2026 (arXiv 2604.15557, LAP), on the lens of nostalgebraist 2020. The
    argmax is over the labels here, not over the vocabulary.

    Raises:
        ConfigError: labels of several tokens, which one state does not read.
    """

    name: ClassVar[str] = "lens"

    @torch.inference_mode()
    def scores(self, evidence: Evidence) -> dict[Site, float]:
        model = evidence.model
        continuations = evidence.verbalizer.continuations(model.tokenizer, evidence.template)
        if len(continuations) != 1 or continuations[0].reads != 1:
            words = [word for _, word in evidence.verbalizer.words]
            raise ConfigError(
                f"the selector lens reads labels of one token off a single state; {', '.join(words)} "
                "have more, so choose other --labels"
            )
        states = evidence.states["answer"]
        found: dict[Site, float] = {}
        for layer in range(model.n_layers):
            rows = torch.from_numpy(states[layer]).to(model.device, model.dtype)
            read = read_labels(model, rows[:, None], continuations[0], "labels").cpu().numpy()
            found[layer_site(layer)] = float(np.mean(read.argmax(1) == evidence.gold))
        return found


__all__ = ["LensAccuracy"]
