import pytest
import torch

from whence.errors import UsageError
from whence.validate.settings import BUNDLED, FILES, SETTINGS, language, setting

ROWS = {"concrete": 721, "energy": 538, "diabetes": 309, "digits": 1000, "mnist": 1000, "text": 1000, "sst2": 1000, "lm": 384}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_setting_is_whole_and_the_same_every_time(name, shared_data):
    own, again = setting(name, shared_data), setting(name, shared_data)
    assert len(own.train) == ROWS[name] and len(own.queries) >= 100
    assert own.describe() == again.describe() and own.about == again.about
    one, same, other = own.model(1), own.model(1), own.model(2)
    assert all(a.equal(b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not all(a.equal(b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
    items = own.task.encode(own.train[:3])
    losses = own.task.losses(one, own.task.collate(items))
    assert losses.shape == (3,) and bool(torch.isfinite(losses).all())
    asked = own.task.encode_queries(own.queries[:2])
    assert torch.isfinite(own.task.measurements(one, own.task.collate([query[0][0] for query in asked]))).all()
    if own.texts:
        assert [len(side) for side in own.texts] == [len(own.queries), len(own.train)]
        assert not set(own.texts[0]) & set(own.texts[1]), "a query is a training row"


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_settings_take_no_folder(name):
    assert len(setting(name).train) == ROWS[name]


def test_training_learns_something():
    own = setting("diabetes")
    untrained = own.task.losses(own.model(0), own.task.collate(own.queries)).mean().item()
    trained = own.trained([0, 1]).losses(own.queries).mean(1)
    assert bool((trained < 0.8 * untrained).all()) and trained[0] != trained[1]


def test_language_queries_are_second_halves(shared_data):
    own = language(shared_data)
    query = own.queries[0]
    assert query["prompt"] + query["completion"] == own.texts[0][0]
    sizes = [own.task.predictions(item) for item in own.task.encode(own.train[:20])]
    assert all(22 <= size <= 24 for size in sizes)


def test_a_missing_folder_or_file_is_named(tmp_path):
    for name in FILES:
        with pytest.raises(UsageError, match="--data"):
            setting(name)
        with pytest.raises(UsageError, match="not there"):
            setting(name, tmp_path)
    (tmp_path / "concrete").mkdir()
    (tmp_path / "concrete" / "data.txt").write_text("1 2\n")
    with pytest.raises(UsageError, match="energy/data.txt is not there"):
        setting("energy", tmp_path / "concrete")  # another set's file of the same name is none
    with pytest.raises(UsageError, match="no setting 'cifar'"):
        setting("cifar")


@pytest.mark.parametrize("name", sorted(set(SETTINGS) - set(BUNDLED)))
@pytest.mark.parametrize("content", [b"\x1f\x8b\x08\x00", b"\xff\xfe[" * 99, b"[" * 10**5 + b"\n"])
def test_data_that_can_not_be_read_is_named(tmp_path, name, content):
    for file in FILES[name]:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes(content)
    with pytest.raises(UsageError, match=rf"The data of {name} in {tmp_path} can't be read(.|\n)*{FILES[name][0]}"):
        setting(name, tmp_path)
