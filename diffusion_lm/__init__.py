"""Diffusion language models in JAX.

    import diffusion_lm as dlm

    model = dlm.load("runs/quickstart")
    print(dlm.generate(model, "Return the", max_new_tokens=200, denoising_steps=12))

Names are imported when they are first used.
"""

import importlib

_EXPORTS = {
    "config": "Config override",
    "data.corpora": "Corpus Texts corpus",
    "data.prompt_response": "PromptResponse",
    "data.source": "Data DataSource TokenizedData",
    "data.tokenizer": "SentencePiece Tokenizer train_tokenizer",
    "inference.api": "evaluate generate infill load log_likelihood stream train",
    "inference.by_name": "make_sampler",
    "layouts": "Blocks NoCanvas WholeRow",
    "models.base": "DenoiserSpec Execution ModelSpec TransformerSpec Vocabulary",
    "objectives.autoregressive": "AutoregressiveLoss",
    "objectives.base": "Objective",
    "objectives.block": "BlockELBO",
    "objectives.distillation": "Distillation",
    "objectives.elbo": "ELBO",
    "objectives.embedding_flow": "EmbeddingFlowLoss",
    "objectives.joint": "Joint",
    "objectives.learned_noise": "LearnedNoise",
    "processes.absorbing": "Absorbing",
    "processes.base": "Process",
    "processes.gaussian": "Gaussian",
    "processes.mixture": "Mixture",
    "processes.state_dependent": "LearnedMasking StateDependentMasking",
    "processes.uniform": "Uniform",
    "samplers.ancestral": "Ancestral",
    "samplers.autoregressive": "AutoregressiveSampler",
    "samplers.base": "Canvas CanvasSampler Query",
    "samplers.block_diffusion": "BlockDiffusion",
    "samplers.confidence": "Confidence",
    "samplers.remasking": "Cap ConfidenceBased Loop Remasking Rescale",
    "samplers.renoising": "Renoising",
    "samplers.sampling_params": "SamplingParams",
    "samplers.speculative": "Speculative",
    "samplers.unmasking": "EntropyBound Factor FixedCount Threshold",
    "schedules": "Cosine Linear Polynomial",
    "sharding": "MeshShape",
    "training.checkpoint": "Checkpointing",
    "training.loop": "Train",
    "training.optimizer": "AdamW Muon Optimizer WarmupCosine WarmupStableDecay",
}
_HOME = {name: module for module, names in _EXPORTS.items() for name in names.split()} | {"load_config": "config"}
__all__ = sorted(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f"{__name__}.{_HOME[name]}")
    value = globals()[name] = getattr(module, "load" if name == "load_config" else name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
