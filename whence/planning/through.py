"""What scoring through several trainings will take: a plan for each, and what they hold at the same time."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any

from whence.planning.plan import Plan, duration, has_room, room
from whence.show.numbers import size

FITTED = ("covariance", "eigenvectors", "eigenvalues")


@dataclass(frozen=True)
class StagedPlan:
    """A plan for each training, oldest first; the last one's rows are fitted and scored first, as `multistage` does."""

    plans: Mapping[str, Plan]

    @classmethod
    def of(cls, plans: Mapping[str, Plan], fitted: Collection[str] = ()) -> StagedPlan:
        """Plans of single trainings, with what the others hold meanwhile: all models, and the factors of later trainings.

        `fitted` are the trainings whose factors are there already. Queries are transported through each later training.
        """
        models, later, passing = sum(plan.model["bytes"] for plan in plans.values()), 0, 0.0
        together = {}
        for name, plan in reversed(list(plans.items())):
            stages = tuple(
                replace(
                    stage,
                    memory=replace(stage.memory, tensors=stage.memory.tensors + later),
                    seconds=stage.seconds + passing * (stage.name == "queries"),
                )
                for stage in plan.stages
                if name not in fitted or stage.name not in FITTED
            )
            peak = plan.disk_peak if name not in fitted else sum(stage.disk for stage in stages)
            together[name] = replace(plan, model=plan.model | {"bytes": models}, stages=stages, disk_peak=peak)
            later += plan.factors
            passing += plan.passing
        return cls({name: together[name] for name in plans})

    @property
    def memory(self) -> int:
        """Bytes at the highest peak."""
        return max(plan.memory for plan in self.plans.values())

    @property
    def seconds(self) -> float:
        """Of everything."""
        return sum(plan.seconds for plan in self.plans.values())

    @property
    def disk(self) -> int:
        """Bytes of the files that are left."""
        return sum(plan.disk for plan in self.plans.values())

    @property
    def disk_peak(self) -> int:
        """Bytes of files on the way."""
        return self.disk + max(plan.disk_peak - plan.disk for plan in self.plans.values())

    @property
    def fits(self) -> bool:
        """Whether memory and disk suffice."""
        return has_room(self._last.free, self.memory, self.disk_peak)

    @property
    def _last(self) -> Plan:
        return list(self.plans.values())[-1]

    def to_dict(self) -> dict[str, Any]:
        """Plain values: seconds and bytes; `stages` are the trainings."""
        total = {"seconds": self.seconds, "memory": self.memory, "disk": self.disk, "disk_peak": self.disk_peak}
        return {"stages": {name: plan.to_dict() for name, plan in self.plans.items()}, **total, "fits": self.fits}

    def heading(self) -> list[str]:
        """What is planned for."""
        return [line for name, plan in self.plans.items() for line in (f"stage    {name}", *plan.heading())]

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """The table of all trainings; in the last row whether it fits."""
        found = []
        for name, plan in self.plans.items():
            found += [(f"{name} {stage}", *rest) for stage, *rest in plan.rows()[:-1]]
        low, high = self._last.range(self.seconds)
        total = f"{duration(self.seconds)} ({duration(low)} to {duration(high)})"
        verdict = f"{'fits' if self.fits else 'does NOT fit'} in {room(self._last.free)}"
        return [*found, ("total", total, size(self.memory), size(self.disk), verdict)]

    def footing(self) -> list[str]:
        """What to know about the figures."""
        first, *_ = self._last.footing()
        return [
            first,
            "The models of all stages are in memory together, and while a stage is scored, the factors of later ones, too.",
            "Queries are timed through the transport of each later stage. A new head or adapters cost one more pass over their"
            " stage's rows, forwards once and back once for each query, which is not in the time.",
        ]

    def why(self) -> list[str]:
        """How each kind of module is computed, for the last training."""
        return self._last.why()
