"""What a media file is by its own bytes, before a decoder sees it."""

import os
import stat
import struct

CONTAINERS = "mp4/mov, mkv/webm, avi, mpeg-ts or flv"


class BadFile(Exception):
    """Why a file cannot be used, before the row's name is known."""


def check_file(path: str) -> os.stat_result:
    try:
        status = os.stat(path)
    except OSError as error:
        raise BadFile(f"{error.strerror}; check the path and media_root") from None
    if stat.S_ISDIR(status.st_mode):
        raise BadFile("is a directory, expected a file")
    if not stat.S_ISREG(status.st_mode):  # opening a named pipe would wait for ever
        raise BadFile("is not a regular file")
    if status.st_size == 0:
        raise BadFile("is an empty file; copy or download it again")
    return status


def recognise_container(path: str) -> str:
    """FFmpeg's name of the container, by the file's own bytes.

    Decoders left to guess also open playlists, whatever the file is called, and with them other files.
    """
    with open_media(path) as file:
        head = file.read(1024)
        for container, found in (
            ("mov", head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip")),
            ("matroska", head.startswith(b"\x1a\x45\xdf\xa3")),
            ("avi", head.startswith(b"RIFF") and head[8:12] in (b"AVI ", b"AVIX")),
            ("flv", head.startswith(b"FLV\x01")),
        ):
            if found:
                check_whole(file, container)
                return container
        for offset, packet_bytes in ((0, 188), (4, 192)):  # plain, and with the time codes of m2ts
            if len(head) > offset + 2 * packet_bytes and set(head[offset::packet_bytes]) == {0x47}:
                # Nothing in mpeg-ts says how many packets there are, so a cut between two of them cannot be seen.
                end = file.seek(0, os.SEEK_END)
                refuse_cut("mpegts", end, end + -end % packet_bytes)
                return "mpegts"
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n")
    if head.startswith((b"\x89PNG", b"\xff\xd8\xff", b"GIF8")) or head[8:12] == b"WEBP":
        kind = "an image"
    elif text.startswith((b"#EXTM3U", b"ffconcat")):
        kind = "a playlist, which could make a decoder open other files"
    elif not set(head) & set(range(9)):  # text has no such bytes
        kind = "a text file"
    else:
        kind = "no container that is known here"
    raise BadFile(f"is {kind}; expected {CONTAINERS} by its content: convert the file or leave the row out")


def check_whole(file, container):
    """Raise BadFile for a file that was cut off: decoders say less, or decode the part that is there."""
    end = file.seek(0, os.SEEK_END)
    position, kinds = 13 if container == "flv" else 0, set()
    while position < end:
        file.seek(position)
        kind, size = read_element(file.read(16).ljust(16, b"\0"), container, end - position)
        if not size:  # something else was appended
            break
        if container != "mov" or kind in (b"moov", b"mdat", b"moof"):
            refuse_cut(container, end, position + size)
        kinds.add(kind)
        position += size
    if b"meta" in kinds and b"moov" not in kinds:
        raise BadFile("is a still image (HEIC or AVIF); expected a video: convert it, and name it in `images`")
    if container == "mov" and b"moov" not in kinds:
        raise BadFile("is a truncated or unfinished mp4: it has no moov box; copy or download it again")


def read_element(head, container, left) -> tuple[bytes, int]:
    """Kind of the element of a file that begins with `head`, and bytes to the next one: 0 if it is no element.

    left: bytes to the end of the file, which is as far as some elements go.
    """
    if container == "mov":
        size, kind = struct.unpack(">I4s", head[:8])
        size = {0: left, 1: int.from_bytes(head[8:], "big")}.get(size, size)
        return kind, size if size >= 8 and kind.isascii() else 0
    if container == "avi":
        kind, size = struct.unpack("<4sI", head[:8])
        return kind, 8 + size if kind == b"RIFF" else 0
    if container == "flv":
        kind = head[:1]
        return kind, 15 + int.from_bytes(head[1:4], "big") if kind in (b"\x08", b"\x09", b"\x12") else 0
    id_bytes = 9 - head[0].bit_length()  # as many as zero bits before the first one, and it
    size_bytes = 9 - head[min(id_bytes, 4)].bit_length()
    if id_bytes > 4 or size_bytes > 8:
        return b"", 0
    size, largest = int.from_bytes(head[id_bytes : id_bytes + size_bytes], "big"), (1 << 7 * size_bytes) - 1
    size &= largest
    # Segments and clusters of a live recording do not say how long they are: what is in them comes next.
    return head[:id_bytes], id_bytes + size_bytes + (0 if size == largest else size)


def refuse_cut(container, end, expected):
    if expected > end:
        name = {"mov": "mp4", "matroska": "mkv or webm", "mpegts": "mpeg-ts"}.get(container, container)
        raise BadFile(
            f"is a truncated {name}: {expected} bytes long by what it holds, and the file has {end}; "
            "copy or download it again"
        )


def open_media(path):
    try:
        return open(path, "rb")
    except OSError as error:
        raise BadFile(f"{error.strerror}; check its permissions") from None
