"""Stand-ins for Slurm's commands, container programs and the trainer, to run the launch scripts without a cluster."""

import os
import shutil
import subprocess
import time
from pathlib import Path

LAUNCH = Path(__file__).parents[2] / "launch"

# Each call of a stand-in appends the command's name and arguments to a log, as one record. If the test has requested a
# failure (`StandIns.fail`), the call then fails.
RECORD = r"""#!/usr/bin/env bash
line=$(printf "%s\x1f" "$(basename "$0")" "$@"); echo "$line" >>"$CALLS"
failure="$CALLS.$(basename "$0").${1:-}"
if [[ -s $failure ]]; then
  { read -r times; read -r message; } <"$failure"
  if ((times > 1)); then printf "%s\n" $((times - 1)) "$message" >"$failure"; else rm "$failure"; fi
  echo "$message" >&2
  exit 1
fi
"""
STAND_INS = {
    # This fake srun also runs the command that follows srun's options, such as `bash launch/task.sh ...`. The command
    # runs once, as the first task of the first node. The command replaces the process of the fake srun, so USR1 reaches
    # the command, as with the real srun.
    "srun": "while [[ $1 == -* ]]; do shift; done\n"
    '[[ $1 != true || -n ${NODES_ANSWER-yes} ]] || exit 1\nSLURM_PROCID=0 SLURM_NODEID=0 SLURM_LOCALID=0 exec "$@"\n',
    "scontrol": 'if [[ $1 == show && $2 == hostnames ]]; then printf "n1\\nn2\\n"; fi\n'
    'if [[ $1 == show && $2 == job && -e $CALLS.record ]]; then cat "$CALLS.record"; fi\nexit 0\n',
    "sinfo": 'printf "n1 mix\\nn2 ${STATE_OF_N2-alloc}\\n"\n',
    "scancel": 'touch "$CALLS.warned"\n',
    "sleep": "exec /bin/sleep 0.02\n",
    # This fake trainer exits with $CODE. If $WAIT is set, the trainer first waits for Slurm's warning: the signal USR1,
    # or a call of the fake scancel. If $RANKS_SAY is set, its words become the lines of the file $DPO_EXIT_CODES, in
    # which ranks record their exit codes.
    "trainer": 'trap \'touch "$CALLS.warned"\' USR1\ntouch "$CALLS.started"\nenv -0 >"$CALLS.environment"\n'
    "while [[ -n ${WAIT:-} && ! -e $CALLS.warned ]]; do /bin/sleep 0.05; done\n"
    'if [[ -n ${RANKS_SAY:-} ]]; then printf "%s\\n" $RANKS_SAY >"$DPO_EXIT_CODES"; fi\nexit "${CODE:-0}"\n',
    **dict.fromkeys(
        ("podman", "docker", "apptainer"),
        'if [[ $1 == run || $1 == exec ]]; then while [[ $1 != trainer ]]; do shift; done; "$@"; fi\n',
    ),
}
# Before a job starts its ranks, the job calls the engine once with the verb `config`. That call is not logged.
PREFLIGHT = (
    '#!/usr/bin/env bash\nif [[ $3 == config ]]; then echo "${PREFLIGHT:=}" >&2; exit $((${#PREFLIGHT} > 0)); fi\n'
)


class StandIns:
    """A copy of the launch scripts in ``folder``, and stand-ins for the commands that they run."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.log = folder / "calls"
        self.running: list[subprocess.Popen] = []
        shutil.copytree(LAUNCH, folder / "launch", ignore=shutil.ignore_patterns("site.env"))
        (folder / "bin").mkdir()
        for name, body in STAND_INS.items():
            stand_in = folder / "bin" / name
            preflight = PREFLIGHT if name == "trainer" else ""
            stand_in.write_text(f"{preflight}{RECORD}{body}")
            stand_in.chmod(0o755)

    def start(
        self, *arguments: str, script: str = "train.sbatch", cwd: Path | None = None, **settings: str
    ) -> subprocess.Popen:
        """Start a script in `launch/` as the batch script of a job on two nodes with four ranks each."""
        environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}
        environment |= {
            "PATH": f"{self.folder / 'bin'}:{os.environ['PATH']}",
            "CALLS": str(self.log),
            "PYTHON": "trainer",
            "SLURM_SUBMIT_DIR": str(cwd or self.folder),
            "SLURM_JOB_ID": "4711",
            "SLURM_JOB_NODELIST": "n[1-2]",
            "SLURM_NNODES": "2",
            "SLURM_NTASKS_PER_NODE": "4",
            **settings,
        }
        command = ["bash", str(self.folder / "launch" / script), *(arguments or ("run.yaml", "train.max_steps=5"))]
        pipe = subprocess.PIPE
        self.running.append(subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True))
        return self.running[-1]

    def calls(self, name: str) -> list[list[str]]:
        """Return the argument lists of all calls of a stand-in."""
        lines = self.log.read_text().splitlines() if self.log.exists() else []
        records = [line.split("\x1f")[:-1] for line in lines]
        return [record[1:] for record in records if record[0] == name]

    def environment(self) -> dict[str, str]:
        """Return the environment of the trainer."""
        text = (self.folder / "calls.environment").read_text()
        return dict(entry.split("=", 1) for entry in text.split("\0")[:-1])

    def fail(self, command: str, first_argument: str, times: int, message: str) -> None:
        """Make a command print ``message`` to stderr and fail, in its next ``times`` calls with ``first_argument``."""
        (self.folder / f"calls.{command}.{first_argument}").write_text(f"{times}\n{message}\n")

    def set_record(self, *, seconds_left: int | None = None, **fields: str) -> None:
        """Set the output of `scontrol show job`. By default, the output says that the job runs and can be requeued."""
        fields = {"JobState": "RUNNING", "Requeue": "1", "ExcNodeList": "(null)", **fields}
        if seconds_left is not None:
            fields["EndTime"] = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + seconds_left))
        text = "".join(f"   {name}={value} Other=1\n" for name, value in fields.items() if name != "Command")
        (self.folder / "calls.record").write_text(f"{text}   Command={fields.get('Command', '(null)')}\n")

    def wait_for_start(self) -> None:
        """Wait until the trainer has started."""
        deadline = time.monotonic() + 15
        while not (self.folder / "calls.started").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def close(self) -> None:
        for process in self.running:
            process.kill()
            process.communicate()


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    """Wait for a script. Return its exit code, stdout and stderr."""
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err
