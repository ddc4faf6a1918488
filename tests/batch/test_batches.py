"""Batches under the runner's own launcher: slots, faults, the ledger, resume. No torch here."""

from __future__ import annotations

import csv
import json
import pathlib
import signal

import pytest

from runner.batch.ledger import FILE_NAME
from tests.batch.runs import wait_until
from tests.batch.toys import Toys


@pytest.fixture
def toys(tmp_path: pathlib.Path) -> Toys:
    return Toys(tmp_path)


def test_a_batch_leaves_a_table_and_names_its_best_job(toys: Toys) -> None:
    done = toys.run("optim.lr=0.3,0.1,0.2", "seed=0,1")
    assert done.returncode == 0, done.stderr
    assert toys.states() == ["succeeded"] * 6
    assert "6 of 6 jobs succeeded" in done.stdout
    assert "best eval/loss: 0.333333, job 2 (job=toy optim.lr=0.1 seed=0)" in done.stdout
    assert f"tensorboard --logdir {toys.batch}" in done.stdout
    with open(toys.batch / "sweep.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["optim.lr"] for row in rows] == ["0.3", "0.3", "0.1", "0.1", "0.2", "0.2"]
    assert rows[2]["eval/loss"] == pytest.approx("0.3333333333333333")
    assert json.loads((toys.batch / "sweep.json").read_text())["best"] == 2
    assert [job["folder"] for job in toys.jobs()] == [f"{n}-toy" for n in range(6)]


def test_the_metric_and_its_better_end_can_be_named(toys: Toys) -> None:
    done = toys.run("optim.lr=0.1,0.4", "batch.metric=train/loss", "batch.best=max")
    assert "best train/loss: 0.633333, job 1" in done.stdout
    again = toys.run("optim.lr=0.1", "batch.name=c", "batch.metric=eval/accuracy")
    assert "no best job: none succeeded with the metric eval/accuracy" in again.stdout
    assert "there are: eval/loss, train/loss, train/lr" in again.stdout


def test_a_dry_run_shows_the_plan_and_starts_nothing(toys: Toys) -> None:
    done = toys.run("seed=0,1", "model.width=1,2", "dry_run=true")
    assert done.returncode == 0, done.stderr
    assert "3-toy" in done.stdout
    assert "4 jobs, 4 to run with 2 different graphs" in done.stdout
    assert not toys.batch.exists()
    assert toys.written() == []


def test_every_job_is_checked_before_the_first_starts(toys: Toys) -> None:
    done = toys.run("optim.lr=0.1,0.2,-1")
    assert done.returncode == 64
    assert "job 2 of 0 to 2: optim.lr must be" in done.stderr
    done = toys.run("optim.lr=0.1,0.2", "hydra.sweep.subdir=same")
    assert done.returncode == 64
    assert "'same' is another's" in done.stderr
    assert toys.written() == []


def test_what_a_value_refers_to_may_change_from_job_to_job(toys: Toys) -> None:
    done = toys.run("optim.lr=0.1,0.2", "model.step_s=${optim.lr}", "seed=${hydra:job.num}")
    assert done.returncode == 0, done.stderr
    texts = [(toys.batch / f"{n}-toy" / "config.yaml").read_text() for n in range(2)]
    assert ["step_s: 0.1" in texts[0], "step_s: 0.2" in texts[1]] == [True, True]
    assert ["seed: 0" in texts[0], "seed: 1" in texts[1]] == [True, True]


def test_each_fault_is_told_and_ends_no_other_job(toys: Toys) -> None:
    done = toys.run(
        "model.fault=none,raise,exit,kill,infinite,hang",
        "timeouts.grace_s=0.2",
        "batch.time_limit_s=1.5",
        "batch.max_concurrent=2",
    )
    assert done.returncode == 1
    assert toys.states() == ["succeeded", "failed", "failed", "failed", "failed", "timed_out"]
    reasons = [job["reason"] for job in toys.jobs()]
    for reason, said in zip(
        reasons,
        ("", "the job's own error", "exit code 3", "SIGKILL", "finite", "batch.time_limit_s"),
        strict=True,
    ):
        assert said in reason
        assert said in done.stdout
    assert [job["exit_code"] for job in toys.jobs()] == [0, 70, 70, 70, 72, 74]


def test_a_job_that_failed_is_tried_again_after_the_others(toys: Toys) -> None:
    done = toys.run("model.fault=raise,none,infinite", "batch.retries=2")
    assert done.returncode == 1
    assert [job["tries"] for job in toys.jobs()] == [3, 1, 1]
    assert "job 0 failed" in done.stderr


def test_fail_fast_stops_the_rest(toys: Toys) -> None:
    done = toys.run(
        "model.fault=none,raise,none,none",
        "model.step_s=0.2",
        "steps=20",
        "batch.fail_fast=true",
        "batch.max_concurrent=2",
    )
    assert done.returncode == 1
    assert toys.states() == ["cancelled", "failed", "pending", "pending"]
    assert "job 1 failed (batch.fail_fast)" in toys.jobs()[0]["reason"]


def test_a_batch_that_exists_is_not_overwritten(toys: Toys) -> None:
    assert toys.run("seed=0,1").returncode == 0
    again = toys.run("seed=0,1")
    assert again.returncode == 64
    assert "holds a batch of 2 jobs, of which 2 succeeded" in again.stderr


def test_resume_runs_what_is_left_and_what_is_new(toys: Toys) -> None:
    assert toys.run("seed=0,1,2", "model.fault=none,raise").returncode == 1
    assert toys.states() == ["succeeded", "failed"] * 3
    done = toys.run("seed=0,1,2,3", "model.fault=none,raise", "resume=true", "log_every=2")
    assert done.returncode == 1
    assert "8 jobs, 5 to run" in done.stderr
    assert toys.states() == ["succeeded", "failed"] * 4
    assert toys.count("end") == dict.fromkeys("0123", 1)
    assert [job["tries"] for job in toys.jobs()] == [1, 2] * 3 + [1, 1]
    assert [job["folder"] for job in toys.jobs()] == [f"{n}-toy" for n in range(8)]


def test_a_configuration_that_changed_is_run_again_in_its_folder(toys: Toys) -> None:
    assert toys.run("seed=0,1").returncode == 0
    conf = toys.folder / "conf" / "job" / "toy.yaml"
    conf.write_text(conf.read_text().replace("width: 1", "width: 2"))
    assert toys.run("seed=0,1", "resume=true").returncode == 0
    assert toys.count("end") == {"0": 2, "1": 2}
    assert [job["folder"] for job in toys.jobs()] == ["0-toy", "1-toy"]


def test_killed_at_any_instant_and_resumed_no_success_is_repeated(toys: Toys) -> None:
    arguments = ["seed=range(12)", "model.step_s=0.03", "batch.max_concurrent=2", "resume=true"]
    for ends in (1, 2, 4, 5, 7, 9, 11):
        with toys.start(*arguments) as process:
            wait_until(lambda ends=ends: toys.count("end").total() >= ends)
            process.kill()
            process.wait(timeout=60)
        before = _succeeded(toys)
        begun = toys.count("begin")
    done = toys.command("resume", str(toys.batch))
    assert done.returncode == 0, done.stderr
    assert toys.states() == ["succeeded"] * 12
    assert all(toys.count("begin")[number] == begun[number] for number in before)
    records = (toys.batch / FILE_NAME).read_text().splitlines()
    successes = [json.loads(line)["number"] for line in records if '"succeeded"' in line]
    assert sorted(set(successes)) == list(range(12))


def test_a_ledger_that_was_cut_in_a_record_is_continued(toys: Toys) -> None:
    assert toys.run("seed=0,1").returncode == 0
    ledger = toys.batch / FILE_NAME
    ledger.write_bytes(ledger.read_bytes()[:-20])
    assert toys.run("seed=0,1,2", "resume=true").returncode == 0
    assert toys.count("end") == {"0": 1, "1": 1, "2": 1}


def test_ctrl_c_says_where_things_stand_and_resume_goes_on(toys: Toys) -> None:
    with toys.start("seed=range(6)", "model.step_s=0.2") as process:
        wait_until(lambda: toys.count("begin").total() >= 3)
        process.send_signal(signal.SIGINT)
        output = process.communicate(timeout=60)[0]
        assert process.returncode == 130
    states = toys.states()
    assert states[:2] == ["succeeded"] * 2
    assert "cancelled" in states
    assert "pending" in states
    assert f"{states.count('succeeded')} of 6 jobs succeeded" in output
    done = toys.run("seed=range(6)", "model.step_s=0.2", "resume=true")
    assert done.returncode == 0, done.stderr
    assert toys.count("end") == dict.fromkeys("012345", 1)


def test_sigterm_preempts_the_batch(toys: Toys) -> None:
    with toys.start("seed=range(3)", "model.step_s=0.1", "steps=1000") as process:
        wait_until(lambda: toys.count("begin").total() >= 1)
        process.terminate()
        output = process.communicate(timeout=60)[0]
    assert process.returncode == 75, output
    assert toys.states() == ["preempted", "pending", "pending"]


def test_a_second_process_on_the_same_batch_is_told_who_has_it(toys: Toys) -> None:
    with toys.start("seed=range(3)", "model.step_s=0.1", "steps=1000") as process:
        wait_until(lambda: toys.count("begin").total() >= 1)
        second = toys.run("seed=range(3)", "resume=true")
        assert second.returncode == 66
        assert f"process {process.pid}" in second.stderr


def test_no_two_jobs_see_the_same_chip_at_a_time(toys: Toys) -> None:
    done = toys.run("seed=range(200)", "model.fault=random", "batch.retries=3", chips=4)
    assert done.returncode in (0, 1), done.stderr
    states = toys.states()
    assert set(states) <= {"succeeded", "failed"}
    assert states.count("succeeded") >= 150
    assert {line[2] for line in toys.written()} == {"0", "1", "2", "3"}
    assert toys.count("clash") == {}
    assert max(job["tries"] for job in toys.jobs()) > 1


def test_several_chips_a_job(toys: Toys) -> None:
    done = toys.run("seed=range(6)", "batch.chips_per_job=2", chips=8)
    assert done.returncode == 0, done.stderr
    assert {line[2] for line in toys.written()} <= {"0,1", "2,3", "4,5", "6,7"}
    refused = toys.run("seed=0,1", "batch.name=c", "batch.chips_per_job=3", chips=8)
    assert refused.returncode == 64
    assert "batch.chips_per_job must be one of 1, 2, 4, 8" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["batch.isolation=none"], "batch.isolation must be one of warm, process"),
        (["batch.retries=-1"], "batch.retries must be >= 0"),
        (["batch.retries=1,2"], "must be the same for all jobs"),
        (["batch.name=a/b"], "batch.name must be"),
        (["batch.chips_per_job=2"], "must be null on the CPU"),
        (["hydra/launcher=basicc"], "'basic'"),
    ],
)
def test_a_setting_that_makes_no_sense_is_refused(
    toys: Toys, arguments: list[str], said: str
) -> None:
    done = toys.run("seed=0,1", *arguments)
    assert done.returncode == 64
    assert said in done.stderr


def _succeeded(toys: Toys) -> set[str]:
    """The seeds of the jobs that have a result that says so."""
    found = set()
    for path in toys.batch.glob("*/result.json"):
        if json.loads(path.read_text())["state"] == "succeeded":
            found.add(path.parent.name.partition("-")[0])
    return found
