"""Where arrays lie: the mesh, the one table from logical axes to mesh axes, and the shardings that follow.

Only this file knows the names of mesh axes. Layers name logical axes; everything else hands meshes and shardings on.
"""

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

AXES = ("data", "fsdp", "expert", "sequence", "tensor")

# Logical axis -> mesh axes. Of two logical axes in one array that want the same mesh axis, the first gets it.
RULES = (
    ("batch", ("data", "fsdp", "expert")),
    ("routed", ("data", "fsdp")),  # rows again, where experts are cut
    ("experts", "expert"),
    ("length", "sequence"),
    ("vocab", "tensor"),
    ("embed", ("fsdp", "sequence")),
    ("heads", "tensor"),
    ("kv_heads", "tensor"),
    ("head_dim", None),
    ("mlp", "tensor"),
    ("layers", None),
)


@dataclass(frozen=True, kw_only=True)
class MeshShape:
    """Devices along each mesh axis; one of them may be -1, whatever is left.

    data      copies of the model, each on its own rows
    fsdp      rows too, with parameters cut along their width
    expert    rows too, with the experts of a mixture shared out
    sequence  parts of each row, for long ones; parameters are cut along their width here, too
    tensor    heads, hidden units and vocabulary
    """

    data: int = -1
    fsdp: int = 1
    expert: int = 1
    sequence: int = 1
    tensor: int = 1

    def __post_init__(self):
        sizes = [getattr(self, axis) for axis in AXES]
        if any(size < 1 and size != -1 for size in sizes) or sizes.count(-1) > 1:
            raise ValueError(f"mesh: every axis must be positive, and one at most -1 (the rest); got {self}")

    def sizes(self, devices: int) -> tuple[int, ...]:
        """Devices along AXES for that many in all. Raises ValueError where the shape doesn't use them exactly."""
        sizes = [getattr(self, axis) for axis in AXES]
        fixed = math.prod(size for size in sizes if size != -1)
        sizes = tuple(devices // fixed if size == -1 else size for size in sizes)
        if math.prod(sizes) != devices:
            named = ", ".join(f"mesh.{axis}={getattr(self, axis)}" for axis in AXES)
            raise ValueError(f"{named} don't multiply to the {devices} device(s) here; set one of them to -1")
        return sizes


def make_mesh(shape: MeshShape, devices: list | None = None) -> Mesh:
    """The mesh over all devices of all hosts (or over those given); slices of TPUs lie side by side along `data`.

    Raises ValueError where the shape doesn't use the devices exactly, or the slices don't divide mesh.data.
    """
    devices = jax.devices() if devices is None else devices
    sizes, slices = shape.sizes(len(devices)), len({getattr(device, "slice_index", 0) for device in devices})
    if sizes[0] % slices:
        raise ValueError(f"{slices} slices of TPUs don't divide mesh.data={sizes[0]}; choose a multiple of {slices}")
    within, across = (sizes[0] // slices, *sizes[1:]), (slices, *(1 for _ in sizes[1:]))
    if slices > 1:
        laid = mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)
    else:
        laid = mesh_utils.create_device_mesh(within, devices, allow_split_physical_axes=True)
    # Explicit axes break Linen's partitioned parameters.
    return Mesh(laid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def platform() -> str:
    """cpu, gpu or tpu: what the program being traced will run on. The mesh in force says; without one, JAX's default.

    Whatever differs by platform asks here, so that a program compiled for other devices is the one they'd run.
    """
    device = jax.sharding.get_abstract_mesh().abstract_device
    found = jax.default_backend() if device is None else device.platform
    return "gpu" if found in ("cuda", "rocm") else found


@functools.cache
def bfloat16_units() -> bool:
    """Whether this machine's CPU multiplies bfloat16 at more than float32's rate.

    AMX does, and AMD's AVX512-BF16. Intel's AVX512-BF16 has float32's rate, and older x86 processors have nothing. True
    for processors of which nothing is known.
    """
    info = Path("/proc/cpuinfo")
    words = set(info.read_text().split()) if info.exists() else set()
    known = "GenuineIntel" in words or "AuthenticAMD" in words
    return not known or "amx_bf16" in words or ("AuthenticAMD" in words and "avx512_bf16" in words)


def fast_dtype() -> str:
    """`exec.compute_dtype` for a network that trains on this machine's CPU: the type that it multiplies faster."""
    return "bfloat16" if bfloat16_units() else "float32"


@contextlib.contextmanager
def using(mesh: Mesh) -> Iterator[None]:
    """Inside a traced function: makes logical constraints count (`with mesh:` would leave them silent no-ops)."""
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), nn.logical_axis_rules(RULES):
        yield


def on(mesh: Mesh, function: Callable) -> Callable:
    """`function`, traced with the mesh and the rules in force: what to give to jax.jit."""

    def traced(*args):
        with using(mesh):
            return function(*args)

    return traced


def state_shardings(mesh: Mesh, boxed: Any) -> Any:
    """Shardings of a tree of abstract arrays, boxed with their logical axes where they have any (nn.Partitioned).

    boxed: what jax.eval_shape gives for an initialiser; an array without a box lies whole on every device.
    Raises ValueError naming the parameter, where the mesh doesn't divide an axis.
    """
    shardings = nn.logical_to_mesh_sharding(nn.get_partition_spec(boxed), mesh, RULES)
    abstract = nn.meta.unbox(boxed)
    jax.tree_util.tree_map_with_path(_check_divides, abstract, shardings)
    return shardings


def reboxed(boxed: Any, arrays: Any) -> Any:
    """Arrays with the logical axes of other, boxed ones."""

    def is_box(leaf: Any) -> bool:
        return isinstance(leaf, nn.meta.AxisMetadata)

    return jax.tree.map(lambda box, a: box.replace_boxed(a) if is_box(box) else a, boxed, arrays, is_leaf=is_box)


def placed(abstract: Any, shardings: Any) -> Any:
    """Abstract arrays that say where they lie: what a checkpoint is restored into."""
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, shardings)


def _check_divides(path, array, sharding: NamedSharding) -> None:
    for axis, (size, names) in enumerate(zip(array.shape, sharding.spec, strict=False)):
        names = (names,) if isinstance(names, str) else names or ()
        ways = math.prod(sharding.mesh.shape[name] for name in names)
        if size % ways:
            where = jax.tree_util.keystr(path, simple=True, separator="/")
            knobs = " x ".join(f"mesh.{name}={sharding.mesh.shape[name]}" for name in names)
            raise ValueError(
                f"{where} has {size} rows along axis {axis}, which {knobs} doesn't divide; "
                f"choose a divisor of {size} there, or change the model's size"
            )


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh, axis: int = 0) -> NamedSharding:
    """Rows, at `axis`, over the devices that hold different rows."""
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, dict(RULES)["batch"]))


def cache_shardings(mesh: Mesh, cache: Any) -> Any:
    """Shardings of a key-value cache: arrays [B, kv_heads, ...], or [B]. The table is the parameters'."""
    axes = {1: ("batch",), 3: ("batch", None, None), 4: ("batch", "kv_heads", None, None)}
    specs = jax.tree.map(lambda a: nn.logical_to_mesh_axes(axes[a.ndim], RULES), cache)
    shardings = jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)
    jax.tree_util.tree_map_with_path(_check_divides, cache, shardings)
    return shardings


def row_ways(mesh: Mesh) -> int:
    """Into how many parts a batch's rows are cut."""
    return _ways(mesh.shape, "batch")


def length_ways(mesh: Mesh) -> int:
    """Into how many parts each row is cut."""
    return _ways(mesh.shape, "length")


def _names(logical: str) -> tuple[str, ...]:
    names = dict(RULES)[logical]
    return (names,) if isinstance(names, str) else names or ()


def _ways(shape: Mapping[str, int], logical: str) -> int:
    return math.prod(shape[name] for name in _names(logical))


def rows_here(mesh: Mesh, rows: int) -> tuple[int, ...]:
    """Which of a batch's rows lie on this host's devices, ascending: what it has to read.

    They need not be a run, and where a mesh cuts no rows between two hosts, both have the same.
    """
    parts = batch_sharding(mesh).addressable_devices_indices_map((rows,)).values()
    return tuple(sorted({row for (part,) in parts for row in range(*part.indices(rows))}))


def ways_in_force(logical: str) -> int:
    """Into how many parts the mesh under which a function is being traced cuts a logical axis; 1 without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else _ways(mesh.shape, logical)


def devices_in_force() -> int:
    """Devices of the mesh under which a function is being traced; 1 without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.size


def cut(x: jax.Array, *axes: str | None) -> jax.Array:
    """x, laid out as its logical axes say while a mesh is in force; None: whole along it.

    A length that the mesh doesn't divide stays whole: a token, a canvas. (Of rows, `checks.check_rows` asks it.)
    """
    ways = ways_in_force("length")
    whole = (axis == "length" and size % ways for axis, size in zip(axes, x.shape, strict=True))
    return nn.with_logical_constraint(x, tuple(None if w else a for w, a in zip(whole, axes, strict=True)))


def each_device(
    function: Callable, axes: Sequence[tuple[str | None, ...]], *, summed: tuple[str, ...] = ()
) -> Callable:
    """`function`, called on each device with its own part of every argument; what comes back is added up over the
    devices along the `summed` logical axes, and lies as the first argument does. Without a mesh in force: `function`.

    axes: each argument's logical axes; of these, one that the mesh doesn't divide stays whole. What a device has to say
    of the gradient of an argument that others have as well is added up once, after all of its work.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return function
    over = tuple(name for logical in summed for name in _names(logical))

    def spec(array: jax.Array, names: tuple[str | None, ...]) -> PartitionSpec:
        whole = (name is None or size % _ways(mesh.shape, name) for name, size in zip(names, array.shape, strict=True))
        return nn.logical_to_mesh_axes(tuple(None if w else n for w, n in zip(whole, names, strict=True)), RULES)

    def total(*parts):
        found = function(*parts)
        return _added_up(found, over) if over else found

    def called(*arguments):
        specs = tuple(spec(a, names) for a, names in zip(arguments, axes, strict=True))
        return jax.shard_map(total, mesh=mesh, in_specs=specs, out_specs=specs[0], check_vma=False)(*arguments)

    return called


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _added_up(part: jax.Array, over: tuple[str, ...]) -> jax.Array:
    """The sum over devices, each of which gets its whole gradient; JAX's own transpose adds that up once more."""
    return jax.lax.psum(part, over)


def _added_up_backward(over: tuple[str, ...], _, g: jax.Array) -> tuple[jax.Array]:
    return (g * jax.lax.axis_size(over),)  # shard_map hands each device its share of what all of them have


_added_up.defvjp(lambda part, over: (_added_up(part, over), None), _added_up_backward)


def put_batch(mesh: Mesh, batch: Any, axis: int = 0) -> Any:
    """This host's rows (numpy, `rows_here` at `axis`) as part of the global arrays."""
    sharding = batch_sharding(mesh, axis)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, np.asarray(x)), batch)
