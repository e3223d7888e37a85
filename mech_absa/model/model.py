"""A frozen decoder as the few functions that the engine, training and scoring are made of.

    x  = embed(ids)                            [batch pos d_model]
    qkv(l, x, positions) -> q, k, v            normalised, projected, rotated
    attend(l, q, k, v, query_positions) -> z   scores, soft cap, ALiBi, masks, softmax
    project(l, z) -> the attention's sum       [*token d_model]
    attn_out(l, sum)                           what is added to the stream (Gemma-2's post-norm)
    mlp_out(l, x)                              likewise
    finish(x, labels)                          final norm, unembedding of the rows and columns asked for

They take *packed* tokens (one row per token, whatever prompt it belongs to), so that no arithmetic
is spent on padding or on positions that nobody needs, or whole batches. `block` puts them together.
They give the numbers of the hooked forward pass up to rounding; `refusal` names what they cannot
run, and the engine then hands the work to the plain loop over hooked forward passes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from ..axes import Ids, Logits, Resid
from ..errors import ModelError
from ..metrics import Need
from ..prompts import adds_bos
from ..sites import KINDS, Site
from .backend import Backend
from .bridge import BridgeBackend, is_bridge
from .convert import hooked_from_hf
from .hashes import weights_hash
from .hooked import HookedBackend
from .huggingface import load_hf
from .kernels import linear
from .pieces import NO_TAPS, Taps, heads_of, mlp_of, rows_of, tapped
from .verify import logit_difference


def backend_of(root: Any) -> Backend:
    """Return the backend of a module of TransformerLens: a `HookedTransformer` or a bridge."""
    return BridgeBackend(root) if is_bridge(root) else HookedBackend(root)


class Model:
    """Hold a frozen decoder, its tokenizer, and the pieces of its forward pass.

    Attributes:
        backend: TransformerLens's module and its weights, read in one way (`backend`).
        tokenizer: a fast Hugging Face tokenizer.
        name: for tables and titles.
        source: what it was loaded from (a folder or a hub name); None for a model from memory.
        bos: whether prompts begin with the BOS token.
        n_parameters: weights as Hugging Face counts them (tied ones once; TransformerLens adds
            biases of zeros).
        hf_difference: largest logit difference to Hugging Face seen at load; None where it was not
            compared.

    Example:
        >>> import mech_absa as ma
        >>> model = ma.load_model()
        >>> model.n_layers, model.d_model
        (8, 160)
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
        self.backend: Backend = backend_of(hooked.eval().requires_grad_(False))
        self.tokenizer = tokenizer
        self.name = name
        self.source = source
        self.bos = adds_bos(tokenizer) if bos is None and tokenizer is not None else bool(bos)
        self.hf_difference: float | None = None
        self.n_parameters = (
            n_parameters
            if n_parameters is not None
            else sum(p.numel() for p in hooked.parameters())
        )

    def __repr__(self) -> str:
        return f"Model({self.name}: {self.n_layers} layers, d_model {self.d_model}, {self.n_heads} heads, {self.dtype}, {self.device})"

    # ---- shape -------------------------------------------------------------------------------------------------------------

    @property
    def hooked(self) -> Any:
        """Return TransformerLens's module, a `HookedTransformer` or a `TransformerBridge`."""
        return self.backend.root

    @property
    def hook_points(self) -> Mapping[str, Any]:
        """Return the hook points by name."""
        return self.backend.hook_points

    @property
    def cfg(self) -> Any:
        """Return sizes and settings under the names of `HookedTransformerConfig`."""
        return self.backend.cfg

    @property
    def n_layers(self) -> int:
        return int(self.cfg.n_layers)

    @property
    def n_heads(self) -> int:
        return int(self.cfg.n_heads)

    @property
    def n_kv_heads(self) -> int:
        return int(self.cfg.n_key_value_heads or self.cfg.n_heads)

    @property
    def d_model(self) -> int:
        return int(self.cfg.d_model)

    @property
    def d_head(self) -> int:
        return int(self.cfg.d_head)

    @property
    def d_mlp(self) -> int:
        return int(self.cfg.d_mlp or 0)

    @property
    def d_vocab(self) -> int:
        return int(self.cfg.d_vocab_out)

    @property
    def n_ctx(self) -> int:
        return int(self.cfg.n_ctx)

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.cfg.dtype
        return dtype

    @property
    def device(self) -> torch.device:
        return self.backend.device

    @property
    def parallel(self) -> bool:
        """Return whether attention and MLP of a block read the same stream (GPT-J, Pythia)."""
        return bool(self.cfg.parallel_attn_mlp)

    @property
    def kinds(self) -> tuple[str, ...]:
        """Return the kinds of site that this model has."""
        missing = {"resid_mid"} if self.parallel or self.cfg.attn_only else set()
        if self.cfg.attn_only:
            missing.add("mlp_out")
        return tuple(k for k in KINDS if k not in missing)

    def check_site(self, site: Site) -> Site:
        """Return `site` if the model has it.

        Raises:
            SiteError: it has not.
        """
        return site.check(self.n_layers, self.n_heads, self.n_kv_heads, self.kinds, self.name)

    @cached_property
    def modules(self) -> tuple[torch.nn.Module, ...]:
        """Return every module on which a hook would change the forward pass, each once."""
        return self.backend.modules

    base_sha256: str | None = None

    @cached_property
    def sha256(self) -> str:
        """Return the hash by which the model is known: of what its files hold, or of its weights."""
        return self.base_sha256 or self.hash_now()

    @cached_property
    def _first_sha256(self) -> str:
        return self.hash_now()

    def answers_to(self, sha256: str) -> bool:
        """Return whether a hash is this model's: `sha256`, or that of a `HookedTransformer`'s weights.

        Version 0.1.0 wrote the latter into edits and sites.
        """
        if sha256 == self.sha256:
            return True
        first = self.backend.name == "hooked" and sha256 == self._first_sha256
        return first or sha256 == self.float32_sha256

    @cached_property
    def float32_sha256(self) -> str | None:
        """Return the hash that the weights have in float32, before they were rounded to this dtype.

        An edit made in float32 knows its model by that hash. The weights are loaded again, once.

        Returns:
            the hash; None for a float32 model, one from memory, and one whose weights are no longer
            those of its source (an edit was merged).
        """
        unknown = self.source is None or self.backend.name != "hooked"
        if unknown or self.dtype == torch.float32:
            return None
        wide = hooked_from_hf(load_hf(str(self.source), torch.float32), torch.float32)
        known = weights_hash(wide)
        rounded = torch.nn.Module.to(wide, self.dtype)
        return known if weights_hash(rounded) == self._first_sha256 else None

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights as TransformerLens names them."""
        weights: dict[str, Tensor] = self.hooked.state_dict()
        return weights

    def hash_now(self) -> str:
        """Return the hash of the weights as TransformerLens holds them at this moment."""
        return weights_hash(self.hooked)

    @property
    def n_bytes(self) -> int:
        """Return the bytes of all weights as TransformerLens holds them."""
        return sum(p.numel() * p.element_size() for p in self.hooked.parameters())

    def flops(self, part: str, queries: int = 1) -> int:
        """Return the floating-point operations (2 per multiply-add) of the matrix products of one
        token in one block.

        Args:
            part: `qkv`, `attend` (scores and values, for each key; times `queries`), `project`,
                `mlp`, or `unembed` (for each column).
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
        """Return why the functions below cannot run this model, or None if they can."""
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
        return next((reason for reason, true in reasons.items() if true), self.backend.unreadable)

    def embed(self, ids: Ids) -> Resid:
        """Return token (and learned position) embeddings: the residual stream before block 0."""
        return self.backend.embed(ids.to(self.device))

    def embed_tokens(self, ids: Ids) -> Resid:
        """Return token embeddings without learned positions."""
        return self.backend.embed_tokens(ids.to(self.device))

    def block_device(self, layer: int) -> torch.device:
        return self.backend.block_device(layer)

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
        h = tapped(taps, "ln1", self.backend.norm(layer, "ln1", x))
        (W_Q, b_Q), (W_K, b_K), (W_V, b_V) = self.backend.qkv(layer)
        asked, at = (h, positions) if reads is None else (rows_of(h, reads), reads)
        q = tapped(taps, "q", heads_of(asked, W_Q, b_Q))
        k = tapped(taps, "k", heads_of(h, W_K, b_K))
        v = tapped(taps, "v", heads_of(h, W_V, b_V))
        q, k = self.backend.qk_norm(layer, "q", q), self.backend.qk_norm(layer, "k", k)
        q = tapped(taps, "rot_q", self.rotate(layer, q, at))
        return q, tapped(taps, "rot_k", self.rotate(layer, k, positions)), v

    def rotate(
        self,
        layer: int,
        x: Float[Tensor, "*batch token head d_head"],
        positions: Int[Tensor, "*token"],
    ) -> Float[Tensor, "*batch token head d_head"]:
        """Rotate queries or keys by their positions if the model does so."""
        if self.cfg.positional_embedding_type != "rotary":
            return x
        cos, sin = (angle.unsqueeze(-2) for angle in self.backend.rotary(layer, positions))
        turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
        if self.cfg.rotary_adjacent_pairs:
            even, odd = turned[..., ::2], turned[..., 1::2]
            flipped = torch.stack([-odd, even], -1).flatten(-2)
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
        kv = k.shape[2]
        q = rearrange(q, "row q (kv group) d -> row kv (group q) d", kv=kv)
        s = q @ rearrange(k, "row k kv d -> row kv d k") / self.backend.scale(layer)
        if self.cfg.attn_scores_soft_cap > 0:
            s = self.cfg.attn_scores_soft_cap * torch.tanh(s / self.cfg.attn_scores_soft_cap)
        s = rearrange(s, "row kv (group q) k -> row (kv group) q k", q=query_positions.shape[-1])
        keys = torch.arange(k.shape[1], device=s.device)
        behind = query_positions[..., None] - keys
        behind = behind if behind.ndim == 2 else behind[:, None]
        if self.cfg.positional_embedding_type == "alibi":
            slopes = self.backend.slopes(layer).to(s)
            s = s - slopes[:, None, None] * behind.clamp(min=0)
        hidden = behind < 0
        if (window := self.backend.window(layer)) is not None:
            hidden = hidden | (behind >= window)
        return s.masked_fill(hidden, -torch.inf)

    def attend(
        self,
        layer: int,
        q: Float[Tensor, "row q_pos head d_head"],
        k: Float[Tensor, "row k_pos kv d_head"],
        v: Float[Tensor, "row k_pos kv d_head"],
        query_positions: Int[Tensor, "*row q_pos"],
    ) -> Float[Tensor, "row q_pos head d_head"]:
        """Return z of every head: the values, averaged by the attention pattern."""
        pattern = self.scores(layer, q, k, query_positions).softmax(-1)
        pattern = rearrange(pattern, "row (kv group) q k -> row kv (group q) k", kv=v.shape[2])
        z = pattern.to(v.dtype) @ rearrange(v, "row k kv d -> row kv k d")
        return rearrange(z, "row kv (group q) d -> row q (kv group) d", q=query_positions.shape[-1])

    def project(
        self, layer: int, z: Float[Tensor, "*token head d_head"]
    ) -> Float[Tensor, "*token d_model"]:
        """Return sum_h z_h W_O[h] + b_O, before any post-norm."""
        W_O, b_O = self.backend.output(layer)
        W = rearrange(W_O, "head d_head d_model -> d_model (head d_head)")
        return linear(z.flatten(-2), W, b_O)

    def attn_out(
        self, layer: int, projected: Float[Tensor, "*token d_model"]
    ) -> Float[Tensor, "*token d_model"]:
        """Return what the attention adds to the stream, after the post-norm where there is one."""
        if not self.cfg.use_normalization_before_and_after:
            return projected
        return self.backend.norm(layer, "ln1_post", projected)

    def mlp_out(
        self, layer: int, x: Float[Tensor, "*token d_model"], taps: Taps = NO_TAPS
    ) -> Float[Tensor, "*token d_model"]:
        """Return what the MLP adds, reading the stream `x` (the block's input in parallel blocks).

        Args:
            layer: of the block.
            x: the stream.
            taps: of `ln2`, `pre`, `pre_linear`, `post` and `mlp`.
        """
        h = tapped(taps, "ln2", self.backend.norm(layer, "ln2", x))
        mlp = self.backend.mlp(layer)
        out = self.backend.run_mlp(layer, h) if mlp is None else mlp_of(mlp, h, taps)
        out = tapped(taps, "mlp", out)
        if not self.cfg.use_normalization_before_and_after:
            return out
        return self.backend.norm(layer, "ln2_post", out)

    def finish(
        self,
        x: Float[Tensor, "token d_model"],
        label_ids: Int[Tensor, " label"] | None = None,
        need: Need = "normaliser",
        bytes_row: int = 1 << 28,
        normalise: Callable[[Tensor], Tensor] | None = None,
    ) -> Float[Tensor, "token column"]:
        """Return the scores of the labels' tokens from the last residual stream, float32 or wider.

        Args:
            x: one row per position that is read.
            label_ids: vocabulary columns wanted; None for all.
            need: `labels` gives bare logits and computes only those columns; `normaliser` gives
                log-probabilities, and computes the whole vocabulary once per row; `vocabulary`
                gives all logits.
            bytes_row: whole-vocabulary rows are made in slices of this size.
            normalise: replaces the final norm.
        """
        x = x.to(self.backend.unembed(None).W.device)
        x = self.backend.norm(None, "ln_final", x) if normalise is None else normalise(x)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32

        def logits(x: Tensor, columns: Tensor | None) -> Tensor:
            W, b = self.backend.unembed(columns)
            y = x @ W if b is None else torch.addmm(b, x, W)
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
        """Return the logits of the hooked model at every position. Hooks act if there are any."""
        return self.backend.forward(self.embed(ids))

    def run_hooked(self, x: Resid, start: int = 0, stop: int | None = None) -> Resid:
        """Return the residual stream after the hooked blocks `start` to `stop` - 1 (all where None)."""
        return self.backend.forward(x, start, self.n_layers if stop is None else stop)

    def scales_of_norms(self) -> list[torch.nn.Module]:
        """Return the hook points of the scale of every norm."""
        return self.backend.scales()

    def point(self, layer: int, name: str) -> torch.nn.Module:
        """Return the module whose output is a value of a block: a name of `pieces`, `scores` or
        `pattern`.

        Raises:
            KeyError: the layer has no such value.
        """
        return self.backend.point(layer, name)

    # ---- comparing with Hugging Face ----------------------------------------------------------

    def verify(
        self,
        texts: Sequence[str] = ("The food was great, but the service was slow.",),
        hf_model: Any = None,
    ) -> float:
        """Return the largest |logit difference| to Hugging Face's own forward pass over `texts`.

        Args:
            texts: what to compare on.
            hf_model: the Hugging Face model; loaded again from `source` where it is not given.

        Raises:
            ModelError: logits are not numbers, or the model came from memory and `hf_model` was not
                given.
        """
        if hf_model is None:
            if self.source is None:
                raise ModelError(
                    f"{self.name} came from memory; give verify(hf_model=...) the Hugging Face "
                    "model to compare with"
                )
            hf_model = load_hf(self.source, self.dtype)
        hf_model = hf_model.to(self.device)
        return logit_difference(self.forward, self.tokenizer, self.bos, hf_model, texts)


def logits_of(model: Model, x: Float[Tensor, "token d_model"]) -> Logits:
    """Return all logits of the rows of the last residual stream."""
    return model.finish(x, None, "vocabulary")
