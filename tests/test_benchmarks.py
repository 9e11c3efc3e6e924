"""The benchmarks run; what they measure on tiny problems means nothing."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


def run(script: str, out: Path, *arguments: str) -> str:
    argv = [sys.executable, FOLDER / script, f"--out={out}", *arguments]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=FOLDER.parent)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_quick_benchmark_has_every_row(tmp_path):
    out = tmp_path / "result.json"
    run("vs_transformers.py", out, "--quick")
    result = json.loads(out.read_text())
    kinds = [row["name"].split(",")[0].split(" torch")[0] for row in result["rows"]]
    assert kinds == ["prefill", "decode step", "decode step", "generate", "SFT step", "SFT step", "SFT", "SFT"]
    assert all(row["torch"] > 0 and row["ours"] > 0 for row in result["rows"])
    assert result["memory_bound"]["weight_bytes"] > 0
    # PVM adds work, and XLA's count of it is not noise.
    assert all(0 < cost["more"]["flops"] < 1 for cost in result["pvm_cost"])


def test_quick_grpo_benchmark_runs_one_algorithm_on_both_sides(tmp_path):
    out = tmp_path / "result.json"
    printed = run("grpo.py", out, "--quick", "--threads=1")
    rows = json.loads(out.read_text())["rows"]
    assert all(row["name"] in printed for row in rows)
    shared, gradient, *steps = rows
    assert set(shared["values"]) == {"parts", "rollout", "prefill each"} and shared["aims"] == {"rollout / parts": 1.15}
    # Torch's gradient of the completions that PVM-JAX drew, PVM included.
    assert gradient["values"]["PVM-JAX"] > 0
    assert gradient["ratios"]["torch with PVM / PVM-JAX"] == pytest.approx(1, abs=1e-3)
    assert [row["name"].rpartition(": ")[2] for row in steps[1:]] == ["rollout", "rewards", "update"]
    for side, total in steps[0]["values"].items():
        assert sum(row["values"][side] for row in steps[1:]) == pytest.approx(total)


def test_loader_benchmark_judges_by_the_step_that_is_given(tmp_path):
    arguments = ["--samples=8", "--steps=1", "--sizes=320x240,640x480", "--answer=50", "--threads=1"]
    fast = run("loader.py", tmp_path / "fast.json", *arguments, "--step_seconds=1e-6")
    result = json.loads((tmp_path / "fast.json").read_text())
    assert "DATA IS THE BOTTLENECK" in fast
    assert result["samples"] == 8 and result["skipped"] == 0 and 0 < result["padding"] < 1
    assert {"row", "decode", "resize", "patches", "text and indices"} == set(result["parts"])
    cpu = result["cpu"] + result["kernel"]
    assert result["host_cores"] == pytest.approx(cpu / 8 / 1e-6)  # two of sixteen parts, within a microsecond
    assert "data is not the bottleneck" in run("loader.py", tmp_path / "slow.json", *arguments, "--step_seconds=1e6")


def test_quick_evaluation_benchmark_has_the_completions_of_transformers(tmp_path):
    printed = run("evaluation.py", tmp_path / "result.json", "--quick")
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["same_completions"] == result["samples"] == 4
    assert set(result["ratios"]) == {"torch, one by one", "torch, batches"}
    assert f"{result['samples_per_second']['harness']:.3f} samples/s" in printed


def test_analysis_benchmark_measures_each_length_in_a_process_of_its_own():
    argv = [sys.executable, FOLDER / "analysis.py", "--tokens", "192", "320", "--once", "--window=64"]
    done = subprocess.run(argv, capture_output=True, text=True, cwd=FOLDER.parent)
    assert done.returncode == 0, done.stderr
    header, *lines = done.stdout.splitlines()
    assert header.split()[:2] == ["tokens", "measured"]
    tokens, measured, peak, here = zip(*(map(float, line.split()[:4]) for line in lines))
    assert 192 - 64 < tokens[0] <= 192 and 320 - 64 < tokens[1] <= 320, "with room for the question"
    assert all(0 < m < t for m, t in zip(measured, tokens)) and all(p > 100 and 0 <= h < p for p, h in zip(peak, here))
