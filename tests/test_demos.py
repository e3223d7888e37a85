"""The patching demos of TransformerLens, run twice: as they are, and with their import changed.

The text below is the code of `demos/Activation_Patching_in_TL_Demo.ipynb` and
`demos/Exploratory_Analysis_Demo.ipynb` (TransformerLens 3.9 and 4.3) without its plots.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support import fast
from support.tiny_models import tiny_folder

import mech_absa as ma
from mech_absa.errors import ModelError
from mech_absa.model.downloads import SMOLLM2, here

DEMO = """
from transformer_lens import patching

clean_logits, clean_cache = model.run_with_cache(clean_tokens)
corrupted_logits, corrupted_cache = model.run_with_cache(corrupted_tokens)

def get_logit_diff(logits, answer_token_indices=answer_token_indices):
    if len(logits.shape) == 3:
        logits = logits[:, -1, :]
    correct_logits = logits.gather(1, answer_token_indices[:, 0].unsqueeze(1))
    incorrect_logits = logits.gather(1, answer_token_indices[:, 1].unsqueeze(1))
    return (correct_logits - incorrect_logits).mean()

CLEAN_BASELINE = get_logit_diff(clean_logits).item()
CORRUPTED_BASELINE = get_logit_diff(corrupted_logits).item()

def ioi_metric(logits, answer_token_indices=answer_token_indices):
    return (get_logit_diff(logits, answer_token_indices) - CORRUPTED_BASELINE) / (
        CLEAN_BASELINE - CORRUPTED_BASELINE
    )

results = {}
given = (model, corrupted_tokens, clean_cache, ioi_metric)
results["resid_pre"] = patching.get_act_patch_resid_pre(*given)
every_block_result = patching.get_act_patch_block_every(*given)
results["every block"] = every_block_result
results["head out, all positions"] = patching.get_act_patch_attn_head_out_all_pos(*given)
results["head out, by position"] = patching.get_act_patch_attn_head_out_by_pos(*given)
if everything:
    results["resid_mid"] = patching.get_act_patch_resid_mid(*given)
    results["attn_out"] = patching.get_act_patch_attn_out(*given)
    results["mlp_out"] = patching.get_act_patch_mlp_out(*given)
    results["value"] = patching.get_act_patch_attn_head_v_all_pos(*given)
    results["pattern"] = patching.get_act_patch_attn_head_pattern_all_pos(*given)
    results["all heads, all positions"] = patching.get_act_patch_attn_head_all_pos_every(*given)
    results["all heads, by position"] = patching.get_act_patch_attn_head_by_pos_every(*given)
"""
SAMPLE = DEMO.replace(
    "patching.get_act_patch_attn_head_out_by_pos(*given)",
    'patching.generic_activation_patch(*given, patching.layer_pos_head_vector_patch_setter, "z", '
    "index_axis_names=None, index_df=cells)",
).replace(
    "patching.get_act_patch_block_every(*given)",
    'patching.generic_activation_patch(*given, patching.layer_pos_patch_setter, "mlp_out", '
    'index_axis_names=None, index_df=cells[["layer", "pos"]].drop_duplicates())',
)
"""The same with some cells of the sweeps over heads and blocks, for a model of 30 layers."""


def both(code: str, model: Any, tokens: torch.Tensor, answers: torch.Tensor, **more: Any) -> float:
    """Run the demo with either import; return the largest difference of any result.

    `tokens` holds prompts in neighbouring pairs; the corrupted prompt of each is the other one.
    """
    swapped = [i + 1 if i % 2 == 0 else i - 1 for i in range(len(tokens))]
    found = []
    for changed in (False, True):
        text = (
            code.replace("from transformer_lens import", "from mech_absa import")
            if changed
            else code
        )
        names: dict[str, Any] = dict(
            model=model, clean_tokens=tokens, corrupted_tokens=tokens[swapped],
            answer_token_indices=answers, **more,
        )  # fmt: skip
        with torch.inference_mode():
            exec(compile(text, "demo", "exec"), names)
        found.append(names["results"])
        if changed:
            assert names["patching"].__name__ == "mech_absa.patching"
    theirs, ours = found
    assert list(theirs) == list(ours) and len(theirs) >= 4
    for name in theirs:
        assert theirs[name].shape == ours[name].shape, name
        assert theirs[name].max() - theirs[name].min() > 1e-3, f"{name} is flat and proves nothing"
    return max(float((theirs[n] - ours[n]).abs().max()) for n in theirs)


def encoded(model: ma.model.Model, texts: list[str]) -> torch.Tensor:
    bos = [model.tokenizer.bos_token_id] if model.bos else []
    rows = [[*bos, *model.tokenizer(t, add_special_tokens=False).input_ids] for t in texts]
    assert len({len(row) for row in rows}) == 1, "prompts of a demo have as many tokens"
    return torch.tensor(rows)


def answer_ids(model: ma.model.Model, pairs: list[tuple[str, str]]) -> torch.Tensor:
    """Return the token of each answer, as it follows a word: tokenizers differ in where they put the blank."""

    def ids(text: str) -> list[int]:
        found: list[int] = model.tokenizer(text, add_special_tokens=False).input_ids
        return found

    answers = [[ids(f"the{word}")[len(ids("the")) :] for word in pair] for pair in pairs]
    assert all(len(one) == 1 for pair in answers for one in pair), "answers are one token"
    return torch.tensor([[one[0] for one in pair] for pair in answers])


@pytest.mark.filterwarnings("ignore:the exact loop of TransformerLens runs")
@pytest.mark.parametrize("arch", fast(["gpt2", "llama", "pythia", "gemma2"], []))
def test_the_demo_gives_the_same_numbers_on_a_small_model(arch):
    model = ma.load_model(str(tiny_folder(arch)))
    words = [(" staff", " key"), (" key", " staff"), (" The", " was"), (" was", " The")]
    texts = [f"the{a}{b} the food was,{b} the food the" for a, b in words]
    everything = arch != "pythia"  # parallel blocks have no resid_mid
    off = both(
        DEMO, model.hooked, encoded(model, texts), answer_ids(model, words), everything=everything
    )
    assert off < 1e-4


IOI = [
    ("When John and Mary went to the shops,{} gave the bag to", (" John", " Mary")),
    ("When Tom and James went to the park,{} gave the ball to", (" Tom", " James")),
]
"""Sentences of the demo; in each, the name that is not given again is the answer."""
FACTS = [
    (
        ("The city of Paris is the capital of", " France"),
        ("The city of Rome is the capital of", " Italy"),
    ),
]
"""Two cities of one token each; every prompt is the corrupted one of the other."""


def smollm2() -> ma.model.Model:
    try:
        here(SMOLLM2)
    except ModelError as error:
        pytest.skip(str(error))
    return ma.load_model(SMOLLM2)


@pytest.mark.slow
@pytest.mark.parametrize("task", ["indirect objects", "facts"])
def test_the_demo_gives_the_same_numbers_on_smollm2(task):
    """And the model knows the answers: each clean run prefers its own."""
    import pandas as pd

    model = smollm2()
    if task == "facts":
        texts = [text for pair in FACTS for text, _ in pair]
        answers = [(a, b) if i == 0 else (b, a) for (_, a), (_, b) in FACTS for i in (0, 1)]
    else:
        (form, names), *_ = IOI
        texts = [form.format(name) for name in names[::-1]]
        answers = [names, names[::-1]]
    tokens, ids = encoded(model, texts), answer_ids(model, answers)
    with torch.inference_mode():
        last = model.forward(tokens)[:, -1]
    assert (last.gather(1, ids[:, :1]) > last.gather(1, ids[:, 1:])).all()
    cells = pd.DataFrame(
        [(x, t, h) for x in (0, 14, 29) for t in range(2, tokens.shape[1], 4) for h in (0, 4, 8)],
        columns=["layer", "pos", "head"],
    )
    off = both(SAMPLE, model.hooked, tokens, ids, everything=False, cells=cells)
    assert off < 1e-4
