"""An operator that is not asked again returns what it would, and a rehearsal counts the same."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import whence
from whence.planning import calls
from whence.planning.calls import Calls
from whence.planning.rehearsal import Rehearsal

aten = torch.ops.aten


def held(tensors, *args):
    """What a tensor is, and in whose storage it lies."""
    owner = next(
        (number for number, x in enumerate(args) if x.untyped_storage()._cdata == tensors.untyped_storage()._cdata), -1
    )
    return tensors.shape, tensors.stride(), tensors.storage_offset(), tensors.dtype, tensors.device, owner


@pytest.mark.parametrize(
    ("func", "further"),
    [
        (aten.mm.default, lambda x: (x.t(),)),
        (aten.t.default, lambda x: ()),
        (aten.slice.Tensor, lambda x: (1, 1, 3)),
        (aten.expand.default, lambda x: ([2, 3, 4],)),
        (aten.split.Tensor, lambda x: (2, 1)),
        (aten._linalg_svd.default, lambda x: (False, True)),
        (aten.add_.Tensor, lambda x: (torch.ones(3, 4),)),
        (aten._to_copy.default, lambda x: ()),
    ],
)
def test_the_same_is_returned_the_second_time(func, further):
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        first, second, call = torch.empty(3, 4), torch.empty(3, 4), Calls(mode)
        found = []
        for x in (first, second):
            result, how = call(func, (x, *further(x)), {})
            found.append((how, [held(each, x) for each in (result if isinstance(result, tuple | list) else [result])]))
    assert found[0] == found[1]


def test_which_argument_is_returned_does_not_depend_on_which_were_the_same_before():
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x, y, call = torch.empty(3, 3), torch.empty(3, 3), Calls(mode)
        for given in [(x, x), (x, y), (y, x)] * 2:
            assert call(aten.add_.Tensor, given, {})[0] is given[0]
        for given in [(x, x, x), (x, y, x), (y, y, x), (x.t(), x, y)] * 2:
            assert call(aten.mm.out, given[:2], {"out": given[2]})[0] is given[2]


def test_what_shapes_do_not_tell_is_asked_again():
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        call = Calls(mode)
        for size in (5, 7):
            x = torch.empty(3)
            call(aten.resize_.default, (x, [size]), {})
            assert x.shape == (size,)
        filled = [call(aten.full.default, ([2], value), {})[0] for value in (1, 1.0, 1.0)]
        torch.set_default_dtype(torch.float64)
        try:
            filled.append(call(aten.full.default, ([2], 1.0), {})[0])
        finally:
            torch.set_default_dtype(torch.float32)
    assert [each.dtype for each in filled] == [torch.int64, torch.float32, torch.float32, torch.float64]


def test_a_rehearsal_counts_the_same(monkeypatch, tiny_llama, tiny_tokenizer):
    task, rows = whence.CausalLM(tiny_tokenizer), [{"text": "The old harbour of Lyon."}, {"text": "She is a baker."}]

    def seen():
        rehearsal = Rehearsal(tiny_llama, task, "cpu")
        fitted, curvature = rehearsal.run(lambda model, task: whence.fit(model, task, rows, examples="all", disjoint=False))
        _, operator = rehearsal.run(lambda model, task: curvature.inverse())
        given = [{"prompt": "", "completion": "A baker."}], rows, operator
        scored, _ = rehearsal.run(lambda model, task: whence.score(model, task, *given, rank=4), last="score")
        return fitted | scored

    again = [seen(), seen()]

    def never(value, tensors):
        raise calls._MoreToIt

    monkeypatch.setattr(calls, "_described", never)
    assert again == [seen()] * 2
