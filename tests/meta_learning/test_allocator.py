"""The setting of the C library: made where there is one, harmless elsewhere."""

import subprocess
import sys

import pytest

from applications.meta_learning import allocator


def test_it_changes_no_result() -> None:
    """In a process of its own, because it cannot be taken back."""
    code = (
        "from applications.meta_learning.allocator import keep_freed_memory; import torch; "
        "a = torch.arange(2e6).sum(); keep_freed_memory(); assert torch.equal(a, torch.arange(2e6).sum())"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_elsewhere_nothing_happens(monkeypatch: pytest.MonkeyPatch, platform: str) -> None:
    def no_library(name: str) -> None:
        raise AssertionError("expected no look at the C library")

    monkeypatch.setattr(allocator.sys, "platform", platform)
    monkeypatch.setattr(allocator.ctypes, "CDLL", no_library)
    allocator.keep_freed_memory()


def test_a_linux_without_glibc_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(name)

    monkeypatch.setattr(allocator.sys, "platform", "linux")
    monkeypatch.setattr(allocator.ctypes, "CDLL", missing)
    allocator.keep_freed_memory()
