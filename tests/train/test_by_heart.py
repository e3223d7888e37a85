"""The text loss learns by heart what the frozen unembedding can say, and what is left of it is the unembedding's.

Edits stop below the unembedding. The norm in front of it bounds what it is given, so that some tokens have a largest probability that no
edit can lift; the floor is found here by a free vector for every token.
"""

from __future__ import annotations

import pytest
import torch
from support.tiny_models import tiny_folder
from support.training_cases import EIGHT, TEMPLATE
from transformers import AutoModelForCausalLM

from mech_absa.edits import Part
from mech_absa.model import Model, load_model
from mech_absa.train import PrefixCache, Preset, fit
from mech_absa.train.task import Task

PARTS = tuple(
    Part("lora", f"L{layer}.{m}", {"rank": 16, "alpha": 32.0}, 1e-2)
    for layer in (1, 2)
    for m in ("W_Q", "W_V", "W_O", "W_in", "W_out")
)


def sayable(scale: float) -> Model:
    """The tiny Llama, its unembedding as many times as long."""
    plain = load_model(tiny_folder("llama"))
    hf = AutoModelForCausalLM.from_pretrained(tiny_folder("llama"))
    assert hf.lm_head.weight is not hf.model.embed_tokens.weight
    with torch.no_grad():
        hf.lm_head.weight *= scale
    return load_model((hf, plain.tokenizer))


def floor(model: Model, task: Task) -> float:
    """The least text loss over all states that could reach the final norm, a mean over the eight examples."""
    ids = sorted({i for answer in task.answers for i in answer})
    x = torch.randn(
        len(ids), model.d_model, generator=torch.Generator().manual_seed(0)
    ).requires_grad_()
    optimiser = torch.optim.Adam([x], lr=0.1)
    for _ in range(400):
        loss = torch.nn.functional.cross_entropy(
            model.finish(x, None, "vocabulary"), torch.tensor(ids), reduction="none"
        )
        optimiser.zero_grad()
        loss.sum().backward()
        optimiser.step()
    least = dict(zip(ids, loss.tolist(), strict=True))
    answers = [task.answers[task.verbalizer.index(e.polarity)] for e in EIGHT]
    return sum(sum(least[i] for i in answer) / len(answer) for answer in answers) / len(answers)


@pytest.mark.slow
@pytest.mark.parametrize(
    "scale, reached", [(1.0, None), (4.0, 1e-3)], ids=["as it is", "able to say every token"]
)
def test_eight_examples_by_heart_over_the_whole_vocabulary(scale, reached):
    model = sayable(scale)
    least = floor(model, Task(model, "text", TEMPLATE, None, PrefixCache(model)))
    edit = fit(
        model,
        EIGHT,
        Preset("heart", PARTS, epochs=80, batch_size=8, loss="text", schedule="cosine"),
        template=TEMPLATE,
    )
    last = edit.history[-1]["loss"]
    assert least - 1e-3 <= last <= least + 0.01, (
        "no edit goes below the floor, and this one comes to it"
    )
    if reached is None:
        assert least > 0.1, "360 random columns in 32 dimensions overlap"
    else:
        assert last < reached < 2 < edit.history[0]["loss"]
