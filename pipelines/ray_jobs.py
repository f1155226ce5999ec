"""Stages as Ray jobs: submit a job or attach to a running one, follow its log, and stop it.

A submission id contains the stage's key, so a caller that was killed finds its job again.
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
from typing import TYPE_CHECKING, Any, NamedTuple

from gru import ray_internals, storage
from gru.config import content_key
from gru.config_stages import Resources
from gru.errors import UserError, first_line

if TYPE_CHECKING:
    from ray.job_submission import JobDetails

USER_ERROR_STATUS = 2
PARENT = "parent"  # key of a job's metadata: the MLflow run over all stages
POLL_SECONDS = 0.3
UNREACHABLE_SECONDS = 60  # then a job server that does not answer is an error
PENDING_SECONDS = 15  # then progress says that the job is still pending
RETRY_PAUSES = (5, 20, 60)  # seconds before the next attempt, after one whose node or process was lost
# Errors before the driver starts, which another attempt would meet again.
NEVER_STARTED = (
    "RUNTIME_ENV_SETUP_FAILURE",
    "JOB_ENTRYPOINT_COMMAND_START_ERROR",
    "JOB_SUPERVISOR_ACTOR_START_TIMEOUT",
)
KILLED_STATUS = 128 + signal.SIGKILL  # exit status of a shell whose command was killed


class JobFailed(RuntimeError):
    """A job ended without a result, for another reason than a user's mistake."""


class Attempt(NamedTuple):
    """A job of a stage, as the job server reports it."""

    stage: str
    key: str
    number: int
    parent: str
    """The MLflow run over all stages, of the workflow that submitted the job."""
    details: "JobDetails"

    @property
    def is_running(self) -> bool:
        return not self.details.status.is_terminal()


def reservation(resources: Resources) -> dict[str, Any]:
    """Return what Ray reserves for a job's driver, as arguments of `submit_job`. Without any, it runs on the head."""
    return {
        "entrypoint_num_cpus": resources.cpus,
        "entrypoint_num_gpus": resources.amounts().get("GPU"),
        "entrypoint_memory": resources.memory,
        "entrypoint_label_selector": resources.labels,
    }


class RayJobs:
    """The jobs of one storage on one cluster.

    working_dir: directory that is sent with each job; None if the cluster has the code. environment: variables of the
    jobs. Raises UserError if no job server answers at `address`.
    """

    def __init__(self, address: str, store: str, working_dir: str | None, environment: dict[str, str]) -> None:
        from ray.job_submission import JobSubmissionClient

        for name in ray_internals.SUBMISSION_LOGGERS:
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            self.client = JobSubmissionClient(address)
        except (ConnectionError, RuntimeError, ValueError) as error:
            message = f"no Ray job server answers at {address} (RAY_ADDRESS): {first_line(error)}"
            raise UserError(message) from None
        self.scope = content_key(store)[:6]  # in submission ids: a stage of another storage is another job
        # A stopped job saves its work first; by default Ray would kill it after 3 s.
        self.runtime_env: dict[str, object] = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60", **environment}}
        self.python = [sys.executable, "-P"]  # -P: ignore a directory `jobs` in the current one
        if working_dir is not None:
            self.runtime_env["working_dir"] = working_dir
            self.python = ["python"]  # the cluster's interpreter

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
        """Run `python -m jobs.STAGE ...` as the job of this stage and key, and wait until it succeeds.

        A running attempt is joined. If the last attempt has ended, or one is lost with its node, the next one is
        submitted. `resources` are for the driver, in addition to those of its tasks and workers. Progress lines go to
        `progress`, the whole log to the file `log`. Raises UserError with the job's error line for a user's mistake,
        JobFailed for any other failure.
        """
        entrypoint = shlex.join([*self.python, "-m", f"jobs.{stage}", *arguments])
        log.parent.mkdir(parents=True, exist_ok=True)
        for pause in (*RETRY_PAUSES, None):
            submission_id = self._attach_or_submit(stage, key, entrypoint, parent, resources)
            details = asyncio.run(self._follow(submission_id, stage, log, progress))
            text = self._log_of(submission_id)
            storage.write_bytes(str(log), text.encode())
            if details.status.value == "SUCCEEDED":
                return
            if pause is None or not _is_lost(details):
                break
            progress(f"the job's node or process was lost; next attempt in {pause} s")
            time.sleep(pause)
        lines = text.splitlines()
        if details.driver_exit_code == USER_ERROR_STATUS:
            mistakes = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
            raise UserError(mistakes[-1] if mistakes else f"{stage} failed; see its log: {log}")
        last = next((line for line in reversed(lines) if line.strip()), details.message or "no output")
        raise JobFailed(f"job {submission_id} {details.status.value.lower()}: {last}\nlog: {log}")

    def attempts(self) -> list[Attempt]:
        """All attempts at stages of this storage that the server knows, ordered by number."""
        attempts = []
        for job in self.client.list_jobs():
            if match := re.fullmatch(rf"gru-([a-z]+)-(.+)-{self.scope}-(\d+)", job.submission_id or ""):
                parent = (job.metadata or {}).get(PARENT, "")
                attempts.append(Attempt(match[1], match[2], int(match[3]), parent, job))
        return sorted(attempts, key=lambda attempt: attempt.number)

    def stop(self, parent: str) -> None:
        """Stop the running attempts of the workflow with this MLflow run, and wait until they have saved their work."""
        mine = [each for each in self.attempts() if each.parent == parent]
        running = [each.details.submission_id or "" for each in mine if each.is_running]
        for submission_id in running:
            self.client.stop_job(submission_id)
        with suppress(OSError, RuntimeError):  # an embedded Ray stops with the last `gru run` that uses it
            while not all(self.client.get_job_status(submission_id).is_terminal() for submission_id in running):
                time.sleep(POLL_SECONDS)

    def _log_of(self, submission_id: str) -> str:
        try:
            return self.client.get_job_logs(submission_id)
        except RuntimeError as error:  # the log was on a node that was lost
            return f"the log is lost: {error}"

    def _attach_or_submit(self, stage: str, key: str, entrypoint: str, parent: str, resources: Resources) -> str:
        """Return the submission id of the running attempt, or submit the next one."""
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
                **reservation(resources),
            )
        except RuntimeError as error:
            if "already exists" not in str(error):  # if it exists, another process submitted it first: attach
                raise
        return submission_id

    async def _follow(self, submission_id: str, stage: str, log: Path, progress: Callable[[str], None]) -> "JobDetails":
        """Report the progress of a job until it ends, and return its details.

        The log is followed in the background: it lags a few seconds, and the end must not wait for it."""
        log_task = asyncio.create_task(self._follow_log(submission_id, stage, log, progress))
        began = answered = time.monotonic()
        try:
            while True:
                try:
                    details = await asyncio.to_thread(self.client.get_job_info, submission_id)
                except (OSError, RuntimeError):  # the job itself continues
                    if time.monotonic() - answered > UNREACHABLE_SECONDS:
                        raise
                else:
                    answered = time.monotonic()
                    if details.status.is_terminal():
                        return details
                    if details.status.value == "PENDING" and answered - began > PENDING_SECONDS:
                        progress(f"pending: {details.message}")
                await asyncio.sleep(POLL_SECONDS)
        finally:
            log_task.cancel()
            await asyncio.gather(log_task, return_exceptions=True)

    async def _follow_log(self, submission_id: str, stage: str, log: Path, progress: Callable[[str], None]) -> None:
        """Copy the log to a file as it grows, and report its progress lines, which begin with the stage's name."""
        partial = ""
        with log.open("w", encoding="utf-8") as file:
            async for text in self.client.tail_job_logs(submission_id):
                file.write(text)
                file.flush()
                *lines, partial = (partial + text).split("\n")
                for line in lines:
                    if line.startswith(f"{stage}: "):
                        progress(line.removeprefix(f"{stage}: "))


def _is_lost(details: "JobDetails") -> bool:
    """Whether the job ended with its node or was killed, rather than failed by itself."""
    status = details.driver_exit_code
    if details.status.value != "FAILED" or details.error_type in NEVER_STARTED:
        return False
    return status is None or status < 0 or status == KILLED_STATUS
