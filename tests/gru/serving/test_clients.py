"""Other people's clients, with their defaults, against a real server. OpenAI's own is in the other tests."""

import json
import os
import subprocess
import sys
from pathlib import Path

import openai
import pytest
import torch

from tests.gru.serving.server import Server

NEWLINE = 10


def llm(home: Path, *arguments: str) -> str:
    """Run the program `llm`, with its files in `home`, at temperature 0. Return the text that it prints."""
    environment = {**os.environ, "LLM_USER_PATH": str(home)}
    command = [sys.executable, "-m", "llm", *arguments, "-o", "temperature", "0"]
    done = subprocess.run(
        command, env=environment, capture_output=True, stdin=subprocess.DEVNULL, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.removesuffix("\n")


@pytest.mark.slow
@pytest.mark.parametrize("api", ["chat", "responses"])
def test_llm(server: Server, client: openai.OpenAI, tmp_path: Path, api: str) -> None:
    """https://llm.datasette.io/en/stable/other-models.html#openai-compatible-models"""
    model = {"model_id": "mine", "model_name": "poet", "api_base": f"{server.url}/v1", "responses": api == "responses"}
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([model]))  # JSON is YAML
    bias = server.bundle.model.output_bias
    with torch.no_grad():
        bias[NEWLINE] -= 100  # so that the answers do not end at once
    try:
        first = llm(tmp_path, "-m", "mine", "Once")
        second = llm(tmp_path, "--continue", "Again", "--no-stream")
        messages = [("user", "Once"), ("assistant", first), ("user", "Again")]
        prompt = "".join(f"{role}: {content}\n" for role, content in messages) + "assistant: "
        expected = client.completions.create(model="poet", prompt=prompt, max_tokens=256, temperature=0)
    finally:
        with torch.no_grad():
            bias[NEWLINE] += 100
    assert len(first) == 256 and second == expected.choices[0].text
