"""versions: the graph of tensor versions that one forward pass computes."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# Functions by how they act on the activations they read. What is not listed counts as not linear.
SUMS: Final = _words("add sub cat concat stack setitem where")
PRODUCTS: Final = _words(
    """mul multiply div true_divide matmul mm bmm addmm baddbmm einsum linear bilinear conv1d conv2d
    conv3d conv_transpose1d conv_transpose2d conv_transpose3d"""
)
MAPS: Final = _words(
    """batch_norm layer_norm group_norm instance_norm rms_norm pad neg mean sum interpolate upsample
    avg_pool1d avg_pool2d avg_pool3d adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d
    max_pool1d max_pool2d max_pool3d adaptive_max_pool1d adaptive_max_pool2d adaptive_max_pool3d
    dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout masked_fill
    getitem get narrow select split split_with_sizes chunk unbind tensor_split index_select slice
    squeeze unsqueeze expand expand_as repeat roll flip view reshape flatten permute transpose
    movedim swapaxes unfold fold pixel_shuffle pixel_unshuffle channel_shuffle as_strided
    contiguous clone detach to type type_as bfloat16 half float double"""
)
# Functions that only move or copy their one argument: the result is the same tensor to the rule.
COPIES: Final = _words(
    "reshape flatten contiguous clone detach to type type_as bfloat16 half float double cpu cuda"
)
# Functions that read a tensor for its shape alone.
FACTORIES: Final = _words(
    """zeros_like ones_like full_like rand_like randn_like randint_like new_zeros new_ones new_full
    new_tensor"""
)


def tensors_in(tree: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested lists, tuples and mappings, in order."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from tensors_in(item)
    elif isinstance(tree, Mapping):
        for item in tree.values():
            yield from tensors_in(item)


@dataclass(slots=True)
class Node:
    """One version of one tensor."""

    inputs: tuple[int, ...]  # the versions it was computed from; Parameters are not nodes
    name: str  # the function, without underscores
    weight: bool  # the function read a Parameter
    active: bool  # it descends from an input of the model
    weightlike: bool  # it descends from Parameters and from no input
    parent: int  # the nearest version it is a linear function of, by every path; -1 for none
    part: tuple[Any, ...] | None  # where it lies in a larger tensor that it is a view of
    read: bool = False  # some function has read it


class Graph:
    """Versions are numbered in order of creation, so an ancestor has the smaller number.

    Full views, casts and copies are the same version as what they show; in-place functions make a
    new one, seen through every alias of the storage. Tensors are held by weak references only.
    """

    def __init__(self, parameters: Iterable[Tensor], constants: Iterable[Tensor]) -> None:
        self.nodes: list[Node] = []
        self._parameters = {id(t) for t in parameters}
        self._constants = {id(t) for t in constants}
        self._known: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self._shown: dict[int, tuple[weakref.ref[Tensor], int]] = {}  # storage -> latest tensor
        # storage -> version, elements written, and what keeps the address from being used again
        self._written: dict[int, tuple[int, int, StorageWeakRef]] = {}

    def is_parameter(self, t: Tensor) -> bool:
        """Tell whether t is a parameter of the model."""
        return isinstance(t, torch.nn.Parameter) or id(t) in self._parameters

    def knows(self, t: Tensor) -> bool:
        """Tell whether t came out of a function that was seen."""
        entry = self._known.get(id(t))
        return entry is not None and entry[0]() is t

    def version(self, t: Tensor) -> int:
        """Return the current version of t; a tensor never seen before is an input or a constant."""
        entry = self._known.get(id(t))
        if entry is not None and entry[0]() is t:
            k = entry[1]
        else:
            k = self._unseen(t)
            self._set(t, k)
        entry_written = self._written.get(_storage(t))
        if entry_written is not None and (written := entry_written[0]) > k:  # by an alias, since
            same = entry_written[1] == t.numel()
            k = written if same else self._new("setitem", (k, written), False)
            self._set(t, k)
        return k

    def _unseen(self, t: Tensor) -> int:
        other, k = self._shown.get(_storage(t), (None, -1))
        if other is not None and (alias := other()) is not None and alias.numel() == t.numel():
            return k  # a view made out of sight, as by a full backward hook
        active = id(t) not in self._constants and t.dim() > 0
        return self._add(Node((), "", False, active, False, -1, None))

    def _set(self, t: Tensor, k: int) -> None:
        self._known[id(t)] = entry = (weakref.ref(t), k)
        if storage := _storage(t):
            self._shown[storage] = entry

    def _add(self, node: Node) -> int:
        self.nodes.append(node)
        return len(self.nodes) - 1

    def _new(self, name: str, inputs: tuple[int, ...], weight: bool) -> int:
        active = any(self.nodes[i].active for i in inputs)
        heavy = weight or any(self.nodes[i].weightlike for i in inputs)
        parent = self._linear_parent(name, inputs) if active else -1
        return self._add(Node(inputs, name, weight, active, heavy and not active, parent, None))

    def _linear_parent(self, name: str, inputs: tuple[int, ...]) -> int:
        active = [i for i in inputs if self.nodes[i].active]
        if name not in SUMS:
            first = name in MAPS or name in ("div", "true_divide")  # x[ids] is not linear in ids
            linear = len(active) == 1 and (inputs[0] == active[0] if first else name in PRODUCTS)
            return active[0] if linear else -1
        while len(set(active)) > 1:  # climb from the latest until all have met
            latest = max(active)
            active = [self.nodes[i].parent if i == latest else i for i in active]
            if -1 in active:
                return -1
        return active[0]

    def call(self, name: str, read: list[Tensor]) -> tuple[str, tuple[int, ...], bool, list[int]]:
        """Note what a function is about to read, before it may change it in place."""
        if name in FACTORIES:
            read = []
        inputs = tuple(self.version(t) for t in read if not self.is_parameter(t))
        weight = any(self.is_parameter(t) for t in read)
        return name, inputs, weight, [_edits(t, name) for t in read]

    def opaque(self, inputs: tuple[int, ...], weight: bool, out: Any) -> None:
        """Give what a module returned a version, where its inside was not seen."""
        for t in tensors_in(out):
            self._set(t, self._new("", inputs, weight))

    def result(
        self, call: tuple[str, tuple[int, ...], bool, list[int]], read: list[Tensor], out: Any
    ) -> int:
        """Give the tensors that a function returned or changed their versions; return the first."""
        name, inputs, weight, edits = call
        if name in FACTORIES:
            read = []
        by_id = {id(t): (t, was) for t, was in zip(read, edits, strict=True)}
        made = [read[0]] if name == "setitem" else list(tensors_in(out))
        versions = []
        for t in made:
            old, was = by_id.get(id(t), (None, 0))
            if old is not None and _edits(t) == was:
                versions.append(-1 if self.is_parameter(t) else self.version(t))
                continue  # returned as it came
            source = read[0] if len(inputs) == 1 and read else None
            shares = source is not None and _storage(source) == _storage(t) != 0
            if old is None and self._is_same(name, source, t, shares) and not weight:
                k = inputs[0]
            else:
                k = self._new(name, inputs, weight)
                if shares and source is not None and t.numel() < source.numel():
                    self.nodes[k].part = (t.storage_offset(), tuple(t.shape), tuple(t.stride()))
                for i in inputs:
                    self.nodes[i].read = True
            self._set(t, k)
            if old is not None and (storage := _storage(t)):
                self._written[storage] = (k, t.numel(), StorageWeakRef(t.untyped_storage()))  # type: ignore[no-untyped-call]
            versions.append(k)
        return versions[0] if versions else -1

    def chain(
        self,
        call: tuple[str, tuple[int, ...], bool, list[int]],
        read: list[Tensor],
        out: Any,
        count: int,
    ) -> list[int]:
        """Note a function that adds to its first argument `count` times, with what `call` read.

        Returns:
            The versions of the stream: of the argument, and after each add.
        """
        name, beside, weight, edits = call
        versions = [self.version(read[0])]
        for _ in range(count - 1):
            versions.append(self._new(name, (versions[-1], *beside), weight))
        last = name, (versions[-1], *beside), weight, [_edits(read[0]), *edits]
        return [*versions, self.result(last, read, out)]

    @staticmethod
    def _is_same(name: str, source: Tensor | None, t: Tensor, shares: bool) -> bool:
        if source is None or source.numel() != t.numel():
            return False
        return shares or (name in COPIES and source.is_floating_point() == t.is_floating_point())


def function_name(func: Callable[..., Any]) -> str:
    """Return the name that tells what a torch function does: add_, __iadd__ and add are `add`."""
    return str(getattr(func, "__name__", "")).strip("_")


def _storage(t: Tensor) -> int:
    """Return the address of the storage; 0 where there is none, as for sparse and functorch's."""
    try:
        return t.untyped_storage()._cdata if t.layout == torch.strided else 0
    except NotImplementedError:
        return 0


def _edits(t: Tensor, name: str = "view") -> int:
    """Count the in-place changes of t; inference tensors do not, so there the name decides."""
    if t.is_inference():
        return -1 if name in MAPS else -2
    return t._version
