"""HParams summaries: what lets TensorBoard compare the jobs of a sweep.

They go into the run's own event file, because a writer of their own would show each run
twice. TensorBoard keeps the first summary of each of these tags and ignores later ones.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from tensorboard.compat.proto import summary_pb2
from tensorboard.plugins.hparams import api_pb2, metadata, plugin_data_pb2

from runner.config.codec import config_to_json
from runner.config.schema import Config
from runner.record.outcome import State

HParam: TypeAlias = float | bool | str

#: Settings that name code or prose, or that change no result: a comparison of jobs is clearer
#: without them.
_LEFT_OUT = (
    "job.entry",
    "job.about",
    "data.entry",
    "resume",
    "checkpoint.",
    "profile.",
    "retries.",
    "sinks.",
    "timeouts.",
    "batch.",
)


def hparams_of(config: Config) -> dict[str, HParam]:
    """Every setting by its dotted key, as a number, a bool or a string."""
    plain = config_to_json(config)
    return {key: value for key, value in _flatten(plain, "") if not key.startswith(_LEFT_OUT)}


def named(overrides: Sequence[str]) -> set[str]:
    """Keys of what the command line names.

    Args:
        overrides: Such as "optim.lr=0.1" and, choosing a group, "backend=lazy".
    """
    keys = [override.lstrip("+~").partition("=")[0] for override in overrides]
    return {*keys, *(f"{key}.name" for key in keys)}


def _flatten(section: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, HParam]]:
    for name, value in section.items():
        key = f"{prefix}{name}"
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{key}.")
        else:
            yield key, _plain(value)


def _plain(value: Any) -> HParam:
    if isinstance(value, bool):
        return value
    if isinstance(value, (int, float)) and math.isfinite(value):
        return value
    return "null" if value is None else str(value)


def session_start(hparams: Mapping[str, HParam], *, time_s: float) -> Any:
    """The summary that says with which settings a run goes."""
    info = plugin_data_pb2.SessionStartInfo(start_time_secs=time_s)
    for name, value in hparams.items():
        if isinstance(value, bool):
            info.hparams[name].bool_value = value
        elif isinstance(value, str):
            info.hparams[name].string_value = value
        else:
            info.hparams[name].number_value = value
    data = plugin_data_pb2.HParamsPluginData(session_start_info=info)
    return _summary(metadata.SESSION_START_INFO_TAG, data)


def session_end(state: State, *, time_s: float) -> Any | None:
    """The summary that says how a run ended, or None if it may be resumed.

    TensorBoard would show the first end of a run that was preempted, whatever came later.
    """
    if state in (State.PREEMPTED, State.CANCELLED):
        return None
    status = api_pb2.STATUS_SUCCESS if state is State.SUCCEEDED else api_pb2.STATUS_FAILURE
    info = plugin_data_pb2.SessionEndInfo(status=status, end_time_secs=time_s)
    data = plugin_data_pb2.HParamsPluginData(session_end_info=info)
    return _summary(metadata.SESSION_END_INFO_TAG, data)


def experiment(
    hparams: Mapping[str, HParam], *, first: Collection[str], metrics: Sequence[str], time_s: float
) -> Any:
    """The summary that says which settings and which scalars the table has.

    TensorBoard shows a few columns, those that it is told to differ before all others, and hides
    the rest until asked; no run can know what differs, but what was named on its command line.
    """
    info = api_pb2.Experiment(
        time_created_secs=time_s,
        hparam_infos=[
            api_pb2.HParamInfo(name=name, type=_type(value), differs=name in first)
            for name, value in hparams.items()
        ],
        metric_infos=[api_pb2.MetricInfo(name=api_pb2.MetricName(tag=tag)) for tag in metrics],
    )
    return _summary(metadata.EXPERIMENT_TAG, plugin_data_pb2.HParamsPluginData(experiment=info))


def _type(value: HParam) -> Any:
    if isinstance(value, bool):
        return api_pb2.DATA_TYPE_BOOL
    return api_pb2.DATA_TYPE_STRING if isinstance(value, str) else api_pb2.DATA_TYPE_FLOAT64


def _summary(tag: str, data: Any) -> Any:
    value = summary_pb2.Summary.Value(
        tag=tag,
        metadata=metadata.create_summary_metadata(data),
        tensor=metadata.NULL_TENSOR,
    )
    return summary_pb2.Summary(value=[value])
