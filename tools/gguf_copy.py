"""Copying a GGUF file with gguf-py."""

from __future__ import annotations

from collections.abc import Callable, Collection

import gguf


def copy_metadata(
    reader: gguf.GGUFReader,
    writer: gguf.GGUFWriter,
    leave_out: Collection[str] = (),
    rename: Callable[[str], str] = str,
) -> None:
    """All of a file's metadata, but for the fields of the header itself, which are the writer's, and `leave_out`."""
    for field in reader.fields.values():
        if field.name.startswith("GGUF.") or field.name in ("general.architecture", *leave_out):
            continue
        sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(rename(field.name), field.contents(), field.types[0], sub_type=sub)


def finish(writer: gguf.GGUFWriter) -> None:
    """Write the file that was put together."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
