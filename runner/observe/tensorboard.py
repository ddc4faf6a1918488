"""TensorBoard event files, written with TensorBoard's own protos and record format.

Every record is in the file when the call returns: what was written before a kill is kept.
Which tags there are is `metrics.Tally`'s to say; this module only writes them down.
"""

from __future__ import annotations

import functools
import itertools
import os
import pathlib
import re
import socket
import struct
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from tensorboard.compat.proto import event_pb2, summary_pb2, tensor_pb2, tensor_shape_pb2, types_pb2
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.custom_scalar import metadata as layout_metadata
from tensorboard.plugins.histogram import metadata as histogram_metadata
from tensorboard.plugins.image import metadata as image_metadata
from tensorboard.plugins.text import metadata as text_metadata
from tensorboard.summary.writer.record_writer import RecordWriter

from runner.observe import hparams as hp
from runner.observe.appender import Appender
from runner.observe.histogram import Histogram
from runner.observe.metrics import Point
from runner.record.outcome import State

#: Charts of the custom scalars dashboard: category, then title and tags of each chart.
_LAYOUT: dict[str, dict[str, tuple[str, ...]]] = {
    "time": {
        "compile time (s)": ("compile/total_s", "compile/first_step_s"),
        "step time (ms)": ("step/time_ms", "step/host_ms", "step/data_wait_ms"),
    },
    "compiles": {
        "compiles": ("compile/count", "compile/recompiles"),
        "throughput (examples/s)": ("throughput/examples_per_s",),
    },
    "learning": {"loss": ("train/loss", "eval/loss")},
}

_serial = itertools.count()
_PREFIX = "events.out.tfevents."
_DIGITS = 17
_STAMP = re.compile(r"\d{10}\.\d{6}")


class TensorBoardWriter:
    """Writes one run's event file, whose head comes with the first write.

    Args:
        folder: The run's TensorBoard folder.
        hparams: Gives the settings of the run, by dotted key.
        named: Gives the keys of those that the table shows first.
    """

    def __init__(
        self,
        folder: pathlib.Path,
        *,
        hparams: Callable[[], Mapping[str, hp.HParam]],
        named: Callable[[], Collection[str]] = tuple,
    ) -> None:
        self._appender = Appender(folder / _file_name(folder))
        self._records = RecordWriter(self._appender)
        self._hparams, self._named = functools.cache(hparams), named
        self._has_head = self._has_experiment = False

    def scalars(self, point: Point) -> None:
        """Write a point under each of its tags.

        Raises:
            OSError: It could not be written; it will be tried again with the next one.
        """
        values = [
            summary_pb2.Summary.Value(tag=tag, simple_value=value)
            for tag, value in point.values.items()
        ]
        self._write(_event(summary_pb2.Summary(value=values), step=point.step, at=point.time))

    def text(self, tag: str, *, markdown: str, step: int = 0) -> None:
        """Write a text.

        Raises:
            OSError: See `scalars`.
        """
        value = summary_pb2.Summary.Value(
            tag=tag,
            metadata=text_metadata.create_summary_metadata(tag, ""),
            tensor=_string_tensor(markdown.encode("utf-8", "replace"), shape=(1,)),
        )
        self._write(_event(summary_pb2.Summary(value=[value]), step=step))

    def image(self, tag: str, *, png: bytes, step: int) -> None:
        """Write an image.

        Raises:
            OSError: See `scalars`.
        """
        width, height = struct.unpack(">II", png[16:24])  # of PNG's first chunk
        value = summary_pb2.Summary.Value(
            tag=tag,
            metadata=image_metadata.create_summary_metadata(tag, ""),
            tensor=tensor_pb2.TensorProto(
                dtype=types_pb2.DT_STRING,
                string_val=[str(width).encode(), str(height).encode(), png],
                tensor_shape=_shape(3),
            ),
        )
        self._write(_event(summary_pb2.Summary(value=[value]), step=step))

    def histogram(self, tag: str, histogram: Histogram) -> None:
        """Write a histogram.

        Raises:
            OSError: See `scalars`.
        """
        rows, columns = histogram.buckets.shape
        value = summary_pb2.Summary.Value(
            tag=tag,
            metadata=histogram_metadata.create_summary_metadata(tag, ""),
            tensor=tensor_pb2.TensorProto(
                dtype=types_pb2.DT_DOUBLE,
                double_val=histogram.buckets.ravel(),
                tensor_shape=_shape(rows, columns),
            ),
        )
        self._write(_event(summary_pb2.Summary(value=[value]), step=histogram.step))

    def compare_by(self, metrics: Sequence[str]) -> None:
        """Say, once, by which scalars the jobs of a sweep are compared.

        Raises:
            OSError: See `scalars`.
        """
        if not self._has_experiment:
            self._has_experiment = True
            now = time.time()
            made = hp.experiment(self._hparams(), first=self._named(), metrics=metrics, time_s=now)
            self._write(_event(made))

    def purge(self, step: int) -> None:
        """Tell readers to drop the points from `step` on: these steps will be repeated.

        Raises:
            OSError: See `scalars`.
        """
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(event_pb2.Event(wall_time=time.time(), step=step, session_log=start))

    def close(self, state: State) -> None:
        """Write how the run ended and close the file.

        Raises:
            OSError: There was no room on the disk.
        """
        try:
            end = hp.session_end(state, time_s=time.time())
            if end is not None:
                self._write(_event(end))
        finally:
            self._appender.close()

    def _write(self, event: Any) -> None:
        if not self._has_head:
            self._has_head = True
            self._begin()
        self._records.write(event.SerializeToString())
        self._records.flush()

    def _begin(self) -> None:
        for event in (
            event_pb2.Event(wall_time=time.time(), file_version="brain.Event:2"),
            _event(_layout()),
            _event(hp.session_start(self._hparams(), time_s=time.time())),
        ):
            self._records.write(event.SerializeToString())


def _file_name(folder: pathlib.Path) -> str:
    """A name behind those of all files in the folder.

    Readers take a folder's files in the order of their names: of two processes that continue
    one run, the later must sort behind, in the same second and after the clock was set back.
    """
    stamps = [path.name.removeprefix(_PREFIX)[:_DIGITS] for path in folder.glob(f"{_PREFIX}*")]
    newest = max((float(stamp) for stamp in stamps if _STAMP.fullmatch(stamp)), default=0.0)
    now = f"{max(time.time(), newest + 1e-6):0{_DIGITS}.6f}"
    return f"{_PREFIX}{now}.{socket.gethostname()}.{os.getpid()}.{next(_serial)}"


def _event(summary: Any, *, step: int = 0, at: float | None = None) -> Any:
    wall_time = time.time() if at is None else at
    return event_pb2.Event(wall_time=wall_time, step=step, summary=summary)


def _string_tensor(content: bytes, *, shape: tuple[int, ...]) -> Any:
    return tensor_pb2.TensorProto(
        dtype=types_pb2.DT_STRING, string_val=[content], tensor_shape=_shape(*shape)
    )


def _shape(*sizes: int) -> Any:
    dims = [tensor_shape_pb2.TensorShapeProto.Dim(size=size) for size in sizes]
    return tensor_shape_pb2.TensorShapeProto(dim=dims)


def _layout() -> Any:
    layout = layout_pb2.Layout(
        category=[
            layout_pb2.Category(
                title=category,
                chart=[
                    layout_pb2.Chart(
                        title=title,
                        multiline=layout_pb2.MultilineChartContent(tag=[f"^{t}$" for t in tags]),
                    )
                    for title, tags in charts.items()
                ],
            )
            for category, charts in _LAYOUT.items()
        ]
    )
    value = summary_pb2.Summary.Value(
        tag=layout_metadata.CONFIG_SUMMARY_TAG,
        metadata=layout_metadata.create_summary_metadata(),
        tensor=_string_tensor(layout.SerializeToString(), shape=()),
    )
    return summary_pb2.Summary(value=[value])
