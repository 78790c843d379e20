"""docs/fusing.md: its examples run as they stand there, and print what the page shows."""

import re
from pathlib import Path

import pytest
import torch
from models import torchvision

import fastres
from fastres.ops import native

PAGE = (Path(__file__).parent.parent / "docs/fusing.md").read_text()
BLOCKS = [text for _, text in re.findall(r"```(\w*)\n(.*?)```", PAGE, re.DOTALL)]


def test_the_example_trains_saves_restores_and_loads_a_resnet50(capsys, tmp_path, monkeypatch):
    code, shown = BLOCKS[:2]
    library = torchvision()
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    names = {}
    exec(code, names)
    assert capsys.readouterr().out == shown
    assert names["tape"].scaled.shape == (16,)
    assert type(names["model"].layer1[0]) is library.models.resnet.Bottleneck
    x = names["images"]
    assert torch.equal(names["plain"].eval()(x), names["model"].eval()(x))


@pytest.mark.skipif(native.raw("_conv_stack") is None, reason="the compiled library is not built")
def test_blocks_in_a_row_become_stacks(capsys):
    code, shown = BLOCKS[2:]
    exec(code, {"torch": torch, "fastres": fastres})
    assert capsys.readouterr().out == shown
