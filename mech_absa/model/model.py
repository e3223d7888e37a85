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
They give the numbers of `HookedTransformer.forward` up to rounding; `refusal` names what they cannot
run, and the engine then hands the work to the plain loop over hooked forward passes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
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
from .huggingface import load_hf
from .kernels import linear
from .pieces import NO_TAPS, Taps, heads_of, mlp_of, norm_of, rows_of, tapped
from .verify import logit_difference


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


@torch.inference_mode()
def weights_hash(module: torch.nn.Module) -> str:
    """sha256 over names, shapes and bytes of all parameters, in the order of their names."""
    h = hashlib.sha256()
    for name, p in sorted(module.named_parameters()):
        h.update(f"{name} {tuple(p.shape)} {p.dtype}".encode())
        h.update(p.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return h.hexdigest()


def logits_of(model: Model, x: Float[Tensor, "token d_model"]) -> Logits:
    """All logits of the rows of the last residual stream."""
    return model.finish(x, None, "vocabulary")
