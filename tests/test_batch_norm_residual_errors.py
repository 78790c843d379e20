"""Bad input of batch_norm_residual is named, and changes nothing."""

import pytest
import torch
from test_batch_norm_residual import images, running
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks

from fastres.ops.batch_norm_residual import batch_norm_residual, reference


def bad_calls():
    x, f, weight, _ = images(2, 3, 2, 2)
    mean, var = running(f, True)
    train, infer = {"training": True}, {}
    yield (x, f[:, :2]), train, ValueError, "f must have shape [2, 3, 2, 2], got [2, 2, 2, 2]"
    yield (x[0, 0, 0], f[0, 0, 0]), train, ValueError, "x must have 2 or more dimensions, got 1"
    yield (x.int(), f), train, TypeError, "x must be float64, float32, "
    yield (x, [1.0]), train, TypeError, "f must be a tensor, got list"
    yield (x, None), train, TypeError, "f must be a tensor, got NoneType"
    yield (None, f), train, TypeError, "x must be a tensor, got NoneType"
    yield (None, f, mean, var), infer, TypeError, "x must be a tensor, got NoneType"
    yield (x, f, mean), train, ValueError, "running_var must be given with the other, got None"
    yield (x, f, None, var), train, ValueError, "running_mean must be given with the other, got"
    yield (x, f), infer, ValueError, "running_mean must be given outside of training, got None"
    yield (x, f, mean[:2], var), train, ValueError, "running_mean must have shape [3], got [2]"
    yield (x, f, mean, var.long()), infer, TypeError, "running_var must be float64, float32, "
    yield (x, f, None, None, weight[None]), train, ValueError, "weight must have shape [3], got [1"
    yield (x, f, None, None, None, 1.0), train, TypeError, "bias must be a tensor, got float"
    yield (x, f, *[None] * 4, x[0, 0, 0]), train, None, ""
    yield (x, f, *[None] * 4, weight), train, ValueError, "gate must have shape [] or [2], got [3]"
    yield (x, f, *[None] * 4, "half"), train, TypeError, "gate must be a number or tensor, got str"
    yield (x, f, *[None] * 5, 1), train, TypeError, "relu must be a bool, got int"
    yield (x, f), {"training": 1}, TypeError, "training must be a bool, got int"
    yield (x, f), {**train, "eps": -1.0}, ValueError, "eps must be >= 0, got -1.0"
    yield (x, f), {**train, "momentum": "no"}, TypeError, "momentum must be a number or None, got"
    yield (x, f, mean, var), {"momentum": "no"}, TypeError, "momentum must be a number or None, got"
    yield (x, f, mean, var), {**train, "momentum": None}, ValueError, "num_batches_tracked must be"
    one = (x[:1, :, :1, :1], f[:1, :, :1, :1])
    yield one, train, ValueError, "x must have more than one value per channel in training, got [1,"


@pytest.mark.parametrize(("args", "kwargs", "error", "message"), list(bad_calls()))
def test_bad_input_names_the_argument_the_rule_and_the_value(args, kwargs, error, message):
    if error is None:
        batch_norm_residual(*args, **kwargs)
        return
    for device in ("cpu", "meta"):
        moved = [a.to(device) if isinstance(a, torch.Tensor) else a for a in args]
        with pytest.raises(error) as raised:
            batch_norm_residual(*moved, **kwargs)
        assert str(raised.value).startswith(f"batch_norm_residual: {message}")


@pytest.mark.parametrize("weight", [torch.ones(2), torch.ones(3, dtype=torch.int), 1.0], ids=str)
def test_a_call_that_is_refused_moves_and_counts_nothing(device, weight):
    x, f, _, _ = images(2, 3, 2, 2, device=device)
    buffers = [*running(f, True), torch.tensor(7, device=device)]
    kept = [t.clone() for t in buffers]
    weight = weight.to(device) if isinstance(weight, torch.Tensor) else weight
    with pytest.raises((TypeError, ValueError), match="weight must"):
        batch_norm_residual(x, f.requires_grad_(), *buffers[:2], weight, training=True,
                            num_batches_tracked=buffers[2])  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(buffers, kept, strict=True))


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_tensors_without_values_are_checked_as_others_are(training):
    with FakeTensorMode() as mode:
        x, f, _, _ = (mode.from_tensor(t) for t in images(2, 3, 2, 2))
        buffers = [mode.from_tensor(t) for t in running(torch.ones(2, 3), True)]
        with pytest.raises(ValueError, match="f must have shape"):
            batch_norm_residual(x, f[:, :, :1], *buffers, training=training)
        assert batch_norm_residual(x, f, *buffers, training=training)[0].shape == x.shape


def test_statistics_move_once_if_a_hook_fails(device):
    def fail(t):
        raise RuntimeError("no place for it")

    x, f, weight, bias = images(2, 3, 2, 2, device=device)
    buffers = [*running(f, True), torch.tensor(7, device=device)]
    kept = [t.clone() for t in buffers]
    given = {"training": True, "num_batches_tracked": buffers[2]}
    with pytest.raises(RuntimeError, match="no place"), saved_tensors_hooks(fail, fail):
        batch_norm_residual(x, f.requires_grad_(), *buffers[:2], weight, bias, **given)
    batch_norm_residual(x, f, *kept[:2], weight, bias, training=True, num_batches_tracked=kept[2])
    assert all(torch.equal(a, b) for a, b in zip(buffers, kept, strict=True))


@pytest.mark.parametrize("at", range(3), ids=["mean", "var", "count"])
def test_negated_views_move_once(device, at):
    x, f, weight, bias = images(2, 3, 2, 2, device=device)
    of = [*running(f, True), torch.tensor(7, device=device)]
    views = [t.clone() for t in of]
    views[at] = torch._neg_view(-of[at])
    for mean, var, count in (of, views):
        batch_norm_residual(x, f, mean, var, weight, bias, training=True, num_batches_tracked=count)
    assert views[2] == 8
    for got, want in zip(views, of, strict=True):
        torch.testing.assert_close(got, want)


def test_statistics_made_in_inference_mode_are_refused_outside_of_it_as_by_torch(device):
    x, f, _, _ = images(2, 3, 2, 2, device=device)
    with torch.inference_mode():
        buffers = running(f, True)
    with pytest.raises(RuntimeError, match="inference tensor"):
        batch_norm_residual(x, f, *buffers, training=True)


@pytest.mark.parametrize("at", range(5), ids=["mean", "var", "weight", "bias", "count"])
def test_tensors_on_meta_among_others_are_refused(at):
    x, f, weight, bias = images(2, 3, 2, 2)
    given = [*running(f, True), weight, bias, torch.tensor(7)]
    given[at] = given[at].to("meta")
    if at < 4:
        with pytest.raises(TypeError, match="must be on cpu, got meta"):
            batch_norm_residual(x, f, *given[:4], training=True, num_batches_tracked=given[4])
    else:
        y, _ = batch_norm_residual(x, f, *given[:4], training=True, num_batches_tracked=given[4])
        torch.testing.assert_close(y, reference(x, f, None, None, weight, bias, training=True)[0])


def test_a_refused_call_leaves_versions_as_they_are(device):
    x, f, _, _ = images(2, 3, 2, 2, device=device)
    buffers = running(f, True)
    versions = [t._version for t in buffers]
    with pytest.raises(ValueError, match="f must have shape"):
        batch_norm_residual(x, f[:, :, :1], *buffers, training=True)
    assert [t._version for t in buffers] == versions
