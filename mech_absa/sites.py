"""Where in the model: a layer, a component, and optionally a token.

A `Site` prints and parses as one short word, and tables, files, figures and flags all use that one spelling:

    L5.resid_post      the residual stream after block 5
    L5.attn_out        what the attention of block 5 adds to it
    L5.head3           z of query head 3 (before the output projection)
    L5.attn_out@query.last      the same, at the last sub-token of the aspect in the question
    L5.resid_post@-1            ... at the last token

What a token is for is its role; `ROLES` lists them in reading order. Layers and heads count from 0.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace

from .errors import SiteError, choices

ROLES = (
    "template", "before", "aspect.first", "aspect.middle", "aspect.last", "opinion", "after",
    "query.first", "query.middle", "query.last", "answer",
)  # fmt: skip
"""Every token has exactly one. `aspect.*` is the aspect inside the sentence, `query.*` the aspect in the question; a one-token aspect is
`last`. `opinion` is the opinion expression where it is known, `before` and `after` the rest of the sentence around the aspect, `answer`
the last token of the prompt, `template` everything else."""

ROLE_GROUPS = {
    "aspect": ("aspect.first", "aspect.middle", "aspect.last"),
    "query": ("query.first", "query.middle", "query.last"),
    "all": ROLES,
}
"""Names for several roles at once."""

HOOKS = {
    "resid_pre": "hook_resid_pre",
    "resid_mid": "hook_resid_mid",
    "resid_post": "hook_resid_post",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
    "head": "attn.hook_z",
    "q": "attn.hook_q",
    "k": "attn.hook_k",
    "v": "attn.hook_v",
}
"""Kind -> its hook inside `blocks.{layer}.` of a TransformerLens model."""

KINDS = tuple(HOOKS)
HEAD_KINDS = ("head", "q", "k", "v")
"""Kinds of which a layer has one for every head (key/value heads for k and v)."""

_PATTERN = re.compile(r"L(?P<layer>\d+)\.(?P<kind>[a-z_]+?)(?P<head>\d+)?(?:@(?P<at>[-\w.]+))?")


@dataclass(frozen=True, order=True)
class Site:
    """One place in a model.

    Attributes:
        layer: block index from 0.
        kind: one of `KINDS`.
        head: head index for `HEAD_KINDS`, None otherwise.
        at: a role, a role group, a position (negative counts from the end of the prompt), or None for the place as a whole.
    """

    layer: int
    kind: str
    head: int | None = None
    at: str | int | None = None

    def __post_init__(self):
        if self.kind not in KINDS:
            raise SiteError(
                f"unknown kind of site {self.kind!r} in layer {self.layer}; accepted: {choices(KINDS)}"
            )
        if (self.head is not None) != (self.kind in HEAD_KINDS):
            need = "needs a head, as in L5.head3" if self.kind in HEAD_KINDS else "has no heads"
            raise SiteError(f"site L{self.layer}.{self.kind} {need}")
        if isinstance(self.at, str) and self.at not in ROLES and self.at not in ROLE_GROUPS:
            raise SiteError(
                f"unknown role {self.at!r} in site L{self.layer}.{self.kind}; accepted: {choices([*ROLES, *ROLE_GROUPS])}"
            )

    def __str__(self) -> str:
        head = "" if self.head is None else str(self.head)
        at = "" if self.at is None else f"@{self.at}"
        return f"L{self.layer}.{self.kind}{head}{at}"

    @classmethod
    def parse(cls, text: str) -> Site:
        """The site that `text` spells.

        Raises:
            SiteError: `text` is no site.
        """
        match = _PATTERN.fullmatch(text.strip())
        if match is None:
            raise SiteError(
                f"{text!r} is no site; sites look like L5.resid_post, L5.head3 or L5.attn_out@query.last"
            )
        text_at: str | None = match["at"]
        at = int(text_at) if text_at is not None and re.fullmatch(r"-?\d+", text_at) else text_at
        return cls(
            int(match["layer"]),
            match["kind"],
            None if match["head"] is None else int(match["head"]),
            at,
        )

    @property
    def hook_name(self) -> str:
        """Its TransformerLens hook point."""
        return f"blocks.{self.layer}.{HOOKS[self.kind]}"

    @property
    def everywhere(self) -> Site:
        """The same place without the token."""
        return replace(self, at=None)

    def check(
        self,
        n_layers: int,
        n_heads: int,
        n_kv_heads: int | None = None,
        kinds: Iterable[str] = KINDS,
        model: str = "the model",
    ) -> Site:
        """Itself, when a model of this shape has it.

        Raises:
            SiteError: the model has no such layer, head or kind.
        """
        if self.layer >= n_layers:
            raise SiteError(
                f"site {self} does not exist: {model} has {n_layers} layers, L0 to L{n_layers - 1}"
            )
        if self.kind not in (kinds := tuple(kinds)):
            raise SiteError(f"site {self} does not exist in {model}; it has {choices(kinds)}")
        heads = n_kv_heads if self.kind in ("k", "v") and n_kv_heads else n_heads
        if self.head is not None and self.head >= heads:
            raise SiteError(
                f"site {self} does not exist: {model} has {heads} such heads a layer, 0 to {heads - 1}"
            )
        return self


def role_indices(at: str) -> tuple[int, ...]:
    """Indices into `ROLES` of a role or a role group."""
    return tuple(ROLES.index(r) for r in ROLE_GROUPS.get(at, (at,)))


def parse_layers(text: str, n_layers: int) -> tuple[int, ...]:
    """Layers from `3`, `2-5` (both ends count), `0,2-4`, `all`, `first`, `middle` or `last` (thirds of the depth).

    Raises:
        SiteError: `text` is no list of layers, or the model has fewer.
    """
    third = max(1, round(n_layers / 3))
    named = {
        "all": range(n_layers),
        "first": range(third),
        "middle": range((n_layers - third) // 2, (n_layers - third) // 2 + third),
        "last": range(n_layers - third, n_layers),
    }
    if text in named:
        return tuple(named[text])
    layers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+))?\s*", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise SiteError(f"{text!r} names no layers; accepted: 3, 2-5, 0,2-4, {choices(named)}")
        layers.update(range(int(match[1]), int(match[2] or match[1]) + 1))
    if max(layers) >= n_layers:
        raise SiteError(
            f"layer {max(layers)} was asked for; the model has {n_layers} layers, 0 to {n_layers - 1}"
        )
    return tuple(sorted(layers))
