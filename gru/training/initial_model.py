"""The model that a training run starts from: the averaged weights and the tokenizer of a registered model, a bundle or
a checkpoint.

It is copied to `<storage>/initial/<digest>`, because an alias moves, and a path may get other content, while the run
lasts.
"""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load as load_tensors
from torch import Tensor

from gru import storage
from gru.config import ModelConfig, TokenizerConfig, is_model_reference
from gru.config_corpus import Normalization
from gru.corpus import tokenizer as tokenizers
from gru.corpus.tokenizer import Tokenizer
from gru.digests import DIGESTS, DamagedFiles, digest_of, read_verified
from gru.errors import UserError, first_line
from gru.model.language_model import with_current_names
from gru.registry import versions
from gru.registry.lineage import Lineage
from gru.training import checkpoint as checkpoints

INITIAL = "initial"  # directory in a storage
SHAPE = ("cell", "layers", "hidden", "embedding")
"""The keys of [model] that decide which weights there are, and their shapes."""
WEIGHTS, MODEL, TOKENIZER, LINEAGE = "weights.safetensors", "config.json", "tokenizer.json", "lineage.json"


@dataclass(frozen=True)
class InitialModel:
    """A model in a storage that training can start from."""

    name: str
    """NAME:VERSION, or the path or URL that it was copied from."""
    digest: str
    """That of the bundle; of a checkpoint, that of the bundle without lineage that it would make."""
    store: str

    def __str__(self) -> str:
        return f"{self.name} ({self.digest[:16]})"

    @property
    def directory(self) -> str:
        return storage.join(self.store, INITIAL, self.digest[:16])

    @property
    def tokenizer_path(self) -> str:
        return storage.join(self.directory, TOKENIZER)

    def is_stored(self) -> bool:
        return storage.exists(storage.join(self.directory, DIGESTS))

    def lineage(self) -> Lineage | None:
        """Return the origin of its weights; None if it was a checkpoint, which does not record it."""
        path = storage.join(self.directory, LINEAGE)
        return Lineage.model_validate(storage.read_json(path)) if storage.exists(path) else None

    def require_fit(self, model: ModelConfig, tokenizer: TokenizerConfig, normalization: Normalization) -> None:
        """Raise UserError naming the key if this model has another shape, or a tokenizer that [tokenizer] excludes."""
        own = ModelConfig(**storage.read_json(storage.join(self.directory, MODEL))["model"])
        for key in SHAPE:
            expected, actual = getattr(model, key), getattr(own, key)
            if actual != expected:
                raise UserError(
                    f"model.{key} = {_shown(expected)}: {self.name} (train.init_from) has {_shown(actual)}: set it to "
                    "that, or leave out train.init_from"
                )
        if difference := _difference(tokenizer, tokenizers.read(self.tokenizer_path), normalization):
            raise UserError(f"{difference} {self.name} (train.init_from): change it, or leave out train.init_from")


def _shown(value: Any) -> str:
    return json.dumps(value)


def _difference(config: TokenizerConfig, tokenizer: Tokenizer, normalization: Normalization) -> str | None:
    """Return in words how [tokenizer] excludes a tokenizer; None if it does not. Keys with their defaults allow any."""
    if config.path:
        same = tokenizers.load(config.path, normalization).digest == tokenizer.digest
        return None if same else f"tokenizer.path = {_shown(config.path)} is another tokenizer than that of"
    default = TokenizerConfig()
    kinds = {"table": ("byte",) if tokenizer.vocab_size == 257 else ("char",), "words": ("word",)}
    [kind] = kinds.get(tokenizer.backend, ("bpe",))
    if config.kind not in (default.kind, kind):
        return f"tokenizer.kind = {_shown(config.kind)} is not {_shown(kind)}, the kind of"
    if config.vocab_size != default.vocab_size and tokenizer.vocab_size > config.vocab_size:
        return f"tokenizer.vocab_size = {config.vocab_size} is less than {tokenizer.vocab_size}, the vocabulary of"
    return None


def fetch(reference: str, store: str, own_name: str) -> InitialModel | None:
    """Copy the model that `train.init_from` names to the storage, unless it is there, and return it.

    own_name: the model of `@ALIAS`. None if the reference is `@champion`, and there is no champion yet. Raises
    UserError if there is no such model, version, bundle or checkpoint, or it is damaged.
    """
    if reference == f"@{versions.CHAMPION}" and versions.resolve(own_name, versions.CHAMPION) is None:
        return None
    from mlflow.exceptions import MlflowException

    try:
        if is_model_reference(reference):
            return _fetch_version(own_name + reference if reference.startswith("@") else reference, store)
        return _stored(reference, _read(reference), store)
    # ImportError, ValueError: fsspec cannot open such a URL.
    except (DamagedFiles, MlflowException, OSError, ImportError, ValueError) as error:
        raise UserError(f"train.init_from = {_shown(reference)}: {first_line(error)}") from None


def _fetch_version(spec: str, store: str) -> InitialModel:
    version = versions.find(spec)
    name = f"{version.name}:{version.version}"
    if version.bundle and (known := InitialModel(name, version.bundle, store)).is_stored():
        return known
    with tempfile.TemporaryDirectory(prefix="gru-initial-") as directory:
        model = _stored(name, read_verified(str(versions.download_bundle(version, Path(directory)))), store)
    if version.bundle not in ("", model.digest):
        raise UserError(f"damaged: its digest is {model.digest}, and its tag says {version.bundle}")
    return model


def _read(path: str) -> Mapping[str, bytes]:
    """Return the files of a bundle, or those that a checkpoint would have as a bundle."""
    if not storage.exists(storage.join(path, DIGESTS)):
        raise UserError(f"no bundle and no checkpoint: it has no {DIGESTS}; a registered model is NAME:VERSION")
    files = read_verified(path)
    if checkpoints.STATE not in files:
        if missing := {WEIGHTS, MODEL, TOKENIZER} - files.keys():
            raise UserError(f"no bundle and no checkpoint: it has no {min(missing)}")
        return files
    identity = json.loads(files[checkpoints.STATE])["identity"]
    tokenizer = tokenizers.read(storage.join(path.rstrip("/").rsplit("/", 1)[0], TOKENIZER))
    if tokenizer.digest != identity["tokenizer"]:
        raise UserError(f"{tokenizer.name} is not the tokenizer of this checkpoint")
    config = {"model": identity["model"], "vocab_size": tokenizer.vocab_size}
    return {WEIGHTS: files["ema.safetensors"], MODEL: json.dumps(config, indent=1).encode(), TOKENIZER: tokenizer.json}


def digest_at(path: str) -> str:
    """Return the digest of the bundle or checkpoint at a path, as an `InitialModel` has it.

    Raises UserError if there is none, and DamagedFiles.
    """
    return digest_of(_read(path))


def _stored(name: str, files: Mapping[str, bytes], store: str) -> InitialModel:
    """Write the files to the storage, digests.json last, which completes them."""
    model = InitialModel(name, digest_of(files), store)
    if not model.is_stored():
        for file, data in files.items():
            storage.write_bytes(storage.join(model.directory, file), data)
        digests = {file: storage.sha256(data) for file, data in files.items()}
        storage.write_json(storage.join(model.directory, DIGESTS), digests)
    return model


def load_weights(directory: str) -> dict[str, Tensor]:
    """Return the weights of a model in a storage, by name. Raises DamagedFiles."""
    return with_current_names(load_tensors(read_verified(directory)[WEIGHTS]))
