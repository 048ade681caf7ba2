"""Characters of Shakespeare at nanoGPT's CPU setting, as ar, masked, uniform, mixture, score, flow, embedding,
learned, block, joint, joint_uniform, distilled, distilled_uniform or distilled_embedding.

    curl -O https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt
    python -m launch.train --config=configs/tinyshakespeare.py:ar --workdir=runs/ar --set=data.path=input.txt

4 layers, 4 heads, width 128, rows of 64, batch size 12, 2,000 updates; the last tenth of the characters is held out.
Hardware: 2 CPU cores. Time: ar 86 s with compilation; the others not yet run at this setting.
Number to expect, nats per held-out character: ar 1.654 (2026-11-21, seed 0; nanoGPT publishes 1.88).
Kinds: masked is MDLM, uniform UDLM, mixture GIDD, score SEDD, flow discrete flow matching, block BD3-LM, joint an
autoregressive and a block diffusion loss on one network. `embedding` is flow matching of token embeddings. `learned` is
MD4's masking with a learned rate for each token; it needs two forward passes a row. `joint_uniform` is like
DiffusionGemma: a canvas of uniform noise after a causal prefix, with self-conditioning; sample with --sampler=renoise
or ancestral. `distilled` starts from a trained `masked` and learns to do in 8 denoising steps what that does in 16:
--set=objective.teacher=runs/masked. `distilled_uniform` starts from `uniform`, `distilled_embedding` from `embedding`
with 4 steps for 16 of its ODE.
"""

from diffusion_lm.config import Config, Data
from diffusion_lm.models.base import DenoiserSpec
from diffusion_lm.objectives.autoregressive import AutoregressiveLoss
from diffusion_lm.objectives.block import BlockELBO
from diffusion_lm.objectives.distillation import Distillation
from diffusion_lm.objectives.elbo import ELBO
from diffusion_lm.objectives.embedding_flow import EmbeddingFlowLoss
from diffusion_lm.objectives.joint import Joint
from diffusion_lm.objectives.learned_noise import LearnedNoise
from diffusion_lm.processes.absorbing import Absorbing
from diffusion_lm.processes.flow import UniformFlow
from diffusion_lm.processes.gaussian import Gaussian
from diffusion_lm.processes.mixture import Mixture
from diffusion_lm.processes.score import AbsorbingScore
from diffusion_lm.processes.state_dependent import LearnedMasking
from diffusion_lm.processes.uniform import Uniform
from diffusion_lm.training.checkpoint import Checkpointing
from diffusion_lm.training.loop import Train
from diffusion_lm.training.optimizer import AdamW, WarmupCosine

KINDS = {
    "ar": (Absorbing(), AutoregressiveLoss()),
    "masked": (Absorbing(), ELBO()),
    "uniform": (Uniform(), ELBO()),
    "mixture": (Mixture(uniform=0.1), ELBO()),
    "score": (AbsorbingScore(), ELBO()),
    "flow": (UniformFlow(), ELBO()),
    "embedding": (Gaussian(noise=4.0), EmbeddingFlowLoss()),
    "learned": (LearnedMasking(), LearnedNoise()),
    "block": (Absorbing(), BlockELBO(block_size=16)),
    "joint": (Absorbing(), Joint(block_size=16)),
    "joint_uniform": (Uniform(), Joint(block_size=16)),
    "distilled": (Absorbing(), Distillation(objective=ELBO(), student_steps=8)),
    "distilled_uniform": (Uniform(), Distillation(objective=ELBO(), student_steps=8)),
    "distilled_embedding": (
        Gaussian(noise=4.0),
        Distillation(objective=EmbeddingFlowLoss(), student_steps=4, teacher_steps=4),
    ),
}
INPUTS = {  # inputs of these networks besides the tokens
    "embedding": {"time_conditioning": True, "self_conditioning": True},
    "distilled_embedding": {"time_conditioning": True, "self_conditioning": True},
    "joint_uniform": {"self_conditioning": True},
}


def get_config(kind: str = "joint") -> Config:
    """kind: one of KINDS."""
    if kind not in KINDS:
        raise ValueError(f"tinyshakespeare: kind {kind!r} is none of {', '.join(KINDS)}")
    process, objective = KINDS[kind]
    # A row's first character is given and not scored: 65 have nanoGPT's 64 targets. Blocks have to fit: 5 of 16.
    length = objective.layout.round_up(65)
    return Config(
        data=Data(path="tinyshakespeare.txt", seq_len=length, val_fraction=0.1, tokenizer_kind="char", vocab_size=512),
        model=DenoiserSpec(width=128, layers=4, heads=4, **INPUTS.get(kind, {})),
        process=process,
        objective=objective,
        optim=AdamW(lr=1e-3, b2=0.99, schedule=WarmupCosine(warmup=100, final=0.1)),
        train=Train(steps=2000, batch_size=12, eval_every=500, eval_batches=20),
        checkpoint=Checkpointing(save_every=500),
    )
