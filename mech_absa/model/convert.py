"""Convert a Hugging Face model into TransformerLens's `HookedTransformer`, with unchanged weights
and configuration.

TransformerLens's own conversion ignores or guesses some settings. `_REPAIRS` reads them from
Hugging Face's configuration instead, one row per repair. The comparison of logits that every load
makes (`load`) finds what no repair covers.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ModelError
from .huggingface import first_line


def hooked_from_hf(
    hf: Any,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    n_devices: int = 1,
) -> Any:
    """Return a `HookedTransformer` with the raw weights of a loaded Hugging Face model.

    Raises:
        ModelError: TransformerLens does not know the architecture, or would ignore a setting of it.
    """
    from transformer_lens import HookedTransformer
    from transformer_lens import loading_from_pretrained as tl

    hf = hf.eval().requires_grad_(False)
    cfg = _hooked_config(hf, dtype, device, n_devices)
    with _silent():
        hooked = HookedTransformer(cfg, tokenizer=None, move_to_device=False)
        try:
            # "." exists as a path, so that no official name is looked up; the weights are hf's.
            state = tl.get_pretrained_state_dict(".", cfg, hf_model=hf, dtype=dtype)
        except (ValueError, AttributeError, KeyError, RuntimeError, TypeError) as error:
            raise ModelError(
                f"TransformerLens cannot convert {type(hf).__name__} ({first_line(error)})"
            ) from None
        _llama_biases(hf, state)
        for key, value in hooked.state_dict().items():
            if key not in state and key.endswith("W_pos"):  # Bloom's is unused, and would be random
                state[key] = torch.zeros_like(value)
        hooked.load_and_process_state_dict(
            state,
            fold_ln=False,
            center_writing_weights=False,
            center_unembed=False,
            fold_value_biases=False,
        )
    if n_devices > 1:
        hooked.move_model_modules_to_device()
    else:
        hooked = hooked.to(torch.device(device), print_details=False)
    _lay_out(hooked)
    return hooked.eval().requires_grad_(False)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Suppress TransformerLens's warnings about buffers that it makes during conversion."""
    logging.getLogger("transformer_lens").setLevel(logging.ERROR)
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)


@torch.no_grad()
def _lay_out(hooked: Any) -> None:
    """Store the weights in the order in which TransformerLens multiplies by them; their values stay
    the same.

    Its attention and gated MLP make a transposed copy of every weight at every forward pass, unless
    the memory already has that order. These copies cost up to a third of a pass over a short batch.
    """

    def store(p: torch.nn.Parameter, *order: int) -> None:
        back = sorted(range(p.ndim), key=order.__getitem__)
        p.data = p.data.permute(order).contiguous().permute(back)

    for block in hooked.blocks:
        for name, p in block.attn.named_parameters(recurse=False):
            if name.lstrip("_") in ("W_Q", "W_K", "W_V") and p.ndim == 3:
                store(p, 0, 2, 1)  # [head d_model d_head], read as [(head d_head) d_model]
            elif name == "W_O" and p.ndim == 3:
                store(p, 2, 0, 1)  # [head d_head d_model], read as [d_model (head d_head)]
        if type(getattr(block, "mlp", None)).__name__ == "GatedMLP":
            for name in ("W_in", "W_gate", "W_out"):
                store(getattr(block.mlp, name), 1, 0)


def _llama_biases(hf: Any, state: dict[str, Tensor]) -> None:
    """Put the biases of a Llama (`attention_bias`, `mlp_bias`) where TransformerLens's conversion
    writes zeros.
    """
    if type(hf).__name__ != "LlamaForCausalLM":
        return
    for layer, block in enumerate(hf.model.layers):
        attn, mlp = block.self_attn, block.mlp
        own = {
            "attn.b_Q": attn.q_proj,
            "attn.b_O": attn.o_proj,
            "mlp.b_in": mlp.up_proj,
            "mlp.b_out": mlp.down_proj,
        }
        own |= {
            f"attn.{grouped}b_{m}": getattr(attn, f"{m.lower()}_proj")
            for m in "KV"
            for grouped in ("", "_")
        }
        for name, module in own.items():
            if module.bias is not None and (key := f"blocks.{layer}.{name}") in state:
                state[key] = module.bias.detach().reshape(state[key].shape).to(state[key])


def _hooked_config(hf: Any, dtype: torch.dtype, device: str | torch.device, n_devices: int) -> Any:
    """Return TransformerLens's configuration, repaired from Hugging Face's."""
    from transformer_lens import HookedTransformerConfig

    c, architecture = hf.config, type(hf).__name__
    rope_type = _rope(c).get("rope_type", "default")
    if isinstance(rope_type, str) and rope_type not in ("default", "llama3"):
        raise ModelError(
            f"{architecture} with rope_type {rope_type!r} is not supported by TransformerLens; "
            "accepted: default, and llama3 in Llama"
        )
    known = {"GemmaForCausalLM": _gemma, "Gemma2ForCausalLM": _gemma2}
    cfg = known[architecture](c) if architecture in known else _converted(c, architecture)
    for architectures, repair, _ in _REPAIRS:
        if not architectures or architecture in architectures:
            cfg |= repair(c, cfg)
    cfg |= dict(
        tokenizer_name=None,
        dtype=dtype,
        device=str(device),
        n_devices=n_devices,
        init_weights=False,
        from_checkpoint=False,
        model_name=Path(getattr(c, "_name_or_path", "") or "custom").name or "custom",
        original_architecture=cfg.get("original_architecture", architecture),
    )
    cfg.setdefault("default_prepend_bos", True)
    return HookedTransformerConfig.from_dict(cfg)


def _converted(c: Any, architecture: str) -> dict[str, Any]:
    """Return what TransformerLens makes of a configuration by itself.

    It reads the configuration from a folder, and branches on words such as "llama" anywhere in the
    path: the folder that it is given has a neutral name.
    """
    from transformer_lens import loading_from_pretrained as tl

    with tempfile.TemporaryDirectory(prefix="cfg-") as folder:
        written = c.to_dict() | {"architectures": [architecture]}
        if architecture == "GPT2LMHeadModel":
            written.setdefault("n_ctx", c.n_positions)
        (Path(folder) / "config.json").write_text(json.dumps(written, default=str))
        try:
            cfg: dict[str, Any] = tl.convert_hf_model_config(folder)
        except (
            ValueError,
            NotImplementedError,
            AttributeError,
            KeyError,
            UnboundLocalError,
        ) as error:
            raise ModelError(
                f"TransformerLens does not know the architecture {architecture} "
                f"({first_line(error)})"
            ) from None
    return cfg


def _gemma(c: Any) -> dict[str, Any]:
    """Return the configuration of a Gemma, which TransformerLens knows by official names only."""
    return dict(
        d_model=c.hidden_size, d_head=c.head_dim, n_heads=c.num_attention_heads,
        n_key_value_heads=c.num_key_value_heads, d_mlp=c.intermediate_size,
        n_layers=c.num_hidden_layers, n_ctx=c.max_position_embeddings, eps=c.rms_norm_eps,
        d_vocab=c.vocab_size, act_fn="gelu_pytorch_tanh", normalization_type="RMS", final_rms=True,
        gated_mlp=True, positional_embedding_type="rotary",
        original_architecture="GemmaForCausalLM",
    )  # fmt: skip


def _gemma2(c: Any) -> dict[str, Any]:
    """Return the configuration of a Gemma-2, which TransformerLens knows by official names only."""
    return _gemma(c) | dict(
        act_fn=c.hidden_activation,
        original_architecture="Gemma2ForCausalLM",
        use_normalization_before_and_after=True,
        attn_scale=math.sqrt(c.query_pre_attn_scalar),
        attn_scores_soft_cap=c.attn_logit_softcapping or -1.0,
        output_logits_soft_cap=c.final_logit_softcapping or -1.0,
    )


def _rope(c: Any) -> dict[str, Any]:
    return getattr(c, "rope_parameters", None) or {}


def _context(c: Any, cfg: dict[str, Any]) -> dict[str, Any]:
    length = getattr(c, "max_position_embeddings", None) or getattr(c, "n_positions", None)
    return {"n_ctx": length or cfg["n_ctx"]}


def _inner_width(c: Any, cfg: dict[str, Any]) -> dict[str, Any]:
    return {"d_mlp": c.n_inner} if getattr(c, "n_inner", None) else {}


def _head_width(c: Any, cfg: dict[str, Any]) -> dict[str, Any]:
    width = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
    return {"d_head": width, "rotary_dim": width}


def _rotary_base(c: Any, cfg: dict[str, Any]) -> dict[str, Any]:
    base = _rope(c).get("rope_theta")
    rotary = cfg.get("positional_embedding_type") == "rotary"
    return {"rotary_base": base} if rotary and isinstance(base, (int, float)) else {}


def _windows(c: Any, cfg: dict[str, Any]) -> dict[str, Any]:
    types = getattr(c, "layer_types", None) or ()
    if "sliding_attention" not in types:
        return {}
    local = ["local" if t == "sliding_attention" else "global" for t in types]
    return {"use_local_attn": True, "window_size": c.sliding_window, "attn_types": local}


_Repair = Callable[[Any, dict[str, Any]], dict[str, Any]]

_REPAIRS: tuple[tuple[tuple[str, ...], _Repair, str], ...] = (
    ((), _context, "the context is Hugging Face's; TransformerLens caps some at 2048 or guesses"),
    ((), _inner_width, "GPT-2 and GPT-J may have an MLP of another width than 4 d_model"),
    (("GPTJForCausalLM",), lambda c, cfg: {"eps": c.layer_norm_epsilon}, "eps is fixed at 1e-5"),
    (
        ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM"),
        _head_width,
        "head_dim is ignored where it is not d_model / n_heads",
    ),
    ((), _rotary_base, "rope_theta of newer configurations stands in rope_parameters"),
    ((), _windows, "which layers have a sliding window is guessed by the model's name"),
)
"""(architectures, all where empty; what to change; why): one row per repair, applied in order."""
