"""benchmarks: interleaving and statistics by a fake clock, result files, tables, a smoke run."""

import json
import re
import subprocess
import sys
from argparse import Namespace
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import fastres
from benchmarks import limits, machine, mlp_stack, path_accumulate, residual_add, results, tables
from benchmarks import stack_baselines as others
from benchmarks.case import OURS, Case, Protocol, Variant
from benchmarks.clocks import UnavailableError, WallClock
from benchmarks.command import measure, one, run
from benchmarks.harness import rotation, run_case, summarise


class FakeClock:
    """A clock that stands still except where a variant is called; it keeps the order of calls."""

    def __init__(self):
        self.now = 0.0
        self.calls = []

    def variant(self, name, *seconds):
        left = list(seconds)

        def build(*_):
            def call():
                self.calls.append(name)
                self.now += left.pop(0) if len(left) > 1 else left[0]

            return call

        return Variant(build, bytes=6000.0)


def case(variants, **given):
    fields = {"bytes": 2000.0, "flops": 0.0, "cached": False, **given}
    return Case("fake", (1,), torch.float32, lambda: (), variants, **fields)


ONCE = Protocol(rounds=(3, 3), budget=0.0, sample=0.0, warm_up=0.0)


def run_fake(variants, fake, protocol=ONCE, **given):
    work = case(variants, **given)
    rows, missing = run_case(work, variants, 1, WallClock(lambda: fake.now), protocol, 0.0)
    return {row["variant"]: row for row in rows}, missing


def test_every_round_times_every_variant_once():
    fake = FakeClock()
    run_fake({OURS: fake.variant("a", 1.0), "b": fake.variant("b", 2.0)}, fake)
    timed_after_one_untimed_call = ["a", "a", "b", "b"]
    assert fake.calls[-12:] == timed_after_one_untimed_call * 3


def test_figures_follow_from_the_times():
    fake = FakeClock()
    variants = {
        OURS: fake.variant("a", 2.0),
        "b": fake.variant("b", 5.0),
        "limit: copy": Variant(fake.variant("c", 1.0).build, limit=True),
    }
    rows, _ = run_fake(variants, fake)
    assert rows["b"]["median_s"] == pytest.approx(5.0)
    assert rows["b"]["ratio"] == pytest.approx(2.5)
    assert rows["b"]["fraction"] == pytest.approx(0.2)
    assert rows[OURS]["gb_per_s"] == pytest.approx(2000 / 2.0 / 1e9)
    assert rows["b"]["predicted"] == pytest.approx(3.0)


def test_fast_calls_are_repeated_until_a_sample_is_long_enough():
    fake = FakeClock()
    protocol = Protocol(rounds=(2, 2), budget=0.0, sample=1.0, warm_up=0.0)
    rows, _ = run_fake({OURS: fake.variant("a", 0.3)}, fake, protocol)
    assert rows[OURS]["inner"] == 4
    assert rows[OURS]["median_s"] == pytest.approx(0.3)


def test_the_ratio_is_taken_within_rounds():
    # The machine slows down tenfold in the last two rounds: the ratio stays 2.
    figures = summarise([2.0, 20.0, 20.0], [1.0, 10.0, 10.0])
    assert figures["ratio"] == 2.0
    assert (figures["q1"], figures["median_s"], figures["q3"]) == (11.0, 20.0, 20.0)


def test_a_variant_that_cannot_be_measured_is_listed_with_its_reason():
    def absent(*_):
        raise UnavailableError("liger_kernel is not installed")

    def broken(*_):
        raise RuntimeError("no such kernel\nlong trace")

    fake = FakeClock()
    variants = {OURS: fake.variant("a", 1.0), "p": Variant(absent), "q": Variant(broken)}
    rows, missing = run_fake(variants, fake)
    assert set(rows) == {OURS}
    assert missing["p"] == "liger_kernel is not installed"
    assert missing["q"] == "RuntimeError: no such kernel"


def test_buffers_rotate_in_order():
    seen = []
    call = rotation([lambda i=i: seen.append(i) for i in range(3)])
    for _ in range(5):
        call()
    assert seen == [0, 1, 2, 0, 1]


@pytest.mark.parametrize(
    ("model", "cores", "name"),
    [
        ("Intel(R) Xeon(R) Processor @ 2.50GHz", 2, "intel-xeon-2.5ghz-2-cores"),
        ("Intel(R) Xeon(R) Platinum 8488C", 8, "intel-xeon-platinum-8488c-8-cores"),
        ("AMD EPYC 9R14 96-Core Processor", 4, "amd-epyc-9r14-4-cores"),
        ("NVIDIA H100 80GB HBM3", None, "nvidia-h100-80gb-hbm3"),
        ("Intel(R) Xeon(R) CPU @ 3.00GHz", 1, "intel-xeon-3ghz-1-cores"),
    ],
)
def test_a_device_gets_a_folder_name(model, cores, name):
    assert machine.slug(model, cores) == name


def smoke_of(module):
    before = torch.get_num_threads()
    asked = {"device": "cpu", "threads": [1], "filter": "", "variants": "", "commit": "0123456789"}
    asked |= {"cpu_time": False, "no_compile": False}
    report = measure(module, Namespace(**asked, smoke=True), float("inf"), "")
    torch.set_num_threads(before)
    return report


@pytest.fixture(scope="module")
def smoke():
    """The report of a smoke run of residual_add."""
    return smoke_of(residual_add)


@pytest.fixture(scope="module")
def smoke_of_stack():
    """The report of a smoke run of mlp_stack."""
    return smoke_of(mlp_stack)


def test_a_smoke_run_measures_every_case_and_writes_nothing(tmp_path, capsys):
    before = torch.get_num_threads()
    assert run([residual_add], ["--smoke", "--out", str(tmp_path)]) == 0
    torch.set_num_threads(before)
    assert list(tmp_path.iterdir()) == []
    assert "call [1, 8] float32" in capsys.readouterr().out


def test_a_report_has_what_is_documented_and_comes_back_whole(smoke, tmp_path):
    path = results.save(smoke, tmp_path)
    assert [p.name for p in path.parent.iterdir()] == ["residual_add.json"]
    [loaded] = results.load(tmp_path)
    check_keys(loaded)
    assert loaded == json.loads(json.dumps(smoke))


def check_keys(report):
    assert set(report) == results.FILE
    assert {"fastres", "torch", "python", "build"} <= set(report["versions"])
    assert report["rows"]
    assert all(set(row) - {"saved_bytes"} == results.ROW for row in report["rows"])
    assert report["commit"]


@pytest.mark.parametrize("path", sorted(results.FOLDER.glob("*/*.json")), ids=lambda p: p.stem)
def test_committed_results_are_complete(path):
    report = json.loads(path.read_text())
    check_keys(report)
    assert path.parent.name == report["device"]["slug"]
    assert path.stem == report["name"]
    measured = {(row["case"], row["threads"], row["clock"]) for row in report["rows"]}
    ours = {(r["case"], r["threads"], r["clock"]) for r in report["rows"] if r["variant"] == OURS}
    assert ours == measured


def test_tables_are_up_to_date():
    assert tables.main(["--check"]) == 0


def test_tables_are_written_between_their_markers(smoke):
    text = "before\n<!-- table: residual_add -->\nold\n<!-- end -->\nafter\n"
    fresh = tables.render(text, [smoke])
    assert fresh.startswith(
        "before\n<!-- table: residual_add -->\n| case | shape | dtype | threads"
    )
    assert "old" not in fresh
    assert fresh.endswith("Not yet measured on a GPU.\n<!-- end -->\nafter\n")
    assert tables.render(fresh, [smoke]) == fresh


def test_a_stack_is_measured_beside_every_baseline_that_needs_no_compiler(smoke_of_stack):
    narrow = {} if torch.ops.mkldnn._is_mkldnn_bf16_supported() else {"oneDNN": "bfloat16"}
    missing = {entry["variant"]: entry["cases"] for entry in smoke_of_stack["not_measured"]}
    assert missing.keys() == narrow.keys()
    assert all(narrow[name] in case for name, cases in missing.items() for case in cases)
    measured = {(row["case"], row["variant"]) for row in smoke_of_stack["rows"]}
    assert {("forward", name) for name in (OURS, "eager", "measured eager", "oneDNN")} <= measured
    assert {(name, OURS) for name in ("training step", "checkpointed step")} <= measured
    limit = {row["variant"] for row in smoke_of_stack["rows"] if row["limit"]}
    assert limit == {"limit: read, sum", "limit: read, dot"}


def test_the_table_of_a_stack_has_its_rate_its_limit_and_what_it_saves(smoke_of_stack):
    head, _, *lines = tables.table(smoke_of_stack, everything=True).splitlines()
    cells = [dict(zip(head.split(" | "), line.split(" | "), strict=True)) for line in lines]
    assert "GB/s" not in head
    assert list(cells[0])[4:8] == ["fastres", "GFLOP/s", "of limit", "eager, ratio"]
    saved = {c["| case"].strip("| "): c["saved, of eager |"].strip("| ") for c in cells}
    assert saved["forward"] == ""
    rows = [row for row in smoke_of_stack["rows"] if row["case"] == "training step"]
    kept = {row["variant"]: row["saved_bytes"] for row in rows if not row["limit"]}
    assert saved["training step"] == f"{kept[OURS] / kept['eager']:.1%}"


def test_saved_bytes_are_a_goal_that_is_met_from_below():
    work = case({}, goals={"saved": 0.5})
    rows = [{"variant": OURS, "saved_bytes": 40}, {"variant": "eager", "saved_bytes": 100}]
    report = {"goals": []}
    results.judge(report, work, "wall", 1, rows)
    results.judge(report, work, "wall", 1, [{**rows[0], "saved_bytes": 60}, rows[1]])
    assert [(goal["measured"], goal["met"]) for goal in report["goals"]] == [
        (0.4, True),
        (0.6, False),
    ]


def test_an_overhead_is_told_in_percent(capsys):
    report = {"goals": []}
    rows = [{"variant": "norms off", "ratio": 1 / 1.04}]
    results.judge(report, case({}, goals={"norms off": 1 / 1.05}), "wall", 1, rows)
    results.verdict(report)
    assert "goal met    norms off  at least 0.952" in (said := capsys.readouterr().out)
    assert "(+4.0% of at most 5%)" in said


def test_a_storage_that_is_saved_counts_once_and_parameters_do_not():
    x, w = torch.randn(8, 4, requires_grad=True), torch.randn(4, 4, requires_grad=True)
    # linear keeps x and w, relu its result, which the second linear keeps again.
    kept = others.saved_bytes(lambda: torch.nn.functional.linear((x @ w).relu(), w), [w])
    assert kept == 2 * 8 * 4 * 4


STACK = (5, 3, 16)  # blocks, batch, width


@pytest.mark.parametrize(
    "build",
    [
        others.forward(others.eager).build,
        others.forward(others.measured).build,
        others.forward(others.segmented).build,
        others.onednn,
    ],
    ids=["eager", "measured", "segmented", "oneDNN"],
)
def test_other_ways_to_run_a_stack_compute_the_same(build):
    torch.manual_seed(0)
    given = mlp_stack.tensors(STACK, torch.float32, torch.device("cpu"))
    try:
        found = build(*given)()
    except UnavailableError as reason:
        pytest.skip(str(reason))
    y = found[0] if isinstance(found, tuple) else found
    torch.testing.assert_close(y, fastres.mlp_stack(*given)[0])
    assert not torch.allclose(y, given[0], atol=0.1)


@pytest.mark.parametrize("train", [False, True])
def test_bytes_and_operations_of_a_stack_are_those_of_eager(train):
    given = mlp_stack.tensors(STACK, torch.float32, torch.device("cpu"), grad=train)
    call = (others.training if train else others.forward)(others.eager).build(*given)
    with FlopCounterMode(display=False) as counter:
        call()
    moved, operations = mlp_stack.work(STACK, torch.float32, train)
    assert counter.get_total_flops() == operations
    stream, weights = given[0].nbytes, sum(t.nbytes for t in given[1:5])
    assert moved == (3 * weights + 4 * stream if train else weights + 2 * stream)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_ways_to_step_along_a_path_compute_the_same(dtype):
    skip, branch, g = path_accumulate.tensors((4, 3, 24), dtype, torch.device("cpu"))
    rows, squares, dots = fastres.path_accumulate(skip, branch, g)
    tolerance = (
        {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.3}
    )
    norms = path_accumulate.by_norms(skip.clone(), branch, g)()
    einsum = path_accumulate.by_einsum(skip.clone(), branch, g)()
    for found in (
        (norms[0], norms[1].square(), norms[2]),
        einsum,
        path_accumulate.whole(skip, branch, g),
    ):
        assert torch.equal(found[0], rows)
        torch.testing.assert_close(found[1].float(), squares, **tolerance)
        torch.testing.assert_close(found[2].float(), dots, **tolerance)


def test_a_step_along_a_path_is_measured_beside_every_baseline_that_needs_no_compiler():
    report = smoke_of(path_accumulate)
    assert report["not_measured"] == []
    measured = {(row["case"], row["variant"]) for row in report["rows"] if not row["limit"]}
    beside = {
        "step": ("bare step", "eager norms", "eager einsum"),
        "shift": ("eager largest", "eager norm"),
    }
    assert measured == {(name, way) for name, ways in beside.items() for way in (OURS, *ways)}


def test_the_limit_of_reading_reads_the_bytes_of_the_case():
    found = limits.memory(case({}, reads=True, bytes=4096.0), torch.device("cpu"), 1)
    for variant in found.values():
        held = [cell.cell_contents for cell in variant.build().__closure__]
        assert sum(t.nbytes for t in held) == 4096


def test_a_table_has_the_device_measured_last_and_one_of_all_every_device(smoke):
    def of(name, date):
        return {**smoke, "date": date, "device": {**smoke["device"], "name": name}}

    reports = [of("one", "2026-11-22"), of("two", "2026-11-23"), of("three", "2026-11-21")]
    for what, devices in (("residual_add", ["two"]), ("residual_add all", ["one", "two", "three"])):
        text = tables.render(f"<!-- table: {what} -->\n<!-- end -->", reports)
        assert re.findall(r"^(\w+), \d+ cores", text, re.MULTILINE) == devices


def test_a_benchmark_without_results_says_so():
    text = "<!-- table: unheard_of all -->\n<!-- end -->"
    assert "Not yet measured on a CPU.\n\nNot yet measured on a GPU.\n" in tables.render(text, [])


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_the_gpu_command_says_what_is_missing(tmp_path):
    command = [sys.executable, str(machine.ROOT / "tools/gpu.py"), "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1
    assert re.match("gpu: (nvcc|an NVIDIA GPU) must be ", done.stderr)
    assert not (tmp_path / "out").exists()


def test_what_the_sanitizers_watch_on_a_gpu_runs_on_a_cpu():
    command = [sys.executable, str(machine.ROOT / "tools/sanitize.py"), "cpu"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"sanitize: \d{3} calls, 0 wrong", done.stdout)


def test_the_gpu_command_measures_every_benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(machine.ROOT / "tools"))
    files = Path(machine.ROOT, "benchmarks").glob("*.py")
    with_cases = {p.stem for p in files if re.search(r"^def cases\(", p.read_text(), re.MULTILINE)}
    assert sorted(import_module("gpu").BENCHMARKS) == sorted(with_cases)


def test_benchmarks_run_in_the_order_in_which_they_are_named(monkeypatch):
    ran = []

    def measured(module, *_):
        ran.append(module)
        return {"not_measured": []}

    monkeypatch.setattr("benchmarks.command.measure", measured)
    run([path_accumulate, residual_add], ["residual_add", "path_accumulate", "--smoke"])
    assert ran == [residual_add, path_accumulate]


def test_what_is_not_compiled_is_listed_as_not_measured():
    fake = FakeClock()
    work = case({OURS: fake.variant("a", 1.0), "compile": fake.variant("b", 1.0)})
    report = results.empty("fake", {}, ONCE)
    asked = Namespace(variants="", no_compile=True)
    clocks = [WallClock()]
    one(work, clocks, torch.device("cpu"), 1, ONCE, {"float32": 1.0}, report, asked)
    assert "b" not in fake.calls
    assert [entry["variant"] for entry in report["not_measured"]] == ["compile"]


def test_every_operator_has_its_benchmark():
    root = Path(machine.ROOT)
    rooms = {p.name for p in (root / "csrc").iterdir() if (p / "kernel.h").exists()}
    assert rooms <= {p.stem for p in (root / "benchmarks").glob("*.py")}
