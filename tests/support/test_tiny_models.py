"""The tiny models are what they claim: deterministic, loud enough to show an error, true to their architecture's quirks."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from support.tiny_models import (
    ARCHITECTURES,
    METASPACE,
    WINDOW,
    byte_level_tokenizer,
    metaspace_tokenizer,
    tiny_folder,
    tiny_model,
)

AWKWARD = "The café's food☃ was  great,\nbut the staff… not."


def test_models_are_reproducible():
    first, again, other = (tiny_model("llama", seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_models_are_loud(tiny):
    """Logits of standard deviation about two, and one changed token moves those of the next position by tenths at least."""
    model = AutoModelForCausalLM.from_pretrained(tiny)
    tokens = torch.tensor([[1, 77, 270, 33, 140], [1, 77, 271, 33, 140]])
    with torch.no_grad():
        logits = model(tokens).logits
    assert 1 < logits.std() < 4
    assert (logits[0, 3] - logits[1, 3]).abs().max() > 0.3
    assert torch.equal(logits[0, :2], logits[1, :2])
    assert sum(p.numel() for p in model.parameters()) < 100_000


@pytest.mark.parametrize("arch", ["mistral", "llama"])
def test_the_window_is_real(arch):
    """Three layers that see the last five tokens each cannot look back further than 3 x 4; full attention can."""
    model = AutoModelForCausalLM.from_pretrained(tiny_folder(arch))
    reach = 3 * (WINDOW - 1)
    tokens = torch.arange(10, 30).repeat(2, 1)
    tokens[1, 0] = 200
    with torch.no_grad():
        one, two = model(tokens).logits
    moved = (one - two).abs().amax(-1) > 1e-5
    assert moved[: reach + 1].all()
    assert moved[reach + 1 :].any() == (arch == "llama")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_saved_tokenizer_is_the_made_one(arch):
    made, loaded = (
        metaspace_tokenizer() if arch in METASPACE else byte_level_tokenizer(),
        AutoTokenizer.from_pretrained(tiny_folder(arch)),
    )
    ids = loaded(AWKWARD).input_ids
    assert ids == made(AWKWARD).input_ids
    assert loaded.decode(ids, skip_special_tokens=True) == AWKWARD
    assert (ids[0] == loaded.bos_token_id) == (arch in METASPACE)
    assert len(loaded) == AutoModelForCausalLM.from_pretrained(tiny_folder(arch)).config.vocab_size
