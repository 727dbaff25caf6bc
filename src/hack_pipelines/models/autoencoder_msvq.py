"""Multi-scale residual VQ tokenizer of VAR (arXiv 2404.02905, section 3.2)."""

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import Decoder, DecoderOutput, Encoder
from diffusers.utils.accelerate_utils import apply_forward_hook
from torch import nn

from ..schedule import Schedule
from .tiling import PiecewiseDecoder


class ResidualConv(nn.Conv2d):
    """The convolution that mends an upsampled token map: `(1 - ratio) * h + ratio * conv(h)`."""

    def __init__(self, channels: int, ratio: float):
        super().__init__(channels, channels, kernel_size=3, padding=1)
        self.ratio = ratio

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states * (1 - self.ratio) + super().forward(hidden_states) * self.ratio


class Codebook(nn.Embedding):
    """The vectors of the codes. All that reads them goes through `forward`, where offload hooks have fetched them."""

    def forward(self, codes: torch.Tensor, nearest: bool = False) -> torch.Tensor:
        """
        Vectors of ids, mixtures of vectors for weights over them `[..., vocab_size]`, or with `nearest` the ids `[rows]` of the
        vectors nearest to `codes` `[rows, channels]`, the first one on a tie.
        """
        if nearest:
            vectors = self.weight.float()
            distances = codes.square().sum(1, keepdim=True) + vectors.square().sum(1)
            return distances.addmm(codes, vectors.T, alpha=-2).argmin(1)
        return codes @ self.weight.unsqueeze(0) if torch.is_floating_point(codes) else super().forward(codes)


class MultiScaleVectorQuantizer(nn.Module):
    """A codebook shared by all scales, and a few residual convolutions that the scales share among themselves."""

    def __init__(self, vocab_size: int, channels: int, residual_ratio: float, num_residual_convs: int):
        super().__init__()
        self.embedding = Codebook(vocab_size, channels)
        self.residual_convs = nn.ModuleList(
            [ResidualConv(channels, abs(residual_ratio)) for _ in range(num_residual_convs)]
        )
        margin = 1 / 3 / num_residual_convs if num_residual_convs == 4 else 1 / 2 / num_residual_convs
        self.ticks: list[float] = np.linspace(margin, 1 - margin, num_residual_convs).tolist()

    def residual_conv(self, step: int, num_steps: int) -> nn.Module:
        """
        The convolution that serves a scale: the one whose tick is nearest to `step / (num_steps - 1)`.

        Some scales lie half way between two ticks, so the choice is made by float64 rounding and must stay in float64.
        """
        position = step / (num_steps - 1) if num_steps > 1 else 0.0
        distances = [abs(tick - position) for tick in self.ticks]
        return self.residual_convs[distances.index(min(distances))]

    def nearest(self, rows: torch.Tensor) -> torch.Tensor:
        """Ids `[rows]` of the codes nearest to `rows` `[rows, channels]`."""
        return self.embedding(rows, nearest=True)

    def upsample(self, codes: torch.Tensor, step: int, schedule: Schedule) -> torch.Tensor:
        """What a scale adds to the latent, `[batch, channels, height, width]` of the last scale."""
        maps = self.embedding(codes).transpose(1, 2).unflatten(2, schedule.sizes[step])
        if step < len(schedule) - 1:
            maps = F.interpolate(maps, size=schedule.sizes[-1], mode="bicubic")
        return self.residual_conv(step, len(schedule))(maps.contiguous())


class MultiScaleVQModel(ModelMixin, PiecewiseDecoder, ConfigMixin):
    """
    Image tokenizer of VAR: an image becomes one map of codebook ids per scale, each map coding what the coarser ones
    left over.

    Args:
        vocab_size (`int`, defaults to 4096):
            Rows of the codebook.
        latent_channels (`int`, defaults to 32):
            Channels of the latent and of a code.
        block_out_channels (`tuple[int, ...]`, defaults to `(160, 160, 320, 320, 640)`):
            Widths of the encoder's levels, finest first. The latent is `2 ** (levels - 1)` times smaller than the image.
        layers_per_block (`int`, defaults to 2):
            Residual blocks of an encoder level; a decoder level has one more.
        residual_ratio (`float`, defaults to 0.5):
            Weight of the residual convolutions.
        num_residual_convs (`int`, defaults to 4):
            Residual convolutions shared by the scales.
        norm_num_groups (`int`, defaults to 32):
            Groups of every group normalisation.
    """

    _keep_in_fp32_modules = ["quantizer"]
    _no_split_modules = ["ResnetBlock2D", "Attention"]
    _supports_gradient_checkpointing = True
    # Groups that are fetched when they are called themselves: `encode`, `accumulate` and `decode` do not call the model.
    _group_offload_block_modules = ["encoder", "decoder", "quant_conv", "post_quant_conv", "quantizer", "embedding"]
    _skip_layerwise_casting_patterns = ["quantizer", "quant_conv", "norm"]

    @register_to_config
    def __init__(
        self,
        vocab_size: int = 4096,
        latent_channels: int = 32,
        block_out_channels: tuple[int, ...] = (160, 160, 320, 320, 640),
        layers_per_block: int = 2,
        residual_ratio: float = 0.5,
        num_residual_convs: int = 4,
        norm_num_groups: int = 32,
    ):
        super().__init__()
        levels = len(block_out_channels)
        self.encoder = Encoder(
            in_channels=3,
            out_channels=latent_channels,
            down_block_types=("DownEncoderBlock2D",) * (levels - 1) + ("AttnDownEncoderBlock2D",),
            block_out_channels=tuple(block_out_channels),
            layers_per_block=layers_per_block,
            norm_num_groups=norm_num_groups,
            double_z=False,
        )
        self.decoder = Decoder(
            in_channels=latent_channels,
            out_channels=3,
            up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * (levels - 1),
            block_out_channels=tuple(block_out_channels),
            layers_per_block=layers_per_block,
            norm_num_groups=norm_num_groups,
        )
        self.quant_conv = nn.Conv2d(latent_channels, latent_channels, kernel_size=3, padding=1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, kernel_size=3, padding=1)
        self.quantizer = MultiScaleVectorQuantizer(vocab_size, latent_channels, residual_ratio, num_residual_convs)

    @property
    def downscale_factor(self) -> int:
        """Image pixels per side of a latent position."""
        return 2 ** (len(self.config["block_out_channels"]) - 1)

    def latent_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the latent that a token map of a size stands for: the same."""
        return size

    @apply_forward_hook
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """
        Features of images, before quantisation.

        Args:
            images (`torch.Tensor`):
                `[batch, 3, height, width]` in [-1, 1].

        Returns:
            `torch.Tensor`: `[batch, latent_channels, height / downscale_factor, width / downscale_factor]`.
        """
        return self.quant_conv(self.encoder(images.to(self.quant_conv.weight.dtype)))

    @apply_forward_hook
    def tokenize(self, features: torch.Tensor, schedule: Schedule) -> list[torch.Tensor]:
        """
        Token ids of features, scale by scale: each scale codes what the ones before it left over.

        Args:
            features (`torch.Tensor`):
                What [`~MultiScaleVQModel.encode`] returns; its size must be that of the last scale.
            schedule (`Schedule`):
                The scales.

        Returns:
            `list[torch.Tensor]`: one tensor `[batch, n_k]` of ids a scale.
        """
        if features.shape[2:] != schedule.sizes[-1]:
            raise ValueError(
                f"The features are {tuple(features.shape[2:])} but the last scale is {schedule.sizes[-1]}: "
                f"give images of {self.downscale_factor} times that size."
            )
        residual = features.float()
        tokens = []
        for step, size in enumerate(schedule.sizes):
            last = step == len(schedule) - 1
            maps = residual if last else F.interpolate(residual, size=size, mode="area")
            ids = self.quantizer.nearest(maps.permute(0, 2, 3, 1).flatten(0, 2)).view(len(maps), -1)
            residual = residual - self.quantizer.upsample(ids, step, schedule).to(residual.device)
            tokens.append(ids)
        return tokens

    @apply_forward_hook
    def accumulate(
        self, latents: torch.Tensor, codes: torch.Tensor, step: int, schedule: Schedule
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Add a scale to the running latent, and make the transformer's input for the next scale from it.

        Args:
            latents (`torch.Tensor`):
                Running latent `[batch, latent_channels, height, width]` in float32, zeros before the first scale.
            codes (`torch.Tensor`):
                Ids `[batch, n_k]`, or weights over the codebook `[batch, n_k, vocab_size]` for a soft mixture; on the
                device of the transformer, which may be another one.
            step (`int`):
                Index of the scale, from 0.
            schedule (`Schedule`):
                The scales.

        Returns:
            `tuple[torch.Tensor, torch.Tensor | None]`: the new running latent, and the next input
            `[batch, n_(k+1), latent_channels]` on the device of the codes, or `None` after the last scale.
        """
        latents = latents + self.quantizer.upsample(codes.to(latents.device), step, schedule).to(latents.device)
        return latents, self.next_input(latents, step, schedule, codes.device)

    def next_input(
        self, latents: torch.Tensor, step: int, schedule: Schedule, device: torch.device | None = None
    ) -> torch.Tensor | None:
        """
        The transformer's input for the scale after `step`.

        Args:
            latents (`torch.Tensor`):
                Running latent `[batch, latent_channels, height, width]`, pooled to the next scale.
            step (`int`):
                Index of the scale, from 0.
            schedule (`Schedule`):
                The scales.
            device (`torch.device`, *optional*):
                Where the transformer is; by default where the latent is.

        Returns:
            `torch.Tensor`: `[batch, n_(k+1), latent_channels]`, or `None` after the last scale.
        """
        if step == len(schedule) - 1:
            return None
        pooled = F.interpolate(latents, size=schedule.sizes[step + 1], mode="area").flatten(2).transpose(1, 2)
        return pooled.to(device or latents.device)

    def _decode_whole(self, latents: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.post_quant_conv(latents.to(self.post_quant_conv.weight.dtype))).clamp(-1, 1)

    def forward(
        self, images: torch.Tensor, schedule: Schedule, return_dict: bool = True
    ) -> DecoderOutput | tuple[torch.Tensor]:
        """
        Images after a round trip through the tokens.

        Args:
            images (`torch.Tensor`):
                `[batch, 3, height, width]` in [-1, 1].
            schedule (`Schedule`):
                The scales; the last one has the size of the latent.
            return_dict (`bool`, *optional*, defaults to `True`):
                Whether to return a [`~diffusers.models.autoencoders.vae.DecoderOutput`] rather than a tuple.

        Returns:
            [`~diffusers.models.autoencoders.vae.DecoderOutput`] or `tuple`: images of the same shape in [-1, 1].
        """
        features = self.encode(images)
        latents = torch.zeros_like(features, dtype=torch.float32)
        for step, tokens in enumerate(self.tokenize(features, schedule)):
            latents, _ = self.accumulate(latents, tokens, step, schedule)
        decoded = self.decode(latents)
        return DecoderOutput(sample=decoded) if return_dict else (decoded,)
