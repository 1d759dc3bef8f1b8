"""support/settings.py: the layers of settings, their mistakes, and --help."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass

import pytest
from conftest import HOME, fails, run_script, settings_of

from support.settings import UserError, configure, usage
from train import PretrainConfig


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


def test_the_later_layer_wins(tmp_path):
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
def test_values_get_the_type_of_their_field(arg, field, value):
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
def test_mistakes_are_reported(arg, message):
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
def test_mistakes_in_files_are_reported(tmp_path, text, message):
    file = tmp_path / "bad.py"
    file.write_text(text)
    with pytest.raises(UserError, match=message):
        settings(str(file))


@pytest.mark.parametrize("script", ["prepare.py", "train.py", "lora.py", "sample.py"])
def test_help_describes_every_field(script):
    text = run_script(HOME, script, "--help").stdout
    for line in text.splitlines():
        if line.startswith("  --"):
            assert re.search(r"[a-z]{4}", line.split("  ")[-1]), f"{script}: no comment on {line}"
    assert "--seed=" in text


def test_every_recipe_is_valid():
    for script, least in (("train.py", 4), ("lora.py", 3)):
        recipes = sorted((HOME / "config").glob(f"{script[:-3]}_*.py"))
        assert len(recipes) >= least
        for recipe in recipes:
            configure(settings_of(script), [str(recipe)])


def test_user_errors_end_in_one_line():
    assert "did you mean 'batch_size'" in fails(HOME, "train.py", "--batchsize=3")


def test_a_character_that_the_terminal_cannot_show_ends_no_run():
    """Windows writes `> log.txt` in an encoding with few characters. A run once died at its first sample."""
    code = "from support.settings import run; run(lambda: print('a → b'))"
    env = os.environ | {"PYTHONIOENCODING": "cp1252"}
    result = subprocess.run([sys.executable, "-c", code], cwd=HOME, env=env, capture_output=True, text=True)
    assert result.stdout.strip() == "a ? b"


def test_help_shows_inherited_settings_with_their_comments():
    from lora import TuneConfig

    text = usage([TuneConfig])
    assert "--momentum=0.95" in text and "decay of the mean gradient" in text  # from train.py
    assert text.count("--learning_rate") == 1 and "narrow models" in text  # from lora.py


def test_a_tilde_in_a_path_is_the_home_folder():
    """The shell leaves the ~ of --out_dir=~/x as it is, and a folder named ~ was made."""
    (cfg,) = configure([PretrainConfig], ["--dataset=~/a", "--compare=~/a,~/b", "--sample_prompt=~/a"])
    home = os.path.expanduser("~")
    assert (cfg.dataset, cfg.compare, cfg.sample_prompt) == (f"{home}/a", f"{home}/a,{home}/b", "~/a")
    with pytest.raises(UserError, match="sample_prompt is not UTF-8: caf"):
        configure([PretrainConfig], ["--sample_prompt=caf\udce9"])
