"""Claims about the plots of the demo: they are there for any depth, and matplotlib is an extra."""

import sys

import numpy as np
import pytest

from fastres.analysis import power_law
from fastres.studies import demo_plots

PNG = b"\x89PNG\r\n\x1a\n"


def test_plots_are_drawn_for_one_block_and_for_many(tmp_path):
    profiles = {n: (np.full(n, 1 / n), np.full(n, 2 / n)) for n in (1, 6, 300)}
    demo_plots.plot_profiles(tmp_path / "a.png", profiles)
    depths = sorted(profiles)
    values = [1 / n for n in depths]
    demo_plots.plot_power_law(tmp_path / "b.png", depths, values, values, power_law(depths, values))
    for file in tmp_path.iterdir():
        assert file.read_bytes().startswith(PNG)
        assert file.stat().st_size > 10_000


def test_without_matplotlib_the_message_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'fastres\[demo\]'"):
        demo_plots.plot_profiles(tmp_path / "a.png", {1: ([0.1], [0.2])})
