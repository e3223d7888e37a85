"""What tests share, and what they compare the package with.

tiny_models         tiny random models of eight architectures, and their tokenizers
numpy_transformer   a transformer in numpy, one sequence at a time, with `do()`
planted             models whose circuits are known because they were written down
jobs                questions to the sweep engines, and every answer by the numpy transformer
edit_cases          prompts of different lengths; edits whose parameters are large enough to see
small_cases         examples by hand; edits small enough to reason about
made_runs           run folders by hand, without a model
cpu_time            `--cpu-durations N`: what the tests cost
"""

import pytest

# Their asserts show both sides only if they are rewritten before the first import.
pytest.register_assert_rewrite("support.jobs", "support.edit_cases", "support.small_cases")


ARCHITECTURES = ("gpt2", "llama", "pythia", "gptj", "qwen2", "mistral", "gemma2", "bloom")
"""Of the tiny models; here, so that they are known without torch."""


def fast(cases, chosen):
    """Return the cases as parameters of a test, all but the chosen ones marked slow."""
    return [c if c in chosen else pytest.param(c, marks=pytest.mark.slow) for c in cases]
