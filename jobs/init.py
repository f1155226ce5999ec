"""The proposal of a configuration for the user's text: its TOML file, and a report for people."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from gru import storage
from gru.config import ModelConfig, PipelineConfig, TrainConfig
from gru.config_corpus import BUILT_IN_SOURCES
from gru.errors import UserError
from gru.machine import available_cpus
from gru.proposal.proposal import Proposal, choose_name, propose
from gru.proposal.recipe import Machine
from gru.proposal.speed import has_gpu, measure_speed
from gru.terminal import counted
from jobs import entry, look

MINUTES = 30.0  # for training


def init(paths: list[str], minutes: float, name: str | None = None) -> Proposal:
    """Return the configuration that is proposed for the text at these paths, to train for about so many minutes.

    Raises UserError if there is nothing to read.
    """
    cores = available_cpus()

    def speed(model: ModelConfig, train: TrainConfig, vocab_size: int) -> float:
        return measure_speed(model, train, vocab_size, cores, has_gpu())

    machine = Machine(cores, has_gpu, speed, minutes)
    return propose(paths, _absolute, machine, storage.absolute("./store", _home()), name)


def find_or_write(paths: list[str], minutes: float | None, name: str | None, show: Callable[[str], None]) -> str:
    """Return the path of the config for the text at these paths: NAME.toml in the current directory.

    If it is absent, it is written as `init` proposes it. An existing one stays as it is, so the same call leads to the
    same config. show: takes lines for people. Raises UserError if that file is of other text, or there is nothing to
    read.
    """
    path = Path(f"{choose_name(name, _absolute(paths[0])).value}.toml")
    if path.exists():
        if entry.load_config(str(path), []).corpus.paths != [_absolute(each) for each in paths]:
            raise UserError(
                f"{path} exists and has other sources: run it with `gru run {path}`, or choose another --name"
            )
        unused = "; --minutes has no effect on it" if minutes else ""
        show(f"config: {path}, which exists: remove it to have another one proposed{unused}")
        return str(path)
    storage.check_writable(str(Path.cwd()), "current directory")
    show("looking at the text, and measuring how fast this machine trains")
    proposal = init(paths, minutes or MINUTES, name)
    storage.write_bytes(str(path), proposal.toml.encode())
    show(report(proposal))
    show(f"chosen: {_choices(entry.load_config(str(path), []))}")
    show(f"config: {path}, written with the reason of each setting; the same command runs it again")
    return str(path)


def _home() -> str:
    return os.environ.get(entry.HOME_VARIABLE) or str(Path.cwd())


def _absolute(path: str) -> str:
    return path if path in BUILT_IN_SOURCES else storage.absolute(path, _home())


def _choices(config: PipelineConfig) -> str:
    """Return the settings that matter most, in a line."""
    model, train, tokenizer = config.model, config.train, config.tokenizer
    tokens = f" of {tokenizer.vocab_size:,} tokens" if tokenizer.kind == "bpe" else ""
    return (
        f"a {tokenizer.kind} tokenizer{tokens}; {model.layers} x {model.hidden} {model.cell}, "
        f"{counted(train.steps, 'step')} of {train.batch_size} x {train.sequence_length} tokens"
    )


def report(proposal: Proposal) -> str:
    """Return what was found and what is expected, as lines for people."""
    preview, training = proposal.preview, proposal.training
    without_documents = replace(preview, sources=[replace(source, shown=[]) for source in preview.sources])
    speed = f"training: about {max(1, round(training.minutes))} min at {training.tokens_per_second:,.0f} tokens/s"
    notes = [f"note: {note}" for note in proposal.notes]
    load, cores = os.getloadavg()[0], available_cpus()
    if load > cores:
        notes.append(
            f"note: other processes are busy (load {load:.1f} on {counted(cores, 'core')}): if they end, training is "
            "faster than this, and there is time for more steps"
        )
    return "\n".join([look.report(without_documents), f"{speed}, by a short measurement", *notes])
