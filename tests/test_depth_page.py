"""docs/depth.md: its examples run as they stand there."""

import re
from pathlib import Path

import torch

PAGE = (Path(__file__).parent.parent / "docs/depth.md").read_text()


def test_the_examples_run_one_after_the_other(capsys):
    blocks = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 4
    torch.manual_seed(0)
    names = {}
    for code in blocks:
        exec(code, names)
    assert names["stage"].length.shape == (100,)
    assert names["y"].shape == (15, 50, 3)
    assert "none of 6, 12, 24 blocks is below 0.01; by their law" in capsys.readouterr().out
    interval = str(names["reaching_depth"](names["depths"], names["scaled"], 0.01))
    assert interval in PAGE
