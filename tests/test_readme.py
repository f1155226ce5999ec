"""The code in the README, run as its reader would run it, with a text of its own and fewer steps."""

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from gru.config import CorpusConfig, TokenizerConfig
from gru.corpus.prepare import prepare

README = Path(__file__).parent.parent / "README.md"
DATASET, STEPS = "store/datasets/7d298cf7f851ded2", '"steps": 500'


@pytest.mark.slow
def test_the_code_for_use_as_a_library_runs(tmp_path: Path) -> None:
    section = README.read_text().split("## Use as a library\n\n")[1].split("\n\n")[0]
    code = textwrap.dedent(section)
    assert code.count(DATASET) == code.count(STEPS) == 1
    (tmp_path / "book.txt").write_text("".join(f"It was the {number}th of May.\n" for number in range(2000)))
    corpus = CorpusConfig(sources=[str(tmp_path / "book.txt")])
    prepare(corpus, TokenizerConfig(kind="byte"), f"{tmp_path}/{DATASET}", lambda line: None)
    code = code.replace(STEPS, '"steps": 3, "batch_size": 4, "threads": 1')
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "th of May.\n" in done.stdout
