import pytest

from diffxfer.diffs.companions.config_edit import config_changes


def test_a_size_that_was_the_class_default_is_stated_once_it_changes(tmp_path):
    nothing_to_translate = None
    changes = config_changes(
        {"model_type": "llama"},
        {},
        nothing_to_translate,
        tmp_path / "config.json",
        vocab_size=32001,
        dtype=None,
    )
    assert changes == {("vocab_size",): 32001}


@pytest.mark.parametrize("stated", ["C:\\x", 8.0, [8], True, None, {"a": 8}, -8, 0])
def test_a_size_that_is_no_number_is_replaced_once_it_changes(stated, tmp_path):
    config = {"vocab_size": stated, "text_config": {"vocab_size": stated}}
    where = tmp_path / "config.json"
    changes = config_changes(config, {}, None, where, vocab_size=9, dtype=None)
    assert changes["text_config", "vocab_size"] == 9
