"""The backend of TransformerLens 4: `TransformerBridge`, which wraps Hugging Face's own modules.

Nothing is converted and nothing is copied: weights are views of Hugging Face's, and the hooked
forward pass is Hugging Face's to the last bit. Sizes come from the bridge, settings that it does
not know (windows, rotation, scales) from Hugging Face's configuration and modules. TransformerLens
3.9 has the same class, so that this file runs under both versions.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ModelError
from .backend import Backend, MLPWeights, Weight
from .hooked import by_head, flat_matrix
from .hooks import Middle, hooked_at
from .huggingface import first_line
from .kernels import ACTIVATIONS

_PLAIN_RMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")
"""Norms that are x / rms(x) * weight; Gemma's multiplies by 1 + weight and runs as its module."""
_ROPES = ("default", "llama3", "linear", "yarn")
"""Rotations that depend on the position alone, not on how long the prompt is."""


Point = tuple[nn.Module, Callable[[Any], Any]]
"""A module and what is done to its output."""


@dataclass(frozen=True)
class BridgeConfig:
    """What the package asks of a configuration, under the names of `HookedTransformerConfig`."""

    n_layers: int
    n_heads: int
    n_key_value_heads: int | None
    d_model: int
    d_head: int
    d_mlp: int | None
    d_vocab_out: int
    n_ctx: int
    act_fn: str
    dtype: torch.dtype
    original_architecture: str
    positional_embedding_type: str
    normalization_type: str | None
    parallel_attn_mlp: bool
    gated_mlp: bool
    rotary_adjacent_pairs: bool
    use_normalization_before_and_after: bool
    attn_scores_soft_cap: float
    output_logits_soft_cap: float
    attn_only: bool = False
    attention_dir: str = "causal"
    load_in_4bit: bool = False
    use_split_qkv_input: bool = False
    use_attn_in: bool = False


def is_bridge(root: Any) -> bool:
    """Return whether a module of TransformerLens is a `TransformerBridge`."""
    return type(root).__module__.startswith("transformer_lens.model_bridge")


def bridge_from_hf(hf: Any, device: str | torch.device = "cpu") -> Any:
    """Wrap a loaded Hugging Face model, whose weights stay where they are.

    Raises:
        ModelError: TransformerLens does not know the architecture, or has no bridge.
    """
    try:
        from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module
    except ImportError:
        raise ModelError(
            "this TransformerLens has no TransformerBridge to build from a loaded model; accepted: "
            "transformer-lens 3.9, or 4.3 and newer"
        ) from None
    hf = hf.eval().requires_grad_(False).to(torch.device(device))
    hf.config._attn_implementation = "eager"
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        bridge = build_bridge_from_module(
            hf, type(hf).__name__, hf_config=hf.config, tokenizer=None, dtype=hf.dtype
        )
    except (ValueError, AttributeError, KeyError, RuntimeError, TypeError) as error:
        raise ModelError(
            f"TransformerLens cannot bridge {type(hf).__name__} ({first_line(error)})"
        ) from None
    finally:
        root.setLevel(level)
    return bridge.eval().requires_grad_(False)


class _Stopped(Exception):
    """End a forward pass of a bridge, with the stream that it had reached."""

    def __init__(self, stream: Tensor):
        self.stream = stream


def _stop(stream: Tensor) -> None:
    raise _Stopped(stream)


class BridgeBackend(Backend):
    """A `TransformerBridge`; weights are read from it when they are asked for."""

    name = "bridge"

    def __init__(self, root: Any):
        self.root = root
        self._angles: tuple[Tensor, Tensor] | None = None

    @property
    def hf(self) -> Any:
        """Hugging Face's model, which the bridge wraps."""
        return self.root.original_model

    @cached_property
    def cfg(self) -> BridgeConfig:
        c, h = self.root.cfg, self.hf.config
        architecture = type(self.hf).__name__
        context = getattr(h, "max_position_embeddings", None) or getattr(h, "n_positions", None)
        post = "ln1_post" in self.root.blocks[0]._modules
        return BridgeConfig(
            n_layers=c.n_layers,
            n_heads=c.n_heads,
            n_key_value_heads=getattr(c, "n_key_value_heads", None),
            d_model=c.d_model,
            d_head=c.d_head,
            d_mlp=c.d_mlp,
            d_vocab_out=self._unembedding.weight.shape[0],
            n_ctx=int(context or c.n_ctx),
            act_fn="gelu_new" if architecture == "BloomForCausalLM" else str(c.act_fn),
            dtype=self._unembedding.weight.dtype,
            original_architecture=architecture,
            positional_embedding_type=str(c.positional_embedding_type),
            normalization_type=c.normalization_type,
            parallel_attn_mlp="blocks.0.hook_resid_mid" not in self.hook_points,
            gated_mlp=self._linear(0, "gate") is not None,
            rotary_adjacent_pairs=architecture == "GPTJForCausalLM",
            use_normalization_before_and_after=post,
            attn_scores_soft_cap=float(getattr(h, "attn_logit_softcapping", None) or -1.0),
            output_logits_soft_cap=float(getattr(h, "final_logit_softcapping", None) or -1.0),
        )

    @cached_property
    def hook_points(self) -> Mapping[str, Any]:
        points = dict(self.root.hook_dict)
        for layer in range(self.root.cfg.n_layers):
            stem = f"blocks.{layer}."
            if f"{stem}hook_resid_mid" in points:
                around = points[f"{stem}ln1.hook_in"], points[f"{stem}hook_attn_out"]
                points[f"{stem}hook_resid_mid"] = Middle(*around)
        return points

    @property
    def modules(self) -> tuple[nn.Module, ...]:
        return tuple(self.root.modules())

    @property
    def device(self) -> torch.device:
        device: torch.device = self._unembedding.weight.device
        return device

    def block_device(self, layer: int) -> torch.device:
        device: torch.device = self._attn(layer).W_O.device
        return device

    def _attn(self, layer: int) -> Any:
        return self.root.blocks[layer].attn

    def _own_attn(self, layer: int) -> Any:
        """Return Hugging Face's attention module."""
        return self._attn(layer).original_component

    def _linear(self, layer: int, name: str) -> Any:
        """Return a linear module of the attention or the MLP, by the bridge's name; None without."""
        block = self.root.blocks[layer]
        owner = block.attn if name in ("q", "k", "v", "o") else block._modules.get("mlp")
        part = None if owner is None else owner._modules.get(name)
        return None if part is None else part.original_component

    @property
    def _unembedding(self) -> Any:
        return self.hf.get_output_embeddings()

    # ---- embeddings and unembedding -----------------------------------------------------------

    def embed_tokens(self, ids: Tensor) -> Tensor:
        if self.cfg.positional_embedding_type == "standard":
            x: Tensor = self.hf.get_input_embeddings()(ids)
            return x
        return self.embed(ids)

    def embed(self, ids: Tensor) -> Tensor:
        return self._run(ids, [], stop=0)

    def unembed(self, columns: Tensor | None) -> Weight:
        W, b = self._unembedding.weight, getattr(self._unembedding, "bias", None)
        if columns is None:
            return Weight(W.T, b)
        return Weight(W[columns].T, None if b is None else b[columns])

    # ---- attention ------------------------------------------------------------------------------

    def qkv(self, layer: int) -> tuple[Weight, Weight, Weight]:
        attn = self._attn(layer)
        q, k, v = (Weight(getattr(attn, f"W_{m}"), getattr(attn, f"b_{m}", None)) for m in "QKV")
        return q, k, v

    def output(self, layer: int) -> Weight:
        return Weight(self._attn(layer).W_O, getattr(self._attn(layer), "b_O", None))

    def qk_norm(self, layer: int, name: str, x: Tensor) -> Tensor:
        norm = getattr(self._own_attn(layer), f"{name}_norm", None)
        return x if norm is None else norm(x)

    def rotary(self, layer: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        longest = int(positions.max()) + 1 if positions.numel() else 1
        if self._angles is None or longest > len(self._angles[0]):
            known = 0 if self._angles is None else len(self._angles[0])
            self._angles = self._rotation(max(longest, min(2 * known, self.cfg.n_ctx), 64))
        cos, sin = self._angles
        at = positions.to(cos.device)
        return cos[at].to(positions.device), sin[at].to(positions.device)

    def _rotation(self, n: int) -> tuple[Tensor, Tensor]:
        """Return cos and sin of the first n positions, `[pos rotary_dim]`."""
        if self.cfg.rotary_adjacent_pairs:  # GPT-J: a table of sines, then cosines, of pairs
            named = self.hf.named_buffers()
            table = next(x for name, x in named if name.endswith("embed_positions"))[:n]
            sin, cos = (half.repeat_interleave(2, -1) for half in table.chunk(2, -1))
            return cos.to(self.cfg.dtype), sin.to(self.cfg.dtype)
        rope = getattr(self.hf.config, "rope_parameters", None) or {}
        kind = rope.get("rope_type", "default")
        if kind not in _ROPES:
            raise ModelError(f"rotation of rope_type {kind!r} changes with the prompt's length")
        module = self.root.rotary_emb.original_component
        like = torch.empty(1, 1, self.cfg.d_model, dtype=self.cfg.dtype, device=self.device)
        cos, sin = module(like, torch.arange(n, device=self.device)[None])
        return cos[0], sin[0]

    def scale(self, layer: int) -> float:
        attn = self._own_attn(layer)
        factor = getattr(attn, "scaling", None) or getattr(attn, "inv_norm_factor", None)
        return math.sqrt(self.cfg.d_head) if factor is None else 1.0 / float(factor)

    def window(self, layer: int) -> int | None:
        c = self.hf.config
        size, types = getattr(c, "sliding_window", None), getattr(c, "layer_types", None)
        if size is None or (types and types[layer] != "sliding_attention"):
            return None
        local = bool(types) or self.cfg.original_architecture == "MistralForCausalLM"
        return int(size) if local else None

    def slopes(self, layer: int) -> Tensor:
        from transformers.models.bloom.modeling_bloom import build_alibi_tensor

        mask = torch.ones(1, 2, device=self.device)
        alibi = build_alibi_tensor(mask, self.cfg.n_heads, torch.float32)  # [head 1 key]
        return alibi[:, 0, 1] - alibi[:, 0, 0]

    # ---- MLP and norms ----------------------------------------------------------------------------

    def mlp(self, layer: int) -> MLPWeights | None:
        mlp = self.root.blocks[layer].mlp
        first, last = self._linear(layer, "in"), self._linear(layer, "out")
        if first is None or last is None or self.cfg.act_fn not in ACTIVATIONS:
            return None
        gate = self._linear(layer, "gate")
        if gate is None:
            return MLPWeights(mlp.W_in, mlp.W_out, self.cfg.act_fn, first.bias, last.bias)
        return MLPWeights(
            mlp.W_in, mlp.W_out, self.cfg.act_fn, None, last.bias, mlp.W_gate, gate.bias, first.bias
        )

    def run_mlp(self, layer: int, x: Tensor) -> Tensor:
        mlp = self.root.blocks[layer].mlp
        y: Tensor = mlp(x) if x.ndim == 3 else mlp(x[None])[0]
        return y

    def act(self, layer: int, x: Tensor) -> Tensor:
        from transformers.activations import ACT2FN

        name = self.cfg.act_fn
        return ACTIVATIONS[name](x) if name in ACTIVATIONS else ACT2FN[name](x)

    def norm(self, layer: int | None, name: str, x: Tensor) -> Tensor:
        owner = self.root if layer is None else self.root.blocks[layer]
        if name == "ln2" and "ln2" not in owner._modules:  # GPT-J: one norm for both
            name = "ln1"
        norm = getattr(owner, name).original_component
        plain = x.dtype in (torch.float32, torch.float64)
        if plain and type(norm).__name__ in _PLAIN_RMS:
            return F.rms_norm(x, (x.shape[-1],), norm.weight, norm.variance_epsilon)
        y: Tensor = norm(x)
        return y

    def hooked_norm(self, x: Tensor) -> Tensor:
        y: Tensor = self.root.ln_final(x[None])[0]
        return y

    # ---- hooks and passes -------------------------------------------------------------------------

    def point(self, layer: int, name: str) -> nn.Module:
        stem = f"blocks.{layer}."
        shared = f"{stem}ln2.hook_out" not in self.hook_points
        inside = {
            "ln1": "attn.hook_in" if shared else "ln1.hook_out",
            "ln2": "mlp.hook_in" if shared else "ln2.hook_out",
            "projected": "attn.o.hook_out",
            "mlp": "mlp.out.hook_out",
            "scores": "attn.hook_attn_scores",
        }
        of_attention = ("q", "k", "v", "z", "rot_q", "rot_k", "pattern")
        owner = "attn." if name in of_attention else ""
        owner = "mlp." if name in ("pre", "pre_linear", "post") else owner
        full = stem + inside.get(name, f"{owner}hook_{name}")
        if full not in self.hook_points:
            raise KeyError(f"layer {layer} has no {name}")
        point: nn.Module = self.hook_points[full]
        return point

    def scales(self) -> list[nn.Module]:
        return [p for name, p in self.hook_points.items() if name.endswith("hook_scale")]

    def forward(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        layers = self.cfg.n_layers
        if start == layers:
            return x if stop is not None else self._finished(x)
        if stop is not None and stop <= start:
            return x
        nothing = torch.zeros(x.shape[:2], dtype=torch.long, device=self.device)
        return self._run(nothing, [(self._entry(start), lambda _: x)], stop)

    def _entry(self, layer: int) -> nn.Module:
        """Return the point that what enters a block passes first; the final norm after the last."""
        last = layer == self.cfg.n_layers
        point = self.root.ln_final.hook_in if last else self.hook_points[f"blocks.{layer}.hook_in"]
        return point  # type: ignore[no-any-return]

    def _run(self, ids: Tensor, points: list[Point], stop: int | None) -> Tensor:
        """Run tokens with hooks that act before all others; the logits where `stop` is None."""
        ends: list[Point] = [] if stop is None else [(self._entry(stop), _stop)]
        try:
            with hooked_at([*points, *ends], first=True):
                logits: Tensor = self.root.forward(ids, return_type="logits")
                return logits
        except _Stopped as stopped:
            return stopped.stream

    def _finished(self, x: Tensor) -> Tensor:
        logits: Tensor = self.root.unembed(self.root.ln_final(x))
        return logits

    # ---- matrices, by name ------------------------------------------------------------------------

    def matrix(self, layer: int, name: str) -> Weight:
        W, b = self._view(layer, name)
        flat = flat_matrix(name, W)
        inside = name == "W_gate" or (name == "W_in" and self.cfg.gated_mlp)
        if b is None and not inside:  # as a `HookedTransformer` has it, so that an edit may set it
            b = flat.new_zeros(flat.shape[1])
        return Weight(flat, None if b is None else b.flatten())

    def _view(self, layer: int, name: str) -> tuple[Tensor, Tensor | None]:
        """Return a view of the weight that the forward pass reads, and its bias."""
        of_attention = name in ("W_Q", "W_K", "W_V", "W_O")
        owner = self._attn(layer) if of_attention else self.root.blocks[layer].mlp
        return getattr(owner, name), self._linear(layer, name[2:].lower()).bias

    @torch.no_grad()
    def set_matrix(self, layer: int, name: str, W: Tensor, b: Tensor | None) -> None:
        own, bias = self._view(layer, name)
        own.copy_(W if own.ndim == 2 else by_head(name, W, len(own)))
        if b is None:
            return
        if bias is None and bool(b.any()):
            linear = self._linear(layer, name[2:].lower())
            linear.bias = nn.Parameter(b.to(own).clone(), requires_grad=False)
        elif bias is not None:
            bias.copy_(b.view_as(bias))

    def twin(self) -> Any:
        return copy.deepcopy(self.root)


__all__ = ["BridgeBackend", "BridgeConfig", "bridge_from_hf", "is_bridge"]
