"""Too little memory and full disks, in the words of all the libraries that meet them."""

import errno

import pytest
import torch

from whence.errors import DiskFull, ModelNotFound, NumericalError, OutOfMemory, UsageError
from whence.shortage import is_out_of_memory, shortage, shortages

NO_MEMORY = [
    MemoryError(),
    MemoryError("Unable to allocate 7.45 GiB for an array with shape (1000000000,) and data type float64"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to ..."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:75] . DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."),
    RuntimeError("std::bad_alloc"),
    RuntimeError("unable to mmap 4096 bytes from file </model.safetensors>: Cannot allocate memory (12)"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)"),
    ImportError("libtorch_cpu.so: failed to map segment from shared object"),
    Exception("Os { code: 12, kind: OutOfMemory, message: Cannot allocate memory (os error 12) }"),
]

FULL = [
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    OSError(errno.EFBIG, "File too large"),
    RuntimeError("Error while serializing: I/O error: No space left on device (os error 28)"),
    RuntimeError('Error while serializing: IoError(Os { code: 28, kind: StorageFull, message: "No space left" })'),
    RuntimeError("[enforce fail at inline_container.cc:659] . unexpected pos 64 vs 0"),
    RuntimeError("PytorchStreamWriter failed writing file data/0: file write failed"),
    Exception("No space left on device (os error 28)"),
]

LOCKED = [
    OSError(errno.EROFS, "Read-only file system", "a.json"),
    PermissionError(errno.EACCES, "Permission denied", "/nowhere/a.json"),
    RuntimeError("I/O error: Read-only file system (os error 30)"),
    Exception("Permission denied (os error 13)"),
]


def named(error):
    return f"{type(error).__name__} {error}"[:60]


@pytest.mark.parametrize("error", NO_MEMORY, ids=named)
def test_memory_is_named_whoever_asked_for_it(error):
    assert is_out_of_memory(error)
    said = shortage(error)
    assert isinstance(said, OutOfMemory) and (said.code, said.exit_code) == (10, 3) and "--batch-tokens" in said.fix


@pytest.mark.parametrize("error", FULL, ids=named)
def test_a_full_disk_is_named_whoever_wrote_there(error, tmp_path):
    said = shortage(error, tmp_path / "a.json")
    assert isinstance(said, DiskFull) and (said.code, said.exit_code) == (13, 3)
    assert "a.json could not be written" in said.what and "GB free where" in said.given and "it resumes" in said.fix
    assert isinstance(shortage(error), DiskFull), "where nobody knows what was written"


@pytest.mark.parametrize("error", LOCKED, ids=named)
def test_a_place_where_nothing_may_be_written_is_named(error, tmp_path):
    said = shortage(error, tmp_path / "a.json")
    assert isinstance(said, DiskFull) and said.exit_code == 3 and "a.json could not be written" in said.what
    assert "a different --out" in said.fix and str(tmp_path / "a.json") == said.given


@pytest.mark.parametrize("error", [*NO_MEMORY, *FULL], ids=named)
def test_what_led_to_an_error_counts(error):
    try:
        try:
            raise error
        except Exception:
            raise KeyError("in its handler") from None
    except KeyError as raised:
        assert shortage(raised) is None, "it was hidden on purpose"
    try:
        try:
            raise error
        except Exception:
            raise ValueError("Can't close the ZIP file while there is an open writing handle on it.")  # noqa: B904
    except ValueError as raised:
        assert shortage(raised) is not None
    try:
        try:
            raise error
        except Exception as cause:
            raise ModelNotFound("The model at m can't be loaded.") from cause
    except ModelNotFound as raised:
        assert type(shortage(raised)) is type(shortage(error))


OTHERS = [
    ValueError("the row 'I was out of memory, and no space left on device'"),
    KeyError("no space left on device"),
    FileNotFoundError(errno.ENOENT, "No such file or directory", "rows.jsonl"),
    RuntimeError("mat1 and mat2 shapes cannot be multiplied"),
    UsageError("Permission denied"),
    NumericalError("out of memory"),
]


@pytest.mark.parametrize("error", OTHERS, ids=named)
def test_other_errors_stay_what_they_are(error):
    assert shortage(error) is None and not is_out_of_memory(error)
    with pytest.raises(type(error)) as raised, shortages():
        raise error
    assert raised.value is error


def test_a_file_that_cannot_be_read_is_no_full_disk(tmp_path, monkeypatch):
    (tmp_path / "rows.jsonl").touch()
    monkeypatch.setattr("os.access", lambda *_: False)  # root may read everything
    assert shortage(PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "rows.jsonl"))) is None


def test_an_error_of_ours_is_raised_as_it_is():
    ours = OutOfMemory("A batch does not fit.")
    with pytest.raises(OutOfMemory) as raised, shortages():
        raise ours
    assert raised.value is ours
