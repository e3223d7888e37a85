"""The peer of the training benchmark computes what we compute: the same loss and the same gradients, before and after steps. No times."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
import transformers
from support import fast

from mech_absa.edits import Edit
from mech_absa.model.kernels import ONEDNN
from mech_absa.readers import load_examples
from mech_absa.train import PrefixCache, fit
from mech_absa.train.task import Task

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "train.py"
if not SCRIPT.exists():
    pytest.skip("the benchmarks are not part of an installed package", allow_module_level=True)
spec = importlib.util.spec_from_file_location("train_benchmark", SCRIPT)
assert spec is not None and spec.loader is not None
bench = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)


SMALL = {
    "n_embd": 32,
    "n_layer": 4,
    "n_head": 4,
    "n_positions": 128,
    "vocab_size": 4096,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.mark.parametrize("arch", fast(["bundled", "gpt2"], ["gpt2"]))
def test_both_sides_train_the_same_edit(arch):
    hf, model = (
        bench.bundled()
        if arch == "bundled"
        else bench.random_weights(transformers.GPT2Config(**SMALL))
    )
    examples = load_examples("builtin:restaurant/train").sample(20).items
    how = bench.preset(range(1, 3), epochs=2)
    task = Task(model, "labels", None, None, PrefixCache(model))
    questions = task.prepare(examples)
    edit = Edit.fresh(model, how.parts, 0)
    peer = bench.Peer(hf, edit)
    try:
        labels = torch.tensor([ids[0] for _, ids in sorted(task.continuations[0].labels)])
        batch = questions[:8]
        ours, theirs = task.loss(edit, batch) / len(batch), peer.loss(batch, labels)
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)
        ours.backward()
        theirs.backward()
        for mine, other in zip(edit, peer.parameters, strict=True):
            for name, p in mine.named_parameters():
                torch.testing.assert_close(p.grad, other[name].grad, rtol=1e-3, atol=1e-6)
        edit.zero_grad()
        peer.hf.zero_grad()
        peer.parameters.zero_grad()
        before = ours.item()
        peer.train(questions, labels, how, 0)
        trained = fit(model, examples, how, seed=0)
        with torch.no_grad():
            ours, theirs = task.loss(trained, batch) / len(batch), peer.loss(batch, labels)
        assert ours.item() == pytest.approx(theirs.item(), rel=1e-3)
        assert ours.item() < before, "both have learnt"
    finally:
        peer.close()


def test_the_switch_is_put_back():
    before = ONEDNN
    with bench.without_onednn():
        assert bench.kernels.ONEDNN is False
    assert bench.kernels.ONEDNN is before
    assert bench.studies(12)["three epochs"] == [(range(4, 8), 3, 0)]
    assert [r for r, _, seed in bench.studies(12)["layer-range study"] if seed == 0] == [
        range(4, 8),
        range(4, 6),
        range(6, 8),
    ]
