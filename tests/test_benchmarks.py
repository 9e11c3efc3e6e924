"""The benchmark runs; what it measures on a tiny model means nothing."""

import json
import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "vs_transformers.py"


def test_quick_benchmark_has_every_row(tmp_path):
    out = tmp_path / "result.json"
    run = subprocess.run([sys.executable, SCRIPT, "--quick", f"--out={out}"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    result = json.loads(out.read_text())
    kinds = [row["name"].split(",")[0].split(" torch")[0] for row in result["rows"]]
    assert kinds == ["prefill", "decode step", "decode step", "generate", "SFT step", "SFT step", "SFT", "SFT"]
    assert all(row["torch"] > 0 and row["ours"] > 0 for row in result["rows"])
    assert result["memory_bound"]["weight_bytes"] > 0
    # PVM adds work, and XLA's count of it is not noise.
    assert all(0 < cost["more"]["flops"] < 1 for cost in result["pvm_cost"])
