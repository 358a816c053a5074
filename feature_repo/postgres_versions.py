"""PostgreSQL tables of versions: which there are, and how they go."""

from collections.abc import Sequence

from psycopg import sql

from feature_repo.offline_postgres import PARTS_TABLE
from feature_repo.postgres_load import only_load
from feature_repo.postgres_session import Database, Session
from feature_repo.version_names import VERSIONED

_THEN = "check the server and DATABASE_URL, then run this again"


def versioned_tables(database: Database) -> dict[str, int]:
    """Tables of every version -> their bytes, indexes included.

    Raises:
        StoreError: If the server cannot be reached.
    """
    query = """
        SELECT relname, pg_total_relation_size(oid) FROM pg_class
        WHERE relkind = 'r' AND relnamespace = to_regnamespace(quote_ident(%s))
        AND relname LIKE ANY(%s) ORDER BY relname
    """
    patterns = [base.replace("_", r"\_") + r"\_%" for base in VERSIONED]

    def read(session: Session) -> dict[str, int]:
        return dict(session.execute(query, [database.schema, patterns]).fetchall())

    return database.read(read)


def drop_tables(database: Database, tables: Sequence[str]) -> None:
    """Drop tables and forget that they were loaded, in one transaction.

    It waits for the readings that have begun.

    Raises:
        StoreError: If the server cannot be reached or refuses.
    """
    if not tables:
        return
    with (
        database.sentences(_THEN),
        database.session() as session,
        only_load(session, database),
        session.transaction(),
    ):
        for table in tables:
            session.execute(sql.SQL("DROP TABLE IF EXISTS {}").format(sql.Identifier(table)))
        session.execute(
            sql.SQL("DELETE FROM {} WHERE table_name = ANY(%s)").format(
                sql.Identifier(PARTS_TABLE)
            ),
            [list(tables)],
        )
