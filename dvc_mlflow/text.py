"""Text for users and MLflow: one-line errors, hidden credentials, valid names and values."""

import hashlib
import posixpath
import re

NAME_LENGTH, VALUE_LENGTH = 250, 5000  # what all MLflow stores accept


class UserError(Exception):
    """A mistake of the user or a failure of the environment, in one line: expected, found, what to do."""


def one_line(text: object, limit: int = 300) -> str:
    """At most `limit` characters of an external text, on one line and printable."""
    line = "".join(char if char.isprintable() else " " for char in str(text)[: limit + 1])
    return line if len(line) <= limit else f"{line[: limit - 3]}..."


def without_credentials(text: str) -> str:
    """The text without user and password in its URLs."""
    without_port = re.sub(r"'.*' is not a valid host or port", "no valid host or port", text)
    return re.sub(r"(?<!/)//(?!/)\S*@", "//…@", without_port)  # up to the last @: a password may contain one


def valid_name(name: str) -> str:
    """The name of a param, metric or tag as MLflow accepts it; a changed one ends in a hash of the original."""
    valid = re.sub(r"[^\w.:/ -]", "_", name)
    if valid.startswith("/") or posixpath.normpath(valid) != valid or valid == ".":
        valid = valid.replace("/", "_").replace("..", "__").strip(".") or "_"
    if valid == name and len(name) <= NAME_LENGTH:
        return name
    return f"{valid[: NAME_LENGTH - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


def valid_value(value: str) -> str:
    """The value of a param or tag as MLflow accepts it; if too long, it is cut and ends in a hash of the whole."""
    if len(value) <= VALUE_LENGTH:
        return value
    return f"{value[: VALUE_LENGTH - 90]}… sha256 {hashlib.sha256(value.encode()).hexdigest()}"
