"""How many examples ran, by category, at the end of a run in one process."""

from __future__ import annotations

import pytest

from .support import COUNTED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if COUNTED:
        terminalreporter.section("inputs tried")
        for category, outcomes in sorted(COUNTED.items()):
            found = ", ".join(f"{outcome} {count:,}" for outcome, count in sorted(outcomes.items()))
            terminalreporter.write_line(f"{category}: {sum(outcomes.values()):,} ({found})")
