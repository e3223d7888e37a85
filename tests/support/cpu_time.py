"""`--cpu-durations N`: the CPU seconds of the whole run and of its N dearest tests, subprocesses included.

CPU time is what the limit of the fast suite is counted in: unlike wall time, it does not depend on
what else the machine is doing.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

KEY = "cpu_seconds"


def cpu_seconds() -> float:
    """Return the CPU seconds that this process and its finished children have used."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--cpu-durations",
        type=int,
        default=0,
        metavar="N",
        help="show the CPU seconds of the run and of its N dearest tests",
    )


class CpuTime:
    """Measure every test where it runs; print the table where the run is controlled."""

    def __init__(self, count: int):
        self.count = count
        self.start = 0.0
        self.seconds: dict[str, float] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self) -> Iterator[None]:
        self.start = cpu_seconds()
        return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Iterator[None]:
        report = yield
        if report.when == "teardown":
            report.user_properties.append((KEY, cpu_seconds() - self.start))
        return report

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        for name, value in report.user_properties:
            if name == KEY and report.when == "teardown":
                self.seconds[report.nodeid] = value

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        by_file: dict[str, float] = {}
        for test, seconds in self.seconds.items():
            file = test.split("::")[0]
            by_file[file] = by_file.get(file, 0.0) + seconds
        dearest = sorted(self.seconds.items(), key=lambda item: -item[1])[: self.count]
        terminalreporter.section(f"CPU time: {sum(self.seconds.values()):.0f} s in tests")
        for name, seconds in dearest:
            terminalreporter.write_line(f"{seconds:8.1f}  {name}")
        terminalreporter.section("CPU time by file")
        for name, seconds in sorted(by_file.items(), key=lambda item: -item[1]):
            terminalreporter.write_line(f"{seconds:8.1f}  {name}")


def pytest_configure(config: pytest.Config) -> None:
    if count := config.getoption("--cpu-durations"):
        config.pluginmanager.register(CpuTime(count), "cpu-time")
