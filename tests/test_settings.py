import ast
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
from conftest import HOME, fails, run_script

from config import UserError, configure


@dataclass
class Settings:
    count: int = 3  # how many
    rate: float = 0.1  # how fast
    name: str = "a"  # what it is called
    flag: bool = False  # whether
    limit: int | None = None  # at most

    def __post_init__(self):
        if self.count > 1000:
            raise ValueError(f"count={self.count} must be at most 1000")


@dataclass
class Other:
    width: int = 4  # how wide


def settings(*args):
    return configure([Settings, Other], args)


def test_layers_later_wins(tmp_path):
    file = tmp_path / "a.py"
    file.write_text("import math\n_half = 8\ncount = _half * 2\nrate = math.pi\nwidth = 9\n")
    mine, other = settings(str(file), "--count=5")
    assert (mine.count, round(mine.rate, 2), mine.name, other.width) == (5, 3.14, "a", 9)
    assert settings("--count=5", str(file))[0].count == 16


@pytest.mark.parametrize(
    "arg, field, value",
    [
        ("--count=1e3", "count", 1000),
        ("--rate=3", "rate", 3.0),
        ("--rate=3e-4", "rate", 3e-4),
        ("--name=1337", "name", "1337"),
        ("--name=a=b", "name", "a=b"),
        ("--name=", "name", ""),
        ("--flag=true", "flag", True),
        ("--flag=False", "flag", False),
        ("--limit=None", "limit", None),
        ("--limit=7", "limit", 7),
    ],
)
def test_values(arg, field, value):
    got = getattr(settings(arg)[0], field)
    assert got == value and type(got) is type(value)


@pytest.mark.parametrize(
    "arg, message",
    [
        ("--cuont=3", "did you mean 'count'"),
        ("--count=1001", "at most 1000"),
        ("--count=x", "count wants int, got 'x'"),
        ("--count=1.5", "wants int"),
        ("--count=True", "wants int"),
        ("--flag=1", "wants bool"),
        ("--limit=x", "wants int or None"),
        ("--count=-1", "must be at least 0"),
        ("--rate=nan", "wants float"),
        ("--rate=1e400", "and finite"),
        ("--count", "expected"),
        ("stray", "expected"),
        ("nowhere.py", "No such file"),
    ],
)
def test_mistakes(arg, message):
    with pytest.raises(UserError, match=message):
        settings(arg)


@pytest.mark.parametrize(
    "text, message",
    [
        ("counts = 3", "did you mean 'count'"),
        ("count = 'x'", "wants int"),
        ("count = (", "line 1"),
        ("\n\n1/0", "line 3: Zero"),
    ],
)
def test_mistakes_in_files(tmp_path, text, message):
    file = tmp_path / "bad.py"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        settings(str(file))


@pytest.mark.parametrize("script", ["prepare.py", "train.py", "lora.py", "sample.py"])
def test_help_describes_every_field(script):
    text = run_script(HOME, script, "--help").stdout
    for line in text.splitlines():
        if line.startswith("  --"):
            assert len(line.split("  ")[-1]) > 5, f"{script}: no comment on {line}"
    assert "--seed=" in text


def test_every_recipe_is_valid():
    from model import GemmaConfig
    from train import PretrainConfig, TrainConfig

    recipes = sorted((HOME / "config").glob("train_*.py"))
    assert len(recipes) >= 4
    for recipe in recipes:
        configure([PretrainConfig, TrainConfig, GemmaConfig], [str(recipe)])


def test_user_errors_end_in_one_line():
    assert "did you mean 'batch_size'" in fails(HOME, "train.py", "--batchsize=3")


def test_imports_form_a_line():
    """model and config import nothing of ours; the rest import only what stands before them."""
    order = ["config", "model", "prepare", "train", "lora", "sample"]
    allowed = {"config": [], "model": [], "prepare": ["config"], "train": ["config", "model", "prepare"]}
    allowed |= {"lora": ["config", "model", "prepare", "train"], "sample": order[:-1]}
    for name, ours in allowed.items():
        path = HOME / ("config/__init__.py" if name == "config" else f"{name}.py")
        if not path.exists():
            assert name == "lora"
            continue
        imports = {
            node.module if isinstance(node, ast.ImportFrom) else alias.name
            for node in ast.walk(ast.parse(path.read_text()))
            if isinstance(node, ast.Import | ast.ImportFrom)
            for alias in node.names
        }
        assert imports & set(order) <= set(ours), name


def test_top_level_holds_the_five_scripts_only():
    assert {p.name for p in HOME.glob("*.py")} <= {"model.py", "prepare.py", "train.py", "lora.py", "sample.py"}


def test_what_the_terminal_can_not_show_ends_no_run():
    """Windows writes `> log.txt` in an encoding of few characters: a run once died at its first sample."""
    code = "from config import run; run(lambda: print('a → b'))"
    env = os.environ | {"PYTHONIOENCODING": "cp1252"}
    result = subprocess.run([sys.executable, "-c", code], cwd=HOME, env=env, capture_output=True, text=True)
    assert result.stdout.strip() == "a ? b"
