"""The negative ELBO with the whole row as one canvas: MDLM, MD4, D3PM, UDLM, GIDD, SEDD, by the process."""

import dataclasses

import jax

from diffusion_lm.layouts import WholeRow
from diffusion_lm.objectives.base import Objective, check_num_timesteps, denoising_loss
from diffusion_lm.processes.base import Process
from diffusion_lm.types import Batch, Denoise, Loss

Array = jax.Array


@dataclasses.dataclass(frozen=True, kw_only=True)
class ELBO(Objective):
    """The negative evidence lower bound under full attention (MDLM, arXiv 2406.07524, equation 10, for masks).

    The expectation over t and x_t of `Process.nelbo`. The bound of T steps lies above that of continuous time and falls
    towards it as T grows.

    Documents that share a row are one text: segment ids would show the network where they begin and end. So the context
    of later documents is noised and scored as well, but not counted.

    Args:
        num_timesteps: T; 0 for continuous time.
    """

    num_timesteps: int = 0
    layout = WholeRow()
    trains_ar = False

    def __post_init__(self):
        check_num_timesteps(self.num_timesteps)

    def __call__(self, denoise: Denoise, process: Process, key: Array, batch: Batch) -> dict[str, Loss]:
        loss, _ = denoising_loss(denoise, process, key, batch, layout=self.layout, num_timesteps=self.num_timesteps)
        return {"canvas": loss}
