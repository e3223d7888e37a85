"""The backend of TransformerLens 3.9: `HookedTransformer`."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from .backend import Backend, MLPWeights, Weight
from .kernels import ACTIVATIONS
from .pieces import norm_of

_NORMS_AFTER = ("Olmo2ForCausalLM", "Olmo3ForCausalLM")
"""Architectures that normalise what a sublayer returns, so that matrices read the stream itself."""


class HookedBackend(Backend):
    """A `HookedTransformer`; everything is read from it when it is asked for."""

    name = "hooked"

    def __init__(self, root: Any):
        self.root = root
        self.blocks = tuple(root.blocks)  # indexing a ModuleList takes as long as a small product

    @property
    def cfg(self) -> Any:
        return self.root.cfg

    @property
    def hook_points(self) -> Mapping[str, Any]:
        points: Mapping[str, Any] = self.root.mod_dict
        return points

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        return tuple(self.root.modules())

    @property
    def device(self) -> torch.device:
        device: torch.device = self.root.embed.W_E.device
        return device

    def block_device(self, layer: int) -> torch.device:
        device: torch.device = self._attn(layer).W_O.device
        return device

    def _attn(self, layer: int) -> Any:
        return self.blocks[layer].attn

    # ---- embeddings and unembedding -----------------------------------------------------------

    def embed_tokens(self, ids: Tensor) -> Tensor:
        x: Tensor = self.root.embed(ids)
        return x

    def embed(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids)
        learned = self.cfg.positional_embedding_type == "standard"
        if learned:
            x = x + self.root.pos_embed(ids)
        return x

    def unembed(self, columns: Tensor | None) -> Weight:
        W, b = self.root.W_U, self.root.b_U
        return Weight(W, b) if columns is None else Weight(W[:, columns], b[columns])

    # ---- attention ------------------------------------------------------------------------------

    def qkv(self, layer: int) -> tuple[Weight, Weight, Weight]:
        attn = self._attn(layer)
        _ = "_" if type(attn).__name__ == "GroupedQueryAttention" else ""
        k, v = (Weight(getattr(attn, f"{_}W_{m}"), getattr(attn, f"{_}b_{m}")) for m in "KV")
        return Weight(attn.W_Q, attn.b_Q), k, v

    def output(self, layer: int) -> Weight:
        return Weight(self._attn(layer).W_O, self._attn(layer).b_O)

    def qk_norm(self, layer: int, name: str, x: Tensor) -> Tensor:
        attn = self._attn(layer)
        norm = getattr(attn, f"{name}_norm")
        return x if norm is None else attn._apply_qk_norm(x, norm)

    def rotary(self, layer: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        attn = self._attn(layer)
        longest = int(positions.max()) + 1 if positions.numel() else 0
        if longest > (known := attn.rotary_cos.shape[0]):
            attn._extend_rotary_embeddings(min(self.cfg.n_ctx, max(longest, 2 * known)))
        return attn.rotary_cos[positions], attn.rotary_sin[positions]

    def scale(self, layer: int) -> float:
        return float(self._attn(layer).attn_scale)

    def window(self, layer: int) -> int | None:
        return self.cfg.window_size if self._attn(layer).attn_type == "local" else None

    def slopes(self, layer: int) -> Tensor:
        slopes: Tensor = self._attn(layer).create_alibi_multipliers(self.cfg.n_heads)
        return slopes

    # ---- MLP and norms ----------------------------------------------------------------------------

    def mlp(self, layer: int) -> MLPWeights | None:
        mlp: Any = getattr(self.blocks[layer], "mlp", None)
        kind = type(mlp).__name__
        if kind not in ("MLP", "GatedMLP") or mlp.cfg.act_fn not in ACTIVATIONS:
            return None
        gate = mlp.W_gate if kind == "GatedMLP" else None
        return MLPWeights(mlp.W_in, mlp.W_out, mlp.cfg.act_fn, mlp.b_in, mlp.b_out, gate)

    def run_mlp(self, layer: int, x: Tensor) -> Tensor:
        mlp = self.blocks[layer].mlp
        y: Tensor = mlp(x) if x.ndim == 3 else mlp(x[None])[0]
        return y

    def act(self, layer: int, x: Tensor) -> Tensor:
        y: Tensor = self.blocks[layer].mlp.act_fn(x)
        return y

    def norm(self, layer: int | None, name: str, x: Tensor) -> Tensor:
        owner = self.root if layer is None else self.blocks[layer]
        if name == "ln_final" and self.cfg.normalization_type is None:
            return x
        return norm_of(getattr(owner, name), x)

    def hooked_norm(self, x: Tensor) -> Tensor:
        y: Tensor = self.root.ln_final(x[None])[0]
        return y

    # ---- hooks and passes -------------------------------------------------------------------------

    def point(self, layer: int, name: str) -> nn.Module:
        block = self.blocks[layer]
        if name in ("ln1", "ln2") and self.cfg.original_architecture in _NORMS_AFTER:
            name = {"ln1": "resid_pre", "ln2": "resid_mid"}[name]
        owner, attribute = {
            "ln1": (block, "ln1"), "ln2": (block, "ln2"),
            "projected": (block, "attn"), "mlp": (block, "mlp"),
            "scores": (block.attn, "hook_attn_scores"),
        }.get(name, (None, f"hook_{name}"))  # fmt: skip
        if owner is None:
            of_attention = ("q", "k", "v", "z", "rot_q", "rot_k", "pattern")
            inside = getattr(block, "mlp", None) if name in ("pre", "pre_linear", "post") else block
            owner = block.attn if name in of_attention else inside
        if not hasattr(owner, attribute):
            raise KeyError(f"layer {layer} has no {name}")
        point: nn.Module = getattr(owner, attribute)
        return point

    def scales(self) -> list[nn.Module]:
        return [m.get_submodule("hook_scale") for m in self.modules if hasattr(m, "hook_scale")]

    def forward(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        to: dict[str, Any] = {"return_type": "logits"} if stop is None else {"stop_at_layer": stop}
        y: Tensor = self.root.forward(x, start_at_layer=start, **to)
        return y

    # ---- matrices, by name ------------------------------------------------------------------------

    def _own(self, layer: int, name: str) -> tuple[Tensor, Tensor | None]:
        """Return TransformerLens's own parameters: the matrix, and its bias or None."""
        block = self.blocks[layer]
        owner = block.attn if name in ("W_Q", "W_K", "W_V", "W_O") else block.mlp
        none = name == "W_gate" or (name == "W_in" and hasattr(owner, "W_gate"))
        grouped = "_" if name in ("W_K", "W_V") and hasattr(owner, "_W_K") else ""
        bias = None if none else getattr(owner, grouped + "b" + name[1:])
        return getattr(owner, grouped + name), bias

    def matrix(self, layer: int, name: str) -> Weight:
        W, b = self._own(layer, name)
        return Weight(flat_matrix(name, W), None if b is None else b.flatten())

    @torch.no_grad()
    def set_matrix(self, layer: int, name: str, W: Tensor, b: Tensor | None) -> None:
        own, bias = self._own(layer, name)
        own.copy_(W if own.ndim == 2 else by_head(name, W, len(own)))
        if b is not None:
            assert bias is not None, f"L{layer}.{name} has no bias"
            bias.copy_(b.view_as(bias))

    def twin(self) -> Any:
        return copy.deepcopy(self.root)


def flat_matrix(name: str, W: Tensor) -> Tensor:
    """Return a matrix of heads with the heads side by side; any other as it is."""
    if W.ndim == 2:
        return W
    return rearrange(W, "head d m -> (head d) m" if name == "W_O" else "head m d -> m (head d)")


def by_head(name: str, W: Tensor, heads: int) -> Tensor:
    """Undo `flat_matrix`."""
    pattern = "(head d) m -> head d m" if name == "W_O" else "m (head d) -> head m d"
    return rearrange(W, pattern, head=heads)
