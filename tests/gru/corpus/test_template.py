import datetime
import json
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gru.corpus.field_text import field_text
from gru.corpus.template import column_names, parse_template
from gru.errors import UserError
from gru.serving.protocol import ChatRequest
from tests.gru.corpus.reading import examples, read, texts, write


def filled(tmp_path: Path, template: str, *records: Any) -> list[str]:
    """Return the documents of records, none of which may be left out."""
    return texts(write(tmp_path / "a.jsonl", "\n".join(map(json.dumps, records)).encode()), template=template)


def refusal(tmp_path: Path, template: str, record: Any) -> tuple[str, str]:
    """Return the reason and the message with which the only record is left out."""
    path = write(tmp_path / "a.jsonl", json.dumps(record).encode())
    found, report = read(path, template=template)
    assert not found and report.dropped.total() == 1
    assert report.dropped_bytes == {reason: Path(path).stat().st_size for reason in report.dropped}
    with pytest.raises(UserError) as error:
        read(path, template=template, on_bad="fail")
    (message,) = examples(report)
    assert str(error.value).endswith(message)
    return next(iter(report.dropped)), message.removeprefix("a.jsonl: the line at byte 0 ")


def test_template_fills_fields_and_counts_what_is_dropped(tmp_path: Path) -> None:
    records = [
        {"title": "t", "lines": ["a", "b"], "n": 3},
        {"title": "t", "n": 1},
        {"title": None, "lines": [], "n": 1},
        {"title": "{n}", "lines": [], "n": 0.5},
    ]
    path = write(tmp_path / "a.ndjson", "\n\n".join(map(json.dumps, records)).encode())
    found, report = read(path, template="{{{title}}}\n{n}: {lines}")
    assert found == ["{t}\n3: a\nb", "{}\n1: ", "{{n}}\n0.5: "]
    assert report.dropped == {"missing_field": 1}


@pytest.mark.parametrize(
    "template",
    ["no field", "{", "{a:>3}", "{a!r}", "{0}", "{a}{1}", "{}", "{ }", "{|a}", "{a||b}", "{|}", '{"text": "x"}'],
)
def test_a_template_without_names_of_fields_is_refused_in_one_line_with_its_key(template: str) -> None:
    with pytest.raises(UserError) as error:
        parse_template(template, "corpus.source.1.template")
    assert str(error.value).startswith(f"corpus.source.1.template = {template!r}: ")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("template", "record", "expected"),
    [
        ("{ text }", {"text": "a"}, "a"),
        ("{meta.title}", {"meta": {"title": "a"}}, "a"),
        ("{meta.title}", {"meta": {"title": "a"}, "meta.title": "b"}, "b"),
        ("{a.b.c}", {"a.b": {"c": "x"}}, "x"),
        ("{a.b.c}", {"a": {"b.c": "x"}}, "x"),
        ("{answers.text}", {"answers": [{"text": "a"}, {"text": "b"}, {}]}, "a\nb"),
        ("{title|rhythmic|}", {"title": "t", "rhythmic": "r"}, "t"),
        ("{title|rhythmic|}{x}", {"rhythmic": "r", "x": "x"}, "rx"),
        ("{title|rhythmic|}{x}", {"title": "", "rhythmic": None, "x": "x"}, "x"),
        ("{author|Anonymous}: {x}", {"x": "x"}, "Anonymous: x"),
        ("{author|Anonymous}: {x}", {"x": "x", "author": None}, "Anonymous: x"),
        ("{author | no one known }: {x}", {"x": "x"}, "no one known: x"),
        ("{author|writer}: {x}", {"x": "x", "writer": "w"}, "w: x"),
        ("{meta.title|title}", {"meta": {}, "title": "t"}, "t"),
        ("{author}: {x}", {"author": None, "x": "x"}, ": x"),
        ("100% {x}%s", {"x": "%d"}, "100% %d%s"),
        ("{x}", {"x": [["a", "b"], ["c"], []]}, "a\nb\nc\n"),
        ("{x}", {"x": [1, 2.5, None, True]}, "1\n2.5\n\ntrue"),
        ("{x}", "a string", "a string"),
        ("<{x|y}>", "a string", "<a string>"),
        ("{messages}", {"messages": [{"role": "user", "content": "q"}]}, "user:\nq\n\n"),
        ("{x}", {"x": [{"role": "assistant", "tool_calls": []}]}, "assistant:\n\n\n"),
        (
            "{c}",
            {"c": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
            "user:\nq\n\nassistant:\na\n\n",
        ),
    ],
)
def test_fields_alternatives_and_defaults(tmp_path: Path, template: str, record: Any, expected: str) -> None:
    assert filled(tmp_path, template, record) == [expected]


@pytest.mark.parametrize(
    ("template", "record", "message"),
    [
        ("{text}", {"title": 1, "body": 2}, "has no field 'text' of the template; its fields: 'title', 'body'"),
        ("{Text}", {"text": "a"}, "has no field 'Text' of the template (write {text}); its fields: 'text'"),
        (
            "{meta.titel}",
            {"meta": {"title": "a"}},
            "has no field 'meta.titel' of the template; its fields: 'meta', 'meta.title'",
        ),
        (
            "{meta.Title}",
            {"meta": {"title": "a"}},
            "has no field 'meta.Title' of the template (write {meta.title}); its fields: 'meta', 'meta.title'",
        ),
        ("{a}{b}", {"a": "x"}, "has no field 'b' of the template; its fields: 'a'"),
        ("{a|b|}", {"c": "x"}, "has no field 'a' or 'b' of the template; its fields: 'c'"),
        ("{a}", {}, "has no field 'a' of the template; it has no fields"),
    ],
)
def test_a_record_without_a_field_is_told_with_the_fields_that_it_has(
    tmp_path: Path, template: str, record: Any, message: str
) -> None:
    assert refusal(tmp_path, template, record) == ("missing_field", message)


def test_a_long_list_of_fields_is_cut_off(tmp_path: Path) -> None:
    _, message = refusal(tmp_path, "{text}", {f"f{i}": i for i in range(100)})
    assert message.endswith("'f18', 'f19', ...")


@pytest.mark.parametrize(
    ("template", "record", "message"),
    [
        ("{x}", {"x": {"a": 1}}, "has a field 'x' that is an object, not text: name one of its fields, as in {x.a}"),
        ("{m.x}", {"m": {"x": {}}}, "has a field 'm.x' that is an object, not text"),
        (
            "{x}",
            {"x": ["a", {"b": 1}]},
            "has a field 'x' that is a list with an item that is an object, not text: name one of its fields, as in "
            "{x.b}",
        ),
        ("{x}", {"x": json.loads("[" * 40 + "]" * 40)}, "has a field 'x' that has too many lists in each other"),
        (
            "{x}",
            {"x": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "has a field 'x' that is a chat, but message 1: expected parts of type text",
        ),
        ("{x}", ["x"], "is not a JSON object or string, but a list"),
        ("{x}", None, "is not a JSON object or string, but null"),
        ("{x}", True, "is not a JSON object or string, but a boolean"),
        ("{x}{y}", "text", "is a string, which cannot fill the several fields of the template: 'x', 'y'"),
    ],
)
def test_what_is_not_text_is_a_bad_record_with_its_remedy(
    tmp_path: Path, template: str, record: Any, message: str
) -> None:
    assert refusal(tmp_path, template, record) == ("bad_record", message)


@pytest.mark.parametrize("record", [{"a": "", "b": None}, {"a": [], "b": []}, {"a": "", "b": "", "c": None}])
def test_a_record_all_of_whose_fields_are_empty_is_empty_whatever_the_template_adds(
    tmp_path: Path, record: Any
) -> None:
    path = write(tmp_path / "a.jsonl", json.dumps(record).encode())
    for template in ("Title: {a}\n{b}", "{c|Anonymous}: {a}{b}"):
        found, report = read(path, template=template)
        assert (found, report.dropped) == ([], {"empty": 1})


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (True, "true"),
        (10**30, str(10**30)),
        (1e16, "10000000000000000"),
        (1e-5, "0.00001"),
        (3.0, "3.0"),
        (1e300, "1e+300"),
        (float("nan"), ""),
        (float("inf"), ""),
        (Decimal("12.50"), "12.50"),
        (Decimal("1E+3"), "1000"),
        (datetime.date(2024, 2, 29), "2024-02-29"),
        (datetime.datetime(2024, 2, 29, 1, 2, 3), "2024-02-29 01:02:03"),
        (datetime.time(1, 2), "01:02:00"),
        (datetime.timedelta(minutes=90), "1:30:00"),
        (["\u9ec3".encode(), b"x"], "\u9ec3\nx"),
        (None, ""),
    ],
)
def test_values_are_written_as_a_person_would(value: Any, expected: str) -> None:
    assert field_text(value, "{content}") == expected


def test_columns_of_parquet_are_found_by_paths_and_alternatives(tmp_path: Path) -> None:
    path = str(tmp_path / "a.parquet")
    meta = [{"title": "a", "day": datetime.date(2024, 1, 2)}, {"title": None, "day": None}]
    table = pa.table({"meta": meta, "price": [Decimal("1.50"), None], "ok": [True, False], "data": [b"\xff!", b"x"]})
    pq.write_table(table, path)
    assert texts(path, template="{meta.title|No title} {meta.day} {price} {ok}") == [
        "a 2024-01-02 1.50 true",
        "No title   false",
    ]
    assert column_names(parse_template("{a.b.c|d}{e}")) == {"a", "a.b", "a.b.c", "d", "e"}


def test_a_chat_of_the_corpus_has_the_form_of_the_endpoints_prompts(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    form = "<{role}>{content}</>"
    path = write(tmp_path / "a.jsonl", json.dumps({"messages": messages}).encode())
    (document,) = texts(path, template="{messages}", chat_template=form)
    prompt = ChatRequest.model_validate({"messages": messages[:1]}).prompt_request(form)
    assert document == prompt.prompts[0] + "Hi" + prompt.stops[0]
