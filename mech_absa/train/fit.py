"""Training an edit: the answer is all that is asked about, and nothing below the first edited layer runs twice.

    edit = fit(model, train, presets.paper("L2.resid_post@query.last"), validation=0.1, seed=0)

The loss covers the answer only. `labels` is the cross-entropy of the gold label among the label strings, which needs no more of the
unembedding than their columns; `text` is that of the answer's tokens and the end of sequence over the whole vocabulary. In both, the final
norm and the unembedding see only the rows that are read, and so does the last block (`forward.py`).

One step is a function of its number and the seed: the order of an epoch and the dropout of a step are drawn from generators seeded by
them. So the same seed gives the same bytes on a CPU, and a killed run resumes from its checkpoint to the bytes of one that was not.

Started by `accelerate launch` on several processes, every one takes its share of each batch and the gradients are summed; without dropout,
which each process draws for its own rows, the edit is that of one process up to rounding.
"""

from __future__ import annotations

import contextlib
import json
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..axes import LabelScores
from ..edits.edit import Edit
from ..errors import ConfigError, RunFolderError
from ..examples import Example, class_counts, content_hash, split_by_sentence
from ..metrics import Need
from ..model import Model
from ..model.forward import last
from ..progress import bar
from ..prompts import Continuation, PromptTemplate, Tokens, Verbalizer
from ..records import atomic, fingerprint, plain, versions
from ..scoring import extend, positions_read, question, read_labels
from ..sites import Site
from .prefix import PrefixCache
from .presets import Preset

BUCKET = 16
"""Batches that are sorted by length together: little padding, and still a random order."""


@dataclass(frozen=True)
class Question:
    """One example, ready to be trained on.

    Attributes:
        prompt: what is asked.
        runs: the prompt with each continuation that a pass must read.
        gold: index of the right label.
        answer: token ids that answer it in full text.
    """

    prompt: Tokens
    runs: tuple[Tokens, ...]
    gold: int
    answer: tuple[int, ...]

    @property
    def length(self) -> int:
        return self.runs[-1].lengths[0]


class Task:
    """What is asked of a model and what counts as an answer: the loss of a batch, and how good the answers are.

    Args:
        model: the one that answers.
        kind: `labels` or `text`.
        template, verbalizer: as in scoring.
        cache: of streams below the edit.
    """

    def __init__(
        self,
        model: Model,
        kind: str,
        template: PromptTemplate | None,
        verbalizer: Verbalizer | None,
        cache: PrefixCache,
    ):
        self.model, self.kind, self.cache = model, kind, cache
        self.template, self.verbalizer = template or PromptTemplate(), verbalizer or Verbalizer()
        self.continuations = self.verbalizer.continuations(model.tokenizer, self.template)
        eos = model.tokenizer.eos_token_id
        self.answers = [
            ids if eos is None else (*ids, eos)
            for ids in self.verbalizer.label_ids(model.tokenizer, self.template)
        ]

    def questions(self, examples: Sequence[Example]) -> list[Question]:
        """Examples -> questions, in their order."""
        made = []
        for example in examples:
            prompt = question(self.model, example, self.template)
            gold = self.verbalizer.index(example.polarity)
            if self.kind == "text":
                runs: tuple[Tokens, ...] = (
                    extend(prompt, Continuation(self.answers[gold][:-1], ())),
                )
            else:
                runs = tuple(extend(prompt, c) for c in self.continuations)
            made.append(Question(prompt, runs, gold, self.answers[gold]))
        return made

    def last(
        self, edit: Edit | None, tokens: Tokens, reads: Int[Tensor, "batch read"]
    ) -> Float[Tensor, "batch read d_model"]:
        """The residual stream after the last block where it is read, from the kept stream below the edit on."""
        start = edit.layers[0] if edit is not None else 0
        points = edit.points(self.model, tokens) if edit is not None else ()
        return last(self.model, self.cache.get(start, tokens), reads, start, points)

    def loss(self, edit: Edit, batch: Sequence[Question]) -> Tensor:
        """Summed over the questions of a batch, each one a mean over what it is read at."""
        gold = torch.tensor([q.gold for q in batch], device=self.model.device)
        if self.kind == "text":
            tokens = Tokens.stack([q.runs[0] for q in batch])
            longest = max(
                len(q.answer) for q in batch
            )  # shorter answers are read again at their last token, with no weight
            reads = torch.tensor(
                [
                    [q.prompt.lengths[0] - 1 + min(j, len(q.answer) - 1) for j in range(longest)]
                    for q in batch
                ]
            )
            rows = self.last(edit, tokens, reads).flatten(0, 1)
            target = torch.tensor(
                [q.answer[min(j, len(q.answer) - 1)] for q in batch for j in range(longest)],
                device=rows.device,
            )
            weight = torch.tensor(
                [(j < len(q.answer)) / len(q.answer) for q in batch for j in range(longest)],
                device=rows.device,
            )
            return (
                F.cross_entropy(
                    self.model.finish(rows, None, "vocabulary"), target, reduction="none"
                )
                * weight
            ).sum()
        # The normaliser cancels where all labels are read at one place.
        need: Need = (
            "labels"
            if len(self.continuations) == 1 and self.continuations[0].reads == 1
            else "normaliser"
        )
        columns_of, parts = [], []
        for which, continuation in enumerate(self.continuations):
            tokens = Tokens.stack([q.runs[which] for q in batch])
            rows = self.last(edit, tokens, positions_read(tokens.lengths, continuation))
            parts.append(read_labels(self.model, rows, continuation, need))
            columns_of += [i for i, _ in continuation.labels]
        order = torch.tensor(columns_of, device=gold.device).argsort()
        return F.cross_entropy(torch.cat(parts, 1)[:, order], gold, reduction="sum")

    @torch.no_grad()
    def scores(
        self, edit: Edit | None, questions: Sequence[Question], batch_size: int = 32
    ) -> LabelScores:
        """What `scoring.label_scores` gives, with the streams below the edit kept for the next edit."""
        if edit is not None:
            self.cache.fill(
                edit.layers[0], [extend(q.prompt, c) for q in questions for c in self.continuations]
            )
        made = torch.zeros(len(questions), len(self.verbalizer.words), dtype=torch.float64)
        order = sorted(range(len(questions)), key=lambda i: questions[i].prompt.lengths[0])
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            prompts = Tokens.stack([questions[i].prompt for i in rows])
            for continuation in self.continuations:
                tokens = extend(prompts, continuation)
                part = read_labels(
                    self.model,
                    self.last(edit, tokens, positions_read(tokens.lengths, continuation)),
                    continuation,
                )
                made[
                    torch.tensor(rows)[:, None], torch.tensor([i for i, _ in continuation.labels])
                ] = part.to("cpu", torch.float64)
        return made

    def quality(
        self, edit: Edit, questions: Sequence[Question], batch_size: int
    ) -> tuple[float, float]:
        """(mean cross-entropy over the labels, accuracy), whatever the loss is."""
        scores = self.scores(edit, questions, batch_size)
        gold = torch.tensor([q.gold for q in questions])
        return float(F.cross_entropy(scores, gold)), float(
            (scores.argmax(-1) == gold).double().mean()
        )


@dataclass
class Progress:
    """How far a training run has come: all that a checkpoint holds beside tensors."""

    step: int = 0
    epoch: int = 0
    batch: int = 0
    examples: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    best_loss: float = math.inf
    best_step: int = 0
    waited: int = 0
    stopped: str = ""
    seconds: float = 0.0


class Team:
    """The processes that train one edit together; alone unless a launcher has started several."""

    def __init__(self):
        import torch.distributed as dist

        self.dist = dist if dist.is_available() and dist.is_initialized() else None
        self.size = self.dist.get_world_size() if self.dist else 1
        self.rank = self.dist.get_rank() if self.dist else 0

    def share(self, batch: Sequence[Question]) -> Sequence[Question]:
        return batch[self.rank :: self.size]

    def sum(self, *tensors: Tensor) -> None:
        if self.dist:
            for t in tensors:
                self.dist.all_reduce(t)


def fit(
    model: Model,
    train: Sequence[Example],
    preset: Preset,
    *,
    validation: Sequence[Example] | float | None = None,
    seed: int = 0,
    template: PromptTemplate | None = None,
    verbalizer: Verbalizer | None = None,
    cache: PrefixCache | None = None,
    checkpoint: str | Path | None = None,
    checkpoint_every: int = 100,
    progress: bool = False,
    on_step: Callable[[Progress], Any] | None = None,
) -> Edit:
    """Train an edit.

    Args:
        model: stays as it is, to the last bit.
        train: what to learn from.
        preset: the edit, its rates, and how long.
        validation: examples to choose the best epoch on, or the share of the training sentences to set aside for it; the edit returned
            is the one with the lowest cross-entropy over the labels there. None returns the last.
        seed: of the parameters, the order and the dropout.
        template: the question; the paper's where None.
        verbalizer: the label strings.
        cache: streams below the edit, shared with other trainings of the same model; made anew where None.
        checkpoint: a file to keep the state in while training; where it exists already, training goes on from it. Removed at the end by the
            caller, if at all.
        checkpoint_every: steps between two states.
        progress: show a bar.
        on_step: called after every step.

    Returns:
        The edit, in eval mode, with its training in `record`. A loss that is no number stops the training; the last good state is
        returned and `record["stopped"]` says so.

    Raises:
        ConfigError: there is nothing to train on, or a part of the edit acts at a role that no prompt has.
        PromptError: a prompt is too long, or a label is missing.
    """
    train, held = list(train), list[Example]()
    if isinstance(validation, (int, float)):
        train, held = split_by_sentence(train, float(validation), seed)
    elif validation is not None:
        held = list(validation)
    if not train:
        raise ConfigError("there are no examples to train on; at least one is needed")

    cache = cache if cache is not None and cache.model is model else PrefixCache(model)
    task = Task(model, preset.loss, template, verbalizer, cache)
    questions, held_questions = task.questions(train), task.questions(held)
    edit = Edit.fresh(model, preset.parts, seed)
    _acts_somewhere(edit, questions)

    team = Team()
    cache.fill(edit.layers[0], [run for q in questions for run in q.runs])
    state = Progress()
    optimiser = torch.optim.AdamW(
        [
            {
                "params": list(intervention.parameters()),
                "lr": part.lr,
                "rate": part.lr,
                "weight_decay": part.weight_decay,
            }
            for intervention, part in zip(edit, edit.parts, strict=True)
        ],
        foreach=None,
    )
    key = fingerprint(
        [
            model.sha256,
            preset,
            seed,
            content_hash(train),
            content_hash(held),
            task.template,
            task.verbalizer,
        ]
    )
    best = _copy(edit)
    if checkpoint is not None and Path(checkpoint).exists():
        state, best = _resume(Path(checkpoint), key, edit, optimiser)

    micro = preset.batch_size
    batches_an_epoch = math.ceil(len(questions) / micro)
    steps = preset.epochs * math.ceil(batches_an_epoch / preset.accumulate)
    started = time.perf_counter() - state.seconds
    good = _copy(edit)

    with bar("training", steps, quiet=not progress or team.rank > 0) as advance:
        advance(state.step)
        while state.epoch < preset.epochs and not state.stopped:
            order = batches([q.length for q in questions], micro, seed, state.epoch)
            while state.batch < len(order) and not state.stopped:
                group = order[state.batch : state.batch + preset.accumulate]
                rate = schedule(preset, state.step, steps)
                for g in optimiser.param_groups:
                    g["lr"] = g["rate"] * rate
                with _seeded(seed, state.step, model.device):
                    loss = _gradients(
                        task,
                        edit.train(),
                        [[questions[i] for i in b] for b in group],
                        team,
                        optimiser,
                        state.step,
                    )
                norm = float(
                    torch.nn.utils.clip_grad_norm_(edit.parameters(), preset.clip or math.inf)
                )
                edit.eval()
                if not (math.isfinite(loss) and math.isfinite(norm)):
                    state.stopped = f"the loss was {loss} at step {state.step + 1}; the last good state was kept"
                    _restore(edit, best if held else good)
                    break
                optimiser.step()
                edit.settle()
                state.step += 1
                state.batch += len(group)
                state.examples += sum(map(len, group))
                state.seconds = time.perf_counter() - started
                state.history.append(
                    {
                        "step": state.step,
                        "epoch": state.epoch,
                        "examples": state.examples,
                        "loss": loss,
                        "grad_norm": norm,
                        "rate": rate,
                        "seconds": round(state.seconds, 3),
                    }
                )
                if state.batch >= len(order):
                    good = _copy(edit)
                    if held:
                        best = _choose(task, edit, held_questions, preset, state, best)
                    state.epoch, state.batch = state.epoch + 1, 0
                if on_step is not None:
                    on_step(state)
                advance(1)
                if (
                    checkpoint is not None
                    and team.rank == 0
                    and (state.step % checkpoint_every == 0 or state.batch == 0)
                ):
                    _save(Path(checkpoint), key, edit, best, optimiser, state)
                if state.batch == 0:
                    break

    if held and not state.stopped.startswith("the loss"):
        _restore(edit, best)
    edit.zero_grad(set_to_none=True)
    seconds = time.perf_counter() - started
    edit.history = state.history
    return edit.eval().with_record(
        preset=plain(preset),
        seed=seed,
        examples=len(train),
        classes=class_counts(train),
        validation=len(held),
        data_sha256=content_hash(train),
        template=task.template.text,
        labels=[w for _, w in task.verbalizer.words],
        separator=task.verbalizer.separator,
        steps=state.step,
        best_step=state.best_step if held else state.step,
        best_validation_loss=state.best_loss if held else None,
        stopped=state.stopped or None,
        processes=team.size,
        seconds=round(seconds, 3),
        examples_per_second=round(state.examples / seconds, 2) if seconds else None,
        versions=versions(),
    )


def batches(lengths: Sequence[int], size: int, seed: int, epoch: int) -> list[list[int]]:
    """The batches of an epoch, as indices: shuffled, sorted by length within buckets, the order of the batches shuffled again."""
    rng = random.Random(f"{seed}/{epoch}")
    order = list(range(len(lengths)))
    rng.shuffle(order)
    made = []
    for start in range(0, len(order), size * BUCKET):
        bucket = sorted(order[start : start + size * BUCKET], key=lambda i: lengths[i])
        made += [bucket[i : i + size] for i in range(0, len(bucket), size)]
    rng.shuffle(made)
    return made


def schedule(preset: Preset, step: int, steps: int) -> float:
    """What the learning rates are multiplied by at a step (from 0)."""
    warm = round(preset.warmup * steps)
    if step < warm:
        return (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    return {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[
        preset.schedule
    ]


def _gradients(
    task: Task,
    edit: Edit,
    group: Sequence[Sequence[Question]],
    team: Team,
    optimiser: torch.optim.Optimizer,
    step: int,
) -> float:
    """The gradient of the mean loss over all questions of the group, left in the parameters; the loss."""
    optimiser.zero_grad(set_to_none=True)
    total = sum(map(len, group))
    value = torch.zeros((), dtype=torch.float64)
    for batch in group:
        if not (mine := team.share(batch)):
            continue
        loss = task.loss(edit, mine) / total
        if loss.requires_grad:
            loss.backward()
        value += loss.detach().double().cpu()
    charges = [c for i in edit if (c := i.penalty(step)) is not None]
    if charges:
        charge = torch.stack(charges).sum() / team.size
        charge.backward()
        value += charge.detach().double().cpu()
    if team.size > 1:
        for p in edit.parameters():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        team.sum(*(p.grad for p in edit.parameters() if p.grad is not None), value)
    return float(value)


def _choose(
    task: Task,
    edit: Edit,
    held: Sequence[Question],
    preset: Preset,
    state: Progress,
    best: dict[str, Tensor],
) -> dict[str, Tensor]:
    """Validate after an epoch: the better parameters, and whether it is time to stop."""
    loss, accuracy = task.quality(edit, held, max(32, preset.batch_size))
    state.history[-1] |= {"validation_loss": loss, "validation_accuracy": accuracy}
    if loss < state.best_loss:
        state.best_loss, state.best_step, state.waited = loss, state.step, 0
        return _copy(edit)
    state.waited += 1
    if preset.patience and state.waited >= preset.patience:
        state.stopped = f"no gain on the validation examples for {state.waited} epochs"
    return best


def _acts_somewhere(edit: Edit, questions: Sequence[Question]) -> None:
    """Refuse an edit of positions that no prompt has: it would train nothing and say nothing."""
    from ..edits.base import Where

    unseen = {i.place.at: i for i in edit if isinstance(i.place, Site) and i.place.at is not None}
    for q in questions:
        if not unseen:
            return
        where = Where(q.prompt)
        unseen = {at: i for at, i in unseen.items() if not bool(where.mask(at).any())}
    for at, intervention in unseen.items():
        raise ConfigError(
            f"{intervention.family} at {intervention.place}: none of the {len(questions)} training prompts has a token at {at}"
        )


def _copy(edit: Edit) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in edit.named_parameters()}


@torch.no_grad()
def _restore(edit: Edit, values: dict[str, Tensor]) -> None:
    for name, p in edit.named_parameters():
        p.copy_(values[name])


@contextlib.contextmanager
def _seeded(seed: int, step: int, device: torch.device) -> Iterator[None]:
    """The global generators as a function of seed and step inside, and as they were outside."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed((seed * 1_000_003 + step) & (2**63 - 1))
        yield


# ---- checkpoints ------------------------------------------------------------------------------------------------------------------


def _save(
    path: Path,
    key: str,
    edit: Edit,
    best: dict[str, Tensor],
    optimiser: torch.optim.Optimizer,
    state: Progress,
) -> None:
    tensors = {}
    for name, p in edit.named_parameters():
        tensors[f"now/{name}"], tensors[f"best/{name}"] = p.detach(), best[name]
        tensors |= {f"{slot}/{name}": value for slot, value in optimiser.state.get(p, {}).items()}
    with atomic(path) as temporary:
        save_file(
            {k: v.contiguous().cpu() for k, v in tensors.items()},
            temporary,
            {"key": key, "state": json.dumps(plain(state))},
        )


def _resume(
    path: Path, key: str, edit: Edit, optimiser: torch.optim.Optimizer
) -> tuple[Progress, dict[str, Tensor]]:
    """The state of a killed run, put back into the edit and the optimiser.

    Raises:
        RunFolderError: the file is damaged, or of another run.
    """
    try:
        with safe_open(path, "pt") as f:
            about = f.metadata() or {}
            tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, OSError) as error:
        raise RunFolderError(
            f"{path}: the checkpoint is damaged ({error}); remove it to begin again"
        ) from None
    if about.get("key") != key:
        raise RunFolderError(
            f"{path}: the checkpoint is of another model, data, preset or seed; remove it, or give the same again"
        )
    for name, p in edit.named_parameters():
        with torch.no_grad():
            p.copy_(tensors[f"now/{name}"])
        slots = {
            s: tensors[f"{s}/{name}"]
            for s in ("step", "exp_avg", "exp_avg_sq")
            if f"{s}/{name}" in tensors
        }
        if slots:
            optimiser.state[p] = {s: v if s == "step" else v.to(p.device) for s, v in slots.items()}
    best = {name: tensors[f"best/{name}"].to(p.device) for name, p in edit.named_parameters()}
    return Progress(**json.loads(about["state"])), best
