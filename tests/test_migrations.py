"""The schema from blank and from every released schema with data in it, and what happens to one from the future."""

import sqlite3
from pathlib import Path

import pytest
from sqlite_utils import Database

from app.migrations import STEPS, NewerSchemaError, apply_migrations, migrations
from app.storage import ConversationStore, StorageError


def open_database(path: Path) -> Database:
    return Database(sqlite3.connect(path), execute_plugins=False)


def database_at(path: Path, step: str) -> Database:
    """A database whose last applied step is `step`."""
    database = open_database(path)
    migrations.apply(database, stop_before=STEPS[STEPS.index(step) + 1 :])
    return database


def add_first_schema_data(database: Database) -> None:
    """Rows written with the columns of the first released schema, and nothing else."""
    with database.atomic():
        database.execute(
            "INSERT INTO conversations (id, title, settings, created_ms, updated_ms) VALUES "
            "('c1', 'Kept', '{\"temperature\": 0.5}', 1, 2)"
        )
        database.execute(
            "INSERT INTO messages (id, conversation_id, role, content, created_ms, updated_ms) VALUES "
            "('u1', 'c1', 'user', 'Hello', 1, 1)"
        )
        database.execute(
            "INSERT INTO messages "
            "(id, conversation_id, parent_id, role, content, status, stats, created_ms, updated_ms) "
            "VALUES ('a1', 'c1', 'u1', 'assistant', 'Hi', 'cancelled', '{\"steps\": 1}', 2, 2)"
        )
        database.execute("INSERT INTO traces VALUES ('a1', 1, 1, x'00ff')")
        database.execute("UPDATE conversations SET head_id = 'a1'")


def schema_of(database: Database) -> dict[str, str]:
    return {table.name: table.schema for table in database.tables if not table.name.startswith("_")}


def test_steps_list_is_what_is_registered(tmp_path: Path) -> None:
    registered = tuple(step.name for step in migrations.pending(open_database(tmp_path / "blank.db")))
    assert registered == STEPS
    assert [int(name[1:4]) for name in STEPS] == list(range(1, len(STEPS) + 1))


def test_blank_database_gets_every_step_once(tmp_path: Path) -> None:
    database = open_database(tmp_path / "a.db")
    apply_migrations(database)
    before = schema_of(database)
    apply_migrations(database)
    assert schema_of(database) == before
    assert [step.name for step in migrations.applied(database)] == list(STEPS)


@pytest.mark.parametrize("step", STEPS)
def test_every_released_schema_upgrades_with_its_data(tmp_path: Path, step: str) -> None:
    path = tmp_path / "old.db"
    database = database_at(path, step)
    add_first_schema_data(database)
    database.close()
    store = ConversationStore(path)
    assert [(message.role, message.content) for message in store.thread("c1")] == [
        ("user", "Hello"),
        ("assistant", "Hi"),
    ]
    assert store.conversation("c1").settings == {"temperature": 0.5}
    assert store.message("a1").status == "cancelled"
    assert store.trace("a1") == (1, b"\x00\xff")
    blank = ConversationStore(tmp_path / "new.db")
    assert schema_of(store._db) == schema_of(blank._db)
    store.close()
    blank.close()


def test_failing_step_leaves_the_old_schema(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.db"
    ConversationStore(path).close()
    database = open_database(path)
    before = schema_of(database)

    def m999_breaks(db: Database) -> None:
        db.execute("ALTER TABLE messages ADD COLUMN half TEXT")
        db.execute("THIS IS NOT SQL")

    broken = migrations._Migration("m999_breaks", m999_breaks)
    monkeypatch.setattr(migrations, "_migrations", [*migrations._migrations, broken])
    with pytest.raises(sqlite3.OperationalError):
        apply_migrations(database)
    assert schema_of(open_database(path)) == before


def test_newer_database_is_refused_unchanged(tmp_path: Path) -> None:
    path = tmp_path / "future.db"
    ConversationStore(path).close()
    database = open_database(path)
    with database.atomic():
        database.execute(
            "INSERT INTO _sqlite_migrations (migration_set, name, applied_at) VALUES ('medusa_chat', 'm900_x', 'now')"
        )
    with pytest.raises(NewerSchemaError, match="m900_x"):
        apply_migrations(database)
    with pytest.raises(StorageError, match="Update the app"):
        ConversationStore(path)
