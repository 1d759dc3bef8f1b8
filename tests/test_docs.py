"""The documents: what their commands and links name exists, and the README stays short."""

import ast
import importlib
import re
import shlex
import tomllib
from typing import get_args, get_type_hints

import pytest
from conftest import HOME
from packaging.requirements import Requirement

from support.settings import UserError, coerce, literal, read_file

PAGES = [HOME / "README.md", *sorted((HOME / "docs").glob("*.md"))]
BLOCK = re.compile(r"(?ms)^```(\w+)\n(.*?)^```")


def commands(text):
    """The commands in a page's sh blocks, and those in `backticks` that begin with python or torchrun, as words."""
    lines = "\n".join(code for kind, code in BLOCK.findall(text) if kind == "sh").replace("\\\n", " ").splitlines()
    lines += re.findall(r"`((?:python|torchrun) [^`]+)`", " ".join(BLOCK.sub("", text).split()))
    return [shlex.split(part, comments=True) for line in lines for part in line.split(" && ")]


def settings_of(script):
    """{field: type} of the dataclasses that the script's run(main, ...) takes; none where it has no settings."""
    found = re.findall(r"run\(main, ([\w., ]+)\)", (HOME / script).read_text(encoding="utf-8"))
    module = importlib.import_module(script.removeprefix("tests/").removesuffix(".py")) if found else None
    classes = [getattr(module, name) for name in found[-1].split(", ")] if found else []
    return {name: (get_args(hint) or (hint,)) for cls in classes for name, hint in get_type_hints(cls).items()}


def check(command):
    """The script, config files and tests that a command names exist. Its flags are the script's settings, with values
    of their type or placeholders in capitals."""
    files = [word for word in command if word.endswith(".py") and "=" not in word]
    for file in files:
        assert (HOME / file).is_file(), f"no {file}"
    if not files or "-m" in command:
        return
    types = settings_of(files[0])
    for word in command[command.index(files[0]) + 1 :]:
        key, _, value = word.removeprefix("--").partition("=")
        values = read_file(HOME / word) if word in files else {key: literal(value)}
        for key, value in values.items():
            assert key in types, f"{files[0]} has no setting {key}"
            coerce(word, key, str(value) if str in types[key] else value, types[key] + (str,) * str(value).isupper())


def anchors(page):
    """Return the anchors of a page's headings, as GitHub forms them."""
    headings = re.findall(r"(?m)^#+ (.*)$", BLOCK.sub("", page.read_text(encoding="utf-8")))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# words of ours that readers had to guess, and the field's word for each
TRUE_NOW = "what is true now"
PRIVATE_WORDS = {
    r"\b[Uu]pdates? of \d": "step of", r"tokens an update": "tokens per step", r"\bmean gradient\b": "momentum buffer",
    r"\bmade again\b": "recomputed", r"\bone's own\b": "your own", r"\banew\b": "again", r"\bgoes by\b": "uses",
    r"\bwas the goal\b": TRUE_NOW, r"\bwas aimed at\b": TRUE_NOW, r"\bthe code of that day\b": TRUE_NOW,
    r"\btheirs comes nearer\b": "the gap narrows",
}  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_pages_are_narrow_and_use_the_words_of_the_field(page):
    """Code, tables and addresses may be wider than 120 columns."""
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for number, line in enumerate(text.splitlines(), 1):
        is_free = line.startswith("|") or "http" in line
        assert len(line) <= 120 or is_free, f"{page.name}, line {number}: {len(line)} columns"
    for word, better in PRIVATE_WORDS.items():
        assert not (found := re.search(word, text)), f"{page.name}: {found[0]!r}; write {better!r}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_and_links_name_what_exists(page):
    text = page.read_text(encoding="utf-8")
    for command in commands(text):
        try:
            check(command)
        except (AssertionError, UserError) as e:
            raise AssertionError(f"{page.name}: {shlex.join(command)}: {e}") from None
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", BLOCK.sub("", text)) if ":" not in link]
    missing = [link for link in links if not (page.parent / link).exists()]
    assert not missing, f"{page.name} links to {missing}"
    for target, anchor in re.findall(r"\]\(([\w./-]*)#([\w-]+)\)", BLOCK.sub("", text)):
        assert anchor in anchors(page.parent / target if target else page), (
            f"{page.name}: no heading #{anchor} in {target}"
        )
    for kind, code in BLOCK.findall(text):
        assert kind != "python" or ast.parse(code), code


def test_the_readme_is_short_and_has_both_lines_for_a_fresh_machine():
    lines = (HOME / "README.md").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 140
    first = "python3 -m venv .venv && . .venv/bin/activate && pip install -r requirements"
    assert sum(line.startswith((f"{first}.txt && python", f"{first}-dev.txt && python")) for line in lines) == 2


def pinned(file):
    """{package: version} of a requirements file, which pins each package exactly."""
    lines = (HOME / file).read_text(encoding="utf-8").splitlines()
    requirements = [Requirement(line) for line in lines if line[:1] not in "-#"]
    assert all(str(r.specifier).startswith("==") for r in requirements)
    return {r.name: str(r.specifier).removeprefix("==") for r in requirements}


def test_pyproject_allows_the_versions_that_requirements_txt_pins():
    """It once demanded exactly these versions, so that the project could not be installed beside others."""
    project = tomllib.loads((HOME / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    versions, ranges = pinned("requirements.txt"), list(map(Requirement, project["dependencies"]))
    assert versions.keys() == {r.name for r in ranges}
    for r in ranges:
        assert r.specifier.contains(versions[r.name]) and not r.specifier.contains("0.0.1"), r
        assert {"<", ">="} == {s.operator for s in r.specifier}, r
    dev = map(Requirement, project["optional-dependencies"]["dev"])
    assert {r.name: str(r.specifier).removeprefix("==") for r in dev} == pinned("requirements-dev.txt")


def test_the_table_of_mishaps_names_tests_that_exist():
    """A renamed test once left its row without a proof."""
    text = (HOME / "docs/robustness.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| ")][1:]
    for row in rows:
        files = re.findall(r"test_\w+\.py", row[2])
        names = re.findall(r"`(\w+)`", row[2])
        assert files or names, row
        for file in files:
            assert (HOME / "tests" / file).is_file(), row
        sources = {path: path.read_text(encoding="utf-8") for path in (HOME / "tests").glob("test_*.py")}
        for name in names:
            where = [path.name for path, source in sources.items() if re.search(rf"def test_\w*{name}", source)]
            assert where, f"{name}: no such test"
            assert set(where) & {*files, "test_faults.py"}, f"{name} is in {where}, the table says {files}"
