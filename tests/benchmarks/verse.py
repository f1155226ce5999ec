"""How often a model of verse keeps the form: the share of couplets whose second line is as long as the first, which has
five or seven characters. The first lines are from held-out poems, whose own share is printed beside it.

python -m tests.benchmarks.verse DATASET BUNDLE [--openings N] [--temperature T]

DATASET is the dataset directory of pipelines/configs/poetry.toml, which the result of `jobs.prepare` names. BUNDLE is
a bundle that the result of `jobs.train` names, or one that `jobs.compare` stored.
"""

import argparse
from collections.abc import Iterator
from itertools import islice

from gru.corpus.dataset import open_dataset
from gru.generation.generate import generate_ids
from gru.generation.sampling import SamplingParams
from gru.registry.bundle import load_bundle

COMMA, STOP = "，", "。"
LENGTHS = (5, 7)
MAX_TOKENS = 24  # to generate; a line that is longer does not keep its length


def openings(poems: Iterator[str], length: int) -> Iterator[tuple[str, str, str]]:
    """Yield (title and author, first line, rest) of the poems whose first line has `length` characters."""
    for poem in poems:
        title, author, text = poem.split("\n", 2)
        line, comma, rest = text.partition(COMMA)
        if comma and len(line) == length and STOP not in line:
            yield f"{title}\n{author}\n", line, rest


def keeps_length(rest: str, length: int) -> bool:
    """Return whether the text after the first comma begins with a line of `length` characters and a full stop."""
    return rest.find(STOP) == length and COMMA not in rest[:length]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", metavar="DATASET", help="directory of the dataset")
    parser.add_argument("bundle", metavar="BUNDLE", help="directory of the bundle")
    parser.add_argument("--openings", type=int, default=200, help="number of openings of each length (default 200)")
    parser.add_argument("--temperature", type=float, default=1.0, help="sampling temperature (default 1)")
    arguments = parser.parse_args()
    dataset, bundle = open_dataset(arguments.dataset), load_bundle(arguments.bundle)
    for length in LENGTHS:
        poems = list(islice(openings(dataset.texts("heldout"), length), arguments.openings))
        count = 0
        for seed, (head, line, _) in enumerate(poems):
            params = [SamplingParams(temperature=arguments.temperature, seed=seed)]
            [ids] = generate_ids(bundle.model, bundle.tokenizer, f"{head}{line}{COMMA}", MAX_TOKENS, params)
            count += keeps_length(bundle.tokenizer.decode(ids), length)
        poems_count = sum(keeps_length(rest, length) for _, _, rest in poems)
        print(
            f"couplets of {length} characters a line, {len(poems)} openings, temperature {arguments.temperature:g}: "
            f"{count / len(poems):.1%} keep the length, {poems_count / len(poems):.1%} of the poems themselves do",
            flush=True,
        )


if __name__ == "__main__":
    main()
