"""What a stage of training does to gradients at its end on the way to its beginning: head, then trunk.

| trunk | new modules | operator |
|---|---|---|
| moved | none | the transport |
| frozen | a head, or adapters | cross term: exact |
| moved | a head | transport after cross term: the Schur complement is taken for the trunk's own curvature |
| moved, curvature formed of both | a head | flow, or a proximal step, of both together: exact |

A trunk is frozen where its weights are those of the stage before, or where nothing in it requires a gradient.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from whence.fitting.curvature import Curvature
from whence.methods.cg import CAUTION
from whence.methods.damping import Damped, Damping
from whence.operators import BlockDiagonal, Operator, Spectral
from whence.progress import note
from whence.stages.heads import CrossTerm, Held
from whence.stages.names import PASSES, Module
from whence.stages.stage import Stage
from whence.stages.transport import Beside, course_of, transport


def passage(
    stage: Stage, curvature: BlockDiagonal | Spectral, modules: Sequence[Module], damped: Damped, **saving: Any
) -> Operator:
    """The stage's transport, behind the cross term of what it began anew; `damped` is its inverse's where nothing is known.

    `saving` is where the head's solution is kept meanwhile (`out`). Raises what `transport` does.
    """
    own = [each for each in modules if each.stage == stage.name and each.name]
    trunk, frozen, head = (
        tuple(each.name for each in own if each.name and each.status in statuses)
        for statuses in (PASSES, ("frozen",), ("new",))
    )
    if stage.head == "none" or not head or isinstance(stage.transport, Operator):
        return transport(stage, _only(curvature, trunk), frozen)
    moved = tuple(name for name in curvature.names if name in trunk and name not in frozen)
    if moved and isinstance(curvature, Spectral) and set(head) <= set(curvature.names):
        if stage.transport == "flow":
            return transport(stage, _only(curvature, (*moved, *head)), frozen)
        if stage.transport == "proximal":
            joint = curvature.only((*moved, *head))
            held = Held(joint, moved, course_of(stage, joint.names), f"proximal of trunk and head through {stage.name}")
            return Beside(held, frozen) if frozen else held
    if moved and stage.transport != "identity":
        note(f"{stage.name}: trunk and head moved, the trunk as if the head had stood still (curvature='hessian' for both)")
    damping, near = _damping(stage, curvature, head, damped)
    cross = CrossTerm(stage.point.passing(frozen), trunk, head, damping, near=near, **saving)
    return transport(stage, _only(curvature, trunk), frozen) @ cross


def _only(curvature: BlockDiagonal | Spectral, names: Sequence[str]) -> BlockDiagonal | Spectral:
    chosen = [name for name in curvature.names if name in names]
    if isinstance(curvature, Spectral) and chosen:
        return curvature.only(chosen)
    blocks = curvature.blocks if isinstance(curvature, BlockDiagonal) else {}
    return BlockDiagonal({name: blocks[name] for name in chosen}, curvature.label)


def _damping(
    stage: Stage, curvature: BlockDiagonal | Spectral, head: tuple[str, ...], damped: Damped
) -> tuple[Damping, Operator | None]:
    """The head's, and where its factors are known, what is near its damped inverse."""
    damping = damping_of_head(stage, head, damped)
    if not isinstance(curvature, BlockDiagonal) or not set(head) <= set(curvature.names):
        return damping, None
    factors = Curvature(BlockDiagonal({name: curvature.blocks[name] for name in head}, curvature.label), {})
    damping = damping.at(lambda: factors.mean_eigenvalue)
    return damping, damping.times(CAUTION).inverse(factors)


def damping_of_head(stage: Stage, head: tuple[str, ...], damped: Damped) -> Damping:
    """What kept a head from its optimum: weight decay, and that its training ended, 1 / sum of learning rates.

    A damping that the stage was given goes before; `damped` is for where there is neither.
    """
    if stage.absolute_damping is not None:
        return Damping(stage.absolute_damping, head)
    if isinstance(stage.damping, float | int) or (stage.training is None and stage.rates is None):
        return Damping(damped.relative, head, relative=True)
    course = course_of(replace(stage, transport="flow"), head)  # a proximal step holds the trunk, not the head
    return Damping(course.loss_scale * (1 / course.rates + course.weight_decay), head, course.metric)
