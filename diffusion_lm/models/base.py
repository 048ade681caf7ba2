"""What a network is: the specs that stand between a config and layers, and the vocabulary."""

import dataclasses
from typing import Protocol

from diffusion_lm.nn.specs import (
    AttentionSpec,
    Execution,
    ExpertsSpec,
    LayerGroup,
    LayerSpec,
    MLPSpec,
    ModulationSpec,
    NormSpec,
    RopeSpec,
    SelfConditioningSpec,
    TimeSpec,
)

_ROWS = 128  # the embedding's rows are padded to a multiple of this, so that meshes divide them


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The token ids of a network.

    Args:
        size: ids 0..size-1 have logits.
        mask: the mask token, inside the vocabulary (its logit is then minus infinity) or behind it (size or more).
        eos, bos, pad: ends of text, begins of text, padding; None where the family has none.
        suppressed: ids that are never predicted, like rows that only pad a table.
    """

    size: int
    mask: int
    eos: int | None = None
    bos: int | None = None
    pad: int | None = None
    suppressed: tuple[int, ...] = ()

    @property
    def rows(self) -> int:
        """Rows of the embedding table: all ids, the mask, and padding up to a multiple of 128."""
        return -(-max(self.size, self.mask + 1) // _ROWS) * _ROWS

    @property
    def never(self) -> tuple[int, ...]:
        """The ids with a logit that are never predicted: their logits are minus infinity."""
        return tuple(sorted({i for i in (self.mask, *self.suppressed) if i < self.size}))


class ModelSpec(Protocol):
    """What a network is: a dataclass with the fields that `TransformerSpec` describes."""

    width: int
    groups: tuple[LayerGroup, ...]
    final_norm: NormSpec
    final_modulation: ModulationSpec | None
    embedding_width: int
    embedding_norm: NormSpec | None
    embedding_scale: float
    learned_positions: int
    learned_times: int
    tie_embeddings: bool
    head_bias: bool
    logit_softcap: float
    logit_shift: bool
    time: TimeSpec | None
    self_conditioning: SelfConditioningSpec | bool
    conditioner: SelfConditioningSpec | None
    router_aux_loss_weight: float
    vocabulary: Vocabulary | None


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransformerSpec:
    """A transformer of groups of layers, each group of one kind: what public families are written as.

    Args:
        width: of the residual stream.
        groups: layers, in order.
        final_norm: norm of the last hidden states.
        final_modulation: how the time shifts and scales what that norm gives; None for not.
        embedding_width: tokens are embedded in so many dimensions, from which a product leads to the width (MD4); 0 for
            the width itself.
        embedding_norm: norm of the embedded tokens; None for none.
        embedding_scale: embedded tokens are multiplied by this.
        learned_positions: rows of a table of positions that is added to embedded tokens (GPT-2); 0 for none.
        learned_times: rows of a table of times 1 / n, ..., 1, of which the nearest is added to embedded tokens; 0 for
            none.
        tie_embeddings: whether the head's matrix is the embedding table.
        head_bias: whether an untied head has a bias.
        logit_softcap: logits are c tanh(logits / c); 0 for none.
        logit_shift: the network was trained to predict the next token at every position, under full attention too
            (Dream). The head moves hidden states by one position, so that objectives and samplers get logits of the
            same position. Causal attention predicts the next token as always.
        time: how the time becomes a vector, for layers with modulation; None for networks without.
        self_conditioning: how the network takes a prediction for the same tokens as a further input; None for not.
        router_aux_loss_weight: weight of the experts' load-balancing loss, for each layer (arXiv 2101.03961).
        vocabulary: its tokens; None where the tokenizer decides.
    """

    width: int
    groups: tuple[LayerGroup, ...]
    final_norm: NormSpec = NormSpec()  # noqa: RUF009  (frozen)
    final_modulation: ModulationSpec | None = None
    embedding_width: int = 0
    embedding_norm: NormSpec | None = None
    embedding_scale: float = 1.0
    learned_positions: int = 0
    learned_times: int = 0
    tie_embeddings: bool = False
    head_bias: bool = False
    logit_softcap: float = 0.0
    logit_shift: bool = False
    time: TimeSpec | None = None
    self_conditioning: SelfConditioningSpec | None = None
    router_aux_loss_weight: float = 0.0
    vocabulary: Vocabulary | None = None

    def __post_init__(self):
        if (self.embedding_width and (self.tie_embeddings or self.self_conditioning)) or (
            self.head_bias and self.tie_embeddings
        ):
            raise ValueError("a tied head, or self-conditioning, needs embeddings of the width and a head without bias")

    @property
    def conditioner(self) -> SelfConditioningSpec | None:
        """`self_conditioning`."""
        return self.self_conditioning


@dataclasses.dataclass(frozen=True, kw_only=True)
class DenoiserSpec:
    """Our own networks: layers all alike (RMSNorm, rope, SwiGLU), in flat fields that flags can set.

    Args:
        width, layers, heads: sizes.
        kv_heads: 0 for as many as heads.
        head_dim: 0 for width / heads.
        mlp_dim: hidden units; 0 for 8/3 of the width, rounded up to a multiple of 64.
        num_experts: feed-forwards in a layer, each of mlp_dim units; 0 for a single one.
        num_experts_per_token: how many of them each position uses.
        router_aux_loss_weight: weight of the load-balancing loss of each layer (arXiv 2101.03961).
        qk_norm: whether queries and keys are normalised.
        tie_embeddings: whether the head's matrix is the embedding table.
        time_conditioning: whether layers are conditioned on t (adaLN); the optimum of masked diffusion doesn't need it.
        self_conditioning: whether the previous prediction is a further input.
        rope_theta: the base of rotary positions.
        logit_shift: see `ModelSpec`.
    """

    width: int = 384
    layers: int = 6
    heads: int = 6
    kv_heads: int = 0
    head_dim: int = 0
    mlp_dim: int = 0
    num_experts: int = 0
    num_experts_per_token: int = 0
    router_aux_loss_weight: float = 0.01
    qk_norm: bool = True
    tie_embeddings: bool = True
    time_conditioning: bool = False
    self_conditioning: bool = False
    rope_theta: float = 10_000.0
    logit_shift: bool = False

    # Not annotated, so no fields: what all of our networks have in common.
    final_norm = embedding_norm = NormSpec()
    final_modulation = vocabulary = None
    embedding_width, embedding_scale, learned_positions, learned_times = 0, 1.0, 0, 0
    head_bias, logit_softcap = False, 0.0

    def __post_init__(self):
        for name in ("width", "layers", "heads", "kv_heads", "head_dim", "mlp_dim"):
            least = 0 if name in ("kv_heads", "head_dim", "mlp_dim") else 1
            if getattr(self, name) < least:
                raise ValueError(f"model.{name} must be at least {least}, not {getattr(self, name)}")
        if self.num_experts < 0 or not (self.num_experts > 0) <= self.num_experts_per_token <= self.num_experts:
            raise ValueError(
                f"model.num_experts_per_token={self.num_experts_per_token} must lie in "
                f"1..model.num_experts={self.num_experts}; without experts both are 0"
            )
        attention = self.groups[0].layer.attention
        if self.heads % attention.kv_heads:
            raise ValueError(f"model.kv_heads={self.kv_heads} must divide model.heads={self.heads}")
        if attention.head_dim < 1 or attention.head_dim % 2:
            raise ValueError(f"model.head_dim={attention.head_dim} must be even: rotary positions turn pairs")
        if self.router_aux_loss_weight < 0:
            raise ValueError(
                f"model.router_aux_loss_weight={self.router_aux_loss_weight} must not be negative: it would reward "
                "experts that are used unevenly"
            )

    @property
    def conditioner(self) -> SelfConditioningSpec | None:
        """By a feed-forward of a layer's size, where the network is self-conditioned."""
        mlp = MLPSpec(dim=self.groups[0].layer.mlp.dim)
        return SelfConditioningSpec(mlp=mlp) if self.self_conditioning else None

    @property
    def time(self) -> TimeSpec | None:
        """Of the width, where layers are conditioned on t."""
        return TimeSpec() if self.time_conditioning else None

    @property
    def groups(self) -> tuple[LayerGroup, ...]:
        """One group of all layers."""
        attention = AttentionSpec(
            heads=self.heads,
            kv_heads=self.kv_heads or self.heads,
            head_dim=self.head_dim or self.width // self.heads,
            qk_norm=NormSpec() if self.qk_norm else None,
            rope=RopeSpec(theta=self.rope_theta),
        )
        dim = self.mlp_dim or -(-self.width * 8 // (3 * 64)) * 64
        experts = {"num_experts": self.num_experts, "num_experts_per_token": self.num_experts_per_token}
        mlp = ExpertsSpec(dim=dim, **experts) if self.num_experts else MLPSpec(dim=dim)
        modulation = ModulationSpec() if self.time_conditioning else None
        layer = LayerSpec(attention=attention, mlp=mlp, modulation=modulation)
        return (LayerGroup(layer=layer, repeat=self.layers),)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FromInit:
    """The network of `train.init`, whatever it is; `diffusion_lm.build` puts its spec in this one's place.

    Args:
        logit_shift: `ModelSpec.logit_shift` of the new network; None: as in that of `train.init`. A causal network that
            learns to fill canvases keeps more of what it knows with it (docs/finetuning.md).
    """

    logit_shift: bool | None = None

    # Not annotated, so no fields: what a config asks of any network before it is known.
    groups, self_conditioning, vocabulary = (), False, None


def check_execution(spec: ModelSpec, execution: Execution) -> None:
    """ValueError where a network can't run so."""
    if execution.quantization != "none" and any(g.layer.mixture for g in spec.groups):
        raise ValueError(
            f"exec.quantization={execution.quantization} isn't implemented for experts: set exec.quantization=none"
        )
