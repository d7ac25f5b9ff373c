"""Files that are whole or absent, whenever the process or the machine stops."""

import os
from pathlib import Path


def replace(path: Path, content: bytes) -> None:
    """Make `content` the file at `path`, durably: a crash leaves the old file or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.new")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
