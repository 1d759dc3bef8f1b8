"""support/processes.py: several processes on this CPU, started by torchrun, take the same steps as one process."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import TINY, copy_project, losses, prepare_fables, run_script
from safetensors.torch import load_file

from support import processes
from support.files import latest_intact_dir
from support.log import read_log
from support.runs import read_state

RECIPE = ["--dataset=fables", *TINY, "--dtype=float32", "--max_iters=12", "--gradient_accumulation_steps=3",
          "--optimizer=adamw"]  # fmt: skip
WAYS = {"ddp": [], "fsdp": ["--fsdp=True"]}
LORA = ["--init_from=out/base/best", "--data=fables", "--max_records=60", "--num_checked=3", "--rank=4", "--device=cpu",
        "--max_length=500", "--max_tokens_per_batch=1500", "--compile=False", "--dtype=float32", "--log_interval=1",
        "--eval_interval=5", "--sample_tokens=5", "--num_samples=1", "--gradient_accumulation_steps=1",
        "--epochs=1", "--learning_rate=0.003", "--batch_size=6", "--merge=True"]  # fmt: skip


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    return prepare_fables(copy_project(tmp_path_factory.mktemp("project")), tokenizer="bpe:1000")


def torchrun(*args, processes=2):
    return ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", *args]


@pytest.fixture(scope="module")
def single(project):
    run_script(project, "train.py", *RECIPE, "--out_dir=out/single")
    return project / "out" / "single"


def agree(run, other):
    """Check that two runs have the same losses at the same steps and evaluations, within float32 rounding."""
    for event, key, rel in (("step", "train_loss", 1e-5), ("step", "grad_norm", 1e-3), ("eval", "val_loss", 1e-5)):
        a, b = ({e["step"]: e[key] for e in read_log(r / "log.jsonl") if e["event"] == event} for r in (run, other))
        assert a.keys() == b.keys() and list(a.values()) == pytest.approx(list(b.values()), rel=rel), (event, key)


@pytest.mark.parametrize("processes, way", [(2, "ddp"), slow(2, "fsdp"), slow(4, "ddp"), slow(4, "fsdp")])
def test_losses_are_those_of_one_process(project, single, processes, way):
    """With accumulation a step has 3 micro-batches of 4 rows, which neither 2 nor 4 processes can share as a whole."""
    out = f"out/{way}{processes}"
    run_script(project, *torchrun("train.py", *RECIPE, *WAYS[way], f"--out_dir={out}", processes=processes))
    agree(project / out, single)
    assert len(losses(project / out)) == 12
    files = {p.relative_to(single) for p in single.rglob("*")}
    assert {p.relative_to(project / out) for p in (project / out).rglob("*")} == files | {Path(".job")}
    ours, theirs = (load_file(run / "best" / "model.safetensors") for run in (single, project / out))
    assert {n: w.shape for n, w in ours.items()} == {n: w.shape for n, w in theirs.items()}


# these flags leave the defaults that all other tests here change: bfloat16, compiled, Muon
DEFAULTS = ["--dataset=fables", *(flag for flag in TINY if flag not in ("--compile=False", "--device=cpu")),
            "--num_hidden_layers=2"]  # fmt: skip


@pytest.mark.parametrize("way", WAYS)
def test_default_settings_train_and_tune_like_one_process(project, way):
    """FSDP once gathered bfloat16 weights, which sampling without autocast could not mix with its float32 cache. No
    test noticed the traceback at step 0, because all of them set float32. Its arithmetic is now that of one process."""
    tune = ["lora.py", "--init_from=out/defaults/best", "--data=fables", "--max_records=60", "--num_checked=6",
            "--max_iters=6", "--log_interval=1", "--sample_tokens=5", "--max_length=500", "--merge=True"]  # fmt: skip
    if not (project / "out" / "defaults").exists():
        run_script(project, "train.py", *DEFAULTS, "--max_iters=6", "--out_dir=out/defaults")
        run_script(project, *tune, "--out_dir=out/defaults-lora")
    run_script(project, *torchrun("train.py", *DEFAULTS, *WAYS[way], "--max_iters=6", f"--out_dir=out/defaults-{way}"))
    run_script(project, *torchrun(*tune, *WAYS[way], f"--out_dir=out/defaults-lora-{way}"))
    for name in ("defaults", "defaults-lora"):
        one, two = (losses(project / "out" / out) for out in (name, f"{name}-{way}"))
        assert [loss for _, loss in one] == pytest.approx([loss for _, loss in two], rel=2e-3), name
    for file in ("defaults-WAY/last/model", "defaults-lora-WAY/merged/model", "defaults-lora-WAY/best/adapter_model"):
        saved = load_file(project / "out" / f"{file.replace('WAY', way)}.safetensors")
        assert {str(w.dtype) for w in saved.values()} == {"torch.float32"}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_muon_takes_the_same_steps_too(project, way):
    """Muon computes in bfloat16, so its roundings are larger."""
    for out, launch in (("muon", list), (f"muon-{way}", lambda command: torchrun(*command, *WAYS[way]))):
        if not (project / "out" / out).exists():
            run_script(project, *launch(["train.py", *RECIPE, "--optimizer=muon", f"--out_dir=out/{out}"]))
    one, two = (losses(project / "out" / out) for out in ("muon", f"muon-{way}"))
    assert [loss for _, loss in one] == pytest.approx([loss for _, loss in two], rel=5e-5)


@pytest.mark.parametrize("before, after", [slow("ddp", None), (None, "fsdp"), slow("fsdp", "ddp")])
def test_a_checkpoint_resumes_on_any_number_of_processes(project, single, before, after):
    out = f"out/{before}-{after}"
    for way, more in ((before, "--eval_interval=5"), (after, "--init_from=resume")):
        command = ["train.py", *RECIPE, f"--out_dir={out}", more, *WAYS.get(way, [])]
        if more.startswith("--eval"):  # the run is cut off; its schedule is still that of 12 steps
            command = ["cut.py", *command[1:]]
            (project / "cut.py").write_text(
                "import sys, train\nfrom model import GemmaConfig\nfrom support.settings import Failure, run\n"
                "plain = train.optimizer_step\n"
                "calls = [0]\n"
                "def step(*args):\n    calls[0] += 1\n    if calls[0] == 8: raise Failure('cut')\n"
                "    return plain(*args)\n"
                "train.optimizer_step = step\nrun(train.main, train.PretrainConfig, train.TrainConfig, GemmaConfig)\n"
            )
            run_script(project, *(torchrun(*command) if way else command), ok=False)
            assert losses(project / out)[-1][0] == 7
        else:
            run_script(project, *(torchrun(*command) if way else command))
    agree(project / out, single)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_lora_in_two_processes(project, single, way):
    if not (project / "out" / "base").exists():
        os.symlink(single, project / "out" / "base")
        run_script(project, "lora.py", *LORA, "--out_dir=out/lora")
    out = f"out/lora-{way}"
    run_script(project, *torchrun("lora.py", *LORA, *WAYS[way], f"--out_dir={out}"))
    agree(project / out, project / "out" / "lora")
    for file in ("best/adapter_model.safetensors", "merged/model.safetensors"):
        ours, theirs = (load_file(project / run / file) for run in ("out/lora", out))
        assert ours.keys() == theirs.keys()
        assert all(ours[name].allclose(theirs[name], atol=1e-4) for name in ours)


def workers(process):
    """Return the process ids of the ranks that torchrun started."""
    found = subprocess.run(["ps", "--ppid", str(process.pid), "-o", "pid="], capture_output=True, text=True).stdout
    return list(map(int, found.split()))


def start(project, out, *more, restarts=0):
    command = torchrun("train.py", *RECIPE, "--max_iters=400", f"--out_dir={out}", *more)
    command.insert(3, f"--max-restarts={restarts}")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, *command], cwd=project, **pipes)


def wait_for_step(process, number):
    for line in process.stdout:
        if (found := re.match(r"step +(\d+)/", line)) and int(found[1]) >= number:
            return
    raise AssertionError(process.stderr.read())


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_killed_rank_ends_all_and_a_restart_continues(project, way):
    out = project / "out" / f"killed-{way}"
    process = start(project, out, *WAYS[way])
    wait_for_step(process, 12)
    killed_at = time.monotonic()
    os.kill(workers(process)[1], signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode and time.monotonic() - killed_at < 60
    assert "exitcode" in errors and "SIGKILL" in errors  # torchrun names the rank and the signal
    assert read_state(latest_intact_dir(out / "last"), None, {}, ()).step >= 10
    again = start(project, out, *WAYS[way], "--init_from=resume")
    wait_for_step(again, 20)
    again.send_signal(signal.SIGTERM)
    again.communicate(timeout=60)
    steps = [step for step, _ in losses(out)]
    assert steps == list(range(1, len(steps) + 1))


def test_torchrun_restarts_by_itself(project):
    out = project / "out" / "restarted"
    process = start(project, out, restarts=1)
    wait_for_step(process, 12)
    os.kill(workers(process)[0], signal.SIGKILL)
    wait_for_step(process, 20)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    steps = [step for step, _ in losses(out)]
    assert steps == list(range(1, len(steps) + 1)) and len(steps) >= 20
    assert not list(out.parent.glob("restarted-*")), "torchrun started a new run"


def test_a_signal_to_torchrun_saves_the_run(project):
    out = project / "out" / "signalled"
    process = start(project, out)
    wait_for_step(process, 7)
    process.send_signal(signal.SIGTERM)
    printed, errors = process.communicate(timeout=60)
    assert "to continue, run the same command with --init_from=resume" in printed, errors
    assert "forcefully exiting" not in errors
    step = read_state(out / "last", None, {}, ()).step
    assert step >= 7 and step % 5, "the run was saved at the signal, not at an evaluation"


def test_a_step_may_have_fewer_rows_than_there_are_processes(project):
    """A step has three micro-batches of one row. A process without a row computes one without labels."""
    flags = ["train.py", *RECIPE, "--batch_size=1", "--max_iters=6"]
    run_script(project, *flags, "--out_dir=out/few")
    run_script(project, *torchrun(*flags, "--out_dir=out/few2"))
    agree(project / "out" / "few2", project / "out" / "few")


def test_all_processes_stop_at_the_same_step(monkeypatch):
    """A signal can arrive while the processes ask each other. Then only one of them knows it. That process once
    stopped, and the other waited for it until torchrun killed both, about one time in four."""

    def interrupted_sum(tensor, _device):
        signals.receive(signal.SIGTERM, None)
        return tensor

    with processes.StopSignals("cpu") as signals, processes.StopSignals("cpu") as uninformed:
        monkeypatch.setattr(processes, "all_reduce_sum", interrupted_sum)
        assert not signals.stop_requested() and signals.received == signal.SIGTERM
        assert signals.stop_requested() and signals.stop_signal == signal.SIGTERM
        monkeypatch.setattr(processes, "all_reduce_sum", lambda tensor, _device: tensor + signal.SIGINT)
        assert uninformed.stop_requested() and uninformed.stop_signal == signal.SIGTERM


def test_signal_handlers_are_restored():
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    with processes.StopSignals("cpu") as signals:
        assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGINT) == signals.receive
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before
