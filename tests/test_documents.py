"""support/documents.py: files of every kind become texts, unchanged."""

import bz2
import csv
import gzip
import json
import time

import datasets
import pyarrow
import pytest
from conftest import STORIES, documents_of, prepared

from support.documents import open_splits, read_files, read_txt
from support.settings import UserError


def test_texts_are_read_unchanged(tmp_path):
    """`datasets` gave a whole column one type. It made a date of a text, or JSON source of the texts beside a
    number."""
    texts = ["2024-03-05", "a\nb", "\u2028 c", "1"]
    for name, content in (
        ("a[1].jsonl", "\n\n".join(json.dumps({"text": t}) for t in texts)),
        ("b.json", " \n" + json.dumps([{"text": t} for t in texts] + [{"text": None}], indent=1)),
    ):
        (tmp_path / name).write_text(content)
        assert list(read_files([tmp_path / name], "<|endoftext|>", "text")) == [t.strip() for t in texts]
    (tmp_path / "c.jsonl").write_text('{"text": "half \\ud83d a face"}')
    assert list(read_files([tmp_path / "c.jsonl"], "<|endoftext|>", "text")) == ["half ? a face"]


def test_hidden_files_byte_order_marks_and_records_without_text_are_skipped(workspace):
    (workspace / "c" / ".git").mkdir(parents=True)
    for name in ("._a.txt", ".git/b.txt"):
        (workspace / "c" / name).write_bytes(b"\xff")
    (workspace / "c" / "a.txt").write_text("one<|endoftext|>two", encoding="utf-8-sig")
    (workspace / "c" / "b.jsonl").write_text('{"text": "three"}\n{"text": null}\n{"other": 1}\n{"text": "four"}\n')
    path, meta = prepared(dataset="c", name="mine", val_fraction=0.5, max_bad_rows=0.25)
    texts = documents_of(path, meta, "train") + documents_of(path, meta, "val")
    assert sorted(texts) == sorted(["one", "two", "three", "four"])


def test_a_separator_of_lines_matches_the_line_ends_of_windows(workspace):
    (workspace / "c.txt").write_text("\r\n\r\n".join(STORIES), newline="")
    path, meta = prepared(dataset="c.txt", separator="\\n\\n", val_fraction=0.2)
    texts = documents_of(path, meta, "train") + documents_of(path, meta, "val")
    assert sorted(texts) == sorted(STORIES)


ROWS = [{"text": f'Story {i}, "the fox":\nit slept.'} for i in range(5)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def write_zst(path, text):
    with pyarrow.output_stream(str(path), compression="zstd") as f:
        f.write(text.encode())


def write_csv(path, delimiter):
    with open(path, "w", newline="", encoding="utf-8-sig") as f:
        writer = csv.DictWriter(f, ["text"], delimiter=delimiter)
        writer.writeheader()
        writer.writerows(ROWS)


WRITERS = {
    "a.jsonl": lambda path: path.write_text(LINES),
    "a.ndjson": lambda path: path.write_text(LINES.replace("\n", "\r\n")),
    "a.json": lambda path: path.write_text(json.dumps(ROWS, indent=1), encoding="utf-8-sig"),
    "a.jsonl.gz": lambda path: path.write_bytes(
        gzip.compress(LINES[:60].encode()) + gzip.compress(LINES[60:].encode())
    ),
    "a.json.bz2": lambda path: path.write_bytes(bz2.compress(json.dumps(ROWS).encode())),
    "a.jsonl.zst": lambda path: write_zst(path, LINES),
    "a.csv": lambda path: write_csv(path, ","),
    "a.tsv": lambda path: write_csv(path, "\t"),
    "a.parquet": lambda path: datasets.Dataset.from_list(ROWS).to_parquet(path),
    "saved": lambda path: datasets.Dataset.from_list(ROWS).save_to_disk(path),
    "a.txt": lambda path: path.write_text("<|endoftext|>".join(row["text"] for row in ROWS), newline="\r\n"),
    "a.md": lambda path: path.write_text("<|endoftext|>".join(row["text"] for row in ROWS)),
    "a.txt.gz": lambda path: path.write_bytes(
        gzip.compress("<|endoftext|>".join(row["text"] for row in ROWS).encode())
    ),
}


@pytest.mark.parametrize("name", WRITERS)
def test_every_kind_of_file_gives_the_same_texts(tmp_path, name):
    """Of a folder with .jsonl, .jsonl.gz, .csv and .ndjson only the first was read, and nothing was said."""
    WRITERS[name](tmp_path / name)
    files = open_splits(tmp_path)["train"]
    assert list(read_files(files, "<|endoftext|>", "text")) == [row["text"] for row in ROWS]


def test_what_is_left_out_of_a_folder_is_named(tmp_path, capsys):
    for name in ("b.jsonl", "c.txt", "README.md", "dataset_infos.json", "x.pdf", "y.parquet.gz", "sub/d.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text\none\n")
    (tmp_path / "link.jsonl").symlink_to(tmp_path / "b.jsonl")
    (tmp_path / ".hidden.txt").write_text("no")
    files = open_splits(tmp_path)["train"]
    assert sorted(str(file.relative_to(tmp_path)) for file in files) == ["b.jsonl", "c.txt", "sub/d.csv"]
    printed = capsys.readouterr().out
    assert "(describes a dataset): README.md, dataset_infos.json" in printed
    assert "(an unsupported kind): x.pdf, y.parquet.gz" in printed
    assert "(the same file as b.jsonl): link.jsonl" in printed


@pytest.mark.parametrize(
    "line, first",
    [
        ('{"text": "torn', "line 31: not JSON"),
        ('{"text": "a"}{"text": "b"}', "line 31: not JSON: Extra data"),
        ('{"text": 30}', "line 31: no text in a column 'text'; it has text (int)"),
        ('{"content": "a"}', "line 31: no text in a column 'text'; it has content (str)"),
        ("[1]", "line 31: not an object, but list"),
        ("\udcff", "line 31: not JSON"),
        ("[" * 100_000, "line 31: not JSON"),
        (None, ""),
    ],
)
def test_an_odd_row_is_left_out_and_named(tmp_path, line, first):
    """A row that could not be read ended everything, and a row without the column vanished."""
    rows = [json.dumps({"text": f"story {i}"}) for i in range(40)]
    rows[30] = rows[30] if line is None else line
    rows[7], rows[8] = '{"text": null}', '{"text": NaN}'
    (tmp_path / "a.jsonl").write_text("\n".join(rows), errors="surrogateescape")
    notes, file = {}, tmp_path / "a.jsonl"
    assert len(list(read_files([file], "-", "text", 0.1, notes))) == 38 - bool(first)
    assert notes[file]["first"].startswith(first) and notes[file]["unreadable"] == bool(first)
    assert notes[file]["empty"] == 2 and notes[file]["rows"] == 40
    if first:
        with pytest.raises(UserError, match="1 of 40 rows cannot be read, the first: line 31"):
            list(read_files([file], "-", "text", 0.0))


def test_a_file_that_is_mostly_unreadable_is_refused_before_its_end(tmp_path):
    rows = ('{"content": "a"}\n' for _ in range(5000))
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n' + "".join(rows))
    with pytest.raises(UserError, match=r"999 of 1000 rows cannot be read, the first: line 2: .*max_bad_rows"):
        list(read_files([tmp_path / "a.jsonl"], "-", "text"))


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.jsonl.gz", "a.txt.zst", "a.json", "a.csv"])
def test_a_damaged_file_is_refused_in_one_line(tmp_path, name):
    (tmp_path / name).write_bytes(b'["\xff\x00\n"')
    with pytest.raises(UserError, match=f"{name}: ") as found:
        list(read_files([tmp_path / name], "-", "text"))
    assert "\n" not in str(found.value)


def test_reading_takes_time_in_proportion_to_the_size(tmp_path):
    """A file without separators was once searched from its beginning again for every block that was read."""
    seconds = []
    for megabytes in (8, 48):
        (tmp_path / "c.txt").write_bytes(b"abcdefg " * (megabytes << 17))
        started = time.process_time()
        assert len(list(read_txt(tmp_path / "c.txt", b"<|endoftext|>"))) == 1
        seconds.append(time.process_time() - started)
    assert seconds[1] < 3 * 6 * seconds[0], seconds


def test_links_neither_loop_nor_vanish(tmp_path, capsys):
    """Two links to a folder above once made 2^40 paths, and a broken link was passed over."""
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "a.txt").write_text("a text")
    for name in ("x", "y"):
        (tmp_path / "sub" / name).symlink_to(tmp_path)
    (tmp_path / "b.txt").symlink_to(tmp_path / "missing.txt")
    assert open_splits(tmp_path) == {"train": [tmp_path / "sub" / "a.txt"]}
    assert capsys.readouterr().out == f"{tmp_path}: left out (a broken link, or not a regular file): b.txt\n"


@pytest.mark.parametrize("content, message", [("text,text\na,b\n", "two columns have the same name"),
                                              ('text\n"open\n', "after line 1: .*balanced quotes")])  # fmt: skip
def test_a_csv_file_that_could_be_misread_is_refused(tmp_path, content, message):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(UserError, match=message):
        list(read_files([tmp_path / "a.csv"], "-", "text"))
