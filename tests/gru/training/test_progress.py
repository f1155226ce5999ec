from gru.training.progress import progress_line, sample_line

METRICS = {"train/loss": 2.3456, "train/tokens_per_second": 6538.7, "train/memory_gigabytes": 1.234}
ROOM = 54  # columns beside stage, state and time, of 80


def test_progress_has_units_and_the_held_out_loss_once_it_is_measured() -> None:
    assert progress_line(10, 1200, METRICS, [], 3723) == (
        "step 10/1,200, 1:02:03 left, 6,539 tokens/s; loss 2.346, 1.2 GB"
    )
    assert progress_line(1200, 1200, METRICS, [4.0, 3.0, 2.0], 0) == (
        "step 1,200/1,200, 0:00 left, 6,539 tokens/s; loss 2.346, held-out 2.000 █▅▁, 1.2 GB"
    )


def test_both_parts_of_a_large_runs_progress_have_room_at_80_columns() -> None:
    metrics = {"train/loss": 10.5, "train/tokens_per_second": 1.7e6, "train/memory_gigabytes": 135.9}
    line = progress_line(99_990, 100_000, metrics, [10.5 - i / 100 for i in range(400)], 86_399)
    assert max(map(len, line.split("; "))) <= ROOM


def test_a_sample_is_one_line_whatever_it_contains() -> None:
    line = sample_line(1500, "class A:\n\tpass\r\n\x1b[31m" + "x" * 500)
    assert line.startswith("sample at step 1,500: class A: pass \ufffd[31mxxx") and line.endswith("…")
    assert line.isprintable()
