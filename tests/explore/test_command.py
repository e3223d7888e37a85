"""`mech-absa explore`: what it prints and refuses, and that Ctrl-C ends it cleanly."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from support.explorer import Client

from mech_absa.commands.explore import Config, model_words
from mech_absa.commands.flags import ModelFlags, QuestionFlags
from mech_absa.explore.__main__ import cli

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--port", "70000"], "--port is 70000; accepted: 0 to 65535"),
        (["--labels", "good", "bad"], "--labels gives 2 words; three are needed"),
        (["--data", "nowhere.jsonl"], "nowhere.jsonl: there is no such file"),
    ],
)
def test_bad_flags_are_refused_before_a_model_is_loaded(words, sentence, capsys):
    assert cli(words) == 2
    said = capsys.readouterr().err
    assert sentence in said and said.count("\n") == 1


def test_the_words_that_load_the_same_model():
    assert model_words(Config()) == ["--adapter=none"]
    config = Config(
        adapter="bundled",
        model=ModelFlags(dtype="float64"),
        question=QuestionFlags(labels=("good", "bad", "fine")),
    )
    assert model_words(config) == [
        "--adapter=bundled", "--dtype", "float64", "--labels", "good", "bad", "fine",
    ]  # fmt: skip


@pytest.mark.slow
def test_ctrl_c_ends_it_cleanly_even_while_it_traces():
    command = [sys.executable, "-m", "mech_absa", "explore"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    # A test that runs in the background of a script ignores SIGINT, and so would what it starts.
    options["preexec_fn"] = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(command, cwd=ROOT, env=dict(os.environ), **options) as process:
        try:
            url = process.stdout.readline().strip()
            assert url.startswith("http://127.0.0.1:") and "token=" in url
            browser = Client(url)
            events = browser.follow("/api/trace")
            assert next(events)[0] == "start"
            process.send_signal(signal.SIGINT)
            out, err = process.communicate(timeout=120)
            browser.leave()
        finally:
            process.kill()  # where it has ended, nothing
    assert process.returncode == 0 and err == ""
    assert out.endswith("ended\n")
