"""Tests of how a Slurm job ends: warnings, requeues, a busy controller, lost nodes, and GPUs that must not be used.

Stand-ins replace Slurm's commands. tests/slurm tests the scripts with the real commands.
"""

import signal

import pytest

from support.slurm_stand_ins import finish

BUSY = "Socket timed out on send/recv operation"
SUBMIT = (
    "to continue, submit the job again with the same options: sbatch --nodes=2 --ntasks-per-node=4 ... "
    "{folder}/launch/run.sbatch train run.yaml train.max_steps=5"
)


@pytest.fixture
def submit(tmp_path):
    """Return the text with the command by which a user continues an interrupted job."""
    return SUBMIT.format(folder=tmp_path)


def requeues(stage):
    return stage.calls("scontrol").count(["requeue", "4711"])


@pytest.mark.parametrize(("code", "ranks_say"), [("75", ""), ("143", "75 75"), ("1", "75")])
def test_interrupted_run_is_requeued(stage, code, ranks_say):
    left, _, err = finish(stage.start(CODE=code, RANKS_SAY=ranks_say))
    assert (left, err) == (0, "requeued: interrupted and saved; the job continues from its newest checkpoint\n")
    assert requeues(stage) == 1


def test_restarts_are_limited(stage, submit):
    code, _, err = finish(stage.start(CODE="75", SLURM_RESTART_COUNT="3", MAX_RESTARTS="3"))
    said = "not requeued: interrupted and saved, but the number of restarts is already 3 (MAX_RESTARTS)"
    assert (code, err) == (75, f"{said}; {submit}\n")
    assert requeues(stage) == 0


def test_job_that_may_not_be_requeued_says_how_to_go_on(stage, submit):
    stage.set_record(Requeue="0")
    code, _, err = finish(stage.start(CODE="75"))
    said = "not requeued: interrupted and saved, but Slurm must not requeue this job (--no-requeue, or JobRequeue=0 in "
    assert (code, err) == (75, f"{said}slurm.conf); {submit}\n")
    assert requeues(stage) == 0


def test_requeue_that_is_not_allowed_is_not_tried_again(stage, submit):
    stage.fail("scontrol", "requeue", 99, "Access/permission denied")
    code, _, err = finish(stage.start(CODE="75"))
    assert (code, requeues(stage)) == (75, 1)
    assert err == f"not requeued: interrupted and saved, but scontrol failed: Access/permission denied; {submit}\n"


def test_requeue_is_tried_again_while_the_controller_is_busy(stage):
    stage.fail("scontrol", "requeue", 3, BUSY)
    code, _, err = finish(stage.start(CODE="75"))
    assert (code, requeues(stage)) == (0, 4)
    *tries, last = err.splitlines()
    assert tries == [
        f"interrupted and saved; scontrol requeue: {BUSY}; trying again in {pause} s" for pause in (1, 2, 4)
    ]
    assert last == "requeued: interrupted and saved; the job continues from its newest checkpoint"


def test_requeue_is_given_up_at_last(stage, submit):
    stage.fail("scontrol", "requeue", 99, BUSY)
    code, _, err = finish(stage.start(CODE="75"))
    assert (code, requeues(stage)) == (75, 20)
    assert err.endswith(f"not requeued: interrupted and saved, but scontrol failed: {BUSY}; {submit}\n")


@pytest.mark.parametrize(
    ("state", "code", "says"),
    [
        ("PENDING", 0, "requeued: interrupted and saved; the job continues"),
        ("COMPLETING Restarts=1", 0, "requeued: interrupted and saved; the job continues"),
        (
            "CANCELLED",
            75,
            "not requeued: interrupted and saved, but the job is CANCELLED; to continue, submit the job again",
        ),
    ],
)
def test_job_that_slurm_has_ended_is_not_requeued(stage, state, code, says):
    """After a preemption, Slurm itself requeues the job, so the script must not requeue it.

    The state of a requeued job is COMPLETING until all processes of the job have ended, and then PENDING. A job that
    was canceled must not be requeued either.
    """
    stage.set_record(JobState=state)
    left, _, err = finish(stage.start(CODE="75"))
    assert left == code and err.startswith(says)
    assert requeues(stage) == 0


def test_job_that_makes_no_progress_is_not_requeued_forever(stage, submit):
    def start(*say):
        return finish(stage.start(CODE="75", RANKS_SAY=" ".join(say)))[::2]

    again = (0, "requeued: interrupted before any progress; the job starts again\n")
    assert start("75", "no-progress", "75", "no-progress") == again
    assert start("75", "75") == (0, "requeued: interrupted and saved; the job continues from its newest checkpoint\n")
    assert start("75", "no-progress") == again, "progress resets the count"
    assert start("75", "no-progress") == again
    said = (
        "not requeued: the number of consecutive starts without progress is already 3 (MAX_IDLE_STARTS); "
        "request more time (sbatch --time), or a later warning (sbatch --signal=B:USR1@SECONDS)"
    )
    assert start("75", "no-progress") == (75, f"{said}; {submit}\n")
    assert requeues(stage) == 4
    assert list(stage.folder.glob(".dpo-engine*")) == []


@pytest.mark.parametrize(("left_with", "code"), [("75", 0), ("5", 5), ("0", 0)])
def test_warning_before_the_time_limit_reaches_the_ranks(stage, left_with, code):
    stage.set_record(seconds_left=3000)
    process = stage.start(WAIT="yes", CODE=left_with)
    stage.wait_for_start()
    process.send_signal(signal.SIGUSR1)
    left, _, err = finish(process)
    assert left == code
    assert err.startswith("warned by Slurm: the ranks finish their step and save\n")
    assert stage.calls("scancel") == [["--signal=USR1", "4711"]]
    assert requeues(stage) == (left_with == "75")


def test_warning_that_kills_a_starting_rank_is_an_interruption(stage):
    process = stage.start(WAIT="yes", CODE="138")
    stage.wait_for_start()
    process.send_signal(signal.SIGUSR1)
    left, _, err = finish(process)
    assert left == 0 and "requeued: interrupted before any progress; the job starts again\n" in err


def test_warning_reaches_the_ranks_while_the_controller_is_busy(stage):
    """srun can send a signal to its tasks without the controller, so the script uses srun if scancel fails."""
    stage.fail("scancel", "--signal=USR1", 99, BUSY)
    process = stage.start(WAIT="yes", CODE="75")
    stage.wait_for_start()
    process.send_signal(signal.SIGUSR1)
    left, _, err = finish(process)
    assert left == 0
    assert err.startswith(
        f"scancel: {BUSY}; srun signals the ranks without the controller; scancel is tried again in 1 s\n"
    )
    assert "warned by Slurm" not in err
    assert err.endswith("requeued: interrupted and saved; the job continues from its newest checkpoint\n")


def test_verb_that_cannot_save_is_not_warned(stage):
    process = stage.start("eval", "run.yaml", script="run.sbatch", WAIT="yes")
    stage.wait_for_start()
    process.send_signal(signal.SIGUSR1)
    assert process.stderr.readline() == "warned by Slurm: eval has nothing to save, so it continues\n"
    assert stage.calls("scancel") == []
    (stage.folder / "calls.warned").touch()  # end the evaluation
    assert finish(process)[0] == 0


def test_warning_at_the_start_is_passed_on_later(stage):
    """Slurm warns a job at its start if the time limit is shorter than the warning time that `sbatch --signal` sets."""
    stage.set_record(seconds_left=6)
    process = stage.start(WAIT="yes", CODE="75")
    stage.wait_for_start()
    process.send_signal(signal.SIGUSR1)
    code, _, err = finish(process)
    warning, deferred, passed, requeued = err.splitlines()
    assert code == 0 and requeued.startswith("requeued: interrupted and saved")
    assert warning.startswith("warning: the time limit leaves ") and "but Slurm warns 300 s before the limit" in warning
    assert deferred.startswith("warned by Slurm ") and "the ranks will be warned in " in deferred
    assert passed == "warned by Slurm: the ranks finish their step and save"


def test_second_warning_is_passed_on_at_once(stage):
    stage.set_record(seconds_left=200)
    process = stage.start(WAIT="yes", CODE="75", SBATCH_SIGNAL="B:USR1@250")
    stage.wait_for_start()
    assert "but Slurm warns 250 s before the limit" in process.stderr.readline()
    process.send_signal(signal.SIGUSR1)
    assert "the ranks will be warned in" in process.stderr.readline()
    process.send_signal(signal.SIGUSR1)
    assert "warned by Slurm: the ranks finish their step and save\n" in finish(process)[2]


def test_early_warning_is_deferred_if_the_previous_start_made_no_progress(stage):
    """The script assumes that Slurm warned the job too early.

    The script has two reasons: the previous start made no progress, and the warning arrives in the first 90 s of this
    start. The script cannot be sure of the time at which Slurm warns, because Slurm does not report the value of
    `sbatch --signal`.
    """
    stage.set_record(seconds_left=3000)
    (stage.folder / ".dpo-engine-4711.idle").write_text("start 1\n")
    process = stage.start(WAIT="yes", CODE="75", SLURM_RESTART_COUNT="1")
    stage.wait_for_start()
    process.send_signal(signal.SIGUSR1)
    line = process.stderr.readline()
    assert line.startswith("warned by Slurm ") and "the ranks will be warned in " in line
    process.send_signal(signal.SIGUSR1)
    assert finish(process)[0] == 0


@pytest.mark.parametrize("answers", [True, False])
def test_job_that_lost_a_rank_waits_if_a_node_is_gone(stage, answers):
    code, _, err = finish(stage.start(CODE="137", NODES_ANSWER="yes" if answers else "", NODE_LOSS_WAIT_S="9"))
    assert code == 137 and ("a node does not answer: waiting for Slurm to requeue the job" in err) is not answers
    assert stage.calls("srun")[1] == ["--overlap", "--ntasks-per-node=1", "--ntasks=2", "true"]
    assert (["9"] in stage.calls("sleep")) is not answers


def let_srun_miss(stage, node):
    """Change the fake srun so that ``node`` does not answer."""
    srun = stage.folder / "bin/srun"
    text = srun.read_text().replace(
        "while [[", f'[[ "$*" != *"--nodelist={node}"* && $* != *"ntasks=2 true" ]] || exit 1\nwhile [[', 1
    )
    srun.write_text(text)


@pytest.mark.parametrize(
    "verb, then",
    [
        ("train", "continues from its newest checkpoint"),
        ("reference", "continues where it stopped"),
        ("eval", "starts again"),
    ],
)
def test_lost_node_is_excluded(verb, then, stage):
    let_srun_miss(stage, "n2")
    stage.set_record(ExcNodeList="n7")
    code, _, err = finish(stage.start(verb, "run.yaml", script="run.sbatch", CODE="137", EXCLUDE_ON_LOSS="1"))
    assert code == 0 and err == (
        f"requeued: these nodes did not answer: n2; the job {then}\nexcluded from the next start: n2\n"
    )
    assert stage.calls("scontrol")[-1] == ["update", "JobId=4711", "ExcNodeList=n7,n2"]
    assert requeues(stage) == 1


def test_node_that_slurm_knows_to_be_down_is_excluded(stage):
    """Slurm can requeue the job before the script starts a job step on the nodes to test whether they answer.

    The job then has no nodes, so the step does not start. The script excludes the nodes that `sinfo` reports as down.
    """
    stage.set_record(JobState="PENDING")
    srun = stage.folder / "bin/srun"
    srun.write_text(srun.read_text().replace("|| exit 1", "|| exec /bin/sleep 60"))
    code, _, err = finish(stage.start(CODE="137", NODES_ANSWER="", STATE_OF_N2="down*", EXCLUDE_ON_LOSS="1"))
    assert code == 0 and "excluded from the next start: n2\n" in err
    assert requeues(stage) == 0


def test_node_that_cannot_be_excluded_is_reported(stage):
    let_srun_miss(stage, "n2")
    stage.fail("scontrol", "update", 99, "Job is no longer pending execution")
    code, _, err = finish(stage.start(CODE="137", EXCLUDE_ON_LOSS="1"))
    assert code == 0
    assert err.endswith("not excluded: n2; scontrol update: Job is no longer pending execution\n")


def test_no_node_is_excluded_if_none_answers(stage):
    code, _, err = finish(stage.start(CODE="137", NODES_ANSWER="", EXCLUDE_ON_LOSS="1"))
    assert code == 137 and err.startswith("a node does not answer: waiting for Slurm to requeue the job\n")
    assert requeues(stage) == 0


NVIDIA_SMI = """#!/usr/bin/env bash
case $1 in
  --query-gpu=*) printf '%s' "${GPUS-0, 0\n1, [N/A]\n}" | sed 's/\\\\n/\\n/g' ;;
  --query-remapped-rows=*) printf '%s\\n' "${ROWS-GPU-0, 0, 0}" ;;
esac
exit "${SMI_CODE:-0}"
"""


@pytest.fixture
def gpus(stage):
    """Return a function that starts a job with a GPU check. The fake srun runs the check only on the first node."""
    smi = stage.folder / "bin/nvidia-smi"
    smi.write_text(NVIDIA_SMI)
    smi.chmod(0o755)

    def start(**settings):
        shared = {"GPU_CHECK": "1", "SLURMD_NODENAME": "n1", "SLURM_GPUS_ON_NODE": "2", "SLURM_JOB_NODELIST": "n1"}
        (stage.folder / "bin/scontrol").write_text(
            (stage.folder / "bin/scontrol").read_text().replace("n1\\nn2", settings.pop("nodes", "n1"))
        )
        return finish(stage.start(**{**shared, **settings}))[::2]

    return start


def test_healthy_gpus_are_used(stage, gpus):
    assert gpus() == (0, "")
    assert len(stage.calls("trainer")) == 1


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"GPUS": "0, 0"}, "1 of 2 GPUs answer"),
        ({"GPUS": "0, 0\n1, 3"}, "GPU 1 has uncorrected memory errors: 3"),
        ({"SMI_CODE": "9", "GPUS": "Failed to initialize NVML"}, "nvidia-smi failed: Failed to initialize NVML"),
        ({"ROWS": "GPU-1, 1, 0"}, "GPU GPU-1 must be reset to replace a memory row"),
        ({"ROWS": "GPU-1, 0, 1"}, "GPU GPU-1 could not replace a faulty memory row"),
        ({"SLURM_GPUS_ON_NODE": "0", "GPUS": "No devices were found"}, "no GPU answers"),
    ],
)
def test_gpu_that_must_not_be_used_ends_the_job(stage, gpus, settings, reason):
    code, err = gpus(**settings)
    assert code == 6 and err == (
        f"GPU check: n1: {reason}\nnot requeued: these nodes failed the GPU check: n1; exclude them "
        "(sbatch --exclude=n1), or set EXCLUDE_ON_LOSS=1 in launch/site.env\n"
    )
    assert stage.calls("trainer") == []


def test_node_that_fails_the_gpu_check_is_excluded(stage, gpus):
    code, err = gpus(nodes="n1\\nn2", EXCLUDE_ON_LOSS="1", GPU_CHECK_S="7")
    assert code == 0 and err == (
        "GPU check: n2: no answer within 7 s\nrequeued: these nodes failed the GPU check: n2; the job starts on "
        "other nodes\nexcluded from the next start: n2\n"
    )
    assert stage.calls("scontrol")[-1] == ["update", "JobId=4711", "ExcNodeList=n2"]
