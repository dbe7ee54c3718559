"""What a model or a table is named by: a path or a Hub id."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

FILES = (".parquet", ".json", ".jsonl", ".csv")


def as_name(model: Any) -> Any:
    """
    A model's path as the text that the libraries below take; anything else, such as a loaded model, as it is.

    Raises:
        FileNotFoundError: If it can only be a path, and nothing is there.
        ValueError: If it is a file.
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
    Raises:
        `FileNotFoundError`: see [`is_missing`].
    """
    if is_missing(name):
        raise FileNotFoundError(f"{name} is not there.")


def is_missing(name: str) -> bool:
    """Whether a name can only be a path, and nothing is there: it is not to be looked for on the Hub."""
    path = Path(name)
    is_path = path.is_absolute() or name.startswith((".", "~")) or path.suffix in FILES
    return is_path and not path.exists()
