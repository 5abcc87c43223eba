"""The documents of the demonstration: installed licence texts, or the files of a folder."""

from __future__ import annotations

import codecs
import hashlib
import logging
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

LICENCE_NAMES = ("license", "licence", "copying", "notice")
FOLDER_SUFFIXES = {".txt", ".md", ".pdf"}


class DocumentError(Exception):
    """No document can be read at all; the text is one line for the user."""


@dataclass(frozen=True)
class Document:
    """A readable, non-empty text and the name it is shown by."""

    name: str
    text: str


@dataclass
class Collection:
    """What was read, what was found but left out by the limit, and what was unreadable."""

    documents: list[Document] = field(default_factory=list)
    left_out: int = 0
    skipped: list[str] = field(default_factory=list)
    """One line per unreadable file: its name and the reason."""


def installed_licences(limit: int, roots: list[Path] | None = None) -> Collection:
    """Read up to ``limit`` different licence texts of the installed packages, by package name."""
    if roots is None:
        paths = sysconfig.get_paths()
        roots = [Path(path) for path in sorted({paths["purelib"], paths["platlib"]})]
    collection = _read(_licence_files(roots), limit)
    if not collection.documents:
        raise DocumentError(f"No licence texts found below {', '.join(map(str, roots))}.")
    return collection


def folder_documents(folder: Path, limit: int | None = None) -> Collection:
    """Read the .txt, .md and .pdf files in ``folder`` and below, by name."""
    if not folder.exists():
        raise DocumentError(f"There is no folder {folder}.")
    if not folder.is_dir():
        raise DocumentError(f"{folder} is not a folder.")
    try:
        list(folder.iterdir())
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
    except OSError as error:
        raise DocumentError(f"Cannot list {folder}: {error.strerror}.") from error
    files = [
        (str(path.relative_to(folder)), path)
        for path in paths
        if path.suffix.lower() in FOLDER_SUFFIXES
    ]
    if not files:
        raise DocumentError(f"{folder} holds no .txt, .md or .pdf files.")
    collection = _read(files, limit)
    if not collection.documents:
        raise DocumentError(f"No file in {folder} could be read: {collection.skipped[0]}.")
    return collection


def read_text(path: Path) -> str:
    """Return the text of a text or PDF file.

    Raises OSError when the file cannot be opened and ValueError when it holds no text.
    """
    text = _pdf_text(path) if path.suffix.lower() == ".pdf" else _decode(path.read_bytes())
    if not text.strip():
        raise ValueError("no text in it")
    return text


def _licence_files(roots: list[Path]) -> list[tuple[str, Path]]:
    files: list[tuple[str, Path]] = []
    for root in roots:
        for folder in root.glob("*.dist-info"):
            package = folder.name.partition("-")[0]
            for path in folder.rglob("*"):
                if path.name.lower().startswith(LICENCE_NAMES) and path.is_file():
                    relative = path.relative_to(folder).as_posix().removeprefix("licenses/")
                    files.append((f"{package}: {relative}", path))
    return sorted(files, key=lambda file: file[0].lower())


def _read(files: list[tuple[str, Path]], limit: int | None) -> Collection:
    collection = Collection()
    for number, document in enumerate(_distinct(files, collection.skipped)):
        if limit is None or number < limit:
            collection.documents.append(document)
        else:
            collection.left_out += 1
    return collection


def _distinct(files: list[tuple[str, Path]], skipped: list[str]) -> Iterator[Document]:
    seen: set[bytes] = set()
    for name, path in files:
        try:
            text = read_text(path)
        except OSError as error:
            skipped.append(f"{name} ({error.strerror or error})")
            continue
        except ValueError as error:
            skipped.append(f"{name} ({error})")
            continue
        digest = hashlib.sha256(text.encode(errors="replace")).digest()
        if digest not in seen:
            seen.add(digest)
            yield Document(name, text)


def _decode(content: bytes) -> str:
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return content.decode("utf-16")
    if b"\0" in content:
        raise ValueError("not a text file")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError:
        return content.decode("cp1252", errors="replace")


def _pdf_text(path: Path) -> str:
    import pypdf

    logging.getLogger("pypdf").setLevel(logging.CRITICAL)
    try:
        return "\n\n".join(page.extract_text() for page in pypdf.PdfReader(path).pages)
    except OSError:
        raise
    except Exception as error:  # Broken files raise many kinds of errors.
        raise ValueError(f"not a readable PDF: {error}") from error
