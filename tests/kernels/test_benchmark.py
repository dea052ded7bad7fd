"""The benchmark compares equal computations, and its rows become tables and a roofline; without rows the documents say "pending"."""

import json
from functools import partial
from xml.etree import ElementTree

import pytest
import torch

from scripts import benchmark_kernels, kernel_results
from scripts.benchmark_kernels import agrees, cases, flat

SHAPE = (2, 4, 9, 8)


@pytest.fixture
def on_the_host(kernels_on_cpu, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    yield kernels_on_cpu
    torch.compiler.reset()


@pytest.mark.parametrize("place", range(4))
def test_all_versions_of_a_case_are_one_computation(on_the_host, place):
    case = list(cases(SHAPE, torch.device("cpu")))[place]
    agrees(case)
    assert on_the_host  # kernels were launched
    values = case.tensors()
    assert len(flat(case.versions["torch"](values))) >= 3


def test_a_version_that_differs_is_noticed_before_anything_is_timed(on_the_host):
    case = next(iter(cases(SHAPE, torch.device("cpu"))))
    case.versions["wrong"] = lambda values: case.versions["torch"]({**values, "x": 1.1 * values["x"]})
    with pytest.raises(SystemExit, match="guided_step on wrong differs from PyTorch"):
        agrees(case)


def test_bytes_are_those_of_inputs_and_outputs():
    """guided_step: two bfloat16 outputs, float32 state and noise in; bfloat16 state and float32 velocity out; 2 + 2 + 4 + 4 + 2 + 4."""
    found = {case.op: case for case in cases(SHAPE, torch.device("cpu"))}
    elements = torch.Size(SHAPE).numel()
    assert found["guided_step"].num_bytes == 18 * elements
    assert found["guided_step, philox"].num_bytes == 14 * elements
    assert found["transition_log_prob"].num_bytes == (2 * 18 + 4) * elements  # every input twice, two gradients
    assert found["paired_error"].num_bytes == (2 * 12 + 2) * elements
    for name in ("guided_step", "transition_log_prob"):
        values = found[name].tensors()
        read = sum(tensor.numel() * tensor.element_size() for tensor in values.values())
        passes = 1 if name == "guided_step" else 2
        assert found[name].num_bytes >= passes * read


def test_without_a_device_nothing_is_written(tmp_path, monkeypatch):
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    monkeypatch.setattr("sys.argv", ["benchmark_kernels", "--out", str(tmp_path / "rows.jsonl")])
    with pytest.raises(SystemExit, match="nothing is estimated"):
        benchmark_kernels.main()
    assert not (tmp_path / "rows.jsonl").exists()


def made_up_rows():
    """A machine with 1000 GB/s and 10000 GFLOP/s; the kernels take 10 us, eager 50, compiled 13, and move 9000 bytes in it."""
    common = {"hardware": "Test GPU", "torch": "2.0", "compiler": "NVRTC 1.0", "commit": "abc", "date": "2026-01-01", "repeats": 5}
    rows = [{"op": name, "backend": "torch", "metric": metric, "unit": unit, "p20": value, "p50": value, "p80": value, **common}
            for name, metric, unit, value in (("copy", "bandwidth", "GB/s", 1000.0), ("float32 product", "rate", "GFLOP/s", 10000.0))]
    for shape in ([2, 16], [1024, 16, 64, 64]):
        for backend, micros in (("cuda", 10.0), ("torch", 50.0), ("compile", 13.0)):
            for metric in ("device time", "time per call"):
                rows.append({"op": "guided_step", "part": "forward", "backend": backend, "shape": shape, "dtype": "bfloat16",
                             "metric": metric, "unit": "us", "p20": micros, "p50": micros, "p80": micros, "bytes": 9_000_000,
                             "flops": 18_000_000, **common})
    rows.append({"op": "grpo_iteration", "backend": "cuda", "metric": "torch over cuda", "unit": "ratio", "p20": 1.0, "p50": 1.1,
                 "p80": 1.2, "shape": [32, 16, 64, 64], "layers": 24, **common})
    return rows


def test_tables_say_what_the_rows_say():
    text = kernel_results.section(made_up_rows())
    assert "| `guided_step` | 1024x16x64x64 | 10.0 us | 90 % | 5.00 | 1.30 | 10.0 us | 5.00 | 1.30 |" in text
    assert "1 of 1 reach 0.85 of the copy's bandwidth; 1 of 1 reach 4 times faster than eager; 1 of 1 reach 1.2 times" in text
    assert "PyTorch takes 1.100 [1.000, 1.200] times as long" in text


def test_a_time_with_launches_in_it_is_no_device_time():
    """Neither a ratio nor a share nor a point of the roofline comes from it; calls are compared all the same."""
    def with_launches(backend):
        return [{**row, "queued": row["backend"] != backend} if row["metric"] == "device time" else row for row in made_up_rows()]

    waiting = with_launches("torch")
    assert "| 10.0 us | 90 % |  | 1.30 | 10.0 us | 5.00 | 1.30 |" in kernel_results.section(waiting)
    assert "0 of 0 reach 4 times faster than eager; 1 of 1 reach 1.2 times" in kernel_results.section(waiting)
    assert kernel_results.roofline(waiting).count("<title>") == 2
    text = kernel_results.section(with_launches("cuda"))
    assert "| 10.0 us |  |  |  | 10.0 us | 5.00 | 1.30 |" in text
    assert "0 of 1 reach 0.85 of the copy's bandwidth" in text


def test_the_roofline_is_a_figure_below_its_ceilings():
    rows = made_up_rows()
    root = ElementTree.fromstring(kernel_results.roofline(rows))
    circles = [node for node in root.iter("{http://www.w3.org/2000/svg}circle") if len(node)]
    assert len(circles) == 3
    line = root.find("{http://www.w3.org/2000/svg}polyline").get("points").split()
    assert len(line) == 3
    assert all(0 < float(node.get("cx")) < 640 and 0 < float(node.get("cy")) < 380 for node in circles)
    by_backend = sorted(circles, key=lambda node: float(node.get("cy")))
    assert "cuda" in by_backend[0][0].text  # highest
    assert float(by_backend[0].get("cy")) > float(line[1].split(",")[1])  # below the roof


def test_only_the_last_machine_is_shown(tmp_path):
    path = tmp_path / "kernels.jsonl"
    path.write_text("".join(json.dumps({**row, "commit": "old"}) + "\n" for row in made_up_rows())
                    + "".join(json.dumps(row) + "\n" for row in made_up_rows()[:3]))
    assert {row["commit"] for row in kernel_results.read(path)} == {"abc"}
    assert kernel_results.read(tmp_path / "none.jsonl") == []
    assert kernel_results.section([]).startswith("Pending")


def test_the_page_is_what_its_rows_make_of_it():
    rows, text = kernel_results.read(), kernel_results.PAGE.read_text(encoding="utf-8")
    assert f"{kernel_results.BEGIN}\n{kernel_results.section(rows)}\n{kernel_results.END}" in text
    measured = kernel_results.read(kernel_results.SHARES)
    assert f"{kernel_results.BEGIN_SHARES}\n{kernel_results.shares(measured)}\n{kernel_results.END_SHARES}" in text
    assert len(measured) >= 2
    assert kernel_results.FIGURE.exists() == bool(kernel_results.keys(rows))
