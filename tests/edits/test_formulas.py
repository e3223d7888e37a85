"""Every formula against somebody else's code, or against the equation written out on copied weights."""

from __future__ import annotations

import math

import pytest
import torch
from support.edit_cases import hugging_face, logits, loud, prompts, tiny_model
from support.tiny_models import tiny_folder
from transformers import AutoModelForCausalLM, DynamicCache

from mech_absa.edits import Edit, Matrix, Part, Shape, count
from mech_absa.edits.base import Where
from mech_absa.edits.heads import HIGH, LOW, TEMPERATURE, HeadGate
from mech_absa.edits.rivals import PostBlock
from mech_absa.model import load_model
from mech_absa.prompts import Tokens
from mech_absa.sites import Site

CLOSE = {
    "atol": 2e-4,
    "rtol": 1e-4,
}  # logits have a standard deviation of about two; the two forward passes differ by 1e-5
LLAMA = {
    "W_Q": "self_attn.q_proj", "W_K": "self_attn.k_proj", "W_V": "self_attn.v_proj", "W_O": "self_attn.o_proj",
    "W_in": "mlp.up_proj", "W_gate": "mlp.gate_proj", "W_out": "mlp.down_proj",
}  # fmt: skip


@pytest.fixture
def llama():
    return tiny_model("llama")


@pytest.mark.parametrize(
    "family, rank_stabilised", [("lora", False), ("lora", True), ("dora", False)]
)
@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_low_rank_edits_equal_peft(arch, family, rank_stabilised):
    peft = pytest.importorskip(
        "peft", reason="peft is not installed: pip install mech-absa[oracles]"
    )
    model = tiny_model(arch)
    options = {"rank": 3, "alpha": 5.0, "rank_stabilised": rank_stabilised}
    edit = loud(model, *[Part(family, f"L{layer}.{m}", options) for layer in (1, 2) for m in LLAMA])
    config = peft.LoraConfig(
        r=3, lora_alpha=5, use_rslora=rank_stabilised, use_dora=family == "dora", lora_dropout=0.0,
        target_modules=[m.split(".")[1] for m in LLAMA.values()], layers_to_transform=[1, 2],
    )  # fmt: skip
    theirs = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_folder(arch), attn_implementation="eager"), config
    ).eval()
    layers = theirs.base_model.model.model.layers
    with torch.no_grad():
        for ours in edit:
            module = layers[ours.place.layer].get_submodule(LLAMA[ours.place.name])
            module.lora_A["default"].weight.copy_(ours.A.T)
            module.lora_B["default"].weight.copy_(ours.B.T)
            if family == "dora":
                module.lora_magnitude_vector["default"].weight.copy_(ours.m)
    for tokens in prompts(model):
        with torch.no_grad():
            want = theirs(tokens.ids).logits
        assert not torch.allclose(want, logits(model, tokens), **CLOSE)  # the edit is loud
        torch.testing.assert_close(logits(model, tokens, edit), want, **CLOSE)


def pyreft(family: str, h: torch.Tensor, R, W, b) -> torch.Tensor:
    """The interventions of pyreft, from their equations, on the states [token d] of the chosen positions."""
    source = torch.nn.functional.linear(h, W, b)
    rotated = torch.nn.functional.linear(h, R)
    return h + torch.matmul(source if family == "direft" else source - rotated, R)


@pytest.mark.parametrize("family", ["loreft", "noreft", "direft"])
@pytest.mark.parametrize("arch", ["llama", "gpt2", "pythia"])
def test_reft_equals_the_equations_hooked_into_hugging_face(arch, family):
    model, hf = tiny_model(arch), hugging_face(arch)
    edit = loud(
        model,
        Part(family, "L1.resid_post@query.last", {"rank": 3}),
        Part(family, "L2.resid_post@-2", {"rank": 2}),
    )
    blocks = {
        "llama": lambda: hf.model.layers,
        "gpt2": lambda: hf.transformer.h,
        "pythia": lambda: hf.gpt_neox.layers,
    }[arch]()
    for tokens in prompts(model):
        where = {1: tokens.positions("query.last"), 2: [tokens.lengths[0] - 2]}
        handles = []
        for i in edit:
            R = i.R if family == "loreft" else i.W2

            def hook(module, args, output, i=i, R=R, spots=where[i.place.layer]):
                h = (output if torch.is_tensor(output) else output[0]).clone()
                h[0, spots] = pyreft(family, h[0, spots], R, i.W, i.b)
                return h if torch.is_tensor(output) else (h, *output[1:])

            handles.append(blocks[i.place.layer].register_forward_hook(hook))
        with torch.no_grad():
            want = hf(tokens.ids).logits
        for handle in handles:
            handle.remove()
        torch.testing.assert_close(logits(model, tokens, edit), want, **CLOSE)


@pytest.mark.parametrize("arch", ["llama", "gpt2", "gemma2", "qwen2"])
def test_a_prefix_equals_a_longer_key_value_cache(arch):
    model, hf, n = tiny_model(arch), hugging_face(arch), 3
    if (
        arch == "gemma2"
    ):  # its window must hold prefix and prompt: the two count the distance to a prefix differently
        hf = AutoModelForCausalLM.from_pretrained(
            tiny_folder(arch), attn_implementation="eager", sliding_window=200
        ).eval()
        model = load_model((hf, model.tokenizer))
    edit = loud(
        model, *[Part("prefix", f"L{layer}", {"length": n}) for layer in range(model.n_layers)]
    )
    tokens = prompts(model)[0]
    cache = DynamicCache()
    for i in edit:
        cache.update(
            i.P_K.detach().transpose(0, 1)[None],
            i.P_V.detach().transpose(0, 1)[None],
            i.place.layer,
        )
    positions = torch.arange(tokens.lengths[0])[None]
    with torch.no_grad():
        want = hf(
            tokens.ids,
            past_key_values=cache,
            position_ids=positions,
            attention_mask=torch.ones(1, n + tokens.lengths[0]),
        ).logits
    assert not torch.allclose(want, logits(model, tokens), **CLOSE)
    torch.testing.assert_close(logits(model, tokens, edit), want, **CLOSE)


def test_full_fine_tuning_equals_changed_weights(llama):
    from copy import deepcopy

    edit = loud(
        llama, *[Part("full", f"L{layer}.{m}") for layer in (0, 2) for m in LLAMA], size=0.05
    )
    hf = deepcopy(hugging_face("llama"))
    with torch.no_grad():
        for i in edit:
            hf.model.layers[i.place.layer].get_submodule(LLAMA[i.place.name]).weight += i.D.T
    tokens = prompts(llama)[1]
    with torch.no_grad():
        torch.testing.assert_close(logits(llama, tokens, edit), hf(tokens.ids).logits, **CLOSE)


def test_bitfit_equals_changed_biases():
    from copy import deepcopy

    model = tiny_model("gpt2")
    edit = loud(model, *[Part("bitfit", f"L1.{m}") for m in Shape.of(model).matrices])
    assert [i.place.name for i in edit] == ["W_Q", "W_K", "W_V", "W_O", "W_in", "W_out"]
    hf = deepcopy(hugging_face("gpt2"))
    b = {i.place.name: i.b for i in edit}
    block = hf.transformer.h[1]
    with torch.no_grad():
        block.attn.c_attn.bias += torch.cat([b["W_Q"], b["W_K"], b["W_V"]])
        block.attn.c_proj.bias += b["W_O"]
        block.mlp.c_fc.bias += b["W_in"]
        block.mlp.c_proj.bias += b["W_out"]
        tokens = prompts(model)[1]
        torch.testing.assert_close(logits(model, tokens, edit), hf(tokens.ids).logits, **CLOSE)


@pytest.mark.parametrize(
    "family, options, equation",
    [
        (
            "adapter",
            {"rank": 5, "f": "gelu"},
            lambda i, h: h + torch.nn.functional.gelu(h @ i.W_down) @ i.W_up,
        ),
        ("red", {}, lambda i, h: i.l_s * h + i.l_b),
        ("steering", {}, lambda i, h: h + i.v),
    ],
)
def test_the_other_representation_edits_equal_their_equations(llama, family, options, equation):
    edit = loud(llama, Part(family, "L1.mlp_out", options))
    hf = hugging_face("llama")
    (i,) = edit
    handle = hf.model.layers[1].mlp.register_forward_hook(
        lambda module, args, out: equation(i, out)
    )
    tokens = prompts(llama)[1]
    with torch.no_grad():
        want = hf(tokens.ids).logits
    handle.remove()
    torch.testing.assert_close(logits(llama, tokens, edit), want, **CLOSE)


def test_steering_after_a_block_by_hand():
    """d = 2, rank 1: SiLU(h . w) = 1 / (1 + e^-1) at h . w = 1; alpha and W_up scale it; no bias, so that 0 stays 0."""
    shape = Shape(1, 2, 1, 1, 2, 2, True)
    steerer = PostBlock(Site(0, "resid_post"), shape, rank=1, alpha=2.0)
    with torch.no_grad():
        steerer.W_down.copy_(torch.tensor([[1.0], [-1.0]]))
        steerer.W_up.copy_(torch.tensor([[3.0, 0.5]]))
    shift = 2 / (1 + math.exp(-1.0))
    h = torch.tensor([[4.0, 3.0], [0.0, 0.0], [1.0, 1.0]])
    want = torch.tensor([[4 + 3 * shift, 3 + shift / 2], [0.0, 0.0], [1.0, 1.0]])
    torch.testing.assert_close(steerer(h), want)


def test_steering_after_a_block_equals_its_equation_in_hugging_face(llama):
    """On every token of the layer's output; it starts as the identity, with W_down within 1e-3 / sqrt(d)."""
    part = Part("post_block", "L1.resid_post", {"rank": 4, "alpha": 1.5})
    (fresh,) = Edit.fresh(llama, [part])
    bound = 1e-3 / math.sqrt(llama.d_model)
    assert not fresh.W_up.any() and bound / 2 < fresh.W_down.detach().abs().max() <= bound
    tokens = prompts(llama)[1]
    assert torch.equal(logits(llama, tokens, Edit.fresh(llama, [part])), logits(llama, tokens))
    edit = loud(llama, part)
    (i,) = edit

    def hook(module, args, out):
        h = out if torch.is_tensor(out) else out[0]
        low = h @ i.W_down
        new = h + 1.5 * (low / (1 + torch.exp(-low))) @ i.W_up
        return new if torch.is_tensor(out) else (new, *out[1:])

    hf = hugging_face("llama")
    handle = hf.model.layers[1].register_forward_hook(hook)
    with torch.no_grad():
        want = hf(tokens.ids).logits
    handle.remove()
    torch.testing.assert_close(logits(llama, tokens, edit), want, **CLOSE)


def test_tinylora_by_hand():
    """A diagonal W of the query: its two largest entries, 5 and 3, are S, and their axes U and V.

    With P_1 = [[1, 2], [0, 0]], P_2 = [[0, 0], [0, 1]] and v = (10, 100), S R = [[50, 100], [0, 300]]
    (a row per output): output 0 loses 50 x_0 + 100 x_2 (V_0 is e_0, so that U_0 is -e_0), output 2 gains 300 x_2.
    """
    model = load_model(tiny_folder("llama"))
    matrix = Matrix(1, "W_Q")
    diagonal = torch.full((32,), 0.5)
    diagonal[0], diagonal[2] = -5.0, 3.0
    matrix.set_weight(model, torch.diag(diagonal))
    (i,) = Edit.fresh(model, [Part("tinylora", "L1.W_Q", {"u": 2})])
    assert set(i.trainable) == {"v"} and not i.v.any()
    with torch.no_grad():
        i.P.copy_(torch.tensor([[[1.0, 2.0], [0.0, 0.0]], [[0.0, 0.0], [0.0, 1.0]]]))
        i.v.copy_(torch.tensor([10.0, 100.0]))
    want = torch.zeros(32, 32, dtype=torch.float64)
    want[0, 0], want[2, 0], want[2, 2] = (
        -50,
        -100,
        300,
    )  # a row per input
    torch.testing.assert_close(i.update(), want, atol=1e-9, rtol=1e-9)
    x = torch.arange(64.0).view(1, 2, 32)
    torch.testing.assert_close(i.change(torch.ones(1, 2, 32), x, model), 1 + x @ want.float())


def test_tinylora_equals_the_dense_formula_in_hugging_face(llama):
    """dW = U S (sum v_i P_i) V^T with the SVD of Hugging Face's weights, at every matrix; two of them share v."""
    from copy import deepcopy

    parts = [Part("tinylora", f"L{layer}.{m}", {"u": 3}) for layer in (1, 2) for m in LLAMA]
    parts[3] = Part("tinylora", "L1.W_O", {"u": 3, "shared_with": "L1.W_Q"})
    edit = loud(llama, *parts)
    hf = deepcopy(hugging_face("llama"))
    assert edit.n_parameters == count(parts, Shape.of(llama)) == 13 * 3
    v = {str(i.place): i.v for i in edit}
    v["L1.W_O"] = v["L1.W_Q"]
    with torch.no_grad():
        for i in edit:
            weight = hf.model.layers[i.place.layer].get_submodule(LLAMA[i.place.name]).weight
            U, S, Vt = (t.double() for t in torch.linalg.svd(weight.double(), full_matrices=False))
            turn = torch.diag((Vt[:2] @ i.V.double()).diagonal().sign())  # our choice of signs
            R = sum(a * P for a, P in zip(v[str(i.place)].double(), i.P.double(), strict=True))
            weight += (U[:, :2] @ turn @ S[:2].diag() @ R @ turn @ Vt[:2]).float()
    for tokens in prompts(llama):
        with torch.no_grad():
            want = hf(tokens.ids).logits
        assert not torch.allclose(want, logits(llama, tokens), **CLOSE)
        torch.testing.assert_close(logits(llama, tokens, edit), want, **CLOSE)


def test_tinylora_equals_peft(llama):
    """On copied factors, P and v; peft's own factors, which split S, have the same product."""
    peft = pytest.importorskip(
        "peft", reason="peft is not installed: pip install mech-absa[oracles]"
    )
    if not hasattr(peft, "TinyLoraConfig"):
        pytest.skip("this peft has no TinyLoRA; 0.21 has")
    edit = loud(llama, *[Part("tinylora", f"L{layer}.{m}") for layer in (1, 2) for m in LLAMA])
    config = peft.TinyLoraConfig(
        r=2, u=4, target_modules=[m.split(".")[1] for m in LLAMA.values()], layers_to_transform=[1, 2]
    )  # fmt: skip
    theirs = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny_folder("llama"), attn_implementation="eager"),
        config,
    ).eval()
    layers = theirs.base_model.model.model.layers
    with torch.no_grad():
        for i in edit:
            module = layers[i.place.layer].get_submodule(LLAMA[i.place.name])
            own = module.tinylora_B["default"] @ module.tinylora_A["default"]
            torch.testing.assert_close(own, i.US @ i.V.T, atol=1e-5, rtol=1e-4)
            module.tinylora_A["default"], module.tinylora_B["default"] = i.V.T, i.US
            module.tinylora_P["default"] = i.P
            module.tinylora_v["default"][module._tinylora_v_key["default"]].copy_(i.v)
        for tokens in prompts(llama):
            want = theirs(tokens.ids).logits
            assert not torch.allclose(want, logits(llama, tokens), **CLOSE)
            torch.testing.assert_close(logits(llama, tokens, edit), want, **CLOSE)


def test_a_head_edit_sees_one_head_and_changes_one_head(llama):
    edit = loud(llama, Part("steering", "L1.head2@-1"))
    hf, (i,), d = hugging_face("llama"), edit, llama.d_head

    def pre(module, args):
        z = args[0].clone()
        z[0, -1, 2 * d : 3 * d] += i.v
        return (z,)

    handle = hf.model.layers[1].self_attn.o_proj.register_forward_pre_hook(pre)
    tokens = prompts(llama)[1]
    with torch.no_grad():
        want = hf(tokens.ids).logits
    handle.remove()
    torch.testing.assert_close(logits(llama, tokens, edit), want, **CLOSE)


def head_gate(log_g=None, **options) -> HeadGate:
    """A gate of the tiny Llama (3 layers of 4 heads), in evaluation."""
    model = tiny_model("llama")
    gate = HeadGate(Site(1, "head", 0), Shape.of(model), **options)
    gate.reset(model, torch.Generator().manual_seed(0))
    if log_g is not None:
        with torch.no_grad():
            gate.log_alpha.copy_(torch.tensor(log_g))
    return gate.eval()


def test_gates_in_evaluation():
    """By hand: clamp(1.2 sigmoid(x) - 0.1, 0, 1), which is 0.7773 for x = 1 in JoLA's code; the former variant divides x by 0.33 first."""
    ours = torch.tensor([1.2 / (1 + math.exp(-1.0)) - 0.1, 0.5])
    assert torch.allclose(head_gate([1.0, 0.0]).gates(), ours, atol=1e-6)
    assert float(ours[0]) == pytest.approx(0.77727, abs=1e-5)
    assert head_gate([-9.0, 9.0]).gates().tolist() == [0.0, 1.0]
    former = head_gate([1.0, 0.3], gates="tempered").gates().detach()
    assert former[0] == 1 and float(former[1]) == pytest.approx(
        1.2 / (1 + math.exp(-0.3 / 0.33)) - 0.1, abs=1e-6
    )


@pytest.mark.parametrize("gates", ["hard_concrete", "tempered"])
def test_gates_are_open_as_often_as_the_closed_form_says(gates):
    gate = head_gate([-0.5, 0.7], gates=gates).train()
    torch.manual_seed(0)
    with torch.no_grad():
        drawn = torch.stack([gate.gates() for _ in range(4000)])
    assert torch.allclose((drawn > 0).float().mean(0), gate.open(), atol=0.03)
    closed = torch.sigmoid(gate.log_alpha - TEMPERATURE * torch.log(torch.tensor(-LOW / HIGH)))
    assert torch.allclose(gate.open(), closed)


def test_the_charge_is_that_of_jola():
    """Its code, over all heads: the mean over a layer's heads, summed over layers, lambda for the shifts, over layers x heads."""
    layers, heads, step = 3, 4, 50
    model = tiny_model("llama")
    gates = [
        HeadGate(Site(layer, "head", h), Shape.of(model))
        for layer in range(layers)
        for h in range(heads)
    ]
    log_g = torch.randn(2, layers, heads, generator=torch.Generator().manual_seed(1))
    for i, gate in enumerate(gates):
        gate.reset(model, torch.Generator().manual_seed(i))
        with torch.no_grad():
            gate.log_alpha.copy_(log_g[:, i // heads, i % heads])
    p = torch.sigmoid(log_g - 0.33 * math.log(0.1 / 1.1)).clamp(1e-6, 1 - 1e-6)
    multiplicative, additive = p.mean(-1).sum(-1)
    share = 0.1 * math.exp(-0.01 * step)
    want = (share * additive + (1 - share) * multiplicative) / (layers * heads)
    got = torch.stack([gate.penalty(step) for gate in gates]).sum()
    assert float(got.detach()) == pytest.approx(float(want), rel=1e-5)


def test_gates_start_as_in_jola():
    """Xavier-uniform over [heads, 1]: the bound is sqrt(6 / (heads + 1)), and the draws fill it; the former variant starts at 0."""
    model, bound = tiny_model("llama"), math.sqrt(6 / 5)
    gate, generator = (
        HeadGate(Site(1, "head", 0), Shape.of(model)),
        torch.Generator().manual_seed(0),
    )
    drawn = []
    for _ in range(400):
        gate.reset(model, generator)
        drawn += gate.log_alpha.tolist()
    assert max(map(abs, drawn)) <= bound < max(map(abs, drawn)) + 0.05
    assert torch.tensor(drawn).std().item() == pytest.approx(math.sqrt(2 / 5), rel=0.1)
    assert not head_gate(gates="tempered").log_alpha.any()


def test_where_counts_inside_the_prompt():
    roles = torch.tensor([[0, 2, 9, 10, -1, -1], [0, 4, 5, 9, 10, -1]])
    where = Where(
        Tokens(torch.zeros_like(roles), roles, (5, 6))
    )  # one generated token each, one of them padded
    cpu = torch.device("cpu")
    assert [t.tolist() for t in where.index("query.last", cpu)] == [[0, 1], [2, 3]]
    assert [t.tolist() for t in where.index(-1, cpu)] == [[0, 1], [3, 4]]
    assert [t.tolist() for t in where.index(-5, cpu)] == [
        [1],
        [0],
    ]  # the first prompt has four tokens
    assert [t.tolist() for t in where.index(4, cpu)] == [[1], [4]]
    assert where.index("all", cpu)[0].tolist() == [0] * 4 + [1] * 5
    assert where.index(None, cpu) is None


@pytest.mark.parametrize("name", ["W_Q", "W_K", "W_V", "W_O", "W_in", "W_gate", "W_out"])
def test_a_matrix_is_read_and_written_where_it_stands(llama, name):
    """Its recorded input times its weight is its recorded output; what is set is what is read."""
    from mech_absa.model.hooks import hooked_at

    matrix, seen = Matrix(1, name), {}

    def keep(key):
        return lambda y: seen.__setitem__(key, y.flatten(2) if y.ndim == 4 else y)

    with (
        hooked_at([(matrix.reads(llama), keep("x")), (matrix.writes(llama), keep("y"))]),
        torch.no_grad(),
    ):
        llama.forward(prompts(llama)[0].ids)
    W, b = matrix.weight(llama)
    assert W.shape == matrix.size(Shape.of(llama))
    torch.testing.assert_close(
        seen["x"] @ W + (0 if b is None else b), seen["y"], atol=1e-5, rtol=1e-5
    )
    kept = W.clone()
    matrix.set_weight(llama, 2 * kept)
    torch.testing.assert_close(matrix.weight(llama)[0], 2 * kept, atol=0, rtol=0)
    matrix.set_weight(llama, kept)
