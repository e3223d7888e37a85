"""Loading a model, and running it block by block.

All knowledge of TransformerLens's `HookedTransformer` lives here and in `hooks.py`. `load_model` takes the bundled model, a hub name, a
local Hugging Face folder or a model that is already in memory, and always keeps the raw weights: no LayerNorm folding, no centring, so
that our logits are the model's logits. Every load compares a short forward pass with Hugging Face's and refuses a model that
TransformerLens converts wrongly (it ignores some settings in silence); `Model.verify` repeats that on longer text.

`Model` offers the decoder as the few functions that the engine is made of, on *packed* tokens (one row a token, whatever prompt it
belongs to), so that no arithmetic is spent on padding or on positions that nobody needs (`forward.py` puts some of the same pieces together
for training):

    x  = embed(ids)                                  [batch pos d_model]
    qkv(l, x, positions) -> q, k, v                  normalised, projected, rotated
    attend(l, q, k, v, query_positions) -> z         scores, soft cap, ALiBi, causal and sliding-window mask, softmax
    project(l, z) -> the attention's sum             [token d_model]
    attn_out(l, sum)                                 what is added to the stream (the post-norm of Gemma-2)
    mlp_out(l, x)                                    likewise
    finish(x, labels)                                final norm, unembedding of the rows and columns asked for

They give the same numbers as `HookedTransformer.forward` up to rounding; `refusal` names what they cannot run, and the engine then hands
the work to the plain loop over hooked forward passes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import math
import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from ..axes import Ids, Logits, Resid
from ..errors import ConfigError, ModelError, choices
from ..metrics import Need
from ..prompts import adds_bos
from ..sites import KINDS, Site
from .kernels import linear
from .pieces import NO_TAPS, Taps, heads_of, mlp_of, norm_of, rows_of, tapped

BUNDLED = Path(__file__).parents[1] / "assets" / "model"
DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")


class Model:
    """A frozen decoder, its tokenizer, and the pieces of its forward pass.

    Attributes:
        hooked: the `HookedTransformer`, in eval mode, raw weights.
        tokenizer: a fast Hugging Face tokenizer.
        name: for tables and titles.
        source: what it was loaded from (a folder or a hub name); None for a model from memory.
        bos: whether prompts begin with the BOS token.
        n_parameters: weights as Hugging Face counts them (tied ones once; TransformerLens adds biases of zeros).
        hf_difference: largest logit difference to Hugging Face seen at load; None where it was not compared.
    """

    def __init__(
        self,
        hooked: Any,
        tokenizer: Any,
        name: str,
        source: str | None = None,
        bos: bool | None = None,
        n_parameters: int | None = None,
    ):
        self.hooked = hooked.eval().requires_grad_(False)
        self.tokenizer = tokenizer
        self.name = name
        self.source = source
        self.bos = adds_bos(tokenizer) if bos is None and tokenizer is not None else bool(bos)
        self.hf_difference: float | None = None
        self.n_parameters = (
            n_parameters
            if n_parameters is not None
            else sum(p.numel() for p in self.hooked.parameters())
        )

    def __repr__(self) -> str:
        return f"Model({self.name}: {self.n_layers} layers, d_model {self.d_model}, {self.n_heads} heads, {self.dtype}, {self.device})"

    # ---- shape -------------------------------------------------------------------------------------------------------------

    @property
    def cfg(self) -> Any:
        return self.hooked.cfg

    @property
    def n_layers(self) -> int:
        return self.cfg.n_layers

    @property
    def n_heads(self) -> int:
        return self.cfg.n_heads

    @property
    def n_kv_heads(self) -> int:
        return self.cfg.n_key_value_heads or self.cfg.n_heads

    @property
    def d_model(self) -> int:
        return self.cfg.d_model

    @property
    def d_head(self) -> int:
        return self.cfg.d_head

    @property
    def d_mlp(self) -> int:
        return self.cfg.d_mlp or 0

    @property
    def d_vocab(self) -> int:
        return self.cfg.d_vocab_out

    @property
    def n_ctx(self) -> int:
        return self.cfg.n_ctx

    @property
    def dtype(self) -> torch.dtype:
        return self.cfg.dtype

    @property
    def device(self) -> torch.device:
        return self.hooked.embed.W_E.device

    @property
    def parallel(self) -> bool:
        """Whether attention and MLP of a block read the same stream (GPT-J, Pythia)."""
        return bool(self.cfg.parallel_attn_mlp)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds of site that this model has."""
        missing = {"resid_mid"} if self.parallel or self.cfg.attn_only else set()
        if self.cfg.attn_only:
            missing.add("mlp_out")
        return tuple(k for k in KINDS if k not in missing)

    def check_site(self, site: Site) -> Site:
        """`site`, when the model has it.

        Raises:
            SiteError: it has not.
        """
        return site.check(self.n_layers, self.n_heads, self.n_kv_heads, self.kinds, self.name)

    @cached_property
    def modules(self) -> tuple[torch.nn.Module, ...]:
        """Every module of the hooked model, listed once: whoever wants to know whether hooks are on it asks them all."""
        return tuple(self.hooked.modules())

    @cached_property
    def sha256(self) -> str:
        """Hash of names, shapes and bytes of all weights, as they were when it was first asked for."""
        return weights_hash(self.hooked)

    def flops(self, part: str, queries: int = 1) -> int:
        """Floating-point operations (2 a multiply-add) of the matrix products of one token in one block.

        Args:
            part: `qkv`, `attend` (scores and values, for each key; times `queries`), `project`, `mlp`, or `unembed` (for each column).
            queries: how many there are, or keys, or columns.
        """
        d, heads = self.d_model, self.n_heads * self.d_head
        one = {
            "qkv": 2 * d * (heads + 2 * self.n_kv_heads * self.d_head),
            "attend": 4 * heads,
            "project": 2 * heads * d,
            "mlp": 2 * d * self.d_mlp * (3 if self.cfg.gated_mlp else 2),
            "unembed": 2 * d,
        }  # fmt: skip
        return one[part] * queries

    # ---- the forward pass in pieces ----------------------------------------------------------------------------------------

    @cached_property
    def refusal(self) -> str | None:
        """Why the pieces below cannot stand for the forward pass; None where they can."""
        cfg = self.cfg
        post_norm = ("Olmo2ForCausalLM", "Olmo3ForCausalLM", "OlmoeForCausalLM")
        reasons = {
            f"{cfg.positional_embedding_type} positions": cfg.positional_embedding_type not in ("standard", "rotary", "alibi"),
            f"{cfg.original_architecture}'s norms after each sublayer": cfg.original_architecture in post_norm,
            "attention sinks": bool(getattr(cfg, "use_attention_sinks", False)),
            "log-n attention or dynamic NTK positions": bool(getattr(cfg, "use_logn_attn", False) or getattr(cfg, "use_dynamic_ntk_rope", False)),
            "clipped keys and values": getattr(cfg, "clip_qkv", None) is not None,
            "4-bit weights": bool(cfg.load_in_4bit),
            f"{cfg.attention_dir} attention": cfg.attention_dir != "causal",
            "attention-only blocks": bool(cfg.attn_only),
            "split query, key and value inputs": bool(cfg.use_split_qkv_input or cfg.use_attn_in),
        }  # fmt: skip
        return next((reason for reason, true in reasons.items() if true), None)

    def embed(self, ids: Ids) -> Resid:
        """Token (and learned position) embeddings: the residual stream before block 0."""
        ids = ids.to(self.device)
        x = self.hooked.embed(ids)
        return (
            x + self.hooked.pos_embed(ids)
            if self.cfg.positional_embedding_type == "standard"
            else x
        )

    def block_device(self, layer: int) -> torch.device:
        return self.hooked.blocks[layer].attn.W_O.device

    def qkv(
        self,
        layer: int,
        x: Float[Tensor, "*token d_model"],
        positions: Int[Tensor, "*position"],
        taps: Taps = NO_TAPS,
        reads: Int[Tensor, "batch read"] | None = None,
    ) -> tuple[
        Float[Tensor, "*query head d_head"],
        Float[Tensor, "*token kv d_head"],
        Float[Tensor, "*token kv d_head"],
    ]:
        """Return queries, keys and values, rotated where the model rotates.

        Args:
            layer: of the block.
            x: its input.
            positions: where the tokens stand: `[token]`, or `[pos]` for a batch of whole prompts.
            taps: of `ln1`, `q`, `k`, `v`, `rot_q` and `rot_k`.
            reads: the positions of each row that have queries; all where None.
        """
        block = self.hooked.blocks[layer]
        attn, h = block.attn, tapped(taps, "ln1", norm_of(block.ln1, x))
        (W_Q, b_Q), (W_K, b_K), (W_V, b_V) = self.qkv_weights(layer)
        asked, at = (h, positions) if reads is None else (rows_of(h, reads), reads)
        q = tapped(taps, "q", heads_of(asked, W_Q, b_Q))
        k = tapped(taps, "k", heads_of(h, W_K, b_K))
        v = tapped(taps, "v", heads_of(h, W_V, b_V))
        if attn.q_norm is not None:
            q, k = attn._apply_qk_norm(q, attn.q_norm), attn._apply_qk_norm(k, attn.k_norm)
        q = tapped(taps, "rot_q", self.rotate(layer, q, at))
        return q, tapped(taps, "rot_k", self.rotate(layer, k, positions)), v

    def qkv_weights(
        self, layer: int
    ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """(weight [head d_model d_head], bias [head d_head]) of queries, keys and values; grouped ones once a group."""
        attn = self.hooked.blocks[layer].attn
        _ = "_" if type(attn).__name__ == "GroupedQueryAttention" else ""
        return (attn.W_Q, attn.b_Q), *(
            (getattr(attn, f"{_}W_{m}"), getattr(attn, f"{_}b_{m}")) for m in "KV"
        )  # type: ignore[return-value]

    def rotate(
        self,
        layer: int,
        x: Float[Tensor, "*batch token head d_head"],
        positions: Int[Tensor, "*token"],
    ) -> Float[Tensor, "*batch token head d_head"]:
        """Queries or keys, turned by their positions where the model rotates."""
        if self.cfg.positional_embedding_type != "rotary":
            return x
        attn = self.hooked.blocks[layer].attn
        if (
            longest := int(positions.max()) + 1 if positions.numel() else 0
        ) > attn.rotary_cos.shape[0]:
            attn._extend_rotary_embeddings(
                min(self.n_ctx, max(longest, 2 * attn.rotary_cos.shape[0]))
            )
        cos, sin = (
            attn.rotary_cos[positions].unsqueeze(-2),
            attn.rotary_sin[positions].unsqueeze(-2),
        )
        turned, rest = x[..., : self.cfg.rotary_dim], x[..., self.cfg.rotary_dim :]
        if self.cfg.rotary_adjacent_pairs:
            flipped = attn.rotate_every_two(turned)
        else:
            low, high = turned.chunk(2, -1)
            flipped = torch.cat([-high, low], -1)
        turned = turned * cos + flipped * sin
        return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned

    def scores(
        self,
        layer: int,
        q: Float[Tensor, "row q_pos head d_head"],
        k: Float[Tensor, "row k_pos kv d_head"],
        query_positions: Int[Tensor, "*row q_pos"],
    ) -> Float[Tensor, "row head q_pos k_pos"]:
        """Return masked attention scores.

        Keys stand at positions 0, 1, ...; queries where `query_positions` says, alike in all rows
        or row by row.
        """
        attn = self.hooked.blocks[layer].attn
        kv = k.shape[2]
        q = rearrange(q, "row q (kv group) d -> row kv (group q) d", kv=kv)
        s = q @ rearrange(k, "row k kv d -> row kv d k") / attn.attn_scale
        if self.cfg.attn_scores_soft_cap > 0:
            s = self.cfg.attn_scores_soft_cap * torch.tanh(s / self.cfg.attn_scores_soft_cap)
        s = rearrange(s, "row kv (group q) k -> row (kv group) q k", q=query_positions.shape[-1])
        keys = torch.arange(k.shape[1], device=s.device)
        behind = query_positions[..., None] - keys
        behind = behind if behind.ndim == 2 else behind[:, None]
        if self.cfg.positional_embedding_type == "alibi":
            slopes = attn.create_alibi_multipliers(self.n_heads).to(s)
            s = s - slopes[:, None, None] * behind.clamp(min=0)
        hidden = behind < 0
        if attn.attn_type == "local":
            hidden = hidden | (behind >= self.cfg.window_size)
        return s.masked_fill(hidden, -torch.inf)

    def attend(
        self,
        layer: int,
        q: Float[Tensor, "row q_pos head d_head"],
        k: Float[Tensor, "row k_pos kv d_head"],
        v: Float[Tensor, "row k_pos kv d_head"],
        query_positions: Int[Tensor, "*row q_pos"],
    ) -> Float[Tensor, "row q_pos head d_head"]:
        """z of every head: the values, averaged by the attention pattern."""
        pattern = self.scores(layer, q, k, query_positions).softmax(-1)
        pattern = rearrange(pattern, "row (kv group) q k -> row kv (group q) k", kv=v.shape[2])
        z = pattern.to(v.dtype) @ rearrange(v, "row k kv d -> row kv k d")
        return rearrange(z, "row kv (group q) d -> row q (kv group) d", q=query_positions.shape[-1])

    def project(
        self, layer: int, z: Float[Tensor, "*token head d_head"]
    ) -> Float[Tensor, "*token d_model"]:
        """Return sum_h z_h W_O[h] + b_O, before any post-norm."""
        attn = self.hooked.blocks[layer].attn
        W = rearrange(attn.W_O, "head d_head d_model -> d_model (head d_head)")
        return linear(z.flatten(-2), W, attn.b_O)

    def attn_out(
        self, layer: int, projected: Float[Tensor, "*token d_model"]
    ) -> Float[Tensor, "*token d_model"]:
        """Return what the attention adds to the stream, after the post-norm where there is one."""
        if not self.cfg.use_normalization_before_and_after:
            return projected
        return norm_of(self.hooked.blocks[layer].ln1_post, projected)

    def mlp_out(
        self, layer: int, x: Float[Tensor, "*token d_model"], taps: Taps = NO_TAPS
    ) -> Float[Tensor, "*token d_model"]:
        """Return what the MLP adds, reading the stream `x` (the block's input in parallel blocks).

        Args:
            layer: of the block.
            x: the stream.
            taps: of `ln2`, `pre`, `pre_linear`, `post` and `mlp`.
        """
        block = self.hooked.blocks[layer]
        out = mlp_of(block.mlp, tapped(taps, "ln2", norm_of(block.ln2, x)), taps)
        out = tapped(taps, "mlp", out)
        return norm_of(block.ln2_post, out) if self.cfg.use_normalization_before_and_after else out

    def finish(
        self,
        x: Float[Tensor, "token d_model"],
        label_ids: Int[Tensor, " label"] | None = None,
        need: Need = "normaliser",
        bytes_row: int = 1 << 28,
        normalise: Callable[[Tensor], Tensor] | None = None,
    ) -> Float[Tensor, "token column"]:
        """The last residual stream -> scores of the labels' tokens, float32 or wider.

        Args:
            x: one row a position that is read.
            label_ids: vocabulary columns wanted; None for all.
            need: `labels` gives bare logits and touches those columns only; `normaliser` gives log-probabilities, and needs the whole
                vocabulary once a row; `vocabulary` gives all logits.
            bytes_row: whole-vocabulary rows are made in slices of this size.
            normalise: takes the place of the final norm.
        """
        hooked = self.hooked
        x = x.to(hooked.unembed.W_U.device)
        if normalise is not None:
            x = normalise(x)
        elif self.cfg.normalization_type is not None:
            x = norm_of(hooked.ln_final, x)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32

        def logits(x: Tensor, columns: Tensor | None) -> Tensor:
            W, b = (
                (hooked.W_U, hooked.b_U)
                if columns is None
                else (hooked.W_U[:, columns], hooked.b_U[columns])
            )
            y = torch.addmm(b, x, W)
            if (cap := self.cfg.output_logits_soft_cap) > 0:
                y = cap * torch.tanh(y / cap)
            return y.to(wide)

        if need == "vocabulary" or label_ids is None:
            return logits(x, None)
        label_ids = label_ids.to(x.device)
        if need == "labels":
            return logits(x, label_ids)
        step = max(1, bytes_row // (4 * self.d_vocab))
        parts = []
        for part in x.split(step):
            y = logits(part, None)
            parts.append(y[:, label_ids] - y.logsumexp(-1, keepdim=True))
        return torch.cat(parts) if parts else x.new_zeros((0, len(label_ids)), dtype=wide)

    def forward(self, ids: Ids) -> Float[Tensor, "batch pos d_vocab"]:
        """Plain logits of the hooked model at every position; hooks, where there are any, apply."""
        return self.hooked.forward(self.embed(ids), start_at_layer=0, return_type="logits")

    # ---- comparing with Hugging Face ----------------------------------------------------------------------------------------

    @torch.inference_mode()
    def verify(
        self,
        texts: Sequence[str] = ("The food was great, but the service was slow.",),
        hf_model: Any = None,
    ) -> float:
        """Largest |logit difference| to Hugging Face's own forward pass over `texts`.

        Args:
            texts: what to compare on.
            hf_model: the Hugging Face model; loaded again from `source` where it is not given.

        Raises:
            ModelError: the model came from memory and `hf_model` was not given.
        """
        if hf_model is None:
            if self.source is None:
                raise ModelError(
                    f"{self.name} came from memory; give verify(hf_model=...) the Hugging Face model to compare with"
                )
            hf_model = _load_hf(self.source, self.dtype)
        hf_model = hf_model.to(self.device)
        worst = 0.0
        for text in texts:
            ids = self.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
            if self.bos:
                ids = torch.cat([torch.tensor([[self.tokenizer.bos_token_id]]), ids], dim=1)
            ours = self.forward(ids).to(self.device)
            theirs = hf_model(ids.to(self.device)).logits
            worst = max(worst, float((ours.double() - theirs.double()).abs().max()))
        return worst


@torch.inference_mode()
def weights_hash(module: torch.nn.Module) -> str:
    """sha256 over names, shapes and bytes of all parameters, in the order of their names."""
    h = hashlib.sha256()
    for name, p in sorted(module.named_parameters()):
        h.update(f"{name} {tuple(p.shape)} {p.dtype}".encode())
        h.update(p.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return h.hexdigest()


# ---- loading ------------------------------------------------------------------------------------------------------------------


def load_model(
    model: str | Path | tuple[Any, Any] | Any = None,
    *,
    device: str = "auto",
    dtype: str | torch.dtype = "float32",
    bos: bool | None = None,
    n_devices: int = 1,
    check: bool = True,
) -> Model:
    """A model ready to be traced and edited.

    Args:
        model: None or `"bundled"` for the small one that ships with the package; a local Hugging Face folder; a hub name; or a pair
            (Hugging Face model, tokenizer) already in memory.
        device: `auto` (the accelerator where there is one), `cpu`, `cuda`, `cuda:1`, `mps`.
        dtype: of weights and activations. Metrics are float32 whatever this says.
        bos: put the BOS token first; None does what the tokenizer does by itself.
        n_devices: spread the layers over this many accelerators.
        check: compare a short forward pass with Hugging Face's and refuse a model that differs.

    Raises:
        ModelError: nothing is there, it has no weights, it does not fit, or TransformerLens runs it differently.
    """
    chosen = _device(device)
    kind = _dtype(dtype)
    source: str | None = None
    if isinstance(model, tuple):
        hf, tokenizer = model
        name = Path(getattr(hf.config, "_name_or_path", "") or type(hf).__name__).name
    else:
        source, name = _resolve(model)
        tokenizer = _load_tokenizer(source)
        hf = _load_hf(source, kind)
    hooked = hooked_from_hf(hf, kind, chosen, n_devices)
    loaded = Model(hooked, tokenizer, name, source, bos, hf.num_parameters())
    if check:
        loaded.hf_difference = loaded.verify(hf_model=hf)
        allowed = {torch.float64: 1e-3, torch.float32: 5e-3}.get(kind, 1.0)
        if not loaded.hf_difference <= allowed:
            raise ModelError(
                f"{name}: logits differ by up to {loaded.hf_difference:.3g} from Hugging Face's (allowed: {allowed:g}); TransformerLens does not "
                f"convert this configuration of {type(hf).__name__} faithfully, and a trace of it would be of another model"
            )
    return loaded


def _resolve(model: str | Path | None) -> tuple[str, str]:
    """What to load from, and the name to show."""
    if model is None or str(model) == "bundled":
        if not (BUNDLED / "config.json").exists():
            raise ModelError(
                f"the bundled model is missing from {BUNDLED}; reinstall the package, or give --model a folder or a hub name"
            )
        return str(BUNDLED), "bundled"
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
    if path.is_file():
        raise ModelError(
            f"{path} is a file; the folder that holds config.json and the weights is needed"
        )
    if str(model).count("/") > 1 or str(model).startswith((".", "/", "~")):
        raise ModelError(
            f"there is no folder {path}; accepted: a local Hugging Face folder, a hub name such as gpt2, or 'bundled'"
        )
    from transformer_lens.loading_from_pretrained import get_official_model_name

    with contextlib.suppress(ValueError):
        return get_official_model_name(str(model)), Path(str(model)).name
    return str(model), Path(str(model)).name


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


def _dtype(dtype: str | torch.dtype) -> torch.dtype:
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype not in DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}; accepted: {choices(DTYPES)}")
    return DTYPES[dtype]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars and no warnings of the libraries while they load; errors still raise."""
    import transformers

    level = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()


def _load_tokenizer(source: str) -> Any:
    from transformers import AutoTokenizer

    try:
        with _quiet():
            tokenizer = AutoTokenizer.from_pretrained(source)
        if not tokenizer(
            "a", add_special_tokens=False
        ).input_ids:  # transformers makes an empty one where the files are missing
            raise ValueError("its vocabulary is empty")
    except (OSError, ValueError, KeyError) as error:
        raise ModelError(
            f"{source}: no tokenizer could be loaded ({_first_line(error)}); "
            + (
                "tokenizer.json is needed beside the model"
                if Path(source).is_dir()
                else "where the hub cannot be reached, give a local folder"
            )
        ) from None
    return tokenizer


def _load_hf(source: str, dtype: torch.dtype) -> Any:
    from safetensors import SafetensorError
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with _quiet():
            config = AutoConfig.from_pretrained(source)
            _fits(config, dtype, source)
            return AutoModelForCausalLM.from_pretrained(
                source, dtype=dtype, attn_implementation="eager"
            ).eval()
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise ModelError(
            f"{source}: no model could be loaded ({_first_line(error)}); accepted: a local Hugging Face folder of a causal language model, "
            "a hub name (where the hub can be reached), or 'bundled'"
        ) from None


def _fits(config: Any, dtype: torch.dtype, source: str) -> None:
    """Refuse a model that this machine's memory cannot hold while it is converted (two copies)."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        n = sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())
    need = 2 * n * dtype.itemsize
    try:
        have = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return
    if need > have:
        raise ModelError(
            f"{source}: {n / 1e9:.1f} billion parameters need {need / 2**30:.0f} GiB while they are converted, and {have / 2**30:.0f} GiB of memory "
            "are free; use --dtype bfloat16, a smaller model, or a larger machine"
        )


def _first_line(error: BaseException) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:160].rstrip(".")


def hooked_from_hf(
    hf: Any,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    n_devices: int = 1,
) -> Any:
    """A `HookedTransformer` with the raw weights of a loaded Hugging Face model.

    Raises:
        ModelError: TransformerLens does not know the architecture, or would ignore a setting of it.
    """
    from transformer_lens import HookedTransformer
    from transformer_lens import loading_from_pretrained as tl

    hf = hf.eval().requires_grad_(False)
    cfg = _hooked_config(hf, dtype, device, n_devices)
    logging.getLogger("transformer_lens").setLevel(logging.ERROR)
    hooked = HookedTransformer(cfg, tokenizer=None, move_to_device=False)
    try:
        # "." exists as a path, so that no official name is looked up; the weights come from `hf`.
        state = tl.get_pretrained_state_dict(".", cfg, hf_model=hf, dtype=dtype)
    except (ValueError, AttributeError, KeyError, RuntimeError, TypeError) as error:
        raise ModelError(
            f"TransformerLens cannot convert {type(hf).__name__} ({_first_line(error)})"
        ) from None
    _llama_biases(hf, state)
    for key, value in hooked.state_dict().items():
        if key not in state and key.endswith(
            "W_pos"
        ):  # Bloom's is unused and would be uninitialised memory
            state[key] = torch.zeros_like(value)
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # "missing key" warnings for buffers that are made on the way
    try:
        hooked.load_and_process_state_dict(
            state,
            fold_ln=False,
            center_writing_weights=False,
            center_unembed=False,
            fold_value_biases=False,
        )
    finally:
        root.setLevel(level)
    if n_devices > 1:
        hooked.move_model_modules_to_device()
    else:
        hooked = hooked.to(torch.device(device), print_details=False)
    _lay_out(hooked)
    return hooked.eval().requires_grad_(False)


@torch.no_grad()
def _lay_out(hooked: Any) -> None:
    """Store the weights in the order in which TransformerLens multiplies by them; their values stay as they are.

    Its attention and gated MLP make a transposed copy of every weight at every forward pass, unless memory is in that order already. Those
    copies cost up to a third of a pass over a short batch.
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
    """Put the biases of a Llama (`attention_bias`, `mlp_bias`) where TransformerLens's conversion writes zeros."""
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
    """TransformerLens's configuration, with what its conversion forgets or guesses read from Hugging Face's instead."""
    from transformer_lens import HookedTransformerConfig
    from transformer_lens import loading_from_pretrained as tl

    c, architecture = hf.config, type(hf).__name__
    rope = getattr(c, "rope_parameters", None) or {}
    rope_type = (
        rope.get("rope_type", "default")
        if isinstance(rope.get("rope_type", "default"), str)
        else "default"
    )
    if rope_type not in ("default", "llama3"):
        raise ModelError(
            f"{architecture} with rope_type {rope_type!r} is not supported by TransformerLens; accepted: default, and llama3 in Llama"
        )
    if architecture == "Gemma2ForCausalLM":  # known to TransformerLens by official names only
        cfg: dict[str, Any] = dict(
            d_model=c.hidden_size, d_head=c.head_dim, n_heads=c.num_attention_heads, n_key_value_heads=c.num_key_value_heads,
            d_mlp=c.intermediate_size, n_layers=c.num_hidden_layers, n_ctx=c.max_position_embeddings, eps=c.rms_norm_eps,
            d_vocab=c.vocab_size, act_fn=c.hidden_activation, normalization_type="RMS", final_rms=True, gated_mlp=True,
            positional_embedding_type="rotary", original_architecture=architecture, use_normalization_before_and_after=True,
            attn_scale=math.sqrt(c.query_pre_attn_scalar),
            attn_scores_soft_cap=c.attn_logit_softcapping or -1.0, output_logits_soft_cap=c.final_logit_softcapping or -1.0,
        )  # fmt: skip
    elif architecture == "GemmaForCausalLM":
        cfg = dict(
            d_model=c.hidden_size, d_head=c.head_dim, n_heads=c.num_attention_heads, n_key_value_heads=c.num_key_value_heads,
            d_mlp=c.intermediate_size, n_layers=c.num_hidden_layers, n_ctx=c.max_position_embeddings, eps=c.rms_norm_eps,
            d_vocab=c.vocab_size, act_fn="gelu_pytorch_tanh", normalization_type="RMS", final_rms=True, gated_mlp=True,
            positional_embedding_type="rotary", original_architecture=architecture,
        )  # fmt: skip
    else:
        # A neutral folder: TransformerLens branches on words such as "llama" anywhere in the path.
        with tempfile.TemporaryDirectory(prefix="cfg-") as folder:
            written = c.to_dict() | {"architectures": [architecture]}
            if architecture == "GPT2LMHeadModel":
                written.setdefault("n_ctx", c.n_positions)
            (Path(folder) / "config.json").write_text(json.dumps(written, default=str))
            try:
                cfg = tl.convert_hf_model_config(folder)
            except (
                ValueError,
                NotImplementedError,
                AttributeError,
                KeyError,
                UnboundLocalError,
            ) as error:
                raise ModelError(
                    f"TransformerLens does not know the architecture {architecture} ({_first_line(error)})"
                ) from None
    cfg["n_ctx"] = (
        getattr(c, "max_position_embeddings", None)
        or getattr(c, "n_positions", None)
        or cfg["n_ctx"]
    )
    if getattr(c, "n_inner", None):
        cfg["d_mlp"] = c.n_inner
    if architecture == "GPTJForCausalLM":
        cfg["eps"] = c.layer_norm_epsilon
    if architecture in ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM"):
        cfg["d_head"] = cfg["rotary_dim"] = (
            getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        )
    if cfg.get("positional_embedding_type") == "rotary" and isinstance(
        rope.get("rope_theta"), (int, float)
    ):
        cfg["rotary_base"] = rope["rope_theta"]
    types = getattr(c, "layer_types", None)
    if types and "sliding_attention" in types:
        local = ["local" if t == "sliding_attention" else "global" for t in types]
        cfg |= dict(use_local_attn=True, window_size=c.sliding_window, attn_types=local)
    name = Path(getattr(c, "_name_or_path", "") or "custom").name or "custom"
    cfg |= dict(
        tokenizer_name=None,
        dtype=dtype,
        device=str(device),
        n_devices=n_devices,
        init_weights=False,
        from_checkpoint=False,
        model_name=name,
    )
    cfg.setdefault("default_prepend_bos", True)
    return HookedTransformerConfig.from_dict(cfg)


def logits_of(model: Model, x: Float[Tensor, "token d_model"]) -> Logits:
    """All logits of the rows of the last residual stream."""
    return model.finish(x, None, "vocabulary")
