"""What each stage adds to the MLflow run over all stages, in a real MLflow."""

from typing import Any

from gru import config as configuration
from gru.registry import tracking
from jobs.model_card import model_card
from pipelines import workflow
from tests.jobs.test_model_card import DONE


def test_a_workflow_whose_stages_were_done_before_has_their_numbers_and_its_card(mlflow_store: str) -> None:
    """`serve` may be repeated alone, without the results of the stages before it, and leaves the card."""
    config = configuration.load('{"corpus": {"sources": ["a.txt"]}, "registry": {"experiment": "test"}}')
    stage, parent = tracking.open_run("test", "t", "train"), tracking.open_run("test", "p", "pipeline")
    stage.log_points([{"step": 10, "time": 1e9, "metrics": {"train/loss": 3.0, "heldout/loss": 3.5}}])
    results: dict[str, Any] = {**DONE, "train": {**DONE["train"], "run": stage.id}}
    results["evaluate"] = {**DONE["evaluate"], "perplexity_per_token": 3.0}
    done: Any = {}
    for name, result in results.items():
        done = {**done, name: result}
        workflow._log_result(parent.id, config, name, done)
    workflow._log_result(parent.id, config, "serve", {"serve": {"version": "3"}})  # type: ignore[typeddict-item]
    data = parent.client.get_run(parent.id).data
    assert data.tags[tracking.NOTE_TAG] == model_card(config, done)
    assert (data.metrics["train/loss"], data.metrics["heldout/loss"], data.metrics["bits_per_byte"]) == (3, 3.5, 1.5744)
