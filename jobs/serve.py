"""Serve the registry's @champion over HTTP (Ray Serve); returns when the endpoint answers."""

from typing import Any

from gru.config import PipelineConfig
from jobs import entry, stages


def run(config: PipelineConfig, parent: str | None, progress: entry.Progress) -> dict[str, Any]:
    tracking_uri = entry.require_tracking()
    stage = stages.serve(config)
    if result := stage.result():
        return result
    from gru.serving import deployment

    entry.start_ray()
    progress("starting")
    deployment.deploy(config.serve, config.model_name, tracking_uri)
    deployment.wait_ready(stage.path, stage.version, timeout=120)
    return stage.require()


if __name__ == "__main__":
    entry.main("serve", __doc__ or "", run)
