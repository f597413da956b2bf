"""Whole sampling runs with ComfyUI's own sampler: caches, cancelling, noise, memory."""

import ctypes
import gc
import weakref

import comfy.memory_management
import comfy.model_management
import comfy.sample
import comfy.sd
import comfy_aimdo.model_vbar
import pytest
import torch
from atlasvid.engine.branch import forward as engine_forward
from atlasvid.engine.branch import guide, progress
from atlasvid.engine.branch.apply import apply_detail_branch
from atlasvid.engine.branch.run import SamplingRun
from atlasvid.engine.comfyui import management, models, server
from atlasvid.engine.device.chunks import ChunkSize, in_chunks
from atlasvid.engine.geometry.grid import Grid
from atlasvid.engine.geometry.windows import SlidingWindows
from measure import resident_bytes
from torch.multiprocessing.reductions import StorageWeakRef
from wan import forward as direct
from wan import plan_of, rand, relative_error, small_wan

PLAN = plan_of((5, 16, 16), (2, 8, 8))
WINDOW = Grid(2, 4, 4)


@pytest.fixture(scope="module")
def wan():
    return small_wan()


def test_a_prediction_that_is_no_number_ends_the_sampling():
    model = small_wan()
    weight = model.model.diffusion_model.blocks[0].ffn[0].weight
    weight.data[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"prediction contains NaN .* Check the model's file"):
        sample(branch(model), steps=2)


@pytest.fixture
def evaluations(monkeypatch):
    """Counts evaluations of the guide stream."""
    seen = []
    stock = guide.GuideStream._evaluate

    def counted(self):
        seen.append(self)
        return stock(self)

    monkeypatch.setattr(guide.GuideStream, "_evaluate", counted)
    return seen


def branch(wan, guide_noise="clean", **kwargs):
    proxy = rand(1, 16, 2, 8, 8, seed=3)
    return apply_detail_branch(wan, PLAN, proxy, WINDOW, guide_noise, **kwargs)


def sample(model, steps=3, cfg=5.0, seed=7, latent=None, sampler="euler"):
    latent = torch.zeros(1, 16, 5, 16, 16) if latent is None else latent
    noise = comfy.sample.prepare_noise(latent, seed)
    positive, negative = [[rand(1, 16, 4096, seed=1), {}]], [[rand(1, 16, 4096, seed=2), {}]]
    with torch.inference_mode():
        return comfy.sample.sample(
            model,
            noise,
            steps,
            cfg,
            sampler,
            "simple",
            positive,
            negative,
            latent,
            seed=seed,
            disable_pbar=True,
        )


@pytest.mark.parametrize("weight", [1, 8])
def test_a_clean_guide_is_evaluated_once_for_all_steps(wan, evaluations, weight):
    kept = sample(branch(wan, guide_weight=weight), steps=4)
    once = len(evaluations)
    assert once in (1, 2), "once per conditioning, or once for both together"
    evaluations.clear()
    sample(branch(wan, guide_weight=weight), steps=8)
    assert len(evaluations) == once
    evaluations.clear()
    sample(branch(wan, "matched", guide_weight=weight), steps=4)
    assert len(evaluations) == 4 * once
    evaluations.clear()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models, "has_scheduled_weights", lambda model: True)
        recomputed = sample(branch(wan, guide_weight=weight), steps=4)
    assert len(evaluations) == 4 * once
    assert torch.equal(kept, recomputed), "a cache must not change the result"


@pytest.mark.parametrize("overlap", ["shifted", "sliding"])
@pytest.mark.parametrize("weight", [1, 8])
def test_tokens_in_host_memory_give_the_same_result(wan, overlap, weight, monkeypatch):
    from atlasvid.engine.device import tokens

    made = []
    stock = tokens.HostTokens.__init__

    def counted(self, *args):
        made.append(self)
        stock(self, *args)

    monkeypatch.setattr(tokens.HostTokens, "__init__", counted)
    free = sample(branch(wan, overlap=overlap, guide_weight=weight))
    assert not made
    scarce = sample(branch(wan, overlap=overlap, guide_weight=weight, memory_budget="0.001 GB"))
    sizes = {len(each.values) for each in made}
    ring = SlidingWindows(PLAN.tokens, WINDOW).ring.count + PLAN.proxy_tokens.count
    ring = {ring} if overlap == "sliding" else set()
    assert sizes == {PLAN.tokens.count} | ring
    assert len(made) <= 2 + len(ring), "made once for all forwards of a run"
    assert all(each._outbox._worker._shutdown for each in made)
    assert relative_error(scarce, free) < 1e-5


@pytest.mark.parametrize("overlap", ["shifted", "sliding"])
def test_what_does_not_fit_after_all_goes_to_host_memory(wan, overlap, monkeypatch):
    def scarce(like, shape):
        asked.append(shape)

    asked = []
    expected = sample(branch(wan, overlap=overlap))
    monkeypatch.setattr(management, "empty_if_it_fits", scarce)
    assert relative_error(sample(branch(wan, overlap=overlap)), expected) < 1e-5
    assert asked


def test_conditionings_keep_one_guide_however_they_are_batched():
    run, keys = SamplingRun(seed=0), [(torch.zeros(1), torch.zeros(1))]
    for together in (("a", "b"), ("a",), ("b",)):
        run.keep_guide_keys(("model", "settings", together), keys)
    assert [key[-1] for key in run.guide_keys] == [("a",), ("b",)]
    run.keep_guide_keys(("model", "other settings", ("a", "b")), keys)
    assert len(run.guide_keys) == 3
    run.keep_guide_keys(("model", "settings", ("a", "b")), keys)
    assert len(run.guide_keys) == 2


def test_a_run_frees_what_it_held(wan, monkeypatch):
    runs, held = [], []
    stock = SamplingRun.__init__

    def recorded(self, *args, **kwargs):
        stock(self, *args, **kwargs)
        runs.append(weakref.ref(self))

    monkeypatch.setattr(SamplingRun, "__init__", recorded)

    def peek(denoised):
        run = runs[-1]()
        held.extend(weakref.ref(k) for pairs in run.guide_keys.values() for k, _ in pairs)
        return denoised["denoised"]

    patched = branch(wan)
    patched.set_model_sampler_post_cfg_function(peek)
    sample(patched)
    gc.collect()
    assert held
    assert all(ref() is None for ref in held + runs)


@pytest.mark.parametrize("overlap", ["shifted", "sliding"])
def test_a_blocks_guide_keys_are_gone_when_those_of_the_next_are_there(overlap, monkeypatch):
    stock, freed = guide.GuideStream._evaluate, []

    def watched(self):
        before = None
        for pair in stock(self):
            if before is not None:
                freed.append(before.expired())
            before = StorageWeakRef(pair[0].untyped_storage())
            yield pair
            del pair

    monkeypatch.setattr(guide.GuideStream, "_evaluate", watched)
    sample(branch(small_wan(num_layers=3), "matched", overlap=overlap), steps=1)
    assert freed
    assert all(freed)


def test_a_run_that_fails_frees_what_it_held(wan, monkeypatch):
    runs = []
    stock = SamplingRun.__init__

    def recorded(self, *args, **kwargs):
        stock(self, *args, **kwargs)
        runs.append(self)

    monkeypatch.setattr(SamplingRun, "__init__", recorded)

    def fail(args):
        assert runs[-1].guide_keys
        raise RuntimeError("another node broke")

    patched = branch(wan)
    patched.set_model_sampler_post_cfg_function(fail)
    with pytest.raises(RuntimeError, match="another node broke"):
        sample(patched)
    assert not runs[-1].guide_keys
    assert sample(branch(wan)).isfinite().all()


def test_memory_returns_to_its_level(monkeypatch):
    """Runs, an error and a cancel in a row: the process keeps nothing of them."""
    wan = small_wan(num_layers=2)
    plan = plan_of((9, 48, 48), (3, 48, 48))
    proxy = rand(1, 16, 3, 48, 48, seed=3)  # keys and values of 1,728 tokens, 14 MB per run

    def run(fail=None):
        model = apply_detail_branch(wan, plan, proxy, Grid(4, 16, 16), "clean")
        if fail:
            model.set_model_sampler_post_cfg_function(fail)
        return sample(model, steps=2, latent=torch.zeros(1, 16, 9, 48, 48))

    def broken(args):
        raise RuntimeError("another node broke")

    def cancelled(args):
        comfy.model_management.interrupt_current_processing()
        return args["denoised"]

    def level():
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        return resident_bytes()

    run()
    before = level()
    for _ in range(2):
        run()
        with pytest.raises(RuntimeError, match="another node broke"):
            run(broken)
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            run(cancelled)
    assert level() - before < 20e6


def test_cancel_leaves_within_a_step(wan, monkeypatch):
    calls = []
    stock = models.attention

    def cancelling(*args):
        calls.append(1)
        if len(calls) == 5:
            comfy.model_management.interrupt_current_processing()
        return stock(*args)

    monkeypatch.setattr(models, "attention", cancelling)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample(branch(wan))
    assert len(calls) <= 6, "the next chunk must not begin"


def test_the_guide_noise_is_the_samplers_own(wan):
    """One fixed noise per seed, and the global generator stays where it was."""
    seen = []
    stock = SamplingRun.noise_like

    def recorded(self, latent):
        seen.append(stock(self, latent))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SamplingRun, "noise_like", recorded)
        sample(branch(wan, "matched"), seed=11)
    assert all(noise is seen[0] for noise in seen)
    assert torch.equal(seen[0], comfy.sample.prepare_noise(torch.zeros(1, 16, 2, 8, 8), 11))
    torch.manual_seed(5)
    before = torch.get_rng_state()
    models.seeded_noise(torch.zeros(1, 16, 2, 8, 8), 11)
    assert torch.equal(before, torch.get_rng_state())


def test_nan_in_the_start_latent_is_refused(wan):
    latent = torch.full((1, 16, 5, 16, 16), float("nan"))
    with pytest.raises(ValueError, match="NaN or infinite"):
        sample(branch(wan), latent=latent)


def test_the_stock_model_samples_as_before(wan):
    before = sample(wan)
    sample(branch(wan))
    assert torch.equal(before, sample(wan))


def test_outside_its_part_of_the_sampling_the_stock_forward_runs(wan):
    assert torch.equal(sample(branch(wan, start_percent=1.0, end_percent=1.0)), sample(wan))
    halfway = sample(branch(wan, end_percent=0.5))
    assert relative_error(halfway, sample(wan)) > 1e-3
    assert relative_error(halfway, sample(branch(wan))) > 1e-3


def test_weights_are_loaded_beside_what_the_forward_needs(wan, monkeypatch):
    asked = []
    stock = comfy.model_management.load_models_gpu

    def recorded(models, memory_required=0, **kwargs):
        asked.append(kwargs["minimum_memory_required"])  # what weights leave free
        return stock(models, memory_required=memory_required, **kwargs)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", recorded)
    sample(wan, steps=1)
    sample(branch(wan, memory_budget="0.1 GB"), steps=1)
    stock_estimate, ours = asked
    assert ours == pytest.approx(0.1 * 2**30, rel=0.01)
    assert ours != stock_estimate


def test_progress_knows_steps_and_time(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: clock[0])
    said = []
    monkeypatch.setattr(server, "show_progress", said.append)
    report = progress.RunProgress(schedule=(1.0, 0.75, 0.5, 0.25, 0.0), blocks=10, tokens=1280)
    for sigma in (1.0, 0.75, 0.5):
        for _ in range(2):  # positive and negative
            report.begin_forward(sigma)
            for block in range(10):
                report.at_block(block, "detail")
                clock[0] += 1.0
    assert "detail, step 3/4, block 10/10" in said[-1]
    assert report.fraction(10) == pytest.approx(0.75)
    assert said[-1].endswith("about 21 s left")
    assert "left" not in said[0]
    report.done()
    assert said[-1] == "detail done: 3 steps in 1 min 0 s, 1,280 tokens"


def test_progress_of_samplers_that_visit_levels_in_between(monkeypatch):
    monkeypatch.setattr(server, "show_progress", lambda text: None)
    report = progress.RunProgress(schedule=(1.0, 0.5, 0.0), blocks=4, tokens=1280)
    fractions = []
    for sigma in (1.0, 0.7, 0.5, 0.3):  # dpm_2: a level of the schedule, then one in between
        report.begin_forward(sigma)
        fractions.append(report.fraction(0))
        assert report.fraction(4) <= 1
    assert fractions == [0.0, 0.25, 0.5, 0.75]


@pytest.mark.parametrize("first", ["cache", "branch"])
def test_other_wrappers_of_the_forward_stay_outside(wan, first):
    """The stock EasyCache skips forwards, whichever node came first."""
    from comfy_extras.nodes_easycache import EasyCacheNode

    calls = []

    def add_cache(model):
        return EasyCacheNode.execute(model, 9.0, 0.0, 1.0, False).args[0]

    patched = branch(add_cache(wan)) if first == "cache" else add_cache(branch(wan))
    with pytest.MonkeyPatch.context() as patch:
        stock = engine_forward.DetailForward.__call__
        patch.setattr(
            engine_forward.DetailForward,
            "__call__",
            lambda self, *args: calls.append(1) or stock(self, *args),
        )
        sample(patched, steps=8, cfg=1.0)
    assert 0 < len(calls) < 8


def test_a_size_that_ran_out_of_memory_is_not_tried_again(wan, monkeypatch):
    failures = []
    stock = models.attention

    def scarce(q, k, v, heads, options):
        if len(q) > 4:
            failures.append(len(q))
            raise torch.cuda.OutOfMemoryError("out of memory")
        return stock(q, k, v, heads, options)

    monkeypatch.setattr(models, "attention", scarce)
    sample(branch(wan), steps=3)
    assert 1 <= len(failures) <= 4, "halved until it fits, once for the run"


def test_weights_that_give_way_count_as_free_memory(wan, monkeypatch):
    """ComfyUI's dynamic VRAM keeps weights on the card until something else needs their place."""
    weights = 2**60
    monkeypatch.setattr(comfy.memory_management, "aimdo_enabled", True)
    monkeypatch.setattr(comfy_aimdo.model_vbar, "vbars_analyze", lambda *_: weights)
    stock, shares = engine_forward.plan_memory, []

    def seen(work, share, *args):
        shares.append(share)
        return stock(work, share, *args)

    monkeypatch.setattr(engine_forward, "plan_memory", seen)
    sample(branch(wan), steps=1)
    assert shares
    assert min(shares) >= weights // 2


def test_a_single_item_out_of_memory_is_tried_once_more():
    """What copies on their way held is free by then."""
    tried = []

    def compute(start, stop):
        tried.append(start)
        if tried.count(start) < 2:
            raise torch.cuda.OutOfMemoryError("out of memory")

    in_chunks([10, 20], ChunkSize(10), compute)
    assert tried == [0, 0, 1, 1]

    def never(start, stop):
        tried.append(start)
        raise torch.cuda.OutOfMemoryError("out of memory")

    tried.clear()
    with pytest.raises(torch.cuda.OutOfMemoryError):
        in_chunks([10, 20], ChunkSize(20), never)
    assert tried == [0, 0, 0], "both, the first, the first again"


def test_a_failed_copy_to_the_host_is_not_repaired_by_halving():
    from atlasvid.engine.device.tokens import HostTokens

    tokens = HostTokens(8, 4, torch.float32, torch.device("cpu"))
    tokens.write(torch.arange(2), torch.zeros(2, 5))  # does not fit
    with pytest.raises(RuntimeError, match="could not keep tokens on the host"):
        tokens.settle()
    tokens.close()


@pytest.mark.parametrize("weight", [1, 8])
def test_half_precision_is_close_to_full(weight):
    from atlasvid.engine.families import tiny

    state = tiny.wan_state(num_layers=2, ffn_dim=512)
    latent = rand(1, 16, 5, 16, 16, seed=1)
    t, text = torch.tensor([700.0]), rand(1, 16, 4096, seed=2)
    full_model = models.load_diffusion_model(dict(state))
    full = direct(branch(full_model, guide_weight=weight), latent, t, text)
    half_state = {k: v.bfloat16() for k, v in state.items()}
    half_model = comfy.sd.load_diffusion_model_state_dict(
        half_state, model_options={"dtype": torch.bfloat16}
    )
    half = direct(branch(half_model, guide_weight=weight), latent.bfloat16(), t, text.bfloat16())
    assert half.dtype == torch.bfloat16
    assert relative_error(half.float(), full) < 0.05


@pytest.mark.parametrize(
    ("seconds", "text"), [(42.3, "42 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")]
)
def test_durations(seconds, text):
    assert progress.duration(seconds) == text
