"""The two commands: what they leave, what they refuse, and that a killed matrix is not trained twice."""

from __future__ import annotations

import json
import shutil

import pandas as pd
import pytest
import torch
from support.tiny_models import tiny_folder
from support.training_cases import TEMPLATE, TEXT, WORDING, write

from mech_absa.commands.matrix import cli as matrix_cli
from mech_absa.commands.patch import cli as patch_cli
from mech_absa.commands.train import cli
from mech_absa.edits import Edit, Part, load_edit
from mech_absa.errors import ConfigError
from mech_absa.examples import Example, Examples, Polarity
from mech_absa.model import load_model
from mech_absa.patch.importance import load_sites, traced_in
from mech_absa.readers import load_examples
from mech_absa.report import page
from mech_absa.sites import Site
from mech_absa.train import Training, matrix
from mech_absa.train.matrix import Domain, Grid, Method, domain_name, summary
from mech_absa.train.places import random_layers, random_windows


@pytest.fixture
def data(tmp_path):
    return {
        "train": write(tmp_path / "toys_train.jsonl", WORDING[:6]),
        "test": write(tmp_path / "toys_test.jsonl", WORDING[4:]),
    }


def run(data, *flags, out) -> int:
    given = {
        "--data": data["train"],
        "--model": str(tiny_folder("llama")),
        "--template": TEXT,
        "--layers": "1",
        "--epochs": "1",
        "--out": str(out),
    }
    given |= dict(zip(flags[::2], flags[1::2], strict=True))
    return cli(
        [word for flag, value in given.items() if value for word in (flag, value)] + ["--quiet"]
    )


def test_the_folder_holds_the_edit_and_how_it_was_made(data, tmp_path, capsys):
    out = tmp_path / "run"
    assert (
        run(data, "--test", data["test"], "--batch-size", "2", "--validation", "0.2", out=out) == 0
    )
    assert {p.name for p in out.iterdir()} == {
        "edit.json",
        "edit.safetensors",
        "history.csv",
        "report.html",
        "run.json",
    }
    model = load_model(tiny_folder("llama"))
    edit = load_edit(out, model)
    record, history = json.loads((out / "run.json").read_text()), pd.read_csv(out / "history.csv")
    assert (
        edit.layers == (1,)
        and record["edit"]["parameters"] == edit.n_parameters == 4 * 64 + 4 * 64 + 4
    )
    assert (
        record["model"]["sha256"] == model.sha256
        and record["config"]["layers"] == "1"
        and record["data"][0]["classes"]["negative"] == 3
    )
    assert len(history) == record["edit"]["steps"] and history["loss"].notna().all()
    assert any(
        "2 of 4 rows" in w and "toys_test" in w and "2 with the same label" in w
        for w in record["warnings"]
    )
    assert (
        run(data, "--test", data["test"], "--batch-size", "2", "--validation", "0.2", out=out) == 2
    )
    assert "is not empty" in capsys.readouterr().err


def test_clusters_share_an_edit_and_flags_reach_the_preset(data, tmp_path):
    """Two clusters of three layers: one layer has an edit of its own, and two share one."""
    flags = ("--layers", "all", "--clusters", "2", "--balance", "1", "--loss", "text")
    assert run(data, *flags, "--shared-weight", "0.5", out=tmp_path / "run") == 0
    edit = load_edit(tmp_path / "run", load_model(tiny_folder("llama")))
    assert edit.layers == (0, 1, 2) and edit.n_parameters == 2 * (4 * 64 + 4 * 64 + 4)
    assert sum(i.borrows for i in edit) == 2
    assert edit.record.preset["balance"] == 1 and edit.record.preset["shared_weight"] == 0.5
    assert pd.read_csv(tmp_path / "run" / "history.csv")["kappa"].notna().all()


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--rank", "0"), "rank 0 was asked for"),
        (("--rank", "33"), "accepted: 1 to 32"),
        (("--layers", "3"), "the model has 3 layers"),
        (("--layers", "1-x"), "names no layers"),
        (("--layers", ""), "give --sites FOLDER, or --layers"),
        (("--positions", "verb"), "unknown role 'verb'"),
        (("--positions", "opinion"), "none of the"),
        (("--preset", "magic"), "unknown preset 'magic'"),
        (("--preset", "table2:magic"), "table2:lora"),
        (("--validation", "1"), "--validation is 1.0"),
        (("--data", "nowhere.jsonl"), "no such file"),
        (("--epochs", "-1"), "epochs is -1"),
        (("--clusters", "0"), "0 clusters of 3 layers were asked for; accepted: 1 to 3"),
        (("--clusters", "2"), "no two layers of the edit share one of the clusters"),
        (("--shared-weight", "0.5"), "the loss labels reads no tokens"),
        (("--preset", "lora_o", "--balance", "1"), "lora_o has not both edits of weights"),
    ],
)
def test_bad_input_is_one_sentence_and_leaves_nothing(data, tmp_path, capsys, flags, words):
    out = tmp_path / "run"
    assert run(data, *flags, out=out) == 2
    said = capsys.readouterr().err.strip()
    assert words in said and "\n" not in said and "Traceback" not in said
    assert not out.exists()


@pytest.mark.slow
def test_sites_of_the_base_of_the_adapted_and_of_another_model(data, tmp_path, capsys):
    """The paper's case: traced after adaptation, edited in the base. `traced_in` of a merged model knows both."""
    model = load_model(tiny_folder("llama"))
    merged = Edit.fresh(model, [Part("bitfit", "L0.W_O")])
    with torch.no_grad():
        next(iter(merged)).b += 1
    adapted = merged.merged(model)
    assert adapted.sha256 != model.sha256
    sites, out = tmp_path / "sites.json", tmp_path / "run"

    def attempt(
        about: dict | None, *flags: str, where: str = "L1.resid_post@query.last"
    ) -> tuple[int, str]:
        shutil.rmtree(out, ignore_errors=True)
        sites.write_text(json.dumps({"sites": [where]} | ({"model": about} if about else {})))
        code = run(data, "--layers", "", "--sites", str(sites), *flags, out=out)
        return code, capsys.readouterr().err.strip()

    assert attempt(traced_in(model))[0] == 0
    assert attempt(traced_in(adapted, model, "bundled"))[0] == 0
    assert load_edit(out, model).layers == (1,)
    assert attempt(None)[0] == 0, "an older file does not say"
    other = load_model(tiny_folder("mistral"))
    code, said = attempt(traced_in(other))
    assert (
        code == 2
        and "\n" not in said
        and str(sites) in said
        and "--any-sites" in said
        and not out.exists()
    )
    assert (
        f"found in {other.name} (weights {other.sha256[:12]}, 3 layers)" in said
        and model.sha256[:12] in said
    )
    # Adapted alone, the base unknown: of the same name and sizes, but with other weights.
    code, said = attempt(traced_in(adapted))
    assert code == 2 and adapted.sha256[:12] in said
    # The hash is that of what the files hold, so another dtype is the same model.
    assert attempt(traced_in(load_model(tiny_folder("llama"), dtype="bfloat16")))[0] == 0
    warnings = json.loads((out / "run.json").read_text())["warnings"]
    assert not [w for w in warnings if "cannot be compared" in w]
    code, said = attempt(traced_in(model), where="L7.resid_post@query.last")
    assert code == 2 and str(sites) in said and "3 layers" in said


def test_sites_of_another_model_where_they_are_asked_for(data, tmp_path, capsys):
    sites = tmp_path / "sites.json"
    sites.write_text(
        json.dumps(
            {
                "sites": ["L2.resid_post@query.last"],
                "model": {"name": "elsewhere", "sha256": "0" * 64, "n_layers": 32},
            }
        )
    )
    words = [
        "--data",
        data["train"],
        "--model",
        str(tiny_folder("llama")),
        "--template",
        TEXT,
        "--epochs",
        "1",
        "--sites",
        str(sites),
    ]
    assert cli([*words, "--any-sites", "--out", str(tmp_path / "run"), "--no-report"]) == 0
    assert "found in elsewhere (weights 000000000000, 32 layers)" in capsys.readouterr().err
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["config"]["any_sites"] is True and any(
        "elsewhere" in w and "all the same" in w for w in record["warnings"]
    )
    assert (
        load_edit(tmp_path / "run").layers == (2,)
        and not (tmp_path / "run" / "report.html").exists()
    )


def test_a_loss_that_is_no_number_keeps_what_was_good(data, tmp_path, capsys):
    assert (
        run(
            data,
            "--preset",
            "red",
            "--layers",
            "all",
            "--positions",
            "all",
            "--lr-representation",
            "1e37",
            "--clip",
            "0",
            "--epochs",
            "4",
            out=tmp_path / "run",
        )
        == 2
    )
    assert (
        "the last good state was kept" in (said := capsys.readouterr().err)
        and str(tmp_path / "run") in said
    )
    assert all(bool(torch.isfinite(p).all()) for p in load_edit(tmp_path / "run").parameters())


@pytest.mark.slow
def test_a_broken_loss_is_said_again_when_the_run_is_resumed(data, tmp_path, capsys):
    words = ["--data", data["train"], "--model", str(tiny_folder("llama")), "--template", TEXT, "--preset", "red", "--layers", "all", "--positions",
             "all", "--lr-representation", "1e37", "--clip", "0", "--epochs", "4", "--out", str(tmp_path / "run"), "--quiet"]  # fmt: skip
    assert cli(words) == 2
    first = capsys.readouterr().err
    assert "the last good state was kept" in first and (tmp_path / "run" / "report.html").exists()
    assert cli([*words, "--resume"]) == 2 and capsys.readouterr().err == first


def test_a_report_that_fails_loses_no_run(data, tmp_path, monkeypatch, capsys):
    def broken(*args):
        raise MemoryError("no room")

    monkeypatch.setattr(page, "write_report", broken)
    assert run(data, out=tmp_path / "run") == 0
    assert {p.name for p in (tmp_path / "run").iterdir()} == {
        "edit.json",
        "edit.safetensors",
        "history.csv",
        "run.json",
    }
    assert (
        "report.html could not be written (MemoryError: no room); all other files are there"
        in capsys.readouterr().err
    )


@pytest.mark.slow
def test_from_a_trace_of_the_adapted_model_to_an_edit_of_its_base(data, tmp_path, capsys):
    """The paper's order, by its commands: adapt, trace the adapted model, edit the base where the trace points; and nowhere else."""
    common = ["--template", TEXT, "--quiet", "--no-report"]
    base = ["--model", str(tiny_folder("llama")), *common]
    assert (
        cli(
            [
                *base,
                "--data",
                data["train"],
                "--layers",
                "1",
                "--preset",
                "lora_o",
                "--epochs",
                "1",
                "--out",
                str(tmp_path / "adapter"),
            ]
        )
        == 0
    )
    traced = [
        "--data",
        data["train"],
        "--adapter",
        str(tmp_path / "adapter"),
        "--keep",
        "all",
        "--noise-draws",
        "1",
        "--by",
        "role",
        "--no-figures",
    ]
    assert (
        patch_cli([*base, *traced, "--sites", "resid_post", "--out", str(tmp_path / "trace")]) == 0
    )
    said, model = (
        json.loads((tmp_path / "trace" / "sites.json").read_text())["model"],
        load_model(tiny_folder("llama")),
    )
    assert said == traced_in(
        load_edit(tmp_path / "adapter", model).merged(model), model, str(tmp_path / "adapter")
    )
    assert said["base_sha256"] == model.sha256 != said["sha256"]
    sites = ["--sites", str(tmp_path / "trace" / "sites.json")]
    assert (
        cli(
            [
                *base,
                "--data",
                data["train"],
                *sites,
                "--epochs",
                "1",
                "--out",
                str(tmp_path / "edit"),
            ]
        )
        == 0
    )
    assert [str(s.layer) for s in load_sites(tmp_path / "trace" / "sites.json")] == [
        str(layer) for layer in load_edit(tmp_path / "edit").layers
    ]
    grid = [
        "--train",
        data["train"],
        "--test",
        data["test"],
        "--methods",
        "both@sites",
        "--seeds",
        "0",
        "--epochs",
        "1",
        *sites,
    ]
    assert matrix_cli([*base, *grid, "--out", str(tmp_path / "matrix")]) == 0
    capsys.readouterr()
    other = ["--model", str(tiny_folder("mistral")), *common]
    assert matrix_cli([*other, *grid, "--out", str(tmp_path / "elsewhere")]) == 2
    assert (
        "these sites were found in" in (err := capsys.readouterr().err)
        and err.count("\n") == 1
        and not (tmp_path / "elsewhere").exists()
    )
    assert matrix_cli([*other, *grid, "--any-sites", "--out", str(tmp_path / "elsewhere")]) == 0
    assert any(
        "all the same" in w
        for w in json.loads((tmp_path / "elsewhere" / "run.json").read_text())["warnings"]
    )


@pytest.mark.slow
def test_a_killed_command_resumes_to_the_same_bytes(data, tmp_path, monkeypatch):
    flags = ("--batch-size", "1", "--epochs", "2", "--checkpoint-every", "1")
    assert run(data, *flags, out=tmp_path / "whole") == 0
    save, calls = Training.save, []

    def dying(training, path):
        save(training, path)
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(Training, "save", dying)
    assert run(data, *flags, out=tmp_path / "cut") == 130
    assert not (tmp_path / "cut" / "edit.json").exists()
    monkeypatch.setattr(Training, "save", save)
    words = [w for f, v in zip(flags[::2], flags[1::2], strict=True) for w in (f, v)]
    again = [
        "--data",
        data["train"],
        "--model",
        str(tiny_folder("llama")),
        "--template",
        TEXT,
        "--layers",
        "1",
        *words,
        "--out",
        str(tmp_path / "cut"),
    ]
    assert cli([*again, "--quiet", "--resume"]) == 0
    assert (tmp_path / "cut" / "edit.safetensors").read_bytes() == (
        tmp_path / "whole" / "edit.safetensors"
    ).read_bytes()
    assert not (tmp_path / "cut" / ".run").exists()


# ---- the matrix ----------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_every_pair_of_domains_once_and_nothing_trained_twice(tmp_path, monkeypatch):
    files = {
        f"{d}_{s}": write(tmp_path / f"{d}_{s}.jsonl", rows)
        for d, s, rows in [
            ("a", "train", WORDING[:5]),
            ("a", "test", WORDING[5:]),
            ("b", "train", WORDING[3:]),
            ("b", "test", WORDING[:4]),
        ]
    }
    trained, real = [], matrix.run.fit

    def counted(model, examples, preset, **options):
        trained.append((preset.name, options["seed"]))
        if len(trained) == 4:
            raise KeyboardInterrupt
        return real(model, examples, preset, **options)

    monkeypatch.setattr(matrix.run, "fit", counted)
    command = [
        "--train", files["a_train"], files["b_train"], "--test", files["a_test"], files["b_test"], "--model", str(tiny_folder("llama")),
        "--template", TEXT, "--methods", "zero_shot", "both@2", "steering@first", "--seeds", "0", "1", "--epochs", "1",
        "--validation", "0", "--out", str(tmp_path / "run"), "--quiet",
    ]  # fmt: skip
    assert matrix_cli(command) == 130
    assert len(trained) == 4
    assert matrix_cli([*command, "--resume"]) == 0
    assert len(trained) == 4 + 8 - 3  # eight trainings in all, three of which were finished
    table = pd.read_csv(tmp_path / "run" / "matrix.csv", keep_default_na=False)
    assert (
        len(table) == 2 + 2 * 2 * 2 * 2
    )  # zero-shot on two tests; method x seed x training domain x test
    of = table[table["method"] == "both@2"]
    assert set(zip(of["train"], of["test"], of["seed"], strict=True)) == {
        (x, y, s) for x in "ab" for y in "ab" for s in (0, 1)
    }
    assert (
        (of["in_domain"] == (of["train"] == of["test"])).all()
        and (of["trainable"] == 516).all()
        and (of["layers"].astype(str) == "2").all()
    )
    leaked = {(r["train"], r["test"]): r["leaked"] for _, r in of.iterrows()}
    assert leaked == {("a", "a"): 0, ("a", "b"): 4, ("b", "a"): 3, ("b", "b"): 1}
    beside = pd.read_csv(tmp_path / "run" / "matrix_baselines.csv")
    for row in beside[beside["baseline"] == "majority"].itertuples():
        train = [e.polarity for e in load_examples(files[f"{row.train}_train"])]
        test = [e.polarity for e in load_examples(files[f"{row.test}_test"])]
        most = max(Polarity, key=train.count)
        assert row.accuracy == pytest.approx(test.count(most) / len(test)) and row.n == len(test)
    assert len(beside[beside["baseline"] == "words around the aspect"]) == 4
    short = pd.read_csv(tmp_path / "run" / "summary.csv").set_index("method")
    hand = of[of["in_domain"]].groupby("seed")["accuracy"].mean()
    assert short.loc["both@2", "accuracy_in"] == pytest.approx(hand.mean()) and short.loc[
        "both@2", "accuracy_in_sd"
    ] == pytest.approx(hand.std())
    assert short.loc["zero_shot", "trainable"] == 0


def test_the_summary_by_hand():
    row = lambda train, test, seed, acc: {  # noqa: E731
        "method": "m", "train": train, "test": test, "in_domain": train == test, "seed": seed, "accuracy": acc, "macro_f1": acc / 2,
        "trainable": 7, "share": 0.1, "seconds": 2.0, "steps": 6, "peak_memory_bytes": 2**20,
    }  # fmt: skip
    first = [
        row("x", "x", 0, 0.8),
        row("x", "y", 0, 0.4),
        row("y", "y", 0, 0.6),
        row("y", "x", 0, 0.2),
    ]
    second = [
        row("x", "x", 1, 1.0),
        row("x", "y", 1, 0.5),
        row("y", "y", 1, 0.8),
        row("y", "x", 1, 0.3),
    ]
    (got,) = summary(first + second).to_dict("records")
    assert got["accuracy_in"] == pytest.approx(0.8) and got["accuracy_in_sd"] == pytest.approx(
        2**0.5 / 10
    )
    assert (
        got["accuracy_out"] == pytest.approx(0.35)
        and got["macro_f1_out"] == pytest.approx(0.175)
        and got["seeds"] == 2
    )
    assert got["steps"] == 6 and got["diverged"] == 0
    # A training that diverged has no score: it is counted, and left out of the means.
    broken = [r | {"accuracy": None, "macro_f1": None, "diverged": True} for r in second[:2]]
    (got,) = summary(first + broken + second[2:]).to_dict("records")
    assert got["accuracy_in"] == pytest.approx((0.7 + 0.8) / 2) and got["diverged"] == 1


def test_an_edit_whose_scores_are_not_numbers_is_not_scored(monkeypatch):
    """An edit of infinite parameters: every score is NaN, which argmax would count as the first label."""
    rows = Examples(tuple(Example(s, a, Polarity(p)) for s, a, p in WORDING))
    real = matrix.run.fit

    def broken(*args, **options):
        edit = real(*args, **options)
        with torch.no_grad():
            for p in edit.parameters():
                p.fill_(torch.inf)
        return edit

    monkeypatch.setattr(matrix.run, "fit", broken)
    grid = Grid(
        [Domain("toys", rows, rows)], [Method.parse("loreft@1")], [0], template=TEMPLATE, validation=0.0,
        change=lambda preset: preset.but(epochs=1),
    )  # fmt: skip
    (row,) = matrix.run_matrix(load_model(tiny_folder("llama")), grid)
    assert row["accuracy"] is None and row["diverged"] and row["n"] == 8
    assert row["stopped"] == "the scores of 8 of 8 test examples are not numbers"


def test_random_layers_share_none_with_the_traced_or_the_last():
    """By hand: eight layers, traced 2 and 3, last 6 and 7, so that 0, 1, 4 and 5 are left and give six windows."""
    given = [Site(2, "resid_post"), Site(3, "resid_post")]
    windows = [
        tuple(s.layer for s in Method("both", "random").sites(given, ["query.last"], 8, seed))
        for seed in range(6)
    ]
    assert set(windows) == {(0, 1), (0, 4), (0, 5), (1, 4), (1, 5), (4, 5)}
    for n_layers, width in ((8, 2), (12, 3), (32, 6), (80, 8)):
        traced = range(n_layers // 3, n_layers // 3 + width)
        drawn = {random_layers(width, n_layers, traced, d) for d in range(20)}
        assert not {layer for w in drawn for layer in w} & {
            *traced,
            *range(n_layers - width, n_layers),
        }
        assert len(drawn) == min(20, random_windows(width, n_layers, traced))
    with pytest.raises(ConfigError, match="has 2 of them"):
        random_layers(3, 8, traced=(2, 3, 4))


def test_places_of_a_method():
    given = [Site(2, "resid_post", None, "aspect.last"), Site(3, "resid_post", None, "aspect.last")]

    def layers(where, sites=given, seed=0):
        return [s.layer for s in Method("both", where).sites(sites, ["query.last"], 8, seed)]

    assert (
        layers("sites") == [2, 3]
        and layers("first") == [0, 1]
        and layers("last") == [6, 7]
        and layers("middle") == [3, 4]
    )
    assert (
        layers("all") == list(range(8))
        and layers("4-5") == [4, 5]
        and layers("last", []) == [5, 6, 7]
    )
    assert (
        len(layers("random")) == 2
        and layers("random") == layers("random")
        and len({tuple(layers("random", given, s)) for s in range(20)}) > 5
    )
    assert {s.at for s in Method("both", "last").sites(given, ["query.last"], 8, 0)} == {
        "aspect.last"
    }
    with pytest.raises(ConfigError, match="none were given"):
        layers("sites", [])


@pytest.mark.parametrize(
    "source, name",
    [
        ("builtin:restaurant/train", "restaurant"),
        ("data/device_train.json", "device"),
        ("x/rest-test.jsonl", "rest"),
        ("mams/train.xml", "mams"),
    ],
)
def test_domains_are_named_after_their_files(source, name):
    assert domain_name(source) == name
