"""The two encoders of FNAC, under the official names, so that official checkpoints load.

Source: arXiv 2303.11302 and its official code: an image ResNet-18 with dropout and a 1x1 projection, an audio ResNet-18
with one input channel, max pooling and a linear projection; both embeddings L2-normalised.
"""

from __future__ import annotations

from urllib.error import URLError

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models import ResNet, ResNet18_Weights, resnet18

from fnac.checkpoints import read_weights

WIDTHS = (64, 128, 256, 512)  # channels after each of ResNet-18's stages
IMAGENET = "imagenet"


class AudioVisualModel(nn.Module):
    """Image and audio encoders: ``model(image, audio) -> img, aud``.

    Args:
        dim: size of the embeddings.
        image_stages: of ResNet-18's four stages, how many to keep. The published model has all (stride 32, 7x7 cells
            of a 224-pixel image); three give stride 16.
        audio_stages: likewise.
        image_dropout: of the image features before their projection.
        audio_dropout: of the audio features before theirs.
        image_weights: what the image encoder starts from: "imagenet" (torchvision's, downloaded on first use), a file
            made by :func:`fnac.warmup.warm_up` or a checkpoint of the whole model, or None for random weights.

    Shape:
        image ``(N, 3, S, S)``, ImageNet-normalised, and audio ``(M, 1, F, T)``, log spectrograms, to img
        ``(N, dim, S/32, S/32)`` and aud ``(M, dim)``, both of unit norm over ``dim``, under autocast
        within the rounding of its dtype.
    """

    def __init__(
        self,
        dim: int = 512,
        *,
        image_stages: int = 4,
        audio_stages: int = 4,
        image_dropout: float = 0.9,
        audio_dropout: float = 0.0,
        image_weights: str | None = None,
    ) -> None:
        super().__init__()
        self.imgnet = image_encoder(image_stages, image_weights)
        self.audnet = _resnet(audio_stages, "audio_stages")
        self.audnet.conv1 = nn.Conv2d(1, WIDTHS[0], kernel_size=7, stride=2, padding=3, bias=False)
        self.audnet.avgpool = nn.AdaptiveMaxPool2d(1)
        self.aud_dropout = nn.Dropout(audio_dropout)
        self.aud_proj = nn.Linear(WIDTHS[audio_stages - 1], dim)
        self.img_dropout = nn.Dropout(image_dropout)
        self.img_proj = nn.Conv2d(WIDTHS[image_stages - 1], dim, kernel_size=1)
        for net in (self.audnet, self.img_proj, self.aud_proj):
            net.apply(_initialize)

    def forward(self, image: Tensor, audio: Tensor) -> tuple[Tensor, Tensor]:
        img = self.img_proj(self.img_dropout(feature_map(self.imgnet, image)))
        aud = self.aud_proj(self.aud_dropout(self.audnet(audio)))
        return F.normalize(img, dim=1), F.normalize(aud, dim=1)


def image_encoder(stages: int = 4, weights: str | None = None) -> ResNet:
    """The image ResNet-18, see ``image_stages`` and ``image_weights`` of :class:`AudioVisualModel`.

    Raises:
        ValueError: ``stages`` is not 1..4, or the file is not of an encoder with as many.
        FileNotFoundError: there is no such file.
        RuntimeError: the ImageNet weights cannot be downloaded.
    """
    net = _resnet(stages, "image_stages")
    if weights == IMAGENET:
        published = ResNet18_Weights.IMAGENET1K_V1
        try:
            states = published.get_state_dict(progress=True, check_hash=True)
        except (URLError, OSError) as error:
            raise RuntimeError(
                f"image_weights: the ImageNet weights cannot be downloaded ({error}); copy {published.url} "
                f"into {torch.hub.get_dir()}/checkpoints, or choose a file or null"
            ) from error
        net.load_state_dict({name: value for name, value in states.items() if name in net.state_dict()})
    elif weights is not None:
        load_image_encoder(net, weights)
    return net


def load_image_encoder(net: ResNet, path: str) -> None:
    """Load an image encoder from its own file or from a checkpoint of the whole model."""
    states = read_weights(path)
    prefix = "imgnet."
    inner = {name.removeprefix(prefix): value for name, value in states.items() if name.startswith(prefix)}
    load_strictly(net, inner or states, path)


def load_strictly(net: nn.Module, states: dict[str, Tensor], path: str) -> None:
    """``net.load_state_dict(states)``; what does not fit becomes a ValueError that names the file."""
    try:
        net.load_state_dict(states)
    except RuntimeError as error:
        raise ValueError(f"{path} does not fit the model (other numbers of stages or dimensions?): {error}") from error


def feature_map(net: ResNet, image: Tensor) -> Tensor:
    """A ResNet's last feature map ``(N, channels, H, W)``."""
    x = net.maxpool(net.relu(net.bn1(net.conv1(image))))
    return net.layer4(net.layer3(net.layer2(net.layer1(x))))


def object_maps(net: ResNet, image: Tensor) -> Tensor:
    """How much an image encoder sees at each cell ``(N, H, W)``: mean magnitude over channels (EZ-VSL's object map)."""
    return feature_map(net, image).abs().float().mean(dim=1)


def _resnet(stages: int, argument: str) -> ResNet:
    if stages not in (1, 2, 3, 4):
        raise ValueError(f"{argument} must be 1, 2, 3 or 4, got {stages!r}")
    net = resnet18()
    net.fc = nn.Identity()
    for stage in range(stages + 1, 5):
        setattr(net, f"layer{stage}", nn.Identity())
    return net


def _initialize(module: nn.Module) -> None:
    """The official initialisation of everything but the image encoder."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.01)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, mean=1, std=0.02)
        nn.init.zeros_(module.bias)
