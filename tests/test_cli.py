"""Claims about the command: it does what it is told; what is wrong is one line and exit code 2."""

import subprocess
import sys

import pytest

from fastres.cli import main
from fastres.studies import demo

MODEL = """
import torch

class Block(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(8, 8)

    def forward(self, x):
        return x + self.inner(x).relu()

class Tokens(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Embedding(5, 8)
        self.block = Block()

    def forward(self, ids):
        return self.block(self.embed(ids))

def two():
    return torch.nn.Sequential(Block(), Block())

def none():
    return torch.nn.Linear(8, 8)

number = int
"""


@pytest.fixture
def model(tmp_path, monkeypatch) -> None:
    """A module some_nets in the current folder."""
    (tmp_path / "some_nets.py").write_text(MODEL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    yield
    sys.modules.pop("some_nets", None)


def test_demo_runs_what_it_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "recording_cost", lambda *_: 1.0)
    arguments = ["--blocks", "2", "1", "--width", "4", "--epochs", "1", "--seed", "3"]
    assert main(["demo", *arguments, "--out", str(tmp_path / "new" / "folder")]) == 0
    printed = capsys.readouterr()
    assert "test error" in printed.out
    assert "2 blocks: 100%" in printed.err
    assert (tmp_path / "new" / "folder" / "table.csv").is_file()


def test_ctrl_c_is_exit_code_130_and_says_how_to_go_on(tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "measure", interrupted)
    assert main(["demo", "--out", str(tmp_path)]) == 130
    assert "the same command goes on from here" in capsys.readouterr().err


WRONG = {
    "demo --data svhn": "data: name must be one of digits, mnist, cifar10, got 'svhn'",
    "demo --blocks 6 0": "demo: blocks must be >= 1, got 0",
    "demo --blocks -5": "demo: blocks must be >= 1, got -5",
    "demo --data mnist": "data: mnist needs its folder",
    "demo --data mnist --data-root /nowhere": "data: --data-root must be a folder, got /nowhere",
    "demo --device nonsense": "demo: device must be usable, got 'nonsense'",
    "demo --device meta": "demo: device must hold values, got 'meta'",
    "demo --width 100000000": "demo: width must be <= 65536, got 100000000",
    "demo --seed 99999999999999999999": "demo: seed must be <= 18446744073709551615, got 999",
    "demo --threads 99999999999": "demo: threads must be <= 1024, got 99999999999",
    "demo --out /dev/null/x": "report: out must be a writable folder, got /dev/null/x",
    "inspect resnet18": "inspect: model must be MODULE:FACTORY, got 'resnet18'",
    "inspect no_such:net": "inspect: no_such:net must make a model, got ModuleNotFoundError",
    "inspect sys:exit": "inspect: sys:exit must make a model, got SystemExit\n",
    "inspect some_nets:three": "inspect: some_nets:three must make a model, got AttributeError",
    "inspect some_nets:number": "inspect: some_nets:number must make a torch.nn.Module, got int",
    "inspect some_nets:two --input 3,x": "inspect: input must be sizes such as 1,3,224,224",
    "inspect some_nets:two --input 2,0": "inspect: input must be sizes such as 1,3,224,224",
    "inspect some_nets:two --input 2,7": "inspect: some_nets:two must take an input [2, 7], got",
}


@pytest.mark.parametrize("command", WRONG)
def test_what_is_wrong_is_one_line_on_stderr_and_exit_code_2(command, model, capsys, monkeypatch):
    monkeypatch.delenv("FASTRES_DATA", raising=False)
    assert main(command.split()) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith(f"fastres: {WRONG[command]}")
    assert printed.err.count("\n") == 1


def test_a_traceback_is_there_for_those_who_ask(monkeypatch):
    monkeypatch.setenv("FASTRES_TRACEBACK", "1")
    with pytest.raises(ValueError, match="MODULE:FACTORY"):
        main(["inspect", "resnet18"])


def test_inspect_lists_the_sites_of_a_model(model, capsys):
    assert main(["inspect", "some_nets:two", "--input", "2,8"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "site      kind  shape  level",
        "----  --------  -----  -----",
        "   0  identity    2x8      0",
        "   1  identity    2x8      0",
        "2 sites: 2 identity, 0 projection",
    ]


def test_inspect_says_so_where_there_are_no_sites(model, capsys):
    assert main(["inspect", "some_nets:none", "--input", "2,8"]) == 0
    assert capsys.readouterr().out == "0 sites: 0 identity, 0 projection\n"


def test_inspect_feeds_tokens_to_a_model_of_tokens(model, capsys):
    assert main(["inspect", "some_nets:Tokens", "--input", "2,6", "--tokens"]) == 0
    assert "1 sites: 1 identity" in capsys.readouterr().out


def test_the_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "fastres", "demo", "--blocks", "0"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert "fastres: demo: blocks must be >= 1, got 0\n" in done.stderr
