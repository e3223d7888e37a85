"""What is left to prove of the formulas: the gradients of DoRA under its frozen norm, and the classes of pyreft on copied weights."""

from __future__ import annotations

import pytest
import torch
from support.edit_cases import EVERYWHERE, logits, loud, prompts, tiny_model

from mech_absa.edits import Edit, Part
from mech_absa.edits.lowrank import DoRA
from mech_absa.prompts import Tokens

WIDTH, RANK = 32, 4


def test_doras_gradients_are_those_of_finite_differences_with_the_norm_held(monkeypatch):
    """In float64, along random directions of A, B and m; without the norm held the differences of A and B are others."""
    model = tiny_model("llama", "float64")
    edit, tokens = loud(model, Part("dora", "L1.W_Q")).double(), prompts(model)[1]
    (dora,) = edit
    held = dora.norm(model)

    def value() -> torch.Tensor:
        with edit.applied(model, tokens):
            return model.forward(tokens.ids)[0, -1].log_softmax(-1)[7]

    def slope(p: torch.Tensor, way: torch.Tensor, step: float = 1e-5) -> float:
        at = p.data.clone()
        with torch.no_grad():
            p.copy_(at + step * way)
            up = value()
            p.copy_(at - step * way)
            down = value()
            p.copy_(at)
        return float(up - down) / (2 * step)

    value().backward()
    generator = torch.Generator().manual_seed(0)
    ways = {
        name: torch.randn(p.shape, generator=generator, dtype=torch.float64)
        for name, p in edit.named_parameters()
    }
    free = {name: slope(p, ways[name]) for name, p in edit.named_parameters()}
    monkeypatch.setattr(DoRA, "norm", lambda self, model: held)
    for name, p in edit.named_parameters():
        said = float((p.grad * ways[name]).sum())
        assert said == pytest.approx(slope(p, ways[name]), rel=2e-4, abs=1e-7), name
        if not name.endswith("m"):
            assert abs(said - free[name]) > 1e-3 * abs(said), "the norm does move with A and B"


@pytest.mark.parametrize(
    "family, theirs",
    [
        ("loreft", "LoreftIntervention"),
        ("noreft", "NoreftIntervention"),
        ("direft", "NodireftIntervention"),
    ],
)
def test_reft_equals_pyreft_on_copied_weights(family, theirs):
    """What the paper calls DiReFT, without a constraint, is pyreft's `Nodireft`; its `Direft` keeps the columns orthonormal."""
    pyreft = pytest.importorskip(
        "pyreft", reason="pyreft is not installed: pip install --no-deps pyreft pyvene"
    )
    model = tiny_model("llama")
    edit = loud(model, Part(family, "L1.resid_post", {"rank": RANK}))
    (ours,) = edit
    other = getattr(pyreft, theirs)(
        embed_dim=WIDTH, low_rank_dimension=RANK, add_bias=False, dtype=torch.float32
    ).eval()
    with torch.no_grad():
        if family == "loreft":
            other.rotate_layer.weight = (
                ours.R.T
            )  # pyreft keeps the columns orthonormal, we the rows
            other.learned_source.weight.copy_(ours.W)
            other.learned_source.bias.copy_(ours.b)
        else:
            other.proj_layer.weight.copy_(ours.W2)
            other.learned_source.weight.copy_(ours.W)
            other.learned_source.bias.copy_(ours.b)
        h = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(1))
        torch.testing.assert_close(ours(h), other(h), atol=1e-5, rtol=1e-5)


def test_an_edit_of_many_families_gives_a_batch_what_it_gives_its_rows():
    """All families at once, in one edit: the order of the hooks does not depend on the batch."""
    model = tiny_model("llama")
    edit: Edit = loud(model, *[Part(f, p) for f, p in EVERYWHERE.items()], size=0.1)
    rows = prompts(model)
    together = logits(model, Tokens.stack(rows), edit)
    for i, row in enumerate(rows):
        torch.testing.assert_close(
            together[i, : row.lengths[0]], logits(model, row, edit)[0], atol=1e-4, rtol=1e-4
        )
