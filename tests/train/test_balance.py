"""Rates balanced by progress: the divergences by hand, the rule, and a training whose two parts end up moving the answers alike."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from support.tiny_models import tiny_folder
from support.training_cases import EIGHT, TEMPLATE

from mech_absa.edits import Edit, Part
from mech_absa.errors import ConfigError
from mech_absa.model import Model, load_model
from mech_absa.scoring import Stream, label_scores
from mech_absa.train import PrefixCache, Preset, fit
from mech_absa.train.balance import GAIN, LIMIT, divergences, factor, moved, ratio
from mech_absa.train.task import Task
from mech_absa.train.training import Progress

PARTS = (
    Part("lora", "L1.W_O", {"rank": 4, "dropout": 0.1}, 1e-2),
    Part("loreft", "L1.resid_post@query.last", {"rank": 4}, 1e-3),
)


@pytest.fixture(scope="module")
def llama() -> Model:
    return load_model(tiny_folder("llama"))


def train(model: Model, preset: Preset, **options) -> Edit:
    return fit(model, EIGHT, preset, template=TEMPLATE, **options)


def state(edit: Edit) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in edit.named_parameters()}


def loud(model: Model, seed: int) -> Edit:
    edit = Edit.fresh(model, PARTS, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in edit.parameters():
            p.add_(0.3 * torch.randn(p.shape, generator=generator))
    return edit


def logprobs(model: Model, edit: Edit, task: Task) -> torch.Tensor:
    prompts = [q.prompt for q in task.prepare(EIGHT[:5])]
    scores = label_scores(Stream(model, edit), prompts, task.continuations)
    return scores.double().log_softmax(-1)


def test_the_divergences_are_those_of_edits_with_one_part_moved(llama):
    """Scored by another path: edits put together from the old weights and the new representations, and the other way round."""
    task = Task(llama, "labels", TEMPLATE, None, PrefixCache(llama))
    old, new = loud(llama, 1), loud(llama, 2)
    kept, before = state(new), state(old)
    batches = [task.prepare(EIGHT[:2]), task.prepare(EIGHT[2:5])]
    got = divergences(task, new, batches, before)
    assert all(torch.equal(p, kept[name]) for name, p in new.named_parameters())
    want = []
    for part in (0, 1):
        mixed = copy.deepcopy(old)
        mixed.interventions[part].load_state_dict(new.interventions[part].state_dict())
        p, q = logprobs(llama, old, task), logprobs(llama, mixed, task)
        want.append(float((p.exp() * (p - q)).sum()))
    assert got.tolist() == pytest.approx(want, rel=1e-3) and min(want) > 1e-6
    assert want[0] != pytest.approx(want[1], rel=0.05)
    assert ratio(got) == pytest.approx(want[0] / want[1], rel=1e-3)
    assert ratio(divergences(task, new, batches, kept)) == 1.0, "nothing has moved"


def test_the_text_loss_is_measured_over_the_vocabulary(llama):
    """A mean over the tokens of each answer, as the loss weighs them."""
    task = Task(llama, "text", TEMPLATE, None, PrefixCache(llama))
    old, new = loud(llama, 1), loud(llama, 2)
    mixed = copy.deepcopy(old)
    mixed.interventions[0].load_state_dict(new.interventions[0].state_dict())
    items = task.prepare(EIGHT[:3])
    with torch.no_grad():
        (p, _, weight), (q, _, _) = (task.read(edit, items) for edit in (old, mixed))
    p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    assert p.shape[1] == llama.hooked.cfg.d_vocab and float(weight.sum()) == pytest.approx(3)
    want = sum(
        float(w) * float((a.exp() * (a - b)).sum()) for a, b, w in zip(p, q, weight, strict=True)
    )
    assert float(divergences(task, new, [items], state(old))[0]) == pytest.approx(want, rel=1e-6)


def test_the_rule_by_hand():
    """A kappa of e^2 takes 0.2 from the balance; the rates change in opposite ways, and their product does not."""
    balance = moved(0.1, math.e**2)
    assert balance == pytest.approx(0.1 - 2 * GAIN)
    assert factor(balance, weights=True) == pytest.approx(math.exp(-0.05))
    assert factor(balance, True) * factor(balance, False) == pytest.approx(1)
    assert moved(LIMIT, 1e-9) == LIMIT and moved(-LIMIT, 1e9) == -LIMIT
    assert factor(LIMIT, True) == pytest.approx(10)
    assert [moved(0.3, bad) for bad in (math.nan, math.inf, 0.0)] == [0.3] * 3
    assert ratio(torch.tensor([1e-20, 4e-12])) == pytest.approx(0.25), "the least counts as 1e-12"


@pytest.mark.slow
def test_unequal_parts_end_up_moving_the_answers_alike(llama):
    """kappa falls from over 30 to about 1, and the rates that were used are in the history."""
    preset = Preset("p", PARTS, epochs=9, batch_size=4, schedule="constant", balance=1)
    history = train(llama, preset).history
    far = [math.log(row["kappa"]) for row in history]
    assert sum(far[:4]) / 4 > 3.5 and abs(sum(far[-4:]) / 4) < 1.5
    assert history[0]["weights_times"] == history[0]["representations_times"] == 1.0
    balance = 0.0
    for row in history:
        assert row["weights_times"] == factor(balance, True)
        assert row["representations_times"] == factor(balance, False)
        balance = moved(balance, row["kappa"])
    assert balance < -1


def test_the_factors_are_those_of_the_optimiser(llama):
    """One step with a given balance is one step with rates multiplied by hand."""
    import mech_absa.train.training as training

    def run(parts, balance=0.0):
        task = Task(llama, "labels", TEMPLATE, None, PrefixCache(llama))
        one = training.Training(task, Preset("p", parts), EIGHT)
        one.state.balance = balance
        one.step(next(one.groups()))
        return state(one.edit)

    by_hand = tuple(
        Part(p.family, p.place, p.options, p.lr * factor(1.0, p.family == "lora")) for p in PARTS
    )
    got, want, plain = run(PARTS, 1.0), run(by_hand), run(PARTS)
    for name in got:
        torch.testing.assert_close(got[name], want[name], atol=1e-8, rtol=1e-6)
    assert not all(torch.equal(got[name], plain[name]) for name in got)


class Killed(Exception):
    pass


def test_a_balanced_training_resumes_to_the_same_bytes(llama, tmp_path):
    preset = Preset("p", PARTS, epochs=2, batch_size=4, balance=2)
    whole = train(llama, preset)
    assert ["kappa" in row for row in whole.history] == [True, False] * 2
    assert whole.history[2]["weights_times"] == factor(moved(0.0, whole.history[0]["kappa"]), True)

    def kill(progress: Progress) -> None:
        if progress.step == 3:
            raise Killed

    path = tmp_path / "state.safetensors"
    with pytest.raises(Killed):
        train(llama, preset, checkpoint=path, checkpoint_every=1, on_step=kill)
    again = train(llama, preset, checkpoint=path, checkpoint_every=1)
    plain = lambda e: [{k: v for k, v in row.items() if k != "seconds"} for row in e.history]  # noqa: E731
    assert plain(whole) == plain(again)
    assert all(torch.equal(p, state(again)[name]) for name, p in state(whole).items())


@pytest.mark.parametrize("parts", [PARTS[:1], PARTS[1:]])
def test_one_sort_of_parts_cannot_be_balanced(parts):
    with pytest.raises(ConfigError, match="balance is 1, and p has not both"):
        Preset("p", parts, balance=1)
    with pytest.raises(ConfigError, match="balance is -1; accepted: 0 or more"):
        Preset("p", PARTS, balance=-1)
