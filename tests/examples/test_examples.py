"""The examples, run as their reader would run them, with fewer steps of training."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).with_name("train_and_generate.py")
STEPS = "STEPS = 400"
CHECKS = """
import sys
assert points[-1]["step"] == 12 and points[-1]["metrics"]["heldout/loss"] < points[0]["metrics"]["train/loss"]
assert loaded.digest == bundle.digest and len(set(samples.values())) == 3
assert samples[0.8] == generate(bundle, "class ", tokens=80, temperature=0.8, seed=1)
assert not {"ray", "mlflow", "fastapi", "dbos"} & set(sys.modules)
"""


@pytest.mark.slow
def test_the_example_trains_generates_saves_and_loads_without_ray_and_mlflow(tmp_path: Path) -> None:
    code = EXAMPLE.read_text()
    assert code.count(STEPS) == 1
    script = tmp_path / EXAMPLE.name
    script.write_text(code.replace(STEPS, "STEPS = 12") + CHECKS)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, script], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "documents" in done.stdout and "--- 1.2\nclass " in done.stdout
