"""Numbers of a batch -> rows of the table of effects, and the table of the pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from ..model import Model
from ..sites import Site
from .job import Span
from .pairs import Pair, Pairs
from .traced import COLUMNS, PAIR_COLUMNS


@dataclass(eq=False)
class Values:
    """Metrics of one batch. A row is one pair and noise draw; draws of a pair stand together.

    Attributes:
        patched: of every cell.
        base, clean, corrupted: of the unpatched runs.
        draws: rows per pair.
        sign: of patched - base in an effect.
        flops: floating-point operations, as planned.
    """

    patched: Float[Tensor, "component span row"]
    base: Float[Tensor, " row"]
    clean: Float[Tensor, " row"]
    corrupted: Float[Tensor, " row"]
    draws: int
    sign: float = 1.0
    flops: int = 0

    @property
    def effect(self) -> Float[Tensor, "component span row"]:
        """Return the effects, positive where a cell matters."""
        return self.sign * (self.patched - self.base).double()


def cell_table(
    components: Sequence[Site],
    pairs: Sequence[Pair],
    spans: Sequence[Sequence[Span]],
    values: Values,
    exists: torch.Tensor,
) -> pd.DataFrame:
    """Return one row per pair and cell, with columns `COLUMNS`.

    Args:
        exists: `[component span pair]`, which cells there are.
    """
    shape = (len(pairs), values.draws)
    effect = values.effect.numpy().reshape(*values.effect.shape[:-1], *shape)
    patched = values.patched.double().numpy().reshape(effect.shape)
    clean, corrupted = (
        x.double().numpy().reshape(shape).mean(-1) for x in (values.clean, values.corrupted)
    )
    sd = effect.std(-1, ddof=1) if values.draws > 1 else np.zeros(effect.shape[:-1])
    frames = []
    for b, pair in enumerate(pairs):
        c, s = (index.numpy() for index in exists[:, :, b].nonzero(as_tuple=True))
        frames.append(
            pd.DataFrame(
                {
                    "example_id": pair.id,
                    "kind": np.array([x.kind for x in components], dtype=object)[c],
                    "layer": np.array([x.layer for x in components], dtype=np.int16)[c],
                    "head": _absent([x.head for x in components], np.int16)[c],
                    "position": _absent([x.position for x in spans[b]], np.int32)[s],
                    "role": np.array([x.role for x in spans[b]], dtype=object)[s],
                    # Whole columns: NaN as a lone value would lose its dtype.
                    "clean": np.full(len(c), clean[b]),
                    "corrupted": np.full(len(c), corrupted[b]),
                    "patched": patched[c, s, b].mean(-1),
                    "effect": effect[c, s, b].mean(-1),
                    "draw_sd": sd[c, s, b],
                },
                columns=list(COLUMNS),
            )
        )
    return pd.concat(frames, ignore_index=True)


def _absent(values: Sequence[int | None], dtype: type) -> np.ndarray:
    """Return whole numbers; the table and its files write -1 where there is none."""
    return np.array([-1 if value is None else value for value in values], dtype=dtype)


def pair_table(model: Model, pairs: Pairs, frame: pd.DataFrame) -> pd.DataFrame:
    """Return one row per pair: what was asked, its tokens, and the answers of both runs.

    Args:
        frame: with columns example_id, clean and corrupted; the first row of each pair is read.
    """
    texts: dict[int, str] = {}
    runs = frame.drop_duplicates("example_id").set_index("example_id")[["clean", "corrupted"]]
    rows = []
    for q in pairs:
        assert q.clean_scores is not None
        scores = q.corrupted_scores
        rows.append(
            (
                q.id,
                q.example.sentence,
                q.example.aspect,
                q.example.answer,
                q.example.domain,
                q.example.cluster,
                _texts(model, q.clean.ids[0], texts),
                list(q.clean.role_names),
                pairs.words_of(q),
                q.clean_scores.exp().tolist(),
                None if scores is None else scores.exp().mean(0).tolist(),
                None if q.corrupted is q.clean else _texts(model, q.corrupted.ids[0], texts),
                float(runs.loc[q.id, "clean"]),
                float(runs.loc[q.id, "corrupted"]),
            )
        )
    return pd.DataFrame(rows, columns=list(PAIR_COLUMNS))


def _texts(model: Model, ids: Tensor, known: dict[int, str]) -> list[str]:
    """Return the text of every token; a text that many prompts share is one object in memory."""
    for i in ids.tolist():
        if i not in known:
            known[i] = str(i) if model.tokenizer is None else model.tokenizer.decode([i])
    return [known[i] for i in ids.tolist()]
