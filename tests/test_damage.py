"""Damaged files are refused by name: 50 of each kind here, 500 with FASTRES_DAMAGES=500."""

from __future__ import annotations

import gzip
import json
import os
import pickle
import random
import resource
import struct
from importlib import import_module, resources
from pathlib import Path

import numpy as np
import pytest
import torch
from damaging import WAYS, damaged, outcomes
from test_training import blobs, net, weights

import fastres
from fastres import checkpoint, data, report
from fastres.formats import DataError, read_cifar_binary, read_cifar_pickle
from fastres.nn import ResidualMLP
from fastres.nn.weights import load_weights
from fastres.paths.result import PathGradients
from fastres.studies.cifar_training import Schedule, train_epochs
from fastres.training import Recipe, train

DAMAGES = int(os.environ.get("FASTRES_DAMAGES", "50"))
DOCS = Path(__file__).parent.parent / "docs"
STUDIES = sorted(path.parent.name for path in DOCS.glob("*/report.json"))
PICKLED = pickle.dumps({"data": [1, 2, 3]})


@pytest.fixture
def hold(record_property):
    """Damage a file, and hold every outcome to be a refusal or one of those that may be."""

    def hold(file, read, judge, harmless=("the same",), other=PICKLED, **options):
        found = outcomes(file, read, judge, other, **{"count": DAMAGES, **options})
        for what, count in found.items():
            record_property(f"damaged files {what}", count)
        assert set(found) <= {"refused", *harmless}, found
        assert found["refused"] > found.total() / 2

    return hold


def same(is_same):
    return lambda got: "the same" if is_same(got) else "other"


def all_equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_checkpoints(tmp_path, hold):
    file = tmp_path / "a.safetensors"
    tensors = {
        "a": torch.randn(3, 4),
        "half": torch.randn(5).bfloat16(),
        "none": torch.empty(0, 2),
        "one": torch.tensor(7),
    }
    checkpoint.save(file, tensors, {"losses": [0.5]})

    def is_same(got):
        return all_equal(got[0], tensors) and got[1] == {"losses": [0.5]}

    hold(file, lambda: checkpoint.load(file), same(is_same))


def test_trainings(tmp_path, hold):
    file, recipe = tmp_path / "a.safetensors", Recipe(epochs=2, batch_size=16)
    train(net(seed=3), blobs(), Recipe(epochs=1), checkpoint=file)
    other = file.read_bytes()
    file.unlink()
    whole = net()
    losses = train(whole, blobs(), recipe, checkpoint=file).losses

    def read():
        model = net(seed=5)
        return model, train(model, blobs(), recipe, checkpoint=file).losses

    def is_same(got):
        return torch.equal(weights(got[0]), weights(whole)) and got[1] == losses

    hold(file, read, same(is_same), other=other)


def test_trainings_of_studies(tmp_path, hold):
    file, schedule = tmp_path / "a.safetensors", Schedule(epochs=1, batch_size=16)
    x, y = torch.randn(16, 3, 8, 8), torch.arange(16) % 10

    def run(seed):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10))
        notes = []
        for epoch in train_epochs(model, x, y, schedule, file, notes):
            notes.append(epoch)
        return weights(model), notes

    before = run(0)
    # a file of another training: this one starts anew, from weights of its own
    hold(
        file, lambda: run(1), lambda got: "the same" if torch.equal(got[0], before[0]) else "anew",
    )  # fmt: skip


@pytest.mark.parametrize("name", STUDIES)
def test_reports(name, tmp_path, hold):
    content, file = json.loads((DOCS / name / "report.json").read_text()), tmp_path / "report.json"
    content["rows"] = content["rows"][:5]
    arguments = content["arguments"]
    content["sha256"] = report.digest([arguments, content["rows"]])
    report.write_json(file, content)
    parse = import_module(f"fastres.studies.{arguments['study'].replace('-', '_')}").FORM.parse
    rows = report.finished(file, arguments, parse)
    assert rows
    hold(file, lambda: report.finished(file, arguments, parse), same(lambda got: got == rows))


def test_path_gradients(tmp_path, hold):
    torch.manual_seed(0)
    model = ResidualMLP(4, 2, width=8, blocks=3)
    paths = fastres.path_gradients(model, torch.randn(5, 4), lambda out: out.sum())
    file = tmp_path / "paths.npz"
    paths.save(file)

    def read():
        try:
            return PathGradients.load(file)
        except ValueError as error:
            raise DataError(file, "must be whole", error) from error

    def is_same(got):
        facts = ("method", "where", "sites", "paths", "sum_error", "mixes_samples")
        facts += ("input_precision",)
        return all_equal(got.measured, paths.measured) and all(
            getattr(got, name) == getattr(paths, name) for name in facts
        )

    hold(file, read, same(is_same))


@pytest.fixture
def little_memory():
    """Let what a damaged file asks for be refused, up to the memory of the machine."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_AS, before)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.usefixtures("little_memory")
def test_weights(tmp_path, hold, zipped):
    file = tmp_path / "weights.pt"
    torch.save(net().state_dict(), file, _use_new_zipfile_serialization=zipped)

    def read():
        model = net(seed=5)
        load_weights(model, file)
        return weights(model)

    def judge(got):  # the format has a checksum for some of it, or none
        return "the same" if torch.equal(got, weights(net())) else "other numbers"

    hold(file, read, judge, ("the same", "other numbers"))


# Of sets of files: a file without a checksum can hold other pixels, but no other shape or label.


def pixels(count):
    return np.random.default_rng(0).integers(0, 256, count * 784, np.uint8).tobytes()


def idx(*shape, values):
    return struct.pack(f">I{len(shape)}I", 0x800 + len(shape), *shape) + values


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("damaged_one", ["images-idx3-ubyte", "labels-idx1-ubyte"])
def test_mnist(tmp_path, hold, damaged_one, packed):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for split in ("train", "t10k"):
        for name, content in {
            "images-idx3-ubyte": idx(20, 28, 28, values=pixels(20)),
            "labels-idx1-ubyte": idx(20, values=bytes(i % 10 for i in range(20))),
        }.items():
            path = raw / (f"{split}-{name}" + ".gz" * packed)
            path.write_bytes(gzip.compress(content) if packed else content)
    (whole_x, whole_y), test = data.read("mnist", tmp_path)
    file = raw / (f"train-{damaged_one}" + ".gz" * packed)
    other = raw / file.name.replace("images-idx3", "labels-idx1")
    other = other if other != file else raw / file.name.replace("labels-idx1", "images-idx3")

    def judge(got):
        (x, y), (test_x, test_y) = got
        assert x.shape == (20, 1, 28, 28)
        assert y.shape == (20,)
        assert y.max() < 10
        assert np.array_equal(test_x, test[0])
        assert np.array_equal(test_y, test[1])
        is_same = np.array_equal(x, whole_x) and np.array_equal(y, whole_y)
        return "the same" if is_same else "other numbers"

    harmless = ("the same",) if packed else ("the same", "other numbers")
    hold(file, lambda: data.read("mnist", tmp_path), judge, harmless, other.read_bytes(), ends=64)


@pytest.mark.parametrize("kind", ["bin", "python"])
def test_cifar(tmp_path, hold, kind):
    records = np.random.default_rng(0).integers(0, 256, (10_000, 3073), np.uint8)
    records[:, 0] = np.arange(10_000) % 10
    file, read = tmp_path / "data_batch_1.bin", read_cifar_binary
    other = pickle.dumps({"data": records[:, 1:], "labels": records[:, 0].tolist()}, protocol=2)
    whole = records.tobytes()
    if kind == "python":
        file, read, whole, other = tmp_path / "data_batch_1", read_cifar_pickle, other, whole
    file.write_bytes(whole)
    images, labels = read(file)

    def judge(got):
        assert got[0].shape == images.shape
        assert got[1].shape == labels.shape
        is_same = np.array_equal(got[0], images) and np.array_equal(got[1], labels)
        return "the same" if is_same else "other numbers"

    options = {"count": DAMAGES // 5, "ends": 300}  # 31 MB each
    hold(file, lambda: read(file), judge, ("the same", "other numbers"), other, **options)


def test_digits(tmp_path, hold, monkeypatch):
    pytest.importorskip("sklearn")
    files = resources.files
    file, whole = tmp_path / "digits.csv.gz", data.load("digits").checksum()
    file.write_bytes((files("sklearn.datasets.data") / file.name).read_bytes())

    def found(module):  # scikit-learn's own file stays as it is
        return tmp_path if str(module) == "sklearn.datasets.data" else files(module)

    monkeypatch.setattr(resources, "files", found)
    hold(file, lambda: data.load("digits").checksum(), same(lambda got: got == whole))


def test_every_way_of_damage_occurs():
    source, whole = random.Random(0), bytes(range(256))
    found = dict(damaged(whole, b"", source) for _ in range(99))
    assert set(found) == set(WAYS)
    assert all(content != whole for content in found.values())
