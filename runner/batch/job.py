"""One job of a batch, composed and valid, before anything is started."""

from __future__ import annotations

import dataclasses

from runner.batch.ledger import Entry
from runner.config.schema import Config
from runner.record.rundir import RunDir


@dataclasses.dataclass(frozen=True)
class BatchJob:
    """A job of a batch.

    Attributes:
        number: Its number in the batch, from 0.
        config: What to do.
        config_yaml: The content of its `config.yaml`.
        overrides: The command line's overrides, all of them.
        run_dir: Its run folder.
        key: `runner.config.identity.graph_key`: who can share a warm process with it.
        entry: Where it stood when the batch began.
    """

    number: int
    config: Config
    config_yaml: str
    overrides: tuple[str, ...]
    run_dir: RunDir
    key: str
    entry: Entry

    @property
    def done(self) -> bool:
        """Whether an earlier process brought it to a good end, with the same configuration."""
        return self.entry.state.good

    @property
    def label(self) -> str:
        """What tells it from the others, for people."""
        return self.entry.label
