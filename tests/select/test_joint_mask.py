"""The joint mask against the same objective through hooks of TransformerLens, and identities."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from support.jobs import EXAMPLES, LONG, ONE_TOKEN, TEMPLATE, tiny

from mech_absa.errors import ConfigError
from mech_absa.patch.corruption import Corruption, Counterfactual, GaussianNoise, ZeroAblation
from mech_absa.patch.job import components
from mech_absa.patch.trace import trace
from mech_absa.prompts import Verbalizer
from mech_absa.select import Evidence, selector
from mech_absa.select import joint_mask as module
from mech_absa.select.joint_mask import JointMask, Mask, log_odds, reference
from mech_absa.sites import Site

KINDS = ("head", "mlp_out")


def evidence(
    arch: str = "llama", labels=ONE_TOKEN, corruption: Corruption | None = None, n: int = 4
) -> Evidence:
    return Evidence(
        tiny(arch),
        tuple(EXAMPLES[:n]),
        corruption=corruption or Counterfactual(),
        template=TEMPLATE,
        verbalizer=Verbalizer.of(labels, " "),
        keep="all",
    )


def fresh(seen: Evidence, z: float) -> Mask:
    mask = Mask(seen.model, components(seen.model, KINDS))
    with torch.no_grad():
        mask.z.fill_(z)
    return mask


@pytest.mark.parametrize("corruption", [Counterfactual(), GaussianNoise(draws=2)])
@pytest.mark.parametrize("labels", [ONE_TOKEN, LONG])
def test_a_closed_mask_is_the_clean_run_and_an_open_one_the_corrupted_run(corruption, labels):
    """All that is added to the last token's stream is then the corrupted run's.

    Noise leaves the last token alone here, as the counterfactual does.
    """
    if isinstance(corruption, GaussianNoise):
        corruption = replace(corruption, span="query")
    seen = evidence(labels=labels, corruption=corruption)
    for pair in seen.pairs:
        closed = fresh(seen, 0.0).odds([pair], seen.pairs)
        torch.testing.assert_close(closed, reference([pair]), atol=1e-8, rtol=0)
        opened = fresh(seen, 1.0).odds([pair], seen.pairs)
        assert pair.corrupted_scores is not None
        corrupted = log_odds(pair.corrupted_scores, [pair])
        torch.testing.assert_close(opened, corrupted, atol=1e-8, rtol=0)
        assert pair.gold == pair.foil or not torch.allclose(closed, opened, atol=1e-3)


def test_one_open_component_is_an_exact_patch_of_all_tokens():
    """Of the last MLP only the last token can matter, and the plain loop patches that one."""
    seen = evidence(n=1, corruption=Counterfactual())
    (pair,) = seen.pairs
    whole = trace(
        seen.model, seen.pairs, ["mlp_out"], by="role", metric="logit_diff", direction="noise",
        engine="loop", check=False,
    ).frame  # fmt: skip
    final = seen.model.n_layers - 1
    cell = whole[(whole["layer"] == final) & (whole["role"] == "answer")]
    mask = fresh(seen, 0.0)
    with torch.no_grad():
        mask.z[mask.sites.index(Site(final, "mlp_out"))] = 1
    effect = (reference([pair]) - mask.odds([pair], seen.pairs)).detach()
    assert float(effect) == pytest.approx(float(cell["effect"].iloc[0]), abs=1e-8)
    assert abs(float(effect)) > 1e-3


def by_hooks(seen: Evidence, epochs: int, penalty: float, rate: float) -> dict[Site, float]:
    """The whole training, one pair at a time, in one batch, through TransformerLens's own hooks."""
    hooked, pairs = seen.model.hooked, seen.pairs
    L, H = seen.model.n_layers, seen.model.n_heads
    heads = torch.full((L, H), 0.5, dtype=torch.float64, requires_grad=True)
    mlps = torch.full((L,), 0.5, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([heads, mlps], lr=rate)
    continuation = pairs.continuations[0]
    total = [torch.zeros_like(heads), torch.zeros_like(mlps)]

    def mix(value, hook, other, layer):
        if "hook_z" in hook.name:
            z = heads[layer][None, None, :, None]
        else:
            z = mlps[layer]
        return z * other[hook.name] + (1 - z) * value

    def odds(logits, pair):
        p = logits[0, -1].softmax(-1)
        ids = dict(continuation.labels)
        return p[ids[pair.gold][0]] / p[ids[pair.foil][0]]

    for epoch in range(epochs):
        adam.zero_grad()
        losses = []
        for pair in pairs:
            with torch.no_grad():
                _, other = hooked.run_with_cache(pair.corrupted.ids)
                first = odds(hooked(pair.clean.ids), pair)
            hooks = [
                (f"blocks.{layer}.{name}", partial(mix, other=other, layer=layer))
                for layer in range(L)
                for name in ("attn.hook_z", "hook_mlp_out")
            ]
            now = odds(hooked.run_with_hooks(pair.clean.ids, fwd_hooks=hooks), pair)
            # The published form, with the odds of the foil.
            losses.append(1 / (1 + (1 / now - 1 / first) / (1 / first)))
        weight = penalty * (epoch + 1)
        loss = torch.stack(losses).mean()
        for z in (heads, mlps):
            loss = loss + weight * z.abs().sum() + weight * (z * (1 - z)).sum()
        loss.backward()
        adam.step()
        with torch.no_grad():
            for z, t in zip((heads, mlps), total, strict=True):
                z.clamp_(0, 1)
                t += z
    heads, mlps = heads.detach(), mlps.detach()
    means = {Site(x, "head", h): float(total[0][x, h]) / epochs for x in range(L) for h in range(H)}
    means |= {Site(x, "mlp_out"): float(total[1][x]) / epochs for x in range(L)}
    last = {Site(x, "head", h): float(heads[x, h]) for x in range(L) for h in range(H)}
    last |= {Site(x, "mlp_out"): float(mlps[x]) for x in range(L)}
    return {site: float(last[site] >= 0.5) + means[site] for site in means}


@pytest.mark.parametrize("arch", ["llama", "pythia"])
def test_training_is_that_of_the_published_objective(arch):
    seen = evidence(arch)
    ranking = JointMask(epochs=4, penalty=0.01)(seen)
    expected = by_hooks(seen, 4, 0.01, 0.1)
    assert dict(ranking) == pytest.approx(expected, abs=1e-6)
    chosen = {site for site, score in expected.items() if score >= 1}
    assert {str(s) for s in chosen} == set(ranking.about["selected"])
    assert 0 < len(chosen) < len(expected)
    assert set(ranking.top(len(chosen))) == chosen  # the set comes first


def test_pairs_are_split_without_changing_the_gradient(monkeypatch):
    whole = JointMask(epochs=2, penalty=0.01)(evidence())
    monkeypatch.setattr(module, "MEMORY", 1)  # one pair at a time
    assert dict(JointMask(epochs=2, penalty=0.01)(evidence())) == pytest.approx(dict(whole))


def test_batches_follow_the_seed():
    small = JointMask(epochs=2, penalty=0.01, batch=2)
    one, again = (dict(small(evidence())) for _ in range(2))
    assert one == again
    other = dict(small(replace(evidence(), seed=3)))
    assert not np.allclose(list(one.values()), [other[s] for s in one])


def test_what_a_mask_cannot_do():
    with pytest.raises(ConfigError, match="selected none of 15 components with a penalty of 5"):
        JointMask(penalty=5.0)(evidence())
    with pytest.raises(ConfigError, match="given 1 pair; at least 2"):
        selector("joint_mask")(evidence(n=1))
    with pytest.raises(ConfigError, match="has no corrupted run"):
        selector("joint_mask")(evidence(corruption=ZeroAblation()))
    with pytest.raises(ConfigError, match="one or more of head, mlp_out, attn_out"):
        JointMask(kinds=("resid_post",))
    with pytest.raises(ConfigError, match="with 0 epochs"):
        JointMask(epochs=0)
