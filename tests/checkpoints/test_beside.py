from diffxfer.checkpoints.beside import Beside
from diffxfer.checkpoints.companions import list_companions
from diffxfer.diffs.vocab.tokens import read_tokenizer
from tests.families import fast_tokenizer, save_tokenizer


def test_what_is_planned_reads_as_the_folder_that_it_becomes(tmp_path):
    save_tokenizer(tmp_path, fast_tokenizer(("<x>",)), template="{{ x }}", eos_token="<x>")
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "more.jinja").write_text("{{ y }}")
    names = list_companions(tmp_path).names
    # Some as bytes, as an edited file is, and some as files to copy.
    planned = {
        name: (tmp_path / name).read_bytes() if place % 2 else tmp_path / name
        for place, name in enumerate(names)
    }
    found = read_tokenizer(Beside(tmp_path / "nowhere", planned))
    assert found == read_tokenizer(tmp_path)
    assert found is not None
    assert found.chat_templates == "{{ x }}\n{{ y }}"


def test_what_is_not_there(tmp_path):
    for files in (Beside(tmp_path), Beside(tmp_path, {})):
        assert files.read("config.json") is None
        assert files.document("config.json") == {}
        assert files.matching("*.tiktoken") == files.more_templates() == []
