"""hooked_from_hf: any of the eight architectures, from a loaded Hugging Face model, with raw weights."""

from __future__ import annotations
import json, math, tempfile
from pathlib import Path
import torch
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens import loading_from_pretrained as tl

NAME_BRANCHES = ("llama", "gemma")  # with hf_model passed in, only these words in a path change the architecture


def hooked_cfg(hf, dtype=torch.float32, device="cpu", n_ctx=None) -> HookedTransformerConfig:
    c, arch = hf.config, type(hf).__name__
    if arch in ("GemmaForCausalLM", "Gemma2ForCausalLM"):  # TransformerLens knows these by official name only
        cfg = dict(
            d_model=c.hidden_size,
            d_head=c.head_dim,
            n_heads=c.num_attention_heads,
            n_key_value_heads=c.num_key_value_heads,
            d_mlp=c.intermediate_size,
            n_layers=c.num_hidden_layers,
            n_ctx=c.max_position_embeddings,
            eps=c.rms_norm_eps,
            d_vocab=c.vocab_size,
            act_fn=c.hidden_activation if arch == "Gemma2ForCausalLM" else "gelu_pytorch_tanh",
            normalization_type="RMS",
            final_rms=True,
            gated_mlp=True,
            positional_embedding_type="rotary",
            original_architecture=arch,
        )
        if arch == "Gemma2ForCausalLM":
            cfg |= dict(
                use_normalization_before_and_after=True,
                attn_scale=math.sqrt(c.query_pre_attn_scalar),  # default would be sqrt(d_head)
                attn_scores_soft_cap=c.attn_logit_softcapping or -1.0,  # None -> disabled
                output_logits_soft_cap=c.final_logit_softcapping or -1.0,
            )
    else:
        with tempfile.TemporaryDirectory(prefix="cfg-") as folder:  # a path without any name TransformerLens branches on
            assert not any(n in folder.lower() for n in NAME_BRANCHES), folder
            written = c.to_dict() | {"architectures": [arch]}  # base-class and in-memory configs may lack it
            if arch == "GPT2LMHeadModel":
                written.setdefault("n_ctx", c.n_positions)  # TL reads n_ctx; GPT2Config of transformers 5 has lost it
            (Path(folder) / "config.json").write_text(json.dumps(written, default=str))
            cfg = tl.convert_hf_model_config(folder)
        assert cfg["original_architecture"] == arch, (cfg["original_architecture"], arch)
    # What the config conversion forgets or guesses, read from the Hugging Face config instead:
    cfg["n_ctx"] = (
        n_ctx or getattr(c, "max_position_embeddings", None) or getattr(c, "n_positions", None) or cfg["n_ctx"]
    )  # Mistral: capped at 2048
    if getattr(c, "n_inner", None):  # GPT-2, GPT-J: TL assumes 4 * d_model
        cfg["d_mlp"] = c.n_inner
    if arch == "GPTJForCausalLM":
        cfg["eps"] = c.layer_norm_epsilon  # TL: 1e-5 always
    if arch in ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM"):
        cfg["d_head"] = cfg["rotary_dim"] = getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads
        # TL: Llama and Qwen2 assume hidden_size / n_heads; Mistral reads head_dim
    if cfg.get("positional_embedding_type") == "rotary":
        rope = getattr(c, "rope_parameters", None) or {}
        if "rope_theta" in rope:
            cfg["rotary_base"] = rope["rope_theta"]  # TL: NeoX always 10000, Qwen2 int(theta)
    types = getattr(c, "layer_types", None)
    if types and "sliding_attention" in types:  # Gemma-2; Qwen2 with use_sliding_window (TL ignores it); Mistral sets none
        cfg |= dict(
            use_local_attn=True, window_size=c.sliding_window, attn_types=["local" if t == "sliding_attention" else "global" for t in types]
        )
    cfg["tokenizer_name"] = None  # else HookedTransformer.__init__ fetches a tokenizer by it
    cfg |= dict(
        dtype=dtype,
        device=str(device),
        init_weights=False,
        from_checkpoint=False,
        model_name=Path(c._name_or_path or "custom").name or "custom",
    )
    cfg.setdefault("default_prepend_bos", True)
    return HookedTransformerConfig.from_dict(cfg)


def hooked_from_hf(hf, tokenizer=None, dtype=torch.float32, device="cpu", n_ctx=None) -> HookedTransformer:
    hf = hf.eval().requires_grad_(False)
    cfg = hooked_cfg(hf, dtype, device, n_ctx)
    model = HookedTransformer(cfg, tokenizer, move_to_device=False)
    state = tl.get_pretrained_state_dict(".", cfg, hf_model=hf, dtype=dtype)  # "." exists, so no official name is asked for
    for key, value in model.state_dict().items():  # Bloom: an unused W_pos of uninitialised memory
        if key not in state and key.endswith("W_pos"):
            state[key] = torch.zeros_like(value)
    model.load_and_process_state_dict(state, fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False)
    return model.to(device).eval().requires_grad_(False)
