"""Data and weights from the Hugging Face hub: `python -m rwkv_nb download minipile`, or `eagle-7b`.

It is: one file after another, each under a temporary name until its size and hash are those that the hub states, so
that a file with its proper name is a whole one. A download that was cut off goes on where it stopped, in the same
process or days later; at most the last 10 MB come twice. It is not: a cache; the files lie where you see them.

The hub names the SHA-256 of a large file and git's SHA-1 of a small one as its ETag. The package `huggingface_hub`
asks and transfers (its own hf_hub_download, as of 2.4, begins anew after a kill, which costs gigabytes here).
HF_ENDPOINT names another hub, HF_TOKEN an account, as everywhere with that package.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from .offers import OFFERS, Remote, by_hand

BLOCK = 1 << 22  # bytes hashed at once
SPARE = 64 << 20  # bytes of disk that are left alone


class DownloadError(OSError):
    """A file that could not be had; the message says why and what to do."""


@dataclass(frozen=True)
class Found:
    """A file as the hub describes it now."""

    url: str
    size: int
    etag: str

    @property
    def algorithm(self) -> str:
        """sha256 for large files; git's sha1 (of the size, then the content) for small ones; "" if unknown."""
        return {64: "sha256", 40: "sha1"}.get(len(self.etag), "")


def download(name: str, folder: str | os.PathLike | None = None, progress: bool = True) -> list[Path]:
    """Fetch what `name` offers into `folder` (default: the offer's own) and return the files.

    A file that is already there, with the right size and hash, is not fetched again. Raises ValueError for an unknown
    name; DownloadError without a connection, without room, or for what is not what the hub states.
    """
    if name not in OFFERS:
        raise ValueError(f"{name!r}: nothing of this name; choose from {', '.join(OFFERS)}")
    offer = OFFERS[name]
    target = Path(offer.folder if folder is None else folder)
    found = {target / local: _look_up_for(target / local, remotes) for local, remotes in offer.files.items()}
    target.mkdir(parents=True, exist_ok=True)
    wanted = {path: there for path, there in found.items() if not _is_whole(path, there, progress)}
    _check_room(target, wanted)
    for path, there in wanted.items():
        fetch(there, path, progress)
    return list(found)


def _look_up_for(path: Path, remotes: Sequence[Remote]) -> Found:
    try:
        return look_up(remotes)
    except DownloadError as error:
        if path.is_file():
            raise DownloadError(f"{error}. {path} is there already, but could not be checked") from error
        raise


def look_up(remotes: Sequence[Remote]) -> Found:
    """What the hub says about the first of these files that it has."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import HfHubHTTPError

    refusal: Exception | None = None
    for remote in remotes:
        url = hf_hub_url(remote.repository, remote.path, repo_type=remote.kind)
        try:
            with _readable(url):
                there = get_hf_file_metadata(url)
        except HfHubHTTPError as error:  # not there (any more), or not for everybody
            refusal = error
            continue
        if there.size is None or not there.etag:
            raise DownloadError(f"{url}: the server states no size or hash; is HF_ENDPOINT a hub?")
        return Found(url, there.size, there.etag)
    places = ", ".join(f"{remote.repository}/{remote.path}" for remote in remotes)
    raise DownloadError(f"not found on the hub: {places} ({_first_line(refusal)})")


def fetch(there: Found, path: Path, progress: bool = True) -> None:
    """Transfer one file to `path`: into PATH.part first, from where that ends; renamed when size and hash are right.

    Raises DownloadError; PATH.part stays after a cut connection or an interrupt and goes after a wrong hash.
    """
    from huggingface_hub.errors import HfHubHTTPError
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    part = path.with_name(path.name + ".part")
    with open(part, "ab") as file:
        if file.tell() > there.size:
            file.truncate(0)
            file.seek(0)
        have = file.tell()
        try:
            with _readable(there.url), _bars(progress):
                http_get(there.url, file, resume_size=have, headers=build_hf_headers(), expected_size=there.size,
                         displayed_filename=path.name)  # fmt: skip
        except HfHubHTTPError as error:
            raise DownloadError(f"{path}: the hub refuses ({_first_line(error)}); call it again later") from error
        except DownloadError:
            raise
        except OSError as error:
            raise DownloadError(
                f"{path}: {error.strerror or _first_line(error)}; call it again, it goes on with what is in {part}"
            ) from error
        file.flush()
        os.fsync(file.fileno())
    if (have := part.stat().st_size) != there.size:
        raise DownloadError(f"{path}: {have} of {there.size} bytes came; call it again, it goes on from there")
    digest = _hash(part, there, progress)
    if there.algorithm and digest != there.etag:
        part.unlink()
        raise DownloadError(
            f"{path}: the {there.algorithm} of what came is {digest}, the hub states {there.etag}; what came was "
            "deleted, call it again"
        )
    os.replace(part, path)


def _is_whole(path: Path, there: Found, progress: bool) -> bool:
    if not path.is_file():
        return False
    if path.stat().st_size == there.size and (not there.algorithm or _hash(path, there, progress) == there.etag):
        return True
    raise DownloadError(
        f"{path}: is there, but is not the file on the hub ({path.stat().st_size} bytes, the hub's has {there.size}); "
        "move it away or choose another folder with --to"
    )


def _check_room(folder: Path, wanted: dict[Path, Found]) -> None:
    parts = [path.with_name(path.name + ".part") for path in wanted]
    have = sum(part.stat().st_size for part in parts if part.is_file())
    needed = sum(there.size for there in wanted.values()) - have
    free = shutil.disk_usage(folder).free
    if wanted and free < needed + SPARE:
        raise DownloadError(
            f"{folder}: {needed / 1e9:.1f} GB are still to come, {free / 1e9:.1f} GB are free; make room, or choose "
            "another disk with --to"
        )


def _hash(path: Path, there: Found, progress: bool) -> str:
    from tqdm import tqdm

    if not there.algorithm:
        return ""
    digest = hashlib.new(there.algorithm)
    if there.algorithm == "sha1":
        digest.update(f"blob {there.size}\0".encode())
    bar = tqdm(total=there.size, desc=f"check {path.name}", unit="B", unit_scale=True, disable=not progress or None)
    with bar, open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


@contextlib.contextmanager
def _readable(url: str) -> Iterator[None]:
    """Within: what a missing connection raises, in whichever HTTP package, becomes a DownloadError."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        yield
    except OfflineModeIsEnabled as error:
        raise DownloadError(f"{url}: HF_HUB_OFFLINE is set; unset it to download") from error
    except HfHubHTTPError:
        raise
    except Exception as error:
        if type(error).__module__.split(".")[0] not in ("httpx", "httpx2", "httpcore", "httpcore2", "requests"):
            raise
        raise DownloadError(
            f"{url}: no connection ({_first_line(error)}); try again, or fetch this address on another computer and "
            "put the file in its place, see --help; what has come so far is kept"
        ) from error


@contextlib.contextmanager
def _bars(wanted: bool) -> Iterator[None]:
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    before = are_progress_bars_disabled()
    if not wanted and not before:
        disable_progress_bars()
    try:
        yield
    finally:
        if not wanted and not before:
            enable_progress_bars()


def _first_line(error: BaseException | None) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:200]


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m rwkv_nb download`. Returns the exit code; errors are raised."""
    offers = "".join(f"  {name:10} {offer.what}; into {offer.folder}/\n" for name, offer in OFFERS.items())
    offers += "\nBy hand: fetch these elsewhere and put them there under these names.\n" + by_hand()
    parser = argparse.ArgumentParser(
        "python -m rwkv_nb download", formatter_class=argparse.RawDescriptionHelpFormatter, epilog=offers,
        description="Fetch data or weights from the Hugging Face hub; goes on with what was cut off.",
    )  # fmt: skip
    parser.add_argument("name", choices=tuple(OFFERS), help="what to fetch")
    parser.add_argument("--to", metavar="FOLDER", help="where to, in place of its own folder")
    args = parser.parse_args(argv)
    for path in download(args.name, args.to, progress=sys.stderr.isatty()):
        print(f"{path}  {path.stat().st_size:,} bytes, as the hub states")
    return 0
