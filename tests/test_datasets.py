"""support/datasets.py: which folder a dataset may use, how it is opened, and its fingerprint."""

import os
import shutil

import pytest
from conftest import STORIES, prepared, write_corpus

from support.datasets import open_dataset
from support.settings import UserError


def test_the_fingerprint_tells_datasets_apart(workspace):
    write_corpus(workspace / "c.txt")
    seen = [prepared(dataset="c.txt", **how)[1]["fingerprint"] for how in ({}, {}, {"val_fraction": 0.02})]
    seen += [prepared(dataset="c.txt", tokenizer="bpe:299")[1]["fingerprint"]]
    write_corpus(workspace / "c.txt", [*STORIES[:-1], "Another end."])
    seen += [prepared(dataset="c.txt")[1]["fingerprint"]]
    assert seen[0] == seen[1] and len(set(seen)) == 4 and len(bytes.fromhex(seen[0])) == 16


def snapshot(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


@pytest.mark.parametrize(
    "name",
    [".", "..", "a/b", "../photos", "{folder}/photos", "a\\b", "a\0b", "a\nb", "x" * 300, "c.part", "c.replaced"],
)
def test_only_a_plain_name_is_taken_as_a_name(workspace, name):
    """--name=/home/me/photos once deleted that folder, and --name=. the grammar."""
    write_corpus(workspace / "c.txt")
    for folder in (workspace / "photos", workspace / "data", workspace / "data" / "a"):
        folder.mkdir(exist_ok=True)
        (folder / "1.jpg").write_text("a photo")
    before = snapshot(workspace)
    with pytest.raises(UserError, match="plain name"):
        prepared(dataset="c.txt", name=name.format(folder=workspace))
    assert snapshot(workspace) == before


@pytest.mark.parametrize("folder", ["c", "c.part", "c.replaced"])
@pytest.mark.parametrize("content", ["photos", "file", "link", "source"])
def test_only_a_dataset_of_the_same_source_is_replaced(workspace, folder, content):
    write_corpus(workspace / "c.txt")
    path, fix = workspace / "data" / folder, "choose another --name"
    if content == "photos":
        path.mkdir()
        (path / "1.jpg").write_text("a photo")
    elif content == "file":
        path.write_text("a text")
    elif content == "link":
        (workspace / "elsewhere").mkdir()
        path.symlink_to(workspace / "elsewhere")
    else:
        (workspace / "other").mkdir()
        shutil.copy("c.txt", workspace / "other" / "c.txt")
        os.rename(prepared(dataset="other/c.txt")[0], path)
        fix = f"was prepared from {workspace / 'other' / 'c.txt'}, not from {workspace / 'c.txt'}: {fix}"
    before = snapshot(workspace)
    with pytest.raises(UserError) as error:
        prepared(dataset="c.txt")
    assert fix in str(error.value) and str(path) in str(error.value)
    assert snapshot(workspace) == before
    prepared(dataset="c.txt", name="mine")


def test_empty_folders_and_a_dataset_of_the_same_source_are_replaced(workspace):
    write_corpus(workspace / "c.txt")
    for folder in ("c", "c.part", "c.replaced"):
        (workspace / "data" / folder).mkdir()
    first, _ = prepared(dataset="c.txt")
    files = set(os.listdir(first))
    write_corpus(workspace / "c.txt", STORIES[:50])
    path, meta = prepared(dataset="c.txt")
    assert meta["train"]["documents"] + meta["val"]["documents"] == 50 and os.listdir(workspace / "data") == ["c"]
    assert set(os.listdir(path)) == files == {
        "train.bin", "val.bin", "meta.json", "tokenizer.json", "tokenizer_config.json"
    }  # fmt: skip


def test_a_dataset_is_found_where_a_crash_left_it(workspace):
    write_corpus(workspace / "c.txt")
    path, meta = prepared(dataset="c.txt")
    os.rename(path, path.with_name("c.replaced"))  # a crash between two renames leaves it there
    dataset = open_dataset("c")
    assert dataset.path.name == "c.replaced" and dataset.meta == meta
    with pytest.raises(UserError, match="--dataset=ccc: no such dataset"):
        open_dataset("ccc")
