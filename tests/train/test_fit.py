"""Training: it learns, it learns the planted answer, it repeats itself to the byte, and nothing below the edit runs twice."""

from __future__ import annotations

import inspect
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support import fast
from support.planted import WORDS, planted_absa
from support.tiny_models import tiny_folder
from support.training_cases import EIGHT, TEMPLATE
from transformers import AutoModelForCausalLM

from mech_absa.edits import LLAMA_2_7B, Edit, Part, Shape, count, load_edit, save_edit
from mech_absa.edits.lowrank import TinyLoRA
from mech_absa.errors import ConfigError, EditError, RunFolderError
from mech_absa.examples import Example, Polarity, split_by_sentence
from mech_absa.metrics import METRICS
from mech_absa.model import Model, load_model, weights_hash
from mech_absa.model.hooks import capture, live_hooks
from mech_absa.prompts import Tokens, Verbalizer
from mech_absa.scoring import Stream, gold_indices, label_scores, question
from mech_absa.sites import ROLES, Site
from mech_absa.train import PrefixCache, Preset, fit, presets
from mech_absa.train.task import Task
from mech_absa.train.training import batches, schedule

BOTH = (
    Part("lora", "L1.W_O", {"rank": 4, "dropout": 0.1}, 1e-2),
    Part("loreft", "L1.resid_post@query.last", {"rank": 4}, 1e-2),
)


@pytest.fixture(scope="module")
def llama() -> Model:
    return load_model(tiny_folder("llama"))


def train(model: Model, preset: Preset, examples=EIGHT, **options) -> Edit:
    return fit(model, examples, preset, template=TEMPLATE, **options)


def same(a: Edit, b: Edit) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


# ---- sizes ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, size, percent",
    [
        ("paper", 196_608 + 196_632, 0.006), ("loreft", 2_097_408, 0.031), ("loreft_range", 393_264, 0.006), ("lora", 56_098_816, 0.826),
        ("dora", 56_975_360, 0.838), ("prefix", 2_621_440, 0.039), ("adapter", 134_217_728, 1.953), ("lora_range", 8_765_440, 0.130),
    ],
)  # fmt: skip
def test_the_sizes_of_table_2(name, size, percent):
    made = presets.TABLE_2[name](LLAMA_2_7B)
    assert count(made.parts, LLAMA_2_7B) == size
    assert 100 * size / (LLAMA_2_7B.n_parameters + size) == pytest.approx(percent, abs=6e-4)


def test_the_halves_of_the_paper_and_its_rates():
    made = presets.paper(presets.range_sites("10-15"))
    halves = [[p for p in made.parts if p.family == family] for family in ("lora", "loreft")]
    assert [count(half, LLAMA_2_7B) for half in halves] == [196_608, 196_632]
    assert [{p.lr for p in half} for half in halves] == [{3e-4}, {1e-5}]
    assert {p.place for p in halves[1]} == {
        f"L{layer}.resid_post@query.last" for layer in range(10, 16)
    }
    code = presets.authors_code("L10.resid_post@query.last")
    assert {p.lr for p in code.parts} == {2e-5} and code.parts[0].options == {
        "rank": 4,
        "alpha": 8.0,
        "rank_stabilised": True,
        "dropout": 0.05,
    }


# ---- learning ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss, bound, steps", [("labels", 1e-3, 20), ("text", 0.3, 30)])
@pytest.mark.slow
def test_eight_examples_can_be_learnt_by_heart(llama, loss, bound, steps):
    """Over the vocabulary the frozen unembedding sets a floor of about 0.1: in 32 dimensions its 360 random columns overlap."""
    parts = tuple(
        Part("lora", f"L{layer}.{m}", {"rank": 16, "alpha": 32.0}, 1e-2)
        for layer in (1, 2)
        for m in ("W_Q", "W_V", "W_O", "W_in", "W_out")
    )
    before = weights_hash(llama.hooked)
    edit = train(
        llama, Preset("heart", parts, epochs=steps, batch_size=8, loss=loss, schedule="cosine")
    )
    assert edit.history[-1]["loss"] < bound < 2 < edit.history[0]["loss"]
    scores = label_scores(
        Stream(llama, edit),
        [question(llama, e, TEMPLATE) for e in EIGHT],
        Verbalizer().continuations(llama.tokenizer, TEMPLATE),
    )
    assert scores.argmax(1).tolist() == gold_indices(EIGHT, Verbalizer()).tolist()
    assert weights_hash(llama.hooked) == before and not live_hooks(llama.hooked)


class Bench:
    """The planted model behind the face that training needs: prompts are rows of its own tokens."""

    def __init__(self, at: str):
        self.planted = planted_absa()
        self.model = Model(self.planted.model, None, "planted")
        self.roles = torch.zeros(1, self.planted.model.cfg.n_ctx, dtype=torch.long)
        self.roles[0, self.planted.positions[at]] = ROLES.index("query.last")
        self.roles[0, -1] = ROLES.index("answer") if at != "last" else ROLES.index("query.last")

    def flips(self, edit: Edit, clean: torch.Tensor) -> float:
        """Share of clean prompts, all answered `positive`, that the edit turns to `negative`."""
        tokens = Tokens(clean, self.roles.expand(len(clean), -1), (clean.shape[1],) * len(clean))
        with edit.applied(self.model, tokens), torch.no_grad():
            logits = self.model.forward(tokens.ids)[:, -1]
        return float(
            (logits[:, WORDS.index("negative")] > logits[:, WORDS.index("positive")])
            .double()
            .mean()
        )

    def train(self, layer: int, steps: int) -> Edit:
        """The smallest change of the state at the token that turns `positive` into `negative`: a rank-1 edit, and a charge on its change."""
        site = Site(layer, "resid_post", None, "query.last")
        clean, _ = self.planted.prompts(16)
        tokens = Tokens(clean, self.roles.expand(16, -1), (clean.shape[1],) * 16)
        with capture(self.model.hooked, [site.everywhere]) as seen, torch.no_grad():
            self.model.forward(clean)
        h = seen[site.everywhere][:, tokens.positions("query.last")[0]]
        edit = Edit.fresh(self.model, [Part("loreft", str(site), {"rank": 1})], 0)
        (reft,) = edit
        optimiser = torch.optim.AdamW(edit.parameters(), lr=2e-2, weight_decay=0)
        for _ in range(steps):
            with edit.applied(self.model, tokens):
                answer = self.model.forward(tokens.ids)[:, -1]
            loss = torch.nn.functional.cross_entropy(
                answer, torch.full((16,), WORDS.index("negative"))
            )
            loss = loss + 0.5 * (reft(h) - h).pow(2).sum(-1).mean()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            edit.settle()
        return edit


def test_a_rank_one_edit_finds_the_planted_axis():
    """At the aspect, after the head that carries polarity there, it writes along the one axis that the circuit reads."""
    bench = Bench("aspect")
    edit = bench.train(0, steps=200)
    axis = torch.zeros(bench.model.d_model)
    axis[bench.model.cfg.n_ctx + 1] = 1  # slot 1: written by L0H0 at the aspect, read by L1H1
    (reft,) = edit
    assert abs(float(torch.nn.functional.cosine_similarity(reft.R[0].detach(), axis, dim=0))) > 0.99
    held_out, _ = bench.planted.prompts(64, seed=9)
    assert bench.flips(edit, held_out) == 1.0


@pytest.mark.parametrize("at, layer", [("distractor", 0), ("opinion", 1)])
def test_where_the_circuit_does_not_pass_nothing_is_learnt(at, layer):
    """The same edit at a token that does not matter, and at the opinion after it was read."""
    bench = Bench(at)
    edit = bench.train(layer, steps=60)
    held_out, _ = bench.planted.prompts(64, seed=9)
    assert bench.flips(edit, held_out) == 0.0


def test_the_loss_is_the_answers_alone(llama):
    """`text` by hand from all logits of Hugging Face; `labels` from the label scores; the mean over a batch whatever its padding."""
    hf = AutoModelForCausalLM.from_pretrained(tiny_folder("llama")).eval()
    edit = Edit.fresh(llama, [Part("lora", "L1.W_O")])  # changes nothing yet
    eos = llama.tokenizer.eos_token_id
    text, labels = (
        Task(llama, kind, TEMPLATE, None, PrefixCache(llama)) for kind in ("text", "labels")
    )
    want_text, want_labels = [], []
    for e in EIGHT[:3]:
        q = text.prepare([e])[0]
        ids = torch.cat([q.prompt.ids[0], torch.tensor(q.answer)])
        with torch.no_grad():
            logp = hf(ids[None]).logits[0].log_softmax(-1)
        n = q.prompt.lengths[0]
        assert q.answer[-1] == eos
        want_text.append(
            -sum(float(logp[n - 1 + j, t]) for j, t in enumerate(q.answer)) / len(q.answer)
        )
        scores = label_scores(llama, [q.prompt], labels.continuations).double()
        want_labels.append(
            -float(METRICS["logprob"](scores.log_softmax(-1), torch.tensor([q.gold])))
        )
    assert text.loss(edit, text.prepare(EIGHT[:3])).item() == pytest.approx(
        sum(want_text), rel=1e-4
    )
    assert labels.loss(edit, labels.prepare(EIGHT[:3])).item() == pytest.approx(
        sum(want_labels), rel=1e-4
    )


def test_accumulated_steps_are_those_of_the_large_batch(llama):
    preset = Preset(
        "p", tuple(Part(p.family, p.place, {"rank": 4}, p.lr) for p in BOTH), epochs=1, batch_size=8
    )
    large = train(llama, preset)
    small = train(llama, preset.but(batch_size=2, accumulate=4))
    assert large.record.steps == small.record.steps == 1
    for a, b in zip(large.parameters(), small.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


# ---- the same again ------------------------------------------------------------------------------------------------------------


def test_same_seed_same_bytes_and_the_world_outside_untouched(llama):
    preset = Preset("p", BOTH, epochs=2, batch_size=3)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    a, b, c = (train(llama, preset, seed=s) for s in (1, 1, 2))
    assert same(a, b) and not same(a, c)
    assert [r["loss"] for r in a.history] == [r["loss"] for r in b.history]
    assert torch.equal(state, torch.get_rng_state())


class Killed(Exception):
    pass


@pytest.mark.parametrize("after", fast([1, 2, 3], [2]))
def test_a_killed_training_resumes_to_the_same_bytes(llama, tmp_path, after):
    """Killed in the middle of the first epoch, at its end, and in the second; with dropout, two groups, validation and the best epoch kept."""
    preset = Preset("p", BOTH, epochs=3, batch_size=3, warmup=0.2)
    options = dict(validation=EIGHT[6:], seed=3, checkpoint_every=1)
    whole = train(llama, preset, EIGHT[:6], **options)

    def kill(state):
        if state.step == after + 1:
            raise Killed

    state = tmp_path / "state.safetensors"
    with pytest.raises(Killed):
        train(llama, preset, EIGHT[:6], checkpoint=state, on_step=kill, **options)
    assert state.exists()
    again = train(llama, preset, EIGHT[:6], checkpoint=state, **options)
    assert same(whole, again)
    plain = lambda e: [{k: v for k, v in row.items() if k != "seconds"} for row in e.history]  # noqa: E731
    assert plain(whole) == plain(again)
    with pytest.raises(RunFolderError, match="another model, data, preset or seed"):
        train(llama, preset, EIGHT[:6], checkpoint=state, **options | {"seed": 4})
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(RunFolderError, match="damaged"):
        train(llama, preset, EIGHT[:6], checkpoint=state, **options)


def test_what_a_part_holds_fixed_is_resumed_too(llama, tmp_path, monkeypatch):
    """TinyLoRA's factors come from the checkpoint, not from the SVD of the machine that resumes; two parts share v."""
    parts = (
        Part("tinylora", "L1.W_O", {}, 5e-2),
        Part("tinylora", "L2.W_in", {"shared_with": "L1.W_O"}, 5e-2),
    )
    preset = Preset("p", parts, epochs=3, batch_size=4)
    whole = train(llama, preset)

    def kill(state):
        if state.step == 3:
            raise Killed

    checkpoint = tmp_path / "state.safetensors"
    with pytest.raises(Killed):
        train(llama, preset, checkpoint=checkpoint, on_step=kill, checkpoint_every=1)
    reset = TinyLoRA.reset

    def elsewhere(self, *args):
        reset(self, *args)
        self.V[:, 0].neg_()

    monkeypatch.setattr(TinyLoRA, "reset", elsewhere)
    again = train(llama, preset, checkpoint=checkpoint, checkpoint_every=1)
    assert same(whole, again) and whole.n_parameters == 4
    assert whole.state_dict().keys() == again.state_dict().keys()
    assert all(torch.equal(v, again.state_dict()[n]) for n, v in whole.state_dict().items())
    assert not same(whole, train(llama, preset)), "the other factors learn something else"


def overlap(edit: Edit) -> float:
    """The largest share of a steerer's reading that lies in what the LoRA of its layer's W_out writes."""
    shares = []
    for steerer in (i for i in edit if i.family == "post_block"):
        layer = steerer.place.layer
        (lora,) = (i for i in edit if str(i.place) == f"L{layer}.W_out")
        V, _ = torch.linalg.qr(lora.B.detach().double().T)
        W = steerer.W_down.detach().double()
        assert lora.B.any() and steerer.W_up.any()
        shares.append(float((V.T @ W).norm() / W.norm()))
    return max(shares)


def test_the_joint_pair_stays_orthogonal_while_it_learns(llama, tmp_path):
    """V^T W_down = 0 after one step and after more, killed and loaded too; without the coupling it is not."""
    made = presets.bundled("L1.resid_post", "joint_orthogonal", shape=Shape.of(llama))
    preset = made.but(epochs=2, batch_size=4)
    free = preset.but(
        parts=tuple(
            replace(p, options={"rank": 4}) if p.family == "post_block" else p for p in preset.parts
        )
    )
    assert [p.family for p in preset.parts] == ["lora"] * 7 + ["post_block"]
    assert count(preset.parts, Shape.of(llama)) == count(free.parts, Shape.of(llama))
    one = train(llama, preset.but(epochs=1, batch_size=8, warmup=0.0))
    assert one.record.steps == 1 and overlap(one) < 1e-6

    def kill(state):
        if state.step == 3:
            raise Killed

    whole, checkpoint = train(llama, preset), tmp_path / "state.safetensors"
    with pytest.raises(Killed):
        train(llama, preset, checkpoint=checkpoint, on_step=kill, checkpoint_every=1)
    again = train(llama, preset, checkpoint=checkpoint, checkpoint_every=1)
    assert same(whole, again) and overlap(whole) < 1e-6 < 0.05 < overlap(train(llama, free))
    back = load_edit(save_edit(whole, tmp_path / "edit"), llama)
    assert same(whole, back) and back.parts == whole.parts
    with torch.no_grad():
        for p in back.parameters():
            p += 0.1
    assert overlap(back) > 0.05
    back.settle()
    assert overlap(back) < 1e-6


# ---- the frozen prefix ---------------------------------------------------------------------------------------------------------


def test_below_the_first_edited_layer_nothing_runs_twice(llama):
    cache = PrefixCache(llama)
    preset = Preset("p", (Part("lora", "L2.W_O", {}, 1e-2),), epochs=3, batch_size=4)
    task = Task(llama, "labels", TEMPLATE, None, PrefixCache(llama))
    tokens = sum(run.lengths[0] for q in task.prepare(EIGHT) for run in q.runs)
    a = train(llama, preset, cache=cache)
    assert cache.computed == 2 * tokens  # two blocks, every prompt once
    train(llama, preset, cache=cache, seed=1)
    train(
        llama,
        Preset("q", (Part("loreft", "L2.resid_post@query.last", {}, 1e-2),), batch_size=4),
        cache=cache,
    )
    assert cache.computed == 2 * tokens
    train(llama, Preset("r", (Part("lora", "L1.W_O", {}, 1e-2),), batch_size=4), cache=cache)
    assert cache.computed == 3 * tokens
    # Without room nothing is kept, more is run, and the result is that of the kept streams up to rounding.
    none = PrefixCache(llama, budget=0)
    b = train(llama, preset, cache=none)
    # Three epochs, and the first batch once more: the last step is tried.
    first = sum(run.lengths[0] for q in task.prepare(EIGHT[:4]) for run in q.runs)
    assert none.used == 0 and none.computed == 2 * (3 * tokens + first)
    for x, y in zip(a.parameters(), b.parameters(), strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-4)


def test_a_kept_stream_is_the_models_own(llama):
    cache, prompts = PrefixCache(llama), [question(llama, e, TEMPLATE) for e in EIGHT]
    cache.fill(2, prompts)
    assert cache.used == sum(p.lengths[0] for p in prompts) * llama.d_model * 4
    batch = Tokens.stack(prompts[:3])
    with capture(llama.hooked, [Site(2, "resid_pre")]) as seen, torch.no_grad():
        llama.forward(batch.ids)
    kept = cache.get(2, batch)
    for i, n in enumerate(batch.lengths):
        torch.testing.assert_close(
            kept[i, :n], seen[Site(2, "resid_pre")][i, :n], atol=1e-5, rtol=1e-5
        )
        assert not kept[i, n:].any()


# ---- order, rates, stopping ----------------------------------------------------------------------------------------------------


def test_every_example_once_an_epoch_and_like_lengths_together():
    lengths = [(7 * i) % 50 for i in range(203)]
    a, b = batches(lengths, 4, 0, 0), batches(lengths, 4, 0, 1)
    assert (
        sorted(i for batch in a for i in batch)
        == list(range(203))
        == sorted(i for batch in b for i in batch)
    )
    assert a == batches(lengths, 4, 0, 0) != b and {len(batch) for batch in a} <= {4, 3}
    spread = lambda made: sum(max(lengths[i] for i in x) - min(lengths[i] for i in x) for x in made)  # noqa: E731
    assert spread(a) < 0.2 * spread([list(range(i, min(i + 4, 203))) for i in range(0, 203, 4)])


def test_schedules_at_their_known_points():
    def of(name, step, warmup=0.0):
        return schedule(Preset("p", BOTH, schedule=name, warmup=warmup), step, 100)

    assert [of("linear", s) for s in (0, 50, 75)] == [1.0, 0.5, 0.25]
    assert [of("cosine", s) for s in (0, 50)] == pytest.approx([1.0, 0.5]) and of(
        "cosine", 99
    ) < 0.001
    assert of("constant", 99) == 1.0
    assert [of("linear", s, 0.1) for s in (0, 4, 9, 10, 55)] == pytest.approx(
        [0.1, 0.5, 1.0, 1.0, 0.5]
    )


def test_the_best_epoch_is_kept_and_patience_ends(llama):
    """With rates far too high the first epoch is the best one: it is what is returned, and training stops two epochs later."""
    preset = Preset(
        "wild",
        (Part("lora", "L2.W_out", {"rank": 8}, 0.5),),
        epochs=12,
        batch_size=4,
        schedule="constant",
        clip=0.0,
        patience=2,
    )
    edit = train(llama, preset, EIGHT[:6], validation=EIGHT[6:])
    rows = [r for r in edit.history if "validation_loss" in r]
    losses = [r["validation_loss"] for r in rows]
    best = losses.index(min(losses))
    assert len(rows) == best + 3 < 12 and "no gain" in edit.record.stopped
    assert (
        edit.record.best_validation_loss == min(losses)
        and edit.record.best_step == rows[best]["step"]
    )
    task = Task(llama, "labels", TEMPLATE, None, PrefixCache(llama))
    assert task.quality(edit, task.prepare(EIGHT[6:]), 8)[0] == pytest.approx(min(losses), rel=1e-4)


def test_a_loss_that_is_no_number_stops_and_keeps_the_last_good_state(llama):
    parts = tuple(
        Part("red", f"L{layer}.resid_post", {}, 1e37) for layer in range(3)
    )  # 1e37 times 1e37 is infinite, and that over itself is nothing
    edit = train(
        llama, Preset("broken", parts, epochs=9, batch_size=8, clip=0.0, schedule="constant")
    )
    assert edit.record.diverged and edit.record.steps < 9
    assert all(bool(torch.isfinite(p).all()) for p in edit.parameters())
    assert all(math.isfinite(row["loss"]) for row in edit.history)


def test_the_last_step_can_diverge_too(llama):
    """One step, of a rate that is a number: no later loss shows that what it left is none."""
    parts = tuple(Part("red", f"L{layer}.resid_post", {}, 1e37) for layer in range(3))
    preset = Preset("broken", parts, batch_size=8, clip=0.0, schedule="constant")
    edit = train(llama, preset)
    assert edit.record.diverged and edit.record.steps == 1
    assert "after step 1; the last good state was kept" in edit.record.stopped
    assert same(edit, Edit.fresh(llama, parts)), "the last good state is the one before the step"
    # Two epochs of one step each: the end of the first one is not good either.
    assert same(train(llama, preset.but(epochs=2)), Edit.fresh(llama, parts))
    edit = train(llama, preset, EIGHT[:6], validation=EIGHT[6:])
    assert edit.record.diverged and "on the validation examples was nan" in edit.record.stopped
    assert edit.record.best_validation_loss is None


def test_a_split_that_takes_all_of_a_class_warns(llama):
    """Two neutral examples in one sentence: the share that takes it leaves none to learn from."""
    neutral = [Example("the screen is fine", a, Polarity.NEUTRAL, None) for a in ("screen", "the")]
    rows = [*(e for e in EIGHT if e.polarity is not Polarity.NEUTRAL), *neutral]
    lost = next(
        s for s in range(50)
        if {e.polarity for e in split_by_sentence(rows, 0.2, s)[1]} == {Polarity.NEUTRAL}
    )  # fmt: skip
    preset = Preset("p", (Part("bitfit", "L2.W_O"),), epochs=0)
    with pytest.warns(UserWarning, match="took all neutral examples"):
        edit = train(llama, preset, rows, validation=0.2, seed=lost)
    (note,) = edit.record.warnings
    assert note.startswith("the validation split took all neutral examples (2)")


@pytest.mark.slow
def test_bfloat16_trains_a_float32_edit():
    model = load_model(tiny_folder("llama"), dtype="bfloat16")
    edit = train(model, Preset("p", BOTH, epochs=6, batch_size=4))
    assert {p.dtype for p in edit.parameters()} == {torch.float32}
    assert edit.history[-1]["loss"] < edit.history[0]["loss"]
    (R,) = (i.R for i in edit if i.family == "loreft")
    assert torch.allclose(R @ R.T, torch.eye(4), atol=1e-6)


@pytest.mark.parametrize(
    "examples, preset, options, words",
    [
        ([], Preset("p", BOTH), {}, "no examples to train on"),
        (
            EIGHT,
            Preset("p", (Part("loreft", "L1.resid_post@opinion"),)),
            {},
            "none of the 8 training prompts has a token at opinion",
        ),
        (EIGHT, Preset("p", (Part("loreft", "L1.resid_post@300"),)), {}, "has a token at 300"),
        (EIGHT, Preset("p", BOTH), {"validation": 1.5}, "between 0 and 1"),
    ],
)
def test_what_cannot_be_trained_is_refused(llama, examples, preset, options, words):
    with pytest.raises(ConfigError, match=words):
        train(llama, preset, examples, **options)


@pytest.mark.parametrize(
    "examples, preset, options, words",
    [
        (EIGHT, "both", {}, r"got 'both'; accepted: a Preset"),
        (
            "builtin:restaurant/train",
            Preset("p", BOTH),
            {},
            "train is 'builtin:rest.*examples of load_examples are needed",
        ),
        (["a review"], Preset("p", BOTH), {}, "examples of load_examples are needed"),
        (
            EIGHT,
            Preset("p", BOTH),
            {"validation": "0.1"},
            r"validation is '0.1' \(str\); accepted: a share",
        ),
        (EIGHT, Preset("p", BOTH), {"validation": True}, "accepted: a share"),
        (EIGHT, Preset("p", BOTH), {"seed": 1.5}, "seed is 1.5"),
    ],
)
def test_a_wrong_type_is_one_sentence(llama, examples, preset, options, words):
    """Without the type checks that tests run under, as a user has it."""
    with pytest.raises(ConfigError, match=words) as caught:
        inspect.unwrap(fit)(llama, examples, preset, template=TEMPLATE, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"epochs": -1}, "epochs is -1"),
        ({"accumulate": 0}, "accumulate is 0"),
        ({"warmup": 2.0}, "warmup"),
        ({"parts": (Part("lora", "L1.W_O", {}, -1.0),)}, "learning rate of lora is -1.0"),
        ({"parts": (Part("lora", "L1.W_O", {}, math.nan),)}, "learning rate of lora is nan"),
        ({"parts": (Part("lora", "L1.W_O", {}, math.inf),)}, "learning rate of lora is inf"),
        ({"parts": (Part("lora", "L1.W_O", {}, 1.0, math.inf),)}, "weight decay of lora is inf"),
    ],
)
def test_presets_refuse_what_they_cannot_mean(changes, words):
    with pytest.raises(ConfigError, match=words):
        Preset(**{"name": "p", "parts": BOTH} | changes)


def test_positions_and_files_name_sites(tmp_path: Path):
    assert presets.read_sites("L1.attn_out@query.last L2.head3") == [
        Site(1, "attn_out", None, "query.last"),
        Site(2, "head", 3),
    ]
    (tmp_path / "sites.json").write_text('{"sites": ["L4.resid_post@answer"], "rule": "x"}')
    assert presets.read_sites(tmp_path / "sites.json") == [Site(4, "resid_post", None, "answer")]
    made = presets.bundled(["L1.mlp_out@-1", "L1.attn_out"], "both")
    assert [p.place for p in made.parts] == [
        "L1.W_O",
        "L1.resid_post@-1",
        "L1.resid_post@query.last",
    ]


def test_presets_of_2026_act_in_the_layers_of_the_sites_on_every_token(llama):
    """Whatever kind and position the sites have; counted by hand for d = 32."""
    shape, sites = Shape.of(llama), presets.read_sites("L1.mlp_out@-1 L2.attn_out@query.last")
    steered = presets.named("post_block", sites, shape, rank=3)
    assert [p.place for p in steered.parts] == ["L1.resid_post", "L2.resid_post"]
    assert count(steered.parts, shape) == 2 * 2 * 3 * 32
    joint = presets.named("joint_orthogonal", sites, shape, rank=3)
    assert joint.parts[:14] == presets.parts(
        "lora", presets.matrices([1, 2], *shape.matrices), 4e-3, rank=3, alpha=6.0
    )
    assert [(p.place, p.options) for p in joint.parts[14:]] == [
        (f"L{layer}.resid_post", {"rank": 3, "orthogonal_to": f"L{layer}.W_out"})
        for layer in (1, 2)
    ]
    tiny = presets.named("tinylora", sites, shape, rank=3)
    assert [p.place for p in tiny.parts] == presets.matrices([1, 2], *shape.matrices)
    assert count(tiny.parts, shape) == 2 * 7 * 3


def test_the_scores_of_an_edit_that_diverged_are_refused(llama):
    """The argmax of NaN is label 0, which once counted as an answer."""
    preset = Preset("p", (Part("red", "L1.resid_post@query.last", {}, 1e-3),), epochs=1)
    edit = train(llama, preset)
    task = Task(llama, "labels", TEMPLATE, None, PrefixCache(llama))
    questions = task.prepare(EIGHT)
    assert task.scores(edit, questions).isfinite().all()
    with torch.no_grad():
        next(edit.parameters()).fill_(torch.nan)
    with pytest.raises(EditError, match="the scores of 8 of 8 prompts are not numbers"):
        task.scores(edit, questions)
    loss, _ = task.quality(edit, questions, 8)
    assert math.isnan(loss), "training notices by itself"
