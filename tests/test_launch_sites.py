"""Tests of the launch scripts in unusual cases: failing site settings, links, job arrays, and a busy controller."""

import signal
import time

import pytest

from support.slurm_stand_ins import finish

BUSY = "Socket timed out on send/recv operation"


def test_site_settings_may_use_unset_variables_and_failing_commands(stage):
    """The condition in the last line of this site.env is false, so the exit code of site.env is not zero."""
    (stage.folder / "launch/site.env").write_text(
        "SITE_LIBRARIES=/site:$SITE_LIBRARIES_OF_HOST\nfalse\nSITE_NAME=lab\n[[ -d /no/such/place ]] && LAUNCHER=x\n"
    )
    code, _, err = finish(stage.start())
    assert (code, err) == (0, "")
    found = stage.environment()
    assert (found["SITE_LIBRARIES"], found["SITE_NAME"]) == ("/site:", "lab")


def test_site_settings_that_are_no_bash_code_are_refused(stage):
    (stage.folder / "launch/site.env").write_text("IMAGE='unfinished\n")
    code, _, err = finish(stage.start())
    assert code == 2 and err.endswith(f"{stage.folder}/launch/site.env: is not valid bash code; correct it\n")
    assert stage.calls("srun") == []


def test_submission_directory_that_cannot_be_written_is_named(stage):
    (stage.folder / ".dpo-engine-4711.exit").mkdir()
    code, _, err = finish(stage.start())
    assert (code, err) == (
        2,
        f"{stage.folder}: {stage.folder}/.dpo-engine-4711.exit cannot be written; submit the job from a writable "
        "directory\n",
    )


def test_script_is_submitted_by_a_link(stage):
    elsewhere = stage.folder / "else where"
    elsewhere.mkdir()
    (elsewhere / "train.sbatch").symlink_to(stage.folder / "launch/train.sbatch")
    stage.set_record(Command=f"{elsewhere}/train.sbatch /data/run.yaml a=b/c")
    assert finish(stage.start("run.yaml", cwd=elsewhere))[::2] == (0, "")
    assert stage.calls("srun")[0][-3:] == [f"{stage.folder}/launch/task.sh", "train", "run.yaml"]


def test_task_of_an_array_asks_about_itself_alone(stage):
    """The last task has the same job ID as the whole array, so Slurm's commands need the task's own ID, `4711_3`."""
    process = stage.start(WAIT="yes", CODE="75", SLURM_ARRAY_JOB_ID="4711", SLURM_ARRAY_TASK_ID="3")
    stage.wait_for_start()
    process.send_signal(signal.SIGUSR1)
    assert finish(process)[0] == 0
    assert stage.calls("scancel") == [["--signal=USR1", "4711_3"]]
    asked = [call for call in stage.calls("scontrol") if call[1] != "hostnames"]
    assert ["requeue", "4711_3"] in asked and all(call[-1] == "4711_3" for call in asked)


@pytest.mark.parametrize(("times", "host"), [(4, "n1"), (99, "first")])
def test_job_starts_while_the_controller_is_busy(stage, times, host):
    """The script calls `scontrol show` for its own path, for the time limit, and for the names of the nodes.

    The script requests the path and the time limit once each, and the names up to three times. If the first four calls
    fail, these are the calls for the path and the limit and the first two calls for the names. The third call for the
    names then succeeds. If all calls fail, the script assumes that its own node is the job's first node.
    """
    stage.fail("scontrol", "show", times, BUSY)
    code, out, err = finish(stage.start(SLURMD_NODENAME="first"))
    assert code == 0 and f"{host}:24711" in out
    said = "scontrol show hostnames: no answer; this node is assumed to be the job's first node\n"
    assert err == (said if host == "first" else "")


def test_gpu_check_needs_the_names_of_the_nodes(stage):
    stage.fail("scontrol", "show", 99, BUSY)
    code, _, err = finish(stage.start(GPU_CHECK="1"))
    assert code == 2 and err.endswith(
        "GPU_CHECK=1: `scontrol show hostnames` does not answer; submit the job again, or set GPU_CHECK=0\n"
    )


@pytest.mark.slow
def test_warning_before_the_script_is_ready_does_not_kill_the_job(stage):
    """Slurm warns a job at once if the time limit is shorter than the warning time that `sbatch --signal` sets."""
    stand_in = stage.folder / "bin/scontrol"
    stand_in.write_text(stand_in.read_text().replace("\n", '\n[[ "$*" != "show job"* ]] || /bin/sleep 0.5\n', 1))
    stage.set_record(seconds_left=8)
    process = stage.start(WAIT="yes", CODE="75")
    time.sleep(0.3)
    process.send_signal(signal.SIGUSR1)
    code, _, err = finish(process)
    assert code == 0 and "the ranks will be warned in" in err
    assert err.endswith("requeued: interrupted and saved; the job continues from its newest checkpoint\n")
