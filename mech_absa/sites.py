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
from collections.abc import Iterable, Sequence
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
"""Names for several roles at once. A named span of own prompts is such a name too (`span_roles`)."""

_SPAN_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
_RESERVED = {r.split(".")[0] for r in ROLES} | {*ROLE_GROUPS, "sentence", "control"}
_PARTS = ("first", "middle", "last")


def is_span(name: str) -> bool:
    """Return whether a word may name a span of own prompts.

    Example:
        >>> is_span("subject"), is_span("aspect"), is_span("two words")
        (True, False, False)
    """
    return _SPAN_NAME.fullmatch(name) is not None and name not in _RESERVED


def span_roles(name: str) -> tuple[str, ...]:
    """Return the roles that a named span of own prompts brings.

    Example:
        >>> span_roles("subject")
        ('subject.first', 'subject.middle', 'subject.last')
    """
    return tuple(f"{name}.{part}" for part in _PARTS)


def vocabulary(spans: Iterable[str] = ()) -> tuple[str, ...]:
    """Return the roles of a task: those of reviews, then those that named spans bring.

    Raises:
        SiteError: the name of a span is no word, or already has a meaning.

    Example:
        >>> vocabulary() == ROLES, vocabulary(["subject"])[len(ROLES) :]
        (True, ('subject.first', 'subject.middle', 'subject.last'))
    """
    names = tuple(dict.fromkeys(spans))
    for name in names:
        if _SPAN_NAME.fullmatch(name) is None:
            raise SiteError(
                f"a span is called {name!r}; accepted: letters, digits and _, a letter first"
            )
        if name in _RESERVED:
            raise SiteError(
                f"a span is called {name!r}, which is a role of reviews; choose another name"
            )
    return (*ROLES, *(role for name in names for role in span_roles(name)))


def roles_at(at: str) -> tuple[str, ...]:
    """Return the roles that a role, a role group or a named span stands for.

    Example:
        >>> roles_at("query.last"), roles_at("subject")
        (('query.last',), ('subject.first', 'subject.middle', 'subject.last'))
    """
    if at in ROLE_GROUPS:
        return ROLE_GROUPS[at]
    return (at,) if at in ROLES or not is_span(at) else span_roles(at)


def role_indices(at: str, roles: Sequence[str] = ROLES) -> tuple[int, ...]:
    """Return the indices into a vocabulary of roles of a role, a role group or a named span."""
    wanted = roles if at == "all" else roles_at(at)
    return tuple(i for i, role in enumerate(roles) if role in wanted)


def in_reading_order(present: Iterable[str]) -> list[str]:
    """Return these roles in reading order: those of named spans stand between prompt and answer.

    Several spans come in the order in which they are first named; those of a set, by name.

    Example:
        >>> in_reading_order(["answer", "city.last", "city.first", "template", "by.last"])
        ['template', 'city.first', 'city.last', 'by.last', 'answer']
    """
    listed = sorted(present) if isinstance(present, (set, frozenset)) else list(present)
    spans = {name: i for i, name in enumerate(spans_of(listed))}
    known = {role: i for i, role in enumerate(ROLES)}

    def place(role: str) -> tuple[int, int, int]:
        name, _, end = role.partition(".")
        if name in spans:
            return len(ROLES) - 2, 1 + spans[name], _PARTS.index(end) if end in _PARTS else 3
        return known.get(role, len(ROLES)), 0, 0

    return sorted(dict.fromkeys(listed), key=place)


def spans_of(roles: Iterable[str]) -> list[str]:
    """Return the names of spans of own prompts among roles, in the order they come."""
    groups = dict.fromkeys(role.partition(".")[0] for role in roles if role not in ROLES)
    return [name for name in groups if name not in _RESERVED]


def _is_role(at: str) -> bool:
    """Return whether a word is a role or a group of some task."""
    name, _, part = at.partition(".")
    return at in ROLES or at in ROLE_GROUPS or (is_span(name) and part in ("", *_PARTS))


def check_role(at: str, spans: Iterable[str] = (), where: str = "") -> str:
    """Return a role or a group itself, if reviews or these named spans have it.

    Raises:
        SiteError: they have none of that name.

    Example:
        >>> check_role("subject.last", ["subject"])
        'subject.last'
    """
    spans = tuple(spans)
    known = vocabulary(spans)
    if at in known or at in ROLE_GROUPS or at in spans:
        return at
    raise SiteError(
        f"unknown role {at!r}{where}; accepted: {choices([*known, *ROLE_GROUPS, *spans])}"
    )


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
        if isinstance(self.at, str) and not _is_role(self.at):
            check_role(self.at, where=f" in site L{self.layer}.{self.kind}")

    def __str__(self) -> str:
        head = "" if self.head is None else str(self.head)
        at = "" if self.at is None else f"@{self.at}"
        return f"L{self.layer}.{self.kind}{head}{at}"

    @classmethod
    def parse(cls, text: str, spans: Iterable[str] = ()) -> Site:
        """Return the site that `text` spells.

        Args:
            text: such as `L5.attn_out@query.last`.
            spans: named spans of own prompts, whose roles are accepted beside those of reviews.

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
        head = None if match["head"] is None else int(match["head"])
        site = cls(int(match["layer"]), match["kind"], head, at)
        if isinstance(at, str):
            check_role(at, spans, f" in site L{site.layer}.{site.kind}")
        return site

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
        spans = [str(s) for s in spans] if isinstance(spans, list) else []
        return [Site.parse(s, spans) for s in names], data
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
