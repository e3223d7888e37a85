"""Models load from anywhere on this machine, are the model that Hugging Face has, and are refused in one sentence otherwise."""

from __future__ import annotations

import copy
import json
import re
import shutil
import socket
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from support import fast
from support.tiny_models import METASPACE, byte_level_tokenizer, tiny_folder, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from mech_absa.errors import ConfigError, ModelError, SiteError
from mech_absa.model import Model, load_model, logits_of, run, weights_hash
from mech_absa.model import huggingface as models
from mech_absa.sites import Site

TEXT = "The food was great but the waiters were dreadful, and the wine list was terrible."


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """A connection that is tried at all fails the test, whatever becomes of it."""
    tried = []

    def refuse(*args, **kwargs):
        tried.append(args)
        raise OSError("no network in tests")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    yield
    assert tried == []


def ids_of(model: Model, text: str = TEXT) -> torch.Tensor:
    return model.tokenizer(text, return_tensors="pt").input_ids


# ---- the same model ---------------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_a_folder_of_every_architecture(tiny):
    """Logits, pieces and bookkeeping; longer than any sliding window of the tiny models."""
    model = load_model(tiny, device="cpu")
    # Others leave out Gemma 2's soft cap in transformers 5.9.
    hf = AutoModelForCausalLM.from_pretrained(tiny, attn_implementation="eager")
    ids = torch.cat([ids_of(model), ids_of(model).flip(1)])
    theirs = hf(ids).logits
    ours = model.forward(ids)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    torch.testing.assert_close(model.hooked(ids), theirs, rtol=0, atol=1e-4)

    assert model.refusal is None
    kept = frozenset(
        (
            "resid_pre",
            "q",
            "k",
            "v",
            "z",
            "projected",
            "attn_out",
            "resid_mid",
            "mlp_out",
            "resid_post",
        )
    )
    last, states = run(model, model.embed(ids), kept)
    pieces = logits_of(model, last.flatten(0, 1)).unflatten(0, tuple(ids.shape))
    torch.testing.assert_close(pieces, ours, rtol=0, atol=1e-4)
    _, cache = model.hooked.run_with_cache(ids)
    for layer, state in enumerate(states):
        for kind in (
            "resid_pre",
            "attn_out",
            "mlp_out",
            "resid_post",
            *(["resid_mid"] if "resid_mid" in model.kinds else []),
        ):
            torch.testing.assert_close(
                getattr(state, kind), cache[Site(layer, kind).hook_name], rtol=0, atol=1e-4
            )
        torch.testing.assert_close(
            state.z, cache[Site(layer, "head", 0).hook_name], rtol=0, atol=1e-4
        )

    assert model.hf_difference is not None and model.hf_difference < 1e-4
    assert model.verify([TEXT, "a"]) < 1e-4
    assert model.n_parameters == hf.num_parameters()
    assert (
        model.source == str(tiny)
        and model.name == tiny.name
        and model.bos == (ids[0, 0] == model.tokenizer.bos_token_id)
    )
    assert not any(p.requires_grad for p in model.hooked.parameters()) and not model.hooked.training


@pytest.mark.parametrize("arch", fast(["gpt2", "llama", "pythia", "gemma2", "qwen2"], ["llama"]))
def test_a_folder_whose_name_says_another_architecture(arch, tmp_path):
    """TransformerLens branches on words in the path; the folder's name is nobody's business."""
    for name in ("my-llama-t5", "gemma-bert", "gpt2-mistral"):
        folder = tmp_path / name
        shutil.copytree(tiny_folder(arch), folder)
        model = load_model(str(folder), device="cpu")
        assert model.name == name and model.hf_difference is not None and model.hf_difference < 1e-4
        assert (
            model.cfg.original_architecture
            == type(AutoModelForCausalLM.from_pretrained(folder)).__name__
        )


def test_stories260k(shared):
    if not (folder := shared / "models" / "stories260K").is_dir():
        pytest.skip(f"{folder} is absent")
    model = load_model(folder, device="cpu")
    assert model.verify(["Once upon a time there was a little girl named Lily.", TEXT]) < 1e-4
    ids = torch.cat([ids_of(model)] * 2)
    with torch.inference_mode():
        last, _ = run(model, model.embed(ids))
        torch.testing.assert_close(
            logits_of(model, last[:, -1]), model.hooked(ids)[:, -1], rtol=0, atol=1e-4
        )
    assert model.n_kv_heads == 4 and model.n_heads == 8


def test_a_model_from_memory():
    tokenizer = byte_level_tokenizer()
    hf = tiny_model("gpt2", len(tokenizer))
    model = load_model((hf, tokenizer), device="cpu")
    assert model.source is None and model.tokenizer is tokenizer and not model.bos
    ids = ids_of(model)
    with torch.inference_mode():
        torch.testing.assert_close(model.forward(ids), hf(ids).logits, rtol=0, atol=1e-4)
    assert model.verify([TEXT], hf_model=hf) < 1e-4
    with pytest.raises(
        ModelError, match=r"came from memory; give verify\(hf_model=...\) the Hugging Face model"
    ):
        model.verify([TEXT])


def test_verify_sees_a_changed_weight():
    model = load_model(tiny_folder("llama"), device="cpu")
    before = weights_hash(model.hooked)
    assert model.hash_now() == before
    assert model.sha256 == load_model(tiny_folder("llama"), device="cpu").sha256
    model.hooked.blocks[1].mlp.W_out[3, 5] += 0.5
    assert weights_hash(model.hooked) != before
    assert model.verify([TEXT]) > 1e-3
    model.hooked.blocks[1].mlp.W_out[3, 5] -= 0.5


def test_the_hash_is_of_every_bit():
    a, b = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    b.load_state_dict(a.state_dict())
    assert weights_hash(a) == weights_hash(b)
    with torch.no_grad():
        b.bias[1] = torch.nextafter(b.bias[1], torch.tensor(9.0))
    assert weights_hash(a) != weights_hash(b)
    assert weights_hash(a) != weights_hash(copy.deepcopy(a).bfloat16())


def test_a_bos_token_is_put_first_or_not_as_asked():
    for arch in ("llama", "gpt2"):
        assert load_model(tiny_folder(arch), device="cpu", check=False).bos == (arch in METASPACE)
        for bos in (True, False):
            model = load_model(tiny_folder(arch), device="cpu", bos=bos)
            assert model.bos is bos and model.verify([TEXT]) < 1e-4


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("bfloat16", torch.bfloat16),
        pytest.param("float16", torch.float16, marks=pytest.mark.slow),
        ("float64", torch.float64),
    ],
)
def test_other_precisions(name, dtype):
    exact = load_model(tiny_folder("gpt2"), device="cpu")
    model = load_model(tiny_folder("gpt2"), device="cpu", dtype=name)
    assert model.dtype == dtype and {p.dtype for p in model.hooked.parameters()} == {dtype}
    ids = ids_of(model)
    with torch.inference_mode():
        last = model.hooked(ids, stop_at_layer=model.n_layers)[0]
        read = model.finish(last, torch.tensor([5, 6]))
        assert last.dtype == dtype and read.dtype == (
            torch.float64 if name == "float64" else torch.float32
        )
        reference = exact.hooked(ids)[0].log_softmax(-1)[:, [5, 6]]
    assert (read - reference).abs().max() < (1e-4 if name == "float64" else 0.5)


def test_what_is_read_at_the_end():
    model = load_model(tiny_folder("gemma2"), device="cpu", check=False)
    ids, columns = ids_of(model), torch.tensor([7, 3, 200])
    with torch.inference_mode():
        full = model.hooked(ids)[0]
        last = model.hooked(ids, stop_at_layer=model.n_layers)[0]
        torch.testing.assert_close(
            model.finish(last, columns, "labels"), full[:, columns], rtol=0, atol=1e-5
        )
        torch.testing.assert_close(
            model.finish(last, columns), full.log_softmax(-1)[:, columns], rtol=0, atol=1e-5
        )
        torch.testing.assert_close(
            model.finish(last, columns, bytes_row=1),
            full.log_softmax(-1)[:, columns],
            rtol=0,
            atol=1e-5,
        )
        torch.testing.assert_close(
            model.finish(last, columns, "vocabulary"), full, rtol=0, atol=1e-5
        )
        assert model.finish(last[:0], columns).shape == (0, 3)


def test_kinds_and_sites():
    serial, parallel = (
        load_model(tiny_folder(arch), device="cpu", check=False) for arch in ("llama", "pythia")
    )
    assert "resid_mid" in serial.kinds and "resid_mid" not in parallel.kinds
    assert serial.check_site(Site(2, "k", 1)) == Site(2, "k", 1)
    for model, site in (
        (serial, Site(99, "resid_post")),
        (serial, Site(2, "k", 2)),
        (parallel, Site(0, "resid_mid")),
    ):
        with pytest.raises(SiteError, match=re.escape(f"site {site} does not exist")):
            model.check_site(site)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"positional_embedding_type": "shortformer"}, "shortformer positions"),
        (
            {"original_architecture": "Olmo2ForCausalLM"},
            "Olmo2ForCausalLM's norms after each sublayer",
        ),
        ({"attention_dir": "bidirectional"}, "bidirectional attention"),
        ({"attn_only": True}, "attention-only blocks"),
        ({"load_in_4bit": True}, "4-bit weights"),
        ({"use_attn_in": True}, "split query, key and value inputs"),
        ({"use_split_qkv_input": True}, "split query, key and value inputs"),
        ({"use_attention_sinks": True}, "attention sinks"),
        ({"clip_qkv": 8.0}, "clipped keys and values"),
        ({}, None),
    ],
)
def test_what_the_pieces_refuse(change, reason):
    cfg = copy.copy(load_model(tiny_folder("gpt2"), device="cpu", check=False).cfg)
    for name, value in change.items():
        setattr(cfg, name, value)
    model = Model.__new__(Model)
    model.backend = SimpleNamespace(cfg=cfg, unreadable=None)
    assert model.refusal == reason


# ---- refused, in one sentence -----------------------------------------------------------------------------------------------------


def refused(sentence: str, error=ModelError):
    return pytest.raises(error, match=re.escape(sentence))


def test_folders_that_are_no_models(tmp_path):
    with refused(
        f"the folder {tmp_path} has no config.json; a Hugging Face model folder is needed"
    ):
        load_model(tmp_path)
    for path in tiny_folder("gpt2").iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, tmp_path)
    with refused(
        f"the folder {tmp_path} has a config.json but no weights; model.safetensors (or its shards) is needed"
    ):
        load_model(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a tensor")
    with refused(f"{tmp_path}: no model could be loaded ("):
        load_model(tmp_path)
    shutil.copy(tiny_folder("gpt2") / "model.safetensors", tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelError, match=re.escape(f"{tmp_path}: no ")):
        load_model(tmp_path)


def test_a_folder_without_a_tokenizer(tmp_path):
    for path in tiny_folder("gpt2").iterdir():
        if "token" not in path.name:
            shutil.copy(path, tmp_path)
    with refused(f"{tmp_path}: no tokenizer could be loaded ("):
        load_model(tmp_path)


def test_names_that_are_nothing(tmp_path):
    (tmp_path / "model.bin").write_text("")
    with refused(
        f"{tmp_path / 'model.bin'} is a file; the folder that holds config.json and the weights is needed"
    ):
        load_model(tmp_path / "model.bin")
    for name in (str(tmp_path / "nowhere"), "./nowhere", "a/b/c", "~/nowhere"):
        with pytest.raises(
            ModelError,
            match=r"there is no folder .*; accepted: a local Hugging Face folder, a GGUF file, a hub name such as gpt2, or 'bundled'",
        ):
            load_model(name)


def test_a_hub_name_where_there_is_no_hub(monkeypatch, tmp_path):
    with pytest.raises(
        ModelError, match=r"^nobody-here/no-such-model: no (tokenizer|model) could be loaded \("
    ):
        load_model("nobody-here/no-such-model")


def test_the_bundled_model_is_missed_by_name(monkeypatch, tmp_path):
    monkeypatch.setattr(models, "BUNDLED", tmp_path / "model")
    for name in (None, "bundled"):
        with refused(
            f"the bundled model is missing from {tmp_path / 'model'}; reinstall the package, or give --model"
        ):
            load_model(name)


@pytest.mark.parametrize("device", ["abacus", "", "cuda:-1", "gpu", "cpu:x"])
def test_devices_that_are_none(device):
    with refused(f"unknown device {device!r}; accepted: auto, cpu, cuda, cuda:1, mps", ConfigError):
        load_model(tiny_folder("gpt2"), device=device)


def test_devices_that_are_not_here():
    n = torch.cuda.device_count()
    with refused(
        f"device 'cuda:{n}' was asked for; this machine has {n} CUDA devices", ConfigError
    ):
        load_model(tiny_folder("gpt2"), device=f"cuda:{n}")


@pytest.mark.parametrize("n", [0, 2, -1])
def test_more_devices_than_there_are(n):
    with refused(f"n_devices {n} was given; cpu offers 1 here, so 1 is accepted", ConfigError):
        load_model(tiny_folder("gpt2"), device="cpu", n_devices=n)


def test_dtypes_that_are_none():
    with refused(
        "unknown dtype 'int8'; accepted: float32, bfloat16, float16 or float64", ConfigError
    ):
        load_model(tiny_folder("gpt2"), dtype="int8")


@pytest.mark.parametrize(("backend", "copies"), [("bridge", 1), ("auto", None)])
def test_a_model_that_does_not_fit(monkeypatch, backend, copies):
    """A conversion needs room for two copies, a bridge for one; at a byte less it is refused."""
    folder = tiny_folder("gpt2")
    hf = transformers.AutoModelForCausalLM.from_pretrained(folder)
    copies = copies or (2 if load_model(folder).backend.name == "hooked" else 1)
    need = copies * 4 * hf.num_parameters()
    free = {"SC_PAGE_SIZE": 1, "SC_AVPHYS_PAGES": need}
    sysconf = models.os.sysconf
    monkeypatch.setattr(models.os, "sysconf", lambda name: free.get(name) or sysconf(name))
    load_model(folder, device="cpu", backend=backend)
    free["SC_AVPHYS_PAGES"] = need - 1
    words = "converted" if copies > 1 else "loaded"
    with pytest.raises(
        ModelError,
        match=rf"billion parameters need \d+ GiB while they are {words}, and 0 GiB of memory are free; use --dtype bfloat16",
    ):
        load_model(folder, device="cpu", backend=backend)


def llama(**settings) -> transformers.PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(byte_level_tokenizer()),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        **settings,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def test_a_setting_that_the_conversion_forgets_is_seen():
    """TransformerLens drops the biases of a Llama without a word. Those it has a place for are put back; a gate's is seen to be missing."""
    tokenizer = byte_level_tokenizer()
    for settings in (
        {},
        {"attention_bias": True},
        {"attention_bias": True, "num_key_value_heads": 2},
    ):
        assert load_model((llama(**settings), tokenizer), device="cpu").hf_difference < 1e-3
    with pytest.raises(
        ModelError,
        match=r"logits differ by up to .* from Hugging Face's \(allowed: 0.005\); TransformerLens does not convert this configuration",
    ):
        load_model((llama(mlp_bias=True), tokenizer), device="cpu")


def test_positions_that_are_not_supported():
    scaled = llama(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0})
    with refused(
        "LlamaForCausalLM with rope_type 'linear' is not supported by TransformerLens; accepted: default, and llama3 in Llama"
    ):
        load_model((scaled, byte_level_tokenizer()), device="cpu")


def test_an_architecture_that_is_not_known():
    tokenizer = byte_level_tokenizer()
    config = transformers.CTRLConfig(
        vocab_size=len(tokenizer), n_positions=64, n_embd=32, dff=48, n_layer=2, n_head=4
    )
    with refused("TransformerLens does not know the architecture CTRLLMHeadModel ("):
        load_model((transformers.CTRLLMHeadModel(config), tokenizer), device="cpu")


def test_the_tokenizer_is_the_folders_own(tiny):
    model = load_model(tiny, device="cpu", check=False)
    assert model.tokenizer(TEXT).input_ids == AutoTokenizer.from_pretrained(tiny)(TEXT).input_ids


def test_verify_prints_the_difference_it_measured(capsys):
    from mech_absa.commands import verify

    folder = tiny_folder("llama")
    assert verify.cli(["--model", str(folder), "--text", "the food was good"]) == 0
    measured = next(s for s in capsys.readouterr().out.splitlines() if "difference" in s)
    printed = float(measured.rsplit(": ", 1)[1])
    model = load_model(folder)
    assert (
        printed == pytest.approx(model.verify(["the food was good"]), rel=1e-2)
        and 0 < printed < 1e-3
    )
    with torch.no_grad():
        model.hooked.blocks[0].mlp.W_in.add_(0.1)
    assert model.verify(["the food was good"]) > 100 * printed
    assert verify.cli(["--text", " "]) == 2


# ---- weights and configurations that do not fit together --------------------------------------------


def copied(arch: str, folder):
    shutil.copytree(tiny_folder(arch), folder, dirs_exist_ok=True)
    return folder


def rewrite(folder, change) -> None:
    """Save the folder's weights again, as `change` makes them."""
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, {"format": "pt"})


def configure(folder, **settings) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))


@pytest.mark.parametrize(
    ("arch", "change", "words"),
    [
        (
            "llama",
            lambda w: {f"module.{n}": t for n, t in w.items()},
            "are missing from its files (",
        ),
        (
            "llama",
            lambda w: {n: t for n, t in w.items() if n != "model.layers.1.mlp.up_proj.weight"},
            "1 weights are missing from its files (model.layers.1.mlp.up_proj.weight)",
        ),
        (
            "llama",  # its head is not tied
            lambda w: {n: t for n, t in w.items() if n != "lm_head.weight"},
            "1 weights are missing from its files (lm_head.weight)",
        ),
        (
            "llama",
            lambda w: w | {"model.layers.0.mlp.extra.weight": torch.zeros(2)},
            "1 weights are in its files and not in a model of its configuration (model.layers.0.mlp.extra",
        ),
        ("gpt2", lambda w: {"nothing": torch.zeros(1)}, "are missing from its files ("),
    ],
)
def test_weights_that_are_not_the_configurations(arch, change, words, tmp_path):
    folder = copied(arch, tmp_path / "m")
    rewrite(folder, change)
    with refused(words):
        load_model(folder, device="cpu")


@pytest.mark.parametrize(("layers", "words"), [(2, "are in its files and not"), (5, "are missing")])
def test_another_number_of_layers(layers, words, tmp_path):
    folder = copied("llama", tmp_path / "m")
    configure(folder, num_hidden_layers=layers)
    with pytest.raises(ModelError, match=rf"{words}.*\(model\.layers\.\d"):
        load_model(folder, device="cpu")


def test_a_tied_head_is_not_missing(tmp_path):
    """GPT-2's files hold no lm_head: it is the embedding."""
    folder = copied("gpt2", tmp_path / "m")
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")
    assert load_model(folder, device="cpu").hf_difference < 1e-4


def test_weights_that_are_not_numbers(tmp_path):
    folder = copied("llama", tmp_path / "m")
    rewrite(folder, lambda w: w | {"model.norm.weight": w["model.norm.weight"] * torch.nan})
    with refused("Hugging Face's logits of 'The food was great, but the service was "):
        load_model(folder, device="cpu")
    model = load_model(folder, device="cpu", check=False)
    with refused("are not finite numbers; the weights hold some that are not"):
        model.verify([TEXT])
    sound = load_model(tiny_folder("llama"), device="cpu")
    sound.hooked.ln_final.w.fill_(torch.nan)
    with refused("our logits of"):
        sound.verify([TEXT])
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"num_attention_heads": 0}, "could be loaded ("),
        (
            {"num_attention_heads": 7},
            "(The hidden size (32) is not a multiple of the number of att",
        ),
        ({"num_hidden_layers": 1_000_000}, "config.json says 1000000 layers; 1 to 1000 are"),
        ({"num_hidden_layers": -1}, "config.json says -1 layers; 1 to 1000 are accepted"),
    ],
)
def test_configurations_that_make_no_sense(settings, words, tmp_path):
    folder = copied("llama", tmp_path / "m")
    configure(folder, **settings)
    with refused(words):
        load_model(folder, device="cpu")


def test_a_configuration_that_is_a_list(tmp_path):
    folder = copied("llama", tmp_path / "m")
    (folder / "config.json").write_text("[]")
    with pytest.raises(ModelError, match=rf"^{re.escape(str(folder))}: no "):
        load_model(folder, device="cpu")


def test_a_tokenizer_of_another_model(tmp_path):
    """360 tokens for a model of 320."""
    folder = copied("gpt2", tmp_path / "m")
    for path in tiny_folder("llama").iterdir():
        if "token" in path.name:
            shutil.copy(path, folder)
    with refused("tokens and the model embeddings for"):
        load_model(folder, device="cpu")


class Malicious:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_code_in_weights_is_not_run(tmp_path):
    folder = copied("gpt2", tmp_path / "m")
    (folder / "model.safetensors").unlink()
    torch.save(
        {"transformer.wte.weight": Malicious(tmp_path / "ran")}, folder / "pytorch_model.bin"
    )
    with refused(f"{folder}: no model could be loaded ("):
        load_model(folder, device="cpu")
    assert not (tmp_path / "ran").exists()
