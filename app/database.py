"""One SQLite file behind one lock: opening it, reading rows, and changing them in atomic blocks.

Thread rule: one connection, opened with `check_same_thread=False`, is used only while `_lock` is held; every method
takes it, so any thread may call any method. Knows tables by name only; what they mean is in storage.
"""

import sqlite3
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from sqlite_utils import Database
from sqlite_utils.db import Table

from app.migrations import NewerSchemaError, apply_migrations
from app.records import StorageError

__all__ = ["DataFile"]

BUSY_TIMEOUT_MS = 5000


class DataFile:
    """A database file at the newest schema; safe to share between threads (see the module's thread rule)."""

    def __init__(self, path: Path) -> None:
        """Open or create the database at `path` and bring its schema up to date; raises StorageError."""
        self.path = path
        self._lock = threading.RLock()
        self._db = _open(path)

    def close(self) -> None:
        with self._lock:
            self._db.close()

    @contextmanager
    def atomic(self) -> Iterator[None]:
        """Make several calls one transaction: all of them are on disk afterwards, or none."""
        with self._lock, _as_storage_error(self.path):
            if self._db.conn.in_transaction:
                with self._db.atomic():
                    yield
            else:
                with self._write_transaction():
                    yield

    @contextmanager
    def _write_transaction(self) -> Iterator[None]:
        # IMMEDIATE, because SQLite waits for another process's write only before a transaction's first read: one that
        # has read and then wants to write is refused at once, whatever the busy timeout.
        connection = self._db.conn
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield
            connection.execute("COMMIT")
        except BaseException:
            connection.rollback()
            raise

    def rows(self, sql: str, parameters: Sequence[Any] = ()) -> list[dict[str, Any]]:
        """Read rows as dictionaries; values go in as parameters, never into the SQL."""
        with self._lock, _as_storage_error(self.path):
            return list(self._db.query(sql, list(parameters)))

    def change(self, sql: str, parameters: Sequence[Any] = ()) -> int:
        """Run one writing statement; returns how many rows it touched."""
        with self.atomic():
            return self._db.execute(sql, list(parameters)).rowcount

    def insert(self, table: str, row: Mapping[str, Any], **options: Any) -> None:
        """Add one row; `options` are those of sqlite-utils' `insert`."""
        with self.atomic():
            cast(Table, self._db[table]).insert(dict(row), **options)

    def update(self, table: str, row_id: str, changes: Mapping[str, Any], missing: type[StorageError]) -> None:
        """Change the row with this id; raises `missing` where there is none."""
        columns = ", ".join(f"{column} = ?" for column in changes)
        touched = self.change(f"UPDATE {table} SET {columns} WHERE id = ?", [*changes.values(), row_id])
        if touched == 0:
            raise missing(f"There is nothing with the id {row_id!r} in {table}; it may have been removed for good.")


def _open(path: Path) -> Database:
    connection: sqlite3.Connection | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        connection = sqlite3.connect(path, check_same_thread=False, timeout=BUSY_TIMEOUT_MS / 1000)
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")  # a sent message outlives a power cut; twice a second is cheap
        connection.execute("PRAGMA foreign_keys = ON")
        database = Database(connection, execute_plugins=False)
        apply_migrations(database)
        return database
    except NewerSchemaError as error:
        _close(connection)
        raise StorageError(f"{error} Update the app, or use another --data-dir than {path.parent}.") from error
    except (sqlite3.Error, OSError) as error:
        _close(connection)
        raise StorageError(
            f"The conversations in {path} cannot be opened ({error}). Check the file's permissions and free space, "
            "or start with another --data-dir; nothing was changed."
        ) from error


@contextmanager
def _as_storage_error(path: Path) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise StorageError(
            f"The conversations in {path} cannot be read or saved ({error}). Check that the disk has free space and "
            "that no other program holds the file."
        ) from error


def _close(connection: sqlite3.Connection | None) -> None:
    if connection is not None:
        connection.close()
