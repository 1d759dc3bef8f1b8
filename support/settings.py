"""Settings in three layers: dataclass defaults, config/*.py files and --key=value flags; the later one wins.

    python train.py config/train_fables.py --batch_size=32
    python train.py --help

A config file is plain Python assignments, run in a namespace of its own (so run only files you trust). Apart from
imports and names that begin with an underscore, every name in it must be a field of the script's dataclasses."""

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

NO_LIMIT = 2**62  # for check_range(): a larger or infinite value is a mistake
# settings that can be a path, in which ~ is the home folder
PATHS = {"out_dir", "init_from", "dataset", "tokenizer", "compare", "data", "model", "adapter", "export_gguf"}


class UserError(Exception):
    """A mistake the user can fix. Its text is one line: what, where, the fix. Scripts print it and exit with 2."""


class Failure(Exception):
    """An error that no setting caused, such as a full disk. Its text is one line too; scripts exit with 1."""


def first_line(error):
    """Return the first line of an exception's text, or its name if it has no text."""
    return (str(error).splitlines() or [type(error).__name__])[0][:300]


@contextlib.contextmanager
def user_errors(what):
    """Turn any Exception in the `with` block into a UserError: `what`, then the reason."""
    try:
        yield
    except Exception as e:
        if isinstance(e, UserError):
            raise
        reason = f"no key {e}" if isinstance(e, KeyError) else first_line(e)
        raise UserError(f"{what}: {reason}") from None


def keep_freed_memory():
    """Make glibc keep freed memory for its next use. By default large blocks go back to the kernel after every step and
    return page by page, which takes a tenth to a third of a step's time on CPUs."""
    with contextlib.suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").mallopt(-4, 0)  # M_MMAP_MAX of malloc.h
        ctypes.CDLL("libc.so.6").mallopt(-1, -1)  # M_TRIM_THRESHOLD


def run(main, *classes):
    """Call main(*settings) with the settings from the command line, and report errors in one line."""
    keep_freed_memory()
    for stream in (sys.stdin, sys.stdout):  # a sample may have characters that a Windows log file cannot hold
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    try:
        if {"-h", "--help"} & set(sys.argv[1:]):
            return print(usage(classes))
        return main(*configure(classes, sys.argv[1:]))
    except UserError as e:
        code, line = 2, f": {e}"
    except ModuleNotFoundError as e:
        code, line = 2, f": this needs a package that is not installed: pip install {e.name}"
    except BrokenPipeError:  # the reader of our output has ended, as `| head` does
        sys.stderr.close()
        sys.exit(1)
    except (Failure, FloatingPointError, OSError) as e:
        rank = f" (rank {os.environ['RANK']})" if "RANK" in os.environ else ""
        code, line = 1, f"{rank}: " + (f"{e.filename}: {e.strerror}" if getattr(e, "filename", 0) else first_line(e))
    except KeyboardInterrupt:
        code, line = 130, ": interrupted"
    if code != 2 or os.environ.get("LOCAL_RANK", "0") == "0":  # every process finds a mistake (2), one reports it
        print(sys.argv[0] + line, file=sys.stderr)
    sys.exit(code)


def check_range(settings, low, high, *keys):
    """Raise ValueError if one of the settings named by `keys` is not in low..high. None is not checked."""
    for key in keys:
        value = getattr(settings, key)
        if value is not None and not low <= value <= high:
            limits = f"at least {low}" if high == NO_LIMIT else f"between {low} and {high}"
            raise ValueError(f"{key}={value} must be {limits}")


def configure(classes, args):
    """Return one instance of each dataclass, made from command-line arguments."""
    hints = {name: hint for cls in classes for name, hint in get_type_hints(cls).items()}
    types = {name: get_args(hint) or (hint,) for name, hint in hints.items()}  # (int, NoneType) for int | None
    assert len(types) == sum(len(fields(cls)) for cls in classes), "two dataclasses share a field"
    values = {}
    for arg in args:
        if arg.startswith("--") and "=" in arg:
            key, text = arg[2:].split("=", 1)  # values may contain '='
            found = {key: text if str in types.get(key, ()) else literal(text)}
        elif arg.endswith(".py"):
            found = read_file(arg)
        else:
            raise UserError(f"{arg}: expected a config/*.py file or --key=value")
        for key, value in found.items():
            if key not in types:
                near = difflib.get_close_matches(key, types, n=1)
                raise UserError(f"{arg}: unknown key {key!r}" + (f", did you mean {near[0]!r}?" if near else ""))
            values[key] = coerce(arg, key, value, types[key])
    try:
        return [cls(**{f.name: values[f.name] for f in fields(cls) if f.name in values}) for cls in classes]
    except ValueError as e:  # from a dataclass's __post_init__
        raise UserError(str(e)) from None


def literal(text):
    """Return the value of a Python literal, such as 3e-4 or true; any other text stays a string."""
    try:
        return ast.literal_eval({"true": "True", "false": "False", "none": "None"}.get(text.lower(), text))
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def read_file(path):
    """Return the assignments of a config file as a dict."""
    try:
        names = runpy.run_path(path)
    except OSError as e:
        raise UserError(f"{path}: {e.strerror or e}") from None
    except BaseException as e:  # the user's code can raise anything
        line = getattr(e, "lineno", None) or next((t.lineno for t in reversed(inspect.trace())), "?")
        raise UserError(f"{path}, line {line}: {type(e).__name__}: {e}") from None
    return {k: v for k, v in names.items() if k[0] != "_" and not isinstance(v, ModuleType) and not callable(v)}


def coerce(where, key, value, allowed):
    """Return `value` as one of the allowed types. An int can become a float, and a whole float (1e3) an int."""
    if type(value) is int and int not in allowed and float in allowed:
        value = float(value)
    if type(value) is float and int in allowed and value.is_integer():
        value = int(value)
    if type(value) in (int, float) and type(value) in allowed and not 0 <= value <= NO_LIMIT:  # NaN fails this too
        raise UserError(f"{where}: {key}={value} must be at least 0, and finite")
    if type(value) is str and key in PATHS:  # the shell leaves --key=~/x as it is
        value = ",".join(map(os.path.expanduser, value.split(",")))  # --compare takes several
    if type(value) is str and value != value.encode(errors="replace").decode():
        raise UserError(f"{key} is not UTF-8: {value.encode(errors='replace').decode()}")
    if type(value) in allowed and "\0" not in str(value):  # paths cannot contain it
        return value
    wants = " or ".join("None" if t is type(None) else t.__name__ for t in allowed)
    raise UserError(f"{where}: {key} wants {wants}, got {value!r}")


def usage(classes):
    """Return the help text: each field of the dataclasses, its default, and its trailing comment."""
    rows = []
    for cls in classes:
        source = "".join(map(inspect.getsource, cls.__mro__[-2::-1]))  # fields and their comments are inherited
        notes = dict(re.findall(r"^    (\w+):[^#\n]*# (.*)$", source, re.M))
        rows.append(f"\n{cls.__name__}")
        for f in fields(cls):
            assert f.default is not MISSING, f"{cls.__name__}.{f.name} has no default"
            rows.append(f"  --{f.name}={f.default}".ljust(42) + "  " + notes.get(f.name, ""))
    return f"usage: python {sys.argv[0]} [config/*.py ...] [--key=value ...]\n" + "\n".join(rows)
