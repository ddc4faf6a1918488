"""Reads a trace (`*.xplane.pb`): what ran when, and the programs that it ran.

Declares the few fields that are read of XLA's messages; the rest of the file is passed over.

Source: `xplane.proto` (openxla/xla, xla/tsl/profiler/protobuf) and `hlo.proto` (xla/service).
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Iterator
from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

_PACKAGE = "runner.xplane"
#: Message: field -> number and type; "*" marks a repeated field.
_MESSAGES: dict[str, dict[str, tuple[int, str]]] = {
    "Space": {"planes": (1, "Plane*")},
    "Plane": {
        "lines": (3, "Line*"),
        "event_metadata": (4, "EventEntry*"),
        "stat_metadata": (5, "StatEntry*"),
    },
    "EventEntry": {"key": (1, "int64"), "value": (2, "EventMetadata")},
    "StatEntry": {"key": (1, "int64"), "value": (2, "StatMetadata")},
    "EventMetadata": {"name": (2, "string"), "stats": (5, "Stat*")},
    "StatMetadata": {"name": (2, "string")},
    "Line": {"events": (4, "Event*"), "timestamp_ns": (3, "int64")},
    "Event": {
        "metadata_id": (1, "int64"),
        "offset_ps": (2, "int64"),
        "duration_ps": (3, "int64"),
        "stats": (4, "Stat*"),
    },
    "Stat": {
        "metadata_id": (1, "int64"),
        "uint64_value": (3, "uint64"),
        "int64_value": (4, "int64"),
        "str_value": (5, "string"),
        "bytes_value": (6, "bytes"),
        "ref_value": (7, "uint64"),
    },
    "Hlo": {"hlo_module": (1, "HloModule")},
    "HloModule": {"name": (1, "string"), "computations": (3, "HloComputation*")},
    "HloComputation": {"instructions": (2, "HloInstruction*"), "id": (5, "int64")},
    "HloInstruction": {
        "name": (1, "string"),
        "opcode": (2, "string"),
        "metadata": (7, "HloMetadata"),
        "called_computation_ids": (38, "int64*"),
    },
    "HloMetadata": {"op_name": (2, "string")},
}


@dataclasses.dataclass(frozen=True)
class TraceEvent:
    """Something that took time.

    Attributes:
        name: What ran.
        start_ns: When it began.
        duration_ns: How long the thread was at it.
        stats: What else is known of it, by name.
    """

    name: str
    start_ns: float
    duration_ns: float
    stats: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class XPlane:
    """A trace.

    Attributes:
        events: Of all threads.
        modules: The `HloModuleProto` of each program, by its name.
    """

    events: list[TraceEvent]
    modules: dict[str, Any]


def read_xplane(path: pathlib.Path) -> XPlane:
    """The trace in a file.

    Raises:
        OSError: It cannot be read.
        google.protobuf.message.DecodeError: It is no trace, or cut short.
    """
    space = _message("Space")()
    space.ParseFromString(path.read_bytes())
    events: list[TraceEvent] = []
    modules: dict[str, Any] = {}
    for plane in space.planes:
        names = {entry.key: entry.value.name for entry in plane.stat_metadata}
        events += _events(plane, names)
        for module in _modules(plane, names):
            modules[module.name] = module
    return XPlane(events, modules)


def _events(plane: Any, names: dict[int, str]) -> Iterator[TraceEvent]:
    kinds = {entry.key: entry.value.name for entry in plane.event_metadata}
    for line in plane.lines:
        for event in line.events:
            stats = {names[stat.metadata_id]: _value(stat, names) for stat in event.stats}
            start_ns = line.timestamp_ns + event.offset_ps / 1e3
            name = kinds.get(event.metadata_id, "")
            yield TraceEvent(name, start_ns, event.duration_ps / 1e3, stats)


def _modules(plane: Any, names: dict[int, str]) -> Iterator[Any]:
    for entry in plane.event_metadata:
        for stat in entry.value.stats:
            if names[stat.metadata_id] == "Hlo Proto":
                hlo = _message("Hlo")()
                hlo.ParseFromString(stat.bytes_value)
                yield hlo.hlo_module


def _value(stat: Any, names: dict[int, str]) -> Any:
    if stat.ref_value:
        return names.get(stat.ref_value, "")
    return stat.str_value or stat.uint64_value or stat.int64_value


@functools.cache
def _message(name: str) -> Any:
    pool = descriptor_pool.DescriptorPool()
    pool.Add(_file())
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{_PACKAGE}.{name}"))


def _file() -> descriptor_pb2.FileDescriptorProto:
    file = descriptor_pb2.FileDescriptorProto(
        name="runner/xplane.proto", package=_PACKAGE, syntax="proto3"
    )
    for name, fields in _MESSAGES.items():
        message = file.message_type.add(name=name)
        for field, (number, kind) in fields.items():
            _declare(message.field.add(name=field, number=number), kind)
    return file


def _declare(field: Any, kind: str) -> None:
    repeated, kind = kind.endswith("*"), kind.removesuffix("*")
    field.label = field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL
    if kind in _MESSAGES:
        field.type, field.type_name = field.TYPE_MESSAGE, f".{_PACKAGE}.{kind}"
    else:
        field.type = getattr(field, f"TYPE_{kind.upper()}")
