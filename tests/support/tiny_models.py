"""Tiny random language models of eight architectures, as Hugging Face folders, made in code and offline.

The weights are drawn larger than any library's default, so that the logits have a standard deviation of about two and a
patch moves them by tenths to units: an error of 1e-4 is then an error, not noise. Every parameter is random, biases and
norm weights too, so that a forgotten one is seen. Each folder has a tokenizer with a vocabulary of about 320 tokens: a
byte-level BPE as in GPT-2, or a metaspace BPE with byte fallback and a BOS token as in Llama.

>>> folder = tiny_folder("llama")          # made once a process, removed at its end
>>> hf = AutoModelForCausalLM.from_pretrained(folder)
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from torch.overrides import TorchFunctionMode
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from . import ARCHITECTURES

SENTENCES = (
    "The food was great but the service was dreadful.",
    "Great laptop, awful battery, and the screen is fine.",
    "I loved the waiters; the pizza was not bad, the wine list was terrible.",
    "The battery life is excellent although the keyboard feels cheap.",
    'Review: The staff were rude. Aspect: staff. The sentiment towards "staff" is negative, neutral or positive:',
    "Sentiment: positive negative neutral. Aspect: food service price staff screen keyboard.",
)
METASPACE = ("llama", "mistral", "gemma2")
WINDOW = 5  # of the sliding-window models: smaller than any prompt of interest


def byte_level_tokenizer(vocab_size: int = 320) -> PreTrainedTokenizerFast:
    """GPT-2's kind: bytes as printable characters, the space inside the token, no BOS."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator(SENTENCES, trainer)
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(
        tokenizer_object=tok, bos_token=end, eos_token=end, unk_token=end
    )


def metaspace_tokenizer(vocab_size: int = 360) -> PreTrainedTokenizerFast:
    """Llama's kind: a dummy prefix, the space as ▁ in front of a word, bytes for what is unknown, BOS first."""
    tok = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tok.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tok.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")  # keeps merges inside words
    special = ["<unk>", "<s>", "</s>"]
    fallback = [f"<0x{byte:02X}>" for byte in range(256)]
    tok.train_from_iterator(
        SENTENCES,
        trainers.BpeTrainer(
            vocab_size=vocab_size, special_tokens=special + fallback, show_progress=False
        ),
    )
    spec = json.loads(tok.to_str())
    spec["added_tokens"] = spec["added_tokens"][
        : len(special)
    ]  # the byte tokens are ordinary vocabulary
    tok = Tokenizer.from_str(json.dumps(spec))
    tok.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(content=" ", left=1),
        ]
    )
    tok.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tok, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def _config(arch: str, vocab_size: int) -> transformers.PretrainedConfig:
    llama_like = {
        "vocab_size": vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
    }
    if arch == "gpt2":
        return transformers.GPT2Config(
            vocab_size=vocab_size,
            n_embd=32,
            n_layer=4,
            n_head=4,
            n_positions=256,
            bos_token_id=0,
            eos_token_id=0,
        )
    if arch == "llama":
        return transformers.LlamaConfig(**llama_like, rope_theta=5000.0, rms_norm_eps=1e-5)
    if arch == "pythia":
        return transformers.GPTNeoXConfig(
            **{k: v for k, v in llama_like.items() if k != "num_key_value_heads"},
            rotary_pct=0.25,
            use_parallel_residual=True,
        )
    if arch == "gptj":
        return transformers.GPTJConfig(
            vocab_size=vocab_size,
            n_embd=32,
            n_layer=3,
            n_head=4,
            n_positions=256,
            rotary_dim=4,
            tie_word_embeddings=False,
        )
    if arch == "qwen2":
        return transformers.Qwen2Config(**llama_like, rope_theta=50000.0)
    if arch == "mistral":
        return transformers.MistralConfig(**llama_like, sliding_window=WINDOW, head_dim=12)
    if arch == "gemma2":
        return transformers.Gemma2Config(
            **llama_like | {"num_hidden_layers": 4, "tie_word_embeddings": True},
            head_dim=12,
            sliding_window=WINDOW,
            query_pre_attn_scalar=10,
            attn_logit_softcapping=3.0,
            final_logit_softcapping=5.0,
        )
    if arch == "bloom":
        return transformers.BloomConfig(vocab_size=vocab_size, hidden_size=32, n_layer=3, n_head=4)
    raise ValueError(f"{arch!r} is not one of {', '.join(ARCHITECTURES)}")


def tiny_model(arch: str, vocab_size: int = 320, seed: int = 0) -> PreTrainedModel:
    """A random float32 model of the architecture, in eval mode."""
    model = AutoModelForCausalLM.from_config(_config(arch, vocab_size)).eval()
    generator = torch.Generator().manual_seed(1000 * seed + ARCHITECTURES.index(arch))
    width = 32

    def draw(parameter, std, mean=0.0):
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * std + mean)

    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or "ln_" in name or name.endswith("layernorm.weight"):
                unit = (
                    0.0 if arch == "gemma2" or name.endswith("bias") else 1.0
                )  # Gemma's norms multiply by 1 + w
                draw(parameter, 0.2, unit)
            elif parameter.ndim == 1:
                draw(parameter, 0.2)
            elif parameter.shape[0] in (
                vocab_size,
                256,
            ):  # token and position embeddings, unembedding, or both in one
                draw(parameter, 2.0 / math.sqrt(width))
            else:
                fan_in = (
                    parameter.shape[0] if arch == "gpt2" else parameter.shape[1]
                )  # Conv1D is stored transposed
                draw(parameter, 1.5 / math.sqrt(fan_in))
    return model


def save_tiny(arch: str, folder: Path, seed: int = 0) -> Path:
    """Write the model and its tokenizer to `folder`, as safetensors and json."""
    tokenizer = metaspace_tokenizer() if arch in METASPACE else byte_level_tokenizer()
    tiny_model(arch, len(tokenizer), seed).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return Path(folder)


@lru_cache(maxsize=1)
def _home() -> TemporaryDirectory:
    return TemporaryDirectory(prefix="tiny-models-")  # removed when the process ends


@cache
def tiny_folder(arch: str, seed: int = 0) -> Path:
    """The folder of the architecture's tiny model: made at the first call, shared by all others, not to be written to."""
    return save_tiny(
        arch, Path(_home().name) / f"{ARCHITECTURES.index(arch)}-{seed}", seed
    )  # a path that names no architecture


class _Double(TorchFunctionMode):
    """Read every float32 in the code that runs inside as float64."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        double = {torch.float32: torch.float64}
        args = tuple(double.get(a, a) if isinstance(a, torch.dtype) else a for a in args)
        kwargs = {
            k: double.get(v, v) if isinstance(v, torch.dtype) else v
            for k, v in (kwargs or {}).items()
        }
        return (torch.Tensor.double if func is torch.Tensor.float else func)(*args, **kwargs)


@contextmanager
def float64_throughout() -> Iterator[None]:
    """Inside, models that compute norms, rotations or softmaxes in float32 whatever their dtype do so in float64."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with _Double():
            yield
    finally:
        torch.set_default_dtype(before)


def hf_float64(folder: Path) -> PreTrainedModel:
    """The folder's model in float64; run it inside `float64_throughout()`."""
    with float64_throughout():
        return AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float64, attn_implementation="eager"
        ).eval()
