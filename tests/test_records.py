"""Files are written whole or not at all, and a folder belongs to one run."""

from __future__ import annotations

import hashlib
import json
import math
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from jsonschema import Draft202012Validator

import mech_absa
from mech_absa.errors import DataError, RunFolderError
from mech_absa.examples import Polarity
from mech_absa.records import (
    RunFolder,
    atomic,
    close_all,
    fingerprint,
    finite,
    plain,
    read_json,
    read_table,
    sha256_bytes,
    sha256_file,
    versions,
    write_json,
    write_text,
)
from mech_absa.schemas import SCHEMAS, STATE, TABLES, published


def names(folder: Path) -> set[str]:
    return {p.name for p in folder.iterdir()}


def test_a_writer_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(KeyboardInterrupt), atomic(tmp_path / "a.csv") as temporary:
        temporary.write_text("half")
        assert temporary.parent == tmp_path, (
            "another file system could not be moved from in one step"
        )
        assert temporary.suffix == ".csv", "writers choose their format by it"
        raise KeyboardInterrupt
    assert names(tmp_path) == set()


def test_a_writer_that_fails_keeps_the_old_file(tmp_path):
    path = tmp_path / "a.csv"
    write_text(path, "old")
    with pytest.raises(ZeroDivisionError), atomic(path) as temporary:
        temporary.write_text("half")
        assert path.read_text() == "old", "the old file stands until the new one is whole"
        _ = 1 / 0
    assert path.read_text() == "old"
    assert names(tmp_path) == {"a.csv"}


def test_a_writer_that_succeeds_replaces(tmp_path):
    path = tmp_path / "new" / "folder" / "a.txt"
    write_text(path, "old")
    write_text(path, "déjà vu 好")
    assert path.read_bytes() == "déjà vu 好".encode()
    assert names(path.parent) == {"a.txt"}


def test_json_that_cannot_be_written_keeps_the_old_one(tmp_path):
    write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(ValueError, match="surrogates"):
        write_json(tmp_path / "a.json", {"x": "\ud800"})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": 1}
    assert names(tmp_path) == {"a.json"}


def test_others_can_read_the_result(tmp_path):
    (tmp_path / "plain").write_text("")
    write_text(tmp_path / "atomic", "")
    assert (tmp_path / "atomic").stat().st_mode == (tmp_path / "plain").stat().st_mode


@dataclass(frozen=True)
class Inner:
    where: Path
    polarity: Polarity


@dataclass(frozen=True)
class Config:
    inner: Inner
    layers: tuple[int, ...]
    names: frozenset[str]
    rate: float = 0.5


def test_plain():
    config = Config(Inner(Path("a/b"), Polarity.NEGATIVE), (1, 2), frozenset("cab"))
    assert plain(config) == {
        "inner": {"where": "a/b", "polarity": "negative"},
        "layers": [1, 2],
        "names": ["a", "b", "c"],
        "rate": 0.5,
    }
    numbers = plain({"f": np.float32(0.5), "i": np.int64(3), "b": np.bool_(True), 4: None})
    assert numbers == {"f": 0.5, "i": 3, "b": True, "4": None}
    assert [type(v) for v in numbers.values()] == [float, int, bool, type(None)]


def test_numbers_that_json_has_no_word_for_become_null(tmp_path):
    """RFC 8259 has no NaN; `JSON.parse` of a browser refuses the word."""
    value = {
        "a": float("nan"),
        "b": [np.float32("inf"), (-math.inf, 1.5)],
        "c": {"d": np.float64(2)},
    }
    write_json(tmp_path / "a.json", value)
    text = (tmp_path / "a.json").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == {
        "a": None, "b": [None, [None, 1.5]], "c": {"d": 2.0},
    }  # fmt: skip
    assert finite({"x": (1.0, float("nan"))}) == {"x": [1.0, None]}


@pytest.mark.parametrize(
    ("value", "name"),
    [
        (np.arange(3), "ndarray"), (torch.zeros(2), "Tensor"), (object(), "object"), (b"x", "bytes"), (1j, "complex"),
        (int, "type"), ({(1, 2): 3}, "tuple"), ({1.5: 0}, "float"),
    ],
)  # fmt: skip
def test_a_value_of_an_unknown_type_is_no_text(tmp_path, value, name):
    with pytest.raises(TypeError, match=f"a {name} "):
        write_json(tmp_path / "a.json", {"deep": [value]})
    assert names(tmp_path) == set()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "a.json:1 is damaged: it is not JSON"),
        ('{"key": "k",\n"config": {},}', "a.json:2 is damaged"),
        ("[" * 100_000, "nested too deep"),
        ('{"key": "a", "key": "b"}', "names the key 'key' more than once"),
        ("[]", "[] is not of type 'object'"),
        ('{"key": 3, "config": {}}', "key: 3 is not of type 'string'"),
        ('{"key": "k"}', "'config' is a required property"),
        ('{"key": "k", "config": {}, "schema": 99}', "schema: 99 is not one of [1, 2]"),
    ],
)
def test_damaged_json_is_one_sentence(tmp_path, text, words):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(RunFolderError, match=re.escape(words)) as caught:
        read_json(tmp_path / "a.json", STATE)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500


def test_json_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match=r"there is no file .*a\.json"):
        read_json(tmp_path / "a.json", error=DataError)
    with pytest.raises(RunFolderError, match="cannot be read"):
        read_json(tmp_path)
    (tmp_path / "a.json").write_bytes(b'"\xff"')
    with pytest.raises(RunFolderError, match="not UTF-8"):
        read_json(tmp_path / "a.json")
    (tmp_path / "a.json").write_text("[NaN, -Infinity, 1]")
    assert read_json(tmp_path / "a.json") == [None, None, 1], "as versions before 0.2 wrote them"


def test_every_schema_is_a_schema():
    for schema in (*SCHEMAS.values(), STATE):
        Draft202012Validator.check_schema(schema)


def test_tables_are_checked_by_the_schema_of_a_row(tmp_path):
    row = {"kind": "mlp_out", "layer": 2, "head": -1, "aie": 0.5, "ci_low": 0.1, "ci_high": 0.9}
    good = pd.DataFrame([row | {"p_adjusted": np.nan, "n": 3, "role": "answer"}])
    path = tmp_path / "importance.csv"
    good.to_csv(path, index=False)
    assert len(read_table(path)) == 1
    good.assign(head=np.nan).to_csv(path, index=False)
    assert read_table(path)["head"].isna().all(), "older runs leave the head empty"
    for change, words in (
        ({"aie": "high"}, "the column aie holds other values than number or null"),
        ({"layer": 1.5}, "the column layer holds other values than integer"),
        ({"n": None}, "the column n holds other values than integer"),
    ):
        good.assign(**change).to_csv(path, index=False)
        with pytest.raises(RunFolderError, match=words):
            read_table(path)
    for data in (b"", b"\xff\xfe\x00", b'"'):
        path.write_bytes(data)
        with pytest.raises(RunFolderError, match=r"importance\.csv is damaged"):
            read_table(path)
    with pytest.raises(DataError, match="there is no file"):
        read_table(tmp_path / "effects.parquet", error=DataError)


def test_published_schemas_are_schemas_of_every_file():
    names = {name.partition(".")[0] for name in published()}
    assert names == {n.partition(".")[0] for n in (*SCHEMAS, *TABLES)}
    for schema in published().values():
        Draft202012Validator.check_schema(schema)


def test_fingerprint():
    assert fingerprint({"a": 1, "b": (2, 3)}) == fingerprint({"b": [2, 3], "a": 1}), (
        "neither the order nor the kind of sequence counts"
    )
    seen = [
        fingerprint(c)
        for c in ({"a": 1}, {"a": 2}, {"a": "1"}, {"b": 1}, {"a": 1, "b": None}, {"a": True})
    ]
    assert len(set(seen)) == len(seen)


def test_hashes(tmp_path):
    data = bytes(range(256)) * 999
    (tmp_path / "f").write_bytes(data)
    assert (
        sha256_file(tmp_path / "f")
        == sha256_bytes(data[:1000], data[1000:])
        == hashlib.sha256(data).hexdigest()
    )


def test_versions():
    import torch

    assert versions()["torch"] == torch.__version__
    assert {"python", "transformer-lens", "transformers", "numpy"} <= set(versions())


# ---- folders --------------------------------------------------------------------------------------------------------------------

CONFIG = {"data": "laptop.json", "limit": 20, "device": "cpu"}


def test_nothing_is_created_before_it_is_opened(tmp_path):
    out = tmp_path / "runs" / "one"
    folder = RunFolder(out, CONFIG)
    assert not folder.finished
    assert names(tmp_path) == set()
    folder.open()
    assert json.loads((out / ".run" / "config.json").read_text())["config"] == CONFIG


def test_a_folder_that_is_not_empty_is_refused(tmp_path):
    (tmp_path / "thesis.doc").write_text("")
    with pytest.raises(
        RunFolderError,
        match=re.escape(f"--out {tmp_path} is not empty; choose a new folder, or give --resume"),
    ):
        RunFolder(tmp_path, CONFIG)
    with pytest.raises(
        RunFolderError,
        match=re.escape(f"--out {tmp_path} holds no run to resume; choose a new or empty folder"),
    ):
        RunFolder(tmp_path, CONFIG, resume=True)
    assert names(tmp_path) == {"thesis.doc"}


def test_a_file_is_refused(tmp_path):
    path = tmp_path / "thesis.doc"
    path.write_text("x")
    for resume in (False, True):
        with pytest.raises(
            RunFolderError,
            match=re.escape(f"--out {path} is a file; a folder that is new or empty is needed"),
        ):
            RunFolder(path, CONFIG, resume=resume)
    assert path.read_text() == "x"


def test_an_empty_folder_is_welcome(tmp_path):
    assert not RunFolder(tmp_path, CONFIG).open().finished
    assert names(tmp_path) == {".run"}


def killed(out: Path) -> Path:
    """A run that wrote a part and a table, and died."""
    folder = RunFolder(out, CONFIG, free=("device",)).open()
    folder.part("part-0").write_text("0")
    folder.write("table.csv", lambda path: path.write_text("a,b"))
    folder.close()  # as the operating system does for a process that dies
    return out


def test_the_same_configuration_takes_up_where_it_stopped(tmp_path):
    killed(tmp_path / "out")
    folder = RunFolder(tmp_path / "out", CONFIG, resume=True, free=("device",)).open()
    assert folder.part("part-0").read_text() == "0"
    assert not folder.finished
    folder.close()
    free = RunFolder(
        tmp_path / "out", CONFIG | {"device": "cuda"}, resume=True, free=("device",)
    ).open()
    assert free.part("part-0").exists(), "a free key may change"


def test_a_killed_run_is_not_taken_up_unasked(tmp_path):
    killed(tmp_path / "out")
    with pytest.raises(RunFolderError, match="is not empty"):
        RunFolder(tmp_path / "out", CONFIG, free=("device",))


@pytest.mark.parametrize(
    ("change", "keys"),
    [
        ({"limit": 21}, "limit"),
        ({"limit": 21, "data": "rest.json"}, "data, limit"),
        ({"seed": 1}, "seed"),
    ],
)
def test_another_configuration_is_refused_by_name(tmp_path, change, keys):
    out = killed(tmp_path / "out")
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    with pytest.raises(
        RunFolderError,
        match=re.escape(
            f"--out {out} holds a run with another configuration (it differs in {keys});"
        ),
    ):
        RunFolder(out, CONFIG | change, resume=True, free=("device",))
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before


def test_finish(tmp_path):
    out = killed(tmp_path / "out")
    folder = RunFolder(out, CONFIG, resume=True, free=("device",)).open()
    folder.finish({"kept": 3, "dropped": {"wrong": np.int64(2)}})
    record = json.loads((out / "run.json").read_text())
    assert record["config"] == CONFIG and record["kept"] == 3 and record["dropped"] == {"wrong": 2}
    assert record["versions"]["python"] and record["seconds"] >= 0
    assert names(out) == {"run.json", "table.csv"}, "the parts are gone, the result stays"
    again = RunFolder(out, CONFIG, resume=True, free=("device",))
    assert again.finished
    with pytest.raises(RunFolderError, match="it differs in limit"):
        RunFolder(out, CONFIG | {"limit": 1}, resume=True, free=("device",))


def test_a_failed_write_into_a_folder(tmp_path):
    folder = RunFolder(tmp_path / "out", CONFIG).open()

    def half(path: Path) -> None:
        path.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        folder.write("figures/map.png", half)
    assert (
        names(tmp_path / "out") == {".run", "figures"}
        and names(tmp_path / "out" / "figures") == set()
    )


# ---- one owner ------------------------------------------------------------------------------------------------------------------


HOLD = """
import json, sys
from mech_absa.records import RunFolder
RunFolder(sys.argv[1], json.loads(sys.argv[2])).open()
print("open", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that has the folder `out` open; it ends when its input is closed."""
    argv = [sys.executable, "-c", HOLD, str(tmp_path / "out"), json.dumps(CONFIG)]
    pipe = subprocess.PIPE
    with subprocess.Popen(
        argv, stdin=pipe, stdout=pipe, text=True, cwd=Path(mech_absa.__file__).parents[1]
    ) as process:
        assert process.stdout.readline() == "open\n"
        yield process


def test_a_folder_has_one_owner_and_a_crash_frees_it(tmp_path, holder):
    out = tmp_path / "out"
    with pytest.raises(RunFolderError, match="is being written by another process"):
        RunFolder(out, CONFIG, resume=True).open()
    holder.kill()
    holder.wait()
    assert not RunFolder(out, CONFIG, resume=True).open().finished
    close_all()


def test_two_that_saw_an_empty_folder(tmp_path):
    """Both pass the first check; the second to open it is refused, also when the first has ended by then."""
    first, second, third = (RunFolder(tmp_path / "out", CONFIG | {"seed": i}) for i in range(3))
    first.open()
    with pytest.raises(RunFolderError, match="another process"):
        second.open()
    first.finish({"command": "x"})
    with pytest.raises(RunFolderError, match="is not empty"):
        third.open()
    assert json.loads((tmp_path / "out" / "run.json").read_text())["config"]["seed"] == 0
    assert names(tmp_path / "out") <= {"run.json", ".run"}


# ---- what a run reads -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ended", [False, True])
def test_other_data_or_another_model_is_refused(tmp_path, ended):
    out = tmp_path / "out"
    first = RunFolder(out, CONFIG).bind({"data": "a" * 64, "model": "b" * 64}).open()
    first.part("part-0").touch()
    if ended:
        first.finish({})
    first.close()
    again = RunFolder(out, CONFIG, resume=True)
    assert again.bind({"data": "a" * 64, "model": "b" * 64}).finished is ended
    for inputs, word in (
        ({"data": "c" * 64, "model": "b" * 64}, "data"),
        ({"data": "a" * 64, "model": "0"}, "model"),
    ):
        with pytest.raises(RunFolderError, match=f"on other inputs: {word} changed"):
            RunFolder(out, CONFIG, resume=True).bind(inputs)


# ---- kill windows ---------------------------------------------------------------------------------------------------------------


def test_killed_between_the_folder_and_its_configuration(tmp_path):
    out = tmp_path / "out"
    (out / ".run").mkdir(parents=True)
    (out / ".run" / "lock").touch()
    (out / ".tmp-table-1.csv").touch()
    for resume in (False, True):
        RunFolder(out, CONFIG, resume=resume).open().close()
        assert not out.exists() or ".tmp-table-1.csv" not in names(out)
        (out / ".run").mkdir(parents=True, exist_ok=True)


def test_killed_before_the_report_is_not_finished(tmp_path):
    out = killed(tmp_path / "out")

    def die(folder: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        RunFolder(out, CONFIG, True, ("device",)).open().finish({}, then=die)
    close_all()
    again = RunFolder(out, CONFIG, True, ("device",))
    assert (out / "run.json").exists() and not again.finished
    assert again.open().part("part-0").exists(), "nothing is computed twice"
    again.finish({}, then=lambda folder: (folder / "report.html").touch())
    assert RunFolder(out, CONFIG, True, ("device",)).finished
    assert names(out) == {"run.json", "report.html", "table.csv"}


def test_a_finished_run_that_lost_a_file(tmp_path):
    folder = RunFolder(tmp_path, CONFIG).open()
    folder.write("table.csv", lambda path: path.write_text("a,b"))
    folder.finish({})
    (tmp_path / "table.csv").unlink()
    with pytest.raises(RunFolderError, match=r"its table\.csv is gone"):
        _ = RunFolder(tmp_path, CONFIG, resume=True).finished


def test_temporary_files_of_a_killed_run_are_cleaned(tmp_path):
    out = killed(tmp_path / "out")
    (out / "figures").mkdir()
    for stale in (
        out / ".tmp-table-abc.csv",
        out / "figures" / ".tmp-map-x.png",
        out / ".run" / ".tmp-part-1",
    ):
        stale.write_text("half")
    RunFolder(out, CONFIG, True, ("device",)).open().close()
    assert not [p for p in out.rglob("*") if p.name.startswith(".tmp-")]
    assert (out / ".run" / "part-0").exists() and (out / "table.csv").exists()


def test_a_run_that_fails_before_it_wrote_leaves_no_trace(tmp_path):
    RunFolder(tmp_path / "new", CONFIG).open()
    (tmp_path / "old").mkdir()
    RunFolder(tmp_path / "old", CONFIG).open()
    close_all()
    assert names(tmp_path) == {"old"} and names(tmp_path / "old") == set()
