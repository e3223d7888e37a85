"""One training, step by step: `step`, `end_epoch`, `save`, `resume`.

A step is a function of its number and the seed: the order of an epoch and the dropout of a step are
drawn from generators seeded by them. So the same seed gives the same bytes on a CPU, and a killed
run resumes from its checkpoint to the bytes of one that was not.

Started by `accelerate launch` on several processes, every one takes its share of each batch and the
gradients are summed; without dropout, which each process draws for its own rows, the edit is that
of one process up to rounding.
"""

from __future__ import annotations

import contextlib
import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..edits.edit import Edit
from ..edits.record import TrainingRecord
from ..errors import RunFolderError
from ..examples import Example, content_hash
from ..records import atomic, fingerprint, plain
from .balance import divergences, factor, moved, of_weights, ratio
from .presets import Preset
from .task import Prepared, Task, check_positions

BUCKET = 16
"""Batches that are sorted by length together: little padding, and still a random order."""

SORTS = ("weights", "representations")
"""The two sorts of parts whose rates can be balanced."""

Group = Sequence[Sequence[Prepared]]
"""The batches of one step."""
State = dict[str, Tensor]
"""Parameters of an edit by name."""


@dataclass
class Progress:
    """Hold how far a training has come: all that a checkpoint holds beside tensors.

    Attributes:
        step: steps taken.
        epoch: epochs that have ended.
        batch: batches of the present epoch that have been used.
        examples: examples used.
        history: a row per step.
        best_loss: lowest validation loss.
        best_step: step it belongs to.
        waited: epochs since then.
        stopped: why training ended early; empty where it did not.
        diverged: whether it ended because a loss was not a number.
        balance: log of the ratio of what the rates of weights and of representations are multiplied
            by (`balance.py`); 0 where they are not balanced.
        seconds: wall time, over all resumptions.
    """

    step: int = 0
    epoch: int = 0
    batch: int = 0
    examples: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    best_loss: float = math.inf
    best_step: int = 0
    waited: int = 0
    stopped: str = ""
    diverged: bool = False
    balance: float = 0.0
    seconds: float = 0.0


class Team:
    """The processes that train one edit together; a single one unless a launcher has started
    several.
    """

    def __init__(self) -> None:
        import torch.distributed as dist

        self.dist = dist if dist.is_available() and dist.is_initialized() else None
        self.size = self.dist.get_world_size() if self.dist else 1
        self.rank = self.dist.get_rank() if self.dist else 0

    def share(self, batch: Sequence[Prepared]) -> Sequence[Prepared]:
        """Return the rows of a batch that this process takes."""
        return batch[self.rank :: self.size]

    def sum(self, *tensors: Tensor) -> None:
        """Add up tensors over all processes, in place."""
        if self.dist:
            for t in tensors:
                self.dist.all_reduce(t)


class Training:
    """An edit while it is trained.

    Args:
        task: the question and its loss.
        preset: the edit, its rates, and how long.
        train: examples to learn from.
        held: validation examples; the state with the lowest loss there is kept.
        seed: of the parameters, the order and the dropout.

    Attributes:
        edit: in its present state.
        state: how far it has come.
        steps: steps of the whole training.
        kept: with validation examples, the parameters of the best epoch; without, those of the last
            epoch whose loss was a number.

    Raises:
        ConfigError: a part of the edit acts at a position that no prompt has.
        PromptError: a prompt is too long, or a label is missing.
    """

    def __init__(
        self,
        task: Task,
        preset: Preset,
        train: Sequence[Example],
        held: Sequence[Example] = (),
        seed: int = 0,
    ):
        self.task, self.preset, self.seed, self.data = task, preset, seed, train
        self.items, self.held = task.prepare(train), task.prepare(held)
        self.edit = Edit.fresh(task.model, preset.parts, seed)
        check_positions(self.edit, self.items)
        self.team = Team()
        task.cache.fill(self.edit.layers[0], [run for q in self.items for run in q.runs])
        task.keep(self.edit.layers[0], self.held)
        self.optimiser = _optimiser(self.edit)
        self.batches = math.ceil(len(self.items) / preset.batch_size)
        self.steps = preset.epochs * math.ceil(self.batches / preset.accumulate)
        self.state = Progress()
        self.kept = _copy(self.edit)
        self._untried: State | None = None  # the end of an epoch, until a loss is computed from it
        data = [content_hash(train), content_hash(held)]
        self.key = fingerprint(
            [task.model.sha256, preset, seed, *data, task.template, task.verbalizer]
        )
        self.started = time.perf_counter()

    def groups(self) -> Iterator[Group]:
        """Yield the batches of each step until training ends; a step is taken with each before the
        next is asked for."""
        state, order, epoch = self.state, list[list[int]](), -1
        while state.epoch < self.preset.epochs and not state.stopped:
            if state.epoch != epoch:
                epoch, lengths = state.epoch, [q.length for q in self.items]
                order = batches(lengths, self.preset.batch_size, self.seed, epoch)
            group = order[state.batch : state.batch + self.preset.accumulate]
            yield [[self.items[i] for i in batch] for batch in group]

    def step(self, group: Group) -> None:
        """Take one step of the optimiser; a loss or gradient that is not a number ends the training
        instead.
        """
        state, edit = self.state, self.edit
        rate = schedule(self.preset, state.step, self.steps)
        for g in self.optimiser.param_groups:
            g["lr"] = g["rate"] * rate * factor(state.balance, g["of_weights"])
        edit.train()
        with _seeded(self.seed, state.step, self.task.model.device):
            loss = self._gradients(group)
        limit = self.preset.clip or math.inf
        norm = float(torch.nn.utils.clip_grad_norm_(edit.parameters(), limit))
        edit.eval()
        if not (math.isfinite(loss) and math.isfinite(norm)):
            what = f"gradient was {norm}" if math.isfinite(loss) else f"loss was {loss}"
            self._diverge(f"the {what} at step {state.step + 1}")
            return
        if self._untried is not None:
            self.kept, self._untried = self._untried, None
        every = self.preset.balance
        before = _copy(edit) if every and state.step % every == 0 else None
        self.optimiser.step()
        edit.settle()
        about = {"loss": loss, "grad_norm": norm, "rate": rate}
        self._note(group, about if before is None else about | self._rebalance(group, before))

    def _rebalance(self, group: Group, before: State) -> dict[str, float]:
        """Measure how far the step moved the answers by each sort of parts, and balance the rates of
        the next step; return kappa and the factors of this one."""
        state = self.state
        shares = [mine for batch in group if (mine := self.team.share(batch))]
        divergence = divergences(self.task, self.edit, shares, before)
        self.team.sum(divergence)
        kappa, balance = ratio(divergence), state.balance
        state.balance = moved(balance, kappa)
        factors = {f"{what}_times": factor(balance, what == "weights") for what in SORTS}
        return {"kappa": kappa, **factors}

    def _note(self, group: Group, about: dict[str, float]) -> None:
        """Count a step and add its row to the history."""
        state = self.state
        state.step += 1
        state.batch += len(group)
        state.examples += sum(map(len, group))
        state.seconds = time.perf_counter() - self.started
        state.history.append(
            {
                "step": state.step,
                "epoch": state.epoch,
                "examples": state.examples,
                **about,
                "seconds": round(state.seconds, 3),
            }
        )

    def _gradients(self, group: Group) -> float:
        """Leave the gradient of the mean loss over all examples of the group in the parameters;
        return the loss."""
        self.optimiser.zero_grad(set_to_none=True)
        total = sum(map(len, group))
        value = torch.zeros((), dtype=torch.float64)
        for batch in group:
            if not (mine := self.team.share(batch)):
                continue
            loss = self.task.loss(self.edit, mine)
            for part in self.edit:
                if (extra := part.batch_penalty(self.state.step / self.steps)) is not None:
                    loss = loss + len(mine) * extra
            loss = loss / total
            if loss.requires_grad:
                loss.backward()
            value += loss.detach().double().cpu()
        charges = [c for i in self.edit if (c := i.penalty(self.state.step)) is not None]
        if charges:
            charge = torch.stack(charges).sum() / self.team.size
            charge.backward()
            value += charge.detach().double().cpu()
        if self.team.size > 1:
            for p in self.edit.parameters():
                if p.grad is None:
                    p.grad = torch.zeros_like(p)
            grads = [p.grad for p in self.edit.parameters() if p.grad is not None]
            self.team.sum(*grads, value)
        return float(value)

    @property
    def epoch_ended(self) -> bool:
        """Return whether all batches of the epoch have been used."""
        return self.state.batch >= self.batches and not self.state.diverged

    def end_epoch(self) -> None:
        """Begin the next epoch; with validation examples, keep the better state and see whether it
        is time to stop."""
        if self.held:
            self._validate()
        else:
            self._untried = _copy(self.edit)
        self.state.epoch, self.state.batch = self.state.epoch + 1, 0

    def _validate(self) -> None:
        state, patience = self.state, self.preset.patience
        size = max(32, self.preset.batch_size)
        loss, accuracy = self.task.quality(self.edit, self.held, size)
        if not math.isfinite(loss):
            self._diverge(f"the loss on the validation examples was {loss} at step {state.step}")
            return
        state.history[-1] |= {"validation_loss": loss, "validation_accuracy": accuracy}
        if loss < state.best_loss:
            state.best_loss, state.best_step, state.waited = loss, state.step, 0
            self.kept = _copy(self.edit)
            return
        state.waited += 1
        if patience and state.waited >= patience:
            state.stopped = f"no gain on the validation examples for {state.waited} epochs"

    def _diverge(self, reason: str) -> None:
        """End the training in the last good state."""
        self.state.stopped, self.state.diverged = f"{reason}; the last good state was kept", True
        _restore(self.edit, self.kept)

    def finish(self) -> Edit:
        """Return the trained edit in eval mode, with its record and history.

        With validation examples it has the best state. Without, the last one, once more tried on a
        batch: the last step can diverge too.
        """
        state, edit = self.state, self.edit
        edit.zero_grad(set_to_none=True)
        if self.held and not state.diverged:
            _restore(edit, self.kept)
        elif state.step and not state.diverged:
            with torch.no_grad():
                loss = float(self.task.loss(edit, self.items[: self.preset.batch_size]))
            if not math.isfinite(loss):
                self._diverge(f"the loss was {loss} after step {state.step}")
        seconds = time.perf_counter() - self.started
        edit.history = state.history
        best = bool(self.held)
        return edit.eval().with_record(
            TrainingRecord.of(
                self.data,
                self.task.template,
                self.task.verbalizer,
                preset=plain(self.preset),
                seed=self.seed,
                validation=len(self.held),
                steps=state.step,
                best_step=state.best_step if best else state.step,
                best_validation_loss=state.best_loss if math.isfinite(state.best_loss) else None,
                stopped=state.stopped or None,
                diverged=state.diverged,
                processes=self.team.size,
                seconds=round(seconds, 3),
                examples_per_second=round(state.examples / seconds, 2) if seconds else None,
            )
        )

    # ---- checkpoints ----

    def save(self, path: Path) -> None:
        """Write the whole state to a file, from which `resume` goes on to the same bytes."""
        tensors = {f"fixed/{name}": fixed for name, fixed in self.edit.named_buffers()}
        for name, p in self.edit.named_parameters():
            tensors[f"now/{name}"], tensors[f"best/{name}"] = p.detach(), self.kept[name]
            slots = self.optimiser.state.get(p, {})
            tensors |= {f"{slot}/{name}": value for slot, value in slots.items()}
        with atomic(path) as temporary:
            save_file(
                {k: v.contiguous().cpu() for k, v in tensors.items()},
                temporary,
                {"key": self.key, "state": json.dumps(plain(self.state))},
            )

    def resume(self, path: Path) -> None:
        """Take up the state of a file that `save` wrote.

        Raises:
            RunFolderError: the file is damaged, or of another training.
        """
        try:
            with safe_open(path, "pt") as f:
                about = f.metadata() or {}
                tensors = {name: f.get_tensor(name) for name in f.keys()}  # noqa: SIM118 - not a dict
        except (SafetensorError, OSError) as error:
            raise RunFolderError(
                f"{path}: the checkpoint is damaged ({error}); remove it to begin again"
            ) from None
        if about.get("key") != self.key:
            raise RunFolderError(
                f"{path}: the checkpoint is of another model, data, preset or seed; remove it, or give the same again"
            )
        device = self.task.model.device
        named = dict(self.edit.named_parameters())
        _restore(self.edit, {name: tensors[f"now/{name}"] for name in named})
        for name, fixed in self.edit.named_buffers():
            fixed.copy_(tensors[f"fixed/{name}"])
        self.kept = {name: tensors[f"best/{name}"].to(device) for name in named}
        for name, p in named.items():
            slots = {s: tensors.get(f"{s}/{name}") for s in ("step", "exp_avg", "exp_avg_sq")}
            if slots["step"] is not None:
                self.optimiser.state[p] = {
                    s: v if s == "step" else v.to(device) for s, v in slots.items() if v is not None
                }
        self.state = Progress(**json.loads(about["state"]))
        if self.state.batch == 0 and self.state.step and not self.held:
            self._untried = _copy(self.edit)
        self.started = time.perf_counter() - self.state.seconds


def batches(lengths: Sequence[int], size: int, seed: int, epoch: int) -> list[list[int]]:
    """Return the batches of an epoch as indices: shuffled, sorted by length within buckets, and the
    batches shuffled again."""
    rng = random.Random(f"{seed}/{epoch}")
    order = list(range(len(lengths)))
    rng.shuffle(order)
    groups = []
    for start in range(0, len(order), size * BUCKET):
        bucket = sorted(order[start : start + size * BUCKET], key=lambda i: lengths[i])
        groups += [bucket[i : i + size] for i in range(0, len(bucket), size)]
    rng.shuffle(groups)
    return groups


def schedule(preset: Preset, step: int, steps: int) -> float:
    """Return what the learning rates are multiplied by at a step, counted from 0."""
    warm = round(preset.warmup * steps)
    if step < warm:
        return (step + 1) / warm
    done = (step - warm) / max(1, steps - warm)
    return {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[
        preset.schedule
    ]


def _optimiser(edit: Edit) -> torch.optim.AdamW:
    """Return AdamW with the rate and decay of each part."""
    groups = [
        {
            "params": list(intervention.parameters()),
            "lr": part.lr,
            "rate": part.lr,
            "of_weights": of_weights(intervention),
            "weight_decay": part.weight_decay,
        }
        for intervention, part in zip(edit, edit.parts, strict=True)
    ]
    return torch.optim.AdamW(groups, foreach=None)


def _copy(edit: Edit) -> State:
    return {name: p.detach().clone() for name, p in edit.named_parameters()}


@torch.no_grad()
def _restore(edit: Edit, values: State) -> None:
    for name, p in edit.named_parameters():
        p.copy_(values[name])


@contextlib.contextmanager
def _seeded(seed: int, step: int, device: torch.device) -> Iterator[None]:
    """Make the global generators a function of seed and step inside, and leave them as they were
    outside.
    """
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed((seed * 1_000_003 + step) & (2**63 - 1))
        yield
