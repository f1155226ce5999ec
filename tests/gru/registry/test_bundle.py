import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from gru.corpus.tokenizer import Tokenizer
from gru.digests import DIGESTS, DamagedFiles, write_digests
from gru.registry.bundle import load_bundle
from tests.gru.registry.bundles import LINEAGE, write


def test_a_bundle_is_read_as_it_was_written(tmp_path: Path, tokenizer: Tokenizer) -> None:
    path = write(tmp_path / "bundle", tokenizer, 1)
    bundle = load_bundle(path)
    assert bundle.tokenizer.json == tokenizer.json
    assert bundle.lineage == LINEAGE
    assert bundle.digest == load_bundle(path).digest
    assert bundle.digest != load_bundle(write(tmp_path / "other", tokenizer, 2)).digest


@pytest.mark.parametrize("name", ["weights.safetensors", "config.json", "tokenizer.json", "lineage.json"])
def test_a_damaged_bundle_is_refused(tmp_path: Path, tokenizer: Tokenizer, name: str) -> None:
    path = Path(write(tmp_path / "bundle", tokenizer, 1))
    data = bytearray((path / name).read_bytes())
    data[len(data) // 2] ^= 1
    (path / name).write_bytes(data)
    with pytest.raises(DamagedFiles, match=name):
        load_bundle(path)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", ".."])
def test_a_bundle_that_names_files_outside_of_it_is_refused(tmp_path: Path, tokenizer: Tokenizer, name: str) -> None:
    path = Path(write(tmp_path / "bundle", tokenizer, 1))
    digests = json.loads((path / DIGESTS).read_text())
    (path / DIGESTS).write_text(json.dumps(digests | {name: "0" * 64}))
    with pytest.raises(DamagedFiles, match="expected names of files in this directory"):
        load_bundle(path)


def test_a_bundle_of_an_earlier_version_loads(tmp_path: Path, tokenizer: Tokenizer) -> None:
    """Its parameters have older names, and its lineage does not record the checkpoint's path."""
    path = Path(write(tmp_path / "bundle", tokenizer, 1))
    current = load_bundle(path)
    weights = load_file(path / "weights.safetensors")
    older = {name.replace(".cell.", ".gru.", 1): tensor for name, tensor in weights.items()}
    assert any(name.startswith("blocks.0.gru.") for name in older)
    assert not any(".cell." in name for name in older)
    save_file(older, path / "weights.safetensors")
    lineage = json.loads((path / "lineage.json").read_text())
    del lineage["checkpoint"]
    (path / "lineage.json").write_text(json.dumps(lineage))
    (path / DIGESTS).unlink()
    write_digests(path)
    bundle = load_bundle(path)
    assert bundle.lineage == LINEAGE
    tensors = bundle.model.state_dict()
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in current.model.state_dict().items())
