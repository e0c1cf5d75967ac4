import pytest

from whence.progress import Silent, report_to


class Notes(Silent):
    def __init__(self):
        self.texts = []

    def note(self, text):
        self.texts.append(text)


@pytest.fixture
def notes():
    """The notes of the test, as they are made."""
    listener = Notes()
    with report_to(listener):
        yield listener.texts
