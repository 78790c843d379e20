"""Claims about fastres.nn.ResidualMLP: its formula, its names, and that any depth starts well."""

import copy
import math

import pytest
import torch
from models import stacks

from fastres import declaring
from fastres.nn import ResidualMLP, ResidualStack
from fastres.ops import native
from fastres.training import Recipe, Stepper

ACTIVATIONS = {
    "relu": lambda v: v.clamp(min=0),
    "gelu": lambda v: v * (1 + torch.erf(v / math.sqrt(2))) / 2,
    "gelu_tanh": lambda v: v / (1 + torch.exp(-math.sqrt(8 / math.pi) * (v + 0.044715 * v**3))),
    "silu": lambda v: v / (1 + torch.exp(-v)),
    "tanh": lambda v: (torch.exp(2 * v) - 1) / (torch.exp(2 * v) + 1),
    "sigmoid": lambda v: 1 / (1 + torch.exp(-v)),
    "identity": lambda v: v,
}


@pytest.mark.parametrize("name", ACTIVATIONS)
@pytest.mark.parametrize(("blocks", "hidden"), [(0, None), (1, 3), (4, None)])
def test_it_computes_the_formula_of_its_docstring(name, blocks, hidden):
    torch.manual_seed(0)
    model = ResidualMLP(6, 3, width=5, blocks=blocks, hidden=hidden, activation=name).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter)  # the biases too
    x = torch.randn(7, 6, dtype=torch.float64)
    stream = x @ model.input.weight.T + model.input.bias
    stack = model.stack
    for i in range(blocks):
        inner = ACTIVATIONS[name](stream @ stack.w1[i].T + stack.b1[i])
        stream = stream + inner @ stack.w2[i].T + stack.b2[i]
    expected = stream @ model.head.weight.T + model.head.bias
    torch.testing.assert_close(model(x), expected)


def test_the_names_and_shapes_in_its_state_dict_are_these():
    state = ResidualMLP(64, 10, width=8, blocks=5, hidden=16).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == {
        "input.weight": (8, 64),
        "input.bias": (8,),
        "stack.w1": (5, 16, 8),
        "stack.b1": (5, 16),
        "stack.w2": (5, 8, 16),
        "stack.b2": (5, 8),
        "head.weight": (10, 8),
        "head.bias": (10,),
    }


@pytest.mark.parametrize("blocks", [1, 6, 60, 300, 1000])
def test_the_stream_starts_with_at_most_e_times_its_energy_at_any_depth(blocks):
    torch.manual_seed(0)
    stack = ResidualStack(64, blocks)
    x = torch.randn(256, 64)
    with torch.no_grad():
        growth = (stack(x).square().sum() / x.square().sum()).item()
    assert growth == pytest.approx((1 + 1 / blocks) ** blocks, rel=0.25)


@pytest.mark.parametrize("blocks", [1, 300])
def test_the_gradient_arrives_at_the_first_block_as_large_as_it_left_the_last(blocks):
    torch.manual_seed(0)
    x = torch.randn(256, 64, requires_grad=True)
    ResidualStack(64, blocks)(x).sum().backward()
    assert 0.5 < x.grad.square().mean().item() < 5  # 1 at the output, about e at the input


def test_no_blocks_return_the_input():
    x = torch.randn(3, 8)
    assert torch.equal(ResidualStack(8, 0)(x), x)


def test_the_stack_takes_any_leading_dimensions():
    stack = ResidualStack(8, 3)
    x = torch.randn(2, 5, 8)
    torch.testing.assert_close(stack(x).flatten(0, 1), stack(x.flatten(0, 1)))


def test_images_are_flattened():
    model = ResidualMLP(12, 4, width=8, blocks=2)
    x = torch.randn(5, 3, 2, 2)
    assert torch.equal(model(x), model(x.flatten(1)))


def test_meta_tensors_give_shapes():
    model = ResidualMLP(12, 4, width=8, blocks=2).to("meta")
    assert model(torch.zeros(5, 12, device="meta")).shape == (5, 4)


def test_an_empty_batch_gives_empty_logits():
    assert ResidualMLP(12, 4, width=8, blocks=2)(torch.zeros(0, 12)).shape == (0, 4)


def test_a_step_on_300_blocks_reaches_every_parameter_and_stays_finite():
    torch.manual_seed(0)
    model = ResidualMLP(8, 3, width=8, blocks=300)
    before = copy.deepcopy(model.state_dict())
    loss = Stepper(model, Recipe(), 10)(torch.randn(32, 8), torch.arange(32) % 3)
    assert loss < 10
    for name, value in model.state_dict().items():
        assert value.isfinite().all()
        assert not torch.equal(value, before[name]), name


def test_training_gives_what_it_gives_with_separate_blocks():
    fused, separate = stacks(6)
    x = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    y = (x[:, 0] > 0).long() + (x[:, 1] > 0)
    losses = []
    for model in (fused, separate):
        step = Stepper(model, Recipe(lr=1e-2), 60)
        losses.append(torch.stack([step(x, y) for _ in range(60)]))
    assert losses[0][-1] < losses[0][0] / 2  # it learned
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=1e-4)
    for (name, one), other in zip(fused.named_parameters(), separate.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4, msg=name)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(8,), (3, 8), (2, 0, 8), (2, 3, 4, 8)])
def test_the_fused_stack_is_its_separate_blocks_in_every_dtype_and_shape(dtype, shape):
    fused, separate = (model.stack.to(dtype) for model in stacks(5, "gelu_tanh"))
    x = torch.randn(shape).to(dtype)
    tolerance = {torch.bfloat16: 5e-2, torch.float16: 5e-3}.get(dtype, 1e-5)
    torch.testing.assert_close(fused(x), separate(x), rtol=tolerance, atol=tolerance)


def test_it_compiles_to_one_graph_and_exports_with_a_dynamic_batch():
    model, x = ResidualMLP(4, 3, width=8, blocks=5), torch.randn(6, 4)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    expected = torch.autograd.grad(model(x).sum(), model.stack.w1)
    torch.testing.assert_close(torch.autograd.grad(compiled(x).sum(), model.stack.w1), expected)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    torch.testing.assert_close(program.module()(x[:3]), model(x[:3]))


@pytest.mark.skipif(native.raw("_mlp_stack") is None, reason="the compiled library is not built")
@pytest.mark.parametrize("grad", [True, False])
def test_the_stack_is_one_operator(grad):
    model = ResidualStack(8, 300)
    with torch.profiler.profile() as profile, torch.set_grad_enabled(grad):
        out = model(torch.randn(2, 8))
        if grad:
            out.sum().backward()
    names = [e.key for e in profile.key_averages() if e.key.startswith("fastres::")]
    assert names == ["fastres::_mlp_stack", "fastres::_mlp_stack_backward"][: 1 + grad]
    assert all(e.count < 20 for e in profile.key_averages())


def test_the_seed_decides_the_weights():
    def drawn(seed):
        torch.manual_seed(seed)
        return ResidualMLP(8, 3, width=8, blocks=4).stack.w1

    assert torch.equal(drawn(3), drawn(3))
    assert not torch.equal(drawn(3), drawn(4))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"width": 0}, ValueError, "width must be >= 1, got 0"),
        ({"blocks": -1}, ValueError, "blocks must be >= 0, got -1"),
        ({"hidden": 0}, ValueError, "hidden must be >= 1, got 0"),
        ({"in_features": 0}, ValueError, "in_features must be >= 1, got 0"),
        ({"classes": -2}, ValueError, "classes must be >= 1, got -2"),
        ({"width": 8.0}, TypeError, r"width must be an integer, got 8\.0"),
        ({"blocks": True}, TypeError, "blocks must be an integer, got True"),
        ({"activation": "softplus"}, ValueError, "activation must be one of relu, .* 'softplus'"),
    ],
)
def test_a_wrong_argument_is_named_with_its_rule_and_value(change, error, message):
    arguments = {"in_features": 8, "classes": 3, "width": 8, "blocks": 2} | change
    with pytest.raises(error, match=f"^ResidualMLP: {message}"):
        ResidualMLP(**arguments)


@pytest.mark.parametrize("shape", [(5, 11), (5, 3, 2), (12,)])
def test_samples_of_another_size_are_refused(shape):
    with pytest.raises(ValueError, match="ResidualMLP: x must have 12 features per sample, got"):
        ResidualMLP(12, 4, width=8, blocks=2)(torch.zeros(shape))


@pytest.mark.parametrize("kernels", [True, False])
def test_gates_as_an_input_scale_the_branches(kernels, monkeypatch):
    if not kernels:
        monkeypatch.setattr(declaring, "has_kernel", lambda _: False)
    torch.manual_seed(0)
    model, x = ResidualMLP(4, 3, width=8, blocks=3), torch.randn(5, 4)
    by = torch.tensor([0.0, 0.5, 2.0])
    want = model.input(x)
    for block, scale in enumerate(by):
        alone = ResidualStack(8, 1)
        for name, weight in model.stack.named_parameters():
            getattr(alone, name).data = weight[block : block + 1].data
        want = want + scale * (alone(want) - want)
    torch.testing.assert_close(model(x, by), model.head(want), rtol=1e-5, atol=1e-6)
    each = by[:, None].expand(3, 5).contiguous()
    torch.testing.assert_close(model(x, each), model(x, by))
    torch.testing.assert_close(model(x, 0.0), model.head(model.input(x)))
    assert torch.equal(model(x, torch.ones(3)), model(x))
    leaf = by.clone().requires_grad_()
    model(x, leaf).sum().backward()
    assert leaf.grad.abs().min() > 0
    with pytest.raises(
        ValueError, match=r"gate must have shape \[\], \[3\] or \[3, 5\], got \[4\]"
    ):
        model(x, torch.ones(4))
