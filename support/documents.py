"""Text files, JSON and Parquet, read piece by piece into texts and rows."""

import glob
import json
import mmap
import os
import re

from support.settings import UserError, user_errors

SUFFIXES = (".txt", ".jsonl", ".json", ".parquet")


def source_files(path):
    """Return the files of a corpus: `path` itself, or all files below it that are not hidden."""
    files = sorted(path / name for name in glob.glob("**", root_dir=path, recursive=True)) or [path]
    return [f for f in files if f.suffix.lower() in SUFFIXES and os.path.isfile(f)]


def names_split(words, file, folder):
    """Return whether a file's path below `folder` has one of these words in it, such as tiny-valid.txt has "valid"."""
    name = str(file.relative_to(folder).with_suffix("")) if folder.is_dir() else ""
    return re.search(rf"(^|[-_. /\\])({words})([-_. /\\]|$)", name)


def read_files(files, separator, text_column):
    """Yield the texts of the documents in some files."""
    for path in files:
        if path.suffix.lower() == ".txt":
            yield from read_txt(path, os.fsencode(separator))
        else:
            yield from column(read_rows(path), text_column, path)


def read_txt(path, separator):
    """Yield the documents of a text file one by one, so that the file may be larger than memory."""
    if not os.path.getsize(path):
        return
    with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_READ) as text:
        start, windows = 0, separator.replace(b"\n", b"\r\n")  # Windows line ends
        separator = windows if text.find(separator) < 0 <= text.find(windows) else separator
        while start < len(text):
            end = text.find(separator, start)
            end = len(text) if end < 0 else end
            try:
                document = text[start:end].decode("utf-8").removeprefix("\ufeff").strip()  # Windows' byte order mark
            except UnicodeDecodeError as e:
                fix = "convert it, for example with iconv"
                raise UserError(f"{path}: not UTF-8 at byte {start + e.start}; {fix}") from None
            if document:
                yield document
            start = end + len(separator)


def read_rows(path):
    """Yield the rows of a .json, .jsonl or .parquet file as dicts, one by one. Values keep their types: `datasets`
    would give a whole column one type, and change texts beside a number."""
    kind, count = path.suffix.lower().lstrip("."), 0
    with user_errors(f"{path}: not readable as {kind}, or empty"):
        for count, row in enumerate(read_parquet(path) if kind == "parquet" else read_json_rows(path), 1):
            if not isinstance(row, dict):
                raise ValueError(f"row {count} is not an object, but {type(row).__name__}")
            yield row
        if not count:
            raise ValueError("no row in it")


def read_parquet(path):
    from pyarrow.parquet import ParquetFile  # slow to import

    for batch in ParquetFile(path).iter_batches(1000):
        yield from batch.to_pylist()


def read_json_rows(path):
    """Yield the items of a JSON list, or of a file with one JSON value a line."""
    with open(path, encoding="utf-8-sig") as f:
        is_list = f.read(1000).lstrip().startswith("[")
        f.seek(0)
        yield from json.load(f) if is_list else map(json.loads, filter(str.strip, f))


def column(rows, name, source):
    """Yield the texts in one column of rows, which read_rows() or the Hub made. source: their name, for messages."""
    with user_errors(f"{source}: no further row can be read"):
        for i, row in enumerate(rows):
            if not isinstance(row.get(name), str | None) or (i == 0 and name not in row):
                kinds = ", ".join(f"{key} ({type(value).__name__})" for key, value in row.items())
                raise UserError(f"{source}: no text in a column {name!r}; choose --text_column from {kinds}")
            # JSON can hold half of a surrogate pair
            if text := (row.get(name) or "").encode(errors="replace").decode().strip():
                yield text
