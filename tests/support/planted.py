"""Transformers with a sentiment circuit set by hand, so that the whole map of effects is known before anything is patched.

The residual stream has three parts: a one-hot position, a few *slots*, and *busy* dimensions. The polarity of the opinion
word is +1 or -1 in slot 0. Each step of the circuit reads slot i and writes slot i+1: a head carries it from one position to
another (its pattern reads positions only and is exactly one-hot), an MLP copies it in place. The last slot is all that the
label logits read. Every other head and MLP is a busy decoy: it reads everything, polarity included, writes loudly into the
busy dimensions, and is provably irrelevant, because no step and no logit ever reads those. There are no norms, so nothing mixes.

Give every sublayer a time (attention of layer l: 2l, MLP: 2l+1, embedding: -1, unembedding: 2L). Slot i is born at the time
of the step that writes it and dies at the time of the step that reads it. Restoring the clean residual stream at a position
before time t restores the answer exactly if a slot that lives there has born < t <= dies; restoring the output of a sublayer
does if it is a step of the circuit. Everything else is exactly 0. Since no other logit moves, that holds for every metric
once it is normalised to 0 at the corrupted run and 1 at the clean one, and in the noising direction with 1 and 0 exchanged.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig

LABELS = ("positive", "negative", "neutral")
WORDS = ("<bos>", *LABELS, "great", "awful", "food", *(f"w{i}" for i in range(12)))
GOOD, BAD = WORDS.index("great"), WORDS.index("awful")
SHARPNESS = 1e4  # of the circuit's attention: every other score is so far below that its weight underflows to exactly 0
LOUDNESS = 4.0  # the label logits are plus and minus this


@dataclass(frozen=True)
class Step:
    """One edge of the circuit: head `head` of `layer` carries the slot from `source` to `target`; an MLP has head None, source = target."""

    layer: int
    source: int
    target: int
    head: int | None = None

    @property
    def time(self) -> int:
        return 2 * self.layer + (self.head is None)


@dataclass(frozen=True)
class Planted:
    """A model, what was planted in it, and what follows."""

    model: HookedTransformer
    steps: tuple[Step, ...]
    positions: dict[
        str, int
    ]  # opinion, aspect, last, and distractor: a token that differs as well and does not matter
    dead: bool  # the last MLP is a single relu, which the corrupted run leaves dead

    @property
    def labels(self) -> tuple[int, int]:
        """Token ids of the clean and of the corrupted answer."""
        return WORDS.index("positive"), WORDS.index("negative")

    def prompts(self, n: int = 1, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """Clean and corrupted tokens [n pos]: random filler, the same in both but for the opinion and the distractor."""
        generator = torch.Generator().manual_seed(seed)
        first, words = WORDS.index("w0"), len(WORDS)
        clean = torch.randint(first, words - 2, (n, self.model.cfg.n_ctx), generator=generator)
        clean[:, 0], clean[:, self.positions["aspect"]] = WORDS.index("<bos>"), WORDS.index("food")
        corrupted = clean.clone()
        clean[:, self.positions["distractor"]], corrupted[:, self.positions["distractor"]] = (
            words - 2,
            words - 1,
        )
        clean[:, self.positions["opinion"]], corrupted[:, self.positions["opinion"]] = GOOD, BAD
        return clean, corrupted

    def metric(self, logits: torch.Tensor) -> torch.Tensor:
        """[batch pos vocab] -> [batch]: the logit difference at the last token, 1 in the clean run and 0 in the corrupted one."""
        clean, corrupted = self.labels
        return ((logits[:, -1, clean] - logits[:, -1, corrupted]) / (2 * LOUDNESS) + 1) / 2

    def _slots(self):
        """(position, born, dies) of every slot."""
        born = (-1, *(s.time for s in self.steps))
        dies = (*(s.time for s in self.steps), 2 * self.model.cfg.n_layers)
        where = (self.steps[0].source, *(s.target for s in self.steps))
        return list(zip(where, born, dies, strict=True))

    def truth(self, kind: str) -> np.ndarray:
        """The exact effect of every cell: [layer pos], or [layer pos head] for the heads' z."""
        cfg = self.model.cfg
        if kind == "head":
            out = np.zeros((cfg.n_layers, cfg.n_ctx, cfg.n_heads))
            for step in self.steps:
                if step.head is not None:
                    out[step.layer, step.target, step.head] = 1
            return out
        out = np.zeros((cfg.n_layers, cfg.n_ctx))
        if kind in ("attn_out", "mlp_out"):
            for step in self.steps:
                out[step.layer, step.target] += (step.head is None) == (kind == "mlp_out")
            return out
        before = {"resid_pre": 0, "resid_mid": 1, "resid_post": 2}[kind]
        for position, born, dies in self._slots():
            for layer in range(cfg.n_layers):
                out[layer, position] += born < 2 * layer + before <= dies
        return out

    def atp(self, kind: str) -> np.ndarray:
        """What first-order attribution at the corrupted run says: the truth, but 0 at all that acts through a dead relu."""
        if not self.dead:
            return self.truth(kind)
        out, mlp = np.zeros_like(self.truth(kind)), self.steps[-1]
        if kind == "mlp_out":
            out[mlp.layer, mlp.target] = 1
        if kind.startswith("resid"):
            out[(mlp.layer if kind == "resid_post" else mlp.layer + 1) :, mlp.target] = 1
        return out


def plant(
    steps: tuple[Step, ...],
    positions: dict[str, int],
    n_layers: int,
    n_heads: int,
    dead: bool = False,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    busy: int = 12,
    d_head: int = 6,
    d_mlp: int = 24,
) -> Planted:
    """Set the weights. Steps must be in order of time, each one starting where the one before ended, the last one at the last token."""
    n_pos = positions["last"] + 1
    for before, after in pairwise(steps):
        assert before.time < after.time and before.target == after.source, (
            "the steps must follow each other"
        )
    assert (
        steps[0].source == positions["opinion"]
        and steps[-1].target == positions["last"]
        and all(s.source > 0 for s in steps)
    )
    assert not dead or steps[-1].head is None, "only a last MLP can be dead"
    slot, loud = n_pos, n_pos + len(steps) + 1  # first slot, first busy dimension
    d_model = loud + busy
    cfg = HookedTransformerConfig(
        n_layers=n_layers,
        n_heads=n_heads,
        d_model=d_model,
        d_head=d_head,
        d_mlp=d_mlp,
        n_ctx=n_pos,
        d_vocab=len(WORDS),
        act_fn="relu",
        normalization_type=None,
        use_attn_scale=False,
        dtype=dtype,
        device="cpu",
        init_weights=False,
    )
    model = HookedTransformer(cfg, move_to_device=False)
    generator = torch.Generator().manual_seed(seed)

    def noise(*shape, scale=1.0):
        return torch.randn(*shape, generator=generator).to(dtype) * scale

    w = {
        name: torch.zeros_like(value)
        for name, value in model.state_dict().items()
        if not name.endswith(("mask", "IGNORE"))
    }
    w["embed.W_E"][:, loud:] = noise(len(WORDS), busy)
    w["embed.W_E"][GOOD, slot], w["embed.W_E"][BAD, slot] = 1, -1
    w["pos_embed.W_pos"][:, :n_pos] = torch.eye(n_pos)
    for layer in range(
        n_layers
    ):  # the decoys: read everything, write only into the busy dimensions
        a, m = f"blocks.{layer}.attn.", f"blocks.{layer}.mlp."
        for matrix in ("W_Q", "W_K", "W_V"):
            w[a + matrix] = noise(n_heads, d_model, d_head, scale=2 * d_model**-0.5)
        w[a + "W_O"][..., loud:] = noise(n_heads, d_head, busy, scale=d_head**-0.5)
        w[a + "b_O"][loud:] = noise(busy, scale=0.1)
        w[m + "W_in"], w[m + "b_in"] = (
            noise(d_model, d_mlp, scale=2 * d_model**-0.5),
            noise(d_mlp, scale=0.1),
        )
        w[m + "W_out"][:, loud:] = noise(d_mlp, busy, scale=d_mlp**-0.5)
    angle = 2 * torch.pi * torch.arange(n_pos, dtype=torch.float64) / n_pos
    circle = torch.stack([angle.cos(), angle.sin()], -1).to(
        dtype
    )  # each position's own direction in the head's first two dimensions
    used = dict.fromkeys(range(n_layers), 0)  # neurons
    for i, step in enumerate(steps):
        a, m = f"blocks.{step.layer}.attn.", f"blocks.{step.layer}.mlp."
        if step.head is None:
            plus, minus = used[step.layer], used[step.layer] + 1
            used[step.layer] += 2
            (
                w[m + "W_in"][:, [plus, minus]],
                w[m + "b_in"][[plus, minus]],
                w[m + "W_out"][[plus, minus]],
            ) = 0, 0, 0
            w[m + "W_in"][slot + i, plus], w[m + "W_in"][slot + i, minus] = 1, -1
            w[m + "W_out"][plus, slot + i + 1], w[m + "W_out"][minus, slot + i + 1] = (
                1,
                -1,
            )  # relu(x) - relu(-x) = x
            if (
                dead and i == len(steps) - 1
            ):  # 2 relu(x) - 1 is +1 at +1 and -1 at -1 as well, but flat on the left
                w[m + "W_out"][plus, slot + i + 1], w[m + "W_out"][minus, slot + i + 1] = 2, 0
                w[m + "b_out"][slot + i + 1] = -1
        else:
            look = torch.zeros(
                n_pos, dtype=torch.long
            )  # every other position looks at the first token, whose slots are 0
            look[step.target] = step.source
            for matrix, values in (("W_Q", SHARPNESS * circle[look]), ("W_K", circle)):
                w[a + matrix][step.head] = 0
                w[a + matrix][step.head, :n_pos, :2] = values
            w[a + "W_V"][step.head, :, 0], w[a + "W_O"][step.head, 0] = (
                0,
                0,
            )  # the other dimensions stay busy
            w[a + "W_V"][step.head, slot + i, 0], w[a + "W_O"][step.head, 0, slot + i + 1] = 1, 1
    good, bad, other = (WORDS.index(label) for label in LABELS)
    w["unembed.W_U"][slot + len(steps), good], w["unembed.W_U"][slot + len(steps), bad] = (
        LOUDNESS,
        -LOUDNESS,
    )
    w["unembed.b_U"][[i for i in range(len(WORDS)) if i not in (good, bad, other)]] = -LOUDNESS
    model.load_state_dict(w, strict=False)
    return Planted(model.eval().requires_grad_(False), tuple(steps), positions, dead)


def planted_absa(dead: bool = False, seed: int = 0, dtype: torch.dtype = torch.float32) -> Planted:
    """L0H0 carries the polarity from the opinion to the aspect, L1H1 to the last token, the MLP of layer 2 writes it to the labels."""
    at = {"opinion": 3, "distractor": 4, "aspect": 6, "last": 8}
    steps = (
        Step(0, at["opinion"], at["aspect"], head=0),
        Step(1, at["aspect"], at["last"], head=1),
        Step(2, at["last"], at["last"]),
    )
    return plant(steps, at, n_layers=3, n_heads=2, dead=dead, seed=seed, dtype=dtype)


def random_planted(seed: int, dead: bool = False, dtype: torch.dtype = torch.float32) -> Planted:
    """A circuit of one to three heads and some MLPs, anywhere in a model of 4 to 6 layers and 3 or 4 heads, over 8 to 12 positions."""
    rng = np.random.default_rng(seed)
    n_layers, n_heads, n_pos = (
        int(rng.integers(4, 7)),
        int(rng.integers(3, 5)),
        int(rng.integers(8, 13)),
    )
    hops = int(rng.integers(1, 4))
    *stops, distractor, aspect = (
        int(p) for p in rng.permutation(np.arange(1, n_pos - 1))[: hops + 2]
    )
    stops = [*sorted(stops), n_pos - 1]
    kinds = [
        kind for _ in range(hops) for kind in (["mlp"] if rng.random() < 0.3 else []) + ["head"]
    ]
    kinds += ["mlp"] if rng.random() < 0.6 or dead else []
    while True:  # layers that put the steps in order
        layers = [int(layer) for layer in np.sort(rng.integers(0, n_layers, len(kinds)))]
        times = [2 * layer + (kind == "mlp") for layer, kind in zip(layers, kinds, strict=True)]
        if all(a < b for a, b in pairwise(times)):
            break
    steps, at = [], 0
    for layer, kind in zip(layers, kinds, strict=True):
        if kind == "head":
            steps.append(Step(layer, stops[at], stops[at + 1], head=int(rng.integers(n_heads))))
            at += 1
        else:
            steps.append(Step(layer, stops[at], stops[at]))
    positions = {
        "opinion": stops[0],
        "aspect": stops[1] if hops > 1 else aspect,
        "distractor": distractor,
        "last": n_pos - 1,
    }
    return plant(tuple(steps), positions, n_layers, n_heads, dead=dead, seed=seed, dtype=dtype)
