"""tests/gpu.py at toy size on the CPU: on the day a GPU is here, it must not be the script that fails."""

import json
import shutil
import subprocess
import sys
import time

import gpu
import pytest
from conftest import HOME, copy_project, run_outside

import train

COMMAND = ["tests/gpu.py", "--device=cpu", "--quick=True"]


def lines(project):
    file = project / "out/gpu/report.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines() if line] if file.exists() else []


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project in which a run was killed early, and run again."""
    path = copy_project(tmp_path_factory.mktemp("gpu"))
    (path / "tests").mkdir()
    for name in ("gpu.py", "benchmark.py"):
        shutil.copy(HOME / "tests" / name, path / "tests")
    first = subprocess.Popen([sys.executable, *COMMAND], cwd=path, stdout=subprocess.DEVNULL)
    while first.poll() is None and sum(e.get("status") == "started" for e in lines(path)) < 2:
        time.sleep(0.2)
    first.kill()
    first.wait()
    second = run_outside(path, COMMAND, timeout=900)
    assert second.returncode == 0, second.stdout + second.stderr
    return path


def test_every_part_runs_and_a_killed_run_goes_on(project):
    entries = lines(project)
    starts = [e["item"] for e in entries if e.get("status") == "started"]
    items = [item.name for item in gpu.plan(gpu.GpuConfig(device="cpu", quick=True))]
    assert starts == [items[0], items[1], *items[1:]]  # the one that was killed was done again, and no other
    ends = {e["item"]: e for e in entries if e.get("status", "started") != "started"}
    bad = [e for e in ends.values() if e["status"] != "ok" and not (e["status"] == "skipped" and e["reason"])]
    assert list(ends) == items and not bad, (bad, [f.read_text()[-2000:] for f in (project / "out/gpu/logs").iterdir()])


def test_the_report_has_a_table_for_each_part_and_the_curve(project):
    printed = run_outside(project, ["tests/gpu.py", "--report=out/gpu/report.jsonl"]).stdout
    for part in ("parity", "attention", "recipe", "decoding", "fables", "torchrun"):
        assert f"\n{part}\n\n| item |" in printed
    assert (project / "out/gpu/loss.png").stat().st_size > 10_000


def test_a_part_that_fails_is_reported_and_the_others_run(project):
    command = ["tests/gpu.py", "--device=cuda:99", "--quick=True", "--only=torchrun", "--out=out/failing"]
    printed = run_outside(project, command).stdout.splitlines()
    assert [line.split(" exit")[0] for line in printed[:2]] == ["torchrun: DDP: failed", "torchrun: FSDP: failed"]


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA RTX A4000", 77e12),
        ("NVIDIA GeForce RTX 4070 Ti SUPER", 88e12),
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
    ],
)
def test_a_gpu_is_known_by_whole_words_of_its_name(monkeypatch, name, flops):
    monkeypatch.setattr(train.torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(train.torch, "randn", lambda *args, **kwargs: 1 / 0)  # which the measured figure needs
    device = train.torch.device("cuda")
    if flops:
        assert train.peak_flops(device, train.torch.bfloat16) == flops
    else:
        with pytest.raises(ZeroDivisionError):
            train.peak_flops(device, train.torch.bfloat16)
