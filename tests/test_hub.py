"""Publishing on the Hugging Face Hub, against the stand-in for it in conftest.py."""

import json
import os
import re

import pytest
from conftest import run_outside
from huggingface_hub import ModelCard
from test_sample import project, refused, sampled, tuned  # noqa: F401

from config import UserError, configure
from model import read_json
from sample import SampleConfig

SUMMARY = {
    "name": "fables", "updates": 30, "tokens": 15360, "seconds": 9.5, "metrics": {"val_loss": 4.25, "val_bpb": 1.5},
    "floor_bits_per_byte": 0.1664, "parameters": 50000, "versions": {"torch": "2.13.0", "python": "3.11"},
    "commit": None, "hardware": "a laptop", "settings": {"dataset": "tinystories", "init_from": "scratch"},
}  # fmt: skip


@pytest.fixture
def writer(hub, tmp_path, monkeypatch):
    """The stand-in, with this process logged in to it as "writer"."""
    constants, endpoint = "huggingface_hub.constants.", os.environ["HF_ENDPOINT"]
    monkeypatch.setattr(constants + "ENDPOINT", endpoint)
    monkeypatch.setattr(
        constants + "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants + "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(constants + "HF_TOKEN_PATH", str(tmp_path / "none"))
    monkeypatch.setattr(constants + "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_writer")
    return hub


def run_card(card, folder):
    """Run the Python code of a model card as a reader would -> what it prints."""
    (code,) = re.findall(r"```python\n(.*?)```", card.text, re.S)
    (folder / "card.py").write_text(code)
    result = run_outside(folder, ["card.py"])
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_model_becomes_a_whole_repository(project, writer, tmp_path):  # noqa: F811
    run = project / "out/fables"
    (run / "summary.json").write_text(json.dumps(SUMMARY))
    printed = sampled(project, "--out_dir=out/fables", "--push_to_hub=writer/fables")
    assert printed.startswith(f"{os.environ['HF_ENDPOINT']}/writer/fables: uploaded")
    folder = writer["writer/fables"]
    names = {file.name for file in folder.iterdir()}
    assert names == {file.name for file in (run / "best").iterdir()} | {"README.md", "loss.png"}
    card = ModelCard.load(folder / "README.md")
    data = card.data.to_dict()
    assert data["library_name"] == "transformers" and data["datasets"] == ["roneneldan/TinyStories"]
    assert "license" not in data and "base_model" not in data and "License: to be filled in" in card.text
    assert {r.metric_type: r.metric_value for r in card.data.eval_results} == SUMMARY["metrics"]
    for text in ("| validation loss, bits per byte | 1.5000 |", "| entropy floor, bits per byte | 0.1664 |", "50,000",
                 "30 updates, 15,360 tokens, 0.2 minutes", "| a laptop |", "![training"):  # fmt: skip
        assert text in card.text, card.text
    last = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()][-1]["sample"]
    assert last.splitlines()[0].replace("<", "&lt;") in card.text
    assert "Once upon a time" in run_card(card, tmp_path)
    # the license that its owner fills in on the Hub survives the next upload, and a checkpoint's state stays here
    (folder / "README.md").write_text(str(card).replace("---\n", "---\nlicense: mit\n", 1))
    assert (run / "last/train_state.pt").exists()
    sampled(project, "--model=out/fables/last", "--push_to_hub=writer/fables")
    again = ModelCard.load(folder / "README.md")
    assert again.data.license == "mit" and "License" not in again.text
    assert not (folder / "train_state.pt").exists()


def test_an_adapter_names_its_base(tuned, writer, tmp_path):  # noqa: F811
    adapter, push = "--adapter=out/tuned/best", "--push_to_hub=writer/tuned"
    assert "--model=out/fables/best --push_to_hub=USER/BASE" in refused(tuned, adapter, push)
    sampled(tuned, "--out_dir=out/fables", "--push_to_hub=writer/base")
    sampled(tuned, adapter, "--model=writer/base", push)
    folder = writer["writer/tuned"]
    assert "model.safetensors" not in {file.name for file in folder.iterdir()}
    assert read_json(folder / "adapter_config.json")["base_model_name_or_path"] == "writer/base"
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "peft" and card.data.base_model == "writer/base"
    assert "assistant" in run_card(card, tmp_path)
    asked = ("--adapter=writer/tuned", "--instruct=Who is it?", "--temperature=0", "--max_new_tokens=8")
    here = sampled(tuned, "--adapter=out/tuned/best", *asked[1:])
    assert sampled(tuned, *asked).split("\n\n")[1] == here.split("\n\n")[1]


def test_without_a_summary_the_card_has_no_figures(project, writer, tmp_path):  # noqa: F811
    (tmp_path / "theirs").mkdir()
    for file in (project / "out/fables/best").iterdir():
        (tmp_path / "theirs" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "theirs/notes.txt").write_text("not to be published")
    sampled(project, f"--model={tmp_path / 'theirs'}", "--push_to_hub=writer/theirs")
    card = ModelCard.load(writer["writer/theirs"] / "README.md")
    assert "model-index" not in card.data.to_dict() and "|" not in card.text.split("```")[0]
    assert not (writer["writer/theirs"] / "notes.txt").exists()


def test_mistakes_of_an_upload(project, writer, monkeypatch):  # noqa: F811
    with pytest.raises(UserError, match="must be USER/NAME"):
        configure([SampleConfig], ["--push_to_hub=fables"])
    summary = project / "out/fables/summary.json"
    summary.write_text('{"metrics": {}}')
    assert "summary.json is damaged: no key 'settings'" in refused(project, "--push_to_hub=writer/fables")
    assert not writer
    summary.unlink()
    assert "repo_id: 'writer/a--b'" in refused(project, "--push_to_hub=writer/a--b")
    assert "no right to write there: `hf auth login`" in refused(project, "--push_to_hub=google/fables")
    monkeypatch.setenv("HF_TOKEN", "")
    assert "not logged in: `hf auth login`" in refused(project, "--push_to_hub=writer/fables")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    assert "not uploaded, check the network: " in refused(project, "--push_to_hub=writer/fables")
