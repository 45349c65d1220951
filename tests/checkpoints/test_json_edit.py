import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffxfer.checkpoints.json_edit import edit_json

CONFIG = b"""{
  "rms_norm_eps": 1e-05,
  "rope_scaling": {"factor": 8.0, "type": "llama3"},
  "rope_theta": 500000.0,
  "tiny": 1.0E+5,
  "eos_token_id": [
    1,
    2
  ],
  "sub": {},
  "big": 1000000000000000019884624838656
}
"""


def test_nothing_changed_gives_the_same_bytes():
    assert edit_json(CONFIG, {}) is CONFIG
    assert edit_json(CONFIG, {"eos_token_id": [1, 2], "rms_norm_eps": 0.00001}, ["no"]) is CONFIG


def test_only_the_changed_key_differs():
    edited = edit_json(CONFIG, {"eos_token_id": 3})
    assert edited == CONFIG.replace(b"[\n    1,\n    2\n  ]", b"3")


def test_a_list_is_written_in_the_files_indentation():
    edited = edit_json(CONFIG, {"eos_token_id": [7, 8, 9]})
    assert edited == CONFIG.replace(b"1,\n    2\n", b"7,\n    8,\n    9\n")


def test_nested_keys_are_set_added_and_removed():
    edited = edit_json(
        CONFIG,
        {("rope_scaling", "factor"): 2.5, ("sub", "a"): 1, ("new", "b"): "é"},
        ["tiny", ("rope_scaling", "type")],
    )
    assert edited.decode() == (
        CONFIG.decode()
        .replace('{"factor": 8.0, "type": "llama3"}', '{"factor": 2.5}')
        .replace('  "tiny": 1.0E+5,\n', "")
        .replace('"sub": {}', '"sub": {\n    "a": 1\n  }')
        .replace("884624838656\n", '884624838656,\n  "new": {\n    "b": "é"\n  }\n')
    )


@pytest.mark.parametrize(
    ("raw", "changes", "removals", "expected"),
    [
        (b'{"a": 1, "b": 2}', {}, ["a"], b'{"b": 2}'),
        (b'{"a": 1, "b": 2}', {}, ["b"], b'{"a": 1}'),
        (b'{"a": 1, "b": 2}', {}, ["a", "b"], b"{}"),
        (b'{"a": 1, "b": 2}', {"c": [1, 2]}, [], b'{"a": 1, "b": 2, "c": [1, 2]}'),
        (b'{"a":1,"b":2}', {"c": [1, 2]}, [], b'{"a":1,"b":2,"c":[1,2]}'),
        (b"{}", {"a": 1}, [], b'{"a": 1}'),
        (b"{\n}", {"a": 1}, [], b'{\n"a": 1\n}'),
        (b'{\n\t"a": {}\n}', {("a", "b"): 1}, [], b'{\n\t"a": {\n\t\t"b": 1\n\t}\n}'),
        (b'{"a": [1, 2]}', {("a", 0): 9, ("a", 2): 3}, [], b'{"a": [9, 2, 3]}'),
        (b'{"a": []}', {("a", 0): 9}, [], b'{"a": [9]}'),
        (b'{"a": 1}', {"a": True}, [], b'{"a": true}'),
        (b'{"a": 1}', {"a": 1.0}, [], b'{"a": 1.0}'),
        (b'{"a": null}', {("a", "b"): 1}, [], b'{"a": {"b": 1}}'),
        (b'{"a": "\\u00e9"}', {"b": "\xfc"}, [], b'{"a": "\\u00e9", "b": "\\u00fc"}'),
        (b'{"a": "\xc3\xa9"}', {"b": "\xfc"}, [], b'{"a": "\xc3\xa9", "b": "\xc3\xbc"}'),
        (b'{"a": [0.0, Infinity]}', {"b": 1}, [], b'{"a": [0.0, Infinity], "b": 1}'),
        (b'{"a": 1, "a": 2}', {"a": 3}, [], b'{"a": 1, "a": 3}'),
        (b'{"a": 1, "b": 0, "a": 2}', {}, ["a"], b'{"b": 0}'),
        (b'\n {"a": "}"} \n', {"a": "{"}, [], b'\n {"a": "{"} \n'),
        (b'{\r\n  "a": 1\r\n}', {"b": 2}, [], b'{\r\n  "a": 1,\r\n  "b": 2\r\n}'),
    ],
)
def test_the_text_around_an_edit_stays_as_it_was(raw, changes, removals, expected):
    assert edit_json(raw, changes, removals) == expected


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text('a"{,é\n\\'),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("ab", max_size=2), inner, max_size=3)
    ),
    max_leaves=8,
)
objects = st.dictionaries(st.text("ab", max_size=2), values, max_size=4)


@given(objects, objects, st.sets(st.text("ab", max_size=2)), st.sampled_from([None, 0, 2, "\t"]))
def test_means_what_a_dict_update_means(document, changes, removals, indent):
    raw = json.dumps(document, indent=indent, ensure_ascii=False).encode()
    removals -= set(changes)
    expected = {key: v for key, v in {**document, **changes}.items() if key not in removals}
    edited = json.loads(edit_json(raw, changes, removals))
    assert json.dumps(edited) == json.dumps(expected)
