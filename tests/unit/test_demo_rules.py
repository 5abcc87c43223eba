"""The demonstration's documents and its rule-based reader."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

DEMO = Path(__file__).parents[2] / "demo"
MODULES = ("documents", "phrases", "rules")

LEASE = """\
LEASE between Harbour Estates Ltd. (the "Landlord") and Maria Novak (the "Tenant").

1. The Tenant may use the premises as a private dwelling, provided that no noise is
   made at night.
2. The Tenant shall pay the rent on the first day of each month.
3. The Landlord is entitled to enter the premises on notice, except in an emergency.
4. The Tenant may not sublet the premises without written consent.
5. In no event is the Landlord liable for theft.
"""


@pytest.fixture
def demo(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The modules of the demonstration, by name."""
    monkeypatch.syspath_prepend(str(DEMO))
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    yield {name: importlib.import_module(name) for name in MODULES}
    for name in MODULES:
        sys.modules.pop(name, None)


def test_lease(demo: dict[str, Any]) -> None:
    """Rights, duties and disclaimers of an ordinary contract are told apart."""
    found = demo["rules"].read("lease", LEASE)
    assert found["document"] == "lease"
    assert found["parties"] == ["Landlord", "Tenant"]
    assert found["entitlements"] == [
        {
            "who": "The Tenant",
            "may": "use the premises as a private dwelling",
            "terms": "provided that no noise is made at night",
        },
        {
            "who": "The Landlord",
            "may": "enter the premises on notice",
            "terms": "except in an emergency",
        },
    ]
    assert found["obligations"] == [
        "The Tenant shall pay the rent on the first day of each month",
        "The Tenant may not sublet the premises without written consent",
    ]
    assert found["disclaimers"] == ["In no event is the Landlord liable for theft"]


@pytest.mark.parametrize(
    ("text", "who", "may", "terms"),
    [
        (
            "Permission is hereby granted, free of charge, to any person obtaining a copy of this "
            "font, to use and embed the Font, subject to the following conditions:\n\n"
            "The notice shall be kept in all copies.",
            "any person obtaining a copy of this font",
            "use and embed the Font",
            "free of charge; subject to the following conditions; "
            "The notice shall be kept in all copies",
        ),
        (
            "Permission to copy and sell this map for any purpose is hereby granted, provided "
            "that the legend is kept.",
            "anyone",
            "copy and sell this map",
            "for any purpose, provided that the legend is kept",
        ),
        (
            "Redistribution of the data is permitted provided that the source is named.",
            "anyone",
            "Redistribution of the data",
            "provided that the source is named",
        ),
        (
            "Acme hereby grants to Customer a perpetual license to run the Program.",
            "Customer",
            "run the Program",
            "perpetual license",
        ),
        ("The Board has the right to inspect the books.", "The Board", "inspect the books", None),
    ],
)
def test_phrasings(demo: dict[str, Any], text: str, who: str, may: str, terms: str | None) -> None:
    """The usual ways to grant something are understood, with their terms."""
    (found,) = demo["rules"].read("", text)["entitlements"]
    assert found == {"who": who, "may": may, "terms": terms or "none stated"}


@pytest.mark.parametrize(
    "text",
    [
        "This licence does not grant permission to use the trade names.",
        "Neither the name of the author nor that of the product may be used in advertising.",
        "The results may be wrong in some cases.",
        "It was a bright cold day in April, and the clocks were striking thirteen.",
        "",
    ],
)
def test_no_entitlement(demo: dict[str, Any], text: str) -> None:
    """Refusals, mere possibilities and other prose are not taken for permissions."""
    assert demo["rules"].read("", text)["entitlements"] == []


def test_sentences(demo: dict[str, Any]) -> None:
    """Wrapped lines are joined, list items stand alone, abbreviations end no sentence."""
    text = "First line\nwraps here. Acme Inc. Paris signs it.\n(a) item one here\n(b) item two here"
    assert demo["rules"].sentences(text) == [
        "First line wraps here.",
        "Acme Inc. Paris signs it.",
        "item one here",
        "item two here",
    ]


def test_copyright_holder_is_a_party(demo: dict[str, Any]) -> None:
    """The holder in a copyright line is a party; the phrase "copyright notice" is not."""
    text = "Copyright (c) 2019-2024 Jane Roe <jane@example.org>\n\nCopyright notice must be kept."
    assert demo["rules"].read("", text)["parties"] == ["Jane Roe"]


def test_answer_is_json_for_the_named_document(demo: dict[str, Any]) -> None:
    """A prompt is answered as JSON about the document after the marker line."""
    answer = json.loads(demo["rules"].answer_prompt("Do it.\n\nDocument: a lease\n" + LEASE))
    assert answer["document"] == "a lease"
    assert len(answer["entitlements"]) == 2
    assert json.loads(demo["rules"].answer_prompt("You may go."))["document"] == ""


def test_installed_licences(demo: dict[str, Any], tmp_path: Path) -> None:
    """Licence files are read by package name, once per content, up to the limit."""
    for package, name, text in [
        ("zeta-1.0", "LICENSE", "zeta"),
        ("alpha-2.0", "licenses/vendor/NOTICE.txt", "notice"),
        ("alpha-2.0", "licenses/COPYING", "copying"),
        ("beta-1", "LICENCE.md", "copying"),
        ("beta-1", "METADATA", "other"),
    ]:
        path = tmp_path / f"{package}.dist-info" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    collection = demo["documents"].installed_licences(2, [tmp_path])
    assert [(d.name, d.text) for d in collection.documents] == [
        ("alpha: COPYING", "copying"),
        ("alpha: vendor/NOTICE.txt", "notice"),
    ]
    assert (collection.left_out, collection.skipped) == (1, [])


def test_folder(demo: dict[str, Any], tmp_path: Path) -> None:
    """Text files of common encodings are read, unreadable ones are skipped and named."""
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "b.md").write_bytes("\ufeffcaf\u00e9!".encode())
    (tmp_path / "c.TXT").write_bytes("caf\u00e9?".encode("utf-16"))
    (tmp_path / "d.txt").write_bytes(b"\0\1")
    (tmp_path / "e.txt").write_text("  \n")
    (tmp_path / "f.docx").write_text("ignored")
    collection = demo["documents"].folder_documents(tmp_path)
    assert [d.text for d in collection.documents] == ["caf\u00e9", "caf\u00e9!", "caf\u00e9?"]
    assert collection.skipped == ["d.txt (not a text file)", "e.txt (no text in it)"]


def test_pdf(demo: dict[str, Any], tmp_path: Path) -> None:
    """The text of a PDF is read; a broken PDF is skipped and named."""
    pytest.importorskip("pypdf")
    content = b"BT /F1 12 Tf 72 720 Td (The Tenant may stay.) Tj ET"
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 612 792] /Contents 4 0 R "
        b"/Resources << /Font << /F1 5 0 R >> >> >>",
        b"<< /Length %d >>\nstream\n%s\nendstream" % (len(content), content),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    pdf = b"%PDF-1.4\n"
    offsets = []
    for number, body in enumerate(objects, 1):
        offsets.append(len(pdf))
        pdf += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    table = b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    pdf += b"xref\n0 6\n0000000000 65535 f \n%s" % table
    pdf += b"trailer << /Size 6 /Root 1 0 R >>\nstartxref\n%d\n%%%%EOF" % pdf.index(b"xref")
    (tmp_path / "good.pdf").write_bytes(pdf)
    (tmp_path / "bad.pdf").write_bytes(b"%PDF-1.4 broken")
    collection = demo["documents"].folder_documents(tmp_path)
    assert [d.text for d in collection.documents] == ["The Tenant may stay."]
    assert [line.split(" (")[0] for line in collection.skipped] == ["bad.pdf"]


def test_hopeless_folders(demo: dict[str, Any], tmp_path: Path) -> None:
    """A missing folder, a file, an empty folder and a folder of bad files give one clear line."""
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "x.txt").write_bytes(b"\0")
    for path, message in [
        (tmp_path / "none", "There is no folder"),
        (bad / "x.txt", "is not a folder"),
        (bad, "No file in .* could be read: x.txt"),
    ]:
        with pytest.raises(demo["documents"].DocumentError, match=message) as caught:
            demo["documents"].folder_documents(path)
        assert "\n" not in str(caught.value)
    (bad / "x.txt").unlink()
    with pytest.raises(demo["documents"].DocumentError, match=r"holds no \.txt"):
        demo["documents"].folder_documents(bad)
