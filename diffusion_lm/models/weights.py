"""Between somebody's tensors and our parameters, both ways, a parameter at a time.

A family says for each of our parameters which tensors fill it (`Leaf`, `Part`). The same list reads a checkpoint into
arrays on any mesh and writes arrays back, so that what one direction does the other undoes.
"""

import collections
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import jax
import ml_dtypes
import numpy as np

_ALIGNMENT = 64  # bytes
_READERS = 4  # parameters read and turned at a time: some wait for the disk. As many are held beside those placed
_TILE = 128  # rows and columns that are turned over at once: a whole matrix would miss the cache at every step


@dataclass(frozen=True, kw_only=True)
class Part:
    """A tensor, or a part of one, in one place of a parameter.

    tensor        its name
    shape         of the place that it fills: the axes of a product's inputs first, then those of its outputs
    inputs        how many axes of `shape` are inputs. The tensor then lies as [outputs, inputs], as PyTorch's Linear
                  has it, and is turned over; 0: it lies as the place does
    inputs_first  it lies as [inputs, outputs] instead, as GPT-2 and Flax have it, and isn't turned
    flat          it has one axis in the tensor, however many the place has: a bias of heads
    place         index of the place in the parameter; (): all of it
    select        index of the part in the tensor; (): all of it
    tensor_shape  of the whole tensor, where `select` takes a part of it
    """

    tensor: str
    shape: tuple[int, ...]
    inputs: int = 0
    inputs_first: bool = False
    flat: bool = False
    place: tuple[int | slice, ...] = ()
    select: tuple[int | slice, ...] = ()
    tensor_shape: tuple[int, ...] = ()

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """The part's shape in the tensor."""
        if not self.inputs:
            return (_size(self.shape),) if self.flat else self.shape
        inputs, outputs = _size(self.shape[: self.inputs]), _size(self.shape[self.inputs :])
        return (inputs, outputs) if self.inputs_first else (outputs, inputs)

    @property
    def whole_shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        return self.tensor_shape or self.stored_shape

    def to_parameter(self, stored: np.ndarray) -> np.ndarray:
        """The part as the tensor has it -> as the parameter has it."""
        return (_turned(stored) if self.inputs and not self.inputs_first else stored).reshape(self.shape)

    def to_tensor(self, value: np.ndarray) -> np.ndarray:
        """The inverse of `to_parameter`."""
        if not self.inputs or self.inputs_first:
            return value.reshape(self.stored_shape)
        return _turned(value.reshape(self.stored_shape[::-1]))


@dataclass(frozen=True, kw_only=True)
class Leaf:
    """One of our parameters: its path in the tree, and what fills it. Places that no part fills are zero. Tensors that
    fill one place must be the same.

    keep_float32  it stays float32 where others are rounded: what chooses experts, biases of a choice
    """

    path: tuple[str, ...]
    parts: tuple[Part, ...]
    keep_float32: bool = False


def _size(axes: Sequence[int]) -> int:
    return functools.reduce(lambda a, b: a * b, axes, 1)


def aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Host memory, not yet written, that begins where a CPU's array may: JAX takes it over instead of copying it."""
    dtype = np.dtype(dtype)
    count = _size(shape) * dtype.itemsize
    raw = np.empty(count + _ALIGNMENT, np.uint8)  # not zeroed: clearing pages takes longer than reading a file
    begin = -raw.ctypes.data % _ALIGNMENT
    return raw[begin : begin + count].view(dtype).reshape(shape)


def _turned(matrix: np.ndarray) -> np.ndarray:
    """The transpose, in memory of its own."""
    out = aligned(matrix.shape[::-1], matrix.dtype)
    _turn(matrix, out)
    return out


def _turn(matrix: np.ndarray, out: np.ndarray) -> None:
    rows, columns = matrix.shape
    for i in range(0, rows, _TILE):
        for j in range(0, columns, _TILE):
            out[j : j + _TILE, i : i + _TILE] = matrix[i : i + _TILE, j : j + _TILE].T


def check_names(
    source: str, tensors: Mapping[str, Any], leaves: Iterable[Leaf], buffers: Callable[[str], bool]
) -> None:
    """Raises ValueError with one line, before anything is read, unless the tensors are those that the leaves name, of
    the shapes that they name. buffers: names that may be there and are no parameters."""
    wanted = {part.tensor: part.whole_shape for leaf in leaves for part in leaf.parts}
    missing = sorted(wanted.keys() - tensors.keys())
    extra = sorted(name for name in tensors.keys() - wanted.keys() if not buffers(name))
    wrong = [name for name, shape in wanted.items() if name in tensors and tuple(tensors[name].shape) != shape]
    if missing:
        raise ValueError(f"{source} has no tensor {missing[0]}{_more(missing)}, which its config.json asks for")
    if extra:
        raise ValueError(f"{source} holds {extra[0]}{_more(extra)}, which a network of its config.json doesn't have")
    if wrong:
        name = wrong[0]
        raise ValueError(
            f"{source} holds {name}{_more(wrong)} of shape {tuple(tensors[name].shape)}; its config.json makes it "
            f"{wanted[name]}"
        )
    kinds = {name: np.dtype(tensors[name].dtype) for name in wanted}
    odd = [name for name, kind in kinds.items() if not (kind.kind == "f" or kind in _SMALL_FLOATS)]
    if odd:
        raise ValueError(f"{source} holds {odd[0]}{_more(odd)} as {kinds[odd[0]]}, which is no number type of weights")


_SMALL_FLOATS = (np.dtype(ml_dtypes.bfloat16),)


def _more(names: Sequence[str]) -> str:
    return f" (and {len(names) - 1} more)" if len(names) > 1 else ""


def read_leaf(leaf: Leaf, tensors: Mapping[str, Any], shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """One parameter in host memory, of `shape` and `dtype`; beside it no more than one tensor is held."""
    whole = len(leaf.parts) == 1 and not leaf.parts[0].place and leaf.parts[0].shape == shape
    if whole:
        return leaf.parts[0].to_parameter(_stored(leaf.parts[0], tensors, dtype))
    out = aligned(shape, dtype)
    if sum(_size(part.shape) for part in leaf.parts) < out.size:
        out.fill(0)
    for i, part in enumerate(leaf.parts):
        stored, before = _stored(part, tensors, dtype), [o for o in leaf.parts[:i] if o.place == part.place]
        for other in before:
            if not np.array_equal(out[part.place], part.to_parameter(stored)):
                raise ValueError(f"{other.tensor} and {part.tensor} differ, which are one parameter here")
        if not before:
            _fill(out, part, stored)
    return out


def _fill(out: np.ndarray, part: Part, stored: np.ndarray) -> None:
    """out[part.place] = part.to_parameter(stored), turned over straight into the place where that is a matrix."""
    place = out[part.place]
    matrix = place.reshape(stored.shape[::-1]) if part.inputs and not part.inputs_first else None
    if matrix is None or not np.may_share_memory(matrix, place):  # a copy
        out[part.place] = part.to_parameter(stored)
    else:
        _turn(stored, matrix)


def _stored(part: Part, tensors: Mapping[str, Any], dtype: Any) -> np.ndarray:
    """The part as it lies in the tensor, in our dtype; of a tensor's first axis only what is selected is read."""
    tensor, select = tensors[part.tensor], part.select
    if select and isinstance(select[0], slice):
        found = tensor.read(select[0])[(slice(None), *select[1:])]
    elif select:
        found = tensor.read(slice(select[0], select[0] + 1))[(0, *select[1:])]
    else:
        found = tensor.read()
    return np.asarray(found).astype(dtype, copy=False)


def load_parameters(
    leaves: Iterable[Leaf], tensors: Mapping[str, Any], abstract: Any, progress: Callable[[int], None] = lambda n: None
) -> Any:
    """The parameter tree of `abstract` (ShapeDtypeStructs with their shardings), read leaf by leaf onto the devices.

    Each device is handed its own part only. progress is called with the bytes of each leaf. ValueError where leaves and
    tree don't match.
    """
    by_path = {leaf.path: leaf for leaf in leaves}
    flat, tree = jax.tree_util.tree_flatten_with_path(abstract)
    paths = [tuple(key.key for key in path) for path, _ in flat]
    if by_path.keys() != set(paths):
        odd = sorted(by_path.keys() ^ set(paths))
        raise ValueError(f"the family's names and the network's parameters differ in {'/'.join(odd[0])}")
    arrays = []
    with ThreadPoolExecutor(_READERS) as readers:

        def read(i: int) -> Future[np.ndarray]:
            return readers.submit(read_leaf, by_path[paths[i]], tensors, flat[i][1].shape, flat[i][1].dtype)

        ahead = collections.deque(read(i) for i in range(min(_READERS, len(flat))))
        for i, (_, wanted) in enumerate(flat):
            host = ahead.popleft().result()
            if i + _READERS < len(flat):
                ahead.append(read(i + _READERS))
            arrays.append(_placed(host, wanted))
            progress(host.nbytes)
            del host
    return jax.tree_util.tree_unflatten(tree, arrays)


def _placed(host: np.ndarray, wanted: jax.ShapeDtypeStruct) -> jax.Array:
    if wanted.sharding is None:
        return jax.device_put(host)
    return jax.make_array_from_callback(host.shape, wanted.sharding, lambda index: host[index])


def write_tensors(leaves: Iterable[Leaf], params: Any, dtype: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Name and array of each tensor, as the family's files have them: what `load_parameters` read, bit for bit where
    the dtypes are the same."""
    flat = {tuple(key.key for key in path): a for path, a in jax.tree_util.tree_flatten_with_path(params)[0]}
    fused: dict[str, np.ndarray] = {}
    left: dict[str, int] = {}
    leaves = list(leaves)
    for leaf in leaves:
        for part in leaf.parts:
            left[part.tensor] = left.get(part.tensor, 0) + 1
    for leaf in leaves:
        host = np.asarray(jax.device_get(flat[leaf.path]))
        for part in leaf.parts:
            value = part.to_tensor(host[part.place]).astype(np.float32 if leaf.keep_float32 else dtype, copy=False)
            left[part.tensor] -= 1
            if not part.select:
                yield part.tensor, value
                continue
            whole = fused.setdefault(part.tensor, np.empty(part.whole_shape, value.dtype))
            whole[part.select] = value
            if not left[part.tensor]:
                yield part.tensor, fused.pop(part.tensor)
