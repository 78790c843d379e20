"""README: its examples run as they stand there, and print what it shows."""

import re
from pathlib import Path

import pytest
import torch

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, re.DOTALL)


def test_the_first_example_prints_what_the_readme_shows(capsys):
    (language, code), (_, shown) = BLOCKS[:2]
    assert language == "python"
    names = {}
    exec(code, names)
    assert names["tape"].names == ["0", "1", "2", "3"]
    printed, expected = (
        re.findall(r"[\d.]+|[a-zA-Z]+", text) for text in (capsys.readouterr().out, shown)
    )
    assert len(printed) == len(expected)
    for got, want in zip(printed, expected, strict=True):  # digits differ with the CPU's linear
        assert got == want or float(got) == pytest.approx(float(want), rel=0.02)


def test_the_second_example_runs():
    names = {"x": torch.ones(2, 3), "f": torch.ones(2, 3)}
    exec("import fastres", names)
    exec(BLOCKS[2][1], names)
    assert names["y"].tolist() == [[1.5] * 3] * 2


def test_the_example_of_path_lengths_gives_what_it_says():
    (code,) = [code for _, code in BLOCKS if "path_gradients" in code]
    names = {}
    exec(BLOCKS[0][1], names)
    exec(code, names)
    assert names["paths"].shares.shape == (5,)
    assert names["paths"].shares.sum().item() == pytest.approx(1, abs=1e-5)


def test_the_example_of_gates_deletes_a_block():
    (code,) = [code for _, code in BLOCKS if "fastres.gate(" in code]
    names = {}
    exec(BLOCKS[0][1], names)
    names["x"] = torch.randn(16, 32)
    exec(code, names)
    model = names["model"]
    assert torch.equal(names["y"], torch.nn.Sequential(*model[:2], model[3])(names["x"]))
