"""A private image store for buildah and podman. Both run as root and without a daemon."""

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from support.installed import absent, need

# These settings also work without systemd, with restricted permissions, and with either version of cgroups. They do not
# configure a network, because launch/task.sh always uses the host's network.
CONTAINERS_CONF = """[containers]
cgroups = "disabled"
default_ulimits = []
log_driver = "k8s-file"
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
lock_type = "file"
runtime = "crun"
tmp_dir = "{folder}/tmp"
"""


class ContainerStore:
    """Images and containers in one folder, which `close` removes.

    The folder's path is short, because the length of a Unix socket's path is limited.
    """

    def __init__(self):
        if not (sys.platform == "linux" and os.geteuid() == 0):
            pytest.skip("images are built as root on Linux")
        need("buildah", "podman", "crun", "mmdebstrap")
        if subprocess.run(["unshare", "--mount", "true"], capture_output=True).returncode:
            pytest.skip("mount namespaces are not allowed here (CAP_SYS_ADMIN)")
        self.folder = Path(tempfile.mkdtemp(prefix="dpo-"))
        (self.folder / "containers.conf").write_text(CONTAINERS_CONF.format(folder=self.folder))
        (self.folder / "storage.conf").write_text(
            f'[storage]\ndriver = "overlay"\ngraphroot = "{self.folder}/store"\nrunroot = "{self.folder}/run"\n'
        )
        self.variables = {
            "CONTAINERS_CONF": str(self.folder / "containers.conf"),
            "CONTAINERS_STORAGE_CONF": str(self.folder / "storage.conf"),
        }

    def run(self, *command: str, timeout_s: float = 1200) -> str:
        """Run a command with this store. Return what the command wrote to stdout."""
        done = subprocess.run(
            command,
            env={**os.environ, **self.variables},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
        )
        assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}"
        return done.stdout

    def containers(self) -> list[str]:
        """Return the names of all podman containers, running or not."""
        return self.run("podman", "ps", "--all", "--format", "{{.Names}}").split()

    def close(self) -> None:
        for command in (
            ["podman", "rm", "--all", "--force"],
            ["buildah", "rm", "--all"],
            ["podman", "umount", "--all"],
        ):
            subprocess.run(command, env={**os.environ, **self.variables}, capture_output=True)
        subprocess.run(["umount", str(self.folder / "store/overlay")], capture_output=True)
        shutil.rmtree(self.folder)


def debian_base() -> Path:
    """Return a tar file with a minimal system of this machine's Debian release. The file is cached."""
    release = platform.freedesktop_os_release()
    if release["ID"] != "debian":
        pytest.skip(f"requires Debian, from which the base image is made; this machine has {release['ID']}")
    codename = release["VERSION_CODENAME"]
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dpo-engine"
    tar = cache / f"debian-{codename}.tar"
    if not tar.exists():
        cache.mkdir(parents=True, exist_ok=True)
        part = cache / f"{os.getpid()}.tar"
        done = subprocess.run(
            ["mmdebstrap", "--variant=minbase", codename, str(part)], capture_output=True, text=True, timeout=900
        )
        if done.returncode:
            part.unlink(missing_ok=True)
            absent(f"mmdebstrap cannot make the base image: {done.stderr.strip().splitlines()[-1]}")
        part.rename(tar)
    return tar


def pip_volumes(folder: Path) -> list[str]:
    """Write this machine's pip settings to ``pip.conf`` in ``folder``, and return volume options for builds.

    The options mount ``pip.conf``, and the local files and directories that the settings name: constraints,
    certificates, and directories of packages.
    """
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True
    ).stdout
    settings = dict(re.findall(r"^\S*\.([\w-]+)='(.*)'$", listed, re.MULTILINE))
    volumes = []
    if "constraint" in settings:  # files on this machine; they are mounted at the same paths in the build
        volumes += [f"{path}:{path}:ro" for path in settings["constraint"].split()]
    if "cert" in settings:
        volumes.append(f"{settings['cert']}:/etc/pip-certificates.crt:ro")
        settings["cert"] = "/etc/pip-certificates.crt"
    for word in " ".join(settings.values()).split():
        path = Path(word.removeprefix("file://"))
        if path.is_absolute() and path.is_dir():
            # Pages of a local index link to files in the index's parent directory.
            path = path.parent if word.startswith("file://") else path
            volumes.append(f"{path}:{path}:ro")
    lines = [f"{name} = {value}\n" for name, value in settings.items()]
    (folder / "pip.conf").write_text("[global]\n" + "".join(lines))
    return [*dict.fromkeys(volumes), f"{folder / 'pip.conf'}:/etc/pip.conf:ro"]
