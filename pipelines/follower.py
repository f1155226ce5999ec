"""Shows the progress of a workflow that another process executes."""

from contextlib import suppress

from dbos import DBOSClient
from dbos import error as dbos_error
from sqlalchemy.exc import SQLAlchemyError

from jobs import results
from jobs.stages import STAGES
from pipelines import records
from pipelines.context import WorkflowContext


class Follower:
    """Follows the newest workflow of a prefix through the database, and shows each change of its stages."""

    def __init__(self, prefix: str, context: WorkflowContext, database: str) -> None:
        self.prefix, self.context, self.database = prefix, context, database
        self.workflow_id: str | None = None
        """The unfinished workflow that was seen, if any."""
        self._client: DBOSClient | None = None
        self._shown: set[tuple[str, str]] = set()  # label and name of the stages whose end was shown

    def close(self) -> str | None:
        """Show how the workflow ended. Return its id; None if no unfinished workflow was seen."""
        if self.workflow_id:
            self.update()
        if self._client:
            self._client.destroy()
        return self.workflow_id

    def update(self) -> None:
        """Show what has changed. A database or Ray that does not answer is tried again with the next update."""
        with suppress(OSError, RuntimeError, SQLAlchemyError, dbos_error.DBOSException):
            self._client = self._client or DBOSClient(system_database_url=self.database, retry_connection_errors=False)
            number, is_unfinished = records.find_newest(self._client, self.prefix)
            if is_unfinished:
                self.workflow_id = f"{self.prefix}-{number}"
            if self.workflow_id:
                self._show(self._client, self.workflow_id)

    def _show(self, client: DBOSClient, followed: str) -> None:
        running = {(each.parent, each.stage) for each in self.context.jobs.attempts() if each.is_running}
        labels = records.trial_labels(client, followed) or {followed: ""}
        for workflow_id, label in labels.items():
            steps = records.steps(client, workflow_id)
            for stage in steps.stages:
                if (label, stage.name) not in self._shown:
                    self._shown.add((label, stage.name))
                    detail = results.describe(stage.name, stage.result) if stage.result else ""
                    self.context.show(label, stage.name, "failed" if stage.problem else "done", detail)
            for name in STAGES:
                if (steps.parent, name) in running and (label, name) not in self._shown:
                    self.context.show(label, name, "running", "in another process")
