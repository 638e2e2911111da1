"""Real PDF, DOCX and HTML files for tests."""

from __future__ import annotations

import io
from pathlib import Path

import docx
import fpdf
import pypdf

HARBOUR = "The harbour of Orlen is deep and cold."
LAMPS = "Its lamps burn oil."


def make_pdf(path: Path, *pages: str, password: str | None = None) -> Path:
    """A PDF with these pages; the password "" only forbids printing."""
    made = fpdf.FPDF()
    made.set_font("helvetica", size=12)
    for page in pages:
        made.add_page()
        made.multi_cell(0, 8, page)
    writer = pypdf.PdfWriter(io.BytesIO(made.output()))
    if password is not None:
        writer.encrypt(password, "owner", algorithm="AES-256")
    writer.write(path)
    return path


def make_docx(path: Path) -> Path:
    made = docx.Document()
    made.add_heading("Orlen", 1)
    made.add_paragraph(HARBOUR)
    made.add_heading("Lamps", 2)
    made.add_paragraph(LAMPS)
    made.save(str(path))
    return path


def make_html(path: Path) -> Path:
    path.write_text(
        f"<title>Not this</title><style>p {{}}</style><nav>Menu</nav><h1>Orlen</h1><p>The <b>harbour</b>\n of "
        f"<a href='x'>Orlen</a> is deep and cold.<h2>Lamps</h2><p>{LAMPS}<script>no()</script>"
    )
    return path
