"""Taking an edit out of this project: merged into a plain Hugging Face folder, or as a peft adapter.

`merge` writes the base model with the edit in its weights, so that anything that runs Hugging Face
models runs it. Weight edits merge always. LoReFT and its affine relatives merge where a matrix
makes the whole activation, attn_out or mlp_out at all positions: with h' = h M + c, M = 1 + (W -
R)^T R and c = b R, the matrix becomes W_O M and its bias b_O M + c. Everything else is refused with
the reason.

The same numbers stand in another order in a Hugging Face model (fused, transposed, interleaved by
head). No table of architectures is kept for that: a model whose weights are their own addresses is
read once through a bridge, and what is read then says where each number came from.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import EditError, choices
from ..model import Model
from ..model.bridge import BridgeBackend, bridge_from_hf
from ..records import write_json
from .base import Matrix, Part, Shape
from .edit import SHARED, Edit
from .lowrank import DoRA, LoRA

BIASES = {
    "W_Q": ("attention_bias", "self_attn.q_proj.bias"), "W_K": ("attention_bias", "self_attn.k_proj.bias"),
    "W_V": ("attention_bias", "self_attn.v_proj.bias"), "W_O": ("attention_bias", "self_attn.o_proj.bias"),
    "W_out": ("mlp_bias", "mlp.down_proj.bias"),
}  # fmt: skip
"""Biases that Llama has on request: our matrix -> (the setting, the bias's name in a layer)."""


def merge(edit: Edit, model: Model, folder: str | Path, hf_model: Any = None) -> Path:
    """Write `model` with `edit` in its weights as a Hugging Face folder.

    Args:
        edit: of `model`.
        model: the base.
        folder: new, or empty.
        hf_model: the base as a Hugging Face model; loaded again from where `model` came from when
            None. It is not changed.

    Raises:
        EditError: a part of the edit cannot be expressed by weights, or Hugging Face's model has no
            place for one; nothing is written then.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise EditError(f"{folder} is not empty; a merged model is written to a new folder")
    if hf_model is None and model.source is None:
        raise EditError(
            f"{model.name} came from memory; give merge(hf_model=...) the Hugging Face model to write"
        )
    merged = edit.merged(model)
    hf = _twin(hf_model if hf_model is not None else _load(model))
    places = [(n, m) for n in edit.layers for m in Shape.of(model).matrices]
    slots = _Slots(hf, edit.layers)
    with torch.no_grad():
        for layer, name in places:
            for new, old, where in zip(
                merged.backend.matrix(layer, name),
                model.backend.matrix(layer, name),
                slots.of(layer, name),
                strict=True,
            ):
                if new is None or (old is not None and torch.equal(new, old)):
                    continue
                if where is None:
                    hf = _add_bias(hf, layer, name, new)
                    slots.rest_in(hf)
                else:
                    slots.write(where, new)
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        hf.save_pretrained(temporary)
        model.tokenizer.save_pretrained(temporary)
        temporary.chmod(0o755)
        if folder.exists():
            folder.rmdir()
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return folder


def _load(model: Model) -> Any:
    from ..model.huggingface import load_hf

    return load_hf(str(model.source), model.dtype)


def _twin(hf: Any) -> Any:
    """Return a copy that may be written to."""
    import copy

    return copy.deepcopy(hf).eval().requires_grad_(False)


class _Slots:
    """Where the numbers of our matrices stand in a Hugging Face model.

    A twin whose weights are their own addresses is read through a `TransformerBridge`: what it gives
    as a matrix says where each number comes from. Address 0 is nobody's.

    Args:
        hf: the model that is written to.
        layers: whose weights are wanted.
    """

    def __init__(self, hf: Any, layers: tuple[int, ...]):
        self.starts: dict[str, tuple[int, int]] = {}
        at = 1
        for name, p in hf.named_parameters():
            match = re.search(r"\.(\d+)\.", name)
            if match and int(match[1]) in layers:
                self.starts[name] = (at, at + p.numel())
                at += p.numel()
        self.backend = BridgeBackend(bridge_from_hf(self._ghost(hf)))
        self.rest_in(hf)

    def _ghost(self, hf: Any) -> Any:
        """Return the twin; weights of other layers are zeros that take no memory."""
        with torch.device("meta"):
            ghost = type(hf)(hf.config)
        nothing = torch.zeros((), dtype=torch.float64)
        for stem, module in ghost.named_modules():
            for name, p in list(module._parameters.items()):
                if p is not None:
                    start, end = self.starts.get(f"{stem}.{name}", (0, 0))
                    own = (
                        torch.arange(start, end, dtype=torch.float64).view(p.shape) if end else None
                    )
                    value = nothing.expand(p.shape) if own is None else own
                    module._parameters[name] = nn.Parameter(value, requires_grad=False)
            for name, buffer in list(module._buffers.items()):
                if buffer is not None:
                    module._buffers[name] = torch.zeros_like(buffer, device="cpu")
        return ghost

    def rest_in(self, hf: Any) -> None:
        """Write to this model from now on."""
        self.flat = dict(hf.named_parameters())

    def of(self, layer: int, name: str) -> tuple[Tensor, Tensor | None]:
        """Return the addresses of a matrix and of its bias; None where there is no bias."""
        W, b = self.backend.matrix(layer, name)
        known = b is not None and bool(b.any())  # zeros stand for a bias that is not there
        return W.round().long(), b.round().long() if known and b is not None else None

    def write(self, where: Tensor, value: Tensor) -> None:
        """Write numbers to their addresses."""
        addresses, numbers = where.flatten(), value.flatten()
        for target, (start, end) in self.starts.items():
            inside = (addresses >= start) & (addresses < end)
            if bool(inside.any()):
                own = self.flat[target]
                own.view(-1)[addresses[inside] - start] = numbers[inside.to(numbers.device)].to(own)


def _add_bias(hf: Any, layer: int, name: str, value: Tensor) -> Any:
    """Return `hf` with a bias that its configuration left out.

    Raises:
        EditError: the architecture has no such bias.
    """
    setting, theirs = BIASES.get(name, ("", ""))
    kind = type(hf).__name__
    if kind != "LlamaForCausalLM" or not setting:
        raise EditError(
            f"the edit gives layer {layer} a bias behind {name}, and {kind} has none there; use `Edit.merged`, which keeps it in memory"
        )
    if not getattr(hf.config, setting):
        state = hf.state_dict()
        setattr(hf.config, setting, True)
        dtype = hf.dtype
        hf = type(hf)(hf.config).to(dtype).eval().requires_grad_(False)
        for p in hf.parameters():
            if p.ndim == 1:
                p.zero_()
        hf.load_state_dict(state, strict=False)
    hf.get_parameter(f"model.layers.{layer}.{theirs}").copy_(value.flatten())
    return hf


# ---- peft -------------------------------------------------------------------------------------------------------------------------

_LLAMA = {
    "W_Q": "self_attn.q_proj", "W_K": "self_attn.k_proj", "W_V": "self_attn.v_proj", "W_O": "self_attn.o_proj",
    "W_in": "mlp.up_proj", "W_gate": "mlp.gate_proj", "W_out": "mlp.down_proj",
}  # fmt: skip
MODULES: dict[str, tuple[str, dict[str, str]]] = {
    "LlamaForCausalLM": ("model.layers", _LLAMA),
    "MistralForCausalLM": ("model.layers", _LLAMA),
    "Qwen2ForCausalLM": ("model.layers", _LLAMA),
    "Gemma2ForCausalLM": ("model.layers", _LLAMA),
    "GPT2LMHeadModel": ("transformer.h", {"W_O": "attn.c_proj"}),
    "GPTNeoXForCausalLM": ("gpt_neox.layers", {"W_O": "attention.dense"}),
    "GPTJForCausalLM": ("transformer.h", {"W_O": "attn.out_proj"}),
    "BloomForCausalLM": ("transformer.h", {"W_O": "self_attention.dense"}),
}
"""Architecture -> where its layers are, and the modules whose inputs and outputs are those of our
matrices."""


def export_peft(edit: Edit, model: Model, folder: str | Path, partial: bool = False) -> Path:
    """Write the low-rank weight edits as a peft adapter (`adapter_config.json`,
    `adapter_model.safetensors`).

    Args:
        edit: of `model`.
        model: the base.
        folder: where to.
        partial: leave out what peft cannot hold (edits of representations), instead of refusing.

    Raises:
        EditError: a part is no LoRA, or its module cannot be named in this architecture; nothing
            has been written.
    """
    edit.check(model)
    architecture = str(model.cfg.original_architecture)
    if architecture not in MODULES:
        raise EditError(
            f"no module names are known for {architecture}; a peft adapter can be written for {choices(MODULES)}"
        )
    stem, modules = MODULES[architecture]
    low_rank = [
        (i, p)
        for i, p in zip(edit, edit.parts, strict=True)
        if isinstance(i, LoRA) and not isinstance(i, DoRA)
    ]
    if not low_rank or (len(low_rank) < len(edit.parts) and not partial):
        other = next((p for p in edit.parts if p.family != "lora"), None)
        raise EditError(
            f"peft cannot hold {other.family if other else 'this edit'} at {other.place if other else 'any place'}; only lora is exported"
        )
    tensors, targets = {}, []
    for i, part in low_rank:
        assert isinstance(i.place, Matrix)
        if i.place.name not in modules:
            raise EditError(
                f"{i.place} is no module of its own in {architecture}; accepted: {choices(modules)}"
            )
        if _own(part) != _own(low_rank[0][1]):
            raise EditError(
                f"lora at {part.place} has other options than at {low_rank[0][1].place}; one peft adapter has one rank and one scale"
            )
        module = f"{stem}.{i.place.layer}.{modules[i.place.name]}"
        targets.append(module)
        tensors[f"base_model.model.{module}.lora_A.weight"] = i.A.detach().T.contiguous().cpu()
        tensors[f"base_model.model.{module}.lora_B.weight"] = i.B.detach().T.contiguous().cpu()
    options = _own(low_rank[0][1])
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model.source or model.name,
        "r": low_rank[0][0].rank,
        "lora_alpha": options.get("alpha", 8.0),
        "use_rslora": options.get("rank_stabilised", False),
        "lora_dropout": options.get("dropout", 0.0),
        "target_modules": targets,
        "fan_in_fan_out": architecture == "GPT2LMHeadModel",
        "bias": "none",
        "inference_mode": True,
    }
    return _write_peft(Path(folder), tensors, config)


def _own(part: Part) -> dict[str, Any]:
    """Return the options of a part; an adapter of peft holds shared parameters at each place."""
    return {name: value for name, value in part.options.items() if name != SHARED}


def _write_peft(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    write_json(folder / "adapter_config.json", config)
    return folder
