"""The model card: a model's scores, shape, dataset, a sample and how to call it, as Markdown for MLflow.

It is written as far as the stages are done, and is a function of the config and their results only.
"""

import json
import re
import shlex

from gru.config import PipelineConfig
from gru.network import url_of
from gru.terminal import counted, one_line, printable
from jobs.entry import KEY_VARIABLE
from jobs.results import StageResults

MOST_CHARACTERS = 5000  # MLflow's limit for the description of a version; for that of a run it is 8000
SOURCES = 5  # shown
MOST_SAMPLE, MOST_NAME, MOST_PROMPT = 1500, 120, 100  # characters of a sample, of a source's name, of a prompt


def model_card(config: PipelineConfig, done: StageResults) -> str:
    """Return the card of the model that this config makes. done: the results of the stages that are done."""
    parts = [_head(config, done)]
    if "evaluate" in done:
        sample = printable(done["evaluate"]["samples"][0])[:MOST_SAMPLE]
        temperature = config.evaluate.temperatures[0]
        parts.append(f"**Sample** at temperature {temperature:g}\n\n{fenced(sample)}")
    if "promote" in done:
        model, version = done["promote"]["model"], done["promote"]["version"]
        parts.append(
            f"**Call it** while the endpoint serves version {version}, or `{model}` for the version that it serves\n\n"
            + fenced(curl(config, f"{model}:{version}"), "sh")
        )
        uri, prompt = f"models:/{model}/{version}", _call_prompt(config)
        parts.append(
            "**Without the endpoint**, where `MLFLOW_TRACKING_URI` names this server\n\n"
            + fenced(f"import mlflow\nmlflow.pyfunc.load_model({uri!r}).predict([{prompt!r}])", "python")
        )
    return "\n\n".join(parts)


def curl(config: PipelineConfig, model: str) -> str:
    """Return the command that requests a text from the endpoint."""
    request = {"model": model, "prompt": _call_prompt(config), "max_tokens": 100}
    key = f' -H "Authorization: Bearer ${KEY_VARIABLE}"' if config.serve.keys else ""
    address = url_of(config.serve.host, config.serve.port)
    body = shlex.quote(json.dumps(request, ensure_ascii=False))
    return f"curl {address}/v1/completions -H 'Content-Type: application/json'{key} -d {body}"


def fenced(text: str, language: str = "text") -> str:
    """Return a Markdown code block that shows the text as it is, whatever it contains."""
    fence = min((_longer(mark, text, 3) for mark in "`~"), key=len)
    return f"{fence}{language}\n{text}\n{fence}"


def code(text: str) -> str:
    """Return Markdown that shows a text, at most its first MOST_NAME characters, as code within a line."""
    line = one_line(text, MOST_NAME)
    fence = _longer("`", line, 1)
    return f"{fence} {line} {fence}" if "`" in line else f"`{line}`"


def _longer(mark: str, text: str, least: int) -> str:
    """Return more of a mark than follow each other anywhere in the text, at least `least`."""
    return mark * max([least, *(len(run) + 1 for run in re.findall(f"{mark}+", text))])


def _head(config: PipelineConfig, done: StageResults) -> str:
    model = config.model
    lines = []
    if "evaluate" in done:
        scores = done["evaluate"]
        lines.append(
            f"**{scores['bits_per_byte']:.3f} bits per byte** on held-out text, "
            f"{scores['nats_per_character']:.3f} nats per character; "
            f"an n-gram model has {scores['ngram_bits_per_byte']:.3f} bits per byte"
        )
    shape = f"{model.cell}, {model.layers} x {model.hidden}, embedding {model.embedding}"
    if "prepare" in done:
        shape += f", vocabulary {done['prepare']['vocabulary']:,}"
    lines.append(f"**Model** {shape}")
    if "train" in done:
        trained = done["train"]
        lines.append(
            f"**Training** {counted(trained['steps'], 'step')} of {config.train.batch_size} x "
            f"{config.train.sequence_length} tokens, held-out {trained['heldout_loss']:.3f} nats per token"
        )
    names = config.corpus.paths
    sources = ", ".join(map(code, names[:SOURCES]))
    more = f" and {len(names) - SOURCES} more" if len(names) > SOURCES else ""
    size = ""
    if "prepare" in done:
        counts = done["prepare"]
        documents, tokens = counted(counts["documents"], "document"), counted(counts["tokens"], "token")
        size = f"{documents}, {counts['bytes'] / 1e6:,.1f} MB, {tokens} from "
    lines.append(f"**Dataset** {size}{sources}{more}")
    return "  \n".join(lines)  # two spaces: a line break


def _call_prompt(config: PipelineConfig) -> str:
    return config.evaluate.prompt[:MOST_PROMPT]
