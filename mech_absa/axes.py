"""The one vocabulary of axes, as jaxtyping aliases.

| axis | counts |
|---|---|
| `batch` | prompts, rows of a wave, (pair, draw) runs |
| `pos` | token positions of a prompt |
| `head`, `kv` | query heads; key/value heads (fewer where queries are grouped) |
| `d_model`, `d_head` | widths of the residual stream and of one head |
| `label` | the answers of a verbalizer: positive, negative, neutral |
| `cell` | one restored (or replaced) state: layer x position (or role) x component |
| `rank` | rows of a low-rank edit |

An alias names a shape once; functions that need another one spell it in place.
"""

from jaxtyping import Bool, Float, Int
from torch import Tensor

Ids = Int[Tensor, "batch pos"]
Roles = Int[Tensor, "batch pos"]
Mask = Bool[Tensor, "batch pos"]
Resid = Float[Tensor, "batch pos d_model"]
HeadOut = Float[Tensor, "batch pos head d_head"]
Logits = Float[Tensor, "batch d_vocab"]
LabelScores = Float[Tensor, "batch label"]
