"""Open a file of records for one pass: unpacked, hashed while it is read, and without a byte order mark."""

import contextlib
import hashlib
import io
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from bilevel.errors import DataError
from bilevel.files import open_regular

COMPRESSED = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".xz": "xz"}
_MAGIC = {b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bz2", b"\xfd7zXZ\x00": "xz"}
BUFFER = 1 << 20


class _Hashed(io.RawIOBase):
    """A raw stream whose bytes are hashed as they are read, and counted by `seen`."""

    def __init__(self, file: BinaryIO, seen: Callable[[int], object]):
        self.file, self.seen, self.digest = file, seen, hashlib.sha256()

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        count = self.file.readinto(buffer)
        self.digest.update(memoryview(buffer)[:count])
        self.seen(count)
        return count


@contextlib.contextmanager
def open_hashed(path: Path, content: str, seen: Callable[[int], object]) -> Iterator[io.BufferedReader]:
    """The file's bytes, unpacked if it is compressed. Raises DataError, at the end if its hash is not `content`.

    seen: called with the number of bytes of the file that have been read since the last call.
    """
    try:
        with open_regular(path) as file:
            hashed = _Hashed(file, seen)
            raw = io.BufferedReader(hashed, BUFFER)
            with _errors_of(path):
                with _unpacked(raw) as unpacked:
                    if unpacked.peek(3)[:3] == b"\xef\xbb\xbf":
                        unpacked.read(3)
                    yield unpacked
                while raw.read(BUFFER):  # what a reader has left, so that the hash is that of all bytes
                    pass
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from None
    if hashed.digest.hexdigest() != content:
        raise DataError(f"{path}: changed while it was read; start again when it is complete")


@contextlib.contextmanager
def _unpacked(raw: io.BufferedReader) -> Iterator[io.BufferedReader]:
    """The stream itself, or what it unpacks to, by its first bytes."""
    head = raw.peek(8)[:8]
    kind = next((kind for mark, kind in _MAGIC.items() if head.startswith(mark)), None)
    if kind is None:
        yield raw
    elif kind == "zstd":
        import pyarrow

        with pyarrow.CompressedInputStream(pyarrow.PythonFile(_Open(raw), "r"), "zstd") as stream:
            yield io.BufferedReader(_Readable(stream), BUFFER)
    else:
        import bz2
        import gzip
        import lzma

        kinds = {"gzip": gzip.GzipFile, "bz2": bz2.BZ2File, "xz": lzma.LZMAFile}
        given = {"fileobj": raw} if kind == "gzip" else {"filename": raw}
        with kinds[kind](**given) as stream:
            yield io.BufferedReader(stream, BUFFER)


class _Open:
    """A stream that stays open when pyarrow closes it, because the rest of it is still to be hashed."""

    closed = False

    def __init__(self, raw: io.BufferedReader):
        self.read = raw.read

    def close(self) -> None:
        pass


class _Readable(io.RawIOBase):
    """A stream of pyarrow as a raw stream of Python."""

    def __init__(self, stream: BinaryIO):
        self.stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        data = self.stream.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


@contextlib.contextmanager
def _errors_of(path: Path) -> Iterator[None]:
    """A context that turns the errors of a damaged archive into DataError."""
    try:
        yield
    except (EOFError, zlib.error) as error:
        raise DataError(f"{path}: the compressed file is damaged or cut short ({error}); copy it again") from None
    except OSError as error:
        if error.errno is not None:
            raise
        raise DataError(f"{path}: the compressed file is damaged or cut short ({error}); copy it again") from None
    except Exception as error:
        if type(error).__name__ != "LZMAError":
            raise
        raise DataError(f"{path}: the compressed file is damaged or cut short ({error}); copy it again") from None
