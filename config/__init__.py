"""
Settings in three layers: dataclass defaults, config/*.py files, --key=value flags. Of files and flags the later wins.

    python train.py config/train_fables.py --batch_size=32
    python train.py --help

A config file is plain Python assignments, run in a namespace of its own (so run only files you trust). Imports and
names that begin with an underscore are its own business; every other name must be a field of the script's dataclasses.
"""

import ast
import contextlib
import ctypes
import difflib
import inspect
import os
import re
import runpy
import sys
from dataclasses import MISSING, fields
from types import ModuleType
from typing import get_args, get_type_hints

NO_LIMIT = 2**62  # for check_range: what is larger, or infinite, was not meant


class UserError(Exception):
    """A mistake the user can mend. Its text is one line: what, where, the fix. Scripts print it and exit with 2."""


class Failure(Exception):
    """What goes wrong in a run that was set up well, as a full disk. One line too; scripts exit with 1."""


def first_line(error):
    """What an exception says, in one line; its name where it says nothing."""
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


@contextlib.contextmanager
def user_errors(what, *kinds):
    """What goes wrong inside (any Exception, or these kinds) as a UserError of one line: `what`, and the reason."""
    try:
        yield
    except kinds or Exception as e:  # noqa: B030
        if isinstance(e, UserError):
            raise
        reason = f"no key {e}" if isinstance(e, KeyError) else first_line(e)
        raise UserError(f"{what}: {reason}") from None


def keep_freed_memory():
    """Have glibc keep what a program frees, for its next use. By default large blocks go back to the kernel after every
    update and come again page by page, which takes a tenth to a third of an update's time on CPUs."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of malloc.h


def run(main, *classes):
    """What each script's main guard calls: main(*settings), with the command line filled in, and errors in one line."""
    keep_freed_memory()
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a sample may have what a Windows log file can't
    try:
        if {"-h", "--help"} & set(sys.argv[1:]):
            return print(usage(classes))
        main(*configure(classes, sys.argv[1:]))
    except UserError as e:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # of a machine's processes each finds it
            print(f"{sys.argv[0]}: {e}", file=sys.stderr)
        sys.exit(2)
    except ModuleNotFoundError as e:  # wandb, say: installed by those who use it
        print(f"{sys.argv[0]}: this needs a package that is not here: pip install {e.name}", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        sys.stderr.close()
        sys.exit(1)
    except (Failure, FloatingPointError, OSError) as e:
        where = f"{e.filename}: {e.strerror}" if getattr(e, "filename", None) else first_line(e)
        process = f" (rank {os.environ['RANK']})" if "RANK" in os.environ else ""
        print(f"{sys.argv[0]}{process}: {where}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"{sys.argv[0]}: interrupted", file=sys.stderr)
        sys.exit(130)


def check_range(settings, low, high, *keys):
    """For a dataclass's own check: raises ValueError where a setting is not in low..high, as NaN never is."""
    for key in keys:
        value = getattr(settings, key)
        if value is not None and not low <= value <= high:
            limits = f"at least {low}" if high == NO_LIMIT else f"between {low} and {high}"
            raise ValueError(f"{key}={value} must be {limits}")


def configure(classes, args):
    """One instance per dataclass, from the arguments. Raises UserError for an unknown key, a wrong type or file."""
    types = {name: hint for cls in classes for name, hint in get_type_hints(cls).items()}
    assert len(types) == sum(len(fields(cls)) for cls in classes), "two dataclasses share a field"
    values = {}
    for arg in args:
        if arg.startswith("--") and "=" in arg:
            key, text = arg[2:].split("=", 1)  # the first '=' only: values may contain more
            found = {key: literal(text) if str not in allowed_types(types.get(key)) else text}
        elif arg.endswith(".py"):
            found = read_file(arg)
        else:
            raise UserError(f"{arg}: expected a config/*.py file or --key=value")
        for key, value in found.items():
            if key not in types:
                near = difflib.get_close_matches(key, types, n=1)
                raise UserError(f"{arg}: unknown key {key!r}" + (f", did you mean {near[0]!r}?" if near else ""))
            values[key] = coerce(arg, key, value, allowed_types(types[key]))
    try:
        return [cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values}) for cls in classes]
    except ValueError as e:  # a dataclass's own check
        raise UserError(str(e)) from None


def allowed_types(hint):
    return get_args(hint) or (hint,)  # 'int | None' -> (int, NoneType)


def literal(text):
    """'3e-4' -> 0.0003, 'true' -> True; what is no Python literal stays a string."""
    try:
        return ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(text.lower(), text))
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def read_file(path):
    """The assignments of a config file."""
    try:
        names = runpy.run_path(path)
    except OSError as e:
        raise UserError(f"{path}: {e.strerror or e}") from None
    except BaseException as e:  # it is the user's code: anything can go wrong in it
        line = getattr(e, "lineno", None) or next((t.lineno for t in reversed(inspect.trace())), "?")
        raise UserError(f"{path}, line {line}: {type(e).__name__}: {e}") from None
    return {k: v for k, v in names.items() if k[0] != "_" and not isinstance(v, ModuleType) and not callable(v)}


def coerce(where, key, value, allowed):
    """value as one of the allowed types. Converted are only whole floats to int (1e3) and int to float."""
    if type(value) is int and int not in allowed and float in allowed:
        value = float(value)
    if type(value) is float and int in allowed and value.is_integer():
        value = int(value)
    if type(value) in (int, float) and type(value) in allowed and not 0 <= value <= NO_LIMIT:  # as NaN never is
        raise UserError(f"{where}: {key}={value} must be at least 0, and finite")
    if type(value) in allowed and "\0" not in str(value):  # which no path can have
        return value
    wants = " or ".join("None" if t is type(None) else t.__name__ for t in allowed)
    raise UserError(f"{where}: {key} wants {wants}, got {value!r}")


def usage(classes):
    """The dataclasses are the help text: each field, its default, and its trailing comment."""
    rows = []
    for cls in classes:
        sources = map(inspect.getsource, cls.__mro__[-2::-1])  # fields and their comments are inherited
        notes = dict(note for source in sources for note in re.findall(r"^    (\w+):[^#\n]*# (.*)$", source, re.M))
        rows.append(f"\n{cls.__name__}")
        for f in fields(cls):
            assert f.default is not MISSING, f"{cls.__name__}.{f.name} has no default"
            rows.append(f"  --{f.name}={f.default}".ljust(42) + "  " + notes.get(f.name, ""))
    return f"usage: python {sys.argv[0]} [config/*.py ...] [--key=value ...]\n" + "\n".join(rows)
