"""Steering by a difference of means, against activations that TransformerLens's own cache gives."""

from __future__ import annotations

import math

import pytest
import torch
from support.tiny_models import tiny_folder
from support.training_cases import EIGHT, TEMPLATE

from mech_absa.edits import load_edit, save_edit
from mech_absa.errors import ConfigError, SiteError
from mech_absa.evaluate import predict
from mech_absa.examples import Example
from mech_absa.model import Model, load_model, weights_hash
from mech_absa.scoring import question
from mech_absa.sites import Site
from mech_absa.train import difference_of_means, mean_difference
from mech_absa.train.means import token_means

SITES = ("L0.attn_out@query.last", "L1.resid_post@query", "L1.head2@-1", "L2.mlp_out")


@pytest.fixture(scope="module")
def model() -> Model:
    return load_model(tiny_folder("llama"))


def right_and_wrong(model: Model) -> tuple[list[Example], list[Example]]:
    answers = predict(model, EIGHT, template=TEMPLATE)
    split: tuple[list[Example], list[Example]] = ([], [])
    for example, right in zip(EIGHT, answers.correct, strict=True):
        split[not right].append(example)
    return split


def by_hand(model: Model, example: Example) -> dict[str, torch.Tensor]:
    """The four activations of one example, each token picked by counting."""
    tokens = question(model, example, TEMPLATE)
    _, cache = model.hooked.run_with_cache(tokens.ids)
    roles = tokens.role_names
    query = [i for i, r in enumerate(roles) if r.startswith("query")]
    return {
        SITES[0]: cache["blocks.0.hook_attn_out"][0, query[-1]],
        SITES[1]: sum(cache["blocks.1.hook_resid_post"][0, i] for i in query) / len(query),
        SITES[2]: cache["blocks.1.attn.hook_z"][0, len(roles) - 1, 2],
        SITES[3]: cache["blocks.2.hook_mlp_out"][0].sum(0) / len(roles),
    }


def test_three_examples_by_hand(model):
    """One right answer r and two wrong ones a, b: alpha (r - (r + a + b) / 3) = alpha (2 r - a - b) / 3."""
    right, wrong = right_and_wrong(model)
    three = [wrong[0], right[0], wrong[1]]
    before = weights_hash(model.hooked)
    edit = mean_difference(model, three, SITES, alpha=2.5, template=TEMPLATE)
    a, r, b = (by_hand(model, e) for e in three)
    for part, intervention in zip(edit.parts, edit, strict=True):
        place = part.place
        expected = 2.5 * (2 * r[place] - a[place] - b[place]) / 3
        assert part.family == "steering"
        torch.testing.assert_close(
            intervention.get_parameter("v").detach(), expected, atol=1e-6, rtol=1e-4
        )
    assert edit.record.made["right"] == 1 and edit.record.preset["alpha"] == 2.5
    assert not edit.record.trained and "computed from examples: 3" in edit._repr_html_()
    assert weights_hash(model.hooked) == before


def test_it_is_saved_and_scored_as_any_edit(model, tmp_path):
    edit = mean_difference(model, EIGHT, SITES[0], alpha=3.0, template=TEMPLATE)
    save_edit(edit, tmp_path)
    again = load_edit(tmp_path, model)
    assert again.record == edit.record and again.record.template == TEMPLATE.text
    scores = [predict(model, EIGHT, e).scores for e in (edit, again, None)]
    assert (scores[0] == scores[1]).all() and (scores[0] != scores[2]).any()


def test_controls_keep_the_norm_or_the_vector(model):
    found = difference_of_means(model, EIGHT, SITES, template=TEMPLATE)
    turned, moved = found.random_directions(seed=3), found.random_sites(seed=3)
    for site, v in found.vectors.items():
        other = turned.vectors[site]
        assert float(other.norm()) == pytest.approx(float(v.norm()))
        assert abs(float(torch.cosine_similarity(other, v, dim=0))) < 0.9
    assert torch.equal(
        found.random_directions(3).vectors[Site.parse(SITES[0])],
        turned.vectors[Site.parse(SITES[0])],
    )
    assert not set(moved.vectors) & set(found.vectors)
    assert [(s.kind, s.at) for s in moved.vectors] == [(s.kind, s.at) for s in found.vectors]
    assert all(
        torch.equal(a, b)
        for a, b in zip(moved.vectors.values(), found.vectors.values(), strict=True)
    )
    assert moved.edit(1.0).record.preset["control"] == "random sites"
    everywhere = [Site(layer, "attn_out") for layer in range(model.n_layers)]
    full = difference_of_means(model, EIGHT, everywhere, template=TEMPLATE)
    with pytest.raises(ConfigError, match=r"3 sites like L0.attn_out leave 0 others"):
        full.random_sites()


def test_alpha_is_chosen_on_validation_rows(model):
    """The table has what `predict` gives for each alpha, and the best of it is taken."""
    found = difference_of_means(model, EIGHT, "L2.resid_post@-1", template=TEMPLATE)
    grid = (1.0, -40.0, 40.0)
    choice = found.choose_alpha(EIGHT[:6], grid)
    said = [float(predict(model, EIGHT[:6], found.edit(a)).correct.mean()) for a in grid]
    assert [row.accuracy for row in choice.table] == pytest.approx(said)
    best = max(choice.table, key=lambda row: (row.accuracy, -row.loss))
    assert choice.alpha == best.alpha == choice.edit.record.preset["alpha"]
    assert choice.edit.record.validation == 6 and len(choice.edit.record.made["alphas"]) == 3
    with pytest.raises(ConfigError, match="no alphas were given"):
        found.choose_alpha(EIGHT, ())
    with pytest.raises(ConfigError, match="no validation examples were given"):
        found.choose_alpha([])


def test_a_prompt_without_the_token_counts_nowhere(model):
    """No prompt has 1,000 tokens, so that no right answer has a state there."""
    prompts = [question(model, e, TEMPLATE) for e in EIGHT]
    (states,) = token_means(model, prompts, [Site(0, "attn_out", None, 999)]).values()
    assert states.isnan().all()
    with pytest.raises(ConfigError, match=r"steering at L0.attn_out@999: none of the \d prompts"):
        difference_of_means(model, EIGHT, "L0.attn_out@999", template=TEMPLATE)


def test_impossible_requests_get_a_sentence(model):
    right, wrong = right_and_wrong(model)
    for examples, word in ((right, "all"), (wrong, "none")):
        with pytest.raises(ConfigError, match=rf"answers {word} of the {len(examples)} examples"):
            mean_difference(model, examples, SITES[0], 1.0, template=TEMPLATE)
    with pytest.raises(ConfigError, match="there are no examples"):
        mean_difference(model, [], SITES[0], 1.0)
    with pytest.raises(SiteError, match="no sites were given"):
        mean_difference(model, EIGHT, [], 1.0)
    with pytest.raises(SiteError, match=r"steering at L0\.q1 is not offered"):
        mean_difference(model, EIGHT, "L0.q1", 1.0)
    for alpha in (math.nan, math.inf):
        with pytest.raises(ConfigError, match=f"alpha is {alpha}; accepted: a finite number"):
            mean_difference(model, EIGHT, SITES[0], alpha)
