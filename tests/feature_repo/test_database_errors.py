"""Which errors of databases are a user's to mend, from the libraries themselves."""

import sqlite3
from pathlib import Path

import psycopg
import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.exc import DBAPIError

from feature_repo.database_errors import database_trouble
from feature_repo.services.processes import free_port


def test_a_server_that_is_away_is_said_without_its_password() -> None:
    place = f"127.0.0.1:{free_port()}/d?connect_timeout=2"
    with pytest.raises(psycopg.OperationalError) as ours:
        psycopg.connect(f"postgresql://u:tiger@{place}")
    engine = create_engine(f"postgresql+psycopg2://u:tiger@{place}")
    with pytest.raises(DBAPIError) as feasts:
        engine.connect()
    for error in (ours.value, feasts.value):
        said = database_trouble(error)
        assert said is not None
        assert said.startswith("PostgreSQL does not answer as it should (connection")
        assert "Connection refused" in said
        assert "check the server and DATABASE_URL, then run this again" in said
        assert "tiger" not in said
        assert "\n" not in said
    wrapped = RuntimeError("something failed")
    wrapped.__cause__ = feasts.value
    assert database_trouble(wrapped) == database_trouble(feasts.value)


def test_a_file_that_another_holds_is_said(tmp_path: Path) -> None:
    engine = create_engine(f"sqlite:///{tmp_path}/a.db", connect_args={"timeout": 0.01})
    holder = sqlite3.connect(tmp_path / "a.db")
    holder.execute("BEGIN EXCLUSIVE")
    with engine.connect() as connection, pytest.raises(DBAPIError) as locked:
        connection.execute(text("CREATE TABLE one (number int)"))
    holder.close()
    engine.dispose()
    said = database_trouble(locked.value)
    assert said is not None
    assert said.startswith("SQLite does not answer as it should (database is locked): check who")


def test_what_a_server_refuses_is_said_and_a_wrong_statement_is_a_defect(
    database_url: str,
) -> None:
    engine = create_engine(database_url.replace("postgresql", "postgresql+psycopg2", 1))
    with engine.connect() as connection:
        connection.execute(text("CREATE ROLE stranger"))
        connection.execute(text("CREATE TABLE one (number int)"))
        connection.execute(text("SET LOCAL ROLE stranger"))
        with pytest.raises(DBAPIError) as refused:
            connection.execute(text("SELECT * FROM one"))
        connection.rollback()
        with pytest.raises(DBAPIError) as wrong:
            connection.execute(text("SELECT * FROM nowhere"))
        connection.rollback()
    engine.dispose()
    said = database_trouble(refused.value)
    assert said is not None
    assert "permission denied for table one" in said
    assert database_trouble(wrong.value) is None
    assert database_trouble(ValueError("no database at all")) is None
