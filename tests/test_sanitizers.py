"""The C++ core under sanitizers: a part of it here, all of it by `make sanitize`."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from sanitizing import build, calls

# Instrumented here; other rooms' kernels are not. mlp_stack's threads wait for one another.
SHORT = {"address": ["path_accumulate", "residual_add"], "thread": ["mlp_stack", "residual_add"]}


@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", SHORT)
def test_the_library_is_clean_and_planted_faults_are_caught(kind, record_property):
    if build.why_not(kind):
        pytest.skip(build.why_not(kind))
    package = build.package(kind, SHORT[kind], short=True)
    command = [sys.executable, "-m", "sanitizing.calls", kind]
    done = subprocess.run(
        command, cwd=build.HERE.parent, env=build.environment(kind, package),
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["library"][0] == f"sanitized: {kind}"
    assert result["faults"] == [*calls.FAULTS[kind]]
    record_property("calls", result["calls"])
    record_property("faults", len(result["faults"]))
