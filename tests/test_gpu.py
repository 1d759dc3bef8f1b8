"""tests/gpu.py at toy size on the CPU, so that the script does not fail on the day a GPU is here."""

import json
import shutil
import subprocess
import sys
import time

import gpu
import pytest
from conftest import HOME, copy_project, run_outside

COMMAND = ["tests/gpu.py", "--device=cpu", "--quick=True"]


def lines(project):
    file = project / "out/gpu/report.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines() if line] if file.exists() else []


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A project in which tests/gpu.py was killed early, and then run again."""
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


def test_every_part_runs_and_a_killed_run_continues(project):
    entries = lines(project)
    starts = [e["item"] for e in entries if e.get("status") == "started"]
    items = [item.name for item in gpu.plan(gpu.GpuConfig(device="cpu", quick=True))]
    assert starts == [items[0], items[1], *items[1:]]  # the killed item ran again, and no other
    ends = {e["item"]: e for e in entries if e.get("status", "started") != "started"}
    bad = [e for e in ends.values() if e["status"] != "ok" and not (e["status"] == "skipped" and e["reason"])]
    assert list(ends) == items and not bad, (bad, [f.read_text()[-2000:] for f in (project / "out/gpu/logs").iterdir()])


def test_the_report_has_a_table_for_each_part_and_draws_the_loss(project):
    printed = run_outside(project, ["tests/gpu.py", "--report=out/gpu/report.jsonl"]).stdout
    for part in ("parity", "attention", "recipe", "decoding", "fables", "torchrun"):
        assert f"\n{part}\n\n| item |" in printed
    assert (project / "out/gpu/loss.png").stat().st_size > 10_000


def test_a_failed_part_is_reported_and_the_others_run(project):
    command = ["tests/gpu.py", "--device=cuda:99", "--quick=True", "--only=torchrun", "--out=out/failing"]
    printed = run_outside(project, command).stdout.splitlines()
    assert [line.split(" exit")[0] for line in printed[:2]] == ["torchrun: DDP: failed", "torchrun: FSDP: failed"]
