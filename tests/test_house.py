"""The house rules: how long the files may be, and which file may import which."""

import ast

import pytest
from conftest import HOME

SCRIPTS = ["model", "prepare", "train", "lora", "sample"]
ROOMS = sorted(path.stem for path in (HOME / "support").glob("*.py") if path.stem != "__init__")
MAX_LINES = {"model.py": 750, "prepare.py": 700, "train.py": 600, "lora.py": 700, "sample.py": 700}
MAX_LINES_OF_A_ROOM = 250
MAX_LINES_TOGETHER = 4245


def path_of(module):
    """Return the file of a script, such as "train", or of a room, such as "support.log"."""
    return HOME / f"{module.replace('.', '/')}.py"


def count_lines(path):
    return len(path.read_text(encoding="utf-8").splitlines())


def our_imports(module):
    """Return the scripts and rooms that a module imports, at its top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path_of(module).read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: write the whole name of {node.module}"
            found |= {f"support.{name.name}" for name in node.names} if node.module == "support" else {node.module}
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
    return {name for name in found if name.partition(".")[0] in (*SCRIPTS, "support")}


def test_the_top_level_holds_the_five_scripts_only():
    assert {path.name for path in HOME.glob("*.py")} == {f"{name}.py" for name in SCRIPTS}


@pytest.mark.parametrize("name", MAX_LINES)
def test_a_script_can_be_read_in_one_sitting(name):
    assert count_lines(HOME / name) <= MAX_LINES[name]


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_has_one_job(room):
    """A room that grows beyond this has two jobs."""
    assert count_lines(HOME / "support" / f"{room}.py") <= MAX_LINES_OF_A_ROOM


def test_all_together_stay_small():
    files = [*(HOME / name for name in MAX_LINES), *(HOME / "support").glob("*.py")]
    assert sum(map(count_lines, files)) <= MAX_LINES_TOGETHER


def test_scripts_and_rooms_import_only_what_stands_before_them():
    """model.py imports nothing of ours. A room imports model.py and rooms, a script imports rooms and the scripts
    that are named here. So no import of a name can fail because two modules wait for each other."""
    rooms = {f"support.{room}" for room in ROOMS}
    allowed = {"model": set(), "prepare": {"model"} | rooms, "train": {"model"} | rooms}
    allowed |= {"lora": {"model", "prepare", "train"} | rooms, "sample": {"model", "prepare", "train", "lora"} | rooms}
    allowed |= {room: {"model"} | rooms - {room} for room in rooms}
    for module, names in allowed.items():
        assert our_imports(module) <= names, f"{module} imports {sorted(our_imports(module) - names)}"


def test_rooms_import_each_other_without_a_circle():
    todo = {f"support.{room}": our_imports(f"support.{room}") - {"model"} for room in ROOMS}
    while todo:
        ready = [room for room, imports in todo.items() if not imports & todo.keys()]
        assert ready, f"these rooms import each other in a circle: {sorted(todo)}"
        for room in ready:
            del todo[room]
