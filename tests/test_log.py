"""support/log.py: log.jsonl and its copies, the terminal, and the comparison of runs."""

import contextlib
import json
import math
import os
import re
import subprocess
import sys
import types
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, run_script

from model import Gemma, GemmaConfig
from support.log import RunLog, compare_runs, read_log
from support.runs import RunFolder, new_state
from support.settings import UserError

FLAGS = ["train.py", "--dataset=fables", *TINY]
STEP = {"event": "step", "step": 3, "train_loss": 1.5}


def test_events_that_others_added_stay_in_the_log(tmp_path):
    """Torn lines and damaged events of ours are left out."""
    kept = [
        STEP,
        {"event": "mine", "step": 3, "values": [1, {"a": None}]},
        {"event": "mine"},
        {"note": "without an event"},
        {"event": "eval", "step": 5, "val_loss": None},
    ]
    dropped = ['{"event": "step", "step": 4, "train_lo', "[1]", "3", '{"event": "step", "train_loss": 1.0}',
               '{"event": "mine", "step": "x"}', '{"event": "eval", "step": 5, "val_loss": "low"}', ""]  # fmt: skip
    lines = [json.dumps(entry) for entry in kept]
    (tmp_path / "log.jsonl").write_text("\n".join([*dropped, *lines, *dropped]))
    assert read_log(tmp_path / "log.jsonl") == kept


def test_a_resumed_run_keeps_the_events_that_others_added_up_to_its_step(fables_project):
    """Resuming once erased every event that the log did not know."""
    log = fables_project / "out/events/log.jsonl"
    run_script(fables_project, *FLAGS, "--out_dir=out/events", "--max_iters=5")
    before, mine = read_log(log), {"event": "mine", "step": 3, "values": {"a": [1, 2]}}
    with open(log, "a") as f:
        f.writelines(json.dumps(entry) + "\n" for entry in (mine, {"note": "no step"}, mine | {"step": 6}))
    run_script(fables_project, *FLAGS, "--out_dir=out/events", "--max_iters=7", "--init_from=resume")
    after = read_log(log)
    assert after[: len(before) + 2] == [*before, mine, {"note": "no step"}]
    assert [(e["event"], e["step"]) for e in after[len(before) + 2 :]] == [("step", 6), ("step", 7), ("eval", 7)]


def strict_json(text):
    """Parse JSON, and refuse NaN and Infinity, which Python's json would read."""
    return json.loads(text, parse_constant=lambda name: 1 / 0)


def test_nested_and_missing_metrics_reach_every_copy_of_the_log(tmp_path, monkeypatch):
    """A dict of metrics once broke the W&B copy. A NaN in it was no JSON."""
    sent = []
    run = SimpleNamespace(
        log=lambda numbers, step: sent.append((step, numbers)), finish=lambda: sent.append("finished")
    )  # fmt: skip
    wandb = types.ModuleType("wandb")
    wandb.init = lambda **settings: run
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config = GemmaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=1, head_dim=16, intermediate_size=32)
    state, folder = new_state(None, {}), RunFolder(tmp_path / "run", "scratch")
    device, more = torch.device("cpu"), {"a": {"b": 1.0, "c": math.nan}, "d": None}
    log = RunLog(folder, Gemma(config), state, device, torch.float32, max_iters=2, wandb=True)
    with log:
        state.step, state.tokens = 1, 16
        tokens = torch.zeros(1, 16, dtype=torch.int64)
        log.step((tokens, tokens), {"train_loss": 2.5, "lr": 1e-3, "grad_norm": 1.0, **more})
        log.evaluation({"val_loss": 2.0, "val_bpb": 1.0, **more}, "a line", "a sample")
    folder.raise_errors()
    entries = [strict_json(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [entry["event"] for entry in entries] == ["step", "eval"]
    metrics = strict_json((tmp_path / "run/summary.json").read_text())["metrics"]
    for found in (*entries, metrics):
        assert found["a"] == {"b": 1.0, "c": None} and found["d"] is None
    *numbers, finished = sent
    assert finished == "finished" and len(numbers) == 2
    for step, values in numbers:
        assert step == 1 and values.pop("a") == {"b": 1.0, "c": None}  # W&B calls it a.b
        assert all(type(value) in (int, float) and math.isfinite(value) for value in values.values()), values
    assert numbers[0][1]["train_loss"] == 2.5 and numbers[1][1]["val_loss"] == 2.0


def test_runs_are_compared(fables_project):
    for name in "ab":
        run_script(fables_project, *FLAGS, f"--out_dir=out/{name}", "--max_iters=5", "--learning_rate=0.01")
    printed = run_script(fables_project, "train.py", "--compare=out/a,out/b").stdout
    assert printed.count("bits per byte after 5 steps") == 2
    assert (fables_project / "out/compare.png").stat().st_size > 10_000
    assert "no evaluation" in run_script(fables_project, "train.py", "--compare=out/a,out/none", ok=False).stderr


def test_pretraining_and_tuning_are_not_compared(tmp_path):
    """Bits per byte and nats per token were once drawn on one axis."""
    for name, loss in (("pretrained", {"val_loss": 1.0, "val_bpb": 0.4}), ("tuned", {"val_loss": 1.0})):
        entry = {"event": "eval", "step": 0, "tokens": 0, "seconds": 0.0, "sample": "", **loss}
        (tmp_path / name).mkdir()
        (tmp_path / name / "log.jsonl").write_text(json.dumps(entry) + "\n")
    with pytest.raises(UserError, match="name one kind"):
        compare_runs([tmp_path / "pretrained", tmp_path / "tuned"])


def test_progress_stays_on_one_line_of_a_terminal(fables_project):
    pty = pytest.importorskip("pty")
    terminal, side = pty.openpty()
    command = [sys.executable, *FLAGS, "--out_dir=out/terminal", "--max_iters=3", "--eval_interval=1000"]
    process = subprocess.Popen(command, cwd=fables_project, stdout=side)
    os.close(side)
    shown = b""
    with contextlib.suppress(OSError):  # the other side is closed
        while piece := os.read(terminal, 4096):
            shown += piece
    assert process.wait() == 0
    assert re.search(rb"\x1b\[Kstep +1/3: [^\n]*\r\x1b\[Kstep +2/3: [^\n]*\r\x1b\[Kstep +3/3: ", shown), shown
