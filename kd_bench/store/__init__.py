"""Results on disk, and which run a name stands for: baselines, rows and comparisons ask here.

A name means the newest finished, unlimited, whole evaluation of that model; a limited,
unfinished or unhealthy one never stands for it, nor one whose images were taken away. What is
passed over is said, with the reason.
A damaged run may hide the one that was meant: it is named, and nothing older takes its place.
"""

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path

from kd_bench import registry
from kd_bench.errors import IncompleteRunError, KdBenchError, UsageError, closest
from kd_bench.files import write_text
from kd_bench.records import Identity, RunManifest
from kd_bench.store.run import TOLERANCE, Run, held_run, slug, wanted_run

__all__ = [
    "MOVES",
    "TOLERANCE",
    "Baseline",
    "Catalogue",
    "Run",
    "baseline_moves",
    "baseline_run",
    "baselines",
    "blank_runs",
    "catalogue",
    "cautions",
    "find_run",
    "find_runs",
    "held_run",
    "list_runs",
    "missing_tasks",
    "runs_elsewhere",
    "set_baseline",
    "shortcomings",
    "suite_tasks",
    "wanted_run",
]

Listed = tuple[Run, RunManifest]
MOVES = "baseline_moves.jsonl"  # when a baseline was set to which run; only grows


@dataclass(frozen=True)
class Catalogue:
    """What a results folder holds, its manifests read once.

    Attributes:
        runs: readable ones, oldest first.
        damaged: those whose manifest cannot be read, and why.
    """

    results: Path
    runs: tuple[Listed, ...]
    damaged: tuple[tuple[Run, KdBenchError], ...]

    def find(self, names: Sequence[str], like: RunManifest | None = None) -> list[Run]:
        """The run of each name: a folder, a model's name, or how a folder's name begins.

        Args:
            like: where a model has several runs, those of this one's protocol come first; else
                those of the protocol that most models of the store have.

        Raises:
            UsageError: a name fits none.
            IncompleteRunError: only damaged runs fit, or one may be the run that was meant.
        """
        found = [self._exact(name) or self._candidates(name) for name in names]
        models: dict[str, list[Listed]] = {}
        for listed in self.runs:
            models.setdefault(listed[1].model.name, []).append(listed)
        common = _common(models.values())
        return [
            each if isinstance(each, Run) else self._best(name, each, common, like)
            for name, each in zip(names, found, strict=True)
        ]

    def board(self, suite: str) -> tuple[list[Listed], list[str]]:
        """The run of each model of a suite, and why the others are not shown."""
        groups = self._models(suite)
        common = _common(groups.values())
        shown, left_out = [], [f"{run.path.name}: {error.problem}" for run, error in self.damaged]
        for (name, _), members in groups.items():
            if all(manifest.protocol.images for _, manifest in members):
                left_out += [_blind(*each) for each in members]
                continue
            best = max(members, key=lambda each: _standing(each, common, None))
            if hidden := self._hidden_by(name, best):
                left_out.append(
                    f"{name}: {hidden[0].path.name} is damaged and may be its newest run"
                )
                continue
            shown.append(best)
            left_out += [_why_not(each, best) for each in members if each is not best]
        return shown, left_out

    def reason(self, run: Run, manifest: RunManifest) -> str:
        """Why a run does not stand for its model in its suite; empty where it does."""
        groups = self._models(manifest.protocol.suite)
        members = groups[manifest.model.name, manifest.model.role]
        common = _common(groups.values())
        best = max(members, key=lambda each: _standing(each, common, None))
        if best[0] == run or manifest.protocol.images:
            return "; ".join(shortcomings(run, manifest))
        return _why_not((run, manifest), best)

    def _models(self, suite: str) -> dict[tuple[str, str], list[Listed]]:
        """A suite's runs by the model's name and role."""
        groups: dict[tuple[str, str], list[Listed]] = {}
        for listed in self.runs:
            model, protocol = listed[1].model, listed[1].protocol
            if protocol.suite == suite:
                groups.setdefault((model.name, model.role), []).append(listed)
        return groups

    def blank_of(self, run: Run, manifest: RunManifest) -> tuple[Run | None, str]:
        """The newest run of the same model, documents and protocol but with blank images.

        Returns:
            The run, and nothing; or None, and why one that looks like it (the same weights or
            name) is not used. Nothing where the store has none.
        """
        if manifest.protocol.images or not manifest.verified:
            return None, ""
        protocol = replace(manifest.protocol, images="blank")
        twin = replace(manifest.identity, protocol=protocol)
        unused = f"does not tell the sight of {manifest.model.name} ({run.path.name}):"
        reason = ""
        for other, its in reversed(self.runs):
            model = its.model
            named = model.name in (manifest.model.name, f"{manifest.model.name}-blank")
            if its.protocol.images != "blank" or not its.verified:
                continue
            if twin.holds(its.identity) and its.status in ("complete", "partial"):
                return other, ""
            if named or model.weights_digest == twin.weights:
                why = its.status if twin.holds(its.identity) else _what_differs(twin, its.identity)
                reason = reason or f"{other.path.name} {unused} it is {why}."
        for other, _ in self.damaged:
            if _is_of(other, f"{manifest.model.name}-blank"):
                reason = reason or f"{other.path.name} {unused} its manifest is damaged."
        return None, reason

    def role_of(self, name: str, weights: str) -> str:
        """The role that the store knows for these weights; empty where it knows none."""
        for run in (True, False):  # the same name's record first
            for _, manifest in reversed(self.runs):
                model = manifest.model
                told = manifest.verified and model.role != "model"
                if told and model.weights_digest == weights and (model.name == name or not run):
                    return model.role
        return ""

    def teaches(self, weights: str) -> bool:
        """Whether the training of a model of this store names these weights as its teacher."""
        teachers = ((manifest.training or {}).get("teacher") for _, manifest in self.runs)
        return any(
            isinstance(teacher, dict) and teacher.get("weights_sha256") == weights
            for teacher in teachers
        )

    def _exact(self, name: str) -> Run | None:
        for path in (Path(name), self.results / "runs" / name):
            with suppress(OSError, ValueError):  # too long for a file, or no text for one
                if name and (path / "manifest.json").exists():
                    # `.` has no parents, where the store's images and other runs are.
                    return Run(Path(os.path.abspath(path)))  # noqa: PTH100 - links stay
        return None

    def _candidates(self, name: str) -> list[Listed]:
        fits = [each for each in self.runs if each[1].model.name == name]
        fits = fits or [each for each in self.runs if name and each[0].path.name.startswith(name)]
        if fits:
            return fits
        for run, error in self.damaged:
            if name and (_is_of(run, name) or run.path.name.startswith(name)):
                raise error
        names = [manifest.model.name for _, manifest in self.runs]
        raise UsageError(
            f"No run named {name!r} below {self.results}.{closest(name, names)}",
            (not names and runs_elsewhere(self.results))
            or "`kd-bench runs list` shows what is there.",
        )

    def _best(
        self, name: str, fits: list[Listed], common: Counter[str], like: RunManifest | None
    ) -> Run:
        best = max(fits, key=lambda each: _standing(each, common, like))
        if hidden := self._hidden_by(name, best):
            raise hidden[1]
        return best[0]

    def _hidden_by(self, name: str, best: Listed) -> tuple[Run, KdBenchError] | None:
        """A damaged run of this name that is not older than what would stand in its place."""
        for run, error in self.damaged:
            if _is_of(run, name) and run.path.name[:8] >= best[0].path.name[:8]:
                return run, error
        return None


def blank_runs(
    chosen: Sequence[Listed], there: Catalogue | None = None
) -> tuple[dict[Path, Run], list[str]]:
    """`Catalogue.blank_of` each run, by the run's folder, and a line for each that is missed.

    A run lacks one where another seed of its method has one, or where one is there that is of
    something else.

    Args:
        there: the store of all of them; None looks each run's own up.
    """
    stores = {} if there else {s: catalogue(s) for s in {run.path.parents[1] for run, _ in chosen}}
    found: dict[Path, Run] = {}
    notes = []
    for run, manifest in chosen:
        blank, reason = (there or stores[run.path.parents[1]]).blank_of(run, manifest)
        if blank is not None:
            found[run.path] = blank
        notes += [reason] if reason else []
    models = {run.path: manifest.model for run, manifest in chosen}
    told = {(models[path].method, models[path].role) for path in found if models[path].method}
    for run, manifest in chosen:
        model = manifest.model
        asked = (model.method, model.role) in told and not manifest.protocol.images
        if asked and run.path not in found:
            notes.append(
                f"{model.name} ({run.path.name}) has no run with blank images and other seeds of "
                f"{model.method} have: no sight over all of them."
            )
    return found, notes


def catalogue(results: Path) -> Catalogue:
    """Read every manifest below `results`; what was evaluated and has lost its own is damaged."""
    runs: list[Listed] = []
    damaged: list[tuple[Run, KdBenchError]] = []
    for folder in sorted((results / "runs").glob("*/")):
        run = Run(folder)
        try:
            runs.append((run, run.manifest))
        except KdBenchError as error:
            # Without a manifest it is a run only if something was committed.
            if (folder / "manifest.json").exists() or any((folder / "tasks").glob("*.json")):
                damaged.append((run, error))
    runs.sort(key=lambda each: (each[1].created, each[0].path.name))
    return Catalogue(results, tuple(runs), tuple(damaged))


def _what_differs(one: Identity, other: Identity) -> str:
    """The first thing in which two identities differ."""
    if one.weights != other.weights:
        return "of another checkpoint"
    for part in fields(one.protocol):
        pair = [getattr(each.protocol, part.name) for each in (one, other)]
        if pair[0] != pair[1] and part.name != "batch_size":
            return f"of another {part.name.replace('_', ' ')}"
    if one.setup != other.setup:
        return "of another configuration, tokenizer or processor"
    return "of other data or prompts"


def runs_elsewhere(results: Path) -> str:
    """What to type for other stores around a store without runs; empty where there are none."""
    found = {
        manifest.parents[2]
        for start in (results, Path())
        for pattern in ("runs/*", "*/runs/*", "*/*/runs/*")
        for manifest in start.glob(f"{pattern}/manifest.json")
    }
    other = [f"{path} (--results {path})" for path in sorted(found - {results})[:3]]
    return f"There are runs in {', '.join(other)}." if other else ""


def _is_of(run: Run, name: str) -> bool:
    """Whether a folder is named after this model."""
    return run.path.name[9:].rsplit("-", 2)[0] == slug(name)


def _common(groups: Iterable[Sequence[Listed]]) -> Counter[str]:
    """How many groups have a finished run under each protocol."""
    return Counter(
        conditions
        for members in groups
        for conditions in {m.identity.conditions for _, m in members if m.status == "complete"}
    )


def _standing(listed: Listed, common: Counter[str], like: RunManifest | None) -> tuple[object, ...]:
    """The larger, the sooner a run is what its model's name means."""
    run, manifest = listed
    finished = {"complete": 2, "unhealthy": 1}.get(manifest.status, 0)
    alike = like is not None and manifest.identity.conditions == like.identity.conditions
    whole = not missing_tasks(run, manifest)
    return (
        manifest.protocol.images == (like.protocol.images if like else ""),
        finished,
        alike,
        manifest.protocol.limit is None,
        whole,
        common[manifest.identity.conditions],
        manifest.created,
        run.path.name,
    )


# --- what a run lacks -----------------------------------------------------------------------------


def suite_tasks(manifest: RunManifest) -> list[str]:
    """All benchmarks of the run's suite; its own where the suite is not known."""
    if manifest.suite_tasks:
        return manifest.suite_tasks
    suite = manifest.protocol.suite
    known = suite in registry.suite_names() and not manifest.verified
    return registry.load_suite(suite).tasks if known else manifest.tasks


def missing_tasks(run: Run, manifest: RunManifest) -> list[str]:
    """Benchmarks of the suite that the run has not finished."""
    done = run.done_tasks(manifest)
    return [task for task in suite_tasks(manifest) if task not in done]


def shortcomings(run: Run, manifest: RunManifest | None = None) -> list[str]:
    """Why a run does not stand for its model; empty for a complete, unlimited, whole one."""
    manifest = manifest or run.manifest
    found = []
    suite = suite_tasks(manifest)
    missing = missing_tasks(run, manifest)
    if manifest.protocol.images:
        found.append(f"its images are {manifest.protocol.images}: what it reached was guessed")
    if manifest.status == "unhealthy":
        found.append("unhealthy: " + ("; ".join(manifest.notes) or "answers failed"))
    elif manifest.status != "complete":
        word = "not finished" if manifest.status == "running" else manifest.status
        done = len(run.done_tasks(manifest))
        found.append(f"{word}: {done} of {len(manifest.tasks)} benchmarks done")
    if manifest.protocol.limit is not None:
        found.append(f"limited to {manifest.protocol.limit} documents a benchmark")
    if missing and manifest.status in ("complete", "unhealthy"):
        found.append(f"{len(suite) - len(missing)} of the suite's {len(suite)} benchmarks")
    return found


def _blind(run: Run, manifest: RunManifest) -> str:
    return f"{run.path.name} is not shown: {'; '.join(shortcomings(run, manifest))}"


def _why_not(listed: Listed, best: Listed) -> str:
    run, manifest = listed
    name = manifest.model.name
    reasons = shortcomings(run, manifest)
    if reasons and not shortcomings(*best):
        return f"{run.path.name} of {name} is not shown: {'; '.join(reasons)}"
    if manifest.identity.conditions != best[1].identity.conditions:
        return f"{run.path.name} of {name} is not shown: another protocol than {best[0].path.name}"
    return f"{run.path.name}: a newer run of {name} is shown"


def cautions(run: Run) -> list[str]:
    """What to know before a run is compared: its limit, missing digests, newer runs not meant."""
    manifest = run.manifest
    name = f"{manifest.model.name} ({run.path.name})"
    found = []
    if manifest.protocol.limit is not None:
        extent = manifest.extent(*(run.result(task) for task in run.done_tasks(manifest)))
        limit = manifest.protocol.limit
        found.append(f"{name} is limited to {limit} documents a benchmark: {extent or 'all'}.")
    if not manifest.verified:
        found.append(f"{name} is not verified by digests: it is from before there were any.")
    for other, its in catalogue(run.path.parents[1]).runs:
        newer = its.created >= manifest.created and other.path.name != run.path.name
        meant = not its.protocol.images or bool(manifest.protocol.images)  # else: `blank_of`
        if newer and meant and its.model.name == manifest.model.name:
            why = "; ".join(shortcomings(other, its)) or "another protocol"
            found.append(f"{its.model.name}: the newer run {other.path.name} is not used: {why}.")
    return found


# --- looking up -----------------------------------------------------------------------------------


def list_runs(results: Path) -> list[Run]:
    """All runs below `results`, oldest first.

    Raises:
        IncompleteRunError: a manifest is damaged.
    """
    found = catalogue(results)
    for _, error in found.damaged:
        raise error
    return [run for run, _ in found.runs]


def find_run(results: Path, name: str, like: Run | None = None) -> Run:
    """`Catalogue.find` for one name."""
    return find_runs(results, [name], like)[0]


def find_runs(results: Path, names: Sequence[str], like: Run | None = None) -> list[Run]:
    """`Catalogue.find`; see there."""
    return catalogue(results).find(names, like.manifest if like else None)


# --- baselines ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Baseline:
    """What a name in `baselines.yaml` stands for.

    Attributes:
        run: the folder's name.
        identity: digest of what it measured when it was set; empty in older files.
        allowed: what it lacked then and was allowed to.
    """

    run: str
    identity: str = ""
    allowed: tuple[str, ...] = ()


def set_baseline(
    results: Path,
    name: str,
    run: Run,
    *,
    allow_limited: bool = False,
    allow_subset: bool = False,
    allow_unhealthy: bool = False,
) -> None:
    """Name a run as baseline. The only thing that moves one. What was allowed is written down.

    Raises:
        UsageError: the run's images were taken away.
        IncompleteRunError: the run is not finished, or is unhealthy, limited or of a part of its
            suite and that was not allowed; or a file of it is damaged.
    """
    from kd_bench.config import dump_yaml

    manifest = run.manifest
    allowed = []
    status = manifest.status
    if manifest.protocol.images:
        raise UsageError(
            f"Run {run.path.name} is no baseline: its images are {manifest.protocol.images}.",
            "Choose the model's run that sees its images.",
        )
    if status not in ("complete", "unhealthy"):
        raise IncompleteRunError(
            f"Run {run.path.name} is {status}; a baseline must be complete and healthy.",
            "Finish it with the same eval command, or choose another run.",
        )
    limit = manifest.protocol.limit
    missing = missing_tasks(run, manifest)
    for lacks, option, allows in (
        (status == "unhealthy" and "unhealthy", "--allow-unhealthy", allow_unhealthy),
        (limit is not None and f"limited to {limit} documents", "--allow-limited", allow_limited),
        (missing and f"without {', '.join(missing)}", "--allow-subset", allow_subset),
    ):
        if lacks and not allows:
            raise IncompleteRunError(
                f"Run {run.path.name} is {lacks}; a baseline is a complete, healthy, unlimited "
                "run of its whole suite.",
                f"Choose another run, or pass {option}: it is written down.",
            )
        allowed += [lacks] if lacks else []
    run.results()  # a damaged one is refused
    entry = {"run": run.path.name, "identity": manifest.identity.digest}
    named = _read_baselines(results)
    named[name] = {**entry, "allowed": allowed} if allowed else entry
    write_text(results / "baselines.yaml", dump_yaml(dict(sorted(named.items()))))
    move = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "name": name,
        "run": entry["run"],
    }
    with (results / MOVES).open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(move, ensure_ascii=False) + "\n")


def baseline_moves(results: Path) -> list[tuple[datetime, str, str]]:
    """(when, baseline, run folder) of every time that a baseline was set, oldest first.

    Stores from before moves were written down have none; a torn line is passed over.
    """
    path = results / MOVES
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    found = []
    for line in lines:
        with suppress(ValueError, KeyError, TypeError):
            move = json.loads(line)
            when = datetime.fromisoformat(move["time"])
            when = when if when.tzinfo else when.replace(tzinfo=UTC)
            found.append((when, str(move["name"]), str(move["run"])))
    return sorted(found, key=lambda each: each[0])


def baseline_run(results: Path, name: str) -> Run:
    """The run that a baseline name stands for.

    Raises:
        UsageError: no baseline has that name, or its run is gone.
        IncompleteRunError: the run measured something else than when it was set.
    """
    named = baselines(results)
    path = results / "baselines.yaml"
    if name not in named:
        raise UsageError(
            f"No baseline named {name!r} in {path}.{closest(name, list(named))}",
            "Set one with `kd-bench runs baseline set NAME RUN`, or pass --against RUN.",
        )
    entry = named[name]
    if entry.run in (".", "..") or "/" in entry.run or "\0" in entry.run:
        raise UsageError(
            f"{path}: {name} stands for {entry.run!r}, which is no folder in {results / 'runs'}.",
            f"`kd-bench runs baseline set {name} RUN` sets it anew.",
        )
    run = Run(results / "runs" / entry.run)
    if not exists(run.path):
        raise UsageError(
            f"The baseline {name!r} stands for {entry.run}, which is not there.",
            f"Restore the run, or `kd-bench runs baseline set {name} RUN`.",
        )
    if entry.identity and run.manifest.identity.digest != entry.identity:
        raise IncompleteRunError(
            f"The baseline {name!r} ({entry.run}) measured something else when it was set.",
            f"Look at it, then set it anew: `kd-bench runs baseline set {name} RUN`.",
        )
    return run


def baselines(results: Path) -> dict[str, Baseline]:
    """What the names in `baselines.yaml` stand for.

    Raises:
        UsageError: their file cannot be read.
    """
    found = {}
    for name, value in _read_baselines(results).items():
        told = value if isinstance(value, dict) else {"run": value}
        allowed = told.get("allowed") or []
        if not isinstance(allowed, list) or not told.get("run"):
            raise UsageError(
                f"{results / 'baselines.yaml'}: {name} names no run.",
                f"`kd-bench runs baseline set {name} RUN` sets it anew.",
            )
        found[name] = Baseline(
            str(told["run"]), str(told.get("identity") or ""), tuple(map(str, allowed))
        )
    return found


def _read_baselines(results: Path) -> dict[str, object]:
    from kd_bench.config import read_yaml

    path = results / "baselines.yaml"
    return {str(key): value for key, value in read_yaml(path).items()} if path.exists() else {}


def exists(path: Path) -> bool:
    """Whether something is there; no name that cannot be one is an error."""
    try:
        return path.exists()
    except OSError:  # a name too long for a file
        return False
