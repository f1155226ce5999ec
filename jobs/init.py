"""The proposal of a configuration for the user's text: its TOML file, and a report for people."""

import os
from dataclasses import replace
from pathlib import Path

from gru import storage
from gru.config import BUILT_IN_SOURCES, ModelConfig, TrainConfig
from gru.machine import available_cpus
from gru.proposal.proposal import Proposal, propose
from gru.proposal.recipe import Machine
from gru.proposal.speed import has_gpu, measure_speed
from jobs import entry, look


def init(paths: list[str], minutes: float, name: str | None = None) -> Proposal:
    """Return the configuration that is proposed for the text at these paths, to train for about so many minutes.

    Raises UserError if there is nothing to read.
    """
    home = os.environ.get(entry.HOME_VARIABLE) or str(Path.cwd())

    def absolute(path: str) -> str:
        return path if path in BUILT_IN_SOURCES else storage.absolute(path, home)

    cores = available_cpus()

    def speed(model: ModelConfig, train: TrainConfig, vocab_size: int) -> float:
        return measure_speed(model, train, vocab_size, cores, has_gpu())

    machine = Machine(cores, has_gpu, speed, minutes)
    return propose(paths, absolute, machine, storage.absolute("./store", home), name)


def report(proposal: Proposal) -> str:
    """Return what was found and what is expected, as lines for people."""
    preview, training = proposal.preview, proposal.training
    without_documents = replace(preview, sources=[replace(source, shown=[]) for source in preview.sources])
    speed = f"training: about {max(1, round(training.minutes))} min at {training.tokens_per_second:,.0f} tokens/s"
    notes = [f"note: {note}" for note in proposal.notes]
    load, cores = os.getloadavg()[0], available_cpus()
    if load > cores:
        notes.append(
            f"note: other processes are busy (load {load:.1f} on {cores} cores): if they end, training is "
            "faster than this, and there is time for more steps"
        )
    return "\n".join([look.report(without_documents), f"{speed}, as measured", *notes])
