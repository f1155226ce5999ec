"""Does a model of verse keep the form? Of couplets after an opening line of five or seven characters, the share whose
second line is as long, next to the same share of the poems that the openings are from.

python -m tests.benchmarks.verse DATASET BUNDLE [--openings N] [--temperature T]

DATASET is the directory that `jobs.prepare` names in its result, of pipelines/configs/poetry.toml; BUNDLE the one that
`jobs.train` names, or one of those that `jobs.compare` keeps.
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
LONGEST = 24  # tokens to write: a line that is not over by then keeps no length


def openings(poems: Iterator[str], length: int) -> Iterator[tuple[str, str, str]]:
    """(what stands before the verse, first line, rest) of held-out poems whose first line is that long."""
    for poem in poems:
        title, author, text = poem.split("\n", 2)
        line, comma, rest = text.partition(COMMA)
        if comma and len(line) == length and STOP not in line:
            yield f"{title}\n{author}\n", line, rest


def keeps(rest: str, length: int) -> bool:
    """Whether what follows the first comma begins with a line of that length and a full stop."""
    return rest.find(STOP) == length and COMMA not in rest[:length]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset")
    parser.add_argument("bundle")
    parser.add_argument("--openings", type=int, default=200, help="of each length")
    parser.add_argument("--temperature", type=float, default=1.0)
    arguments = parser.parse_args()
    dataset, bundle = open_dataset(arguments.dataset), load_bundle(arguments.bundle)
    for length in LENGTHS:
        poems = list(islice(openings(dataset.texts("heldout"), length), arguments.openings))
        kept = 0
        for seed, (head, line, _) in enumerate(poems):
            params = [SamplingParams(temperature=arguments.temperature, seed=seed)]
            [ids] = generate_ids(bundle.model, bundle.tokenizer, f"{head}{line}{COMMA}", LONGEST, params)
            kept += keeps(bundle.tokenizer.decode(ids), length)
        theirs = sum(keeps(rest, length) for _, _, rest in poems)
        print(
            f"couplets of {length} characters a line, {len(poems)} openings, temperature {arguments.temperature:g}: "
            f"{kept / len(poems):.1%} keep their length, {theirs / len(poems):.1%} of the poems themselves",
            flush=True,
        )


if __name__ == "__main__":
    main()
