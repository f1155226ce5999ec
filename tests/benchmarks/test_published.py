"""Splits and conversions of the published tables, on made-up files, and the command that trains and compares."""

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gru.errors import UserError
from tests.benchmarks.published import TABLES, parse_arguments, run
from tests.benchmarks.published_texts import (
    Ids,
    Text,
    read_ptb_characters,
    read_ptb_words,
    read_war_and_peace,
)

PTB = {
    "train": " the cat <unk> N mice \n a cat sat \n",
    "valid": " a <unk> sat \n",
    "test": " the mice sat \n\n",
}


@pytest.fixture
def ptb(tmp_path: Path) -> Path:
    for part, text in PTB.items():
        (tmp_path / f"ptb.{part}.txt").write_text(text)
    return tmp_path


@pytest.fixture
def threads() -> Iterator[None]:
    """Restores the number of threads, which the command sets."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def decoded(text: Text) -> list[list[str]]:
    def symbols(ids: Ids) -> list[str]:
        return [text.symbols[index] for index in ids]

    return [symbols(part) for part in (text.train, text.validation, text.test)]


def test_war_and_peace_is_cut_by_characters_and_keeps_its_line_ends(tmp_path: Path) -> None:
    whole = "Eh bien, né?\r\nOui.\r\nÀ bas!\r\n"
    (tmp_path / "book.txt").write_bytes(whole.encode())
    text = read_war_and_peace(tmp_path / "book.txt")
    assert ["".join(part) for part in decoded(text)] == ["Eh bien, né?\r\nOui.\r\nÀ ", "bas", "!\r\n"]
    assert text.vocab_size == len(set(whole)) + 1
    assert text.end_of_text == len(set(whole))


def test_ptb_words_end_lines_with_a_symbol_and_keep_unknown_words(ptb: Path) -> None:
    text = read_ptb_words(ptb)
    assert decoded(text) == [
        ["the", "cat", "<unk>", "N", "mice", "<eos>", "a", "cat", "sat", "<eos>"],
        ["a", "<unk>", "sat", "<eos>"],
        ["the", "mice", "sat", "<eos>"],
    ]
    assert set(text.symbols) == {"the", "cat", "<unk>", "N", "mice", "<eos>", "a", "sat"}


def test_ptb_characters_spell_words_and_join_them(ptb: Path) -> None:
    train, validation, test = decoded(read_ptb_characters(ptb))
    assert train == [*"the_cat_<unk>_N_mice", "<eos>", *"a_cat_sat", "<eos>"]
    assert validation == [*"a_<unk>_sat", "<eos>"]
    assert test == [*"the_mice_sat", "<eos>"]


def test_a_text_that_cannot_be_cut_is_a_mistake(ptb: Path) -> None:
    for name, data, message in (
        ("none.txt", None, r"none\.txt: cannot read the text"),
        ("short.txt", b"War", r"short\.txt: has 3 characters: expected a text of 10 or more"),
        ("latin.txt", "Il était une fois".encode("latin-1"), r"latin\.txt: byte 3 is not UTF-8"),
    ):
        if data:
            (ptb / name).write_bytes(data)
        with pytest.raises(UserError, match=message):
            read_war_and_peace(ptb / name)
    (ptb / "ptb.valid.txt").write_text("\n")
    with pytest.raises(UserError, match=r"ptb\.valid\.txt: has no words"):
        read_ptb_words(ptb)
    (ptb / "ptb.valid.txt").unlink()
    with pytest.raises(UserError, match=r"ptb\.valid\.txt: cannot read it: .*; expected the directory of ptb\.train"):
        read_ptb_characters(ptb)


def arguments(text: Path, output: Path, seeds: int, *more: str) -> argparse.Namespace:
    sizes = ["model.hidden=16", "model.embedding=16", "train.batch_size=4", "train.sequence_length=16"]
    overrides = [word for value in [*sizes, "train.threads=1"] for word in ("--set", value)]
    words = [str(text), "--table", "war-and-peace", "--steps", "20", "--seeds", str(seeds), "--output", str(output)]
    return parse_arguments([*words, *overrides, *more])


@pytest.mark.slow
def test_the_command_trains_scores_and_resumes_after_the_last_finished_seed(
    tmp_path: Path, threads: None, capsys: pytest.CaptureFixture[str]
) -> None:
    text, output = tmp_path / "book.txt", tmp_path / "results.jsonl"
    text.write_text("The crow met the fox by the river. " * 60)
    run(arguments(text, output, seeds=1))
    first = output.read_text()
    record = json.loads(first)
    assert (record["seed"], record["steps"]) == (0, 20)
    assert len(record["curve"]) == 16 and record["curve"][-1] < record["curve"][0]
    assert 0 < record["nats"]["test"] < math.log(len(set(text.read_text())) + 1)
    assert 0 < record["nats"]["test, dynamic"] < record["nats"]["test"]  # sentences repeat, so adapting helps
    shown = capsys.readouterr().out
    assert "| best of 36 RNNs" in shown and f"| ours, seed 0, 20 steps | {record['nats']['test']:.4f} |" in shown

    output.write_text(first + first[:100])  # as if it was killed while it wrote the next line
    picture = tmp_path / "losses.png"
    run(arguments(text, output, 2, "--picture", str(picture)))
    assert picture.read_bytes().startswith(b"\x89PNG")
    out, log = capsys.readouterr()
    assert "seed 0: done already" in log and "| ours, median of 2 seeds |" in out
    assert output.read_text().startswith(first + first[:100] + "\n")
    assert [json.loads(line)["seed"] for line in output.read_text().splitlines()[::2]] == [0, 1]


def test_settings_are_chosen_without_the_test_part(
    tmp_path: Path, threads: None, capsys: pytest.CaptureFixture[str]
) -> None:
    text, output = tmp_path / "book.txt", tmp_path / "results.jsonl"
    results = []
    for last in ("The crow met the fox by the river. ", "The lion and the mouse went alone.  "):
        text.write_text("The crow met the fox by the river. " * 60 + last * 10)
        run(arguments(text, output, 1, "--validation-only"))
        results.append(json.loads(output.read_text().splitlines()[-1]))
    assert len(output.read_text().splitlines()) == 2  # the first result is not taken for the other text
    assert results[0]["nats"].keys() == {"validation"} and results[0]["dynamic"] is None
    row = f"| ours, seed 0, 20 steps |  |  | {results[0]['nats']['validation']:.4f} |"
    assert row in capsys.readouterr().out
    run(arguments(text, output, 1))
    assert "done already" not in capsys.readouterr().err
    full = json.loads(output.read_text().splitlines()[-1])
    assert full["nats"]["validation"] == results[1]["nats"]["validation"]
    assert full["nats"].keys() == {"validation", "test", "test, dynamic"}


def test_a_mistake_is_found_before_training(tmp_path: Path) -> None:
    text = tmp_path / "book.txt"
    text.write_text("The crow met the fox by the river. " * 60)
    with pytest.raises(UserError, match=r"--output .*absent/r\.jsonl: its directory does not exist"):
        run(arguments(text, tmp_path / "absent" / "r.jsonl", seeds=1))
    with pytest.raises(UserError, match="--minutes 20 --seeds 0: expected positive numbers"):
        run(arguments(text, tmp_path / "r.jsonl", seeds=0))


def test_published_numbers_are_shown_in_their_own_units() -> None:
    assert TABLES["war-and-peace"].value(1.077) == 1.077
    assert TABLES["ptb-characters"].value(math.log(2)) == 1
    assert TABLES["ptb-words"].value(math.log(92.48)) == pytest.approx(92.48)
