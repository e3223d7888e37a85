"""Prompt pairs of one's own: roles by hand, effects as TransformerLens has them, one sentence for each mistake."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from support import fast
from support.jobs import EXAMPLES, tiny
from support.tiny_models import tiny_folder
from transformer_lens import patching as peer

import mech_absa as ma
from mech_absa.commands import patch as command
from mech_absa.errors import (
    AlignmentError,
    ConfigError,
    DataError,
    MechAbsaError,
    PromptError,
    PromptTooLong,
    SiteError,
)
from mech_absa.evaluate.faithfulness import faithfulness
from mech_absa.model.hooks import capture, intervene
from mech_absa.patch.effects import Effects
from mech_absa.sites import Site, in_reading_order

CLEAN = "the food was great but the staff was"
CORRUPTED = "the staff was great but the food was"


def pair(**changes) -> ma.PromptPair:
    given = {
        "clean": CLEAN,
        "corrupted": CORRUPTED,
        "answer": " staff",
        "foil": " the",
        "spans": {"first": "food", "second": "staff"},
    }
    return ma.PromptPair(**given | changes)


PAIRS = (
    pair(id="a"),
    pair(id="b", answer=" was", foil=" staff"),
    pair(id="c", clean=CORRUPTED, corrupted=CLEAN, spans={"first": (4, 9), "second": "food"}),
)


def made(*pairs: ma.PromptPair, **options) -> ma.Pairs:
    return ma.prompt_pairs(tiny("gpt2"), pairs or PAIRS, **{"keep": "all"} | options)


def test_named_spans_are_the_roles_of_the_map():
    (own,) = made(PAIRS[0])
    texts = [tiny("gpt2").tokenizer.decode([i]) for i in own.clean.token_ids]
    roles = own.clean.role_names
    assert [r for r in roles if r.startswith("first")] == ["first.first", "first.last"]
    assert "".join(t for t, r in zip(texts, roles, strict=True) if r.startswith("first")) == " food"
    assert (
        "".join(t for t, r in zip(texts, roles, strict=True) if r.startswith("second")) == " staff"
    )
    assert roles[-1] == "answer"
    assert (
        own.corrupted.role_names == roles and own.corrupted.ids.tolist() != own.clean.ids.tolist()
    )
    assert in_reading_order(set(roles))[0] == "template"
    frame = ma.trace(tiny("gpt2"), made(), ["mlp_out"], by="role", layers=[0]).frame
    assert {"first.last", "second.last"} <= set(frame["role"])


def test_a_span_of_several_tokens_has_a_first_a_middle_and_a_last_one():
    (own,) = made(pair(spans={"subject": "food was great"}))
    roles = own.clean.role_names
    (first,), (last,) = own.clean.positions("subject.first"), own.clean.positions("subject.last")
    assert set(roles[first + 1 : last]) == {"subject.middle"}
    assert own.clean.positions("subject") == list(range(first, last + 1))


@pytest.mark.parametrize("metric", fast(["logit_diff", "prob", "prob_label"], ["logit_diff"]))
def test_effects_are_those_of_transformer_lens(metric):
    """Its own loop, one pair at a time, with the metric written out; ours in one batch of three with other answers each."""
    model, pairs = tiny("gpt2"), made()
    effects = ma.trace(model, pairs, ["resid_pre"], metric=metric)

    def value(logits: torch.Tensor, own: ma.Pair) -> torch.Tensor:
        answer, foil = own.answers
        last = logits[0, -1]
        if metric == "logit_diff":
            return last[answer] - last[foil]
        if metric == "prob":
            return last.softmax(-1)[answer]
        return last[[answer, foil]].softmax(-1)[0]

    for own in pairs:
        _, cache = model.hooked.run_with_cache(own.clean.ids)
        base = value(model.hooked(own.corrupted.ids), own)
        theirs = peer.get_act_patch_resid_pre(
            model.hooked, own.corrupted.ids, cache, lambda logits, own=own: value(logits, own)
        )
        mine = effects.frame[effects.frame["example_id"] == own.id]
        grid = mine.pivot(index="layer", columns="position", values="effect").to_numpy()
        np.testing.assert_allclose(grid, (theirs - base).numpy(), atol=1e-6)
        assert abs(grid).max() > 1e-4


SHORTER = "the staff was great but the staff was"
"""One token less than `CLEAN`, in the span `first`."""


@pytest.mark.slow
def test_prompts_of_other_lengths_are_aligned_by_spans():
    """Every cell by hand: the state of the aligned token of the corrupted prompt, put into the clean run."""
    model = tiny("gpt2")
    pairs = made(pair(id="a", corrupted=SHORTER), pair(id="b"))
    own, equal = pairs
    assert own.length == own.corrupted.length + 1 == equal.length
    assert own.partner[:5] == (0, 1, 2, 2, 3) and own.partner[-1] == own.corrupted.length - 1
    assert equal.partner == tuple(range(equal.length)) and own.first == equal.first == 2
    for engine in ("wavefront", "loop"):
        effects = ma.trace(model, pairs, ["resid_pre"], metric="logit_diff", engine=engine)
        assert effects.about["direction"] == "noise"
        for p in pairs:
            answer, foil = p.answers

            def value(logits: torch.Tensor, answer: int = answer, foil: int = foil) -> float:
                return float(logits[0, -1, answer] - logits[0, -1, foil])

            mine = effects.frame[effects.frame["example_id"] == p.id].set_index(
                ["layer", "position"]
            )
            with torch.inference_mode():
                base = value(model.forward(p.clean.ids))
                for layer in range(model.n_layers):
                    site = Site(layer, "resid_pre")
                    with capture(model, [site]) as seen:
                        model.forward(p.corrupted.ids)
                    for at, partner in enumerate(p.partner):

                        def put(
                            x: torch.Tensor,
                            at: int = at,
                            state: torch.Tensor = seen[site][0, partner],
                        ) -> torch.Tensor:
                            return torch.cat([x[:, :at], state.expand(1, 1, -1), x[:, at + 1 :]], 1)

                        with intervene(model, {site: put}):
                            effect = base - value(model.forward(p.clean.ids))
                        assert mine["effect"][layer, at] == pytest.approx(effect, abs=1e-5)
            assert mine["effect"].abs().max() > 1e-3
    by_role = ma.trace(model, pairs[:1], ["mlp_out"], by="role", metric="logit_diff")
    assert by_role.about["changed_roles"] == ["first.first", "first.last"]


def test_spans_belong_to_their_pairs_alone():
    """Two tasks with other spans in one process: neither knows the other's roles."""
    cities, facts = (made(pair(spans={name: "food"})) for name in ("city", "subject"))
    assert (cities.spans, facts.spans) == (["city"], ["subject"])
    for pairs, known, unknown in ((cities, "city", "subject"), (facts, "subject", "city")):
        frame = ma.trace(tiny("gpt2"), pairs, [f"L0.mlp_out@{known}.last"]).frame
        assert set(frame["role"]) == {f"{known}.last"}
        with pytest.raises(SiteError, match=f"unknown role '{unknown}"):
            ma.trace(tiny("gpt2"), pairs, [f"L0.mlp_out@{unknown}.last"])
    with pytest.raises(SiteError, match="unknown role 'city"):
        Site.parse("L0.mlp_out@city.last")
    with pytest.raises(ConfigError, match="unknown noise span 'city'"):
        ma.make_pairs(tiny("gpt2"), EXAMPLES, ma.GaussianNoise(span="city"))
    both = ma.Tokens.stack([facts[0].clean, cities[0].clean])
    assert both.positions("city", row=1) == facts[0].clean.positions("subject")
    assert both.positions("city", row=0) == [] != both.positions("subject", row=0)


@pytest.mark.parametrize("corruption", [None, ma.GaussianNoise(span="first", draws=2)])
def test_faithfulness_reads_the_answers_of_each_pair(corruption):
    """With the last layer's stream ablated, the run is the corrupted one; with nothing, the clean one."""
    model, pairs = tiny("gpt2"), made(corruption=corruption)
    ranking = [(Site(model.n_layers - 1, "resid_post"), 1.0)]
    curve = faithfulness(model, pairs, ranking, mode="ablate", randoms=0, draws=5)
    clean = np.mean([float(p.clean_scores[0] - p.clean_scores[1]) for p in pairs])
    corrupted = np.mean(
        [float((p.corrupted_scores[:, 0] - p.corrupted_scores[:, 1]).mean()) for p in pairs]
    )
    assert abs(clean - corrupted) > 1e-3
    np.testing.assert_allclose(curve.metric_mean, [clean, corrupted], atol=1e-5)


def test_noise_on_a_span_changes_the_embeddings_of_the_span_alone():
    model = tiny("gpt2")
    noise = ma.GaussianNoise(span="first", draws=2)
    pairs = made(corruption=noise)
    (own, *_) = pairs
    at = own.clean.positions("first")
    assert own.noise_positions() == at and own.first == at[0] and len(at) == 2
    moved = own.noise(model.d_model).abs().sum((0, 2)) > 0
    assert moved.nonzero().flatten().tolist() == at
    tokens = torch.cat([p.clean.ids[0, p.clean.positions("first")] for p in pairs])
    assert pairs.sigma == pytest.approx(3 * float(model.embed_tokens(tokens[None]).float().std()))
    effects = ma.trace(model, pairs, ["resid_pre"], layers=[0], metric="logprob")
    frame = effects.frame[effects.frame["example_id"] == own.id].set_index("position")
    assert frame["effect"][at].abs().min() > 0 and frame["effect"].drop(at).abs().max() < 1e-12


@pytest.mark.parametrize("corruption", fast(["mean", "zero", "resample"], ["resample"]))
def test_ablations_and_estimates_run(corruption):
    pairs = made(corruption=corruption)
    exact = ma.trace(tiny("gpt2"), pairs, ["mlp_out"], by="role", metric="logit_diff")
    assert exact.frame["effect"].abs().max() > 0
    estimate = ma.trace(
        tiny("gpt2"), pairs, ["mlp_out"], by="role", metric="logit_diff", method="atp"
    )
    assert len(estimate.frame) == len(exact.frame)


def test_the_filter_compares_the_answer_with_the_foil():
    scores = {p.id: (p.clean_scores, p.corrupted_scores) for p in made()}
    right = {k for k, (clean, _) in scores.items() if clean[0] > clean[1]}
    turned = [pair(id="t", answer=" the", foil=" staff")]
    both = made(PAIRS[0], *turned, keep="clean")
    assert [p.id for p in both] == (["a"] if "a" in right else ["t"])
    assert both.dropped == {"clean run wrong": 1}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("own")
    rows = [
        {
            "clean": p.clean,
            "corrupted": p.corrupted,
            "answer": p.answer,
            "foil": p.foil,
            "spans": dict(p.spans),
        }
        for p in PAIRS
    ]
    data = folder / "facts.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert traced(folder, data, "--no-figures", out="run") == 0
    return folder


def traced(folder: Path, data: Path, *flags: str, out: str = "other") -> int:
    return command.cli(
        ["--data", str(data), "--model", str(tiny_folder("gpt2")), "--keep", "all", "--metric", "logit_diff",
         "--quiet", "--out", str(folder / out), *flags]
    )  # fmt: skip


def test_the_command_leaves_what_it_leaves_for_reviews(run):
    names = {p.name for p in (run / "run").iterdir()}
    assert {"report.html", "importance.csv", "effects.parquet", "sites.json"} <= names
    effects = Effects.load(run / "run")
    assert effects.pairs["labels"].map(list).tolist()[1] == [" was", " staff"]
    assert effects.pairs["polarity"].tolist() == [" staff", " was", " staff"]
    sites = json.loads((run / "run/sites.json").read_text())
    assert sites["spans"] and ma.load_sites(run / "run/sites.json")
    page = (run / "run/report.html").read_text()
    assert "second.last" in page


@pytest.mark.slow
def test_a_killed_run_is_taken_up(run, monkeypatch):
    calls = []
    write = command.write_part

    def dies(frame: pd.DataFrame, path: Path) -> None:
        if calls:
            raise KeyboardInterrupt
        calls.append(path)
        write(frame, path)

    flags = ("--no-figures", "--no-report", "--sites", "mlp_out")
    two = run / "two.jsonl"  # prompts of two lengths are two parts
    rows = [{"clean": f"the staff was {x}", "corrupted": f"the staff the {x}", "answer": " was", "foil": " the",
             "spans": {"verb": "was"}} for x in ("great", "great but")]  # fmt: skip
    two.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert traced(run, two, *flags, out="whole") == 0
    monkeypatch.setattr(command, "write_part", dies)
    assert traced(run, two, *flags, out="killed") == 130
    monkeypatch.undo()
    assert traced(run, two, *flags, "--resume", out="killed") == 0
    mine, whole = (run / name / "effects.parquet" for name in ("killed", "whole"))
    assert mine.read_bytes() == whole.read_bytes()


@pytest.mark.slow
def test_flags_may_name_spans_of_the_file(run):
    sites = ["--sites", "L1.resid_post@second.last", "--no-figures", "--no-report"]
    assert traced(run, run / "facts.jsonl", *sites, out="sites") == 0
    assert set(Effects.load(run / "sites").frame["role"]) == {"second.last"}
    noise = [
        "--corruption",
        "noise",
        "--noise-span",
        "first",
        "--noise-draws",
        "2",
        "--no-report",
        "--no-figures",
    ]
    assert traced(run, run / "facts.jsonl", *noise, out="noise") == 0


MISTAKES = {
    "other length": (
        {"corrupted": "the staff was very great but the food was"},
        AlignmentError,
        "a: the clean prompt has .* and the corrupted one .*; outside the named spans, they part at token [0-9]+, 'g' and 'v'",
    ),
    "other length, no spans": (
        {"corrupted": "the staff was great but the staff was", "spans": {}}, AlignmentError, "one 12; they part at token 2, ' f' and ' staff'",
    ),
    "touching spans": (
        {"corrupted": "the staff was great but the staff was", "spans": {"a": "food", "b": "was great"}}, AlignmentError, "'a' and 'b', which touch",
    ),
    "two ways": (
        {"clean": "the food was great but", "corrupted": "the staff was great but the food was great but",
         "spans": {"a": "food", "b": "great"}}, AlignmentError, "in several ways",
    ),
    "long answer": ({"answer": " food"}, PromptError, "' food' of 'a' is 2 tokens, and one is needed; its first is ' f'"),
    "melting answer": ({"clean": CLEAN + " ", "corrupted": CORRUPTED + " ", "answer": "food"}, PromptError, "melts into"),
    "no such span": ({"spans": {"first": "Eiffel"}}, DataError, "'Eiffel', which stands 0 times"),
    "two such spans": ({"spans": {"first": "the"}}, DataError, "'the', which stands 2 times"),
    "span of numbers": ({"spans": {"first": (3, 99)}}, DataError, r"characters \[start, end\]"),
    "span of reviews": ({"spans": {"aspect": "food"}}, SiteError, "a role of reviews"),
    "overlapping": ({"spans": {"first": "food was", "second": "was great"}}, PromptError, "share token"),
    "last token": ({"clean": "the food was staff", "corrupted": None, "spans": {"end": "staff"}}, PromptError, "but the last"),
    "no corrupted": ({"corrupted": None}, DataError, "no corrupted prompt"),
    "same token": ({"foil": " staff"}, DataError, "answer and foil are both"),
    "empty": ({"clean": ""}, DataError, "clean is ''"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence(mistake):
    changes, error, words = MISTAKES[mistake]
    with pytest.raises(error, match=words) as caught:
        made(pair(id="a", **changes))
    assert "\n" not in str(caught.value)


def test_a_prompt_that_is_too_long_is_dropped_or_refused():
    long = pair(id="long", clean=CLEAN * 99, corrupted=CORRUPTED * 99, spans={"first": (4, 8)})
    assert made(PAIRS[0], long).dropped == {"prompt longer than the model reads": 1}
    with pytest.raises(PromptTooLong, match="the prompt of 'long' has"):
        made(long, strict=True)
    with pytest.raises(ma.MechAbsaError, match="longer than the model reads") as error:
        made(long, keep="paper")
    assert "--keep all" not in str(error.value), "it would keep no more"


def test_corruptions_of_reviews_and_mixed_data_are_refused(tmp_path, capsys):
    with pytest.raises(ConfigError, match="prompt pairs bring their own corrupted text"):
        made(corruption=ma.AspectSwap())
    with pytest.raises(ConfigError, match="no such tokens"):
        made(corruption=ma.GaussianNoise(span="query"))
    with pytest.raises(DataError, match="given to two"):
        made(pair(id="a"), pair(id="a"))
    bad = {
        "facts.jsonl": ('{"clean": "a b", "answer": " c"}', "'foil' is missing"),
        "more.jsonl": (
            '{"clean": "a b", "answer": " c", "foil": " d", "span": 1}',
            "unknown field 'span'",
        ),
        "half.jsonl": ('{"clean": "a b", "answer": " c", "foil": " d"}\n{', ":2: no JSON"),
    }
    for name, (text, words) in bad.items():
        (tmp_path / name).write_text(text)
        assert traced(tmp_path, tmp_path / name) == 2
        assert words in capsys.readouterr().err
        with pytest.raises(MechAbsaError):
            ma.load_prompt_pairs(tmp_path / name)
    assert not (tmp_path / "other").exists()
