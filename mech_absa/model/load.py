"""Load a model from the package, a folder, the hub or memory, ready to be traced and edited.

The raw weights stay: no LayerNorm folding, no centring, so the logits are the model's own. Every
load compares a short forward pass with Hugging Face's and rejects a model that TransformerLens
converts wrongly. `Model.verify` repeats that on longer text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ..errors import ConfigError, ModelError, choices
from ..words import expect
from .block import run
from .bridge import bridge_from_hf
from .convert import hooked_from_hf
from .hashes import base_hash
from .huggingface import first_line, load_hf, load_tokenizer, resolve
from .model import Model

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


def load_model(
    model: str | Path | tuple[Any, Any] | Any = None,
    *,
    device: str = "auto",
    dtype: str | torch.dtype = "float32",
    bos: bool | None = None,
    n_devices: int = 1,
    check: bool = True,
    backend: str = "auto",
) -> Model:
    """Load a model to be traced and edited.

    Args:
        model: None or `"bundled"` for the small one that ships with the package; `"smollm2"` for
            the one that `python -m mech_absa.models get smollm2` downloads; a local Hugging Face
            folder; a GGUF file; a hub name; or a pair (Hugging Face model, tokenizer) in memory.
        device: `auto` (a GPU if there is one), `cpu`, `cuda`, `cuda:1`, `mps`.
        dtype: of weights and activations. Metrics are always float32 or wider.
        bos: put the BOS token first; None follows the tokenizer.
        n_devices: spread the layers over this many devices.
        check: compare a short forward pass with Hugging Face's and reject a model that differs.
        backend: `hooked` for TransformerLens's `HookedTransformer` (up to 3.9), `bridge` for its
            `TransformerBridge`, which copies no weights; `auto` is the first of them that is there.

    Raises:
        ModelError: nothing is there, it has no weights, it does not fit, or TransformerLens runs it
            differently.

    Example:
        >>> import mech_absa as ma
        >>> model = ma.load_model()
        >>> model.name
        'bundled'
    """
    chosen = _device(device)
    _check_devices(n_devices, chosen)
    kind = _dtype(dtype)
    runs_on = _backend(backend)
    source: str | None = None
    if isinstance(model, tuple):
        hf, tokenizer = model
        name = Path(getattr(hf.config, "_name_or_path", "") or type(hf).__name__).name
    else:
        if model is not None:
            expect(
                model, (str, Path), "load_model(model=...)", "bundled, a folder, a file or a name"
            )
        source, name = resolve(model)
        tokenizer = load_tokenizer(source)
        hf = load_hf(source, kind, 1 if runs_on == "bridge" else 2)
    _covers(hf, tokenizer, name)
    held, count = base_hash(hf, source), hf.num_parameters()  # a bridge changes what hf lists
    root = _root(hf, runs_on, kind, chosen, n_devices)
    loaded = Model(root, tokenizer, name, source, bos, count)
    loaded.base_sha256 = held
    loaded.backend.unreadable = unreadable(loaded)
    if check:
        loaded.hf_difference = loaded.verify(hf_model=hf)
        allowed = {torch.float64: 1e-3, torch.float32: 5e-3}.get(kind, 1.0)
        if not loaded.hf_difference <= allowed:
            raise ModelError(
                f"{name}: logits differ by up to {loaded.hf_difference:.3g} from Hugging Face's (allowed: {allowed:g}); TransformerLens does not "
                f"convert this configuration of {type(hf).__name__} faithfully, and a trace of it would be of another model"
            )
    return loaded


BACKENDS = ("auto", "hooked", "bridge")


def _backend(word: str) -> str:
    """Return `hooked` or `bridge`.

    Raises:
        ConfigError: the word is unknown, or this TransformerLens has no `HookedTransformer`.
    """
    if word not in BACKENDS:
        raise ConfigError(f"unknown backend {word!r}; accepted: {choices(BACKENDS)}")
    if word == "bridge":
        return word
    try:
        from transformer_lens import HookedTransformer  # noqa: F401
    except ImportError:
        if word == "auto":
            return "bridge"
        from importlib.metadata import version

        raise ConfigError(
            "the backend hooked was asked for, and transformer-lens "
            f"{version('transformer-lens')} has no HookedTransformer; accepted: auto or bridge, or "
            "install transformer-lens==3.9.0"
        ) from None
    return "hooked"


def _root(hf: Any, backend: str, dtype: torch.dtype, device: torch.device, n_devices: int) -> Any:
    """Return TransformerLens's module around a Hugging Face model.

    Raises:
        ConfigError: layers of a bridge cannot be spread.
    """
    if backend == "hooked":
        return hooked_from_hf(hf, dtype, device, n_devices)
    if n_devices > 1:
        raise ConfigError(
            f"{n_devices} devices were asked for; the bridge runs on one: use --backend hooked with "
            "transformer-lens==3.9.0"
        )
    return bridge_from_hf(hf if hf.dtype == dtype else hf.to(dtype), device)


@torch.inference_mode()
def unreadable(model: Model) -> str | None:
    """Return why the weights of a bridge, read one by one, do not make its forward pass.

    They are compared on a short pass. Architectures that nobody has read run all the same where
    they agree; where not, every cell is a hooked forward pass.
    """
    if model.backend.name != "bridge":
        return None
    architecture = model.cfg.original_architecture
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(model.d_vocab, (2, min(12, model.n_ctx)), generator=draw)
    try:
        x = model.embed(ids)
        theirs = model.backend.forward(x)
        ours = model.finish(run(model, x)[0].flatten(0, 1), None, "vocabulary")
    except (AttributeError, TypeError, RuntimeError, KeyError, ValueError, ModelError) as error:
        return f"blocks of {architecture} that cannot be read ({first_line(error)})"
    theirs = theirs.flatten(0, 1).to(ours)
    off = float((ours - theirs).abs().max())
    allowed = 1e-3 if model.dtype in (torch.float32, torch.float64) else 0.1
    if off <= allowed * max(1.0, float(theirs.abs().max())):
        return None
    return (
        f"blocks of {architecture} that read otherwise than they run (logits differ by {off:.2g})"
    )


def _covers(hf: Any, tokenizer: Any, name: str) -> None:
    """Reject a tokenizer whose token ids have no embedding in the model."""
    ids, rows = tokenizer.vocab_size, hf.get_input_embeddings().weight.shape[0]
    if ids > rows:
        raise ModelError(
            f"{name}: the tokenizer has {ids} tokens and the model embeddings for {rows}; they "
            "do not belong together"
        )


def _device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ConfigError(
            f"unknown device {device!r}; accepted: auto, cpu, cuda, cuda:1, mps"
        ) from None
    if chosen.type not in ("cpu", "cuda", "mps"):
        raise ConfigError(
            f"device {device!r} is not supported; accepted: auto, cpu, cuda, cuda:1, mps"
        )
    if chosen.type == "mps" and not torch.backends.mps.is_available():
        raise ConfigError("device 'mps' was asked for; this machine has none")
    if chosen.type == "cuda" and (
        not torch.cuda.is_available() or (chosen.index or 0) >= torch.cuda.device_count()
    ):
        raise ConfigError(
            f"device {device!r} was asked for; this machine has {torch.cuda.device_count()} CUDA devices"
        )
    return chosen


def _check_devices(n_devices: int, device: torch.device) -> None:
    """Refuse more accelerators than there are."""
    there = torch.cuda.device_count() if device.type == "cuda" else 1
    if not 1 <= n_devices <= there:
        raise ConfigError(
            f"n_devices {n_devices} was given; {device.type} offers {there} here, so 1"
            + (f" to {there} are accepted" if there > 1 else " is accepted")
        )


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}; accepted: {choices(DTYPES)}")
    return DTYPES[dtype]
