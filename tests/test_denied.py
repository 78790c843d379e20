"""Where nothing can be written, or another run is at work, a run ends in an error that says so."""

from __future__ import annotations

import errno
import os
import resource
import signal
import tempfile
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from test_checkpoint import RECIPE, stopped_after
from test_cifar_training import data as images
from test_cifar_training import made
from test_survival import PLAN, fork, go_on
from test_training import blobs, net

import fastres
from fastres.files import alone_in, alone_with
from fastres.nn import ResidualMLP
from fastres.studies.cifar_training import Schedule, train_epochs
from fastres.training import train


def study(folder, stop=False):
    go_on(folder, plan=PLAN[:3] if stop else PLAN)


def training(folder, stop=False):
    file = folder / "a.safetensors"
    if stop:
        with stopped_after(2):
            train(net(), blobs(), RECIPE, checkpoint=file)
    else:
        train(net(), blobs(), RECIPE, checkpoint=file)


def training_of_a_study(folder, stop=False):
    file = folder / "a.safetensors"
    for epoch in train_epochs(made(), *images(), Schedule(epochs=3, batch_size=20), file, []):
        if stop and epoch == 2:
            break


def path_gradients(folder, stop=False):
    torch.manual_seed(stop)
    model = ResidualMLP(4, 2, width=8, blocks=3)
    paths = fastres.path_gradients(model, torch.randn(5, 4), lambda out: out.sum())
    paths.save(folder / "a.npz")


RUNS = pytest.mark.parametrize("run", [study, training, training_of_a_study, path_gradients])


def contents(folder):
    """Return what a run can go on from, or gave: a table may be one part ahead of its report."""
    return {p.name: p.read_bytes() for p in folder.iterdir() if p.name != "table.csv"}


@contextmanager
def full(size):
    """Let no file of this process grow beyond a size."""
    kept, limits = signal.signal(signal.SIGXFSZ, signal.SIG_IGN), resource.RLIMIT_FSIZE
    before = resource.getrlimit(limits)
    resource.setrlimit(limits, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(limits, before)
        signal.signal(signal.SIGXFSZ, kept)


@RUNS
def test_a_full_disk_leaves_what_was_there_and_an_error_that_names_the_file(tmp_path, run):
    run(tmp_path, stop=True)
    before = contents(tmp_path)
    with full(1000), pytest.raises(OSError, match=f"File too large: '{tmp_path}/") as caught:
        run(tmp_path)
    assert Path(caught.value.filename).name in before
    assert contents(tmp_path) == before
    run(tmp_path)
    assert contents(tmp_path) != before


@RUNS
@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_disk_that_fails_late_leaves_what_was_there(tmp_path, monkeypatch, run, step):
    run(tmp_path, stop=True)
    before = contents(tmp_path)

    def fails(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, step, fails)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path}/"):
        run(tmp_path)
    assert contents(tmp_path) == before


@contextmanager
def read_only():
    """Give a folder that is as it was left, and of which nobody may change anything."""
    with tempfile.TemporaryDirectory() as name:  # whoever may read it: not in pytest's
        folder, am_root = Path(name), os.geteuid() == 0
        folder.chmod(0o755)

        @contextmanager
        def closed():
            folder.chmod(0o555)
            if am_root:
                os.seteuid(65534)  # root may write anywhere
            try:
                yield
            finally:
                if am_root:
                    os.seteuid(0)
                folder.chmod(0o755)

        yield folder, closed


@RUNS
def test_a_read_only_folder_is_named_and_stays_as_it_is(run):
    with read_only() as (folder, closed):
        run(folder, stop=True)
        before = contents(folder)
        with closed(), pytest.raises(OSError, match=f"{folder}.*[Pp]ermission|{folder}") as caught:
            run(folder)
        assert isinstance(caught.value, PermissionError) or "ermission" in str(caught.value)
        assert contents(folder) == before


def test_a_folder_that_is_none_is_named():
    with pytest.raises(OSError, match="report: out must be a writable folder, got /proc/none"):
        go_on(Path("/proc/none"))
    for missing in (Path("/proc/none/a"), Path("/nowhere/a")):
        with pytest.raises(FileNotFoundError, match=f"No such file or directory: '{missing}'"):
            train(net(), blobs(), RECIPE, checkpoint=missing)


def hold(file, pipe):
    with alone_with(file):
        pipe.send("there")
        signal.pause()


@pytest.mark.parametrize("run", [training, training_of_a_study])
def test_a_second_run_of_a_training_is_refused_and_the_first_goes_on(tmp_path, run):
    file, (ours, theirs) = tmp_path / "a.safetensors", fork.Pipe()
    run(tmp_path, stop=True)
    before = contents(tmp_path)
    other = fork.Process(target=hold, args=(file, theirs))
    other.start()
    assert ours.poll(60)
    with pytest.raises(ValueError, match=f"must be used by one run at a time, got {file}"):
        run(tmp_path)
    assert file.read_bytes() == before[file.name]
    other.kill()  # leaves its file behind, and the lock is free
    other.join()
    assert (tmp_path / f".{file.name}.lock").exists()
    run(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_trainings_beside_each_other_do_not_disturb_each_other(tmp_path):
    with alone_with(tmp_path / "other.safetensors"), alone_in(tmp_path):
        training(tmp_path)


def test_a_run_that_takes_a_lock_which_is_just_removed_makes_its_own(tmp_path, monkeypatch):
    file, whole, removed = tmp_path / "a", fastres.files._lock, []

    def lock(handle, refusal):
        if not removed:
            removed.append((tmp_path / ".a.lock").unlink())
        whole(handle, refusal)

    monkeypatch.setattr("fastres.files._lock", lock)
    with alone_with(file):
        monkeypatch.undo()
        with pytest.raises(ValueError, match="one run at a time"), alone_with(file):
            pass
    assert not list(tmp_path.iterdir())
