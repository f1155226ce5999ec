"""The lines that show a training run to people: its progress, and a sample of what it generates."""

from collections.abc import Mapping, Sequence

from gru.terminal import duration, one_line, sparkline

SAMPLE = "sample at step "
"""The beginning of a line that shows a sample."""


def progress_line(
    step: int, steps: int, metrics: Mapping[str, float], heldout_losses: Sequence[float], remaining: float
) -> str:
    """Return the progress at a step. metrics: its point; heldout_losses: of the whole run; remaining: seconds."""
    pace = [f"step {step:,}/{steps:,}", f"{duration(remaining)} left"]
    pace.append(f"{metrics['train/tokens_per_second']:,.0f} tokens/s")
    state = [f"loss {metrics['train/loss']:.3f}"]
    if heldout_losses:
        state.append(f"held-out {heldout_losses[-1]:.3f} {sparkline(heldout_losses)}")
    state.append(f"{metrics['train/memory_gigabytes']:.1f} GB")
    return f"{', '.join(pace)}; {', '.join(state)}"


def sample_line(step: int, text: str) -> str:
    """Return the line that shows a sample, which may contain any character."""
    return f"{SAMPLE}{step:,}: {one_line(text)}"
