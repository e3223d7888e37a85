"""Tiny models, loaded once; a few prompts of different lengths; edits whose parameters are large enough to be seen."""

from __future__ import annotations

from functools import cache

import torch
from transformers import AutoModelForCausalLM

from mech_absa.edits import Edit, Part
from mech_absa.examples import Example, Polarity
from mech_absa.model import Model, load_model
from mech_absa.prompts import PromptTemplate, Tokens
from mech_absa.scoring import question
from support.tiny_models import tiny_folder

TEMPLATE = PromptTemplate("{sentence} aspect {aspect} :")
SENTENCES = (
    ("the food was great", "food", Polarity.POSITIVE),
    ("awful service and the wine list was terrible", "wine list", Polarity.NEGATIVE),
    ("the screen is fine", "screen", Polarity.NEUTRAL),
)
EVERYWHERE = {  # one part of every family, on the last layers of a model of three
    "loreft": "L1.resid_post@query.last", "noreft": "L1.resid_mid@aspect", "direft": "L2.resid_pre@-1", "red": "L1.attn_out@all",
    "steering": "L1.head1@query", "lora": "L1.W_O", "dora": "L1.W_Q", "prefix": "L1", "adapter": "L2.mlp_out", "bitfit": "L1.W_V",
    "full": "L2.W_out", "head_gate": "L1.head0", "post_block": "L1.resid_post", "tinylora": "L1.W_in",
    "reft_r1": "L1.resid_post@all",
}  # fmt: skip


@cache
def tiny_model(arch: str, dtype: str = "float32") -> Model:
    return load_model(tiny_folder(arch), dtype=dtype)


@cache
def hugging_face(arch: str):
    return AutoModelForCausalLM.from_pretrained(
        tiny_folder(arch), attn_implementation="eager"
    ).eval()


def examples() -> list[Example]:
    return [Example(s, a, p, (s.index(a), s.index(a) + len(a))) for s, a, p in SENTENCES]


def prompts(model: Model) -> list[Tokens]:
    return [question(model, e, TEMPLATE) for e in examples()]


def loud(model: Model, *parts: Part, seed: int = 1, size: float = 0.3) -> Edit:
    """A fresh edit with every parameter moved at random, so that no part of its formula is zero."""
    edit = Edit.fresh(model, parts, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in edit.parameters():
            p += size * torch.randn(p.shape, generator=generator)
    edit.settle()
    return edit


@torch.no_grad()
def logits(model: Model, tokens: Tokens, edit: Edit | None = None) -> torch.Tensor:
    """[batch pos d_vocab], edited where an edit is given."""
    if edit is None:
        return model.forward(tokens.ids)
    with edit.applied(model, tokens):
        return model.forward(tokens.ids)
