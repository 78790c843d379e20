"""Operators in threads and in worker processes: each thread its own tape, each worker its own."""

from __future__ import annotations

import re
import threading
from pathlib import Path

import pytest
import torch
from every_call import EVERY, OPERATORS, network, normal
from torch.utils.data import DataLoader, Dataset

import fastres

SIZE = 3, 17, 3, torch.float32


def values(name):
    result = EVERY[name](*SIZE)
    return [torch.as_tensor(v) for v in (result if isinstance(result, list | tuple) else [result])]


class Called(Dataset):
    """Items are what the operators return, summed up."""

    def __len__(self):
        return len(OPERATORS)

    def __getitem__(self, i):
        return torch.stack([v.detach().double().sum() for v in values([*OPERATORS][i])])


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_a_dataset_may_call_operators_in_its_workers(start):
    here = Called()
    expected = [here[i] for i in range(len(here))]  # so that the parent has threads when it forks
    loader = DataLoader(
        here, batch_size=None, num_workers=2, multiprocessing_context=start, timeout=120
    )
    assert all(torch.equal(a, b) for a, b in zip(loader, expected, strict=True))


def in_threads(count, work):
    """Run work(i) in so many threads at once; an error of one is an error here."""
    ready, results = threading.Barrier(count), {}

    def run(i):
        ready.wait()
        results[i] = work(i)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [results[i] for i in range(count)]


@pytest.mark.parametrize("name", OPERATORS)
def test_threads_that_call_an_operator_at_once_get_the_same_bits(name):
    expected = values(name)
    found = in_threads(4, lambda _: [values(name) for _ in range(20)])
    for result in [result for each in found for result in each]:
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


def test_threads_that_record_one_model_each_have_their_own_tape():
    model = network(17, 5)
    batches = [normal(n + 1, 17, dtype=torch.float32, seed=n) for n in range(4)]

    def tape_of(i):
        with fastres.record(model) as tape:
            for _ in range(10):
                model(batches[i]).sum().backward()
        return tape

    alone = [tape_of(i) for i in range(4)]
    for mine, expected in zip(in_threads(4, tape_of), alone, strict=True):
        assert mine.samples == expected.samples
        assert torch.equal(mine.absolute, expected.absolute)
        assert torch.equal(mine.scaled, expected.scaled)


def test_the_library_needs_no_lock_of_the_interpreter():
    # What it holds: the entries of the module, filled while it is loaded, and the instruction set,
    # chosen once under the lock of a local static. Any other static that may change is a fault.
    sources = [*Path(__file__).parent.parent.glob("csrc/**/*")]
    held = re.compile(r"^\s*(?:inline |thread_local )?static (?!const|inline|_assert)(?!.*\()(.*)")
    found = {
        match.group(1).strip()
        for path in sources
        if path.is_file()
        and path.suffix in (".cpp", ".h")
        and not path.name.startswith(("cuda", "gpu"))
        for line in path.read_text().splitlines()
        if (match := held.match(line))
    }
    assert found == {"std::vector<Define> entries;"}
    module = next(path for path in sources if path.name == "module.cpp").read_text()
    assert "pybind11::mod_gil_not_used()" in module
