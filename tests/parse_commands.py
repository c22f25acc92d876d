"""Run by test_docs.py: checks that scripts accept their arguments, by their own parsers, and stops before they work.

Reads a JSON list of command lines (each a list of words after `python`) from standard input, and writes a list of
error messages of the same length; an accepted command has an empty one. One process checks all commands, so that the
libraries are imported only once.
"""

import argparse
import ast
import contextlib
import functools
import io
import json
import runpy
import sys
from pathlib import Path

from trl import TrlParser


class Accepted(Exception):
    """Raised in the place of the first line after the parser."""


def stop_after(parse):
    @functools.wraps(parse)
    def parse_and_stop(*args, **kwargs):
        parse(*args, **kwargs)
        raise Accepted

    return parse_and_stop


def run_imports(code: str) -> None:
    """Compile the code and run its import statements only."""
    imports = [node for node in ast.parse(code).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    exec(compile(ast.Module(imports, []), "<imports>", "exec"), {})


def check(script: str, arguments: list[str]) -> str:
    """Return why a script does not accept its arguments."""
    folder = Path(script).resolve().parent
    # Folders of scripts have modules of the same names, such as `common`.
    for name, module in list(sys.modules.items()):
        if str(vars(module).get("__file__")).startswith(
            (f"{folder.parent}/examples/", f"{folder.parent}/conversion/")
        ):
            del sys.modules[name]
    sys.argv, sys.path[0] = [script, *arguments], str(folder)
    messages = io.StringIO()
    try:
        if script == "-c":
            run_imports(arguments[0])
            return ""
        with contextlib.redirect_stderr(messages):
            if script == "-m":
                module, *sys.argv[1:] = arguments
                runpy.run_module(module, run_name="__main__")
            runpy.run_path(script, run_name="__main__")
    except Accepted:
        return ""
    except SystemExit:
        return messages.getvalue()
    except (ImportError, ValueError) as error:  # TrlParser raises errors
        return f"{type(error).__name__}: {error}"
    return f"{script} does not parse its arguments."


if __name__ == "__main__":
    commands = json.load(sys.stdin)
    argparse.ArgumentParser.parse_args = stop_after(argparse.ArgumentParser.parse_args)
    TrlParser.parse_args_into_dataclasses = stop_after(TrlParser.parse_args_into_dataclasses)
    with contextlib.redirect_stdout(sys.stderr):
        errors = [check(script, arguments) for script, *arguments in commands]
    print(json.dumps(errors))
