"""Shards on disk: what makes hours of sampling and scoring safe to kill, and to start again.

A store is a directory that `load_dataset` reads:

```
data-00003-of-00012.parquet       the rows that came out of `rows_per_shard` consecutive input rows
.trl_lopd/                        hidden, so `datasets` takes nothing in it for data
    manifest.json                 what the run computes; there before any shard is, and never changed
    process-0.lock                locked while process 0 of a run writes; the kernel unlocks it if the process dies
    *.tmp                         being written
```

Every file appears by a rename after its bytes are on disk, so a shard that has its name is done: a process killed at
any instruction, or a power cut, leaves a shard that is whole or one that is computed again, never half of one. What
happens to it later is found by the checksums of its pages. Its footer holds the counts that came with it.
"""

from __future__ import annotations

import errno
import glob
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from ..errors import ShardError

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

HIDDEN = ".trl_lopd"
SCHEMA_VERSION = 2

# The key of the counts in a shard's footer.
_COUNTS = b"trl_lopd"

# What may lie in a directory that becomes a store: a dataset repository that has just been cloned.
_MAY_BE_THERE = {HIDDEN, "README.md", ".gitattributes", ".git"}

# In memory, before compression. Who reads one row reads its row group.
_ROW_GROUP_BYTES = 64 * 2**20


class ShardStore:
    """
    Shards of a long computation over the input rows `0..rows - 1`, each written once and for good.

    ```python
    pins = {"inputs": digest, "teacher": fingerprint.id, "top_k": 8}
    with ShardStore(directory, pins=pins, rows=len(data), rows_per_shard=512) as store:
        for shard in store.pending:
            store.write(shard, compute(data.select(store.span(shard))))
    table = store.dataset()
    ```

    Several processes share the work by shard number: shard `i` is that of process `i % num_processes`, so that shares
    never overlap, and another number of processes resumes as well. Process 0 enters first, then a barrier, then the
    others enter: it checks the directory, creates the store and clears what a killed run left. If it raises, the
    others must not enter. After the work, a barrier again, before `counts` and `dataset`.

    Args:
        directory (`str` or `Path`): Local; created if it does not exist.
        pins (`dict`): All that the result depends on, as JSON: digest of the input, fingerprint of the teacher,
            settings, seeds. A resumed run must have the same.
        rows (`int`): Input rows, at least 1.
        rows_per_shard (`int`): Input rows of a shard, at least 1; the last shard may have fewer. A kill loses at most
            the shard that was being computed.
        process_index (`int`, *optional*, defaults to 0): Which of the processes this is.
        num_processes (`int`, *optional*, defaults to 1): How many processes share the work.

    Attributes:
        pending (`list[int]`): Shards of this process's share that are not done, ascending. Known from entering on.
        num_shards (`int`): Shards of the store, of all processes.

    Raises:
        ShardError: On entering: another run writes to the directory; it holds another run's shards (other pins, rows
            or rows per shard), or files of another program; the disk is full.
        TypeError: If `pins` is not JSON.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        pins: dict[str, Any],
        rows: int,
        rows_per_shard: int,
        process_index: int = 0,
        num_processes: int = 1,
    ):
        self.directory = Path(directory)
        self.rows, self.rows_per_shard = rows, rows_per_shard
        self.process_index, self.num_processes = process_index, num_processes
        self.num_shards = -(-rows // rows_per_shard)
        self.pending = list(range(process_index, self.num_shards, num_processes))
        manifest = {"schema_version": SCHEMA_VERSION, "rows": rows, "rows_per_shard": rows_per_shard, "pins": pins}
        # As it reads back: JSON knows no tuples, and only strings as keys.
        self._manifest = json.loads(json.dumps(manifest))
        self._hidden = self.directory / HIDDEN
        self._lock = FileLock(self._hidden / f"process-{process_index}.lock", timeout=0)
        self._schema: pa.Schema | None = None

    def __enter__(self) -> ShardStore:
        with self._explain_full_disk():
            if self.process_index == 0:
                self._refuse_other_files()
                self._hidden.mkdir(parents=True, exist_ok=True)
                _sync(self.directory)
            elif not self._manifest_path.exists():
                raise ShardError(
                    f"Process {self.process_index} of {self.num_processes} cannot write to {self.directory}: process "
                    "0 of this run has not entered the store, or was refused. It enters first, then the others."
                )
            self._acquire(self._lock)
            try:
                self._open()
            except BaseException:
                self.__exit__()
                raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._lock.release()

    def span(self, shard: int) -> range:
        """Input rows of a shard."""
        return range(shard * self.rows_per_shard, min((shard + 1) * self.rows_per_shard, self.rows))

    def write(self, shard: int, table: pa.Table, **counts: int) -> None:
        """
        Writes a shard of the entered store and takes it off `pending`; when this returns, the shard survives anything.

        The same table gives the same bytes, however it is chunked. Features in the schema's metadata are kept.

        Args:
            shard (`int`): One of `pending`.
            table ([`pyarrow.Table`]): What came out of the rows of `span(shard)`: any number of rows, none too. All
                shards have the same columns.
            **counts (`int`): What the run reports in the end, such as rows dropped or tokens; `counts` adds them up.

        Raises:
            ShardError: If the disk is full, or the columns are not those of the shards before.
        """
        self._check_schema(shard, table.schema)
        with self._explain_full_disk(), replacing(self._path(shard), self._hidden) as file:
            write_parquet(table, file, {name: int(count) for name, count in counts.items()})
        # A new list: the caller may be iterating over the old one.
        self.pending = self.pending.copy()
        self.pending.remove(shard)

    @property
    def is_complete(self) -> bool:
        """Whether the shards of all processes are there."""
        return all(path.exists() for path in self._paths())

    def counts(self) -> dict[str, int]:
        """The counts given to `write`, by whichever process in whichever run, summed over the shards that are done."""
        total: Counter[str] = Counter()
        for path in filter(Path.exists, self._paths()):
            # Unlike `+`, this keeps what counts 0.
            total.update(json.loads(pq.read_metadata(path).metadata[_COUNTS]))
        return dict(total)

    def dataset(self) -> Dataset:
        """
        The rows of all shards, in the order of the input.

        `datasets` converts them once to an Arrow file in its cache, which it memory-maps.

        Raises:
            ShardError: If a shard is missing or damaged.
        """
        from datasets import Dataset, load_dataset

        check_complete(self.directory)
        if not any(pq.read_metadata(path).num_rows for path in self._paths()):
            # `load_dataset` has no tables without rows.
            return Dataset(pq.read_table(self._path(0)))
        # One pattern, because `datasets` searches the directory once for each.
        of_all = _shard_name(0, self.num_shards).partition("-of-")[2]
        pattern = f"{glob.escape(str(self.directory))}/data-*-of-{of_all}"
        return load_dataset("parquet", data_files=pattern, split="train")

    # ---- Entering ----

    def _open(self) -> None:
        """What is to be done once this process is alone with its share, process 0 with the whole store."""
        if self.process_index == 0:
            for path in self._hidden.glob("process-*.lock"):
                # Process 0 of a run can be killed and another one live on.
                if path != Path(self._lock.lock_file):
                    lock = FileLock(path, timeout=0)
                    self._acquire(lock)
                    lock.release()
            for path in self._hidden.glob("*.tmp"):
                path.unlink()
            if not self._manifest_path.exists():
                self._write_manifest()
        self._check_manifest()
        share = range(self.process_index, self.num_shards, self.num_processes)
        self.pending = [shard for shard in share if not self._is_done(shard)]
        if done := sorted(set(share) - set(self.pending)):
            self._schema = pq.read_schema(self._path(done[0]))

    def _refuse_other_files(self) -> None:
        # Listed before the manifest is looked for: a run that starts at this moment writes its shards after it.
        names = {path.name for path in self.directory.iterdir()} if self.directory.exists() else set()
        others = sorted(names - _MAY_BE_THERE)
        if others and not self._manifest_path.exists():
            raise ShardError(
                f"{self.directory} is not empty, and what is in it ({_short(', '.join(others))}) was not written by "
                "trl-lopd. Choose a new or empty directory for the output."
            )

    def _check_manifest(self) -> None:
        try:
            manifest = json.loads(self._manifest_path.read_bytes())
            version = manifest["schema_version"]
        except (ValueError, KeyError, TypeError) as error:
            raise ShardError(
                f"{self._manifest_path} cannot be read ({error!r}). Choose another output directory, or delete this "
                "one to start anew."
            ) from error
        if version != SCHEMA_VERSION:
            raise ShardError(
                f"{self.directory} was written by another version of trl-lopd (layout {version}, this one has "
                f"{SCHEMA_VERSION}). Resume it with that version, or choose another output directory."
            )
        if self.process_index == 0 and not any(self.directory.glob("data-*.parquet")):
            # A run that came to nothing does not bind the next.
            self._write_manifest()
            return
        runs = [(record.get("pins") or {}).get("run") for record in (manifest, self._manifest)]
        if runs[0] != runs[1]:
            raise ShardError(
                f"{self.directory} holds {runs[0] or 'something else'}, not {runs[1]}. Choose another output "
                "directory."
            )
        old, new = _flat(manifest), _flat(self._manifest)
        changed = [
            f"  {key.removeprefix('pins.')}: {_short(old.get(key, 'not set'))} -> {_short(new.get(key, 'not set'))}"
            for key in old | new
            if old.get(key) != new.get(key)
        ]
        if changed:
            raise ShardError(
                f"{self.directory} holds shards of a run with other arguments. What changed:\n"
                + "\n".join(changed)
                + "\nPass the same arguments to resume it. Choose another output directory, or delete this one, to "
                "start anew."
            )

    def _is_done(self, shard: int) -> bool:
        path = self._path(shard)
        try:
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                for group in range(file.num_row_groups):
                    file.read_row_group(group)
            return True
        except FileNotFoundError:
            return False
        except (OSError, pa.ArrowException) as error:
            if getattr(error, "errno", None) is not None:  # the system's, not of what is in the file
                raise
            logger.warning("%s is truncated or altered (%s). Its rows are computed again.", path, error)
            path.unlink()
            return False

    def _check_schema(self, shard: int, schema: pa.Schema) -> None:
        self._schema = self._schema or schema
        if not schema.equals(self._schema):
            old, new = ({field.name: str(field.type) for field in fields} for fields in (self._schema, schema))
            changed = [
                f"{name}: {old.get(name, 'not there')} -> {new.get(name, 'not there')}"
                for name in old | new
                if old.get(name) != new.get(name)
            ]
            raise ShardError(
                f"Shard {shard} has other columns than the shards before in {self.directory} "
                f"({', '.join(changed) or 'their order or nullability'}), and one table cannot hold both. Give every "
                "shard the same schema."
            )

    # ---- Locks ----

    def _acquire(self, lock: FileLock) -> None:
        try:
            lock.acquire()
        except Timeout as error:
            raise ShardError(
                f"Another run is writing to {self.directory} ({Path(lock.lock_file).stem}). Wait for it, stop it, or "
                "choose another output directory."
            ) from error

    # ---- Files ----

    @property
    def _manifest_path(self) -> Path:
        return self._hidden / "manifest.json"

    def _path(self, shard: int) -> Path:
        return self.directory / _shard_name(shard, self.num_shards)

    def _paths(self) -> Iterator[Path]:
        return map(self._path, range(self.num_shards))

    def _write_manifest(self) -> None:
        write_text(self._manifest_path, json.dumps(self._manifest, indent=1))

    @contextmanager
    def _explain_full_disk(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            safe = sum(path.exists() for path in self._paths())
            raise ShardError(
                f"The disk of {self.directory} is full ({error.strerror}); {safe} of {self.num_shards} shards are "
                "safe on it. Make room and run the same command again; it continues."
            ) from error


def check_complete(directory: str | Path) -> None:
    """
    Raises:
        ShardError: If a directory is a store, and shards of it are missing or truncated.
    """
    paths = [Path(path) for path in shards_of(directory)]
    again = "Run what writes it again with the same arguments; it continues."
    if missing := [path for path in paths if not path.exists()]:
        raise ShardError(
            f"{directory} is not complete: {len(missing)} of {len(paths)} shards are missing, the first is "
            f"{missing[0].name}. {again}"
        )
    for path in paths:
        try:
            pq.read_metadata(path)
        except (OSError, pa.ArrowException) as error:
            raise ShardError(f"{path} is truncated or altered ({error}). {again}") from error


def shards_of(directory: str | Path) -> list[str]:
    """The files of a store; empty if a directory is none. What else lies in or beneath it is not the store's."""
    try:
        manifest = json.loads((Path(directory) / HIDDEN / "manifest.json").read_bytes())
    except FileNotFoundError:
        return []
    shards = -(-manifest["rows"] // manifest["rows_per_shard"])
    return [str(Path(directory) / _shard_name(shard, shards)) for shard in range(shards)]


def read_pins(directory: str | Path) -> dict[str, Any]:
    """What the run that writes a directory computes; `{}` if there is none, or it cannot be read."""
    try:
        return json.loads((Path(directory) / HIDDEN / "manifest.json").read_bytes())["pins"]
    except (OSError, ValueError, KeyError, TypeError):
        return {}


@contextmanager
def replacing(path: Path, temporary_directory: Path | None = None) -> Iterator[BinaryIO]:
    """A file to write, which becomes `path` at once and for good when the block ends; nothing is left if it raises."""
    temporary = (temporary_directory or path.parent) / f"{path.name}.tmp"
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync(path.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes a file in UTF-8, see [`replacing`]."""
    with replacing(path) as file:
        file.write(text.encode())


def _sync(directory: Path) -> None:
    """Makes the names in a directory survive a power cut, where the system has a call for that."""
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(directory, os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _shard_name(shard: int, shards: int) -> str:
    # Numbers of one width, so that the order of the names is that of the shards.
    width = max(5, len(str(shards)))
    return f"data-{shard:0{width}}-of-{shards:0{width}}.parquet"


def write_parquet(table: pa.Table, file: BinaryIO, counts: dict[str, int]) -> None:
    # Pages end where chunks do.
    table = table.combine_chunks()
    empty = pa.BufferOutputStream()
    pq.write_table(table.schema.empty_table(), empty)
    leaves = pq.ParquetFile(empty.getvalue()).schema
    leaves = [leaves.column(i) for i in range(len(leaves))]
    # A dictionary of token ids or log-probabilities is bigger than the numbers. Split into bytes they compress well.
    split = [leaf.path for leaf in leaves if leaf.physical_type not in ("BYTE_ARRAY", "BOOLEAN", "INT96")]
    strings = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]
    with pq.ParquetWriter(
        file,
        table.schema,
        compression="zstd",
        use_dictionary=strings,
        use_byte_stream_split=split,
        write_page_checksum=True,
    ) as writer:
        writer.add_key_value_metadata({_COUNTS: json.dumps(counts)})
        # `datasets` does not get past a row group without rows.
        if table.num_rows:
            writer.write_table(table, row_group_size=max(1, _ROW_GROUP_BYTES * table.num_rows // max(1, table.nbytes)))


def _flat(value: Any, key: str = "") -> dict[str, str]:
    """The leaves of nested dicts, by dotted name, as JSON."""
    if isinstance(value, dict) and value:
        return {k: leaf for name, item in value.items() for k, leaf in _flat(item, f"{key}.{name}").items()}
    return {key.removeprefix("."): json.dumps(value, sort_keys=True, ensure_ascii=False)}


def _short(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:50]} … {text[-20:]}"
