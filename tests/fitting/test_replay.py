"""The second pass takes over what the first has kept, to the same bits as without."""

import pytest
import torch
from models import CASES, named, small_memory

from whence.engine.stream import Sink
from whence.fitting import fit, replay
from whence.fitting.replay import Recorder
from whence.gradients import Dense, Factored
from whence.progress import Silent, report_to

CHUNKS = {"chunks": 4, "save_every": 1e9}


def counted(model):
    """The model, and a list that grows with every call of it."""
    calls = []
    model.register_forward_pre_hook(lambda *given: calls.append(1))
    return model, calls


def fitted(case, out, *, task=None, **settings):
    """The factors of the data's own labels, and how often the model was called."""
    model, calls = counted(case.model())
    asked = {"modules": "all", "labels": "data", "disjoint": False, **settings}
    return fit(model, task or case.task(), case.train(12), out=out, **asked), len(calls)


def same(found, expected):
    for name, block in expected.blocks.items():
        assert torch.equal(found.blocks[name].lam_OI, block.lam_OI), name
        assert block.q_I is None or torch.equal(found.blocks[name].q_I.dense(), block.q_I.dense())


@pytest.fixture
def room(monkeypatch):
    """Sets how many bytes may be kept."""
    return lambda count: monkeypatch.setattr(Recorder.__init__, "__defaults__", (count,))


@pytest.mark.parametrize("method", ["ekfac", "shampoo"])
@pytest.mark.parametrize("case", named("llama", "mlp", "conv", "gpt2"), ids=lambda case: case.name)
def test_nothing_is_computed_twice_and_no_bit_changes(case, method, room, tmp_path):
    room(0)
    twice, calls = fitted(case, tmp_path / "twice", method=method, **CHUNKS)
    room(replay.KEPT_BYTES)
    once, fewer = fitted(case, tmp_path / "once", method=method, **CHUNKS)
    assert fewer == calls / 2
    same(once, twice)


def test_as_many_of_the_last_chunks_are_kept_as_there_is_room_for(room, tmp_path):
    case = CASES["llama"]
    room(0)
    twice, calls = fitted(case, tmp_path / "0", **CHUNKS)
    spared = []
    for number, kept in enumerate([2**16, 2**17, 2**18, 2**19, 2**20], 1):
        room(kept)
        found, fewer = fitted(case, tmp_path / str(number), **CHUNKS)
        spared.append(calls - fewer)
        same(found, twice)
    assert spared == sorted(spared) and spared[-1] == calls / 2
    assert any(0 < count < calls / 2 for count in spared), "some room, but not for all"


@pytest.mark.parametrize(
    "other",
    [{"labels": "model"}, {"disjoint": True}, {"eigenvalue_examples": 5}, {"method": "kfac"}, {"method": "diagonal"}],
    ids=str,
)
def test_other_gradients_are_computed(other, monkeypatch):
    def refuse(*given):
        raise AssertionError("nothing is kept where the second pass has other gradients, or there is none")

    monkeypatch.setattr(Recorder, "watch", refuse)
    fitted(CASES["llama"], None, **other)


def test_a_killed_fit_goes_on_without_what_was_kept(tmp_path):
    case = CASES["llama"]
    expected, _ = fitted(case, tmp_path / "whole", chunks=4, save_every=0.0)

    class Stopping(Silent):
        left = 3

        def advance(self, stage):
            self.left -= stage.name == "eigenvalues"
            if not self.left:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt), report_to(Stopping()):
        fitted(case, tmp_path / "killed", chunks=4, save_every=0.0)
    found, calls = fitted(case, tmp_path / "killed", chunks=4, save_every=0.0)
    assert 0 < calls < 4, "the rest of one pass"
    same(found, expected)


def test_nothing_is_kept_once_memory_ran_out(tmp_path):
    case = CASES["llama"]
    expected, _ = fitted(case, None)
    found, _ = fitted(case, tmp_path / "tight", task=small_memory(case.task(), 8, after=2), batch_tokens=16, **CHUNKS)
    for name, block in expected.blocks.items():
        torch.testing.assert_close(found.blocks[name].lam_OI, block.lam_OI, rtol=1e-8, atol=1e-12)


class Told(Sink):
    def __init__(self):
        self.told = []

    def begin(self, indices, batch):
        self.told.append(list(indices))

    def receive(self, name, gradient, readers):
        self.told.append((name, gradient, readers))

    def end(self):
        self.told.append("end")


def recorded(limit, chunks, gradients):
    """A recorder that has seen the same gradients in each of the chunks."""
    recorder, sink = Recorder(limit), Told()
    recorder.watch(sink, chunks, [1] * sum(map(len, chunks)))
    for place, chunk in enumerate(chunks):
        recorder.start(place)
        recorder.begin(chunk, {})
        for name, gradient in gradients:
            recorder.receive(name, gradient, (name,))
        recorder.end()
        recorder.finish(place)
    return recorder, sink


def test_everything_is_handed_on_and_again_once():
    gradient = Dense(torch.ones(1, 2, 3))
    recorder, sink = recorded(48, [[0], [1], [2]], [("a", gradient)])
    assert sink.told == [part for index in range(3) for part in ([index], ("a", gradient, ("a",)), "end")]
    later = Told()
    assert [recorder.replay([index], later) for index in (2, 1, 0)] == [True, True, False]
    assert later.told == [part for index in (2, 1) for part in ([index], ("a", gradient, ("a",)), "end")]
    assert not recorder.replay([2], later), "it was let go of"


def test_an_input_that_modules_share_is_counted_once():
    shared = torch.ones(1, 1, 10)
    gradients = [(name, Factored(torch.ones(1, 1, 2), shared)) for name in "abc"]
    recorder, _ = recorded(40 + 3 * 8, [[0]], gradients)
    assert recorder.kept
    recorder, _ = recorded(40 + 3 * 8 - 1, [[0]], gradients)
    assert not recorder.kept
