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
