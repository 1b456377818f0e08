"""The first bytes of a file -> the name of its format, where a name says more than "not an image"."""

from __future__ import annotations


class UnsupportedError(Exception):
    """An image of a kind that is not decoded; the text names it."""


class TooLargeError(Exception):
    """An image with more pixels, or more memory for them, than is allowed."""


#: First bytes of formats that load other resources, run code, or need a decoder that is not installed.
_UNSUPPORTED = (
    (b"%PDF", "PDF"),
    (b"%!PS", "PostScript"),
    (b"\xc5\xd0\xd3\xc6", "EPS"),
    (b"8BPS", "Photoshop"),
    (b"qoif", "QOI"),
    (b"DDS ", "DDS"),
    (b"P7\n", "PAM"),
    (b"PF\n", "PFM with colours"),
    (b"\x76\x2f\x31\x01", "OpenEXR"),
    (b"#?RADIANCE", "Radiance HDR"),
    (b"#?RGBE", "Radiance HDR"),
    (b"\x00\x00\x01\x00", "ICO"),
    (b"\xd7\xcd\xc6\x9a", "WMF"),
    (b"SIMPLE  =", "FITS"),
    (b"FUJIFILMCCD-RAW", "a camera's raw file (RAF)"),
    (b"IIRO", "a camera's raw file (ORF)"),
    (b"IIRS", "a camera's raw file (ORF)"),
    (b"IIU\0", "a camera's raw file (RW2)"),
    (b"II\xbc\x01", "JPEG XR"),
    (b"\x1aE\xdf\xa3", "a video (Matroska or WebM)"),
)
_HEIC_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1")
_AVIF_BRANDS = (b"avif", b"avis")

#: The kinds of JPEG by the marker of their frame (ITU-T T.81, table B.1; T.87 for JPEG-LS).
_JPEG_KINDS = {
    **dict.fromkeys((0xC0, 0xC1, 0xC2, 0xC9, 0xCA), "JPEG"),
    0xC3: "lossless JPEG",
    **dict.fromkeys((0xC5, 0xC6, 0xC7, 0xCD, 0xCE, 0xCF), "hierarchical JPEG"),
    0xCB: "lossless JPEG with arithmetic coding",
    0xF7: "JPEG-LS",
}
#: Sizes of the headers of BMPs, and compressions that are not decoded, by their number; OS/2 counts otherwise.
_BMP_HEADERS = (12, 16, 40, 52, 56, 64, 108, 124)
_BMP_COMPRESSIONS = {4: "JPEG inside", 5: "PNG inside", **dict.fromkeys((11, 12, 13), "CMYK colours")}
_OS2_COMPRESSIONS = {3: "Huffman compression", 4: "24-bit run lengths"}
_STARTS = (
    b"\xff\xd8\xff",
    b"\x89PNG\r\n\x1a\n",
    b"GIF8",
    b"II*\0",
    b"MM\0*",
    b"II+\0",
    b"MM\0+",
    b"\xff\x0a",
    b"\xff\x4f\xff",
    b"\0\0\0\x0cjP  ",
    b"\0\0\0\x0cJXL ",
)


def unsupported(data: bytes) -> str | None:
    """One sentence on why the format of a file is not decoded; None if it is decoded or unknown."""
    head = data[:512]
    name = next((name for magic, name in _UNSUPPORTED if head.startswith(magic)), None)
    if head.startswith(b"II*\0") and head[8:10] == b"CR":
        name = "a camera's raw file (CR2)"
    elif head[4:12] == b"ftypcrx ":
        name = "a camera's raw file (CR3)"
    elif head[4:8] == b"ftyp" and not _is_beginning_of_heif(head):
        name = f"a video or another file of the MP4 family (brand {head[8:12].decode(errors='backslashreplace')})"
    elif head.startswith(b"RIFF") and head[8:12] == b"AVI ":
        name = "a video (AVI)"
    elif head.startswith(b"BM"):
        name = _unsupported_bmp(head)
    elif head.startswith(b"\xff\xd8\xff"):
        name = _unsupported_jpeg(data)
    elif b"<svg" in head.lower():
        name = "SVG"
    return name and f"{name} is not supported"


def is_tga(data: bytes) -> bool:
    """Whether a file is a TGA by its end or, since older ones say nothing of themselves, by plausible values in its header."""
    if data[-18:-1] == b"TRUEVISION-XFILE.":
        return True
    if len(data) < 18:
        return False
    kinds = (1, 2, 3, 9, 10, 11) if data[1] == 1 else (2, 3, 10, 11) if data[1] == 0 else ()
    return data[2] in kinds and any(data[12:14]) and any(data[14:16]) and data[16] in (8, 15, 16, 24, 32) and data[17] < 64


def is_tiff(data: bytes) -> bool:
    """Whether a file begins like a TIFF or a BigTIFF."""
    return data[:4] in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def is_jpeg_2000(data: bytes) -> bool:
    """Whether a file begins like a JPEG 2000, in its own container or as a bare codestream."""
    return data.startswith((b"\xff\x4f\xff\x51", b"\x00\x00\x00\x0cjP  \r\n\x87\n"))


def jpeg_2000_bits(data: bytes) -> int:
    """Bits of a sample of the first band of a JPEG 2000 (ITU-T T.800, A.5.1); 0 for other files."""
    start = data.find(b"\xff\x4f\xff\x51") if is_jpeg_2000(data) else -1
    return (data[start + 42] & 0x7F) + 1 if 0 <= start < len(data) - 42 else 0


def is_heic(data: bytes) -> bool:
    """Whether a file begins like a HEIC image."""
    if data[4:8] != b"ftyp":
        return False
    brands = {data[8:12], *(data[at : at + 4] for at in range(16, min(int.from_bytes(data[:4], "big"), 128), 4))}
    return data[8:12] in _HEIC_BRANDS and not brands & set(_AVIF_BRANDS)


def is_beginning(data: bytes) -> bool:
    """Whether a file begins like an image of a format that is decoded."""
    if data.startswith(b"BM"):
        return int.from_bytes(data[14:18], "little") in _BMP_HEADERS if len(data) >= 18 else not any(data[6:10])
    if data.startswith(b"RIFF"):
        return b"WEBP".startswith(data[8:12])
    return data.startswith(_STARTS) or _is_beginning_of_heif(data)


def _is_beginning_of_heif(data: bytes) -> bool:
    """Whether a file begins like a HEIC or AVIF; videos begin alike, with other brands."""
    return data[4:8] == b"ftyp" and any(brand.startswith(data[8:12]) for brand in (*_HEIC_BRANDS, *_AVIF_BRANDS))


def jpeg_frame(data: bytes) -> tuple[str, int] | None:
    """The kind of a JPEG and the bits of its samples; None if it ends before its frame."""
    found = _frame_header(data)
    return None if found is None else (_JPEG_KINDS[found[0]], found[1])


def is_common_jpeg(data: bytes) -> bool:
    """Whether this is a JPEG of the kinds that every decoder knows: Huffman coding, 8 bits, in rows or progressive."""
    found = data.startswith(b"\xff\xd8") and _frame_header(data)
    return bool(found) and found in ((0xC0, 8), (0xC1, 8), (0xC2, 8))


def _frame_header(data: bytes) -> tuple[int, int] | None:
    """The marker of a JPEG's frame, and the bits of its samples."""
    at = 2
    while at + 4 <= len(data):
        if data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker == 0xFF:  # a fill byte
            at += 1
        elif marker in _JPEG_KINDS:
            return (marker, data[at + 4]) if at + 4 < len(data) else None
        elif marker == 0x01 or 0xD0 <= marker <= 0xD8:  # markers without a length
            at += 2
        else:
            at += 2 + int.from_bytes(data[at + 2 : at + 4], "big")
    return None


def _unsupported_bmp(head: bytes) -> str | None:
    """What neither Pillow nor `bmp.py` reads of BMPs."""
    if len(head) < 34 or int.from_bytes(head[14:18], "little") not in _BMP_HEADERS[2:]:
        return None
    bits, compression = int.from_bytes(head[28:30], "little"), int.from_bytes(head[30:34], "little")
    inside = _OS2_COMPRESSIONS if head[14] == 64 else _BMP_COMPRESSIONS
    if compression in inside:
        return f"a BMP with {inside[compression]}"
    return "a BMP of 64 bits a pixel" if bits == 64 else None


def _unsupported_jpeg(data: bytes) -> str | None:
    frame = jpeg_frame(data)
    if frame is None:
        return None
    kind, bits = frame
    if kind in ("JPEG", "lossless JPEG"):
        return None if bits == 8 else f"a {kind} of {bits} bits a sample"
    return kind
