"""Load what Hugging Face holds: names, folders, tokenizers and models.

A model whose files and configuration do not fit together is rejected. transformers fills missing
weights with random numbers, and its warning is easily missed. Here its report is read: any weight
that is missing, unused or of another shape is an error that names it.
"""

from __future__ import annotations

import contextlib
import io
import os
import struct
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from ..errors import ModelError
from . import downloads
from .gguf_file import arguments, check_gguf, forget_quantisation, is_gguf

BUNDLED = Path(__file__).parents[1] / "assets" / "model"
"""The folder of the model that ships with the package."""

MAX_LAYERS = 1000
"""Most layers of a configuration; building more would not end."""

_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_DAMAGED = (
    OSError,
    ValueError,
    KeyError,
    RuntimeError,
    TypeError,
    AttributeError,
    ZeroDivisionError,
    IndexError,  # a GGUF file that ends too early
    AssertionError,
    OverflowError,
    struct.error,  # a GGUF file that ends in its header
    # weights_only met something else than tensors
    torch.serialization.pickle.UnpicklingError,  # type: ignore[attr-defined]
    StrictDataclassError,
)
"""Errors that transformers raises for files that it cannot read."""


def resolve(model: str | Path | None) -> tuple[str, str]:
    """Return what to load from, and the name to show."""
    if model is None or str(model) == "bundled":
        if not (BUNDLED / "config.json").exists():
            raise ModelError(
                f"the bundled model is missing from {BUNDLED}; reinstall the package, or give --model a folder or a hub name"
            )
        return str(BUNDLED), "bundled"
    if str(model) == downloads.SMOLLM2:
        return str(downloads.here(downloads.SMOLLM2)), downloads.SMOLLM2
    path = Path(model)
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ModelError(
                f"the folder {path} has no config.json; a Hugging Face model folder is needed"
            )
        if not any(any(path.glob(pattern)) for pattern in _WEIGHTS):
            raise ModelError(
                f"the folder {path} has a config.json but no weights; model.safetensors (or its shards) is needed"
            )
        return str(path), path.resolve().name
    if is_gguf(path):
        check_gguf(path)
        return str(path), path.stem
    if path.is_file():
        raise ModelError(
            f"{path} is a file; the folder that holds config.json and the weights is needed, "
            "or a file that ends in .gguf"
        )
    if str(model).count("/") > 1 or str(model).startswith((".", "/", "~")):
        raise ModelError(
            f"there is no folder {path}; accepted: a local Hugging Face folder, a GGUF file, a hub name such as gpt2, or 'bundled'"
        )
    with contextlib.suppress(ValueError, ImportError):  # newer versions have no such list
        from transformer_lens.loading_from_pretrained import get_official_model_name

        return get_official_model_name(str(model)), Path(str(model)).name
    return str(model), Path(str(model)).name


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress progress bars and warnings of the libraries while they load; errors still raise."""
    import transformers

    level = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with contextlib.redirect_stderr(io.StringIO()):  # a bar of GGUF files obeys nothing
                yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()


def load_tokenizer(source: str) -> Any:
    from transformers import AutoTokenizer

    place, gguf = arguments(source)
    try:
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(place, **gguf)
        if not tokenizer(
            "a", add_special_tokens=False
        ).input_ids:  # transformers makes an empty one where the files are missing
            raise ValueError("its vocabulary is empty")
    except Exception as error:  # the tokenizers library raises plain exceptions
        if gguf:
            needed = "a whole GGUF file with a byte-level BPE or SentencePiece vocabulary is needed"
        elif Path(source).is_dir():
            needed = "tokenizer.json is needed beside the model"
        else:
            needed = "where the hub cannot be reached, give a local folder"
        raise ModelError(
            f"{source}: no tokenizer could be loaded ({first_line(error)}); {needed}"
        ) from None
    return tokenizer


def load_hf(source: str, dtype: torch.dtype, copies: int = 2) -> Any:
    """Load a causal language model with exactly the weights that its files hold.

    Args:
        source: a folder, a GGUF file or a hub name.
        dtype: of the weights in memory.
        copies: how many of them must fit into memory; a conversion holds two.

    Raises:
        ModelError: there is none, it does not fit into memory, or files and configuration disagree.
    """
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM

    place, gguf = arguments(source)
    try:
        with quiet():
            config = AutoConfig.from_pretrained(place, **gguf)
            _fits(config, dtype, source, copies)
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                place, dtype=dtype, attn_implementation="eager", output_loading_info=True, **gguf
            )
            model, report = loaded
    except (*_DAMAGED, SafetensorError) as error:
        raise ModelError(
            f"{source}: no model could be loaded ({first_line(error)}); accepted: a local Hugging "
            "Face folder of a causal language model, a whole GGUF file of an architecture that "
            "transformers reads, a hub name (where the hub can be reached), or 'bundled'"
        ) from None
    _complete(report, source)
    return (forget_quantisation(model) if gguf else model).eval()


def _complete(report: dict[str, Any], source: str) -> None:
    """Reject a model whose weights are not exactly those of its configuration."""
    problems = {
        "missing_keys": "are missing from its files",
        "unexpected_keys": "are in its files and not in a model of its configuration",
        "mismatched_keys": "have another shape than its configuration says",
    }
    for key, problem in problems.items():
        names = sorted(n if isinstance(n, str) else n[0] for n in report.get(key) or ())
        if names:
            raise ModelError(
                f"{source}: {len(names)} weights {problem} ({_few(names)}); the folder must hold "
                "the weights of its config.json, with the names that transformers gives them"
            )


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _fits(config: Any, dtype: torch.dtype, source: str, copies: int) -> None:
    """Reject a model that this machine's memory cannot hold while it is loaded."""
    from transformers import AutoModelForCausalLM

    layers = getattr(config, "num_hidden_layers", 0)
    if not isinstance(layers, int) or not 0 < layers <= MAX_LAYERS:
        raise ModelError(
            f"{source}: config.json says {str(layers)[:40]} layers; 1 to {MAX_LAYERS} are accepted"
        )
    with torch.device("meta"):
        n = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    need = copies * n * dtype.itemsize
    try:
        have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return
    if need > have:
        doing = "converted" if copies > 1 else "loaded"
        raise ModelError(
            f"{source}: {n / 1e9:.1f} billion parameters need {need / 2**30:.0f} GiB while they are {doing}, and {have / 2**30:.0f} GiB of memory "
            "are free; use --dtype bfloat16, a smaller model, or a larger machine"
        )


def first_line(error: BaseException) -> str:
    if isinstance(error, StrictDataclassError) and error.__cause__ is not None:
        error = error.__cause__  # it holds the reason
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:160].rstrip(".")
