"""What closed-form edits of W_out are given: keys, values, and the values that are wanted.

    facts = Facts.of(model, train, at="query.last", by="example")
    keys = facts.read({"k": W_out.reads(model)}, layer + 1)["k"]    what the matrix reads at the position
    aim = facts.offsets(layer, "mlp", Target())                     d: v0 + d makes the model answer rightly

A fact is one key with the value that it should have. In ROME it is a subject with an object; here it
is a training example, or all examples of a class together (as ROME takes the mean of a key over
several prefixes and one d for all of them).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from ..edits.base import Where
from ..edits.edit import Edit
from ..errors import ConfigError, choices
from ..examples import Example
from ..model import Model
from ..model.forward import advance, last
from ..prompts import PromptTemplate, Tokenised, Tokens, Verbalizer
from ..records import fingerprint
from ..scoring import (
    by_label,
    by_length,
    extend,
    gold_indices,
    positions_read,
    question,
    read_labels,
    room_for,
)
from .prefix import PrefixCache

GROUPS = ("example", "class")
"""What makes one fact: an example, or all examples of a class."""


@dataclass(frozen=True)
class Target:
    """Describe how the wanted value v0 + d is found; the defaults are those of ROME's code for Llama-2.

    Per fact, Adam minimises the mean over its prompts of

        -log p(gold label among the labels)
        + kl KL(next token at the position, before || after)
        + decay ||d|| / ||v0||^2

    and stops where this is below `stop`. After each step, d is cut to ||d|| <= clamp ||v0||. Source:
    Meng et al. 2022 (arXiv 2202.05262), eq. 4; EasyEdit's `rome/compute_v.py`. There the first term is
    over the whole vocabulary, and the second is read after "{subject} is a", at the subject's last token. Here
    it is read at the edited token of the question itself, and left out where that token is the one
    that answers.

    Attributes:
        lr: of Adam.
        steps: evaluations of the loss; one fewer step is taken.
        clamp: largest ||d|| in units of ||v0||.
        stop: loss below which a fact is done.
        decay, kl: factors of the last two terms.
    """

    lr: float = 0.5
    steps: int = 25
    clamp: float = 4.0
    stop: float = 5e-2
    decay: float = 1e-3
    kl: float = 0.0625

    def __post_init__(self) -> None:
        least = {"lr": 0.0, "steps": 1, "clamp": 0.0, "stop": 0.0, "decay": 0.0, "kl": 0.0}
        for name, low in least.items():
            if not low <= getattr(self, name) < float("inf"):
                raise ConfigError(f"{name} is {getattr(self, name)}; accepted: {low:g} or more")


@dataclass(frozen=True, eq=False)
class Aim:
    """Hold what was found for each fact.

    Attributes:
        d: offset of its value.
        losses: at the end.
    """

    d: Float[Tensor, "fact d_model"]
    losses: Float[Tensor, " fact"]


@dataclass(frozen=True, eq=False)
class Facts:
    """Hold training examples as facts.

    Attributes:
        model: unedited.
        prompts: one per example.
        gold: index of its right label.
        at: position of the token whose key is edited.
        group: the fact that it belongs to.
        verbalizer, template: the question.
        cache: of streams below the edit.
        batch_size: prompts per forward pass.
        aims: offsets found so far; several plans can share them.
    """

    model: Model
    prompts: Sequence[Tokenised]
    gold: Int[Tensor, " example"]
    at: Int[Tensor, " example"]
    group: Int[Tensor, " example"]
    template: PromptTemplate
    verbalizer: Verbalizer
    cache: PrefixCache
    batch_size: int = 32
    aims: dict[str, Aim] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        model: Model,
        examples: Sequence[Example],
        at: str | int,
        by: str,
        *,
        template: PromptTemplate | None = None,
        verbalizer: Verbalizer | None = None,
        cache: PrefixCache | None = None,
        batch_size: int = 32,
        aims: dict[str, Aim] | None = None,
    ) -> Facts:
        """Return examples as facts.

        Args:
            model: unedited.
            examples: that should be answered rightly.
            at: a role, or a position; the last token where a role has several.
            by: `example` makes a fact of each, `class` one of all with the same label.
            template, verbalizer: the question; the paper's where None.
            cache: of streams; a new one where None.
            batch_size: prompts per forward pass.
            aims: offsets found before.

        Raises:
            ConfigError: no examples, an unknown `by`, or a prompt without a token at `at`.
        """
        if not len(examples):
            raise ConfigError("there are no examples to make facts of; at least one is needed")
        if by not in GROUPS:
            raise ConfigError(f"by is {by!r}; accepted: {choices(GROUPS)}")
        template, verbalizer = template or PromptTemplate(), verbalizer or Verbalizer()
        room = room_for(verbalizer.continuations(model.tokenizer, template))
        prompts = [question(model, e, template, room) for e in examples]
        places = [_last_at(p, at, e) for p, e in zip(prompts, examples, strict=True)]
        gold = gold_indices(examples, verbalizer)
        group = torch.arange(len(gold)) if by == "example" else gold.unique(return_inverse=True)[1]
        cache = cache if cache is not None and cache.model is model else PrefixCache(model)
        tokens, known = torch.tensor(places), {} if aims is None else aims
        return cls(
            model, prompts, gold, tokens, group, template, verbalizer, cache, batch_size, known
        )

    def __len__(self) -> int:
        return int(self.group.max()) + 1

    @property
    def sizes(self) -> Int[Tensor, " fact"]:
        """Return how many prompts each fact has."""
        return torch.bincount(self.group)

    def means(self, rows: Float[Tensor, "example d"]) -> Float[Tensor, "fact d"]:
        """Return the mean over the prompts of each fact."""
        sums = torch.zeros(len(self), rows.shape[1], dtype=rows.dtype)
        return sums.index_add_(0, self.group, rows) / self.sizes[:, None]

    @torch.no_grad()
    def read(
        self,
        points: Mapping[str, nn.Module],
        stop: int,
        edit: Edit | None = None,
        start: int | None = None,
    ) -> dict[str, Float[Tensor, "fact d"]]:
        """Return what passes at some modules at the position of each prompt, as means over facts.

        Args:
            points: modules by name, in blocks below `stop`.
            stop: the first block that need not run.
            edit: in force.
            start: the first block with a module; `stop` - 1 where None.

        Returns:
            float64, on the CPU.
        """
        found: dict[str, list[Tensor]] = {name: [] for name in points}
        start = stop - 1 if start is None else start
        start = start if edit is None else min(edit.layers[0], start)
        order: list[int] = []
        for rows, tokens in self.batches(range(len(self.prompts))):
            seen: dict[str, Tensor] = {}
            made = edit.points(self.model, tokens) if edit is not None else []
            readers = [(module, keeper(seen, name)) for name, module in points.items()]
            x = self.cache.get(start, tokens)
            advance(self.model, x, start, stop, [*made, *readers])
            each = torch.arange(len(rows))
            for name in points:
                found[name].append(seen[name].cpu().double()[each, self.at[rows]])
            order += rows
        back = torch.tensor(order).argsort()
        return {name: self.means(torch.cat(parts)[back]) for name, parts in found.items()}

    def batches(self, rows: Sequence[int]) -> Iterator[tuple[list[int], Tokens]]:
        """Yield examples and their prompts, those of similar length together."""
        chosen = [self.prompts[i] for i in rows]
        for picked in by_length(chosen, self.batch_size):
            yield [rows[i] for i in picked], Tokens.stack([chosen[i] for i in picked])

    def offsets(self, layer: int, name: str, target: Target) -> Aim:
        """Return d for each fact: added to a value at the position, it makes the model answer rightly.

        Facts are independent, and so are the coordinates in Adam, so that many facts in a batch give
        what each gives alone.

        Args:
            layer: the block.
            name: of the value: `mlp` is what W_out gives, `resid_post` the layer's output.
            target: how d is found.
        """
        asked = [self.template.text, self.verbalizer, self.gold.tolist(), self.at.tolist()]
        ids = [p.token_ids for p in self.prompts]
        made = [self.model.sha256, layer, name, target, *asked, ids, self.group.tolist()]
        if (key := fingerprint(made)) not in self.aims:
            module = self.model.point(layer, name)
            self.aims[key] = _Search(self, layer, module, target).run()
        return self.aims[key]


class _Search:
    """Adam on the offsets of all facts at once.

    Attributes:
        d: the offsets.
        losses: of each fact, as last evaluated.
    """

    def __init__(self, facts: Facts, layer: int, module: nn.Module, target: Target):
        model = facts.model
        self.facts, self.layer, self.module, self.target = facts, layer, module, target
        self.runs = facts.verbalizer.continuations(model.tokenizer, facts.template)
        facts.cache.fill(layer, [extend(p, c) for p in facts.prompts for c in self.runs])
        wide = torch.promote_types(model.dtype, torch.float32)
        self.size = facts.read({"v": module}, layer + 1)["v"].norm(dim=1).to(model.device, wide)
        self.d = torch.zeros(len(facts), model.d_model, dtype=wide, device=model.device)
        self.d.requires_grad_(True)
        self.adam = torch.optim.Adam([self.d], lr=target.lr)
        self.losses = torch.full_like(self.size, torch.inf)
        self.group = facts.group.to(model.device)
        self.share = (1 / facts.sizes[facts.group]).to(model.device, wide)
        self.before: dict[int, Tensor] = {}  # next-token distributions of the unedited model

    def run(self) -> Aim:
        for step in range(self.target.steps):
            active = self.losses >= self.target.stop
            self.losses = torch.where(active, self._evaluate(active), self.losses)
            active = self.losses >= self.target.stop
            if step == self.target.steps - 1 or not bool(active.any()):
                break
            self._step(active)
        return Aim(self.d.detach().cpu().double(), self.losses.cpu().double())

    def _evaluate(self, active: Bool[Tensor, " fact"]) -> Float[Tensor, " fact"]:
        """Return the losses of active facts, and leave their gradients in `d`."""
        self.adam.zero_grad()
        norm = torch.linalg.vector_norm(self.d, dim=1)
        charge = self.target.decay * norm / self.size.clamp_min(1e-12) ** 2
        charge[active].sum().backward()
        losses: Tensor = charge.detach().clone()
        rows: list[int] = active[self.group].nonzero().flatten().tolist()
        for batch, tokens in self.facts.batches(rows):
            each = self._losses(batch, tokens) * self.share[batch]
            each.sum().backward()
            losses.index_add_(0, self.group[batch], each.detach().to(losses))
        return losses

    def _losses(self, rows: list[int], tokens: Tokens) -> Float[Tensor, " row"]:
        """Return -log p(gold label among the labels) + kl KL, of each prompt."""
        facts, parts, kl = self.facts, [], torch.zeros(len(rows), device=self.d.device)
        at, each = facts.at[rows].to(self.d.device), torch.arange(len(rows), device=self.d.device)

        def add(h: Tensor) -> Tensor:
            moved = h[each, at] + self.d[self.group[rows]].to(h)
            return h.index_put((each, at), moved)

        for i, run in enumerate(self.runs):
            asked = extend(tokens, run)
            reads = torch.cat([positions_read(asked.lengths, run), facts.at[rows, None]], 1)
            x = facts.cache.get(self.layer, asked)
            x = last(facts.model, x, reads, self.layer, [(self.module, add)])
            parts.append(read_labels(facts.model, x[:, :-1], run))
            if i == 0 and self.target.kl:
                kl = self._divergence(rows, tokens, x[:, -1])
        scores = by_label(parts, self.runs)
        gold = facts.gold[rows].to(scores.device)
        losses: Tensor = F.cross_entropy(scores, gold, reduction="none")
        return losses + self.target.kl * kl.to(losses)

    def _divergence(
        self, rows: list[int], tokens: Tokens, x: Float[Tensor, "row d_model"]
    ) -> Float[Tensor, " row"]:
        """Return KL(before || now) of the next token at the edited position; 0 where it answers."""
        now = self.facts.model.finish(x, None, "vocabulary").log_softmax(-1)
        for row, values in zip(rows, now.detach(), strict=True):
            self.before.setdefault(row, values.clone())  # d is 0 in the first evaluation
        before = torch.stack([self.before[row] for row in rows])
        inside = self.facts.at[rows] < torch.tensor(tokens.lengths) - 1
        kl: Tensor = F.kl_div(now, before, reduction="none", log_target=True).sum(-1)
        return kl * inside.to(kl)

    @torch.no_grad()
    def _step(self, active: Bool[Tensor, " fact"]) -> None:
        """Move the offsets of active facts, and cut them to the largest norm."""
        before = self.d.clone()
        self.adam.step()
        most, norm = self.target.clamp * self.size, torch.linalg.vector_norm(self.d, dim=1)
        cut = self.d * (most / norm.clamp_min(1e-30)).clamp_max(1.0)[:, None]
        self.d.copy_(torch.where(active[:, None], cut, before))


def keeper(seen: dict[str, Tensor], name: str) -> Callable[[Tensor], None]:
    """Return a function that keeps what it is given under a name."""

    def keep(value: Tensor) -> None:
        seen[name] = value

    return keep


def _last_at(prompt: Tokenised, at: str | int, example: Example) -> int:
    """Return the last position of a prompt that `at` names."""
    found = Where(prompt).mask(at)[0].nonzero()
    if not len(found):
        name = example.id or example.sentence[:40]
        raise ConfigError(
            f"the prompt of {name!r} has no token at {at}, where the key of its fact is read"
        )
    return int(found[-1])
