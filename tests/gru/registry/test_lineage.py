import pytest
from pydantic import ValidationError

from gru.registry.lineage import Lineage
from tests.gru.registry.bundles import LINEAGE


def test_a_lineage_without_the_checkpoint_is_read() -> None:
    fields = LINEAGE.model_dump()
    del fields["checkpoint"]
    assert Lineage.model_validate(fields) == LINEAGE
    assert LINEAGE.checkpoint is None


def test_a_lineage_without_its_dataset_is_refused() -> None:
    fields = LINEAGE.model_dump()
    del fields["dataset"]
    with pytest.raises(ValidationError, match="dataset"):
        Lineage.model_validate(fields)
