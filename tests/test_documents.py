"""support/documents.py: files of every kind become texts, unchanged."""

import json
import time

from conftest import STORIES, documents_of, prepared

from support.documents import read_files, read_txt


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
    path, meta = prepared(dataset="c", name="mine", val_fraction=0.5)
    texts = documents_of(path, meta, "train") + documents_of(path, meta, "val")
    assert sorted(texts) == sorted(["one", "two", "three", "four"])


def test_a_separator_of_lines_matches_the_line_ends_of_windows(workspace):
    (workspace / "c.txt").write_text("\r\n\r\n".join(STORIES), newline="")
    path, meta = prepared(dataset="c.txt", separator="\\n\\n", val_fraction=0.2)
    texts = documents_of(path, meta, "train") + documents_of(path, meta, "val")
    assert sorted(texts) == sorted(STORIES)


def test_reading_takes_time_in_proportion_to_the_size(tmp_path):
    """A file without separators was once searched from its beginning again for every block that was read."""
    seconds = []
    for megabytes in (8, 48):
        (tmp_path / "c.txt").write_bytes(b"abcdefg " * (megabytes << 17))
        started = time.process_time()
        assert len(list(read_txt(tmp_path / "c.txt", b"<|endoftext|>"))) == 1
        seconds.append(time.process_time() - started)
    assert seconds[1] < 3 * 6 * seconds[0], seconds
