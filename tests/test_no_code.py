"""No file, name or path that is data runs code or a shell; what it cannot do is tried here."""

from __future__ import annotations

import ast
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from test_formats import Hostile
from test_survival import go_on
from test_training import blobs, net

import fastres
from fastres import checkpoint, cli, data
from fastres.formats import DataError, read_cifar_pickle
from fastres.nn import ResidualMLP
from fastres.nn.weights import load_weights
from fastres.paths.result import PathGradients
from fastres.training import Recipe, train

ROOT = Path(__file__).parent.parent
# What runs or unpickles what it is given, and the files that may call it.
RUNS = r"(builtins\.)?(eval|exec|compile|__import__)|os\.(system|popen|exec\w+|(posix_)?spawn\w*)"
RUNS += r"|(subprocess|runpy|ctypes|marshal|shelve|pty)\..*|importlib\.(import_module|util\..*)"
RUNS += r"|import_module|(pickle\.)?Unpickler|(pickle|dill|joblib|torch|np|numpy)\.loads?"
RUNS += r"|torch\.ops\.load_library|torch\.(jit|hub)\.load"
KNOWN = {
    "fastres/cli.py": {"importlib.import_module"},  # MODULE:FACTORY, and fastres.info
    "fastres/cli_studies.py": {"importlib.import_module"},  # a study that the parser knows
    "fastres/fusing/following.py": {"exec"},  # a call of a forward, of the names of its arguments
    "fastres/fusing/fused.py": {"exec", "compile"},  # the code that fx writes from a model's graph
    "fastres/nn/weights.py": {"torch.load(weights_only=True)"},
    "fastres/ops/native.py": {"importlib.import_module", "torch.ops.load_library"},  # its own
    "fastres/paths/saving.py": {"np.load(allow_pickle=False)"},
    "fastres/unpickling.py": {"pickle.Unpickler"},  # restricted to four names
}


def what_runs_code(path):
    """Return what a file calls or inherits that runs code, with what keeps it from that."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        for part in (node.func,) if isinstance(node, ast.Call) else getattr(node, "bases", ()):
            name = ast.unparse(part)
            if re.fullmatch(RUNS, name):
                words = [ast.unparse(w) for w in getattr(node, "keywords", ())]
                safe = [w for w in words if w in ("weights_only=True", "allow_pickle=False")]
                found.add(name + "".join(f"({word})" for word in safe))
    return found


def test_what_runs_code_is_called_where_it_is_known_and_nowhere_else():
    found = {
        p.relative_to(ROOT).as_posix(): what_runs_code(p) for p in ROOT.glob("fastres/**/*.py")
    }
    assert {place: names for place, names in found.items() if names} == KNOWN


def ways(command):
    """Return pickles that run a command where globals are not refused."""
    name = f"V{command}\n"
    return {
        "posix.system": f"cposix\nsystem\n({name}tR.",
        "builtins.eval": f"cbuiltins\neval\n(V__import__('os').system({command!r})\ntR.",
        "__builtin__.exec": f"c__builtin__\nexec\n(Vimport os; os.system({command!r})\ntR.",
        "a name of a name": f"\x80\x04\x8c\x02os\x8c\x06system\x93({name}tR.",
        "a chain of getattr": f"cbuiltins\ngetattr\n(cos\nsystem\nV__call__\ntR({name}tR.",
        "numpy's own os": f"cnumpy\nos.system\n({name}tR.",
        "a name below one that is allowed": f"cnumpy\ndtype.__init__\n({name}tR.",
        "an instance": f"(V{command}\nios\nsystem\n.",
        "an object": f"(cos\nsystem\n{name}o.",
        "a registered extension": "\x80\x02\x82\x01.",
        "a persistent name": "Pos.system\n.",
    }


@pytest.mark.parametrize("way", ways(""))
def test_no_way_to_a_function_is_open_in_a_pickle(tmp_path, way):
    witness, file = tmp_path / "ran", tmp_path / "data_batch_1"
    file.write_bytes(ways(f"touch {witness}")[way].encode("latin1"))
    with pytest.raises(DataError, match="data_batch_1: must be a pickle of plain arrays, got "):
        read_cifar_pickle(file)
    assert not witness.exists()


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("function", [os.system, eval, exec])
def test_a_hostile_checkpoint_runs_nothing(tmp_path, function, zipped):
    witness, file = tmp_path / "ran", tmp_path / "weights.pt"
    code = f"__import__('os').system('touch {witness}')"
    bomb = Hostile(function, f"touch {witness}" if function is os.system else code)
    content = {**net().state_dict(), "0.weight": bomb}
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    with pytest.raises(DataError, match=f"{file}: must hold the weights"):
        load_weights(net(), file)
    with pytest.raises(DataError, match="must be a whole checkpoint of fastres"):
        train(net(), blobs(), Recipe(epochs=1), checkpoint=file)
    with pytest.raises(ValueError, match="must be a file that save wrote"):
        PathGradients.load(file)
    assert not witness.exists()


def test_the_same_checkpoint_does_run_a_command_where_it_is_believed(tmp_path):
    witness, file = tmp_path / "ran", tmp_path / "weights.pt"
    torch.save({"a": Hostile(os.system, f"touch {witness}")}, file)
    torch.load(file, weights_only=False)
    assert witness.exists()  # else the test above would prove nothing


def test_a_hostile_array_in_a_file_of_path_gradients_runs_nothing(tmp_path):
    witness, file = tmp_path / "ran", tmp_path / "paths.npz"
    bomb = np.array([Hostile(os.system, f"touch {witness}")], dtype=object)
    head = json.dumps({"facts": {}, "types": {"gradient": "float32"}}).encode()
    np.savez(file, gradient=bomb, **{"facts.json": np.frombuffer(head, np.uint8)})
    witness.unlink(missing_ok=True)  # NumPy pickled it
    with pytest.raises(ValueError, match="must be a file that save wrote"):
        PathGradients.load(file)
    assert not witness.exists()


NAMES = [
    "a; touch ran",
    "$(touch ran)",
    "`touch ran`",
    "a | touch ran",
    "a && touch ran #",
    "-rf *",
]


@pytest.mark.parametrize("name", NAMES)
def test_characters_of_a_shell_in_a_name_are_part_of_a_file_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train(net(), blobs(), Recipe(epochs=1), checkpoint=Path(f"{name}.safetensors"))
    checkpoint.load(Path(f"{name}.safetensors"))
    go_on(Path(name), plan=[1])
    torch.manual_seed(0)
    model = ResidualMLP(4, 2, width=8, blocks=3)
    paths = fastres.path_gradients(model, torch.randn(5, 4), lambda out: out.sum())
    paths.save(f"{name}.npz")
    assert PathGradients.load(f"{name}.npz").paths == paths.paths
    assert {p.name for p in tmp_path.iterdir()} == {f"{name}.safetensors", f"{name}.npz", name}
    with pytest.raises(FileNotFoundError, match="must be a folder"):
        data.load("mnist", f"{name}.none")
    with pytest.raises(ValueError, match="name must be one of"):
        data.load(name)


@pytest.mark.parametrize("name", NAMES)
def test_characters_of_a_shell_in_a_command_are_refused(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["inspect", "--", f"{name}:made"]) == 2
    assert "must make a model, got" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["study", "--", name])
    assert "invalid choice" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_module_is_loaded_by_name_on_the_command_line_alone_and_that_is_said(capsys):
    with pytest.raises(SystemExit):
        cli.main(["inspect", "--help"])
    help = " ".join(capsys.readouterr().out.split())
    assert "is code that runs, so name only what you trust" in help
