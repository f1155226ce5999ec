"""Stages as Ray jobs: submit, or attach to one that is there; follow, and stop.

Submission ids derive from what a stage makes, so a caller that was killed finds its job again.
"""

import asyncio
import logging
import re
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from gru import storage
from gru.errors import UserError

if TYPE_CHECKING:
    from ray.job_submission import JobDetails

USER_ERROR_STATUS = 2
POLL_SECONDS = 0.3
PATIENCE_SECONDS = 60


class JobFailed(RuntimeError):
    """A job ended without a result, and not by a mistake of the user's."""


class RayJobs:
    """The job server of one cluster. `working_dir` travels with each job; None where the code is there already."""

    def __init__(self, address: str, working_dir: str | None, environment: dict[str, str]) -> None:
        from ray.job_submission import JobSubmissionClient

        logging.getLogger("ray.dashboard.modules.job.sdk").setLevel(logging.WARNING)  # it sets its own level
        try:
            self.client = JobSubmissionClient(address)
        except (ConnectionError, RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"no Ray job server answers at {address} (RAY_ADDRESS): {reason}") from None
        # A job that is stopped saves what it has; Ray would kill it after 3 s.
        self.runtime_env: dict[str, object] = {"env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": "60", **environment}}
        self.python = [sys.executable, "-P"]  # not what may be called jobs in the current directory
        if working_dir is not None:
            self.runtime_env["working_dir"] = working_dir
            self.python = ["python"]  # the cluster's own

    def run(self, name: str, arguments: list[str], log: Path, progress: Callable[[str], None]) -> None:
        """Run `python -m jobs.X ...` under the newest attempt of `name` and wait for its success.

        An attempt that is under way is joined; after one that has ended, the next is made. Raises UserError with
        the job's own line for a user's mistake, JobFailed for anything else.
        """
        submission_id = self._attach_or_submit(name, shlex.join([*self.python, "-m", *arguments]))
        stage = arguments[0].removeprefix("jobs.")
        log.parent.mkdir(parents=True, exist_ok=True)
        details = asyncio.run(self._follow(submission_id, stage, log, progress))
        text = self.client.get_job_logs(submission_id)
        storage.write_bytes(str(log), text.encode())
        if details.status.value == "SUCCEEDED":
            return
        lines = text.splitlines()
        if details.driver_exit_code == USER_ERROR_STATUS:
            mistakes = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
            raise UserError(mistakes[-1] if mistakes else f"{name}: see {log}")
        last = next((line for line in reversed(lines) if line.strip()), details.message or "no output")
        raise JobFailed(f"job {submission_id} {details.status.value.lower()}: {last}\nits log: {log}")

    def _attach_or_submit(self, name: str, entrypoint: str) -> str:
        pattern = re.compile(re.escape(name) + r"-(\d+)")
        attempts: dict[int, JobDetails] = {}
        for job in self.client.list_jobs():
            if found := pattern.fullmatch(job.submission_id or ""):
                attempts[int(found[1])] = job
        newest = max(attempts, default=0)
        if newest and not attempts[newest].status.is_terminal():
            return f"{name}-{newest}"
        submission_id = f"{name}-{newest + 1}"
        try:
            self.client.submit_job(entrypoint=entrypoint, submission_id=submission_id, runtime_env=self.runtime_env)
        except RuntimeError as error:
            if "already exists" not in str(error):  # else another process was faster: attach to its job
                raise
        return submission_id

    async def _follow(self, submission_id: str, stage: str, log: Path, progress: Callable[[str], None]) -> "JobDetails":
        """Pass on the progress lines of a job until it ends. Its log is followed a few seconds behind, and the end
        is not to wait for that."""
        following = asyncio.create_task(self._follow_log(submission_id, stage, log, progress))
        answered = time.monotonic()
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
