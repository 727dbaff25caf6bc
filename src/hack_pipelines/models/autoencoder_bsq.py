"""Multi-scale binary spherical tokenizer of Infinity (arXiv 2412.04431, section 3.2)."""

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.autoencoders.vae import Decoder, DecoderOutput, Encoder
from diffusers.utils.accelerate_utils import apply_forward_hook

from ..schedule import Schedule
from .tiling import PiecewiseDecoder


# A token covers a square of so many latent positions a side when the latent is patchified.
PATCH_SIDE = 2


class MultiScaleBSQModel(ModelMixin, PiecewiseDecoder, ConfigMixin):
    """
    Image tokenizer of Infinity: an image becomes one map of bits per scale, each map coding the signs of what the coarser
    ones left over. A position with bits `b` stands for the vector `(2 b - 1) / sqrt(latent_channels)` of length 1.

    Args:
        latent_channels (`int`, defaults to 32):
            Channels of the latent, and bits of a latent position.
        block_out_channels (`tuple[int, ...]`, defaults to `(128, 256, 512, 512, 512)`):
            Widths of the encoder's levels, finest first. The latent is `2 ** (levels - 1)` times smaller than the image.
        layers_per_block (`int`, defaults to 2):
            Residual blocks of an encoder level; a decoder level has one more.
        norm_num_groups (`int`, defaults to 32):
            Groups of every group normalisation.
        patchify (`bool`, defaults to `False`):
            Whether a token of the transformer is a square of 2 x 2 latent positions, with four times as many bits.
    """

    _no_split_modules = ["ResnetBlock2D", "Attention"]
    _supports_gradient_checkpointing = True
    # Groups that are fetched when they are called themselves: `encode`, `accumulate` and `decode` do not call the model.
    _group_offload_block_modules = ["encoder", "decoder"]
    _skip_layerwise_casting_patterns = ["norm", "conv_in"]

    @register_to_config
    def __init__(
        self,
        latent_channels: int = 32,
        block_out_channels: tuple[int, ...] = (128, 256, 512, 512, 512),
        layers_per_block: int = 2,
        norm_num_groups: int = 32,
        patchify: bool = False,
    ):
        super().__init__()
        levels = len(block_out_channels)
        self.encoder = Encoder(
            in_channels=3,
            out_channels=latent_channels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            block_out_channels=tuple(block_out_channels),
            layers_per_block=layers_per_block,
            norm_num_groups=norm_num_groups,
            double_z=False,
            mid_block_add_attention=False,
        )
        self.decoder = Decoder(
            in_channels=latent_channels,
            out_channels=3,
            up_block_types=("UpDecoderBlock2D",) * levels,
            block_out_channels=tuple(block_out_channels),
            layers_per_block=layers_per_block,
            norm_num_groups=norm_num_groups,
            mid_block_add_attention=False,
        )

    @property
    def downscale_factor(self) -> int:
        """Image pixels per side of a latent position."""
        return 2 ** (len(self.config["block_out_channels"]) - 1)

    @property
    def bits_per_token(self) -> int:
        """Bits of a token of the transformer."""
        return self.config["latent_channels"] * (PATCH_SIDE**2 if self.config["patchify"] else 1)

    def latent_size(self, size: tuple[int, int]) -> tuple[int, int]:
        """Height and width of the latent that a token map of a size stands for."""
        side = PATCH_SIDE if self.config["patchify"] else 1
        return size[0] * side, size[1] * side

    @apply_forward_hook
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """
        Features of images, before quantisation.

        Args:
            images (`torch.Tensor`):
                `[batch, 3, height, width]` in [-1, 1].

        Returns:
            `torch.Tensor`: `[batch, latent_channels, height / downscale_factor, width / downscale_factor]` in float32.
        """
        return self.encoder(images.to(self.encoder.conv_in.weight.dtype)).float()

    def tokenize(self, features: torch.Tensor, schedule: Schedule) -> list[torch.Tensor]:
        """
        Bits of features, scale by scale: each scale codes the signs of what the ones before it left over.

        Args:
            features (`torch.Tensor`):
                What [`~MultiScaleBSQModel.encode`] returns; its size must be that of the last scale.
            schedule (`Schedule`):
                The scales.

        Returns:
            `list[torch.Tensor]`: one tensor `[batch, n_k, bits]` of 0 and 1 in uint8 a scale.
        """
        last_size = self.latent_size(schedule.sizes[-1])
        if features.shape[2:] != last_size:
            raise ValueError(
                f"The features are {tuple(features.shape[2:])} but the last scale is {last_size}: give images of "
                f"{self.downscale_factor} times that size."
            )
        residual = features.float()
        tokens = []
        for step in range(len(schedule)):
            unit = F.normalize(self.residual_maps(residual, step, schedule), dim=1)
            bits = unit > 0
            # What the encoder adds is the straight-through form, whose last place can differ from the code's.
            quantised = unit + (self.codes(bits) - unit)
            residual = residual - self.upsample(quantised, step, schedule)
            tokens.append(self.pack(bits).to(torch.uint8))
        return tokens

    def residual_maps(self, residual: torch.Tensor, step: int, schedule: Schedule) -> torch.Tensor:
        """What a scale has to code, `[batch, latent_channels, height, width]`: the average over its cells."""
        if step == len(schedule) - 1:
            return residual
        return F.interpolate(residual, size=self.latent_size(schedule.sizes[step]), mode="area")

    def codes(self, bits: torch.Tensor) -> torch.Tensor:
        """Vectors of length 1 along the channels for boolean bits, in float32; any shape."""
        magnitude = self.config["latent_channels"] ** -0.5
        return torch.where(bits, magnitude, -magnitude)

    def upsample(self, maps: torch.Tensor, step: int, schedule: Schedule) -> torch.Tensor:
        """Maps of a scale at the size of the latent; those of the last scale as they are."""
        if step == len(schedule) - 1:
            return maps
        return resize(maps, self.latent_size(schedule.sizes[-1]))

    def pack(self, maps: torch.Tensor) -> torch.Tensor:
        """Maps `[batch, latent_channels, height, width]` as tokens `[batch, n_k, bits_per_token]`."""
        if self.config["patchify"]:
            maps = F.pixel_unshuffle(maps, PATCH_SIDE)
        return maps.flatten(2).transpose(1, 2)

    def unpack(self, tokens: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """Tokens `[batch, n_k, bits_per_token]` of a token map of a size as maps; the inverse of `pack`."""
        maps = tokens.transpose(1, 2).unflatten(2, size)
        return F.pixel_shuffle(maps, PATCH_SIDE) if self.config["patchify"] else maps

    # Neither this nor `tokenize` reads a weight, so offload hooks have nothing to fetch for them.
    def accumulate(
        self, latents: torch.Tensor, codes: torch.Tensor, step: int, schedule: Schedule
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Add a scale to the running latent, and make the transformer's input for the next scale from it.

        Args:
            latents (`torch.Tensor`):
                Running latent `[batch, latent_channels, height, width]` in float32, zeros before the first scale.
            codes (`torch.Tensor`):
                Bits `[batch, n_k, bits_per_token]` of 0 and 1; on the device of the transformer, which may be another one.
            step (`int`):
                Index of the scale, from 0.
            schedule (`Schedule`):
                The scales.

        Returns:
            `tuple[torch.Tensor, torch.Tensor | None]`: the new running latent, and the next input
            `[batch, n_(k+1), bits_per_token]` on the device of the codes, or `None` after the last scale.
        """
        maps = self.codes(self.unpack(codes.to(latents.device, torch.bool), schedule.sizes[step]))
        latents = latents + self.upsample(maps, step, schedule)
        return latents, self.next_input(latents, step, schedule, codes.device)

    def next_input(
        self, latents: torch.Tensor, step: int, schedule: Schedule, device: torch.device | None = None
    ) -> torch.Tensor | None:
        """
        The transformer's input for the scale after `step`.

        Args:
            latents (`torch.Tensor`):
                Running latent `[batch, latent_channels, height, width]`, resized to the next scale.
            step (`int`):
                Index of the scale, from 0.
            schedule (`Schedule`):
                The scales.
            device (`torch.device`, *optional*):
                Where the transformer is; by default where the latent is.

        Returns:
            `torch.Tensor`: `[batch, n_(k+1), bits_per_token]`, or `None` after the last scale.
        """
        if step == len(schedule) - 1:
            return None
        resized = self.pack(resize(latents, self.latent_size(schedule.sizes[step + 1])))
        return resized.to(device or latents.device)

    def _decode_whole(self, latents: torch.Tensor) -> torch.Tensor:
        return self.decoder(latents.to(self.decoder.conv_in.weight.dtype)).clamp(-1, 1)

    def forward(
        self, images: torch.Tensor, schedule: Schedule, return_dict: bool = True
    ) -> DecoderOutput | tuple[torch.Tensor]:
        """
        Images after a round trip through the bits.

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
        latents = torch.zeros_like(features)
        for step, tokens in enumerate(self.tokenize(features, schedule)):
            latents, _ = self.accumulate(latents, tokens, step, schedule)
        decoded = self.decode(latents)
        return DecoderOutput(sample=decoded) if return_dict else (decoded,)


def resize(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """
    Maps at another size, point-sampled. The original resizes with a time axis of length 1: in two dimensions the same
    mathematics rounds otherwise.
    """
    return F.interpolate(maps.unsqueeze(2), size=(1, *size), mode="trilinear").squeeze(2)
