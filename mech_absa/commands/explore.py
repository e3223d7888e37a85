"""`mech-absa explore`: a page on this machine that traces a review while you look.

    mech-absa explore                                        the bundled model, built-in reviews
    mech-absa explore --model gpt2 --data reviews.csv        your model, your reviews
    ssh -L 8800:localhost:8800 there mech-absa explore --port 8800      on another machine, through a tunnel

It prints an address with a token and serves until Ctrl-C. Nothing is written, and nothing is asked of any
other machine.
"""

from __future__ import annotations

import contextlib
import ipaddress
import sys
import webbrowser
from collections.abc import Sequence
from dataclasses import dataclass, field

from tyro.conf import OmitArgPrefixes

from ..errors import ConfigError
from ..model import load_model
from .cli import command, readable, tell_left_out
from .flags import ModelFlags, QuestionFlags, ReadFlags, Sources, flat, join
from .patch import with_adapter


@dataclass(frozen=True)
class Config:
    """Explore a model in the browser: ask it about a review, trace it, train a small edit, live.

    Examples:
      mech-absa explore
      mech-absa explore --model gpt2 --data reviews.csv --browser
    """

    data: Sources = ("builtin:restaurant/test",)
    """Reviews that the page offers, and on which edits are tested."""
    train: Sources = ("builtin:restaurant/train",)
    """Reviews that edits learn from."""
    adapter: str = "none"
    """A trained edit whose weights are merged into the model: a folder, bundled, or none."""
    port: int = 0
    """0 takes a free one."""
    host: str = "127.0.0.1"
    """Where to listen. Another address than this machine's own lets everybody who has the token use the model."""
    browser: bool = False
    """Open the page in the browser."""
    reading: OmitArgPrefixes[ReadFlags] = field(default_factory=ReadFlags)
    question: OmitArgPrefixes[QuestionFlags] = field(default_factory=QuestionFlags)
    model: OmitArgPrefixes[ModelFlags] = field(default_factory=ModelFlags)

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"--port is {self.port}; accepted: 0 to 65535")
        self.reading.check()
        self.question.check(words=(3,))


def main(config: Config) -> None:
    """Serve until Ctrl-C."""
    from ..explore import Explorer

    held, train = (join([config.reading.read(s) for s in d]) for d in (config.data, config.train))
    for examples in (held, train):
        tell_left_out(examples)
    m = config.model
    base = load_model(m.model, device=m.device, dtype=m.dtype, backend=m.backend)
    model, _ = with_adapter(config.adapter, base)
    held, train = (readable(config, model, e) for e in (held, train))
    explorer = Explorer(
        model, train, held, template=config.question.prompt, verbalizer=config.question.verbalizer,
        host=config.host, port=config.port, words=model_words(config),
    )  # fmt: skip
    if not _own(config.host):
        print(
            f"warning: {config.host} can be reached from other machines; who has the token may use the model",
            file=sys.stderr,
        )
    print(f"{explorer.url}\nserving {model.name}; Ctrl-C ends it", flush=True)
    if config.browser:
        webbrowser.open(explorer.url)
    with contextlib.suppress(KeyboardInterrupt):
        explorer.run()
    print("ended")


def model_words(config: Config) -> list[str]:
    """Return the flags that load the same model and ask it the same question in another command."""
    words, given = [f"--adapter={config.adapter}"], flat(config)
    for group in (ModelFlags(), QuestionFlags()):
        for name, usual in flat(group).items():
            if given[name] != usual:
                value = given[name]
                values = value if isinstance(value, tuple) else [value]
                words += [f"--{name}", *map(str, values)]
    return words


def _own(host: str) -> bool:
    """Return whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def cli(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code."""
    return command(Config, main, "mech_absa.explore", argv)


__all__ = ["Config", "cli", "main", "model_words"]
