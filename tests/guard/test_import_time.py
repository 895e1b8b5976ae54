"""`import secateur` costs little beside `import torch`, and brings in nothing only some need."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys

RUNS = 5
MOST_SECONDS = 0.3
NOT_YET = {"transformers", "matplotlib", "pydantic", "typer", "rich", "yaml", "ray", "optuna", "onnx"}

CHILD = """
import json, sys, time
import torch
before = set(sys.modules)
start = time.process_time()
import secateur
end = time.process_time()
print(json.dumps({"added": end - start, "modules": sorted(set(sys.modules) - before)}))
"""


def child(code: str) -> dict[str, object]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    report: dict[str, object] = json.loads(done.stdout)
    return report


def test_import_is_quick_and_lean() -> None:
    # Processor time: on a machine with other work an import waits for a core, and how long says nothing about it.
    # `make bench` measures the time by the clock. torch is there already, so the time is what secateur adds.
    runs = [child(CHILD) for _ in range(RUNS)]
    added = statistics.median(float(str(r["added"])) for r in runs)
    modules = runs[0]["modules"]
    assert isinstance(modules, list)
    assert "secateur" in modules
    assert not NOT_YET & {m.split(".")[0] for m in modules}
    assert added < MOST_SECONDS, f"import secateur adds {added:.2f} s of processor time to import torch"
