"""Ten lines of TransformerLens, run with its import and with ours: both times, and the largest difference.

    python -m benchmarks.one_import

TransformerLens 3.9 runs a `HookedTransformer`, 4 a `TransformerBridge`.
"""

import time
from importlib.metadata import version

import torch
from transformer_lens import patching as theirs

import mech_absa as ma
from mech_absa import patching as ours


def main() -> None:
    model = ma.load_model().hooked
    clean = torch.randint(5, 900, (1, 40), generator=torch.Generator().manual_seed(0))
    corrupted = clean.clone()
    corrupted[:, 10] += 1
    _, cache = model.run_with_cache(clean)
    results, seconds = [], []
    for patching in (ours, theirs):
        start = time.perf_counter()
        with torch.inference_mode():
            sweep = patching.get_act_patch_resid_pre
            results.append(sweep(model, corrupted, cache, lambda y: y[0, -1, 7] - y[0, -1, 9]))
        seconds.append(time.perf_counter() - start)
    off = float((results[0] - results[1]).abs().max())
    print(
        f"transformer-lens {version('transformer-lens')}, {type(model).__name__}: "
        f"mech_absa {seconds[0]:.2f} s, transformer_lens {seconds[1]:.2f} s, "
        f"largest difference {off:.1g} of {float(results[1].abs().max()):.3g}"
    )


if __name__ == "__main__":
    main()
