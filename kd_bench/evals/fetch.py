"""Bring the real data sets to a folder, and check what lies there.

    <folder>/<benchmark id>/<split>-*.parquet      and      <folder>/lock.json

The lock holds the commit of each data set and the digest of each file. A data set is taken at the
commit that its YAML pins; without one, at the newest, which the lock then pins for this folder.
Fetching again takes only what is missing or changed; evaluating from the folder uses no network.
"""

import fnmatch
import importlib.util
import os
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from kd_bench.distill.data import Unreadable
from kd_bench.errors import IncompleteRunError, MissingExtraError, UsageError, one_line
from kd_bench.evals.documents import decode_image, load_documents
from kd_bench.files import digest_files, read_json, write_json
from kd_bench.registry import TaskSpec

LOCK = "lock.json"
Report = Callable[[str], None]


@dataclass
class Verified:
    """What `verify` found in one benchmark's data; no problems means it can be used.

    Attributes:
        revision: commit that the files were fetched from; empty for files from elsewhere.
    """

    task: str
    documents: int = 0
    images: int = 0
    revision: str = ""
    problems: list[str] = field(default_factory=list)


def fetch(
    specs: Iterable[TaskSpec],
    folder: Path,
    *,
    profiles: dict[str, str] | None = None,
    report: Report = lambda line: None,
) -> None:
    """Download the parquet files of benchmarks; a stopped download is continued.

    Raises:
        UsageError: the hub is switched off, or a data set lacks the files.
        IncompleteRunError: the hub cannot be reached, or a download failed.
    """
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON"):
        raise UsageError("HF_HUB_OFFLINE is set: nothing can be fetched.", "Unset it to fetch.")
    if importlib.util.find_spec("huggingface_hub") is None:
        raise MissingExtraError("tasks fetch", "train", "huggingface-hub")
    folder.mkdir(parents=True, exist_ok=True)
    for spec in specs:
        split = spec.profile((profiles or {}).get(spec.id)).split or spec.dataset.split
        parts = [(spec.id, spec.dataset.config)]
        if spec.dataset.images:
            parts.append((f"{spec.id}_images", spec.dataset.images))
        for name, config in parts:
            _fetch_part(spec, name, config, split, folder, report)


def _fetch_part(
    spec: TaskSpec, name: str, config: str | None, split: str, folder: Path, report: Report
) -> None:
    from huggingface_hub import hf_hub_download

    repo, lock = spec.dataset.repo, _read_lock(folder)
    known = lock.get(name, {})
    pinned, locked = spec.dataset.revision, known.get("revision")
    commit, wanted = _listing(spec, config, split, str(pinned or locked or "main"))
    why = f"as {LOCK} says" if commit == locked else f"the newest: none is pinned, {LOCK} keeps it"
    report(f"{name}: {repo} at {commit}, {'the pinned revision' if pinned else why}")
    files = dict(known.get("files", {}))
    if locked != commit:
        # Under other names, files of another revision would be read beside the new ones.
        for file in fnmatch.filter(files, f"{split}-*.parquet"):
            (folder / name / file).unlink(missing_ok=True)
        files = {}
    for number, path in enumerate(wanted, 1):
        target = folder / name / PurePosixPath(path).name
        if target.is_file() and files.get(target.name) == digest_files([target]):
            report(f"{name}: {target.name} ({number} of {len(wanted)}) is there")
            continue
        report(f"{name}: {target.name} ({number} of {len(wanted)})")
        aside = folder / ".incomplete" / name
        try:
            got = hf_hub_download(repo, path, repo_type="dataset", revision=commit, local_dir=aside)
        except Exception as error:
            raise IncompleteRunError(
                f"{repo}/{path} was not downloaded: {one_line(error)[:200]}",
                "The same command goes on where it stopped.",
            ) from error
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.move(got, target)
        files[target.name] = digest_files([target])
        lock[name] = {"repo": repo, "revision": commit, "files": files}
        write_json(folder / LOCK, lock)


def _listing(
    spec: TaskSpec, config: str | None, split: str, revision: str
) -> tuple[str, list[str]]:
    """The data set's commit and its parquet files of one split."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RevisionNotFoundError

    repo = spec.dataset.repo
    try:
        info = HfApi().dataset_info(repo, revision=revision)
    except RevisionNotFoundError as error:
        raise UsageError(
            f"{spec.id}: {repo} has no revision {revision}.",
            "Correct `revision` in its YAML; without one the newest is taken and kept.",
        ) from error
    except Exception as error:
        raise IncompleteRunError(
            f"{spec.id}: {repo} cannot be listed: {one_line(error)[:200]}",
            "Check the network; the same command goes on where it stopped.",
        ) from error
    names = (PurePosixPath(entry.rfilename) for entry in info.siblings or [])
    found = (name for name in names if name.match(f"{split}-*.parquet"))
    folders = {config} if config else {"data", "default"}
    chosen = [str(name) for name in found if name.parent.name in folders]
    if not chosen:
        raise UsageError(
            f"{spec.id}: {repo} has no {config or 'data'}/{split}-*.parquet.",
            "The data set has moved; correct repo, config or split in its YAML.",
        )
    return str(info.sha), sorted(chosen)


def _read_lock(folder: Path) -> dict[str, Any]:
    path = folder / LOCK
    if not path.exists():
        return {}
    try:
        value = read_json(path)
    except ValueError as error:
        raise UsageError(f"{error}.", "Delete that file and fetch again.") from None
    return value if isinstance(value, dict) else {}


def verify(
    spec: TaskSpec, folder: Path, *, complete: bool = True, profile: str | None = None
) -> Verified:
    """Check one benchmark's data: columns, rows, revision, digests, and that images decode.

    Args:
        complete: expect the real data set's number of documents.
    """
    found = Verified(spec.id)
    try:
        documents = load_documents(spec, folder, profile)
    except UsageError as error:
        found.problems.append(one_line(error))
        return found
    found.documents = len(documents)
    expected = spec.profile(profile).documents or spec.documents
    if complete and len(documents) != expected:
        found.problems.append(f"{spec.id}: {len(documents)} documents, {expected} expected")
    lock = _read_lock(folder)
    found.revision = str(lock.get(spec.id, {}).get("revision", ""))
    found.problems += _changed_files(spec, folder, lock)
    for column in documents.image_columns:
        seen: set[str] = set()
        for index, digest in enumerate(documents.image_digests(column)):
            if not digest or digest in seen:
                continue
            seen.add(digest)
            try:
                decode_image(documents.encoded(index, column) or b"")
            except Unreadable as error:
                found.problems.append(f"{spec.id}: document {index}, {column}: {error}")
        found.images += len(seen)
    return found


def _changed_files(spec: TaskSpec, folder: Path, lock: dict[str, Any]) -> list[str]:
    """Files that are not those of the lock, and a lock that is not of the pinned revision."""
    problems = []
    for name in (spec.id, f"{spec.id}_images"):
        entry = lock.get(name, {})
        revision = entry.get("revision")
        if spec.dataset.revision and revision not in (None, spec.dataset.revision):
            problems.append(
                f"{spec.id}: {folder / name} is of revision {revision}, "
                f"pinned is {spec.dataset.revision}"
            )
        for file, digest in entry.get("files", {}).items():
            path = folder / name / file
            if not path.is_file():
                problems.append(f"{spec.id}: {path} is missing")
            elif digest_files([path]) != digest:
                problems.append(f"{spec.id}: {path} is not the file that was fetched")
    return problems
