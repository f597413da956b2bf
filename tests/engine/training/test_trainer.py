"""Whole training runs on one tiny clip: what is learned, saved, resumed and refused."""

import logging
import resource
import sys
from dataclasses import replace

import comfy.lora
import comfy.sd
import comfy.utils
import pytest
import torch
from atlasvid.engine.branch.apply import apply_detail_branch
from atlasvid.engine.comfyui import management, media, models
from atlasvid.engine.families import tiny
from atlasvid.engine.geometry.grid import Grid
from atlasvid.engine.lora.guide import load_guide_lora
from atlasvid.engine.lora.recipe import STAGES, BaseShape, Recipe, pack_version
from atlasvid.engine.proxy.frequencies import apply_rope_method
from atlasvid.engine.training import trainer as engine_trainer
from atlasvid.engine.training.cache import LatentCache
from atlasvid.engine.training.clips import clips_in_folder
from atlasvid.engine.training.job import Job
from atlasvid.engine.training.objective import NoiseLevels
from atlasvid.engine.training.state import TrainingState
from atlasvid.engine.training.trainer import Trainer, TrainSettings
from clips import render
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from wan import forward, plan_of, rand, relative_error, small_wan

PLAN = plan_of((5, 8, 8), (2, 4, 4))
WINDOW = Grid(4, 16, 16)


@pytest.fixture(scope="module")
def vae():
    """The tiny VAE with latents of about the variance that real ones have."""
    state = tiny.vae_state()
    for name in ("conv1.weight", "conv1.bias"):
        state[name] *= 4
    return media.load_vae(state)


@pytest.fixture(scope="module")
def text_encoder():
    return tiny.TinyTextEncoder()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    for name, seed in (("a", 0), ("b", 1)):
        render(folder / f"{name}.mp4", 18, seed=seed)
    return folder


@pytest.fixture(scope="module")
def data(folder, vae, text_encoder):
    """Two clips for each stage."""
    return {
        stage: LatentCache(folder / "cache", PLAN, stage, vae, text_encoder).build(
            clips_in_folder(folder), 1
        )
        for stage in STAGES
    }


def settings(stage="guide", steps=4, **more):
    usual = {"rank": 4, "alpha": 4.0, "window": WINDOW, "precision": "fp32", "caption_dropout": 0.3}
    return TrainSettings(stage, steps, **(usual | more))


def trainer(tmp_path, chosen, model=None, plan=PLAN):
    path = tmp_path / "lora.safetensors"
    return Trainer(model or small_wan(), plan, chosen, path, tmp_path / "run")


# --- What a run writes ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A short run of each stage, its adapters far enough from 0 to matter."""
    runs = {}
    for stage in STAGES:
        run = trainer(
            tmp_path_factory.mktemp(stage), settings(stage, 3, learning_rate=0.05, guide_weight=6.0)
        )
        runs[stage] = run, run.run(data[stage])
    return runs


def predicted(run, sample, x, text):
    with management.training(), torch.no_grad():
        return run.predict(x, 0.6, text, sample)


@pytest.mark.parametrize("stage", STAGES)
def test_the_lora_says_what_it_is_for(trained, stage):
    _, result = trained[stage]
    guide = stage != "proxy"
    expected = Recipe(
        stage,
        temporal_stride=4,
        window=WINDOW if guide else None,
        guide_noise="clean" if guide else None,
        rank=4,
        alpha=4.0,
        base=BaseShape(256, 512, 3, 16),
        steps=3,
        version=pack_version(),
        guide_weight=6.0 if guide else None,
        ratio=PLAN.ratio if guide else None,
    )
    with safe_open(result.path, "pt") as file:
        assert Recipe.from_metadata(file.metadata()) == expected
    assert len(result.losses) == 3
    assert Image.open(result.curve).size == (800, 480)


def test_the_stock_loader_takes_every_key_of_a_proxy_lora(trained, data, caplog):
    """And the stock forward with it, at scaled positions, is the one that was trained."""
    run, result = trained["proxy"]
    tensors = comfy.utils.load_torch_file(str(result.path))
    model = small_wan()
    keys = comfy.lora.model_lora_keys_unet(model.model, {})
    with caplog.at_level(logging.WARNING):
        patches = comfy.lora.load_lora(tensors, keys)
    assert "not loaded" not in caplog.text
    assert len(patches) == len(tensors) / 3 == 3 * 10

    patched, _ = comfy.sd.load_lora_for_models(model, None, tensors, 1.0, 0.0)
    patched = apply_rope_method(patched, "linear", temporal_scale=1.0, spatial_scale=1.0, plan=PLAN)
    sample = data["proxy"].sample(0)
    x = models.process_latent_in(model, sample.guide)
    ours = predicted(run, sample, x, sample.text)
    plain = forward(patched, x, torch.tensor([600.0]), sample.text)
    patched.patch_model()
    try:
        stock = forward(patched, x, torch.tensor([600.0]), sample.text)
    finally:
        patched.unpatch_model()
    assert relative_error(stock, ours) < 1e-5
    assert relative_error(plain, ours) > 1e-2


@pytest.mark.parametrize(("stage", "other"), [("guide", "target"), ("target", "guide")])
def test_inference_with_a_lora_of_one_stream_is_what_was_trained(trained, data, stage, other):
    run, result = trained[stage]
    sample = data[stage].sample(0)
    lora = load_guide_lora(result.path, 1.0)
    model = small_wan()
    x = models.process_latent_in(model, sample.target)
    ours = predicted(run, sample, x, sample.text)
    errors = []
    for used, weight in ((lora, "auto"), (None, 6.0), (lora, 1.0)):
        patched = apply_detail_branch(
            model,
            PLAN,
            sample.guide,
            WINDOW,
            "clean",
            **{f"{stage}_lora": used},
            guide_weight=weight,
        )
        out = forward(patched, x, torch.tensor([600.0]), sample.text)
        errors.append(relative_error(out, ours))
    assert errors[0] < 1e-5
    assert min(errors[1:]) > 1e-2
    with pytest.raises(ValueError, match=f"Connect it to {stage}_lora, not to {other}_lora"):
        apply_detail_branch(model, PLAN, sample.guide, WINDOW, "clean", **{f"{other}_lora": lora})


@pytest.mark.parametrize("stage", ["guide", "target"])
def test_a_run_may_start_from_a_lora_of_another_size(trained, data, stage, tmp_path):
    """Its first predictions are the old run's last, though alpha differs; then it learns on."""
    old, result = trained[stage]
    run = trainer(tmp_path, settings(stage, 1, init=str(result.path), alpha=2.0, guide_weight=6.0))
    sample = data[stage].sample(0)
    x = models.process_latent_in(small_wan(), sample.target)
    before, start = (predicted(each, sample, x, sample.text) for each in (old, run))
    assert relative_error(start, before) < 1e-5
    run.run(data[stage])
    assert any((run.adapters.tensors()[k] != v).any() for k, v in old.adapters.tensors().items())


def test_what_a_run_cannot_start_from_is_named(trained, tmp_path):
    init = str(trained["guide"][1].path)
    with pytest.raises(ValueError, match=r"for stage guide, and this is stage target"):
        trainer(tmp_path, settings("target", 1, init=init))
    with pytest.raises(ValueError, match=r"has rank 4, and rank is 8. Set rank to 4"):
        trainer(tmp_path, settings("guide", 1, init=init, rank=8))


@pytest.mark.parametrize("stage", ["guide", "target"])
def test_inputs_of_blocks_may_lie_in_host_memory(data, stage, tmp_path, monkeypatch):
    """The same gradients; what is kept between forward and backward passes through there."""
    kept = []

    class OnHost(torch.autograd.graph.saved_tensors_hooks):
        def __init__(self, pin_memory):
            super().__init__(lambda x: kept.append(x.numel()) or x.clone(), lambda x: x)

    monkeypatch.setattr(engine_trainer, "save_on_cpu", OnHost)
    found = []
    for on_host in (False, True):
        run = trainer(tmp_path, settings(stage, 1))
        run.dataset, run.inputs_on_host = data[stage], on_host
        with torch.no_grad():
            for i, weight in enumerate(run.adapters.parameters()):
                weight.add_(0.05 * rand(*weight.shape, seed=i))
        with management.training():
            run.gradients()
        found.append([weight.grad for weight in run.adapters.parameters()])
        assert bool(kept) == on_host
    largest = PLAN.tokens.count * 256
    assert sum(kept) > 3 * largest  # the input of every block, in the order of its windows
    for without, on_host in zip(*found, strict=True):
        assert (without is None) == (on_host is None)
        assert without is None or torch.equal(without, on_host)


def test_the_stock_loader_takes_no_key_of_a_guide_lora(trained):
    """On target tokens it would do harm."""
    tensors = load_file(trained["guide"][1].path)
    keys = comfy.lora.model_lora_keys_unet(small_wan().model, {})
    assert not comfy.lora.load_lora(tensors, keys, log_missing=False)


def test_checkpoints_are_kept(data, tmp_path):
    run = trainer(tmp_path, settings(steps=5, save_every=2))
    run.run(data["guide"])
    steps = sorted(path.name for path in (tmp_path / "run").glob("step-*"))
    assert steps == ["step-000002.safetensors", "step-000004.safetensors"]
    assert TrainingState.load(tmp_path / "run" / "state.safetensors").step == 5
    assert load_guide_lora(tmp_path / "run" / steps[0], 1.0).file.recipe.steps == 2


def test_the_model_is_as_before(data, tmp_path):
    model = small_wan()
    names = [name for name, _ in model.model.named_modules()]
    weights = {name: value.clone() for name, value in model.model.state_dict().items()}
    trainer(tmp_path, settings(steps=2), model).run(data["guide"])
    assert [name for name, _ in model.model.named_modules()] == names
    for name, value in model.model.state_dict().items():
        assert torch.equal(value, weights[name]), name
    import comfy.model_management

    assert not comfy.model_management.in_training


# --- Resuming -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "more",
    [
        {"stage": "guide"},
        {"stage": "proxy", "optimizer": "Prodigy", "accumulate": 2},
        {"stage": "guide", "precision": "bf16", "targets": "self-attention"},
    ],
)
def test_a_resumed_run_equals_an_uninterrupted_one(data, tmp_path, more):
    chosen = settings(steps=6, **more)
    dataset = data[chosen.stage]
    whole = trainer(tmp_path / "whole", chosen).run(dataset)
    parted = tmp_path / "parted"
    first = trainer(parted, replace(chosen, steps=3)).run(dataset)
    assert first.losses == whole.losses[:3]
    resumed = trainer(parted, chosen).run(dataset)
    assert resumed.resumed_at == 3
    assert resumed.losses == whole.losses
    a, b = load_file(whole.path), load_file(resumed.path)
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert all(torch.isfinite(torch.tensor(whole.losses)))


def test_cancelling_keeps_what_was_learned(data, tmp_path):
    import comfy.model_management

    whole = trainer(tmp_path / "whole", settings(steps=5)).run(data["guide"])

    def cancel(step, losses):
        if step == 3:
            comfy.model_management.interrupt_current_processing()

    stopped = comfy.model_management.InterruptProcessingException
    with pytest.raises(stopped):
        trainer(tmp_path, settings(steps=5)).run(data["guide"], on_step=cancel)
    assert load_guide_lora(tmp_path / "lora.safetensors", 1.0).file.recipe.steps == 3
    resumed = trainer(tmp_path, settings(steps=5)).run(data["guide"])
    assert resumed.resumed_at == 3
    assert resumed.losses == whole.losses


def test_a_finished_run_is_not_trained_again(data, tmp_path):
    first = trainer(tmp_path, settings(steps=2)).run(data["guide"])
    time = first.path.stat().st_mtime_ns
    again = trainer(tmp_path, settings(steps=2)).run(data["guide"])
    assert again.losses == first.losses
    assert again.path.stat().st_mtime_ns == time
    anew = trainer(tmp_path, settings(steps=2)).run(data["guide"], resume=False)
    assert anew.resumed_at == 0
    assert anew.losses == first.losses


def test_other_settings_do_not_resume(data, tmp_path):
    trainer(tmp_path, settings(steps=2)).run(data["guide"])
    with pytest.raises(ValueError, match=r"other settings: rank was 4, now 8; alpha was 4\.0"):
        trainer(tmp_path, settings(steps=3, rank=8, alpha=8.0)).run(data["guide"])
    with pytest.raises(ValueError, match="base was"):
        trainer(tmp_path, settings(steps=3), small_wan(num_layers=2)).run(data["guide"])


def test_a_run_from_before_guide_weights_resumes_with_one(data, tmp_path):
    trainer(tmp_path, settings(steps=2)).run(data["guide"])
    path = tmp_path / "run" / "state.safetensors"
    state = TrainingState.load(path)
    identity = {name: value for name, value in state.identity.items() if name != "guide_weight"}
    assert len(identity) < len(state.identity)
    replace(state, identity=identity).save(path)
    with pytest.raises(ValueError, match=r"other settings: guide_weight was 1\.0, now 8\.0"):
        trainer(tmp_path, settings(steps=3, guide_weight=8.0)).run(data["guide"])
    assert trainer(tmp_path, settings(steps=3)).run(data["guide"]).resumed_at == 2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"learning_rate": float("nan")}, "learning_rate is nan; give a number from 0"),
        ({"learning_rate": -1.0}, "learning_rate is -1"),
        ({"alpha": float("inf")}, "alpha is inf"),
        ({"alpha": 0.0}, "alpha is 0"),
        ({"caption_dropout": 1.5}, "caption_dropout is 1.5; allowed is 0 to 1"),
    ],
)
def test_numbers_that_cannot_be_learned_with_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        settings(**wrong)
    with pytest.raises(ValueError, match="shift is inf"):
        NoiseLevels(shift=float("inf"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../up", "use letters"),
        ("a" * 5000, "is 5000 bytes long; at most 200"),
        ("", "use letters"),
    ],
)
def test_names_that_make_no_file_name_are_refused(tmp_path, name, message):
    with pytest.raises(ValueError, match=message) as refused:
        Job(tmp_path, tmp_path, name)
    assert len(str(refused.value)) < 300


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_a_guide_weight_that_cannot_be_learned_with_is_refused(weight):
    with pytest.raises(ValueError, match=r"guide_weight is .*; give a number above 0"):
        settings(guide_weight=weight)


def test_a_damaged_state_is_named(data, tmp_path):
    trainer(tmp_path, settings(steps=2)).run(data["guide"])
    state = tmp_path / "run" / "state.safetensors"
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"state\.safetensors is no state .*Delete it"):
        trainer(tmp_path, settings(steps=3)).run(data["guide"])


# --- What goes wrong ------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_stops_the_run(data, tmp_path):
    run = trainer(tmp_path, settings(steps=50, learning_rate=1e30))
    with pytest.raises(ValueError, match=r"loss became .* at step .* smaller learning_rate"):
        run.run(data["guide"])
    state = TrainingState.load(tmp_path / "run" / "state.safetensors")
    assert state.step == len(state.losses) < 50
    assert all(torch.isfinite(torch.tensor(state.losses)))


def test_out_of_memory_trains_fewer_windows_at_a_time(data, tmp_path, monkeypatch):
    chosen = settings(window=Grid(2, 2, 2))
    expected = trainer(tmp_path / "enough", chosen).run(data["guide"]).losses
    stock, sizes = models.attention, []

    def scarce(q, *args):
        sizes.append(q.shape[0] * q.shape[1])
        if sizes[-1] > 16:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return stock(q, *args)

    monkeypatch.setattr(models, "attention", scarce)
    with_less = trainer(tmp_path / "scarce", chosen).run(data["guide"]).losses
    assert max(sizes) > 16
    assert with_less == pytest.approx(expected, rel=1e-5)

    def none_left(*_):
        raise torch.cuda.OutOfMemoryError("out of memory")

    monkeypatch.setattr(models, "attention", none_left)
    with pytest.raises(RuntimeError, match=r"memory ran out at step 1.*smaller or shorter"):
        trainer(tmp_path / "none", chosen).run(data["guide"])


def test_a_full_disk_leaves_the_checkpoint_before_intact(data, tmp_path):
    whole = trainer(tmp_path / "whole", settings(steps=4)).run(data["guide"])
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill(step, losses):
        if step == 3:  # from now on, no file may grow past 100 kB
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))

    run = trainer(tmp_path, settings(steps=4, save_every=2))
    try:
        with pytest.raises(RuntimeError, match=r"could not be written .* is intact\. Free some"):
            run.run(data["guide"], on_step=fill)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.rglob("*.part"))
    assert TrainingState.load(tmp_path / "run" / "state.safetensors").step == 2
    assert load_guide_lora(tmp_path / "lora.safetensors", 1.0).file.recipe.steps == 2
    resumed = trainer(tmp_path, settings(steps=4)).run(data["guide"])
    assert resumed.resumed_at == 2
    assert resumed.losses == whole.losses


def test_wrong_bases_are_refused(tmp_path):
    image_model = small_wan(model_type="i2v", in_dim=36)
    with pytest.raises(ValueError, match="36 input channels, 20 of them for an image"):
        trainer(tmp_path, settings(), image_model)
    plan = replace(PLAN, space=replace(PLAN.space, channels=48))
    with pytest.raises(ValueError, match="same model to the plan"):
        trainer(tmp_path, settings(), plan=plan)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"stage": "detail"}, "stage is 'detail'; allowed are proxy, guide"),
        ({"optimizer": "SGD"}, "allowed are AdamW, Prodigy"),
        ({"steps": 0}, "steps is 0"),
    ],
)
def test_wrong_settings_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        settings(**wrong)


def test_prodigy_is_named_where_it_is_missing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "prodigyopt", None)
    with pytest.raises(RuntimeError, match="pip install prodigyopt, or choose AdamW"):
        trainer(tmp_path, settings(optimizer="Prodigy"))


def test_every_sample_is_visited(data, tmp_path):
    run = trainer(tmp_path, settings(accumulate=2))
    drawn = []
    for run.step in range(3):
        drawn.append(sorted(run.sample_index(2, part) for part in range(2)))
    assert drawn == [[0, 1]] * 3
