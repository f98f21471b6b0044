"""Checkpoints: whole or absent, nothing executed, and only for what they belong to."""

import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from applications.meta_learning import checkpoint as module
from applications.meta_learning.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from applications.meta_learning.config import ConfigError
from applications.meta_learning.run import RunError, check_resumable, matching_source, prepare_folder
from applications.meta_learning.train import Trainer
from tests.meta_learning.tiny import SINUSOID, TINY, tiny_source


def test_a_checkpoint_comes_back_as_it_was(tmp_path: Path) -> None:
    trainer = Trainer(TINY, tiny_source())
    trainer.meta_step()
    written = trainer.checkpoint(None)
    save_checkpoint(tmp_path / "checkpoint.pt", written)
    read = load_checkpoint(tmp_path)
    assert read["config"] == TINY.to_dict() and read["progress"]["step"] == 1
    assert read["split"] == {
        "name": "random",
        "train": list(trainer.source.split.train),
        "test": list(trainer.source.split.test),
    }  # type: ignore[union-attr]
    assert all(torch.equal(leaf, trainer.theta[name]) for name, leaf in read["theta"].items())
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint.pt"]


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(TINY, tiny_source())
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, trainer.checkpoint(None))
    before = path.read_bytes()

    def half_a_write(_: object, file: object) -> None:
        file.write(b"half")  # type: ignore[attr-defined]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.torch, "save", half_a_write)
    with pytest.raises(
        CheckpointError, match="could not write the checkpoint.*No space left.*the last one.*is as it was"
    ):
        save_checkpoint(path, trainer.checkpoint(None))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_the_old_checkpoint_stands_until_the_new_one_is_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = Trainer(TINY, tiny_source())
    path = tmp_path / "checkpoint.pt"
    save_checkpoint(path, trainer.checkpoint(None))
    trainer.meta_step()
    seen = []

    def replace(new: Path, old: Path) -> None:
        seen.append((load_checkpoint(old)["progress"]["step"], load_checkpoint(new)["progress"]["step"]))
        new.rename(old)

    monkeypatch.setattr(module.os, "replace", replace)
    save_checkpoint(path, trainer.checkpoint(None))
    assert seen == [(0, 1)] and load_checkpoint(path)["progress"]["step"] == 1


def test_the_global_random_state_comes_back() -> None:
    trainer = Trainer(TINY, tiny_source())
    torch.manual_seed(5)
    stored = trainer.checkpoint(None)
    torch.manual_seed(6)
    trainer.restore(stored)
    expected = torch.rand(3, generator=torch.Generator().manual_seed(5))
    assert torch.equal(torch.rand(3), expected)


def test_code_in_a_file_is_not_executed(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return Path.touch, (tmp_path / "executed",)  # type: ignore[return-value]

    path = tmp_path / "checkpoint.pt"
    torch.save({"format": module.FORMAT, "version": module.VERSION, "theta": Bomb()}, path)
    with pytest.raises(CheckpointError, match="damaged or not a checkpoint.*nothing in it was executed"):
        load_checkpoint(path)
    path.write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(CheckpointError, match="nothing in it was executed"):
        load_checkpoint(path)
    assert not (tmp_path / "executed").exists()


def test_a_single_wrong_byte_is_seen(tmp_path: Path) -> None:
    """Before, PyTorch read the numbers as they were; the archive has checksums."""
    path = tmp_path / "checkpoint.pt"
    trainer = Trainer(TINY, tiny_source())
    save_checkpoint(path, trainer.checkpoint(None))
    load_checkpoint(path)
    content = bytearray(path.read_bytes())
    content[content.index(trainer.theta["head.weight"].detach().numpy().tobytes()) + 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match="damaged or not a checkpoint of imaml"):
        load_checkpoint(path)


def test_damaged_and_foreign_files(tmp_path: Path) -> None:
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(CheckpointError, match="no checkpoint at .*expected a checkpoint.pt, or the folder"):
        load_checkpoint(tmp_path)
    save_checkpoint(path, Trainer(TINY, tiny_source()).checkpoint(None))
    whole = path.read_bytes()
    for part in (b"", whole[:100], whole[: len(whole) // 2], b"text\n" * 100):
        path.write_bytes(part)
        with pytest.raises(CheckpointError, match="damaged or not a checkpoint"):
            load_checkpoint(path)
    torch.save({"state_dict": {}}, path)
    with pytest.raises(CheckpointError, match="was not written by imaml"):
        load_checkpoint(path)
    torch.save({"format": module.FORMAT, "version": 99}, path)
    with pytest.raises(CheckpointError, match="format version 99, this program reads 2"):
        load_checkpoint(path)
    torch.save({"format": module.FORMAT, "version": module.VERSION}, path)
    with pytest.raises(CheckpointError, match=r"incomplete: missing \['classes', 'config'"):
        load_checkpoint(path)


def test_a_checkpoint_of_other_data_is_refused() -> None:
    stored = Trainer(TINY, tiny_source()).checkpoint(None)
    source = matching_source(stored, TINY, data_dir=None, download=False)
    assert source.split == tiny_source().split
    with pytest.raises(CheckpointError, match="are not those of the checkpoint.*would not be held out"):
        matching_source({**stored, "source_key": "0" * 64}, TINY, data_dir=None, download=False)
    with pytest.raises(CheckpointError, match="are not those of the checkpoint"):
        matching_source({**stored, "classes": stored["classes"][::-1]}, TINY, data_dir=None, download=False)
    overlapping = {**stored["split"], "test": stored["split"]["train"]}
    with pytest.raises(
        CheckpointError, match="split in the checkpoint is damaged: expected train and test classes to be disjoint"
    ):
        matching_source({**stored, "split": overlapping}, TINY, data_dir=None, download=False)


def test_a_checkpoint_of_another_network_is_refused() -> None:
    stored = Trainer(TINY, tiny_source()).checkpoint(None)
    with pytest.raises(CheckpointError, match="expected the parameters of the network.*body"):
        Trainer(replace(TINY, channels=5), tiny_source()).restore(stored)
    with pytest.raises(CheckpointError, match="expected the parameters of the network"):
        Trainer(SINUSOID, tiny_source(SINUSOID)).restore(stored)
    with pytest.raises(CheckpointError, match="does not fit the run"):
        Trainer(TINY, tiny_source()).restore({**stored, "sampler": {"generator": torch.zeros(3)}})


def test_what_a_resumed_run_may_change() -> None:
    assert check_resumable(TINY, replace(TINY, lam=3.0, outer_steps=9)) == ["lam", "outer_steps"]
    with pytest.raises(
        ConfigError, match="a resumed run keeps its data, tasks and network: --ways is 3, got 4.*leave them out"
    ):
        check_resumable(TINY, replace(TINY, ways=4, lam=3.0))


def test_folders(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="nothing to resume"):
        prepare_folder(tmp_path, resume=True, overwrite=False)
    assert prepare_folder(tmp_path / "a" / "b", resume=False, overwrite=False) is None
    save_checkpoint(tmp_path / "checkpoint.pt", Trainer(TINY, tiny_source()).checkpoint(None))
    with pytest.raises(RunError, match="holds a run already; --resume goes on with it, --overwrite"):
        prepare_folder(tmp_path, resume=False, overwrite=False)
    assert prepare_folder(tmp_path, resume=False, overwrite=True) is None
    assert (tmp_path / "checkpoint.pt").exists()  # nothing is deleted before the data are there
    stored = prepare_folder(tmp_path, resume=True, overwrite=False)
    assert stored is not None and stored["progress"]["step"] == 0
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot be written"):
        prepare_folder(tmp_path / "file" / "run", resume=False, overwrite=False)
