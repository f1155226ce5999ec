"""Serve the registry's @champion over HTTP (Ray Serve); the job ends when the endpoint answers."""

import os
from typing import TYPE_CHECKING

from gru.config import PipelineConfig
from gru.errors import UserError
from jobs import entry, stages
from jobs.results import ServeResult

if TYPE_CHECKING:
    from ray.serve import Application


def run(config: PipelineConfig, context: entry.JobContext) -> ServeResult:
    tracking_uri = entry.require_tracking()
    if "RAY_ADDRESS" not in os.environ:
        raise UserError("RAY_ADDRESS is not set: the endpoint needs a Ray that outlives this job; use `ray job submit`")
    stage = stages.serve_stage(config)
    if result := stage.result():
        return result
    from gru import cluster
    from gru.serving import deployment

    entry.start_ray()
    resources = config.resources.serve
    if cluster.is_too_small(resources, 1):
        context.progress(f"waiting: {cluster.describe_shortage('serve', resources)}")
    else:
        context.progress("starting the endpoint")
    deployment.deploy(config.serve, resources, config.model_name, tracking_uri, config.storage)
    deployment.wait_ready(stage.path, stage.version, timeout=120)
    return stage.require()


def application(arguments: dict[str, str]) -> "Application":
    """Build the endpoint for `serve deploy` and KubeRay's RayService, whose own settings give host and port.

    arguments: `config`, the path of the TOML file.
    """
    from gru.serving import deployment

    config = entry.load_config(arguments["config"], [])
    resources = config.resources.serve
    return deployment.application(config.serve, resources, config.model_name, entry.require_tracking(), config.storage)


if __name__ == "__main__":
    entry.main("serve", __doc__ or "", run)
