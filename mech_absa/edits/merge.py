"""Taking an edit out of this project: merged into a plain Hugging Face folder, or as a peft adapter.

`merge` writes the base model with the edit in its weights, so that anything that runs Hugging Face
models runs it. Weight edits merge always. LoReFT and its affine relatives merge where a matrix
makes the whole activation, attn_out or mlp_out at all positions: with h' = h M + c, M = 1 + (W -
R)^T R and c = b R, the matrix becomes W_O M and its bias b_O M + c. Everything else is refused with
the reason.

The same numbers stand in another order in a Hugging Face model (fused, transposed, interleaved by
head). No table of architectures is kept for that: a model whose weights are their own addresses is
converted once, and the converted tensors then say where each number came from.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import EditError, choices
from ..model import Model
from ..records import write_json
from .base import Matrix
from .edit import Edit
from .lowrank import DoRA, LoRA

BIASES = {
    "attn.b_Q": ("attention_bias", "self_attn.q_proj.bias"), "attn.b_K": ("attention_bias", "self_attn.k_proj.bias"),
    "attn.b_V": ("attention_bias", "self_attn.v_proj.bias"), "attn.b_O": ("attention_bias", "self_attn.o_proj.bias"),
    "mlp.b_out": ("mlp_bias", "mlp.down_proj.bias"),
}  # fmt: skip
"""Biases that Llama has on request: ours -> (the setting, its name in a layer)."""


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
    merged, old = edit.merged(model).state_dict(), model.state_dict()
    changed = {name: value for name, value in merged.items() if not torch.equal(value, old[name])}
    hf = _twin(hf_model if hf_model is not None else _load(model))
    addresses = _addresses(hf, edit.layers, model)
    flat = dict(hf.named_parameters())
    starts = _starts(hf, edit.layers)
    with torch.no_grad():
        for name, value in changed.items():
            where = addresses[name].flatten()
            if bool((where == 0).any()):
                hf = _add_bias(hf, name, value, model)
                flat = dict(hf.named_parameters())
                continue
            for target, (start, end) in starts.items():
                inside = (where >= start) & (where < end)
                if bool(inside.any()):
                    flat[target].view(-1)[where[inside] - start] = value.flatten()[inside].to(
                        flat[target]
                    )
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


def _of_layers(hf: Any, layers: tuple[int, ...]) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield the parameters of some layers, in their order."""
    for name, p in hf.named_parameters():
        match = re.search(r"\.(\d+)\.", name)
        if match and int(match[1]) in layers:
            yield name, p


def _starts(hf: Any, layers: tuple[int, ...]) -> dict[str, tuple[int, int]]:
    """Addresses [start, end) of every parameter of the layers; 0 is nobody's."""
    made, at = {}, 1
    for name, p in _of_layers(hf, layers):
        made[name] = (at, at + p.numel())
        at += p.numel()
    return made


def _addresses(hf: Any, layers: tuple[int, ...], model: Model) -> dict[str, Tensor]:
    """Return where every number of the converted model comes from: our names -> addresses, 0 where
    conversion made it up."""
    from transformer_lens import loading_from_pretrained as tl

    starts = _starts(hf, layers)
    with torch.device("meta"):
        ghost = type(hf)(hf.config)
    for module_name, module in ghost.named_modules():
        for name, p in list(module._parameters.items()):
            if p is None:
                continue
            start, end = starts.get(f"{module_name}.{name}", (0, 0))
            value = (
                torch.arange(start, end, dtype=torch.float64).view(p.shape)
                if end
                else torch.zeros((), dtype=torch.float64).expand(p.shape)
            )
            module._parameters[name] = nn.Parameter(value, requires_grad=False)
    state = tl.get_pretrained_state_dict(".", model.cfg, hf_model=ghost, dtype=torch.float64)
    own = model.state_dict()
    return {
        name: value.round().long().reshape(own[name].shape)
        for name, value in state.items()
        if name in own
    }


def _add_bias(hf: Any, name: str, value: Tensor, model: Model) -> Any:
    """Return `hf` with a bias that its configuration left out.

    Raises:
        EditError: the architecture has no such bias.
    """
    match = re.fullmatch(r"blocks\.(\d+)\.(.+)", name)
    assert match is not None
    setting, theirs = BIASES.get(
        match[2].replace("._", "."), ("", "")
    )  # grouped keys and values have names of their own
    kind = type(hf).__name__
    if kind != "LlamaForCausalLM" or not setting:
        raise EditError(
            f"the edit gives layer {match[1]} a bias at {match[2]}, and {kind} has none there; use `Edit.merged`, which keeps it in memory"
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
    hf.get_parameter(f"model.layers.{match[1]}.{theirs}").copy_(value.flatten())
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
        if part.options != low_rank[0][1].options:
            raise EditError(
                f"lora at {part.place} has other options than at {low_rank[0][1].place}; one peft adapter has one rank and one scale"
            )
        module = f"{stem}.{i.place.layer}.{modules[i.place.name]}"
        targets.append(module)
        tensors[f"base_model.model.{module}.lora_A.weight"] = i.A.detach().T.contiguous().cpu()
        tensors[f"base_model.model.{module}.lora_B.weight"] = i.B.detach().T.contiguous().cpu()
    options = low_rank[0][1].options
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


def _write_peft(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors")
    write_json(folder / "adapter_config.json", config)
    return folder
