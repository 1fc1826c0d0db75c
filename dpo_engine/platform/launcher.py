"""Read this process's rank, its index on the node, the number of ranks, and MASTER_PORT from the environment.

The launcher (torchrun, srun or mpirun) or the batch script has set these variables.
"""

import os
from collections.abc import Mapping

from dpo_engine.errors import ConfigError, printable, shorten

WAY_OUT = "start with torchrun or launch/train.sbatch, which set valid values"
HIGHEST_PORT = 65535

MPI = {
    "OMPI_COMM_WORLD_RANK": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "PMI_RANK": ("PMI_SIZE", "MPI_LOCALRANKID"),
}
"""Variables that mpirun sets: the rank, the number of ranks, and the index on the node.

The first row is for Open MPI, the second one for MPICH and Intel MPI.
"""


def world_from_environment(env: Mapping[str, str] | None = None) -> tuple[int, int]:
    """Return ``(rank, world size)`` as set by torchrun, srun or mpirun, or ``(0, 1)`` for a single process.

    A site's batch script may export WORLD_SIZE without RANK, because one script cannot know the rank of each process.
    The rank is then taken from srun or mpirun, unless they have set a different number of processes.

    Raises :class:`ConfigError` if a variable is not a valid number, if the rank is missing or too large, or if RANK is
    set but the number of ranks is unknown.
    """
    env = os.environ if env is None else env
    name = "RANK"
    if "WORLD_SIZE" in env:
        size, world = "WORLD_SIZE", whole_number("WORLD_SIZE", env, least=1)
        if name not in env:
            # Under mpirun, all processes may have inherited SLURM_PROCID from the batch script, so it is tried last.
            sizes = {rank: sizes[0] for rank, sizes in MPI.items()} | {"SLURM_PROCID": "SLURM_NTASKS"}
            fitting = [rank for rank in sizes if rank in env and env.get(sizes[rank], str(world)) == str(world)]
            if "SLURM_JOB_ID" in env and "SLURM_STEP_ID" not in env:  # not started by srun
                fitting = [rank for rank in fitting if rank != "SLURM_PROCID"]
            name = next(iter(fitting), name)
        if name not in env and world == 1:
            return 0, 1
    elif (mpi := _mpi(env)) is not None:
        name, size = mpi, MPI[mpi][0]
        world = whole_number(size, env, least=1)
    elif "SLURM_NTASKS" in env and "SLURM_PROCID" in env and "SLURM_STEP_ID" in env:
        name, size = "SLURM_PROCID", "SLURM_NTASKS"
        world = whole_number(size, env, least=1)
    elif name in env:
        text = shorten(printable(env[name]), 40)
        raise ConfigError(f"RANK={text}: is set, but WORLD_SIZE is not; {WAY_OUT}, or set WORLD_SIZE, or unset RANK")
    else:
        return 0, 1
    if name not in env:
        numbers = f"a number from 0 to {world - 1}"
        raise ConfigError(f"RANK: is not set, but WORLD_SIZE is {world}; {WAY_OUT}, or set RANK to {numbers}")
    rank = whole_number(name, env)
    if rank >= world:
        raise ConfigError(f"{name}={rank}: must be less than {size}={world}, because ranks start at 0; {WAY_OUT}")
    return rank, world


def local_rank(env: Mapping[str, str] | None = None) -> int:
    """Return this process's index on its node, as set by torchrun, srun or mpirun; 0 if none of them has set it.

    Raises :class:`ConfigError` if the variable is not a valid number.
    """
    env = os.environ if env is None else env
    mpi = None if "WORLD_SIZE" in env else _mpi(env)
    names = ["LOCAL_RANK", *([MPI[mpi][1]] if mpi else []), "SLURM_LOCALID", *(index for _, index in MPI.values())]
    name = next((name for name in names if name in env), None)
    return whole_number(name, env) if name else 0


def master_port(env: Mapping[str, str] | None = None) -> int:
    """Return MASTER_PORT, the port at which the ranks meet. Raises :class:`ConfigError` if it is not a port number."""
    env = os.environ if env is None else env
    port = whole_number("MASTER_PORT", env)
    if port > HIGHEST_PORT:
        raise ConfigError(f"MASTER_PORT={port}: must be at most {HIGHEST_PORT}; {WAY_OUT}")
    return port


def whole_number(name: str, env: Mapping[str, str], *, least: int = 0) -> int:
    """Return the value of a variable. Raises :class:`ConfigError` unless it is a whole number of at least ``least``."""
    text = env[name].strip()
    if not (text.isascii() and text.isdecimal()) or int(text[:20]) < least:
        raise ConfigError(
            f"{name}={shorten(printable(env[name]), 40)}: must be a whole number of at least {least}; {WAY_OUT}"
        )
    return int(text)


def _mpi(env: Mapping[str, str]) -> str | None:
    """Return the name of the variable with this process's rank if mpirun has started several processes, else None."""
    for rank, (size, _) in MPI.items():
        if rank in env and env.get(size, "1") != "1":
            return rank
    return None
