"""Define presets: what to train, and how, to be given to `fit`.

    presets.paper("L10.resid_post@query.last", ...)     the paper's edit: W_O low-rank at 3e-4, LoReFT at 1e-5
    presets.authors_code(range_sites("10-15"))          its authors' script: 2e-5 for both, rank 4, alpha 8, rank-stabilised, dropout 0.05
    presets.TABLE_2["lora"](shape)                      the rows of the paper's Table 2, with their published sizes
    presets.bundled(sites)                              rates that suit models of a few million parameters

The paper edits the same layers twice: a low-rank update of the attention's output projection on
every token, and LoReFT on the layer output at the aspect in the question. `sites` says where; a
site's layer and position count, its kind does not.

| size (Llama-2-7b shape) | preset |
|---|---|
| 196,608 + 196,632 = 393,240 | `paper`, `authors_code` on layers 10-15, rank 4 |
| 56,098,816; 56,975,360 | `lora`, `dora`: rank 32 on q, k, v, up, down of all layers |
| 2,097,408; 393,264 | `loreft`, `loreft_range`: rank 8 on all layers, on 10-15 |
| 134,217,728 (1.953 %) | `adapter`: bottlenecks of 256 after attention and MLP of every layer, no biases |
| 2,621,440 (0.039 %) | `prefix`: 10 keys and values a layer |
| 8,765,440 (0.130 %) | `lora_range`: `lora` on five layers; the six of 10-15 would be 0.156 %, which is not what is printed |
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ..edits.base import Part, Shape, parse_place
from ..edits.edit import SHARED, at_rates
from ..errors import ConfigError, SiteError, choices
from ..sites import Site, check_role, parse_layers, sites_file

Loss = Literal["labels", "text"]
Schedule = Literal["linear", "cosine", "constant"]
LOSSES: tuple[Loss, ...] = ("labels", "text")
SCHEDULES: tuple[Schedule, ...] = ("linear", "cosine", "constant")

LAST_OF_QUERY = "query.last"
"""The paper's position: the last sub-token of the aspect in the question."""

Sites = str | os.PathLike[str] | Site | Iterable[Site | str]
"""One site, several, or the path of a sites.json."""


@dataclass(frozen=True)
class Preset:
    """An edit to train, and how.

    Attributes:
        name: for tables.
        parts: the interventions, each with its learning rate.
        epochs: passes over the examples.
        batch_size: examples a forward pass.
        accumulate: forward passes a step of the optimiser.
        schedule: of the learning rates: down to 0 linearly or by a cosine, or constant.
        warmup: share of the steps over which the rates rise from 0.
        clip: largest norm of the gradient; 0 does not clip.
        loss: `labels` is -log of the gold label's share among the label strings; `text` is -log P
            of the answer's tokens and the end of sequence, over the whole vocabulary. No edit lifts
            a token above what the frozen unembedding can say: the bundled model never saw its end
            of sequence, whose column is that of 245 other unseen tokens (cosine over 0.999), so
            that 4.22 nats of it, and 2.11 of the mean over an answer's three tokens, stay however
            long one trains.
        patience: evaluations on the validation examples without a gain before training stops; 0
            never stops.
        balance: steps between two measurements of how far each of the two sorts of parts, weights and
            representations, moves the answers; their rates are balanced by it (`balance.py`, after
            CoMMIT). 0 keeps the rates. A measured step costs three forward passes more.
        shared_weight: in the loss `text`, weight of those tokens of an answer that a minimal edit to
            any other label would leave alone, such as the end of sequence; the tokens that tell the
            labels apart have 1, and the weighted mean is taken. 1 is the plain loss. Xu et al. 2024
            (arXiv 2406.02756) give a reward to the tokens that annotators edit minimally, and train
            with PPO; here the edited tokens weigh more in the likelihood of the right answer.

    Example:
        >>> import mech_absa as ma
        >>> preset = ma.presets.paper(["L3.resid_post@query.last"])
        >>> preset.name
        'paper'
    """

    name: str
    parts: tuple[Part, ...]
    epochs: int = 1
    batch_size: int = 8
    accumulate: int = 1
    schedule: Schedule = "linear"
    warmup: float = 0.0
    clip: float = 1.0
    loss: Loss = "labels"
    patience: int = 0
    balance: int = 0
    shared_weight: float = 1.0

    def __post_init__(self) -> None:
        least = {
            "epochs": 0,
            "batch_size": 1,
            "accumulate": 1,
            "clip": 0,
            "patience": 0,
            "balance": 0,
        }
        for name, low in least.items():
            if not (value := getattr(self, name)) >= low:
                raise ConfigError(f"{name} is {value}; accepted: {low} or more")
        if self.schedule not in SCHEDULES:
            raise ConfigError(f"schedule is {self.schedule!r}; accepted: {choices(SCHEDULES)}")
        if self.loss not in LOSSES:
            raise ConfigError(f"loss is {self.loss!r}; accepted: {choices(LOSSES)}")
        if not 0 <= self.warmup <= 1:
            raise ConfigError(f"warmup is {self.warmup}; accepted: a share of the steps, 0 to 1")
        for p in self.parts:
            for what, value in (("learning rate", p.lr), ("weight decay", p.weight_decay)):
                if not 0 <= value < math.inf:
                    raise ConfigError(f"the {what} of {p.family} is {value}; accepted: 0 or more")
        if not 0 <= self.shared_weight < math.inf:
            raise ConfigError(f"shared_weight is {self.shared_weight}; accepted: 0 or more")
        if self.shared_weight != 1 and self.loss != "text":
            raise ConfigError(
                f"shared_weight is {self.shared_weight}, and the loss {self.loss} reads no tokens; leave it at 1, or take the loss text"
            )
        if self.balance and len({isinstance(parse_place(p.place), Site) for p in self.parts}) < 2:
            raise ConfigError(
                f"balance is {self.balance}, and {self.name} has not both edits of weights and edits of representations; "
                "leave it at 0, or take a preset of two parts such as both"
            )

    def but(self, **changes: Any) -> Preset:
        """Return the preset with some fields changed."""
        return replace(self, **changes)

    def rates(self, scale: float) -> Preset:
        """Return the preset with every learning rate times `scale`."""
        return self.but(parts=at_rates(self.parts, scale))


# ---- where ------------------------------------------------------------------------------------------------------------------------


def read_sites(sites: Sites) -> list[Site]:
    """Return sites as a list, whatever form they came in.

    Raises:
        SiteError: there are none, or one does not parse.
    """
    if isinstance(sites, Site):
        return [sites]
    if isinstance(sites, os.PathLike) or (isinstance(sites, str) and sites.endswith(".json")):
        return sites_file(sites)[0]
    found = [
        s if isinstance(s, Site) else Site.parse(s)
        for s in (sites.split() if isinstance(sites, str) else sites)
    ]
    if not found:
        raise SiteError(
            "no sites were given to edit; at least one is needed, such as L5.resid_post@query.last"
        )
    return found


def range_sites(
    layers: str | Iterable[int],
    positions: Iterable[str | int | None] = (LAST_OF_QUERY,),
    n_layers: int = 10**6,
) -> list[Site]:
    """Return the outputs of a range of layers at each of `positions`.

    Examples:
        >>> [str(site) for site in range_sites("2-3", n_layers=8)]
        ['L2.resid_post@query.last', 'L3.resid_post@query.last']
    """
    chosen = parse_layers(layers, n_layers) if isinstance(layers, str) else tuple(layers)
    positions = [check_role(at) if isinstance(at, str) else at for at in positions]
    return [Site(layer, "resid_post", None, at) for layer in chosen for at in positions]


def _layers(sites: Sequence[Site]) -> list[int]:
    return sorted({s.layer for s in sites})


def _outputs(sites: Sequence[Site]) -> list[Site]:
    """Return the layer outputs at the sites' layers and positions (the paper's position, where a
    site has none)."""
    return sorted(
        {Site(s.layer, "resid_post", None, LAST_OF_QUERY if s.at is None else s.at) for s in sites},
        key=lambda s: (s.layer, str(s.at)),
    )


def parts(family: str, places: Iterable[Any], lr: float, **options: Any) -> tuple[Part, ...]:
    """Return the same intervention at several places."""
    return tuple(Part(family, str(p), options, lr) for p in places)


def matrices(layers: Iterable[int], *names: str) -> list[str]:
    """Return `L5.W_O` and so on, for every layer and name."""
    return [f"L{layer}.{name}" for layer in layers for name in names]


# ---- the paper ------------------------------------------------------------------------------------------------------------------


def both_parts(
    sites: Sites, *, rank: int, lr_weight: float, lr_representation: float, **lora: Any
) -> tuple[Part, ...]:
    """Return the paper's two parts at `sites`: W_O low-rank in their layers, LoReFT at their layer
    outputs and positions.
    """
    found = read_sites(sites)
    return (
        *parts("lora", matrices(_layers(found), "W_O"), lr_weight, rank=rank, **lora),
        *parts("loreft", _outputs(found), lr_representation, rank=rank),
    )


def paper(
    sites: Sites, *, rank: int = 4, alpha: float = 8.0, epochs: int = 1, batch_size: int = 2
) -> Preset:
    """Return the edit as the paper states it: rates 3e-4 and 1e-5, one epoch. The rank, which it
    does not state, is that of the authors' code.
    """
    made = both_parts(
        sites,
        rank=rank,
        lr_weight=3e-4,
        lr_representation=1e-5,
        alpha=alpha,
        rank_stabilised=True,
        dropout=0.05,
    )
    return Preset("paper", made, epochs=epochs, batch_size=batch_size, loss="text", clip=1.0)


def authors_code(sites: Sites, *, rank: int = 4, alpha: float = 8.0) -> Preset:
    """Return the edit as the authors' script trains it: 2e-5 for everything, linear decay, no warm-up,
    batches of 2, one epoch."""
    made = both_parts(
        sites,
        rank=rank,
        lr_weight=2e-5,
        lr_representation=2e-5,
        alpha=alpha,
        rank_stabilised=True,
        dropout=0.05,
    )
    return Preset("authors_code", made, epochs=1, batch_size=2, loss="text", clip=1.0)


_UP_DOWN = ("W_Q", "W_K", "W_V", "W_in", "W_out")


def _lora(shape: Shape, layers: Iterable[int] | None = None, family: str = "lora") -> Preset:
    layers = range(shape.n_layers) if layers is None else layers
    return Preset(
        family,
        parts(family, matrices(layers, *_UP_DOWN), 1e-4, rank=32, alpha=64.0),
        batch_size=2,
        loss="text",
    )


def _loreft(shape: Shape, layers: Iterable[int] | None = None) -> Preset:
    layers = range(shape.n_layers) if layers is None else layers
    return Preset(
        "loreft", parts("loreft", range_sites(layers), 2e-5, rank=8), batch_size=2, loss="text"
    )


def _adapter(shape: Shape) -> Preset:
    places = [
        Site(layer, kind) for layer in range(shape.n_layers) for kind in ("attn_out", "mlp_out")
    ]
    return Preset("adapter", parts("adapter", places, 1e-4, rank=256), batch_size=2, loss="text")


def _prefix(shape: Shape) -> Preset:
    return Preset(
        "prefix",
        parts("prefix", (f"L{layer}" for layer in range(shape.n_layers)), 1e-4, length=10),
        batch_size=2,
        loss="text",
    )


L_STAR = range(10, 16)
"""The layers that the paper's tracing of Llama-2-7b names."""

TABLE_2: dict[str, Callable[[Shape], Preset]] = {
    "adapter": _adapter,
    "lora": _lora,
    "dora": lambda shape: _lora(shape, family="dora"),
    "prefix": _prefix,
    "loreft": _loreft,
    "lora_range": lambda shape: replace(_lora(shape, range(10, 15)), name="lora_range"),
    "loreft_range": lambda shape: replace(_loreft(shape, L_STAR), name="loreft_range"),
    "paper": lambda shape: paper(range_sites(L_STAR)),
}
"""The trained rows of the paper's Table 2, at the sizes it prints."""


# ---- small models -----------------------------------------------------------------------------------------------------------------

RATES = {
    "lora": 4e-3, "dora": 4e-3, "loreft": 2e-2, "noreft": 2e-2, "direft": 2e-2, "red": 1e-1, "steering": 1e-1,
    "prefix": 5e-2, "adapter": 8e-3, "bitfit": 1.2e-2, "full": 1e-3, "head_gate": 5e-2, "post_block": 8e-3,
    "tinylora": 8e-2, "reft_r1": 1e-2,
}  # fmt: skip
"""Learning rate of every family in models of a few million parameters.

Found on the bundled model: two epochs over 320 examples of builtin:restaurant/train, judged on 146
of its examples whose sentences were set aside, seed 0, batches of 16, linear decay, rank 4; the
rate with the lowest cross-entropy there was taken. The test files were not looked at. In layers 2-4
at query.last (lora: W_O), validation accuracy at each rate tried, 0.49 before training:

| family | rates and accuracies |
|---|---|
| lora | 5e-4 0.51, 2e-3 0.98, 4e-3 1.00, 8e-3 0.99 |
| loreft | 5e-4 0.50, 2e-3 0.57, 8e-3 0.84, 2e-2 1.00, 5e-2 0.99 |
| noreft | 8e-3 0.90, 2e-2 0.98 |
| direft | 8e-3 0.88, 2e-2 0.93 |
| red | 1e-2 0.57, 3e-2 0.63, 1e-1 0.75 |
| steering | 2.5e-3 0.49, 1e-2 0.50, 4e-2 0.56, 1e-1 0.61 |

and in all layers: lora on q, k, v, up, down 5e-4 0.81, 2e-3 1.00, 4e-3 1.00, 8e-3 0.99; prefix 1e-2
0.49, 5e-2 0.64; adapter 5e-4 0.60, 2e-3 1.00, 8e-3 1.00; post_block 5e-4 0.55, 2e-3 1.00, 8e-3
1.00, 3.2e-2 1.00; tinylora (224 scalars) 5e-3 0.62, 2e-2 0.83, 8e-2 0.99, 3.2e-1 0.95; bitfit
7.5e-4 0.58, 3e-3 0.94, 1.2e-2 1.00; head_gate 1e-2 0.71, 5e-2 1.00; full 3e-4 0.99, 1e-3 1.00.
joint_orthogonal takes the rates of its two families: times 1/16 0.75, 1/4 1.00, 1 1.00 (with the
lowest cross-entropy), 4 0.91. `dora` takes the rate of lora, and `reft_r1` that of AxBench: neither
was searched for. The rate of head_gate was found with
`gates="tempered"`.

The rates were found in layers 2-4 and favour them: with as few steps, other layers may need other
rates. A comparison of places has to tune the rate of each (`figures/places.py` does).
"""

METHODS = (
    "both",
    "both_shared",
    "lora_o",
    "lora",
    "dora",
    "tinylora",
    "loreft",
    "noreft",
    "direft",
    "red",
    "steering",
    "reft_r1",
    "prefix",
    "adapter",
    "post_block",
    "joint_orthogonal",
    "bitfit",
    "full",
    "head_gate",
)


def bundled(
    sites: Sites,
    method: str = "both",
    *,
    rank: int = 4,
    epochs: int = 3,
    shape: Shape | None = None,
) -> Preset:
    """Return a method at `sites`, with rates that suit small models.

    Args:
        sites: where; weight edits act in the sites' layers, on every token.
        method: one of `METHODS`; `both` is the paper's pair, `lora_o` and `loreft` its halves,
            `both_shared` the pair with one set of parameters for all layers (`share`).
        rank: of whatever has one; the bottleneck of an adapter, the length of a prefix, the scalars
            per matrix of TinyLoRA.
        epochs: passes over the examples.
        shape: of the model; needed for methods that act on every matrix or every head of a layer.

    Raises:
        ConfigError: there is no such method.

    Examples:
        >>> preset = bundled("L3.resid_post@query.last", epochs=2)
        >>> preset.epochs, [part.family for part in preset.parts]
        (2, ['lora', 'loreft'])
        >>> bundled("L3.resid_post@query.last", "loreft").rates(0.5).parts[0].lr
        0.01
    """
    if method not in METHODS:
        raise ConfigError(f"unknown method {method!r}; accepted: {choices(METHODS)}")
    if method == "head_gate" and shape is None:
        raise ConfigError("head_gate acts on every head of a layer; give the shape of the model")
    if method == "both_shared":
        made = bundled(sites, "both", rank=rank, epochs=epochs)
        return share(made, [_layers(read_sites(sites))]).but(name=method)
    if method in ("both", "lora_o", "lora", "dora"):
        interventions = _bundled_low_rank(read_sites(sites), method, rank)
    elif method == "joint_orthogonal":
        interventions = _joint_orthogonal(_layers(read_sites(sites)), rank, shape)
    else:
        interventions = _bundled_rival(read_sites(sites), method, rank, shape)
    return Preset(
        method,
        interventions,
        epochs=epochs,
        batch_size=16,
        schedule="linear",
        warmup=0.05,
        clip=1.0,
        loss="labels",
    )


def share(preset: Preset, clusters: Iterable[Iterable[int]]) -> Preset:
    """Return the preset with one edit per cluster of layers.

    Of the parts that differ in nothing but their layer, the one in the centre of a cluster keeps its
    parameters and the others use them (`shared_with`). CRaSh (Zhang et al. 2023, arXiv 2310.15477)
    shares the layers themselves in this way: the centre of a cluster of n, at position n // 2, stands
    for all. Its code copies the centre's weights; here the parameters stay tied while they train.

    Args:
        preset: any.
        clusters: layers that share, such as those of `select.clusters.cluster_layers`; layers of no
            cluster keep their own parameters.

    Raises:
        ConfigError: a layer is in two clusters, or a part already shares.

    Examples:
        >>> preset = bundled(range_sites("2-4", n_layers=8), "loreft")
        >>> [part.options for part in share(preset, [(2, 3, 4)]).parts]
        [{'rank': 4, 'shared_with': 'L3.resid_post@query.last'}, {'rank': 4}, {'rank': 4, 'shared_with': 'L3.resid_post@query.last'}]
    """
    cluster_of: dict[int, int] = {}
    for i, cluster in enumerate(clusters):
        for layer in cluster:
            if cluster_of.setdefault(layer, i) != i:
                raise ConfigError(f"layer {layer} is in two clusters; each layer belongs to one")
    alike: dict[Any, list[Part]] = {}
    for part in preset.parts:
        if SHARED in part.options:
            raise ConfigError(
                f"{part.family} at {part.place} already uses the parameters of {part.options[SHARED]}; share a preset once"
            )
        layer, rest = _split(part)
        if layer in cluster_of:
            key = (
                cluster_of[layer],
                part.family,
                rest,
                repr(part.options),
                part.lr,
                part.weight_decay,
            )
            alike.setdefault(key, []).append(part)
    lenders: dict[int, str] = {}
    for members in alike.values():
        members = sorted(members, key=lambda part: _split(part)[0])
        centre = members[len(members) // 2]
        lenders |= {id(part): centre.place for part in members if part is not centre}
    made = tuple(
        replace(p, options={**p.options, SHARED: lenders[id(p)]}) if id(p) in lenders else p
        for p in preset.parts
    )
    return preset.but(name=f"{preset.name} shared", parts=made)


def _split(part: Part) -> tuple[int, str]:
    """Return the layer of a part's place and the rest of its spelling."""
    layer = parse_place(part.place).layer
    return layer, part.place.removeprefix(f"L{layer}")


def _bundled_low_rank(sites: Sequence[Site], method: str, rank: int) -> tuple[Part, ...]:
    """Return the parts of the methods with a low-rank update of weights."""
    layers, alpha = _layers(sites), 2.0 * rank
    if method == "both":
        rates = {"lr_weight": RATES["lora"], "lr_representation": RATES["loreft"]}
        return both_parts(sites, rank=rank, alpha=alpha, **rates)
    family = "dora" if method == "dora" else "lora"
    names = ("W_O",) if method == "lora_o" else _UP_DOWN
    options = {"rank": rank, "alpha": alpha, "rank_stabilised": False}
    return parts(family, matrices(layers, *names), RATES[family], **options)


def _joint_orthogonal(layers: Sequence[int], rank: int, shape: Shape | None) -> tuple[Part, ...]:
    """Return LoRA on every matrix of the layers, and a steerer behind each layer that does not read
    what the LoRA of its W_out writes.
    """
    lora = {"rank": rank, "alpha": 2.0 * rank}
    return (
        *parts("lora", matrices(layers, *_matrices(shape)), RATES["lora"], **lora),
        *(
            Part(
                "post_block",
                f"L{layer}.resid_post",
                {"rank": rank, "orthogonal_to": f"L{layer}.W_out"},
                RATES["post_block"],
            )
            for layer in layers
        ),
    )


def _matrices(shape: Shape | None) -> tuple[str, ...]:
    """Return the matrices of a layer; those that every model has, where the shape is not known."""
    return ("W_Q", "W_K", "W_V", "W_O", "W_in", "W_out") if shape is None else shape.matrices


def _bundled_rival(
    sites: Sequence[Site], method: str, rank: int, shape: Shape | None
) -> tuple[Part, ...]:
    """Return the parts of the other methods."""
    layers, rate = _layers(sites), RATES[method]
    if method == "prefix":
        return parts(method, (f"L{layer}" for layer in layers), rate, length=rank)
    if method == "adapter":
        kinds = ("attn_out", "mlp_out")
        return parts(method, (Site(x, kind) for x in layers for kind in kinds), rate, rank=rank)
    if method == "reft_r1":
        return parts(method, (Site(x, "resid_post", None, "all") for x in layers), rate)
    if method == "post_block":
        return parts(method, (Site(x, "resid_post") for x in layers), rate, rank=rank)
    if method in ("bitfit", "full", "tinylora"):
        options = {"u": rank} if method == "tinylora" else {}
        return parts(method, matrices(layers, *_matrices(shape)), rate, **options)
    if method == "head_gate":
        heads = range(shape.n_heads if shape is not None else 0)
        return parts(method, (Site(layer, "head", h) for layer in layers for h in heads), rate)
    if method in ("red", "steering"):
        return parts(method, _outputs(sites), rate)
    return parts(method, _outputs(sites), rate, rank=rank)


def named(name: str, sites: Sequence[Site], shape: Shape, rank: int = 4) -> Preset:
    """Return the preset of a name, as the command takes it.

    Args:
        name: `paper`, `authors_code`, one of `METHODS`, or `table2:` and a key of `TABLE_2` (which
            brings its own places).
        sites: where.
        shape: of the model.
        rank: of whatever has one.

    Raises:
        ConfigError: there is none of that name.
    """
    if name.startswith("table2:"):
        if (row := name.removeprefix("table2:")) not in TABLE_2:
            raise ConfigError(
                f"unknown preset {name!r}; accepted: {choices(f'table2:{k}' for k in TABLE_2)}"
            )
        return TABLE_2[row](shape)
    if name == "paper":
        return paper(sites, rank=rank)
    if name == "authors_code":
        return authors_code(sites, rank=rank)
    if name not in METHODS:
        raise ConfigError(
            f"unknown preset {name!r}; accepted: {choices(['paper', 'authors_code', *METHODS, 'table2:lora ...'])}"
        )
    return bundled(sites, name, rank=rank, shape=shape)
