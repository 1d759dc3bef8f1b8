"""Random command lines and damaged files: a script ends well, or with one line and exit code 1 or 2. Never a traceback.

python -m pytest -n 0 -m slow tests/test_fuzz.py        # ten minutes of it
"""

import contextlib
import io
import json
import os
import random
import shutil
import sys
import time

import pytest
from conftest import TINY, copy_project, run_script
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import config
import lora
import prepare
import sample
import train
from model import GemmaConfig

SCRIPTS = {
    "train.py": (train.main, train.PretrainConfig, train.TrainConfig, GemmaConfig),
    "lora.py": (lora.main, lora.LoraConfig, train.TrainConfig),
    "sample.py": (sample.main, sample.SampleConfig),
    "prepare.py": (prepare.main, prepare.PrepareConfig),
}
TRAIN = ["--dataset=fables", *TINY, "--max_iters=2", "--eval_interval=2", "--sample_tokens=2", "--eval_tokens=100"]
SAMPLE = ["--device=cpu", "--max_new_tokens=3"]
LORA = ["--init_from=out/base/best", "--data=records.json", "--device=cpu", "--compile=False", "--max_records=6",
        "--val_fraction=0.5", "--sample_tokens=2", "--num_samples=1", "--max_length=200", "--rank=2"]  # fmt: skip


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project with a dataset, a run, an adapter and records, in which these tests run the scripts in-process."""
    path = copy_project(tmp_path_factory.mktemp("project"))
    run_script(
        path, "prepare.py", "--dataset=fables", "--max_documents=60", "--val_fraction=0.1", "--tokenizer=bpe:280"
    )
    run_script(path, "train.py", *TRAIN, "--out_dir=out/base")
    records = [{"instruction": f"Say {i}.", "input": "", "output": f"It is {i}."} for i in range(12)]
    (path / "records.json").write_text(json.dumps(records))
    (path / "text.txt").write_text("A text.\n<|endoftext|>\nAnother.\n" * 20)
    run_script(path, "lora.py", *LORA, "--out_dir=out/tuned")
    return path


@contextlib.contextmanager
def standing_in(project):
    before, data = os.getcwd(), (prepare.DATA, train.DATA)
    os.chdir(project)
    prepare.DATA = train.DATA = project / "data"
    try:
        yield
    finally:
        os.chdir(before)
        prepare.DATA, train.DATA = data


def outcome(script, args):
    """Run a script's main in this process as its main guard would -> (exit code, its lines on stderr)."""
    argv, errors = sys.argv, io.StringIO()
    sys.argv, code = [script, *args], 0
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(errors):
            config.run(*SCRIPTS[script])
    except SystemExit as e:
        code = e.code or 0
    finally:
        sys.argv = argv
    lines = [line for line in errors.getvalue().splitlines() if line.startswith(script)]
    return code, lines


def ends_well(script, args):
    code, lines = outcome(script, args)
    assert code in (0, 1, 2), (script, args, code)
    assert bool(code) == (len(lines) == 1), (script, args, code, lines)


# ----------------------------------------------------------------------------------------------------------------------
# command lines

KEYS = {
    script: sorted({name for cls in classes for name in cls.__dataclass_fields__})
    for script, (_, *classes) in SCRIPTS.items()
}
VALUES = st.one_of(
    st.integers(-3, 70),
    st.floats(allow_nan=True, allow_infinity=True),
    st.sampled_from(["", "None", "True", "False", "[1]", "{}", "1e400", "-", "fables", "auto", "gpt2", "out/base/best",
                     "out/tuned/best", "text.txt", "records.json", "..", "/", "\x00", "0x10", "1_0", "'", "9" * 50]),
    st.text(max_size=8),
)  # fmt: skip
# these reach outside, take long by their nature, or ask for another machine
LEFT_ALONE = {"interactive", "compile", "wandb", "tensorboard", "max_iters", "epochs", "num_checked", "max_records",
              "max_documents", "num_samples", "max_new_tokens", "sample_tokens", "device", "out_dir", "name",
              "export_gguf", "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "head_dim",
              "vocab_size", "gradient_accumulation_steps", "batch_size", "block_size", "rank",
              "max_length"}  # fmt: skip


BASE = {
    "train.py": [*TRAIN, "--out_dir=out/fuzzed"],
    "sample.py": SAMPLE,
    "lora.py": [*LORA, "--out_dir=out/fuzzed"],
    "prepare.py": ["--dataset=text.txt", "--tokenizer=bpe:270", "--name=fuzzed"],
}


@st.composite
def command_lines(draw):
    script = draw(st.sampled_from(sorted(SCRIPTS)))
    keys = [key for key in KEYS[script] if key not in LEFT_ALONE]
    chosen = draw(st.lists(st.sampled_from(keys), min_size=1, max_size=3))
    args = [f"--{key}={draw(VALUES)}" for key in chosen]
    args += draw(st.lists(st.text(max_size=6), max_size=1))
    return script, BASE[script] + args


def clean(project):
    for path in [*(project / "out").glob("fuzzed*"), *(project / "data").glob("fuzzed*")]:
        shutil.rmtree(path)


@settings(max_examples=100, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_any_command_line_is_read_or_refused(data):
    """Reading alone: every key, every value."""
    script = data.draw(st.sampled_from(sorted(SCRIPTS)))
    args = [f"--{data.draw(st.sampled_from(KEYS[script]))}={data.draw(VALUES)}" for _ in range(2)]
    with contextlib.suppress(config.UserError):
        config.configure(SCRIPTS[script][1:], args + data.draw(st.lists(st.text(max_size=10), max_size=1)))


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(command=command_lines())
def test_random_command_lines(project, command):
    with standing_in(project):
        ends_well(*command)
    clean(project)


# ----------------------------------------------------------------------------------------------------------------------
# files

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
    "text.txt": [("prepare.py", ["--dataset=text.txt", "--tokenizer=bpe:270", "--name=fuzzed"])],
}  # fmt: skip


def damage(path, rng):
    content = bytearray(path.read_bytes())
    how = rng.choice(["flip", "flip", "cut", "empty", "noise", "swap"])
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
    else:  # a number or word of JSON becomes another
        text = content.decode("utf-8", "replace")
        words = [w for w in text.replace(",", " ").replace(":", " ").split()[:2000] if w.strip("{}[]")]
        if words:
            new = rng.choice(["null", "-1", "1e999", "[]", "{}", '"a"', "99999999999", "0", "true"])
            content = text.replace(rng.choice(words), new, 1).encode()
    path.write_bytes(content)


def damage_one_file(project, file, seed):
    rng = random.Random(f"{file}/{seed}")
    path = project / file
    kept = project / "kept"
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(project / "out", kept / "out")
    content = path.read_bytes()
    damage(path, rng)
    try:
        with standing_in(project):
            for script, args in READ_BY[file]:
                args = [*args, "--out_dir=out/fuzzed"] if script == "train.py" and "resume" not in str(args) else args
                ends_well(script, args)
    finally:
        clean(project)
        shutil.rmtree(project / "out")
        shutil.copytree(kept / "out", project / "out")
        path.write_bytes(content)


@pytest.mark.parametrize("file", READ_BY)
def test_damaged_files(project, file):
    for seed in range(6):
        damage_one_file(project, file, seed)


@pytest.mark.slow
def test_ten_minutes_of_damage(project):
    end, seed, runs = time.monotonic() + 600, 1000, 0
    while time.monotonic() < end:
        for file in READ_BY:
            damage_one_file(project, file, seed)
            runs += 1
        command = random_command(seed)
        with standing_in(project):
            ends_well(*command)
        clean(project)
        seed += 1
    print(f"{runs} damaged files, {seed - 1000} random command lines")


def random_command(seed):
    """A command line of command_lines(), without hypothesis' bookkeeping."""
    rng = random.Random(seed)
    script = rng.choice(sorted(SCRIPTS))
    keys = [key for key in KEYS[script] if key not in LEFT_ALONE]
    odd = ["", "None", "True", "[1]", "1e400", "-1", "0", "3", "0.5", "nan", "inf", "fables", "auto",
           "out/base/best", "..", "text.txt", "x" * 300]  # fmt: skip
    return script, BASE[script] + [f"--{rng.choice(keys)}={rng.choice(odd)}" for _ in range(2)]
