"""Several processes on one piece of work, as `torchrun` starts them; in a single process every function here does nothing.

    torchrun --standalone --nnodes=1 --nproc-per-node=4 -m whence fit ...

All processes run the same program. Each works on its share of the examples; what they add up, decide or raise they
exchange here, in calls that all of them make in the same order. The first process (rank 0) alone writes files, decides
what is decided once, and talks. Which process this is, the environment says; the processes get in touch when they first
have something to exchange.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import os
import pickle
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, ParamSpec, TypeVar

from whence.errors import UsageError, WhenceError
from whence.parcels import kinds_of, pack, parcels_of, unpack
from whence.shortage import is_out_of_memory

if TYPE_CHECKING:
    import torch
    from torch import Tensor

P = ParamSpec("P")
T = TypeVar("T")

PLACE = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun puts into the environment of a process; with one of them missing it is on its own."""

DAYS = 30
"""How long a process waits for another one that is alive: longer than any stage takes. A dead one is noticed at once."""

LEAVING = 60.0
"""Seconds in which the others are gone once all are done."""

PATIENCE = 5.0
"""Seconds in which the first process says why it failed before another one says it instead."""

SEVERAL = "fit, score, self-influence, trace, mirror and the retraining of a run"
"""What is shared out over the processes."""


def rank() -> int:
    """The number of this process, from 0."""
    return int(os.environ["RANK"]) if world() > 1 else 0


def world() -> int:
    """How many processes work together."""
    return int(os.environ["WORLD_SIZE"]) if all(os.environ.get(name) for name in PLACE) else 1


def device() -> torch.device:
    """The device of this process where the user names none: its GPU if there are GPUs, each process taking the next."""
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", _local_rank() % torch.cuda.device_count()) if world() > 1 else torch.device("cuda")


def share(items: Sequence[T]) -> Sequence[T]:
    """What falls to this process: every so-many-th item, so that all get about the same where the items are sorted."""
    return items[rank() :: world()]


def only_one_process(what: str) -> None:
    """Refuse to do `what` ("whence generate") in several processes."""
    if world() > 1:
        raise UsageError(
            f"{what} runs in one process.",
            given=f"{world()} processes (torchrun)",
            accepted=f"one process; {SEVERAL} share their work out",
            fix="the same command without torchrun",
        )


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Work in which this process is the only one, for all that is called: also libraries that read the environment."""
    kept = {name: os.environ.pop(name) for name in (*PLACE, "LOCAL_RANK", "LOCAL_WORLD_SIZE") if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def on_first(work: Callable[P, T], *arguments: P.args, **options: P.kwargs) -> T:
    """Let the first process do the work, alone, while the others wait; all get what it returns, or raise what it raised.

    It begins when all are here, so it may write over or delete what they read before. The result goes to the others
    pickled.
    """
    if world() == 1:
        return work(*arguments, **options)
    barrier()  # a broadcast alone would not wait for those that receive it
    value, error = None, None
    if rank() == 0:
        with alone():
            try:
                value = work(*arguments, **options)
            except Exception as raised:
                error = raised
    sent = _from_first_pickled((None, _portable(error)) if error else (value, None))
    if rank() > 0:
        value, error = sent
    if error is not None:
        raise error
    return value  # type: ignore[return-value]


def from_first(value: T) -> T:
    """The value that the first process has."""
    return value if world() == 1 else _from_first_pickled(value)


def from_all(value: T) -> list[T]:
    """The value of every process, the first's first."""
    if world() == 1:
        return [value]
    values: list[Any] = [None] * world()
    with _exchange() as (api, group):
        api.all_gather_object(values, value, group=group)
    return values


def names_of_all(names: Iterable[str]) -> list[str]:
    """The names that any process has, each once."""
    return list(dict.fromkeys(name for own in from_all(list(names)) for name in own))


def barrier() -> None:
    """Wait until all processes are here."""
    from_all(None)


@contextlib.contextmanager
def agreeing() -> Iterator[None]:
    """Work without exchanges, each process on its own; where one raises, all raise its error when they are done."""
    if world() == 1:
        yield
        return
    error = None
    try:
        yield
    except Exception as raised:
        error = raised
    for number, found in enumerate(from_all(_portable(error))):
        if found is not None:
            raise error if error is not None and number == rank() else found


def add_up(sums: Mapping[str, Tensor], owner: Callable[[str], int | None] = lambda name: None) -> dict[str, Tensor]:
    """Sums over all processes, by name, where a process may lack some; only process `owner(name)` gets it, or (None) all do.

    The order of a name's summands is the same every time. The tensors given are used up.
    """
    if world() == 1:
        return dict(sums)
    _refuse_one_gpu_for_all(sums)
    kinds = {name: kind for found in from_all(kinds_of(sums)) for name, kind in found.items()}
    owners = {name: owner(name) for name in kinds}
    total: dict[str, Tensor] = {}
    with _exchange() as (api, group):
        for parcel in parcels_of(kinds, owners):
            target = owners[parcel[0]]
            packed = pack(parcel, sums, kinds)
            if target is None:
                api.all_reduce(packed, group=group)
            else:
                api.reduce(packed, dst=target, group=group)
            if target in (None, rank()):
                total |= unpack(packed, parcel, kinds)
    return total


def to_all(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors that the first process has, on every process."""
    if world() == 1:
        return dict(tensors)
    _refuse_one_gpu_for_all(tensors)
    kinds = from_first(kinds_of(tensors))
    shared: dict[str, Tensor] = {}
    with _exchange() as (api, group):
        for parcel in parcels_of(kinds):
            packed = pack(parcel, tensors if rank() == 0 else {}, kinds)
            api.broadcast(packed, src=0, group=group)
            shared |= unpack(packed, parcel, kinds)
    return shared


def to_first(tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The tensors of every process, one dictionary each, on the first (in its host's memory); nothing on the others."""
    if world() == 1:
        return [dict(tensors)]
    mine = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    kinds = from_all(kinds_of(mine))
    received = [mine]
    with _exchange() as (api, group):
        if rank() > 0:
            for parcel in parcels_of(kinds[rank()]):
                api.send(pack(parcel, mine, kinds[rank()]), dst=0, group=group)
            return []
        for number in range(1, world()):
            received.append({})
            for parcel in parcels_of(kinds[number]):
                packed = pack(parcel, {}, kinds[number])
                api.recv(packed, src=number, group=group)
                received[number] |= unpack(packed, parcel, kinds[number])
    return received


def merged(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of all processes, whose names differ or whose tensors don't, on the first; nothing on the others."""
    if world() == 1:
        return dict(tensors)
    return {name: tensor for part in to_first(tensors) for name, tensor in part.items()}


class _State:
    """What this process has opened: the group to exchange in, and the store that outlives its members."""

    started = failed = False
    group: Any = None
    store: Any = None
    checked = False


def start() -> None:
    """Get in touch with the other processes, if that is not done; afterwards "cuda" means this process's GPU."""
    if _State.started or world() == 1:
        return
    import torch
    import torch.distributed as api
    from torch.distributed.rendezvous import rendezvous

    here = device()
    if here.type == "cuda":
        torch.cuda.set_device(here)
    forever = datetime.timedelta(days=DAYS)
    if api.is_initialized():  # by the user's own program
        _State.group = api.new_group(backend=_backend(), timeout=forever)
    else:
        _State.store, number, count = next(rendezvous("env://", timeout=forever))
        api.init_process_group(_backend(), store=_State.store, rank=number, world_size=count, timeout=forever)
        atexit.register(_stop_at_exit)
    _State.started = True


def stop() -> None:
    """Let go of the other processes."""
    if not _State.started:
        return
    import torch.distributed as api

    if _State.group is None and api.is_initialized():
        api.destroy_process_group()
    _State.started, _State.group, _State.checked = False, None, False


def _stop_at_exit() -> None:
    """Let go of the others, unless this process fails: NCCL lets go when all do, and the others may wait for this one.

    Without that torch gives up the connections when the process ends, and then the others notice.
    """
    if not _State.failed and not hasattr(sys, "last_value"):
        stop()


def fail() -> None:
    """Note that this process fails; the first, which has said why, lets the others know."""
    _State.failed = True
    if rank() == 0:
        with contextlib.suppress(RuntimeError):
            _State.store.set("whence-failed", "1")


def first_failed() -> bool:
    """Whether the first process fails too, and has said why; it gets a moment to do so, unless this one is told to end."""
    end = time.monotonic() + PATIENCE
    try:
        while not (failed := _State.store.check(["whence-failed"])) and time.monotonic() < end:
            time.sleep(0.05)
    except (RuntimeError, WhenceError):  # the store ended with the first process, or somebody stopped waiting for this one
        return False
    return failed


def leave() -> None:
    """Wait until all processes are done; one that fails says so itself. The first, whose store the others use, goes last.

    One that takes its connections down while others take down theirs can abort them.
    """
    with contextlib.suppress(WhenceError, RuntimeError):
        barrier()
        if _State.store is not None and world() > 1:
            if rank() > 0:
                stop()
                _State.store.set(f"whence-left-{rank()}", "1")
            else:
                _State.store.wait(
                    [f"whence-left-{number}" for number in range(1, world())], datetime.timedelta(seconds=LEAVING)
                )
    stop()


def end(program: Callable[[], None]) -> NoReturn:
    """Run the program of one of several processes, and end with its exit code as soon as it is done.

    What libraries still have alive then, such as threads of a group that was not left because the program failed, is not
    taken down piece by piece, which can abort the process: the system closes what is open, and the others notice.
    """
    status = 0
    try:
        program()
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
        if isinstance(ended.code, str):
            sys.stderr.write(f"{ended.code}\n")
    except BaseException:
        traceback.print_exc()
        status = 1
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(status)


def _backend() -> str:
    """NCCL between GPUs, Gloo between processes of the CPU or of one GPU."""
    import torch

    apart = torch.cuda.is_available() and torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", world()))
    return "cpu:gloo,cuda:nccl" if apart else "gloo"


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", rank()))


@contextlib.contextmanager
def _exchange() -> Iterator[tuple[Any, Any]]:
    """The library and the group to exchange with; an exchange that fails says that another process ended."""
    start()
    import torch.distributed as api

    try:
        yield api, _State.group
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise  # this one's own
        raise WhenceError(
            "Another process of this run ended, so this one can't continue.",
            given=str(error).splitlines()[0],
            fix="see what that process printed, if anything; the same command resumes from what was saved",
        ) from error


def _from_first_pickled(value: Any) -> Any:
    box = [value]
    with _exchange() as (api, group):
        api.broadcast_object_list(box, src=0, group=group)
    return box[0]


def _refuse_one_gpu_for_all(tensors: Mapping[str, Tensor]) -> None:
    """Raise UsageError where two processes put their tensors on one GPU though each could have its own: NCCL would hang."""
    if _State.checked or "nccl" not in _backend():
        return
    gpus = {tensor.device.index for tensor in tensors.values() if tensor.device.type == "cuda"}
    used = [(node, gpu) for node, gpus in from_all((os.environ.get("GROUP_RANK"), sorted(gpus))) for gpu in gpus]
    _State.checked = bool(used)
    if len(used) > len(set(used)):
        raise UsageError(
            "Two processes work on the same GPU",
            given=f"cuda:{used[0][1]} for {world()} processes",
            accepted="a GPU for each process",
            fix="omit --device (Python: load the model onto whence.dist.device())",
        )


def _portable(error: Exception | None) -> Exception | None:
    """The error in a form that another process can raise."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error
