"""Time TransformerLens's own patching against the drop-in, on a random model of GPT-2's shape.

python -m benchmarks.drop_in            12 layers of width 768, 40 tokens, about 3 minutes
python -m benchmarks.drop_in --small    2 layers, seconds
"""

import sys
import time

import torch
import transformer_lens
from transformer_lens import HookedTransformer, HookedTransformerConfig
from transformer_lens import patching as theirs

from mech_absa import patching as ours


def model(small: bool) -> HookedTransformer:
    """Return a random GPT-2: the small one's shape, or a toy."""
    shape = dict(n_layers=2, d_model=64, n_heads=4) if small else {}
    shape = dict(n_layers=12, d_model=768, n_heads=12) | shape
    cfg = HookedTransformerConfig(
        **shape, d_head=shape["d_model"] // shape["n_heads"], d_vocab=50257, n_ctx=64,
        act_fn="gelu_new", normalization_type="LN", device="cpu", seed=0,
    )  # fmt: skip
    return HookedTransformer(cfg)


def main() -> None:
    """Print both CPU times and the largest difference."""
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    hooked = model("--small" in sys.argv)
    clean = torch.randint(0, 50257, (1, 40))
    corrupted = clean.clone()
    corrupted[0, 10] += 1
    _, cache = hooked.run_with_cache(clean)
    metric = lambda logits: logits[0, -1, 11] - logits[0, -1, 17]  # noqa: E731
    results = []
    for name, patching in (("transformer_lens", theirs), ("mech_absa", ours)):
        start = time.process_time()
        results.append(patching.get_act_patch_resid_pre(hooked, corrupted, cache, metric))
        print(f"{name:17}{time.process_time() - start:7.2f} s of CPU time")
    version = getattr(transformer_lens, "__version__", "?")
    print(
        f"largest difference {(results[0] - results[1]).abs().max():.1e}; TransformerLens {version}"
    )


if __name__ == "__main__":
    main()
