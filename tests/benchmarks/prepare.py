"""Corpus preparation against what people use today: both sides in one run, on this machine, as ratios.

python -m tests.benchmarks.prepare [--poems poems.jsonl.zst] [--megabytes 600] [--gigabytes 1 10] [--only ...]

The others work through a part of the corpus, since they would need minutes for all of it; rates are per byte of text.
All sides have two processes, a trained tokenizer, and write Parquet (datatrove: its own format) to the same disk.
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
from gru.corpus import sources, tokenizer
from gru.corpus.batches import LaneOrder, LaneReader
from gru.corpus.documents import documents
from gru.corpus.prepare import prepare
from gru.corpus.report import Report
from jobs import entry
from tests.benchmarks.encoding import show

TEMPLATE = "{title}\n{author}\n{text}"
OTHERS_BYTES = 16_000_000
SAMPLE_BYTES = 50_000_000
PARTS = ["rates", "training", "lanes", "memory"]


def source_tree(folder: Path, megabytes: int) -> CorpusConfig:
    """Copies of this interpreter's Python source code, each file with a first line of its own."""
    roots = [Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib")]
    files = [path for root in roots for path in sorted(root.rglob("*.py")) if path.stat().st_size < 1 << 20]
    left, copy = megabytes * 1_000_000, 0
    while left > 0:
        target = folder / f"copy{copy}"
        for number, path in enumerate(files):
            try:
                data = f"# {copy} {number}\n".encode() + path.read_text().encode()
            except UnicodeDecodeError:
                continue
            place = target / f"{number // 500}" / f"{number}.py"
            place.parent.mkdir(parents=True, exist_ok=True)
            place.write_bytes(data)
            left -= len(data)
            if left <= 0:
                break
        copy += 1
    return CorpusConfig(sources=[str(folder)], include=["*.py"])


def texts_of(corpus: CorpusConfig, size: float = float("inf")) -> Iterator[str]:
    for partition in sources.plan(sources.list_files(corpus), corpus):
        for span in partition:
            for text in documents(span, corpus, Report()):
                yield text
                size -= len(text.encode())
                if size <= 0:
                    return


def timed(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def rates(name: str, corpus: CorpusConfig, folder: Path) -> None:
    texts = list(texts_of(corpus))
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    made = tokenizer.train_tokenizer(TokenizerConfig(vocab_size=8192), texts_of(corpus, SAMPLE_BYTES))
    path = folder / "tokenizer.json"
    path.write_bytes(made.json)
    config = TokenizerConfig(path=str(path))
    made.encode("")  # loads
    alone = megabytes / timed(lambda: made.encode_batch(texts, parallel=True))
    target = folder / "ours"
    ours = megabytes / timed(lambda: prepare(corpus, config, str(target), lambda _: None))
    show(f"{name}: {megabytes:,.0f} MB to shards", "ours MB/s", ours, "gigatoken alone in memory", alone, 2)

    few: list[str] = []
    size = 0
    while size < OTHERS_BYTES and len(few) < len(texts):
        few.append(texts[len(few) * 7919 % len(texts)])
        size += len(few[-1].encode())
    lines = folder / "few"
    lines.mkdir()
    for half in range(2):
        with (lines / f"{half}.jsonl").open("w") as file:
            file.writelines(json.dumps({"text": text, "id": str(i)}) + "\n" for i, text in enumerate(few[half::2]))
    show("", "ours", ours, "datasets.map", size / 1e6 / timed(lambda: with_datasets(lines, path, folder)))
    show("", "ours", ours, "datatrove", size / 1e6 / timed(lambda: with_datatrove(lines, path, folder)))


def with_datasets(lines: Path, tokenizer_file: Path, folder: Path) -> None:
    """In a process of its own: it forks, which one with Ray's threads should not."""
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
    program = ["-c", script] if script else [str(file)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [sys.executable, *program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        sys.exit(f"{' '.join(command[:3])}\n{done.stderr}")


def training(name: str, corpus: CorpusConfig) -> None:
    texts = list(texts_of(corpus, SAMPLE_BYTES))
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    seconds = timed(lambda: tokenizer.train_tokenizer(TokenizerConfig(vocab_size=8192), texts))
    print(f"{name}: BPE of 8,192 on {megabytes:.0f} MB: {seconds:.1f} s", flush=True)


def lanes(corpus: CorpusConfig, folder: Path) -> None:
    dataset = prepare(corpus, TokenizerConfig(kind="byte"), str(folder / "lanes"), lambda _: None)
    segments = dataset.segments("train")
    order = LaneOrder([segment.tokens for segment in segments], seed=0, lanes=32, sequence_length=64)
    steps = min(order.steps_per_epoch, 20_000)
    with LaneReader(
        order, lambda i: dataset.read_segment(segments[i]), dataset.manifest.end_of_text, range(32)
    ) as reader:
        cpu = time.process_time()
        seconds = timed(lambda: [reader.batch(step) for step in range(steps)])
        cpu = time.process_time() - cpu
    tokens = steps * 32 * 64 / 1e6
    print(
        f"lanes: 32 x 64 of {dataset.manifest.counts.tokens / 1e6:,.0f} M tokens: {tokens / seconds:.1f} M tokens/s, "
        f"{tokens / cpu:.1f} M tokens a second of one core",
        flush=True,
    )


def memory(gigabytes: list[float], folder: Path) -> None:
    """The largest process while a corpus of each size is prepared from the command line."""
    texts = "".join(texts_of(CorpusConfig(sources=["python-stdlib"])))
    for size in gigabytes:
        corpus = folder / f"{size}.jsonl"
        with corpus.open("w") as file:
            left, number = size * 1e9, 0
            while left > 0:
                start = number * 7919 % (len(texts) - 4000)
                left -= file.write(json.dumps({"text": f"{number} {texts[start : start + 4000]}"}) + "\n")
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
        watcher = threading.Thread(target=watch, args=(process.pid, peaks))
        watcher.start()
        out, _ = process.communicate()
        watcher.join()
        seconds = json.loads(out.splitlines()[-1])["seconds"]
        largest = ", ".join(f"{name} {peak / 1e9:.2f}" for name, peak in sorted(peaks.items(), key=lambda p: -p[1])[:3])
        print(f"memory: {size:g} GB in {seconds:.0f} s; largest processes, GB: {largest}", flush=True)
        corpus.unlink()


def watch(pid: int, peaks: dict[str, int]) -> None:
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
    parser = argparse.ArgumentParser()
    parser.add_argument("--poems", type=Path, help="JSON Lines with title, author and text, for the second corpus")
    parser.add_argument("--megabytes", type=int, default=600, help="of source code")
    parser.add_argument("--gigabytes", type=float, nargs="*", default=[1, 10], help="corpora to measure memory with")
    parser.add_argument("--only", choices=PARTS, nargs="*", default=PARTS)
    arguments = parser.parse_args()
    entry.quiet_libraries()
    import ray

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpora = {}
        if arguments.only != ["memory"]:
            corpora["source code"] = source_tree(folder / "tree", arguments.megabytes)
        if arguments.poems:
            corpora["poems"] = CorpusConfig(sources=[str(arguments.poems.absolute())], template=TEMPLATE)
        else:
            print("without the second corpus: no --poems given")
        if "rates" in arguments.only or "lanes" in arguments.only:
            ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
            for title, corpus in corpora.items():
                if "rates" in arguments.only:
                    (folder / title).mkdir()
                    rates(title, corpus, folder / title)
            if "lanes" in arguments.only:
                lanes(corpora["source code"], folder)
            ray.shutdown()
        if "training" in arguments.only:
            for title, corpus in corpora.items():
                training(title, corpus)
        if "memory" in arguments.only:
            memory(arguments.gigabytes, folder)


if __name__ == "__main__":
    main()
