"""A decoder in float64 numpy, written from the equations, with Pearl's do() instead of hooks.

One sequence at a time, nothing batched, nothing cached, no autograd: slow and plain, so that it can be believed. It takes
the weights of a HookedTransformer (a float64 one, for agreement beyond 1e-6) under their published names and knows

    x    = embed(tokens)                        [pos d_model]     plus learned positions where the model has them
    attn = W_O softmax(mask(cap(q k' / s))) v   q, k, v = norm1(x) W + b; rotary or ALiBi; grouped keys and values; windows
    mlp  = W_out (act(norm2(y) W_in + b_in))    or the gated form act(. W_gate) * (. W_in + b_in)
    y    = x + attn,  x <- y + mlp              serial; in a parallel block both read x and x <- x + attn + mlp
    logits = cap(norm(x) W_U + b_U)

and post-norm blocks, where attn and mlp are normed once more before they are added.

`do={("resid_post", 3, 7): vector}` replaces the activation of that kind at that layer and position, at the moment it is
computed, and everything after it follows. For q, k, v (before rotation) and z a head may be named: `("z", 3, 7, 2)`.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from scipy.special import erf, expit

Do = dict[tuple, Any]  # (kind, layer, pos) or (kind, layer, pos, head) -> value
KINDS = ("resid_pre", "q", "k", "v", "z", "attn_out", "resid_mid", "mlp_out", "resid_post")


def _gelu_tanh(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


ACTIVATIONS = {
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x * expit(x),
    "gelu": lambda x: x * 0.5 * (1 + erf(x / np.sqrt(2))),
    "gelu_new": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
}


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def soft_cap(x: np.ndarray, cap: float) -> np.ndarray:
    return cap * np.tanh(x / cap) if cap > 0 else x


def rotate(x: np.ndarray, dims: int, base: float, adjacent: bool) -> np.ndarray:
    """RoFormer, eq. 13: pair j of the first `dims` dimensions of [pos head d_head], as a complex number, turns by pos / base^(2j/dims)."""
    first, second = (
        (slice(0, dims, 2), slice(1, dims, 2))
        if adjacent
        else (slice(0, dims // 2), slice(dims // 2, dims))
    )
    angle = np.arange(len(x))[:, None, None] * base ** (-2 * np.arange(dims // 2) / dims)
    turned = (x[..., first] + 1j * x[..., second]) * np.exp(1j * angle)
    out = x.copy()
    out[..., first], out[..., second] = turned.real, turned.imag
    return out


def alibi_slopes(n_heads: int) -> np.ndarray:
    """Press et al. 2022: 2^(-8/n), 2^(-16/n), ...; for other counts the next lower power of two, then every other one of the double."""
    power = 2 ** int(np.log2(n_heads))
    slopes = 2.0 ** (-8 * np.arange(1, power + 1) / power)
    between = 2.0 ** (-8 * np.arange(1, 2 * power + 1, 2) / (2 * power))
    return np.concatenate([slopes, between])[:n_heads]


class NumpyTransformer:
    """The oracle of one HookedTransformer."""

    def __init__(self, model):
        self.cfg = cfg = model.cfg
        self.w = {k: v.detach().cpu().double().numpy() for k, v in model.state_dict().items()}
        for unknown in (
            "use_qk_norm",
            "use_NTK_by_parts_rope",
            "use_yarn_rope",
            "num_experts",
            "attn_only",
            "clip_qkv",
        ):
            if getattr(cfg, unknown):
                raise NotImplementedError(f"the oracle has no equation for {unknown}")

    def norm(self, x: np.ndarray, name: str, centred: bool | None = None) -> np.ndarray:
        kind = self.cfg.normalization_type
        if kind is None:
            return x
        if kind.startswith("LN") if centred is None else centred:
            x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + self.cfg.eps)
        return x * self.w.get(f"{name}.w", 1.0) + self.w.get(f"{name}.b", 0.0)

    def embed(self, tokens) -> np.ndarray:
        x = self.w["embed.W_E"][np.asarray(tokens)]
        return self.norm(x, "embed.ln") if self.cfg.post_embedding_ln else x

    def attention(self, x: np.ndarray, layer: int, fix) -> np.ndarray:
        """[pos d_model], normed -> [pos d_model]."""
        cfg, name = self.cfg, f"blocks.{layer}.attn."
        kv = "_" if cfg.n_key_value_heads else ""  # grouped keys and values are stored once a group
        q = fix(
            "q", layer, np.einsum("pm,hmd->phd", x, self.w[f"{name}W_Q"]) + self.w[f"{name}b_Q"]
        )
        k = fix(
            "k",
            layer,
            np.einsum("pm,hmd->phd", x, self.w[f"{name}{kv}W_K"]) + self.w[f"{name}{kv}b_K"],
        )
        v = fix(
            "v",
            layer,
            np.einsum("pm,hmd->phd", x, self.w[f"{name}{kv}W_V"]) + self.w[f"{name}{kv}b_V"],
        )
        if cfg.positional_embedding_type == "rotary":
            q, k = (
                rotate(a, cfg.rotary_dim, cfg.rotary_base, cfg.rotary_adjacent_pairs)
                for a in (q, k)
            )
        group = cfg.n_heads // k.shape[1]
        scale = cfg.attn_scale if cfg.use_attn_scale else 1.0
        scale *= layer + 1 if cfg.scale_attn_by_inverse_layer_idx else 1
        back = (
            np.arange(len(x))[:, None] - np.arange(len(x))[None, :]
        )  # how far the key lies behind the query
        hidden = back < 0
        if cfg.use_local_attn and cfg.attn_types[layer] == "local":
            hidden |= back >= cfg.window_size
        z = np.empty_like(q)
        for head in range(cfg.n_heads):
            scores = soft_cap(q[:, head] @ k[:, head // group].T / scale, cfg.attn_scores_soft_cap)
            if cfg.positional_embedding_type == "alibi":
                scores = scores - alibi_slopes(cfg.n_heads)[head] * back
            z[:, head] = softmax(np.where(hidden, -np.inf, scores)) @ v[:, head // group]
        z = fix("z", layer, z)
        return np.einsum("phd,hdm->pm", z, self.w[f"{name}W_O"]) + self.w[f"{name}b_O"]

    def mlp(self, x: np.ndarray, layer: int) -> np.ndarray:
        """[pos d_model], normed -> [pos d_model]."""
        name, act = f"blocks.{layer}.mlp.", ACTIVATIONS[self.cfg.act_fn]
        inner = x @ self.w[f"{name}W_in"] + self.w[f"{name}b_in"]
        inner = act(x @ self.w[f"{name}W_gate"]) * inner if self.cfg.gated_mlp else act(inner)
        return inner @ self.w[f"{name}W_out"] + self.w[f"{name}b_out"]

    def run(
        self, tokens=None, embeddings: np.ndarray | None = None, do: Do | None = None
    ) -> tuple[np.ndarray, dict]:
        """Logits [pos d_vocab] and every activation {(kind, layer): [pos ...]} of one sequence under `do`.

        `embeddings` [pos d_model] takes the place of the tokens' embeddings (before learned positions are added), as noise does.
        """
        cfg, acts, todo = self.cfg, {}, dict(do or {})

        def fix(kind: str, layer: int, x: np.ndarray) -> np.ndarray:
            x = x.copy()
            for key in [key for key in todo if key[:2] == (kind, layer)]:
                x[key[2:]] = todo.pop(key)
            acts[kind, layer] = x
            return x

        x = self.embed(tokens) if embeddings is None else np.asarray(embeddings, dtype=np.float64)
        if cfg.positional_embedding_type == "standard":
            x = x + self.w["pos_embed.W_pos"][: len(x)]
        after = cfg.use_normalization_before_and_after
        for layer in range(cfg.n_layers):
            block = f"blocks.{layer}."
            x = fix("resid_pre", layer, x)
            attn = self.attention(self.norm(x, f"{block}ln1"), layer, fix)
            attn = fix("attn_out", layer, self.norm(attn, f"{block}ln1_post") if after else attn)
            mid = x if cfg.parallel_attn_mlp else fix("resid_mid", layer, x + attn)
            mlp = self.mlp(self.norm(mid, f"{block}ln2"), layer)
            mlp = fix("mlp_out", layer, self.norm(mlp, f"{block}ln2_post") if after else mlp)
            x = fix("resid_post", layer, mid + mlp + (attn if cfg.parallel_attn_mlp else 0.0))
        if todo:
            raise KeyError(f"no such activation: {sorted(map(str, todo))}")
        x = self.norm(x, "ln_final", centred=False if cfg.final_rms else None)
        return soft_cap(
            x @ self.w["unembed.W_U"] + self.w["unembed.b_U"], cfg.output_logits_soft_cap
        ), acts
