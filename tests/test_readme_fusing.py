"""docs/fusing.md: its example runs as it stands there, and prints what the page shows."""

import re
from pathlib import Path

import torch
from models import torchvision

PAGE = (Path(__file__).parent.parent / "docs/fusing.md").read_text()


def test_the_example_trains_saves_restores_and_loads_a_resnet50(capsys, tmp_path, monkeypatch):
    (_, code), (_, shown) = re.findall(r"```(\w*)\n(.*?)```", PAGE, re.DOTALL)
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
