"""What a public model family is to us: a config.json as a spec, and its tensors' names as our parameters, both ways."""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from diffusion_lm.layouts import Blocks, NoCanvas, WholeRow
from diffusion_lm.models.base import ModelSpec
from diffusion_lm.models.weights import Leaf, Part
from diffusion_lm.nn.specs import ExpertsSpec, LayerGroup, LayerSpec, RopeScaling, RopeSpec
from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.processes.base import Process

# What says nothing of the network's numbers.
_IGNORED = frozenset(
    """architectures model_type torch_dtype dtype transformers_version use_cache initializer_range auto_map
    bos_token_id eos_token_id pad_token_id mask_token_id max_position_embeddings _name_or_path _attn_implementation
    attn_implementation attention_dropout embd_pdrop attn_pdrop resid_pdrop hidden_dropout embedding_dropout
    residual_dropout output_attentions output_hidden_states output_router_logits return_dict is_decoder
    task_specific_params unk_token_id sep_token_id cls_token_id chunk_size_feed_forward id2label label2id problem_type
    is_encoder_decoder tie_encoder_decoder use_return_dict tokenizer_class init_device init_std init_fn
    init_cutoff_factor""".split()  # noqa: SIM905
)
_NOTHING = object()


class Described(NamedTuple):
    """A config.json, read.

    spec       the network, with its vocabulary
    layout     what a canvas is to it: `NoCanvas` for causal models, `WholeRow`, or `Blocks`
    trains_ar  whether it also predicts the next token causally
    context    positions that it was trained for
    process    the noise that it was trained to undo
    """

    spec: ModelSpec
    layout: NoCanvas | WholeRow | Blocks
    trains_ar: bool
    context: int
    process: Process = Absorbing()


class Family(Protocol):
    """A module of this package, one a public family.

    MODEL_TYPES: the `model_type` of a config.json that it reads.
    KEYS: optional; a config.json without model_type is this family's if it has all of these keys.
    own_name: optional; see `family_index.named`.
    buffers: optional, spec -> name -> array: what its code keeps beside the parameters, and we compute. A file must
        hold the same or nothing; an export holds them.
    TOKENIZER: optional; which tokenizer its models have where their folders hold none.
    companions: optional, () -> file name -> bytes: the tokenizer's files, of a family whose folders hold none.
    """

    MODEL_TYPES: tuple[str, ...]

    def describe(self, config: "ConfigReader") -> Described:
        """The network that a config.json asks for. Raises ValueError naming what it asks for that we don't have."""

    def leaves(self, spec: ModelSpec) -> list[Leaf]:
        """What fills each parameter of the network with its layers apart (`layer_0`, `layer_1`, ...)."""

    def is_buffer(self, name: str) -> bool:
        """Whether a tensor of that name may be there without being a parameter."""


class ConfigReader:
    """A config.json whose every key is read, known to say nothing of the network, or refused.

    source: what messages call it.
    """

    def __init__(self, config: Mapping[str, Any], source: str = "config.json"):
        self.config, self.source, self._read = config, source, set(_IGNORED)

    def take(self, key: str, default: Any = _NOTHING) -> Any:
        """The value of a key; where it is missing or null, the default. ValueError without one."""
        self._read.add(key)
        value = self.config.get(key)
        if value is None:
            if default is _NOTHING:
                raise ValueError(f"{self.source} has no {key}")
            return default
        return value

    def size(self, key: str, default: Any = _NOTHING) -> int:
        """`take`, of a positive whole number."""
        value = self.take(key, default)
        if type(value) is not int or value < 1:
            raise ValueError(f"{self.source} sets {key}={value!r}; it must be a whole number of at least 1")
        return value

    def expect(self, key: str, *allowed: Any) -> Any:
        """`take`, of a key that may be missing (then the first of `allowed`). ValueError for any other value."""
        value = self.take(key, allowed[0])
        if value not in allowed:
            choices = " or ".join(repr(choice) for choice in allowed)
            raise ValueError(f"{self.source} sets {key}={value!r}; only {choices} is implemented")
        return value

    def part(self, key: str) -> "ConfigReader":
        """A reader of the object under a key. ValueError for anything else."""
        value = self.take(key)
        if not isinstance(value, dict):
            raise ValueError(f"{self.source} sets {key}={value!r}; it must be an object")
        return ConfigReader(value, f"{self.source}: {key}")

    def ignore(self, *keys: str) -> None:
        """Keys that say nothing of the network in this family."""
        self._read.update(keys)

    def finish(self) -> None:
        """Raises ValueError for what was not read: it would be ignored in silence."""
        left = sorted(key for key in self.config.keys() - self._read if self.config[key] not in (None, False, [], {}))
        if left:
            raise ValueError(f"{self.source} sets {left[0]}={self.config[left[0]]!r}, which isn't implemented")


def rope(config: ConfigReader, *, fraction: float = 1.0, default_theta: float = 10_000.0) -> RopeSpec:
    """rope_theta and rope_scaling, or the rope_parameters that transformers 5 writes in their place."""
    scaling = dict(config.take("rope_scaling", {}) or {})
    parameters = dict(config.take("rope_parameters", {}) or {})
    theta = float(config.take("rope_theta", parameters.pop("rope_theta", default_theta)))
    return RopeSpec(theta=theta, fraction=fraction, scaling=_scaling(config, scaling or parameters, theta))


def _scaling(config: ConfigReader, found: dict[str, Any], theta: float) -> RopeScaling | None:
    kind = found.pop("rope_type", found.pop("type", "default"))
    found.pop("type", None)
    if float(found.pop("rope_theta", theta)) != theta:
        raise ValueError(f"{config.source} sets two rope_theta: leave one")
    if kind == "default":
        return None
    try:
        if kind == "linear":
            scaling = RopeScaling(kind="linear", factor=float(found.pop("factor")))
        elif kind == "llama3":
            scaling = RopeScaling(
                kind="llama3",
                factor=float(found.pop("factor")),
                original_length=int(found.pop("original_max_position_embeddings")),
                low=float(found.pop("low_freq_factor")),
                high=float(found.pop("high_freq_factor")),
            )
        elif kind == "yarn":
            scaling = RopeScaling(
                kind="yarn",
                factor=(factor := float(found.pop("factor"))),
                original_length=int(found.pop("original_max_position_embeddings")),
                low=float(found.pop("beta_slow", None) or 1.0),
                high=float(found.pop("beta_fast", None) or 32.0),
                magnitude=_yarn_magnitude(found, factor),
                query_growth=float(found.pop("llama_4_scaling_beta", None) or 0.0),
            )
            found.pop("max_position_embeddings", None)  # the product of two others
        else:
            raise ValueError(f"{config.source} scales rope by {kind!r}; linear, llama3 and yarn are implemented")
    except KeyError as error:
        raise ValueError(f"{config.source} scales rope by {kind!r} without {error}") from None
    if left := sorted(key for key, value in found.items() if value is not None):
        raise ValueError(f"{config.source} sets {left[0]}={found[left[0]]!r} for rope, which isn't implemented")
    return scaling


def _yarn_magnitude(found: dict[str, Any], factor: float) -> float:
    """What yarn multiplies cosines and sines by."""

    def scale(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    stated, mscale, of_all = (found.pop(key, None) for key in ("attention_factor", "mscale", "mscale_all_dim"))
    if stated is not None:
        return float(stated)
    return scale(mscale) / scale(of_all) if mscale and of_all else scale(1.0)


# ---- parameters: what most decoders have in common ----


def leaf(path: Sequence[str], *parts: Part) -> Leaf:
    """A parameter at a path of the network's tree."""
    return Leaf(path=tuple(path), parts=parts)


def vector(path: Sequence[str], tensor: str, *shape: int) -> Leaf:
    """A parameter that lies as its tensor does, up to its shape: a scale, a bias."""
    return leaf(path, Part(tensor=tensor, shape=shape, flat=True))


def table(path: Sequence[str], tensor: str, ids: int, width: int) -> Leaf:
    """A table of embeddings, of which the first `ids` rows are tokens."""
    return leaf(path, Part(tensor=tensor, shape=(ids, width), place=(slice(0, ids),)))


def reordered(
    tensor: str, width: int, heads: int, head_dim: int, first: slice, second: slice, *, place=(), inputs_first=False
) -> list[Part]:
    """The parts of a matrix of queries or keys whose heads don't hold the two halves that rope pairs as ours do.

    Args:
        tensor: its name; width, heads, head_dim: its sizes.
        first, second: which of a head's columns are our first half, and which our second.
        place, inputs_first: as in `Part`.
    """
    whole, found = (width, heads * head_dim), []
    for head in range(heads):
        for i, half in enumerate((first, second)):
            start, stop, step = half.indices(head_dim)
            columns = slice(head * head_dim + start, head * head_dim + stop, step)
            ours = slice(i * head_dim // 2, (i + 1) * head_dim // 2)
            part = Part(
                tensor=tensor, shape=(width, head_dim // 2), inputs=1, inputs_first=inputs_first,
                place=(slice(None), *place, head, ours),
                select=(slice(None), columns) if inputs_first else (columns,),
                tensor_shape=whole if inputs_first else whole[::-1],
            )  # fmt: skip
            found.append(part)
    return found


def attention_leaves(
    path: Sequence[str], layer: LayerSpec, width: int, prefix: str, output: str = "o_proj"
) -> list[Leaf]:
    """q_proj, k_proj, v_proj, o_proj under a prefix, with biases and the norms of queries and keys if there are any."""
    a, at = layer.attention, (*path, "attention")
    heads, kv_heads = (width, a.heads, a.head_dim), (width, a.kv_heads, a.head_dim)

    def kv(name: str, i: int) -> Part:
        return Part(tensor=f"{prefix}{name}.weight", shape=kv_heads, inputs=1, place=(slice(None), i))

    found = [
        leaf((*at, "query"), Part(tensor=f"{prefix}q_proj.weight", shape=heads, inputs=1)),
        leaf((*at, "key_value"), kv("k_proj", 0), *([] if a.tie_kv else [kv("v_proj", 1)])),
        leaf((*at, "output"), Part(tensor=f"{prefix}{output}.weight", shape=(*heads[1:], width), inputs=2)),
    ]
    if a.qkv_bias:
        bias = [
            Part(tensor=f"{prefix}{n}.bias", shape=kv_heads[1:], flat=True, place=(i,))
            for i, n in enumerate(("k_proj", "v_proj"))
        ]
        found += [vector((*at, "query_bias"), f"{prefix}q_proj.bias", *heads[1:]), leaf((*at, "key_value_bias"), *bias)]
    if a.out_bias:
        found.append(vector((*at, "output_bias"), f"{prefix}{output}.bias", width))
    if a.qk_norm is not None:
        found += [
            vector((*at, f"{n}_norm", "scale"), f"{prefix}{n[0]}_norm.weight", a.head_dim) for n in ("query", "key")
        ]
    return found


def mlp_leaves(
    path: Sequence[str], dim: int, width: int, prefix: str, bias: bool = False, name: str = "mlp"
) -> list[Leaf]:
    """gate_proj, up_proj, down_proj under a prefix. name: what our network calls it."""
    at, pair = (*path, name), ("gate_proj", "up_proj")
    up = [
        Part(tensor=f"{prefix}{name}.weight", shape=(width, dim), inputs=1, place=(slice(None), i))
        for i, name in enumerate(pair)
    ]
    found = [
        leaf((*at, "gate_up"), *up),
        leaf((*at, "down"), Part(tensor=f"{prefix}down_proj.weight", shape=(dim, width), inputs=1)),
    ]
    if bias:
        parts = [Part(tensor=f"{prefix}{name}.bias", shape=(dim,), place=(i,)) for i, name in enumerate(pair)]
        found += [leaf((*at, "gate_up_bias"), *parts), vector((*at, "down_bias"), f"{prefix}down_proj.bias", width)]
    return found


def experts_leaves(path: Sequence[str], spec: ExpertsSpec, width: int, prefix: str) -> list[Leaf]:
    """gate (the router), experts.N and shared_experts under a prefix."""
    at, gate, up, down = (*path, "experts"), f"{prefix}gate.", [], []
    for n in range(spec.num_experts):
        tensors = {name: f"{prefix}experts.{n}.{name}_proj.weight" for name in ("gate", "up", "down")}
        for i, name in enumerate(("gate", "up")):
            place = (n, slice(None), i)
            up.append(Part(tensor=tensors[name], shape=(width, spec.dim), inputs=1, place=place))
        down.append(Part(tensor=tensors["down"], shape=(spec.dim, width), inputs=1, place=(n,)))
    router = Part(tensor=f"{gate}weight", shape=(width, spec.num_experts), inputs=1)
    found = [
        Leaf(path=(*at, "router"), parts=(router,), keep_float32=True),
        leaf((*at, "gate_up"), *up),
        leaf((*at, "down"), *down),
    ]
    if spec.selection_bias:
        bias = Part(tensor=f"{gate}expert_bias", shape=(spec.num_experts,))
        found.append(Leaf(path=(*at, "selection_bias"), parts=(bias,), keep_float32=True))
    if spec.shared_dim:
        found += mlp_leaves(path, spec.shared_dim, width, f"{prefix}shared_experts.", name="shared_expert")
    return found


def feed_forward_leaves(path: Sequence[str], one: LayerSpec, width: int, prefix: str) -> list[Leaf]:
    """`mlp_leaves` or `experts_leaves`, as the layer is."""
    if isinstance(one.mlp, ExpertsSpec):
        return experts_leaves(path, one.mlp, width, prefix)
    return mlp_leaves(path, one.mlp.dim, width, prefix, one.mlp.bias)


def grouped(layers: Iterable[LayerSpec]) -> tuple[LayerGroup, ...]:
    """Layers in order, those alike that follow one another as one group."""
    return tuple(LayerGroup(layer=layer, repeat=len(list(run))) for layer, run in itertools.groupby(layers))


def layers_of(spec: ModelSpec) -> list[LayerSpec]:
    """Every layer, in order."""
    return [group.layer for group in spec.groups for _ in range(group.repeat)]


def decoder_leaves(
    spec: ModelSpec,
    *,
    layer: Callable[[int], str] = "model.layers.{}.".format,
    top: str = "model.",
    embedding: str = "embed_tokens",
    of_layer: Callable[[Sequence[str], LayerSpec, str], Iterable[Leaf]] | None = None,
) -> list[Leaf]:
    """The names that Llama gave and most families kept. of_layer: a family's own (path, layer, prefix) -> leaves."""
    width, ids = spec.width, spec.vocabulary.size
    found = [
        table(("embedding",), f"{top}{embedding}.weight", ids, width),
        vector(("final_norm", "scale"), f"{top}norm.weight", width),
    ]
    if not spec.tie_embeddings:
        found.append(table(("unembedding",), "lm_head.weight", ids, width))
    for i, one in enumerate(layers_of(spec)):
        path, prefix = (f"layer_{i}",), layer(i)
        found += of_layer(path, one, prefix) if of_layer else llama_layer(path, one, prefix, width)
    return found


def llama_layer(path: Sequence[str], one: LayerSpec, prefix: str, width: int) -> list[Leaf]:
    """A layer of Llama's names."""
    return [
        vector((*path, "attention_norm", "scale"), f"{prefix}input_layernorm.weight", width),
        *attention_leaves(path, one, width, f"{prefix}self_attn."),
        vector((*path, "mlp_norm", "scale"), f"{prefix}post_attention_layernorm.weight", width),
        *feed_forward_leaves(path, one, width, f"{prefix}mlp."),
    ]


def stacked(leaves: Sequence[Leaf], spec: ModelSpec) -> list[Leaf]:
    """The leaves of the network with each group's layers stacked along a first axis, as training has them."""
    names, start = {}, 0
    for number, group in enumerate(spec.groups):
        for i in range(group.repeat):
            names[f"layer_{start + i}"] = ("layers" if len(spec.groups) == 1 else f"layers_{number}", i)
        start += group.repeat
    found: dict[tuple[str, ...], Leaf] = {}
    for one in leaves:
        if one.path[0] not in names:
            found[one.path] = one
            continue
        group, i = names[one.path[0]]
        path = (group, *one.path[1:])
        parts = tuple(dataclasses.replace(part, place=(i, *part.place)) for part in one.parts)
        before = found[path].parts if path in found else ()
        found[path] = Leaf(path=path, parts=before + parts, keep_float32=one.keep_float32)
    return list(found.values())
