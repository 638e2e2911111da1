"""PDF, HTML and DOCX files → text, by the libraries of the extra `files`."""

from __future__ import annotations

import io
import logging
import re
import zipfile
from collections.abc import Callable

MAX_FILE_BYTES = 64 * 2**20  # of a file that is cut into passages, and of a DOCX file's unpacked parts
MAX_XML_BYTES = 8 * 2**20  # of a DOCX file's unpacked XML; parsed, it takes up to 140 times as much memory
_NO_TEXT = ("script", "style", "nav", "template", "noscript", "img")
# A line of a page ends here without the end of a sentence; a hyphen there parts a word.
_PARTED_WORD = re.compile(r"(?<=[^\W\d_])-\n(?=[^\W\d_A-Z])")
_WRAPPED_LINE = re.compile(r"(?<![\s.!?:;])\n(?=\S)")


class FormatError(ValueError):
    """A file can't be read as its ending says. The message has the rule and the remedy, without the file's name."""


def text_of(ending: str, data: bytes) -> str:
    """The text of a file: Markdown of HTML and DOCX, plain text of PDF. FormatError.

    ending: one of FORMATS.
    """
    name = ending.removeprefix(".").upper()
    try:
        text = FORMATS[ending](data)
    except FormatError:
        raise
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        reason = f"must be read by the package {package}; run pip install '.[files]' in the project's folder"
        raise FormatError(reason) from error
    except Exception as error:  # noqa: BLE001  # a damaged file makes these libraries raise errors of any kind
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise FormatError(f"must be a sound {name} file, got: {reason}; save it anew") from error
    return text.replace("\0", "").encode(errors="replace").decode()


def _of_pdf(data: bytes) -> str:
    import pypdf

    logging.getLogger("pypdf").setLevel(logging.CRITICAL)  # it warns of faults in files that it reads nevertheless
    reader = pypdf.PdfReader(io.BytesIO(data))
    if reader.is_encrypted and not reader.decrypt(""):
        raise FormatError("must be readable without a password, it is encrypted; save it without one")
    pages = [page.extract_text().strip() for page in reader.pages]
    text = re.sub(r"[ \t]+\n", "\n", "\n\n".join(page for page in pages if page))
    if pages and not text:
        raise FormatError("must hold text, its pages hold images only; run OCR on it first")
    return _WRAPPED_LINE.sub(" ", _PARTED_WORD.sub("", text))


def _of_html(data: bytes | str) -> str:
    from bs4 import BeautifulSoup
    from markdownify import ATX, markdownify

    soup = BeautifulSoup(data, "lxml")
    for element in soup(_NO_TEXT):
        element.decompose()
    if soup.title is not None:
        title = " ".join(soup.title.get_text().split())
        soup.title.decompose()
        if title and soup.h1 is None and soup.body is not None:
            heading = soup.new_tag("h1")
            heading.string = title
            soup.body.insert(0, heading)
    plain = ["a", "b", "strong", "em", "i", "code"]
    return markdownify(
        str(soup),
        heading_style=ATX,
        strip=plain,
        escape_asterisks=False,
        escape_underscores=False,
        wrap=True,  # which joins the lines of a paragraph
        wrap_width=None,
    )


def _of_docx(data: bytes) -> str:
    import mammoth

    try:
        parts = zipfile.ZipFile(io.BytesIO(data)).infolist()
    except zipfile.BadZipFile as error:
        raise FormatError("must be a sound DOCX file without a password, it is no ZIP file; save it anew") from error
    xml = [part for part in parts if part.filename.lower().endswith((".xml", ".rels"))]
    for limit, what, some in ((MAX_FILE_BYTES, "bytes", parts), (MAX_XML_BYTES, "bytes of XML", xml)):
        num_bytes = sum(part.file_size for part in some)
        if num_bytes > limit:
            raise FormatError(f"must be at most {limit:,} {what} unpacked, got {num_bytes:,}; split it")
    return _of_html(mammoth.convert_to_html(io.BytesIO(data)).value)


FORMATS: dict[str, Callable[[bytes], str]] = {".pdf": _of_pdf, ".html": _of_html, ".htm": _of_html, ".docx": _of_docx}
