"""info: tells what is loaded, what is not, why, and what mends it."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch

from fastres import info
from fastres.ops import native

ROOT = Path(__file__).parent.parent


@pytest.fixture
def without_libraries(monkeypatch, tmp_path):
    """As where fastres was installed without a compiler."""
    monkeypatch.setattr(native, "C", None)
    monkeypatch.setattr(native, "missing", {"_C": "No module", "_C_cuda": "_C is not loaded"})
    monkeypatch.setattr(info, "__file__", str(tmp_path / "fastres/info.py"))
    monkeypatch.setattr(info, "_checkout", lambda: ROOT)
    return monkeypatch


def test_the_library_is_loaded_where_it_was_required():
    if os.environ.get("FASTRES_BUILD") != "require":
        pytest.skip("FASTRES_BUILD=require is not set")
    assert info.main(["--require", "cpu"]) == 0


@pytest.mark.skipif(native.C is None, reason="_C is not built")
def test_a_loaded_library_tells_how_it_was_built():
    cpu = info.collect()["libraries"]["_C"]
    assert cpu["loaded"]
    assert re.fullmatch(r".+, C\+\+(17|20)", cpu["facts"]["compiler"])
    assert cpu["facts"]["torch"].endswith("runs on 2.11 and later")
    assert cpu["facts"]["instructions"].split(",")[0] in cpu["facts"]["instructions"].split()


def test_a_missing_library_names_reason_and_command(without_libraries, capsys):
    assert info.main() == 0
    out = capsys.readouterr().out
    assert "_C        NOT LOADED\n  why           not built\n  mend          cd " in out
    assert "FASTRES_BUILD=require" in out
    assert "setup.py build_ext --inplace" in out


def test_a_missing_compiler_is_the_reason(without_libraries):
    without_libraries.setenv("CXX", "/no/such/compiler")
    cpu = info.collect()["libraries"]["_C"]
    assert cpu["reason"] == "not built: no C++ compiler"
    assert cpu["fix"].startswith("install a C++ compiler")


@pytest.mark.parametrize(
    ("cuda", "nvcc", "reason", "fix"),
    [
        (None, None, f"not built: torch {torch.__version__} has no CUDA", "install a torch with"),
        ("13.0", None, "not built: no nvcc", "install the CUDA toolkit 13.0"),
        ("13.0", "/bin/nvcc", "not built", "cd "),
    ],
)
def test_the_cuda_library_is_missing_for_a_reason(without_libraries, cuda, nvcc, reason, fix):
    without_libraries.setattr(torch.version, "cuda", cuda)
    without_libraries.setattr(info, "_nvcc", lambda: nvcc)
    library = info.collect()["libraries"]["_C_cuda"]
    assert library["reason"] == reason
    assert library["fix"].startswith(fix)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_require_fails_with_the_reason(without_libraries, capsys, device):
    assert info.main(["--require", device]) == 1
    assert "fastres: _C is not loaded: not built" in capsys.readouterr().err


def test_json_holds_the_same_facts(capsys):
    assert info.main(["--json"]) == 0
    assert json.loads(capsys.readouterr().out) == info.collect()


def test_an_extra_names_the_packages_it_lacks(monkeypatch):
    monkeypatch.setattr(info, "_installed", lambda name: name != "tqdm")
    found = info.collect()
    assert found["extras"]["demo"] == ["tqdm"]
    assert found["extras"]["dev"] == []
    assert "pip install tqdm" in info.text(found)


def test_every_variable_that_is_read_is_listed():
    read = re.compile(r"(?:environ|getenv|setting|needs)\b[^\n]*?\"(FASTRES_\w+)\"")
    files = [*ROOT.glob("fastres/**/*.py"), *ROOT.glob("csrc/*/*.*"), ROOT / "setup.py"]
    found = {name for path in files for name in read.findall(path.read_text())}
    assert found == {name for name in info.VARIABLES if name.startswith("FASTRES_")}


@pytest.mark.usefixtures("cuda")
def test_the_kernels_of_a_stack_on_this_gpu_are_told():
    told = info.collect()["libraries"]["_C_cuda"]["facts"]["mlp_stack"]
    assert re.match(r"one launch up to D = H = \d+ float32, \d+ bfloat16, \d+ float16; ", told)
