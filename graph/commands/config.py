"""Read a user's defaults for options: `ranvier/config.toml` in the folder of the XDG base directories.

A table for each command holds its long options: `[run]`, `max-tokens = 256`. Options on the command line override it.
Source of the place: XDG Base Directory Specification 0.8 (`XDG_CONFIG_HOME`, by default ~/.config).
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ranvier.transport.files import read_bounded

from ..check.findings import near
from ..file.errors import RequestError

MOST_BYTES = 1 << 20


def place() -> Path:
    """Return where the file is, whether it exists or not."""
    given = os.environ.get("XDG_CONFIG_HOME", "")
    # the specification ignores relative ones; without a home, `~` stays, and there is no such file
    folder = Path(given) if Path(given).is_absolute() else Path(os.path.expanduser("~/.config"))
    return folder / "ranvier" / "config.toml"


def defaults(app: Any) -> dict[str, Any]:
    """Return the default values for `main` of the commands from the user's file; empty if there is none.

    Raises:
        RequestError: the file cannot be read, or names a command or an option that does not exist.
    """
    file = place()
    try:
        content = tomllib.loads(read_bounded(file, MOST_BYTES).decode())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except PermissionError:
        if not os.access(file.parent, os.X_OK):  # the home of another user, as in a container
            return {}
        raise RequestError(f"{file}: may not be read; change its mode, or remove it") from None
    except (OSError, ValueError, RecursionError) as error:
        raise RequestError(f"{file}: {error}") from None
    return _of_group(app, content, str(file))


def _of_group(group: Any, content: Mapping[str, Any], where: str) -> dict[str, Any]:
    made: dict[str, Any] = {}
    for name, options in content.items():
        command = group.commands.get(name)
        if command is None:
            raise RequestError(f"{where}: there is no command {name!r}; {near(name, group.commands)}")
        if not isinstance(options, dict):
            raise RequestError(f"{where}: {name}: expected a table with options, got {options!r}")
        own = {} if not hasattr(command, "commands") else {k: v for k, v in options.items() if k in command.commands}
        made[name] = _of_group(command, own, where) if hasattr(command, "commands") and own else {}
        known = {
            option.removeprefix("--"): parameter
            for parameter in command.params
            for option in parameter.opts
            if option.startswith("--")
        }
        for key, value in options.items():
            if key in own:
                continue
            if key not in known:
                raise RequestError(f"{where}: ranvier {name} has no option --{key}; {near(key, known)}")
            made[name][str(known[key].name)] = _checked(f"{where}: {name}: {key}", value, known[key])
    return made


def _checked(where: str, value: Any, parameter: Any) -> Any:
    """Return a value of the file if an option can have one of this form. Its type is checked with the command line.

    Raises:
        RequestError: the option takes a list, or the value is something other than one value.
    """
    many = bool(getattr(parameter, "multiple", False))
    if many != isinstance(value, list) or isinstance(value, dict):
        raise RequestError(f"{where}: expected {'a list' if many else 'one value'}, got {value!r}")
    return value
