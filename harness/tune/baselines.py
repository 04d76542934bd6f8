"""What the search is compared with on the same answers: chance, a rule of thumb, and Optuna's TPE."""

from __future__ import annotations

import importlib.util
import random
import warnings
from collections.abc import Callable, Sequence
from typing import Any

from harness.tune.asked import Ask, Result, Told
from harness.tune.space import Candidate, Space

Measure = Callable[[Ask], Result]
Policy = Callable[[Space, Measure, int, int, int], list[Told]]
"""Space, measure, steps of a run, most runs, seed -> what was measured."""


def at_random(space: Space, measure: Measure, steps: int, most_runs: int, seed: int) -> list[Told]:
    """Any candidates, each once."""
    chosen = random.Random(seed).sample(space.candidates, min(most_runs, len(space.candidates)))
    return [_run(one, measure, steps) for one in chosen]


def largest_micro_batch(space: Space, measure: Measure, steps: int, most_runs: int, seed: int) -> list[Told]:
    """Each engine as it comes (the first value of every knob) with the largest micro-batch, then smaller ones until it fits."""
    told: list[Told] = []
    for engine, expected in space.expected.items():
        plain = {knob: searched.values[0] for knob, searched in expected.items() if knob != "micro_batch"}
        alike = [
            one for one in space.candidates if one.engine == engine and {**one.values, "micro_batch": 0} == {**plain, "micro_batch": 0}
        ]
        for one in sorted(alike, key=lambda one: -one.facts.largest):
            if len(told) == most_runs:
                return told
            told.append(_run(one, measure, steps))
            if told[-1][1].outcome == "ok":
                break
    return told


def has_optuna() -> bool:
    """Whether Optuna can be compared with."""
    return importlib.util.find_spec("optuna") is not None


def optuna_tpe(space: Space, measure: Measure, steps: int, most_runs: int, seed: int) -> list[Told]:
    """Optuna's TPE, three trials at random first, running out of memory as a violated constraint."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # its newest version has another name for constraints, its older ones have not
        sampler = optuna.samplers.TPESampler(n_startup_trials=3, seed=seed, constraints_func=lambda trial: trial.user_attrs["violation"])
    study = optuna.create_study(sampler=sampler)
    by_choice = {(one.engine, one.choices): one for one in space.candidates}
    told: list[Told] = []
    for _ in range(20 * most_runs):  # combinations that no engine has cost a trial, but no run
        if len(told) == most_runs:
            break
        trial = study.ask()
        one = _suggested(trial, space, by_choice)
        if one is None or one in {ask.candidate for ask, _ in told}:
            known = next((result for ask, result in told if one is not None and ask.candidate == one), None)
        else:
            told.append(_run(one, measure, steps))
            known = told[-1][1]
        fits = known is not None and known.outcome == "ok"
        trial.set_user_attr("violation", (0.0,) if fits else (1.0,))
        study.tell(trial, known.step_seconds if fits and known is not None else 1e6)
    return told


def _suggested(trial: Any, space: Space, by_choice: dict[Any, Candidate]) -> Candidate | None:
    engine = trial.suggest_categorical("engine", sorted(space.expected))
    choices = []
    for knob in space.expected[engine]:
        values = sorted({dict(one.choices)[knob] for one in space.candidates if one.engine == engine})
        choices.append((knob, str(trial.suggest_categorical(f"{engine}:{knob}", values))))
    return by_choice.get((engine, tuple(choices)))


def _run(one: Candidate, measure: Measure, steps: int) -> Told:
    ask = Ask(candidate=one, steps=steps)
    return ask, measure(ask)


POLICIES: Sequence[tuple[str, Policy, bool]] = (
    ("random", at_random, True),
    ("largest micro-batch that fits", largest_micro_batch, False),
    ("Optuna TPE", optuna_tpe, True),
)
"""Name, policy, and whether it depends on the seed."""
