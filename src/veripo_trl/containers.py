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
        if head[4:8] in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
            check_mp4(file)
            return "mov"
    if head.startswith(b"\x1a\x45\xdf\xa3"):
        return "matroska"
    if head.startswith(b"RIFF") and head[8:12] in (b"AVI ", b"AVIX"):
        return "avi"
    if head.startswith(b"FLV\x01"):
        return "flv"
    for offset, packet_bytes in ((0, 188), (4, 192)):  # plain, and with the time codes of m2ts
        if len(head) > offset + 2 * packet_bytes and set(head[offset::packet_bytes]) == {0x47}:
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


def check_mp4(file):
    """Raise BadFile for an mp4 or mov that was cut off: decoders say less, or decode the part that is there."""
    end = file.seek(0, os.SEEK_END)
    position, seen = 0, set()
    while position + 8 <= end:
        file.seek(position)
        size, kind = struct.unpack(">I4s", file.read(8))
        if size == 1:
            size = int.from_bytes(file.read(8), "big")
        elif size == 0:  # up to the end of the file
            size = end - position
        if size < 8 or not kind.isascii():
            break  # something else was appended
        if position + size > end and kind in (b"moov", b"mdat", b"moof"):
            raise BadFile(
                f"is a truncated mp4: its {kind.decode()} box ends at byte {position + size}, the file at {end}; "
                "copy or download it again"
            )
        seen.add(kind)
        position += size
    if b"meta" in seen and b"moov" not in seen:
        raise BadFile("is a still image (HEIC or AVIF); expected a video: convert it, and name it in `images`")
    if b"moov" not in seen:
        raise BadFile("is a truncated or unfinished mp4: it has no moov box; copy or download it again")


def open_media(path):
    try:
        return open(path, "rb")
    except OSError as error:
        raise BadFile(f"{error.strerror}; check its permissions") from None
