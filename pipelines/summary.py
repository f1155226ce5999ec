"""The summaries that `gru run` and `gru sweep` print for people."""

import shlex
from collections.abc import Sequence

from gru.config import PipelineConfig
from gru.terminal import printable
from jobs.model_card import curl
from jobs.results import RunResult, SweepResult


def of_run(config: PipelineConfig, result: RunResult) -> str:
    """Scores, a sample, and where to find the MLflow run and the endpoint."""
    sample = "\n".join(f"    {line}" for line in printable(result["sample"].strip("\n")).splitlines())
    served = f"version {result['serving']} of {result['model']}"
    return f"""
{result["bits_per_byte"]:.3f} bits per byte, {result["nats_per_character"]:.3f} nats per character on held-out text

{sample}

tracking   {result["tracking"]}
endpoint   {result["endpoint"]} serves {served}
try        {curl(config, result["model"])}"""


def of_sweep(path: str, result: SweepResult, best: Sequence[str]) -> str:
    """The trials, the best first, and the command that runs the best. path: the config's; best: its overrides."""
    trials = result["trials"].items()
    scored = sorted((trial["bits_per_byte"], label) for label, trial in trials if "error" not in trial)
    failed = [f"  failed  {label}: {trial.get('error')}" for label, trial in trials if "error" in trial]
    changes = " ".join(f"--set {shlex.quote(change)}" for change in best)
    rows = "\n".join([*(f"  {score:.4f}  {label}" for score, label in scored), *failed])
    return f"""
bits per byte on held-out text:
{rows}

tracking   {result["tracking"]}
run best   gru run {path} {changes}"""
