"""Label scores: a batch is its rows, the numbers are Hugging Face's, and an edit reaches its own rows and positions only."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import pytest
import torch
from support import fast
from support.tiny_models import tiny_folder
from transformers import AutoModelForCausalLM

from mech_absa.errors import DataError, EditError, ModelError, PromptError, PromptTooLong
from mech_absa.examples import Example, Examples, Polarity
from mech_absa.model import Model, load_model
from mech_absa.model.hooks import intervene, live_hooks
from mech_absa.prompts import Continuation, PromptTemplate, Tokens, Verbalizer
from mech_absa.scoring import (
    TOO_LONG,
    Stream,
    batch_scores,
    by_label,
    by_length,
    extend,
    fitting,
    gold_indices,
    label_scores,
    last_residual,
    question,
    room_for,
)
from mech_absa.sites import Site

POS, NEG, NEU = Polarity
EXAMPLES = (
    Example("great wine", "wine", POS, (6, 10)),
    Example(
        "The staff was rude and the food was great, but the wine list was not bad at all.",
        "staff",
        NEG,
        (4, 9),
    ),
    Example("food", "food", NEU, (0, 4)),
    Example("I loved the battery life.", "battery life", POS, (12, 24)),
    Example("never again", "service", NEG),
)
TEMPLATE = PromptTemplate("{sentence} Aspect: {aspect} . Sentiment:")
LABELS = Verbalizer.of(["positive", "not bad", "neutral"])
SINGLE = (Continuation((), ((0, (70,)), (1, (81,)), (2, (92,)))),)


@pytest.fixture(
    scope="module", params=fast(["gpt2", "llama", "bloom", "gemma2"], ["llama", "gemma2"])
)
def folder(request):
    return tiny_folder(request.param)


@pytest.fixture(scope="module")
def model(folder) -> Model:
    return load_model(folder, device="cpu", check=False)


@pytest.fixture(scope="module")
def prompts(model) -> list[Tokens]:
    return [question(model, e, TEMPLATE) for e in EXAMPLES]


def test_the_cases_are_worth_testing(model, prompts):
    assert len({p.lengths[0] for p in prompts}) == len(prompts), "padding is needed"
    lengths = [len(ids) for ids in LABELS.label_ids(model.tokenizer, TEMPLATE)]
    assert max(lengths) > 2 and len(set(lengths)) > 1, (
        "labels of several tokens, of different length"
    )


def test_scores_are_hugging_faces(folder, model, prompts):
    """Summed log-probability of the label's tokens after the prompt, row by row, label by label, nothing padded."""
    # Others leave out Gemma 2's soft cap in transformers 5.9.
    hf = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    expected = torch.zeros(len(prompts), 3)
    for row, prompt in enumerate(prompts):
        for column, label in enumerate(LABELS.label_ids(model.tokenizer, TEMPLATE)):
            ids = torch.tensor([[*prompt.ids[0].tolist(), *label]])
            with torch.inference_mode():
                logp = hf(ids).logits[0].log_softmax(-1)
            n = prompt.lengths[0]
            expected[row, column] = sum(float(logp[n + j - 1, t]) for j, t in enumerate(label))
    found = label_scores(model, prompts, LABELS.continuations(model.tokenizer, TEMPLATE))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert (found < 0).all()


@pytest.mark.parametrize("batch_size", fast([2, 3, 32], [3]))
def test_a_batch_is_its_rows(model, prompts, batch_size):
    continuations = LABELS.continuations(model.tokenizer, TEMPLATE)
    one_by_one = torch.cat([label_scores(model, [p], continuations) for p in prompts])
    torch.testing.assert_close(
        label_scores(model, prompts, continuations, batch_size=batch_size),
        one_by_one,
        rtol=5e-7,  # scores of -50: neighbouring float32 numbers are 4e-6 apart there
        atol=1e-5,
    )
    order = [3, 0, 4, 2, 1]
    shuffled = label_scores(
        model, [prompts[i] for i in order], continuations, batch_size=batch_size
    )
    torch.testing.assert_close(shuffled, one_by_one[order], rtol=5e-7, atol=1e-5)


def test_what_the_padding_holds_is_nobodys_business(model, prompts):
    """Other ids in the padding, same last residual stream at every real position."""
    zeros, sevens = Tokens.stack(prompts, pad_id=0), Tokens.stack(prompts, pad_id=77)
    assert not torch.equal(zeros.ids, sevens.ids)
    a, b = (last_residual(model, t) for t in (zeros, sevens))
    for row, n in enumerate(zeros.lengths):
        torch.testing.assert_close(a[row, :n], b[row, :n], rtol=0, atol=1e-5)


def test_bare_logits_are_the_columns(model, prompts):
    found = label_scores(model, prompts, SINGLE, need="labels")
    with torch.inference_mode():
        logits = torch.stack([model.hooked(p.ids)[0, -1] for p in prompts])
    torch.testing.assert_close(found, logits[:, [70, 81, 92]], rtol=0, atol=1e-5)
    torch.testing.assert_close(
        label_scores(model, prompts, SINGLE),
        logits.log_softmax(-1)[:, [70, 81, 92]],
        rtol=0,
        atol=1e-5,
    )


def test_labels_keep_their_columns(model, prompts):
    """A verbalizer in another order gives the same columns in that order, however the continuations group them."""
    words = ["positive", "not bad", "neutral"]
    straight = label_scores(model, prompts, LABELS.continuations(model.tokenizer, TEMPLATE))
    turned = label_scores(
        model, prompts, Verbalizer.of(words[::-1]).continuations(model.tokenizer, TEMPLATE)
    )
    torch.testing.assert_close(turned, straight.flip(1), rtol=0, atol=1e-5)


def test_longer_labels_need_the_normaliser_whatever_is_asked(model, prompts):
    continuations = [c for c in LABELS.continuations(model.tokenizer, TEMPLATE) if c.reads > 1]
    only = [
        Continuation(c.tokens, tuple((i, ids) for i, (_, ids) in enumerate(c.labels)))
        for c in continuations[:1]
    ]
    torch.testing.assert_close(
        label_scores(model, prompts, only, need="labels"),
        label_scores(model, prompts, only),
        rtol=0,
        atol=0,
    )


def test_extend(model, prompts):
    batch = Tokens.stack(prompts[:3])
    longer = extend(batch, Continuation((5, 6), ((0, (5, 6, 7)),)))
    assert longer.lengths == tuple(n + 2 for n in batch.lengths)
    for row, n in enumerate(batch.lengths):
        assert longer.ids[row, : n + 2].tolist() == [*batch.ids[row, :n].tolist(), 5, 6]
        assert longer.roles[row, : n + 2].tolist() == [*batch.roles[row, :n].tolist(), -1, -1]
    assert extend(batch, Continuation((), ((0, (5,)),))) is batch


# ---- an edit in force -------------------------------------------------------------------------------------------------------------


@dataclass
class Push:
    """Adds a vector to the stream after block 1 at the tokens of a role, in the prompts that are long enough."""

    at: str
    at_least: int = 0
    batches: list[Tokens] = field(default_factory=list)

    @contextmanager
    def applied(self, model: Model, tokens: Tokens) -> Iterator[None]:
        self.batches.append(tokens)
        prompt_lengths = [int((tokens.roles[i] >= 0).sum()) for i in range(len(tokens))]
        push = torch.zeros(*tokens.ids.shape, model.d_model)
        for row, n in enumerate(prompt_lengths):
            if n >= self.at_least:
                push[row, tokens.positions(self.at, row)] = vector(model)
        with intervene(model.hooked, {Site(1, "resid_post"): lambda x: x + push}):
            yield


def vector(model: Model) -> torch.Tensor:
    return 2.0 * torch.randn(model.d_model, generator=torch.Generator().manual_seed(5))


def test_an_edit_changes_its_rows_only(model, prompts):
    continuations = LABELS.continuations(model.tokenizer, TEMPLATE)
    longest = max(p.lengths[0] for p in prompts)
    nobody = Push("query.last", at_least=longest + 1)
    # TransformerLens grows its ALiBi table in the first pass, which rounds differently.
    label_scores(Stream(model, nobody), prompts, continuations)
    plain = label_scores(Stream(model, nobody), prompts, continuations)
    edited = label_scores(
        Stream(model, Push("query.last", at_least=longest)), prompts, continuations
    )
    mine = torch.tensor([p.lengths[0] == longest for p in prompts])
    assert mine.sum() == 1
    assert (edited[mine] - plain[mine]).abs().min() > 1e-3
    assert torch.equal(edited[~mine], plain[~mine])
    assert live_hooks(model.hooked) == []
    torch.testing.assert_close(
        label_scores(model, prompts, continuations), plain, rtol=1e-6, atol=0
    )  # nothing of it stays


@pytest.mark.parametrize("at", ["query.last", "answer", "aspect"])
def test_an_edit_is_the_same_as_doing_it_by_hand(model, prompts, at):
    """Position by position in the block-1 output of each prompt + label alone; the label's own tokens are never edited."""
    found = label_scores(
        Stream(model, Push(at)),
        prompts,
        LABELS.continuations(model.tokenizer, TEMPLATE),
        batch_size=3,
    )
    expected = torch.zeros_like(found)
    with torch.inference_mode():
        for row, prompt in enumerate(prompts):
            for column, label in enumerate(LABELS.label_ids(model.tokenizer, TEMPLATE)):
                ids = torch.tensor([[*prompt.ids[0].tolist(), *label]])
                middle = model.hooked(ids, stop_at_layer=2)
                middle[0, prompt.positions(at)] += vector(model)
                logp = model.hooked(middle, start_at_layer=2)[0].log_softmax(-1)
                expected[row, column] = sum(
                    float(logp[prompt.lengths[0] + j - 1, t]) for j, t in enumerate(label)
                )
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_an_edit_where_nobody_is_changes_nothing(model, prompts):
    """No example names its opinion. The edit is asked once for every pass, with the tokens of that pass."""
    continuations = LABELS.continuations(model.tokenizer, TEMPLATE)
    edit = Push("opinion")
    edited, plain = (
        label_scores(Stream(model, e), prompts, continuations, batch_size=n)
        for e, n in ((edit, 2), (None, 32))
    )
    torch.testing.assert_close(
        edited, plain, rtol=1e-6, atol=0
    )  # scores of up to 50: a few units in the last place
    assert len(edit.batches) == 3 * len(continuations)
    assert sum(len(t) for t in edit.batches) == len(prompts) * len(continuations)


@dataclass
class Poison(Push):
    """An edit that has diverged: it writes NaN into the prompts that are long enough."""

    @contextmanager
    def applied(self, model: Model, tokens: Tokens) -> Iterator[None]:
        longs = torch.tensor([int((r >= 0).sum()) >= self.at_least for r in tokens.roles])
        with intervene(
            model.hooked,
            {Site(1, "resid_post"): lambda x: torch.where(longs[:, None, None], torch.nan, x)},
        ):
            yield


def test_scores_that_are_not_numbers_are_refused(model, prompts, monkeypatch):
    """Exactly one prompt is poisoned, and the message counts it; asked to, the scores come anyway."""
    longest = max(p.lengths[0] for p in prompts)
    edit, name = Poison("answer", longest), re.escape(model.name)
    with pytest.raises(
        EditError,
        match=rf"^{name}: the scores of 1 of 5 prompts are not numbers; the edit diverged, or",
    ):
        label_scores(Stream(model, edit), prompts, SINGLE)
    scores = label_scores(Stream(model, edit), prompts, SINGLE, allow_nan=True)
    assert scores.isnan().all(1).tolist() == [p.lengths[0] == longest for p in prompts]
    monkeypatch.setattr(
        Stream,
        "last",
        lambda self, tokens, reads: torch.full((*reads.shape, model.d_model), torch.nan),
    )
    with pytest.raises(
        ModelError, match="of 5 of 5 prompts are not numbers; its weights hold some"
    ):
        label_scores(model, prompts, SINGLE)


def test_a_label_behind_a_prompt_that_fills_the_context(model, prompts, monkeypatch):
    continuations = LABELS.continuations(model.tokenizer, TEMPLATE)
    room, longest = room_for(continuations), max(p.lengths[0] for p in prompts)
    assert room == max(len(ids) for ids in LABELS.label_ids(model.tokenizer, TEMPLATE)) - 1 > 0
    monkeypatch.setattr(model.cfg, "n_ctx", longest + room)
    fits = label_scores(model, prompts, continuations)
    assert fits.isfinite().all()
    monkeypatch.setattr(model.cfg, "n_ctx", longest + room - 1)
    with pytest.raises(
        PromptError,
        match=rf"^a prompt of {longest} tokens and the labels behind it make {longest + room} "
        rf"tokens; {re.escape(model.name)} reads {longest + room - 1}$",
    ):
        label_scores(model, prompts, continuations)
    with pytest.raises(PromptError, match=rf"has {longest} tokens and {room} of the answer; "):
        question(model, EXAMPLES[1], TEMPLATE, room)
    assert question(model, EXAMPLES[1], TEMPLATE, room - 1).lengths == (longest,)


def test_columns_by_label():
    """Labels 2 and 0 are read by one continuation, 1 by another."""
    continuations = (
        Continuation((), ((2, (9,)), (0, (8,)))),
        Continuation((4,), ((1, (4, 7)),)),
    )
    parts = [torch.tensor([[2.0, 0.0], [12.0, 10.0]]), torch.tensor([[1.0], [11.0]])]
    assert by_label(parts, continuations).tolist() == [[0, 1, 2], [10, 11, 12]]
    turned = (Continuation((), ((1, (9,)), (0, (8,)))),)
    assert by_label([torch.tensor([[1.0, 0.0]])], turned).tolist() == [[0, 1]]


def test_batches_by_length():
    zeros = [torch.zeros(1, n, dtype=torch.long) for n in (5, 1, 4, 2, 3)]
    prompts = [Tokens(z, z, (z.shape[1],)) for z in zeros]
    assert list(by_length(prompts, 2)) == [[1, 3], [4, 2], [0]]
    assert list(by_length([], 2)) == []


def test_a_batch_is_differentiable(model, prompts):
    """The gradient of a label's score with respect to a bias of the stream, by finite differences."""
    push = torch.zeros(model.d_model, dtype=torch.float64, requires_grad=True)
    batch = Tokens.stack(prompts[:2])

    class Pushed(Stream):
        def last(self, tokens, reads):
            return super().last(tokens, reads) + push

    model64 = load_model(model.source, device="cpu", dtype="float64", check=False)
    score = batch_scores(Pushed(model64), batch, SINGLE)[:, 1].sum()
    (gradient,) = torch.autograd.grad(score, push)
    for i in (0, 7):
        with torch.no_grad():
            push[i] += 1e-5
            up = batch_scores(Pushed(model64), batch, SINGLE)[:, 1].sum()
            push[i] -= 1e-5
        assert float(gradient[i]) == pytest.approx(
            float(up - score.detach()) / 1e-5, rel=1e-3, abs=1e-6
        )


# ---- the question -----------------------------------------------------------------------------------------------------------------


def test_a_question_that_is_too_long(model, monkeypatch):
    monkeypatch.setattr(model.cfg, "n_ctx", 60)
    long = Example("bad " * 80 + "wine", "wine", NEG, (320, 324), id="file:7")
    with pytest.raises(
        PromptError, match=rf"^the prompt of 'file:7' has \d+ tokens; {model.name} reads 60$"
    ):
        question(model, long, TEMPLATE)


@pytest.mark.parametrize("answers", fast([False, True], [True]))
def test_examples_that_fit_are_those_whose_question_does(model, monkeypatch, answers):
    """Against one question after the other, for every size of context; two questions must both fit."""
    words = [Example("so " * n + "good wine", "wine", POS, id=f"w{n}") for n in range(0, 40, 3)]
    examples = Examples((*EXAMPLES, *words), "some", left_out={"conflict": 2})
    templates = [TEMPLATE, PromptTemplate("Of {sentence} we ask, what of the {aspect} ?")]
    ids = LABELS.label_ids(model.tokenizer, TEMPLATE)
    room = (
        max(map(len, ids)) if answers else room_for(LABELS.continuations(model.tokenizer, TEMPLATE))
    )
    examples = replace(
        examples, items=tuple(replace(e, id=f"e{i}") for i, e in enumerate(examples))
    )
    lengths = {e.id: max(question(model, e, t).length for t in templates) for e in examples}
    monkeypatch.setattr(model.cfg, "n_ctx", 10_000)
    assert fitting(model, examples, templates, LABELS, answers=answers) is examples
    for n_ctx in range(min(lengths.values()) + room, max(lengths.values()) + room + 1):
        monkeypatch.setattr(model.cfg, "n_ctx", n_ctx)
        kept = fitting(model, examples, templates, LABELS, answers=answers)
        expected = [e.id for e in examples if lengths[e.id] + room <= n_ctx]
        assert [e.id for e in kept] == expected
        lost = len(examples) - len(expected)
        assert kept.left_out == {"conflict": 2} | ({TOO_LONG: lost} if lost else {})
    monkeypatch.setattr(model.cfg, "n_ctx", min(lengths.values()) + room - 1)
    with pytest.raises(DataError, match=r"^some: no example is left: .* reads"):
        fitting(model, examples, templates, LABELS, answers=answers)
    with pytest.raises(PromptTooLong, match="the prompt of"):
        fitting(model, examples, templates, LABELS, answers=answers, strict=True)


def test_the_question_begins_as_the_model_does(model, prompts):
    for prompt in prompts:
        assert (prompt.ids[0, 0] == model.tokenizer.bos_token_id) == model.bos


def test_gold():
    assert gold_indices(EXAMPLES, LABELS).tolist() == [0, 1, 2, 0, 1]
    assert gold_indices(
        EXAMPLES[:2], Verbalizer.of({"negative": "bad", "positive": "good"})
    ).tolist() == [1, 0]
    with pytest.raises(PromptError, match="no label for neutral"):
        gold_indices(EXAMPLES, Verbalizer.of({"negative": "bad", "positive": "good"}))
