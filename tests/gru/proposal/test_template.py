from typing import Any

import pytest

from gru.proposal.template import choose_template, flatten

TEXT = "A crow met a fox under the oak."


def record(**fields: Any) -> dict[str, Any]:
    return fields


CHAT = [{"role": "user", "content": "Good day"}, {"role": "assistant", "content": "Good day to you"}]
SHAREGPT = [{"from": "human", "value": "Good day"}, {"from": "gpt", "value": "Good day to you"}]


@pytest.mark.parametrize(
    ("records", "template"),
    [
        ([record(text=TEXT)], "{text}"),
        ([record(id=7, url="https://example.com/" + "a" * 300, text=TEXT)], "{text}"),
        ([record(id="a" * 90, body=TEXT, title="The crow")], "{title}\n{body}"),
        ([record(text=TEXT, title="The crow", author="Aesop", dynasty="none")], "{title}\n{author}\n{text}"),
        ([record(paragraphs=["白日依山盡", "黃河入海流"], title="登鸛雀樓")], "{title}\n{paragraphs}"),
        ([record(text=TEXT, title="Crow"), record(text=TEXT, title=None)], "{title|}\n{text}"),
        ([record(text=TEXT), record(content=TEXT)], "{text|content|}"),
        ([record(text=TEXT)] * 400 + [record(content=TEXT)], "{text}"),
        ([record(note=TEXT, verdict="good day")], "{note}"),
        ([record(label="a b", text="to be", review=TEXT * 9)], "{review}"),
        ([record(messages=CHAT, source="somewhere on the web")], "{messages}"),
        ([record(conversations=SHAREGPT)], "{conversations}"),
        ([record(messages=CHAT), record(conversations=SHAREGPT)], "{messages|conversations|}"),
        ([record(messages=CHAT), record(text=TEXT)], "{messages|text|}"),
        ([record(user="ann", text="good day to you")], "{user}: {text}"),
        ([record(question="Who met a fox?", answer="A crow")], "{question}\n{answer}"),
        ([record(instruction="Say it", input="", output=TEXT), record(instruction="a", input="b", output=TEXT)],
         "{instruction}\n{input|}\n{output}"),
        ([record(meta={"title": "Crow"}, data={"body": TEXT})], "{data.body}"),
        ([record(page={"title": "Crow", "body": TEXT})], "{page.title}\n{page.body}"),
        ([record(name="A talk", messages=[{"id": 1, "text": TEXT}, {"text": TEXT}])], "{name}\n{messages.text}"),
    ],
)  # fmt: skip
def test_the_template_has_the_fields_with_the_text(records: list[Any], template: str) -> None:
    choice = choose_template(records)
    assert choice
    assert choice.template == template


@pytest.mark.parametrize(
    "records", [[], [record(id=1)], [record(url="https://example.com", day="2026-11-30")], ["a b"]]
)
def test_records_without_text_have_no_template(records: list[Any]) -> None:
    assert choose_template(records) is None


def test_a_name_that_cannot_stand_in_a_template_is_not_used() -> None:
    assert flatten({"a|b": TEXT, "{c}": TEXT, "1": TEXT, "": TEXT, "d ": TEXT, "e": TEXT}) == ({"e": TEXT}, set())
