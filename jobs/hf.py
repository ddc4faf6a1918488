"""Models of the library transformers, which is an extra: of a preset's sizes, or from a folder.

Nothing is fetched: a model comes from its configuration or from a local folder in Hugging Face
format, and weights are read from safetensors only.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from jobs.base import DataError, Job, SettingError, whole

#: PyTorch's own attention: XLA sees one composite operation.
ATTENTION = "sdpa"


def library() -> Any:
    """The module transformers, offline.

    Raises:
        SettingError: It is not installed.
    """
    os.environ["HF_HUB_OFFLINE"] = "1"  # read once, when the library is imported
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise SettingError(
            "this needs the package transformers, which is an extra: "
            f"pip install 'tpu-batch-runner[hf]' ({error})"
        ) from error


@dataclasses.dataclass(frozen=True)
class Family:
    """Models of one kind.

    Attributes:
        kind: Their `model_type`.
        sizes: Setting -> name in the kind's configuration.
        presets: Values of the kind's configuration by a preset's name.
    """

    kind: str
    sizes: Mapping[str, str]
    presets: Mapping[str, Mapping[str, Any]]

    def chosen(self, job: Job) -> Chosen:
        """The model that a job's settings name.

        Settings: `preset`, a name or a folder; one key for each of `sizes`, null for the
        preset's; `dropout` is the job's own.

        Raises:
            DataError: The folder has no readable config.json.
            SettingError: A setting breaks a rule, or the data does not suit the model.
        """
        preset, settings = job.settings["preset"], job.settings
        own = {k: whole(settings, k, least=1) for k in self.sizes if settings[k] is not None}
        if preset in self.presets:
            sizes = {self.sizes[key]: value for key, value in own.items()}
            first = {"vocab_size": job.fact("vocabulary")}
            config = {**first, **self.presets[preset], **sizes}
            chosen = Chosen(None, {**config, "max_position_embeddings": job.fact("seq_len")})
        else:
            chosen = self._in_folder(preset, own)
        chosen.check(job)
        return chosen

    def _in_folder(self, folder: object, own: Mapping[str, int]) -> Chosen:
        if not isinstance(folder, str) or "/" not in folder:
            raise SettingError(
                f"model.preset must be one of {', '.join(self.presets)}, or a folder's path with "
                f"a slash in it; got {folder!r}"
            )
        if own:
            key, value = next(iter(own.items()))
            raise SettingError(
                f"model.{key} must be null: the model in {folder} has its own sizes; got {value}"
            )
        return Chosen(folder, _read_config(folder, kind=self.kind))


@dataclasses.dataclass(frozen=True)
class Chosen:
    """A model's configuration, and the folder that has its weights, if there is one."""

    folder: str | None
    config: Mapping[str, Any]

    def check(self, job: Job) -> None:
        """The sizes must suit each other and the data.

        Raises:
            SettingError: They do not.
        """
        width, heads = self.config["hidden_size"], self.config["num_attention_heads"]
        if width % heads:
            raise SettingError(
                f"model.heads must be a divisor of model.width, {width}; got {heads}"
            )
        vocabulary, seq_len = job.fact("vocabulary"), job.fact("seq_len")
        if self.config["vocab_size"] < vocabulary:
            raise SettingError(
                f"model.vocabulary must be >= {vocabulary}, the data's; "
                f"got {self.config['vocab_size']}"
            )
        longest = self.config.get("max_position_embeddings", seq_len)
        if seq_len > longest:
            raise SettingError(
                f"data.options.seq_len must be <= {longest}, the positions of the model in "
                f"{self.folder}; got {seq_len}"
            )

    def build(self, name: str, *, changes: Mapping[str, Any], new: Sequence[str] = ()) -> nn.Module:
        """The model on the host, in float32.

        Args:
            name: Its class in transformers.
            changes: Values of the configuration that are the job's own.
            new: Beginnings of the names of weights that the folder may lack: drawn anew.

        Raises:
            DataError: The folder's weights are missing or broken.
            SettingError: transformers is not installed.
        """
        transformers = library()
        cls = getattr(transformers, name)
        if self.folder is not None:
            return _load(cls, self.folder, new=new, changes=changes)
        values = {**self.config, **changes}
        model = cls(cls.config_class(**values, attn_implementation=ATTENTION))
        assert isinstance(model, nn.Module)
        return model


def _read_config(folder: str, *, kind: str) -> Mapping[str, Any]:
    path = pathlib.Path(folder).expanduser() / "config.json"
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read as a model's configuration: {error}") from error
    found = values.get("model_type") if isinstance(values, dict) else values
    if found != kind:
        raise DataError(f"{path}: model_type must be {kind!r}; got {found!r}")
    needed = ("hidden_size", "num_attention_heads", "vocab_size")
    missing = [key for key in needed if not isinstance(values.get(key), int)]
    if missing:
        raise DataError(f"{path}: {missing[0]} must be a whole number; it is not there")
    return dict(values)


def _load(cls: Any, folder: str, *, new: Sequence[str], changes: Mapping[str, Any]) -> nn.Module:
    path = pathlib.Path(folder).expanduser()
    if not any(path.glob("*.safetensors")):
        raise DataError(f"{path}: has no *.safetensors; other formats can run code when loaded")
    try:
        model, found = cls.from_pretrained(
            path,
            local_files_only=True,
            use_safetensors=True,
            dtype=torch.float32,
            attn_implementation=ATTENTION,
            output_loading_info=True,
            **changes,
        )
    except MemoryError:
        raise
    except Exception as error:  # the library raises many types on a broken folder
        raise DataError(f"{path}: cannot be loaded as {cls.__name__}: {error}") from error
    missing = sorted(key for key in found["missing_keys"] if not key.startswith(tuple(new)))
    if missing:
        raise DataError(f"{path}: lacks weights of {cls.__name__}, such as {missing[0]}")
    assert isinstance(model, nn.Module)
    return model
