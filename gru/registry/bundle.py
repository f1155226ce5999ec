"""The model bundle: a directory with all that generation needs.

Its files are weights.safetensors, config.json, tokenizer.json, lineage.json, and digests.json, which is written last.
"""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from gru import storage
from gru.config import ModelConfig
from gru.corpus.tokenizer import Tokenizer
from gru.digests import DIGESTS, digest_of, read_verified, write_digests
from gru.model.language_model import GRULanguageModel, with_current_names
from gru.registry.lineage import Lineage


@dataclass(frozen=True)
class Bundle:
    """A loaded bundle: a model with all that generation needs."""

    model: GRULanguageModel
    tokenizer: Tokenizer
    lineage: Lineage
    digest: str
    """SHA-256 over the digests of all files."""

    def save(self, path: str | Path) -> None:
        """Write the bundle to a directory or URL, from where `load_bundle` reads it."""
        write_bundle(str(path), self.model.config, self.model.state_dict(), self.tokenizer, self.lineage)


def write_bundle(
    path: str,
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    tokenizer: Tokenizer,
    lineage: Lineage,
) -> None:
    """Write a bundle to storage; digests.json, which completes it, comes last."""
    model = {"model": config.model_dump(), "vocab_size": tokenizer.vocab_size}
    with tempfile.TemporaryDirectory(prefix="gru-bundle-") as temporary:
        directory = Path(temporary)
        (directory / "weights.safetensors").write_bytes(save_tensors(dict(weights)))
        (directory / "config.json").write_text(json.dumps(model, indent=1))
        (directory / "tokenizer.json").write_bytes(tokenizer.json)
        (directory / "lineage.json").write_text(json.dumps(lineage.model_dump(), indent=1, ensure_ascii=False))
        write_digests(directory)
        storage.upload(directory, path, last=DIGESTS)


def load_bundle(path: str | Path) -> Bundle:
    """Read a bundle and check every file against its digest. Raises DamagedFiles."""
    files = read_verified(str(path))
    config = json.loads(files["config.json"])
    model = GRULanguageModel(ModelConfig(**config["model"]), config["vocab_size"])
    model.load_state_dict(with_current_names(load_tensors(files["weights.safetensors"])))
    return Bundle(
        model.eval().requires_grad_(False),
        Tokenizer(files["tokenizer.json"]),
        Lineage.model_validate_json(files["lineage.json"]),
        digest_of(files),
    )
