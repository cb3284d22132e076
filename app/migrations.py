"""The database schema as numbered steps: append a function, never change or reorder one that was released.

All pending steps run in one exclusive transaction, so a crash or a second process leaves the old schema or the new one.
Later features are meant to be additive (new columns with defaults, new tables): JSON columns hold what nobody queries,
and role and status carry no CHECK because SQLite can only change a CHECK by rebuilding the table.
"""

from sqlite_utils import Database
from sqlite_utils.migrations import Migrations

__all__ = ["NewerSchemaError", "apply_migrations", "migrations"]

migrations = Migrations("medusa_chat")


class NewerSchemaError(Exception):
    """The database was written by a newer version of the app than this one."""


def apply_migrations(db: Database) -> None:
    """Bring the schema up to date; raises NewerSchemaError, and changes nothing, for steps unknown to this version."""
    unknown = {step.name for step in migrations.applied(db)} - set(STEPS)
    if unknown:
        raise NewerSchemaError(f"The database knows {', '.join(sorted(unknown))}, which this version does not.")
    if not migrations.pending(db):
        return
    db.conn.execute("BEGIN IMMEDIATE")  # apply() then nests as savepoints: two processes cannot migrate at once
    try:
        migrations.apply(db)
        db.conn.execute("COMMIT")
    except BaseException:
        db.conn.rollback()
        raise


@migrations()
def m001_conversations(db: Database) -> None:
    """Conversations, their messages as a tree, and the decode trace of each answer.

    `num` is an explicit rowid: an implicit one may change on VACUUM, and order among siblings and a later full-text
    index rest on it. A message's parent makes branches (edit, regenerate) plain rows; `head_id` is the leaf shown.
    """
    db.execute(
        """
        CREATE TABLE conversations (
            num INTEGER PRIMARY KEY,
            id TEXT NOT NULL UNIQUE,
            title TEXT NOT NULL DEFAULT '',
            title_source TEXT NOT NULL DEFAULT 'auto',  -- 'auto', 'model' or 'user': a name a person gave is kept
            folder TEXT,
            pinned INTEGER NOT NULL DEFAULT 0,
            settings TEXT NOT NULL DEFAULT '{}' CHECK (json_valid(settings)),
            head_id TEXT REFERENCES messages(id) ON DELETE SET NULL DEFERRABLE INITIALLY DEFERRED,
            created_ms INTEGER NOT NULL,
            updated_ms INTEGER NOT NULL,
            deleted_ms INTEGER
        )
        """
    )
    db.execute(
        """
        CREATE TABLE messages (
            num INTEGER PRIMARY KEY,
            id TEXT NOT NULL UNIQUE,
            conversation_id TEXT NOT NULL REFERENCES conversations(id) ON DELETE CASCADE,
            parent_id TEXT REFERENCES messages(id) ON DELETE CASCADE,
            role TEXT NOT NULL,
            content TEXT NOT NULL DEFAULT '',
            status TEXT NOT NULL DEFAULT 'complete',
            error TEXT NOT NULL DEFAULT '',
            settings TEXT NOT NULL DEFAULT '{}' CHECK (json_valid(settings)),
            stats TEXT NOT NULL DEFAULT '{}' CHECK (json_valid(stats)),
            created_ms INTEGER NOT NULL,
            updated_ms INTEGER NOT NULL
        )
        """
    )
    db.execute(
        """
        CREATE TABLE traces (
            message_id TEXT PRIMARY KEY REFERENCES messages(id) ON DELETE CASCADE,
            format INTEGER NOT NULL,
            steps INTEGER NOT NULL,
            data BLOB NOT NULL
        )
        """
    )
    db.execute("CREATE INDEX messages_by_conversation ON messages (conversation_id, parent_id)")
    db.execute("CREATE INDEX messages_by_parent ON messages (parent_id)")
    db.execute("CREATE INDEX messages_by_status ON messages (status) WHERE status = 'running'")
    db.execute("CREATE INDEX conversations_by_date ON conversations (deleted_ms, updated_ms)")


@migrations()
def m002_search_and_origin(db: Database) -> None:
    """Full-text search over titles and texts, kept by triggers, and where an imported conversation came from.

    The indexes hold no text of their own: rowids are the explicit `num` of the first step.
    """
    db.execute("ALTER TABLE conversations ADD COLUMN origin TEXT")
    db.execute("CREATE UNIQUE INDEX conversations_by_origin ON conversations (origin) WHERE origin IS NOT NULL")
    for table, column in (("messages", "content"), ("conversations", "title")):
        _add_search(db, table, column)


def _add_search(db: Database, table: str, column: str) -> None:
    index = f"{table}_search"
    db.execute(
        f"CREATE VIRTUAL TABLE {index} USING fts5({column}, content='{table}', content_rowid='num', "
        "tokenize='unicode61 remove_diacritics 2')"
    )
    add = f"INSERT INTO {index} (rowid, {column}) VALUES (new.num, new.{column});"
    drop = f"INSERT INTO {index} ({index}, rowid, {column}) VALUES ('delete', old.num, old.{column});"
    db.execute(f"CREATE TRIGGER {index}_added AFTER INSERT ON {table} BEGIN {add} END")
    db.execute(f"CREATE TRIGGER {index}_removed AFTER DELETE ON {table} BEGIN {drop} END")
    db.execute(f"CREATE TRIGGER {index}_changed AFTER UPDATE OF {column} ON {table} BEGIN {drop} {add} END")
    db.execute(f"INSERT INTO {index} ({index}) VALUES ('rebuild')")


STEPS = ("m001_conversations", "m002_search_and_origin")  # every released step, in order
