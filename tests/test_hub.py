"""support/hub.py: names on the Hugging Face Hub, against the stand-in for it in conftest.py."""

from pathlib import Path

import pytest
from conftest import one_line, run_outside, run_script

from support.hub import hub_directory, is_hub_id, load_dataset_from_hub
from support.settings import UserError
from support.tokenizer import Tokenizer

LOAD = """
import prepare, support.settings
for name in ("gemma-3-270m-it", "gated", "none"):
    try:
        print(prepare.make_tokenizer("google/" + name, None).vocab_size)
    except support.settings.UserError as e:
        print(e)
"""


def test_tokenizers_come_from_the_hub(project, hub, gemma):
    hub["google/gemma-3-270m-it"], hub["google/gated"] = gemma, None
    (project / "load.py").write_text(LOAD)
    size, gated, unknown = run_script(project, "load.py").stdout.splitlines()
    assert int(size) == Tokenizer.load(gemma).vocab_size
    assert "accept its terms" in gated and "neither" in unknown


@pytest.mark.parametrize("offline", ["0", "1"])
def test_a_hub_that_does_not_answer_is_one_line(project, monkeypatch, tmp_path, offline):
    """With HF_HUB_OFFLINE=1 no server is asked, and the answer is the same."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf-home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", offline)
    result = run_outside(project, ["sample.py", "--model=google/gemma-3-270m-it"], timeout=60)
    why = "not a directory here nor an earlier download, and the Hugging Face Hub does not answer"
    assert one_line(result, 2) == f"sample.py: google/gemma-3-270m-it: {why}"


def test_a_hub_id_is_user_and_repository_and_no_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("google/gemma-3-270m")
    for name in ("gemma", "a/b/c", "/google/gemma", "../google", "google/", "a b/c", ""):
        assert not is_hub_id(name), name
        assert hub_directory(name) == Path(name)
    (tmp_path / "google" / "gemma-3-270m").mkdir(parents=True)
    assert not is_hub_id("google/gemma-3-270m")


def test_an_exception_without_a_text_is_one_line_too(monkeypatch):
    import datasets

    def fails(*args, **settings):
        raise ConnectionError

    monkeypatch.setattr(datasets, "load_dataset", fails)
    with pytest.raises(UserError, match=r"nobody/nothing.*ConnectionError"):
        load_dataset_from_hub("nobody/nothing", "dataset")
