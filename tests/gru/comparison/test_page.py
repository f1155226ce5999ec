"""The blind comparison page: which passages it has, that texts stay in their place, and the page in a browser."""

import json
import re
from html.parser import HTMLParser
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from selenium import webdriver

from gru.comparison.page import (
    HELDOUT,
    PASSAGE_CHARACTERS,
    Opening,
    Passage,
    Round,
    choose_openings,
    cut,
    render,
    write_page,
)
from gru.config import CorpusConfig, EvaluateConfig, ModelConfig, PipelineConfig, TokenizerConfig, TrainConfig
from gru.corpus.dataset import Dataset
from gru.corpus.prepare import prepare
from gru.errors import UserError
from gru.evaluation.samples import CopyShares
from gru.generation.generate import generate_ids
from gru.generation.sampling import SamplingParams
from gru.model.language_model import GRULanguageModel
from gru.registry.bundle import Bundle
from tests.gru.registry.bundles import LINEAGE

CONFIG = PipelineConfig(
    name="fables",
    corpus=CorpusConfig(sources=["fables.jsonl"], heldout_share=0.05, template="{title}\n\n{text}"),
    train=TrainConfig(seed=3),
    evaluate=EvaluateConfig(temperatures=[0.5, 1.0]),
)
HOSTILE = 'a </script><script>document.title = "broken"</script> <!-- "quoted" \\u003c & é 狐'


def test_passages_begin_with_a_paragraph_or_else_with_a_line() -> None:
    novel = "Chapter one.\r\n\r\nIt was in July.\r\nShe coughed.\r\n\r\nAll her invitations were French.\r\n"
    first, second = choose_openings([novel], 12)
    assert first.before == "Chapter one.\r\n\r\n"
    assert first.passage == "It was in July.\r\nShe coughed.\r\n\r\nAll her invitations were French."
    assert (second.before, second.passage) == (
        novel[: -len("All her invitations were French.\r\n")],
        novel[-34:].rstrip(),
    )
    poem = "春望\n杜甫\n國破山河在，城春草木深。"
    assert [opening.before for opening in choose_openings([poem], 12)] == ["春望\n", "春望\n杜甫\n"]
    assert choose_openings(["A text in one line."], 12) == [Opening("A text in", " one line.")]


def test_openings_are_spread_over_all_texts() -> None:
    texts = [f"Title {number}\n\nThe text of this document.\n" for number in range(100)]
    befores = [opening.before.split()[1] for opening in choose_openings(texts, 4)]
    assert befores == ["12", "37", "62", "87"]
    with pytest.raises(UserError, match="no held-out document has a passage of 8 characters"):
        choose_openings(["short", "", "\n\nThe only line.\n\n", "  \n"], 4)


def test_long_passages_end_after_a_whole_word() -> None:
    assert cut("seven " * 200) == "seven " * (PASSAGE_CHARACTERS // 6) + "…"
    assert cut("\r\n\n  indented\n") == "  indented"
    verse = "山" * 700
    assert cut(verse) == "山" * PASSAGE_CHARACTERS + " …"
    assert cut(f"山 {verse}") == f"山 {verse}"[:PASSAGE_CHARACTERS] + " …"


class Scripts(HTMLParser):
    """The scripts of a page, and the attributes that could load something."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.scripts: list[str] = []
        self.loads: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.loads += [f"{tag} {name}" for name, _ in attributes if name in ("src", "href", "srcset", "action")]
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data: str) -> None:
        if self.cdata_elem == "script":
            self.scripts[-1] += data


def content_of(html: str) -> Any:
    parsed = Scripts(html)
    assert len(parsed.scripts) == 2 and parsed.loads == []
    return json.loads(parsed.scripts[0])


def test_a_text_cannot_break_out_of_its_place() -> None:
    rounds = [Round(HOSTILE, [Passage(HELDOUT, None, HOSTILE), Passage("gru", 0.5, HOSTILE)])]
    content = content_of(render(HOSTILE, rounds, {(HELDOUT, None): CopyShares(0.25, None)}))
    assert content["title"] == content["rounds"][0]["before"] == HOSTILE
    assert [passage["text"] for passage in content["rounds"][0]["passages"]] == [HOSTILE, HOSTILE]
    assert content["shares"] == [{"author": HELDOUT, "temperature": None, "copied_share": 0.25, "repetition": None}]


@pytest.fixture(scope="module")
def dataset(fables: Path, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    corpus = CONFIG.corpus.model_copy(update={"sources": [str(fables)]})
    return prepare(corpus, TokenizerConfig(kind="char"), str(tmp_path_factory.mktemp("store") / "d"), lambda _: None)


def bundle(dataset: Dataset, seed: int) -> Bundle:
    """A model that learned nothing."""
    torch.manual_seed(seed)
    tokenizer = dataset.tokenizer()
    model = GRULanguageModel(ModelConfig(embedding=8, hidden=8), tokenizer.vocab_size).eval().requires_grad_(False)
    return Bundle(model, tokenizer, LINEAGE, "digest")


@pytest.mark.slow
def test_each_round_has_a_heldout_passage_among_those_of_the_contenders(dataset: Dataset, tmp_path: Path) -> None:
    bundles, path = {"gru": bundle(dataset, 0), "lstm": bundle(dataset, 1)}, tmp_path / "page.html"
    write_page(path, CONFIG, dataset, bundles)
    content = content_of(path.read_text())
    heldout = list(dataset.texts("heldout"))
    orders = set()
    assert len(content["rounds"]) == 12
    for number, each in enumerate(content["rounds"]):
        passages = {passage["author"]: passage for passage in each["passages"]}
        assert passages.keys() == {HELDOUT, "gru", "lstm"}
        assert any(text == each["before"] + passages[HELDOUT]["text"] for text in heldout)
        temperature = CONFIG.evaluate.temperatures[number % 2]
        for name in bundles:
            [ids] = generate_ids(
                bundles[name].model,
                bundles[name].tokenizer,
                each["before"],
                2000,
                [SamplingParams(seed=3 + number, temperature=temperature)],
            )
            assert passages[name]["temperature"] == temperature
            assert passages[name]["text"] == cut(bundles[name].tokenizer.decode(ids))
        orders.add(tuple(passage["author"] for passage in each["passages"]))
    assert len(orders) > 2
    shares = {(row["author"], row["temperature"]): row["copied_share"] for row in content["shares"]}
    assert [*shares] == [(HELDOUT, None), ("gru", 0.5), ("gru", 1.0), ("lstm", 0.5), ("lstm", 1.0)]
    assert shares[HELDOUT, None] > 0.9 and shares["gru", 1.0] == 0.0  # the fables repeat the same sentences
    write_page(tmp_path / "again.html", CONFIG, dataset, bundles)
    assert (tmp_path / "again.html").read_text() == path.read_text()


def test_a_page_that_cannot_be_written_is_a_mistake(dataset: Dataset, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"--page {re.escape(str(tmp_path))}: cannot write it: Is a directory"):
        write_page(tmp_path, CONFIG, dataset, {"gru": bundle(dataset, 0)})


@pytest.mark.browser
def test_a_reader_guesses_reveals_and_sees_the_score(driver: webdriver.Chrome, tmp_path: Path) -> None:
    numbers = count()
    rounds = [
        Round(f"before {number}", [Passage("gru", 0.5, f"{HOSTILE} {next(numbers)}"), Passage(HELDOUT, None, "real")])
        for number in range(3)
    ]
    shares = {(HELDOUT, None): CopyShares(0.25, None), ("gru", 0.5): CopyShares(0.0, 0.125)}
    (tmp_path / "page.html").write_text(render("fables", rounds, shares))
    for kind in ("browser", "performance"):
        driver.get_log(kind)  # forgets what other pages did
    driver.get(f"file://{tmp_path}/page.html")

    def text(selector: str = "body") -> str:
        return driver.find_element("css selector", selector).text

    def press(selector: str) -> None:
        driver.find_element("css selector", selector).click()

    assert "before 0" in text() and HOSTILE in text("article") and "Round 1 of 3" in text()
    assert HELDOUT not in text("#passages") and "temperature" not in text("#passages")
    press("article:nth-child(2) button")
    assert text("#verdict") == "Right: B is from the text." and "1 of 1 found" in text("#progress")
    assert text("article:nth-child(1) .author") == "gru, temperature 0.5"
    press("#next")
    assert text("#verdict") == "" and "before 1" in text()
    press("article:nth-child(1) button")
    assert text("#verdict") == "Wrong: B is from the text." and "1 of 2 found" in text("#progress")
    press("#next")
    press("#reveal")
    assert text("#verdict") == "B is from the text." and "1 of 2 found" in text("#progress")
    press("#next")
    assert text("#score") == "You found 1 of 2; by chance it would be 1.0."
    rows = [row.text for row in driver.find_elements("css selector", "#taken tbody tr, #shares tbody tr")]
    assert rows == [f"{HELDOUT} 1", "gru 1", f"{HELDOUT} 25.0 %", "gru, temperature 0.5 0.0 % 12.5 %"]
    press("#again")
    assert "Round 1 of 3 · score: 0 of 0 found" in text("#progress")
    assert driver.title == "Blind comparison: fables"
    assert driver.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in driver.get_log("performance")]
    urls = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert {url for url in urls if not url.startswith("file://")} == set()
