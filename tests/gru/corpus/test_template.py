import json
from pathlib import Path

import pytest

from gru.errors import UserError
from tests.gru.corpus.reading import read, write


def test_template_fills_fields_and_counts_what_is_dropped(tmp_path: Path) -> None:
    records = [
        {"title": "t", "lines": ["a", "b"], "n": 3},
        {"title": "t", "n": 1},
        {"title": None, "lines": [], "n": 1},
        {"title": "{n}", "lines": [], "n": 0.5},
    ]
    path = write(tmp_path / "a.ndjson", "\n\n".join(map(json.dumps, records)).encode())
    found, report = read(path, template="{{{title}}}\n{n}: {lines}")
    assert found == ["{t}\n3: a\nb", "{{n}}\n0.5: "]
    assert report.dropped == {"missing_field": 2}
    for template in ["no field", "{", "{a:>3}", "{a!r}"]:
        with pytest.raises(UserError, match=r"corpus\.template"):
            read(path, template=template)
