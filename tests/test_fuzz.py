"""Random command lines and damaged files: a script succeeds, or ends with one line and exit code 1 or 2.

python -m pytest -n 0 -m slow tests/test_fuzz.py        # ten minutes of it
"""

import contextlib
import gzip
import json
import random
import time
from dataclasses import fields

import pytest
from conftest import SETTINGS, TINY, copy_project, run_inside, run_script, settings_of, small_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from lora import TEMPLATES
from support.conversations import COLUMNS, FIELDS, REFUSED, ROLES, encode_conversation, read_messages
from support.settings import UserError, configure
from support.tokenizer import Tokenizer

TRAIN = ["--dataset=fables", *TINY, "--max_iters=2", "--eval_interval=2", "--sample_tokens=2", "--eval_tokens=100"]
SAMPLE = ["--device=cpu", "--max_new_tokens=3"]
LORA = ["--init_from=out/base/best", "--data=records.json", "--device=cpu", "--compile=False", "--max_records=6",
        "--val_fraction=0.5", "--sample_tokens=2", "--num_samples=1", "--max_length=200", "--rank=2",
        "--max_iters=2"]  # fmt: skip


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project with a dataset, a run, an adapter and records. These tests run the scripts in this process."""
    path = tmp_path_factory.mktemp("fuzz") / "project"  # alone in a folder, to which --out_dir=.. may point
    path.mkdir()
    copy_project(path)
    run_script(
        path, "prepare.py", "--dataset=fables", "--max_documents=60", "--val_fraction=0.1", "--tokenizer=bpe:280"
    )
    run_script(path, "train.py", *TRAIN, "--out_dir=out/base")
    records = [{"instruction": f"Say {i}.", "input": "", "output": f"It is {i}."} for i in range(12)]
    (path / "records.json").write_text(json.dumps(records))
    (path / "text.txt").write_text("A text.\n<|endoftext|>\nAnother.\n" * 20)
    rows = "".join(json.dumps({"text": f"Text {i}.", "id": i}) + "\n" for i in range(12))
    (path / "text.jsonl").write_text(rows)
    (path / "text.jsonl.gz").write_bytes(gzip.compress(rows.encode()))
    (path / "text.csv").write_text("text,id\n" + "".join(f'"Text, {i}.",{i}\n' for i in range(12)))
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi."},
             {"role": "assistant", "content": "Hello.", "weight": 1}]  # fmt: skip
    (path / "chats.json").write_text(json.dumps([{"messages": turns, "id": i} for i in range(12)]))
    (path / "photos").mkdir()
    (path / "photos" / "a.jpg").write_text("a picture")
    run_script(path, "lora.py", *LORA, "--out_dir=out/tuned")
    return path


def ends_well(project, script, args):
    result = run_inside(project, [script, *args])
    lines = [line for line in result.stderr.splitlines() if line.startswith(script)]
    assert result.returncode in (0, 1, 2), (script, args, result.returncode)
    assert bool(result.returncode) == (len(lines) == 1), (script, args, result.returncode, lines)


# ---- command lines ---------------------------------------------------------------------------------------------------

KEYS = {  # of each script: {setting: its type}
    script: {f.name: f.type for cls in settings_of(script) for f in fields(cls)} for script in SETTINGS
}
NUMBERS = ["-1", "0", "1", "2", "3", "70", "0.5", "1e-3", "nan", "inf", "1e400", "9" * 50, "True", "False", "None", ""]
TEXTS = ["", "fables", "auto", "gpt2", "bpe:300", "short", "alpaca", "all-linear", "q_proj,nothing", "cosine", "adamw",
         "out/base/best", "out/tuned/best", "out/base", "out", "text.txt", "records.json", "photos", "data", "..", ".",
         "a**", "out/base/log.jsonl", "-", "'", "[1]", "{}", "\\n", "None", "x" * 300]  # fmt: skip


def odd_value(kind, rng):
    """Return a value for a setting of this type. One in five has another type."""
    fitting = TEXTS if kind is str else NUMBERS
    return rng.choice(fitting if rng.random() < 0.8 else TEXTS + NUMBERS)


# these reach outside, take long, or need another machine
LEFT_ALONE = {"interactive", "compile", "wandb", "max_iters", "epochs", "num_checked",
              "max_records", "max_documents", "num_samples", "max_new_tokens", "sample_tokens", "device",
              "export_gguf", "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
              "head_dim", "vocab_size", "gradient_accumulation_steps", "batch_size", "block_size", "rank",
              "max_length"}  # fmt: skip


BASE = {
    "train.py": [*TRAIN, "--out_dir=out/fuzzed"],
    "sample.py": SAMPLE,
    "lora.py": [*LORA, "--out_dir=out/fuzzed"],
    "prepare.py": ["--dataset=text.txt", "--tokenizer=bpe:270", "--name=fuzzed"],
}


def random_command(seed):
    """Return a script and its arguments: a command that works, and one to three settings that may break it."""
    rng = random.Random(seed)
    script = rng.choice(sorted(SETTINGS))
    keys = rng.sample([key for key in KEYS[script] if key not in LEFT_ALONE], rng.randint(1, 3))
    return script, BASE[script] + [f"--{key}={odd_value(KEYS[script][key], rng)}" for key in keys]


@contextlib.contextmanager
def nothing_lost(project):
    """Check that all files of before are unchanged, wherever --name, --out_dir and --dataset pointed. Only runs may be
    moved aside. New files are removed."""

    def files():
        return {p: p.read_bytes() for p in project.parent.rglob("*") if p.is_file() and p.parent != project / "data"}

    before = files()
    yield
    after = files()
    for path in after.keys() - before.keys():
        path.unlink()
    for path in sorted(project.rglob("*"), reverse=True):
        if path.is_dir() and not any(path.iterdir()) and path != project / "data":
            path.rmdir()
    lost = {p for p, content in before.items() if after.get(p) != content}
    for path in lost:  # for the next command
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(before[path])
    assert all(path.is_relative_to(project / "out") for path in lost), lost


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_command_line_is_read_or_refused(data):
    """The settings are only read here. Every key meets every kind of value."""
    script = data.draw(st.sampled_from(sorted(SETTINGS)))
    value = st.one_of(st.integers(), st.floats(), st.text(max_size=8), st.sampled_from(TEXTS + NUMBERS))
    args = [f"--{data.draw(st.sampled_from(sorted(KEYS[script])))}={data.draw(value)}" for _ in range(2)]
    with contextlib.suppress(UserError):
        configure(settings_of(script), args + data.draw(st.lists(st.text(max_size=10), max_size=1)))


def test_random_command_lines_succeed_or_end_in_one_line(project):
    for seed in range(60):
        with nothing_lost(project):
            ends_well(project, *random_command(seed))


# ---- records and tokenizers ------------------------------------------------------------------------------------------

TEXTS_AND_ODD = [
    st.text(max_size=5),
    st.sampled_from(["", "a", "half \ud83d"]),
    st.none(),
    st.booleans(),
    st.integers(),
]
VALUES = st.one_of(
    *TEXTS_AND_ODD,
    st.floats(),
    st.lists(st.one_of(st.none(), st.text(max_size=3)), max_size=2),
    st.dictionaries(st.text(max_size=3), st.none(), max_size=1),
    st.just([{"type": "text", "text": "a"}]),
    st.just([{"type": "image", "url": "a"}]),
)
NAMES = sorted({name for names in (*COLUMNS.values(), *FIELDS.values()) for name in names} | REFUSED | {"id", "text"})
MESSAGES = st.lists(
    st.one_of(
        VALUES,
        st.fixed_dictionaries(
            {"role": st.sampled_from([*ROLES, "tool", None]), "content": st.one_of(st.text(), VALUES)}
        ),
        st.dictionaries(st.sampled_from(NAMES), VALUES, max_size=4),
    ),
    max_size=5,
)
RECORDS = st.dictionaries(st.sampled_from(NAMES), st.one_of(VALUES, MESSAGES), max_size=4)


@settings(max_examples=500, deadline=None)
@given(RECORDS)
def test_any_record_is_read_or_refused_in_one_line(record):
    try:
        messages = read_messages(record)
    except UserError as e:
        assert str(e) and "\n" not in str(e)
        return
    assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2) and messages
    assert all(type(m.get(key, "")) is str for m in messages for key in ("content", "input", "system"))
    ids, is_response = encode_conversation(small_tokenizer(), messages, TEMPLATES["alpaca"])
    assert len(ids) == len(is_response)


SPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
PARTS = {
    "normalizer": [
        None, {"type": "NFC"}, {"type": "Lowercase"}, {"type": "Strip", "strip_left": True, "strip_right": True},
        {"type": "Prepend", "prepend": "▁"}, {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ],
    "pre_tokenizer": [
        None, SPACE, SPACE | {"prepend_scheme": "first"}, SPACE | {"prepend_scheme": "never"}, BYTES,
        BYTES | {"add_prefix_space": True},
    ],
    "decoder": [None, SPACE, SPACE | {"prepend_scheme": "never"}, {"type": "Fuse"}, BYTES],
    "post_processor": [None, BYTES | {"trim_offsets": False}],
}  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(st.fixed_dictionaries({part: st.sampled_from(values) for part, values in PARTS.items()}))
def test_any_tokenizer_is_one_that_others_agree_with_or_is_refused(tmp_path_factory, parts):
    path = tmp_path_factory.mktemp("tokenizer")
    try:
        tokenizer = Tokenizer(small_tokenizer().spec | parts)
    except ValueError as e:
        assert "\n" not in str(e)
        return
    for text in ("Once upon a time", " a fox", "a  b. ", "the\nend"):
        ids = tokenizer.encode(text).tolist()
        assert tokenizer.decode(ids) == "".join(tokenizer.decode([i]) for i in ids)
        assert tokenizer.decode(ids) in (text, text.lower())
    tokenizer.save(path)
    theirs = AutoTokenizer.from_pretrained(path)
    assert theirs("Once upon").input_ids == [tokenizer.bos, *tokenizer.encode("Once upon").tolist()]


# ---- files -----------------------------------------------------------------------------------------------------------

RESUME = ("train.py", [*TRAIN, "--init_from=resume", "--out_dir=out/base", "--max_iters=3"])
READ_BY = {  # a file: the commands that read it
    "data/fables/train.bin": [("train.py", TRAIN)],
    "data/fables/val.bin": [("train.py", [*TRAIN, "--init_from=out/base/best", "--eval_only=True"])],
    "data/fables/meta.json": [("train.py", TRAIN)],
    "data/fables/tokenizer.json": [("train.py", TRAIN)],
    "out/base/best/config.json": [("sample.py", SAMPLE)],
    "out/base/best/generation_config.json": [("sample.py", SAMPLE)],
    "out/base/best/tokenizer.json": [("sample.py", [*SAMPLE, "--start=Once"])],
    "out/base/best/tokenizer_config.json": [("sample.py", SAMPLE)],
    "out/base/best/model.safetensors": [("sample.py", SAMPLE)],
    "out/base/last/train_state.pt": [RESUME],
    "out/base/log.jsonl": [RESUME],
    "out/tuned/best/adapter_config.json": [("sample.py", [*SAMPLE, "--adapter=out/tuned/best", "--instruct=Hi"])],
    "out/tuned/best/adapter_model.safetensors": [("sample.py", [*SAMPLE, "--adapter=out/tuned/best"])],
    "out/tuned/best/instruct.json": [("sample.py", [*SAMPLE, "--adapter=out/tuned/best", "--instruct=Hi"])],
    "records.json": [("lora.py", [*LORA, "--out_dir=out/fuzzed"])],
    "chats.json": [("lora.py", [*LORA, "--data=chats.json", "--out_dir=out/fuzzed"])],
    **{file: [("prepare.py", [f"--dataset={file}", "--tokenizer=bpe:270", "--name=fuzzed"])]
       for file in ("text.txt", "text.jsonl", "text.jsonl.gz", "text.csv")},
}  # fmt: skip


def damage(path, rng):
    content = bytearray(path.read_bytes())
    how = rng.choice(["flip", "flip", "cut", "empty", "noise", "swap", "type", "type"])
    if how == "type" and path.suffix == ".json":
        path.write_text(json.dumps(retyped(json.loads(content), rng)))
        return
    if how == "flip":
        for _ in range(rng.randint(1, 4)):
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    elif how == "cut":
        content = content[: rng.randrange(len(content))]
    elif how == "empty":
        content = b""
    elif how == "noise":
        at = rng.randrange(len(content))
        content[at : at + 16] = rng.randbytes(16)
    else:  # a number or word of JSON is replaced
        text = content.decode("utf-8", "replace")
        words = [w for w in text.replace(",", " ").replace(":", " ").split()[:2000] if w.strip("{}[]")]
        if words:
            new = rng.choice(["null", "-1", "1e999", "[]", "{}", '"a"', "99999999999", "0", "true"])
            content = text.replace(rng.choice(words), new, 1).encode()
    path.write_bytes(content)


def retyped(value, rng):
    """Return the JSON value with one value in it, or all of it, replaced by another type."""
    if isinstance(value, dict | list) and value and rng.random() < 0.9:
        at = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        value[at] = retyped(value[at], rng)
        return value
    return rng.choice([None, [], {}, "x", -1, 0, 1.5, 1e308, True, [1, 2], {"a": {}}, [None], ["x"]])


def damage_one_file(project, file, seed):
    rng = random.Random(f"{file}/{seed}")
    path = project / file
    content = path.read_bytes()
    with nothing_lost(project):
        damage(path, rng)
        damaged = path.read_bytes()
        for script, args in READ_BY[file]:
            args = [*args, "--out_dir=out/fuzzed"] if script == "train.py" and "resume" not in str(args) else args
            ends_well(project, script, args)
        if path.exists() and path.read_bytes() == damaged:
            path.write_bytes(content)


@pytest.mark.parametrize("file", READ_BY)
def test_damaged_files_are_read_or_refused_in_one_line(project, file):
    for seed in range(6):
        damage_one_file(project, file, seed)


@pytest.mark.slow
def test_ten_minutes_of_damaged_files_and_random_command_lines(project):
    end, seed, runs = time.monotonic() + 600, 1000, 0
    while time.monotonic() < end:
        for file in READ_BY:
            damage_one_file(project, file, seed)
            runs += 1
        with nothing_lost(project):
            ends_well(project, *random_command(seed))
        seed += 1
    print(f"{runs} damaged files, {seed - 1000} random command lines")
