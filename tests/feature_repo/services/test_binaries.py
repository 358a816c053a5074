"""Which programs run, and that those of the wheels do."""

import os
import stat
from pathlib import Path

import psycopg
import pytest

from feature_repo.errors import StoreError
from feature_repo.services.binaries import (
    postgres_folder,
    postgres_version,
    redis_binary,
    runnable,
    system_postgres,
    wheel_postgres,
)
from feature_repo.services.postgres import PostgresServer
from feature_repo.services.processes import as_root, free_port, reachable


def test_the_wheels_server_runs(scratch: Path) -> None:
    newest = wheel_postgres()[0]
    programs = runnable(newest, scratch / "copies")
    server = PostgresServer(scratch / "postgres", free_port(), "secret", programs=programs)
    server.start()
    try:
        with psycopg.connect(server.url) as connection:
            (said,) = connection.execute("SHOW server_version_num").fetchone() or ("",)
        assert int(said) // 10_000 == postgres_version(newest)
        assert "secret" not in repr(server)
    finally:
        server.stop()
    assert server.process() is None


def test_programs_that_the_account_cannot_reach_are_copied_once(scratch: Path) -> None:
    package = scratch / "closed" / "package"
    programs = package / "install" / "bin"
    programs.mkdir(parents=True)
    library = package.with_name("package.libs") / "library.so"
    library.parent.mkdir()
    for path in (programs / "postgres", library):
        path.write_text("")
        path.chmod(0o755)
    (scratch / "closed").chmod(0o700)
    copies = scratch / "copies"
    found = runnable(programs, copies)
    if not as_root():
        assert found == programs
        return
    assert reachable(found)
    assert os.access(found / "postgres", os.X_OK)
    assert (found.parents[2] / "package.libs" / "library.so").exists()
    before = (found / "postgres").stat()
    assert runnable(programs, copies) == found
    assert (found / "postgres").stat().st_ino == before.st_ino


def test_data_of_another_version_are_not_opened(scratch: Path) -> None:
    with pytest.raises(StoreError, match=r"written by PostgreSQL 7, found \d+"):
        postgres_folder(7)
    assert (postgres_folder() / "initdb").exists()


def test_packages_are_found_by_version_and_other_folders_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for version in ("9.6", "16", "17", "old", "17-backup", "nan"):
        (tmp_path / version / "bin").mkdir(parents=True)
        if version != "16":  # a client's package alone
            for program in ("postgres", "initdb", "pg_ctl"):
                (tmp_path / version / "bin" / program).touch()
    monkeypatch.setenv("PATH", "")
    found = [folder.parent.name for folder in system_postgres(tmp_path)]
    assert found == ["17", "9.6"]


def test_redis_is_found() -> None:
    assert redis_binary().stat().st_mode & stat.S_IXUSR
