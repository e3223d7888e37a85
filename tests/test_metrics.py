"""Metrics on numbers worked by hand, and the divergence against scipy's."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import entropy

from mech_absa.errors import ConfigError
from mech_absa.metrics import METRICS, get_metric, kl

LOG = math.log
SCORES = torch.tensor([[LOG(0.5), LOG(0.2), LOG(0.1)], [LOG(0.05), LOG(0.6), LOG(0.15)]])
GOLD = torch.tensor([0, 2])


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("prob", [0.5, 0.15]),
        ("prob_label", [0.5 / 0.8, 0.15 / 0.8]),
        ("logprob", [LOG(0.5), LOG(0.15)]),
        (
            "logit_diff",
            [LOG(0.5) - (LOG(0.2) + LOG(0.1)) / 2, LOG(0.15) - (LOG(0.05) + LOG(0.6)) / 2],
        ),
    ],
)
def test_by_hand(name, expected):
    torch.testing.assert_close(
        METRICS[name](SCORES, GOLD), torch.tensor(expected), rtol=0, atol=1e-6
    )


def test_the_foil_of_each_row():
    """Row 0 against label 1; row 1 against the mean of the others, which -1 says."""
    found = METRICS["logit_diff"](SCORES, GOLD, torch.tensor([1, -1]))
    torch.testing.assert_close(
        found, torch.tensor([LOG(0.5 / 0.2), LOG(0.15) - LOG(0.05 * 0.6) / 2]), rtol=0, atol=1e-6
    )


def test_what_a_constant_does():
    """Adding a constant to all labels changes no metric that asks only for labels, and multiplies a probability."""
    moved = SCORES + LOG(0.5)
    for name in ("prob_label", "logit_diff"):
        torch.testing.assert_close(
            METRICS[name](moved, GOLD), METRICS[name](SCORES, GOLD), rtol=0, atol=1e-6
        )
        assert METRICS[name].need == "labels"
    torch.testing.assert_close(
        METRICS["prob"](moved, GOLD), METRICS["prob"](SCORES, GOLD) / 2, rtol=0, atol=1e-6
    )
    assert METRICS["prob"].need == METRICS["logprob"].need == "normaliser"


def test_divergence_against_scipy():
    rng = np.random.default_rng(0)
    run, clean = rng.normal(0, 3, (5, 40)), rng.normal(0, 3, (5, 40))
    p, q = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (clean, run))
    expected = -entropy(p, q, axis=-1)
    np.testing.assert_allclose(
        kl(torch.tensor(run), torch.tensor(clean)).numpy(), expected, rtol=1e-12
    )
    np.testing.assert_allclose(
        METRICS["kl"].fn(torch.tensor(run).float(), torch.tensor(clean).float()),
        expected,
        rtol=1e-5,
    )
    assert (expected < 0).all()


def test_divergence_is_not_symmetric_and_zero_for_the_clean_run():
    """P = (1/2, 1/2), Q = (1/4, 3/4): KL(P||Q) = 1/2 ln 2 + 1/2 ln 2/3."""
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    torch.testing.assert_close(kl(q, clean=p), torch.tensor([-0.5 * LOG(4 / 3)]), rtol=0, atol=1e-7)
    torch.testing.assert_close(
        kl(p, clean=q), torch.tensor([-(0.25 * LOG(0.5) + 0.75 * LOG(1.5))]), rtol=0, atol=1e-7
    )
    torch.testing.assert_close(kl(p + 3, clean=p), torch.zeros(1), rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize(
    ("given", "wide"),
    [
        ("bfloat16", "float32"),
        ("float16", "float32"),
        ("float32", "float32"),
        ("float64", "float64"),
    ],
)
def test_never_narrower_than_float32(name, given, wide):
    scores = SCORES.to(getattr(torch, given))
    metric = METRICS[name]
    found = metric.fn(scores, scores.flip(-1)) if name == "kl" else metric(scores, GOLD)
    assert found.dtype == getattr(torch, wide)
    exact = (
        metric.fn(scores.double(), scores.double().flip(-1))
        if name == "kl"
        else metric(scores.double(), GOLD)
    )
    torch.testing.assert_close(
        found.double(), exact, rtol=0, atol=1e-15 if wide == "float64" else 1e-6
    )


def test_float64_is_kept_to_its_last_digits():
    """Two scores that differ by 1e-12 are the same number in float32."""
    scores = torch.tensor([[-1.0 + 1e-12, -1.0]], dtype=torch.float64)
    assert METRICS["logit_diff"](
        scores, torch.tensor([0]), torch.tensor([1])
    ).item() == pytest.approx(1e-12, rel=1e-3)
    clean = torch.zeros(1, 2, dtype=torch.float64)
    assert (
        0
        < -kl(torch.tensor([[1e-6, 0.0]], dtype=torch.float64), clean).item()
        == pytest.approx(1e-12 / 8, rel=1e-3)
    )


def test_by_name():
    assert get_metric("prob") is METRICS["prob"]
    assert get_metric(METRICS["kl"]) is METRICS["kl"]
    with pytest.raises(
        ConfigError,
        match=r"unknown metric 'accuracy'; accepted: prob, prob_label, logprob, logit_diff or kl",
    ):
        get_metric("accuracy")
