"""What several tests share."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

HOME = Path(__file__).parent.parent
SHARED = HOME.parent / "shared"  # development data: tests that read it skip where it is absent
if (SHARED / "tiktoken-cache").is_dir():
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(SHARED / "tiktoken-cache"))
os.environ["HF_HUB_OFFLINE"] = "1"  # no test waits for a network
if "PYTEST_XDIST_WORKER" in os.environ:  # a thread for each worker: two for each would wait for one another
    os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def tinystories():
    path = SHARED / "data" / "tinystories_v2_head.txt"
    if not path.exists():
        pytest.skip(f"{path} is not here")
    return path


@pytest.fixture
def needs_gpt2():
    """GPT-2's vocabulary in TIKTOKEN_CACHE_DIR, under the name tiktoken gives its download."""
    if not (Path(os.environ.get("TIKTOKEN_CACHE_DIR", "")) / "6d1cbeee0f20b3d9449abfede4726ed8212e3aee").exists():
        pytest.skip("GPT-2's vocabulary is not in TIKTOKEN_CACHE_DIR, and tests use no network")


def copy_project(path):
    """The scripts alone, in a folder of their own."""
    for name in ("model.py", "prepare.py", "train.py", "lora.py", "sample.py"):
        shutil.copy(HOME / name, path)
    shutil.copytree(HOME / "config", path / "config", ignore=shutil.ignore_patterns("__pycache__"))
    (path / "data").mkdir()
    for file in (HOME / "data").glob("fable_grammar.*"):
        shutil.copy(file, path / "data")
    return path


@pytest.fixture
def project(tmp_path):
    return copy_project(tmp_path)


def run_script(project, *args, ok=True, timeout=240):
    """Run `python args...` in the project's folder as a user would -> the finished process."""
    result = subprocess.run(
        [sys.executable, *map(str, args)], cwd=project, capture_output=True, text=True, timeout=timeout
    )
    assert not ok or result.returncode == 0, result.stdout + result.stderr
    return result


def fails(project, *args):
    """Run it; it must end with exit code 2 and one line on stderr -> that line."""
    result = run_script(project, *args, ok=False)
    lines = [line for line in result.stderr.splitlines() if line]
    assert result.returncode == 2 and len(lines) == 1, result.stdout + result.stderr
    return lines[0]


# a model and a batch small enough for any test
TINY = """
--hidden_size=32 --intermediate_size=64 --num_hidden_layers=3 --sliding_window_pattern=2 --num_attention_heads=2
--num_key_value_heads=1 --head_dim=16 --sliding_window=24 --max_position_embeddings=512 --block_size=64 --batch_size=4
--gradient_accumulation_steps=2 --warmup_iters=2 --eval_interval=5 --log_interval=1 --sample_tokens=8 --compile=False
--device=cpu
""".split()  # noqa: SIM905
