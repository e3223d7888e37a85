"""Define what the rest of the package needs of a model, whichever TransformerLens runs it.

`Model` holds one backend and asks nothing else: `HookedBackend` (`hooked.py`) for a
`HookedTransformer`, `BridgeBackend` (`bridge.py`) for a `TransformerBridge`. Weights are those of a
product of rows, x W + b: `[head d_model d_head]` for queries, keys and values (grouped ones once
per group), `[head d_head d_model]` for the output, `[d_in d_out]` for the rest. A bias that does
not exist is None. All of them are the tensors that the module computes with, or views of them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Weight(NamedTuple):
    """A matrix and its bias."""

    W: Tensor
    b: Tensor | None


class MLPWeights(NamedTuple):
    """The parts of an MLP: act(x W_in + b_in) W_out + b_out, or its gated kin.

    Gated: (act(x W_gate + b_gate) * (x W_in) + b_in) W_out + b_out in a `HookedTransformer`, whose
    b_in is added to the product; `factor_bias` belongs to x W_in, as in Hugging Face's models.
    """

    W_in: Tensor
    W_out: Tensor
    act: str
    b_in: Tensor | None = None
    b_out: Tensor | None = None
    W_gate: Tensor | None = None
    b_gate: Tensor | None = None
    factor_bias: Tensor | None = None


class Backend(ABC):
    """One loaded decoder.

    Attributes:
        name: `hooked` or `bridge`.
        root: the module of TransformerLens; it runs the hooked forward pass.
        cfg: sizes and settings, under the names of `HookedTransformerConfig`.
        unreadable: why the weights, as they are read here, do not make the model's forward pass;
            None where they do.
        hook_points: name of a hook point, as in `Site.hook_name` -> the hook point.
    """

    name: str
    root: Any
    unreadable: str | None = None

    @property
    @abstractmethod
    def cfg(self) -> Any: ...

    @property
    @abstractmethod
    def hook_points(self) -> Mapping[str, Any]: ...

    @property
    @abstractmethod
    def modules(self) -> tuple[nn.Module, ...]:
        """Return all modules on which a hook would change the forward pass."""
        ...

    @property
    @abstractmethod
    def device(self) -> torch.device: ...

    @abstractmethod
    def block_device(self, layer: int) -> torch.device: ...

    @abstractmethod
    def embed_tokens(self, ids: Tensor) -> Tensor:
        """Return token embeddings, without learned positions."""
        ...

    @abstractmethod
    def embed(self, ids: Tensor) -> Tensor:
        """Return the residual stream before block 0."""
        ...

    @abstractmethod
    def qkv(self, layer: int) -> tuple[Weight, Weight, Weight]: ...

    @abstractmethod
    def output(self, layer: int) -> Weight: ...

    @abstractmethod
    def mlp(self, layer: int) -> MLPWeights | None:
        """Return the MLP's parts; None where only its module can run it."""
        ...

    @abstractmethod
    def run_mlp(self, layer: int, x: Tensor) -> Tensor:
        """Run the MLP's module on `[*token d_model]`."""
        ...

    @abstractmethod
    def act(self, layer: int, x: Tensor) -> Tensor:
        """Return the activation function of the MLP."""
        ...

    @abstractmethod
    def norm(self, layer: int | None, name: str, x: Tensor) -> Tensor:
        """Return tokens after `ln1`, `ln2`, `ln1_post` or `ln2_post` of a layer, or `ln_final`."""
        ...

    @abstractmethod
    def hooked_norm(self, x: Tensor) -> Tensor:
        """Return tokens after the module of the final norm, whose hooks act."""
        ...

    @abstractmethod
    def qk_norm(self, layer: int, name: str, x: Tensor) -> Tensor:
        """Return `q` or `k` of every head, normalised where the model does so."""
        ...

    @abstractmethod
    def rotary(self, layer: int, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return (cos, sin), `[*position rotary_dim]`."""
        ...

    @abstractmethod
    def scale(self, layer: int) -> float:
        """Return what attention scores are divided by."""
        ...

    @abstractmethod
    def window(self, layer: int) -> int | None:
        """Return how many positions a query sees, itself included; None for all."""
        ...

    @abstractmethod
    def slopes(self, layer: int) -> Tensor:
        """Return the slope of every head under ALiBi, as it is subtracted per position."""
        ...

    @abstractmethod
    def unembed(self, columns: Tensor | None) -> Weight:
        """Return the unembedding of these columns; of all where None."""
        ...

    @abstractmethod
    def point(self, layer: int, name: str) -> nn.Module:
        """Return the module whose output is the value of this name (`pieces`), `scores` or `pattern`.

        Raises:
            KeyError: the layer has no such value.
        """
        ...

    @abstractmethod
    def scales(self) -> list[nn.Module]:
        """Return the hook points of the scale of every norm."""
        ...

    @abstractmethod
    def forward(self, x: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
        """Run the hooked blocks `start` to `stop` - 1; the logits where `stop` is None."""
        ...

    @abstractmethod
    def matrix(self, layer: int, name: str) -> Weight:
        """Return `W_Q`, ..., `W_out` with inputs as rows and heads side by side."""
        ...

    @abstractmethod
    def set_matrix(self, layer: int, name: str, W: Tensor, b: Tensor | None) -> None:
        """Overwrite a matrix, and its bias where one is given."""
        ...

    @abstractmethod
    def twin(self) -> Any:
        """Return a copy of the module whose weights may be overwritten."""
        ...
