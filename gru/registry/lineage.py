"""The lineage record of a bundle: which run, checkpoint, dataset, tokenizer and sources its weights come from.

It is stored in the bundle as lineage.json; `gru.registry.lineage_trace` follows its links.
"""

from pydantic import BaseModel, ConfigDict


class Lineage(BaseModel):
    """The origin of a bundle's weights, as lineage.json has it."""

    model_config = ConfigDict(frozen=True)

    run: str
    """Id of the MLflow run that trained the weights."""
    checkpoint_step: int
    """Training step of the weights."""
    checkpoint: str | None = None
    """Path of the checkpoint directory whose average the weights are. None for a model of a comparison, which has no
    checkpoint, and in older bundles, which do not record it."""
    initial: str | None = None
    """Model that training started from: NAME:VERSION, or the path of a bundle or checkpoint. None: random weights."""
    initial_digest: str | None = None
    dataset: str
    """Path of the dataset directory."""
    dataset_digest: str
    tokenizer_digest: str
    heldout_by: str | None = None
    """How the held-out text was chosen: `hash`, `tail` or `lowest_hash`. None in older bundles."""
    heldout_share: float | None = None
    """`corpus.heldout_share` of the dataset. None in older bundles."""
    sources: list[str]
    """Sources of the corpus, as the configuration names them."""
    versions: dict[str, str]
    """Versions of the libraries that trained the weights, by name."""
