"""What the runner says of itself: the jobs that there are, the groups, and how to start.

Hydra could render this, but it composes a configuration and copies its sources for every group
first, which takes longer than all the rest of `--help`.
"""

from __future__ import annotations

from runner.config.compose import Composer
from runner.config.mistakes import listed
from runner.record.errors import ConfigError

_GROUPS = ("job", "backend", "optim", "schedule", "data", "hardware", "parallel")

_HELP = """\
Trains a PyTorch job, or a batch of them, as compiled XLA programs.

Jobs (job=NAME):
{jobs}

Groups (group=option), and any key of theirs (group.key=value):
{groups}

Examples:
  python -m runner job=resnet                                  one job
  python -m runner job=resnet steps=20 optim=adamw optim.lr=0.001
  python -m runner -m job=resnet optim.lr=0.1,0.01 seed=0,1    a batch of four
  python -m runner --config-dir my_conf job=mine               a job of your own; set
      RUNNER_TRUST=my_package to the package that my_conf/job/mine.yaml names

Batches:    dry_run=true shows the plan; batch.max_concurrent, batch.retries, batch.name ...
Search:     hydra/sweeper=optuna 'optim.lr=tag(log, interval(0.001, 1))' batch.metric=eval/loss
Go on:      python -m runner resume DIR [key=value]            a run, or what a batch has left
List:       python -m runner ls [DIR]                          runs and batches, how they stand
Report:     python -m runner report DIR                        one HTML file that opens offline
Export:     python -m runner export RUNDIR --to model.safetensors
Look:       python -m runner tensorboard [DIR]             the newest run or batch, on localhost
Explain:    python -m runner explain RUNDIR                the dearest operations, by module
Show:       python -m runner job=resnet --cfg job              every key, without running it
Complete:   eval "$(runner -sc install=bash)"                  bash, zsh or fish; for the console
            script `runner` only: completion does not work for `python -m runner`
Flags:      -m (a batch), --cfg job, --info, --config-dir DIR, --version, --help;
            all of them: python -m runner --hydra-help
"""

_NO_JOB = """\
Jobs:
{jobs}

Start one:      python -m runner job=NAME
Start a batch:  python -m runner -m job=NAME optim.lr=0.1,0.01
Learn more:     python -m runner --help
"""


def help_text(composer: Composer) -> str:
    """What `--help` says."""
    groups = [f"  {group}: {listed(composer.options(group))}" for group in _GROUPS]
    return _HELP.format(jobs=_job_lines(composer), groups="\n".join(groups))


def no_job_text(composer: Composer) -> str:
    """What `python -m runner` alone says."""
    return _NO_JOB.format(jobs=_job_lines(composer))


def _job_lines(composer: Composer) -> str:
    """Every job's name and what it trains, the user's own jobs included."""
    names = composer.options("job")
    width = max((len(name) for name in names), default=0)
    return "\n".join(f"  {name:{width}}  {_about(composer, name)}".rstrip() for name in names)


def _about(composer: Composer, name: str) -> str:
    try:
        raw = composer.file("job", name)
    except ConfigError as error:
        return f"(cannot be read: {str(error).splitlines()[0]})"
    section = raw.get("job", raw) if isinstance(raw, dict) else {}
    return str(section.get("about", "")) if isinstance(section, dict) else ""
