"""Measure how long the explorer takes for the map of one review, through its server as a browser asks it.

    python -m benchmarks.live

The clock runs from the message of the page to the event that ends the map, so tokenising, both unpatched runs
and the way through the server are in it; drawing is not.
"""

from __future__ import annotations

import argparse
import http.client
import json
import statistics
import time
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import torch

import mech_absa as ma
from mech_absa.records import write_json

REVIEW = {
    "sentence": "The food was great but the waiter was rude.",
    "aspect": "food",
    "edited": "The food was awful but the waiter was rude.",
}


def trace(url: str) -> tuple[float, float, int]:
    """Return the seconds until the first cells and until the whole map, and the number of cells."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(str(parts.hostname), parts.port, timeout=600)
    token = parse_qs(parts.query)["token"][0]
    message = json.dumps({"client": "benchmark", "state": REVIEW})
    started, first, cells = time.perf_counter(), 0.0, 0
    connection.request("POST", "/api/trace", message, {"authorization": f"Bearer {token}"})
    for raw in connection.getresponse():
        line = raw.decode()
        if line.startswith("event: cells") and not first:
            first = time.perf_counter() - started
        if line.startswith("event: done"):
            whole = time.perf_counter() - started
        if line.startswith("data: ") and '"cells": ' in line and '"direction"' not in line:
            cells = json.loads(line[6:])["cells"]
    connection.close()
    return first, whole, cells


def main() -> None:
    """Trace, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/live.json")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = ma.load_model()
    explorer = ma.explore(model)
    try:
        trace(explorer.url)  # the first one allocates
        cpu = time.process_time()
        seen = [trace(explorer.url) for _ in range(args.times)]
        cpu = (time.process_time() - cpu) / args.times
    finally:
        explorer.close()
    first, whole, cells = zip(*seen, strict=True)
    result: dict[str, Any] = {
        "model": model.name, "review": REVIEW, "cells": cells[0], "threads": args.threads, "times": args.times,
        "seconds": round(statistics.median(whole), 2), "fastest": round(min(whole), 2), "slowest": round(max(whole), 2),
        "seconds_to_first_cells": round(statistics.median(first), 2), "cpu_seconds": round(cpu, 2), "torch": torch.__version__,
    }  # fmt: skip
    print(json.dumps(result, indent=1))
    write_json(args.out, result)


if __name__ == "__main__":
    main()
