"""Names of models and tables: paths or Hub ids."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

FILES = (".parquet", ".json", ".jsonl", ".csv")


def as_name(model: Any) -> Any:
    """
    Converts a model's path to a string, and returns anything else, such as a loaded model, unchanged.

    Raises:
        FileNotFoundError: If the name can only be a path and the path does not exist.
        ValueError: If the name is that of a file.
    """
    if isinstance(model, os.PathLike):
        model = os.fspath(model)
    if isinstance(model, str):
        refuse_missing(model)
        if os.path.isfile(model):
            raise ValueError(f"{model} is a file: give the directory of a model, or its Hub id.")
    return model


def refuse_missing(name: str) -> None:
    """
    Checks that a name is not that of a missing path.

    Raises:
        FileNotFoundError: If [`is_missing`] returns `True`.
    """
    if is_missing(name):
        raise FileNotFoundError(f"{name} is not there.")


def is_missing(name: str) -> bool:
    """
    Returns whether a name can only be a path, and the path does not exist. It is not looked up on the Hub.

    A Hub id has one slash at most, `ORG/NAME`; that of a table may be written `datasets/ORG/NAME`. URLs are no paths.
    """
    path = Path(name)
    is_path = path.is_absolute() or name.startswith((".", "~")) or path.suffix in FILES
    is_path |= "://" not in name and name.removeprefix("datasets/").count("/") > 1
    return is_path and not path.exists()
