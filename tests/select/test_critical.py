"""Critical states against differences of the metric, entry by entry of the attention pattern."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from support import fast
from support.jobs import EXAMPLES, LONG, ONE_TOKEN, TEMPLATE, tiny

from mech_absa.errors import ConfigError
from mech_absa.prompts import Verbalizer
from mech_absa.select import Evidence, selector
from mech_absa.select.critical import CriticalStates

STEP = 1e-5


def evidence(arch: str, n: int = 4, labels=ONE_TOKEN) -> Evidence:
    verbalizer = Verbalizer.of(labels, " ")
    return Evidence(
        tiny(arch), tuple(EXAMPLES[:n]), template=TEMPLATE, verbalizer=verbalizer, keep="all"
    )


def slopes(seen: Evidence, layer: int) -> tuple[np.ndarray, np.ndarray]:
    """The pattern of one layer for the first prompt, and dm/dA by differences, [head q k]."""
    hooked, ids = seen.model.hooked, seen.prompts[0].ids
    name = f"blocks.{layer}.attn.hook_pattern"
    labels = [
        i for _, (i,) in seen.verbalizer.continuations(seen.model.tokenizer, TEMPLATE)[0].labels
    ]
    gold = int(seen.gold[0])

    def metric(logits) -> np.ndarray:
        y = logits[:, -1, labels]
        rest = [i for i in range(len(labels)) if i != gold]
        return (y[:, gold] - y[:, rest].mean(1)).numpy()

    with torch.inference_mode():
        _, cached = hooked.run_with_cache(ids)
        pattern = cached[name][0]
        heads, n = pattern.shape[:2]
        places = [(h, q, k) for h in range(heads) for q in range(n) for k in range(q + 1)]
        both = []
        for step in (STEP, -STEP):

            def move(value, hook, step=step):
                value = value.clone()
                for row, (h, q, k) in enumerate(places):
                    value[row, h, q, k] += step
                return value

            rows = ids.expand(len(places), -1)
            both.append(metric(hooked.run_with_hooks(rows, fwd_hooks=[(name, move)])))
    found = np.zeros((heads, n, n))
    for place, up, down in zip(places, *both, strict=True):
        found[place] = (up - down) / (2 * STEP)
    return pattern.numpy(), found


@pytest.mark.parametrize("arch", fast(["llama", "gpt2", "pythia", "gemma2"], ["llama", "gpt2"]))
def test_saliency_by_differences(arch):
    seen = evidence(arch, 1)
    (prompt,) = seen.prompts
    scores = {part: dict(CriticalStates(part=part)(seen)) for part in ("own", "read", "both")}
    for layer in range(seen.model.n_layers - 1):
        pattern, slope = slopes(seen, layer + 1)
        flow = np.abs((pattern * slope).sum(0))
        for site in (s for s in scores["both"] if s.layer == layer):
            at = prompt.positions(site.at)
            own = np.mean([flow[i, i] for i in at])
            read = np.mean([flow[i + 1 :, i].sum() for i in at])
            assert scores["own"][site] == pytest.approx(own, abs=1e-7)
            assert scores["read"][site] == pytest.approx(read, abs=1e-7)
            assert scores["both"][site] == pytest.approx(own + read, abs=1e-7)
    assert max(scores["both"].values()) > 0.05


def test_a_batch_is_the_mean_of_its_prompts():
    """Prompts of different length: padding adds nothing."""
    for flow in ("saliency", "attention"):
        whole = dict(CriticalStates(flow)(evidence("llama")))
        alone = [
            dict(CriticalStates(flow)(Evidence(tiny("llama"), (e,), template=TEMPLATE,
                 verbalizer=Verbalizer.of(ONE_TOKEN, " "))))
            for e in EXAMPLES
        ]  # fmt: skip
        for site, score in whole.items():
            assert score == pytest.approx(np.mean([one[site] for one in alone]), abs=1e-9)


def test_attention_is_that_of_the_model():
    seen = evidence("llama", 1)
    (prompt,) = seen.prompts
    ranking = CriticalStates("attention")(seen)
    with torch.inference_mode():
        _, cached = seen.model.hooked.run_with_cache(prompt.ids)
    for site, score in ranking:
        if site.layer + 1 < seen.model.n_layers:
            pattern = cached[f"blocks.{site.layer + 1}.attn.hook_pattern"][0].mean(0)
            assert score == pytest.approx(
                float(pattern[:, prompt.positions(site.at)].sum(0).mean()), abs=1e-9
            )


def test_nothing_reads_the_last_layer():
    ranking = selector("critical")(evidence("llama"))
    last = ranking.n_layers - 1
    assert {score for site, score in ranking if site.layer == last} == {0.0}
    assert last not in ranking.top_layers(last)


def test_what_cannot_be_asked():
    with pytest.raises(ConfigError, match="reads labels of one token off a single run"):
        selector("critical")(evidence("llama", labels=LONG))
    with pytest.raises(
        ConfigError, match="'gradient' were asked for; accepted: saliency or attention"
    ):
        CriticalStates("gradient")
    with pytest.raises(ConfigError, match="'all' were asked for; accepted: both, own or read"):
        CriticalStates(part="all")
