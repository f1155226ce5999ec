"""Corpus preparation compared with datasets and datatrove: all measured in one run on this machine, as ratios.

python -m tests.benchmarks.prepare [--poems poems.jsonl.zst] [--megabytes 600] [--gigabytes 1 10] [--only ...]

The other libraries process a part of the corpus, because all of it would take minutes; rates are per byte of text.
Each side has two processes and a trained tokenizer, and writes Parquet (datatrove: its own format) to the same disk.
"""

import argparse
import json
import os
import subprocess
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from gru.config import CorpusConfig, TokenizerConfig
from gru.corpus import tokenizer
from gru.corpus.batches import LaneOrder, LaneReader
from gru.corpus.documents import documents
from gru.corpus.listing import list_files
from gru.corpus.partitions import plan
from gru.corpus.prepare import prepare
from gru.corpus.report import Report
from jobs import entry
from tests.benchmarks.encoding import show

TEMPLATE = "{title}\n{author}\n{text}"
OTHERS_BYTES = 16_000_000
SAMPLE_BYTES = 50_000_000
PARTS = ["rates", "training", "lanes", "memory"]


def source_tree(folder: Path, megabytes: int) -> CorpusConfig:
    """Write copies of this interpreter's Python source code to a folder, each file with a unique first line."""
    roots = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")]
    files = [path for root in roots for path in sorted(root.rglob("*.py")) if path.stat().st_size < 1 << 20]
    remaining, copy = megabytes * 1_000_000, 0
    while remaining > 0:
        target = folder / f"copy{copy}"
        for number, path in enumerate(files):
            try:
                data = f"# {copy} {number}\n".encode() + path.read_text().encode()
            except UnicodeDecodeError:
                continue
            file = target / f"{number // 500}" / f"{number}.py"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
            remaining -= len(data)
            if remaining <= 0:
                break
        copy += 1
    return CorpusConfig(sources=[str(folder)], include=["*.py"])


def texts_of(corpus: CorpusConfig, size: float = float("inf")) -> Iterator[str]:
    """Yield the first documents of a corpus, until they have `size` bytes."""
    for partition in plan(list_files(corpus).files, corpus):
        for span in partition:
            for text in documents(span, corpus, Report()):
                yield text
                size -= len(text.encode())
                if size <= 0:
                    return


def seconds_of(work: Callable[[], object]) -> float:
    """Return how long a call takes, in seconds."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def rates(name: str, corpus: CorpusConfig, folder: Path) -> None:
    """Compare the rate of preparing a corpus with that of the tokenizer alone and of other libraries."""
    texts = list(texts_of(corpus))
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    trained = tokenizer.train_tokenizer(TokenizerConfig(vocab_size=8192), texts_of(corpus, SAMPLE_BYTES))
    path = folder / "tokenizer.json"
    path.write_bytes(trained.json)
    config = TokenizerConfig(path=str(path))
    trained.encode("")  # loads the tokenizer
    alone = megabytes / seconds_of(lambda: trained.encode_batch(texts, parallel=True))
    target = folder / "ours"
    ours = megabytes / seconds_of(lambda: prepare(corpus, config, str(target), lambda _: None))
    show(f"{name}: {megabytes:,.0f} MB to shards", "ours MB/s", ours, "gigatoken alone in memory", alone, 2)

    sample: list[str] = []
    size = 0
    while size < OTHERS_BYTES and len(sample) < len(texts):
        sample.append(texts[len(sample) * 7919 % len(texts)])
        size += len(sample[-1].encode())
    lines = folder / "sample"
    lines.mkdir()
    for half in range(2):
        with (lines / f"{half}.jsonl").open("w") as file:
            file.writelines(json.dumps({"text": text, "id": str(i)}) + "\n" for i, text in enumerate(sample[half::2]))
    show("", "ours", ours, "datasets.map", size / 1e6 / seconds_of(lambda: with_datasets(lines, path, folder)))
    show("", "ours", ours, "datatrove", size / 1e6 / seconds_of(lambda: with_datatrove(lines, path, folder)))


def with_datasets(lines: Path, tokenizer_file: Path, folder: Path) -> None:
    """Tokenize with datasets.map, in a separate process: it forks, and this process has threads of Ray."""
    script = """
import sys, datasets, tokenizers
datasets.disable_progress_bars()
lines, tokenizer_file, folder = sys.argv[1:]
tokenizer = tokenizers.Tokenizer.from_file(tokenizer_file)
rows = datasets.load_dataset("json", data_dir=lines, split="train", cache_dir=folder + "/cache")
def encode(batch):
    return {"tokens": [encoding.ids for encoding in tokenizer.encode_batch_fast(batch["text"])]}
rows.map(encode, batched=True, num_proc=2, remove_columns=rows.column_names).to_parquet(folder + "/datasets.parquet")
"""
    run(script, lines, tokenizer_file, folder)


def with_datatrove(lines: Path, tokenizer_file: Path, folder: Path) -> None:
    """Tokenize with datatrove, in separate processes."""
    script = """
import sys
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.tokens import DocumentTokenizer
if __name__ == "__main__":
    lines, tokenizer_file, folder = sys.argv[1:]
    write = DocumentTokenizer(folder + "/trove", tokenizer_name_or_path=tokenizer_file, shuffle_documents=False)
    LocalPipelineExecutor([JsonlReader(lines), write], tasks=2, workers=2, logging_dir=folder + "/logs").run()
"""
    file = folder / "with_datatrove.py"
    file.write_text(script)
    run(None, lines, tokenizer_file, folder, file=file)


def run(script: str | None, *arguments: Path, file: Path | None = None) -> None:
    """Run a Python script, from a string or a file. Exit with its error output if it fails."""
    program = ["-c", script] if script else [str(file)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, *program, *map(str, arguments)]
    process = subprocess.run(command, capture_output=True, text=True, env=environment)
    if process.returncode:
        sys.exit(f"{' '.join(command[:3])}\n{process.stderr}")


def tokenizer_training(name: str, corpus: CorpusConfig) -> None:
    """Measure how long the training of a tokenizer takes."""
    texts = list(texts_of(corpus, SAMPLE_BYTES))
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    seconds = seconds_of(lambda: tokenizer.train_tokenizer(TokenizerConfig(vocab_size=8192), texts))
    print(f"{name}: BPE of 8,192 on {megabytes:.0f} MB: {seconds:.1f} s", flush=True)


def batches(corpus: CorpusConfig, folder: Path) -> None:
    """Measure the rate at which batches are read from a dataset."""
    dataset = prepare(corpus, TokenizerConfig(kind="byte"), str(folder / "lanes"), lambda _: None)
    segments = dataset.segments("train")
    order = LaneOrder([segment.tokens for segment in segments], seed=0, lanes=32, sequence_length=64)
    steps = min(order.epoch(0).steps, 20_000)
    with LaneReader(
        order, lambda i: dataset.read_segment(segments[i]), dataset.manifest.end_of_text, range(32)
    ) as reader:
        cpu = time.process_time()
        seconds = seconds_of(lambda: [reader.batch(step) for step in range(steps)])
        cpu = time.process_time() - cpu
    tokens = steps * 32 * 64 / 1e6
    print(
        f"batches: 32 x 64 of {dataset.manifest.counts.tokens / 1e6:,.0f} M tokens: {tokens / seconds:.1f} M tokens/s, "
        f"{tokens / cpu:.1f} M tokens per second of one core",
        flush=True,
    )


def memory(gigabytes: list[float], folder: Path) -> None:
    """Measure the memory of the largest processes while corpora of these sizes are prepared from the command line."""
    texts = "".join(texts_of(CorpusConfig(sources=["python-stdlib"])))
    for size in gigabytes:
        corpus = folder / f"{size}.jsonl"
        with corpus.open("w") as file:
            remaining, number = size * 1e9, 0
            while remaining > 0:
                start = number * 7919 % (len(texts) - 4000)
                remaining -= file.write(json.dumps({"text": f"{number} {texts[start : start + 4000]}"}) + "\n")
                number += 1
        config = {
            "storage": str(folder / "store"),
            "corpus": {"sources": [str(corpus)]},
            "tokenizer": {"sample_bytes": 5_000_000},
        }
        process = subprocess.Popen(
            [sys.executable, "-m", "jobs.prepare", json.dumps(config)],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        peaks: dict[str, int] = {}
        watcher = threading.Thread(target=record_peaks, args=(process.pid, peaks))
        watcher.start()
        out, _ = process.communicate()
        watcher.join()
        seconds = json.loads(out.splitlines()[-1])["seconds"]
        largest = ", ".join(f"{name} {peak / 1e9:.2f}" for name, peak in sorted(peaks.items(), key=lambda p: -p[1])[:3])
        print(f"memory: {size:g} GB in {seconds:.0f} s; largest processes, GB: {largest}", flush=True)
        corpus.unlink()


def record_peaks(pid: int, peaks: dict[str, int]) -> None:
    """Record the peak memory in bytes of a process and its children, by process name, until the process ends."""
    try:
        parent = psutil.Process(pid)
        while parent.is_running() and parent.status() != psutil.STATUS_ZOMBIE:
            for process in [parent, *parent.children(recursive=True)]:
                try:
                    info = process.memory_info()
                    name = process.name().split(":")[0]
                    peaks[name] = max(peaks.get(name, 0), info.rss - info.shared)
                except psutil.Error:
                    pass
            time.sleep(0.2)
    except psutil.Error:
        pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--poems", type=Path, help="JSON Lines file with title, author and text: the second corpus")
    parser.add_argument("--megabytes", type=int, default=600, help="size of the source code corpus")
    parser.add_argument(
        "--gigabytes", type=float, nargs="*", default=[1, 10], help="sizes of the corpora to measure memory with"
    )
    parser.add_argument("--only", choices=PARTS, nargs="*", default=PARTS, help="parts to run")
    arguments = parser.parse_args()
    entry.prepare_libraries()
    import ray

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpora = {}
        if arguments.only != ["memory"]:
            corpora["source code"] = source_tree(folder / "tree", arguments.megabytes)
        if arguments.poems:
            corpora["poems"] = CorpusConfig(sources=[str(arguments.poems.absolute())], template=TEMPLATE)
        else:
            print("skipping the second corpus: --poems is not given")
        if "rates" in arguments.only or "lanes" in arguments.only:
            ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
            for title, corpus in corpora.items():
                if "rates" in arguments.only:
                    (folder / title).mkdir()
                    rates(title, corpus, folder / title)
            if "lanes" in arguments.only:
                batches(corpora["source code"], folder)
            ray.shutdown()
        if "training" in arguments.only:
            for title, corpus in corpora.items():
                tokenizer_training(title, corpus)
        if "memory" in arguments.only:
            memory(arguments.gigabytes, folder)


if __name__ == "__main__":
    main()
