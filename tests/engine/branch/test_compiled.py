"""The stock compile node beside the detail branch."""

import pytest
import torch
from atlasvid.engine.branch.compiled import Compiled, parts_of
from atlasvid.engine.families import wan
from comfy_api.torch_helpers import set_torch_compile_wrapper
from test_run import branch, sample
from wan import relative_error, small_wan


@pytest.fixture(scope="module")
def base():
    return small_wan(num_layers=2)


@pytest.fixture
def graphs():
    """A compiler that runs what it is given, and a list of the graphs that it was given."""
    torch._dynamo.reset()
    seen = []

    def backend(graph, inputs, **_):
        seen.append([str(node.target) for node in graph.graph.nodes])
        return graph.forward

    yield seen, backend
    torch._dynamo.reset()


@pytest.mark.parametrize("first", ["compile", "branch"])
@pytest.mark.parametrize("overlap", ["shifted", "sliding"])
def test_the_parts_of_a_block_are_compiled(base, graphs, first, overlap):
    seen, backend = graphs
    model = base.clone()
    if first == "compile":
        set_torch_compile_wrapper(model, backend)
    model = branch(model, overlap=overlap)
    if first == "branch":
        set_torch_compile_wrapper(model, backend)
    out = sample(model)
    linears = [sum("linear" in name for name in graph) for graph in seen]
    assert 1 in linears, "queries or keys"
    assert 2 in linears, "feed-forward"
    assert max(linears) == 2, "no loop over windows or blocks is traced"
    assert len(seen) < 20, "blocks and chunks share what was compiled"
    assert relative_error(out, sample(branch(base, overlap=overlap))) < 1e-5


def test_a_compiler_that_fails_is_left_out(base, graphs, caplog):
    def backend(*_, **__):
        raise RuntimeError("no compiler is installed")

    model = branch(base)
    set_torch_compile_wrapper(model, backend)
    assert torch.equal(sample(model), sample(branch(base)))
    said = [r.message for r in caplog.records if "torch.compile failed" in r.message]
    assert len(said) == 3
    assert "feed_forward, which now runs without" in said[-1]


def test_an_error_without_a_message_is_named(graphs, caplog):
    def backend(*_, **__):
        raise MemoryError

    part = Compiled(torch.neg, {"backend": backend})
    part.compiled = backend  # what torch.compile raises always has a message
    assert part(torch.ones(1)) == -1
    assert "now runs without: MemoryError" in caplog.text


def test_cuda_graphs_are_not_used():
    """Their results lie where the next call writes."""
    assert parts_of(wan, {"backend": "cudagraphs"}) == parts_of(wan, None)
    assert parts_of(wan, None).keys is wan.keys
