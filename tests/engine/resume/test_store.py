"""Kept renders as files: damage, room, names, deletion."""

import os
import shutil
import threading
import time
from contextlib import contextmanager

import pytest
import torch
from atlasvid.engine.estimate import cost
from atlasvid.engine.geometry.grid import Grid
from atlasvid.engine.resume import run, store
from atlasvid.engine.resume.needs import disk_needs
from atlasvid.engine.resume.run import apply_resume
from atlasvid.engine.resume.store import Answer, Facts, Render
from atlasvid.engine.vae import scratch
from safetensors.torch import load_file
from sampling import SHAPE, Stopped, calls, sample
from wan import plan_of, rand

IDS = [f"{i:032x}" for i in range(6)]
KEYS = [f"{i:032x}" for i in range(100, 106)]


def render(number, *, answers=2, finished=False, age=0.0):
    """A render on the disk that was used `age` seconds ago."""
    made = Render(store.folder() / IDS[number])
    made.set_facts(Facts(f"render {number}", 8, SHAPE, finished))
    for i in range(answers):
        made.write(KEYS[i], i + 1, Answer(rand(1000, seed=i), 2.0))
    used = time.time() - age
    os.utime(made.folder / store.FACTS, (used, used))
    return made


def test_an_answer_comes_back_bit_by_bit_in_its_own_precision():
    made = render(0, answers=0)
    for i, dtype in enumerate((torch.float32, torch.bfloat16, torch.float16)):
        tensor = rand(2, 3, seed=i).to(dtype)
        made.write(KEYS[i], i + 1, Answer(tensor, 1.5))
        found = Render(made.folder).read(KEYS[i])
        assert found.tensor.dtype == dtype
        assert torch.equal(found.tensor, tensor)
        assert found.seconds == 1.5
    assert Render(made.folder).step == 3


@pytest.mark.parametrize("damage", ["cut", "empty", "bit", "other file", "no file", "another key"])
def test_a_damaged_answer_is_dropped_and_sampled_again(wan, damage, output, caplog):
    expected = sample(wan)
    model = apply_resume(wan)
    assert torch.equal(sample(model), expected)
    third = next(output.rglob("00003-*.safetensors"))
    second = next(output.rglob("00002-*.safetensors"))
    content, answer = third.read_bytes(), load_file(third)["answer"].clone()
    if damage == "no file":
        third.unlink()
    elif damage == "another key":
        shutil.copy(second, third)
    else:
        changed = {
            "cut": content[: len(content) // 2],
            "empty": b"",
            "bit": content[:-5] + bytes([content[-5] ^ 1]) + content[-4:],
            "other file": b"not a safetensors file at all",
        }
        third.write_bytes(changed[damage])
    with calls() as made:
        assert torch.equal(sample(model), expected)
    assert len(made) == 1, "the steps behind it are asked the same again"
    if damage != "no file":
        assert "damaged" in caplog.text
        assert third.name in caplog.text
    assert torch.equal(load_file(third)["answer"], answer)


def test_room_is_made_by_the_oldest_finished_render_first():
    render(0, finished=True, age=10)
    render(1, finished=True, age=30)
    render(2, age=50)
    one = render(3, age=5).bytes
    left = lambda: {each.id for each in store.renders()}  # noqa: E731
    assert store.make_room(one, 5 * one, 0)
    assert left() == set(IDS[:4])
    assert store.make_room(one, 4 * one, 0)
    assert left() == {IDS[0], IDS[2], IDS[3]}, "the oldest finished one goes first"
    assert store.make_room(one, 2 * one, 0)
    assert left() == {IDS[3]}, "then the other finished one, then the oldest"


def test_facts_are_replaced_only_while_nobody_reads_them(monkeypatch):
    """Windows replaces no file that is open: a list asked for while rendering."""
    made, opened, reading = render(0), store.safe_open, threading.Event()
    events = []

    @contextmanager
    def slowly(path, **options):
        with opened(path, **options) as file:
            reading.set()
            time.sleep(0.2)
            yield file
        events.append("read")

    monkeypatch.setattr(store, "safe_open", slowly)
    asked = threading.Thread(target=store.listing)
    asked.start()
    assert reading.wait(5)
    made.set_facts(Facts("render 0", 9, SHAPE))
    events.append("replaced")
    asked.join()
    assert events == ["read", "replaced"]


def test_what_a_prompt_works_on_does_not_go():
    one = render(0, finished=True).bytes
    store.IN_USE.hold(IDS[0], "a prompt")
    try:
        assert not store.make_room(one, one, 0)
        assert [each.id for each in store.renders()] == IDS[:1]
        with pytest.raises(ValueError, match="Cancel it first"):
            store.delete(IDS[0])
    finally:
        store.IN_USE.release(IDS[0], "a prompt")
    store.delete(IDS[0])
    assert store.renders() == []


def test_over_the_limit_sampling_goes_on_without_keeping(wan, caplog, output, monkeypatch):
    expected = sample(wan)
    monkeypatch.setattr(run, "GB", 4 * torch.Size(SHAPE).numel())  # an answer without its header
    model = apply_resume(wan, disk_limit_gb=2.9)
    assert torch.equal(sample(model), expected)
    assert len(list(output.rglob("0000*.safetensors"))) == 2
    assert "sampling goes on, 2 of 4 steps are kept" in caplog.text
    with calls() as made:
        assert torch.equal(sample(model), expected)
    assert len(made) == 2, "those that are kept are still answered"


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), PermissionError()])
def test_a_full_disk_does_not_end_the_render(wan, monkeypatch, error, caplog, output):
    expected = sample(wan)
    stock = Render.write

    def write(self, key, step, answer):
        if step == 3:
            raise error
        stock(self, key, step, answer)

    monkeypatch.setattr(Render, "write", write)
    assert torch.equal(sample(apply_resume(wan)), expected)
    assert "does not take more steps" in caplog.text
    names = [file.name[:5] for file in output.rglob("0000*.safetensors")]
    assert sorted(names) == ["00001", "00002"]


def test_a_disk_without_room_for_the_video_is_told_before_sampling(wan, monkeypatch, caplog):
    monkeypatch.setattr(store.server, "free_disk", lambda: 1000)
    sample(apply_resume(wan))
    assert "make room there" in caplog.text


def test_a_folder_that_cannot_be_written_does_not_end_the_render(wan, output, caplog):
    output.mkdir()
    (output / store.FOLDER).write_text("a file where the folder should be")
    expected = sample(wan)
    assert torch.equal(sample(apply_resume(wan)), expected)
    assert "cannot be written" in caplog.text


def test_when_done_deletes_or_marks_as_finished(wan, output):
    sample(apply_resume(wan, when_done="delete"))
    assert store.renders() == []
    sample(apply_resume(wan, name="a lake"))
    (listed,) = store.listing()
    assert listed["name"] == "a lake"
    assert listed["finished"]
    assert (listed["step"], listed["steps"]) == (4, 4)
    assert 0 <= listed["age"] < 60
    assert not listed["in_use"]


def test_disk_needs_are_those_of_the_plan_and_of_what_is_kept(wan, output):
    plan = plan_of((3, 8, 8), (2, 4, 4), stride=2)
    settings = cost.Settings(Grid(2, 2, 2), kept_proxy_steps=3, kept_detail_steps=4)
    sample(apply_resume(wan), steps=3, latent=torch.zeros(1, 16, *plan.proxy_latent))
    sample(apply_resume(wan), steps=4, latent=torch.zeros(1, 16, *plan.latent))
    kept = [load_file(file)["answer"].nbytes for file in output.rglob("0*.safetensors")]
    assert sum(kept) == cost.answers_disk(plan, settings)
    both = Render(store.renders()[0].folder).bytes + Render(store.renders()[1].folder).bytes
    assert sum(kept) < both < 2 * sum(kept)
    planned = cost.memory(cost.TINY, plan, settings, cost.Machine(2**40, 2**40, 2**40)).disk
    needs = disk_needs(wan, (1, 16, *plan.latent), 4, 4 * 16 * plan.latent.count)
    proxy = 3 * 4 * 16 * plan.proxy_latent.count
    assert needs.answers + needs.video + proxy == planned
    assert disk_needs(wan, (1, 4, 8, 8), 1, 1).video == 0, "of an image nothing is known"


def test_what_a_killed_process_left_half_written_goes(output):
    made = render(0)
    torn = made.folder / f".{scratch.PREFIX}999999999-1-abcdef.safetensors"
    torn.write_bytes(b"half")
    made.write(KEYS[5], 6, Answer(rand(3), 1.0))
    assert not torn.exists()


@pytest.mark.parametrize("name", ["..", "../other", "", ".", "a" * 32 + "/..", "A" * 32, IDS[5]])
def test_only_a_render_of_the_list_can_be_deleted(output, name):
    render(0)
    other = output / "other"
    other.mkdir()
    (other / "precious.safetensors").write_bytes(b"x")
    with pytest.raises(ValueError, match="no kept render"):
        store.delete(name)
    assert (other / "precious.safetensors").exists()
    assert len(store.renders()) == 1


def test_a_link_out_of_the_folder_is_not_followed(output):
    elsewhere = output / "elsewhere"
    elsewhere.mkdir(parents=True)
    (elsewhere / "precious.safetensors").write_bytes(b"x")
    store.folder().mkdir()
    (store.folder() / IDS[0]).symlink_to(elsewhere, target_is_directory=True)
    assert store.renders() == []
    with pytest.raises(ValueError, match="no kept render"):
        store.delete(IDS[0])
    assert (elsewhere / "precious.safetensors").exists()


def test_files_of_another_kind_are_left_alone():
    made = render(0)
    (made.folder / "notes.txt").write_text("mine")
    store.delete(IDS[0])
    assert [file.name for file in made.folder.iterdir()] == ["notes.txt"]


def test_a_stop_before_the_first_step_leaves_nothing(wan):
    with calls(stop_before=0), pytest.raises(Stopped):
        sample(apply_resume(wan))
    assert store.renders() == []
    assert not list(store.folder().iterdir())


@pytest.mark.parametrize(
    ("given", "message"),
    [({"disk_limit_gb": 0.0}, "at least"), ({"when_done": "burn"}, "allowed are keep, delete")],
)
def test_a_bad_choice_is_refused(wan, given, message):
    with pytest.raises(ValueError, match=message):
        apply_resume(wan, **given)
