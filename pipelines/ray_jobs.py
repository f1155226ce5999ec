"""Stages as Ray jobs: submit, or attach to one that is there; follow, and stop.

Submission ids derive from what a stage makes, so a caller that was killed finds its job again.
"""

import asyncio
import logging
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from gru import ray_internals, storage
from gru.config import Resources, content_key
from gru.errors import UserError

if TYPE_CHECKING:
    from ray.job_submission import JobDetails

USER_ERROR_STATUS = 2
PARENT = "parent"  # in a job's metadata: the MLflow run over all stages
POLL_SECONDS = 0.3
PATIENCE_SECONDS = 60
PENDING_SECONDS = 15  # after which a job that has not begun is told of
LOST_PAUSES = (5, 20, 60)  # seconds before the next attempt, after one that was lost with its node
# Nor would it the next time.
NEVER_BEGUN = (
    "RUNTIME_ENV_SETUP_FAILURE",
    "JOB_ENTRYPOINT_COMMAND_START_ERROR",
    "JOB_SUPERVISOR_ACTOR_START_TIMEOUT",
)
KILLED_STATUS = 128 + signal.SIGKILL  # what a shell says of it


class JobFailed(RuntimeError):
    """A job ended without a result, and not by a mistake of the user's."""


class Attempt(NamedTuple):
    """A job, as the server knows it."""

    stage: str
    key: str
    number: int
    parent: str
    """MLflow run over all stages, for which it was submitted."""
    details: "JobDetails"

    @property
    def is_running(self) -> bool:
        return not self.details.status.is_terminal()


class RayJobs:
    """The jobs of one storage on one cluster. `working_dir` travels with each; None where the code is there already."""

    def __init__(self, address: str, store: str, working_dir: str | None, environment: dict[str, str]) -> None:
        from ray.job_submission import JobSubmissionClient

        for name in ray_internals.SUBMISSION_LOGGERS:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            self.client = JobSubmissionClient(address)
        except (ConnectionError, RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"no Ray job server answers at {address} (RAY_ADDRESS): {reason}") from None
        self.scope = content_key(store)[:6]  # the same of another storage is another job
        # A job that is stopped saves what it has; Ray would kill it after 3 s.
        self.runtime_env: dict[str, object] = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60", **environment}}
        self.python = [sys.executable, "-P"]  # not what may be called jobs in the current directory
        if working_dir is not None:
            self.runtime_env["working_dir"] = working_dir
            self.python = ["python"]  # the cluster's own

    def run(
        self,
        stage: str,
        key: str,
        arguments: list[str],
        parent: str,
        log: Path,
        progress: Callable[[str], None],
        resources: Resources,
    ) -> None:
        """Run `python -m jobs.STAGE ...` for what the key names, and wait for its success. `resources` are for the job
        itself, beside what it asks for tasks and workers.

        An attempt that is under way is joined; after one that has ended, the next is made, and so it is where one is
        lost with its node. Raises UserError with the job's own line for a user's mistake, JobFailed for anything else.
        """
        entrypoint = shlex.join([*self.python, "-m", f"jobs.{stage}", *arguments])
        log.parent.mkdir(parents=True, exist_ok=True)
        for pause in (*LOST_PAUSES, None):
            submission_id = self._attach_or_submit(stage, key, entrypoint, parent, resources)
            details = asyncio.run(self._follow(submission_id, stage, log, progress))
            text = self._log_of(submission_id)
            storage.write_bytes(str(log), text.encode())
            if details.status.value == "SUCCEEDED":
                return
            if pause is None or not _was_lost(details):
                break
            progress(f"its node or process was lost: the next attempt in {pause} s")
            time.sleep(pause)
        lines = text.splitlines()
        if details.driver_exit_code == USER_ERROR_STATUS:
            mistakes = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
            raise UserError(mistakes[-1] if mistakes else f"{stage}: see {log}")
        last = next((line for line in reversed(lines) if line.strip()), details.message or "no output")
        raise JobFailed(f"job {submission_id} {details.status.value.lower()}: {last}\nits log: {log}")

    def attempts(self) -> list[Attempt]:
        """Of all stages of this storage that the server knows, in the order of their numbers."""
        found = []
        for job in self.client.list_jobs():
            if match := re.fullmatch(rf"gru-([a-z]+)-(.+)-{self.scope}-(\d+)", job.submission_id or ""):
                parent = (job.metadata or {}).get(PARENT, "")
                found.append(Attempt(match[1], match[2], int(match[3]), parent, job))
        return sorted(found, key=lambda attempt: attempt.number)

    def stop(self, parent: str) -> None:
        """Have the attempts that run for this MLflow run save what they have, and end."""
        mine = [each for each in self.attempts() if each.parent == parent]
        running = [each.details.submission_id or "" for each in mine if each.is_running]
        for submission_id in running:
            self.client.stop_job(submission_id)
        with suppress(OSError, RuntimeError):  # an embedded Ray ends with the last `gru run` that uses it
            while not all(self.client.get_job_status(submission_id).is_terminal() for submission_id in running):
                time.sleep(POLL_SECONDS)

    def _log_of(self, submission_id: str) -> str:
        try:
            return self.client.get_job_logs(submission_id)
        except RuntimeError as error:  # it was on a node that is gone
            return f"its log is lost: {error}"

    def _attach_or_submit(self, stage: str, key: str, entrypoint: str, parent: str, resources: Resources) -> str:
        known = {each.number: each for each in self.attempts() if (each.stage, each.key) == (stage, key)}
        newest = max(known, default=0)
        if newest and not known[newest].details.status.is_terminal():
            return f"gru-{stage}-{key}-{self.scope}-{newest}"
        submission_id = f"gru-{stage}-{key}-{self.scope}-{newest + 1}"
        try:
            self.client.submit_job(
                entrypoint=entrypoint,
                submission_id=submission_id,
                runtime_env=self.runtime_env,
                metadata={PARENT: parent},
                # A job that wants any of these is on a node that has it, others are on the head.
                entrypoint_num_cpus=resources.cpus,
                entrypoint_memory=resources.memory,
                entrypoint_label_selector=resources.labels,
            )
        except RuntimeError as error:
            if "already exists" not in str(error):  # else another process was faster: attach to its job
                raise
        return submission_id

    async def _follow(self, submission_id: str, stage: str, log: Path, progress: Callable[[str], None]) -> "JobDetails":
        """Pass on the progress lines of a job until it ends. Its log is followed a few seconds behind, and the end
        is not to wait for that."""
        following = asyncio.create_task(self._follow_log(submission_id, stage, log, progress))
        began = answered = time.monotonic()
        try:
            while True:
                try:
                    details = await asyncio.to_thread(self.client.get_job_info, submission_id)
                except (OSError, RuntimeError):  # the job goes on, whoever cannot see it
                    if time.monotonic() - answered > PATIENCE_SECONDS:
                        raise
                else:
                    answered = time.monotonic()
                    if details.status.is_terminal():
                        return details
                    if details.status.value == "PENDING" and answered - began > PENDING_SECONDS:
                        progress(f"waiting: {details.message}")
                await asyncio.sleep(POLL_SECONDS)
        finally:
            following.cancel()
            await asyncio.gather(following, return_exceptions=True)

    async def _follow_log(self, submission_id: str, stage: str, log: Path, progress: Callable[[str], None]) -> None:
        partial = ""
        with log.open("w", encoding="utf-8") as file:
            async for text in self.client.tail_job_logs(submission_id):
                file.write(text)
                file.flush()
                *lines, partial = (partial + text).split("\n")
                for line in lines:
                    if line.startswith(f"{stage}: "):
                        progress(line.removeprefix(f"{stage}: "))


def _was_lost(details: "JobDetails") -> bool:
    """Whether it ended by no doing of its own: with its node, or killed."""
    status = details.driver_exit_code
    if details.status.value != "FAILED" or details.error_type in NEVER_BEGUN:
        return False
    return status is None or status < 0 or status == KILLED_STATUS
