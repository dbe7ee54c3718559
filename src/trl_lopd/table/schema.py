"""The scored table: one row a rollout, one place that knows its columns, its types and what makes a row valid.

docs/table.md lists the columns. The two top-k columns come together, with one k for the whole table, which their type
names: inner lists of one size need no offsets. Other columns are kept and ignored; other types of the same kind
(`int64`, `float64`, `large_list`, inner lists of any size) are accepted.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from blake3 import blake3
from datasets import Dataset, Features, IterableDataset, List, Value
from datasets.formatting import query_table
from datasets.table import InMemoryTable

from ..errors import TableError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

REQUIRED_COLUMNS = ("prompt_ids", "completion_ids", "teacher_logprobs", "teacher_fingerprint")
TOPK_COLUMNS = ("teacher_topk_ids", "teacher_topk_logprobs")
OPTIONAL_COLUMNS = ("ref_logprobs", "completion_mask", *TOPK_COLUMNS)
# In the place of `teacher_logprobs` where a recurring part was subtracted from another teacher's scores. That is no
# log-probability, and under another name nothing takes it for one.
RESIDUAL = "residual_logprobs"
# As in TRL: the name under which a row's teacher is given, such as "math".
TEACHER_ID = "teacher_id"
# Nats: standard deviation of the advantages, 0.9 and less where the sampled update cost accuracy, 2.3 where not. Below
# this, training and `trl-lopd inspect` warn of it.
LEAST_SPREAD = 1.0
# One entry a completion token.
TOKEN_COLUMNS = ("completion_ids", "teacher_logprobs", RESIDUAL, *OPTIONAL_COLUMNS)
# Columns that are read as arrays, not as Python lists.
_TOKEN_LISTS = ("prompt_ids", *TOKEN_COLUMNS)
LOGPROB_COLUMNS = ("teacher_logprobs", "ref_logprobs", "teacher_topk_logprobs")

# Engines round: the log-probability of a near-certain token can come out a little above 0, a total a little above 1.
TOLERANCE = 1e-3

# Beside a trained model: the sorted [`row_hashes`] of the rows that it was trained on.
TRAINED_ROWS = "trained_rows.npy"

# How many lists a leaf is nested in, the leaf's type, and its name in messages.
_TYPES = {
    "prompt_ids": (1, pa.types.is_integer, "integers"),
    "completion_ids": (1, pa.types.is_integer, "integers"),
    "teacher_logprobs": (1, pa.types.is_floating, "floats"),
    RESIDUAL: (1, pa.types.is_floating, "floats"),
    "teacher_fingerprint": (0, lambda leaf: pa.types.is_string(leaf) or pa.types.is_large_string(leaf), "string"),
    "ref_logprobs": (1, pa.types.is_floating, "floats"),
    "completion_mask": (1, pa.types.is_boolean, "booleans"),
    "teacher_topk_ids": (2, pa.types.is_integer, "integers"),
    "teacher_topk_logprobs": (2, pa.types.is_floating, "floats"),
}

_RESCORE = "Score the row again with `score_rollouts`, or drop it."


@dataclass(frozen=True)
class TableSummary:
    """What a valid table holds.

    Attributes:
        rows (`int`): Rollouts.
        completion_tokens (`int`): Completion tokens.
        trainable_tokens (`int`): Completion tokens whose `completion_mask` is true; all of them without that column.
        top_k (`int`): Teacher tokens stored a position, 0 without the top-k columns.
        floored (`int`): Entries of `teacher_logprobs` and `teacher_topk_logprobs` that are -inf.
        teacher_fingerprints (`dict[str, int]`): Rows of each teacher.
        foreign_topk (`int`): Entries of `teacher_topk_ids` that the student's vocabulary does not have. Training
            counts the teacher's probability of them with that of all other tokens.
    """

    rows: int
    completion_tokens: int
    trainable_tokens: int
    top_k: int
    floored: int
    teacher_fingerprints: dict[str, int]
    foreign_topk: int = 0

    def __add__(self, other: TableSummary) -> TableSummary:
        """Summary of two parts of one table together."""
        sums = {name: n + getattr(other, name) for name, n in vars(self).items() if isinstance(n, int)}
        teachers = dict(Counter(self.teacher_fingerprints) + Counter(other.teacher_fingerprints))
        return TableSummary(**sums | {"top_k": self.top_k or other.top_k, "teacher_fingerprints": teachers})


def table_features(top_k: int = 0, ref_logprobs: bool = False, completion_mask: bool = False) -> Features:
    """`datasets.Features` of a table with the optional columns asked for; `top_k` above 0 adds the top-k columns."""
    features = {
        "prompt_ids": List(Value("int32")),
        "completion_ids": List(Value("int32")),
        "teacher_logprobs": List(Value("float32")),
        "teacher_fingerprint": Value("string"),
    }
    if ref_logprobs:
        features["ref_logprobs"] = List(Value("float32"))
    if completion_mask:
        features["completion_mask"] = List(Value("bool"))
    if top_k:
        features["teacher_topk_ids"] = List(List(Value("int32"), length=top_k))
        features["teacher_topk_logprobs"] = List(List(Value("float16"), length=top_k))
    return Features(features)


def batches(dataset: Dataset, names: Iterable[str], rows: int) -> Iterator[pa.Table]:
    """Yields columns of a dataset, `rows` at a time. `select_columns` and `with_format` would compute a fingerprint
    of the result each, which takes longer than to read a small table."""
    columns = InMemoryTable(dataset.data.table.select(list(names)))
    for start in range(0, len(dataset), rows):
        yield query_table(columns, range(start, min(start + rows, len(dataset))), dataset._indices)


def lengths(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Prompt and completion lengths, in tokens, of a valid table: two int64 arrays of shape `(rows,)`."""
    names = ("prompt_ids", "completion_ids")
    parts = {name: [np.empty(0, np.int64)] for name in names}
    for batch in batches(dataset, names, 1000):
        for name in names:
            parts[name].append(_numpy(pc.list_value_length(batch[name].combine_chunks())).astype(np.int64))
    return np.concatenate(parts["prompt_ids"]), np.concatenate(parts["completion_ids"])


def score_column(column_names: Iterable[str]) -> str | None:
    """The column with the scores of the sampled tokens, `teacher_logprobs` or [`RESIDUAL`]; `None` without scores."""
    return next((name for name in (RESIDUAL, "teacher_logprobs") if name in column_names), None)


def holds_ids(dataset: Dataset, column: str) -> bool:
    """Whether the values of a column are lists of integers."""
    return pa.types.is_integer(getattr(dataset.data.schema.field(column).type, "value_type", pa.null()))


def column_counts(dataset: Dataset, column: str) -> Counter[str | None]:
    """How many rows have each value of a string column; missing values count as `None`. Empty without the column."""
    counts: Counter[str | None] = Counter()
    if column not in dataset.column_names:
        return counts
    for batch in batches(dataset, [column], 10_000):
        for pair in pc.value_counts(batch[column].combine_chunks()):
            counts[pair["values"].as_py()] += pair["counts"].as_py()
    return counts


def teacher_counts(dataset: Dataset) -> Counter[tuple[str | None, str | None]]:
    """
    How many rows have each pair of `teacher_fingerprint` and `teacher_id`. Empty without the first column; the second
    is `None` in all pairs if it is missing or holds anything else than strings, and missing values count as `None`.
    """
    if "teacher_fingerprint" not in dataset.column_names or not holds_names(dataset, TEACHER_ID):
        return Counter({(id, None): rows for id, rows in column_counts(dataset, "teacher_fingerprint").items()})
    counts: Counter[tuple[str | None, str | None]] = Counter()
    names = ["teacher_fingerprint", TEACHER_ID]
    for batch in batches(dataset, names, 10_000):
        counts.update(zip(*(batch[name].to_pylist() for name in names), strict=True))
    return counts


def holds_names(dataset: Dataset, column: str) -> bool:
    """Whether a dataset has a column whose values are strings."""
    return getattr(dataset.features.get(column), "dtype", None) in ("string", "large_string")


def rows_of_each(teacher_ids: np.ndarray | None) -> dict[str, np.ndarray]:
    """The indices of the rows of each teacher in a column `teacher_id`, `(rows,)`, by name. Empty unless there are
    several; rows without a name are nobody's."""
    names = [] if teacher_ids is None else sorted({*teacher_ids.tolist()} - {None})
    return {name: np.flatnonzero(teacher_ids == name) for name in names} if len(names) > 1 else {}


def digest_columns(column_names: list[str]) -> list[str]:
    """The columns that [`rows_digest`] covers by default: all that sampling and scoring write."""
    written = (*REQUIRED_COLUMNS, RESIDUAL, "ref_logprobs", *TOPK_COLUMNS, "student_fingerprint", TEACHER_ID)
    return [name for name in written if name in column_names]


def rows_digest(dataset: Dataset, columns: list[str] | None = None) -> str:
    """
    Digest of a valid table's rows, which does not depend on their order, on sharding, or on the types that hold them.

    It is the sum of the rows' digests, so that the digests of the parts of a table add up to that of the whole: see
    [`add_digests`]. That holds against accidents, not against rows that are constructed to fit.

    Args:
        dataset (`datasets.Dataset`): The table.
        columns (`list[str]`, *optional*): What to cover. Defaults to [`digest_columns`].

    Returns:
        `str`: 64 hexadecimal digits.
    """
    columns = digest_columns(dataset.column_names) if columns is None else columns
    total = 0
    for batch in batches(dataset, columns, 256):
        values = [_row_bytes(name, batch[name]) for name in columns]
        for row in zip(*values, strict=True):
            hasher = blake3()
            for part in row:
                # With its length before it, no part can borrow from the next.
                hasher.update(len(part).to_bytes(8, "little"))
                hasher.update(part)
            total += int.from_bytes(hasher.digest(), "little")
    return f"{total % 2**256:064x}"


def content_digest(dataset: Dataset) -> str:
    """Digest of all columns of any `Dataset`, in the order of its rows; 64 hexadecimal digits."""
    hasher = blake3(repr(sorted(dataset.features.items(), key=lambda item: item[0])).encode())
    for batch in batches(dataset, dataset.column_names, 256):
        for name in sorted(dataset.column_names):
            if name in _DIGEST_DTYPES:
                for row in _row_bytes(name, batch[name]):
                    hasher.update(len(row).to_bytes(8, "little"))
                    hasher.update(row)
            else:
                hasher.update(json.dumps(batch[name].to_pylist(), default=str).encode())
    return hasher.hexdigest()


def describe(dataset: Dataset) -> str:
    """What a resumed run must find again, in words and as [`content_digest`]."""
    return f"{len(dataset)} rows of {', '.join(dataset.column_names)}; {content_digest(dataset)}"


def refuse_no_dataset(value: object, name: str) -> None:
    """
    Raises:
        TypeError: If a value is anything else than a `Dataset`.
        ValueError: If it has a transform, which would be ignored.
    """
    if isinstance(value, Dataset):
        if value.format["type"] == "custom":
            raise ValueError(
                f"`{name}` has a transform (`with_transform`), which would be ignored: columns are read as they are "
                f"stored. Apply it with `map`, or take it off: `{name}.with_format(None)`."
            )
        return
    if isinstance(value, dict):
        splits = list(value)
        what = f"a dict of splits, {splits}: give one of them" + (f", such as `{name}[{splits[0]!r}]`" * bool(splits))
    elif isinstance(value, list | tuple):
        what = f"a list of rows: give a `Dataset`, such as `Dataset.from_list({name})`"
    elif isinstance(value, os.PathLike):
        what = "a path: load it, with `load_table` or `datasets.load_dataset`, and give the `Dataset`"
    elif isinstance(value, str):
        what = "one text: give a `Dataset`, which `load_table` and `datasets.load_dataset` read from a path"
    elif isinstance(value, IterableDataset):
        what = "a stream, which cannot be resumed: give a `Dataset`"
    else:
        what = f"{'' if value is None else 'a '}`{type(value).__name__}`: give a `Dataset`"
    raise TypeError(f"`{name}` is {what}.")


def add_digests(digests: Iterable[str]) -> str:
    """Digest of the rows of several tables together."""
    return f"{sum(int(digest, 16) for digest in digests) % 2**256:064x}"


# What `table_features` says, as numpy knows it.
_DIGEST_DTYPES = {
    **dict.fromkeys(("prompt_ids", "completion_ids", "teacher_topk_ids"), np.int32),
    **dict.fromkeys(("teacher_logprobs", RESIDUAL, "ref_logprobs"), np.float32),
    "teacher_topk_logprobs": np.float16,
}


def _row_bytes(name: str, column: pa.ChunkedArray) -> list[bytes | memoryview]:
    array = column.combine_chunks()
    if name == TEACHER_ID:
        return [("" if value is None else str(value)).encode() for value in array.to_pylist()]
    if name not in _DIGEST_DTYPES:
        # Without the name, which is for people.
        return [(value or "").rpartition("@")[2].encode() for value in array.to_pylist()]
    values = [np.ascontiguousarray(row, _DIGEST_DTYPES[name]) for row in _row_arrays(name, array)]
    # A view of nothing cannot be cast.
    return [memoryview(row).cast("B") if row.size else b"" for row in values]


def _row_arrays(name: str, array: pa.Array) -> list[np.ndarray]:
    """Each row of a column of lists, `(tokens,)` or `(tokens, k)`, as a view of the column's buffer."""
    # `flatten`, unlike `values`, respects the offset and length of a sliced array.
    entries = array.flatten()
    if name in TOPK_COLUMNS:
        values = _numpy(entries.flatten())
        values = values.reshape(len(entries), len(values) // max(len(entries), 1))
    else:
        values = _numpy(entries)
    sizes = _numpy(pc.list_value_length(array))
    ends = np.cumsum(sizes)
    return [values[start:end] for start, end in zip(ends - sizes, ends, strict=True)]


def row_hashes(dataset: Dataset) -> np.ndarray:
    """64 bits for the prompt and the completion of each row of a valid table: `(rows,)` uint64."""
    return prompt_and_row_hashes(dataset)[1]


def prompt_and_row_hashes(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """
    Hashes of the prompts, and of the prompts with their completions, each `(rows,)` uint64.

    Raises:
        TableError: If there are nulls among the ids.
    """
    hashes = [(np.empty(0, np.uint64),) * 2]
    for batch in batches(dataset, ["prompt_ids", "completion_ids"], 1000):
        of_prompts = _hash(*flat_values("prompt_ids", batch))
        hashes.append((of_prompts, _mix(of_prompts) + _hash(*flat_values("completion_ids", batch))))
    of_prompts, of_rows = zip(*hashes, strict=True)
    return np.concatenate(of_prompts), np.concatenate(of_rows)


def flat_values(name: str, batch: pa.Table) -> tuple[np.ndarray, np.ndarray]:
    """Lengths of a column's lists, `(rows,)`, and the innermost values of all rows, one after another."""
    column = batch[name].combine_chunks()
    sizes = pc.list_value_length(column)
    # `flatten`, unlike `values`, respects the offset and length of a sliced array.
    values = column.flatten()
    while hasattr(values.type, "value_type"):
        values = values.flatten()
    if sizes.null_count or values.null_count:
        raise TableError(f"Column `{name}` has nulls where token ids are needed. Drop these rows.")
    return _numpy(sizes).astype(np.int64), _numpy(values)


def _hash(sizes: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """64 bits for each row of ids; `(rows,)` uint64."""
    ends = np.cumsum(sizes)
    positions = np.arange(len(ids)) - np.repeat(ends - sizes, sizes)
    totals = np.concatenate([np.zeros(1, np.uint64), np.cumsum(_mix((positions << 32) + ids))])
    # Sums wrap around, and so do their differences.
    return totals[ends] - totals[ends - sizes]


def _mix(values: np.ndarray) -> np.ndarray:
    """The finalizer of splitmix64: a bijection of 64-bit numbers after which neighbours have nothing in common."""
    values = values.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


class TableRows:
    """The columns that training reads, as a map-style torch dataset of numpy rows.

    Arrow buffers become arrays without passing through Python lists, which for top-k columns of long completions would
    cost more than the training step. The rows must be valid.

    Args:
        dataset (`datasets.Dataset`): A valid table.
        columns (`tuple[str, ...]`, *optional*): Other columns to read, of one value a row.
    """

    def __init__(self, dataset: Dataset, columns: tuple[str, ...] = ()):
        names = [name for name in _TOKEN_LISTS if name in dataset.column_names]
        self.source = dataset
        self.dataset = dataset.select_columns([*names, *columns]).with_format("arrow")

    @property
    def teacher_ids(self) -> np.ndarray | None:
        """The column `teacher_id`, `(rows,)`; `None` if there is none, or it holds no names."""
        return np.array(self.source[TEACHER_ID][:]) if holds_names(self.source, TEACHER_ID) else None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        return self.__getitems__([row])[0]

    def __getitems__(self, rows: list[int]) -> list[dict[str, np.ndarray]]:
        return numpy_rows(self.dataset[rows])


def numpy_rows(pa_table: pa.Table) -> list[dict[str, Any]]:
    """
    Returns the rows of a valid Arrow table: `prompt_ids` and the columns of tokens as arrays `(tokens,)` or
    `(tokens, k)`, other columns as Python values.
    """
    columns = {
        name: _row_arrays(name, column.combine_chunks()) if name in _TOKEN_LISTS else column.to_pylist()
        for name, column in zip(pa_table.column_names, pa_table.columns, strict=True)
    }
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def vocab_limits(
    tokenizer: PreTrainedTokenizerBase | None = None, model_config: PretrainedConfig | None = None
) -> tuple[int | None, int | None]:
    """Exclusive upper limits of token ids in prompts and completions, and of top-k ids; `None` where nothing limits.

    A model's vocabulary is often padded beyond its tokenizer's. The teacher may give a padding id some probability,
    so top-k ids are held against the model alone; a sampled token has to mean something to both. A teacher may also
    have tokens that the student lacks: those beyond the limit are counted.
    """
    # A vocabulary may have gaps, so its length is not its limit.
    tokenizer_size = None if tokenizer is None else max(tokenizer.get_vocab().values()) + 1
    model_size = None if model_config is None else model_config.get_text_config().vocab_size
    sizes = [size for size in (tokenizer_size, model_size) if size is not None]
    return min(sizes, default=None), tokenizer_size if model_size is None else model_size


def validate_table(
    dataset: Dataset,
    tokenizer: PreTrainedTokenizerBase | None = None,
    model_config: PretrainedConfig | None = None,
    *,
    teacher_logprob_floor: float | None = None,
    batch_rows: int = 256,
) -> TableSummary:
    """Checks every row of a table and says what it holds.

    Args:
        dataset (`datasets.Dataset`): The table; shuffled, filtered and selected ones too.
        tokenizer (`PreTrainedTokenizerBase`, *optional*): The student's; token ids must be in its vocabulary.
        model_config (`PretrainedConfig`, *optional*): The student's; token ids must be in its vocabulary.
        teacher_logprob_floor (`float`, *optional*): Negative, in nats. Given, a teacher score of -inf is legal and
            counted; the trainer clamps it to the floor.
        batch_rows (`int`, *optional*, defaults to `256`): Rows held in memory at a time.

    Returns:
        [`TableSummary`]

    Raises:
        TableError: In the first batch where a check fails, for the first row of the first failing check, structure
            (columns, types, nulls, lengths) before values. The row named is its index in `dataset`.
        TypeError: If `dataset` is not a `datasets.Dataset`.
        ValueError: If `teacher_logprob_floor` is not a finite negative number.
    """
    if not isinstance(dataset, Dataset):
        raise TypeError(
            f"Expected a `datasets.Dataset`, got `{type(dataset).__name__}`. Pass one split of a `DatasetDict`; the "
            "rows of a stream are checked by `validate_rows`, and by the trainer as they arrive."
        )
    _check_schema(dataset.data.schema, len(dataset))
    vocab_size, topk_vocab_size = vocab_limits(tokenizer, model_config)
    names = [name for name in _TYPES if name in dataset.column_names]
    summary = TableSummary(0, 0, 0, 0, 0, {})
    for batch in batches(dataset, names, batch_rows):
        summary += validate_rows(
            batch,
            first_row=summary.rows,
            vocab_size=vocab_size,
            topk_vocab_size=topk_vocab_size,
            top_k=summary.top_k,
            teacher_logprob_floor=teacher_logprob_floor,
        )
    return summary


def validate_rows(
    pa_table: pa.Table,
    *,
    first_row: int = 0,
    vocab_size: int | None = None,
    topk_vocab_size: int | None = None,
    top_k: int = 0,
    teacher_logprob_floor: float | None = None,
) -> TableSummary:
    """Checks one Arrow table, such as a batch of a stream.

    Args:
        pa_table (`pyarrow.Table`): The rows.
        first_row (`int`, *optional*, defaults to `0`): Number that messages give the first row.
        vocab_size (`int`, *optional*): Exclusive upper limit of prompt and completion ids, see [`vocab_limits`].
        topk_vocab_size (`int`, *optional*): From where on top-k ids are counted as foreign, see [`vocab_limits`].
        top_k (`int`, *optional*, defaults to `0`): `TableSummary.top_k` of the rows before; 0 if there were none.
        teacher_logprob_floor (`float`, *optional*): As in [`validate_table`].

    Returns:
        [`TableSummary`] of these rows; add those of the batches to get the table's.

    Raises:
        TableError: For the first row of the first failing check.
        ValueError: If `teacher_logprob_floor` is not a finite negative number.
    """
    if teacher_logprob_floor is not None and not -np.inf < teacher_logprob_floor < 0:
        raise ValueError(f"teacher_logprob_floor must be a finite negative number, got {teacher_logprob_floor}.")
    _check_schema(pa_table.schema, pa_table.num_rows)
    columns = _columns(pa_table, first_row)
    completion = columns["completion_ids"]
    for name in TOPK_COLUMNS:
        if name in columns:
            top_k = columns[name].check_top_k(top_k)

    columns["prompt_ids"].check_ids(vocab_size)
    completion.check_ids(vocab_size)
    foreign_topk = 0
    if top_k:
        columns["teacher_topk_ids"].check_ids(None)
        if topk_vocab_size is not None:
            foreign_topk = int((columns["teacher_topk_ids"].values >= topk_vocab_size).sum())
    floored = sum(columns[name].check_logprobs(teacher_logprob_floor) for name in LOGPROB_COLUMNS if name in columns)
    if RESIDUAL in columns:
        columns[RESIDUAL].check_finite()
    trainable_tokens = len(completion.values)
    if "completion_mask" in columns:
        trainable_tokens = columns["completion_mask"].check_mask()
    if top_k:
        _check_top_k_values(columns)

    return TableSummary(
        rows=pa_table.num_rows,
        completion_tokens=len(completion.values),
        trainable_tokens=trainable_tokens,
        top_k=top_k,
        floored=floored,
        teacher_fingerprints=columns["teacher_fingerprint"].check_fingerprints(),
        foreign_topk=foreign_topk,
    )


def validate_rollouts(dataset: Dataset) -> None:
    """
    Checks rows before they are scored: token ids in each, and one entry a completion token in other columns.

    Raises:
        TableError: If a column of token ids is missing or has another type; for the first row where a list is empty,
            has a null or another length.
    """
    ids = ("prompt_ids", "completion_ids")
    names = [name for name in (*ids, "completion_mask", "ref_logprobs") if name in dataset.column_names]
    if missing := [name for name in ids if name not in names]:
        raise TableError(f"Missing column {_quoted(missing)}. `collect_rollouts` makes it from prompts.")
    first_row = 0
    _check_types(dataset.data.schema, names)
    for batch in batches(dataset, names, 1000):
        _columns(batch, first_row)
        first_row += len(batch)


def _columns(pa_table: pa.Table, first_row: int) -> dict[str, _Column]:
    """Reads columns of the right types, of which no list is empty, and each has one entry a completion token."""
    columns = {name: _Column(name, pa_table[name], first_row) for name in _TYPES if name in pa_table.column_names}
    remedy = "Begin the prompt with a token, such as the beginning-of-sequence one, or drop the row."
    columns["prompt_ids"].check_not_empty("so the first completion token has no context", remedy)
    columns["completion_ids"].check_not_empty("so there is nothing to learn from", "Drop the row.")
    for name in TOKEN_COLUMNS:
        if name in columns:
            columns[name].check_lengths(columns["completion_ids"])
    return columns


class _Column:
    """One column of a batch as numpy arrays, with the checks that need no other column's values.

    Attributes:
        lengths (`(rows,)` int): Entries of each row.
        inner_lengths (`(entries,)` int, or `None`): Values of each entry of a list of lists.
        values (`(entries,)`, or `(entries, k)` once `check_top_k` has run): All rows' entries, one after another.

    Raises:
        TableError: If a row or an element is null.
    """

    def __init__(self, name: str, column: pa.ChunkedArray, first_row: int):
        self.name, self.first_row = name, first_row
        levels = [column.combine_chunks()]
        self._check_null(levels)
        for _ in range(_TYPES[name][0]):
            # `flatten`, unlike `values`, respects the offset and length of a sliced array.
            levels.append(levels[-1].flatten())
            self._check_null(levels)
        sizes = [_numpy(pc.list_value_length(level)) for level in levels[:-1]]
        self.lengths = sizes[0] if sizes else np.ones(len(levels[0]), np.int64)
        self.inner_lengths = sizes[1] if len(sizes) > 1 else None
        self.values = _numpy(levels[-1])
        if self.values.dtype == np.float16:
            # numpy computes float16 in software, many times slower.
            self.values = self.values.astype(np.float32)

    def error(self, row: int, problem: str, remedy: str, token: int | None = None) -> TableError:
        place = f"Row {self.first_row + row}, column `{self.name}`" + ("" if token is None else f", token {token}")
        return TableError(f"{place}: {problem}. {remedy}")

    def error_at(self, entry: int, problem: str, remedy: str) -> TableError:
        """The error for an entry of `values`, counted over all rows."""
        ends = np.cumsum(self.lengths)
        row = int(np.searchsorted(ends, entry, side="right"))
        return self.error(row, problem, remedy, token=int(entry - (ends[row] - self.lengths[row])))

    def _check_null(self, levels: list[pa.Array]) -> None:
        if not levels[-1].null_count:
            return
        row = int(np.argmax(_numpy(levels[-1].is_null())))
        for level in reversed(levels[:-1]):
            row = int(np.searchsorted(np.cumsum(_numpy(pc.list_value_length(level))), row, side="right"))
        remedy = "Drop the row." if self.name in ("prompt_ids", "completion_ids") else _RESCORE
        raise self.error(row, "a null where a value is needed", remedy)

    def check_not_empty(self, why: str, remedy: str) -> None:
        if (row := _first(self.lengths == 0)) is not None:
            raise self.error(row, f"0 tokens, {why}", remedy)

    def check_lengths(self, completion: _Column) -> None:
        if (row := _first(self.lengths != completion.lengths)) is not None:
            problem = f"{self.lengths[row]} entries for {completion.lengths[row]} tokens in `completion_ids`"
            raise self.error(row, problem, _RESCORE)

    def check_top_k(self, top_k: int) -> int:
        """Checks that there are `top_k` values a token (0: as many as at the first token) and returns how many."""
        top_k = top_k or max(int(self.inner_lengths[0]), 1)
        if (entry := _first(self.inner_lengths != top_k)) is not None:
            problem = f"{self.inner_lengths[entry]} top-k values, where {top_k} are needed"
            raise self.error_at(entry, problem, "Score all rows with `score_rollouts` and one k of at least 1.")
        self.values = self.values.reshape(-1, top_k)
        return top_k

    def check_ids(self, limit: int | None) -> None:
        bad = self.values < 0
        if limit is not None:
            bad |= self.values >= limit
        remedy = "Make the table with the tokenizer and model you train, or drop the row."
        self._refuse(bad, "a token id is 0 or more" if limit is None else f"token ids are 0 to {limit - 1}", remedy)

    def check_logprobs(self, floor: float | None) -> int:
        """Checks that the values are log-probabilities and returns how many are -inf."""
        if not (self.values <= TOLERANCE).all():
            self._refuse(np.isnan(self.values), "a log-probability is a number", _RESCORE)
            remedy = "Score with `score_rollouts`, which stores natural-log probabilities at temperature 1."
            self._refuse(self.values > TOLERANCE, "a log-probability is at most 0", remedy)
        minus_inf = self.values == -np.inf
        if self.name == "ref_logprobs":
            self._refuse(minus_inf, "the reference model gave its own sample no probability", _RESCORE)
        elif floor is None:
            remedy = "Set `teacher_logprob_floor` to clamp such scores in training, or drop the row."
            self._refuse(minus_inf, "the teacher gave the token no probability", remedy)
        return int(minus_inf.sum())

    def check_finite(self) -> None:
        """Checks that the values are finite numbers."""
        remedy = "Make the table again with `residualize_table`, or drop the row."
        self._refuse(~np.isfinite(self.values), "a residual score is a finite number", remedy)

    def check_mask(self) -> int:
        """Checks that each row has a token to train on and returns how many there are."""
        starts = np.cumsum(self.lengths) - self.lengths
        if (row := _first(~np.logical_or.reduceat(self.values, starts))) is not None:
            raise self.error(row, f"all {self.lengths[row]} entries are False", "Drop rows with no token to train on.")
        return int(self.values.sum())

    def check_fingerprints(self) -> dict[str, int]:
        """Checks that each row names its teacher and returns the rows of each."""
        if (row := _first(self.values == "")) is not None:
            raise self.error(row, "'' does not say which teacher scored the row", _RESCORE)
        return dict(Counter(self.values.tolist()))

    def _refuse(self, bad: np.ndarray, why: str, remedy: str) -> None:
        """Raises for the first value that is `bad`, of the shape of `values`."""
        if (at := _first(bad)) is not None:
            raise self.error_at(at // self.values[0].size, f"{self.values.flat[at]!s}, but {why}", remedy)


def _check_schema(schema: pa.Schema, rows: int) -> None:
    """Raises a `TableError` for missing columns, wrong types and an empty table."""
    if RESIDUAL in schema.names:
        if mixed := [name for name in ("teacher_logprobs", *TOPK_COLUMNS) if name in schema.names]:
            raise TableError(
                f"The table has `{RESIDUAL}` and {_quoted(mixed)}: a residual takes the place of a teacher's scores. "
                "Rows of both kinds that were joined have both. Keep the rows and columns of one kind."
            )
        required = [RESIDUAL if name == "teacher_logprobs" else name for name in REQUIRED_COLUMNS]
    else:
        required = REQUIRED_COLUMNS
    if missing := [name for name in required if name not in schema.names]:
        remedy = "Make the table with `score_rollouts`, which writes it"
        if {"prompt_ids", "completion_ids"} & set(missing):
            remedy = "Make rollouts with `collect_rollouts`, and the table from them with `score_rollouts`"
        raise TableError(f"Missing column {_quoted(missing)}. {remedy}.")
    present = [name for name in TOPK_COLUMNS if name in schema.names]
    if len(present) == 1:
        absent = [name for name in TOPK_COLUMNS if name not in present]
        remedy = f"Score with `score_rollouts` and a top-k, which writes both, or remove {_quoted(present)}."
        raise TableError(f"Missing column {_quoted(absent)}, which {_quoted(present)} needs. {remedy}")
    _check_types(schema, [name for name in _TYPES if name in schema.names])
    if not rows:
        raise TableError("The table has no rows. Check the filter or split that made it, or run `score_rollouts`.")


def _check_types(schema: pa.Schema, names: list[str]) -> None:
    """Raises a `TableError` for one of the columns if it has another type."""
    for name in names:
        depth, is_leaf, leaf_name = _TYPES[name]
        leaf = schema.field(name).type
        nested = 0
        while pa.types.is_list(leaf) or pa.types.is_large_list(leaf) or pa.types.is_fixed_size_list(leaf):
            leaf, nested = leaf.value_type, nested + 1
        if nested != depth or not is_leaf(leaf):
            problem = f"type {schema.field(name).type}, where {'list of ' * depth}{leaf_name} is needed"
            maker = "score_rollouts" if "teacher" in name else "collect_rollouts"
            # Where the numbers may still be all there.
            whole = {"integers": pa.types.is_floating, "booleans": pa.types.is_integer}
            can_cast = nested == depth and leaf_name in whole and whole[leaf_name](leaf)
            cast = "Cast it to its type in `table_features`, or make" if can_cast else "Make"
            raise TableError(f"Column `{name}`: {problem}. {cast} it with `{maker}`.")


def _check_top_k_values(columns: dict[str, _Column]) -> None:
    """Raises a `TableError` unless the top-k is part of one distribution, the one that scored the sampled token."""
    ids, logprobs, sampled = (columns[name] for name in (*TOPK_COLUMNS, "teacher_logprobs"))
    # `(k, entries)`: numpy reduces a long last axis many times faster than a short one.
    ids_by_rank, logprobs_by_rank = (np.ascontiguousarray(column.values.T) for column in (ids, logprobs))

    # Every pair of ranks, by how far they are apart, which for a usual k is faster than sorting.
    if any((ids_by_rank[:-step] == ids_by_rank[step:]).any() for step in range(1, len(ids_by_rank))):
        ordered = np.sort(ids.values, axis=-1)
        repeated = ordered[:, 1:] == ordered[:, :-1]
        entry = _first(repeated.any(axis=-1))
        value = ordered[entry, 1:][repeated[entry]][0]
        raise ids.error_at(entry, f"token id {value} twice, but the k tokens are distinct", _RESCORE)

    p = np.exp(logprobs_by_rank)
    total = p.sum(axis=0)
    is_sampled = ids_by_rank == columns["completion_ids"].values
    has_sampled = is_sampled.any(axis=0)
    alone = np.where(has_sampled, 0.0, np.exp(sampled.values))
    suspects = np.flatnonzero(total + alone > 1 + TOLERANCE)
    # Rounding to float16 moves log p by at most |log p| 2^-11, and so p by about p |log p| 2^-11. Summed, that is the
    # entropy times 2^-11: with 64 equally likely tokens already more than the tolerance.
    p, terms = p[:, suspects], logprobs_by_rank[:, suspects]
    limit = 1 + TOLERANCE + (p * np.abs(np.where(p > 0, terms, 0))).sum(axis=0) * 2.0**-11
    if (suspect := _first(total[suspects] > limit)) is not None:
        entry = int(suspects[suspect])
        remedy = "Score with `score_rollouts`, which normalises over the full vocabulary at temperature 1."
        raise logprobs.error_at(entry, f"the top-k probabilities sum to {total[entry]:.4f}, above 1", remedy)
    if (suspect := _first((total + alone)[suspects] > limit)) is not None:
        entry = int(suspects[suspect])
        problem = f"the sampled token has probability {alone[entry]:.4f}, but the top-k without it leaves"
        raise sampled.error_at(entry, f"{problem} {max(1 - total[entry], 0):.4f}", _RESCORE)

    # The sampled score has float32, the top-k float16: equal or adjacent float16 numbers are the same score. Near 0
    # float16 is finer than the noise of two float32 sums, hence the tolerance. Scores within half of it always agree,
    # which spares most entries the rounding.
    with np.errstate(over="ignore", invalid="ignore"):
        stored = np.where(is_sampled, logprobs_by_rank, 0).sum(axis=0)  # the k tokens are distinct
        entries = np.flatnonzero(has_sampled & ~(np.abs(sampled.values - stored) <= TOLERANCE / 2))
        a, b = sampled.values[entries].astype(np.float16), stored[entries].astype(np.float16)
        ulp = np.spacing(np.maximum(np.abs(a), np.abs(b)))
        agree = (a == b) | (np.abs(a - b) <= np.maximum(ulp, TOLERANCE))
    if (match := _first(~agree)) is not None:
        entry = int(entries[match])
        problem = f"{b[match]!s} for the sampled token, but `teacher_logprobs` has {sampled.values[entry]!s}"
        raise logprobs.error_at(entry, problem, _RESCORE)


def _first(bad: np.ndarray) -> int | None:
    """Flat index of the first True."""
    return int(bad.argmax()) if bad.any() else None


def _numpy(array: pa.Array) -> np.ndarray:
    return array.to_numpy(zero_copy_only=False)


def _quoted(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
