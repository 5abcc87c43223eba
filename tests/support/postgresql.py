"""A PostgreSQL server of Debian's, in a directory of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def binaries() -> Path | None:
    """Return where PostgreSQL's programs are; None where it is not installed."""
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    return found[-1].parent if found else None


@contextmanager
def database(port: int) -> Iterator[str]:
    """Run a server on a port of 127.0.0.1, and give SQLAlchemy's address of a database in it."""
    programs = binaries()
    assert programs is not None
    # It does not run as root.
    user = "postgres" if os.getuid() == 0 else None
    directory = Path(tempfile.mkdtemp(prefix="postgresql-"))
    if user is not None:
        shutil.chown(directory, user)

    def run(program: str, *arguments: str) -> None:
        command = [str(programs / program), *arguments]
        log = directory / "programs.log"
        with log.open("ab") as output:
            subprocess.run(
                command, check=True, cwd=directory, user=user, stdout=output, stderr=output
            )

    data = str(directory / "data")
    options = f"-c listen_addresses=127.0.0.1 -p {port} -k {directory} -c fsync=off"
    try:
        run("initdb", "-D", data, "-U", "tester", "--auth=trust", "--no-sync")
        run("pg_ctl", "-D", data, "-w", "-l", str(directory / "server.log"), "-o", options, "start")
        try:
            yield f"postgresql+psycopg2://tester@127.0.0.1:{port}/postgres"
        finally:
            run("pg_ctl", "-D", data, "-w", "-m", "immediate", "stop")
    finally:
        shutil.rmtree(directory, ignore_errors=True)
