"""Files become values by the core schema of YAML 1.2, and everything else is refused with its place."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from rljob.loader import MAX_FILE_BYTES, load_document
from rljob_api.errors import SpecError, Violation

# (scalar, value here, whether YAML 1.1 reads it as something else)
SCALARS: tuple[tuple[str, Any, bool], ...] = (
    ("1e-6", 1e-6, True),
    ("1E3", 1000.0, True),
    (".5", 0.5, False),
    ("5.", 5.0, False),
    ("-.5e+2", -50.0, False),
    ("1e", "1e", False),
    (".", ".", False),
    ("017", 17, True),
    ("0o17", 15, True),
    ("0x1F", 31, False),
    ("0b11", "0b11", True),
    ("1_000", "1_000", True),
    ("+3", 3, False),
    ("-0", 0, False),
    ("12:30", "12:30", True),
    ("on", "on", True),
    ("off", "off", True),
    ("yes", "yes", True),
    ("No", "No", True),
    ("true", True, False),
    ("True", True, False),
    ("TRUE", True, False),
    ("tRUE", "tRUE", False),
    ("false", False, False),
    ("~", None, False),
    ("null", None, False),
    ("Null", None, False),
    ("NULL", None, False),
    ("nULL", "nULL", False),
    ("", None, False),
    ("2026-11-23", "2026-11-23", True),
    ("2026-11-23T01:00:00Z", "2026-11-23T01:00:00Z", True),
    ("=", "=", True),
    ('"1e-6"', "1e-6", False),
    ("'true'", "true", False),
    ("!!str 017", "017", False),
    ("!!float 1", 1.0, False),
    ("-.inf", -math.inf, False),
)


def loaded(tmp_path: Path, text: str | bytes, name: str = "job.yaml") -> Any:
    path = tmp_path / name
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return load_document(path)


def refused(tmp_path: Path, text: str | bytes, name: str = "job.yaml") -> tuple[str, str, str]:
    """Where (without the folder), why, and what to do."""
    with pytest.raises(SpecError) as error:
        loaded(tmp_path, text, name)
    (violation,) = error.value.violations
    assert violation.value == ""
    return violation.path.removeprefix(f"{tmp_path}/"), violation.reason, violation.remedy


@pytest.mark.parametrize(("text", "value", "_"), SCALARS, ids=[s[0] for s in SCALARS])
def test_a_scalar_means_what_yaml_1_2_says(tmp_path: Path, text: str, value: Any, _: bool) -> None:
    found = loaded(tmp_path, f"x: {text}\n")["x"]
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("text", [text for text, _, differs in SCALARS if differs])
def test_the_table_holds_the_scalars_that_yaml_1_1_reads_otherwise(text: str) -> None:
    value = {scalar: wanted for scalar, wanted, _ in SCALARS}[text]
    try:
        assert yaml.safe_load(f"x: {text}\n")["x"] != value
    except yaml.YAMLError:
        pass  # `=` has no constructor there at all


def test_an_escaped_surrogate_pair_is_one_character_as_in_json(tmp_path: Path) -> None:
    assert loaded(tmp_path, '"\\ud83d\\ude00": "\\ud83d\\ude00"') == {"😀": "😀"}


def test_nan_is_a_float(tmp_path: Path) -> None:
    assert math.isnan(loaded(tmp_path, "x: .nan")["x"])


def test_keys_are_text_as_written(tmp_path: Path) -> None:
    assert loaded(tmp_path, "50: a\non: b\ntrue: c\n1e3: d\n") == {"50": "a", "on": "b", "true": "c", "1e3": "d"}


def test_anchors_and_aliases_are_written_out_as_values_of_their_own(tmp_path: Path) -> None:
    document = loaded(tmp_path, "a: &x {b: [1, 2]}\nc: *x\nd: *x\n")
    assert document == {"a": {"b": [1, 2]}, "c": {"b": [1, 2]}, "d": {"b": [1, 2]}}
    assert document["a"] is not document["c"]


def test_a_leading_marker_and_a_byte_order_mark_are_fine(tmp_path: Path) -> None:
    assert loaded(tmp_path, b"\xef\xbb\xbf---\na: 1\n...\n") == {"a": 1}


REFUSED = (
    ("a: 1\nb: 2\na: 3\n", "job.yaml:3:1", 'repeats the key "a" in one object', "Keep one of the two."),
    ("a:\n  b: 1\n  'b': 2\n", "job.yaml:3:3", 'repeats the key "b" in one object', "Keep one of the two."),
    ("a: 1\n---\nb: 2\n", "job.yaml:3:1", "starts a second document", "Keep one RLJob a file."),
    ("", "job.yaml", "is empty", "Write one RLJob into it."),
    ("# nothing\n", "job.yaml", "is empty", "Write one RLJob into it."),
    (
        "a: &x\n  b: *x\n",
        "job.yaml:1:4",
        "contains itself",
        "Remove the alias that points to its own parent.",
    ),
    (
        "a: &x {b: 1}\nc:\n  <<: *x\n",
        "job.yaml:3:3",
        "uses a merge key, which YAML 1.2 does not have",
        "Write the fields out.",
    ),
    ("? [a]\n: 1\n", "job.yaml:1:3", "has a key that is no text", "Write keys as plain words."),
    ("~: 1\n", "job.yaml:1:1", "has a key that is no text", "Write keys as plain words."),
    (
        "a: !!python/object:os.system x\n",
        "job.yaml:1:4",
        "does not fit the tag !!python/object:os.system",
        "Remove the tag: values are plain YAML.",
    ),
    ("a: !!int x\n", "job.yaml:1:4", "does not fit the tag !!int", "Remove the tag: values are plain YAML."),
    ("a: !!set {b}\n", "job.yaml:1:4", "does not fit the tag !!set", "Remove the tag: values are plain YAML."),
    (
        f"a: {'9' * 5000}\n",
        "job.yaml:1:4",
        "has a number of thousands of digits",
        "Write a smaller number.",
    ),
    (
        "a:\n\t- 1\n",
        "job.yaml:2:1",
        "is not YAML: while scanning for the next token, found character '\\t' that cannot start any token",
        "Indent with spaces.",
    ),
    (
        "a: [1\nb: 2\n",
        "job.yaml:2:2",
        "is not YAML: while parsing a flow sequence, expected ',' or ']', but got ':'",
        "Mend the YAML there.",
    ),
    (
        "a: *x\n",
        "job.yaml:1:4",
        "is not YAML: found undefined alias 'x'",
        "Mend the YAML there.",
    ),
    (
        "a: b\nc: \x00\n",
        "job.yaml:2:4",
        "has the control character 0x0",
        "Remove it, or write it as an escape in quotes.",
    ),
    (b"a: b\nc: \xff\n", "job.yaml:2:4", "is not UTF-8", "Save the file as UTF-8."),
    (
        b"#" * (MAX_FILE_BYTES + 1),
        "job.yaml",
        "is larger than 1048576 bytes",
        "An RLJob is a few kilobytes: name another file.",
    ),
    ("[" * 5000, "job.yaml", "is nested too deeply", "Flatten it."),
)


@pytest.mark.parametrize(("text", "where", "reason", "remedy"), REFUSED, ids=[r[2][:40] for r in REFUSED])
def test_a_file_is_refused_with_place_reason_and_remedy(
    tmp_path: Path, text: str | bytes, where: str, reason: str, remedy: str
) -> None:
    assert refused(tmp_path, text) == (where, reason, remedy)


def test_a_small_file_that_means_billions_of_values_is_refused(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10)]
    _, reason, remedy = refused(tmp_path, "\n".join(lines))
    assert reason == "means more than 100000 values with its aliases written out"
    assert remedy == "Use fewer aliases."


def test_a_file_that_is_not_there_or_is_a_folder_is_refused(tmp_path: Path) -> None:
    for path, why in ((tmp_path / "none.yaml", "No such file or directory"), (tmp_path, "Is a directory")):
        with pytest.raises(SpecError) as error:
            load_document(path)
        wanted = Violation(str(path), "", f"cannot be read ({why})", "Name a readable YAML or JSON file.")
        assert error.value.violations == (wanted,)


def test_json_files_are_read_as_json(tmp_path: Path) -> None:
    assert loaded(tmp_path, '{\n\t"a": [1, 2.5, true, null, "on"]}', "job.json") == {"a": [1, 2.5, True, None, "on"]}


JSON_REFUSED = (
    ('{"a": 1, "a": 2}', "job.json", 'repeats the key "a" in one object', "Keep one of the two."),
    ('{"a": 1,\n}', "job.json:2:1", "is not JSON: Expecting property name enclosed in double quotes", None),
    ('{"a": 1} {}', "job.json:1:10", "is not JSON: Extra data", "Mend the JSON there."),
    ("", "job.json:1:1", "is not JSON: Expecting value", "Mend the JSON there."),
    (f'{{"a": {"9" * 5000}}}', "job.json", "has a number of thousands of digits", "Write a smaller number."),
    ("[" * 100_000, "job.json", "is nested too deeply", "Flatten it."),
)


@pytest.mark.parametrize(("text", "where", "reason", "remedy"), JSON_REFUSED, ids=[r[2][:40] for r in JSON_REFUSED])
def test_a_json_file_is_refused_with_place_reason_and_remedy(
    tmp_path: Path, text: str, where: str, reason: str, remedy: str | None
) -> None:
    assert refused(tmp_path, text, "job.json") == (where, reason, remedy or "Mend the JSON there.")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=60, deadline=None)
@given(document=JSON)
def test_every_json_value_reads_the_same_from_yaml_and_from_json(
    tmp_path_factory: pytest.TempPathFactory, document: Any
) -> None:
    folder = tmp_path_factory.getbasetemp()
    text = json.dumps(document)
    assert loaded(folder, text, "same.json") == document
    assert loaded(folder, text, "same.yaml") == document
