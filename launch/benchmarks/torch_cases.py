"""The benchmark's references: the same work in plain PyTorch and in Hugging Face Transformers, on a CPU.

They need the extra [bench]. `pip install -e '.[bench]'` takes whatever build of torch pip finds: install torch from
PyTorch's CPU index first if a CUDA build isn't wanted. All weights are random, so nothing is downloaded.
"""

from collections.abc import Callable

from launch.benchmarks.turns import Peer


def language_model(*, vocab: int, width: int, layers: int, heads: int, mlp: int, causal: bool = True):
    """The library's transformer as a torch module: tokens [B, L] -> float32 logits [B, L, V]; forward(tokens, n)
    returns those of the last n positions.

    RMSNorm, rotary positions, SwiGLU, no QK norm, normalized embeddings, untied output embeddings, fused attention.
    """
    import torch
    from torch import nn
    from torch.nn import functional

    def rotate(x, cos, sin):
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    class Layer(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention_norm, self.mlp_norm = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
            self.qkv = nn.Linear(width, 3 * width, bias=False)
            self.output = nn.Linear(width, width, bias=False)
            self.gate_up = nn.Linear(width, 2 * mlp, bias=False)
            self.down = nn.Linear(mlp, width, bias=False)

        def forward(self, x, cos, sin):
            rows, length, _ = x.shape
            q, k, v = self.qkv(self.attention_norm(x)).view(rows, length, 3, heads, -1).permute(2, 0, 3, 1, 4)
            q, k = rotate(q, cos, sin), rotate(k, cos, sin)
            mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
            x = x + self.output(mixed.transpose(1, 2).reshape(rows, length, width))
            gate, value = self.gate_up(self.mlp_norm(x)).chunk(2, dim=-1)
            return x + self.down(functional.silu(gate) * value)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = nn.Embedding(vocab + 1, width)  # and the mask
            self.embedding_norm, self.final_norm = nn.RMSNorm(width, eps=1e-6), nn.RMSNorm(width, eps=1e-6)
            self.layers = nn.ModuleList(Layer() for _ in range(layers))
            self.unembedding = nn.Linear(width, vocab, bias=False)

        def forward(self, tokens, last=0):
            half = width // heads // 2
            angles = torch.arange(tokens.shape[1])[:, None] * 10_000.0 ** -(torch.arange(half) / half)
            cos, sin = angles.cos(), angles.sin()
            x = self.embedding_norm(self.embedding(tokens))
            for layer in self.layers:
                x = layer(x, cos, sin)
            return self.unembedding(self.final_norm(x[:, -last:]))

    torch.manual_seed(0)
    return Model()


def train_step(
    *, batch: int, length: int, vocab: int, dtype: str = "float32", compiled: bool = False, **sizes: int
) -> Callable[[], None]:
    """One update a call: all logits, cross-entropy of the next token, fused AdamW on float32 weights.

    dtype: "bfloat16" for autocast. compiled: by torch.compile, which needs a C++ compiler.
    """
    import torch
    from torch.nn import functional

    model = language_model(vocab=vocab, **sizes)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    tokens = torch.randint(0, vocab, (batch, length))

    def loss_of(tokens):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
            return functional.cross_entropy(model(tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())

    loss_of = torch.compile(loss_of) if compiled else loss_of

    def step() -> None:
        loss = loss_of(tokens)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def decode(
    *, prompt: int, new: int, vocab: int, width: int, layers: int, heads: int, mlp: int, dtype: str = "float32"
) -> Callable[[], list[int]]:
    """`new` tokens a call by Transformers' generate: a random Llama, greedy, its cache, one row."""
    import torch
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=prompt + new,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    model = transformers.LlamaForCausalLM(config).to(getattr(torch, dtype)).eval()
    tokens = torch.randint(0, vocab, (1, prompt))
    options = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "use_cache": True, "pad_token_id": 0}

    def generate() -> list[int]:
        with torch.inference_mode():
            return model.generate(tokens, attention_mask=torch.ones_like(tokens), **options)[0, prompt:].tolist()

    return generate


def recomputed(*, prompt: int, new: int, canvas: int, passes: int, vocab: int, **sizes: int) -> Callable[[], list[int]]:
    """`new` tokens a call, canvas by canvas, each cleared in so many passes by confidence: a pass reads prompt, text
    and canvas anew, both ways, in float32."""
    import torch

    model = language_model(vocab=vocab, causal=False, **sizes).eval()
    start = torch.randint(0, vocab, (1, prompt))

    def clear(text):
        text = torch.cat([text, torch.full((1, canvas), vocab)], dim=1)
        for left in range(passes, 0, -1):
            open_ = text[0, -canvas:] == vocab
            if not open_.any():
                break
            probability = model(text, canvas)[0].softmax(dim=-1)
            drawn = torch.multinomial(probability, 1)[:, 0]
            sure = probability.gather(1, drawn[:, None])[:, 0].masked_fill(~open_, -1.0)
            best = sure.topk(-(-int(open_.sum()) // left)).indices
            text[0, text.shape[1] - canvas + best] = drawn[best]
        return text

    def generate() -> list[int]:
        text = start
        with torch.inference_mode():
            for _ in range(new // canvas):
                text = clear(text)
        return text[0, prompt:].tolist()

    return generate


def training_peers(**options: int) -> dict[str, Peer]:
    """Plain PyTorch's forms of `train_step`, by name."""
    return {
        f"PyTorch {dtype}{', compiled' * compiled}": Peer(
            cases=f"{__name__}:train_step",
            options=options | {"dtype": dtype, "compiled": compiled},
            packages=("torch",),
        )
        for dtype in ("float32", "bfloat16")
        for compiled in (False, True)
    }


def decoding_peers(*dtypes: str, **options: int) -> dict[str, Peer]:
    """Transformers' `decode` in these types, by name."""
    return {
        f"Transformers {dtype}": Peer(
            cases=f"{__name__}:decode", options=options | {"dtype": dtype}, packages=("torch", "transformers")
        )
        for dtype in dtypes
    }
