"""A search on this machine: its questions become cells of the sweep machinery, recorded like any others, and so it resumes by itself."""

from __future__ import annotations

import secrets
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

from rich.console import Console

from harness.adapters import adapter_folder, drop_adapter
from harness.anchors import REFERENCE_ENGINE, REFERENCE_KNOBS
from harness.best import RESULTS
from harness.config import Settings, request
from harness.data.tokens import TokenFile
from harness.endings import TREE
from harness.engine import Machine
from harness.errors import ConfigError
from harness.machine import detect
from harness.places import Prepared
from harness.plan import Planned, plan
from harness.progress import sweep_progress
from harness.record import Record
from harness.report.judged import judged
from harness.store import Results, commit_of, load
from harness.sweep import Sweep, prepare_workload, run_one
from harness.tune.asked import Ask, Forecast, Result, Told, View
from harness.tune.budget import Budget, stopped_after, would_stop_again
from harness.tune.entrants import Entrants, Layouts, candidates, config_of_model
from harness.tune.experience import NOTHING, Experience
from harness.tune.lessons import Searching, but_looks_of, experience
from harness.tune.observed import result_of
from harness.tune.scale import capacity_bytes, scale_of
from harness.tune.search import Rules, Search
from harness.tune.space import Candidate
from harness.tune.untried import kind_of, predicted
from harness.tuned import Trial, Tuned, path_of
from harness.verdict import Verdict

RUNGS = (8, 24)


@dataclass(frozen=True, slots=True)
class Looked:
    """A question, the record that answers it, and what was expected before."""

    ask: Ask
    record: Record
    forecast: Forecast


@dataclass
class Runner:
    """Searches for ``entrants`` with the records under ``root``. ``on_view`` sees every state with the seconds spent."""

    entrants: Entrants
    settings: Settings
    console: Console
    budget_seconds: float | None
    on_view: Callable[[View, Sequence[Looked], float], None]
    machine: Machine = field(init=False)
    view: View | None = field(init=False, default=None)
    stopped: str = field(init=False, default="")
    experience: Experience = field(init=False, default=NOTHING)
    looked: list[Looked] = field(default_factory=list)

    def __post_init__(self) -> None:
        config = self.entrants.first
        try:
            self.machine = detect(config.machine.device, memory_cap_gib=config.machine.memory_cap_gib)
        except LookupError as error:
            raise ConfigError(f"{error}; choose machine=cpu or another machine") from error
        self.root = Path(self.settings.runs).expanduser().resolve()
        self._budget = Budget(self.budget_seconds)
        self._committed = load(RESULTS) if self.root != RESULTS else Results((), ())
        self._sitting = secrets.token_hex(4)

    def run(self) -> tuple[Tuned | None, Path]:
        """Search until the policy or the budget ends it; what was found, None where nothing ran, and the file for it."""
        began = time.monotonic()
        self._place = self._prepare()
        workload = self._whole.request.cell.workload
        self._layouts = Layouts(workload, TokenFile.open(Path(self._place.tokens)))
        model = config_of_model(workload, Path(self._place.base))
        space, unable = candidates(self.entrants, self._layouts, self.machine, model)
        if not space.candidates:
            raise ConfigError("\n".join(["no engine can run this:", *self.entrants.left_out, *unable]))
        scale = scale_of(model, workload, sum(path.stat().st_size for path in Path(self._place.base).glob("*.safetensors")))
        steps = workload.train.num_steps
        rules = Rules(planned_steps=steps, rungs=tuple(sorted({min(rung, steps) for rung in RUNGS})))
        search = Searching(workload=workload, machine=self.machine, model=model, space=space, scale=scale)
        earlier = but_looks_of(workload, self._committed.stored, load(self.root).stored)
        self.experience = experience(self.entrants.configs, earlier, search, self._layouts.positions)
        self._policy = Search(space, scale, capacity_bytes(self.machine), rules, self.experience)
        view, self.stopped = self._search(began)
        spent = self._spent(began)
        path = path_of(self.root, self.machine, workload)
        self.view = view
        if view.incumbent is None:
            return None, path
        return self._tuned(view, self.stopped, spent, (*self.entrants.left_out, *unable)), path

    def _prepare(self) -> Prepared:
        """The planned run's own workload: looks at it share its tokens and weights."""
        first = next(iter(self.entrants.configs))
        config = self.entrants.configs[first]
        asked = request(config)
        self._whole = Planned(asked, self.machine, "run", None, None)
        return prepare_workload(self._whole, self._sweep([self._whole]))

    def _sweep(self, planned: Sequence[Planned]) -> Sweep:
        return Sweep(self.root, self.settings, self.console, planned, ())

    def _search(self, began: float) -> tuple[View, str]:
        while True:
            told = self._told()
            view, spent = self._policy.view(told), self._spent(began)
            self.on_view(view, self.looked, spent)
            ask, stopped = (view.next, self._too_late(view.next, view, spent)) if view.next else (None, str(view.stopped))
            if ask is None or stopped:
                ask = self._reference(view, spent)
            if ask is None:
                return view, str(stopped)
            forecast = view.forecasts[ask.candidate]
            allowed = self._budget.allowed(_seconds(forecast, ask), spent, view.incumbent_seconds)
            record = self._measure(ask, allowed)
            self.looked.append(Looked(ask, record, forecast))
            if record.provenance.sweep != self._sitting:
                said = f"  answered by the record of {record.provenance.started_utc[:16]}: {ask.candidate.title}, {ask.steps} steps"
                self.console.print(said, markup=False, highlight=False, soft_wrap=True)

    def _too_late(self, ask: Ask, view: View, spent: float) -> str | None:
        """Why there is no time for ``ask``; None where there is."""
        expected = _seconds(view.forecasts[ask.candidate], ask)
        return self._budget.too_late(expected, spent, num_looked=len(self.looked), ran=view.incumbent is not None)

    def _reference(self, view: View, spent: float) -> Ask | None:
        """The yardstick's look at what the winner was looked at for, so that its losses can be compared; None when there is one, when it
        cannot run here, or when there is no time.
        """
        if view.incumbent is None:
            return None
        alike = [one for one in view.forecasts if _is_yardstick(one) and one not in view.ruled_out]
        steps = max(one.ask.steps for one in self.looked if one.ask.candidate == view.incumbent)
        if any(one.ask.candidate in alike and one.ask.steps == steps for one in self.looked):
            return None
        for one in sorted(alike, key=lambda one: -one.facts.largest):
            ask = Ask(candidate=one, steps=steps)
            return None if self._too_late(ask, view, spent) else ask
        return None

    def _spent(self, began: float) -> float:
        """Wall time of this sitting, and of the records of earlier ones that answered."""
        earlier = [one.record.provenance.wall_seconds for one in self.looked if one.record.provenance.sweep != self._sitting]
        return time.monotonic() - began + sum(earlier)

    def _measure(self, ask: Ask, allowed: float | None) -> Record:
        asked = stopped_after(self.entrants.request(ask.candidate, ask.steps, ask.round), allowed)
        records = [stored.record for stored in load(self.root).stored]
        (cell,) = plan([asked], records, self.settings.rerun)
        mine = [record for record in records if record.cell.key == asked.cell.key and record.machine.key == cell.machine.key]
        if cell.action == "done" or (mine and self.settings.rerun != "all" and would_stop_again(asked, mine[-1])):
            return mine[-1]
        with sweep_progress(self.console, [cell]) as progress:
            progress.begin(cell)
            record = run_one(cell, self._place, self._sweep([cell]), progress, self._sitting)
        sha = record.measurement.artifacts.adapter_sha256 if record.measurement else None
        if sha is not None and self.settings.keep == "none" and adapter_folder(self.root, sha).exists():
            drop_adapter(self.root, sha)
        return record

    def _told(self) -> list[Told]:
        unfit = {key: verdict for key, verdict in self._verdicts().items() if not verdict.can_win}
        told = []
        for one in self.looked:
            verdict = unfit.get(_key(one.record))
            values = {**self.entrants.configs[one.ask.candidate.engine].engine.knobs, **one.ask.candidate.values}
            reason = f"{verdict.label}: {verdict.detail}" if verdict else None
            told.append((one.ask, result_of(one.record, positions=self._layouts.positions(values), unfit=reason)))
        return told

    def _verdicts(self) -> Mapping[tuple[str, str], Verdict]:
        """Of every record that was looked at, against what references there are among all records here; what the same code was found to
        train where every test was made, by the committed records too, bars it here.
        """
        wanted = {_key(one.record) for one in self.looked if one.record.status == "ok"}
        if not wanted:
            return {}
        variants = [variant for group in judged(_together(self._committed, load(self.root))) for variant in group.variants]
        entries = [entry for variant in variants for entry in (*variant.runs, *variant.failures)]
        known = {_key(entry.record): entry.verdict for entry in entries}
        return {key: verdict for key, verdict in known.items() if key in wanted and isinstance(verdict, Verdict)}

    def _tuned(self, view: View, stopped: str, spent: float, left_out: tuple[str, ...]) -> Tuned:
        assert view.incumbent is not None
        assert view.incumbent_seconds is not None
        workload, told = self._whole.request.cell.workload, self._told()
        answers = zip(self.looked, told, strict=True)
        mine = [(one, result) for one, (ask, result) in answers if ask.candidate == view.incumbent and result.outcome == "ok"]
        longest = max(one.ask.steps for one, _ in mine)
        mine = [(one, result) for one, result in mine if one.ask.steps == longest]
        last, result = mine[-1]
        assert result.step_seconds is not None
        verdict = self._verdicts().get(_key(last.record))
        return Tuned(
            machine=self.machine.key,
            memory_cap_gib=self.machine.memory_cap_gib,
            workload=workload.label,
            planned_steps=workload.train.num_steps,
            samples_per_step=workload.train.samples_per_step,
            engine=view.incumbent.engine,
            processes=view.incumbent.processes,
            knobs=view.incumbent.knobs,
            total_seconds=view.incumbent_seconds,
            step_seconds=result.step_seconds,
            startup_seconds=view.forecasts[view.incumbent].startup_seconds,
            peak_bytes=result.peak_bytes,
            parity=f"{verdict.label}; light check: {verdict.light.detail}" if verdict else "not judged",
            bound_seconds=view.bound,
            stopped=stopped,
            spent_seconds=spent,
            budget_seconds=self.budget_seconds,
            num_candidates=len(self._policy.space.candidates),
            ruled_out=dict(Counter(map(kind_of, view.ruled_out.values()))),
            left_out=left_out,
            experience=self.experience.after(view.contradicted),
            tuned_utc=datetime.now(UTC).isoformat(timespec="seconds"),
            commit=commit_of(TREE)[0],
            trials=tuple(self._trial(one, result, view) for one, (_, result) in zip(self.looked, told, strict=True)),
            predicted=predicted(view, {ask.candidate for ask, _ in told}, self._policy.rules.margin),
        )

    def _trial(self, one: Looked, result: Result, view: View) -> Trial:
        ask, step = one.ask, result.step_seconds
        total = None
        if step is not None:
            total = view.forecasts[ask.candidate].startup_seconds + self._policy.rules.planned_steps * step
        return Trial(
            title=ask.candidate.title,
            engine=ask.candidate.engine,
            processes=ask.candidate.processes,
            knobs=ask.candidate.knobs,
            steps=ask.steps,
            status=one.record.status if result.outcome != "unfit" else "unfit",
            reason=result.reason,
            total_seconds=total,
            step_seconds=result.step_seconds,
            startup_seconds=result.startup_seconds,
            peak_bytes=result.peak_bytes,
            predicted_seconds=one.forecast.total_seconds,
            predicted_bytes=one.forecast.memory.middle,
            cell=one.record.cell.key,
        )


def _together(one: Results, other: Results) -> Results:
    """The records of both, oldest first, with what is known of them."""
    stored = sorted((*one.stored, *other.stored), key=lambda entry: (entry.record.provenance.started_utc, entry.path))
    roundings = {**one.roundings, **other.roundings}
    return Results(tuple(stored), (), {**one.updates, **other.updates}, {**one.floors, **other.floors}, roundings=roundings)


def _seconds(forecast: Forecast, ask: Ask) -> float:
    """What a look is expected to take."""
    return forecast.startup_seconds + ask.steps * forecast.step.middle


def _is_yardstick(one: Candidate) -> bool:
    """Whether other candidates are compared with this one; of the knobs that are searched, the others are as its YAML says."""
    return one.engine == REFERENCE_ENGINE and all(one.values.get(knob, values[0]) in values for knob, values in REFERENCE_KNOBS.items())


def _key(record: Record) -> tuple[str, str]:
    return record.cell.key, record.provenance.started_utc
