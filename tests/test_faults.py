"""Faults of every kind, and what a run does then. Each row of docs/robustness.md has its test."""

import json
import os
import pickle
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import TINY, copy_project, fails, losses, one_line, prepare_fables, run_script
from safetensors.torch import load_file, save_file

from model import Gemma, GemmaConfig
from support.log import read_log
from support.runs import read_state

FLAGS = ["train.py", "--dataset=fables", *TINY, "--max_iters=20"]


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return prepare_fables(copy_project(tmp_path_factory.mktemp("project")), tokenizer="bpe:300")


@pytest.fixture(scope="module")
def whole(project):
    """A run without any fault."""
    run_script(project, *FLAGS, "--out_dir=out/whole")
    return project / "out" / "whole"


@pytest.fixture
def damaged(project, tmp_path):
    """A copy of the project, with its dataset, to damage."""
    shutil.copytree(project / "data", copy_project(tmp_path) / "data", dirs_exist_ok=True)
    return tmp_path


# ---- crashes and preemption ------------------------------------------------------------------------------------------

KILLER = """
import contextlib, os, random, shutil, signal, sys, time
from pathlib import Path
import torch
import train
from model import GemmaConfig
from support.files import latest_intact_dir
from support.log import read_log
from support.runs import open_model, read_state
from support.settings import run

kills, out, whole = int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3])
flags = [*sys.argv[4:], f"--out_dir={out}", "--eval_interval=2"]
torch.set_num_threads(1)
random.seed(0)

def losses(path):
    return [(e["event"], e["step"], e.get("train_loss", e.get("val_loss"))) for e in read_log(path / "log.jsonl")]

def child(*more):
    pid = os.fork()
    if pid == 0:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        sys.argv = ["train.py", *flags, *more]
        run(train.main, train.PretrainConfig, train.TrainConfig, GemmaConfig)
        os._exit(0)
    return pid

def saving():
    for path in [*out.glob("*.part"), *out.glob("*.replaced")]:
        with contextlib.suppress(FileNotFoundError):
            yield path.is_dir() and path.stat().st_ctime > started

killed = inside = finished = 0
while killed < kills or finished == 0:
    last = latest_intact_dir(out / "last")
    started = time.time()
    pid = child(*(["--init_from=resume"] if last.exists() else []))
    in_save = killed % 2 and killed < kills  # every other kill waits until a save has begun
    end = time.monotonic() + (random.uniform(0.1, 2.5) if killed < kills and not in_save else 600)
    done = 0
    while not done and time.monotonic() < end:
        time.sleep(0.001)
        done, status = os.waitpid(pid, os.WNOHANG)
        if in_save and any(saving()):
            break
    if done:
        assert status == 0, "a resumed run failed"
        assert losses(out) == losses(whole), "a resumed run differs from an uninterrupted one"
        assert [s for e, s, _ in losses(out) if e == "step"] == list(range(1, 21)), "a step is missing, or there twice"
        shutil.rmtree(out)
        finished += 1
        continue
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    killed += 1
    inside += any(saving())
    after = latest_intact_dir(out / "last")
    if last.exists() or after.exists():
        model = open_model(after, "cpu")
        read_state(after, None, {}, ())
        assert all(w.isfinite().all() for w in model.parameters())
print(f"{killed} kills, {inside} of them inside a save, {finished} finished runs")
"""


def kill_often(project, whole, kills, timeout):
    (project / "killer.py").write_text(KILLER)
    out = run_script(project, *FLAGS, "--out_dir=out/calm", "--eval_interval=2")
    flags = FLAGS[1:]
    out = run_script(project, "killer.py", kills, "out/killed", "out/calm", *flags, timeout=timeout).stdout
    print(out)
    assert f"{kills} kills" in out and " 0 of them inside a save" not in out


def test_a_run_resumes_after_it_was_killed_at_six_random_instants(project, whole):
    kill_often(project, whole, 6, 200)


@pytest.mark.slow
def test_a_run_resumes_after_it_was_killed_at_a_hundred_random_instants(project, whole):
    kill_often(project, whole, 100, 1200)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_prints_how_to_continue(project, whole, number):
    out = f"out/{number.name} with a space"
    process = subprocess.Popen(
        [sys.executable, *FLAGS, f"--out_dir={out}"], cwd=project, stdout=subprocess.PIPE, text=True
    )
    for line in process.stdout:
        if line.startswith("step     7"):
            process.send_signal(number)
            break
    printed = process.stdout.read()
    assert process.wait(60) == 128 + number
    last_line = printed.splitlines()[-1]
    assert last_line.startswith("stopped after step") and last_line.endswith("with --init_from=resume")
    assert f"{number.name}: saving, then stopping" in printed
    run_script(project, *FLAGS, f"--out_dir={out}", "--init_from=resume")
    assert losses(project / out) == losses(whole)
    seconds = [entry["seconds"] for entry in read_log(project / out / "log.jsonl")]
    assert seconds == sorted(seconds)


def test_ctrl_c_saves_even_if_it_also_ends_the_reader_of_the_output(project):
    """With `python train.py | tee log.txt` in a terminal, Ctrl-C goes to both programs."""
    log, command = project / "tee.txt", shlex.join([sys.executable, *FLAGS, "--out_dir=out/tee"])
    flags = "--max_iters=2000 --eval_interval=2000"
    shell = ["bash", "-c", f"trap : INT; {command} {flags} | tee {log.name}"]
    process = subprocess.Popen(shell, cwd=project, stdout=subprocess.DEVNULL, start_new_session=True)
    while not (log.exists() and "step     7" in log.read_text()):
        assert process.poll() is None
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    process.wait(60)
    assert read_state(project / "out" / "tee" / "last", None, {}, ()).step >= 7


def run_patched(project, patch, out):
    """Run train.py after some code that replaces a part of it."""
    head = "import train, os, signal\nfrom model import GemmaConfig\nfrom support.settings import run\n"
    main = "run(train.main, train.PretrainConfig, train.TrainConfig, GemmaConfig)\n"
    (project / "patched.py").write_text(head + patch + main)
    return run_script(project, "patched.py", *FLAGS[1:], f"--out_dir={out}", ok=False)


def test_a_signal_during_the_last_evaluation_stops_the_run(project):
    """lora.py once reported a loss of 0 then, the mean of an evaluation that was cut off."""
    patch = (
        "plain = train.RunFolder.save\n"
        "def save(self, name, save_model, model, state=None, optimizers=None):\n"
        "    if state and state.step == 20: os.kill(os.getpid(), signal.SIGTERM)\n"
        "    plain(self, name, save_model, model, state, optimizers)\n"
        "train.RunFolder.save = save\n"
    )
    result = run_patched(project, patch, "out/late")
    assert result.returncode == 128 + signal.SIGTERM and "stopped after step 20" in result.stdout


def test_a_second_ctrl_c_quits_at_once(project):
    patch = (
        "def slow(*_):\n    os.kill(os.getpid(), 2); os.kill(os.getpid(), 2)\ntrain.Pretraining.micro_batches = slow\n"
    )
    assert one_line(run_patched(project, patch, "out/twice"), 130).endswith("interrupted")


def test_a_torn_log_line_is_repaired(project, whole):
    run = project / "out" / "torn"
    shutil.copytree(whole, run)
    text = (run / "log.jsonl").read_text()
    (run / "log.jsonl").write_text(text + '{"event": "step", "step": 21, "train_lo')
    run_script(project, *FLAGS, "--out_dir=out/torn", "--init_from=resume", "--max_iters=22")
    assert [step for step, _ in losses(run)] == list(range(1, 23))


# ---- disks -----------------------------------------------------------------------------------------------------------


def limited(project, size, *args):
    """Run a script that cannot write a file larger than `size` bytes."""

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return subprocess.run(
        [sys.executable, *args], cwd=project, capture_output=True, text=True, timeout=240, preexec_fn=limit
    )


def test_a_disk_too_full_for_the_first_checkpoint_ends_the_run(project):
    line = one_line(limited(project, 20_000, *FLAGS, "--out_dir=out/full"), 1)  # loss.png needs more, too
    assert "out/full/last: not saved" in line and "MB needed" in line and "MB free" in line
    assert not list((project / "out" / "full").glob("*.part"))


def test_a_disk_that_fills_up_costs_no_training(project, whole):
    run = project / "out" / "fills"
    run_script(project, *FLAGS, "--out_dir=out/fills", "--max_iters=5", "--warmup_iters=2")
    before = load_file(run / "last" / "model.safetensors")
    result = limited(project, 30_000, *FLAGS, "--out_dir=out/fills", "--init_from=resume")
    assert "writes failed" in one_line(result, 1)
    assert result.stdout.count("training goes on") >= 3 and "the previous checkpoint is intact" in result.stdout
    assert "step    20/20" in result.stdout
    after = load_file(run / "last" / "model.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    run_script(project, *FLAGS, "--out_dir=out/fills", "--init_from=resume")  # the disk has room again
    assert [step for step, _ in losses(run)] == list(range(1, 21))


def test_prepare_on_a_full_disk_ends_in_one_line(project):
    result = limited(
        project, 5_000, "prepare.py", "--dataset=fables", "--max_documents=300", "--name=full", "--tokenizer=bpe:300"
    )
    assert "File too large" in one_line(result, 1)
    assert not (project / "data" / "full").exists()


def test_an_out_dir_that_cannot_be_made_is_one_line(project):
    (project / "a_file").write_text("")
    result = run_script(project, *FLAGS, "--out_dir=a_file/run", ok=False)
    assert "a_file" in one_line(result, 1)


WANDB = """
from pathlib import Path
class Run:
    def __init__(self): self.lines = []
    def log(self, numbers, step): self.lines.append(step)
    def finish(self): Path("wandb.txt").write_text(f"{len(self.lines)} lines")
def init(**settings): return Run()
"""


@pytest.mark.parametrize("torchrun", [False, True])
def test_the_copy_of_the_log_in_wandb_is_closed(damaged, torchrun):
    """Under torchrun the process ends with os._exit. The W&B run was once never finished then."""
    (damaged / "wandb.py").write_text(WANDB)
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"] if torchrun else []
    run_script(damaged, *launcher, "./train.py", *FLAGS[1:], "--out_dir=out/wandb", "--max_iters=6", "--wandb=True")
    assert (damaged / "wandb.txt").read_text() == "9 lines"  # six steps, three evaluations


# ---- numbers ---------------------------------------------------------------------------------------------------------


def poisoned(project, steps, out):
    """Train a run whose loss is NaN at these steps, counted from 1."""
    code = (
        "import math, sys, train\nfrom model import GemmaConfig\nfrom support.settings import run\n"
        f"bad, calls = {steps!r}, [0]\nplain = train.wrap_ddp\n"
        "def wrap(model, fsdp):\n"
        "    forward = plain(model, fsdp)\n"
        "    def poisoned(x, y, reduction):\n"
        "        calls[0] += 1\n"
        "        return forward(x, y, reduction=reduction) * (math.nan if (calls[0] + 1) // 2 in bad else 1)\n"
        "    return poisoned\n"
        "train.wrap_ddp = wrap\n"
        "run(train.main, train.PretrainConfig, train.TrainConfig, GemmaConfig)\n"
    )
    (project / "poisoned.py").write_text(code)
    return run_script(project, "poisoned.py", *FLAGS[1:], f"--out_dir=out/{out}", ok=False)


def test_a_step_that_is_not_finite_is_skipped(project):
    assert poisoned(project, [3, 4, 9], "nan").returncode == 0
    entries = read_log(project / "out" / "nan" / "log.jsonl")
    assert [e["step"] for e in entries if e["event"] == "skipped"] == [3, 4, 9]
    seen = {e["step"]: e["train_loss"] for e in entries if e["event"] == "step"}
    assert seen[3] is None and seen[20] < seen[1] - 0.3
    weights = load_file(project / "out" / "nan" / "last" / "model.safetensors")
    assert all(w.isfinite().all() for w in weights.values())


def test_five_in_a_row_end_the_run_and_leave_a_whole_checkpoint(project):
    line = one_line(poisoned(project, list(range(8, 99)), "nans"), 1)
    assert "5 steps in a row" in line and "checkpoint is out/nans/last" in line and "lower learning_rate" in line
    assert read_state(project / "out" / "nans" / "last", None, {}, ()).step == 10
    model = Gemma.from_pretrained(project / "out" / "nans" / "last")
    assert all(w.isfinite().all() for w in model.parameters())


# ---- data, found at start --------------------------------------------------------------------------------------------


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def truncate(path, size):
    with open(path, "r+b") as f:
        f.truncate(size)


def out_of_vocabulary(data):
    tokens = np.fromfile(data / "train.bin", dtype=np.uint16)
    tokens[1000] = 777
    tokens.tofile(data / "train.bin")


def shortened(data, split, tokens):
    truncate(data / f"{split}.bin", 2 * tokens)
    meta = json.loads((data / "meta.json").read_text())
    edit_json(data / "meta.json", **{split: meta[split] | {"tokens": tokens}})


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda data: truncate(data / "train.bin", 1001), "bytes, the file has 1001"),
        (lambda data: truncate(data / "val.bin", 0), "val.bin are"),
        (out_of_vocabulary, "train.bin: token 1000 is 777, beyond the vocabulary of 300"),
        (lambda data: edit_json(data / "meta.json", vocab_size=301), "tokenizer.json has 300"),
        (lambda data: (data / "meta.json").write_text("{"), "meta.json does not match the files beside it"),
        (lambda data: (data / "val.bin").unlink(), "No such file"),
        (lambda data: shortened(data, "train", 63), "63 tokens, fewer than block_size=64"),
        (lambda data: shortened(data, "val", 0), "no tokens in val"),
        (lambda data: os.rename(data, data.with_name("fables.part")), "its preparation was interrupted"),
        (lambda data: (data / "tokenizer.json").write_text("[]"), "not a tokenizer.json"),
    ],
)
def test_a_damaged_dataset_is_found_at_start(damaged, damage, message):
    damage(damaged / "data" / "fables")
    assert message in fails(damaged, *FLAGS)
    assert not (damaged / "out").exists()


# ---- settings --------------------------------------------------------------------------------------------------------


def resume(project, whole, *args):
    run = project / "out" / "resumed"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(whole, run)
    return run, [*FLAGS, "--out_dir=out/resumed", "--init_from=resume", *args]


@pytest.mark.parametrize(
    "args, message",
    [
        (["--hidden_size=64"], "hidden_size=64: the model in out/resumed/last has 32"),
        (["--vocab_size=512"], "vocab_size=512"),
        (["--sliding_window=32"], "sliding_window=32"),
        (["--optimizer=adamw"], "optimizer=adamw: the run in out/resumed/last has muon"),
        (["--fsdp=True"], "torchrun"),
    ],
)
def test_a_resumed_run_cannot_change_its_model_or_optimizer(project, whole, args, message):
    run, command = resume(project, whole, *args)
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    assert message in fails(project, *command)
    assert before == {p: p.stat().st_mtime_ns for p in run.rglob("*")}


def test_a_changed_schedule_is_printed(project, whole):
    _, command = resume(project, whole, "--max_iters=22", "--learning_rate=0.001")
    printed = run_script(project, *command).stdout
    assert "max_iters 20 -> 22" in printed and "learning_rate 0.003 -> 0.001" in printed


def test_a_dataset_with_another_tokenizer_is_refused(project, whole):
    run_script(
        project, "prepare.py", "--dataset=fables", "--max_documents=300", "--tokenizer=bpe:290", "--name=another"
    )
    _, command = resume(project, whole, "--dataset=another")
    assert "dataset and model have different tokenizers" in fails(project, *command)


def test_another_dataset_under_the_same_name_is_refused(damaged):
    """The dataset is prepared again from other text, with the same tokenizer. A resumed run once continued with the
    other rows."""
    run_script(damaged, *FLAGS, "--out_dir=out/run", "--max_iters=5")
    data = damaged / "data" / "fables"
    meta = json.loads((data / "meta.json").read_text())
    edit_json(data / "meta.json", fingerprint="another")
    command = [*FLAGS, "--out_dir=out/run", "--init_from=resume", "--max_iters=6"]
    assert "another dataset" in fails(damaged, *command)
    edit_json(data / "meta.json", fingerprint=meta["fingerprint"])
    run_script(damaged, *command)


def test_out_of_memory_names_what_to_lower(project):
    def limit():
        resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))

    flags = [*FLAGS, "--out_dir=out/large", "--batch_size=60000", "--eval_tokens=1", "--block_size=512"]
    result = subprocess.run(
        [sys.executable, *flags], cwd=project, capture_output=True, text=True, timeout=240, preexec_fn=limit
    )
    assert "lower batch_size" in one_line(result, 1)


# ---- trust -----------------------------------------------------------------------------------------------------------


class Bomb:
    def __reduce__(self):
        return os.system, ("touch exploded",)


def test_loading_a_checkpoint_runs_no_code_of_its_maker(project, whole):
    run, command = resume(project, whole)
    with open(run / "last" / "train_state.pt", "wb") as f:
        pickle.dump(Bomb(), f)
    assert "cannot be read by this version" in fails(project, *command)
    torch.save({"step": Bomb()}, run / "last" / "train_state.pt")
    assert "cannot be read by this version" in fails(project, *command)
    assert not (project / "exploded").exists()


def test_sizes_are_checked_before_memory_is_taken(project, whole):
    run, _ = resume(project, whole)
    flags = ["sample.py", "--model=out/resumed/best", "--device=cpu"]
    edit_json(run / "best" / "config.json", hidden_size=2**30)
    assert "the config asks for" in fails(project, *flags)
    edit_json(run / "best" / "config.json", num_hidden_layers=2**30)
    assert "more than any Gemma 3" in fails(project, *flags)


def test_an_adapter_whose_rank_its_file_does_not_have_is_refused(project, whole):
    run, _ = resume(project, whole)
    adapter = run / "adapter"
    adapter.mkdir()
    about = {"peft_type": "LORA", "r": 2**30, "lora_alpha": 8, "target_modules": ["q_proj"],
             "base_model_name_or_path": "out/resumed/best"}  # fmt: skip
    (adapter / "adapter_config.json").write_text(json.dumps(about))
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({name: torch.zeros(4, 32)}, adapter / "adapter_model.safetensors")
    assert "not of rank" in fails(project, "sample.py", "--adapter=out/resumed/adapter", "--device=cpu")


# ---- sampling --------------------------------------------------------------------------------------------------------


def test_nan_logits_end_generation(project, whole):
    run, _ = resume(project, whole)
    weights = load_file(run / "best" / "model.safetensors")
    weights["model.norm.weight"][3] = torch.nan
    save_file(weights, run / "best" / "model.safetensors", metadata={"format": "pt"})
    for temperature in (0, 1):
        flags = ["sample.py", "--model=out/resumed/best", "--device=cpu", f"--temperature={temperature}"]
        assert "logits are NaN" in one_line(run_script(project, *flags, ok=False), 1)


def test_a_top_k_above_the_vocabulary_keeps_all_tokens(project, whole):
    flags = ["--model=out/whole/best", "--device=cpu", "--max_new_tokens=5"]
    printed = run_script(project, "sample.py", *flags, "--top_k=9999").stdout
    assert "[5 tokens" in printed


def test_generation_with_a_float16_overflow_is_an_error():
    """A model whose numbers are too large for its dtype computes NaN, and must not return a token."""
    config = GemmaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, head_dim=16, intermediate_size=64)
    model = Gemma(config).init_weights(0)
    model.model.embed_tokens.weight.data *= 1e38
    with pytest.raises(FloatingPointError):
        list(model.half().generate(torch.ones(1, 3, dtype=torch.int64), 2))
