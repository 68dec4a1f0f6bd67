"""JSON and the arrays beside it, saved as one: never a mix, never another's file, and files of earlier versions open."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from graphlens import Scale, Steer, interventions
from graphlens.analysis import result_files
from graphlens.errors import InputError
from graphlens.file import pair

OLD = [Steer("h", np.arange(3.0)), Scale("h", 2.0)]
NEW = [Scale("h", 3.0), Steer("h", np.arange(5.0), 0.5)]
SCALARS = [Scale("h", 0.5)]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_saving_over_another_save_leaves_two_files(tmp_path: Path) -> None:
    path = tmp_path / "e.json"
    for items in (OLD, NEW, NEW, SCALARS, OLD):
        interventions.save(items, path)
        assert interventions.load(path) == items
        assert names(tmp_path) == ["e.json"] + ["e.safetensors"] * (items is not SCALARS)
        assert "safetensors_file" not in path.read_text()


def test_a_file_of_an_earlier_version_opens_and_is_replaced(tmp_path: Path) -> None:
    """Version 0.6 wrote the text alone, and arrays that say nothing of their format."""
    text, arrays = interventions.to_json(OLD)
    (tmp_path / "e.json").write_text(text)
    save_file(arrays, tmp_path / "e.safetensors")
    assert interventions.load(tmp_path / "e.json") == OLD
    interventions.save(NEW, tmp_path / "e.json")
    assert interventions.load(tmp_path / "e.json") == NEW
    assert names(tmp_path) == ["e.json", "e.safetensors"]


def test_arrays_of_another_save_are_refused(tmp_path: Path) -> None:
    interventions.save(OLD, tmp_path / "a.json")
    interventions.save([Steer("h", np.arange(3.0) + 1), Scale("h", 2.0)], tmp_path / "b.json")
    os.replace(tmp_path / "b.safetensors", tmp_path / "a.safetensors")
    with pytest.raises(InputError, match=r"a\.safetensors: damaged, or of another save than a\.json"):
        interventions.load(tmp_path / "a.json")
    with pytest.raises(InputError, match=r"b\.safetensors"):
        interventions.load(tmp_path / "b.json")


@pytest.mark.parametrize("ending", [".safetensors", ".SafeTensors"])
def test_the_name_of_the_arrays_is_refused(ending: str, tmp_path: Path) -> None:
    for call in (lambda path: interventions.save(OLD, path), interventions.load):
        with pytest.raises(InputError, match=r"Name their JSON file: .*e\.json"):
            call(tmp_path / f"e{ending}")
    assert names(tmp_path) == []


@pytest.mark.parametrize("json_there", [False, True])
def test_a_file_that_is_something_else_is_neither_replaced_nor_removed(json_there: bool, tmp_path: Path) -> None:
    """Interventions saved as model.json in a model's folder, say."""
    save_file({"w": np.ones(3)}, tmp_path / "model.safetensors", {"format": "pt"})
    before = (tmp_path / "model.safetensors").read_bytes()
    if json_there:
        (tmp_path / "model.json").write_text('{"format": "another"}')
    with pytest.raises(InputError, match=r"model\.safetensors: .*no file of graphlens\.interventions"):
        interventions.save(OLD, tmp_path / "model.json")
    with pytest.raises(InputError, match=r"no file of graphlens\.sweep_result"):
        result_files.write(tmp_path / "model", {}, {"values": np.ones(2)})
    interventions.save(SCALARS, tmp_path / "model.json")
    assert interventions.load(tmp_path / "model.json") == SCALARS
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_what_a_killed_save_left_of_a_first_save_is_replaced(tmp_path: Path) -> None:
    """Only the arrays: they say whose they are."""
    interventions.save(OLD, tmp_path / "e.json")
    (tmp_path / "e.json").unlink()
    interventions.save(NEW, tmp_path / "e.json")
    assert interventions.load(tmp_path / "e.json") == NEW


@pytest.mark.parametrize("items", [OLD, SCALARS])
def test_a_first_save_that_fails_leaves_nothing(
    items: list[interventions.Intervention], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = pair.write_through

    def fail(target: Path, data: bytes) -> None:
        if target.suffix == ".json":
            raise OSError("full")
        write(target, data)

    monkeypatch.setattr(pair, "write_through", fail)
    with pytest.raises(InputError, match=r"e\.json: cannot be written \(full\)"):
        interventions.save(items, tmp_path / "e.json")
    assert names(tmp_path) == []


def between_the_steps(path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Saves NEW, and fails once the JSON names the new arrays. Returns the name that they have then."""
    write = pair.write_through
    done: list[Path] = []

    def fail(target: Path, data: bytes) -> None:
        if done:
            raise OSError("stop")
        write(target, data)
        done.append(target)

    with monkeypatch.context() as broken:
        broken.setattr(pair, "write_through", fail)
        interventions.save(NEW, path)
    name = json.loads(path.read_text())["safetensors_file"]
    assert isinstance(name, str)
    return name


def test_between_its_steps_a_save_is_new_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "e.json"
    interventions.save(OLD, path)
    old = load_file(tmp_path / "e.safetensors")
    longer = between_the_steps(path, monkeypatch)
    assert interventions.load(path) == NEW
    assert names(tmp_path) == sorted(["e.json", "e.safetensors", longer])
    np.testing.assert_array_equal(load_file(tmp_path / "e.safetensors")["0.vector"], old["0.vector"])
    monkeypatch.setattr("graphlens.file.leftovers.is_running", lambda process: False)
    interventions.save(SCALARS, tmp_path / "other.json")  # removes nothing that is named
    assert interventions.load(path) == NEW
    interventions.save(OLD, path)
    assert interventions.load(path) == OLD
    assert names(tmp_path) == ["e.json", "e.safetensors", "other.json"]


@pytest.mark.parametrize("name", ["../e.safetensors", "", ".", "/etc/passwd", 3, "a\\b"])
def test_a_name_that_leaves_the_folder_is_refused(name: object, tmp_path: Path) -> None:
    path = interventions.save(OLD, tmp_path / "e.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), "safetensors_file": name}))
    with pytest.raises(InputError, match="not the name of a file beside it"):
        interventions.load(path)


def test_links_and_permissions_stay(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    interventions.save(OLD, tmp_path / "real" / "e.json")
    for name in ("e.json", "e.safetensors"):
        (tmp_path / "real" / name).chmod(0o640)
        (tmp_path / name).symlink_to(tmp_path / "real" / name)
    interventions.save(NEW, tmp_path / "e.json")
    for name in ("e.json", "e.safetensors"):
        assert (tmp_path / name).is_symlink()
        assert (tmp_path / "real" / name).stat().st_mode & 0o777 == 0o640
    assert interventions.load(tmp_path / "e.json") == interventions.load(tmp_path / "real" / "e.json") == NEW
    assert names(tmp_path) == ["e.json", "e.safetensors", "real"]


def test_who_reads_while_another_saves_finds_one_of_the_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "e.json"
    interventions.save(OLD, path)
    read = pair.read_regular
    reads = []

    def racing(file: Path) -> bytes:
        reads.append(file.name)
        data = read(file)
        if len(reads) == 1:  # the JSON of OLD is read, and before its arrays are, NEW is saved
            interventions.save(NEW, path)
        return data

    monkeypatch.setattr(pair, "read_regular", racing)
    assert interventions.load(path) == NEW


def test_two_savers_at_once_leave_one_of_the_two(tmp_path: Path) -> None:
    import threading

    path = tmp_path / "e.json"
    failures: list[BaseException] = []

    def many(items: list[interventions.Intervention]) -> None:
        try:
            for _ in range(20):
                interventions.save(items, path)
                assert interventions.load(path) in (OLD, NEW)
        except BaseException as error:  # noqa: BLE001 - shown below
            failures.append(error)

    savers = [threading.Thread(target=many, args=(items,)) for items in (OLD, NEW)]
    for saver in savers:
        saver.start()
    for saver in savers:
        saver.join()
    assert failures == []
    assert interventions.load(path) in (OLD, NEW)
    assert names(tmp_path) == ["e.json", "e.safetensors"]


@pytest.mark.parametrize("save", [lambda path: interventions.save(OLD, path)])
def test_a_pipe_is_written_in_place(save: Callable[[Path], object], tmp_path: Path) -> None:
    import threading

    os.mkfifo(tmp_path / "pipe")
    got: list[bytes] = []
    reader = threading.Thread(target=lambda: got.append((tmp_path / "pipe").read_bytes()))
    reader.start()
    interventions.save(SCALARS, tmp_path / "pipe")
    reader.join()
    assert interventions.from_json(got[0].decode()) == SCALARS
