"""A blind comparison to read: passages of held-out text among passages that the contenders wrote, as a page of HTML.

The page is one file that loads nothing. Each of its rounds shows the text before a held-out passage, then this passage
and what each contender wrote instead, in random order and without names, until the reader has chosen one.
"""

import json
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from gru.config import PipelineConfig
from gru.corpus.dataset import Dataset, first_texts
from gru.errors import UserError
from gru.evaluation.memorization import copied_share, copied_spans, repetition
from gru.evaluation.samples import SEARCHED_BYTES, CopyShares
from gru.generation.generate import generate_ids
from gru.generation.sampling import SamplingParams
from gru.registry.bundle import Bundle

ROUNDS = 12
BEFORE_CHARACTERS = 400  # of the text before a passage, which the contenders continue
PASSAGE_CHARACTERS = 400
SHORTEST = 8  # characters in a held-out passage
HELDOUT = "held-out text"


@dataclass(frozen=True)
class Opening:
    """A place in held-out text: the text before it and the passage after it."""

    before: str
    passage: str


@dataclass(frozen=True)
class Passage:
    """What the page shows of one author in one round."""

    author: str
    """A contender's name, or HELDOUT."""
    temperature: float | None
    """Sampling temperature; None for held-out text."""
    text: str


@dataclass(frozen=True)
class Round:
    """A round of the page: the text before a place, and what each author wrote after it, in the order shown."""

    before: str
    passages: list[Passage]


def choose_openings(texts: Iterable[str], count: int) -> list[Opening]:
    """Return places at the start of paragraphs, or else of lines, evenly spaced over the texts.

    Raises UserError if no text has room for a passage and text before it.
    """
    places = [(text, place) for text in texts for place in _places(text)]
    if not places:
        raise UserError(f"--page: no held-out document has a passage of {SHORTEST} characters after its beginning")
    count = min(count, len(places))
    chosen = (places[(2 * index + 1) * len(places) // (2 * count)] for index in range(count))
    return [
        Opening(text[max(0, place - BEFORE_CHARACTERS) : place], cut(text[place : place + 2 * PASSAGE_CHARACTERS]))
        for text, place in chosen
    ]


def _places(text: str) -> list[int]:
    """Return where passages of a text may begin: after empty lines, or else after line ends, or else in its middle."""
    first, last = len(text) - len(text.lstrip()), len(text.rstrip()) - SHORTEST
    for places in (
        (match.end() for match in re.finditer(r"\n\s*\n", text)),
        (match.end() for match in re.finditer(r"\n", text)),
        [len(text) // 2],
    ):
        if possible := [place for place in places if first < place <= last]:
            return possible
    return []


def cut(text: str) -> str:
    """Return the beginning of a text, at most PASSAGE_CHARACTERS. Where there is more, it ends after a whole word, if
    words have spaces between them."""
    text = text.lstrip("\r\n").rstrip()
    if len(text) <= PASSAGE_CHARACTERS:
        return text
    start, *word = text[: PASSAGE_CHARACTERS + 1].rsplit(maxsplit=1)
    return f"{start if word and len(start) > PASSAGE_CHARACTERS // 2 else text[:PASSAGE_CHARACTERS]} …"


def write_page(path: Path, config: PipelineConfig, dataset: Dataset, bundles: Mapping[str, Bundle]) -> None:
    """Generate the passages of all contenders, and write the page.

    bundles: by the contender's name. Each round uses one of the temperatures of [evaluate], in turn. Raises UserError
    if the held-out text is too short, or the file cannot be written.
    """
    temperatures, seed = config.evaluate.temperatures, config.train.seed
    openings = choose_openings(first_texts(dataset.texts("heldout"), config.evaluate.heldout_bytes), ROUNDS)
    heldout, chance = dataset.manifest.heldout, random.Random(seed)
    tokens = round(1.5 * PASSAGE_CHARACTERS * heldout.tokens / heldout.characters) + 1
    rounds = []
    for number, opening in enumerate(openings):
        params = [SamplingParams(seed=seed + number, temperature=temperatures[number % len(temperatures)])]
        passages = [Passage(HELDOUT, None, opening.passage)]
        for name, bundle in bundles.items():
            [ids] = generate_ids(bundle.model, bundle.tokenizer, opening.before, tokens, params)
            passages.append(Passage(name, params[0].temperature, cut(bundle.tokenizer.decode(ids))))
        chance.shuffle(passages)
        rounds.append(Round(opening.before, passages))
    html = render(config.name, rounds, _copy_shares(rounds, dataset))
    try:
        path.write_text(html, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--page {path}: cannot write it: {error.strerror}") from None


def render(title: str, rounds: Sequence[Round], shares: Mapping[tuple[str, float | None], CopyShares]) -> str:
    """Return the page. shares: of each author at each temperature. No text can break out of its place."""
    content = {
        "title": title,
        "heldout": HELDOUT,
        "rounds": [asdict(each) for each in rounds],
        "shares": [{"author": author, "temperature": t, **asdict(share)} for (author, t), share in shares.items()],
    }
    template = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    return template.replace("{content}", json.dumps(content, ensure_ascii=False).replace("<", "\\u003c"))


def _copy_shares(rounds: Sequence[Round], dataset: Dataset) -> dict[tuple[str, float | None], CopyShares]:
    """Return how much of the passages of each author, at each temperature, is copied from training text or repeated."""
    groups: dict[tuple[str, float | None], list[str]] = {}
    for passage in (passage for each in rounds for passage in each.passages):
        groups.setdefault((passage.author, passage.temperature), []).append(passage.text)
    texts = [text for group in groups.values() for text in group]
    copied = copied_spans(texts, first_texts(dataset.texts("train"), SEARCHED_BYTES))
    encode = dataset.tokenizer().encode
    return {
        key: CopyShares(copied_share(groups[key], copied), repetition([encode(text) for text in groups[key]]))
        for key in sorted(groups, key=lambda key: (key[0] != HELDOUT, key[0], key[1] or 0.0))
    }
