"""Name places in a model: a layer, a component, and optionally a token.

A `Site` prints and parses as one short word. Tables, files, figures and flags all use this
spelling:

    L5.resid_post               the residual stream after block 5
    L5.attn_out                 what the attention of block 5 adds to it
    L5.head3                    z of query head 3 (before the output projection)
    L5.attn_out@query.last      the same, at the last sub-token of the aspect in the question
    L5.resid_post@-1            ... at the last token

The role of a token says what the token is for; `ROLES` lists the roles in reading order. Layers and
heads count from 0.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from .errors import SiteError, choices

ROLES = (
    "template", "before", "aspect.first", "aspect.middle", "aspect.last", "opinion", "after",
    "query.first", "query.middle", "query.last", "answer",
)  # fmt: skip
"""Roles; every token has exactly one.

`aspect.*` is the aspect in the sentence, `query.*` the aspect in the question; a one-token aspect
is `last`. `opinion` is the opinion expression, if it is known. `before` and `after` are the rest of
the sentence around the aspect, `answer` is the last token of the prompt, and `template` is
everything else.
"""

ROLE_GROUPS: dict[str, tuple[str, ...]] = {
    "aspect": ("aspect.first", "aspect.middle", "aspect.last"),
    "query": ("query.first", "query.middle", "query.last"),
    "all": ROLES,
}
"""Names for several roles at once. Own prompts add the names of their spans (`add_spans`)."""

_SPAN_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_named: list[str] = []
_RESERVED = {r.split(".")[0] for r in ROLES} | {*ROLE_GROUPS, "sentence", "control"}


def add_spans(names: Iterable[str]) -> None:
    """Make the names of spans of own prompts known: each brings `NAME.first`, `.middle` and `.last`.

    Raises:
        SiteError: a name is no word, or already has a meaning.

    Example:
        >>> add_spans(["subject"])
        >>> str(Site.parse("L5.resid_post@subject.last"))
        'L5.resid_post@subject.last'
    """
    for name in names:
        if _SPAN_NAME.fullmatch(name) is None:
            raise SiteError(
                f"a span is called {name!r}; accepted: letters, digits and _, a letter first"
            )
        if name in _RESERVED:
            raise SiteError(
                f"a span is called {name!r}, which is a role of reviews; choose another name"
            )
        if name not in ROLE_GROUPS:
            parts = (f"{name}.first", f"{name}.middle", f"{name}.last")
            _named.extend(parts)
            ROLE_GROUPS[name] = parts
            ROLE_GROUPS["all"] = role_names()


def role_names() -> tuple[str, ...]:
    """Return all roles known: those of reviews, and those of the spans of own prompts."""
    return (*ROLES, *_named)


def is_role(role: str) -> bool:
    """Return whether a word is a role, or a group of roles, that is known."""
    return role in ROLES or role in _named or role in ROLE_GROUPS


def role_index(role: str) -> int:
    """Return the index of a role in `role_names()`; it never changes while the process lasts."""
    return role_names().index(role)


def in_reading_order(present: Iterable[str]) -> list[str]:
    """Return these roles in reading order: those of named spans stand between prompt and answer.

    Example:
        >>> in_reading_order({"answer", "city.last", "city.first", "template"})
        ['template', 'city.first', 'city.last', 'answer']
    """
    known = {role: i for i, role in enumerate((*ROLES[:-1], *_named))}
    part = {"first": 0, "middle": 1, "last": 2}

    def place(role: str) -> tuple[int, str, int]:
        if role == ROLES[-1]:
            return len(known) + 1, "", 0
        name, _, end = role.partition(".")
        return known.get(role, len(known)), name, part.get(end, 3)

    return sorted(present, key=place)


def spans_of(roles: Iterable[str]) -> list[str]:
    """Return the names of spans of own prompts among roles, in the order they come."""
    groups = dict.fromkeys(role.partition(".")[0] for role in roles if role not in ROLES)
    return [name for name in groups if name not in _RESERVED]


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
"""Kinds of which a layer has one per head (per key/value head for k and v)."""

_PATTERN = re.compile(
    r"L(?P<layer>[0-9]{1,9})\.(?P<kind>[a-z_]+?)(?P<head>[0-9]{1,9})?(?:@(?P<at>[-\w.]{1,40}))?"
)


@dataclass(frozen=True, order=True)
class Site:
    """Name one place in a model.

    Attributes:
        layer: block index from 0.
        kind: one of `KINDS`.
        head: head index for `HEAD_KINDS`, None otherwise.
        at: a role, a role group, a position (negative counts from the end of the prompt), or None
            for the place as a whole.

    Example:
        >>> import mech_absa as ma
        >>> site = ma.Site.parse("L5.attn_out@query.last")
        >>> site.layer, site.kind, site.at
        (5, 'attn_out', 'query.last')
        >>> str(site)
        'L5.attn_out@query.last'
    """

    layer: int
    kind: str
    head: int | None = None
    at: str | int | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise SiteError(
                f"unknown kind of site {self.kind!r} in layer {self.layer}; accepted: {choices(KINDS)}"
            )
        if (self.head is not None) != (self.kind in HEAD_KINDS):
            need = "needs a head, as in L5.head3" if self.kind in HEAD_KINDS else "has no heads"
            raise SiteError(f"site L{self.layer}.{self.kind} {need}")
        if isinstance(self.at, str) and not is_role(self.at):
            raise SiteError(
                f"unknown role {self.at!r} in site L{self.layer}.{self.kind}; accepted: {choices([*role_names(), *ROLE_GROUPS])}"
            )

    def __str__(self) -> str:
        head = "" if self.head is None else str(self.head)
        at = "" if self.at is None else f"@{self.at}"
        return f"L{self.layer}.{self.kind}{head}{at}"

    @classmethod
    def parse(cls, text: str) -> Site:
        """Return the site that `text` spells.

        Raises:
            SiteError: `text` is no site.
        """
        match = _PATTERN.fullmatch(text.strip())
        if match is None:
            raise SiteError(
                f"{text!r} is no site; sites look like L5.resid_post, L5.head3 or L5.attn_out@query.last"
            )
        text_at: str | None = match["at"]
        at = (
            int(text_at)
            if text_at is not None and re.fullmatch(r"-?[0-9]{1,9}", text_at)
            else text_at
        )
        return cls(
            int(match["layer"]),
            match["kind"],
            None if match["head"] is None else int(match["head"]),
            at,
        )

    @property
    def hook_name(self) -> str:
        """Return its TransformerLens hook point."""
        return f"blocks.{self.layer}.{HOOKS[self.kind]}"

    @property
    def everywhere(self) -> Site:
        """Return the same place without the token."""
        return replace(self, at=None)

    def check(
        self,
        n_layers: int,
        n_heads: int,
        n_kv_heads: int | None = None,
        kinds: Iterable[str] = KINDS,
        model: str = "the model",
    ) -> Site:
        """Return the site itself if a model of this shape has it.

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
    """Return the indices into `role_names()` of a role or a role group."""
    return tuple(role_index(r) for r in ROLE_GROUPS.get(at, (at,)))


def parse_layers(text: str, n_layers: int) -> tuple[int, ...]:
    """Return the layers that `3`, `2-5` (both ends count), `0,2-4`, `all`, `first`, `middle` or
    `last` (thirds of the depth) name.

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
        match = re.fullmatch(r"\s*([0-9]{1,9})(?:-([0-9]{1,9}))?\s*", part)
        if match is None or int(match[2] or match[1]) < int(match[1]):
            raise SiteError(f"{text!r} names no layers; accepted: 3, 2-5, 0,2-4, {choices(named)}")
        last = int(match[2] or match[1])
        if last >= n_layers:  # before the range is made: it may have a billion numbers
            raise SiteError(
                f"layer {last} was asked for; the model has {n_layers} layers, 0 to {n_layers - 1}"
            )
        layers.update(range(int(match[1]), last + 1))
    return tuple(sorted(layers))


# ---- sites.json -------------------------------------------------------------------------------------


@runtime_checkable
class TracedModel(Protocol):
    """Hold what a sites.json records of a model, and check a model against it."""

    @property
    def name(self) -> str: ...
    @property
    def sha256(self) -> str: ...
    @property
    def n_layers(self) -> int: ...
    @property
    def n_heads(self) -> int: ...
    @property
    def d_model(self) -> int: ...
    @property
    def dtype(self) -> Any: ...
    def check_site(self, site: Site) -> Site: ...


def traced_in(
    model: TracedModel, base: TracedModel | None = None, adapter: str | None = None
) -> dict[str, Any]:
    """Return what a sites.json says of the model that was traced.

    Args:
        model: the traced one.
        base: what it was before an adapter's weights were merged into it; itself where None.
        adapter: the name of that adapter.
    """
    base = base or model
    return {
        "name": base.name,
        "sha256": model.sha256,
        "base_sha256": base.sha256,
        "adapter": adapter,
        "n_layers": model.n_layers,
        "n_heads": model.n_heads,
        "d_model": model.d_model,
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def sites_file(path: str | os.PathLike[str]) -> tuple[list[Site], dict[str, Any]]:
    """Read a sites.json: its sites, and the record beside them (model, rule, intervals).

    Args:
        path: of the file, or of the folder of a traced run that holds it.

    Raises:
        SiteError: the file is missing, damaged, or names no sites.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "sites.json"
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SiteError(
            f"{path}: the sites cannot be read ({error.strerror}); the sites.json of a traced run is needed"
        ) from None
    except (ValueError, RecursionError):
        raise SiteError(f"{path}: not JSON; the sites.json of a traced run is needed") from None
    data = data if isinstance(data, dict) else {"sites": data}
    names = data.get("sites")
    if isinstance(names, list):
        names = [s.get("site") if isinstance(s, dict) else s for s in names]
    if not isinstance(names, list) or not names or not all(isinstance(s, str) for s in names):
        raise SiteError(
            f"{path}: it names no sites; a list such as ['L5.resid_post@query.last'] under 'sites' is needed"
        )
    try:
        spans = data.get("spans")
        add_spans(map(str, spans) if isinstance(spans, list) else ())
        return [Site.parse(s) for s in names], data
    except SiteError as error:
        raise SiteError(f"{path}: {error}") from None


def traced_sites(
    path: str | os.PathLike[str], model: TracedModel, anywhere: bool = False
) -> tuple[list[Site], list[str]]:
    """Return the sites of a sites.json for a model: the one they were traced in, or its base.

    The paper traces the *adapted* model and edits the *base*, so both hashes stand in the file and
    either is accepted. Weights of another dtype have another hash; there, a model of the same name
    and sizes is taken for the same, with a note.

    Args:
        path: of the file or its run's folder.
        model: what is to be edited.
        anywhere: accept sites of another model, where this one has them, with a note.

    Returns:
        the sites, and notes for the run's record.

    Raises:
        SiteError: the file holds no sites, or sites of another model, or this model lacks one.
    """
    sites, record = sites_file(path)
    notes = []
    traced = record.get("model")
    known = (traced.get("sha256"), traced.get("base_sha256")) if isinstance(traced, dict) else ()
    answers = getattr(model, "answers_to", model.sha256.__eq__)
    if isinstance(traced, dict) and not any(answers(h) for h in known if isinstance(h, str)):
        this = traced_in(model)
        origin = (
            f"these sites were found in {traced.get('name', 'a model')} (weights "
            f"{str(traced.get('sha256'))[:12]}, {traced.get('n_layers', '?')} layers)"
        )
        mine = f"{model.name} has others ({model.sha256[:12]}, {model.n_layers} layers)"
        alike = all(traced.get(k) == this[k] for k in ("name", "n_layers", "n_heads", "d_model"))
        if alike and traced.get("dtype") != this["dtype"]:
            notes.append(
                f"{path}: {origin} in {traced.get('dtype')}, so that its weights cannot be compared "
                f"with those of {model.name}"
            )
        elif anywhere:
            notes.append(
                f"{path}: {origin}, and {mine}; they are edited all the same, as asked for"
            )
        else:
            raise SiteError(
                f"{path}: {origin}, and {mine}; trace this model, say the layers with --layers, or give "
                "--any-sites to edit there"
            )
    try:
        return [model.check_site(s) for s in sites], notes
    except SiteError as error:
        raise SiteError(f"{path}: {error}") from None
