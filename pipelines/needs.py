"""What in a storage is still needed: by workflows, and by the lineage of registered versions."""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from dbos import DBOSClient
from pydantic import ValidationError

from gru import storage
from gru.config import PipelineConfig
from gru.errors import UserError, first_line
from gru.registry import tracking
from gru.registry.origins import Origin, database_origins, server_origins
from jobs import entry, stages
from pipelines import database, embedded, records
from pipelines.records import StepsRecord, WorkflowRecord

RESUMABLE = "workflows that can be resumed"
NEWEST = "the newest run of each pipeline"
LINEAGE = "the lineage of registered versions"


@dataclass
class Needs:
    """The datasets and training runs that must stay, by their keys, each with what needs it."""

    datasets: dict[str, str] = field(default_factory=dict)
    runs: dict[str, str] = field(default_factory=dict)
    tracked: dict[str, str] = field(default_factory=dict)
    """The same for training runs that are known by the id of their MLflow run only."""
    initial: dict[str, str] = field(default_factory=dict)
    """The same for the models that runs start from."""
    checkpoints: set[str] = field(default_factory=set)
    """Names of checkpoint directories."""
    unknown: list[str] = field(default_factory=list)
    """What cannot be known, in sentences: if there is any, every dataset and training run must stay."""

    def add_workflows(self, client: DBOSClient, store: str | None) -> None:
        """Add what workflows that can be resumed need, and the newest run or sweep of each pipeline, in this storage.

        store: None if all workflows of the database are of this storage, under whatever path they know it.
        """
        for record in records.current(client, store):
            self._add_workflow(record, records.steps(client, record.id))

    def _add_workflow(self, record: WorkflowRecord, steps: StepsRecord) -> None:
        is_unfinished = record.state is None
        why = NEWEST if record.state == "done" else RESUMABLE
        if steps.dataset is None:
            if is_unfinished:
                self.unknown.append(
                    f"workflow {record.id} has not ended, and no dataset of it is recorded yet: `gru run` or "
                    "`gru cancel` with its config ends that"
                )
            return
        config_json = steps.config_json or record.config_json
        self.datasets.setdefault(_last(steps.dataset), why)
        self.add_paths(config_json, why)
        for stage in steps.stages:
            if stage.name == "train" and stage.result:
                self.runs.setdefault(stage.result["key"], why)
        try:
            config = PipelineConfig.model_validate_json(config_json)
            if prepared := stages.prepare_stage(config, steps.dataset).result():
                self.runs.setdefault(stages.train_stage(config, prepared).key, why)
        except ValidationError:  # a config of another version of this program
            if is_unfinished:
                self.unknown.append(f"workflow {record.id} has not ended, and its config is of another version")

    def add_paths(self, text: str, why: str) -> None:
        """Add what a config names by its path, such as a tokenizer or a checkpoint."""
        for key in re.findall(r"\bdatasets/([0-9a-f]{16})\b", text):
            self.datasets.setdefault(key, why)
        for key, name in re.findall(r"\bruns/([0-9a-f]{16})\b(?:/(step-\w+-\w+))?", text):
            self.runs.setdefault(key, why)
            self.checkpoints |= {name} - {""}
        for key in re.findall(r"\binitial/([0-9a-f]{16})\b", text):
            self.initial.setdefault(key, why)

    def add_origins(self, origins: Iterable[Origin]) -> None:
        """Add what the lineage of these versions names."""
        for origin in origins:
            lineage = origin.lineage
            self.datasets.setdefault(_last(lineage.dataset), LINEAGE)
            self.tracked.setdefault(lineage.run, LINEAGE)
            self.add_paths(lineage.initial or "", LINEAGE)
            if lineage.checkpoint:
                run, _, name = lineage.checkpoint.rstrip("/").rpartition("/")
                self.runs.setdefault(_last(run), LINEAGE)
                self.checkpoints.add(name)


def of_storage(store: str, with_lineage: bool) -> Needs:
    """Return what the workflows and the registry of a storage need.

    with_lineage: whether versions without an alias need nothing. Raises UserError if the database of the workflows
    does not answer.
    """
    needs = Needs()
    if storage.is_local(store) and entry.is_used_by_hand(store):
        needs.unknown.append("a job that was started by hand is in progress, and no workflow records what it uses")
    address = database.address(store)
    file = database.file_of(address)
    if file and not file.exists():
        needs.unknown.append(f"no workflow is recorded in {file}: set {database.VARIABLE} if another database has them")
    else:
        client = database.open_client(address)
        with database.answering():
            # A database inside the storage moves with it.
            inside = file is not None and storage.is_local(store) and file == Path(store) / database.FILE
            needs.add_workflows(client, None if inside else store)
    try:
        origins = _origins(store)
    except Exception as error:  # a registry and its artifacts' store each raise their own kinds
        needs.unknown.append(f"the registry cannot be read: {first_line(error)}")
    else:
        needs.add_origins(origin for origin in origins if origin.aliases or not with_lineage)
    return needs


def _origins(store: str) -> list[Origin]:
    """Return the origins of all registered versions. Raises UserError if they cannot be known."""
    url = os.environ.get("MLFLOW_TRACKING_URI") or embedded.address(store, "mlflow")
    if url:
        tracking.connect_impatiently(url)
        if problem := tracking.unreachable():
            raise UserError(f"MLFLOW_TRACKING_URI = {url} does not answer: {problem}")
        return server_origins()
    directory = Path(store) / "mlflow"
    if not storage.is_local(store) or not (directory / "mlflow.db").exists():
        raise UserError("none is known for this storage: set MLFLOW_TRACKING_URI")
    return database_origins(directory)


def _last(path: str) -> str:
    """Return the last name of a path, since two machines may know a storage by different paths."""
    return path.rstrip("/").rsplit("/", 1)[-1]
