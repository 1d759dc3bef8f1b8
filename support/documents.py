"""Read texts and records from files of text or of rows, plain or compressed, piece by piece."""

import csv
import io
import itertools
import json
import os
import re
from pathlib import Path

from support.settings import UserError, first_line, user_errors

TEXTS, ROWS = (".txt", ".md"), (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet", ".arrow")
COMPRESSED = {".gz": "gzip", ".bz2": "bz2", ".zst": "zstd"}
DESCRIPTIONS = r"(readme|license|dataset_infos?|dataset_dict|state)\.\w+|cache-.*\.arrow"  # of datasets, not texts


def kind_of(path):
    """Return the suffix of a file's format, such as ".jsonl" for part-1.jsonl.gz; "" if the format is not read."""
    path = Path(path)
    inner = Path(path.stem).suffix.lower() if path.suffix.lower() in COMPRESSED else path.suffix.lower()
    is_packed_table = inner in (".parquet", ".arrow") and inner != path.suffix.lower()
    return inner if inner in TEXTS + ROWS and not is_packed_table else ""


def open_splits(path, kinds=TEXTS + ROWS):
    """Return {"train": files, "val": files}, without "val" if no file is named as a validation split. The files are the
    file `path`, or all files of these kinds below the folder `path` that are not hidden. A file with a second link to
    it is read once. Print which files are left out."""
    found, seen, files, left_out = [path] if os.path.isfile(path) else [], set(), {}, {}
    for folder, folders, names in os.walk(path, followlinks=True):
        is_new = os.path.realpath(folder) not in seen  # links can make a loop
        seen.add(os.path.realpath(folder))
        folders[:] = sorted(name for name in folders if is_new and not name.startswith("."))
        found += [Path(folder, name) for name in names if is_new and not name.startswith(".")]
    for file in sorted(found):
        real, why = os.path.realpath(file), ""
        if not os.path.isfile(file):
            why = "a broken link, or not a regular file"
        elif kind_of(file) not in kinds:
            why = "texts, not records" if kind_of(file) else "an unsupported kind"
        elif len(found) > 1 and re.fullmatch(DESCRIPTIONS, file.name.lower()):
            why = "describes a dataset"
        elif names_split("test", file, path):
            why = "a test split"
        elif real in files:
            why = f"the same file as {files[real].name}"
        if why:
            left_out.setdefault(why, []).append(file.name if file == path else str(file.relative_to(path)))
        else:
            files[real] = file
    for why, names in sorted(left_out.items()):
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        print(f"{path}: left out ({why}): {', '.join(names[:5])}{more}")
    if not files:
        raise UserError(f"{path}: no {', '.join(kinds)} file here, plain or .gz, .bz2, .zst")
    val = [file for file in files.values() if names_split("val|valid|validation|dev", file, path)]
    train = [file for file in files.values() if file not in val]
    return {"train": train, "val": val} if train and val else {"train": train or val}


def names_split(words, file, folder):
    """Return whether a file's path below `folder` contains one of these words, such as "valid" in tiny-valid.txt."""
    return re.search(rf"(^|[-_. /\\])({words})[-_. /\\]", str(file.relative_to(folder)), re.IGNORECASE)


def read_files(files, separator, text_column, max_bad_rows=0.1, notes=None):
    """Yield the texts of the documents in some files. notes: {file: counts of left-out rows}, for the report."""
    for path in files:
        rows = read_txt(path, os.fsencode(separator)) if kind_of(path) in TEXTS else read_rows(path)
        yield from column(rows, text_column, path, max_bad_rows, notes)


def open_binary(path):
    """Open a file for reading bytes, uncompressed. A plain file is mapped, so it may exceed the memory."""
    import pyarrow  # slow to import

    file, compression = pyarrow.memory_map(str(path)), COMPRESSED.get(path.suffix.lower())
    return pyarrow.CompressedInputStream(file, compression) if compression else file


def read_txt(path, separator):
    """Yield (place, document) of a text file. A line end in the separator matches Windows line ends too."""
    pattern = re.compile(re.escape(separator).replace(b"\\\n", b"\r?\n"))
    with user_errors(f"{path}: not readable"), open_binary(path) as f:
        text, start = f.read_buffer(), 0
        for end, next_start in itertools.chain(map(re.Match.span, pattern.finditer(text)), [(len(text), 0)]):
            try:
                document = str(text[start:end], "utf-8").removeprefix("\ufeff")  # Windows' byte order mark
            except UnicodeDecodeError as e:
                why = f"not UTF-8 at byte {start + e.start}; convert it, for example with iconv"
                raise UserError(f"{path}: {why}") from None
            if document.strip():
                yield f"byte {start}", document
            start = next_start


def read_rows(path):
    """Yield (place, row) of a file of rows, one by one. row: a dict, or the error that says why it cannot be read.
    Values keep their types. The `datasets` library would cast a column of texts and numbers to one type."""
    kind = kind_of(path)
    readers = {".parquet": read_tables, ".arrow": read_tables, ".csv": read_csv, ".tsv": read_csv}
    with user_errors(f"{path}: not readable as {kind[1:]}"):
        for place, row in readers.get(kind, read_json)(path):
            is_row = isinstance(row, dict | Exception)
            yield place, row if is_row else ValueError(f"not an object, but {type(row).__name__}")


def read_tables(path):
    """Yield the rows of a Parquet file, or of an Arrow stream or file, which datasets' save_to_disk() writes."""
    import pyarrow.parquet  # slow to import

    if path.suffix.lower() == ".parquet":
        batches = pyarrow.parquet.ParquetFile(path).iter_batches(1000)
    else:  # read_all() of a mapped file copies nothing
        source = open_binary(path).read_buffer()
        open_arrow = pyarrow.ipc.open_file if source[:6] == b"ARROW1" else pyarrow.ipc.open_stream
        batches = open_arrow(source).read_all().to_batches(1000)
    rows = (row for batch in batches for row in batch.to_pylist())
    yield from ((f"row {number}", row) for number, row in enumerate(rows, 1))


def read_csv(path):
    csv.field_size_limit(2**31 - 1)  # the largest number that Windows takes
    with open_binary(path) as f, io.TextIOWrapper(f, encoding="utf-8-sig", newline="") as text:
        reader = csv.DictReader(text, delimiter="\t" if kind_of(path) == ".tsv" else ",", strict=True)
        try:
            if len(set(reader.fieldnames or [])) < len(reader.fieldnames or []):
                raise ValueError("two columns have the same name")
            for row in reader:
                is_whole = None not in row and None not in row.values()
                yield f"line {reader.line_num}", row if is_whole else ValueError("more or fewer cells than the header")
        except (csv.Error, UnicodeDecodeError) as e:
            raise ValueError(f"after line {reader.line_num}: {e}; save it as UTF-8, with balanced quotes") from None


def read_json(path):
    """Yield the items of a JSON list, or of a file with one JSON value per line."""
    with io.BufferedReader(open_binary(path)) as f:
        if f.peek(1000).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            items = json.loads(f.read().decode("utf-8-sig"))
            yield from ((f"record {number}", item) for number, item in enumerate(items, 1))
            return
        for number, line in enumerate(f, 1):
            try:
                if line.strip():
                    yield f"line {number}", json.loads(line.decode("utf-8-sig"))
            except (ValueError, RecursionError) as e:
                yield f"line {number}", ValueError(f"not JSON: {first_line(e)}")


def column(rows, name, source, max_bad_rows, notes):
    """Yield the texts in one column of rows, from read_txt(), read_rows() or the Hub. Rows without a text there, and
    empty texts, are left out and counted. Raises UserError if rows without a text are a larger share than max_bad_rows.
    source: the name of the rows, for messages."""
    note = {"rows": 0, "unreadable": 0, "empty": 0, "repaired": 0, "line_ends": 0, "first": ""}
    if notes is not None:
        notes[source] = note
    for note["rows"], (place, row) in enumerate(rows, 1):
        value, text = row.get(name, row) if isinstance(row, dict) else row, None
        if isinstance(row, str):  # a document of a text file
            note["line_ends"] += "\r\n" in row
            text = row.replace("\r\n", "\n").strip()
        elif isinstance(value, str):
            text = value.encode(errors="replace").decode().strip()  # JSON can hold half of a surrogate pair
            note["repaired"] += text != value.strip()
        elif value is None or value != value:  # NaN does not equal itself
            text = ""
        else:
            note["unreadable"] += 1
            if isinstance(row, dict):
                kinds = ", ".join(f"{key} ({type(cell).__name__})" for key, cell in row.items())
                value = f"no text in a column {name!r}; it has {kinds}"
            note["first"] = note["first"] or f"{place}: {value}"
        note["empty"] += text == ""
        if text:
            yield text
        if note["rows"] == 1000:  # do not wait for the end of a large file
            check_bad_rows(source, note, max_bad_rows)
    check_bad_rows(source, note, max_bad_rows)


def check_bad_rows(source, note, max_bad_rows):
    """Raise UserError if more than this share of a source's rows cannot be read."""
    if (bad := note["unreadable"]) > max_bad_rows * note["rows"]:
        fix = "correct them, name another --text_column, or raise --max_bad_rows to leave them out"
        raise UserError(f"{source}: {bad} of {note['rows']} rows cannot be read, the first: {note['first']}; {fix}")
