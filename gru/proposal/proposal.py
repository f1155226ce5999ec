"""The configuration that is proposed for the user's text, by a sample of it and by the speed of this machine.

`propose` reads files; what it decides is in `template` and `recipe`.
"""

import os
import re
import tomllib
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import PurePath

from gru.config import CorpusConfig, PipelineConfig, TokenizerConfig
from gru.config_corpus import BUILT_IN_SOURCES
from gru.corpus.preview import Preview, look
from gru.errors import UserError
from gru.proposal.recipe import Machine, TextFacts, Training, propose_heldout, propose_tokenizer, propose_training
from gru.proposal.settings import Setting
from gru.proposal.sources import SourceChoice, choose_source, sample_texts
from gru.proposal.toml import document_lines, write_toml
from gru.proposal.unreadable import suggest_conversion
from gru.terminal import counted

_SECONDS = 1.5  # for the first look at the size of the corpus
_SHOWN_DOCUMENTS = 3
_LONGEST_PROMPT = 40  # characters
_LEAST_TOKENS = 20_000  # below which little can be learned
_LEAST_TOKENS_AT_ALL = 2000  # the lanes of a step take 512, and some text is held out


@dataclass(frozen=True)
class Proposal:
    """A proposed configuration, and what it is based on."""

    toml: str
    preview: Preview
    training: Training
    notes: list[str]
    """Sentences about what the user should know before a run."""


def propose(
    paths: list[str], absolute: Callable[[str], str], machine: Machine, store: str, name: str | None = None
) -> Proposal:
    """Return the proposed configuration for the text in some files, directories, globs or URLs.

    absolute: gives a path as it is to be opened. store: the storage, whose files are not read. name: of the pipeline;
    by default it is derived from the first path. Raises UserError if there is nothing to read.
    """
    try:
        return _propose(paths, absolute, machine, store, choose_name(name, absolute(paths[0])))
    except UserError as error:  # messages name keys of a file that does not exist yet
        raise UserError(re.sub(r"^corpus[\w., ]*: ", "", str(error))) from None


def _propose(paths: list[str], absolute: Callable[[str], str], machine: Machine, store: str, name: Setting) -> Proposal:
    choices = [choose_source(path, absolute(path), store) for path in paths]
    corpus = CorpusConfig(source=[choice.table(absolute(choice.path)) for choice in choices])
    first = look(corpus, TokenizerConfig(kind="byte"), machine.cores, store, _SECONDS)
    first.require_documents()
    texts = sample_texts(corpus, store)
    if not any(text.strip() for text in texts):
        raise UserError(f"{', '.join(corpus.paths)}: nothing but white space")
    facts = TextFacts.of(texts)
    tokenizer_settings = propose_tokenizer(facts, first.expected.bytes, machine)
    tokenizer = TokenizerConfig.model_validate({each.key: each.value for each in tokenizer_settings})
    preview = look(corpus, tokenizer, machine.cores, store)
    expected = preview.expected
    if expected.tokens < _LEAST_TOKENS_AT_ALL:
        raise UserError(
            f"{', '.join(corpus.paths)}: only about {counted(round(expected.tokens), 'token')} of text: training needs "
            f"{_LEAST_TOKENS_AT_ALL:,} at least, and {_LEAST_TOKENS:,} to learn much"
        )
    plain = all(kind == "text" for source in preview.sources for kind in source.files)
    heldout = propose_heldout(expected.bytes, expected.documents, plain)
    share = {each.key: each.value for each in heldout}.get("heldout_share", corpus.heldout_share)
    vocab_size = tokenizer.vocab_size
    if len(tokenizer_settings) == 1:  # an alphabet, of which the sample has seen all but a few characters
        vocab_size = min(vocab_size, facts.characters + 257)
    training = propose_training(max(1.0, expected.tokens * (1 - share)), vocab_size, machine)
    sections = {
        "tokenizer": tokenizer_settings,
        "model": training.model,
        "train": training.train,
        "evaluate": _evaluation(choices, preview),
        "resources": training.resources,
    }
    toml = write_toml(_head(preview), name, heldout, choices, sections)
    PipelineConfig.model_validate(tomllib.loads(toml))
    return Proposal(toml, preview, training, _notes(preview, training))


def choose_name(name: str | None, path: str) -> Setting:
    """Return the name of the pipeline: `name` if it is given, else one derived from the first path, as it is opened.

    Raises UserError for a name that cannot be one.
    """
    reason = "names the pipeline, its model and its MLflow experiment"
    if name is not None:
        if not re.fullmatch("[A-Za-z0-9][A-Za-z0-9_-]*", name):
            raise UserError(f"--name {name!r}: must be letters, digits, - and _, and not begin with - or _")
        return Setting("name", name, reason)
    last = PurePath(path.partition("?")[0].rstrip("/")).name
    stem = last if os.path.isdir(path) or path in BUILT_IN_SOURCES else last.split(".")[0]  # noqa: PTH112
    plain = unicodedata.normalize("NFKD", stem.replace("ß", "ss"))
    letters = "".join(character for character in plain if not unicodedata.combining(character))
    return Setting("name", re.sub("[^A-Za-z0-9_-]+", "-", letters).strip("-_") or "text", reason)


def _head(preview: Preview) -> list[str]:
    """Return the comments at the beginning: some documents as they will be read."""
    longest = max(len(source.shown) for source in preview.sources)
    shown = [source.shown[i] for i in range(longest) for source in preview.sources if i < len(source.shown)]
    return [
        "Proposed by `gru init` for this machine. `gru look` shows more of the text, `gru run --help` has every key.",
        "Some documents as they will be read:",
        *document_lines(shown[:_SHOWN_DOCUMENTS]),
    ]


def _evaluation(choices: list[SourceChoice], preview: Preview) -> list[Setting]:
    """Return the settings of [evaluate]: a prompt as texts begin."""
    settings = []
    documents = [document for source in preview.sources for document in source.shown]
    if choices[0].is_chat:
        settings.append(Setting("prompt", "user:\nHello!\n\nassistant:\n", "samples are answers"))
    elif documents and any(setting.key == "template" and "\n" in setting.value for setting in choices[0].settings):
        line = documents[0].text.split("\n")[0]
        if 0 < len(line) <= _LONGEST_PROMPT and line.isprintable():
            settings.append(Setting("prompt", f"{line}\n", "samples begin like a document"))
    return settings


def _notes(preview: Preview, training: Training) -> list[str]:
    notes = []
    tokens = preview.expected.tokens
    if tokens < _LEAST_TOKENS:
        notes.append(
            f"there are only about {counted(round(tokens), 'token')} of text: expect a model that repeats them"
        )
    if training.epochs < 0.2:
        notes.append(
            f"in this time training reads {training.epochs:.1%} of the text, but all of it is prepared: give init more "
            "--minutes, or prepare less (`limit` of a [[corpus.source]])"
        )
    if any("invalid_utf8" in source.dropped for source in preview.sources):
        notes.append('some documents are not valid UTF-8: set corpus.encoding, or corpus.on_bad = "replace"')
    passed_over = {kind: count for kind, count in preview.passed_over.items() if kind}
    if conversion := suggest_conversion(passed_over):
        notes.append(conversion)
    return notes
